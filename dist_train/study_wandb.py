"""A study in Weights & Biases: one run, with its finished trials by number, the best so far, and its report.

W&B takes one writer at a time, and a study has many processes: whoever sends opens the run, adds what it lacks, and closes it.
"""

import contextlib
import itertools
import os
import time
from pathlib import Path

from dist_train.journal import locked
from dist_train.metrics import goodness
from dist_train.trial import mean_figures
from dist_train.wandb_log import WandbRun, wandb_mode

SECONDS_BETWEEN = 600  # while trials are trained: opening and closing a run takes seconds


class StudyLog:
    """The W&B run of a study, as track.wandb of its recipe has it. plan: study.Plan. Raises UserError as `wandb_mode` does."""

    def __init__(self, plan, study):
        self._plan, self._study = plan, study
        self._mode = wandb_mode(plan.base.track.wandb, os.environ)
        self._sent, self._told = time.monotonic(), set()

    def progress(self) -> None:
        """Send what has ended, if W&B is online, the last time is a while ago and no other process is sending."""
        if self._mode == "online" and time.monotonic() - self._sent >= SECONDS_BETWEEN:
            with contextlib.suppress(BlockingIOError):
                self.send(None, wait=False)

    def send(self, report: Path | None, wait: bool = True) -> None:
        """Send what the run lacks, and the report's page. wait: until another process has sent its own."""
        self._sent = time.monotonic()
        if self._mode == "off":
            return
        with locked(self._plan.folder / "wandb.lock", wait):
            lines = lines_of(self._study.get_trials(deepcopy=False), self._plan.config.metric)
            run = StudyRun(self._plan.folder, self._plan.base, self._mode, lines, os.environ)
            if report:
                run.page(report)
            run.finish(True)
            for text in set(run.news()) - self._told:  # such as its address, once
                print(text, flush=True)
                self._told.add(text)


class StudyRun(WandbRun):
    """A W&B run that takes a page as well."""

    record = "trials"  # where its figures are in any case

    def page(self, path: Path) -> None:
        self._queue.put(("page", path))

    def _log(self, what: str, value) -> None:
        if what != "page":
            return super()._log(what, value)
        import wandb

        self._run.log({"step": max(self._sent.values(), default=0), "report": wandb.Html(value, inject=False)})

    def _advice(self) -> str:
        return "The same `dist-train study` sends what is missing." if self._mode == "online" else super()._advice()


def lines_of(trials: list, metric: str) -> list[dict]:
    """Each finished trial, and beside it the best up to there, as lines of metrics.jsonl whose steps are the trials' numbers.

    Up to the first trial that has not ended: a W&B run takes no step after a later one.
    """
    lines, best, best_worth = [], {}, []
    for trial in itertools.takewhile(lambda trial: trial.state.is_finished(), trials):
        if trial.state.name != "COMPLETE":
            continue
        folds = trial.user_attrs["folds"]
        figures, seconds = mean_figures(folds), sum(fold["train_s"] for fold in folds)
        settings = {name.replace(".", "_"): value for name, value in trial.params.items()}  # W&B sorts by letters, digits and _
        one = {**figures, "seconds": seconds, **settings}
        worth = goodness(**figures, monitor=metric)
        if worth > best_worth:
            best, best_worth = {"trial": trial.number, **one}, worth
        for split, values in (("trial", one), ("best", best)):
            lines.append({"kind": "eval", "split": split, "step": trial.number, **values})
    return lines
