"""`dist-train bench step`: where a training step's time goes, and the most that a faster part could win.

dist-train bench step --config recipes/cifar10-alexnet.yaml
On several ranks it is launched as a training is, with `-m dist_train.bench step` in place of `-m dist_train.train`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

from dist_train import ranks, runtime
from dist_train.cache import auto_room
from dist_train.config import RunConfig
from dist_train.data import picture_size, to_device
from dist_train.decoder_choice import choose_decoder
from dist_train.errors import UserError
from dist_train.index import ShardIndex
from dist_train.remote import shown
from dist_train.run import Run
from dist_train.settings import read_config
from dist_train.sizes import decoder_crop
from dist_train.step_parts import PARTS, StepParts
from dist_train.track import SilentTracker
from dist_train.train import train
from dist_train.watch import Watch

FOR_EVER = 1e6  # epochs: the end of a run, and its evaluations, never come
TURNS, TURNS_S = 3, 60.0  # without --turns: as many, or as begin within this time, since a turn of slow steps takes minutes


def main(argv: list[str]) -> None:
    """`dist-train bench step --config RECIPE [--steps N] [--turns N] [--json] [--SECTION.KEY VALUE ...]`. Raises UserError."""
    parser = argparse.ArgumentParser(
        "dist-train bench step", description="Where a step's time goes. Other options are those of dist-train train.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="steps of a window, after as many to warm up")
    parser.add_argument(
        "--turns", type=int,
        help=f"windows from shards and from memory each, in turns; default {TURNS}, or as many as begin within {TURNS_S:g} s",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options, settings = parser.parse_known_args(argv)
    config = read_config(RunConfig, settings, "dist-train bench step")
    for name in ("steps", "turns"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"dist-train bench step: --{name} is {getattr(options, name)}; expected at least 1.")
    if not config.data.shards:
        raise UserError("dist-train bench step: no shards; name them with --data.shards, or a recipe with --config.")
    accelerator, world = runtime.start(config.train.precision, config.runtime.threads, config.runtime.timeout_s)
    with contextlib.ExitStack() as leaving:
        leaving.push(runtime.leave)
        leaving.enter_context(Watch(world, config.runtime.timeout_s, runtime.master_address()))
        if world.is_main:
            print(f"{shown(config.data.shards)}: steps of {config.data.global_batch_size} on {world.world_size} x {world.device}, "
                  f"{config.train.precision}; windows of {options.steps}, after as many to warm up", flush=True)  # fmt: skip
        turns = (TURNS, TURNS_S) if options.turns is None else (options.turns, math.inf)
        figures = measure(config, accelerator, world, options.steps, *turns)
    if world.is_main:
        show(figures)
        if options.json:
            print(json.dumps(figures))


def measure(
    config: RunConfig, accelerator, world: runtime.World, num_steps: int, num_turns: int, turns_s: float = math.inf
) -> dict:
    """Train in windows from the shards and from one batch in memory, in turns; then time the parts of a window of shards.

    {"images_per_s": median, "spread": (lowest, highest), "synthetic_images_per_s", "synthetic_spread", "free_feed_win": median
    of synthetic / real - 1, "free_feed_spread", "step_s", "shares": {part: 0..1}, "limits": the largest part, "most_to_win": how
    many times as fast without it, "tflops", "mfu", ...}; images of all ranks. Rates are those of an undisturbed training; shares,
    and "timed_step_s", those of steps that wait for the device at every part. Where decoded samples are kept ("is_kept"), an epoch
    is read before: later ones are what is timed. No turn but the first begins after turns_s seconds; "num_turns" is how many did.
    """
    with tempfile.TemporaryDirectory(prefix="dist_train-bench-") as folder:
        threads = config.data.threads or world.num_cores
        config = ranks.on_main(world, choose_decoder, config, Path(folder), world.device, threads)
        with contextlib.closing(TimedRun(config, Path(folder), accelerator, world, num_steps)) as timed:
            if timed.is_kept:
                timed.read_an_epoch()
            rates, began = {"shards": [], "memory": []}, time.monotonic()
            for turn in range(num_turns):
                if turn and ranks.on_main(world, lambda: time.monotonic() - began) > turns_s:
                    break
                for kind in (list(rates), list(rates)[::-1])[turn % 2]:
                    timed.feed(is_synthetic=kind == "memory")
                    rates[kind].append(timed.window()["images_per_s"])
            timed.feed(is_synthetic=False)
            parts = timed.parts()
            rate = statistics.median(rates["shards"])
            work = timed.run.work_figures(rate, timed.state.step - 1)
    limiting = max(PARTS, key=parts.shares().get)
    wins = [memory / shards - 1 for shards, memory in zip(rates["shards"], rates["memory"], strict=True)]
    return {
        "images_per_s": rate, "spread": (min(rates["shards"]), max(rates["shards"])),
        "synthetic_images_per_s": statistics.median(rates["memory"]),
        "synthetic_spread": (min(rates["memory"]), max(rates["memory"])), "free_feed_win": statistics.median(wins),
        "free_feed_spread": (min(wins), max(wins)),
        "step_s": config.data.global_batch_size / rate, "shares": parts.shares(), "timed_step_s": parts.step_s(),
        "limits": limiting, "most_to_win": gain(parts.shares()[limiting]), **work, "is_kept": timed.is_kept,
        "decode": config.data.decode, "precision": config.train.precision, "num_steps": num_steps, "num_turns": len(wins),
        "world_size": world.world_size, "device": str(world.device),
    }  # fmt: skip


def show(figures: dict) -> None:
    """Print the parts as a table, each with what its disappearance would win, and the rates."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("part", "ms", "share", "if it cost nothing"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, share in figures["shares"].items():
        milliseconds = 1000 * share * figures["timed_step_s"]
        table.add_row(part, f"{milliseconds:.2f}", f"{share:.1%}", f"{gain(share):.2f} times as fast")
    console = Console(highlight=False)
    console.print(f"{figures['num_steps']} steps that wait for the device at every part: "
                  f"{1000 * figures['timed_step_s']:.2f} ms a step, undisturbed {1000 * figures['step_s']:.2f}")  # fmt: skip
    console.print(table)
    feed = "gathered from what an epoch before kept decoded" if figures["is_kept"] else "read and decoded as in every epoch"
    shards, memory = (f"{low:,.0f} to {high:,.0f}" for low, high in (figures["spread"], figures["synthetic_spread"]))
    console.print(f"{figures['images_per_s']:,.0f} images/s from shards, {feed} ({shards}); "
                  f"{figures['synthetic_images_per_s']:,.0f} from one batch in memory ({memory}), in {figures['num_turns']} "
                  f"{'turn' if figures['num_turns'] == 1 else 'turns'}; "
                  f"{figures['tflops']:.3g} TFLOP/s, {figures['mfu']:.0%} of what a matrix product reaches here")  # fmt: skip
    console.print(f"The largest part is {figures['limits']}; without it a step would be {figures['most_to_win']:.2f} times as "
                  f"fast, and nothing that makes it faster can win more. {free_feed(figures)}")  # fmt: skip


