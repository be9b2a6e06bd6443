"""A rank that is killed, frozen or fails by itself ends the job, and the others say which one it was."""

import shutil
import signal
import threading
import time

import pytest
from conftest import finish_ranks, reach, start_ranks, tiny_run

from dist_train.watch import EXIT_LOST_RANK, Watch

LONG = ["--train.epochs", "500", "--train.eval_every_epochs", "0", "--runtime.timeout_s", "10"]


def start_job(digits, tmp_path, world_size):
    run = tmp_path / "run"
    ranks = start_ranks(world_size, tiny_run(digits, run, *LONG), tmp_path)
    reach(run, 5, *ranks)
    return ranks


def last_words(tmp_path, rank):
    text = (tmp_path / f"rank{rank}.log").read_text()
    assert "Traceback" not in text, text
    return text


@pytest.mark.two_process
@pytest.mark.parametrize("lost, fault", [
    (1, signal.SIGKILL), (0, signal.SIGSTOP), pytest.param(1, signal.SIGSTOP, marks=pytest.mark.cluster),
])  # fmt: skip
def test_a_lost_rank_is_named_and_ends_the_job_in_time(digits, tmp_path, lost, fault):
    ranks = start_job(digits, tmp_path, 2)
    ranks[lost].send_signal(fault)
    began = time.monotonic()
    other = 1 - lost
    try:
        assert ranks[other].wait(30) == EXIT_LOST_RANK, last_words(tmp_path, other)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert time.monotonic() - began < 10 + 3  # three seconds for a busy machine
    words = last_words(tmp_path, other)
    assert f"[rank {other}] step " in words and f"rank {lost} on " in words and "no longer answers" in words


@pytest.mark.two_process
def test_a_rank_that_fails_by_itself_gives_the_others_its_reason(digits, tmp_path):
    shards = tmp_path / "digits"
    shutil.copytree(digits, shards)
    damaged = sorted(shards.glob("train*.tar"))[0]
    data = bytearray(damaged.read_bytes())
    at = data.index(b"IDAT") + 8  # the pixels of the first sample: one rank reads them, and checks them
    data[at] ^= 1
    damaged.write_bytes(data)
    codes = finish_ranks(start_ranks(2, tiny_run(str(shards), tmp_path / "run", *LONG), tmp_path), tmp_path)
    assert sorted(codes) == [2, EXIT_LOST_RANK], last_words(tmp_path, 0) + last_words(tmp_path, 1)
    failed = codes.index(2)
    assert damaged.name in last_words(tmp_path, failed)
    assert f"rank {failed} on " in last_words(tmp_path, 1 - failed) and "ended: " in last_words(tmp_path, 1 - failed)
    assert damaged.name in last_words(tmp_path, 1 - failed)


@pytest.mark.two_process
def test_ranks_that_do_not_meet_say_so(digits, tmp_path):
    argv = tiny_run(digits, tmp_path / "run", "--runtime.timeout_s", "3")
    codes = finish_ranks(start_ranks(1, argv, tmp_path, is_cold=True, WORLD_SIZE="2"), tmp_path)
    assert codes == [2], last_words(tmp_path, 0)
    assert "the 2 ranks did not meet at 127.0.0.1:" in last_words(tmp_path, 0)


def test_a_rank_that_failed_is_named_where_others_wait_on_for_it():
    watch = Watch.__new__(Watch)  # as rank zero of two holds it
    watch.rank, watch.hosts, watch.period_s, watch.limit_s, watch.read_step = 0, ["a", "b"], 1.0, 292.0, lambda: 7
    watch._broken, watch._steps, watch._unheard = threading.Event(), {1: 7}, set()
    watch.is_busy = lambda: False
    watch._heard, watch._ended = {1: time.monotonic()}, {1: "train-000003.tar: checksum differs"}
    assert watch._judge() == ""  # this rank may be on its way out with the same error
    watch._heard[1] -= 6
    assert watch._judge() == "step 7: rank 1 on b ended: train-000003.tar: checksum differs"
    watch.is_busy = lambda: True  # what it still writes is not cut short
    assert watch._judge() == ""
    watch.is_busy, watch._ended = lambda: False, {1: ""}  # it was done
    assert watch._judge() == ""


def test_a_rank_whose_datagrams_never_came_is_not_taken_for_dead(capsys):
    watch = Watch.__new__(Watch)  # as rank zero of three holds it, without the others
    watch.rank, watch.hosts, watch.period_s, watch.limit_s, watch.read_step = 0, ["a", "b", "c"], 1.0, 6.0, lambda: 52
    watch._broken, watch._ended, watch._steps, watch._is_said = threading.Event(), {}, {1: 0, 2: 40}, False
    watch._heard = dict.fromkeys((1, 2), time.monotonic() - 10)
    watch._unheard = {1}
    assert "rank 2 on c no longer answers" in watch._judge() and "rank 1" not in watch._judge()
    watch._heard[2] = time.monotonic()
    assert watch._judge() == ""
    assert capsys.readouterr().err.count("no datagram came from rank 1 on b: UDP is blocked") == 1
    watch._broken.set()  # a collective has failed: now its silence counts
    assert "rank 1 on b no longer answers" in watch._judge()
