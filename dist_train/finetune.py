"""Fine-tuning: which layers stay as they are, for how long, and how much slower the lower ones learn."""

from collections.abc import Iterator

from torch import nn


def freeze_below_head(model: nn.Module, head: str, is_frozen: bool) -> None:
    """Let only the layer named head be trained, or all of them again; to be called after `model.train()`.

    Frozen weights get no gradient, so no update, no decay and no momentum, and the backward pass ends at the head.
    Frozen BatchNorm normalises with its running statistics, which stay put. Dropout is drawn as ever: the head needs it.
    """
    trained = {id(p) for p in model.get_submodule(head).parameters()}
    for p in model.parameters():
        p.requires_grad_(not is_frozen or id(p) in trained)
    if is_frozen:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def layer_depths(model: nn.Module, head: str) -> dict[str, int]:
    """Name of each parameter -> layers between it and the output: 0 for the layer named head, 1 for the one below, ...

    A layer is a block of the network in the order of its modules: a convolution of VGG, a residual block of ResNet, an
    encoder block of ViT. Norms, biases and tokens belong to the layer before them, the first ones to the first layer.
    """
    layers: list[list[str]] = [[]]
    waiting = True  # for the first layer's weights
    half = sum(p.numel() for p in model.parameters()) / 2
    for names, begins_layer in _blocks(model, "", head, half):
        if begins_layer and not waiting:
            layers.append([])
        waiting = waiting and not begins_layer
        layers[-1] += names
    return {name: len(layers) - 1 - k for k, names in enumerate(layers) for name in names}


def _blocks(module: nn.Module, prefix: str, head: str, half: float) -> Iterator[tuple[list[str], bool]]:
    """(parameter names, whether they begin a layer), from input to output.

    Opened are the network, sequences in it, what holds more than half of all weights (ViT's encoder), and timm's stages, whose
    sequence is called blocks.
    """
    yield [prefix + name for name, _ in module.named_parameters(recurse=False)], False
    for name, child in module.named_children():
        sequence = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        is_large = sum(p.numel() for p in child.parameters()) > half
        if any(True for _ in child.children()) and (sequence or is_large or hasattr(child, "blocks")):
            yield from _blocks(child, f"{prefix}{name}.", head, half)
        elif names := [f"{prefix}{name}.{n}" for n, _ in child.named_parameters()]:
            yield names, prefix + name == head or any(p.dim() >= 2 for p in child.parameters())
