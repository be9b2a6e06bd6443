"""A run on a table reads at prediction what conversion reads, and takes no other columns; pictures are decoded ahead."""

import contextlib
import csv
import json
import math
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_ranks, run_to_end, sharded, table_run, write_table
from PIL import Image
from safetensors.torch import load_file, save_file

from dist_train import predict
from dist_train.config import DataConfig, RunConfig
from dist_train.decode import decode_into
from dist_train.errors import UserError
from dist_train.export import export
from dist_train.export import main as export_main
from dist_train.index import load_index
from dist_train.predict import eval_main, main, picture_batches
from dist_train.report import main as report_main
from dist_train.scores import table_scores
from dist_train.train import run_training
from dist_train.watch import EXIT_LOST_RANK

COLUMNS = ("x", "y", "z")
BRIEF = ("--model.hidden", "[8]", "--data.global_batch_size", "16", "--train.epochs", "2")


@pytest.fixture(scope="module")
def run_on_table(tmp_path_factory):
    """(run on a table of three columns, the same rows with the columns in another order as shards, the folder)."""
    folder = tmp_path_factory.mktemp("table")
    rows = np.random.default_rng(0).normal(size=(80, 3)).round(3)
    for name, order in (("set", (0, 1, 2)), ("turned", (2, 0, 1))):
        lines = [",".join([*(COLUMNS[c] for c in order), "kind"])]
        lines += [",".join([*(str(row[c]) for c in order), "ab"[int(row[0] > 0)]]) for row in rows]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
        sharded(folder / name, "--source", "csv", "--path", str(folder / f"{name}.csv"), "--target", "kind")
    run = folder / "run"
    assert run_training(table_run(str(folder / "set"), run, *BRIEF)) == 0
    return run, folder


def predictions(capsys, *argv) -> tuple[int, list[dict]]:
    capsys.readouterr()
    code = main([*map(str, argv), "--json"])
    lines = capsys.readouterr().out.splitlines()
    return code, [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in lines]


def test_every_way_to_write_a_csv_gives_the_same_predictions(run_on_table, tmp_path, capsys):
    run, _ = run_on_table
    path = tmp_path / "p.csv"
    plain = "x,y,z\n0.5,1,2\n-0.5,1,2\n"
    texts = [plain, "\ufeff" + plain, plain.replace(",", ";"), plain.replace("x,y", "x, y"), "n,z,y,x\na,2,1,0.5\nb,2,1,-0.5\n"]
    found = []
    for text in texts:
        path.write_text(text, encoding="utf-8")
        found.append(predictions(capsys, run, path))
    assert found == [found[0]] * len(texts) and found[0][0] == 0
    assert [row["path"].rpartition(":")[2] for row in found[0][1]] == ["2", "3"]


def test_cells_that_are_no_finite_numbers_are_named_with_their_line(run_on_table, tmp_path, capsys):
    run, _ = run_on_table
    path = tmp_path / "p.csv"
    path.write_text("x,y,z\n0.5,1,2\n\nnan,1,2\n1,inf,2\n1,1,1e39\n1,1, \n1,1,red\n")
    code, rows = predictions(capsys, run, path)
    assert code == 2
    assert [row["path"].rpartition(":")[2] for row in rows if "error" in row] == ["4", "5", "6", "7", "8"]
    (good,) = [row for row in rows if "error" not in row]
    assert math.isclose(sum(entry["probability"] for entry in good["top"]), 1, abs_tol=1e-4)
    errors = [row["error"] for row in rows if "error" in row]
    assert errors[0] == "column x is 'nan'; shard with --missing mean to predict such rows"
    assert errors[1] == "not a number: column y is 'inf'" and errors[4] == "not a number: column z is 'red'"
    assert errors[3] == "column z is empty; shard with --missing mean to predict such rows"
    assert main([str(run), str(path)]) == 2
    told = capsys.readouterr()
    assert told.out.startswith(f"{path}:2 ") and told.out.count("\n") == 1
    assert told.err.splitlines() == [*(f"{path}:{k}: {error}" for k, error in enumerate(errors, 4)), "5 of 6 could not be read"]
    path.write_text('x,y,z\n1,1,2\n"3,7",2,1\n')
    with pytest.raises(UserError, match=r"p.csv, line 3: column 'x' has '3,7', .*'3\.7'"):
        main([str(run), str(path)])


