"""How the weights change: optimizers and their parameter groups, every step's learning rate, the weight average."""

import contextlib
import math

import torch
from torch import Tensor, nn

from dist_train.config import OptimConfig
from dist_train.finetune import layer_depths
from dist_train.muon import Orthogonalize, takes_muon

RMSPROP_ALPHA, RMSPROP_EPS = 0.9, 0.0316  # as in torchvision's references, for MobileNetV3 and EfficientNet


def build_optimizer(model: nn.Module, config: OptimConfig, head: str = "", precision: str = "fp32") -> torch.optim.Optimizer:
    """The optimizer over model's trainable parameters, at the peak rate. head: name of the last layer; precision: bf16 lets
    muon compute in it, too.

    Two groups: "decay" (matrices and kernels) and "no_decay" (biases, norms, layer scales, tokens, tables of positions);
    with config.layer_decay two for each layer, with freeze_epochs two for the last one; for muon one more, "hidden". Each
    carries "lr_scale", which `set_lr` multiplies by: layer_decay to the power of the layers above, for muon's others
    times rest_lr / lr. Fused kernels are used where the class has them for the device.
    """
    depths = layer_depths(model, head) if config.layer_decay != 1 or config.freeze_epochs else {}
    split: dict[tuple[int, str], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            depth = depths.get(name, 0)
            # what thaws must not share a group with the head: torch's fused SGD wants all first steps at once
            group = depth if config.layer_decay != 1 else min(depth, 1)
            kind = "decay" if _is_decayed(name, p) else "no_decay"
            if config.name == "muon" and kind == "decay" and takes_muon(p, name, head, config.muon_moves):
                kind = "hidden"
            split.setdefault((group, kind), []).append(p)
    groups = [
        {"params": params, "name": kind, "lr_scale": config.layer_decay**depth,
         "weight_decay": config.weight_decay if kind != "no_decay" else 0.0}
        for (depth, kind), params in sorted(split.items())
    ]  # fmt: skip
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for group in groups for p in group["params"])
    betas = (config.momentum, config.beta2)
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)
    elif config.name == "muon":
        share = config.rest_lr / config.lr
        for group in groups:
            if group["name"] == "hidden":
                group |= {"muon_momentum": config.momentum, "momentum": 0.0, "nesterov": False}
            else:
                decay = config.rest_weight_decay if group["name"] == "decay" else 0.0
                group |= {"lr_scale": group["lr_scale"] * share, "weight_decay": decay}
        optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
    elif config.name == "adamax":  # torch has no fused one
        optimizer = torch.optim.Adamax(groups, config.lr, betas=betas)
    elif config.name == "rmsprop":  # nor of this
        optimizer = torch.optim.RMSprop(groups, config.lr, RMSPROP_ALPHA, RMSPROP_EPS, momentum=config.momentum)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
        optimizer = kind(groups, config.lr, betas=betas, fused=fused)
    optimizer.register_step_pre_hook(_match_layouts)
    if config.name == "sgd" and precision == "fp16":
        optimizer.register_step_pre_hook(_begin_at_rest)
    if config.name == "muon":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        optimizer.register_step_pre_hook(Orthogonalize(dtype))
    return optimizer


