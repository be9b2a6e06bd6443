"""Pictures that grow over the run: which size when, exact resume, and what is refused."""

from pathlib import Path

import pytest
import torch
from conftest import losses, run_to_end, same_tensors, tiny_run, train_tiny

from dist_train.config import AugmentConfig, ModelConfig
from dist_train.errors import UserError
from dist_train.models import build_model
from dist_train.progressive import Progressive
from dist_train.train import run_training

GROWING = ("--augment.start_size", "9", "--augment.full_size_from", "0.6")


@pytest.mark.parametrize(
    "full, start, sizes",
    [
        ((32, 32), 20, [(20, 20), (24, 24), (28, 28), (32, 32)]),
        ((224, 224), 128, [(140, 140), (168, 168), (196, 196), (224, 224)]),
        ((64, 96), 48, [(48, 72), (56, 84), (64, 96)]),
        ((100, 100), 50, [(50, 50), (62, 62), (75, 75), (88, 88), (100, 100)]),
        ((3, 3), 1, [(1, 1), (2, 2), (3, 3)]),
        ((32, 32), 0, [(32, 32)]),
        ((32, 32), 32, [(32, 32)]),
        ((8, 8), 7, [(7, 7), (8, 8)]),
    ],
)
def test_sizes_grow_by_eighths_and_none_is_below_the_start(full, start, sizes):
    assert Progressive(AugmentConfig(start_size=start), full, 100).sizes == sizes


def test_each_size_lasts_as_long_and_the_last_share_of_the_run_is_at_full_size():
    grow = Progressive(AugmentConfig(start_size=20, full_size_from=0.6), (32, 32), 100)
    assert [grow.size_at(step)[0] for step in (0, 19, 20, 39, 40, 59, 60, 99)] == [20, 20, 24, 24, 28, 28, 32, 32]
    at_once = Progressive(AugmentConfig(start_size=20, full_size_from=0), (32, 32), 100)
    assert at_once.size_at(0) == (32, 32)


def test_a_batch_is_brought_to_the_size_of_its_step():
    grow = Progressive(AugmentConfig(start_size=24, full_size_from=0.5), (32, 32), 10)
    inputs = torch.ones(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    small = grow(inputs, 0)
    assert small.shape == (2, 3, 24, 24) and small.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small, torch.ones_like(small))
    assert grow(inputs, 5) is inputs


def test_bicubic_steps_stay_in_the_range_of_each_picture():
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).sign() * torch.arange(1, 5).view(4, 1, 1, 1)
    small = Progressive(AugmentConfig(start_size=24), (32, 32), 10, "bicubic")(inputs, 0)
    expected = torch.nn.functional.interpolate(inputs, (24, 24), mode="bicubic", antialias=True)
    assert (expected.amax((1, 2, 3)) > torch.arange(1, 5) * 1.05).all()
    for k in range(4):
        torch.testing.assert_close(small[k], expected[k].clamp(-k - 1, k + 1))


@pytest.mark.parametrize("name", ["alexnet_bn", "vgg13_bn", "vgg16", "resnet18"])
def test_networks_for_small_pictures_take_every_size_from_half(name):
    network = build_model(ModelConfig(name=name), 10, (32, 32), None, seed=0)
    flops = Progressive(AugmentConfig(start_size=16), (32, 32), 100).flops(network)
    values = [flops[size] for size in sorted(flops)]
    assert len(values) == 5 and values == sorted(values) and values[0] < 0.4 * values[-1]


def test_pictures_of_an_odd_side_refuse_what_the_pools_do_not_pass():
    network = build_model(ModelConfig(name="vgg11", width=0.125), 10, (28, 28), None, seed=0)
    with pytest.raises(UserError, match="augment.start_size: the network does not take 14 x 14 px"):
        Progressive(AugmentConfig(start_size=4), (28, 28), 100).flops(network)


@pytest.fixture(scope="module")
def grown(digits, tmp_path_factory) -> Path:
    return train_tiny(digits, tmp_path_factory.mktemp("runs") / "grown", *GROWING)


def test_stopping_while_pictures_grow_changes_no_bit(grown, digits, tmp_path):
    run = tmp_path / "stopped"
    for until in ("5", "13", "0"):
        assert run_training(tiny_run(digits, run, *GROWING, "--train.max_steps", until, "--resume")) == 0
    assert same_tensors(grown, run)


def test_the_network_sees_small_pictures_first(digits, tmp_path, monkeypatch):
    seen = []
    forward = torch.nn.Sequential.forward

    def noting(self, inputs):
        if self.training and inputs.dim() == 4 and inputs.shape[1] == 3:
            seen.append(inputs.shape[2])
        return forward(self, inputs)

    monkeypatch.setattr(torch.nn.Sequential, "forward", noting)
    run_training(tiny_run(digits, tmp_path / "run", *GROWING))
    assert sorted(set(seen)) == [10, 12, 14, 16] and seen == sorted(seen)
    assert seen.count(16) == pytest.approx(0.4 * len(seen), abs=1)


@pytest.mark.two_process
def test_two_ranks_in_micro_batches_give_the_curve_of_one(digits, tmp_path):
    more = [*GROWING, "--model.name", "alexnet", "--model.width", "0.25", "--optim.lr", "0.01"]  # BatchNorm sees micro-batches
    one, two = tmp_path / "one", tmp_path / "two"
    argv = tiny_run(digits, two, *more, "--train.micro_batch_size", "24")
    run_to_end(2, argv, tmp_path, is_cold=True)  # as a launcher does: other tests fork theirs
    assert (tmp_path / "rank1.log").read_text() == ""  # nor does importing say anything
    assert run_training(tiny_run(digits, one, *more)) == 0
    first, second = losses(one), losses(two)
    assert len(first) == 30 and max(first) - min(first) > 0.1
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-3


@pytest.mark.parametrize("side", range(8, 65))
def test_at_full_size_the_networks_are_what_they_were(side):
    network = build_model(ModelConfig(name="vgg11", width=0.125), 10, (side, side), None, seed=0).eval()
    inputs = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = network(inputs)
        for module in network.modules():
            if isinstance(module, torch.nn.MaxPool2d):
                module.ceil_mode = False
        assert torch.equal(network(inputs), found)


def test_a_size_that_the_network_does_not_take_is_named(digits, tmp_path):
    wanted = ("--model.name", "vit_b_16", "--data.image_size", "32", "--augment.start_size", "16", "--model.width", "1")
    with pytest.raises(UserError, match="augment.start_size: the network does not take 28 x 28 px"):
        run_training(tiny_run(digits, tmp_path / "run", *wanted))


@pytest.mark.parametrize("start, words", [("17", "augment.start_size is 17; expected 16 pixels"), ("-1", "0 or more")])
def test_a_start_that_makes_no_sense_is_named(digits, tmp_path, start, words):
    with pytest.raises(UserError, match=words):
        run_training(tiny_run(digits, tmp_path / "run", "--augment.start_size", start))
