"""Ranks forked from a process that has imported torch once, so that a start takes a second; and what runs below a process."""

import contextlib
import os
import random
import socket
import sys
import time
from pathlib import Path


def load_torch() -> None:
    """Import, once for all processes that are forked, what a training needs: five seconds of arithmetic."""
    import accelerate  # noqa: F401
    import torch._dynamo  # noqa: F401  the first optimizer of a process would

    import dist_train.train  # noqa: F401


def free_port() -> int:
    """A port on which nobody listens, below those that the system lends to whoever connects to another."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start(num_ranks: int, argv: list[str], folder: Path) -> list[int]:
    """Fork the ranks of a job; returns their process ids."""
    port, pids = free_port(), []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update(ACCELERATE_USE_CPU="true", WANDB_MODE="disabled")
                if num_ranks > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1",
                                      LOCAL_WORLD_SIZE=str(num_ranks), MASTER_PORT=str(port))  # fmt: skip
                from dist_train.cli import run_command
                from dist_train.train import run_training

                code = run_command(run_training, list(argv))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


_ended: dict[int, int] = {}


def wait(pid: int, timeout_s: float = 120) -> int:
    """Exit code of a rank, negative for a signal. Raises AssertionError if it hangs."""
    deadline = time.monotonic() + timeout_s
    while (code := poll(pid)) is None:
        assert time.monotonic() < deadline, f"process {pid} hangs"
        time.sleep(0.01)
    return _ended.pop(pid, code)


def poll(pid: int) -> int | None:
    if pid not in _ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _ended[pid] = os.waitstatus_to_exitcode(status)
    return _ended.get(pid)


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        todo += (below := children.get(todo.pop(), []))
        found += below
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    return bool(command_of(pid))  # a process that has ended and waits for its parent has no command any more


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("rank*.log")))
