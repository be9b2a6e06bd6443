"""Sources of vectors and of pictures that come as arrays: CSV files, and the sets inside scikit-learn."""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_train.csv_files import (
    NO_CLASS,
    counted,
    drop_option,
    is_numbers,
    listed,
    named_columns,
    number_in,
    numbers_in,
    read_csv,
    refuse_decimal_commas,
    text_in,
    what_is_in,
)
from dist_train.errors import UserError, did_you_mean
from dist_train.shard_config import ShardConfig
from dist_train.sources import SPLIT_WORDS, Pixels, Source, Vectors, first_of, printable

SKLEARN = ("digits", "breast_cancer", "iris", "wine")
MAX_TEXTS = 32  # of a column that becomes features: names and free text have more
LEAST_TRUTH_STD = 0.1  # a text in one of 100,000 rows has 0.003: its 1 would enter as 316, and a few such diverge
CONSTANT_STD = float(np.finfo(np.float32).max)  # makes 0 of what a column holds elsewhere that never changes in training
_NAMELESS = re.compile(r"(Unnamed: [\d.]+)?")  # what pandas calls a column without a name, once it has read and written it
_LEAST_ROWS = 50  # of fewer, a column counts the rows, or is the class, by chance
_LEFT_OUT_KEPT = 1000  # rows named in the index; more are counted only
NUM_TOLD = 5  # columns with missing values, texts that a run does not know, faults of a kind that are named


class Feature(NamedTuple):
    """A feature of the table: the numbers of a column, or whether its cell is one of its texts."""

    name: str
    column: int
    cells: np.ndarray  # (N,) float32 numbers, NaN for what is none; or int16 numbers of texts, shared by the column's features
    text: int  # number of its text; -1 for a column of numbers

    def values(self, rows: np.ndarray) -> np.ndarray:
        return self.cells[rows] if self.text < 0 else self.cells[rows] == self.text


def csv_source(config: ShardConfig) -> Source:
    """Rows of a CSV file with a header line: config.target is the class, every other column float32 features.

    The delimiter (comma, semicolon, tab or bar) is the one the header line has most of. Classes are sorted, as numbers
    if all are whole numbers. True and False, in any case, are 1 and 0. A column is of text where fewer of its cells are numbers
    than are not, empty ones and NO_CLASS aside. One of at most MAX_TEXTS texts is a feature COLUMN=TEXT for each, in sorted order,
    1 in rows with that text, else 0; an empty cell is 0 in all, and not missing. Like the classes, the texts are those of the whole
    file, of every split. config.split_column is as in `listed_splits`. A row with a cell that is empty or no number in a column of
    numbers is, by config.missing, left out, or kept with NaN there (`column_statistics` says what it counts as), or refused; a row
    with a number that float32 cannot hold, or without a class or a split (a cell of NO_CLASS), is left out or refused. Dropped and
    named: columns in config.drop, without a name, without a value, of more texts, and features that never change. Named: columns
    that count the rows, or have one value for each class. Raises UserError where numbers are written with commas, and where a
    column is named as another's text would be.
    """
    path = Path(config.path)
    header, rows, lines = read_csv(path)
    said_by = named_columns(path, config, header, target=config.target)
    unknown = [name for name in config.drop if name not in header]
    if unknown:
        raise UserError(f"{path}: drop names {listed(unknown)}; the columns are {listed(header)}.")
    others = [c for c, name in enumerate(header) if c not in said_by.values() and name not in config.drop]
    wanted = [c for c in others if not _NAMELESS.fullmatch(header[c])]
    nameless = len(others) - len(wanted)
    features, notes = _features(path, header, rows, lines, wanted)
    notes += [counted(nameless, "columns without a name, dropped: often the rows' numbers")] if nameless else []

    words = {setting: [row[c].strip() for row in rows] for setting, c in said_by.items()}
    faulty, lacking = np.full(len(rows), -1), Counter()  # of each row the first column that leaves it out
    for c, bad in [
        *((said_by[setting], np.array([word.lower() in NO_CLASS for word in words[setting]])) for setting in said_by),
        *((f.column, np.isinf(f.cells) if config.missing == "mean" else ~np.isfinite(f.cells)) for f in features if f.text < 0),
    ]:
        faulty[bad & (faulty < 0)] = c
        lacking += Counter({header[c]: int(bad.sum())})
    reasons = {r: what_is_in(header[faulty[r]], rows[r][faulty[r]]) for r in np.flatnonzero(faulty >= 0).tolist()}
    if reasons and config.missing == "error":
        faults = [f"line {lines[r]}: {why}" for r, why in reasons.items()]
        what = (f"of {len(rows):,} rows {word} missing or non-numeric values" for word in ("has", "have"))
        raise UserError(f"{path}: {told(faults, *what)}\n"
                        f"  Mend them, or choose --missing drop or --missing mean.")  # fmt: skip
    keep = np.flatnonzero(faulty < 0)
    if not len(keep):
        raise UserError(f"{path}: none of the {len(rows)} rows is complete; missing are {most(lacking)}.\n"
                        f"  Drop the emptiest columns with --drop '[NAME, NAME]'.")  # fmt: skip
    notes += [f"{len(reasons):,} of {len(rows):,} rows were left out for missing values: {most(lacking)}"] if reasons else []

    changes = [np.fmin.reduce(values := f.values(keep)) < np.fmax.reduce(values) for f in features]
    varied, same = ([f for f, does in zip(features, changes, strict=True) if does == kind] for kind in (True, False))
    names = [f.name for f in varied]
    blurred = [f.name for f in same if f.text < 0
               and len({x for cell in {rows[r][f.column] for r in keep.tolist()} if (x := number_in(cell)) == x}) > 1]  # fmt: skip
    notes += _note("columns that never change, dropped", [f.name for f in same if f.name not in blurred])
    notes += _note("columns whose numbers are one in float32, dropped; take off what is large and the same in all", blurred)
    if not varied:
        why = "".join(f"\n  {note}" for note in notes)
        raise UserError(f"{path}: no column besides {config.target!r} is left to learn from.{why}")
    values = np.empty((len(keep), len(varied)), np.float32)
    for k, f in enumerate(varied):
        values[:, k] = f.values(keep)
    if holes := +Counter({name: int(np.isnan(values[:, k]).sum()) for k, name in enumerate(names)}):
        notes.append(f"{holes.total():,} missing values count as their column's mean over the training split: {most(holes)}")
    classes, labels = class_numbers(path, config.target, [words["target"][r] for r in keep])
    lost = {words["target"][r] for r in reasons if faulty[r] != said_by["target"]} - {words["target"][r] for r in keep.tolist()}
    notes += _note("classes left out with all their rows", sorted(map(printable, lost)))
    notes += _giveaways(header, varied, keep, labels) if len(keep) >= _LEAST_ROWS else []
    splits, problems = None, []
    if config.split_column:
        splits, problems = listed_splits(config, [words["split_column"][r] for r in keep], classes, labels)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return _table(classes, labels, values, names, [f"line {lines[r]}" for r in keep],
                  left_out=left_out_rows(reasons, lines), notes=notes, preset=splits)  # fmt: skip


