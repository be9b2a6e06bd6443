"""timm's networks: built for classes and sizes, what does not go is refused, keyed and synchronised as all others are."""

import copy
import json

import pytest
import torch
from conftest import losses, run_to_end, tiny_run
from torch import nn

from dist_train.config import ModelConfig, RunConfig
from dist_train.errors import UserError
from dist_train.export import export
from dist_train.finetune import freeze_below_head, layer_depths
from dist_train.layers import (
    GlobalBatchNorm,
    GlobalBatchNormAct,
    KeyedDropout,
    set_dropout_keys,
    use_keyed_dropout,
    use_sync_batchnorm,
)
from dist_train.models import build_model, head_name, rates_taken
from dist_train.pretrained import evaluated_otherwise, published_statistics
from dist_train.sizes import check_new
from dist_train.train import run_training

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")


def build(name, num_classes=3, size=(32, 32), seed=0, **settings):
    return build_model(ModelConfig(name=f"timm/{name}", **settings), num_classes, size, None, seed)


@pytest.mark.parametrize("name, size, head", [
    ("test_vit", (32, 48), "head"), ("test_efficientnet", (40, 40), "classifier"), ("test_convnext", (64, 64), "head.fc"),
    ("test_resnet", (32, 32), "fc"), ("test_maxvit", (64, 64), "head.fc"), ("test_vit.r160_in1k", (160, 160), "head"),
])  # fmt: skip
def test_nets_are_built_for_the_classes_and_the_size(name, size, head):
    model = build(name, 3, size).eval()
    assert head_name(model, 3) == head and model.get_submodule(head).weight.shape[0] == 3
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)
    if "vit" in name and "max" not in name:
        assert model.pos_embed.shape[1] == 1 + size[0] // 16 * (size[1] // 16)


