"""Kill a training again and again at random moments, go on each time, and count what was lost. Nothing may be.

    .venv/bin/python benchmarks/chaos.py --kills 50 [--ranks 2] [--seed 0] [--seconds 600] [--out FILE.json]

A small network is trained on the digits twice: once calmly, once killed (SIGKILL) at random moments, `--resume`d each time:
one rank, rank zero, all ranks at once, or, by strace, at the very system call that renames or syncs a file. After every kill each
checkpoint that looks finished is read and proven, as are the other files of the run folder. At the end the killed run is
compared with the calm one: weights bit by bit, every figure of every step.

Ranks are forked from this process, which has imported torch once: a start takes a second instead of ten.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = ["--data.image_size", "16", "--data.global_batch_size", "96", "--data.threads", "1", "--model.name", "alexnet_bn",
         "--model.width", "0.0625", "--optim.lr", "0.02", "--optim.ema_decay", "0.9", "--augment.crop", "padded",
         "--augment.padding", "1", "--augment.rotate_degrees", "10", "--train.eval_every_epochs", "2",
         "--train.log_every_steps", "1", "--train.checkpoint_every_steps", "4", "--track.wandb", "off", "--runtime.threads", "1",
         "--runtime.timeout_s", "30"]  # fmt: skip
SYSTEM_CALLS = ("rename,renameat,renameat2", "fsync,fdatasync", "unlink,unlinkat,rmdir")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="no new kill after this long")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = chaos(Path(folder), options.kills, options.ranks, options.epochs, options.seed, options.seconds)
    counts |= {
        "host": platform.node(),
        "cores": len(os.sched_getaffinity(0)),
        "ranks": options.ranks,
        "seed": options.seed,
    }
    text = json.dumps(counts, indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")
    return 0 if is_unharmed(counts) else 1


def chaos(folder: Path, num_kills: int, num_ranks: int, epochs: float, seed: int, seconds: float) -> dict:
    """Train calmly and under kills in a folder; return the counts."""
    from dist_train import shard
    from dist_train import train as _warm  # noqa: F401  imported once, here, for all ranks

    shards = folder / "digits"
    shard.main(["--source", "sklearn", "--dataset", "digits", "--out", str(shards), "--workers", "1"])
    argv = ["--data.shards", str(shards), "--train.epochs", str(epochs), "--resume", *SIZES]
    calm, killed = folder / "calm", folder / "killed"
    began = time.monotonic()
    codes = [wait(pid) for pid in start(num_ranks, [*argv, "--run", str(calm)], folder)]
    assert codes == [0] * num_ranks, logs(folder)
    calm_s = time.monotonic() - began

    rng, kinds, damage, rounds, totals = random.Random(seed), {}, [], 0, {}
    began = time.monotonic()
    while sum(kinds.values()) < num_kills and time.monotonic() - began < seconds:
        rounds += 1  # a training that gets to its end between two kills is compared, and another one begins
        killed = folder / f"killed-{rounds}"
        finished = False
        while not finished:
            pids = start(num_ranks, [*argv, "--run", str(killed)], folder)
            if sum(kinds.values()) >= num_kills or time.monotonic() - began > seconds:
                codes = [wait(pid) for pid in pids]
                assert codes == [0] * num_ranks, f"{codes}\n{logs(folder)}"
                break
            kind = rng.choice(["rank", "all", "all", "syscall"] if shutil.which("strace") else ["rank", "all"])
            finished = strike(kind, pids, rng, calm_s)
            if not finished:
                kinds[kind] = kinds.get(kind, 0) + 1
                damage += unreadable(killed)
        for name, value in compare(calm, killed).items():
            totals[name] = totals.get(name, True) and value if isinstance(value, bool) else totals.get(name, 0) + value
    return {"kills": sum(kinds.values()), **{f"kills_{k}": n for k, n in sorted(kinds.items())}, "trainings": rounds,
            "unreadable": len(damage), "damage": damage[:10], **totals, "seconds": round(time.monotonic() - began)}  # fmt: skip


def strike(kind: str, pids: list[int], rng: random.Random, calm_s: float) -> bool:
    """Kill some or all ranks at a random moment, and wait until all are gone. True if they had finished before that."""
    moment = time.monotonic() + rng.uniform(0.0, 0.5) * calm_s
    tracer = None
    if kind == "syscall":
        what = rng.choice(SYSTEM_CALLS)
        inject = f"inject={what}:signal=KILL:when={rng.randint(1, 20)}"
        words = ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(pids[0]), "-e", f"trace={what}", "-e", inject]
        tracer = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    gone = {}
    while time.monotonic() < moment or kind == "syscall":
        gone |= {pid: code for pid in pids if pid not in gone and (code := poll(pid)) is not None}
        if gone and (kind == "syscall" or len(gone) == len(pids)):
            break
        time.sleep(0.005)
    is_finished = len(gone) == len(pids) and set(gone.values()) == {0}
    victims = [rng.choice(pids)] if kind == "rank" else pids if kind == "all" else []
    for pid in victims:
        if pid not in gone:
            os.kill(pid, signal.SIGKILL)
    for pid in pids:  # what one rank's death leaves of the others has to end by itself
        if pid not in gone:
            gone[pid] = wait(pid)
    if tracer:
        tracer.wait()
    return is_finished or set(gone.values()) == {0}


def start(num_ranks: int, argv: list[str], folder: Path) -> list[int]:
    """Fork the ranks of a job; returns their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update(ACCELERATE_USE_CPU="true", WANDB_MODE="disabled")
                if num_ranks > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1",
                                      LOCAL_WORLD_SIZE=str(num_ranks), MASTER_PORT=str(port))  # fmt: skip
                from dist_train.cli import run_command
                from dist_train.train import run_training

                code = run_command(run_training, list(argv))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait(pid: int, timeout_s: float = 120) -> int:
    """Exit code of a rank, negative for a signal. Raises AssertionError if it hangs."""
    deadline = time.monotonic() + timeout_s
    while (code := poll(pid)) is None:
        assert time.monotonic() < deadline, f"process {pid} hangs"
        time.sleep(0.01)
    return code


def poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def unreadable(run: Path) -> list[str]:
    """What in a run folder looks finished and cannot be read."""
    import yaml

    from dist_train.checkpoint import load_checkpoint

    faults = []
    for path in sorted((run / "checkpoints").glob("step-*")):
        if not path.name.endswith(".partial"):
            try:
                load_checkpoint(path)
            except Exception as error:
                faults.append(f"{path.name}: {error}")
    for path in [*run.glob("*.json"), *(run / "checkpoints").glob("*.json"), *run.glob("config.yaml")]:
        try:
            yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
        except Exception as error:
            faults.append(f"{path.name}: {error}")
    return faults


def compare(calm: Path, killed: Path) -> dict:
    """Figures of two finished runs, step by step, and their weights, bit by bit."""
    import torch
    from safetensors.torch import load_file

    def figures(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["kind"] != "restart"]
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
    return counts["weights_equal"] and not any(
        counts[name] for name in ("unreadable", "steps_lost", "steps_repeated", "steps_that_differ")
    )


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("rank*.log")))


if __name__ == "__main__":
    sys.exit(main())
