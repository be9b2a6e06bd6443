"""Tars made by others: indexed in place, whatever their habits, and left as they are."""

import gc
import hashlib
import io
import json
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dist_train import foreign, shard, verify
from dist_train.errors import UserError
from dist_train.index import load_index
from dist_train.read_foreign import Sums
from dist_train.store import Store
from dist_train.tables import CONSTANT_STD


def jpeg(seed=0, size=(10, 12), kind="JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format=tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, payload in members:
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return path


def four_samples(labels=(b"0", b"1"), seed=0) -> list[tuple[str, bytes]]:
    return [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", jpeg(seed + i)), ("cls", labels[i % 2]))]


def samples_of(folder, split="train") -> list[tuple[bytes, int]]:
    """(payload, label) of every row of the index, read where it says."""
    part = load_index(folder).split(split)
    shards = part.shard_of(np.arange(part.num_samples))
    return [(Path(folder, part.files[k]).read_bytes()[row["offset"] :][: row["size"]], int(row["label"]))
            for k, row in zip(shards, part.table(), strict=True)]  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_what_webdatasets_writer_wrote_is_indexed_in_place(tmp_path, capsys):
    for part, count in (("train", 30), ("val", 8)):
        pattern = str(tmp_path / f"{part}-%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
            for i in range(count):
                writer.write({"__key__": f"{i:04d}", "jpg": jpeg(i), "cls": i % 3})
    (tmp_path / "classes.txt").write_text("cats\ndogs\nowls\n")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    foreign.main([str(tmp_path)])
    index = load_index(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert index.classes == ["cats", "dogs", "owls"] and index.image_size == (10, 12)
    for part, count in (("train", 30), ("val", 8)):
        assert samples_of(tmp_path, part) == [(jpeg(i), i % 3) for i in range(count)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg(i)))) for i in range(30)]) / 255
    np.testing.assert_allclose(index.mean, pixels.mean((0, 1, 2)), atol=2e-3)
    np.testing.assert_allclose(index.std, pixels.std((0, 1, 2)), atol=2e-3)
    assert "indexed" in capsys.readouterr().out
    verify.main([str(tmp_path)])
    foreign.main([str(tmp_path)])  # again, over its own index
    gc.collect()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_odd_names_and_other_members_are_understood(tmp_path, format):
    deep = "./" + "/".join(["a" * 40] * (2 if format == tarfile.USTAR_FORMAT else 6))
    write_tar(tmp_path / "x.tar", [
        ("._junk.jpg", b"resource fork"), ("README", b"text"), (f"{deep}/s.one.jpg", b"not the picture"),
        (f"{deep}/s.JPG", jpeg(1)), (f"{deep}/s.cls", b" 1\n"), (f"{deep}/t.seg.png", b"mask"),
        (f"{deep}/t.png", jpeg(2, kind="PNG")), (f"{deep}/t.json", b'{"label": 0, "caption": "x"}'),
        ("w.webp", jpeg(3, kind="WEBP")), ("w.json", b'{"caption": "x"}'), ("w.cls", b"2"),
    ], format)  # fmt: skip
    index = foreign.index_tars(tmp_path)
    assert samples_of(tmp_path) == [(jpeg(1), 1), (jpeg(2, kind="PNG"), 0), (jpeg(3, kind="WEBP"), 2)]
    assert index.classes == ["0", "1", "2"]


def test_members_in_any_order_and_apart_from_each_other_are_joined(tmp_path):
    write_tar(tmp_path / "x.tar", [
        ("a.cls", b"0"), ("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("c.jpg", jpeg(2)), ("b.cls", b"1"), ("c.cls", b"2"),
        ("d.cls", b"3"), ("e.cls", b"4"), ("e.jpg", jpeg(4)), ("d.jpg", jpeg(3)),
    ])  # fmt: skip
    foreign.index_tars(tmp_path)
    assert sorted(label for _, label in samples_of(tmp_path)) == list(range(5))
    assert all(payload == jpeg(label) for payload, label in samples_of(tmp_path))


def test_a_key_that_comes_twice_makes_two_samples_and_is_told(tmp_path, capsys):
    write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0"), ("a.jpg", jpeg(1)), ("a.cls", b"1"),
                                   ("b.jpg", jpeg(2)), ("b.cls", b"2"), ("a.jpg", jpeg(3)), ("a.cls", b"3")])  # fmt: skip
    foreign.index_tars(tmp_path)
    assert samples_of(tmp_path) == [(jpeg(k), k) for k in range(4)]
    assert "2 names occur more than once" in capsys.readouterr().out


