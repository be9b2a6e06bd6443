"""What a study searches: the `search:` and `variants:` parts of its YAML file, checked, and drawn by Optuna.

search:
  optim.lr: {low: 0.001, high: 0.1, log: true}     a range; whole numbers if both ends are
  model.hidden: [[64, 64], [128, 128, 128]]        choices
variants:                                          choices that set several things at once, by name
  base: {}
  early stopping: {train.patience: 10}
"""

import contextlib
import itertools
import json
import math
from dataclasses import dataclass, field

import yaml

from dist_train.config import RunConfig, changes_results
from dist_train.errors import UserError
from dist_train.settings import flatten, from_dict, read_config, setting_names, to_dict, unflatten, which_setting

FIXED = ("data.shards", "data.fold", "train.precision", "train.monitor")  # the same for the whole study, or the study's own
VARIANT = "variant"
_RANGE_KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True)
class Space:
    """ranges: setting -> {"low", "high", "log", "step"}; choices: setting -> what Optuna knows it by
    (lists are text to it) -> value; variants: name -> settings."""

    ranges: dict[str, dict] = field(default_factory=dict)
    choices: dict[str, dict] = field(default_factory=dict)
    variants: dict[str, dict] = field(default_factory=dict)

    @property
    def categories(self) -> dict[str, list]:
        """What is not a range: its name -> what Optuna chooses from."""
        variants = {VARIANT: list(self.variants)} if self.variants else {}
        return variants | {name: list(texts) for name, texts in self.choices.items()}

    def draw(self, trial) -> None:
        """Ask an Optuna trial for a value of everything."""
        for name, texts in self.categories.items():
            trial.suggest_categorical(name, texts)
        for name, limits in self.ranges.items():
            suggest = trial.suggest_int if _is_whole(limits) else trial.suggest_float
            more = {key: limits[key] for key in ("log", "step") if limits.get(key)}
            suggest(name, limits["low"], limits["high"], **more)

    def settings(self, drawn: dict) -> dict:
        """Setting -> value of what was drawn."""
        settings = dict(self.variants[drawn[VARIANT]]) if self.variants else {}
        settings |= {name: self.choices[name][drawn[name]] for name in self.choices}
        return settings | {name: drawn[name] for name in self.ranges}

    def grid(self) -> list[dict]:
        """Every combination, as `draw` would set it. Ranges need a step."""
        axes = self.categories
        for name, limits in self.ranges.items():
            num_steps = int((limits["high"] - limits["low"]) / limits["step"] + 1e-9)
            axes[name] = [round(limits["low"] + i * limits["step"], 12) for i in range(num_steps + 1)]
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read_space(path: str, search: dict, variants: dict, sampler: str) -> Space:
    """The space that a study's file describes. Raises UserError, all faults at once."""
    problems, space = [], Space()
    if not isinstance(search, dict) or not isinstance(variants, dict):
        raise UserError(f"{path}: search and variants are expected to hold `setting: choices` and `name: settings` lines.")
    for name, values in search.items():
        values = _with_numbers(name, values)
        problems += _name_problems(f"{path}: search", name)
        if isinstance(values, list) and values and all(isinstance(v, str | int | float | list | None) for v in values):
            space.choices[name] = {json.dumps(value) if isinstance(value, list) else value: value for value in values}
            if len(space.choices[name]) < len(values):
                problems.append(f"{path}: search.{name} names a choice twice.")
        elif isinstance(values, dict) and _is_range(values):
            space.ranges[name] = values
            if setting_names(RunConfig).get(name) is int and not _is_whole(values):
                problems.append(f"{path}: search.{name} is {values!r}; expected whole numbers.")
            if sampler == "grid" and not values.get("step"):
                problems.append(f"{path}: search.{name} is a range; a grid needs its step, or a list of choices.")
        else:
            problems.append(f"{path}: search.{name} is {values!r}; expected a list of choices, or a range such as "
                            f"{{low: 0.001, high: 0.1, log: true}}.")  # fmt: skip
    for variant, settings in variants.items():
        if not isinstance(settings, dict):
            problems.append(f"{path}: variants.{variant} is {settings!r}; expected {{setting: value, ...}}, or {{}}.")
            continue
        space.variants[str(variant)] = {name: _with_numbers(name, value) for name, value in settings.items()}
        for name in settings:
            problems += _name_problems(f"{path}: variants.{variant}", name)
            if name in search:
                problems.append(f"{path}: {name} is both searched and set by the variant {variant}.")
    if not problems and not (search or variants):
        problems.append(f"{path}: there is nothing to search; expected a `search:` or a `variants:` part.")
    if problems:
        raise UserError("\n".join(problems))
    return space


def changed(config: RunConfig, settings: dict) -> RunConfig:
    """A recipe with some settings, by dotted name, of values that `check_values` has passed."""
    return from_dict(RunConfig, unflatten(flatten(to_dict(config)) | settings))


def recipe_with(recipe: str, settings: dict) -> RunConfig:
    """A recipe file with some settings changed. Raises UserError where a value is of the wrong type."""
    return read_config(RunConfig, [f"--{name}={_text(value)}" for name, value in settings.items()], "study", [recipe])


def check_values(path: str, recipe: str, space: Space) -> None:
    """Raise UserError if any choice, end of a range or variant is not of its setting's type; all at once."""
    problems = []
    rows = [{name: limits[end] for name, limits in space.ranges.items()} for end in ("low", "high")]
    columns = [[(name, value) for value in texts.values()] for name, texts in space.choices.items()]
    rows += [dict(filter(None, row)) for row in itertools.zip_longest(*columns)]
    for row in [*rows, *space.variants.values()]:
        try:
            recipe_with(recipe, row)
        except UserError as error:
            problems.append(str(error).replace("command line:", f"{path}:"))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _name_problems(where: str, name) -> list[str]:
    known = setting_names(RunConfig)
    if name not in known:
        hint = which_setting(str(name), known, "`dist-train train --help` lists them all.")
        return [f"{where}: {name} is not a setting of a recipe. {hint}"]
    if not changes_results(name) or name.startswith(FIXED):
        return [f"{where}: {name} cannot be searched: no result depends on it, or it is the same for the whole study."]
    return []


def _with_numbers(name, values):
    """A value, choices or a range, with those made numbers, yes or no that stand as text, such as 1e-3 or "false"."""
    kind = setting_names(RunConfig).get(name)

    def read(value):
        if isinstance(value, str) and kind in (int, float, bool):
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
            with contextlib.suppress(ValueError, TypeError):
                return float(value) if isinstance(value, str) else value  # YAML takes 1e-3 for text
        return float(value) if kind is float and type(value) is int else value

    if isinstance(values, dict):
        return {key: read(value) if key != "log" else value for key, value in values.items()}
    return list(map(read, values)) if isinstance(values, list) and kind in (int, float, bool) else read(values)


def _is_range(values: dict) -> bool:
    numbers = [values.get("low"), values.get("high"), values.get("step", 1)]
    if not values.keys() <= _RANGE_KEYS or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        return False
    low, high, step = numbers
    return -math.inf < low < high < math.inf and 0 < step < math.inf and not (values.get("log") and (low <= 0 or "step" in values))


def _is_whole(limits: dict) -> bool:
    return all(isinstance(limits[key], int) for key in ("low", "high", "step") if limits.get(key) is not None)


def _text(value) -> str:
    """A value as YAML."""
    return value if isinstance(value, str) else json.dumps(value)
