"""Exact evaluation on any number of ranks: each sums over its own samples, one reduction at the end, nothing padded."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dist_train.augment import constants, evaluation_pixels
from dist_train.boxes import central_boxes
from dist_train.cache import DecodedCache
from dist_train.config import RunConfig
from dist_train.data import Batch, open_evaluation, picture_size, to_device
from dist_train.durable import replace_json
from dist_train.index import ShardIndex
from dist_train.metrics import EvalResult, Sums
from dist_train.ranks import from_every_rank, meet
from dist_train.runtime import World

MAX_MISTAKES = 64  # worst mistakes kept for the report
LOOK_EVERY_S = 1.0  # between two looks for a request to stop; a job that is ended has 30 s in all


class Interrupted(Exception):
    """The job was asked to stop while it evaluated. Every rank raises this after the same batch; nothing was recorded."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one pass over a split, and its worst mistakes, worst first.

    mistakes: {"sample", "label", "predicted", "probability" (of the predicted class), "loss"}.
    """

    split: str
    result: EvalResult
    mistakes: list[dict]


@torch.no_grad()
def evaluate(
    config: RunConfig, index: ShardIndex, split: str, network: torch.nn.Module, accelerator, world: World, crop: float,
    is_asked_to_stop: Callable[[], bool] = lambda: False, cache: str | DecodedCache = "none", confusion: bool = True,
    record: Callable = lambda *of_batch: None,
) -> Evaluation:  # fmt: skip
    """Evaluate a network on a split; every rank returns the same figures.

    network: without the wrapper of data parallelism, so that ranks with different numbers of batches never wait for
    each other. crop: see `centred`; cache: see `open_evaluation`. is_asked_to_stop: asked about once a second; where it is true on
    any rank, all raise Interrupted. confusion: keep the (K, K) table too. record(batch, predicted (N,), probabilities (N, K),
    losses (N,)) takes this rank's batches, in sample order. Raises UserError if a sample cannot be read.
    """
    was_training = network.training
    network.eval()
    sums = Sums(index.num_classes, world.device, confusion)
    per_sample = []
    data, num_samples = config.data, index.split(split).num_samples
    batch_size = max(1, data.global_batch_size // world.world_size)
    batch_size = min(batch_size, config.train.micro_batch_size or batch_size)
    batches = open_evaluation(
        index, split, batch_size, data.side_evaluated, crop, threads=data.threads or world.num_cores, world=world.place,
        prefetch_mb=data.prefetch_mb, verify=data.verify, pin_memory=world.device.type == "cuda", cache=cache,
        interpolation=data.interpolation,
    )  # fmt: skip
    meet(world)  # a rank may have had to decode the split to its disk
    largest_share = -(-num_samples // world.world_size)
    num_rounds = -(-largest_share // batch_size)
    for batch in until_asked(to_device(batches, world.device), num_rounds, is_asked_to_stop, world):
        logits = predict_logits(config, index, network, batch.images, accelerator, crop)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        sums.update(logits, batch.labels, losses)
        probabilities, predicted = logits.softmax(1), logits.argmax(1)  # as the figures count: softmax can make two logits equal
        record(batch, predicted, probabilities, losses)
        probability = probabilities.gather(1, predicted[:, None])[:, 0]
        per_sample.append((batch.samples, torch.stack([batch.labels.float(), predicted.float(), probability, losses])))
    network.train(was_training)
    if world.world_size > 1:
        sums.reduce()
    result = sums.result()
    assert result.samples == num_samples, f"{result.samples} samples evaluated, the index counts {num_samples}"
    return Evaluation(split, result, _worst(per_sample, world))


def until_asked(
    batches: Iterator[Batch], num_rounds: int, is_asked_to_stop: Callable[[], bool], world: World
) -> Iterator[Batch]:
    """Pass batches on, at most one a round; raise Interrupted on every rank, in the same round, if one is asked to stop.

    num_rounds: batches of the rank that has most of them; all ranks go through as many rounds. They look at each other about
    once in LOOK_EVERY_S, after a number of rounds that follows from the slowest rank's pace and is the same on all.
    """
    looked, next_look, every = time.monotonic(), 0, 1
    for done in range(num_rounds):
        if done == next_look:
            answer = torch.tensor([float(is_asked_to_stop()), time.monotonic() - looked], device=world.device)
            if world.world_size > 1:
                torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
            asked, seconds = answer.tolist()
            if asked:
                raise Interrupted
            if done:  # before the first batch there is no pace to go by
                every = max(1, min(8 * every, int(every * LOOK_EVERY_S / max(seconds, 1e-6))))
            looked, next_look = time.monotonic(), done + every
        batch = next(batches, None)
        if batch is not None:
            yield batch


def predict_logits(
    config: RunConfig, index, network: torch.nn.Module, values: torch.Tensor, accelerator, crop: float = 0.0
) -> torch.Tensor:
    """Stored values -> float32 logits (N, K). values: uint8 (N, 3, H, W), or float32 (N, F) of a table.

    index needs mean, std, features and image_size only. crop: see `centred`. With train.flip_test or train.shift_test, the mean
    over `views`.
    """
    if index.features is not None:
        inputs = [(1.0, standardised(values, index))]
    else:
        size = picture_size(index, config.data.side_evaluated)
        pictures = central_pixels(values, size, index.mean, index.std, crop, config.data.interpolation)
        inputs = views(pictures, config.train.flip_test, config.train.shift_test)
    with accelerator.autocast():
        return sum(weight * network(view).float() for weight, view in inputs)


def central_pixels(
    values: torch.Tensor, size: tuple[int, int], mean: list[float], std: list[float], crop: float, interpolation: str
) -> torch.Tensor:
    """`augment.evaluation_pixels` of what `centred` leaves of each picture. values: uint8 (N, 3, H, W); crop: share, 0 for all."""
    whole, (top, left) = centred(tuple(values.shape[2:]), size, crop)
    pictures = evaluation_pixels(values, whole, mean, std, interpolation)[:, :, top : top + size[0], left : left + size[1]]
    return pictures.contiguous(memory_format=torch.channels_last)


def centred(stored: tuple[int, int], size: tuple[int, int], crop: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) that a whole picture is brought to, and (top, left) of the part of that size that enters the network.

    The same part as `boxes.central_boxes` finds, which keeps crop of the shorter side. Where crop is 0 the picture enters whole,
    whatever its shape; and pictures that are stored no larger than they enter, as those that the decoder has cut are, do so, too.
    """
    if not crop or min(stored) <= max(size):
        return size, (0, 0)
    top, left, height, width = central_boxes([stored[0]], [stored[1]], size, crop)[0].tolist()
    zoom = (size[0] / height, size[1] / width)
    return (round(stored[0] * zoom[0]), round(stored[1] * zoom[1])), (round(top * zoom[0]), round(left * zoom[1]))


