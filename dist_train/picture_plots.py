"""What a set of pictures looks like: samples of each class, how often each brightness occurs; and what a network's first
layer looks for."""

import base64
import contextlib
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_train.decode import DecodeError, decode_into, picture_size
from dist_train.durable import put_in_place
from dist_train.errors import UserError
from dist_train.index import ShardIndex, SplitIndex
from dist_train.page import Cell, Chart, Gallery
from dist_train.plots import HEIGHT, WIDTH, segment, text_at
from dist_train.store import Store, sample_name

THUMBNAIL = 128  # pixels, longer side of a picture in a gallery
HARD_PIXELS = 64  # smaller pictures are shown with every pixel a square
MAX_MEASURED = 256  # pictures of a histogram
MAX_MEASURED_SIDE = 256  # pixels
MAX_FILTERS = 128
_BINS = 64  # of a histogram


def sample_gallery(index: ShardIndex, split: SplitIndex, num_classes: int = 12, per_class: int = 8) -> Gallery:
    """Some pictures of each of the first classes, spread evenly over the split. Raises UserError if one is damaged."""
    rows = []
    for label, samples in enumerate(some_of_each_class(split, min(num_classes, index.num_classes), per_class)):
        cells = [cell(pixels) for pixels in thumbnails(split, samples)]
        rows.append((index.classes[label], f"{split.class_counts[label]:,}", cells))
    more = f"The first {num_classes} of {index.num_classes:,} classes. " if index.num_classes > num_classes else ""
    sizes = f"{index.image_size[1]} × {index.image_size[0]} pixels" if index.image_size else "of various sizes"
    note = f"{more}{split.num_samples:,} pictures in the {split.name} split, {sizes}; by each name, how many of it."
    return Gallery("Samples as stored", rows, note=note)


def some_of_each_class(split: SplitIndex, num_classes: int, per_class: int) -> list[np.ndarray]:
    """Numbers of samples of each of the first classes, evenly over the split; fewer where the class has fewer.

    Of a set behind a URL, from its first two shards: samples from everywhere would fetch all of it.
    """
    reach = int(split.first[2]) if split.stored.remote and split.num_shards > 2 else split.num_samples
    labels = np.ascontiguousarray(split.table()["label"][:reach])
    by_class = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[by_class], np.arange(num_classes + 1))
    chosen = []
    for first, last in itertools.pairwise(ends.tolist()):
        members = by_class[first:last]
        chosen.append(members[np.linspace(0, len(members) - 1, min(per_class, len(members))).astype(int)])
    return chosen


def thumbnails(split: SplitIndex, samples: np.ndarray, side: int = THUMBNAIL) -> Iterator[np.ndarray]:
    """Samples (n,) of a split as pictures, each uint8 (h, w, 3), the longer side at most `side` pixels. Raises UserError."""
    payloads = Store(split.stored).payloads(split.stored_numbers(samples))
    for sample, payload in zip(samples.tolist(), payloads, strict=True):
        try:
            yield thumbnail(payload, side)
        except DecodeError as error:
            raise UserError(f"{split.folder}: sample {sample_name(split.name, sample)} cannot be shown: {error}.\n"
                            f"  See what is wrong with: dist-train verify {split.folder}") from None  # fmt: skip


def thumbnail(payload: bytes, side: int = THUMBNAIL) -> np.ndarray:
    """A picture file's pixels, brought down to `side` but never enlarged. Raises DecodeError."""
    height, width = picture_size(payload)
    scale = min(1.0, side / max(height, width))
    pixels = np.empty((max(1, round(height * scale)), max(1, round(width * scale)), 3), np.uint8)
    decode_into(payload, pixels)
    return pixels


