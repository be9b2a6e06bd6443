"""dist-train stop RUN: ask a training, wherever it runs, to write a checkpoint at its next step and to end."""

import argparse
import fcntl
import platform
import time
from pathlib import Path

from dist_train.errors import UserError


def main(argv: list[str]) -> int:
    """Write the stop file of a run folder; with --wait, return when the training has ended."""
    parser = argparse.ArgumentParser(prog="dist-train stop", description=__doc__)
    parser.add_argument("run", help="the run folder, runs/NAME")
    parser.add_argument("--wait", type=float, nargs="?", const=600.0, metavar="SECONDS", help="until it has ended (600 s)")
    options = parser.parse_args(argv)
    folder = Path(options.run)
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: not a run folder, it has no config.yaml. Give the folder of a training: runs/NAME.")
    if is_training(folder) is False and was_here(folder):
        raise UserError(f"{folder}: no process trains in this folder, so there is nothing to stop.")
    (folder / "stop").touch()
    print(f"{folder}: asked to stop; go on with --resume", flush=True)
    deadline = time.monotonic() + (options.wait or 0)
    while options.wait is not None and (trains := is_training(folder)) is not False:
        if trains is None:
            raise UserError(f"{folder}: this disk has no locks, so whether the training has ended cannot be told; its log tells.")
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: still trains after {options.wait:g} s. A step or an evaluation may take that long; "
                            f"its log tells.")  # fmt: skip
        time.sleep(0.2)
    if options.wait is not None:
        print(f"{folder}: the training has ended")
    return 0


def was_here(folder: Path) -> bool:
    """Whether the last process that trained in the folder, if any, did so on this host: then its lock can be trusted."""
    lock = folder / "lock"
    return not lock.exists() or lock.read_text().endswith(f" on {platform.node()}")


def is_training(folder: Path) -> bool | None:
    """Whether a process holds the run folder's lock (runtime.RunLock), on any host where the file system shares locks; None
    where it has none."""
    try:
        with open(folder / "lock") as lock:  # for reading: NFSv4 gives a shared lock to none else
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    return False
