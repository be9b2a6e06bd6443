"""The report: one file without requests, right figures, and sense made of whatever a run has left."""

import base64
import dataclasses
import http.server
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from conftest import lines_of, serving, train_tiny
from made_up_run import make_run
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from dist_train import mistakes, plots, report, tries
from dist_train.config import DataConfig, ModelConfig, RunConfig
from dist_train.confusion import class_table, confused_pairs, most_confused
from dist_train.errors import UserError
from dist_train.figures import draw_confusion, draw_figures
from dist_train.index import load_index
from dist_train.models import build_model
from dist_train.settings import to_dict
from dist_train.table_plots import read_rows

DIGITS = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("made_up"), DIGITS)
    return run, report.write_report(run).read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A run of an epoch on the digits."""
    return train_tiny(digits, tmp_path_factory.mktemp("trained") / "runs/tiny", "--train.epochs", "1")


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


def test_the_page_asks_for_nothing_from_outside(made_up):
    page = Links(made_up[1])
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert page.open == []
    assert "<script" not in made_up[1] and "@import" not in made_up[1] and "url(" not in made_up[1]


def test_the_page_suits_phones_and_dark_rooms(made_up):
    assert 'name="viewport" content="width=device-width' in made_up[1]
    assert "prefers-color-scheme: dark" in made_up[1]


def test_the_page_shows_all_its_parts(made_up):
    run, page = made_up
    figures = json.loads((run / "result.json").read_text())["test"]
    assert f"{figures['top1']:.2%}" in page
    parts = ["Loss", "Accuracy", "Learning rate", "Samples a second", "Confusion", "Classes", "Worst mistakes",
             "Timings", "Settings", "Environment", "one_cycle", "versions.torch", "marks a restart"]  # fmt: skip
    for part in parts:
        assert part in page, part
    changed = re.findall(r'<tr class="set"><td>(\w+)</td>', page)
    assert set(changed) == {"shards", "global_batch_size", "lr", "schedule"}


def test_pictures_of_mistakes_are_those_in_the_shards(made_up):
    run, page = made_up
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    worst = json.loads((run / "evaluation-test.json").read_text())["mistakes"][: mistakes.MAX_MISTAKES]
    assert len(pictures) == len(worst) > 5
    split = load_index(run.parent.parent / "shards/demo").split("test")
    tar = (run.parent.parent / "shards/demo/test-000000.tar").read_bytes()
    for encoded, mistake in zip(pictures, worst, strict=True):
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


def test_the_page_says_where_a_step_goes_and_how_near_the_peak_it_is(tmp_path):
    run = make_run(tmp_path, ["cats", "dogs"])
    figures = {"step": 620, "epoch": 10.3, "loss": 0.1, "lr": 0.01, "images_per_s": 900, "data_wait": 0.0, "time_s": 44}
    profile = {"step": 620, "step_s": 0.0712, "data": 0.01, "forward": 0.29, "backward": 0.6, "communication": 0.1, "time_s": 44}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "profile", **profile}) + "\n")
        file.write(json.dumps({"kind": "train", **figures, "tflops": 0.31, "mfu": 0.77}) + "\n")
    page = report.write_report(run).read_text()
    assert "71.2 ms go" in page and "data 1.0%, forward 29.0%, backward 60.0%, communication 10.0%" in page
    assert "0.31, 77.0%" in page


def set_in(run: Path, settings: dict) -> None:
    """Change settings in a run's config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in settings.items():
        section, _, key = name.partition(".")
        config[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def page_with(run: Path, settings: dict) -> str:
    set_in(run, settings)
    return report.write_report(run).read_text()


def test_a_loss_of_softened_targets_is_told_from_a_plain_one(tmp_path):
    run = make_run(tmp_path, ["a", "b"], finished=False)
    assert "softened targets" not in report.write_report(run).read_text()
    page = page_with(run, {"optim.label_smoothing": 0.1, "augment.cutmix": 1.0})
    assert page.count("softened targets (optim.label_smoothing 0.1, augment.cutmix 1)") == 1


def test_a_weighted_loss_is_told_from_a_plain_one(tmp_path):
    run = make_run(tmp_path, ["a", "b"], finished=False)
    page = page_with(run, {"optim.class_weights": 0.5})
    assert page.count("measured with samples weighted by their class (optim.class_weights 0.5), evaluations with all alike: ") == 1
    assert "softened" not in page
    page = page_with(run, {"optim.label_smoothing": 0.1})
    assert "against softened targets (optim.label_smoothing 0.1) and with samples weighted by their class" in page


@pytest.mark.parametrize("short_of, monitor, has_chart", [
    (0.005, "top1", False), (0.2, "top1", True), (0.005, "balanced", True), (None, "balanced", False),
])  # fmt: skip
def test_balanced_accuracy_stands_beside_accuracy_where_it_says_something_else(tmp_path, short_of, monitor, has_chart):
    run = make_run(tmp_path, DIGITS)
    set_in(run, {"train.monitor": monitor})
    result = json.loads((run / "result.json").read_text())
    if short_of is not None:  # else the run is of an earlier version
        lines = [line | ({"balanced": line["top1"] - short_of} if "top1" in line else {}) for line in lines_of(run)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result["test"]["balanced"] = result["test"]["top1"] - short_of
        (run / "result.json").write_text(json.dumps(result))
    shown = report.read_run(run)
    titles = [chart.title for chart in shown["charts"]]
    assert any(title.startswith("Balanced accuracy: best val") for title in titles) == has_chart
    cards = dict(shown["cards"])
    assert cards.get("test balanced accuracy") == (f"{result['test']['balanced']:.2%}" if short_of == 0.2 else None)
    confusion = json.loads((run / "evaluation-test.json").read_text())["confusion"]
    recalls = [row["recall"] for row in class_table(np.array(confusion), DIGITS)]
    assert shown["splits"][0]["balanced"] == pytest.approx(np.mean(recalls))  # of an earlier version's evaluation, too
    page = report.write_report(run).read_text()
    assert f"right, balanced accuracy {np.mean(recalls):.1%}" in page
    assert (">balanced accuracy</th>" in page) == (short_of is not None)


def test_a_diverged_run_has_a_report(tmp_path):
    run = make_run(tmp_path, ["a", "b"], finished=False)
    line = {"kind": "train", "step": 610, "epoch": 10.2, "loss": None, "lr": 0.1, "images_per_s": None, "data_wait": None}
    evaluation = {"kind": "eval", "split": "val", "step": 610, "epoch": 10.2, "loss": None, "top1": 0.1}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(evaluation) + "\n")
    page = report.write_report(run).read_text()
    assert "nan" not in page.lower().replace("nanum", "")


def test_a_table_run_lists_its_mistakes(tmp_path):
    page = report.write_report(make_run(tmp_path, ["benign", "malignant"], pictures=False)).read_text()
    assert "<img" not in page and re.search(r"<td>test/malignant/\d+.png</td><td>malignant</td><td>benign</td>", page)


def test_a_finished_run_on_a_table_has_its_pictures_and_the_right_areas(tmp_path):
    run = make_run(tmp_path, ["benign", "malignant"], pictures=False)
    data = DataConfig(shards=str(tmp_path / "shards/demo"), train_split="test")
    config = RunConfig(data=data, model=ModelConfig(name="mlp", hidden=(4,)))
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    about = {"classes": ["benign", "malignant"], "features": ["a", "b"], "mean": [0.4, 0.6], "std": [0.2, 0.3],
             "image_size": None, "eval_crop": 0.0, "one_size": False}  # fmt: skip
    (run / "inference.json").write_text(json.dumps(about))
    network = build_model(config.model, 2, None, 2, seed=1)
    save_file(network.state_dict(), run / "weights.safetensors")
    index = load_index(tmp_path / "shards/demo")
    values, labels = read_rows(index.split("test"), 2)
    inputs = (torch.from_numpy(values) - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    with torch.no_grad():
        logits = network.eval()(inputs).numpy()
    area = roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    page = report.write_report(run).read_text()
    for part in (
        f"ROC curve for malignant: area {area:.4f}",
        "Precision and recall",
        "Correlation",
        "In pairs",
        "av. precision",
    ):
        assert part in page, part
    assert page.count(f'<td class="number">{area:.4f}</td>') == 2  # of two classes, both have the same
    assert Links(page).open == []
    drawn, complaints = draw_figures(run, index)
    assert sorted(drawn) == ["pictures/confusion-test", "pictures/correlations", "pictures/ranking-test"] and not complaints
    for path in drawn.values():
        with Image.open(path) as image:
            assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 10
    (run / "weights.safetensors").write_bytes(b"damaged")
    drawn, complaints = draw_figures(run, index)
    assert "pictures/ranking-test" not in drawn and complaints[0].startswith("the picture pictures/ranking-test is missing: ")
    page = report.write_report(run).read_text()
    assert "No ROC and precision-recall curves" in page and "Correlation" in page


def test_shards_behind_a_url_show_their_pictures(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(tries, "PATIENCE_S", 0.0)  # once the server is gone
    folder = made_up[0].parent.parent / "shards/demo"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args): ...

    run = tmp_path / "runs/demo"
    shutil.copytree(made_up[0], run)
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)) as address:
        url = f"{address}?signature=geheim"
        set_in(run, {"data.shards": url, "data.cache_dir": str(tmp_path / "cache")})
        (run / "environment.json").write_text(json.dumps({"command": f"dist-train train --data.shards {url}"}))
        page = report.write_report(run).read_text()
        assert "--data.shards http://127.0.0.1" in page and "geheim" not in page
        (run / "inference.json").write_text(json.dumps({"classes": DIGITS[::-1]}))
        assert "geheim" not in report.write_report(run).read_text()
        (run / "inference.json").write_bytes((made_up[0] / "inference.json").read_bytes())
    pictures = re.findall(r'src="(data:image/png[^"]+)"', page)
    assert pictures == re.findall(r'src="(data:image/png[^"]+)"', made_up[1])
    page = report.write_report(run).read_text()  # the server is gone
    assert "No pictures: http://127.0.0.1" in page and "<img" not in page and "geheim" not in page


