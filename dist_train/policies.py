"""TrivialAugment and RandAugment: one operation on each picture, or several, drawn by the picture's key.

TrivialAugment draws the strength as well (Müller and Hutter 2021, arXiv:2103.10158, wide ranges); RandAugment has one for all
(Cubuk and others 2019, arXiv:1909.13719). Operations and strengths are those of torchvision's TrivialAugmentWide and RandAugment.
Pixels are sampled bilinearly and what comes from outside is filled with the mean colour, as in augment.py, where torchvision
by itself takes the nearest pixel and black.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dist_train import colour
from dist_train.draws import uniforms

OPERATIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Color", "Sharpness",
              "Brightness", "Contrast", "Posterize", "Solarize", "AutoContrast", "Equalize")  # fmt: skip
(IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, COLOR, SHARPNESS,
 BRIGHTNESS, CONTRAST, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE) = range(len(OPERATIONS))  # fmt: skip
OPERATION, STRENGTH, SIGN = 68, 69, 70  # draws of the key, by use; augment.py has those below 64, mixing.py those up to 67
RAND = 71  # first draw of RandAugment: three a round, as above, up to 94
MAX_ROUNDS = 8
STRENGTHS = 31  # of each operation, evenly spaced
LEVELS = 256


def draw_operations(keys: Tensor, amounts: Tensor, first_draw: int = OPERATION) -> tuple[Tensor, Tensor]:
    """The operation of each key, (N,) int64, a place in OPERATIONS, and its amount, (N,) float32.

    amounts: `amount_table` or `rand_table`. first_draw: of three: operation, strength, sign.
    """
    draws = uniforms(keys, first_draw, 3)
    operation, strength, sign = ((draws[:, i] * n).long() for i, n in enumerate(amounts.shape))
    return operation, amounts[operation, strength, sign]


def amount_table(device: torch.device | str) -> Tensor:
    """What torchvision gives its functions, by operation, strength and sign: (14, STRENGTHS, 2) float32.

    Shear: tangent; translate: whole pixels; rotate: degrees, counter-clockwise; posterize: bits that stay; solarize: lowest level
    that is inverted; colour, sharpness, brightness, contrast: factor less 1.
    """
    strength = np.arange(STRENGTHS)
    most, shift = 0.99 * strength / 30, strength * 32 // 30
    return _table(strength, most, most, (shift, shift), strength * 4.5, np.rint(strength / 5)).to(device)


def rand_table(magnitude: int, size: tuple[int, int], device: torch.device | str) -> Tensor:
    """As `amount_table`, for RandAugment at one strength, 0 to 30: (14, 1, 2) float32. size: (height, width) of the pictures."""
    strength = np.array([magnitude])
    # torch's steps: numpy's differ in the last bit, which a whole number of pixels may hang on
    down, right = (torch.linspace(0.0, 150 / 331 * pixels, STRENGTHS)[strength].trunc().numpy() for pixels in size)
    return _table(strength, 0.3 * strength / 30, 0.9 * strength / 30, (right, down), strength, np.rint(strength / 7.5)).to(device)


def _table(strength: np.ndarray, shear, factor, shift: tuple, degrees, lost_bits) -> Tensor:
    signed = dict.fromkeys((COLOR, SHARPNESS, BRIGHTNESS, CONTRAST), factor) | dict.fromkeys((SHEAR_X, SHEAR_Y), shear)
    signed |= {TRANSLATE_X: shift[0], TRANSLATE_Y: shift[1], ROTATE: degrees}
    table = np.zeros((len(OPERATIONS), len(strength), 2))
    for operation, values in signed.items():
        table[operation] = np.stack([values, -values], 1)
    table[POSTERIZE] = 8 - lost_bits[:, None]
    table[SOLARIZE] = 255 - 8.5 * strength[:, None]
    return torch.from_numpy(table.astype(np.float32))


def is_moved(operations: Tensor) -> Tensor:
    """Whether pixels change places: (N,) bool."""
    return (operations >= SHEAR_X) & (operations <= ROTATE)


def motions(operations: Tensor, amounts: Tensor, size: tuple[int, int]) -> Tensor:
    """From which place of the picture each pixel comes: (N, 2, 3) float32, to be multiplied by (x, y, 1).

    x, y: pixels from the centre of pictures of `size` (height, width). A shear leaves the upper left corner where it is.
    """
    shear_x, shear_y, right, down, degrees = (
        torch.where(operations == operation, amounts, 0.0) for operation in range(SHEAR_X, ROTATE + 1)
    )
    turn, (height, width) = torch.deg2rad(degrees), size
    cos, sin = turn.cos(), turn.sin()
    to_x = [cos, shear_x - sin, shear_x * (height / 2) - right]
    to_y = [shear_y + sin, cos, shear_y * (width / 2) - down]
    return torch.stack(to_x + to_y, 1).view(-1, 2, 3)


def change_pixels(images: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """Do the operations that leave pixels in their places. images: float32 (N, C, H, W) in 0..1; they may be written over."""
    images = change_marked(images, operations >= BRIGHTNESS, change_levels, operations, amounts)
    images = change_marked(images, operations == COLOR, colour.adjust_saturation, 1 + amounts)
    return change_marked(images, operations == SHARPNESS, colour.adjust_sharpness, 1 + amounts)


def change_marked(images: Tensor, marked: Tensor, change: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """change(images, *values) for the pictures marked, the others as they are; images may be written over.

    images: (N, C, H, W); marked: (N,) bool; values: (N, ...) each. A picture's result does not depend on the others.
    """
    if not picks_pictures(images.device):
        return torch.where(marked[:, None, None, None], change(images, *values), images)
    rows = marked.nonzero()[:, 0]
    if len(rows):
        images[rows] = change(*(value.index_select(0, rows) for value in (images, *values)))
    return images


def picks_pictures(device: torch.device) -> bool:
    """Whether only the pictures concerned are computed, which saves a CPU most of the work: looking at values there costs no
    wait, as it would on a GPU."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def change_levels(images: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """Brightness to equalize: each pixel, rounded to a level, is looked up in its picture's table of what becomes of a level."""
    levels = (images * (LEVELS - 1)).round_().long().flatten(2)
    one = torch.ones((), dtype=torch.int32, device=images.device)
    counts = one.new_zeros(*images.shape[:2], LEVELS).scatter_add_(2, levels, one.expand_as(levels))
    return level_tables(counts, operations, amounts).gather(2, levels).view(images.shape)


