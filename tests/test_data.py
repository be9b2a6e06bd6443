"""The stream: the same batches on any number of ranks and threads, from any step; the pixels as well."""

import errno
import io
import itertools
import os
import resource
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import take, wait_for
from PIL import Image

from dist_train import open_stream
from dist_train.augment import Augment
from dist_train.boxes import central_boxes
from dist_train.config import AugmentConfig, DataConfig, RunConfig
from dist_train.data import open_evaluation, picture_size, to_device
from dist_train.errors import UserError
from dist_train.folds import fold_view
from dist_train.index import load_index
from dist_train.order import sample_keys
from dist_train.sizes import input_size
from dist_train.store import MAX_FILES, Store


def test_an_epoch_holds_every_sample_once_with_its_label(digits):
    split = load_index(digits).split("train")
    steps = -(-split.num_samples // 64)
    batches = take(open_stream(digits, batch_size=64, threads=2), steps)
    first_epoch = [(s, label) for b in batches for s, label, e in zip(
        b.samples.tolist(), b.labels.tolist(), b.epochs.tolist(), strict=True) if e == 0]  # fmt: skip
    assert sorted(s for s, _ in first_epoch) == list(range(split.num_samples))
    assert all(split.table()["label"][s] == label for s, label in first_epoch)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_and_the_start_do_not_change_the_stream(digits, threads):
    reference = take(open_stream(digits, batch_size=32, threads=1, seed=5), 12)
    for start in (0, 7):
        for batch, expected in zip(open_stream(digits, batch_size=32, threads=threads, seed=5, start_step=start, stop_step=12),
                                   reference[start:], strict=True):  # fmt: skip
            assert batch.step == expected.step and batch.keys == expected.keys
            assert torch.equal(batch.images, expected.images) and torch.equal(batch.random_keys, expected.random_keys)


@pytest.mark.parametrize("folds", [0, 3])
def test_keys_are_those_of_seed_epoch_and_stored_sample(digits, folds):
    index = fold_view(load_index(digits), RunConfig(data=DataConfig(folds=folds, fold=1)))
    steps = -(-3 * index.split("train").num_samples // 300)
    seen = set()
    for batch in open_stream(index, batch_size=300, seed=5, stop_step=steps):
        expected = sample_keys(5, batch.epochs.numpy(), batch.samples.numpy())
        assert batch.random_keys.tolist() == expected.tolist()
        seen |= set(zip(batch.epochs.tolist(), batch.samples.tolist(), strict=True))
    stored = index.split("train").stored_numbers(np.arange(index.split("train").num_samples))
    assert seen >= {(epoch, sample) for epoch in range(3) for sample in stored.tolist()}


def test_keys_are_those_of_earlier_versions():
    # recorded when alternating flips came: a run of an earlier version goes on with the same pixels
    assert sample_keys(5, np.array([0, 0, 1, 7]), np.array([0, 1, 1, 123_456])).tolist() == [
        5176792510916737790, 6032028369837909555, -2288390804231252769, 751969440377056951]  # fmt: skip


def test_augmented_pixels_are_the_same_on_one_rank_and_on_two(digits):
    index = load_index(digits)
    augment = Augment(AugmentConfig(crop="random_resized", flip=0.5, rotate_degrees=15, brightness=0.2, erase=0.5), (16, 16),
                      index.mean, index.std, torch.device("cpu"))  # fmt: skip
    whole = take(open_stream(digits, batch_size=32), 3)
    halves = [take(open_stream(digits, batch_size=32, world=(rank, 2)), 3) for rank in range(2)]
    resumed = next(open_stream(digits, batch_size=32, start_step=2))
    for step, batch in enumerate(whole):
        pixels = augment(batch.images, batch.random_keys)
        parts = [augment(half[step].images, half[step].random_keys) for half in halves]
        assert torch.equal(torch.cat(parts), pixels)
    assert torch.equal(augment(resumed.images, resumed.random_keys), pixels)


def test_the_decoders_random_crop_is_keyed_too(digits):
    whole = next(open_stream(digits, batch_size=16, image_size=12, crop="random_resized"))
    halves = [next(open_stream(digits, batch_size=16, image_size=12, crop="random_resized", world=(r, 2))) for r in range(2)]
    assert whole.images.shape == (16, 3, 12, 12) and whole.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
    plain = next(open_stream(digits, batch_size=16, image_size=12, crop="resize"))
    assert not torch.equal(plain.images, whole.images)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_reads_every_sample_once(digits, world_size):
    index = load_index(digits)
    samples = [s for rank in range(world_size) for batch in open_evaluation(index, "test", 50, 8, world=(rank, world_size))
               for s in batch.samples.tolist()]  # fmt: skip
    assert samples == list(range(index.split("test").num_samples))


def test_the_threads_end_with_the_stream(digits):
    of_others = set(threading.enumerate())
    stream = open_stream(digits, batch_size=32, threads=3)
    next(stream)
    threads = set(threading.enumerate()) - of_others
    assert sum(thread.name.startswith("decode") for thread in threads) == 3
    stream.close()
    wait_for(lambda: not any(thread.is_alive() for thread in threads), "the end of its threads", 5)


def test_batches_ahead_are_bounded_by_memory(digits):
    opened = open_stream(digits, batch_size=1024, image_size=64, threads=2, prefetch_mb=25)  # 12 MB a batch
    next(opened)
    assert len(opened.gi_frame.f_locals["groups"].gi_frame.f_locals["pending"]) <= 2
    opened.close()


def test_a_batch_too_large_for_one_a_thread_is_decoded_by_several(digits, copied):
    large = open_stream(digits, batch_size=1000, image_size=48, threads=5, prefetch_mb=10, stop_step=4)  # 6.6 MB a batch
    small = open_stream(digits, batch_size=1000, image_size=48, threads=1, prefetch_mb=100, stop_step=4)
    for one, other in zip(large, small, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert {thread.name.split("_")[0] for thread in threading.enumerate()} >= {"decode", "decode-part"}
    split = load_index(copied).split("train")
    row = split.table()[700]
    path = copied / split.files[split.shard_of(np.array([700]))[0]]
    damaged = bytearray(path.read_bytes())
    damaged[int(row["offset"]) + 20] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="checksum differs from the index.*train/00000700 at byte"):
        take(open_stream(copied, batch_size=1000, image_size=48, threads=5, prefetch_mb=10), 2)


def test_to_device_keeps_the_order(digits):
    batches = list(to_device(open_stream(digits, batch_size=64, stop_step=5), torch.device("cpu")))
    assert [b.step for b in batches] == list(range(5))


def test_too_few_open_files_are_asked_for_and_then_named(digits, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        store = Store(load_index(digits).split("train"))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, MAX_FILES), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def refuse(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"Too many open files.\n  Ask for more \(ulimit -Hn\), or lower data.window_shards"):
        store.payload(0)


def test_a_flipped_bit_stops_the_stream_with_the_sample_named(copied):
    split = load_index(copied).split("train")
    row = split.table()[3]
    path = copied / split.files[0]
    damaged = bytearray(path.read_bytes())
    damaged[int(row["offset"]) + 20] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="checksum differs from the index.*train/00000003 at byte"):
        take(open_stream(copied, batch_size=64), 30)
    with pytest.raises(UserError, match="checksum differs"):
        Store(split).payload(3)


def test_a_shard_of_another_size_or_none_is_named(copied):
    split = load_index(copied).split("train")
    path = copied / split.files[0]
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=f"{path}: the shard has .* bytes, the index says"):
        take(open_stream(copied, batch_size=64), 30)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: cannot open the shard: No such file"):
        take(open_stream(copied, batch_size=64), 30)


