"""Gorila: many actors and learners share one DQN through a sharded parameter server, on Ray.

    Paper    Nair et al., "Massively parallel methods for deep reinforcement learning", arXiv 2015
    Shows    algorithm 1: DQN distributed over processes and machines that may die (section 4)
    Run      python gorila_dqn.py --env-id PongNoFrameskip-v4 --orthogonal-init --num-actors 2
               --num-learners 2 --total-timesteps 2000000 --learning-rate 1e-2 --target-period 250
               --epsilon-updates 25000 --learning-starts 10000 --eval-every 500000
    Result   not yet measured
    Run      python gorila_dqn.py --env-id PongNoFrameskip-v4 --orthogonal-init --num-actors 1
               --num-learners 1 --total-timesteps 2000000 --learning-rate 1e-2 --target-period 250
               --epsilon-updates 25000 --learning-starts 10000 --eval-every 500000
    Result   not yet measured
    Run      python gorila_dqn.py --orthogonal-init --num-actors 2
               --num-learners 2 --total-timesteps 2000000 --learning-rate 1e-2 --target-period 250
               --epsilon-updates 25000 --learning-starts 10000 --eval-every 500000
    Result   not yet measured

    Actor --steps--> ReplayMemory --minibatches--> Learner --gradients, versions--.
      ^                                               ^                           |
      | W+ when an episode begins,                    | W+ and its versions       |
      | and every --pull-every steps                  | for each minibatch        v
      '-----------------------------------------------'------- ParameterServerShard 1 ... K

--replay local bundles an actor, a memory and a learner in one process, where they share one
network; --replay global runs each in a process of its own, around one memory. At the paper's
scale, on machines that Ray has joined (ray start; run folder on a disk that all of them see):
    python gorila_dqn.py --ray-address auto --num-actors 100 --num-learners 100 --num-shards 31
      --replay-capacity 100000000 --steps-per-update 1 --max-staleness 1000
      --learning-starts 1 --pull-every 1
      --target-period 60000 --epsilon-updates 1000000

Departures: ours (the paper's, or what is known of it)
    as many bundles as there are cores, 1 shard (100 bundles, 31 machines for the parameters)
    50 million steps of all actors together, in the Run lines 2 million (up to 6 days)
    an update every 4 steps (every step): in a bundle by turns; with --replay global learners wait
      for steps and actors, once they are 1,000 ahead, for learners
    target network every 2,500 updates (60,000), exploration falls during 62,500 (1 million): 10,000
      and 250,000 steps here; a learner that restarts takes the current parameters as its target
    a shard that dies falls back to its last own checkpoint; a gradient that it had applied but not
      yet answered for may be applied again; one that comes from a version that was undone is
      dropped; a memory that dies starts empty and waits for its first steps again, a learner
      forgets what losses were usual; so they all do with --resume (not told)
    a gradient that is not finite is dropped; the run then ends
    a learner fetches parameters right after it has sent a gradient (right before its next
      minibatch), so it sees what others send in between one minibatch later
    actors fetch parameters every 100 steps within an episode (every step), in a bundle share those
      of the learner, also when an episode begins; each shard judges by itself whether a gradient is
      too old (not told)
    a memory of 1 million steps shared out among the actors (1 million each), 50,000 of them before
      the first update (none)
    first weights as torch draws them (not told); in the Run lines orthogonal, biases 0, those of Q
      a hundredth: with torch's, 4,000 minibatches of Pong at random teach nothing of its rewards
    the Run lines: exploration falls in 100,000 steps, AdaGrad's rate is 1e-2, a target network
      lasts 250 updates, learning begins after 10,000 steps
    AdaGrad with learning rate 2e-3 and G = 1e-6 at the start, gradients at most 100 versions old
      (not told); outliers by the minibatch's mean clipped loss (its absolute loss), 5 deviations
      above an exponential mean, after 1,000 minibatches ("several", a running mean): where hardly
      any minibatch holds a reward, those that do are thrown away
    (y - Q)^2 / 2, TD errors clipped to [-1, 1] as in DQN 2015 (algorithm 1: the plain square)
    rewards are clipped to [-1, 1], exploration is 0.05 in evaluation (not told)
    screens turn grey before the maximum of two is taken, as gymnasium does it (after)
    today's action sets: Pong 6 (3); sticky actions with *-v0 and ALE/*-v5 ids (none)
    ours alone, off by default: --bfloat16, --optimizer sgd
    training episodes end with a life, games after 108,000 frames (not told); of the paper's two
      protocols the one with no-op starts (human starts were never published)

Symbols: theta (W+) the parameters, G AdaGrad's sum of squared gradients, y target of Q, theta^-
parameters of the target network; a_tm1 taken in s_tm1 gives r_t and s_t; epsilon exploration rate;
a version counts the gradients that a shard has applied.
Shapes: B steps of a minibatch, A actions, K shards (for screens and actions: K games side by side).
A step is one decision of the agent, 4 frames of the emulator.
"""

