"""Everything that only a GPU can show, in under eight minutes: `make gpu-check`.

    python benchmarks/gpu_check.py [--minutes 6.5] [--cifar10 SHARDS]     one GPU; refuses without one
    python benchmarks/gpu_check.py --cpu-dry-run                          the same code at toy sizes on the CPU, for the tests

Does a step wait for the device; are gradients the CPU's; how much of the card's measured peak do AlexNet and VGG13 use,
in which precision, compiled or not, with CUDA graphs; does a resume change bits; how far is training from shards, and from
pictures kept on the card, behind the same batch in memory; what the card decodes; plain loops, torchvision's and timm's
networks in them, beside it; how soon CIFAR-10 reaches 94%. Writes benchmarks/results/<card>-<date>.json, goals and what was
found among it. What the time did not allow, what is not installed, or what failed, stands there by name.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.util
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

from benchmarks.training import make_shards, open_training, settings  # noqa: E402
from dist_train import decoder_choice, runtime  # noqa: E402
from dist_train.bench_step import TimedRun  # noqa: E402
from dist_train.checkpoint import Checkpoints  # noqa: E402
from dist_train.errors import UserError  # noqa: E402
from dist_train.gpu_decode import GpuDecoder  # noqa: E402
from dist_train.layers import set_dropout_keys  # noqa: E402
from dist_train.train import run_training  # noqa: E402

# An accuracy that many know; chosen from what others found for such nets, not yet measured. Evaluated once, at the end: no
# checkpoint and no evaluation comes between, and nothing is compiled, which would take longer than it wins.
CIFAR10 = (
    "--data.global_batch_size", "512", "--data.cache", "device", "--model.name", "resnet18", "--model.stem", "small",
    "--augment.crop", "padded", "--augment.padding", "4", "--augment.flip", "0.5", "--augment.start_size", "20",
    "--optim.lr", "0.4", "--optim.schedule", "one_cycle", "--optim.nesterov", "true", "--optim.weight_decay", "0.0005",
    "--optim.label_smoothing", "0.1", "--optim.ema_decay", "0.99", "--train.flip_test", "true", "--train.epochs", "18",
    "--train.eval_every_epochs", "0", "--train.checkpoint_every_steps", "0", "--train.profile_steps", "0",
    "--train.log_every_steps", "100", "--track.wandb", "off",
)  # fmt: skip


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
    cifar10: tuple[str, ...]  # settings of the training to an accuracy
    resumed: tuple[str, ...] = ("alexnet_bn", "vgg13_bn", "resnet18")  # networks whose bits are compared


CARD = Sizes(
    (("alexnet", 224, 1024), ("vgg13", 224, 256), ("vgg13", 32, 2048)), ("fp32", "bf16", "fp16"), (), 10, 3, 4096, 8192,
    (*CIFAR10, "--train.precision", "bf16")
)
TOY = Sizes((("alexnet", 64, 8), ("vgg11", 32, 8)), ("fp32",), ("--model.width", "0.0625"), 1, 1, 40, 128,
            (*CIFAR10, "--model.name", "vgg11_bn", "--model.width", "0.0625", "--data.image_size", "16",
             "--augment.start_size", "8", "--train.epochs", "0.5"), ("alexnet_bn",))  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.5, help="checks not begun by then are left out")
    parser.add_argument("--cpu-dry-run", action="store_true", help="toy sizes on the CPU; its figures mean nothing")
    parser.add_argument("--cifar10", default="", metavar="SHARDS", help="CIFAR-10 as shards, to time its way to 94%%")
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
              "packages": {name: runtime.version_of(name) for name in ("torchvision", "timm", "accelerate")},
              "n": sizes.repeats, "steps": sizes.steps, "checks": {}, "left_out": []}  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    out = Path(options.out or f"benchmarks/results/{slug}-{report['date']}.json")
    with tempfile.TemporaryDirectory() as scratch:
        for name, check in checks(sizes, device, Path(scratch), report, options.cifar10).items():
            if time.monotonic() > deadline or check is None:
                report["left_out"].append(name)
                continue
            began = time.monotonic()
            try:
                found = check()
            except Exception as error:  # the next check may tell more
                found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
                traceback.print_exc()
            report["checks"][name] = found | {"took_s": round(time.monotonic() - began, 1)}
            print(f"{name:32} {json.dumps(report['checks'][name])}", flush=True)
            write(report, out)  # after each: the next one may end the process
            with contextlib.suppress(Exception):
                give_back(device)
    write(report, out)
    failed = [name for name, found in report["checks"].items() if "error" in found]
    print(
        f"written to {out}; failed: {', '.join(failed) or 'none'}; left out: {', '.join(report['left_out']) or 'none'}"
    )
    return 1 if failed else 0


def checks(sizes: Sizes, device, scratch: Path, report: dict, cifar10: str) -> dict[str, Callable[[], dict] | None]:
    """Name -> check, the most important first; None where something it needs is not there.

    `report` holds what the earlier ones found. cifar10: a folder of shards, or nothing.
    """
    shards: dict[int, str] = {}

    def shards_of(pixels) -> str:
        if pixels not in shards:
            shards[pixels] = make_shards(scratch / str(pixels), pixels, sizes.pictures)
        return shards[pixels]

    def training(name, pixels, batch, precision, is_synthetic, *more) -> TimedRun:
        forget_precision()
        accelerator, world = runtime.start(precision, 0, 300)
        argv = ("--train.log_every_steps", str(sizes.steps), *sizes.more, *more)
        config = settings(shards_of(pixels), name, pixels, batch, precision, *argv)
        return open_training(config, scratch, accelerator, world, is_synthetic)

    def speed(name, pixels, batch, precision, *more) -> dict:
        trainer = training(name, pixels, batch, precision, True, *more)
        rate = median_rate(trainer, sizes.repeats)
        flops = trainer.run.sample_flops[pixels, pixels] * rate
        peak = report["checks"].get("peak", {}).get("tflops", {}).get(precision)
        return {
            "images_per_s": round(rate, 1),
            "tflops": round(flops / 1e12, 3),
            "mfu": peak and round(flops / 1e12 / peak, 4),
        }

    name, pixels, batch = sizes.networks[0]
    best = sizes.precisions[min(1, len(sizes.precisions) - 1)]
    compiled = ("--train.compile", str(device.type == "cuda").lower())
    kept = ("--data.cache", "device", "--data.crop", "resize")
    table = {
        "peak": lambda: {"tflops": {p: round(peak_tflops(device, p, sizes.matrix), 3) for p in sizes.precisions}},
        "no step waits": lambda: waits(
            training(name, pixels, batch, best, False, *kept, "--optim.clip_norm", "1", "--optim.ema_decay", "0.99"), device
        ),
        "gradients of the CPU": lambda: like_the_cpu(training(name, pixels, 8, "fp32", True).run),
    }
    for network in sizes.networks:
        label = f"{network[0]}@{network[1]}"
        table[f"{label} {best} compiled"] = lambda network=network: speed(*network, best, *compiled)
        table[f"{label} {best}"] = lambda network=network: speed(*network, best)
        table[f"{label} torchvision loop"] = lambda network=network: loop(_torchvision, *network, best, device, sizes)
        if not network[0].startswith("alexnet"):  # which timm does not have
            is_there = importlib.util.find_spec("timm")
            timm_loop = lambda network=network: loop(_timm, *network, best, device, sizes)  # noqa: E731
            table[f"{label} timm loop"] = timm_loop if is_there else None
    table[f"{sizes.networks[0][0]}@{sizes.networks[0][1]} from the card"] = lambda: fed(
        lambda kind: training(*sizes.networks[0], best, kind, *compiled, *kept), sizes  # compiled: the step that is hardest to feed
    )
    table["same bits after a resume"] = lambda: {
        kind: same_bits(shards_of(32), sizes, best, scratch / kind, is_asked)
        for kind, is_asked in (("usual", False), ("deterministic", True))
    }
    table["jpeg decoding"] = lambda: decoding(training(*sizes.networks[0], best, True).run, device)
    table["cifar10 to 94%"] = (lambda: to_accuracy(cifar10, sizes, scratch)) if cifar10 else None
    for network in sizes.networks:
        label = f"{network[0]}@{network[1]}"
        table[f"{label} plain loop"] = lambda network=network: plain_loop(
            training(*network, "fp32", True), device, sizes
        )
        uncached = lambda kind, network=network: training(*network, best, kind, "--data.cache", "none")  # noqa: E731
        table[f"{label} from shards"] = lambda uncached=uncached: fed(uncached, sizes)
        table[f"{label} {best} graphs"] = lambda network=network: speed(
            *network, best, *compiled, "--train.compile_mode", "reduce-overhead"
        )
        for precision in sizes.precisions:
            if precision != best:
                table[f"{label} {precision}"] = lambda network=network, precision=precision: speed(*network, precision)
    return table


def write(report: dict, out: Path) -> None:
    out.write_text(json.dumps(report | {"goals": goals(report)}, indent=1) + "\n")


def give_back(device) -> None:
    """The memory of the check before, which its run and what was compiled hold on to, and the flags that it left as it failed."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True
    if device.type == "cuda":
        from torch import _dynamo

        _dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def goals(report: dict) -> dict[str, dict]:
    """What was aimed at on an H200, and what was found: None where a check failed or never got there; without one that ran not at
    all."""
    table = {
        "vgg13@224: share of the measured bf16 peak": (0.5, "vgg13@224 bf16", "mfu"),
        "alexnet@224 from the card: share of the rate from memory": (0.95, "alexnet@224 from the card", "share"),
        "cifar10 to 94%: seconds": (30, "cifar10 to 94%", "reached_s"),
    }
    goals = {}
    for name, (goal, label, key) in table.items():
        figures = [found.get(key) for check, found in report["checks"].items() if check.startswith(label)]
        if figures:
            goals[name] = {"goal": goal, "found": max((figure for figure in figures if figure), default=None)}
    return goals


