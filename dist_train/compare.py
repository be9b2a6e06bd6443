"""Several runs side by side: `dist-train compare RUN RUN...` prints a table and writes a page with bars and curves.

Runs that differ in their seed or fold alone count as one, with their mean and spread.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_train import plots
from dist_train.bars import Bar, bar_chart
from dist_train.config import RunConfig, changes_results
from dist_train.errors import UserError
from dist_train.page import Chart, Section, Table, write_page
from dist_train.remote import shown
from dist_train.report import duration
from dist_train.settings import flatten, from_dict, to_dict
from dist_train.track import read_metrics

_REPEATS = ("seed", "data.fold")  # runs that differ in these alone are the same training, done again
_COLOURS = ("one", "two", "three")
_SHOWN = {"top1": ("accuracy", "{:.2%}"), "balanced": ("balanced", "{:.2%}"), "loss": ("loss", "{:.4f}")}  # in the table


@dataclass(frozen=True)
class Finished:
    """What is compared of one run. figures: split -> {"top1", "loss", ...}; seconds of running, stops left out.

    judged_on: split -> its fingerprint, where the evaluation that the figures are of is there.
    """

    name: str
    settings: dict
    figures: dict[str, dict]
    seconds: float
    epochs: float
    samples_per_s: float | None
    curve: tuple[list[float], list[float]]  # epochs, validation accuracy
    judged_on: dict[str, str]


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for seed and fold."""

    name: str
    runs: list[Finished]

    def values(self, split: str, figure: str) -> list[float]:
        """A figure of every run that has it."""
        found = [run.figures.get(split, {}).get(figure) for run in self.runs]
        return [value for value in found if value is not None]


