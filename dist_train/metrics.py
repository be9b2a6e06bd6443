"""Figures: sums on the device in whole numbers, so exact on any number of ranks; clocks; operation counts."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.confusion import balanced_accuracy

_LOSS_UNIT = 2**-20  # losses are summed as whole multiples of this: 10^9 samples with a loss of 1,000 fit into 63 bits
_LARGEST_LOSS = 1e4
_PEAK_S = 0.3  # at most, for the products that a CPU's peak is measured by: training waits for them


@dataclass(frozen=True)
class EvalResult:
    """Figures of one pass over some samples."""

    samples: int
    loss: float
    """mean over the samples, nats; nan where one of them has a loss that is no number"""
    top1: float
    """share of samples whose largest logit is the label's"""
    top5: float | None
    """share of samples whose label is among the five largest logits; None for five classes or fewer"""
    balanced: float = math.nan
    """balanced accuracy: the mean of the classes' recalls, of those that occur"""
    confusion: Tensor | None = None
    """(K, K) int64 on the CPU, rows are labels, columns predictions"""

    def figures(self) -> dict:
        """The numbers alone, for JSON: samples, loss, top1, balanced, and top5 where there is one."""
        figures = {"samples": self.samples, "loss": self.loss, "top1": self.top1, "balanced": self.balanced}
        return figures if self.top5 is None else {**figures, "top5": self.top5}


def goodness(top1: float, loss: float | None, monitor: str, balanced: float | None = None) -> list[float]:
    """What makes one of two evaluations the better: larger is, compared from left to right.

    By "top1" or "balanced", where the lower loss decides between equals, or by "loss". A figure that is no finite number, or
    None, as the balanced accuracy of an earlier version's evaluation, is the worst.
    """
    loss = loss if loss is not None and math.isfinite(loss) else math.inf  # NaN would be beaten by nothing
    if monitor == "loss":
        return [-loss]
    share = balanced if monitor == "balanced" else top1
    return [share if share is not None and math.isfinite(share) else -math.inf, -loss]


class Sums:
    """Running counts of hits, those of each class too, and of the loss, on the device: nothing is read back before `result`.

    confusion: keep the (K, K) table too.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", confusion: bool = False):
        self.num_classes = num_classes
        # samples, top-1 hits, top-5 hits, loss in _LOSS_UNITs, losses that are no number; samples and top-1 hits of each class;
        # then the table row by row
        sizes = [5, 2 * num_classes, confusion * num_classes**2]
        self._all = torch.zeros(sum(sizes), dtype=torch.int64, device=device)  # together, to travel in one message
        self._whole, of_class, self._table = self._all.split(sizes)
        self._of_class = of_class.view(num_classes, 2)
        self._keeps_confusion = confusion

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, losses: Tensor | None = None) -> None:
        """Add samples. logits: (N, K) float; labels: (N,) int64; losses: (N,) float, cross-entropy where not given.

        Of equal logits the lower class number counts as the larger, so a network that always says the same is not right
        by chance, and logits that are no numbers are never right.
        """
        logits = logits.float()
        if losses is None:
            losses = F.cross_entropy(logits, labels, reduction="none")
        own = logits.gather(1, labels[:, None])
        earlier = torch.arange(self.num_classes, device=labels.device) < labels[:, None]
        rank = (~(logits <= own) | ((logits == own) & earlier)).sum(1)
        broken = ~torch.isfinite(losses)
        units = (losses.double().clamp(0, _LARGEST_LOSS) / _LOSS_UNIT).round()
        units = torch.where(broken, 0, units).to(torch.int64)
        size = torch.full_like(rank[:1], len(rank)).squeeze(0)
        hits = (rank < 1).to(torch.int64)
        self._whole += torch.stack([size, hits.sum(), (rank < 5).sum(), units.sum(), broken.sum()])
        self._of_class.index_add_(0, labels, torch.stack([torch.ones_like(hits), hits], 1))  # bincount would wait for the GPU
        if self._keeps_confusion:
            cells = labels * self.num_classes + logits.argmax(1)
            self._table.index_add_(0, cells, torch.ones_like(cells))

    def reduce(self) -> None:
        """Add up over the ranks, in one message; every rank then holds the whole. Call it once, before `result`."""
        dist.all_reduce(self._all)

    def result(self) -> EvalResult:
        """Read the figures: waits for the device. Without samples the shares are nan."""
        samples, top1, top5, units, broken = self._whole.tolist()
        of_class, right = self._of_class.cpu().numpy().T
        table = self._table.view(self.num_classes, -1).cpu() if self._keeps_confusion else None
        mean = lambda total: total / samples if samples else float("nan")  # noqa: E731
        return EvalResult(
            samples=samples,
            loss=float("nan") if broken else mean(units * _LOSS_UNIT),
            top1=mean(top1),
            top5=mean(top5) if self.num_classes > 5 else None,
            balanced=balanced_accuracy(right, of_class),
            confusion=table,
        )


class Throughput:
    """Samples a second and the share of time spent waiting for data, since the last reading.

    Wall clock, without waiting for the device. On a GPU a reading is true where the host has just read a figure from
    the device, as a log line does.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._start, self._samples, self._waited = now(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """The block waits for data."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    def add(self, samples: int) -> None:
        """Count samples that went through a step."""
        self._samples += samples

    def read(self) -> tuple[float, float]:
        """(samples a second, share of time waiting) of the window that ends here; the next one begins."""
        now = self._now()
        seconds = max(now - self._start, 1e-9)
        figures = self._samples / seconds, self._waited / seconds
        self._start, self._samples, self._waited = now, 0, 0.0
        return figures


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Dense floating-point operations a second that the device reaches on one large matrix product, the best of some.

    That is what MFU is a share of here: measured here and now, with the threads at hand. Chowdhery et al. 2022, who named
    MFU, divide by the data sheet's peak, which no product reaches: their figures are lower for the same work.
    """
    draws = torch.Generator(device).manual_seed(0)  # its own; on constants a GPU needs less power and clocks higher

    def best_rate(side: int, num_products: int) -> float:
        a, b = (torch.randn(side, side, device=device, generator=draws).to(dtype) for _ in range(2))
        times = []
        for _ in range(num_products):
            start = time.perf_counter()
            a @ b
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - start)
        return 2 * side**3 / min(times)

    if device.type == "cuda":
        return best_rate(8192, 5)
    small = best_rate(512, 3)
    num_products = min(10, int(_PEAK_S * small / (2 * 1024**3)))
    return max(small, best_rate(1024, num_products)) if num_products else small


def flops_per_sample(model: nn.Module, input_shape: tuple[int, ...], training: bool = False) -> int:
    """Floating-point operations of one sample's forward pass; a multiply-add is two.

    training: and of its backward pass, with the gradients of all parameters: twice as many again, less the gradient of
    what enters, which nobody asks for. input_shape: without the batch dimension. Counted by torch's FlopCounterMode on the
    meta device: no arithmetic is done and no memory taken. Convolutions and matrix products are counted, the rest is not.
    """
    from torch.utils.flop_counter import FlopCounterMode

    state = {name: p.detach().to("meta").requires_grad_(training) for name, p in model.named_parameters()}
    state |= {name: t.to("meta") for name, t in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            logits = torch.func.functional_call(model, state, (torch.empty(1, *input_shape, device="meta"),))
            if training:
                logits.sum().backward()
    finally:
        for module, training in modes.items():
            module.training = training
    return counter.get_total_flops()
