"""How a network lies over the ranks: whole on each, its classifier split, or every weight split.

The three give the same gradients, to rounding, and their checkpoints are the same: there, every tensor is whole.
"""

import contextlib
import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train import messages
from dist_train.config import RunConfig
from dist_train.errors import UserError
from dist_train.hybrid import split_classifier
from dist_train.networks import ConvNet
from dist_train.optim import state_tensors
from dist_train.pretrained import put_weights
from dist_train.runtime import World

OWN_FSDP_GROUP = 2**20  # weights from which on a layer is gathered and let go by itself


def parallelize(network: nn.Module, config: RunConfig, accelerator, world: World) -> "Replicated":
    """Lay the network over the ranks as train.parallel says; changes it. To be called before the optimizer is built.

    Raises UserError, naming the setting, where that network cannot lie so on these ranks.
    """
    kind = config.train.parallel if world.world_size > 1 else "ddp"
    if kind != "ddp" and config.train.precision == "fp16":
        raise UserError(
            f"train.parallel is {kind} and train.precision fp16: its loss scale is not agreed on by ranks that hold "
            f"different weights.\n  Use bf16, or train.parallel: ddp."
        )
    return {"ddp": Replicated, "hybrid": Hybrid, "fsdp": FullySharded}[kind](network, config, accelerator, world)


class Replicated:
    """Every rank holds the whole network; gradients are averaged while the backward pass runs (or one process, alone).

    model: what the forward pass goes through. is_settled: whether gradients are summed in the order in which they always will
    be; of two ranks, either order gives the same.
    """

    def __init__(self, network: nn.Module, config: RunConfig, accelerator, world: World):
        self.network, self.config, self.accelerator, self.world = network, config, accelerator, world
        self.is_settled = world.world_size < 3
        self.model = self._wrapped = self._wrap()
        self.replays_graphs = config.train.compile and config.train.compile_mode != "default"
        if config.train.compile:
            mode = config.train.compile_mode if self.replays_graphs else None
            messages.let_compile()
            # a graph for each size of pictures that grow, with frozen layers and without; beyond torch's 8 a step is not compiled,
            # and a run that goes on, which begins to count anew, would differ from one that was never stopped
            torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
            self.model = torch.compile(self._wrapped, dynamic=False, mode=mode)

    def _wrap(self) -> nn.Module:
        return self._averaged(set())

    def _averaged(self, apart: set[str]) -> nn.Module:
        """The network in Accelerate's DistributedDataParallel, which leaves the parameters named `apart` alone."""
        if self.config.train.sync_batchnorm:  # global statistics are alike everywhere without a message a step
            apart = apart | {name for name, _ in self.network.named_buffers()}
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.network, apart)
        model = self.accelerator.prepare_model(self.network)
        if self.config.train.reduce_precision == "bf16" and self.world.world_size > 1:
            model.register_comm_hook(None, _in_bf16)
        return model

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer, told what it needs to know of the weights' form."""
        return optimizer

    def accumulating(self) -> contextlib.AbstractContextManager:
        """Within it, gradients are added up on this rank alone: for all micro-batches but the last."""
        # Accelerate's own does nothing in a job of one rank, whose network it wraps all the same where a launcher started it
        return getattr(self._wrapped, "no_sync", contextlib.nullcontext)()

    def reduce_gradients(self) -> None:
        """After the backward pass: return when the gradients are those of the whole global batch."""

    @torch.no_grad()
    def agree_on_statistics(self) -> None:
        """After an update: give every rank the mean of the ranks' running statistics, where each has its own.

        That is where train.sync_batchnorm is off. Weights are judged, averaged and saved with them, so they must be one.
        """
        if self.world.world_size == 1 or self.config.train.sync_batchnorm:
            return
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        if buffers:
            messages.average_over_ranks(buffers)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to this norm over all weights; returns the norm before, () on the device."""
        return self.accelerator.clip_grad_norm_(self.network.parameters(), max_norm)

    @contextlib.contextmanager
    def whole(self):
        """A plain network that holds all weights, on every rank: for evaluation, where ranks go their own pace."""
        yield self.network

    def gathered(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
        """This rank's parts -> whole tensors on rank zero, None elsewhere; every rank must call it.

        tensors: as in `checkpoint.Saved`, stem -> name -> tensor, where a name begins with the parameter's.
        """
        return tensors if self.world.is_main else None

    def scattered(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Whole tensors -> what this rank holds of them: the inverse of `gathered`, without a message."""
        return tensors


