"""A run's network as a file for use elsewhere: safetensors, ONNX or torch.export; proven on a split before it is kept."""

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train import __version__
from dist_train.augment import resize
from dist_train.checkpoint import write_tensors
from dist_train.config import ModelConfig, RunConfig, conflicts
from dist_train.data import open_evaluation
from dist_train.durable import put_in_place, replace_json
from dist_train.errors import UserError
from dist_train.evaluate import central_pixels, centred, standardised, views
from dist_train.folds import fold_view
from dist_train.index import ShardIndex, load_index
from dist_train.models import build_model
from dist_train.predict import Trained, check_fits, load_run, usual_split
from dist_train.pretrained import put_weights
from dist_train.settings import from_dict, read_config, to_dict

FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "torch-export": "model.pt2"}
Seen = tuple[bool, int]  # whether mirror images are seen too, and pictures moved by how many pixels: see `evaluate.views`
TOLERANCE = 1e-3  # of the largest logit; sums in another order differ by 1e-6 of it in a VGG, by 6e-5 in a ViT
MAX_CHANGED = 1e-3  # of the predictions: within that tolerance only classes as good as equal can change places
MAX_PROTOBUF = 2**31 - 2**24  # bytes; larger ONNX files keep their weights in a second one
_STANDARDISE = "(value - mean) / std, and 0 where the value is missing (NaN)"


