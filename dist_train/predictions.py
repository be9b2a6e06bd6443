"""What a network says of every sample of a split, as one CSV file that any number of ranks write together."""

import contextlib
import csv
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_train.durable import put_in_place
from dist_train.errors import UserError
from dist_train.index import ShardIndex
from dist_train.order import evaluation_share
from dist_train.ranks import meet, on_main

COLUMNS = ("sample", "name", "label", "predicted", "probability", "loss")


@contextlib.contextmanager
def predictions_file(path: Path, index: ShardIndex, split: str, world, every_class: bool) -> Iterator[Callable]:
    """Give what `evaluate` takes as `record`; at the end the file is there, a line a sample, in their order: whole or not at all.

    sample: the number in the stored split, as in evaluation-SPLIT.json. name: where it came from; empty where the set does not
    say. probability: of the predicted class; every_class adds a column for each. Each rank writes its share beside the file, so
    all hosts have to see that folder; rank zero joins them. Every rank of the job calls this, with world: runtime.World.
    Raises UserError where the file cannot be written.
    """
    source, folder = index.split(split), path.with_name(f"{path.name}.partial")
    shares = [evaluation_share(source.num_samples, rank, world.world_size) for rank in range(world.world_size)]
    parts = [folder / f"rank-{rank}.csv" for rank in range(world.world_size)]
    names = _names(source, shares[world.rank])
    on_main(world, _make_folder, path, folder)
    try:
        with _faults_of(path):
            file = open(parts[world.rank], "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed below
        try:
            writer = csv.writer(file, lineterminator="\n")
            if world.is_main:
                writer.writerow([*COLUMNS, *(f"probability of {name}" for name in index.classes if every_class)])
            yield functools.partial(_write_rows, path, writer, names, index.classes, every_class)
            with _faults_of(path):
                file.close()
        finally:
            with contextlib.suppress(OSError):
                file.close()
        meet(world)  # every part is whole
        on_main(world, _join, path, parts, [len(share) for share in shares])
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _names(source, share: range) -> Iterator[str]:
    names = source.names()
    if not names:
        return itertools.repeat("")
    if len(names) != source.num_samples:
        raise UserError(f"{source.folder}: {len(names):,} names for the {source.num_samples:,} samples of {source.name}.\n"
                        f"  See what is wrong with: dist-train verify {source.folder}")  # fmt: skip
    return iter(names[share.start : share.stop])


def _make_folder(path: Path, folder: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of the file that the predictions go to.")
    with _faults_of(path):
        if folder.is_dir():  # of an evaluation that was killed
            for part in folder.glob("rank-*.csv"):
                part.unlink()
            folder.rmdir()
        folder.mkdir()


def _write_rows(path: Path, writer, names, classes, every_class: bool, batch, predicted, probabilities, losses) -> None:
    """predicted: (N,) int64; probabilities: (N, K) and losses: (N,), float32."""
    of_predicted = probabilities.gather(1, predicted[:, None])[:, 0]
    columns = [
        batch.samples.tolist(), itertools.islice(names, len(batch)), [classes[k] for k in batch.labels.tolist()],
        [classes[k] for k in predicted.tolist()], _numbers(of_predicted), _numbers(losses),
    ]  # fmt: skip
    if every_class:
        columns += map(_numbers, probabilities.cpu().T)
    with _faults_of(path):
        writer.writerows(zip(*columns, strict=True))


def _numbers(values) -> list[str]:
    return [f"{value:.9g}" for value in values.tolist()]  # nine digits tell every float32 from its neighbours


def _join(path: Path, parts: list[Path], num_rows: list[int]) -> None:
    """Append the other parts to the first, which has the header, and put it in the file's place."""
    with _faults_of(path):
        with open(parts[0], "ab") as whole:
            for part, expected in zip(parts[1:], num_rows[1:], strict=True):
                found = 0
                with open(part, "rb") as file:
                    while chunk := file.read(1 << 22):
                        found += chunk.count(b"\n")  # names have none: each is a line of the index
                        whole.write(chunk)
                if found != expected:
                    raise UserError(f"{part}: {found:,} lines; expected {expected:,}.\n  Evaluate again, one job at a time.")
                part.unlink()  # or there would be room for all of it twice
        put_in_place(parts[0], path)


@contextlib.contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        part = Path(error.filename or path)
        raise UserError(f"{path}: the predictions cannot be written: {error.strerror}{'' if part == path else f': {part}'}.\n"
                        f"  Name a file in a folder that is there, with room, and seen by every rank.") from None  # fmt: skip
