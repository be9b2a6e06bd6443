"""The training step beside a plain torch loop: images a second, in turns, in one run.

    python benchmarks/step.py --model alexnet --size 64 --batch-size 128 [--shards FOLDER] [--precision fp32|bf16] [--json]
    python benchmarks/step.py --size 227 --batch-size 32 --peer keras=PYTHON --peer lightning=PYTHON

plain: torchvision's network, float32, its own SGD, one batch in memory, nothing else. dist_train: the trainer as it is,
from JPEG shards, augmented. synthetic: the same on one batch in memory; what dist_train lacks to it is the data's stall.
arithmetic: the convolutions and matrix products of a step by themselves, in the trainer's precision and memory layout, on
inputs that lie ready: what no trainer on these kernels exceeds, so dist_train's share of it says what is left to win. keras
(Keras 3 on TensorFlow, mixed_bfloat16, AlexNet only) and lightning (bf16-mixed): on one batch in memory, run by a Python of
an environment that has them. Each is a process of its own, and they compute one at a time.

Precision is bf16 on a GPU and where the processor has instructions for it, else fp32, unless one is asked for.

Shards are, unless some are given, 1,024 pictures or four batches of them, made up: noise of 8x8 pixels enlarged to the network's
size, JPEGs of one size, which data.cache auto keeps decoded in memory once they have been read. With --shards (shards/cifar10,
say) the pictures are real, and dist_train is measured twice: with data.cache auto after an epoch has been read, when decoded
pictures come from memory where they are kept (one size, data.decoded_gb at most), and as uncached, with data.cache none, when each
is read and decoded anew. The stream keeps no more ahead than a measurement uses, so that its work falls into the time measured.

Writes benchmarks/results/step-<model>-<size>-[<set>-]<precision>-<device>.json.
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

KINDS = ("plain", "dist_train", "synthetic", "arithmetic")
UNCACHED = "uncached"  # of real shards only
PEERS = ("keras", "lightning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--shards", default="", metavar="FOLDER", help="pictures to train on; default made up")
    parser.add_argument("--compile", action="store_true", help="torch.compile the trainer's network")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps of a measurement; as many before it are not counted"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"one of {', '.join(PEERS)}, run by this Python"
    )
    parser.add_argument("--out", default="")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=(*KINDS, UNCACHED, *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, default=10, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    kinds = (*KINDS, UNCACHED) if options.shards else KINDS
    options.pythons = dict.fromkeys(kinds, sys.executable) | dict(peer.split("=", 1) for peer in options.peer)
    if unknown := options.pythons.keys() - {*kinds, *PEERS}:
        parser.error(f"--peer {unknown.pop()}: expected one of {', '.join(PEERS)}, as in keras=/path/to/python")
    with tempfile.TemporaryDirectory() as options.scratch:
        import torch

        from benchmarks.training import make_shards, precision_for
        from dist_train.index import load_index

        options.precision = precision_for(options.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if options.shards:
            options.classes = load_index(options.shards).num_classes
        else:
            make_shards(Path(options.scratch), options.size, max(1024, 4 * options.batch_size))
        figures = in_turns(options)
    result = summary(figures) | surroundings(options, figures)
    out = out_path(options, result["device"])
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.model}@{options.size}, batch {options.batch_size}, {options.precision} but for plain: {result['hardware']}")
    for kind in options.pythons:
        rates = [f["images_per_s"] for f in figures[kind]]
        print(
            f"{kind:12} {statistics.median(rates):10.1f} images/s   {min(rates):.1f} to {max(rates):.1f}, n {len(rates)}"
        )
    for kind, feed in result["feed"].items():
        print(f"{kind} is fed from {feed}: its data stall {result['data_stall' if kind == 'dist_train' else 'uncached_stall']:.1%}")
    print(f"ratio {result['ratio']:.2f}, {result['arithmetic_share']:.0%} of the arithmetic's rate, written to {out}")
    if options.json:
        keys = (*options.pythons, "ratio", "data_stall", "uncached_stall", "arithmetic_share", "over_peers", "precision", "feed")
        print(json.dumps({key: result[key] for key in keys if key in result}))


def out_path(options, device: str) -> Path:
    """Where a run's figures go: what they depend on is in the name."""
    pictures = [Path(options.shards).name] if options.shards else []
    name = "-".join(["step", options.model, str(options.size), *pictures, options.precision, device])
    return Path(options.out or f"benchmarks/results/{name}.json")


