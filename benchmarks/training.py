"""The trainer as it is, on real shards or on some made on the fly, for the scripts here that time it."""

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from dist_train import runtime, shard
from dist_train.bench_step import TimedRun
from dist_train.config import RunConfig
from dist_train.settings import read_config


def make_shards(folder: Path, size: int, num_pictures: int = 1024) -> str:
    """A set of JPEG pictures of ten classes, smooth as photographs are, size px square; returns where it lies."""
    draw = np.random.default_rng(0)
    for k in range(num_pictures):
        coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = folder / "pictures" / f"class{k % 10}" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    with contextlib.redirect_stdout(io.StringIO()):
        shard.main(["--source", "folder", "--path", str(folder / "pictures"), "--out", str(folder / "shards"),
                    "--split.val", "0", "--split.test", "0", "--workers", "1"])  # fmt: skip
    return str(folder / "shards")


def settings(shards: str, model: str, size: int, batch_size: int, precision: str, *more: str) -> RunConfig:
    """A training as published: full width, stem of ImageNet, crop, flip and colours, weight decay; it never ends."""
    argv = [
        "--data.shards", shards, "--data.image_size", str(size), "--data.global_batch_size", str(batch_size),
        "--model.name", model, "--model.stem", "imagenet", "--train.precision", precision, "--train.epochs", "1e6",
        "--train.eval_every_epochs", "0", "--augment.crop", "random_resized", "--augment.flip", "0.5",
        "--augment.brightness", "0.2", "--augment.contrast", "0.2", "--optim.schedule", "constant", "--optim.lr", "0.001",
        "--train.checkpoint_every_steps", "0", "--train.profile_steps", "0", *more,
    ]  # fmt: skip
    return read_config(RunConfig, argv, "benchmark")


def precision_for(asked: str, device) -> str:
    """The precision of a benchmark: as asked, or for auto bf16, where a GPU or a CPU that has instructions for it computes."""
    if asked != "auto":
        return asked
    return "fp32" if runtime.is_slow("bf16", device) else "bf16"


def open_training(config: RunConfig, folder: Path, accelerator, world, is_synthetic: bool) -> TimedRun:
    """A run that trains for two stretches of train.log_every_steps whenever it is asked, and says how fast the second one was.

    is_synthetic: one batch in memory takes the place of the stream.
    """
    training = TimedRun(config, folder, accelerator, world, config.train.log_every_steps)
    training.feed(is_synthetic)
    return training
