"""The dist-train command: a table of functions imported when they are called; user errors in one line, exit code 2."""

import importlib
import sys

from dist_train.errors import UserError, did_you_mean, tell
from dist_train.streams import silence

COMMANDS = {
    "shard": ("dist_train.shard:main", "convert a dataset into tar shards and an index"),
    "verify": ("dist_train.verify:main", "check every byte of the shards and name what is wrong"),
    "inspect": ("dist_train.verify:inspect_main", "counts, classes, sizes, and a picture of samples per class"),
    "index": ("dist_train.foreign:main", "index WebDataset tars made by others, in place or behind URLs"),
    "plan": ("dist_train.plan:main", "print which samples each rank reads at which step"),
    "train": ("dist_train.train:run_training", "train a network from a recipe; resume with --resume"),
    "stop": ("dist_train.stop:main", "ask a training to write a checkpoint and end; --resume goes on"),
    "eval": ("dist_train.predict:eval_main", "figures of a run on a split, every sample counted once"),
    "predict": ("dist_train.predict:main", "classify picture files or folders with a run"),
    "export": ("dist_train.export:main", "a run's network as safetensors, ONNX or torch.export, proven on a split"),
    "study": ("dist_train.study:main", "many trainings of one recipe, to find better settings; k-fold"),
    "compare": ("dist_train.compare:main", "a table and bar pictures of several runs"),
    "augment-preview": ("dist_train.preview:main", "pictures as the network sees them, epoch after epoch"),
    "bench": ("dist_train.bench:main", "where the time goes: the parts of the feeding (bench data), of a step (bench step)"),
    "report": ("dist_train.report:main", "one HTML page about a run"),
    "doctor": ("dist_train.doctor:main", "what this machine has, lacks, and what costs speed"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        from dist_train import __version__

        print(f"dist_train {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"There are: {', '.join(COMMANDS)}.")
        print(f"dist-train: {name} is not a command. {hint}", file=sys.stderr)
        return 2
    module, function = COMMANDS[name][0].split(":")

    def command(argv: list[str]) -> int | None:
        return getattr(importlib.import_module(module), function)(argv)

    return run_command(command, argv[1:])


def run_command(command, argv: list[str]) -> int:
    """Call command(argv); a UserError becomes its message on stderr and its exit code, mostly 2."""
    try:
        return command(argv) or 0
    except (UserError, KeyboardInterrupt) as error:
        return tell(error)
    except BrokenPipeError:  # `dist-train plan | head`
        silence(sys.stdout)
        silence(sys.stderr)
        return 0


def _overview() -> str:
    lines = [f"  {name:15} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([
        "dist-train: a dataset into shards once, then image classifiers on any number of processes.", "",
        "usage: dist-train COMMAND ...          dist-train COMMAND --help", "", *lines, "",
        "On several processes: accelerate launch --config_file launch/accelerate/gpu-8.yaml -m dist_train.train --config RECIPE",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
