"""The weighted loss: worked by hand, the same in any micro-batches, counted on the fold's own training part."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sharded, write_table
from sklearn.utils.class_weight import compute_class_weight

from dist_train import runtime
from dist_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from dist_train.data import to_device
from dist_train.index import load_index
from dist_train.loss import class_weights, weighted_cross_entropy
from dist_train.run import Run
from dist_train.train import forward_backward

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.5, 0.5, 3.0], [1.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 2])
WEIGHTS = torch.tensor([0.25, 1.0, 4.0])


def by_hand(sample: int, label: int, smoothing: float) -> float:
    """Weight of a class times the cross-entropy of a sample that is said to be of it."""
    logits = LOGITS[sample].tolist()
    total = math.log(sum(map(math.exp, logits)))
    losses = [total - logit for logit in logits]
    return WEIGHTS[label].item() * ((1 - smoothing) * losses[label] + smoothing * sum(losses) / 3)


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory) -> str:
    """A table of 300 rows to train on, 7 of them of class b and 29 of class c: no fold has exactly half."""
    folder = tmp_path_factory.mktemp("unbalanced")
    labels = ["b" if k % 43 == 0 else "c" if k % 10 == 5 else "a" for k in range(300)]
    rows = np.random.default_rng(0).normal(0, 1, (300, 2)) + np.array([[ord(label) - 97] for label in labels])
    settings = write_table(folder / "rows.csv", "xy", rows, labels)
    return sharded(folder / "shards", *settings, "--split.val", "0", "--split.test", "0")


@contextlib.contextmanager
def a_run(folder, shards: str, micro_batch_size: int = 0, folds: int = 0, **optim):
    """A run of a small mlp, and the first batch of 64."""
    config = RunConfig(
        data=DataConfig(shards=shards, folds=folds, global_batch_size=64, threads=1),
        model=ModelConfig(name="mlp", hidden=(8,), dropout=0.0), optim=OptimConfig(**optim),
        train=TrainConfig(micro_batch_size=micro_batch_size),
    )  # fmt: skip
    accelerator, world = runtime.start("fp32", 1, 60)
    try:
        with contextlib.closing(Run(config, folder / "run", accelerator, world)) as run:
            with contextlib.closing(to_device(run.stream(0), world.device)) as batches:
                yield run, next(batches)
    finally:
        runtime.end()


def logits_of(run, batch) -> torch.Tensor:
    inputs, _ = run.prepare(batch.images, batch.labels, batch.random_keys)
    return run.network(inputs).detach()


def test_weights_are_inverse_frequencies_with_mean_one_over_the_samples():
    counts = np.array([1, 3, 4])
    labels = np.repeat(np.arange(3), counts)
    whole = class_weights(counts, 1.0, CPU)
    assert whole.dtype == torch.float32
    assert whole.tolist() == pytest.approx([8 / 3, 8 / 9, 2 / 3])
    assert whole.tolist() == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels).tolist())
    half = class_weights(counts, 0.5, CPU)
    assert (half[0] / half[2]).item() == pytest.approx(2) and half[labels].mean().item() == pytest.approx(1)
    assert class_weights(np.array([6, 0, 2]), 1.0, CPU).tolist() == pytest.approx([8 / 12, 0, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_mean_over_the_samples_of_weight_times_loss(smoothing):
    expected = sum(by_hand(i, label, smoothing) for i, label in enumerate(LABELS.tolist())) / 4
    assert weighted_cross_entropy(LOGITS, LABELS, WEIGHTS, smoothing).item() == pytest.approx(expected, rel=1e-5)
    plain = F.cross_entropy(LOGITS, LABELS, WEIGHTS, label_smoothing=smoothing).item()
    assert abs(plain - expected) > 0.1, "the weights of the labels at hand are not to divide it"


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_mixed_samples_loss_is_the_mix_of_two_weighted_losses(smoothing):
    others, share = torch.tensor([2, 1, 0, 0]), torch.tensor([0.9, 0.5, 0.2, 0.75])
    targets = F.one_hot(LABELS, 3) * share[:, None] + F.one_hot(others, 3) * (1 - share[:, None])
    expected = sum(
        mine * by_hand(i, label, smoothing) + (1 - mine) * by_hand(i, other, smoothing)
        for i, (label, other, mine) in enumerate(zip(LABELS.tolist(), others.tolist(), share.tolist(), strict=True))
    ) / 4  # fmt: skip
    assert weighted_cross_entropy(LOGITS, targets, WEIGHTS, smoothing).item() == pytest.approx(expected, rel=1e-5)
    alone = weighted_cross_entropy(LOGITS, F.one_hot(LABELS, 3).float(), WEIGHTS, smoothing)
    assert alone.item() == pytest.approx(weighted_cross_entropy(LOGITS, LABELS, WEIGHTS, smoothing).item(), rel=1e-5)


def test_smoothing_does_not_draw_a_common_classs_sample_to_a_rare_one():
    counts, label = np.array([990, 10]), torch.tensor([0])
    weights = class_weights(counts, 1.0, CPU)
    logits = torch.zeros(1, 2, requires_grad=True)
    weighted_cross_entropy(logits, label, weights, 0.1).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]  # a step down raises the label's logit
    logits.grad = None
    F.cross_entropy(logits, label, weights, label_smoothing=0.1).backward()
    assert logits.grad[0, 1] < 0 < logits.grad[0, 0], "or torch has changed what it does"


@pytest.mark.parametrize("mixed", [False, True])
def test_the_parts_of_a_batch_have_the_mean_of_the_whole(mixed):
    targets = LOGITS.softmax(1) if mixed else LABELS
    whole = weighted_cross_entropy(LOGITS, targets, WEIGHTS, 0.1)
    halves = [weighted_cross_entropy(LOGITS[part], targets[part], WEIGHTS, 0.1) for part in (slice(0, 2), slice(2, 4))]
    assert (sum(halves) / 2).item() == pytest.approx(whole.item(), rel=1e-5)


def test_one_and_two_micro_batches_give_the_same_gradient(unbalanced, tmp_path):
    gradients = []
    for micro_batch_size in (64, 32):
        with a_run(tmp_path, unbalanced, micro_batch_size, class_weights=1.0, label_smoothing=0.1) as (run, batch):
            loss = forward_backward(run, batch)
            gradients.append([loss, *(p.grad.clone() for p in run.network.parameters())])
            weights = class_weights(run.index.split("train").class_counts, 1.0, CPU)
            totals = [weights[part].sum() for part in batch.labels.split(32)]
    assert abs(totals[0] / totals[1] - 1) > 0.02, "halves of equal weight would prove nothing"
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_without_weights_the_loss_is_torchs_bit_for_bit(unbalanced, tmp_path):
    with a_run(tmp_path, unbalanced, label_smoothing=0.1) as (run, batch):
        assert torch.equal(forward_backward(run, batch), F.cross_entropy(logits_of(run, batch), batch.labels, label_smoothing=0.1))


def test_the_classes_of_a_fold_are_counted_on_its_training_part(unbalanced, tmp_path):
    with a_run(tmp_path, unbalanced, folds=2, class_weights=1.0) as (run, batch):
        rows = run.index.split("train").table()["label"]
        whole = load_index(unbalanced).split("train")
        assert len(rows) == whole.num_samples // 2 == 150
        logits = logits_of(run, batch)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        own, all_of_them = (class_weights(np.bincount(labels, minlength=3), 1.0, CPU) for labels in (rows, whole.table()["label"]))
        expected, leaked = ((losses * weights[batch.labels]).mean().item() for weights in (own, all_of_them))
        assert forward_backward(run, batch).item() == pytest.approx(expected, rel=1e-5)
        assert abs(leaked / expected - 1) > 1e-4, "the fold's part is to have other shares than the whole"
