"""Many ranks: images a second and bytes sent a step for ddp, with gradients in fp32 and bf16, and hybrid, in turns, in one run.

    python benchmarks/scaling.py [--model alexnet] [--size 64] [--batch-size 128] [--ranks 2] [--json]
    python benchmarks/scaling.py --hosts 1 2 4       one rank a host, hosts joined by 1 Gbit/s links; root and iproute2

The trainer as it is, on one batch in memory, in bf16 where the processor has instructions for it, else in fp32, unless a
--precision is asked for; the results name it. Beside each figure stands what the model of docs/scaling.md predicts from the
bytes, the bandwidth of an all-reduce, and the same layout's step without messages ("alone"), all measured here in turns.
Bytes are those that left this host's interfaces (all ranks', where they share a host). A host has the same threads however
many there are. Writes benchmarks/results/scaling.json, a part for each kind of run.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ranks import free_port  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("ddp", "hybrid")  # those that the model predicts
SHORT = "ddp, gradients in bf16"
LINK = "1gbit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128, help="the global one")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--hosts", type=int, nargs="+", help="numbers of hosts, one rank on each, instead of --ranks here"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/scaling.json")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--predict", metavar="RUN", help="a name in the results file: the model's table up to 1,024 ranks"
    )
    parser.add_argument("--gbit", type=float, default=1.0, help="with --predict: bandwidth of each rank's link")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help="of each rank; 0 shares the cores")
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if options.predict:
        return predict(json.loads(Path(options.out).read_text())[options.predict], options.gbit)
    with tempfile.TemporaryDirectory() as scratch:
        import torch

        from benchmarks.training import make_shards, precision_for

        options.precision = precision_for(options.precision, torch.device("cpu"))  # on which the ranks compute
        options.shards = make_shards(Path(scratch), options.size, max(256, options.batch_size))
        if options.hosts:
            # hosts that are pieces of one machine share its cores
            options.threads = options.threads or max(1, os.cpu_count() // max(options.hosts))
            runs = {f"{n} hosts": on_hosts(options, Path(scratch), n) for n in options.hosts}
        else:
            runs = {f"{options.ranks} ranks": on_this_machine(options)}
    results = [show(options, where, found) for where, found in runs.items()]
    out = Path(options.out)
    kept = json.loads(out.read_text()) if out.exists() else {}
    for result in results:
        precision = "" if result["precision"] == "fp32" else f" {result['precision']}"
        kept[f"{result['model']}@{result['size']}{precision}, {result['where']}"] = result
    out.write_text(json.dumps(kept, indent=1) + "\n")
    if options.json:
        last = results[-1]
        rates = {layout: last[layout]["images_per_s"] for layout in LAYOUTS if layout in last}
        print(json.dumps(rates | {"precision": last["precision"]}))


def on_this_machine(options) -> dict:
    port = free_port()
    ranks = [start([], options, rank, options.ranks, options.ranks, "127.0.0.1", port) for rank in range(options.ranks)]
    return collect(ranks)


def on_hosts(options, scratch: Path, count: int) -> dict:
    """One rank on each of `count` hosts of tests/cluster/hosts-up.sh, whose cables pass LINK each way."""
    subprocess.run([ROOT / "tests/cluster/hosts-up.sh", scratch, str(count)], check=True)
    try:
        for k in range(1, count + 1):
            shape = [
                "tc",
                "qdisc",
                "replace",
                "dev",
                "eth0",
                "root",
                "tbf",
                "rate",
                LINK,
                "burst",
                "256k",
                "latency",
                "50ms",
            ]
            subprocess.run([scratch / "on", f"node{k}", *shape], check=True)
        ranks = [
            start([str(scratch / "on"), f"node{rank + 1}"], options, rank, count, 1, "node1", 29510)
            for rank in range(count)
        ]
        return collect(ranks)
    finally:
        subprocess.run([ROOT / "tests/cluster/hosts-down.sh", scratch], check=True)


def start(where: list[str], options, rank: int, world_size: int, local_world_size: int, master: str, port: int):
    job = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local_world_size, "LOCAL_WORLD_SIZE": local_world_size,
           "MASTER_ADDR": master, "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    words = {"--model": options.model, "--size": options.size, "--batch-size": options.batch_size, "--steps": options.steps,
             "--repeats": options.repeats, "--shards": options.shards, "--precision": options.precision,
             "--threads": options.threads}  # fmt: skip
    argv = [str(word) for pair in words.items() for word in pair]
    command = [*where, sys.executable, str(Path(__file__).resolve()), "--worker", *argv]
    environment = os.environ | {key: str(value) for key, value in job.items()}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def collect(ranks: list[subprocess.Popen]) -> dict:
    """What rank zero found. Raises RuntimeError if a rank failed."""
    texts = [rank.communicate()[0] for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        raise RuntimeError(f"scaling.py: ranks ended with {codes}; their messages stand above.")
    return json.loads(texts[0].splitlines()[-1])


def work(options) -> None:
    """One rank: all layouts in turns; rank zero prints what it saw."""
    import torch
    import torch.distributed as dist

    from benchmarks.training import open_training, settings
    from dist_train import runtime

    num_ranks, num_local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    accelerator, world = runtime.start(options.precision, options.threads, 600)
    trainings = {}
    for layout in (*LAYOUTS, SHORT) if num_ranks > 1 else ("ddp",):
        more = ["--train.parallel", layout.partition(",")[0], "--train.log_every_steps", str(options.steps)]
        more += ["--train.reduce_precision", "bf16"] if layout == SHORT else []
        config = settings(options.shards, options.model, options.size, options.batch_size, options.precision, *more)
        trainings[layout] = open_training(config, Path(options.shards, layout), accelerator, world, is_synthetic=True)
    kinds = [(layout, False) for layout in trainings] + [(layout, True) for layout in LAYOUTS if num_ranks > 1]
    found = {layout + " alone" * is_alone: {"images_per_s": [], "bytes": [], "cpu_s": []} for layout, is_alone in kinds}
    for turn in range(options.repeats + 1):
        for layout, is_alone in kinds:
            if num_ranks > 1:
                dist.barrier()
            before, cpu = sent_bytes(), cpu_seconds()
            with without_messages() if is_alone else contextlib.nullcontext():
                rate = trainings[layout].window()["images_per_s"]
            if num_ranks > 1:
                dist.barrier()
            sent, cpu = sent_bytes() - before, cpu_seconds() - cpu
            if turn:
                figures = found[layout + " alone" * is_alone]
                figures["cpu_s"].append(cpu / (2 * options.steps))
                figures["images_per_s"].append(rate)
                figures["bytes"].append(sent / (2 * options.steps) / num_local)
    found["link"] = link(dist, torch) if num_ranks > 1 else {}
    found["sizes"] = sizes(trainings["ddp"].run.network, options.batch_size // num_ranks, options.precision)
    if world.is_main:
        print(json.dumps(found))
    runtime.end()


@contextlib.contextmanager
def without_messages():
    """Every rank for itself, with the arithmetic and the memory of its layout: what a step would take on an endless link.

    What others would send is a copy of this rank's own, so weights and losses mean nothing from here on.
    """
    import torch.distributed as dist

    from dist_train import train

    done = mock.Mock()

    def all_gather(everyone, own, group=None):
        everyone.view(-1, *own.shape).copy_(own.expand(dist.get_world_size(group), *own.shape))

    def all_to_all(parts, own, group=None, async_op=False):
        parts.copy_(own)
        return done

    forward_backward = train.forward_backward

    def alone(run, batch):
        with run.parallel.accumulating():
            return forward_backward(run, batch)

    silent = {"all_gather_into_tensor": all_gather, "all_to_all_single": all_to_all, "all_reduce": lambda *a, **k: done}
    with mock.patch.multiple(dist, **silent), mock.patch.object(train, "forward_backward", alone):
        yield


def sent_bytes() -> int:
    """Bytes that have left this host's interfaces, its loopback among them."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


