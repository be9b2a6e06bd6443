"""k-fold: every sample is validated exactly once, classes are kept in proportion, and no statistic leaks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sharded, tiny_run, write_table

from dist_train.config import DataConfig, RunConfig
from dist_train.data import open_evaluation, open_stream
from dist_train.errors import UserError
from dist_train.folds import fold_of, fold_view, open_index, part_of, statistics
from dist_train.index import load_index
from dist_train.predict import eval_main, load_run
from dist_train.report import write_report
from dist_train.tables import CONSTANT_STD
from dist_train.train import run_training


def settings(shards: str, folds: int, fold: int, seed: int = 0, **data) -> RunConfig:
    return RunConfig(seed=seed, data=DataConfig(shards=shards, folds=folds, fold=fold, **data))


@pytest.mark.parametrize("num_folds", [2, 5, 10])
def test_folds_deal_every_class_evenly_and_follow_from_the_seed(num_folds):
    labels = np.random.default_rng(0).choice(4, 503, p=[0.6, 0.3, 0.09, 0.01]).astype(np.int32)
    folds = fold_of(labels, num_folds, seed=3)
    assert set(folds) == set(range(num_folds))
    sizes = np.bincount(folds)
    assert sizes.max() - sizes.min() <= 1
    for label in range(4):
        of_class = np.bincount(folds[labels == label], minlength=num_folds)
        assert of_class.max() - of_class.min() <= 1
    assert np.array_equal(folds, fold_of(labels, num_folds, seed=3))
    other = fold_of(labels, num_folds, seed=4)
    assert 0.5 / num_folds < (other == folds).mean() < 2 / num_folds  # as two independent draws agree
    neighbours = (folds[1:] == folds[:-1]).mean()
    assert 0.5 / num_folds < neighbours < 2 / num_folds  # nothing is left of the order in the shards


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_sample_is_validated_once_over_the_folds_and_never_trained_on(table, world_size):
    num_samples = load_index(table).split("train").num_samples
    validated = []
    for fold in range(5):
        index = fold_view(load_index(table), settings(table, 5, fold))
        mine = [batch.samples for rank in range(world_size)
                for batch in open_evaluation(index, "val", 17, world=(rank, world_size), threads=1)]  # fmt: skip
        mine = np.concatenate(mine).tolist()
        steps = -(-index.split("train").num_samples // 30)
        trained = [batch for batch in open_stream(index, "train", 30, threads=1, stop_step=steps)]
        numbers = np.concatenate([batch.samples for batch in trained]).tolist()
        assert len(set(numbers)) == index.split("train").num_samples and not set(numbers) & set(mine)
        assert set(numbers) | set(mine) == set(range(num_samples))
        validated += mine
    assert sorted(validated) == list(range(num_samples))


def test_a_fold_reads_the_rows_and_names_of_the_stored_split(table):
    index = fold_view(load_index(table), settings(table, 4, 1))
    whole = {name: (row, label) for batch in open_evaluation(load_index(table), "train", 50, threads=1)
             for name, row, label in zip(batch.keys, batch.images.tolist(), batch.labels.tolist(), strict=True)}  # fmt: skip
    batch = next(open_stream(index, "train", 64, threads=1))
    assert [whole[name] for name in batch.keys] == list(zip(batch.images.tolist(), batch.labels.tolist(), strict=True))
    part = index.split("val")
    assert part.names() == [
        load_index(table).split("train").names()[i] for i in part.stored_numbers(np.arange(part.num_samples))
    ]
    assert part.class_counts.tolist() == np.bincount(part.table()["label"]).tolist()


def test_the_stream_of_a_fold_is_the_same_on_any_number_of_ranks_and_from_any_step(table):
    index = fold_view(load_index(table), settings(table, 3, 0))

    def steps(world_size, start):
        ranks = [list(open_stream(index, "train", 24, threads=1, world=(r, world_size), start_step=start, stop_step=15))
                 for r in range(world_size)]  # fmt: skip
        return [[name for batch in batches for name in batch.keys] for batches in zip(*ranks, strict=True)]

    assert steps(1, 0) == steps(4, 0)
    assert steps(1, 0)[9:] == steps(2, 9)


def test_statistics_are_those_of_the_folds_training_part(table):
    config = settings(table, 5, 2)
    index = open_index(config)
    rows = np.concatenate([b.images.numpy() for b in open_evaluation(index, "train", 64, threads=1)]).astype(np.float64)
    assert np.allclose(index.mean, rows.mean(0), rtol=1e-12) and np.allclose(index.std, rows.std(0), rtol=1e-12)
    means = {tuple(open_index(settings(table, 5, fold)).mean) for fold in range(5)}
    assert len(means | {tuple(load_index(table).mean)}) == 6


def test_what_is_missing_counts_as_the_mean_of_the_folds_training_part(tmp_path):
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import StandardScaler

    def converted(name: str, rows: np.ndarray) -> str:
        labels = ["abc"[k % 3] for k in range(len(rows))]
        return sharded(tmp_path / name, *write_table(tmp_path / f"{name}.csv", "xy", rows, labels))

    def rows_of(index, split: str) -> list[int]:
        return [int(name.split()[1]) - 2 for name in index.split(split).names()]

    random = np.random.default_rng(0)
    rows = random.normal(3, 2, (70, 2)).astype(np.float32)
    rows[random.random(rows.shape) < 0.3] = np.nan
    shards = converted("set", rows)
    for fold in range(3):
        index = open_index(settings(shards, 3, fold))
        train = np.float64(rows[rows_of(index, "train")])
        imputer = SimpleImputer().fit(train)
        np.testing.assert_allclose(index.mean, imputer.statistics_, rtol=1e-12)
        np.testing.assert_allclose(index.std, StandardScaler().fit(imputer.transform(train)).scale_, rtol=1e-12)
    held_out = rows_of(index, "val")
    rows[held_out] = np.where(np.isnan(rows[held_out]), 1e4, np.nan)
    other = open_index(settings(converted("other", rows), 3, fold))
    assert rows_of(other, "val") == held_out and (other.mean, other.std) == (index.mean, index.std)
    assert load_index(other.folder).mean != load_index(shards).mean


def test_what_never_changes_in_a_folds_training_part_enters_as_0(tmp_path, capsys):
    from dist_train.evaluate import standardised

    rows, labels = np.random.default_rng(0).normal(3, 2, (60, 2)), ["abc"[k % 3] for k in range(60)]
    drawn = sharded(tmp_path / "drawn", *write_table(tmp_path / "t.csv", "xy", rows, labels))
    odd = int(load_index(drawn).split("train").names()[5].split()[1]) - 2  # trains, whatever is in the rows
    rows[:, 1] = np.where(np.arange(60) == odd, 50_000, 7)
    sharded(tmp_path / "set", *write_table(tmp_path / "t.csv", "xy", rows, labels))
    held_out = 0
    for fold in range(3):
        capsys.readouterr()
        config = settings(str(tmp_path / "set"), 3, fold)
        index = open_index(config)
        told = "never changes in the training split, 0 to the network whatever stands elsewhere: y\n" in capsys.readouterr().err
        open_index(config)
        assert not capsys.readouterr().err  # once a process
        held_out += (is_constant := f"line {odd + 2}" in index.split("val").names())
        assert told == is_constant == (index.std[1] == CONSTANT_STD)
        values = torch.cat([standardised(b.images, index) for b in open_evaluation(index, "val", 64, threads=1)])
        assert not is_constant or values[:, 1].abs().max() < 1e-30
    assert held_out == 1


def test_statistics_of_pictures_are_exact(digits):
    index = open_index(settings(digits, 4, 3, threads=2))
    pixels = np.concatenate([b.images.numpy() for b in open_evaluation(index, "train", 64, threads=1)]) / 255
    assert np.allclose(index.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(index.std, pixels.std((0, 2, 3)), rtol=1e-12)
    whole = load_index(digits)
    mean, std = statistics(whole, whole.split("train"), 1)
    assert np.allclose(mean, whole.mean, rtol=1e-12) and np.allclose(std, whole.std, rtol=1e-12)


def test_two_folds_are_not_taken_for_one_another(table):
    whole = load_index(table).split("train")
    labels = np.asarray(whole.table()["label"])
    prints = {part_of(whole, "train", np.delete(np.arange(whole.num_samples), i), labels).fingerprint() for i in (0, 1)}
    assert len(prints | {whole.fingerprint()}) == 3


@pytest.mark.parametrize("data, expected", [
    ({"folds": 1, "fold": 0}, "data.folds is 1"),
    ({"folds": 5, "fold": 5}, "expected 0 to 4"),
    ({"folds": 5, "fold": -1}, "expected 0 to 4"),
    ({"folds": 5000, "fold": 0}, "too few for data.folds"),
    ({"folds": 5, "fold": 0, "val_split": "train"}, "data.val_split is 'train'"),
])  # fmt: skip
def test_settings_that_make_no_folds_are_refused(table, data, expected):
    with pytest.raises(UserError, match=expected):
        fold_view(load_index(table), settings(table, **data))


def test_a_run_on_a_fold_evaluates_it_and_keeps_its_statistics(digits, tmp_path, capsys):
    run = tmp_path / "fold"
    argv = tiny_run(digits, run, "--data.folds", "3", "--data.fold", "1", "--train.epochs", "0.5")
    assert run_training(argv) == 0
    config = replace(settings(digits, 3, 1))
    index = open_index(config)
    assert load_run(run).mean == index.mean != load_index(digits).mean
    result = json.loads((run / "result.json").read_text())
    assert result["val"]["samples"] == index.split("val").num_samples
    capsys.readouterr()
    eval_main([str(run), "--split", "val", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["top1"], told["samples"]) == (result["val"]["top1"], result["val"]["samples"])
    mistakes = json.loads((run / "evaluation-val.json").read_text())["mistakes"]
    table = load_index(digits).split("train").table()
    assert mistakes and all(table["label"][m["sample"]] == m["label"] for m in mistakes)
    assert "changed since" not in Path(write_report(run)).read_text()
