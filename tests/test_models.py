"""Networks against torchvision's on the same weights; heads, stems, sizes, weights from files."""

import argparse
import json
import pathlib
import re
import sys
import urllib.error
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train import models, networks
from dist_train.config import ModelConfig, RunConfig
from dist_train.errors import UserError
from dist_train.layers import KeyedDropout, use_keyed_dropout
from dist_train.models import build_model, head_name, rates_taken, uses_small_stem
from dist_train.pretrained import (
    evaluated_otherwise,
    normalised_otherwise,
    present_name,
    published_statistics,
    put_weights,
)
from dist_train.sizes import check_new

pytestmark = pytest.mark.usefixtures("one_thread")


def build(name, num_classes=10, size=(32, 32), num_features=None, seed=0, **settings):
    return build_model(ModelConfig(name=name, **settings), num_classes, size, num_features, seed)


def shapes(model):
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg13", "vgg13_bn", "vgg16", "vgg19", "vgg19_bn"])
def test_names_and_shapes_are_torchvisions(name, monkeypatch):
    import torchvision

    monkeypatch.setattr(models, "_take_memory", lambda model: None)  # half a gigabyte each
    monkeypatch.setattr(networks, "initialize", lambda *how: None)
    monkeypatch.setattr(models, "_check_filled", lambda model: None)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
    assert shapes(build(name, 1000, (224, 224))) == shapes(theirs)


def test_a_network_of_which_something_is_left_unfilled_is_refused_by_name(monkeypatch):
    mlp = networks.mlp
    monkeypatch.setattr(networks, "mlp", lambda *how: torch.nn.Sequential(torch.nn.GroupNorm(1, 4), mlp(*how)))
    with pytest.raises(AssertionError, match="leaves 0.weight, 0.bias unfilled"):
        build("mlp", 2, None, 4, hidden=(8,))


@pytest.mark.parametrize("name, sizes", [("alexnet", (64, 224)), ("vgg11_bn", (64, 224))])
def test_outputs_are_torchvisions_on_the_same_weights(name, sizes):
    import torchvision

    ours = build(name, 7, (64, 64), stem="imagenet").eval()
    with torch.device("meta"):  # without torchvision's own draw, which takes seconds
        theirs = torchvision.models.get_model(name, weights=None, num_classes=7)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    for size in sizes:
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.equal(ours(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["alexnet", "alexnet_bn", "vgg11", "vgg13_bn"])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 32), (40, 56)])
def test_small_pictures_pass_and_every_weight_learns(name, size):
    model = build(name, 5, size, width=0.125, dropout=0.0)
    logits = model(torch.randn(4, 3, *size))
    assert logits.shape == (4, 5)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("name", ["alexnet", "alexnet_bn", "vgg13_bn"])
def test_dirac_lets_every_convolution_but_the_first_pass_its_inputs_on(name):
    drawn, passing = (build(name, width=0.25, init=init) for init in ("he", "dirac"))
    assert torch.equal(drawn.features[0].weight, passing.features[0].weight)
    for conv, before in zip(passing.features, drawn.features, strict=True):
        if isinstance(conv, nn.Conv2d) and conv is not passing.features[0]:
            num_passed = min(conv.in_channels, conv.out_channels)
            x = torch.randn(1, conv.in_channels, 9, 9)
            torch.testing.assert_close(conv(x)[:, :num_passed], x[:, :num_passed])
            assert torch.equal(conv.weight[num_passed:], before.weight[num_passed:])
    with pytest.raises(UserError, match="model.init is dirac, which is for alexnet and vgg, not resnet18"):
        build("resnet18", init="dirac")


@pytest.mark.parametrize("name, size, grid", [
    ("alexnet", 32, 4), ("alexnet", 64, 4), ("alexnet_bn", 64, 4), ("alexnet_bn", 96, 6), ("alexnet_bn", 227, 6),
    ("vgg13", 32, 1), ("vgg13", 64, 2), ("vgg13", 16, 1), ("vgg13", 8, 1), ("vgg13", 300, 7),
])  # fmt: skip
def test_heads_are_sized_to_what_is_left(name, size, grid):
    stem = "small" if name != "alexnet_bn" else "auto"
    model = build(name, size=(size, size), width=0.125, stem=stem).eval()
    with torch.no_grad():
        features = model.features(torch.randn(1, 3, size, size))
        assert model.avgpool(features).shape[2:] == (grid, grid)
    if name != "vgg13" or size < 224:  # nothing is pooled that the head could see
        assert features.shape[2:] == (grid, grid)


