"""Draw every measured curve: results/SCRIPT/EXPERIMENT/*.csv -> curve.png beside them.

    python results/plot.py

A folder holds one CSV per seed, each a run's metrics.csv (step, tag, value), possibly thinned.
With several seeds the line is their mean and the band goes from the lowest to the highest.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent


@dataclass
class Experiment:
    folder: str  # below results/
    title: str
    tag: str  # of the curve in metrics.csv
    y: str  # what it is, with its unit
    x: str = "agent steps (millions)"
    x_unit: float = 1e6
    paper: float | None = None  # drawn as a dashed line
    paper_label: str = ""
    window: int = 1  # reports averaged for a point


EXPERIMENTS = [
    Experiment(
        folder="a3c_atari/pong",
        title="A3C on Pong, small network, 2 workers x 8 games",
        tag="charts/episodic_return",
        y="score of a training game",
        paper=11.4,
        paper_label="paper: 11.4 after 80 M steps, human starts, large network",
        window=3,
    ),
    Experiment(
        folder="a3c_atari/breakout",
        title="A3C on Breakout, small network, 2 workers x 8 games",
        tag="charts/episodic_return",
        y="score of a training game",
        window=3,
    ),
]


def read(path: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one tag."""
    with open(path, newline="") as file:
        rows = [
            (float(step), float(value)) for step, name, value in csv.reader(file) if name == tag
        ]
    steps, values = zip(*rows)
    return np.array(steps), np.array(values)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` reports, fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(experiment: Experiment) -> None:
    """curve.png in the experiment's folder."""
    folder = RESULTS / experiment.folder
    curves = [read(path, experiment.tag) for path in sorted(folder.glob("*.csv"))]
    steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    steps = steps[steps <= min(s[-1] for s, _ in curves)]
    values = [np.interp(steps, s, smooth(v, experiment.window)) for s, v in curves]

    figure, axis = plt.subplots(figsize=(6, 3.6))
    axis.plot(steps / experiment.x_unit, np.mean(values, 0), label=f"ours, {len(curves)} seed(s)")
    if len(values) > 1:
        lowest, highest = np.min(values, 0), np.max(values, 0)
        axis.fill_between(steps / experiment.x_unit, lowest, highest, alpha=0.2)
    if experiment.paper is not None:
        axis.axhline(experiment.paper, color="k", ls="--", lw=1, label=experiment.paper_label)
    axis.set(title=experiment.title, xlabel=experiment.x, ylabel=experiment.y)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "curve.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    for experiment in EXPERIMENTS:
        draw(experiment)
        print(RESULTS / experiment.folder / "curve.png")
