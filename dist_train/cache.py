"""Decoded samples kept from epoch to epoch: in memory that a machine's processes share, in a file, or on the device.

Only what is the same in every epoch can be kept: whole pictures, evaluation's central crops, rows of tables. Memory and
device fill as samples are first read, so the first batch waits for nothing; a file is written whole before it is used.
"""

import contextlib
import fcntl
import mmap
import os
import platform
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from dist_train import control_groups, decode
from dist_train.decoded_file import open_decoded
from dist_train.errors import UserError
from dist_train.recycled import Recycled
from dist_train.shard_cache import DEFAULT_GB, default_folder
from dist_train.wanted import Wanted, too_large

MODES = ("auto", "none", "memory", "disk", "device")
AUTO_GB = 4.0
_MEETING_FOLDER = "/dev/shm"  # local to the machine by nature, and empty after a restart

Decode = Callable[[np.ndarray], torch.Tensor]  # places in the batch -> their rows, decoded


class DecodedCache:
    """Decoded splits, each kept for as long as this object lives.

    mode: "none"; "memory", one copy for all processes of a user on a machine; "disk", a checksummed file in `folder` (that
    of data.cache_dir) that later runs use again, such files together at most `disk_gb`; "device", a tensor on `device`;
    "auto", memory for splits that together take at most `auto_gb`, and at most half of the memory there is. Raises
    UserError where a split does not fit.
    """

    def __init__(self, mode: str = "auto", auto_gb: float = AUTO_GB, folder: str = "", device: torch.device | None = None,
                 verify: bool = True, disk_gb: float = DEFAULT_GB):  # fmt: skip
        if mode not in MODES:
            raise UserError(f"data.cache is {mode!r}; expected {', '.join(MODES[:-1])} or {MODES[-1]}.")
        self.mode, self.auto_bytes, self.verify = mode, int(auto_gb * 1e9), verify
        self.disk_bytes = int(disk_gb * 1e9)
        self.folder, self.device = folder, device or torch.device("cpu")
        self._rows = {}

    def rows(self, wanted: Wanted) -> "Rows | DeviceRows | None":
        """Where rows of the split are kept; None if they are not."""
        if wanted.key not in self._rows:
            self._rows[wanted.key] = self._opened(wanted)
        return self._rows[wanted.key]

    def close(self) -> None:
        """Let go of everything; streams that still read keep what they use."""
        self._rows.clear()

    def _opened(self, wanted: Wanted):
        if self.mode == "none":
            return None
        if self.mode == "disk":
            values = open_decoded(wanted, default_folder(self.folder), self.verify, self.disk_bytes)
            return Rows(wanted, values, None)
        if self.mode == "device":
            return DeviceRows(wanted, self.device)
        taken = sum(rows.num_bytes for rows in self._rows.values() if rows is not None)
        limit = auto_room(self.auto_bytes - taken) if self.mode == "auto" else available_bytes()
        rows = shared_rows(wanted, limit)
        if rows is None and self.mode == "memory":
            raise too_large(wanted, limit, "are free in memory", "disk, none, or a smaller data.image_size")
        return rows