def _giveaways(header: list[str], features: list[Feature], keep: np.ndarray, labels: np.ndarray) -> list[str]:
    """Lines for the user on columns that tell more than a feature should. keep: rows, and labels their class numbers."""
    first = np.unique(labels, return_index=True)[1]  # a row of each class
    counting, telling = [], []
    for f in {f.column: f for f in features}.values():
        cells = f.cells[keep]
        of_class = cells[first]
        if len(np.unique(of_class)) == len(first) and np.array_equal(cells, of_class[labels]):
            telling.append(header[f.column])
        elif f.text < 0 and _counts_up(f.cells):
            counting.append(header[f.column])
    return [
        *_note("columns that count the rows, kept; --drop leaves them out", counting),
        *_note("columns of one value for each class, kept; --drop leaves out what is known only with the class", telling),
    ]


def _counts_up(values: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):  # float32's largest and infinities are no counts
        return bool((np.diff(values) == 1).all())


def _features(path: Path, header: list[str], rows, lines, wanted: list[int]) -> tuple[list[Feature], list[str]]:
    """Features of the wanted columns, and lines for the user. Raises UserError where names would be ambiguous."""
    features, became, too_many, empty = [], {}, [], []
    for c in wanted:
        name, cells = header[c], [row[c] for row in rows]
        numbers = numbers_in(cells)
        if is_numbers(cells, numbers):
            refuse_decimal_commas(path, name, cells, numbers, lines, f", or leave the column out with {drop_option(name)}")
            features.append(Feature(name, c, numbers, -1))
            continue
        text_of = {cell: text_in(cell) for cell in {*cells}}
        texts = sorted({*text_of.values()} - {""})
        if 0 < len(texts) <= MAX_TEXTS:
            places = text_places(cells, text_of, texts)
            features += [Feature(f"{name}={text}", c, places, k) for k, text in enumerate(texts)]
            became[name] = len(texts)
        else:
            too_many += [f"{name} ({len(texts):,}, such as {texts[0][:20]})"] if texts else []
            empty += [] if texts else [name]
    problems = [
        f"{path}: column {other!r} is named as a text of column {name!r} would be, whose features are called {name}=TEXT.\n"
        f"  Rename one of them, or leave {name!r} out with {drop_option(name)}."
        for name in became for other in header if other.startswith(f"{name}=")
    ]  # fmt: skip
    if problems:
        raise UserError("\n".join(problems))
    notes = _note("columns of text, a feature for each text", [f"{name} ({count})" for name, count in became.items()])
    notes += _note(f"columns of more than {MAX_TEXTS} texts, dropped", too_many)
    notes += _note("columns without a value, dropped", empty)
    return features, notes


