"""Weights trained before: torchvision's and timm's by name, or a .pth or .safetensors file."""

import argparse
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train import timm_models
from dist_train.config import ModelConfig
from dist_train.errors import UserError

_FILES = (".pth", ".pt", ".pth.tar", ".safetensors")
# How training scripts wrap weights; averages first, which are what their authors evaluate: timm's, then torchvision's references
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def load_pretrained(
    model: nn.Module, config: ModelConfig, head: str, image_size: tuple[int, int] | None = None,
    say: Callable[[str], None] = lambda line: None, is_trained: bool = True,
) -> None:
    """Load config.pretrained into model. head: name of the last layer, which stays as drawn if its class count differs.

    image_size: what the model was built for, which timm's published tables of positions are fitted to. say: takes
    a line about each choice that was made among the weights or change that was made to them. is_trained: whether a training
    follows, as a last layer that is as drawn needs.

    Raises UserError if the weights cannot be had or fit the network nowhere but there.
    """
    if is_file := config.pretrained.endswith(_FILES):
        weights, where = _read(config.pretrained, say), config.pretrained
    else:
        is_timms, where = config.name.startswith(timm_models.PREFIX), f"model.pretrained: {config.pretrained}"
        weights = timm_models.published_weights(config, model, head, image_size, say) if is_timms else _published(config)
    weights = {present_name(name): t for name, t in weights.items()}
    own = model.state_dict()
    aside = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's side heads, which are not built
    weights = {name: t for name, t in weights.items() if name in own or not name.startswith(aside)}
    _fit_positions(model, weights, where, say)
    fresh, faults = set(), []
    for name, t in own.items():
        is_of_head = name.rpartition(".")[0] == head
        if name not in weights:
            if is_of_head and not is_file:  # some are published without
                fresh.add(name)
            elif not name.endswith("num_batches_tracked"):
                faults.append(f"{name} is missing")
        elif t.shape != weights[name].shape:
            if is_of_head and t.shape[1:] == weights[name].shape[1:]:
                fresh.add(name)
            else:
                faults.append(f"{name} is {tuple(weights[name].shape)}, expected {tuple(t.shape)}")
    faults += [f"{name} has no place" for name in weights.keys() - own.keys()]
    if faults:
        sized = ", and data.image_size" if any("pos_embed" in fault and "expected" in fault for fault in faults) else ""
        more = f"\n  and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise UserError(
            f"{where}: these are not the weights of this {config.name}:\n  " + "\n  ".join(faults[:6]) + more
            + "\n  Set model.name, model.width and model.stem as they were in training (torchvision's: stem imagenet)" + sized + "."
        )  # fmt: skip
    if fresh and not is_trained:
        raise UserError(f"train.epochs is 0, and {config.pretrained} has no last layer for the {len(own[fresh.pop()])} classes of "
                        f"these shards.\n  Set train.epochs, or take shards with the weights' classes.")  # fmt: skip
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
        about = _about_run(config.pretrained)
        return None if about is None or about["features"] else (about["mean"], about["std"])
    if config.pretrained and config.name.startswith(timm_models.PREFIX):
        is_file = config.pretrained.endswith(_FILES)
        return timm_models.statistics_beside(config.pretrained) if is_file else timm_models.published_statistics(config)
    version = _entry(config)
    if version is None:
        return None
    if config.name in ("googlenet", "inception_v3"):
        return [0.5] * 3, [0.5] * 3
    rule = version.transforms()
    return list(rule.mean), list(rule.std)


def evaluated_otherwise(config: ModelConfig, image_size: tuple[int, int] | None, crop: float, interpolation: str) -> list[str]:
    """A line where published weights were evaluated at another size, crop or interpolation than this run evaluates at.

    image_size: (height, width) that enters the network; crop: share of the shorter side, 0 for the whole picture; interpolation:
    data.interpolation. Of a run's weights the interpolation alone is compared; nothing is known of other files but torchvision's.
    """
    if about := _about_run(config.pretrained):
        how = about.get("interpolation", "bilinear")
        return [] if about["features"] or how == interpolation else [
            f"model.pretrained {config.pretrained}: that run resized its pictures with data.interpolation {how}; "
            f"this run: {interpolation}."]  # fmt: skip
    if (theirs := _published_evaluation(config)) is None:
        return []
    size, share, how = theirs
    is_alike = image_size == (size, size) and abs(share - (crop or 1)) < 0.005 and how == interpolation
    here = "the stored size" if image_size is None else f"{image_size[0]} x {image_size[1]} px"
    there = f"{size} x {size} px with data.eval_crop {share:.3g} and data.interpolation {how}"
    crop_here = f"data.eval_crop {crop:.3g}" if crop else "the whole picture"
    return [] if is_alike else [f"model.pretrained {config.pretrained}: these weights were evaluated at {there}; "
                                f"this run evaluates at {here} with {crop_here} and {interpolation}."]  # fmt: skip


