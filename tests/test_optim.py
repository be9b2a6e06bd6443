"""Optimizers, schedules and the weight average, against torch's own and against their definitions."""

import copy
import warnings

import pytest
import torch
from torch import nn

from dist_train.config import OptimConfig
from dist_train.muon import orthogonalized
from dist_train.optim import Plateau, WeightAverage, build_optimizer, lr_at, set_lr

pytestmark = pytest.mark.usefixtures("one_thread")


def small_net():
    torch.manual_seed(0)
    # a bias before BatchNorm has no gradient but rounding, which Adam would blow up
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def take_steps(net, optimizer, num_steps, first=0):
    for step in range(first, first + num_steps):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone(memory_format=torch.contiguous_format) for p in net.parameters()]


def test_only_matrices_and_kernels_are_decayed():
    optimizer = build_optimizer(small_net(), OptimConfig(weight_decay=0.1))
    decay, no_decay = optimizer.param_groups
    assert (decay["name"], decay["weight_decay"], [p.dim() for p in decay["params"]]) == ("decay", 0.1, [4, 2])
    assert (no_decay["name"], no_decay["weight_decay"], len(no_decay["params"])) == ("no_decay", 0.0, 3)


def test_frozen_weights_are_left_to_nobody():
    net = small_net()
    net[0].requires_grad_(False)
    names = {id(p) for group in build_optimizer(net, OptimConfig()).param_groups for p in group["params"]}
    assert names == {id(p) for p in [*net[1].parameters(), *net[4].parameters()]}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adamax", "rmsprop"])
def test_optimizers_move_as_torchs_plain_ones_do(name):
    config = OptimConfig(name=name, lr=0.05, weight_decay=0.1, momentum=0.8, beta2=0.9)
    ours, theirs = small_net(), small_net()
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = {
        "sgd": lambda: torch.optim.SGD(groups, 0.05, momentum=0.8, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups, 0.05, betas=(0.8, 0.9)),
        "adamw": lambda: torch.optim.AdamW(groups, 0.05, betas=(0.8, 0.9)),
        "adamax": lambda: torch.optim.Adamax(groups, 0.05, betas=(0.8, 0.9)),
        "rmsprop": lambda: torch.optim.RMSprop(groups, 0.05, alpha=0.9, eps=0.0316, momentum=0.8),
    }[name]()
    moved = take_steps(ours, build_optimizer(ours, config), 5)
    for a, b in zip(moved, take_steps(theirs, reference, 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_first_step_that_the_loss_scaler_calls_off_leaves_no_trace():
    torch.manual_seed(0)
    whole, called_off = small_net(), small_net()
    optimizers = [build_optimizer(net, OptimConfig(lr=0.05), precision="fp16") for net in (whole, called_off)]
    before = [p.clone() for p in called_off.parameters()]
    for p in called_off.parameters():
        p.grad = torch.full_like(p, torch.inf)
    optimizers[1].found_inf = torch.ones(())  # as torch.amp.GradScaler tells a fused optimizer
    optimizers[1].step()
    assert all(torch.equal(p, q) for p, q in zip(called_off.parameters(), before, strict=True))
    del optimizers[1].found_inf
    for a, b in zip(*(take_steps(*pair, 3) for pair in zip((whole, called_off), optimizers, strict=True)), strict=True):
        assert torch.equal(a, b)


def test_muon_moves_hidden_matrices_as_torchs_and_the_rest_as_sgd():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 5))
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    # torch computes in bfloat16, and decays by lr times weight_decay
    muon = torch.optim.Muon(
        [theirs[0].weight, theirs[2].weight], 0.05, weight_decay=0.1, momentum=0.8, nesterov=True, ns_steps=3
    )
    sgd = torch.optim.SGD([
        {"params": [theirs[4].weight], "weight_decay": 0.02},
        {"params": [p for p in theirs.parameters() if p.dim() < 2]},
    ], 0.2, momentum=0.8, nesterov=True)  # fmt: skip
    config = OptimConfig(name="muon", lr=0.05, rest_lr=0.2, weight_decay=0.1, rest_weight_decay=0.02, momentum=0.8)
    optimizer = build_optimizer(ours, config, head="4", precision="bf16")
    set_lr(optimizer, config.lr)
    for step in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            # a network's own would have few directions, and rounding would choose the others
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        for one in (optimizer, muon, sgd):
            one.step()
    for a, b, at_first in zip(ours.parameters(), theirs.parameters(), before.parameters(), strict=True):
        assert (a - b).norm() < 0.01 * (b - at_first).norm()  # both in bfloat16


