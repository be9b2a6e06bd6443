"""What is put in place is on the disk before its name is, and its name before the call returns."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import lines_of, tiny_run, write_table

from dist_train import shard
from dist_train.checkpoint import Saved, write_checkpoint
from dist_train.durable import put_in_place, replace_json, replace_text
from dist_train.tars import TarWriter
from dist_train.train import run_training


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What is synced, with its size where it is a file, what is renamed and what is removed, from now on."""
    order, fsync, unlink = [], os.fsync, os.unlink

    def noted_sync(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        order.append(f"sync {path}" + (f", {os.fstat(fd).st_size} bytes" if os.path.isfile(path) else ""))
        fsync(fd)

    def noted(rename):
        def noted_rename(old, new):
            order.append(f"rename to {new}")
            rename(old, new)

        return noted_rename

    def noted_removal(path, *, dir_fd=None):
        if dir_fd is None:  # else a whole tree is removed, by names that are no paths
            order.append(f"remove {path}")
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "unlink", noted_removal)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    return order


def test_bytes_then_name_then_folder_reach_the_disk(tmp_path, order):
    (tmp_path / "a.partial").write_text("new")
    (tmp_path / "a").write_text("old")
    put_in_place(tmp_path / "a.partial", tmp_path / "a")
    assert order == [f"sync {tmp_path / 'a.partial'}, 3 bytes", f"rename to {tmp_path / 'a'}", f"sync {tmp_path}"]
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a.partial").exists()


def test_a_text_replaces_another(tmp_path):
    for text in ("one\n", "two\n"):
        replace_text(tmp_path / "a.json", text)
        assert (tmp_path / "a.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_every_file_of_a_checkpoint_is_on_the_disk_before_its_name_is(tmp_path, order):
    path, partial = tmp_path / "step-00000001", tmp_path / "step-00000001.partial"
    write_checkpoint(path, Saved(1, {stem: {"w": torch.ones(3)} for stem in ("model", "ema", "optimizer")}, {"best_value": 1}))
    *before, rename, last = order
    assert len(list(path.iterdir())) == 5  # with state.json and the manifest
    for file in path.iterdir():
        written = partial / file.name.replace("manifest.json", "manifest.json.partial")
        assert f"sync {written}, {file.stat().st_size} bytes" in before
    assert before[-1] == f"sync {partial}"  # the names in the folder
    assert (rename, last) == (f"rename to {path}", f"sync {tmp_path}")


def test_a_shard_is_on_the_disk_before_its_name_is(tmp_path, order):
    tar = TarWriter(tmp_path / "train-000000.tar")
    tar.extend([("00000000.cls", b"1")])
    tar.close()
    size = (tmp_path / "train-000000.tar").stat().st_size
    assert len(order) == 2 and order[0].endswith(f".partial, {size} bytes")
    assert order[1] == f"rename to {tmp_path / 'train-000000.tar'}"


def test_a_set_of_shards_is_on_the_disk_before_its_name_is(tmp_path, order):
    out, staging, replaced = (tmp_path / f"table{ending}" for ending in ("", ".partial", ".replaced"))
    rows = np.random.default_rng(0).normal(size=(40, 2))
    argv = [*write_table(tmp_path / "table.csv", "ab", rows, ["yes", "no"] * 20), "--out", str(out), "--workers", "1"]
    shard.main(argv)
    *before, note, synced, named, last = order
    assert note.startswith(f"remove {staging}/") and note.endswith(".done")  # the last that is changed in the folder
    assert (synced, named, last) == (f"sync {staging}", f"rename to {out}", f"sync {tmp_path}")
    assert len(files := list(out.iterdir())) >= 7  # an index, and tars and tables of three splits
    for file in files:
        start, end = f"sync {staging / file.name}.", f".partial, {file.stat().st_size} bytes"
        assert any(line.startswith(start) and line.endswith(end) for line in before), file.name
    shard.main([*argv, "--overwrite", "true"])
    assert order[-4:] == [f"sync {staging}", f"rename to {replaced}", f"rename to {out}", f"sync {tmp_path}"]


def test_the_figures_up_to_a_checkpoint_are_on_the_disk_before_its_name_is(digits, tmp_path, order):
    run = tmp_path / "run"
    assert run_training(tiny_run(digits, run, "--train.max_steps", "2")) == 0  # no evaluation, which syncs by itself
    metrics = run / "metrics.jsonl"
    assert [line["step"] for line in lines_of(run)] == [1, 2]
    named = order.index(f"rename to {run}/checkpoints/step-00000002")
    assert f"sync {metrics}, {metrics.stat().st_size} bytes" in order[:named]


def test_a_value_replaces_another_as_json(tmp_path):
    for value in ({"a": [1, None]}, [2]):
        replace_json(tmp_path / "a.json", value)
        assert json.loads((tmp_path / "a.json").read_text()) == value
    replace_json(tmp_path / "a.json", {"a": 1, "b": 2}, indent=None)
    assert (tmp_path / "a.json").read_text() == '{"a": 1, "b": 2}\n'


def test_what_cannot_be_put_in_place_leaves_nothing(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError):
        replace_text(tmp_path / "a.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
