"""Progressive resizing: pictures enter the network small at first and grow to full size, so that early steps cost less.

Howard 2018, https://www.fast.ai/posts/2018-08-10-fastai-diu-imagenet.html; Tan and Le 2021, arXiv:2104.00298.
"""

import torch
from torch import Tensor, nn

from dist_train.augment import resize
from dist_train.config import AugmentConfig
from dist_train.errors import UserError
from dist_train.metrics import flops_per_sample

Size = tuple[int, int]  # height, width


class Progressive:
    """What enters the network in each step of a run: a function of the step alone.

    full: size at the end; num_steps: of the run. The shorter side grows by eighths of its full length, each size for as
    many steps, and none is below config.start_size. So a compiled network is compiled for eight sizes at most.
    interpolation: data.interpolation.
    """

    def __init__(self, config: AugmentConfig, full: Size, num_steps: int, interpolation: str = "bilinear"):
        self.full, self.growing_steps, self.interpolation = full, config.full_size_from * num_steps, interpolation
        shorter = min(full)
        eighths = {max(1, round(shorter * k / 8)) for k in range(1, 9)}
        sides = sorted(side for side in eighths if side >= (config.start_size or shorter))
        self.sizes = [tuple(round(pixels * side / shorter) for pixels in full) for side in sides]

    def size_at(self, step: int) -> Size:
        """What enters in a step (0, 1, ...)."""
        done = min(1.0, step / self.growing_steps) if self.growing_steps else 1.0
        return self.sizes[int(done * (len(self.sizes) - 1))]

    def __call__(self, inputs: Tensor, step: int) -> Tensor:
        """Bring a step's batch to its size. inputs: float (N, C, height, width) of full size, and so returned if that is it."""
        size = self.size_at(step)
        if size == self.full:
            return inputs
        limits = ()
        if self.interpolation == "bicubic":  # these are normalised: no pixel is to leave the range of its own picture
            limits = inputs.amin((2, 3), keepdim=True), inputs.amax((2, 3), keepdim=True)
        return resize(inputs, size, self.interpolation, limits).contiguous(memory_format=torch.channels_last)

    def flops(self, network: nn.Module) -> dict[Size, int]:
        """Operations of a sample's training step at each size. Raises UserError where the network does not take one."""
        found = {}
        for size in reversed(self.sizes):
            try:
                found[size] = flops_per_sample(network, (3, *size), training=True)
            except (RuntimeError, ValueError, AssertionError) as error:
                if size == self.full:
                    raise
                raise UserError(f"augment.start_size: the network does not take {size[0]} x {size[1]} px: "
                                f"{str(error).splitlines()[0]}\n  Set a larger one, or leave it out.") from None  # fmt: skip
        return found