class _Parted(Replicated):
    """What the other two share: some tensors are held in parts."""

    def __init__(self, network: nn.Module, config: RunConfig, accelerator, world: World):
        # its form without its weights: what `whole` fills
        hollow = {id(t): _like(t, t.to("meta")) for t in state_tensors(network).values()}
        self._form = copy.deepcopy(network, hollow)
        super().__init__(network, config, accelerator, world)

    @contextlib.contextmanager
    def whole(self):
        network = copy.deepcopy(self._form)
        state = self.network.state_dict()
        put_weights(network, {name: self._everywhere(name, t.detach()) for name, t in state.items()}, assign=True)
        yield network

    def gathered(self, tensors):
        whole = {stem: {name: self._on_main(name, t) for name, t in named.items()} for stem, named in tensors.items()}
        return whole if self.world.is_main else None

    def scattered(self, tensors):
        return {stem: {name: self._part(name, t) for name, t in named.items()} for stem, named in tensors.items()}


class Hybrid(_Parted):
    """Convolutions on every rank, each fully connected layer split over the ranks of a group (see `hybrid`)."""

    def _wrap(self) -> nn.Module:
        config, world = self.config, self.world
        if not isinstance(self.network, ConvNet):
            raise UserError(
                f"train.parallel is hybrid, which splits the classifier of alexnet, alexnet_bn and vgg11 to vgg19; "
                f"model.name is {config.model.name}.\n  Use train.parallel: ddp or fsdp."
            )
        size = config.train.split_ranks or world.world_size
        if world.world_size % size or size < 2:
            raise UserError(
                f"train.split_ranks is {size}, expected a divisor of the number of ranks, {world.world_size}, from 2 on."
            )
        self.group = self.replicas = None  # all ranks
        if size < world.world_size:
            timeout = timedelta(seconds=config.runtime.timeout_s)  # torch's own would be 30 minutes
            self.group, _ = dist.new_subgroups(size, timeout=timeout)
            columns = [list(range(first, world.world_size, size)) for first in range(size)]
            self.replicas, _ = dist.new_subgroups_by_enumeration(columns, timeout=timeout)
        try:
            cut = split_classifier(self.network.classifier, self.group, world.world_size)
        except ValueError as error:
            raise UserError(
                f"train.parallel is hybrid: the classifier cannot be shared evenly: {error}, which must be a multiple of "
                f"twice their number.\n  Set train.split_ranks to a divisor of both, or use train.parallel: ddp."
            ) from None
        self.cut = {f"classifier.{name}": dim for name, dim in cut.items()}
        return self._averaged(set(self.cut))

    def reduce_gradients(self) -> None:
        if self.replicas is not None:
            gradients = [p.grad for p in self._split_parameters() if p.grad is not None]
            is_short = self.config.train.reduce_precision == "bf16"
            sent = [g.bfloat16() for g in gradients] if is_short else gradients
            with messages.clock.waiting():
                for work in [dist.all_reduce(g, group=self.replicas, async_op=True) for g in sent]:
                    work.wait()
            if is_short:
                torch._foreach_copy_(gradients, sent)

    def clip_gradients(self, max_norm):
        split = {id(p) for p in self._split_parameters()}
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        here = torch.nn.utils.get_total_norm([p.grad for p in parameters if id(p) in split])
        square = here.square()
        with messages.clock.waiting():
            dist.all_reduce(square, group=self.group)
        alike = torch.nn.utils.get_total_norm([p.grad for p in parameters if id(p) not in split])
        norm = (square + alike.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def gathered(self, tensors):
        if self.replicas is not None and dist.get_rank(self.replicas) > 0:
            return None  # the first group alone holds everything
        return super().gathered(tensors)

    def _split_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.network.named_parameters() if name in self.cut]

    def _dim(self, name: str, tensor: Tensor) -> int | None:
        """Along which dimension a parameter, or what an optimizer keeps for it, is cut."""
        return self.cut.get(name.partition("/")[0]) if tensor.dim() else None

    def _part(self, name, tensor):
        if (dim := self._dim(name, tensor)) is None:
            return tensor
        return tensor.tensor_split(dist.get_world_size(self.group), dim)[dist.get_rank(self.group)].contiguous()

    def _on_main(self, name: str, tensor: Tensor) -> Tensor | None:
        if (dim := self._dim(name, tensor)) is None:
            return tensor
        if not self.world.is_main:
            dist.gather(tensor.detach().contiguous(), group=self.group, group_dst=0)
            return None
        size = dist.get_world_size(self.group)
        rows = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
        dist.gather(tensor.detach().contiguous(), list(rows.chunk(size)), group=self.group, group_dst=0)
        return (rows if dim == 0 else torch.cat(rows.chunk(size), dim)).cpu()

    def _everywhere(self, name: str, tensor: Tensor) -> Tensor:
        if (dim := self._dim(name, tensor)) is None:
            return tensor
        rows = messages.all_gathered(tensor, self.group)
        return rows if dim == 0 else torch.cat(rows.chunk(dist.get_world_size(self.group)), dim)


