"""Ranks forked from a process that has imported torch once, so that a start takes a tenth of its arithmetic.

A file of its own, as every rank imports it: conftest would bring pytest along.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what a training imports; importing starts no threads, which a fork would lose, and computes nothing
PRELOADED = ["accelerate", "torch._dynamo", "jsonargparse", "docstring_parser", "dist_train.train", "dist_train.cli"]


class ForkedRank:
    """python -m MODULE ARGV in the repository's root, with this whole environment, its words in a log; as subprocess.Popen."""

    def __init__(self, module: str, argv: list[str], env: dict[str, str], log: Path):
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(module, argv, env, str(log)), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"rank, process {self.pid}", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, argv: list[str], env: dict[str, str], log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    server = forkserver._forkserver
    os.close(server._forkserver_alive_fd)  # open, it lets the server outlive pytest by its ranks, which end with their parent
    server._forkserver_alive_fd = None
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))  # which Python reads when it starts
    sys.argv = [module, *argv]
    sys.modules.pop(module, None)  # it is to run anew, as __main__
    runpy.run_module(module, run_name="__main__", alter_sys=True)
