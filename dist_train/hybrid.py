"""One weird trick (Krizhevsky 2014): each rank holds a slice of every fully connected layer, for everybody's samples.

AlexNet and VGG have nearly all their weights there and nearly all their arithmetic in the convolutions. So a rank takes
its own b pictures through all convolutions, and then the activations travel instead of the weights' gradients. With G
ranks and N = G b samples together, D features, H hidden units, K classes:

    features (b, D) --all-gather--> (N, D) --first layer, H/G of its outputs--> (N, H/G)
    (N, H/G) --inner layer, H/G of its inputs--> sums over a part of the inputs (N, H) --reduce-scatter--> (N, H/G)
    (N, H/G) --last layer, H/G of its inputs--> sums over a part of the inputs (N, K) --reduce-scatter--> logits (b, K)

and back the same way with gather and scatter exchanged. Names of the weights stay as they were.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import messages
from dist_train.layers import KeyedDropout


def split_classifier(classifier: nn.Sequential, group: dist.ProcessGroup | None, world_size: int) -> dict[str, int]:
    """Replace every Linear of a classifier by this rank's slice of it; the others of the group hold the rest.

    Changes classifier. world_size: ranks whose mean the gradients are, those of all groups together. Returns the
    dimension along which each split parameter is cut, by its name below classifier; the last bias stays whole, and its
    gradient is that of this rank's samples alone. Raises ValueError if the hidden units cannot be shared evenly.
    """
    rank, num_parts = dist.get_rank(group), dist.get_world_size(group)
    children = list(classifier.named_children())
    first, *inner, last = [name for name, module in children if isinstance(module, nn.Linear)]
    plans = {  # the kind of layer, and the dimensions along which weight and bias are cut
        first: (FirstSplitLinear, 0, 0), **{name: (InnerSplitLinear, 1, 0) for name in inner}, last: (LastSplitLinear, 1, None)
    }  # fmt: skip
    cut, first_unit = {}, None
    for name, module in children:
        if name in plans:
            kind, *dims = plans[name]
            if name != last:
                if module.out_features % (2 * num_parts):  # dropout draws its bits for two units at a time
                    raise ValueError(f"{module.out_features} hidden units for {num_parts} ranks")
                first_unit = rank * (module.out_features // num_parts)
            parts = [_part(p, dim, rank, num_parts) for p, dim in zip((module.weight, module.bias), dims, strict=True)]
            setattr(classifier, name, kind(*parts, group, world_size))
            cut |= {f"{name}.{key}": d for key, d in zip(("weight", "bias"), dims, strict=True) if d is not None}
        elif isinstance(module, KeyedDropout) and first_unit is not None:
            module.first_unit, module.is_split, module.group = first_unit, True, group
    return cut


def _part(p: nn.Parameter, dim: int | None, rank: int, num_parts: int) -> nn.Parameter:
    if dim is None:
        return p
    part = p.detach().tensor_split(num_parts, dim)[rank].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, p.requires_grad)


class SplitLinear(nn.Module):
    """What the three kinds share: a slice of the weights, and the ranks that hold the other slices."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, group: dist.ProcessGroup | None, world_size: int):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.group, self.world_size = group, world_size

    def in_one_dtype(self, x: Tensor) -> list[Tensor]:
        """Input, weight and bias in the precision that autocast would choose: what travels has it as well."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return [t.to(dtype) for t in (x, self.weight, self.bias)]


class FirstSplitLinear(SplitLinear):
    """(b, D) of this rank's samples -> (N, H/G): some units of all samples."""

    def forward(self, x: Tensor) -> Tensor:
        return _GatherLinear.apply(*self.in_one_dtype(x), self.group, self.world_size)


class InnerSplitLinear(SplitLinear):
    """(N, H/G) -> (N, H'/G): some units of all samples, from some units of all samples."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.in_one_dtype(x)
        return _LinearScatterUnits.apply(x, weight, self.group) + bias


class LastSplitLinear(SplitLinear):
    """(N, H/G) -> (b, K): this rank's samples, from some units of all samples."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.in_one_dtype(x)
        return _LinearScatterSamples.apply(x, weight, self.group, self.world_size) + bias


# The loss of each rank is the mean over its own samples, and gradients are to be the mean over ranks. What data
# parallelism averages afterwards (convolutions, the last bias) must not be averaged here. So the gradient is divided by
# the number of ranks where it enters the split layers, and multiplied again where it leaves them.


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group, world_size):
        everyone = messages.all_gathered(x, group)
        ctx.save_for_backward(everyone, weight)
        ctx.group, ctx.world_size = group, world_size
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(everyone, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        everyone, weight = ctx.saved_tensors
        finish = _reduce_scatter(dy @ weight, ctx.group) if ctx.needs_input_grad[0] else lambda: None
        dweight = dy.t() @ everyone if ctx.needs_input_grad[1] else None  # while the sums travel
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        dx = finish()
        return dx if dx is None else dx * ctx.world_size, dweight, dbias, None, None


class _LinearScatterUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group):
        ctx.save_for_backward(x, weight)
        ctx.group = group
        with torch.autocast(x.device.type, enabled=False):
            return _reduce_scatter(weight @ x.t(), group)().t()  # units first: that is the dimension that is cut

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = messages.all_gathered(dy.t(), ctx.group)
        dx = dy.t() @ weight if ctx.needs_input_grad[0] else None
        return dx, dy @ x if ctx.needs_input_grad[1] else None, None


class _LinearScatterSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group, world_size):
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.world_size = group, world_size
        with torch.autocast(x.device.type, enabled=False):
            return _reduce_scatter(F.linear(x, weight), group)()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = messages.all_gathered(dy / ctx.world_size, ctx.group)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, dy.t() @ x if ctx.needs_input_grad[1] else None, None, None


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin to add up (G n, ...) over the ranks; what is returned waits, and gives this rank its n rows of the sum."""
    x, num_ranks = x.contiguous(), dist.get_world_size(group)
    if dist.get_backend(group) != "gloo":
        out = x.new_empty(len(x) // num_ranks, *x.shape[1:])
        work = dist.reduce_scatter_tensor(out, x, group=group, async_op=True)
        return lambda: (_wait(work), out)[1]
    parts = torch.empty_like(x)  # gloo's own reduce-scatter is an all-reduce inside: twice the bytes (torch 2.15)
    work = dist.all_to_all_single(parts, x, group=group, async_op=True)
    return lambda: (_wait(work), parts.view(num_ranks, -1, *parts.shape[1:]).sum(0))[1]


def _wait(work: dist.Work) -> None:
    with messages.clock.waiting():
        work.wait()
