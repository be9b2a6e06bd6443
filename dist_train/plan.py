"""What each rank reads at which step, printed without touching a sample: `dist-train plan`."""

import argparse
import json
import shlex

import numpy as np

from dist_train.config import DataConfig, RunConfig
from dist_train.errors import UserError
from dist_train.index import SplitIndex, load_index, simulated_split
from dist_train.order import Order, rank_share
from dist_train.remote import shown
from dist_train.store import sample_name


def main(argv: list[str]) -> None:
    """`dist-train plan --shards DIR --global-batch-size B --world-size W --steps A:B [--seed 0] [--json]`."""
    options = _parse(argv)
    split = _split(options)
    try:
        order = Order(split.shard_samples, options.global_batch_size, options.seed, options.window_shards, options.lanes)
        rank_share(options.global_batch_size, 0, options.world_size)
    except ValueError as error:
        raise UserError(f"dist-train plan: {error}.") from None
    if options.json:
        _print_json(order, split, options)
    else:
        _print_summary(order, split, options)


def command(config: RunConfig, step: int) -> str:
    """What names the samples of a training's step."""
    data, usual = config.data, DataConfig()
    settings = {"split": "train_split", "window-shards": "window_shards", "lanes": "lanes"}
    more = [f"--{option} {getattr(data, name)}" for option, name in settings.items() if getattr(data, name) != getattr(usual, name)]
    words = [f"dist-train plan --json --shards {shlex.quote(shown(data.shards))} --global-batch-size {data.global_batch_size}",
             f"--seed {config.seed} --steps {step}:{step + 1}", *more]  # fmt: skip
    return "known with data.folds 0 only: a fold's order is its own" if data.folds else " ".join(words)


def _print_json(order: Order, split: SplitIndex, options) -> None:
    share = options.global_batch_size // options.world_size
    for step in range(*options.steps):
        samples, _ = order.global_batch(step)
        shards = split.shard_of(samples)
        for rank in range(options.world_size):
            mine = slice(rank * share, (rank + 1) * share)
            print(json.dumps({
                "step": step, "rank": rank,
                "samples": [sample_name(split.name, s) for s in samples[mine].tolist()],
                "shards": [shown(split.files[k]) for k in np.unique(shards[mine]).tolist()],
            }))  # fmt: skip


def _print_summary(order: Order, split: SplitIndex, options) -> None:
    world, batch, first, stop = options.world_size, options.global_batch_size, *options.steps
    nodes = -(-world // options.ranks_per_node)
    mean_bytes = split.shard_bytes.sum() / split.num_samples
    looked = min(stop - first, 64)  # a look at up to 64 steps is representative: they are all dealt alike
    steps = np.unique(np.linspace(first, stop - 1, looked).astype(int))
    batches = [split.shard_of(order.global_batch(step)[0]) for step in steps.tolist()]
    per_node = np.concatenate([b.reshape(nodes, -1) for b in batches], axis=1) if batch % nodes == 0 else None
    print(f"{split.name}: {split.num_samples:,} samples in {split.num_shards:,} shards, "
          f"{split.shard_bytes.sum() / 1e9:,.2f} GB")  # fmt: skip
    print(f"global batch {batch:,} on {world:,} ranks ({nodes:,} nodes): {batch // world:,} samples a rank and step, "
          f"{split.num_samples / batch:,.2f} steps an epoch")  # fmt: skip
    print(f"order: seed {options.seed}, {order.lanes:,} lanes, windows of {min(order.window_shards, split.num_shards):,} shards")
    print(f"steps {first}:{stop}: {(stop - first) * batch // nodes:,} samples and "
          f"{(stop - first) * batch // nodes * mean_bytes / 1e6:,.1f} MB a node")  # fmt: skip
    is_full = order.window_shards >= split.num_shards
    in_play = split.num_shards if is_full else min(split.num_shards, order.lanes * (order.window_shards + 1))
    reading_nodes = nodes if is_full else max(1, nodes / order.lanes)
    own = in_play if is_full else -(-in_play // min(nodes, order.lanes))
    print(f"shards in play at once: {in_play:,} in the job, about {own:,} a node")
    readers = "by every node" if is_full and nodes > 1 else f"by about {reading_nodes:.3g} node(s)"
    print(f"each shard is read {readers}, once an epoch")
    if per_node is not None:
        touched = [len(np.unique(row)) for row in per_node]
        print(f"shards touched in the {len(steps)} steps looked at: {min(touched):,} to {max(touched):,} a node")


def _split(options) -> SplitIndex:
    if options.simulate:
        try:
            sizes = dict(part.split("=") for part in options.simulate.split(","))
            return simulated_split(int(float(sizes["samples"])), int(float(sizes["shards"])))
        except (ValueError, KeyError):
            raise UserError(f"--simulate is {options.simulate!r}; expected samples=1000000000,shards=100000.") from None
    if not options.shards:
        raise UserError("dist-train plan: --shards DIR is needed (or --simulate samples=N,shards=S).")
    return load_index(options.shards).split(options.split)


def _parse(argv: list[str]):
    parser = argparse.ArgumentParser(prog="dist-train plan", description="Print what each rank reads, without reading it.")
    parser.add_argument("--shards", help="folder with an index.json")
    parser.add_argument("--simulate", help="instead of shards: a made-up split, samples=N,shards=S")
    parser.add_argument("--split", default="train", help="as data.train_split; default train")
    parser.add_argument("--global-batch-size", type=int, required=True, help="samples per step over all ranks")
    parser.add_argument("--world-size", type=int, default=1, help="ranks; default 1")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="for the summary; default 8")
    parser.add_argument("--steps", default="0:1", help="FIRST:STOP, STOP not included; default 0:1")
    parser.add_argument("--seed", type=int, default=0, help="as seed; default 0")
    parser.add_argument("--window-shards", type=int, default=16, help="as data.window_shards; default 16")
    parser.add_argument("--lanes", type=int, default=0, help="as data.lanes")
    parser.add_argument("--json", action="store_true", help="one line a step and rank")
    options = parser.parse_args(argv)
    try:
        first, stop = (int(part) for part in options.steps.split(":"))
    except ValueError:
        raise UserError(f"--steps is {options.steps!r}; expected FIRST:STOP, such as 0:3.") from None
    if not 0 <= first < stop or options.world_size < 1 or options.ranks_per_node < 1:
        raise UserError(f"dist-train plan: nothing to print for steps {options.steps} on {options.world_size} ranks.")
    options.steps = first, stop
    return options
