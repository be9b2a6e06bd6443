"""What this process may use of its machine: the limits of the control groups, a container's or a SLURM job's, that it is in.

A job's limits lie in a nested group, those of a container often in the outermost it can see: every level counts.
"""

import math
from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Cores' worth of time that the groups allow, the strictest of them; None if none limits it."""
    found = []
    for folder in _levels("cpu", root, own):
        limit, _, period = text_of(folder / "cpu.max").partition(" ")
        if not limit:
            limit, period = text_of(folder / "cpu.cfs_quota_us"), text_of(folder / "cpu.cfs_period_us")
        if limit.isdigit() and period.isdigit():  # "max", or -1, where there is none
            found.append(int(limit) / int(period))
    return min(found, default=None)


def memory_limit(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Bytes that the groups allow, the strictest of them; None if none limits it."""
    return min((limit for _, limit in _memory_limits(root, own)), default=None)


def free_memory(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Bytes that the groups still let this process take; None if none limits it. Inactive pages of files can go, so they count."""
    free = math.inf
    for folder, limit in _memory_limits(root, own):
        taken = text_of(folder / "memory.current") or text_of(folder / "memory.usage_in_bytes")
        lines = [line.split() for line in text_of(folder / "memory.stat").splitlines()]
        stat = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}
        pages = stat.get("total_inactive_file", stat.get("inactive_file", 0))  # version 1 counts groups below apart
        free = min(free, max(0, limit - int(taken or 0) + pages))
    return None if free == math.inf else free


def _memory_limits(root: Path, own: Path) -> Iterator[tuple[Path, int]]:
    for folder in _levels("memory", root, own):
        limit = text_of(folder / "memory.max") or text_of(folder / "memory.limit_in_bytes")
        if limit.isdigit() and int(limit) < 1 << 60:  # version 1 has a number near 2^63 for none
            yield folder, int(limit)


def _levels(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's groups, innermost first, of version 2 ("0::/a/b") and of version 1 ("4:memory:/a/b")."""
    for line in [*text_of(own).splitlines(), "0::/", f"1:{controller}:/"]:  # where its own are not mounted, the outermost are
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        folder = top / group.lstrip("/")
        yield folder
        yield from (level for level in folder.parents if level.is_relative_to(top))


def text_of(path: str | Path) -> str:
    """A file's text; empty where it is not there or not for us."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
