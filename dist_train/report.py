"""A run as one page: settings, curves, confusion, the worst mistakes as pictures; a single file without requests."""

import argparse
import base64
import io
import json
import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
import xxhash

from dist_train import plots
from dist_train.config import RunConfig
from dist_train.errors import UserError
from dist_train.folds import fold_view
from dist_train.index import load_index
from dist_train.settings import flatten, from_dict, to_dict
from dist_train.track import read_metrics

MAX_MATRIX_CLASSES = 40  # a larger matrix shows the most confused of them
SHOWN_CLASSES = 30
MAX_PICTURES = 24
EMBED_BYTES = 40_000  # larger pictures are embedded as small copies
THUMBNAIL = 256  # pixels, longer side of such a copy


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
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run = Path(run)
    facts = read_run(run)
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = jinja.get_template("report.html.j2").render(**facts)
    path, partial = run / "report.html", run / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
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
    splits = [_evaluation(run, config, inference, path) for path in _evaluations(run)]
    return {
        "name": run.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "state": _state(lines, result),
        "cards": _cards(lines, result),
        "charts": _charts(lines),
        "restarted": any(line["kind"] == "restart" for line in lines),
        "evaluations": [line for line in lines if line["kind"] == "eval"],
        "splits": splits,
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
            cards.append((f"{split} accuracy", f"{figures['top1']:.2%}"))
    evals = [line for line in lines if line["kind"] == "eval" and line.get("top1") is not None]
    if not cards and evals:
        cards.append((f"{evals[-1]['split']} accuracy so far", f"{evals[-1]['top1']:.2%}"))
    trained = [line for line in lines if line["kind"] == "train"]
    if lines and (seconds := _last(lines, "time_s")):
        cards.append(("running time", duration(seconds)))
    if rates := [line["images_per_s"] for line in trained if line.get("images_per_s")]:
        cards.append(("samples a second", f"{statistics.median(rates):,.0f}"))
    if epoch := _last(trained, "epoch"):
        cards.append(("epochs", f"{epoch:.3g}"))
    return cards


def _charts(lines: list[dict]) -> list[dict]:
    """Title, SVG and legend of every curve there is data for."""
    trained = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval" and " " not in line["split"]]  # "final test" is no curve
    x_name = "epoch" if all("epoch" in line for line in trained + evals) else "step"
    restarts = [line["step"] for line in lines if line["kind"] == "restart"]
    if x_name == "epoch":
        restarts = [_epoch_of(step, trained) for step in restarts]

    def curve(rows, key, name, colour=0, **style):
        return plots.Curve(name, [r[x_name] for r in rows], [_number(r.get(key)) for r in rows], colour, **style)

    raw = curve(trained, "loss", "train", band=True)
    smoothed = plots.Curve("train", raw.x, plots.smooth(raw.y, max(1, len(raw.y) // 25)))
    loss, accuracy = ([raw, smoothed] if len(raw.x) > 1 else [smoothed]), []
    series = dict.fromkeys(line["split"] for line in evals)
    for colour, split in zip((1, 2), series, strict=False):
        rows = [line for line in evals if line["split"] == split]
        loss.append(curve(rows, "loss", split, colour, dots=True))
        accuracy.append(curve(rows, "top1", split, colour, dots=True))
    waits = [line for line in trained if line.get("data_wait") is not None]
    charts = [
        ("Loss", loss, lambda y: f"{y:g}", True),
        ("Accuracy", accuracy, lambda y: f"{y * 100:g}%", False),
        ("Learning rate", [curve(trained, "lr", "learning rate")], _rate, True),
        ("Samples a second", [curve(trained, "images_per_s", "samples a second")], lambda y: f"{y:,.0f}", True),
    ]
    if any(line["data_wait"] > 0.02 for line in waits):
        charts.append(
            ("Share of time waiting for data", [curve(waits, "data_wait", "wait", 1)], lambda y: f"{y:.0%}", True)
        )
    drawn = []
    for title, curves, y_text, zero in charts:
        if svg := plots.line_chart(curves, x_name, y_text, zero, restarts):
            names = [(c.name, c.colour) for c in curves if not c.band and c.x]
            drawn.append({"title": title, "svg": svg, "legend": names if len(names) > 1 or title == "Accuracy" else []})
    return drawn


def _evaluations(run: Path) -> list[Path]:
    """Evaluation files, the test split's first."""
    return sorted(run.glob("evaluation-*.json"), key=lambda path: (path.stem != "evaluation-test", path.stem))


def _evaluation(run: Path, config: dict, inference: dict, path: Path) -> dict:
    raw = _read(path)
    try:
        counts = np.asarray(raw["confusion"], np.int64)
        names = [str(name) for name in inference.get("classes") or range(len(counts))]
        shown = most_confused(counts) if len(names) > MAX_MATRIX_CLASSES else np.arange(len(names))
        mistakes, note = _mistakes(run, config, names, raw)
        return {
            "name": raw["split"], "samples": raw["samples"], "loss": raw.get("loss"), "top1": raw.get("top1"),
            "top5": raw.get("top5") if len(names) > 5 else None, "num_classes": len(names), "num_shown": len(shown),
            "matrix": plots.heat_map(counts[np.ix_(shown, shown)], [names[i] for i in shown]),
            "pairs": confused_pairs(counts, names), "classes": class_table(counts, names),
            "mistakes": mistakes, "note": note,
        }  # fmt: skip
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: not an evaluation as this version writes it: {type(error).__name__} {error}.\n"
            f"  Write it again with: dist-train eval {run} --split {path.stem.removeprefix('evaluation-')}"
        ) from None


def class_table(counts: np.ndarray, names: list[str]) -> list[dict]:
    """Precision, recall, F1 and number of samples of each class; None where undefined (0/0).

    counts: (K, K) int, rows the true class. Definitions as in scikit-learn's precision_recall_fscore_support.
    """
    right, of_class, taken = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    rows = []
    for i, name in enumerate(names):
        precision = float(right[i] / taken[i]) if taken[i] else None
        recall = float(right[i] / of_class[i]) if of_class[i] else None
        f1 = float(2 * right[i] / (taken[i] + of_class[i])) if taken[i] + of_class[i] else None
        rows.append({"name": name, "count": int(of_class[i]), "precision": precision, "recall": recall, "f1": f1})
    return rows if len(rows) <= MAX_MATRIX_CLASSES else sorted(rows, key=lambda row: (row["f1"] is None, row["f1"]))


def most_confused(counts: np.ndarray, most: int = SHOWN_CLASSES) -> np.ndarray:
    """Numbers of the classes with the most mistakes, given or received, in class order. counts: (K, K) int."""
    wrong = counts - np.diag(np.diag(counts))
    return np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:most])


def confused_pairs(counts: np.ndarray, names: list[str], most: int = 8) -> list[tuple[str, str, int, float]]:
    """(true class, predicted class, samples, share of the true class) of the most frequent mistakes, most first."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = [divmod(int(flat), len(names)) for flat in order]
    return [(names[i], names[j], int(wrong[i, j]), wrong[i, j] / counts[i].sum()) for i, j in places if wrong[i, j]]


def _mistakes(run: Path, config: dict, names: list[str], raw: dict) -> tuple[list[dict], str]:
    """The worst mistakes with their pictures as data URIs, and a remark where pictures are missing."""
    worst = raw.get("mistakes", [])[:MAX_PICTURES]
    rows = [
        {
            "sample": m["sample"], "label": names[m["label"]], "predicted": names[m["predicted"]],
            "probability": m.get("probability"), "loss": m.get("loss"), "picture": None, "name": "", "small": False,
        }
        for m in worst
    ]  # fmt: skip
    folder = str((config.get("data") or {}).get("shards") or "")
    found = next(
        (at for at in (Path(folder), run.resolve().parent.parent / folder) if (at / "index.json").exists()), None
    )
    if not rows:
        return rows, ""
    if not folder or found is None:
        return (
            rows,
            f"The shards ({folder or 'not named in the settings'}) are not here, so there are no pictures to show.",
        )
    index = load_index(found)
    if index.features is not None:
        return rows, ""
    try:
        # samples are numbered as they lie in the shards, also where a fold was evaluated
        split = fold_view(index, from_dict(RunConfig, config)).split(raw["split"]).stored
        table, sources = split.table(), split.names()
    except UserError as error:
        return rows, f"No pictures: {error}"
    changed = 0
    for row in rows:
        if not 0 <= row["sample"] < len(table):
            changed += 1
            continue
        row["name"] = sources[row["sample"]] if sources else ""
        payload = _payload(split, table[row["sample"]], row["sample"])
        if payload is None:
            changed += 1
        else:
            row["picture"], row["small"] = picture_uri(payload)
    return rows, f"{changed} pictures are left out: the shards have changed since." if changed else ""


def _payload(split, entry, sample: int) -> bytes | None:
    """A sample's bytes from its tar file; None if they are not those of the index."""
    file = Path(split.folder, split.files[int(split.shard_of(np.array([sample]))[0])])
    try:
        with open(file, "rb") as tar:
            tar.seek(int(entry["offset"]))
            data = tar.read(int(entry["size"]))
    except OSError:
        return None
    return data if xxhash.xxh3_64_intdigest(data) == int(entry["checksum"]) else None


def picture_uri(data: bytes) -> tuple[str | None, bool]:
    """(data URI of a picture, whether it is small enough to be shown with hard pixels); (None, False) if it is none.

    JPEG, PNG and WebP pass through; other kinds and large files become small JPEG copies.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            small, kind = max(image.size) <= 64, image.format
            if kind not in ("JPEG", "PNG", "WEBP") or len(data) > EMBED_BYTES:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                copy = io.BytesIO()
                image.convert("RGB").save(copy, "JPEG", quality=85)
                data, kind = copy.getvalue(), "JPEG"
    except Exception:  # whatever PIL cannot open is not shown
        return None, False
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}", small


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
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:g}"


def _shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(v) for v in value)
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
