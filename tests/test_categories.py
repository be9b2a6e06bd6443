"""Columns of text and of truth values: features with exact names, and the same features of a new file with other columns."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sharded, table_run

from dist_train import shard
from dist_train.csv_files import numbers_in
from dist_train.errors import UserError
from dist_train.export import FILES, load_exported
from dist_train.export import main as export_main
from dist_train.index import load_index
from dist_train.predict import eval_main, main
from dist_train.report import main as report_main
from dist_train.shard_config import ShardConfig
from dist_train.sources import Source, open_source
from dist_train.tables import CONSTANT_STD, MAX_TEXTS, column_statistics, feature_places
from dist_train.train import run_training
from dist_train.verify import inspect_main

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(folder: Path, text: str, **settings) -> Source:
    (folder / "t.csv").write_text(text, encoding="utf-8", newline="")
    return open_source(ShardConfig(source="csv", path=str(folder / "t.csv"), target="k", **settings))


def test_truth_values_are_numbers_and_classes_where_they_are_the_target(tmp_path):
    source = opened(tmp_path, "x,sure,k\n1,True,False\n2, FALSE ,True\n3,true,False\n4,,True\n")
    assert source.features == ["x", "sure"] and source.classes == ["False", "True"]
    assert source.store.rows.tolist() == [[1, 1], [2, 0], [3, 1]] and source.labels.tolist() == [0, 1, 0]
    assert source.left_out == [{"name": "line 5", "why": "column sure is empty"}]


@pytest.mark.parametrize("missing", ["drop", "mean", "error"])
def test_a_column_of_text_is_a_feature_for_each_text_in_its_place(tmp_path, missing):
    text = "x,town,y,gate,k\n1,Rome,5,b,0\n2, Oslo ,6,a,1\n3,,7,b,0\n4,Rome,8,a,1\n5,rome,9,b,0\n"
    source = opened(tmp_path, text, missing=missing)
    assert source.features == ["x", "town=Oslo", "town=Rome", "town=rome", "y", "gate=a", "gate=b"]
    assert source.store.rows.dtype == np.float32 and not source.left_out
    assert source.store.rows[:, 1:4].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert source.store.rows[:, [0, 4]].tolist() == [[1, 5], [2, 6], [3, 7], [4, 8], [5, 9]]
    assert source.store.rows[:, 5:].tolist() == [[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]
    assert source.notes == ["2 columns of text, a feature for each text: town (3), gate (2)"]


def test_columns_of_more_texts_are_dropped_with_their_number(tmp_path):
    rows = "".join(f"{i % 7},t{i % MAX_TEXTS},u{i % (MAX_TEXTS + 1)},,{i % 2}\n" for i in range(100))
    source = opened(tmp_path, "x,few,many,none,k\n" + rows)
    assert len(source.features) == 1 + MAX_TEXTS and not any(name.startswith("many") for name in source.features)
    assert source.notes == [f"1 column of text, a feature for each text: few ({MAX_TEXTS})",
                            f"1 column of more than {MAX_TEXTS} texts, dropped: many ({MAX_TEXTS + 1}, such as u0)",
                            "1 column without a value, dropped: none"]  # fmt: skip


def test_a_text_that_only_rows_left_out_have_is_dropped(tmp_path):
    source = opened(tmp_path, "x,town,k\n1,Rome,0\n2,Oslo,1\n,Bern,0\n3,,1\n")
    assert source.features == ["x", "town=Oslo", "town=Rome"]
    assert "1 column that never changes, dropped: town=Bern" in source.notes


def test_a_column_of_numbers_with_some_texts_stays_one_and_the_note_names_it(tmp_path):
    house = ["1", "2", "3a", "4", "3b", "6", "7", "8"]
    rows = "".join(f"{'' if i == 6 else i},{cell},{'' if i == 7 else i % 2}\n" for i, cell in enumerate(house))
    source = opened(tmp_path, "x,house,k\n" + rows)
    assert source.features == ["x", "house"] and source.store.rows[:, 1].tolist() == [1, 2, 4, 6]
    assert source.notes == ["4 of 8 rows were left out for missing values: house (2), k (1), x (1)"]


def test_the_note_names_the_five_columns_that_lack_most(tmp_path):
    rows = ["1,1,1,1,1,1,0", "2,2,2,2,2,2,1", "3,3,3,3,3,3,0", ",,,,,,", "1,,,,,,1", "1,1,,,,,0", "1,1,1,1,,,0"]
    source = opened(tmp_path, "\n".join(["a,b,c,d,e,f,k", *rows]) + "\n")
    assert source.notes == ["4 of 7 rows were left out for missing values: e (4), f (4), c (3), d (3), b (2), ..."]


@pytest.mark.parametrize("cells, features", [
    (["S", "M", "42", "L", "M", "S"], ["x", "c=42", "c=L", "c=M", "c=S"]),
    (["S", "M", "4", "2", "", ""], ["x", "c"]),  # as many of each
    (["S", "M", "True", "False", "S", ""], ["x", "c=False", "c=M", "c=S", "c=True"]),
    (["NA", "?", "nan", "null", "4", "2"], ["x", "c"]),
    (["S", "3,7", "M", "L", "4", "M"], ["x", "c=3,7", "c=4", "c=L", "c=M", "c=S"]),
    (["18_25", "26_40", "26_40", "18_25", "41_60", ""], ["x", "c=18_25", "c=26_40", "c=41_60"]),
])  # fmt: skip
def test_most_cells_decide_whether_a_column_is_of_text(tmp_path, cells, features):
    rows = "".join(f'{i},"{cell}",{i % 2}\n' for i, cell in enumerate(cells))
    assert opened(tmp_path, "x,c,k\n" + rows, missing="mean").features == features


def test_a_cell_with_an_underscore_is_no_number(tmp_path):
    source = opened(tmp_path, "x,k\n1,0\n1_8,1\n3,0\n 4 ,1\n", missing="mean")
    np.testing.assert_array_equal(source.store.rows, np.float32([[1], [np.nan], [3], [4]]))


def test_numbers_are_read_alike_in_columns_with_and_without_texts():
    cells = ["1", " 2.5 ", "-0", "-nan", "1e39", "-1e39", "inf", "3.4028234e38", "1e-50", "+7"]
    expected = np.float32([1, 2.5, -0.0, np.nan, np.inf, -np.inf, np.inf, 3.4028234e38, 0, 7])
    for more, values in ([], []), (["x", "", "1_0", "TRUE"], [np.nan, np.nan, np.nan, 1]):
        numbers = numbers_in(cells + more)
        assert numbers.dtype == np.float32 and numbers.tobytes() == np.append(expected, np.float32(values)).tobytes()


def test_rare_texts_enter_as_10_at_most_and_the_loss_stays_finite(tmp_path):
    coats = [["gold" if i == 77 + 50 * c else "plain" for i in range(5000)] for c in range(12)]
    labels = [int((i % 7 > 3) ^ ("gold" in cells)) for i, cells in enumerate(zip(*coats, strict=True))]  # they surprise
    rows = [",".join(map(str, row)) for row in zip((i % 7 for i in range(5000)), *coats, labels, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join([",".join(["x", *(f"c{c}" for c in range(12)), "k"]), *rows]) + "\n")
    index = load_index(sharded(tmp_path / "set", "--source", "csv", "--path", str(tmp_path / "t.csv"), "--target", "k"))
    assert index.features[:3] == ["x", "c0=gold", "c0=plain"] and index.std.count(0.1) > 12
    assert {*index.std[1:]} <= {0.1, CONSTANT_STD}
    assert run_training(table_run(index.folder, tmp_path / "run", "--optim.lr", "0.1", "--train.epochs", "2")) == 0
    assert np.isfinite(json.loads((tmp_path / "run" / "result.json").read_text())["test"]["loss"])


@pytest.mark.parametrize("column, expected", [
    ([0, 0, 1, 1], 0.5), ([0] * 199 + [1], 0.1), ([0] * 198 + [np.nan, 1], 0.1), ([1] * 199 + [0], 0.1),
    ([0] * 999 + [2], 2 * np.sqrt(0.001 * 0.999)), ([0] * 999 + [0.01], 0.01 * np.sqrt(0.001 * 0.999)),
    ([0, 0], CONSTANT_STD), ([1], CONSTANT_STD), ([0.1] * 7, CONSTANT_STD), ([np.nan, 7e4, 7e4], CONSTANT_STD),
])  # fmt: skip
def test_the_std_has_a_floor_in_columns_of_0_and_1_and_makes_nothing_of_what_never_changes(column, expected):
    mean, std = column_statistics(np.float32(column)[:, None])
    assert np.isclose(mean[0], np.nanmean(column)) and np.isclose(std[0], expected)


UNTAUGHT = "3 columns that never change in the training split, 0 to the network whatever stands elsewhere: "


def test_what_never_changes_in_training_moves_no_output_whatever_stands_elsewhere(tmp_path, capsys):
    rows = [f"{i % 10},7,Rome,train,{i % 10 // 5}" for i in range(60)] + [f"{i},50000,Lima,test,{i // 5}" for i in range(10)]
    path, run = tmp_path / "t.csv", tmp_path / "run"
    path.write_text("\n".join(["x,c,town,part,k", *rows]) + "\n")
    shard.main(["--source", "csv", "--path", str(path), "--target", "k", "--split-column", "part", "--out", str(tmp_path / "set"),
                "--workers", "1"])  # fmt: skip
    assert capsys.readouterr().out.count(f"{UNTAUGHT}c, town=Lima, town=Rome\n") == 1
    index = load_index(str(tmp_path / "set"))
    assert index.mean[1:] == [7, 0, 1] and index.std[1:] == [CONSTANT_STD] * 3
    argv = ["--optim.lr", "0.05", "--train.epochs", "20", "--data.val_split", ""]
    assert run_training(table_run(index.folder, run, *argv)) == 0
    assert json.loads((run / "result.json").read_text())["test"]["top1"] == 1
    path.write_text("x,c,town\n" + "".join(f"3,{c},{town}\n" for c, town in ((7, "Rome"), (50000, "Lima"), (-1e9, "Oslo"))))
    expected = {*predicted(capsys, run, path)[0]}
    assert len(expected) == 1
    path.write_text("x\n3\n")  # what nothing was learnt of need not be there
    assert {*predicted(capsys, run, path)[0]} == expected
    rows = torch.tensor([[3, 7, 0, 1], [3, 50000, 1, 0], [3, -1e9, 0, 0], [3, torch.nan, 0, 1]])
    for kind in ("safetensors", "torch-export"):
        export_main([str(run), "--to", kind, "--out", str(tmp_path / kind)])
        logits = load_exported(tmp_path / kind / FILES[kind])(rows)
        assert torch.equal(logits, logits[:1].expand(4, -1))


def split_rows(path: Path, words: list[str], towns: list[str]) -> ShardConfig:
    rows = "".join(f"{i},{towns[i % len(towns)]},{word},{i % 2}\n" for i, word in enumerate(words))
    path.write_text("x,town,part,k\n" + rows)
    return ShardConfig(source="csv", path=str(path), target="k", split_column="part")


def test_splits_of_a_column_are_kept_and_share_one_list_of_features(tmp_path):
    words = ["Train"] * 20 + ["testing"] * 6 + ["", "NA"]
    source = open_source(split_rows(tmp_path / "t.csv", words, ["Oslo"] * 20 + ["Rome", "Bern"] * 4))
    assert source.features == ["x", "town=Bern", "town=Oslo", "town=Rome"]
    assert source.preset.tolist() == [0] * 20 + [2] * 6 and source.names[0] == "line 2"
    assert [row["why"] for row in source.left_out] == ["column part is empty", "column part is 'NA'"]


@pytest.mark.parametrize("words, settings, told", [
    (["train", "train", "holdout", "2"], {}, "t.csv: column part is 'holdout' (1 row), '2' (1 row); expected train, val or"),
    (["train", "test", "train", "val"], {}, "t.csv: 1 class has no row in the training split:\n  '1'\n"),
    (["train"] * 4, {"split_column": "parts"}, "no column 'parts'; expected the name of the column that holds the split. Did you"),
    (["train"] * 4, {"split_column": "k"}, "target and split_column are both 'k'; expected a column for each"),
])  # fmt: skip
def test_what_is_wrong_in_a_column_of_splits_is_named(tmp_path, words, settings, told):
    with pytest.raises(UserError, match=re.escape(told)):
        open_source(replace(split_rows(tmp_path / "t.csv", words, ["Oslo"]), **settings))


@pytest.mark.parametrize("header, settings", [
    ("A,A=b,k", {}), ("A,A=b,k", {"drop": ("A=b",)}), ("A,A=,k", {}), ("A,A=b=c,k", {}), ("k,A,A=k", {}),
])  # fmt: skip
def test_names_that_could_be_of_two_columns_are_refused(tmp_path, header, settings):
    rows = "".join(",".join(["0" if name == "k" else cell for name in header.split(",")]) + "\n" for cell in ("b", "c"))
    other = next(name for name in header.split(",") if name.startswith("A="))
    with pytest.raises(UserError, match=f"column '{other}' is named as a text of column 'A' would be"):
        opened(tmp_path, header + "\n" + rows, **settings)


def test_numbers_may_be_named_like_texts_where_there_are_none_to_mistake_them_for(tmp_path):
    assert opened(tmp_path, "A,A=b,k\n1,2,0\n2,5,1\n").features == ["A", "A=b"]
    assert opened(tmp_path, "A,A=b,k\nb,2,0\nc,5,1\n", drop=("A",)).features == ["A=b"]


def test_texts_with_control_characters_are_named_on_one_line(tmp_path):
    source = opened(tmp_path, 'x,town,k\n1,"New\nYork",0\n2,Zürich = 1,1\n3,\x1b[31m,0\n')
    assert source.features == ["x", "town=New\\nYork", "town=Zürich = 1", "town=\\x1b[31m"]


PLACES = {
    "as in training": (["x", "A"], ["x", "A=b", "A=c d"], [(0, ""), (1, "b"), (1, "c d")]),
    "a column of that name is a number": (["A=b", "A", "x"], ["x", "A=b"], [(2, ""), (0, "")]),
    "texts with the sign": (["A"], ["A=b=c", "A=="], [(0, "b=c"), (0, "=")]),
    "columns with the sign": (["A=b"], ["A=b=c"], [(0, "c")]),
    "no column": (["x", "B"], ["x", "A=b"], "lacks A=b. Its first line names x, B.\n  COLUMN=TEXT is read"),
    "no text": (["x", "A"], ["x", "A="], "lacks A=."),
    "no number": (["A"], ["x", "A=b"], "expected the columns x, A=b; lacks x. Its first line names A."),
    "no name": (["", "x"], ["x", "=b"], "lacks =b. Its first line names x."),
    "one text of two": (["A=b"], ["A=b", "A=c"], "expected the columns A=b, A=c; lacks A=c."),
    "two columns": (["A", "A=b"], ["A=b=c"], "A=b=c may be a text of column 'A' or of 'A=b'; expected one"),
}


@pytest.mark.parametrize("case", PLACES)
def test_features_are_found_in_a_header(case):
    header, features, expected = PLACES[case]
    if isinstance(expected, list):
        assert feature_places(Path("p.csv"), header, features) == expected
        return
    with pytest.raises(UserError) as caught:
        feature_places(Path("p.csv"), header, features)
    assert str(caught.value).startswith("p.csv: ") and expected in str(caught.value)


TOWNS = {"Oslo": "north", "Bergen": "north", "Rome": "south", "<b>Bari</b>": "south", "": "nowhere"}  # what the class is


@pytest.fixture(scope="module")
def town_run(tmp_path_factory):
    """(run, set) of a table whose class the column of text alone determines; a truth value and a number are noise."""
    folder = tmp_path_factory.mktemp("towns")
    random, towns = np.random.default_rng(0), list(TOWNS)
    lines = ["age,town,sure,region"]
    for i in range(300):
        town = towns[i % len(towns)]
        lines.append(f"{random.normal(40, 9):.2f},{town},{bool(random.random() < 0.5)},{TOWNS[town]}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    sharded(folder / "set", "--source", "csv", "--path", str(folder / "t.csv"), "--target", "region")
    run = folder / "run"
    argv = ["--model.hidden", "[16]", "--data.global_batch_size", "32", "--train.epochs", "12", "--optim.lr", "0.05"]
    assert run_training(table_run(str(folder / "set"), run, *argv)) == 0
    return run, folder / "set"


def test_the_class_is_learnt_from_the_text(town_run):
    run, shards = town_run
    assert load_index(str(shards)).features == ["age", "town=<b>Bari</b>", "town=Bergen", "town=Oslo", "town=Rome", "sure"]
    assert json.loads((run / "result.json").read_text())["test"]["top1"] == 1


def predicted(capsys, run: Path, path: Path) -> tuple[list[tuple[str, float]], str]:
    """(class, its probability) of each row, and what was said."""
    capsys.readouterr()
    assert main([str(run), str(path), "--json"]) == 0
    told = capsys.readouterr()
    return [(row["class"], row["probability"]) for row in map(json.loads, told.out.splitlines())], told.err


def test_rows_of_a_file_in_another_order_are_predicted_by_their_text(town_run, tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("note;sure;town;age\n" + "".join(f"{k};true; {town} ;{30 + k}\n" for k, town in enumerate(TOWNS)))
    rows, said = predicted(capsys, town_run[0], path)
    assert [name for name, _ in rows] == list(TOWNS.values()) and "town" not in said
    path.write_text("town=Rome,town=Oslo,town=<b>Bari</b>,town=Bergen,age,sure\n0,1,0,0,30,1\n")  # as they are stored
    assert predicted(capsys, town_run[0], path)[0] == rows[:1]


def test_texts_that_training_did_not_have_are_counted_and_count_as_none(town_run, tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("age,town,sure\n40,,True\n40,Lima,True\n40,oslo,True\n40,Lima,True\n40,Rome,True\n")
    rows, said = predicted(capsys, town_run[0], path)
    assert rows[1:4] == rows[:1] * 3 and [rows[0][0], rows[4][0]] == ["nowhere", "south"]
    assert said.count("column town: 3 cells have a text that the run does not know") == 1 and "'Lima', 'oslo'\n" in said
    path.write_text("age,city,sure\n40,Rome,True\n")
    with pytest.raises(UserError, match="expected the columns age, town, sure; lacks town. Its first line names age, city, sure.$"):
        main([str(town_run[0]), str(path)])


def test_eval_export_report_and_inspect_take_a_table_with_texts(town_run, tmp_path, capsys):
    run, shards = town_run
    eval_main([str(run), "--split", "test", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == 1
    export_main([str(run), "--to", "safetensors", "--out", str(tmp_path / "out")])
    (about,) = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
    assert about["input"]["columns"] == load_index(str(shards)).features
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["changed_predictions"] == 0
    report_main([str(run)])
    inspect_main([str(shards), "--out", str(tmp_path / "set.html")])
    inspect_main([str(shards), "--out", str(tmp_path / "set.png")])
    for page in (run / "report.html", tmp_path / "set.html"):
        text = page.read_text()
        assert "town=&lt;b&gt;Bari" in text and "<b>Bari" not in text
        assert not re.search(r"\bnan\b", text)
