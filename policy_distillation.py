"""Policy distillation: one small network learns to act as several large ones do.

    Paper    Rusu et al., "Policy distillation", ICLR 2016
    Shows    KL with a sharpened teacher beats MSE; 7 % of the weights keep the score (table B1);
               one student of several games beats a DQN trained on all of them (table B2)
    Run      python policy_distillation.py --stage teacher --env-ids FreewayNoFrameskip-v4
               --total-timesteps 350000 --epsilon-timesteps 100000 --final-epsilon 0.01
               --target-period 1000 --learning-starts 10000 --optimizer adam --learning-rate 1e-4
               --run-dir runs/freeway
    Result   21.5 points a game (deviation of 30 games 1.4, seed 1), as many as going up all the
               time earns in the same games; 122 min, resumed once, on one core of an AMD EPYC with
               AVX2 alone, another run and tests beside it; paper: a teacher of 25.8 after 50
               million steps, human starts
    Run      python policy_distillation.py --stage teacher --env-ids QbertNoFrameskip-v4
               --total-timesteps 350000 --epsilon-timesteps 100000 --final-epsilon 0.01
               --target-period 1000 --learning-starts 10000 --optimizer adam --learning-rate 1e-4
               --run-dir runs/qbert
    Result   747 points a game (deviation of 30 games 134, seed 1; a random player's mean is also
               134) in 120 min, beside that run; paper: a teacher of 4,590
    Run      python policy_distillation.py --total-rounds 4 --eval-every 2
               --teachers runs/freeway/checkpoint.pt
    Result   100 % of its teacher's score (21.5, seed 1), with 7 % of its parameters: on the screens
               of its last updates it does what the teacher does; 23 min, resumed once, on one core
               of the same, another run and tests beside it; paper: 103.5 %
    Run      python policy_distillation.py --total-rounds 4 --eval-every 2
               --teachers runs/qbert/checkpoint.pt
    Result   98.1 % of its teacher's score (733, deviation of 30 games 155, seed 1), with 7 % of its
               parameters, in 19 min, beside that run; paper: 130.6 %
    Run      python policy_distillation.py --loss mse --total-rounds 4 --eval-every 2
               --teachers runs/qbert/checkpoint.pt
    Result   87.8 % of it (656, seed 1), learned from Q-values, in 23 min, beside another run; with
               NLL 97.0 %; paper: MSE is behind both, no number seen
    Run      python policy_distillation.py --total-rounds 8 --eval-every 2
               --teachers runs/freeway/checkpoint.pt runs/qbert/checkpoint.pt
    Result   94.3 % of its teachers' scores (geometric mean; Freeway 100, Q*bert 88.8; seed 1) with
               one network of the size of a teacher, in 96 min on both cores of the same, the next
               run beside it; paper: 116.9 %, with Pong a third game
    Run      python policy_distillation.py --stage teacher --total-timesteps 350000
               --epsilon-timesteps 100000 --final-epsilon 0.01 --target-period 1000
               --learning-starts 10000 --optimizer adam --learning-rate 1e-4
               --teachers runs/freeway/checkpoint.pt runs/qbert/checkpoint.pt
    Result   89.7 % of the scores of DQNs of one game each (100.2, 80.4; seed 1) by a Multi-DQN of
               the same network, in 100 min, beside that run; paper: 83.5 %

Departures: ours (the paper's)
    the Run lines: two games, Freeway and Q*bert (ten; three, with Pong); students of 4 rounds, of
      two games 8 (500; of ten games 34,000 hours of play); DQNs and Multi-DQN of 350,000 steps (50
      million), whose exploration falls to 0.01 in 100,000 (0.1 in 1 million), which learn after
      10,000 (50,000) and renew their target every 1,000, with Adam at 1e-4
    30 games of an evaluation (100), begun with no-ops (human starts): compare the student's scores
      with its teacher's here, not with the paper's
    losses are means over minibatches of 32 (sums over the data; minibatches not told)
    RMSProp is centred, with rate 2.5e-4 and epsilon 2.5e-4 / 0.08 outside the root (DQN 2015: 0.01
      inside it; the students: a variant, rates 1e-4 to 1e-3, "maximum learning rates" 1e-3 to 1e-1,
      read here as the rate divided by epsilon); weights begin as torch's do (not told)
    several games share the hour of a round equally; each is played by 8 games a process side by
      side, which go on in the next round, for as many steps as go into the hour for all of them
      (teachers take turns, by episodes); the replay keeps the screens as networks see them, 84x84
    a minibatch comes from a game drawn at random (appendix A; section 3.3: in turns)
    screens turn grey before the maximum of two is taken, as gymnasium does it (after)
    today's action sets: Pong 6 (3), so output layers have other sizes than the paper's; sticky
      actions with *-v0 and ALE/*-v5 ids (none)
    a lost life ends an episode of the DQN's training (not told)
    --online: one game; the DQN, play and the student take turns by rounds (all at once), in 500
      rounds the DQN makes 27 million steps (100 million); a high score is the mean of eval_episodes
      games after a round, the first one's included, with other seeds than those that compare
      teacher and student (not told)
    Multi-DQN: its games and their updates take turns ("evenly interleaved"); exploration, updates
      and target are counted in steps of all games together, the memory and learning_starts in steps
      of each (not told)
    ours alone, off by default: --bfloat16, --optimizer adam (as in later public baselines of DQN)
    the DQN's target network is renewed every 10,000 steps (DQN 2015: 10,000 updates, which are
      40,000 steps); its exploration falls from the first step on (from the first update); steps
      that run into the time limit teach it nothing (not told)
    --student auto: multi3 for several games, be they ten (multi10)

Symbols: q teacher's Q-values; tau temperature; S student's outputs, logits of its policy; a_tm1
taken in s_tm1 gives r_t and s_t; y target of Q; theta^- the target network; g a game.
Shapes: B stacks of four screens, A actions of a game, K games side by side. A step is one decision
of the agent, 4 frames of the emulator; an hour of play is 54,000 steps.
"""

import copy
import csv
import ctypes
import difflib
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Literal

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from gymnasium.wrappers import (
    AtariPreprocessing,
    FrameStackObservation,
    RecordEpisodeStatistics,
    TransformObservation,
)
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

Student = Literal["auto", "net1", "net2", "net3", "same", "multi3", "multi10"]


