"""Which part of a picture is used: the keyed random box of training and the central box of evaluation.

The decoder asks here (numpy, before a pixel is decoded) and `augment` computes the same box on the device. So that both
agree to the last pixel on any hardware, sides come from tables and products alone: no exp, log or fused multiply-add,
whose last bit differs between libraries.
"""

import numpy as np

from dist_train.order import uniform

TRIES = 10
TABLE = 4096  # steps of the drawn area and aspect ratio: finer than a pixel in pictures up to 4,000 pixels wide
CROP_DRAWS = 2 * TRIES + 2  # an area and a ratio for each try, then the place


def random_resized_boxes(
    keys: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Draw the box of the random resized crop (Szegedy et al. 2015) for each picture, by torchvision's rule.

    keys: (N,) int64 from `sample_keys`; heights, widths: (N,) pixels. scale: area as a share of the picture; ratio:
    width / height, drawn evenly in its logarithm. Returns (N, 4) float64: top, left, height, width, whole pixels.
    The first of ten tries that fits is taken; where none fits, the largest central box of the nearest ratio allowed.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    sides, wide, tall = side_tables(scale, ratio)
    draws = np.stack([uniform(keys, draw) for draw in range(CROP_DRAWS)], axis=1)
    areas, ratios = ((draws[:, start : 2 * TRIES : 2] * np.float32(TABLE)).astype(np.int64) for start in (0, 1))
    side = sides[areas] * np.sqrt(heights * widths).astype(np.float32)[:, None]
    box_heights, box_widths = np.rint(side * tall[ratios]), np.rint(side * wide[ratios])
    fits = (box_heights > 0) & (box_heights <= heights[:, None]) & (box_widths > 0) & (box_widths <= widths[:, None])
    first = np.argmax(fits, axis=1)[:, None]
    height, width = (np.take_along_axis(sizes, first, axis=1)[:, 0] for sizes in (box_heights, box_widths))
    boxes = np.stack([
        np.floor(draws[:, -2] * (heights - height + 1).astype(np.float32)),
        np.floor(draws[:, -1] * (widths - width + 1).astype(np.float32)),
        height, width,
    ], axis=1).astype(np.float64)  # fmt: skip
    for i in np.flatnonzero(~fits.any(axis=1)):  # rare: panoramas and the like
        boxes[i] = fallback_box(int(heights[i]), int(widths[i]), ratio)
    return boxes


def central_boxes(heights: np.ndarray, widths: np.ndarray, size: tuple[int, int], fraction: float) -> np.ndarray:
    """Find the central box that, resized to `size`, is torchvision's Resize(round(size / fraction)), CenterCrop(size).

    heights, widths: (N,) pixels of the pictures; size: height and width of the output; fraction: share of the shorter
    side that is kept, 0.875 is usual. Returns (N, 4) float64: top, left, height, width in pixels, not whole ones.
    """
    heights, widths = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    zoom = np.maximum(round(size[0] / fraction) / heights, round(size[1] / fraction) / widths)
    # Resize gives the shorter side the pixels asked for and rounds the longer one down; 1e-6 absorbs float error.
    resized = np.floor(np.stack([heights, widths], axis=1) * zoom[:, None] + 1e-6)
    corner = np.rint((resized - size) / 2)
    per_pixel = np.stack([heights, widths], axis=1) / resized
    return np.concatenate([corner * per_pixel, np.asarray(size) * per_pixel], axis=1)


def side_tables(scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables of sqrt(area share), sqrt(width / height) and its inverse, evenly spaced in area and in log ratio.

    Three (TABLE,) float32 arrays.
    """
    middles = (np.arange(TABLE) + 0.5) / TABLE
    sides = np.sqrt(scale[0] + (scale[1] - scale[0]) * middles)
    wide = np.exp((np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * middles) / 2)
    return sides.astype(np.float32), wide.astype(np.float32), (1 / wide).astype(np.float32)


def fallback_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest central box whose ratio is allowed: top, left, height, width. Plain numbers, for host and device."""
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
