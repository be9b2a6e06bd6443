"""A training asked to stop does so anywhere, evaluations included; dist-train stop asks it, and refuses anything else."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest
from conftest import ROOT, figures, finish_ranks, reach, run_ranks, same_tensors, sharded, start_ranks, tiny_run

from dist_train import evaluate, runtime
from dist_train.errors import UserError
from dist_train.stop import is_training, main
from dist_train.train import run_training


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    return tmp_path


def test_stop_is_seen_by_the_training_and_waits_for_its_end(run, capsys):
    lock = runtime.RunLock(run)
    assert is_training(run)
    requests = runtime.StopRequests(run)
    ended = []

    def training():
        while not requests:
            time.sleep(0.01)
        ended.append(requests.reason)
        lock.close()

    thread = threading.Thread(target=training)
    thread.start()
    try:
        assert main([str(run), "--wait", "20"]) == 0
        assert len(ended) == 1 and not is_training(run)
    finally:
        (run / "stop").touch()
        thread.join()
        requests.close()
    assert "go on with --resume" in capsys.readouterr().out


def test_a_training_that_does_not_end_is_told(run):
    lock = runtime.RunLock(run)
    with pytest.raises(UserError, match="still trains after 0.1 s"):
        main([str(run), "--wait", "0.1"])
    lock.close()


def test_a_copied_run_without_a_lock_is_left_as_it_is(run):
    with pytest.raises(UserError, match="no process trains in this folder"):
        main([str(run)])
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml"]


def test_where_nothing_trains_there_is_nothing_to_stop(run):
    runtime.RunLock(run).close()
    with pytest.raises(UserError, match="no process trains in this folder"):
        main([str(run)])
    assert not (run / "stop").exists()
    with pytest.raises(UserError, match="not a run folder"):
        main([str(run / "nowhere")])


SLOW_DISK = """
import datetime, sys, time
from pathlib import Path
import torch.distributed as dist
from dist_train import checkpoint, cli, train

write, wait_together = checkpoint.write_checkpoint, checkpoint.Checkpoints.wait_together

def write_slowly(*args):
    time.sleep(6)
    write(*args)

def wait_longer_than_a_collective_would(*args):
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3))  # runtime.timeout_s is that of the start as well
    wait_together(*args)

