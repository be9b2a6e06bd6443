"""The stream: order + store + decode -> batches, decoded by threads ahead of the step that uses them.

from dist_train import open_stream
for batch in open_stream("shards/x", split="train", batch_size=64, image_size=224, crop="random_resized"):
    batch.images  # uint8 (N, 3, H, W)
"""

import collections
import contextlib
import copy
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch

from dist_train import boxes as crop_boxes
from dist_train.bad_samples import BadSamples, Undecodable
from dist_train.cache import DecodedCache, DeviceRows
from dist_train.decode import SHARD_FAULTS, Failures, decode_from_files
from dist_train.errors import UserError
from dist_train.gpu_decode import GpuDecoder
from dist_train.index import ShardIndex, load_index
from dist_train.order import Order, evaluation_share, rank_share, sample_keys
from dist_train.recycled import Recycled
from dist_train.shard_cache import read_ahead, shards_in_play
from dist_train.store import Store, sample_name
from dist_train.wanted import Wanted

_DEPTH = 4  # batches ahead of each thread
_GROUP_BYTES, _DECODED_BYTES, _GROUP_STEPS = 2**25, 2**24, 64  # of batches gathered, or decoded, in one call


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    images: uint8 (N, 3, H, W), channels-last in memory; for tables float32 (N, F), as stored.
    labels, samples, epochs, random_keys: int64 (N,). `samples` are numbers in the stored split, `random_keys` the keys of
    everything random that is done to them (order.sample_keys).
    """

    step: int
    split: str
    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    epochs: torch.Tensor
    random_keys: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> list[str]:
        """The samples' names, as `dist-train plan` prints them: train/00000123."""
        return [sample_name(self.split, sample) for sample in self.samples.tolist()]

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device, without waiting for the copy."""
        names = ("images", "labels", "random_keys")  # what the step needs; the rest stays with the host
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def open_stream(
    shards: str | ShardIndex,
    split: str = "train",
    batch_size: int = 64,
    image_size: int = 0,
    crop: str = "resize",
    seed: int = 0,
    threads: int = 0,
    world: tuple[int, ...] = (0, 1),
    start_step: int = 0,
    stop_step: int | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    window_shards: int = 16,
    lanes: int = 0,
    prefetch_mb: int = 256,
    verify: bool = True,
    pin_memory: bool = False,
    cache: str | DecodedCache = "auto",
    bad_samples: BadSamples | None = None,
    gpu_decoder: GpuDecoder | None = None,
) -> Iterator[Batch]:
    """The shuffled, endless stream of batches of a split: every sample exactly once an epoch, any step at once.

    shards: a folder with an index.json, or a loaded index. batch_size: the global batch, over all ranks. world: (rank,
    world_size), this rank's equal part, and how many ranks share this machine. image_size: height and width, pixels; 0 keeps
    the stored size, which must then be the same for all. crop: "random_resized" cuts the random box of the sample's key
    (scale, ratio: share of the area and aspect, Szegedy et al. 2015), "resize" takes the whole picture. Steps start_step,
    start_step + 1, ... come until stop_step, or without end; the state of the stream is that number.
    cache: where decoded samples are kept from epoch to epoch (cache.DecodedCache, or one of its modes); it changes no pixel;
    with "device" the images come on its device. bad_samples: takes note of pictures that cannot be decoded, and says what comes
    in their place; without it the first one ends the stream. gpu_decoder: decodes random boxes, and leaves them on its device.
    Raises UserError if the split, the sizes or a sample cannot be had.
    """
    index = shards if isinstance(shards, ShardIndex) else load_index(shards)
    rank, world_size, machine_ranks = (*world, 1)[:3]
    source = index.split(split)
    try:
        order = Order(source.shard_samples, batch_size, seed, window_shards, lanes)
        rank_share(batch_size, rank, world_size)
    except ValueError as error:
        raise UserError(f"{index.folder}: {error}.") from None
    size = _output_size(index, image_size)
    if crop not in ("random_resized", "resize"):
        raise UserError(f"crop is {crop!r}; expected random_resized or resize.")

    def random_boxes(rows, keys):
        return crop_boxes.random_resized_boxes(keys, rows["height"], rows["width"], scale, ratio)

    is_random = crop == "random_resized" and size is not None
    cache = DecodedCache(cache) if isinstance(cache, str) else cache
    if is_random and cache.mode not in ("auto", "none"):
        raise UserError(
            f"data.cache is {cache.mode}, but the random resized crop is cut while decoding, another in every epoch.\n"
            f"  Set data.cache to auto or none, or data.crop to resize."
        )
    load = _Loader(index, split, size, random_boxes if is_random else None, verify, pin_memory)
    if not is_random:
        load.keep(cache, "whole", threads, prefetch_mb)
    load.gpu_decoder = gpu_decoder if is_random else None

    bad = bad_samples or BadSamples(0)
    share = batch_size // world_size

    def make(steps: list[int]) -> list[Batch]:
        samples, epochs = map(np.concatenate, zip(*(order.rank_batch(s, rank, world_size) for s in steps), strict=True))
        while True:
            good = bad.stand_ins(samples, source.num_samples)
            stored = source.stored_numbers(good)
            try:
                return load(steps, share, stored, epochs, sample_keys(seed, epochs, stored))
            except Undecodable as fault:
                bad.condemn(int(good[stored == fault.sample][0]), fault, source.num_samples)

    steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
    batches = load.batches(make, copy.copy(steps), share, _num_threads(threads), prefetch_mb)
    if load.store.split.remote is None:
        return batches
    walk = replace(order)  # of its own: an order remembers two epochs, and this one is ahead
    upcoming = (
        load.not_kept(source.stored_numbers(walk.rank_batch(step, rank, world_size)[0])) for step in copy.copy(steps)
    )
    together = shards_in_play(order, -(-world_size // machine_ranks))
    return read_ahead(load.store, upcoming, shards_in_play(order, world_size), batches, machine_ranks, together)


def open_evaluation(
    index: ShardIndex,
    split: str,
    batch_size: int,
    image_size: int = 0,
    eval_crop: float = 0.875,
    threads: int = 0,
    world: tuple[int, ...] = (0, 1),
    prefetch_mb: int = 256,
    verify: bool = True,
    pin_memory: bool = False,
    cache: str | DecodedCache = "none",
) -> Iterator[Batch]:
    """This rank's part of one pass over a split, in shard order: every sample on exactly one rank, nothing padded.

    batch_size: samples per batch of this rank; the last batch may be smaller. Where pictures differ in size, the
    central crop that keeps `eval_crop` of the shorter side is decoded to image_size (0: the whole picture, squeezed);
    one-size pictures come whole and as they are. cache: as in `open_stream`; it pays for passes after the first.
    """
    size = _output_size(index, image_size)
    source = index.split(split)
    share = evaluation_share(source.num_samples, *world[:2])

    def central_boxes(rows, keys):
        return crop_boxes.central_boxes(rows["height"], rows["width"], size, eval_crop)

    boxes = central_boxes if eval_crop and not index.image_size else None
    load = _Loader(index, split, index.image_size or size, boxes, verify, pin_memory)
    cache = DecodedCache(cache) if isinstance(cache, str) else cache
    load.keep(cache, f"central {eval_crop}" if boxes else "whole", threads, prefetch_mb)

    def make(steps: list[int]) -> list[Batch]:
        samples = np.array(share[steps[0] * batch_size : (steps[-1] + 1) * batch_size], np.int64)
        samples, epochs = source.stored_numbers(samples), np.zeros_like(samples)
        return load(steps, batch_size, samples, epochs, sample_keys(0, epochs, samples))

    steps = range(-(-len(share) // batch_size))
    batches = load.batches(make, steps, batch_size, _num_threads(threads), prefetch_mb)
    if load.store.split.remote is None:
        return batches
    upcoming = (
        load.not_kept(source.stored_numbers(np.array(share[s * batch_size : (s + 1) * batch_size], np.int64)))
        for s in steps
    )
    return read_ahead(load.store, upcoming, 4, batches, (*world, 1)[2])


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Bring batches to the device one ahead of their use, on a stream of its own where there is a GPU."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copy_stream, compute_stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copied(batch: Batch) -> Batch:
        with torch.cuda.stream(copy_stream):
            return batch.to(device)

    with contextlib.closing(batches):
        ahead = map(copied, batches)
        upcoming = next(ahead, None)
        while upcoming is not None:
            batch = upcoming
            compute_stream.wait_stream(copy_stream)
            for tensor in (batch.images, batch.labels, batch.random_keys):
                tensor.record_stream(compute_stream)  # or its memory could be reused before the step has read it
            upcoming = next(ahead, None)  # copied while the caller computes
            yield batch


class _Loader:
    """Numbers in the stored split -> Batch. Called by many threads at once."""

    def __init__(self, index: ShardIndex, split: str, size, boxes, verify: bool, pin_memory: bool):
        self.boxes, self.verify, self.pin_memory = boxes, verify, pin_memory
        self.store = Store(index.split(split).stored)
        self.split = self.store.split.name
        self.is_table = index.features is not None
        self.shape = (len(index.features),) if self.is_table else (*size, 3)
        self.dtype = torch.float32 if self.is_table else torch.uint8
        self.kept = self.gpu_decoder = self.helpers = None
        self.num_parts = 1
        self.recycled = Recycled()

    @property
    def sample_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def keep(self, cache: DecodedCache, how: str, threads: int, prefetch_mb: int) -> None:
        """Keep what is decoded from now on. how: the rule by which it is, in words."""

        def in_order() -> Iterator[np.ndarray]:
            at_once = max(1, 2**22 // self.sample_bytes)
            num_samples = self.store.split.num_samples
            steps = range(-(-num_samples // at_once))
            if self.store.split.remote:  # shard after shard: more than these would only stand in each other's way
                self.store.max_open = min(self.store.max_open, 2 + _num_threads(threads))

            def chunk(step: int) -> np.ndarray:
                samples = np.arange(step * at_once, min(num_samples, (step + 1) * at_once))
                return self._decoded(samples, np.zeros_like(samples)).numpy()

            return _ahead(chunk, steps, _num_threads(threads), prefetch_mb, lambda step: at_once * self.sample_bytes)

        self.kept = cache.rows(Wanted(self.store.split, self.shape, self.dtype, how, in_order))

    def not_kept(self, samples: np.ndarray) -> np.ndarray:
        """Those of the samples whose shards will have to be read."""
        return samples if self.kept is None else samples[self.kept.is_missing(samples)]

    def __call__(self, steps: list[int], batch_size: int, samples: np.ndarray, epochs: np.ndarray, keys: np.ndarray):
        """The batches of `steps`, whose samples stand one after the other; the last batch may be smaller."""
        if self.kept is None:
            values = self._decoded(samples, keys)
        else:
            values = self.kept.read(samples, lambda m: self._decoded(samples[m], keys[m]), self.pin_memory)
        labels = torch.from_numpy(self.store.table["label"][samples].astype(np.int64))
        keys = torch.from_numpy(keys)
        if self.pin_memory:  # a copy from pageable memory would make the host wait
            labels, keys = labels.pin_memory(), keys.pin_memory()
        columns = (labels, torch.from_numpy(samples), torch.from_numpy(epochs), keys)
        if len(steps) == 1:
            return [Batch(steps[0], self.split, _channels_first(values), *columns)]
        rows = zip(*(column.split(batch_size) for column in (_channels_first(values), *columns)), strict=True)
        return [Batch(step, self.split, *row) for step, row in zip(steps, rows, strict=True)]

    def batches(self, make, steps, batch_size: int, num_threads: int, prefetch_mb: int) -> Iterator[Batch]:
        """make(steps) for all steps, ahead of their use; of small batches several a call, or Python would take longer than
        a whole cache's gather; of batches so large that memory allows fewer than threads, parts of one by several threads.
        Those kept on a device are put together there, in the thread of whoever asks for them."""
        batch_bytes = max(1, batch_size * self.sample_bytes)
        most = min(_GROUP_STEPS, min(_GROUP_BYTES, prefetch_mb * 2**20 // (2 * num_threads)) // batch_bytes)
        self.num_parts = num_threads // max(1, min(num_threads, prefetch_mb * 2**20 // batch_bytes))
        if self.num_parts > 1:
            self.helpers = ThreadPoolExecutor(num_threads, thread_name_prefix="decode-part")
        by_one = self.kept or self.gpu_decoder or self.store.split.remote
        decoded = 1 if by_one else min(most, _DECODED_BYTES // batch_bytes)
        steps = iter(steps)

        def groups() -> Iterator[list[int]]:
            yield from ([step] for step in itertools.islice(steps, num_threads))  # nobody is to wait for the first ones
            while group := list(itertools.islice(steps, max(1, most if self.kept and self.kept.is_full else decoded))):
                yield group

        made = _in_turn(_ahead(make, groups(), num_threads, prefetch_mb, lambda group: len(group) * batch_bytes))
        return self._gathered(made) if isinstance(self.kept, DeviceRows) else made

    def _gathered(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        with contextlib.closing(batches):
            for batch in batches:
                yield replace(batch, images=_channels_first(self.kept.gather(batch.images)))

    def _decoded(self, samples: np.ndarray, keys: np.ndarray) -> torch.Tensor:
        """(n, H, W, 3) uint8, or (n, F) float32 of a table."""
        if self.gpu_decoder:
            at = self.store.locate(samples)
            boxes = self.boxes(self.store.table.take(samples), keys) if self.boxes else None
            return self._proven(samples, *self.gpu_decoder(at.fds, at.offsets, at.sizes, at.checksums if self.verify else None,
                                                           boxes, self.shape[:2]))  # fmt: skip
        out = self.recycled.tensor((len(samples), *self.shape), self.dtype, self.pin_memory)
        rows = out.numpy()
        if self.is_table:
            for i, payload in enumerate(self.store.payloads(samples, self.verify)):
                rows[i] = np.frombuffer(payload, np.float32, offset=len(payload) - 4 * self.shape[0])
            return out
        if self.num_parts == 1 or len(samples) < self.num_parts:
            return self._proven(samples, out, self._decode_rows(samples, keys, rows))
        bounds = [len(samples) * k // self.num_parts for k in range(self.num_parts + 1)]
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        futures = [self.helpers.submit(self._decode_rows, samples[part], keys[part], rows[part]) for part in parts]
        wait(futures)  # all of them, even where one raises: `out` may be given to another batch then
        failures = [
            (part.start + i, reason)
            for part, future in zip(parts, futures, strict=True)
            for i, reason in future.result()
        ]
        return self._proven(samples, out, failures)

    def _decode_rows(self, samples: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> Failures:
        at = self.store.locate(samples)
        boxes = self.boxes(self.store.table.take(samples), keys) if self.boxes else None
        return decode_from_files(at.fds, at.offsets, at.sizes, at.checksums if self.verify else None, boxes, rows)

    def _proven(self, samples: np.ndarray, out: torch.Tensor, failures) -> torch.Tensor:
        if failures:
            i, reason = next((failure for failure in failures if failure[1] in SHARD_FAULTS), failures[0])
            fault = self.store.fault(int(samples[i]), reason)
            raise fault if reason in SHARD_FAULTS else Undecodable(str(fault), int(samples[i]))
        return out


def _channels_first(values):
    return values.permute(0, 3, 1, 2) if isinstance(values, torch.Tensor) and values.ndim == 4 else values


def _in_turn(groups: Iterator[list]) -> Iterator:
    with contextlib.closing(groups):
        for group in groups:
            yield from group


def _ahead(make, steps, num_threads: int, prefetch_mb: int, bytes_of) -> Iterator:
    """make(step) for each step, in order, run by threads as far ahead as the memory allows. bytes_of(step): what it takes."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    pending, held = collections.deque(), 0
    steps = iter(steps)
    step = next(steps, None)

    def start_one() -> None:
        nonlocal held, step
        pending.append((pool.submit(make, step), bytes_of(step)))
        held += bytes_of(step)
        step = next(steps, None)

    try:
        while step is not None or pending:
            while step is not None and len(pending) < _DEPTH * num_threads:
                if pending and held + bytes_of(step) > prefetch_mb * 2**20:
                    break
                start_one()
            future, num_bytes = pending.popleft()
            held -= num_bytes
            if step is not None and not pending:  # memory for one alone: the next is made while this one is used
                start_one()
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _output_size(index: ShardIndex, image_size: int) -> tuple[int, int] | None:
    if index.features is not None:
        return None
    if image_size < 0:
        raise UserError(f"data.image_size is {image_size}; expected pixels, or 0 for the stored size.")
    size = (image_size, image_size) if image_size else index.image_size
    if size is None:
        raise UserError(
            f"{index.folder}: the pictures differ in size, so a size is needed: --data.image_size 224, say."
        )
    return size


def _num_threads(threads: int) -> int:
    if threads < 0:
        raise UserError(f"data.threads is {threads}; expected a number of threads, or 0 for one a core.")
    return threads or len(os.sched_getaffinity(0))