def main(argv: list[str]) -> None:
    """`dist-train export RUN --to FORMAT [--out DIR] [--split test] [--views all]`; the last line is a JSON object."""
    parser = argparse.ArgumentParser(
        prog="dist-train export",
        description="The best weights of a run as a file for use elsewhere, proven on a split.",
        epilog="Other options are those of dist-train train, such as --data.shards OTHER.",
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--to", required=True, choices=FILES, help="format of the file")
    parser.add_argument("--out", help="folder of the file and its description; default RUN/export")
    parser.add_argument(
        "--split", help="split that the file must classify as the run does; default test, or where there is none data.val_split, "
             "or data.train_split"
    )
    parser.add_argument(
        "--views", choices=("all", "one"), default="all",
        help="all: what train.flip_test and train.shift_test average over, so that the file has the run's accuracy; one: the "
             "picture alone, one pass through the network in place of 2, 3 or 6; default all",
    )  # fmt: skip
    options, overrides = parser.parse_known_args(argv)
    out = Path(options.out or Path(options.run, "export"))
    about = export(options.run, options.to, out, options.split, overrides, options.views)
    print(f"{out / about['file']}, described in {about['file']}.json")
    print(told(about["check"]))
    print(json.dumps(about["check"]))


def told(check: dict) -> str:
    """The figures of `compare` in a sentence."""
    samples, changed = check["samples"], check["changed_predictions"]
    run = "" if check["top1_run"] == check["top1_file"] else f" {check['top1_run']:.2%}"
    return (f"{samples:,} {check['split']} {'sample' if samples == 1 else 'samples'} through the file: top-1 "
            f"{check['top1_file']:.2%}, {'that of' if run else 'as'} the run's network{run}; "
            f"{f'{changed:,}' if changed else 'no'} {'prediction differs' if changed <= 1 else 'predictions differ'}; "
            f"logits differ by {check['largest_logit_difference']:.2g} at most")  # fmt: skip


def export(
    run: str | Path, kind: str, out: Path, split: str | None = None, overrides: list[str] = (), which_views: str = "all"
) -> dict:
    """Write a run's best weights to out, with a description beside them, and return the description.

    kind: a key of FILES. split: default `usual_split`. overrides: settings that change no result, such as ["--data.shards",
    "elsewhere"]. which_views: "all" that the run was evaluated on, or "one", the picture alone. The file is loaded again and
    classifies the split; files that differ from the network are not kept. Raises UserError then, and where the run, the split or a
    package is missing. A top1 other than that in result.json is told on stderr.
    """
    _need_packages(kind)
    trained = load_run(run)
    config = read_config(RunConfig, list(overrides), "dist-train export", [str(trained.folder / "config.yaml")])
    if changed := conflicts(to_dict(trained.config), to_dict(config)):
        raise UserError(f"{run}: the network is exported as it was trained; these settings would change it:\n  "
                        + "\n  ".join(changed))  # fmt: skip
    index = fold_view(load_index(config.data.shards, config.data.cache_dir, config.data.cache_gb), config)
    split = split or usual_split(index, config) or config.data.train_split
    index.split(split)
    check_fits(index, trained)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    input_size = index.image_size or trained.image_size
    seen = _views_of(trained) if which_views == "all" else (False, 0)
    about = describe(trained, kind, input_size, seen)
    made_folder = not out.is_dir()
    partial = out / f"{about['file']}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(partial / about["file"], kind, trained, input_size, seen, about)
        about["check"] = compare(trained, config, index, split, load_exported(partial / about["file"]), seen)
        replace_json(partial / f"{about['file']}.json", about)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == about["file"]):  # the model itself at last
            put_in_place(file, out / file.name)
    except OSError as error:
        raise UserError(f"{out}: the file cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made_folder and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    _tell_of_another_top1(trained, about["check"], seen)
    return about


class Deployed(nn.Module):
    """A network with its preprocessing: what the shards hold in, logits out.

    mean, std: per channel of pixels in 0..1, or per column of a table. size: (height, width) that enters the network;
    None for tables. seen: (False, 0) for the picture alone. crop: share of larger pictures that is seen, 0 for all of them.
    interpolation: how they are resized.
    """

    def __init__(
        self, network: nn.Module, mean: list[float], std: list[float], size: tuple[int, int] | None, seen: Seen = (False, 0),
        crop: float = 0.0, interpolation: str = "bilinear",
    ):  # fmt: skip
        super().__init__()
        self.network, self.size, self.seen, self.crop, self.interpolation = network, size, seen, crop, interpolation
        shape = (1, -1, 1, 1) if size else (1, -1)
        self.register_buffer("mean", torch.tensor(mean).view(shape))
        self.register_buffer("std", torch.tensor(std).view(shape))
        self.eval()

    def forward(self, values: Tensor) -> Tensor:
        """values: uint8 (N, 3, H, W), or float32 (N, F) of a table, NaN where missing. Returns float32 logits (N, K)."""
        if self.size:
            values = values.to(torch.float32) / 255
            whole, (top, left) = centred(tuple(values.shape[2:]), self.size, self.crop)
            if tuple(values.shape[2:]) != whole:
                values = resize(values, whole, self.interpolation)
            if whole != self.size:
                values = values[:, :, top : top + self.size[0], left : left + self.size[1]]
        normalised = (values - self.mean) / self.std
        values = normalised if self.size else normalised.masked_fill(values.isnan(), 0)
        if _num_views(self.seen) == 1:
            return self.network(values)
        weights, pictures = zip(*views(values, *self.seen), strict=True)
        # one pass: the graph holds the network once, and the classifier's weights are read once for all views
        logits = self.network(torch.cat(pictures)).unflatten(0, (len(weights), -1))
        return sum(weight * view for weight, view in zip(weights, logits.unbind(), strict=True))


def describe(trained: Trained, kind: str, input_size: tuple[int, int] | None, seen: Seen) -> dict:
    """All that a user of the file needs to know, JSON values. input_size: (height, width) of what the graph takes."""
    is_graph = kind != "safetensors"
    about = {
        "file": FILES[kind], "format": kind, "run": trained.folder.resolve().name, "classes": trained.classes,
        "model": to_dict(trained.config.model) | {"pretrained": ""},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(trained.classes)]},
        "made_with": {"dist_train": __version__, "torch": torch.__version__},
    }  # fmt: skip
    if trained.features is not None:
        shape = ["batch", len(trained.features)]
        return about | {
            "input": {"name": "rows", "dtype": "float32", "shape": shape, "columns": trained.features,
                      "values": "raw" if is_graph else "standardised",
                      "texts": "a column COLUMN=TEXT that the table lacks is 1 where its column COLUMN is TEXT, else 0"},
            "preprocessing": {"standardise": {"rule": _STANDARDISE, "mean": trained.mean, "std": trained.std,
                                              "is_in_the_file": is_graph}},
        }  # fmt: skip
    size, crop = trained.image_size, trained.eval_crop
    height, width = input_size if is_graph else size
    whole, _ = centred((height, width), size, crop)  # what the graph cuts, if it takes more than enters the network
    cuts = is_graph and whole != size
    shorter = (min(height, width) if cuts else round(height / crop)) if crop else None
    flipped, shift = seen
    rule = (
        f"shorter side to {shorter} px, then the central {height} x {width} px"
        if crop and (height == width or not cuts)
        else f"the least size of the same aspect that covers {height} x {width} px (height x width), then its central part of that"
        if crop
        else f"the whole picture to {height} x {width} px (height x width), whatever its aspect"
    )
    inside = {"rule": f"to {whole[0]} x {whole[1]} px, then the central {size[0]} x {size[1]} px", "is_in_the_file": True}
    return about | {
        "input": {"name": "pictures", "dtype": "uint8" if is_graph else "float32", "shape": ["batch", 3, height, width],
                  "values": "RGB, 0 to 255" if is_graph else "RGB, normalised"},
        "preprocessing": {
            "resize": {"rule": rule, "shorter_side": shorter, "size": [height, width],
                       "interpolation": f"{trained.config.data.interpolation}, antialiased", "is_in_the_file": False},
            **({"crop": inside} if cuts else {}),
            "normalise": {"rule": "(value / 255 - mean) / std", "mean": trained.mean, "std": trained.std,
                          "is_in_the_file": is_graph},
            "views": {"rule": _views_rule(seen), "flip": flipped, "shift": shift, "count": _num_views(seen),
                      "count_of_the_run": _num_views(_views_of(trained)), "is_in_the_file": is_graph},
        },
        "network_size": list(trained.network_size),
    }  # fmt: skip


