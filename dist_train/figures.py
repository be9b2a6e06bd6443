"""The pictures of a finished run as files, for Weights & Biases: what the report shows, where a page cannot go."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from dist_train.config import RunConfig
from dist_train.confusion import MAX_MATRIX_CLASSES, most_confused
from dist_train.errors import UserError
from dist_train.index import ShardIndex, SplitIndex
from dist_train.mistakes import worst_mistakes
from dist_train.page import Cell, Gallery
from dist_train.picture_plots import draw_gallery, figure_image, filter_gallery, first_filters, sample_gallery, save_png
from dist_train.plots import without_formulas
from dist_train.settings import from_dict
from dist_train.table_plots import read_rows, telling_columns, telling_correlations

_DPI = 110


def draw_figures(run: Path, index: ShardIndex) -> tuple[dict[str, Path], list[str]]:
    """Write the pictures of a finished run below RUN/pictures: {name: PNG file}, and what could not be drawn and why.

    index: as the run opened it. Samples, augmentation, first-layer filters; confusion matrix and worst mistakes of each
    evaluated split. Of a table, correlations; confusion matrix, ROC and precision-recall curves of each evaluated split.
    """
    folder, complaints = run / "pictures", []
    folder.mkdir(exist_ok=True)
    drawn = {}
    for name, draw in _parts(run, index):
        path = folder / f"{name.removeprefix('pictures/')}.png"
        try:
            picture = draw()
            if picture is not None:
                save_png(picture, path)
                drawn[name] = path
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # a run is not lost for a picture
            complaints.append(f"the picture {name} is missing: {(str(error) or type(error).__name__).splitlines()[0]}")
    return drawn, complaints


def _parts(run: Path, index: ShardIndex) -> Iterator[tuple]:
    """(name, function that draws it) of each picture."""
    config = from_dict(RunConfig, yaml.safe_load((run / "config.yaml").read_text()))
    split = index.split(config.data.train_split)
    if index.features:
        yield "pictures/correlations", lambda: draw_correlations(index, split)
    else:
        from dist_train.preview import is_augmented, preview_gallery

        yield "pictures/samples", lambda: draw_gallery(sample_gallery(index, split))
        if is_augmented(config, index):
            yield "pictures/augmentation", lambda: draw_gallery(preview_gallery(config, index))
        yield "pictures/filters", lambda: draw_filters(run / "weights.safetensors")
    for path in sorted(run.glob("evaluation-*.json")):
        raw = json.loads(path.read_text())
        counts = np.array(raw["confusion"])
        yield f"pictures/confusion-{raw['split']}", lambda counts=counts: draw_confusion(counts, index.classes)
        if index.features:
            yield f"pictures/ranking-{raw['split']}", lambda raw=raw: draw_ranking(run, index, raw["split"])
        else:
            yield f"pictures/mistakes-{raw['split']}", lambda raw=raw: draw_mistakes(raw, index)


def draw_filters(weights: Path):
    """The first layer's kernels, sixteen in a row: PIL's Image, or None where there are none."""
    kernels = first_filters(weights)
    if kernels is None:
        return None
    gallery = filter_gallery(kernels)
    return draw_gallery(_in_rows(gallery.title, gallery.rows[0][2], 16), tile=48)


def draw_mistakes(evaluation: dict, index: ShardIndex):
    """The worst mistakes, six in a row, each with its class and what it was taken for; None where there are none."""
    rows, note = worst_mistakes(evaluation, index.classes, index.split(evaluation["split"]))
    cells = [Cell(m["picture"], m["small"], f"{m['label']} + taken for {m['predicted']}") for m in rows if m["picture"]]
    if note and not cells:
        raise UserError(note)
    return draw_gallery(_in_rows("Worst mistakes", cells, 6), tile=144) if cells else None


def draw_confusion(counts: np.ndarray, classes: list[str]):
    """A confusion matrix: PIL's Image. counts: (K, K) int, rows the true class; of many classes, the most confused."""
    from matplotlib.figure import Figure

    shown = most_confused(counts) if len(classes) > MAX_MATRIX_CLASSES else np.arange(len(classes))
    names, counts = [without_formulas(classes[k][:20]) for k in shown], counts[np.ix_(shown, shown)]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.42 * len(shown) + 1.6)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                ink = "white" if share[i, j] > 0.5 else "black"
                axes.text(j, i, f"{count:,}", ha="center", va="center", fontsize=8, color=ink)
    return figure_image(figure, _DPI)


def draw_ranking(run: Path, index: ShardIndex, split: str):
    """ROC and precision-recall curves of a table's split, side by side: PIL's Image, or None where no class can be ranked."""
    from matplotlib.figure import Figure

    from dist_train.scores import rankings, table_scores

    found = rankings(*table_scores(run, index.split(split)), index.classes)
    if not found:
        return None
    figure = Figure(figsize=(6.4 * len(found), 4.8), layout="constrained")
    for axes, ranking in zip(figure.subplots(1, len(found), squeeze=False).flat, found, strict=True):
        names = iter(ranking.legend)
        for curve in ranking.curves:
            look = {"color": "0.7", "linewidth": 1} if curve.band else {"color": f"C{curve.colour}"}
            name = "" if curve.band else next(names, ("",))[0]
            axes.plot(curve.x, curve.y, label=without_formulas(name) or None, **look)
        axes.set_title(without_formulas(ranking.title), fontsize=10)
        axes.set_xlabel(ranking.x_name)
        if ranking.legend:
            axes.legend(fontsize=8)
    return figure_image(figure, _DPI)


def draw_correlations(index: ShardIndex, split: SplitIndex):
    """How a table's features go together, from -1 to 1: PIL's Image, or None where none of them changes."""
    from matplotlib.figure import Figure

    values, labels = read_rows(split, len(index.features))
    best = telling_columns(values, labels)
    if not len(best):
        return None
    together, names = telling_correlations(values, index.features, best)
    names = [without_formulas(name[:24]) for name in names]
    side = max(4.0, 0.3 * len(names) + 2)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(together, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(picture, ax=axes, shrink=0.7)
    if num_holes := int(np.isnan(values).sum()):
        axes.set_title(f"{num_holes:,} of {values.size:,} values are missing, and left out", fontsize=9)
    return figure_image(figure, _DPI)


def _in_rows(title: str, cells: list[Cell], width: int) -> Gallery:
    return Gallery(title, [("", "", cells[i : i + width]) for i in range(0, len(cells), width)])
