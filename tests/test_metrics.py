"""Figures against scikit-learn and against their definitions."""

import copy
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.metrics import Sums, Throughput, class_table, flops_per_sample

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
    assert (result.samples, result.top1, result.top5) == (4, 0, 0) and math.isnan(result.loss)


def test_losses_may_be_given_and_bf16_logits_too():
    logits, labels = made_up(64)
    sums = Sums(7)
    sums.update(logits.bfloat16(), labels, losses=torch.full((64,), 2.5))
    assert sums.result().loss == 2.5
    sums.reset()
    assert sums.result().samples == 0 and math.isnan(sums.result().top1)


def test_class_table_agrees_with_scikit_learn():
    logits, labels = made_up()
    logits[:, 3] = -100  # never predicted: its precision is 0 by definition
    sums = Sums(7, confusion=True)
    sums.update(logits, labels)
    rows = class_table(sums.result().confusion, list("abcdefg"))
    expected = sklearn.metrics.precision_recall_fscore_support(labels, logits.argmax(1), zero_division=0)
    for key, column in zip(["precision", "recall", "f1", "samples"], expected, strict=True):
        assert [row[key] for row in rows] == pytest.approx(column.tolist())
    assert [row["class"] for row in rows] == list("abcdefg")


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
