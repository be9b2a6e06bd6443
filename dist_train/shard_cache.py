"""Shards of a remote set on the local disk: fetched when they are needed or before, bounded, shared by a node's processes.

    CACHE/<checksum>.tar         a whole, proven shard; locked (shared) while a process has it open
    CACHE/<checksum>.tar.partial one being fetched; locked (exclusive) by whoever fetches it, and of its final size at once

Locks are flock's, so they end with their process: what a crash leaves behind is taken over or removed by the next.
"""

import contextlib
import dataclasses
import fcntl
import os
import secrets
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dist_train.errors import UserError
from dist_train.index import SplitIndex
from dist_train.order import Order
from dist_train.remote import download, file_size, join, read_range, shown
from dist_train.tars import writing

DEFAULT_GB = 100.0
PATIENCE_S = 30.0  # batches in the making let go of their shards sooner, on a busy machine as well
_POLL_S = 0.02
_IDLE_BATCHES = 1_000  # looked at ahead of the reading where all of their samples are kept
_SOON_S = 0.2  # in which batches in the making usually let go of a shard


def _none() -> None:
    """There is nothing to let go of."""


def default_folder(cache_dir: str = "") -> Path:
    """Where shards are kept: cache_dir, or dist_train below the user's cache folder."""
    return Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dist_train"))


@dataclasses.dataclass(frozen=True)
class RemoteShards:
    """Where the shards of a split come from, and where they are kept. url: empty where all files are URLs themselves."""

    url: str
    cache: "ShardCache"

    def shown(self, split: SplitIndex, shard: int) -> str:
        """The shard in messages: its URL, and the local copy."""
        return f"{shown(join(self.url, split.files[shard]))} (kept as {self.cache.folder}/{split.shard_checksums[shard]}.tar)"

    def open(
        self, split: SplitIndex, shard: int, is_wanted: Callable[[], bool] = lambda: True, let_go: Callable[[], None] = _none
    ) -> int:
        """A descriptor of the whole shard, as `ShardCache.open`."""
        url, num_bytes = join(self.url, split.files[shard]), int(split.shard_bytes[shard])
        return self.cache.open(url, split.shard_checksums[shard], num_bytes, is_wanted, let_go)

    def discard(self, split: SplitIndex, shard: int) -> bool:
        """Remove the local copy, unless somebody reads it; says whether it is gone."""
        return _remove_unused(self.cache.folder / f"{split.shard_checksums[shard]}.tar")

    def is_kept(self, split: SplitIndex, shard: int) -> bool:
        """Whether the shard is on the local disk."""
        return (self.cache.folder / f"{split.shard_checksums[shard]}.tar").exists()

    def read_range(self, split: SplitIndex, shard: int, offset: int, num_bytes: int) -> bytes | None:
        """A part of a shard that is not on the local disk, as `remote.read_range`."""
        return read_range(join(self.url, split.files[shard]), offset, num_bytes)


