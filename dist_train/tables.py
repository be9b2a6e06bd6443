"""Sources of vectors and of pictures that come as arrays: CSV files, and the sets inside scikit-learn."""

import csv
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from dist_train.errors import UserError, did_you_mean
from dist_train.shard_config import ShardConfig
from dist_train.sources import Pixels, Source, Vectors, printable

SKLEARN = ("digits", "breast_cancer", "iris", "wine")
NO_CLASS = ("", "na", "n/a", "nan", "null", "?")  # "none" and "-" are classes of well-known sets
_TRUTH = {"true": 1.0, "false": 0.0}  # as pandas writes them
MAX_TEXTS = 32  # of a column that becomes features: names and free text have more
_LEFT_OUT_KEPT = 1000  # rows named in the index; more are counted only
_TOLD = 5  # columns with missing values that are named, texts that a run does not know


def csv_source(config: ShardConfig) -> Source:
    """Rows of a CSV file with a header line: config.target is the class, every other column float32 features.

    The delimiter (comma, semicolon, tab or bar) is the one the header line has most of. Classes are sorted, as numbers
    if all are whole numbers. True and False, in any case, are 1 and 0. A column without a single number and of at most MAX_TEXTS
    texts is a feature COLUMN=TEXT for each, in sorted order, 1 in rows with that text, else 0; an empty cell is 0 in all, and not
    missing. Like the classes, the texts are those of the whole file, of every split. A row with a cell that is empty or no number
    in a column of numbers is, by config.missing, left out, or kept with NaN there (`column_statistics` says what it counts as), or
    refused; a row with a number that float32 cannot hold, or without a class (an empty cell, NA, N/A, NaN, null or ?), is left out
    or refused. Dropped and named: columns in config.drop, without a name, without a value, of more texts, and features that never
    change. Raises UserError where numbers are written with a decimal comma, and where a column is named as another's text would be.
    """
    path = Path(config.path)
    header, rows, lines = read_csv(path)
    target = _target_column(path, config.target, header)
    unknown = [name for name in config.drop if name not in header]
    if unknown:
        raise UserError(f"{path}: drop names {', '.join(unknown)}; the columns are {', '.join(header)}.")
    wanted = [c for c, name in enumerate(header) if c != target and name.strip() and name not in config.drop]
    nameless = sum(not name.strip() for name in header)
    numbers = np.array([[number_in(row[c]) for c in wanted] for row in rows], np.float32).reshape(len(rows), -1)
    _refuse_decimal_commas(path, header, rows, lines, wanted, numbers)
    features, columns, values, notes = _with_texts(path, header, rows, wanted, numbers)
    notes += [f"{nameless} columns without a name, dropped: often the rows' numbers"] if nameless else []

    labels = [row[target].strip() for row in rows]
    unlabelled = np.array([label.lower() in NO_CLASS for label in labels])
    unusable = np.isinf(values) if config.missing == "mean" else ~np.isfinite(values)
    reasons = {}
    for r in np.flatnonzero(unlabelled | unusable.any(axis=1)):
        column = target if unlabelled[r] else columns[int(unusable[r].argmax())]
        cell = rows[r][column]
        reasons[int(r)] = f"column {header[column]} is {cell!r}" if cell.strip() else f"column {header[column]} is empty"
    if reasons and config.missing == "error":
        few = "".join(f"\n  line {lines[r]}: {why}" for r, why in list(reasons.items())[:5])
        raise UserError(
            f"{path}: {len(reasons)} of {len(rows)} rows have missing or non-numeric values:{few}\n"
            f"  Mend them, or choose --missing drop or --missing mean."
        )
    keep = np.array([r for r in range(len(rows)) if r not in reasons], np.int64)
    lacking = {config.target: int(unlabelled.sum())}
    lacking |= {header[c]: n for c, n in zip(columns, unusable.sum(axis=0).tolist(), strict=True) if n}
    where = _most(Counter({name: n for name, n in lacking.items() if n}))
    if not len(keep):
        raise UserError(f"{path}: none of the {len(rows)} rows is complete; missing are {where}.\n"
                        f"  Drop the emptiest columns with --drop.")  # fmt: skip
    notes += [f"{len(reasons):,} of {len(rows):,} rows were left out for missing values: {where}"] if reasons else []

    values, constant = _without_constants(values[keep])
    notes += _note("columns that never change, dropped", [features[k] for k in constant])
    features = [name for k, name in enumerate(features) if k not in constant]
    if not features:
        raise UserError(f"{path}: no column besides {config.target!r} is left to learn from.")
    if num_holes := int(np.isnan(values).sum()):
        notes.append(f"{num_holes:,} missing values count as their column's mean over the training split")
    classes, numbers = class_numbers(path, config.target, [labels[r] for r in keep])
    return _table(classes, numbers, values, features, [f"line {lines[r]}" for r in keep],
                  left_out=left_out_rows(reasons, lines), notes=notes)  # fmt: skip