checkpoint.write_checkpoint, checkpoint.Checkpoints.wait_together = write_slowly, wait_longer_than_a_collective_would
code = cli.run_command(train.run_training, sys.argv[2:])
print("left after the checkpoint:", Path(sys.argv[1]).is_dir())
sys.exit(code)
"""


@pytest.mark.two_process
def test_no_rank_leaves_while_the_last_checkpoint_is_written(digits, tmp_path):
    run = tmp_path / "run"
    argv = [str(run / "checkpoints/step-00000002"), *tiny_run(digits, run, "--train.max_steps", "2")]
    codes, logs = run_ranks(2, argv, tmp_path, SLOW_DISK)
    assert codes == [0, 0], logs
    assert all("left after the checkpoint: True" in log for log in logs), logs


def train_into(output, argv, **more):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "dist_train.train", *argv], env=env, stdout=output, stderr=output, **more)


@pytest.mark.parametrize("by_nohup", [False, True])
def test_a_terminal_that_is_closed_stops_a_training_in_order(digits, tmp_path, by_nohup):
    keyboard, screen = pty.openpty()

    def on_a_terminal():
        os.setsid()
        fcntl.ioctl(screen, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if by_nohup else signal.SIG_DFL)

    run = tmp_path / "run"
    epochs = "8" if by_nohup else "1000"
    process = train_into(screen, tiny_run(digits, run, "--train.epochs", epochs), preexec_fn=on_a_terminal)
    os.close(screen)
    reach(run, 1, process)
    os.close(keyboard)
    assert process.wait(60) == (0 if by_nohup else runtime.EXIT_STOPPED)
    assert (run / "result.json").exists() == by_nohup
    last = json.loads(sorted((run / "checkpoints").glob("*/state.json"))[-1].read_text())
    assert last["step"] == figures(run)[-1 if not by_nohup else -3]["step"]


def test_a_full_disk_under_its_lines_changes_no_exit_code(digits, tmp_path):
    with open("/dev/full", "w") as full:
        assert train_into(full, tiny_run(digits, tmp_path / "run", "--train.epochs", "1")).wait(60) == 0
        assert train_into(full, tiny_run(digits, tmp_path / "run", "--train.epochs", "-1")).wait(60) == 2


def test_a_training_outlives_the_reader_of_its_lines(digits, tmp_path):
    run = tmp_path / "run"
    reader, writer = os.pipe()
    process = train_into(writer, tiny_run(digits, run))
    os.close(writer)
    reach(run, 1, process)
    os.close(reader)
    assert process.wait(60) == 0
    assert (run / "result.json").exists()


def test_a_lock_that_another_host_left_is_not_trusted(run):
    (run / "lock").write_text("process 7 on elsewhere")  # file systems without shared locks
    assert main([str(run)]) == 0
    assert (run / "stop").exists()


def test_a_stop_in_any_evaluation_loses_and_repeats_nothing(digits, tmp_path, monkeypatch):
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    evaluated, stop_after = [], []
    logits_of = evaluate.predict_logits

    def logits_then_signal(*args):
        evaluated.append(len(args[3]))
        if stop_after and len(evaluated) == stop_after[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits_of(*args)

    monkeypatch.setattr(evaluate, "predict_logits", logits_then_signal)
    monkeypatch.setattr(evaluate, "LOOK_EVERY_S", 0.0)  # before every batch
    more = ["--train.keep_checkpoints", "1", "--optim.schedule", "plateau"]
    assert run_training(tiny_run(digits, calm, *more)) == 0
    # two batches each: the evaluation of the first epoch, of the last, and two in the end, on val and on test
    assert len(evaluated) == 8
    # twice in the first one, then in the last one's first batch, and in the first batches of the two in the end
    for number, evaluations in [(1, 0), (1, 0), (3, 1), (3, 2), (3, 2)]:
        evaluated.clear()
        stop_after[:] = [number]
        assert run_training(tiny_run(digits, stopped, *more, "--resume")) == runtime.EXIT_STOPPED
        assert len(evaluated) == number, "it ends after the batch in which the signal came"
        assert not (stopped / "result.json").exists()
        assert sum(line["kind"] == "eval" for line in figures(stopped)) == evaluations
    stop_after.clear()
    assert run_training(tiny_run(digits, stopped, *more, "--resume")) == 0
    assert figures(stopped) == figures(calm)
    assert (stopped / "result.json").read_text() == (calm / "result.json").read_text()
    assert same_tensors(calm, stopped)


@pytest.mark.two_process
def test_one_rank_asked_in_a_long_evaluation_stops_all_in_time(tmp_path):
    run, source = tmp_path / "run", ["--source", "sklearn", "--dataset", "digits", "--split.val", "0.9", "--split.test", "0"]
    shards = sharded(tmp_path / "digits", *source)
    # over 1,600 batches of one large picture on each rank: half a minute, and it begins after the second step
    argv = tiny_run(shards, run, "--data.global_batch_size", "2", "--data.image_size", "160", "--model.width", "0.25",
                    "--train.eval_every_epochs", "0.02", "--train.flip_test", "true")  # fmt: skip
    ranks = start_ranks(2, argv, tmp_path)
    reach(run, 2, *ranks)
    time.sleep(1.0)
    ranks[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert finish_ranks(ranks, tmp_path) == [runtime.EXIT_STOPPED] * 2, (tmp_path / "rank0.log").read_text()
    assert time.monotonic() - began < 10
    assert [(line["kind"], line["step"]) for line in figures(run)] == [("train", 1), ("train", 2)]
    saved = json.loads(next((run / "checkpoints").glob("step-00000002/state.json")).read_text())
    assert saved["judged_step"] < saved["step"] == 2
    assert "stopped at step 2 (another rank was asked)" in (tmp_path / "rank0.log").read_text()
