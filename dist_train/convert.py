"""A dataset into train, val and test tar shards with an index: planned, written in parallel, whole or not at all.

Everything is written into shards/NAME.partial, which takes its name only when the index in it is complete. A conversion
that is cut short goes on where it stopped; its bytes depend neither on that nor on the number of workers.
"""

import contextlib
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_train.durable import sync, writing
from dist_train.errors import UserError
from dist_train.index import ShardIndex, SplitIndex, holds_foreign_index, load_index, save_index, save_table
from dist_train.partition import TRAIN, assign_splits, cut_into_shards, name_draws, test_share, told_splits
from dist_train.settings import to_dict
from dist_train.shard_config import FREE_SHARD_SETTINGS, ShardConfig, check_settings
from dist_train.sources import SPLITS, Source, open_source
from dist_train.tables import column_statistics, untaught_columns
from dist_train.workers import num_cores, run_tasks
from dist_train.write_shard import ShardResult, ShardTask, write_shard, written_result

_OURS = re.compile(
    r"(train|val|test)(-\d{6}\.tar|\.samples\.npy|\.names\.txt)|index\.json|inspect\.(png|html)|part-\d+-of-\d+\.lock"
)
_SMALL_BYTES = 16_000_000  # below this, starting worker processes takes longer than the work
_THREADED_BYTES = 4_000_000_000  # above this, starting them takes nothing
_MOST_THREADS = 8  # more would wait for the interpreter
_LARGE_PICTURE = 16_000  # bytes; decoding it takes many times as long as what needs the interpreter


class PlannedShard(NamedTuple):
    """A shard to be written: its number in a split (a number in SPLITS), and the samples in it, in order."""

    split: int
    number: int
    rows: np.ndarray  # (n,) int64, numbers in the source

    @property
    def file(self) -> str:
        return f"{SPLITS[self.split]}-{self.number:06d}.tar"


def convert(config: ShardConfig) -> ShardIndex:
    """Convert a dataset; returns the index of the finished set in config.out.

    Raises UserError, leaving what was finished before untouched, where settings or raw data are at fault, more than
    config.max_bad samples cannot be read, or the disk does not take the data.
    """
    check_settings(config)
    out = Path(config.out)
    with _staging_folder(out, config) as staging:
        source, planned = plan_conversion(config)
        results = _written_parts(config, source, planned, staging) if config.join else None
        _remove_strangers(staging, {shard.file for shard in planned})
        results = results or write_shards(config, source, planned, staging)
        with writing(staging):
            save_index(_gather(config, source, staging, planned, results))
            for notes in staging.glob("*.done"):
                notes.unlink()
            _put_in_place(staging, out)
    return load_index(out)


def convert_part(config: ShardConfig) -> int:
    """Write every N-th shard, config.part being I/N, into the folder that all parts share; returns how many.

    Which shards there are, and their bytes, do not depend on the parts. Raises UserError as `convert`.
    """
    check_settings(config)
    part, num_parts = part_of(config.part)
    out = Path(config.out)
    with _staging_folder(out, config, shared=True) as staging, _alone(staging / f"part-{part}-of-{num_parts}.lock"):
        source, planned = plan_conversion(config)
        mine = range(part, len(planned), num_parts)
        for k in mine:
            for left in staging.glob(f"{planned[k].file}.*.partial"):
                left.unlink()  # of an attempt of this part that was cut short
        write_shards(config, source, planned, staging, mine)
    return len(mine)


def plan_conversion(config: ShardConfig) -> tuple[Source, list[PlannedShard]]:
    """The opened source, and every shard to be written of it."""
    source = open_source(config)
    for note in source.notes:
        print(f"{config.raw}: {note}")
    plan = _plan(config, source)
    return source, [PlannedShard(split, number, rows) for split, shards in plan.items() for number, rows in enumerate(shards)]


def described(
    config: ShardConfig, source: Source, planned: list[PlannedShard], folder: Path, chosen: Sequence[int] | None = None
) -> Iterator[ShardTask]:
    """The task of each shard, or of the chosen ones, to be written into a folder."""
    first_key, chosen = {shard.split: 0 for shard in planned}, set(range(len(planned)) if chosen is None else chosen)
    for k, shard in enumerate(planned):
        if k in chosen:
            samples = source.take(shard.rows)
            yield ShardTask(folder / shard.file, first_key[shard.split], samples, config.resize, config.quality, config.check)
        first_key[shard.split] += len(shard.rows)


def _plan(config: ShardConfig, source: Source) -> dict[int, list[np.ndarray]]:
    """{split: the samples of each of its shards}; splits without samples are left out."""
    draws, test = name_draws(source.names, config.seed), test_share(config.split, source.preset)
    splits = assign_splits(source.labels, source.preset, draws, config.split.val, test, source.groups)
    if told := told_splits(config.split, source.preset, splits):
        print(f"{config.raw}: {told}.")
    sizes = source.sizes
    if config.resize:  # a JPEG of quality 90 takes about 0.4 bytes a pixel
        sizes = np.minimum(sizes, int(0.6 * config.resize**2) + 512)
    return {
        split: shards
        for split in range(len(SPLITS))
        if (shards := cut_into_shards(np.flatnonzero(splits == split), draws, sizes, config.shard_mb * 1e6,
                                      config.min_shards if split == TRAIN else 1))
    }  # fmt: skip


