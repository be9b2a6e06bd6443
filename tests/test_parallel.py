"""ddp, hybrid and fsdp against one process that holds the whole batch and all weights."""

import contextlib
import copy
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import free_port, lines_of, tiny_run, train_in_turns
from torch import nn

from dist_train import messages, runtime
from dist_train.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from dist_train.errors import UserError
from dist_train.layers import set_dropout_keys, use_keyed_dropout, use_sync_batchnorm
from dist_train.models import build_model
from dist_train.networks import ConvNet
from dist_train.optim import build_optimizer
from dist_train.parallel import FullySharded, parallelize

WORLD_SIZE, BATCH, MICRO = 4, 24, 2
NETWORKS = {"alexnet": 0.0625, "alexnet_bn": 0.0625, "vgg11": 0.03125}
LAYOUTS = {"ddp": ("ddp", 0), "hybrid": ("hybrid", 0), "two groups": ("hybrid", 2), "fsdp": ("fsdp", 0)}
ONE_PROCESS = SimpleNamespace(prepare_model=lambda network: network, no_sync=lambda model: contextlib.nullcontext(),
                              clip_grad_norm_=torch.nn.utils.clip_grad_norm_)  # fmt: skip  # in Accelerate's place
ALONE = runtime.World(0, 1, 0, 1, torch.device("cpu"))
SHORT = {f"{layout}, bf16": layout for layout in ("ddp", "two groups", "fsdp")}  # train.reduce_precision


def settings(name: str, layout: str) -> RunConfig:
    parallel, split_ranks = LAYOUTS[SHORT.get(layout, layout)]
    precision = "bf16" if layout in SHORT else "fp32"
    model = ModelConfig(name=name, width=NETWORKS[name], stem="small")
    optim = OptimConfig(lr=0.01, weight_decay=0.1)
    train = TrainConfig(parallel=parallel, split_ranks=split_ranks, reduce_precision=precision)
    return RunConfig(model=model, optim=optim, train=train)


def two_updates(config: RunConfig, accelerator, world) -> dict:
    """What this rank sees of two updates: losses, gradient norms, and on rank zero the whole gradients and weights."""
    images, labels, keys = samples()
    network = use_keyed_dropout(build_model(config.model, 10, (16, 16), None, seed=1)).double()
    if world.world_size > 1:
        use_sync_batchnorm(network)
    with mock.patch.object(torch.version, "cuda", None):  # as in a torch that was built without it
        parallel = parallelize(network, config, accelerator, world)
    optimizer = parallel.optimizer(build_optimizer(network, config.optim))
    share = BATCH // world.world_size
    num_micro = 1 if config.model.name.endswith("_bn") else MICRO  # whose statistics are those of what goes through at once
    found = {"losses": [], "norms": []}
    if world.world_size > 1:
        messages.clock.start(world.device, network.parameters())
    for _ in range(2):
        loss_sum = torch.zeros((), dtype=torch.float64)
        for i in range(num_micro):
            first = world.rank * share + i * share // num_micro
            part = slice(first, first + share // num_micro)
            set_dropout_keys(network, keys[part])
            with contextlib.nullcontext() if i == num_micro - 1 else parallel.accumulating():
                loss = F.cross_entropy(parallel.model(images[part]), labels[part]) / num_micro
                loss.backward()
            messages.clock.backward_is_over()
            loss_sum += loss.detach()
        parallel.reduce_gradients()
        found["gradients"] = parallel.gathered({"all": {n: p.grad.clone() for n, p in network.named_parameters()}})
        found["norms"].append(parallel.clip_gradients(0.5))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found["losses"].append(loss_sum)
    found["waited"] = messages.clock.take()
    messages.clock.stop()
    found["weights"] = parallel.gathered({"all": network.state_dict()})
    found["held"] = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in network.parameters())
    with torch.no_grad(), parallel.whole() as whole:
        found["logits"] = whole.eval()(images)
    if found["weights"]:  # every rank takes its part back without a message
        back = parallel.scattered(copy.deepcopy(found["weights"]))["all"]
        own = network.state_dict()
        found["comes back"] = all(torch.equal(_local(back[name]), _local(own[name])) for name in own)
    return found


def _local(t):
    return t.to_local() if hasattr(t, "to_local") else t


def samples():
    rng = torch.Generator().manual_seed(5)
    images = torch.randn(BATCH, 3, 16, 16, generator=rng, dtype=torch.float64).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (BATCH,), generator=rng), torch.randint(-(2**62), 2**62, (BATCH,), generator=rng)