def test_a_shard_truncated_under_a_running_stream_is_an_error_not_a_crash(copied):
    stream = open_stream(copied, batch_size=16, threads=1, prefetch_mb=0)
    next(stream)
    for name in load_index(copied).split("train").files:
        os.truncate(copied / name, 600)
    with pytest.raises(UserError, match="truncated"):
        take(stream, 200)


@pytest.mark.parametrize("options, complaint", [
    ({"split": "dev"}, "there is no split 'dev'"),
    ({"batch_size": 9, "world": (0, 2)}, "cannot take an equal part"),
    ({"crop": "middle"}, "expected random_resized or resize"),
    ({"interpolation": "lanczos"}, "interpolation is 'lanczos'; expected bilinear or bicubic"),
    ({"shards": "nowhere"}, "no such folder"),
    ({"threads": -1}, "data.threads is -1"),
    ({"image_size": -8}, "data.image_size is -8"),
])  # fmt: skip
def test_what_cannot_be_streamed_is_refused(digits, options, complaint):
    with pytest.raises(UserError, match=complaint):
        next(open_stream(**{"shards": digits} | options))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_whole_pictures_and_middles_are_resized_as_asked(photos, interpolation):
    index, how = load_index(photos), Image.Resampling[interpolation.upper()]
    store = Store(index.split("train"))

    def expected(sample: int, share: float) -> np.ndarray:
        picture = Image.open(io.BytesIO(store.payload(sample)))
        box = central_boxes([picture.height], [picture.width], (32, 32), share)[0] if share else (0, 0, *picture.size[::-1])
        top, left, height, width = box
        return np.asarray(picture.resize((32, 32), how, (left, top, left + width, top + height)))

    batch = next(open_stream(index, batch_size=8, image_size=32, threads=1, interpolation=interpolation))
    middles = next(open_evaluation(index, "train", 8, 32, 0.875, 1, interpolation=interpolation))
    for found, share in ((batch, 0.0), (middles, 0.875)):
        pixels = found.images.permute(0, 2, 3, 1).numpy().astype(int)
        assert max(np.abs(pixels[i] - expected(sample, share)).max() for i, sample in enumerate(found.samples.tolist())) <= 2