def cpu_seconds() -> float:
    """What this process has taken of the cores; other programs on the machine do not count, unlike in images a second."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def link(dist, torch) -> dict:
    """Bytes a second that a rank sends in a large all-reduce, seconds of a tiny one, bytes a second copied in memory."""
    seconds, large = {}, 16 * 2**20
    for name, size in (("large", large), ("tiny", 1)):
        tensor, times = torch.zeros(size), []
        for _ in range(6):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        seconds[name] = statistics.median(times[1:])
    source, target, times = torch.zeros(large), torch.zeros(large), []
    for _ in range(6):  # by all ranks at once, as in a step
        dist.barrier()
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    world_size = dist.get_world_size()
    sent = 2 * (world_size - 1) / world_size * 4 * large
    return {
        "bytes_per_s": sent / seconds["large"], "latency_s": seconds["tiny"],
        "copied_bytes_per_s": 4 * large / statistics.median(times[1:]),
    }  # fmt: skip


def sizes(network, samples: int, precision: str) -> dict:
    """What the prediction needs of a network: weights before the classifier, and its layers' inputs and outputs."""
    import torch

    layers = [(m.in_features, m.out_features) for m in network.classifier if isinstance(m, torch.nn.Linear)]
    below = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("classifier"))
    return {
        "samples_per_rank": samples, "weights_below": below, "layers": layers,
        "activation_bytes": 2 if precision == "bf16" else 4,
    }  # fmt: skip


