"""Pictures that a table lists: one column names the picture, one its class; others may name its split and its group."""

import os
import posixpath
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_train.csv_files import NO_CLASS, named_columns, read_csv, what_is_in
from dist_train.errors import UserError
from dist_train.shard_config import ShardConfig
from dist_train.sources import PICTURES, Files, Source, printable
from dist_train.tables import NUM_TOLD, class_numbers, left_out_rows, listed_splits, told


class Listed(NamedTuple):
    """A row of the list: its line in the file, its cells, and the picture's path below the root."""

    line: int
    cells: dict[str, str]  # by setting: picture, target, and split_column and group where they are set
    picture: str


def list_source(config: ShardConfig) -> Source:
    """Pictures named in a CSV file: config.picture is the column with their paths below config.root, config.target their class.

    config.ending is added to names that do not end as a picture's. config.split_column holds train, val or test (training, valid,
    ... are taken, too). Pictures alike in config.group never come into different splits. A row without a picture, or without one of
    the others (a cell of NO_CLASS), is by config.missing left out or refused. A file that is not there is a
    sample that cannot be read (config.max_bad). Raises UserError with all that is wrong in the rows, and where: names that lead out
    of the root or are no picture's, pictures named twice, other words for a split, groups in two splits, classes that no row of
    the training split has.
    """
    path, root = Path(config.path), Path(config.root or Path(config.path).parent)
    header, rows, lines = read_csv(path)
    columns = named_columns(path, config, header, picture=config.picture, target=config.target)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{root}: {found}; expected the folder below which the pictures of {path} lie.\n  Set `root` to it.")
    cells = [{setting: row[column].strip() for setting, column in columns.items()} for row in rows]
    reasons = {r: why for r, row in enumerate(cells) if (why := _lack(row, columns, header))}
    if reasons and (config.missing == "error" or len(reasons) == len(rows)):
        faults = [f"line {lines[r]}: {why}" for r, why in reasons.items()]
        otherwise = "leave them out with --missing drop" if len(reasons) < len(rows) else "name another column"
        what = (f"of {len(rows):,} rows {word} a value" for word in ("lacks", "lack"))
        raise UserError(f"{path}: {told(faults, *what)}\n  Mend them, or {otherwise}.")
    listed = [Listed(lines[r], row, _path(row["picture"], config.ending)) for r, row in enumerate(cells) if r not in reasons]
    classes, labels = class_numbers(path, config.target, [row.cells["target"] for row in listed])
    splits, wrong = [0] * len(listed), []
    if config.split_column:
        preset, wrong = listed_splits(config, [row.cells["split_column"] for row in listed], classes, labels)
        splits = preset.tolist()
    states, missing = _states(root, listed)
    problems = [
        *_wrong_names(listed),
        *_named_twice(listed, {setting: header[column] for setting, column in columns.items()}),
        *wrong,
        *(_torn_groups(config, listed, splits) if config.split_column and config.group and min(splits) >= 0 else ()),
        *(_missing(config, root, missing, len(listed)) if len(missing) > config.max_bad else ()),
    ]
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    order = sorted(range(len(listed)), key=lambda i: (labels[i], splits[i], listed[i].picture))  # as of class folders
    groups = np.unique([row.cells["group"] for row in listed], return_inverse=True)[1] if config.group else None
    paths = [listed[i].picture for i in order]
    why = ", ".join(f"{why} ({count:,})" for why, count in Counter(reasons.values()).most_common(NUM_TOLD))
    return Source(
        classes=classes,
        names=[printable(path) for path in paths],
        labels=labels[order],
        sizes=np.array([states[i][0] for i in order], np.int64),
        preset=np.array([splits[i] for i in order], np.int8) if config.split_column else None,
        groups=groups[order] if config.group else None,
        store=Files(str(root), paths, [states[i][1] for i in order]),
        left_out=left_out_rows(reasons, lines),
        notes=[f"{len(reasons):,} of {len(rows):,} rows were left out: {why}"] if reasons else [],
    )


