"""Sources out of torchvision's datasets, by class name; the set's own reader reads the raw files."""

import contextlib
import inspect
import os
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dist_train.errors import UserError, did_you_mean
from dist_train.pictures import encode_png
from dist_train.shard_config import ShardConfig
from dist_train.sources import PICTURES, Files, Pixels, Source, printable

# What the sets call their splits, first choice first. `extra` is more training data (SVHN), read when asked for.
_SPLITS = {
    "train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",), "extra": ("extra",)
}  # fmt: skip
_NUMBER = {"train": 0, "extra": 0, "val": 1, "test": 2}
_PATHS = ("_image_files", "_images", "_image_paths", "images")
_LABELS = ("targets", "labels", "_labels", "y")


def torchvision_source(config: ShardConfig) -> Source:
    """A classification set of torchvision's, such as CIFAR10, SVHN, FashionMNIST or ImageNet, with its own splits.

    Sets that hold their pictures as arrays become PNG, sets of files keep the files' bytes; what is neither is read
    through the set and becomes PNG. Raises UserError where the name is unknown or the raw files are missing; it then
    says which files the set wants, and where.
    """
    kind = _dataset_class(config.dataset)
    root = config.path or f"datasets/{config.dataset.lower()}"
    parts = _open_splits(kind, root, config)
    stored = [_store(part, dataset, root) for part, dataset in parts]
    labels = [_labels(dataset) for _, dataset in parts]
    preset = [np.full(len(y), _NUMBER.get(part, -1), np.int8) for (part, _), y in zip(parts, labels, strict=True)]
    return Source(
        classes=_classes(parts, labels),
        names=[printable(name) for _, names, _ in stored for name in names],
        labels=np.concatenate(labels).astype(np.int32),
        sizes=np.concatenate([sizes for _, _, sizes in stored]),
        store=joined([store for store, _, _ in stored], [len(y) for y in labels]),
        preset=None if parts[0][0] == "all" else np.concatenate(preset),
    )


@dataclass(frozen=True)
class Joined:
    """Several stores behind one numbering. where: (N, 2) int64, the store of each sample and its number in there."""

    stores: list
    where: np.ndarray

    def read(self, i: int) -> tuple[bytes, str]:
        store, row = self.where[i]
        return self.stores[store].read(row)

    def take(self, rows: np.ndarray) -> "Joined":
        where = self.where[rows]
        stores = [store.take(where[where[:, 0] == k, 1]) for k, store in enumerate(self.stores)]
        for k in range(len(stores)):
            where[where[:, 0] == k, 1] = np.arange((where[:, 0] == k).sum())
        return Joined(stores, where)

    def stamps(self) -> list[str]:
        stamps = [store.stamps() for store in self.stores]
        return [stamps[store][row] for store, row in self.where]


@dataclass(frozen=True)
class Drawn:
    """A store of pictures that only the set itself can read; `take` reads them, here, and carries them as PNG, which has stamps."""

    dataset: object

    def read(self, i: int) -> tuple[bytes, str]:
        image = self.dataset[int(i)][0]
        return encode_png(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))), "png"

    def take(self, rows: np.ndarray) -> "Encoded":
        return Encoded([self.read(i)[0] for i in rows])


@dataclass(frozen=True)
class Encoded:
    """A store of PNG bytes."""

    payloads: list[bytes]

    def read(self, i: int) -> tuple[bytes, str]:
        return self.payloads[i], "png"

    def take(self, rows: np.ndarray) -> "Encoded":
        return Encoded([self.payloads[i] for i in rows])

    def stamps(self) -> list[str]:
        return [xxhash.xxh3_64_hexdigest(payload) for payload in self.payloads]


def joined(stores: list, lengths: list[int]) -> object:
    """One store for several, in their order."""
    if len(stores) == 1:
        return stores[0]
    where = [np.stack([np.full(n, k), np.arange(n)], axis=1) for k, n in enumerate(lengths)]
    return Joined(stores, np.concatenate(where).astype(np.int64))


def _dataset_class(name: str) -> type:
    from torchvision import datasets
    from torchvision.datasets.vision import VisionDataset

    names = [n for n in datasets.__all__ if isinstance(getattr(datasets, n), type)]
    names = [n for n in names if issubclass(getattr(datasets, n), VisionDataset)]
    if name in names:
        return getattr(datasets, name)
    hint = did_you_mean(name, names, "https://docs.pytorch.org/vision/stable/datasets.html lists them.")
    raise UserError(f"dataset: torchvision has no set named {name!r}. {hint}")


