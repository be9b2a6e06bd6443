"""Kept samples: the same pixels from memory, a file and a device; one copy a machine; nothing left behind by a crash."""

import fcntl
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import sharded, take
from test_sources import picture

from dist_train import cache, decode, decoded_file, loader, open_stream
from dist_train.cache import DecodedCache, Rows, available_bytes
from dist_train.data import open_evaluation, to_device
from dist_train.errors import UserError
from dist_train.index import load_index

MODES = ("memory", "disk", "device")


def put(path: Path, content: bytes) -> None:
    """Another file under the same name: a thread of an earlier stream may still read from the old one's mapping."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def assert_equal(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert (batch.step, batch.keys) == (other.step, other.keys)
        assert torch.equal(batch.images, other.images) and torch.equal(batch.labels, other.labels)
        assert batch.images.stride() == other.images.stride() and torch.equal(batch.random_keys, other.random_keys)


def count_decoded(monkeypatch) -> list[int]:
    """Samples of every call of the decoder from now on, but for threads of streams that an earlier test let go."""
    counted, of_others = [], set(threading.enumerate())

    def counting(fds, *rest):
        if threading.current_thread() not in of_others:
            counted.append(len(fds))
        return decode.decode_from_files(fds, *rest)

    monkeypatch.setattr(loader, "decode_from_files", counting)
    return counted


@pytest.mark.parametrize("size", [0, 12])
@pytest.mark.parametrize("mode", MODES)
def test_the_stream_is_the_same_from_the_cache(digits, tmp_path, mode, size):
    options = {"batch_size": 100, "image_size": size, "seed": 3, "threads": 2}
    expected = take(open_stream(digits, cache="none", **options), 40)  # almost three epochs
    kept = DecodedCache(mode, folder=str(tmp_path))
    assert_equal(take(open_stream(digits, cache=kept, **options), 40), expected)
    assert_equal(take(open_stream(digits, cache=kept, start_step=23, **options), 17), expected[23:])
    halves = [take(open_stream(digits, cache=kept, world=(rank, 2), **options), 40) for rank in range(2)]
    for left, right, whole in zip(*halves, expected, strict=True):
        assert torch.equal(torch.cat([left.images, right.images]), whole.images)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_batches_that_are_held_keep_their_pixels_and_memory_is_used_again(digits, tmp_path, mode):
    """From a whole cache several batches come of one call and one piece of memory."""
    kept = DecodedCache(mode, folder=str(tmp_path))
    options = {"batch_size": 64, "seed": 5, "threads": 2}
    expected = take(open_stream(digits, cache="none", **options), 120)
    take(open_stream(digits, cache=kept, **options), 30)  # more than an epoch
    stream = open_stream(digits, cache=kept, **options)
    held = take(stream, 7)
    assert_equal(held, expected[:7])
    assert len({batch.images.untyped_storage().data_ptr() for batch in held}) < 7
    parts = [(batch.images[3:5], batch.images.numpy()[1]) for batch in held]
    values = [(images.clone(), array.copy()) for images, array in parts]
    del held
    places = set()
    for batch, other in zip(itertools.islice(stream, 113), expected[7:], strict=True):
        assert torch.equal(batch.images, other.images)
        places.add(batch.images.untyped_storage().data_ptr())
    assert len(places) < 60
    for (images, array), (old_images, old_array) in zip(parts, values, strict=True):
        assert torch.equal(images, old_images) and (array == old_array).all()
    assert [b.step for b in take(open_stream(digits, cache=kept, start_step=3, stop_step=12, **options), 99)] == [*range(3, 12)]


def test_without_ordered_memory_each_process_has_a_copy(digits, monkeypatch):
    monkeypatch.setattr(decode, "native", None)
    monkeypatch.setattr(cache.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(cache, "_Meeting", None)  # is not to be called
    assert len(take(open_stream(digits, batch_size=64, cache="memory"), 3)) == 3


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_decoded_twice(digits, tmp_path, mode, monkeypatch):
    counted = count_decoded(monkeypatch)
    kept, num_samples = DecodedCache(mode, folder=str(tmp_path)), load_index(digits).split("train").num_samples
    one_thread = {"batch_size": num_samples, "cache": kept, "threads": 1, "prefetch_mb": 0}
    # a device has a batch once it is gathered, and one that is read ahead may be begun before: there is none here
    take(open_stream(digits, stop_step=1 if mode == "device" else None, **one_thread), 4)
    assert sum(counted) == num_samples
    take(open_stream(digits, **one_thread), 4)
    take(open_evaluation(load_index(digits), "train", 100, cache=kept), 99)
    assert sum(counted) == num_samples


@pytest.mark.parametrize("mode", MODES)
def test_the_evaluation_is_the_same_from_the_cache(digits, tmp_path, mode):
    index, kept = load_index(digits), DecodedCache(mode, folder=str(tmp_path))
    expected = list(open_evaluation(index, "test", 50))
    for _ in range(2):
        assert_equal(to_device(open_evaluation(index, "test", 50, cache=kept), torch.device("cpu")), expected)


def test_rows_of_tables_are_kept_too(table, tmp_path):
    expected = take(open_stream(table, batch_size=64, cache="none"), 20)
    for mode in ("auto", *MODES):
        kept = DecodedCache(mode, folder=str(tmp_path / "cache"))
        assert_equal(take(open_stream(table, batch_size=64, cache=kept), 20), expected)
        assert all(rows is not None for rows in kept._rows.values())


def test_central_crops_of_different_rules_are_kept_apart(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(24):
        picture(tmp_path / "raw" / "ab"[k % 2] / f"{k}.png", k, rng.integers(10, 40, 2))
    index, kept = load_index(sharded(tmp_path / "out", "--path", str(tmp_path / "raw"))), DecodedCache("memory")
    for crop in (0.875, 0.5, 0.0, 0.875):
        expected = list(open_evaluation(index, "train", 8, 16, crop))
        assert_equal(open_evaluation(index, "train", 8, 16, crop, cache=kept), expected)
    assert len(kept._rows) == 3


def test_a_row_that_comes_while_the_missing_are_sought_does_not_make_a_set_whole():
    class Present(np.ndarray):
        """Marks of rows, of which another process sets the very one that was found missing."""

        def argmin(self, *more):
            place = super().argmin(*more)
            self[place] = 1
            return place

    wanted = SimpleNamespace(shape=(4,), dtype=torch.uint8, num_bytes=20)
    present = np.zeros(5, np.uint8).view(Present)
    rows = Rows(wanted, np.zeros((5, 4), np.uint8), present)
    present[0] = 1
    assert not rows.is_full and present.tolist() == [1, 1, 0, 0, 0]
    asked = [rows.is_full for _ in range(5)]
    assert asked == [False, False, True, True, True]


def test_the_gather_is_numpys_take_with_and_without_the_native_core(digits, monkeypatch):
    expected = take(open_stream(digits, batch_size=64, cache="memory"), 50)
    monkeypatch.setattr(decode, "native", None)
    assert_equal(take(open_stream(digits, batch_size=64, cache="memory"), 50), expected)


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
@pytest.mark.parametrize("row_bytes", [1, 48, 3072, 3080, 12_288])
@pytest.mark.parametrize("num_bytes", [2**20, 2**22])  # of the whole call: below and above what is stored past the cache
def test_the_gather_is_numpys_take_at_every_size(row_bytes, num_bytes):
    rng = np.random.default_rng(row_bytes)
    rows = rng.integers(0, 256, (300, row_bytes), np.uint8)
    samples = rng.integers(0, 300, num_bytes // row_bytes)
    memory = np.full(len(samples) * row_bytes + 64, 7, np.uint8)
    for shift in (0, 1):  # of the output from a multiple of 16 bytes
        start = -memory.ctypes.data % 16 + shift
        out = memory[start : start + len(samples) * row_bytes].reshape(-1, row_bytes)
        decode.native.gather(rows, row_bytes, samples, out)
        assert (out == rows[samples]).all()
        assert (memory[:start] == 7).all() or shift
        out[:] = 7
        assert (memory == 7).all()


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
def test_the_gather_refuses_what_lies_outside():
    rows, out = np.arange(40, dtype=np.uint8).reshape(10, 4), np.zeros((2, 4), np.uint8)
    decode.native.gather(rows, 4, np.array([9, 0]), out)
    assert out.tolist() == rows[[9, 0]].tolist()
    for samples, into, row_bytes in (([10, 0], out, 4), ([-1, 0], out, 4), ([1], out, 4), ([1, 2], out, 0), ([1, 2], out, 3)):
        with pytest.raises(ValueError, match="wrong number of bytes"):
            decode.native.gather(rows, row_bytes, np.array(samples), into)


def test_a_bad_sample_is_named_at_its_first_reading(copied):
    split = load_index(copied).split("train")
    path = copied / split.files[0]
    damaged = bytearray(path.read_bytes())
    damaged[int(split.table()[3]["offset"]) + 20] ^= 4
    put(path, damaged)
    for mode in ("memory", "device"):
        with pytest.raises(UserError, match="checksum differs from the index.*train/00000003 at byte"):
            take(open_stream(copied, batch_size=64, cache=mode), 30)
    with pytest.raises(UserError, match="checksum differs from the index.*train/00000003 at byte"):
        take(open_stream(copied, batch_size=64, cache=DecodedCache("disk", folder=str(copied / "cache"))), 1)
    assert not list((copied / "cache").glob("*.npy"))


def test_a_file_is_numpys_is_used_again_and_written_again_when_damaged(digits, tmp_path, capfd):
    def stream(verify=True):
        return take(open_stream(digits, batch_size=64, cache=DecodedCache("disk", folder=str(tmp_path), verify=verify)), 30)

    expected = stream()
    assert "decoding 1,4" in capfd.readouterr().err
    (path,) = tmp_path.glob("decoded-*.npy")
    assert np.load(path).shape == (load_index(digits).split("train").num_samples, 8, 8, 3)
    made = path.stat().st_ino
    assert_equal(stream(), expected)
    assert path.stat().st_ino == made and capfd.readouterr().err == ""
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    put(path, damaged)
    assert_equal(stream(), expected)
    assert "decoding" in capfd.readouterr().err
    put(path, path.read_bytes()[:-50])
    assert_equal(stream(verify=False), expected)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_what_was_kept_bilinear_does_not_serve_bicubic(digits, tmp_path, mode):
    def first(kept, interpolation, **size):
        return next(open_stream(digits, batch_size=64, threads=1, cache=kept, interpolation=interpolation, **size)).images.clone()

    def kept():
        return DecodedCache(mode, folder=str(tmp_path))

    caches = [kept(), kept()]  # both held: memory is found by its key
    found = [first(cache, how, image_size=16) for cache, how in zip(caches, ("bilinear", "bicubic"), strict=True)]
    assert torch.equal(found[0], first("none", "bilinear", image_size=16))
    assert torch.equal(found[1], first("none", "bicubic", image_size=16)) and not torch.equal(*found)
    if mode == "disk":
        for interpolation in ("bilinear", "bicubic"):
            first(kept(), interpolation)  # at the stored size nothing is resized: one file for both
        assert len(list(tmp_path.glob("decoded-*.npy"))) == 3


def test_decoded_files_stay_below_the_limit_and_the_oldest_go_first(digits, tmp_path, capfd):
    split = load_index(digits).split("train")

    def opened(size, disk_gb):
        kept = DecodedCache("disk", folder=str(tmp_path), disk_gb=disk_gb)
        return next(open_stream(digits, batch_size=8, image_size=size, cache=kept))

    fits_two = split.num_samples * 3 * (16**2 + 12**2) / 1e9 + 1e-6
    opened(16, fits_two)
    opened(12, fits_two)
    opened(16, fits_two)  # used again: now the file of 12 px is the older one
    held = opened(12, fits_two)
    expected = held.images.clone()
    opened(16, fits_two)
    opened(10, fits_two)
    sizes = sorted(path.stat().st_size // (split.num_samples * 3) for path in tmp_path.glob("decoded-*.npy"))
    assert sizes == [10**2, 16**2]
    assert torch.equal(held.images, expected)
    capfd.readouterr()
    opened(16, fits_two)
    assert "decoding" not in capfd.readouterr().err
    with pytest.raises(UserError, match="data.cache_gb"):
        opened(20, 1e-6)


def test_what_a_crash_left_of_decoded_files_is_removed_and_what_is_being_written_is_counted(digits, tmp_path):
    split = load_index(digits).split("train")
    row = split.num_samples * 3 / 1e9

    def open_file(size, disk_gb=1.0):
        next(open_stream(digits, batch_size=8, image_size=size, cache=DecodedCache("disk", folder=str(tmp_path), disk_gb=disk_gb)))

    open_file(16)
    left, written = tmp_path / "decoded-left.partial", tmp_path / "decoded-written.partial"
    for partial in (left, written):
        partial.write_bytes(bytes(split.num_samples * 3 * 100))
    with open(written.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_file(8, row * (16**2 + 8**2) + 1e-6)
        assert not left.exists() and written.exists()
        assert len(list(tmp_path.glob("decoded-*.npy"))) == 1, "that of 16 px had to make room for the one being written"


def test_a_decoded_file_that_goes_before_it_is_mapped_is_written_again(digits, tmp_path, monkeypatch):
    kept, is_whole, gone = {"batch_size": 64, "image_size": 8}, decoded_file._is_whole, []

    def goes_once_proven(path, *more):
        found = is_whole(path, *more)
        if found and not gone:
            gone.append(path)
            path.unlink()
        return found

    expected = take(open_stream(digits, **kept, cache=DecodedCache("disk", folder=str(tmp_path))), 30)
    monkeypatch.setattr(decoded_file, "_is_whole", goes_once_proven)
    assert_equal(take(open_stream(digits, **kept, cache=DecodedCache("disk", folder=str(tmp_path))), 30), expected)
    assert gone


def test_what_does_not_fit_is_refused_with_both_numbers(digits, monkeypatch, tmp_path):
    assert 10_000_000 < available_bytes() < 1 << 50
    size = {"image_size": 128, "batch_size": 8}  # 1,437 pictures: 70 MB
    monkeypatch.setattr(cache, "available_bytes", lambda: 10_000_000)
    for mode in ("memory", "device"):
        with pytest.raises(UserError, match=r"the train split takes 0.07 GB decoded, and 0.01 GB are free"):
            open_stream(digits, cache=mode, **size)
    monkeypatch.setattr(decoded_file.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10_000_000))
    with pytest.raises(UserError, match=r"0.07 GB decoded, and 0.01 GB are free in"):
        open_stream(digits, cache=DecodedCache("disk", folder=str(tmp_path)), **size)
    auto = DecodedCache("auto")
    assert len(take(open_stream(digits, cache=auto, **size), 3)) == 3 and list(auto._rows.values()) == [None]
    monkeypatch.undo()
    small = DecodedCache("auto", auto_gb=0.0003)  # room for the training split, not for both
    take(open_stream(digits, cache=small), 1), take(open_evaluation(load_index(digits), "test", 50, cache=small), 1)
    assert [rows is not None for rows in small._rows.values()] == [True, False]
    (meeting,) = [rows._keep_open for rows in small._rows.values() if rows]
    gone = weakref.ref(meeting)
    del small, meeting
    deadline = time.monotonic() + 10
    while gone() and time.monotonic() < deadline:  # a batch in the making may hold it a moment longer
        gc.collect()
    assert gone() is None


@pytest.mark.parametrize("options, complaint", [
    ({"cache": "ram"}, "data.cache is 'ram'; expected auto, none, memory, disk or device"),
    ({"cache": "memory", "crop": "random_resized", "image_size": 12}, "another in every epoch"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(digits, options, complaint):
    with pytest.raises(UserError, match=complaint):
        open_stream(digits, **options)


CHILD = """
import itertools, sys, time
from dist_train import open_stream
stream = open_stream(sys.argv[1], batch_size=64, threads=1, cache="memory")
print(float(sum(b.images.double().sum() for b in itertools.islice(stream, 46))), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")
def test_processes_share_one_copy_and_a_killed_one_leaves_no_memory(copied, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(copied)], stdout=subprocess.PIPE, text=True)
    try:
        total = float(child.stdout.readline())
        opened = [os.readlink(link) for link in Path(f"/proc/{child.pid}/fd").iterdir()]
        (name,) = {link.removeprefix("/memfd:").partition(" ")[0] for link in opened if link.startswith("/memfd:dist_train-")}
        assert Path("/dev/shm", name).stat().st_size < 100  # where the memory is to be found, and not the memory
        kept = DecodedCache("memory")
        stream = open_stream(copied, batch_size=64, cache=kept)
        for file in copied.glob("*.tar"):
            file.unlink()  # what the child has decoded is all there is
        assert float(sum(b.images.double().sum() for b in itertools.islice(stream, 46))) == total
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with pytest.raises(UserError, match="cannot open the shard"):  # once nobody holds it, the memory is gone
        stream.close()
        del stream
        kept.close()
        take(open_stream(copied, batch_size=64, cache="memory"), 1)


