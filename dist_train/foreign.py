"""`dist-train index`: WebDataset tars made by others are indexed where they lie; the tars are only read."""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from dist_train.errors import UserError
from dist_train.foreign_tar import Parsed, parse_tar, read_vector
from dist_train.index import ShardIndex, SplitIndex, load_index, save_index, save_table
from dist_train.sources import SPLITS, printable
from dist_train.tars import writing
from dist_train.workers import num_cores, run_tasks

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_STATISTICS_SAMPLES = 20_000  # decoded for mean and std: the third digit is settled far earlier
_SMALL_BYTES = 50_000_000  # below this, starting worker processes takes longer than the work


def main(argv: list[str]) -> None:
    """`dist-train index DIR [--classes FILE] [--max-bad N]`. Raises UserError."""
    parser = argparse.ArgumentParser("dist-train index", description="Index WebDataset tars made by others, in place.")
    parser.add_argument("folder", metavar="DIR", help="folder with .tar files, itself or in folders below it")
    parser.add_argument("--classes", metavar="FILE", help="a class name a line; default DIR/classes.txt, else numbers")
    parser.add_argument(
        "--max-bad", type=int, default=0, help="unusable samples left out before it gives up; default 0"
    )
    options = parser.parse_args(argv)
    index = index_tars(Path(options.folder), options.classes, options.max_bad)
    from dist_train.shard import print_summary

    print_summary(index)
    print(f"{index.folder}: indexed.")


def index_tars(folder: Path, classes_file: str | None = None, max_bad: int = 0) -> ShardIndex:
    """Write index.json and the tables of samples beside plain WebDataset tars; returns the index.

    A sample is the members that share a name up to the first dot of the file name: a payload (.jpg, .jpeg, .png,
    .webp, or .npy with a float32 vector) and a label: .cls, or .json with an entry called label, cls, class or target;
    a class number, or a class name. Members may come in any order; a name that comes twice makes two samples, as it
    does for WebDataset. The split is the first word of the file's path below DIR that names one (train-0.tar,
    x_val_3.tar, test/0.tar); files without one train. Mean and std are those of up to 20,000 training samples, taken
    evenly. Raises UserError where more than max_bad samples are unusable; those left out are named in the index.
    """
    paths = sorted(folder.rglob("*.tar")) if folder.is_dir() else []
    if not paths:
        packed = sorted(folder.rglob("*.tar.*")) if folder.is_dir() else []
        hint = (
            f"{packed[0].name} is compressed: unpack it to .tar first" if packed else "expected WebDataset tars in it"
        )
        raise UserError(f"{folder}: no .tar files; {hint}.")
    _check_own(folder)
    workers = 1 if sum(path.stat().st_size for path in paths) < _SMALL_BYTES else min(num_cores(), len(paths))
    parsed: list[Parsed] = [None] * len(paths)
    for number, result in run_tasks(parse_tar, paths, workers, lambda samples: None):
        parsed[number] = result
    left_out = [{"name": f"{path.relative_to(folder)}: {printable(key)}", "why": why}
                for path, tar in zip(paths, parsed, strict=True) for key, why in tar.bad]  # fmt: skip
    _check_left_out(folder, left_out, max_bad, sum(len(tar.labels) for tar in parsed))
    twice = sum(tar.repeated for tar in parsed)
    if twice:
        print(f"{folder}: {twice:,} names occur more than once in their tar; each is a sample of its own.")

    classes = _class_names(folder, classes_file, [label for tar in parsed for label in tar.labels])
    number = {name: k for k, name in enumerate(classes)}
    for tar in parsed:
        tar.rows["label"] = [label if isinstance(label, int) else number[label] for label in tar.labels]
    parts: dict[str, list[tuple[Path, Parsed]]] = {name: [] for name in SPLITS}
    for path, tar in zip(paths, parsed, strict=True):
        if tar.labels:
            parts[_split_of(path.relative_to(folder))].append((path, tar))
    parts = {name: part for name, part in parts.items() if part}
    sizes = {tuple(pair) for tar in parsed for pair in np.unique(tar.rows[["height", "width"]]).tolist()}
    if (0, 0) in sizes and len(sizes) > 1:
        raise UserError(f"{folder}: holds pictures and vectors (.npy); expected one kind.")
    mean, std, features = _statistics(folder, next(iter(parts.values())), workers, vectors=(0, 0) in sizes)
    with writing(folder):
        (folder / "index.json").unlink(missing_ok=True)  # the old one does not fit the new tables
        splits = {name: _write_table(folder, name, part, len(classes)) for name, part in parts.items()}
        save_index(ShardIndex(
            folder=str(folder), name=folder.resolve().name, classes=[printable(c) for c in classes], splits=splits,
            mean=mean, std=std, image_size=sizes.pop() if len(sizes) == 1 and features is None else None,
            features=features, left_out=left_out, source={"foreign": True},
        ))  # fmt: skip
    return load_index(folder)