def _with_texts(
    path: Path, header: list[str], rows, wanted: list[int], numbers: np.ndarray
) -> tuple[list[str], list[int], np.ndarray, list[str]]:
    """Features, the column of each, their values (N, F) float32, and lines for the user: columns of text become features.

    wanted: columns; numbers: their cells as numbers, (N, len(wanted)). Raises UserError where names would be ambiguous.
    """
    features, columns, values = [], [], [numbers[:, :0]]
    became, too_many, empty = {}, [], []
    for k, c in enumerate(wanted):
        name = header[c]
        if np.isfinite(numbers[:, k]).any():
            features.append(name)
            columns.append(c)
            values.append(numbers[:, k : k + 1])
            continue
        cells = [text_in(row[c]) for row in rows]
        texts = sorted({*cells} - {""})
        if 0 < len(texts) <= MAX_TEXTS:
            place = {text: i for i, text in enumerate(texts)}
            places = np.array([place.get(cell, -1) for cell in cells])
            values.append((places[:, None] == np.arange(len(texts))).astype(np.float32))
            features += [f"{name}={text}" for text in texts]
            columns += [c] * len(texts)
            became[name] = len(texts)
        else:
            too_many += [f"{name} ({len(texts):,})"] if texts else []
            empty += [] if texts else [name]
    problems = [
        f"{path}: column {other!r} is named as a text of column {name!r} would be, whose features are called {name}=TEXT.\n"
        f"  Rename one of them, or leave {name!r} out with --drop."
        for name in became for other in header if other.startswith(f"{name}=")
    ]  # fmt: skip
    if problems:
        raise UserError("\n".join(problems))
    notes = _note("columns of text, a feature for each text", [f"{name} ({count})" for name, count in became.items()])
    notes += _note(f"columns of more than {MAX_TEXTS} texts, dropped", too_many)
    notes += _note("columns without a value, dropped", empty)
    return features, columns, np.concatenate(values, axis=1), notes


def feature_places(path: Path, header: list[str], features: list[str]) -> list[tuple[int, str]]:
    """Where a file has each feature of a run: (column, "") of a number, (column, TEXT) of a feature COLUMN=TEXT.

    A feature that is itself in the header is a number. Raises UserError where a feature has no column, or could be of two.
    """
    places, lacking, problems = [], [], []
    for feature in features:
        found = [(header.index(feature), "")] if feature in header else [
            (c, feature[len(name) + 1 :]) for c, name in enumerate(header) if name and feature.startswith(f"{name}=")
        ]  # fmt: skip
        found = [(c, text) for c, text in found if text or header[c] == feature]
        places += found[:1]
        lacking += [] if found else [feature]
        if len(found) > 1:
            names = " or of ".join(repr(header[c]) for c, _ in found)
            problems.append(f"{path}: {feature} may be a text of column {names}; expected one of them.\n  Rename the other.")
    if lacking:
        hint = "\n  COLUMN=TEXT is read from a column of text, COLUMN, too." if any("=" in name for name in lacking) else ""
        problems.append(f"{path}: expected the columns {', '.join(features)}; lacks {', '.join(lacking)}.{hint}")
    if problems:
        raise UserError("\n".join(problems))
    return places


