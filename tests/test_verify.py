"""Every changed byte is found, and what it hit is named."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import picture

from dist_train import shard, verify
from dist_train.convert import convert
from dist_train.decode import SHARD_FAULTS
from dist_train.errors import UserError
from dist_train.index import load_index
from dist_train.shard_config import ShardConfig, SplitConfig
from dist_train.store import READ_FAILED, Store


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for k in range(12):
        picture(folder / "raw" / ("cats", "dogs")[k % 2] / f"{k // 2}.png", k, (9, 12))
    settings = {"path": str(folder / "raw"), "split": SplitConfig(0.2, 0.2), "min_shards": 2}
    return Path(convert(ShardConfig(**settings, out=str(folder / "set"))).folder)


@pytest.fixture()
def copy(pictures, tmp_path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "set"))


def complaint(folder) -> str:
    with pytest.raises(UserError) as caught:
        verify.main([str(folder)])
    return str(caught.value)


def test_a_whole_set_passes(pictures, capsys):
    verify.main([str(pictures)])
    assert "whole. 12 samples in 4 shards" in capsys.readouterr().out


def test_the_command_that_it_advises_mends_the_set(copy):
    path = copy / load_index(copy).split("train").files[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    command = next(line for line in complaint(copy).splitlines() if "dist-train shard" in line)
    words = shlex.split(command)
    assert words[:2] == ["dist-train", "shard"] and words[-1] == "--repair"
    shard.main(words[2:])
    assert path.read_bytes() == whole
    verify.main([str(copy)])


def test_what_is_advised_mends_tables_and_strays_as_well(copy):
    for name in ("train.samples.npy", "val.names.txt"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-1])
        (copy / "train-000009.tar").write_bytes(b"")
        message = complaint(copy)
        assert "--repair" not in message and "Move the tars that are not in the index out of the folder." in message
        (copy / "train-000009.tar").unlink()
        shard.main(shlex.split(message.splitlines()[-1])[2:])
        assert (copy / name).read_bytes() == whole
        verify.main([str(copy)])
    (copy / "train-000009.tar").write_bytes(b"")
    assert "dist-train" not in complaint(copy)  # nothing has to be written


def test_only_a_changed_shard_sends_its_reader_to_verify(pictures):
    store = Store(load_index(pictures).split("train"))
    for reason in SHARD_FAULTS:
        assert (f"dist-train verify {pictures}" in str(store.fault(0, reason))) == (reason != READ_FAILED)
    store.table = np.array(store.table)
    for name, value, found in (("checksum", 0, "checksum differs"), ("size", 10**9, "ends after")):
        store.table[name] = value
        with pytest.raises(UserError, match=f"{found}(.|\n)*dist-train verify"):
            store.payload(0)
    message = str(store.fault(0, "cannot be decoded as jpeg: Premature end of JPEG file"))
    assert "data.max_bad" in message and "dist-train verify" not in message


def test_a_flipped_bit_anywhere_is_found_and_its_sample_named(copy):
    split = load_index(copy).split("train")
    path = copy / split.files[1]
    blob, first = path.read_bytes(), int(split.first[1])
    rows = np.array(split.table()[first : first + int(split.shard_samples[1])])
    ends = [int(row["offset"]) + int(row["size"]) for row in rows]
    places = [int(row["offset"]) - 512 for row in rows] + [int(row["offset"]) for row in rows] + [e - 1 for e in ends]
    places += [-(-end // 512) * 512 for end in ends] + [-(-end // 512) * 512 + 512 for end in ends]
    places += [len(blob) - 1, *np.random.default_rng(0).integers(0, len(blob), 40).tolist()]
    for place in places:
        damaged = bytearray(blob)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        message = complaint(copy)
        assert f"{path}: checksum differs from the index" in message
        for k, row in enumerate(rows):
            label_at = -(-ends[k] // 512) * 512
            named = f"sample {first + k:08d} ({split.names()[first + k]}) at byte"
            for part, start, end in (("payload", row["offset"], ends[k]), ("header", row["offset"] - 512, row["offset"]),
                                     ("label's header", label_at, label_at + 512),
                                     ("label", label_at + 512, label_at + 513)):  # fmt: skip
                if start <= place < end:
                    assert f"({part} of {named} {start:,})" in message
                else:
                    assert f"{part} of {named} {start:,}" not in message or part == "label"


def test_500_flipped_bits_in_any_of_its_files_are_all_found(copy):
    files = sorted(path for path in copy.iterdir() if path.suffix in (".tar", ".npy", ".txt", ".json"))
    assert len(files) == 4 + 3 + 3 + 1
    random = np.random.default_rng(1)
    for _ in range(500):
        path = files[random.integers(len(files))]
        good = path.read_bytes()
        bit = int(random.integers(8 * len(good)))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert path.name in complaint(copy), f"bit {bit} of {path.name}"
        path.write_bytes(good)
    verify.main([str(copy)])


def test_missing_truncated_and_stray_files_are_all_named_at_once(copy):
    split = load_index(copy).split("train")
    (copy / split.files[0]).unlink()
    with open(copy / split.files[1], "r+b") as file:
        file.truncate(int(split.table()[int(split.first[1]) + 1]["offset"]) + 1)
    (copy / "train-000009.tar").write_bytes(b"")
    (copy / "val.samples.npy").unlink()
    message = complaint(copy)
    assert f"{split.files[0]}: missing; {split.shard_samples[0]} samples" in message
    assert f"{split.files[1]}: " in message and f"payload of sample {int(split.first[1]) + 1:08d}" in message
    assert f"payload of sample {int(split.first[1]):08d}" not in message
    assert "train-000009.tar: not in the index" in message and "val.samples.npy: missing" in message
    assert "--overwrite true" in message


def test_a_changed_table_or_list_of_names_is_found(copy):
    path = copy / "train.samples.npy"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    names = copy / "val.names.txt"
    names.write_text(names.read_text().replace("a", "b", 1))
    message = complaint(copy)
    assert "train.samples.npy: checksum differs" in message and "val.names.txt: " in message


def test_a_folder_without_an_index_is_refused(tmp_path):
    assert "index.json" in complaint(tmp_path)


def test_inspect_shows_counts_and_draws_samples_of_each_class(pictures, tmp_path, capsys):
    verify.inspect_main([str(pictures), "--out", str(tmp_path / "sheet.png")])
    output = capsys.readouterr().out
    assert "cats" in output and "height: 9 to 9" in output and "sheet.png" in output
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape[0] == 200 and len(np.unique(sheet[:96, 180:].reshape(-1, 3), axis=0)) > 100
    verify.inspect_main([str(pictures)])
    assert (pictures / "inspect.png").exists()
    verify.main([str(pictures)])  # the picture is no damage


def test_inspect_draws_the_features_of_a_table(tmp_path, capsys):
    rows = "".join(f"{i % 7},{i * i},{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "t.csv").write_text(f"x,y,kind\n{rows}")
    convert(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="kind", out=str(tmp_path / "set")))
    verify.inspect_main([str(tmp_path / "set")])
    assert "2 features: x, y" in capsys.readouterr().out
    with Image.open(tmp_path / "set/inspect.png") as image:
        assert image.size[0] > 500


def test_inspect_of_a_damaged_set_points_at_verify(copy):
    with open(copy / "train-000000.tar", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="dist-train verify"):
        verify.inspect_main([str(copy)])
