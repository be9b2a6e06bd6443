"""Seconds to make tars of files, start to end: `dist-train shard` beside webdataset's ShardWriter and a plain copy."""

import functools
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from loader_pictures import asked_for, convert, made_once, photographs, ratio

CONVERSIONS = ("conversion", "conversion-photographs")
PHOTOGRAPHS = 8000  # long enough that starting the interpreter is little of it


def measure_conversion(workload: str, options) -> dict:
    """Medians and spreads in seconds, taken in turns, and how many times as fast dist_train is as each of the others."""
    source, scratch = _files(workload, options), options.scratch / "converted"
    ways = {"dist_train": convert, "webdataset": _shard_writer}
    if workload == "conversion-photographs":
        ways |= {
            "dist_train, a sample decoded": functools.partial(convert, more=("--check", "sample")),
            "cp and sync": _copy,
        }
    seconds = {name: [] for name in ways}
    paths = sorted(source.rglob("*.jpg"))
    num_bytes = sum(len(path.read_bytes()) for path in paths)  # whoever came first would otherwise wait for the disk
    for _ in range(2 if options.quick else options.rounds):
        for name, work in ways.items():
            shutil.rmtree(scratch, ignore_errors=True)
            subprocess.run(["sync"])
            began = time.perf_counter()
            work(source, scratch)
            seconds[name].append(time.perf_counter() - began)
    shutil.rmtree(scratch)
    print(f"\n{workload}: {len(paths):,} files, {num_bytes / 1e6:,.0f} MB")
    ours = [name for name in ways if name.startswith("dist_train")]
    found = {}
    for name, values in seconds.items():
        found[name] = {"seconds": round(statistics.median(values), 2), "lowest": round(min(values), 2),
                       "highest": round(max(values), 2), "n": len(values)}  # fmt: skip
        if name not in ours:
            found[name]["times_as_long"] = {our: ratio(values, seconds[our]) for our in ours}
        beside = ", ".join(f"{times} x {our}" for our, times in found[name].get("times_as_long", {}).items())
        print(f"{name:30}{found[name]['seconds']:>8} s  {beside}", flush=True)
    return {"files": len(paths), "megabytes": round(num_bytes / 1e6, 1), "ways": found}


def _files(workload: str, options) -> Path:
    options.scratch.mkdir(parents=True, exist_ok=True)
    if workload == "conversion":
        return asked_for(options.cifar, "--cifar")
    made = made_once(options.scratch / workload, lambda folder: photographs(folder / "folders", options, PHOTOGRAPHS))
    return made / "folders"


def _copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    subprocess.run(["sync", "-f", str(out)], check=True)


def _shard_writer(source: Path, out: Path) -> None:
    import webdataset as wds

    out.mkdir()
    paths = sorted(source.rglob("*.jpg"))
    classes = {name: k for k, name in enumerate(sorted({path.parent.name for path in paths}))}
    with wds.ShardWriter(f"{out}/%06d.tar", maxcount=10_000, verbose=0) as writer:
        for k, path in enumerate(paths):
            writer.write({"__key__": f"{k:08d}", "jpg": path.read_bytes(), "cls": classes[path.parent.name]})