def loop(build, name: str, pixels: int, batch: int, precision: str, device, sizes: Sizes) -> dict:
    """Another library's network and optimizer in the loop of its examples: autocast, channels-last, one batch in memory."""
    network, optimizer = build(name)
    network = network.to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)
    optimizer = optimizer(network)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    rates = []
    for _ in range(sizes.repeats + 1):
        settle(device)
        began = time.perf_counter()
        for _ in range(sizes.steps):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        settle(device)
        rates.append(sizes.steps * batch / (time.perf_counter() - began))
    return {"images_per_s": round(statistics.median(rates[1:]), 1)}


def _torchvision(name: str):
    import torchvision

    network = torchvision.models.get_model(name, num_classes=10)
    return network, lambda network: torch.optim.SGD(network.parameters(), 0.001, momentum=0.9, weight_decay=1e-4)


def _timm(name: str):
    import timm
    import timm.optim

    network = timm.create_model(name, num_classes=10)
    return network, lambda network: timm.optim.create_optimizer_v2(network, opt="momentum", lr=0.001, weight_decay=1e-4)


def decoding(run, device) -> dict:
    """Images a second of random crops of a run's pictures: all threads of the CPU, and the GPU alone."""
    data = dataclasses.replace(run.config.data, crop="random_resized")
    found = decoder_choice.rates(dataclasses.replace(run.config, data=data), GpuDecoder(device))
    return {way: round(rate, 1) for way, rate in found.items()}


