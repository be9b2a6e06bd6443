"""Images a second of dist_train's stream beside other loaders, on the same pictures, in one run; and conversion.

    python benchmarks/loaders.py --images DIR_OR_TAR --cifar CLASS_FOLDERS [--workloads W1 W2 W3] [--peers NAME ...] [--quick]
                                 [--peer-python PYTHON ...] [--json]

W1: photographs in original sizes -> random resized crop 224 and flip, batch 64. W2: 32 px JPEGs as they are, batch 512. W3:
64 px JPEGs as they are, batch 256. All give shuffled uint8 batches with two threads or two worker processes. Each loader lives
in a process of its own; they are measured in turns, round by round, so that what else the machine does falls on all alike.
Peers that are not installed are left out by name; --peer-python names interpreters that have those which this one lacks.
"conversion" is of the CIFAR files, beside webdataset's ShardWriter; "conversion-photographs" of 8,000 photographs, beside a copy.
--quick takes about 15 minutes. Writes benchmarks/results/loaders.json.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from loader_conversion import CONVERSIONS, measure_conversion
from loader_pictures import ROOT, WORKLOADS, prepare_pictures, ratio
from loader_server import ONLY, OURS, PEERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="photographs: a tar or a folder of JPEGs (W1, W3, conversion of photographs)")
    parser.add_argument("--cifar", type=Path, help="class folders of 32 px JPEGs (W2, conversion)")
    parser.add_argument("--workloads", "--workload", nargs="+", choices=[*WORKLOADS, *CONVERSIONS],
                        default=[*WORKLOADS, *CONVERSIONS])  # fmt: skip
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--peer-python", nargs="+", default=[], help="interpreters for peers that this one has not got")
    parser.add_argument("--quick", action="store_true", help="--rounds 5 --seconds 1 --small 20000, two of each conversion")
    parser.add_argument("--small", type=int, default=100_000, help="pictures of W3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/dist_train-loaders"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/loaders.json"))
    parser.add_argument("--json", action="store_true", help="the last line is the results as one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.small = 5, 1.0, 20_000
    missing = [name for name in options.peers if not python_of(name, options)]
    peers = [name for name in options.peers if name not in missing]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    results = about(options) | {"left_out": missing, "workloads": {}}
    for workload in options.workloads:
        if workload in CONVERSIONS:
            results[workload] = measure_conversion(workload, options)
            continue
        source = prepare_pictures(workload, options)
        names = [
            *(name for name, on in OURS.items() if workload in on),
            *(p for p in peers if workload in ONLY.get(p, workload)),
        ]
        results["workloads"][workload] = measure(workload, names, source, options)
        show(workload, results["workloads"][workload])
    Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    if options.json:
        print(json.dumps(results))


def measure(workload: str, names: list[str], source: Path, options) -> dict:
    """Medians and spreads of the loaders on a workload, taken in turns."""
    size, batch_size, what = WORKLOADS[workload]
    children, opened, rates, failed = {}, {}, {}, {}
    for name in names:
        python = python_of(name, options) or sys.executable
        server = str(ROOT / "benchmarks/loader_server.py")
        command = [python, server, name, workload, str(source), str(options.seconds)]
        log = open(options.scratch / f"{workload}-{name}.log", "w")
        children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        answer = children[name].stdout.readline()  # one after the other: a start is not to be disturbed by another
        if answer:
            opened[name], rates[name] = json.loads(answer), []
        else:
            failed[name] = last_words(workload, name, options)
    for turn in range(options.rounds + 1):  # the first is a warm-up, and not counted
        order = list(rates)
        for name in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:
            children[name].stdin.write("go\n")
            children[name].stdin.flush()
            answer = children[name].stdout.readline()
            if answer:
                rates[name] += [json.loads(answer)] if turn else []
            else:
                failed[name] = last_words(workload, name, options)
                del rates[name]
    for child in children.values():
        child.stdin.close()
        child.terminate()
        child.wait()
    return {
        "what": f"{what}, {size} px, batch {batch_size}",
        "pictures": len(list(source.glob("folders/*/*.jpg"))),
        "failed": failed,
        "loaders": {
            name: described(values, rates.get("torchvision")) | {"first_batch_s": round(opened[name]["first_batch_s"], 3)}
            for name, values in rates.items()
        },
    }  # fmt: skip


def last_words(workload: str, name: str, options) -> list[str]:
    """The last line of a loader that has ended, printed too."""
    words = (options.scratch / f"{workload}-{name}.log").read_text().strip().splitlines()[-1:]
    print(f"{workload}, {name}: does not run: {' '.join(words)}")
    return words


def described(rates: list, others: list | None) -> dict:
    """rates: (images a second, images a second of processor time) of each round; others: those of ImageFolder."""
    values, per_cpu = zip(*rates, strict=True)
    wall, cpu = zip(*others, strict=True) if others else (None, None)
    return {
        "images_per_s": round(statistics.median(values)), "lowest": round(min(values)), "highest": round(max(values)),
        "images_per_cpu_s": round(statistics.median(per_cpu)), "n": len(values), "rounds": [round(value) for value in values],
        "per_imagefolder": ratio(values, wall), "per_imagefolder_cpu": ratio(per_cpu, cpu),
    }  # fmt: skip


# ---- The record ------------------------------------------------------------------------------------------------------


def about(options) -> dict:
    sys.path.insert(0, str(ROOT))
    from dist_train.decode import decoders

    packages = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "webdataset", "mosaicml-streaming", "litdata",
                "nvidia-dali-cuda120", "ffcv", "tensorflow", "tensorflow-cpu")  # fmt: skip
    versions = {}
    for package in packages:
        here, *there = [installed_version(python, package) for python in (sys.executable, *options.peer_python)]
        there = ", ".join(sorted({version for version in there if version and version != here}))
        if here or there:
            versions[package] = f"{here}, peers {there}" if here and there else here or there
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "what": "images a second of shuffled uint8 batches, two threads or worker processes; medians over rounds in turns",
        "date": datetime.date.today().isoformat(), "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2), "python": platform.python_version(), "packages": versions,
        "decoders": decoders(), "rounds": options.rounds, "seconds": options.seconds,
    }  # fmt: skip


def python_of(name: str, options) -> str | None:
    """The interpreter that has what a loader needs; None where neither has."""
    module = PEERS.get(name, "torch")
    return next((python for python in (sys.executable, *options.peer_python) if has_module(python, module)), None)


@functools.cache
def has_module(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


@functools.cache
def installed_version(python: str, package: str) -> str | None:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    answer = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return answer.stdout.strip() or None


def show(workload: str, found: dict) -> None:
    print(f"\n{workload}: {found['what']}; {found['pictures']:,} pictures")
    heads = ("images/s", "lowest", "highest", "a cpu s", "/ImageFolder", "by cpu time", "first batch")
    print(" " * 30 + "".join(f"{head:>14}" for head in heads))
    keys = (
        "images_per_s",
        "lowest",
        "highest",
        "images_per_cpu_s",
        "per_imagefolder",
        "per_imagefolder_cpu",
        "first_batch_s",
    )
    for name, row in sorted(found["loaders"].items(), key=lambda item: -item[1]["images_per_s"]):
        print(
            f"{name:30}" + "".join(f"{row[key]:>14,}" if row[key] is not None else " " * 14 for key in keys), flush=True
        )


if __name__ == "__main__":
    main()
