"""The one error a user can cause: printed without a traceback, exit code 2."""

import os
import sys
import traceback


class UserError(ValueError):
    """Something the user can put right.

    The message says what was being done, what was found, what was expected, and what to do next; it names the file
    or the key. `cli.main` prints it without a traceback and exits with `exit_code`. Several faults are joined by newlines, so
    that all of them are seen at once.
    """

    exit_code = 2


def tell(error: BaseException) -> int:
    """Print an error as the last words of a command; returns its exit code."""
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    prefix = f"[rank {rank}] " if rank and world_size != "1" else ""  # which rank speaks, where there are several
    if isinstance(error, UserError):
        print(f"{prefix}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    traceback.print_exception(error)
    return 1
