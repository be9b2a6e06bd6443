"""Which sample goes into which split and which shard: pure functions, decided before anything is written."""

import numpy as np
import xxhash

from dist_train.order import hash_words, mix
from dist_train.sources import SPLITS

TRAIN, VAL, TEST = range(len(SPLITS))
_SPLIT, _PLACE = 1, 2  # what a hash is for, so that the two uses share no random bits
_MEMBER_BYTES = 512 + 1024  # a sample's tar headers and its label, besides the payload


def assign_splits(
    labels: np.ndarray, preset: np.ndarray | None, draws: np.ndarray, val: float, test: float
) -> np.ndarray:
    """The split of every sample, (N,) int8 numbers in SPLITS; every class is shared out alike (stratified).

    labels: (N,) class numbers; preset: (N,) splits that the source gives, or None; draws: (N,) from `name_draws`.
    val and test are shares of the samples that the source leaves to training; a split that the source has itself gets
    none of them. Rounding errors are carried from class to class, so the totals are right to one sample even where
    every class has few; the last sample of a class always stays in training.
    """
    splits = np.full(len(labels), TRAIN, np.int8) if preset is None else np.maximum(preset, TRAIN).astype(np.int8)
    shares = {split: share for split, share in ((TEST, test), (VAL, val)) if share and not (splits == split).any()}
    free = np.flatnonzero(splits == TRAIN)
    free = free[np.lexsort((free, draws[free], labels[free]))]
    starts = np.flatnonzero(np.diff(labels[free], prepend=-1))
    carried = dict.fromkeys(shares, 0.0)
    for members in np.split(free, starts[1:]):
        first = 0
        for split, share in shares.items():
            wanted = len(members) * share + carried[split]
            count = max(0, min(int(np.floor(wanted + 0.5)), len(members) - 1 - first))
            carried[split] = min(1.0, max(-1.0, wanted - count))
            splits[members[first : first + count]] = split
            first += count
    return splits


def name_draws(names: list[str], seed: int) -> np.ndarray:
    """(N,) uint64 random bits of each sample, from its name and the seed alone: adding a file moves few others."""
    return mix(np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in names], np.uint64) ^ hash_words(seed, _SPLIT))


def cut_into_shards(
    rows: np.ndarray, draws: np.ndarray, sizes: np.ndarray, shard_bytes: float, min_shards: int
) -> list[np.ndarray]:
    """The samples of each shard, in shuffled order: as many shards as their sizes ask for, equal in samples to one.

    rows: (n,) sample numbers of one split; draws: (N,) from `name_draws`; sizes: (N,) payload bytes. The one shuffle
    mixes the classes over the shards; so shards of equal counts come out near equal in bytes as well.
    """
    if not len(rows):
        return []
    shuffled = rows[np.lexsort((rows, mix(draws[rows] ^ hash_words(_PLACE))))]
    total = int(((sizes[rows] + 511) // 512 * 512 + _MEMBER_BYTES).sum())
    num_shards = min(len(rows), max(min_shards, -(-total // max(1, int(shard_bytes)))))
    return np.array_split(shuffled, num_shards)
