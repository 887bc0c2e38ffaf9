"""How fast are the asynchronous methods? Emulator frames/s beside the emulator and a library.

    Measures   the emulator, the preprocessed game, a3c_atari.py, async_nstep_q.py, SB3's A2C
    Run        python results/speed/a3c.py --output results/speed/a3c.md
    Needs      Linux, an idle machine, pip install -r results/speed/requirements.txt
    Takes      about 15 minutes

One run measures everything: the same game, the same cores, fresh processes for each contender, and
rounds in which the contenders take turns, so that a slow minute of the machine can hit any of them.
A contender's processes add the steps they take to a shared counter T. The window opens --warm-up
seconds after T first moves; start-up, checkpoints and evaluations are outside of it.
"""

import importlib.util
import os
import platform
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

import ale_py
import gymnasium as gym
import torch
import torch.multiprocessing as mp
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import a3c_atari
import async_nstep_q

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banners


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # any *NoFrameskip-v4 game
    num_processes: int = 2  # of a contender (SB3 has its own), and the cores given to each of them
    rounds: int = 3  # the table shows their median
    seconds: float = 15.0  # measured of each contender in each round
    warm_up: float = 5.0  # seconds before these, counted from a contender's first step
    output: str = ""  # a markdown file to write the tables to


FRAMES = 4  # of the emulator, in a step of the agent
SPEED, TIMES, PART = "frames/s", "times SB3's A2C", "% of the emulator"
PSS, RSS = "MB per worker (PSS)", "MB per worker (RSS)"  # shared pages in proportion, in full
COLUMNS = {SPEED: ",.0f", TIMES: ".2f", PART: ".1f", PSS: ".0f", RSS: ".0f"}  # and their formats


@dataclass
class Contender:
    name: str
    prepare: Callable  # (args, T) -> a worker, its arguments after the rank, how many of them
    goals: dict[str, float] = field(default_factory=dict)  # by column: at least this; PSS: at most
    rounds: list[dict[str, float]] = field(default_factory=list)  # measured, by column


# ---- The contenders -----------------------------------------------------------------------------


def emulator_worker(rank: int, env_id: str, T) -> None:
    """One game, random actions: ale.act and nothing else."""
    ale = gym.make(env_id).unwrapped.ale
    actions = random.Random(rank).choices(ale.getMinimalActionSet(), k=100 * FRAMES)
    while mp.parent_process().is_alive():
        for action in actions:
            ale.act(action)
            if ale.game_over():
                ale.reset_game()
        with T.get_lock():
            T.value += len(actions) // FRAMES


def game_worker(rank: int, env_id: str, T) -> None:
    """One game as the workers of a3c_atari.py see it, random actions."""
    env = a3c_atari.make_env(env_id)
    env.reset(seed=rank)
    actions = random.Random(rank).choices(range(env.action_space.n), k=100)
    while mp.parent_process().is_alive():
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        with T.get_lock():
            T.value += len(actions)


