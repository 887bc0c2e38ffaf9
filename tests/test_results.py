"""results/: its numbers come from the runs it keeps, and its programs do what they say."""

import ast
import csv
import importlib
import re
import shutil
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
from running import processes_of, wait_for
from test_house_style import RESULTS, table

FOLDER = Path(__file__).parent.parent / "results"
sys.path.insert(0, str(FOLDER))
keep, plot, scaling = (importlib.import_module(name) for name in ("keep", "plot", "scaling"))

RETURN = "eval/episodic_return"
KEPT = {  # rows of results/README.md: the runs that they are the mean of, their last number
    "A3C, Pong": ("a3c_atari/pong/orthogonal-init__seed*.csv", RETURN),
    "A3C, Breakout": ("a3c_atari/breakout/seed*.csv", RETURN),
    "n-step Q, Pong": ("async_nstep_q/pong/nstep-q__seed*.csv", RETURN),
    "One-step Q, Pong": ("async_nstep_q/pong/onestep-q__seed*.csv", RETURN),
    "One-step Sarsa, Pong": ("async_nstep_q/pong/onestep-sarsa__seed*.csv", RETURN),
    "A3C, InvertedPendulum": ("a3c_continuous/inverted_pendulum/seed*.csv", RETURN),
    "A3C, Pendulum": ("a3c_continuous/pendulum/seed*.csv", RETURN),
    "A3C, Reacher": ("a3c_continuous/reacher/seed*.csv", RETURN),
    "A3C, HalfCheetah": ("a3c_continuous/half_cheetah/seed*.csv", RETURN),
    "DQN, Freeway, to be a teacher": ("policy_distillation/freeway_teacher/seed*.csv", RETURN),
    "DQN, Q*bert, to be a teacher": ("policy_distillation/qbert_teacher/seed*.csv", RETURN),
    "Distillation, Freeway": (
        "policy_distillation/freeway/kl-net2__seed*.csv",
        "eval/percent_of_teacher",
    ),
    "Distillation, Q*bert": (
        "policy_distillation/qbert/kl-net2__seed*.csv",
        "eval/percent_of_teacher",
    ),
    "Distillation, Q*bert, of Q-values": (
        "policy_distillation/qbert/mse-net2__seed*.csv",
        "eval/percent_of_teacher",
    ),
    "Distillation, two games": (
        "policy_distillation/two_games/kl-multi3__seed*.csv",
        "eval/geometric_mean",
    ),
    "Multi-DQN, two games": ("policy_distillation/multi_dqn/seed*.csv", "eval/geometric_mean"),
    "PRONG, CIFAR-10": ("prong/cifar10/prong__seed*.csv", "eval/validation_error"),
    "Bayes by Backprop, MNIST": ("bayes_by_backprop/mnist/mixture__seed*.csv", "eval/error"),
    "Bayes by Backprop, mushrooms": ("bayes_by_backprop/bandit/bbb-50000__*", "charts/regret"),
    "Spatial transformers, turned digits, FCN, the paper's updates": (
        "spatial_transformer_mnist/R_fcn_long/affine__seed*.csv",
        "eval/error",
    ),
    "Spatial transformers, turned digits, FCN": (
        "spatial_transformer_mnist/R_fcn/affine__seed*.csv",
        "eval/error",
    ),
    "Spatial transformers, turned, scaled and moved digits, FCN, the paper's updates": (
        "spatial_transformer_mnist/RTS_fcn_long/affine-0.01__seed*.csv",
        "eval/error",
    ),
    "Spatial transformers, turned digits, CNN, the paper's updates": (
        "spatial_transformer_mnist/R_cnn_long/affine__seed*.csv",
        "eval/error",
    ),
    "Spatial transformers, the sum of two digits": (
        "spatial_transformer_mnist/addition_fcn_long/affine-2__seed*.csv",
        "eval/error",
    ),
    "Cyclic symmetry, turned digits, pool": (
        "cyclic_rotation_cnn/rotated-mnist/pool__seed*.csv",
        "eval/error",
    ),
    "Cyclic symmetry, turned digits, roll-all": (
        "cyclic_rotation_cnn/rotated-mnist/roll-all__seed*.csv",
        "eval/error",
    ),
    "Cyclic symmetry, plankton at 95x95, pool": (
        "cyclic_rotation_cnn/plankton_95/pool__seed*.csv",
        "eval/loss",
    ),
    "Cyclic symmetry, plankton at 47x47, pool": (
        "cyclic_rotation_cnn/plankton/pool__seed*.csv",
        "eval/loss",
    ),
    "RAM, 28x28, six glimpses": ("recurrent_visual_attention/mnist/seed*.csv", "eval/error"),
    "RAM, translated 60x60, eight glimpses": (
        "recurrent_visual_attention/translated/seed*.csv",
        "eval/error",
    ),
    "RAM, cluttered 60x60, eight glimpses": (
        "recurrent_visual_attention/cluttered/ram__seed*.csv",
        "eval/error",
    ),
    "RAM, cluttered 100x100, eight glimpses": (
        "recurrent_visual_attention/cluttered100/seed*.csv",
        "eval/error",
    ),
    "STRAW, mazes of 11x11": ("straw/maze_11/straw__seed*.csv", RETURN),
    "STRAW, mazes of 15x15": ("straw/maze_15/straw__seed*.csv", RETURN),
    "STRAW, text": ("straw/text/straw-0.02__seed*.csv", "eval/bits_per_character"),
    "RAM, Catch": ("recurrent_visual_attention/catch/seed*.csv", "eval/caught"),
    "DRAM, pairs": ("multi_object_attention/pairs/dram-60000__seed*.csv", "eval/error"),
    "DRAM, sums": ("multi_object_attention/addition/dram-60000__seed*.csv", "eval/error"),
}
OTHERWISE = {  # read off curves, or from an evaluation of its own
    "A3C, mazes",
    "PRONG, autoencoder",
    "PRONG, condition of the Fisher matrix",
    "Bayes by Backprop, regression",
}
ROWS = {row["experiment"]: row for row in table(RESULTS)}