def free_feed(figures: dict) -> str:
    """What a feed that cost nothing would win, where every turn tells of a win: else other programs tell as much."""
    if figures["free_feed_spread"][0] <= 0:
        return "A feed that cost nothing would win nothing that these figures tell."
    return f"A feed that cost nothing would change the rate by {figures['free_feed_win']:+.1%}."


def gain(share: float) -> float:
    """How many times as fast the whole is once a part of it takes no time (Amdahl 1967)."""
    return 1 / (1 - share) if share < 1 else float("inf")


class TimedRun(SilentTracker):
    """A run that trains for a window of steps whenever it is asked, from its shards or from one batch in memory.

    Nothing is written but into `folder`, and what data.cache keeps on disk; no evaluation and no checkpoint comes between;
    pictures are at full size. The stream keeps no more ahead than `num_steps` of every thread, so that what a window uses is
    made while it is timed.
    """

    def __init__(self, config: RunConfig, folder: Path, accelerator, world: runtime.World, num_steps: int):
        train_config = dataclasses.replace(
            config.train, epochs=FOR_EVER, eval_every_epochs=FOR_EVER, checkpoint_every_steps=0, profile_steps=0, patience=0,
            max_steps=0, log_every_steps=num_steps,
        )  # fmt: skip
        augment = dataclasses.replace(config.augment, start_size=0)
        self.num_steps, self._lines = num_steps, []
        self.run = Run(dataclasses.replace(config, train=train_config, augment=augment), folder, accelerator, world)
        self.run.stop_requests = runtime.StopRequests(folder)
        if world.world_size == 1:
            self.run.stop_requests.close()  # a signal ends the process at once, as everywhere but in a training
        self.state = self.run.new_state()
        self.run.tracker, self.run.save = self, lambda state, is_best: None  # a checkpoint is no part of a step
        self.is_kept = is_kept(config, self.run.index)
        self._threads = config.data.threads or world.num_cores
        share_bytes = config.data.global_batch_size // world.world_size * decoded_bytes(config, self.run.index)
        ahead_mb = min(config.data.prefetch_mb, math.ceil(num_steps * self._threads * share_bytes / 2**20))
        self.run.config = dataclasses.replace(self.run.config, data=dataclasses.replace(config.data, prefetch_mb=ahead_mb))
        self._stream, self._batch = self.run.stream, None

    def train(self, step: int, values: dict) -> None:
        self._lines.append(values)

    def feed(self, is_synthetic: bool) -> None:
        """Let the steps that follow come from one batch in memory, or from the shards, as they do at first."""
        if is_synthetic and self._batch is None:
            self._batch = next(to_device(self._stream(0), self.run.world.device))
        # a generator, since a stream is closed
        self.run.stream = (lambda first_step: (self._batch for _ in itertools.count())) if is_synthetic else self._stream

    def window(self) -> dict:
        """The log line of the last of several stretches of num_steps: images_per_s of all ranks, data_wait, loss, ...

        In those before everything gets warm, and what threads have made ahead is used up.
        """
        is_ahead = self.run.stream == self._stream and not self.is_kept
        num_warm = max(1, math.ceil(4 * self._threads / self.num_steps)) if is_ahead else 1
        self._train((num_warm + 1) * self.num_steps)
        return self._lines[-1]

    def parts(self) -> StepParts:
        """The parts of num_steps. No `window` comes after: its stretches would not end at log lines."""
        self.run.parts = self.run.new_parts(self.num_steps)
        self._train(self.run.parts.skip + self.num_steps + 1)
        if not self.run.parts.is_complete:  # the last step's end: the loop has left without asking for another batch
            self.run.parts.mark("data")
        return self.run.parts

    def silent_steps(self, num_steps: int) -> None:
        """Steps without a log line, which would wait for the device. No `window` comes after."""
        config = self.run.config
        self.run.config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every_steps=int(FOR_EVER)))
        self._train(num_steps)

    def read_an_epoch(self) -> None:
        """Bring every sample once, so that all are there that are kept decoded."""
        with contextlib.closing(self._stream(0)) as stream:
            for _ in itertools.islice(stream, math.ceil(self.run.steps_per_epoch)):
                pass

    def close(self) -> None:
        self.run.close()
        self.run.stop_requests.close()

    def _train(self, num_steps: int) -> None:
        self.run.halt_step = self.state.step + num_steps
        train(self.run, self.state)
        if self.state.step < self.run.halt_step:
            reason = self.run.stop_requests.reason or "another rank was asked"
            raise UserError(f"the timed steps were ended before they were complete ({reason}).")


def is_kept(config: RunConfig, index: ShardIndex) -> bool:
    """Whether decoded samples of the training split are kept from epoch to epoch."""
    data, is_table = config.data, index.features is not None
    if data.cache == "none" or (not is_table and decoder_crop(config, index)[0] == "random_resized"):
        return False
    num_bytes = index.split(data.train_split).stored.num_samples * decoded_bytes(config, index)
    return data.cache != "auto" or num_bytes <= auto_room(int(data.decoded_gb * 1e9))


def decoded_bytes(config: RunConfig, index: ShardIndex) -> int:
    """Bytes of a sample as the stream brings it."""
    if index.features is not None:
        return 4 * len(index.features)
    _, size = decoder_crop(config, index)
    return 3 * math.prod(picture_size(index, size))
