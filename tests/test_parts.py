"""Conversion by several machines, and the repair of single shards: the bytes are those of one conversion on one machine."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from test_shard import all_bytes, command, config_for, make_folder

from dist_train import convert as convert_module
from dist_train import shard
from dist_train.convert import convert, convert_part, part_of
from dist_train.errors import UserError
from dist_train.index import load_index
from dist_train.repair import damaged_shards, repair

SETTINGS = {"shard_mb": 0.01, "workers": 1}


@pytest.fixture
def raw(tmp_path):
    make_folder(tmp_path / "raw", per_class=40)
    return tmp_path


def test_parts_joined_are_byte_for_byte_the_whole_conversion(raw):
    convert(config_for(raw, out=str(raw / "whole/set"), **SETTINGS))
    counts = [convert_part(config_for(raw, part=f"{i}/3", **SETTINGS)) for i in (2, 0, 1)]
    assert sum(counts) > 8 and max(counts) - min(counts) <= 1
    assert not (raw / "shards/set").exists()
    index = convert(config_for(raw, join=True, **SETTINGS))
    assert all_bytes(index.folder) == all_bytes(raw / "whole/set")
    assert not (raw / "shards/set.partial").exists()


def test_parts_run_at_the_same_time_on_one_folder(raw):
    words = ["shard", "--path", raw / "raw", "--out", raw / "shards/set", "--split.val", 0.25, "--split.test", 0.25,
             "--shard-mb", 0.01, "--workers", 1]  # fmt: skip
    parts = [command(*words, "--part", f"{i}/2") for i in range(2)]
    outputs = [process.communicate()[0] for process in parts]
    assert [process.returncode for process in parts] == [0, 0], outputs
    assert "When all parts are: the same with --join" in outputs[0]
    joined = command(*words, "--join")
    assert "finished" in joined.communicate()[0] and joined.returncode == 0
    convert(config_for(raw, out=str(raw / "whole/set"), **SETTINGS))
    assert all_bytes(raw / "shards/set") == all_bytes(raw / "whole/set")


def test_a_join_without_all_parts_says_which_shards_are_missing(raw):
    with pytest.raises(UserError, match="shards are not written"):
        convert(config_for(raw, join=True, **SETTINGS))
    convert_part(config_for(raw, part="1/2", **SETTINGS))
    before = all_bytes(raw / "shards/set.partial")
    with pytest.raises(UserError, match=r"train-000000.tar \(shard 0\), train-000002.tar \(shard 2\)"):
        convert(config_for(raw, join=True, **SETTINGS))
    assert all_bytes(raw / "shards/set.partial") == before
    convert_part(config_for(raw, part="0/2", **SETTINGS))
    (raw / "raw/cats/001.jpg").write_bytes((raw / "raw/cats/002.jpg").read_bytes())
    with pytest.raises(UserError, match="1 shards are not written, or of other raw data"):
        convert(config_for(raw, join=True, **SETTINGS))
    convert_part(config_for(raw, part="0/2", **SETTINGS))
    convert_part(config_for(raw, part="1/2", **SETTINGS))
    convert(config_for(raw, join=True, **SETTINGS))


def test_bad_samples_are_limited_over_all_parts_together(raw):
    for name in ("cats/003.jpg", "dogs/004.jpg", "owls/005.jpg"):
        (raw / "raw" / name).write_bytes(b"no picture")
    for i in range(2):
        convert_part(config_for(raw, part=f"{i}/2", max_bad=3, **SETTINGS))
    with pytest.raises(UserError, match="(?s)3 samples so far cannot be read; max_bad allows 2.*cats/003.jpg"):
        convert(config_for(raw, join=True, max_bad=2, **SETTINGS))
    index = convert(config_for(raw, join=True, max_bad=3, **SETTINGS))
    assert sorted(entry["name"] for entry in index.left_out) == ["cats/003.jpg", "dogs/004.jpg", "owls/005.jpg"]


def test_a_part_is_written_by_one_process_and_not_beside_a_whole_conversion(raw):
    import fcntl

    staging = raw / "shards/set.partial"
    staging.mkdir(parents=True)
    with open(staging / "part-0-of-2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing this part"):
            convert_part(config_for(raw, part="0/2", **SETTINGS))
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as a part holds it
    with pytest.raises(UserError, match="another process is writing this set"):
        convert(config_for(raw, **SETTINGS))
    os.close(descriptor)


def test_a_conversion_that_came_just_too_late_does_not_write_into_the_finished_set(raw, monkeypatch):
    flock, index = convert_module.fcntl.flock, []

    def another_finishes_first(fd, kind):
        monkeypatch.undo()
        index.append(convert(config_for(raw, **SETTINGS)))
        return flock(fd, kind)

    monkeypatch.setattr(convert_module.fcntl, "flock", another_finishes_first)
    with pytest.raises(UserError, match="another process has just finished this set"):
        convert(config_for(raw, overwrite=True, **SETTINGS))
    assert load_index(index[0].folder).split("train").num_samples > 0
    assert [path.name for path in Path(index[0].folder).parent.iterdir()] == ["set"]


def test_what_an_ended_attempt_left_of_a_part_is_removed(raw):
    staging = raw / "shards/set.partial"
    staging.mkdir(parents=True)
    (staging / "train-000000.tar.99999.partial").write_bytes(b"half")
    (staging / "train-000001.tar.88888.partial").write_bytes(b"another part's, at work")
    convert_part(config_for(raw, part="0/2", **SETTINGS))
    assert [path.name for path in staging.glob("*.partial")] == ["train-000001.tar.88888.partial"]


@pytest.mark.parametrize("text", ["3/3", "x", "1", "-1/2", "0/0", "1/2/3"])
def test_a_part_that_makes_no_sense_is_refused(text):
    with pytest.raises(UserError, match="expected I/N with I from 0 to N - 1"):
        part_of(text)
    assert part_of("0/1") == (0, 1) and part_of("15/16") == (15, 16)


def test_part_join_and_repair_exclude_each_other(raw):
    with pytest.raises(UserError, match="one of them at a time"):
        convert(config_for(raw, part="0/2", join=True))


def test_a_flag_may_stand_alone(raw):
    config = shard.read_shard_config(["--out", "x", "--join", "--overwrite", "--seed", "3", "--repair"])
    assert config.join and config.overwrite and config.repair and config.seed == 3
    assert not shard.read_shard_config(["--out", "x", "--join", "false"]).join


def test_repair_brings_missing_and_damaged_shards_back_to_the_same_bytes(raw):
    index = convert(config_for(raw, **SETTINGS))
    folder, whole = Path(index.folder), all_bytes(index.folder)
    assert repair(config_for(raw, repair=True, **SETTINGS)) == [] and damaged_shards(index) == []
    (folder / "train-000001.tar").unlink()
    blob = bytearray(whole["val-000000.tar"])
    blob[700] ^= 1
    (folder / "val-000000.tar").write_bytes(blob)
    (folder / "test-000000.tar").write_bytes(whole["test-000000.tar"][:-512])
    kept = (folder / "train-000000.tar").stat().st_mtime_ns
    assert damaged_shards(index) == [("train", 1), ("val", 0), ("test", 0)]
    with contextlib.redirect_stdout(None):
        names = repair(config_for(raw, repair=True, **SETTINGS))
    assert names == ["train-000001.tar", "val-000000.tar", "test-000000.tar"]
    assert all_bytes(folder) == whole and (folder / "train-000000.tar").stat().st_mtime_ns == kept
    assert not Path(f"{folder}.repair").exists()


def test_repair_refuses_other_raw_data_and_other_settings_and_touches_nothing(raw):
    index = convert(config_for(raw, **SETTINGS))
    victim = Path(index.folder, "train-000001.tar")
    victim.write_bytes(b"")
    before = all_bytes(index.folder)
    with pytest.raises(UserError, match="these settings differ: seed was 0 and is 4"):
        repair(config_for(raw, repair=True, seed=4, **SETTINGS))
    with pytest.raises(UserError, match=r"(?s)\d+ shards come of it, the index lists \d+; .*shard_mb was 0.01 and is 1"):
        repair(config_for(raw, repair=True, shard_mb=1.0))
    first = int(index.split("train").first[1])
    changed = raw / "raw" / index.split("train").names()[first]
    changed.write_bytes((raw / "raw" / index.split("train").names()[0]).read_bytes())
    with pytest.raises(UserError, match="train-000001.tar would get other bytes .*the raw data have changed"):
        repair(config_for(raw, repair=True, **SETTINGS))
    assert all_bytes(index.folder) == before
    assert [path.name for path in Path(index.folder).parent.iterdir()] == ["set"]


def test_repair_says_what_it_cannot_repair(raw):
    index = convert(config_for(raw, **SETTINGS))
    stray = Path(index.folder, "val-000009.tar")
    stray.write_bytes(b"")
    with pytest.raises(UserError, match="val-000009.tar: not in the index(.|\n)*Move the tars") as told:
        repair(config_for(raw, repair=True, **SETTINGS))
    assert "dist-train shard" not in str(told.value)
    stray.unlink()
    Path(index.folder, "train.samples.npy").write_bytes(b"")
    with pytest.raises(UserError, match="(?s)train.samples.npy.*Shards alone can be repaired.*dist-train shard .*--overwrite true"):
        repair(config_for(raw, repair=True, **SETTINGS))


def sbatch(tmp_path, *words, **env) -> subprocess.CompletedProcess:
    """launch/shard.sbatch with stand-ins: sbatch prints a job number and writes down its words, python writes down its own."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "sbatch").write_text('#!/usr/bin/env bash\necho "sbatch $*" >> "$LOG"\necho 4711\n')
    (tools / "python").write_text('#!/usr/bin/env bash\necho "python $*" >> "$LOG"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "PYTHON": str(tools / "python"),
                   "PROJECT": str(ROOT)} | env  # fmt: skip
    return subprocess.run(["bash", str(ROOT / "launch/shard.sbatch"), *words], env=environment, capture_output=True, text=True)