def in_turns(options) -> dict[str, list[dict]]:
    """The figures of each kind: one window a kind and turn, in an order that changes from turn to turn."""
    found = ["--precision", options.precision, "--classes", str(options.classes), "--scratch", options.scratch]
    workers = {
        kind: subprocess.Popen(
            [python, *sys.argv, *found, "--worker", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind, python in options.pythons.items()
    }
    kinds = tuple(workers)
    figures = {kind: [] for kind in kinds}
    try:
        for turn in range(options.repeats + 1):
            for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
                workers[kind].stdin.write("go\n")
                workers[kind].stdin.flush()
                text = workers[kind].stdout.readline()
                if not text:
                    raise RuntimeError(f"step.py: {kind} has ended; its last words stand above.")
                line = json.loads(text)
                if turn:  # the first one also starts threads and fills memory
                    figures[kind].append(line)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return figures


def summary(figures: dict[str, list[dict]]) -> dict:
    """Medians; ratio, stall and share are medians of the turns' own ratios, which a busy machine disturbs less."""
    rates = {kind: [f["images_per_s"] for f in lines] for kind, lines in figures.items()}
    turns = list(zip(*(rates[kind] for kind in KINDS), strict=True))
    uncached = {}
    if UNCACHED in rates:
        pairs = zip(rates[UNCACHED], rates["synthetic"], strict=True)
        uncached = {"uncached_stall": round(statistics.median(1 - ours / synthetic for ours, synthetic in pairs), 4)}
    return uncached | {
        **{kind: round(statistics.median(rate), 1) for kind, rate in rates.items()},
        "ratio": round(statistics.median(ours / plain for plain, ours, *_ in turns), 3),
        "data_stall": round(statistics.median(1 - ours / synthetic for _, ours, synthetic, _ in turns), 4),
        "arithmetic_share": round(statistics.median(ours / bound for _, ours, _, bound in turns), 3),
        "over_peers": {
            kind: round(statistics.median(o / p for o, p in zip(rates["dist_train"], rates[kind], strict=True)), 3)
            for kind in PEERS if kind in rates
        },
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
    last = figures["dist_train"][-1]
    device = last["device"]
    if options.shards:
        feed = {"dist_train": f"{Path(options.shards).name}, data.cache auto: " + (
            "gathered from memory, as in later epochs" if last["is_kept"] else "not kept, so read and decoded as without")}
        feed |= {UNCACHED: f"{Path(options.shards).name}, data.cache none: read and decoded, as in every epoch"}
    else:
        feed = {"dist_train": f"made-up JPEGs of {options.size} px, data.cache auto: gathered from memory once all have been read"}
    return {
        "feed": feed,
        "model": options.model, "size": options.size, "batch_size": options.batch_size, "precision": options.precision,
        "compile": options.compile, "steps": options.steps, "n": options.repeats, "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{name}, {os.cpu_count()} cores, {flags}",
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def work(options) -> None:
    """One kind, in this process: a window for each line on standard input, its figures as a line of JSON."""
    kinds = {"plain": plain, "arithmetic": arithmetic, "keras": keras, "lightning": lightning}
    window = kinds.get(options.worker, trainer)(options)
    for _ in sys.stdin:
        print(json.dumps(window()), flush=True)


def trainer(options):
    from benchmarks.training import open_training, settings
    from dist_train import runtime

    shards = options.shards or f"{options.scratch}/shards"
    more = ["--train.log_every_steps", str(options.steps)]
    more += ["--train.compile", "true"] if options.compile else []
    more += ["--data.cache", "none"] if options.worker == UNCACHED else []
    config = settings(shards, options.model, options.size, options.batch_size, options.precision, *more)
    accelerator, world = runtime.start(options.precision, 0, 300)
    folder = Path(options.scratch, options.worker)
    training = open_training(config, folder, accelerator, world, options.worker == "synthetic")
    if options.shards and options.worker == "dist_train" and training.is_kept:
        training.read_an_epoch()
    return lambda: training.window() | {"device": world.device.type, "is_kept": training.is_kept}


def plain(options):
    """What a tutorial shows: no channels-last, no fused optimizer, no allocator settings."""
    import torch
    import torchvision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, num_classes=options.classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    labels = torch.randint(0, options.classes, (options.batch_size,), device=device)

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


def keras(options):
    """AlexNet as torchvision has it, in Keras 3 on TensorFlow under mixed_bfloat16; fit's own training step."""
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}
    import keras
    import numpy as np
    import tensorflow as tf

    if options.model != "alexnet":
        raise SystemExit(f"step.py: the Keras peer is AlexNet; --model is {options.model}.")
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16" if options.precision == "bf16" else "float32")
    layers, conv = keras.layers, keras.layers.Conv2D
    model = keras.Sequential([
        keras.Input((options.size, options.size, 3)),
        layers.ZeroPadding2D(2), conv(64, 11, 4, activation="relu"), layers.MaxPool2D(3, 2),
        conv(192, 5, padding="same", activation="relu"), layers.MaxPool2D(3, 2),
        conv(384, 3, padding="same", activation="relu"), conv(256, 3, padding="same", activation="relu"),
        conv(256, 3, padding="same", activation="relu"), layers.MaxPool2D(3, 2),
        layers.Flatten(), layers.Dropout(0.5), layers.Dense(4096, activation="relu"), layers.Dropout(0.5),
        layers.Dense(4096, activation="relu"), layers.Dense(options.classes, dtype="float32"),
    ])  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.001, momentum=0.9, weight_decay=5e-4), loss)
    draw = np.random.default_rng(0)
    images = tf.constant(draw.standard_normal((options.batch_size, options.size, options.size, 3), np.float32))
    batch = images, tf.constant(draw.integers(0, options.classes, options.batch_size))
    batches = tf.data.Dataset.from_tensors(batch).repeat()

    def window() -> dict:
        rates = []
        for _ in range(5):  # in some its threads share one core, for as long as it lasts: the quickest one counts
            began = time.perf_counter()
            history = model.fit(batches, steps_per_epoch=options.steps, shuffle=False, verbose=0)
            rates.append(options.steps * options.batch_size / (time.perf_counter() - began))
        return {"images_per_s": max(rates), "loss": history.history["loss"][-1], "device": "cpu"}

    return window


def lightning(options):
    """torchvision's network in a LightningModule, bf16-mixed; the trainer's own loop, without logger and checkpoints."""
    import logging
    import warnings

    import torch
    import torchvision

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = torchvision.models.get_model(options.model, num_classes=options.classes)

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.001, momentum=0.9, weight_decay=5e-4)

        def on_train_batch_start(self, batch, index):
            if index == options.steps:
                self.began = time.perf_counter()

    model, batch_size, size = Classifier(), options.batch_size, options.size
    batch = torch.randn(batch_size, 3, size, size), torch.randint(0, options.classes, (batch_size,))
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[options.precision]

    def window() -> dict:
        trainer = lightning.Trainer(
            max_steps=2 * options.steps, precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, devices=1,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader([batch] * (2 * options.steps), batch_size=None))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rate = options.steps * batch_size / (time.perf_counter() - model.began)
        return {"images_per_s": rate, "device": "cuda" if torch.cuda.is_available() else "cpu"}

    return window