class ShardCache:
    """A folder that holds at most limit_bytes of shards; the least recently used go first, and none that is in use."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(
        self, url: str, checksum: str, num_bytes: int, is_wanted: Callable[[], bool] = lambda: True,
        let_go: Callable[[], None] = _none,
    ) -> int:  # fmt: skip
        """A descriptor of the whole shard, fetched if it is not there; it is not removed until the descriptor is closed.

        let_go: called again and again while there is no room, to close a shard that the caller can do without.
        Raises UserError if it cannot be fetched or there is no room for it, InterruptedError once is_wanted() is false.
        """
        whole = self.folder / f"{checksum}.tar"
        partial = self.folder / f"{checksum}.tar.partial"
        while True:
            fd = _open_whole(whole, num_bytes)
            if fd is not None:
                return fd
            fd = self._create(partial)
            try:
                if _try_lock(fd, fcntl.LOCK_EX, partial) and _is_at(fd, partial):
                    if not whole.exists():
                        self._fetch(fd, partial, whole, url, checksum, num_bytes, is_wanted, let_go)
                        return fd
                    partial.unlink()  # fetched by another process since we looked
            except BaseException:
                with contextlib.suppress(OSError):
                    if _try_lock(fd, fcntl.LOCK_EX, partial) and _is_at(fd, partial):
                        partial.unlink()
                os.close(fd)
                raise
            os.close(fd)
            if not is_wanted():
                raise InterruptedError(f"{shown(url)}: no longer wanted")
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def fetched(self, url: str):
        """The path of a file of which only the URL is known, fetched and kept as a shard; not removed inside the context.

        Raises UserError if it cannot be fetched or there is no room for it.
        """
        partial = self.folder / f"{secrets.token_hex(16)}.tar.partial"
        num_bytes = file_size(url)  # where the server does not say, the next file makes room for this one
        fd = self._create(partial)
        while not (_try_lock(fd, fcntl.LOCK_EX, partial) and _is_at(fd, partial)):  # taken for another's leavings
            os.close(fd)
            fd = self._create(partial)
        try:
            # whoever indexes beside us lets go of its tar when it is read, however long that takes
            self._reserve(fd, partial, url, num_bytes or 0, lambda: True, is_patient=True)
            with open(partial, "r+b", buffering=0) as file:
                checksum = download(url, file, num_bytes)
                with writing(partial):
                    os.fsync(file.fileno())  # as in `_fetch`
            whole = self.folder / f"{checksum}.tar"
            with self.locked("room.lock"), writing(whole):
                os.replace(partial, whole)
            fcntl.flock(fd, fcntl.LOCK_SH)
            yield whole
        finally:
            partial.unlink(missing_ok=True)
            os.close(fd)

    def _create(self, path: Path) -> int:
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def locked(self, name: str):
        """Hold one of the cache's own locks against all other processes and threads."""
        path = self.folder / name
        fd = self._create(path)
        try:
            while not _try_lock(fd, fcntl.LOCK_EX, path):
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)

    def _fetch(
        self, fd: int, partial: Path, whole: Path, url: str, checksum: str, num_bytes: int, is_wanted, let_go
    ) -> None:
        self._reserve(fd, partial, url, num_bytes, is_wanted, let_go)
        with open(partial, "r+b", buffering=0) as file:
            download(url, file, num_bytes, checksum, is_wanted=is_wanted)
            with writing(partial):
                os.fsync(file.fileno())  # it has its size already, by which it is taken for whole later on
        with (
            self.locked("room.lock"),
            writing(whole),
        ):  # whoever adds up the files must not miss it between its two names
            os.rename(partial, whole)
        fcntl.flock(fd, fcntl.LOCK_SH)  # should it be removed between the two locks, it can still be read through fd

    def _reserve(self, fd: int, partial: Path, url: str, num_bytes: int, is_wanted, let_go=_none, is_patient=False) -> None:
        """Make room for the shard, and take it: the file gets its final size before its bytes.

        is_patient: wait however long others use the shards that are in the way.
        """
        if num_bytes > self.limit_bytes:
            raise UserError(
                f"{shown(url)}: has {num_bytes:,} bytes, and shards may take {self.limit_bytes / 1e9:g} GB in {self.folder}.\n"
                f"  Raise data.cache_gb (--cache-gb)."
            )
        began, is_said = time.monotonic(), False
        while is_wanted():
            with self.locked("room.lock"):
                others, taken = [], num_bytes
                for entry in os.scandir(self.folder):
                    if entry.name.endswith((".tar", ".tar.partial")) and entry.name != partial.name:
                        with contextlib.suppress(FileNotFoundError):
                            others.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
                taken += sum(size for _, size, _ in others)
                arriving = False
                for _, size, path in sorted(others):
                    if taken <= self.limit_bytes:
                        break
                    if _remove_unused(path):
                        taken -= size
                    else:
                        arriving |= path.suffix == ".partial" and size > 0
                if taken <= self.limit_bytes:
                    with writing(partial):
                        os.ftruncate(fd, num_bytes)
                    return
            waited_s = time.monotonic() - began
            if is_patient and waited_s > PATIENCE_S and not is_said:
                is_said = True
                print(f"{self.folder}: all shards there are in use; waiting for room to fetch {shown(url)}", file=sys.stderr)
            if not arriving and waited_s > PATIENCE_S and not is_patient:  # nothing will become removable by itself
                raise UserError(
                    f"{self.folder}: no room to fetch {shown(url)} ({num_bytes:,} bytes): all shards there are in use, and "
                    f"they may take {self.limit_bytes / 1e9:g} GB.\n  Raise data.cache_gb, or lower data.window_shards."
                )
            if waited_s > _SOON_S:
                let_go()
            time.sleep(_POLL_S)
        raise InterruptedError(f"{shown(url)}: no longer wanted")


