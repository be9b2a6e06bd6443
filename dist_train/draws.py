"""Random numbers on the device that are pure functions of a sample's key: uniform, sign, box, Beta.

The generator is splitmix64 in int64 arithmetic, whose overflow wraps; `order.uniform` is the same in numpy. Nothing is
read back to the host and no shape depends on a value, so all of it can be compiled and captured in a CUDA graph.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from dist_train import boxes

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's constants as signed numbers
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64
_KNOTS = 1024  # of the Beta table; draws differ from the quantile by less than 1e-5


def uniform(keys: Tensor, draw: int) -> Tensor:
    """Draw number `draw` of each key: (N,) float32 in [0, 1), 24 random bits, equal to `order.uniform` bit for bit.

    keys: (N,) int64 from `sample_keys`.
    """
    return uniforms(keys, draw, 1)[:, 0]


def uniforms(keys: Tensor, first_draw: int, num_draws: int) -> Tensor:
    """Draws first_draw, first_draw + 1, ... of each key at once: (N, num_draws) float32 in [0, 1)."""
    # the shift is for torch.compile: to it a bare range is an index, whose product with a large number must not overflow
    numbers = torch.arange(2 * (first_draw + 1), 2 * (first_draw + 1 + num_draws), 2, device=keys.device) >> 1
    return _shifted(mix64(keys[:, None] + numbers * _GOLDEN), 40).to(torch.float32) * 2.0**-24


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, equal to `order.mix` bit for bit."""
    x = (x ^ _shifted(x, 30)) * _MULTIPLY_1
    x = (x ^ _shifted(x, 27)) * _MULTIPLY_2
    return x ^ _shifted(x, 31)


def between(keys: Tensor, draw: int, low: float, high: float) -> Tensor:
    """Draw evenly between two numbers: (N,) float32."""
    return uniform(keys, draw) * (high - low) + low


def chance(keys: Tensor, draw: int, p: float) -> Tensor:
    """True with probability p: (N,) bool."""
    return uniform(keys, draw) < p


def random_boxes(
    keys: Tensor, first_draw: int, height: int, width: int, tables: Tensor, below: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a box for each key as `boxes.random_resized_boxes` does: (N, 4) float32 top, left, height, width, pixels.

    It takes boxes.CROP_DRAWS draws. height, width: of all pictures, pixels. tables: (3, TABLE) float32, the three of
    `boxes.side_tables`. below: greatest height and width; the picture's own if None. Also returns (N,) bool, whether
    one of the tries fitted; where none did, the box is of no use (see `boxes.fallback_box`).
    """
    draws = uniforms(keys, first_draw, boxes.CROP_DRAWS)
    picks = (draws[:, : 2 * boxes.TRIES] * boxes.TABLE).long()
    side = tables[0][picks[:, 0::2]] * math.sqrt(height * width)
    widths, heights = ((side * tables[row][picks[:, 1::2]]).round() for row in (1, 2))
    most_height, most_width = below or (height, width)
    fits = (heights > 0) & (heights <= most_height) & (widths > 0) & (widths <= most_width)
    first = fits.int().argmax(1, keepdim=True)
    box_height, box_width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    top = (draws[:, -2] * (height - box_height + 1)).floor()
    left = (draws[:, -1] * (width - box_width + 1)).floor()
    return torch.stack([top, left, box_height, box_width], 1), fits.any(1)


def betas(keys: Tensor, draw: int, alphas: tuple[float, ...]) -> list[Tensor]:
    """Draw from Beta(alpha, alpha) for each alpha by inverting its distribution function: (N,) float32 in 0..1 each.

    All of them from one draw, by one call: to torch 2.11's compiler a second call of `beta_tables` is one constant too many.
    """
    u = uniform(keys, draw)
    drawn = []
    for alpha, table in zip(alphas, beta_tables(alphas, keys.device).unbind(0), strict=True):
        place = (2 * torch.minimum(u, 1 - u)) ** (1 / alpha) * _KNOTS
        knot = place.long().clamp(max=_KNOTS - 1)
        lower = torch.lerp(table[knot], table[knot + 1], place - knot)
        drawn.append(torch.where(u < 0.5, lower, 1 - lower))
    return drawn


def beta_tables(alphas: tuple[float, ...], device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at probabilities t^alpha / 2, t = 0 to 1 in even steps: (A, _KNOTS + 1) float32.

    In t the quantile is smooth for every alpha, also where the density is infinite at 0. From 0 to x the density
    integrates to x^alpha times a power series that converges fast up to x = 1/2 (Abramowitz and Stegun 26.5.4), where
    by symmetry half of the whole is reached; so no gamma function is needed.
    """
    return _beta_tables(alphas, device)


beta_tables._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, whose import takes seconds


@functools.lru_cache(maxsize=16)
def _beta_tables(alphas: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([_beta_table(alpha) for alpha in alphas])).to(device)


def _beta_table(alpha: float) -> np.ndarray:
    x = np.linspace(0, 0.5, 8 * _KNOTS + 1)
    series, coefficient = np.zeros_like(x), 1.0
    for k in range(64):  # the rest is below 2^-60
        series += coefficient * x**k / (alpha + k)
        coefficient *= (k + 1 - alpha) / (k + 1)
    t = 2 * x * (series / series[-1]) ** (1 / alpha)
    return np.interp(np.linspace(0, 1, _KNOTS + 1), t, x).astype(np.float32)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift would repeat the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
