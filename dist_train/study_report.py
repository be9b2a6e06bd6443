"""What a study found: a table of its trials, a page of pictures, and the best recipe, ready to train."""

import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_train import plots
from dist_train.bars import Bar, bar_chart
from dist_train.config import RunConfig
from dist_train.page import Chart, Section, Table, write_page
from dist_train.report import duration
from dist_train.settings import flatten, to_dict
from dist_train.track import read_metrics

SHOWN_BARS = 20
SHOWN_CURVES = 3


@dataclass(frozen=True)
class Found:
    """What `write_study_report` wrote. Without a finished trial there is no best recipe."""

    page: Path
    best_recipe: Path | None
    summary: str
    first_failure: str


@dataclass(frozen=True)
class Row:
    """One finished trial. folds: its results, see trial.fold_result; values: their study metric."""

    number: int
    params: dict
    folds: list[dict]
    values: list[float]
    folder: Path

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the folds; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def loss(self) -> float:
        """Mean over the folds; it decides between equal accuracies."""
        return statistics.fmean(math.inf if fold["loss"] is None else fold["loss"] for fold in self.folds)

    @property
    def seconds(self) -> float:
        return sum(fold["train_s"] for fold in self.folds)


def write_study_report(plan, study) -> Found:
    """Write FOLDER/report.html and FOLDER/best.yaml, and print the table of trials. plan: study.Plan."""
    trials = [t for t in study.get_trials(deepcopy=False) if "abandoned" not in t.user_attrs]
    metric = plan.config.metric
    rows = [
        Row(t.number, t.params, t.user_attrs["folds"], [fold[metric] for fold in t.user_attrs["folds"]],
            plan.folder / t.user_attrs["folder"])
        for t in trials if t.state.name == "COMPLETE"
    ]  # fmt: skip
    rows.sort(key=lambda row: row.mean if metric == "loss" else (-row.mean, row.loss))
    counts = {
        name: sum(t.state.name == name for t in trials) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")
    }
    words = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    summary = ", ".join(f"{n} {words[name]}" for name, n in counts.items() if n)
    failures = [t.user_attrs["why"] for t in trials if "why" in t.user_attrs]
    table = trial_table(rows, metric)
    if rows:
        print(Table(table.columns, table.rows[:SHOWN_BARS]).plain(), flush=True)
    best = plan.folder / "best.yaml" if rows else None
    if best:
        write_recipe(best, plan, rows[0])
    page = plan.folder / "report.html"
    base, folds = Path(plan.config.recipe).stem, plan.config.folds
    how = f"{folds} folds" if folds else f"the {plan.base.data.val_split} split"
    what = f"{base} on {Path(plan.base.data.shards).name}, {how}, {plan.config.sampler}"
    sections = _sections(plan, study, trials, rows, table, failures, best)
    subtitle = f"{what} · {summary} · {time.strftime('%Y-%m-%d %H:%M')}"
    write_page(page, plan.folder.resolve().name, subtitle, _cards(rows, metric), sections)
    return Found(page, best, summary, failures[0] if failures else "")


def trial_table(rows: list[Row], metric: str) -> Table:
    """The trials, best first: mean and spread of the metric, epoch of the best evaluation, training time, settings."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    columns = [("trial", True), ("accuracy" if metric == "top1" else "loss", True), ("±", True), ("best epoch", True),
               ("seconds", True), *((name, False) for name in names)]  # fmt: skip
    cells = [
        [str(row.number), shown(row.mean, metric), shown(row.spread, metric) if len(row.values) > 1 else "",
         f"{statistics.fmean(fold['best_epoch'] for fold in row.folds):.1f}", f"{row.seconds:.1f}",
         *(_param(row.params.get(name)) for name in names)]
        for row in rows
    ]  # fmt: skip
    return Table(columns, cells)


def shown(value: float, metric: str) -> str:
    return f"{value:.2%}" if metric == "top1" else f"{value:.4f}"


def write_recipe(path: Path, plan, row: Row) -> None:
    """The recipe of a trial: what differs from the defaults, with its figures in the first comment."""
    config = to_dict(plan.trial_config(row.params))
    config["data"] |= {"folds": 0, "fold": 0}
    defaults, tree = flatten(to_dict(RunConfig())), {}
    for name, value in flatten(config).items():
        if value != defaults[name]:
            branch = tree
            *sections, last = name.split(".")
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[last] = value
    figure = "accuracy" if plan.config.metric == "top1" else "loss"
    over = f"over {plan.config.folds} folds of the training split" if plan.config.folds else "on the validation split"
    spread = f" +- {shown(row.spread, plan.config.metric)}" if len(row.values) > 1 else ""
    header = (
        f"# The best of the study {plan.path}, trial {row.number}: {_params(row.params)}\n"
        f"# Validation {figure} {shown(row.mean, plan.config.metric)}{spread} {over}; it was chosen by that figure, so expect a\n"
        f"# little less of the test split.\n\n"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(header + yaml.safe_dump(tree, sort_keys=False))
    os.replace(partial, path)


def importance(study) -> dict[str, float]:
    """Share of the metric's variance that each searched setting explains (fANOVA, Hutter et al. 2014), largest first.

    Empty where there are too few finished trials, or nothing differs.
    """
    import optuna

    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    searched = {name for t in done for name in t.params if len({str(u.params.get(name)) for u in done}) > 1}
    if len(done) < 4 or len(searched) < 2 or len({t.value for t in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = evaluator.evaluate(study, params=sorted(searched))  # get_param_importances would make their sum 1
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def mean_curve(row: Row, metric: str) -> tuple[list[float], list[float]]:
    """Epochs, and the metric's mean over the folds that were still trained then."""
    folds = []
    for fold in range(len(row.folds)):
        lines = read_metrics(row.folder / f"fold-{fold}" / "metrics.jsonl")
        folds.append([(line["epoch"], line[metric]) for line in lines if line["kind"] == "eval" and line.get(metric) is not None])
    together = [tuple(zip(*evaluations, strict=True)) for evaluations in zip(*folds, strict=False)]
    return [epochs[0] for epochs, _ in together], [statistics.fmean(values) for _, values in together]


