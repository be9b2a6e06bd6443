"""What is in the shards: classes, counts, offsets, labels, checksums. Only this file knows how the index is stored.

shards/NAME/index.json            classes, statistics, and per split the shard files with counts and checksums
shards/NAME/train.samples.npy     one row (SAMPLE) a sample, in shard order
shards/NAME/train.names.txt       one line a sample: where it came from
shards/NAME/train-000000.tar ...  plain WebDataset
"""

import itertools
import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from dist_train.durable import put_in_place, replace_text
from dist_train.errors import UserError

FORMAT = "dist_train index 1"

# One sample: where its picture (or vector) lies in its shard, what it is, and what its bytes hash to.
SAMPLE = np.dtype([
    ("offset", "<u8"),    # first byte of the payload in the tar
    ("size", "<u4"),      # bytes of the payload
    ("label", "<i4"),     # class number
    ("height", "<u2"),    # pixels as displayed (EXIF applied), 0 for tables
    ("width", "<u2"),
    ("checksum", "<u8"),  # xxh3_64 of the payload
])  # fmt: skip


@dataclass(frozen=True)
class SplitIndex:
    """One split. Samples are numbered 0..num_samples-1 in shard order; shard k holds first[k]..first[k+1]-1."""

    name: str
    folder: str
    files: list[str]
    shard_samples: np.ndarray  # (S,) int64
    shard_bytes: np.ndarray  # (S,) int64
    shard_checksums: list[str]  # xxh3_128 of the whole file, hex
    class_counts: np.ndarray  # (K,) int64
    table_checksum: str = ""  # xxh3_128 of the table and, after a blank, of the names where they are kept, hex
    remote: object = None  # shard_cache.RemoteShards where the shards are fetched when they are needed
    first: np.ndarray = field(init=False)  # (S + 1,) int64

    def __post_init__(self):
        object.__setattr__(self, "first", np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64))

    @property
    def num_samples(self) -> int:
        return int(self.first[-1])

    @property
    def num_shards(self) -> int:
        return len(self.shard_samples)

    @property
    def stored(self) -> "SplitIndex":
        """The split as it lies in the shards: another one where this is a part of it (folds.Part)."""
        return self

    def stored_numbers(self, samples: np.ndarray) -> np.ndarray:
        """Numbers in the stored split of samples of this one. (n,) int64 each."""
        return samples

    def table(self) -> np.ndarray:
        """(num_samples,) SAMPLE rows, mapped: only what is touched is read."""
        path = Path(self.folder, f"{self.name}.samples.npy")
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot read the table of samples: {error}\n  {_advice(self.folder)}") from None
        if table.dtype != SAMPLE or len(table) != self.num_samples:
            raise UserError(
                f"{path}: {len(table)} rows of {table.dtype}, but the index counts {self.num_samples} samples."
                f"\n  {_advice(self.folder)}"
            )
        return table

    @property
    def rows_checksum(self) -> str:
        """xxh3_128 of the table of samples alone, hex."""
        return self.table_checksum.partition(" ")[0]

    @property
    def table_files(self) -> dict[str, str]:
        """File name -> checksum, of the table of samples, and of their names where they are kept."""
        names = self.table_checksum.partition(" ")[2]
        return {f"{self.name}.samples.npy": self.rows_checksum} | ({f"{self.name}.names.txt": names} if names else {})

    def check_table(self) -> None:
        """Raise UserError where the table of samples is not the one that the index was written with."""
        path = Path(self.folder, f"{self.name}.samples.npy")
        try:
            is_ours = file_checksum(path) == self.rows_checksum
        except OSError as error:
            raise UserError(f"{path}: cannot read the table of samples: {error}\n  {_advice(self.folder)}") from None
        if not is_ours:
            raise UserError(
                f"{path}: its checksum differs from the index: positions and labels in it cannot be trusted."
                f"\n  {_advice(self.folder)}"
            )

    def names(self) -> list[str]:
        """Where each sample came from: a path relative to the source, in sample order; empty if not kept."""
        path = Path(self.folder, f"{self.name}.names.txt")
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def fingerprint(self) -> str:
        """What the split holds, in which order: two splits with the same one give the same stream."""
        return xxhash.xxh3_64_hexdigest("".join(self.shard_checksums).encode() + self.shard_samples.tobytes())

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """Shard number of each sample number. samples: (n,) int64."""
        return np.searchsorted(self.first, samples, side="right") - 1


