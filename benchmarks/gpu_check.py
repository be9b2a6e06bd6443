"""Everything that only a GPU can show, in under eight minutes: `make gpu-check`.

    python benchmarks/gpu_check.py [--minutes 7.5]        one GPU; refuses without one
    python benchmarks/gpu_check.py --cpu-dry-run          the same code at toy sizes on the CPU, for the tests

Does a step wait for the device; are gradients the CPU's; how much of the card's measured peak do AlexNet and VGG13 use,
in which precision, compiled or not; how far is training from shards behind the same batch in memory; a plain loop beside
it. Writes benchmarks/results/<card>-<date>.json. What the time did not allow, or what failed, stands there by name.
"""

import argparse
import contextlib
import copy
import json
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.training import TimedTraining, make_shards, settings  # noqa: E402
from dist_train import runtime  # noqa: E402
from dist_train.errors import UserError  # noqa: E402
from dist_train.layers import set_dropout_keys  # noqa: E402
from dist_train.metrics import flops_per_sample  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """How large everything is: for a card, or for a test on the CPU."""

    networks: tuple[tuple[str, int, int], ...]  # name, pixels, batch
    precisions: tuple[str, ...]
    more: tuple[str, ...]  # settings besides
    steps: int
    repeats: int
    pictures: int
    matrix: int


CARD = Sizes(
    (("alexnet", 224, 1024), ("vgg13", 224, 256), ("vgg13", 32, 2048)), ("fp32", "bf16", "fp16"), (), 10, 3, 4096, 8192
)
TOY = Sizes((("alexnet", 64, 8), ("vgg11", 32, 8)), ("fp32",), ("--model.width", "0.0625"), 1, 1, 40, 128)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="checks not begun by then are left out")
    parser.add_argument("--cpu-dry-run", action="store_true", help="toy sizes on the CPU; its figures mean nothing")
    parser.add_argument("--out", default="")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not options.cpu_dry_run:
        print(
            "gpu-check: no GPU is visible, so there is nothing to check. On the CPU: benchmarks/step.py.",
            file=sys.stderr,
        )
        return 2
    sizes = TOY if options.cpu_dry_run else CARD
    device = torch.device("cpu" if options.cpu_dry_run else "cuda")
    card = "cpu" if options.cpu_dry_run else torch.cuda.get_device_name()
    deadline = time.monotonic() + 60 * options.minutes
    report = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
              "n": sizes.repeats, "steps": sizes.steps, "checks": {}, "left_out": []}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for name, check in checks(sizes, device, Path(scratch), report).items():
            if time.monotonic() > deadline:
                report["left_out"].append(name)
                continue
            began = time.monotonic()
            try:
                found = check()
            except Exception as error:  # the next check may tell more
                found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                traceback.print_exc()
            report["checks"][name] = found | {"took_s": round(time.monotonic() - began, 1)}
            print(f"{name:32} {json.dumps(report['checks'][name])}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    out = Path(options.out or f"benchmarks/results/{slug}-{report['date']}.json")
    out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, found in report["checks"].items() if "error" in found]
    print(
        f"written to {out}; failed: {', '.join(failed) or 'none'}; left out: {', '.join(report['left_out']) or 'none'}"
    )
    return 1 if failed else 0


def checks(sizes: Sizes, device, scratch: Path, report: dict) -> dict[str, Callable[[], dict]]:
    """Name -> check, the most important first. `report` holds what the earlier ones found."""
    shards: dict[int, str] = {}

    def training(name, pixels, batch, precision, is_synthetic, *more) -> TimedTraining:
        if pixels not in shards:
            shards[pixels] = make_shards(scratch / str(pixels), pixels, sizes.pictures)
        forget_precision()
        accelerator, world = runtime.start(precision, 0, 300)
        argv = ("--train.log_every_steps", str(sizes.steps), *sizes.more, *more)
        config = settings(shards[pixels], name, pixels, batch, precision, *argv)
        return TimedTraining(config, scratch, accelerator, world, is_synthetic)

    def speed(name, pixels, batch, precision, *more) -> dict:
        trainer = training(name, pixels, batch, precision, True, *more)
        rate = median_rate(trainer, sizes.repeats)
        flops = 3 * flops_per_sample(trainer.run.network, (3, pixels, pixels)) * rate
        peak = report["checks"].get("peak", {}).get("tflops", {}).get(precision)
        return {
            "images_per_s": round(rate, 1),
            "tflops": round(flops / 1e12, 3),
            "mfu": peak and round(flops / 1e12 / peak, 4),
        }

    name, pixels, batch = sizes.networks[0]
    best = sizes.precisions[min(1, len(sizes.precisions) - 1)]
    table = {
        "peak": lambda: {"tflops": {p: round(peak_tflops(device, p, sizes.matrix), 3) for p in sizes.precisions}},
        "no step waits": lambda: waits(training(name, pixels, batch, best, True, "--optim.clip_norm", "1"), device),
        "gradients of the CPU": lambda: like_the_cpu(training(name, pixels, 8, "fp32", True).run),
    }
    for network in sizes.networks:
        for precision in sizes.precisions:
            label = f"{network[0]}@{network[1]} {precision}"
            table[label] = lambda network=network, precision=precision: speed(*network, precision)
        table[f"{network[0]}@{network[1]} {best} compiled"] = lambda network=network: speed(
            *network, best, "--train.compile", str(device.type == "cuda").lower()
        )
    for network in sizes.networks:
        label = f"{network[0]}@{network[1]}"
        table[f"{label} plain loop"] = lambda network=network: plain_loop(
            training(*network, "fp32", True), device, sizes
        )
        table[f"{label} from shards"] = lambda network=network: fed(lambda kind: training(*network, best, kind), sizes)
    return table


