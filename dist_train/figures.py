"""The pictures of a finished run as files, for Weights & Biases: what the report shows, where a page cannot go."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from dist_train.config import RunConfig
from dist_train.confusion import MAX_MATRIX_CLASSES, most_confused
from dist_train.errors import UserError
from dist_train.index import ShardIndex
from dist_train.mistakes import worst_mistakes
from dist_train.page import Cell, Gallery
from dist_train.picture_plots import draw_gallery, filter_gallery, first_filters, sample_gallery
from dist_train.plots import without_formulas
from dist_train.settings import from_dict


def draw_figures(run: Path, index: ShardIndex) -> tuple[dict[str, Path], list[str]]:
    """Write the pictures of a finished run below RUN/pictures: {name: PNG file}, and what could not be drawn and why.

    index: as the run opened it. Samples, augmentation, first-layer filters; confusion matrix and worst mistakes of each
    evaluated split. Of a table, the confusion matrices alone.
    """
    folder, complaints = run / "pictures", []
    folder.mkdir(exist_ok=True)
    drawn = {}
    for name, draw in _parts(run, index):
        try:
            picture = draw()
        except (ValueError, OSError) as error:  # a run is not lost for a picture
            complaints.append(f"the picture {name} is missing: {str(error).splitlines()[0]}")
            continue
        if picture is not None:
            path = folder / f"{name.removeprefix('pictures/')}.png"
            picture.save(path, "PNG")
            drawn[name] = path
    return drawn, complaints


def _parts(run: Path, index: ShardIndex) -> Iterator[tuple]:
    """(name, function that draws it) of each picture."""
    config = from_dict(RunConfig, yaml.safe_load((run / "config.yaml").read_text()))
    if index.features is None:
        from dist_train.preview import is_augmented, preview_gallery

        split = index.split(config.data.train_split)
        yield "pictures/samples", lambda: draw_gallery(sample_gallery(index, split))
        if is_augmented(config, index):
            yield "pictures/augmentation", lambda: draw_gallery(preview_gallery(config, index))
        yield "pictures/filters", lambda: draw_filters(run / "weights.safetensors")
    for path in sorted(run.glob("evaluation-*.json")):
        raw = json.loads(path.read_text())
        counts = np.array(raw["confusion"])
        yield f"pictures/confusion-{raw['split']}", lambda counts=counts: draw_confusion(counts, index.classes)
        if index.features is None:
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
    import io

    from matplotlib.figure import Figure
    from PIL import Image

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
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    return Image.open(file)


def _in_rows(title: str, cells: list[Cell], width: int) -> Gallery:
    return Gallery(title, [("", "", cells[i : i + width]) for i in range(0, len(cells), width)])
