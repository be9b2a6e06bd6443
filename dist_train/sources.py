"""Where raw samples come from: one contract, `Source`, and the commonest of them, a folder of class folders.

`tables.py` makes sources of CSV files and scikit-learn's sets, `torchsets.py` of torchvision's, `picture_lists.py` of pictures
listed in a CSV file.
"""

import itertools
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dist_train.errors import UserError, did_you_mean
from dist_train.shard_config import ShardConfig

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
_SMALL_FILE = 1 << 16  # bytes read at once; most pictures are smaller
_NUM_ASIDE = 3  # files that are named, of those left aside
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Source:
    """Raw samples in an order that follows from their names alone, not from the file system's.

    labels: (N,) int32, class numbers. sizes: (N,) int64, bytes of the raw sample, an estimate where it is not at hand.
    preset: (N,) int8, number in SPLITS of the split that the source itself assigns, or None. groups: (N,) int64, samples of one
    number come into one split, or None. store holds the bytes: `read(i)` gives sample i's as they are to be stored,
    `take(rows)` a picklable store of a few, `stamps()` N short texts that change when the samples' bytes do. features:
    names of a table's columns, None for pictures.
    """

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    store: object
    preset: np.ndarray | None = None
    groups: np.ndarray | None = None
    features: list[str] | None = None
    left_out: list[dict] = field(default_factory=list)  # {"name", "why"}: samples that a rule of the source drops
    notes: list[str] = field(default_factory=list)  # lines for the user

    def read(self, i: int) -> tuple[bytes, str]:
        """Bytes of sample i and their extension: "npy" of (F,) float32 for tables, else an encoded picture's format.

        Raises OSError where the raw file cannot be read.
        """
        return self.store.read(i)

    def take(self, rows: np.ndarray) -> "Source":
        """The same source with these samples only, small enough to be sent to a worker process."""
        return replace(
            self, names=[self.names[i] for i in rows], labels=self.labels[rows], sizes=self.sizes[rows],
            preset=None if self.preset is None else self.preset[rows], groups=None if self.groups is None else self.groups[rows],
            store=self.store.take(rows), left_out=[], notes=[],
        )  # fmt: skip


def open_source(config: ShardConfig) -> Source:
    """Find the raw samples that a conversion asks for; reads names and sizes, not pictures.

    Raises UserError where they are missing, empty, mixed up, or of fewer than two classes.
    """
    if config.source == "folder":
        source = folder_source(config)
    elif config.source == "torchvision":
        from dist_train.torchsets import torchvision_source

        source = torchvision_source(config)
    elif config.source == "csv":
        from dist_train.tables import csv_source

        source = csv_source(config)
    elif config.source == "list":
        from dist_train.picture_lists import list_source

        source = list_source(config)
    else:
        from dist_train.tables import sklearn_source

        source = sklearn_source(config)
    if config.merge:
        source = merged(source, config.merge)
    if len(source.classes) < 2:
        notes = "".join(f"\n  {note}" for note in source.notes)  # which may say where the others went
        raise UserError(f"{config.raw}: one class only, {source.classes[0]!r}; a classifier needs at least two.{notes}")
    return source


def merged(source: Source, groups: tuple[str, ...]) -> Source:
    """The source with one class for each group, "cat+dog"; samples of classes in no group are left aside and counted.

    Raises UserError where a group names a class that the source has not, or two groups name the same one.
    """
    number, problems = {}, []
    for k, group in enumerate(groups):
        for name in [group] if group in source.classes else group.split("+"):
            if name not in source.classes:
                hint = did_you_mean(name, source.classes, f"There are {', '.join(source.classes[:30])}.")
                problems.append(f"merge: {group}: there is no class {name!r}. {hint}")
            elif name in number:
                problems.append(f"merge: the class {name!r} is named twice.")
            number[name] = k
    if problems:
        raise UserError("\n".join(problems))
    new = np.array([number.get(name, -1) for name in source.classes], np.int32)
    rows = np.flatnonzero(new[source.labels] >= 0)
    aside = len(source.names) - len(rows)
    notes = [f"{aside:,} samples of classes that `merge` does not name were left aside"] if aside else []
    kept = source.take(rows)
    return replace(
        kept, classes=list(groups), labels=new[kept.labels], left_out=source.left_out, notes=source.notes + notes,
        preset=None if source.preset is None else source.preset[rows],
    )  # fmt: skip


