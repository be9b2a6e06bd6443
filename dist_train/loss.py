"""The loss where classes are unbalanced: cross-entropy with a weight for each class."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def class_weights(counts: np.ndarray, power: float, device: torch.device) -> Tensor:
    """Each class's inverse frequency to a power, scaled to mean 1 over the samples counted: (K,) float32 on the device.

    counts: (K,) samples of each class in what is trained on; a class without any has weight 0. With power 1 they are
    scikit-learn's class_weight="balanced".
    """
    weights = np.zeros(len(counts))
    is_there = counts > 0
    weights[is_there] = (counts[is_there] / counts.sum()) ** -float(power)
    weights *= counts.sum() / (weights @ counts)
    return torch.tensor(weights, dtype=torch.float32, device=device)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the samples of the weight of a sample's class times its smoothed cross-entropy: () float32.

    logits: (N, K) float32; targets: (N,) int64 classes, or (N, K) float32 shares of mixed ones; weights: (K,) float32.
    A mixed sample's loss is the mix of the losses of its two classes (Zhang et al. 2018), each with its own weight.

    The mean is over N. F.cross_entropy(weight=...) divides by the sum of the labels' weights, which is another one in every
    micro-batch and on every rank; and what smoothing spreads over the classes has their weights there, so that it would
    draw the samples of common classes towards the rare ones.
    """
    if targets.is_floating_point():
        weighted = targets * weights
        spread = weighted.sum(1, keepdim=True) * (label_smoothing / logits.shape[1])
        return F.cross_entropy(logits, weighted * (1 - label_smoothing) + spread)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return (losses * weights[targets]).mean()
