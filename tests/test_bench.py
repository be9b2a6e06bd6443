"""bench data and bench step: every part is measured on a real set, and what limits follows from the figures."""

import dataclasses
import json
import time

import pytest
import torch
import yaml
from conftest import sharded, tiny_run

from dist_train import bench, bench_step, run
from dist_train.config import AugmentConfig, DataConfig, RunConfig
from dist_train.errors import UserError
from dist_train.folds import open_index
from dist_train.step_parts import StepParts


def test_every_part_of_the_feeding_is_measured(digits, capsys):
    bench.main(["data", "--data.shards", digits, "--batch-size", "64", "--threads", "1", "--seconds", "0.02", "--json"])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert lines[0] == f"{digits}: batches of 64, 1 threads, cpu; each part for 0.02 s in 5 turns"
    parts = {name: part for name, part in figures.items() if isinstance(part, dict)}
    assert set(parts) == {"bytes", "decode", "stream", "cached", "augment"}  # no device to bring them to
    for part in parts.values():
        assert 0 < part["spread"][0] <= part["images_per_s"] <= part["spread"][1]
    assert figures["batch_size"] == 64 and figures["threads"] == 1
    assert figures["limits"] in ("reading", "decoding", "augmentation") and figures["most_to_win"] >= 1
    (limits,) = (line for line in lines if "limits: if it cost nothing" in line)
    assert f"{figures['most_to_win']:.1f} times as many" in limits


def test_a_table_is_measured_without_decoding(tmp_path):
    iris = sharded(tmp_path / "iris", "--source", "sklearn", "--dataset", "iris")
    config = RunConfig(data=DataConfig(shards=iris, global_batch_size=16, threads=1))
    figures = bench.measure(config, torch.device("cpu"), 0.01, repeats=2)
    assert set(figures) == {"bytes", "stream", "cached", "limits", "most_to_win", "threads", "batch_size", "on"}
    assert figures["limits"] == "reading"
    uncached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache="none"))
    figures = bench.measure(uncached, torch.device("cpu"), 0.01, repeats=1)
    assert "cached" not in figures and figures["most_to_win"] is None
    assert all(f"{figures[name]['images_per_s']:,.0f}" in bench.verdict(figures, uncached)[0] for name in ("bytes", "stream"))


def told(capsys) -> tuple[dict, str]:
    """The figures of --json, and the words above them on one line."""
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), " ".join(" ".join(lines).split())


def test_what_the_network_needs_stands_beside_what_the_feeding_has(digits, tmp_path, capsys):
    argv = tiny_run(digits, tmp_path / "unused")
    settings = {}
    for key, value in zip(argv[::2], argv[1::2], strict=True):
        if key not in ("--run", "--track.wandb"):  # YAML reads its "off" as false
            section, _, name = key.removeprefix("--").partition(".")
            settings.setdefault(section, {})[name] = yaml.safe_load(value)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    bench.main(["data", "--config", str(recipe), "--seconds", "0.02", "--json"])
    figures, out = told(capsys)
    assert figures["need"] == figures["step"]["images_per_s"] > 0 and figures["threads"] == 1
    assert figures["epochs"]["first"]["have"] == figures["stream"]["images_per_s"]
    assert figures["epochs"]["later"]["have"] == figures["cached"]["images_per_s"]
    # a network takes longer than 96 rows of 64 bytes from memory
    assert figures["limits"] == "the step" and 1 < figures["most_to_win"] < 2
    assert f"takes {figures['need']:,.0f} images/s" in out and "in later ones" in out
    assert f"the training would be {figures['most_to_win']:.2f} times as fast at most" in out
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("rates", "part", "win"),
    [
        ({"bytes": 900, "decode": 300, "stream": 300, "augment": 290}, "decoding", 3),
        ({"bytes": 200, "decode": 380, "stream": 190, "augment": 180}, "reading", 2),
        ({"bytes": 900, "decode": 300, "stream": 300, "augment": 100}, "augmentation", 3),
        ({"bytes": 900, "decode": 800, "stream": 800, "device": 200, "augment": 190}, "the way to the device", 4),
        ({"bytes": 900, "stream": 800, "cached": 8000}, "reading", 10),
        ({"bytes": 900, "stream": 800}, "reading", None),
    ],
)
def test_the_slowest_part_of_the_feeding_limits(rates, part, win):
    assert bench.alone(rates) == {"limits": part, "most_to_win": win}


@pytest.mark.parametrize(
    ("rates", "shares_cores", "first", "later"),
    [
        # beside a GPU the slower of the two counts: 300 becomes 450, what the step takes
        ({"bytes": 900, "decode": 300, "stream": 300, "step": 450}, False, (300, "decoding", 1.5), None),
        ({"bytes": 900, "decode": 300, "stream": 300, "step": 200}, False, (300, "the step", 1), None),
        ({"bytes": 900, "decode": 800, "stream": 800, "device": 200, "step": 400}, False, (200, "the way to the device", 2), None),
        # on the same cores times add up: 1/300 + 1/600 becomes 1/900 + 1/600
        ({"bytes": 900, "decode": 300, "stream": 300, "step": 600}, True, (300, "decoding", 1.8), None),
        ({"bytes": 900, "decode": 300, "stream": 300, "cached": 900, "step": 100}, True, (300, "the step", 4 / 3),
         (900, "the step", 10 / 9)),
        ({"bytes": 200, "stream": 200, "cached": 400, "step": 800}, True, (200, "reading", 5 / 3), (400, "gathering", 3)),
    ],
)  # fmt: skip
def test_feed_and_step_together_say_what_limits_a_training(rates, shares_cores, first, later):
    found = bench.compared(rates, shares_cores)
    assert found["need"] == rates["step"] and list(found["epochs"]) == (["first", "later"] if later else ["first"])
    for name, (have, part, win) in {"first": first, "later": later or first}.items():
        expected = {"have": have, "limits": part, "most_to_win": pytest.approx(win)}
        assert found["epochs"].get(name, expected) == expected
    assert (found["limits"], found["most_to_win"]) == ((later or first)[1], pytest.approx((later or first)[2]))