def test_where_memory_cannot_be_shared_a_copy_of_its_own_serves(digits, monkeypatch, tmp_path):
    expected = take(open_stream(digits, batch_size=64, cache="none"), 30)
    monkeypatch.setattr(cache, "_MEETING_FOLDER", str(tmp_path / "nowhere"))
    assert_equal(take(open_stream(digits, batch_size=64, cache="memory"), 30), expected)


@pytest.mark.parametrize("mode", ["auto", "memory", "device"])
def test_the_first_batch_does_not_wait_for_the_others(digits, mode, monkeypatch):
    counted = count_decoded(monkeypatch)
    next(open_stream(digits, batch_size=32, cache=mode, threads=1, prefetch_mb=0))
    assert sum(counted) <= 64  # its own, and at most the next one's


def test_nothing_is_left_of_memory_that_was_let_go_or_never_made(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_MEETING_FOLDER", str(tmp_path))
    kept = DecodedCache("memory")
    stream = open_stream(digits, batch_size=64, cache=kept)
    assert [path.stat().st_size < 40 for path in tmp_path.iterdir()] == [True]
    stream.close()
    kept.close()
    del stream
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    open_stream(digits, batch_size=64, cache=DecodedCache("auto", auto_gb=1e-6))
    assert list(tmp_path.iterdir()) == []
