"""Raw data of every kind, good and bad."""

import errno
import hashlib
import io
import itertools
import os
import pickle
import shlex
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import write_table
from PIL import Image

from dist_train.convert import convert
from dist_train.csv_files import drop_option
from dist_train.decode import decode_into
from dist_train.errors import UserError
from dist_train.foreign import _statistics
from dist_train.index import load_index
from dist_train.read_foreign import Sums
from dist_train.settings import read_config
from dist_train.shard_config import ShardConfig, SplitConfig, check_settings
from dist_train.sources import files_below, open_source
from dist_train.tables import CONSTANT_STD, class_numbers, column_statistics
from dist_train.verify import damage_of


def picture(path: Path, seed=0, size=(9, 7), **options) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path.read_bytes()


def payloads(index, split="train") -> list[bytes]:
    part = index.splits[split]
    blobs = [Path(index.folder, file).read_bytes() for file in part.files]
    shards = part.shard_of(np.arange(part.num_samples))
    return [blobs[k][row["offset"] :][: row["size"]] for k, row in zip(shards, part.table(), strict=True)]


def images(index, split="train") -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in payloads(index, split)])


# Folders


def test_imagenet_that_is_half_unpacked_is_refused(tmp_path):
    settings = {"source": "torchvision", "dataset": "ImageNet", "path": str(tmp_path)}
    with pytest.raises(UserError, match="train and val are not unpacked, and parts"):
        open_source(ShardConfig(**settings, part="0/4"))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "n01440764.tar").touch()
    with pytest.raises(UserError, match="train: was not unpacked to its end"):
        open_source(ShardConfig(**settings))


def test_folders_are_searched_deeply_and_oddly_named_files_are_found(tmp_path):
    names = ["a/x.y.z.jpg", "a/deep/er/ä ö.JPEG", "a/line\nbreak.png", "b/.hidden.jpg", "b/2.png", "b/Thumbs.db", "b/.DS_Store"]
    for k, name in enumerate(names):
        if name.lower().endswith(("jpg", "jpeg", "png")):
            picture(tmp_path / "raw" / name, seed=k)
        else:
            (tmp_path / "raw" / name).write_text("no picture")
    (tmp_path / "raw/.git").mkdir()
    source = open_source(ShardConfig(path=str(tmp_path / "raw")))
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0, 0, 0, 1]
    assert sorted(source.names) == ["a/deep/er/ä ö.JPEG", "a/line\\nbreak.png", "a/x.y.z.jpg", "b/2.png"]
    assert source.notes == ["3 files that are no pictures were left aside: b/.DS_Store, b/.hidden.jpg, b/Thumbs.db"]
    (tmp_path / "raw/README").touch()
    more = open_source(ShardConfig(path=str(tmp_path / "raw"))).notes
    assert more == ["4 files that are no pictures were left aside: README, b/.DS_Store, b/.hidden.jpg, ..."]
    for i in range(4):
        assert source.read(i)[0].startswith((b"\xff\xd8", b"\x89PNG"))
    index = convert(ShardConfig(path=str(tmp_path / "raw"), out=str(tmp_path / "set"), split=SplitConfig(0, 0)))
    assert sorted(index.splits["train"].names()) == sorted(source.names)


def test_links_are_followed_but_not_in_circles(tmp_path):
    picture(tmp_path / "raw/a/1.png")
    picture(tmp_path / "raw/b/1.png")
    picture(tmp_path / "elsewhere/2.png")
    (tmp_path / "raw/a/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw/a/circle").symlink_to(tmp_path / "raw/a")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "raw/a")
    (tmp_path / "raw/b/broken.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(ShardConfig(path=str(tmp_path / "raw")))
    assert source.names == ["a/1.png", "a/linked/2.png", "b/1.png"]


def test_a_folder_that_may_not_be_read_ends_a_conversion_and_is_named_elsewhere(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "raw/a/locked/1.png")
    picture(tmp_path / "raw/b/1.png")
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match="raw/a/locked: cannot be listed: Permission denied"):
        open_source(ShardConfig(path=str(tmp_path / "raw")))
    assert files_below(tmp_path / "raw", (".png",)) == [tmp_path / "raw/b/1.png"]
    assert "raw/a/locked: cannot be listed: Permission denied; left aside" in capsys.readouterr().err


@pytest.mark.parametrize("val_name", ["val", "valid", "validation"])
def test_split_folders_are_kept(tmp_path, val_name):
    for part, count in (("train", 8), (val_name, 2), ("test", 3)):
        for name in ("x", "y"):
            for i in range(count):
                picture(tmp_path / "raw" / part / name / f"{i}.png", seed=i)
    index = convert(ShardConfig(path=str(tmp_path / "raw"), out=str(tmp_path / "set")))
    assert {name: split.class_counts.tolist() for name, split in index.splits.items()} == {
        "train": [8, 8], "val": [2, 2], "test": [3, 3]
    }  # fmt: skip
    assert all(name.startswith("train/") for name in index.splits["train"].names())


