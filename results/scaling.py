"""Do more workers need less data and less time? Are the methods robust? (table 2, figures 2 to 4)

    python results/scaling.py                  # the toy game, 1 to 16 workers, 3 seeds
    python results/scaling.py --part rates     # the toy game, random learning rates
    python results/scaling.py --part bundles   # the toy game, Gorila's bundles
    python results/scaling.py --env-id PongNoFrameskip-v4 --envs-per-worker 8 --seeds 1
        --learning-rate 7e-4 --reference -19.5 --max-timesteps 2000000 --report-every 50000
        --window 5 --target-period 10000 --epsilon-timesteps 1000000

Calls the scripts as a user would. A run ends at --reference (mean return of --window reports; not
in part rates), any run after --max-timesteps. Each becomes a line of
results/scaling/GAME_PART.csv, and runs that stand there already, with the same flags, are not
repeated, so the command can be stopped and given again. At the end the table and what it says of
the claims, or the figure (rates), is made from the file. More workers than cores cannot be faster
for that: the table tells steps from time.

Returns are those of training. On the toy game 0 means that half of the balls are caught; a random
player has -0.83, and with their final rates of exploration, 0.1, 0.01 and 0.5, the best that Q and
Sarsa can have is 0.69. First weights are orthogonal and RMSProp's epsilon is 1e-3, as in what
learns Pong within hours: with the scripts' own A3C learned nothing in 150,000 steps of the toy game
(rate 2e-3; 4, 8 and 16 workers).
Minutes include the start of the processes.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "one-step Q": ["async_nstep_q.py", "--algorithm", "onestep-q"],
    "one-step Sarsa": ["async_nstep_q.py", "--algorithm", "onestep-sarsa"],
    "n-step Q": ["async_nstep_q.py", "--algorithm", "nstep-q"],
    "A3C": ["a3c_atari.py"],
}
GORILA = {"Gorila": ["gorila_dqn.py"]}  # part bundles
PAPER = {  # table 2: times faster in wall time with 1, 2, 4, 8, 16 threads, mean of seven games
    "one-step Q": (1.0, 3.0, 6.3, 13.3, 24.1),
    "one-step Sarsa": (1.0, 2.8, 5.9, 13.1, 22.1),
    "n-step Q": (1.0, 2.7, 5.9, 10.7, 17.2),
    "A3C": (1.0, 2.1, 3.7, 6.9, 12.5),
}
INTERRUPTED = threading.Event()
SETTINGS = ("method", "workers", "seed", "learning_rate")
SHARED = ("reference", "max_timesteps", "report_every", "window", "envs_per_worker")  # by all runs
SHARED += ("target_period", "epsilon_timesteps")
FOUND = ("steps", "updates", "minutes", "score")  # updates: of Gorila's server


@dataclass
class Args:
    part: Literal["workers", "rates", "bundles"] = "workers"  # table 2, figure 2, or Gorila
    env_id: str = "toy_games:Catch-v0"  # the game; toy_games lies in tests/
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)  # of part workers
    bundles: tuple[int, ...] = (1, 2, 4, 8)  # of part bundles
    rate_workers: int = 4  # of part rates
    seeds: int = 3  # of parts workers and bundles
    rates: int = 10  # learning rates of part rates, drawn from LogUniform(1e-4, 1e-2)
    learning_rate: float = 1e-3  # of parts workers and bundles
    reference: float = 0.0  # mean return of --window reports at which a run has arrived
    max_timesteps: int = 150_000  # of a run; its learning rate falls to 0 over twice that
    report_every: int = 2_000  # steps
    window: int = 1  # reports; together longer than a game, as games begun at once end by length
    cores: int = 0  # that runs share, a core a worker, side by side as they fit; 0: one by one
    envs_per_worker: int = 1  # games of a worker (not of Gorila's)
    target_period: int = 0  # steps, Gorila's: updates; 0: a hundredth of max_timesteps
    epsilon_timesteps: int = 0  # until exploration has fallen; 0: a tenth of max_timesteps


@dataclass
class Run:
    method: str
    workers: int  # or bundles
    seed: int
    learning_rate: float


def plan(args: Args) -> list[Run]:
    """Every run of the experiment, methods and workers taking turns."""
    methods = GORILA if args.part == "bundles" else METHODS
    if args.part != "rates":
        numbers = args.bundles if args.part == "bundles" else args.workers
        settings = [(w, seed, args.learning_rate) for seed in range(args.seeds) for w in numbers]
    else:
        drawn = 10 ** np.random.default_rng(0).uniform(-4, -2, args.rates)
        settings = [
            (args.rate_workers, seed, float(f"{rate:.3g}")) for seed, rate in enumerate(drawn)
        ]
    return [Run(method, *setting) for setting in settings for method in methods]


def follow(run_dir: Path, args: Args, process: subprocess.Popen) -> tuple:
    """FOUND of the report that arrives, or of the run's last fifth, so that a collapse shows."""
    path = run_dir / "metrics.csv"
    while True:
        ended = process.poll() is not None
        reports = {}
        if path.exists():
            with open(path, newline="") as file:
                for row in csv.reader(file):
                    if len(row) == 3:  # the last one may be half written
                        reports.setdefault(int(row[0]), {})[row[1]] = float(row[2] or "nan")
        scores = []
        for step, report in reports.items():
            scores.append(report.get("charts/episodic_return", -np.inf))
            score = float(np.mean(scores[-args.window :]))
            score = score if len(scores) >= args.window else -np.inf
            updates = report.get("charts/updates", "")
            here = step, updates, report.get("charts/minutes", 0.0), score
            if score >= args.reference and args.part != "rates":
                return here
            if step >= args.max_timesteps:
                late = [reports[t] for t in reports if t > 0.8 * args.max_timesteps]
                scores = [
                    r["charts/episodic_return"] for r in late if "charts/episodic_return" in r
                ]
                return *here[:-1], float(np.mean(scores)) if scores else -np.inf
        if ended:
            raise SystemExit(f"{' '.join(process.args)} ended before its time: try it by hand.")
        if INTERRUPTED.wait(0.5):
            raise SystemExit("Stopped.")


