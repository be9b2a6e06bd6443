"""A split's decoded rows in a file of the local disk: written once, checked, used again by later runs."""

import contextlib
import fcntl
import io
import itertools
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import xxhash

from dist_train.durable import writing
from dist_train.file_locks import locked
from dist_train.wanted import Wanted, too_large

_CHUNK_BYTES, _DIGEST_BYTES = 1 << 26, 32


def open_decoded(wanted: Wanted, folder: Path, verify: bool, limit: int) -> np.ndarray:
    """The rows, (num_samples, row_bytes) uint8, mapped from folder/decoded-<key>.npy. Written if it is not there.

    The file is an array as numpy writes it, then its checksum. Where such files would take more than limit bytes together,
    those go first that were opened longest ago. Raises UserError where it does not fit.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"decoded-{wanted.key}.npy"
    while True:
        with locked(path.with_suffix(".lock")):  # one process decodes; the others wait for its file
            if not _is_whole(path, wanted, verify):
                with writing(path):
                    for old in (path, path.with_suffix(".partial")):  # damaged, or left by a crash: their room is needed
                        old.unlink(missing_ok=True)
                _make_room(path, wanted, limit)
                _write_file(path, wanted)
            with contextlib.suppress(FileNotFoundError):  # gone since, to make room for another's
                values = np.load(path, mmap_mode="r", allow_pickle=False)
                with contextlib.suppress(OSError):  # another user's: theirs to keep or let go
                    os.utime(path)  # opened just now
                return values.reshape(wanted.split.num_samples, -1).view(np.uint8)


def _is_whole(path: Path, wanted: Wanted, verify: bool) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            if left != len(_header(wanted)) + wanted.num_bytes:
                return False
            if not verify:
                return True
            digest = xxhash.xxh3_128()
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            return file.read(_DIGEST_BYTES).decode(errors="replace") == digest.hexdigest()
    except FileNotFoundError:
        return False


def _make_room(path: Path, wanted: Wanted, limit: int) -> None:
    if wanted.num_bytes > limit:
        raise too_large(wanted, limit, "may be kept on disk (data.cache_gb)", "none, or raise data.cache_gb")
    others, taken = [], wanted.num_bytes
    for partial in path.parent.glob("decoded-*.partial"):
        with contextlib.suppress(FileNotFoundError):
            taken += 0 if _is_left_behind(partial) else partial.stat().st_size
    for other in path.parent.glob("decoded-*.npy"):
        with contextlib.suppress(FileNotFoundError):
            others.append((other.stat().st_mtime_ns, other.stat().st_size, other))
    taken += sum(size for _, size, _ in others)
    for _, size, other in sorted(others):
        if taken > limit:
            with contextlib.suppress(OSError):
                other.unlink()  # whoever has it mapped keeps what it reads
            taken -= size


def _is_left_behind(partial: Path) -> bool:
    """Whether nobody writes the file any more; it is removed then."""
    try:
        with open(partial.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
            return True
    except OSError:  # locked, or another user's
        return False


def _write_file(path: Path, wanted: Wanted) -> None:
    free = shutil.disk_usage(path.parent).free
    if wanted.num_bytes > free:
        raise too_large(wanted, free, f"are free in {path.parent}", "none, or another data.cache_dir")
    print(f"{path}: decoding {wanted.split.num_samples:,} samples ({wanted.num_bytes / 1e9:,.2f} GB), once",
          file=sys.stderr, flush=True)  # fmt: skip
    partial, digest, size = path.with_suffix(".partial"), xxhash.xxh3_128(), 0
    try:
        with writing(path), open(partial, "wb") as file:
            for chunk in itertools.chain([_header(wanted)], wanted.in_order()):
                chunk = memoryview(chunk).cast("B") if isinstance(chunk, np.ndarray) else chunk
                digest.update(chunk)
                size += file.write(chunk)
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
            assert size == len(_header(wanted)) + wanted.num_bytes, f"{size} bytes decoded"
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _header(wanted: Wanted) -> bytes:
    file = io.BytesIO()
    dtype = np.dtype(str(wanted.dtype).removeprefix("torch."))
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype.str, "fortran_order": False, "shape": (wanted.split.num_samples, *wanted.shape)}
    )
    return file.getvalue()
