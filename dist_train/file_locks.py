"""Files that processes share: locked with flock while they are in use, and removed by nobody meanwhile."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from dist_train.durable import writing
from dist_train.errors import UserError

POLL_S = 0.02


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock of a file, made if it is not there, against all other processes and threads. Raises UserError."""
    fd = create(path)
    try:
        while not try_lock(fd, fcntl.LOCK_EX, path):
            time.sleep(POLL_S)
        yield
    finally:
        os.close(fd)


def create(path: Path) -> int:
    """A descriptor of a file for its user alone, made if it is not there, as is its folder. Raises UserError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def open_whole(path: Path, num_bytes: int) -> int | None:
    """A descriptor of a file that is there, locked against removal; None if it is not, or is not of this size."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = f"{path}: cannot be opened: {error.strerror}."
        raise UserError(f"{what}\n  Set data.cache_dir to a folder of yours.") from None
    while not try_lock(fd, fcntl.LOCK_SH, path):
        time.sleep(POLL_S)
    if os.fstat(fd).st_size == num_bytes and is_at(fd, path):
        os.utime(fd)  # the time of last use
        return fd
    os.close(fd)
    remove_unused(path, only_size_other_than=num_bytes)
    return None


def remove_unused(path: Path, only_size_other_than: int = -1) -> bool:
    """Remove a file that nobody has locked; says whether it is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return not path.exists()
    try:
        if os.fstat(fd).st_size != only_size_other_than and try_lock(fd, fcntl.LOCK_EX, path) and is_at(fd, path):
            path.unlink()
            return True
        return False
    finally:
        os.close(fd)


def try_lock(fd: int, kind: int, path: Path) -> bool:
    """Lock an open file, unless others have it locked; says whether it is. kind: fcntl.LOCK_SH or LOCK_EX. Raises UserError."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        what = f"{path}: its file system has no locks ({error.strerror})."
        raise UserError(f"{what}\n  Set data.cache_dir to a folder on a local disk.") from None


def is_at(fd: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)
