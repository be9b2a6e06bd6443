"""Layers whose result does not depend on the number of ranks: keyed dropout, BatchNorm over the global batch."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import messages
from dist_train.draws import mix64
from dist_train.errors import UserError

_STREAM = 0x5DEECE66D1CE4E5B  # tells dropout's random bits from those that augmentation draws from the same keys
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def use_keyed_dropout(model: nn.Module) -> nn.Module:
    """Replace every dropout module below model by KeyedDropout, numbered in order.

    Changes model and returns it. Taken are nn.Dropout, Dropout1d, 2d, 3d, torchvision's row-wise StochasticDepth and timm's
    DropPath. Names, weights and rates stay. Dropout inside nn.MultiheadAttention, AlphaDropout and what a network does by
    F.dropout (timm's GhostNet, before its last layer) stay as they are: they draw from torch's own generator.
    """
    layer = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (units := _units(child)) is not None:
                p = child.drop_prob if hasattr(child, "drop_prob") else child.p
                keyed = KeyedDropout(p, layer, units, is_scaled=getattr(child, "scale_by_keep", True))
                setattr(parent, name, keyed.train(child.training))
                layer += 1
    return model


def set_dropout_keys(model: nn.Module, keys: Tensor) -> None:
    """Tell every KeyedDropout below model which samples come next.

    keys: (N,) int64 from `order.sample_keys`, on the device of the activations. Call it before each forward pass in
    training, once a micro-batch.
    """
    fresh = {}  # by group: the keys of the samples of all its ranks, for layers that are split over them
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            shared_by = module.is_split, module.group
            if shared_by not in fresh:
                shared = messages.all_gathered(keys, module.group) if module.is_split else keys
                fresh[shared_by] = _in_place_of(module.keys, shared)
            module.keys = fresh[shared_by]


def _in_place_of(before: Tensor | None, keys: Tensor) -> Tensor:
    """The keys, where those of the step before lay: CUDA graphs are recorded anew for every address."""
    if before is None or before.shape != keys.shape or before.device != keys.device:
        return keys.clone()
    return before.copy_(keys)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (sample key, layer number, unit) and of nothing else.

    So a sample loses the same units on 1 rank and on 64, in any micro-batch, and after a resume. Rates are exact to
    2^-16, and the survivors' factor belongs to the rate that is used, so the mean is unbiased.

    units: "all" draws for each value of a sample; "channels" once a channel (nn.Dropout2d); "samples" once a sample
    (stochastic depth). Where a layer is split over ranks (see `hybrid`), first_unit is the number of the first unit held
    here, even, and the samples of all ranks of `group` pass through together. is_scaled: whether survivors make up for those
    that are dropped.
    """

    is_split, group, first_unit = False, None, 0

    def __init__(self, p: float = 0.5, layer: int = 0, units: str = "all", is_scaled: bool = True):
        super().__init__()
        if not 0 <= p <= 1 or units not in ("all", "channels", "samples"):
            raise ValueError(f"dropout with p={p}, units={units!r}: expected 0 <= p <= 1 and units all, channels or samples")
        self.p, self.layer, self.units, self.is_scaled = p, layer, units, is_scaled
        self.keys: Tensor | None = None  # no buffer: DistributedDataParallel would overwrite it with rank zero's

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, ...) of any float dtype. Returns the same shape and dtype; x itself in evaluation."""
        dropped = round(self.p * 65536)
        if not self.training or dropped == 0:
            return x
        if dropped == 65536:
            return x * 0
        if self.keys is None or len(self.keys) != len(x):
            found = "none" if self.keys is None else len(self.keys)
            raise RuntimeError(f"dropout keys: {found} for {len(x)} samples; call set_dropout_keys(model, keys) before the pass")
        shape = {"all": x.shape, "channels": x.shape[:2], "samples": x.shape[:1]}[self.units]
        bits = random_bits(self.keys, self.layer, shape[1:].numel(), self.first_unit)
        keep = (bits >= dropped - 32768).view(*shape, *(1 for _ in x.shape[len(shape) :]))
        return x * keep * (65536 / (65536 - dropped)) if self.is_scaled else x * keep

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}, units={self.units!r}"


def random_bits(keys: Tensor, layer: int, num_units: int, first_unit: int = 0) -> Tensor:
    """16 random bits for each sample and unit: (N, num_units) int16, evenly spread over its range. keys: (N,) int64.

    A 64-bit hash of (key, layer) and a 32-bit hash of the unit are joined by xor and an odd multiplier, then mixed
    once more; one 32-bit word serves two neighbouring units. Nothing but int32 arithmetic touches the (N, num_units /
    2) array: that is what makes it several times faster than a generator on the CPU, and one fused kernel when
    compiled.
    """
    words = mix64((keys ^ _STREAM) + ((layer + 1) * _GOLDEN + 2**63) % 2**64 - 2**63)
    offset, odd = words.to(torch.int32)[:, None], (words >> 32).to(torch.int32)[:, None] | 1
    pair = torch.arange(first_unit // 2, (first_unit + num_units + 1) // 2, dtype=torch.int32, device=keys.device)
    # lowbias32 (Wellons, "Prospecting for hash functions", 2018); the masks make int32's shift a logical one
    pair = (pair ^ (pair >> 16 & 0xFFFF)) * 0x7FEB352D
    pair = (pair ^ (pair >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    pair = pair ^ (pair >> 16 & 0xFFFF)
    word = (pair ^ offset) * odd
    word = (word ^ (word >> 15)) * (0x9E3779B1 - 2**32)
    if word.shape[1] == 1:  # torch.compile may lay a lone column out so that it refuses to view its halves
        return torch.cat([word << 16 >> 16, word >> 16], 1).to(torch.int16)[:, :num_units]
    return word.view(torch.int16)[:, :num_units]


def use_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm below model by one over all ranks of group (None: all ranks of the job).

    Changes model and returns it (a new module if model is itself a BatchNorm). Parameters and buffers are taken over,
    not copied, and keep their names; timm's BatchNormAct2d keeps its activation. Every rank must call the model equally
    often. Raises UserError for other layers with statistics of a batch: each rank's would stay its own, unagreed.
    """
    has_act = is_timms(model, "BatchNormAct2d")
    if has_act or type(model) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        kind = GlobalBatchNormAct if has_act else GlobalBatchNorm
        new = kind(model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats)
        new._parameters, new._buffers, new._modules = model._parameters, model._buffers, model._modules
        return new.train(model.training)
    for name, child in model.named_children():
        if _keeps_own_statistics(child):
            raise UserError(
                f"train.sync_batchnorm is true, and the network's {type(child).__name__} ({name}) cannot take its statistics "
                "from all ranks; BatchNorm1d, 2d, 3d and timm's BatchNormAct2d can.\n"
                "  Set train.sync_batchnorm: false, train on one rank, or take another network."
            )
        setattr(model, name, use_sync_batchnorm(child))
    return model


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the mean and variance of all ranks' samples together.

    Alone, and in evaluation, it is nn.BatchNorm. Works on gloo and on NCCL, and ranks may hold different numbers of
    samples. Its gradients are those of the sum of all ranks' losses, which DistributedDataParallel's mean turns into
    those of one process on the whole batch.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm expects (N, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, ...). Returns the same shape and dtype."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        weight = self.weight if self.affine else x.new_ones(x.shape[1], dtype=_statistics_dtype(x))
        bias = self.bias if self.affine else torch.zeros_like(weight)
        y, mean, var, count = _Normalise.apply(x, weight, bias, self.eps)
        if self.track_running_stats:
            self._keep(mean, var * (count / (count - 1).clamp(min=1)))
        return y

    @torch.no_grad()
    def _keep(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(torch.float32)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased_var, share)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d over all ranks: with its dropout and activation, `drop` and `act`, after the norm."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W). Returns the same shape and dtype."""
        return self.act(self.drop(super().forward(x)))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, var, count = _local_moments(x)
        # One message a layer, in float64: there E[x^2] - E[x]^2 loses nothing that float32 could show.
        sums = messages.sum_over_ranks(torch.cat([mean * count, (var + mean * mean) * count, count]))
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        var = (square - mean * mean).clamp_(min=0).to(weight.dtype)
        mean, count = mean.to(weight.dtype), count.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        x, weight, mean, var, count = ctx.saved_tensors
        # As if the statistics were constants; then what flows through them, from every rank's samples, is taken off.
        unsaved = mean.new_empty(0), mean.new_empty(0)  # as autograd gives them for such statistics; CUDA refuses None
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, *unsaved, False, ctx.eps, [True, True, True]
        )
        sums = messages.sum_over_ranks(torch.cat([dweight, dbias]))
        by_scale, by_shift = (sums / count).chunk(2)
        invstd = torch.rsqrt(var + ctx.eps)
        slope = weight * invstd * invstd * by_scale
        level = weight * invstd * by_shift - slope * mean
        shape = (1, -1) + (1,) * (x.dim() - 2)
        dx = (dx - torch.addcmul(level.view(shape), x.to(slope.dtype), slope.view(shape))).to(x.dtype)
        return dx, dweight, dbias, None


