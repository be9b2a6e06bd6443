"""Sample numbers -> batches, decoded by threads ahead of their use, or gathered from what is kept decoded."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch

from dist_train.bad_samples import Undecodable
from dist_train.cache import DecodedCache, DeviceRows
from dist_train.decode import SHARD_FAULTS, Failures, decode_from_files
from dist_train.gpu_decode import GpuDecoder
from dist_train.index import ShardIndex
from dist_train.recycled import Recycled
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


class Loader:
    """Numbers in the stored split -> Batch. Called by many threads at once.

    size: (height, width) of what comes, pixels; None for tables. boxes(rows, keys): what is cut out of each picture, (n, 4); None
    for the whole picture; interpolation: how it is resized. num_threads decode at a time, batches of at most prefetch_mb MiB ahead.
    """

    def __init__(
        self, index: ShardIndex, split: str, size: tuple[int, int] | None, boxes, verify: bool, pin_memory: bool,
        num_threads: int, prefetch_mb: int, gpu_decoder: GpuDecoder | None = None, interpolation: str = "bilinear",
    ):  # fmt: skip
        self.boxes, self.verify, self.pin_memory = boxes, verify, pin_memory
        self.num_threads, self.prefetch_mb, self.gpu_decoder = num_threads, prefetch_mb, gpu_decoder
        self.store = Store(index.split(split).stored)
        self.split = self.store.split.name
        self.is_table = index.features is not None
        self.interpolation, self.is_resized = interpolation, boxes is not None or index.image_size != size
        self.shape = (len(index.features),) if self.is_table else (*size, 3)
        self.dtype = torch.float32 if self.is_table else torch.uint8
        self.kept = self.helpers = None
        self.num_parts = 1
        self.recycled = Recycled()
        is_pinning = pin_memory and torch.cuda.is_available()
        # what threads begin with: pinning memory, each would open the first GPU besides this process's own
        self._begin = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if is_pinning else None

    @property
    def sample_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def keep(self, cache: DecodedCache, how: str) -> None:
        """Keep what is decoded from now on. how: the rule by which it is, in words, but for the interpolation."""
        if self.is_resized and self.interpolation != "bilinear":  # which files from before there was a choice are
            how += f", {self.interpolation}"

        def in_order() -> Iterator[np.ndarray]:
            at_once = max(1, 2**22 // self.sample_bytes)
            num_samples = self.store.split.num_samples
            steps = range(-(-num_samples // at_once))
            if self.store.split.remote:  # shard after shard: more than these would only stand in each other's way
                self.store.max_open = min(self.store.max_open, 2 + self.num_threads)

            def chunk(step: int) -> np.ndarray:
                samples = np.arange(step * at_once, min(num_samples, (step + 1) * at_once))
                return self._decoded(samples, np.zeros_like(samples)).numpy()

            return self._ahead(chunk, steps, lambda step: at_once * self.sample_bytes)

        self.kept = cache.rows(Wanted(self.store.split, self.shape, self.dtype, how, in_order))

    def not_kept(self, samples: np.ndarray) -> np.ndarray:
        """Those of the samples whose shards will have to be read."""
        return samples if self.kept is None else samples[self.kept.is_missing(samples)]

    def __call__(self, steps: list[int], batch_size: int, samples: np.ndarray, epochs: np.ndarray, keys: np.ndarray):
        """The batches of `steps`, whose samples stand one after the other; the last batch may be smaller."""
        if self.kept is None:
            values = self._decoded(samples, keys)
        else:
            values = self.kept.read(samples, lambda missing: self.decoded(samples, keys, missing), self.pin_memory)
        labels = torch.from_numpy(self.store.table["label"][samples].astype(np.int64))
        keys = torch.from_numpy(keys)
        if self.pin_memory:  # a copy from pageable memory would make the host wait
            labels, keys = labels.pin_memory(), keys.pin_memory()
        columns = (labels, torch.from_numpy(samples), torch.from_numpy(epochs), keys)
        if len(steps) == 1:
            return [Batch(steps[0], self.split, _channels_first(values), *columns)]
        rows = zip(*(column.split(batch_size) for column in (_channels_first(values), *columns)), strict=True)
        return [Batch(step, self.split, *row) for step, row in zip(steps, rows, strict=True)]

    def batches(self, make, steps: Iterator[int], batch_size: int) -> Iterator[Batch]:
        """make(list of steps) -> their batches, for all steps, ahead of their use.

        Small batches are made several a call, or Python would take longer than a whole cache's gather; of batches so large
        that memory allows fewer than threads, several threads make parts of one. Those kept on a device are put together in the
        thread of whoever asks for them.
        """
        num_threads, prefetch_bytes = self.num_threads, self.prefetch_mb * 2**20
        batch_bytes = max(1, batch_size * self.sample_bytes)
        gathered_steps = max(1, min(_GROUP_STEPS, min(_GROUP_BYTES, prefetch_bytes // (2 * num_threads)) // batch_bytes))
        is_one_by_one = self.kept or self.gpu_decoder or self.store.split.remote
        decoded_steps = 1 if is_one_by_one else max(1, min(gathered_steps, _DECODED_BYTES // batch_bytes))
        self.num_parts = num_threads // max(1, min(num_threads, prefetch_bytes // batch_bytes))
        if self.num_parts > 1:
            self.helpers = ThreadPoolExecutor(num_threads, "decode-part", self._begin)

        def groups() -> Iterator[list[int]]:
            yield from ([step] for step in itertools.islice(steps, num_threads))  # nobody is to wait for the first ones
            while group := list(itertools.islice(steps, gathered_steps if self.kept and self.kept.is_full else decoded_steps)):
                yield group

        made = _in_turn(self._ahead(make, groups(), lambda group: len(group) * batch_bytes))
        return self._gathered(made) if isinstance(self.kept, DeviceRows) else made

    def _ahead(self, make, steps, bytes_of) -> Iterator:
        """make(step) for each step, in order, run by threads as far ahead as the memory allows. bytes_of(step): what it takes."""
        pool = ThreadPoolExecutor(self.num_threads, "decode", self._begin)
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
                while step is not None and len(pending) < _DEPTH * self.num_threads:
                    if pending and held + bytes_of(step) > self.prefetch_mb * 2**20:
                        break
                    start_one()
                future, num_bytes = pending.popleft()
                held -= num_bytes
                if step is not None and not pending:  # memory for one alone: the next is made while this one is used
                    start_one()
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _gathered(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        with contextlib.closing(batches):
            for batch in batches:
                yield replace(batch, images=_channels_first(self.kept.gather(batch.images)))

    def decoded(self, samples: np.ndarray, keys: np.ndarray, places: np.ndarray) -> torch.Tensor:
        """What the samples at these places decode to: (n, H, W, 3) uint8, or (n, F) float32 of a table. Raises Undecodable."""
        try:
            return self._decoded(samples[places], keys[places])
        except Undecodable as fault:
            raise Undecodable(places[fault.places], fault.reasons) from None

    def _decoded(self, samples: np.ndarray, keys: np.ndarray) -> torch.Tensor:
        """(n, H, W, 3) uint8, or (n, F) float32 of a table."""
        if self.gpu_decoder:
            at = self.store.locate(samples)
            boxes = self.boxes(self.store.table.take(samples), keys) if self.boxes else None
            return self._proven(samples, *self.gpu_decoder(at.fds, at.offsets, at.sizes, at.checksums if self.verify else None,
                                                           boxes, self.shape[:2], self.interpolation))  # fmt: skip
        out = self.recycled.tensor((len(samples), *self.shape), self.dtype, self.pin_memory)
        rows = out.numpy()
        if self.is_table:
            self.store.read_vectors(samples, rows, self.verify)
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
        checksums = at.checksums if self.verify else None
        return decode_from_files(at.fds, at.offsets, at.sizes, checksums, boxes, rows, self.interpolation)

    def _proven(self, samples: np.ndarray, out: torch.Tensor, failures) -> torch.Tensor:
        for i, reason in failures:
            if reason.startswith(SHARD_FAULTS):
                raise self.store.fault(int(samples[i]), reason)
        if failures:
            reasons = [str(self.store.fault(int(samples[i]), reason)) for i, reason in failures]
            raise Undecodable(np.array([i for i, _ in failures]), reasons)
        return out


def _channels_first(values):
    return values.permute(0, 3, 1, 2) if isinstance(values, torch.Tensor) and values.ndim == 4 else values


def _in_turn(groups: Iterator[list]) -> Iterator:
    with contextlib.closing(groups):
        for group in groups:
            yield from group