def shards_in_play(order: Order, world_size: int) -> int:
    """Most shards that one of world_size ranks reads from at once: the windows of its lanes, and what they overlap."""
    if order.window_shards >= order.num_shards:
        return order.num_shards
    lanes = -(-order.lanes // world_size) + bool(order.lanes % world_size)
    return min(order.num_shards, lanes * (order.window_shards + 2))


def read_ahead(
    store, upcoming: Iterator[np.ndarray], num_in_play: int, batches: Iterator, machine_ranks: int, num_on_machine: int = 0
) -> Iterator:
    """The batches, while the shards that they need are fetched ahead of them.

    upcoming: the sample numbers that will be asked of the store, (n,) int64 arrays, in order. num_in_play: shards in use at once
    by this rank; num_on_machine: by the machine_ranks that share its cache, each its own if not given. Raises UserError if they
    do not fit it.
    """
    num_on_machine = num_on_machine or min(num_in_play * machine_ranks, store.split.num_shards)
    limit, mean_bytes = store.split.remote.cache.limit_bytes, float(store.split.shard_bytes.mean())
    in_play_bytes = int(num_on_machine * mean_bytes)
    if in_play_bytes > limit:
        raise UserError(
            f"data.cache_gb is {limit / 1e9:g}, but {num_on_machine} shards of {mean_bytes / 1e6:,.1f} MB are in use at once on "
            f"each machine: {in_play_bytes / 1e9:,.3g} GB.\n  Raise data.cache_gb, or lower data.window_shards."
        )
    store.max_open, store.is_read_ahead = min(store.max_open, num_in_play), True
    ahead_bytes = min(max(int(num_in_play * mean_bytes), int(4 * mean_bytes)), (limit - in_play_bytes) // 2 // machine_ranks)

    def generate():
        try:
            with contextlib.closing(batches), ReadAhead(store, upcoming, ahead_bytes) as ahead:
                for batch in batches:
                    ahead.num_read += 1
                    yield batch
        finally:
            store.stopped.set()  # a process does not end before its threads, and a shard may take minutes

    return generate()


class ReadAhead:
    """Fetches shards before they are asked for, in the order of their use; a context that ends with its threads.

    upcoming: as of `read_ahead`. ahead_bytes: shards that may be fetched beyond those already asked for. A shard that cannot
    be fetched is left to `locate`, which says so.
    """

    def __init__(self, store, upcoming: Iterator[np.ndarray], ahead_bytes: int, num_threads: int = 4):
        self.store, self.upcoming, self.ahead_bytes = store, upcoming, ahead_bytes
        self.num_read = self.num_looked = 0  # batches; the reader counts the former
        self._first = store.num_located
        self._ahead: list[tuple[int, int]] = []  # (samples before its first use, bytes) of shards fetched
        self._open: OrderedDict[int, None] = OrderedDict()  # the shards that the store will have open by then
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._jobs = self._shards()
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(num_threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stopped.set()

    def _is_wanted(self) -> bool:
        return not self._stopped.is_set()

    def _shards(self) -> Iterator[tuple[int, int]]:
        """(samples located before its first use, shard) of every shard that the store will have to open."""
        place, fits = 0, self.store.split.num_shards <= self.store.max_open
        for samples in self.upcoming:
            self._wait_for_reader(place, is_kept=not len(samples))
            if self._stopped.is_set() or (fits and len(self._open) == self.store.split.num_shards):
                return  # nothing is left to fetch
            for shard in dict.fromkeys(self.store.split.shard_of(samples).tolist()):
                if shard not in self._open:
                    yield place, shard
                self._open[shard] = None
                self._open.move_to_end(shard)
                if len(self._open) > self.store.max_open:
                    self._open.popitem(last=False)
            place += len(samples)
            self.num_looked += 1

    def _work(self) -> None:
        split = self.store.split
        while self._is_wanted():
            with self._lock:
                job = next(self._jobs, None)
                if job is None:
                    return
                place, num_bytes = job[0], int(split.shard_bytes[job[1]])
                self._wait_for_room(num_bytes)
                self._ahead.append((place, num_bytes))
            with contextlib.suppress(UserError, InterruptedError):
                os.close(split.remote.open(split, job[1], self._is_wanted))

    def _wait_for_reader(self, place: int, is_kept: bool) -> None:
        """Stay within an epoch of the reading, and within _IDLE_BATCHES of it where all of a batch is kept: perhaps no shard
        will ever be asked for any more, and the batches have no end."""
        while self._is_wanted():
            is_far = place - (self.store.num_located - self._first) > self.store.split.num_samples
            if not is_far and not (is_kept and self.num_looked - self.num_read > _IDLE_BATCHES):
                return
            self._stopped.wait(0.05)

    def _wait_for_room(self, num_bytes: int) -> None:
        while self._is_wanted():
            located = self.store.num_located - self._first
            self._ahead = [(place, size) for place, size in self._ahead if place >= located]
            if not self._ahead or sum(size for _, size in self._ahead) + num_bytes <= self.ahead_bytes:
                return
            self._stopped.wait(0.05)


def _open_whole(path: Path, num_bytes: int) -> int | None:
    """A descriptor of a shard that is there, locked against removal; None if it is not, or is not whole."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = f"{path}: cannot be opened: {error.strerror}."
        raise UserError(f"{what}\n  Set data.cache_dir to a folder of yours.") from None
    while not _try_lock(fd, fcntl.LOCK_SH, path):
        time.sleep(_POLL_S)
    if os.fstat(fd).st_size == num_bytes and _is_at(fd, path):
        os.utime(fd)  # the time of last use
        return fd
    os.close(fd)
    _remove_unused(path, only_size_other_than=num_bytes)
    return None


def _remove_unused(path: Path, only_size_other_than: int = -1) -> bool:
    """Remove a file that nobody has locked; says whether it is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return not path.exists()
    try:
        if os.fstat(fd).st_size != only_size_other_than and _try_lock(fd, fcntl.LOCK_EX, path) and _is_at(fd, path):
            path.unlink()
            return True
        return False
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        what = f"{path}: its file system has no locks ({error.strerror})."
        raise UserError(f"{what}\n  Set data.cache_dir to a folder on a local disk.") from None


def _is_at(fd: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)
