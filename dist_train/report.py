"""A run as one page: settings, curves, confusion, the worst mistakes as pictures; a single file without requests."""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np

from dist_train import plots
from dist_train.config import RunConfig
from dist_train.confusion import MAX_MATRIX_CLASSES, balanced_accuracy, class_table, confused_pairs, most_confused
from dist_train.errors import UserError
from dist_train.folds import fold_view
from dist_train.index import ShardIndex, SplitIndex, load_index
from dist_train.mistakes import worst_mistakes
from dist_train.page import Chart, Gallery, Section, write_template
from dist_train.picture_plots import filter_gallery, first_filters, histogram_chart, sample_gallery
from dist_train.remote import shown
from dist_train.settings import flatten, from_dict, to_dict
from dist_train.table_plots import table_section
from dist_train.track import read_metrics

_APART = 0.01  # balanced accuracy stands beside accuracy in the headline and the curves where they differ by more


def main(argv: list[str]) -> None:
    """Command `dist-train report RUN`: write RUN/report.html and say where it is."""
    parser = argparse.ArgumentParser(prog="dist-train report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/digits-alexnet")
    path = write_report(parser.parse_args(argv).run)
    print(f"report: {path}")


def write_report(run: Path) -> Path:
    """Write RUN/report.html from whatever the run has left so far; return its path.

    Raises UserError if the folder is not a run's, or one of its files is damaged.
    """
    run = Path(run)
    path = run / "report.html"
    write_template(path, "report.html.j2", **read_run(run))
    return path


def read_run(run: Path) -> dict:
    """Everything the page shows, by the names its template uses."""
    if not (run / "config.yaml").exists():
        what = "there is no config.yaml in it" if run.is_dir() else "there is no such folder"
        raise UserError(f"{run}: not the folder of a run: {what}.\n  Give the folder that training wrote: runs/NAME.")
    config = _read(run / "config.yaml") or {}
    inference = _read(run / "inference.json") or {}
    result = _read(run / "result.json")
    lines = read_metrics(run / "metrics.jsonl")
    index, note = _open_shards(run, config, inference)
    splits = [_evaluation(run, inference, index, path) for path in _evaluations(run)]
    return {
        "title": run.resolve().name,
        "subtitle": f"{_state(lines, result)} · report of {time.strftime('%Y-%m-%d %H:%M')}",
        "cards": _cards(lines, result),
        "charts": _charts(lines, config),
        "restarted": any(line["kind"] == "restart" for line in lines),
        "evaluations": [line for line in lines if line["kind"] == "eval"],
        "splits": splits,
        "data": _data_section(config, index, note),
        "filters": _filters(run, inference),
        "timings": _timings(lines, result),
        "settings": _settings(config),
        "environment": [(key, _shown(value)) for key, value in flatten(_read(run / "environment.json") or {}).items()],
    }


def _read(path: Path):
    """Contents of a JSON or YAML file of the run; None if the run has not written it (yet)."""
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read: {str(error).splitlines()[0]}.\n  Put the file right or remove it; "
            f"the report is made from what is left."
        ) from None


def _state(lines: list[dict], result) -> str:
    if result is not None:
        return "finished"
    if not lines:
        return "has not reached its first figures yet"
    newest = max(line["step"] for line in lines)
    return f"not finished: the newest figures are of step {newest:,}"


def _cards(lines: list[dict], result) -> list[tuple[str, str]]:
    """(what, value) of the headline figures."""
    cards = []
    for split, figures in sorted((result or {}).items(), key=lambda item: item[0] != "test"):
        if isinstance(figures, dict) and "top1" in figures:
            cards += _accuracies(split, figures)
    evals = [line for line in lines if line["kind"] == "eval" and line.get("top1") is not None]
    if not cards and evals:
        cards += _accuracies(evals[-1]["split"], evals[-1], " so far")
    trained = [line for line in lines if line["kind"] == "train"]
    if lines and (seconds := _last(lines, "time_s")):
        cards.append(("running time", duration(seconds)))
    if rates := [line["images_per_s"] for line in trained if line.get("images_per_s")]:
        cards.append(("samples a second", f"{statistics.median(rates):,.0f}"))
    if epoch := _last(trained, "epoch"):
        cards.append(("epochs", f"{epoch:.3g}"))
    return cards


def _accuracies(split: str, figures: dict, when: str = "") -> list[tuple[str, str]]:
    """The cards of a split's accuracy and, where that says something else, its balanced accuracy."""
    cards = [(f"{split} accuracy{when}", f"{figures['top1']:.2%}")]
    return cards + ([(f"{split} balanced accuracy{when}", f"{figures['balanced']:.2%}")] if _is_apart(figures) else [])


