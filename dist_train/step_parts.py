"""Where the time of a training step goes: data, augmentation, the passes, optimizer, messages; timed over a window of steps."""

import time
from collections.abc import Iterable

import torch

from dist_train import messages

PARTS = ("data", "augment", "forward", "backward", "optimizer", "communication", "other")


class StepParts:
    """Clocks over `num_steps` steps, after `skip` steps of warming up. Outside the window a mark costs nothing.

    Within it the host waits for the device at each mark, so that what the device still does is counted where it belongs;
    that makes the steps of the window a little slower on a GPU. "communication" is the time in which the rank does
    nothing but wait for messages (see `messages.MessageClock`), taken out of the part in which it waits. parameters:
    those whose gradients are averaged over the ranks during the backward pass.
    """

    def __init__(self, device: torch.device, num_steps: int, skip: int = 10, parameters: Iterable[torch.Tensor] = ()):
        self.device, self.skip, self.num_steps, self._parameters = device, skip, num_steps, parameters
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.is_complete = False  # the window has been, its figures can be read
        self._steps, self._part, self._since, self._is_paused = 0, "", 0.0, False

    def mark(self, part: str) -> None:
        """Here begins a part of PARTS but "communication", and the one before ends. "data" begins a step."""
        if self.is_complete or not self.num_steps:
            return
        self._steps += part == "data"
        if self._steps <= self.skip:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        waited = messages.clock.take()
        if not self._part:
            messages.clock.start(self.device, self._parameters)
        elif not self._is_paused:
            self.seconds[self._part] += now - self._since - waited
            self.seconds["communication"] += waited
        self._part, self._since, self._is_paused = part, now, False
        self.is_complete = self._steps > self.skip + self.num_steps
        if self.is_complete:
            messages.clock.stop()

    def pause(self) -> None:
        """What follows, until the next mark, is no part of a step: an evaluation, a checkpoint."""
        if self._part and not self.is_complete:
            self.mark("other")
            self._is_paused = True

    def step_s(self) -> float:
        """Mean time of a step in the window, seconds."""
        return sum(self.seconds.values()) / self.num_steps

    def shares(self) -> dict[str, float]:
        """{part: share of the window's time}, in the order of PARTS; together 1."""
        total = sum(self.seconds.values())
        return {part: round(seconds / total, 4) for part, seconds in self.seconds.items()}
