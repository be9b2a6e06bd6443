"""Networks against torchvision's on the same weights; heads, stems, sizes, weights from files."""

import re
import sys
import urllib.error
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train import models, networks
from dist_train.config import ModelConfig
from dist_train.errors import UserError
from dist_train.models import build_model, head_name, uses_small_stem
from dist_train.pretrained import present_name, published_statistics, put_weights

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
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
    assert shapes(build(name, 1000, (224, 224))) == shapes(theirs)


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
    assert uses_small_stem(ModelConfig(name="alexnet"), (32, 63)) and uses_small_stem(
        ModelConfig(name="vgg13"), (63, 90)
    )
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
    ("mlp", 32, {}, "mlp is for tables"),
    ("qwertyuiop", 32, {}, "There are alexnet(.|\n)*timm's are called timm/NAME"),
])  # fmt: skip
def test_what_cannot_be_built_is_said(name, size, settings, message):
    with pytest.raises(UserError, match=message):
        build(name, 10, (size, size), **settings)


def test_a_network_of_timm_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm/resnet18, and timm cannot be imported.*\n.*pip install 'dist_train\[timm\]'"):
        build("timm/resnet18")


def test_a_table_needs_the_mlp_and_a_small_stem_needs_a_size():
    with pytest.raises(UserError, match="the set holds a table"):
        build("vgg13", 10, None, 7)
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


def test_weights_of_another_net_are_refused_by_name(tmp_path):
    path = save(build("vgg11", width=0.25), tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"weights.pth.*not the weights of this vgg11.*\n.*features.0.weight is \(16, 3"
    ):
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
    with pytest.raises(UserError, match="code.pth: cannot be read as weights"):
        build("vgg11", pretrained=str(tmp_path / "code.pth"))
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
