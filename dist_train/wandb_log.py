"""A run's figures in Weights & Biases, sent by a thread of its own, so that no server can stall a training.

The run keeps one id (runs/NAME/wandb-id). After a restart the server, or without one the recordings on the disk, say
how far each series has come, and get from metrics.jsonl exactly what they lack: nothing is lost, nothing sent twice.
"""

import math
import os
import queue
import secrets
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from dist_train.config import RunConfig
from dist_train.durable import replace_text
from dist_train.errors import UserError
from dist_train.remote import shown, without_secrets
from dist_train.settings import to_dict
from dist_train.wandb_file import recorded_rows

START_S = 20  # seconds a server may take to answer before figures are recorded on the disk instead
UPLOAD_S = 10  # seconds the end of a run waits for the last figures to arrive
FINISH_S = START_S + UPLOAD_S + 10  # seconds the end of a run waits whatever happens


def open_wandb(folder: Path, config: RunConfig, lines: list[dict]):
    """Begin or go on with the W&B run of a run folder; None if Weights & Biases is off.

    lines: what metrics.jsonl holds already. Returns at once: the server is asked in the background.
    Raises UserError if track.wandb is online and there is no API key.
    """
    mode = wandb_mode(config.track.wandb, os.environ)
    if mode == "off":
        return None
    return WandbRun(folder, config, mode, lines, os.environ)


def wandb_mode(setting: str, env: dict) -> str:
    """online, offline or off, from track.wandb and the WANDB_* variables, which speak for the machine and win.

    Raises UserError if it comes to online and there is no API key.
    """
    asked = {"disabled": "off", "dryrun": "offline", "run": "online"}.get(env.get("WANDB_MODE"), env.get("WANDB_MODE"))
    if env.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        asked = "off"
    mode = asked if asked in ("online", "offline", "off") else setting
    if setting == "off" or mode == "off":
        return "off"
    if mode == "auto":
        return "online" if _has_key(env) else "offline"
    if mode == "online" and not _has_key(env):
        raise UserError(
            f"track.wandb is {setting}, WANDB_MODE is {env.get('WANDB_MODE', 'not set')}, and there is no API key for "
            f"{_base_url(env)}.\n  Set WANDB_API_KEY, or run `wandb login`, or set track.wandb to auto, offline or off."
        )
    return mode


