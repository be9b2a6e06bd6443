"""One trial of a study: a recipe trained in this process, once for each fold, without what only a lasting run needs."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dist_train import runtime
from dist_train.checkpoint import Checkpoints, Saved
from dist_train.config import RunConfig
from dist_train.decoder_choice import choose_decoder
from dist_train.durable import replace_json
from dist_train.errors import UserError
from dist_train.evaluate import Interrupted
from dist_train.metrics import goodness
from dist_train.run import Run, open_run_folder
from dist_train.track import MetricsFile, Tracker
from dist_train.train import train, validate

SECONDS_BETWEEN_CHECKPOINTS = 60  # a killed trial loses at most this; a shorter one leaves no checkpoint at all


class Stopped(Exception):
    """The process was asked to stop while a trial was running; what is done so far is kept. The reason is its text."""


class Diverged(UserError):
    """The loss or a weight of a trial is no longer finite: a fact about its settings, and no fault of the study."""


def run_trial(
    config: RunConfig, folds: int, folder: Path, watch: Callable[[float, dict], None], stop_requests: runtime.StopRequests
) -> list[dict]:  # fmt: skip
    """Train each fold of a recipe and return its figures: see `fold_result`. folds: 0 trains once, as the recipe says.

    folder: the trial's; finished folds in it are taken as they are, and an unfinished one goes on from its checkpoint.
    watch(place, figures) is called after each evaluation and each finished fold, with the means so far; place counts
    the folds, 1.25 is a quarter into the second. What it raises ends the trial. Raises Stopped, Diverged.
    """
    results = []
    for fold in range(max(1, folds)):
        fold_config = replace(config, data=replace(config.data, folds=folds, fold=fold)) if folds else config
        fold_folder = folder / f"fold-{fold}"

        def watch_fold(done: float, figures: dict, fold=fold) -> None:
            watch(fold + done, mean_figures([*results, figures]))

        result = read_result(fold_folder)
        if result is None:
            result = train_fold(fold_config, fold_folder, watch_fold, stop_requests)
        results.append(result)
        watch(fold + 1, mean_figures(results))
    return results


def train_fold(
    config: RunConfig, folder: Path, watch: Callable[[float, dict], None], stop_requests: runtime.StopRequests
) -> dict:  # fmt: skip
    """Train once and return `fold_result`. watch(done, best figures so far): done is the share of the run, 0..1.

    The folder becomes that of a run, as `report` and `compare` read it. Raises Stopped, Diverged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator, world = runtime.start(config.train.precision, config.runtime.threads, config.runtime.timeout_s)
    with contextlib.ExitStack() as leaving:
        leaving.callback(runtime.end)
        num_threads = config.data.threads or world.num_cores
        config = choose_decoder(config, folder.with_name("fold-0"), world.device, num_threads)  # all folds as the first one
        open_run_folder(config, folder, resume=True)
        run = leaving.enter_context(contextlib.closing(Run(config, folder, accelerator, world, stop_requests)))
        run.checkpoints = SparseCheckpoints(folder, 1)
        state = run.new_state()
        run.resume(state)
        metrics = MetricsFile(folder / "metrics.jsonl", state.step or -1)
        run.tracker = TrialTracker(metrics, config, lambda figures: watch(state.step / run.num_steps, figures))
        leaving.callback(run.tracker.finish, True)
        leaving.enter_context(divergence_told(run))
        if not run.is_over(state):
            train(run, state)
        if run.is_evaluation_due(state) or not (run.is_over(state) or state.step >= run.halt_step):
            raise Stopped(run.stop_requests.reason)
        if not run.tracker.evaluations:
            try:
                validate(run, state)
            except Interrupted:
                raise Stopped(run.stop_requests.reason) from None
        result = fold_result(run.tracker, state.step, run.epoch_of(state.step), config)
    split = {config.data.val_split: {name: result[name] for name in ("samples", "loss", "top1")}}  # as `train` writes it
    replace_json(folder / "result.json", result | split)
    return result


@contextlib.contextmanager
def divergence_told(run: Run):
    """Raise Diverged in place of what a run says of a loss or of weights that are not finite."""
    try:
        yield
    except UserError as error:
        if run.guard.not_finite or not all(torch.isfinite(p).all() for p in run.network.parameters()):
            raise Diverged(str(error)) from error
        raise


def fold_result(tracker: "TrialTracker", step: int, epoch: float, config: RunConfig) -> dict:
    """The figures of a fold's best evaluation by train.monitor and of its last, and how long the training took.

    {"top1", "loss", "samples", "best_epoch": the best one's; "last_top1", "last_loss", "epoch", "step": at the end;
    "train_s": seconds of running, evaluations included}. The best was chosen by the fold it was taken on, the last was not.
    """
    best, last = best_line(tracker.evaluations, config.train.monitor), tracker.evaluations[-1]
    return {
        "top1": best["top1"], "loss": best["loss"], "samples": best["samples"], "best_epoch": best["epoch"],
        "last_top1": last["top1"], "last_loss": last["loss"], "step": step, "epoch": epoch,
        "train_s": max(line["time_s"] for line in tracker.evaluations),
    }  # fmt: skip


def best_line(evaluations: list[dict], monitor: str) -> dict:
    """The best of some evaluations, of equal ones the first."""
    return max(evaluations, key=lambda line: goodness(line["top1"], line["loss"], monitor))


def mean_figures(results: list[dict]) -> dict:
    """Mean top1 and loss of some results; loss None where one of them has none."""
    losses = [result["loss"] for result in results]
    return {
        "top1": sum(result["top1"] for result in results) / len(results),
        "loss": None if None in losses else sum(losses) / len(losses),
    }


def read_result(folder: Path) -> dict | None:
    """`fold_result` of a finished fold; None if it is not finished."""
    try:
        written = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return {name: value for name, value in written.items() if not isinstance(value, dict)}


class TrialTracker(Tracker):
    """Writes metrics.jsonl alone, and hands the best evaluation so far on after each one."""

    def __init__(self, metrics: MetricsFile, config: RunConfig, watch: Callable[[dict], None]):
        super().__init__(metrics, _Quiet(), None)
        self.evaluations = [line for line in metrics.lines if line["kind"] == "eval"]
        self._file, self._monitor, self._watch = metrics, config.train.monitor, watch

    def evaluation(self, step: int, split: str, values: dict) -> None:
        line = self._file.append({"kind": "eval", "split": split, "step": step, **values})
        if line is not None:
            self.evaluations.append(line)
        self._watch(best_line(self.evaluations, self._monitor))


class SparseCheckpoints(Checkpoints):
    """Checkpoints of a training that is over in seconds, mostly: saves once a minute, whatever the run asks for."""

    def __init__(self, folder: Path, keep: int):
        super().__init__(folder, keep)
        self._saved = time.monotonic()

    def save(self, saved: Saved, is_best: bool) -> None:
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_CHECKPOINTS:
            self._saved = time.monotonic()
            super().save(saved, is_best)

    def has_best(self, saved: Saved) -> bool:
        return True  # no weights are kept as the best, so none can be missing: patience counts on from the best figures


class _Quiet:
    """The console of a trial."""

    def train(self, step: int, values: dict) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...