def test_a_trained_run_shows_its_data_its_augmentation_and_its_filters(trained):
    page = report.write_report(trained).read_text()
    for part in (
        "Samples as stored",
        "As the network sees them",
        "epoch 3",
        "Pixel values: grey",
        "First layer: 8 filters of 3 × 3",
    ):
        assert part in page, part
    assert Links(page).open == [] and len(page) < 1_000_000


def test_the_pictures_of_a_run_are_written_once_each_and_named(trained):
    index = load_index(yaml.safe_load((trained / "config.yaml").read_text())["data"]["shards"])
    drawn, complaints = draw_figures(trained, index)
    assert complaints == []
    names = ["samples", "augmentation", "filters", "confusion-test", "mistakes-test", "confusion-val", "mistakes-val"]
    assert sorted(drawn) == sorted(f"pictures/{name}" for name in names)
    for path in drawn.values():
        with Image.open(path) as image:
            assert min(image.size) > 50 and len(np.unique(np.asarray(image.convert("L")))) > 10
    gone = dataclasses.replace(index, splits={name: dataclasses.replace(split, files=["gone"] * split.num_shards)
                                              for name, split in index.splits.items()})  # fmt: skip
    drawn, complaints = draw_figures(trained, gone)
    assert "pictures/filters" in drawn and "pictures/samples" not in drawn
    assert any("samples is missing" in complaint for complaint in complaints)


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
    ours = class_table(counts, list("abcdef"))
    theirs = precision_recall_fscore_support(labels, predicted)
    for name, column in zip(("precision", "recall", "f1", "count"), theirs, strict=True):
        np.testing.assert_allclose([row[name] for row in ours], column)


