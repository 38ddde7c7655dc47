"""Prints the table of `launch.py sweep pattern`: a line a pattern, the soonest first.

python docs/figures/pattern.py sweeps/pattern
"""

from __future__ import annotations

import sys
from pathlib import Path

from hybrid_windows import LEARNED, METRIC

from plait.train.sweep.arms import arms
from plait.train.sweep.record import read
from plait.train.sweep.workers import claims


def main(folder: Path) -> None:
    """Prints of each pattern the first evaluation above 0.9 and the accuracy at the end, by seed."""
    lines = []
    for one in arms(folder, read(folder), ["model.pattern"], METRIC):
        runs = [run for seeds, run in one.runs.items() if seeds in one.values]
        firsts = [next((step for step, value in claims.logged(folder, run, METRIC) if value > LEARNED), None) for run in runs]
        ends = [round(value, 2) for value in one.values.values()]
        lines.append((min((step for step in firsts if step), default=10**9), one.keys["model.pattern"], firsts, ends))
    for _, pattern, firsts, ends in sorted(lines):
        print(pattern, firsts, ends)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
