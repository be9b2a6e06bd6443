"""Fine-tuning: what is frozen stays bit for bit, rates fall layer by layer, a resume across the thaw changes nothing."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import losses, run_to_end, same_tensors, tiny_run
from safetensors.torch import load_file, save_file
from torch import nn

from dist_train import models
from dist_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from dist_train.errors import UserError
from dist_train.finetune import freeze_below_head, layer_depths
from dist_train.folds import open_index
from dist_train.index import load_index
from dist_train.initial_network import initial_network
from dist_train.models import build_model, head_name
from dist_train.optim import build_optimizer, set_lr
from dist_train.pretrained import published_statistics
from dist_train.train import run_training

THAW = 8  # the first step that trains all layers, of 15: half an epoch of the digits is 7.5 steps
HEAD = "classifier.6"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Weights of tiny_run's network for seven classes, BatchNorm statistics of its own included."""
    model = build_model(ModelConfig(name="alexnet_bn", width=0.0625), 7, (16, 16), None, seed=5)
    model(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def tuned(digits: str, run: Path, weights: str, freeze_epochs: float, *argv: str) -> list[str]:
    more = ["--model.pretrained", weights, "--optim.freeze_epochs", str(freeze_epochs), "--train.epochs", "1"]
    return tiny_run(digits, run, *more, *argv)


def checkpoint(run: Path, step: int, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/{file}.safetensors")


def below_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.items() if not name.startswith(HEAD)}


@pytest.fixture(scope="module")
def thawed(digits, weights, tmp_path_factory) -> Path:
    """Half an epoch frozen, half not, with a checkpoint at every step around the thaw."""
    run = tmp_path_factory.mktemp("runs") / "thawed"
    more = ["--train.checkpoint_every_steps", "1", "--train.keep_checkpoints", "100"]
    assert run_training(tuned(digits, run, weights, 0.5, *more)) == 0
    return run


def test_a_job_of_one_rank_freezes_as_a_process_without_a_launcher_does(digits, weights, tmp_path):
    more = ["--train.micro_batch_size", "24"]
    assert run_training(tuned(digits, tmp_path / "alone", weights, 0.5, *more)) == 0
    run_to_end(1, tuned(digits, tmp_path / "launched", weights, 0.5, *more), tmp_path)
    assert same_tensors(tmp_path / "alone", tmp_path / "launched")


def test_all_below_a_new_head_stays_bit_for_bit_for_the_whole_run(digits, weights, tmp_path):
    run = tmp_path / "frozen"
    assert run_training(tuned(digits, run, weights, 1, "--optim.weight_decay", "0.1", "--optim.lr", "0.1")) == 0
    before, after = load_file(weights), load_file(run / "weights.safetensors")  # the average of the weights, at that
    assert below_head(before).keys() == below_head(after).keys()
    assert all(torch.equal(t, after[name]) for name, t in below_head(before).items())
    assert after[f"{HEAD}.weight"].shape[0] == 10 and before[f"{HEAD}.weight"].shape[0] == 7
    curve = losses(run)
    assert sum(curve[-5:]) < sum(curve[:5])


def test_weights_and_statistics_stay_until_the_thaw_and_move_from_then_on(thawed, weights):
    before = below_head(load_file(weights))
    at_thaw, after = checkpoint(thawed, THAW), checkpoint(thawed, THAW + 1)
    assert all(torch.equal(t, at_thaw[name]) for name, t in before.items())
    assert [name for name, t in before.items() if torch.equal(t, after[name])] == []
    average = checkpoint(thawed, THAW, "ema")
    assert all(torch.equal(t, average[name]) for name, t in before.items())


def test_the_optimizer_holds_nothing_for_frozen_weights(thawed):
    def owners(step):
        return {key.rpartition("/")[0] for key in checkpoint(thawed, step, "optimizer")}

    assert owners(THAW) == {f"{HEAD}.weight", f"{HEAD}.bias"}
    assert len(owners(THAW + 1)) > 10


@pytest.mark.parametrize("step", [THAW, THAW + 1])
def test_resuming_around_the_thaw_gives_the_same_bits(digits, weights, thawed, tmp_path, step):
    run = tmp_path / "stopped"
    argv = tuned(digits, run, weights, 0.5)
    assert run_training([*argv, "--train.max_steps", str(step)]) == 0
    assert not (run / "result.json").exists()
    assert run_training([*argv, "--resume"]) == 0
    assert same_tensors(thawed, run)
    assert losses(run) == losses(thawed)


@pytest.mark.two_process
def test_two_processes_give_the_curve_of_one_across_the_thaw(digits, weights, tmp_path):
    # frozen, the ranks' gradients are averaged here; thawed, by DistributedDataParallel, with the same wrapper
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--train.max_steps", "8", "--optim.lr", "0.004", "--optim.layer_decay", "0.8", "--optim.clip_norm", "1"]
    run_to_end(2, tuned(digits, two, weights, 0.25, *more), tmp_path)
    assert run_training(tuned(digits, one, weights, 0.25, *more)) == 0
    assert len(losses(one)) == 8 and losses(one) == pytest.approx(losses(two), abs=1e-3)
    before, after = below_head(load_file(weights)), checkpoint(two, 8)
    assert [name for name, t in before.items() if torch.equal(t, after[name])] == []


def test_what_is_only_judged_is_built_once_and_has_its_last_layer_from_the_file(digits, weights, tmp_path, monkeypatch):
    real, builds, ten = models._own, [], tmp_path / "ten.safetensors"
    save_file(build_model(ModelConfig(name="alexnet_bn", width=0.0625), 10, (16, 16), None, seed=0).state_dict(), ten)
    monkeypatch.setattr(models, "_own", lambda *given: builds.append(1) or real(*given))
    argv = tuned(digits, tmp_path / "run", str(ten), 0.0, "--train.epochs", "0")
    assert run_training(argv) == 0 and len(builds) == 1  # though these weights are those that its own seed draws
    shutil.copy(weights, ten)  # of seven classes
    assert run_training([*argv, "--resume"]) == 0  # its checkpoint has the weights
    with pytest.raises(UserError, match="train.epochs is 0, and .*ten.safetensors has no last layer for the 10 classes"):
        run_training(tuned(digits, tmp_path / "other", str(ten), 0.0, "--train.epochs", "0"))


def test_weights_are_not_judged_on_a_table_and_are_not_read_for_that(tmp_path):
    config = RunConfig(model=ModelConfig(name="mlp", pretrained=str(tmp_path / "absent.pth")), train=TrainConfig(epochs=0))
    table = SimpleNamespace(features=["width"], folder="shards/wine", num_classes=3)
    with pytest.raises(UserError, match="train.epochs is 0, and shards/wine is a table.\n.*dist-train eval RUN"):
        initial_network(config, table, is_begun=False, say=print)


def small_net():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    return nn.Sequential(body, nn.Linear(8 * 36, 5)).train()


def test_the_backward_pass_ends_at_the_head_and_comes_back_with_the_thaw():
    net, x = small_net(), torch.randn(4, 3, 8, 8)
    freeze_below_head(net, "1", is_frozen=True)
    assert not net[0](x).requires_grad and net[0][3].training
    net(x).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]
    assert net[0][1].num_batches_tracked == 0
    net.train()
    freeze_below_head(net, "1", is_frozen=False)
    net(x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters()) and net[0][1].num_batches_tracked == 1