def test_a_32_px_picture_keeps_its_resolution_through_the_first_layer():
    for name in ("alexnet", "alexnet_bn", "vgg13"):
        assert build(name, width=0.125).features[0](torch.randn(1, 3, 32, 32)).shape[2:] == (32, 32)
    assert build("resnet18").conv1(torch.randn(1, 3, 32, 32)).shape[2:] == (32, 32)


def test_stem_follows_the_size_unless_it_is_set():
    assert uses_small_stem(ModelConfig(name="alexnet"), (32, 63)) and uses_small_stem(ModelConfig(name="vgg13"), (63, 90))
    assert not uses_small_stem(ModelConfig(name="alexnet"), (64, 64))
    assert not uses_small_stem(ModelConfig(name="alexnet", stem="imagenet"), (32, 32))
    assert uses_small_stem(ModelConfig(name="vgg13", stem="small"), (224, 224))
    assert not uses_small_stem(ModelConfig(name="vgg13"), None)


def test_alexnet_bn_has_the_notebooks_channels():
    model = build("alexnet_bn", 3, (227, 227))
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [96, 256, 384, 384, 256]
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [4096, 4096, 3]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 5
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 3


def test_width_scales_channels_and_hidden_units():
    model = build("vgg13_bn", width=0.5)
    assert (model.features[0].out_channels, model.classifier[0].out_features) == (32, 256)
    assert build("alexnet", width=0.01).features[0].out_channels == 8