def test_help_names_both_benchmarks(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert "dist-train bench data" in (out := capsys.readouterr().out) and "dist-train bench step" in out


def test_no_shards_and_no_benchmark_are_named():
    with pytest.raises(UserError, match="no shards; name them with --shards"):
        bench.main(["data"])
    with pytest.raises(UserError, match="speed is not a benchmark"):
        bench.main(["speed"])


def test_a_step_is_timed_from_shards_and_from_memory(digits, tmp_path, capsys, monkeypatch):
    settings, asked = tiny_run(digits, tmp_path / "unused", "--optim.schedule", "plateau"), []
    at = settings.index("--run")
    monkeypatch.setattr(bench_step, "choose_decoder",
                        lambda config, folder, device, num_threads: asked.append(num_threads) or config)  # fmt: skip
    bench.main(["step", *settings[:at], *settings[at + 2 :], "--steps", "4", "--turns", "2", "--json"])
    figures, out = told(capsys)
    assert figures["images_per_s"] == pytest.approx(96 / figures["step_s"])
    for rate, spread in (("images_per_s", "spread"), ("synthetic_images_per_s", "synthetic_spread")):
        assert 0 < figures[spread][0] < figures[rate] < figures[spread][1]
    assert 0 < figures["mfu"] <= 1 and figures["is_kept"] and asked == [1]  # as a training asks, who decodes
    assert sum(figures["shares"].values()) == pytest.approx(1, abs=1e-3) and figures["shares"]["backward"] > 0
    assert f"The largest part is {figures['limits']}; without it" in out
    assert bench_step.free_feed(figures) in out and "in 2 turns" in out and figures["num_turns"] == 2
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("wins", "told"), [((0.02, 0.04), "change the rate by +3.0%."), ((-0.01, 0.07), "win nothing that these figures tell."),
                       ((-0.3, -0.2), "win nothing that these figures tell.")],
)  # fmt: skip
def test_a_feed_wins_only_what_every_turn_tells(wins, told):
    figures = {"free_feed_win": sum(wins) / 2, "free_feed_spread": wins}
    assert bench_step.free_feed(figures) == f"A feed that cost nothing would {told}"


def test_slow_turns_are_fewer_and_a_word_comes_before_them(digits, tmp_path, capsys, monkeypatch):
    def window(timed) -> dict:
        assert capsys.readouterr().out == "" if measured else f"{digits}: steps of 96 on 1 x cpu" in capsys.readouterr().out
        return measured.append(timed) or {"images_per_s": 100.0}

    monkeypatch.setattr(bench_step.TimedRun, "window", window)
    monkeypatch.setattr(bench_step, "TURNS_S", 0.0)
    monkeypatch.setattr(run, "peak_flops", lambda device, dtype: 1.0)  # as of a product that was kept waiting
    settings = tiny_run(digits, tmp_path / "unused", "--data.cache", "none")
    at = settings.index("--run")
    for more, num_turns in (([], 1), (["--turns", "2"], 2)):  # what is asked for is done
        measured = []
        bench.main(["step", *settings[:at], *settings[at + 2 :], "--steps", "1", *more, "--json"])
        figures, out = told(capsys)
        assert figures["num_turns"] == num_turns == len(measured) / 2 and figures["mfu"] == 1
        assert f"in {num_turns} turn{'s' * (num_turns > 1)};" in out


def test_rates_come_from_steps_in_which_no_part_is_timed(digits, tmp_path, capsys, monkeypatch):
    mark = StepParts.mark

    def slow_mark(parts, part):
        if parts.num_steps:
            time.sleep(0.05)
        mark(parts, part)

    monkeypatch.setattr(StepParts, "mark", slow_mark)
    settings = tiny_run(digits, tmp_path / "unused", "--data.cache", "none")
    at = settings.index("--run")
    bench.main(["step", *settings[:at], *settings[at + 2 :], "--steps", "2", "--turns", "1", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["timed_step_s"] > figures["step_s"] + 0.2 and not figures["is_kept"]  # six marks and more a step


def test_what_is_kept_decoded_follows_from_cache_crop_and_size(digits):
    def config(**data) -> RunConfig:
        return RunConfig(data=DataConfig(shards=digits, **data), augment=AugmentConfig(crop="random_resized"))

    index = open_index(config())
    for data, expected in (({}, True), ({"cache": "none"}, False), ({"decoded_gb": 1e-6}, False), ({"cache": "disk"}, True),
                           ({"crop": "random_resized", "image_size": 16}, False)):  # fmt: skip
        assert bench_step.is_kept(config(**data), index) == expected, data
    assert bench_step.decoded_bytes(config(), index) == 3 * 8 * 8
    assert bench_step.decoded_bytes(config(crop="resize", image_size=16), index) == 3 * 16 * 16


def test_the_gain_is_amdahls():
    assert bench_step.gain(0.5) == 2 and bench_step.gain(0) == 1 and bench_step.gain(1) == float("inf")
