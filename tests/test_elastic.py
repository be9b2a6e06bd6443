"""One training on 1, then 2, then 4, then 1 rank: the curve of one rank all the way."""

import pytest
from conftest import lines_of, tiny_run, train_in_turns


def train_on(plan, run, tmp_path, digits, *more):
    """Train as the plan says, "ranks:until step ranks:until step"; return the curve."""
    settings = tiny_run(digits, run, "--optim.lr", "0.004", "--train.eval_every_epochs", "1", "--resume", *more)
    train_in_turns(plan, settings, tmp_path)
    return [(line["step"], line["loss"]) for line in lines_of(run, "train")]


@pytest.mark.two_process
def test_the_number_of_ranks_may_change_at_every_restart(digits, tmp_path):
    # BatchNorm, dropout and augmentation included; a rate at which rounding does not grow to chaos
    plans = {"steady": "1:32", "elastic": "1:8 2:16 4:24 1:32"}
    steady, elastic = (train_on(plan, tmp_path / name, tmp_path, digits, "--train.epochs", "4") for name, plan in plans.items())
    assert [step for step, _ in elastic] == [step for step, _ in steady] == list(range(1, 33))
    differences = [abs(a - b) for (_, a), (_, b) in zip(steady, elastic, strict=True)]
    assert differences[:8] == [0] * 8  # one rank, as before
    assert max(differences) < 1e-3


@pytest.mark.two_process
def test_three_ranks_go_on_bit_for_bit(digits, tmp_path):
    # from three on, gradients are summed in an order that follows from how they lie in the messages
    plans = {"steady": "3:8", "stopped": "3:3 3:6 3:8"}
    steady, stopped = (train_on(plan, tmp_path / name, tmp_path, digits, "--train.epochs", "1") for name, plan in plans.items())
    assert len(steady) == 8 and stopped == steady