def predicted_bytes(sizes: dict, layout: str, num_ranks: int, split_ranks: int = 0) -> float:
    """Bytes that a rank sends in a step. split_ranks: ranks that share one classifier; 0 is all."""
    group = split_ranks or num_ranks
    replicas = num_ranks // group
    around = lambda ranks, numbers: 2 * (ranks - 1) / ranks * 4 * numbers  # noqa: E731  a ring's all-reduce
    inside = sum(i * o + o for i, o in sizes["layers"])
    if layout == "ddp":
        return around(num_ranks, sizes["weights_below"] + inside)
    # the first layer's inputs, what goes from layer to layer, the logits: to each other rank, and back
    widths = [sizes["layers"][0][0], *(o for _, o in sizes["layers"][1:])]
    activations = 2 * (group - 1) * sizes["samples_per_rank"] * sizes.get("activation_bytes", 4) * sum(widths)
    return around(num_ranks, sizes["weights_below"]) + activations + around(replicas, inside / group)


def predicted_seconds(
    sizes: dict, link: dict, alone_s: float, layout: str, num_ranks: int, split_ranks: int = 0
) -> tuple[float, float]:
    """Seconds of a step: where nothing travels while the rank computes, and where everything that can does.

    alone_s: the same layout's step without messages.
    """
    sent = predicted_bytes(sizes, layout, num_ranks, split_ranks) / link["bytes_per_s"]
    waits = messages(sizes, layout) * link["latency_s"]
    # into the buckets that are sent: what DistributedDataParallel does with every gradient that it averages
    averaged = 4 * (sizes["weights_below"] + (sum(i * o + o for i, o in sizes["layers"]) if layout == "ddp" else 0))
    copying = averaged / link.get("copied_bytes_per_s", float("inf"))
    return alone_s + copying + sent + waits, max(alone_s + copying, sent) + waits


def messages(sizes: dict, layout: str) -> int:
    """Collectives of a step that are waited for one after the other: flags and buckets; each border of a split layer."""
    return 4 if layout == "ddp" else 4 + 2 * len(sizes["layers"])


