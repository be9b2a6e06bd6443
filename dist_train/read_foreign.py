"""One tar made by others, the task of a worker process: fetched where it must be, parsed, and its share of mean and std."""

import hashlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dist_train.errors import UserError
from dist_train.foreign_tar import Parsed, parse_tar, read_vector
from dist_train.remote import file_size, is_remote, shown
from dist_train.shard_cache import ShardCache
from dist_train.tar_lists import NamedTar
from dist_train.workers import num_cores, run_tasks

_SMALL_BYTES = 50_000_000  # below this, starting worker processes takes longer than the work
_SAY_EVERY_S = 10


@dataclass
class Sums:
    """What a tar adds to mean and std: of every `weight`-th sample, which stands for as many."""

    weight: int
    pixels: list[int]  # totals of `PixelSums`
    vectors: list[np.ndarray]  # (F,) float32 each
    num_decoded: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of those that cannot be decoded


def read_tars(tars: list[NamedTar], most_decoded: list[int], cache: ShardCache) -> list[tuple[Parsed, Sums]]:
    """Read every tar; those behind URLs go through the cache. most_decoded: samples decoded for `Sums`, for each tar."""
    if is_remote(tars[0].place):
        num_bytes = (file_size(tars[0].place) or _SMALL_BYTES) * len(tars)  # the others are taken to be like it
    else:
        num_bytes = sum(Path(tar.place).stat().st_size for tar in tars)
    workers = 1 if num_bytes < _SMALL_BYTES else min(num_cores(), len(tars))
    tasks = [(tar, most, cache) for tar, most in zip(tars, most_decoded, strict=True)]
    results: list[tuple[Parsed, Sums]] = [None] * len(tars)
    said = time.monotonic()
    for done, (number, result) in enumerate(run_tasks(_read_tar, tasks, workers, lambda samples: None), 1):
        results[number] = result
        if time.monotonic() - said > _SAY_EVERY_S:
            print(f"{done:,} of {len(tars):,} tars read", file=sys.stderr, flush=True)
            said = time.monotonic()
    return results


def _read_tar(task: tuple[NamedTar, int, ShardCache]) -> tuple[Parsed, Sums]:
    tar, most_decoded, cache = task
    if not is_remote(tar.place):
        return _parse_and_sum(tar, Path(tar.place), most_decoded)
    with cache.fetched(tar.place) as path:
        try:
            return _parse_and_sum(tar, path, most_decoded)
        except UserError as error:
            raise UserError(str(error).replace(str(path), shown(tar.place))) from None


def _parse_and_sum(tar: NamedTar, path: Path, most_decoded: int) -> tuple[Parsed, Sums]:
    from dist_train.pictures import PixelSums, prepare

    parsed = parse_tar(path, tar.place)
    _check_claims(tar, path, parsed)
    every = max(1, -(-len(parsed.rows) // most_decoded))
    sums, pixels = Sums(every, [], []), PixelSums()
    with open(path, "rb") as file:
        for key, row in zip(parsed.keys[::every], parsed.rows[::every], strict=True):
            file.seek(int(row["offset"]))
            payload = file.read(int(row["size"]))
            sums.num_decoded += 1
            if row["height"] == 0:
                sums.vectors.append(read_vector(payload))
            elif isinstance(fault := prepare([payload], pixels)[0], Exception):
                sums.damaged.append((key, str(fault)))
    sums.pixels = pixels.totals()
    return parsed, sums


def _check_claims(tar: NamedTar, path: Path, parsed: Parsed) -> None:
    """Compare a tar with what a list of shards says of it."""
    counts = {*parsed.key_counts, len(parsed.labels) + len(parsed.bad)}
    problem = ""
    if tar.num_bytes not in (None, parsed.num_bytes):
        problem = f"it has {parsed.num_bytes:,} bytes, not {tar.num_bytes:,}"
    elif tar.num_samples is not None and tar.num_samples not in counts:
        problem = f"it has {len(parsed.labels) + len(parsed.bad):,} samples, not {tar.num_samples:,}"
    elif tar.md5:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        problem = f"its md5sum is {found}, not {tar.md5}" if found != tar.md5 else ""
    if problem:
        raise UserError(f"{path}: differs from {tar.list_name}: {problem}.\n  Fetch the tar again, or write the list again.")
