"""A disk that fills up while a checkpoint is written, and one that turns read-only: named, and nothing is lost."""

import json
import subprocess

import pytest
import torch
from conftest import tiny_run
from safetensors.torch import load_file

from dist_train.checkpoint import Checkpoints
from dist_train.errors import UserError
from dist_train.train import run_training

pytestmark = pytest.mark.cluster


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
    run = tmp_path_factory.mktemp("calm") / "run"
    assert run_training(tiny_run(digits, run)) == 0
    return run


@pytest.mark.parametrize("fault, mended", [("size", "size=64m"), ("ro", "rw")])
def test_a_disk_that_takes_no_more_keeps_the_last_checkpoint(calm, digits, disk, tmp_path, fault, mended):
    run = disk / "run"
    argv = tiny_run(digits, run, "--train.checkpoint_every_steps", "2", "--resume")
    assert run_training([*argv, "--train.max_steps", "4"]) == 0
    used = int(
        subprocess.run(["df", "--output=used", "-k", str(disk)], capture_output=True, text=True).stdout.split()[1]
    )
    remount(disk, f"size={used + 64}k" if fault == "size" else "ro")
    # metrics and settings are small; the next checkpoint does not fit
    with pytest.raises((UserError, OSError)) as error:
        run_training(argv)
    assert str(run) in str(error.value)
    saved, complaints = Checkpoints(run, 2).newest()
    assert saved.step == 4 and not complaints
    remount(disk, mended)
    assert run_training(argv) == 0
    first, second = load_file(calm / "weights.safetensors"), load_file(run / "weights.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
