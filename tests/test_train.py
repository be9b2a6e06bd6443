"""Training as a user starts it: figures, exact resume, the same curve on one rank and on two, faults that are named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import (  # isort: skip
    ROOT, figures, finish_ranks, lines_of, logs, losses, reach, run_ranks, run_to_end, same_tensors, sharded, start_ranks, tiny_run,
    train_in_turns, train_tiny, wait_for,
)  # fmt: skip
from safetensors.torch import load_file

from dist_train import runtime
from dist_train import train as training
from dist_train.config import AugmentConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from dist_train.errors import UserError
from dist_train.folds import fold_view
from dist_train.index import load_index, save_index, save_table
from dist_train.predict import eval_main, load_run
from dist_train.predict import main as predict_main
from dist_train.run import Run
from dist_train.run_folder import written_settings
from dist_train.settings import read_config
from dist_train.sizes import (
    check_new,
    check_sizes,
    config_warnings,
    micro_batch_size,
    on_device_augment,
    split_warnings,
    whole_steps,
)  # fmt: skip
from dist_train.train import its_time, parse, run_training
from dist_train.watch import EXIT_LOST_RANK

LONGER = ("--train.epochs", "4")  # so that a run is still under way when it is killed


@pytest.fixture(scope="module")
def calm(digits, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    return train_tiny(digits, tmp_path_factory.mktemp("runs") / "calm", *LONGER)


def test_a_run_learns_and_leaves_all_that_is_needed(calm):
    assert {p.name for p in calm.iterdir()} >= {
        "config.yaml", "environment.json", "metrics.jsonl", "weights.safetensors", "inference.json", "result.json",
        "evaluation-val.json", "evaluation-test.json", "checkpoints"}  # fmt: skip
    curve = losses(calm)
    assert sum(curve[-5:]) / 5 < 0.95 * sum(curve[:5]) / 5
    result = json.loads((calm / "result.json").read_text())
    assert result["test"]["top1"] > 0.2 and result["test"]["samples"] > 100


def test_resuming_after_a_kill_gives_the_same_bits(calm, digits, tmp_path):
    run = tmp_path / "killed"
    argv = tiny_run(digits, run, *LONGER, "--train.checkpoint_every_steps", "4", "--resume")
    for steps_before_kill in (5, 14):
        (rank,) = start_ranks(1, argv, tmp_path)
        reach(run, steps_before_kill, rank)
        rank.send_signal(signal.SIGKILL)
        assert rank.wait() == -signal.SIGKILL
    assert run_training(argv) == 0
    assert same_tensors(calm, run)
    assert figures(run) == figures(calm)


def test_a_run_says_where_it_goes_on_and_how_long_it_took(digits, tmp_path, capsys):
    run = tmp_path / "run"
    argv = tiny_run(digits, run, "--train.epochs", "0.2", "--resume")
    assert run_training([*argv, "--train.max_steps", "2"]) == 0
    assert f"{run}: no checkpoint to go on from: begins at step 0\n" in capsys.readouterr().out
    assert run_training(argv) == 0
    told = capsys.readouterr().out
    assert f"{run}: goes on from step 2 of 3 (checkpoints/step-00000002)\n" in told
    assert re.search(r"run: done after 3 steps, \d+ s since this start, set-up included\n", told)
    one = tiny_run(digits, tmp_path / "one", "--train.epochs", "0.01")
    assert run_training(one) == 0
    told = capsys.readouterr().out
    assert "goes on from" not in told and "begins at" not in told
    assert re.search(r"one: done after 1 step, \d+ s since the start, set-up included\n", told)


def test_muon_resumes_with_the_same_bits(digits, tmp_path):
    argv, whole, parts = ["--optim.name", "muon", "--train.max_steps", "6"], tmp_path / "whole", tmp_path / "parts"
    assert run_training(tiny_run(digits, whole, *argv)) == 0
    for last in ("3", "6"):
        assert run_training(tiny_run(digits, parts, *argv, "--train.max_steps", last, "--resume")) == 0
    assert len(losses(whole)) == 6 and figures(parts) == figures(whole)


def test_muon_with_what_it_cannot_do_is_refused(digits):
    config, index = read_config(RunConfig, ["--optim.name", "muon", "--train.precision", "fp16"], ""), load_index(digits)
    with pytest.raises(UserError, match="optim.name is muon and train.precision fp16"):
        check_sizes(config, index, runtime.World(0, 1, 0, 1, None))
    config = read_config(RunConfig, ["--optim.name", "muon", "--train.parallel", "hybrid"], "")
    with pytest.raises(UserError, match="optim.name is muon and train.parallel hybrid"):
        check_sizes(config, index, runtime.World(0, 2, 0, 2, None))


def test_frozen_layers_of_a_network_that_is_split_are_refused(digits):
    argv = ["--model.pretrained", "w.pth", "--optim.freeze_epochs", "1", "--train.parallel", "fsdp"]
    with pytest.raises(UserError, match="optim.freeze_epochs is 1.0 and train.parallel fsdp"):
        check_sizes(read_config(RunConfig, argv, ""), load_index(digits), runtime.World(0, 2, 0, 2, None))


def test_a_table_needs_the_mlp(digits):
    table = replace(load_index(digits), features=["x"], image_size=None)
    with pytest.raises(UserError, match="is a table, so model.name must be mlp, not vgg13"):
        check_sizes(read_config(RunConfig, ["--model.name", "vgg13"], ""), table, runtime.World(0, 1, 0, 1, None))


@pytest.mark.two_process
def test_two_processes_give_the_curve_of_one(digits, tmp_path):
    # BatchNorm, dropout and augmentation included: statistics are global, masks and pixels are keyed
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--train.epochs", "4", "--train.max_steps", "50", "--optim.lr", "0.004"]  # above, rounding grows to chaos
    run_to_end(2, tiny_run(digits, two, *more), tmp_path)
    assert (tmp_path / "rank1.log").read_text() == ""  # rank zero speaks
    assert run_training(tiny_run(digits, one, *more)) == 0
    assert len(losses(one)) == 50
    assert max(abs(a - b) for a, b in zip(losses(one), losses(two), strict=True)) < 1e-3
    evals = [lines_of(run, "eval") for run in (one, two)]
    assert [e["step"] for e in evals[0]] == [e["step"] for e in evals[1]] != []
    for a, b in zip(*evals, strict=True):
        assert abs(a["top1"] - b["top1"]) < 0.02 and abs(a["loss"] - b["loss"]) < 1e-2

    # the same weights count the same on any number of ranks
    run = train_tiny(digits, two, "--train.epochs", "4", "--optim.lr", "0.004", "--resume")
    mistakes = worst_mistakes(run)
    (run / "evaluation-test.json").unlink()
    argv = [str(run), "--split", "test", "--json"]
    run_to_end(2, ["eval", *argv], tmp_path, module="dist_train")
    on_two = json.loads((tmp_path / "rank0.log").read_text().splitlines()[-1])
    result = json.loads((two / "result.json").read_text())["test"]
    assert (on_two["samples"], on_two["top1"]) == (result["samples"], result["top1"])
    assert on_two["loss"] == pytest.approx(result["loss"], abs=1e-6)
    assert (tmp_path / "rank1.log").read_text() == ""
    assert worst_mistakes(run) == mistakes
    assert min(mistakes) < result["samples"] // 2 < max(mistakes)  # of both ranks' shares


def worst_mistakes(run: Path) -> list[int]:
    return sorted(row["sample"] for row in json.loads((run / "evaluation-test.json").read_text())["mistakes"])


@pytest.mark.two_process
def test_the_local_launcher_trains_on_two_processes(digits, tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    settings = tiny_run(digits, tmp_path / "run", "--train.epochs", "0.2")
    command = ["launch/local.sh", "--cpu", "2", str(tmp_path / "recipe.yaml"), *settings]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["step"] == 3
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2


@pytest.mark.two_process
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_with_statistics_of_their_own_judge_and_resume_as_if_never_stopped(digits, tmp_path, parallel):
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    more = ["--train.sync_batchnorm", "false", "--train.log_every_steps", "4",
            "--train.eval_every_epochs", "0.53", "--optim.lr", "0.004", "--resume"]  # evaluated in step 8
    for run, plan in ((straight, f"2:8:{parallel}"), (halted, f"2:6:{parallel} 2:8:{parallel}")):
        train_in_turns(plan, tiny_run(digits, run, *more), tmp_path)
    ours, theirs = figures(halted), figures(straight)
    assert [line["kind"] for line in theirs] == ["train", "train", "eval"]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=2e-6)
    assert same_tensors(*(run / "checkpoints/step-00000008/model.safetensors" for run in (straight, halted)))


def test_micro_batches_give_the_same_curve(digits, tmp_path):
    # without BatchNorm, whose statistics are those of what goes through at once
    argv = ["--model.name", "alexnet", "--train.max_steps", "6", "--optim.lr", "0.01"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_training(tiny_run(digits, whole, *argv)) == run_training(
        tiny_run(digits, parts, *argv, "--train.micro_batch_size", "32")) == 0  # fmt: skip
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-4)


def test_a_stop_file_saves_and_the_run_goes_on_from_there(calm, digits, tmp_path):
    run = tmp_path / "stopped"
    argv = tiny_run(digits, run, *LONGER)
    ranks = start_ranks(1, argv, tmp_path)
    # from there on the request counts, and the first step looks for it
    wait_for((run / "config.yaml").exists, lambda: f"the run's settings\n{logs(tmp_path)}", 120, 0.002, ranks)
    (run / "stop").touch()
    assert finish_ranks(ranks, tmp_path) == [runtime.EXIT_STOPPED], (tmp_path / "rank0.log").read_text()
    assert not (run / "result.json").exists()
    assert run_training([*argv, "--resume"]) == 0
    assert figures(run) == figures(calm)


@pytest.mark.parametrize("every, advice", [("1", "--run runs/NEW --from "), ("0", r"Begin another run \(--run\) with a lower")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoiled(digits, tmp_path, every, advice):
    run = tmp_path / "wild"
    with pytest.raises(UserError, match=rf"(?s)step \d+: the loss is not finite .* the weights were not changed.*{advice}"):
        run_training(tiny_run(digits, run, "--optim.lr", "1e25", "--train.checkpoint_every_steps", every))
    saved = [load_file(path) for path in (run / "checkpoints").glob("step-*/model.safetensors")]
    assert bool(saved) == (every == "1") and not any(torch.isnan(t).any() for tensors in saved for t in tensors.values())


def test_patience_ends_a_run_early(digits, tmp_path):
    run = tmp_path / "patient"
    argv = ["--train.epochs", "50", "--train.patience", "1", "--train.eval_every_epochs", "0.2", "--optim.lr", "1e-9"]
    assert run_training(tiny_run(digits, run, *argv)) == 0
    assert json.loads((run / "result.json").read_text())["epoch"] < 5


def test_a_folder_of_another_run_is_refused_and_left_alone(calm, digits):
    before = (calm / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"optim.lr: 0.02 in the run, 0.5 now"):
        run_training(tiny_run(digits, calm, *LONGER, "--optim.lr", "0.5", "--resume"))
    with pytest.raises(UserError, match="already holds this run. Go on with --resume"):
        run_training(tiny_run(digits, calm, *LONGER))
    assert (calm / "config.yaml").read_text() == before


def test_a_start_that_failed_leaves_the_folder_to_another(digits, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="absent.pth"):
        run_training(tiny_run(digits, run, "--model.pretrained", "absent.pth"))
    assert (run / "config.yaml").exists()
    (run / "metrics.jsonl").touch()  # as one leaves that ends in its first step
    (run / "wandb-id").write_text("abcd")
    assert run_training(tiny_run(digits, run, "--optim.lr", "0.5")) == 0
    assert "0.5" in (run / "config.yaml").read_text() and "absent" not in (run / "config.yaml").read_text()
    assert not (run / "wandb-id").exists() or (run / "wandb-id").read_text() != "abcd"
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="optim.lr: 0.5 in the run"):  # its weights are there
        run_training(tiny_run(digits, run, "--optim.lr", "0.25"))


def test_resuming_a_finished_run_changes_nothing(calm, digits):
    before = (calm / "weights.safetensors").read_bytes()
    assert run_training(tiny_run(digits, calm, *LONGER, "--resume")) == 0
    assert (calm / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_table_with_a_flipped_bit_is_not_trained_on(digits, tmp_path, split):
    damaged = tmp_path / "digits"
    shutil.copytree(digits, damaged)
    table = np.load(damaged / f"{split}.samples.npy")
    table["label"][3] ^= 1
    np.save(damaged / f"{split}.samples.npy", table)
    with pytest.raises(UserError, match=f"(?s){split}.samples.npy: its checksum differs from the index.*dist-train verify"):
        run_training(tiny_run(str(damaged), tmp_path / "run"))


@pytest.mark.parametrize("other_in", ["all", "train", "val"])
def test_a_run_does_not_go_on_with_other_shards(digits, tmp_path, other_in):
    run, other = tmp_path / "run", tmp_path / "other"
    assert run_training(tiny_run(digits, run, "--train.max_steps", "3")) == 0
    if other_in == "all":
        sharded(other, "--source", "sklearn", "--dataset", "digits", "--seed", "1")
        what = "split train, split val"
    else:  # the same tars, and another label in the table
        shutil.copytree(digits, other)
        index, what = load_index(other), f"split {other_in}"
        split = index.split(other_in)
        rows = np.array(split.table())
        rows["label"][0] = (rows["label"][0] + 1) % 10
        checksum = save_table(other, other_in, rows, split.names())
        save_index(replace(index, splits=index.splits | {other_in: replace(split, table_checksum=checksum)}))
    saved = sorted((run / "checkpoints").iterdir())
    with pytest.raises(UserError, match=f"{other}: these are not the shards that {run} was trained on: other {what}\\."):
        run_training(tiny_run(str(other), run, "--train.max_steps", "6", "--resume"))
    assert sorted((run / "checkpoints").iterdir()) == saved
    assert run_training(tiny_run(digits, run, "--train.max_steps", "4", "--resume")) == 0


@pytest.mark.parametrize("content", ["", "data: {shards: [", "- a list"])
def test_a_damaged_config_of_a_run_is_named(calm, digits, tmp_path, content):
    run = tmp_path / "run"
    shutil.copytree(calm, run)
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="(?s)config.yaml: .*Put back the settings"):
        run_training(tiny_run(digits, run, "--resume"))


@pytest.mark.parametrize("name, value", [
    ("train.micro_batch_size", "-1"), ("optim.momentum", "1.5"), ("optim.clip_norm", "-1"), ("optim.weight_decay", "-1"),
    ("optim.ema_decay", "1.5"), ("optim.label_smoothing", "2"), ("model.dropout", "2"), ("model.drop_path", "1"),
    ("runtime.timeout_s", "0"), ("data.eval_crop", "-1"), ("train.max_steps", "-3"), ("model.width", "0"),
    ("data.val_split", "vall"),
])  # fmt: skip
def test_a_setting_out_of_its_range_is_named(digits, tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} is '?{value}"):
        run_training(tiny_run(digits, tmp_path / "run", f"--{name}", value, "--augment.mixup", "0.2"))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_compiled_training_gives_the_curve_of_one_that_is_not(digits, tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    more = ["--train.max_steps", "8", "--optim.lr", "0.004", "--augment.mixup", "0.2"]
    assert run_training(tiny_run(digits, plain, *more)) == 0
    assert run_training(tiny_run(digits, compiled, *more, "--train.compile", "true")) == 0
    assert torch._dynamo.config.recompile_limit >= 16  # eight sizes of pictures that grow, with frozen layers and without
    assert max(abs(a - b) for a, b in zip(losses(plain), losses(compiled), strict=True)) < 1e-3


TOO_LARGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB."


def test_a_run_without_room_for_its_samples_goes_on_with_fewer_at_once(digits, tmp_path, monkeypatch):
    run, forward_backward = tmp_path / "run", training.forward_backward

    def in_little_memory(run, batch):
        if batch.step == 2 and run.micro_batch_size > 48:
            raise torch.OutOfMemoryError(TOO_LARGE)
        return forward_backward(run, batch)

    monkeypatch.setattr(training, "forward_backward", in_little_memory)
    argv = tiny_run(digits, run, "--train.max_steps", "4", "--train.checkpoint_every_steps", "1")
    expected = (r"device of rank 0 \(cpu\) has no room for 96 samples at once: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
                r"  Go on with --resume --train.micro_batch_size 48\.")  # fmt: skip
    with pytest.raises(UserError, match=expected):
        run_training(argv)
    assert len(losses(run)) == 2
    assert run_training([*argv, "--resume", "--train.micro_batch_size", "48"]) == 0
    assert [line["step"] for line in figures(run)] == [1, 2, 3, 4]
    assert written_settings(run).train.micro_batch_size == 48


@pytest.mark.parametrize("at_once, mixup, graphs, advice", [
    (96, "0", False, "micro_batch_size 48"), (3, "0", False, "micro_batch_size 1"), (1, "0", False, "Fewer do not"),
    (2, "0.2", False, "Fewer do not"), (96, "0", True, "Fewer do not"),  # CUDA graphs take no parts
])  # fmt: skip
def test_the_next_smaller_part_is_named_while_there_is_one(at_once, mixup, graphs, advice):
    config = read_config(RunConfig, ["--data.global_batch_size", "96", "--augment.mixup", mixup], "")
    run = SimpleNamespace(config=config, micro_batch_size=at_once, world=runtime.World(0, 1, 0, 1, torch.device("cpu")),
                          parallel=SimpleNamespace(replays_graphs=graphs))  # fmt: skip
    assert advice in str(Run.lacks_memory(run, torch.OutOfMemoryError(TOO_LARGE)))


LITTLE_MEMORY = f"""
import sys
import torch
from dist_train import cli, train