def test_figures_that_are_undefined_are_not_zero():
    empty, missed = class_table(np.array([[0, 0], [0, 3]]), ["empty", "right"])
    assert empty == {"name": "empty", "count": 0, "precision": None, "recall": None, "f1": None}
    assert missed["f1"] == 1.0


def test_most_confused_classes_and_pairs():
    counts = np.diag([10, 10, 10, 10, 10])
    counts[1, 3], counts[4, 0] = 5, 2
    assert most_confused(counts, 2).tolist() == [1, 3]
    assert confused_pairs(counts, list("abcde")) == [("b", "d", 5, 5 / 15), ("e", "a", 2, 2 / 12)]


def test_turned_and_deep_pictures_are_shown_as_the_network_sees_them():
    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.fromarray(np.full((20, 40, 3), 90, np.uint8)).save(file, "JPEG", exif=turned)
    uri, _ = mistakes.picture_uri(file.getvalue())
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (20, 40)
    deep = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 90_000).reshape(300, 300).astype(np.uint16)).save(deep, "PNG")
    uri, _ = mistakes.picture_uri(deep.getvalue())
    assert abs(np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).mean() - 127) < 3


def test_large_pictures_are_embedded_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8))
    file = io.BytesIO()
    noise.save(file, "PNG")
    uri, small = mistakes.picture_uri(file.getvalue())
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64" and not small
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 171)
    assert mistakes.picture_uri(b"no picture") == (None, False)


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


def test_small_rates_have_labels_of_their_own():
    for peak in (1.5e-4, 2e-4, 2.4e-5, 8e-6, 0.3):
        labels = [report._rate(tick) for tick in plots.nice_ticks(0, peak, 4)]
        assert len(set(labels)) == len(labels), labels
    assert [report._rate(rate) for rate in (0, 1.5e-4, 1e-4, 0.05)] == ["0", "1.5e-4", "1e-4", "0.05"]


def test_dollars_in_names_are_dollars():
    counts = np.array([[3, 1], [2, 4]])
    assert draw_confusion(counts, ["$1_$5", "x$^$"]).size == draw_confusion(counts, ["a", "b"]).size


@pytest.mark.parametrize("num_classes", [2, 5, 10, 14, 30])
def test_letters_of_a_matrix_stay_readable_on_a_phone(num_classes):
    svg = plots.heat_map(np.eye(num_classes, dtype=int), [f"class number {k}" for k in range(num_classes)])
    width = float(re.search(r'viewBox="0 0 (\d+) ', svg)[1])
    least = float(re.search(r"width:\d+px;max-width:max\(100%,(\d+)px\)", svg)[1])
    assert 10 < 12 * least / width < 12  # px: page.css has 12 at full width


def test_wide_letters_have_room():
    wide = "漢字仮名交じり文十字"
    picture = ElementTree.fromstring(plots.heat_map(np.eye(2, dtype=int), [wide, "b"]))
    (place,) = {float(label.get("x")) for label in picture.iter() if label.text == wide and label.get("text-anchor") == "end"}
    assert place >= plots.text_width(wide) == 120