@dataclass(frozen=True)
class JoinedSplits(SplitIndex):
    """Splits of a set as one, such as train+val: the shards of the first, then those of the next."""

    parts: tuple[SplitIndex, ...] = ()

    def table(self) -> np.ndarray:
        return np.concatenate([part.table() for part in self.parts])

    def check_table(self) -> None:
        for part in self.parts:
            part.stored.check_table()

    def names(self) -> list[str]:
        names = [part.names() for part in self.parts]
        return list(itertools.chain(*names)) if all(names) else []

    def fingerprint(self) -> str:
        return xxhash.xxh3_64_hexdigest("+".join(part.fingerprint() for part in self.parts).encode())


@dataclass(frozen=True)
class ShardIndex:
    """A whole set. image_size is (height, width) where all pictures are alike, else None; tables have features."""

    folder: str
    name: str
    classes: list[str]
    splits: dict[str, SplitIndex]
    mean: list[float]  # of the training split: per channel of pixels/255, or per feature
    std: list[float]
    image_size: tuple[int, int] | None = None
    features: list[str] | None = None  # names of a table's columns; None for pictures
    left_out: list[dict] = field(default_factory=list)  # {"name": ..., "why": ...} of samples not converted
    source: dict = field(default_factory=dict)  # the settings it was converted with

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def is_foreign(self) -> bool:
        """Whether the tars were made by others, and only indexed here."""
        return bool(self.source.get("foreign"))

    def find(self, name: str) -> SplitIndex | None:
        """A split of the set, or several of them as one, named train+val; None where the set has none of the name."""
        if name in self.splits:
            return self.splits[name]
        parts = dict.fromkeys(name.split("+"))
        return _joined(name, tuple(self.splits[part] for part in parts)) if parts.keys() <= self.splits.keys() else None

    def split(self, name: str) -> SplitIndex:
        """As `find`; raises UserError where there is none of the name."""
        if (split := self.find(name)) is None:
            raise UserError(f"{self.folder}: there is no split {name!r}; it has {', '.join(self.splits)}.")
        return split

    def check_tables(self, names: set[str]) -> None:
        """`SplitIndex.check_table` of those of the splits that there are; of a part, its whole's."""
        found = [split.stored for name in sorted(names) if (split := self.find(name))]
        for split in {id(split): split for split in found}.values():
            split.check_table()


