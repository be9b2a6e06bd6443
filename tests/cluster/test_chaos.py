"""The short form of benchmarks/chaos.py: ten kills of trainings and conversions, and nothing is lost."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_ten_kills_lose_nothing(tmp_path):
    out = tmp_path / "counts.json"
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "10", "--epochs", "4", "--launchers", "0", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads(out.read_text())
    assert counts["kills"] == sum(counts["kills_by_kind"].values()) == 10 and len(counts["kills_by_kind"]) > 3
    assert counts["weights_equal"] and counts["steps"] == 60 * counts["trainings"] > 0 and counts["conversions"] > 0
