"""What is done to a batch of training pictures on the device, each picture with its own keyed draws.

The order is fixed: geometry (crop, flips, rotation, resize as ONE resampling), the operations of TrivialAugment or
RandAugment (policies.py; the first one's moves ride in that resampling), brightness, contrast, saturation, hue,
greyscale, normalising, erasing; then mixup or cutmix (`mix`, in mixing.py). What is done to a sample follows from its
key alone, never from its neighbours. Whatever comes from outside a picture has the mean colour: 0 once normalised. No
value is read back from a GPU and every shape is static there, so all of it can be compiled or captured in a CUDA graph.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train import colour, policies
from dist_train.boxes import fallback_box, side_tables
from dist_train.config import AugmentConfig
from dist_train.draws import between, chance, random_boxes, uniform
from dist_train.errors import UserError

# Draws of a key, by use; mixing.py and policies.py have those from 64 on. The decoder's box is draws 0 to 21, so the crop must
# start at 0. A number that moves changes the pixels of runs that go on.
CROP, FLIP, ROTATE = 0, 32, 33
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE = 34, 35, 36, 37, 38
ERASE, ERASE_BOX = 39, 40  # the box is draws 40 to 61
FLIP_VERTICAL = 62
Channels = Sequence[float]  # one number a channel
Operations = tuple[Tensor, Tensor]  # one for each picture, and its amount: see policies.draw_operations
ERASE_SCALE, ERASE_RATIO = (0.02, 1 / 3), (0.3, 3.3)  # Zhong et al. 2017, as in torchvision
MAX_SHRINK = 1.5  # reduced by more than this, bilinear sampling skips pixels and shows false patterns


class Augment:
    """Augment and normalise batches: `pixels = augment(images, keys)`. Holds the settings and their constants.

    size: (height, width) of the output. mean, std: per channel, of pixels in 0..1. Where the decoder has already cut
    the random box out, give a config with crop "none". interpolation: data.interpolation. Raises UserError naming every setting
    out of range.
    """

    def __init__(self, config: AugmentConfig, size: tuple[int, int], mean: Channels, std: Channels, device="cpu",
                 interpolation: str = "bilinear"):  # fmt: skip
        check(config)
        self.config, self.size, self.interpolation = config, tuple(size), interpolation
        self.mean, self.std = (_channels(tuple(values), torch.device(device)) for values in (mean, std))
        self.crop_tables, self.erase_tables = (
            torch.from_numpy(np.stack(side_tables(scale, ratio))).to(device)
            for scale, ratio in ((config.scale, config.ratio), (ERASE_SCALE, ERASE_RATIO))
        )
        is_rand, magnitude = config.rand_ops > 0, config.rand_magnitude
        self.amounts = policies.rand_table(magnitude, self.size, device) if is_rand else policies.amount_table(device)
        self.whole = torch.tensor([[0.0, 0.0, *size]], device=device)

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """images: uint8 (N, C, H, W), any memory format, C 1 or 3; keys: (N,) int64 from `sample_keys`, same device.

        Returns float32 (N, C, height, width) in channels-last memory, normalised.
        """
        rounds = self.draw_rounds(keys)
        images = self.transform_geometry(images, keys, rounds[:1])
        for i, operations in enumerate(rounds):
            if i:
                images = self.move(images, *operations)
            images = policies.change_pixels(images, *operations)
        images = self.jitter(images, keys)
        images = images.sub_(self.mean).div_(self.std)  # in place: on a CPU, fresh memory costs more than arithmetic
        if self.config.erase:
            images = erase(images, *self.draw_erasing(keys))
        return images.contiguous(memory_format=torch.channels_last)

    def draw_rounds(self, keys: Tensor) -> list[Operations]:
        """What TrivialAugment, one round, or RandAugment does to each picture, a round after the other; neither: no rounds."""
        rand = [policies.RAND + 3 * i for i in range(self.config.rand_ops)]
        return [policies.draw_operations(keys, self.amounts, draw) for draw in rand or [policies.OPERATION] * self.config.trivial]

    def transform_geometry(self, images: Tensor, keys: Tensor, first: list[Operations]) -> Tensor:
        """Crop, flip, rotate, move, resize: uint8 (N, C, H, W) -> float32 (N, C, height, width) in 0..1.

        first: the first of `draw_rounds`, whose moves are done, or none. Rotation is about the centre of the output.
        Flips and whole-pixel shifts copy pixels exactly; resizing the whole picture is antialiased; all else is one
        bilinear sampling, whatever the interpolation, after an antialiased reduction where the pictures are more than
        MAX_SHRINK times larger than the output. A crop that is rotated, sheared or moved shows what lies around it in the picture.
        """
        config, pictures = self.config, to_float(images)
        stored = tuple(images.shape[2:])
        flipped = self.draw_flips(keys) if config.flip else None
        upended = chance(keys, FLIP_VERTICAL, config.flip_vertical) if config.flip_vertical else None
        if config.crop != "random_resized" and not config.rotate_degrees:
            if stored != self.size:
                pictures = resize(pictures, self.size, self.interpolation)
            if config.crop == "padded":
                pictures = shift_crop(pictures, *self.draw_shift(keys), config.padding, self.mean)
            pictures = pictures if flipped is None else flip(pictures, flipped)
            pictures = pictures if upended is None else flip(pictures, upended, axis=2)
            return self.move(pictures, *first[0]) if first else pictures
        motion = is_moved = None
        if first:
            motion, is_moved = policies.motions(*first[0], self.size), policies.is_moved(first[0][0])
        if config.rotate_degrees:
            turned = rotation(between(keys, ROTATE, -config.rotate_degrees, config.rotate_degrees))
            motion, is_moved = turned if motion is None else after(turned, motion), None
        boxes = self.draw_boxes(keys, stored)
        spare = MAX_SHRINK if config.crop == "random_resized" else 1.0  # small boxes need pixels to enlarge
        reduced = tuple(
            math.ceil(spare * pixels) if side > MAX_SHRINK * pixels else side
            for side, pixels in zip(stored, self.size, strict=True)
        )
        if reduced != stored:
            pictures = resize(pictures, reduced, self.interpolation)
            zoom_y, zoom_x = reduced[0] / stored[0], reduced[1] / stored[1]
            top, left, height, width = boxes.unbind(1)
            boxes = torch.stack([top * zoom_y, left * zoom_x, height * zoom_y, width * zoom_x], 1)
        return sample_boxes(pictures, boxes, self.size, flipped, motion, self.mean, upended, is_moved)

    def move(self, pictures: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
        """Do the moves among a round's operations on float32 pictures of the output's size, which may be written over."""

        def sample(pictures: Tensor, motion: Tensor) -> Tensor:
            return sample_boxes(pictures, self.whole, self.size, None, motion, self.mean)

        motion = policies.motions(operations, amounts, self.size)
        return policies.change_marked(pictures, policies.is_moved(operations), sample, motion)

    def jitter(self, images: Tensor, keys: Tensor) -> Tensor:
        """Brightness, contrast, saturation, hue, then greyscale: float32 (N, C, H, W) in 0..1, and so returned."""
        config = self.config
        for strength, draw, adjust in (
            (config.brightness, BRIGHTNESS, colour.adjust_brightness),
            (config.contrast, CONTRAST, colour.adjust_contrast),
            (config.saturation, SATURATION, colour.adjust_saturation),
        ):
            if strength:
                images = adjust(images, between(keys, draw, max(0.0, 1 - strength), 1 + strength))
        if config.hue:
            images = colour.adjust_hue(images, between(keys, HUE, -config.hue, config.hue))
        if config.grayscale:
            images = colour.drop_colour(images, chance(keys, GRAYSCALE, config.grayscale))
        return images

    def draw_boxes(self, keys: Tensor, stored: tuple[int, int]) -> Tensor:
        """The box each crop takes from pictures of stored (height, width): (N, 4) float32 top, left, height, width.

        Random ones equal those of `boxes.random_resized_boxes`; padded ones reach over the edge.
        """
        if self.config.crop == "random_resized":
            drawn, fits = random_boxes(keys, CROP, *stored, self.crop_tables)
            fallback = fallback_box(*stored, self.config.ratio)
            sides = [torch.where(fits, side, float(fallback[i])) for i, side in enumerate(drawn.unbind(1))]
        else:
            zero = torch.zeros_like(keys, dtype=torch.float32)
            sides = [zero, zero, zero + stored[0], zero + stored[1]]
            if self.config.crop == "padded":
                padding = float(self.config.padding)  # in pixels of what comes out
                sides[:2] = ((place - padding) * (here / out)
                             for place, here, out in zip(self.draw_shift(keys), stored, self.size, strict=True))  # fmt: skip
        return torch.stack(sides, 1)

    def draw_flips(self, keys: Tensor) -> Tensor:
        """Which pictures to mirror: (N,) bool. Alternating flips are Jordan's (2024): every mirror image within two epochs."""
        return keys < 0 if self.config.flip_alternates else chance(keys, FLIP, self.config.flip)

    def draw_shift(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Top and left of the window in the padded picture, 0 to twice the padding: (N,) int64 each."""
        places = 2 * self.config.padding + 1
        return (uniform(keys, CROP) * places).long(), (uniform(keys, CROP + 1) * places).long()

    def draw_erasing(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The box to erase, (N, 4) float32 top, left, height, width, and whether to erase it, (N,) bool."""
        height, width = self.size
        drawn, fits = random_boxes(keys, ERASE_BOX, height, width, self.erase_tables, below=(height - 1, width - 1))
        return drawn, chance(keys, ERASE, self.config.erase) & fits


def evaluation_pixels(
    images: Tensor, size: tuple[int, int], mean: Channels, std: Channels, interpolation: str = "bilinear"
) -> Tensor:
    """Normalise pictures for evaluation, resized (antialiased) to (height, width) where they have another size.

    images: uint8 (N, C, H, W). Returns float32 (N, C, height, width) in channels-last memory.
    """
    pictures = to_float(images)
    if tuple(images.shape[2:]) != tuple(size):
        pictures = resize(pictures, tuple(size), interpolation)
    mean, std = (_channels(tuple(values), images.device) for values in (mean, std))
    return pictures.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> new float32 in 0..1, one plane a channel: sampling and colour run several times faster on planes."""
    assert images.dtype == torch.uint8, images.dtype
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def resize(images: Tensor, size: tuple[int, int], interpolation: str = "bilinear", limits: tuple = (0.0, 1.0)) -> Tensor:
    """Resize the whole picture, antialiased, as torchvision does. limits: least and most, where bicubic's overshoot is cut off."""
    resized = F.interpolate(images, size=size, mode=interpolation, antialias=True, align_corners=False)
    return resized.clamp_(*limits) if interpolation == "bicubic" else resized


def flip(images: Tensor, flipped: Tensor, axis: int = 3) -> Tensor:
    """Mirror the pictures marked in flipped (N,) bool: left to right, or top to bottom with axis 2."""
    return torch.where(flipped[:, None, None, None], images.flip(axis), images)


def shift_crop(images: Tensor, top: Tensor, left: Tensor, padding: int, fill: Tensor) -> Tensor:
    """Pad each side and cut a window of the old size out; pixels are copied, not interpolated.

    images: float32 (N, C, H, W); top, left: (N,) int64, 0 to 2 * padding; fill: (1, C, 1, 1), the padding's colour.
    """
    num_images, channels, height, width = images.shape
    padded = F.pad(images - fill, (padding,) * 4).flatten(2)
    rows = top[:, None] + torch.arange(height, device=top.device)
    columns = left[:, None] + torch.arange(width, device=top.device)
    place = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    place = place.view(num_images, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, place).view(images.shape).add_(fill)


def sample_boxes(
    images: Tensor, boxes: Tensor, size: tuple[int, int], flipped: Tensor | None, motion: Tensor | None, fill: Tensor,
    upended: Tensor | None = None, is_moved: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cut boxes out, resize them to `size`, mirror them, move them, in one bilinear sampling.

    images: float32 (N, C, H, W); boxes: (N, 4) top, left, height, width, pixels; flipped, upended: (N,) bool or None,
    left to right and top to bottom; motion: (N, 2, 3) or None, from which place (x, y) of the resized box a pixel of the
    output at (x, y, 1) comes, counted in its pixels from its centre; fill: (1, C, 1, 1), the colour outside the picture.
    Without a motion the result is torchvision's resized_crop without antialias: a box ends at its own outermost pixels;
    and so it is for pictures that is_moved, (N,) bool, if given, leaves out, whose motion must be none.
    """
    box_y, box_x, box_height, box_width = (side[:, None] for side in boxes.unbind(1))
    height, width = size
    y = torch.arange(height, device=images.device) + (0.5 - height / 2)  # output pixels from the output's centre
    x = torch.arange(width, device=images.device) + (0.5 - width / 2)
    zoom_x, zoom_y = box_width / width, box_height / height
    if flipped is not None:
        zoom_x = torch.where(flipped[:, None], -zoom_x, zoom_x)
    if upended is not None:
        zoom_y = torch.where(upended[:, None], -zoom_y, zoom_y)
    centre_x, centre_y = box_x + box_width / 2, box_y + box_height / 2
    half = 0.5  # of a pixel: the middle of the box's outermost ones
    if motion is None:
        columns_x = (x * zoom_x + centre_x).clamp(box_x + half, box_x + box_width - half)
        rows_y = (y * zoom_y + centre_y).clamp(box_y + half, box_y + box_height - half)
        columns_y, rows_x = torch.zeros_like(columns_x), torch.zeros_like(rows_y)
    else:
        (x_by_x, x_by_y, x_by_1), (y_by_x, y_by_y, y_by_1) = ([part[:, None] for part in row.unbind(1)] for row in motion.unbind(1))
        columns_x, columns_y = (x * x_by_x + x_by_1) * zoom_x, (x * y_by_x + y_by_1) * zoom_y
        rows_x, rows_y = y * x_by_y * zoom_x, y * y_by_y * zoom_y
        if is_moved is not None:
            reach_x, reach_y = (torch.where(is_moved[:, None], math.inf, side / 2 - half) for side in (box_width, box_height))
            columns_x, rows_y = columns_x.clamp(-reach_x, reach_x), rows_y.clamp(-reach_y, reach_y)
        columns_x, columns_y = columns_x + centre_x, columns_y + centre_y
    # grid_sample counts a picture's width and height from -1 to 1. The grid is the sum of a row's and a column's part:
    # one pass over it, where F.affine_grid costs more than the sampling itself on a CPU.
    columns = torch.stack([columns_x * (2 / images.shape[3]) - 1, columns_y * (2 / images.shape[2])], -1)
    rows = torch.stack([rows_x * (2 / images.shape[3]), rows_y * (2 / images.shape[2]) - 1], -1)
    grid = columns[:, None] + rows[:, :, None]
    if motion is None:
        return F.grid_sample(images, grid, align_corners=False, padding_mode="border")
    return F.grid_sample(images - fill, grid, align_corners=False, padding_mode="zeros").add_(fill)


def rotation(angle: Tensor) -> Tensor:
    """The motion (see `sample_boxes`) that turns pictures about their centre. angle: (N,) degrees, counter-clockwise."""
    turn = torch.deg2rad(angle)
    cos, sin = turn.cos(), turn.sin()
    zero = torch.zeros_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)


def after(first: Tensor, second: Tensor) -> Tensor:
    """The motion that does one and then another: (N, 2, 3) each. Their product by sums: matmul may round to TF32."""
    turned = (first[:, :, :2, None] * second[:, None]).sum(2)
    return torch.cat([turned[:, :, :2], turned[:, :, 2:] + first[:, :, 2:]], 2)


def erase(images: Tensor, boxes: Tensor, erased: Tensor) -> Tensor:
    """Set a box to 0, the mean of normalised pictures, in those marked in erased (N,) bool. boxes: (N, 4) pixels."""
    top, left, height, width = (side[:, None] for side in boxes.unbind(1))
    y, x = torch.arange(images.shape[2], device=images.device), torch.arange(images.shape[3], device=images.device)
    rows = (y >= top) & (y < top + height) & erased[:, None]
    columns = (x >= left) & (x < left + width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def check(config: AugmentConfig) -> None:
    """Raise UserError naming every setting out of range, with what was expected."""
    problems = []

    def expect(name: str, holds: bool, expected: str) -> None:
        if not holds:
            problems.append(f"augment.{name} is {getattr(config, name)!r}; expected {expected}.")

    for name in ("flip", "flip_vertical", "grayscale", "erase"):
        expect(name, 0 <= getattr(config, name) <= 1, "a probability, 0 to 1")
    for name in ("brightness", "contrast", "saturation", "mixup", "cutmix"):
        expect(name, 0 <= getattr(config, name) < math.inf, "0 (off) or more")
    expect("hue", 0 <= config.hue <= 0.5, "0 to 0.5 turns")
    expect("rotate_degrees", 0 <= config.rotate_degrees <= 180, "0 to 180 degrees")
    expect("flip", config.flip == 0.5 or not config.flip_alternates, "0.5 beside augment.flip_alternates")
    expect("rand_ops", 0 <= config.rand_ops <= policies.MAX_ROUNDS, f"0 (off) to {policies.MAX_ROUNDS} operations")
    expect("rand_ops", not (config.trivial and config.rand_ops), "0 beside augment.trivial: RandAugment or TrivialAugment")
    expect("rand_magnitude", 0 <= config.rand_magnitude < policies.STRENGTHS, f"0 to {policies.STRENGTHS - 1}")
    expect("padding", config.padding >= 0, "0 pixels or more")
    expect("scale", 0 < config.scale[0] <= config.scale[1] <= 1, "two shares of the area, rising, above 0 and up to 1")
    expect("ratio", 0 < config.ratio[0] <= config.ratio[1] < math.inf, "two aspect ratios, rising, above 0")
    if problems:
        raise UserError("\n".join(problems))


@functools.lru_cache(maxsize=16)
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(n,) float32 on a device, copied there once: each copy makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return constants(values, device).view(1, -1, 1, 1)
