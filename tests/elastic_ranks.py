"""Train one run on changing numbers of ranks: run by test_elastic.py, in a process that imports torch once and forks them.

python tests/elastic_ranks.py LOG_FOLDER "1:8 2:16 4:24 1:32" -- SETTINGS...        ranks:steps, one start each
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import dist_train.train  # noqa: E402, F401  once, for all
from benchmarks.chaos import logs, start, wait  # noqa: E402

if __name__ == "__main__":
    folder, plan, settings = Path(sys.argv[1]), sys.argv[2], sys.argv[4:]
    for part in plan.split():
        num_ranks, max_steps = part.split(":")
        ranks = start(int(num_ranks), [*settings, "--train.max_steps", max_steps], folder)
        codes = [wait(rank) for rank in ranks]
        if any(codes):
            sys.exit(f"{part}: exit codes {codes}\n{logs(folder)}")