def measure(run: Run, args: Args) -> list:
    """One run of a script, from its start to its arrival; a row of the file."""
    folder = Path(tempfile.mkdtemp())
    flags = {
        "env-id": args.env_id,
        "seed": run.seed,
        "learning-rate": run.learning_rate,
        "total-timesteps": 2 * args.max_timesteps,
        "report-every": args.report_every,
        "run-dir": folder / "run",
    }
    if run.method == "Gorila":  # an update every four steps
        flags |= {"num-actors": run.workers, "num-learners": run.workers}
        flags |= {"replay-capacity": args.max_timesteps, "learning-starts": 1_000}
        flags["target-period"] = args.target_period or max(1, args.max_timesteps // 400)
        fall = args.epsilon_timesteps or max(1, args.max_timesteps // 10)
        flags["epsilon-updates"] = max(1, fall // 4)
    else:
        flags |= {"num-workers": run.workers, "envs-per-worker": args.envs_per_worker}
        flags |= {"orthogonal-init": None, "rmsprop-eps": 1e-3}
        if run.method != "A3C":
            flags["target-period"] = args.target_period or max(1, args.max_timesteps // 100)
            fall = args.epsilon_timesteps or max(1, args.max_timesteps // 10)
            flags["epsilon-timesteps"] = fall
    command = [sys.executable, *(METHODS | GORILA)[run.method]]
    for flag, value in flags.items():
        command += [f"--{flag}"] if value is None else [f"--{flag}", str(value)]
    found_at = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(found_at)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)
    try:
        steps, updates, minutes, score = follow(folder / "run", args, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        shutil.rmtree(folder)
    arrived = score >= args.reference
    row = [getattr(run, name) for name in SETTINGS] + [getattr(args, name) for name in SHARED]
    when = [steps, updates, f"{minutes:.3f}"] if arrived else ["", "", ""]
    return [*row, *when, f"{score:.3f}"]


def measure_all(runs: list[Run], args: Args) -> Iterator[list]:
    """Rows as they come; a run begins when --cores has as many free ones as it has workers."""
    cores, going = max(args.cores, 1), {}  # going: the cores of each run
    waiting = sorted(runs, key=lambda run: (run.seed, -run.workers)) if args.cores else list(runs)
    INTERRUPTED.clear()
    with ThreadPoolExecutor(cores) as pool:
        try:
            while waiting or going:
                for run in list(waiting):
                    needed = min(run.workers, cores)
                    if needed <= cores - sum(going.values()):
                        waiting.remove(run)
                        going[pool.submit(measure, run, args)] = needed
                for ended in wait(going, return_when=FIRST_COMPLETED).done:
                    del going[ended]
                    yield ended.result()
        finally:
            INTERRUPTED.set()  # whatever has come between: the other runs end, too


def read(path: Path, args: Args) -> list[dict[str, str]]:
    """The runs that were made with these flags."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[name] == str(getattr(args, name)) for name in SHARED)]


def medians(rows: list[dict[str, str]], method: str, workers: tuple[int, ...], column: str) -> dict:
    """By number of workers, over seeds; infinite where most runs did not arrive."""
    found = {}
    for w in workers:
        runs = [row for row in rows if row["method"] == method and int(row["workers"]) == w]
        values = [float(row[column]) if row[column] else np.inf for row in runs]
        found[w] = float(np.median(values)) if values else np.nan
    return found


def table(rows: list[dict[str, str]], workers: tuple[int, ...], methods: dict) -> str:
    """Steps and minutes to the reference, and how many times fewer than with one worker."""
    lines = [f"On {os.cpu_count()} cores; medians over seeds.", ""]
    lines += ["| method | | " + " | ".join(str(w) for w in workers) + " |"]
    lines += ["|---|---|" + "--:|" * len(workers)]
    for method in methods:
        for column, form in (("steps", ",.0f"), ("updates", ",.0f"), ("minutes", ".2f")):
            if column == "updates" and method not in GORILA:
                continue
            found = medians(rows, method, workers, column)
            one = found[workers[0]]
            cells = [f"{m:{form}}" if np.isfinite(m) else "not reached" for m in found.values()]
            lines.append(f"| {method} | {column} to the reference | " + " | ".join(cells) + " |")
            cells = [f"{one / m:.1f}" if np.isfinite(one / m) else "" for m in found.values()]
            lines.append(f"| | times fewer than with {workers[0]} | " + " | ".join(cells) + " |")
        if method in PAPER:
            paper = dict(zip((1, 2, 4, 8, 16), PAPER[method]))
            cells = [f"{paper[w]:g}" if w in paper else "" for w in workers]
            lines.append("| | times fewer minutes, paper | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims(rows: list[dict[str, str]], workers: tuple[int, ...]) -> str:
    """What the table says of the paper's claims (section 5.4 and figures 3 and 4)."""
    few, many = workers[0], workers[-1]
    steps = {method: medians(rows, method, workers, "steps") for method in METHODS}
    minutes = {method: medians(rows, method, workers, "minutes") for method in METHODS}
    one_step = [found for method, found in steps.items() if method.startswith("one-step")]
    others = [found[many] for method, found in minutes.items() if method != "A3C"]
    verdicts = {
        "all four methods learn": all(np.isfinite(list(s.values())).all() for s in steps.values()),
        f"one-step methods need less data with {many} workers than with {few}": all(
            found[many] < found[few] for found in one_step
        ),
        f"A3C is the fastest of the four with {many} workers": minutes["A3C"][many] < min(others),
    }
    return "\n".join(f"- {c}: {'reached' if v else 'not reached'}" for c, v in verdicts.items())


def draw(rows: list[dict[str, str]], args: Args, path: Path) -> None:
    """The score that each learning rate reached, one panel per method (figure 2)."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), sharey=True)
    for axis, method in zip(axes, METHODS):
        runs = [r for r in rows if r["method"] == method]
        axis.scatter([float(r["learning_rate"]) for r in runs], [float(r["score"]) for r in runs])
        axis.axhline(args.reference, color="k", ls="--", lw=1)
        axis.set(title=method, xscale="log", xlabel="learning rate")
    axes[0].set_ylabel("mean return of the last fifth")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(args: Args) -> str:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends its runs, too, as Ctrl-C does
    game = args.env_id.split(":")[-1].replace("/", "-")
    path = ROOT / "results" / "scaling" / f"{game}_{args.part}.csv"
    path.parent.mkdir(exist_ok=True)
    had = {tuple(row[name] for name in SETTINGS) for row in read(path, args)}
    if not path.exists():
        path.write_text(",".join(SETTINGS + SHARED + FOUND) + "\n")
    runs = [
        run
        for run in plan(args)
        if (run.method, *map(str, (run.workers, run.seed, run.learning_rate))) not in had
    ]
    for row in tqdm(measure_all(runs, args), total=len(runs), unit="run", disable=None):
        with open(path, "a", newline="") as file:
            csv.writer(file).writerow(row)
        tqdm.write(", ".join(map(str, row)))
    if args.part == "workers":
        rows = read(path, args)
        return table(rows, args.workers, METHODS) + "\n\n" + claims(rows, args.workers)
    if args.part == "bundles":
        return table(read(path, args), args.bundles, GORILA)
    draw(read(path, args), args, path.with_suffix(".png"))
    return str(path.with_suffix(".png"))


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
