"""Ranks on separate hosts: a cut cable and a power cut end the job in time, and each side says whom it lost."""
# ruff: noqa: F811

import contextlib
import os
import subprocess
import sys
import time

import psutil
import pytest
from clusters import hosts, wait_for  # noqa: F401
from conftest import ROOT, reach, tiny_run

from dist_train.watch import EXIT_LOST_RANK

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
TIMEOUT_S = 10


def start_job(hosts, shards, folder):
    """One rank on node1, one on node2, in the middle of training."""
    argv = tiny_run(shards, folder / "run", "--train.epochs", "500", "--train.eval_every_epochs", "0",
                    "--runtime.timeout_s", str(TIMEOUT_S))  # fmt: skip
    ranks = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                            "MASTER_ADDR": "node1", "MASTER_PORT": "29411", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        command = hosts.command(f"node{rank + 1}", sys.executable, "-m", "dist_train.train", *argv)
        with open(folder / f"rank{rank}.log", "w") as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT))
    reach(folder / "run", 6, *ranks)
    return ranks


def words(folder, rank):
    text = (folder / f"rank{rank}.log").read_text()
    assert "Traceback" not in text, text
    return text


def test_a_cut_cable_ends_the_job_on_both_sides(hosts, digits, tmp_path):
    ranks = start_job(hosts, digits, tmp_path)
    began = time.monotonic()
    hosts.fault("node2", "cut")
    try:
        codes = [rank.wait(TIMEOUT_S + 10) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        hosts.fault("node2", "mend")
    assert codes == [EXIT_LOST_RANK] * 2
    assert time.monotonic() - began < TIMEOUT_S + 4
    assert "rank 1 on node2 no longer answers" in words(tmp_path, 0)
    assert "rank 0 on node1 no longer answers" in words(tmp_path, 1)


def test_a_frozen_process_ends_the_job_on_the_other_host_and_itself_once_it_wakes(hosts, digits, tmp_path):
    ranks = start_job(hosts, digits, tmp_path)
    trainer = [psutil.Process(ranks[1].pid), *psutil.Process(ranks[1].pid).children(recursive=True)][-1]
    began = time.monotonic()
    trainer.suspend()
    try:
        assert ranks[0].wait(TIMEOUT_S + 10) == EXIT_LOST_RANK, words(tmp_path, 0)
        assert time.monotonic() - began < TIMEOUT_S + 4
        assert "rank 1 on node2 no longer answers" in words(tmp_path, 0)
        trainer.resume()
        wait_for(lambda: has_ended(trainer), "the frozen rank to end", timeout_s=TIMEOUT_S + 10)
    finally:
        for process in (trainer, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for rank in ranks:
            rank.wait(10)


def has_ended(process):
    """Whether a process has ended, be it that its parent has not looked yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_power_cut_ends_the_job_on_the_other_host(hosts, digits, tmp_path):  # the last one: node2 does not come back
    ranks = start_job(hosts, digits, tmp_path)
    began = time.monotonic()
    hosts.fault("node2", "power")
    assert ranks[0].wait(TIMEOUT_S + 10) == EXIT_LOST_RANK, words(tmp_path, 0)
    assert time.monotonic() - began < TIMEOUT_S + 4
    assert "rank 1 on node2 no longer answers" in words(tmp_path, 0)
    ranks[1].wait(10)
