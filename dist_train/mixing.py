"""Mixup and cutmix: neighbours of a batch, blended or with a box exchanged, and soft targets to match.

Samples are paired (0, 1), (2, 3), ... in the batch. A global batch is cut into even shares, so a sample has the same
partner on any number of ranks; what is done to a pair follows from the key of its first sample.
"""

import torch
from torch import Tensor

from dist_train.config import AugmentConfig
from dist_train.draws import betas, chance, uniform

CHOICE, SHARE, CENTRE_Y, CENTRE_X = 64, 65, 66, 67  # draws of the key, by use; augment.py has those below 64


def mix(images: Tensor, labels: Tensor, keys: Tensor, config: AugmentConfig, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each pair of neighbours by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019); with both on, by either.

    images: float32 (N, C, H, W); labels: (N,) int64; keys: (N,) int64. Returns images of the same shape in
    channels-last memory and targets, float32 (N, num_classes), rows summing to 1. Raises ValueError if N is odd or
    neither is on.
    """
    if len(images) % 2 or not (config.mixup or config.cutmix):
        raise ValueError(f"mixing pairs neighbours: {len(images)} samples, {config}")
    pair_keys = keys.view(-1, 2)[:, :1].expand(-1, 2).reshape(-1)
    shares = betas(pair_keys, SHARE, tuple(alpha for alpha in (config.mixup, config.cutmix) if alpha))
    if config.mixup:
        share = blended = shares[0]
        kept = share[:, None, None, None]
    if config.cutmix:
        height, width = images.shape[2:]
        box = draw_cut(pair_keys, height, width, shares[-1])
        kept, share = outside(box, height, width), share_outside(box, height, width)
    if config.mixup and config.cutmix:
        is_blended = chance(pair_keys, CHOICE, 0.5)
        share = torch.where(is_blended, blended, share)
        kept = torch.where(is_blended[:, None, None, None], blended[:, None, None, None], kept)
    return blend_pairs(images, kept), soft_targets(labels, share, num_classes)


def blend_pairs(images: Tensor, kept: Tensor) -> Tensor:
    """Each picture times `kept` plus its partner times the rest. kept: float32 (N, 1, 1 or H, 1 or W) in 0..1."""
    return torch.lerp(_partners(images), images, kept).contiguous(memory_format=torch.channels_last)


def soft_targets(labels: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """The label's class with weight `share` (N,), the partner's with the rest: float32 (N, num_classes)."""
    own = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    return own * share[:, None] + _partners(own) * (1 - share[:, None])


def draw_cut(keys: Tensor, height: int, width: int, share: Tensor) -> Tensor:
    """The box to exchange: (N, 4) float32 top, bottom, left, right, whole pixels.

    Its sides are sqrt(1 - share) of the picture's; its centre is any pixel, and what reaches over the edge is cut off.
    """
    half = 0.5 * (1 - share).sqrt()
    y, x = (uniform(keys, CENTRE_Y) * height).floor(), (uniform(keys, CENTRE_X) * width).floor()
    half_y, half_x = (half * height).floor(), (half * width).floor()
    top, bottom = (y - half_y).clamp(min=0), (y + half_y).clamp(max=height)
    left, right = (x - half_x).clamp(min=0), (x + half_x).clamp(max=width)
    return torch.stack([top, bottom, left, right], 1)


def outside(box: Tensor, height: int, width: int) -> Tensor:
    """1 outside the box and 0 inside: float32 (N, 1, H, W)."""
    top, bottom, left, right = (side[:, None] for side in box.unbind(1))
    y, x = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return (~(rows[:, :, None] & columns[:, None, :]))[:, None].float()


def share_outside(box: Tensor, height: int, width: int) -> Tensor:
    """Share of the picture's area outside the box: (N,) float32. It is the label's weight, whatever share was drawn."""
    top, bottom, left, right = box.unbind(1)
    return 1 - (bottom - top) * (right - left) / (height * width)


def _partners(values: Tensor) -> Tensor:
    return values[torch.arange(len(values), device=values.device) ^ 1]
