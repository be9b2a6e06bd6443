"""DALI's index files (wds2idx): where one lies beside a tar, it must say of the tar what the tar says itself.

    v1.2 2                                        version, number of samples
    jpg 512 10240 a.jpg cls 11264 1 a.cls         per sample: extension, offset, bytes and (from v1.2 on) name of each member

It saves nothing to believe it: every payload is read anyway, for its checksum. But a tar that was replaced or cut after it
was indexed for DALI shows here.
"""

import re
from pathlib import Path

from dist_train.errors import UserError

Member = tuple[str, int, int]  # name, offset of its bytes, number of them

_HEADER = re.compile(r"v1\.(\d+) (\d+)")
_COMPONENT = re.compile(r"(\S*) (\d+) (\d+)(?: |$)")
_NAMED_COMPONENT = re.compile(r"(\S*) (\d+) (\d+) .*?(?= \S* \d+ \d+ |$) ?")  # names may hold blanks


def check_dali_index(tar: Path, members: list[Member]) -> None:
    """Compare the index beside a tar, if there is one, with the tar's members. Raises UserError where they differ."""
    names = (f"{tar.name.removesuffix('.tar')}.idx", f"{tar.name.split('.')[0]}.idx")  # wds2idx cuts at the first dot
    path = next((tar.with_name(name) for name in names if tar.with_name(name).exists()), None)
    lines = _lines(path) if path else []
    header = _HEADER.fullmatch(lines[0].strip()) if lines else None
    if not header:
        return  # of another kind
    component = _COMPONENT if int(header[1]) < 2 else _NAMED_COMPONENT
    listed = [found.groups() for line in lines[1:] for found in component.finditer(line.strip())]
    there = {(offset, size): name for name, offset, size in members}
    for extension, offset, size in listed:
        name = there.get((int(offset), int(size)))
        if name is None or name.rpartition("/")[2].partition(".")[2] != extension:
            found = f"{name} there" if name else "no such member there"
            listed_one = f"a .{extension} of {int(size):,} bytes at byte {int(offset):,}"
            raise _differing(path, tar, f"lists {listed_one}, but the tar has {found}")
    visible = sum(not name.rpartition("/")[2].startswith(".") for name, _, _ in members)
    if len(lines) - 1 != int(header[2]) or len(listed) < visible:
        raise _differing(path, tar, f"lists {len(listed):,} members in {len(lines) - 1:,} of {int(header[2]):,} samples, "
                                    f"but the tar has {visible:,} members")  # fmt: skip


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None


def _differing(path: Path, tar: Path, what: str) -> UserError:
    return UserError(
        f"{path}: does not fit {tar.name}: it {what}.\n"
        f"  If the tar is as it should be, write the index again with wds2idx, or remove it; if not, fetch the tar again."
    )
