"""What runs on a GPU only now and then is run here at toy sizes, so that it does not rot."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import benchmarks.training
from benchmarks import step
from benchmarks.gpu_check import CARD, goals, main
from benchmarks.scaling import predicted_bytes, predicted_seconds
from dist_train import runtime
from dist_train.config import RunConfig, TrainConfig
from dist_train.parallel import parallelize
from dist_train.runtime import World


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # torchvision's, from 0.29 on
def test_every_check_runs_at_toy_sizes(digits, tmp_path, capsys):
    out = tmp_path / "cpu.json"
    assert main(["--cpu-dry-run", "--cifar10", digits, "--out", str(out)]) == 0, capsys.readouterr()
    report = json.loads(out.read_text())
    is_there = importlib.util.find_spec("timm") is not None
    assert report["left_out"] == ([] if is_there else ["vgg11@32 timm loop"])
    assert {"peak", "no step waits", "gradients of the CPU", "alexnet@64 fp32 compiled", "vgg11@32 from shards",
            "vgg11@32 plain loop", "alexnet@64 fp32 graphs", "vgg11@32 torchvision loop"} <= report["checks"].keys()  # fmt: skip
    assert report["checks"]["alexnet@64 fp32"]["mfu"] > 0 and report["checks"]["alexnet@64 from the card"]["share"] > 0
    assert report["checks"]["jpeg decoding"]["gpu"] > 0
    for kind in ("usual", "deterministic"):
        assert report["checks"]["same bits after a resume"][kind] == {"alexnet_bn": True}
    assert 0 < report["checks"]["cifar10 to 94%"]["best"] < 0.94
    assert report["goals"] == {"cifar10 to 94%: seconds": {"goal": 30, "found": None}}  # the toys have other names


def test_a_goal_stands_beside_what_was_found():
    checks = {"vgg13@224 bf16": {"mfu": 0.41}, "vgg13@224 bf16 compiled": {"mfu": 0.55}, "vgg13@224 bf16 graphs": {"error": "x"},
              "cifar10 to 94%": {"reached_s": None}}  # fmt: skip
    assert goals({"checks": checks}) == {"vgg13@224: share of the measured bf16 peak": {"goal": 0.5, "found": 0.55},
                                         "cifar10 to 94%: seconds": {"goal": 30, "found": None}}  # it ran, and never got there


def test_the_mode_of_compiling_reaches_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    accelerator = SimpleNamespace(prepare_model=lambda network: network)
    for mode in ("default", "reduce-overhead"):
        config = RunConfig(train=TrainConfig(compile=True, compile_mode=mode))
        laid = parallelize(torch.nn.Linear(2, 2), config, accelerator, World(0, 1, 0, 1, torch.device("cpu")))
        assert laid.replays_graphs == (mode != "default")
    assert calls == [{"dynamic": False, "mode": None}, {"dynamic": False, "mode": "reduce-overhead"}]


def test_what_the_time_does_not_allow_is_named(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    assert main(["--cpu-dry-run", "--minutes", "0", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["checks"] == {} and "peak" in report["left_out"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("has_cifar10", [False, True])
def test_the_makefile_times_the_way_to_94_where_there_is_cifar10_and_can_do_without_timm(tmp_path, has_cifar10):
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    if has_cifar10:
        (tmp_path / "shards/cifar10").mkdir(parents=True)
        (tmp_path / "shards/cifar10/index.json").touch()
    command = ["make", "--dry-run", "-C", tmp_path, "-f", ROOT / "Makefile", "gpu-check"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    (check,) = (line for line in lines if "gpu_check.py" in line)
    assert check.endswith("--cifar10 shards/cifar10") == has_cifar10
    (fetch,) = (line for line in lines if "'.[bench]'" in line)
    assert fetch.endswith("|| true") and not (tmp_path / ".venv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_the_networks_of_the_card_are_those_of_the_goals():
    assert {network[:2] for network in CARD.networks} == {("alexnet", 224), ("vgg13", 224), ("vgg13", 32)}


@pytest.mark.parametrize(
    ("asked", "has_bf16", "expected"),
    [("auto", True, "bf16"), ("auto", False, "fp32"), ("fp32", True, "fp32"), ("bf16", False, "bf16")],
)
def test_benchmarks_take_bf16_where_the_processor_has_it(monkeypatch, asked, has_bf16, expected):
    monkeypatch.setattr(runtime, "is_slow", lambda precision, device: precision == "bf16" and not has_bf16)
    assert benchmarks.training.precision_for(asked, torch.device("cpu")) == expected


def test_a_result_of_a_step_is_named_by_what_it_depends_on():
    def path(**options):
        return str(step.out_path(SimpleNamespace(model="alexnet", size=64, precision="bf16", out="", **options), "cpu"))

    assert path(shards="") == "benchmarks/results/step-alexnet-64-bf16-cpu.json"
    assert path(shards="shards/cifar10/") == "benchmarks/results/step-alexnet-64-cifar10-bf16-cpu.json"


def test_real_shards_are_timed_from_memory_and_decoded_anew(digits, tmp_path, monkeypatch):
    settings, trained = benchmarks.training.settings, []
    narrow = lambda *argv: trained.append(settings(*argv, "--model.width", "0.0625")) or trained[-1]  # noqa: E731
    monkeypatch.setattr(benchmarks.training, "settings", narrow)
    options = SimpleNamespace(shards=digits, scratch=str(tmp_path), model="alexnet", size=64, batch_size=8, precision="fp32",
                              steps=1, compile=False)  # fmt: skip
    before = sorted(Path(digits).iterdir())
    lines = {kind: step.trainer(SimpleNamespace(worker=kind, **vars(options)))() for kind in ("dist_train", "uncached")}
    assert [config.data.cache for config in trained] == ["auto", "none"]
    assert [line["is_kept"] for line in lines.values()] == [True, False]
    assert all(line["images_per_s"] > 0 for line in lines.values()) and sorted(Path(digits).iterdir()) == before
    rates = {"plain": 1, "dist_train": 8, "uncached": 6, "synthetic": 10, "arithmetic": 16}
    figures = {kind: [{"images_per_s": rate, "data_wait": 0}] for kind, rate in rates.items()}
    found = step.summary(figures)
    assert (found["data_stall"], found["uncached_stall"], found["ratio"]) == (0.2, 0.4, 8)
    assert "uncached_stall" not in step.summary({kind: figures[kind] for kind in step.KINDS})


def test_predicted_bytes_are_those_of_rings_and_slices():
    sizes = {"samples_per_rank": 64, "weights_below": 1000, "layers": [(9216, 4096), (4096, 4096), (4096, 10)]}
    classifier = 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10
    assert predicted_bytes(sizes, "ddp", 2) == pytest.approx(4 * (1000 + classifier))  # a ring of two sends everything once
    activations = 2 * 64 * 4 * (9216 + 4096 + 10)
    assert predicted_bytes(sizes, "hybrid", 2) == pytest.approx(4 * 1000 + activations)
    # four groups of two: between groups a ring of four, over half a classifier
    grouped = 2 * 7 / 8 * 4 * 1000 + activations + 2 * 3 / 4 * 4 * classifier / 2
    assert predicted_bytes(sizes, "hybrid", 8, split_ranks=2) == pytest.approx(grouped)


def test_predicted_time_is_arithmetic_copies_bytes_and_waits():
    sizes = {"samples_per_rank": 64, "weights_below": 0, "layers": [(100, 100)]}
    link = {"bytes_per_s": 1e6, "latency_s": 0.001, "copied_bytes_per_s": 1e9}
    sent, copied = 4 * 10_100 / 1e6, 4 * 10_100 / 1e9  # a ring of two sends every gradient once; each goes into a bucket
    slow, fast = predicted_seconds(sizes, link, 0.02, "ddp", 2)
    assert slow == pytest.approx(0.02 + sent + copied + 0.004)
    assert fast == pytest.approx(max(0.02 + copied, sent) + 0.004)  # what travels while the rank computes costs nothing
