"""How fast is straw.py? Steps/s of plans beside the LSTM's, and what not looking saves.

    Measures   straw.py's workers on mazes and Atari and its text, by model; evaluation of a
               checkpoint with the feature network skipped while committed, and not skipped
    Run        python results/speed/straw.py --checkpoint runs/RUN/checkpoint.pt
    Needs      Linux or macOS, an idle machine
    Takes      about 10 minutes

Rounds in which the contenders take turns, so that a slow minute of the machine can hit any of them;
the table has their medians and the ratios to the lstm model of the same task, of which at least 0.6
is wanted. An evaluation includes the making of its games. Everything runs in this one process: a
step is played and learned from, without the parameters' copies and the queue of several workers.
Networks are new and plans last 2 steps or so; --checkpoint shows what longer commitments save.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from contest import machine
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import straw


@dataclass
class Args:
    tasks: tuple[str, ...] = ("maze", "atari", "text")  # measured one after the other
    envs_per_worker: int = 8  # games side by side
    plan_length: int = 500  # T
    rounds: int = 5  # the tables show medians
    seconds: float = 5.0  # of each contender in each round
    checkpoint: str = ""  # of a planning agent: its evaluation is measured, economic and not
    eval_episodes: int = 20  # of such an evaluation
    output: str = ""  # a markdown file to write the tables to


MODELS = ("lstm", "straw", "strawe", "ff")


def steps_of_games(args: straw.Args) -> Iterator[int]:
    """Play and learn; yields the steps of each rollout."""
    torch.manual_seed(args.seed)
    net = straw.make_policy(args)
    optimizer = straw.SharedRMSProp(list(net.parameters()), args.rmsprop_decay, args.rmsprop_eps)
    envs = [straw.make_env(args) for _ in range(args.envs_per_worker)]
    seeds = straw.independent_seeds(len(envs), args.seed)
    for rollout, _ in straw.rollouts(envs, seeds, net, args.t_max):
        straw.update(net, optimizer, rollout, args.learning_rate, args)
        yield rollout.r_t.numel()


def steps_of_text(args: straw.Args) -> Iterator[int]:
    """Learn from pieces of random text; yields their characters."""
    torch.manual_seed(args.seed)
    net = straw.TextModel(args)
    optimizer, state = straw.make_optimizer(net, args), net.initial_state(args.batch_size)
    while True:
        x = torch.randint(0, straw.SYMBOLS, (args.t_max + 1, args.batch_size))
        out, _ = straw.update_text(net, optimizer, x[:-1], x[1:], state, args.learning_rate, args)
        state = tuple(part.detach() for part in out.state)
        yield x[1:].numel()


def speed(steps: Iterator[int], seconds: float) -> float:
    """Steps/s, of whole rollouts or pieces."""
    total, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        total += next(steps)
    return total / (time.perf_counter() - start)


def settings(task: str, model: str, args: Args) -> straw.Args:
    """Rates so small that a network stays what it is, with the commitments of its beginning."""
    flags = ("envs_per_worker", "plan_length")
    given = {flag: getattr(args, flag) for flag in flags}
    return straw.with_defaults(straw.Args(task=task, model=model, learning_rate=1e-9, **given))


def measure_models(args: Args) -> list[tuple]:
    """Rows of the first table: task, model, steps/s, ratio to lstm."""
    contenders, rounds = {}, {}
    for task in args.tasks:
        kind = steps_of_text if task == "text" else steps_of_games
        for model in MODELS:
            contenders[task, model] = kind(settings(task, model, args))
            next(contenders[task, model])  # the first is slower
            rounds[task, model] = []
    for _ in tqdm(range(args.rounds), unit="round", disable=None):
        for name, steps in contenders.items():
            rounds[name].append(speed(steps, args.seconds))
    middle = {name: median(speeds) for name, speeds in rounds.items()}
    return [
        (*name, f"{s:,.0f}", f"{s / middle[name[0], 'lstm']:.2f}") for name, s in middle.items()
    ]


def measure_economy(args: Args) -> list[tuple]:
    """Rows of the second table: how long evaluations of one checkpoint take, looking always or not.

    All of them, with the making and playing of games, then those of the network alone.
    """
    given = torch.load(args.checkpoint, map_location="cpu")
    names = {field.name for field in fields(straw.Args)}
    theirs = straw.Args(**{name: value for name, value in given["args"].items() if name in names})
    theirs = replace(theirs, eval_episodes=args.eval_episodes)
    if theirs.task == "text" or theirs.model not in ("straw", "strawe"):
        raise SystemExit(f"{args.checkpoint} is no agent that plans: nothing could be skipped.")
    net = straw.make_policy(theirs)
    net.load_state_dict(given["net"])
    clock = [0.0]
    net.register_forward_pre_hook(lambda *_: clock.append(clock.pop() - time.perf_counter()))
    net.register_forward_hook(lambda *_: clock.append(clock.pop() + time.perf_counter()))
    whole, inside, committed = {False: [], True: []}, {False: [], True: []}, 0.0
    for _ in tqdm(range(args.rounds), unit="round", disable=None):
        for economic in whole:
            net.economic, clock[0] = economic, 0.0
            start = time.perf_counter()
            committed = straw.evaluate(net, theirs, given["T"])["eval/committed"]
            whole[economic].append(time.perf_counter() - start)
            inside[economic].append(clock[0])
    rows = []
    for what, seconds in (("the evaluation", whole), ("the network", inside)):
        always, economic = median(seconds[False]), median(seconds[True])
        saved = f"{100 * (1 - economic / always):.0f} %"
        milliseconds = (f"{1000 * always:.1f}", f"{1000 * economic:.1f}")
        rows.append((what, f"{committed:.0f} %", *milliseconds, saved))
    return rows


def markdown(titles: tuple, rows: list[tuple]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(args: Args) -> str:
    if not set(args.tasks) <= {"maze", "atari", "text"}:
        raise SystemExit(f"--tasks are among maze, atari and text, not {' '.join(args.tasks)}.")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise SystemExit(f"There is no --checkpoint {args.checkpoint}.")
    if not Path(args.output).parent.is_dir():
        raise SystemExit(f"There is no folder for --output {args.output}.")
    torch.set_num_threads(1)
    straw.keep_memory()  # as in a worker
    sections = []
    if args.tasks:
        sections.append((("task", "model", "steps/s", "times lstm"), measure_models))
    if args.checkpoint:
        titles = ("of", "committed", "ms, looking always", "ms, economic", "saved")
        sections.append((titles, measure_economy))
    tables = "\n\n".join(markdown(titles, measured(args)) for titles, measured in sections[::-1])
    given = asdict(args) | {"tasks": " ".join(args.tasks)}
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in given.items() if v != "")
    command = f"    python results/speed/straw.py {flags}"
    text = f"# Speed of straw.py\n\n{command}\n\nOn {machine(1)}.\n\n{tables}\n"
    if args.output:
        Path(args.output).write_text(text)
    return text


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
