"""Which samples make up a step: pure functions of (shard counts, seed, global batch size, step).

Positions in the endless stream are 0, 1, 2, ...; with N samples, epoch e is positions [eN, (e+1)N) and step s is
[sB, (s+1)B) with B the global batch size. How a position becomes a sample:

    position -> lane and place in it     lanes are dealt round-robin, so a step takes equally from all of them
             -> tape position            the epoch's tape is its shards in shuffled order, cut into `lanes` equal parts
             -> shuffled inside a window of the lane, a few shards long, so that reading stays local
             -> shard and sample in it

Nothing is materialised: a keyed permutation is evaluated where it is needed, so any step of 10^9 samples costs
microseconds and O(shards) memory. Ranks do not enter: `rank_share` cuts a finished global batch.
"""

import functools
import threading
from dataclasses import dataclass, field

import numpy as np

from dist_train.core import native  # without it, numpy computes the same in four to six times the time

MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
BLOCK_SAMPLES = 8_192  # worked out together: many enough to hide numpy's cost a call, few enough for the CPU's cache
_SHARDS, _WINDOWS, _KEYS = 1, 2, 3  # what a hash is for, so that no two uses share random bits
_SIGN = np.uint64(1 << 63)
_ROUNDS = 6  # of the Feistel network in `permute`