# number of layers, and what lies how deep; for ResNet and ViT as timm counts them
@pytest.mark.parametrize("name, num_layers, expected", [
    ("alexnet", 8, {"features.0.bias": 7, "features.10.weight": 3, "classifier.1.weight": 2, "classifier.6.bias": 0}),
    ("vgg11_bn", 11, {"features.0.weight": 10, "features.1.bias": 10, "features.4.weight": 9, "classifier.3.bias": 1}),
    ("resnet18", 10, {"conv1.weight": 9, "bn1.bias": 9, "layer1.0.conv2.weight": 8, "layer4.0.downsample.0.weight": 2,
                      "layer4.1.bn2.bias": 1, "fc.weight": 0}),
    ("convnext_tiny", 23, {"features.0.0.weight": 22, "features.0.1.bias": 22, "features.1.0.layer_scale": 21,
                           "features.7.2.block.0.weight": 1, "classifier.0.weight": 1, "classifier.2.weight": 0}),
    ("vit_b_32", 14, {"class_token": 13, "conv_proj.bias": 13, "encoder.pos_embedding": 13,
                      "encoder.layers.encoder_layer_0.ln_1.weight": 12, "encoder.ln.bias": 1, "heads.head.weight": 0}),
])  # fmt: skip
def test_layers_are_counted_down_from_the_head(name, num_layers, expected):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=3)
    depths = layer_depths(model, head_name(model, 3))
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert set(depths.values()) == set(range(num_layers))
    assert {parameter: depths[parameter] for parameter in expected} == expected