def test_unusable_samples_are_named_counted_and_limited(tmp_path):
    write_tar(tmp_path / "x.tar", [
        ("good.jpg", jpeg(0)), ("good.cls", b"0"), ("unlabelled.jpg", jpeg(1)), ("lonely.cls", b"1"),
        ("odd.jpg", jpeg(2)), ("odd.cls", b"-1"), ("torn.jpg", b"no picture"), ("torn.cls", b"0"),
        ("two.jpg", jpeg(3)), ("two.cls", b"0"), ("two.json", b'{"label": 1}'), ("bare.jpg", jpeg(4)),
        ("bare.json", b"{}"),
        ("garbled.jpg", jpeg(5)), ("garbled.json", b"{"), ("also.jpg", jpeg(6)), ("also.cls", b"1"),
    ])  # fmt: skip
    with pytest.raises(UserError, match=r"7 of 9 samples cannot be used; max_bad allows 0(.|\n)*--max-bad 7"):
        foreign.index_tars(tmp_path)
    assert not (tmp_path / "index.json").exists()
    foreign.main([str(tmp_path), "--max-bad", "7"])
    index = load_index(tmp_path)
    why = {entry["name"].removeprefix("x.tar: "): entry["why"] for entry in index.left_out}
    assert "no label" in why["unlabelled"] and "without a picture" in why["lonely"] and "'-1'" in why["odd"]
    assert "not a JPEG" in why["torn"] and "two labels: 0 and 1" in why["two"]
    assert "without label, cls" in why["bare"] and "cannot be read" in why["garbled"] and len(why) == 7
    assert samples_of(tmp_path) == [(jpeg(0), 0), (jpeg(6), 1)]


def test_splits_follow_the_words_of_the_path(tmp_path):
    names = {"train/0.tar": "train", "my_val_3.tar": "val", "test-000.tar": "test", "retrain.tar": "train",
             "x.tar": "train",
             "validation.tar": "val"}  # fmt: skip
    for k, name in enumerate(names):
        write_tar(tmp_path / name, [("a.jpg", jpeg(k)), ("a.cls", b"0"), ("b.jpg", jpeg(k + 9)), ("b.cls", b"1")])
    index = foreign.index_tars(tmp_path)
    found = {file: split.name for split in index.splits.values() for file in split.files}
    assert found == names
    verify.main([str(tmp_path)])


def test_tars_without_a_split_in_their_names_are_told(tmp_path, capsys):
    for name in ("train-0", "eval-0", "testing-0"):
        write_tar(tmp_path / f"{name}.tar", four_samples())
    foreign.main([str(tmp_path)])
    assert "eval-0.tar: no split in the name, taken for train" in capsys.readouterr().err
    assert {name: split.num_samples for name, split in load_index(tmp_path).splits.items()} == {"train": 8, "test": 4}


def test_labelled_samples_with_a_dot_in_their_names_are_counted(tmp_path):
    members = [(f"{key}.{kind}", jpeg(1) if kind == "jpg" else b"1") for key in ("a.b", "c", "d") for kind in ("jpg", "cls")]
    write_tar(tmp_path / "train-0.tar", [*members, ("c.seg.jpg", jpeg(2)), ("e.jpg", jpeg(3)), ("e.cls", b"0")])
    with pytest.raises(UserError, match="a.b: a dot before its extension"):
        foreign.index_tars(tmp_path)
    index = foreign.index_tars(tmp_path, max_bad=1)
    assert index.split("train").num_samples == 3 and [entry["name"] for entry in index.left_out] == ["train-0.tar: a.b"]


