"""Optuna's journal of a study, what failed in it and is queued anew, and locks that end with the process that holds them."""

import contextlib
import fcntl
import functools
import os
import sys
from pathlib import Path

from dist_train.errors import UserError

LONGEST_LINE = 1 << 24  # bytes
MAX_ATTEMPTS = 3  # tries of a trial whose process died, or that could not be trained


def open_journal(path: Path):
    """Optuna's journal, whose lines are written under a lock that ends with its process. Raises UserError if it is none."""
    import optuna

    lock = JournalLock(path)
    with locked(lock.path), open(path, "ab+") as file:  # the end of a line that a power cut or full disk cut short
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size and file.read(1) != b"{":
            raise UserError(f"{path}: is no journal of a study.\n  Take another file for study.storage.")
        file.seek(max(0, size - LONGEST_LINE))
        file.truncate(file.tell() + file.read().rfind(b"\n") + 1 if size else 0)
    return optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)


class JournalLock:
    """What Optuna holds while it writes: the kernel lets go of it if the process dies, which of a link nobody would."""

    def __init__(self, path: Path):
        self.path = path.with_name(f"{path.name}.flock")
        self._holding = contextlib.ExitStack()

    def acquire(self) -> bool:
        self._holding.enter_context(locked(self.path))
        return True

    def release(self) -> None:
        self._holding.close()


def counted_trials(study) -> list:
    """The trials of a study but for those that were queued anew under another number."""
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get("again_of") for trial in trials}
    return [trial for trial in trials if "abandoned" not in trial.user_attrs and trial.number not in again]


def queue_failed(study) -> None:
    """Queue anew, up to MAX_ATTEMPTS, the trials that could not be trained: perhaps for want of a disk, a server or memory."""
    for failed in counted_trials(study):
        attempt = failed.user_attrs.get("attempt", 1)
        if failed.state.name == "FAIL" and attempt < MAX_ATTEMPTS:
            _queue_copy(study, failed, attempt + 1)


def queue_blameless(study, numbers: list[int]) -> None:
    """Queue failed trials anew without counting the try; whoever works on the study takes them."""
    for failed in counted_trials(study):
        if failed.number in numbers:  # otherwise another process, at its start, was faster
            _queue_copy(study, failed, failed.user_attrs.get("attempt", 1))


def _queue_copy(study, failed, attempt: int) -> None:
    drawn = failed.system_attrs.get("fixed_params", failed.params)
    study.enqueue_trial(drawn, user_attrs={"attempt": attempt, "again_of": failed.number})


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Hold an exclusive lock on a file; yield whether it is held, which without locks in the file system it never is.

    Raises BlockingIOError where wait is False and another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, is_held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            raise BlockingIOError from None
        except OSError as error:
            is_held = False
            _tell_of_no_locks(error.strerror)
        yield is_held
    finally:
        os.close(descriptor)


@functools.cache  # said once
def _tell_of_no_locks(reason: str) -> None:
    print(f"the study's journal or folder cannot be locked ({reason}): see to it that one process works on it. A trial whose "
          f"process died is not tried again.", file=sys.stderr)  # fmt: skip
