"""stdout and stderr, whose readers may go away before the work is done."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def outlive_readers() -> Iterator[None]:
    """While this is open, a closed terminal, a pipe without a reader or a full disk under a log file ends no long work."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and LastingStream(stream) for stream in before)
    try:
        yield
    finally:
        for stream in filter(None, before):
            try:
                stream.flush()
            except OSError:
                silence(stream)
        sys.stdout, sys.stderr = before


class LastingStream:
    """A text stream that loses what it cannot write, instead of raising OSError."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno in (errno.EPIPE, errno.EIO):  # for good; a full disk may have room again
            silence(self._stream)


def silence(stream) -> None:
    """Let a text stream end nowhere: Python writes what is left in it once more as it exits, and its failure would be the code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