def normalised_otherwise(config: ModelConfig, mean: list[float], std: list[float]) -> list[str]:
    """A line where weights come from a file that does not tell by which mean and std of pixels its pictures were normalised.

    mean, std: those of the run, by channel.
    """
    if not config.pretrained or published_statistics(config) is not None:
        return []
    own = " / ".join(", ".join(f"{x:.3f}" for x in values) for values in (mean, std))
    return [f"{config.pretrained} brings no mean and std of pixels: this run normalises by {own}. The references of torchvision "
            f"and timm train with ImageNet's: data.mean [0.485, 0.456, 0.406], data.std [0.229, 0.224, 0.225]."]  # fmt: skip


def present_name(name: str) -> str:
    """What a tensor is called now: without wrappers' names; DenseNet's and ViT's published files have names of long ago."""
    name = re.sub(r"^((module|_orig_mod)\.)+", "", name)
    name = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _fit_positions(model: nn.Module, weights: dict[str, Tensor], where: str, say: Callable[[str], None]) -> None:
    """Resample a ViT's position embeddings in weights for the grid of model, where theirs is square; else leave them.

    By torchvision's function for its ViT (encoder.pos_embedding), by timm's for its networks (pos_embed).
    """
    own = model.state_dict()
    for name in ("encoder.pos_embedding", "pos_embed"):
        there, here = weights.get(name), own.get(name)
        if there is None or here is None or there.shape == here.shape or there.dim() != 3 or there.shape[::2] != here.shape[::2]:
            continue
        is_timms = name == "pos_embed"
        if is_timms:
            grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
            if grid is None:  # some have positions of another kind by this name
                continue
        else:
            grid = (model.image_size // model.patch_size,) * 2
        num_before = here.shape[1] - grid[0] * grid[1]  # class and register tokens
        side = math.isqrt(max(0, there.shape[1] - num_before))
        if num_before < 0 or side == 0 or side * side != there.shape[1] - num_before:
            continue
        if is_timms:
            weights[name] = timm_models.fit_positions(there.float(), grid, num_before)
        else:
            from torchvision.models.vision_transformer import interpolate_embeddings

            weights |= interpolate_embeddings(model.image_size, model.patch_size, {name: there.float()})
        say(f"{where}: {name}, of {side} x {side} patches, was resampled (bicubic) for {grid[0]} x {grid[1]}.")


def _read(path: str, say: Callable[[str], None]) -> dict[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the references' settings; filling it runs no code
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.pretrained: there is no file {path}.") from None
    except Exception as error:  # each format fails in its own way, and the file is the user's
        raise UserError(f"{path}: cannot be read as weights: {_refusal(error)}") from None
    if not isinstance(weights, dict):
        raise UserError(f"{path}: expected names and tensors, found {type(weights).__name__}.")
    while wraps := [key for key in _WRAPPERS if isinstance(weights.get(key), dict)]:
        weights = weights[wraps[0]]
        say(f"{path}: the weights under {wraps[0]} were taken" + (f", not those under {wraps[1]}." if wraps[1:] else "."))
    if "n_averaged" in weights:  # torch's AveragedModel counts there
        weights = {name: t for name, t in weights.items() if name != "n_averaged"}
    strangers = [name for name, t in weights.items() if not (isinstance(name, str) and isinstance(t, Tensor))]
    if strangers:
        raise UserError(f"{path}: expected names and tensors, found {', '.join(map(str, strangers[:6]))} beside them.")
    return weights


def _refusal(error: Exception) -> str:
    """Why a file was not read as tensors, without torch's advice to read it all the same."""
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    if found := re.search(r"GLOBAL (\S+)", reason):
        return (f"it holds a {found[1]}, and to make one could run code.\n  Save the weights alone where the file was made: "
                f"torch.save(network.state_dict(), FILE).")  # fmt: skip
    return f"{type(error).__name__}: {reason}".removesuffix(": ")


def _entry(config: ModelConfig):
    """torchvision's entry of the weights, by their name or their file's; None without weights or for others' files."""
    if config.pretrained.endswith(_FILES):
        return _version_of_file(config)
    return _version(config) if config.pretrained else None


def _published_evaluation(config: ModelConfig) -> tuple[int, float, str] | None:
    """(pixels, share of the shorter side, interpolation) of the evaluation of published weights; None for what is unknown."""
    if config.pretrained and config.name.startswith(timm_models.PREFIX):
        return None if config.pretrained.endswith(_FILES) else timm_models.published_evaluation(config)
    if (version := _entry(config)) is None:
        return None
    rule = version.transforms()
    return rule.crop_size[0], rule.crop_size[0] / rule.resize_size[0], rule.interpolation.value


def _about_run(pretrained: str) -> dict | None:
    """What a run tells of itself beside its weights.safetensors; None of other files, and in a folder that is no run's."""
    if Path(pretrained).name != "weights.safetensors":
        return None
    path = Path(pretrained).with_name("inference.json")
    try:
        about = json.loads(path.read_text())
        return about if about["features"] or (about["mean"] and about["std"]) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}), so it is unknown what the weights beside it were trained "
            "on.\n  Bring it back, or remove it to normalise by the set's own mean and std."
        ) from None


def classes_beside(pretrained: str) -> list[str] | None:
    """The classes that a run's weights.safetensors tell apart, in order; None of other weights, or where nothing is written."""
    about = _about_run(pretrained)
    return about and about.get("classes")


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
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise UserError(
            f"model.pretrained: {url} cannot be had: {error}\n  Bring the file to {path}, or name it there."
        ) from None