def test_each_layer_learns_at_the_rate_of_the_one_above_times_layer_decay():
    model = build_model(ModelConfig(name="vgg11_bn", width=0.125), 5, (16, 16), None, 0)
    head = head_name(model, 5)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1), head)
    set_lr(optimizer, 0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    depths = layer_depths(model, head)
    seen = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = group["lr"]
            assert group["weight_decay"] == (0.1 if p.dim() >= 2 else 0)
    assert seen == {name: pytest.approx(0.2 * 0.5 ** depths[name]) for name in names.values()}
    assert seen["features.0.weight"] < seen["features.25.weight"] < seen[f"{head}.weight"] == 0.2


@pytest.mark.parametrize("setting, message", [
    (("--optim.layer_decay", "0"), "layer_decay is 0.0; expected more than 0, at most 1"),
    (("--optim.freeze_epochs", "-1"), "freeze_epochs is -1.0; expected 0 or more"),
    (("--optim.freeze_epochs", "1"), "Set model.pretrained"),
])  # fmt: skip
def test_settings_without_a_meaning_are_refused(digits, tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        run_training(tiny_run(digits, tmp_path / "run", *setting))


def test_torchvisions_files_bring_the_statistics_of_the_same_weights_by_name():
    from torchvision.models import get_model_weights, list_models

    def found(name, pretrained):
        return published_statistics(ModelConfig(name=name, pretrained=pretrained))

    assert found("vgg13", "/weights/vgg13-19584684.pth") == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for name in list_models(module=torchvision.models):
        for version in get_model_weights(name):
            assert found(name, f"here/{version.url.rpartition('/')[2]}") == found(name, version.name) is not None, version
    for name, path in (("vgg13_bn", "vgg13-19584684.pth"), ("vgg13", "mine-19584684.pth"), ("vgg13", "vgg13.pth"),
                       ("alexnet_bn", "alexnet-owt-7be5be79.pth"), ("vgg13", "vgg13-19584684.safetensors")):  # fmt: skip
        assert found(name, path) is None


def test_a_runs_weights_bring_the_statistics_it_was_trained_with(digits, tmp_path):
    about = tmp_path / "inference.json"
    config = RunConfig(data=DataConfig(shards=digits), model=ModelConfig(pretrained=str(tmp_path / "weights.safetensors")))
    own = load_index(digits)
    assert open_index(config).mean == own.mean and open_index(config).std == own.std  # no run's folder
    about.write_text(json.dumps({"features": None, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
    assert (open_index(config).mean, open_index(config).std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    about.write_text(json.dumps({"features": ["width", "height"], "mean": [1.0, 2.0], "std": [3.0, 4.0]}))
    assert open_index(config).mean == own.mean
    for damaged in ("{", "[]", "{}"):
        about.write_text(damaged)
        with pytest.raises(UserError, match=r"inference.json: cannot be read .*\n.*Bring it back"):
            open_index(config)


def test_statistics_that_are_set_are_those_of_the_run_and_it_is_said_where_a_file_brings_none(digits, weights, tmp_path, capsys):
    told, argv = "brings no mean and std of pixels", tuned(digits, tmp_path / "run", weights, 0.0, "--train.max_steps", "1")
    assert run_training(argv) == 0 and capsys.readouterr().out.count(told) == 1
    assert run_training([*argv, "--resume"]) == 0 and told not in capsys.readouterr().out
    numbers = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    more = ["--train.epochs", "0.1", "--data.mean", str(numbers[0]), "--data.std"]
    run = tmp_path / "set"
    assert run_training(tuned(digits, run, weights, 0.0, *more, str(numbers[1]))) == 0
    about = json.loads((run / "inference.json").read_text())
    assert (about["mean"], about["std"]) == numbers and told not in capsys.readouterr().out
    for k, std in enumerate(("[]", "[0.4, 0.5]", "[0.4, 0.5, 0]")):
        with pytest.raises(UserError, match=r"data.mean is \[0.1, 0.2, 0.3\] and data.std .*; expected 3 numbers in each"):
            run_training(tuned(digits, tmp_path / f"bad{k}", weights, 0.0, *more, std))


@pytest.mark.parametrize("has_statistics", [False, True])
def test_a_run_goes_on_where_the_weights_it_began_with_are_gone(digits, weights, tmp_path, has_statistics):
    other = tmp_path / "other"
    other.mkdir()
    own = shutil.copy(weights, other / "weights.safetensors")
    if has_statistics:  # they came from a run, and it is gone, too
        (other / "inference.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "features": None}))
    argv = tuned(digits, tmp_path / "run", str(own), 0.0, "--train.max_steps")
    assert run_training([*argv, "3"]) == 0
    assert run_training([*tuned(digits, tmp_path / "steady", str(own), 0.0), "--train.max_steps", "6"]) == 0
    shutil.rmtree(other)
    assert run_training([*argv, "6", "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "steady")
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(UserError, match="weights.safetensors"):  # begun anew, beside old checkpoints: not from nothing
        run_training([*argv, "6"])
