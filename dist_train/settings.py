"""Read a tree of frozen dataclasses from YAML files and the command line; every fault is named at once."""

import dataclasses
import typing
from pathlib import Path
from typing import Literal

from dist_train.errors import UserError, did_you_mean

_WRITTEN_ADVICE = "\n  Put back the settings the run was started with, or begin another run with --run."


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
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help") or word.startswith("--print_config"):
            continue
        if not word.startswith("--"):
            expected = f"--config {word}" if word.endswith((".yaml", ".yml")) else "--SECTION.KEY VALUE"
            problems.append(f"command line: {word!r} does not follow an option; expected {expected}")
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, None)
        if value is None:
            problems.append(f"command line: --{name} has no value")
        elif name != "config":
            settings.append(("command line", name, value))
        else:
            try:
                tree = yaml.safe_load(Path(value).read_text()) or {}
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{value}: cannot read the settings: {getattr(error, 'strerror', None) or error}")
            except yaml.YAMLError as error:
                problems.append(f"{value}: not YAML: {str(error).splitlines()[0]} {getattr(error, 'problem_mark', '')}")
            else:
                if isinstance(tree, dict):
                    settings += [(value, key, v) for key, v in flatten(tree).items()]
                else:
                    problems.append(f"{value}: expected `key: value` lines, found {type(tree).__name__}")
    for where, name, _ in settings:
        if name not in known:
            alike = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
            hint = did_you_mean(name, known, f"Did you mean {alike[0]}?" if alike else "`--help` lists them all.")
            problems.append(f"{where}: {name} is not a setting. {hint}")
    if problems:  # values of the known names are looked at in the same breath
        good = [(where, name, value) for where, name, value in settings if name in known]
        problems += _mistyped(kind, good)
    return settings, problems


def _mistyped(kind: type, settings: list) -> list[str]:
    parser, known, problems = _parser(kind, ""), setting_names(kind), []
    for where, name, value in settings:
        try:
            if where == "command line":
                parser.parse_args([f"--{name}={value}"])
            else:
                tree = value
                for part in reversed(name.split(".")):
                    tree = {part: tree}
                parser.parse_object(tree)
        except Exception:
            problems.append(f"{where}: {name} is {value!r}; expected {_expected(known[name])}.")
    return problems


def _expected(hint: type) -> str:
    """A type in words."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(map(str, parts))
    if kind is tuple:
        one = _expected(parts[0]).removeprefix("a ")
        return f"a list of {one}s" if parts[-1] is ... else f"a list of {len(parts)} {one}s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
