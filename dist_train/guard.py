"""Is every loss a number, is a stop asked for: agreed over the ranks on the device, read by the host one step late."""

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train import messages


class Guard:
    """Two flags a step, and `not_finite`: () float32 on the device, 1 from the first step on that had a bad loss anywhere.

    A fused optimizer that is given `not_finite` as its found_inf changes no weight where it is 1. So the host may go on
    and look a step later, when the device has long been done with it: nothing in a step waits for the device.
    """

    def __init__(self, device: torch.device, world_size: int):
        self.world_size, self.not_finite = world_size, torch.zeros((), device=device)
        # two of each: while one is read, the device writes the other
        self._host = [torch.zeros(2, pin_memory=device.type == "cuda") for _ in range(2)]
        self._figures = [flags.numpy() for flags in self._host]  # the same memory: a look costs no call of torch
        # blocking: the host sleeps while it waits, and leaves its core to the decoders
        self._written = [torch.cuda.Event(blocking=True) for _ in range(2)] if device.type == "cuda" else None
        self._losses: list[Tensor | None] = [None, None]
        self._unread: list[int] = []
        self._is_asked = False

    def spoil(self, gradient: Tensor) -> None:
        """Make a gradient inf or NaN where `not_finite` is 1: a loss scaler skips the update. Elsewhere its bits stay."""
        gradient.div_(1 - self.not_finite)

    def note(self, step: int, loss: Tensor, stop: bool) -> None:
        """Between backward and update of a step: combine this rank's loss, () on the device, and wish with the others'."""
        slot, loss = step % 2, loss.detach()
        # no torch.tensor(...): its copy to the device would wait
        flags = torch.stack([(~torch.isfinite(loss)).float(), torch.full_like(self.not_finite, float(stop))])
        if self.world_size > 1:
            with messages.clock.waiting():
                dist.all_reduce(flags, dist.ReduceOp.MAX)
        torch.maximum(self.not_finite, flags[0], out=self.not_finite)
        self._host[slot].copy_(flags, non_blocking=True)
        if self._written:
            self._written[slot].record()
        self._losses[slot] = loss
        self._unread.append(step)

    def read(self, newest: float) -> tuple[bool, tuple[int, Tensor] | None]:
        """(stop, bad), by the steps up to newest; waits until the device has been there.

        stop: any rank has wished to stop. bad: the first step with a loss that is not finite, and this rank's loss there.
        Every rank gets the same answer at the same step.
        """
        while self._unread and self._unread[0] <= newest:
            step = self._unread.pop(0)
            if self._written:
                self._written[step % 2].synchronize()
            is_bad, wishes = self._figures[step % 2].tolist()
            if is_bad:
                return self._is_asked, (step, self._losses[step % 2])
            self._is_asked = self._is_asked or bool(wishes)
        return self._is_asked, None