def job(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher puts into a rank's environment."""
    return {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def one_rank(rank, port, folder):
    os.environ |= job(rank, WORLD_SIZE, port)
    accelerator, world = runtime.start("fp32", 1, 60)
    try:
        found = {
            (n, layout): two_updates(settings(n, layout), accelerator, world) for n in NETWORKS for layout in LAYOUTS
        } | {("alexnet_bn", layout): two_updates(settings("alexnet_bn", layout), accelerator, world) for layout in SHORT}
        found["refused"] = refusals(accelerator, world)
        if rank < 2:
            torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        runtime.end()


def refusals(accelerator, world) -> list[str]:
    base = settings("alexnet", "hybrid")
    odd = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10))
    messages = []
    for network, train in [
        (ConvNet(nn.Identity(), nn.Identity(), odd), replace(base.train, split_ranks=3)),
        (ConvNet(nn.Identity(), nn.Identity(), odd), replace(base.train, precision="fp16")),
        (ConvNet(nn.Identity(), nn.Identity(), odd), base.train),
        (nn.Linear(2, 2), base.train),
    ]:
        with pytest.raises(UserError) as error:
            parallelize(network, replace(base, train=train), accelerator, world)
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What ranks 0 and 1 of four found."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.multiprocessing.start_processes(one_rank, (free_port(), str(folder)), WORLD_SIZE, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    """The same on one process."""
    return {name: two_updates(settings(name, "ddp"), ONE_PROCESS, ALONE) for name in NETWORKS}


@pytest.mark.two_process
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_norms_and_updates_are_those_of_one_process(ranks, alone, name, layout):
    found, expected = ranks[0][name, layout], alone[name]
    for key in ("gradients", "weights"):
        assert found[key]["all"].keys() == expected[key]["all"].keys()
        for parameter, t in expected[key]["all"].items():
            torch.testing.assert_close(found[key]["all"][parameter], t, rtol=1e-8, atol=1e-10, msg=f"{key} {parameter}")
    for of_rank in (found, ranks[1][name, layout]):
        torch.testing.assert_close(of_rank["norms"], expected["norms"], rtol=1e-9, atol=0)
        torch.testing.assert_close(of_rank["logits"], expected["logits"], rtol=1e-8, atol=1e-10)
    assert expected["norms"][0] > 0.5  # or nothing was clipped
    assert found["comes back"]
    assert ranks[1][name, layout]["weights"] is None


@pytest.mark.two_process
@pytest.mark.parametrize("layout", SHORT)
def test_gradients_can_travel_in_bf16(ranks, alone, layout):
    found, expected = ranks[0]["alexnet_bn", layout], alone["alexnet_bn"]
    for parameter, t in found["gradients"]["all"].items():
        right = expected["gradients"]["all"][parameter]
        assert torch.equal(t, t.bfloat16().double()), parameter
        assert (t - right).norm() < 0.02 * right.norm() + 1e-9, parameter  # of the second update, whose weights differ
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=0.01, atol=0)
    assert found["comes back"]


@pytest.mark.two_process
@pytest.mark.parametrize("layout", ["ddp", "hybrid", "two groups"])
def test_waiting_for_messages_is_timed(ranks, alone, layout):
    assert all(0 < rank["alexnet", layout]["waited"] < 60 for rank in ranks)
    assert alone["alexnet"]["waited"] == 0


@pytest.mark.two_process
def test_each_rank_holds_its_part_alone(ranks, alone):
    whole = {name: alone[name]["held"] for name in NETWORKS}
    for name in NETWORKS:
        held = {layout: ranks[1][name, layout]["held"] for layout in LAYOUTS}
        assert held["ddp"] == whole[name]
        assert held["fsdp"] < 0.3 * whole[name]
        assert held["hybrid"] < held["two groups"] < whole[name]


@pytest.mark.parametrize("name, groups", [
    ("alexnet", ["classifier.1", "classifier.4"]),
    ("swin_t", ["features.5.0", "features.5.1", "features.5.2", "features.5.3", "features.5.4", "features.5.5", "features.6",
                "features.7.0", "features.7.1"]),  # whole blocks: their attention reads the weight of qkv, which it never calls
    ("vit_b_16", [f"encoder.layers.encoder_layer_{k}" for k in range(12)]),
])  # fmt: skip
def test_what_gathers_its_weights_for_itself_is_called_for_itself(name, groups):
    laid = FullySharded.__new__(FullySharded)
    with torch.device("meta"):
        laid.network = build_model(ModelConfig(name=name, width=1.0), 10, (224, 224), None, seed=0)
    found = {id(module) for module in laid._groups()}
    assert [name for name, module in laid.network.named_modules() if id(module) in found] == groups


@pytest.mark.two_process
def test_what_cannot_be_split_is_refused_by_name(ranks):
    groups, precision, units, network = ranks[0]["refused"]
    assert "train.split_ranks is 3, expected a divisor of the number of ranks, 4" in groups
    assert "train.precision fp16" in precision
    assert "12 hidden units for 4 ranks, which must be a multiple of twice their number" in units
    assert "splits the classifier of alexnet" in network


@pytest.mark.two_process
def test_one_run_goes_through_all_layouts(digits, tmp_path):
    # checkpoints, weight average, evaluation and resume; BatchNorm, dropout, clipping and weight decay
    more = ["--train.epochs", "4", "--optim.lr", "0.004", "--optim.clip_norm", "2", "--resume",
            "--train.eval_every_epochs", "0.4"]  # fmt: skip
    runs = {tmp_path / "steady": "1:16", tmp_path / "changing": "2:7:hybrid 2:14:fsdp 1:16"}
    for run, plan in runs.items():
        train_in_turns(plan, tiny_run(digits, run, *more), tmp_path)
    for kind, steps in (("train", list(range(1, 17))), ("eval", [6, 12])):
        steady, changing = (lines_of(run, kind) for run in runs)
        assert [line["step"] for line in changing] == [line["step"] for line in steady] == steps
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(steady, changing, strict=True)) < 1e-3


@pytest.mark.two_process
def test_a_sharded_run_whose_optimizer_keeps_nothing_goes_on(digits, tmp_path):
    run, more = tmp_path / "run", ["--optim.momentum", "0", "--optim.ema_decay", "0", "--train.epochs", "0.4", "--resume"]
    train_in_turns("2:2:fsdp 2:4:fsdp", tiny_run(digits, run, *more), tmp_path)
    assert [line["step"] for line in lines_of(run, "train")] == [1, 2, 3, 4]


def small_network() -> ConvNet:
    """Three BatchNorms, channels last as in a training: with two, channels first, Inductor's wrong sums did not show."""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    nn.init.uniform_(features[1].weight)
    classifier = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 10))
    return ConvNet(features.to(memory_format=torch.channels_last), nn.Identity(), classifier)