@dataclass
class Args:
    # The method
    stage: Literal["teacher", "distill"] = "distill"  # train a DQN; or a student from its teachers
    env_ids: tuple[str, ...] = ("PongNoFrameskip-v4",)  # games, unless --teachers bring theirs
    teachers: tuple[str, ...] = ()  # a checkpoint.pt of a DQN for each game (Multi-DQN: to compare)
    online: bool = False  # stage distill: the teacher is a DQN at its best so far, learning beside
    student: Student = "auto"  # tables A1, A2; auto: net2, for several games (Multi-DQN too) multi3
    loss: Literal["kl", "nll", "mse"] = "kl"  # between the teacher's Q-values and the student
    temperature: float = 0.01  # tau, of the teacher's softmax alone; below 1 sharpens it
    teacher_epsilon: float = 0.05  # exploration of the teachers while they play for the student
    memory_steps: int = 540_000  # of each game's replay for the student; ten hours, 3.8 GB
    round_steps: int = 54_000  # that the teachers play in a round, all games together; an hour
    round_updates: int = 10_000  # of the student in a round
    discount: float = 0.99  # gamma of the DQN
    dqn_memory_steps: int = 1_000_000  # of each game's replay for the DQN; 7.1 GB
    learning_starts: int = 50_000  # steps of each game before the DQN learns
    steps_per_update: int = 4  # of the DQN
    target_period: int = 10_000  # steps between two target networks
    final_epsilon: float = 0.1  # exploration at the end of its fall from 1
    epsilon_timesteps: int = 1_000_000  # until exploration has fallen from 1, linearly
    # Optimisation
    total_timesteps: int = 50_000_000  # of stage teacher, all games together; 200 M frames
    total_rounds: int = 500  # of stage distill; in each the online DQN makes round_steps steps
    batch_size: int = 32  # screens of a minibatch
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # rmsprop: centred, decay 0.95, as DQN's
    learning_rate: float = 2.5e-4  # of students and DQN (paper: 1e-4 to 1e-3)
    max_learning_rate: float = 0.08  # rmsprop: its epsilon is learning_rate / this
    bfloat16: bool = False  # learns in 16 bits: two thirds of the time of a minibatch
    # The run
    num_collectors: int = 2  # processes in which teachers play; on a GPU each takes 1 GB
    envs_per_collector: int = 8  # K, games of a kind that a collector plays side by side
    report_every: int = 25_000  # steps between two reports of stage teacher, each with a checkpoint
    eval_every: int = 0  # steps (distill: rounds) between two evaluations; 0: only at the end
    eval_episodes: int = 30  # whole games of an evaluation
    eval_epsilon: float = 0.05  # exploration in evaluation
    capture_video: bool = False  # write a game of teacher (left) and student as a GIF
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number
    run_dir: str = ""  # for logs, films, replays, checkpoint.pt; default runs/GAMES_STAGE__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


def mse_loss(S: Tensor, q: Tensor) -> Tensor:
    """||q - S(s)||^2, the mean over a minibatch [B, A] (section 3.2)."""
    return (q - S).square().sum(-1).mean()


def nll_loss(S: Tensor, q: Tensor) -> Tensor:
    """-log p(S(s))[argmax q], the mean over a minibatch [B, A] (section 3.2)."""
    return F.cross_entropy(S, q.argmax(-1))


def kl_loss(S: Tensor, q: Tensor, tau: float) -> Tensor:
    """KL(softmax(q / tau) || softmax(S(s))), the mean over a minibatch [B, A] (section 3.2).

    With a small tau the target is nearly one-hot. log_softmax is finite all the same: nothing is
    floored, and a probability that is 0 in 32 bits adds 0.
    """
    log_p, log_pi = (q / tau).log_softmax(-1), S.log_softmax(-1)
    return F.kl_div(log_pi, log_p, log_target=True, reduction="batchmean")


def distillation_loss(S: Tensor, q: Tensor, args: Args) -> Tensor:
    """The one of --loss; the teacher is given, no gradient goes into it."""
    q = q.detach()
    if args.loss == "kl":
        return kl_loss(S, q, args.temperature)
    return nll_loss(S, q) if args.loss == "nll" else mse_loss(S, q)


WIDTHS = {  # filters of the convolutions, hidden units, hidden units per game (tables A1, A2)
    "net1": (16, 32, 32, 256, 0),
    "net2": (16, 16, 16, 128, 0),
    "net3": (16, 16, 16, 64, 0),
    "same": (32, 64, 64, 512, 0),  # the DQN of Mnih et al. 2015
    "multi3": (32, 64, 64, 512, 128),
    "multi10": (64, 64, 64, 1500, 128),
}


