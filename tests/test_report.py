"""The report: one file without requests, right figures, and sense made of whatever a run has left."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from made_up_run import make_run
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from dist_train import plots, report
from dist_train.errors import UserError
from dist_train.index import load_index

DIGITS = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("digits"), DIGITS)
    return run, report.write_report(run).read_text()


class Links(HTMLParser):
    """Everything in a page that a browser would fetch, and whether its tags close."""

    def __init__(self, page):
        super().__init__()
        self.links, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "link", "img", "br", "rect", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_the_page_asks_for_nothing_from_outside(digits):
    page = Links(digits[1])
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert page.open == []
    assert "<script" not in digits[1] and "@import" not in digits[1] and "url(" not in digits[1]


def test_the_page_suits_phones_and_dark_rooms(digits):
    assert 'name="viewport" content="width=device-width' in digits[1]
    assert "prefers-color-scheme: dark" in digits[1]


def test_the_page_shows_all_its_parts(digits):
    run, page = digits
    figures = json.loads((run / "result.json").read_text())["test"]
    assert f"{figures['top1']:.2%}" in page
    parts = ["Loss", "Accuracy", "Learning rate", "Samples a second", "Confusion", "Classes", "Worst mistakes",
             "Timings", "Settings", "Environment", "one_cycle", "versions.torch", "marks a restart"]  # fmt: skip
    for part in parts:
        assert part in page, part
    changed = re.findall(r'<tr class="set"><td>(\w+)</td>', page)
    assert set(changed) == {"shards", "global_batch_size", "lr", "schedule"}


def test_pictures_of_mistakes_are_those_in_the_shards(digits):
    run, page = digits
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    mistakes = json.loads((run / "evaluation-test.json").read_text())["mistakes"][: report.MAX_PICTURES]
    assert len(pictures) == len(mistakes) > 5
    split = load_index(run.parent.parent / "shards/demo").split("test")
    tar = (run.parent.parent / "shards/demo/test-000000.tar").read_bytes()
    for encoded, mistake in zip(pictures, mistakes, strict=True):
        row = split.table()[mistake["sample"]]
        assert base64.b64decode(encoded) == tar[int(row["offset"]) :][: int(row["size"])]


def test_shards_that_are_gone_or_changed_are_spoken_of(tmp_path):
    run = make_run(tmp_path, DIGITS)
    tar = tmp_path / "shards/demo/test-000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    assert "the shards have changed since" in report.write_report(run).read_text()
    (tmp_path / "shards/demo/index.json").unlink()
    page = report.write_report(run).read_text()
    assert "are not here" in page and "<img" not in page and "97.0%" in page


def test_an_unfinished_run_has_a_report(tmp_path):
    run = make_run(tmp_path, ["a", "b"], finished=False)
    page = report.write_report(run).read_text()
    assert "not finished: the newest figures are of step 600" in page and page.count("<svg") == 5
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").unlink()
    page = report.write_report(run).read_text()
    assert "has not written figures yet" in page and "<svg" not in page


def test_a_diverged_run_has_a_report(tmp_path):
    run = make_run(tmp_path, ["a", "b"], finished=False)
    line = {
        "kind": "train",
        "step": 610,
        "epoch": 10.2,
        "loss": None,
        "lr": 0.1,
        "images_per_s": None,
        "data_wait": None,
    }
    evaluation = {"kind": "eval", "split": "val", "step": 610, "epoch": 10.2, "loss": None, "top1": 0.1}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(evaluation) + "\n")
    page = report.write_report(run).read_text()
    assert "nan" not in page.lower().replace("nanum", "")


def test_a_table_run_lists_its_mistakes(tmp_path):
    page = report.write_report(make_run(tmp_path, ["benign", "malignant"], pictures=False)).read_text()
    assert "<img" not in page and re.search(r"<td>\d+</td><td>malignant</td><td>benign</td>", page)


def test_a_thousand_classes_show_the_most_confused(tmp_path):
    page = report.write_report(make_run(tmp_path, [f"class {i}" for i in range(1000)], num_test=3000)).read_text()
    assert "30 most confused of 1000 classes" in page and "worst first" in page
    assert len(page) < 1_000_000


def test_names_of_classes_cannot_write_into_the_page(tmp_path):
    page = report.write_report(make_run(tmp_path, ["<b>bold", "a&b", '"quoted"'])).read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "a&amp;b" in page
    assert Links(page).open == []


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"no config\.yaml"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize("name, text", [("result.json", "{"), ("evaluation-test.json", '{"split": "test"}')])
def test_a_damaged_file_is_named(tmp_path, name, text):
    run = make_run(tmp_path, ["a", "b"])
    (run / name).write_text(text)
    with pytest.raises(UserError, match=name):
        report.write_report(run)


def test_the_command_says_where_the_report_is_without_torch(tmp_path):
    run = make_run(tmp_path, ["a", "b"])
    code = "import sys; from dist_train.report import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {run}/report.html\n"


def test_class_table_equals_scikit_learn():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(6, size=500), rng.integers(6, size=500)
    counts = np.zeros((6, 6), int)
    np.add.at(counts, (labels, predicted), 1)
    ours = report.class_table(counts, list("abcdef"))
    theirs = precision_recall_fscore_support(labels, predicted)
    for name, column in zip(("precision", "recall", "f1", "count"), theirs, strict=True):
        np.testing.assert_allclose([row[name] for row in ours], column)


def test_figures_that_are_undefined_are_not_zero():
    empty, missed = report.class_table(np.array([[0, 0], [0, 3]]), ["empty", "right"])
    assert empty == {"name": "empty", "count": 0, "precision": None, "recall": None, "f1": None}
    assert missed["f1"] == 1.0


def test_most_confused_classes_and_pairs():
    counts = np.diag([10, 10, 10, 10, 10])
    counts[1, 3], counts[4, 0] = 5, 2
    assert report.most_confused(counts, 2).tolist() == [1, 3]
    assert report.confused_pairs(counts, list("abcde")) == [("b", "d", 5, 5 / 15), ("e", "a", 2, 2 / 12)]


def test_large_pictures_are_embedded_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8))
    file = io.BytesIO()
    noise.save(file, "PNG")
    uri, small = report.picture_uri(file.getvalue())
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64" and not small
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 171)
    assert report.picture_uri(b"no picture") == (None, False)


@pytest.mark.parametrize("low, high", [(0, 1), (0.97, 0.981), (0, 43210), (1e-6, 3e-5), (5, 5), (0, 0), (-2, 3)])
def test_ticks_are_round_and_cover_the_range(low, high):
    ticks = plots.nice_ticks(low, high, 5)
    gaps = np.diff(ticks)
    assert 2 <= len(ticks) <= 8
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)
    assert f"{gaps[0]:.0e}"[0] in "125" and math.isclose(float(f"{gaps[0]:.0e}"), gaps[0], rel_tol=1e-6)
    assert ticks[0] <= low + 1e-12 and ticks[-1] + gaps[0] >= high


def test_smooth_equals_the_mean_of_each_window():
    y = np.random.default_rng(0).normal(size=50).tolist()
    slow = [np.mean(y[max(0, i - 3) : i + 4]) for i in range(50)]
    np.testing.assert_allclose(plots.smooth(y, 7), slow)
    assert plots.smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]


def test_thinning_keeps_ends_and_spikes():
    y = np.zeros(10_000)
    y[7777] = 5
    x, thinned = plots.thin(list(range(10_000)), y.tolist())
    assert len(x) <= plots.MAX_POINTS and (x[0], x[-1]) == (0, 9999) and x[thinned.index(5)] == 7777


def test_a_chart_is_well_formed_and_keeps_inside_its_frame():
    spiky = plots.Curve("a & b", list(range(100)), [0.5] * 99 + [1e6], band=True)
    svg = plots.line_chart([spiky, plots.Curve("mean", [0, 99], [0.4, 0.6], 1, dots=True)], "step", str, marks=[50])
    root = ElementTree.fromstring(svg)
    for line in root.iter("polyline"):
        points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        assert all(0 <= x <= plots.WIDTH and 0 <= y <= plots.HEIGHT for x, y in points)
    assert plots.line_chart([plots.Curve("x", [1], [math.nan])], "step", str) == ""
