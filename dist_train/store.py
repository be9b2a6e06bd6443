"""Sample numbers -> where their bytes are: open shard files, offsets, sizes, checksums."""

import contextlib
import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dist_train.errors import UserError
from dist_train.index import SplitIndex
from dist_train.remote import shown

READ_FAILED = "the shard cannot be read"  # so begins the reason where the system refuses
SHORT_READ = "the shard ends before the sample does: it is truncated"
CHECKSUM_DIFFERS = "the sample's checksum differs from the index"
_SHORT, _DIFFERS = "ends after", "checksum differs"
_CHANGED = (_SHORT, _DIFFERS, SHORT_READ, CHECKSUM_DIFFERS)  # so begin the reasons of a changed shard, decode's too
MOST_SINGLY = 32  # round trips to a server, 20 to 100 ms each, that take about as long as fetching a usual shard
_AT_ONCE = 8  # requests in flight
MAX_OPEN = 512  # shard files kept open per process, besides those that batches ahead hold
MAX_FILES = 65_536  # of all kinds, open at once; some programs walk over all that a limit allows


@dataclass(frozen=True)
class Located:
    """Where the payloads of n samples lie. `files` keeps the descriptors alive for as long as this object lives."""

    fds: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (n,) uint64
    sizes: np.ndarray  # (n,) uint32
    checksums: np.ndarray  # (n,) uint64, xxh3_64
    files: list


