"""A run's network as a file for use elsewhere: safetensors, ONNX or torch.export; proven on a split before it is kept."""

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import __version__
from dist_train.augment import evaluation_pixels
from dist_train.config import ModelConfig, RunConfig, conflicts
from dist_train.data import open_evaluation
from dist_train.durable import put_in_place
from dist_train.errors import UserError
from dist_train.evaluate import standardised
from dist_train.folds import fold_view
from dist_train.index import ShardIndex, load_index
from dist_train.models import build_model
from dist_train.predict import Trained, check_fits, load_run
from dist_train.pretrained import put_weights
from dist_train.runtime import write_json
from dist_train.settings import from_dict, read_config, to_dict

FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "torch-export": "model.pt2"}
TOLERANCE = 1e-3  # of the largest logit; sums in another order differ by 1e-6 of it in a VGG, by 6e-5 in a ViT
MAX_CHANGED = 1e-3  # of the predictions: within that tolerance only classes as good as equal can change places
MAX_PROTOBUF = 2**31 - 2**24  # bytes; larger ONNX files keep their weights in a second one


def main(argv: list[str]) -> None:
    """`dist-train export RUN --to FORMAT [--out DIR] [--split test]`; the last line is a JSON object."""
    parser = argparse.ArgumentParser(
        prog="dist-train export",
        description="The best weights of a run as a file for use elsewhere, proven on a split.",
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--to", required=True, choices=FILES, help="format of the file")
    parser.add_argument("--out", help="folder of the file and its description; default RUN/export")
    parser.add_argument(
        "--split", default="test", help="split that the file must classify as the run does; default test"
    )
    options, overrides = parser.parse_known_args(argv)
    out = Path(options.out or Path(options.run, "export"))
    about = export(options.run, options.to, out, options.split, overrides)
    print(f"{out / about['file']}, described in {about['file']}.json")
    print(json.dumps(about["check"]))


def export(run: str | Path, kind: str, out: Path, split: str = "test", overrides: list[str] = ()) -> dict:
    """Write a run's best weights to out, with a description beside them, and return the description.

    kind: a key of FILES. overrides: settings that change no result, such as ["--data.shards", "elsewhere"]. The file
    is loaded again and classifies the split; files that differ from the network are not kept. Raises UserError then,
    and where the run, the split or a package is missing.
    """
    _need_packages(kind)
    trained = load_run(run)
    config = read_config(RunConfig, list(overrides), "dist-train export", [str(trained.folder / "config.yaml")])
    if changed := conflicts(to_dict(trained.config), to_dict(config)):
        raise UserError(f"{run}: the network is exported as it was trained; these settings would change it:\n  "
                        + "\n  ".join(changed))  # fmt: skip
    index = fold_view(load_index(config.data.shards, config.data.cache_dir, config.data.cache_gb), config)
    index.split(split)
    check_fits(index, trained)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    input_size = index.image_size or trained.image_size
    about = describe(trained, kind, input_size)
    made_folder = not out.is_dir()
    partial = out / f"{about['file']}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(partial / about["file"], kind, trained, input_size, about)
        about["check"] = compare(trained, config, index, split, load_exported(partial / about["file"]))
        write_json(partial / f"{about['file']}.json", about)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == about["file"]):  # the model itself at last
            put_in_place(file, out / file.name)
    except OSError as error:
        raise UserError(f"{out}: the file cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made_folder and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return about


class Deployed(nn.Module):
    """A network with its preprocessing: what the shards hold in, logits out.

    mean, std: per channel of pixels in 0..1, or per column of a table. size: (height, width) that enters the network;
    None for tables.
    """

    def __init__(self, network: nn.Module, mean: list[float], std: list[float], size: tuple[int, int] | None):
        super().__init__()
        self.network, self.size = network, size
        shape = (1, -1, 1, 1) if size else (1, -1)
        self.register_buffer("mean", torch.tensor(mean).view(shape))
        self.register_buffer("std", torch.tensor(std).view(shape))
        self.eval()

    def forward(self, values: Tensor) -> Tensor:
        """values: uint8 (N, 3, H, W), or float32 (N, F) of a table. Returns float32 logits (N, K)."""
        if self.size:
            values = values.to(torch.float32) / 255
            if tuple(values.shape[2:]) != self.size:
                values = F.interpolate(values, self.size, mode="bilinear", antialias=True, align_corners=False)
        return self.network((values - self.mean) / self.std)


def describe(trained: Trained, kind: str, input_size: tuple[int, int] | None) -> dict:
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
                      "values": "raw" if is_graph else "standardised"},
            "preprocessing": {"standardise": {"rule": "(value - mean) / std", "mean": trained.mean, "std": trained.std,
                                              "is_in_the_file": is_graph}},
        }  # fmt: skip
    height, width = input_size if is_graph else trained.image_size
    crops = trained.eval_crop and not trained.one_size
    shorter = round(height / trained.eval_crop) if crops else None
    shift = trained.config.train.shift_test
    rule = (
        f"shorter side to {shorter} px, then the central {height} x {width} px"
        if crops
        else f"the whole picture to {height} x {width} px (height x width), whatever its aspect"
    )
    return about | {
        "input": {"name": "pictures", "dtype": "uint8" if is_graph else "float32", "shape": ["batch", 3, height, width],
                  "values": "RGB, 0 to 255" if is_graph else "RGB, normalised"},
        "preprocessing": {
            "resize": {"rule": rule, "shorter_side": shorter, "size": [height, width], "interpolation": "bilinear, antialiased",
                       "is_in_the_file": False},
            "normalise": {"rule": "(value / 255 - mean) / std", "mean": trained.mean, "std": trained.std,
                          "is_in_the_file": is_graph},
        },
        "network_size": list(trained.image_size),
        "flip_test": "not in the file; the run's own figures average each picture with its mirror image"
                     if trained.config.train.flip_test else "not used",
        "shift_test": f"not in the file; the run's own figures average each picture with itself moved by {shift} px both ways"
                      if shift else "not used",
    }  # fmt: skip


