"""Who decodes a run's pictures, the CPU or the GPU: what it began with, what was asked for, or what is faster here."""

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dist_train.boxes import random_resized_boxes
from dist_train.config import RunConfig
from dist_train.decode import decode_from_files
from dist_train.errors import UserError
from dist_train.folds import open_index
from dist_train.gpu_decode import GpuDecoder, is_there
from dist_train.order import sample_keys
from dist_train.settings import read_written
from dist_train.sizes import decoder_crop
from dist_train.store import Store

PAYS_FROM = 1.1  # times the CPU's speed: the GPU has a network to train as well
TRIAL_PICTURES, TRIAL_ROUNDS = 256, 3


def settled(config: RunConfig, folder: Path, device: torch.device) -> RunConfig:
    """The settings with data.decode "cpu" or "gpu": as the run in the folder has it, else as asked, else as measured.

    Raises UserError where the GPU is to decode and there is none.
    """
    kind, written = config.data.decode, folder / "config.yaml"
    if kind == "auto" and written.exists():
        kind = (read_written(written).get("data") or {}).get("decode", "cpu")
    if kind == "auto":
        found = rates(config, GpuDecoder(device)) if device.type == "cuda" else None
        kind = "gpu" if found and found.get("gpu", 0) > PAYS_FROM * found["cpu"] else "cpu"
    if kind == "gpu" and device.type != "cuda":
        raise UserError(
            f"{folder}: data.decode is gpu, and this machine computes on the {device.type}.\n"
            f"  A GPU's decoder gives other pixels: go on where there is one, or begin another run with --run."
        )
    if kind == "gpu" and not is_there():
        raise UserError(
            f"{folder}: data.decode is gpu, but this torchvision has no decode_jpeg.\n"
            f"  Install one that has (0.29, say), or begin another run with data.decode: cpu."
        )
    return replace(config, data=replace(config.data, decode=kind))


def rates(config: RunConfig, gpu: GpuDecoder) -> dict[str, float] | None:
    """Images a second of {"cpu", "gpu"} on the first pictures of the training split, in turns: all threads, one GPU.

    None where no picture is cut at random (those are decoded once and kept, or small) and where torchvision has no decoder
    for a GPU; without "gpu" where that has taken none of the pictures.
    """
    index = open_index(config)
    crop, image_size = decoder_crop(config, index)
    if crop != "random_resized" or not is_there():  # in this order: importing torchvision takes seconds
        return None
    store = Store(index.split(config.data.train_split).stored)
    samples = np.arange(min(TRIAL_PICTURES, store.split.num_samples))
    shapes, keys = store.table[samples], sample_keys(config.seed, np.zeros_like(samples), samples)
    boxes = random_resized_boxes(keys, shapes["height"], shapes["width"], config.augment.scale, config.augment.ratio)
    size = (image_size, image_size) if image_size else index.image_size
    at, rows = store.locate(samples), np.empty((len(samples), *size, 3), np.uint8)
    where = (at.fds, at.offsets, at.sizes, None, boxes)
    ways = {"cpu": lambda: decode_from_files(*where, rows), "gpu": lambda: gpu(*where, size)}
    seconds = {way: [] for way in ways}
    for _ in range(TRIAL_ROUNDS + 1):
        for way, decode in ways.items():
            began = time.perf_counter()
            decode()
            seconds[way].append(time.perf_counter() - began)
    found = {way: len(samples) / statistics.median(times[1:]) for way, times in seconds.items()}
    threads = config.data.threads or len(os.sched_getaffinity(0))
    return {"cpu": threads * found["cpu"]} | ({"gpu": found["gpu"]} if gpu.has_decoded else {})
