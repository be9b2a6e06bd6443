"""Pictures of tables: figures equal to the references', drawn inside their frames, whatever the columns hold."""

import csv
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import write_table
from matplotlib.cbook import boxplot_stats
from sklearn import metrics
from sklearn.feature_selection import f_classif

from dist_train import contact_sheet, figures, plots, ranking, scores, table_plots
from dist_train.convert import convert
from dist_train.figures import draw_correlations
from dist_train.folds import part_of
from dist_train.index import load_index
from dist_train.shard_config import ShardConfig
from dist_train.tables import CONSTANT_STD


def table(num: int = 60, columns: int = 5, num_classes: int = 3):
    rng = np.random.default_rng(0)
    labels = rng.integers(num_classes, size=num)
    values = rng.normal(size=(num, columns)).astype(np.float32) + labels[:, None] * np.arange(columns)
    return values.astype(np.float32), labels


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A table of 60 rows, 5 columns and 3 classes as shards."""
    folder = tmp_path_factory.mktemp("table")
    values, labels = table()
    with open(folder / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*"abcde", "kind"])
        writer.writerows([*map(repr, map(float, row)), f"kind <{label}>"] for row, label in zip(values, labels, strict=True))
    out = str(folder / "set")
    convert(ShardConfig(source="csv", path=str(folder / "t.csv"), target="kind", out=out, workers=1))
    return load_index(out)


def ranked(ties: bool):
    rng = np.random.default_rng(1)
    positive = rng.random(300) < 0.3
    raw = rng.normal(size=300) + positive
    return positive, np.round(raw) if ties else raw


@pytest.mark.parametrize("ties", [False, True])
def test_roc_and_its_area_equal_scikit_learn(ties):
    positive, raw = ranked(ties)
    false, true, _ = metrics.roc_curve(positive, raw, drop_intermediate=False)
    np.testing.assert_allclose(ranking.roc_curve(positive, raw), (false, true))
    assert ranking.area_under_roc(positive, raw) == pytest.approx(metrics.roc_auc_score(positive, raw))


@pytest.mark.parametrize("ties", [False, True])
def test_precision_recall_and_its_average_equal_scikit_learn(ties):
    positive, raw = ranked(ties)
    precision, recall, _ = metrics.precision_recall_curve(positive, raw)
    ours = ranking.precision_recall_curve(positive, raw)
    np.testing.assert_allclose(ours[0], precision[:-1][::-1])  # theirs runs backwards and ends in a made-up point
    np.testing.assert_allclose(ours[1], recall[:-1][::-1])
    assert ranking.average_precision(positive, raw) == pytest.approx(metrics.average_precision_score(positive, raw))
    x, y = scores._steps(*ours)
    assert np.sum(np.diff(x) * y[1:]) == pytest.approx(ranking.average_precision(positive, raw))  # what is drawn


def test_areas_of_many_classes_are_each_against_the_rest():
    rng = np.random.default_rng(2)
    labels, probabilities = rng.integers(4, size=200), rng.dirichlet(np.ones(5), size=200)
    found = scores.areas(labels, probabilities)
    assert found[4] is None  # no sample of it
    for k in range(4):
        assert found[k][0] == pytest.approx(metrics.roc_auc_score(labels == k, probabilities[:, k]))
    titles = [chart.title for chart in scores.ranking_charts(labels, probabilities, list("abcde"))]
    mean = np.mean([area for area, _ in found[:4]])
    assert f"area {mean:.4f}" in titles[0]
    assert scores.ranking_charts(np.zeros(5, int), np.full((5, 2), 0.5), ["a", "b"]) == []


def test_each_chart_shows_its_own_hardest_classes_and_of_equal_ones_the_smallest():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), (60, 40, 30, 20, 4))
    probabilities = random.dirichlet(np.ones(5), size=len(labels)) + 0.4 * (labels[:, None] == np.arange(5))
    found = scores.areas(labels, probabilities)
    order = [sorted(range(5), key=lambda k: found[k][part])[:3] for part in (0, 1)]
    assert set(order[0]) != set(order[1])
    shown = scores.rankings(labels, probabilities, list("abcde"))
    for ranking_, expected in zip(shown, order, strict=True):
        curves = [curve for curve in ranking_.curves if not curve.band]
        assert [curve.name for curve in curves] == ["abcde"[k] for k in expected]
        assert [name.split()[0] for name, _ in ranking_.legend] == [curve.name for curve in curves]
        assert [colour for _, colour in ranking_.legend] == [plots.COLOURS[curve.colour] for curve in curves]
    colours = {(curve.name, curve.colour) for ranking_ in shown for curve in ranking_.curves if not curve.band}
    assert len(colours) == len({name for name, _ in colours})  # a class has one colour
    told_apart = scores.rankings(labels, np.eye(5)[labels], list("abcde"))
    assert [[curve.name for curve in one.curves if not curve.band] for one in told_apart] == [["e", "d", "c"]] * 2


def test_separation_equals_scikit_learns_analysis_of_variance():
    values, labels = table()
    np.testing.assert_allclose(table_plots.separation(values, labels), f_classif(values.astype(float), labels)[0], rtol=1e-5)
    constant = np.column_stack([np.ones(60), labels]).astype(np.float32)
    assert table_plots.separation(constant, labels).tolist() == [0.0, np.inf]


def test_correlation_equals_numpys_and_is_0_with_a_constant():
    values, _ = table()
    np.testing.assert_allclose(table_plots.correlation(values), np.corrcoef(values, rowvar=False), atol=1e-6)
    values[:, 2] = 7
    assert (table_plots.correlation(values)[2] == 0).all()


def holed(num: int = 60, columns: int = 5):
    """A table of which a quarter is missing, and one column (3) all but two values."""
    values, labels = table(num, columns)
    values[np.random.default_rng(4).random(values.shape) < 0.25] = np.nan
    values[2:, 3] = np.nan
    return values, labels


@pytest.mark.filterwarnings("error")
def test_figures_leave_out_what_is_missing():
    values, labels = holed()
    values[:, 1] = np.where(np.isnan(values[:, 1]), np.nan, 7)
    together = table_plots.correlation(values)
    for i in range(5):
        for j in range(5):
            both = ~np.isnan(values[:, [i, j]]).any(axis=1)
            expected = 0 if 1 in (i, j) or both.sum() < 2 else np.corrcoef(values[both][:, [i, j]], rowvar=False)[0, 1]
            assert together[i, j] == pytest.approx(expected, abs=1e-6), (i, j)
    strength = table_plots.separation(values, labels)
    for k in (0, 2, 4):
        known = ~np.isnan(values[:, k])
        assert strength[k] == pytest.approx(f_classif(values[known, k : k + 1].astype(float), labels[known])[0][0], rel=1e-5)
    assert strength[1] == 0
    first, known = values[:, 0], ~np.isnan(values[:, 0])
    assert table_plots.box_plot(first, labels, list("abc")) == table_plots.box_plot(first[known], labels[known], list("abc"))


@pytest.mark.filterwarnings("error")
def test_pictures_of_a_table_say_how_much_is_missing(tmp_path):
    values, labels = holed()
    write_table(tmp_path / "t.csv", "abcde", values, [str(label) for label in labels])
    index = convert(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="kind", missing="mean",
                                out=str(tmp_path / "set"), workers=1))  # fmt: skip
    split = index.split("train")
    rows, labels = table_plots.read_rows(split, len(index.features))
    section = table_plots.table_section(index, split)
    assert f"{np.isnan(rows).sum()} of their {rows.size} values are missing, and left out" in section.note
    notes = {chart.title: chart.note for chart in section.small_charts}
    assert notes["a"] == f"{np.isnan(rows[:, 0]).sum()} missing."
    without = part_of(split, "train", np.flatnonzero(np.isnan(rows[:, 0])), labels)  # of a there is nothing to see
    sections = section, table_plots.table_section(index, without)
    assert "a" not in [chart.title for chart in sections[1].small_charts]
    for chart in [chart for section in sections for chart in (*section.charts, *section.small_charts)]:
        ElementTree.fromstring(chart.svg)
        assert "nan" not in chart.svg
    for part in (split, without):
        draw_correlations(index, part)
    drawn = np.asarray(contact_sheet._feature_spread(index, split).convert("RGB")).astype(int)
    assert (drawn[..., 0] - drawn[..., 2] > 100).any()  # the medians: without a box there are none


def test_columns_that_never_change_are_named_and_not_drawn(tmp_path, capsys, monkeypatch):
    values, labels = table(columns=9)
    write_table(tmp_path / "t.csv", "abcdefghi", values, [str(label) for label in labels])
    index = convert(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="kind", out=str(tmp_path / "set"), workers=1))
    split = index.split("train")
    rows, labels = table_plots.read_rows(split, 9)
    few = part_of(split, "train", np.sort([np.argmin(rows[:, 0]), np.argmax(rows[:, 0])]), labels)
    assert "without two" not in table_plots.table_section(index, few).note
    one = table_plots.table_section(index, part_of(split, "train", np.array([3]), labels))
    assert "; 9 columns without two different values, left out: a, b, c, d, e, f, g, h, i." in one.note
    assert not one.charts and not one.small_charts
    drawn = []
    monkeypatch.setattr(figures, "figure_image", lambda figure, dpi: drawn.append(figure))
    draw_correlations(index, part_of(split, "train", np.array([3]), labels))
    assert not drawn  # of one row nothing goes together
    monkeypatch.setattr(figures, "read_rows", lambda *of_split: (np.where(np.arange(9) == 4, 7, rows), labels))
    draw_correlations(index, split)
    assert [text.get_text() for text in drawn[0].axes[0].get_yticklabels()] == list("abcdfghi")
    capsys.readouterr()
    contact_sheet.print_facts(replace(index, std=[*index.std[:8], CONSTANT_STD]))
    *_, names, mean, std = capsys.readouterr().out.splitlines()
    assert names == "9 features: a, b, c, d, e, f, g, h, i" and mean.count(",") == 8 and std.endswith(", constant")
    many = replace(index, features=[f"c{k}" for k in range(30)], mean=[1.0] * 30, std=[2.0] * 30)
    contact_sheet.print_facts(many)
    assert [line.count(",") for line in capsys.readouterr().out.splitlines()[-3:]] == [20, 20, 20]


@pytest.mark.parametrize("values", [np.random.default_rng(3).standard_cauchy(80), np.array([5.0]), np.array([1.0, 1, 9])])
def test_boxes_equal_matplotlibs(values):
    (theirs,) = boxplot_stats(values)
    expected = [theirs[name] for name in ("whislo", "q1", "med", "q3", "whishi")]
    np.testing.assert_allclose(table_plots.box_figures(values), expected)


def test_features_that_say_the_same_are_paired_once():
    values, _ = table(columns=3)
    doubled = np.column_stack([values[:, 0], values[:, 0] * 2, values[:, 1], values[:, 2]])
    assert table_plots.unlike(doubled, np.array([0, 1, 3, 2]), most=3, alike=0.999).tolist() == [0, 3, 2]
    assert table_plots.unlike(doubled, np.array([0, 1]), most=2).tolist() == [0, 1]  # nothing else to take


def test_rows_are_read_as_they_lie_also_of_a_fold(shards):
    split = shards.split("train")
    values, labels = table_plots.read_rows(split, 5)
    assert values.shape == (split.num_samples, 5)
    known = {tuple(row): label for row, label in zip(table()[0].tolist(), table()[1].tolist(), strict=True)}
    assert [known[tuple(row)] for row in values.tolist()] == labels.tolist()
    members = np.array([3, 4, 20])
    part = part_of(split, "train", members, split.table()["label"])
    np.testing.assert_array_equal(table_plots.read_rows(part, 5)[0], values[members])
    assert len(table_plots.read_rows(split, 5, most=7)[0]) == 7


def test_every_picture_of_a_table_is_well_formed_and_inside_its_frame(shards):
    section = table_plots.table_section(shards, shards.split("train"))
    charts = [*section.charts, *section.small_charts]
    assert len(section.charts) == 2 and len(section.small_charts) == 5
    assert section.small_charts[0].title == "e"  # whose classes lie furthest apart
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        assert "nan" not in chart.svg and "<0>" not in chart.svg
        _, _, width, height = map(float, root.get("viewBox").split())
        for path in root.iter("path"):
            for x, y in re.findall(r"M([-\d.]+) ([-\d.]+)", path.get("d")):
                assert 0 <= float(x) <= width and 0 <= float(y) <= height


@pytest.mark.filterwarnings("error")
def test_odd_tables_are_drawn():
    values, labels = table(columns=1)
    for odd in (values, np.zeros_like(values)):
        ElementTree.fromstring(table_plots.box_plot(odd[:, 0], labels, ["a", "b", "c"]))
    two = np.column_stack([values, np.zeros(60)])
    ElementTree.fromstring(table_plots.pair_scatter(two, labels, ["a", "b"], list("xyz")))
    ElementTree.fromstring(table_plots.correlation_map(table_plots.correlation(two), ["a", "b"]))
    assert "nan" not in table_plots.pair_scatter(np.float32(3e38 * two / np.abs(two).max()), labels, ["a", "b"], list("xyz"))
    many = np.arange(60) % 12
    assert "var(--faint)" in table_plots.box_plot(values[:, 0], many, [str(k) for k in range(12)])  # more than colours
    assert len(plots.COLOURS) >= table_plots.MAX_CLASSES
