"""Bars with their spread as SVG, coloured like the charts of `plots`."""

import math
from dataclasses import dataclass
from html import escape

from dist_train.plots import WIDTH, cut, nice_ticks, segment, text_at

_ROW, _TOP, _BOTTOM = 30, 4, 24


@dataclass(frozen=True)
class Bar:
    """A bar from the left edge to value; the spread is drawn to both sides of its end. text: what stands for the value."""

    name: str
    value: float
    spread: float = 0.0
    text: str = ""
    colour: str = "one"


def bar_chart(bars: list[Bar], text, zero: bool = True) -> str:
    """Draw bars one below the other. text: value -> tick label. zero: the axis begins at 0, else below the lowest bar.

    An axis that does not begin at 0 exaggerates differences, so it is drawn with dots in place of bars. Bars that are
    not finite are left out. Returns an <svg> element, or "" where there is nothing to draw.
    """
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return ""
    low = 0.0 if zero else min(bar.value - bar.spread for bar in bars)
    high = max(bar.value + bar.spread for bar in bars)
    if not high > low:
        low = high - 0.02 * (abs(high) or 1)
    ticks = nice_ticks(low, high, 4)
    low, high = (0.0 if zero else min(low, ticks[0])), max(high, ticks[-1])
    left, height = 8.0, _TOP + len(bars) * (_ROW + 12) + _BOTTOM
    width = WIDTH - left - 16

    def x_at(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * width

    spoken = "; ".join(f"{bar.name} {bar.text or text(bar.value)}" for bar in bars)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(spoken)}">']
    for tick in ticks:
        x, foot = x_at(tick), height - _BOTTOM
        anchor = "start" if x < 20 else "end" if x > WIDTH - 24 else "middle"
        parts.append(segment(x, _TOP, x, foot, "var(--line)"))
        parts.append(text_at(x, foot + 16, text(tick), anchor))
    for i, bar in enumerate(bars):
        y, colour = _TOP + i * (_ROW + 12), f"var(--{bar.colour})"
        parts.append(text_at(left, y + 13, cut(bar.name, 44), "start", "var(--ink)"))
        parts.append(text_at(WIDTH - 8, y + 13, bar.text or text(bar.value), "end"))
        end, middle = x_at(bar.value), y + 25
        if zero:
            length = max(end - left, 1)
            parts.append(f'<rect x="{left}" y="{y + 19}" width="{length:.1f}" height="12" rx="2" fill="{colour}">')
        else:
            parts.append(f'<circle cx="{end:.1f}" cy="{middle}" r="5" fill="{colour}">')
        note = f"<title>{escape(bar.name)}: {escape(bar.text or text(bar.value))}</title>"
        parts.append(note + ("</rect>" if zero else "</circle>"))
        if bar.spread > 0:
            a, b = x_at(max(bar.value - bar.spread, low)), x_at(bar.value + bar.spread)
            line = f"M{a:.1f} {middle}H{b:.1f}M{a:.1f} {middle - 4}v8M{b:.1f} {middle - 4}v8"
            parts.append(f'<path d="{line}" stroke="var(--ink)" fill="none"/>')
    return "".join([*parts, "</svg>"])
