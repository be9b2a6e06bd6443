"""The order is a pure function: every sample once an epoch, the same global batches on any number of ranks."""

import tracemalloc

import numpy as np
import pytest

from dist_train import order as order_module
from dist_train.order import Order, evaluation_share, hash_words, mix, permute, rank_share, sample_keys, uniform

GRIDS = [  # shard sizes, global batch, window_shards, lanes
    ([100, 90, 80, 7], 64, 16, 0),  # fewer shards than a window: a full shuffle
    ([10] * 50, 16, 3, 4),
    ([13] * 50, 48, 2, 0),  # lanes derived
    ([5, 1, 1], 4, 1, 2),
    ([1], 3, 1, 1),  # one sample, batches larger than an epoch
    ([0, 3, 0, 4], 2, 1, 2),  # empty shards
]


def whole_order(order, num_steps):
    samples, epochs = zip(*(order.global_batch(step) for step in range(num_steps)), strict=True)
    return np.concatenate(samples), np.concatenate(epochs)


@pytest.mark.parametrize("shards, batch, window, lanes", GRIDS)
def test_every_sample_is_read_once_per_epoch(shards, batch, window, lanes):
    order = Order(np.array(shards), batch, 3, window, lanes)
    samples, epochs = whole_order(order, -(-3 * order.num_samples // batch))
    for epoch in range(3):
        assert sorted(samples[epochs == epoch]) == list(range(order.num_samples))


@pytest.mark.parametrize("shards, batch, window, lanes", GRIDS)
def test_epochs_are_in_order_and_differ(shards, batch, window, lanes):
    order = Order(np.array(shards), batch, 0, window, lanes)
    n = order.num_samples
    epochs = [order.sample_at(epoch, np.arange(n)).tolist() for epoch in range(3)]
    assert n < 3 or epochs[0] != epochs[1] != epochs[2]
    steps_in_first_epoch = n // batch
    assert all((order.global_batch(step)[1] == 0).all() for step in range(steps_in_first_epoch))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_the_same_global_batch(world_size):
    for lanes in (1, 4, 5):
        order = Order(np.array([7] * 40), 12, 1, 2, lanes)
        for step in (0, 1, 23, 24, 1000):
            parts = [order.rank_batch(step, rank, world_size)[0] for rank in range(world_size)]
            assert {len(part) for part in parts} == {12 // world_size}
            assert np.concatenate(parts).tolist() == order.global_batch(step)[0].tolist()


def test_a_rank_reads_its_own_shards_when_the_world_divides_the_lanes():
    order = Order(np.full(256, 64), 32, 0, 2, 8)
    shards_of = [set() for _ in range(4)]
    for step in range(order.num_samples // 32):
        for rank in range(4):
            shards_of[rank] |= set((order.rank_batch(step, rank, 4)[0] // 64).tolist())
    assert sum(len(s) for s in shards_of) == 256  # no shard is read by two ranks: 8 equal lanes of 32 whole shards


def test_shuffling_stays_inside_the_window():
    order = Order(np.full(100, 50), 10, 0, 4, 1)
    samples = order.sample_at(0, np.arange(order.num_samples))
    for start in range(0, order.num_samples, 200):
        assert len(set((samples[start : start + 200] // 50).tolist())) == 4


def test_the_seed_and_the_batch_size_change_the_order_and_nothing_else_does():
    shards = np.array([30, 20, 50])
    first = Order(shards, 10, 0).global_batch(7)[0].tolist()
    assert Order(shards, 10, 0).global_batch(7)[0].tolist() == first
    assert Order(shards, 10, 1).global_batch(7)[0].tolist() != first
    seeked = Order(shards, 10, 0)
    for step in (99, 3, 50, 7):  # whatever was asked before
        last = seeked.global_batch(step)[0].tolist()
    assert last == first


def test_a_billion_samples_cost_little_time_and_memory():
    counts = np.full(100_000, 10_000)
    tracemalloc.start()
    order = Order(counts, 4096)
    order.global_batch(123_456_789)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_permute_is_a_permutation_of_every_size():
    for size in [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1024, 1025]:
        assert sorted(permute(np.arange(size), np.int64(size), hash_words(size))) == list(range(size))


needs_native = pytest.mark.skipif(order_module.native is None, reason="there is no native core")


@needs_native
def test_the_native_core_permutes_and_mixes_as_numpy_does(monkeypatch):
    def worked_out():
        rng = np.random.default_rng(1)
        for size in (1, 2, 3, 4, 5, 255, 256, 257, 20_040, 2**20, 10**9, 2**33 + 7):
            for count in (0, 1, 7, 8, 63, 65, 500):
                yield permute(rng.integers(0, size, count), np.int64(size), np.uint64(rng.integers(0, 2**63)))
        sizes, keys = rng.integers(1, 10**6, 3000), rng.integers(0, 2**63, 3000).astype(np.uint64)
        yield permute((rng.random(3000) * sizes).astype(np.int64), sizes, keys)
        yield permute((rng.random(3000) * 5).astype(np.int64), np.int64(5), keys)
        yield mix(keys)
        yield mix(keys.reshape(30, 100).T)
        yield sample_keys(3, sizes, keys.view(np.int64))

    native = list(worked_out())
    monkeypatch.setattr(order_module, "native", None)
    for ours, numpys in zip(native, worked_out(), strict=True):
        assert ours.dtype == numpys.dtype and np.array_equal(ours, numpys)


@needs_native
def test_the_native_permutation_refuses_what_lies_outside():
    one, out = np.ones(1, np.uint64), np.zeros(2, np.int64)
    order_module.native.permute(np.array([0, 4]), 5 * one, one, 6, out)
    for places in ([0, 5], [-1, 0]):
        with pytest.raises(ValueError, match="lies outside"):
            order_module.native.permute(np.array(places), 5 * one, one, 6, out)
    three = np.full(3, 5, np.uint64)
    for places, sizes, keys in (([0, 1, 2], 5 * one, one), ([0, 1], three, one), ([0, 1], 5 * one, three)):
        with pytest.raises(ValueError, match="wrong number of bytes"):
            order_module.native.permute(np.array(places), sizes, keys, 6, out)


def test_permute_mixes_evenly():
    # each of 8 items lands in each of 8 places about as often: chi-square with 49 degrees of freedom, 99.99% is 93
    counts = np.zeros((8, 8))
    trials = 4000
    for key in range(trials):
        counts[np.arange(8), permute(np.arange(8), np.int64(8), hash_words(key))] += 1
    chi_square = ((counts - trials / 8) ** 2 / (trials / 8)).sum()
    assert chi_square < 93


def test_neighbours_in_a_shard_do_not_stay_neighbours():
    order = Order(np.full(4, 1000), 100, 5)
    samples = order.sample_at(0, np.arange(4000))
    assert (np.abs(np.diff(samples)) == 1).sum() < 10  # 2 are expected of a random order
    assert abs(np.corrcoef(np.arange(4000), samples)[0, 1]) < 0.06


def test_mix_is_splitmix64():
    # the first outputs of splitmix64 seeded with 1234567, as published with the generator (Vigna, public domain)
    state, golden, outputs = 1234567, 0x9E3779B97F4A7C15, []
    for _ in range(3):
        state = (state + golden) & (2**64 - 1)
        outputs.append(int(mix(np.array([state], np.uint64))[0]))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_differ_by_seed_epoch_and_sample():
    keys = {int(key) for seed in range(3) for epoch in range(3) for key in sample_keys(seed, np.full(50, epoch), np.arange(50))}
    assert len(keys) == 3 * 3 * 50


def test_a_keys_sign_alternates_and_says_nothing_of_its_draws():
    first, second, third = (sample_keys(5, np.full(20_000, epoch), np.arange(20_000)) for epoch in range(3))
    assert ((first < 0) != (second < 0)).all() and ((first < 0) == (third < 0)).all()
    assert 9_700 < (first < 0).sum() < 10_300
    assert len({*first, *second, *third}) == 60_000
    for draw in range(3):
        draws = uniform(first, draw)
        assert abs(draws[first < 0].mean() - draws[first >= 0].mean()) < 0.02


def test_draws_are_uniform_and_independent():
    keys = sample_keys(0, np.zeros(20_000, np.int64), np.arange(20_000))
    first, second = uniform(keys, 0), uniform(keys, 1)
    assert first.dtype == np.float32 and first.min() >= 0 and first.max() < 1
    assert abs(first.mean() - 0.5) < 0.01 and abs(first.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


@pytest.mark.parametrize("samples, world_size", [(10, 3), (2, 4), (0, 2), (360, 1)])
def test_evaluation_shares_hold_every_sample_once(samples, world_size):
    shares = [evaluation_share(samples, rank, world_size) for rank in range(world_size)]
    assert [s for share in shares for s in share] == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot take an equal part"):
        rank_share(10, 0, 3)
    with pytest.raises(ValueError, match="no stream from 0 samples"):
        Order(np.array([0]), 4)
    with pytest.raises(ValueError, match="batches of 0"):
        Order(np.array([5]), 0)


def test_threads_that_are_epochs_apart_share_an_order():
    from concurrent.futures import ThreadPoolExecutor

    order = Order(np.array([2, 1]), 7)  # several epochs a batch
    expected = [Order(np.array([2, 1]), 7).global_batch(step)[0].tolist() for step in range(300)]
    with ThreadPoolExecutor(8) as pool:
        assert [samples.tolist() for samples, _ in pool.map(order.global_batch, range(300))] == expected


@pytest.mark.parametrize("shards, batch, window, lanes", GRIDS)
def test_steps_worked_out_together_are_those_worked_out_one_by_one(shards, batch, window, lanes):
    order = Order(np.array(shards), batch, 3, window, lanes)
    samples, epochs = order.global_batches(5, 9)
    for place in range(9):
        alone = order.global_batches(5 + place, 1)
        assert (alone[0][0] == samples[place]).all() and (alone[1][0] == epochs[place]).all()
        assert (order.global_batch(5 + place)[0] == samples[place]).all()


def test_a_batch_that_is_written_to_does_not_change_the_order():
    order = Order(np.array([300]), 10)
    before = order.global_batch(3)[0].tolist()
    order.rank_batch(3, 0, 1)[0][:] = 0
    assert order.global_batch(3)[0].tolist() == before


def test_the_order_is_the_one_of_earlier_versions():
    # recorded when the order was first published: a run of an earlier version goes on with the same batches
    found = [Order(np.array([40, 30, 50]), 6, 7, window, lanes).global_batch(41)[0].tolist()
             for window, lanes in ((16, 0), (1, 3))]  # fmt: skip
    assert found == [[103, 71, 10, 89, 104, 24], [59, 7, 10, 37, 104, 90]]