def test_what_is_missing_counts_as_the_training_mean_where_the_set_was_made_so(tmp_path, capsys):
    random = np.random.default_rng(0)
    rows = random.normal(2, 3, (120, 3)).astype(np.float32)
    labels = (rows[:, 0] > 2).astype(int)
    rows[random.random(rows.shape) < 0.2] = np.nan
    shards = sharded(tmp_path / "set", *write_table(tmp_path / "t.csv", "xyz", rows, ["ab"[label] for label in labels]))
    run = tmp_path / "run"
    assert run_training(table_run(shards, run, *BRIEF)) == 0
    figures = json.loads((run / "result.json").read_text())
    assert all(math.isfinite(figures[split]["loss"]) for split in ("val", "test"))

    mean = [float(np.float32(value)) for value in load_index(str(tmp_path / "set")).mean]
    path = tmp_path / "p.csv"
    path.write_text("x,y,z\n,1,2\n3,oops,nan\n,,\n1,inf,2\n")
    code, rows = predictions(capsys, run, path)
    assert code == 2 and [row["path"].rpartition(":")[2] for row in rows if "error" in row] == ["5"]  # infinite, not missing
    path.write_text(f"x,y,z\n{mean[0]!r},1,2\n3,{mean[1]!r},{mean[2]!r}\n{mean[0]!r},{mean[1]!r},{mean[2]!r}\n")
    assert predictions(capsys, run, path) == (0, [row for row in rows if "error" not in row])
    path.write_text("x,y,z\n,1,2\n3,,\nNA,red,1_0\n,inf,\n4,,blue\n")
    main([str(run), str(path)])
    *said, bad, last = [line.partition("p.csv")[2].removeprefix(": ") for line in capsys.readouterr().err.splitlines()]
    assert bad == ":5: not a number: column y is 'inf'" and not last
    assert said == ["5 missing values count as their column's mean in training: x (2), y (2), z (1).",
                    "3 cells with text in columns of numbers count as their column's mean in training: z (2), y (1)."]  # fmt: skip
    path.write_text('x,y,z\n1,1,2\n"3,7",2,1\n"1,5",,2\n')
    expected = r"p.csv, line 3: column 'x' has '3,7', and 1 more .*'3\.7'\.\n  Write numbers with a point and nothing between .*\.$"
    with pytest.raises(UserError, match=expected):
        main([str(run), str(path)])


def test_a_folder_without_a_run_is_told_from_an_unfinished_run(tmp_path):
    with pytest.raises(UserError, match=r"no run is in this folder: it has no config.yaml.\n  Give the folder of a .*runs/NAME"):
        main([str(tmp_path), "p.png"])
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"not a finished run: it has no inference.json.\n  Finish it with: .*--resume"):
        main([str(tmp_path), "p.png"])


def test_a_long_table_is_predicted_in_parts(run_on_table, tmp_path, capsys, monkeypatch):
    path = tmp_path / "p.csv"
    path.write_text("x,y,z\n" + "".join(f"{i / 7},{'' if i == 5 else i % 3},2\n" for i in range(9)))
    whole = predictions(capsys, run_on_table[0], path)
    monkeypatch.setattr(predict, "ROWS_AT_ONCE", 4)
    code, rows = predictions(capsys, run_on_table[0], path)
    trained = SimpleNamespace(features=list("xyz"), std=[1, 1, 1], fills_holes=False)
    assert [len(names) for names, _, _ in predict._table_batches(trained, [str(path)])] == [4, 3, 1]
    assert code == 2 and sorted(map(str, rows)) == sorted(map(str, whole[1])) and whole[0] == 2
    assert [row["path"].rpartition(":")[2] for row in rows if "error" not in row] == ["2", "3", "4", "5", "6", "8", "9", "10"]


@pytest.mark.parametrize("content, complaint", [
    (b"x,y\n1,2\n", "expected the columns x, y, z; lacks z"), (b"x,y,z\n", "no rows"),
    ("x,y,z\n1,é,2\n".encode("latin-1"), "in UTF-8"), (None, "cannot be read"),
])  # fmt: skip
def test_a_file_that_is_no_such_table_is_named(run_on_table, tmp_path, content, complaint):
    path = tmp_path / "p.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        main([str(run_on_table[0]), str(path)])
    with pytest.raises(UserError, match="--top is 0"):
        main([str(run_on_table[0]), str(path), "--top", "0"])