def test_weights_follow_the_seed_and_the_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (build("test_vit", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    assert not torch.equal(a["head.weight"], c["head.weight"])


@pytest.mark.parametrize("name, size, settings, message", [
    ("resnet_18", 32, {}, "timm/resnet_18, .* has no 'resnet_18'. Did you mean resnet18"),
    ("0123456789", 32, {}, "It has .* python -c"),
    ("resnet18.a9", 32, {}, r"of resnet18 timm .* has resnet18\.a1_in1k"),
    ("test_vit", 40, {}, "does not take pictures of 40 x 40 px: .*16"),
    ("deit_tiny_distilled_patch16_224", 32, {}, r"logits come from 2 last layers \(head, head_dist\)"),
    ("test_vit_relpos", 160, {}, "dropout blocks.0.attn.rel_pos.mlp.drop1 does not go by samples"),
    ("resnet18", 32, {"stem": "small"}, "model.stem is small, which is not defined for timm/resnet18"),
    ("resnet18", 32, {"init": "dirac"}, "model.init is dirac"),
    ("test_vit", 32, {"pretrained": "a1_in1k"}, "for timm/test_vit there are DEFAULT, r160_in1k"),
    ("botnet50ts_256", 256, {"pretrained": "DEFAULT"}, "timm has no weights of botnet50ts_256"),
])  # fmt: skip
def test_what_cannot_be_built_is_said(name, size, settings, message):
    with pytest.raises(UserError, match=message):
        build(name, 10, (size, size), **settings)


@pytest.mark.parametrize("is_training, message", [
    (True, r"returns a tuple in training, expected logits \(3, 10\)"), (False, r"returns \(3, 7\) in evaluation")])  # fmt: skip
def test_what_returns_no_logits_is_refused(monkeypatch, is_training, message):
    class Odd(nn.Module):
        def forward(self, x):
            logits = x.new_empty(len(x), 10)
            return ((logits, logits) if is_training else logits) if self.training else logits[:, : 10 if is_training else 7]

    monkeypatch.setattr(timm, "create_model", lambda *name, **options: Odd())
    with pytest.raises(UserError, match=message):
        build("test_resnet", 10)


def test_weights_load_from_a_file_and_another_class_count_keeps_the_fresh_head(tmp_path):
    trained = build("test_convnext", 5, seed=1)
    path = tmp_path / "model.pth"
    torch.save(trained.state_dict(), path)
    same, other = (build("test_convnext", n, pretrained=str(path)).state_dict() for n in (5, 3))
    fresh = build("test_convnext", 3).state_dict()
    assert all(torch.equal(t, same[name]) for name, t in trained.state_dict().items())
    assert {name for name, t in other.items() if torch.equal(t, fresh[name]) and t.any()} >= {"head.fc.weight"}
    assert torch.equal(other["stem.0.weight"], same["stem.0.weight"])


@pytest.mark.parametrize("name, taken", [
    ("test_vit", {"dropout", "drop_path"}), ("test_resnet", {"drop_path"}),
    ("vgg11", {"dropout"}), ("ghostnet_100", set()),
])  # fmt: skip
def test_rates_reach_the_layers_that_are_keyed_and_others_are_refused(name, taken):
    settings = {"dropout": 0.125, "drop_path": 0.0625}
    assert rates_taken(ModelConfig(name=f"timm/{name}", **settings)) == taken
    with torch.device("meta"):
        keyed = [m for m in use_keyed_dropout(build(name, size=(64, 64), **settings)).modules() if isinstance(m, KeyedDropout)]
    highest = {kind: max((m.p for m in keyed if (m.units == "samples") == (kind == "drop_path")), default=0.0) for kind in settings}
    assert all(highest[kind] == (rate if kind in taken else 0) for kind, rate in settings.items())
    check_new(RunConfig(model=ModelConfig(name=f"timm/{name}", **{kind: settings[kind] for kind in taken})))
    for kind in settings.keys() - taken:
        with pytest.raises(UserError, match=f"model.{kind} {settings[kind]}.*: timm/{name} has no layers of its own for that"):
            check_new(RunConfig(model=ModelConfig(name=f"timm/{name}", **settings)))


@pytest.mark.parametrize("name, num_before", [("test_vit", 1), ("vit_wee_patch16_reg1_gap_256", 0)])
def test_positions_in_a_file_are_resampled_for_another_size(tmp_path, name, num_before):
    trained, said, path = build(name, 3, (64, 64)), [], tmp_path / "last.pth.tar"
    torch.save({"state_dict": trained.state_dict(), "state_dict_ema": trained.state_dict()}, path)
    tuned = build_model(ModelConfig(name=f"timm/{name}", pretrained=str(path)), 3, (48, 96), None, 1, said.append)
    expected = timm.layers.resample_abs_pos_embed(trained.pos_embed, [3, 6], num_prefix_tokens=num_before)
    assert torch.equal(tuned.pos_embed, expected)
    assert torch.equal(tuned.pos_embed[:, :num_before], trained.pos_embed[:, :num_before])
    assert said == [f"{path}: the weights under state_dict_ema were taken, not those under state_dict.",
                    f"{path}: pos_embed, of 4 x 4 patches, was resampled (bicubic) for 3 x 6."]  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """A hub that has test_vit's weights of 1000 classes at 160 px."""
    trained = timm.create_model("test_vit")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *where, **how: dict(trained.state_dict()))
    return trained


def test_published_weights_are_timms_with_positions_fitted_and_a_head_for_the_classes(hub):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    said, config = [], ModelConfig(name="timm/test_vit", pretrained="DEFAULT")
    tuned, fresh = build_model(config, 3, (64, 64), None, 0, said.append), build("test_vit", 3, (64, 64))
    assert said == ["model.pretrained: test_vit.r160_in1k's position embeddings, for 160 x 160 px, were resampled for 64 x 64."]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(tuned.blocks[0].mlp.fc1.weight, hub.blocks[0].mlp.fc1.weight)
    assert tuned.pos_embed.shape[1] == 17 and torch.equal(tuned.head.weight, fresh.head.weight)
    assert not torch.equal(tuned.pos_embed, fresh.pos_embed)
    same = build("test_vit", 1000, (160, 160), pretrained="r160_in1k")
    assert all(torch.equal(t, hub.state_dict()[name]) for name, t in same.state_dict().items())


def test_published_weights_that_have_no_head_leave_the_drawn_one(hub, monkeypatch):
    headless = timm.get_pretrained_cfg("test_vit")
    headless.num_classes = 0
    headless_weights = {name: t for name, t in hub.state_dict().items() if not name.startswith("head.")}
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: copy.deepcopy(headless))
    monkeypatch.setattr("timm.models._builder.resolve_pretrained_cfg", lambda *what, **how: copy.deepcopy(headless))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *where, **how: dict(headless_weights))
    tuned, fresh = build("test_vit", 3, (160, 160), pretrained="DEFAULT"), build("test_vit", 3, (160, 160))
    assert torch.equal(tuned.head.weight, fresh.head.weight) and torch.equal(tuned.cls_token, hub.cls_token)
    with pytest.raises(UserError, match="train.epochs is 0, and DEFAULT has no last layer for the 3 classes"):
        build_model(ModelConfig(name="timm/test_vit", pretrained="DEFAULT"), 3, (160, 160), None, 0, is_trained=False)