def level_tables(counts: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """The value in 0..1 that takes the place of each level: (N, C, 256) float32.

    counts: (N, C, 256) int32, pixels of each level. Operations from BRIGHTNESS on; others change nothing.
    """
    level = torch.arange(LEVELS, device=counts.device)
    value, amounts = level.float(), amounts[:, None, None]
    lowest = torch.where(counts > 0, level, LEVELS - 1).amin(2, keepdim=True)
    highest = torch.where(counts > 0, level, 0).amax(2, keepdim=True)
    num_pixels = counts.sum(2, keepdim=True)
    # whole numbers up to here, so that no order of adding them up counts
    gray = colour.to_gray(((counts * level).sum(2, keepdim=True) / num_pixels)[..., None])[..., 0]
    lost_bits = (8 - amounts).long().clamp(0, 8)
    # Pillow's rule, which torchvision follows: pixels of the highest level do not count
    pace = (num_pixels - counts.gather(2, highest)) // (LEVELS - 1)
    evened = (counts.cumsum(2) - counts + pace // 2) // pace.clamp(min=1)
    changed = {
        BRIGHTNESS: value * (1 + amounts),
        CONTRAST: value * (1 + amounts) - gray * amounts,
        POSTERIZE: (level >> lost_bits << lost_bits).float(),
        SOLARIZE: torch.where(value >= amounts, LEVELS - 1 - value, value),
        AUTOCONTRAST: torch.where(highest > lowest, (level - lowest) * (LEVELS - 1) / (highest - lowest).clamp(min=1), value),
        EQUALIZE: torch.where(pace > 0, evened.float(), value),
    }
    tables = value.expand(counts.shape)
    for operation, values in changed.items():
        tables = torch.where((operations == operation)[:, None, None], values, tables)
    return (tables / (LEVELS - 1)).clamp(0, 1)
