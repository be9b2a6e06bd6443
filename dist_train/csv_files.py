"""A CSV file as it is read: its header and rows, the columns that settings name, and cells as numbers or as texts."""

import csv
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dist_train.errors import UserError, did_you_mean
from dist_train.shard_config import ShardConfig
from dist_train.sources import printable

NO_CLASS = ("", "na", "n/a", "#n/a", "<na>", "nan", "null", "?")  # "none" and "-" are classes of well-known sets
_TRUTH = {"true": 1.0, "false": 0.0}  # as pandas writes them
_COMMA = re.compile(r"[+-]?((\d+|\d{1,3}(\.\d{3})+),\d+|\d{1,3}(,\d{3})+(\.\d+)?)")  # 1,5  1.250,5  1,234,567  1,234.5
_HOLDS = {"picture": "picture's path", "target": "class", "split_column": "split", "group": "group"}
_NUM_LISTED = 20  # names in a line
_ONE = {"columns": "column", "classes": "class", "change": "changes", "change,": "changes,", "count": "counts", "them": "it",
        "their": "its"}  # fmt: skip
_HEAD = 1 << 16  # characters in which the header line's delimiter is looked for, outside quotes


def read_csv(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the line each row ends on; a first line such as Excel's sep=; names the delimiter.

    Raises UserError on anything that is no table.
    """
    rows, lines, above = [], [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = next(iter(re.sub(r'"[^"]*"', "", file.read(_HEAD)).splitlines()), "")
            delimiter = max(",;\t|", key=first.count)
            file.seek(0)
            if named := re.fullmatch(r"sep=(.)\s*", first):
                file.readline()
                delimiter, above = named[1], 1
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [re.sub(r"\s*[\r\n]+\s*", " ", name.strip()) for name in next(reader, [])]
            for row in reader:
                if len(row) == len(header):
                    rows.append(row)
                    lines.append(reader.line_num + above)
                elif any(cell.strip() for cell in row):
                    raise UserError(
                        f"{path}, line {reader.line_num + above}: {len(row)} cells; expected {len(header)}, as the header line has."
                        f"\n  Put a cell with {delimiter!r} in it in quotes; the first line of the file is to name every column."
                    )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.\n  Set `path` to the CSV file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}.\n"
                        f"  Save it so: in Excel as type CSV UTF-8, elsewhere with iconv -f CP1252 -t UTF-8 FILE > NEW."
                        ) from None  # fmt: skip
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file from line {1 + (lines[-1] if lines else above)} on: {error}.\n"
                        f"  Close every quote that opens a cell, and write one inside it twice.") from None  # fmt: skip
    twice = sorted(name for name, count in Counter(header).items() if name.strip() and count > 1)
    if twice:
        names = ", ".join(map(repr, twice))
        raise UserError(f"{path}: columns named twice: {names}.\n  Give each its own name.{_row_hint(header)}")
    if not rows:
        raise UserError(f"{path}: no rows; expected a line of column names and a line for each sample.")
    return header, rows, lines


def named_columns(path: Path, config: ShardConfig, header: list[str], **required: str) -> dict[str, int]:
    """{setting: column} of the columns that the settings name. Raises UserError with all that are not there or are set twice.

    required: names of columns by setting, those that there must be.
    """
    names = required | {setting: name for setting in ("split_column", "group") if (name := getattr(config, setting))}
    problems, setting_of = [], {}
    for setting, name in names.items():
        if not name or name not in header:
            found = f"{setting}: there is no column {name!r}" if name else f"`{setting}` is not set"
            hint = did_you_mean(name, header, f"The columns are {listed(header)}.") + _row_hint(header)
            problems.append(f"{path}: {found}; expected the name of the column that holds the {_HOLDS[setting]}. {hint}")
        elif (other := setting_of.setdefault(name, setting)) != setting:
            problems.append(f"{path}: {other} and {setting} are both {name!r}; expected a column for each.")
    if problems:
        raise UserError("\n".join(problems))
    return {setting: header.index(name) for setting, name in names.items()}


def _row_hint(header: list[str]) -> str:
    if len(header) == 1:
        return "\n  Expected names parted by comma, semicolon, tab or bar in the first line, and nothing above them."
    is_row = 2 * sum(np.isfinite(number_in(name)) for name in header) >= len(header)
    return "\n  If the first line is a row, write one above it that names the columns." if is_row else ""


def is_numbers(cells: list[str], numbers: np.ndarray) -> bool:
    """Whether a column is one of numbers, those with commas among them. numbers: of the cells, from `numbers_in`."""
    holes = np.flatnonzero(np.isnan(numbers)).tolist()
    others = Counter(cell for r in holes if (cell := cells[r].strip()).lower() not in NO_CLASS)
    commas = sum(count for cell, count in others.items() if _COMMA.fullmatch(cell))
    texts = others.total() - commas
    return len(cells) - len(holes) + commas >= texts if np.isfinite(numbers).any() else commas > texts


def refuse_decimal_commas(
    path: Path, name: str, cells: list[str], numbers: np.ndarray, lines: list[int], otherwise: str = ""
) -> None:
    """Raise UserError where 1,5 or 1,234,567 stands in a column of numbers: it would count as a hole. numbers: NaN for holes."""
    cells = [(r, cells[r].strip()) for r in np.flatnonzero(np.isnan(numbers)).tolist()]
    if found := [(r, cell) for r, cell in cells if _COMMA.fullmatch(cell)]:
        r, cell = found[0]
        whole = repr(cell.replace(",", ""))
        plain = whole if re.search(r",.*[,.]", cell) else repr(cell.replace(".", "").replace(",", "."))
        plain += f", or {whole} if the comma parts thousands" if plain != whole and re.search(r",\d{3}$", cell) else ""
        raise UserError(
            f"{path}, line {lines[r]}: column {name!r} has {cell!r}, and {len(found) - 1} more with a comma; expected {plain}.\n"
            f"  Write numbers with a point and nothing between thousands{otherwise}."
        )


def numbers_in(cells: list[str]) -> np.ndarray:
    """(N,) float32: cells as numbers, True and False as 1 and 0; NaN for what is none, an infinity for what float32 cannot hold."""
    try:
        if "_" in "".join(cells):
            raise ValueError
        values = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        number_of = {cell: number_in(cell) for cell in {*cells}}  # texts and empty cells are few, and slow to find out
        values = np.fromiter(map(number_of.__getitem__, cells), np.float64, len(cells))
    values[np.isnan(values)] = np.nan  # -nan has other bits, and so would its shard
    large = np.abs(values) > 3.4028234e38
    values[large] = np.copysign(np.inf, values[large])
    return values.astype(np.float32)


def number_in(cell: str) -> float:
    try:
        return np.nan if "_" in cell else float(cell)  # Python reads 18_25 as 1825
    except ValueError:
        return _TRUTH.get(cell.strip().lower(), np.nan)


def what_is_in(name: str, cell: str) -> str:
    """A cell in words, "column Age is '?'"."""
    return f"column {name} is {repr(cell) if cell.strip() else 'empty'}"


def text_in(cell: str) -> str:
    """The cell as the text that names a feature; "" for an empty one."""
    return printable(cell.strip())


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are; columns without a name are left out."""
    names = [name for name in names if name]
    return ", ".join(names[:_NUM_LISTED]) + (f" and {len(names) - _NUM_LISTED:,} more" if len(names) > _NUM_LISTED else "")


def counted(number: int, what: str) -> str:
    """"2 columns that never change": what is in the plural, and put into the singular for 1."""
    return f"{number:,} " + (" ".join(_ONE.get(word, word) for word in what.split(" ")) if number == 1 else what)


def drop_option(name: str) -> str:
    """How a shell is told to leave a column out."""
    import yaml  # only where something is wrong

    names = yaml.safe_dump([name], default_flow_style=True, allow_unicode=True, width=10_000)
    return f"--drop {shlex.quote(names.strip())}"
