"""Shards made once per session, what a run has left, and real processes for the tests that need them."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked_ranks import PRELOADED, ROOT, ForkedRank

from benchmarks.ranks import free_port, logs

os.environ.setdefault("WANDB_MODE", "disabled")  # tests that mean Weights & Biases say so themselves
# threads that spin while they wait make tiny nets 30 times slower where other processes want the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
multiprocessing.set_forkserver_preload(PRELOADED)  # one server for all tests of this process; it starts with the first rank
_started = []  # ranks of the test that runs


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
    return sharded(tmp_path_factory.mktemp("shards") / "digits", "--source", "sklearn", "--dataset", "digits")


@pytest.fixture
def copied(digits, tmp_path) -> Path:
    """The digits, to be damaged."""
    return shutil.copytree(digits, tmp_path / "digits")


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> str:
    """scikit-learn's breast_cancer as shards: 569 rows of 30 columns, two classes, train/val/test."""
    return sharded(tmp_path_factory.mktemp("shards") / "breast-cancer", "--source", "sklearn", "--dataset", "breast_cancer")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    """Three classes of JPEGs of several sizes."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(48):
        path = folder / "raw" / f"class{k % 3}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (5 + k % 7, 6 + k % 5, 3), np.uint8)
        Image.fromarray(pixels).resize((40 + k, 70 - k)).save(path)
    return sharded(folder / "shards", "--path", str(folder / "raw"), "--split.test", "0.3")


def sharded(out: Path, *argv: str) -> str:
    """Convert with these settings and one worker into a folder, without a word; return the folder."""
    from dist_train import shard

    with contextlib.redirect_stdout(io.StringIO()):
        shard.main([*argv, "--out", str(out), "--workers", "1"])
    return str(out)


def write_table(path: Path, columns: str, rows, labels: list[str]) -> list[str]:
    """Write rows (n, F) as a CSV file, their classes in column kind, nothing where a value is NaN; return settings to shard it."""
    cells = [[*("" if value != value else repr(float(value)) for value in row), label]
             for row, label in zip(rows, labels, strict=True)]  # fmt: skip
    path.write_text("".join(",".join(line) + "\n" for line in [[*columns, "kind"], *cells]))
    return ["--source", "csv", "--path", str(path), "--target", "kind", "--missing", "mean"]


def tiny_run(shards: str, run: Path, *argv: str) -> list[str]:
    """Settings of a run that takes a second: a narrow AlexNet with BatchNorm and dropout on the digits."""
    return [
        "--data.shards", shards, "--run", str(run), "--data.image_size", "16", "--data.global_batch_size", "96",
        "--data.threads", "1", "--model.name", "alexnet_bn", "--model.width", "0.0625", "--optim.lr", "0.02",
        "--optim.ema_decay", "0.9", "--augment.crop", "padded", "--augment.padding", "1", "--augment.rotate_degrees", "10",
        "--train.epochs", "2", "--train.log_every_steps", "1", "--track.wandb", "off", "--runtime.threads", "1", *argv,
    ]  # fmt: skip


def train_tiny(shards: str, run: Path, *argv: str) -> Path:
    """Train a `tiny_run` in this process; return its folder."""
    from dist_train.train import run_training

    assert run_training(tiny_run(shards, run, *argv)) == 0
    return run


def table_run(shards: str, run: Path, *argv: str) -> list[str]:
    """Settings of a run of the mlp on a table."""
    return ["--data.shards", shards, "--run", str(run), "--model.name", "mlp", "--track.wandb", "off", "--runtime.threads", "1",
            *argv]  # fmt: skip


def lines_of(run: Path, *kinds: str) -> list[dict]:
    """Lines of a run's metrics.jsonl, of these kinds if any is named; strict, unlike track.read_metrics: a torn line fails."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not kinds or line["kind"] in kinds]