def views(pictures: torch.Tensor, flipped: bool, shift: int) -> Iterator[tuple[float, torch.Tensor]]:
    """What an evaluation sees of each picture, and how much it counts; the weights sum to 1.

    The picture; with shift, in its place at half the weight, and moved that many pixels up and to the left, and as many down
    and to the right, at a quarter each; with flipped, each of these together with its mirror image. pictures: float32
    (N, C, H, W), normalised, so that what a shift uncovers is the mean colour, as in training.
    """
    moves = [(0, 0.5), (-shift, 0.25), (shift, 0.25)] if shift else [(0, 1.0)]
    for pixels, weight in moves:
        moved = F.pad(pictures, (pixels, -pixels) * 2) if pixels else pictures
        moved = moved.contiguous(memory_format=torch.channels_last)
        if flipped:
            weight /= 2
            yield weight, moved.flip(3)
        yield weight, moved


def standardised(values: torch.Tensor, index: ShardIndex) -> torch.Tensor:
    """A table's rows less the training split's mean, over its standard deviation. values: float32 (N, F).

    What is missing (NaN) becomes 0, as if it were the mean.
    """
    mean, std = (constants(tuple(row), values.device) for row in (index.mean, index.std))
    return ((values - mean) / std).masked_fill(values.isnan(), 0)


def write_evaluation(folder: Path, evaluation: Evaluation, fingerprint: str) -> None:
    """runs/NAME/evaluation-<split>.json, for the report. fingerprint: the split's, by which another set's figures are known."""
    result = evaluation.result
    replace_json(folder / f"evaluation-{evaluation.split}.json", {
        "split": evaluation.split, "fingerprint": fingerprint, **result.figures(),
        "confusion": result.confusion.tolist(), "mistakes": evaluation.mistakes,
    }, indent=None)  # a line a cell would take minutes where there are thousands of classes  # fmt: skip


def _worst(per_sample: list, world: World) -> list[dict]:
    mine = []
    if per_sample:
        samples = torch.cat([s for s, _ in per_sample])
        labels, predicted, probability, losses = torch.cat([v for _, v in per_sample], 1).cpu()
        wrong = (labels != predicted).nonzero().flatten()
        for i in wrong[losses[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES].tolist():
            mine.append({"sample": int(samples[i]), "label": int(labels[i]), "predicted": int(predicted[i]),
                         "probability": float(probability[i]), "loss": float(losses[i])})  # fmt: skip
    found = [mistake for part in from_every_rank(world, mine) for mistake in part]
    return sorted(found, key=lambda m: (-m["loss"], m["sample"]))[:MAX_MISTAKES]