def _views_of(trained: Trained) -> Seen:
    """What the run's own figures are a mean over; a table's rows are seen once."""
    settings = trained.config.train
    return (settings.flip_test, settings.shift_test) if trained.features is None else (False, 0)


def _num_views(seen: Seen) -> int:
    flipped, shift = seen
    return (1 + flipped) * (3 if shift else 1)


def _views_rule(seen: Seen) -> str:
    """The views of `evaluate.views` in words, for who has the weights alone."""
    flipped, shift = seen
    if _num_views(seen) == 1:
        return "logits of the normalised picture alone"
    moved = (
        f"the normalised picture (1/2), it moved {shift} px up and {shift} px left (1/4), and as far down and right (1/4), "
        "where what is uncovered is 0"
        if shift
        else "the normalised picture"
    )
    mirrored = ", each shared evenly with its mirror image (left to right)" if flipped else ""
    return f"weighted mean of the logits of {moved}{mirrored}"


def write_model(path: Path, kind: str, trained: Trained, input_size: tuple[int, int] | None, seen: Seen, about: dict) -> None:
    """Write the file of one format, with the description inside it. input_size: see `describe`."""
    about = json.dumps(about)
    if kind == "safetensors":
        write_tensors(path, {k: t.contiguous() for k, t in trained.network.state_dict().items()}, {"dist_train": about})
        return
    from torch.export import Dim
    from torch.export import export as trace

    how = trained.config.data.interpolation
    module = Deployed(trained.network, trained.mean, trained.std, trained.image_size, seen, trained.eval_crop, how)
    if trained.features is None:
        name, example = "pictures", torch.zeros(2, 3, *input_size, dtype=torch.uint8)
    else:
        name, example = "rows", torch.zeros(2, len(trained.features))
    with torch.no_grad():
        graph = trace(module, (example,), dynamic_shapes=({0: Dim("batch")},))
    if kind == "torch-export":
        torch.export.save(graph, path, extra_files={"dist_train.json": about})
        return
    program = torch.onnx.export(
        graph, dynamo=True, verbose=False, input_names=[name], output_names=["logits"], dynamic_shapes=({0: "batch"},)
    )
    program.model.metadata_props["dist_train"] = about
    num_bytes = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    program.save(path, external_data=num_bytes > MAX_PROTOBUF)


