"""Studies: settings are checked first, trials are those a plain training gives, nothing is lost or done twice."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import lines_of, wait_for

from dist_train import decoder_choice, runtime
from dist_train import trial as one_trial
from dist_train.checkpoint import Saved
from dist_train.compare import grouped, read_all
from dist_train.config import DataConfig, RunConfig, StudyConfig
from dist_train.errors import UserError
from dist_train.index import load_index, save_index
from dist_train.journal import counted_trials
from dist_train.metrics import EvalResult, goodness
from dist_train.report import write_report
from dist_train.search import Space
from dist_train.settings import read_config, setting_names
from dist_train.study import claimed_trial, locked, main, open_study, queue_abandoned, read_plan
from dist_train.study_report import Cut, Row, importance, mean_curve, setting_field, trial_table, variant_bars
from dist_train.train import run_training
from dist_train.trial import best_line, mean_figures

RECIPE = {
    "data": {"global_batch_size": 64, "threads": 1},
    "model": {"name": "mlp", "hidden": [16], "dropout": 0.2, "batchnorm": True},
    "optim": {"name": "adam", "lr": 0.01, "weight_decay": 0.0},
    "train": {"epochs": 2.0},
    "runtime": {"threads": 1},
    "track": {"wandb": "off"},
}


@pytest.fixture
def write_study(table, tmp_path, monkeypatch):
    """Write a recipe and a study of it into an empty working directory; returns the study's path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"shards": table}}))

    def write(study: dict, name: str = "tune", **parts) -> str:
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"study": {"recipe": "base.yaml", **study}, **parts}))
        return f"{name}.yaml"

    return write


def trials_of(path: str, state: str = "COMPLETE") -> list:
    study = open_study(read_plan([path]))
    return [t for t in study.get_trials() if t.state.name == state and "abandoned" not in t.user_attrs]


def start_study(path: str, **env: str) -> subprocess.Popen:
    source = str(Path(__file__).resolve().parents[1])
    with open(f"{path}-{time.monotonic_ns()}.log", "w") as log:
        return subprocess.Popen([sys.executable, "-m", "dist_train", "study", path], stdout=log, stderr=log,
                                env=os.environ | {"PYTHONPATH": source} | env)  # fmt: skip


def pretend(monkeypatch, values: dict[float, list[float]], places=(0.1, 0.3, 1.0)) -> None:
    """Let a trial of a rate report the accuracies given, at places of its first fold, in place of training."""

    def run_trial(config, folds, folder, watch, stop_requests):
        for place, top1 in zip(places, values[config.optim.lr], strict=True):
            watch(place, {"top1": top1, "loss": 1 - top1})
        figures = {"top1": values[config.optim.lr][-1], "loss": 0.5}
        return [{**figures, "best_epoch": 1.0, "train_s": 1.0}]

    monkeypatch.setattr(one_trial, "run_trial", run_trial)


def test_a_grid_trains_every_combination_once_and_writes_what_it_found(write_study, capsys):
    path = write_study({"sampler": "grid", "folds": 3}, search={"model.hidden": [[8], [16, 8]]},
                       variants={"base": {}, "sgd": {"optim.name": "sgd", "optim.lr": 0.05}})  # fmt: skip
    assert main([path]) == 0
    trials = trials_of(path)
    assert sorted((t.params["variant"], t.params["model.hidden"]) for t in trials) == [
        ("base", "[16, 8]"), ("base", "[8]"), ("sgd", "[16, 8]"), ("sgd", "[8]")]  # fmt: skip
    num_rows = 370
    for trial in trials:
        assert sum(fold["samples"] for fold in trial.user_attrs["folds"]) > 0.9 * num_rows
        assert trial.value == pytest.approx(mean_figures(trial.user_attrs["folds"])["top1"])
    best = max(trials, key=lambda t: t.value)
    config = read_config(RunConfig, [], "train", ["runs/tune/best.yaml"])
    assert json.dumps(list(config.model.hidden)) == best.params["model.hidden"] and config.data.folds == 0
    assert (config.optim.name == "sgd") == (best.params["variant"] == "sgd")
    assert f"{best.value:.2%}" in Path("runs/tune/best.yaml").read_text()
    page = Path("runs/tune/report.html").read_text()
    assert page.count("<svg") >= 4 and "Importance" in page and "Training time" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    told = capsys.readouterr().out
    assert f"{best.value:.2%}" in told and "4 finished" in told
    assert main([path]) == 0 and "0 trials done here" in capsys.readouterr().out
    assert len(trials_of(path)) == 4


def test_a_trial_is_what_a_plain_training_of_that_fold_gives(write_study, tmp_path):
    # the second and third training of the process: nothing of the first is left in it
    path = write_study({"sampler": "grid", "folds": 2}, search={"optim.lr": [0.003, 0.01]})
    assert main([path]) == 0
    trial = trials_of(path)[1]
    argv = ["--config", "base.yaml", "--optim.lr", str(trial.params["optim.lr"]), "--data.folds", "2", "--data.fold", "1"]
    assert run_training([*argv, "--run", str(tmp_path / "plain")]) == 0
    best = best_line([line for line in lines_of(tmp_path / "plain", "eval") if line["split"] == "val"], "top1")
    fold = trial.user_attrs["folds"][1]
    assert (fold["top1"], fold["loss"], fold["best_epoch"]) == (best["top1"], best["loss"], best["epoch"])


