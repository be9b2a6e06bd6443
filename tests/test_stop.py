"""dist-train stop writes the stop file of a training that runs, waits for its end, and refuses anything else."""

import threading
import time

import pytest

from dist_train import runtime
from dist_train.errors import UserError
from dist_train.stop import is_training, main


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


def test_where_nothing_trains_there_is_nothing_to_stop(run):
    runtime.RunLock(run).close()
    with pytest.raises(UserError, match="no process trains in this folder"):
        main([str(run)])
    assert not (run / "stop").exists()
    with pytest.raises(UserError, match="not a run folder"):
        main([str(run / "nowhere")])


def test_a_lock_that_another_host_left_is_not_trusted(run):
    (run / "lock").write_text("process 7 on elsewhere")  # file systems without shared locks
    assert main([str(run)]) == 0
    assert (run / "stop").exists()
