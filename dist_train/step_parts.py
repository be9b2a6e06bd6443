"""Where the time of a training step goes: data, augmentation, forward, backward, optimizer; timed over a window of steps."""

import time

import torch

PARTS = ("data", "augment", "forward", "backward", "optimizer", "other")


class StepParts:
    """Clocks over `num_steps` steps, after `skip` steps of warming up. Outside the window a mark costs nothing.

    Within it the host waits for the device at each mark, so that what the device still does is counted where it belongs;
    that makes the steps of the window a little slower on a GPU. Messages between ranks count where they are waited for.
    """

    def __init__(self, device: torch.device, num_steps: int, skip: int = 10):
        self.device, self.skip, self.num_steps = device, skip, num_steps
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.is_complete = False  # the window has been, its figures can be read
        self._steps, self._part, self._since = 0, "", 0.0

    def mark(self, part: str) -> None:
        """Here begins a part of PARTS, and the one before ends. "data" begins a step."""
        if self.is_complete or not self.num_steps:
            return
        self._steps += part == "data"
        if self._steps <= self.skip:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        if self._part:
            self.seconds[self._part] += now - self._since
        self._part, self._since = part, now
        self.is_complete = self._steps > self.skip + self.num_steps

    def step_s(self) -> float:
        """Mean time of a step in the window, seconds."""
        return sum(self.seconds.values()) / self.num_steps

    def shares(self) -> dict[str, float]:
        """{part: share of the window's time}, in the order of PARTS; together 1."""
        total = sum(self.seconds.values())
        return {part: round(seconds / total, 4) for part, seconds in self.seconds.items()}
