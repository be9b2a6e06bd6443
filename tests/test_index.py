"""The index is read back as it was written, and anything else is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from dist_train.errors import UserError
from dist_train.index import (
    SAMPLE,
    ShardIndex,
    SplitIndex,
    file_checksum,
    holds_foreign_index,
    load_index,
    save_index,
    save_table,
)


def make_index(folder) -> ShardIndex:
    rows = np.zeros(7, SAMPLE)
    rows["label"] = [0, 1, 0, 1, 1, 0, 1]
    rows["offset"], rows["size"] = np.arange(7) * 1024 + 512, 100
    checksum = save_table(folder, "train", rows, [f"a/{i}.jpg" for i in range(7)])
    split = SplitIndex("train", str(folder), ["train-000000.tar", "train-000001.tar"], np.array([4, 3]), np.array([9, 8]),
                       ["aa", "bb"], np.array([3, 4]), checksum)  # fmt: skip
    index = ShardIndex(str(folder), "set", ["cat", "dög"], {"train": split}, [0.1] * 3, [0.2] * 3, (8, 9),
                       left_out=[{"name": "x", "why": "y"}], source={"seed": 3})  # fmt: skip
    save_index(index)
    return index


def test_an_index_reads_back_as_it_was_written(tmp_path):
    written, read = make_index(tmp_path), load_index(tmp_path)
    for name in ("name", "classes", "mean", "std", "image_size", "features", "left_out", "source"):
        assert getattr(read, name) == getattr(written, name)
    split = read.split("train")
    assert split.num_samples == 7 and split.files == written.splits["train"].files
    assert split.shard_of(np.arange(7)).tolist() == [0, 0, 0, 0, 1, 1, 1] and split.first.tolist() == [0, 4, 7]
    assert split.table()["label"].tolist() == [0, 1, 0, 1, 1, 0, 1] and split.names()[6] == "a/6.jpg"
    files = (tmp_path / "train.samples.npy", tmp_path / "train.names.txt")
    assert split.table_checksum == " ".join(map(file_checksum, files))
    assert split.rows_checksum == file_checksum(files[0])
    assert list(split.table_files) == [path.name for path in files] and split.table_files[files[0].name] == split.rows_checksum
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        read.split("val")


def test_any_change_of_the_index_is_noticed(tmp_path):
    make_index(tmp_path)
    path = tmp_path / "index.json"
    text = path.read_text()
    for old, new in (('"cat"', '"cow"'), (r'"samples": \[\s*4', '"samples": [5'), ("0\\.1", "0.2")):
        changed = re.sub(old, new, text, count=1)
        assert changed != text
        path.write_text(changed)
        with pytest.raises(UserError, match="its own checksum"):
            load_index(tmp_path)
    for broken, message in ((text[:-20], "cannot be read as JSON"), ("[]", "format is 'list'"), ("", "JSON"),
                            (json.dumps(json.loads(text) | {"format": "dist_train index 9"}), "index 9")):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(UserError, match=message) as told:
            load_index(tmp_path)
        assert "dist-train verify" not in str(told.value)  # which would ask the same
    path.unlink()
    with pytest.raises(UserError, match="dist-train shard datasets/NAME.yaml .*dist-train index"):
        load_index(tmp_path)


@pytest.mark.parametrize("file", ["1.png", "a/1.JPG", "train/a/1.jpeg"])
def test_a_folder_of_pictures_is_answered_with_its_conversion(tmp_path, file):
    folder = tmp_path / "my pictures"
    (folder / file).parent.mkdir(parents=True)
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="shard datasets/NAME.yaml"):
        load_index(folder)
    (folder / file).touch()
    with pytest.raises(UserError, match=re.escape(f"dist-train shard --source folder --path '{folder}' --out shards/NAME   (or")):
        load_index(folder)


def test_a_table_that_does_not_fit_the_index_is_refused(tmp_path):
    make_index(tmp_path)
    split = load_index(tmp_path).split("train")
    np.save(tmp_path / "train.samples.npy", np.zeros(6, SAMPLE))
    with pytest.raises(UserError, match="6 rows"):
        split.table()
    np.save(tmp_path / "train.samples.npy", np.zeros(7))
    with pytest.raises(UserError, match="float64"):
        split.table()
    (tmp_path / "train.samples.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        split.table()


def test_an_index_of_tars_made_by_others_is_told_from_ours(tmp_path):
    index = make_index(tmp_path)
    assert not index.is_foreign and not holds_foreign_index(tmp_path) and not holds_foreign_index(tmp_path / "nothing")
    save_index(replace(index, source={"foreign": True}))
    assert load_index(tmp_path).is_foreign and holds_foreign_index(tmp_path)
    text = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(text.replace('"cat"', '"cow"'))
    with pytest.raises(UserError, match="its own checksum(.|\n)*Index the tars again with dist-train index"):
        load_index(tmp_path)
    raw = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(raw | {"format": "another", "checksum": "0"}))
    assert holds_foreign_index(tmp_path)  # of another version: its tars are others' all the same
    for damaged in ("[]", "{", '{"source": []}', '{"source": null}'):
        (tmp_path / "index.json").write_text(damaged)
        assert not holds_foreign_index(tmp_path)
