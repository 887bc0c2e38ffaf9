"""How fast do workers of a3c_continuous.py and a3c_maze.py learn, beside their environments?

    Measures   steps/s of one process: random actions; acting and learning as a worker does
    Run        python results/speed/a3c_domains.py --output results/speed/a3c_domains.md
    Needs      an idle machine; MuJoCo, pygame and OpenGL for the rows that use them
    Takes      3 minutes

What a worker does is done in this process: copy the parameters, act, update; once an episode or,
as in the scripts' Run lines, once a segment of --t-max steps. An environment that cannot be made
has no row but a line that says why.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import gymnasium as gym
import torch
import tyro
from contest import markdown, publish, race
from torch import nn

import a3c_continuous
import a3c_maze


@dataclass
class Args:
    rounds: int = 5  # the table shows their median
    seconds: float = 2.0  # of each contender in each round
    output: str = ""  # a markdown file to write the table to


Call = Callable[[], None]

EPISODES = {"Pendulum-v1": 200, "Reacher-v5": 50, "HalfCheetah-v5": 1000}  # steps, always

WORKERS = {  # flags of a3c_continuous.py
    "Pendulum-v1": {},
    "Pendulum-v1 --t-max 20": {"t_max": 20},
    "Pendulum-v1 --pixels": {"pixels": True},
    "Reacher-v5": {},
    "Reacher-v5 --t-max 5": {"t_max": 5},
    "HalfCheetah-v5": {},
    "HalfCheetah-v5 --t-max 20": {"t_max": 20},
}


def random_actions(env: gym.Env, steps: int) -> Call:
    """The environment alone."""
    actions = [env.action_space.sample() for _ in range(steps)]
    env.reset(seed=0)

    def call() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return call


def worker(script: ModuleType, played: Iterator, net: nn.Module, args) -> Call:
    """A trajectory and its update; net acts, a copy of it is what workers share."""
    shared = copy.deepcopy(net)
    theta = list(shared.parameters())
    optimizer = script.SharedRMSProp(theta, args.rmsprop_decay, args.rmsprop_eps)

    def call() -> None:
        script.copy_parameters(shared, net)
        trajectory, _ = next(played)
        script.update(net, optimizer, trajectory, args.learning_rate, args)

    return call


def continuous(name: str) -> tuple[Call, int, Call, int]:
    """What is called and how many steps it takes: of the environment alone, of a worker."""
    env_id = name.split()[0]
    args = a3c_continuous.Args(env_id=env_id, **WORKERS[name])
    alone, env = (a3c_continuous.make_env(env_id, args.pixels) for _ in range(2))
    shapes = env.observation_space.shape, *env.action_space.shape
    net = a3c_continuous.GaussianActorCritic(*shapes)
    learner = worker(a3c_continuous, a3c_continuous.play(env, 0, net, args.t_max), net, args)
    steps = EPISODES[env_id]
    return random_actions(alone, steps), steps, learner, args.t_max or steps


def maze(env_id: str) -> tuple[Call, int, Call, int]:
    """The same. Both walk in one maze, because a process cannot hold two."""
    args = a3c_maze.Args(env_id=env_id)
    env = a3c_maze.make_env(args)
    net = a3c_maze.MazeActorCritic(env.action_space.n)
    learner = worker(a3c_maze, a3c_maze.play(env, 0, net, args.t_max), net, args)
    return random_actions(env, args.t_max), args.t_max, learner, args.t_max


def main(args: Args) -> None:
    torch.set_num_threads(1)  # as in a worker
    contenders, steps, missing = {}, {}, []
    for name in (*WORKERS, "MiniWorld-MazeS3-v0"):
        alone, learner = f"{name}, random actions", f"{name}, worker"
        try:
            made = continuous(name) if name in WORKERS else maze(name)
        except SystemExit as error:
            missing.append(str(error))
            continue
        contenders[alone], steps[alone], contenders[learner], steps[learner] = made

    took = race(contenders, args.rounds, args.seconds)
    speeds = {name: 1000 * steps[name] / milliseconds for name, milliseconds in took.items()}
    rows = []
    for contender, speed in speeds.items():
        part = 100 * speed / speeds[f"{contender.split(',')[0]}, random actions"]
        rows.append([contender, f"{speed:,.0f}", f"{part:.0f}"])
    titles = ["one process", "steps/s", "% of the environment alone"]
    table = markdown(titles, rows)
    publish("A3C in continuous domains and mazes", 1, [table, *missing], args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
