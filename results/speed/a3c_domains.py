"""How fast do workers of a3c_continuous.py and a3c_maze.py learn, beside their environments?

    Measures   steps/s of one process: random actions; acting and learning as a worker does
    Run        python results/speed/a3c_domains.py --output results/speed/a3c_domains.md
    Needs      an idle machine; MuJoCo, pygame and OpenGL for the rows that use them
    Takes      2 minutes

What a worker does is done in this process: copy the parameters, act, update. An environment that
cannot be made has no row but a line that says why.
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

EPISODES = {  # always of so many steps
    "Pendulum-v1": 200,
    "Pendulum-v1 --pixels": 200,
    "Reacher-v5": 50,
    "HalfCheetah-v5": 1000,
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


def continuous(env_id: str, pixels: bool, steps: int) -> tuple[Call, Call]:
    """A call is a whole episode."""
    args = a3c_continuous.Args(env_id=env_id, pixels=pixels)
    alone, env = (a3c_continuous.make_env(env_id, pixels) for _ in range(2))
    shapes = env.observation_space.shape, *env.action_space.shape
    net = a3c_continuous.GaussianActorCritic(*shapes)
    played = a3c_continuous.play_alone(env, 0, net, args.t_max)
    return random_actions(alone, steps), worker(a3c_continuous, played, net, args)


def maze(env_id: str) -> tuple[Call, Call, int]:
    """A call is a segment. Both walk in one maze, because a process cannot hold two."""
    args = a3c_maze.Args(env_id=env_id)
    env = a3c_maze.make_env(args)
    net = a3c_maze.MazeActorCritic(env.action_space.n)
    walks = a3c_maze.explore_mazes(env, 0, net, args.t_max)
    return random_actions(env, args.t_max), worker(a3c_maze, walks, net, args), args.t_max


def main(args: Args) -> None:
    torch.set_num_threads(1)  # as in a worker
    contenders, steps, missing = {}, {}, []
    for name in (*EPISODES, "MiniWorld-MazeS3-v0"):
        try:
            if name in EPISODES:
                env_id, *pixels = name.split()
                steps[name] = EPISODES[name]
                alone, learner = continuous(env_id, bool(pixels), steps[name])
            else:
                alone, learner, steps[name] = maze(name)
        except SystemExit as error:
            missing.append(str(error))
            continue
        contenders |= {f"{name}, random actions": alone, f"{name}, worker": learner}

    took = race(contenders, args.rounds, args.seconds)
    rows = []
    for contender, milliseconds in took.items():
        name = contender.split(",")[0]
        part = f"{100 * took[f'{name}, random actions'] / milliseconds:.0f}"
        rows.append([contender, f"{1000 * steps[name] / milliseconds:,.0f}", part])
    titles = ["one process", "steps/s", "% of the environment alone"]
    table = markdown(titles, rows)
    publish("A3C in continuous domains and mazes", 1, [table, *missing], args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
