"""Where a step's time goes: a window of steps, each part to its own clock; and what a log line makes of it."""

import time

import pytest
import torch
from conftest import lines_of, tiny_run

from dist_train import messages, step_parts
from dist_train.metrics import flops_per_sample, peak_flops
from dist_train.step_parts import PARTS, StepParts
from dist_train.train import run_training


class ClockByHand:
    """In place of the module time: it goes on only where it is told to, so that what is counted is known exactly."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def by_hand(monkeypatch) -> ClockByHand:
    clock = ClockByHand()
    for module in (step_parts, messages):
        monkeypatch.setattr(module, "time", clock)
    return clock


def one_step(parts: StepParts, forward=lambda: None) -> None:
    for part in ("data", "other", "augment", "forward"):
        parts.mark(part)
    forward()
    parts.mark("backward")
    parts.mark("optimizer")
    parts.mark("other")


def test_the_window_alone_is_timed_and_each_part_by_itself(by_hand):
    parts = StepParts(torch.device("cpu"), num_steps=3, skip=2)
    for step in range(8):
        one_step(parts, lambda seconds=2 if 2 <= step < 5 else 50: by_hand.sleep(seconds))
        assert parts.is_complete == (step >= 5)  # the next step's first mark ends the last part
    assert parts.seconds["forward"] == 6  # three steps, and none of the slow ones around them
    assert parts.step_s() == pytest.approx(sum(parts.seconds.values()) / 3)
    assert list(parts.shares()) == list(PARTS) and sum(parts.shares().values()) == pytest.approx(1, abs=1e-3)
    assert parts.shares()["forward"] > 0.9


def test_an_evaluation_between_two_steps_is_no_part_of_either(by_hand):
    parts = StepParts(torch.device("cpu"), num_steps=3, skip=2)
    for step in range(6):
        one_step(parts, lambda: by_hand.sleep(2))
        by_hand.sleep(1)
        if step in (1, 2, 3):
            parts.pause()
            by_hand.sleep(50)
    parts.mark("data")
    assert parts.is_complete and parts.seconds["forward"] == 6
    assert parts.seconds["other"] == 3 and parts.step_s() == pytest.approx(3)


def test_waiting_for_messages_is_taken_out_of_the_part_in_which_it_happens(by_hand):
    weight = torch.nn.Parameter(torch.ones(3))
    parts = StepParts(torch.device("cpu"), num_steps=1, skip=1, parameters=[weight])
    for step in range(2):
        for part in ("data", "other", "forward"):
            parts.mark(part)
        with messages.clock.waiting():
            by_hand.sleep(1 if step else 50)  # the first step is not counted
        by_hand.sleep(4)
        parts.mark("backward")
        by_hand.sleep(8)
        weight.square().sum().backward()
        by_hand.sleep(2 if step else 50)  # where data parallelism would wait for its last messages
        messages.clock.backward_is_over()
        parts.mark("other")
    parts.mark("data")
    assert parts.is_complete and not messages.clock.is_counting and not weight._post_accumulate_grad_hooks
    assert (parts.seconds["communication"], parts.seconds["forward"], parts.seconds["backward"]) == (1 + 2, 4, 8)
    assert sum(parts.shares().values()) == pytest.approx(1, abs=1e-3)


def test_no_window_is_no_work():
    parts = StepParts(torch.device("cpu"), num_steps=0)
    for _ in range(30):
        one_step(parts)
    assert not parts.is_complete and not any(parts.seconds.values())


def test_a_training_says_where_its_time_went_and_what_it_reached(digits, tmp_path, capsys):
    argv = tiny_run(digits, tmp_path / "run", "--train.profile_steps", "3", "--train.epochs", "1.5")
    assert run_training(argv) == 0
    (profile,) = lines_of(tmp_path / "run", "profile")
    assert profile["forward"] > 0 and profile["backward"] > 0 and profile["step_s"] > 0
    assert sum(profile[part] for part in PARTS) == pytest.approx(1, abs=1e-3)
    after = [line for line in lines_of(tmp_path / "run", "train") if line["step"] > profile["step"]]
    assert after and all(0 < line["mfu"] < 1.5 and line["tflops"] > 0 for line in after)
    assert "where a step's" in capsys.readouterr().out


def test_the_peak_is_that_of_a_matrix_product():
    a = torch.rand(1024, 1024)
    seconds = []
    for _ in range(5):  # the best of a few, as there: other programs may take the cores meanwhile
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    rate = 2 * 1024**3 / min(seconds)
    assert 0.1 < peak_flops(torch.device("cpu"), torch.float32) / rate < 10  # the same machine, give or take its load


def test_operations_of_a_known_network():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10))
    assert flops_per_sample(network, (3, 4, 4)) == 2 * (3 * 9 * 8 * 16 + 128 * 10)
