"""A run begun from another's checkpoint goes on with its whole state under new settings, or is refused and leaves nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import figures, killed_at, lines_of, run_to_end, same_tensors, tiny_run, train_tiny

from dist_train import runtime
from dist_train.branch import open_branch, origin
from dist_train.checkpoint import Checkpoints, Saved, load_checkpoint
from dist_train.config import OptimConfig
from dist_train.errors import UserError
from dist_train.index import load_index, save_index, save_table
from dist_train.run_folder import written_settings
from dist_train.state import begun_anew
from dist_train.train import parse, run_training

# six steps, checkpoints after 2, 3, 4 and 6, evaluations after 3 and 6
SHORT = ["--train.epochs", "0.4", "--train.eval_every_epochs", "0.2", "--train.checkpoint_every_steps", "2",
         "--train.keep_checkpoints", "9", "--optim.schedule", "constant"]  # fmt: skip
LONGER = [*SHORT, "--train.epochs", "0.8"]
WORLD = runtime.World(0, 1, 0, 1, torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def first(digits, tmp_path_factory) -> Path:
    """A finished run."""
    return train_tiny(digits, tmp_path_factory.mktemp("runs") / "first", *SHORT)


@pytest.fixture(scope="module")
def straight(digits, tmp_path_factory) -> Path:
    """A run twice as long."""
    return train_tiny(digits, tmp_path_factory.mktemp("runs") / "straight", *LONGER)


def rates(run: Path) -> list[float]:
    return [line["lr"] for line in lines_of(run, "train")]


def same_checkpoint(one: Path, other: Path, step: int = 12) -> bool:
    files, others = (sorted((run / f"checkpoints/step-{step:08d}").glob("*.safetensors")) for run in (one, other))
    assert [path.name for path in files] == [path.name for path in others] != []
    return all(map(same_tensors, files, others))


def damage(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


def nothing_is_begun(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {"lock"}


def test_a_finished_run_made_longer_is_one_that_was_as_long_from_its_start(first, straight, digits, tmp_path, capsys):
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert run_training(tiny_run(digits, run, *LONGER, "--from", str(first))) == 0
    told = capsys.readouterr().out
    assert f"{run}: begins from {first}/checkpoints/step-00000006 (train.epochs: 0.4 in the run, 0.8 now)" in told
    assert figures(run) == figures(straight)
    assert same_checkpoint(run, straight)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert json.loads((run / "result.json").read_text())["best_step"] in (9, 12)  # judged here
    expected = {"from": str(first), "run": str(first), "checkpoint": "step-00000006", "step": 6,
                "changed": ["train.epochs: 0.4 in the run, 0.8 now"]}  # fmt: skip
    assert origin(run) == expected == json.loads((run / "environment.json").read_text())["branched_from"]


def test_a_run_goes_on_from_before_it_diverged_at_a_lower_rate(first, digits, tmp_path, capsys):
    run, source = tmp_path / "run", first / "checkpoints/step-00000004"
    argv = tiny_run(digits, run, *SHORT, "--from", str(source), "--optim.lr", "0.004", "--optim.clip_norm", "1",
                    "--optim.momentum", "0.8", "--optim.weight_decay", "0", "--augment.flip", "0.5")  # fmt: skip
    assert run_training(argv) == 0
    assert "learning rate of the next step 0.004, of the one before 0.02" in capsys.readouterr().out
    assert rates(run) == [0.02] * 4 + [0.004] * 2
    assert figures(run)[:5] == figures(first)[:5] and figures(run)[5:] != figures(first)[5:]


def test_a_job_that_is_queued_again_goes_on_with_the_same_command(first, straight, digits, tmp_path):
    run, source = tmp_path / "run", tmp_path / "source"
    shutil.copytree(first, source)
    argv = tiny_run(digits, run, "--resume", *LONGER, f"--from={source}")  # as launch/train.sbatch has it
    assert run_training([*argv, "--train.max_steps", "8"]) == 0
    shutil.rmtree(source)
    assert run_training(argv) == 0
    assert figures(run) == figures(straight)
    assert same_checkpoint(run, straight)


def test_a_folder_that_holds_a_run_is_not_begun_anew(first, straight, digits, tmp_path):
    run = tmp_path / "run"
    argv = tiny_run(digits, run, *LONGER, "--train.max_steps", "7")
    assert run_training([*argv, "--from", str(first)]) == 0
    with pytest.raises(UserError, match=f"begins a new run, and the folder holds one, begun from {first}.\n.*--resume"):
        run_training([*argv, "--from", str(first)])
    other = str(first / "checkpoints/step-00000004")
    with pytest.raises(UserError, match=f"the run there has begun from {first}.\n  Leave out --from"):
        run_training([*argv, "--resume", "--from", other])
    with pytest.raises(UserError, match="the run there has begun by itself"):
        run_training(tiny_run(digits, straight, *LONGER, "--resume", "--from", str(first)))
    assert run_training([*argv, "--resume", "--train.max_steps", "8"]) == 0  # without --from, too
    assert len(rates(run)) == 8


def test_what_made_the_checkpoint_is_refused_by_name_and_nothing_is_written(first, digits, tmp_path):
    run = tmp_path / "run"
    refused = {"seed": 1, "data.global_batch_size": 48, "data.window_shards": 2, "data.lanes": 3, "data.folds": 3,
               "data.val_split": "none", "data.image_size": 18, "model.dropout": 0.1, "optim.name": "adam",
               "optim.muon_moves": "kernels", "optim.freeze_epochs": 1}  # fmt: skip
    argv = [word for name, value in refused.items() for word in (f"--{name}", str(value))]
    with pytest.raises(UserError, match="cannot begin from .*step-00000006 with these settings") as error:
        run_training(tiny_run(digits, run, *LONGER, *argv, "--optim.lr", "0.01", "--from", str(first)))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]] == sorted(refused)
    assert nothing_is_begun(run)


def test_other_shards_and_faulty_settings_are_refused_before_anything_is_written(first, digits, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(digits, other)
    index = load_index(other)
    split = index.split("train")
    rows = np.array(split.table())
    rows["label"][0] = (rows["label"][0] + 1) % 10
    checksum = save_table(other, "train", rows, split.names())
    save_index(replace(index, splits=index.splits | {"train": replace(split, table_checksum=checksum)}))
    with pytest.raises(UserError, match=f"not the shards that {first} was trained on: other split train"):
        run_training(tiny_run(str(other), run, *LONGER, "--from", str(first)))
    with pytest.raises(UserError, match="optim.lr is -1.0"):
        run_training(tiny_run(digits, run, *LONGER, "--optim.lr", "-1", "--from", str(first)))
    with pytest.raises(UserError, match="step 6, and train.epochs 0.4 is over after 6: nothing is left to train"):
        run_training(tiny_run(digits, run, *SHORT, "--from", str(first)))
    assert nothing_is_begun(run)


def test_what_is_neither_a_run_nor_a_checkpoint_is_named_with_those_there_are(first, digits, tmp_path):
    with pytest.raises(UserError, match="nowhere: neither a run folder nor a checkpoint of one; expected runs/NAME"):
        run_training(tiny_run(digits, tmp_path / "run", "--from", str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="has step-00000002, step-00000003, step-00000004, step-00000006"):
        run_training(tiny_run(digits, tmp_path / "run", "--from", str(first / "checkpoints/step-00000005")))
    shutil.rmtree(shutil.copytree(first, tmp_path / "source") / "checkpoints")
    with pytest.raises(UserError, match="source: there is no checkpoint in it to begin from"):
        run_training(tiny_run(digits, tmp_path / "run", "--from", str(tmp_path / "source")))
    with pytest.raises(UserError, match="--from has no value"):
        run_training(tiny_run(digits, tmp_path / "run", "--from"))


def test_a_damaged_newest_checkpoint_is_passed_over_and_named_and_a_damaged_one_refused(first, digits, tmp_path, capsys):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(first, source)
    newest = source / "checkpoints/step-00000006"
    damage(newest)
    argv = tiny_run(digits, run, *LONGER, "--train.max_steps", "5")
    with pytest.raises(UserError, match="model.safetensors: checksum differs from the manifest"):
        run_training([*argv, "--from", str(newest)])
    assert run_training([*argv, "--from", str(source)]) == 0
    told = capsys.readouterr().out
    assert f"{newest}/model.safetensors: checksum differs" in told and f"begins from {source}/checkpoints/step-00000004" in told


def test_a_run_whose_every_checkpoint_is_lost_does_not_begin_from_nothing(first, digits, tmp_path):
    run = tmp_path / "run"
    argv = tiny_run(digits, run, *LONGER, "--train.max_steps", "7", "--resume", "--from", str(first))
    assert run_training(argv) == 0
    for checkpoint in Checkpoints(run, 1).finished():
        damage(checkpoint)
    with pytest.raises(UserError, match="(?s)step-00000007.*step-00000006.*No whole checkpoint is left"):
        run_training(argv)


def test_a_crash_at_any_file_operation_leaves_the_run_begun_or_to_be_begun_again(first, digits, tmp_path, monkeypatch):
    config, _, _ = parse(tiny_run(digits, tmp_path, *LONGER))
    for operation in range(1, 60):
        folder = tmp_path / str(operation)
        folder.mkdir()
        with killed_at(operation, monkeypatch) as left:
            open_branch(config, folder, first, True, WORLD)
        if origin(folder) and not Checkpoints(folder, 1).finished():
            with pytest.raises(UserError, match=f"was to begin from {first}, and has no checkpoint of it yet"):
                open_branch(config, folder, None, True, WORLD)
        open_branch(config, folder, first, True, WORLD)
        (path,) = Checkpoints(folder, 1).finished()
        assert load_checkpoint(path).step == 6 and origin(folder)["step"] == 6 and written_settings(folder) == config
        if left[0] > 0:
            return  # nothing left to interrupt
    raise AssertionError("beginning never finished")


def test_the_best_and_patience_count_anew_and_a_plateau_keeps_its_drops():
    state = {"best_value": [0.9, -0.1], "bad_evaluations": 3, "is_best": True, "judged_step": 6, "scaler": None,
             "plateau": {"factor": 0.01, "best": 0.9, "bad_evaluations": 2}}  # fmt: skip
    saved = Saved(6, {"model": {"w": torch.ones(2)}}, state)
    plateau, cosine = OptimConfig(schedule="plateau"), OptimConfig(schedule="cosine")
    for old, new, factor in ((plateau, plateau, 0.01), (plateau, cosine, 1.0), (cosine, plateau, 1.0)):
        carried = begun_anew(saved, old, new).state
        assert carried["plateau"] == {"factor": factor, "best": None, "bad_evaluations": 0}
        assert (carried["best_value"], carried["bad_evaluations"], carried["is_best"]) == (None, 0, False)
        assert carried["judged_step"] == 6
    assert saved.state["best_value"] == [0.9, -0.1]


def test_an_average_that_is_new_begins_with_the_weights_and_one_left_out_is_dropped(first, digits, tmp_path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    argv = [*LONGER, "--optim.ema_decay"]
    assert run_training(tiny_run(digits, plain, *argv, "0", "--train.max_steps", "7", "--from", str(first))) == 0
    assert not list(plain.glob("checkpoints/*/ema.safetensors"))
    assert run_training(tiny_run(digits, averaged, *argv, "0.5", "--train.max_steps", "8", "--from", str(plain))) == 0
    begun, later = (load_checkpoint(averaged / f"checkpoints/step-0000000{step}").tensors for step in (7, 8))
    assert all(torch.equal(begun["ema"][name], t.to(begun["ema"][name].dtype)) for name, t in begun["model"].items())
    for name, t in later["model"].items():
        if t.is_floating_point():  # the first update keeps a tenth
            assert torch.allclose(later["ema"][name], 0.1 * begun["model"][name] + 0.9 * t, atol=1e-6)


@pytest.mark.two_process
def test_several_ranks_begin_together(first, straight, digits, tmp_path):
    run = tmp_path / "run"
    run_to_end(2, tiny_run(digits, run, *LONGER, "--train.max_steps", "8", "--from", str(first)), tmp_path)
    ours, theirs = (lines_of(path, "train")[6:8] for path in (run, straight))
    assert [line["step"] for line in ours] == [7, 8]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-2)
