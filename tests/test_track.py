"""What a run says: metrics.jsonl, the console, and Weights & Biases through its real client and a stand-in server."""

import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import lines_of, wait_for
from PIL import Image
from wandb_server import wandb_server

from dist_train import track, wandb_log
from dist_train.config import RunConfig, TrackConfig
from dist_train.errors import UserError
from dist_train.track import open_tracker, read_metrics
from dist_train.wandb_file import recorded_rows

OFF = RunConfig(track=TrackConfig(wandb="off"))
AUTO = RunConfig()


def values(step):
    return {"epoch": step / 50, "loss": 1 / (step + 1), "lr": 0.01, "images_per_s": 500.0, "data_wait": 0.02}


def train(tracker, steps):
    for step in steps:
        tracker.train(step, values(step))
        if step % 20 == 0:
            tracker.evaluation(step, "val", {"epoch": step / 50, "loss": 0.5, "top1": 0.75, "balanced": 0.5})


def steps_of(lines, kind):
    return [line["step"] for line in lines if line["kind"] == kind]


def test_every_line_reads_back_as_it_was_given(tmp_path):
    tracker = open_tracker(tmp_path, OFF, True, 100, None)
    tracker.train(10, values(10))
    tracker.evaluation(10, "val", {"epoch": 0.2, "loss": 0.5, "time_s": 7.5})
    tracker.finish(True)
    first, second = lines_of(tmp_path)
    assert 0 <= first.pop("time_s") < 60
    assert first == {"kind": "train", "step": 10, **values(10)}
    assert second == {"kind": "eval", "split": "val", "step": 10, "epoch": 0.2, "loss": 0.5, "time_s": 7.5}


