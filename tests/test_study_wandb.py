"""A study in Weights & Biases is one run: every finished trial once, whoever trained or sent it, the best, and the report."""
# ruff: noqa: F811

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from optuna.trial import TrialState
from test_study import RECIPE, pretend, write_study  # noqa: F401
from test_track import arrived, be_patient, machine, recorded, server  # noqa: F401

from dist_train import study_wandb
from dist_train.config import RunConfig, TrackConfig
from dist_train.errors import UserError
from dist_train.journal import locked
from dist_train.study import main
from dist_train.study_wandb import StudyLog, lines_of


def trial(number: int, top1: float, state: str = "COMPLETE", **params):
    folds = [{"top1": top1 + k, "balanced": 0.5, "loss": 2 + 10 * k, "train_s": 2.5 + k} for k in (-0.1, 0.1)]
    return SimpleNamespace(number=number, params=params, user_attrs={"folds": folds}, state=TrialState[state])


def log_of(folder: Path, trials: list, setting: str = "auto") -> StudyLog:
    plan = SimpleNamespace(folder=folder, base=RunConfig(track=TrackConfig(setting)), config=SimpleNamespace(metric="top1"))
    return StudyLog(plan, SimpleNamespace(get_trials=lambda deepcopy: trials))


def test_a_line_a_finished_trial_with_the_best_beside_it_up_to_the_first_that_goes_on():
    drawn = {"optim.lr": 0.1, "variant": "a"}
    trials = [trial(0, 0.5, **drawn), trial(1, 0.0, "FAIL"), trial(2, 0.4, **drawn), trial(3, 0.0, "PRUNED"), trial(4, 0.75),
              trial(5, 0.0, "RUNNING"), trial(6, 0.9)]  # fmt: skip
    lines = lines_of(trials, "top1")
    assert lines[2] == {"kind": "eval", "split": "trial", "step": 2, "top1": pytest.approx(0.4), "balanced": 0.5, "loss": 2.0,
                        "seconds": 5.0, "optim_lr": 0.1, "variant": "a"}  # fmt: skip
    assert [line["step"] for line in lines if line["split"] == "trial"] == [0, 2, 4]
    best = [line for line in lines if line["split"] == "best"]
    assert [(line["step"], line["trial"]) for line in best] == [(0, 0), (2, 0), (4, 4)] and best[1]["optim_lr"] == 0.1


def test_without_a_server_every_trial_is_recorded_once_and_the_report_with_them(tmp_path, machine):
    be_patient(machine)
    page = tmp_path / "report.html"
    page.write_text("<html><head></head><body>what was found</body></html>")
    trials = [trial(0, 0.5, **{"optim.lr": 0.1, "variant": "a"}), trial(1, 0.7)]
    log_of(tmp_path, trials).send(page)
    trials += [trial(2, 0.0, "PRUNED"), trial(3, 0.6)]
    log_of(tmp_path, trials).send(page)  # another process
    rows = recorded(tmp_path)
    assert arrived(rows, "trial") == arrived(rows, "best") == [0, 1, 3]
    (first,) = [row for row in rows if row.get("trial/step") == 0]
    assert (first["trial/optim_lr"], first["trial/variant"]) == (0.1, "a")
    assert [row["best/trial"] for row in rows if "best/trial" in row] == [0, 1, 1]
    pages = list(tmp_path.glob("wandb/offline-run-*/files/media/html/*.html"))
    assert len(pages) == 2 and {path.read_text() for path in pages} == {page.read_text()}


def test_progress_reaches_the_server_now_and_then_and_nobody_sends_beside_another(tmp_path, server, monkeypatch, capsys):
    be_patient(monkeypatch)
    trials = [trial(0, 0.5), trial(1, 0.7), trial(2, 0.0, "RUNNING")]
    log = log_of(tmp_path, trials)
    log.progress()
    assert not server.runs, "the study has just begun"
    monkeypatch.setattr(study_wandb, "SECONDS_BETWEEN", 0)
    with locked(tmp_path / "wandb.lock"):
        log.progress()
    assert not server.runs
    log.progress()
    ((_, run),) = server.runs.items()
    assert arrived(run.rows, "trial") == [0, 1] and run.config["seed"]["value"] == 0
    trials[2] = trial(2, 0.6)
    (tmp_path / "report.html").write_text("<html></html>")
    log_of(tmp_path, trials).send(tmp_path / "report.html")
    ((_, run),) = server.runs.items()
    assert arrived(run.rows, "trial") == [0, 1, 2] and [row["best/trial"] for row in run.rows if "best/trial" in row] == [0, 1, 1]
    assert [row["report"]["_type"] for row in run.rows if "report" in row] == ["html-file"]
    assert "Weights & Biases: http" in capsys.readouterr().out


def test_a_study_without_weights_and_biases_opens_nothing(tmp_path, server):
    log = log_of(tmp_path, [trial(0, 0.5)], "off")
    log.progress()
    log.send(None)
    assert not server.requests and not list(tmp_path.glob("wandb*"))


def test_a_study_that_is_to_be_online_says_at_once_that_there_is_no_key(tmp_path, machine):
    with pytest.raises(UserError, match="there is no API key"):
        log_of(tmp_path, [], "online")


def test_a_study_sends_at_its_end_what_its_trials_gave(write_study, table, monkeypatch):
    pretend(monkeypatch, {0.01: [0.5, 0.6, 0.7], 0.02: [0.5, 0.6, 0.8]})
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = write_study({"sampler": "grid"}, search={"optim.lr": [0.01, 0.02]})
    recipe = RECIPE | {"data": RECIPE["data"] | {"shards": table}, "track": {"wandb": "auto"}}
    Path("base.yaml").write_text(yaml.safe_dump(recipe))
    assert main([path, "--trials", "1"]) == main([path]) == 0
    rows = recorded(Path("runs/tune"))
    assert arrived(rows, "trial") == [0, 1] and [row["best/top1"] for row in rows if "best/top1" in row] == [0.7, 0.8]
    assert list(Path("runs/tune").glob("wandb/offline-run-*/files/media/html/report*.html"))
