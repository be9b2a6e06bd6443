"""Settings: every fault is named at once, later sources win, the written file reads back equal."""

import re

import pytest
import yaml
from conftest import ROOT

from dist_train.config import DataConfig, RunConfig, StudyConfig, conflicts
from dist_train.errors import UserError
from dist_train.settings import ALSO_CALLED, NO_SETTINGS, from_dict, read_config, setting_names, to_dict, which_setting
from dist_train.shard_config import ShardConfig

TRAINING = setting_names(RunConfig)


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
        f"{path}: model.hidden is 7; expected a list of whole numbers, such as [7].",
        "command line: seed is 'x'; expected a whole number.",
    ]


@pytest.mark.parametrize("words, told", [
    (["--drop", "Nr"], "drop is 'Nr'; expected a list of texts, such as '[Nr]'."),
    (["--drop", "Nr,Datum"], "drop is 'Nr,Datum'; expected a list of texts, such as '[Nr,Datum]'."),
    (["--drop", "{a: 1}"], "drop is '{a: 1}'; expected a list of texts."),
])  # fmt: skip
def test_a_list_that_lacks_its_brackets_is_shown_with_them(words, told):
    with pytest.raises(UserError) as error:
        read_config(ShardConfig, words, "shard")
    assert str(error.value) == f"command line: {told}"


@pytest.mark.parametrize("text, complaint", [("- a\n- b\n", "expected `key: value` lines"), ("a: [1\n", "not YAML")])
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


def test_a_folder_in_the_place_of_a_settings_file_is_answered_with_what_is_meant(tmp_path):
    where = re.escape(str(tmp_path))
    with pytest.raises(UserError, match=rf"shard --source folder --path {where} --out shards/NAME$"):
        read_config(ShardConfig, [], "shard", [str(tmp_path)])
    with pytest.raises(UserError, match=rf"^{where}: is a folder; expected a YAML file of settings\.$"):
        read_config(RunConfig, ["--config", str(tmp_path)], "train")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=rf"Did you mean --config {where}/config.yaml\?$"):
        read_config(RunConfig, ["--config", str(tmp_path)], "train")


def test_a_word_that_follows_no_option_is_refused():
    with pytest.raises(UserError, match="'recipe.yaml' does not follow an option; expected --config recipe.yaml"):
        read_config(RunConfig, ["recipe.yaml"], "train")


@pytest.mark.parametrize("name, meant", [
    ("optim.leraning_rate", "optim.lr"), ("lr", "optim.lr"), ("learningRate", "optim.lr"), ("optimizer.momentum", "optim.momentum"),
    ("batch-size", "data.global_batch_size"), ("train.batch_size", "data.global_batch_size"), ("workers", "data.threads"),
    ("data.num_workers", "data.threads"), ("weight-decay", "optim.weight_decay"), ("train.dropout", "model.dropout"),
    ("amp", "train.precision"), ("mixed_precision", "train.precision"), ("use_wandb", "track.wandb"),
    ("smoothing", "optim.label_smoothing"), ("model_name", "model.name"), ("data_image_size", "data.image_size"),
    ("optim", "optim.name"), ("treads", "data.threads or runtime.threads"), ("data_treads", "data.threads"),
    ("optim.betas", "optim.momentum or optim.beta2"), ("crop", "data.crop or augment.crop"), ("dta.crop", "data.crop"),
    ("augment.size", "augment.start_size"), ("num_epochs", "train.epochs"), ("model.type", "model.name"),
    ("randaugment", "augment.rand_ops"), ("augment.ra_magnitude", "augment.rand_magnitude"),
    ("interpolation", "data.interpolation"), ("train-interpolation", "data.interpolation"), ("fast_dev_run", "train.max_steps"),
])  # fmt: skip
def test_the_words_of_other_trainers_and_of_other_sections_lead_to_the_setting(name, meant):
    assert which_setting(name, TRAINING) == f"Did you mean {meant}?"


