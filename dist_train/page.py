"""A page of charts and tables with the look of a run's report: one file, no requests, light and dark."""

from dataclasses import dataclass, field
from pathlib import Path

from dist_train.durable import replace_text
from dist_train.errors import UserError


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
    """svg: as `plots` and `bars` draw; legend: (name, colour variable) of each curve; note: what one sees.

    is_wide: it takes the width of the page. Where that is too narrow for it, it is scrolled inside its box.
    """

    title: str
    svg: str
    legend: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""
    is_wide: bool = False


@dataclass(frozen=True)
class Cell:
    """One picture. uri: of its bytes, data:image/...; is_small: shown with hard pixels; note: the line below it."""

    uri: str
    is_small: bool = False
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures. rows: (name, note, cells); columns: their headings, or none. tile: side of a cell, CSS pixels."""

    title: str
    rows: list[tuple[str, str, list[Cell]]]
    columns: list[str] = field(default_factory=list)
    note: str = ""
    tile: int = 96

    @property
    def num_columns(self) -> int:
        return max(len(self.columns), max((len(cells) for _, _, cells in self.rows), default=0))


@dataclass(frozen=True)
class Section:
    """A part of a page: pictures, charts, small charts, a table, then text as it stands."""

    title: str
    note: str = ""
    charts: list[Chart] = field(default_factory=list)
    table: Table | None = None
    text: str = ""
    galleries: list[Gallery] = field(default_factory=list)
    small_charts: list[Chart] = field(default_factory=list)


def write_page(path: Path, title: str, subtitle: str, cards: list[tuple[str, str]], sections: list[Section]) -> None:
    """Write the page whole or not at all. cards: (what, value) of the headline figures.

    Raises UserError if it cannot be written.
    """
    write_template(path, "page.html.j2", title=title, subtitle=subtitle, cards=cards, sections=sections)


def write_template(path: Path, template: str, **facts) -> None:
    """Fill one of this package's templates and write it whole or not at all. Raises UserError if it cannot be written."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = jinja.get_template(template).render(**facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written: {error.strerror or error}.") from None
