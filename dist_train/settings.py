"""Read a tree of frozen dataclasses from YAML files and the command line; every fault is named at once."""

import dataclasses
import shlex
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from dist_train.errors import UserError

_WRITTEN_ADVICE = "\n  Put back the settings the run was started with, or begin another run with --run."
# What settings are called elsewhere, where their own names do not lead there.
ALSO_CALLED = {
    "data.shards": "dataset data_dir data_path data_root",
    "data.val_split": "validation_split valid_split",
    "data.folds": "kfold kfolds cross_validation n_splits",
    "data.global_batch_size": "batch_size bs per_device_batch_size",
    "data.eval_crop": "crop_pct val_resize_size",
    "data.eval_size": "val_crop_size test_size",
    "data.image_size": "img_size imgsz input_size resolution crop_size",
    "data.interpolation": "train_interpolation resample",
    "data.threads": "workers num_workers",
    "data.prefetch_mb": "prefetch_factor",
    "augment.flip": "hflip",
    "augment.flip_vertical": "vflip",
    "augment.trivial": "trivial_augment trivialaugment ta_wide",
    "augment.rand_ops": "rand_augment randaugment",
    "augment.rand_magnitude": "ra_magnitude",
    "augment.rotate_degrees": "rotation",
    "augment.brightness": "jitter color_jitter colour_jitter",
    "augment.contrast": "jitter color_jitter colour_jitter",
    "augment.saturation": "jitter color_jitter colour_jitter",
    "augment.erase": "erasing random_erasing cutout reprob",
    "augment.start_size": "progressive_resizing",
    "model.name": "arch architecture backbone network net type",
    "model.pretrained": "weights model_path finetune",
    "model.dropout": "drop_rate",
    "model.drop_path": "drop_path_rate stochastic_depth_prob stochastic_depth",
    "model.hidden": "layers",
    "model.batchnorm": "batch_norm bn",
    "optim.name": "optimizer optimiser opt type",
    "optim.lr": "learning_rate",
    "optim.momentum": "beta1 betas",
    "optim.beta2": "betas",
    "optim.weight_decay": "wd l2",
    "optim.schedule": "sched scheduler lr_scheduler lr_schedule lr_decay learning_rate_scheduler",
    "optim.layer_decay": "llrd layerwise_lr_decay",
    "optim.freeze_epochs": "freeze_backbone freeze_layers",
    "optim.warmup_epochs": "warmup_steps warmup_iters warmup_ratio lr_warmup",
    "optim.final_lr": "min_lr lr_min eta_min lrf",
    "optim.step_epochs": "step_size lr_step decay_epochs",
    "optim.step_factor": "gamma lr_gamma decay_rate",
    "optim.class_weights": "balanced pos_weight reweight",
    "optim.clip_norm": "clip_grad grad_clip max_grad_norm gradient_clip gradient_clipping clip_grad_norm",
    "optim.ema_decay": "model_ema model_ema_steps model_ema_warmup weight_average",
    "train.max_steps": "steps num_steps total_steps max_iter iterations fast_dev_run",
    "train.precision": "amp fp16 bf16 fp32 half autocast dtype",
    "train.parallel": "strategy ddp fsdp distributed",
    "train.micro_batch_size": "accumulation_steps gradient_accumulation_steps accumulate_grad_batches grad_accum accum_iter",
    "train.eval_every_epochs": "eval_every eval_interval eval_freq eval_steps val_interval check_val_every_n_epoch",
    "train.monitor": "metric_for_best_model eval_metric",
    "train.patience": "early_stopping early_stop",
    "train.flip_test": "tta",
    "train.shift_test": "tta",
    "train.sync_batchnorm": "sync_bn syncbn",
    "train.checkpoint_every_steps": "save_steps save_every save_interval save_freq checkpoint_interval",
    "train.keep_checkpoints": "save_total_limit save_top_k checkpoint_hist",
    "train.compile": "torchcompile torch_compile",
    "train.log_every_steps": "log_interval log_freq logging_steps print_freq",
    "train.profile_steps": "profiler",
    "track.wandb": "wandb_mode report_to logger",
    "runtime.timeout_s": "ddp_timeout",
    "path": "data_dir source_dir",
    "target": "label label_column",
    "picture": "image_column filename",
    "root": "image_dir image_folder",
    "ending": "extension suffix",
    "group": "groups group_column",
    "out": "output output_dir",
    "split.val": "val_split val_size val_fraction validation_split",
    "split.test": "test_split test_size test_fraction",
    "resize": "size image_size img_size",
    "shard_mb": "maxsize shard_size max_shard_size",
    "workers": "threads jobs processes",
    "overwrite": "force",
    "trials": "num_runs max_evals",
    "metric": "monitor objective",
}
# What does it instead, and words of a training that no setting answers to.
NO_SETTINGS = {
    "`dist-train train --resume` goes on with a run, `--from RUN` begins another from it, `--run` names its folder.":
        "resume resume_from resume_from_checkpoint checkpoint ckpt run run_name exp_name experiment experiment_name job_name "
        "output_dir out_dir save_dir log_dir",
    "The launcher sets processes and devices: accelerate launch, or launch/local.sh --gpus N|all, --cpu N.":
        "gpus num_gpus gpu_ids device devices accelerator cuda cpu nodes num_nodes num_processes nproc_per_node world_size rank "
        "local_rank",
    "An epoch holds every sample once.": "ra_sampler ra_reps aug_repeats",
    "RandAugment is augment.rand_ops, TrivialAugment augment.trivial; AutoAugment's own policies are not here.":
        "auto_augment autoaugment aa",
    "The index of the shards says it.": "num_classes classes nb_classes in_channels",
    "`--config FILE` reads settings from a YAML file.": "cfg recipe",
}  # fmt: skip