def text_places(cells: list[str], text_of: dict[str, str], texts: list[str]) -> np.ndarray:
    """(N,) int16: the place of each cell's text among the texts, -1 for none of them. text_of: `text_in` of every distinct cell."""
    place = {text: k for k, text in enumerate(texts)}
    place_of = {cell: place.get(text, -1) for cell, text in text_of.items()}
    return np.fromiter(map(place_of.__getitem__, cells), np.int16, len(cells))


def feature_places(path: Path, header: list[str], features: list[str], untaught: Collection[str] = ()) -> list[tuple[int, str]]:
    """Where a file has each feature of a run: (column, "") of a number, (column, TEXT) of a feature COLUMN=TEXT.

    A feature that is itself in the header is a number. Features in untaught, of which nothing was learnt, need no column: (-1, "").
    Raises UserError where another has none, or one could be of two.
    """
    places, lacking, problems = [], [], []
    for feature in features:
        found = [(header.index(feature), "")] if feature in header else [
            (c, text) for c, name in enumerate(header)
            if name and feature.startswith(f"{name}=") and (text := feature[len(name) + 1 :])
        ]  # fmt: skip
        found = found or [(-1, "")] * (feature in untaught)
        places += found[:1]
        lacking += [] if found else [feature]
        if len(found) > 1:
            names = " or of ".join(repr(header[c]) for c, _ in found)
            problems.append(f"{path}: {feature} may be a text of column {names}; expected one of them.\n  Rename the other.")
    if lacking:
        column_of = _columns_of(features, header)
        lacking = list(dict.fromkeys(column_of[name] for name in lacking))
        hint = "\n  COLUMN=TEXT is read from a column of text, COLUMN, too." if any("=" in name for name in lacking) else ""
        lacks = f"lacks {listed(lacking)}. Its first line names {listed(header)}."
        problems.append(f"{path}: expected the columns {listed(dict.fromkeys(column_of.values()))}; {lacks}{hint}")
    if problems:
        raise UserError("\n".join(problems))
    return places


def _columns_of(features: list[str], header: list[str]) -> dict[str, str]:
    """{feature: what a file's column for it may be called}: COLUMN for several COLUMN=TEXT, unless the header has one of these."""
    stems = Counter(name.partition("=")[0] for name in features if "=" in name)
    there = {name.partition("=")[0] for name in header if "=" in name}
    stem_of = {name: name.partition("=")[0] for name in features}
    return {name: stem if stem and stems[stem] > 1 and stem not in there else name for name, stem in stem_of.items()}


def column_statistics(rows: np.ndarray, weights: np.ndarray | None = None) -> tuple[list[float], list[float]]:
    """(mean, std) of each column over the values that are there; std as it is once the others are filled with the mean.

    rows: (N, F), NaN where a value is missing; weights: (N,), how many rows each stands for. What scikit-learn's SimpleImputer
    and then StandardScaler make of them, but for columns of 0 and 1, whose std is at least LEAST_TRUTH_STD, and columns that never
    change, whose std is CONSTANT_STD: a network learns nothing of them, so no other value that comes later may move it. A column
    without a value has a mean of 0 as well.
    """
    values = rows.astype(np.float64)
    weights = np.ones((len(rows), 1)) if weights is None else weights[:, None]
    holes = np.isnan(values)
    np.copyto(values, 0, where=holes)
    of_truth = ((values == 0) | (values == 1)).all(axis=0)
    mean = (values * weights).sum(axis=0) / np.maximum((~holes * weights).sum(axis=0), 1)
    apart = np.where(holes, 0, values - mean)
    std = np.sqrt((apart**2 * weights).sum(axis=0) / weights.sum())
    std = np.where(of_truth, np.maximum(std, LEAST_TRUTH_STD), std)
    return mean.tolist(), np.where(changing(rows), std, CONSTANT_STD).tolist()


def untaught_columns(rows: np.ndarray, features: list[str]) -> list[str]:
    """Lines that name the columns of which nothing is learnt from these rows, a training part's: without a value, or of one."""
    empty = np.isnan(rows).all(axis=0)
    constant = ~empty & ~changing(rows)
    return [
        *_note("columns without a single value in the training split, 0 to the network everywhere",
               [features[k] for k in np.flatnonzero(empty)]),
        *_note("columns that never change in the training split, 0 to the network whatever stands elsewhere",
               [features[k] for k in np.flatnonzero(constant)]),
    ]  # fmt: skip


