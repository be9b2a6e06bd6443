"""A network by its name: AlexNet, VGG and the MLP from here, any other classifier from torchvision or timm."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from dist_train import networks, timm_models
from dist_train.config import ModelConfig
from dist_train.errors import UserError, did_you_mean

OWN = ("alexnet", "alexnet_bn", *(name + bn for name in networks.VGG_CONVS for bn in ("", "_bn")), "mlp")
# torchvision's, by how their names begin
_WITH_DROPOUT = ("efficientnet", "googlenet", "inception", "mnasnet", "mobilenet", "squeezenet", "vit_")
_WITH_DROP_PATH = ("convnext", "efficientnet", "maxvit", "swin")


def build_model(
    config: ModelConfig, num_classes: int, image_size: tuple[int, int] | None, num_features: int | None, seed: int,
    say: Callable[[str], None] = lambda line: None, is_trained: bool = True,
) -> nn.Module:
    """Build the network, with weights drawn from seed or loaded.

    image_size: (height, width) of what enters, None where it varies; num_features: columns of a table, None for
    pictures; say: takes lines about the weights that are loaded; is_trained: whether a training follows, as a last layer for
    other classes than those of the weights needs. The network takes (N, 3, H, W) or (N, num_features) float and returns logits
    (N, num_classes). torch's generator is left as it was. Raises UserError for an unknown name, a picture that is too small,
    and weights that do not fit.
    """
    assert (config.name == "mlp") == (num_features is not None), "mlp is for tables, all others for pictures"
    if config.init == "dirac" and (config.name == "mlp" or config.name not in OWN):
        raise UserError(f"model.init is dirac, which is for alexnet and vgg, not {config.name}; leave it out.")
    if num_features is None:
        _check_size(config, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the GPUs' generators for good
        if config.name in OWN:
            model = _own(config, num_classes, image_size, num_features)
        elif config.name.startswith(timm_models.PREFIX):
            model = timm_models.build(config, num_classes, image_size)
        else:
            model = _torchvision(config, num_classes, image_size)
    if config.pretrained:
        from dist_train.pretrained import load_pretrained

        load_pretrained(model, config, head_name(model, num_classes), image_size, say, is_trained)
    return model


def rates_taken(config: ModelConfig) -> set[str]:
    """Which of dropout and drop_path, if set, change the network, with layers that are keyed by the sample."""
    if config.name in OWN:
        return {"dropout"}
    if config.name.startswith(timm_models.PREFIX):
        return {name for name, option in timm_models.RATES.items() if option in timm_models.rates(config)}
    found = {"dropout": _WITH_DROPOUT, "drop_path": _WITH_DROP_PATH}
    return {name for name, families in found.items() if config.name.startswith(families)}


def uses_small_stem(config: ModelConfig, image_size: tuple[int, int] | None) -> bool:
    """Whether the network keeps the resolution of small pictures: model.stem, or by size where that says auto."""
    if config.stem != "auto":
        return config.stem == "small"
    return image_size is not None and min(image_size) < (128 if config.name == "alexnet_bn" else 64)


def head_name(model: nn.Module, num_classes: int) -> str:
    """Name of the last layer, the one with an output for each class."""
    num_outputs = {name: getattr(m, "out_features", None) or getattr(m, "out_channels", None) for name, m in model.named_modules()}
    return [name for name, number in num_outputs.items() if number == num_classes][-1]


def _check_size(config: ModelConfig, image_size: tuple[int, int] | None) -> None:
    small = uses_small_stem(config, image_size)
    if small and image_size is None:
        raise UserError("model.stem is small, but the pictures differ in size; set data.image_size.")
    family = config.name.removesuffix("_bn").rstrip("0123456789")
    least = networks.SMALLEST["small" if small else "imagenet"].get(family)
    if image_size and least and config.name in OWN and min(image_size) < least:
        stem = "small" if small else "imagenet"
        advice = "Set a larger data.image_size" + ("." if small else ", or model.stem: small.")
        raise UserError(
            f"model.name is {config.name} with stem {stem}: pictures of {image_size[0]} x {image_size[1]} px are too "
            f"small for it; it needs {least} px.\n  {advice}"
        )


def _own(config: ModelConfig, num_classes: int, image_size, num_features) -> nn.Module:
    stem = "small" if uses_small_stem(config, image_size) else "imagenet"
    name, batchnorm = config.name.removesuffix("_bn"), config.name.endswith("_bn")
    with torch.device("meta"):  # the layers' own first draw would be thrown away: a second for AlexNet
        if name == "mlp":
            model = networks.mlp(num_classes, num_features, config.hidden, config.activation, config.batchnorm, config.dropout)
        elif name == "alexnet":
            model = networks.alexnet(num_classes, stem, image_size, batchnorm, config.width, config.dropout)
        else:
            convs = networks.VGG_CONVS[name]
            model = networks.vgg(num_classes, convs, stem, image_size, batchnorm, config.width, config.dropout)
    _take_memory(model)
    networks.initialize(model, config.activation if name == "mlp" else "relu", config.init == "dirac")
    _check_filled(model)
    return model


def _take_memory(model: nn.Module) -> None:
    # Module.to_empty does the same, but imports torch._dynamo: seconds
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_unfilled(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _unfilled(buffer)


def _unfilled(like: torch.Tensor) -> torch.Tensor:
    """Memory whose first number is none, by which `_check_filled` knows it; integers are left as they lie."""
    tensor = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    if tensor.is_floating_point():
        tensor.view(-1)[:1] = math.nan
    return tensor


def _check_filled(model: nn.Module) -> None:
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    unfilled = [name for name, t in tensors if t.is_floating_point() and t.detach().view(-1)[:1].isnan().any()]
    assert not unfilled, f"networks.initialize leaves {', '.join(unfilled)} unfilled; what a constructor puts there is lost"


def _torchvision(config: ModelConfig, num_classes: int, image_size) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if config.name not in known:
        hint = did_you_mean(config.name, [*OWN, *known], f"There are {', '.join([*OWN, *known])}.")
        raise UserError(f"model.name is {config.name!r}, which is no network known here or in torchvision. {hint}\n"
                        f"  timm's are called {timm_models.PREFIX}NAME.")  # fmt: skip
    options = {}
    if config.name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif image_size and config.name.startswith("vit_"):
        options = {"image_size": image_size[0]}
    elif image_size and config.name.startswith("maxvit"):
        options = {"input_size": image_size}
    takes = rates_taken(config)
    if "dropout" in takes and config.dropout != ModelConfig.dropout:
        options["dropout"] = config.dropout
    has_drop_path = "drop_path" in takes and config.drop_path >= 0
    if has_drop_path and config.name.startswith(("convnext", "efficientnet")):
        options["stochastic_depth_prob"] = config.drop_path
    residual = config.name.startswith(("resnet", "resnext", "wide_resnet"))
    if config.stem == "small" and not residual:
        raise UserError(f"model.stem is small, which is not defined for {config.name}; it is for alexnet, vgg and resnets.")
    try:
        model = torchvision.models.get_model(config.name, weights=None, num_classes=num_classes, **options)
        if has_drop_path and "stochastic_depth_prob" not in options:
            _set_drop_path(model, config.drop_path)
        if residual and uses_small_stem(config, image_size):
            channels = model.conv1.out_channels
            model.conv1, model.maxpool = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # torchvision's own way
        if image_size:
            _pass_once(model, image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = f"pictures of {image_size[0]} x {image_size[1]} px" if image_size else "pictures of any size"
        raise UserError(
            f"model.name is {config.name}: it does not take {size}: {str(error).splitlines()[0]}\n"
            "  Set another data.image_size, usually 224."
        ) from None
    return model


def _set_drop_path(model: nn.Module, last: float) -> None:
    """Scale stochastic depth so that the last block has this rate: swin's and maxvit's functions set it and take none."""
    layers = [m for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    highest = max(layer.p for layer in layers)
    for layer in layers:
        layer.p *= last / highest


def _pass_once(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Take one picture through without arithmetic, so that a size that does not fit is found before the run starts."""
    state = {name: t.to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    model.eval()
    with torch.no_grad():
        torch.func.functional_call(model, state, (torch.empty(1, 3, *image_size, device="meta"),))
    model.train()