@pytest.mark.parametrize("names", [("Training", "Testing"), ("seg_train", "seg_test"), ("training_set", "test_set")])
def test_split_folders_of_other_names_are_no_classes(tmp_path, names):
    for name, count in zip(names, (8, 3), strict=True):
        for kind in ("x", "y"):
            for i in range(count):
                picture(tmp_path / "raw" / name / kind / f"{i}.png", seed=i)
    source = open_source(ShardConfig(path=str(tmp_path / "raw")))
    assert source.classes == ["x", "y"] and np.bincount(source.preset).tolist() == [16, 0, 6]


def test_a_class_named_like_a_split_in_part_is_a_class(tmp_path):
    for name in ("train station", "bus", "test tube"):
        picture(tmp_path / "raw" / name / "1.png")
    assert open_source(ShardConfig(path=str(tmp_path / "raw"))).classes == ["bus", "test tube", "train station"]


def test_a_link_to_itself_is_one_of_the_others(tmp_path):
    for name in "ab":
        picture(tmp_path / "raw" / name / "1.png")
    (tmp_path / "raw/a/loop").symlink_to("loop")
    source = open_source(ShardConfig(path=str(tmp_path / "raw")))
    assert source.names == ["a/1.png", "b/1.png"] and source.notes == ["1 file that is no picture was left aside: a/loop"]


def test_files_below_follow_links_and_leave_hidden_ones(tmp_path):
    picture(tmp_path / "elsewhere/2.PNG")
    picture(tmp_path / "here/1.png")
    (tmp_path / "here/._1.png").write_bytes(b"x")
    (tmp_path / "here/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "here")
    found = files_below(tmp_path / "here", (".png",))
    assert [str(file.relative_to(tmp_path / "here")) for file in found] == ["1.png", "linked/2.PNG"]


@pytest.mark.parametrize("text, hole", [
    ("a;b;y\n1,5;2;x\n2;3;z\n", "'1,5'"), ('a,b,y\n"0,5",2,x\n"1,5",3,z\n', "'0,5', and 1 more"),
])  # fmt: skip
def test_decimal_commas_are_named(tmp_path, text, hole):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=f"line 2: column 'a' has {hole}.*(.|\n)*with a point"):
        open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="y", missing="mean"))


def test_text_with_commas_is_text_and_a_column_without_a_name_is_left_out(tmp_path):
    (tmp_path / "t.csv").write_text(",a,note,y\n0,1,\"red, blue\",x\n1,2,\"3,4\",z\n2,4,green,x\n")
    source = open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="y"))
    assert source.features == ["a", "note=3,4", "note=green", "note=red, blue"]
    assert "1 column without a name, dropped: often the rows' numbers" in source.notes


def test_settings_of_other_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="classes is for source: folder, and this is sklearn; merge picks(.|\n)*target is for"):
        check_settings(ShardConfig(source="sklearn", dataset="digits", classes=("1", "2"), target="y"))


def test_classes_can_be_picked_and_ordered_and_may_be_called_train(tmp_path):
    for name in ("train", "test", "bus"):
        picture(tmp_path / "raw" / name / "1.png")
    assert open_source(ShardConfig(path=str(tmp_path / "raw"))).classes == ["bus", "test", "train"]
    source = open_source(ShardConfig(path=str(tmp_path / "raw"), classes=("train", "bus")))
    assert source.classes == ["train", "bus"] and source.names == ["train/1.png", "bus/1.png"]


def test_classes_are_joined_and_the_others_left_aside(tmp_path):
    for k, name in enumerate(("dog", "cat", "ship", "c+d", "frog", "frog")):
        picture(tmp_path / "raw" / name / f"{k}.png", seed=k)
    config = ShardConfig(path=str(tmp_path / "raw"), merge=("ship", "cat+dog", "c+d"))
    source = open_source(config)
    assert source.classes == ["ship", "cat+dog", "c+d"]
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == {
        "dog/0.png": 1, "cat/1.png": 1, "ship/2.png": 0, "c+d/3.png": 2
    }  # fmt: skip
    assert [source.read(i) for i in range(4)] == [((tmp_path / "raw" / name).read_bytes(), "png") for name in source.names]
    assert "2 samples" in source.notes[-1]
    for groups, message in (("cat+dgo",), "Did you mean dog"), (("cat+dog", "dog+ship"), "'dog' is named twice"):
        with pytest.raises(UserError, match=message):
            open_source(ShardConfig(path=str(tmp_path / "raw"), merge=groups))