def to_accuracy(shards: str, sizes: Sizes, scratch: Path, top1: float = 0.94) -> dict:
    """Seconds of training until the evaluation after an epoch reaches an accuracy on the test split; None if it never does.

    The clock is that of the log: it runs from the first step, with evaluations and compiling.
    """
    forget_precision()
    folder = scratch / "cifar10"
    run_training(["--data.shards", shards, "--data.val_split", "test", "--run", str(folder), *sizes.cifar10])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    reached = next((line["time_s"] for line in evaluations if line["top1"] >= top1), None)
    return {"reached_s": reached, "best": max(line["top1"] for line in evaluations), "took_s_in_all": evaluations[-1]["time_s"],
            "steps": [[line[key] for key in ("step", "time_s", "images_per_s")] for line in lines if line["kind"] == "train"]}


def same_bits(shards: str, sizes: Sizes, precision: str, scratch: Path, deterministic: bool) -> dict[str, bool]:
    """Network -> whether six steps, and three that are gone on with for three more, end in the same weights, bit for bit."""
    found = {}
    for name in sizes.resumed:
        ends = {}
        for run, halts in (("whole", (6,)), ("resumed", (3, 6))):
            for steps in halts:
                forget_precision()
                run_training([
                    "--data.shards", shards, "--data.global_batch_size", str(min(256, sizes.pictures)), "--model.name", name,
                    "--model.stem", "small", "--train.precision", precision, "--train.max_steps", str(steps),
                    "--train.epochs", "9", "--train.profile_steps", "0", "--augment.crop", "random_resized",
                    "--optim.clip_norm", "1", "--track.wandb", "off", "--runtime.deterministic", str(deterministic).lower(),
                    "--run", str(scratch / name / run), "--resume", *(sizes.more if name != "resnet18" else ()),
                ])  # fmt: skip
            ends[run] = Checkpoints(scratch / name / run, 1).newest()[0].tensors
        torch.use_deterministic_algorithms(False)
        pairs = [(t, ends["resumed"][stem][key]) for stem, named in ends["whole"].items() for key, t in named.items()]
        found[name] = all(torch.equal(a, b) for a, b in pairs)
    return found


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


def waits(trainer: TimedRun, device) -> dict:
    """Five steps of the training loop, from pictures on the device, in which any wait for it is an error."""
    trainer.window()
    with _no_waiting(device):
        trainer.silent_steps(5)
    trainer.run.check_loss()
    return {"steps": 5, "watched": device.type == "cuda"}


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


def plain_loop(trainer: TimedRun, device, sizes: Sizes) -> dict:
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


def fed(make: Callable[[bool], TimedRun], sizes: Sizes) -> dict:
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


def median_rate(trainer: TimedRun, repeats: int) -> float:
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
