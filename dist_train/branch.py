"""A run that begins from a checkpoint of another, with settings of its own: what may differ, and where it came from."""

import json
from pathlib import Path

from dist_train import sizes
from dist_train.checkpoint import Checkpoints, Saved, load_checkpoint
from dist_train.config import FREE_SETTINGS, RunConfig, conflicts
from dist_train.durable import replace_json, replace_text
from dist_train.errors import UserError
from dist_train.folds import view_of
from dist_train.optim import lr_at
from dist_train.run_folder import has_begun, refuse_other_shards, write_settings, written_settings
from dist_train.runtime import World
from dist_train.settings import to_dict
from dist_train.state import begun_anew
from dist_train.track import read_metrics

ORIGIN = "branched-from.json"

# What lies ahead of a checkpoint is the new run's. By all else the checkpoint came about: its place in the stream, its tensors.
_AHEAD = (*FREE_SETTINGS, "augment.", "optim.", "train.", "data.crop", "data.eval_crop", "data.eval_size", "data.decode",
          "data.test_split")  # fmt: skip
_BEHIND = ("optim.name", "optim.muon_moves")  # they say what the optimizer's tensors mean


def open_branch(config: RunConfig, folder: Path, source: Path | None, resume: bool, world: World) -> list[str]:
    """Begin the run in a folder from a checkpoint of another, unless it has begun so before; return what is to be said.

    source: what --from names, RUN (its newest whole checkpoint counts) or RUN/checkpoints/step-N; None without it. Only rank zero
    calls this, and holds the folder's lock. Raises UserError where the folder holds a run that began otherwise, and, with nothing
    written, where the checkpoint cannot be gone on from with these settings.
    """
    before, begun = origin(folder), Checkpoints(folder, 1).finished()
    if before and not begun:  # the checkpoint is written last
        if source is None:
            raise UserError(f"{folder}: this run was to begin from {before['from']}, and has no checkpoint of it yet.\n"
                            f"  Give --from {before['from']} again, or take another folder with --run.")  # fmt: skip
    elif source is None:
        return []
    elif begun or has_begun(folder):
        how = f"from {before['from']}" if before else "by itself"
        if not resume:
            raise UserError(f"{folder}: --from {source} begins a new run, and the folder holds one, begun {how}.\n"
                            f"  Go on with it by --resume, or take another folder with --run.")  # fmt: skip
        if before is None or Path(before["from"]).resolve() != source.resolve():
            raise UserError(f"{folder}: --from {source}, but the run there has begun {how}.\n"
                            f"  Leave out --from to go on with it, or take another folder with --run.")  # fmt: skip
        return []
    return _begin(config, folder, source, world)


def origin(folder: Path) -> dict | None:
    """{"from": as on the command line, "run", "checkpoint", "step", "changed": settings} of where a run has begun, or None."""
    path = folder / ORIGIN
    try:
        found = json.loads(path.read_text())
        return {name: found[name] for name in ("from", "run", "checkpoint", "step", "changed")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {type(error).__name__} {error}.\n"
                        f"  Bring it back, or remove it: the run then counts as begun by itself.") from None  # fmt: skip


def run_of(source: Path) -> Path:
    """The run folder of what --from names. Raises UserError where that is neither a run nor a checkpoint of one."""
    if (source / "config.yaml").is_file():
        return source
    run = source.parent.parent
    there = Checkpoints(run, 1).finished() if (run / "config.yaml").is_file() else []
    if source in there:
        return run
    has = f" {run} has {', '.join(path.name for path in there)}." if there and source.parent.name == "checkpoints" else ""
    raise UserError(f"--from {source}: neither a run folder nor a checkpoint of one; expected runs/NAME or "
                    f"runs/NAME/checkpoints/step-N.{has}")  # fmt: skip


def _begin(config: RunConfig, folder: Path, source: Path, world: World) -> list[str]:
    path, saved, said = _read(source)
    run = path.parent.parent
    old = written_settings(run)
    changed = conflicts(to_dict(old), to_dict(config))
    if problems := _refused(changed, old, config):
        raise UserError(f"{folder}: cannot begin from {path} with these settings, which made it what it is:\n  "
                        + "\n  ".join(problems) + f"\n  Take those of {run}, or begin without --from.")  # fmt: skip
    index = view_of(config)
    sizes.check_sizes(config, index, world)
    sizes.check_evaluated(config)
    refuse_other_shards(saved, index, config.data, run)
    num_samples, batch = index.split(config.data.train_split).num_samples, config.data.global_batch_size
    old_steps, num_steps = (sizes.whole_steps(c.train.epochs, num_samples, batch) for c in (old, config))
    if saved.step >= num_steps:
        raise UserError(f"{path}: of step {saved.step:,}, and train.epochs {config.train.epochs:g} is over after {num_steps:,}: "
                        f"nothing is left to train.\n  Raise train.epochs, or give an earlier checkpoint to --from.")  # fmt: skip
    carried = begun_anew(saved, old.optim, config.optim)
    rate, rate_before = (
        lr_at(step, c.optim, num_samples / batch, steps) * s.state["plateau"]["factor"]
        for step, c, steps, s in ((saved.step, config, num_steps, carried), (max(0, saved.step - 1), old, old_steps, saved))
    )
    replace_json(folder / ORIGIN, {
        "from": str(source), "run": str(run), "checkpoint": path.name, "step": saved.step, "changed": changed,
    })  # fmt: skip
    # without profiles and figures of the test split: those the new run takes itself, once
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] <= saved.step and (
        line["kind"] in ("train", "restart") or line.get("split") == config.data.val_split)]  # fmt: skip
    replace_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_settings(config, folder)
    Checkpoints(folder, 1).put(carried)
    what = "; ".join(changed) or "the same settings"
    return [*said, f"{folder}: begins from {path} ({what}); learning rate of the next step {rate:.3g}, of the one before "
                   f"{rate_before:.3g}"]  # fmt: skip


def _read(source: Path) -> tuple[Path, Saved, list[str]]:
    """The checkpoint that --from names, proven; and a line for each newer one that is damaged."""
    run = run_of(source)
    if run != source:
        try:
            return source, load_checkpoint(source), []
        except OSError as error:
            raise UserError(f"{source}: cannot be read: {error.strerror}.") from None
    checkpoints = Checkpoints(run, 1)
    saved, complaints = checkpoints.newest()
    if saved is None:
        raise UserError(f"--from {source}: there is no checkpoint in it to begin from.")
    return checkpoints.chosen, saved, complaints


def _refused(changed: list[str], old: RunConfig, new: RunConfig) -> list[str]:
    """Of the lines of `config.conflicts` those of settings that a checkpoint does not let differ."""
    behind = _BEHIND
    if not (old.optim.freeze_epochs and new.optim.freeze_epochs):
        behind += ("optim.freeze_epochs",)  # which layers have a momentum already, and share a group, goes by it
    return [line for line in changed if not line.startswith(_AHEAD) or line.startswith(behind)]
