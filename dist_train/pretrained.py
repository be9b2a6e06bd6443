"""Weights trained before: torchvision's and timm's by name, or a .pth or .safetensors file."""

import json
import os
import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train import timm_models
from dist_train.config import ModelConfig
from dist_train.errors import UserError

_FILES = (".pth", ".pt", ".safetensors")


def load_pretrained(
    model: nn.Module, config: ModelConfig, head: str, image_size: tuple[int, int] | None = None
) -> None:
    """Load config.pretrained into model. head: name of the last layer, which stays as drawn if its class count differs.

    image_size: what the model was built for, which timm's published tables of positions are fitted to.

    Raises UserError if the weights cannot be had or fit the network nowhere but there.
    """
    if config.pretrained.endswith(_FILES):
        weights, where = _read(config.pretrained), config.pretrained
    else:
        is_timms, where = config.name.startswith(timm_models.PREFIX), f"model.pretrained: {config.pretrained}"
        weights = timm_models.published_weights(config, model, head, image_size) if is_timms else _published(config)
    weights = {present_name(name): t for name, t in weights.items()}
    own = model.state_dict()
    aside = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's side heads, which are not built
    weights = {name: t for name, t in weights.items() if name in own or not name.startswith(aside)}
    fresh, faults = set(), []
    for name, t in own.items():
        if name not in weights:
            if not name.endswith("num_batches_tracked"):
                faults.append(f"{name} is missing")
        elif t.shape != weights[name].shape:
            if name.rpartition(".")[0] == head and t.shape[1:] == weights[name].shape[1:]:
                fresh.add(name)
            else:
                faults.append(f"{name} is {tuple(weights[name].shape)}, expected {tuple(t.shape)}")
    faults += [f"{name} has no place" for name in weights.keys() - own.keys()]
    if faults:
        more = f"\n  and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise UserError(
            f"{where}: these are not the weights of this {config.name}:\n  " + "\n  ".join(faults[:6]) + more
            + "\n  Set model.name, model.width and model.stem as they were in training (torchvision's: stem imagenet)."
        )  # fmt: skip
    put_weights(model, {**own, **{name: t for name, t in weights.items() if name not in fresh}})


def put_weights(network: nn.Module, weights: dict[str, Tensor], assign: bool = False) -> None:
    """`network.load_state_dict` of tensors that come from a file of tensors alone.

    What state_dict() gives besides, the version of each module's layout, some modules ask for (MNASNet).
    """
    state = OrderedDict(weights)
    state._metadata = network.state_dict()._metadata
    network.load_state_dict(state, assign=assign)


def published_statistics(config: ModelConfig) -> tuple[list[float], list[float]] | None:
    """(mean, std) by channel with which the pictures were normalised that these weights learned from; None where unknown.

    Known for torchvision's weights, by name or as a file of this network that is called as torchvision calls it
    (vgg13-19584684.pth, the hash included), for timm's by name or as a file with the hub's config.json beside it, and for a
    run's weights.safetensors, from inference.json beside it. Other files bring none. torchvision's GoogLeNet and Inception
    move what they get so that it has 0.5 and 0.5: their weights' own statistics.
    Raises UserError where inference.json is damaged.
    """
    if Path(config.pretrained).name == "weights.safetensors":
        return _statistics_of_run(Path(config.pretrained).parent)
    if config.pretrained and config.name.startswith(timm_models.PREFIX):
        is_file = config.pretrained.endswith(_FILES)
        return timm_models.statistics_beside(config.pretrained) if is_file else timm_models.published_statistics(config)
    if config.pretrained.endswith(_FILES):
        version = _version_of_file(config)
    else:
        version = _version(config) if config.pretrained else None
    if version is None:
        return None
    if config.name in ("googlenet", "inception_v3"):
        return [0.5] * 3, [0.5] * 3
    rule = version.transforms()
    return list(rule.mean), list(rule.std)


def present_name(name: str) -> str:
    """What a tensor is called now: without a wrapper's name; DenseNet's and ViT's published files have names of long ago."""
    name = name.removeprefix("module.").removeprefix("_orig_mod.")
    name = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _read(path: str) -> dict[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.pretrained: there is no file {path}.") from None
    except Exception as error:  # each format fails in its own way, and the file is the user's
        raise UserError(f"{path}: cannot be read as weights: {str(error).splitlines()[0]}") from None
    if not isinstance(weights, dict):
        raise UserError(f"{path}: expected names and tensors, found {type(weights).__name__}.")
    for key in ("state_dict", "model"):  # how training scripts commonly wrap them
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    strangers = [name for name, t in weights.items() if not (isinstance(name, str) and isinstance(t, Tensor))]
    if strangers:
        raise UserError(f"{path}: expected names and tensors, found {', '.join(map(str, strangers[:6]))} beside them.")
    return weights


def _statistics_of_run(folder: Path) -> tuple[list[float], list[float]] | None:
    """(mean, std) of a run on pictures; None for one on a table, and for a folder that is no run."""
    path = folder / "inference.json"
    try:
        about = json.loads(path.read_text())
        return None if about["features"] else (about["mean"], about["std"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}), so it is unknown what the weights beside it were trained "
            "on.\n  Bring it back, or remove it to normalise by the set's own mean and std."
        ) from None


def _version_of_file(config: ModelConfig):
    """torchvision's entry of the weights in a file, known by its name; None for a file that is not torchvision's."""
    name = Path(config.pretrained).name
    if not re.search(r"-[0-9a-f]{8,}\.pth$", name):  # looked at first: importing torchvision takes seconds
        return None
    from torchvision.models import get_model_weights, list_models

    versions = get_model_weights(config.name) if config.name in list_models() else ()
    return next((version for version in versions if os.path.basename(version.url) == name), None)


def _version(config: ModelConfig):
    """torchvision's entry of the named weights."""
    from torchvision.models import get_model_weights, list_models

    if config.name not in list_models():
        raise UserError(
            f"model.pretrained is {config.pretrained}, but nobody has published weights of {config.name}.\n"
            "  Give a .pth or .safetensors file, or leave it empty."
        )
    versions = get_model_weights(config.name)
    if config.pretrained not in versions.__members__:
        raise UserError(
            f"model.pretrained is {config.pretrained!r}; for {config.name} there are "
            f"{', '.join(versions.__members__)}, or a .pth or .safetensors file."
        )
    return versions[config.pretrained]


def _published(config: ModelConfig) -> dict[str, Tensor]:
    url = _version(config).url
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise UserError(
            f"model.pretrained: {url} cannot be had: {error}\n  Bring the file to {path}, or name it there."
        ) from None