def changing(rows: np.ndarray) -> np.ndarray:
    """(F,) bool, whether a column has two values; what is missing (NaN) is none."""
    return np.fmin.reduce(rows, axis=0, initial=np.nan) < np.fmax.reduce(rows, axis=0, initial=np.nan)


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
    values = raw.data.astype(np.float32)
    varied = changing(values)
    features = [str(name) for name, changes in zip(raw.feature_names, varied, strict=True) if changes]
    return _table(classes, labels, values[:, varied], features, names, left_out=[], notes=[])


def _table(classes, labels, values, features, names, left_out, notes, preset=None) -> Source:
    sizes = np.full(len(labels), 128 + 4 * values.shape[1], np.int64)
    return Source(
        classes, names, labels, sizes, Vectors(values), features=features, left_out=left_out, notes=notes, preset=preset,
    )  # fmt: skip


def left_out_rows(reasons: dict[int, str], lines: list[int]) -> list[dict]:
    """What the index says of the rows that are left out. reasons: by row; lines: the line of every row."""
    left_out = [{"name": f"line {lines[r]}", "why": why} for r, why in list(reasons.items())[:_LEFT_OUT_KEPT]]
    if len(reasons) > len(left_out):
        left_out.append({"name": f"{len(reasons) - len(left_out)} more lines", "why": "missing values"})
    return left_out


def listed_splits(config: ShardConfig, words: list[str], classes: list[str], labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The split of each row by its word in config.split_column, (N,) int8 as in SPLITS, -1 for none; and what is wrong with them.

    The words are train, val and test; training, valid, ... are taken, too. labels: (N,), class numbers. Wrong are other words, and
    classes, joined as config.merge says, that no row of the training split has.
    """
    splits = np.array([SPLIT_WORDS.get(word.lower(), -1) for word in words], np.int8)
    unknown = Counter(word for word, split in zip(words, splits.tolist(), strict=True) if split < 0)
    if unknown:
        found = ", ".join(f"{word!r} ({count:,} row{'s' * (count > 1)})" for word, count in unknown.most_common(NUM_TOLD))
        return splits, [
            f"column {config.split_column} is {found}{', ...' if len(unknown) > NUM_TOLD else ''}; expected train, val or test.\n"
            f"  Write those, or leave --split-column out, and splits are drawn."
        ]
    joined = {part: group for group in config.merge for part in (*group.split("+"), group)} or {name: name for name in classes}
    trained = {joined.get(classes[label]) for label in np.unique(labels[splits == 0]).tolist()}
    untrained = [repr(name) for name in dict.fromkeys(joined[name] for name in classes if name in joined) if name not in trained]
    if not untrained:
        return splits, []
    where = "no row in the training split"
    return splits, [f"{told(untrained, f'class has {where}', f'classes have {where}')}\n  Each needs some to be learnt from."]


def told(faults: list[str], one: str, several: str) -> str:
    """"3 rows lack a value:", and the first few. one, several: what is said after 1 and after other numbers."""
    return f"{len(faults):,} {one if len(faults) == 1 else several}:{first_lines(faults)}"


def first_lines(lines: list[str]) -> str:
    """The first lines, each on one of its own, and how many more there are."""
    more = f"\n  and {len(lines) - NUM_TOLD:,} more" if len(lines) > NUM_TOLD else ""
    return "".join(f"\n  {line}" for line in lines[:NUM_TOLD]) + more


def class_numbers(path: Path, target: str, labels: list[str]) -> tuple[list[str], np.ndarray]:
    """Class names in order, and (N,) int32 class numbers."""
    distinct = set(labels)
    if len(distinct) > max(20, len(labels) // 2):
        raise UserError(
            f"{path}: column {target!r} has {len(distinct)} different values in {len(labels)} rows; expected a class.\n"
            f"  Name the column of the class, or add one with a word for each range of the values."
        )
    whole = all(re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", label) for label in distinct)
    stem_of = {label: label.partition(".")[0] if whole else label for label in distinct}  # 1 and 1.0 are one class, called 1
    name_of = {stem_of[label]: label for label in sorted(distinct, key=lambda label: (-len(label), label))}
    stems = sorted(name_of, key=lambda stem: (int(stem), stem)) if whole else sorted(name_of)
    number = {stem: k for k, stem in enumerate(stems)}
    return [printable(name_of[stem]) for stem in stems], np.array([number[stem_of[label]] for label in labels], np.int32)


def most(counts: Counter) -> str:
    """"Age (177), Fare (1)", the most frequent first."""
    return first_of([f"{name} ({count:,})" for name, count in counts.most_common()], NUM_TOLD)


def _note(what: str, names: list[str]) -> list[str]:
    return [f"{counted(len(names), what)}: {listed(names)}"] if names else []
