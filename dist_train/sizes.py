"""What follows from settings, shards and ranks together: sizes, crops, shares, the stream, and whether they go together."""

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from dist_train.config import AugmentConfig, ModelConfig, RunConfig
from dist_train.data import Batch, open_stream, picture_size
from dist_train.errors import UserError
from dist_train.index import ShardIndex
from dist_train.metrics import flops_per_sample
from dist_train.models import rates_taken
from dist_train.pretrained import evaluated_otherwise, normalised_otherwise
from dist_train.runtime import World
from dist_train.settings import flatten, to_dict

_RANGES = {  # (what is expected, whether a value is that): settings; others have ranges where they are used
    ("more than 0", lambda value: 0 < value < math.inf):
        ("runtime.timeout_s", "optim.lr", "optim.rest_lr", "optim.step_epochs", "optim.step_factor", "model.width"),
    ("0 or more", lambda value: 0 <= value < math.inf):
        ("data.image_size", "data.eval_size", "data.threads", "data.prefetch_mb", "optim.weight_decay", "optim.rest_weight_decay",
         "optim.freeze_epochs", "optim.warmup_epochs", "optim.final_lr", "optim.plateau_patience", "optim.clip_norm",
         "train.max_steps", "train.profile_steps", "train.micro_batch_size", "train.eval_every_epochs", "train.patience",
         "train.split_ranks", "runtime.threads", "augment.start_size"),
    ("0 or more, less than 1", lambda value: 0 <= value < 1):
        ("optim.momentum", "optim.beta2", "optim.label_smoothing", "optim.ema_decay", "model.dropout"),
    ("-1, or 0 or more, less than 1", lambda value: value == -1 or 0 <= value < 1): ("model.drop_path",),
    ("more than 0, at most 1", lambda value: 0 < value <= 1): ("optim.layer_decay",),
    ("0 to 1", lambda value: 0 <= value <= 1): ("data.eval_crop", "augment.full_size_from", "optim.class_weights"),
}  # fmt: skip


def whole_steps(epochs: float, num_samples: int, global_batch_size: int) -> int:
    """The fewest steps that give epochs times num_samples: exact in the decimals of epochs as they are written."""
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch_size)


def input_size(config: RunConfig, index: ShardIndex) -> tuple[int, int] | None:
    """(height, width) that enters the network; None for tables."""
    return picture_size(index, config.data.image_size)


def eval_size(config: RunConfig, index: ShardIndex) -> tuple[int, int] | None:
    """(height, width) that enters the network in evaluation; None for tables."""
    return picture_size(index, config.data.side_evaluated)


def check_eval_size(config: RunConfig, index: ShardIndex, network) -> None:
    """Raise UserError where the network does not take pictures of data.eval_size, which is set."""
    side = config.data.eval_size
    if index.features is not None:
        raise UserError(f"data.eval_size is {side}, and {index.folder} is a table.\n  Leave it out.")
    try:
        flops_per_sample(network, (3, side, side))
    except (RuntimeError, ValueError, AssertionError) as error:
        height, width = input_size(config, index)
        raise UserError(f"data.eval_size is {side}, and {config.model.name}, built for {height} x {width} px, does not take that: "
                        f"{str(error).splitlines()[0]}\n  Leave data.eval_size out.") from None  # fmt: skip


def decoder_crop(config: RunConfig, index: ShardIndex) -> tuple[str, int]:
    """(crop, image_size) for the stream: pictures that differ in size are cut and resized while they are decoded."""
    if config.data.crop != "auto":
        return config.data.crop, config.data.image_size
    if index.image_size is not None or index.features is not None:
        return "resize", 0  # as stored; the device crops and resizes
    return ("random_resized" if config.augment.crop == "random_resized" else "resize"), config.data.image_size


def training_stream(config: RunConfig, index: ShardIndex, **more) -> Iterator[Batch]:
    """`data.open_stream` with all that the settings say of it. more: what depends on the process."""
    data, augment = config.data, config.augment
    crop, size = decoder_crop(config, index)
    return open_stream(
        index, data.train_split, data.global_batch_size, size, crop, config.seed, scale=augment.scale, ratio=augment.ratio,
        window_shards=data.window_shards, lanes=data.lanes, prefetch_mb=data.prefetch_mb, verify=data.verify,
        interpolation=data.interpolation, **more,
    )  # fmt: skip


def on_device_augment(config: RunConfig, index: ShardIndex) -> AugmentConfig:
    """What is left of the augmentation to do on the device: a random box that the decoder cuts is not cut again."""
    is_cut = decoder_crop(config, index)[0] == config.augment.crop == "random_resized"
    return replace(config.augment, crop="none") if is_cut else config.augment


