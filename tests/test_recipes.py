"""Recipes whose sets cannot be had for a test: a few steps on made-up files in the sets' real formats, as the README types it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, lines_of, sharded
from PIL import Image

from dist_train import train

NARROW = ["--model.width", "0.1"]


@pytest.fixture(scope="module")
def svhn(tmp_path_factory) -> str:
    """datasets/svhn.yaml on 60 made-up pictures in its two .mat files."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    raw, random = tmp_path_factory.mktemp("svhn"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        for part, count in (("train", 40), ("test", 20)):
            path = raw / f"{part}_32x32.mat"
            labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
            savemat(path, {"X": random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8), "y": labels})
            url, file, _ = SVHN.split_list[part]
            patch.setitem(SVHN.split_list, part, [url, file, hashlib.md5(path.read_bytes()).hexdigest()])
        return convert("svhn", raw, "--split.val", "0.25")


@pytest.fixture(scope="module")
def dogs_foods_vehicles(tmp_path_factory) -> str:
    """datasets/dogs-foods-vehicles.yaml on class folders of pictures of many sizes."""
    raw, random = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    for name in ("dogs", "foods", "vehicles"):
        (raw / name / "below").mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (*random.integers(60, 240, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(raw / name / ("below" if i % 2 else ".") / f"{i}.jpg")
    return convert("dogs-foods-vehicles", raw)


def convert(name: str, raw: Path, *settings: str) -> str:
    dataset = str(ROOT / f"datasets/{name}.yaml")
    return sharded(raw.parent / f"{raw.name}-shards", dataset, "--path", str(raw), *settings)


@pytest.mark.parametrize(
    ("recipe", "data", "smaller"),
    [
        ("svhn-alexnet", "svhn", NARROW), ("svhn-vgg13", "svhn", NARROW),
        ("dogs-foods-vehicles-alexnet-64", "dogs_foods_vehicles", NARROW),
        ("dogs-foods-vehicles-alexnet-224", "dogs_foods_vehicles", NARROW),
        ("dogs-foods-vehicles-vgg13", "dogs_foods_vehicles", NARROW),
        # of ImageNet's form: JPEGs of many sizes. A compilation takes minutes, and so do ResNet-50's checkpoints on a slow disk
        ("imagenet-resnet50", "dogs_foods_vehicles",
         ["--model.name", "resnet18", "--data.image_size", "32", "--train.compile", "false"]),
    ],
)  # fmt: skip
def test_a_recipe_trains_evaluates_and_resumes_on_files_of_the_real_format(recipe, data, smaller, request, tmp_path):
    run = tmp_path / "run"
    settings = [
        "--config", str(ROOT / f"recipes/{recipe}.yaml"), "--run", str(run), "--data.shards", request.getfixturevalue(data),
        "--data.global_batch_size", "10", *smaller, "--train.epochs", "0.5", "--train.precision", "fp32",
        "--track.wandb", "off", "--runtime.threads", "1",
    ]  # fmt: skip
    assert train.run_training([*settings, "--train.max_steps", "1"]) == 0
    assert not (run / "result.json").exists()  # stopped as asked, before the end
    assert train.run_training([*settings, "--resume"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["step"] >= 2 and result["test"]["samples"] == {"svhn": 20, "dogs_foods_vehicles": 6}[data]
    steps = [line["step"] for line in lines_of(run)]
    assert steps == sorted(steps) and steps[-1] == result["step"]