def test_muon_gives_kernels_orthogonal_directions_in_any_layout():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16)).to(memory_format=layout)
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = build_optimizer(net, OptimConfig(name="muon", lr=1.0, weight_decay=0.0))
        hidden, *_ = [group["params"] for group in optimizer.param_groups if group["name"] == "hidden"]
        assert [id(p) for p in hidden] == [id(net[0].weight)]  # a kernel for each channel is no matrix
        net(torch.randn(4, 8, 6, 6)).square().mean().backward()
        optimizer.step()
        moved = (before[0] - net[0].weight.detach()).flatten(1)
        values = torch.linalg.svdvals(moved)
        assert values.max() < 1.25 and (values > 0.65).sum() > 8
        found.append(moved)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("moves, expected", [("matrices", [2, 4]), ("kernels", [4])])
def test_muon_leaves_the_last_layer_and_what_it_is_told_to_sgd(moves, expected):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 5))
    groups = build_optimizer(net, OptimConfig(name="muon", muon_moves=moves), head="3").param_groups
    assert [sorted(p.dim() for p in group["params"]) for group in groups if group["name"] == "hidden"] == [expected]


@pytest.mark.parametrize("shape", [(24, 216), (216, 24), (24, 30), (4, 4)])
def test_wide_matrices_take_the_short_way_to_the_same_direction(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, shape[1])
    x = matrix.double() / matrix.norm()
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalized(matrix).double(), x, rtol=1e-3, atol=1e-4)
    assert (orthogonalized(matrix.bfloat16()) - x).norm() < 0.02 * x.norm()


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "muon"])
def test_state_restored_without_its_strides_moves_the_weights_alike(name):
    config = OptimConfig(name=name, lr=0.05)
    net = small_net().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(net, config)
    take_steps(net, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for slots in state["state"].values():
        for slot, t in slots.items():
            slots[slot] = t.contiguous()
    twin = copy.deepcopy(net)
    resumed = build_optimizer(twin, config)
    resumed.load_state_dict(state)
    for a, b in zip(take_steps(net, optimizer, 3, 3), take_steps(twin, resumed, 3, 3), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_in_another_layout_counts_the_same():
    def one_step(layout):
        p = nn.Parameter(torch.arange(72.0).view(2, 4, 3, 3).clone(memory_format=torch.channels_last))
        holder = nn.ParameterList([p])
        optimizer = build_optimizer(holder, OptimConfig(lr=0.1, weight_decay=0))
        p.grad = torch.arange(72.0).view(2, 4, 3, 3).clone(memory_format=layout)
        optimizer.step()
        return p.detach()

    expected = torch.arange(72.0).view(2, 4, 3, 3) * (1 - 0.1 * 1.9)
    torch.testing.assert_close(one_step(torch.contiguous_format), expected)
    torch.testing.assert_close(one_step(torch.channels_last), expected)


def test_set_lr_honours_each_groups_scale():
    optimizer = build_optimizer(small_net(), OptimConfig())
    optimizer.param_groups[0]["lr_scale"] = 0.1
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.05), 0.5]


def torch_rates(make, num_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler warns that nothing was optimised
        scheduler = make(optimizer)
        rates = []
        for _ in range(num_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return rates


def our_rates(num_steps, steps_per_epoch=10, **settings):
    return [lr_at(s, OptimConfig(lr=0.2, **settings), steps_per_epoch, num_steps) for s in range(num_steps)]


def test_cosine_is_torchs():
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.02), 100)
    assert our_rates(100, schedule="cosine", final_lr=0.1) == pytest.approx(theirs)


@pytest.mark.parametrize("final_lr, warmup_epochs", [(0.004, 2.0), (0.0, 0.0)])
def test_one_cycle_is_torchs(final_lr, warmup_epochs):
    share = 0.2 if warmup_epochs else 0.3
    divisor = 1 / 25 / final_lr if final_lr else float("inf")
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.2, 100, pct_start=share, anneal_strategy="linear", final_div_factor=divisor
        ),
        100,
    )
    ours = our_rates(100, schedule="one_cycle", final_lr=final_lr, warmup_epochs=warmup_epochs)
    assert ours == pytest.approx(theirs)


