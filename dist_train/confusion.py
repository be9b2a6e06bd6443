"""What a confusion matrix says: figures of each class, the classes most confused, and which is taken for which."""

import numpy as np

MAX_MATRIX_CLASSES = 40  # a larger matrix shows the most confused of them
SHOWN_CLASSES = 30
SHOWN_PAIRS = 8


def class_table(counts: np.ndarray, names: list[str]) -> list[dict]:
    """Precision, recall, F1 and number of samples of each class; None where undefined (0/0).

    counts: (K, K) int, rows the true class. Definitions as in scikit-learn's precision_recall_fscore_support.
    """
    right, of_class, taken = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    rows = []
    for i, name in enumerate(names):
        precision = float(right[i] / taken[i]) if taken[i] else None
        recall = float(right[i] / of_class[i]) if of_class[i] else None
        f1 = float(2 * right[i] / (taken[i] + of_class[i])) if taken[i] + of_class[i] else None
        rows.append({"name": name, "count": int(of_class[i]), "precision": precision, "recall": recall, "f1": f1})
    return rows if len(rows) <= MAX_MATRIX_CLASSES else sorted(rows, key=lambda row: (row["f1"] is None, row["f1"]))


def balanced_accuracy(right: np.ndarray, of_class: np.ndarray) -> float:
    """Mean of the recalls of the classes that occur; nan where none does. As scikit-learn's balanced_accuracy_score.

    right, of_class: (K,) int, hits and samples of each class.
    """
    occurs = of_class > 0
    return float(np.mean(right[occurs] / of_class[occurs])) if occurs.any() else float("nan")


def most_confused(counts: np.ndarray, most: int = SHOWN_CLASSES) -> np.ndarray:
    """Numbers of the classes with the most mistakes, given or received, in class order. counts: (K, K) int."""
    wrong = counts - np.diag(np.diag(counts))
    return np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:most])


def confused_pairs(counts: np.ndarray, names: list[str]) -> list[tuple[str, str, int, float]]:
    """(true class, predicted class, samples, share of the true class) of the most frequent mistakes, most first."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_PAIRS]
    places = [divmod(int(flat), len(names)) for flat in order]
    return [(names[i], names[j], int(wrong[i, j]), wrong[i, j] / counts[i].sum()) for i, j in places if wrong[i, j]]
