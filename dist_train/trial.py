"""One trial of a study: a recipe trained in this process, once for each fold, without what only a lasting run needs."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dist_train import runtime
from dist_train.checkpoint import Checkpoints, Saved
from dist_train.config import RunConfig
from dist_train.evaluate import Interrupted
from dist_train.run import Run
from dist_train.track import MetricsFile, Tracker
from dist_train.train import judge, train

SECONDS_BETWEEN_CHECKPOINTS = 60  # a killed trial loses at most this; a shorter one leaves no checkpoint at all


class Stopped(Exception):
    """The process was asked to stop while a trial was running; what is done so far is kept. The reason is its text."""


def run_trial(config: RunConfig, folds: int, folder: Path, watch: Callable[[float, dict], None]) -> list[dict]:
    """Train each fold of a recipe and return its figures: see `fold_result`. folds: 0 trains once, as the recipe says.

    folder: the trial's; finished folds in it are taken as they are, and an unfinished one goes on from its checkpoint.
    watch(place, figures) is called after each evaluation and each finished fold, with the means so far; place counts
    the folds, 1.25 is a quarter into the second. What it raises ends the trial. Raises Stopped.
    """
    results = []
    for fold in range(max(1, folds)):
        fold_config = replace(config, data=replace(config.data, folds=folds, fold=fold)) if folds else config
        fold_folder = folder / f"fold-{fold}"

        def watch_fold(done: float, figures: dict, fold=fold) -> None:
            watch(fold + done, mean_figures([*results, figures]))

        result = read_result(fold_folder)
        if result is None:
            result = train_fold(fold_config, fold_folder, watch_fold)
        results.append(result)
        watch(fold + 1, mean_figures(results))
    return results


def train_fold(config: RunConfig, folder: Path, watch: Callable[[float, dict], None]) -> dict:
    """Train once and return `fold_result`. watch(done, best figures so far): done is the share of the run, 0..1."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator, world = runtime.start(config.train.precision, config.runtime.threads, config.runtime.timeout_s)
    with contextlib.ExitStack() as leaving:
        leaving.callback(runtime.end)
        run = leaving.enter_context(contextlib.closing(Run(config, folder, accelerator, world)))
        run.checkpoints = SparseCheckpoints(folder, 1)
        state = run.new_state()
        run.resume(state)
        metrics = MetricsFile(folder / "metrics.jsonl", state.step or -1)
        run.tracker = TrialTracker(metrics, config, lambda figures: watch(state.step / run.num_steps, figures))
        leaving.callback(run.tracker.finish, True)
        if not run.is_over(state):
            train(run, state)
        if run.is_evaluation_due(state) or not (run.is_over(state) or state.step >= run.halt_step):
            raise Stopped(run.stop_requests.reason)
        if not run.tracker.evaluations:
            try:
                judge(run, state)
            except Interrupted:
                raise Stopped(run.stop_requests.reason) from None
        result = fold_result(run.tracker, state.step, run.epoch_of(state.step), config)
    runtime.write_json(folder / "result.json", result)
    return result


def fold_result(tracker: "TrialTracker", step: int, epoch: float, config: RunConfig) -> dict:
    """The figures of a fold's best evaluation by train.monitor, when it came, and how long the training took.

    {"top1", "loss", "samples", "best_epoch", "epoch", "step", "train_s": seconds of running, evaluations included}
    """
    best = best_line(tracker.evaluations, config.train.monitor)
    return {
        "top1": best["top1"], "loss": best["loss"], "samples": best["samples"], "best_epoch": best["epoch"], "step": step,
        "epoch": epoch, "train_s": max(line["time_s"] for line in tracker.evaluations),
    }  # fmt: skip


def best_line(evaluations: list[dict], monitor: str) -> dict:
    """The best of some evaluations; of equal accuracies the lower loss is the better one, of equal ones the first."""

    def goodness(line: dict) -> list[float]:
        return [-line["loss"]] if monitor == "loss" else [line["top1"], -line["loss"]]

    return max((line for line in evaluations if line["loss"] is not None), key=goodness, default=evaluations[0])


def mean_figures(results: list[dict]) -> dict:
    """Mean top1 and loss of some results; loss None where one of them has none."""
    losses = [result["loss"] for result in results]
    return {
        "top1": sum(result["top1"] for result in results) / len(results),
        "loss": None if None in losses else sum(losses) / len(losses),
    }


def read_result(folder: Path) -> dict | None:
    """The figures of a finished fold; None if it is not finished."""
    try:
        return json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None


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


class _Quiet:
    """The console of a trial."""

    def train(self, step: int, values: dict) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...