def test_a_draw_depends_on_its_number_alone(write_study):
    path = write_study({"sampler": "random", "trials": 3, "prune": False}, search={
        "optim.lr": {"low": 0.001, "high": 0.1, "log": True}, "model.dropout": {"low": 0.0, "high": 0.5, "step": 0.25},
        "data.global_batch_size": {"low": 32, "high": 64}})  # fmt: skip
    assert main([path, "--trials", "2"]) == main([path, "--run", "runs/other"]) == main([path]) == 0
    drawn = [
        [t.params for t in open_study(read_plan([path, "--run", f"runs/{name}"])).get_trials()]
        for name in ("tune", "other")
    ]
    assert drawn[0] == drawn[1] and len({p["optim.lr"] for p in drawn[0]}) == 3
    for params in drawn[0]:
        assert 0.001 <= params["optim.lr"] <= 0.1 and params["model.dropout"] in (0.0, 0.25, 0.5)
        assert params["data.global_batch_size"] in range(32, 65) and type(params["data.global_batch_size"]) is int


def test_hopeless_trials_are_pruned_after_fewer_folds(write_study, capsys):
    rates = [0.01, 0.011, 0.012, 0.013, 0.014, 0.00001]
    path = write_study({"sampler": "grid", "folds": 3, "metric": "loss"}, search={"optim.lr": rates})
    assert main([path]) == 0
    (pruned,) = [t for t in trials_of(path, "PRUNED") if t.params["optim.lr"] == 0.00001]
    folder = Path("runs/tune", pruned.user_attrs["folder"])
    assert len(list(folder.glob("fold-*"))) < 3
    shown = f"pruned after {pruned.last_step / 100:g} folds"
    assert shown in Path("runs/tune/report.html").read_text() and shown in capsys.readouterr().out
    assert min(trials_of(path), key=lambda t: t.value).params["optim.lr"] != 0.00001


def test_settings_that_cannot_be_trained_are_named_and_the_study_goes_on(write_study):
    path = write_study({"sampler": "grid"}, search={"data.global_batch_size": [64, 0]})
    assert main([path]) == 0
    (failed,) = trials_of(path, "FAIL")
    assert "global_batch_size is 0" in failed.user_attrs["why"] and len(trials_of(path)) == 1
    assert "global_batch_size is 0" in Path("runs/tune/report.html").read_text()
    alone = write_study({"sampler": "grid"}, "alone", search={"data.global_batch_size": [0]})
    with pytest.raises(UserError, match="no trial could be trained"):
        main([alone])


def test_a_machine_that_trains_nothing_ends_its_process_and_costs_no_trial_a_try(write_study, monkeypatch):
    class OnAFullDisk(one_trial.Run):
        def __init__(self, *given):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/cache")

    rates = [0.01, 0.02, 0.03, 0.04]
    path = write_study({"sampler": "grid"}, search={"optim.lr": rates})
    with monkeypatch.context() as patched:
        patched.setattr(one_trial, "Run", OnAFullDisk)
        for _ in range(2):  # a cluster may send task after task to the node that is free so soon
            with pytest.raises(UserError, match="3 trials in a row have failed on (.|\n)*base.yaml as it (.|\n)*No space left"):
                main([path])
    waiting = trials_of(path, "WAITING")
    assert sorted(t.system_attrs["fixed_params"]["optim.lr"] for t in waiting) == rates
    assert {t.user_attrs.get("attempt", 1) for t in waiting} == {1}
    assert not list(Path("runs/tune").glob("control-*"))
    assert main([path]) == 0 and len(trials_of(path)) == 4


def test_a_value_that_cannot_be_trained_does_not_end_a_healthy_process(write_study, capsys):
    rates = [0.01, 0.02, 0.03, 0.04]
    path = write_study({"sampler": "grid", "folds": 2}, search={"data.global_batch_size": [0, 64], "optim.lr": rates})
    assert main([path]) == 0
    assert len(trials_of(path)) == 4
    assert capsys.readouterr().out.count("3 trials in a row have failed for their settings: base.yaml as it stands can be") == 1


def test_what_was_trained_before_is_the_proof_of_a_machine(write_study, table, capsys):
    path = write_study({"sampler": "grid"}, search={"data.global_batch_size": [64, 0], "optim.lr": [0.01, 0.02, 0.03]})
    Path("base.yaml").write_text(yaml.safe_dump(RECIPE | {"data": {"shards": table, "threads": 1, "global_batch_size": 0}}))
    assert main([path]) == 0
    assert "trial 2, which was trained before, can be trained here" in capsys.readouterr().out


