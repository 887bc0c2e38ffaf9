"""Keep of a run's metrics.csv what its figures and tables need, thinned.

    python results/keep.py RUN_FOLDER results/a3c_atari/pong/seed1.csv
    python results/keep.py RUN_FOLDER results/prong/autoencoder/prong__seed1.csv --points 100

Values keep four digits. Every tag keeps its first and last row and evenly spaced ones between.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # the folder that holds metrics.csv
    target: tyro.conf.Positional[Path]  # the file to write
    tags: tuple[str, ...] = ()  # beginnings of the tags to keep; default: all
    points: int = 400  # rows of a tag, at most


def thin(rows: list, points: int) -> list:
    """At most `points` of the rows, the first and the last among them."""
    chosen = np.linspace(0, len(rows) - 1, min(points, len(rows))).round().astype(int)
    return [rows[i] for i in chosen]


def main(args: Args) -> Path:
    rows_of = defaultdict(list)
    with open(args.run / "metrics.csv", newline="") as file:
        for step, tag, value in csv.reader(file):
            if tag.startswith(args.tags or ""):
                rows_of[tag].append((int(step), tag, f"{float(value):.4g}"))
    rows = [row for rows in rows_of.values() for row in thin(rows, args.points)]
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with open(args.target, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(sorted(rows, key=lambda row: row[0]))
    return args.target


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
