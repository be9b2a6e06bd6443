"""A run's network on new pictures or on a split: `dist-train predict` and `dist-train eval`."""

import argparse
import contextlib
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from dist_train import boxes, runtime
from dist_train.config import RunConfig, conflicts
from dist_train.confusion import class_table
from dist_train.csv_files import NO_CLASS, numbers_in, read_csv, refuse_decimal_commas, text_in, what_is_in
from dist_train.decode import DecodeError, decode_into, picture_size
from dist_train.errors import UserError
from dist_train.evaluate import Evaluation, evaluate, predict_logits, write_evaluation
from dist_train.folds import fold_view
from dist_train.index import ShardIndex, load_index
from dist_train.layers import use_keyed_dropout
from dist_train.models import build_model
from dist_train.predictions import predictions_file
from dist_train.pretrained import put_weights
from dist_train.settings import from_dict, read_config, to_dict
from dist_train.sizes import check_eval_size, range_problems, shift_problems
from dist_train.sources import PICTURES, files_below, first_of, printable
from dist_train.tables import CONSTANT_STD, NUM_TOLD, feature_places, most, text_places
from dist_train.watch import Watch

BATCH_SIZE = 64
ROWS_AT_ONCE = 65_536  # of a table


@dataclass(frozen=True)
class Trained:
    """A finished run, ready to predict: what `inference.json` and `config.yaml` hold, and the network."""

    folder: Path
    config: RunConfig
    network: torch.nn.Module
    classes: list[str]
    mean: list[float]
    std: list[float]
    features: list[str] | None
    network_size: tuple[int, int] | None  # that the network is built for
    image_size: tuple[int, int] | None  # that enters it here
    eval_crop: float
    fills_holes: bool  # missing values of a table count as their column's mean: its set was made with `missing: mean`