def test_tars_that_cat_has_joined_are_refused(tmp_path):
    parts = [write_tar(tmp_path / f"{k}.part", [(f"{k}.jpg", jpeg(k)), (f"{k}.cls", b"%d" % k)]) for k in range(2)]
    (tmp_path / "train-0.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UserError, match="train-0.tar: cannot be read as a tar: it goes on after its end"):
        foreign.index_tars(tmp_path)


def test_tars_in_linked_folders_are_found(tmp_path):
    for k, name in enumerate(("elsewhere", "set/val")):
        write_tar(tmp_path / name / "0.tar", four_samples(seed=k))
    (tmp_path / "set/train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/holdout").symlink_to(tmp_path / "set/val")  # there already, under its own name
    index = foreign.index_tars(tmp_path / "set")
    assert {name: split.num_samples for name, split in index.splits.items()} == {"train": 4, "val": 4}


def test_damage_in_tars_of_others_is_told_by_its_payload_alone(tmp_path):
    write_tar(tmp_path / "train-0.tar", four_samples((b"dog", b"cat"))[::-1])  # labels first
    index = foreign.index_tars(tmp_path)
    at = int(index.split("train").table()["offset"][2]) + 20
    whole = bytearray((tmp_path / "train-0.tar").read_bytes())
    whole[at] ^= 1
    (tmp_path / "train-0.tar").write_bytes(whole)
    (line,) = verify.damage_of(load_index(tmp_path)).lines
    assert "payload of sample 00000002" in line and "label" not in line


def test_a_changed_label_in_a_tar_of_others_is_not_called_no_sample(tmp_path):
    tar = write_tar(tmp_path / "train-0.tar", [*four_samples((b"dog", b"cat")), ("bare.jpg", jpeg(9))])
    foreign.index_tars(tmp_path, max_bad=1)
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(b"cat", b"dog", 1))
    with pytest.raises(UserError, match=r"\(no picture or vector; labels or names may have changed\)") as told:
        verify.main([str(tmp_path)])
    assert "whatever labels stand in them" in str(told.value)
    command = str(told.value).rpartition(": ")[2]
    assert command == f"dist-train index {tmp_path} --max-bad 1"
    foreign.main(shlex.split(command)[2:])
    verify.main([str(tmp_path)])
    write_tar(tmp_path / "train-1.tar", four_samples((b"dog", b"cat")))
    with pytest.raises(UserError, match=r"train-1.tar: not in the index(.|\n)*or index the set with them") as told:
        verify.main([str(tmp_path)])
    assert "Fetch" not in str(told.value)


def test_damaged_pictures_met_while_indexing_are_named(tmp_path, capsys):
    torn = [(f"{k}.{kind}", data) for k in range(7) for kind, data in (("jpg", jpeg(k)[:-200]), ("cls", b"0"))]
    write_tar(tmp_path / "train-0.tar", [*torn, ("whole.jpg", jpeg(8)), ("whole.cls", b"1")])
    write_tar(tmp_path / "val-0.tar", torn[:2])
    index = foreign.index_tars(tmp_path)
    said = capsys.readouterr().out
    assert "8 of 9 pictures decoded are damaged, and in the index all the same:\n  train-0.tar: 0: cannot be decoded" in said
    assert "train-0.tar: 4: " in said and "train-0.tar: 5" not in said and "and 3 more" in said
    assert "--data.max_bad 7." in said and "write the tars of val without them" in said
    assert index.split("train").num_samples == 8


def test_labels_may_be_names(tmp_path):
    members = [("a.jpg", jpeg(0)), ("a.cls", b"owl\n"), ("b.jpg", jpeg(1)), ("b.json", b'{"class": "cat"}')]
    write_tar(tmp_path / "x.tar", members)
    assert foreign.index_tars(tmp_path).classes == ["cat", "owl"]
    assert [label for _, label in samples_of(tmp_path)] == [1, 0]
    (tmp_path / "names.txt").write_text("owl\ndog\ncat\n")
    foreign.main([str(tmp_path), "--classes", str(tmp_path / "names.txt")])
    assert [label for _, label in samples_of(tmp_path)] == [0, 2]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="does not name the class 'owl'"):
        foreign.index_tars(tmp_path)


