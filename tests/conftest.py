"""Shards made once per session, and real processes for the tests that need them."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("WANDB_MODE", "disabled")  # tests that mean Weights & Biases say so themselves
# threads that spin while they wait make tiny nets 30 times slower where other processes want the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="module")
def one_thread():
    """For tiny nets: on a busy machine two threads wait for each other many times longer than they compute."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    """scikit-learn's digits as shards: 1,797 grey 8x8 pictures, train/val/test."""
    from dist_train import shard

    out = tmp_path_factory.mktemp("shards") / "digits"
    with contextlib.redirect_stdout(io.StringIO()):
        shard.main(["--source", "sklearn", "--dataset", "digits", "--out", str(out), "--workers", "1"])
    return str(out)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    """Three classes of JPEGs of several sizes."""
    import numpy as np
    from PIL import Image

    from dist_train import shard

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(48):
        path = folder / "raw" / f"class{k % 3}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (5 + k % 7, 6 + k % 5, 3), np.uint8)
        Image.fromarray(pixels).resize((40 + k, 70 - k)).save(path)
    with contextlib.redirect_stdout(io.StringIO()):
        shard.main(["--source", "folder", "--path", str(folder / "raw"), "--out", str(folder / "shards"), "--workers", "1",
                    "--split.test", "0.3"])  # fmt: skip
    return str(folder / "shards")


def write_table(path: Path, columns: str, rows, labels: list[str]) -> list[str]:
    """Write rows (n, F) as a CSV file, their classes in column kind, nothing where a value is NaN; return settings to shard it."""
    cells = [[*("" if value != value else repr(float(value)) for value in row), label]
             for row, label in zip(rows, labels, strict=True)]  # fmt: skip
    path.write_text("".join(",".join(line) + "\n" for line in [[*columns, "kind"], *cells]))
    return ["--source", "csv", "--path", str(path), "--target", "kind", "--missing", "mean", "--workers", "1"]


def tiny_run(shards: str, run: Path, *argv: str) -> list[str]:
    """Settings of a run that takes a second: a narrow AlexNet with BatchNorm and dropout on the digits."""
    return [
        "--data.shards", shards, "--run", str(run), "--data.image_size", "16", "--data.global_batch_size", "96",
        "--data.threads", "1", "--model.name", "alexnet_bn", "--model.width", "0.0625", "--optim.lr", "0.02",
        "--optim.ema_decay", "0.9", "--augment.crop", "padded", "--augment.padding", "1", "--augment.rotate_degrees", "10",
        "--train.epochs", "2", "--train.log_every_steps", "1", "--track.wandb", "off", "--runtime.threads", "1", *argv,
    ]  # fmt: skip


@contextlib.contextmanager
def killed_at(operation: int, monkeypatch):
    """End the block at this operation on files (1, 2, ...) of it, as a kill does; yields [how many are left]."""

    class Kill(BaseException):
        pass

    left = [operation]

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Kill
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(Kill):
        for name in ("rename", "replace", "fsync"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield left


def start_ranks(
    world_size: int, argv: list[str], log_folder: Path, module: str = "dist_train.train", **env: str
) -> list:
    """Start world_size CPU processes that form one job, as a launcher would."""
    port, ranks = free_port(), []
    for rank in range(world_size):
        job = {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
               "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
               "PYTHONUNBUFFERED": "1"} | env  # fmt: skip
        with open(log_folder / f"rank{rank}.log", "w") as log:
            command = [sys.executable, "-m", module, *argv]
            ranks.append(subprocess.Popen(command, env=os.environ | job, stdout=log, stderr=log, cwd=ROOT))
    return ranks


def finish_ranks(ranks: list, log_folder: Path, timeout_s: float = 180) -> list[int]:
    """Wait for all; return their exit codes. On a time-out all are killed and their logs shown."""
    try:
        return [rank.wait(timeout_s) for rank in ranks]
    except subprocess.TimeoutExpired:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(log_folder.glob("rank*.log")))
        raise AssertionError(f"ranks still run after {timeout_s} s:\n{logs}") from None
    finally:
        for rank in ranks:
            rank.kill()
