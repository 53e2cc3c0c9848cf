"""Learning rates of both modes, judged on the validation items alone: how the shipped recipes got theirs.

    FEDTOWER_DATA=... python benchmarks/tuning.py dssm-ml-100k

Prints a table, a line a setting, best first, and writes it as JSON beside itself. The test items are never looked at.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import fedtower
from fedtower.recsys.runlog import RunLog

GRIDS = {
    "simulated": {"server.lr": (0.0025, 0.005), "rows.lr": (0.025, 0.05, 0.1)},
    "standalone": {"standalone.lr": (0.002, 0.004), "standalone.row_lr": (0.05, 0.1, 0.2)},
}


def main(recipe: str, modes: list[str]) -> None:
    """Run the grid of each mode and print what the validation items say."""
    rows = []
    for mode in modes or list(GRIDS):
        for values in itertools.product(*GRIDS[mode].values()):
            settings = dict(zip(GRIDS[mode], values, strict=True))
            with tempfile.TemporaryDirectory() as runs:
                done = fedtower.run(recipe, {"mode": mode, **settings}, runs=runs)
                figures = RunLog(done.folder).record().final("validation")[-1]["metrics"]
            rows.append({"mode": mode, **settings, "HR@10": figures["HR@10"], "NDCG@10": figures["NDCG@10"]})
            print(rows[-1], flush=True)
    rows.sort(key=lambda row: (row["mode"], -row["NDCG@10"]))
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    out = Path(__file__).with_name(f"tuning-{recipe}.json")
    out.write_text(json.dumps({"recipe": recipe, "judged on": "validation items", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    # `make bench` names no recipe: this takes half an hour and needs real data, so it is run on purpose only.
    if len(sys.argv) > 1:
        main(sys.argv[1], sys.argv[2:])
    else:
        print(__doc__)