def test_vectors_are_indexed_and_pickles_refused(tmp_path):
    def npy(array) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    members = [pair for k, v in enumerate(vectors) for pair in ((f"{k}.npy", npy(v)), (f"{k}.cls", b"%d" % (k % 2)))]
    write_tar(tmp_path / "x.tar", members)
    index = foreign.index_tars(tmp_path)
    assert len(index.features) == 4 and index.image_size is None
    np.testing.assert_allclose(index.mean, vectors.mean(0), rtol=1e-5)
    write_tar(tmp_path / "x.tar", [*members, ("p.npy", npy(np.array([{}]))), ("p.cls", b"0")])
    with pytest.raises(UserError, match=r"p: .npy cannot be read"):
        foreign.index_tars(tmp_path)
    write_tar(tmp_path / "x.tar", [*members, ("p.jpg", jpeg()), ("p.cls", b"0")])
    with pytest.raises(UserError, match="pictures and vectors"):
        foreign.index_tars(tmp_path)
    write_tar(tmp_path / "x.tar", [*members, ("p.npy", npy(vectors[0, :3])), ("p.cls", b"0")])
    with pytest.raises(UserError, match="differ in length: 3 and 4"):
        foreign.index_tars(tmp_path)
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "val.tar", [("p.npy", npy(vectors[0, :3])), ("p.cls", b"0")])
    with pytest.raises(UserError, match="differ in length: 3 and 4"):
        foreign.index_tars(tmp_path)


def test_a_column_that_is_constant_in_the_vectors_read_is_learnt_from_where_others_were_not_read(capsys):
    vectors = np.array([[1, 0], [2, 0], [3, 0]], np.float32)
    assert foreign._statistics("tars", [Sums(1, [], list(vectors))], vectors=True)[1][1] == CONSTANT_STD
    assert "feature 1" in capsys.readouterr().out
    assert foreign._statistics("tars", [Sums(5, [], list(vectors))], vectors=True)[1][1] == 1
    assert capsys.readouterr().out == ""


def test_a_table_that_is_read_survives_another_index(tmp_path):
    tar = write_tar(tmp_path / "x.tar", pairs(*range(2000)))
    table = foreign.index_tars(tmp_path).split("train").table()
    before = np.array(table)
    write_tar(tar, pairs(0))
    foreign.index_tars(tmp_path)
    assert np.array_equal(table, before)  # cut short in its place, the mapping would end the process


def test_arrays_that_are_no_float32_vectors_are_left_out_by_name(tmp_path):
    def npy(array, save=np.save) -> bytes:
        buffer = io.BytesIO()
        save(buffer, array)
        return buffer.getvalue()

    good, values = npy(np.ones(4, np.float32)), np.ones(4)
    claiming = io.BytesIO()
    np.lib.format.write_array_header_1_0(claiming, {"descr": "<f4", "fortran_order": False, "shape": (10**14,)})
    bad = {
        "f8": npy(values), "i8": npy(values.astype(np.int64)), "big": npy(values.astype(">f4")), "text": npy(np.array(["a"])),
        "table": npy(np.ones((2, 2), np.float32)), "fields": npy(np.zeros(4, [("a", "<f4")])), "cut": good[:-1],
        "more": good + b"x",
        "npz": npy(values, np.savez), "zip": b"PK\x03\x04 and no more", "huge": claiming.getvalue(), "none": b"",
    }  # fmt: skip
    pairs = [(f"{key}.npy", payload) for key, payload in bad.items()] + [(f"{key}.cls", b"0") for key in bad]
    nested = [("deep.npy", good), ("deep.json", b"[" * 100_000)]
    write_tar(tmp_path / "x.tar", [("good.npy", good), ("good.cls", b"0"), *pairs, *nested])
    index = foreign.index_tars(tmp_path, max_bad=len(bad) + 1)
    assert index.split("train").num_samples == 1
    assert {entry["name"].rpartition(": ")[2] for entry in index.left_out} == {*bad, "deep"}
    assert "it holds float64 (4,); expected a vector of float32" in index.left_out[0]["why"]