def test_bytes_pass_untouched_and_other_formats_become_png(tmp_path):
    raw = {}
    for k, name in enumerate(("a/1.jpg", "a/2.png", "a/3.webp", "b/4.bmp", "b/really-a-png.jpg")):
        options = {"format": "PNG"} if "really" in name else {"lossless": True} if "webp" in name else {}
        raw[name] = picture(tmp_path / "raw" / name, seed=k, **options)
    index = convert(ShardConfig(path=str(tmp_path / "raw"), out=str(tmp_path / "set"), split=SplitConfig(0, 0)))
    for name, payload in zip(index.splits["train"].names(), payloads(index), strict=True):
        if name.endswith(("webp", "bmp")):
            assert payload.startswith(b"\x89PNG")
            shown = [np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in (payload, raw[name])]
            assert np.array_equal(*shown)
        else:
            assert payload == raw[name]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_in_the_index_are_as_displayed(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / "raw/a/1.jpg", size=(8, 24), exif=exif)
    picture(tmp_path / "raw/b/1.jpg", size=(8, 24), exif=exif)
    index = convert(ShardConfig(path=str(tmp_path / "raw"), out=str(tmp_path / "set"), split=SplitConfig(0, 0)))
    assert index.image_size == ((8, 24) if orientation < 5 else (24, 8))
    out = np.empty((*index.image_size, 3), np.uint8)
    decode_into(payloads(index)[0], out)  # the decoder of training agrees


FOLDER_FAULTS = {
    "missing": (lambda raw: None, "does not exist"),
    "file": (lambda raw: raw.write_text("x"), "is a file"),
    "nothing in it": (lambda raw: raw.mkdir(), "no class folders"),
    "empty class": (lambda raw: (picture(raw / "a/1.png"), (raw / "b").mkdir()), "/b: no picture in this class folder"),
    "class of texts": (lambda raw: (picture(raw / "a/1.png"), (raw / "b").mkdir(), (raw / "b/1.txt").touch()),
                       "/b: no picture"),
    "one class": (lambda raw: picture(raw / "a/1.png"), "one class only, 'a'"),
    "pictures alone": (lambda raw: picture(raw / "1.png"), "1 pictures and no class folder"),
    "mixed": (lambda raw: [picture(raw / n) for n in ("1.png", "2.png", "a/1.png", "b/1.png", "c/1.png")],
              r"2 pictures \(1.png, ...\) lie beside 3 class folders"),
    "mixed split": (lambda raw: [picture(raw / n) for n in ("train/a/1.png", "train/b/1.png", "test/1.png")],
                    "test: 1 pictures outside any class folder"),
    "split and classes": (lambda raw: [picture(raw / n) for n in ("train/a/1.png", "cats/1.png")],
                          "train looks like a split, but cats"),
    "class only in test": (lambda raw: [picture(raw / n) for n in ("train/a/1.png", "train/b/1.png", "test/c/1.png")],
                           "test/c: the class is not in the training split"),
    "two val": (lambda raw: [picture(raw / n) for n in ("train/a/1.png", "val/a/1.png", "valid/a/1.png")],
                "val, valid: two folders for one split"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_folder_at_fault_is_named(tmp_path, fault):
    make, message = FOLDER_FAULTS[fault]
    make(tmp_path / "raw")
    with pytest.raises(UserError, match=message) as caught:
        open_source(ShardConfig(path=str(tmp_path / "raw")))
    assert str(tmp_path) in str(caught.value)


def test_a_class_that_is_asked_for_must_be_there(tmp_path):
    picture(tmp_path / "raw/a/1.png")
    with pytest.raises(UserError, match="no class folder 'dogs'"):
        open_source(ShardConfig(path=str(tmp_path / "raw"), classes=("a", "dogs")))
    with pytest.raises(UserError, match="`path`"):
        open_source(ShardConfig())


# Tables


def test_a_csv_becomes_float_vectors_with_the_training_statistics(tmp_path):
    random = np.random.default_rng(0)
    values = random.normal(1e6, 3, (60, 3))
    lines = [f"{k};{a!r};{b!r};{c!r};7;{'ab'[k % 2]};n{k}" for k, (a, b, c) in enumerate(values.tolist())]
    (tmp_path / "t.csv").write_text("\ufeffid;x;y;z;same;kind;name\n" + "\n".join(lines) + "\n", encoding="utf-8")
    config = ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="kind", drop=("id",), out=str(tmp_path / "set"))
    source = open_source(config)
    assert source.features == ["x", "y", "z"] and source.classes == ["a", "b"]
    assert any("name" in note for note in source.notes) and any("same" in note for note in source.notes)
    index = convert(config)
    vectors = [np.load(io.BytesIO(payload), allow_pickle=False) for payload in payloads(index)]
    rows = [int(name.split()[1]) - 2 for name in index.splits["train"].names()]
    assert vectors[0].dtype == np.float32 and np.array_equal(vectors, values.astype(np.float32)[rows])
    assert index.splits["train"].table()["label"].tolist() == [row % 2 for row in rows]
    np.testing.assert_allclose(index.mean, np.mean(np.float64(vectors), 0), rtol=1e-12)
    np.testing.assert_allclose(index.std, np.std(np.float64(vectors), 0), rtol=1e-9)
    assert index.image_size is None and index.features == ["x", "y", "z"]


def test_rows_with_holes_follow_the_rule(tmp_path):
    (tmp_path / "t.csv").write_text("x,y,k\n1,2,0\n,4,1\n3,oops,0\n5,6,\n7,inf,1\n9,10,1\n")
    settings = {"source": "csv", "path": str(tmp_path / "t.csv"), "target": "k"}
    dropped = open_source(ShardConfig(**settings))
    assert dropped.store.rows.tolist() == [[1, 2], [9, 10]] and dropped.names == ["line 2", "line 7"]
    assert dropped.left_out[0] == {"name": "line 3", "why": "column x is empty"}
    assert dropped.left_out[1] == {"name": "line 4", "why": "column y is 'oops'"}
    assert dropped.notes == ["4 of 6 rows were left out for missing values: y (2), k (1), x (1)"]
    kept = open_source(ShardConfig(**settings, missing="mean"))
    np.testing.assert_array_equal(kept.store.rows, np.float32([[1, 2], [np.nan, 4], [3, np.nan], [9, 10]]))
    assert kept.left_out == [{"name": "line 5", "why": "column k is empty"}, {"name": "line 6", "why": "column y is 'inf'"}]
    assert "2 missing values count as their column's mean over the training split: x (1), y (1)" in kept.notes
    with pytest.raises(UserError, match=r"4 of 6 rows .*(.|\n)*line 3: column x is empty"):
        open_source(ShardConfig(**settings, missing="error"))


def test_the_note_on_means_names_the_five_columns_that_lack_most(tmp_path):
    rows = ["1,1,1,1,1,1,0", "2,2,2,2,2,2,1", "3,3,3,3,,3,0", "4,,,,,,1", "4,4,4,,,,0", "4,4,,,,,1"]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,c,d,e,f,k", *rows]) + "\n")
    source = open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="k", missing="mean"))
    assert source.notes == ["13 missing values count as their column's mean over the training split: "
                            "e (4), d (3), f (3), c (2), b (1)"]  # fmt: skip