import csv
import ctypes
import difflib
import math
import os
import queue
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import ray
import torch
import torch.nn.functional as F
import tyro
from gymnasium.wrappers import (
    AtariPreprocessing,
    FrameStackObservation,
    RecordEpisodeStatistics,
    TransformObservation,
)
from PIL import Image
from ray.exceptions import ActorDiedError
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # The method
    env_id: str = "BreakoutNoFrameskip-v4"  # any *NoFrameskip-v4 or ALE/*-v5, or your module:Env-v0
    orthogonal_init: bool = False  # layers begin orthogonal (not told; without: as torch's)
    num_actors: int = os.cpu_count() or 1  # games that are played side by side (paper: 100)
    num_learners: int = os.cpu_count() or 1  # sources of gradients (paper: 100)
    num_shards: int = 1  # slices of the parameters, each with its own server (paper: 31)
    replay: Literal["local", "global"] = "local"  # a memory in each bundle, or one for all
    replay_capacity: int = 1_000_000  # steps remembered, of all actors (paper: 1 M of each)
    learning_starts: int = 50_000  # steps of all actors before the first update (paper: none, so 1)
    steps_per_update: int = 4  # of the actors, for each minibatch of a learner (paper: 1)
    pull_every: int = 100  # steps between an actor's fetches within an episode (paper: 1)
    discount: float = 0.99  # gamma
    target_period: int = 2_500  # updates between two target networks (paper: 60,000)
    final_epsilon: float = 0.1  # exploration at the end of its fall from 1
    epsilon_updates: int = 62_500  # updates until exploration has fallen (paper: 1 M)
    max_staleness: int = 100  # versions that a gradient may lag behind its shard (paper: not told)
    outlier_deviations: float = 5.0  # above the mean loss, to discard a minibatch (paper: several)
    outlier_warm_up: int = 1_000  # minibatches before a learner discards any (paper: not told)
    # Optimisation
    total_timesteps: int = 50_000_000  # of all actors together; 200 M frames
    batch_size: int = 32  # steps in a minibatch
    optimizer: Literal["adagrad", "sgd"] = "adagrad"  # of the parameter server
    learning_rate: float = 2e-3  # of the gradient of a minibatch's mean loss
    adagrad_start: float = 1e-6  # AdaGrad's G before the first update
    bfloat16: bool = False  # learns in 16 bits: two thirds of the time of a minibatch
    # The run
    report_every: int = 10_000  # steps, at least, between two reports, each with a checkpoint
    shard_save_every: int = 1_000  # updates between a shard's checkpoints; a death undoes no more
    patience: float = 120.0  # seconds without an answer before a process counts as lost for good
    ray_address: str = ""  # of a Ray cluster, host:port or auto; default: Ray on this machine alone
    object_store_mb: int = 200  # memory of Ray for what is on the wire, if it is our own Ray
    eval_every: int = 0  # steps, at least, between two evaluations; 0: only at the end
    eval_episodes: int = 30  # whole games of an evaluation
    eval_epsilon: float = 0.05  # exploration in evaluation
    capture_video: bool = False  # write the first two minutes of a game as a GIF
    seed: int = 1  # of every random number; workers race, so runs still differ
    run_dir: str = ""  # for logs, films, checkpoint.pt; default runs/GAME__SCRIPT__SEED__TIME
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


def make_orthogonal(module: nn.Module, gain: float) -> None:
    """A module's weights become orthogonal times gain, its biases 0 (Saxe et al. 2014)."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, gain)
        else:
            nn.init.zeros_(parameter)


class DeepQNetwork(nn.Module):
    """Q(s, .) of the Nature DQN: three convolutions, 512 hidden units (Mnih et al. 2015)."""

    def __init__(self, num_actions: int, orthogonal_init: bool = False):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(64 * 7 * 7, 512), nn.ReLU()),
        )
        self.q = nn.Linear(512, num_actions)
        if orthogonal_init:
            make_orthogonal(self.trunk, 2**0.5)
            make_orthogonal(self.q, 0.01)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def forward(self, s: Tensor, bfloat16: bool = False) -> Tensor:
        """Q [B, A] of screens s [B, 84, 84, 4], bytes; bfloat16: all but Q's layer in 16 bits."""
        x = s.permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            x = self.trunk(x)
        return self.q(x.float())


class Minibatch(NamedTuple):
    """B remembered steps: arrays from the memory, tensors in the learner."""

    s_tm1: Tensor  # [B, 84, 84, 4] screens, bytes
    a_tm1: Tensor  # [B] actions
    r_t: Tensor  # [B] rewards as the game gave them
    terminated: Tensor  # [B] the step ended the episode: nothing follows
    s_t: Tensor  # [B, 84, 84, 4] the screens that the step led to; of no meaning if terminated


def dqn_targets(r_t: Tensor, terminated: Tensor, q_t: Tensor, discount: float) -> Tensor:
    """y = r + discount max_a Q(s_t, a; theta^-), without the second term at an end (DQN 2015).

    q_t is [B, A], all else [B]; rewards are clipped, terminated is 1 or 0.
    """
    return r_t + discount * (1 - terminated) * q_t.amax(-1)