def write_shards(
    config: ShardConfig, source: Source, planned: list[PlannedShard], folder: Path, chosen: Sequence[int] | None = None
) -> list[ShardResult]:
    """Write all shards, or the chosen ones, into the folder; results in the order of the plan."""
    chosen = range(len(planned)) if chosen is None else chosen
    num_samples = sum(len(planned[k].rows) for k in chosen)
    mean_bytes = int(source.sizes.sum()) / len(source.labels)
    num_bytes, decodes_long = mean_bytes * num_samples, source.features is None and mean_bytes >= _LARGE_PICTURE
    workers = 1 if num_bytes < _SMALL_BYTES and not decodes_long else num_cores()
    workers = min(config.workers or workers, len(chosen))
    in_threads = decodes_long and num_bytes < _THREADED_BYTES and workers <= _MOST_THREADS
    results, bad = [None] * len(chosen), []
    with (
        _progress(num_samples, config.out) as advance,
        contextlib.closing(
            run_tasks(write_shard, described(config, source, planned, folder, chosen), workers, advance, in_threads)
        ) as finished,
    ):
        for number, result in finished:
            results[number] = result
            rows = planned[chosen[number]].rows
            bad += [(source.names[rows[place]], why) for place, why in result.bad]
            _check_bad(config, bad)
    return results


def _gather(
    config: ShardConfig, source: Source, staging: Path, planned: list[PlannedShard], results: list[ShardResult]
) -> ShardIndex:
    """Tables of samples written, and the index that is to be saved."""
    splits, left_out, sizes, train_rows = {}, list(source.left_out), set(), np.zeros(0, np.int64)
    for split in dict.fromkeys(shard.split for shard in planned):
        mine = [(shard, result) for shard, result in zip(planned, results, strict=True) if shard.split == split]
        kept = np.concatenate([shard.rows[result.kept] for shard, result in mine])
        table = np.concatenate([result.rows for _, result in mine])
        if not len(kept):
            raise UserError(f"{config.raw}: no sample of the {SPLITS[split]} split can be read.")
        left_out += [{"name": source.names[shard.rows[place]], "why": why} for shard, result in mine for place, why in result.bad]
        sizes |= set(map(tuple, np.unique(table[["height", "width"]]).tolist()))
        train_rows = kept if split == TRAIN else train_rows
        name = SPLITS[split]
        splits[name] = SplitIndex(
            name=name,
            folder=str(staging),
            files=[shard.file for shard, _ in mine],
            shard_samples=np.array([len(result.rows) for _, result in mine], np.int64),
            shard_bytes=np.array([result.size for _, result in mine], np.int64),
            shard_checksums=[result.checksum for _, result in mine],
            class_counts=np.bincount(table["label"], minlength=len(source.classes)),
            table_checksum=save_table(staging, name, table, [source.names[i] for i in kept]),
        )
    if source.features is None:
        from dist_train.pictures import mean_and_std

        of_train = [result.totals for shard, result in zip(planned, results, strict=True) if shard.split == TRAIN]
        totals = [sum(column) for column in zip(*of_train, strict=True)]
        if len(train_rows) and not totals[0]:
            raise UserError(f"{config.raw}: of the pictures that --check sample decodes none is good.\n  Use --check all.")
        mean, std = mean_and_std(totals)
    else:
        rows = source.store.rows[train_rows]
        mean, std = column_statistics(rows)
        for note in untaught_columns(rows, source.features):
            print(f"{config.raw}: {note}")
    settings = to_dict(config)
    for free in FREE_SHARD_SETTINGS:
        settings.pop(free)
    return ShardIndex(
        folder=str(staging), name=Path(config.out).name, classes=source.classes, splits=splits, mean=mean, std=std,
        image_size=sizes.pop() if len(sizes) == 1 and source.features is None else None, features=source.features,
        left_out=left_out, source=settings,
    )  # fmt: skip


def _written_parts(config: ShardConfig, source: Source, planned: list[PlannedShard], staging: Path) -> list[ShardResult]:
    """What the parts have written. Raises UserError unless it is every shard, as this conversion would write it."""
    results = [written_result(task) for task in described(config, source, planned, staging)]
    missing = [f"{planned[k].file} (shard {k})" for k, result in enumerate(results) if result is None]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{config.out}: {len(missing)} shards are not written, or of other raw data or settings: "
                        f"{', '.join(missing[:5])}{more}.\n  Shard K is written by --part I/N where I is K modulo N.")  # fmt: skip
    _check_bad(
        config,
        [(source.names[planned[k].rows[place]], why) for k, result in enumerate(results) for place, why in result.bad],
    )
    return results