def _lack(cells: dict[str, str], columns: dict[str, int], header: list[str]) -> str:
    """What a row lacks, or nothing."""
    for setting, cell in cells.items():
        if cell.lower() in (("",) if setting == "picture" else NO_CLASS):
            return what_is_in(header[columns[setting]], cell)
    return ""


def _path(name: str, ending: str) -> str:
    return posixpath.normpath(name if name.lower().endswith(PICTURES) else name + ending)


def _leads_out(picture: str) -> bool:
    return picture.startswith(("/", "../"))


def _is_pictures(picture: str) -> bool:
    return picture.lower().endswith(PICTURES) and "\0" not in picture


def _states(root: Path, listed: list[Listed]) -> tuple[list[tuple[int, int]], list[str]]:
    """(bytes, time of change in ns) of each picture, (0, 0) where there is none; and the lines of well-formed names without one."""
    states, missing = [], []
    for row in listed:
        state, why = (0, 0), ""
        if _is_pictures(row.picture) and not _leads_out(row.picture):
            try:
                found = os.stat(f"{root}/{row.picture}")
            except OSError as error:
                why = error.strerror or str(error)
            else:
                if stat.S_ISREG(found.st_mode):
                    state = (found.st_size, found.st_mtime_ns)
                else:
                    why = "not a file"
        states.append(state)
        missing += [f"line {row.line}: {printable(row.picture)}: {why}"] if why else []
    return states, missing


def _missing(config: ShardConfig, root: Path, missing: list[str], num_listed: int) -> list[str]:
    allowed = f", and max_bad allows {config.max_bad:,}" if config.max_bad else ""
    what = (f"of {num_listed:,} pictures {word} not below {root}{allowed}" for word in ("is", "are"))
    return [f"{told(missing, *what)}\n"
            f"  Set --root to the folder that names start from, or leave them out with --max-bad {len(missing)}."]  # fmt: skip


def _wrong_names(listed: list[Listed]) -> list[str]:
    outside = [f"line {row.line}: {row.cells['picture']!r}" for row in listed if _leads_out(row.picture)]
    others = [f"line {row.line}: {row.picture!r}" for row in listed if not _is_pictures(row.picture)]
    problems = []
    if outside:
        problems.append(f"{told(outside, 'name leads out of the root', 'names lead out of the root')}\n"
                        f"  Set --root higher, and write paths below it.")  # fmt: skip
    if others:
        problems.append(f"{told(others, 'name ends as no picture does', 'names end as no picture does')}\n"
                        f"  Expected {', '.join(PICTURES)}; --ending .jpg adds what names lack.")  # fmt: skip
    return problems


def _named_twice(listed: list[Listed], names: dict[str, str]) -> list[str]:
    """names: the columns, by setting."""
    first, faults = {}, []
    for row in listed:
        other = first.setdefault(row.picture, row)
        if other is not row:
            apart = [f", {names[setting]} {other.cells[setting]!r} and {cell!r}" for setting, cell in row.cells.items()
                     if setting != "picture" and cell != other.cells[setting]]  # fmt: skip
            faults.append(f"lines {other.line} and {row.line}: {printable(row.picture)}{''.join(apart)}")
    return [f"{told(faults, 'row names a picture again', 'rows name a picture again')}\n"
            f"  Keep one row of each picture."] if faults else []  # fmt: skip


def _torn_groups(config: ShardConfig, listed: list[Listed], splits: list[int]) -> list[str]:
    first, torn = {}, {}
    for row, split in zip(listed, splits, strict=True):
        group, word = row.cells["group"], row.cells["split_column"]
        other, its_split = first.setdefault(group, (row, split))
        if split != its_split:
            torn.setdefault(group, f"{group!r}: {other.cells['split_column']} in line {other.line}, {word} in line {row.line}")
    what = (f"{words[0]} of column {config.group} {words[1]} in two splits" for words in (("group", "lies"), ("groups", "lie")))
    return [f"{told(list(torn.values()), *what)}\n"
            f"  Put each into one, or leave --split-column out, and they are drawn whole."] if torn else []  # fmt: skip
