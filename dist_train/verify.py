"""`dist-train verify` and `dist-train inspect`: is every byte of a set as it was written, and what is in it."""

import argparse
import functools
import json
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dist_train.errors import UserError
from dist_train.index import SAMPLE, ShardIndex, SplitIndex, file_checksum, load_index
from dist_train.remote import is_remote, on_disk, shown
from dist_train.settings import flatten, to_dict
from dist_train.shard_config import ShardConfig
from dist_train.tars import BLOCK, is_header
from dist_train.workers import num_cores

_NAMED = 5  # damaged samples named per shard; more are counted


@dataclass(frozen=True)
class Damage:
    """A line for everything that is not as the index says, by what mends it. num_fetched: shards that came from their URL now."""

    tables: list[str]
    shards: list[str]
    strays: list[str]
    num_fetched: int

    @property
    def lines(self) -> list[str]:
        return [*self.tables, *self.shards, *self.strays]


def main(argv: list[str]) -> None:
    """`dist-train verify shards/NAME`: check every byte, print a summary, or raise UserError with all that is wrong."""
    parser = argparse.ArgumentParser("dist-train verify", description="Check every byte of a set of shards.")
    parser.add_argument("folder", metavar="shards/NAME", help="folder with an index.json, or its URL")
    parser.add_argument("--cache-dir", default="", help="where shards behind URLs are kept, as data.cache_dir")
    options = parser.parse_args(argv)
    index = load_index(on_disk(options.folder), options.cache_dir)
    damage = damage_of(index)
    if damage.lines:
        raise UserError("\n".join([*damage.lines, advice(index, damage)]))
    splits = index.splits.values()
    samples, shards = sum(s.num_samples for s in splits), sum(s.num_shards for s in splits)
    megabytes = sum(int(s.shard_bytes.sum()) for s in splits) / 1e6
    name = shown(options.folder) if is_remote(on_disk(options.folder)) else index.folder
    print(f"{name}: whole. {samples:,} samples in {shards:,} shards, {megabytes:,.1f} MB, all as in the index.")
    if remote := next((split.remote for split in splits if split.remote), None):
        num_kept = shards - damage.num_fetched
        print(f"  {damage.num_fetched:,} of the shards were fetched, {num_kept:,} are proven by the copies kept in "
              f"{remote.cache.folder}.")  # fmt: skip
        if num_kept:
            print("  To fetch all of them, name an empty folder with --cache-dir.")


def inspect_main(argv: list[str]) -> None:
    """`dist-train inspect shards/NAME [--out FILE]`: counts, classes, sizes, and a picture of samples per class."""
    parser = argparse.ArgumentParser("dist-train inspect", description="Show what is in a set of shards.")
    parser.add_argument("folder", metavar="shards/NAME")
    parser.add_argument("--out", metavar="FILE", help="FILE.png or FILE.html; default shards/NAME/inspect.png, of a table both")
    options = parser.parse_args(argv)
    index = load_index(on_disk(options.folder))
    from dist_train.contact_sheet import draw_samples, print_facts

    print_facts(index)
    out = Path(options.out or Path(index.folder, "inspect.png"))
    print(f"samples of each class: {draw_samples(index, out)}")
    if index.features and not options.out:
        print(f"correlations and pairs of features: {draw_samples(index, out.with_suffix('.html'))}")


def damage_of(index: ShardIndex) -> Damage:
    """What is not as the index says: missing, truncated, changed and stray files, and for a changed shard the samples it
    concerns, with their positions in the file."""
    tables, shards, num_fetched = [], [], 0
    for split in index.splits.values():
        tables += _check_table(index, split)
        check = functools.partial(_check_shard, is_foreign=index.is_foreign)
        if split.remote:
            num_fetched += sum(not split.remote.is_kept(split, number) for number in range(split.num_shards))
            check = _check_remote_shard
        with ThreadPoolExecutor(num_cores()) as pool:  # reading and hashing leave the interpreter lock alone
            shards += filter(None, pool.map(functools.partial(check, split), range(split.num_shards)))
    strays = [f"{path}: not in the index; expected only the shards it lists." for path in _strays(index)]
    return Damage(tables, shards, strays, num_fetched)


def _strays(index: ShardIndex) -> list[str]:
    """Tars beside those of a set that owns its folder: not of one indexed elsewhere, or named tar by tar."""
    if "tars" in index.source or any(split.remote for split in index.splits.values()):
        return []
    known = {str(Path(index.folder, file)) for split in index.splits.values() for file in split.files}
    folders = {Path(index.folder), *(Path(path).parent for path in known)}
    found = (path for folder in folders for path in folder.glob("*.tar") if not path.name.startswith("."))
    return sorted(str(path) for path in found if str(path) not in known)


def _check_table(index: ShardIndex, split: SplitIndex) -> list[str]:
    path = Path(split.folder, f"{split.name}.samples.npy")
    if not path.exists():
        return [f"{path}: missing; it holds the position of every sample."]
    if file_checksum(path) != split.rows_checksum:
        return [f"{path}: checksum differs from the index; positions and labels in it cannot be trusted."]
    counts = np.bincount(split.table()["label"], minlength=index.num_classes)
    problems = [] if (counts == split.class_counts).all() else [f"{path}: its labels do not add up to the index's counts."]
    names = path.with_name(f"{split.name}.names.txt")
    names_checksum = split.table_files.get(names.name)
    if names_checksum and not names.exists():
        problems.append(f"{names}: missing; it says where every sample came from.")
    elif names_checksum and file_checksum(names) != names_checksum:
        problems.append(f"{names}: checksum differs from the index; it says where every sample came from.")
    return problems