def test_an_evaluation_of_the_training_split_has_a_line_of_its_own(tmp_path):
    tracker = open_tracker(tmp_path, OFF, True, 100, None)
    for step in (10, 20):
        tracker.train(step, values(step))
        tracker.evaluation(step, "train", {"epoch": 0.2, "loss": 0.5, "time_s": 7.5})
    tracker.finish(True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert steps_of(lines, "train") == steps_of(lines, "eval") == [10, 20]


def test_no_step_stands_twice_after_a_resume(tmp_path):
    tracker = open_tracker(tmp_path, OFF, True, 100, None)
    train(tracker, range(10, 61, 10))
    tracker.finish(False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 70, "lo')  # killed while writing
    tracker = open_tracker(tmp_path, OFF, True, 100, 40)
    train(tracker, range(40, 101, 10))  # the evaluation at step 40 comes again
    tracker.finish(True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert steps_of(lines, "train") == list(range(10, 101, 10))
    assert steps_of(lines, "eval") == [20, 40, 60, 80, 100]
    assert steps_of(lines, "restart") == [40]
    times = [line["time_s"] for line in lines]
    assert times == sorted(times)


def test_where_the_time_goes_is_said_once_a_run(tmp_path, capsys):
    for resume_step, profiled in ((None, (20, 40)), (30, (50,)), (10, (20,))):
        tracker = open_tracker(tmp_path, OFF, True, 100, resume_step)
        for step in profiled:
            tracker.profile(step, 0.03, {"data": 0.1, "forward": 0.9})
        tracker.finish(True)
        assert steps_of(read_metrics(tmp_path / "metrics.jsonl"), "profile") == [20]
    # the last restart took the line of step 20 back, so it was measured and said again
    assert capsys.readouterr().out.count("where a step's 30.0 ms go: data 10%  forward 90%") == 2


def test_a_fresh_start_takes_back_every_line(tmp_path):
    for steps in ([0, 10], [0]):
        tracker = open_tracker(tmp_path, OFF, True, 100, None)
        train(tracker, steps)
        tracker.finish(True)
    assert steps_of(read_metrics(tmp_path / "metrics.jsonl"), "train") == [0]


def test_what_is_not_finite_is_written_as_null(tmp_path):
    tracker = open_tracker(tmp_path, OFF, True, 100, None)
    tracker.train(1, {"loss": float("nan"), "lr": float("inf")})
    tracker.finish(True)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["lr"] is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl.partial").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write"):
        open_tracker(tmp_path, OFF, True, 100, None)


def test_other_ranks_write_nothing_and_import_nothing(tmp_path):
    code = f"""
import sys
from dist_train.config import RunConfig
from dist_train.track import open_tracker
tracker = open_tracker({str(tmp_path / "run")!r}, RunConfig(), False, 10, None)
tracker.train(1, {{}})
tracker.evaluation(1, "val", {{}})
tracker.message("")
tracker.figures({{}})
tracker.finish(True)
assert not {{"wandb", "rich", "torch", "dist_train.wandb_log"}} & set(sys.modules), sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "run").exists()


def test_lines_for_log_files_show_the_figures(tmp_path, capsys):
    tracker = open_tracker(tmp_path, OFF, True, 100, None)
    tracker.train(20, {**values(20), "data_wait": 0.25, "tflops": 0.3412, "mfu": 0.5649})
    tracker.evaluation(20, "val", {"loss": 0.5, "top1": 0.75, "balanced": 0.625})
    tracker.train(30, {**values(30), "tflops": 0.0049, "mfu": 0.004})
    tracker.finish(True)
    out = capsys.readouterr().out
    assert out.count("TFLOP/s") == 1  # 0.00 would say nothing
    assert lines_of(tmp_path)[-1]["tflops"] == 0.0049
    for part in ("step 20", "loss 0.0476", "lr 1.00e-02", "500 samples/s", "waits for data 25%",
                 "0.34 TFLOP/s (MFU 56%)", "top1 75.00%", "balanced 62.50%"):  # fmt: skip
        assert part in out, part


def test_the_bar_on_a_terminal_shows_the_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(track, "_is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    tracker = open_tracker(tmp_path, OFF, True, 100, None)
    tracker.train(20, values(20))
    tracker.message("shards [7] and [/8] stand as they are")
    tracker.finish(True)
    out = capsys.readouterr().out
    for part in ("20/100", "loss 0.0476", "500 samples/s", "shards [7] and [/8] stand as they are"):
        assert part in out, part


def test_time_left_follows_the_pace_of_this_process(monkeypatch):
    now = iter([100.0, 110.0])
    monkeypatch.setattr(track.time, "monotonic", lambda: next(now))
    eta = track.Eta(1000)
    eta.seconds(500)
    assert eta.seconds(600) == pytest.approx(40.0)  # 100 steps took 10 s; 400 are left


KEY = {"WANDB_API_KEY": "a" * 40}


@pytest.mark.parametrize(
    "setting, env, mode",
    [
        ("auto", {}, "offline"), ("auto", KEY, "online"), ("offline", KEY, "offline"), ("off", KEY, "off"),
        ("auto", KEY | {"WANDB_MODE": "offline"}, "offline"), ("online", KEY | {"WANDB_MODE": "disabled"}, "off"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline"), ("auto", KEY | {"WANDB_DISABLED": "true"}, "off"),
        ("online", KEY, "online"), ("off", KEY | {"WANDB_MODE": "online"}, "off"),
    ],
)  # fmt: skip
def test_mode_follows_setting_key_and_machine(tmp_path, setting, env, mode):
    assert wandb_log.wandb_mode(setting, {"HOME": str(tmp_path)} | env) == mode


def test_key_in_netrc_counts_for_its_server_only(tmp_path):
    (tmp_path / ".netrc").write_text(f"machine wandb.example.org\nlogin user\npassword {'b' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    env = {"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"}
    assert wandb_log.wandb_mode("auto", env) == "online"
    assert wandb_log.wandb_mode("auto", {"HOME": str(tmp_path)}) == "offline"


def test_online_without_a_key_is_refused(tmp_path):
    with pytest.raises(UserError, match="no API key for https://api.wandb.ai"):
        wandb_log.wandb_mode("online", {"HOME": str(tmp_path)})


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with its own home and no W&B settings; the client's patience is cut to seconds."""
    for name in [name for name in wandb_log.os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(wandb_log, "START_S", 1.5)
    monkeypatch.setattr(wandb_log, "UPLOAD_S", 1.5)
    monkeypatch.setattr(wandb_log, "FINISH_S", 10)
    return monkeypatch


@pytest.fixture
def callers(machine):
    """Names of the threads that have W&B begin a run, take figures or pictures, or end: what may wait for a server."""
    import wandb

    names = set()

    def noted(call):
        def noted_call(*args, **options):
            names.add(threading.current_thread().name)
            return call(*args, **options)

        return noted_call

    for owner, name in ((wandb, "init"), (wandb, "Image"), (wandb.Run, "log"), (wandb.Run, "finish")):
        machine.setattr(owner, name, noted(getattr(owner, name)))
    return names


@pytest.fixture
def server(machine):
    with wandb_server() as (server, url):
        machine.setenv("WANDB_BASE_URL", url)
        machine.setenv("WANDB_API_KEY", "a" * 40)
        yield server


def be_patient(monkeypatch):
    """Where the server answers, or there is none, patience costs nothing."""
    monkeypatch.setattr(wandb_log, "START_S", 20)
    monkeypatch.setattr(wandb_log, "UPLOAD_S", 20)


def arrived(rows, name):
    return [row[f"{name}/step"] for row in rows if f"{name}/step" in row]


def recorded(folder):
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    return [row for file in files for row in recorded_rows(file)]


def test_a_resumed_run_is_one_run_with_every_step_once(tmp_path, server, monkeypatch):
    be_patient(monkeypatch)
    run = tmp_path / "digits"
    tracker = open_tracker(run, AUTO, True, 100, None)
    train(tracker, range(10, 61, 10))
    tracker.finish(False)
    ((run_id, first),) = server.runs.items()
    assert first.exit_code == 1 and (run / "wandb-id").read_text() == run_id
    assert arrived(first.rows, "train") == [10, 20, 30, 40, 50, 60]
    first.rows = first.rows[:3]  # the last rows never arrived: steps 10, 20 and the evaluation at 20 did
    first.summary |= {"train/step": 20, "val/step": 20}

    tracker = open_tracker(run, AUTO, True, 100, 50)
    train(tracker, range(60, 101, 10))
    tracker.finish(True)
    ((_, second),) = server.runs.items()
    assert arrived(second.rows, "train") == list(range(10, 101, 10))
    assert arrived(second.rows, "val") == [20, 40, 60, 80, 100]
    assert (second.rows[-1]["val/top1"], second.rows[-1]["val/balanced"], second.rows[-1]["step"]) == (0.75, 0.5, 100)
    assert second.exit_code == 0
    assert second.config["optim"]["value"]["lr"] == AUTO.optim.lr


def picture(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "teal").save(folder / f"{name}.png")
    return folder / f"{name}.png"


def test_pictures_arrive_once_however_often_the_end_is_reached(tmp_path, server, monkeypatch):
    be_patient(monkeypatch)
    run = tmp_path / "digits"
    for names in (["samples", "filters"], ["samples", "filters", "confusion"]):
        tracker = open_tracker(run, AUTO, True, 100, 50 if (run / "metrics.jsonl").exists() else None)
        assert tracker.takes_figures
        train(tracker, range(10, 51, 10))
        tracker.figures({f"pictures/{name}": picture(tmp_path, name) for name in names})
        tracker.finish(True)
        ((_, arrived_run),) = server.runs.items()
        arrived_run.summary = {key: value for row in arrived_run.rows for key, value in row.items()}
    for name in ("samples", "filters", "confusion"):
        rows = [row[f"pictures/{name}"] for row in arrived_run.rows if f"pictures/{name}" in row]
        assert [row["_type"] for row in rows] == ["image-file"], name


def test_pictures_of_a_run_without_a_server_are_recorded_once(tmp_path, machine, callers):
    be_patient(machine)
    run = tmp_path / "digits"
    for resume_step in (None, 50):
        tracker = open_tracker(run, AUTO, True, 100, resume_step)
        train(tracker, [50])
        tracker.figures({"pictures/samples": picture(tmp_path, "samples")})
        tracker.finish(True)
    assert callers == {"wandb"}
    assert [row["step"] for row in recorded(run) if "pictures/samples._type" in row] == [50]
    (kept,) = run.glob("wandb/offline-run-*/files/media/images/pictures/*.png")
    assert kept.read_bytes() == (tmp_path / "samples.png").read_bytes()


def test_nobody_draws_pictures_that_go_nowhere(tmp_path):
    tracker = open_tracker(tmp_path, OFF, True, 100, None)
    assert not tracker.takes_figures and not open_tracker(tmp_path, AUTO, False, 100, None).takes_figures
    tracker.finish(True)


@pytest.mark.parametrize("fault", ["hang", "reset", 503])
def test_a_server_that_is_away_neither_stalls_nor_stops_a_run(tmp_path, server, callers, capsys, fault):
    server.fault = fault
    run = tmp_path / "digits"
    began = time.monotonic()
    tracker = open_tracker(run, AUTO, True, 100, None)
    train(tracker, range(10, 51, 10))
    tracker.finish(True)
    assert time.monotonic() - began < 12
    assert callers == {"wandb"}
    assert "cannot be reached" in capsys.readouterr().out
    assert steps_of(read_metrics(run / "metrics.jsonl"), "train") == [10, 20, 30, 40, 50]
    assert arrived(recorded(run), "train") == [10, 20, 30, 40, 50]


def test_a_server_that_hangs_in_the_middle_holds_up_nothing(tmp_path, server, callers, capsys, monkeypatch):
    monkeypatch.setattr(wandb_log, "START_S", 20)
    tracker = open_tracker(tmp_path / "digits", AUTO, True, 100, None)
    train(tracker, [10])
    wait_for(lambda: server.runs, "a run on the server")
    server.fault = "hang"
    began = time.monotonic()
    train(tracker, range(20, 101, 10))
    tracker.finish(True)
    assert time.monotonic() - began < 10
    assert callers == {"wandb"}
    assert "did not take the last figures" in capsys.readouterr().out
    assert steps_of(read_metrics(tmp_path / "digits/metrics.jsonl"), "train") == list(range(10, 101, 10))


def test_a_client_that_is_frozen_is_left_behind(tmp_path, machine, capsys):
    machine.setattr(wandb_log, "FINISH_S", 2)
    tracker = open_tracker(tmp_path / "digits", AUTO, True, 100, None)
    wait_for(lambda: list((tmp_path / "digits").glob("wandb/offline-run-*/*.wandb")), "the client's record")
    (client,) = (child for child in psutil.Process().children() if "wandb-core" in child.name())
    client.suspend()
    train(tracker, range(10, 101, 10))
    began = time.monotonic()
    tracker.finish(True)
    assert time.monotonic() - began < 8
    assert "did not take the last figures" in capsys.readouterr().out
    assert not client.is_running()
    assert steps_of(read_metrics(tmp_path / "digits/metrics.jsonl"), "train") == list(range(10, 101, 10))


def test_recordings_on_the_disk_hold_every_step_once_and_go_to_the_server_later(tmp_path, machine):
    run = tmp_path / "digits"
    for resume_step, steps in ((None, range(10, 51, 10)), (30, range(40, 81, 10))):
        tracker = open_tracker(run, AUTO, True, 100, resume_step)
        train(tracker, steps)
        tracker.finish(True)
    assert arrived(recorded(run), "train") == list(range(10, 81, 10))
    assert arrived(recorded(run), "val") == [20, 40, 60, 80]

    be_patient(machine)
    with wandb_server() as (server, url):
        machine.setenv("WANDB_BASE_URL", url)
        machine.setenv("WANDB_API_KEY", "a" * 40)
        open_tracker(run, AUTO, True, 100, 80).finish(True)
    ((_, arrived_run),) = server.runs.items()
    assert arrived(arrived_run.rows, "train") == list(range(10, 81, 10))
    assert recorded(run) == []  # nothing left that could be sent a second time