class Rows:
    """Rows in memory or in a mapped file. present: (N,) uint8, whether each row is there; None where all are."""

    def __init__(self, wanted: Wanted, values: np.ndarray, present: np.ndarray | None, keep_open: object = None):
        self.shape, self.dtype, self.num_bytes = wanted.shape, wanted.dtype, wanted.num_bytes
        self._values, self._present, self._keep_open = values, present, keep_open
        self._is_full, self._missing, self._recycled = present is None, 0, Recycled()

    @property
    def is_full(self) -> bool:
        """Whether every row is there."""
        if not self._is_full and self._present[self._missing]:  # the one that was missing when this was asked last
            self._missing = int(self._present.argmin())
            # the one just found may have come since, and others not
            self._is_full = bool(self._present[self._missing] and self._present.all())
        return self._is_full

    def is_missing(self, samples: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the samples have still to be decoded."""
        return np.zeros(len(samples), bool) if self._is_full else self._present[samples] == 0

    def read(self, samples: np.ndarray, decode_missing: Decode, pin_memory: bool = False) -> torch.Tensor:
        """The samples' rows, (n, *shape); what is missing is decoded and kept. Called by many threads at once."""
        missing = np.flatnonzero(self.is_missing(samples))
        if len(missing):
            rows, at = decode_missing(missing), samples[missing]
            self._values[at] = rows.numpy().reshape(len(at), -1).view(np.uint8)
            _fence()
            self._present[at] = 1  # after the row: whoever sees it may read
            if len(missing) == len(samples):
                return rows
        _fence()  # between the marks that were seen and the rows
        out = self._recycled.tensor((len(samples), *self.shape), self.dtype, pin_memory)
        into = out.numpy().reshape(len(samples), -1).view(np.uint8)
        if hasattr(decode.native, "gather"):
            decode.native.gather(self._values, into.shape[1], samples, into)
        else:
            np.take(self._values, samples, axis=0, out=into, mode="clip")  # "raise" would copy once more
        return out


def _fence() -> None:
    """Order what this process reads and writes of shared memory. x86 keeps the order of stores, and of loads, by itself."""
    if hasattr(decode.native, "fence"):
        decode.native.fence()


def _keeps_order() -> bool:
    return platform.machine() in ("x86_64", "AMD64", "i686") or hasattr(decode.native, "fence")


def _free_bytes(device: torch.device) -> int:
    """Bytes that a tensor can still take on a device: of a GPU also those that torch holds and does not use."""
    if device.type != "cuda":
        return available_bytes()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class DeviceRows:
    """Rows on a device: gathered there, so that of a batch only its sample numbers travel. They are there once gathered:
    batches that are decoded ahead, over the end of the first epoch, decode some of its last samples again."""

    is_full = False  # each batch is gathered by itself

    def __init__(self, wanted: Wanted, device: torch.device):
        free, complaint = _free_bytes(device), (f"are free on {device}", "memory or none")
        if wanted.num_bytes > free:
            raise too_large(wanted, free, *complaint)
        self.shape, self.device, self.num_bytes = wanted.shape, device, wanted.num_bytes
        shape = wanted.split.num_samples, int(np.prod(wanted.shape))
        try:
            self._values = torch.empty(shape, dtype=wanted.dtype, device=device)
        except torch.OutOfMemoryError:  # what is free lies in pieces
            raise too_large(wanted, free, *complaint) from None
        self._present = np.zeros(wanted.split.num_samples, bool)

    def is_missing(self, samples: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the samples have still to be decoded."""
        return ~self._present[samples]

    def read(self, samples: np.ndarray, decode_missing: Decode, pin_memory: bool = False) -> "OnDevice":
        """What `gather` needs: what is missing is decoded here. Called by many threads at once."""
        missing = np.flatnonzero(self.is_missing(samples))
        return OnDevice(samples, samples[missing], decode_missing(missing) if len(missing) else None)

    def gather(self, batch: "OnDevice") -> torch.Tensor:
        """The batch's rows, (n, *shape) on the device. Called by one thread, in which the device's work is ordered."""
        if batch.rows is not None:
            rows = batch.rows.reshape(len(batch.rows), -1).to(self.device, non_blocking=True)
            self._values.index_copy_(0, self._index(batch.missing), rows)
            self._present[batch.missing] = True
        return self._values.index_select(0, self._index(batch.samples)).view(len(batch.samples), *self.shape)

    def _index(self, samples: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(samples)
        return index.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else index


@dataclass(frozen=True)
class OnDevice:
    """A batch that `DeviceRows.gather` has still to put together. rows: those of `missing`, decoded on the host."""

    samples: np.ndarray
    missing: np.ndarray
    rows: torch.Tensor | None


def shared_rows(wanted: Wanted, limit: int) -> Rows | None:
    """Rows in memory, one copy for all of this user's processes on the machine; None if it would exceed limit bytes.

    The memory has no name in any folder: it ends with its last process, also after a crash. Processes find it through
    the descriptor of whoever made it, whose number stands in a file of a few bytes.
    """
    num_samples, num_bytes = wanted.split.num_samples, wanted.num_bytes + wanted.split.num_samples
    name = f"dist_train-{os.getuid()}-" + xxhash.xxh3_128_hexdigest(
        f"{wanted.key}{os.path.realpath(wanted.split.folder)}".encode()
    )
    try:  # threads of one process are ordered by Python's own lock, processes are not
        meeting = _Meeting(Path(_MEETING_FOLDER, name), num_bytes, limit) if _keeps_order() else None
    except OSError:  # no such folder, or another user's file of that name: a copy of our own
        meeting = None
    if meeting:
        memory = meeting.memory
    else:
        memory = np.zeros(num_bytes, np.uint8) if num_bytes <= limit else None
    if memory is None:
        return None
    return Rows(wanted, memory[: wanted.num_bytes].reshape(num_samples, -1), memory[wanted.num_bytes :], meeting)


class _Meeting:
    """Finds the memory of a name, or makes it where it takes at most limit bytes; memory is None otherwise."""

    def __init__(self, path: Path, num_bytes: int, limit: int):
        self.memory, made = None, ""
        with _locked(path) as file:
            fd = _fd_of_another(file, path.name, num_bytes)
            if fd is None and num_bytes > limit:
                path.unlink()
                return
            if fd is None:
                fd = os.memfd_create(path.name)
                os.ftruncate(fd, num_bytes)
                made = f"{os.getpid()} {fd}"
                file.seek(0)
                file.truncate()
                file.write(made.encode())
        weakref.finalize(self, _leave, path, fd, made)  # until then others find the memory through it
        self.memory = np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8)


def _fd_of_another(file, name: str, num_bytes: int) -> int | None:
    """The memory that the process whose number stands in the file has made, if it still has it."""
    pid, _, number = file.read(64).decode(errors="replace").partition(" ")
    if not (pid.isdigit() and number.isdigit()):
        return None
    there = f"/proc/{pid}/fd/{number}"
    try:
        if os.readlink(there) != f"/memfd:{name} (deleted)":
            return None
        fd = os.open(there, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # its process has ended
        return None
    if os.fstat(fd).st_size == num_bytes:
        return fd
    os.close(fd)
    return None


@contextlib.contextmanager
def _locked(path: Path):
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "r+b", buffering=0) as file:
            if os.fstat(fd).st_uid != os.getuid():
                raise PermissionError(f"{path} is another user's")
            fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                yield file
                return


def _leave(path: Path, fd: int, made: str) -> None:
    if made and made.startswith(f"{os.getpid()} "):
        with contextlib.suppress(OSError), _locked(path) as file:
            if file.read(64).decode(errors="replace") in (made, ""):
                os.unlink(path)
    os.close(fd)


def auto_room(auto_bytes: int) -> int:
    """Bytes that "auto" may still keep of auto_bytes: half of the memory there is at most."""
    return min(auto_bytes, available_bytes() // 2)


def available_bytes() -> int:
    """Memory that this process may still take: of the machine, and of the control groups (a SLURM job's) it is in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    room = control_groups.free_memory()
    return free if room is None else min(free, room)
