"""Every knob of a conversion, with its meaning, unit and limits: what `dist-train shard` and a dataset's YAML file take."""

from dataclasses import dataclass, field
from typing import Literal

from dist_train.errors import UserError

USUAL_TEST = 0.1  # where split.test is left to the source


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the samples, drawn by class (stratified). A split that the source brings itself is kept as it is."""

    val: float = 0.1
    """share that becomes the validation split, of the samples the source leaves to training; not used where the source brings
    one; 0 is none"""
    test: float = -1.0
    """share that becomes the test split, likewise; -1 is 0.1, and none where the source brings a validation split"""


@dataclass(frozen=True)
class ShardConfig:
    """One conversion: what `datasets/<set>.yaml` holds."""

    source: Literal["folder", "torchvision", "sklearn", "csv", "list"] = "folder"
    """where raw samples come from; csv: a table, whose columns are numbers, True and False, or text: one of at most 32 texts is a
    feature COLUMN=TEXT for each, 1 or 0, others are dropped; list: pictures that a CSV file lists"""
    path: str = ""
    """folder of class folders, CSV file, or the root folder of a torchvision set"""
    dataset: str = ""
    """torchvision's or scikit-learn's name of the set: CIFAR10, SVHN, digits, breast_cancer"""
    classes: tuple[str, ...] = ()
    """folder: the class folders to take, in this order; empty takes all, sorted"""
    merge: tuple[str, ...] = ()
    """classes joined into one, such as cat+dog, in this order; classes that are not named are left out"""
    target: str = ""
    """csv and list: the column with the class"""
    picture: str = "image"
    """list: the column with the path of each picture, below root"""
    root: str = ""
    """list: the folder that the paths start from; default the one the CSV file lies in"""
    ending: str = ""
    """list: added to names that do not end as a picture's do, such as .jpg"""
    split_column: str = ""
    """csv and list: the column with each row's split, train, val or test; one that no row names is drawn from the training rows as
    `split` says, and without the column all are"""
    group: str = ""
    """list: the column with what no two splits may share, such as a patient or a scene; splits are drawn of whole groups, with
    each class shared out as evenly as these allow"""
    drop: tuple[str, ...] = ()
    """csv: columns left out, such as a row number"""
    missing: Literal["drop", "mean", "error"] = "drop"
    """csv: rows with missing or non-numeric values in columns of numbers are left out, kept (mean), or refused. What is missing
    then counts as the column's mean over the training split, with folds over the fold's training part; in predict and in exported
    files, too. An empty cell of a column of text is not missing: 0 in all its features.
    list: rows without a value in a column that is used are left out or refused"""
    extra: bool = False
    """torchvision: add the set's extra training samples, where it has some (SVHN)"""
    download: bool = False
    """torchvision: fetch the raw files when they are not there"""
    out: str = ""
    """folder to write; default shards/<name of the YAML file>"""
    split: SplitConfig = field(default_factory=SplitConfig)
    seed: int = 0
    """draws the split and the order inside the shards"""
    resize: int = 0
    """shorter side is brought down to this, pixels; 0 keeps the bytes of every JPEG and PNG as they are"""
    quality: int = 90
    """JPEG quality where pictures are encoded anew"""
    check: Literal["all", "sample"] = "all"
    """pictures that are decoded, to prove them and for mean and std: every one, or one of 16 drawn at random; of the others
    only begin and end are looked at, 2.6 times as fast (docs/loading.md; those that are encoded anew are decoded in any case)"""
    shard_mb: float = 128.0
    """aimed size of a shard, MB"""
    min_shards: int = 4
    """least number of shards of the training split, however small it is"""
    workers: int = 0
    """processes, or threads for photographs; 0 is one per core"""
    max_bad: int = 0
    """unreadable samples that are left out, and listed in the index, before the conversion stops"""
    overwrite: bool = False
    """replace a finished set of the same name"""
    part: str = ""
    """I/N: write the I-th of N parts (I from 0), on a machine that shares the folder with the others; then join them"""
    join: bool = False
    """make a set of the parts, once all of them are written"""
    repair: bool = False
    """write the missing and damaged shards of a finished set again"""

    @property
    def raw(self) -> str:
        """Where the raw samples lie, or what their set is called, for messages."""
        return self.path or self.dataset


# Settings of a conversion that no byte of the set depends on.
FREE_SHARD_SETTINGS = ("out", "workers", "max_bad", "overwrite", "download", "part", "join", "repair")


def check_settings(config: ShardConfig) -> None:
    """Raise UserError with every setting that makes no sense."""
    val, test = config.split.val, config.split.test
    both = val + (USUAL_TEST if test == -1 else test)
    limits = {
        "split.val": (val, 0 <= val < 1, "a share from 0 to below 1"),
        "split.test": (test, 0 <= test < 1 or test == -1, "a share from 0 to below 1, or -1 to go by the source"),
        "split.val + split.test": (both, both < 1, "less than 1, so that something is left to train on"),
        "resize": (config.resize, config.resize >= 0, "pixels, or 0 to keep the size"),
        "quality": (config.quality, 1 <= config.quality <= 100, "1 to 100"),
        "shard_mb": (config.shard_mb, config.shard_mb > 0, "more than 0 MB"),
        "min_shards": (config.min_shards, config.min_shards >= 1, "1 or more"),
        "workers": (config.workers, config.workers >= 0, "processes, or 0 for one per core"),
        "max_bad": (config.max_bad, config.max_bad >= 0, "0 or more samples"),
        "part, join, repair": ((config.part, config.join, config.repair),
                               bool(config.part) + config.join + config.repair <= 1, "one of them at a time"),
    }  # fmt: skip
    problems = [f"{name} is {value}; expected {what}." for name, (value, good, what) in limits.items() if not good]
    usual, hint = ShardConfig(), {"classes": "; merge picks and joins classes of any source"}
    sources = {
        "classes": "folder", "target": "csv or list", "drop": "csv", "missing": "csv or list", "extra": "torchvision",
        "download": "torchvision", "split_column": "csv or list",
        **dict.fromkeys(("picture", "root", "ending", "group"), "list"),
    }  # fmt: skip
    for name, source in sources.items():
        if getattr(config, name) != getattr(usual, name) and config.source not in source.split(" or "):
            problems.append(f"{name} is for source: {source}, and this is {config.source}{hint.get(name, '')}.")
    if config.source == "list" and config.missing == "mean":
        problems.append("missing is mean, and a class or a group has none; expected drop or error for source: list.")
    if problems:
        raise UserError("\n".join(problems))
