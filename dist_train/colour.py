"""Colour operations on batches of float pictures, each picture with its own strength; they match torchvision's.

Pictures are (N, C, H, W) float32 in 0..1, C 1 or 3; factors and shifts are (N,) float32. Nothing is changed in place.
Definitions: torchvision.transforms.v2.functional. On grey pictures (C = 1) what concerns colour changes nothing.
"""

import torch
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2 in torchvision's digits


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each picture: 0 is black, 1 as it is."""
    return (images * _per_image(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each picture with the mean of its greyscale: 0 is flat grey, 1 as it is."""
    mean = to_gray(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each picture with its greyscale: 0 is grey, 1 as it is."""
    return _blend(images, to_gray(images), factor) if images.shape[1] == 3 else images


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each picture with a smoothed copy: 0 is smooth, 1 as it is. The outermost pixels stay."""
    return images if min(images.shape[2:]) <= 2 else _blend(images, _smoothed(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn each picture's hue by `shift` turns (-0.5 to 0.5), by way of HSV."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == red, (green - blue) / divisor,
          torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor))  # fmt: skip
    hue = hue + 6 * shift[:, None, None]  # in sixths of a turn
    # Each channel falls from the value by the chroma as the hue leaves its sector (the closed form of HSV to RGB).
    channels = []
    for sector in (5, 3, 1):
        distance = torch.remainder(hue + sector, 6)
        channels.append(value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1))
    return torch.stack(channels, 1)


def to_gray(images: Tensor) -> Tensor:
    """The luminance of each pixel: (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def drop_colour(images: Tensor, dropped: Tensor) -> Tensor:
    """Replace the pictures marked in `dropped` (N,) bool by their greyscale."""
    return torch.where(_per_image(dropped), to_gray(images), images)


def _smoothed(images: Tensor) -> Tensor:
    """The mean of each pixel and its eight neighbours, itself counted five times; the outermost pixels as they are."""
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    smoothed, inner = images.clone(), images[:, :, 1:-1, 1:-1]
    smoothed[:, :, 1:-1, 1:-1] = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13
    return smoothed


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor)
    return (images * factor + other * (1 - factor)).clamp(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
