"""How fast is Gorila? Steps/s and updates/s of bundles beside one process and beside a library.

    Measures   gorila_dqn.py with 1 and 2 bundles on Ray, its classes in one process, SB3's DQN
    Run        python results/speed/gorila.py --output results/speed/gorila.md
    Needs      Linux, an idle machine, pip install -r results/speed/requirements.txt
    Takes      about 10 minutes

One run measures everything: the same game, the same cores, the same steps per update, and rounds
in which the contenders take turns. Each contender begins with a memory of --learning-starts random
steps; the window opens --warm-up seconds after its first update. Start-up is outside of it, and so
are checkpoints and evaluations.
"""

import importlib.util
import os
import platform
import queue
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.multiprocessing as mp
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gorila_dqn

ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # any *NoFrameskip-v4 game
    steps_per_update: int = 4  # of every contender
    learning_starts: int = 1_000  # steps of a contender before its first update
    cores: int = 2  # given to each contender
    rounds: int = 3  # the table shows their median
    seconds: float = 30.0  # measured of each contender in each round
    warm_up: float = 10.0  # seconds before these, counted from the first update
    output: str = ""  # a markdown file to write the tables to


STEPS, UPDATES = "steps/s", "updates/s"
TIMES, WIRE = "times SB3's DQN", "% of a learner's step with the server"
COLUMNS = {STEPS: ".1f", UPDATES: ".1f", TIMES: ".2f", WIRE: ".1f"}  # and their formats


class Progress(NamedTuple):
    """How far a contender has come."""

    steps: int
    updates: int
    learner_ms: list[float]  # a minibatch from the pull to the push, of those since the last time
    server_ms: list[float]  # of these, with the server


@dataclass
class Contender:
    name: str
    run: Callable  # (args) -> an endless iterator of Progress
    goals: dict[str, float] = field(default_factory=dict)  # by column: at least; WIRE: at most
    rounds: list[dict[str, float]] = field(default_factory=list)  # measured, by column


def settings(bundles: int, args: Args, bfloat16: bool = False) -> gorila_dqn.Args:
    """Gorila as a user would run it, but for the size and the start of the memory."""
    return gorila_dqn.Args(
        env_id=args.env_id,
        num_actors=bundles,
        num_learners=bundles,
        steps_per_update=args.steps_per_update,
        learning_starts=args.learning_starts,
        replay_capacity=100_000,
        bfloat16=bfloat16,
    )


# ---- The contenders -----------------------------------------------------------------------------


def on_ray(bundles: int, args: Args, bfloat16: bool = False) -> Iterator[Progress]:
    """gorila_dqn.py with so many bundles and one shard; a step forward at the end of each round."""
    ours = settings(bundles, args, bfloat16)
    net = gorila_dqn.DeepQNetwork(gorila_dqn.make_env(args.env_id).action_space.n)
    G = torch.full((sum(p.numel() for p in net.parameters()),), ours.adagrad_start)
    start = {"counts": {"steps": 0}, "versions": [0], "seconds": 0.0, "G": G}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = ROOT  # where Ray's processes are to find gorila_dqn
        gorila_dqn.connect(ours)
        try:
            gorila = gorila_dqn.Gorila(net, start, ours, Path(folder))
            while True:
                gorila.attend(1.0)
                told = {"charts/learner_ms": [], "charts/server_ms": []}
                while not gorila.log.empty():
                    tag, value, _ = gorila.log.get()
                    told.get(tag, []).append(value)
                counts = gorila.counts["steps"], gorila.counts["minibatches"]
                yield Progress(*counts, *told.values())
        finally:
            gorila_dqn.ray.shutdown()
            for number in (signal.SIGINT, signal.SIGTERM):  # Gorila has taken them
                signal.signal(number, signal.default_int_handler)


def learn_alone(args: Args, told) -> None:
    """The components of a bundle and a shard in one process, without Ray."""
    ours = settings(1, args)
    num_actions = gorila_dqn.make_env(args.env_id).action_space.n
    theta = gorila_dqn.flat(gorila_dqn.DeepQNetwork(num_actions).parameters())
    state = {"theta": theta, "G": 0 * theta + ours.adagrad_start}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard_0.npz")
        gorila_dqn.write_slice(path, **state, version=0, stale=0, lost=0)
        server = gorila_dqn.ParameterServer([gorila_dqn.ParameterServerShard(path, ours)])
        bundle, counts = gorila_dqn.Bundle(0, num_actions, ours, server), Counter()
        while mp.parent_process().is_alive():
            counts += bundle.work().counts
            told.put(Progress(counts["steps"], counts["minibatches"], [], []))


def learn_with_sb3(args: Args, told) -> None:
    """Stable-Baselines3's DQN, its defaults but for the ratio and the memory.

    It explores little from the start: for a random action it would not ask its network, as ours do.
    """
    from stable_baselines3 import DQN
    from stable_baselines3.common import env_util, vec_env

    def on_step(names: dict, _) -> bool:
        told.put(Progress(names["self"].num_timesteps, names["self"]._n_updates, [], []))
        return mp.parent_process().is_alive()  # goes on

    torch.set_num_threads(args.cores)
    games = vec_env.VecFrameStack(env_util.make_atari_env(args.env_id), n_stack=4)
    memory = {"buffer_size": 100_000, "learning_starts": args.learning_starts}
    ratio = {"train_freq": args.steps_per_update, "gradient_steps": 1}
    ratio |= {"exploration_initial_eps": 0.05, "exploration_final_eps": 0.05}
    agent = DQN("CnnPolicy", games, batch_size=32, device="cpu", **memory, **ratio)
    agent.learn(total_timesteps=10**12, callback=on_step)