def main(argv: list[str]) -> None:
    """Command `dist-train compare RUN RUN... [--out FILE]`."""
    parser = argparse.ArgumentParser(prog="dist-train compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="page to write; default compare.html beside the first run")
    options = parser.parse_args(argv)
    groups = grouped(read_all(options.runs))
    table = comparison(groups)
    print(table.plain())
    for split in judged_apart(groups):
        print(f"{split}: the runs were judged on other shards or folds; unless those hold the same samples, their figures do not "
              f"say which is the better one.")  # fmt: skip
    out = options.out or options.runs[0].resolve().parent / "compare.html"
    write_comparison(out, groups, table)
    print(f"page: {os.path.relpath(out) if out.is_relative_to(Path.cwd()) else out}")


def read_all(folders: list[Path]) -> list[Finished]:
    """Read finished runs. Raises UserError naming every folder that holds none."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_finished(folder))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return runs


def read_finished(folder: Path) -> Finished:
    """Read a run's settings and figures. Raises UserError if it is not finished, or a file of it is damaged."""
    try:
        config = from_dict(RunConfig, yaml.safe_load((folder / "config.yaml").read_text()))
        result = json.loads((folder / "result.json").read_text())
        figures = {split: values for split, values in result.items() if isinstance(values, dict) and "top1" in values}
    except FileNotFoundError as error:
        what = f"it has no {Path(error.filename).name}" if folder.is_dir() else "there is no such folder"
        folds = sorted(folder.glob("fold-*/config.yaml"))
        expected = f"its runs are: {folder}/fold-*" if folds else "expected the folder of one, such as runs/NAME"
        raise UserError(f"{folder}: not a finished run: {what}; {expected}.") from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: the run cannot be read: {error}") from None
    lines = read_metrics(folder / "metrics.jsonl")
    rates = [line["images_per_s"] for line in lines if line.get("images_per_s")]
    evals = [line for line in lines if line["kind"] == "eval" and line["split"] == config.data.val_split
             and line.get("top1") is not None and "epoch" in line]  # fmt: skip
    return Finished(
        name=run_name(folder.resolve()), settings=flatten(to_dict(config)), figures=figures,
        seconds=max((line.get("time_s") or 0.0 for line in lines), default=0.0), epochs=float(result.get("epoch", 0)),
        samples_per_s=statistics.median(rates) if rates else None,
        curve=([line["epoch"] for line in evals], [line["top1"] for line in evals]), judged_on=_fingerprints(folder, figures),
    )  # fmt: skip


def _fingerprints(folder: Path, figures: dict[str, dict]) -> dict[str, str]:
    found = {}
    for split, values in figures.items():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a study keeps none for its trials
            evaluation = json.loads((folder / f"evaluation-{split}.json").read_text())
            if all(evaluation[key] == values[key] for key in ("samples", "top1")):  # else dist-train eval wrote it, of other shards
                found[split] = str(evaluation["fingerprint"])
    return found


def run_name(folder: Path) -> str:
    """The folder's name; of a fold of a study's trial also the trial's, since all of them have a fold-0."""
    return "/".join(folder.parts[-2:]) if folder.parent.parent.name == "trials" else folder.name


def grouped(runs: list[Finished]) -> list[Group]:
    """Runs by their settings, seeds and folds together, in the order given."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        key = {name: value for name, value in run.settings.items() if is_difference(name)}
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return [Group(members[0].name + (f" and {len(members) - 1} more" if len(members) > 1 else ""), members)
            for members in groups.values()]  # fmt: skip


def differences(groups: list[Group]) -> dict[str, list]:
    """Setting -> its value in each group, for those that are not the same in all."""
    names = dict.fromkeys(name for group in groups for name in group.runs[0].settings)
    values = {name: [group.runs[0].settings.get(name) for group in groups] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row) and is_difference(name)}


def is_difference(name: str) -> bool:
    """Whether runs with different values of a setting are different trainings."""
    return changes_results(name) and name not in _REPEATS


def judged_apart(groups: list[Group]) -> list[str]:
    """Splits whose samples are not the same in all groups, as those of other shards or of other folds."""
    samples = {split: [{run.judged_on.get(split) for run in group.runs if split in run.figures} for group in groups]
               for split in _splits(groups)}  # fmt: skip
    known = {split: [of_group for of_group in found if of_group and None not in of_group] for split, found in samples.items()}
    return [split for split, found in known.items() if any(of_group != found[0] for of_group in found)]


def comparison(groups: list[Group]) -> Table:
    """A row a group: accuracies, losses, time, speed, and the settings in which the groups differ.

    Balanced accuracy, which runs of earlier versions lack, has its columns where any run has it.
    """
    figures = [(split, key) for split in _splits(groups) for key in _SHOWN
               if key != "balanced" or any(group.values(split, key) for group in groups)]  # fmt: skip
    columns = [("run", False), ("runs", True)]
    columns += [(f"{split} {_SHOWN[key][0]}", True) for split, key in figures]
    columns += [("epochs", True), ("time", True), ("samples/s", True)]
    differing = differences(groups)
    columns += [(name, False) for name in differing]
    rows = []
    for i, group in enumerate(groups):
        row = [group.name, str(len(group.runs))]
        row += [_spoken(group.values(split, key), _SHOWN[key][1]) for split, key in figures]
        rates = [run.samples_per_s for run in group.runs if run.samples_per_s]
        row += [f"{statistics.fmean(run.epochs for run in group.runs):.3g}", duration(_seconds(group)),
                f"{statistics.fmean(rates):,.0f}" if rates else "–"]  # fmt: skip
        rows.append(row + [_value(values[i]) for values in differing.values()])
    return Table(columns, rows)


def write_comparison(out: Path, groups: list[Group], table: Table) -> None:
    """Write the page: bars of accuracy and time, curves of the first three, the table."""
    charts, apart = [], judged_apart(groups)
    for split in reversed(_splits(groups)):
        bars = [Bar(group.name, statistics.fmean(values), _spread(values), _spoken(values, "{:.2%}"), colour="one")
                for group in groups if (values := group.values(split, "top1"))]  # fmt: skip
        best = max(bars, key=lambda bar: bar.value)
        finding = f": highest with {best.name}" if len(bars) > 1 else ""
        finding = ", judged on other shards or folds" if split in apart else finding
        charts.append(Chart(f"Accuracy, {split} split{finding}", bar_chart(bars, lambda y: f"{y * 100:g}%", zero=False)))
    times = [Bar(group.name, _seconds(group), _spread([run.seconds for run in group.runs]), duration(_seconds(group)), "two")
             for group in groups]  # fmt: skip
    charts.append(Chart("Running time, seconds", bar_chart(times, lambda s: f"{s:g}")))
    curves = [plots.Curve(group.runs[0].name, *group.runs[0].curve, colour) for colour, group in enumerate(groups[: len(_COLOURS)])]
    if svg := plots.line_chart(curves, "epoch", lambda y: f"{y * 100:g}%"):
        names = [(group.runs[0].name, colour) for group, colour in zip(groups, _COLOURS, strict=False)]
        charts.append(Chart("Validation accuracy" + (" of the first three" if len(groups) > len(_COLOURS) else ""), svg, names))
    note = "Lines show one standard deviation to both sides, where there are several runs."
    sections = [Section("Figures", note, charts), Section("Table", "Settings are shown where the runs differ.", table=table)]
    num_runs = sum(len(group.runs) for group in groups)
    write_page(out, "Runs compared", f"{num_runs} runs · {time.strftime('%Y-%m-%d %H:%M')}", [], sections)


def _splits(groups: list[Group]) -> list[str]:
    found = dict.fromkeys(split for group in groups for run in group.runs for split in run.figures)
    return sorted(found, key=lambda split: (split == "test", split))


def _seconds(group: Group) -> float:
    return statistics.fmean(run.seconds for run in group.runs)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _spoken(values: list[float], form: str) -> str:
    if not values:
        return "–"
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(_spread(values))}" if len(values) > 1 else mean


def _value(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else shown(str(value)) if value != "" else "–"
