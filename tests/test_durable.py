"""What is put in place is on the disk before its name is, and its name before the call returns."""

import os

from dist_train.durable import put_in_place, replace_text


def test_bytes_then_name_then_folder_reach_the_disk(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(f"sync {os.readlink(f'/proc/self/fd/{fd}')}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"rename to {b}"), replace(a, b)))
    (tmp_path / "a.partial").write_text("new")
    (tmp_path / "a").write_text("old")
    put_in_place(tmp_path / "a.partial", tmp_path / "a")
    assert order == [f"sync {tmp_path / 'a.partial'}", f"rename to {tmp_path / 'a'}", f"sync {tmp_path}"]
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a.partial").exists()


def test_a_text_replaces_another(tmp_path):
    for text in ("one\n", "two\n"):
        replace_text(tmp_path / "a.json", text)
        assert (tmp_path / "a.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
