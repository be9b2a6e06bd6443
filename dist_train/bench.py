"""`dist-train bench data`: images a second of each part of the feeding, alone and together, and what limits a training.

dist-train bench data --shards shards/cifar10 --batch-size 512
dist-train bench data --config recipes/cifar10-alexnet.yaml
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dist_train import bench_step, runtime
from dist_train.augment import Augment
from dist_train.boxes import random_resized_boxes
from dist_train.cache import DecodedCache
from dist_train.config import RunConfig
from dist_train.data import picture_size, to_device
from dist_train.decode import decode_batch, decoders, read_from_files
from dist_train.errors import UserError
from dist_train.folds import open_index
from dist_train.order import Order, sample_keys
from dist_train.remote import shown
from dist_train.settings import read_config
from dist_train.sizes import decoder_crop, input_size, on_device_augment, training_stream
from dist_train.store import Store
from dist_train.workers import num_cores

MOST_MB = 256  # payloads kept in memory, so that decoding can be measured without reading
REPEATS = 5  # of every measurement
STEPS = 3  # of the network, timed after as many to warm up: a second of AlexNet, minutes of VGG13 at 224 px on few cores


def main(argv: list[str]) -> None:
    """`dist-train bench data (--shards DIR | --config RECIPE) [...]`, or `bench step` (see bench_step). Raises UserError.

    With a recipe its step is timed too, so that what the network needs stands beside what the feeding has.
    """
    if argv[:1] == ["step"]:
        return bench_step.main(argv[1:])
    if argv[:1] not in (["data"], ["-h"], ["--help"]):
        what = argv[0] if argv else "nothing"
        raise UserError(f"dist-train bench: {what} is not a benchmark; there are bench data and bench step.")
    parser = argparse.ArgumentParser(
        "dist-train bench data", description="What the feeding can give, part by part, and what a recipe's step needs of it.",
        epilog="Other options are those of dist-train train, such as --data.window_shards 4. There is also dist-train bench step "
        "--config RECIPE: where the time of a training step goes.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--shards", metavar="DIR", help="set to read; with --config it replaces the recipe's")
    parser.add_argument(
        "--config", metavar="RECIPE", help="batch size, crop and augmentation are this recipe's, and its step is timed"
    )
    parser.add_argument("--batch-size", type=int, help="images a batch; default the recipe's, else 128")
    parser.add_argument("--image-size", type=int, help="height and width that enter the network; 0 keeps the stored one")
    parser.add_argument("--crop", choices=("random_resized", "resize"), help="what the decoder cuts out")
    parser.add_argument("--threads", type=int, help="decoding threads; default the recipe's, else the cores at hand")
    parser.add_argument("--seconds", type=float, default=0.5, help=f"length of one measurement; each is taken {REPEATS} times")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options, settings = parser.parse_known_args(argv[1:] if argv[0] == "data" else argv)
    config = read_config(RunConfig, [*_settings(options), *settings], "dist-train bench data")
    if not config.data.shards:
        raise UserError("dist-train bench data: no shards; name them with --shards, or a recipe with --config.")
    precision = runtime.precision_here(config.train.precision) if options.config else "fp32"
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    accelerator, world = runtime.start(precision, config.runtime.threads, config.runtime.timeout_s)
    with contextlib.ExitStack() as leaving:
        leaving.callback(runtime.end)
        step = None
        if options.config:
            if world.world_size > 1:
                raise UserError(f"dist-train bench data: {world.world_size} processes; it measures what one of them feeds to one "
                                f"network.\n  Start it without a launcher; bench step takes several.")  # fmt: skip
            step = leaving.enter_context(_step(config, accelerator, world))
        print(f"{shown(config.data.shards)}: batches of {config.data.global_batch_size}, {config.data.threads or num_cores()} "
              f"threads, {accelerator.device}; each part for {options.seconds:g} s in {REPEATS} turns", flush=True)  # fmt: skip
        figures = measure(config, accelerator.device, options.seconds, step=step)
    show(figures, config)
    if options.json:
        print(json.dumps(figures))


def measure(
    config: RunConfig, device: torch.device, seconds: float, repeats: int = REPEATS, step: Callable[[], float] | None = None
) -> dict:
    """{part: {"images_per_s": median, "spread": (lowest, highest)}, ...}, the parts measured in turns, repeats times.

    bytes: read and checked. decode: payloads in memory into batches. stream: both, as in a training's first epoch.
    cached: as in later ones, where decoded pictures are kept. device: the stream brought to a GPU. augment: that and the
    recipe's augmentation. A table has nothing to decode or augment. The CPU decodes, whatever data.decode says.
    step: times the network, on one batch in memory, and returns its images a second; in turns with the parts, but no longer
    than they take. Besides the parts come "limits" and "most_to_win", and with a step what `compared` says.
    """
    threads = config.data.threads or num_cores()
    parts = _parts(config, device, threads)
    rates = {name: [] for name in parts} | ({"step": []} if step else {})
    for part in parts.values():
        next(part)  # the first batch opens files and wakes threads
    step_s = 0.0
    for _ in range(repeats):
        for name, part in parts.items():
            rates[name].append(_rate(part, seconds, device))
        if step and step_s < repeats * seconds:
            began = time.perf_counter()
            rates["step"].append(step())
            step_s += time.perf_counter() - began
    figures = {
        name: {"images_per_s": statistics.median(rate), "spread": (min(rate), max(rate))}
        for name, rate in rates.items()
    }
    medians = {name: part["images_per_s"] for name, part in figures.items()}
    figures |= compared(medians, shares_cores=device.type == "cpu") if step else alone(medians)
    return figures | {"threads": threads, "batch_size": config.data.global_batch_size, "on": str(device)}


@contextlib.contextmanager
def _step(config: RunConfig, accelerator, world: runtime.World) -> Iterator[Callable[[], float]]:
    """Something that trains the recipe's network for some steps on one batch in memory, and returns images a second."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, decode="cpu"))
    with tempfile.TemporaryDirectory(prefix="dist_train-bench-") as folder:
        with contextlib.closing(bench_step.TimedRun(config, Path(folder), accelerator, world, STEPS)) as timed:
            timed.feed(is_synthetic=True)
            yield lambda: timed.window()["images_per_s"]


