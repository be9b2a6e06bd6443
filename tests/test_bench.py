"""bench data: every part is measured on a real set, and the verdict follows from the figures."""

import json
import re

import pytest
import torch
from conftest import tiny_run

from dist_train import bench, bench_step
from dist_train.config import DataConfig, RunConfig
from dist_train.errors import UserError


def test_every_part_of_the_feeding_is_measured(digits, capsys):
    bench.main(["data", "--shards", digits, "--batch-size", "64", "--threads", "1", "--seconds", "0.02", "--json"])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    parts = {name: part for name, part in figures.items() if isinstance(part, dict)}
    assert set(parts) == {"bytes", "decode", "stream", "cached", "augment"}  # no device to bring them to
    for part in parts.values():
        assert 0 < part["spread"][0] <= part["images_per_s"] <= part["spread"][1]
    assert figures["batch_size"] == 64 and figures["threads"] == 1
    assert any("limits" in line for line in lines)


def test_a_table_is_measured_without_decoding(tmp_path):
    from dist_train import shard

    shard.main(["--source", "sklearn", "--dataset", "iris", "--out", str(tmp_path / "iris"), "--workers", "1"])
    config = RunConfig(data=DataConfig(shards=str(tmp_path / "iris"), global_batch_size=16, threads=1))
    figures = bench.measure(config, torch.device("cpu"), 0.01, repeats=2)
    assert set(figures) == {"bytes", "stream", "cached", "threads", "batch_size", "on"}


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ({"bytes": 900, "decode": 300, "stream": 300, "augment": 290}, "Decoding limits.* 3.0 times"),
        ({"bytes": 200, "decode": 300, "stream": 190, "augment": 180}, "Reading limits"),
        ({"bytes": 900, "decode": 300, "stream": 300, "augment": 100}, "Augmentation limits.* 3.0 times"),
        (
            {"bytes": 900, "decode": 800, "stream": 800, "device": 200, "augment": 190},
            "The way to the device .* 4.0 times",
        ),
        ({"bytes": 900, "stream": 800}, "Reading limits"),
    ],
)
def test_the_verdict_names_the_slowest_part(rates, verdict):
    assert re.search(verdict, bench.verdict(rates))


def test_no_shards_and_no_benchmark_are_named():
    with pytest.raises(UserError, match="no shards; name them with --shards"):
        bench.main(["data"])
    with pytest.raises(UserError, match="speed is not a benchmark"):
        bench.main(["speed"])


def test_a_step_is_timed_from_shards_and_from_memory(digits, tmp_path, capsys):
    settings = tiny_run(digits, tmp_path / "unused")
    at = settings.index("--run")
    bench.main(["step", *settings[:at], *settings[at + 2 :], "--steps", "4", "--json"])
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    assert figures["images_per_s"] == pytest.approx(96 / figures["step_s"])
    assert figures["synthetic_images_per_s"] > 0 and 0 < figures["mfu"] < 1.5
    assert sum(figures["shares"].values()) == pytest.approx(1, abs=1e-3) and figures["shares"]["backward"] > 0
    assert "The largest part is" in out and not (tmp_path / "unused").exists()


def test_the_gain_is_amdahls():
    assert bench_step.gain(0.5) == 2 and bench_step.gain(0) == 1 and bench_step.gain(1) == float("inf")