def load_index(folder: str | os.PathLike, cache_dir: str = "", cache_gb: float = 100.0) -> ShardIndex:
    """Read shards/NAME/index.json. Raises UserError if it is missing, damaged, or of another format.

    folder may be a URL, or hold an index of tars behind URLs; its shards are then kept in cache_dir, up to cache_gb of them
    (data.cache_dir, data.cache_gb).
    """
    if not str(folder):
        raise UserError("no shards are named: --data.shards shards/NAME, or a recipe that sets data.shards.")
    if "://" in str(folder):
        from dist_train.remote_index import load_remote_index

        return load_remote_index(str(folder), cache_dir, cache_gb)
    path = Path(folder, "index.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        from dist_train.sources import holds_pictures

        what = "the folder has no index.json" if Path(folder).is_dir() else "there is no such folder"
        convert = "datasets/NAME.yaml"
        if holds_pictures(folder):
            convert = f"--source folder --path {shlex.quote(str(folder))} --out shards/NAME"
        raise UserError(
            f"{folder}: {what}, so these are not finished shards.\n  Write them with: dist-train shard {convert}"
            f"   (or index tars made by others with: dist-train index {folder})"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}\n  {_write_again(folder)}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{path}: format is {found!r}; this version reads {FORMAT!r}.\n  {_write_again(folder)}")
    if raw.pop("checksum", None) != _json_checksum(raw):
        raise UserError(f"{path}: its own checksum does not match: the file was changed or damaged.\n  {_write_again(folder)}")
    splits = {
        name: SplitIndex(
            name=name, folder=str(folder), files=s["files"], shard_checksums=s["checksums"],
            shard_samples=np.asarray(s["samples"], np.int64), shard_bytes=np.asarray(s["bytes"], np.int64),
            class_counts=np.asarray(s["class_counts"], np.int64), table_checksum=s["table_checksum"],
        )
        for name, s in raw["splits"].items()
    }  # fmt: skip
    index = ShardIndex(
        folder=str(folder), name=raw["name"], classes=raw["classes"], splits=splits, mean=raw["mean"], std=raw["std"],
        image_size=tuple(raw["image_size"]) if raw["image_size"] else None, features=raw["features"],
        left_out=raw["left_out"], source=raw["source"],
    )  # fmt: skip
    if any("://" in file for split in splits.values() for file in split.files):
        from dist_train.remote_index import behind_urls

        return behind_urls(index, cache_dir, cache_gb)
    return index


def _joined(name: str, parts: tuple[SplitIndex, ...]) -> JoinedSplits:
    return JoinedSplits(
        name=name, folder=parts[0].folder, files=[file for part in parts for file in part.files],
        shard_samples=np.concatenate([part.shard_samples for part in parts]),
        shard_bytes=np.concatenate([part.shard_bytes for part in parts]),
        shard_checksums=[checksum for part in parts for checksum in part.shard_checksums],
        class_counts=np.sum([part.class_counts for part in parts], axis=0),
        table_checksum="+".join(part.rows_checksum for part in parts), remote=parts[0].remote, parts=parts,
    )  # fmt: skip


def holds_foreign_index(folder: str | os.PathLike) -> bool:
    """Whether there is an index of tars made by others; nothing else of it needs to be whole or of this version."""
    try:
        return bool(json.loads(Path(folder, "index.json").read_text(encoding="utf-8"))["source"].get("foreign"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def save_table(folder: str | os.PathLike, split: str, rows: np.ndarray, names: list[str]) -> str:
    """Write a split's table of samples and its names; return their checksums for `save_index`, a blank between.

    rows: (num_samples,) SAMPLE in shard order.
    """
    path = Path(folder, f"{split}.samples.npy")
    partial = path.with_name(f"{path.name}.partial")  # a training that reads the old table keeps it
    with open(partial, "wb") as file:
        np.save(file, rows.astype(SAMPLE, copy=False), allow_pickle=False)
    put_in_place(partial, path)
    checksum = file_checksum(path)
    if names:
        path = Path(folder, f"{split}.names.txt")
        replace_text(path, "".join(f"{name}\n" for name in names))
        checksum += f" {file_checksum(path)}"
    return checksum


def save_index(index: ShardIndex) -> None:
    """Write index.json, last and whole: a folder without one is unfinished."""
    raw = {
        "format": FORMAT, "name": index.name, "classes": index.classes, "mean": index.mean, "std": index.std,
        "image_size": index.image_size and list(index.image_size), "features": index.features,
        "source": index.source, "left_out": index.left_out,
        "splits": {
            s.name: {
                "class_counts": s.class_counts.tolist(), "table_checksum": s.table_checksum, "files": s.files,
                "samples": s.shard_samples.tolist(), "bytes": s.shard_bytes.tolist(), "checksums": s.shard_checksums,
            }
            for s in index.splits.values()
        },
    }  # fmt: skip
    raw["checksum"] = _json_checksum(raw)
    replace_text(Path(index.folder, "index.json"), json.dumps(raw, indent=1))


def simulated_split(num_samples: int, num_shards: int) -> SplitIndex:
    """A made-up split of evenly filled shards, of samples of 100 kB, for planning without data."""
    counts = np.full(num_shards, num_samples // num_shards, np.int64)
    counts[: num_samples % num_shards] += 1
    files = [f"train-{k:06d}.tar" for k in range(num_shards)]
    return SplitIndex("train", "", files, counts, counts * 100_000, [""] * num_shards, np.array([num_samples]))


def file_checksum(path: str | os.PathLike | int) -> str:
    """xxh3_128 of a file's bytes, hex; a descriptor is read from where it stands, and closed."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _json_checksum(raw: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(raw, sort_keys=True).encode())


def _write_again(folder) -> str:
    """What to do about an index.json without which nothing else can be looked at."""
    if holds_foreign_index(folder):
        return f"Index the tars again with dist-train index and the options of then, --out {folder} if they lie elsewhere."
    return ("Write the set again with dist-train shard and --overwrite true. Of tars made by others, remove index.json, and index "
            "them again.")  # fmt: skip


def _advice(folder) -> str:
    return f"See what is wrong, and what mends it, with: dist-train verify {folder}"