def sb3_worker(rank: int, env_id: str, vec_env: str, threads: int, T) -> None:
    """Stable-Baselines3's A2C on 16 games, all else its defaults."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it has processes to stop itself
    from stable_baselines3 import A2C
    from stable_baselines3.common import env_util
    from stable_baselines3.common import vec_env as vec_envs

    def on_step(names: dict, _) -> bool:
        T.value = names["self"].num_timesteps
        return mp.parent_process().is_alive()  # goes on

    torch.set_num_threads(threads)
    games = env_util.make_atari_env(env_id, n_envs=16, vec_env_cls=getattr(vec_envs, vec_env))
    model = A2C("CnnPolicy", vec_envs.VecFrameStack(games, n_stack=4), device="cpu")
    model.learn(total_timesteps=10**12, callback=on_step)


def alone(worker: Callable, args: Args, T) -> tuple[Callable, tuple, int]:
    return worker, (args.env_id, T), args.num_processes


def sb3(vec_env: str, threads: int, args: Args, T) -> tuple[Callable, tuple, int]:
    return sb3_worker, (args.env_id, vec_env, threads, T), 1


def a3c(envs_per_worker: int, t_max: int, args: Args, T) -> tuple[Callable, tuple, int]:
    """The workers of a3c_atari.py with what its main gives them."""
    settings = a3c_atari.Args(args.env_id, envs_per_worker=envs_per_worker, t_max=t_max)
    num_actions = a3c_atari.make_env(args.env_id).action_space.n
    net = a3c_atari.ActorCritic(num_actions, settings.network, settings.lstm).share_memory()
    theta = list(net.parameters())
    optimizer = a3c_atari.SharedRMSProp(theta, settings.rmsprop_decay, settings.rmsprop_eps)
    log = mp.get_context("spawn").Queue()
    return a3c_atari.worker, (settings, 0, net, optimizer, T, log), args.num_processes


def async_q(algorithm: str, envs_per_worker: int, args: Args, T) -> tuple[Callable, tuple, int]:
    """The workers of async_nstep_q.py with what its main gives them."""
    settings = async_nstep_q.Args(algorithm, args.env_id, envs_per_worker=envs_per_worker)
    num_actions = async_nstep_q.make_env(args.env_id).action_space.n
    net, target_net = (
        async_nstep_q.QNetwork(num_actions, settings.network).share_memory() for _ in range(2)
    )
    theta = list(net.parameters())
    optimizer = async_nstep_q.SharedRMSProp(theta, settings.rmsprop_decay, settings.rmsprop_eps)
    epsilons = torch.full((args.num_processes, envs_per_worker), 0.1).share_memory_()
    log = mp.get_context("spawn").Queue()
    arguments = settings, 0, net, target_net, optimizer, epsilons, T, log
    return async_nstep_q.worker, arguments, args.num_processes


def contenders() -> list[Contender]:
    """The emulator first; one line for every other row of the table."""
    command = "a3c_atari.py --envs-per-worker"
    goals_1, goals_8 = {TIMES: 2, PART: 25, PSS: 350}, {TIMES: 4, PART: 45, PSS: 350}
    rows = [
        Contender("the emulator alone: ale.act", partial(alone, emulator_worker)),
        Contender("the preprocessed game, random actions", partial(alone, game_worker)),
        Contender(f"{command} 1 --t-max 5", partial(a3c, 1, 5), goals_1),
        Contender(f"{command} 1 --t-max 20", partial(a3c, 1, 20), {PSS: 350}),
        Contender(f"{command} 8 --t-max 5", partial(a3c, 8, 5), goals_8),
        Contender(f"{command} 8 --t-max 20", partial(a3c, 8, 20), goals_8),
    ]
    for n, algorithm in product((1, 8), ("nstep-q", "onestep-q", "onestep-sarsa")):
        name = f"async_nstep_q.py --algorithm {algorithm} --envs-per-worker {n}"
        rows.append(Contender(name, partial(async_q, algorithm, n), {PSS: 350}))
    if importlib.util.find_spec("stable_baselines3"):
        for vec_env, n in product(("DummyVecEnv", "SubprocVecEnv"), (1, 2)):
            name = f"SB3 {version('stable-baselines3')} A2C, {vec_env}, torch threads: {n}"
            rows.append(Contender(name, partial(sb3, vec_env, n)))
    return rows


# ---- The measurement ----------------------------------------------------------------------------


def memory(pid: int, key: str) -> float:
    """Megabytes of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(rf"^{key}: +(\d+) kB", text, re.MULTILINE)[1]) * 1024 / 1e6


def measure(contender: Contender, args: Args) -> dict[str, float]:
    """One contender in one round, from fresh processes to none left; memory of the largest."""
    T = mp.get_context("spawn").Value("q", 0)
    worker, arguments, how_many = contender.prepare(args, T)
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for this process alone
    workers = mp.spawn(worker, arguments, how_many, join=False)
    signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        while T.value == 0:
            workers.join(timeout=0.1)  # a worker's exception is raised here
        workers.join(timeout=args.warm_up)
        steps, start = T.value, time.perf_counter()
        workers.join(timeout=args.seconds)
        speed = FRAMES * (T.value - steps) / (time.perf_counter() - start)
        pss, rss = (max(memory(i, key) for i in workers.pids()) for key in ("Pss", "Rss"))
        return {SPEED: speed, PSS: pss, RSS: rss}
    finally:
        for process in workers.processes:
            process.terminate()
            process.join()