def _is_apart(figures: dict) -> bool:
    """Whether balanced accuracy says something else than accuracy; runs of earlier versions have none."""
    top1, balanced = figures.get("top1"), figures.get("balanced")
    return None not in (top1, balanced) and abs(top1 - balanced) > _APART


def _charts(lines: list[dict], config: dict) -> list[Chart]:
    """Every curve there is data for."""
    trained = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    x_name = "epoch" if all("epoch" in line for line in trained) else "step"
    if x_name == "epoch":  # the evaluation of the test split, at the end, does not say its own
        evals = [{"epoch": _epoch_of(line["step"], trained)} | line for line in evals]
    restarts = [line["step"] for line in lines if line["kind"] == "restart"]
    if x_name == "epoch":
        restarts = [_epoch_of(step, trained) for step in restarts]

    def curve(rows, key, name, colour=0, **style):
        return plots.Curve(name, [r[x_name] for r in rows], [_number(r.get(key)) for r in rows], colour, **style)

    raw = curve(trained, "loss", "train", band=True)
    smoothed = plots.Curve("train", raw.x, plots.smooth(raw.y, max(1, len(raw.y) // 25)))
    loss, accuracy, balanced = ([raw, smoothed] if len(raw.x) > 1 else [smoothed]), [], []
    series = dict.fromkeys(line["split"] for line in evals)
    for colour, split in zip((1, 2), series, strict=False):
        rows = [line for line in evals if line["split"] == split]
        loss.append(curve(rows, "loss", split, colour, dots=True))
        accuracy.append(curve(rows, "top1", split, colour, dots=True))
        rows = [line for line in rows if line.get("balanced") is not None]
        balanced.append(curve(rows, "balanced", split, colour, dots=True))
    waits = [line for line in trained if line.get("data_wait") is not None]
    charts = [
        ("Loss" + _best(evals, "loss", min, x_name, "{:.4f}"), loss, lambda y: f"{y:g}", True),
        ("Accuracy" + _best(evals, "top1", max, x_name, "{:.2%}"), accuracy, lambda y: f"{y * 100:g}%", False),
        ("Learning rate" + _summary(trained, "lr", max, "peak", "{:.3g}".format),
         [curve(trained, "lr", "learning rate")], _rate, True),
        ("Samples a second" + _summary(trained, "images_per_s", statistics.median, "median", "{:,.0f}".format),
         [curve(trained, "images_per_s", "samples a second")], lambda y: f"{y:,.0f}", True),
    ]  # fmt: skip
    if (config.get("train") or {}).get("monitor") == "balanced" or any(map(_is_apart, evals)):
        title = "Balanced accuracy" + _best(evals, "balanced", max, x_name, "{:.2%}")
        charts.insert(2, (title, balanced, lambda y: f"{y * 100:g}%", False))
    if any(line["data_wait"] > 0.02 for line in waits):
        title = "Waiting for data" + _summary(waits, "data_wait", statistics.fmean, "mean share", "{:.1%}".format)
        charts.append((title, [curve(waits, "data_wait", "wait", 1)], lambda y: f"{y * 100:g}%", True))
    drawn = []
    for title, curves, y_text, zero in charts:
        if len(evals) == 1 and (curves is accuracy or curves is balanced):
            continue  # a dot alone says no more than the headline does
        if svg := plots.line_chart(curves, x_name, y_text, zero, restarts):
            names = [(c.name, plots.COLOURS[c.colour]) for c in curves if not c.band and c.x]
            legend = names if len(names) > 1 or any(curves is shares for shares in (accuracy, balanced)) else []
            drawn.append(Chart(title, svg, legend, _targets_note(config) if curves is loss and len(names) > 1 else ""))
    return drawn


def _targets_note(config: dict) -> str:
    """What the training loss is measured against, where that is not what evaluations are: the two curves do not compare."""
    kinds = {"label_smoothing": "optim", "mixup": "augment", "cutmix": "augment"}
    used = [f"{section}.{name} {value:g}" for name, section in kinds.items() if (value := (config.get(section) or {}).get(name))]
    ways = [(f"against softened targets ({', '.join(used)})", "against the plain classes")] if used else []
    if power := (config.get("optim") or {}).get("class_weights"):
        ways.append((f"with samples weighted by their class (optim.class_weights {power:g})", "with all alike"))
    if not ways:
        return ""
    training, evaluations = (" and ".join(side) for side in zip(*ways, strict=True))
    return f"Training is measured {training}, evaluations {evaluations}: these losses do not compare."


def _best(evals: list[dict], key: str, better, x_name: str, form: str) -> str:
    """The best figure of the first evaluated split, and when it was reached, as the end of a title."""
    rows = [line for line in evals if line["split"] == evals[0]["split"] and line.get(key) is not None]
    if not rows:
        return ""
    best = better(rows, key=lambda line: line[key])
    figure = f"{best['split']} {form.format(best[key])}"
    return f": best {figure} at {x_name} {round(best[x_name], 1):,g}" if len(rows) > 1 else f": {figure}"


def _summary(lines: list[dict], key: str, figure, name: str, text) -> str:
    """One figure of a curve as the end of a title."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return f": {name} {text(figure(values))}" if values else ""


def _evaluations(run: Path) -> list[Path]:
    """Evaluation files, the test split's first."""
    return sorted(run.glob("evaluation-*.json"), key=lambda path: (path.stem != "evaluation-test", path.stem))


def _evaluation(run: Path, inference: dict, index: ShardIndex | None, path: Path) -> dict:
    raw = _read(path)
    try:
        counts = np.asarray(raw["confusion"], np.int64)
        names = [str(name) for name in inference.get("classes") or range(len(counts))]
        shown = most_confused(counts) if len(names) > MAX_MATRIX_CLASSES else np.arange(len(names))
        pairs = confused_pairs(counts, names)
        split = index.find(raw["split"]) if index else None
        name = f"{raw['split']} split"
        if split is not None and raw.get("fingerprint") not in (None, split.fingerprint()):
            name, split = f"{name} of another set", None  # whose pictures are not here
        mistakes, note = worst_mistakes(raw, names, split, has_pictures=not (index and index.features))
        classes = class_table(counts, names)
        curves, curves_note = _ranking(run, index, split, classes)
        return {
            "name": name, "samples": raw["samples"], "loss": raw.get("loss"), "top1": raw.get("top1"),
            "balanced": balanced_accuracy(np.diag(counts), counts.sum(axis=1)),  # earlier versions did not write it
            "top5": raw.get("top5") if len(names) > 5 else None, "num_classes": len(names), "num_shown": len(shown),
            "matrix": plots.heat_map(counts[np.ix_(shown, shown)], [names[i] for i in shown]),
            "finding": _finding(pairs), "pairs": pairs, "classes": classes, "mistakes": mistakes, "note": note,
            "curves": curves, "curves_note": curves_note, "has_areas": any("roc" in row for row in classes),
        }  # fmt: skip
    except UserError:
        raise
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"{path}: not an evaluation as this version writes it: {type(error).__name__} {error}.\n"
            f"  Write it again with: dist-train eval {run} --split {path.stem.removeprefix('evaluation-')}"
        ) from None


def _finding(pairs: list[tuple[str, str, int, float]]) -> str:
    if not pairs:
        return "Confusion: none"
    label, predicted, count, share = pairs[0]
    return f"Confusion: most often {label} is taken for {predicted} ({count:,}, {share:.1%} of the class)"


def _ranking(run: Path, index: ShardIndex | None, split: SplitIndex | None, classes: list[dict]) -> tuple[list, str]:
    """ROC and precision-recall curves of a table's run; the areas are added to the rows of `classes`."""
    if split is None or index.features is None or not (run / "weights.safetensors").exists():
        return [], ""
    from dist_train.scores import areas, ranking_charts, table_scores

    try:
        labels, probabilities = table_scores(run, split)
    except UserError as error:
        return [], f"No ROC and precision-recall curves: {error}"
    for name, found in zip(index.classes, areas(labels, probabilities), strict=True):
        row = next(row for row in classes if row["name"] == name)
        row["roc"], row["precise"] = found or (None, None)
    return ranking_charts(labels, probabilities, index.classes), ""


def _open_shards(run: Path, config: dict, inference: dict) -> tuple[ShardIndex | None, str]:
    """The run's shards as it saw them, or None and why there are no pictures of them."""
    data = config.get("data") or {}
    folder = str(data.get("shards") or "")
    places = [folder] if "://" in folder else [Path(folder), run.resolve().parent.parent / folder]
    found = next((at for at in places if "://" in str(at) or (folder and (at / "index.json").exists())), None)
    if found is None:
        named = folder or "not named in the settings"
        return None, f"The shards ({named}) are not here, so there are no pictures to show."
    try:
        index = load_index(found, data.get("cache_dir") or "", data.get("cache_gb") or 100.0)
        index = fold_view(index, from_dict(RunConfig, config))
    except UserError as error:
        return None, f"No pictures: {error}"
    if not inference:  # the run is not finished
        return index, ""
    if inference["classes"] != index.classes:
        return None, f"{shown(folder)} holds other classes than those trained on, so there are no pictures to show."
    statistics_of_run = {name: inference[name] for name in ("mean", "std") if name in inference}  # those of its fold
    return dataclasses.replace(index, **statistics_of_run), ""


def _data_section(config: dict, index: ShardIndex | None, note: str) -> Section:
    """What was trained on, in pictures, and what augmentation made of it."""
    section = Section("The data", note)
    if index is None:
        return section
    try:
        settings = from_dict(RunConfig, config)
        split = index.find(settings.data.train_split)
        if split is None:
            return Section("The data", f"{index.folder} has no split {settings.data.train_split} to show.")
        if index.features:
            return table_section(index, split)
        section = Section("The data", "", [histogram_chart(split)], galleries=[sample_gallery(index, split)])
        from dist_train.preview import is_augmented, preview_gallery

        if is_augmented(settings, index):
            section.galleries.append(preview_gallery(settings, index))
    except UserError as error:
        return dataclasses.replace(section, note=f"Some pictures are missing: {error}")
    return section


def _filters(run: Path, inference: dict) -> Gallery | None:
    weights = run / "weights.safetensors"
    if inference.get("features") or not weights.exists():
        return None
    kernels = first_filters(weights)
    return None if kernels is None else filter_gallery(kernels)


def _timings(lines: list[dict], result) -> list[tuple[str, str]]:
    trained = [line for line in lines if line["kind"] == "train"]
    rows = []
    if seconds := _last(lines, "time_s"):
        rows.append(("running time, stops left out", duration(seconds)))
        if epochs := _last(trained, "epoch"):
            rows.append(("an epoch, evaluations included", duration(seconds / epochs)))
    if rates := [line["images_per_s"] for line in trained if line.get("images_per_s")]:
        rows.append(("samples a second: median, least, most",
                     f"{statistics.median(rates):,.0f}, {min(rates):,.0f}, {max(rates):,.0f}"))  # fmt: skip
    if waits := [line["data_wait"] for line in trained if line.get("data_wait") is not None]:
        rows.append(("share of the time waiting for data, mean", f"{statistics.fmean(waits):.1%}"))
    if shares := [line["mfu"] for line in trained if line.get("mfu") is not None]:
        tflops = statistics.median(line["tflops"] for line in trained if line.get("tflops") is not None)
        rows.append(("TFLOP/s, and share of what a matrix product reaches (MFU), median",
                     f"{tflops:.3g}, {statistics.median(shares):.1%}"))  # fmt: skip
    if profile := next((line for line in lines if line["kind"] == "profile"), None):
        parts = {key: share for key, share in profile.items() if key not in ("kind", "step", "step_s", "time_s")}
        rows.append((f"where a step's {1000 * profile['step_s']:,.1f} ms go, measured up to step {profile['step']:,}",
                     ", ".join(f"{part} {share:.1%}" for part, share in parts.items())))  # fmt: skip
    if trained:
        rows.append(("steps", f"{trained[-1]['step']:,}"))
    rows.append(("evaluations", str(sum(line["kind"] == "eval" for line in lines))))
    rows.append(("restarts", str(sum(line["kind"] == "restart" for line in lines))))
    others = {key: value for key, value in (result or {}).items() if not (isinstance(value, dict) and "top1" in value)}
    return rows + [(key, _shown(value)) for key, value in flatten(others).items()]


def _settings(config: dict) -> list[dict]:
    """Sections of settings: name, and (key, value, whether it differs from the default) of each."""
    defaults = flatten(to_dict(RunConfig()))
    sections = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section or "run", []).append((name, _shown(value), value != defaults.get(key)))
    return [{"name": name, "rows": rows} for name, rows in sections.items()]


def duration(seconds: float) -> str:
    """Seconds in words a person reads: 8.4 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _epoch_of(step: int, trained: list[dict]) -> float:
    near = min(trained, key=lambda line: abs(line["step"] - step), default=None)
    return near["epoch"] * step / near["step"] if near and near["step"] else 0.0


def _last(lines: list[dict], key: str):
    return max((line[key] for line in lines if line.get(key) is not None), default=None)


def _number(value) -> float:
    return math.nan if value is None else value


def _rate(value: float) -> str:
    small = f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return "0" if value == 0 else small if value < 1e-3 else f"{value:g}"


def _shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(v) for v in value)
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else shown(str(value))
