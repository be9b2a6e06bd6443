"""What an evaluation sees of a picture, whoever asks for it, and evaluation without training."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import same_tensors, sharded, tiny_run
from PIL import Image
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

from dist_train import report, runtime
from dist_train.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from dist_train.data import open_evaluation
from dist_train.errors import UserError
from dist_train.evaluate import Interrupted, central_pixels, predict_logits, until_asked, views
from dist_train.export import export
from dist_train.index import load_index
from dist_train.predict import eval_main, load_run, usual_split
from dist_train.predict import main as predict_main
from dist_train.sizes import check_eval_size, eval_crop
from dist_train.store import Store
from dist_train.train import run_training

PICTURES = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) + 1  # no zero, which is what shifts uncover


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_views_are_shifts_and_mirror_images_and_count_as_one(flipped, shift):
    seen = list(views(PICTURES, flipped, shift))
    assert len(seen) == (1 + 2 * bool(shift)) * (1 + flipped)
    assert sum(weight for weight, _ in seen) == 1.0
    still = [weight for weight, view in seen if torch.equal(view, PICTURES)]
    assert still == [(0.5 if shift else 1.0) / (1 + flipped)]
    if flipped:  # every view has its mirror image, at the same weight
        for weight, view in seen:
            assert any(torch.equal(view.flip(3), other) and weight == its for its, other in seen)


def test_a_shift_uncovers_the_mean_colour():
    _, (_, up_left), (_, down_right) = views(PICTURES, False, 2)
    assert torch.equal(up_left[:, :, :-2, :-2], PICTURES[:, :, 2:, 2:])
    assert torch.equal(down_right[:, :, 2:, 2:], PICTURES[:, :, :-2, :-2])
    assert not up_left[:, :, -2:].any() and not up_left[:, :, :, -2:].any()
    assert not down_right[:, :, :2].any() and not down_right[:, :, :, :2].any()


def test_logits_are_the_weighted_mean_over_the_views():
    index = SimpleNamespace(features=None, image_size=(8, 8), mean=[0.5] * 3, std=[0.25] * 3)
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    corner = lambda pictures: pictures[:, :, 0, 0]  # noqa: E731 - a network whose answer is the upper left pixel
    pictures = (torch.arange(3 * 8 * 8) % 256).to(torch.uint8).view(1, 3, 8, 8)
    config = RunConfig(train=TrainConfig(flip_test=True, shift_test=2))
    normal = (pictures.float() / 255 - 0.5) / 0.25
    expected = (normal[:, :, 0, 0] + normal[:, :, 0, 7]) / 4 + normal[:, :, 2, 2] / 8  # elsewhere the mean colour, 0
    torch.testing.assert_close(predict_logits(config, index, corner, pictures, accelerator), expected)


@pytest.mark.parametrize("stored, size, crop", [
    ((256, 256), 224, 0.875), ((64, 48), 28, 0.875), ((33, 61), 24, 0.7), ((40, 40), 32, 1.0), ((36, 36), 32, 0.875),
])  # fmt: skip
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_of_one_size_are_resized_and_cut_as_torchvision_does(stored, size, crop, interpolation):
    pictures = torch.randint(0, 256, (2, 3, *stored), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    how = v2.InterpolationMode(interpolation)
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(round(size / crop), how, antialias=True),
                         v2.CenterCrop(size)])(pictures).clamp(0, 1)  # fmt: skip
    ours = central_pixels(pictures, (size, size), [0.0] * 3, [1.0] * 3, crop, interpolation)
    assert ours.shape == (2, 3, size, size) and ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored, image_size, crop, decoded, expected", [
    ((256, 256), 224, "random_resized", "auto", 0.875), (None, 224, "random_resized", "auto", 0.875),
    ((256, 256), 224, "padded", "auto", 0.0), ((256, 256), 0, "random_resized", "auto", 0.0),
    ((224, 224), 224, "random_resized", "auto", 0.0), ((200, 300), 224, "random_resized", "auto", 0.0),
    ((256, 256), 224, "random_resized", "resize", 0.0), ((256, 256), 224, "none", "random_resized", 0.875),
])  # fmt: skip
def test_the_middle_is_evaluated_where_random_boxes_are_trained_on_and_there_is_something_to_cut(
    stored, image_size, crop, decoded, expected
):
    config = RunConfig(data=DataConfig(image_size=image_size, crop=decoded), augment=AugmentConfig(crop=crop))
    assert eval_crop(config, SimpleNamespace(image_size=stored, features=None)) == expected


def made_shards(folder: Path, parts: dict[str, int], side: int = 40) -> str:
    """Shards of smooth PNGs of one size and three classes, each of the parts with as many of each class."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for k in range(3 * count):
            path = folder / "raw" / part / f"class{k % 3}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((side, side)).save(path)
    return sharded(folder / "shards", "--path", str(folder / "raw"))


