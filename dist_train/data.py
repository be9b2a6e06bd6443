"""The stream: order + store + decode -> batches, decoded by threads ahead of the step that uses them.

from dist_train import open_stream
for batch in open_stream("shards/x", split="train", batch_size=64, image_size=224, crop="random_resized"):
    batch.images  # uint8 (N, 3, H, W)
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from dist_train import boxes as crop_boxes
from dist_train.bad_samples import BadSamples, Undecodable
from dist_train.cache import DecodedCache
from dist_train.decode import INTERPOLATIONS
from dist_train.errors import UserError
from dist_train.gpu_decode import GpuDecoder
from dist_train.index import ShardIndex, load_index
from dist_train.loader import Batch, Loader
from dist_train.order import Order, evaluation_share, rank_share, sample_keys
from dist_train.shard_cache import read_ahead, shards_in_play
from dist_train.workers import num_cores

__all__ = ["Batch", "open_evaluation", "open_stream", "picture_size", "to_device"]


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
    interpolation: str = "bilinear",
) -> Iterator[Batch]:
    """The shuffled, endless stream of batches of a split: every sample exactly once an epoch, any step at once.

    shards: a folder with an index.json, or a loaded index. batch_size: the global batch, over all ranks. world: (rank,
    world_size), this rank's equal part, and how many ranks share this machine. image_size: height and width, pixels; 0 keeps
    the stored size, which must then be the same for all. crop: "random_resized" cuts the random box of the sample's key
    (scale, ratio: share of the area and aspect, Szegedy et al. 2015), "resize" takes the whole picture; interpolation: "bilinear"
    or "bicubic", antialiased. Steps start_step,
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
    size = picture_size(index, image_size)
    if crop not in ("random_resized", "resize"):
        raise UserError(f"crop is {crop!r}; expected random_resized or resize.")
    if interpolation not in INTERPOLATIONS:
        raise UserError(f"interpolation is {interpolation!r}; expected {' or '.join(INTERPOLATIONS)}.")

    def random_boxes(rows, keys):
        return crop_boxes.random_resized_boxes(keys, rows["height"], rows["width"], scale, ratio)

    is_random = crop == "random_resized" and size is not None
    cache = DecodedCache(cache) if isinstance(cache, str) else cache
    if is_random and cache.mode not in ("auto", "none"):
        raise UserError(
            f"data.cache is {cache.mode}, but the random resized crop is cut while decoding, another in every epoch.\n"
            f"  Set data.cache to auto or none, or data.crop to resize."
        )
    load = Loader(
        index, split, size, random_boxes if is_random else None, verify, pin_memory, _num_threads(threads), prefetch_mb,
        gpu_decoder if is_random else None, interpolation,
    )  # fmt: skip
    if not is_random:
        load.keep(cache, "whole")
    bad = bad_samples or BadSamples(0)
    share = batch_size // world_size

    def make(steps: list[int]) -> list[Batch]:
        samples, epochs = map(np.concatenate, zip(*(order.rank_batch(s, rank, world_size) for s in steps), strict=True))
        while True:
            stored = source.stored_numbers(samples)
            keys, suspects = sample_keys(seed, epochs, stored), bad.suspects(samples)
            try:
                if len(suspects):  # first and by themselves: their batches would be decoded twice
                    load.decoded(stored, keys, suspects)
                return load(steps, share, stored, epochs, keys)
            except Undecodable as fault:
                samples = bad.replaced(samples, fault, source.num_samples)

    def steps() -> Iterator[int]:
        return itertools.count(start_step) if stop_step is None else iter(range(start_step, stop_step))

    batches = load.batches(make, steps(), share)
    if load.store.split.remote is None:
        return batches
    walk = replace(order)  # a copy: an order keeps two epochs, and reading ahead would put out those the decoder is in
    upcoming = (load.not_kept(source.stored_numbers(walk.rank_batch(step, rank, world_size)[0])) for step in steps())
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
    interpolation: str = "bilinear",
) -> Iterator[Batch]:
    """This rank's part of one pass over a split, in shard order: every sample on exactly one rank, nothing padded.

    batch_size: samples per batch of this rank; the last batch may be smaller. Where pictures differ in size, the
    central crop that keeps `eval_crop` of the shorter side is decoded to image_size (0: the whole picture, squeezed);
    one-size pictures come whole and as they are. cache, interpolation: as in `open_stream`; a cache pays for passes after the
    first.
    """
    size = picture_size(index, image_size)
    source = index.split(split)
    share = evaluation_share(source.num_samples, *world[:2])

    def central_boxes(rows, keys):
        return crop_boxes.central_boxes(rows["height"], rows["width"], size, eval_crop)

    boxes = central_boxes if eval_crop and not index.image_size else None
    load = Loader(
        index, split, index.image_size or size, boxes, verify, pin_memory, _num_threads(threads), prefetch_mb,
        interpolation=interpolation,
    )  # fmt: skip
    cache = DecodedCache(cache) if isinstance(cache, str) else cache
    load.keep(cache, f"central {eval_crop}" if boxes else "whole")

    def make(steps: list[int]) -> list[Batch]:
        samples = np.array(share[steps[0] * batch_size : (steps[-1] + 1) * batch_size], np.int64)
        samples, epochs = source.stored_numbers(samples), np.zeros_like(samples)
        return load(steps, batch_size, samples, epochs, sample_keys(0, epochs, samples))

    steps = range(-(-len(share) // batch_size))
    batches = load.batches(make, iter(steps), batch_size)
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
    copy_stream, compute_stream = _copy_stream(device), torch.cuda.current_stream(device)

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


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: torch keeps the memory that was once used on a stream for that stream."""
    return torch.cuda.Stream(device)


def picture_size(index: ShardIndex, image_size: int) -> tuple[int, int] | None:
    """(height, width) of pictures that are brought to image_size pixels, or kept as stored where it is 0; None for tables.

    Raises UserError where they are to be kept and differ in size. Of the index, features, image_size and folder are read.
    """
    if index.features is not None:
        return None
    if image_size < 0:
        raise UserError(f"data.image_size is {image_size}; expected pixels, or 0 for the stored size.")
    size = (image_size, image_size) if image_size else index.image_size
    if size is None:
        raise UserError(f"{index.folder}: the pictures differ in size, so a size is needed: --data.image_size 224, say.")
    return size


def _num_threads(threads: int) -> int:
    if threads < 0:
        raise UserError(f"data.threads is {threads}; expected a number of threads, or 0 for one a core.")
    return threads or num_cores()
