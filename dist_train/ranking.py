"""How well scores put one class before the rest: ROC and precision-recall curves, and the areas under them."""

import numpy as np


def roc_curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates as the threshold falls, from (0, 0) to (1, 1); equal scores are one step.

    positive: (N,) bool; scores: (N,) float, more is likelier. Needs samples of both kinds.
    """
    true, false = _counts(positive, scores)
    return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def area_under_roc(positive: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a positive sample scores above a negative one, ties counting half (Hanley and McNeil 1982)."""
    false, true = roc_curve(positive, scores)
    return float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))


def precision_recall_curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall as the threshold falls, one pair for each distinct score. Arguments as in `roc_curve`."""
    true, false = _counts(positive, scores)
    return true / (true + false), true / true[-1]


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Precision averaged over the recall it is reached at: the area under the steps, not under straight lines,
    which would flatter (Davis and Goadrich 2006)."""
    precision, recall = precision_recall_curve(positive, scores)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def _counts(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives at each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    positive, scores = np.asarray(positive, bool)[order], scores[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    true = np.cumsum(positive)[ends]
    return true, ends + 1 - true