@dataclass(frozen=True)
class Order:
    """The order of one split. shard_samples: (S,) int64, samples in each shard; they are numbered in shard order.

    window_shards: samples are shuffled inside windows of this many shards (S or more: the whole split).
    lanes: parts of the epoch read side by side; 0 derives them: the largest divisor of the global batch size that
    keeps at most a quarter of the shards in play at once. Raises ValueError on sizes that make no stream.
    """

    shard_samples: np.ndarray
    global_batch_size: int
    seed: int = 0
    window_shards: int = 16
    lanes: int = 0
    first: np.ndarray = field(init=False, repr=False)
    _epochs: dict = field(init=False, repr=False, compare=False, default_factory=dict)
    _blocks: dict = field(init=False, repr=False, compare=False, default_factory=dict)
    _lock: threading.Lock = field(init=False, repr=False, compare=False, default_factory=threading.Lock)

    def __post_init__(self):
        first = np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)
        if first[-1] < 1 or self.global_batch_size < 1 or self.window_shards < 1 or self.lanes < 0:
            raise ValueError(f"no stream from {first[-1]} samples in batches of {self.global_batch_size}, windows of "
                             f"{self.window_shards} shards and {self.lanes} lanes")  # fmt: skip
        object.__setattr__(self, "first", first)
        if not self.lanes:
            object.__setattr__(self, "lanes", _default_lanes(self.num_shards, self.global_batch_size, self.window_shards))

    @property
    def num_samples(self) -> int:
        return int(self.first[-1])

    @property
    def num_shards(self) -> int:
        return len(self.shard_samples)

    def global_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and epochs of step `step`: two (B,) int64 arrays, sorted by lane. Not to be written to."""
        steps = max(1, min(BLOCK_SAMPLES, self.num_samples) // self.global_batch_size)
        number, place = divmod(step, steps)
        with self._lock:  # or every thread would work out the block for itself
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = self.global_batches(number * steps, steps)
                while len(self._blocks) > 2:  # whoever walks ahead may be in the next one
                    self._blocks.pop(next(iter(self._blocks)))
        samples, epochs = block
        return samples[place], epochs[place]

    def global_batches(self, first_step: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and epochs of num_steps steps from first_step on: two (num_steps, B) int64 arrays."""
        shape = num_steps, self.global_batch_size
        first = first_step * self.global_batch_size
        epoch, place = divmod(first, self.num_samples)
        places = np.arange(place, place + num_steps * shape[1], dtype=np.int64)
        epochs = np.full(len(places), epoch)
        if places[-1] >= self.num_samples:
            more, places = np.divmod(places, self.num_samples)
            epochs += more
        if self.lanes > 1:
            by_lane = np.argsort((places % self.lanes).reshape(shape), axis=1, kind="stable")
            epochs, places = (np.take_along_axis(a.reshape(shape), by_lane, axis=1).ravel() for a in (epochs, places))
        last = int(epochs.max())
        if epoch == last:
            samples = self.sample_at(epoch, places)
        else:
            samples = np.empty_like(places)
            for e in range(epoch, last + 1):
                here = epochs == e
                samples[here] = self.sample_at(e, places[here])
        return samples.reshape(shape), epochs.reshape(shape)

    def rank_batch(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of step `step` that `rank` of `world_size` takes: sample numbers and epochs, (B / world_size,) each."""
        share = rank_share(self.global_batch_size, rank, world_size)
        samples, epochs = self.global_batch(step)
        return samples[share].copy(), epochs[share].copy()  # whoever gets them may write to them

    def sample_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Sample numbers at places 0..N-1 of an epoch. places: (n,) int64."""
        tape = self._to_tape(epoch, places)
        shard_order, starts = self._shard_tape(epoch)
        slot = np.searchsorted(starts, tape, side="right") - 1
        return self.first[shard_order[slot]] + tape - starts[slot]

    def _to_tape(self, epoch: int, places: np.ndarray) -> np.ndarray:
        n = self.num_samples
        if self.window_shards >= self.num_shards:  # one window over everything: lanes would only rename the places
            return permute(places, np.int64(n), hash_words(self.seed, _WINDOWS, epoch))
        lane, place = places % self.lanes, places // self.lanes
        short, extra = divmod(n, self.lanes)  # the first `extra` lanes are one sample longer
        lane_start = lane * short + np.minimum(lane, extra)
        lane_samples = short + (lane < extra)
        window_samples = self.window_shards * -(-n // self.num_shards)
        window = place // window_samples
        window_start = window * window_samples
        size = np.minimum(lane_samples - window_start, window_samples)
        key = mix(hash_words(self.seed, _WINDOWS, epoch) ^ mix((lane << 32 | window).astype(np.uint64)))
        return lane_start + window_start + permute(place - window_start, size, key)

    def _shard_tape(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order (S,), and where each begins on the tape (S,). Kept for the two newest epochs."""
        tape = self._epochs.get(epoch)
        if tape is None:
            draws = mix(np.arange(self.num_shards, dtype=np.uint64) ^ hash_words(self.seed, _SHARDS, epoch))
            shard_order = np.argsort(draws, kind="stable")
            starts = np.concatenate([[0], np.cumsum(self.shard_samples[shard_order])[:-1]]).astype(np.int64)
            tape = self._epochs[epoch] = shard_order, starts
            # threads may be epochs apart on a tiny split: each keeps its own tape
            for old in sorted(self._epochs)[:-2]:
                self._epochs.pop(old, None)
        return tape


def rank_share(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The slice of a lane-sorted global batch that a rank takes. Where world_size divides the lanes, whole lanes.

    Raises ValueError if the batch cannot be cut evenly.
    """
    if global_batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} cannot take an equal part of a global batch of {global_batch_size}")
    share = global_batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def evaluation_share(num_samples: int, rank: int, world_size: int) -> range:
    """Sample numbers a rank evaluates: every sample on exactly one rank, in shard order, shares differ by at most one."""
    return range(num_samples * rank // world_size, num_samples * (rank + 1) // world_size)


def sample_keys(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The 64-bit key of everything random that happens to a sample in an epoch. (n,) int64 each; returns (n,) int64.

    63 bits are drawn anew each epoch. The sign is a sample's own in epoch 0, whatever the seed, and changes from epoch to
    epoch, for what shall alternate and not be left to chance (augment.flip_alternates).
    """
    by_epoch, keys = (np.array(numbers, np.uint64, order="C") for numbers in (epochs, samples))
    by_epoch ^= hash_words(seed, _KEYS)
    _mix_in_place(by_epoch)
    _mix_in_place(keys)
    signs = keys ^ np.asarray(epochs, np.uint64) << np.uint64(63)
    keys ^= by_epoch
    _mix_in_place(keys)
    keys ^= (keys ^ signs) & _SIGN
    return keys.view(np.int64)


def uniform(keys: np.ndarray, draw: int) -> np.ndarray:
    """Draw number `draw` of each key: (n,) float32 in [0, 1), 24 random bits; equal to draws.uniform bit for bit."""
    bits = mix(keys.view(np.uint64) + np.uint64((draw + 1) * _GOLDEN & MASK))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that scatters every bit."""
    x = np.array(x, np.uint64, order="C")
    _mix_in_place(x)
    return x


def _mix_in_place(x: np.ndarray, scratch: np.ndarray | None = None) -> None:
    if hasattr(native, "mix"):
        native.mix(x)
        return
    scratch = np.empty_like(x) if scratch is None else scratch
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0)):
        np.right_shift(x, np.uint64(shift), out=scratch)
        np.bitwise_xor(x, scratch, out=x)
        if factor:
            np.multiply(x, np.uint64(factor), out=x)


@functools.lru_cache(1024)
def hash_words(*words: int) -> np.uint64:
    """One 64-bit key from several integers; the order of the words counts."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = mix((key + np.uint64(_GOLDEN)) ^ np.uint64(int(word) & MASK))
    return key[0]


def permute(x: np.ndarray, size: np.ndarray | np.int64, key: np.ndarray | np.uint64) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 takes x. All (n,), int64 but key uint64; size and key may be scalars.

    A Feistel network on the next even power of two, walked until it lands below size (cycle walking; Black and
    Rogaway 2002). Costs O(n) whatever the size.
    """
    size, key = np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    if hasattr(native, "permute"):
        out = np.empty(len(x), np.int64)
        native.permute(np.ascontiguousarray(x), size, key, _ROUNDS, out)
        return out
    half = ((np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))) + 1) // 2).astype(np.uint64)
    out = _feistel(x.astype(np.uint64), half, key)
    todo = np.flatnonzero(out >= size)
    while len(todo):
        walked = _feistel(out[todo], *(a if a.ndim == 0 else a[todo] for a in (half, key)))
        out[todo] = walked
        todo = todo[walked >= (size if size.ndim == 0 else size[todo])]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low_bits
    mixed, scratch = np.empty_like(x), np.empty_like(x)
    for r in range(_ROUNDS):
        np.bitwise_xor(right, key + np.uint64(r * _GOLDEN & MASK), out=mixed)
        _mix_in_place(mixed, scratch)
        np.bitwise_and(mixed, low_bits, out=mixed)
        np.bitwise_xor(left, mixed, out=left)
        left, right = right, left
    return left << half | right


def _default_lanes(num_shards: int, global_batch_size: int, window_shards: int) -> int:
    most = max(1, num_shards // (4 * window_shards))
    return next(d for d in range(min(most, global_batch_size), 0, -1) if global_batch_size % d == 0)
