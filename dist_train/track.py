"""What a run says while it goes: the console, metrics.jsonl, and Weights & Biases; from rank zero alone.

metrics.jsonl is the record; the console and Weights & Biases are copies of it. Its lines are

    {"kind": "train", "step": 120, "epoch": 1.7, "loss": ..., "lr": ..., "images_per_s": ..., "data_wait": 0.03,
     "tflops": ..., "mfu": 0.4, "time_s": ...}
    {"kind": "eval", "split": "val", "step": 120, "epoch": 1.7, "loss": ..., "top1": ..., "balanced": ..., "time_s": ...}
    {"kind": "profile", "step": 20, "step_s": 0.031, "data": 0.02, "augment": ..., "forward": ..., ...}
    {"kind": "restart", "step": 100, "time_s": ...}

and no step of a series stands in it twice, however often the run was stopped. `time_s` counts seconds of running;
the time between a stop and the restart is left out.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dist_train.config import RunConfig
from dist_train.durable import replace_text
from dist_train.errors import UserError


def open_tracker(folder: str | os.PathLike, config: RunConfig, is_main: bool, num_steps: int, resume_step: int | None):
    """Return the tracker of a run: one that speaks on rank zero, one that is silent on all others.

    folder: the run's. num_steps: length of the whole run. resume_step: the step a restart goes on from; lines of later
    steps are taken back, since they will come again. None is a fresh start, and takes back every line.
    Raises UserError if metrics.jsonl cannot be written, or if track.wandb is online and there is no API key.
    """
    if not is_main:
        return SilentTracker()
    from dist_train.wandb_log import open_wandb

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl", -1 if resume_step is None else resume_step)
    console = ProgressBar(num_steps) if _is_terminal() else PlainLines(num_steps)
    wandb = open_wandb(folder, config, metrics.lines)
    if resume_step is not None:
        metrics.append({"kind": "restart", "step": resume_step})
    return Tracker(metrics, console, wandb)


class SilentTracker:
    """The tracker of every rank but zero."""

    takes_figures = False  # whether pictures go anywhere, and so are worth drawing

    def train(self, step: int, values: dict) -> None: ...

    def evaluation(self, step: int, split: str, values: dict) -> None: ...

    def profile(self, step: int, step_s: float, shares: dict) -> None: ...

    def sync(self) -> None: ...

    def message(self, text: str) -> None: ...

    def figures(self, pictures: dict) -> None: ...

    def finish(self, exit_ok: bool) -> None: ...


class Tracker:
    """The tracker of rank zero. No call waits for a network."""

    def __init__(self, metrics, console, wandb):
        self._metrics, self._console, self._wandb = metrics, console, wandb
        self.takes_figures = wandb is not None
        self._has_profile = any(line["kind"] == "profile" for line in metrics.lines)

    def train(self, step: int, values: dict) -> None:
        """Record a step's figures: epoch, loss, lr, images_per_s, data_wait (share of the time, 0..1), any others."""
        line = self._metrics.append({"kind": "train", "step": step, **values})
        self._console.train(step, values)
        self._send(line)

    def evaluation(self, step: int, split: str, values: dict) -> None:
        """Record an evaluation's figures (loss, top1, ...) and see them safely on the disk."""
        line = self._metrics.append({"kind": "eval", "split": split, "step": step, **values}, sync=True)
        self._console.message(f"{split:<5} {_figures(step, values)}")
        self._send(line)

    def profile(self, step: int, step_s: float, shares: dict[str, float]) -> None:
        """Record, once a run however often it is resumed, where the time of a step goes.

        shares: {part: 0..1}; step_s: mean of the profiled steps.
        """
        if self._has_profile:
            return
        self._has_profile = True
        line = self._metrics.append({"kind": "profile", "step": step, "step_s": step_s, **shares})
        parts = "  ".join(f"{part} {share:.0%}" for part, share in shares.items())
        self._console.message(f"where a step's {1000 * step_s:,.1f} ms go: {parts}")
        self._send(line)

    def sync(self) -> None:
        """Return when every line so far is on the disk: before a checkpoint, which a restart would go on from."""
        self._metrics.sync()

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._console.message(text)

    def figures(self, pictures: dict[str, Path]) -> None:
        """Send picture files (PNG or JPEG) to Weights & Biases under the names given; a name it has is not sent again."""
        if self._wandb:
            self._wandb.pictures(pictures)

    def finish(self, exit_ok: bool) -> None:
        """Close everything, waiting a bounded time for Weights & Biases.

        exit_ok: the run came to its end, or was stopped on request.
        """
        self._metrics.close()
        if self._wandb:
            self._wandb.finish(exit_ok)
            self._tell_wandb_news()
        self._console.close()

    def _send(self, line: dict | None) -> None:
        if self._wandb:
            if line:
                self._wandb.line(line)
            self._tell_wandb_news()

    def _tell_wandb_news(self) -> None:
        for text in self._wandb.news():
            self._console.message(text)