def test_step_is_torchs_at_every_step_of_an_epoch():
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 3 * 10, 0.1), 100)
    assert our_rates(100, schedule="step", step_epochs=3.0) == pytest.approx(theirs)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "plateau"])
def test_warm_up_rises_evenly_to_the_peak(schedule):
    rates = our_rates(100, schedule=schedule, warmup_epochs=2.0)
    assert rates[:20] == pytest.approx([0.2 * (s + 1) / 20 for s in range(20)])
    assert rates[20] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "step", "plateau"])
@pytest.mark.parametrize("num_steps, warmup_epochs", [(1, 0.0), (1, 5.0), (2, 0.0), (7, 5.0)])
def test_the_shortest_runs_have_a_positive_rate_at_first(schedule, num_steps, warmup_epochs):
    rates = our_rates(num_steps, schedule=schedule, warmup_epochs=warmup_epochs)
    assert 0 < rates[0] <= 0.2 and all(0 <= rate <= 0.2 for rate in rates)


def test_plateau_drops_when_torchs_does_and_survives_a_restart():
    figures = [0.5, 0.6, 0.6, 0.55, 0.61, 0.6, 0.6, 0.6, 0.3, 0.2, 0.7, float("nan"), 0.1, 0.1, 0.1]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, patience=1, threshold=0, eps=0)
    ours, factors = Plateau(1, 0.5), []
    for figure in figures:
        state, ours = ours.state_dict(), Plateau(1, 0.5)
        ours.load_state_dict(state)
        ours.update(figure)
        theirs.step(figure)
        factors.append((ours.factor, optimizer.param_groups[0]["lr"]))
    assert all(a == b for a, b in factors) and factors[-1][0] < 1


def test_weight_average_follows_its_definition():
    net = small_net()
    average = WeightAverage(net, decay=0.5)
    slow = {name: t.double() for name, t in net.state_dict().items()}
    for step in range(8):
        with torch.no_grad():
            for t in [*net.parameters(), net[1].running_mean]:
                t += 0.1 * (step + 1)
        net[1].num_batches_tracked += 1
        average.update(net)
        keep = min(0.5, (1 + step) / (10 + step))
        slow = {name: keep * slow[name] + (1 - keep) * t.double() for name, t in net.state_dict().items()}
    for name, t in average.weights.items():
        if name.endswith("num_batches_tracked"):
            assert t == 8
        else:
            torch.testing.assert_close(t.double(), slow[name], rtol=1e-6, atol=1e-6)


def test_weight_average_swaps_in_and_out_bit_for_bit():
    net = small_net().to(memory_format=torch.channels_last)
    average = WeightAverage(net, decay=0.9)
    take_steps(net, build_optimizer(net, OptimConfig(lr=0.1)), 3)
    average.update(net)
    own = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 3, 8, 8)
    averaged = copy.deepcopy(net)
    averaged.load_state_dict(average.weights)
    with average.swapped(net):
        assert torch.equal(net.eval()(x), averaged.eval()(x))
        assert not torch.equal(net[0].weight, own["0.weight"])
    assert all(torch.equal(t, own[name]) for name, t in net.state_dict().items())


def test_weight_average_restored_goes_on_bit_for_bit():
    nets = [small_net() for _ in range(6)]
    for k, net in enumerate(nets):
        torch.manual_seed(k)
        nn.init.normal_(net[0].weight)
    straight, stopped = WeightAverage(nets[0], 0.99), WeightAverage(nets[0], 0.99)
    for net in nets[:3]:
        straight.update(net)
        stopped.update(net)
    resumed = WeightAverage(nets[5], 0.99)
    resumed.restore(copy.deepcopy(stopped.weights), stopped.num_updates)
    for net in nets[3:]:
        straight.update(net)
        resumed.update(net)
    assert all(torch.equal(t, resumed.weights[name]) for name, t in straight.weights.items())


@pytest.mark.parametrize(
    ("name", "scales"),
    [("convnext_tiny", 18), ("vit_b_16", 2), ("swin_v2_t", 12)],  # layer scales; token and positions; scales of the logits
)
def test_scales_tokens_and_positions_do_not_decay(name, scales):
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=3)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups}
    spared = [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) in groups["no_decay"]]
    assert len(spared) == scales and not any(n.endswith("weight") for n in spared)
    decayed = {n for n, p in model.named_parameters() if id(p) in groups["decay"]}
    matrices = {n + ".weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert matrices <= decayed
