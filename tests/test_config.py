"""Settings: every fault is named at once, later sources win, the written file reads back equal."""

import pytest
import yaml

from dist_train.config import RunConfig, conflicts
from dist_train.errors import UserError
from dist_train.settings import from_dict, read_config, setting_names, to_dict
from dist_train.shard_config import ShardConfig


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_files_and_later_files_over_earlier(tmp_path):
    first = write(tmp_path, "seed: 1\noptim: {lr: 1e-3, name: adam}\n")
    second = tmp_path / "second.yaml"
    second.write_text("optim: {lr: 2e-3}\n")
    config = read_config(RunConfig, ["--config", first, "--config", str(second), "--data.image-size", "64"], "train")
    assert (config.seed, config.optim.lr, config.optim.name, config.data.image_size) == (1, 0.002, "adam", 64)


def test_every_fault_is_named_at_once(tmp_path):
    path = write(tmp_path, "optim: {warmup_epoch: 3, lr: fast}\ntrain: {precision: no}\nmodel: {hidden: 7}\n")
    with pytest.raises(UserError) as error:
        read_config(RunConfig, ["--config", path, "--data.treads", "2", "--seed=x"], "train")
    lines = str(error.value).splitlines()
    assert lines == [
        f"{path}: optim.warmup_epoch is not a setting. Did you mean optim.warmup_epochs?",
        "command line: data.treads is not a setting. Did you mean data.threads?",
        f"{path}: optim.lr is 'fast'; expected a number.",
        f"{path}: train.precision is False; expected one of fp32, bf16, fp16.",
        f"{path}: model.hidden is 7; expected a list of whole numbers.",
        "command line: seed is 'x'; expected a whole number.",
    ]


@pytest.mark.parametrize("text, complaint", [
    ("- a\n- b\n", "expected `key: value` lines"),
    ("a: [1\n", "not YAML"),
])  # fmt: skip
def test_a_file_that_is_no_settings_file_is_named(tmp_path, text, complaint):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=complaint) as error:
        read_config(RunConfig, ["--config", path], "train")
    assert path in str(error.value)


def test_a_missing_file_and_a_missing_value_are_named():
    with pytest.raises(UserError) as error:
        read_config(RunConfig, ["--config", "recipes/none.yaml", "--seed"], "train")
    assert "recipes/none.yaml: cannot read the settings: No such file" in str(error.value)
    assert "--seed has no value" in str(error.value)


def test_a_word_that_follows_no_option_is_refused():
    with pytest.raises(UserError, match="'recipe.yaml' does not follow an option; expected --config recipe.yaml"):
        read_config(RunConfig, ["recipe.yaml"], "train")


@pytest.mark.parametrize("kind", [RunConfig, ShardConfig])
def test_settings_read_back_equal_from_yaml(kind):
    config = kind()
    assert from_dict(kind, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_written_settings_load_through_the_parser(tmp_path):
    config = read_config(RunConfig, ["--optim.lr", "0.5", "--model.hidden", "[3, 4]"], "train")
    path = write(tmp_path, yaml.safe_dump(to_dict(config)))
    assert read_config(RunConfig, ["--config", path], "train") == config


def test_only_settings_that_change_results_conflict():
    old, new = to_dict(RunConfig()), to_dict(RunConfig())
    new["data"]["threads"], new["track"]["wandb"] = 7, "off"
    assert conflicts(old, new) == []
    new["optim"]["lr"] = 9.0
    assert conflicts(old, new) == ["optim.lr: 0.01 in the run, 9.0 now"]


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        read_config(RunConfig, ["--help"], "dist-train train")
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert all(f"--{name}" in text for name in setting_names(RunConfig))
    assert "samples per step over all ranks" in text
