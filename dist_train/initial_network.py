"""The network that a run begins with: weights as drawn from its seed or trained before, and what cannot begin."""

import dataclasses
from collections.abc import Callable

from torch import nn

from dist_train import sizes
from dist_train.config import RunConfig
from dist_train.errors import UserError
from dist_train.index import ShardIndex
from dist_train.layers import use_keyed_dropout
from dist_train.models import build_model
from dist_train.pretrained import classes_beside


def initial_network(
    config: RunConfig, index: ShardIndex, is_begun: bool, say: Callable[[str], None]
) -> tuple[nn.Module, UserError | None]:
    """The network of a run, and why model.pretrained cannot be had; None where it can.

    is_begun: a checkpoint may bring the weights, so those of model.pretrained may be gone, and settings that would not begin
    a run let it go on. say: takes lines about the weights that are loaded. Raises UserError.
    """
    if not (is_begun or config.train.epochs):
        check_judged(config, index)
    try:
        network, missing_weights = build_network(config, index, say), None
    except UserError as error:
        if not (is_begun and config.model.pretrained):
            raise
        fresh = dataclasses.replace(config.model, pretrained="")
        network, missing_weights = build_network(dataclasses.replace(config, model=fresh), index), error
    if not is_begun:
        sizes.check_new(config)
    if config.data.eval_size:
        sizes.check_eval_size(config, index, network)
    return network, missing_weights


def build_network(config: RunConfig, index: ShardIndex, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """The network of a recipe on a set of shards, with keyed dropout; on the CPU, weights drawn from config.seed or loaded."""
    num_features = len(index.features) if index.features else None
    network = build_model(config.model, index.num_classes, sizes.input_size(config, index), num_features, config.seed, say,
                          is_trained=config.train.epochs > 0)  # fmt: skip
    use_keyed_dropout(network)
    return network


def check_judged(config: RunConfig, index: ShardIndex) -> None:
    """Raise UserError where nothing is trained, and the weights of model.pretrained cannot be judged on these shards."""
    if index.features is not None:
        raise UserError(f"train.epochs is 0, and {index.folder} is a table.\n  A run on a table is judged on another by: "
                        f"dist-train eval RUN --data.shards {index.folder}")  # fmt: skip
    theirs = classes_beside(config.model.pretrained)
    if theirs is not None and theirs != index.classes:
        raise UserError(f"train.epochs is 0, and {config.model.pretrained} tells other classes apart than those of {index.folder}, "
                        f"or in another order.\n  Set train.epochs, or take shards with the weights' classes.")  # fmt: skip
