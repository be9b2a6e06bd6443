"""Pictures listed in a CSV file: the same shards as of class folders, splits and groups kept, every fault named with its line."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import sharded
from test_shard import all_bytes
from test_sources import picture

from dist_train.config import DataConfig, RunConfig
from dist_train.convert import convert, convert_part
from dist_train.errors import UserError
from dist_train.folds import fold_view
from dist_train.index import load_index
from dist_train.partition import assign_splits, keep_groups_whole, name_draws, told_splits
from dist_train.repair import repair
from dist_train.shard_config import ShardConfig, SplitConfig, check_settings
from dist_train.sources import open_source


def write_list(folder: Path, *rows: str, header="image,label") -> ShardConfig:
    """Write folder/t.csv, and the pictures that its first column names if there are none; return settings to shard it."""
    for k, row in enumerate(rows):
        path = folder / row.split(",")[0]
        if "\0" not in row and path.suffix and not path.exists() and folder in path.resolve().parents:
            picture(path, seed=k)
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return ShardConfig(source="list", path=str(folder / "t.csv"), target="label", out=str(folder / "set"), workers=1)


def test_a_list_makes_the_shards_that_class_folders_make(tmp_path):
    names = [f"{name}/{i}.png" for name in ("cat", "dog", "owl") for i in range(12)]
    for k, name in enumerate(names):
        picture(tmp_path / "raw" / name, seed=k)
    shuffled = np.random.default_rng(0).permutation(names)
    config = write_list(tmp_path, *(f"./{name},{name[:3]}" for name in shuffled))
    config = replace(config, root=str(tmp_path / "raw"))
    convert(config)
    convert(ShardConfig(path=str(tmp_path / "raw"), out=str(tmp_path / "of_folders"), workers=1))
    listed, of_folders = all_bytes(tmp_path / "set"), all_bytes(tmp_path / "of_folders")
    assert listed.pop("index.json") != of_folders.pop("index.json")  # the settings
    assert listed == of_folders and len(listed) > 6
    assert load_index(tmp_path / "set").mean == load_index(tmp_path / "of_folders").mean


def test_names_without_an_ending_and_what_spreadsheets_write_are_read(tmp_path):
    for k, name in enumerate(("ISIC_1.jpg", "ISIC_2.jpg", "more/ISIC_3.JPG", "unlisted.jpg")):
        picture(tmp_path / name, seed=k)
    (tmp_path / "t.csv").write_bytes(
        "\ufeffage;isic_id;label\r\n7; ISIC_1 ;10\r\n;ISIC_2;9\r\n8;more/ISIC_3.JPG;10\r\n".encode()
    )
    source = open_source(
        ShardConfig(source="list", path=str(tmp_path / "t.csv"), target="label", picture="isic_id", ending=".jpg")
    )
    assert source.classes == ["9", "10"] and source.labels.tolist() == [0, 1, 1] and source.preset is source.groups is None
    assert source.names == ["ISIC_2.jpg", "ISIC_1.jpg", "more/ISIC_3.JPG"]
    for name, i in zip(source.names, range(3), strict=True):
        assert source.read(i) == ((tmp_path / name).read_bytes(), "jpg")


def test_splits_of_the_list_are_kept_and_a_missing_one_is_drawn_from_training(tmp_path):
    rows = [f"{i}.png,{'ab'[i % 2]},{'Train' if i < 20 else 'testing'},x" for i in range(30)]
    write_list(tmp_path, *rows, header="image,label,part,other")
    argv = ["--source", "list", "--path", str(tmp_path / "t.csv"), "--target", "label", "--split-column", "part"]
    splits = load_index(sharded(tmp_path / "set", *argv, "--split.test", "0.5", "--split.val", "0.2")).splits
    assert {name: split.class_counts.tolist() for name, split in splits.items()} == {"train": [8, 8], "val": [2, 2], "test": [5, 5]}
    assert sorted(splits["test"].names()) == sorted(f"{i}.png" for i in range(20, 30))


def test_a_split_of_one_sample_is_told_in_the_singular():
    splits = np.array([0] * 7 + [1] + [2] * 2, np.int8)
    assert told_splits(SplitConfig(), None, splits) == "of 10 training samples 1 is drawn as val and 2 are drawn as test"


SPLIT, GROUP = {"split_column": "part"}, {"group": "patient"}


@pytest.mark.parametrize(("rows", "settings", "told"), [
    (["a.png,x", "b.png,y", "a.png,y"], {}, "1 row names a picture again:\n  lines 2 and 4: a.png, label 'x' and 'y'\n  Keep one"),
    (["a.png,x", "b.png,y", "c/../a.png,x"], {}, "lines 2 and 4: a.png\n"),
    (["a.png,x,train", "b.png,y,train", "a.png,x,test"], SPLIT, "lines 2 and 4: a.png, part 'train' and 'test'\n"),
    (["a.png,x,train", "b.png,y,holdout", "c.png,y,holdout", "d.png,y,2"], SPLIT,
     "column part is 'holdout' (2 rows), '2' (1 row); expected train, val or test.\n  Write those, or leave --split-column out"),
    (["a.png,x,train", "b.png,y,test"], SPLIT, "1 class has no row in the training split:\n  'y'\n"),
    (["a.png,x,train,p1", "b.png,y,train,p2", "c.png,y,test,p1", "d.png,y,val,p1"], SPLIT | GROUP,
     "1 group of column patient lies in two splits:\n  'p1': train in line 2, test in line 4\n  Put each into one"),
    (["../t/a.png,x", "/etc/b.png,y", "c.png,y", "sub/../../d.png,x"], {},
     "3 names lead out of the root:\n  line 2: '../t/a.png'\n  line 3: '/etc/b.png'\n  line 5: 'sub/../../d.png'\n  Set --root"),
    (["ISIC_1,x", "b.png,y"], {},
     "1 name ends as no picture does:\n  line 2: 'ISIC_1'\n  Expected .jpg, .jpeg, .png, .webp, .bmp; --ending .jpg adds"),
    (["b\0.png,x", "c.png,y"], {}, "1 name ends as no picture does:\n  line 2: 'b\\x00.png'"),
    (["a.png,x", "b.png,x"], {}, "one class only, 'x'"),
])  # fmt: skip
def test_what_is_wrong_in_the_rows_is_named_with_its_lines(tmp_path, rows, settings, told):
    (tmp_path / "t").mkdir()
    full = [row + "," * (3 - row.count(",")) for row in rows]
    config = write_list(tmp_path / "t", *full, header="image,label,part,patient")
    with pytest.raises(UserError, match=re.escape(told)):
        open_source(replace(config, **settings))


def test_faults_of_every_kind_are_told_at_once_and_counted_beyond_the_first_five(tmp_path):
    rows = [f"gone{i}.png,x,train,p" for i in range(1234)] + ["a.png,x,train,p", "a.png,y,test,p", "../b.png,y,val,q"]
    for name in ("a.png", "folder.png/c.png"):
        picture(tmp_path / name)
    config = replace(write_list(tmp_path, header="image,label,part,patient"), split_column="part", group="patient")
    (tmp_path / "t.csv").write_text("\n".join(["image,label,part,patient", "folder.png,x,train,p", *rows]))
    with pytest.raises(UserError) as error:
        open_source(config)
    text = str(error.value)
    assert f"1,235 of 1,238 pictures are not below {tmp_path}:\n  line 2: folder.png: not a file\n  line 3: gone0.png: " in text
    assert "gone3.png" in text and "gone4.png" not in text and "  and 1,230 more\n  Set --root to the folder" in text
    assert len(re.findall(r"^\S+t\.csv: ", text, flags=re.M)) == 5
    for kind in ("leads out", "picture again", "no row in the training split", "'p': train in line 2, test in line 1238"):
        assert kind in text


def test_missing_pictures_are_bad_samples_and_limited_like_others(tmp_path):
    config = write_list(tmp_path, *(f"{i}.png,{'ab'[i % 2]}" for i in range(20)))
    (tmp_path / "3.png").unlink()
    (tmp_path / "8.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UserError, match=r"(?s)1 of 20 pictures is not below.*line 5: 3.png: No such file.*--max-bad 1"):
        convert(config)
    with pytest.raises(UserError, match="2 samples so far cannot be read; max_bad allows 1"):
        convert(replace(config, max_bad=1))
    index = convert(replace(config, max_bad=2))
    assert sorted(sample["name"] for sample in index.left_out) == ["3.png", "8.png"]
    assert sum(split.num_samples for split in index.splits.values()) == 18


def test_rows_without_a_value_are_left_out_and_named_or_refused(tmp_path):
    rows = [f"{i}.png,{'ab'[i % 2]},p{i}" for i in range(6)] + ["6.png,,p", "7.png,NA,p", ",a,p", "9.png,b,", "10.png,?,nan"]
    config = replace(write_list(tmp_path, *rows, header="image,label,patient"), group="patient")
    source = open_source(config)
    assert len(source.names) == 6 and len(source.left_out) == 5
    assert source.left_out[0] == {"name": "line 8", "why": "column label is empty"}
    assert source.notes == ["5 of 11 rows were left out: column label is empty (1), column label is 'NA' (1), "
                            "column image is empty (1), column patient is empty (1), column label is '?' (1)"]  # fmt: skip
    with pytest.raises(UserError, match=r"(?s)5 of 11 rows lack a value:.*line 8: column label is empty.*--missing drop"):
        open_source(replace(config, missing="error"))
    with pytest.raises(UserError, match=r"1 of 2 rows lacks a value:"):
        open_source(replace(write_list(tmp_path, "a.png,", "b.png,c"), missing="error"))
    with pytest.raises(UserError, match=r"(?s)2 of 2 rows lack a value:.*name another column"):
        open_source(write_list(tmp_path, "a.png,", "b.png,na"))


def test_columns_and_folders_that_are_not_there_are_named_at_once(tmp_path):
    config = write_list(tmp_path, "a.png,x", "b.png,y", header="file,label")
    with pytest.raises(UserError) as error:
        open_source(replace(config, target="", picture="files", group="patient", split_column="label"))
    lines = [line.partition("t.csv: ")[2] for line in str(error.value).splitlines()]
    assert lines == [
        f"{found}; expected the name of the column that holds the {holds}. {hint}" for found, holds, hint in (
            ("picture: there is no column 'files'", "picture's path", "Did you mean file?"),
            ("`target` is not set", "class", "The columns are file, label."),
            ("group: there is no column 'patient'", "group", "The columns are file, label."))
    ]
    with pytest.raises(UserError, match="target and group are both 'label'; expected a column for each"):
        open_source(replace(config, picture="file", group="label"))
    with pytest.raises(UserError, match="pictures: does not exist; expected the folder below which the pictures of"):
        open_source(replace(config, picture="file", root=str(tmp_path / "pictures")))
    with pytest.raises(UserError, match="Set `path` to the CSV file"):
        open_source(replace(config, path=str(tmp_path / "none.csv")))


def test_settings_of_lists_are_for_lists():
    with pytest.raises(UserError) as error:
        check_settings(ShardConfig(root="a", ending=".jpg", split_column="b", group="c", picture="d", target="e"))
    told = str(error.value)
    assert told.count("is for source: list, and this is folder") == 4 and told.count("is for source: csv or list") == 2
    check_settings(ShardConfig(source="list", target="y", group="c", missing="error"))
    with pytest.raises(UserError, match="drop is for source: csv(.|\n)*missing is mean"):
        check_settings(ShardConfig(source="list", target="y", drop=("id",), missing="mean"))


# Groups


def made_groups(num_groups: int, num_classes: int, largest: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels, groups, draws): groups of many sizes, each of mostly one class, the classes of falling counts."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, (largest * rng.random(num_groups) ** 3).astype(int))
    groups = np.repeat(np.arange(num_groups), sizes)
    shares = 0.5 ** np.arange(num_classes)
    mostly = rng.choice(num_classes, num_groups, p=shares / shares.sum())
    labels = np.where(rng.random(len(groups)) < 0.8, mostly[groups], rng.choice(num_classes, len(groups), p=shares / shares.sum()))
    return labels.astype(np.int32), groups, name_draws([str(i) for i in range(len(groups))], seed)


def class_errors(splits, labels, share, split=1) -> np.ndarray:
    """Relative error of each class's count in a split, and of the whole split's."""
    inside = np.bincount(labels[splits == split], minlength=labels.max() + 1) / np.bincount(labels) / share
    return np.abs(np.append(inside, (splits == split).mean() / share) - 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_groups", "num_classes", "largest"), [(2000, 4, 6), (300, 3, 40), (60, 2, 30)])
def test_groups_lie_in_one_split_and_classes_are_shared_out_as_evenly_as_they_allow(num_groups, num_classes, largest, seed):
    labels, groups, draws = made_groups(num_groups, num_classes, largest, seed)
    splits = assign_splits(labels, None, draws, 0.2, 0.1, groups)
    assert {split for group in range(num_groups) for split in [np.ptp(splits[groups == group])]} == {0}
    assert (np.bincount(labels[splits == 0], minlength=num_classes) > 0).all()
    rng = np.random.default_rng(seed)
    for split, share in ((1, 0.2), (2, 0.1)):
        errors = class_errors(splits, labels, share, split)
        drawn = [class_errors(split * (rng.random(num_groups) < share)[groups], labels, share, split) for _ in range(40)]
        assert errors.max() < np.median([other.max() for other in drawn]) / 3
        assert errors[-1] < 0.1
    sizes, place = np.bincount(groups), np.array([splits[groups == group][0] for group in range(num_groups)])
    means = np.array([sizes[place == split].mean() for split in range(3)]) / sizes.mean()
    assert num_groups < 300 or np.abs(means - 1).max() < 0.1  # no split has the small groups


def test_groups_of_one_sample_are_shared_out_like_samples():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(40), np.arange(1, 41))).astype(np.int32)
    draws = name_draws([str(i) for i in range(len(labels))], 0)
    alone, grouped = (assign_splits(labels, None, draws, 0.2, 0.1, groups) for groups in (None, np.arange(len(labels))))
    for split in range(3):
        assert np.bincount(labels[alone == split]).tolist() == np.bincount(labels[grouped == split]).tolist()


def test_a_draw_of_groups_follows_names_and_seed_not_order_or_numbers():
    labels, groups, draws = made_groups(200, 3, 20, 0)
    splits = assign_splits(labels, None, draws, 0.2, 0.1, groups)
    assert (splits == assign_splits(labels[::-1], None, draws[::-1], 0.2, 0.1, 1000 - groups[::-1])[::-1]).all()
    other = assign_splits(labels, None, name_draws([str(i) for i in range(len(labels))], 1), 0.2, 0.1, groups)
    assert (splits != other).mean() > 0.1


def test_a_group_that_has_all_of_a_class_is_trained_on():
    labels, groups = np.array([0] * 90 + [1] * 10), np.append(np.arange(90) // 3, np.full(10, 99))
    for seed in range(20):
        splits = assign_splits(labels, None, name_draws([str(i) for i in range(100)], seed), 0.3, 0.3, groups)
        assert (splits[90:] == 0).all() and 20 < (splits == 1).sum() < 40


def test_groups_of_a_source_with_splits_are_drawn_from_training_alone():
    labels, groups, draws = made_groups(100, 2, 10, 0)
    preset = np.where(groups < 30, 2, 0).astype(np.int8)
    splits = assign_splits(labels, preset, draws, 0.2, 0.2, groups)
    assert ((splits == 2) == (groups < 30)).all() and (splits == 1).any()
    assert all(np.ptp(splits[groups == group]) == 0 for group in range(100))
    whole = keep_groups_whole(np.where(groups < 30, 1, 0), labels, groups, draws)
    assert (whole == (groups < 30)).mean() > 0.5  # what is whole already is near


def test_too_few_groups_for_a_split_are_refused():
    labels, groups = np.tile([0, 1], 50).astype(np.int32), np.arange(100) // 20
    draws = name_draws([str(i) for i in range(100)], 0)
    with pytest.raises(UserError, match=r"is 0.05, 5 of 100 samples, and no whole group goes there: there are 5, of 20 to 20"):
        assign_splits(labels, None, draws, 0.05, 0.05, groups)
    assert np.bincount(assign_splits(labels, None, draws, 0.2, 0.2, groups)).tolist() == [60, 20, 20]


def test_no_patient_lies_in_two_splits_of_a_set_however_it_is_written(tmp_path):
    rows = [f"p{i // 4}/{i}.png,{'abc'[i // 4 % 3]},p{i // 4}" for i in range(120)]
    config = replace(
        write_list(tmp_path, *rows, header="image,label,patient"),
        group="patient", split=SplitConfig(0.2, 0.2), merge=("a+c", "b"), shard_mb=0.01,
    )  # fmt: skip
    index = convert(config)
    patients = {name: {sample.partition("/")[0] for sample in split.names()} for name, split in index.splits.items()}
    assert len(set.union(*patients.values())) == sum(map(len, patients.values())) == 30
    assert [split.class_counts.tolist() for split in index.splits.values()] == [[48, 24], [16, 8], [16, 8]]
    whole = all_bytes(index.folder)
    for i in (1, 0):
        convert_part(replace(config, out=str(tmp_path / "parts/set"), part=f"{i}/2"))
    assert all_bytes(convert(replace(config, out=str(tmp_path / "parts/set"), join=True)).folder) == whole
    (tmp_path / "set/train-000001.tar").unlink()
    assert repair(replace(config, repair=True)) == ["train-000001.tar"] and all_bytes(tmp_path / "set") == whole
    with pytest.raises(UserError, match="keep the groups of column 'patient' whole"):
        fold_view(index, RunConfig(data=DataConfig(folds=5)))
