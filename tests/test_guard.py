"""A bad loss never reaches the weights, and no step waits for the device to find out."""

import pytest
import torch
from conftest import tiny_run
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train import train as training
from dist_train.config import OptimConfig
from dist_train.errors import UserError
from dist_train.guard import Guard
from dist_train.optim import build_optimizer
from dist_train.run import Run, can_skip_updates

CPU = torch.device("cpu")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
         aten.masked_select.default, aten.bincount.default, aten._unique2.default}  # fmt: skip


class NoReads(TorchDispatchMode):
    """Fails where the host would have to wait for a value, or a size, that is on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in READS, f"the host reads a value of the device: {function}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(digits, tmp_path, value):
    def spoil(run, state, is_best):
        with torch.no_grad():
            next(run.network.parameters())[0, 0, 0, 0] = value
        save(run, state, is_best)

    save = Run.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="no longer finite, so they were not saved"):
        patch.setattr(Run, "save", spoil)
        training.run_training(tiny_run(digits, tmp_path / "run", "--train.max_steps", "1"))
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def train_without_reads(digits, run, monkeypatch, *argv):
    loop = training.train

    def watched(run, state):
        with NoReads():
            loop(run, state)

    monkeypatch.setattr(training, "train", watched)
    monkeypatch.setattr(Run, "check_weights", lambda run, state: None)  # a checkpoint, unlike a step, waits by its nature
    quiet = ["--train.max_steps", "4", "--train.eval_every_epochs", "0", *argv]
    return training.run_training(tiny_run(digits, run, *quiet))


@pytest.mark.parametrize("argv", [
    ["--optim.clip_norm", "1", "--augment.mixup", "0.2", "--augment.hue", "0.1", "--augment.erase", "0.5"],
    ["--optim.name", "adamw", "--train.micro_batch_size", "48", "--augment.cutmix", "1", "--augment.grayscale", "0.5"],
    ["--optim.name", "muon"],
], ids=["sgd", "adamw", "muon"])  # fmt: skip
def test_no_step_waits_for_the_device(digits, tmp_path, monkeypatch, argv):
    assert train_without_reads(digits, tmp_path / "run", monkeypatch, "--train.log_every_steps", "100", *argv) == 0


def test_a_log_line_does_wait(digits, tmp_path, monkeypatch):  # or the test above would prove nothing
    with pytest.raises(AssertionError, match="the host reads"):
        train_without_reads(digits, tmp_path / "run", monkeypatch, "--train.log_every_steps", "1")


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_weights_stay_from_the_first_bad_loss_on(name):
    network, guard = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), Guard(CPU, 1)
    optimizer = build_optimizer(network, OptimConfig(name=name, lr=0.1, weight_decay=0.1))
    assert can_skip_updates(optimizer)
    optimizer.found_inf = guard.not_finite
    seen = []
    for step, factor in enumerate([1.0, 1.0, float("nan"), 1.0]):
        loss = (network(torch.ones(1, 3)) * factor).square().sum()
        optimizer.zero_grad()
        loss.backward()
        guard.note(step, loss, stop=False)
        optimizer.step()
        seen.append([p.detach().clone() for p in network.parameters()])
    changed = [any(not torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(seen, seen[1:], strict=False)]
    assert changed == [True, False, False]


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_loss_scaler_is_told_by_a_gradient(name, clips):
    network, guard, scaler = torch.nn.Linear(3, 2), Guard(CPU, 1), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = build_optimizer(network, OptimConfig(name=name, lr=0.1))
    seen = [[p.detach().clone() for p in network.parameters()]]
    for step, factor in enumerate([1.0, float("nan"), 1.0]):
        optimizer.zero_grad()
        scaler.scale(network(torch.ones(1, 3)).square().sum()).backward()  # of this rank: it is another's that is bad
        before = network.bias.grad.clone()
        guard.note(step, torch.tensor(factor), stop=False)
        guard.spoil(network.bias.grad)
        assert torch.equal(network.bias.grad, before) == (step == 0)
        if clips:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        seen.append([p.detach().clone() for p in network.parameters()])
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(seen, seen[1:], strict=False)]
    assert same == [False, True, True]


def test_flags_are_read_a_step_late_and_in_order():
    guard = Guard(CPU, 1)
    answers = []
    for step, loss, stop in [(7, 1.0, False), (8, 1.0, True), (9, float("inf"), False), (10, 1.0, False)]:
        guard.note(step, torch.tensor(loss), stop)
        answers.append(guard.read(step - 1))
    assert answers[:3] == [(False, None), (False, None), (True, None)]
    asked, (step, loss) = answers[3]
    assert (asked, step, float(loss)) == (True, 9, float("inf"))


@pytest.mark.parametrize("name", ["adamax", "rmsprop"])
def test_what_torch_has_no_fused_kernel_of_cannot_skip_so_it_is_asked_first(name):
    assert not can_skip_updates(build_optimizer(torch.nn.Linear(3, 2), OptimConfig(name=name)))
