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

from dataclasses import dataclass, field

import numpy as np

MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_SHARDS, _WINDOWS, _KEYS = 1, 2, 3  # what a hash is for, so that no two uses share random bits


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
    _epochs: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        first = np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)
        if first[-1] < 1 or self.global_batch_size < 1 or self.window_shards < 1 or self.lanes < 0:
            raise ValueError(f"no stream from {first[-1]} samples in batches of {self.global_batch_size}, windows of "
                             f"{self.window_shards} shards and {self.lanes} lanes")  # fmt: skip
        object.__setattr__(self, "first", first)
        if not self.lanes:
            object.__setattr__(
                self, "lanes", _default_lanes(self.num_shards, self.global_batch_size, self.window_shards)
            )

    @property
    def num_samples(self) -> int:
        return int(self.first[-1])

    @property
    def num_shards(self) -> int:
        return len(self.shard_samples)

    def global_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and epochs of step `step`: two (B,) int64 arrays, sorted by lane."""
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_samples)
        by_lane = np.argsort(places % self.lanes, kind="stable")
        epochs, places = epochs[by_lane], places[by_lane]
        samples = np.empty_like(places)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            here = epochs == epoch
            samples[here] = self.sample_at(epoch, places[here])
        return samples, epochs

    def rank_batch(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of step `step` that `rank` of `world_size` takes: sample numbers and epochs, (B / world_size,) each."""
        share = rank_share(self.global_batch_size, rank, world_size)
        samples, epochs = self.global_batch(step)
        return samples[share], epochs[share]

    def sample_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Sample numbers at places 0..N-1 of an epoch. places: (n,) int64."""
        tape = self._to_tape(epoch, places)
        shard_order, starts = self._shard_tape(epoch)
        slot = np.searchsorted(starts, tape, side="right") - 1
        return self.first[shard_order[slot]] + tape - starts[slot]

    def _to_tape(self, epoch: int, places: np.ndarray) -> np.ndarray:
        n = self.num_samples
        if self.window_shards >= self.num_shards:  # one window over everything: lanes would only rename the places
            return permute(places, np.int64(n), fold(self.seed, _WINDOWS, epoch))
        lane, place = places % self.lanes, places // self.lanes
        short, extra = divmod(n, self.lanes)  # the first `extra` lanes are one sample longer
        lane_start = lane * short + np.minimum(lane, extra)
        lane_samples = short + (lane < extra)
        window_samples = self.window_shards * -(-n // self.num_shards)
        window = place // window_samples
        window_start = window * window_samples
        size = np.minimum(lane_samples - window_start, window_samples)
        key = mix(fold(self.seed, _WINDOWS, epoch) ^ mix((lane << 32 | window).astype(np.uint64)))
        return lane_start + window_start + permute(place - window_start, size, key)

    def _shard_tape(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order (S,), and where each begins on the tape (S,). Kept for the two newest epochs."""
        tape = self._epochs.get(epoch)
        if tape is None:
            draws = mix(np.arange(self.num_shards, dtype=np.uint64) ^ fold(self.seed, _SHARDS, epoch))
            shard_order = np.argsort(draws, kind="stable")
            starts = np.concatenate([[0], np.cumsum(self.shard_samples[shard_order])[:-1]]).astype(np.int64)
            tape = self._epochs[epoch] = shard_order, starts
            for old in sorted(self._epochs)[
                :-2
            ]:  # threads may be epochs apart on a tiny split: each keeps its own tape
                self._epochs.pop(old, None)
        return tape


def rank_share(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The slice of a lane-sorted global batch that a rank takes. Where world_size divides the lanes, whole lanes.

    Raises ValueError if the batch cannot be cut evenly.
    """
    if global_batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} of {world_size} cannot take an equal part of a global batch of {global_batch_size}"
        )
    share = global_batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def evaluation_share(num_samples: int, rank: int, world_size: int) -> range:
    """Sample numbers a rank evaluates: every sample on exactly one rank, in shard order, shares differ by at most one."""
    return range(num_samples * rank // world_size, num_samples * (rank + 1) // world_size)


def sample_keys(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The 64-bit key of everything random that happens to a sample in an epoch. (n,) int64 each; returns (n,) int64."""
    by_epoch = mix(np.asarray(epochs).astype(np.uint64) ^ fold(seed, _KEYS))
    return mix(by_epoch ^ mix(np.asarray(samples).astype(np.uint64))).view(np.int64)


def uniform(keys: np.ndarray, draw: int) -> np.ndarray:
    """Draw number `draw` of each key: (n,) float32 in [0, 1), 24 random bits; equal to augment.uniform bit for bit."""
    bits = mix(keys.view(np.uint64) + np.uint64((draw + 1) * _GOLDEN & MASK))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that scatters every bit."""
    x = np.asarray(x, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(*words: int) -> np.uint64:
    """One 64-bit key from several integers; the order of the words counts."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = mix((key + np.uint64(_GOLDEN)) ^ np.uint64(word & MASK))
    return key[0]


def permute(x: np.ndarray, size: np.ndarray | np.int64, key: np.ndarray | np.uint64, rounds: int = 6) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 takes x. All (n,), int64 but key uint64; size and key may be scalars.

    A Feistel network on the next even power of two, walked until it lands below size (cycle walking; Black and
    Rogaway 2002). Costs O(n) whatever the size.
    """
    size = np.broadcast_to(np.asarray(size, np.uint64), x.shape)
    key = np.broadcast_to(np.asarray(key, np.uint64), x.shape)
    half = ((np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))) + 1) // 2).astype(np.uint64)
    out = x.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        h, k, v = half[todo], key[todo], out[todo]
        low_bits = (np.uint64(1) << h) - np.uint64(1)
        left, right = v >> h, v & low_bits
        for r in range(rounds):
            left, right = right, left ^ (mix(right ^ (k + np.uint64(r * _GOLDEN & MASK))) & low_bits)
        out[todo] = left << h | right
        todo = todo[out[todo] >= size[todo]]
    return out.astype(np.int64)


def _default_lanes(num_shards: int, global_batch_size: int, window_shards: int) -> int:
    most = max(1, num_shards // (4 * window_shards))
    return next(d for d in range(min(most, global_batch_size), 0, -1) if global_batch_size % d == 0)
