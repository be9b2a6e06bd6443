"""Figures against scikit-learn and against their definitions."""

import copy
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import nn

from dist_train import metrics
from dist_train.config import ModelConfig
from dist_train.metrics import Sums, Throughput, flops_per_sample, goodness, peak_flops
from dist_train.models import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


def made_up(num_samples=500, num_classes=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_samples,), generator=rng)
    logits = torch.randn(num_samples, num_classes, generator=rng)
    logits[torch.arange(num_samples), labels] += 1
    return logits, labels


def test_sums_agree_with_scikit_learn():
    logits, labels = made_up()
    sums = Sums(7, confusion=True)
    for part in range(0, 500, 64):
        sums.update(logits[part : part + 64], labels[part : part + 64])
    result = sums.result()
    assert result.samples == 500
    assert result.top1 == sklearn.metrics.accuracy_score(labels, logits.argmax(1))
    assert result.top5 == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, logits, k=5))
    assert result.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=2e-6)
    assert np.array_equal(result.confusion, sklearn.metrics.confusion_matrix(labels, logits.argmax(1)))


@pytest.mark.parametrize("num_classes, absent", [(2, ()), (7, ()), (7, (0, 4))])
@pytest.mark.parametrize("confusion", [False, True])
def test_balanced_accuracy_is_scikit_learns(num_classes, absent, confusion):
    logits, labels = made_up(num_classes=num_classes)
    rare = (labels == num_classes - 1) & (torch.arange(500) % 10 > 0)
    kept = ~rare & ~torch.isin(labels, torch.tensor(absent, dtype=torch.int64))
    logits, labels = logits[kept], labels[kept]
    sums = Sums(num_classes, confusion=confusion)
    for part in torch.arange(len(labels)).split(64):
        sums.update(logits[part], labels[part])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes that are predicted and never true
        expected = sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1))
    result = sums.result()
    assert result.balanced == result.figures()["balanced"] == pytest.approx(expected, rel=1e-12)
    assert abs(result.balanced - result.top1) > 1e-3, "a figure of its own"


def test_goodness_goes_by_the_figure_that_is_monitored():
    common, rare = (0.95, 0.2, 0.5), (0.9, 0.3, 0.8)  # accuracy, loss, balanced accuracy
    assert [goodness(top1, loss, "top1", balanced) for top1, loss, balanced in (common, rare)] == [[0.95, -0.2], [0.9, -0.3]]
    assert [goodness(top1, loss, "balanced", balanced) for top1, loss, balanced in (common, rare)] == [[0.5, -0.2], [0.8, -0.3]]
    assert goodness(0.9, 0.2, "balanced", 0.5) > goodness(0.9, 0.2, "balanced", math.nan) == goodness(0.9, 0.2, "balanced")


def test_sums_do_not_depend_on_how_samples_are_parted():
    logits, labels = made_up(1000)
    whole, parts = Sums(7, confusion=True), Sums(7, confusion=True)
    whole.update(logits, labels)
    for k in torch.randperm(1000, generator=torch.Generator().manual_seed(1)).split(7):
        parts.update(logits[k], labels[k])
    assert torch.equal(whole._all, parts._all)


def test_top5_is_left_out_where_it_is_always_one():
    logits, labels = made_up(num_classes=5)
    sums = Sums(5)
    sums.update(logits, labels)
    assert sums.result().top5 is None and "top5" not in sums.result().figures()


def test_a_constant_network_is_right_only_on_the_first_class():
    labels = torch.arange(8).repeat(3)
    sums = Sums(8, confusion=True)
    sums.update(torch.zeros(24, 8), labels)
    result = sums.result()
    assert (result.top1, result.top5) == (1 / 8, 5 / 8)
    assert result.confusion[:, 0].tolist() == [3] * 8


def test_logits_that_are_no_numbers_are_wrong_and_show_in_the_loss():
    sums = Sums(8)
    sums.update(torch.full((4, 8), float("nan")), torch.zeros(4, dtype=torch.int64))
    result = sums.result()
    assert (result.samples, result.top1, result.top5, result.balanced) == (4, 0, 0, 0) and math.isnan(result.loss)


def test_losses_may_be_given_and_bf16_logits_too():
    logits, labels = made_up(64)
    sums = Sums(7)
    sums.update(logits.bfloat16(), labels, losses=torch.full((64,), 2.5))
    assert sums.result().loss == 2.5


def test_of_no_samples_the_shares_are_no_numbers():
    result = Sums(7).result()
    assert result.samples == 0 and math.isnan(result.top1) and math.isnan(result.balanced)


def test_throughput_counts_each_window_by_itself():
    times = iter([0.0, 1.0, 1.5, 4.0, 4.0, 5.0, 6.0])
    clock = Throughput(now=lambda: next(times))
    with clock.waiting():
        pass
    clock.add(64)
    clock.add(64)
    assert clock.read() == (32.0, 0.125)
    with clock.waiting():
        pass
    assert clock.read() == (0.0, 0.5)


def test_flops_are_those_counted_by_hand_and_the_model_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    assert flops_per_sample(net, (3, 6, 6)) == 2 * (36 * 8 * 27 + 8 * 36 * 10)
    assert [m.training for m in net] == [True, False, True, True] and net.training
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("model, size", [
    ({"name": "alexnet", "width": 0.25}, 224), ({"name": "vgg11", "width": 0.25}, 32), ({"name": "resnet18"}, 32),
    ({"name": "mlp"}, 0),
])  # fmt: skip
def test_training_takes_three_times_the_operations_less_the_gradient_of_what_enters(model, size):
    net = build_model(ModelConfig(**model), 5, (size, size) if size else None, None if size else 30, 0)
    shape = (3, size, size) if size else (30,)
    before = {name: (t.clone(), t.requires_grad) for name, t in net.state_dict(keep_vars=True).items()}
    forward, training = flops_per_sample(net, shape), flops_per_sample(net, shape, training=True)
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    alone = flops_per_sample(first, shape)  # the gradient of its inputs would cost as much as its forward pass
    assert training == 3 * forward - alone
    assert net.training and all(p.grad is None for p in net.parameters())
    for name, t in net.state_dict(keep_vars=True).items():
        assert torch.equal(t, before[name][0]) and t.requires_grad == before[name][1]


@pytest.mark.parametrize("small_ms, sides", [
    (0.5, [512] * 3 + [1024] * 10),
    (10, [512] * 3 + [1024] * 3),  # a larger one takes 80 ms, and 0.3 s is all that training waits
    (200, [512] * 3),  # bf16 without instructions for it
])  # fmt: skip
def test_a_cpus_peak_is_that_of_products_that_reach_it_in_the_time_there_is(monkeypatch, small_ms, sides):
    clock, seen = [0.0], []

    class Product(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if "matmul" in function.__name__:
                side = args[0].shape[0]
                seen.append(side)
                clock[0] += small_ms / 1000 * (side / 512) ** 3 * (0.9 if side > 512 else 1.0)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    with Product():
        peak = peak_flops(torch.device("cpu"), torch.float32)
    assert seen == sides
    assert peak == pytest.approx(2 * 512**3 / (small_ms / 1000) / (0.9 if 1024 in sides else 1))