def dqn_loss(q: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """Mean of (y - Q(s, a))^2 / 2 whose slope is kept within [-1, 1]; q is [B, A]."""
    return F.smooth_l1_loss(q.gather(-1, a[:, None]).squeeze(-1), y)


def exploration_rate(t: int, final_epsilon: Tensor | float, fall: int) -> Tensor | float:
    """epsilon at t, on its way from 1 to its final value, which it has after fall."""
    return 1 + (final_epsilon - 1) * min(1.0, t / fall)


@torch.no_grad()
def epsilon_greedy(
    q: Tensor, epsilon: Tensor | float, generator: torch.Generator | None = None
) -> Tensor:
    """Actions [K] for q [K, A]: with probability epsilon any of the A, else the best."""
    any_action = torch.randint(q.shape[1], q.shape[:1], generator=generator)
    explores = torch.rand(len(q), generator=generator) < epsilon
    return torch.where(explores, any_action, q.argmax(-1))


def adagrad(theta: np.ndarray, G: np.ndarray, g: np.ndarray, learning_rate: float) -> None:
    """G += g^2 and theta -= learning_rate g / sqrt(G), in place (Duchi et al. 2011)."""
    theta, G, g = map(torch.from_numpy, (theta, G, g))  # the same memory, fewer passes through it
    G.addcmul_(g, g)
    theta.addcmul_(g, G.rsqrt(), value=-learning_rate)


class LossStatistics:
    """Mean and deviation of a learner's loss; far above them lie outliers (section 4.2).

    Plain averages at first, exponential ones later: the loss jumps with every target network.
    """

    def __init__(self, deviations: float, warm_up: int, decay: float = 0.999):
        self.deviations, self.warm_up, self.decay = deviations, warm_up, decay
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def is_outlier(self, loss: float) -> bool:
        """Judge a loss by those before it, then count it in."""
        limit = self.mean + self.deviations * math.sqrt(self.variance)
        outlier = self.count >= self.warm_up and loss > limit
        self.count += 1
        weight = max(1 / self.count, 1 - self.decay)
        self.variance = (1 - weight) * (self.variance + weight * (loss - self.mean) ** 2)
        self.mean += weight * (loss - self.mean)
        return outlier


def write_slice(path: Path, **state) -> None:
    """Save a shard: a crash leaves the old file or the new one, whole."""
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez(file, **state)
    path.with_suffix(".part").replace(path)


class ParameterServerShard:
    """A slice of theta with AdaGrad's G and a version: how many gradients it has applied.

    It begins with what its own checkpoint says, be it the first process to keep this slice or the
    successor of one that died. A file beside it counts on after the checkpoint, to tell what a
    death has undone.
    """

    def __init__(self, path: Path, args: Args):
        keep_memory()
        with np.load(path) as saved:
            self.theta, self.G = saved["theta"], saved["G"]
            names = "version", "stale", "lost"
            self.version, self.stale, self.lost = (int(saved[name]) for name in names)
        self.path, self.args, beside = path, args, path.with_suffix(".count")
        self.count = np.memmap(beside, np.int64, "r+" if beside.exists() else "w+", shape=1)
        if self.count[0] > self.version:
            self.lost += int(self.count[0]) - self.version
            write_slice(path, **self.state())
        self.count[0] = self.version

    def pull(self) -> tuple[np.ndarray, int]:
        return self.theta, self.version

    def push(self, gradient: np.ndarray, version: int) -> None:
        """Apply a gradient that was computed from some version, unless that is too old.

        A version above the shard's own was undone by a crash; its gradient is dropped as well.
        """
        if not 0 <= self.version - version <= self.args.max_staleness:
            self.stale += 1
            return
        if self.args.optimizer == "adagrad":
            adagrad(self.theta, self.G, gradient, self.args.learning_rate)
        else:
            self.theta -= self.args.learning_rate * gradient
        self.version += 1
        self.count[0] = self.version
        if self.version % self.args.shard_save_every == 0:
            write_slice(self.path, **self.state())

    def state(self) -> dict[str, Any]:
        counts = {"version": self.version, "stale": self.stale, "lost": self.lost}
        return {"theta": self.theta, "G": self.G, "pid": os.getpid()} | counts


def here(answer: Any) -> Any:
    """How to wait for the answer of a component of the same process: it is there already."""
    return answer


class ParameterServer:
    """All shards as one: theta is their slices, end to end.

    wait turns what a shard's method returned into its value.
    """

    def __init__(self, shards: Sequence[ParameterServerShard], wait: Callable = here):
        self.shards, self.wait, self.answers = shards, wait, []

    def pull(self) -> tuple[np.ndarray, list[int]]:
        """theta and the version of each slice, as they are after our last push or later."""
        answers = self.wait(self.answers or [shard.pull() for shard in self.shards])
        slices, versions = zip(*answers[-len(self.shards) :])  # before them those to a push, if any
        self.answers = []
        return np.concatenate(slices), list(versions)

    def push(self, gradient: np.ndarray, versions: list[int]) -> None:
        """Send a gradient with the versions of the slices it is of, and ask what becomes of them.

        The next pull has the answer, which comes while the actor plays.
        """
        parts = np.array_split(gradient, len(self.shards))
        calls = zip(self.shards, parts, versions, strict=True)
        self.answers = [shard.push(part, version) for shard, part, version in calls]
        self.answers += [shard.pull() for shard in self.shards]

    def settle(self) -> None:
        """Wait until the shards have dealt with the last gradient."""
        self.wait(self.answers)


def flat(tensors: Iterable[Tensor]) -> np.ndarray:
    """One vector of them all, float32: what goes over the wire."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()


@torch.no_grad()
def write_parameters(theta: np.ndarray, net: nn.Module) -> None:
    """Make the vector theta the parameters of net."""
    parameters = list(net.parameters())
    slices = torch.from_numpy(theta).split([p.numel() for p in parameters])
    for p, part in zip(parameters, slices, strict=True):
        p.copy_(part.view(p.shape))


STEP = [  # what a replay memory keeps of a step, 7,067 bytes
    ("screen", "u1", (84, 84)),  # the newest of s_tm1
    ("age", "u4"),  # steps since the episode began
    ("a_tm1", "i2"),  # or -1: no step, only the last screen of an episode that was cut off
    ("r_t", "f4"),
    ("terminated", "?"),
]


class ReplayMemory:
    """The last steps of one or several actors, a ring for each; every screen is stored once.

    It also keeps the ratio of steps to minibatches, by refusing minibatches that come too early.
    """

    def __init__(self, num_rings: int, args: Args, rank: int = 0):
        self.capacity = args.replay_capacity // args.num_actors  # of a ring
        self.steps = np.zeros((num_rings, self.capacity), STEP)
        self.sizes, self.heads = np.zeros((2, num_rings), np.int64)  # a head is written next
        self.steps_per_update = args.steps_per_update
        self.surplus = -args.learning_starts * num_rings // args.num_actors  # no minibatch before
        self.generator = np.random.default_rng(independent_seeds(1, args.seed, 0, rank + 1))

    def add(self, ring: int, steps: np.ndarray) -> int:
        """Remember steps of an actor; returns how many more there are than minibatches need."""
        positions = (self.heads[ring] + np.arange(len(steps))) % self.capacity
        self.steps[ring, positions] = steps
        self.heads[ring] = (self.heads[ring] + len(steps)) % self.capacity
        self.sizes[ring] = min(self.sizes[ring] + len(steps), self.capacity)
        self.surplus += int((steps["a_tm1"] >= 0).sum())
        return self.surplus

    def sample(self, batch_size: int) -> Minibatch | None:
        """Steps drawn uniformly, or None as long as the actors have to catch up."""
        if self.surplus < self.steps_per_update:
            return None
        self.surplus -= self.steps_per_update
        ring, i = self.draw(batch_size)
        while not (good := self.usable(ring, i)).all():
            ring[~good], i[~good] = self.draw((~good).sum())

        a_tm1, r_t, terminated, age = (
            self.steps[name][ring, i] for name in ("a_tm1", "r_t", "terminated", "age")
        )
        after, age_after = np.where(terminated, (i, age), (i + 1, age + 1))  # an end has no s_t
        s_tm1, s_t = self.stack(ring, i, age), self.stack(ring, after, age_after)
        return Minibatch(s_tm1, a_tm1.astype(np.int64), r_t, terminated, s_t)

    def get_pid(self) -> int:
        return os.getpid()

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rings and places in them of any records."""
        totals = self.sizes.cumsum()
        n = self.generator.integers(totals[-1], size=count)
        ring = totals.searchsorted(n, side="right")
        return ring, n - (totals - self.sizes)[ring]

    def usable(self, ring: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Whether records are steps whose screens, before and after, are all still there."""
        age, after = self.steps["age"][ring, i], (i + 1) % self.capacity
        goes_on = (after != self.heads[ring]) & (self.steps["age"][ring, after] == age + 1)
        older = (i - (self.heads - self.sizes)[ring]) % self.capacity  # records still there
        return (self.steps["terminated"][ring, i] | goes_on) & (older >= np.minimum(age, 3))

    def stack(self, ring: np.ndarray, i: np.ndarray, age: np.ndarray) -> np.ndarray:
        """Screens [B, 84, 84, 4], i the newest; an episode's first stands for those before it."""
        back = np.minimum([3, 2, 1, 0], age[:, None])  # [B, 4]
        screens = self.steps["screen"][ring[:, None], (i[:, None] - back) % self.capacity]
        return screens.transpose(0, 2, 3, 1)


ROUND = 100  # steps of an actor between two reports, of a learner the minibatches that go with them
AHEAD = 1_000  # more steps than go with the minibatches made: actors wait for the learners
PAUSE = 0.01  # seconds of a wait


class Round(NamedTuple):
    """What a bundle, an actor or a learner reports when it has worked for a while."""

    pid: int  # of its process: another than before if it has died in between
    counts: Counter[str]
    log: list[tuple[str, float]]


class Actor:
    """Plays a game with the parameters of the server; what happens goes to the replay memory."""

    def __init__(
        self,
        rank: int,
        num_actions: int,
        args: Args,
        server: ParameterServer,
        replay: ReplayMemory,
        wait: Callable = here,
        net: DeepQNetwork | None = None,
    ):
        torch.set_num_threads(1)
        keep_memory()
        self.ring = rank if args.replay == "global" else 0
        self.args, self.server, self.replay, self.wait = args, server, replay, wait
        self.net = net or DeepQNetwork(num_actions)
        self.counts, self.log, self.surplus = Counter(), [], 0
        self.pull()
        seeds = independent_seeds(3, args.seed, rank + 1, min(self.versions))
        self.generator = torch.Generator().manual_seed(seeds.pop())
        np.random.seed(seeds.pop())  # for games that use it
        try:
            self.env = make_env(args.env_id)
        except SystemExit as refusal:  # a process that exits would be started anew, again and again
            raise RuntimeError(str(refusal)) from None
        self.s, self.age = self.env.reset(seed=seeds.pop())[0], 0

    def pull(self) -> None:
        theta, self.versions = self.server.pull()
        write_parameters(theta, self.net)
        final, fall = self.args.final_epsilon, self.args.epsilon_updates
        self.epsilon = exploration_rate(min(self.versions), final, fall)
        self.steps_since_pull = 0

    def play(self, steps: int) -> None:
        """The acting half of algorithm 1."""
        records = []
        for _ in range(steps):
            if self.age == 0 or self.steps_since_pull >= self.args.pull_every:
                self.pull()
            with torch.no_grad():
                q = self.net(torch.from_numpy(self.s)[None])
            a = epsilon_greedy(q, self.epsilon, self.generator).item()
            s_t, r_t, terminated, truncated, info = self.env.step(a)
            records.append((self.s[..., -1], self.age, a, r_t, terminated))
            self.s, self.age = s_t, self.age + 1
            self.steps_since_pull += 1

            if truncated and not terminated:
                records.append((s_t[..., -1], self.age, -1, 0.0, False))
            if terminated or truncated:
                self.s, self.age = self.env.reset()[0], 0
                if "episode" in info:  # its "l" in frames
                    self.log.append(("charts/episodic_return", float(info["episode"]["r"])))
                    self.log.append(("charts/episodic_length", float(info["episode"]["l"])))
        self.counts["steps"] += steps
        self.surplus = self.wait(self.replay.add(self.ring, np.array(records, STEP)))

    def work(self) -> Round:
        """A round, or a pause if the learners are far behind."""
        if self.surplus > AHEAD:
            time.sleep(PAUSE)
        self.play(0 if self.surplus > AHEAD else ROUND)  # 0: only asks how far the learners are
        return report_round(self)


class Learner:
    """Draws minibatches and sends the gradients of their loss to the server."""

    def __init__(
        self,
        num_actions: int,
        args: Args,
        server: ParameterServer,
        replay: ReplayMemory,
        wait: Callable = here,
        net: DeepQNetwork | None = None,
    ):
        torch.set_num_threads(1)
        keep_memory()
        self.args, self.server, self.replay, self.wait = args, server, replay, wait
        self.net = net or DeepQNetwork(num_actions)
        self.target_net = DeepQNetwork(num_actions)
        self.target_periods = -1  # that had passed when it was copied
        self.statistics = LossStatistics(args.outlier_deviations, args.outlier_warm_up)
        self.counts, self.log = Counter(), []
        self.pull()

    def pull(self) -> None:
        """Fetch the parameters, with every period those of the target network (section 4.1)."""
        theta, self.versions = self.server.pull()
        write_parameters(theta, self.net)
        periods = min(self.versions) // self.args.target_period
        if periods > self.target_periods:  # they may be fewer: a shard has died
            write_parameters(theta, self.target_net)
            self.target_periods = periods

    def learn(self) -> bool:
        """The learning half of algorithm 1; False if there is no minibatch yet."""
        batch = self.wait(self.replay.sample(self.args.batch_size))
        if batch is None:
            return False
        batch = Minibatch(*map(torch.tensor, batch))
        times = [time.perf_counter()]
        self.pull()
        times.append(time.perf_counter())

        q, r_t = self.net(batch.s_tm1, self.args.bfloat16), batch.r_t.clamp(-1, 1)
        with torch.no_grad():
            q_t = self.target_net(batch.s_t, self.args.bfloat16)
        y = dqn_targets(r_t, batch.terminated.float(), q_t, self.args.discount)
        loss = dqn_loss(q, batch.a_tm1, y)
        gradient = flat(torch.autograd.grad(loss, list(self.net.parameters())))
        outlier = self.statistics.is_outlier(loss.item())
        times.append(time.perf_counter())

        if not outlier and np.isfinite(gradient).all():
            self.server.push(gradient, self.versions)
        times.append(time.perf_counter())

        pulling, _, pushing = np.diff(times)
        self.counts.update(minibatches=1, outliers=int(outlier))
        self.log += [
            ("losses/td_loss", loss.item()),  # (y - Q)^2 / 2, linear from an error of 1 on
            ("losses/q_values", q.mean().item()),
            ("losses/gradient_norm", float(np.linalg.norm(gradient))),
            ("charts/learner_ms", 1000 * (times[-1] - times[0])),
            ("charts/server_ms", 1000 * (pulling + pushing)),  # of these, with the server
        ]
        return True

    def work(self) -> Round:
        """A round, or a pause if the actors are behind."""
        for _ in range(ROUND // self.args.steps_per_update):
            if not self.learn():
                time.sleep(PAUSE)
                break
        return report_round(self)


class Bundle:
    """An actor, a replay memory and a learner in one process, with one network (figure 2)."""

    def __init__(self, rank: int, num_actions: int, args: Args, server: ParameterServer):
        replay, net = ReplayMemory(1, args, rank), DeepQNetwork(num_actions)
        self.actor = Actor(rank, num_actions, args, server, replay, net=net)
        self.learner = Learner(num_actions, args, server, replay, net=net)
        self.args = args

    def work(self) -> Round:
        for _ in range(ROUND // self.args.steps_per_update):
            self.actor.play(self.args.steps_per_update)
            self.learner.learn()
        return report_round(self.actor, self.learner)


def report_round(*workers: Actor | Learner) -> Round:
    """The report of workers of one process, which begin to count and to log anew."""
    counts, log = Counter(), []
    for worker in workers:
        worker.server.settle()
        counts, log = counts + worker.counts, log + worker.log
        worker.counts, worker.log = Counter(), []
    return Round(os.getpid(), counts, log)


# ---- The game -----------------------------------------------------------------------------------


MAX_FRAMES = 108_000  # of a game, 30 minutes of play; then it is truncated
MAX_EVAL_FRAMES = 18_000  # of a game in evaluation, 5 minutes, as in the paper


class EpisodicLife(gym.Wrapper):
    """A lost life terminates the episode; the game goes on, and restarts only when it is over."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.lives, self.game_over = 0, True

    def step(self, action):
        self.s_t, r_t, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        lives = self.unwrapped.ale.lives()
        life_lost, self.lives = lives < self.lives, lives
        return self.s_t, r_t, terminated or life_lost, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        info = {}
        if self.game_over or seed is not None:
            self.s_t, info = self.env.reset(seed=seed, options=options)
        self.lives, self.game_over = self.unwrapped.ale.lives(), False
        return self.s_t, info


def make_env(env_id: str, training: bool = True) -> gym.Env:
    """A game that shows its last four screens, the newest last, as bytes [84, 84, 4].

    Atari games get the preprocessing of DQN 2015; the screens of any other are only stacked.
    When a whole game is over, info["episode"] holds its true score "r" and its frames "l".
    """
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    frames = MAX_FRAMES if training else MAX_EVAL_FRAMES
    atari = {"obs_type": "ram", "frameskip": 1, "max_num_frames_per_episode": frames}
    try:
        is_atari = ":" not in env_id and "ale_py" in str(gym.spec(env_id).entry_point)
        if is_atari:
            env = gym.make(env_id, render_mode=None if training else "rgb_array", **atari)
        else:
            env = gym.make(env_id)
    except Exception as error:  # an environment may raise anything
        nearest = ", ".join(difflib.get_close_matches(env_id, gym.registry, cutoff=0.4)) or "none"
        raise SystemExit(f"No game {env_id}: {error} Nearest names: {nearest}.") from None

    env = RecordEpisodeStatistics(env)
    if is_atari:  # AtariPreprocessing fetches its screens itself: "ram" saves drawing the rest
        screen = gym.spaces.Box(0, 255, env.unwrapped.ale.getScreenDims(), np.uint8)
        env = TransformObservation(env, lambda ram: ram, screen)
        env = AtariPreprocessing(env, noop_max=30, frame_skip=4)
        env = EpisodicLife(env) if training else env
    screen, actions = env.observation_space, env.action_space
    fits = screen.shape == (84, 84) and screen.dtype == np.uint8
    if not fits or not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        raise SystemExit(
            f"{env_id} shows {screen} and takes {actions}; this script needs "
            "uint8 screens of shape (84, 84) and Discrete actions from 0."
        )
    stack = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)  # the layout that convolutions like
    return TransformObservation(FrameStackObservation(env, 4), cv2.merge, stack)


def reset_games(envs: Sequence[gym.Env], seeds: Sequence[int]) -> Tensor:
    """The first screens [K, 84, 84, 4] of K games."""
    return torch.from_numpy(np.stack([env.reset(seed=i)[0] for env, i in zip(envs, seeds)]))


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


@torch.no_grad()
def evaluate(
    net: DeepQNetwork, args: Args, film: Path | None = None, watch: Callable = lambda: None
) -> dict[str, float]:
    """True scores of whole games, begun with up to 30 no-ops and played epsilon-greedily.

    film: where to write the first game as a GIF. watch() is called at every step.
    """
    seeds = independent_seeds(args.eval_episodes + 1, args.seed)
    generator = torch.Generator().manual_seed(seeds.pop())
    envs = [make_env(args.env_id, training=False) for _ in seeds]
    s = reset_games(envs, seeds)
    playing, games, pictures = list(range(len(envs))), [], []
    with tqdm(total=len(envs), unit="game", leave=False, disable=None) as bar:
        while playing:
            watch()
            a = epsilon_greedy(net(s), args.eval_epsilon, generator).tolist()
            for k in playing.copy():
                screens, _, terminated, truncated, info = envs[k].step(a[k])
                s[k] = torch.from_numpy(screens)
                if terminated or truncated:
                    games.append(info["episode"])
                    playing.remove(k)
                    bar.update()
                if film and k == 0 and len(pictures) < 1800:  # two minutes
                    picture = envs[0].render() if envs[0].render_mode else screens[..., -1]
                    pictures.append(Image.fromarray(picture))
    if film:
        write_gif(pictures, film, 67)
    return {
        "eval/episodic_return": float(np.mean([game["r"] for game in games])),
        "eval/episodic_return_std": float(np.std([game["r"] for game in games])),
        "eval/episodic_length": float(np.mean([game["l"] for game in games])),  # frames
    }


def connect(args: Args) -> None:
    """Start Ray on this machine, or join the cluster at --ray-address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"  # else a warning that handles are arguments
    settings = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.ray_address:
        settings |= {"address": args.ray_address}
    else:
        memory = args.object_store_mb * 2**20
        settings |= {"address": "local", "num_cpus": 1, "object_store_memory": memory}
    try:
        if ":" in args.ray_address:  # Ray itself would try for two minutes
            host, _, port = args.ray_address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(include_dashboard=False, **settings)
    except Exception as error:  # Ray raises many kinds, plain exceptions among them
        where = args.ray_address or "this machine"
        raise SystemExit(
            f"Ray cannot be used at {where} ({error}): start a cluster with ray start --head and "
            "give its host:port, or auto on one of its machines, or leave --ray-address out."
        ) from None


class Interrupt:
    """Ctrl-C and SIGTERM, noted until the run can heed them.

    An exception at any moment could hit Ray in the middle of a call, whose answer would never come.
    """

    def __init__(self):
        self.noted = False
        for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM ends a run as Ctrl-C does
            signal.signal(number, self.note)

    def note(self, *_) -> None:
        self.noted = True

    def heed(self) -> None:
        if self.noted:
            raise KeyboardInterrupt


class Remote:
    """A component in another process: its methods return what wait_for can wait for."""

    def __init__(self, component: type, *arguments: Any):
        endless = {"max_restarts": -1, "max_task_retries": -1}
        options = {"num_cpus": 0, "scheduling_strategy": "SPREAD"} | endless
        self.handle = ray.remote(component).options(**options).remote(*arguments)

    def __getattr__(self, method: str) -> Callable:
        if method.startswith("__"):  # asked for by pickle
            raise AttributeError(method)
        return getattr(self.handle, method).remote


def wait_for(answers: Any, patience: float) -> Any:
    """Wait for the answers to calls of Remote's methods, and return them.

    A process that dies by itself or with its machine is started anew by Ray, with the arguments it
    had, and asked again. An exception that it raises is raised here, and so is a TimeoutError when
    it is silent for too long.
    """
    return ray.get(answers, timeout=patience)


class Gorila:
    """The components on Ray, the rounds that they are at, and what they have reported."""

    def __init__(self, net: DeepQNetwork, start: dict[str, Any], args: Args, folder: Path):
        self.interrupt = Interrupt()
        self.args, self.wait = args, partial(wait_for, patience=args.patience)
        self.log, self.counts, self.pids = queue.SimpleQueue(), Counter(start["counts"]), {}
        self.lost_before = self.counts["lost_updates"]
        K, version, num_actions = args.num_shards, min(start["versions"]), net.q.out_features
        theta, G = flat(net.parameters()), start["G"].numpy()
        slices = zip(np.array_split(theta, K), np.array_split(G, K), strict=True)
        self.shards = []
        for k, (part, sums) in enumerate(slices):
            path = folder / f"shard_{k}.npz"
            path.with_suffix(".count").unlink(missing_ok=True)  # of an earlier run
            counts = {"version": version, "stale": self.counts["stale"], "lost": 0}
            write_slice(path, theta=part, G=sums, **counts)
            self.shards.append(Remote(ParameterServerShard, path, args))
        server = ParameterServer(self.shards, self.wait)

        self.memory, self.workers = None, {}
        if args.replay == "local":
            for rank in range(args.num_actors):
                self.workers[f"bundle {rank}"] = Remote(Bundle, rank, num_actions, args, server)
        else:
            self.memory = Remote(ReplayMemory, args.num_actors, args)
            common = num_actions, args, server, self.memory, self.wait
            for rank in range(args.num_actors):
                self.workers[f"actor {rank}"] = Remote(Actor, rank, *common)
            for rank in range(args.num_learners):
                self.workers[f"learner {rank}"] = Remote(Learner, *common)
        self.rounds = {}  # that are under way
        for name in self.workers:
            self.begin_round(name)

    def begin_round(self, name: str) -> None:
        self.rounds[self.workers[name].work()] = name, time.monotonic()

    def attend(self, seconds: float, go_on: bool = True) -> None:
        """Wait for the end of a round, take its report, and begin the next if it is to go on."""
        self.interrupt.heed()
        rounds = list(self.rounds)
        ray.wait(rounds, timeout=seconds)  # for one
        ended, _ = ray.wait(rounds, num_returns=len(rounds), timeout=0)  # and all that are there
        for answer in ended:
            name, _ = self.rounds.pop(answer)
            pid, counts, log = self.wait(answer)
            self.recognise(name, pid)
            self.counts += counts
            for tag, value in log:
                self.log.put((tag, value, self.counts["steps"]))
            if go_on:
                self.begin_round(name)
        limit = 2 * self.args.patience  # a round waits for more than one answer
        for name, since in self.rounds.values():
            if time.monotonic() - since > limit:
                raise TimeoutError(f"no report of {name} in {limit:g} seconds")

    def recognise(self, name: str, pid: int) -> bool:
        """Whether a component is another process than it was, which is said and counted."""
        new = self.pids.get(name, pid) != pid
        self.pids[name] = pid
        if new:
            self.counts["restarts"] += 1
            tqdm.write(f"{name} has died and was started anew")
        return new

    def inspect(self) -> list[dict[str, Any]]:
        """The states of all shards; what a death undid is said and counted."""
        if self.memory:
            self.recognise("replay memory", self.wait(self.memory.get_pid()))
        states = self.wait([shard.state() for shard in self.shards])
        for k, state in enumerate(states):
            if self.recognise(f"shard {k}", state["pid"]):
                tqdm.write(
                    f"shard {k} has lost {state['lost']} updates by now, all deaths together"
                )
        self.counts["stale"] = max(state["stale"] for state in states)
        self.counts["lost_updates"] = self.lost_before + sum(state["lost"] for state in states)
        return states


def write_gif(pictures: Sequence[Image.Image], path: Path, milliseconds: float) -> None:
    """An endless film; where it cannot be written, a line says so and the run goes on."""
    first, *others = pictures
    try:
        first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    except OSError as error:
        tqdm.write(f"{path} cannot be written ({error}).")


def report(writer, step: int, metrics: dict[str, float]) -> None:
    """The same numbers to the terminal, to tensorboard and to metrics.csv."""
    tqdm.write(f"{step:>8}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    with open(Path(writer.log_dir, "metrics.csv"), "a", newline="") as file:
        csv.writer(file).writerows([step, name, value] for name, value in metrics.items())


def save_checkpoint(path: Path, net: dict[str, Tensor], **state) -> None:
    """Write beside the old file, then rename: a crash leaves the old one or the new one, whole.

    A network whose parameters are not finite does not replace one that works.
    """
    net = {name: part.clone() for name, part in net.items()}  # workers may go on writing to it
    if not all(part.isfinite().all() for part in net.values()):
        raise SystemExit(
            "Parameters are no longer finite: the run stops. A checkpoint written before is kept; "
            "to begin anew with a smaller --learning-rate often helps."
        )
    part = path.with_suffix(".part")
    try:
        torch.save({"net": net, **state}, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # of torch's writer, where a disk is full
        part.unlink(missing_ok=True)
        raise SystemExit(
            f"{path} cannot be written ({type(error).__name__}; is the disk full?): the run stops. "
            "A checkpoint written before is kept."
        ) from None


class Checkpoint(dict):
    """What save_checkpoint wrote; a part that it lacks is told in a sentence."""

    def __missing__(self, part: str) -> None:
        raise SystemExit(f"The checkpoint has no {part}: another version of this script wrote it.")


def load_checkpoint(path: Path, args: Args, net: nn.Module, *shaping: str) -> Checkpoint:
    """What save_checkpoint wrote, its parameters put into net.

    The flags named in shaping must be those of the run that wrote it.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu")
        for name in shaping:
            theirs, ours = checkpoint["args"][name], getattr(args, name)
            if theirs != ours:
                flag = "--" + name.replace("_", "-")
                raise SystemExit(f"{path} was made with {flag} {theirs}, not with {flag} {ours}.")
        net.load_state_dict(checkpoint["net"])
    except Exception as error:  # whatever bytes that are no checkpoint make torch.load raise
        kind = type(error).__name__
        raise SystemExit(
            f"{path} is missing, damaged or no checkpoint of this script with these flags ({kind})."
        ) from None
    return Checkpoint(checkpoint)


def tell_changes(checkpoint: Checkpoint, args: Args) -> None:
    """A line of the flags with which a resumed run goes on otherwise than before."""
    theirs, changed = checkpoint["args"], []
    for name, value in asdict(args).items():
        if name in theirs and theirs[name] != value and name not in ("run_dir", "resume"):
            changed.append(f"--{name.replace('_', '-')} {value} (before: {theirs[name]})")
    if changed:
        tqdm.write(f"Goes on with {', '.join(changed)}.")


def open_run_dir(args: Args, task: str, script: str) -> Path:
    """The folder of this run: that of the checkpoint it resumes, or a new one."""
    name = f"{task}__{script}__{args.seed}__{time.time():.6f}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume).parent if args.resume else Path(args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / "checkpoint.pt").exists() and Path(args.resume).name != "checkpoint.pt":
            raise SystemExit(
                f"{run_dir} holds a run already: --resume {run_dir}/checkpoint.pt goes on with it, "
                "another --run-dir begins anew."
            )
        (run_dir / "metrics.csv").touch()
    except OSError as error:
        raise SystemExit(
            f"{run_dir} cannot be written to ({error}): choose another folder."
        ) from None
    return run_dir


def keep_memory() -> None:
    """Have glibc keep freed memory, which the system would otherwise clear anew in every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # other C libraries have none
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


# Flags of all scripts whose bounds are others than 0 (of a count: 1) and 2^32 - 1
FRACTIONS = ("discount", "rmsprop_decay", "momentum_decay", "sgd_momentum")  # at most 1
FRACTIONS += ("eval_epsilon", "final_epsilon", "teacher_epsilon", "learning_rate_decay")
POSITIVE = ("rmsprop_eps", "max_gradient_norm", "adagrad_start", "location_std")  # or off: 0
SIGNED = ("rho_init", "commitment_bias")  # below 0, too


def check(args: Args) -> None:
    """Refuse numbers that no run can have and flags that exclude each other."""
    for field in fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        is_count = isinstance(field.default, int) and field.default > 0 and field.name != "seed"
        lowest = 1 if is_count else -(2**32 - 1) if field.name in SIGNED else 0
        highest = 1 if field.name in FRACTIONS else 2**32 - 1
        if type(value) in (int, float) and not lowest <= value <= highest:
            raise SystemExit(f"{flag} must lie between {lowest} and {highest}, not at {value}.")
        if field.name in POSITIVE and field.default and np.float32(value) == 0:
            raise SystemExit(f"{flag} must be above 0 in 32 bits, not at {value}.")
    if args.resume and args.evaluate:
        raise SystemExit("--resume trains and --evaluate does not: pass one of them.")
    checkpoint = args.resume or args.evaluate
    elsewhere = Path(args.run_dir).resolve() != Path(checkpoint).parent.resolve()
    if checkpoint and args.run_dir and elsewhere:
        raise SystemExit("--resume and --evaluate stay in their folder: leave --run-dir out.")


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    if args.replay == "local" and args.num_actors != args.num_learners:
        raise SystemExit(
            "--replay local bundles one actor with one learner: --num-actors and --num-learners "
            f"must be equal, not {args.num_actors} and {args.num_learners}."
        )
    if args.optimizer == "sgd" and args.adagrad_start != Args.adagrad_start:
        raise SystemExit("--adagrad-start is for --optimizer adagrad: leave it out.")
    if args.steps_per_update > ROUND:
        raise SystemExit(
            f"--steps-per-update must be at most {ROUND}, not {args.steps_per_update}."
        )
    if args.total_timesteps <= args.learning_starts and not args.evaluate:
        raise SystemExit(
            f"--total-timesteps {args.total_timesteps} ends a run before it learns: "
            f"--learning-starts is {args.learning_starts}."
        )
    if args.object_store_mb < 75:
        raise SystemExit(f"--object-store-mb must be at least 75, not {args.object_store_mb}.")
    least = max(args.learning_starts, 2 * ROUND * args.num_actors)
    if args.replay_capacity < least:
        raise SystemExit(
            f"--replay-capacity must be at least {least:,} (--learning-starts, and {2 * ROUND} for "
            f"each actor), not {args.replay_capacity:,}."
        )
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


def check_replay(args: Args) -> None:
    """Tell how large the replay becomes; refuse what this machine, if alone, does not have."""
    needed = args.replay_capacity * np.dtype(STEP).itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = f"Replay takes up to {needed / 1e9:.2f} GB"
    if needed > memory and not args.ray_address:
        raise SystemExit(
            f"{told}; this machine has {memory / 1e9:.2f} GB: lower --replay-capacity."
        )
    tqdm.write(f"{told}, {args.num_actors} actors together.")


def drain(log, recent: dict[str, list[float]]) -> None:
    """Sort by tag what the workers have put on log since the last time."""
    while not log.empty():
        tag, value, step = log.get()
        if not math.isfinite(value):
            raise SystemExit(
                f"{tag} is {value} at step {step}: the run stops. A checkpoint written before is "
                "kept; a smaller --learning-rate often helps."
            )
        recent[tag].append(value)


def stopped(run_dir: str | Path, finished: bool = False) -> SystemExit:
    """What Ctrl-C ends with, finished: when nothing is left but the last evaluation."""
    path = Path(run_dir, "checkpoint.pt")
    if not path.exists():
        return SystemExit("Stopped before the first checkpoint.")
    way = "evaluate with --evaluate" if finished else "go on with the same flags and --resume"
    return SystemExit(f"Stopped; {way} {path}")


def train(args: Args, net: DeepQNetwork, start: dict[str, Any], run_dir: Path) -> dict[str, float]:
    """Run Gorila on from a checkpoint whose parameters net has; returns the last report."""
    from torch.utils.tensorboard import SummaryWriter  # here: other processes do not need it

    folder, path = run_dir.resolve() / "shards", run_dir / "checkpoint.pt"
    folder.mkdir(exist_ok=True)
    writer, gorila = SummaryWriter(run_dir), None
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    step, updates, seconds = start["counts"]["steps"], min(start["versions"]), start["seconds"]
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)

    last_step, last_evaluation, last_time = step, step, time.perf_counter()
    recent, finished = defaultdict(list), False

    def save(seconds: float) -> list[dict[str, Any]]:
        """Put the shards' slices together; versions differ by gradients on the way or dropped."""
        states = gorila.inspect()
        theta = np.concatenate([state["theta"] for state in states])
        if not np.isfinite(theta).all():
            raise SystemExit(
                f"Parameters are infinite at step {gorila.counts['steps']}: the run stops. A "
                "checkpoint written before is kept; a smaller --learning-rate often helps."
            )
        write_parameters(theta, net)
        parts = {"net": net.state_dict(), "versions": [state["version"] for state in states]}
        parts["G"] = torch.from_numpy(np.concatenate([state["G"] for state in states]))
        told = {"counts": dict(gorila.counts), "seconds": seconds, "args": asdict(args)}
        save_checkpoint(path, **parts, **told)
        return states

    try:
        gorila = Gorila(net, start, args, folder)
        while not finished:
            gorila.attend(1.0)
            finished = gorila.counts["steps"] >= args.total_timesteps
            while finished and gorila.rounds:  # until nothing is under way
                gorila.attend(1.0, go_on=False)
            step, now = gorila.counts["steps"], time.perf_counter()
            drain(gorila.log, recent)
            bar.update(step - bar.n)
            if not finished and step < last_step + args.report_every:
                continue

            took, last_time = now - last_time, now
            seconds += took
            states = save(seconds)
            versions, before = [state["version"] for state in states], updates
            updates = min(versions)
            metrics = {tag: float(np.mean(values)) for tag, values in sorted(recent.items())}
            metrics |= {
                "charts/SPS": (step - last_step) / took,
                "charts/UPS": (updates - before) / took,
                "charts/updates": updates,
                "charts/epsilon": exploration_rate(
                    updates, args.final_epsilon, args.epsilon_updates
                ),
                "charts/version_skew": max(versions) - updates,
                "charts/minutes": seconds / 60,  # with the evaluations before this report
            }
            for event in ("minibatches", "stale", "outliers", "restarts", "lost_updates"):
                metrics[f"charts/{event}"] = gorila.counts[event]
            metrics["charts/learning_rate"] = args.learning_rate
            if args.optimizer == "adagrad":  # G only grows: this is what is left of the rate
                root = math.sqrt(np.mean([state["G"].mean() for state in states]))
                metrics["charts/learning_rate"] /= root
            recent, last_step = defaultdict(list), step
            report(writer, step, metrics)
            if finished or (args.eval_every and step >= last_evaluation + args.eval_every):
                film = run_dir / f"game_{step}.gif" if args.capture_video else None
                watch = gorila.interrupt.heed if finished else partial(gorila.attend, 0)
                evaluated = evaluate(net, args, film, watch)
                report(writer, step, evaluated)
                metrics, last_evaluation = metrics | evaluated, step
    except KeyboardInterrupt:
        if gorila:
            with suppress(TimeoutError, ActorDiedError):  # then the last checkpoint has to do
                save(seconds + time.perf_counter() - last_time)
        raise stopped(run_dir, finished) from None
    except TimeoutError as error:
        reason = str(error).strip().splitlines()[-1]
        go_on = f"Go on with --resume {path}" if path.exists() else "Begin anew"
        raise SystemExit(
            f"A process has not answered ({reason}): the run stops. {go_on}, or wait longer with "
            f"--patience, now {args.patience:g} seconds."
        ) from None
    except ActorDiedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SystemExit(
            f"A process could not start ({reason}): every machine needs the game, {folder} and "
            "room for the replay memory."
        ) from None
    finally:
        bar.close()
        writer.close()
    return metrics


def run(args: Args) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.set_num_threads(1)  # the cores are the components'
    torch.manual_seed(args.seed)
    net = DeepQNetwork(make_env(args.env_id).action_space.n, args.orthogonal_init)
    if args.evaluate:
        path = Path(args.evaluate)
        load_checkpoint(path, args, net, "env_id")
        film = path.with_name("game.gif") if args.capture_video else None
        return evaluate(net, args, film)

    start = {"counts": {"steps": 0}, "versions": [0], "seconds": 0.0}
    size = sum(p.numel() for p in net.parameters())
    start["G"] = torch.full((size,), args.adagrad_start)
    if args.resume:
        start = load_checkpoint(Path(args.resume), args, net, "env_id", "orthogonal_init")
        tell_changes(start, args)
        step = start["counts"]["steps"]
        if step >= args.total_timesteps:
            raise SystemExit(f"{args.resume} is at step {step}: raise --total-timesteps.")
        tqdm.write("The replay memory starts empty, and the target network with the parameters.")
    check_replay(args)
    connect(args)
    return train(args, net, start, open_run_dir(args, args.env_id, "gorila_dqn"))


def main(args: Args) -> dict[str, float]:
    check(args)
    check_flags(args)
    try:
        return run(args)
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None
    finally:
        ray.shutdown()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
