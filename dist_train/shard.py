"""`dist-train shard`: the settings of a conversion read, the conversion started, its outcome shown."""

import dataclasses
import os
import sys
from pathlib import Path

from dist_train.errors import UserError
from dist_train.settings import read_config
from dist_train.shard_config import ShardConfig
from dist_train.streams import outlive_readers

_FLAGS = ("--join", "--repair", "--overwrite", "--download", "--extra")  # may stand alone, meaning true


@outlive_readers()
def main(argv: list[str]) -> None:
    """`dist-train shard [datasets/NAME.yaml] [--SETTING VALUE ...]`. Raises UserError."""
    config = read_shard_config(argv)
    if "numpy" not in sys.modules:  # its BLAS starts threads that spin: an eighth of a conversion of small files, for nothing
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if config.repair:
        from dist_train.repair import repair

        names = repair(config)
        print(f"{config.out}: whole; written again: {', '.join(names) or 'nothing, for nothing was damaged'}.")
        return
    from dist_train.convert import convert, convert_part  # after the settings, so that `--help` answers at once

    if config.part:
        num_shards = convert_part(config)
        print(f"{config.out}: part {config.part} is written, {num_shards} shards. When all parts are: the same with --join.")
        return
    index = convert(config)
    print_summary(index)
    print(f"{index.folder}: finished.")


def read_shard_config(argv: list[str]) -> ShardConfig:
    """Settings from the command line; `out` is filled in: shards/<name of the YAML file>."""
    argv = list(argv)
    for i, word in reversed(list(enumerate(argv))):
        if word in _FLAGS and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            argv.insert(i + 1, "true")
    files = [argv[0]] if argv and not argv[0].startswith("-") else []
    config = read_config(ShardConfig, argv[len(files) :], "dist-train shard [datasets/NAME.yaml]", files=files)
    files += [b for a, b in zip(argv, argv[1:], strict=False) if a == "--config"]
    files += [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if config.out:
        return config
    if not files:
        raise UserError("out: not set; expected the folder to write, such as --out shards/NAME.")
    return dataclasses.replace(config, out=str(Path("shards", Path(files[-1]).stem)))


def print_summary(index, most_classes: int = 30) -> None:
    """Print a class x split table of a ShardIndex, its sizes, and what is missing from it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("class", *index.splits, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    counts = list(zip(*(split.class_counts.tolist() for split in index.splits.values()), strict=True))
    for name, row in list(zip(index.classes, counts, strict=True))[:most_classes]:
        table.add_row(name, *(f"{count:,}" for count in row))
    if index.num_classes > most_classes:
        table.add_row(f"... {index.num_classes - most_classes} more", *[""] * len(index.splits))
    table.add_section()
    table.add_row("samples", *(f"{split.num_samples:,}" for split in index.splits.values()))
    table.add_row("shards", *(f"{split.num_shards:,}" for split in index.splits.values()))
    table.add_row("MB", *(f"{split.shard_bytes.sum() / 1e6:,.1f}" for split in index.splits.values()))
    console = Console(highlight=False, markup=False)
    console.print(table)
    if index.left_out:
        console.print(f"{len(index.left_out)} samples were left out; index.json names them.")
    empty = [name for name, row in zip(index.classes, counts, strict=True) if not all(row)]
    if empty:
        console.print(f"{len(empty)} classes have no sample in one of the splits: {', '.join(empty[:5])}")