def show(figures: dict, config: RunConfig) -> None:
    """Print the parts as a table, and what limits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("part", "images/s", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, meaning in _MEANING.items():
        if name in figures:
            rates = (figures[name]["images_per_s"], *figures[name]["spread"])
            table.add_row(meaning, *(f"{rate:,.0f}" for rate in rates))
    console = Console(highlight=False)
    console.print(table)
    console.print("\n".join(verdict(figures, config)))
    if "decode" in figures:
        for what, who in decoders().items():
            console.print(f"  {what}: {who}")
        console.print(f"  interpolation: {config.data.interpolation}")


def verdict(figures: dict, config: RunConfig) -> list[str]:
    """Lines that say what limits, and what a faster one could win. figures: as `measure` returns them."""
    if "need" not in figures:
        part, win = _sentence(figures["limits"]), figures["most_to_win"]
        if win is None:
            read, stream = (figures[name]["images_per_s"] for name in ("bytes", "stream"))
            return [f"{part}: the stream brings {stream:,.0f} samples a second, reading alone {read:,.0f}."]
        return [f"{part}: if it cost nothing, there would be {win:.1f} times as many images a second."]
    lines = [f"Need: a step of {config.model.name} in {config.train.precision} takes {figures['need']:,.0f} images/s."]
    for name, when in (("first", "in the first epoch"), ("later", "in later ones, from what is kept decoded")):
        if name in figures["epochs"]:
            epoch = figures["epochs"][name]
            given = "with a feed that cost nothing" if epoch["limits"] == "the step" else "if it cost nothing,"
            lines.append(f"Have: {epoch['have']:,.0f} images/s {when}. {_sentence(epoch['limits'])}: {given} the training would be "
                         f"{epoch['most_to_win']:.2f} times as fast at most.")  # fmt: skip
    return lines


def alone(rates: dict[str, float]) -> dict:
    """{"limits": the feed's slowest part, augmentation among them, "most_to_win": how many times as many images a second without
    it, None where nothing tells}. rates: images/s by part, as `measure` names them."""
    brought = rates.get("device", rates["stream"])
    if rates.get("augment", brought) < 0.8 * brought:
        return {"limits": "augmentation", "most_to_win": brought / rates["augment"]}
    part, without = limit(rates)
    return {"limits": part, "most_to_win": without and max(1.0, without / brought)}


def compared(rates: dict[str, float], shares_cores: bool) -> dict:
    """The feed beside the step, which augments: {"need": images/s that the step takes, "epochs": {"first": {"have": images/s of
    the feed, "limits", "most_to_win"}, "later": the same, where decoded samples are kept}, and of most epochs "limits",
    "most_to_win"}.

    most_to_win: how many times as fast a training is once the feed's part that limits costs nothing, or all of the feed where
    the step limits. shares_cores: feed and step run on the same cores, so that their times add up; else the slower one counts.
    """
    need = rates["step"]

    def epoch(part: str, have: float, without: float) -> dict:
        now, then = ((1 / (1 / feed + 1 / need) if shares_cores else min(feed, need)) for feed in (have, without))
        if have >= need:
            part, then = "the step", need
        return {"have": have, "limits": part, "most_to_win": max(1.0, then / now)}

    part, without = limit(rates)
    epochs = {"first": epoch(part, rates.get("device", rates["stream"]), without or float("inf"))}
    if "cached" in rates:
        epochs["later"] = epoch("gathering", rates["cached"], float("inf"))
    most = epochs.get("later", epochs["first"])
    return {"need": need, "epochs": epochs, "limits": most["limits"], "most_to_win": most["most_to_win"]}


def limit(rates: dict[str, float]) -> tuple[str, float | None]:
    """The slowest part of bringing a batch for the first time, and images/s without it; None where nothing tells."""
    if rates.get("device", rates["stream"]) < 0.8 * rates["stream"]:
        return "the way to the device", rates["stream"]
    if rates.get("decode", float("inf")) < rates["bytes"]:
        return "decoding", rates["bytes"]
    return "reading", rates.get("decode", rates.get("cached"))  # a table's rows are kept as they are read


def _sentence(part: str) -> str:
    return f"{part[0].upper()}{part[1:]} limits"


_MEANING = {
    "bytes": "read and checked",
    "decode": "decoded, from memory",
    "stream": "read and decoded, in batches",
    "cached": "decoded once, then gathered",
    "device": "read, decoded, on the device",
    "augment": "read, decoded, augmented",
    "step": "one batch in memory, trained on",
}


def _settings(options) -> list[str]:
    given = {"data.shards": options.shards, "data.global_batch_size": options.batch_size,
             "data.image_size": options.image_size, "data.crop": options.crop, "data.threads": options.threads}  # fmt: skip
    words = ["--config", options.config] if options.config else []
    return words + [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]


def _parts(config: RunConfig, device: torch.device, threads: int) -> dict[str, Iterator[int]]:
    """Endless iterators that give the number of images each time they are asked."""
    data, index = config.data, open_index(config)
    is_table = index.features is not None
    num_samples = index.split(data.train_split).num_samples

    def stream(cache: str | DecodedCache = "none") -> Iterator:
        return training_stream(config, index, threads=threads, pin_memory=device.type == "cuda", cache=cache)

    parts = {"bytes": _bytes(config, index, threads)}
    if not is_table:
        parts["decode"] = _decoded(config, index, threads)
    parts["stream"] = map(len, stream())
    if bench_step.is_kept(config, index):
        cache = DecodedCache("device" if data.cache == "device" else "auto", data.decoded_gb, device=device)
        parts["cached"] = _after_an_epoch(map(len, to_device(stream(cache), device)), num_samples)
    if device.type != "cpu":
        parts["device"] = map(len, to_device(stream(), device))
    if not is_table:
        size_there, how = input_size(config, index), data.interpolation
        augment = Augment(on_device_augment(config, index), size_there, index.mean, index.std, device, how)
        parts["augment"] = (len(augment(batch.images, batch.random_keys)) for batch in to_device(stream(), device))
    return parts


def _after_an_epoch(part: Iterator[int], num_samples: int) -> Iterator[int]:
    while num_samples > 0:
        num_samples -= next(part)
    yield from part


def _bytes(config: RunConfig, index, threads: int) -> Iterator[int]:
    """Payloads of the stream's batches, read and checked by threads, some batches ahead."""
    store, orders = Store(index.split(config.data.train_split).stored), _samples(config, index)

    def read(samples: np.ndarray) -> int:
        at = store.locate(samples)
        _, _, status = read_from_files(at.fds, at.offsets, at.sizes, at.checksums if config.data.verify else None)
        if status.any():
            raise UserError(f"{index.folder}: a sample cannot be read; see dist-train verify {index.folder}.")
        return len(samples)

    return _ahead(read, orders, threads)