def unknown_texts(header: list[str], rows: list[list[str]], places: list[tuple[int, str]]) -> list[str]:
    """A line for each column of text with cells whose text is none of the run's. places: as `feature_places`."""
    notes = []
    for c in dict.fromkeys(c for c, text in places if text):
        known = {"", *(text for other, text in places if other == c)}
        found = Counter(text for row in rows if (text := text_in(row[c])) not in known)
        if found:
            few = ", ".join(repr(text[:40]) for text, _ in found.most_common(_TOLD)) + (", ..." if len(found) > _TOLD else "")
            notes.append(f"column {header[c]}: {found.total():,} cells have a text that the run does not know, and count as none "
                         f"of its texts: {few}")  # fmt: skip
    return notes


def column_statistics(rows: np.ndarray, weights: np.ndarray | None = None) -> tuple[list[float], list[float]]:
    """(mean, std) of each column over the values that are there; std as it is once the others are filled with the mean.

    rows: (N, F), NaN where a value is missing; weights: (N,), how many rows each stands for. What scikit-learn's SimpleImputer
    and then StandardScaler make of them. A column that never changes has a std of 1, one without a value a mean of 0 as well.
    """
    values = rows.astype(np.float64)
    weights = np.ones((len(rows), 1)) if weights is None else weights[:, None]
    holes = np.isnan(values)
    np.copyto(values, 0, where=holes)
    mean = (values * weights).sum(axis=0) / np.maximum((~holes * weights).sum(axis=0), 1)
    apart = np.where(holes, 0, values - mean)
    std = np.sqrt((apart**2 * weights).sum(axis=0) / weights.sum())
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()


def empty_columns(rows: np.ndarray, features: list[str]) -> list[str]:
    """A line that names the columns without a value in these rows, a training part's; no line where there are none."""
    empty = np.flatnonzero(np.isnan(rows).all(axis=0))
    return _note("columns without a single value in the training split", [features[k] for k in empty])


def _refuse_decimal_commas(path: Path, header, rows, lines, features: list[int], values: np.ndarray) -> None:
    """Raise UserError where 1,5 stands in a column of numbers: it would count as a hole. values: NaN where there is no number."""
    for k, c in enumerate(features):
        cells = [(r, rows[r][c].strip()) for r in np.flatnonzero(np.isnan(values[:, k])).tolist()]
        found = [(r, cell) for r, cell in cells if re.fullmatch(r"[+-]?\d+,\d+", cell)]
        if found and (len(cells) < len(rows) or len(found) == sum(bool(cell) for _, cell in cells)):
            r, cell = found[0]
            plain = repr(cell.replace(",", "."))
            plain += f", or {cell.replace(',', '')!r} if the comma parts thousands" if re.search(r",\d{3}$", cell) else ""
            raise UserError(
                f"{path}, line {lines[r]}: column {header[c]!r} has {cell!r}, and {len(found) - 1} more with a comma; expected "
                f"{plain}.\n  Write numbers with a point, or leave the column out with --drop."
            )


def sklearn_source(config: ShardConfig) -> Source:
    """One of the sets that lie inside the scikit-learn package: digits as 8 x 8 pictures, the others as vectors.

    digits come as 0 to 16; pixel = round(value * 255 / 16), so that 0 stays black and 16 becomes 255.
    """
    if config.dataset not in SKLEARN:
        hint = did_you_mean(config.dataset, SKLEARN, f"There are {', '.join(SKLEARN)}.")
        raise UserError(f"dataset: {config.dataset!r} is not a set of scikit-learn's that can be converted. {hint}")
    from sklearn import datasets

    raw = getattr(datasets, f"load_{config.dataset}")()
    names = [f"{config.dataset}/{i:06d}" for i in range(len(raw.target))]
    classes = [str(name) for name in raw.target_names]
    labels = raw.target.astype(np.int32)
    if config.dataset == "digits":
        pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)
        return Source(classes, names, labels, np.full(len(labels), 128, np.int64), Pixels(pixels))
    values, constant = _without_constants(raw.data.astype(np.float32))
    features = [str(name) for k, name in enumerate(raw.feature_names) if k not in constant]
    return _table(classes, labels, values, features, names, left_out=[], notes=[])


