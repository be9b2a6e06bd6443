"""Curves and confusion matrices as SVG, coloured by the page's own variables, so that light and dark both suit them.

The page defines --ink, --faint, --line, --paper and each of COLOURS. Sizes are in CSS pixels at full width.
"""

import math
import unicodedata
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 250  # narrow enough that letters stay readable on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 34
COLOURS = ("one", "two", "three", "four", "five", "six", "red", "green", "blue")  # a curve's colour is a place in it
MAX_POINTS = 300  # more than this cannot be told apart at this width


@dataclass(frozen=True)
class Curve:
    """One curve: x and y of equal length. band: drawn pale, the spread around a smoothed curve of its colour."""

    name: str
    x: list[float]
    y: list[float]
    colour: int = 0
    band: bool = False
    dots: bool = False


def line_chart(curves: list[Curve], x_name: str, y_text, zero: bool = False, marks: list[float] = ()) -> str:
    """Draw curves over a common x. y_text: value -> tick label. zero: y begins at 0. marks: x of dashed upright lines.

    Points that are not finite are left out. Returns an <svg> element, or "" where there is nothing to draw.
    """
    curves = [c for c in map(_finite, curves) if c.x]
    if not curves:
        return ""
    x_low, x_high = min(min(c.x) for c in curves), max(max(c.x) for c in curves)
    x_low = min(x_low, 0.0)
    y_low, y_high = _y_range(curves, zero)
    x_ticks, y_ticks = nice_ticks(x_low, x_high, 6), nice_ticks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x_at(x):
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * plot_width

    def y_at(y):
        inside = min(max(y, y_low), y_high)  # a spike in a band is cut at the frame
        return _TOP + (y_high - inside) / ((y_high - y_low) or 1) * plot_height

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_spoken(curves))}">']
    for tick in y_ticks:
        parts.append(segment(_LEFT, y_at(tick), WIDTH - _RIGHT, y_at(tick), "var(--line)"))
        parts.append(text_at(_LEFT - 7, y_at(tick) + 4, y_text(tick), "end"))
    for tick in x_ticks:
        parts.append(text_at(x_at(tick), HEIGHT - _BOTTOM + 17, f"{tick:g}", "middle"))
    parts.append(text_at(WIDTH - _RIGHT, HEIGHT - 3, x_name, "end"))
    for mark in marks:
        parts.append(segment(x_at(mark), _TOP, x_at(mark), HEIGHT - _BOTTOM, "var(--faint)", "3 3"))
    for curve in curves:
        x, y = thin(curve.x, curve.y)
        colour = f"var(--{COLOURS[curve.colour]})"
        points = " ".join(f"{x_at(a):.1f},{y_at(b):.1f}" for a, b in zip(x, y, strict=True))
        style = 'stroke-width="1" opacity="0.35"' if curve.band else 'stroke-width="2"'
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style} stroke-linejoin="round"/>')
        if curve.dots and len(x) <= 40 or len(x) == 1:
            for a, b in zip(x, y, strict=True):
                note = f"{escape(curve.name)}: {escape(y_text(b))} at {x_name} {a:g}"
                parts.append(f'<circle cx="{x_at(a):.1f}" cy="{y_at(b):.1f}" r="3" fill="{colour}">')
                parts.append(f"<title>{note}</title></circle>")
    return "".join([*parts, "</svg>"])


def text_width(text: str) -> float:
    """Pixels that a line of text takes in the pages' font, about."""
    return sum(12.0 if unicodedata.east_asian_width(letter) in "WF" else 6.6 for letter in text)


def fitted(width: float) -> str:
    """The style of a drawing of that width: it shrinks with the page while its letters stay above 10 px, then it is scrolled."""
    return f"width:{width:.0f}px;max-width:max(100%,{0.85 * width:.0f}px)"