def test_weights_follow_the_seed_and_the_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (build("vgg11", width=0.25, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
    assert not torch.equal(a.features[0].weight, c.features[0].weight)


@pytest.mark.parametrize("name, size", [("vgg19", 32), ("vgg13", 64), ("alexnet", 64), ("alexnet_bn", 32)])
def test_signal_keeps_its_scale_through_the_depth_and_the_first_loss_is_ln_classes(name, size):
    model = build(name, 10, (size, size), stem="small").eval()
    x = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = nn.Sequential(model.features, model.avgpool, nn.Flatten(), *model.classifier[:-1])(x)
        loss = F.cross_entropy(model(x), torch.arange(8))
    assert 0.2 < hidden.square().mean().sqrt() < 5
    assert abs(loss - torch.tensor(10.0).log()) < 0.3


@pytest.mark.parametrize("name", ["vgg13", "alexnet"])
def test_plain_nets_without_batchnorm_learn(name):
    """With torch's default weights neither leaves ln 4 in these 50 steps."""
    model = build(name, 4, (8, 8), width=0.125, dropout=0.0)
    rng = torch.Generator().manual_seed(0)
    templates = torch.randn(4, 3, 8, 8, generator=rng)
    optimizer = torch.optim.SGD(model.parameters(), 0.003, momentum=0.9)
    for _ in range(50):
        labels = torch.randint(0, 4, (32,), generator=rng)
        images = templates[labels] + 0.5 * torch.randn(32, 3, 8, 8, generator=rng)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh"])
def test_mlp_is_built_as_set(activation):
    model = build("mlp", 2, None, 7, hidden=(16, 8), activation=activation, batchnorm=True, dropout=0.1)
    kinds = [type(m).__name__.lower() for m in model.hidden]
    assert kinds == ["linear", "batchnorm1d", activation.replace("_", ""), "dropout"] * 2
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [16, 8, 2]
    assert model(torch.randn(4, 7)).shape == (4, 2)


def test_mlp_without_hidden_layers_is_a_linear_model():
    assert shapes(build("mlp", 3, None, 7, hidden=())) == {"head.weight": (3, 7), "head.bias": (3,)}


@pytest.mark.parametrize("name, size, head", [
    ("resnet18", 32, "fc"), ("mobilenet_v3_small", 64, "classifier.3"), ("squeezenet1_1", 64, "classifier.1"),
    ("vit_b_32", 64, "heads.head"), ("densenet121", 64, "classifier"), ("googlenet", 64, "fc"),
])  # fmt: skip
def test_torchvisions_nets_get_a_head_for_the_classes(name, size, head):
    model = build(name, 3, (size, size)).eval()
    assert head_name(model, 3) == head
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 3)


@pytest.mark.parametrize("name, size, settings, message", [
    ("vgg31", 32, {}, "Did you mean vgg"),
    ("resnet_18", 32, {}, "Did you mean resnet18"),
    ("alexnet", 6, {}, "needs 8 px"),
    ("alexnet", 48, {"stem": "imagenet"}, "needs 63 px.*\n.*model.stem: small"),
    ("vgg13", 24, {"stem": "imagenet"}, "needs 32 px"),
    ("densenet121", 16, {}, "does not take pictures of 16 x 16 px"),
    ("vit_b_32", 50, {}, "does not take pictures of 50 x 50 px"),
    ("densenet121", 32, {"stem": "small"}, "not defined for densenet121"),
    ("qwertyuiop", 32, {}, "There are alexnet(.|\n)*timm's are called timm/NAME"),
])  # fmt: skip
def test_what_cannot_be_built_is_said(name, size, settings, message):
    with pytest.raises(UserError, match=message):
        build(name, 10, (size, size), **settings)


def test_a_network_of_timm_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm/resnet18, and timm cannot be imported.*\n.*pip install 'dist_train\[timm\]'"):
        build("timm/resnet18")


def keyed_rates(name, **settings):
    """(rates of dropout, of stochastic depth), in order, of a torchvision network without weights."""
    with torch.device("meta"):
        keyed = use_keyed_dropout(build(name, 3, (224, 224), **settings)).modules()
    found = [(m.units, m.p) for m in keyed if isinstance(m, KeyedDropout)]
    return [p for units, p in found if units != "samples"], [p for units, p in found if units == "samples"]


@pytest.mark.parametrize("name", [
    "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "vit_b_32",
])  # fmt: skip
def test_torchvisions_dropout_has_the_rate_that_is_set_and_its_own_where_none_is(name):
    assert set(keyed_rates(name, dropout=0.125)[0]) == {0.125} != set(keyed_rates(name)[0])
    assert set(keyed_rates(name, dropout=0.0)[0]) == {0.0}


def test_a_run_begun_with_rates_that_its_network_has_not_goes_on():
    assert keyed_rates("resnet18", dropout=0.1, drop_path=0.1) == ([], [])


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "swin_t", "swin_v2_t"])
def test_torchvisions_stochastic_depth_rises_to_the_rate_that_is_set(name):
    own, found = keyed_rates(name)[1], keyed_rates(name, drop_path=0.0625)[1]
    assert own[0] == found[0] == 0 and found == pytest.approx([p * found[-1] / own[-1] for p in own]) != own
    assert found[-1] == pytest.approx(0.0625 * (len(own) - 1) / len(own) if "efficientnet" in name else 0.0625)
    assert not any(keyed_rates(name, drop_path=0.0)[1])


@pytest.mark.parametrize("name, settings, message", [
    ("resnet18", {"dropout": 0.1}, "model.dropout 0.1: resnet18 has no layers of its own for that"),
    ("swin_t", {"dropout": 0.1, "drop_path": 0.1}, "model.dropout 0.1: swin_t"),
    ("densenet121", {"dropout": 0.1, "drop_path": 0.0}, "model.dropout 0.1, model.drop_path 0.0: densenet121"),
    ("vgg13", {"drop_path": 0.1}, "model.drop_path 0.1: vgg13"), ("mlp", {"drop_path": 0.1}, "model.drop_path 0.1: mlp"),
    ("resnet18", {"dropout": 0.1, "width": 2.0}, "(?s)model.width 2.0: .*model.dropout 0.1: resnet18"),
])  # fmt: skip
def test_rates_of_layers_that_a_network_has_not_are_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        check_new(RunConfig(model=ModelConfig(name=name, **settings)))