def test_published_weights_that_cannot_be_had_are_said(monkeypatch):
    def no_network(*where, **how):
        raise OSError("no network\nmore")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(UserError, match=r"timm's weights test_vit.r160_in1k cannot be had: no network\n.*HF_HOME"):
        build("test_vit", pretrained="DEFAULT")


def test_published_weights_bring_the_statistics_they_were_trained_with(tmp_path):
    def found(name, pretrained):
        return published_statistics(ModelConfig(name=f"timm/{name}", pretrained=pretrained))

    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found("test_vit", "DEFAULT") == ([0.5] * 3, [0.5] * 3) and found("resnet18", "tv_in1k") == imagenet
    assert found("resnet18.a1_in1k", "DEFAULT") == imagenet and found("resnet18", "") is None
    file, about = tmp_path / "model.safetensors", tmp_path / "config.json"
    assert found("test_vit", str(file)) is None
    about.write_text(json.dumps({"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}))
    assert found("test_vit", str(file)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    about.write_text("[]")
    assert found("test_vit", str(file)) is None


@pytest.mark.parametrize("name, weights, size, crop, interpolation, told", [
    ("resnet18", "tv_in1k", (224, 224), 0.875, "bilinear", None), ("resnet18", "mine.pth", (224, 224), 0.5, "bilinear", None),
    ("resnet18", "a1_in1k", (224, 224), 0.875, "bicubic", "at 288 x 288 px with data.eval_crop 1 and data.interpolation bicubic; "
     "this run evaluates at 224 x"),
    ("test_vit", "DEFAULT", (160, 160), 0.95, "bilinear", "at 160 x 160 px with data.eval_crop 0.95 and data.interpolation "
     "bicubic; this run evaluates at 160 x 160 px with data.eval_crop 0.95 and bilinear."),
    ("test_vit", "DEFAULT", (160, 160), 0.95, "bicubic", None),
])  # fmt: skip
def test_it_is_said_where_published_weights_were_evaluated_otherwise(name, weights, size, crop, interpolation, told):
    found = evaluated_otherwise(ModelConfig(name=f"timm/{name}", pretrained=weights), size, crop, interpolation)
    assert found == [] if told is None else told in found[0]


@pytest.mark.parametrize("is_scaled", [True, False])
def test_drop_path_is_keyed_by_the_sample(is_scaled):
    net = use_keyed_dropout(nn.Sequential(timm.layers.DropPath(0.25, scale_by_keep=is_scaled)))
    assert isinstance(net[0], KeyedDropout) and (net[0].p, net[0].units) == (0.25, "samples")
    keys, x = torch.arange(64) * 7919, torch.ones(64, 2, 3)
    set_dropout_keys(net, keys)
    whole = net(x)
    assert whole.unique().tolist() == [0.0, pytest.approx(4 / 3) if is_scaled else 1.0]
    assert torch.equal(whole, whole[:, :1, :1].expand_as(whole))
    for part in torch.arange(64).split(10):
        set_dropout_keys(net, keys[part])
        assert torch.equal(net(x[part]), whole[part])
    set_dropout_keys(net, keys)
    assert torch.equal(net.eval()(x), x)


def test_batchnorm_with_an_activation_is_synchronised_with_it():
    plain = nn.Sequential(timm.layers.BatchNormAct2d(4, act_layer="prelu", drop_layer=nn.Identity), nn.BatchNorm2d(4))
    nn.init.uniform_(plain[0].weight)
    ours = use_sync_batchnorm(copy.deepcopy(plain))
    assert type(ours[0]) is GlobalBatchNormAct and type(ours[1]) is GlobalBatchNorm
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(6, 4, 5, 5)
    for _ in range(2):
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in ours.state_dict().items())
    assert not [m for m in use_sync_batchnorm(build("test_efficientnet")).modules() if type(m).__name__ == "BatchNormAct2d"]


def test_a_batchnorm_that_splits_its_batch_is_refused_on_several_ranks():
    with pytest.raises(UserError, match="the network's SplitBatchNorm2d"):
        use_sync_batchnorm(nn.Sequential(timm.layers.SplitBatchNorm2d(4)))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "resnetv2_50"])
def test_layers_are_counted_down_as_timm_counts_them(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    theirs = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert layer_depths(model, head_name(model, 3)) == {name: max(theirs.values()) - k for name, k in theirs.items()}


def test_every_block_of_a_stage_is_a_layer():
    with torch.device("meta"):
        model = timm.create_model("convnext_atto", num_classes=3)  # blocks in each stage: 2, 2, 6, 2; and 3 reductions
    depths = layer_depths(model, head_name(model, 3))
    assert set(depths.values()) == set(range(1 + 12 + 3 + 1))
    assert [depths[f"stages.2.blocks.{k}.mlp.fc1.weight"] for k in range(6)] == [9, 8, 7, 6, 5, 4]
    assert {name for name, depth in depths.items() if not depth} == {n for n in depths if n.startswith("head.")}


def test_the_head_alone_learns_while_the_rest_is_frozen():
    net = build("test_efficientnet", 5).train()
    freeze_below_head(net, head_name(net, 5), is_frozen=True)
    net(torch.randn(4, 3, 32, 32)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["classifier.weight", "classifier.bias"]
    assert net.bn1.num_batches_tracked == 0


@pytest.mark.two_process
def test_two_processes_give_the_curve_of_one(digits, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--model.name", "timm/test_efficientnet", "--model.width", "1", "--data.image_size", "32", "--train.max_steps", "4",
            "--optim.layer_decay", "0.9"]  # fmt: skip
    run_to_end(2, tiny_run(digits, two, *more), tmp_path)
    assert run_training(tiny_run(digits, one, *more)) == 0
    assert len(losses(one)) == 4 and losses(one) == pytest.approx(losses(two), abs=1e-3)


@pytest.mark.parametrize("name, kind", [("test_vit", "onnx"), ("test_efficientnet", "torch-export")])
def test_a_run_is_exported_as_it_classifies(digits, tmp_path, name, kind):
    more = ["--model.name", f"timm/{name}", "--model.width", "1", "--data.image_size", "32", "--train.epochs", "0.2"]
    assert run_training(tiny_run(digits, tmp_path / "run", *more)) == 0
    check = export(tmp_path / "run", kind, tmp_path / "out")["check"]
    assert check["top1_file"] == check["top1_run"]


@pytest.mark.two_process
def test_tables_that_are_no_weights_stay_out_of_averages_and_files(digits, tmp_path):
    more = ["--model.name", "timm/test_maxvit", "--model.width", "1", "--data.image_size", "32", "--train.epochs", "0.14",
            "--train.parallel", "fsdp"]  # fmt: skip
    run_to_end(2, tiny_run(digits, tmp_path / "run", *more), tmp_path)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"]["samples"] > 0