def predict(result: dict, gbit: float) -> None:
    """Print a table in Markdown: MB and milliseconds a step on ever more ranks, with as many samples a rank as measured.

    Times are those of messages that wait for the arithmetic. Arithmetic and latency are the measured run's; a collective's
    latency grows with the logarithm of the ranks.
    """
    sizes = result["sizes"]
    num_measured = result["batch_size"] // sizes["samples_per_rank"]
    ways = {"ddp": ("ddp", 0), "hybrid over all": ("hybrid", 0), "hybrid by 8": ("hybrid", 8)}
    print("| ranks | " + " | ".join(f"{way}, MB | ms" for way in ways) + " |\n|" + "---|" * (1 + 2 * len(ways)))
    for num_ranks in (8, 16, 32, 64, 128, 256, 512, 1024):
        cells = []
        for layout, group in ways.values():
            latency = result["link"]["latency_s"] * math.log2(num_ranks) / max(1, math.log2(num_measured))
            link = result["link"] | {"latency_s": latency, "bytes_per_s": gbit * 1e9 / 8}
            alone_s = result["batch_size"] / result[f"{layout} alone"]["images_per_s"]
            seconds, _ = predicted_seconds(sizes, link, alone_s, layout, num_ranks, group)
            cells += [f"{predicted_bytes(sizes, layout, num_ranks, group) / 1e6:,.1f}", f"{1000 * seconds:,.0f}"]
        print(f"| {num_ranks:,} | " + " | ".join(cells) + " |")


def show(options, where: str, found: dict) -> dict:
    """Print a run's figures beside the prediction; return them for the file."""
    sizes, link, batch = found["sizes"], found["link"], options.batch_size
    num_ranks = batch // sizes["samples_per_rank"]
    result = {
        "where": where, "model": options.model, "size": options.size, "batch_size": batch, "precision": options.precision,
        "n": options.repeats, "steps": options.steps, "threads": options.threads or "cores / ranks", "link": link,
        "sizes": sizes, "cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(f"{options.model}@{options.size} {options.precision}, global batch {batch}, {where}")
    for kind, figures in found.items():
        if "images_per_s" not in figures:
            continue
        rates = figures["images_per_s"]
        result[kind] = {
            "images_per_s": round(statistics.median(rates), 1), "all": [round(r, 1) for r in rates],
            "bytes_per_step": round(min(figures["bytes"])),  # other programs may use an interface as well
            "cpu_s_per_step": round(min(figures["cpu_s"]), 4),
        }  # fmt: skip
        line = f"  {kind:22} {statistics.median(rates):8.1f} images/s ({min(rates):.1f} to {max(rates):.1f})"
        if num_ranks > 1 and kind in LAYOUTS:
            alone_s = statistics.median(batch / rate for rate in found[f"{kind} alone"]["images_per_s"])
            slow, fast = (batch / s for s in predicted_seconds(sizes, link, alone_s, kind, num_ranks))
            expected = predicted_bytes(sizes, kind, num_ranks)
            result[kind] |= {"predicted_images_per_s": round(slow, 1), "predicted_overlapping": round(fast, 1),
                             "predicted_bytes": round(expected)}  # fmt: skip
            line += f", predicted {slow:.1f} to {fast:.1f}; {min(figures['bytes']) / 1e6:.2f} MB a step and rank, "
            line += f"predicted {expected / 1e6:.2f}"
        print(line)
    if SHORT in result:
        pairs = zip(found[SHORT]["images_per_s"], found["ddp"]["images_per_s"], strict=True)
        result["bf16_ratio"] = round(statistics.median(short / full for short, full in pairs), 3)
        less = result["ddp"]["bytes_per_step"] / result[SHORT]["bytes_per_step"]
        print(f"  ddp, gradients in bf16 over fp32: {result['bf16_ratio']:.2f} times the speed, 1/{less:.1f} of the bytes")
    if "hybrid" in result:
        pairs = zip(found["hybrid"]["images_per_s"], found["ddp"]["images_per_s"], strict=True)
        result["speed_ratio"] = round(statistics.median(h / d for h, d in pairs), 3)
        result["bytes_ratio"] = round(result["ddp"]["bytes_per_step"] / result["hybrid"]["bytes_per_step"], 2)
        result["cpu_ratio"] = round(result["ddp"]["cpu_s_per_step"] / result["hybrid"]["cpu_s_per_step"], 3)
        print(f"  hybrid over ddp: {result['speed_ratio']:.2f} times the speed, 1/{result['cpu_ratio']:.2f} of the "
              f"processor's time, 1/{result['bytes_ratio']:.1f} of the bytes")  # fmt: skip
    return result


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
