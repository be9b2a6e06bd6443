"""Sample numbers -> where their bytes are: open shard files, offsets, sizes, checksums. Local shards."""

import os
from collections import OrderedDict
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
    """The shards of one split, opened on demand; at most MAX_OPEN at a time. Safe to share between threads.

    Payloads are read with pread, not through a mapping: a shard truncated under a running job is then a short read
    with a name, not a SIGBUS.
    """

    def __init__(self, split: SplitIndex):
        self.split = split
        self.table = split.table()
        self._open: OrderedDict[int, _ShardFile] = OrderedDict()

    def locate(self, samples: np.ndarray) -> Located:
        """samples: (n,) int64 numbers in the split. Raises UserError if a shard is missing or of another size."""
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
        at = self.locate(np.array([sample]))
        size = int(at.sizes[0])
        payload = os.pread(int(at.fds[0]), size, int(at.offsets[0]))
        if len(payload) < size:
            raise self.fault(sample, f"ends after {len(payload):,} of {size:,} bytes")
        if verify and xxhash.xxh3_64_intdigest(payload) != int(at.checksums[0]):
            raise self.fault(sample, "checksum differs from the index")
        return payload

    def fault(self, sample: int, reason: str) -> UserError:
        """The error for a sample that cannot be used, naming shard, sample, byte, and what to do."""
        path = self.path(int(self.split.shard_of(np.array([sample]))[0]))
        return UserError(
            f"{path}: {reason} (sample {sample_name(self.split.name, sample)} at byte "
            f"{int(self.table[sample]['offset']):,}).\n  See all that is wrong with: dist-train verify {self.split.folder}"
        )

    def path(self, shard: int) -> Path:
        return Path(self.split.folder, self.split.files[shard])

    def _shard_file(self, shard: int) -> "_ShardFile":
        file = self._open.get(shard)
        if file is None:
            file = self._open[shard] = _ShardFile(self.path(shard), int(self.split.shard_bytes[shard]))
            while len(self._open) > MAX_OPEN:  # whoever still reads from it holds a reference
                self._open.popitem(last=False)
        return file


def sample_name(split: str, sample: int) -> str:
    """The name of a sample everywhere: train/00000123."""
    return f"{split}/{sample:08d}"


class _ShardFile:
    """A descriptor that is closed when its last user lets go."""

    def __init__(self, path: Path, num_bytes: int):
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self.fd).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot open the shard: {error.strerror}.\n  "
                            f"The index lists it: restore it, or see dist-train verify {path.parent}") from None  # fmt: skip
        if found != num_bytes:
            raise UserError(f"{path}: the shard has {found:,} bytes, the index says {num_bytes:,}.\n  "
                            f"See all that is wrong with: dist-train verify {path.parent}")  # fmt: skip

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)
