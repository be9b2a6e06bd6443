"""Real hosts and a real SLURM, made for the tests that ask for them; skipped, with the reason, where that cannot be."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import conftest
import pytest

HERE = Path(__file__).parent
wait_for = functools.partial(conftest.wait_for, timeout_s=180, pause_s=0.1)
os.environ["PATH"] += ":/usr/sbin:/sbin"


class Hosts:
    """Hosts ctl, node1, node2, ... of this machine, and SLURM on them where it was asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def command(self, host: str, *words: str) -> list[str]:
        return [str(self.folder / "on"), host, *map(str, words)]

    def run(self, host: str, *words: str, **env: str) -> str:
        """What a command says on a host. Raises CalledProcessError if it fails."""
        done = subprocess.run(
            self.command(host, *words), env=os.environ | env, cwd=conftest.ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def fault(self, host: str, what: str) -> None:
        subprocess.run([HERE / "hosts-fault.sh", self.folder, host, what], check=True)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ..., or COMPLETED, FAILED, ... of a SLURM job."""
        words = dict(w.split("=", 1) for w in self.run("ctl", "scontrol", "show", "job", job).split() if "=" in w)
        return words["JobState"]


@pytest.fixture(scope="module")
def hosts():
    """Three hosts with separate networks."""
    yield from _start("hosts", ["ip", "unshare", "nsenter"], 3)


@pytest.fixture(scope="module")
def slurm():
    """A SLURM of three nodes."""
    yield from _start("slurm", ["ip", "unshare", "slurmctld", "slurmd", "sbatch", "munged"], 3)


def _start(kind: str, programs: list[str], count: int):
    missing = [program for program in programs if not shutil.which(program)]
    if os.getuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(programs)}; missing: {', '.join(missing) or 'root'}. Try: make test-cluster")
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))  # pytest's own folders are closed to others, which munge refuses
    subprocess.run([HERE / f"{kind}-up.sh", folder, str(count)], check=True)
    try:
        yield Hosts(folder)
    finally:
        subprocess.run([HERE / f"{kind}-down.sh", folder], check=True)
        shutil.rmtree(folder)