@pytest.mark.parametrize("name, taken", [
    ("vgg13", {"dropout"}), ("convnext_tiny", {"drop_path"}), ("efficientnet_b0", {"dropout", "drop_path"}), ("resnet18", set()),
])  # fmt: skip
def test_rates_that_a_network_has_are_let_pass(name, taken):
    assert rates_taken(ModelConfig(name=name)) == taken
    check_new(RunConfig(model=ModelConfig(name=name, **dict.fromkeys(taken, 0.1))))


def test_a_small_stem_needs_a_size():
    with pytest.raises(UserError, match="set data.image_size"):
        build("vgg13", 10, None, stem="small")


def save(model, path):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    else:
        torch.save({"state_dict": {f"module.{name}": t for name, t in model.state_dict().items()}}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_from_a_file_and_another_class_count_keeps_the_fresh_head(tmp_path, suffix):
    trained = build("vgg11_bn", 10, width=0.25, seed=1)
    path = save(trained, tmp_path / f"weights{suffix}")
    same = build("vgg11_bn", 10, width=0.25, pretrained=path)
    assert all(torch.equal(t, same.state_dict()[name]) for name, t in trained.state_dict().items())
    other, fresh = build("vgg11_bn", 3, width=0.25, pretrained=path), build("vgg11_bn", 3, width=0.25)
    assert torch.equal(other.features[0].weight, trained.features[0].weight)
    assert torch.equal(other.classifier[-1].weight, fresh.classifier[-1].weight)


@pytest.mark.parametrize("average, latest", [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("model_ema", "state_dict")])
def test_of_a_references_checkpoint_the_average_of_the_weights_is_taken(tmp_path, average, latest):
    trained, averaged = (build("vgg11_bn", width=0.25, seed=seed).state_dict() for seed in (1, 2))
    path, said = tmp_path / "checkpoint.pth.tar", []
    about = {"args": argparse.Namespace(lr=0.1, model="vgg11_bn"), "epoch": 3, "optimizer": {"state": {}}}
    torch.save({latest: {f"module._orig_mod.{name}": t for name, t in trained.items()}} | about, path)
    config = ModelConfig(name="vgg11_bn", width=0.25, pretrained=str(path))
    model = build_model(config, 10, (32, 32), None, 0, said.append)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in trained.items())
    assert said == [f"{path}: the weights under {latest} were taken."]
    ema = {"n_averaged": torch.tensor(7)} | {f"module.{name}": t for name, t in averaged.items()}
    torch.save({latest: trained, average: ema} | about, path)
    model = build_model(config, 10, (32, 32), None, 0, said.append)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in averaged.items())
    assert said[1:] == [f"{path}: the weights under {average} were taken, not those under {latest}."]
    torch.save({latest: trained, average: None} | about, path)
    assert torch.equal(build_model(config, 10, (32, 32), None, 0).features[0].weight, trained["features.0.weight"])


@pytest.mark.parametrize("old, new", [(64, 96), (96, 64)])
def test_a_vits_positions_are_resampled_for_another_size_with_the_class_token_kept(tmp_path, old, new):
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    from dist_train.pretrained import load_pretrained

    def vit(size):
        return VisionTransformer(size, 32, 1, 2, 16, 32, num_classes=3)

    trained, model, said = vit(old), vit(new), []
    nn.init.normal_(trained.encoder.pos_embedding)
    path = tmp_path / "vit.pth"
    torch.save(trained.state_dict(), path)
    load_pretrained(model, ModelConfig(name="vit_b_32", pretrained=str(path)), "heads.head", (new, new), said.append)
    expected = interpolate_embeddings(new, 32, trained.state_dict())["encoder.pos_embedding"]
    assert torch.equal(model.encoder.pos_embedding, expected)
    assert torch.equal(model.encoder.pos_embedding[:, 0], trained.encoder.pos_embedding[:, 0])
    grid = {64: "2 x 2", 96: "3 x 3"}
    assert said == [f"{path}: encoder.pos_embedding, of {grid[old]} patches, was resampled (bicubic) for {grid[new]}."]
    state = trained.state_dict()
    torch.save(state | {"encoder.pos_embedding": torch.zeros(1, 7, 16)}, path)  # 2 x 3 patches: which way is unknown
    with pytest.raises(UserError, match=r"pos_embedding is \(1, 7, 16\)(.|\n)*, and data.image_size\."):
        load_pretrained(model, ModelConfig(name="vit_b_32", pretrained=str(path)), "heads.head", (new, new))


