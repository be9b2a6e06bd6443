"""The loaders that loaders.py compares, each served in a process of its own.

    python benchmarks/loader_server.py LOADER WORKLOAD FOLDER SECONDS

prints when its first batch is there, then images a second, by the clock and by processor time, for each line it reads.
"""

import functools
import importlib
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from loader_pictures import ROOT, WORKERS, WORKLOADS, labelled

SETTLE_BATCHES, SETTLE_S = 8, 0.3  # before the clock starts, both: what a loader has fetched ahead is not counted
PEERS = {  # module that must be there
    "torchvision": "torchvision", "webdataset": "webdataset", "streaming": "streaming", "litdata": "litdata",
    "dali": "nvidia.dali", "ffcv": "ffcv", "ffcv, raw": "ffcv", "ffcv, 500 px": "ffcv", "tf.data": "tensorflow",
}  # fmt: skip
ONLY = {"ffcv, raw": ("W2", "W3"), "ffcv, 500 px": ("W1",)}  # others are measured on every workload
OURS = {  # what each variant is measured on
    "dist_train": ("W1", "W2", "W3"), "dist_train, wheels only": ("W1", "W2", "W3"), "dist_train, cached": ("W2", "W3"),
    "dist_train, shards of 500 px": ("W1",),
}  # fmt: skip


