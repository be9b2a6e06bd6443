"""Which tars are meant: folders, files, brace patterns, URLs and webdataset's lists of shards (wids), each tar by its name."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import UserError
from dist_train.remote import is_remote, join, read_small, shown
from dist_train.sources import files_below

_WIDS = "wids-shard-index-v1"


@dataclass(frozen=True)
class NamedTar:
    """One tar. place: its absolute path, or its URL; words: the part of it whose words may name a split.

    What a list of shards says of it: num_samples, num_bytes, md5 (hex); None where it says nothing.
    """

    place: str
    words: str
    num_samples: int | None = None
    num_bytes: int | None = None
    md5: str | None = None
    list_name: str = ""  # the list that says so


def named_tars(names: list[str]) -> list[NamedTar]:
    """The tars that the names stand for, in their order; a folder's own are sorted.

    A name is a folder (all .tar files in it and below), a .tar file, a URL of one, either of them with braces, or a .json
    list as webdataset's `wids` writes it: {"__kind__": "wids-shard-index-v1", "shardlist": [{"url", "nsamples",
    "filesize", "md5sum"}, ...]}; names in a list are relative to it, or else to the working folder. Braces
    (x-{000..107}.tar) are how WebDataset's own documentation names many shards; a shell leaves them alone in quotes, and
    cannot expand them in a URL. Raises UserError, all missing files at once.
    """
    tars = [tar for name in names for tar in _expanded(name)]
    places = [tar.place for tar in tars]
    if len(set(places)) < len(places):
        twice = next(place for k, place in enumerate(places) if place in places[:k])
        raise UserError(f"{shown(twice)}: is named twice; expected each tar once.")
    if len({is_remote(place) for place in places}) > 1:
        raise UserError(
            f"{names[0]} ...: some tars are files and some lie behind URLs; expected one kind.\n"
            f"  Index them apart, or fetch the latter first."
        )
    missing = [place for place in places if not is_remote(place) and not os.path.isfile(place)]
    if missing:
        more = f" (and {len(missing) - 1:,} more of {len(places):,})" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: there is no such file{more}; expected a .tar, a folder of them, or a URL.")
    return tars


def _expanded(name: str) -> list[NamedTar]:
    if name.startswith("pipe:") or (name.startswith("file:") and not is_remote(name)):
        raise UserError(f"{name}: expected a path or a URL (https, s3, gs, az, file:///FOLDER); commands are not run.")
    if os.path.isdir(name):  # also where the name is too long for a path: a pattern
        return _below(Path(name))
    if name.partition("?")[0].endswith(".json"):
        return _wids(name)
    if is_remote(name) and not name.partition("?")[0].endswith((".tar", "}")):
        raise UserError(
            f"{shown(name)}: is no .tar; the tars behind a URL are named one by one, or with braces: "
            f"{shown(join(name, 'train-{000000..000009}.tar'))}"
        )
    return [_named(place) for place in ([name] if os.path.exists(name) else _braces(name))]


def _named(place: str, **claims) -> NamedTar:
    place = place if is_remote(place) else os.path.abspath(place)
    parts = place.partition("?")[0].split("/")
    return NamedTar(place, " ".join(parts[:-3:-1]), **claims)  # the file's own name speaks before its folder's


def _below(folder: Path) -> list[NamedTar]:
    paths = files_below(folder, (".tar",))
    if not paths:
        packed = files_below(folder, (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))
        hint = f"{packed[0].name} is compressed: unpack it to .tar first" if packed else "expected WebDataset tars in it"
        raise UserError(f"{folder}: no .tar files; {hint}.")
    return [NamedTar(os.path.abspath(path), str(path.relative_to(folder))) for path in paths]


def _braces(pattern: str) -> list[str]:
    import braceexpand  # webdataset's own reading of braces; it is installed with it

    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except braceexpand.UnbalancedBracesError:
        raise UserError(f"{shown(pattern)}: its braces do not match; expected x-{{000..107}}.tar.") from None


def _wids(name: str) -> list[NamedTar]:
    """The tars of a wids list, and what it says of them."""
    try:
        listed = json.loads(read_small(name) if is_remote(name) else Path(name).read_bytes())
        kind = listed.get("__kind__") if isinstance(listed, dict) else None
        if kind != _WIDS or not listed["shardlist"]:
            raise UserError(f"{shown(name)}: __kind__ is {kind!r}; expected a list of shards as wids writes it, {_WIDS!r}.")
        return [
            _named(
                _beside(name, str(entry["url"])), num_samples=_count(entry, "nsamples"),
                num_bytes=_count(entry, "filesize"), md5=entry.get("md5sum"), list_name=shown(name),
            )
            for entry in listed["shardlist"]
        ]  # fmt: skip
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{shown(name)}: cannot be read as a list of shards: {type(error).__name__} {error}.\n"
            f'  Expected {{"__kind__": "{_WIDS}", "shardlist": [{{"url": ..., "nsamples": ...}}, ...]}}.'
        ) from None


def _count(entry: dict, key: str) -> int | None:
    return None if entry.get(key) is None else int(entry[key])


def _beside(name: str, url: str) -> str:
    """A shard of a list: its name is a URL, or relative to the list, or to the working folder."""
    if is_remote(url):
        return url
    if is_remote(name):
        base, mark, query = name.partition("?")
        return f"{base.rpartition('/')[0]}/{url}{mark}{query}"
    beside = os.path.join(os.path.dirname(name), url)
    return url if os.path.exists(url) and not os.path.exists(beside) else beside