def write_model(path: Path, kind: str, trained: Trained, input_size: tuple[int, int] | None, about: dict) -> None:
    """Write the file of one format, with the description inside it. input_size: see `describe`."""
    about = json.dumps(about)
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file({k: t.contiguous() for k, t in trained.network.state_dict().items()}, path, {"dist_train": about})
        return
    from torch.export import Dim
    from torch.export import export as trace

    module = Deployed(trained.network, trained.mean, trained.std, trained.image_size)
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
    network = build_model(model, len(about["classes"]), size, columns and len(columns), 0)
    put_weights(network, weights)
    return Deployed(network, rule["mean"], rule["std"], size)


@torch.no_grad()
def compare(trained: Trained, config: RunConfig, index: ShardIndex, split: str, exported: Callable) -> dict:
    """Classify a split with the run's network and with an exported file; return the figures of both.

    On the CPU in float32, whatever the run was trained in, and without the further views of train.flip_test and
    train.shift_test. Raises UserError if the logits differ by more than TOLERANCE, or more predictions than MAX_CHANGED.
    """
    data = config.data
    batches = open_evaluation(
        index, split, data.global_batch_size, data.image_size, trained.eval_crop, data.threads, (0, 1), data.prefetch_mb,
        data.verify,
    )  # fmt: skip
    labels, ours, theirs = [], [], []
    for batch in batches:
        alone = [1] if not labels and len(batch) > 1 else []  # a batch of one is where a traced shape would show
        ours.append(_logits(trained, batch.images))
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
        "split": split, "samples": len(labels), "top1_run": float((ours.argmax(1) == labels).float().mean()),
        "top1_file": float((theirs.argmax(1) == labels).float().mean()), "changed_predictions": changed,
        "largest_logit_difference": difference, "largest_logit": largest,
    }  # fmt: skip


def _logits(trained: Trained, values: Tensor) -> Tensor:
    """What evaluation computes, by its own functions, not by those of the exported graph."""
    if trained.features is not None:
        return trained.network(standardised(values, trained))
    return trained.network(evaluation_pixels(values, trained.image_size, trained.mean, trained.std))


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch's threads want the cores as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: torch.from_numpy(session.run(None, {name: values.contiguous().numpy()})[0])


def _need_packages(kind: str) -> None:
    missing = [
        package for package in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(package) is None
    ]
    if kind == "onnx" and missing:
        raise UserError(f"export to onnx: {' and '.join(missing)} cannot be imported.\n"
                        f"  Install what it needs with: pip install 'dist_train[export]'")  # fmt: skip
