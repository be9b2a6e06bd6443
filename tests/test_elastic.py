"""One training on 1, then 2, then 4, then 1 rank: the curve of one rank all the way."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_run


def curve(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.mark.two_process
def test_the_number_of_ranks_may_change_at_every_restart(digits, tmp_path):
    # BatchNorm, dropout and augmentation included; a rate at which rounding does not grow to chaos
    more = ["--train.epochs", "4", "--optim.lr", "0.004", "--train.eval_every_epochs", "1", "--resume"]
    runs = {tmp_path / "steady": "1:32", tmp_path / "elastic": "1:8 2:16 4:24 1:32"}
    for run, plan in runs.items():
        command = [sys.executable, "tests/elastic_ranks.py", str(tmp_path), plan, "--", *tiny_run(digits, run, *more)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    steady, elastic = (curve(run) for run in runs)
    assert [step for step, _ in elastic] == [step for step, _ in steady] == list(range(1, 33))
    differences = [abs(a - b) for (_, a), (_, b) in zip(steady, elastic, strict=True)]
    assert differences[:8] == [0] * 8  # one rank, as before
    assert max(differences) < 1e-3