def lr_at(step: int, config: OptimConfig, steps_per_epoch: float, num_steps: int) -> float:
    """Learning rate of update `step` (0, 1, ...) of a run of num_steps. plateau's drops are not in it: see `Plateau`.

    cosine: half a cosine from the peak at the end of the warm-up to final_lr at num_steps (Loshchilov and Hutter 2017).
    one_cycle: straight up from 1/25 of the peak, straight down to final_lr at the last step (Smith and Topin 2018); the
    rise takes 30% of the run where no warm-up is given. step: a drop every step_epochs, counted from the run's start.
    """
    step = min(step, num_steps)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), num_steps)
    if config.schedule == "one_cycle":
        rise = max(1, warmup or round(0.3 * num_steps)) - 1  # the step of the peak
        fall = max(1, num_steps - 1 - rise)
        if step < rise:
            share = 1 / 25 + (1 - 1 / 25) * step / rise
        else:
            share = 1 + (config.final_lr - 1) * min(1.0, (step - rise) / fall)
        return config.lr * share
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, num_steps - warmup)
        return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2)
    if config.schedule == "step":
        return config.lr * config.step_factor ** math.floor(step / (config.step_epochs * steps_per_epoch) + 1e-9)
    return config.lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group lr times its own lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Plateau:
    """The factor on the learning rate that falls when a validation figure has not improved for more than `patience` evaluations.

    Higher figures are better. As torch's ReduceLROnPlateau with mode max and threshold 0.
    """

    def __init__(self, patience: int, drop: float):
        self.patience, self.drop = patience, drop
        self.factor = 1.0
        self.best: float | None = None
        self.bad_evaluations = 0

    def update(self, figure: float) -> None:
        """Take the figure of one evaluation into account; not-a-number counts as no improvement."""
        if not math.isnan(figure) and (self.best is None or figure > self.best):
            self.best, self.bad_evaluations = figure, 0
            return
        self.bad_evaluations += 1
        if self.bad_evaluations > self.patience:
            self.factor, self.bad_evaluations = self.factor * self.drop, 0

    def state_dict(self) -> dict:
        return {"factor": self.factor, "best": self.best, "bad_evaluations": self.bad_evaluations}

    def load_state_dict(self, state: dict) -> None:
        self.factor, self.best, self.bad_evaluations = state["factor"], state["best"], state["bad_evaluations"]


class WeightAverage:
    """Exponential moving average of a model's weights, in float32; a function of the sequence of weights alone.

    decay: share of the old average that an update keeps; early updates keep less, (1 + t) / (10 + t), so that the
    first weights are forgotten. BatchNorm's running statistics are averaged like the weights they belong to; whole
    numbers are taken over.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.weights = {
            name: t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
            for name, t in state_tensors(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards model's weights; to be called after each step of the optimizer."""
        keep = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        new = state_tensors(model)
        floats = [name for name, t in self.weights.items() if t.is_floating_point()]
        for of_type in {type(self.weights[n]): None for n in floats}:  # sharded weights do not go together with buffers
            names = [n for n in floats if type(self.weights[n]) is of_type]
            torch._foreach_lerp_([self.weights[n] for n in names], [new[n].detach().float() for n in names], 1 - keep)
        for name in self.weights.keys() - floats:
            self.weights[name].copy_(new[name])

    @contextlib.contextmanager
    def swapped(self, model: nn.Module):
        """Let model hold the average within the block; afterwards its own weights are back, bit for bit."""
        own = {name: t.detach().clone() for name, t in state_tensors(model).items()}
        _overwrite(state_tensors(model), self.weights)
        try:
            yield model
        finally:
            _overwrite(state_tensors(model), own)

    def restore(self, weights: dict[str, Tensor], num_updates: int) -> None:
        """Continue from the weights and the number of updates of another average of the same model."""
        _overwrite(self.weights, weights)
        self.num_updates = num_updates


@torch.no_grad()
def _overwrite(tensors: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        t.copy_(new[name])


def _match_layouts(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """Bring gradients and state into their parameter's memory layout.

    The fused CPU kernels walk all three as flat memory and give wrong weights, without a word, where one is
    channels-last and another is not: after a state was restored from a file that knows no strides, say (torch 2.15).
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and _layout(p.grad) != _layout(p):
                p.grad = torch.empty_like(p).copy_(p.grad)
            for name, t in optimizer.state.get(p, {}).items():
                if isinstance(t, Tensor) and t.shape == p.shape and _layout(t) != _layout(p):
                    optimizer.state[p][name] = torch.empty_like(p).copy_(t)


def _begin_at_rest(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """Give each parameter that will move for the first time a momentum of zero, from which SGD does as from none.

    Fused SGD would take fresh memory for it, and leave that unwritten where the loss scaler calls the step off (torch 2.15).
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _is_decayed(name: str, p: nn.Parameter) -> bool:
    # torch calls every matrix and kernel a weight; what else has two dimensions is a scale, a token or a table
    return p.dim() >= 2 and "weight" in name.rpartition(".")[2]


def _layout(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, but for buffers that are no part of a state (tables of positions, say)."""
    kept = model.state_dict().keys()
    return {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if name in kept}
