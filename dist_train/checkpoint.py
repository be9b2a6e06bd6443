"""Checkpoints: whole or absent, proven before they are used, the previous one kept until then.

    runs/NAME/checkpoints/step-00000500/
        model.safetensors  ema.safetensors  optimizer.safetensors   tensors by name
        state.json                                                  everything that is not a tensor
        manifest.json                                               xxh3_128 of each file, written last

A checkpoint is written into a folder named *.partial, synced and renamed. Nothing in it is ever unpickled.
"""

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file

from dist_train.durable import put_in_place, replace_json, replace_text, sync
from dist_train.errors import UserError
from dist_train.index import file_checksum
from dist_train.ranks import on_main
from dist_train.runtime import World

_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_SHOWN_LATE_S = 60.0  # network file systems may show a new folder to another machine so much later: NFS by default


@dataclass(frozen=True)
class Saved:
    """One checkpoint in memory. tensors: file stem -> name -> tensor; state: what is not a tensor, JSON values."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict


class AllDamaged(UserError):
    """A run has checkpoints, and none of them is whole."""


class Checkpoints:
    """The checkpoints of a run folder. Saving copies the tensors and writes them in the background.

    keep: newest ones kept; the one named best is kept besides.
    """

    def __init__(self, run_folder: Path, keep: int):
        self.folder, self.keep = run_folder / "checkpoints", max(1, keep)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.chosen: Path | None = None  # what `newest` has given
        self._damaged: set[Path] = set()  # what it has passed over

    def save(self, saved: Saved, is_best: bool) -> None:
        """Copy now, write in the background; waits for the one before. Raises UserError if that one failed."""
        self.wait()
        copies = {stem: {k: t.detach().to("cpu", copy=True) for k, t in named.items()} for stem, named in saved.tensors.items()}
        saved = Saved(saved.step, copies, {**saved.state, "is_best": is_best})
        self._thread = threading.Thread(target=self._write, args=(saved, is_best), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is safe on disk. Raises UserError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(
                f"{self.folder}: the checkpoint could not be written: {error}.\n"
                f"  The previous one is untouched. Make room or mend the disk, then go on with --resume."
            ) from error

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait_together(self, world: World) -> None:
        """`wait` for rank zero on every rank, which all raise what it raises.

        Launchers end the others soon after the first has left, and rank zero may still write.
        """
        on_main(world, self.wait)

    def finished(self) -> list[Path]:
        """The folders of the checkpoints there, whole or damaged; oldest first."""
        return sorted((p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=_place)

    def put(self, saved: Saved) -> Path:
        """Write a checkpoint and return its folder. Raises OSError, leaving nothing behind."""
        path = self._free_name(saved.step)
        write_checkpoint(path, saved)
        return path

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest whole checkpoint, or None where there is none; and a line for each damaged one that was passed over.

        Raises UserError if one cannot be read, for it may be whole, and if all are damaged: nothing is begun anew over them.
        """
        complaints = []
        for path in reversed(self.finished()):
            try:
                saved = load_checkpoint(path)
                self.chosen = path
                return saved, complaints
            except UserError as error:
                complaints.append(f"{error}\n  Going back to the one before.")
                self._damaged.add(path)
            except OSError as error:
                raise _unreadable(path, error) from None
        self.chosen = None
        if complaints:
            raise AllDamaged("\n".join(complaints) + "\n  No whole checkpoint is left. Begin anew in another folder (--run).")
        return None, complaints

    def agree_on_newest(self, world: World) -> tuple[Saved | None, list[str]]:
        """What `newest` gives on rank zero, on every rank: another machine may not see the same folders yet.

        All read at once; who has found another one than rank zero reads again. Raises UserError on a rank that cannot.
        """
        saved = None

        def read() -> tuple[Path | None, list[str]]:
            nonlocal saved
            saved, complaints = self.newest()
            return self.chosen, complaints

        if not world.is_main:
            with contextlib.suppress(UserError):  # what is wrong here may be right once rank zero is done
                read()
        path, complaints = on_main(world, read)
        if path is None or path == self.chosen:
            return (saved if path else None), complaints
        return self._shown_late(path), complaints

    def _shown_late(self, path: Path) -> Saved:
        deadline = time.monotonic() + _SHOWN_LATE_S
        while True:
            try:
                return load_checkpoint(path)
            except (UserError, OSError) as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{error}\n  Rank zero has read it. Is the run folder on a disk that all machines share?"
                    ) from None
            time.sleep(1)

    def name_best(self, path: Path) -> None:
        """Say which checkpoint is the best so far."""
        replace_json(self.folder / "best.json", {"checkpoint": path.name}, indent=None)

    def has_best(self, saved: Saved) -> bool:
        """Whether the best checkpoint, as of the one that `newest` has given, is there."""
        if saved.state.get("is_best"):
            self.name_best(self.chosen)  # again: a kill may have come before it was said
            return True
        best = self.best_path()
        if best is None or _place(best) > _place(self.chosen):  # a later one was damaged
            return False
        try:
            return bool(proven_files(best))
        except UserError:
            return False
        except OSError as error:
            raise _unreadable(best, error) from None

    def best_path(self) -> Path | None:
        """Folder of the best checkpoint so far, if any. Raises UserError where best.json cannot be read."""
        named = self.folder / "best.json"
        try:
            name = json.loads(named.read_text())["checkpoint"]
            is_one = bool(_NAME.fullmatch(name))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{named}: cannot be read: {error}.\n  Put it right ({{\"checkpoint\": \"step-...\"}}).") from None
        return self.folder / name if is_one and (self.folder / name).is_dir() else None

    def _free_name(self, step: int) -> Path:
        """step-00000500; or step-00000500-1 and so on for the same step again, since nothing whole is ever written over."""
        before = [path for path in self.finished() if _place(path)[0] == step]
        return self.folder / (f"step-{step:08d}-{_place(before[-1])[1] + 1}" if before else f"step-{step:08d}")

    def _write(self, saved: Saved, is_best: bool) -> None:
        try:
            path = self.put(saved)
            if is_best:
                self.name_best(path)
        except Exception as error:  # handed to the training thread: a full disk raises various types
            self._error = error
            return
        try:
            self._prune(path)
        except (OSError, UserError) as error:  # what stays is looked at again after the next one
            print(f"{self.folder}: older checkpoints stay: {error}", file=sys.stderr, flush=True)

    def _prune(self, newest: Path) -> None:
        """Drop old checkpoints; only ever called once a newer one is on disk and proven."""
        up_to_it = [path for path in self.finished() if _place(path) <= _place(newest) and path not in self._damaged]
        kept = {*up_to_it[-self.keep :], self.best_path()}
        for path in self.finished():
            if path not in kept:  # those of later steps were damaged, or the run would have gone on from there
                doomed = path.with_suffix(".partial")  # half a deletion must not look like a checkpoint
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(path, doomed)
                shutil.rmtree(doomed)


def wait_until_shown(folder: Path) -> None:
    """Return once this machine sees what rank zero has written there. Raises UserError where it does not in a minute."""
    deadline = time.monotonic() + _SHOWN_LATE_S
    while not (folder / "config.yaml").exists():
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: {platform.node()} does not see the run folder that rank zero has written.\n"
                            f"  Put it on a disk that all machines share (--run).")  # fmt: skip
        time.sleep(0.5)


def write_checkpoint(path: Path, saved: Saved) -> None:
    """Write one checkpoint folder: beside its place, synced, renamed. Raises OSError, leaving nothing behind."""
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        names = {stem: f"{stem}.safetensors" for stem in sorted(saved.tensors)}
        checksums = {name: write_tensors(partial / name, saved.tensors[stem]) for stem, name in names.items()}
        state = partial / "state.json"
        state.write_text(json.dumps({"step": saved.step, **saved.state}, indent=1))
        sync(state)
        checksums[state.name] = file_checksum(state)
        replace_text(partial / "manifest.json", _manifest(checksums))
        put_in_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(path: Path, named: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> str:
    """Write a .safetensors file; once it is on the disk and reads back, return its xxh3_128, hex. Raises OSError.

    about: text kept in its head. The format is safetensors' (github.com/huggingface/safetensors); its own save_file closes its
    descriptor, the only one that is told of writes that failed, without a look, and lets nobody but the owner read the file (0.8).
    """
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))  # so that each begins at a multiple of its own
    head, end = {"__metadata__": about} if about else {}, 0
    for name in order:
        first, end = end, end + named[name].nbytes
        head[name] = {"dtype": _DTYPES[named[name].dtype], "shape": list(named[name].shape), "data_offsets": [first, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with open(path, "wb") as file:
        for part in itertools.chain((len(text).to_bytes(8, "little"), text), (_bytes_of(named[name]) for name in order)):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    if file_checksum(path) != digest.hexdigest():
        raise OSError(errno.EIO, "what was written does not read back", str(path))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_checkpoint(path: Path) -> Saved:
    """Read a checkpoint, every file checked against the manifest first.

    Raises UserError naming what is damaged, OSError where that cannot be told.
    """
    names = proven_files(path)
    state = json.loads((path / "state.json").read_text())
    tensors = {  # copies: load_file maps the file, and a mapped one that is removed stays in the way on NFS
        Path(name).stem: {key: t.clone() for key, t in load_file(path / name).items()}
        for name in names if name.endswith(".safetensors")
    }  # fmt: skip
    return Saved(state.pop("step"), tensors, state)


def proven_files(path: Path) -> list[str]:
    """The names of a checkpoint's files, each of which is whole.

    Raises UserError naming what is damaged, OSError where that cannot be told.
    """
    try:
        text = (path / "manifest.json").read_bytes()
        manifest = json.loads(text)["files"]
        is_whole = text == _manifest(manifest).encode()
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path}: the checkpoint has no readable manifest.json ({error}).") from None
    if not is_whole:
        raise UserError(f"{path}/manifest.json: its own checksum does not match; the checkpoint is damaged.")
    for name, checksum in manifest.items():
        try:
            found = file_checksum(path / name)
        except FileNotFoundError:
            raise UserError(f"{path / name}: the checkpoint lacks this file.") from None
        if found != checksum:
            raise UserError(f"{path / name}: checksum differs from the manifest; the checkpoint is damaged.")
    return list(manifest)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[dict, dict]:
    """Split an optimizer's state into tensors by "<parameter>/<entry>" and JSON values. names: id(parameter) -> name."""
    tensors, values = {}, {}
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            target = tensors if isinstance(value, torch.Tensor) else values
            if value is not None:
                target[f"{names[id(parameter)]}/{entry}"] = value
    return tensors, values


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict, values: dict, parameters: dict) -> None:
    """The inverse of `optimizer_tensors`. parameters: name -> parameter. Raises UserError on names that do not fit."""
    optimizer.state.clear()
    counts_on_device = {
        p for group in optimizer.param_groups if group.get("fused") or group.get("capturable") for p in group["params"]
    }
    for key, value in (tensors | values).items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise UserError(f"the checkpoint's optimizer has a state for {name}, which this model lacks.")
        parameter = parameters[name]
        if isinstance(value, torch.Tensor):
            # step counters stay on the host unless the optimizer is fused or capturable, as torch itself keeps them
            value = value.to(parameter.device) if value.dim() or parameter in counts_on_device else value
        optimizer.state[parameter][entry] = value


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{error.filename or path}: cannot be read: {error.strerror or error}. The checkpoint may be whole.\n"
        f"  See to the disk, then go on with --resume."
    )


def _place(path: Path) -> tuple[int, int]:
    """(step, how often that step was written before) of a checkpoint's folder."""
    step, again = _NAME.fullmatch(path.name).groups()
    return int(step), int(again or 0)


def _manifest(checksums: dict[str, str]) -> str:
    own = xxhash.xxh3_128_hexdigest(json.dumps(checksums, sort_keys=True).encode())
    return json.dumps({"files": checksums, "checksum": own}, indent=1) + "\n"