def _local_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count (1,) of this rank's samples, all float64."""
    num_channels, dtype = x.shape[1], _statistics_dtype(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # 10x faster than var_mean over channels-last
        running = torch.zeros(num_channels, dtype=dtype), torch.ones(num_channels, dtype=dtype)
        mean, var = torch.batch_norm_update_stats(x, *running, 0.0)
    else:
        var, mean = torch.var_mean(x.to(dtype), [d for d in range(x.dim()) if d != 1], correction=0)
    count = torch.full((1,), x.numel() // num_channels, dtype=torch.float64, device=x.device)
    return mean.double(), var.double(), count


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _units(module: nn.Module) -> str | None:
    if type(module) is nn.Dropout:
        return "all"
    if type(module) in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        return "channels"
    if type(module).__name__ == "StochasticDepth" and getattr(module, "mode", "") == "row":  # torchvision's, not imported
        return "samples"
    return "samples" if is_timms(module, "DropPath") else None


def is_timms(module: nn.Module, name: str) -> bool:
    """Whether the module is of timm's class of this name; timm is not imported."""
    return type(module).__name__ == name and type(module).__module__.partition(".")[0] == "timm"


def _keeps_own_statistics(module: nn.Module) -> bool:
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, GlobalBatchNorm, GlobalBatchNormAct)
    has_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) or module._buffers.get("running_var") is not None
    is_frozen = "Frozen" in type(module).__name__  # torchvision's and timm's, whose statistics are constants
    return has_statistics and not is_frozen and type(module) not in known and not is_timms(module, "BatchNormAct2d")
