"""Conversion: whole or not at all, the same bytes however it is run, readable by WebDataset."""

import errno
import gc
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dist_train import shard
from dist_train.convert import convert
from dist_train.errors import UserError
from dist_train.index import load_index
from dist_train.partition import assign_splits, cut_into_shards, name_draws
from dist_train.pictures import PixelSums, mean_and_std
from dist_train.shard_config import ShardConfig, SplitConfig
from dist_train.tars import TarWriter, header
from dist_train.verify import inspect_main


def make_folder(root: Path, per_class=12, classes=("cats", "dogs", "owls"), size=(10, 14), seed=0) -> Path:
    """Class folders of JPEGs (and a PNG each), height x width `size`."""
    random = np.random.default_rng(seed)
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 60, (*size, 3), dtype=np.uint8) + 60 * k
            kind = "png" if i == 0 else "jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03d}.{kind}")
    return root


def config_for(tmp_path: Path, **settings) -> ShardConfig:
    defaults = {"path": str(tmp_path / "raw"), "out": str(tmp_path / "shards/set"), "split": SplitConfig(0.25, 0.25)}
    return ShardConfig(**(defaults | settings))


def all_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_reads_every_sample_with_its_label(tmp_path):
    make_folder(tmp_path / "raw")
    index = convert(config_for(tmp_path))
    seen = []
    for name, split in index.splits.items():
        urls = [str(Path(index.folder, file)) for file in split.files]
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        samples = list(dataset)
        assert [int(s["cls"]) for s in samples] == split.table()["label"].tolist()
        assert [int(s["__key__"]) for s in samples] == list(range(split.num_samples))
        for sample, raw_name in zip(samples, split.names(), strict=True):
            raw = (tmp_path / "raw" / raw_name).read_bytes()
            assert raw == sample["png" if raw_name.endswith("png") else "jpg"]  # byte for byte
            assert raw_name.startswith(index.classes[int(sample["cls"])] + "/")
            seen.append(raw_name)
        assert name in ("train", "val", "test")
    gc.collect()
    assert len(seen) == len(set(seen)) == 36
    assert index.splits["train"].num_shards == 4 and index.image_size == (10, 14)


def test_the_index_points_at_the_payloads_and_states_their_pixels_mean_and_std(tmp_path):
    make_folder(tmp_path / "raw")
    index = convert(config_for(tmp_path))
    split, pixels = index.splits["train"], []
    for sample, row in enumerate(split.table()):
        blob = Path(index.folder, split.files[split.shard_of(np.array([sample]))[0]]).read_bytes()
        payload = blob[row["offset"] :][: row["size"]]
        pixels.append(np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")))
        assert payload == (tmp_path / "raw" / split.names()[sample]).read_bytes()
        assert (row["height"], row["width"]) == pixels[-1].shape[:2]
    pixels = np.concatenate([p.reshape(-1, 3) for p in pixels]) / 255
    # simplejpeg and Pillow may come with libjpegs whose decoders differ by a grey level here and there
    np.testing.assert_allclose(index.mean, pixels.mean(0), atol=2e-3)
    np.testing.assert_allclose(index.std, pixels.std(0), atol=2e-3)


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    make_folder(tmp_path / "raw")
    convert(config_for(tmp_path, workers=1, out=str(tmp_path / "one/set")))
    convert(config_for(tmp_path, workers=2, out=str(tmp_path / "two/set")))
    monkeypatch.setattr("dist_train.convert._LARGE_PICTURE", 0)
    convert(config_for(tmp_path, workers=3, out=str(tmp_path / "threads/set")))
    assert all_bytes(tmp_path / "one/set") == all_bytes(tmp_path / "two/set") == all_bytes(tmp_path / "threads/set")
    assert not list(tmp_path.glob("*/*.partial"))


def test_headers_are_those_of_tarfile():
    for name, size in (("00000000.jpg", 0), ("12345678.cls", 1), ("123456789.npy", 8**11 - 1)):
        reference = tarfile.TarInfo(name)
        reference.size = size
        assert header(name, size) == reference.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("native", [True, False])
def test_pixel_sums_equal_the_definition_over_any_pieces(native, monkeypatch):
    if not native:
        monkeypatch.setattr("dist_train.pictures.native", None)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((1, 1), (300, 401), (7, 900), (257, 256))]
    pictures.append(np.full((1100, 1000, 3), 255, np.uint8))  # the largest sums there can be, and more than one block
    pictures.append(pictures[1][::2])  # not in one piece
    sums = PixelSums()
    for picture in pictures:
        sums.add(picture)
    flat = np.concatenate([p.reshape(-1, 3) for p in pictures]).astype(np.int64)
    totals = sums.totals()
    assert totals == [len(flat), *flat.sum(0).tolist(), *(flat**2).sum(0).tolist()]
    mean, std = mean_and_std(totals)
    np.testing.assert_allclose(mean, (flat / 255).mean(0), rtol=1e-12)
    exact = (flat / 255).astype(np.longdouble).std(0)  # in float64 numpy would add so many up less exactly
    np.testing.assert_allclose(std, exact.astype(float), rtol=1e-12)
    assert mean_and_std([4, 0, 0, 0, 0, 0, 0])[1] == [1.0, 1.0, 1.0]  # black throughout: dividing does no harm


