"""A made-up run folder with its shards, as realistic as its readers need, for tests of what people are shown."""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import xxhash
import yaml
from PIL import Image

from dist_train.config import DataConfig, OptimConfig, RunConfig
from dist_train.index import SAMPLE, ShardIndex, SplitIndex, file_checksum, save_index, save_table
from dist_train.settings import to_dict


def make_run(folder: Path, classes: list[str], pictures: bool = True, finished: bool = True, num_test: int = 400) -> Path:
    """Write runs/demo and shards/demo below folder; return the run's folder."""
    run, shards, rng = folder / "runs/demo", folder / "shards/demo", np.random.default_rng(0)
    run.mkdir(parents=True)
    config = RunConfig(
        data=DataConfig(shards=str(shards), global_batch_size=64), optim=OptimConfig(lr=0.05, schedule="one_cycle")
    )
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    environment = {"hardware": {"cpu": "a CPU", "cores": 8}, "versions": {"torch": "2.x"}, "world_size": 2, "git": None}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "inference.json").write_text(json.dumps({"classes": classes, "features": None if pictures else ["a", "b"]}))
    lines = _lines(rng)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return run
    labels = rng.integers(len(classes), size=num_test)
    predicted = np.where(rng.random(num_test) < 0.9, labels, (labels + 1 + rng.integers(2, size=num_test)) % len(classes))
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, predicted), 1)
    wrong = np.flatnonzero(labels != predicted)[:30]
    evaluation = {
        "split": "test", "samples": num_test, "loss": 0.31, "top1": float((labels == predicted).mean()), "top5": 0.99,
        "confusion": confusion.tolist(),
        "mistakes": [{"sample": int(i), "label": int(labels[i]), "predicted": int(predicted[i]), "probability": 0.97,
                      "loss": 3.5} for i in wrong],
    }  # fmt: skip
    (run / "evaluation-test.json").write_text(json.dumps(evaluation))
    figures = {key: evaluation[key] for key in ("samples", "loss", "top1", "top5")}
    (run / "result.json").write_text(json.dumps({"test": figures, "best_step": 300}))
    make_shards(shards, classes, labels, pictures, rng)
    return run


def make_shards(folder: Path, classes: list[str], labels: np.ndarray, pictures: bool, rng) -> None:
    """One tar of PNG pictures (or float vectors) for the test split, with its index."""
    folder.mkdir(parents=True)
    rows = np.zeros(len(labels), SAMPLE)
    with tarfile.open(folder / "test-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, label in enumerate(labels):
            data = _picture(int(label), rng) if pictures else _vector(rng)
            info = tarfile.TarInfo(f"{i:08}.{'png' if pictures else 'npy'}")
            info.size = len(data)
            rows[i] = (tar.offset + 512, len(data), label, 28, 28, xxhash.xxh3_64_intdigest(data))
            tar.addfile(info, io.BytesIO(data))
    path = folder / "test-000000.tar"
    table = save_table(folder, "test", rows, [f"test/{classes[k]}/{i}.png" for i, k in enumerate(labels)])
    counts = np.bincount(labels, minlength=len(classes))
    split = SplitIndex("test", str(folder), [path.name], np.array([len(labels)]), np.array([path.stat().st_size]),
                       [file_checksum(path)], counts, table)  # fmt: skip
    size, features = ((28, 28), None) if pictures else (None, ["a", "b"])
    save_index(ShardIndex(str(folder), "demo", classes, {"test": split}, [0.5], [0.25], size, features))


def _lines(rng) -> list[dict]:
    lines = []
    for step in range(10, 601, 10):
        lines.append({
            "kind": "train", "step": step, "epoch": step / 60, "loss": 2.3 * math.exp(-step / 150) + 0.1 * rng.random(),
            "lr": 0.05 * math.sin(math.pi * step / 610), "images_per_s": 900 + 60 * rng.random(),
            "data_wait": 0.03 + 0.02 * rng.random(), "time_s": step * 0.07,
        })  # fmt: skip
        if step == 300:
            lines.append({"kind": "restart", "step": 300, "time_s": 21.0})
        if step % 60 == 0:
            top1 = 0.97 - 0.6 * math.exp(-step / 120)
            figures = {"loss": 1.2 - top1, "top1": top1, "top5": 0.99, "time_s": step * 0.07 + 0.02}
            lines.append({"kind": "eval", "split": "val", "step": step, "epoch": step / 60, **figures})
    return lines


def _picture(label: int, rng) -> bytes:
    y, x = np.mgrid[:28, :28]
    ring = np.abs(np.hypot(x - 14, y - 14) - 3 - label % 10) < 2
    pixels = np.clip(ring * 190 + rng.normal(30, 12, (28, 28)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _vector(rng) -> bytes:
    file = io.BytesIO()
    np.save(file, rng.random(2, np.float32), allow_pickle=False)
    return file.getvalue()