def test_a_machine_that_cannot_write_a_checkpoint_is_found_out_in_a_step(write_study, tmp_path, monkeypatch):
    def full(*given, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dist_train.checkpoint.write_checkpoint", full)
    plan = read_plan([write_study({}, search={"optim.lr": [0.01]})])
    with contextlib.closing(runtime.StopRequests(tmp_path)) as requests:
        with pytest.raises(UserError, match="the checkpoint could not be written"):
            one_trial.try_out(plan.base, 0, tmp_path / "control", requests)


def test_the_decoders_are_measured_once_for_all_trials_that_cut_alike(tmp_path, monkeypatch):
    rates, gpu = [{"cpu": 100, "gpu": 200}, {"cpu": 100, "gpu": 90}], torch.device("cuda")
    monkeypatch.setattr(decoder_choice, "rates", lambda config, device, num_threads: rates.pop(0))
    monkeypatch.setattr(decoder_choice, "is_there", lambda: True)
    monkeypatch.setattr(one_trial, "_decoders", {})

    def settled(config, folder="new"):
        return one_trial.settle_decoder(config, tmp_path / folder, gpu, 4).data.decode

    first = RunConfig(data=DataConfig(shards="a"))
    alike = replace(first, optim=replace(first.optim, lr=1.0), data=replace(first.data, fold=2, global_batch_size=8))
    assert settled(first) == settled(alike) == "gpu" and len(rates) == 1
    assert settled(replace(first, augment=replace(first.augment, scale=(0.9, 1.0)))) == "cpu" and not rates
    assert settled(replace(first, data=replace(first.data, decode="cpu"))) == "cpu", "as asked"
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    (tmp_path / "begun/config.yaml").write_text(yaml.safe_dump({"data": {"decode": "cpu"}}))
    assert settled(first, "begun") == "cpu", "a training keeps what it began with"


def test_every_training_of_a_study_is_compiled_however_many_there_were():
    compiled = []

    def compiler(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for width in range(1, 11):  # torch takes eight networks through the same code
        one_trial.let_go_of_trainings()
        network = torch.nn.Sequential(torch.nn.Linear(width, 2))
        torch.compile(network, backend=compiler, dynamic=False)(torch.ones(3, width))
    assert len(compiled) == 10


def test_a_killed_study_goes_on_and_two_processes_share_it(write_study):
    rates = [round(0.004 + 0.001 * i, 3) for i in range(6)]
    path = write_study({"sampler": "grid", "folds": 3, "prune": False}, search={"optim.lr": rates})
    first = start_study(path)
    wait_for(lambda: list(Path("runs/tune").glob("trials/*/fold-1/metrics.jsonl")), "a second fold", 120, processes=[first])
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {p: p.read_text() for p in Path("runs/tune").glob("trials/*/fold-*/result.json")}
    assert kept
    both = [start_study(path), start_study(path)]
    assert [process.wait(120) for process in both] == [0, 0], [p.read_text() for p in Path().glob("*.log")]
    assert sorted(t.params["optim.lr"] for t in trials_of(path)) == rates
    assert all(p.read_text() == text for p, text in kept.items())  # finished folds were taken as they are
    retried = [t for t in trials_of(path) if t.user_attrs.get("attempt") == 2]
    assert len(retried) == 1 and len(list(Path("runs/tune/trials").iterdir())) == len(rates)


def test_a_grid_is_queued_whole_however_often_it_was_begun(write_study, monkeypatch):
    rates = [0.01, 0.02, 0.03, 0.04]
    path = write_study({"sampler": "grid"}, search={"optim.lr": rates})

    def queued() -> list:
        return sorted(t.system_attrs["fixed_params"]["optim.lr"] for t in trials_of(path, "WAITING"))

    open_study(read_plan([path, "--trials", "2"]))
    assert queued() == rates  # trials_of opens it without that limit
    assert queued() == rates
    other = write_study({"sampler": "grid"}, "other", search={"optim.lr": rates})
    with monkeypatch.context() as patched:
        patched.setattr("optuna.Study.enqueue_trial", lambda *more, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_study(read_plan([other]))
    assert len(trials_of(other, "WAITING")) == 4
    assert main([path, "--trials", "3"]) == 0 and main([path]) == 0
    assert sorted(t.params["optim.lr"] for t in trials_of(path)) == rates


def test_a_journal_cut_off_in_a_line_and_a_lock_left_behind_are_survived(write_study):
    path = write_study({"sampler": "random", "trials": 1}, search={"optim.lr": [0.01, 0.02]})
    assert main([path]) == 0
    journal = Path("runs/tune/journal.log")
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "worker_id": "torn')
    Path("runs/tune/journal.log.lock").symlink_to("nowhere")  # as a killed process of Optuna's own lock leaves it
    (trial,) = trials_of(path)
    assert trial.value > 0.5 and journal.read_bytes().startswith(whole) and b"torn" not in journal.read_bytes()
    Path("notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt: is no journal of a study"):
        open_study(read_plan([path, "--storage", "notes.txt", "--run", "runs/more"]))
    assert Path("notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be made the folder of a study"):
        open_study(read_plan([path, "--run", "notes.txt"]))


def test_what_stands_as_text_is_searched_as_what_it_means(write_study):
    path = write_study({}, search={"model.batchnorm": ["false", "true"], "data.global_batch_size": ["16", "32"],
                                   "optim.lr": {"low": "1e-3", "high": "1e-1"}})  # fmt: skip
    space = read_plan([path]).space
    assert list(space.choices["model.batchnorm"].values()) == [False, True]
    assert list(space.choices["data.global_batch_size"].values()) == [16, 32]
    assert space.ranges["optim.lr"] == {"low": 0.001, "high": 0.1}
    for search, complaint in (
        ({"train.monitor": ["top1", "loss"]}, "train.monitor cannot be searched"),
        ({"data.global_batch_size": {"low": 16, "high": 64.5}}, "expected whole numbers"),
        ({"train.patience": {"low": 2, "high": 10, "step": 2.5}}, "expected whole numbers"),
        ({"optim.lr": {"low": 0.1, "high": 1.0, "step": -0.1}}, "or a range such as"),
        ({"optim.lr": {"low": 0.1, "high": float("inf")}}, "or a range such as"),
        ({"optim.lr": {"low": 0.1, "high": 1.0, "step": "abc"}}, "or a range such as"),
        ({"model.hidden": [{"a": 1}]}, "expected a list of choices"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_plan([write_study({}, "faulty", search=search)])


def test_a_trial_that_takes_its_process_with_it_is_given_up(write_study):
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01]})
    plan = read_plan([path])
    study = open_study(plan)
    for _ in range(3):
        plan.space.draw(study.ask())  # and never told: as if the process were gone
        queue_abandoned(plan, study)
    assert {t.state.name for t in study.get_trials()} == {"FAIL"}
    (last,) = trials_of(path, "FAIL")
    assert last.user_attrs["why"] == "its process died 3 times"


def test_what_could_not_be_trained_is_tried_again_at_the_next_start(write_study):
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01]})
    plan = read_plan([path])
    for attempt in (1, 2, 3):
        study = open_study(plan)
        with claimed_trial(plan, study) as trial:
            assert trial.user_attrs.get("attempt", 1) == attempt and trial.params == {"optim.lr": 0.01}
            study.tell(trial, state=type(study.get_trials()[0].state).FAIL)  # its shards' server is away, say
        assert len(counted_trials(study)) == 1
    with claimed_trial(plan, open_study(plan)) as trial:
        assert trial is None  # it is the settings, then


