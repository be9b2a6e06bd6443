"""Pictures that cannot be decoded in a training: named, counted, limited, and replaced by a rule of the data alone."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_ranks, tiny_run
from PIL import Image

from dist_train import train
from dist_train.bad_samples import BadSamples, Undecodable
from dist_train.data import open_stream
from dist_train.errors import UserError
from dist_train.foreign import index_tars
from dist_train.index import load_index
from dist_train.order import Order

BAD = (5, 6, 39)  # two neighbours, and the last one, whose place the first takes
BARE = ("--data.global_batch_size", "8", "--data.val_split", "none", "--data.test_split", "")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """40 pictures in two tars; three have a good header and damaged pixels."""
    folder, random = tmp_path_factory.mktemp("foreign"), np.random.default_rng(0)
    for part in range(2):
        with tarfile.open(folder / f"train-{part}.tar", "w") as tar:
            for i in range(part * 20, part * 20 + 20):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
                png = bytearray(file.getvalue())
                if i in BAD:
                    png[60:120] = bytes(60)
                for name, payload in ((f"{i:04d}.png", bytes(png)), (f"{i:04d}.cls", str(i % 10).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
    index_tars(folder)
    return str(folder)


def named(run: Path) -> list[int]:
    """Numbers of the samples in a run's list of bad ones, ascending."""
    lines = (run / "bad-samples.txt").read_text().splitlines()
    return sorted(int(line.partition("sample train/")[2][:8]) for line in lines)


def batches(shards: str, bad: BadSamples | None, count: int = 12, **options) -> list:
    return list(itertools.islice(open_stream(shards, batch_size=8, bad_samples=bad, **options), count))


@pytest.mark.parametrize("cache", ["none", "memory", "device"])
def test_the_next_good_sample_takes_the_place_on_any_ranks_and_after_any_start(shards, cache):
    bad = BadSamples(3)
    whole = batches(shards, bad, cache=cache)
    assert sorted(bad.reasons) == list(BAD)
    table = load_index(shards).split("train").table()
    seen = torch.cat([batch.samples for batch in whole[:5]]).tolist()  # the first epoch
    assert sorted(seen) == sorted([*(set(range(40)) - set(BAD)), 7, 7, 0])
    assert all(table["label"][s] == label for b in whole for s, label in zip(b.samples, b.labels, strict=True))
    for rank, start in ((0, 0), (1, 0), (1, 7)):
        for part in open_stream(shards, batch_size=8, bad_samples=BadSamples(3), world=(rank, 2), start_step=start,
                                stop_step=12, threads=3, cache=cache):  # fmt: skip
            mine = slice(4 * rank, 4 * rank + 4)
            assert torch.equal(part.images, whole[part.step].images[mine])
            assert torch.equal(part.random_keys, whole[part.step].random_keys[mine])


def test_the_limit_holds_and_the_sample_is_named(shards):
    with pytest.raises(UserError, match=r"train/0000(0005|0006|0039)(.|\n)*data.max_bad"):
        batches(shards, None)
    with pytest.raises(UserError, match="one more than data.max_bad, 2, allows"):
        batches(shards, BadSamples(2))


def test_a_set_without_a_good_sample_ends():
    bad, samples = BadSamples(100), np.array([0, 1])
    with pytest.raises(UserError, match="sample 3"):
        for _ in range(4):
            samples = bad.replaced(samples, _fault([0, 1], samples), 4)


def test_a_training_names_them_and_ends_past_the_limit(shards, tmp_path, capsys):
    settings = tiny_run(shards, tmp_path / "run", *BARE)
    assert train.run_training([*settings, "--data.max_bad", "3", "--train.max_steps", "6"]) == 0
    assert train.run_training([*settings, "--data.max_bad", "3", "--resume"]) == 0
    lines = (tmp_path / "run" / "bad-samples.txt").read_text().splitlines()
    assert named(tmp_path / "run") == list(BAD)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bad_samples"] == lines
    assert "the next good sample takes its place" in capsys.readouterr().out
    with pytest.raises(UserError, match="one more than data.max_bad, 2, allows"):
        train.run_training([*tiny_run(shards, tmp_path / "other", "--data.global_batch_size", "8"), "--data.max_bad", "2"])


@pytest.mark.parametrize("more", [("--data.cache", "disk"), ("--data.folds", "2")])
def test_what_needs_every_picture_is_refused_beside_a_limit(shards, tmp_path, more):
    settings = tiny_run(shards, tmp_path / "run", "--data.global_batch_size", "8", "--data.max_bad", "3", *more)
    with pytest.raises(UserError, match=r"data.max_bad is 3 and data\.\w+ \w+, which needs every picture"):
        train.run_training(settings)


def test_those_met_since_the_last_line_of_the_log_are_named_as_well(shards, tmp_path):
    settings = tiny_run(shards, tmp_path / "run", *BARE, "--data.max_bad", "3", "--train.log_every_steps", "100")
    assert train.run_training([*settings, "--train.max_steps", "5"]) == 0  # an epoch
    assert named(tmp_path / "run") == list(BAD)


@pytest.mark.two_process
def test_those_of_all_ranks_are_named_and_counted_together(shards, tmp_path):
    order = Order(load_index(shards).split("train").shard_samples, 8, 0)
    rank_of = {int(sample): place // 4 for step in range(5) for place, sample in enumerate(order.global_batch(step)[0])}
    assert rank_of[5] != rank_of[39]  # neither rank meets all three; who meets 5 tries 6 in its place

    def train_on_two(max_bad: int) -> tuple[list[int], list[str]]:
        settings = tiny_run(shards, tmp_path / f"run-{max_bad}", *BARE, "--data.max_bad", str(max_bad), "--train.epochs", "1")
        return run_ranks(2, settings, tmp_path)

    codes, logs = train_on_two(max_bad=3)
    assert codes == [0, 0], logs
    assert named(tmp_path / "run-3") == list(BAD)
    codes, logs = train_on_two(max_bad=2)
    assert codes == [2, 2], logs
    for words in logs:
        assert "3 pictures cannot be decoded; data.max_bad allows 2:" in words
        assert all(f"train/{sample:08d}" in words for sample in BAD)


def test_ranks_count_together(capsys):
    ranks = [BadSamples(2) for _ in range(2)]
    for rank, samples in zip(ranks, ((1, 2), (2, 3)), strict=True):
        rank.replaced(np.array(samples), _fault([0, 1], samples), 10)
    together = [rank.noted() for rank in ranks]
    assert BadSamples(3).news(together) == ["sample 1", "sample 2", "sample 3"]
    assert ranks[0].noted() == {}  # each is handed out once
    with pytest.raises(UserError, match="3 pictures cannot be decoded; data.max_bad allows 2"):
        ranks[0].news(together)


def _fault(places, samples) -> Undecodable:
    return Undecodable(np.array(places), [f"sample {samples[place]}" for place in places])
