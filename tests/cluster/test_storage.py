"""Disks that fill up, turn read-only or fail, while a checkpoint is written or a shard is read: named, and nothing is lost."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, lines_of, same_tensors, tiny_run, train_tiny

from dist_train.checkpoint import Checkpoints
from dist_train.errors import UserError
from dist_train.index import load_index
from dist_train.train import run_training

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "small", str(folder)])
    if mounted.returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture(scope="module")
def calm(digits, tmp_path_factory):
    return train_tiny(digits, tmp_path_factory.mktemp("calm") / "run")


@pytest.mark.parametrize("fault, mended", [("size", "size=64m"), ("ro", "rw")])
def test_a_disk_that_takes_no_more_keeps_the_last_checkpoint(calm, digits, disk, tmp_path, fault, mended):
    run = disk / "run"
    argv = tiny_run(digits, run, "--train.checkpoint_every_steps", "2", "--resume")
    assert run_training([*argv, "--train.max_steps", "4"]) == 0
    used = int(subprocess.run(["df", "--output=used", "-k", str(disk)], capture_output=True, text=True).stdout.split()[1])
    remount(disk, f"size={used + 64}k" if fault == "size" else "ro")
    # metrics and settings are small; the next checkpoint does not fit
    with pytest.raises((UserError, OSError)) as error:
        run_training(argv)
    assert str(run) in str(error.value)
    saved, complaints = Checkpoints(run, 2).newest()
    assert saved.step == 4 and not complaints
    remount(disk, mended)
    assert run_training(argv) == 0
    assert_same_run(run, calm)


def assert_same_run(run, calm):
    assert same_tensors(calm, run)
    steps = [line["step"] for line in lines_of(run, "train")]
    assert steps == list(range(1, len(steps) + 1))


def run_on_failing_disk(argv, calls, when, path=None):
    """Train in a process whose system calls of some kinds, on one file if there is a path, fail with EIO from the when-th on."""
    if not shutil.which("strace"):
        pytest.skip("needs strace, which makes system calls fail")
    inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO:when={when}+", *(["-P", str(path)] if path else [])]
    words = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", *inject]
    command = [*words, sys.executable, "-m", "dist_train.train", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    return done.returncode, said


@pytest.mark.parametrize("calls, when, path, complaint", [
    # how a disk tells of bytes it has lost
    ("fsync", 1, "checkpoints/step-00000006.partial/state.json", "the checkpoint could not be written"),
    ("write", 1, "checkpoints/step-00000006.partial/state.json", "the checkpoint could not be written"),
    ("rename,renameat,renameat2", 1, "checkpoints/step-00000006.partial", "the checkpoint could not be written"),
    ("write", 4, "metrics.jsonl", "cannot write the run's figures"),
])  # fmt: skip
def test_a_disk_that_fails_under_a_write_keeps_the_last_checkpoint(calm, digits, tmp_path, calls, when, path, complaint):
    run = tmp_path / "run"
    argv = tiny_run(digits, run, "--train.checkpoint_every_steps", "2", "--resume")
    assert run_training([*argv, "--train.max_steps", "4"]) == 0
    code, said = run_on_failing_disk(argv, calls, when, path and run / path)
    assert code == 2 and complaint in said and os.strerror(5) in said and "--resume" in said, said
    saved, complaints = Checkpoints(run, 2).newest()
    assert saved.step >= 4 and not complaints
    assert run_training(argv) == 0
    assert_same_run(run, calm)


def test_a_disk_that_fails_under_a_read_names_shard_and_sample(digits, tmp_path):
    split = load_index(digits).split("train")
    path = f"{split.folder}/{split.files[1]}"
    argv = tiny_run(digits, tmp_path / "run")
    code, said = run_on_failing_disk(argv, "pread64,preadv,preadv2", 2, path)
    assert code == 2 and f"{path}: the shard cannot be read: Input/output error (sample train/" in said, said