def cell(pixels: np.ndarray, note: str = "") -> Cell:
    """A picture for a page. pixels: uint8 (h, w, 3) or (h, w). Small ones are kept exactly, as PNG; others become JPEG."""
    from PIL import Image

    is_small, file = max(pixels.shape[:2]) <= HARD_PIXELS, io.BytesIO()
    grey = pixels.ndim == 3 and (pixels == pixels[..., :1]).all()
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))
    image.save(file, "PNG") if is_small else image.save(file, "JPEG", quality=85)
    kind = "png" if is_small else "jpeg"
    return Cell(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", is_small, note)


def cell_image(shown: Cell):
    """The picture of a cell, for a sheet: PIL's Image in RGB."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2]))).convert("RGB")


def draw_gallery(gallery: Gallery, tile: int = 96):
    """A gallery as one picture on white, for places that take no page: PIL's Image. tile: pixels of a picture's side."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    has_names = any(name for name, _, _ in gallery.rows)
    has_notes = any(shown.note for _, _, cells in gallery.rows for shown in cells)
    left, top, line = 180 if has_names else 4, 22 if gallery.columns else 0, tile + (32 if has_notes else 4)
    sheet = Image.new("RGB", (left + gallery.num_columns * (tile + 4), top + len(gallery.rows) * line), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(gallery.columns):
        pen.text((left + column * (tile + 4), 3), name, fill="dimgray", font=small)
    for number, (name, note, cells) in enumerate(gallery.rows):
        y = top + number * line
        if has_names:
            pen.text((6, y + tile // 2 - 18), f"{name[:24]}\n{note[:24]}", fill="black", font=font)
        for column, shown in enumerate(cells):
            x, image = left + column * (tile + 4), cell_image(shown)
            zoom = tile / max(image.size)
            sides = [max(1, round(side * zoom)) for side in image.size]
            image = image.resize(sides, Image.Resampling.NEAREST if shown.is_small else Image.Resampling.LANCZOS)
            sheet.paste(image, (x + (tile - image.width) // 2, y + (tile - image.height) // 2))
            if shown.note:
                lines = [part[: tile // 6] for part in shown.note.split(" + ")]
                pen.text((x, y + tile + 2), "\n".join(lines[:2]), fill="dimgray", font=small, spacing=1)
    return sheet


def figure_image(figure, dpi: int):
    """A drawing of matplotlib's as a picture: PIL's Image."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, dpi=dpi)
    return Image.open(file)


def save_png(image, path: Path) -> None:
    """Write PIL's Image as PNG, whole or not at all. Raises UserError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, "PNG")
        put_in_place(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written: {error.strerror or error}.\n  Pick another place with --out.") from None


def pixel_counts(pictures: Iterator[np.ndarray]) -> np.ndarray:
    """How often each value occurs in each channel: uint8 pictures (h, w, 3) -> (3, 256) int64."""
    counts = np.zeros((3, 256), np.int64)
    for pixels in pictures:
        for channel in range(3):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    return counts


def histogram_chart(split: SplitIndex) -> Chart:
    """How often each pixel value occurs, by channel; black and white are named. Raises UserError if a picture is damaged."""
    per_class = -(-MAX_MEASURED // len(split.class_counts))
    chosen = np.sort(np.concatenate(some_of_each_class(split, len(split.class_counts), per_class)))
    if len(chosen) > MAX_MEASURED:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MAX_MEASURED).astype(int)]
    counts = pixel_counts(thumbnails(split, chosen, MAX_MEASURED_SIDE))
    total = counts[0].sum()
    is_grey = (counts == counts[0]).all()
    black, white = counts[:, 0].sum() / total / 3, counts[:, 255].sum() / total / 3
    mean = (counts.sum(axis=0) * np.arange(256)).sum() / total / 3 / 255
    title = f"Pixel values: {'grey, ' if is_grey else ''}mean {mean:.2f}, {black:.0%} black, {white:.0%} white"
    legend = [] if is_grey else [("red", "red"), ("green", "green"), ("blue", "blue")]
    note = f"Of {len(chosen):,} pictures. Bars that leave the frame are cut."
    return Chart(title, draw_histogram(counts[:1] if is_grey else counts), legend, note)


def draw_histogram(counts: np.ndarray) -> str:
    """Draw counts (1 or 3, 256) as shares of the pixels, channels over one another. Returns an <svg> element."""
    shares = counts.reshape(len(counts), _BINS, -1).sum(axis=2) / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    inner = shares[:, 1:-1][shares[:, 1:-1] > 0]  # both ends often hold half of all pixels
    top = 1.1 * float(min(shares.max(), 1.5 * inner.max())) if len(inner) else 1.1 * float(shares.max())
    left, right, roof, floor = 14, WIDTH - 14, 8, HEIGHT - 30
    step = (right - left) / _BINS
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    parts = [f'<svg class="chart" {view} role="img" aria-label="share of pixels by value">']
    colours = ("red", "green", "blue") if len(shares) == 3 else ("faint",)
    for channel, colour in zip(shares, colours, strict=True):
        path = "".join(f"V{floor - min(share / top, 1) * (floor - roof):.1f}h{step:.2f}" for share in channel)
        look = f'fill="var(--{colour})" fill-opacity="0.22" stroke="var(--{colour})" stroke-width="1.2"'
        parts.append(f'<path d="M{left} {floor}{path}V{floor}Z" {look}/>')
    parts.append(segment(left, floor, right, floor, "var(--line)"))
    for value, anchor in ((0, "start"), (64, "middle"), (128, "middle"), (192, "middle"), (255, "end")):
        parts.append(text_at(left + value / 255 * (right - left), floor + 17, str(value), anchor))
    return "".join([*parts, "</svg>"])


def first_filters(weights: Path) -> np.ndarray | None:
    """The kernels of a network's first layer on pictures: (N, h, w, C) float32, C 3 or 1; None where it has none.

    weights: a safetensors file. The first layer is the first, in the order of the names, with kernels over 3 channels,
    else over 1. Raises UserError if the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:
            for channels in (3, 1):
                for name in sorted(file.keys(), key=_by_number):
                    shape = file.get_slice(name).get_shape()
                    if len(shape) == 4 and shape[1] == channels and min(shape[2:]) > 1:
                        return file.get_tensor(name).transpose(0, 2, 3, 1).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: the weights cannot be read: {error}.") from None
    return None


def filter_gallery(kernels: np.ndarray) -> Gallery:
    """Kernels (N, h, w, C) as tiles, strongest first, each scaled to its own largest weight; grey is zero."""
    strength = np.abs(kernels).max(axis=(1, 2, 3))
    order = np.argsort(-np.sqrt((kernels**2).sum(axis=(1, 2, 3))), kind="stable")[:MAX_FILTERS]
    scaled = kernels / np.where(strength > 0, strength, 1)[:, None, None, None]
    pixels = np.rint(127.5 + 127.5 * scaled).clip(0, 255).astype(np.uint8)
    num, height, width, _ = kernels.shape
    which = f"The {len(order)} strongest of them; e" if num > len(order) else "E"
    note = f"{which}ach tile is one kernel, strongest first, scaled to its own largest weight; middle grey is zero."
    tile = 44 if max(height, width) <= 7 else 56
    return Gallery(f"First layer: {num} filters of {height} × {width}", [("", "", [cell(p) for p in pixels[order]])],
                   note=note, tile=tile)  # fmt: skip


def _by_number(name: str) -> list:
    """features.2 before features.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