def _cards(rows: list[Row], metric: str) -> list[tuple[str, str]]:
    if not rows:
        return []
    return [
        ("best " + ("accuracy" if metric == "top1" else "loss"), _with_spread(rows[0], metric)),
        ("its training", duration(rows[0].seconds)),
        ("finished trials", str(len(rows))),
        ("all trainings", duration(sum(row.seconds for row in rows))),
    ]


def _sections(
    plan, study, trials, rows: list[Row], table: Table, failures: list[str], best: Path | None
) -> list[Section]:
    metric, sections = plan.config.metric, []
    what = "Accuracy" if metric == "top1" else "Loss"
    if rows:
        note = ("The mean over the folds; lines show one standard deviation to both sides." if len(rows[0].values) > 1 else
                "One training each, on the validation split.")  # fmt: skip
        first = rows[:SHOWN_BARS]
        figures = [Bar(_name(row), row.mean, row.spread, _with_spread(row, metric)) for row in first]
        times = [Bar(_name(row), row.seconds, 0.0, duration(row.seconds), "two") for row in first]
        text = (lambda y: f"{y * 100:g}%") if metric == "top1" else (lambda y: f"{y:g}")
        title = f"The best {SHOWN_BARS}" if len(rows) > SHOWN_BARS else "The trials"
        sections.append(Section(title, note, [
            Chart(f"{what}: best with {_name(rows[0])}", bar_chart(figures, text, zero=False)),
            Chart("Training time, seconds", bar_chart(times, lambda s: f"{s:g}"))
        ]))  # fmt: skip
        sections.append(Section("How it went", "", _course(plan, trials, rows, what, text)))
    shares = importance(study) if rows else {}
    if shares:
        bars = [Bar(name, share, 0.0, f"{share:.0%}", "three") for name, share in shares.items()]
        note = "The share of the figure's variance over all finished trials that each setting explains by itself (fANOVA)."
        sections.append(
            Section("Which settings matter", note, [Chart("Importance", bar_chart(bars, lambda y: f"{y:.0%}"))])
        )
    if rows:
        sections.append(Section("Finished trials", table=table))
    if failures:
        sections.append(Section("Trials that failed", text="\n\n".join(failures)))
    if best:
        sections.append(
            Section("The best recipe", f"Train it with: dist-train train --config {best}", text=best.read_text())
        )
    return sections


def _course(plan, trials, rows: list[Row], what: str, text) -> list[Chart]:
    """The figure of each trial in the order they were drawn, the best so far; and the best trials' curves."""
    metric, by_number = plan.config.metric, sorted(rows, key=lambda row: row.number)
    better, best, so_far = (max if metric == "top1" else min), None, []
    for row in by_number:
        best = row.mean if best is None else better(best, row.mean)
        so_far.append(best)
    numbers = [float(row.number) for row in by_number]
    each = plots.Curve("trial", numbers, [row.mean for row in by_number], 1, dots=True, band=True)
    charts = [Chart(f"{what} by trial", plots.line_chart([each, plots.Curve("best so far", numbers, so_far)], "trial", text),
                    [("best so far", "one"), ("trial", "two")])]  # fmt: skip
    curves = [
        plots.Curve(_name(row), *mean_curve(row, metric), colour) for colour, row in enumerate(rows[:SHOWN_CURVES])
    ]
    if svg := plots.line_chart(curves, "epoch", text):
        legend = [(_name(row), colour) for row, colour in zip(rows, ("one", "two", "three"), strict=False)]
        charts.append(Chart(f"{what} of the best by epoch", svg, legend))
    return charts


def _name(row: Row) -> str:
    variant = row.params.get("variant")
    others = {name.rpartition(".")[2]: value for name, value in row.params.items() if name != "variant"}
    return " ".join(filter(None, [variant, _params(others, ", ")])) or f"trial {row.number}"


def _with_spread(row: Row, metric: str) -> str:
    return shown(row.mean, metric) + (f" ± {shown(row.spread, metric)}" if len(row.values) > 1 else "")


def _params(params: dict, joint: str = "  ") -> str:
    return joint.join(f"{name} {_param(value)}" for name, value in params.items())


def _param(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
