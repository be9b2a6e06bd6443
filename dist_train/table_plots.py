"""What a table looks like: correlations, each feature's spread by class, and the most telling features in pairs, as SVG."""

from html import escape

import numpy as np

from dist_train.csv_files import counted, listed
from dist_train.index import ShardIndex, SplitIndex
from dist_train.page import Chart, Section
from dist_train.plots import COLOURS, cut, fitted, nice_ticks, segment, text_at, text_width
from dist_train.store import Store
from dist_train.tables import changing

MAX_ROWS = 4000  # drawn, evenly over the split
MAX_MAP = 32  # features in the correlation map: names below each other still fit
MAX_BOXES, MAX_PAIRED, MAX_CLASSES = 12, 4, 6
MAX_POINTS = 1200  # in each pair's field
SMALL_WIDTH, WIDTH = 300, 560


def table_section(index: ShardIndex, split: SplitIndex) -> Section:
    """The pictures of a split of a table. Raises UserError if a row cannot be read."""
    values, labels = read_rows(split, len(index.features))
    names, classes = index.features, index.classes
    best = telling_columns(values, labels)
    num_holes = np.isnan(values).sum(axis=0)
    what = f"{split.num_samples:,} rows of the {split.name} split" if len(values) == split.num_samples else (
        f"{len(values):,} of {split.num_samples:,} rows of the {split.name} split")  # fmt: skip
    if num_holes.any():
        what += f"; {num_holes.sum():,} of their {values.size:,} values are missing, and left out of the pictures"
    if len(best) < len(names):
        still = [names[k] for k in np.setdiff1d(np.arange(len(names)), best)]
        what += f"; {counted(len(still), 'columns without two different values')}, left out: {listed(still)}"
    boxes = [
        Chart(names[k], box_plot(values[:, k], labels, classes), note=f"{num_holes[k]:,} missing." if num_holes[k] else "")
        for k in best[:MAX_BOXES]
    ]
    order = f", the {MAX_BOXES} that differ most between the classes first" if len(best) > MAX_BOXES else ""
    return Section(
        f"The table: {len(names)} features", f"{what}. Boxes hold the middle half of a class, the line is its median{order}.",
        charts=[_correlation_chart(values, names, best), *_pair_chart(values, labels, names, classes, best)] if len(best) else [],
        small_charts=boxes,
    )  # fmt: skip