def figures(run: Path) -> list[dict]:
    """What a run says of training and evaluation, less what a clock measured."""
    measured = {"time_s", "images_per_s", "data_wait", "tflops", "mfu"}
    return [{key: line[key] for key in line if key not in measured} for line in lines_of(run, "train", "eval")]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run, "train")]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files of tensors, weights.safetensors if they are folders, hold the same, bit for bit."""
    import torch
    from safetensors.torch import load_file

    a, b = (load_file(path / "weights.safetensors" if path.is_dir() else path) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def take(stream, count: int) -> list:
    return list(itertools.islice(stream, count))


def some_keys(n: int, seed: int = 0):
    """Random keys of the first n samples of a first epoch, (n,) int64."""
    import numpy as np
    import torch

    from dist_train.order import sample_keys

    return torch.from_numpy(sample_keys(seed, np.zeros(n, np.int64), np.arange(n)))


def wait_for(claim, what, timeout_s: float = 30, pause_s: float = 0.01, processes=()) -> None:
    """Return when claim() is true. Raises AssertionError, with what (or what()), after timeout_s or once a process has ended."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        states = [process.poll() for process in processes]
        assert time.monotonic() < deadline and states == [None] * len(states), (
            f"waited {timeout_s} s for {what() if callable(what) else what}; exit codes {states}")  # fmt: skip
        time.sleep(pause_s)


def reach(run: Path, num_steps: int, *processes) -> None:
    """Return when the run that these processes train, their logs beside it, has told of so many steps."""
    from dist_train.track import read_metrics

    def is_reached() -> bool:
        return sum(line["kind"] == "train" for line in read_metrics(run / "metrics.jsonl")) >= num_steps

    wait_for(is_reached, lambda: f"step {num_steps} of {run}\n{logs(run.parent)}", 120, 0.002, processes)


@contextlib.contextmanager
def serving(server):
    """Let an HTTP server answer while the block runs; yields its address."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


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
    world_size: int, argv: list[str], log_folder: Path, module: str = "dist_train.train", is_cold: bool = False, **env: str
) -> list:
    """Start world_size CPU processes that form one job, as a launcher would.

    They are forked from a process that has torch; is_cold: each is a Python of its own, for what a start itself does.
    """
    port, ranks = free_port(), []
    for rank in range(world_size):
        job = {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
               "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
               "PYTHONUNBUFFERED": "1"} | env  # fmt: skip
        path = log_folder / f"rank{rank}.log"
        with open(path, "w") as log:  # before the rank begins: nobody reads what another job left there
            if is_cold:
                command = [sys.executable, "-m", module, *argv]
                ranks.append(subprocess.Popen(command, env=os.environ | job, stdout=log, stderr=log, cwd=ROOT))
            else:
                ranks.append(ForkedRank(module, argv, os.environ | job, path))
        _started.append(ranks[-1])
    return ranks


def finish_ranks(ranks: list, log_folder: Path, timeout_s: float = 180) -> list[int]:
    """Wait for all; return their exit codes. On a time-out all are killed and their logs shown."""
    try:
        return [rank.wait(timeout_s) for rank in ranks]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"ranks still run after {timeout_s} s:\n{logs(log_folder)}") from None
    finally:
        for rank in ranks:
            rank.kill()


def run_ranks(world_size: int, argv: list[str], log_folder: Path, script: str = "", **how) -> tuple[list[int], list[str]]:
    """Exit codes and words of ranks that are started, as `start_ranks` does, and waited for. script: source that they run."""
    if script:
        (log_folder / "of_ranks.py").write_text(script)
        how |= {"module": "of_ranks", "PYTHONPATH": str(log_folder)}
    codes = finish_ranks(start_ranks(world_size, argv, log_folder, **how), log_folder)
    return codes, [(log_folder / f"rank{rank}.log").read_text() for rank in range(world_size)]


def run_to_end(world_size: int, argv: list[str], log_folder: Path, **how) -> None:
    """Start ranks and wait for them, as `run_ranks` does; all of them must end well."""
    codes, _ = run_ranks(world_size, argv, log_folder, **how)
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs(log_folder)}"


def train_in_turns(plan: str, settings: list[str], log_folder: Path) -> None:
    """Train one run on changing numbers of ranks, "1:8 2:16 4:24:hybrid 1:32": ranks:steps[:train.parallel], one start each."""
    for part in plan.split():
        num_ranks, max_steps, *parallel = part.split(":")
        argv = [*settings, "--train.max_steps", max_steps, "--train.parallel", *(parallel or ["ddp"])]
        run_to_end(int(num_ranks), argv, log_folder)


def pytest_runtest_teardown():
    """However the test ended, none of its ranks runs on."""
    while _started:
        rank = _started.pop()
        rank.kill()
        rank.wait()