# ---- The report ---------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores, versions, and how busy it is."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    versions = [f"{name} {version(name)}" for name in ("torch", "ale-py", "gymnasium", "numpy")]
    return (
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {', '.join(versions)}; "
        f"load average before the start {os.getloadavg()[0]:.2f}"
    )


def summarise(rows: list[Contender]) -> dict[str, dict[str, float]]:
    """Columns by row: medians and their ratios. Of SB3's configurations only the fastest."""
    speed = {row.name: median(m[SPEED] for m in row.rounds) for row in rows}
    slower = sorted((row.name for row in rows if row.prepare.func is sb3), key=speed.get)
    fastest = slower.pop() if slower else None
    table = {}
    for row in rows:
        columns = {SPEED: speed[row.name], PART: 100 * speed[row.name] / speed[rows[0].name]}
        if fastest:
            columns[TIMES] = speed[row.name] / speed[fastest]
        if PSS in row.goals:
            columns |= {key: max(m[key] for m in row.rounds) for key in (PSS, RSS)}
        if row.name not in slower:
            table[row.name] = columns
    return table


def judge(row: Contender, columns: dict[str, float]) -> Iterator[str]:
    """A line for each goal of a row; those against SB3 only if it was measured."""
    for column in filter(columns.get, row.goals):
        value, goal = columns[column], row.goals[column]
        reached, bound = (value <= goal, "most") if column == PSS else (value >= goal, "least")
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
    raw = [[row.name, *(f"{m[SPEED]:,.0f}" for m in row.rounds)] for row in rows]
    goals = "\n".join(line for row in rows if row.goals for line in judge(row, table[row.name]))
    given = {key: value for key, value in asdict(args).items() if value != ""}
    flags = [f"--{key.replace('_', '-')} {value}" for key, value in given.items()]
    note = "SB3 is Stable-Baselines3, the fastest of its configurations, without keep_memory."
    if not importlib.util.find_spec("stable_baselines3"):
        note = "For the missing rows of SB3: pip install -r results/speed/requirements.txt"
    return f"""# Speed of a3c_atari.py

    python results/speed/a3c.py {" ".join(flags)}

On {where}.
Medians of {args.rounds} rounds of {args.seconds:g} s, all on {args.num_processes} cores; frames are
the emulator's, {FRAMES} in a step of the agent. {note}

{markdown(["contender", *COLUMNS], cells)}

{goals}

Frames per second in each round:

{markdown(["contender", *(f"round {i + 1}" for i in range(args.rounds))], raw)}
"""


def main(args: Args) -> str:
    if not args.env_id.endswith("NoFrameskip-v4"):
        raise SystemExit(f"--env-id must be a *NoFrameskip-v4 game, not {args.env_id}.")
    if args.num_processes < 1 or args.rounds < 1:
        raise SystemExit("--num-processes and --rounds must be at least 1.")
    if not Path(args.output).parent.is_dir():
        raise SystemExit(f"There is no folder for --output {args.output}.")
    a3c_atari.make_env(args.env_id)  # an unknown game ends here, in one sentence
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    where, rows = machine(), contenders()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.num_processes])
    try:
        for row in tqdm(rows * args.rounds, unit="contender", disable=None):
            row.rounds.append(measure(row, args))
            tqdm.write(f"{row.rounds[-1][SPEED]:>10,.0f} frames/s  {row.name}")
    except KeyboardInterrupt:
        raise SystemExit("Stopped; nothing was written.") from None
    text = compose(rows, args, where)
    if args.output:
        Path(args.output).write_text(text)
    return text


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
