"""How fast are policy_distillation.py's players and students, beside emulator and teacher?

    Measures   collection, updates and single decisions of policy_distillation.py; sizes on disk
    Run        python results/speed/distillation.py --output results/speed/distillation.md
    Needs      an idle machine
    Takes      about 10 minutes

One run measures everything in rounds in which the contenders take turns, so that a slow minute of
the machine can hit any of them. Those that play do so in fresh processes that add their steps to a
shared counter T; the window opens --warm-up seconds after T first moves. Those that learn or decide
do it in this process, an eighth of the time to warm up.
"""

import io
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from unittest.mock import patch

import ale_py
import gymnasium as gym
import torch
import torch.multiprocessing as mp
import tyro
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import policy_distillation
from policy_distillation import WIDTHS, GameNetwork, ScreenMemory

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banners


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"  # any *NoFrameskip-v4 game
    num_processes: int = 2  # that play, and the cores given to every contender
    envs_per_collector: int = 8  # games that a collector plays side by side
    rounds: int = 3  # the tables show their medians
    seconds: float = 15.0  # measured of each contender in each round
    warm_up: float = 5.0  # seconds before these, counted from the first step of those that play
    output: str = ""  # a markdown file to write the tables to


FRAMES = 4  # of the emulator, in a step


@dataclass
class Contender:
    name: str
    measure: Callable[[Args], float]  # steps, updates or decisions per second
    goal: float = 0.0  # at least this many times the first of its table; 0: none
    rounds: list[float] = field(default_factory=list)


# ---- Those that play ----------------------------------------------------------------------------


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


def measure_processes(role: Callable, arguments: tuple, T, args: Args) -> float:
    """Steps per second of role(rank, *arguments), from fresh processes to none left."""
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for this process alone
    workers = mp.spawn(role, arguments, args.num_processes, join=False)
    signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        while T.value == 0:
            workers.join(timeout=0.1)  # a worker's exception is raised here
        workers.join(timeout=args.warm_up)
        steps, start = T.value, time.perf_counter()
        workers.join(timeout=args.seconds)
        return (T.value - steps) / (time.perf_counter() - start)
    finally:
        for process in workers.processes:
            process.terminate()
            process.join()


def emulator(args: Args) -> float:
    T = mp.get_context("spawn").Value("q", 0)
    return measure_processes(emulator_worker, (args.env_id, T), T, args)


def counted_collector(rank: int, T, *arguments) -> None:
    """A collector of policy_distillation.py; T counts the steps that it keeps."""
    write = ScreenMemory.write

    def count_and_write(memory: ScreenMemory, lanes: slice, t: int, s: torch.Tensor, *rest) -> None:
        write(memory, lanes, t, s, *rest)
        with T.get_lock():
            T.value += len(s)

    with patch.object(ScreenMemory, "write", count_and_write):
        policy_distillation.collector(rank, *arguments)


def collection(args: Args) -> float:
    """The collectors of policy_distillation.py with what its distill gives them, round by round."""
    spawn = mp.get_context("spawn")
    given = {"num_collectors": args.num_processes, "envs_per_collector": args.envs_per_collector}
    settings = policy_distillation.Args(env_ids=(args.env_id,), memory_steps=20_000, **given)
    settings.round_steps = settings.memory_steps
    num_actions = [policy_distillation.make_env(args.env_id).action_space.n]
    teachers = nn.ModuleList([GameNetwork(WIDTHS["same"], num_actions)]).share_memory()
    wanted, T, log = spawn.Value("q", 10**9), spawn.Value("q", 0), spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = T, settings, Path(folder, "memory"), teachers, None, 0, wanted, log
        return measure_processes(counted_collector, arguments, T, args)


# ---- Those that learn or decide -----------------------------------------------------------------


def measure_calls(call: Callable, seconds: float) -> float:
    """Calls per second."""
    end = time.perf_counter() + seconds / 8
    while time.perf_counter() < end:
        call()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        call()
        calls += 1
    return calls / (time.perf_counter() - start)


def updates(student: str, args: Args) -> float:
    """Updates per second of a student, sampling from memory included."""
    settings = policy_distillation.Args(env_ids=(args.env_id,), round_updates=10)
    net = GameNetwork(WIDTHS[student], [6])
    optimizer = policy_distillation.make_optimizer(net, settings)
    with tempfile.TemporaryDirectory() as folder:
        memory = ScreenMemory(Path(folder, "memory"), lanes=1, capacity=5000, spare=0, width=6)
        memory.screens.random_(0, 256)
        memory.ages.fill_(3)
        memory.values.normal_()
        learn = partial(policy_distillation.student_update, net, optimizer, settings)
        learn = policy_distillation.recorded(learn, settings)
        call = partial(policy_distillation.learn_from_memories, learn, [memory], settings, 5000)
        return settings.round_updates * measure_calls(call, args.seconds)


