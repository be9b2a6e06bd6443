"""Test accuracy of a recipe on a table beside scikit-learn's LogisticRegression and MLPClassifier, on the same split.

    python benchmarks/table_accuracy.py --recipe recipes/breast-cancer-mlp.yaml --seeds 5

Each seed draws the split into training, validation and test anew, and the weights too; writes
benchmarks/results/table_accuracy.json.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dist_train import shard
from dist_train.config import RunConfig
from dist_train.data import open_evaluation
from dist_train.durable import replace_json
from dist_train.index import load_index
from dist_train.settings import read_config
from dist_train.train import run_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/breast-cancer-mlp.yaml")
    parser.add_argument("--dataset", help="default: datasets/<set of the recipe>.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/table_accuracy.json")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, after --")
    options = parser.parse_args()
    config = read_config(RunConfig, options.overrides, "table_accuracy", [options.recipe])
    dataset = options.dataset or f"datasets/{Path(config.data.shards).name}.yaml"
    accuracy, seconds = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            shards, run = f"{scratch}/shards-{seed}", Path(scratch, f"run-{seed}")
            with contextlib.redirect_stdout(io.StringIO()):
                shard.main([dataset, "--out", shards, "--seed", str(seed), "--workers", "1"])
                began = time.perf_counter()
                run_training(["--config", options.recipe, "--run", str(run), "--data.shards", shards, "--seed", str(seed),
                              "--track.wandb", "off", *options.overrides])  # fmt: skip
                seconds.append(time.perf_counter() - began)
            figures = {
                "dist_train": json.loads((run / "result.json").read_text())["test"]["top1"],
                **scikit_learn(shards, seed),
            }
            for name, value in figures.items():
                accuracy.setdefault(name, []).append(value)
            test_rows = load_index(shards).split("test").num_samples
            packages = json.loads((run / "environment.json").read_text())
            print(f"seed {seed}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
    result = {
        "what": "test accuracy, a new split and new weights for each seed", "recipe": options.recipe, "n": options.seeds,
        "test_rows": test_rows, "date": time.strftime("%Y-%m-%d"),
        "cpu": packages["cpu"], "cores": packages["cores"], "packages": packages["packages"],
        "mean": {name: round(statistics.fmean(values), 5) for name, values in accuracy.items()},
        "median": {name: round(statistics.median(values), 5) for name, values in accuracy.items()},
        "standard_deviation": {name: round(statistics.pstdev(values), 5) for name, values in accuracy.items()},
        "each": accuracy, "training_seconds_median": round(statistics.median(seconds), 1),
    }  # fmt: skip
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    replace_json(Path(options.out), result)
    print(
        json.dumps(
            {key: result[key] for key in ("n", "mean", "standard_deviation", "training_seconds_median")}, indent=1
        )
    )


def scikit_learn(shards: str, seed: int) -> dict[str, float]:
    """Test accuracy of scikit-learn's classifiers, standardised by what they train on.

    Trained on the same rows as the recipe; and, as they need no validation rows, on those besides ("... + val").
    """
    train, more, test = _rows(shards, "train"), _rows(shards, "train", "val"), _rows(shards, "test")
    models = {
        "LogisticRegression": LogisticRegression(max_iter=1000),
        "MLPClassifier": MLPClassifier(max_iter=500, random_state=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {name + extra: make_pipeline(StandardScaler(), model).fit(*rows).score(*test)
                for extra, rows in (("", train), (" + val", more)) for name, model in models.items()}  # fmt: skip


def _rows(shards: str, *splits: str) -> tuple[np.ndarray, np.ndarray]:
    index = load_index(shards)
    batches = [batch for split in splits for batch in open_evaluation(index, split, 256, threads=1)]
    return np.concatenate([b.images.numpy() for b in batches]), np.concatenate([b.labels.numpy() for b in batches])


if __name__ == "__main__":
    main()