def printed(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_eval_predict_and_exported_files_see_the_same_middle(tmp_path, capsys, interpolation):
    shards, run = made_shards(tmp_path, {"train": 8, "val": 4, "test": 4}), tmp_path / "run"
    argv = ["--augment.crop", "random_resized", "--data.image_size", "35", "--data.global_batch_size", "12", "--train.epochs", "1"]
    argv += ["--data.interpolation", interpolation]
    assert run_training(tiny_run(shards, run, *argv)) == 0
    result, index = json.loads((run / "result.json").read_text()), load_index(shards)
    assert json.loads((run / "inference.json").read_text())["interpolation"] == interpolation
    capsys.readouterr()
    eval_main([str(run), "--json"])
    assert printed(capsys) == [{"split": "test", **result["test"]}]
    export(run, "safetensors", tmp_path / "weights")
    about = export(run, "torch-export", tmp_path / "graph")
    assert about["check"]["top1_file"] == pytest.approx(result["test"]["top1"])
    assert about["preprocessing"]["resize"]["rule"] == "shorter side to 40 px, then the central 40 x 40 px"
    assert about["preprocessing"]["crop"]["rule"] == "to 40 x 40 px, then the central 35 x 35 px"
    resize = json.loads((tmp_path / "weights/model.safetensors.json").read_text())["preprocessing"]["resize"]
    assert (resize["shorter_side"], resize["size"]) == (40, [35, 35]) and resize["interpolation"] == f"{interpolation}, antialiased"

    store, files = Store(index.split("test")), tmp_path / "files"
    files.mkdir()
    for sample in range(12):
        (files / f"{sample:02d}.png").write_bytes(store.payload(sample))
    assert predict_main([str(run), str(files), "--json", "--top", "3"]) == 0
    rows = [{top["class"]: top["probability"] for top in line["top"]} for line in printed(capsys)]
    predicted = torch.tensor([[row[name] for name in index.classes] for row in rows])
    trained, accelerator = load_run(run), runtime.start("fp32", 1, 60)[0]
    (batch,) = open_evaluation(index, "test", 64, 35, trained.eval_crop)
    with torch.no_grad():
        seen = {crop: predict_logits(trained.config, trained, trained.network, batch.images, accelerator, crop).softmax(1)
                for crop in (0.875, 0.0)}  # fmt: skip
    runtime.end()
    assert (predicted - seen[0.875]).abs().max() < 1e-5 < 1e-4 < (predicted - seen[0.0]).abs().max()
    loss_of = {crop: torch.nn.functional.nll_loss(p.log(), batch.labels).item() for crop, p in seen.items()}
    assert abs(loss_of[0.875] - result["test"]["loss"]) < 1e-5 < 1e-4 < abs(loss_of[0.0] - result["test"]["loss"])

    about = json.loads((run / "inference.json").read_text())
    assert about.pop("stored_size") == [40, 40] and about["eval_size"] == [35, 35]
    (run / "inference.json").write_text(json.dumps(about))  # as a run had it whose pictures were evaluated whole
    assert load_run(run).eval_crop == 0.0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("settings", [
    ("photos",), ("digits",),
    ("digits", "--data.image_size", "8", "--augment.start_size", "6", "--model.name", "resnet18", "--model.width", "1"),
])  # fmt: skip
def test_training_resizes_as_it_is_told_in_the_decoder_on_the_device_and_while_pictures_grow(tmp_path, request, settings):
    shards, runs = request.getfixturevalue(settings[0]), [tmp_path / "bilinear", tmp_path / "bicubic"]
    for run in runs:
        argv = tiny_run(shards, run, "--data.interpolation", run.name, "--train.epochs", "0.1", *settings[1:])
        argv += ["--augment.crop", "none", "--augment.rotate_degrees", "0", "--data.global_batch_size", "16",
                 "--data.val_split", "none", "--data.test_split", "none"]
        assert run_training(argv) == 0
    assert not same_tensors(*runs)


@pytest.mark.usefixtures("one_thread")
def test_a_run_is_evaluated_and_exported_at_another_size_than_it_is_trained_at(tmp_path, capsys):
    shards, run = made_shards(tmp_path, {"train": 8, "val": 4, "test": 4}), tmp_path / "run"
    argv = ["--augment.crop", "random_resized", "--data.image_size", "24", "--data.eval_size", "32", "--train.epochs", "0.5"]
    argv += ["--data.global_batch_size", "12"]
    assert run_training(tiny_run(shards, run, *argv)) == 0
    trained, result = load_run(run), json.loads((run / "result.json").read_text())["test"]
    assert (trained.network_size, trained.image_size, trained.eval_crop) == ((24, 24), (32, 32), 0.875)
    (batch,) = open_evaluation(load_index(shards), "test", 64, 32, 0.875)
    with torch.no_grad():
        logits = trained.network(central_pixels(batch.images, (32, 32), trained.mean, trained.std, 0.875, "bilinear"))
    assert torch.nn.functional.cross_entropy(logits, batch.labels).item() == pytest.approx(result["loss"], rel=1e-4)
    capsys.readouterr()
    eval_main([str(run), "--json"])
    assert printed(capsys) == [{"split": "test", **result}]
    about = export(run, "safetensors", tmp_path / "weights")
    assert about["input"]["shape"] == ["batch", 3, 32, 32] and about["network_size"] == [24, 24]
    assert about["check"]["top1_file"] == pytest.approx(result["top1"])
    seen = []
    trained.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_train.predict.load_run", lambda folder: trained)
        assert predict_main([str(run), str(tmp_path / "raw/val/class0"), "--json"]) == 0
    assert seen == [(4, 3, 32, 32)]


def test_another_size_is_refused_for_networks_of_one_size():
    network = VisionTransformer(image_size=32, patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    index = SimpleNamespace(image_size=(32, 32), features=None, folder="shards/x")
    config = RunConfig(data=DataConfig(eval_size=64), model=ModelConfig(name="vit_b_32"))
    with pytest.raises(UserError, match="data.eval_size is 64, and vit_b_32, built for 32 x 32 px, does not take that: Wrong"):
        check_eval_size(config, index, network)
    check_eval_size(replace(config, data=DataConfig(eval_size=32)), index, network)


@pytest.mark.usefixtures("one_thread")
def test_published_weights_are_evaluated_without_training(tmp_path, capsys):
    shards, before, run = made_shards(tmp_path, {"train": 8, "val": 4}), tmp_path / "before", tmp_path / "run"
    assert list(load_index(shards).splits) == ["train", "val"]
    argv = ["--data.global_batch_size", "12", "--train.epochs", "1"]
    assert run_training(tiny_run(shards, before, *argv)) == 0
    argv += ["--model.pretrained", str(before / "weights.safetensors"), "--train.epochs", "0"]
    assert run_training(tiny_run(shards, run, *argv)) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["val"] == json.loads((before / "result.json").read_text())["val"]
    assert (result["step"], result["best_step"]) == (0, 0)
    assert same_tensors(before, run)

    assert run_training(tiny_run(shards, run, *argv, "--resume")) == 0
    assert json.loads((run / "result.json").read_text()) == result
    capsys.readouterr()
    eval_main([str(run), "--json"])  # of val: there is no test split
    assert printed(capsys) == [{"split": "val", **result["val"]}]
    assert export(run, "safetensors", tmp_path / "out")["check"]["split"] == "val"
    report.main([str(run)])

    with pytest.raises(UserError, match="train.epochs is 0.0; expected more than 0, or 0 with model.pretrained"):
        run_training(tiny_run(shards, tmp_path / "fresh", "--train.epochs", "0"))


@pytest.mark.usefixtures("one_thread")
def test_weights_of_other_classes_are_not_evaluated_with_a_last_layer_as_drawn(digits, tmp_path):
    shards, before = made_shards(tmp_path, {"train": 8, "val": 4}), tmp_path / "before"
    assert run_training(tiny_run(digits, before, "--train.max_steps", "1", "--train.epochs", "0.05")) == 0
    argv = ["--model.pretrained", str(before / "weights.safetensors"), "--train.epochs", "0", "--data.global_batch_size", "12"]
    about = json.loads((before / "inference.json").read_text())
    (before / "inference.json").unlink()
    with pytest.raises(UserError, match="has no last layer for the 3 classes"):
        run_training(tiny_run(shards, tmp_path / "run", *argv))
    (before / "inference.json").write_text(json.dumps(about | {"classes": about["classes"][::-1]}))
    with pytest.raises(UserError, match="tells other classes apart than those of .*, or in another order"):
        run_training(tiny_run(digits, tmp_path / "other", *argv[:-2]))


def test_a_test_split_that_a_run_leaves_unseen_stays_so():
    index = SimpleNamespace(find={"train": 1, "val": 1, "test": 1}.get)
    for asked, expected in (("test", "test"), ("none", "val"), ("", "val"), ("other", "test")):
        assert usual_split(index, RunConfig(data=DataConfig(test_split=asked))) == expected
    assert usual_split(index, RunConfig(data=DataConfig(test_split="none", val_split="none"))) is None


def test_a_stop_in_the_first_of_a_few_long_batches_is_heard_before_the_next():
    passed = []
    world = runtime.World(0, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(Interrupted):
        for batch in until_asked(iter(range(8)), 8, lambda: bool(passed), world):
            passed.append(batch)
    assert passed == [0]
