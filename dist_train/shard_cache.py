"""Shards of a remote set on the local disk: fetched when they are needed or before, bounded, shared by a node's processes.

    CACHE/<checksum>.tar         a whole, proven shard; locked (shared) while a process has it open
    CACHE/<checksum>.tar.partial one being fetched; locked (exclusive) by whoever fetches it, and of its final size at once

Locks are flock's, so they end with their process: what a crash leaves behind is taken over or removed by the next.
"""

import contextlib
import dataclasses
import errno
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

from dist_train.durable import writing
from dist_train.errors import UserError
from dist_train.file_locks import POLL_S, create, is_at, locked, open_whole, remove_unused, try_lock
from dist_train.index import SplitIndex
from dist_train.order import Order
from dist_train.remote import download, file_size, join, read_range, shown

DEFAULT_GB = 100.0
PATIENCE_S = 30.0  # batches in the making let go of their shards sooner, on a busy machine as well
_DISK_SHARE = 0.9  # of what the disk has: the rest is left to checkpoints and others, unless shards in use need it
_IDLE_BATCHES = 1_000  # looked at ahead of the reading where all of their samples are kept
_SOON_S = 0.2  # in which batches in the making usually let go of a shard


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
        self, split: SplitIndex, shard: int, is_wanted: Callable[[], bool] = lambda: True,
        let_go: Callable[[], None] = lambda: None,
    ) -> int:  # fmt: skip
        """A descriptor of the whole shard, as `ShardCache.open`."""
        url, num_bytes = join(self.url, split.files[shard]), int(split.shard_bytes[shard])
        return self.cache.open(url, split.shard_checksums[shard], num_bytes, is_wanted, let_go)

    def discard(self, split: SplitIndex, shard: int) -> bool:
        """Remove the local copy, unless somebody reads it; says whether it is gone."""
        return remove_unused(self.cache.folder / f"{split.shard_checksums[shard]}.tar")

    def is_kept(self, split: SplitIndex, shard: int) -> bool:
        """Whether the shard is on the local disk."""
        return (self.cache.folder / f"{split.shard_checksums[shard]}.tar").exists()

    def read_range(self, split: SplitIndex, shard: int, offset: int, num_bytes: int) -> bytes | None:
        """A part of a shard that is not on the local disk, as `remote.read_range`."""
        return read_range(join(self.url, split.files[shard]), offset, num_bytes)


