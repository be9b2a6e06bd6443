"""What a run's network says of every row of a table, and the curves drawn from it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_train import plots
from dist_train.index import SplitIndex
from dist_train.page import Chart
from dist_train.ranking import area_under_roc, average_precision, precision_recall_curve, roc_curve
from dist_train.table_plots import read_vectors

SHOWN_CLASSES = 3


def table_scores(run: Path, split: SplitIndex) -> tuple[np.ndarray, np.ndarray]:
    """Classes (N,) int64 and the network's probabilities (N, K) float64 of a split, in its order.

    Raises UserError if the run is not finished or a row cannot be read.
    """
    import torch

    from dist_train.evaluate import standardised
    from dist_train.predict import load_run

    trained = load_run(run)
    values = read_vectors(split, np.arange(split.num_samples), len(trained.features))
    with torch.no_grad():
        logits = torch.cat([trained.network(standardised(rows, trained)) for rows in torch.from_numpy(values).split(65_536)])
    return split.table()["label"].astype(np.int64), logits.double().softmax(1).numpy()


def areas(labels: np.ndarray, probabilities: np.ndarray) -> list[tuple[float, float] | None]:
    """(area under the ROC curve, average precision) of each class against the rest; None where a class has no such.

    labels: (N,) int; probabilities: (N, K).
    """
    found = []
    for k in range(probabilities.shape[1]):
        positive = labels == k
        if positive.any() and not positive.all():
            scores = probabilities[:, k]
            found.append((area_under_roc(positive, scores), average_precision(positive, scores)))
        else:
            found.append(None)
    return found


class Ranking(NamedTuple):
    """What a chart of ROC or precision-recall curves shows. legend: (name, colour variable) of each curve that is no band."""

    title: str
    x_name: str
    curves: list[plots.Curve]
    legend: list[tuple[str, str]]
    note: str


def ranking_charts(labels: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> list[Chart]:
    """The curves of `rankings` as charts of a page."""
    return [
        Chart(found.title, plots.line_chart(found.curves, found.x_name, "{:.0%}".format, zero=True), found.legend, found.note)
        for found in rankings(labels, probabilities, classes)
    ]


def rankings(labels: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> list[Ranking]:
    """ROC and precision-recall curves: of the second class where there are two, else of each chart's hardest against the rest.

    The hardest have the smallest area under that chart's curve; of equal ones those of the fewest samples come first.
    labels: (N,) int; probabilities: (N, K). Empty where no class can be ranked.
    """
    by_class = areas(labels, probabilities)
    rankable = [k for k, found in enumerate(by_class) if found]
    if not rankable:
        return []
    counts = np.bincount(labels, minlength=len(classes))
    shown = [[1] if len(classes) == 2 else sorted(rankable, key=lambda k: (by_class[k][part], counts[k]))[:SHOWN_CLASSES]
             for part in (0, 1)]  # fmt: skip
    colour_of = {k: colour for colour, k in enumerate(dict.fromkeys(shown[0] + shown[1]))}  # the same in both charts
    whose = f" for {classes[1]}" if len(classes) == 2 else ""
    note = "" if len(rankable) <= SHOWN_CLASSES or len(classes) == 2 else f"The {SHOWN_CLASSES} hardest classes; "
    if len(classes) > 2:
        note += "each class against the rest. The title has the mean over the classes."
    roc, precise = [plots.Curve("by chance", [0, 1], [0, 1], band=True)], []
    for k in shown[0]:
        false, true = roc_curve(labels == k, probabilities[:, k])
        roc.append(plots.Curve(classes[k], false.tolist(), true.tolist(), colour_of[k]))
    for k in shown[1]:
        steps = _steps(*precision_recall_curve(labels == k, probabilities[:, k]))
        precise.append(plots.Curve(classes[k], *steps, colour_of[k]))
    if len(classes) == 2:
        share = float((labels == 1).mean())
        precise.append(plots.Curve("by chance", [0, 1], [share, share], band=True))
    means = np.mean([by_class[k] for k in ([1] if len(classes) == 2 else rankable)], axis=0)
    legends = [[(f"{classes[k]} {by_class[k][part]:.4f}", plots.COLOURS[colour_of[k]]) for k in shown[part]]
               if len(classes) > 2 else [] for part in (0, 1)]  # fmt: skip
    return [
        Ranking(f"ROC curve{whose}: area {means[0]:.4f}", "false positive rate", roc, legends[0], note),
        Ranking(f"Precision and recall{whose}: average precision {means[1]:.4f}", "recall", precise, legends[1], note),
    ]


def _steps(precision: np.ndarray, recall: np.ndarray) -> tuple[list[float], list[float]]:
    """x and y of the steps under which the average precision lies."""
    x = np.repeat(np.append(0.0, recall), 2)[1:-1]
    return x.tolist(), np.repeat(precision, 2).tolist()