def holed_rows(num_rows: int = 90) -> np.ndarray:
    """(N, 3) float32, a fifth of it NaN, of the last column more than half."""
    random = np.random.default_rng(5)
    rows = (random.normal(size=(num_rows, 3)) * [1, 30, 0.1] + [0, 200, -1]).astype(np.float32)
    rows[random.random(rows.shape) < [0.2, 0.2, 0.6]] = np.nan
    return rows


def converted(folder: Path, rows: np.ndarray):
    """The rows as a CSV file, of classes a and b in turn, and that as shards."""
    folder.mkdir()
    write_table(folder / "t.csv", "xyz", rows, ["ab"[k % 2] for k in range(len(rows))])
    return convert(ShardConfig(source="csv", path=str(folder / "t.csv"), target="kind", missing="mean", out=str(folder / "set"),
                               split=SplitConfig(val=0.2, test=0.2), workers=1))  # fmt: skip


def rows_in(index, split: str) -> list[int]:
    return [int(name.split()[1]) - 2 for name in index.splits[split].names()]


def test_what_is_missing_stays_missing_and_counts_as_the_mean_of_the_training_rows_alone(tmp_path):
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import StandardScaler

    rows = holed_rows()
    index = converted(tmp_path / "one", rows)
    vectors = np.stack([np.load(io.BytesIO(payload), allow_pickle=False) for payload in payloads(index)])
    train = rows[rows_in(index, "train")]
    assert vectors.dtype == np.float32 and np.array_equal(vectors, train, equal_nan=True) and np.isnan(train).any()
    imputer = SimpleImputer().fit(np.float64(train))
    scaler = StandardScaler().fit(imputer.transform(np.float64(train)))
    np.testing.assert_allclose(index.mean, imputer.statistics_, rtol=1e-12)
    np.testing.assert_allclose(index.std, scaler.scale_, rtol=1e-12)

    others = rows_in(index, "val") + rows_in(index, "test")
    changed = rows.copy()
    changed[others] = np.where(np.isnan(rows[others]), 1e4, np.nan)  # held-out values go, and others come
    again = converted(tmp_path / "two", changed)
    assert rows_in(again, "train") == rows_in(index, "train")
    assert (again.mean, again.std) == (index.mean, index.std)
    assert not damage_of(again).lines


def test_a_column_without_a_value_to_learn_from_is_named_and_counts_as_0(tmp_path, capsys):
    index = converted(tmp_path / "one", holed_rows())
    rows = holed_rows()
    rows[rows_in(index, "train"), 1] = np.nan
    rows[rows_in(index, "test"), 1] = np.arange(index.splits["test"].num_samples)
    capsys.readouterr()
    index = converted(tmp_path / "two", rows)
    assert index.features == ["x", "y", "z"] and (index.mean[1], index.std[1]) == (0.0, CONSTANT_STD)
    assert "1 column without a single value in the training split, 0 to the network everywhere: y" in capsys.readouterr().out
    rows[:, 1] = np.where(np.arange(len(rows)) % 3, np.nan, 7.5)
    assert converted(tmp_path / "three", rows).features == ["x", "z"]  # what is missing is no change


