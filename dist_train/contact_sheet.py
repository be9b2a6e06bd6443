"""What a set looks like: its figures on the terminal, and one picture with samples of each class."""

import os
from pathlib import Path

import numpy as np

from dist_train.errors import UserError
from dist_train.index import ShardIndex, SplitIndex
from dist_train.store import Store

_CLASSES, _PER_CLASS, _CELL = 24, 10, 96  # rows, columns, pixels: a page that still fits a screen


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
        names = index.features[:8] + ["..."] * (len(index.features) > 8)
        print(f"{len(index.features)} features: {', '.join(names)}")
    for name in ("mean", "std"):
        print(f"{name} of the training split: {', '.join(f'{value:.4g}' for value in getattr(index, name)[:8])}")


def draw_samples(index: ShardIndex, path: Path) -> Path:
    """Write a PNG with samples of the first classes of the first split: pictures, or each feature's spread by class."""
    split = next(iter(index.splits.values()))
    image = _feature_spread(index, split) if index.features else _pictures(index, split)
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, "PNG")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}.\n  Pick another place with --out."
        ) from None
    return path


def _pictures(index: ShardIndex, split: SplitIndex):
    from PIL import Image, ImageDraw, ImageFont

    table, font = split.table(), ImageFont.load_default(13)
    classes = list(enumerate(index.classes))[:_CLASSES]
    sheet = Image.new("RGB", (180 + _PER_CLASS * (_CELL + 4), len(classes) * (_CELL + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (label, name) in enumerate(classes):
        top = line * (_CELL + 4)
        pen.text((6, top + _CELL // 2 - 18), f"{name[:24]}\n{split.class_counts[label]:,}", fill="black", font=font)
        members = np.flatnonzero(table["label"] == label)
        chosen = members[np.linspace(0, len(members) - 1, min(_PER_CLASS, len(members))).astype(int)]
        for column, sample in enumerate(chosen):
            sheet.paste(_thumbnail(split, table[sample], int(sample)), (180 + column * (_CELL + 4), top))
    return sheet


def _thumbnail(split: SplitIndex, row: np.void, sample: int):
    from PIL import Image

    from dist_train.decode import DecodeError, decode_into

    height, width = int(row["height"]), int(row["width"])
    scale = _CELL / max(height, width)
    shape = [max(1, round(side * min(1.0, scale))) for side in (height, width)]
    pixels = np.empty((*shape, 3), np.uint8)
    try:
        decode_into(read_payload(split, row, sample), pixels)
    except DecodeError as error:
        raise UserError(f"{split.folder}: sample {split.name}/{sample:08d} cannot be shown: {error}.\n"
                        f"  See what is wrong with: dist-train verify {split.folder}") from None  # fmt: skip
    thumbnail = Image.fromarray(pixels)
    if scale > 1:  # single pixels stay visible
        thumbnail = thumbnail.resize(
            [max(1, round(side * scale)) for side in (width, height)], Image.Resampling.NEAREST
        )
    cell = Image.new("RGB", (_CELL, _CELL), "white")
    cell.paste(thumbnail, ((_CELL - thumbnail.width) // 2, (_CELL - thumbnail.height) // 2))
    return cell


def _feature_spread(index: ShardIndex, split: SplitIndex):
    """Each feature's values by class, as box plots; the first 24 features of at most 500 samples a class."""
    import io

    from matplotlib.figure import Figure
    from PIL import Image

    table = split.table()
    by_class = []
    for label in range(min(index.num_classes, _CLASSES)):
        members = np.flatnonzero(table["label"] == label)
        members = members[np.linspace(0, len(members) - 1, min(500, len(members))).astype(int)]
        by_class.append(np.array([_vector(split, table[i], int(i)) for i in members]).reshape(len(members), -1))
    features = index.features[:24]
    lines = -(-len(features) // 4)
    figure = Figure(figsize=(14, 2.4 * lines), layout="constrained")
    for k, (axes, feature) in enumerate(zip(figure.subplots(lines, 4, squeeze=False).flat, features, strict=False)):
        axes.boxplot([values[:, k] for values in by_class], sym=".")
        axes.set_xticks(range(1, len(by_class) + 1), [name[:12] for name in index.classes[: len(by_class)]])
        axes.set_title(feature, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return Image.open(buffer)


def _vector(split: SplitIndex, row: np.void, sample: int) -> np.ndarray:
    import io

    return np.load(io.BytesIO(read_payload(split, row, sample)), allow_pickle=False)


def read_payload(split: SplitIndex, row: np.void, sample: int) -> bytes:
    """The bytes of one sample; row: its SAMPLE. Raises UserError where the shard is missing or too short."""
    if split.remote:
        return Store(split).payload(sample)
    path = Path(split.folder, split.files[int(split.shard_of(np.array([sample]))[0])])
    try:
        with open(path, "rb") as file:
            file.seek(int(row["offset"]))
            payload = file.read(int(row["size"]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(payload) < row["size"]:
        raise UserError(f"{path}: too short to hold sample {split.name}/{sample:08d}.\n"
                        f"  See what is wrong with: dist-train verify {split.folder}")  # fmt: skip
    return payload
