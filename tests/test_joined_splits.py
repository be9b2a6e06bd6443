"""Splits joined by +, as in data.train_split train+val: one split of all their samples, of which all holds that holds of any."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import figures, same_tensors, take, tiny_run, train_tiny
from test_folds import settings
from test_remote import FaultyServer, serving

from dist_train.data import open_evaluation, open_stream
from dist_train.errors import UserError
from dist_train.folds import fold_view
from dist_train.index import load_index
from dist_train.plan import main as plan_main
from dist_train.predict import eval_main
from dist_train.report import write_report
from dist_train.train import run_training

JOINED = ["--data.train_split", "train+val", "--data.val_split", "none"]


def pictures(batches) -> list[tuple[bytes, int]]:
    return sorted((image.numpy().tobytes(), int(label)) for batch in batches
                  for image, label in zip(batch.images, batch.labels, strict=True))  # fmt: skip


def test_an_epoch_of_joined_splits_holds_every_sample_of_each_once(digits):
    index = load_index(digits)
    joined = index.split("train+val")
    parts = [index.split("train"), index.split("val")]
    assert joined.num_samples == sum(part.num_samples for part in parts)
    assert joined.class_counts.tolist() == sum(part.class_counts for part in parts).tolist()
    assert joined.names() == parts[0].names() + parts[1].names()
    assert np.array_equal(joined.table(), np.concatenate([part.table() for part in parts]))
    batches = take(open_stream(index, "train+val", 60, threads=2), -(-joined.num_samples // 60))
    samples = np.concatenate([batch.samples for batch in batches])[: joined.num_samples]
    assert sorted(samples.tolist()) == list(range(joined.num_samples))
    alone = [batch for name in ("train", "val") for batch in open_evaluation(index, name, 50, threads=1)]
    assert pictures(open_evaluation(index, "train+val", 50, threads=1)) == pictures(alone)


def test_the_stream_of_joined_splits_is_the_same_on_two_ranks_and_from_any_step(digits):
    whole = take(open_stream(digits, "train+val", 60, threads=1, seed=3), 6)
    halves = [take(open_stream(digits, "train+val", 60, threads=1, seed=3, start_step=4, world=(rank, 2)), 2) for rank in (0, 1)]
    for step, batches in enumerate(zip(*halves, strict=True), 4):
        assert np.concatenate([b.samples for b in batches]).tolist() == whole[step].samples.tolist()
        assert np.concatenate([b.images.numpy() for b in batches]).tobytes() == whole[step].images.numpy().tobytes()


def test_joined_splits_are_other_data_than_each_of_them_and_than_another_order(digits):
    index = load_index(digits)
    prints = {name: index.split(name).fingerprint() for name in ("train", "val", "train+val", "val+train", "train+val+test")}
    assert len(set(prints.values())) == len(prints)
    assert index.split("val+val").num_samples == index.split("val").num_samples  # named twice, there once


@pytest.mark.parametrize("name", ["train+", "+val", "train+extra", "train + val", ""])
def test_a_split_that_is_not_there_is_none_of_joined_ones_either(digits, name):
    index = load_index(digits)
    assert index.find(name) is None
    with pytest.raises(UserError, match="no split .*; it has train, val, test"):
        index.split(name)


def test_a_damaged_table_of_any_of_them_is_noticed(copied):
    path = copied / "val.samples.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    index = load_index(copied)
    index.check_tables({"train"})
    with pytest.raises(UserError, match="val.samples.npy: its checksum differs"):
        index.check_tables({"train+val"})


def test_folds_deal_the_joined_samples(digits):
    whole = load_index(digits).split("train+val")
    validated = []
    for fold in range(3):
        index = fold_view(load_index(digits), settings(digits, 3, fold, train_split="train+val"))
        assert index.split("train+val").num_samples + index.split("val").num_samples == whole.num_samples
        validated += [s for batch in open_evaluation(index, "val", 64, threads=1) for s in batch.samples.tolist()]
        index.check_tables({"train+val", "val"})
        both = replace(index, splits={"a": index.split("train+val"), "b": index.split("val")})
        both.check_tables({"a+b"})  # parts of one whole, joined again
        assert pictures(open_evaluation(both, "a+b", 64, threads=1)) == pictures(
            open_evaluation(load_index(digits), "train+val", 64, threads=1))  # fmt: skip
    assert sorted(validated) == list(range(whole.num_samples))


def test_a_fold_joined_with_another_split_is_other_data_than_another_fold(digits, tmp_path):
    """Whatever is kept decoded is found by the fingerprint; these folds have equally many samples of each shard."""
    index = load_index(digits)
    one, other = (fold_view(index, settings(digits, 2, 0, seed, train_split="test")).split("val+train") for seed in (0, 1))
    assert one.shard_samples.tolist() == other.shard_samples.tolist() and one.shard_checksums == other.shard_checksums
    assert one.fingerprint() != other.fingerprint()
    server = FaultyServer(Path(digits))
    with serving(server):
        remote = load_index(server.url, str(tmp_path / "cache"), 1.0)
        view = fold_view(remote, settings(digits, 3, 0))
        there = pictures(open_evaluation(view, "val+test", 64, threads=1))
    here = fold_view(index, settings(digits, 3, 0))
    assert there == pictures(open_evaluation(here, "val+test", 64, threads=1))


def test_a_run_on_joined_splits_is_evaluated_on_test_alone_and_resumes_exactly(digits, tmp_path, capsys):
    settings = [*JOINED, "--data.cache", "none"]
    straight = train_tiny(digits, tmp_path / "straight", *settings)
    stopped = train_tiny(digits, tmp_path / "stopped", *settings, "--train.max_steps", "7")
    assert not (stopped / "result.json").exists()
    assert run_training([*tiny_run(digits, stopped, *settings), "--resume"]) == 0
    assert same_tensors(straight, stopped) and figures(straight)[-1] == figures(stopped)[-1]
    assert {path.name for path in straight.glob("evaluation-*.json")} == {"evaluation-test.json"}
    page = write_report(straight).read_text()
    assert re.search(r"Loss: test \d\.\d{4}", page) and "Accuracy: " not in page  # a dot alone is no curve
    assert "1 evaluation as a table" in page
    assert eval_main([str(straight), "--split", "train+val"]) is None
    assert '"split": "train+val", "samples": ' in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no split to judge it on.*\n.*train.val is what it was trained on"):
        eval_main([str(straight), "--data.test_split", "none"])


def test_a_run_goes_on_only_on_the_splits_it_began_with(digits, tmp_path):
    run = train_tiny(digits, tmp_path / "run", *JOINED, "--train.max_steps", "3")
    with pytest.raises(UserError, match="data.train_split: 'train.val' in the run, 'train' now"):
        run_training([*tiny_run(digits, run, "--data.val_split", "none"), "--resume"])


@pytest.mark.parametrize("name", ["val_split", "test_split"])
def test_figures_of_samples_that_are_trained_on_are_refused(digits, tmp_path, name):
    named = {"val_split": "none", "test_split": "none"} | {name: name.partition("_")[0]}
    with pytest.raises(UserError, match=f"data.{name} is .*, on which data.train_split train.val.test trains"):
        train_tiny(digits, tmp_path / "run", "--data.train_split", "train+val+test",
                   *(word for key, value in named.items() for word in (f"--data.{key}", value)))  # fmt: skip


def test_the_plan_names_joined_samples_as_the_stream_does(digits, capsys):
    plan_main(["--shards", digits, "--split", "train+val", "--global-batch-size", "20", "--steps", "3:4", "--json"])
    batch = next(iter(open_stream(digits, "train+val", 20, threads=1, start_step=3)))
    assert json.loads(capsys.readouterr().out)["samples"] == batch.keys


def test_joined_splits_behind_a_url_are_those_of_the_folder(digits, tmp_path):
    server = FaultyServer(Path(digits))
    with serving(server):
        remote = load_index(server.url, str(tmp_path / "cache"), 1.0)
        there = take(open_stream(remote, "train+val", 60, threads=1), 30)
    here = take(open_stream(digits, "train+val", 60, threads=1), 30)
    assert all(a.samples.tolist() == b.samples.tolist() and a.images.equal(b.images) for a, b in zip(here, there, strict=True))
    assert all(server.requests.count(name) == 1 for name in set(server.requests) if name.endswith(".tar"))