@pytest.mark.parametrize("per_class", [1, 2, 3, 4, 10, 97])
def test_splits_are_stratified_even_where_classes_are_small(per_class):
    labels = np.repeat(np.arange(50), per_class)
    draws = name_draws([str(i) for i in range(len(labels))], seed=3)
    splits = assign_splits(labels, None, draws, val=0.2, test=0.1)
    for split, share in ((1, 0.2), (2, 0.1)):
        counts = np.bincount(labels[splits == split], minlength=50)
        assert counts.max() - counts.min() <= 1 or per_class < 4
        if per_class >= 3:
            assert abs(counts.sum() - share * len(labels)) <= 2
    assert np.bincount(labels[splits == 0], minlength=50).min() >= 1


def test_a_split_follows_seed_and_names_not_their_order():
    names, labels = [f"n{i}" for i in range(400)], np.arange(400) % 4
    splits = assign_splits(labels, None, name_draws(names, 0), 0.2, 0.2)
    flipped = assign_splits(labels[::-1], None, name_draws(names[::-1], 0), 0.2, 0.2)
    assert (splits == flipped[::-1]).all()
    assert (splits != assign_splits(labels, None, name_draws(names, 1), 0.2, 0.2)).any()
    more = assign_splits(np.append(labels, 0), None, name_draws([*names, "new"], 0), 0.2, 0.2)
    assert (more[:-1] != splits).sum() <= 2  # one file more moves few others


def test_splits_of_the_source_are_kept_and_missing_ones_come_from_training():
    labels, preset = np.arange(300) % 3, np.repeat([0, 2], [200, 100]).astype(np.int8)
    splits = assign_splits(labels, preset, name_draws([str(i) for i in range(300)], 0), val=0.1, test=0.5)
    assert (splits[200:] == 2).all() and (splits[:200] == 2).sum() == 0 and (splits[:200] == 1).sum() == 20


@pytest.mark.parametrize("parts, options, expected, told", [
    ("train val", [], {"train": 24, "val": 6}, "the source brings val, so no test split is drawn from train"),
    ("train val", ["--split.test", "0.25"], {"train": 18, "val": 6, "test": 6}, "of 24 training samples 6 are drawn as test."),
    ("train test", [], {"train": 22, "val": 2, "test": 6}, "of 24 training samples 2 are drawn as val."),
    ("train val test", [], {"train": 24, "val": 6, "test": 6}, None),
    ("train", [], {"train": 20, "val": 2, "test": 2}, "of 24 training samples 2 are drawn as val and 2 are drawn as test."),
])  # fmt: skip
def test_a_set_of_train_and_val_gets_no_test_split_unless_one_is_asked_for(tmp_path, capsys, parts, options, expected, told):
    for part in parts.split():
        make_folder(tmp_path / "raw" / part, 8 if part == "train" else 2)
    raw = tmp_path / "raw" if parts != "train" else tmp_path / "raw/train"
    shard.main(["--path", str(raw), "--out", str(tmp_path / "set"), "--workers", "1", *options])
    assert {name: split.num_samples for name, split in load_index(tmp_path / "set").splits.items()} == expected
    said = [line for line in capsys.readouterr().out.splitlines() if "drawn" in line]
    assert len(said) == (told is not None) and (told or "") in "".join(said)