def test_weights_say_how_many_rows_each_stands_for():
    rows, weights = holed_rows(20), np.arange(20) % 3 + 1
    np.testing.assert_allclose(column_statistics(rows, weights), column_statistics(np.repeat(rows, weights, axis=0)), rtol=1e-12)
    whole = np.nan_to_num(rows)
    assert column_statistics(whole) == (np.float64(whole).mean(0).tolist(), np.float64(whole).std(0).tolist())


def test_missing_values_in_tars_of_others_count_as_the_mean_and_infinite_ones_are_refused(capsys):
    rows = holed_rows(20)
    sums = [Sums(1, [], list(rows[:12])), Sums(2, [], list(rows[12:]))]
    mean, std, features = _statistics("tars", sums, vectors=True)
    assert (mean, std) == column_statistics(rows, np.repeat([1, 2], [12, 8])) and features[2] == "feature 2"
    assert f"{np.isnan(rows).sum()} of the 60 values" in capsys.readouterr().out
    rows[3, 1] = -np.inf
    with pytest.raises(UserError, match="infinite at feature 1"):
        _statistics("tars", [Sums(1, [], list(rows))], vectors=True)


CSV_FAULTS = {
    "no file": (None, "cannot be read"),
    "empty": ("", "there is no column 'kind'|no rows"),
    "header only": ("x,kind\n", "no rows"),
    "ragged": ("x,kind\n1,a\n1,2,b\n", "line 3: 3 cells; expected 2(.|\n)*cell with ',' in it in quotes"),
    "ragged below sep": ("sep=;\nx;kind\n1;a\n1;2;b\n", "line 4: 3 cells; expected 2"),
    "no target": ("x,kinds\n1,a\n2,b\n", "no column 'kind'.*Did you mean kinds"),
    "no names": ("1,2,a\n2,3,b\n", "no column 'kind'(.|\n)*If the first line is a row, write one above it"),
    "no names, twice": ("1,1,a\n2,3,b\n", "named twice: '1'(.|\n)*If the first line is a row, write one above it"),
    "other delimiter": ("x kind\n1 a\n2 b\n", "no column 'kind'(.|\n)*parted by comma, semicolon, tab or bar"),
    "wide": (",".join(f"c{k}" for k in range(99)) + "\n" + "1," * 98 + "1\n", "columns are c0, .*, c19 and 79 more.$"),
    "twice": ("x,x,kind\n1,2,a\n", "named twice: 'x'.\n  Give each its own name.$"),
    "one class": ("x,kind\n1,a\n2,a\n", "one class only"),
    "one class of complete rows": ("x,kind\n1,a\n2,a\n,b\n", "one class only(.|\n)*1 class left out with all its rows: b"),
    "a measurement": ("x,kind\n" + "".join(f"{i},{i / 7}\n" for i in range(50)), "50 different values(.|\n)*Name the column"),
    "nothing that changes": ("x,kind\nred,a\nred,b\n", "no column besides 'kind'(.|\n)*never changes, dropped: x=red"),
    "all rows holed": ("x,y,kind\n1,,a\n,2,b\n", r"none of the 2 rows is complete; missing are x \(1\), y \(1\)"),
    "quotes": ('x,kind\n1,a\n"1,a\n', "not a CSV file from line 3 on(.|\n)*Close every quote"),
    "latin-1": (b"x,kind\n1,\xe4\n", "not a CSV file in UTF-8(.|\n)*CSV UTF-8"),
    "thousands": ('x,kind\n"1,234,567",a\n"2,345,678",b\n', "has '1,234,567', and 1 more with a comma; expected '1234567'.\n"),
    "thousands and a point": ('x,kind\n"1,234.5",a\n7,b\n', "has '1,234.5', and 0 more with a comma; expected '1234.5'.\n"),
    "thousands or a fraction": ('x,kind\n"1,234",a\n7,b\n', "expected '1.234', or '1234' if the comma parts thousands"),
}


def test_classes_that_are_one_number_written_differently_have_an_order():
    labels = ["01", "1", "+1", "2", "-3"]
    orders = {tuple(class_numbers(Path("t.csv"), "k", list(order))[0]) for order in itertools.permutations(labels)}
    assert orders == {("-3", "+1", "01", "1", "2")}


def test_words_for_nothing_may_be_classes(tmp_path):
    for labels, kept in ((["none", "minor", "-"], ["-", "minor", "none"]), (["a", "?", "b"], ["a", "b"]),
                         (["²", "x", "NA"], ["x", "²"]), (["+-5", "7", ""], ["+-5", "7"])):  # fmt: skip
        (tmp_path / "t.csv").write_text("x,k\n" + "".join(f"{i},{labels[i % 3]}\n" for i in range(30)))
        source = open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="k"))
        assert source.classes == kept


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_a_csv_at_fault_is_named(tmp_path, fault):
    text, message = CSV_FAULTS[fault]
    if text is not None:
        (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="kind"))
    assert "t.csv" in str(caught.value)