forward_backward = train.forward_backward

def in_little_memory(run, batch):
    if run.world.rank == 1 and batch.step == 2:
        raise torch.OutOfMemoryError("{TOO_LARGE}")
    return forward_backward(run, batch)

train.forward_backward = in_little_memory
sys.exit(cli.run_command(train.run_training, sys.argv[1:]))
"""


@pytest.mark.two_process
def test_a_rank_without_room_ends_the_others_with_its_name(digits, tmp_path):
    argv = tiny_run(digits, tmp_path / "run", "--runtime.timeout_s", "10")
    codes, logs = run_ranks(2, argv, tmp_path, LITTLE_MEMORY)
    assert codes == [EXIT_LOST_RANK, 2], logs
    assert all("the device of rank 1 (cpu:0) has no room for 48 samples at once" in log for log in logs), logs
    assert all("--resume --train.micro_batch_size 24" in log and "Traceback" not in log for log in logs), logs


def test_graphs_of_several_micro_batches_are_refused(digits, tmp_path):
    argv = ["--train.compile", "true", "--train.compile_mode", "reduce-overhead", "--train.micro_batch_size", "32"]
    with pytest.raises(UserError, match="compile_mode is reduce-overhead, whose graphs write the gradients"):
        run_training(tiny_run(digits, tmp_path / "run", *argv))


def test_what_goes_by_validation_needs_some(digits, tmp_path):
    argv = ["--data.val_split", "", "--train.patience", "3", "--optim.schedule", "plateau"]
    with pytest.raises(UserError, match="optim.schedule plateau and train.patience 3 go by the validation split"):
        run_training(tiny_run(digits, tmp_path / "run", *argv))


@pytest.mark.parametrize("name, value, setting", [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "micro_batch_size"), ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "compile"),
])  # fmt: skip
def test_what_a_launcher_would_change_behind_the_recipe_is_refused(digits, tmp_path, monkeypatch, name, value, setting):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"(?s){name} to {value}.*train.{setting} in the recipe"):
        run_training(tiny_run(digits, tmp_path / "run"))


def test_a_run_folder_that_cannot_be_made_is_named(digits, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run: cannot write the run folder: Not a directory"):
        run_training(tiny_run(digits, tmp_path / "file" / "run"))


def test_faults_of_the_set_up_are_named_together(digits, tmp_path):
    with pytest.raises(UserError) as error:
        run_training(tiny_run(digits, tmp_path / "x", "--optim.lr", "-1", "--train.epochs", "0", "--model.name", "mlp",
                              "--train.shift_test", "9"))  # fmt: skip
    assert "optim.lr is -1.0" in str(error.value)
    assert "train.shift_test is 9; expected pixels, 0 to half" in str(error.value)
    assert "train.epochs is 0.0" in str(error.value)
    assert "model.name mlp is for tables" in str(error.value)


def test_the_command_line_names_the_run_folder():
    config, folder, resume = parse(["--config", "recipes/digits-alexnet.yaml", "--resume", "--seed", "3"])
    assert (folder, resume, config.seed) == (Path("runs/digits-alexnet"), True, 3)
    assert parse(["--data.shards", "shards/x"])[1] == Path("runs/x")
    assert parse(["--data.shards", "x", "--run=elsewhere"])[1] == Path("elsewhere")
    with pytest.raises(UserError, match="data.shards is not set"):
        parse([])


@pytest.mark.parametrize("batch, world_size, limit, expected", [
    (96, 1, 0, 96), (96, 2, 0, 48), (96, 1, 50, 48), (96, 2, 20, 16), (7, 1, 3, 1), (96, 4, 24, 24),
])  # fmt: skip
def test_micro_batches_are_equal_parts(batch, world_size, limit, expected):
    argv = ["--data.global_batch_size", str(batch), "--train.micro_batch_size", str(limit)]
    assert micro_batch_size(read_config(RunConfig, argv, ""), world_size) == expected


def test_micro_batches_are_even_where_neighbours_are_mixed():
    argv = ["--data.global_batch_size", "18", "--train.micro_batch_size", "4", "--augment.mixup", "1"]
    assert micro_batch_size(read_config(RunConfig, argv, ""), 3) == 2
    assert micro_batch_size(read_config(RunConfig, argv[:4], ""), 3) == 3


def test_its_time():
    assert [step for step in range(1, 10) if its_time(step, 3)] == [3, 6, 9]
    assert not its_time(5, 0)


def test_eval_and_predict_agree_with_the_run(calm, digits, tmp_path, capsys):
    eval_main([str(calm), "--split", "test", "--json"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((calm / "result.json").read_text())["test"]
    assert line == {"split": "test", **result}

    from dist_train.index import load_index
    from dist_train.store import Store

    store = Store(load_index(digits).split("test"))
    for sample in range(20):
        (tmp_path / f"{sample:02d}.png").write_bytes(store.payload(sample))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    assert predict_main([str(calm), str(tmp_path), "--json"]) == 2  # one could not be read
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert sum("error" in row for row in rows) == 1
    good = [row for row in rows if "class" in row]
    assert [Path(row["path"]).name for row in good] == [f"{i:02d}.png" for i in range(20)]
    assert all(len(row["top"]) == 5 and row["top"][0]["probability"] >= row["top"][1]["probability"] for row in good)
    mistakes = {m["sample"] for m in json.loads((calm / "evaluation-test.json").read_text())["mistakes"]}
    labels = store.table["label"][:20]
    classes = load_index(digits).classes
    if len(mistakes) < 64:  # else the list is cut, and absence says nothing
        for i, row in enumerate(good):
            assert (row["class"] != classes[labels[i]]) == (i in mistakes)


def test_eval_names_a_shift_that_leaves_the_picture(calm):
    with pytest.raises(UserError, match="train.shift_test is 99; expected pixels, 0 to half"):
        eval_main([str(calm), "--split", "test", "--train.shift_test", "99"])


def test_an_unfinished_run_is_no_model(tmp_path):
    with pytest.raises(UserError, match="there is no such run folder"):
        load_run(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="not a finished run: it has no inference.json"):
        load_run(tmp_path)


def test_tars_made_by_webdataset_are_indexed_and_train(tmp_path, capsys):
    import io

    import numpy as np
    import webdataset
    from PIL import Image

    from dist_train import foreign

    draw = np.random.default_rng(0)
    folder = tmp_path / "theirs"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/train-%04d.tar", maxcount=16, verbose=0) as writer:
        for i in range(48):  # pictures of many sizes, bright ones and dark ones
            height, width = draw.integers(20, 60, 2)
            pixels = draw.integers(0, 100, (height, width, 3)) + 150 * (i % 2)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
            writer.write({"__key__": f"their/{i:04d}", "jpg": buffer.getvalue(), "cls": i % 2})
    foreign.main([str(folder)])
    run = tmp_path / "run"
    argv = ["--augment.crop", "random_resized", "--data.global_batch_size", "16", "--train.epochs", "8", "--optim.lr", "0.01"]
    assert run_training(tiny_run(str(folder), run, *argv)) == 0  # without val and test splits, too
    expected = (f"{folder} has no split val: nothing is evaluated, and the last weights are kept. "
                "data.folds makes one: --data.folds 5 keeps back a fifth of train.")  # fmt: skip
    assert expected in capsys.readouterr().out
    curve = losses(run)
    assert sum(curve[-4:]) < sum(curve[:4])
    predict_main([str(run), str(_first_picture(folder, tmp_path)), "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["class"] in ("0", "1") and len(row["top"]) == 2


def _first_picture(folder: Path, out: Path) -> Path:
    from dist_train.index import load_index
    from dist_train.store import Store

    path = out / "picture.jpg"
    path.write_bytes(Store(load_index(folder).split("train")).payload(0))
    return path


@pytest.mark.parametrize("epochs, samples, batch, steps", [
    (30.0, 25, 3, 250), (54.0, 14, 6, 126), (1.1, 10, 1, 11), (0.7, 10, 1, 7), (2.5, 10, 4, 7), (0.01, 100, 64, 1), (0.0, 9, 2, 0),
])  # fmt: skip
def test_a_run_has_no_step_more_than_its_epochs_take(epochs, samples, batch, steps):
    assert whole_steps(epochs, samples, batch) == steps


def test_settings_that_change_nothing_are_refused_and_rarely_meant_ones_are_told():
    def problems(**sections):
        config = RunConfig(**{name: type(getattr(RunConfig(), name))(**values) for name, values in sections.items()})
        with pytest.raises(UserError) as caught:
            check_new(config)
        return str(caught.value)

    assert "model.width 0.5: resnet18 has no such setting" in problems(model={"name": "resnet18", "width": 0.5})
    assert "model.batchnorm True: vgg16 has no such setting" in problems(model={"name": "vgg16", "batchnorm": True})
    assert "train.patience 3 go by evaluations" in problems(train={"patience": 3, "eval_every_epochs": 0})
    config = RunConfig(optim=OptimConfig(warmup_epochs=5), train=TrainConfig(epochs=5, micro_batch_size=32))
    told = config_warnings(config, 2, torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    assert "rises to the end" in told[0] and "BatchNorm sees 64 samples at once" in told[1]
    assert config_warnings(RunConfig(), 2, torch.nn.Sequential(torch.nn.BatchNorm2d(3))) == []
    config = RunConfig(data=DataConfig(global_batch_size=254), train=TrainConfig(micro_batch_size=64))
    assert "largest equal part of a rank's 127 samples below it is 1" in config_warnings(config, 2, torch.nn.ReLU())[0]


def test_a_set_without_validation_is_told_of_unless_none_is_wanted(digits):
    index = load_index(digits)
    without = replace(index, splits={name: split for name, split in index.splits.items() if name != "val"})
    assert "has no split val: nothing is evaluated before the end, and" in split_warnings(RunConfig(), without)[0]
    assert split_warnings(RunConfig(), index) == []
    none_wanted = RunConfig(data=DataConfig(val_split="none"))
    assert split_warnings(none_wanted, without) == []
    train_alone = replace(index, splits={"train": index.split("train")})
    told = f"{digits} has no split test, and data.val_split is none: nothing is evaluated."
    assert split_warnings(none_wanted, train_alone) == [told]
    folds = RunConfig(data=DataConfig(shards=digits, folds=5))
    assert split_warnings(folds, fold_view(without, folds)) == []


def test_a_batch_larger_than_the_training_split_is_told_of_before_the_first_step(digits, tmp_path, capsys):
    index = load_index(digits)
    num_samples = index.split("train").num_samples
    told = f"is more than the {num_samples} training samples: a step holds each of them about 2 times."
    config = RunConfig(data=DataConfig(global_batch_size=2 * num_samples))
    assert split_warnings(config, index) == [f"data.global_batch_size {2 * num_samples} {told}"]
    assert split_warnings(RunConfig(data=DataConfig(global_batch_size=num_samples)), index) == []
    argv = tiny_run(digits, tmp_path / "run", "--data.global_batch_size", str(2 * num_samples), "--train.max_steps", "1")
    assert run_training(argv) == 0
    out = capsys.readouterr().out
    assert 0 < out.index(told) < out.index("train step 1")


def test_padded_crops_stay_beside_boxes_cut_while_decoding(digits):
    def left(decoded):
        configs = (RunConfig(data=DataConfig(crop=decoded), augment=AugmentConfig(crop=crop, flip=0.5)) for crop in
                   ("padded", "random_resized"))  # fmt: skip
        found = [on_device_augment(config, load_index(digits)) for config in configs]
        assert all(augment.flip == 0.5 for augment in found)
        return [augment.crop for augment in found]

    assert left("random_resized") == ["padded", "none"]
    assert left("resize") == ["padded", "random_resized"]