def test_a_kill_while_a_trial_is_queued_anew_queues_it_once(write_study):
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01, 0.02]})
    plan = read_plan([path])
    study = open_study(plan)
    trial = study.ask()
    plan.space.draw(trial)
    trial.set_user_attr("abandoned", True)  # and killed before the rest
    study = open_study(plan)
    queue_abandoned(plan, study)
    queue_abandoned(plan, study)
    waiting = [t.system_attrs["fixed_params"]["optim.lr"] for t in study.get_trials() if t.state.name == "WAITING"]
    assert sorted(waiting) == [0.01, 0.02]


def test_a_stopped_study_says_so_and_queues_its_trial(write_study, monkeypatch):
    path = write_study({"sampler": "grid", "folds": 2}, search={"optim.lr": [0.01, 0.02]})

    def stop_at_once(run, state):
        run.stop_requests._note(signal.SIGTERM, None)
        state.step = 1

    with monkeypatch.context() as patched:
        patched.setattr(one_trial, "train", stop_at_once)
        assert main([path]) == runtime.EXIT_STOPPED
    assert len(trials_of(path, "WAITING")) == 2
    assert main([path]) == 0 and len(trials_of(path)) == 2


def test_a_stop_between_two_trainings_is_heard_and_costs_no_attempt(write_study, monkeypatch):
    path = write_study({"sampler": "grid", "folds": 2}, search={"optim.lr": [0.01]})
    before = signal.getsignal(signal.SIGUSR1)

    def slow_start(*given):
        os.kill(os.getpid(), signal.SIGUSR1)  # while shards are opened, say, before there is a training to stop
        return run(*given)

    class StoppedAtItsEnd(one_trial.Run):
        def close(self):
            os.kill(os.getpid(), signal.SIGUSR1)  # the training itself looks no more
            super().close()

    run = one_trial.Run
    for patch in (StoppedAtItsEnd, slow_start):
        with monkeypatch.context() as patched:
            patched.setattr(one_trial, "Run", patch)
            assert main([path]) == runtime.EXIT_STOPPED
    assert signal.getsignal(signal.SIGUSR1) == before
    (queued,) = trials_of(path, "WAITING")
    assert queued.user_attrs["attempt"] == 1
    plan = read_plan([path])
    with locked(plan.trial_folder(plan.trial_config({"optim.lr": 0.01})) / "lock"):  # another trains the same settings
        monkeypatch.setattr("time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGUSR1))
        assert main([path]) == runtime.EXIT_STOPPED
    assert len(trials_of(path, "WAITING")) == 1


def test_trials_are_not_pruned_in_their_warm_up(write_study, monkeypatch):
    values = {0.1 * k: [0.5, 0.6, 0.7] for k in range(1, 6)} | {7.0: [0.1, 0.65, 0.8], 8.0: [0.1, 0.1, 0.9]}
    pretend(monkeypatch, values)
    path = write_study({"sampler": "grid", "folds": 2}, search={"optim.lr": list(values)})
    assert main([path]) == 0
    assert [(t.params["optim.lr"], t.last_step) for t in trials_of(path, "PRUNED")] == [(8.0, 30)]
    pretend(monkeypatch, values | {9.0: [0.1, 0.65, 0.8]})
    early = write_study({"sampler": "grid", "folds": 2, "prune_from": 0.0}, "early", search={"optim.lr": [*values, 9.0]})
    assert main([early]) == 0
    assert [(t.params["optim.lr"], t.last_step) for t in trials_of(early, "PRUNED")] == [(7.0, 10), (8.0, 10), (9.0, 10)]


def test_a_trial_that_diverges_is_one_to_learn_from(write_study, capsys):
    settings = {"optim.name": "sgd", "train.eval_every_epochs": 0.5}
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01, 1e38]}, variants={"sgd": settings})
    assert main([path]) == 0
    (diverged,) = trials_of(path, "PRUNED")
    assert diverged.params["optim.lr"] == 1e38 and "not finite" in diverged.user_attrs["why"]
    assert not trials_of(path, "FAIL") and "1 finished, 1 diverged" in capsys.readouterr().out
    page = Path("runs/tune/report.html").read_text()
    assert f"trial {diverged.number} diverged: step" in page and page.count("diverged") > 1
    alone = write_study({"sampler": "grid"}, "alone", search={"optim.lr": [1e37, 1e38]}, variants={"sgd": settings})
    with pytest.raises(UserError, match="runs/alone: every trial diverged: lower optim.lr(.|\n)*not finite"):
        main([alone])


