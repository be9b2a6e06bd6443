"""The house: imports run one way, every recipe loads, every setting is read, the map is true, scripts parse."""

import ast
import dataclasses
import graphlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from dist_train.cli import COMMANDS
from dist_train.config import RunConfig
from dist_train.settings import read_config, setting_names
from dist_train.shard_config import ShardConfig

MODULES = sorted(p.stem for p in (ROOT / "dist_train").glob("*.py"))

# Imports run downwards, from a later row to an earlier one, or inside a row without a circle.
LAYERS = [
    ["streams", "errors", "durable", "control_groups", "core", "settings", "config", "shard_config", "index", "order", "boxes",
     "bad_samples"],  # no torch
    ["tries", "remote", "file_locks", "shard_cache", "remote_index",
     "store", "picture_header", "decode", "tars", "partition", "pictures", "sources", "csv_files", "tables", "picture_lists",
     "torchsets", "workers", "write_shard", "plan", "dali_index", "tar_lists", "foreign_tar", "read_foreign", "folds",
     "stop"],  # no torch either
    ["convert", "repair", "shard", "foreign", "verify", "launch_traps", "doctor",
     "draws", "colour", "policies", "mixing", "augment", "layers", "networks", "pretrained",
     "gpu_decode", "timm_models", "models", "finetune", "muon", "optim", "metrics", "loss", "progressive",
     "messages", "step_parts", "guard", "hybrid",
     "wandb_file", "wandb_log", "track", "ranks", "watch", "runtime", "plots", "bars", "page", "ranking", "confusion",
     "table_plots", "picture_plots", "mistakes", "contact_sheet"],
    ["recycled", "wanted", "decoded_file", "cache", "loader", "data", "checkpoint"],
    ["evaluate", "predictions"],
    ["sizes", "decoder_choice", "parallel", "state", "initial_network", "run_folder", "run", "branch", "train", "predict", "export",
     "scores", "preview", "figures", "report", "bench_step", "bench"],
    ["journal", "search", "trial", "study_report", "study_wandb", "study", "compare"],
    ["cli"],
]  # fmt: skip
LIGHT = ("config", "index", "order", "cli", "plan", "shard", "sources", "verify", "foreign", "doctor", "report", "boxes")


