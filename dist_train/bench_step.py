"""`dist-train bench step`: where a training step's time goes, and the most that a faster part could win.

dist-train bench step --config recipes/cifar10-alexnet.yaml
On several ranks it is launched as a training is, with `-m dist_train.bench step` in place of `-m dist_train.train`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

from dist_train import runtime
from dist_train.config import RunConfig
from dist_train.data import to_device
from dist_train.errors import UserError
from dist_train.run import Run, State
from dist_train.settings import read_config
from dist_train.step_parts import PARTS, StepParts
from dist_train.track import SilentTracker
from dist_train.train import train


def main(argv: list[str]) -> None:
    """`dist-train bench step --config RECIPE [--steps N] [--json] [--SECTION.KEY VALUE ...]`. Raises UserError."""
    parser = argparse.ArgumentParser(
        "dist-train bench step", description="Where a step's time goes. Other options are those of dist-train train.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="steps timed, after ten to warm up")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options, settings = parser.parse_known_args(argv)
    config = read_config(RunConfig, settings, "dist-train bench step")
    if options.steps < 1:
        raise UserError(f"dist-train bench step: --steps is {options.steps}; expected at least 1.")
    if not config.data.shards:
        raise UserError("dist-train bench step: no shards; name them with --data.shards, or a recipe with --config.")
    accelerator, world = runtime.start(config.train.precision, config.runtime.threads, config.runtime.timeout_s)
    try:
        figures = measure(config, accelerator, world, options.steps)
    finally:
        runtime.end()
    if world.is_main:
        show(figures)
        if options.json:
            print(json.dumps(figures))


def measure(config: RunConfig, accelerator, world: runtime.World, num_steps: int) -> dict:
    """Train for two windows, from the shards and from one batch in memory, and time the parts of both.

    {"images_per_s", "synthetic_images_per_s", "step_s", "shares": {part: 0..1}, "tflops", "mfu"}; images of all ranks.
    Nothing is written but into a temporary folder, and no evaluation comes between. Pictures are at full size.
    """
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, start_size=0))
    endless = dataclasses.replace(config.train, epochs=1e6, eval_every_epochs=0, checkpoint_every_steps=0, profile_steps=0,
                                  patience=0, log_every_steps=10**9)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dist_train-bench-") as folder, contextlib.ExitStack() as open_files:
        run = open_files.enter_context(
            contextlib.closing(Run(dataclasses.replace(config, train=endless), Path(folder), accelerator, world))
        )
        run.tracker, run.save = SilentTracker(), lambda state, is_best: None
        state = run.new_state()
        real = _window(run, state, num_steps)
        batch = next(to_device(run.stream(0), world.device))
        run.stream = lambda first_step: (batch for _ in itertools.count())  # it has to be one that can be closed
        synthetic = _window(run, state, num_steps)
        rate = config.data.global_batch_size / real.step_s()
        run.parts = real
        figures = {
            "images_per_s": rate, "synthetic_images_per_s": config.data.global_batch_size / synthetic.step_s(),
            "step_s": real.step_s(), "shares": real.shares(), **run.work_figures(rate, state.step - 1), "num_steps": num_steps,
            "world_size": world.world_size, "device": str(world.device),
        }  # fmt: skip
    return figures


def show(figures: dict) -> None:
    """Print the parts as a table, each with what its disappearance would win, and the rates."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("part", "ms", "share", "if it cost nothing"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, share in figures["shares"].items():
        table.add_row(
            part, f"{1000 * share * figures['step_s']:.2f}", f"{share:.1%}", f"{gain(share):.2f} times as fast"
        )
    console = Console(highlight=False)
    console.print(f"{figures['num_steps']} steps on {figures['world_size']} x {figures['device']}")
    console.print(table)
    console.print(
        f"{figures['images_per_s']:,.0f} images/s from shards, {figures['synthetic_images_per_s']:,.0f} from one batch in "
        f"memory; {figures['tflops']:.3g} TFLOP/s, {figures['mfu']:.0%} of what a matrix product reaches here"
    )
    limiting = max(PARTS, key=figures["shares"].get)
    console.print(f"The largest part is {limiting}; without it a step would be {gain(figures['shares'][limiting]):.2f} times as "
                  f"fast, and nothing that makes it faster can win more.")  # fmt: skip


def gain(share: float) -> float:
    """How many times as fast the whole is once a part of it takes no time (Amdahl 1967)."""
    return 1 / (1 - share) if share < 1 else float("inf")


def _window(run: Run, state: State, num_steps: int) -> StepParts:
    run.parts = run.new_parts(num_steps)
    run.halt_step = state.step + run.parts.skip + num_steps + 1
    train(run, state)
    if run.stop_requests:
        raise UserError(f"dist-train bench step: ended before its figures were complete ({run.stop_requests.reason}).")
    if not run.parts.is_complete:  # the last step's end: the loop has left without asking for another batch
        run.parts.mark("data")
    return run.parts