def read_table(folder: Path, text: str, **settings):
    (folder / "t.csv").write_text(text, encoding="utf-8", newline="")
    return open_source(ShardConfig(source="csv", path=str(folder / "t.csv"), target="kind", **settings))


def test_what_excel_and_pandas_write_is_read(tmp_path):
    below = "1;5;a\r\n2;7;b\r\n"
    for header, features in (("sep=;\r\nx;y;kind", ["x", "y"]), ('"x,\n in (a,b,c,d)";y;kind', ["x, in (a,b,c,d)", "y"]),
                             ("Unnamed: 0;y;kind", ["y"]), ("Unnamed: 0.1;y;kind", ["y"]),
                             ("Unnamed: x;y;kind", ["Unnamed: x", "y"])):  # fmt: skip
        source = read_table(tmp_path, f"\ufeff{header}\r\n{below}")
        assert source.features == features and source.names == [f"line {k}" for k in ((3, 4) if "\n" in header else (2, 3))]
        assert source.store.rows[:, -1].tolist() == [5, 7] and source.classes == ["a", "b"]
        assert ("1 column without a name, dropped: often the rows' numbers" in source.notes) == (features == ["y"])


def test_1_and_1_0_are_one_class_and_sorted_as_numbers(tmp_path):
    for labels, classes, numbers in (
        (["0", "1.0", "1", "10.0"], ["0", "1", "10.0"], [0, 1, 1, 2]), (["10.0", "9.0", "", "NaN"], ["9.0", "10.0"], [1, 0]),
        (["1.5", "1.0", "1"], ["1", "1.0", "1.5"], [2, 1, 0]), (["1", "2", "#N/A", "<NA>"], ["1", "2"], [0, 1]),
    ):  # fmt: skip
        source = read_table(tmp_path, "x,kind\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels * 3)))
        assert source.classes == classes and source.labels.tolist() == numbers * 3


def test_columns_that_count_the_rows_or_are_the_class_are_named(tmp_path):
    def notes(lines: list[tuple]) -> list[str]:
        return read_table(tmp_path, "id,x,twin,word,kind\n" + "".join(",".join(map(str, line)) + "\n" for line in lines)).notes[1:]

    lines = [(i + 100, i % 7, 2.5 + i % 3, "uvw"[i % 3], "abc"[i % 3]) for i in range(60)]
    told = "columns of one value for each class, kept; --drop leaves out what is known only with the class"
    assert notes(lines) == ["1 column that counts the rows, kept; --drop leaves it out: id", f"2 {told}: twin, word"]
    lines[50] = (150.5, 1, 3.5, "w", "a")
    assert notes(lines) == []
    assert notes([(i, i % 7, i % 2, "uv"[i % 2], i % 2) for i in range(49)]) == []  # by chance
    assert notes([(i * (-1) ** i, (-3e38, 3e38)[i % 2], i % 5, "uv"[i % 3 % 2], i % 2 + i // 59) for i in range(60)]) == []


def test_numbers_that_float32_cannot_tell_apart_are_not_said_to_be_constant(tmp_path):
    source = read_table(tmp_path, "ms,same,x,kind\n" + "".join(f"{1700000000000 + i},7,{i},{'ab'[i % 2]}\n" for i in range(9)))
    assert source.features == ["x"] and source.notes == [
        "1 column that never changes, dropped: same",
        "1 column whose numbers are one in float32, dropped; take off what is large and the same in all: ms"]  # fmt: skip


def test_classes_that_are_numbers_are_sorted_as_numbers(tmp_path):
    (tmp_path / "t.csv").write_text("x,k\n" + "".join(f"{i},{k}\n" for i, k in enumerate([10, 9, -1, 10, 9, -1])))
    source = open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="k"))
    assert source.classes == ["-1", "9", "10"] and source.labels.tolist() == [2, 1, 0] * 2


# scikit-learn


def test_digits_keep_every_pixel(digits):
    from sklearn.datasets import load_digits

    raw, index = load_digits(), load_index(digits)
    seen = 0
    for name, split in index.splits.items():
        order = [int(sample.split("/")[1]) for sample in split.names()]
        assert np.array_equal(split.table()["label"], raw.target[order])
        expected = np.rint(raw.images[order] / 16 * 255).astype(np.uint8)
        assert np.array_equal(images(index, name), np.repeat(expected[..., None], 3, axis=3))
        seen += len(order)
    assert seen == 1797 and index.image_size == (8, 8) and index.classes == [str(k) for k in range(10)]
    np.testing.assert_allclose(index.mean, (images(index) / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(index.std, (images(index) / 255).std((0, 1, 2)), rtol=1e-12)


def test_tables_of_scikit_learn_come_by_name(tmp_path):
    index = convert(ShardConfig(source="sklearn", dataset="breast_cancer", out=str(tmp_path / "set")))
    assert index.classes == ["malignant", "benign"] and len(index.features) == 30
    assert sum(split.class_counts for split in index.splits.values()).tolist() == [212, 357]
    with pytest.raises(UserError, match="Did you mean iris"):  # a name in another case is the nearest
        open_source(ShardConfig(source="sklearn", dataset="IRIS"))
    with pytest.raises(UserError, match="Did you mean digits"):
        open_source(ShardConfig(source="sklearn", dataset="digit"))


# torchvision: the real readers on files of the real formats; only the checksums they expect are those of the tiny files


def test_svhn_is_read_from_its_mat_files(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    random, pixels, digits_of = np.random.default_rng(0), {}, {}
    for part, count in (("train", 40), ("test", 12), ("extra", 8)):
        pixels[part] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        digits_of[part] = np.arange(count) % 10 + 1  # SVHN writes the digit 0 as 10
        path = tmp_path / f"{part}_32x32.mat"
        savemat(path, {"X": pixels[part].transpose(1, 2, 3, 0), "y": digits_of[part][:, None].astype(np.uint8)})
        url, file, _ = SVHN.split_list[part]
        monkeypatch.setitem(SVHN.split_list, part, [url, file, hashlib.md5(path.read_bytes()).hexdigest()])
    settings = {"source": "torchvision", "dataset": "SVHN", "path": str(tmp_path), "split": SplitConfig(0.25, 0.25)}
    index = convert(ShardConfig(**settings, out=str(tmp_path / "set")))
    counts = {name: split.num_samples for name, split in index.splits.items()}
    assert counts == {"train": 30, "val": 10, "test": 12} and index.classes == [str(k) for k in range(10)]
    for name, split in index.splits.items():
        order = [int(sample.split("/")[1]) for sample in split.names()]
        part = "test" if name == "test" else "train"
        assert np.array_equal(images(index, name), pixels[part][order])
        assert np.array_equal(split.table()["label"], digits_of[part][order] % 10)
    more = convert(ShardConfig(**settings, extra=True, out=str(tmp_path / "more")))
    train = more.splits["train"]
    assert sum(name.startswith("extra/") for s in more.splits.values() for name in s.names()) == 8
    for image, name in zip(images(more), train.names(), strict=True):
        part, number = name.split("/")
        assert np.array_equal(image, pixels[part][int(number)])
    source = open_source(ShardConfig(**settings, extra=True))
    part = pickle.loads(pickle.dumps(source.take(np.array([55, 3, 41, 39]))))  # what a worker process is sent
    for place, i in enumerate((55, 3, 41, 39)):
        assert part.read(place) == source.read(i) and part.labels[place] == source.labels[i]


def test_cifar10_is_read_from_its_pickles(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder, random = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    batches = {}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        batches[name] = random.integers(0, 256, (10, 3072), dtype=np.uint8)
    sums = {name: write(name, {"data": data, "labels": list(range(10))}) for name, data in batches.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write("batches.meta", {"label_names": classes})})
    index = convert(ShardConfig(source="torchvision", dataset="CIFAR10", path=str(tmp_path), out=str(tmp_path / "set")))
    assert index.classes == classes
    assert {name: s.num_samples for name, s in index.splits.items()} == {"train": 45, "val": 5, "test": 10}
    order = [int(name.split("/")[1]) for name in index.splits["test"].names()]
    expected = batches["test_batch"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(images(index, "test"), expected[order])
    assert index.splits["test"].table()["label"].tolist() == order
    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"missing or damaged(.|\n)*cifar-10-python.tar.gz"):
        open_source(ShardConfig(source="torchvision", dataset="CIFAR10", path=str(tmp_path)))


def test_fashion_mnist_is_read_from_its_idx_files(tmp_path):
    folder, random = tmp_path / "FashionMNIST/raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    pixels = {"train": random.integers(0, 256, (20, 28, 28), dtype=np.uint8)}
    pixels["t10k"] = random.integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part, data in pixels.items():
        labels = (np.arange(len(data)) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, *data.shape) + data.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, len(data)) + labels.tobytes())
    source = open_source(ShardConfig(source="torchvision", dataset="FashionMNIST", path=str(tmp_path)))
    assert source.classes[0] == "T-shirt/top" and source.preset.tolist() == [0] * 20 + [2] * 10
    stored = np.asarray(Image.open(io.BytesIO(source.read(23)[0])))
    assert stored.ndim == 2 and np.array_equal(stored, pixels["t10k"][3])


def test_a_set_of_files_keeps_their_bytes(tmp_path):
    names = [f"2750/{name}/{name}_{i}.jpg" for name in ("Forest", "River") for i in range(4)]
    raw = {name: picture(tmp_path / "eurosat" / name, seed=k) for k, name in enumerate(names)}
    config = ShardConfig(source="torchvision", dataset="EuroSAT", path=str(tmp_path), out=str(tmp_path / "set"))
    index = convert(config)
    assert index.classes == ["Forest", "River"]
    for name, payload in zip(index.splits["train"].names(), payloads(index), strict=True):
        assert payload == raw[name.removeprefix("eurosat/")]


def test_a_set_that_only_torchvision_can_read_is_read_through_it(tmp_path):
    from torchvision.datasets import FakeData

    from dist_train.torchsets import Drawn, _store

    dataset = FakeData(6, image_size=(3, 5, 4), num_classes=2)
    store, _, _ = _store("all", dataset, str(tmp_path))
    assert isinstance(store, Drawn)
    part = store.take(np.array([4, 1]))
    for place, i in enumerate((4, 1)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(part.read(place)[0]))), np.asarray(dataset[i][0]))


@pytest.mark.parametrize("dataset, expected", [
    ("SVHN", "train_32x32.mat"), ("CIFAR10", "cifar-10-python.tar.gz"), ("FashionMNIST", "train-images-idx3-ubyte.gz"),
    ("MNIST", "MNIST/raw"), ("ImageNet", "ILSVRC2012_img_train.tar"), ("STL10", "stl10_binary.tar.gz"),
    ("Flowers102", "102flowers.tgz"), ("OxfordIIITPet", "images.tar.gz"), ("Food101", "food-101.tar.gz"),
    ("GTSRB", "GTSRB-Training_fixed.zip"), ("EuroSAT", "EuroSAT.zip"), ("Imagenette", "imagenette2.tgz"),
    ("FER2013", "docs.pytorch.org"),
])  # fmt: skip
def test_missing_files_of_torchvision_sets_are_named(tmp_path, dataset, expected):
    with pytest.raises(UserError, match=expected) as caught:
        open_source(ShardConfig(source="torchvision", dataset=dataset, path=str(tmp_path)))
    assert "missing or damaged" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_download_that_fails_says_what_to_fetch(tmp_path, monkeypatch):
    import urllib.request

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"cannot be downloaded(.|\n)*train_32x32.mat"):
        open_source(ShardConfig(source="torchvision", dataset="SVHN", path=str(tmp_path), download=True))