def _check_remote_shard(split: SplitIndex, number: int) -> str:
    """What is wrong with a shard behind a URL, or nothing; it is fetched unless a copy is kept."""
    try:
        for _ in range(2):  # a kept copy may have been damaged since it was fetched and compared: fetch it again
            if file_checksum(split.remote.open(split, number)) == split.shard_checksums[number]:
                return ""
            if not split.remote.discard(split, number):
                return f"{split.remote.shown(split, number)}: the kept copy is damaged, and in use by others."
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{split.remote.shown(split, number)}: cannot be read: {error.strerror}."
    return f"{split.remote.shown(split, number)}: the kept copy is damaged, fetched anew as well: its disk fails."


def _check_shard(split: SplitIndex, number: int, is_foreign: bool) -> str:
    """What is wrong with a shard on the disk, or nothing."""
    path = Path(split.folder, split.files[number])
    try:
        size = path.stat().st_size
        if size == split.shard_bytes[number] and file_checksum(path) == split.shard_checksums[number]:
            return ""
    except FileNotFoundError:
        return f"{path}: missing; {split.shard_samples[number]:,} samples were in it."
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}."
    expected = int(split.shard_bytes[number])
    what = f"{size:,} bytes long; expected {expected:,}" if size != expected else "checksum differs from the index"
    try:
        damage = [
            f"{part} of sample {sample:08d}{name} at byte {at:,}" for part, sample, name, at in _damaged(split, number, is_foreign)
        ]
    except UserError:
        return f"{path}: {what}. Which samples are hit cannot be told without the table."
    more = f", and {len(damage) - _NAMED} more" if len(damage) > _NAMED else ""
    nothing = "no sample: the bytes between or after them"
    if is_foreign:
        nothing = "no picture or vector; labels or names may have changed"
    where = ", ".join(damage[:_NAMED]) + more if damage else nothing
    return f"{path}: {what} ({where})."


def _damaged(split: SplitIndex, number: int, is_foreign: bool) -> Iterator[tuple[str, int, str, int]]:
    """(what, sample number, its name, position in the file) of every payload, header and label that was changed.

    is_foreign: labels may stand anywhere and be names; of them nothing is said.
    """
    first, last = int(split.first[number]), int(split.first[number + 1])
    rows, names = np.asarray(split.table()[first:last], SAMPLE), split.names()
    with open(Path(split.folder, split.files[number]), "rb") as file:
        for sample, row in enumerate(rows, first):
            offset, size = int(row["offset"]), int(row["size"])
            name = f" ({names[sample]})" if len(names) > sample else ""
            file.seek(offset)
            payload = file.read(size)
            if len(payload) < size or xxhash.xxh3_64_intdigest(payload) != row["checksum"]:
                yield "payload", sample, name, offset
            file.seek(offset - BLOCK)
            if not is_header(file.read(BLOCK)):
                yield "header", sample, name, offset - BLOCK
            if is_foreign:
                continue
            label_at = offset + -(-size // BLOCK) * BLOCK
            file.seek(label_at)
            member = file.read(2 * BLOCK)
            if not is_header(member[:BLOCK]):
                yield "label's header", sample, name, label_at
            elif b".cls" in member[:100] and member[BLOCK:].rstrip(b"\0 \n") != b"%d" % row["label"]:
                yield "label", sample, name, label_at + BLOCK


def advice(index: ShardIndex, damage: Damage) -> str:
    """What to do about the damage, with the commands."""
    remote = next((split.remote for split in index.splits.values() if split.remote), None)
    if remote and (remote.url or not index.is_foreign):
        return "  What is damaged there has to be written again where the set was made, and brought there."
    command = _index_command(index) if index.is_foreign else _shard_command(index)
    again = f"again, where the raw data still lie as they did, with:\n  {command}"
    lines = []
    if damage.strays:
        or_index = f", or index the set with them: {command}" if index.is_foreign else "."
        lines.append(f"  Move the tars that are not in the index out of the folder{or_index}")
    if index.is_foreign and damage.shards:
        lines.append(f"  Fetch the damaged files again. To index them as they are now, with whatever labels stand in them now, "
                     f"right or wrong: {command}")  # fmt: skip
    elif index.is_foreign and damage.tables:
        lines.append(f"  Index the tars again: {command}")
    elif damage.tables:
        lines.append(f"  Write the set {again} --overwrite true")
    elif damage.shards:
        lines.append(f"  Write the damaged shards {again} --repair\n"
                     f"  or the whole set with --overwrite true in place of --repair.")  # fmt: skip
    return "\n".join(lines)


def _index_command(index: ShardIndex) -> str:
    named = [shlex.quote(shown(name)) for name in index.source.get("tars", [])]
    words = ["dist-train index", *named, *["--out"] * bool(named), shlex.quote(index.folder)]
    words += ["--classes", shlex.quote(index.source["classes"])] if "classes" in index.source else []
    words += [f"--max-bad {len(index.left_out)}"] * bool(index.left_out)
    return " ".join(words)


def _shard_command(index: ShardIndex) -> str:
    usual = flatten(to_dict(ShardConfig()))
    settings = {name: value for name, value in flatten(index.source).items() if value != usual.get(name)}
    words = [f"--{name} {shlex.quote(v if isinstance(v, str) else json.dumps(v))}" for name, v in settings.items()]
    words += [f"--max_bad {len(index.left_out)}"] * bool(index.left_out)
    return " ".join(["dist-train shard", *words, "--out", shlex.quote(index.folder)])