class Store:
    """The shards of one split, opened on demand; at most max_open at a time. Safe to share between threads.

    Shards of a remote set are fetched into the local cache when they are opened; `shard_cache.ReadAhead` does so earlier.
    Where nothing is read ahead, `payload` and `payloads` ask the server for single payloads first: a shard is fetched whole
    once more than 32 of its payloads, or more than a quarter of its bytes, would be asked for.

    Payloads are read with pread, not through a mapping: a shard truncated under a running job is then a short read
    with a name, not a SIGBUS.
    """

    def __init__(self, split: SplitIndex, max_open: int = 0):
        self.split, self.max_open = split, max_open or MAX_OPEN
        self.table = np.asarray(split.table())  # a plain view of the mapping: np.memmap is slow to index
        self.num_located = 0  # samples so far: how far the reading has come
        self.is_read_ahead = False
        self.stopped = threading.Event()  # nobody wants what is being fetched any more
        self._singly: dict[int, tuple[int, float]] = {}  # shard: payloads, bytes asked of the server singly
        self._lock = threading.Lock()
        # two batches that each hold what they have and wait for room for the rest would wait for ever
        self._fetching = threading.Lock()
        self._open: OrderedDict[int, _ShardFile] = OrderedDict()
        _allow_open_files()

    def locate(self, samples: np.ndarray) -> Located:
        """samples: (n,) int64 numbers in the split. Raises UserError if a shard is missing or of another size."""
        with self._lock:
            self.num_located += len(samples)
        rows = self.table.take(samples)  # a tenth of what indexing with an array takes
        shards, place = np.unique(self.split.shard_of(samples), return_inverse=True)
        with self._fetching if self.split.remote else contextlib.nullcontext():
            files = [self._shard_file(shard) for shard in shards.tolist()]
        return Located(
            fds=np.array([file.fd for file in files], np.int32)[place],
            offsets=rows["offset"],
            sizes=rows["size"],
            checksums=rows["checksum"],
            files=files,
        )

    def payload(self, sample: int) -> bytes:
        """The bytes of one sample's picture or vector. Raises UserError if they are short or differ from the index."""
        return next(self.payloads(np.array([sample])))

    def payloads(self, samples: np.ndarray, verify: bool = True) -> Iterator[bytes]:
        """The payloads of many samples, one after the other; as `payload` otherwise. samples: (n,) int64."""
        few = self._few_of_a_shard(samples)
        singly = self._fetch_singly(samples[few])
        at = self.locate(samples[~few])
        columns = (at.fds, at.offsets, at.sizes, at.checksums)
        places = zip(*(column.tolist() for column in columns), strict=True)
        for sample, is_one_of_few in zip(samples.tolist(), few.tolist(), strict=True):
            if is_one_of_few:
                yield next(singly)
                continue
            yield self._read(sample, *next(places), verify)

    def read_vectors(self, samples: np.ndarray, out: np.ndarray, verify: bool = True) -> np.ndarray:
        """Put a table's vectors of samples (n,) into out, (n, F) float32, and return it. Raises UserError as `payload`."""
        for row, payload in zip(out, self.payloads(samples, verify), strict=True):
            row[:] = np.frombuffer(payload, np.float32, offset=len(payload) - row.nbytes)
        return out

    def _few_of_a_shard(self, samples: np.ndarray) -> np.ndarray:
        """(n,) bool: which samples are better asked of the server one by one than with their whole shards."""
        if self.split.remote is None or self.is_read_ahead:
            return np.zeros(len(samples), bool)
        shards, place, counts = np.unique(self.split.shard_of(samples), return_inverse=True, return_counts=True)
        sizes = np.bincount(place, weights=self.table["size"][samples], minlength=len(shards))
        few = np.zeros(len(shards), bool)
        for k, (shard, num, num_bytes) in enumerate(zip(shards.tolist(), counts.tolist(), sizes.tolist(), strict=True)):
            num_before, bytes_before = self._singly.get(shard, (0, 0))
            num, num_bytes = num + num_before, num_bytes + bytes_before
            is_little = num <= MOST_SINGLY and num_bytes <= self.split.shard_bytes[shard] / 4
            if is_little and shard not in self._open and not self.split.remote.is_kept(self.split, shard):
                few[k] = True
                self._singly[shard] = num, num_bytes
        return few[place]

    def _fetch_singly(self, samples: np.ndarray) -> Iterator[bytes]:
        if len(samples):
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for first in range(0, len(samples), _AT_ONCE):  # in portions: an executor would run far ahead otherwise
                    yield from pool.map(self._fetched, samples[first : first + _AT_ONCE].tolist())

    def _fetched(self, sample: int) -> bytes:
        """A payload alone; where the server has no ranges, or sends something else, from the whole, proven shard."""
        offset, size, checksum = (int(self.table[sample][name]) for name in ("offset", "size", "checksum"))
        shard = int(self.split.shard_of(np.array([sample]))[0])
        if shard not in self._open:
            payload = self.split.remote.read_range(self.split, shard, offset, size)
            if payload is not None and xxhash.xxh3_64_intdigest(payload) == checksum:
                return payload
        file = self._shard_file(shard)
        return self._read(sample, file.fd, offset, size, checksum)

    def _read(self, sample: int, fd: int, offset: int, size: int, checksum: int, verify: bool = True) -> bytes:
        try:
            payload = os.pread(fd, size, offset)
        except OSError as error:
            raise self.fault(sample, f"{READ_FAILED}: {error.strerror}") from None
        if len(payload) < size:
            raise self.fault(sample, f"{_SHORT} {len(payload):,} of {size:,} bytes")
        if verify and xxhash.xxh3_64_intdigest(payload) != checksum:
            raise self.fault(sample, f"{_DIFFERS} from the index")
        return payload

    def fault(self, sample: int, reason: str) -> UserError:
        """The error for a sample that cannot be used, naming shard, sample, byte, and what to do."""
        path = self.path(int(self.split.shard_of(np.array([sample]))[0]))
        if reason.startswith(READ_FAILED):
            advice = "The system refused the read: look to the disk or the file system, then start again."
        elif reason.startswith(_CHANGED):
            url = self.split.remote.url if self.split.remote else ""
            advice = f"See all that is wrong with: dist-train verify {shown(url) or self.split.folder}"
        else:
            advice = ("The picture itself is damaged: write the set without it. In training data.max_bad passes over as many, "
                      "without data.folds and data.cache disk; an evaluation needs every picture.")  # fmt: skip
        return UserError(
            f"{path}: {reason} (sample {sample_name(self.split.name, sample)} at byte "
            f"{int(self.table[sample]['offset']):,}).\n  {advice}"
        )

    def path(self, shard: int) -> str:
        """Where a shard lies, for messages: a file, or a URL."""
        if self.split.remote:
            return self.split.remote.shown(self.split, shard)
        return str(Path(self.split.folder, self.split.files[shard]))

    def _shard_file(self, shard: int) -> "_ShardFile":
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
            self._close_all_but(self.max_open - 1)  # first, so that a full cache can let go of it
        if self.split.remote:
            file = _ShardFile(self.split.remote.open(self.split, shard, lambda: not self.stopped.is_set(), self._let_go_of_one))
        else:
            file = _ShardFile(_open_local(self.path(shard), int(self.split.shard_bytes[shard]), self.split.folder))
        with self._lock:
            self._open[shard] = file
            self._close_all_but(self.max_open)
        return file

    def _let_go_of_one(self) -> None:
        """Close the shard whose last use is longest ago; it may be opened again."""
        with self._lock:
            self._close_all_but(max(0, len(self._open) - 1))

    def _close_all_but(self, num_open: int) -> None:
        while len(self._open) > num_open:  # whoever still reads from one holds a reference
            self._open.popitem(last=False)


def sample_name(split: str, sample: int) -> str:
    """The name of a sample everywhere: train/00000123."""
    return f"{split}/{sample:08d}"


class _ShardFile:
    """A descriptor that is closed when its last user lets go."""

    def __init__(self, fd: int):
        self.fd = fd

    def __del__(self):
        os.close(self.fd)


def _allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may: batches ahead hold their shards open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _open_local(path: str, num_bytes: int, folder: str) -> int:
    """A descriptor of a shard. folder: of its index, which may lie elsewhere."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(f"{path}: cannot open the shard: {error.strerror}.\n  Ask for more (ulimit -Hn), or lower "
                            f"data.window_shards, data.threads or data.prefetch_mb.") from None  # fmt: skip
        raise UserError(f"{path}: cannot open the shard: {error.strerror}.\n  "
                        f"The index lists it: restore it, or see dist-train verify {folder}") from None  # fmt: skip
    found = os.fstat(fd).st_size
    if found != num_bytes:
        os.close(fd)
        raise UserError(f"{path}: the shard has {found:,} bytes, the index says {num_bytes:,}.\n  "
                        f"See all that is wrong with: dist-train verify {folder}")  # fmt: skip
    return fd
