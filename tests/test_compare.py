"""Comparing runs: figures are read as they stand, seeds count together, differing settings are shown."""

import json
import re
import statistics
from pathlib import Path

import pytest
import yaml

from dist_train.bars import Bar, bar_chart
from dist_train.compare import comparison, differences, grouped, main, read_all
from dist_train.config import RunConfig
from dist_train.errors import UserError
from dist_train.settings import from_dict, to_dict


def finished_run(folder: Path, top1: float, seconds: float = 10.0, balanced: float | None = None, **changes) -> Path:
    """A run folder with the figures given; changes: section -> {setting: value}."""
    tree = to_dict(RunConfig())
    for section, values in changes.items():
        tree[section] = tree[section] | values if isinstance(values, dict) else values
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(from_dict(RunConfig, tree))))
    figures = {"samples": 100, "loss": 1 - top1, "top1": top1} | ({} if balanced is None else {"balanced": balanced})
    (folder / "result.json").write_text(json.dumps({"step": 20, "epoch": 2.0, "val": figures, "test": figures}))
    lines = [{"kind": "train", "step": 10, "epoch": 1.0, "loss": 1.0, "images_per_s": 500.0, "time_s": seconds / 2},
             {"kind": "eval", "split": "val", "step": 10, "epoch": 1.0, "top1": top1 / 2, "loss": 1.0, "time_s": seconds / 2},
             {"kind": "eval", "split": "val", "step": 20, "epoch": 2.0, "top1": top1, "loss": 0.5, "time_s": seconds}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_seeds_and_folds_count_together_and_differences_are_shown(tmp_path):
    a = [finished_run(tmp_path / f"a{i}", 0.9 + 0.02 * i, seed=i, data={"fold": i, "folds": 3}) for i in range(3)]
    b = finished_run(tmp_path / "b", 0.85, seconds=4.0, optim={"lr": 0.3}, data={"folds": 3})
    groups = grouped(read_all([*a, b]))
    assert [len(group.runs) for group in groups] == [3, 1]
    assert differences(groups) == {"optim.lr": [0.01, 0.3]}
    table = comparison(groups)
    columns = [name for name, _ in table.columns]
    rows = [dict(zip(columns, row, strict=True)) for row in table.rows]
    spread = statistics.stdev([0.9, 0.92, 0.94])
    assert rows[0]["test accuracy"] == f"92.00% ± {spread:.2%}" and rows[1]["test accuracy"] == "85.00%"
    assert rows[0]["run"] == "a0 and 2 more" and rows[1]["time"] == "4.0 s" and rows[1]["samples/s"] == "500"
    main([*map(str, [*a, b]), "--out", str(tmp_path / "page.html")])  # a curve is one run's, and says whose
    (legend,) = re.findall(r'<div class="legend">(.*?)</div>', (tmp_path / "page.html").read_text())
    assert re.findall(r">([^<]+)</span>", legend) == ["a0", "b"]


def test_settings_that_no_result_depends_on_do_not_part_seeds(tmp_path):
    runs = [finished_run(tmp_path / "a", 0.9), finished_run(tmp_path / "b", 0.9, seed=1, data={"cache": "none", "verify": False}),
            finished_run(tmp_path / "c", 0.9, seed=2, train={"profile_steps": 0}, data={"cache_dir": "elsewhere"})]  # fmt: skip
    assert [len(group.runs) for group in grouped(read_all(runs))] == [3]
    others = [finished_run(tmp_path / "d", 0.9, data={"shards": "https://me:word@host/set"}),
              finished_run(tmp_path / "e", 0.9, train={"max_steps": 5}),
              finished_run(tmp_path / "f", 0.9, data={"folds": 5})]  # fmt: skip
    groups = grouped(read_all([*runs, *others]))
    assert [len(group.runs) for group in groups] == [3, 1, 1, 1]
    assert set(differences(groups)) == {"data.shards", "train.max_steps", "data.folds"}
    assert "https://host/set" in comparison(groups).plain() and "word" not in comparison(groups).plain()


def test_balanced_accuracy_has_its_columns_where_a_run_has_it(tmp_path):
    old, new = finished_run(tmp_path / "old", 0.9), finished_run(tmp_path / "new", 0.8, balanced=0.625, optim={"lr": 0.3})
    without = comparison(grouped(read_all([old])))
    assert not any("balanced" in name for name, _ in without.columns)
    table = comparison(grouped(read_all([old, new])))
    rows = [dict(zip([name for name, _ in table.columns], row, strict=True)) for row in table.rows]
    assert [(row["test accuracy"], row["test balanced"], row["val balanced"]) for row in rows] == [
        ("90.00%", "–", "–"), ("80.00%", "62.50%", "62.50%")]  # fmt: skip


def test_runs_judged_on_different_samples_are_not_ranked(tmp_path, capsys):
    runs = [finished_run(tmp_path / name, 0.9, seed=i % 2, data={"shards": f"shards/{name[0]}"})
            for i, name in enumerate(("a0", "a1", "b0", "c0"))]  # fmt: skip
    page = tmp_path / "page.html"

    def told(top1: float = 0.9, **fingerprints: dict[str, str]) -> tuple[list[str], str]:
        """Splits that main says are judged apart, and the page."""
        for run, (split, found) in ((run, at) for run in runs for at in fingerprints.items()):
            (run / f"evaluation-{split}.json").write_text(
                json.dumps({"samples": 100, "top1": top1, "fingerprint": found[run.name[0]]}))  # fmt: skip
        main([*map(str, runs), "--out", str(page)])
        return re.findall("^(.*): the runs were judged on other", capsys.readouterr().out, re.M), page.read_text()

    assert told()[0] == []  # of runs that kept no evaluation nothing is known
    same, other = dict.fromkeys("abc", "1"), {"a": "1", "b": "2", "c": "1"}
    assert told(val=same, test=same)[0] == []
    splits, text = told(val=same, test=other)
    assert splits == ["test"] and "Accuracy, test split, judged on other shards or folds" in text
    assert "Accuracy, val split: highest with" in text
    (runs[3] / "evaluation-test.json").write_text("{")
    assert told()[0] == ["test"]
    assert told(0.8, test=other)[0] == []  # figures of another evaluation than the one compared


def test_the_page_stands_alone(tmp_path, capsys):
    runs = [finished_run(tmp_path / name, top1, model={"width": width})
            for name, top1, width in (("small <b>", 0.8, 0.5), ("large", 0.9, 1.0))]  # fmt: skip
    main([*map(str, runs), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4 and "90.00%" in page and "model.width" in page
    assert "small <b>" not in page and not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    told = capsys.readouterr().out
    assert "large" in told and "page.html" in told


def test_every_folder_that_is_no_finished_run_is_named(tmp_path):
    unfinished = finished_run(tmp_path / "unfinished", 0.5)
    (unfinished / "result.json").unlink()
    damaged = finished_run(tmp_path / "damaged", 0.5)
    (damaged / "result.json").write_text("{")
    with pytest.raises(UserError) as told:
        read_all([tmp_path / "absent", unfinished, damaged])
    trial = finished_run(tmp_path / "trials/a/fold-0", 0.5).parent
    with pytest.raises(UserError, match="trials/a: not a finished run: it has no config.yaml; its runs are: .*/trials/a/fold-\\*"):
        read_all([trial])
    assert all(name in str(told.value) for name in ("absent: not a finished", "no result.json", "damaged: the run cannot"))


def test_bars_are_as_long_as_their_values():
    svg = bar_chart([Bar("one", 1.0), Bar("two", 2.0), Bar("none", float("nan"))], str)
    lengths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert len(lengths) == 2 and lengths[1] == pytest.approx(2 * lengths[0], rel=1e-2)
    chart = bar_chart([Bar("a", 0.97), Bar("b", 0.99, 0.005)], str, zero=False)
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)]
    assert dots[0] < dots[1]
    assert bar_chart([], str) == ""
