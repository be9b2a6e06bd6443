"""Studies: settings are checked first, trials are those a plain training gives, nothing is lost or done twice."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dist_train.config import RunConfig, StudyConfig
from dist_train.errors import UserError
from dist_train.search import Space
from dist_train.settings import read_config, setting_names
from dist_train.study import main, open_study, queue_abandoned, read_plan
from dist_train.study_report import Row, importance, mean_curve, trial_table
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


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """The breast-cancer table as shards."""
    from dist_train import shard

    out = tmp_path_factory.mktemp("shards") / "breast-cancer"
    with contextlib.redirect_stdout(io.StringIO()):
        shard.main(["--source", "sklearn", "--dataset", "breast_cancer", "--out", str(out), "--workers", "1"])
    return str(out)


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
    argv = [
        "--config",
        "base.yaml",
        "--optim.lr",
        str(trial.params["optim.lr"]),
        "--data.folds",
        "2",
        "--data.fold",
        "1",
    ]
    assert run_training([*argv, "--run", str(tmp_path / "plain")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    best = best_line([line for line in lines if line.get("split") == "val"], "top1")
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


def test_hopeless_trials_are_pruned_after_fewer_folds(write_study):
    rates = [0.01, 0.011, 0.012, 0.013, 0.014, 0.00001]
    path = write_study({"sampler": "grid", "folds": 3, "metric": "loss"}, search={"optim.lr": rates})
    assert main([path]) == 0
    (pruned,) = [t for t in trials_of(path, "PRUNED") if t.params["optim.lr"] == 0.00001]
    folder = Path("runs/tune", pruned.user_attrs["folder"])
    assert len(list(folder.glob("fold-*"))) < 3
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


def test_a_killed_study_goes_on_and_two_processes_share_it(write_study):
    rates = [round(0.004 + 0.001 * i, 3) for i in range(6)]
    path = write_study({"sampler": "grid", "folds": 3, "prune": False}, search={"optim.lr": rates})
    first = start_study(path)
    while not list(Path("runs/tune").glob("trials/*/fold-1/metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.02)
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
    from dist_train import runtime, trial

    def stop_at_once(run, state):
        run.stop_requests._note(signal.SIGTERM, None)
        state.step = 1

    with monkeypatch.context() as patched:
        patched.setattr(trial, "train", stop_at_once)
        assert main([path]) == runtime.EXIT_STOPPED
    assert len(trials_of(path, "WAITING")) == 2
    assert main([path]) == 0 and len(trials_of(path)) == 2


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
    lines = [
        {"top1": 0.9, "loss": 0.4},
        {"top1": 0.9, "loss": 0.3},
        {"top1": 0.8, "loss": 0.1},
        {"top1": 0.95, "loss": None},
    ]
    assert best_line(lines, "top1") == lines[1] and best_line(lines, "loss") == lines[2]


def test_the_table_shows_mean_and_sample_deviation():
    folds = [{"best_epoch": 1.0, "train_s": 2.0}, {"best_epoch": 2.0, "train_s": 3.0}]
    row = Row(7, {"optim.lr": 0.0123456}, folds, [0.9, 0.94], Path())
    assert trial_table([row], "top1").rows == [["7", "92.00%", "2.83%", "1.5", "5.0", "0.01235"]]


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
