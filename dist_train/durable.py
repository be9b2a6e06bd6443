"""What is on the disk stays there: files written aside, synced and renamed, so that a power cut leaves one or the other."""

import contextlib
import errno
import json
import os
from pathlib import Path

from dist_train.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Put a text file in place of another, whole or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def replace_json(path: Path, value, indent: int | None = 1) -> None:
    """Put a JSON file in place of another, whole or not at all. Raises OSError."""
    replace_text(path, json.dumps(value, indent=indent) + "\n")


@contextlib.contextmanager
def writing(path: Path):
    """Turns an OSError in its body into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}.\n"
            f"  What was finished before is untouched. Make room or pick another place, then run the same command again."
        ) from error


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished file or folder to its place; return when both bytes and name are on the disk. Raises OSError."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)