def test_a_set_of_before_the_test_split_was_left_to_the_source_is_repaired(tmp_path, capsys):
    for part, count in (("train", 10), ("val", 2)):
        make_folder(tmp_path / "raw" / part, count)
    words = ["--path", str(tmp_path / "raw"), "--out", str(tmp_path / "set"), "--workers", "1"]
    shard.main([*words, "--split.test", "0.1"])
    whole = all_bytes(tmp_path / "set")
    (tmp_path / "set/train-000001.tar").unlink()
    shard.main([*words, "--repair"])
    assert all_bytes(tmp_path / "set") == whole and "written again: train-000001.tar" in capsys.readouterr().out


def test_shards_hold_every_sample_once_and_as_many_to_one():
    rows, sizes = np.arange(5, 1005), np.full(1005, 1000)
    shards = cut_into_shards(rows, name_draws([str(i) for i in range(1005)], 0), sizes, 300_000, min_shards=2)
    assert len(shards) == 9  # 1,000 x (1,024 + 1,536) bytes
    assert np.array_equal(np.sort(np.concatenate(shards)), rows) and {len(s) for s in shards} == {111, 112}
    assert len(cut_into_shards(rows[:3], name_draws(["a"] * 1005, 0), sizes, 1e9, min_shards=8)) == 3