def eval_crop(config: RunConfig, index: ShardIndex) -> float:
    """Share of the picture's shorter side that is evaluated, 0 for the whole picture: the central crop where training crops at
    random, unless all pictures are stored in one size that is no larger than what enters the network."""
    data = config.data
    crop = config.augment.crop if data.crop == "auto" else data.crop
    is_larger = index.features is None and (index.image_size is None or 0 < data.side_evaluated < min(index.image_size))
    return data.eval_crop if crop == "random_resized" and is_larger else 0.0


def micro_batch_size(config: RunConfig, world_size: int) -> int:
    """Samples through the network at once: the largest equal part of a rank's share below the limit, even where neighbours mix."""
    share, limit = config.data.global_batch_size // world_size, config.train.micro_batch_size or math.inf
    parts = [share // n for n in range(1, share + 1) if share % n == 0 and share // n <= limit]
    is_mixing = config.augment.mixup or config.augment.cutmix
    return next((part for part in parts if part % 2 == 0), parts[0]) if is_mixing else parts[0]


def range_problems(config: RunConfig) -> list[str]:
    """Every setting that is out of its range."""
    settings, problems = flatten(to_dict(config)), []
    for (expected, is_good), names in _RANGES.items():
        problems += [f"{name} is {settings[name]}; expected {expected}." for name in names if not is_good(settings[name])]
    epochs, pretrained = config.train.epochs, config.model.pretrained
    if not (0 < epochs < math.inf or epochs == 0 and pretrained):
        problems.append(f"train.epochs is {epochs}; expected more than 0, or 0 with model.pretrained, to evaluate those weights.")
    if min(config.model.hidden, default=1) < 1:
        problems.append(f"model.hidden is {list(config.model.hidden)}; expected layers of 1 unit or more.")
    return problems


def split_problems(config: RunConfig, index: ShardIndex) -> list[str]:
    """Splits that are named and not there, and what cannot be done without validation."""
    data, problems = config.data, []
    for name, usual in (("val_split", "val"), ("test_split", "test")):
        split = getattr(data, name)
        if split not in (usual, "", "none") and index.find(split) is None:
            problems.append(f"data.{name} is {split!r}; {index.folder} has {', '.join(index.splits)}. \"none\" is without.")
        elif split != data.train_split and set(split.split("+")) & set(data.train_split.split("+")) and not (
            data.folds and name == "val_split"
        ):
            problems.append(f"data.{name} is {split}, on which data.train_split {data.train_split} trains: its figures would tell "
                            f"nothing.\n  Set data.{name} to none, or data.train_split to another.")  # fmt: skip
    if index.find(data.val_split) is None:
        if needs := _evaluations_needed(config):
            problems.append(f"{needs} go by the validation split, and {index.folder} has none.\n"
                            f"  Set data.val_split to one of {', '.join(index.splits)}, or leave it out.")  # fmt: skip
    return problems


def _shorter_side(config: RunConfig, index: ShardIndex) -> int:
    """The shorter side of `input_size`, without its refusal, as check_sizes names all faults at once: 0 where there is none."""
    return config.data.image_size or min(index.image_size or (0,))


def check_new(config: RunConfig) -> None:
    """Raise UserError where settings of a run to be begun would change nothing, and stand in every table all the same.

    What was begun with them goes on. Called when the network's name is known to be one.
    """
    model, usual = config.model, ModelConfig()

    def changed(names: list[str]) -> list[str]:
        return [f"model.{name} {getattr(model, name)}" for name in names if getattr(model, name) != getattr(usual, name)]

    own = model.name.startswith(("alexnet", "vgg"))
    idle = ["width"] if not own else []
    idle += ["hidden", "activation", "batchnorm"] if model.name != "mlp" else []
    problems = [f"{', '.join(found)}: {model.name} has no such setting; width is of alexnet and vgg, the others of mlp.\n"
                f"  Set it as it is by default, or leave it out."] if (found := changed(idle)) else []  # fmt: skip
    if changed(rates := ["dropout", "drop_path"]) and (found := changed([r for r in rates if r not in rates_taken(model)])):
        problems.append(f"{', '.join(found)}: {model.name} has no layers of its own for that, whose rate could be set and which "
                        f"drop the same on any number of ranks.\n  Leave it out, or take another network.")  # fmt: skip
    if config.augment.start_size and config.augment.full_size_from == 1:
        problems.append("augment.full_size_from is 1, so that no step would be trained at the full size; expected less than 1.")
    if problems:
        raise UserError("\n".join(problems))
    check_evaluated(config)


def check_evaluated(config: RunConfig) -> None:
    """Raise UserError where something goes by evaluations that there are not."""
    needs = _evaluations_needed(config)
    if needs and not config.train.eval_every_epochs:
        raise UserError(f"{needs} go by evaluations, and train.eval_every_epochs 0 leaves one, at the end.\n"
                        f"  Set train.eval_every_epochs.")  # fmt: skip


def _evaluations_needed(config: RunConfig) -> str:
    """What goes by the evaluations while training; "" if nothing does."""
    needs = [f"optim.schedule {config.optim.schedule}"] * (config.optim.schedule == "plateau")
    needs += [f"train.patience {config.train.patience}"] * (config.train.patience > 0)
    return " and ".join(needs)


def pretrained_remarks(config: RunConfig, index: ShardIndex) -> list[str]:
    """Where pictures enter the network otherwise than those that the weights of model.pretrained are known from."""
    if not config.model.pretrained or index.features is not None:
        return []
    found = evaluated_otherwise(config.model, eval_size(config, index), eval_crop(config, index), config.data.interpolation)
    return found + ([] if config.data.mean else normalised_otherwise(config.model, index.mean, index.std))


def statistics_problems(config: RunConfig, index: ShardIndex) -> list[str]:
    """What is wrong with data.mean and data.std for these shards, if anything."""
    mean, std, number = config.data.mean, config.data.std, len(index.mean)
    if not (mean or std) or (len(mean) == len(std) == number and min(std) > 0):
        return []
    return [f"data.mean is {list(mean)} and data.std {list(std)}; expected {number} numbers in each, those of data.std above 0."]


def config_warnings(config: RunConfig, world_size: int, network) -> list[str]:
    """What is allowed, and rarely meant."""
    found, at_once = [], micro_batch_size(config, world_size)
    if 0 < config.train.epochs <= config.optim.warmup_epochs:
        found.append(f"optim.warmup_epochs {config.optim.warmup_epochs:g} is no less than train.epochs {config.train.epochs:g}: "
                     f"the learning rate rises to the end.")  # fmt: skip
    if config.optim.class_weights and config.train.monitor == "loss":
        found.append("train.monitor is loss, which optim.class_weights does not weight in evaluation: it may keep weights on which "
                     "they have told least. balanced goes with them.")  # fmt: skip
    share, limit = config.data.global_batch_size // world_size, config.train.micro_batch_size
    if share > limit > 2 * at_once:
        found.append(f"train.micro_batch_size {limit}: the largest equal part of a rank's {share} samples below it is {at_once}. "
                     f"Choose a data.global_batch_size that divides better.")  # fmt: skip
    has_batchnorm = any("BatchNorm" in type(module).__name__ for module in network.modules())
    if has_batchnorm and config.train.sync_batchnorm and at_once * world_size < config.data.global_batch_size:
        found.append(f"train.micro_batch_size {config.train.micro_batch_size}: BatchNorm sees {at_once * world_size} samples at "
                     f"once, which depends on the number of ranks.")  # fmt: skip
    return found


def split_warnings(config: RunConfig, index: ShardIndex) -> list[str]:
    """A batch larger than the training split, and what a set without a split to be judged on goes without.

    Nothing of the latter where data.val_split and data.test_split say that none is wanted.
    """
    data, found = config.data, []
    batch, num_samples = data.global_batch_size, index.split(data.train_split).num_samples
    if batch > num_samples:
        found.append(f"data.global_batch_size {batch} is more than the {num_samples} training samples: a step holds each of them "
                     f"about {batch / num_samples:.3g} times.")  # fmt: skip
    if data.val_split not in ("", "none") and index.find(data.val_split) is None:
        when = " before the end" if index.find(data.test_split) else ""
        found.append(f"{index.folder} has no split {data.val_split}: nothing is evaluated{when}, and the last weights are kept. "
                     f"data.folds makes one: --data.folds 5 keeps back a fifth of {data.train_split}.")  # fmt: skip
    elif data.val_split in ("", "none") and data.test_split not in ("", "none") and index.find(data.test_split) is None:
        found.append(f"{index.folder} has no split {data.test_split}, and data.val_split is none: nothing is evaluated.")
    return found


def growth_problems(config: RunConfig, index: ShardIndex) -> list[str]:
    """What is wrong with augment.start_size for these pictures, if anything."""
    side = _shorter_side(config, index)
    if not side or config.augment.start_size <= side:
        return []
    return [f"augment.start_size is {config.augment.start_size}; expected {side} pixels, the picture's side, at most."]


def shift_problems(config: RunConfig, index: ShardIndex) -> list[str]:
    """What is wrong with train.shift_test for these pictures, if anything; a table has none to move."""
    side = config.data.eval_size or _shorter_side(config, index)
    if 0 <= config.train.shift_test <= side // 2:
        return []
    return [f"train.shift_test is {config.train.shift_test}; expected pixels, 0 to half the picture's side, {side // 2}."]


def adds_in_bf16(config: RunConfig, world_size: int) -> bool:
    """Whether micro-batches would be added up in the precision in which gradients travel, as torch's fully_shard does."""
    return config.train.parallel == "fsdp" and config.train.reduce_precision == "bf16" and world_size > 1


def check_sizes(config: RunConfig, index: ShardIndex, world: World) -> None:
    """Raise UserError, all faults at once, where settings, shards and ranks do not go together."""
    problems = range_problems(config)
    batch, share = config.data.global_batch_size, config.data.global_batch_size // world.world_size
    if index.find(split := config.data.train_split) is None:
        problems.append(f"{index.folder}: there is no split {split!r} to train on; it has {', '.join(index.splits)}.")
    if batch < 1 or batch % world.world_size:
        problems.append(f"data.global_batch_size is {batch}, which {world.world_size} processes cannot share evenly.\n"
                        f"  Choose a multiple of {world.world_size}, or start another number of processes.")  # fmt: skip
    if share and not problems and (config.augment.mixup or config.augment.cutmix) and (
        share % 2 or micro_batch_size(config, world.world_size) % 2
    ):
        problems.append(f"mixup and cutmix pair neighbours, so each rank's share ({share}) and micro-batch must be even.")
    graphs = config.train.compile and config.train.compile_mode != "default"
    if share and not problems and graphs and micro_batch_size(config, world.world_size) < share:
        problems.append(f"train.compile_mode is {config.train.compile_mode}, whose graphs write the gradients of each micro-batch "
                        f"over those of the one before.\n  Leave train.micro_batch_size out, or take mode default.")  # fmt: skip
    if share and not problems and adds_in_bf16(config, world.world_size) and micro_batch_size(config, world.world_size) < share:
        problems.append("train.reduce_precision is bf16 and train.parallel fsdp, which would add up micro-batches in bf16, too.\n"
                        "  Use train.parallel ddp or hybrid, leave train.micro_batch_size out, or reduce in fp32.")
    if config.data.max_bad and (config.data.cache == "disk" or config.data.folds):
        what = f"data.folds {config.data.folds}" if config.data.folds else "data.cache disk"
        problems.append(f"data.max_bad is {config.data.max_bad} and {what}, which needs every picture.\n"
                        f"  Convert the set again without the bad ones (--max-bad), or leave one of the two out.")  # fmt: skip
    problems += shift_problems(config, index) + growth_problems(config, index) + split_problems(config, index)
    problems += statistics_problems(config, index)
    if index.features is not None and config.augment != AugmentConfig():
        usual = to_dict(AugmentConfig())
        names = [f"augment.{name}" for name, value in to_dict(config.augment).items() if value != usual[name]]
        problems.append(f"{', '.join(names)}: the rows of a table are not augmented.\n  Leave out what is set there.")
    if config.optim.freeze_epochs > 0 and not config.model.pretrained:
        problems.append(f"optim.freeze_epochs is {config.optim.freeze_epochs}, but nothing is trained below the last layer "
                        f"that could be kept.\n  Set model.pretrained, or leave optim.freeze_epochs out.")  # fmt: skip
    if config.optim.freeze_epochs > 0 and config.train.parallel != "ddp" and world.world_size > 1:
        problems.append(f"optim.freeze_epochs is {config.optim.freeze_epochs} and train.parallel {config.train.parallel}, which "
                        f"splits the one layer that is trained.\n  Use train.parallel: ddp.")  # fmt: skip
    if config.optim.name == "muon" and config.train.precision == "fp16":
        problems.append("optim.name is muon and train.precision fp16: momentum of gradients whose loss scale changes is none.\n"
                        "  Use bf16.")  # fmt: skip
    if config.optim.name == "muon" and config.train.parallel != "ddp" and world.world_size > 1:
        problems.append(f"optim.name is muon and train.parallel {config.train.parallel}, which splits the matrices that muon needs "
                        f"whole.\n  Use train.parallel: ddp.")  # fmt: skip
    if index.features is not None and config.model.name != "mlp":
        problems.append(f"{index.folder} is a table, so model.name must be mlp, not {config.model.name}.")
    if index.features is None and config.model.name == "mlp":
        problems.append(f"{index.folder} holds pictures; model.name mlp is for tables.")
    if problems:
        raise UserError("\n".join(problems))