def _check_bad(config: ShardConfig, bad: list[tuple[str, str]]) -> None:
    """Raise UserError if more samples are unreadable than config.max_bad. bad: (name, reason)."""
    if len(bad) > config.max_bad:
        few = "".join(f"\n  {name}: {why}" for name, why in sorted(bad)[:5])
        samples = f"{len(bad)} {'sample' if len(bad) == 1 else 'samples'}"
        raise UserError(
            f"{config.raw}: {samples} so far cannot be read; max_bad allows {config.max_bad}.{few}\n"
            f"  Mend or remove them, or leave them out with --max-bad {max(10, 2 * len(bad))}. "
            f"What is finished is kept for the next start."
        )


def part_of(text: str) -> tuple[int, int]:
    """(part, number of parts) of "I/N". Raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, num_parts = map(int, match.groups()) if match else (0, 0)
    if not part < num_parts:
        raise UserError(f"part is {text!r}; expected I/N with I from 0 to N - 1, such as 0/16.")
    return part, num_parts


@contextlib.contextmanager
def _staging_folder(out: Path, config: ShardConfig, shared: bool = False):
    """shards/NAME.partial, held by this process alone, or with others that share it.

    Raises UserError if shards/NAME is not to be written.
    """
    staging, replaced = (out.with_name(f"{out.name}.{word}") for word in ("partial", "replaced"))
    if config.path and config.source == "folder":
        here, there = out.resolve(), Path(config.path).resolve()
        if here == there or here in there.parents or there in here.parents:
            raise UserError(f"{out}: the shards cannot be written into the folder of the raw data, {config.path}.")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{staging}: cannot be made: {error.strerror}.\n  Pick another --out.") from None
    try:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{staging}: another process is writing this set.\n  Wait for it, or end it.") from None
        if not (staging.exists() and os.path.samestat(os.fstat(lock), os.stat(staging))):  # renamed before it was locked
            raise UserError(f"{out}: another process has just finished this set.\n  Look at it, then start again if need be.")
        if replaced.exists() and not shared:  # a swap was cut short: before its second step the old set is still the set
            shutil.rmtree(replaced) if out.exists() else os.rename(replaced, out)
        _check_target(out, config.overwrite)
        yield staging
    finally:
        os.close(lock)
        if not shared:
            with contextlib.suppress(OSError):
                staging.rmdir()  # only if nothing was written


@contextlib.contextmanager
def _alone(path: Path):
    """Hold a lock file. Raises UserError if another process holds it."""
    with writing(path), open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing this part.\n  Wait for it, or end it.") from None
        yield


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    held = sorted(os.listdir(out)) if out.is_dir() else ["a file of that name"]
    if "index.json" not in held:
        if held:
            raise UserError(f"{out}: holds {', '.join(held[:3])} but no index.json: it is no set of shards.\n"
                            f"  Pick another --out, or move it away.")  # fmt: skip
        return
    if not overwrite:
        raise UserError(f"{out}: a finished set is there.\n  Replace it with --overwrite true, or pick another --out.")
    if holds_foreign_index(out):  # a damaged one is to be replaced
        raise UserError(f"{out}: these tars were made elsewhere; they are not replaced.\n  Pick another --out.")
    strangers = [name for name in held if not _OURS.fullmatch(name)]
    if strangers:
        raise UserError(f"{out}: holds {', '.join(strangers[:3])}, which dist-train did not write and would delete.\n"
                        f"  Move it away, or pick another --out.")  # fmt: skip


def _remove_strangers(staging: Path, files: set[str]) -> None:
    """Delete what an earlier attempt left and this one cannot use."""
    for path in staging.iterdir():
        if path.name.removesuffix(".done") in files:
            continue
        if not _OURS.match(path.name):
            raise UserError(f"{path}: dist-train did not write this and would delete it.\n  Move it away.")
        path.unlink()


def _put_in_place(staging: Path, out: Path) -> None:
    replaced = out.with_name(f"{out.name}.replaced")
    sync(staging)
    if out.exists():
        os.rename(out, replaced)
    os.rename(staging, out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _progress(total: int, what: str):
    """Yields a function that takes the number of samples finished since its last call: a bar, or a line every 10 s."""
    if sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                   progress.TextColumn("{task.fields[rate]}"), progress.TimeRemainingColumn())  # fmt: skip
        with progress.Progress(*columns, console=Console(stderr=True)) as bar:
            task, start = bar.add_task(what, total=total, rate=""), time.monotonic()

            def advance(samples: int) -> None:
                done = bar.tasks[0].completed + samples
                bar.update(task, advance=samples, rate=f"{done / max(0.1, time.monotonic() - start):,.0f}/s")

            yield advance
        return
    done, said = 0, time.monotonic()

    def advance(samples: int) -> None:
        nonlocal done, said
        done += samples
        if time.monotonic() - said > 10:
            print(f"{what}: {done:,} of {total:,} samples", file=sys.stderr, flush=True)
            said = time.monotonic()

    yield advance