class WandbRun:
    """One W&B run, fed through a queue. Every method returns at once but `finish`, which returns within FINISH_S."""

    record = "metrics.jsonl"  # in the run folder: where the figures are in any case

    def __init__(self, folder: Path, config: RunConfig, mode: str, lines: list[dict], env: dict):
        self._folder, self._config, self._mode = folder, config, mode
        self._project = env.get("WANDB_PROJECT") or config.track.project
        self._entity = env.get("WANDB_ENTITY") or config.track.entity or None
        self._id = _run_id(folder, env)
        self._history = list(lines)
        self._sent = {}  # newest step of each series that the run has
        self._shown = set()  # names of the pictures it has
        self._run = None
        self._queue, self._news = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def line(self, line: dict) -> None:
        self._queue.put(("line", line))

    def pictures(self, pictures: dict[str, Path]) -> None:
        self._queue.put(("pictures", pictures))

    def news(self):
        """Yield what a person should know of, each text once."""
        while True:
            try:
                yield self._news.get_nowait()
            except queue.Empty:
                return

    def finish(self, exit_ok: bool) -> None:
        self._queue.put(("finish", 0 if exit_ok else 1))
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            self._news.put(f"Weights & Biases did not take the last figures in {FINISH_S} s. {self._advice()}")
            _stop_client()

    def _work(self) -> None:
        try:
            self._begin()
            while True:
                what, value = self._queue.get()
                if what == "finish":
                    return self._end(value)
                self._log(what, value)
        except Exception as error:  # whatever W&B does, the training goes on and metrics.jsonl has the figures
            self._news.put(f"Weights & Biases is off for the rest of this run: {_first_line(error)}. "
                           f"The figures are in {self._folder / self.record}.")  # fmt: skip

    def _begin(self) -> None:
        if self._mode == "online":
            try:
                self._open("online")
                self._news.put(f"Weights & Biases: {self._run.url or self._id}")
            except Exception as error:
                self._mode = "offline"
                _stop_client()
                self._news.put(f"Weights & Biases cannot be reached ({_first_line(error)}): the figures are recorded "
                               f"on the disk. {self._advice()}")  # fmt: skip
        if self._run is None:
            self._open("offline")
        for line in self._history:
            self._log("line", line)

    def _open(self, mode: str) -> None:
        import wandb

        settings = wandb.Settings(
            init_timeout=START_S, login_timeout=START_S, finish_timeout=UPLOAD_S,
            console="off", silent=True, save_code=False, disable_git=True, disable_job_creation=True,
            x_disable_meta=any(shown(word) != word for word in sys.argv),  # it holds the command line
        )  # fmt: skip
        wandb.setup(settings)  # silent from the first word on
        run = wandb.init(
            project=self._project, entity=self._entity, id=self._id, name=self._folder.name, dir=str(self._folder),
            config=without_secrets(to_dict(self._config)), mode=mode, resume="allow" if mode == "online" else None,
            settings=settings,
        )  # fmt: skip
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if mode == "online":
            rows = [dict(run.summary)]
            for old in self._recordings("offline-run"):  # the server gets what they hold: nobody must send it again
                shutil.rmtree(old, ignore_errors=True)
        else:
            files = [file for old in self._recordings("*run") for file in old.glob("*.wandb")]
            rows = [row for file in files for row in recorded_rows(file)]
        self._sent = _newest_steps(rows)
        self._shown = {name.removesuffix("._type") for row in rows for name in row}  # recordings take pictures apart
        self._run = run

    def _log(self, what: str, value: dict) -> None:
        if what == "pictures":
            import wandb

            fresh = {name: wandb.Image(str(path)) for name, path in value.items() if name not in self._shown}
            if fresh:
                self._run.log({"step": max(self._sent.values(), default=0), **fresh})
            self._shown |= fresh.keys()
            return
        own, split = ("train", "profile"), value.get("split")
        name = value["kind"] if value["kind"] in own else f"eval-{split}" if split in own else split
        if name is None or value["step"] <= self._sent.get(name, -1):
            return
        self._sent[name] = value["step"]
        figures = {key: figure for key, figure in value.items() if key not in ("kind", "split")}
        row = {f"{name}/{key}": math.nan if figure is None else figure for key, figure in figures.items()}
        self._run.log({"step": value["step"], **row})

    def _end(self, exit_code: int) -> None:
        import wandb

        began = time.monotonic()
        self._run.finish(exit_code=exit_code)
        with suppress(SystemExit):
            wandb.teardown(exit_code)  # here, where it is bounded, and not when the interpreter ends
        if self._mode == "online" and time.monotonic() - began > UPLOAD_S:
            self._news.put(f"Weights & Biases did not take the last figures in {UPLOAD_S} s. {self._advice()}")

    def _recordings(self, kind: str) -> list[Path]:
        return sorted((self._folder / "wandb").glob(f"{kind}-*-{self._id}*"))

    def _advice(self) -> str:
        if self._mode == "online":
            return "The next `dist-train train --resume` of this run sends what is missing."
        return f"Send them later with: wandb sync {self._folder}/wandb/offline-run-*-{self._id}*"


def _newest_steps(rows: list[dict]) -> dict[str, int]:
    newest = {}
    for row in rows:
        for name, step in row.items():
            if name.endswith("/step"):
                series = name[: -len("/step")]
                newest[series] = max(step, newest.get(series, step))
    return newest


def _run_id(folder: Path, env: dict) -> str:
    path = folder / "wandb-id"
    if not path.exists():
        replace_text(path, env.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return path.read_text().strip()


def _has_key(env: dict) -> bool:
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from netrc import NetrcParseError, netrc
    from urllib.parse import urlsplit

    try:
        file = netrc(env.get("NETRC") or Path(env.get("HOME", "~"), ".netrc").expanduser())
    except (OSError, NetrcParseError):
        return False
    found = file.authenticators(urlsplit(_base_url(env)).netloc)
    return bool(found and found[2])


def _base_url(env: dict) -> str:
    return env.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


def _stop_client() -> None:
    """End W&B's client process at once: it would hold on to the run's id, or make the interpreter wait at its end."""
    with suppress(Exception, SystemExit):  # of no use to a training; wandb also misses the process just killed
        import wandb

        process = wandb.setup()._connection._proc._process  # wandb 0.31 has no public way
        process.kill()
        process.wait(5)
        wandb.teardown()