def test_the_job_script_submits_an_array_and_a_join_after_it(tmp_path):
    assert sbatch(tmp_path, "datasets/digits.yaml", "--resize", "32", PARTS="8", CPUS="4").returncode == 0
    array, join = (tmp_path / "log").read_text().splitlines()
    assert "--array=0-7" in array and "--cpus-per-task=4" in array and array.endswith("datasets/digits.yaml --resize 32")
    assert "--dependency=afterok:4711" in join and "PARTS=join" in join


def test_a_dry_run_submits_nothing(tmp_path):
    done = sbatch(tmp_path, "datasets/digits.yaml", PARTS="8", DRY_RUN="1")
    assert done.returncode == 0 and "--array=0-7" in done.stdout and "--dependency=afterok:" in done.stdout
    assert not (tmp_path / "log").exists()


def test_the_job_script_writes_its_part_or_joins_them(tmp_path):
    job = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "4"}
    assert sbatch(tmp_path, "datasets/digits.yaml", "--resize", "32", **job).returncode == 0
    expected = "python -m dist_train shard datasets/digits.yaml --resize 32 --workers 4 --part 3/8\n"
    assert (tmp_path / "log").read_text() == expected
    (tmp_path / "log").unlink()
    assert sbatch(tmp_path, "datasets/digits.yaml", SLURM_JOB_ID="1", PARTS="join").returncode == 0
    assert (tmp_path / "log").read_text() == "python -m dist_train shard datasets/digits.yaml --join\n"


def test_the_job_script_names_a_missing_data_set(tmp_path):
    done = sbatch(tmp_path, "datasets/nothing.yaml")
    assert done.returncode == 2 and "datasets/nothing.yaml: there is no such file" in done.stderr