def _write_table(folder: Path, name: str, part: list[tuple[Path, Parsed]], num_classes: int) -> SplitIndex:
    table = np.concatenate([tar.rows for _, tar in part])
    names = [printable(f"{path.relative_to(folder)}/{key}") for path, tar in part for key in tar.keys]
    return SplitIndex(
        name=name,
        folder=str(folder),
        files=[str(path.relative_to(folder)) for path, _ in part],
        shard_samples=np.array([len(tar.rows) for _, tar in part], np.int64),
        shard_bytes=np.array([path.stat().st_size for path, _ in part], np.int64),
        shard_checksums=[tar.checksum for _, tar in part],
        class_counts=np.bincount(table["label"], minlength=num_classes),
        table_checksum=save_table(folder, name, table, names),
    )


def _check_own(folder: Path) -> None:
    path = folder / "index.json"
    if not path.exists():
        return
    try:
        foreign = json.loads(path.read_text())["source"].get("foreign")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        foreign = False
    if not foreign:
        raise UserError(
            f"{path}: exists and was not written by dist-train index.\n"
            f"  A set that dist-train shard made needs no other index; remove the file if it is something else."
        )


def _check_left_out(folder: Path, left_out: list[dict], max_bad: int, num_good: int) -> None:
    few = "".join(f"\n  {entry['name']}: {entry['why']}" for entry in left_out[:5])
    if not num_good:
        raise UserError(
            f"{folder}: no usable sample in the tars; expected a picture (.jpg, .png, .webp) or vector (.npy) "
            f"and a label (.cls, or .json with a label) of the same name.{few}"
        )
    if len(left_out) > max_bad:
        raise UserError(
            f"{folder}: {len(left_out):,} of {len(left_out) + num_good:,} samples cannot be used; max_bad allows "
            f"{max_bad}.{few}\n  Index the others with --max-bad {len(left_out)}; the index names what is left out."
        )


def _class_names(folder: Path, classes_file: str | None, labels: list[int | str]) -> list[str]:
    """Class names by number: from the file, from the labels where those are names, or the numbers themselves."""
    path = Path(classes_file) if classes_file else folder / "classes.txt"
    given = []
    if classes_file or path.exists():
        try:
            given = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
        if len(set(given)) < len(given):
            raise UserError(f"{path}: names a class twice; expected a class name a line.")
    distinct = set(labels)
    words = sorted(label for label in distinct if isinstance(label, str))
    if words and len(words) < len(distinct):
        number = next(label for label in labels if isinstance(label, int))
        raise UserError(
            f"{folder}: some labels are names ({words[0]!r}) and some numbers ({number}); expected one kind."
        )
    if words:
        unknown = [word for word in words if given and word not in given]
        if unknown:
            raise UserError(f"{path}: does not name the class {unknown[0]!r}, which is a label in the tars.")
        return given or words
    highest = max(distinct)
    if given and highest >= len(given):
        from_one = "; are they numbered from 1?" if highest == len(given) and 0 not in distinct else "."
        raise UserError(f"{path}: names {len(given)} classes, but labels go up to {highest}{from_one}")
    if highest >= 1_000_000:
        raise UserError(f"{folder}: labels go up to {highest:,}; expected class numbers from 0.")
    return given or [str(k) for k in range(highest + 1)]


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")


def _statistics(
    folder: Path, part: list[tuple[Path, Parsed]], workers: int, vectors: bool
) -> tuple[list[float], list[float], list[str] | None]:
    """Mean, std and, for vectors, names for the features, from up to _STATISTICS_SAMPLES samples of a split."""
    every = -(-sum(len(tar.rows) for _, tar in part) // _STATISTICS_SAMPLES)
    tasks = [(path, tar.rows["offset"][::every], tar.rows["size"][::every]) for path, tar in part]
    if vectors:
        values = [vector for task in tasks for vector in _read_vectors(*task)]
        if len({vector.shape for vector in values}) > 1:
            raise UserError(f"{folder}: the vectors (.npy) differ in length; expected one length.")
        values = np.array(values, np.float64)
        std = values.std(axis=0)
        features = [f"feature {k}" for k in range(values.shape[1])]
        return values.mean(axis=0).tolist(), np.where(std > 0, std, 1.0).tolist(), features
    from dist_train.pictures import mean_and_std

    sums = [result for _, result in run_tasks(_sum_pixels, tasks, workers, lambda samples: None)]
    damaged = sum(number for number, _ in sums)
    if damaged:
        decoded = sum(len(task[1]) for task in tasks)
        print(f"{folder}: {damaged:,} of {decoded:,} pictures, decoded for mean and std, are damaged.")
    return *mean_and_std([sum(column) for column in zip(*(totals for _, totals in sums), strict=True)]), None


def _read_vectors(path: Path, offsets: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    with open(path, "rb") as file:
        return [read_vector(_read(file, *place)) for place in zip(offsets.tolist(), sizes.tolist(), strict=True)]


def _sum_pixels(task: tuple[Path, np.ndarray, np.ndarray]) -> tuple[int, list[int]]:
    """(number of pictures that cannot be decoded, `PixelSums` of the others)."""
    from dist_train.pictures import PixelSums, prepare

    path, offsets, sizes = task
    sums, damaged = PixelSums(), 0
    with open(path, "rb") as file:
        for place in zip(offsets.tolist(), sizes.tolist(), strict=True):
            damaged += sum(isinstance(picture, Exception) for picture in prepare([_read(file, *place)], sums))
    return damaged, sums.finished()


def _read(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
