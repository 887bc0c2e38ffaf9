"""Draw every measured curve: results/SCRIPT/EXPERIMENT/*.csv -> curve.png beside them.

overview.png has a panel for each script, in the README's order: the first of its experiments below.

    python results/plot.py              # all of them
    python results/plot.py prong        # those whose folder has this in its name

A folder holds one CSV per run, a metrics.csv (step, tag, value) that results/keep.py has thinned,
named LABEL__seedN.csv, or seedN.csv where there is only one line to draw. A line is the mean over
its seeds, its band goes from the lowest to the highest.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

RESULTS = Path(__file__).parent


class Axis(NamedTuple):
    """What a curve is drawn against."""

    label: str  # with its unit
    unit: float = 1
    table: str = ""  # of results/speed, whose milliseconds of a line's update make them seconds


STEPS = Axis("agent steps (millions)", 1e6)
UPDATES = Axis("updates (thousands)", 1e3)
EPOCHS = Axis("epochs")
CHARACTERS = Axis("characters (millions)", 1e6)
MUSHROOMS = Axis("mushrooms met (thousands)", 1e3)


@dataclass
class Experiment:
    folder: str  # below results/
    title: str
    tag: str  # of the curve in metrics.csv
    y: str  # what it is, with its unit
    x: tuple[Axis, ...] = (STEPS,)  # one panel each
    beside: tuple[tuple[str, str, str], ...] = ()  # dotted lines: label, CSV below results/, tag
    paper: float | None = None  # drawn as a dashed line
    paper_label: str = ""
    window: int = 1  # reports averaged for a point
    logarithmic: bool = False
    limits: tuple[float, float] | None = None  # of y


EXPERIMENTS = [
    Experiment(
        folder="a3c_atari/pong",
        title="A3C on Pong, small network, 2 workers x 8 games",
        tag="charts/episodic_return",
        y="score of a training game",
        paper=11.4,
        paper_label="paper: 11.4 (80 M steps, human starts)",
        window=3,
    ),
    Experiment(
        folder="a3c_atari/breakout",
        title="A3C on Breakout, small network, 2 workers x 8 games",
        tag="charts/episodic_return",
        y="score of a training game",
        paper=551.6,
        paper_label="paper: 551.6 (80 M steps, human starts)",
        window=3,
        logarithmic=True,
    ),
    Experiment(
        folder="async_nstep_q/pong",
        title="One-step Q, one-step Sarsa, n-step Q and A3C on Pong, 2 workers x 8 games",
        tag="charts/episodic_return",
        y="score of a training game",
        beside=(("A3C", "a3c_atari/pong/orthogonal-init__seed1.csv", "charts/episodic_return"),),
        window=3,
    ),
    Experiment(
        folder="a3c_continuous/inverted_pendulum",
        title="A3C holds a pole upright, from states",
        tag="charts/episodic_return",
        y="return of a training episode",
        paper=950,
        paper_label="gymnasium's mark: 950",
        window=3,
    ),
    Experiment(
        folder="a3c_continuous/pendulum",
        title="A3C swings a pendulum up and holds it, from states",
        tag="charts/episodic_return",
        y="return of a training episode",
        window=3,
    ),
    Experiment(
        folder="a3c_continuous/reacher",
        title="A3C reaches a point with an arm of two joints",
        tag="charts/episodic_return",
        y="return of a training episode",
        window=3,
    ),
    Experiment(
        folder="a3c_continuous/half_cheetah",
        title="A3C makes a half cheetah run",
        tag="charts/episodic_return",
        y="return of a training episode",
        window=3,
    ),
    Experiment(
        folder="a3c_maze/apples",
        title="A3C looks for apples and a portal in mazes of 3 x 3 rooms",
        tag="charts/episodic_return",
        y="return of a training episode",
        paper=50,
        paper_label="paper: about 50, in Labyrinth",
        window=3,
    ),
    Experiment(
        folder="bayes_by_backprop/mnist",
        title="Bayes by Backprop and its rivals: MNIST, 2 x 400 units (figure 2)",
        tag="test/error_of_mean",
        y="test error (%)",
        x=(EPOCHS,),
        paper=1.36,
        paper_label="paper, Bayes by Backprop: 1.36 after 600 epochs",
        limits=(1.1, 2.4),
    ),
    Experiment(
        folder="bayes_by_backprop/mnist_600",
        title="Bayes by Backprop and its rivals: MNIST, 600 epochs",
        tag="test/error_of_mean",
        y="test error (%)",
        x=(EPOCHS,),
        paper=1.36,
        paper_label="paper, Bayes by Backprop: 1.36 after 600 epochs",
        limits=(1.1, 2.4),
    ),
    Experiment(
        folder="bayes_by_backprop/bandit",
        title="Bayes by Backprop and greedy agents: mushrooms to eat or to leave (figure 6)",
        tag="charts/regret",
        y="cumulative regret",
        x=(MUSHROOMS,),
        paper=5700,
        paper_label="paper, Bayes by Backprop: 5,700 after 50,000",
        logarithmic=True,
    ),
    Experiment(
        folder="prong/autoencoder",
        title="PRONG and its rivals: an autoencoder of MNIST, 784-1000-500-250-30 and back",
        tag="eval/train_loss",
        y="training loss (nats per image)",
        x=(UPDATES, Axis("seconds (updates x milliseconds of one alone)", 1e3, "prong.md")),
        logarithmic=True,
    ),
    Experiment(
        folder="prong/batch_128",
        title="PRONG: the same with batches of 128 images, the paper's",
        tag="eval/train_loss",
        y="training loss (nats per image)",
        x=(UPDATES,),
        logarithmic=True,
    ),
    Experiment(
        folder="prong/period",
        title="PRONG: updates between two whitenings, same autoencoder",
        tag="eval/train_loss",
        y="training loss (nats per image)",
        x=(UPDATES,),
        logarithmic=True,
    ),
    Experiment(
        folder="prong/fisher",
        title="PRONG: the middle layer's Fisher matrix while a tanh network learns digits",
        tag="eval/condition",
        y="condition number",
        x=(UPDATES,),
        logarithmic=True,
    ),
    Experiment(
        folder="prong/cifar10",
        title="PRONG and its rivals: CIFAR-10, 45,000 training images",
        tag="eval/validation_error",
        y="validation error (%)",
        x=(UPDATES,),
        paper=7.32,
        paper_label="paper, PRONG, test, to the end: 7.32",
    ),
    Experiment(
        folder="cyclic_rotation_cnn/rotated-mnist",
        title="Cyclic symmetry: turned digits, 12,000 to learn from",
        tag="eval/error",
        y="test error (%)",
        x=(EPOCHS,),
        logarithmic=True,
    ),
    Experiment(
        folder="cyclic_rotation_cnn/plankton_95",
        title="Cyclic symmetry: plankton at 95x95",
        tag="eval/loss",
        y="cross-entropy of the hold-out",
        x=(EPOCHS,),
        paper=0.678,
        paper_label="paper, pool: 0.678",
        logarithmic=True,
    ),
    Experiment(
        folder="cyclic_rotation_cnn/plankton",
        title="Cyclic symmetry: plankton at 47x47",
        tag="eval/loss",
        y="cross-entropy of the hold-out",
        x=(EPOCHS,),
        paper=0.6764,
        paper_label="paper, roll-dense: 0.6764 at 95x95",
        logarithmic=True,
    ),
    Experiment(
        folder="recurrent_visual_attention/mnist",
        title="RAM: digits, six glimpses",
        tag="validation/error",
        y="validation error (%)",
        x=(EPOCHS,),
        paper=1.12,
        paper_label="paper, test: 1.12 (NIPS)",
        logarithmic=True,
    ),
    Experiment(
        folder="recurrent_visual_attention/translated",
        title="RAM: moved digits, eight glimpses",
        tag="validation/error",
        y="validation error (%)",
        x=(EPOCHS,),
        paper=1.20,
        paper_label="paper, test: 1.20 (NIPS)",
        logarithmic=True,
    ),
    Experiment(
        folder="recurrent_visual_attention/cluttered",
        title="RAM: cluttered digits, eight glimpses",
        tag="validation/error",
        y="validation error (%)",
        x=(EPOCHS,),
        paper=4.04,
        paper_label="paper, test: 4.04 (NIPS)",
        logarithmic=True,
    ),
    Experiment(
        folder="recurrent_visual_attention/cluttered100",
        title="RAM: cluttered digits in 100x100 pixels, eight glimpses",
        tag="validation/error",
        y="validation error (%)",
        x=(EPOCHS,),
        paper=8.11,
        paper_label="paper, test: 8.11 (NIPS)",
        logarithmic=True,
    ),
    Experiment(
        folder="recurrent_visual_attention/catch",
        title="RAM: Catch",
        tag="eval/caught",
        y="balls caught (%)",
        x=(EPOCHS,),
        paper=85,
        paper_label="paper, after 20 M frames: about 85",
    ),
    Experiment(
        folder="multi_object_attention/pairs",
        title="DRAM: pairs of digits among clutter, four glimpses",
        tag="validation/error",
        y="validation error (%)",
        x=(EPOCHS,),
        paper=5,
        paper_label="paper, test: 5",
        logarithmic=True,
    ),
    Experiment(
        folder="multi_object_attention/pairs_wide",
        title="DRAM: pairs of digits, patches of 12 to 96 pixels",
        tag="validation/error",
        y="validation error (%)",
        x=(EPOCHS,),
        paper=5,
        paper_label="paper, test: 5",
        logarithmic=True,
    ),
    Experiment(
        folder="multi_object_attention/addition",
        title="DRAM: sums of two digits, four glimpses",
        tag="validation/error",
        y="validation error (%)",
        x=(EPOCHS,),
        paper=2.5,
        paper_label="paper, test: 2.5",
        logarithmic=True,
    ),
]

for run, title, error in (
    ("R_fcn", ": turned digits", 1.2),
    ("RTS_fcn", ": turned, scaled and moved digits", 0.8),
    ("R_cnn", " in convolutional networks: turned digits", 0.7),
    ("addition_fcn", ": the sum of two digits", 9.0),
):
    EXPERIMENTS.append(
        Experiment(
            folder=f"spatial_transformer_mnist/{run}_long",
            title=f"Spatial transformers{title}, the paper's length",
            tag="eval/error",
            y="test error (%)",
            x=(UPDATES,),
            paper=error,
            paper_label=f"paper, affine: {error}",
            logarithmic=True,
        )
    )

TRANSFORMED = {  # distortion: what it is, the paper's errors of an affine FCN and of a CNN
    "R": ("turned digits", 1.2, 0.7),
    "RTS": ("turned, scaled and moved digits", 0.8, 0.5),
    "P": ("projected digits", 1.5, 0.8),
    "E": ("bent digits", 2.7, 1.2),
    "TC": ("moved digits among clutter", 2.0, 1.7),
    "addition": ("the sum of two digits", 9.0, None),
}
kinds = {"fcn": "fully connected", "cnn": "convolutional"}
for distortion, (what, *errors) in TRANSFORMED.items():
    transformer = "two affine" if distortion == "addition" else "affine"
    for model, error in zip(("fcn", "cnn"), errors):
        EXPERIMENTS.append(
            Experiment(
                folder=f"spatial_transformer_mnist/{distortion}_{model}",
                title=f"Spatial transformers in {kinds[model]} networks: {what}",
                tag="eval/error",
                y="test error (%)",
                x=(UPDATES,),
                paper=error,
                paper_label=f"paper, {transformer}: {error} after 150,000",
                logarithmic=True,
            )
        )

OPTIMAL_11, OPTIMAL_15 = (
    (("optimal", f"straw/maze_{size}/straw__seed1.csv", "charts/optimal_return"),)
    for size in (11, 15)
)
LEARNED = (("gates learned", "straw/maze_11/straw__seed1.csv", "charts/episodic_return"),)
for folder, title, y, beside in (
    ("straw/maze_11", "STRAW in mazes of 11x11 cells, goals ever farther", "return", OPTIMAL_11),
    ("straw/ablations", "STRAW in mazes of 11x11, gates not learned", "return", LEARNED),
    ("straw/maze_15", "STRAW in mazes of 15x15 cells, goals ever farther", "return", OPTIMAL_15),
    ("straw/ms_pacman", "STRAW on Ms. Pacman, a short run", "score of a training game", ()),
    ("straw/frostbite", "STRAW on Frostbite, a short run", "score of a training game", ()),
    ("gorila_dqn/pong", "Gorila on Pong, bundles on 2 cores", "score of a training game", ()),
    ("gorila_dqn/breakout", "Gorila on Breakout, 2 bundles", "score of a training game", ()),
):
    EXPERIMENTS.append(
        Experiment(folder, title, "charts/episodic_return", y, beside=beside, window=5)
    )
EXPERIMENTS.append(
    Experiment(
        folder="straw/text",
        title="STRAW reads Shakespeare",
        tag="losses/bits_per_character",
        y="bits per character of training",
        x=(CHARACTERS,),
        window=3,
    )
)
for game in ("qbert", "freeway"):
    EXPERIMENTS.append(
        Experiment(
            folder=f"policy_distillation/{game}",
            title=f"Policy distillation: students of a teacher of {game.capitalize()}",
            tag="charts/agreement",
            y="actions that are the teacher's (share)",
            x=(UPDATES,),
        )
    )
EXPERIMENTS.append(
    Experiment(
        folder="policy_distillation/two_games",
        title="Policy distillation: one student of Q*bert and Freeway",
        tag="charts/agreement/QbertNoFrameskip-v4",
        y="actions that are the teacher's in Q*bert (share)",
        x=(UPDATES,),
    )
)
EXPERIMENTS.append(
    Experiment(
        folder="policy_distillation/multi_dqn",
        title="Multi-DQN on Q*bert and Freeway",
        tag="charts/episodic_return/QbertNoFrameskip-v4",
        y="score of a training game of Q*bert",
        beside=(
            (
                "DQN, Q*bert alone",
                "policy_distillation/qbert_teacher/seed1.csv",
                "charts/episodic_return",
            ),
        ),
    )
)
for game in ("qbert", "freeway"):
    EXPERIMENTS.append(
        Experiment(
            folder=f"policy_distillation/{game}_teacher",
            title=f"DQN on {game.capitalize()}, to be a teacher",
            tag="charts/episodic_return",
            y="score of a training game",
        )
    )


def read(path: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one tag, perhaps none."""
    with open(path, newline="") as file:
        rows = [
            (float(step), float(value)) for step, name, value in csv.reader(file) if name == tag
        ]
    steps, values = np.array(rows).reshape(-1, 2).T
    return steps, values


