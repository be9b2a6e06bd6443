"""What runs on a GPU only now and then is run here at toy sizes, so that it does not rot."""

import json

import pytest
import torch

from benchmarks.gpu_check import CARD, main
from benchmarks.scaling import predicted_bytes


def test_every_check_runs_at_toy_sizes(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    assert main(["--cpu-dry-run", "--out", str(out)]) == 0, capsys.readouterr()
    report = json.loads(out.read_text())
    assert report["left_out"] == []
    assert {"peak", "no step waits", "gradients of the CPU", "alexnet@64 fp32 compiled", "vgg11@32 from shards",
            "vgg11@32 plain loop"} <= report["checks"].keys()  # fmt: skip
    assert report["checks"]["alexnet@64 fp32"]["mfu"] > 0


def test_what_the_time_does_not_allow_is_named(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    assert main(["--cpu-dry-run", "--minutes", "0", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["checks"] == {} and "peak" in report["left_out"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_the_networks_of_the_card_are_those_of_the_goals():
    assert {network[:2] for network in CARD.networks} == {("alexnet", 224), ("vgg13", 224), ("vgg13", 32)}


def test_predicted_bytes_are_those_of_rings_and_slices():
    sizes = {"samples_per_rank": 64, "weights_below": 1000, "layers": [(9216, 4096), (4096, 4096), (4096, 10)]}
    classifier = 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10
    assert predicted_bytes(sizes, "ddp", 2) == pytest.approx(
        4 * (1000 + classifier)
    )  # a ring of two sends everything once
    activations = 2 * 64 * 4 * (9216 + 4096 + 10)
    assert predicted_bytes(sizes, "hybrid", 2) == pytest.approx(4 * 1000 + activations)
    # four groups of two: between groups a ring of four, over half a classifier
    grouped = 2 * 7 / 8 * 4 * 1000 + activations + 2 * 3 / 4 * 4 * classifier / 2
    assert predicted_bytes(sizes, "hybrid", 8, split_ranks=2) == pytest.approx(grouped)