def read_rows(split: SplitIndex, num_features: int, most: int = MAX_ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Rows spread evenly over a split: (n, F) float32 as stored, NaN where a value is missing, and their classes (n,).

    Of a set behind a URL, rows of its first two shards: all would fetch all of it. Raises UserError.
    """
    reach = int(split.first[2]) if split.stored.remote and split.num_shards > 2 else split.num_samples
    chosen = np.unique(np.linspace(0, reach - 1, min(most, reach)).astype(np.int64))
    return read_vectors(split, chosen, num_features), split.table()["label"][chosen].astype(np.int64)


def read_vectors(split: SplitIndex, samples: np.ndarray, num_features: int) -> np.ndarray:
    """The vectors of samples (n,) of a split: (n, F) float32."""
    rows = np.empty((len(samples), num_features), np.float32)
    return Store(split.stored).read_vectors(split.stored_numbers(samples), rows)


def correlation(values: np.ndarray) -> np.ndarray:
    """Pearson's correlation between columns: (n, F) -> (F, F) float64; 0 with a column that never changes.

    Of two columns the rows count that have both: values may be NaN where they are missing.
    """
    centred, there = _centred(values)
    if there.all():
        size = np.sqrt((centred**2).sum(axis=0))
        scaled = centred / np.where(size > 0, size, 1)
        return np.clip(scaled.T @ scaled, -1, 1)
    there = there.astype(np.float64)
    count = np.maximum(there.T @ there, 1)
    sums, squares = centred.T @ there, (centred**2).T @ there  # (i, j): of column i, over the rows that have j, too
    left = squares - sums**2 / count
    size = np.sqrt(np.where(left > 1e-12 * squares, left, 0))  # the rest is rounding
    size = size * size.T
    together = centred.T @ centred - sums * sums.T / count
    return np.clip(np.where(size > 0, together / np.where(size > 0, size, 1), 0), -1, 1)


def telling_columns(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Numbers of the columns that change, first those that tell the classes apart best."""
    best = np.argsort(-separation(values, labels), kind="stable")
    return best[changing(values)[best]]


def separation(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How well each column tells the classes apart: the F statistic of a one-way analysis of variance, (F,) float64.

    values: (n, F), NaN where one is missing and so left out; labels: (n,). 0 for a column that never changes, infinity where
    classes are constant and differ.
    """
    values, there = _centred(values)
    between, within, num_classes = np.zeros((3, values.shape[1]))
    for label in np.unique(labels):
        members, known = values[labels == label], there[labels == label]
        count = known.sum(axis=0)
        mean = members.sum(axis=0) / np.maximum(count, 1)
        between += count * mean**2
        within += (np.where(known, members - mean, 0) ** 2).sum(axis=0)
        num_classes += count > 0
    within = np.where(within > 1e-14 * (between + within), within, 0)  # the rest is rounding
    between = between / np.maximum(num_classes - 1, 1)
    within = within / np.maximum(there.sum(axis=0) - num_classes, 1)
    return np.where(within > 0, between / np.where(within > 0, within, 1), np.where(between > 0, np.inf, 0.0))


def _centred(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns less their mean, 0 where a value is missing, float64 (n, F); and where there is one, bool (n, F)."""
    there = ~np.isnan(values)
    values = np.where(there, values, 0).astype(np.float64)
    return np.where(there, values - values.sum(axis=0) / np.maximum(there.sum(axis=0), 1), 0), there


def unlike(values: np.ndarray, best: np.ndarray, most: int = MAX_PAIRED, alike: float = 0.9) -> np.ndarray:
    """The first columns of `best` that are not correlated beyond `alike` with one taken before; any others where too few."""
    kept, together = [], np.abs(correlation(values))
    for k in best:
        if len(kept) < most and all(together[k, other] < alike for other in kept):
            kept.append(k)
    return np.array([*kept, *(k for k in best if k not in kept)][:most])


def box_figures(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """Lower whisker, quartiles, upper whisker: whiskers end at the last value within 1.5 boxes of the box (Tukey 1977)."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    reach = 1.5 * (high - low)
    return (float(values[values >= low - reach].min()), float(low), float(middle), float(high),
            float(values[values <= high + reach].max()))  # fmt: skip


def box_plot(values: np.ndarray, labels: np.ndarray, classes: list[str]) -> str:
    """One feature's spread, a box for each of the first ten classes. Returns an <svg> element.

    values: (n,), NaN where one is missing, but not all of them; labels: (n,).
    """
    values, labels = values[~np.isnan(values)], labels[~np.isnan(values)]
    shown = [label for label in range(min(len(classes), 10)) if (labels == label).any()]
    spoken = [cut(classes[label], 14) for label in shown]
    left, right, row, top = 8 + max(map(text_width, spoken), default=0), 12, 26, 4
    height = top + row * len(shown) + 22
    ticks = nice_ticks(float(values.min()), float(values.max()), 4)
    low, high = min(ticks[0], float(values.min())), max(ticks[-1], float(values.max()))

    def x_at(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * (SMALL_WIDTH - left - right)

    parts = [f'<svg class="chart" viewBox="0 0 {SMALL_WIDTH} {height}" role="img" aria-label="box plot">']
    for tick in ticks:
        if low <= tick <= high:
            parts.append(segment(x_at(tick), top, x_at(tick), height - 20, "var(--line)"))
            parts.append(text_at(x_at(tick), height - 5, f"{tick:g}", "middle"))
    for place, (label, name) in enumerate(zip(shown, spoken, strict=True)):
        members, y = values[labels == label], top + row * place + row / 2
        least, q1, median, q3, most = box_figures(members)
        colour = _colour(label)
        outside = members[(members < least) | (members > most)]
        outside = outside[np.linspace(0, len(outside) - 1, min(len(outside), 60)).astype(int)]
        note = f"{escape(classes[label])}: median {median:.4g}, middle half {q1:.4g} to {q3:.4g}"
        parts += [
            text_at(left - 6, y + 4, name, "end"),
            f'<path d="M{x_at(least):.1f} {y}H{x_at(q1):.1f}M{x_at(q3):.1f} {y}H{x_at(most):.1f}" stroke="{colour}"/>',
            f'<rect x="{x_at(q1):.1f}" y="{y - 8}" width="{max(x_at(q3) - x_at(q1), 1):.1f}" height="16" rx="2" '
            f'fill="{colour}" fill-opacity="0.3" stroke="{colour}"><title>{note}</title></rect>',
            f'<path d="M{x_at(median):.1f} {y - 8}v16" stroke="{colour}" stroke-width="2.5"/>',
            _dots([(x_at(float(v)), y) for v in outside], colour, 3),
        ]
    return "".join([*parts, "</svg>"])


def correlation_map(together: np.ndarray, names: list[str]) -> str:
    """Draw correlations (K, K) in -1..1: the first colour together, the second against each other. An <svg> element."""
    k, labels = len(names), [cut(name, 24) for name in names]
    cell = 40 if k <= 8 else 26 if k <= 14 else 17
    left = 12 + max(map(text_width, labels))
    width, height = left + cell * k + 4, cell * k + left + 4
    view = f'viewBox="0 0 {width:.0f} {height:.0f}" style="{fitted(width)}"'
    parts = [f'<svg class="matrix" {view} role="img" aria-label="correlations">']
    for i, label in enumerate(labels):
        middle = (i + 0.5) * cell
        parts.append(text_at(left - 6, middle + 4, label, "end"))
        x, y = left + middle + 4, cell * k + 8
        parts.append(f'<g transform="rotate(-90 {x:.0f} {y:.0f})">{text_at(x, y, label, "end")}</g>')
    for i in range(k):
        for j in range(k):
            r = float(together[i, j])
            box = f'x="{left + j * cell:.1f}" y="{i * cell}" width="{cell - 1}" height="{cell - 1}" rx="2"'
            look = f'fill="var(--{"one" if r > 0 else "two"})" fill-opacity="{abs(r):.2f}"'
            note = f"{escape(names[i])} and {escape(names[j])}: {r:+.2f}"
            parts.append(f"<rect {box} {look}><title>{note}</title></rect>")
            if k <= 8:
                ink = "var(--paper)" if abs(r) > 0.6 else "var(--ink)"
                parts.append(text_at(left + (j + 0.5) * cell, (i + 0.5) * cell + 4, f"{r:.2f}", "middle", ink))
    return "".join([*parts, "</svg>"])


def pair_scatter(values: np.ndarray, labels: np.ndarray, names: list[str], classes: list[str]) -> str:
    """Draw each pair of features (n, F), F from 2 to MAX_PAIRED, a colour a class. Returns an <svg> element.

    A row is left out of the pairs of which it lacks a value (NaN); of no feature may all be missing.
    """
    num = values.shape[1]
    side, gap = (WIDTH - 8) / num, 6
    values = values.astype(np.float64)  # in float32 the difference of two large numbers is infinite
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    places = (values - low) / np.where(high > low, high - low, 1)
    some = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).astype(int))
    view = f'viewBox="0 0 {WIDTH} {WIDTH}" style="max-width:{WIDTH + 60}px"'
    parts = [f'<svg class="chart" {view} role="img" aria-label="features in pairs">']
    for i in range(num):
        for j in range(num):
            x, y, inner = 4 + j * side, 4 + i * side, side - gap
            if i == j:
                parts += _diagonal(x, y, inner, names[i], low[i], high[i])
                continue
            frame = f'x="{x:.1f}" y="{y:.1f}" width="{inner:.1f}" height="{inner:.1f}" rx="4"'
            parts.append(f'<rect {frame} fill="none" stroke="var(--line)"/>')
            for label in range(len(classes)):
                members = some[(labels[some] == label) & ~np.isnan(values[some][:, [i, j]]).any(axis=1)]
                points = [(x + 4 + a * (inner - 8), y + inner - 4 - b * (inner - 8))
                          for a, b in zip(places[members, j], places[members, i], strict=True)]  # fmt: skip
                parts.append(_dots(points, _colour(label), 3.2 if num > 2 else 4.5))
    return "".join([*parts, "</svg>"])


def telling_correlations(values: np.ndarray, names: list[str], best: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Correlations (K, K) between the first MAX_MAP features of `best`, and their names, in the table's order."""
    kept = np.sort(best[:MAX_MAP])
    return correlation(values[:, kept]), [names[k] for k in kept]


def _correlation_chart(values: np.ndarray, names: list[str], best: np.ndarray) -> Chart:
    together, shown = telling_correlations(values, names, best)
    note = "Blue: they rise together; orange: one falls as the other rises; pale: unrelated."
    if len(shown) < len(best):
        note += f" The {len(shown)} features that tell most of the class, of {len(names)}."
    title = "Correlation"
    if len(shown) > 1:
        i, j = np.unravel_index(np.argmax(np.abs(np.triu(together, 1))), together.shape)
        title = f"Correlation: {shown[i]} and {shown[j]} are tied most closely ({together[i, j]:+.3f})"
    return Chart(title, correlation_map(together, shown), note=note, is_wide=len(shown) > 8)


def _pair_chart(values, labels, names: list[str], classes: list[str], best: np.ndarray) -> list[Chart]:
    kept = unlike(values, best)
    if len(kept) < 2:
        return []
    shown = list(range(min(len(classes), MAX_CLASSES)))
    legend = [(classes[label], COLOURS[label]) for label in shown]
    legend += [("others", "faint")] if len(classes) > len(shown) else []
    note = "The most telling features, those left out that say nearly the same as a more telling one."
    svg = pair_scatter(values[:, kept], labels, [names[k] for k in kept], classes)
    return [Chart(f"In pairs: {names[kept[0]]} tells the classes apart best", svg, legend, note, len(names) > 8)]


def _diagonal(x: float, y: float, inner: float, name: str, low: float, high: float) -> list[str]:
    lines, most = [""], int(inner / 8.5)
    for word in name.split():
        if len(lines[-1]) + len(word) >= most and lines[-1]:
            lines.append("")
        lines[-1] = cut(f"{lines[-1]} {word}".strip(), most)
    first = y + inner / 2 - 8 * (len(lines) - 1)
    parts = [text_at(x + inner / 2, first + 16 * n, line, "middle", "var(--ink)") for n, line in enumerate(lines)]
    return [*parts, text_at(x + inner / 2, y + inner - 6, f"{low:.3g} to {high:.3g}", "middle")]


def _dots(points: list[tuple[float, float]], colour: str, size: float) -> str:
    """One path for all points: a few bytes each, where circles would take fifty."""
    if not points:
        return ""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return f'<path d="{path}" stroke="{colour}" stroke-width="{size}" stroke-linecap="round" stroke-opacity="0.6"/>'


def _colour(label: int) -> str:
    return f"var(--{COLOURS[label]})" if label < MAX_CLASSES else "var(--faint)"