def decisions(net: nn.Module, args: Args) -> float:
    """Forward passes of a single screen per second."""
    s = torch.randint(0, 256, (1, 84, 84, 4), dtype=torch.uint8)
    with torch.no_grad():
        return measure_calls(partial(net, s), args.seconds)


def contenders() -> dict[str, list[Contender]]:
    """A table by its unit; the first of each is what the others are compared with."""
    teacher = GameNetwork(WIDTHS["same"], [6])
    students = {name: GameNetwork(WIDTHS[name], [6]) for name in ("net1", "net2", "net3")}
    size = {name: f"{name}, {kilobytes(net):,.0f} kB" for name, net in students.items()}
    return {
        "steps/s": [
            Contender("the emulator alone: ale.act", emulator),
            Contender("collection: emulator, teacher, replay", collection, goal=0.4),
        ],
        "updates/s": [
            Contender("--student same, the teacher's size", partial(updates, "same")),
            *(Contender(f"--student {name}", partial(updates, name)) for name in students),
        ],
        "decisions/s": [
            Contender(f"the teacher, {kilobytes(teacher):,.0f} kB", partial(decisions, teacher)),
            *(Contender(size[name], partial(decisions, net)) for name, net in students.items()),
        ],
    }


def kilobytes(net: nn.Module) -> float:
    """On disk."""
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.tell() / 1e3


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


def judge(rows: list[Contender]) -> Iterator[str]:
    """A line for each goal."""
    for row in rows:
        if row.goal:
            ratio = median(row.rounds) / median(rows[0].rounds)
            verdict = "reached" if ratio >= row.goal else "**not reached**"
            yield f"- {row.name}: {ratio:.2f} times, goal at least {row.goal}: {verdict}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns after the first are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compose(tables: dict[str, list[Contender]], args: Args, where: str) -> str:
    """The whole report: medians with their ratios and every round, then the goals."""
    texts = []
    for unit, rows in tables.items():
        header = [f"contender, {unit}", "median", "times the first"]
        header += [f"round {i + 1}" for i in range(args.rounds)]
        first, cells = median(rows[0].rounds), []
        for row in rows:
            numbers = [f"{value:,.0f}" for value in (median(row.rounds), *row.rounds)]
            ratio = f"{median(row.rounds) / first:.2f}"
            cells.append([row.name, numbers[0], ratio, *numbers[1:]])
        texts.append(markdown(header, cells))
    goals = "\n".join(line for rows in tables.values() for line in judge(rows))
    given = {key: value for key, value in asdict(args).items() if value != ""}
    flags = [f"--{key.replace('_', '-')} {value}" for key, value in given.items()]
    body = "\n\n".join(texts)
    return f"""# Speed of policy_distillation.py

    python results/speed/distillation.py {" ".join(flags)}

On {where}.
Medians of {args.rounds} rounds of {args.seconds:g} s, all on {args.num_processes} cores. A step is
{FRAMES} frames of the emulator; an update has a minibatch of 32; a decision is a forward pass of
one screen; sizes are those of the parameters on disk.

{body}

{goals}
"""


def main(args: Args) -> str:
    if not args.env_id.endswith("NoFrameskip-v4"):
        raise SystemExit(f"--env-id must be a *NoFrameskip-v4 game, not {args.env_id}.")
    if min(args.num_processes, args.envs_per_collector, args.rounds) < 1:
        raise SystemExit("--num-processes, --envs-per-collector, --rounds must be at least 1.")
    if not Path(args.output).parent.is_dir():
        raise SystemExit(f"There is no folder for --output {args.output}.")
    policy_distillation.make_env(args.env_id)  # an unknown game ends here, in one sentence
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    where, tables = machine(), contenders()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.num_processes])
    torch.set_num_threads(args.num_processes)
    policy_distillation.keep_memory()
    plan = [(unit, row) for unit, rows in tables.items() for row in rows] * args.rounds
    try:
        for unit, row in tqdm(plan, unit="contender", disable=None):
            row.rounds.append(row.measure(args))
            tqdm.write(f"{row.rounds[-1]:>10,.0f} {unit}  {row.name}")
    except KeyboardInterrupt:
        raise SystemExit("Stopped; nothing was written.") from None
    text = compose(tables, args, where)
    if args.output:
        Path(args.output).write_text(text)
    return text


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
