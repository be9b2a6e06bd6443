"""How long a stopped training takes to its next step, and of what that depends: not on how far it was, not on the set's size.

    .venv/bin/python benchmarks/restart.py [--repeats 5] [--out benchmarks/results/restart.json]

A training of the digits is stopped early and late, and resumed as a user does; the clock runs from the start of the process to
the first new line of metrics.jsonl. Importing torch is timed alone, in turn with it. Seeking is timed in an order of 10^9 samples
in 100,000 shards, at its start and at its 10^7-th step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
STOPS = {"early": 3, "late": 1200}  # steps
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT), "ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        seconds = restarts(Path(folder), options.repeats)
    found = {"restart_s": {name: summary(values) for name, values in seconds.items()}}
    found["beyond_torch_s"] = {
        name: summary([a - b for a, b in zip(seconds[name], seconds["import torch"], strict=True)]) for name in STOPS
    }
    found["seek_ms"] = seeks(options.repeats)
    text = json.dumps(found | surroundings(), indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")
    return 0


def restarts(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds from the start of a process to its first step, for each of STOPS; and to the end of `import torch`."""
    from dist_train import shard

    shards = folder / "digits"
    shard.main(["--source", "sklearn", "--dataset", "digits", "--out", str(shards), "--workers", "1"])
    settings = ["--data.shards", str(shards), "--model.name", "alexnet_bn", "--model.width", "0.0625", "--data.image_size", "16",
                "--data.global_batch_size", "96", "--data.threads", "1", "--train.epochs", "1000", "--runtime.threads", "1",
                "--train.eval_every_epochs", "0", "--train.log_every_steps", "1", "--track.wandb", "off"]  # fmt: skip
    seconds = {name: [] for name in ("import torch", *STOPS)}
    for name, step in STOPS.items():
        train([*settings, "--run", str(folder / name), "--train.max_steps", str(step)])
    for repeat in range(1, repeats + 1):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True, env=ENVIRONMENT)
        seconds["import torch"].append(time.monotonic() - began)
        for name, step in STOPS.items():
            metrics = folder / name / "metrics.jsonl"
            argv = [*settings, "--run", str(folder / name), "--resume", "--train.max_steps", str(step + repeat)]
            seconds[name].append(train(argv, metrics, step + repeat))
    return seconds


def train(argv: list[str], metrics: Path | None = None, step: int = 0) -> float:
    """Run a training to its end; the seconds until a step stands in its metrics.jsonl."""
    began, taken = time.monotonic(), 0.0
    process = subprocess.Popen([sys.executable, "-m", "dist_train.train", *argv], cwd=PROJECT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    wanted = f'{{"kind": "train", "step": {step},'
    while metrics and not taken:
        assert process.poll() is None or wanted in metrics.read_text(), f"exit code {process.poll()}"
        if wanted in metrics.read_text():
            taken = time.monotonic() - began
        time.sleep(0.01)
    assert process.wait() == 0
    return taken


def seeks(repeats: int) -> dict:
    """Milliseconds from making an order of 10^9 samples to a batch of 1,024 at a step, epochs of permuted shards included."""
    import numpy as np

    from dist_train.order import Order

    shard_samples, found = np.full(100_000, 10_000), {}
    for name, step in {"first step": 0, "step 10^7": 10**7}.items():
        times = []
        for seed in range(repeats):
            began = time.perf_counter()
            Order(shard_samples, 1024, seed, 16, 0).rank_batch(step, 0, 1)
            times.append(1e3 * (time.perf_counter() - began))
        found[name] = summary(times)
    return found


def summary(values: list[float]) -> dict:
    return {"n": len(values), "median": round(statistics.median(values), 3), "min": round(min(values), 3),
            "max": round(max(values), 3)}  # fmt: skip


def surroundings() -> dict:
    """Hardware and versions."""
    import torch

    from dist_train import runtime

    about = runtime.environment(runtime.World(0, 1, 0, 1, torch.device("cpu")))
    return {name: about[name] for name in ("cpu", "cores", "system", "python", "packages", "revision", "started")}


if __name__ == "__main__":
    sys.exit(main())