def test_weights_of_another_net_are_refused_by_name(tmp_path):
    path = save(build("vgg11", width=0.25), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights.pth.*not the weights of this vgg11.*\n.*features.0.weight is \(16, 3"):
        build("vgg11", width=0.5, pretrained=path)
    with pytest.raises(UserError, match="is missing"):
        build("vgg13", width=0.25, pretrained=path)


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        build("vgg11", pretrained=str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="text.pth: cannot be read as weights"):
        build("vgg11", pretrained=str(tmp_path / "text.pth"))
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"code.pth: cannot be read as weights: it holds a torch\.nn\.modules\.linear\.Linear, "):
        build("vgg11", pretrained=str(tmp_path / "code.pth"))
    torch.save({"model": {}, "args": argparse.Namespace(path=pathlib.PurePosixPath("/"))}, tmp_path / "path.pth")
    with pytest.raises(UserError, match=r"it holds a pathlib.PurePosixPath, and"):
        build("vgg11", pretrained=str(tmp_path / "path.pth"))
    (tmp_path / "empty.pth").touch()
    with pytest.raises(UserError, match="empty.pth: cannot be read as weights: EOFError"):
        build("vgg11", pretrained=str(tmp_path / "empty.pth"))
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="found epoch, optimizer"):
        build("vgg11", pretrained=str(tmp_path / "other.pth"))


def test_published_weights_that_cannot_be_had_are_said_with_the_place_to_put_them(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=rf"Bring the file to {tmp_path}/checkpoints/resnet18-[0-9a-f]+\.pth"):
        build("resnet18", size=(224, 224), pretrained="DEFAULT")
    with pytest.raises(UserError, match="there are IMAGENET1K_V1, DEFAULT"):
        build("resnet18", size=(224, 224), pretrained="IMAGENET21K")
    with pytest.raises(UserError, match="nobody has published weights of alexnet_bn"):
        build("alexnet_bn", size=(224, 224), width=0.1, pretrained="DEFAULT")


