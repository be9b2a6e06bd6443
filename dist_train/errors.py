"""The one error a user can cause: printed without a traceback, exit code 2."""

import os
import sys
import traceback
from collections.abc import Iterable

from dist_train.streams import silence


class UserError(ValueError):
    """Something the user can put right.

    The message says what was being done, what was found, what was expected, and what to do next; it names the file
    or the key. `cli.main` prints it without a traceback and exits with `exit_code`. Several faults are joined by newlines, so
    that all of them are seen at once.
    """

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The last sentence of a complaint about a name: the nearest one that is not empty, whatever its case, or `otherwise`."""
    import difflib  # only where something is wrong: every command imports this file

    by_lower = {other.lower(): other for other in known if other}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"Did you mean {by_lower[near[0]]}?" if near else otherwise


def tell(error: BaseException) -> int:
    """Print an error as the last words of a command; returns its exit code."""
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    prefix = f"[rank {rank}] " if rank and world_size != "1" else ""  # which rank speaks, where there are several
    if isinstance(error, UserError | KeyboardInterrupt):
        is_known = isinstance(error, UserError)
        try:
            print(f"{prefix}{error}" if is_known else "interrupted", file=sys.stderr, flush=True)
        except OSError:  # a full disk, a reader that is gone: the exit code says it still
            silence(sys.stderr)
        return error.exit_code if is_known else 130
    traceback.print_exception(error)
    return 1
