"""`dist-train plan` prints what the stream reads, whatever the number of ranks, without reading it."""

import json
import time

import numpy as np
import pytest

from dist_train import plan
from dist_train.config import DataConfig, RunConfig
from dist_train.errors import UserError
from dist_train.order import Order

MADE_UP = ["--simulate", "samples=1000,shards=20", "--global-batch-size", "40"]


def lines(capsys, *argv):
    plan.main([*MADE_UP, *argv, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_world_size_reads_the_same_list(capsys):
    lists = []
    for world_size in (1, 2, 4, 8):
        rows = lines(capsys, "--steps", "0:25", "--world-size", str(world_size))
        assert [(r["step"], r["rank"]) for r in rows] == [(s, k) for s in range(25) for k in range(world_size)]
        lists.append([sample for row in rows for sample in row["samples"]])
    assert lists[0] == lists[1] == lists[2] == lists[3]
    assert sorted(lists[0]) == [f"train/{i:08d}" for i in range(1000)]  # 25 steps of 40 are one epoch


def test_the_command_for_a_step_of_a_training_prints_that_steps_samples(capsys):
    assert plan.command(RunConfig(data=DataConfig(shards="my set", train_split="all")), 3) == (
        "dist-train plan --json --shards 'my set' --global-batch-size 128 --seed 0 --steps 3:4 --split all"
    )
    secret = RunConfig(data=DataConfig(shards="https://me:geheim@host/set?signature=geheim"))
    assert "--shards https://host/set --global" in plan.command(secret, 3)
    assert "data.folds 0 only" in plan.command(RunConfig(data=DataConfig(shards="S", folds=5)), 3)
    for more in ({}, {"window_shards": 2, "lanes": 4}):
        data = DataConfig(shards="S", global_batch_size=40, **more)
        words = plan.command(RunConfig(seed=5, data=data), step=7).split()
        assert words[:3] == ["dist-train", "plan", "--json"] and words[3:5] == ["--shards", "S"]
        plan.main([*MADE_UP[:2], *words[2:3], *words[5:]])
        (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        order = Order(np.full(20, 50), 40, 5, data.window_shards, data.lanes)
        assert row["step"] == 7
        assert row["samples"] == [f"train/{i:08d}" for i in order.global_batch(7)[0].tolist()]


def test_the_shards_are_those_of_the_samples(capsys):
    for row in lines(capsys, "--steps", "3:5", "--world-size", "4"):
        numbers = np.array([int(sample.split("/")[1]) for sample in row["samples"]])
        assert row["shards"] == [f"train-{k:06d}.tar" for k in np.unique(numbers // 50)]


def test_nodes_that_do_not_divide_the_batch_get_a_summary(capsys):
    plan.main("--simulate samples=1000,shards=10 --global-batch-size 640 --world-size 20".split())
    assert "20 ranks (3 nodes)" in capsys.readouterr().out


def test_a_billion_samples_on_4096_ranks_answer_at_once(capsys):
    start = time.process_time()
    plan.main("--simulate samples=1e9,shards=1e5 --global-batch-size 8192 --world-size 4096 --steps 0:100".split())
    out = capsys.readouterr().out
    assert "1,000,000,000 samples in 100,000 shards" in out and "4,096 ranks (512 nodes)" in out
    assert time.process_time() - start < 5


@pytest.mark.parametrize("argv, complaint", [
    (["--steps", "5:5"], "nothing to print"),
    (["--steps", "five"], "expected FIRST:STOP"),
    (["--world-size", "7"], "cannot take an equal part of a global batch of 40"),
    (["--simulate", "many"], "expected samples="),
    (["--simulate", "", "--shards", "nowhere"], "no such folder"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(argv, complaint):
    with pytest.raises(UserError, match=complaint):
        plan.main([*MADE_UP, *argv])