class ShardCache:
    """A folder that holds at most limit_bytes of shards, and less where its disk has less; the least recently used go first, and
    none that is in use."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self.is_patient = False  # whether minutes without the server are outlived
        self._full_bytes = sys.maxsize  # of shards, with which the disk was full: quotas show in no other way

    def open(
        self, url: str, checksum: str, num_bytes: int, is_wanted: Callable[[], bool] = lambda: True,
        let_go: Callable[[], None] = lambda: None,
    ) -> int:  # fmt: skip
        """A descriptor of the whole shard, fetched if it is not there; it is not removed until the descriptor is closed.

        let_go: called again and again while there is no room, to close a shard that the caller can do without.
        Raises UserError if it cannot be fetched or there is no room for it, InterruptedError once is_wanted() is false.
        """
        whole = self.folder / f"{checksum}.tar"
        partial = self.folder / f"{checksum}.tar.partial"
        began, waited_s = time.monotonic(), 0.0
        while True:
            fd = open_whole(whole, num_bytes)
            if fd is not None:
                return fd
            fd = create(partial)
            try:
                if try_lock(fd, fcntl.LOCK_EX, partial) and is_at(fd, partial):
                    if not whole.exists():
                        self._fetch(fd, partial, url, num_bytes, is_wanted, let_go, checksum=checksum, waited_s=waited_s)
                        self._keep(fd, partial, whole)
                        return fd
                    partial.unlink()  # fetched by another process since we looked
            except BaseException:
                with contextlib.suppress(OSError):
                    if try_lock(fd, fcntl.LOCK_EX, partial) and is_at(fd, partial):
                        partial.unlink()
                os.close(fd)
                raise
            os.close(fd)
            if not is_wanted():
                raise InterruptedError(f"{shown(url)}: no longer wanted")
            time.sleep(POLL_S)
            waited_s = time.monotonic() - began

    @contextlib.contextmanager
    def fetched(self, url: str):
        """The path of a file of which only the URL is known, fetched and kept as a shard; not removed inside the context.

        Raises UserError if it cannot be fetched or there is no room for it.
        """
        partial = self.folder / f"{secrets.token_hex(16)}.tar.partial"
        num_bytes = file_size(url)
        fd = create(partial)
        while not (try_lock(fd, fcntl.LOCK_EX, partial) and is_at(fd, partial)):  # taken for another's leavings
            os.close(fd)
            fd = create(partial)
        try:
            # whoever indexes beside us lets go of its tar when it is read, however long that takes
            checksum = self._fetch(fd, partial, url, num_bytes, is_patient=True)
            whole = self.folder / f"{checksum}.tar"
            self._keep(fd, partial, whole)
            yield whole
        finally:
            partial.unlink(missing_ok=True)
            os.close(fd)

    def room(self) -> int:
        """Bytes that shards may take there, as the disk is now."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return self._limit(self._others())

    def in_words(self, limit: int) -> tuple[str, str]:
        """(what shards may take there, what to do about it), for messages. limit: as of `room`."""
        gb = self.limit_bytes / 1e9
        if limit >= self.limit_bytes:
            return f"shards may take {gb:g} GB in {self.folder}", "Raise data.cache_gb (--cache-gb)"
        what = f"its disk, or a quota on it, leaves {limit / 1e9:.3g} GB to shards in {self.folder} (data.cache_gb is {gb:g})"
        return what, "Make room there, or set data.cache_dir (--cache-dir) to a folder on a larger disk"

    def drop_one(self) -> bool:
        """Remove the shard whose last use is longest ago of those that nobody reads; says whether there was one."""
        with locked(self.folder / "room.lock"), writing(self.folder):
            return any(remove_unused(path) for *_, path in self._others())

    def _fetch(
        self, fd: int, partial: Path, url: str, num_bytes: int | None, is_wanted=lambda: True, let_go=lambda: None,
        is_patient=False, **how,
    ) -> str:  # fmt: skip
        """Write the file, once there is room for it; return its checksum. Where the disk is full all the same, others make way."""
        room = num_bytes or 0  # where the server does not say, the next file makes room for this one
        while True:
            self._reserve(fd, partial, url, room, is_wanted, let_go, is_patient)
            try:
                with open(partial, "r+b", buffering=0) as file:
                    lasts = self.is_patient or is_patient
                    checksum = download(url, file, num_bytes, is_wanted=is_wanted, is_patient=lasts, **how)
                    with writing(partial):
                        os.fsync(file.fileno())  # it has its size already, by which it is taken for whole later on
                return checksum
            except UserError as error:
                if not is_full(error):
                    raise
            room = self._note_full(fd, partial, room)

    def _keep(self, fd: int, partial: Path, whole: Path) -> None:
        with locked(self.folder / "room.lock"), writing(whole):  # whoever adds up the files must not miss it between its two names
            os.replace(partial, whole)
        fcntl.flock(fd, fcntl.LOCK_SH)  # should it be removed between the two locks, it can still be read through fd

    def _reserve(self, fd: int, partial: Path, url: str, num_bytes: int, is_wanted, let_go, is_patient) -> None:
        """Make room for the shard, and take it: the file gets its final size before its bytes.

        is_patient: wait however long others use the shards that are in the way.
        """
        with writing(partial):
            os.ftruncate(fd, 0)  # what a crash has left
        began, is_said = time.monotonic(), False
        while is_wanted():
            with locked(self.folder / "room.lock"), writing(partial):
                others = self._others(partial)
                taken, arriving = num_bytes + sum(size for _, size, *_ in others), False
                limit, most = self._limit(others), self._limit(others, share=1.0)
                what, advice = self.in_words(most)
                if num_bytes > most:
                    raise UserError(f"{shown(url)}: has {num_bytes:,} bytes, and {what}.\n  {advice}.")
                for _, size, _, path in others:
                    if taken <= limit:
                        break
                    if remove_unused(path):
                        taken -= size
                    else:
                        arriving |= path.suffix == ".partial" and size > 0
                if taken <= most:
                    os.ftruncate(fd, num_bytes)
                    return
            waited_s = time.monotonic() - began
            if is_patient and waited_s > PATIENCE_S and not is_said:
                is_said = True
                print(f"{self.folder}: all shards there are in use; waiting for room to fetch {shown(url)}", file=sys.stderr)
            if not arriving and waited_s > PATIENCE_S and not is_patient:  # nothing will become removable by itself
                raise UserError(
                    f"{self.folder}: no room to fetch {shown(url)} ({num_bytes:,} bytes): all shards there are in use, and "
                    f"{what}.\n  {advice}, or lower data.window_shards."
                )
            if waited_s > _SOON_S:
                let_go()
            time.sleep(POLL_S)
        raise InterruptedError(f"{shown(url)}: no longer wanted")

    def _note_full(self, fd: int, partial: Path, num_bytes: int) -> int:
        """Empty a file that the disk does not take, and note how much it does take; how many bytes to make room for now."""
        with locked(self.folder / "room.lock"), writing(partial):
            others, written = self._others(partial), 512 * os.fstat(fd).st_blocks
            num_bytes = num_bytes or written + 1
            on_disk = written + sum(num_written for _, _, num_written, _ in others)
            less = num_bytes + sum(size for _, size, *_ in others) - 1  # so that something makes way, whatever is counted
            self._full_bytes = min(self._full_bytes, on_disk, less)
            os.ftruncate(fd, 0)
        return num_bytes

    def _others(self, partial: Path | None = None) -> list[tuple[int, int, int, Path]]:
        """(time of last use, bytes, those of them that are on the disk, path) of all shards there but one; the oldest first."""
        others = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", ".tar.partial")) and Path(entry.path) != partial:
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    is_partial = entry.name.endswith(".partial")  # of its final size from the beginning
                    written = 512 * found.st_blocks if is_partial else found.st_size
                    others.append((found.st_mtime_ns, found.st_size, written, Path(entry.path)))
        return sorted(others)

    def _limit(self, others: list[tuple[int, int, int, Path]], share: float = _DISK_SHARE) -> int:
        disk = os.statvfs(self.folder)
        num_written = sum(written for _, _, written, _ in others)
        has = share * (disk.f_bavail * disk.f_frsize + num_written) if disk.f_blocks else sys.maxsize
        return min(self.limit_bytes, self._full_bytes, int(has))


def is_full(error: UserError) -> bool:
    """Whether a file could not be written because its disk, or a quota on it, is full."""
    return getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


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
    cache, mean_bytes = store.split.remote.cache, float(store.split.shard_bytes.mean())
    limit = cache.room()
    in_play_bytes = int(num_on_machine * mean_bytes)
    if in_play_bytes > limit:
        what, advice = cache.in_words(limit)
        raise UserError(
            f"{num_on_machine} shards of {mean_bytes / 1e6:,.1f} MB are in use at once on each machine, "
            f"{in_play_bytes / 1e9:,.3g} GB, but {what}.\n  {advice}, or lower data.window_shards."
        )
    cache.is_patient = True  # nobody sits before it, and much would be lost
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