def test_a_process_with_nothing_to_do_does_not_judge_a_study_that_others_work_on(write_study):
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01, 0.02]})
    plan = read_plan([path])
    study = open_study(plan)
    with claimed_trial(plan, study) as first, claimed_trial(plan, study):
        first.set_user_attr("why", "it failed")
        study.tell(first, state=type(study.get_trials()[0].state).FAIL)
        assert main([path]) == 0


def test_trials_of_hosts_with_their_own_run_folders_are_seen_alive(write_study):
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01, 0.02]})
    shared = ["--storage", str(Path("shared/tune.log").absolute())]
    plans = [read_plan([path, *shared, "--run", f"{host}/tune"]) for host in ("here", "there")]
    studies = [open_study(plan) for plan in plans]
    with claimed_trial(plans[0], studies[0]):
        queue_abandoned(plans[1], studies[1])
        assert [t.state.name for t in studies[1].get_trials()] == ["RUNNING", "WAITING"]
    queue_abandoned(plans[1], studies[1])
    assert [t.state.name for t in studies[1].get_trials()] == ["FAIL", "WAITING", "WAITING"]


def test_a_file_system_without_locks_is_told_of_and_its_trials_are_let_be(write_study, monkeypatch, capsys):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    pretend(monkeypatch, {0.01: [0.5, 0.6, 0.7], 0.02: [0.5, 0.6, 0.7]})
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01, 0.02]})
    plan = read_plan([path])
    study = open_study(plan)
    study.ask()  # and lives on, which nobody can see
    assert main([path]) == 0
    assert sorted(t.state.name for t in study.get_trials()) == ["COMPLETE", "RUNNING"]
    assert capsys.readouterr().err.count("cannot be locked (No locks available)") == 1


def test_a_moved_set_and_settings_without_effect_leave_a_study_what_it_was(write_study, table, tmp_path):
    path = write_study({"sampler": "random", "trials": 1}, search={"optim.lr": [0.01, 0.02]})
    plan = read_plan([path])
    open_study(plan)
    (tmp_path / "moved").symlink_to(table)
    data = RECIPE["data"] | {"shards": str(tmp_path / "moved"), "threads": 2, "cache_dir": str(tmp_path / "cache")}
    Path("base.yaml").write_text(yaml.safe_dump(RECIPE | {"data": data}))
    moved = read_plan([path])
    open_study(moved)
    assert moved.base != plan.base and moved.identity() == plan.identity()
    assert moved.trial_folder(moved.trial_config({"optim.lr": 0.01})) == plan.trial_folder(plan.trial_config({"optim.lr": 0.01}))
    Path("base.yaml").write_text(yaml.safe_dump(RECIPE | {"data": data, "seed": 3}))
    with pytest.raises(UserError, match="these differ: recipe.seed"):
        open_study(read_plan([path]))


def test_shards_behind_a_url_are_fetched_into_the_recipes_cache_and_named_without_secrets(write_study, table, monkeypatch):
    from dist_train.index import load_index

    asked = []

    def loaded(*given):
        asked.append(given)
        return load_index(table)

    data = RECIPE["data"] | {"shards": "https://me:word@host/set?sig=abc", "cache_dir": "there", "cache_gb": 7.0, "val_split": "v"}
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01]})
    Path("base.yaml").write_text(yaml.safe_dump(RECIPE | {"data": data}))
    monkeypatch.setattr("dist_train.study.load_index", loaded)
    with pytest.raises(UserError) as told:
        read_plan([path])
    assert asked == [(data["shards"], "there", 7.0)]
    assert str(told.value).startswith("https://host/set: there is no split 'v'")
    Path("base.yaml").write_text(yaml.safe_dump(RECIPE | {"data": data | {"val_split": "val"}}))
    pretend(monkeypatch, {0.01: [0.5, 0.6, 0.7]})
    assert main([path]) == 0
    page = Path("runs/tune/report.html").read_text()
    assert "on set, " in page and "https://host/set" in page and "word" not in page and "sig=abc" not in page