def cut(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis: at most `most` letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def without_formulas(text: str) -> str:
    """Text for matplotlib, which takes what stands between two dollars for mathematics."""
    return text.replace("$", r"\$")


def heat_map(counts: np.ndarray, names: list[str]) -> str:
    """Draw a confusion matrix. counts: (K, K) int, rows the true class; names: K. Colour is the share of the row.

    The diagonal is drawn in the first colour, mistakes in the second. Returns an <svg> element.
    """
    k = len(names)
    cell = 76 if k <= 4 else 46 if k <= 6 else 34 if k <= 12 else 22 if k <= 24 else 16
    labels = [cut(name, 16) for name in names]
    margin = 14 + max(map(text_width, labels))
    left, top, size = margin + 18, margin + 18, cell * k
    width, height = left + size + 4, top + size + 4
    slant = max(map(text_width, labels)) > cell - 2
    if not slant:
        top, height = 40, 40 + size + 4
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    view = f'viewBox="0 0 {width:.0f} {height:.0f}" style="{fitted(width)}"'
    parts = [f'<svg class="matrix" {view} role="img" aria-label="confusion">']
    parts.append(text_at(left + size / 2, 13, "predicted", "middle"))
    parts.append(f'<g transform="rotate(-90 12 {top + size / 2:.0f})">{text_at(12, top + size / 2, "true", "middle")}</g>')
    for i, label in enumerate(labels):
        middle = i * cell + cell / 2
        parts.append(text_at(left - 7, top + middle + 4, label, "end"))
        x, y = left + middle + (4 if slant else 0), top - 7
        turn = f' transform="rotate(-90 {x:.0f} {y:.0f})"' if slant else ""
        parts.append(f"<g{turn}>{text_at(x, y, label, 'start' if slant else 'middle')}</g>")
    for i in range(k):
        for j in range(k):
            x, y, part = left + j * cell, top + i * cell, float(share[i, j])
            colour = "var(--one)" if i == j else "var(--two)"
            note = f"{escape(names[i])} taken for {escape(names[j])}: {counts[i, j]} ({part:.1%})"
            box = f'x="{x:.1f}" y="{y:.1f}" width="{cell - 1}" height="{cell - 1}" rx="2"'
            parts.append(f'<rect {box} fill="var(--line)"/>')
            if counts[i, j]:
                look = f'fill="{colour}" opacity="{0.12 + 0.88 * part**0.6:.3f}"'
                parts.append(f"<rect {box} {look}><title>{note}</title></rect>")
                if k <= 12:
                    ink = "var(--paper)" if part > 0.35 else "var(--ink)"
                    parts.append(text_at(x + cell / 2 - 0.5, y + cell / 2 + 4, _short(counts[i, j]), "middle", ink))
    return "".join([*parts, "</svg>"])


def smooth(y: list[float], span: int) -> list[float]:
    """Mean over a centred window of `span` points, shorter at both ends; values that are not finite are left out."""
    y = np.asarray(y, float)
    good = np.isfinite(y)
    total = np.concatenate([[0], np.cumsum(np.where(good, y, 0))])
    count = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(y))
    low, high = np.maximum(at - span // 2, 0), np.minimum(at + span // 2 + 1, len(y))
    with np.errstate(invalid="ignore"):
        return ((total[high] - total[low]) / np.where(count[high] > count[low], count[high] - count[low], np.nan)).tolist()


def thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS of a curve, among them both ends and the lowest and highest of each stretch."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(1, len(x) - 1), MAX_POINTS // 2 - 1):
        values = [y[i] for i in stretch]
        kept |= {int(stretch[np.argmin(values)]), int(stretch[np.argmax(values)])}
    kept = sorted(kept)
    return [x[i] for i in kept], [y[i] for i in kept]


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside low..high and one step around it, about `most`."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _y_range(curves: list[Curve], zero: bool) -> tuple[float, float]:
    lines = [y for c in curves if not c.band for y in c.y] or [y for c in curves for y in c.y]
    low, high = min(lines), max(lines)
    for curve in curves:
        if curve.band:  # a band may show its bulk, not its rare spikes
            high = max(high, float(np.quantile(curve.y, 0.98)))
            low = min(low, float(np.quantile(curve.y, 0.02)))
    low = 0.0 if zero else low
    return low, high + 0.04 * ((high - low) or abs(high) or 1)


def _finite(curve: Curve) -> Curve:
    kept = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x is not None and y is not None and math.isfinite(y)]
    return Curve(curve.name, [x for x, _ in kept], [y for _, y in kept], curve.colour, curve.band, curve.dots)


def _spoken(curves: list[Curve]) -> str:
    return "; ".join(f"{c.name} from {c.y[0]:.4g} to {c.y[-1]:.4g}" for c in curves if not c.band)


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def segment(x1, y1, x2, y2, colour: str, dashes: str = "none") -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-dasharray="{dashes}"/>'


def text_at(x: float, y: float, text: str, anchor: str, colour: str = "var(--faint)") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(str(text))}</text>'