def test_torchvision_sets_that_cannot_be_had_are_refused(tmp_path):
    for dataset, message in (("CIFAR11", "Did you mean CIFAR10"), ("EMNIST", "needs more settings"),
                             ("svhn", "Did you mean SVHN")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            open_source(ShardConfig(source="torchvision", dataset=dataset, path=str(tmp_path)))


def test_every_shipped_yaml_is_read_and_says_where_its_files_go():
    from dist_train.shard import read_shard_config

    paths = sorted(Path(__file__).parent.parent.glob("datasets/*.yaml"))
    assert len(paths) >= 7
    for path in paths:
        config = read_shard_config([str(path)])
        assert config.out == f"shards/{path.stem}"
        text = path.read_text()
        raw = path.stem.partition("-3class")[0]  # a part of a set has the raw files of the whole
        assert text.startswith("# ") and (config.source == "sklearn" or f"datasets/{raw}" in text)


@pytest.mark.parametrize("odd", ["k.A.", "1.250,00"])
def test_a_column_of_decimal_commas_is_refused_whatever_else_stands_in_it(tmp_path, odd):
    (tmp_path / "t.csv").write_text(f"a;fee;y\n1;12,50;x\n2;999,00;z\n3;{odd};x\n")
    with pytest.raises(UserError, match="column 'fee' has '12,50', and . more with a comma; expected '12.50'") as caught:
        open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="y"))
    assert str(caught.value).endswith("or leave the column out with --drop '[fee]'.")