def test_a_trial_that_goes_on_keeps_count_of_what_it_was_patient_about(tmp_path):
    saved = Saved(5, {}, {"is_best": False, "best_value": [0.9, -0.1], "bad_evaluations": 2})
    assert one_trial.SparseCheckpoints(tmp_path, 1, 60).has_best(saved), "or Run.resume would forget the best figures so far"


def test_a_fold_of_a_trial_is_a_run_that_report_and_compare_read(write_study):
    path = write_study({"sampler": "grid", "folds": 2}, search={"optim.lr": [0.003, 0.01]})
    assert main([path]) == 0
    trials = trials_of(path)
    folders = [Path("runs/tune", t.user_attrs["folder"], f"fold-{fold}") for t in trials for fold in range(2)]
    groups = grouped(read_all(folders))
    assert [group.name for group in groups] == [f"{Path(t.user_attrs['folder']).name}/fold-0 and 1 more" for t in trials]
    assert [group.values("val", "top1") for group in groups] == [[fold["top1"] for fold in t.user_attrs["folds"]] for t in trials]
    assert f"{trials[0].user_attrs['folds'][0]['top1']:.2%}" in write_report(folders[0]).read_text()
    assert yaml.safe_load((folders[0] / "config.yaml").read_text())["data"]["decode"] == "cpu", "settled, as a training's is"
    for fold, folder in zip(trials[1].user_attrs["folds"], folders[2:], strict=True):
        last = lines_of(folder, "eval")[-1]
        assert (fold["last_top1"], fold["last_loss"]) == (last["top1"], last["loss"])
        assert json.loads((folder / "result.json").read_text())["last_top1"] == last["top1"]


def test_a_study_on_folds_of_train_and_val_leaves_a_recipe_that_trains(write_study):
    base = yaml.safe_load(Path("base.yaml").read_text())
    Path("base.yaml").write_text(yaml.safe_dump(base | {"data": base["data"] | {"train_split": "train+val"}}))
    path = write_study({"sampler": "grid", "folds": 2}, search={"optim.lr": [0.01]})
    assert main([path]) == 0
    assert run_training(["--config", "runs/tune/best.yaml", "--run", "runs/tuned"]) == 0
    assert json.loads(Path("runs/tuned/result.json").read_text())["test"]["samples"] == 57


def test_a_study_is_another_once_it_is_judged_on_other_samples(write_study, table, tmp_path):
    copy = shutil.copytree(table, tmp_path / "copy")
    index = load_index(copy)
    base = yaml.safe_load(Path("base.yaml").read_text())
    Path("base.yaml").write_text(yaml.safe_dump(base | {"data": base["data"] | {"shards": str(copy)}}))
    path = write_study({"sampler": "random", "trials": 1}, search={"optim.lr": [0.01, 0.02]})
    open_study(read_plan([path]))
    val = index.split("val")
    save_index(replace(index, splits=index.splits | {"val": replace(val, shard_checksums=["0" * 32] * val.num_shards)}))
    with pytest.raises(UserError, match="another study; these differ: shards"):
        open_study(read_plan([path]))


def test_another_study_in_the_folder_is_refused(write_study):
    path = write_study({"sampler": "random", "trials": 1}, search={"optim.lr": [0.01, 0.02]})
    open_study(read_plan([path]))
    open_study(read_plan([path, "--trials", "5"]))  # more trials are the same study
    with pytest.raises(UserError, match="another study; these differ: .*study.seed"):
        open_study(read_plan([path, "--seed", "5"]))
    write_study({"sampler": "random", "trials": 1}, search={"optim.lr": [0.01, 0.03]})
    with pytest.raises(UserError, match="space.choices.optim.lr"):
        open_study(read_plan([path]))