def test_settings_from_before_there_was_bicubic_are_those_of_bilinear():
    old = to_dict(RunConfig(data=DataConfig(image_size=32)))
    assert old["data"].pop("interpolation") == "bilinear"
    assert conflicts(to_dict(from_dict(RunConfig, old)), to_dict(RunConfig(data=DataConfig(image_size=32)))) == []
    bicubic = to_dict(RunConfig(data=DataConfig(image_size=32, interpolation="bicubic")))
    assert conflicts(to_dict(from_dict(RunConfig, old)), bicubic) == ["data.interpolation: 'bilinear' in the run, 'bicubic' now"]


@pytest.mark.parametrize("name, expected", [
    ("train.resume", "dist-train train --resume"), ("num_gpu", "The launcher sets processes"), ("device", "The launcher"),
    ("accelerator", "The launcher"),
    ("auto_augment", "augment.rand_ops, TrivialAugment augment.trivial; AutoAugment's own"), ("augment.aa", "AutoAugment's own"),
    ("num_classes", "The index of the shards says it."), ("zebra", "`--help` lists them all."),
])  # fmt: skip
def test_what_is_no_setting_at_all_is_said_to_be_done_otherwise(name, expected):
    assert expected in which_setting(name, TRAINING)
    assert which_setting(name, setting_names(ShardConfig), "none") in ("none", "Did you mean classes?")


@pytest.mark.parametrize("name, meant", [("num_workers", "workers"), ("val_split", "split.val"), ("data_dir", "path")])
def test_a_conversion_has_words_of_its_own(name, meant):
    assert which_setting(name, setting_names(ShardConfig)) == f"Did you mean {meant}?"


def test_every_other_word_leads_to_a_setting_that_there_is():
    targets = set(ALSO_CALLED)
    for kind in (RunConfig, ShardConfig, StudyConfig):
        known = setting_names(kind)
        own = {name.rpartition(".")[2] for name in known}
        for setting in ALSO_CALLED.keys() & known.keys():
            targets.discard(setting)
            for word in ALSO_CALLED[setting].split():
                assert word not in own, f"{word} is a setting of {kind.__name__} by now"
                assert setting in re.findall(r"[\w.]*\w", which_setting(word, known)), word
    assert not targets, f"{targets} are no settings"
    for sentence, words in NO_SETTINGS.items():
        assert all(which_setting(word, TRAINING) == sentence for word in words.split())
        assert all((ROOT / path).exists() for path in re.findall(r"launch/\S+\.sh", sentence))


def test_the_page_on_other_trainers_names_settings_and_its_options_lead_to_them():
    page, flags = (ROOT / "docs/from-other-trainers.md").read_text(), 0
    for row in re.findall(r"^\|(.*)\|(.*)\|(.*)\|.*\|$", page, re.MULTILINE)[2:]:
        named = re.findall(r"`((?:data|augment|model|optim|train|track|runtime)\.\w+)", row[2])
        assert set(named) <= set(TRAINING) and (named or re.search("not here|no setting|`seed`|--resume", row[2])), row
        for option in re.findall(r"--([\w-]+)", row[0] + row[1]) if named else ():
            word, flags = option.replace("-", "_"), flags + 1
            meant = which_setting(word, TRAINING)
            assert any(name in meant for name in named) or any(word == name.rpartition(".")[2] for name in named), (option, meant)
    assert flags > 60
    sections = {name.partition(".")[0] for name in TRAINING if "." in name}
    named = {name for name in re.findall(r"`(\w+\.\w+)", page) if name.partition(".")[0] in sections} - {"train.py"}
    assert len(named) > 40 and named <= set(TRAINING)


def test_an_option_without_a_value_does_not_take_the_next_one():
    with pytest.raises(UserError) as error:
        read_config(RunConfig, ["--amp", "--train.compile", "--train.epochs", "3", "--config"], "train")
    assert str(error.value).splitlines() == [
        "command line: --train.compile has no value; expected true or false.",
        "command line: --config has no value; expected a YAML file of settings.",
        "command line: amp is not a setting. Did you mean train.precision?",
    ]


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