def _table(classes, labels, values, features, names, left_out, notes) -> Source:
    sizes = np.full(len(labels), 128 + 4 * values.shape[1], np.int64)
    return Source(
        classes, names, labels, sizes, Vectors(values), features=features, left_out=left_out, notes=notes,
    )  # fmt: skip


def read_csv(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the line each row ends on. Raises UserError on anything that is no table."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(",;\t|", key=first.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows, lines = [], []
            for row in reader:
                if len(row) == len(header):
                    rows.append(row)
                    lines.append(reader.line_num)
                elif any(cell.strip() for cell in row):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} cells; "
                        f"expected {len(header)}, as the header line has."
                    )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.\n  Set `path` to the CSV file.") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}.") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"{path}: columns named twice: {', '.join(map(repr, twice))}.\n  Give each its own name.")
    if not rows:
        raise UserError(f"{path}: no rows; expected a line of column names and a line for each sample.")
    return header, rows, lines


def left_out_rows(reasons: dict[int, str], lines: list[int]) -> list[dict]:
    """What the index says of the rows that are left out. reasons: by row; lines: the line of every row."""
    left_out = [{"name": f"line {lines[r]}", "why": why} for r, why in list(reasons.items())[:_LEFT_OUT_KEPT]]
    if len(reasons) > len(left_out):
        left_out.append({"name": f"{len(reasons) - len(left_out)} more lines", "why": "missing values"})
    return left_out


def _target_column(path: Path, target: str, header: list[str]) -> int:
    if target in header:
        return header.index(target)
    hint = did_you_mean(target, header, f"The columns are {', '.join(header)}.")
    found = f"there is no column {target!r}" if target else "`target` is not set"
    raise UserError(f"{path}: {found}; expected the name of the column that holds the class. {hint}")


def number_in(cell: str) -> float:
    """The cell as a number, True and False as 1 and 0; NaN for what is none, an infinity for what float32 cannot hold."""
    try:
        value = float(cell)
    except ValueError:
        return _TRUTH.get(cell.strip().lower(), np.nan)
    if math.isnan(value):
        return np.nan  # -nan has other bits, and so would its shard
    return value if abs(value) <= 3.4028234e38 else math.copysign(np.inf, value)


def text_in(cell: str) -> str:
    """The cell as the text that names a feature; "" for an empty one."""
    return printable(cell.strip())


def class_numbers(path: Path, target: str, labels: list[str]) -> tuple[list[str], np.ndarray]:
    """Class names in order, and (N,) int32 class numbers."""
    distinct = set(labels)
    if len(distinct) > max(20, len(labels) // 2):
        raise UserError(
            f"{path}: column {target!r} has {len(distinct)} different values in {len(labels)} rows; expected a class."
        )
    whole = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in distinct)
    classes = sorted(distinct, key=lambda label: (int(label), label)) if whole else sorted(distinct)
    number = {name: k for k, name in enumerate(classes)}
    return [printable(name) for name in classes], np.array([number[label] for label in labels], np.int32)


def _without_constants(values: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The columns that change, and the numbers of those that do not; what is missing (NaN) is no change."""
    changes = np.fmin.reduce(values, axis=0) < np.fmax.reduce(values, axis=0)
    constant = np.flatnonzero(~changes).tolist()
    return np.delete(values, constant, axis=1), constant


def _most(counts: Counter) -> str:
    """"Age (177), Fare (1)", the most frequent first."""
    few = [f"{name} ({count:,})" for name, count in counts.most_common(_TOLD)]
    return ", ".join(few) + (", ..." if len(counts) > _TOLD else "")


def _note(what: str, names: list[str]) -> list[str]:
    return [f"{len(names)} {what}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"] if names else []