@pytest.mark.parametrize("stored, features, image_size, expected", [
    ((8, 6), None, 0, (8, 6)), ((8, 6), None, 32, (32, 32)), (None, None, 32, (32, 32)), (None, ["a", "b"], 32, None),
    (None, None, 0, "x: the pictures differ in size.*--data.image_size 224"), ((8, 6), None, -1, "image_size is -1; expected"),
])  # fmt: skip
def test_pictures_have_one_size_from_the_decoder_to_the_network(stored, features, image_size, expected):
    index = SimpleNamespace(folder="x", image_size=stored, features=features)
    config = RunConfig(data=DataConfig(image_size=image_size))
    if isinstance(expected, str):
        for size in (lambda: picture_size(index, image_size), lambda: input_size(config, index)):
            with pytest.raises(UserError, match=expected):
                size()
    else:
        assert picture_size(index, image_size) == input_size(config, index) == expected


def test_more_open_shards_than_the_limit_are_closed_and_opened_again(digits, monkeypatch):
    from dist_train import store

    reference = next(open_stream(digits, batch_size=64, cache="none")).images
    monkeypatch.setattr(store, "MAX_OPEN", 1)
    before = len(os.listdir("/proc/self/fd"))
    stream = open_stream(digits, batch_size=64, threads=1, cache="none")
    assert torch.equal(next(stream).images, reference)
    stream.close()
    # a batch in the making holds the shards it reads
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 4, "the shards to be closed", 10)


def test_importing_the_package_is_light():
    import subprocess
    import sys

    code = "import sys, dist_train; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_table_rows_come_as_stored(table):
    index = load_index(table)
    batch = next(open_stream(index, batch_size=32))
    assert batch.images.dtype == torch.float32 and batch.images.shape == (32, len(index.features))
    import sklearn.datasets

    rows = {tuple(np.float32(row)) for row in sklearn.datasets.load_breast_cancer().data}
    assert all(tuple(row) in rows for row in batch.images.numpy())


OPEN_MANY = """
import json, resource, sys, time
from pathlib import Path
import torch
from dist_train import open_stream
used, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
stream = open_stream(sys.argv[1], batch_size=1024, image_size=64, start_step=500)
seconds, used = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
began = time.process_time()
json.dumps(json.loads(Path(sys.argv[1], "index.json").read_text()), sort_keys=True)
print(seconds / (time.process_time() - began), used / 1024)
"""


def test_a_hundred_thousand_shards_are_open_in_three_readings_of_their_json_and_200_mb(tmp_path):
    import subprocess
    import sys

    from dist_train.index import SAMPLE, ShardIndex, SplitIndex, save_index

    num_shards, rows = 100_000, np.zeros(1_000_000, SAMPLE)
    np.save(tmp_path / "train.samples.npy", rows)
    split = SplitIndex(
        "train", str(tmp_path), [f"train-{k:06d}.tar" for k in range(num_shards)], np.full(num_shards, 10),
        np.full(num_shards, 10_240), [f"{k:032x}" for k in range(num_shards)], np.array([len(rows)]),
    )  # fmt: skip
    save_index(ShardIndex(str(tmp_path), "many", ["a", "b"], {"train": split}, [0.5] * 3, [0.2] * 3))
    command = [sys.executable, "-c", OPEN_MANY, str(tmp_path)]
    readings, megabytes = map(float, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert readings < 3 and megabytes < 200  # its checksum takes a reading and a writing: one


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its memory from Linux's /proc")
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_memory_stays_flat_over_ten_epochs(digits, cache):
    def megabytes() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    steps = -(-load_index(digits).split("train").num_samples // 128)
    stream = open_stream(digits, batch_size=128, image_size=48, threads=2, prefetch_mb=4, cache=cache)
    take(stream, 3 * steps)
    before = megabytes()
    take_each = sum(len(batch) for batch in itertools.islice(stream, 7 * steps))
    assert take_each == 7 * steps * 128
    assert megabytes() - before < 15  # an epoch is 10 MB of pixels
