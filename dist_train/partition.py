"""Which sample goes into which split and which shard: pure functions, decided before anything is written."""

import math

import numpy as np
import xxhash

from dist_train.errors import UserError
from dist_train.order import hash_words, mix
from dist_train.shard_config import USUAL_TEST, SplitConfig
from dist_train.sources import SPLITS

TRAIN, VAL, TEST = range(len(SPLITS))
_SPLIT, _PLACE = 1, 2  # what a hash is for, so that the two uses share no random bits
_MEMBER_BYTES = 512 + 1024  # a sample's tar headers and its label, besides the payload
_SAMPLES = 1.0  # what the error of the number of samples weighs, beside the errors of all classes
_GROUPS = 0.25  # of the number of groups: without, the smallest groups gather in the smallest split
_PASSES = 8  # over all groups; most often no group moves any more before


def assign_splits(
    labels: np.ndarray, preset: np.ndarray | None, draws: np.ndarray, val: float, test: float, groups: np.ndarray | None = None
) -> np.ndarray:
    """The split of every sample, (N,) int8 numbers in SPLITS; every class is shared out alike (stratified).

    labels: (N,) class numbers; preset: (N,) splits that the source gives, or None; draws: (N,) from `name_draws`.
    val and test are shares of the samples that the source leaves to training; a split that the source has itself gets
    none of them. Rounding errors are carried from class to class, so the totals are right to one sample even where
    every class has few; the last sample of a class always stays in training. groups: (N,) numbers; samples of one number are
    put into one split together (`keep_groups_whole`), or None. Raises UserError where no whole group goes into a split.
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
    drawn = set(splits[free].tolist())
    if groups is not None and len(drawn) > 1:
        splits[free] = keep_groups_whole(splits[free], labels[free], groups[free], draws[free])
        for split in sorted(drawn - set(splits[free].tolist())):
            sizes, wanted = np.unique(groups[free], return_counts=True)[1], shares[split] * len(free)
            raise UserError(
                f"split.{SPLITS[split]} is {shares[split]}, {wanted:,.0f} of {len(free):,} samples, and no whole group goes there: "
                f"there are {len(sizes):,}, of {sizes.min():,} to {sizes.max():,} samples.\n"
                f"  Set it to a share that groups fill, or to 0 for no such split."
            )
    return splits


def test_share(split: SplitConfig, preset: np.ndarray | None) -> float:
    """The share of the test split; where none is asked for (-1), a set made of train and val is kept as its authors made it."""
    brings_val = preset is not None and bool((preset == VAL).any())
    return split.test if split.test >= 0 else 0.0 if brings_val else USUAL_TEST


def told_splits(split: SplitConfig, preset: np.ndarray | None, splits: np.ndarray) -> str:
    """What has become of the samples that the source leaves to training, in a line; "" where the source leaves nothing to draw.

    preset: what the source gives, or None; splits: (N,) from `assign_splits`.
    """
    own = set() if preset is None else set(preset[preset > TRAIN].tolist())
    counts = np.bincount(splits, minlength=len(SPLITS)).tolist()
    drawn = {name: counts[number] for number, name in enumerate(SPLITS) if number not in own and number != TRAIN and counts[number]}
    parts = [f"{count:,} {'is' if count == 1 else 'are'} drawn as {name}" for name, count in drawn.items()]
    if drawn:
        parts = [f"of {sum(drawn.values()) + counts[TRAIN]:,} training samples {' and '.join(parts)}"]
    if split.test < 0 and VAL in own and TEST not in own:
        parts.append("the source brings val, so no test split is drawn from train (to draw one: --split.test 0.1)")
    return "; ".join(parts)


def keep_groups_whole(splits: np.ndarray, labels: np.ndarray, groups: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Splits with no group in two of them, that have about as many samples of each class as the given ones.

    All arrays (n,). In an order drawn from its samples' draws, each group goes where the squared relative errors of the counts
    then come out least: of the samples of each class, and of all samples and all groups (_SAMPLES, _GROUPS). So again, until no
    group moves. A class always keeps a sample in training; where one group has all of it, the group is trained on.
    """
    num_classes, used = int(labels.max()) + 1, np.unique(splits).tolist()
    numbers, group_of = np.unique(groups, return_inverse=True)
    cells, in_cell = np.unique(group_of * num_classes + labels, return_counts=True)
    members = [[] for _ in numbers]  # of each group (class, samples), then (num_classes, all samples), (num_classes + 1, 1)
    for cell, count in zip(cells.tolist(), in_cell.tolist(), strict=True):
        members[cell // num_classes].append((cell % num_classes, count))
    for mine in members:
        mine += [(num_classes, sum(count for _, count in mine)), (num_classes + 1, 1)]
    wanted, weights = {}, {}
    for split in used:
        counts = np.bincount(labels[splits == split], minlength=num_classes).tolist()
        wanted[split] = [*counts, sum(counts), round(len(numbers) * sum(counts) / len(labels))]
        importance = [1] * num_classes + [_SAMPLES * num_classes, _GROUPS * num_classes]
        weights[split] = [much / max(1, count) ** 2 for much, count in zip(importance, wanted[split], strict=True)]
    order = np.zeros(len(numbers), np.uint64)
    np.bitwise_xor.at(order, group_of, draws)

    held = {split: [0] * (num_classes + 2) for split in used}
    held[TRAIN] = [*np.bincount(labels, minlength=num_classes).tolist(), len(labels), len(numbers)]
    place = [TRAIN] * len(numbers)
    for _ in range(_PASSES):
        before = list(place)
        for group in np.argsort(order, kind="stable").tolist():
            mine = members[group]
            for k, count in mine:
                held[place[group]][k] -= count
            errors = {  # what the sum of squares grows by; `fsum` gives the same on every machine, and with every Python
                split: math.fsum(weights[split][k] * count * (count + 2 * (held[split][k] - wanted[split][k])) for k, count in mine)
                for split in (used if all(held[TRAIN][k] for k, _ in mine) else [TRAIN])
            }
            place[group] = min(errors, key=errors.get)
            for k, count in mine:
                held[place[group]][k] += count
        if place == before:
            break
    return np.array(place, np.int8)[group_of]


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
