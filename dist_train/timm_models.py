"""timm's classifiers, by `timm/NAME`: built for the classes and the size of the pictures, and their published weights."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.errors import UserError, did_you_mean
from dist_train.layers import KeyedDropout, set_dropout_keys, use_keyed_dropout

PREFIX = "timm/"
RATES = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}  # setting of the network: timm's option
_TRIED = 3  # samples of the trial pass: BatchNorm needs two, and few networks have three of anything else


def build(config: ModelConfig, num_classes: int, image_size: tuple[int, int] | None) -> nn.Module:
    """The network as timm draws it from torch's generator, for these classes.

    image_size: (height, width) of what enters, which networks of a fixed size are built for. Raises UserError for a name that
    timm does not have, pictures that the network does not take, and a network that does not return logits (N, num_classes)
    by one last layer, or whose dropout does not go by samples.
    """
    timm, name = _open(config)
    if config.stem == "small":
        raise UserError(f"model.stem is small, which is not defined for {config.name}; it is for alexnet, vgg and resnets.")
    published = timm.get_pretrained_cfg(name)
    if isinstance(published.classifier, tuple | list):
        raise UserError(f"model.name is {config.name}, whose logits come from {len(published.classifier)} last layers "
                        f"({', '.join(published.classifier)}); expected one.\n  Take another network of timm.")  # fmt: skip
    options = _options(published, image_size) | rates(config)
    _try(config, lambda: timm.create_model(name, num_classes=num_classes, **options), num_classes,
         image_size or published.input_size[1:])  # fmt: skip
    return timm.create_model(name, num_classes=num_classes, **options)


def rates(config: ModelConfig) -> dict[str, float]:
    """timm's options for dropout and drop_path, of those that are set and that change layers which are keyed by the sample.

    ResNet's and EfficientNet's dropout, among others', is no layer but F.dropout, which draws from torch's own generator.
    """
    wanted = {"drop_rate": config.dropout} if config.dropout != ModelConfig.dropout else {}
    wanted |= {"drop_path_rate": config.drop_path} if config.drop_path >= 0 else {}
    if not wanted:
        return {}
    timm, name = _open(config)

    def keyed(**options) -> list[tuple[str, float]]:
        with torch.device("meta"):
            network = use_keyed_dropout(timm.create_model(name, **options))
        return [(m.units, m.p) for m in network.modules() if isinstance(m, KeyedDropout)]

    usual, found = keyed(), {}
    for option, rate in wanted.items():
        try:
            if keyed(**{option: 0.25}) != usual:  # which no network has: a rate that is set may be its own
                found[option] = rate
        except TypeError:  # the network has no such option
            continue
    return found


def published_weights(
    config: ModelConfig, network: nn.Module, head: str, image_size: tuple[int, int] | None, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """timm's weights that model.pretrained names, for the network that `build` made, with the classes they were trained on.

    head: name of the last layer, which is left out where the published weights have none. say: takes a line about positions
    that timm fits to image_size. Raises UserError where the weights cannot be had.
    """
    timm, name, published = _published(config)
    has_head = published.num_classes > 0
    num_classes = published.num_classes if has_head else network.get_submodule(head).weight.shape[0]
    try:
        with torch.random.fork_rng(devices=[]):
            trained = timm.create_model(name, pretrained=True, num_classes=num_classes, **_options(published, image_size))
    except Exception as error:  # huggingface_hub's, of its network client, of the file system, and timm's own
        raise UserError(
            f"model.pretrained: timm's weights {name} cannot be had: {(str(error) or type(error).__name__).splitlines()[0]}\n"
            "  Run once where there is a network, with HF_HOME on a disk that all see, or name a .safetensors or .pth file."
        ) from None
    size = tuple(published.input_size[1:])
    if published.fixed_input_size and image_size not in (None, size) and getattr(network, "pos_embed", None) is not None:
        say(f"model.pretrained: {name}'s position embeddings, for {size[0]} x {size[1]} px, were resampled for "
            f"{image_size[0]} x {image_size[1]}.")  # fmt: skip
    return {n: t for n, t in trained.state_dict().items() if has_head or not n.startswith(f"{head}.")}


def published_statistics(config: ModelConfig) -> tuple[list[float], list[float]]:
    """(mean, std) by channel with which timm normalised the pictures that the weights named by model.pretrained learned from."""
    *_, published = _published(config)
    return list(published.mean), list(published.std)


def published_evaluation(config: ModelConfig) -> tuple[int, float, str]:
    """(pixels, share of the shorter side, interpolation) with which the weights named by model.pretrained were evaluated."""
    *_, published = _published(config)
    crop = 1.0 if published.crop_mode == "squash" else published.test_crop_pct or published.crop_pct  # squash takes all there is
    return (published.test_input_size or published.input_size)[-1], crop, published.interpolation


def fit_positions(positions: Tensor, grid: tuple[int, int], num_before: int) -> Tensor:
    """Position embeddings (1, tokens, D) of a square grid resampled for another; num_before tokens, before the grid, stay."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=num_before)