def _refuse_half_unpacked(root: Path, config: ShardConfig) -> None:
    """torchvision unpacks ImageNet when it is opened, if train/ is not there, and takes what it finds for all of it."""
    for folder, rest in ((root / "train", "*.tar"), (root / "val", "*.JPEG")):
        if any(folder.glob(rest)):
            raise UserError(f"{folder}: was not unpacked to its end: it holds {rest}.\n  Remove it, and begin again.")
    if config.part and not all((root / split).is_dir() for split in ("train", "val")):
        raise UserError(f"{root}: train and val are not unpacked, and parts that begin together would stand in each other's way.\n"
                        f"  Unpack them in one process first: datasets/imagenet.yaml says how.")  # fmt: skip


def _open_splits(kind: type, root: str, config: ShardConfig) -> list[tuple[str, object]]:
    """[(train, val, test, extra or all, the opened set)]. Raises UserError."""
    if kind.__name__ == "ImageNet":
        _refuse_half_unpacked(Path(root), config)
    settings = inspect.signature(kind.__init__).parameters
    options = {"download": True} if config.download and "download" in settings else {}
    needed = [p for p in list(settings.values())[2:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise UserError(
            f"dataset: {kind.__name__} needs more settings than a name ({', '.join(list(settings)[2:])}).\n"
            f"  Write its pictures into class folders and use source: folder."
        )
    if config.download and not options:
        raise UserError(f"{kind.__name__}: torchvision cannot download this set.{_wanted(kind, root)}")

    def opened(**split):
        try:
            with contextlib.redirect_stdout(None):
                return kind(root, **split, **options)
        except ImportError as error:
            raise UserError(f"{kind.__name__}: reading it needs another package: {error}") from None
        except (RuntimeError, OSError) as error:
            doing = "cannot be downloaded" if options else "the raw files are missing or damaged"
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{root}: {kind.__name__}: {doing} ({why}).{_wanted(kind, root)}") from None

    if "train" in settings:
        return [("train", opened(train=True)), ("test", opened(train=False))]
    if "split" not in settings:
        return [("all", opened())]
    parts = []
    for part, names in _SPLITS.items():
        for name in names if part != "extra" or config.extra else ():
            try:
                parts.append((part, opened(split=name)))
                break
            except UserError:
                raise
            except ValueError as error:
                if "argument split" not in str(error):
                    raise
    if not parts or parts[0][0] != "train":
        raise UserError(f"{kind.__name__}: has no split to train on; it is no set for classification.")
    return parts


def _store(part: str, dataset, root: str) -> tuple[object, list[str], np.ndarray]:
    """Where a split's pictures lie, their names, their sizes in bytes. The quick ways are believed only if they show
    the first and the last picture as the set itself does."""
    paths = _paths(dataset)
    ends = [0, len(dataset) - 1]
    shown = [np.asarray(dataset[i][0].convert("RGB")) for i in ends] if _gives_pictures(dataset) else []
    if not shown:
        raise UserError(f"{type(dataset).__name__}: gives no (picture, class) pairs; it is no set for classification.")
    known = bool(paths) and all(str(path).lower().endswith(PICTURES) for path in paths)  # what shards take
    if known and all(_same(_read_rgb(paths[i]), picture) for i, picture in zip(ends, shown, strict=True)):
        states = [os.stat(path) for path in paths]
        names = [os.path.relpath(path, root) for path in paths]
        store = Files(root, names, [state.st_mtime_ns for state in states])
        return store, names, np.array([state.st_size for state in states], np.int64)
    names = [f"{part}/{i:06d}" for i in range(len(dataset))]
    for view in _views(dataset):
        if all(_same(_rgb(view[i]), picture) for i, picture in zip(ends, shown, strict=True)):
            return Pixels(view), names, np.full(len(view), view[0].size // 2 + 64, np.int64)
    return Drawn(dataset), names, np.full(len(dataset), shown[0].size // 2 + 64, np.int64)


def _gives_pictures(dataset) -> bool:
    first = dataset[0]
    return isinstance(first, tuple) and hasattr(first[0], "convert") and np.ndim(first[1]) == 0


def _pairs(dataset) -> list[tuple]:
    """The set's own (path, class) of each picture; empty if it has none."""
    for name in ("samples", "_samples"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and len(pairs) == len(dataset) and isinstance(pairs[0], tuple):
            return pairs
    return []


def _paths(dataset) -> list[str]:
    if pairs := _pairs(dataset):
        return [str(pair[0]) for pair in pairs]
    for name in _PATHS:
        paths = getattr(dataset, name, None)
        if isinstance(paths, list) and len(paths) == len(dataset) and isinstance(paths[0], str | os.PathLike):
            return [str(path) for path in paths]
    return []


def _views(dataset) -> list[np.ndarray]:
    """The set's array of pictures as (N, H, W[, 3]) under every order of axes that the sets use; empty if it has none."""
    pixels = getattr(dataset, "data", None)
    pixels = pixels.numpy() if hasattr(pixels, "numpy") else pixels
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim in (3, 4) and len(pixels) == len(dataset)):
        return []
    if pixels.ndim == 3:
        return [pixels, pixels.transpose(0, 2, 1)]
    return [view for view in (pixels, pixels.transpose(0, 2, 3, 1), pixels.transpose(0, 3, 2, 1)) if view.shape[3] == 3]


def _read_rgb(path: str) -> np.ndarray | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError:
        return None


def _rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def _same(mine: np.ndarray | None, theirs: np.ndarray) -> bool:
    return mine is not None and mine.shape == theirs.shape and bool((mine == theirs).all())


def _labels(dataset) -> np.ndarray:
    candidates = [[pair[1] for pair in _pairs(dataset)], *(getattr(dataset, name, None) for name in _LABELS)]
    for labels in candidates:
        if labels is not None and np.shape(labels) == (len(dataset),):
            labels = np.asarray(labels)
            if np.issubdtype(labels.dtype, np.integer) and labels[0] == dataset[0][1] and labels.min() >= 0:
                return labels.astype(np.int32)
    return np.array([int(dataset[i][1]) for i in range(len(dataset))], np.int32)


def _classes(parts: list, labels: list[np.ndarray]) -> list[str]:
    """The set's names of its classes (of several synonyms the first), or numbers where it has none."""
    count = 1 + max(int(y.max()) for y in labels)
    names = getattr(parts[0][1], "classes", None) or []
    names = [name if isinstance(name, str) else str(name[0]) for name in names]
    if len(set(names)) < len(names):  # ImageNet has two classes called crane, and two called maillot
        names = [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names)]
    return [printable(name) for name in names] if len(names) >= count else [str(k) for k in range(count)]


def _wanted(kind: type, root: str) -> str:
    """Lines that say which raw files the set wants and where they go, as far as its class tells."""
    if kind.__name__ == "ImageNet":
        files = [name for name, _ in inspect.getmodule(kind).ARCHIVE_META.values()]
        return (
            f"\n  Expected in {root}: {', '.join(files)}\n"
            f"  from https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (after registering there)."
        )
    urls, folder = _urls(kind), Path(root)
    if hasattr(kind, "resources") and hasattr(kind, "mirrors"):  # the MNIST family: file names, several servers
        folder = folder / kind.__name__ / "raw"
        names = [name for name in _strings(kind.resources) if name.endswith(".gz")]
        urls = [name if "://" in name else kind.mirrors[-1] + name for name in names]
    if not urls:
        return f"\n  Expected below {root}, laid out as https://docs.pytorch.org/vision/stable/datasets.html says."
    unpack = "" if kind.__name__ in ("SVHN", "USPS") else ", unpacked as --download true does,"
    return f"\n  Expected in {folder}{unpack} the files of:\n    " + "\n    ".join(urls) + (
        "\n  Put them there, or fetch them with --download true on a machine with a network."
    )  # fmt: skip


def _urls(kind: type) -> list[str]:
    """Addresses in the class's attributes and in the code of its download, and archives named without an address."""
    values = [value for base in kind.__mro__[:-1] for name, value in vars(base).items() if not name.startswith("__")]
    strings = _strings(values) + _strings(getattr(getattr(kind, "download", None), "__code__", None))
    strings += _strings(getattr(getattr(kind, "_download", None), "__code__", None))
    urls = [text for text in strings if text.startswith(("http://", "https://"))]
    archives = [text for text in strings if text.endswith((".tgz", ".zip", ".tar", ".gz", ".mat")) and "/" not in text]
    return list(dict.fromkeys(urls + [name for name in archives if not any(url.endswith(name) for url in urls)]))


def _strings(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, types.CodeType):
        return _strings(value.co_consts)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in _strings(item)]