def test_every_row_has_its_runs():
    assert ROWS.keys() == KEPT.keys() | OTHERWISE


@pytest.mark.parametrize("experiment", KEPT)
def test_a_number_is_the_mean_of_the_kept_runs(experiment):
    pattern, tag = KEPT[experiment]
    paths = sorted(FOLDER.glob(pattern))
    assert len(paths) == len(re.match(r"\d(?:, \d)*", ROWS[experiment]["seeds"])[0].split(", "))
    told = re.search(r"-?[\d,]*\d(?:\.\d+)?", ROWS[experiment]["ours"])[0].replace(",", "")
    found = np.mean([plot.read(path, tag)[1][-1] for path in paths])
    unit = 10.0 ** Decimal(told).as_tuple().exponent
    assert float(told) == pytest.approx(found, abs=0.6 * unit)  # four digits are kept of each


def test_the_returns_at_random_rates_are_those_of_the_kept_runs():
    with open(FOLDER / "scaling" / "Catch-v0_rates.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["learning_rate"]))
    told = table(RESULTS[RESULTS.index("python results/scaling.py --part rates") :])
    assert [row["rate, thousandths"] for row in told] == list(scaling.METHODS)
    for method, row in zip(scaling.METHODS, told, strict=True):
        runs = [run for run in rows if run["method"] == method]
        scores = [float(run["score"]) for run in runs]
        rates = [1000 * float(run["learning_rate"]) for run in runs]
        _, *numbers = row.items()
        *cells, (_, middle), (_, above) = numbers
        assert [float(title) for title, _ in cells] == pytest.approx(rates, rel=0.05)
        assert [float(number) for _, number in cells] == pytest.approx(scores, abs=0.0051)
        assert float(middle) == pytest.approx(np.median(scores), abs=0.0051)
        assert above == f"{sum(score > 0 for score in scores)} of {len(scores)}"


def test_the_mazes_number_is_that_of_its_evaluation():
    with open(FOLDER / "a3c_maze" / "apples" / "evaluation.csv", newline="") as file:
        values = [r["value"] for r in csv.DictReader(file) if r["tag"] == RETURN]
    assert values[0] == ROWS["A3C, mazes"]["ours"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.py")), ids=lambda path: path.name)
def test_a_program_names_only_what_the_scripts_have(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    scripts = {p.stem: importlib.import_module(p.stem) for p in FOLDER.parent.glob("*.py")}
    known = {
        a.asname or a.name: scripts[a.name]
        for n in nodes
        if isinstance(n, ast.Import)
        for a in n.names
        if a.name in scripts
    }
    told = [
        (scripts[n.module], a.name)
        for n in nodes
        if isinstance(n, ast.ImportFrom) and n.module in scripts
        for a in n.names
    ]
    told += [
        (known[n.value.id], n.attr)
        for n in nodes
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in known
    ]
    assert [name for script, name in told if not hasattr(script, name)] == []


def test_every_experiments_folder_has_a_curve():
    folders = {path.parent for path in FOLDER.glob("*/*/*seed*.csv")}
    drawn = {FOLDER / experiment.folder for experiment in plot.EXPERIMENTS}
    assert folders - drawn == {FOLDER / "bayes_by_backprop" / "regression"}  # it draws its own
    for folder in folders & drawn:
        assert (folder / "curve.png").exists()


def test_keep_thins_a_run(tmp_path):
    rows = [(step, tag, step / 3) for step in range(10) for tag in ("test/error", "losses/loss")]
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    for tags, kept in (((), ["losses/loss", "test/error"]), (("test/",), ["test/error"])):
        target = keep.main(keep.Args(tmp_path, tmp_path / "kept" / "seed1.csv", tags, points=4))
        with open(target, newline="") as file:
            found = list(csv.reader(file))
        assert sorted({tag for _, tag, _ in found}) == kept
        for tag in kept:
            steps = [int(step) for step, name, _ in found if name == tag]
            assert steps == [0, 3, 6, 9]
        assert ["3", "test/error", "1"] in found and ["9", "test/error", "3"] in found
    steps, values = plot.read(target, "test/error")
    assert steps.tolist() == [0, 3, 6, 9] and values.tolist() == [0, 1, 2, 3]
    assert [len(part) for part in plot.read(target, "validation/error")] == [0, 0]


def arrivals(steps: dict[str, dict[int, list]]) -> list[dict[str, str]]:
    """Rows of results/scaling/ in which a step takes a thousandth of a minute."""
    return [
        {"method": method, "workers": str(w), "steps": str(n), "minutes": str(n and n / 1000)}
        | {"updates": ""}
        for method, of_workers in steps.items()
        for w, runs in of_workers.items()
        for n in runs
    ]


def test_scaling_judges_the_papers_claims():
    fast, slow = {1: [900, 1000, 5000], 2: [400, 500, ""]}, {1: [2000] * 3, 2: [3000] * 3}
    steps = {method: fast for method in scaling.METHODS}
    for changed, verdicts in (
        ({}, ["reached", "reached", "not reached"]),  # A3C is as fast as the others
        ({"A3C": {1: [900], 2: [100]}}, ["reached"] * 3),
        ({"one-step Sarsa": slow}, ["reached", "not reached", "not reached"]),
        ({"n-step Q": {1: [7], 2: ["", "", 7]}}, ["not reached", "reached", "not reached"]),
    ):
        said = scaling.claims(arrivals(steps | changed), (1, 2))
        assert [line.rpartition(": ")[2] for line in said.splitlines()] == verdicts
    shown = scaling.table(arrivals(steps), (1, 2), scaling.METHODS)
    assert "| A3C | steps to the reference | 1,000 | 500 |" in shown
    assert "| A3C | minutes to the reference | 1.00 | 0.50 |" in shown
    assert shown.count("| | times fewer than with 1 | 1.0 | 2.0 |") == 8
    assert "| | times fewer minutes, paper | 1 | 2.1 |" in shown
    lost = scaling.table(arrivals({"A3C": {1: ["", 5, ""], 2: [4]}}), (1, 2), {"A3C": []})
    assert "| A3C | steps to the reference | not reached | 4 |" in lost
    whole = scaling.table([], (1, 2, 4, 8, 16), scaling.METHODS).splitlines()
    assert [line.partition("paper | ")[2] for line in whole if "paper" in line] == [  # table 2
        "1 | 3 | 6.3 | 13.3 | 24.1 |",
        "1 | 2.8 | 5.9 | 13.1 | 22.1 |",
        "1 | 2.7 | 5.9 | 10.7 | 17.2 |",
        "1 | 2.1 | 3.7 | 6.9 | 12.5 |",
    ]


def test_scaling_follows_a_run_to_its_arrival_or_through_its_last_fifth(tmp_path):
    returns = {20: 0.25, 40: 0.5, 60: 1.0, 80: 0.75, 90: 0.375, 100: 0.125}
    rows = [
        f"{step},charts/episodic_return,{score}\n{step},charts/minutes,{step / 10}\n"
        for step, score in returns.items()
    ]
    (tmp_path / "metrics.csv").write_text("".join(rows) + "100,charts/SP")  # half written
    process = SimpleNamespace(poll=lambda: None, args=["python", "a3c_atari.py"])
    for flags, found in (
        ({"reference": 0.5}, (40, "", 4, 0.5)),
        ({"reference": 0.5, "window": 3}, (60, "", 6, 1.75 / 3)),
        ({"reference": 0.7, "window": 3}, (80, "", 8, 0.75)),
        ({"reference": 2.0}, (100, "", 10, 0.25)),
        ({"reference": 0.5, "part": "rates"}, (100, "", 10, 0.25)),
    ):
        args = scaling.Args(max_timesteps=100, **flags)
        assert scaling.follow(tmp_path, args, process) == found
    process.poll = lambda: 1
    with pytest.raises(SystemExit, match=r"^python a3c_atari\.py ended before its time"):
        scaling.follow(tmp_path, scaling.Args(max_timesteps=101, reference=2.0), process)


def test_scaling_reads_only_runs_of_the_same_flags(tmp_path):
    path, args = tmp_path / "runs.csv", scaling.Args(reference=0.5, max_timesteps=100)
    assert scaling.read(path, args) == []
    path.write_text(
        "score,reference,max_timesteps,report_every,window,envs_per_worker,"
        "target_period,epsilon_timesteps\n"
        "1,0.5,100,2000,1,1,0,0\n"
        "2,0.7,100,2000,1,1,0,0\n"
        "3,0.5,900,2000,1,1,0,0\n"
        "4,0.5,100,5000,1,1,0,0\n"
        "5,0.5,100,2000,5,1,0,0\n"
        "6,0.5,100,2000,1,8,0,0\n"
        "7,0.5,100,2000,1,1,7,0\n"
        "8,0.5,100,2000,1,1,0,7\n"
    )
    assert [row["score"] for row in scaling.read(path, args)] == ["1"]


@pytest.mark.parametrize("cores, most", [(0, 1), (4, 4), (16, 16)])
def test_scaling_runs_share_the_cores(cores, most, monkeypatch):
    """As many side by side as fit, a run of more workers than cores alone, every run once."""
    going, busiest, lock = [], [], Lock()

    def measure(run, args):
        with lock:
            going.append(run.workers)
            busiest.append((len(going), sum(going)))
        time.sleep(0.01)
        with lock:
            going.remove(run.workers)
        return [run.workers, run.seed]

    monkeypatch.setattr(scaling, "measure", measure)
    runs = [scaling.Run("A3C", w, seed, 1e-3) for seed in range(3) for w in (1, 2, 8)]
    rows = list(scaling.measure_all(runs, scaling.Args(cores=cores)))
    assert sorted(rows) == sorted([run.workers, run.seed] for run in runs)
    assert all(together <= most or count == 1 for count, together in busiest)
    assert (max(count for count, _ in busiest) > 1) == (cores > 0)
    if not cores:
        assert rows == [[run.workers, run.seed] for run in runs]  # in the order of the plan

    def fail(run, args):
        raise SystemExit("ended before its time")

    monkeypatch.setattr(scaling, "measure", fail)
    with pytest.raises(SystemExit, match="before its time"):
        list(scaling.measure_all(runs, scaling.Args(cores=cores)))


@pytest.mark.parametrize("cores", [0, 2])
def test_scaling_leaves_no_run_behind(cores, tmp_path):
    """A copy of the scripts, whose runs would last for hours."""
    for part in ("a3c_atari.py", "async_nstep_q.py"):
        shutil.copy(FOLDER.parent / part, tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(FOLDER / "scaling.py", tmp_path / "results")
    shutil.copy(FOLDER.parent / "tests" / "toy_games.py", tmp_path / "tests")
    command = [sys.executable, "results/scaling.py", "--workers", "1", "--reference", "9"]
    command += ["--max-timesteps", "9000000", "--seeds", "1", "--cores", str(cores)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(processes_of(process)) == max(cores, 1), 60)
        runs = processes_of(process)
    finally:
        process.terminate()
    process.wait(timeout=60)
    assert not any(Path(f"/proc/{run}").exists() for run in runs)


def test_scaling_measures_a_run_as_a_user_would_start_it(monkeypatch):
    commands, signals = [], []

    def start(command, **_):
        commands.append(" ".join(command[1:]))
        return SimpleNamespace(send_signal=signals.append, wait=lambda: None)

    def measure(method, score, **flags):
        monkeypatch.setattr(scaling, "follow", lambda *_: (40, "", 1.5, score))
        args = scaling.Args(reference=0.5, max_timesteps=1000, report_every=20, **flags)
        return scaling.measure(scaling.Run(method, 4, 2, 0.003), args)

    monkeypatch.setattr(scaling.subprocess, "Popen", start)
    flags = [4, 2, 0.003, 0.5, 1000, 20, 1]
    assert measure("A3C", 0.5) == ["A3C", *flags, 1, 0, 0, 40, "", "1.500", "0.500"]
    assert measure("n-step Q", 0.4) == ["n-step Q", *flags, 1, 0, 0, "", "", "", "0.400"]
    measure("Gorila", 0.5)
    given = {"target_period": 70, "epsilon_timesteps": 400}
    measure("one-step Sarsa", 0.5, envs_per_worker=8, **given)
    measure("Gorila", 0.5, **given)
    assert signals == [scaling.signal.SIGTERM] * 5
    weights = "--orthogonal-init --rmsprop-eps 0.001"
    exploration = "--target-period 10 --epsilon-timesteps 100"
    expected = (
        ("a3c_atari.py", f"--num-workers 4 --envs-per-worker 1 {weights}"),
        (
            "async_nstep_q.py --algorithm nstep-q",
            f"--num-workers 4 --envs-per-worker 1 {weights} {exploration}",
        ),
        (
            "gorila_dqn.py",
            "--num-actors 4 --num-learners 4 --replay-capacity 1000 --learning-starts 1000"
            " --target-period 2 --epsilon-updates 25",
        ),
        (
            "async_nstep_q.py --algorithm onestep-sarsa",
            f"--num-workers 4 --envs-per-worker 8 {weights}"
            " --target-period 70 --epsilon-timesteps 400",
        ),
        (
            "gorila_dqn.py",
            "--num-actors 4 --num-learners 4 --replay-capacity 1000 --learning-starts 1000"
            " --target-period 70 --epsilon-updates 100",
        ),
    )
    for command, (script, own) in zip(commands, expected, strict=True):
        game = "--env-id toy_games:Catch-v0 --seed 2 --learning-rate 0.003"
        assert command.startswith(f"{script} {game} ") and command.endswith(f" {own}")
        assert " --total-timesteps 2000 --report-every 20 " in command  # the rate falls over twice