def statistics_beside(weights: str) -> tuple[list[float], list[float]] | None:
    """(mean, std) in the config.json beside a file of weights, as both come from timm's hub; None where there is none."""
    try:
        published = json.loads(Path(weights).with_name("config.json").read_text())["pretrained_cfg"]
        return [float(x) for x in published["mean"]], [float(x) for x in published["std"]]
    except (OSError, ValueError, LookupError, TypeError):  # other programs' config.json say other things
        return None


def _open(config: ModelConfig):
    """(timm, what it calls the network, with the tag of its weights if model.name has one)."""
    name = config.name.removeprefix(PREFIX)
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model.name is {config.name}, and timm cannot be imported: {error}\n"
                        f"  Install what it needs with: pip install 'dist_train[timm]'") from None  # fmt: skip
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        otherwise = f"It has {len(known):,}: python -c 'import timm; print(*timm.list_models())'"
        hint = did_you_mean(architecture, known, otherwise)
        raise UserError(f"model.name is {config.name}, and timm {timm.__version__} has no {architecture!r}. {hint}")
    if tag and name not in (tagged := timm.list_models(architecture, include_tags=True)):
        raise UserError(f"model.name is {config.name}; of {architecture} timm {timm.__version__} has {', '.join(tagged)}.")
    return timm, name


def _published(config: ModelConfig):
    """(timm, its name of the weights that model.pretrained means, tag included, and its description of them)."""
    timm, name = _open(config)
    architecture = name.partition(".")[0]
    versions = timm.list_pretrained(architecture)
    if not versions:
        raise UserError(
            f"model.pretrained is {config.pretrained}, but timm has no weights of {architecture}.\n"
            "  Give a .pth or .safetensors file, or leave it empty."
        )
    if config.pretrained != "DEFAULT":
        name = f"{architecture}.{config.pretrained}"
    elif name == architecture:
        name = f"{architecture}.{timm.get_pretrained_cfg(name).tag}".rstrip(".")
    if name not in versions:
        tags = [tag for version in versions if (tag := version.partition(".")[2])]
        raise UserError(
            f"model.pretrained is {config.pretrained!r}; for {config.name} there are {', '.join(['DEFAULT', *tags])}, or a .pth "
            "or .safetensors file."
        )
    return timm, name, timm.get_pretrained_cfg(name)


def _options(published, image_size: tuple[int, int] | None) -> dict:
    return {"img_size": image_size} if image_size and published.fixed_input_size else {}


def _try(config: ModelConfig, create, num_classes: int, size: tuple[int, int]) -> None:
    """Take pictures through without arithmetic, so that what does not fit is found before the run starts."""
    strays = []
    pictures = torch.empty(_TRIED, 3, *size, device="meta")
    try:
        with torch.device("meta"), torch.no_grad():
            network = use_keyed_dropout(create()).eval()
            for name, module in network.named_modules():
                if isinstance(module, KeyedDropout) and module.p:
                    module.register_forward_pre_hook(
                        lambda module, given, name=name: None if len(given[0]) == _TRIED else strays.append(name)
                    )
            found = [network(pictures)]
            if not strays:
                set_dropout_keys(network.train(), torch.zeros(_TRIED, dtype=torch.int64))
                found.append(network(pictures))
    except Exception as error:  # each network fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"model.name is {config.name}: it does not take pictures of {size[0]} x {size[1]} px: {reason}\n"
                        "  Set another data.image_size, usually 224.") from None  # fmt: skip
    if strays:
        raise UserError(f"model.name is {config.name}, whose dropout {strays[0]} does not go by samples, so what it drops would "
                        f"depend on the number of ranks.\n  Take another network of timm.")  # fmt: skip
    for mode, logits in zip(("evaluation", "training"), found, strict=True):
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (_TRIED, num_classes):
            what = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(f"model.name is {config.name}: for {_TRIED} pictures it returns {what} in {mode}, expected logits "
                            f"({_TRIED}, {num_classes}).\n  Take a network of timm that is a classifier.")  # fmt: skip
