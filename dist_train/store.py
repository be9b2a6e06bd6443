"""Sample numbers -> where their bytes are: open shard files, offsets, sizes, checksums."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dist_train.errors import UserError
from dist_train.index import SplitIndex

MAX_OPEN = 512  # shard files kept open per process; a usual limit for all files is 1,024


@dataclass(frozen=True)
class Located:
    """Where the payloads of n samples lie. `files` keeps the descriptors alive for as long as this object lives."""

    samples: np.ndarray  # (n,) int64
    fds: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (n,) uint64
    sizes: np.ndarray  # (n,) uint32
    checksums: np.ndarray  # (n,) uint64, xxh3_64
    files: list


class Store:
    """The shards of one split, opened on demand; at most max_open at a time. Safe to share between threads.

    Shards of a remote set are fetched into the local cache when they are opened; `shard_cache.ReadAhead` does so earlier.

    Payloads are read with pread, not through a mapping: a shard truncated under a running job is then a short read
    with a name, not a SIGBUS.
    """

    def __init__(self, split: SplitIndex, max_open: int = 0):
        self.split, self.max_open = split, max_open or MAX_OPEN
        self.table = split.table()
        self.num_located = 0  # samples so far: how far the reading has come
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _ShardFile] = OrderedDict()

    def locate(self, samples: np.ndarray) -> Located:
        """samples: (n,) int64 numbers in the split. Raises UserError if a shard is missing or of another size."""
        with self._lock:
            self.num_located += len(samples)
        rows = self.table[samples]
        shards = self.split.shard_of(samples)
        files = {shard: self._shard_file(shard) for shard in np.unique(shards).tolist()}
        return Located(
            samples=samples,
            fds=np.array([files[shard].fd for shard in shards.tolist()], np.int32),
            offsets=rows["offset"],
            sizes=rows["size"],
            checksums=rows["checksum"],
            files=list(files.values()),
        )

    def payload(self, sample: int, verify: bool = True) -> bytes:
        """The bytes of one sample's picture or vector. Raises UserError if they are short or differ from the index."""
        return next(self.payloads(np.array([sample]), verify))

    def payloads(self, samples: np.ndarray, verify: bool = True) -> Iterator[bytes]:
        """The payloads of many samples, one after the other; as `payload` otherwise. samples: (n,) int64."""
        at = self.locate(samples)
        columns = (samples, at.fds, at.offsets, at.sizes, at.checksums)
        for sample, fd, offset, size, checksum in zip(*(column.tolist() for column in columns), strict=True):
            payload = os.pread(fd, size, offset)
            if len(payload) < size:
                raise self.fault(sample, f"ends after {len(payload):,} of {size:,} bytes")
            if verify and xxhash.xxh3_64_intdigest(payload) != checksum:
                raise self.fault(sample, "checksum differs from the index")
            yield payload

    def fault(self, sample: int, reason: str) -> UserError:
        """The error for a sample that cannot be used, naming shard, sample, byte, and what to do."""
        path = self.path(int(self.split.shard_of(np.array([sample]))[0]))
        return UserError(
            f"{path}: {reason} (sample {sample_name(self.split.name, sample)} at byte "
            f"{int(self.table[sample]['offset']):,}).\n  See all that is wrong with: dist-train verify {self.split.folder}"
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
            file = _ShardFile(self.split.remote.open(self.split, shard))
        else:
            file = _ShardFile(_open_local(Path(self.path(shard)), int(self.split.shard_bytes[shard])))
        with self._lock:
            self._open[shard] = file
            self._close_all_but(self.max_open)
        return file

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


def _open_local(path: Path, num_bytes: int) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path}: cannot open the shard: {error.strerror}.\n  "
                        f"The index lists it: restore it, or see dist-train verify {path.parent}") from None  # fmt: skip
    found = os.fstat(fd).st_size
    if found != num_bytes:
        os.close(fd)
        raise UserError(f"{path}: the shard has {found:,} bytes, the index says {num_bytes:,}.\n  "
                        f"See all that is wrong with: dist-train verify {path.parent}")  # fmt: skip
    return fd
