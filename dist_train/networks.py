"""AlexNet, VGG and the multilayer perceptron: as published, and for small pictures with a stem that fits.

With stem "imagenet" the names and shapes of the parameters are torchvision's, so that its weights load. Stem "small"
keeps resolution (no stride of 4, no pooling that a small picture cannot bear) and sizes the head to what is left.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

ALEXNET_CHANNELS = (64, 192, 384, 256, 256)  # Krizhevsky, "One weird trick", 2014: torchvision's
ALEXNET_BN_CHANNELS = (96, 256, 384, 384, 256)  # Krizhevsky, Sutskever, Hinton 2012, both halves joined
VGG_CHANNELS = (64, 128, 256, 512, 512)
# Convolutions before each of the five pools; Simonyan and Zisserman 2014, configurations A, B, D and E.
VGG_CONVS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
SMALLEST = {"small": {"alexnet": 8, "vgg": 8}, "imagenet": {"alexnet": 63, "vgg": 32}}  # pixels of the shorter side


class ConvNet(nn.Module):
    """Convolutions, a pool to a fixed size, a classifier; the three names are torchvision's."""

    def __init__(self, features: nn.Module, avgpool: nn.Module, classifier: nn.Module):
        super().__init__()
        self.features, self.avgpool, self.classifier = features, avgpool, classifier

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) float. Returns logits (N, num_classes)."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


