"""What two real processes compute together, against one process that holds the whole batch."""

import copy
import json
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_ranks, same_tensors, tiny_run
from torch import nn

from dist_train.errors import UserError
from dist_train.guard import Guard
from dist_train.layers import use_sync_batchnorm
from dist_train.metrics import Sums
from dist_train.ranks import meet, on_each_machine, on_main
from dist_train.runtime import EXIT_STOPPED, World

SHARES = [slice(0, 10), slice(10, 16)]  # unequal on purpose
DTYPES = [torch.float64, torch.float32]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found: a dict a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(one_rank, (str(folder),), 2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {
            (name, dtype): pass_through(use_sync_batchnorm(net).to(dtype), x[SHARES[rank]].to(dtype))
            for dtype in DTYPES
            for name, (net, x) in cases().items()
        }
        logits, labels = some_logits()
        sums = Sums(7, confusion=True)
        sums.update(logits[SHARES[rank]], labels[SHARES[rank]])
        sums.reduce()
        found["sums"] = sums._all
        found["guard"] = what_the_guard_says(rank)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def cases():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    table = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh())
    bare = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, affine=False, track_running_stats=False))
    nn.init.uniform_(conv[1].weight)
    far = torch.randn(16, 3, 9, 9).to(memory_format=torch.channels_last) * 3 + 50  # where E[x^2] - E[x]^2 loses digits
    return {
        "pictures": (conv.to(memory_format=torch.channels_last), far),
        "table": (table, torch.randn(16, 5)),
        "signal": (bare, torch.randn(16, 3, 11)),
    }


def pass_through(net, x):
    """Two forward passes and one backward of a loss that sums over samples; gradients are summed over the ranks."""
    x = x.clone().requires_grad_()
    net(x * 2)
    y = net(x)
    (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0]) + y**3).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    if dist.is_initialized():
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": dict(net.named_buffers())}


def some_logits():
    rng = torch.Generator().manual_seed(3)
    return torch.randn(16, 7, generator=rng), torch.randint(0, 7, (16,), generator=rng)


def what_the_guard_says(rank):
    guard, answers = Guard(torch.device("cpu"), 2), []
    for step in range(6):
        loss = torch.tensor(float("nan") if (rank, step) == (1, 4) else 1.0)
        guard.note(step, loss, stop=(rank, step) == (0, 2))
        asked, bad = guard.read(step - 1)
        answers.append((asked, bad and bad[0], guard.not_finite.item()))
    return answers


@pytest.mark.two_process
def test_one_ranks_wish_and_bad_loss_are_seen_by_both_at_the_same_step(ranks):
    expected = [(False, None, 0), (False, None, 0), (False, None, 0), (True, None, 0), (True, None, 1), (True, 4, 1)]
    assert ranks[0]["guard"] == ranks[1]["guard"] == expected


def slow_rank_zero(rank, folder):
    """Two ranks of two machines, whose collectives wait for two seconds; rank zero prepares for longer."""
    world = World(rank, 2, 0, 1, torch.device("cpu"))
    store = f"file://{folder}/store-slow"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))

    def prepare() -> int:
        time.sleep(4)
        return 7

    def refuse() -> None:
        if rank == 1:
            raise UserError("this machine's disk is full")

    try:
        found = [on_main(world, prepare)]
        meet(world)
        with pytest.raises(UserError) as refused:
            on_each_machine(world, refuse)
        torch.save([*found, str(refused.value)], f"{folder}/slow-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.two_process
def test_ranks_wait_for_a_slow_one_longer_than_a_collective_would(tmp_path):
    torch.multiprocessing.start_processes(slow_rank_zero, (str(tmp_path),), 2, start_method="forkserver")
    assert [torch.load(tmp_path / f"slow-{rank}.pt") for rank in range(2)] == [[7, "this machine's disk is full"]] * 2


@pytest.mark.two_process
@pytest.mark.parametrize("case", ["pictures", "table", "signal"])
def test_batchnorm_of_two_ranks_is_that_of_one(ranks, case):
    net, x = cases()[case]
    net, x = net.double(), x.double()
    whole = pass_through(copy.deepcopy(net), x)
    for key in ("y", "dx"):
        together = torch.cat([found[case, torch.float64][key] for found in ranks])
        torch.testing.assert_close(together, whole[key], rtol=1e-8, atol=1e-9)
    alone = torch.cat([pass_through(copy.deepcopy(net), x[share])["y"] for share in SHARES])
    assert (alone - whole["y"]).abs().max() > 0.01  # without the other rank it would differ
    for found in ranks:
        for kind in ("gradients", "buffers"):
            assert found[case, torch.float64][kind].keys() == whole[kind].keys()
            for name, t in whole[kind].items():
                torch.testing.assert_close(found[case, torch.float64][kind][name], t, rtol=1e-8, atol=1e-8)


@pytest.mark.two_process
def test_batchnorm_of_two_ranks_loses_no_digits_far_from_zero(ranks):
    net, x = cases()["pictures"]
    exact, plain = pass_through(copy.deepcopy(net).double(), x.double()), pass_through(net, x)
    together = torch.cat([found["pictures", torch.float32]["y"] for found in ranks])
    error = (together - exact["y"]).abs().max()
    assert error < 1e-3 and error < 3 * (plain["y"] - exact["y"]).abs().max()


@pytest.mark.two_process
def test_evaluation_sums_of_two_ranks_are_exactly_those_of_one(ranks):
    logits, labels = some_logits()
    sums = Sums(7, confusion=True)
    sums.update(logits, labels)
    assert all(torch.equal(found["sums"], sums._all) for found in ranks)
    assert sums.result().loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)


ONE_IS_ASKED = """
import os, signal, sys
import torch
from dist_train import cli, train

forward_backward = train.forward_backward

def noted(run, batch):
    print(f"step {batch.step} draws from {torch.initial_seed()}")
    if (run.world.rank, batch.step) == (1, int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGUSR1)
    return forward_backward(run, batch)

train.forward_backward = noted
sys.exit(cli.run_command(train.run_training, sys.argv[2:]))
"""


@pytest.mark.two_process
def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_nothing_is_lost(digits, tmp_path):
    more = ["--train.epochs", "0.5", "--train.eval_every_epochs", "0", "--optim.lr", "0.004", "--runtime.timeout_s", "10"]

    def train(run, asked_in_step, *words):
        """Exit codes of two ranks, and {step: seed that it draws from} of each."""
        argv = [str(asked_in_step), *tiny_run(digits, run, *more, *words)]
        codes, logs = run_ranks(2, argv, tmp_path, ONE_IS_ASKED)
        return codes, [dict(re.findall(r"step (\d+) draws from (\d+)", log)) for log in logs]

    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    codes, seeds = train(calm, -1)
    assert codes == [0, 0]
    assert len({seed for of_rank in seeds for seed in of_rank.values()}) == 16  # layers that draw by themselves draw anew
    codes, seeds = train(stopped, 3)
    assert codes == [EXIT_STOPPED, EXIT_STOPPED]
    assert [list(of_rank) for of_rank in seeds] == [["0", "1", "2", "3", "4"]] * 2  # the wish is seen in the step after it
    assert [path.name for path in stopped.glob("checkpoints/step-*")] == ["step-00000005"]
    codes, _ = train(stopped, -1, "--resume")
    assert codes == [0, 0]
    assert same_tensors(*(run / "checkpoints/step-00000008/model.safetensors" for run in (calm, stopped)))
    results = [json.loads((run / "result.json").read_text()) for run in (calm, stopped)]
    assert results[0] == results[1] and results[0]["step"] == 8