@pytest.mark.parametrize("study, parts, expected", [
    ({"trails": 3}, {"search": {"optim.lr": [1]}}, r"tune.yaml: study.*trails"),
    ({}, {"search": {"optim.lrr": [1]}}, "search: optim.lrr is not a setting of a recipe. Did you mean optim.lr"),
    ({}, {"search": {"optim.lr": ["fast"]}}, "optim.lr is 'fast'; expected a number"),
    ({}, {"search": {"optim.lr": {"low": 1, "high": 0.1}}}, "expected a list of choices"),
    ({}, {"search": {"optim.lr": [0.1, 0.1]}}, "names a choice twice"),
    ({}, {"search": {"train.precision": ["fp32", "bf16"]}}, "train.precision cannot be searched"),
    ({}, {"search": {"data.folds": [2]}}, "data.folds cannot be searched"),
    ({"sampler": "grid"}, {"search": {"optim.lr": {"low": 0.1, "high": 0.2}}}, "a grid needs its step"),
    ({}, {"variants": {"a": {"optim.name": "adamm"}}}, "optim.name is 'adamm'; expected one of"),
    ({}, {"variants": {"a": {"optim.lr": 1}}, "search": {"optim.lr": [1]}}, "both searched and set"),
    ({}, {}, "nothing to search"),
    ({"folds": 1}, {"search": {"optim.lr": [1]}}, "study.folds is 1"),
    ({"folds": 500}, {"search": {"optim.lr": [1]}}, "too few for data.folds"),
    ({"storage": "sqlite:///x.db"}, {"search": {"optim.lr": [1]}}, "storage is 'sqlite:///x.db'; expected the path of a journal"),
    ({"storage": "postgresql://me:word@host/x"}, {"search": {"optim.lr": [1]}}, "storage is 'postgresql://host/x'; expected"),
    ({"prune_from": 30}, {"search": {"optim.lr": [1]}}, "study.prune_from is 30.0; expected a share"),
    ({}, {"search": {"data.threads": [1, 2]}}, "data.threads cannot be searched"),
    ({"recipe": "none.yaml"}, {"search": {"optim.lr": [1]}}, "'none.yaml', which is no file"),
    ({}, {"search": {"optim.lr": [1]}, "extra": 1}, "found extra"),
])  # fmt: skip
def test_faults_of_a_study_are_told_before_anything_is_trained(write_study, study, parts, expected):
    with pytest.raises(UserError, match=expected):
        read_plan([write_study(study, **parts)])


def test_help_shows_how_a_study_is_written(capsys):
    with pytest.raises(SystemExit):
        read_plan(["--help"])
    shown = capsys.readouterr().out
    assert "optim.lr: {low: 0.001, high: 0.1, log: true}" in shown
    assert all(f"--{name}" in shown for name in setting_names(StudyConfig))


