"""Who decodes a run's pictures, the CPU or the GPU: what it began with, what was asked for, or what is faster here."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dist_train.boxes import random_resized_boxes
from dist_train.config import RunConfig
from dist_train.data import picture_size
from dist_train.decode import decode_from_files
from dist_train.errors import UserError
from dist_train.folds import open_index
from dist_train.gpu_decode import GpuDecoder, is_there
from dist_train.order import sample_keys
from dist_train.run_folder import has_begun
from dist_train.settings import read_written
from dist_train.sizes import decoder_crop
from dist_train.store import Store
from dist_train.workers import num_cores

PAYS_FROM = 1.1  # times the CPU's speed: the GPU has a network to train as well
TRIAL_PICTURES, TRIAL_ROUNDS = 256, 3
LEAST_OF_A_THREAD = 32  # pictures: they take far longer than waking a thread


def choose_decoder(config: RunConfig, folder: Path, device: torch.device, num_threads: int = 0) -> RunConfig:
    """The settings with data.decode "cpu" or "gpu": as the run in the folder has it, else as asked, else as measured.

    num_threads: decoding threads of one rank; 0 is one for each core that this process may use. Raises UserError where the
    GPU is to decode and there is none.
    """
    kind = config.data.decode
    if kind == "auto" and has_begun(folder):
        kind = (read_written(folder / "config.yaml").get("data") or {}).get("decode", "cpu")
    if kind == "auto":
        found = rates(config, GpuDecoder(device), num_threads) if device.type == "cuda" else None
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


def rates(config: RunConfig, gpu: GpuDecoder, num_threads: int = 0) -> dict[str, float] | None:
    """Images a second of {"cpu", "gpu"} on the first pictures of the training split, in turns: one rank's threads, one GPU.

    num_threads: as in `choose_decoder`; all of them decode at once. None where no picture is cut at random (those are decoded once
    and kept, or small) and where torchvision has no decoder for a GPU; without "gpu" where that has taken none of the pictures.
    """
    index = open_index(config)
    crop, image_size = decoder_crop(config, index)
    if crop != "random_resized" or index.features is not None or not is_there():  # last: it imports torchvision, for seconds
        return None
    size = picture_size(index, image_size)
    store = Store(index.split(config.data.train_split).stored)
    samples = np.arange(min(TRIAL_PICTURES, store.split.num_samples))
    shapes, keys = store.table[samples], sample_keys(config.seed, np.zeros_like(samples), samples)
    boxes = random_resized_boxes(keys, shapes["height"], shapes["width"], config.augment.scale, config.augment.ratio)
    at, num_threads, how = store.locate(samples), num_threads or num_cores(), config.data.interpolation
    share = max(-(-len(samples) // num_threads), min(LEAST_OF_A_THREAD, len(samples)))
    parts = [(np.arange(share) + i * share) % len(samples) for i in range(num_threads)]
    rows = np.empty((num_threads, share, *size, 3), np.uint8)

    def decode(part: np.ndarray, out: np.ndarray) -> None:
        decode_from_files(at.fds[part], at.offsets[part], at.sizes[part], None, boxes[part], out, how)

    with ThreadPoolExecutor(num_threads) as pool:
        ways = {"cpu": (num_threads * share, lambda: list(pool.map(decode, parts, rows))),
                "gpu": (len(samples), lambda: gpu(at.fds, at.offsets, at.sizes, None, boxes, size, how))}  # fmt: skip
        found = {way: [] for way in ways}
        for _ in range(TRIAL_ROUNDS + 1):
            for way, (num_pictures, work) in ways.items():
                began = time.perf_counter()
                work()
                found[way].append(num_pictures / (time.perf_counter() - began))
    medians = {way: statistics.median(rates[1:]) for way, rates in found.items()}
    return medians if gpu.has_decoded else {"cpu": medians["cpu"]}