def read_config(kind: type, argv: list[str], prog: str, files: list[str] = (), epilog: str = ""):
    """Read a dataclass tree from YAML files, then `--config FILE` and `--SECTION.KEY VALUE` in argv; later ones win.

    kind: RunConfig, ShardConfig or StudyConfig. prog: the command's name, for its help; epilog: that help's last words. Hyphens in
    option names count as underscores.
    Raises UserError with every unknown name (and the nearest one that exists) and every value of a wrong type at once.
    """
    argv = [_underscored(word) for word in argv]
    argv = [word for file in files for word in ("--config", file)] + argv
    parser = _parser(kind, prog, epilog)
    settings, problems = _collect(kind, argv)
    if not problems:
        try:
            values = parser.instantiate(parser.parse_args(argv))
            return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})
        except Exception as error:  # jsonargparse stops at the first fault: look at every setting by itself
            problems = _mistyped(kind, settings) or [str(error)]
    raise UserError("\n".join(problems))


def to_dict(config) -> dict:
    """Nested dict of plain values, ready for YAML or JSON; reads back to an equal object."""
    return {
        f.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, f.name)) else
        list(value) if isinstance(value, tuple) else value
        for f in dataclasses.fields(config)
    }  # fmt: skip


def from_dict(kind: type, values: dict):
    """The inverse of `to_dict`. Raises UserError on names that are not settings."""
    import yaml

    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise UserError(f"{kind.__name__}: {', '.join(unknown)} is not a setting:\n{yaml.safe_dump(values)}")
    return kind(**{
        name: from_dict(hints[name], value) if dataclasses.is_dataclass(hints[name]) else
        tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
    })  # fmt: skip


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    tree = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    return tree


def read_written(path: Path) -> dict:
    """The settings that a run wrote into its folder. Raises UserError where the file is damaged."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}.{_WRITTEN_ADVICE}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no settings.{_WRITTEN_ADVICE}")
    return tree


def setting_names(kind: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> type of every setting below a dataclass."""
    names = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            names |= setting_names(hint, f"{prefix}{name}.")
        else:
            names[f"{prefix}{name}"] = hint
    return names


def which_setting(name: str, known: Collection[str], otherwise: str = "`--help` lists them all.") -> str:
    """The last sentence of a complaint about a name that is no setting: the settings that may be meant, or what does it instead.

    known: dotted names of the settings there are. The last part of the name counts, and its section where several are meant.
    """
    import difflib  # only where something is wrong

    meanings, sections = _meanings(known), {}
    for setting in known:
        sections.setdefault(setting.rpartition(".")[0], setting)
    whole = name.lower().replace("-", "_")
    if whole and whole in sections:
        return f"Did you mean {sections[whole]}?"
    section, _, word = whole.rpartition(".")
    if (joined := whole.replace(".", "_")) in meanings:
        section, word = "", joined
    elif not section and (near := difflib.get_close_matches(whole, {name.rpartition(".")[2] for name in known}, 1, 0.8)):
        word = near[0]
    elif not section:  # data_threads
        section = next((other for other in sections if other and whole.startswith(f"{other}_")), "")
        word = whole.removeprefix(f"{section}_")
    words = difflib.get_close_matches(word, meanings, 1, 0.8) or _with_like_parts(word, meanings)
    found = list(dict.fromkeys(meaning for word in words for meaning in meanings[word]))
    meant = [setting for setting in found if setting in known]
    near = difflib.get_close_matches(section, sections, 1)
    own = [setting for setting in meant if near and setting.startswith(f"{near[0]}.")]
    return f"Did you mean {' or '.join((own or meant)[:3])}?" if meant else next(iter(found), otherwise)


def _meanings(known: Collection[str]) -> dict[str, list[str]]:
    """Word -> the settings that are called so, here or elsewhere; for some words of a training, what does it instead."""
    meanings = {}
    for setting in known:
        meanings.setdefault(setting.rpartition(".")[2], []).append(setting)
    others = {setting: words for setting, words in ALSO_CALLED.items() if setting in known}
    for meaning, words in (others | (NO_SETTINGS if "train.epochs" in known else {})).items():
        for word in words.split():
            meanings.setdefault(word, []).append(meaning)
    return meanings