def test_ranks_of_one_job_are_refused(write_study, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several ranks"):
        main([write_study({}, search={"optim.lr": [0.01]})])


def test_a_grid_counts_the_steps_of_a_range():
    space = Space(ranges={"a": {"low": 0.1, "high": 0.3, "step": 0.1}, "b": {"low": 1, "high": 5, "step": 2}})
    assert [tuple(drawn.values()) for drawn in space.grid()] == [(a, b) for a in (0.1, 0.2, 0.3) for b in (1, 3, 5)]


def test_of_equal_accuracies_the_lower_loss_is_best():
    lines = [{"top1": 0.9, "loss": 0.4}, {"top1": 0.9, "loss": 0.3}, {"top1": 0.8, "loss": 0.1}, {"top1": 0.95, "loss": None}]
    assert best_line(lines[:3], "top1") == lines[1] and best_line(lines, "loss") == lines[2]


def test_a_loss_that_is_no_number_counts_in_a_trial_as_in_a_run():
    figures = [(top1, loss) for top1 in (0.5, 0.75) for loss in (0.5, 0.25, None)]
    lines = [{"top1": top1, "loss": loss} for top1, loss in figures]
    results = [EvalResult(4, float("nan") if loss is None else loss, top1, None) for top1, loss in figures]
    for monitor in ("top1", "loss"):
        assert [goodness(line["top1"], line["loss"], monitor) for line in lines] == [
            goodness(result.top1, result.loss, monitor) for result in results
        ]
    assert best_line([{"top1": 0.9, "loss": None}, {"top1": 0.8, "loss": 0.1}], "top1")["top1"] == 0.9


def test_a_study_of_balanced_accuracy_takes_the_highest(write_study):
    path = write_study({"sampler": "grid", "folds": 2, "metric": "balanced"}, search={"optim.lr": [0.01, 0.00001]})
    assert main([path]) == 0
    trials = trials_of(path)
    for trial in trials:
        folds = [json.loads(file.read_text()) for file in Path("runs/tune", trial.user_attrs["folder"]).glob("fold-*/result.json")]
        assert trial.value == pytest.approx(sum(fold["val"]["balanced"] for fold in folds) / 2)
        assert all(0 < fold["last_balanced"] <= fold["balanced"] for fold in folds)
    best = max(trials, key=lambda t: t.value)
    recipe = Path("runs/tune/best.yaml").read_text()
    assert f"# Validation balanced accuracy {best.value:.2%}" in recipe and best.params["optim.lr"] == 0.01
    assert yaml.safe_load(recipe)["train"]["monitor"] == "balanced"


def test_a_fold_of_an_earlier_version_has_no_balanced_accuracy():
    old, new = {"top1": 0.9, "loss": 0.2}, {"top1": 0.8, "loss": 0.4, "balanced": 0.7}
    assert mean_figures([old, new]) == {"top1": pytest.approx(0.85), "loss": pytest.approx(0.3), "balanced": None}
    assert mean_figures([new]) == new and best_line([old, new], "balanced") == new and best_line([old, new], "top1") == old


def test_the_table_shows_mean_and_sample_deviation():
    folds = [{"best_epoch": 1.0, "train_s": 2.0, "last_top1": 0.9}, {"best_epoch": 2.0, "train_s": 3.0, "last_top1": 0.92}]
    row = Row(7, {"optim.lr": 0.0123456}, folds, [0.9, 0.94], Path())
    assert trial_table([row], "top1").rows == [["7", "92.00%", "2.83%", "91.00%", "1.5", "5.0", "0.01235"]]
    older = Row(7, {}, [{"best_epoch": 1.0, "train_s": 2.0}], [0.9], Path())  # of a study begun before the last was kept
    cuts = [Cut(8, {"optim.lr": 1.0}, 0.931, "pruned after 1.25 folds"), Cut(9, {"optim.lr": 9.0}, None, "diverged")]
    table = trial_table([older], "top1", cuts)
    assert dict(zip([name for name, _ in table.columns], zip(*table.rows, strict=True), strict=True)) == {
        "trial": ("7", "8", "9"), "best accuracy": ("90.00%", "93.10%", ""), "±": ("", "", ""), "last": ("", "", ""),
        "best epoch": ("1.0", "", ""), "seconds": ("2.0", "", ""), "ended": ("", "pruned after 1.25 folds", "diverged"),
        "optim.lr": ("", "1", "9"),
    }  # fmt: skip


def test_balanced_accuracies_are_shown_as_shares_the_highest_first():
    folds = [{"best_epoch": 1.0, "train_s": 2.0, "last_top1": 0.9, "last_balanced": 0.5}]
    rows = [Row(k, {"variant": name}, folds, [value], Path(name)) for k, (name, value) in enumerate([("a", 0.6), ("b", 0.75)])]
    table = trial_table(rows, "balanced")
    assert table.columns[1][0] == "best balanced accuracy" and table.rows[0][1:4] == ["60.00%", "", "50.00%"]
    bars = variant_bars([*rows, Row(2, {"variant": "a"}, folds, [0.7], Path("c"))], "balanced")
    assert [bar.name for bar in bars] == ["b", "a"]


def test_a_variants_bar_is_the_mean_of_its_trials():
    def row(number, variant, lr, value, folder):
        return Row(number, {"variant": variant, "optim.lr": lr}, [], [value], Path(folder))

    rows = [row(0, "a", 1, 0.9, "x"), row(1, "b", 1, 0.7, "y"), row(2, "a", 2, 0.8, "z"), row(3, "a", 1, 0.9, "x")]
    bars = variant_bars(rows, "top1")
    assert [(bar.name, bar.value) for bar in bars] == [("a", pytest.approx(0.85)), ("b", 0.7)]
    assert bars[0].spread == pytest.approx(0.0707, abs=1e-4), "trial 3 is the training of trial 0"
    assert [bar.name for bar in variant_bars(rows, "loss")] == ["b", "a"]
    assert variant_bars(rows[:2], "top1") == [], "the trials' own bars show them"


def test_a_setting_is_drawn_against_the_figure_as_it_is_searched():
    space = Space({"optim.lr": {"low": 0.001, "high": 0.1, "log": True}}, {"model.hidden": {"[8]": [8], "[16]": [16]}})
    rows = [Row(i, {"optim.lr": lr, "model.hidden": hidden}, [], [value], Path())
            for i, (lr, hidden, value) in enumerate([(0.001, "[8]", 0.5), (0.01, "[16]", 0.7), (0.1, "[8]", 0.6)])]  # fmt: skip
    svg = setting_field(space, "optim.lr", rows, [Cut(3, {"optim.lr": 0.05}, None, "diverged")], str)
    x, y = zip(*[map(float, dot) for dot in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)], strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and y[0] > y[2] > y[1]
    assert svg.count("×") == 1 and all(f">{tick}<" in svg for tick in ("0.001", "0.01", "0.1"))
    chosen = setting_field(space, "model.hidden", rows, [], str)
    assert len(set(re.findall(r'<circle cx="([\d.]+)"', chosen))) == 2 and ">[8]<" in chosen
    assert setting_field(space, "model.hidden", rows[:1], [], str) == ""


def test_settings_that_matter_together_alone_are_not_said_to_matter_by_themselves():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"a": [0, 1], "b": [0, 1], "c": [0, 1, 2, 3]}))
    study.optimize(lambda t: float(t.suggest_int("a", 0, 1) ^ t.suggest_int("b", 0, 1)) + 1e-6 * t.suggest_int("c", 0, 3), 16)
    shares = importance(study)
    assert set(shares) == {"a", "b", "c"} and sum(shares.values()) < 0.5


def test_a_trials_curve_is_the_mean_of_evaluations_however_close_they_are(tmp_path):
    for fold in range(2):
        (tmp_path / f"fold-{fold}").mkdir()
        lines = [{"kind": "eval", "split": "val", "step": k, "epoch": k / 11.2, "top1": 0.1 * k + 0.02 * fold} for k in range(1, 9)]
        (tmp_path / f"fold-{fold}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[: 8 - fold]))
    epochs, means = mean_curve(Row(0, {}, [{}, {}], [0.1, 0.2], tmp_path), "top1")
    assert epochs == [k / 11.2 for k in range(1, 8)] and means == pytest.approx([0.1 * k + 0.01 for k in range(1, 8)])