class GameNetwork(nn.Module):
    """Teacher or student: a trunk that all games share, outputs for each of them (appendix A).

    The outputs are Q-values in a DQN and after --loss mse, otherwise logits of a policy.
    """

    def __init__(self, sizes: tuple[int, ...], num_actions: list[int]):
        super().__init__()
        self.num_actions = num_actions
        c1, c2, c3, width, width_per_game = sizes
        self.trunk = nn.Sequential(
            *(nn.Conv2d(4, c1, 8, 4), nn.ReLU(), nn.Conv2d(c1, c2, 4, 2), nn.ReLU()),
            *(nn.Conv2d(c2, c3, 3, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(c3 * 7 * 7, width), nn.ReLU()),
        )
        self.outputs = nn.ModuleList()
        for A in num_actions:
            own = [nn.Linear(width, width_per_game), nn.ReLU()] if width_per_game else []
            self.outputs.append(nn.Sequential(*own, nn.Linear(width_per_game or width, A)))
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def forward(self, s: Tensor, game: int = 0, bfloat16: bool = False) -> Tensor:
        """[B, A] for screens s [B, 84, 84, 4] of one game, bytes, from any device.

        bfloat16: all but the game's own layers in 16 bits.
        """
        s = s.to(self.trunk[0].weight.device)
        x = s.permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            x = self.trunk(x)
        return self.outputs[game](x.float())


@torch.no_grad()
def epsilon_greedy(
    q: Tensor, epsilon: Tensor | float, generator: torch.Generator | None = None
) -> Tensor:
    """Actions [K] for q [K, A]: with probability epsilon any of the A, else the best."""
    any_action = torch.randint(q.shape[1], q.shape[:1], generator=generator)
    explores = torch.rand(len(q), generator=generator) < epsilon
    return torch.where(explores, any_action, q.argmax(-1))


def exploration_rate(t: int, final_epsilon: Tensor | float, fall: int) -> Tensor | float:
    """epsilon at t, on its way from 1 to its final value, which it has after fall."""
    return 1 + (final_epsilon - 1) * min(1.0, t / fall)


def dqn_targets(r_t: Tensor, terminated: Tensor, q_t: Tensor, discount: float) -> Tensor:
    """y = r + discount max_a Q(s_t, a; theta^-), without the second term at an end (DQN 2015).

    q_t is [B, A], all else [B]; rewards are clipped, terminated is 1 or 0.
    """
    return r_t + discount * (1 - terminated) * q_t.amax(-1)


def td_loss(q_tm1: Tensor, a_tm1: Tensor, y: Tensor, known: Tensor) -> Tensor:
    """Mean Huber loss of y - Q(s_tm1, a_tm1), whose gradient is the clipped error (DQN 2015).

    known [B] is 0 where the step was truncated: what followed was never seen.
    """
    q = q_tm1.gather(-1, a_tm1[:, None]).squeeze(-1)
    return (known * F.huber_loss(q, y, reduction="none")).mean()


# ---- The games ----------------------------------------------------------------------------------


MAX_FRAMES = 108_000  # of a game, 30 minutes of play; then it is truncated


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
    atari = {"obs_type": "ram", "frameskip": 1, "max_num_frames_per_episode": MAX_FRAMES}
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


class Game:
    """A game in progress. Its state, a seed and the actions since then, brings it back."""

    def __init__(self, env_id: str, training: bool, seed: int, actions: Sequence[int] = ()):
        self.env = make_env(env_id, training)
        self.begin(seed)
        for a in actions:
            self.step(a)

    def begin(self, seed: int) -> None:
        self.state, self.age = (seed, []), 0
        self.s = self.env.reset(seed=seed)[0]  # [84, 84, 4]

    def step(self, a: int) -> tuple[float, bool, bool, dict]:
        """Reward, terminated, truncated, info. A lost life is followed by the next episode."""
        self.state[1].append(a)
        self.s, r_t, terminated, truncated, info = self.env.step(a)
        self.age += 1
        if (terminated or truncated) and "episode" not in info:
            self.s, self.age = self.env.reset()[0], 0
        return float(r_t), terminated, truncated, info


class ScreenMemory:
    """The last `capacity` steps of each of several games side by side, the lanes.

    Step t of a lane lies in slot t % slots: its newest screen, its age (steps since its episode
    began, at most 3) and the values that go with it. Every screen is stored once; stacks of four
    are rebuilt, and never reach into another episode. Three more slots keep the history of the
    oldest step; `spare` more take what a run that crashes wrote since its last checkpoint, so that
    the resumed one finds its `capacity` untouched.

    The arrays are files, mapped by every process that opens them: processes share them, a resumed
    run finds them.
    """

    def __init__(self, path: Path, lanes: int, capacity: int, spare: int, width: int):
        self.lanes, self.capacity, self.slots = lanes, capacity, capacity + spare + 3

        def array(kind: str, dtype: torch.dtype, *shape: int) -> Tensor:
            size = lanes * self.slots * math.prod(shape)
            flat = torch.from_file(f"{path}.{kind}", True, size, dtype=dtype)
            return flat.view(lanes, self.slots, *shape)

        path.parent.mkdir(exist_ok=True)
        self.screens = array("screens", torch.uint8, 84, 84)
        self.ages = array("ages", torch.uint8)
        self.values = array("values", torch.float32, width)

    def write(self, lanes: slice, t: int, s: Tensor, ages: list[int], values: Tensor) -> None:
        """Step t of some lanes: stacks s [K, 84, 84, 4], ages [K], values [K, width]."""
        slot = t % self.slots
        self.screens[lanes, slot] = s[..., -1]
        self.ages[lanes, slot] = torch.tensor(ages).clamp(max=3).to(torch.uint8)
        self.values[lanes, slot] = values

    def sample(self, size: int, end: int) -> tuple[Tensor, Tensor]:
        """Lanes and steps [size], drawn from the last `capacity` ones before step `end`."""
        oldest = max(0, end - self.capacity)
        return torch.randint(self.lanes, (size,)), torch.randint(oldest, end, (size,))

    def stacks(self, lane: Tensor, t: Tensor) -> Tensor:
        """Screens [B, 84, 84, 4] at steps t; an episode's first screen stands for those before."""
        age = self.ages[lane, t % self.slots].long()
        back = torch.minimum(torch.tensor([3, 2, 1, 0]), age[:, None])  # [B, 4]
        slot = lane[:, None] * self.slots + (t[:, None] - back) % self.slots
        screens = self.screens.flatten(0, 1).index_select(0, slot.flatten())  # fast: whole screens
        return screens.unflatten(0, slot.shape).permute(0, 2, 3, 1)

    def values_at(self, lane: Tensor, t: Tensor) -> Tensor:
        return self.values[lane, t % self.slots]


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


@torch.no_grad()
def evaluate(
    Q: Callable[[Tensor], Tensor], env_id: str, args: Args, pictures: list | None = None
) -> dict[str, float]:
    """True scores of whole games, begun with up to 30 no-ops and played epsilon-greedily.

    The same seeds for every Q: teacher and student begin alike. pictures gets those of one game.
    """
    seeds = independent_seeds(args.eval_episodes + 1, args.seed)
    generator = torch.Generator().manual_seed(seeds.pop())
    playing, scores = [Game(env_id, False, seed) for seed in seeds], []
    with tqdm(total=len(playing), unit="game", leave=False, disable=None) as bar:
        while playing:
            if pictures is not None and len(pictures) < 1800:  # two minutes
                env, s = playing[0].env, playing[0].s
                pictures.append(env.render() if env.render_mode else s[..., -1])
            q = Q(torch.from_numpy(np.stack([game.s for game in playing])))
            actions = epsilon_greedy(q.cpu(), args.eval_epsilon, generator).tolist()
            infos = [game.step(a)[-1] for game, a in zip(playing, actions, strict=True)]
            scores += [info["episode"] for info in infos if "episode" in info]
            playing = [game for game, info in zip(playing, infos) if "episode" not in info]
            bar.update(len(scores) - bar.n)
    return {
        "episodic_return": float(np.mean([score["r"] for score in scores])),
        "episodic_return_std": float(np.std([score["r"] for score in scores])),
        "episodic_length": float(np.mean([score["l"] for score in scores])),  # frames
    }


def named(tag: str, env_id: str, args: Args) -> str:
    """The tag of a number; with several games it names the one."""
    return tag if len(args.env_ids) == 1 else f"{tag}/{env_id}"


def evaluate_games(
    net: GameNetwork, teachers: nn.ModuleList, args: Args, known: dict[int, float]
) -> dict[str, float]:
    """One network's scores in all games; percent of the teachers', if any, and geometric mean.

    known: by game, teachers' scores that an earlier evaluation found; this one adds its own.

    No percentage where the teacher's score is not above 0, no geometric mean unless all scores are;
    a line then says so.
    """
    metrics, ratios, others = {}, [], []
    for g, env_id in enumerate(args.env_ids):
        found = evaluate(partial(net, game=g), env_id, args)
        if len(teachers) > 0:
            if g not in known:
                teacher = on_device(teachers[g], args)
                known[g] = evaluate(teacher, env_id, args)["episodic_return"]
            ours, theirs = found["episodic_return"], known[g]
            found["teacher_return"] = theirs
            if theirs > 0:
                found["percent_of_teacher"] = 100 * ours / theirs
            if min(ours, theirs) > 0:
                ratios.append(ours / theirs)
            else:
                others.append(f"{env_id} (student {ours:.4g}, teacher {theirs:.4g})")
        metrics |= {named(f"eval/{tag}", env_id, args): value for tag, value in found.items()}
    if others:
        tqdm.write(
            "No geometric mean of the ratios to the teachers: it is defined for scores above 0, "
            f"not for {', '.join(others)}."
        )
    elif ratios:
        metrics["eval/geometric_mean"] = 100 * geometric_mean(ratios)  # percent
    return metrics


class CentredRMSProp(torch.optim.Optimizer):
    """Divides a gradient by its running deviation (Graves 2013, equations 38 to 41).

    In torch's own a variance that rounding has made negative, as where a gradient hardly changes,
    becomes NaN; all else is equal, to the bit.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, decay: float, eps: float):
        super().__init__(parameters, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            decay = group["decay"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                mean, square = self.averages(theta)
                mean.lerp_(theta.grad, 1 - decay)
                square.mul_(decay).addcmul_(theta.grad, theta.grad, value=1 - decay)
                variance = square.addcmul(mean, mean, value=-1).clamp_(min=0)
                theta.addcdiv_(theta.grad, variance.sqrt_().add_(group["eps"]), value=-group["lr"])

    def averages(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Of the gradient and of its square."""
        state = self.state[theta]
        if not state:
            state.update(mean=torch.zeros_like(theta), square=torch.zeros_like(theta))
        return state["mean"], state["square"]


def make_optimizer(net: nn.Module, args: Args) -> torch.optim.Optimizer:
    """For students and DQN alike."""
    parameters = list(net.parameters())
    if args.optimizer == "adam":  # capturable: recorded() needs it
        capturable = parameters[0].is_cuda
        return torch.optim.Adam(parameters, args.learning_rate, fused=True, capturable=capturable)
    eps = args.learning_rate / args.max_learning_rate  # so that rate / (deviation + eps) < maximum
    return CentredRMSProp(parameters, args.learning_rate, decay=0.95, eps=eps)


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state, wherever it was saved: only a GPU's is capturable."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        if "capturable" in group:
            saved["capturable"] = group["capturable"]
    optimizer.load_state_dict(state)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of a minibatch; outputs of other games have none and stay."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def recorded(compute: Callable[..., Tensor], args: Args) -> Callable[..., Tensor]:
    """compute(g, *tensors) of a game g, made fast on a GPU; its result on the CPU.

    A GPU is done with a small network before Python has launched the next layer. So there the
    first three calls for a game are plain ones, which make what is made at first use, like the
    optimizer's state; the fourth is recorded as a CUDA graph, which it and all later ones replay
    with their tensors. compute must not wait for the GPU, and no autograd graph may outlive it.
    """
    device, calls, recordings = choose_device(args.device), Counter(), {}

    def call(g: int, *given: Tensor) -> Tensor:
        calls[g] += 1
        if device == "cpu" or calls[g] <= 3:
            return compute(g, *given).cpu()
        if g not in recordings:
            inputs = [torch.empty_like(part, device=device) for part in given]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # nothing is computed yet
                output = compute(g, *inputs)
            recordings[g] = inputs, graph, output
        inputs, graph, output = recordings[g]
        for there, here in zip(inputs, given, strict=True):
            there.copy_(here)
        graph.replay()
        return output.cpu()

    return call


class DeepQLearner:
    """DQN (Mnih et al. 2015) on one game; on several in turn, with one network, Multi-DQN."""

    def __init__(self, net: GameNetwork, args: Args, folder: Path):
        self.net, self.target_net, self.args = net, copy.deepcopy(net), args
        self.optimizer = make_optimizer(net, args)
        self.q = recorded(lambda g, s: net(s, g), args)
        self.learn_from_minibatch = recorded(self.learn_from, args)
        self.steps, self.high_score = 0, -math.inf  # the latter with --online
        seeds = independent_seeds(len(args.env_ids), args.seed, 1 + args.num_collectors)
        self.games = [Game(i, True, seed) for i, seed in zip(args.env_ids, seeds, strict=True)]
        spare = args.round_steps if args.online else args.report_every  # until the next checkpoint
        sizes = 1, args.dqn_memory_steps, spare, 4  # action, clipped reward, terminated, unseen
        self.memories = [ScreenMemory(folder / f"dqn_{g}", *sizes) for g in range(len(self.games))]

    def state_dict(self) -> dict:
        """All but what is in the memories' files and torch's random state."""
        return {
            "net": self.net.state_dict(),
            "target_net": self.target_net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "games": [game.state for game in self.games],
            "steps": self.steps,
            "high_score": self.high_score,
        }

    def load_state_dict(self, state: dict) -> None:
        """The games are played again, up to where they were."""
        self.net.load_state_dict(state["net"])
        self.target_net.load_state_dict(state["target_net"])
        restore(self.optimizer, state["optimizer"])
        self.games = [Game(i, True, *game) for i, game in zip(self.args.env_ids, state["games"])]
        self.steps, self.high_score = state["steps"], state["high_score"]

    def act(self, g: int, epsilon: float) -> dict:
        """One step of game g, kept in its memory; returns its info."""
        game = self.games[g]
        s, age = torch.from_numpy(game.s)[None], game.age
        with torch.no_grad():
            a = int(epsilon_greedy(self.q(g, s), epsilon))
        r_t, terminated, truncated, info = game.step(a)
        unseen = truncated and not terminated  # what would have followed
        values = torch.tensor([[a, np.clip(r_t, -1, 1), terminated, unseen]])
        self.memories[g].write(slice(0, 1), self.steps // len(self.games), s, [age], values)
        if "episode" in info:
            game.begin(int(torch.randint(2**31, ())))
        return info

    def minibatch(self, g: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of game g: screens s_tm1, what the memory keeps of the step, screens s_t."""
        memory = self.memories[g]
        lane, tm1 = memory.sample(self.args.batch_size, self.steps // len(self.games) - 1)
        return memory.stacks(lane, tm1), memory.values_at(lane, tm1), memory.stacks(lane, tm1 + 1)

    def loss(self, g: int, s_tm1: Tensor, values: Tensor, s_t: Tensor) -> tuple[Tensor, Tensor]:
        """Of a minibatch of game g; and its Q-values."""
        with torch.no_grad():
            q_t = self.target_net(s_t, g, self.args.bfloat16)
        q_tm1 = self.net(s_tm1, g, self.args.bfloat16)
        a_tm1, r_t, terminated, truncated = values.to(q_t.device).unbind(-1)
        y = dqn_targets(r_t, terminated, q_t, self.args.discount)
        return td_loss(q_tm1, a_tm1.long(), y, 1 - truncated), q_tm1

    def learn_from(self, g: int, *minibatch: Tensor) -> Tensor:
        """One step by a minibatch of game g; its loss and mean Q-value."""
        loss, q = self.loss(g, *minibatch)
        update(self.optimizer, loss)
        return torch.stack([loss.detach(), q.detach().mean()])

    def learn(self, steps: int) -> dict[str, float]:
        """Play and learn for some steps of all games together; the means of what was watched."""
        watched, args, n = defaultdict(list), self.args, len(self.games)
        for _ in tqdm(range(steps), unit="step", leave=False, disable=None):
            g = self.steps % n
            epsilon = exploration_rate(self.steps, args.final_epsilon, args.epsilon_timesteps)
            info = self.act(g, epsilon)
            self.steps += 1
            if "episode" in info:
                for name, key in (("episodic_return", "r"), ("episodic_length", "l")):  # frames
                    tag = named(f"charts/{name}", args.env_ids[g], args)
                    watched[tag].append(float(info["episode"][key]))
            if self.steps % args.steps_per_update == 0 and self.steps // n > args.learning_starts:
                g = self.steps // args.steps_per_update % n
                loss, q = self.learn_from_minibatch(g, *self.minibatch(g)).tolist()
                refuse_infinity(loss, f"of the DQN at step {self.steps}")
                watched["losses/td_loss"].append(loss)  # Huber
                watched["losses/q_values"].append(q)
            if self.steps % args.target_period == 0:
                self.target_net.load_state_dict(self.net.state_dict())
        means = {tag: float(np.mean(values)) for tag, values in sorted(watched.items())}
        return means | {"charts/epsilon": epsilon}


def renew_teacher(learner: DeepQLearner, teacher: GameNetwork, args: Args) -> dict[str, float]:
    """A round of the online DQN, which at a new high score becomes the teacher (appendix C)."""
    metrics = learner.learn(args.round_steps)
    other_seeds = replace(args, seed=2**32 - 1 - args.seed)  # the best of many was lucky, too
    score = evaluate(learner.net, args.env_ids[0], other_seeds)["episodic_return"]
    if score > learner.high_score:
        learner.high_score = score
        teacher.load_state_dict(learner.net.state_dict())
    return metrics | {"eval/learner_return": score}


def demonstrate(
    games: list[Game], teacher: GameNetwork, write: Callable, times: Iterable, seed: int, args: Args
) -> list[float]:
    """The teacher plays games side by side; returns the scores of the whole ones.

    It acts epsilon-greedily, and for each step write(t, screens, ages, q) keeps its Q-values.
    """
    generator, returns = torch.Generator().manual_seed(seed), []
    Q = recorded(lambda g, s: teacher(s, g), args)
    for t in times:
        s = torch.from_numpy(np.stack([game.s for game in games]))
        with torch.no_grad():
            q = Q(0, s)
        write(t, s, [game.age for game in games], q)
        for game, a in zip(games, epsilon_greedy(q, args.teacher_epsilon, generator).tolist()):
            *_, info = game.step(a)
            if "episode" in info:
                returns.append(float(info["episode"]["r"]))
                game.begin(int(torch.randint(2**31, (), generator=generator)))
    return returns


def collector(
    rank: int,
    args: Args,
    folder: Path,
    teachers: nn.ModuleList,
    states: list[list[list]] | None,
    rounds: int,
    wanted: Synchronized,
    log,
) -> None:
    """Plays a round whenever more are wanted, and puts (rank, states, returns) on log.

    states: those of its games, by kind, as an earlier process has left them; None: new games.
    """
    torch.set_num_threads(1)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is a matter for the main process
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which would outlive the process
    main_process, K, steps = mp.parent_process(), args.envs_per_collector, lane_steps(args)
    memories = student_memories(args, folder, [teacher.num_actions[0] for teacher in teachers])
    new = [(seed, []) for seed in independent_seeds(K, args.seed, 1 + rank)]  # of every kind
    begun = states[rank] if states else [new] * len(memories)
    kinds = [
        [Game(env_id, False, seed, actions) for seed, actions in of_kind]
        for env_id, of_kind in zip(args.env_ids, begun, strict=True)
    ]
    while main_process.is_alive():
        if rounds == wanted.value:
            time.sleep(0.01)
            continue
        returns, times = [], range(rounds * steps, (rounds + 1) * steps)
        rounds += 1
        seeds = independent_seeds(len(kinds), args.seed, 1 + rank, rounds)
        for games, teacher, memory, seed in zip(kinds, teachers, memories, seeds, strict=True):
            write = partial(memory.write, slice(rank * K, (rank + 1) * K))
            bar = tqdm(times, unit=f" x {K} steps", position=rank, leave=False, disable=None)
            player = on_device(teacher, args)
            returns.append(demonstrate(games, player, write, bar, seed, args))
        log.put((rank, [[game.state for game in games] for games in kinds], returns))


@contextmanager
def collectors_at_work(args: Args, *others) -> Iterator[mp.ProcessContext]:
    """Processes that wait for rounds to play; whatever happens, none is left."""
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the collectors inherit that
    collectors = mp.spawn(collector, (args, *others), args.num_collectors, join=False, daemon=True)
    try:
        signal.signal(signal.SIGINT, on_ctrl_c)
        yield collectors
    finally:
        for process in collectors.processes:
            process.terminate()
            process.join()


def collect(
    collectors: mp.ProcessContext, args: Args, wanted: Synchronized, log
) -> tuple[list, dict[str, float]]:
    """One round of play by all collectors; the states of their games and what was watched."""
    start, states, watched = time.perf_counter(), {}, defaultdict(list)
    wanted.value += 1
    while len(states) < args.num_collectors:
        collectors.join(timeout=0.05)  # raises what a collector has raised
        while not log.empty():
            rank, of_rank, returns = log.get()
            states[rank] = of_rank
            for env_id, scores in zip(args.env_ids, returns, strict=True):
                watched[named("charts/teacher_return", env_id, args)] += scores
    metrics = {tag: float(np.mean(scores)) for tag, scores in watched.items() if scores}
    lanes = args.num_collectors * args.envs_per_collector * len(args.env_ids)
    metrics["charts/SPS"] = lanes * lane_steps(args) / (time.perf_counter() - start)
    return [states[rank] for rank in range(args.num_collectors)], metrics


def student_update(
    net: GameNetwork, optimizer: torch.optim.Optimizer, args: Args, g: int, s: Tensor, q: Tensor
) -> Tensor:
    """One step towards the teacher's q [B, A] of game g; the loss, the share of equal actions."""
    S = net(s, g, args.bfloat16)
    q = q.to(S.device)
    loss = distillation_loss(S, q, args)
    update(optimizer, loss)
    return torch.stack([loss.detach(), (S.argmax(-1) == q.argmax(-1)).float().mean()])


def learn_from_memories(
    learn: Callable[..., Tensor], memories: list[ScreenMemory], args: Args, end: int
) -> dict[str, float]:
    """The updates of a round, each on a minibatch of one game; the means of what was watched."""
    watched, start = defaultdict(list), time.perf_counter()
    for _ in tqdm(range(args.round_updates), unit="update", leave=False, disable=None):
        g = int(torch.randint(len(memories), ()))
        lane, t = memories[g].sample(args.batch_size, end)
        s, q = memories[g].stacks(lane, t), memories[g].values_at(lane, t)
        loss, agreement = learn(g, s, q).tolist()
        refuse_infinity(loss, f"after {end} steps in each of the games played")
        watched[named(f"losses/{args.loss}", args.env_ids[g], args)].append(loss)
        watched[named("charts/agreement", args.env_ids[g], args)].append(agreement)  # share
    means = {tag: float(np.mean(values)) for tag, values in sorted(watched.items())}
    means["charts/learning_rate"] = args.learning_rate
    return means | {"charts/UPS": args.round_updates / (time.perf_counter() - start)}


def write_gif(pictures: Sequence[Image.Image], path: Path, milliseconds: float) -> None:
    """An endless film; where it cannot be written, a line says so and the run goes on."""
    first, *others = pictures
    try:
        first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    except OSError as error:
        tqdm.write(f"{path} cannot be written ({error}).")


def write_figure(figure: Any, path: Path) -> None:
    """A picture; where it cannot be written, a line says so and the run goes on."""
    try:
        figure.savefig(path, dpi=90)
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


class Diverged(SystemExit):
    """The loss is no longer a number."""


def refuse_infinity(loss: float, where: str) -> None:
    """End the run with a sentence where its loss is no number."""
    if not math.isfinite(loss):
        raise Diverged(
            f"The loss is {loss} {where}: the run stops. A checkpoint written before is kept; "
            "to begin anew with a smaller --learning-rate often helps."
        )


def stopped(run_dir: str | Path, finished: bool = False) -> SystemExit:
    """What Ctrl-C ends with, finished: when nothing is left but the last evaluation."""
    path = Path(run_dir, "checkpoint.pt")
    if not path.exists():
        return SystemExit("Stopped before the first checkpoint.")
    way = "evaluate with --evaluate" if finished else "go on with the same flags and --resume"
    return SystemExit(f"Stopped; {way} {path}")


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; leave the flag out.")
    return name


def on_device(teacher: GameNetwork, args: Args) -> GameNetwork:
    """The teacher itself on a CPU, a copy on a GPU: processes share what is in CPU memory."""
    device = choose_device(args.device)
    return teacher if device == "cpu" else copy.deepcopy(teacher).to(device)


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


OF_STUDENTS = ("online", "loss", "temperature", "teacher_epsilon", "memory_steps", "round_steps")
OF_STUDENTS += ("round_updates", "total_rounds", "num_collectors", "envs_per_collector")
OF_DQN = ("discount", "dqn_memory_steps", "learning_starts", "steps_per_update", "target_period")
OF_DQN += ("final_epsilon", "epsilon_timesteps")


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    learns, distils, n = args.stage == "teacher", args.stage == "distill", len(args.env_ids)
    for holds, where, names in (  # if it holds, the flags of these names have no effect
        (learns, "with --stage teacher", OF_STUDENTS),
        (learns and n == 1, "on a DQN of one game", ("student",)),
        (distils, "with --stage distill", ("total_timesteps", "report_every")),
        (distils and not args.online, "without --online", OF_DQN),
        (distils and args.loss != "kl", f"with --loss {args.loss}", ("temperature",)),
        (args.optimizer == "adam", "with --optimizer adam", ("max_learning_rate",)),
    ):
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        if holds and given:
            flag = given[0].replace("_", "-")
            raise SystemExit(f"--{flag} has no effect {where}: leave it out.")

    lanes, tau = n * args.num_collectors * args.envs_per_collector, args.temperature
    rates, repeats = (args.learning_rate, args.max_learning_rate), len(set(args.env_ids)) < n
    played = lane_steps(args) if distils and n > 0 else 1
    steps = args.total_timesteps if learns else args.total_rounds * args.round_steps  # of a DQN
    refused = {
        "--env-ids needs at least one game.": n == 0,
        "A student needs either --teachers a.pt b.pt, checkpoints of --stage teacher or of "
        "gorila_dqn.py, or --online; to train a DQN alone pass --stage teacher.": (
            distils and bool(args.teachers) == args.online
        ),
        "--online distils a single game: pass one of --env-ids.": args.online and n > 1,
        f"--env-ids must name each game once, not {', '.join(args.env_ids)}.": repeats,
        f"{steps} steps, shared out among {n} games, must go beyond the --learning-starts "
        f"{args.learning_starts} of each.": (
            (learns or args.online) and not args.evaluate and steps <= n * args.learning_starts
        ),
        "--temperature must be at least 1e-30; its limit at 0 is --loss nll.": tau < 1e-30,
        "--learning-rate and --max-learning-rate must lie above 1e-30.": min(rates) < 1e-30,
        f"--round-steps {args.round_steps} must give each of {lanes} games side by side a step.": (
            played == 0
        ),
        f"--round-steps {args.round_steps}, shared out among {n} games, must fit into the "
        f"--memory-steps {args.memory_steps} of each.": played * lanes > n * args.memory_steps,
    }
    for sentence, holds in refused.items():
        if holds:
            raise SystemExit(sentence)
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


def load_teacher(path: str) -> tuple[str, GameNetwork]:
    """The game of a checkpoint and the network that has learned it."""
    try:
        checkpoint = torch.load(path, map_location="cpu")
        env_id, *_ = checkpoint["args"].get("env_ids") or [checkpoint["args"]["env_id"]]  # Gorila's
        if checkpoint["args"].get("stage") == "distill":
            raise ValueError("a student")
        theirs = {name.replace("q.", "outputs.0.0."): x for name, x in checkpoint["net"].items()}
        net = GameNetwork(WIDTHS["same"], [len(theirs["outputs.0.0.bias"])])
        net.load_state_dict(theirs)
    except Exception as error:  # whatever bytes that are no checkpoint make torch.load raise
        raise SystemExit(
            f"{path} is missing, damaged or no DQN of one game ({type(error).__name__}): a teacher "
            "comes from --stage teacher with one game or from gorila_dqn.py."
        ) from None
    theirs, ours = net.num_actions[0], make_env(env_id).action_space.n
    if theirs != ours:
        raise SystemExit(f"{path} plays {env_id} with {theirs} actions; here the game has {ours}.")
    return env_id, net


def lane_steps(args: Args) -> int:
    """Steps of a round in each of the games that are played side by side."""
    return args.round_steps // (len(args.env_ids) * args.num_collectors * args.envs_per_collector)


def student_memories(args: Args, folder: Path, num_actions: list[int]) -> list[ScreenMemory]:
    """A replay for each game: what its teacher saw, and its Q-values.

    No spare slots: after a crash the same round is played again, step by step.
    """
    lanes = args.num_collectors * args.envs_per_collector
    sizes = lanes, args.memory_steps // lanes, 0
    return [ScreenMemory(folder / f"teacher_{g}", *sizes, A) for g, A in enumerate(num_actions)]


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the replays: a run does not go on with those of another one."""
    return {path.name: path.stat().st_size for path in folder.glob("*")}


def check_memory(args: Args, num_actions: list[int]) -> None:
    """Tell how large the replays become; refuse what the machine does not have."""
    needed, flags = 0, []
    if args.stage == "distill":
        flags.append("--memory-steps")
        needed += sum(args.memory_steps * (84 * 84 + 1 + 4 * A) for A in num_actions)
    if args.stage == "teacher" or args.online:
        steps = args.dqn_memory_steps + (args.round_steps if args.online else args.report_every)
        flags += "--dqn-memory-steps", "--round-steps" if args.online else "--report-every"
        needed += len(num_actions) * steps * (84 * 84 + 1 + 4 * 4)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    folder = Path(args.resume or args.run_dir or "runs").absolute()
    folder = next(path for path in (folder, *folder.parents) if os.path.isdir(path))
    disk = memory if args.resume else shutil.disk_usage(folder).free  # resumed: it has its files
    told = f"The replays take up to {needed / 1e9:.2f} GB"
    if needed > min(memory, disk):
        raise SystemExit(
            f"{told}, as files that should fit into memory; this machine has {memory / 1e9:.2f} GB "
            f"and {disk / 1e9:.2f} GB of disk for them: lower {' or '.join(flags)}."
        )
    tqdm.write(f"{told} of this machine's {memory / 1e9:.2f} GB.")


def film_games(net: GameNetwork, teachers: nn.ModuleList, args: Args, run_dir: Path) -> None:
    """A GIF of each game: left the teacher's, right the student's, from the same start.

    The one that is over first shows its last picture.
    """
    for g, env_id in enumerate(args.env_ids):
        films = []
        players = [on_device(teacher, args) for teacher in teachers[g : g + 1]]
        for Q in (*players, partial(net, game=g)):
            films.append([])
            evaluate(Q, env_id, replace(args, eval_episodes=1), films[-1])
        for film in films:
            film += film[-1:] * (max(map(len, films)) - len(film))
        frames = [Image.fromarray(np.concatenate(shown, axis=1)) for shown in zip(*films)]
        path = run_dir / f"{env_id.replace('/', '-').replace(':', '-')}.gif"
        write_gif(frames, path, 67)


@torch.no_grad()
def draw_policies(
    net: GameNetwork, memories: list[ScreenMemory], args: Args, end: int, path: Path
) -> None:
    """What teacher and student would do on some of the screens; a row for each game."""
    from matplotlib.figure import Figure  # not above: collectors import this file, too

    tau, size = args.temperature, (15, 2.6 * len(memories))
    figure = Figure(size, layout="constrained")
    rows = figure.subplots(len(memories), 6, squeeze=False)
    for g, (axes, memory) in enumerate(zip(rows, memories, strict=True)):
        lane, t = memory.sample(3, end)
        s, q = memory.stacks(lane, t), memory.values_at(lane, t)
        S = net(s, g).cpu() / (tau if args.loss == "mse" else 1)
        for i, (screen, bars) in enumerate(axes.reshape(3, 2)):
            screen.imshow(s[i, ..., -1].numpy(), cmap="gray")
            screen.set(xticks=[], yticks=[], title=args.env_ids[g])
            for offset, logits, who in ((-0.2, q[i] / tau, "teacher"), (0.2, S[i], "student")):
                bars.bar(
                    np.arange(len(logits)) + offset, logits.softmax(-1).numpy(), 0.4, label=who
                )
            bars.set(ylim=(0, 1), xlabel="action", ylabel="probability", xticks=range(len(q[i])))
    rows[0, 1].legend(fontsize="small", framealpha=0.5)
    write_figure(figure, path)


def make_network(args: Args, num_actions: list[int]) -> GameNetwork:
    """What the stage trains: a DQN of one game, a Multi-DQN or a student."""
    single = "same" if args.stage == "teacher" else "net2"
    auto = single if len(num_actions) == 1 else "multi3"
    return GameNetwork(WIDTHS[auto if args.student == "auto" else args.student], num_actions)


def train_teacher(
    net: GameNetwork, args: Args, folder: Path, checkpoint: dict
) -> Iterator[tuple[int, bool, dict[str, float], dict]]:
    """DQN or Multi-DQN; yields the step, whether to evaluate, metrics and state of each report."""
    learner = DeepQLearner(net, args, folder)
    if checkpoint:
        learner.load_state_dict(checkpoint)
    while learner.steps < args.total_timesteps:
        first, start = learner.steps, time.perf_counter()
        metrics = learner.learn(min(args.report_every, args.total_timesteps - first))
        metrics["charts/SPS"] = (learner.steps - first) / (time.perf_counter() - start)
        metrics["charts/learning_rate"] = args.learning_rate
        every, last = args.eval_every or math.inf, learner.steps == args.total_timesteps
        due = last or learner.steps // every > first // every
        yield learner.steps, due, metrics, learner.state_dict()


def distill(
    net: GameNetwork, teachers: nn.ModuleList, args: Args, folder: Path, checkpoint: dict
) -> Iterator[tuple[int, bool, dict[str, float], dict]]:
    """Teachers to student; yields the update, whether to evaluate, metrics and state of each half.

    The first half of a round is play by the teachers (before it, play and learning of an online
    one), the second are updates of the student.
    """
    optimizer = make_optimizer(net, args)
    learn = recorded(partial(student_update, net, optimizer, args), args)
    memories = student_memories(args, folder, net.num_actions)
    parts = {"net": net, "teachers": teachers, "optimizer": optimizer}
    if args.online:
        learning = copy.deepcopy(teachers[0]).to(choose_device(args.device))
        parts["learner"] = DeepQLearner(learning, args, folder)
    halves, games = checkpoint.get("halves", 0), checkpoint.get("games")  # of rounds, done; states
    for name, part in parts.items():
        if checkpoint and name == "optimizer":
            restore(part, checkpoint[name])
        elif checkpoint:
            part.load_state_dict(checkpoint[name])
    size, whole = (sum(p.numel() for p in i.parameters()) for i in (net, teachers[0]))
    tqdm.write(f"The student has {size:,} parameters, {100 * size / whole:.1f} % of a teacher's.")

    spawn, collected = mp.get_context("spawn"), (halves + 1) // 2
    wanted, log = spawn.Value("q", collected), spawn.Queue()
    given = folder, teachers, games, collected, wanted, log
    with collectors_at_work(args, *given) as collectors:
        while halves < 2 * args.total_rounds:
            halves += 1
            learned, due = halves // 2, False
            if halves % 2:
                metrics = renew_teacher(parts["learner"], teachers[0], args) if args.online else {}
                games, watched = collect(collectors, args, wanted, log)
                metrics |= watched
            else:
                end = learned * lane_steps(args)
                metrics = learn_from_memories(learn, memories, args, end)
                due = learned == args.total_rounds
                due |= args.eval_every > 0 and learned % args.eval_every == 0
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"halves": halves, "games": games}
            yield learned * args.round_updates, due, metrics, state
    draw_policies(net, memories, args, end, folder.with_name("policies.png"))


def run_stage(
    net: GameNetwork, teachers: nn.ModuleList, args: Args, checkpoint: dict
) -> dict[str, float]:
    """Train; whenever the stage yields, save, evaluate if due, report. Returns the last report."""
    from torch.utils.tensorboard import SummaryWriter  # not above: collectors import this, too

    games = args.env_ids[0] if len(args.env_ids) == 1 else f"{len(args.env_ids)}-games"
    run_dir = open_run_dir(args, f"{games}_{args.stage}", "policy_distillation")
    writer, memory = SummaryWriter(run_dir), run_dir / "memory"
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    start = time.perf_counter() - checkpoint.get("seconds", 0.0)
    if checkpoint:
        torch.set_rng_state(checkpoint["rng"])
    stage = train_teacher(net, args, memory, checkpoint)
    if args.stage == "distill":
        stage = distill(net, teachers, args, memory, checkpoint)
    finished, known = False, {}
    try:
        with closing(stage):
            for step, due, metrics, state in stage:
                seconds = time.perf_counter() - start
                state |= {"args": asdict(args), "rng": torch.get_rng_state(), "seconds": seconds}
                save_checkpoint(run_dir / "checkpoint.pt", **state, memory=file_sizes(memory))
                finished = state.get("steps", 0) >= args.total_timesteps
                finished |= state.get("halves", 0) // 2 >= args.total_rounds
                metrics["charts/minutes"] = seconds / 60  # with the evaluations before this report
                report(writer, step, metrics)
                if due:
                    known = {} if args.online else known  # an online teacher changes
                    evaluated = evaluate_games(net, teachers, args, known)
                    report(writer, step, evaluated)
                    metrics |= evaluated
        if args.capture_video:
            film_games(net, teachers, args, run_dir)
    except KeyboardInterrupt:
        raise stopped(run_dir, finished) from None
    finally:
        writer.close()
    return metrics


# What may change when a run goes on. All else shapes its networks, replays or numbers.
MAY_CHANGE = ("total_timesteps", "total_rounds", "eval_every", "eval_episodes", "eval_epsilon")
MAY_CHANGE += ("teachers", "capture_video", "device", "run_dir", "resume", "evaluate")


def run(args: Args) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.manual_seed(args.seed)
    teachers, checkpoint = nn.ModuleList(), {}
    if args.teachers:
        if args.env_ids != Args.env_ids:
            raise SystemExit("--env-ids has no effect beside --teachers: leave it out.")
        env_ids, networks = zip(*map(load_teacher, args.teachers))
        args, teachers = replace(args, env_ids=env_ids), nn.ModuleList(networks)
    check_flags(args)
    num_actions = [int(make_env(env_id).action_space.n) for env_id in args.env_ids]
    net = make_network(args, num_actions).to(choose_device(args.device))
    if args.online:
        teachers = nn.ModuleList([GameNetwork(WIDTHS["same"], num_actions)])
    teachers.share_memory()  # with the collectors, who thus see an online one change

    if args.resume or args.evaluate:
        path, shaping = Path(args.resume or args.evaluate), ["stage", "env_ids", "student"]
        if args.resume:
            of_high_score = {"eval_episodes", "eval_epsilon"} if args.online else set()
            shaping = sorted(vars(args).keys() - set(MAY_CHANGE) | of_high_score)
        checkpoint = load_checkpoint(path, args, net, *shaping)
        theirs, ours = checkpoint.get("teachers", {}), teachers.state_dict()
        if not args.online and any(not torch.equal(theirs[name], ours[name]) for name in theirs):
            raise SystemExit(
                f"{path} was made with other --teachers than {', '.join(args.teachers)}."
            )
        if args.online and theirs:
            teachers.load_state_dict(theirs)
    if args.evaluate:
        if args.capture_video:
            film_games(net, teachers, args, path.parent)
        return evaluate_games(net, teachers, args, {})
    if args.resume and file_sizes(path.parent / "memory") != checkpoint.get("memory"):
        raise SystemExit(
            f"The replays in {path.parent / 'memory'} are missing or not as {path} left them: "
            "the run cannot go on."
        )
    steps, rounds = checkpoint.get("steps", 0), checkpoint.get("halves", 0) // 2
    for had, what in ((steps, "timesteps"), (rounds, "rounds")):
        if had >= getattr(args, f"total_{what}"):
            raise SystemExit(f"{path} has had {had} {what}: --evaluate it or raise --total-{what}.")
    check_memory(args, num_actions)
    return run_stage(net, teachers, args, checkpoint)


def main(args: Args) -> dict[str, float]:
    check(args)
    keep_memory()
    try:
        return run(args)
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