def _with_like_parts(word: str, words: Iterable[str]) -> list[str]:
    """The words that have all parts of word (smoothing: label_smoothing) or nothing else (num_epochs: epochs); of these the
    nearest, by the number of parts that only one of the two has."""
    mine, parts = set(word.split("_")), {other: set(other.split("_")) for other in words}
    apart = {other: len(its ^ mine) for other, its in parts.items() if its <= mine or mine <= its}
    least = min(apart.values(), default=0)
    return [other for other, count in apart.items() if count == least]


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def option_lines(kind: type) -> str:
    """The options that set a dataclass's fields, as its help shows them."""
    return _parser(kind, "").format_help().rpartition("\n\n")[2].partition("\n")[2]


def _parser(kind: type, prog: str, epilog: str = ""):
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=kind.__doc__.splitlines()[0], epilog=epilog, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    parser.add_class_arguments(kind, None)
    return parser


def _collect(kind: type, argv: list[str]) -> tuple[list[tuple[str, str, object]], list[str]]:
    """((where, name, value) of every setting given, complaints about names and files)."""
    import yaml

    known, settings, problems = setting_names(kind), [], []
    words = argv[::-1]
    while words:
        word = words.pop()
        if word in ("-h", "--help") or word.startswith("--print_config"):
            continue
        if not word.startswith("--"):
            expected = f"--config {word}" if word.endswith((".yaml", ".yml")) else "--SECTION.KEY VALUE"
            problems.append(f"command line: {word!r} does not follow an option; expected {expected}")
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:  # the next option is no value: `--amp --train.epochs 3`
            value = words.pop() if words and not words[-1].startswith("--") else None
        if value is None and name in known:
            problems.append(f"command line: --{name} has no value; expected {_expected(known[name])}.")
        elif value is None and name == "config":
            problems.append("command line: --config has no value; expected a YAML file of settings.")
        elif name != "config":
            settings.append(("command line", name, value))
        else:
            try:
                tree = yaml.safe_load(Path(value).read_text()) or {}
            except IsADirectoryError:
                problems.append(f"{value}: is a folder; expected a YAML file of settings.{_instead_of_folder(value, known)}")
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{value}: cannot read the settings: {getattr(error, 'strerror', None) or error}")
            except yaml.YAMLError as error:
                problems.append(f"{value}: not YAML: {str(error).splitlines()[0]} {getattr(error, 'problem_mark', '')}")
            else:
                if isinstance(tree, dict):
                    settings += [(value, key, v) for key, v in flatten(tree).items()]
                else:
                    problems.append(f"{value}: expected `key: value` lines, found {type(tree).__name__}")
    problems += [f"{where}: {name} is not a setting. {which_setting(name, known)}" for where, name, _ in settings
                 if name not in known]  # fmt: skip
    if problems:  # values of the known names are looked at in the same breath
        good = [(where, name, value) for where, name, value in settings if name in known]
        problems += _mistyped(kind, good)
    return settings, problems


def _instead_of_folder(folder: str, known: Collection[str]) -> str:
    """What is meant by a folder in the place of a settings file: one of pictures to convert, or a run's."""
    if "source" in known:  # the settings of a conversion
        options = f"--source folder --path {shlex.quote(folder)} --out shards/NAME"
        return f"\n  Convert the pictures in it with: dist-train shard {options}"
    written = Path(folder, "config.yaml")
    return f" Did you mean --config {shlex.quote(str(written))}?" if written.is_file() else ""


def _mistyped(kind: type, settings: list) -> list[str]:
    parser, known, problems = _parser(kind, ""), setting_names(kind), []
    for where, name, value in settings:
        try:
            if where == "command line":
                parser.parse_args([f"--{name}={value}"])
            else:
                parser.parse_object(unflatten({name: value}))
        except Exception:
            listed = _in_brackets(parser, name, value) if typing.get_origin(known[name]) is tuple else ""
            such = f", such as {shlex.quote(listed) if where == 'command line' else listed}" if listed else ""
            problems.append(f"{where}: {name} is {value!r}; expected {_expected(known[name])}{such}.")
    return problems


def _in_brackets(parser, name: str, value) -> str:
    """The value of a list setting in brackets where it lacks only these, else ""."""
    try:
        parser.parse_args([f"--{name}=[{value}]"])
    except Exception:
        return ""
    return "" if value is None else f"[{value}]"


def _expected(hint: type) -> str:
    """A type in words."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(map(str, parts))
    if kind is tuple:
        one = _expected(parts[0]).removeprefix("a ")
        return f"a list of {one}s" if parts[-1] is ... else f"a list of {len(parts)} {one}s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