class GridPool(nn.AdaptiveAvgPool2d):
    """The mean over the windows of a grid, as a matrix product where that is exact: where windows have 1, 2, 4, ... pixels.

    torch's own takes 4% of AlexNet's step at 64 px on a CPU, and adds up in bf16 where the features are (2.15).
    """

    def forward(self, features: Tensor) -> Tensor:
        """features: (N, C, H, W) float. Returns (N, C, *output_size)."""
        sides = tuple(zip(features.shape[2:], self.output_size, strict=True))
        if all(there == wanted for there, wanted in sides):
            return features
        counts = {-(-(k + 1) * there // wanted) - k * there // wanted for there, wanted in sides for k in range(wanted)}
        if any(count & count - 1 for count in counts):
            return super().forward(features)
        shares = torch.kron(*(_window_shares(there, wanted, features.device) for there, wanted in sides))
        return (features.flatten(2) @ shares.to(features.dtype)).unflatten(2, self.output_size)


def _window_shares(there: int, wanted: int, device: torch.device) -> Tensor:
    """(there, wanted) float32: by how much each pixel of a side counts in each window; made where it is used."""
    pixel, window = torch.arange(there, device=device)[:, None], torch.arange(wanted, device=device)
    inside = (pixel >= window * there // wanted) & (pixel * wanted < (window + 1) * there)
    return inside / inside.sum(0)


def alexnet(
    num_classes: int, stem: str, size: tuple[int, int] | None, batchnorm: bool, width: float, dropout: float
) -> ConvNet:
    """AlexNet; with batchnorm the wider one of 2012 with BatchNorm in place of local response normalisation.

    stem "imagenet": 11x11 kernels, stride 4. "small": 3x3, stride 1; from 64 px on 5x5, stride 2. Only "small" needs
    the size of the pictures, (height, width).
    """
    c1, c2, c3, c4, c5 = (_scaled(c, width) for c in (ALEXNET_BN_CHANNELS if batchnorm else ALEXNET_CHANNELS))
    if stem == "imagenet":
        kernel, stride, padding, grid, hidden = 11, 4, 2, (6, 6), 4096
        pool = lambda: nn.MaxPool2d(3, 2)  # noqa: E731
    else:
        stride = 1 if min(size) < 64 else 2
        kernel, padding = (3, 1) if stride == 1 else (5, 2)
        grid, hidden = tuple(min(6, _halved(side, 3 + (stride == 2))) for side in size), 1024
        pool = lambda: nn.MaxPool2d(3, 2, padding=1)  # noqa: E731
    hidden = _scaled(hidden, width)
    features = nn.Sequential(
        *_conv(3, c1, kernel, stride, padding, batchnorm), pool(),
        *_conv(c1, c2, 5, 1, 2, batchnorm), pool(),
        *_conv(c2, c3, 3, 1, 1, batchnorm),
        *_conv(c3, c4, 3, 1, 1, batchnorm),
        *_conv(c4, c5, 3, 1, 1, batchnorm), pool(),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(dropout), nn.Linear(c5 * grid[0] * grid[1], hidden), nn.ReLU(inplace=True),
        nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    )  # fmt: skip
    return ConvNet(features, GridPool(grid), classifier)


def vgg(
    num_classes: int,
    convs: tuple[int, ...],
    stem: str,
    size: tuple[int, int] | None,
    batchnorm: bool,
    width: float,
    dropout: float,
) -> ConvNet:
    """VGG with convs[i] convolutions before pool i.

    stem "small": one hidden layer of 512 instead of two of 4096, and of the five pools only the last ones that the
    picture bears, so that 16 px begin with four. Only "small" needs the size of the pictures, (height, width).
    """
    num_pools = len(convs)
    if stem == "small":
        num_pools = min(num_pools, min(size).bit_length() - 1)
    layers, last = [], 3
    for i, (num_convs, channels) in enumerate(zip(convs, VGG_CHANNELS, strict=True)):
        for _ in range(num_convs):
            layers += _conv(last, _scaled(channels, width), 3, 1, 1, batchnorm, bias=True)
            last = _scaled(channels, width)
        if i >= len(convs) - num_pools:
            # the last one passes a single pixel on where pictures are smaller at first; at full size nothing changes
            is_even = stem == "small" and all((side >> num_pools - 1) % 2 == 0 for side in size)
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=is_even and i == len(convs) - 1))
    if stem == "small":
        grid = tuple(min(7, side >> num_pools) for side in size)
        hidden = _scaled(512, width)
        classifier = nn.Sequential(
            nn.Linear(last * grid[0] * grid[1], hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip
    else:
        grid, hidden = (7, 7), _scaled(4096, width)
        classifier = nn.Sequential(
            nn.Linear(last * 49, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip
    return ConvNet(nn.Sequential(*layers), GridPool(grid), classifier)


def mlp(
    num_classes: int, num_features: int, hidden: tuple[int, ...], activation: str, batchnorm: bool, dropout: float
) -> nn.Sequential:
    """Linear, BatchNorm if wanted, activation and dropout for each hidden layer, then the head.

    Takes (N, num_features) float, returns logits (N, num_classes).
    """
    kinds = {
        "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU,
        "tanh": nn.Tanh,
    }  # fmt: skip
    layers, last = [], num_features
    for units in hidden:
        norm = [nn.BatchNorm1d(units)] if batchnorm else []
        layers += [nn.Linear(last, units), *norm, kinds[activation](), nn.Dropout(dropout)]
        last = units
    return nn.Sequential(OrderedDict(hidden=nn.Sequential(*layers), head=nn.Linear(last, num_classes)))


def initialize(model: nn.Module, activation: str = "relu", passes_on: bool = False) -> None:
    """Draw every parameter from torch's CPU generator, anew even where memory was never filled.

    He et al. 2015 for what an activation follows: it keeps the scale through a VGG without BatchNorm, which does not
    learn otherwise. tanh takes Glorot's gain, selu LeCun's. The last layer starts near zero, so that the first loss
    is ln(classes). passes_on: all convolutions but the first start with a filter for each of their input channels that
    passes it on, as far as they have filters (partial Dirac; Jordan 2024, arXiv:2404.00498); the others stay drawn.
    """
    gain = {"tanh": 5 / 3, "selu": 1.0}.get(activation, 2**0.5)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for module in weighted:
        if module is weighted[-1]:
            nn.init.normal_(module.weight, 0, 0.1 / module.weight[0].numel() ** 0.5)
        else:  # uniform of the same variance: normal_ costs 4x as long, a second for AlexNet's classifier
            bound = gain * (3 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if passes_on:
        for conv in [m for m in weighted if isinstance(m, nn.Conv2d)][1:]:
            nn.init.dirac_(conv.weight[: conv.in_channels])
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int, padding: int, batchnorm: bool, bias: bool = False
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias or not batchnorm)
    return [conv, *([nn.BatchNorm2d(outputs)] if batchnorm else []), nn.ReLU(inplace=True)]


def _scaled(channels: int, width: float) -> int:
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


def _halved(side: int, times: int) -> int:
    return -(-side // 2**times)