def test_unreadable_pictures_stop_the_conversion_and_are_named(tmp_path):
    root = make_folder(tmp_path / "raw")
    (root / "cats/002.jpg").write_bytes((root / "cats/002.jpg").read_bytes()[:-40])
    (root / "dogs/003.jpg").write_bytes(b"<html>not found</html>")
    (root / "owls/004.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"max_bad allows 0(.|\n)*00[234]\.jpg: .+(.|\n)*--max-bad"):
        convert(config_for(tmp_path, split=SplitConfig(0, 0)))
    with pytest.raises(UserError, match="max_bad allows 2"):
        convert(config_for(tmp_path, split=SplitConfig(0, 0), max_bad=2))
    assert not (tmp_path / "shards/set").exists()


def test_a_set_of_which_a_sample_is_decoded_has_the_same_shards_and_nearly_the_same_mean(tmp_path):
    root = make_folder(tmp_path / "raw", per_class=200)
    every = convert(config_for(tmp_path, out=str(tmp_path / "all/set")))
    some = convert(config_for(tmp_path, out=str(tmp_path / "some/set"), check="sample"))
    assert every.splits["train"].shard_checksums == some.splits["train"].shard_checksums
    assert (every.splits["train"].table() == some.splits["train"].table()).all()
    assert every.mean != some.mean and some.source["check"] == "sample"
    np.testing.assert_allclose(every.mean, some.mean, atol=0.05)
    thumbnail = Image.open(root / "owls/003.jpg")
    exif = Image.Exif()
    exif[0x9286] = (root / "owls/003.jpg").read_bytes()  # an end marker in front of the scan
    thumbnail.save(root / "owls/004.jpg", progressive=True, exif=exif)
    bad = ("cats/002.jpg", "dogs/000.png", "owls/003.jpg", "owls/004.jpg")
    for cut, name in enumerate(bad):  # each found by its end
        (root / name).write_bytes((root / name).read_bytes()[: -2 - 20 * cut])
    with pytest.raises(UserError, match=r"max_bad allows 0"):
        convert(config_for(tmp_path, check="sample"))
    index = convert(config_for(tmp_path, check="sample", max_bad=4))
    assert {entry["name"] for entry in index.left_out} == set(bad)


def test_a_sample_without_a_good_picture_gives_no_mean(tmp_path):
    root = make_folder(tmp_path / "raw", per_class=1, classes=("a", "b"))
    every = convert(config_for(tmp_path, split=SplitConfig(0, 0), min_shards=1))
    first = every.splits["train"].names()[0]
    (root / first).write_bytes((root / first).read_bytes()[:60])
    with pytest.raises(UserError, match="--check sample decodes none is good"):
        convert(config_for(tmp_path, split=SplitConfig(0, 0), min_shards=1, check="sample", max_bad=1, overwrite=True))


@pytest.mark.parametrize("workers", [1, 2, "threads"])
def test_unreadable_pictures_within_max_bad_are_left_out_and_listed(tmp_path, workers, monkeypatch):
    if workers == "threads":
        monkeypatch.setattr("dist_train.convert._LARGE_PICTURE", 0)
        workers = 3
    root = make_folder(tmp_path / "raw")
    for name in ("cats/002.jpg", "dogs/000.png"):
        (root / name).write_bytes((root / name).read_bytes()[:-60])
    index = convert(config_for(tmp_path, max_bad=2, workers=workers))
    assert {entry["name"] for entry in index.left_out} == {"cats/002.jpg", "dogs/000.png"}
    assert all(entry["why"] for entry in index.left_out)
    names = [name for split in index.splits.values() for name in split.names()]
    assert len(names) == 34 and not {"cats/002.jpg", "dogs/000.png"} & set(names)
    for split in index.splits.values():
        assert [index.classes[k] for k in split.table()["label"]] == [name.split("/")[0] for name in split.names()]


def test_a_decompression_bomb_is_refused(tmp_path):
    root = make_folder(tmp_path / "raw")
    blob = bytearray((root / "cats/000.png").read_bytes())
    blob[16:24] = struct.pack(">II", 40_000, 30_000)
    blob[29:33] = struct.pack(">I", zlib.crc32(blob[12:29]))
    (root / "cats/bomb.png").write_bytes(blob)
    with pytest.raises(UserError, match=r"cats/bomb.png: .*30000 x 40000"):
        convert(config_for(tmp_path))


def test_a_finished_set_is_kept_until_its_replacement_is_whole(tmp_path):
    make_folder(tmp_path / "raw")
    index = convert(config_for(tmp_path))
    before = all_bytes(index.folder)
    with pytest.raises(UserError, match="--overwrite true"):
        convert(config_for(tmp_path))
    broken = tmp_path / "raw/cats/000.png"
    broken.write_bytes(b"broken")
    with pytest.raises(UserError, match="cats/000.png"):
        convert(config_for(tmp_path, overwrite=True))
    assert all_bytes(index.folder) == before
    broken.unlink()
    again = convert(config_for(tmp_path, overwrite=True))
    assert sum(split.num_samples for split in again.splits.values()) == 35
    assert sorted(os.listdir(tmp_path / "shards")) == ["set"]


def test_what_inspect_draws_is_replaced_with_the_set(tmp_path):
    rows = "".join(f"{i % 7},{i * i},{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "t.csv").write_text(f"x,y,kind\n{rows}")
    settings = {"source": "csv", "path": str(tmp_path / "t.csv"), "target": "kind", "out": str(tmp_path / "set")}
    convert(ShardConfig(**settings))
    inspect_main([settings["out"]])
    drawn = [tmp_path / "set/inspect.png", tmp_path / "set/inspect.html"]
    assert all(path.exists() for path in drawn)
    convert(ShardConfig(**settings, overwrite=True))
    assert not any(path.exists() for path in drawn)


def test_notes_of_a_shard_are_on_the_disk_before_their_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    make_folder(tmp_path / "raw")
    index = convert(config_for(tmp_path, workers=1))
    notes = [path for path in synced if path.endswith(f".done.{os.getpid()}.partial")]
    assert len(notes) == sum(split.num_shards for split in index.splits.values())


def test_files_of_others_are_never_deleted(tmp_path):
    make_folder(tmp_path / "raw")
    out = tmp_path / "shards/set"
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis.txt"):
        convert(config_for(tmp_path, overwrite=True))
    (out / "thesis.txt").unlink()
    convert(config_for(tmp_path))
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis.txt"):
        convert(config_for(tmp_path, overwrite=True))
    raw = json.loads((out / "index.json").read_text())
    (out / "thesis.txt").unlink()
    (out / "index.json").write_text(json.dumps(raw | {"source": {"foreign": True}}))
    with pytest.raises(UserError, match="made elsewhere"):
        convert(config_for(tmp_path, overwrite=True))
    for where in (tmp_path / "raw", tmp_path / "raw/cats/shards", tmp_path):
        with pytest.raises(UserError, match="folder of the raw data"):
            convert(config_for(tmp_path, out=str(where)))


def test_a_swap_cut_short_brings_the_old_set_back(tmp_path):
    make_folder(tmp_path / "raw")
    index = convert(config_for(tmp_path))
    os.rename(index.folder, index.folder + ".replaced")
    with pytest.raises(UserError, match="a finished set is there"):
        convert(config_for(tmp_path))
    assert load_index(index.folder).num_classes == 3


RUN = "import sys; from dist_train.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"


def command(*words, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-c", RUN, *map(str, words)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **options)  # fmt: skip


def test_a_killed_conversion_looks_unfinished_and_goes_on_to_the_same_bytes(tmp_path):
    make_folder(tmp_path / "raw", per_class=150, size=(64, 64))
    settings = {"shard_mb": 0.05, "workers": 1}
    convert(config_for(tmp_path, out=str(tmp_path / "whole/set"), **settings))
    words = ["shard", "--path", tmp_path / "raw", "--out", tmp_path / "shards/set", "--split.val", 0.25]
    words += ["--split.test", 0.25, "--shard-mb", 0.05, "--workers", 2]
    process = command(*words)
    staging = tmp_path / "shards/set.partial"
    deadline = time.monotonic() + 60
    while len(list(staging.glob("*.done"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "shards/set").exists() and staging.exists()
    with pytest.raises(UserError, match="index.json"):
        load_index(staging)
    time.sleep(0.5)  # workers end with their parent
    kept = {path: path.stat().st_mtime_ns for path in staging.glob("*.tar") if Path(f"{path}.done").exists()}
    assert 3 <= len(kept)
    damaged = sorted(kept)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")  # a kept shard is believed only if it is whole
    index = convert(config_for(tmp_path, **settings))
    assert all_bytes(index.folder) == all_bytes(tmp_path / "whole/set")
    after = {path: Path(index.folder, path.name).stat().st_mtime_ns for path in sorted(kept)[1:]}
    assert after == {path: kept[path] for path in after}  # not written again
    assert not staging.exists()


def test_leftovers_of_other_settings_are_replaced(tmp_path):
    make_folder(tmp_path / "raw")
    convert(config_for(tmp_path, out=str(tmp_path / "whole/set"), seed=2))
    staging = tmp_path / "shards/set.partial"
    staging.mkdir(parents=True)
    for name, blob in all_bytes(tmp_path / "whole/set").items():
        (staging / name).write_bytes(blob)
    (staging / "train-000099.tar").write_bytes(b"old")
    (staging / "train-000000.tar.77.partial").write_bytes(b"half")
    (staging / "diary.txt").write_text("precious")
    with pytest.raises(UserError, match="diary.txt"):
        convert(config_for(tmp_path, seed=2))
    (staging / "diary.txt").unlink()
    (staging / "train-000000.tar.done").write_text("garbage")
    index = convert(config_for(tmp_path, seed=2))
    assert all_bytes(index.folder) == all_bytes(tmp_path / "whole/set")


def test_two_conversions_of_one_set_do_not_mix(tmp_path):
    import fcntl

    make_folder(tmp_path / "raw")
    staging = tmp_path / "shards/set.partial"
    staging.mkdir(parents=True)
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        convert(config_for(tmp_path))
    os.close(descriptor)


def test_a_full_disk_is_reported_and_leaves_the_finished_set(tmp_path):
    make_folder(tmp_path / "raw", per_class=40)
    index = convert(config_for(tmp_path))
    before = all_bytes(index.folder)
    words = ["shard", "--path", tmp_path / "raw", "--out", index.folder, "--overwrite", "true", "--min-shards", 1]

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = command(*words, preexec_fn=small_files_only)
    output = process.communicate()[0]
    assert process.returncode == 2 and "Traceback" not in output
    assert "train-000000.tar: cannot be written: File too large" in output
    assert all_bytes(index.folder) == before
    assert not list((tmp_path / "shards/set.partial").glob("*.[0-9]*.partial"))


def test_a_disk_that_fills_up_at_the_index_is_reported(tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_folder(tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setattr("dist_train.convert.save_index", no_space)
        with pytest.raises(UserError, match="set.partial: cannot be written: No space left"):
            convert(config_for(tmp_path))
    assert not (tmp_path / "shards/set").exists()
    assert convert(config_for(tmp_path)).num_classes == 3


def test_a_tar_that_cannot_be_written_leaves_nothing(tmp_path):
    writer = TarWriter(tmp_path / "a.tar")
    writer.extend([("0.cls", b"1")])
    writer.abandon()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"no-folder/a.tar: cannot be written"):
        TarWriter(tmp_path / "no-folder/a.tar")


def test_resize_brings_the_shorter_side_down_and_keeps_smaller_pictures(tmp_path):
    root = tmp_path / "raw"
    for k, name in enumerate(("cats", "dogs")):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (64, 32), (200, 90 * k, 30)).save(root / name / "large.jpg")
        Image.new("RGB", (32, 64), (200, 90 * k, 30)).save(root / name / "tall.png")
        Image.new("RGB", (20, 16), (200, 90 * k, 30)).save(root / name / "small.jpg")
    index = convert(config_for(tmp_path, resize=16, split=SplitConfig(0, 0), min_shards=1))
    split = index.splits["train"]
    sizes = dict(zip(split.names(), split.table()[["height", "width"]].tolist(), strict=True))
    assert sizes["cats/large.jpg"] == (16, 32) and sizes["dogs/tall.png"] == (32, 16) and sizes["cats/small.jpg"] == (16, 20)
    with tarfile.open(Path(index.folder, "train-000000.tar")) as tar:
        members = [m for m in tar if not m.name.endswith("cls")]
        for name, member in zip(split.names(), members, strict=True):
            payload = tar.extractfile(member).read()
            image = Image.open(io.BytesIO(payload))
            assert (image.height, image.width) == sizes[name]
            assert image.format == ("PNG" if name.endswith("png") else "JPEG")
            assert abs(np.asarray(image, int) - (200, 90 * name.startswith("dogs"), 30)).max() <= 4
            if "small" in name:
                assert payload == (root / name).read_bytes()


def test_every_fault_of_the_settings_is_reported_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        convert(config_for(tmp_path, split=SplitConfig(0.6, 0.5), quality=0, shard_mb=0, workers=-1))
    for name in ("split.val + split.test", "quality", "shard_mb", "workers"):
        assert f"{name} is" in str(caught.value)
    with pytest.raises(UserError, match="no such file|cannot read"):
        shard.main([str(tmp_path / "missing.yaml")])
    with pytest.raises(UserError, match="out: not set"):
        shard.main(["--path", str(tmp_path)])
    with pytest.raises(UserError, match="Did you mean shard_mb"):
        shard.main(["--shards-mb", "3"])


def test_the_set_is_named_after_its_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "raw")
    Path("pets.yaml").write_text("path: raw\nsplit: {val: 0.25, test: 0.25}\n")
    shard.main(["pets.yaml", "--min-shards", "5"])
    index = load_index("shards/pets")
    assert index.name == "pets" and index.splits["train"].num_shards == 5
    assert {name: s.num_samples for name, s in index.splits.items()} == {"train": 18, "val": 9, "test": 9}
    assert "shards/pets: finished" in capsys.readouterr().out
    assert shard.read_shard_config(["--config", "pets.yaml"]).out == "shards/pets"


def test_help_names_the_yaml_and_loads_neither_torch_nor_numpy(tmp_path):
    code = "import sys\nfrom dist_train.cli import main\ntry: main(['shard', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "datasets/NAME.yaml" in output.stdout and output.stdout.endswith("[]\n"), output