class FullySharded(_Parted):
    """Every weight is split over all ranks, gathered where it is used (torch's fully_shard, "FSDP2")."""

    def _wrap(self) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.is_settled = True  # it has no messages to lay out anew
        is_short = self.config.train.reduce_precision == "bf16"
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if is_short else None)
        self.mesh = init_device_mesh(self.world.device.type, (self.world.world_size,))
        self.network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other; pictures keep theirs
        try:
            for module in [*self._groups(), self.network]:
                fully_shard(module, mesh=self.mesh, mp_policy=policy)
        except ValueError as error:
            raise UserError(
                f"train.parallel is fsdp, which cannot split {self.config.model.name}: {error}\n  Use train.parallel ddp."
            ) from error
        return self.network

    def _groups(self) -> list[nn.Module]:
        """What gathers its weights for itself: large members of sequences, which are certain to be called.

        Other layers may have their weight read by the module around them (Swin's qkv), and it would be there in parts alone.
        """
        groups, inside = [], set()
        for parent in self.network.modules():
            for child in parent.children() if type(parent).forward is nn.Sequential.forward else ():
                is_large = sum(p.numel() for p in child.parameters()) >= OWN_FSDP_GROUP
                if is_large and child not in inside and not isinstance(child, nn.Sequential):
                    groups.append(child)
                    inside.update(child.modules())
        return groups

    def optimizer(self, optimizer):
        if isinstance(optimizer, torch.optim.SGD):  # torch 2.15 has no fused one for tensors in parts
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=True)
            optimizer._step_supports_amp_scaling = False
        return optimizer

    @contextlib.contextmanager
    def accumulating(self):
        self.network.set_requires_gradient_sync(False)
        yield
        self.network.set_requires_gradient_sync(True)

    def clip_gradients(self, max_norm):
        return torch.nn.utils.clip_grad_norm_(self.network.parameters(), max_norm).full_tensor()

    def _on_main(self, name: str, tensor: Tensor) -> Tensor | None:
        everyone = self._everywhere(name, tensor)
        return everyone.cpu() if self.world.is_main else None

    def _everywhere(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _part(self, name, tensor):
        from torch.distributed.tensor import distribute_tensor

        parameter = dict(self.network.named_parameters()).get(name.partition("/")[0])
        if parameter is None or tensor.shape != parameter.shape:
            return tensor
        tensor = tensor.to(self.world.device)
        return distribute_tensor(tensor, self.mesh, parameter.placements, src_data_rank=None)


def _in_bf16(state, bucket):
    # under its own name torch refuses the hook where torch was built without CUDA, for gloo as well (2.15)
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook(state, bucket)


def _like(t: Tensor, data: Tensor) -> Tensor:
    return nn.Parameter(data, t.requires_grad) if isinstance(t, nn.Parameter) else data
