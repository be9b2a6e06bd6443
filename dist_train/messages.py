"""How long this process waits for messages of the other ranks; counted only while a window of steps is timed."""

import contextlib
import functools
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def all_gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(n, ...) of each rank -> (G n, ...) of all, in the order of the ranks. group None: of all ranks."""
    everyone = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    with clock.waiting():
        dist.all_gather_into_tensor(everyone, x.contiguous(), group)
    return everyone


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Give every rank the mean of all ranks' tensors, of one type, in one message."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    with clock.waiting():
        dist.all_reduce(message)
    message /= dist.get_world_size()
    for tensor, mean in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in this one's memory; in a new one inside a compiled network."""
    if torch.compiler.is_compiling():
        return torch.ops.dist_train.sum_over_ranks(tensor)
    with clock.waiting():
        dist.all_reduce(tensor)
    return tensor


@functools.cache
def let_compile() -> None:
    """Make `sum_over_ranks` one closed operation of a compiled network; call it before compiling.

    What Dynamo makes of dist.all_reduce itself is reordered by Inductor into wrong sums (torch 2.15, gloo; tests/test_parallel.py).
    """

    @torch.library.custom_op("dist_train::sum_over_ranks", mutates_args=())
    def of_ranks(tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    of_ranks.register_fake(torch.empty_like)


class MessageClock:
    """Seconds in which this rank could do nothing but wait for others: for their messages, or for them to be as far.

    Every collective of a step is waited for inside `waiting`. Gradients that are averaged while the backward pass runs
    are waited for at its end: between the last gradient and `backward_is_over`. What travels while the rank computes
    is not counted, and neither are fully_shard's own messages.
    """

    def __init__(self):
        self.is_counting, self._seconds = False, 0.0
        self._device = torch.device("cpu")
        self._hooks, self._last_gradient = [], None

    def start(self, device: torch.device, parameters: Iterable[Tensor] = ()) -> None:
        """Count from here on. parameters: those whose gradients are averaged during the backward pass."""
        self.stop()
        self._device, self.is_counting, self._seconds = device, True, 0.0
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in parameters if p.requires_grad]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._last_gradient, self.is_counting = [], None, False

    def waiting(self) -> contextlib.AbstractContextManager:
        """The block does nothing but send, receive and wait; it costs nothing while nobody counts."""
        # a compiled network is not interrupted; asked first, or it would be compiled again once counting begins
        is_untimed = torch.compiler.is_compiling() or not self.is_counting
        return contextlib.nullcontext() if is_untimed else self._timed()

    def backward_is_over(self) -> None:
        """The backward pass has returned: what passed since its last gradient was waiting."""
        if self._last_gradient is None:
            return
        if self._device.type == "cuda":  # there the host has gone ahead: the device's own time counts
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            end.synchronize()
            self._seconds += self._last_gradient.elapsed_time(end) / 1000
        else:
            self._seconds += time.perf_counter() - self._last_gradient
        self._last_gradient = None

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextlib.contextmanager
    def _timed(self):
        self._finish_computing()
        began = time.perf_counter()
        yield
        self._finish_computing()
        self._seconds += time.perf_counter() - began

    def _finish_computing(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _note(self, parameter: Tensor) -> None:
        if self._device.type == "cuda":
            self._last_gradient = self._last_gradient or torch.cuda.Event(enable_timing=True)
            self._last_gradient.record()
        else:
            self._last_gradient = time.perf_counter()


clock = MessageClock()  # one a process, like the process group that it watches