def one_pass(accelerator, world, is_compiled: bool) -> dict:
    """This rank's loss, and on rank zero the whole gradients."""
    network = small_network()
    if world.world_size > 1:
        use_sync_batchnorm(network)
    parallel = parallelize(network, RunConfig(train=TrainConfig(parallel="hybrid", compile=is_compiled)), accelerator, world)
    images, labels, _ = samples()
    share = BATCH // world.world_size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    loss = F.cross_entropy(parallel.model(images[mine].float() * 3 + 5), labels[mine])
    loss.backward()
    parallel.reduce_gradients()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"loss": loss.detach(), "gradients": parallel.gathered({"all": gradients}), "buffers": dict(network.named_buffers())}


def one_compiling_rank(rank, port, folder):
    os.environ |= job(rank, 2, port)
    accelerator, world = runtime.start("fp32", 1, 60)
    try:
        torch.save(one_pass(accelerator, world, is_compiled=True), f"{folder}/{rank}.pt")
    finally:
        runtime.end()


@pytest.mark.two_process
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_compiled_network_of_two_ranks_computes_what_one_process_does(tmp_path):
    torch.multiprocessing.start_processes(one_compiling_rank, (free_port(), str(tmp_path)), 2, start_method="forkserver")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = one_pass(ONE_PROCESS, ALONE, is_compiled=False)
    torch.testing.assert_close(sum(of_rank["loss"] for of_rank in found) / 2, expected["loss"], rtol=1e-5, atol=0)
    for name, t in expected["gradients"]["all"].items():
        torch.testing.assert_close(found[0]["gradients"]["all"][name], t, rtol=1e-4, atol=1e-6, msg=name)
    for name, t in expected["buffers"].items():
        for of_rank in found:
            torch.testing.assert_close(of_rank["buffers"][name], t, rtol=1e-5, atol=1e-6, msg=name)
