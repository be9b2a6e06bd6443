"""Write single shards of a finished set again, from the raw data: only what is missing or damaged, and only as it was."""

import contextlib
import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from dist_train.convert import plan_conversion, write_shards
from dist_train.durable import put_in_place, writing
from dist_train.errors import UserError
from dist_train.index import ShardIndex, file_checksum, load_index
from dist_train.settings import flatten, to_dict
from dist_train.shard_config import FREE_SHARD_SETTINGS, ShardConfig, check_settings
from dist_train.sources import SPLITS
from dist_train.verify import advice, damage_of
from dist_train.workers import num_cores


def repair(config: ShardConfig) -> list[str]:
    """Replace every shard of config.out that is not as its index says; returns their names.

    A shard takes its place only when its checksum is the one in the index. Raises UserError where the raw data or the
    settings give other bytes, or something else than shards is damaged; what was whole stays as it was.
    """
    index = load_index(config.out)
    if config.split.test < 0:  # the set's own share, which may be of another default
        test = index.source.get("split", {}).get("test", config.split.test)
        config = replace(config, split=replace(config.split, test=test))
    check_settings(config)
    if index.is_foreign:
        raise UserError(f"{config.out}: is an index of tars made elsewhere; they cannot be written again from here.\n"
                        f"  See what is damaged, and what to do, with: dist-train verify {config.out}")  # fmt: skip
    damaged = damaged_shards(index)
    if damaged:
        _rewrite(config, index, damaged)
    left = damage_of(index)
    if left.lines:
        only_shards = ["  Shards alone can be repaired."] if left.tables else []
        raise UserError("\n".join([*left.lines, *only_shards, advice(index, left)]))
    return [index.splits[split].files[number] for split, number in damaged]


def damaged_shards(index: ShardIndex) -> list[tuple[str, int]]:
    """(split, number) of the shards that are missing, of another size, or of another checksum."""

    def is_whole(shard: tuple[str, int]) -> bool:
        split = index.splits[shard[0]]
        path = Path(index.folder, split.files[shard[1]])
        try:
            return path.stat().st_size == split.shard_bytes[shard[1]] and file_checksum(path) == split.shard_checksums[shard[1]]
        except OSError:
            return False

    shards = [(name, number) for name, split in index.splits.items() for number in range(split.num_shards)]
    with ThreadPoolExecutor(num_cores()) as pool:
        return [shard for shard, whole in zip(shards, pool.map(is_whole, shards), strict=True) if not whole]


def _rewrite(config: ShardConfig, index: ShardIndex, damaged: list[tuple[str, int]]) -> None:
    with _scratch_folder(Path(f"{config.out}.repair")) as scratch:
        source, planned = plan_conversion(config)
        numbers = {(SPLITS[shard.split], shard.number): k for k, shard in enumerate(planned)}
        if set(numbers) != {(name, number) for name, split in index.splits.items() for number in range(split.num_shards)}:
            num_listed = sum(split.num_shards for split in index.splits.values())
            raise _differs(config, index, f"{len(numbers)} shards come of it, the index lists {num_listed}")
        wanted = {numbers[shard]: shard for shard in damaged}
        results = write_shards(config, source, planned, scratch, sorted(wanted))
        other = []
        for k, result in zip(sorted(wanted), results, strict=True):
            split, number = index.splits[wanted[k][0]], wanted[k][1]
            name = split.files[number]
            if result.checksum != split.shard_checksums[number]:
                other.append(name)
                continue
            with writing(Path(config.out, name)):
                put_in_place(scratch / name, Path(config.out, name))
        if other:
            shutil.rmtree(scratch, ignore_errors=True)  # another attempt would end the same
            raise _differs(config, index, f"{', '.join(other[:5])} would get other bytes than the index says")


@contextlib.contextmanager
def _scratch_folder(scratch: Path):
    """A folder beside the set, held by this process alone, and removed at the end."""
    with writing(scratch):
        scratch.mkdir(exist_ok=True)
        lock = os.open(scratch, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{scratch}: another process is repairing this set.\n  Wait for it, or end it.") from None
        yield scratch
        shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)


def _differs(config: ShardConfig, index: ShardIndex, what: str) -> UserError:
    """The error for raw data or settings that are not those the set was made of."""
    now = {key: value for key, value in flatten(to_dict(config)).items() if key not in FREE_SHARD_SETTINGS}
    then = flatten(to_dict(ShardConfig())) | flatten(index.source)  # a set may be older than a setting
    settings = [f"{key} was {then[key]!r} and is {now[key]!r}" for key in sorted(now) if now[key] != then[key]]
    changed = "the raw data have changed since, or an older version wrote it"
    why = f"these settings differ: {'; '.join(settings)}" if settings else changed
    return UserError(f"{config.out}: cannot be repaired: {what}; {why}.\n  Write the set again with --overwrite true.")