def milliseconds(table: str, label: str) -> float:
    """What an update takes when nothing else runs, by the table of the speed measurement."""
    for line in (RESULTS / "speed" / table).read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if label in cells:
            return float(cells[2])
    raise SystemExit(f"results/speed/{table} has no row for {label}.")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` reports, fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def curve(path: Path, experiment: Experiment, x: Axis, label: str) -> tuple[np.ndarray, np.ndarray]:
    """One run's points in the units of the figure; its test error alone if it held out nothing."""
    steps, values = read(path, experiment.tag)
    if len(steps) == 0:
        steps, values = read(path, "eval/error")
    scale = milliseconds(x.table, label) if x.table else 1
    return steps * scale / x.unit, smooth(values, experiment.window)


def measured(experiment: Experiment) -> bool:
    return any((RESULTS / experiment.folder).glob("*seed*.csv"))


def draw_panel(axis: plt.Axes, experiment: Experiment, x: Axis) -> None:
    """Every line of an experiment against one axis."""
    lines = defaultdict(list)
    for path in sorted((RESULTS / experiment.folder).glob("*seed*.csv")):
        lines[path.stem.rpartition("seed")[0].rstrip("_")].append(path)
    for label, paths in lines.items():
        curves = [curve(path, experiment, x, label) for path in paths]
        points = np.unique(np.concatenate([xs for xs, _ in curves]))
        shared = (points >= max(xs[0] for xs, _ in curves)) & (
            points <= min(xs[-1] for xs, _ in curves)
        )
        points = points[shared]
        values = [np.interp(points, xs, ys) for xs, ys in curves]
        seeds = f"{len(curves)} seed" + "s" * (len(curves) > 1)
        mark = "o" if len(points) == 1 else "-"
        axis.plot(points, np.mean(values, 0), mark, label=f"{label or 'ours'}, {seeds}")
        if len(curves) > 1:
            axis.fill_between(points, np.min(values, 0), np.max(values, 0), alpha=0.2)
    for label, path, tag in experiment.beside:
        steps, values = read(RESULTS / path, tag)
        axis.plot(steps / x.unit, smooth(values, experiment.window), ":", label=label)
    if experiment.paper is not None:
        axis.axhline(experiment.paper, color="k", ls="--", lw=1, label=experiment.paper_label)
    axis.set(xlabel=x.label, ylabel=experiment.y)
    if experiment.logarithmic:
        axis.set_yscale("log")
        lowest, highest = axis.get_ylim()
        if highest < 100 * lowest:  # too few powers of ten to name them alone
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    if experiment.limits:
        axis.set_ylim(experiment.limits)
    axis.spines[["top", "right"]].set_visible(False)


def draw(experiment: Experiment) -> Path:
    """curve.png in the experiment's folder."""
    panels = len(experiment.x)
    figure, axes = plt.subplots(1, panels, figsize=(6 if panels == 1 else 5 * panels, 3.6))
    for axis, x in zip(np.atleast_1d(axes), experiment.x):
        draw_panel(axis, experiment, x)
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if panels > 1 else {}
    np.atleast_1d(axes)[-1].legend(frameon=False, **place)
    figure.suptitle(experiment.title, fontsize=11)
    path = RESULTS / experiment.folder / "curve.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_overview() -> Path:
    """overview.png: of every script the first of its experiments that is measured."""
    first, readme = {}, (RESULTS.parent / "README.md").read_text()
    for experiment in filter(measured, EXPERIMENTS):
        first.setdefault(experiment.folder.split("/")[0], experiment)
    first = dict(sorted(first.items(), key=lambda item: readme.index(f"[{item[0]}.py]")))
    columns = min(3, len(first))
    rows = -(-len(first) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    for axis, (script, experiment) in zip(axes.flat, first.items()):
        draw_panel(axis, experiment, experiment.x[0])
        axis.set_title(f"{script}.py\n{fill(experiment.title, 60)}", fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    for axis in axes.flat[len(first) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "overview.png", dpi=70)
    plt.close(figure)
    return RESULTS / "overview.png"


if __name__ == "__main__":
    for experiment in filter(measured, EXPERIMENTS):
        if all(name in experiment.folder for name in sys.argv[1:]):
            print(draw(experiment))
    print(draw_overview())