def arithmetic(options):
    """Forward and backward of every convolution and fully connected layer, one after the other, and nothing between them."""
    import torch
    import torchvision
    from torch import nn

    from dist_train import runtime

    runtime.keep_freed_pages()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    network = torchvision.models.get_model(options.model, num_classes=options.classes)
    network = network.to(device, dtype, memory_format=torch.channels_last).eval()
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device, dtype=dtype)
    layers = []

    def keep(module, inputs, output):
        layers.append((module, inputs[0].clone(), torch.randn_like(output)))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(keep)
    with torch.no_grad():
        network(images.to(memory_format=torch.channels_last))

    def step() -> torch.Tensor:
        for i, (layer, x, dy) in enumerate(layers):
            if isinstance(layer, nn.Linear):
                nn.functional.linear(x, layer.weight, layer.bias)
                dx = dy @ layer.weight
                dy.t() @ x
                dy.sum(0)
            else:
                shape = layer.stride, layer.padding, layer.dilation
                nn.functional.conv2d(x, layer.weight, layer.bias, *shape, layer.groups)
                dx, *_ = torch.ops.aten.convolution_backward(
                    dy, x, layer.weight, [layer.out_channels], *shape, False, (0, 0), layer.groups,
                    (i > 0, True, layer.bias is not None),
                )  # fmt: skip
        return dx if dx is not None else dy

    @torch.no_grad()
    def window() -> dict:
        for _ in range(2):
            began = time.perf_counter()
            for _ in range(options.steps):
                last = step()
            last.flatten()[0].item()  # waits for the device
        rate = options.steps * options.batch_size / (time.perf_counter() - began)
        return {"images_per_s": rate, "device": device.type}

    return window


if __name__ == "__main__":
    from dist_train.cli import run_command

    sys.exit(run_command(lambda _: main(), sys.argv[1:]))
