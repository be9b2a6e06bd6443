"""k-fold cross-validation on shards as they lie: a fold is a view of the index, and nothing is written anew.

With data.folds: 5 and data.fold: 2, the training split is dealt into 5 parts, part 2 takes the place of the validation
split, and the other 4 are trained on. Which part a sample belongs to follows from its number, its class and the seed.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import xxhash

from dist_train.config import RunConfig
from dist_train.decode import decode_from_files
from dist_train.errors import UserError
from dist_train.index import ShardIndex, SplitIndex, load_index
from dist_train.order import hash_words, mix
from dist_train.pictures import PixelSums, mean_and_std
from dist_train.store import Store
from dist_train.tables import column_statistics, untaught_columns
from dist_train.workers import num_cores

_FOLDS = 0x464F4C44  # what the hash is for, so that folds share no random bits with the order or the augmentation


@dataclass(frozen=True)
class Part(SplitIndex):
    """Some samples of a split, numbered 0..num_samples-1 in shard order."""

    whole: SplitIndex | None = None
    members: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) int64, ascending numbers in the whole

    @property
    def stored(self) -> SplitIndex:
        return self.whole

    def stored_numbers(self, samples: np.ndarray) -> np.ndarray:
        return self.members[samples]

    def table(self) -> np.ndarray:
        return self.whole.table()[self.members]

    def names(self) -> list[str]:
        names = self.whole.names()
        return [names[member] for member in self.members.tolist()] if names else []

    def fingerprint(self) -> str:
        return xxhash.xxh3_64_hexdigest(self.whole.fingerprint().encode() + self.members.tobytes())


def open_index(config: RunConfig) -> ShardIndex:
    """The index that a run trains on: that of data.shards, or its fold, with the statistics of the fold's training part.

    Where model.pretrained brings statistics (`pretrained.published_statistics`), they are those; where data.mean is set, that.
    """
    index = view_of(config)
    mean, std = statistics_of(index, config)
    return replace(index, mean=mean, std=std)


def view_of(config: RunConfig) -> ShardIndex:
    """`open_index` without what takes long: its statistics are still those of the whole set."""
    return fold_view(load_index(config.data.shards, config.data.cache_dir, config.data.cache_gb), config)


def statistics_of(index: ShardIndex, config: RunConfig) -> tuple[list[float], list[float]]:
    """(mean, std) with which a run on the index of `view_of` begins, as in `open_index`; of a fold, its pictures are read."""
    if config.data.mean:
        return list(config.data.mean), list(config.data.std)
    if config.model.pretrained and index.features is None:
        from dist_train.pretrained import published_statistics

        if found := published_statistics(config.model):
            return found
    if not config.data.folds:
        return index.mean, index.std
    return statistics(index, index.split(config.data.train_split), config.data.threads)


def fold_view(index: ShardIndex, config: RunConfig) -> ShardIndex:
    """The index with the fold's parts as training and validation splits; the index itself where data.folds is 0.

    mean and std stay those of the index: see `open_index`. Raises UserError where the settings make no folds.
    """
    data = config.data
    if not data.folds:
        return index
    problems = []
    if data.folds < 2:
        problems.append(f"data.folds is {data.folds}; expected 0 for none, or 2 and more.")
    if not 0 <= data.fold < data.folds:
        problems.append(f"data.fold is {data.fold}; expected 0 to {data.folds - 1}, since data.folds is {data.folds}.")
    if data.val_split in ("", "none", data.train_split):
        problems.append(f"data.val_split is {data.val_split!r}; with data.folds the fold takes its place: name it val, say.")
    whole = index.split(data.train_split)
    if whole.num_samples < data.folds:
        problems.append(
            f"{index.folder}: {data.train_split} has {whole.num_samples} samples, too few for data.folds {data.folds}."
        )
    if group := index.source.get("group"):
        problems.append(f"{index.folder}: its splits keep the groups of column {group!r} whole; data.folds would not: set it to 0.")
    if problems:
        raise UserError("\n".join(problems))
    labels = np.asarray(whole.table()["label"])
    inside = fold_of(labels, data.folds, config.seed) == data.fold
    parts = {data.train_split: part_of(whole, data.train_split, np.flatnonzero(~inside), labels),
             data.val_split: part_of(whole, data.val_split, np.flatnonzero(inside), labels)}  # fmt: skip
    return replace(index, splits=index.splits | parts)


def fold_of(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """The fold of every sample: (N,) int64 in 0..num_folds-1. labels: (N,) class numbers, in sample order.

    Stratified: the folds differ by at most one sample of each class, and by at most one sample in all.
    """
    draws = mix(np.arange(len(labels), dtype=np.uint64) ^ hash_words(seed, _FOLDS))
    folds = np.empty(len(labels), np.int64)
    folds[np.lexsort((draws, labels))] = np.arange(len(labels)) % num_folds  # dealt class by class, shuffled inside a class
    return folds


def part_of(whole: SplitIndex, name: str, members: np.ndarray, labels: np.ndarray) -> Part:
    """A part of a split under a name. members: (M,) ascending sample numbers; labels: (N,) of the whole."""
    return Part(
        name=name, folder=whole.folder, files=whole.files, shard_bytes=whole.shard_bytes, remote=whole.remote,
        shard_samples=np.bincount(whole.shard_of(members), minlength=whole.num_shards).astype(np.int64),
        shard_checksums=whole.shard_checksums, table_checksum=whole.table_checksum, whole=whole, members=members,
        class_counts=np.bincount(labels[members], minlength=len(whole.class_counts)).astype(np.int64),
    )  # fmt: skip


@cache
def _tell_once(line: str) -> None:
    """Print a line to stderr, once a process: the folds of every trial have much the same to say."""
    print(line, file=sys.stderr)


def statistics(index: ShardIndex, split: SplitIndex, num_threads: int = 0) -> tuple[list[float], list[float]]:
    """(mean, std) over the samples of a split: per column of a table (`column_statistics`), or per channel of pixels/255.

    Reads the split once; pictures are decoded as they are stored. Raises UserError if a sample cannot be read.
    """
    num_threads = num_threads or num_cores()
    store, samples = Store(split.stored, 2 * num_threads), split.stored_numbers(np.arange(split.num_samples))
    if index.features is not None:
        rows = store.read_vectors(samples, np.empty((len(samples), len(index.features)), np.float32))
        for note in untaught_columns(rows, index.features):
            _tell_once(f"{index.folder}: {note}")
        return column_statistics(rows)

    def sums_of(part: np.ndarray) -> list[int]:
        sums = PixelSums()
        for sample in part.tolist():
            at, row = store.locate(np.array([sample])), store.table[sample]
            out = np.empty((1, int(row["height"]), int(row["width"]), 3), np.uint8)
            if failures := decode_from_files(at.fds, at.offsets, at.sizes, at.checksums, None, out):
                raise store.fault(sample, failures[0][1])
            sums.add(out)
        return sums.totals()

    with ThreadPoolExecutor(num_threads) as pool:  # sums of integers: the same on any number of threads
        totals = list(pool.map(sums_of, np.array_split(samples, min(len(samples), 16 * num_threads))))
    return mean_and_std([sum(column) for column in zip(*totals, strict=True)])
