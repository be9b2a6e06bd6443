"""Kill trainings and conversions again and again, go on each time, and count what was lost. Nothing may be.

    .venv/bin/python benchmarks/chaos.py --kills 200 [--seed 0] [--seconds 1500] [--out benchmarks/results/chaos.json]

A small network is trained on the digits, by two ranks, once calmly and then under SIGKILLs (`KINDS`), `--resume`d after each:
one rank, all ranks, at a random moment or while a checkpoint is being written; rank zero at the very system call that
renames, syncs or removes a file (by strace); and, started by `accelerate launch` or launch/local.sh, the launcher, a rank, or all
of it. Conversions are killed alike. After every kill, each checkpoint and set of shards that looks finished is read and proven. A
training that reached its end is compared with the calm one: weights bit by bit, every figure of every step; a finished set of
shards byte by byte.

Ranks without a launcher are forked from this process, which has imported torch once: a start takes a second instead of ten.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ranks import command_of, descendants, is_alive, load_torch, logs, poll, start, wait

PROJECT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
SETTINGS = ["--data.image_size", "16", "--data.global_batch_size", "96", "--data.threads", "1", "--model.name", "alexnet_bn",
            "--model.width", "0.0625", "--optim.lr", "0.02", "--optim.ema_decay", "0.9", "--augment.crop", "padded",
            "--augment.padding", "1", "--augment.rotate_degrees", "10", "--train.eval_every_epochs", "2",
            "--train.log_every_steps", "1", "--train.checkpoint_every_steps", "4", "--track.wandb", "off",
            "--runtime.threads", "1", "--runtime.timeout_s", "15"]  # fmt: skip
SYSTEM_CALLS = {"rename": "rename,renameat,renameat2", "sync": "fsync,fdatasync", "remove": "unlink,unlinkat,rmdir"}
KINDS = {  # how often each is drawn, relative to the others
    "training: a rank": 12, "training: all ranks": 20, "training: all ranks during a save": 16,
    "training: rank zero at a rename": 10, "training: rank zero at a sync": 10, "training: rank zero at a remove": 8,
    "accelerate launch: the launcher": 2, "accelerate launch: a rank": 1, "accelerate launch: everything": 1,
    "launch/local.sh: the launcher": 2, "launch/local.sh: a rank": 1, "launch/local.sh: everything": 1,
    "conversion: at random": 5, "conversion: at a rename": 3, "conversion: at a sync": 3,
}  # fmt: skip
AFTERLIFE_S = 60.0  # after a kill, what is left of a job has to end by itself within this time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=float, default=6, help="length of a training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1500, help="no new kill after this long")
    parser.add_argument("--launchers", type=int, default=1, help="0 leaves the kills under a launcher out")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.launchers or not kind.startswith(("accelerate", "launch/"))]
    if not shutil.which("strace"):
        kinds = [kind for kind in kinds if " at a " not in kind]
        print("no strace here: no kill lands exactly at a system call", file=sys.stderr)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        counts = chaos(Path(folder), options.kills, kinds, options.epochs, options.seed, options.seconds)
    counts |= {"seed": options.seed, "seconds": round(time.monotonic() - began), **surroundings()}
    text = json.dumps(counts, indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")
    return 0 if is_unharmed(counts) else 1


def chaos(folder: Path, num_kills: int, kinds: list[str], epochs: float, seed: int, seconds: float) -> dict:
    """Train and convert calmly, then under kills, in a folder; return the counts."""
    load_torch()
    rng, landed, damage = random.Random(seed), {}, []
    drawn = rng.choices(kinds, [KINDS[kind] for kind in kinds], k=num_kills)
    converted, deadline = Conversion(folder), time.monotonic() + seconds
    trained = Training(folder, converted.calm, epochs)
    for done, kind in enumerate(drawn):
        what = converted if kind.startswith("conversion") else trained
        while time.monotonic() < deadline and not what.strike(kind, rng):
            damage += what.finish()  # it came to its end before the blow fell: compare, and begin another one
        if time.monotonic() >= deadline:
            break
        landed[kind] = landed.get(kind, 0) + 1
        damage += what.unreadable()
        print(f"{done + 1} of {num_kills}: {kind}", file=sys.stderr, flush=True)
    damage += converted.finish() + trained.finish()
    return {
        "kills": sum(landed.values()), "kills_by_kind": dict(sorted(landed.items())), "unreadable": len(damage),
        "damage": damage[:10], **trained.counts, **converted.counts,
    }  # fmt: skip


class Training:
    """A training that is killed and resumed until it is through; then the next one."""

    def __init__(self, folder: Path, shards: Path, epochs: float):
        self.folder, self.number = folder, 1
        self.argv = ["--data.shards", str(shards), "--train.epochs", str(epochs), "--resume", *SETTINGS]
        (folder / "recipe.yaml").write_text("seed: 0\n")
        self.calm = folder / "calm"
        began = time.monotonic()
        codes = [wait(pid) for pid in start(NUM_RANKS, [*self.argv, "--run", str(self.calm)], folder)]
        assert codes == [0] * NUM_RANKS, logs(folder)
        self.calm_s = time.monotonic() - began
        self.counts = {"trainings": 0, "steps": 0, "steps_lost": 0, "steps_repeated": 0, "steps_that_differ": 0,
                       "weights_equal": True}  # fmt: skip

    @property
    def run(self) -> Path:
        return self.folder / f"killed-{self.number}"

    def strike(self, kind: str, rng: random.Random) -> bool:
        """Start or resume, and kill; return when every process is gone. False if all had come to their end before that."""
        argv = [*self.argv, "--run", str(self.run)]
        if not kind.startswith("training"):
            return self._strike_launched(kind, argv, rng)
        pids = start(NUM_RANKS, argv, self.folder)
        moment = time.monotonic() + rng.uniform(0.0, 0.5) * self.calm_s
        if " at a " in kind:
            tracer = inject(kind.rpartition(" ")[2], pids[0], rng.randint(1, 20))
            codes = [wait(pid) for pid in pids]
            tracer.wait()
            return self._is_hit(codes)
        seen = set((self.run / "checkpoints").glob("*.partial"))
        while time.monotonic() < moment or "save" in kind:
            if all(poll(pid) is not None for pid in pids):
                break
            is_late = "save" in kind and time.monotonic() > moment
            if is_late and set((self.run / "checkpoints").glob("*.partial")) - seen:
                time.sleep(rng.uniform(0, 0.01))
                break
            time.sleep(0.001 if "save" in kind else 0.005)
        for pid in [rng.choice(pids)] if kind.endswith("a rank") else pids:
            if poll(pid) is None:
                os.kill(pid, signal.SIGKILL)
        return self._is_hit([wait(pid) for pid in pids])

    def _is_hit(self, codes: list[int]) -> bool:
        is_hit = -signal.SIGKILL in codes
        assert is_hit or not any(codes), f"exit codes {codes}\n{logs(self.folder)}"
        return is_hit

    def _strike_launched(self, kind: str, argv: list[str], rng: random.Random) -> bool:
        launcher, _, victim = kind.partition(": ")
        recipe = str(self.folder / "recipe.yaml")
        command = {
            "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                                  "launch/accelerate/cpu-2.yaml", "-m", "dist_train.train", "--config", recipe, *argv],
            "launch/local.sh": ["launch/local.sh", "--cpu", str(NUM_RANKS), recipe, *argv],
        }[launcher]  # fmt: skip
        env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHON": sys.executable, "WANDB_MODE": "disabled",
                            "PYTHONPATH": str(PROJECT), "GRACE_S": "30"}  # fmt: skip
        before = size_of(self.run / "metrics.jsonl")
        with open(self.folder / "rank0.log", "w") as log:
            process = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=log, stderr=log)
        while process.poll() is None and size_of(self.run / "metrics.jsonl") == before:
            time.sleep(0.02)
        moment = time.monotonic() + rng.uniform(0.0, 0.25) * self.calm_s
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0, logs(self.folder)
            return False
        ranks = [pid for pid in descendants(process.pid) if "dist_train.train" in command_of(pid)]
        everyone = [process.pid, *ranks]
        for pid in {"the launcher": [process.pid], "a rank": ranks[-1:], "everything": everyone}[victim]:
            os.kill(pid, signal.SIGKILL)
        process.wait(AFTERLIFE_S)
        deadline = time.monotonic() + AFTERLIFE_S
        while any(is_alive(pid) for pid in ranks):
            assert time.monotonic() < deadline, f"ranks outlive their launcher\n{logs(self.folder)}"
            time.sleep(0.02)
        return bool(ranks)

    def unreadable(self) -> list[str]:
        """What in the run folder looks finished and cannot be read."""
        import yaml

        from dist_train.checkpoint import load_checkpoint

        faults, run = [], self.run
        for path in sorted((run / "checkpoints").glob("step-*")):
            if path.suffix != ".partial":
                faults += fault_of(load_checkpoint, path)
        for path in [*run.glob("*.json"), *(run / "checkpoints").glob("*.json")]:
            faults += fault_of(lambda path: json.loads(path.read_text()), path)
        for path in run.glob("config.yaml"):
            faults += fault_of(lambda path: yaml.safe_load(path.read_text()), path)
        return faults

    def finish(self) -> list[str]:
        """Go on to the end, undisturbed; compare with the calm run; the next strike begins a new one."""
        codes = [wait(pid) for pid in start(NUM_RANKS, [*self.argv, "--run", str(self.run)], self.folder)]
        assert codes == [0] * NUM_RANKS, f"{codes}\n{logs(self.folder)}"
        faults = self.unreadable()
        for name, value in compare(self.calm, self.run).items():
            self.counts[name] = self.counts[name] and value if isinstance(value, bool) else self.counts[name] + value
        self.counts["trainings"] += 1
        shutil.rmtree(self.run)
        self.number += 1
        return faults


class Conversion:
    """A conversion of the digits into some thirty shards, killed and continued until it is through; then the next one."""

    def __init__(self, folder: Path):
        self.calm, self.killed, self.log = (
            folder / "calm-set/digits",
            folder / "killed-set/digits",
            folder / "shard.log",
        )
        began = time.monotonic()
        assert self._start(self.calm).wait() == 0, self.log.read_text()
        self.calm_s = time.monotonic() - began
        self.expected = {path.name: path.read_bytes() for path in self.calm.iterdir()}
        self.counts = {"conversions": 0, "files_that_differ": 0}

    def _start(self, out: Path) -> subprocess.Popen:
        words = [
            "--source",
            "sklearn",
            "--dataset",
            "digits",
            "--shard_mb",
            "0.05",
            "--workers",
            "2",
            "--out",
            str(out),
        ]
        with open(self.log, "w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dist_train", "shard", *words], cwd=PROJECT, stdout=log, stderr=log
            )

    def strike(self, kind: str, rng: random.Random) -> bool:
        """Start or continue, and kill; return when it is gone. False if it came to its end before that."""
        if self.killed.exists():
            return False
        process = self._start(self.killed)
        if " at a " in kind:
            tracer = inject(kind.rpartition(" ")[2], process.pid, rng.randint(1, 60))
            code = process.wait(AFTERLIFE_S)
            tracer.wait()
            return code != 0  # of a killed worker the parent says that it was ended from outside
        time.sleep(rng.uniform(0.0, 1.0) * self.calm_s)
        process.kill()
        return process.wait() == -signal.SIGKILL

    def unreadable(self) -> list[str]:
        """What looks like a finished set and is none."""
        from dist_train.index import load_index
        from dist_train.verify import damage_of

        return damage_of(load_index(self.killed)).lines if self.killed.exists() else []

    def finish(self) -> list[str]:
        """Go on to the end, undisturbed; compare with the calm set; the next strike begins a new one."""
        if not self.killed.exists():
            assert self._start(self.killed).wait() == 0, self.log.read_text()
        faults = self.unreadable()
        found = {path.name: path.read_bytes() for path in self.killed.iterdir()}
        names = self.expected.keys() | found.keys()
        self.counts["files_that_differ"] += sum(self.expected.get(name) != found.get(name) for name in names)
        self.counts["conversions"] += 1
        shutil.rmtree(self.killed.parent)
        return faults


def inject(what: str, pid: int, when: int) -> subprocess.Popen:
    """Have a process, its threads and children die at their when-th system call of a kind."""
    calls = SYSTEM_CALLS[what]
    words = ["-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={when}"]
    return subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(pid), *words], stderr=subprocess.DEVNULL
    )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def fault_of(read, path: Path) -> list[str]:
    try:
        read(path)
    except Exception as error:
        return [f"{path}: {error}"]
    return []


def compare(calm: Path, killed: Path) -> dict:
    """Figures of two finished runs, step by step, and their weights, bit by bit."""
    import torch
    from safetensors.torch import load_file

    def figures(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["kind"] in ("train", "eval")]
        keys = [(row["kind"], row.get("split"), row["step"]) for row in rows]
        return keys, dict(zip(keys, [(row["loss"], row.get("top1"), row.get("lr")) for row in rows], strict=True))

    (keys, expected), (found_keys, found) = figures(calm), figures(killed)
    first, second = load_file(calm / "weights.safetensors"), load_file(killed / "weights.safetensors")
    return {
        "steps": sum(kind == "train" for kind, *_ in keys),
        "steps_lost": len(set(keys) - set(found_keys)),
        "steps_repeated": len(found_keys) - len(set(found_keys)),
        # a sample lost or repeated inside a step would change its loss
        "steps_that_differ": sum(found.get(key) != value for key, value in expected.items()),
        "weights_equal": first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first),
    }


def is_unharmed(counts: dict) -> bool:
    harms = ("unreadable", "steps_lost", "steps_repeated", "steps_that_differ", "files_that_differ")
    return counts["weights_equal"] and counts["trainings"] > 0 and not any(counts[name] for name in harms)


def surroundings() -> dict:
    """Hardware and versions."""
    import torch

    from dist_train import runtime

    about = runtime.environment(runtime.World(0, NUM_RANKS, 0, NUM_RANKS, torch.device("cpu")))
    kept = ("cpu", "cores", "system", "python", "packages", "revision", "started")
    return {"ranks": NUM_RANKS, **{name: about[name] for name in kept}}


if __name__ == "__main__":
    sys.exit(main())
