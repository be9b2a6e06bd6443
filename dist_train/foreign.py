"""`dist-train index`: WebDataset tars made by others are indexed where they lie, on a disk or behind URLs; they are only read."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_train.durable import writing
from dist_train.errors import UserError
from dist_train.foreign_tar import Parsed
from dist_train.index import ShardIndex, SplitIndex, holds_foreign_index, load_index, save_index, save_table
from dist_train.read_foreign import Sums, read_tars
from dist_train.remote import is_remote, shown
from dist_train.shard_cache import DEFAULT_GB, ShardCache, default_folder
from dist_train.sources import SPLIT_WORDS, SPLITS, first_of, printable
from dist_train.tables import CONSTANT_STD, NUM_TOLD, column_statistics, first_lines, untaught_columns
from dist_train.tar_lists import NamedTar, named_tars

_STATISTICS_SAMPLES = 20_000  # decoded a split for mean and std: the third digit is settled far earlier


def main(argv: list[str]) -> None:
    """`dist-train index PATH_OR_URL... [--out DIR] [--classes FILE] [--max-bad N]`. Raises UserError."""
    parser = argparse.ArgumentParser("dist-train index", description="Index WebDataset tars made by others, in place.")
    parser.add_argument("tars", metavar="PATH_OR_URL", nargs="+",
                        help="folders with .tar files, .tar files, URLs of them (https, s3, gs, az), 'x-{000..107}.tar', or "
                             "wids lists of shards (.json)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where the index goes; default beside the tars; needed for URLs")
    parser.add_argument("--classes", metavar="FILE",
                        help="a class name a line; default DIR/classes.txt, else labels that are names, sorted, or numbers")
    parser.add_argument("--max-bad", type=int, default=0, help="unusable samples left out before it gives up; default 0")
    parser.add_argument("--cache-dir", default="", help="where tars behind URLs are kept, as data.cache_dir")
    parser.add_argument("--cache-gb", type=float, default=DEFAULT_GB, help="most they take there, as data.cache_gb")
    options = parser.parse_args(argv)
    cache = ShardCache(default_folder(options.cache_dir), int(options.cache_gb * 1e9))
    index = index_tars(options.tars, options.classes, options.max_bad, options.out, cache)
    from dist_train.shard import print_summary

    print_summary(index)
    print(f"{index.folder}: indexed.")


def index_tars(
    names: str | Path | Sequence[str | Path], classes_file: str | None = None, max_bad: int = 0, out: str | Path | None = None,
    cache: ShardCache | None = None,
) -> ShardIndex:  # fmt: skip
    """Write index.json and the tables of samples for plain WebDataset tars; returns the index.

    names: as `tar_lists.named_tars`. The index goes to `out`, or beside the tars; those behind URLs are fetched into the
    cache, as many as it may hold, and the index names their URLs.

    A sample is the members that share a name up to the first dot of the file name: a payload (.jpg, .jpeg, .png, .webp, or
    .npy with a float32 vector) and a label: .cls, or .json with an entry called label, cls, class or target; a class number,
    or a class name. Members may come in any order; a name that comes twice makes two samples, as it does for WebDataset.

    The split is the first word that names one in the file's path below the folder that was named (train-0.tar, x_val_3.tar,
    test/0.tar); of a tar named itself, in the file's name or else its folder's. Tars without such a word train. Mean and std
    are those of up to 20,000 training samples, taken evenly from every tar. Index files of other tools must agree with the
    tars: DALI's beside them, and wids lists. Raises UserError where they do not, or where more than max_bad samples are
    unusable; those left out are named in the index.
    """
    names = [str(name) for name in ([names] if isinstance(names, str | Path) else names)]
    tars = named_tars(names)
    home, folder = _folders(names, tars, out)
    what = shown(names[0]) + (" ..." if len(names) > 1 else "")
    _check_own(folder)
    cache = cache or ShardCache(default_folder(), int(DEFAULT_GB * 1e9))
    of_split = [_split_of(tar.words) for tar in tars]
    if unnamed := [shown(tar.place) for tar, split in zip(tars, of_split, strict=True) if not split and any(of_split)]:
        more = f" and {len(unnamed) - 3} more" if unnamed[3:] else ""
        print(f"{', '.join(unnamed[:3])}{more}: no split in the name, taken for train", file=sys.stderr)
    of_split = [split or "train" for split in of_split]
    most_decoded = [-(-_STATISTICS_SAMPLES // of_split.count(split)) for split in of_split]
    parsed, sums = zip(*read_tars(tars, most_decoded, cache), strict=True)
    files = [_file_name(tar.place, folder) for tar in tars]
    left_out = [{"name": f"{shown(file)}: {printable(key)}", "why": why}
                for file, tar in zip(files, parsed, strict=True) for key, why in tar.bad]  # fmt: skip
    left_aside = list(dict.fromkeys(extension for tar in parsed for extension in tar.left_aside))
    _check_left_out(what, left_out, max_bad, sum(len(tar.labels) for tar in parsed), left_aside)
    _name_damaged(what, files, of_split, sums)
    twice = sum(tar.repeated for tar in parsed)
    if twice:
        print(f"{what}: {twice:,} names occur more than once in their tar; each is a sample of its own.")
    if any(shown(file) != file for file in files):
        print(f"{folder}: its index.json holds the password or signature of the URLs; show it to nobody who may not have it.")

    classes = _class_names(what, _classes_path(classes_file, home, folder), [label for tar in parsed for label in tar.labels])
    number = {name: k for k, name in enumerate(classes)}
    for tar in parsed:
        tar.rows["label"] = [label if isinstance(label, int) else number[label] for label in tar.labels]
    parts = {name: [k for k, split in enumerate(of_split) if split == name and parsed[k].labels] for name in SPLITS}
    parts = {name: part for name, part in parts.items() if part}
    sizes = {tuple(pair) for tar in parsed for pair in np.unique(tar.rows[["height", "width"]]).tolist()}
    if (0, 0) in sizes and len(sizes) > 1:
        raise UserError(f"{what}: holds pictures and vectors (.npy); expected one kind.")
    lengths = sorted(set().union(*(tar.lengths for tar in parsed)))
    if len(lengths) > 1:
        raise UserError(f"{what}: the vectors (.npy) differ in length: {lengths[0]} and {lengths[1]}; expected one length.")
    mean, std, features = _statistics(what, [sums[k] for k in next(iter(parts.values()))], vectors=(0, 0) in sizes)
    source = {"foreign": True} | ({} if [Path(name) for name in names] == [folder] else {"tars": names})
    source |= {"classes": str(classes_file)} if classes_file else {}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)  # the old one does not fit the new tables
        splits = {name: _write_table(folder, name, [(files[k], parsed[k]) for k in part], len(classes))
                  for name, part in parts.items()}  # fmt: skip
        save_index(ShardIndex(
            folder=str(folder), name=folder.resolve().name, classes=[printable(c) for c in classes], splits=splits,
            mean=mean, std=std, image_size=sizes.pop() if len(sizes) == 1 and features is None else None,
            features=features, left_out=left_out, source=source,
        ))  # fmt: skip
    return load_index(folder, str(cache.folder), cache.limit_bytes / 1e9)


def _folders(names: list[str], tars: list[NamedTar], out: str | Path | None) -> tuple[Path | None, Path]:
    """(the folder that holds all tars, or None behind URLs; the folder of the index)."""
    if is_remote(tars[0].place):
        if not out:
            raise UserError(f"{shown(names[0])}: an index cannot be written there; name a folder for it with --out DIR.")
        return None, Path(out)
    is_one_folder = len(names) == 1 and os.path.isdir(names[0])
    home = Path(names[0] if is_one_folder else os.path.commonpath([os.path.dirname(tar.place) for tar in tars]))
    return home, Path(out or home)


def _file_name(place: str, folder: Path) -> str:
    """A tar as the index names it: below its folder where it lies there, else in full."""
    below = ".." if is_remote(place) else os.path.relpath(place, folder)
    return place if below.split(os.sep)[0] == ".." else below


def _write_table(folder: Path, name: str, part: list[tuple[str, Parsed]], num_classes: int) -> SplitIndex:
    table = np.concatenate([tar.rows for _, tar in part])
    names = [printable(f"{shown(file)}/{key}") for file, tar in part for key in tar.keys]
    return SplitIndex(
        name=name,
        folder=str(folder),
        files=[file for file, _ in part],
        shard_samples=np.array([len(tar.rows) for _, tar in part], np.int64),
        shard_bytes=np.array([tar.num_bytes for _, tar in part], np.int64),
        shard_checksums=[tar.checksum for _, tar in part],
        class_counts=np.bincount(table["label"], minlength=num_classes),
        table_checksum=save_table(folder, name, table, names),
    )


def _check_own(folder: Path) -> None:
    path = folder / "index.json"
    if path.exists() and not holds_foreign_index(folder):
        raise UserError(
            f"{path}: exists and was not written by dist-train index.\n"
            f"  A set that dist-train shard made needs no other index; remove the file if it is something else."
        )


def _check_left_out(what: str, left_out: list[dict], max_bad: int, num_good: int, left_aside: list[str]) -> None:
    few = first_lines([f"{entry['name']}: {entry['why']}" for entry in left_out])
    if not num_good:
        found = first_of([f".{printable(extension)}" for extension in left_aside], NUM_TOLD)
        aside = f"\n  What there is: {found}; what follows the first dot of a file name is its extension." * bool(found)
        raise UserError(
            f"{what}: no usable sample in the tars; expected a picture (.jpg, .png, .webp) or vector (.npy) "
            f"and a label (.cls, or .json with a label) of the same name.{few}{aside}"
        )
    if len(left_out) > max_bad:
        raise UserError(
            f"{what}: {len(left_out):,} of {len(left_out) + num_good:,} samples cannot be used; max_bad allows "
            f"{max_bad}.{few}\n  Index the others with --max-bad {len(left_out)}; the index names what is left out."
        )


def _name_damaged(what: str, files: list[str], of_split: list[str], sums: Sequence[Sums]) -> None:
    """Print which of the pictures that were decoded cannot be, and what to do: they are in the index all the same."""
    damaged = [(split, f"{shown(file)}: {printable(key)}: {why}")
               for file, split, tar in zip(files, of_split, sums, strict=True) for key, why in tar.damaged]  # fmt: skip
    if not damaged:
        return
    decoded, in_train = sum(tar.num_decoded for tar in sums), sum(split == "train" for split, _ in damaged)
    others = [split for split in dict.fromkeys(split for split, _ in damaged) if split != "train"]
    print(f"{what}: {len(damaged):,} of {decoded:,} pictures decoded are damaged, and in the index all the same:"
          f"{first_lines([line for _, line in damaged])}")  # fmt: skip
    if in_train:
        more = " or more: not all were decoded" if any(tar.weight > 1 for tar in sums) else ""
        print(f"  Write the tars without them, or train with --data.max_bad {in_train}{more}.")
    if others:
        print(f"  An evaluation needs every picture: write the tars of {' and '.join(others)} without them.")


def _classes_path(classes_file: str | None, home: Path | None, folder: Path) -> Path | None:
    if classes_file:
        return Path(classes_file)
    return next((path / "classes.txt" for path in (home, folder) if path and (path / "classes.txt").exists()), None)


def _class_names(what: str, path: Path | None, labels: list[int | str]) -> list[str]:
    """Class names by number: from the file, from the labels where those are names, or the numbers themselves."""
    given = []
    if path:
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
        raise UserError(f"{what}: some labels are names ({words[0]!r}) and some numbers ({number}); expected one kind.")
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
        raise UserError(f"{what}: labels go up to {highest:,}; expected class numbers from 0.")
    return given or [str(k) for k in range(highest + 1)]


def _split_of(path: str) -> str:
    words = re.split(r"[^a-z]+", path.lower())
    return next((SPLITS[SPLIT_WORDS[word]] for word in words if word in SPLIT_WORDS), "")


def _statistics(what: str, sums: list[Sums], vectors: bool) -> tuple[list[float], list[float], list[str] | None]:
    """Mean, std and, for vectors, names for the features, from the sums of a split's tars."""
    if vectors:
        values = np.array([vector for tar in sums for vector in tar.vectors])
        weights = np.repeat([tar.weight for tar in sums], [len(tar.vectors) for tar in sums])
        features = [f"feature {k}" for k in range(values.shape[1])]
        if np.isinf(values).any():
            first = features[int(np.isinf(values).any(axis=0).argmax())]
            raise UserError(f"{what}: some vectors are infinite at {first}; expected numbers, or NaN where one is missing.\n"
                            f"  Write the tars again without them.")  # fmt: skip
        if num_holes := int(np.isnan(values).sum()):
            print(f"{what}: {num_holes:,} of the {values.size:,} values read for mean and std are missing (NaN): they count as "
                  f"their column's mean.")  # fmt: skip
        mean, std = column_statistics(values, weights)
        if (weights == 1).all():
            for note in untaught_columns(values, features):
                print(f"{what}: {note}")
        else:  # rows that were not read may differ
            std = [1.0 if value == CONSTANT_STD else value for value in std]
        return mean, std, features
    from dist_train.pictures import mean_and_std

    return *mean_and_std([sum(tar.weight * tar.pixels[k] for tar in sums) for k in range(7)]), None
