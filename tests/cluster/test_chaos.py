"""The short form of benchmarks/chaos.py: six kills in one training, and nothing is lost."""

import json
import os
import subprocess
import sys

import pytest
from clusters import PROJECT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_six_kills_lose_nothing(tmp_path):
    out = tmp_path / "counts.json"
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "6", "--epochs", "4", "--out", str(out)]
    done = subprocess.run(
        command, cwd=PROJECT, env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads(out.read_text())
    assert counts["kills"] == 6 and counts["weights_equal"] and counts["steps"] == 60 * counts["trainings"]
