"""The training step beside a plain torch loop: images a second, in turns, in one run.

    python benchmarks/step.py --model alexnet --size 64 --batch-size 128 [--precision fp32|bf16] [--json]

plain: torchvision's network, float32, its own SGD, one batch in memory, nothing else. dist_train: the trainer as it is,
from JPEG shards, augmented. synthetic: the same on one batch in memory; what dist_train lacks to it is the data's stall.
Each is a process of its own, and they compute one at a time. Writes benchmarks/results/step-<model>-<size>-<device>.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

KINDS = ("plain", "dist_train", "synthetic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the trainer's network")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps of a measurement; as many before it are not counted"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    with tempfile.TemporaryDirectory() as scratch:
        from benchmarks.training import make_shards

        shards = make_shards(Path(scratch), options.size, max(1024, 4 * options.batch_size))
        figures = in_turns(options, shards)
    result = summary(figures) | surroundings(options, figures)
    out = Path(options.out or f"benchmarks/results/step-{options.model}-{options.size}-{result['device']}.json")
    out.write_text(json.dumps(result, indent=1) + "\n")
    for kind in KINDS:
        rates = [f["images_per_s"] for f in figures[kind]]
        print(
            f"{kind:12} {statistics.median(rates):10.1f} images/s   {min(rates):.1f} to {max(rates):.1f}, n {len(rates)}"
        )
    print(f"ratio {result['ratio']:.2f}, stall of the data {result['data_stall']:.1%}, written to {out}")
    if options.json:
        print(json.dumps({k: result[k] for k in (*KINDS, "ratio", "data_stall")}))


def in_turns(options, shards: str) -> dict[str, list[dict]]:
    """The figures of each kind: one window a kind and turn, in an order that changes from turn to turn."""
    workers = {
        kind: subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", kind, "--shards", shards],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for kind in KINDS
    }  # fmt: skip
    figures = {kind: [] for kind in KINDS}
    try:
        for turn in range(options.repeats + 1):
            for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
                workers[kind].stdin.write("go\n")
                workers[kind].stdin.flush()
                line = json.loads(workers[kind].stdout.readline())
                if turn:  # the first one also starts threads and fills memory
                    figures[kind].append(line)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return figures


def summary(figures: dict[str, list[dict]]) -> dict:
    """Medians; the ratio and the stall are medians of the turns' own ratios, which a busy machine disturbs less."""
    rates = {kind: [f["images_per_s"] for f in lines] for kind, lines in figures.items()}
    turns = list(zip(*(rates[kind] for kind in KINDS), strict=True))
    return {
        **{kind: round(statistics.median(rate), 1) for kind, rate in rates.items()},
        "ratio": round(statistics.median(ours / plain for plain, ours, _ in turns), 3),
        "data_stall": round(statistics.median(1 - ours / synthetic for _, ours, synthetic in turns), 4),
        "data_wait": round(statistics.median(f["data_wait"] for f in figures["dist_train"]), 4),
        "all": {kind: [round(r, 1) for r in rate] for kind, rate in rates.items()},
    }


def surroundings(options, figures) -> dict:
    import torch

    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words = next((line.split() for line in lines if line.startswith("flags")), [])
        flags = " ".join(w for w in words if w.startswith(("avx", "amx", "fma")))
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        )
    device = figures["dist_train"][-1]["device"]
    return {
        "model": options.model, "size": options.size, "batch_size": options.batch_size, "precision": options.precision,
        "compile": options.compile, "steps": options.steps, "n": options.repeats, "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{name}, {os.cpu_count()} cores, {flags}",
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def work(options) -> None:
    """One kind, in this process: a window for each line on standard input, its figures as a line of JSON."""
    window = plain(options) if options.worker == "plain" else trainer(options)
    for _ in sys.stdin:
        print(json.dumps(window()), flush=True)


def trainer(options):
    from benchmarks.training import TimedTraining, settings
    from dist_train import runtime

    more = ["--train.log_every_steps", str(options.steps)] + (["--train.compile", "true"] if options.compile else [])
    config = settings(options.shards, options.model, options.size, options.batch_size, options.precision, *more)
    accelerator, world = runtime.start(options.precision, 0, 300)
    training = TimedTraining(config, Path(options.shards), accelerator, world, options.worker == "synthetic")
    return lambda: training.window() | {"device": world.device.type}


def plain(options):
    """What a tutorial shows: no channels-last, no fused optimizer, no allocator settings."""
    import torch
    import torchvision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    labels = torch.randint(0, 10, (options.batch_size,), device=device)

    def window() -> dict:
        for _ in range(2):  # the first stretch warms up, as the trainer's
            began = time.perf_counter()
            for _ in range(options.steps):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            value = loss.item()  # waits for the device
        rate = options.steps * options.batch_size / (time.perf_counter() - began)
        return {"images_per_s": rate, "loss": value, "device": device.type}

    return window


if __name__ == "__main__":
    main()
