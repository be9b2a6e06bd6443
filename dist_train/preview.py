"""What the network sees: the same pictures, epoch after epoch, through the stream and the augmentation of training."""

import argparse
from pathlib import Path

import numpy as np
import torch

from dist_train.augment import Augment
from dist_train.config import AugmentConfig, RunConfig
from dist_train.errors import UserError
from dist_train.folds import open_index, view_of
from dist_train.index import ShardIndex
from dist_train.mixing import mix
from dist_train.order import Order
from dist_train.page import Cell, Gallery, Section, write_page
from dist_train.picture_plots import THUMBNAIL, cell, draw_gallery, save_png, some_of_each_class, thumbnails
from dist_train.remote import shown
from dist_train.settings import read_config
from dist_train.sizes import decoder_crop, input_size, on_device_augment, statistics_problems, training_stream

SHOWN_CLASSES = 10
_CHUNK = 1 << 20  # places of an epoch that are looked through at once


def main(argv: list[str]) -> None:
    """`dist-train augment-preview [RECIPE] [--out FILE.png|html] [--per-class N] [--epochs K] [--SECTION.KEY VALUE ...]`."""
    parser = argparse.ArgumentParser(
        prog="dist-train augment-preview", allow_abbrev=False, description=__doc__, usage="%(prog)s [RECIPE] [options]",
        epilog="RECIPE, or --config RECIPE: YAML file of settings. Other options are those of dist-train train.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="FILE.png or FILE.html; default augment-preview-NAME.png, of recipe or shards")
    parser.add_argument("--per-class", type=int, default=1, help="samples of each class (default 1)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs shown, from the first on (default 6)")
    recipe = ["--config", *argv[:1]] if argv and not argv[0].startswith("-") else []
    options, settings = parser.parse_known_args(argv[len(recipe) // 2 :])
    config = read_config(RunConfig, [*recipe, *settings], "dist-train augment-preview")
    name = Path(recipe[1] if recipe else shown(config.data.shards)).stem
    out = options.out or Path(f"augment-preview-{name}.png")
    problems = [f"--{name} is {value}; expected 1 or more." for name, value in
                (("per-class", options.per_class), ("epochs", options.epochs)) if value < 1]  # fmt: skip
    if out.suffix not in (".png", ".html"):
        problems.append(f"--out is {out}; expected a file that ends in .png or .html.")
    if problems:
        raise UserError("\n".join(problems))
    if problems := statistics_problems(config, view_of(config)):
        raise UserError("\n".join(problems))
    index = open_index(config)
    gallery = preview_gallery(config, index, options.per_class, options.epochs, side=256)
    if out.suffix == ".html":
        subtitle = f"{index.name} · seed {config.seed}"
        write_page(out, f"What the network sees: {name}", subtitle, [],
                   [Section("Augmentation", galleries=[gallery])])  # fmt: skip
    else:
        save_png(draw_gallery(gallery, tile=128), out)
    print(f"what the network sees in epochs 0 to {options.epochs - 1}: {out}")


def preview_gallery(
    config: RunConfig, index: ShardIndex, per_class: int = 1, num_epochs: int = 4, side: int = THUMBNAIL
) -> Gallery:
    """A row a sample: as stored, then as it enters the network in epochs 0 to num_epochs - 1.

    index: as the run opens it (`folds.open_index`). side: pixels of the longer side, at most. Raises UserError for a
    table, and where training itself would refuse the settings.
    """
    if index.features is not None:
        raise UserError(f"{index.folder}: a table; augmentation is for pictures, so there is nothing to preview.\n"
                        f"  See what is in it with: dist-train inspect {index.folder}")  # fmt: skip
    split = index.split(config.data.train_split)
    classes = some_of_each_class(split, min(SHOWN_CLASSES, index.num_classes), per_class)
    samples = np.concatenate(classes)
    seen = [as_trained(config, index, samples, epoch, side) for epoch in range(num_epochs)]
    rows = []
    for i, (sample, stored) in enumerate(zip(samples.tolist(), thumbnails(split, samples, side), strict=True)):
        label = next(k for k, members in enumerate(classes) if sample in members)
        rows.append((index.classes[label], f"sample {sample}", [cell(stored), *(column[i] for column in seen)]))
    columns = ["as stored", *(f"epoch {epoch}" for epoch in range(num_epochs))]
    return Gallery("As the network sees them", rows, columns, _note(config, index))


def as_trained(config: RunConfig, index: ShardIndex, samples: np.ndarray, epoch: int, side: int) -> list[Cell]:
    """Samples (n,) of the training split as they enter the network in an epoch; where pairs are mixed, with the targets."""
    is_mixing, shown = bool(config.augment.mixup or config.augment.cutmix), []
    for pixels, targets in network_inputs(config, index, samples, epoch):
        values = pixels * torch.tensor(index.std)[:, None, None] + torch.tensor(index.mean)[:, None, None]
        picture = (values * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        shares = sorted(((float(part), index.classes[k]) for k, part in enumerate(targets)), reverse=True)
        note = " + ".join(f"{name} {part:.0%}" for part, name in shares[:2] if part >= 0.005) if is_mixing else ""
        shown.append(cell(_reduced(picture, side), note))
    return shown


def network_inputs(config: RunConfig, index: ShardIndex, samples: np.ndarray, epoch: int):
    """Yield what enters the network for each sample (n,) of the training split in an epoch, and its target.

    Each: float32 (3, H, W), normalised, and float32 (K,). Read through the stream itself, as a rank that holds one pair
    of the global batch: mixup and cutmix pair neighbours, and the stream is the same on any number of ranks.
    """
    data, augment = config.data, config.augment
    split, batch_size = index.split(data.train_split), data.global_batch_size
    transform = Augment(on_device_augment(config, index), input_size(config, index), index.mean, index.std,
                        interpolation=data.interpolation)  # fmt: skip
    is_mixing = bool(augment.mixup or augment.cutmix)
    if is_mixing and batch_size % 2:
        raise UserError(f"mixup and cutmix pair neighbours, so data.global_batch_size ({batch_size}) must be even.")
    try:
        order = Order(split.shard_samples, batch_size, config.seed, data.window_shards, data.lanes)
    except ValueError as error:
        raise UserError(f"{index.folder}: {error}.") from None
    share = 2 if batch_size % 2 == 0 else 1
    for sample, step in zip(samples.tolist(), steps_of(order, samples, epoch).tolist(), strict=True):
        batch_samples, batch_epochs = order.global_batch(step)
        row = int(np.flatnonzero((batch_samples == sample) & (batch_epochs == epoch))[0])
        place = (row // share, batch_size // share)
        (batch,) = training_stream(config, index, threads=1, world=place, start_step=step, stop_step=step + 1)
        pixels = transform(batch.images, batch.random_keys)
        targets = torch.nn.functional.one_hot(batch.labels, index.num_classes).float()
        if is_mixing:
            pixels, targets = mix(pixels, batch.labels, batch.random_keys, augment, index.num_classes)
        yield pixels[row % share], targets[row % share]


def steps_of(order: Order, samples: np.ndarray, epoch: int) -> np.ndarray:
    """The step at which each sample (n,) comes in an epoch: (n,) int64."""
    places = np.full(len(samples), -1, np.int64)
    by_number = np.argsort(samples)
    for start in range(0, order.num_samples, _CHUNK):
        here = np.arange(start, min(start + _CHUNK, order.num_samples))
        found = order.sample_at(epoch, here)
        spots = np.searchsorted(samples[by_number], found).clip(max=len(samples) - 1)
        hits = samples[by_number][spots] == found
        places[by_number[spots[hits]]] = here[hits]
        if (places >= 0).all():
            break
    return (epoch * order.num_samples + places) // order.global_batch_size


def is_augmented(config: RunConfig, index: ShardIndex) -> bool:
    """Whether training changes its pictures at all."""
    # which do nothing to a picture by themselves
    idle = ("flip_alternates", "scale", "ratio", "padding", "start_size", "full_size_from", "rand_magnitude")
    off = AugmentConfig(**{name: getattr(config.augment, name) for name in idle})
    return config.augment != off or decoder_crop(config, index)[0] == "random_resized"


def _note(config: RunConfig, index: ShardIndex) -> str:
    augment, done = config.augment, []
    crop = decoder_crop(config, index)[0]
    if crop == "random_resized" or augment.crop == "random_resized":
        done.append("a random box")
    elif augment.crop == "padded":
        done.append(f"shifted by up to {augment.padding} pixels")
    done += [f"turned by up to {augment.rotate_degrees:g}°"] if augment.rotate_degrees else []
    done += ["one operation of TrivialAugment"] if augment.trivial else []
    done += [f"{augment.rand_ops} operations of RandAugment"] if augment.rand_ops else []
    mirrored = "mirrored every other epoch" if augment.flip_alternates else "mirrored"
    words = {"flip": mirrored, "flip_vertical": "mirrored top to bottom", "brightness": "brighter or darker",
             "contrast": "contrast", "saturation": "saturation", "hue": "hue", "grayscale": "grey", "erase": "a box erased",
             "mixup": "mixed with a neighbour", "cutmix": "a box of a neighbour pasted in"}  # fmt: skip
    done += [f"{text} ({name} {getattr(augment, name):g})" for name, text in words.items() if getattr(augment, name)]
    return f"Drawn anew each epoch, keyed by seed, epoch and sample: {', '.join(done)}." if done else "Nothing is changed."


def _reduced(pixels: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)
