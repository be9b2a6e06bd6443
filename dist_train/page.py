"""A page of charts and tables with the look of a run's report: one file, no requests, light and dark."""

import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """columns: (name, whether it holds numbers); rows: one text a column."""

    columns: list[tuple[str, bool]]
    rows: list[list[str]]

    def plain(self) -> str:
        """The table as lines of text."""
        grid = [[name for name, _ in self.columns], *self.rows]
        widths = [max(len(row[c]) for row in grid) for c in range(len(self.columns))]
        lines = []
        for row in grid:
            cells = [cell.rjust(w) if self.columns[c][1] else cell.ljust(w)
                     for c, (cell, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class Chart:
    """svg: as `plots` and `bars` draw; legend: (name, colour variable) of each curve."""

    title: str
    svg: str
    legend: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A part of a page: charts, then a table, then text as it stands."""

    title: str
    note: str = ""
    charts: list[Chart] = field(default_factory=list)
    table: Table | None = None
    text: str = ""


def write_page(path: Path, title: str, subtitle: str, cards: list[tuple[str, str]], sections: list[Section]) -> None:
    """Write the page whole or not at all. cards: (what, value) of the headline figures."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = jinja.get_template("page.html.j2").render(title=title, subtitle=subtitle, cards=cards, sections=sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