def peak_tflops(device, precision: str, size: int) -> float:
    """The best of a few matrix products of this size: what the card can do at most, as it is cooled and clocked now."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.set_float32_matmul_precision("high")
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        settle(device)
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        settle(device)
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * size**3 / best / 1e12


def waits(trainer: TimedTraining, device) -> dict:
    """Five steps in which any wait for the device is an error."""
    trainer.window()
    step = Steps(trainer)
    with _no_waiting(device):
        for _ in range(5):
            step()
    trainer.run.prove()
    return {"steps": 5, "watched": device.type == "cuda"}


class Steps:
    """Single steps of a trainer, one after the other: what `train` does between two log lines."""

    def __init__(self, trainer: TimedTraining):
        self.trainer, self.batches = trainer, trainer.run.stream(trainer.state.step)

    def __call__(self) -> torch.Tensor:
        run, state = self.trainer.run, self.trainer.state
        loss = run.forward_backward(next(self.batches))
        run.agree_to_stop(state, loss)
        if run.config.optim.clip_norm:
            run.parallel.clip_gradients(run.config.optim.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return loss


def like_the_cpu(run) -> dict:
    """Loss and gradient of one batch in full float32, dropout on, beside the CPU's."""
    torch.set_float32_matmul_precision("highest")
    was_allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    batch = next(run.stream(0))
    inputs, targets = run.prepare(batch.images, batch.labels, batch.random_keys)
    losses, gradients = [], []
    for device in (run.world.device, torch.device("cpu")):
        network = copy.deepcopy(run.network).to(device)
        set_dropout_keys(network, batch.random_keys.to(device))
        loss = F.cross_entropy(network(inputs.to(device)), targets.to(device))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in network.parameters()]))
    torch.backends.cudnn.allow_tf32 = was_allowed
    torch.set_float32_matmul_precision("high")
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert abs(losses[0] - losses[1]) < 1e-4 and error < 1e-3, (
        f"losses {losses}, gradients differ by {error:.1e} of their norm"
    )
    return {"losses": losses, "gradient_error": error}


def plain_loop(trainer: TimedTraining, device, sizes: Sizes) -> dict:
    """The network of a run in a loop as tutorials show it: float32, one batch in memory, torch's SGD."""
    network = trainer.run.network
    optimizer = torch.optim.SGD(network.parameters(), 0.001, momentum=0.9)
    batch = next(trainer.run.stream(0))
    images = torch.randn(batch.images.shape, device=device)
    set_dropout_keys(network, batch.random_keys)
    rates = []
    for _ in range(sizes.repeats + 1):
        settle(device)
        began = time.perf_counter()
        for _ in range(sizes.steps):
            optimizer.zero_grad()
            F.cross_entropy(network(images), batch.labels).backward()
            optimizer.step()
        settle(device)
        rates.append(sizes.steps * len(images) / (time.perf_counter() - began))
    return {"images_per_s": round(statistics.median(rates[1:]), 1)}


def fed(make: Callable[[bool], TimedTraining], sizes: Sizes) -> dict:
    """From shards and from memory, in turns."""
    trainers = {"shards": make(False), "memory": make(True)}
    rates = {kind: [] for kind in trainers}
    for turn in range(sizes.repeats + 1):
        for kind, trainer in trainers.items():
            rate = trainer.window()["images_per_s"]
            if turn:
                rates[kind].append(rate)
    pairs = zip(rates["shards"], rates["memory"], strict=True)
    return {kind: round(statistics.median(r), 1) for kind, r in rates.items()} | {
        "share": round(statistics.median(a / b for a, b in pairs), 4)
    }


def median_rate(trainer: TimedTraining, repeats: int) -> float:
    rates = [trainer.window()["images_per_s"] for _ in range(repeats + 1)]
    return statistics.median(rates[1:])


def forget_precision() -> None:
    """Let Accelerate start anew: it keeps the first precision of a process for good."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def settle(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _no_waiting(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