def load_exported(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from what the shards hold (uint8 (N, 3, H, W), or float32 (N, F)) to logits (N, K), from the file alone."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if path.suffix == ".onnx":
        return _load_onnx(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dist_train"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (rule,) = (r for r in about["preprocessing"].values() if "mean" in r)
    columns = about["input"].get("columns")
    size = None if columns else tuple(about["input"]["shape"][2:])
    model = from_dict(ModelConfig, about["model"])
    built_for = None if columns else tuple(about.get("network_size", size))
    network = build_model(model, len(about["classes"]), built_for, columns and len(columns), 0)
    put_weights(network, weights)
    seen = about["preprocessing"].get("views", {"flip": False, "shift": 0})  # tables have none, nor had files of before
    resizing = about["preprocessing"].get("resize", {})
    shorter, how = resizing.get("shorter_side"), resizing.get("interpolation", "bilinear").partition(",")[0]
    crop = size[0] / shorter if shorter else 0.0
    return Deployed(network, rule["mean"], rule["std"], size, (seen["flip"], seen["shift"]), crop, how)


@torch.no_grad()
def compare(trained: Trained, config: RunConfig, index: ShardIndex, split: str, exported: Callable, seen: Seen) -> dict:
    """Classify a split with the run's network and with an exported file; return the figures of both, and result.json's.

    On the CPU in float32, whatever the run was trained in. seen: the views of both. Raises UserError if the logits differ
    by more than TOLERANCE, or more predictions than MAX_CHANGED.
    """
    data = config.data
    batch_size = max(1, data.global_batch_size // _num_views(seen))  # the file takes all views of a batch at once
    batches = open_evaluation(
        index, split, batch_size, data.side_evaluated, trained.eval_crop, data.threads, (0, 1), data.prefetch_mb,
        data.verify, interpolation=data.interpolation,
    )  # fmt: skip
    labels, ours, theirs = [], [], []
    for batch in batches:
        alone = [1] if not labels and len(batch) > 1 else []  # a batch of one is where a traced shape would show
        ours.append(_logits(trained, batch.images, seen))
        theirs += [exported(part) for part in batch.images.tensor_split(alone)]
        labels.append(batch.labels)
    labels, ours, theirs = torch.cat(labels), torch.cat(ours), torch.cat(theirs)
    changed = int((ours.argmax(1) != theirs.argmax(1)).sum())
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not difference <= TOLERANCE * largest or changed > MAX_CHANGED * len(labels):
        raise UserError(f"{trained.folder}: the exported file does not compute what the network does: on {split} its logits "
                        f"differ by up to {difference:.3g}, where the largest is {largest:.3g}, and {changed:,} of "
                        f"{len(labels):,} predictions change.\n  It was not kept. Try another --to.")  # fmt: skip
    return {
        "split": split, "samples": len(labels), "top1_run": _top1(ours, labels),
        "top1_file": _top1(theirs, labels),
        "top1_result": _written_top1(trained, index, split), "changed_predictions": changed,
        "largest_logit_difference": difference, "largest_logit": largest,
    }  # fmt: skip


def _top1(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(1) == labels).sum()) / len(labels)  # as `metrics.Sums` has it: a float32 mean has other digits


def _logits(trained: Trained, values: Tensor, seen: Seen) -> Tensor:
    """What evaluation computes, by its own functions and a view at a time, not by those of the exported graph."""
    if trained.features is not None:
        return trained.network(standardised(values, trained))
    how = trained.config.data.interpolation
    pictures = central_pixels(values, trained.image_size, trained.mean, trained.std, trained.eval_crop, how)
    return sum(weight * trained.network(view) for weight, view in views(pictures, *seen))


def _written_top1(trained: Trained, index: ShardIndex, split: str) -> float | None:
    """The split's top1 in result.json; None where there is none, or it is another set's."""
    try:
        figures = json.loads((trained.folder / "result.json").read_text())[split]
        evaluation = json.loads((trained.folder / f"evaluation-{split}.json").read_text())
        here = index.split(split)
        is_same = figures["samples"] == here.num_samples and evaluation["fingerprint"] == here.fingerprint()
        return figures["top1"] if is_same else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _tell_of_another_top1(trained: Trained, check: dict, seen: Seen) -> None:
    written, file = check["top1_result"], check["top1_file"]
    if written is None or abs(written - file) <= MAX_CHANGED:
        return
    count, precision = _num_views(_views_of(trained)), trained.config.train.precision
    why = "The weights or the version of dist_train are not those of the run's end: compare with dist-train eval."
    if _num_views(seen) < count:
        why = f"The file sees each picture once, the run's figure is a mean over {count} views: leave out --views one for it."
    elif precision != "fp32":
        why = f"The run computed in {precision}, the file does in fp32: compare with dist-train eval --train.precision fp32."
    print(f"{trained.folder}: on {check['split']} the file's top1 is {file:.4f}, that in result.json {written:.4f}.\n  {why}",
          file=sys.stderr)  # fmt: skip


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch's threads want the cores as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: torch.from_numpy(session.run(None, {name: values.contiguous().numpy()})[0])


def _need_packages(kind: str) -> None:
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(package) is None]
    if kind == "onnx" and missing:
        raise UserError(f"export to onnx: {' and '.join(missing)} cannot be imported.\n"
                        f"  Install what it needs with: pip install 'dist_train[export]'")  # fmt: skip
