"""Keyed dropout against its definition and against chance; BatchNorm over ranks where there is one rank."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import order
from dist_train.errors import UserError
from dist_train.layers import (
    GlobalBatchNorm,
    KeyedDropout,
    random_bits,
    set_dropout_keys,
    use_keyed_dropout,
    use_sync_batchnorm,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def keys_of(num_samples, epoch=0):
    samples = np.arange(num_samples)
    return torch.from_numpy(order.sample_keys(0, np.full(num_samples, epoch), samples))


def dropped(keys, p=0.5, layer=0, units=1000, first_unit=0):
    layer = KeyedDropout(p, layer)
    layer.first_unit = first_unit
    set_dropout_keys(layer, keys)
    return layer(torch.ones(len(keys), units)) == 0


def test_keys_stay_at_one_address_and_are_the_layers_own():
    net, given = nn.Sequential(KeyedDropout(), KeyedDropout(layer=1)), keys_of(4)
    set_dropout_keys(net, given)
    first = net[0].keys
    assert first is net[1].keys and torch.equal(first, given) and first.data_ptr() != given.data_ptr()
    set_dropout_keys(net, keys_of(4, epoch=1))
    assert net[0].keys is first and torch.equal(first, keys_of(4, epoch=1))
    set_dropout_keys(net, keys_of(3))
    assert torch.equal(net[1].keys, keys_of(3))


def test_bits_follow_their_definition():
    keys = keys_of(5)
    mask32 = 0xFFFFFFFF

    def logical(x, shift):
        return (x & mask32) >> shift

    def word(key, layer, pair):
        start = ((key & order.MASK) ^ 0x5DEECE66D1CE4E5B) + (layer + 1) * 0x9E3779B97F4A7C15
        mixed = int(order.mix(np.array([start & order.MASK], np.uint64))[0])
        h = pair
        for shift, factor in [(16, 0x7FEB352D), (15, 0x846CA68B)]:
            h = ((h ^ logical(h, shift)) * factor) & mask32
        h ^= logical(h, 16)
        h = ((h ^ (mixed & mask32)) * ((mixed >> 32) | 1)) & mask32
        signed = h - 2**32 if h >> 31 else h
        return ((signed ^ (signed >> 15)) * 0x9E3779B1) & mask32

    expected = [[word(int(k), 3, u // 2) >> 16 * (u % 2) & 0xFFFF for u in range(7)] for k in keys]
    assert (random_bits(keys, 3, 7).int() & 0xFFFF).tolist() == expected
    for first, count in ((0, 1), (0, 2), (4, 1), (4, 2)):  # of a lone column, otherwise
        found = random_bits(keys, 3, count, first)
        assert found.dtype == torch.int16 and (found.int() & 0xFFFF).tolist() == [row[first : first + count] for row in expected]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_rate_is_p_over_samples_and_over_units(p):
    mask = dropped(keys_of(2000), p, units=500).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - p) < 4 * spread / 1000  # a million draws
    for mean, n in [(mask.mean(0), 2000), (mask.mean(1), 500)]:
        z = (mean - p) / spread * n**0.5
        assert z.abs().max() < 5 and abs(z.square().mean() - 1) < 5 * (2 / len(z)) ** 0.5


def correlation(a, b):
    """z-value of the agreement of two masks at rate one half."""
    agree = (a == b).double()
    return ((agree.mean() - 0.5) * 2 * agree.numel() ** 0.5).item()


def test_units_samples_layers_and_epochs_are_independent():
    mask = dropped(keys_of(1000))
    for lag in (1, 2, 3, 4, 8, 64, 256, 512):
        assert abs(correlation(mask[:, lag:], mask[:, :-lag])) < 4.5
        assert abs(correlation(mask[lag:], mask[:-lag])) < 4.5
    assert abs(correlation(mask, dropped(keys_of(1000), layer=1))) < 4.5
    assert abs(correlation(mask, dropped(keys_of(1000, epoch=1)))) < 4.5
    assert abs(correlation(mask, dropped(keys_of(1000) + 1))) < 4.5  # keys that nobody has scattered


def test_patterns_of_neighbouring_units_pass_a_chi_square():
    mask = dropped(keys_of(4000), units=800).long()
    for step in (1, 2):  # units of one hash word, and of the same half of neighbouring words
        groups = mask[:, ::step][:, :400].view(4000, 100, 4)
        patterns = torch.bincount((groups * torch.tensor([1, 2, 4, 8])).sum(2).flatten(), minlength=16)
        chi_square = ((patterns - 25_000) ** 2 / 25_000).sum().item()
        assert chi_square < 45  # 15 degrees of freedom: one in 10,000


def test_pairs_of_units_and_of_samples_are_uncorrelated_as_chance_has_it():
    mask = dropped(keys_of(1024), units=1024).double() * 2 - 1
    for signs in (mask, mask.T):
        z = (signs @ signs.T / 32).fill_diagonal_(0)
        pairs = z[torch.triu(torch.ones_like(z), 1) > 0]
        assert abs(pairs.square().mean() - 1) < 0.02 and pairs.abs().max() < 6.5


def test_mask_is_the_samples_own_in_any_batch():
    keys = keys_of(64)
    whole = dropped(keys)
    order_ = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for part in order_.split(10):
        assert torch.equal(dropped(keys[part]), whole[part])


def test_a_layer_split_over_ranks_draws_what_the_whole_layer_draws():
    keys = keys_of(8)
    whole = dropped(keys, units=100)
    assert torch.equal(dropped(keys, units=36, first_unit=64), whole[:, 64:])


def test_survivors_are_scaled_and_gradients_pass_only_through_them():
    layer = KeyedDropout(0.25)
    set_dropout_keys(layer, keys_of(16))
    x = torch.randn(16, 3, 5, 7, requires_grad=True)
    y = layer(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_evaluation_is_the_identity_and_rates_of_0_and_1_are_exact():
    x = torch.randn(4, 6)
    assert KeyedDropout(0.5).eval()(x) is x
    assert KeyedDropout(0.0)(x) is x
    assert torch.equal(KeyedDropout(1.0)(x), torch.zeros(4, 6))


def test_missing_or_stale_keys_are_an_error():
    layer = KeyedDropout(0.5)
    with pytest.raises(RuntimeError, match="none for 4 samples"):
        layer(torch.ones(4, 6))
    set_dropout_keys(layer, keys_of(8))
    with pytest.raises(RuntimeError, match="8 for 4 samples"):
        layer(torch.ones(4, 6))


def test_every_dropout_of_a_model_is_replaced_and_numbered():
    net = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(4, 4, 1)), nn.Dropout(0.3).eval())
    names = list(net.state_dict())
    use_keyed_dropout(net)
    found = [m for m in net.modules() if isinstance(m, KeyedDropout)]
    assert sorted((m.p, m.units, m.training) for m in found) == [
        (0.1, "all", True), (0.2, "channels", True), (0.3, "all", False)
    ]  # fmt: skip
    assert len({m.layer for m in found}) == 3 and list(net.state_dict()) == names
    set_dropout_keys(net, keys_of(2))
    y = net[1][0](torch.ones(2, 4, 5, 5))
    assert all(channel.unique().numel() == 1 for channel in y.flatten(0, 1))


def test_whole_samples_are_dropped_for_stochastic_depth():
    layer = KeyedDropout(0.3, units="samples")
    set_dropout_keys(layer, keys_of(200))
    y = layer(torch.ones(200, 3, 2, 2)).flatten(1)
    assert torch.equal(y == 0, (y[:, :1] == 0).expand(-1, 12))
    assert 30 < (y[:, 0] == 0).sum() < 90


def test_compiled_dropout_draws_the_same_and_is_not_compiled_again():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = nn.Sequential(nn.Linear(6, 32), KeyedDropout(0.5))
    compiled = torch.compile(net, backend=count, fullgraph=True)
    for epoch in range(4):
        x = torch.randn(16, 6)
        set_dropout_keys(net, keys_of(16, epoch))
        assert torch.equal(compiled(x), net(x))
    assert len(graphs) == 1


def test_sync_batchnorm_keeps_names_values_and_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4).eval()))
    before, parameters = copy.deepcopy(net.state_dict()), list(net.parameters())
    use_sync_batchnorm(net)
    assert isinstance(net[1], GlobalBatchNorm) and isinstance(net[2][0], GlobalBatchNorm)
    assert (net[1].training, net[2][0].training) == (True, False)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], t) for name, t in before.items())


def test_sync_batchnorm_alone_is_batchnorm():
    plain = nn.BatchNorm2d(5)
    alone = use_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(6, 5, 4, 4)
    for _ in range(2):
        assert torch.equal(alone(x), plain(x))
    assert torch.equal(alone.eval()(x), plain.eval()(x))
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in alone.state_dict().items())


class OwnStatistics(nn.BatchNorm2d):
    """A BatchNorm that does more, so that it cannot be swapped."""


class OwnVariance(nn.Module):
    """A norm with running statistics that is no BatchNorm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(4))


@pytest.mark.parametrize("norm", [OwnStatistics(4), OwnVariance(), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_statistics_that_ranks_would_not_share_are_refused_by_name(norm):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(norm))
    with pytest.raises(UserError, match=rf"the network's {type(norm).__name__} .*\n.*sync_batchnorm: false"):
        use_sync_batchnorm(net)


def test_norms_without_statistics_of_a_batch_stay():
    from torchvision.ops import FrozenBatchNorm2d

    net = nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), FrozenBatchNorm2d(4), nn.LayerNorm(4))
    before = list(net)
    assert list(use_sync_batchnorm(net)) == before
    once = use_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))
    norm = once[0]
    assert use_sync_batchnorm(once)[0] is norm