class MetricsFile:
    """metrics.jsonl, opened at a step. `lines` is what it held up to that step."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        with _named_errors(path):
            self.lines = [line for line in read_metrics(path) if line["step"] <= resume_step]
        self._newest = {}
        for line in self.lines:
            self._newest[series(line)] = line["step"]
        before_s = max((line.get("time_s") or 0 for line in self.lines), default=0)
        self._began = time.monotonic() - before_s
        with _named_errors(path):
            replace_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
            self._file = open(path, "a")

    def append(self, values: dict, sync: bool = False) -> dict | None:
        """Write a line and return it; None if its series has that step already. sync: wait for the disk."""
        line = {key: _plain(value) for key, value in values.items()}
        line.setdefault("time_s", round(time.monotonic() - self._began, 3))
        if line["kind"] != "restart":
            if line["step"] <= self._newest.get(series(line), -1):
                return None
            self._newest[series(line)] = line["step"]
        with _named_errors(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if sync:
            self.sync()
        return line

    def sync(self) -> None:
        """Return when every line is on the disk."""
        with _named_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        with _named_errors(self.path):
            self._file.close()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the run's figures: {error.strerror}.\n"
            f"  Make room or give the folder back its rights, then go on with --resume."
        ) from error


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order; [] without a file. A line torn by a kill is left out."""
    lines = []
    try:
        text = Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return lines
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line:
            lines.append(line)
    return lines


def series(line: dict) -> str:
    """The series a line belongs to: its kind, or that of the evaluated split, which may be called train as well."""
    return f"eval {line['split']}" if line["kind"] == "eval" else line["kind"]


class PlainLines:
    """Figures as lines of text, for log files."""

    def __init__(self, num_steps: int):
        self._eta = Eta(num_steps)

    def train(self, step: int, values: dict) -> None:
        self.message(f"train {_figures(step, values)}  left {_clock(self._eta.seconds(step))}")

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None: ...


class ProgressBar:
    """A bar on a terminal, with the newest figures beside it."""

    def __init__(self, num_steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._eta = Eta(num_steps)
        self._progress = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[figures]}", markup=False),
            console=Console(), auto_refresh=False,  # drawn when figures come: no thread beside the training
        )  # fmt: skip
        self._task = self._progress.add_task("", total=num_steps, figures="")
        self._progress.start()

    def train(self, step: int, values: dict) -> None:
        text = f"{_figures(None, values)}  left {_clock(self._eta.seconds(step))}"
        self._progress.update(self._task, completed=step, figures=text, refresh=True)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class Eta:
    """Time left, from the pace since this process began."""

    def __init__(self, num_steps: int):
        self._num_steps, self._first = num_steps, None

    def seconds(self, step: int) -> float:
        """Seconds until the last step; NaN at the first call, which has no pace to go by."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first_step, began = self._first
        if step <= first_step:
            return math.nan
        return (now - began) / (step - first_step) * max(0, self._num_steps - step)


# How each known figure is shown; others go to the file alone. "mfu" never comes without "tflops" (Run.work_figures).
_SHOWN = {
    "epoch": "epoch {epoch:.2f}", "loss": "loss {loss:.4f}", "top1": "top1 {top1:.2%}", "top5": "top5 {top5:.2%}",
    "balanced": "balanced {balanced:.2%}",
    "lr": "lr {lr:.2e}", "images_per_s": "{images_per_s:,.0f} samples/s", "data_wait": "waits for data {data_wait:.0%}",
    "tflops": "{tflops:,.2f} TFLOP/s (MFU {mfu:.0%})", "samples": "{samples:,} samples",
}  # fmt: skip


def _figures(step: int | None, values: dict) -> str:
    if (values.get("tflops") or 0) < 0.005:  # of a network so small that it would be shown as 0.00
        values = values | {"tflops": None}
    parts = [] if step is None else [f"step {step:<6}"]
    parts += [text.format(**values) for name, text in _SHOWN.items() if values.get(name) is not None]
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _plain(value):
    """A value JSON can hold: numbers of numpy and torch become Python's, what is not finite becomes null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
