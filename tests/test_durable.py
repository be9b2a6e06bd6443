"""What is put in place is on the disk before its name is, and its name before the call returns."""

import json
import os

import pytest
import torch

from dist_train.checkpoint import Saved, write_checkpoint
from dist_train.durable import put_in_place, replace_json, replace_text
from dist_train.tars import TarWriter


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What is synced, with its size where it is a file, and what is renamed, from now on."""
    order, fsync, replace = [], os.fsync, os.replace

    def noted_sync(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        order.append(f"sync {path}" + (f", {os.fstat(fd).st_size} bytes" if os.path.isfile(path) else ""))
        fsync(fd)

    def noted_rename(old, new):
        order.append(f"rename to {new}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
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
    tar.add("00000000.cls", b"1")
    tar.close()
    size = (tmp_path / "train-000000.tar").stat().st_size
    assert len(order) == 2 and order[0].endswith(f".partial, {size} bytes")
    assert order[1] == f"rename to {tmp_path / 'train-000000.tar'}"


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