def serve(name: str, workload: str, folder: Path, seconds: float) -> None:
    """A loader in a process of its own: says when its first batch is there, then images a second on each line read."""
    import torch

    torch.set_num_threads(1)
    size, batch_size, _ = WORKLOADS[workload]
    stdout, sys.stdout = sys.stdout, sys.stderr  # some peers print
    importlib.import_module(PEERS.get(name, "dist_train.data"))  # what is imported once is not the loader's start
    began = time.perf_counter()
    base, _, variant = name.partition(", ")
    opener = _ours if base == "dist_train" else globals()[f"_{base.replace('.', '_')}"]
    batches = opener(folder, size, batch_size, workload == "W1", *([variant] if base in ("dist_train", "ffcv") else []))
    first = next(batches)
    assert tuple(first.shape) in ((batch_size, 3, size, size), (batch_size, size, size, 3)), first.shape
    assert first.dtype == torch.uint8, first.dtype
    print(json.dumps({"first_batch_s": time.perf_counter() - began}), file=stdout, flush=True)
    if name.endswith("cached"):
        for _ in itertools.islice(batches, len(list(folder.glob("folders/*/*.jpg"))) // batch_size + 2):
            pass  # the first epoch fills the cache
    for _ in sys.stdin:
        count, began = 0, time.perf_counter()
        while count < SETTLE_BATCHES or time.perf_counter() - began < SETTLE_S:
            next(batches)
            count += 1
        count, began, used = 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() - began < seconds:
            count += len(next(batches))
        rates = count / (time.perf_counter() - began), count / max(cpu_seconds() - used, 1e-6)
        wait_until_idle()
        print(json.dumps(rates), file=stdout, flush=True)


def wait_until_idle(timeout_s: float = 3.0) -> None:
    """Let this process and its workers fill what they fetch ahead: the next loader's turn is not to pay for it."""
    deadline, used = time.monotonic() + timeout_s, cpu_seconds()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        before, used = used, cpu_seconds()
        if used - before < 0.04:  # some poll
            return


def cpu_seconds() -> float:
    """Processor time of this process and its workers so far, where /proc tells; on a busy machine the steadier measure."""
    found, todo = 0.0, [os.getpid()]
    while todo:
        process = Path("/proc", str(todo.pop()))
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            todo += [
                int(child) for task in (process / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except OSError:  # ended, or not Linux
            continue
        found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


# ---- The loaders: (folder of a workload, size, batch size, whether to crop and flip) -> endless uint8 batches ----------


def _ours(folder: Path, size: int, batch_size: int, augmented: bool, variant: str):
    from dist_train import decode, open_stream

    if "wheels" in variant:
        decode.native = None
    stream = open_stream(
        str(folder / ("shards-500" if "500" in variant else "shards")), batch_size=batch_size, threads=WORKERS,
        image_size=size if augmented else 0, crop="random_resized" if augmented else "resize",
        cache="memory" if "cached" in variant else "none",
    )  # fmt: skip
    for batch in stream:
        images = batch.images
        if augmented:
            for i in (batch.random_keys & 1).nonzero()[:, 0].tolist():  # one by one: a tenth of what torch.where takes
                images[i] = images[i].flip(2)
        yield images


def _transforms(size: int, augmented: bool):
    from torchvision import transforms

    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()] if augmented else []
    return transforms.Compose([*steps, transforms.PILToTensor()])


def _endless(loader):
    while True:
        for batch in loader:
            yield batch[0] if isinstance(batch, (list, tuple)) else batch["image"]


def _torchvision(folder: Path, size: int, batch_size: int, augmented: bool):
    import torch
    from torchvision.datasets import ImageFolder

    pictures = ImageFolder(str(folder / "folders"), _transforms(size, augmented))
    return _endless(torch.utils.data.DataLoader(
        pictures, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True))  # fmt: skip


def _webdataset(folder: Path, size: int, batch_size: int, augmented: bool):
    import webdataset as wds

    transform = _transforms(size, augmented)
    tars = sorted(map(str, (folder / "shards").glob("train-*.tar")))
    pictures = (wds.WebDataset(tars, shardshuffle=True, resampled=False, nodesplitter=None).shuffle(1000).decode("pil")
                .to_tuple("jpg", "cls").map_tuple(transform, int).repeat().batched(batch_size))  # fmt: skip
    return _endless(wds.WebLoader(pictures, batch_size=None, num_workers=WORKERS, persistent_workers=True))


def _streaming(folder: Path, size: int, batch_size: int, augmented: bool):
    import torch
    from streaming import MDSWriter, StreamingDataset

    local = folder / "mds"
    if not local.exists():
        with MDSWriter(out=str(local), columns={"image": "bytes", "label": "int"}) as writer:
            for path, label in labelled(folder):
                writer.write({"image": path.read_bytes(), "label": label})
    transform = _transforms(size, augmented)

    class Pictures(StreamingDataset):
        def __getitem__(self, at):
            return _picture(super().__getitem__(at)["image"], transform), 0

    pictures = Pictures(local=str(local), shuffle=True, batch_size=batch_size)
    return _endless(torch.utils.data.DataLoader(
        pictures, batch_size, num_workers=WORKERS, drop_last=True, persistent_workers=True))  # fmt: skip


def _litdata(folder: Path, size: int, batch_size: int, augmented: bool):
    import litdata

    local = folder / "litdata"
    if not local.exists():
        litdata.optimize(_litdata_sample, [(str(path), label) for path, label in labelled(folder)], str(local), num_workers=1,
                         chunk_bytes="64MB")  # fmt: skip
    pictures = litdata.StreamingDataset(str(local), shuffle=True, drop_last=True,
                                        transform=functools.partial(_litdata_picture, _transforms(size, augmented)))  # fmt: skip
    return _endless(litdata.StreamingDataLoader(
        pictures, batch_size=batch_size, num_workers=WORKERS, persistent_workers=True))  # fmt: skip


def _litdata_sample(sample):
    return {"image": Path(sample[0]).read_bytes(), "label": sample[1]}


def _litdata_picture(transform, sample):
    return {"image": _picture(sample["image"], transform)}


def _dali(folder: Path, size: int, batch_size: int, augmented: bool):
    import torch
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=WORKERS, device_id=None, prefetch_queue_depth=2)
    def pipeline():
        payloads, _ = fn.readers.file(file_root=str(folder / "folders"), random_shuffle=True, name="pictures")
        if not augmented:
            return fn.decoders.image(payloads, device="cpu", output_type=types.RGB)
        pictures = fn.decoders.image_random_crop(payloads, device="cpu", output_type=types.RGB)
        pictures = fn.resize(pictures, size=[size, size], interp_type=types.INTERP_TRIANGULAR)
        return fn.flip(pictures, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()
    while True:
        (batch,) = built.run()
        yield torch.from_numpy(np.ascontiguousarray(batch.as_array()))


def _ffcv(folder: Path, size: int, batch_size: int, augmented: bool, variant: str):
    """variant: "raw" pixels; "500 px", its usual recipe for photographs, half of them raw; else JPEGs of quality 90."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.writer import DatasetWriter

    path = folder / f"pictures{variant.replace(' ', '')}.beton"
    if not path.exists():
        options = {"raw": {"write_mode": "raw"}, "": {"write_mode": "jpg"}}.get(
            variant, {"write_mode": "proportion", "compress_probability": 0.5, "max_resolution": 500}
        )
        fields = {"image": RGBImageField(**options), "label": IntField()}
        DatasetWriter(f"{path}.partial", fields, num_workers=WORKERS).from_indexed_dataset(_Pictures(labelled(folder)))
        os.replace(f"{path}.partial", path)
    decoder = RandomResizedCropRGBImageDecoder((size, size)) if augmented else SimpleRGBImageDecoder()
    steps = [decoder, *([RandomHorizontalFlip()] if augmented else []), ToTensor()]
    return _endless(Loader(str(path), batch_size, WORKERS, os_cache=True, order=OrderOption.RANDOM, drop_last=True,
                           pipelines={"image": steps, "label": None}))  # fmt: skip


class _Pictures(list):
    """(path, label), as (picture, label)."""

    def __getitem__(self, at):
        from PIL import Image

        path, label = super().__getitem__(at)
        return Image.open(path).convert("RGB"), label


def _tf_data(folder: Path, size: int, batch_size: int, augmented: bool):
    import tensorflow as tf
    import torch

    tf.config.threading.set_intra_op_parallelism_threads(WORKERS)

    def load(path):
        payload = tf.io.read_file(path)
        if not augmented:
            return tf.io.decode_jpeg(payload, 3)
        shape = tf.io.extract_jpeg_shape(payload)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros([1, 0, 4]), area_range=(0.08, 1.0), use_image_if_no_bounding_boxes=True)  # fmt: skip
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        picture = tf.image.resize(tf.io.decode_and_crop_jpeg(payload, window, 3), (size, size))
        return tf.cast(tf.image.random_flip_left_right(picture), tf.uint8)

    paths = [str(path) for path, _ in labelled(folder)]
    pictures = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).map(load, WORKERS)  # deterministic=False is slower
    for batch in pictures.batch(batch_size, drop_remainder=True).repeat().prefetch(2).as_numpy_iterator():
        yield torch.from_numpy(batch)


def _picture(payload: bytes, transform):
    from PIL import Image

    return transform(Image.open(io.BytesIO(payload)).convert("RGB"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