FAULTS = {
    "no tars": (lambda f: None, "no .tar files"),
    "compressed": (lambda f: write_tar(f / "x.tar.gz", []), "x.tar.gz is compressed"),
    "compressed under another name": (lambda f: (f / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600)), "it is compressed"),
    "no tar": (lambda f: (f / "x.tar").write_bytes(b"a" * 2000), "cannot be read as a tar"),
    "empty": (lambda f: (f / "x.tar").write_bytes(b""), "x.tar: cannot be read as a tar"),
    "no samples": (lambda f: write_tar(f / "x.tar", [("readme.txt", b"x")]), "no usable sample"),
    "two dots": (lambda f: write_tar(f / "x.tar", [("a.input.jpg", jpeg()), ("a.output.cls", b"0")]),
                 r"no usable sample(.|\n)*What there is: .input.jpg, .output.cls; what follows the first dot"),
    "all unusable": (lambda f: write_tar(f / "x.tar", [(f"{k}.jpg", jpeg()) for k in range(8)]),
                     r"no usable sample(.|\n)*x.tar: 4: no label.*\n  and 3 more$"),
    "names and numbers": (lambda f: write_tar(f / "x.tar", [("a.jpg", jpeg()), ("a.cls", b"0"), ("b.jpg", jpeg()),
                                                            ("b.cls", b"dog")]), "some labels are names"),
    "numbered from 1": (lambda f: ((f / "classes.txt").write_text("a\nb\n"), write_tar(f / "x.tar", [
        ("a.jpg", jpeg()), ("a.cls", b"1"), ("b.jpg", jpeg()), ("b.cls", b"2")])), "numbered from 1"),
    "class twice": (lambda f: ((f / "classes.txt").write_text("a\na\n"), write_tar(f / "x.tar", [
        ("a.jpg", jpeg()), ("a.cls", b"1")])), "names a class twice"),
    "huge label": (lambda f: write_tar(f / "x.tar", [("a.jpg", jpeg()), ("a.cls", b"99999999")]), "99,999,999"),
    "other index": (lambda f: ((f / "index.json").write_text("{}"), write_tar(f / "x.tar", [])), "not written by"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_at_fault_is_named(tmp_path, fault):
    make, message = FAULTS[fault]
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        foreign.index_tars(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("cut", [511, 700, 1100, 1600, 2600, 3000, 3200])
def test_a_truncated_tar_is_refused(tmp_path, cut):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg()), ("a.cls", b"1"), ("b.jpg", jpeg(1)), ("b.cls", b"0")])
    whole = path.read_bytes()
    assert len(jpeg()) > 512
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match="x.tar"):
        foreign.index_tars(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_a_set_of_our_own_needs_no_index(digits):
    with pytest.raises(UserError, match="not written by dist-train index"):
        foreign.index_tars(Path(digits))
    with pytest.raises(UserError, match="a finished set"):
        shard.main(["--source", "sklearn", "--dataset", "digits", "--out", digits])
    assert json.loads(Path(digits, "index.json").read_text())["name"] == "digits"


def pairs(*keys: int) -> list[tuple[str, bytes]]:
    """Members of samples k, labelled k % 3."""
    return [member for k in keys for member in ((f"{k:04d}.jpg", jpeg(k)), (f"{k:04d}.cls", b"%d" % (k % 3)))]


def four_tars(folder: Path) -> list[Path]:
    names = ("train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar")
    return [write_tar(folder / name, pairs(*range(k * 5, k * 5 + 5))) for k, name in enumerate(names)]


def test_files_and_brace_patterns_name_the_tars_and_the_index_lies_beside_them(tmp_path, capsys):
    four_tars(tmp_path / "tars")
    pattern = f"{tmp_path}/tars/train-{{000000..000001}}.tar"
    index = foreign.index_tars([pattern, f"{tmp_path}/tars/val-000000.tar"])
    assert index.folder == f"{tmp_path}/tars"
    assert index.split("train").files == ["train-000000.tar", "train-000001.tar"]
    assert samples_of(tmp_path / "tars") == [(jpeg(k), k % 3) for k in range(10)]
    verify.main([index.folder])  # train-000002.tar is no stray: the tars were named one by one
    (tmp_path / "tars/val-000000.tar").unlink()
    with pytest.raises(
        UserError, match=r"missing(.|\n)*dist-train index .*train-\{000000..000001\}.tar' .*val-000000.tar --out"
    ):
        verify.main([index.folder])


def test_out_takes_the_index_elsewhere_and_the_tars_stay_where_they_are(tmp_path, capsys):
    tars = four_tars(tmp_path / "tars")
    before = sorted((tmp_path / "tars").iterdir())
    foreign.main([str(tmp_path / "tars"), "--out", str(tmp_path / "index")])
    assert sorted((tmp_path / "tars").iterdir()) == before
    index = load_index(tmp_path / "index")
    assert index.split("train").files == [str(path) for path in tars[:3]]
    assert samples_of(tmp_path / "index") == [(jpeg(k), k % 3) for k in range(15)]
    beside = foreign.index_tars(tmp_path / "tars")
    assert (index.mean, index.std) == (beside.mean, beside.std)
    assert index.split("train").fingerprint() == beside.split("train").fingerprint()
    verify.main([str(tmp_path / "index")])
    tars[0].write_bytes(tars[0].read_bytes()[:-1])
    with pytest.raises(UserError, match=f"the index says(.|\n)*dist-train verify {tmp_path}/index$"):
        Store(index.split("train")).payload(0)
    tars[0].unlink()
    with pytest.raises(UserError, match=f"cannot open the shard(.|\n)*dist-train verify {tmp_path}/index$"):
        Store(index.split("train")).payload(0)


NAMES = {
    "missing": ("x-{0..3}.tar", r"x-0.tar: there is no such file \(and 3 more of 4\)"),
    "braces": ("x-{0..3.tar", "braces do not match"),
    "twice": ("train-{000000,000000}.tar", "named twice"),
    "mixed": ("train-000000.tar https://h/x.tar", "one kind"),
    "command": ("pipe:cat", "commands are not run"),
    "a page": ("https://h/set", "is no .tar"),
    "no out": ("https://h/x.tar", "name a folder for it with --out"),
}


@pytest.mark.parametrize("fault", NAMES)
def test_names_at_fault_are_refused_before_a_tar_is_read(tmp_path, monkeypatch, fault):
    four_tars(tmp_path)
    monkeypatch.chdir(tmp_path)
    words, message = NAMES[fault]
    with pytest.raises(UserError, match=message):
        foreign.index_tars(words.split())


def wids_list(folder: Path, tars: list[Path], **changes) -> Path:
    """A list of shards with the keys that widsindex gives each."""
    shards = [{"url": path.name, "md5sum": hashlib.md5(path.read_bytes()).hexdigest(), "nsamples": 5,
               "filesize": path.stat().st_size} for path in tars]  # fmt: skip
    shards[0] |= changes
    path = folder / "shards.json"
    path.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "name": "x"}))
    return path


