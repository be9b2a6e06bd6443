"""A run's folder: whose run lies there, by its settings and shards, and what predict finds in it besides the weights."""

import json
import shutil
from pathlib import Path

import xxhash
import yaml

from dist_train import sizes
from dist_train.checkpoint import Saved
from dist_train.config import DataConfig, RunConfig, conflicts
from dist_train.durable import replace_text
from dist_train.errors import UserError
from dist_train.index import ShardIndex
from dist_train.settings import from_dict, read_written, to_dict


def open_run_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    """Write the settings into the run folder, or accept those there. Raises UserError where it holds another run."""
    is_written, is_begun = (folder / "config.yaml").exists(), has_begun(folder)
    differing = conflicts(to_dict(written_settings(folder)), to_dict(config)) if is_written else []
    if differing and is_begun:
        raise UserError(f"{folder}: the folder holds a run with other settings:\n  " + "\n  ".join(differing)
                        + f"\n  Take the same settings, or another folder with --run, where --from {folder} begins "
                        "with others from a checkpoint of this run.")  # fmt: skip
    if not resume and is_begun:
        raise UserError(f"{folder}: the folder already holds this run. Go on with --resume, or take another --run.")
    if differing:
        (folder / "wandb-id").unlink(missing_ok=True)  # of a start that came to nothing
    (folder / "stop").unlink(missing_ok=True)  # it was for the process before
    for unfinished in (folder / "checkpoints").glob("*.partial"):
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    write_settings(config, folder)


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a run: settings and something that came of them, without which others may take their place."""
    made = any((folder / name).exists() for name in ("checkpoints", "weights.safetensors", "result.json"))
    metrics = folder / "metrics.jsonl"
    return (folder / "config.yaml").exists() and (made or (metrics.exists() and metrics.stat().st_size > 0))


def written_settings(folder: Path) -> RunConfig:
    """The settings in a run folder. Raises UserError where they cannot be read."""
    old = read_written(folder / "config.yaml")
    old.setdefault("data", {}).setdefault("decode", "cpu")  # runs from before there was a choice
    return from_dict(RunConfig, old)


def write_settings(config: RunConfig, folder: Path) -> None:
    """Put the settings into a run folder, unless they are there."""
    text, path = yaml.safe_dump(to_dict(config), sort_keys=False), folder / "config.yaml"
    if not path.exists() or path.read_text() != text:
        replace_text(path, text)


def refuse_other_shards(saved: Saved, index: ShardIndex, data: DataConfig, run: Path) -> None:
    """Raise UserError where a checkpoint of a run comes from other shards than those of the index."""
    facts, before, trained = data_facts(index, data), saved.state.get("data"), f"split {data.train_split}"
    if before is None:  # written by an earlier version
        table = saved.state.get("table", facts[trained].partition(" ")[2])
        before = {trained: f"{saved.state['shards']} {table}"}
    differing = [what for what, value in before.items() if facts.get(what) != value]
    if differing:
        raise UserError(f"{index.folder}: these are not the shards that {run} was trained on: other "
                        f"{', '.join(differing)}.\n  Put data.shards back, or begin another run with --run.")  # fmt: skip


def data_facts(index: ShardIndex, data: DataConfig) -> dict[str, str]:
    """What a run's figures follow from, besides its settings: hashes, by what they are of."""
    what = json.dumps([index.classes, index.image_size, index.features])
    facts = {"classes or size": xxhash.xxh3_64_hexdigest(what.encode())}
    for name in (data.train_split, data.val_split):
        if split := index.find(name):
            facts[f"split {name}"] = f"{split.fingerprint()} {split.rows_checksum}"
    return facts


def inference(config: RunConfig, index: ShardIndex, size: tuple[int, int] | None) -> dict:
    """All that predict needs besides the weights and config.yaml."""
    return {
        "classes": index.classes, "mean": index.mean, "std": index.std, "features": index.features,
        "image_size": size and list(size), "eval_size": size and list(sizes.eval_size(config, index)),
        "one_size": index.image_size is not None, "stored_size": index.image_size and list(index.image_size),
        "eval_crop": sizes.eval_crop(config, index), "missing": index.source.get("missing") if index.features else None,
        "interpolation": config.data.interpolation,
    }  # fmt: skip