def load_run(folder: str | Path) -> Trained:
    """Read a run folder. Raises UserError if it holds no finished run, or weights that do not fit."""
    folder = Path(folder)
    try:
        config = from_dict(RunConfig, yaml.safe_load((folder / "config.yaml").read_text()))
        about = json.loads((folder / "inference.json").read_text())
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such run folder.") from None
        if (missing := Path(error.filename).name) == "config.yaml":
            raise UserError(f"{folder}: no run is in this folder: it has no config.yaml.\n  Give the folder of a finished "
                            f"training, runs/NAME: it holds config.yaml, inference.json and weights.safetensors."
                            ) from None  # fmt: skip
        raise UserError(f"{folder}: not a finished run: it has no {missing}.\n  Finish it with: "
                        f"dist-train train --config {folder / 'config.yaml'} --run {folder} --resume") from None  # fmt: skip
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: the run cannot be read: {error}") from None
    size = tuple(about["image_size"]) if about["image_size"] else None
    eval_size = tuple(about.get("eval_size") or about["image_size"]) if size else None
    num_features = len(about["features"]) if about["features"] else None
    fresh = replace(config.model, pretrained="")  # the run's own weights follow
    network = build_model(fresh, len(about["classes"]), size, num_features, config.seed)
    use_keyed_dropout(network)
    try:
        put_weights(network, load_file(folder / "weights.safetensors"))
    except Exception as error:
        raise UserError(f"{folder}/weights.safetensors: the weights cannot be loaded: {error}") from None
    return Trained(
        folder=folder, config=config, network=network.eval(), classes=about["classes"], mean=about["mean"], std=about["std"],
        features=about["features"], network_size=size, image_size=eval_size, fills_holes=about.get("missing") == "mean",
        eval_crop=about["eval_crop"] if not about["one_size"] or "stored_size" in about else 0.0,  # once for many sizes only
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """`dist-train predict RUN PATH... [--top 5] [--json]`: returns 2 if some files or rows could not be read, else 0.

    These go to stderr, with --json to stdout like the others; their number is the last line of stderr.
    """
    parser = argparse.ArgumentParser(prog="dist-train predict", description="Classify picture files, or all in a folder.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("paths", nargs="+", help="picture files or folders; a CSV file for a run on a table")
    parser.add_argument("--top", type=int, default=5, help="classes shown per picture")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    if options.top < 1:
        raise UserError(f"--top is {options.top}; expected 1 class or more.")
    if (num_ranks := runtime.num_launched()) > 1:  # each would print every line
        raise UserError(f"dist-train predict: the launcher started {num_ranks} processes; expected one.\n"
                        f"  Start it without a launcher; several at once on different files, if one takes too long.")  # fmt: skip
    trained = load_run(options.run)
    paths = options.paths if trained.features is not None else _picture_paths(options.paths)
    accelerator, world = runtime.start(runtime.precision_here(trained.config.train.precision), 0, 60)
    with contextlib.ExitStack() as leaving:
        leaving.push(runtime.leave)
        if trained.features is not None:
            inputs = _table_batches(trained, paths)
        else:
            inputs = picture_batches(trained, paths, trained.config.data.threads or world.num_cores)
        leaving.enter_context(contextlib.closing(inputs))
        trained.network.to(accelerator.device)
        num_good = num_bad = 0
        for names, values, complaints in inputs:
            num_good, num_bad = num_good + len(names), num_bad + len(complaints)
            for name, reason in complaints:
                if options.json:
                    print(json.dumps({"path": name, "error": reason}))
                else:
                    print(f"{printable(name)}: {reason}", file=sys.stderr)
            if not names:
                continue
            with torch.no_grad():
                logits = predict_logits(trained.config, trained, trained.network, values.to(accelerator.device), accelerator)
            probabilities, labels = logits.softmax(1).topk(min(options.top, len(trained.classes)))
            for name, ps, ks in zip(names, probabilities.tolist(), labels.tolist(), strict=True):
                top = [{"class": trained.classes[k], "probability": round(p, 6)} for p, k in zip(ps, ks, strict=True)]
                if options.json:
                    print(json.dumps({"path": name, **top[0], "top": top}))
                else:
                    print(f"{printable(name):40}  " + "  ".join(f"{t['class']} {t['probability']:.1%}" for t in top))
    if num_bad:
        print(f"{num_bad:,} of {num_good + num_bad:,} could not be read", file=sys.stderr)
    return 2 if num_bad else 0


def eval_main(argv: list[str]) -> None:
    """`dist-train eval RUN --split test [--predictions FILE] [--SECTION.KEY VALUE ...]`; the last line is a JSON object."""
    parser = argparse.ArgumentParser(
        prog="dist-train eval", description="Figures of a run on a split of its shards.",
        epilog="Other options are those of dist-train train, such as --data.shards OTHER.",
    )  # fmt: skip
    parser.add_argument("run", help="run folder")
    parser.add_argument("--split", help="split; default test, or where there is none the run's data.val_split")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--predictions", metavar="FILE", help="write a CSV file: a line for each sample, in their order")
    parser.add_argument("--probabilities", action="store_true", help="with a column for each class in that file")
    options, overrides = parser.parse_known_args(argv)
    if options.probabilities and not options.predictions:
        raise UserError("--probabilities adds columns to a file that is not named: add --predictions FILE.csv.")
    trained = load_run(options.run)
    config = read_config(RunConfig, overrides, "dist-train eval", [str(trained.folder / "config.yaml")])
    index = fold_view(load_index(config.data.shards, config.data.cache_dir, config.data.cache_gb), config)
    check_fits(index, trained)
    split = options.split or usual_split(index, config)
    if split is None:
        raise UserError(f"{options.run}: the run leaves no split to judge it on.\n  Name one of {', '.join(index.splits)} with "
                        f"--split; {config.data.train_split} is what it was trained on.")  # fmt: skip
    if changed := conflicts({"model": to_dict(trained.config.model)}, {"model": to_dict(config.model)}):
        raise UserError(f"dist-train eval: the network is the run's.\n  {'; '.join(changed)}\n  Leave it out.")
    if changed := conflicts(_normalising(trained.config), _normalising(config)):
        raise UserError(f"dist-train eval: values are normalised as in training.\n  {'; '.join(changed)}\n  Leave it out.")
    if problems := range_problems(config) + shift_problems(config, index):
        raise UserError("\n".join(problems))
    if config.data.eval_size:
        check_eval_size(config, index, trained.network)
    accelerator, world = runtime.start(config.train.precision, config.runtime.threads, config.runtime.timeout_s)
    with contextlib.ExitStack() as leaving:
        leaving.push(runtime.leave)
        leaving.enter_context(Watch(world, config.runtime.timeout_s, runtime.master_address()))
        trained.network.to(world.device)
        as_trained = _with_statistics(index, trained)
        recording = contextlib.nullcontext(lambda *of_batch: None)
        if options.predictions:
            recording = predictions_file(Path(options.predictions), index, split, world, options.probabilities)
        with recording as record:
            evaluation = evaluate(config, as_trained, split, trained.network, accelerator, world,
                                  config.data.eval_crop if trained.eval_crop else 0.0, record=record)  # fmt: skip
        if world.is_main:
            _keep(trained, config, evaluation, index.split(split).fingerprint())
            if not options.json:
                for row in class_table(evaluation.result.confusion.numpy(), trained.classes):
                    print(_class_line(row))
            print(json.dumps({"split": split, **evaluation.result.figures()}))


def usual_split(index: ShardIndex, config: RunConfig) -> str | None:
    """The split that figures are of where none is named; None where all that may be seen is trained on."""
    test, val = config.data.test_split, config.data.val_split
    names = (val,) if test in ("", "none") else (test, "test", val)  # a test split that the run leaves unseen stays so
    return next((name for name in names if index.find(name)), None)


def _normalising(config: RunConfig) -> dict:
    return {"data": {"mean": list(config.data.mean), "std": list(config.data.std)}}


def _class_line(row: dict) -> str:
    """A row of `confusion.class_table`; a figure that is undefined, such as the precision of a class never predicted, is -."""
    figures = [f"{key} {'-' if row[key] is None else format(row[key], '.4f'):6}" for key in ("precision", "recall", "f1")]
    return f"{row['name']:24} {row['count']:7,} samples   {'   '.join(figures)}".rstrip()


def _keep(trained: Trained, config: RunConfig, evaluation: Evaluation, fingerprint: str) -> None:
    """Write the figures into the run, unless other settings made them or those of a split of that name are another set's."""
    path = trained.folder / f"evaluation-{evaluation.split}.json"
    if changed := conflicts(to_dict(trained.config), to_dict(config)):
        print(f"{path}: left as it is; these figures are of other settings: {'; '.join(changed)}.", file=sys.stderr)
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(path.read_text()).get("fingerprint", fingerprint) != fingerprint:
            print(f"{path}: left as it is, of another set; remove it to keep these figures there.", file=sys.stderr)
            return
    write_evaluation(trained.folder, evaluation, fingerprint)


def check_fits(index: ShardIndex, trained: Trained) -> None:
    """Raise UserError where a set's classes, or a table's columns, are not those that a run was trained on."""
    for what, there, here in (("classes", index.classes, trained.classes), ("columns", index.features, trained.features)):
        if there != here:
            told = _differences(there or [], here or [])
            if what == "columns" and there and here and {*there} != {*here}:
                told += "\n  A table's columns follow from all rows of its file: convert both in one, with --split-column."
            raise UserError(f"{index.folder}: its {what} are not those of {trained.folder}: {told}")


def _differences(there: list[str], here: list[str]) -> str:
    """What two lists of names do not share, or from where on their order differs."""
    of_there, of_here = set(there), set(here)
    lacking, besides = [name for name in here if name not in of_there], [name for name in there if name not in of_here]
    if not lacking and not besides:
        first = next((k for k, (one, other) in enumerate(zip(there, here, strict=False)) if one != other), 0)
        return f"in another order: {_few(there[first:])} there, {_few(here[first:])} here."
    parts = [f"lacks {_few(lacking)}" if lacking else "", f"has {_few(besides)} besides" if besides else ""]
    return f"it {' and '.join(filter(None, parts))}."


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5:,} more' if len(names) > 5 else ''}"


def _with_statistics(index, trained: Trained):
    """The index with the run's own mean and standard deviation: those it was trained with."""
    return replace(index, mean=trained.mean, std=trained.std)


def _picture_paths(paths: list[str]) -> list[str]:
    found = []
    for path in paths:
        if os.path.isdir(path):
            inside = [str(file) for file in files_below(Path(path), PICTURES)]
            if not inside:
                raise UserError(f"{path}: no pictures in this folder; expected {', '.join(PICTURES)}.")
            found += inside
        elif os.path.isfile(path):
            found.append(path)
        else:
            raise UserError(f"{path}: there is no such file or folder.")
    return found


def picture_batches(trained: Trained, paths: list[str], num_threads: int) -> Iterator[tuple]:
    """Yield (names, uint8 (N, 3, H, W), [(name, reason) of unreadable ones]), prepared as evaluation prepares them.

    In the order of the paths; the next batch is decoded, by num_threads, while one is used.
    """
    height, width = trained.image_size

    def decode(path: str, out: np.ndarray) -> str | None:
        """Decode a file into out, (H, W, 3) uint8; return why it cannot be, or None."""
        try:
            payload = Path(path).read_bytes()
            box = None
            if trained.eval_crop:
                rows, columns = (np.array([side]) for side in picture_size(payload))
                box = tuple(boxes.central_boxes(rows, columns, (height, width), trained.eval_crop)[0])
            decode_into(payload, out, box, trained.config.data.interpolation)
        except (OSError, DecodeError) as error:
            return getattr(error, "strerror", None) or str(error)
        return None

    def collected(part: list[str], pixels: np.ndarray, futures: list) -> tuple:
        reasons = [future.result() for future in futures]
        good = [i for i, reason in enumerate(reasons) if reason is None]
        values = torch.from_numpy(pixels if len(good) == len(part) else pixels[good]).permute(0, 3, 1, 2) if good else None
        complaints = [(path, reason) for path, reason in zip(part, reasons, strict=True) if reason is not None]
        return [part[i] for i in good], values, complaints

    pool, started = ThreadPoolExecutor(num_threads, "decode"), deque()
    try:
        for first in range(0, len(paths), BATCH_SIZE):
            part = paths[first : first + BATCH_SIZE]
            pixels = np.empty((len(part), height, width, 3), np.uint8)
            started.append((part, pixels, [pool.submit(decode, path, out) for path, out in zip(part, pixels, strict=True)]))
            if len(started) > 1:
                yield collected(*started.popleft())
        if started:
            yield collected(*started.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _table_batches(trained: Trained, paths: list[str]) -> Iterator[tuple]:
    """Yield (names, float32 (N, F), [(name, reason)]) for ROWS_AT_ONCE rows of CSV files with the columns of the run.

    What `_feature_values` has to say of a file goes to stderr. What is missing is NaN where the run fills holes, which
    `standardised` does; elsewhere it is a complaint.
    """
    for path in paths:
        header, rows, lines = read_csv(Path(path))
        values, columns, notes = _feature_values(Path(path), header, rows, lines, trained)
        for note in notes:
            print(f"{path}: {note}", file=sys.stderr)
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = values[first : first + ROWS_AT_ONCE]
            bad = np.isinf(part) if trained.fills_holes else ~np.isfinite(part)
            good, names, complaints = ~bad.any(axis=1), [], []
            for r, is_good in enumerate(good.tolist(), first):
                if is_good:
                    names.append(f"{path}:{lines[r]}")
                    continue
                column = columns[int(bad[r - first].argmax())]
                complaints.append((f"{path}:{lines[r]}", _why_not(header[column], rows[r][column])))
            yield names, torch.from_numpy(part[good]) if names else None, complaints


def _why_not(name: str, cell: str) -> str:
    if cell.strip().lower() not in NO_CLASS:
        return f"not a number: column {name} is {cell[:40]!r}"
    return f"{what_is_in(name, cell)}; shard with --missing mean to predict such rows"


def _feature_values(
    path: Path, header: list[str], rows: list[list[str]], lines: list[int], trained: Trained
) -> tuple[np.ndarray, list[int], list[str]]:
    """A run's features of the rows of a file, (N, F) float32, the column of each feature, and lines for the user.

    NaN for what is no number, an infinity for what float32 cannot hold; a text that the run does not know is 0 in every feature of
    its column, as is one of which nothing was learnt and that the file does not have. Where the run fills holes, NaN counts as the
    column's mean, and the lines say of which cells. Raises UserError as `feature_places` does, and on decimal commas.
    """
    untaught = {name for name, std in zip(trained.features, trained.std, strict=True) if std == CONSTANT_STD}
    places, notes = feature_places(path, header, trained.features, untaught), []
    values = np.zeros((len(rows), len(places)), np.float32)
    for c in dict.fromkeys(c for c, _ in places if c >= 0):
        cells = [row[c] for row in rows]
        known = {text: k for k, (other, text) in enumerate(places) if other == c}
        if (k := known.pop("", None)) is not None and header[c] not in untaught:
            values[:, k] = numbers = numbers_in(cells)
            refuse_decimal_commas(path, header[c], cells, numbers, lines)
        if known:
            text_of = {cell: text_in(cell) for cell in {*cells}}
            of_cells = text_places(cells, text_of, list(known))
            for place, k in enumerate(known.values()):
                values[:, k] = of_cells == place
            found = Counter(text for r in np.flatnonzero(of_cells < 0).tolist() if (text := text_of[cells[r]]))
            few = first_of([repr(text[:40]) for text, _ in found.most_common()], NUM_TOLD)
            notes += [f"column {header[c]}: {found.total():,} cells have a text that the run does not know, and count as none of "
                      f"its texts: {few}"] if found else []  # fmt: skip
    if trained.fills_holes:
        columns = {k: c for k, (c, text) in enumerate(places) if not text and c >= 0}
        notes += _told_holes(header, rows, values, columns)
    return values, [c for c, _ in places], notes


def _told_holes(header: list[str], rows: list[list[str]], values: np.ndarray, columns: dict[int, int]) -> list[str]:
    """Lines on what counts as a mean, empty cells and others apart. columns: {feature: column} of those of numbers."""
    empty, texts, finite = Counter(), Counter(), np.ones(len(rows), bool)
    for k in columns:
        finite &= ~np.isinf(values[:, k])  # other rows are not predicted
    for k, c in columns.items():
        for r in np.flatnonzero(np.isnan(values[:, k]) & finite).tolist():
            (empty if rows[r][c].strip().lower() in NO_CLASS else texts)[header[c]] += 1
    return [
        f"{found.total():,} {what} count as their column's mean in training: {most(found)}."
        for what, found in (("missing values", empty), ("cells with text in columns of numbers", texts)) if found
    ]  # fmt: skip
