"""What a set looks like: its figures on the terminal, and one picture or page of its samples."""

from pathlib import Path

import numpy as np

from dist_train.index import ShardIndex, SplitIndex
from dist_train.page import Section, write_page
from dist_train.picture_plots import draw_gallery, figure_image, histogram_chart, sample_gallery, save_png
from dist_train.plots import without_formulas
from dist_train.sources import first_of
from dist_train.table_plots import read_rows, table_section
from dist_train.tables import CONSTANT_STD

_NUM_FIGURES = 20  # columns of a table whose names and statistics are printed
_CLASSES, _PER_CLASS = 24, 10  # rows and columns: a picture that still fits a screen


def print_facts(index: ShardIndex) -> None:
    """Print the class x split table, the sizes of pictures and payloads, and the training split's statistics."""
    from dist_train.shard import print_summary

    print_summary(index, most_classes=100)
    rows = np.concatenate([split.table() for split in index.splits.values()])
    sizes = rows["size"]
    print(f"bytes a sample: {sizes.min():,} to {sizes.max():,}, median {int(np.median(sizes)):,}")
    if index.features is None:
        for side in ("height", "width"):
            print(f"{side}: {rows[side].min()} to {rows[side].max()} pixels, median {int(np.median(rows[side]))}")
    else:
        print(f"{len(index.features)} features: {first_of(index.features, _NUM_FIGURES)}")
    for name in ("mean", "std"):
        figures = ["constant" if value == CONSTANT_STD else f"{value:.4g}" for value in getattr(index, name)]
        print(f"{name} of the training split: {first_of(figures, _NUM_FIGURES)}")


def draw_samples(index: ShardIndex, path: Path) -> Path:
    """Write pictures of the first split: samples of each class, or of a table its features by class.

    path: FILE.html, a page with histograms (or correlations and pairs of features) too; anything else becomes a PNG.
    Raises UserError if it cannot be written, or a sample cannot be read.
    """
    split = next(iter(index.splits.values()))
    if path.suffix == ".html":
        _write_page(index, split, path)
        return path
    gallery = None if index.features else sample_gallery(index, split, _CLASSES, _PER_CLASS)
    save_png(draw_gallery(gallery) if gallery else _feature_spread(index, split), path)
    return path


def _write_page(index: ShardIndex, split: SplitIndex, path: Path) -> None:
    if index.features:
        sections = [table_section(index, split)]
    else:
        samples = sample_gallery(index, split, _CLASSES, _PER_CLASS)
        sections = [Section("The pictures", charts=[histogram_chart(split)], galleries=[samples])]
    cards = [(f"{name} split", f"{split.num_samples:,}") for name, split in index.splits.items()]
    write_page(path, index.name, f"{index.num_classes:,} classes", cards, sections)


def _feature_spread(index: ShardIndex, split: SplitIndex):
    """Each feature's values by class, as box plots; the first 24 features."""
    from matplotlib.figure import Figure

    values, labels = read_rows(split, len(index.features))
    by_class = [values[labels == label] for label in range(min(index.num_classes, _CLASSES))]
    features = index.features[:24]
    lines = -(-len(features) // 4)
    figure = Figure(figsize=(14, 2.4 * lines), layout="constrained")
    for k, (axes, feature) in enumerate(zip(figure.subplots(lines, 4, squeeze=False).flat, features, strict=False)):
        axes.boxplot([values[~np.isnan(values[:, k]), k] for values in by_class], sym=".")
        axes.set_xticks(range(1, len(by_class) + 1), [without_formulas(name[:12]) for name in index.classes[: len(by_class)]])
        axes.set_title(without_formulas(feature), fontsize=9)
    return figure_image(figure, dpi=80)
