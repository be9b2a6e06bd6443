"""The trainer as it is, on shards made on the fly, for the scripts here that time it."""

import contextlib
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from dist_train import shard
from dist_train.config import RunConfig
from dist_train.data import to_device
from dist_train.run import Run
from dist_train.settings import read_config
from dist_train.track import SilentTracker
from dist_train.train import train


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


class TimedTraining(SilentTracker):
    """A run that trains for a window of steps whenever it is asked, and says how fast.

    is_synthetic: one batch in memory takes the place of the stream.
    """

    def __init__(self, config: RunConfig, folder: Path, accelerator, world, is_synthetic: bool):
        self.every, self.lines = config.train.log_every_steps, []
        self.run = Run(config, folder, accelerator, world)
        self.state = self.run.new_state()
        self.run.tracker, self.run.save = self, lambda state, is_best: None  # a checkpoint is no part of a step
        if is_synthetic:
            batch = next(to_device(self.run.stream(0), world.device))
            self.run.stream = lambda first_step: (batch for _ in itertools.count())  # which can be closed

    def train(self, step: int, values: dict) -> None:
        self.lines.append(values)

    def window(self) -> dict:
        """Two stretches between log lines; the figures of the second, when everything is warm: images_per_s, data_wait."""
        self.run.halt_step = self.state.step + 2 * self.every
        train(self.run, self.state)
        return {key: self.lines[-1][key] for key in ("images_per_s", "data_wait", "loss")}
