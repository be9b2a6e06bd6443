"""The pictures that loaders.py measures with: class folders and shards, made once."""

import hashlib
import io
import itertools
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
WORKLOADS = {  # height and width of a batch's pictures, batch size, what is done
    "W1": (224, 64, "random resized crop and flip"),
    "W2": (32, 512, "as they are"),
    "W3": (64, 256, "as they are"),
}


def prepare_pictures(workload: str, options) -> Path:
    """The workload's class folders and shards below the scratch folder, made once."""

    def make(folder: Path) -> None:
        {"W1": photographs, "W2": _cifar, "W3": _small}[workload](folder / "folders", options)
        convert(folder / "folders", folder / "shards")
        if workload == "W1":
            convert(folder / "folders", folder / "shards-500", ("--resize", "500"))

    return made_once(options.scratch / (f"{workload}-{options.small}" if workload == "W3" else workload), make)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made anew unless it is there whole."""
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        (folder / "ready").touch()
    return folder


def photographs(into: Path, options, least: int = 4000) -> None:
    """At least so many files: what there is, again under other names."""
    payloads = list(jpegs(asked_for(options.images, "--images")))
    for k, payload in enumerate(itertools.islice(itertools.cycle(payloads), max(least, len(payloads)))):
        write(into / "ab"[k % 2] / f"{k:06d}.jpg", payload)


def _cifar(into: Path, options) -> None:
    source = asked_for(options.cifar, "--cifar")
    source = source / "train" if (source / "train").is_dir() else source
    shutil.copytree(source, into)


def _small(into: Path, options) -> None:
    """Squares drawn from the photographs, 64 px, JPEG of quality 90; the same ones each time."""
    from PIL import Image

    payloads, rng = list(jpegs(asked_for(options.images, "--images"))), np.random.default_rng(0)
    for k, payload in enumerate(payloads):
        picture = Image.open(io.BytesIO(payload)).convert("RGB")
        for n in range(-(-options.small // len(payloads))):
            side = int(min(picture.size) * rng.uniform(0.4, 1))
            left, top = (int(rng.uniform(0, room - side + 1)) for room in picture.size)
            small = picture.resize(
                (64, 64), Image.Resampling.BILINEAR, (left, top, left + side, top + side), reducing_gap=2
            )
            file = io.BytesIO()
            small.save(file, "JPEG", quality=90)
            write(into / "ab"[k % 2] / f"{k:04d}-{n:03d}.jpg", file.getvalue())


def jpegs(source: Path):
    """The JPEGs in a tar or below a folder, in the order of their names."""
    if source.is_dir():
        yield from (path.read_bytes() for path in sorted(source.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg"))
        return
    with tarfile.open(source) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                yield tar.extractfile(member).read()


def labelled(folder: Path) -> list[tuple[Path, int]]:
    """The pictures of the class folders, in an order drawn once, and their class numbers."""
    classes = sorted(path.name for path in (folder / "folders").iterdir())
    paths = sorted((folder / "folders").glob("*/*.jpg"), key=lambda path: hashlib.md5(str(path).encode()).digest())
    return [(path, classes.index(path.parent.name)) for path in paths]


def write(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


def ratio(values: list[float], others: list[float] | None) -> float | None:
    """Of the medians: of the rounds' own ratios, one round in which the other was disturbed would make the best the median."""
    return round(statistics.median(values) / statistics.median(others), 2) if others else None


def asked_for(path: Path | None, option: str) -> Path:
    if path is None or not path.exists():
        sys.exit(
            f"loaders.py: {option} is {path}; expected pictures for this workload.\n  Name them, or leave the workload out."
        )
    return path


def convert(folder: Path, out: Path, more: tuple[str, ...] = ()) -> None:
    command = [sys.executable, "-m", "dist_train", "shard", "--source", "folder", "--path", str(folder), "--out", str(out),
               "--split.val", "0", "--split.test", "0", "--workers", str(WORKERS), "--overwrite", "true", *more]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
