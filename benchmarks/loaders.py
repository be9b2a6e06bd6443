"""Images a second of dist_train's stream beside other loaders, on the same pictures, in one run; and conversion.

    python benchmarks/loaders.py --images DIR_OR_TAR --cifar CLASS_FOLDERS [--workloads W1 W2 W3] [--peers NAME ...] [--quick]
                                 [--peer-python PYTHON] [--json]

W1: photographs in original sizes -> random resized crop 224 and flip, batch 64. W2: 32 px JPEGs as they are, batch 512. W3:
64 px JPEGs as they are, batch 256. All give shuffled uint8 batches with two threads or two worker processes. Each loader lives
in a process of its own; they are measured in turns, round by round, so that what else the machine does falls on all alike.
Peers that are not installed are left out by name; --peer-python names an interpreter that has those which this one lacks.
--quick takes about 8 minutes. Writes benchmarks/results/loaders.json.
"""

import argparse
import datetime
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
SETTLE_BATCHES = 8  # made before the clock starts: what a loader has fetched ahead is not counted
WORKLOADS = {  # height and width of a batch's pictures, batch size, what is done
    "W1": (224, 64, "random resized crop and flip"),
    "W2": (32, 512, "as they are"),
    "W3": (64, 256, "as they are"),
}
PEERS = {  # module that must be there
    "torchvision": "torchvision", "webdataset": "webdataset", "streaming": "streaming", "litdata": "litdata",
    "dali": "nvidia.dali", "ffcv": "ffcv", "ffcv, raw": "ffcv", "ffcv, 500 px": "ffcv", "tf.data": "tensorflow",
}  # fmt: skip
ONLY = {"ffcv, raw": ("W2", "W3"), "ffcv, 500 px": ("W1",)}  # others are measured on every workload
OURS = {  # what each variant is measured on
    "dist_train": ("W1", "W2", "W3"), "dist_train, wheels only": ("W1", "W2", "W3"), "dist_train, cached": ("W2", "W3"),
    "dist_train, shards of 500 px": ("W1",),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="photographs: a tar or a folder of JPEGs (W1, W3)")
    parser.add_argument("--cifar", type=Path, help="class folders of 32 px JPEGs (W2, conversion)")
    parser.add_argument("--workloads", "--workload", nargs="+", choices=[*WORKLOADS, "conversion"],
                        default=[*WORKLOADS, "conversion"])  # fmt: skip
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter for peers that this one has not got")
    parser.add_argument("--quick", action="store_true", help="--rounds 3 --seconds 1 --small 20000, two conversions")
    parser.add_argument("--small", type=int, default=100_000, help="pictures of W3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/dist_train-loaders"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/loaders.json"))
    parser.add_argument("--json", action="store_true", help="the last line is the results as one JSON object")
    parser.add_argument("--serve", nargs=3, metavar=("LOADER", "WORKLOAD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], options.serve[1], Path(options.serve[2]), options.seconds)
        return
    if options.quick:
        options.rounds, options.seconds, options.small = 3, 1.0, 20_000
    missing = [name for name in options.peers if not python_of(name, options)]
    peers = [name for name in options.peers if name not in missing]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    results = about(options) | {"left_out": missing, "workloads": {}}
    for workload in options.workloads:
        if workload == "conversion":
            results["conversion"] = measure_conversion(options)
            continue
        source = prepare_pictures(workload, options)
        names = [
            *(name for name, on in OURS.items() if workload in on),
            *(p for p in peers if workload in ONLY.get(p, workload)),
        ]
        results["workloads"][workload] = measure(workload, names, source, options)
        show(workload, results["workloads"][workload])
    Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    if options.json:
        print(json.dumps(results))


def measure(workload: str, names: list[str], source: Path, options) -> dict:
    """Medians and spreads of the loaders on a workload, taken in turns."""
    size, batch_size, what = WORKLOADS[workload]
    children, opened, rates, failed = {}, {}, {}, {}
    for name in names:
        python = python_of(name, options) or sys.executable
        command = [python, __file__, "--serve", name, workload, str(source), "--seconds", str(options.seconds)]
        log = open(options.scratch / f"{workload}-{name}.log", "w")
        children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        answer = children[name].stdout.readline()  # one after the other: a start is not to be disturbed by another
        if answer:
            opened[name], rates[name] = json.loads(answer), []
        else:
            failed[name] = Path(log.name).read_text().strip().splitlines()[-1:]
            print(f"{workload}, {name}: does not run: {' '.join(failed[name])}")
    for _ in range(options.rounds):
        for name in rates:
            children[name].stdin.write("go\n")
            children[name].stdin.flush()
            rates[name].append(json.loads(children[name].stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.terminate()
        child.wait()
    return {
        "what": f"{what}, {size} px, batch {batch_size}",
        "pictures": len(list(source.glob("folders/*/*.jpg"))),
        "failed": failed,
        "loaders": {
            name: described(values, rates.get("torchvision")) | {"first_batch_s": round(opened[name]["first_batch_s"], 3)}
            for name, values in rates.items()
        },
    }  # fmt: skip


def described(rates: list, others: list | None) -> dict:
    """rates: (images a second, images a second of processor time) of each round; others: those of ImageFolder."""
    values, per_cpu = zip(*rates, strict=True)
    wall, cpu = zip(*others, strict=True) if others else (None, None)
    return {
        "images_per_s": round(statistics.median(values)), "lowest": round(min(values)), "highest": round(max(values)),
        "images_per_cpu_s": round(statistics.median(per_cpu)), "n": len(values),
        "per_imagefolder": ratio(values, wall), "per_imagefolder_cpu": ratio(per_cpu, cpu),
    }  # fmt: skip


def ratio(values: list[float], others: list[float] | None) -> float | None:
    """Median of the rounds' own ratios: what slowed a whole round down is not in it."""
    return round(statistics.median(a / b for a, b in zip(values, others, strict=True)), 2) if others else None


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
        for _ in itertools.islice(batches, SETTLE_BATCHES):
            pass
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
                .to_tuple("jpg", "cls").map_tuple(transform, int).batched(batch_size, partial=False))  # fmt: skip
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
    pictures = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).map(load, WORKERS)
    for batch in pictures.batch(batch_size, drop_remainder=True).prefetch(2).repeat().as_numpy_iterator():
        yield torch.from_numpy(batch)


def _picture(payload: bytes, transform):
    from PIL import Image

    return transform(Image.open(io.BytesIO(payload)).convert("RGB"))


# ---- Pictures --------------------------------------------------------------------------------------------------------


def prepare_pictures(workload: str, options) -> Path:
    """The workload's class folders and shards below the scratch folder, made once."""
    folder = options.scratch / (f"{workload}-{options.small}" if workload == "W3" else workload)
    if not (folder / "shards/index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        {"W1": _photographs, "W2": _cifar, "W3": _small}[workload](folder / "folders", options)
        convert(folder / "folders", folder / "shards")
        if workload == "W1":
            convert(folder / "folders", folder / "shards-500", "--resize", "500")
    return folder


def _photographs(into: Path, options) -> None:
    """At least 1,000 files: what there is, again under other names."""
    payloads = list(jpegs(asked_for(options.images, "--images")))
    for k, payload in enumerate(itertools.islice(itertools.cycle(payloads), max(1000, len(payloads)))):
        write(into / "ab"[k % 2] / f"{k:06d}.jpg", payload)


def _cifar(into: Path, options) -> None:
    source = asked_for(options.cifar, "--cifar")
    source = source / "train" if (source / "train").is_dir() else source
    shutil.copytree(source, into)


def _small(into: Path, options) -> None:
    """Squares drawn from the photographs, 64 px, JPEG of quality 90; the same ones each time."""
    from PIL import Image

    payloads, rng = list(jpegs(asked_for(options.images, "--images"))), np.random.default_rng(0)
    for k, payload in enumerate(payloads):
        picture = Image.open(io.BytesIO(payload)).convert("RGB")
        for n in range(-(-options.small // len(payloads))):
            side = int(min(picture.size) * rng.uniform(0.4, 1))
            left, top = (int(rng.uniform(0, room - side + 1)) for room in picture.size)
            small = picture.resize(
                (64, 64), Image.Resampling.BILINEAR, (left, top, left + side, top + side), reducing_gap=2
            )
            file = io.BytesIO()
            small.save(file, "JPEG", quality=90)
            write(into / "ab"[k % 2] / f"{k:04d}-{n:03d}.jpg", file.getvalue())


def jpegs(source: Path):
    """The JPEGs in a tar or below a folder, in the order of their names."""
    if source.is_dir():
        yield from (path.read_bytes() for path in sorted(source.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg"))
        return
    with tarfile.open(source) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                yield tar.extractfile(member).read()


def labelled(folder: Path) -> list[tuple[Path, int]]:
    """The pictures of the class folders, in an order drawn once, and their class numbers."""
    classes = sorted(path.name for path in (folder / "folders").iterdir())
    paths = sorted((folder / "folders").glob("*/*.jpg"), key=lambda path: hashlib.md5(str(path).encode()).digest())
    return [(path, classes.index(path.parent.name)) for path in paths]


def write(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


def asked_for(path: Path | None, option: str) -> Path:
    if path is None or not path.exists():
        sys.exit(
            f"loaders.py: {option} is {path}; expected pictures for this workload.\n  Name them, or leave the workload out."
        )
    return path


# ---- Conversion ------------------------------------------------------------------------------------------------------


def convert(folder: Path, out: Path, *more: str) -> None:
    command = [sys.executable, "-m", "dist_train", "shard", "--source", "folder", "--path", str(folder), "--out", str(out),
               "--split.val", "0", "--split.test", "0", "--workers", str(WORKERS), "--overwrite", "true", *more]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def measure_conversion(options) -> dict:
    """Seconds to make tars of the CIFAR files: `dist-train shard`, start to end, beside webdataset's ShardWriter."""
    options.scratch.mkdir(parents=True, exist_ok=True)
    source, scratch = asked_for(options.cifar, "--cifar"), options.scratch / "converted"
    seconds = {"dist_train": [], "webdataset": []}
    for path in source.rglob("*.jpg"):
        path.read_bytes()  # whoever came first would otherwise wait for the disk
    for _ in range(2 if options.quick else options.rounds):
        for name, work in (("dist_train", convert), ("webdataset", _shard_writer)):
            shutil.rmtree(scratch, ignore_errors=True)
            began = time.perf_counter()
            work(source, scratch)
            seconds[name].append(time.perf_counter() - began)
    shutil.rmtree(scratch)
    files = sum(1 for _ in source.rglob("*.jpg"))
    found = {name: {"seconds": round(statistics.median(values), 2), "lowest": round(min(values), 2),
                    "highest": round(max(values), 2), "n": len(values)} for name, values in seconds.items()}  # fmt: skip
    times = ratio(seconds["webdataset"], seconds["dist_train"])
    print(f"conversion of {files:,} files: {found['dist_train']['seconds']} s, webdataset's ShardWriter "
          f"{found['webdataset']['seconds']} s: {times} times as fast")  # fmt: skip
    return {"files": files, "times_as_fast": times, **found}


def _shard_writer(source: Path, out: Path) -> None:
    import webdataset as wds

    out.mkdir()
    paths = sorted(source.rglob("*.jpg"))
    classes = {name: k for k, name in enumerate(sorted({path.parent.name for path in paths}))}
    with wds.ShardWriter(f"{out}/%06d.tar", maxcount=10_000, verbose=0) as writer:
        for k, path in enumerate(paths):
            writer.write({"__key__": f"{k:08d}", "jpg": path.read_bytes(), "cls": classes[path.parent.name]})


# ---- The record ------------------------------------------------------------------------------------------------------


def about(options) -> dict:
    sys.path.insert(0, str(ROOT))
    from dist_train.decode import decoders

    packages = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "webdataset", "mosaicml-streaming", "litdata",
                "nvidia-dali-cuda120", "ffcv", "tensorflow", "tensorflow-cpu")  # fmt: skip
    versions = {}
    for package in packages:
        here, there = installed_version(sys.executable, package), installed_version(options.peer_python, package)
        if here or there:
            versions[package] = here if here == there or not there else f"{here}, peers {there}" if here else there
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "what": "images a second of shuffled uint8 batches, two threads or worker processes; medians over rounds in turns",
        "date": datetime.date.today().isoformat(), "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2), "python": platform.python_version(), "packages": versions,
        "decoders": decoders(), "rounds": options.rounds, "seconds": options.seconds,
    }  # fmt: skip


def python_of(name: str, options) -> str | None:
    """The interpreter that has what a loader needs; None where neither has."""
    module = PEERS.get(name, "torch")
    return next((python for python in (sys.executable, options.peer_python) if has_module(python, module)), None)


@functools.cache
def has_module(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


@functools.cache
def installed_version(python: str, package: str) -> str | None:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    answer = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return answer.stdout.strip() or None


def show(workload: str, found: dict) -> None:
    print(f"\n{workload}: {found['what']}; {found['pictures']:,} pictures")
    heads = ("images/s", "lowest", "highest", "a cpu s", "/ImageFolder", "by cpu time", "first batch")
    print(" " * 30 + "".join(f"{head:>14}" for head in heads))
    keys = (
        "images_per_s",
        "lowest",
        "highest",
        "images_per_cpu_s",
        "per_imagefolder",
        "per_imagefolder_cpu",
        "first_batch_s",
    )
    for name, row in sorted(found["loaders"].items(), key=lambda item: -item[1]["images_per_s"]):
        print(
            f"{name:30}" + "".join(f"{row[key]:>14,}" if row[key] is not None else " " * 14 for key in keys), flush=True
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