def _decoded(config: RunConfig, index, threads: int) -> Iterator[int]:
    """Batches decoded from payloads that lie in memory, the same few again and again."""
    crop, size = decoder_crop(config, index)
    shape = picture_size(index, size)
    split = index.split(config.data.train_split)
    store, batch = Store(split.stored), config.data.global_batch_size
    kept, num_bytes = [], 0
    for samples in _samples(config, index):
        payloads = list(store.payloads(samples, config.data.verify))
        boxes = None
        if crop == "random_resized":
            rows, keys = store.table[samples], sample_keys(config.seed, np.zeros_like(samples), samples)
            boxes = random_resized_boxes(keys, rows["height"], rows["width"], config.augment.scale, config.augment.ratio)
        kept.append((payloads, boxes))
        num_bytes += sum(map(len, payloads))
        if num_bytes > MOST_MB * 2**20 or len(kept) * batch >= split.num_samples:
            break

    def decode(job) -> int:
        payloads, boxes = job
        out = np.empty((len(payloads), *shape, 3), np.uint8)
        failures = decode_batch(payloads, out, boxes, config.data.interpolation)
        if failures:
            raise UserError(f"{index.folder}: a picture cannot be decoded: {failures[0][1]}; see dist-train verify.")
        return len(payloads)

    return _ahead(decode, itertools.cycle(kept), threads)


def _samples(config: RunConfig, index) -> Iterator[np.ndarray]:
    split = index.split(config.data.train_split)
    order = Order(split.shard_samples, config.data.global_batch_size, config.seed, config.data.window_shards, config.data.lanes)
    for step in itertools.count():
        yield split.stored_numbers(order.rank_batch(step, 0, 1)[0])


def _ahead(work: Callable, jobs: Iterator, threads: int) -> Iterator[int]:
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(work, next(jobs)) for _ in range(2 * threads)]
        try:
            while True:
                yield waiting.pop(0).result()
                waiting.append(pool.submit(work, next(jobs)))
        finally:
            pool.shutdown(cancel_futures=True)


def _rate(part: Iterator[int], seconds: float, device: torch.device) -> float:
    """Images a second over at least `seconds`. What had been made ahead before the clock started is not counted."""
    made_ahead = 4 * num_cores()
    for _ in range(made_ahead):
        next(part)
    _wait_for(device)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += next(part)
    _wait_for(device)
    return images / (time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    import sys

    from dist_train.cli import run_command

    sys.exit(run_command(main, sys.argv[1:]))