def test_published_weights_load_from_the_cache(tmp_path, monkeypatch):
    import hashlib

    import torchvision

    trained = build("resnet18", 1000, (224, 224), seed=1)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "weights.pth").rename(tmp_path / "checkpoints" / f"resnet18-{digest}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    url = f"https://example.invalid/resnet18-{digest}.pth"
    monkeypatch.setattr(weights, "_value_", replace(weights.value, url=url))
    model = build("resnet18", 3, (224, 224), pretrained="IMAGENET1K_V1")
    assert torch.equal(model.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)
    assert model.fc.out_features == 3


@pytest.mark.parametrize("name, now, then", [
    ("densenet121", r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2"),
    ("vit_b_16", r"\.mlp\.([03])\.", lambda found: f".mlp.linear_{'1' if found[1] == '0' else '2'}."),
])  # fmt: skip
def test_names_of_long_ago_are_known(name, now, then):
    import torchvision

    with torch.device("meta"):
        names = list(torchvision.models.get_model(name, weights=None).state_dict())
    published = [re.sub(now, then, name) for name in names]
    assert published != names and [present_name(name) for name in published] == names


def test_named_weights_bring_the_statistics_they_were_trained_with():
    def found(name, pretrained):
        return published_statistics(ModelConfig(name=name, pretrained=pretrained))

    assert found("resnet18", "DEFAULT") == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found("googlenet", "IMAGENET1K_V1") == ([0.5] * 3, [0.5] * 3)
    assert found("resnet18", "") is None and found("resnet18", "runs/other/weights.safetensors") is None


@pytest.mark.parametrize("name, weights, size, crop, interpolation, told", [
    ("resnet18", "IMAGENET1K_V1", (224, 224), 0.875, "bilinear", None),
    ("resnet18", "resnet18-f37072fd.pth", (224, 224), 0.875, "bilinear", None),
    ("resnet18", "IMAGENET1K_V1", (192, 192), 0.875, "bilinear", "at 224 x 224 px with data.eval_crop 0.875 and "
     "data.interpolation bilinear; this run evaluates at 192 x 192 px with data.eval_crop 0.875 and bilinear."),
    ("resnet18", "IMAGENET1K_V1", (224, 224), 0.875, "bicubic", "data.interpolation bilinear; this run"),
    ("swin_t", "DEFAULT", (224, 224), 0.966, "bilinear", "at 224 x 224 px with data.eval_crop 0.966 and "
     "data.interpolation bicubic; this run evaluates at 224 x 224 px with data.eval_crop 0.966 and bilinear."),
    ("swin_t", "DEFAULT", (224, 224), 0.966, "bicubic", None),
    ("resnet18", "DEFAULT", None, 0.0, "bicubic", "this run evaluates at the stored size with the whole picture and bicubic."),
    ("resnet18", "others.pth", (192, 192), 0.5, "bicubic", None), ("resnet18", "", (192, 192), 0.5, "bicubic", None),
])  # fmt: skip
def test_it_is_said_where_published_weights_were_evaluated_otherwise(name, weights, size, crop, interpolation, told):
    found = evaluated_otherwise(ModelConfig(name=name, pretrained=weights), size, crop, interpolation)
    assert found == [] if told is None else told in found[0] and len(found) == 1


def test_it_is_said_where_another_run_resized_its_pictures_otherwise(tmp_path):
    def told(here, **about):
        (tmp_path / "inference.json").write_text(json.dumps({"features": None, "mean": [0.5], "std": [0.5], **about}))
        weights = ModelConfig(name="resnet18", pretrained=str(tmp_path / "weights.safetensors"))
        return evaluated_otherwise(weights, (32, 32), 0.0, here)

    assert told("bicubic", interpolation="bicubic") == told("bilinear") == []  # runs from before had no choice
    assert "with data.interpolation bicubic; this run: bilinear." in told("bilinear", interpolation="bicubic")[0]


def test_it_is_said_where_a_file_brings_no_statistics():
    def told(weights):
        return normalised_otherwise(ModelConfig(name="resnet18", pretrained=weights), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])

    assert "brings no mean and std of pixels: this run normalises by 0.100, 0.200, 0.300 / 0.400, 0.500" in told("mine.pth")[0]
    assert told("") == told("DEFAULT") == told("resnet18-f37072fd.pth") == []


def test_tensors_alone_fill_a_network_that_asks_for_its_version():
    trained, fresh = build("mnasnet0_5", seed=1), build("mnasnet0_5", seed=2)
    weights = {name: t.clone() for name, t in trained.state_dict().items()}
    with pytest.raises(ValueError, match="version"):
        fresh.load_state_dict(weights)
    put_weights(fresh, weights)
    assert all(torch.equal(t, weights[name]) for name, t in fresh.state_dict().items())


@pytest.mark.parametrize("grid", [(6, 6), (1, 1), (2, 2), (3, 5), (4, 1), (7, 13), (12, 12), (24, 24)])
@pytest.mark.parametrize("wanted", [(6, 6), (7, 7), (1, 1), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_to_a_grid_is_torchs(grid, wanted, dtype):
    torch.manual_seed(0)
    features = torch.randn(3, 5, *grid).to(dtype).contiguous(memory_format=torch.channels_last)
    ours, theirs = features.clone().requires_grad_(), features.float().requires_grad_()
    found, expected = networks.GridPool(wanted)(ours), nn.AdaptiveAvgPool2d(wanted)(theirs)
    change = torch.randn(found.shape).to(dtype)
    found.backward(change), expected.backward(change.float())
    if grid in (wanted, (1, 1)):
        assert torch.equal(found, expected.to(dtype))
    torch.testing.assert_close(found, expected.to(dtype))
    rounding = {"rtol": 2e-2, "atol": 4e-3} if dtype == torch.bfloat16 else {}  # torch's own adds up in bf16 where it is left to
    torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), **rounding)
