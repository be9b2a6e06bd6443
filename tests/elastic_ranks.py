"""Train one run on changing numbers of ranks: run by tests, in a process that imports torch once and forks them.

python tests/elastic_ranks.py LOG_FOLDER "1:8 2:16 4:24:hybrid 1:32" -- SETTINGS...    ranks:steps[:train.parallel], one start each
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ranks import load_torch, logs, start, wait  # noqa: E402

if __name__ == "__main__":
    folder, plan, settings = Path(sys.argv[1]), sys.argv[2], sys.argv[4:]
    load_torch()
    for part in plan.split():
        num_ranks, max_steps, *parallel = part.split(":")
        settings_now = [*settings, "--train.max_steps", max_steps, "--train.parallel", *(parallel or ["ddp"])]
        ranks = start(int(num_ranks), settings_now, folder)
        codes = [wait(rank) for rank in ranks]
        if any(codes):
            sys.exit(f"{part}: exit codes {codes}\n{logs(folder)}")
