"""One trial of a study: a recipe trained in this process, once for each fold, without what only a lasting run needs."""

import contextlib
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dist_train import runtime
from dist_train.checkpoint import AllDamaged, Checkpoints, Saved
from dist_train.config import RunConfig
from dist_train.decoder_choice import choose_decoder
from dist_train.durable import replace_json
from dist_train.errors import UserError
from dist_train.evaluate import Interrupted
from dist_train.metrics import goodness
from dist_train.run import Run
from dist_train.run_folder import has_begun, open_run_folder
from dist_train.track import MetricsFile, Tracker
from dist_train.train import train, validate

SECONDS_BETWEEN_CHECKPOINTS = 60  # a killed trial loses at most this; a shorter one leaves no checkpoint at all

_decoders: dict[tuple, str] = {}  # what this process has measured to be faster, by what the measurement reads


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


def try_out(config: RunConfig, folds: int, folder: Path, stop_requests: runtime.StopRequests) -> None:
    """Train one step, write a checkpoint and evaluate, in a folder that is thrown away; raises whatever is in the way.

    folds: as the study has it; the first is taken. Raises Stopped, too.
    """
    data = replace(config.data, folds=folds) if folds else config.data
    config = replace(config, data=data, train=replace(config.train, max_steps=1))
    train_fold(config, folder / "fold-0", lambda done, figures: None, stop_requests, 0)


def let_go_of_trainings() -> None:
    """Of those that this process has ended: their objects refer to each other, and hold the GPU's memory until somebody looks.

    What torch compiled of them goes too: after eight networks through the same code it would compile no more.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()


def train_fold(
    config: RunConfig, folder: Path, watch: Callable[[float, dict], None], stop_requests: runtime.StopRequests,
    seconds_between_checkpoints: float = SECONDS_BETWEEN_CHECKPOINTS,
) -> dict:  # fmt: skip
    """Train once and return `fold_result`. watch(done, best figures so far): done is the share of the run, 0..1.

    The folder becomes that of a run, as `report` and `compare` read it. Raises Stopped, Diverged.
    """
    let_go_of_trainings()
    folder.mkdir(parents=True, exist_ok=True)
    asked = config.runtime
    accelerator, world = runtime.start(config.train.precision, asked.threads, asked.timeout_s, asked.deterministic)
    with contextlib.ExitStack() as leaving:
        leaving.callback(runtime.end)
        num_threads = config.data.threads or world.num_cores
        config = settle_decoder(config, folder.with_name("fold-0"), world.device, num_threads)  # all folds as the first one
        open_run_folder(config, folder, resume=True)
        run = leaving.enter_context(contextlib.closing(Run(config, folder, accelerator, world, stop_requests)))
        run.checkpoints = SparseCheckpoints(folder, 1, seconds_between_checkpoints)
        state = run.new_state()
        run.resume(state)
        metrics = MetricsFile(folder / "metrics.jsonl", state.step or -1)
        run.tracker = TrialTracker(metrics, config, lambda figures: watch(state.step / max(1, run.num_steps), figures))
        leaving.callback(run.tracker.finish, True)
        leaving.enter_context(divergence_told(run))
        train(run, state)
        if run.is_evaluation_due(state) or not (run.is_over(state) or state.step >= run.halt_step):
            raise Stopped(run.stop_requests.reason)
        if not run.tracker.evaluations:
            try:
                validate(run, state)
            except Interrupted:
                raise Stopped(run.stop_requests.reason) from None
        result = fold_result(run.tracker, state.step, run.epoch_of(state.step), config)
    split = {config.data.val_split: {name: result[name] for name in ("samples", "loss", "top1", "balanced")}}  # as `train` does
    replace_json(folder / "result.json", result | split)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nobody goes on from there
    return result


def settle_decoder(config: RunConfig, folder: Path, device: torch.device, num_threads: int) -> RunConfig:
    """`choose_decoder`, which measures once in a process for all trainings that read and cut the same pictures alike.

    That takes seconds, and pixels differ a little: what is compared is decoded in one way, however close the two are in speed.
    """
    data, cut = config.data, config.augment
    if data.decode != "auto" or has_begun(folder):
        return choose_decoder(config, folder, device, num_threads)
    place = data.shards, data.train_split, data.crop, data.image_size, cut.crop, cut.scale, cut.ratio, str(device), num_threads
    if place not in _decoders:
        _decoders[place] = choose_decoder(config, folder, device, num_threads).data.decode
    return replace(config, data=replace(data, decode=_decoders[place]))


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

    {"top1", "loss", "balanced", "samples", "best_epoch": the best one's; "last_top1", "last_loss", "last_balanced",
    "epoch", "step": at the end; "train_s": seconds of running, evaluations included}.

    The best was chosen by the fold it was taken on, the last was not.
    """
    best, last = best_line(tracker.evaluations, config.train.monitor), tracker.evaluations[-1]
    return {
        **{name: best.get(name) for name in ("top1", "loss", "balanced", "samples")}, "best_epoch": best["epoch"],
        **{f"last_{name}": last.get(name) for name in ("top1", "loss", "balanced")}, "step": step, "epoch": epoch,
        "train_s": max(line["time_s"] for line in tracker.evaluations),
    }  # fmt: skip


def best_line(evaluations: list[dict], monitor: str) -> dict:
    """The best of some evaluations, of equal ones the first."""
    return max(evaluations, key=lambda line: goodness(line["top1"], line["loss"], monitor, line.get("balanced")))


def mean_figures(results: list[dict]) -> dict:
    """Mean top1, loss and balanced of some results; None where one of them has none, as those of an earlier version."""
    values = {name: [result.get(name) for result in results] for name in ("top1", "loss", "balanced")}
    return {name: None if None in of_all else sum(of_all) / len(of_all) for name, of_all in values.items()}


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
    """Checkpoints of a training that is over in seconds, mostly: saves no more often than this, whatever the run asks for."""

    def __init__(self, folder: Path, keep: int, seconds_between: float):
        super().__init__(folder, keep)
        self._seconds_between, self._saved = seconds_between, time.monotonic()

    def save(self, saved: Saved, is_best: bool) -> None:
        if time.monotonic() - self._saved >= self._seconds_between:
            self._saved = time.monotonic()
            super().save(saved, is_best)

    def newest(self) -> tuple[Saved | None, list[str]]:
        try:
            return super().newest()
        except AllDamaged as error:  # the training begins anew: nothing depends on it
            shutil.rmtree(self.folder)
            return None, [str(error)]

    def has_best(self, saved: Saved) -> bool:
        return True  # no weights are kept as the best, so none can be missing: patience counts on from the best figures


class _Quiet:
    """The console of a trial."""

    def train(self, step: int, values: dict) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...