def test_the_rows_of_a_table_are_not_augmented(run_on_table, tmp_path):
    with pytest.raises(UserError, match="augment.mixup: the rows of a table are not augmented"):
        run_training(table_run(str(run_on_table[1] / "set"), tmp_path / "run", "--augment.mixup", "0.4"))


def test_another_sets_figures_do_not_take_the_place_of_the_runs_own(run_on_table, tmp_path, capsys):
    run, folder = run_on_table
    own = (run / "evaluation-test.json").read_text()
    rows = (folder / "set.csv").read_text().splitlines()
    (tmp_path / "other.csv").write_text("\n".join(rows[:60]) + "\n")
    sharded(tmp_path / "other", "--source", "csv", "--path", str(tmp_path / "other.csv"), "--target", "kind")
    eval_main([str(run), "--split", "test", "--data.shards", str(tmp_path / "other")])
    assert "left as it is, of another set" in capsys.readouterr().err and (run / "evaluation-test.json").read_text() == own
    (run / "evaluation-test.json").unlink()
    eval_main([str(run), "--split", "test", "--data.shards", str(tmp_path / "other")])
    report_main([str(run)])
    page = (run / "report.html").read_text()
    assert "Test split of another set" in page and json.loads((run / "evaluation-test.json").read_text())["samples"] < 10
    (run / "evaluation-test.json").unlink()
    eval_main([str(run), "--split", "test"])
    assert json.loads((run / "evaluation-test.json").read_text())["fingerprint"] == json.loads(own)["fingerprint"]


def test_figures_of_other_settings_are_not_kept_and_another_network_is_refused(run_on_table, capsys):
    run, _ = run_on_table
    own = (run / "evaluation-test.json").read_text()
    eval_main([str(run), "--split", "test", "--train.shift_test", "0", "--train.flip_test", "true"])
    told = capsys.readouterr()
    assert "these figures are of other settings: train.flip_test" in told.err and '"top1"' in told.out
    assert (run / "evaluation-test.json").read_text() == own
    with pytest.raises(UserError, match="the network is the run's"):
        eval_main([str(run), "--model.hidden", "[9]"])


def test_a_table_with_other_columns_is_not_evaluated(run_on_table, tmp_path):
    run, folder = run_on_table
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    turned = ["--data.shards", str(folder / "turned")]
    with pytest.raises(UserError, match="its columns are not those of .*run: in another order: z, x, y there, x, y, z here"):
        eval_main([str(run), "--split", "test", *turned])
    with pytest.raises(UserError, match="its columns are not those"):
        export(str(run), "safetensors", tmp_path / "out", "test", turned)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir()) == before


LETTERS = list("abcdefghijklmnop")


@pytest.mark.parametrize("there, here, told", [
    (LETTERS, LETTERS[:-1], "run: it has p besides."),
    (LETTERS[:-6] + ["t=1", "t=2"], LETTERS, "run: it lacks k, l, m, n, o and 1 more and has t=1, t=2 besides."),
    (LETTERS[:-2] + ["p", "o"], LETTERS, "run: in another order: p, o there, o, p here."),
    (None, ["x"], "run: it lacks x."),
])  # fmt: skip
def test_a_refusal_shows_what_two_lists_do_not_share(there, here, told):
    index = SimpleNamespace(folder="set", classes=["a"], features=there)
    with pytest.raises(UserError) as caught:
        predict.check_fits(index, SimpleNamespace(folder="run", classes=["a"], features=here))
    first, *hint = str(caught.value).splitlines()
    assert first == f"set: its columns are not those of {told}" and bool(hint) == (there is not None and "order" not in told)
    with pytest.raises(UserError, match=r"its classes are not those of run: it lacks c and has b besides\.$"):
        predict.check_fits(SimpleNamespace(folder="set", classes=["a", "b"], features=there),
                           SimpleNamespace(folder="run", classes=["a", "c"], features=here))  # fmt: skip


def test_the_precision_of_a_class_that_is_never_predicted_is_undefined_not_zero(run_on_table, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_on_table[0], run)
    weights = load_file(run / "weights.safetensors")
    weights["head.bias"] = weights["head.bias"] + weights["head.bias"].new_tensor([100.0, 0.0])
    save_file(weights, run / "weights.safetensors")
    capsys.readouterr()
    eval_main([str(run)])
    a, b, figures = capsys.readouterr().out.splitlines()
    assert a.split()[0] == "a" and a.split()[3:] == ["precision", f"{json.loads(figures)['top1']:.4f}", "recall", "1.0000",
                                                     "f1", a.split()[-1]]  # fmt: skip
    assert b.split()[0] == "b" and b.split()[3:] == ["precision", "-", "recall", "0.0000", "f1", "0.0000"]
    assert [a.index(word) for word in ("recall", "f1")] == [b.index(word) for word in ("recall", "f1")]