def imports_of(module: str, top_level_only: bool = False) -> set[str]:
    """Modules of this package that a module imports, anywhere in it or at its top level only."""
    tree = ast.parse((ROOT / "dist_train" / f"{module}.py").read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dist_train":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & set(MODULES)


def test_every_module_has_its_layer():
    assert sorted(name for row in LAYERS for name in row) == [m for m in MODULES if not m.startswith("__")]


def test_imports_run_one_way():
    layer_of = {module: i for i, row in enumerate(LAYERS) for module in row}
    imports = {module: imports_of(module, top_level_only=True) for module in layer_of}
    upwards = [(m, other) for m in imports for other in imports[m] if layer_of[other] > layer_of[m]]
    assert not upwards
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError, naming the circle


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, dist_train.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_below_400_lines(module):
    assert len((ROOT / "dist_train" / f"{module}.py").read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_says_what_it_reaches(path):
    text = path.read_text()
    if "study:" not in text:
        config = read_config(RunConfig, ["--config", str(path)], "train")
        assert (ROOT / "datasets" / f"{Path(config.data.shards).name}.yaml").exists()
    header = text.split("\n\n")[0]
    assert header.startswith("#") and re.search(r"top-?1|accuracy|not measured", header), "no figure in the header"


def setting_classes(config: type) -> dict[str, type]:
    """Dotted name of each setting -> the dataclass that holds it."""
    sections = {field.name: field.default_factory for field in dataclasses.fields(config) if dataclasses.is_dataclass(field.type)}
    return {name: sections.get(name.rpartition(".")[0], config) for name in setting_names(config)}


def attributes_read(node: ast.AST, class_of: dict[str, str]) -> set[tuple[str, str]]:
    """(class, attribute) of what is read of names whose class is known: by an annotation, or as one is called everywhere."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        first = [n for n in node.body if getattr(n, "name", "") == "__init__"] if isinstance(node, ast.ClassDef) else [node]
        arguments = [a for function in first for a in (*function.args.args, *function.args.kwonlyargs) if a.annotation]
        class_of = class_of | {a.arg: ast.unparse(a.annotation) for a in arguments}
    if isinstance(node, ast.FunctionDef):
        for assignment in (n for n in ast.walk(node) if isinstance(n, ast.Assign)):
            for target, value in zip(*map(parts, (assignment.targets[0], assignment.value)), strict=False):
                if isinstance(target, ast.Name) and isinstance(value, ast.Attribute) and value.attr in class_of:
                    class_of = class_of | {target.id: class_of[value.attr]}
    found = set()
    if isinstance(node, ast.Attribute):
        found.add((class_of.get(getattr(node.value, "attr", getattr(node.value, "id", ""))), node.attr))
    return found.union(*(attributes_read(child, class_of) for child in ast.iter_child_nodes(node)))


def parts(node: ast.AST) -> list[ast.AST]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def test_nothing_but_sources_lies_in_the_package():
    files = subprocess.run(["git", "ls-files", "dist_train"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {Path(name).suffix for name in files} - {".py", ".c", ".h", ".j2", ".css"}


def test_every_setting_is_read_somewhere():
    settings = [*setting_classes(RunConfig).items(), *setting_classes(ShardConfig).items()]  # a seed is in both
    class_of = {"config": "RunConfig"} | {name.partition(".")[0]: owner.__name__ for name, owner in settings if "." in name}
    read = set()
    for path in (ROOT / "dist_train").glob("*.py"):
        read |= attributes_read(ast.parse(path.read_text()), class_of)
    assert [name for name, owner in settings if (owner.__name__, name.rpartition(".")[2]) not in read] == []


@pytest.mark.parametrize("module", ["config", "shard_config"])
def test_every_setting_is_described(module):
    tree = ast.parse((ROOT / "dist_train" / f"{module}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, node.body[1:] + [None], strict=True):
                if isinstance(field, ast.AnnAssign) and not isinstance(field.value, ast.Call):
                    assert isinstance(following, ast.Expr), f"{node.name}.{field.target.id} has no description"


def test_every_command_exists_and_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name, (target, _) in COMMANDS.items():
        module, function = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert function in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], target
        assert f"dist-train {name}" in readme, f"README does not show dist-train {name}"


def test_the_readme_map_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^\s{2}(\w+)\.py\s", readme, flags=re.M))
    assert shown == {m for m in MODULES if not m.startswith("__")}


def test_the_loop_is_the_first_function_of_train():
    tree = ast.parse((ROOT / "dist_train" / "train.py").read_text())
    assert next(n.name for n in tree.body if isinstance(n, ast.FunctionDef)) == "train"


@pytest.mark.parametrize("path", [ROOT / ".ci/run", *sorted(ROOT.glob("launch/s*.example")), *sorted(ROOT.glob("launch/*.sh")),
                                  *sorted(ROOT.glob("launch/*.sbatch")), *sorted(ROOT.glob("tests/cluster/*.sh"))],
                         ids=lambda p: p.name)  # fmt: skip
def test_shell_scripts_parse_and_can_be_started(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert os.access(path, os.X_OK) == (path.suffix != ".example")


def test_no_device_is_named_in_the_code():
    for path in (ROOT / "dist_train").glob("*.py"):
        assert ".cuda()" not in path.read_text(), path


def test_accelerates_file_sets_the_machine_only():
    settings = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    assert settings.get("mixed_precision", "no") in ("no", False)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("here, outside, code, kept", [
    (None, 0, 0, False), (1, 0, 0, False), (0, 1, 0, True),  # none, too old, new
    (None, 1, 2, False), (1, 1, 2, False), (127, 0, 2, True),  # no other to be had; one that does not start
])  # fmt: skip
def test_make_replaces_an_environment_whose_python_is_too_old_and_no_other(tmp_path, here, outside, code, kept):
    def stand_in(folder: Path, asked: int) -> None:  # for a Python that ends with this code when it is asked whether it is new
        folder.mkdir(parents=True)
        words = f'case "$*" in *version_info*) exit {asked};; *venv*) cp -r "$NEW" .venv;; esac'
        (folder / "python3").write_text(f"#!/bin/sh\n{words}\n")
        (folder / "python3").chmod(0o755)
        (folder / "python").symlink_to("python3")
        (folder / "pip").symlink_to("/bin/true")

    stand_in(tmp_path / "outside", outside)
    stand_in(tmp_path / "new/bin", 0)
    if here is not None:
        stand_in(tmp_path / ".venv/bin", here)
        (tmp_path / ".venv/before").touch()
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    env = {"PATH": f"{tmp_path}/outside:{os.environ['PATH']}", "NEW": str(tmp_path / "new")}
    done = subprocess.run(["make", "-f", ROOT / "Makefile", "install"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code and (tmp_path / ".venv/before").exists() == kept, done
    assert (tmp_path / ".venv/installed").exists() == (code == 0)