def test_a_wids_list_names_the_tars_and_is_held_against_them(tmp_path):
    tars = four_tars(tmp_path)
    listed = wids_list(tmp_path, [tars[2], tars[0]])
    index = foreign.index_tars(listed)
    assert index.split("train").files == ["train-000002.tar", "train-000000.tar"] and "val" not in index.splits
    faults = [
        ({"nsamples": 6}, "5 samples, not 6"), ({"filesize": 7}, "bytes, not 7"), ({"md5sum": "ab"}, "not ab"),
        ({"url": "gone.tar"}, "gone.tar: there is no such file"), ({"nsamples": "x"}, "cannot be read as a list"),
    ]  # fmt: skip
    for changes, message in faults:
        with pytest.raises(UserError, match=message):
            foreign.index_tars(wids_list(tmp_path, [tars[2], tars[0]], **changes))
    (tmp_path / "other.json").write_text('{"shardlist": []}')
    with pytest.raises(UserError, match="expected a list of shards as wids writes it"):
        foreign.index_tars(tmp_path / "other.json")


def test_a_wids_list_may_name_tars_from_the_working_folder_on(tmp_path, monkeypatch):
    tars = four_tars(tmp_path / "tars")
    monkeypatch.chdir(tmp_path)
    listed = wids_list(tmp_path / "tars", tars[:2], url="tars/train-000000.tar")
    assert foreign.index_tars(listed).split("train").num_samples == 10