def elsewhere(learn: Callable, args: Args) -> Iterator[Progress]:
    """What a function tells that learns in a process of its own, for ever."""
    spawn = mp.get_context("spawn")
    told = spawn.Queue()
    process = spawn.Process(target=learn, args=(args, told))
    process.start()
    try:
        while process.is_alive():
            try:
                yield told.get(timeout=1)
            except queue.Empty:
                continue
        raise SystemExit(f"The process of {learn.__name__} ended before its time.")
    finally:
        process.terminate()
        process.join()


def contenders() -> list[Contender]:
    goals = {TIMES: 1.5, WIRE: 30}
    rows = [
        Contender("gorila_dqn.py, 2 bundles", partial(on_ray, 2), goals),
        Contender("the same, --bfloat16", partial(on_ray, 2, bfloat16=True), goals),
        Contender("gorila_dqn.py, 1 bundle", partial(on_ray, 1), {WIRE: 30}),
        Contender("its classes in one process, without Ray", partial(elsewhere, learn_alone)),
    ]
    if importlib.util.find_spec("stable_baselines3"):
        name = f"SB3 {version('stable-baselines3')} DQN"
        rows.append(Contender(name, partial(elsewhere, learn_with_sb3)))
    return rows


# ---- The measurement ----------------------------------------------------------------------------


def measure(contender: Contender, args: Args) -> dict[str, float]:
    """One contender in one round, from nothing to nothing left."""
    progress, learner_ms, server_ms = contender.run(args), 0.0, 0.0
    try:
        next(now for now in progress if now.updates)
        warm = time.perf_counter() + args.warm_up
        first = next(now for now in progress if time.perf_counter() >= warm)
        start = time.perf_counter()
        for now in progress:
            learner_ms += sum(now.learner_ms)
            server_ms += sum(now.server_ms)
            seconds = time.perf_counter() - start
            if seconds >= args.seconds:
                break
        speeds = {STEPS: now.steps - first.steps, UPDATES: now.updates - first.updates}
        speeds = {column: count / seconds for column, count in speeds.items()}
        return speeds | ({WIRE: 100 * server_ms / learner_ms} if learner_ms else {})
    finally:
        progress.close()


# ---- The report ---------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores, versions, and how busy it is."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    versions = [f"{name} {version(name)}" for name in ("torch", "ray", "ale-py", "numpy")]
    return (
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {', '.join(versions)}; "
        f"load average before the start {os.getloadavg()[0]:.2f}"
    )


def summarise(rows: list[Contender]) -> dict[str, dict[str, float]]:
    """Columns by row: the medians of the rounds, and their ratios."""
    table = {row.name: {c: median(m[c] for m in row.rounds) for c in row.rounds[0]} for row in rows}
    library = next((table[row.name][STEPS] for row in rows if row.name.startswith("SB3")), None)
    for columns in table.values():
        columns |= {TIMES: columns[STEPS] / library} if library else {}
    return table


def judge(row: Contender, columns: dict[str, float]) -> Iterator[str]:
    """A line for each goal of a row; that against SB3 only if it was measured."""
    for column in filter(columns.get, row.goals):
        value, goal = columns[column], row.goals[column]
        reached, bound = (value <= goal, "most") if column == WIRE else (value >= goal, "least")
        verdict = "reached" if reached else "**not reached**"
        yield f"- {row.name}: {value:{COLUMNS[column]}} {column}, goal at {bound} {goal}: {verdict}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns after the first are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compose(rows: list[Contender], args: Args, where: str) -> str:
    """The whole report: the table, what became of the goals, each round's numbers."""
    table = summarise(rows)
    cells = [
        [name, *(f"{columns[c]:{form}}" if c in columns else "" for c, form in COLUMNS.items())]
        for name, columns in table.items()
    ]
    raw = [[row.name, *(f"{m[STEPS]:.1f}" for m in row.rounds)] for row in rows]
    goals = "\n".join(line for row in rows for line in judge(row, table[row.name]))
    given = {key: value for key, value in asdict(args).items() if value != ""}
    flags = [f"--{key.replace('_', '-')} {value}" for key, value in given.items()]
    note = "SB3 is Stable-Baselines3 with as many torch threads as cores, without keep_memory."
    if not importlib.util.find_spec("stable_baselines3"):
        note = "For the missing row of SB3: pip install -r results/speed/requirements.txt"
    return f"""# Speed of gorila_dqn.py

    python results/speed/gorila.py {" ".join(flags)}

On {where}.
Medians of {args.rounds} rounds of {args.seconds:g} s, all on {args.cores} cores, an update of 32
transitions through the network of DQN 2015 every {args.steps_per_update} steps. {note}

{markdown(["contender", *COLUMNS], cells)}

{goals}

Steps per second in each round:

{markdown(["contender", *(f"round {i + 1}" for i in range(args.rounds))], raw)}
"""


def main(args: Args) -> str:
    if not args.env_id.endswith("NoFrameskip-v4"):
        raise SystemExit(f"--env-id must be a *NoFrameskip-v4 game, not {args.env_id}.")
    if args.cores < 1 or args.rounds < 1:
        raise SystemExit("--cores and --rounds must be at least 1.")
    if not Path(args.output).parent.is_dir():
        raise SystemExit(f"There is no folder for --output {args.output}.")
    gorila_dqn.make_env(args.env_id)  # an unknown game ends here, in one sentence
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    where, rows = machine(), contenders()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(1)
    try:
        for row in tqdm(rows * args.rounds, unit="contender", disable=None):
            row.rounds.append(measure(row, args))
            tqdm.write(f"{row.rounds[-1][STEPS]:>8.1f} steps/s  {row.name}")
    except KeyboardInterrupt:
        raise SystemExit("Stopped; nothing was written.") from None
    text = compose(rows, args, where)
    if args.output:
        Path(args.output).write_text(text)
    return text


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
