"""The file that an evaluation leaves of every sample: in order, whole or not at all, written by one rank or by several."""

import csv
import math
import struct
from types import SimpleNamespace

import pytest
import torch

from dist_train import predictions
from dist_train.errors import UserError
from dist_train.predictions import COLUMNS, predictions_file

CLASSES = ["cat, small", 'do"g', "größer"]
NAMES = ["a/1.jpg", 'b/"2", twice.jpg', "c/ü 3.jpg", "c/4.jpg", "c/5.jpg"]


def set_of(names: list[str], num_samples: int = len(NAMES)):
    split = SimpleNamespace(name="test", folder="shards/x", num_samples=num_samples, names=lambda: names)
    return SimpleNamespace(classes=CLASSES, split=lambda name: split)


def rank_of(rank: int, world_size: int):
    return SimpleNamespace(rank=rank, world_size=world_size, is_main=rank == 0)


class Batch(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.samples)


def outcome(samples: list[int]) -> tuple:
    """What an evaluation records of a batch: sample k is of class k % 3, and class (k + 1) % 3 is the likeliest."""
    numbers = torch.tensor(samples)
    probabilities = torch.nn.functional.one_hot((numbers + 1) % 3, 3).float() * 0.6 + 0.1
    probabilities[:, 0] += numbers / 1e4
    losses = numbers.float() / 3
    losses[numbers == 3] = math.nan
    return Batch(samples=numbers, labels=numbers % 3), (numbers + 1) % 3, probabilities, losses


def read(path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("every_class", [False, True])
def test_a_line_a_sample_with_names_quoted_and_numbers_to_the_last_bit(tmp_path, every_class):
    path = tmp_path / "p.csv"
    with predictions_file(path, set_of(NAMES), "test", rank_of(0, 1), every_class) as record:
        record(*outcome([0, 1, 2]))
        record(*outcome([3, 4]))
        assert not path.exists()
    header, *rows = read(path)
    assert header == [*COLUMNS, *([f"probability of {name}" for name in CLASSES] if every_class else [])]
    _, _, probabilities, losses = outcome(list(range(5)))
    for k, row in enumerate(rows):
        found = dict(zip(header, row, strict=True))
        assert [found[key] for key in COLUMNS[:4]] == [str(k), NAMES[k], CLASSES[k % 3], CLASSES[(k + 1) % 3]]
        exact = [struct.unpack("f", struct.pack("f", float(cell)))[0] for cell in row[4:]]
        expected = [probabilities[k, (k + 1) % 3], losses[k], *(probabilities[k] if every_class else [])]
        torch.testing.assert_close(torch.tensor(exact), torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    assert len(rows) == 5 and [file.name for file in tmp_path.iterdir()] == ["p.csv"]


def test_a_set_without_names_leaves_the_column_empty_and_one_with_too_few_is_refused(tmp_path):
    path = tmp_path / "p.csv"
    with predictions_file(path, set_of([]), "test", rank_of(0, 1), False) as record:
        record(*outcome([0, 1, 2, 3, 4]))
    assert [row[1] for row in read(path)] == ["name", "", "", "", "", ""]
    with pytest.raises(UserError, match="4 names for the 5 samples of test"):
        predictions_file(path, set_of(NAMES[:4]), "test", rank_of(0, 1), False).__enter__()


def test_an_evaluation_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("before")
    with pytest.raises(BrokenPipeError), predictions_file(path, set_of(NAMES), "test", rank_of(0, 1), False) as record:
        record(*outcome([0, 1, 2]))
        raise BrokenPipeError  # not taken for a fault of the file
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["p.csv"]


def test_what_cannot_be_written_is_refused_before_the_evaluation(tmp_path):
    for path, complaint in ((tmp_path, "is a folder"), (tmp_path / "none" / "p.csv", "No such file or directory")):
        with pytest.raises(UserError, match=complaint):
            predictions_file(path, set_of(NAMES), "test", rank_of(0, 1), False).__enter__()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr("builtins.open", lambda *args, **options: full)
    with pytest.raises(UserError, match=r"p\.csv: the predictions cannot be written: No space left"):  # noqa: SIM117
        with predictions_file(tmp_path / "p.csv", set_of(NAMES), "test", rank_of(0, 1), False) as record:
            record(*outcome([0, 1, 2]))
    assert not list(tmp_path.iterdir())


def as_rank_zero(monkeypatch, while_it_waits) -> None:
    monkeypatch.setattr(predictions, "on_main", lambda world, function, *args: function(*args) if world.is_main else None)
    monkeypatch.setattr(predictions, "meet", lambda world: while_it_waits() if world.is_main else None)


def test_rank_zero_waits_for_the_others_and_appends_their_parts_in_sample_order(tmp_path, monkeypatch):
    path, index = tmp_path / "p.csv", set_of(NAMES)

    def rank_one() -> None:
        with predictions_file(path, index, "test", rank_of(1, 2), True) as record:
            record(*outcome([2]))
            record(*outcome([3, 4]))

    as_rank_zero(monkeypatch, rank_one)
    (tmp_path / "p.csv.partial").mkdir()
    (tmp_path / "p.csv.partial" / "rank-1.csv").write_text("of an evaluation that was killed\n")
    with predictions_file(path, index, "test", rank_of(0, 2), True) as record:
        record(*outcome([0, 1]))
    together = path.read_bytes()
    with predictions_file(path, index, "test", rank_of(0, 1), True) as record:
        record(*outcome([0, 1, 2, 3, 4]))
    assert path.read_bytes() == together and [file.name for file in tmp_path.iterdir()] == ["p.csv"]


@pytest.mark.parametrize("rows, complaint", [([], "No such file or directory: .*rank-1.csv"), ([2, 3], "2 lines; expected 3")])
def test_a_part_that_rank_zero_does_not_see_whole_leaves_no_file(tmp_path, monkeypatch, rows, complaint):
    path, index = tmp_path / "p.csv", set_of(NAMES)

    def rank_one() -> None:
        if rows:
            with predictions_file(path, index, "test", rank_of(1, 2), False) as record:
                record(*outcome(rows))

    as_rank_zero(monkeypatch, rank_one)
    with pytest.raises(UserError, match=complaint), predictions_file(path, index, "test", rank_of(0, 2), False) as record:
        record(*outcome([0, 1]))
    assert not list(tmp_path.iterdir())