def dali_index(tar: Path) -> Path:
    """The index of a tar as DALI's readers take it (format v1.2), from GNU tar's listing rather than from our own reading."""
    listing = subprocess.run(
        ["tar", "--list", "--verbose", "--block-number", "-f", tar], capture_output=True, text=True, check=True
    )
    found = re.findall(r"^block (\d+): -\S+ +\S+ +(\d+) \S+ \S+ (.*)$", listing.stdout, flags=re.M)
    samples: dict[str, list[str]] = {}
    for block, size, name in found:
        key, _, extension = name.partition(".")
        samples.setdefault(key, []).append(f"{extension} {(int(block) + 1) * 512} {size} {name}")
    path = tar.with_suffix(".idx")
    path.write_text(f"v1.2 {len(samples)}\n" + "".join(f"{' '.join(parts)}\n" for parts in samples.values()))
    return path


def test_dalis_index_beside_a_tar_is_held_against_it(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [*pairs(0, 1, 2), ("a b.jpg", jpeg(9)), ("a b.cls", b"1")])
    listed = dali_index(tar)
    assert listed.read_text().startswith("v1.2 4\njpg 512 ")
    assert foreign.index_tars(tmp_path).split("train").num_samples == 4
    whole = listed.read_text()
    for old, new, message in ((" 512 ", " 1024 ", "no such member there"), ("jpg 512", "png 512", "0000.jpg there"),
                              ("v1.2 4", "v1.2 3", "of 3 samples, but the tar has 8 members")):  # fmt: skip
        listed.write_text(whole.replace(old, new, 1))
        with pytest.raises(UserError, match=f"x.idx: does not fit x.tar: .*{message}"):
            foreign.index_tars(tmp_path)
    listed.write_text(whole.rsplit("\n", 2)[0] + "\n")
    with pytest.raises(UserError, match="lists 6 members in 3 of 4 samples, but the tar has 8"):
        foreign.index_tars(tmp_path)
    old = re.sub(r"(\S+ \d+ \d+) \d+\.\w+", r"\1", whole.replace("v1.2 4", "v1.1 3").replace("a b", "0003"))
    listed.write_text(old)
    write_tar(tar, pairs(0, 1, 2))
    listed.write_text("".join(old.splitlines(True)[:4]))  # before v1.2 there were no names
    assert foreign.index_tars(tmp_path).split("train").num_samples == 3
    listed.write_text("something else\n")
    foreign.index_tars(tmp_path)


def test_mean_and_std_weigh_every_tar_by_its_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "_STATISTICS_SAMPLES", 4)
    for name, grey, count in (("a.tar", 40, 6), ("b.tar", 200, 2)):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(picture, "PNG")
        members = [pair for k in range(count) for pair in ((f"{k}.png", picture.getvalue()), (f"{k}.cls", b"0"))]
        write_tar(tmp_path / name, members)
    index = foreign.index_tars(tmp_path)
    values = np.repeat([40, 200], [6, 2]) / 255
    np.testing.assert_allclose(index.mean, [values.mean()] * 3, rtol=1e-12)
    np.testing.assert_allclose(index.std, [values.std()] * 3, rtol=1e-12)


def test_names_that_are_no_text_and_members_that_are_no_files_do_no_harm(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name, payload in ((b"\xe9t\xe9.jpg", jpeg(1)), (b"\xe9t\xe9.cls", b"0"), (b"a.cls", b"1")):
            member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    index = foreign.index_tars(tmp_path, max_bad=1)
    assert [entry["name"] for entry in index.left_out] == ["x.tar: a"]  # its picture is a link
    assert samples_of(tmp_path) == [(jpeg(1), 0)] and len(index.split("train").names()) == 1
    verify.main([str(tmp_path)])


def test_tars_of_others_are_not_repaired(tmp_path):
    four_tars(tmp_path)
    foreign.index_tars(tmp_path)
    with pytest.raises(UserError, match="tars made elsewhere"):
        shard.main(["--source", "sklearn", "--dataset", "digits", "--out", str(tmp_path), "--repair", "true"])