@pytest.mark.parametrize("command", [eval_main, export_main])
def test_help_says_where_the_other_options_are(command, capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Other options are those of dist-train train, such as --data.shards OTHER." in text and "default test" in text


def rows_of(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_eval_writes_what_the_network_says_of_each_sample(run_on_table, tmp_path, capsys):
    run, folder = run_on_table
    eval_main([str(run), "--split", "train"])
    without = capsys.readouterr().out
    path = tmp_path / "p.csv"
    eval_main([str(run), "--split", "train", "--predictions", str(path), "--probabilities"])
    assert capsys.readouterr().out == without
    index = load_index(str(folder / "set"))
    labels, probabilities = table_scores(run, index.split("train"))
    rows = rows_of(path)
    assert [int(row["sample"]) for row in rows] == list(range(len(labels)))
    assert [row["name"] for row in rows] == index.split("train").names() and rows[0]["name"].startswith("line ")
    assert [row["label"] for row in rows] == [index.classes[label] for label in labels]
    found = np.array([[float(row[f"probability of {name}"]) for name in index.classes] for row in rows])
    np.testing.assert_allclose(found, probabilities, atol=1e-6)
    assert [row["predicted"] for row in rows] == [index.classes[k] for k in found.argmax(1)]
    assert [float(row["probability"]) for row in rows] == found.max(1).tolist()
    np.testing.assert_allclose([float(row["loss"]) for row in rows], -np.log(found[np.arange(len(rows)), labels]), atol=1e-5)
    figures = json.loads(without.splitlines()[-1])
    assert sum(row["label"] == row["predicted"] for row in rows) / len(rows) == figures["top1"]


def test_samples_of_a_fold_go_by_their_numbers_and_names_in_the_stored_split(run_on_table, tmp_path):
    run, folder = run_on_table
    path, stored = tmp_path / "p.csv", load_index(str(folder / "set")).split("train")
    eval_main([str(run), "--split", "val", "--data.folds", "3", "--data.fold", "1", "--predictions", str(path)])
    rows = rows_of(path)
    numbers = [int(row["sample"]) for row in rows]
    assert numbers == sorted(set(numbers)) != list(range(len(numbers)))
    assert len(numbers) == pytest.approx(stored.num_samples / 3, abs=1)
    assert [row["name"] for row in rows] == [stored.names()[number] for number in numbers]
    assert [row["label"] for row in rows] == ["ab"[label] for label in stored.table()["label"][numbers]]


def test_the_file_agrees_with_the_figures_where_the_probabilities_tie(run_on_table, tmp_path, capsys):
    run, path = tmp_path / "run", tmp_path / "p.csv"
    shutil.copytree(run_on_table[0], run)
    weights = load_file(run / "weights.safetensors")
    weights["head.weight"] = weights["head.weight"] * 0
    weights["head.bias"] = weights["head.bias"].new_tensor([0.0, 1e-8])  # the second logit is larger, both are 0.5 then
    save_file(weights, run / "weights.safetensors")
    capsys.readouterr()
    eval_main([str(run), "--split", "train", "--json", "--predictions", str(path)])
    rows, figures = rows_of(path), json.loads(capsys.readouterr().out)
    assert {row["predicted"] for row in rows} == {"b"}
    assert sum(row["label"] == row["predicted"] for row in rows) / len(rows) == figures["top1"]


def test_probabilities_without_a_file_are_refused(run_on_table):
    with pytest.raises(UserError, match="add --predictions FILE.csv"):
        eval_main([str(run_on_table[0]), "--probabilities"])


@pytest.mark.two_process
def test_two_ranks_write_the_predictions_of_one(run_on_table, tmp_path):
    argv = ["eval", str(run_on_table[0]), "--split", "train", "--probabilities", "--predictions"]
    eval_main([*argv[1:], str(tmp_path / "one.csv")])
    run_to_end(2, [*argv, str(tmp_path / "two.csv")], tmp_path, module="dist_train.cli")
    one, two = (rows_of(tmp_path / name) for name in ("one.csv", "two.csv"))
    for key in one[0]:
        expected, found = ([row[key] for row in rows] for rows in (one, two))
        if key in ("sample", "name", "label", "predicted"):
            assert found == expected
        else:
            np.testing.assert_allclose([float(cell) for cell in found], [float(cell) for cell in expected], atol=1e-6)
    assert not list(tmp_path.glob("*.partial*"))


def test_predict_on_several_ranks_is_refused(run_on_table, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes; expected one"):
        main([str(run_on_table[0]), str(run_on_table[1] / "set.csv")])


def picture_files(folder, num_files: int) -> list[str]:
    random, paths = np.random.default_rng(0), []
    for k in range(num_files):
        paths.append(str(folder / f"{k:02d}.png"))
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(paths[-1])
    return paths


WHOLE = SimpleNamespace(image_size=(8, 8), eval_crop=0.0, one_size=True, config=RunConfig())


def test_pictures_come_in_the_order_of_their_files_whichever_is_decoded_first(tmp_path, monkeypatch):
    paths = picture_files(tmp_path, 11)
    pixels = [np.asarray(Image.open(path)) for path in paths]
    Path(paths[5]).write_bytes(b"no picture")
    Path(paths[6]).unlink()
    monkeypatch.setattr(predict, "BATCH_SIZE", 4)
    late, first = threading.Event(), pixels[0]

    def decode_first_file_last(payload, out, *how):
        decode_into(payload, out, *how)
        if np.array_equal(out, first):
            assert late.wait(20), "no other file was decoded meanwhile"
        late.set()

    monkeypatch.setattr(predict, "decode_into", decode_first_file_last)
    batches = list(picture_batches(WHOLE, paths, 2))
    good = [k for k in range(11) if k not in (5, 6)]
    assert [name for names, _, _ in batches for name in names] == [paths[k] for k in good]
    values = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for _, batch, _ in batches])
    assert np.array_equal(values, np.stack([pixels[k] for k in good]))
    assert [[path for path, _ in complaints] for _, _, complaints in batches] == [[], paths[5:7], []]
    assert batches[1][2][1][1] == "No such file or directory"


def test_the_next_batch_is_decoded_while_one_is_used(tmp_path, monkeypatch):
    paths = picture_files(tmp_path, 6)
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    decoded, ahead = [], threading.Event()

    def count(payload, out, *how):
        decode_into(payload, out, *how)
        decoded.append(payload)
        if len(decoded) == 4:
            ahead.set()

    monkeypatch.setattr(predict, "decode_into", count)
    with contextlib.closing(picture_batches(WHOLE, paths, 1)) as batches:
        assert next(batches)[0] == paths[:2] and ahead.wait(20)
        assert len(decoded) == 4  # and no further: pictures would fill the memory


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_files_are_resized_as_the_run_was_trained(tmp_path, interpolation):
    paths, config = picture_files(tmp_path, 3), RunConfig(data=DataConfig(interpolation=interpolation))
    trained = SimpleNamespace(image_size=(20, 12), eval_crop=0.0, one_size=True, config=config)
    ((_, values, _),) = picture_batches(trained, paths, 1)
    for path, found in zip(paths, values.permute(0, 2, 3, 1).numpy(), strict=True):
        expected = np.asarray(Image.open(path).resize((12, 20), Image.Resampling[interpolation.upper()]))
        assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.two_process
def test_a_rank_that_fails_while_it_evaluates_ends_the_others_with_its_reason(run_on_table, tmp_path):
    run, folder = run_on_table
    shards = tmp_path / "set"
    shutil.copytree(folder / "set", shards)
    split = load_index(str(shards)).split("test")
    damaged = shards / split.files[0]
    data = bytearray(damaged.read_bytes())
    data[int(split.table()[0]["offset"]) + int(split.table()[0]["size"]) - 1] ^= 1  # of the first sample: one rank reads it
    damaged.write_bytes(data)
    argv = ["eval", str(run), "--data.shards", str(shards), "--runtime.timeout_s", "20"]
    codes, words = run_ranks(2, argv, tmp_path, module="dist_train.cli")
    assert sorted(codes) == [2, EXIT_LOST_RANK], words
    failed = codes.index(2)
    assert damaged.name in words[failed] and "Traceback" not in words[0] + words[1]
    assert f"rank {failed} on " in words[1 - failed] and damaged.name in words[1 - failed]
