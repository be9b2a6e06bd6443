"""The index of a set whose shards lie behind URLs: the set's own, fetched, or one on the local disk that names URLs.

CACHE/index-<hash>/   index.json and tables of a set, as they were fetched
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import xxhash

from dist_train.durable import put_in_place, sync, writing
from dist_train.errors import UserError
from dist_train.file_locks import locked
from dist_train.index import ShardIndex, SplitIndex, file_checksum, load_index
from dist_train.remote import NotThere, download, join, shown
from dist_train.shard_cache import DEFAULT_GB, RemoteShards, ShardCache, default_folder, is_full

_SAFE_NAME, _CHECKSUM = re.compile(r"\w[\w.-]*"), re.compile(r"[0-9a-f]{32}")


def load_remote_index(url: str, cache_dir: str = "", cache_gb: float = DEFAULT_GB) -> ShardIndex:
    """The index at URL/index.json; its small files are kept in the cache, its shards come when they are read.

    Raises UserError if they cannot be fetched, or do not match each other.
    """
    cache = _shard_cache(cache_dir, cache_gb)
    with writing(cache.folder):
        cache.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(cache.folder / "index.lock"):
        scratch = cache.folder / "index.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        with writing(scratch):
            scratch.mkdir()
            try:
                checksum = _download(cache, join(url, "index.json"), scratch / "index.json")
            except NotThere as error:
                raise UserError(
                    f"{str(error).splitlines()[0]}\n  Expected the folder of a set. Tars made by others are indexed first: "
                    f"dist-train index '{shown(url)}/train-{{000000..000009}}.tar' --out shards/NAME"
                ) from None
        try:
            index = load_index(scratch)
        except UserError as error:
            raise UserError(f"{shown(url)}: {str(error).replace(str(scratch) + '/', '').splitlines()[0]}") from None
        _check_names(url, index)
        folder = cache.folder / f"index-{xxhash.xxh3_64_hexdigest((shown(url) + checksum).encode())}"
        if not _is_whole(folder, index, checksum):
            for split in index.splits.values():
                _fetch_tables(cache, url, scratch, split)
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                for path in scratch.iterdir():
                    sync(path)
                put_in_place(scratch, folder)
        shutil.rmtree(scratch, ignore_errors=True)
    return _with_remote(load_index(folder), RemoteShards(url, cache))


def behind_urls(index: ShardIndex, cache_dir: str = "", cache_gb: float = DEFAULT_GB) -> ShardIndex:
    """An index on the local disk whose files are URLs: its shards come into the cache when they are read."""
    _check_names(index.folder, index)
    return _with_remote(index, RemoteShards("", _shard_cache(cache_dir, cache_gb)))


def _shard_cache(cache_dir: str, cache_gb: float) -> ShardCache:
    if cache_gb <= 0:
        raise UserError(f"data.cache_gb is {cache_gb}; expected the GB that fetched shards may take on the local disk.")
    return ShardCache(default_folder(cache_dir), int(cache_gb * 1e9))


def _with_remote(index: ShardIndex, remote: RemoteShards) -> ShardIndex:
    splits = {name: dataclasses.replace(split, remote=remote) for name, split in index.splits.items()}
    return dataclasses.replace(index, splits=splits)


def _check_names(url: str, index: ShardIndex) -> None:
    """Names from elsewhere become names of files here: raise UserError unless they are plain."""
    bad = [name for name in index.splits if not _SAFE_NAME.fullmatch(name)]
    bad += [text for split in index.splits.values() for text in split.shard_checksums if not _CHECKSUM.fullmatch(str(text))]
    if bad:
        raise UserError(f"{shown(url)}: index.json names {json.dumps(bad[0])}; expected plain split names and checksums.")


def _is_whole(folder: Path, index: ShardIndex, checksum: str) -> bool:
    """Whether the folder holds what was fetched into it. checksum: of its index.json."""
    wanted = {"index.json": checksum}
    for split in index.splits.values():
        wanted |= split.table_files
    try:
        return all(file_checksum(folder / name) == expected for name, expected in wanted.items())
    except OSError:
        return False


def _fetch_tables(cache: ShardCache, url: str, folder: Path, split: SplitIndex) -> None:
    for name, expected in ({f"{split.name}.names.txt": None} | split.table_files).items():
        try:
            advice = "Check the set where it lies, with dist-train verify."
            _download(cache, join(url, name), folder / name, checksum=expected, advice=advice)
        except NotThere:
            if name in split.table_files:
                raise
            with writing(folder / name):
                os.unlink(folder / name)  # the names of the sources are optional


def _download(cache: ShardCache, url: str, path: Path, **how) -> str:
    """Fetch a small file to a path; return its checksum. Where the disk is full, shards that nobody reads make way."""
    while True:
        with writing(path), open(path, "wb", buffering=0) as file:
            try:
                return download(url, file, **how)
            except UserError as error:
                if not is_full(error):
                    raise
                if not cache.drop_one():
                    advice = "Make room there, or set data.cache_dir (--cache-dir) to a folder on another disk."
                    raise UserError(f"{str(error).splitlines()[0]}\n  {advice}") from error
