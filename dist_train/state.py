"""What changes while training, and all that a checkpoint has to hold."""

from dataclasses import dataclass, replace

import torch

from dist_train.checkpoint import Saved, optimizer_tensors, restore_optimizer
from dist_train.config import OptimConfig
from dist_train.errors import UserError
from dist_train.optim import Plateau, WeightAverage
from dist_train.pretrained import put_weights


@dataclass
class State:
    """The state of a run between two steps."""

    network: torch.nn.Module  # without the wrapper of data parallelism
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    plateau: Plateau
    loss_sum: torch.Tensor  # of the steps since the last log line, on the device
    step: int = 0  # updates done; the state of the stream, too
    logged_step: int = 0
    judged_step: int = 0  # of the last evaluation that came to its end
    best_value: list[float] | None = None  # compared from left to right
    bad_evaluations: int = 0

    def has_lost_patience(self, patience: int) -> bool:
        return 0 < patience <= self.bad_evaluations

    def to_saved(self, scaler) -> Saved:
        """Everything by name, in memory. scaler: Accelerate's gradient scaler, or None."""
        names = {id(p): name for name, p in self.network.named_parameters()}
        optimizer, values = optimizer_tensors(plain(self.optimizer), names)
        tensors = {"model": self.network.state_dict(), "optimizer": optimizer, "sums": {"loss": self.loss_sum}}
        if self.average:
            tensors["ema"] = self.average.weights
        counters = ("logged_step", "judged_step", "best_value", "bad_evaluations")
        return Saved(self.step, tensors, {
            **{name: getattr(self, name) for name in counters}, "optimizer": values,
            "ema_updates": self.average.num_updates if self.average else 0, "plateau": self.plateau.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        })  # fmt: skip

    def restore(self, saved: Saved, scaler) -> None:
        """The inverse of `to_saved`. Raises UserError if the checkpoint is of another network."""
        try:
            put_weights(self.network, saved.tensors["model"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint of step {saved.step} does not fit this network:\n  {error}") from None
        parameters = dict(self.network.named_parameters())
        restore_optimizer(plain(self.optimizer), saved.tensors["optimizer"], saved.state["optimizer"], parameters)
        if self.average:
            self.average.restore(saved.tensors["ema"], saved.state["ema_updates"])
        self.plateau.load_state_dict(saved.state["plateau"])
        if scaler and saved.state["scaler"]:
            scaler.load_state_dict(saved.state["scaler"])
        self.loss_sum = saved.tensors["sums"]["loss"].to(self.loss_sum.device)
        self.step, self.logged_step = saved.step, saved.state["logged_step"]
        self.judged_step = saved.state.get("judged_step", saved.step)  # without it: written after judging
        self.best_value, self.bad_evaluations = saved.state["best_value"], saved.state["bad_evaluations"]


def begun_anew(saved: Saved, old: OptimConfig, new: OptimConfig) -> Saved:
    """A checkpoint as a run with other settings begins from it: the best and patience count from there on.

    A plateau schedule keeps its drops, where both runs have one. A weight average that the run before had not begins with
    its weights.
    """
    keeps_drops = old.schedule == new.schedule == "plateau"
    factor = {"factor": saved.state["plateau"]["factor"]} if keeps_drops else {}
    state = {**saved.state, "best_value": None, "bad_evaluations": 0, "is_best": False,
             "plateau": {**Plateau(0, 1.0).state_dict(), **factor}}  # fmt: skip
    tensors = {stem: named for stem, named in saved.tensors.items() if stem != "ema"}
    if new.ema_decay and "ema" in saved.tensors:
        tensors["ema"] = saved.tensors["ema"]
    elif new.ema_decay:
        tensors["ema"] = {name: t.float() if t.is_floating_point() else t for name, t in saved.tensors["model"].items()}
        state["ema_updates"] = 0
    return replace(saved, tensors=tensors, state=state)


def plain(optimizer) -> torch.optim.Optimizer:
    """torch's optimizer inside Accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)