def folder_source(config: ShardConfig) -> Source:
    """Pictures in DIR/<class>/**, or in DIR/train/<class>/** with val (valid, validation) and test beside it,
    or folders all named so in part, such as seg_train and seg_test.

    config.classes picks class folders and their order. Links to folders are followed, but not in circles. Hidden
    files and files that are no pictures by their name are left aside; the notes count them and name the first.
    """
    if not config.path:
        raise UserError("source: folder needs `path`, the folder with one folder per class.")
    root = Path(config.path)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{root}: {found}; expected a folder with one folder per class.\n  Set `path` to it.")
    folders, pictures, aside = _list_folder(root)
    split_folders = _split_folders(root, folders, config.classes)
    parts = split_folders or {"": -1}
    if pictures:
        holds = "split folders" if split_folders else "class folders"
        if not folders:
            raise UserError(
                f"{root}: {len(pictures)} pictures and no class folder.\n"
                f"  Expected one folder per class, named after it, with its pictures inside."
            )
        raise UserError(
            f"{root}: {len(pictures)} pictures ({pictures[0]}, ...) lie beside {len(folders)} {holds}.\n"
            f"  Expected folders only: move the pictures into the folder of their class, or out of here."
        )
    classes, found, problems = list(config.classes), [], []
    for part, split in parts.items():
        base = root / part
        present, loose, skipped = _list_folder(base)
        aside += [f"{part}/{name}" for name in skipped] if part else []
        problems += [f"{base}: {len(loose)} pictures outside any class folder ({loose[0]}, ...)."] if loose else []
        wanted = [name for name in present if name in config.classes] if config.classes else present
        if not config.classes and split <= 0:
            classes = wanted
        if split <= 0:
            absent = [name for name in config.classes if name not in present]
            problems += [f"{base}: there is no class folder {name!r}." for name in absent]
        for name in wanted:
            if name not in classes:
                problems.append(f"{base / name}: the class is not in the training split; expected it there too.")
                continue
            files, skipped = _pictures_below(base / name)
            if not files:
                problems.append(f"{base / name}: no picture in this class folder; expected {', '.join(PICTURES)}.")
            below = f"{part}/{name}" if part else name
            aside += [f"{below}/{file}" for file in skipped]
            found += [(classes.index(name), split, f"{below}/{file}", *state) for file, *state in files]
    if not problems and not found:
        problems = [f"{root}: no class folders; expected one folder per class with its pictures inside."]
    if problems:
        raise UserError("\n".join(problems) + "\n  Put it right, or name the folders to take with --classes.")
    found.sort(key=lambda row: row[:3])
    paths = [row[2] for row in found]
    return Source(
        classes=[printable(name) for name in classes],
        names=[printable(path) for path in paths],
        labels=np.array([row[0] for row in found], np.int32),
        sizes=np.array([row[3] for row in found], np.int64),
        preset=np.array([row[1] for row in found], np.int8) if split_folders else None,
        store=Files(str(root), paths, [row[4] for row in found]),
        notes=[_told_aside(aside)] if aside else [],
    )


@dataclass(frozen=True)
class Files:
    """A store of one file per sample. modified_ns: time of change, so that a changed file is converted again."""

    root: str
    paths: list[str]
    modified_ns: list[int]

    def read(self, i: int) -> tuple[bytes, str]:
        path = self.paths[i]
        fd = os.open(f"{self.root}/{path}", os.O_RDONLY | os.O_CLOEXEC)  # `open` would take three times as long
        try:
            payload = os.read(fd, _SMALL_FILE)
            if len(payload) == _SMALL_FILE:
                payload = b"".join((payload, *iter(lambda: os.read(fd, 1 << 22), b"")))
        finally:
            os.close(fd)
        return payload, path.rpartition(".")[2].lower()

    def take(self, rows: np.ndarray) -> "Files":
        return Files(self.root, [self.paths[i] for i in rows], [self.modified_ns[i] for i in rows])

    def stamps(self) -> list[str]:
        return [f"{path}:{changed}" for path, changed in zip(self.paths, self.modified_ns, strict=True)]


@dataclass(frozen=True)
class Pixels:
    """A store of decoded pictures of one size, written as PNG. pixels: (N, H, W) or (N, H, W, 3) uint8."""

    pixels: np.ndarray

    def read(self, i: int) -> tuple[bytes, str]:
        from dist_train.pictures import encode_png

        return encode_png(self.pixels[i]), "png"

    def take(self, rows: np.ndarray) -> "Pixels":
        return Pixels(np.ascontiguousarray(self.pixels[rows]))

    def stamps(self) -> list[str]:
        return _hashes(self.pixels)


@dataclass(frozen=True)
class Vectors:
    """A store of table rows, written as .npy. rows: (N, F) float32."""

    rows: np.ndarray

    def read(self, i: int) -> tuple[bytes, str]:
        import io

        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(self.rows[i], "<f4"), (1, 0), allow_pickle=False)
        return buffer.getvalue(), "npy"

    def take(self, rows: np.ndarray) -> "Vectors":
        return Vectors(self.rows[rows])

    def stamps(self) -> list[str]:
        return _hashes(self.rows)