@pytest.mark.parametrize("name", ["fee", "Länge (cm)", "a, b", "it's", "yes", "12", "x: y", "a  b " * 40 + "c"])
def test_the_option_that_drops_a_column_is_read_as_that_column(name):
    option, names = shlex.split(drop_option(name))
    assert option == "--drop" and read_config(ShardConfig, [option, names], "shard").drop == (name,)


def test_the_command_that_writes_a_file_in_utf_8_does(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("Länge,kind\n1,a\n2,b\n".encode("cp1252"))
    with pytest.raises(UserError, match="not a CSV file in UTF-8") as caught:
        open_source(ShardConfig(source="csv", path=str(path), target="kind"))
    command = str(caught.value).partition("elsewhere with ")[2].rstrip(".").replace("FILE", str(path)).replace("NEW", f"{path}.new")
    subprocess.run(command, shell=True, check=True)
    assert open_source(ShardConfig(source="csv", path=f"{path}.new", target="kind")).features == ["Länge"]


def test_columns_without_a_name_are_left_out_however_many_and_are_no_target(tmp_path):
    (tmp_path / "t.csv").write_text(",a,y,\n0,1,x,\n1,2,z,\n")
    source = open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="y"))
    assert source.features == ["a"] and any(note.startswith("2 columns without a name") for note in source.notes)
    with pytest.raises(UserError, match=r"`target` is not set.* The columns are a, y\.$"):
        open_source(ShardConfig(source="csv", path=str(tmp_path / "t.csv")))