def printable(name: str) -> str:
    """The name on one line of UTF-8: control characters and bytes that are no text are escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")


def _hashes(array: np.ndarray) -> list[str]:
    import xxhash

    return [xxhash.xxh3_64_hexdigest(np.ascontiguousarray(row)) for row in array]


def _split_folders(root: Path, folders: list[str], classes: tuple[str, ...]) -> dict[str, int]:
    """{folder name: number in SPLITS} if the folders are splits, else {}."""
    named = {name: SPLIT_WORDS[name.lower()] for name in folders if name.lower() in SPLIT_WORDS}
    if 0 not in named.values():  # seg_train beside seg_test
        words = {name: [word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS] for name in folders}
        named = {name: SPLIT_WORDS[found[0]] for name, found in words.items() if len(found) == 1}
        if len(named) < len(folders):
            return {}
    if 0 not in named.values() or (classes and set(classes) <= set(folders)):
        return {}
    train = next(name for name, split in named.items() if split == 0)
    if not _list_folder(root / train)[0]:
        return {}  # no folders in it: "train" is a class of railways
    if len(named) < len(folders):
        others = sorted(set(folders) - set(named))
        raise UserError(
            f"{root}: {train} looks like a split, but {', '.join(others[:5])} beside it does not.\n"
            f"  Expected train, val and test alone, or class folders alone; name the classes with --classes otherwise."
        )
    if len(set(named.values())) < len(named):
        raise UserError(f"{root}: {', '.join(sorted(named))}: two folders for one split.\n  Keep one of them.")
    return dict(sorted(named.items(), key=lambda item: item[1]))


def files_below(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files below a folder with one of the endings, sorted. Links are followed, each folder is entered once, by its own
    way before a link's; what is hidden is left aside, and what may not be read is named."""
    found, entered, own, links = [], set(), [Path(folder)], []
    while own or links:
        here = (own or links).pop()
        try:
            state, entries = os.stat(here), list(os.scandir(here))
        except OSError as error:
            if here == Path(folder):
                raise UserError(f"{folder}: cannot be listed: {error.strerror}.") from None
            print(f"{here}: cannot be listed: {error.strerror}; left aside", file=sys.stderr)
            continue
        if (state.st_dev, state.st_ino) in entered:
            continue
        entered.add((state.st_dev, state.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else own).append(here / entry.name)
            elif entry.name.lower().endswith(endings):
                found.append(here / entry.name)
    return sorted(found)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def first_of(words: list[str], most: int) -> str:
    """"a, b, ...": so many of the words."""
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def _told_aside(names: list[str]) -> str:
    first = first_of([printable(name) for name in sorted(names)], _NUM_ASIDE)
    what = "file that is no picture was" if len(names) == 1 else "files that are no pictures were"
    return f"{len(names):,} {what} left aside: {first}"


def holds_pictures(folder: str | os.PathLike, depth: int = 2) -> bool:
    """Whether pictures lie in a folder, its class folders or those of its splits; only a few of each are looked at."""
    try:
        with os.scandir(folder) as entries:
            first = list(itertools.islice(entries, 1000))
    except OSError:
        return False
    folders = [entry.path for entry in first if not entry.name.startswith(".") and _is_folder(entry)]
    found = any(entry.name.lower().endswith(PICTURES) for entry in first)
    return found or depth > 0 and any(holds_pictures(below, depth - 1) for below in folders[:3])


def _list_folder(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of the folders and of the pictures right inside, sorted, and of other files. Hidden ones are neither."""
    folders, pictures, others = [], [], []
    for entry in _scan(folder):
        if entry.name.startswith("."):
            others += [] if _is_folder(entry) else [entry.name]
        elif _is_folder(entry):
            folders.append(entry.name)
        elif entry.name.lower().endswith(PICTURES):
            pictures.append(entry.name)
        else:
            others.append(entry.name)
    return sorted(folders), sorted(pictures), others


def _pictures_below(folder: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """(path below the folder, bytes, time of change in ns) of every picture, and the paths of other files.

    Unlike `files_below` it enters a folder by every way that is no circle, so that no name depends on the order of listing, and
    raises where one may not be read: a set has all its pictures or is not made.
    """
    found, others = [], []
    root = os.stat(folder)
    todo = [("", frozenset([(root.st_dev, root.st_ino)]))]
    while todo:
        below, above = todo.pop()
        for entry in _scan(folder / below):
            path = f"{below}/{entry.name}" if below else entry.name
            if _is_folder(entry):
                state = entry.stat()
                if not entry.name.startswith(".") and (state.st_dev, state.st_ino) not in above:
                    todo.append((path, above | {(state.st_dev, state.st_ino)}))
            elif entry.name.startswith(".") or not entry.name.lower().endswith(PICTURES) or not _is_file(entry):
                others.append(path)
            else:
                state = entry.stat()
                found.append((path, state.st_size, state.st_mtime_ns))
    return found, others


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}.") from None
