"""Policy distillation: one small network learns to act as several large ones do.

    Paper    Rusu et al., "Policy distillation", ICLR 2016
    Shows    KL with a sharpened teacher beats MSE; 7 % of the weights keep the score (table B1);
               one student of several games beats a DQN trained on all of them (table B2)
    Run      python policy_distillation.py --stage teacher --env-ids PongNoFrameskip-v4
               --total-timesteps 1000000 --epsilon-timesteps 100000 --final-epsilon 0.01
               --target-period 1000 --learning-starts 10000 --eval-episodes 30 --run-dir runs/pong
    Result   not yet measured
    Run      python policy_distillation.py --teachers runs/pong/checkpoint.pt --total-rounds 10
               --eval-episodes 30
    Result   not yet measured
    Run      python policy_distillation.py --teachers runs/pong/checkpoint.pt
               runs/freeway/checkpoint.pt --total-rounds 20 --eval-episodes 30
    Result   not yet measured
    Run      python policy_distillation.py --stage teacher --env-ids PongNoFrameskip-v4
               FreewayNoFrameskip-v4 --total-timesteps 2000000 --eval-episodes 30
    Result   not yet measured
    Run      python policy_distillation.py --online --env-ids PongNoFrameskip-v4
    Result   not yet measured

Departures: ours (the paper's)
    no-op starts in evaluation (100 human starts): scores compare with those of your teacher alone
    losses are means over minibatches of 32 (sums over the data; minibatches not told)
    RMSProp centred, 2.5e-4, epsilon 2.5e-4 / 0.08 outside the root, for DQN, too (0.01 inside it;
      students: a variant, 1e-4 to 1e-3 with "maximum learning rates" 1e-3 to 1e-1, which we take
      to be the rate divided by epsilon)
    several games share the hour of a round equally; each is played by 8 games a process side by
      side, which go on in the next round (teachers take turns, by episodes)
    a minibatch comes from a game drawn at random, as in appendix A (section 3.3: in turns)
    today's action sets: Pong 6 (3), so output layers have other sizes than the paper's
    --online: the DQN, play and the student take turns by rounds (all at once); a high score is one
      of eval_episodes games after a round (not told); its best network is the teacher
    the DQN's target network follows every 10,000 steps of all its games (DQN 2015: updates);
      Multi-DQN: its games and their updates take turns ("evenly interleaved")

Symbols: q teacher's Q-values; tau temperature; S student's outputs, logits of its policy; T steps;
a_tm1 taken in s_tm1 gives r_t and s_t; y target of Q; theta^- the target network; Q_g a network
with the outputs of game g.
Shapes: B screens, A actions of a game, K games side by side. A step is one decision of the agent,
4 frames of the emulator; an hour of play is 54,000 steps.
"""

import copy
import csv
import difflib
import math
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Literal

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
    env_ids: tuple[str, ...] = ("PongNoFrameskip-v4",)  # games of stage teacher and of --online
    teachers: tuple[str, ...] = ()  # stage distill: a checkpoint.pt of a DQN for each game
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
    final_epsilon: float = 0.1  # exploration of the DQN after epsilon_timesteps
    epsilon_timesteps: int = 1_000_000  # until exploration has fallen from 1, linearly
    # Optimisation
    total_timesteps: int = 50_000_000  # of stage teacher, all games together; 200 M frames
    total_rounds: int = 500  # of stage distill; in each the online DQN makes round_steps steps
    batch_size: int = 32  # screens of a minibatch
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # rmsprop: centred, decay 0.95, as DQN's
    learning_rate: float = 2.5e-4  # of students and DQN (paper: 1e-4 to 1e-3)
    max_learning_rate: float = 0.08  # rmsprop: its epsilon is learning_rate / this
    # The run
    num_collectors: int = os.cpu_count() or 1  # processes in which the teachers play
    envs_per_collector: int = 8  # K, games of a kind that a collector plays side by side
    report_every: int = 25_000  # steps between two reports of stage teacher, each with a checkpoint
    eval_every: int = 0  # reports (of stage distill: rounds) between evaluations; 0: at the end
    eval_episodes: int = 10  # whole games of an evaluation
    eval_epsilon: float = 0.05  # exploration in evaluation
    capture_video: bool = False  # write a game of teacher (left) and student as a GIF
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number
    run_dir: str = ""  # for logs, films, checkpoint.pt, replays; default runs/GAMES__SCRIPT__...
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

    With a small tau the target is nearly one-hot. Its logarithm stays exact: no probability is
    floored, and 0 log 0 is 0, because log_softmax is finite.
    """
    log_p, log_pi = (q / tau).log_softmax(-1), S.log_softmax(-1)
    return (log_p.exp() * (log_p - log_pi)).sum(-1).mean()


def distillation_loss(S: Tensor, q: Tensor, args: Args) -> Tensor:
    """The one of --loss."""
    if args.loss == "kl":
        return kl_loss(S, q, args.temperature)
    return nll_loss(S, q) if args.loss == "nll" else mse_loss(S, q)


class DeepQNetwork(nn.Module):
    """Q(s, .) of the Nature DQN: three convolutions, 512 hidden units (Mnih et al. 2015)."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(64 * 7 * 7, 512), nn.ReLU()),
        )
        self.q = nn.Linear(512, num_actions)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def forward(self, s: Tensor) -> Tensor:
        """Q [B, A] of screens s [B, 84, 84, 4], bytes."""
        x = s.permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        return self.q(self.trunk(x))


STUDENTS = {  # filters of the convolutions, hidden units, hidden units per game (tables A1, A2)
    "net1": (16, 32, 32, 256, 0),
    "net2": (16, 16, 16, 128, 0),
    "net3": (16, 16, 16, 64, 0),
    "same": (32, 64, 64, 512, 0),
    "multi3": (32, 64, 64, 512, 128),
    "multi10": (64, 64, 64, 1500, 128),
}


class StudentNetwork(nn.Module):
    """A trunk that all games share and outputs for each of them (appendix A).

    The outputs are logits of a policy, or the Q-values of --loss mse and of a Multi-DQN.
    """

    def __init__(self, sizes: tuple[int, ...], num_actions: Sequence[int]):
        super().__init__()
        c1, c2, c3, width, width_per_game = sizes
        self.trunk = nn.Sequential(
            *(nn.Conv2d(4, c1, 8, 4), nn.ReLU(), nn.Conv2d(c1, c2, 4, 2), nn.ReLU()),
            *(nn.Conv2d(c2, c3, 3, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(c3 * 7 * 7, width), nn.ReLU()),
        )
        self.outputs = nn.ModuleList()
        for A in num_actions:
            layers = [nn.Linear(width_per_game or width, A)]
            if width_per_game:
                layers = [nn.Linear(width, width_per_game), nn.ReLU(), *layers]
            self.outputs.append(nn.Sequential(*layers))
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def forward(self, s: Tensor, game: int = 0) -> Tensor:
        """[B, A] for screens s [B, 84, 84, 4] of one game, bytes."""
        x = s.permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        return self.outputs[game](self.trunk(x))


def q_values(net: nn.Module, game: int, s: Tensor) -> Tensor:
    """Q_g(s) [B, A], or a student's logits, with the outputs of one game."""
    s = s.to(next(net.parameters()).device)
    return net(s) if isinstance(net, DeepQNetwork) else net(s, game)


@torch.no_grad()
def epsilon_greedy(
    q: Tensor, epsilon: Tensor | float, generator: torch.Generator | None = None
) -> Tensor:
    """Actions [K] for q [K, A]: with probability epsilon any of the A, else the best."""
    any_action = torch.randint(q.shape[1], q.shape[:1], generator=generator)
    explores = torch.rand(len(q), generator=generator) < epsilon
    return torch.where(explores, any_action, q.argmax(-1))


def exploration_rate(T: int, final_epsilon: float, epsilon_timesteps: int) -> float:
    """The DQN's epsilon on its way from 1 to its final value."""
    return 1 + (final_epsilon - 1) * min(1.0, T / epsilon_timesteps)


def dqn_target(r_t: Tensor, terminated: Tensor, q_t: Tensor, discount: float) -> Tensor:
    """y = r + discount max_a Q(s_t, a; theta^-), without the second term at an end. All are [B]."""
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
    except (gym.error.Error, ImportError, ValueError) as error:
        nearest = ", ".join(difflib.get_close_matches(env_id, gym.registry, cutoff=0.4)) or "none"
        raise SystemExit(f"There is no game {env_id}: {error} Nearest names: {nearest}.") from None

    env = RecordEpisodeStatistics(env)
    if is_atari:  # it fetches the screens that it needs: "ram" saves rendering the others
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
    """A game in progress. Its seed and the actions since then bring it back, whatever it is."""

    def __init__(self, env_id: str, training: bool, seed: int, actions: Sequence[int] = ()):
        self.env = make_env(env_id, training)
        self.begin(seed)
        for a in actions:
            self.step(a)

    def begin(self, seed: int) -> None:
        self.seed, self.actions, self.age = seed, [], 0
        self.s = self.env.reset(seed=seed)[0]  # [84, 84, 4]

    def step(self, a: int) -> tuple[float, bool, bool, dict]:
        """Reward, terminated, truncated, info. A lost life is followed by the next episode."""
        self.actions.append(a)
        self.s, r_t, terminated, truncated, info = self.env.step(a)
        self.age += 1
        if (terminated or truncated) and "episode" not in info:
            self.s, self.age = self.env.reset()[0], 0
        return float(r_t), terminated, truncated, info

    @property
    def state(self) -> tuple[int, list[int]]:
        return self.seed, self.actions


class ScreenMemory:
    """The last `capacity` steps of each of several games side by side, the lanes.

    Step t of a lane lies in slot t % slots: its newest screen, its age (steps since its episode
    began, at most 3) and the values that go with it. Every screen is stored once; stacks of four
    are rebuilt, and never reach into another episode. Slots beyond the capacity are for the history
    of the oldest step and for `spare` steps that may be written while all the others stay.

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
        self.ages[lanes, slot] = torch.tensor(ages, dtype=torch.int32).clamp(max=3).byte()
        self.values[lanes, slot] = values

    def sample(self, size: int, end: int) -> tuple[Tensor, Tensor]:
        """Lanes and steps [size], drawn from the last `capacity` ones before step `end`."""
        oldest = max(0, end - self.capacity)
        return torch.randint(self.lanes, (size,)), torch.randint(oldest, end, (size,))

    def stacks(self, lane: Tensor, t: Tensor) -> Tensor:
        """Screens [B, 84, 84, 4] at steps t; an episode's first screen stands for those before."""
        age = self.ages[lane, t % self.slots].long()
        back = torch.minimum(torch.tensor([3, 2, 1, 0]), age[:, None])  # [B, 4]
        return self.screens[lane[:, None], (t[:, None] - back) % self.slots].permute(0, 2, 3, 1)

    def values_at(self, lane: Tensor, t: Tensor) -> Tensor:
        return self.values[lane, t % self.slots]


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


@torch.no_grad()
def evaluate(Q: Callable[[Tensor], Tensor], env_id: str, args: Args) -> dict[str, float]:
    """True scores of whole games, begun with up to 30 no-ops and played epsilon-greedily.

    The same seeds for every Q: teacher and student begin alike.
    """
    seeds = independent_seeds(args.eval_episodes + 1, args.seed)
    generator = torch.Generator().manual_seed(seeds.pop())
    games = [Game(env_id, False, seed) for seed in seeds]
    playing, scores = games, []
    with tqdm(total=len(games), unit="game", leave=False, disable=None) as bar:
        while playing:
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


def evaluate_games(net: nn.Module, args: Args) -> dict[str, float]:
    """What one network reaches in all of the games."""
    metrics = {}
    for g, env_id in enumerate(args.env_ids):
        for tag, value in evaluate(partial(q_values, net, g), env_id, args).items():
            metrics[named(f"eval/{tag}", env_id, args)] = value
    return metrics


def teacher_returns(teachers: Sequence[DeepQNetwork], args: Args) -> list[float]:
    """What each teacher reaches in its game, under the same protocol."""
    players = [partial(q_values, teacher, 0) for teacher in teachers]
    return [evaluate(*both, args)["episodic_return"] for both in zip(players, args.env_ids)]


def geometric_mean(ratios: Sequence[float]) -> float:
    """(r_1 ... r_n)^(1/n)."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def compare(student: dict[str, float], returns: list[float], args: Args) -> dict[str, float]:
    """The student's evaluation beside the teachers': percent by game and their geometric mean.

    A percentage of a score that is not above 0 says nothing, and the logarithms of a geometric mean
    want ratios above 0: what cannot be told is left out, and a sentence says why.
    """
    metrics, ratios, others = dict(student), [], []
    for env_id, theirs in zip(args.env_ids, returns, strict=True):
        ours = student[named("eval/episodic_return", env_id, args)]
        metrics[named("eval/teacher_return", env_id, args)] = theirs
        if theirs > 0:
            ratios.append(ours / theirs)
            metrics[named("eval/percent_of_teacher", env_id, args)] = 100 * ratios[-1]
        if min(ours, theirs) <= 0:
            others.append(f"{env_id} (student {ours:.4g}, teacher {theirs:.4g})")
    if others:
        tqdm.write(
            "No geometric mean of the ratios to the teachers: it is defined for scores above 0, "
            f"not for {', '.join(others)}."
        )
    else:
        metrics["eval/geometric_mean"] = 100 * geometric_mean(ratios)
    return metrics


def choose_optimizer(net: nn.Module, args: Args) -> torch.optim.Optimizer:
    """For students and DQN alike."""
    if args.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), args.learning_rate)
    eps = args.learning_rate / args.max_learning_rate  # so that rate / (deviation + eps) < maximum
    return torch.optim.RMSprop(net.parameters(), args.learning_rate, 0.95, eps, centered=True)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of a minibatch; outputs of other games have none and stay."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class DeepQLearner:
    """DQN (Mnih et al. 2015) on one game; on several in turn, with one network, Multi-DQN."""

    def __init__(self, net: nn.Module, args: Args, folder: Path):
        self.net, self.target_net, self.args, self.steps = net, copy.deepcopy(net), args, 0
        self.optimizer = choose_optimizer(net, args)
        seeds = independent_seeds(len(args.env_ids), args.seed, 1)
        self.games = [Game(i, True, seed) for i, seed in zip(args.env_ids, seeds, strict=True)]
        self.memories = dqn_memories(args, folder)

    def state_dict(self) -> dict:
        """All but what is in the memories' files and torch's random state."""
        return {
            "net": self.net.state_dict(),
            "target_net": self.target_net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "games": [game.state for game in self.games],
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """The games are played again, up to where they were."""
        for name in ("net", "target_net", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.games = [Game(i, True, *game) for i, game in zip(self.args.env_ids, state["games"])]
        self.steps = state["steps"]

    def act(self, g: int) -> dict:
        """One step of game g, kept in its memory; returns its info."""
        args, game = self.args, self.games[g]
        s, age = torch.from_numpy(game.s)[None], game.age
        epsilon = exploration_rate(self.steps, args.final_epsilon, args.epsilon_timesteps)
        with torch.no_grad():
            a = int(epsilon_greedy(q_values(self.net, g, s).cpu(), epsilon))
        r_t, terminated, truncated, info = game.step(a)
        values = torch.tensor([[a, np.clip(r_t, -1, 1), terminated, truncated and not terminated]])
        self.memories[g].write(slice(0, 1), self.steps // len(self.games), s, [age], values)
        if "episode" in info:
            game.begin(int(torch.randint(2**31, ())))
        return info

    def loss(self, g: int) -> tuple[Tensor, Tensor]:
        """Of a minibatch of game g; and its Q-values."""
        memory, net = self.memories[g], self.net
        lane, t = memory.sample(self.args.batch_size, self.steps // len(self.games) - 1)
        device = next(net.parameters()).device
        a_tm1, r_t, terminated, truncated = memory.values_at(lane, t).to(device).unbind(-1)
        with torch.no_grad():
            q_t = q_values(self.target_net, g, memory.stacks(lane, t + 1))
        y = dqn_target(r_t, terminated, q_t, self.args.discount)
        q = q_values(net, g, memory.stacks(lane, t))
        return td_loss(q, a_tm1.long(), y, 1 - truncated), q

    def learn(self, steps: int) -> dict[str, float]:
        """Play and learn for some steps of all games together; the means of what was watched."""
        watched, args, n = defaultdict(list), self.args, len(self.games)
        for _ in tqdm(range(steps), unit="step", leave=False, disable=None):
            g = self.steps % n
            info = self.act(g)
            self.steps += 1
            if "episode" in info:
                for tag, key in (("episodic_return", "r"), ("episodic_length", "l")):
                    tag = named(f"charts/{tag}", args.env_ids[g], args)
                    watched[tag].append(float(info["episode"][key]))
            if self.steps % args.steps_per_update == 0 and self.steps // n > args.learning_starts:
                loss, q = self.loss(self.steps // args.steps_per_update % n)
                refuse_infinity(loss.item(), f"of the DQN at step {self.steps}")
                update(self.optimizer, loss)
                watched["losses/td_loss"].append(loss.item())
                watched["losses/q_values"].append(q.mean().item())
            if self.steps % args.target_period == 0:
                copy_parameters(self.net, self.target_net)
        epsilon = exploration_rate(self.steps, args.final_epsilon, args.epsilon_timesteps)
        means = {tag: float(np.mean(values)) for tag, values in sorted(watched.items())}
        return means | {"charts/epsilon": epsilon}


def demonstrate(
    games: list[Game],
    teacher: DeepQNetwork,
    write: Callable,
    times: range,
    epsilon: float,
    generator: torch.Generator,
    T,
) -> list[float]:
    """The teacher plays games side by side; returns the scores of the whole ones.

    It acts epsilon-greedily, and for each step write(t, screens, ages, q) keeps its Q-values.
    """
    returns = []
    for t in times:
        s = torch.from_numpy(np.stack([game.s for game in games]))
        with torch.no_grad():
            q = teacher(s)
        write(t, s, [game.age for game in games], q)
        for game, a in zip(games, epsilon_greedy(q, epsilon, generator).tolist()):
            *_, info = game.step(a)
            if "episode" in info:
                returns.append(float(info["episode"]["r"]))
                game.begin(int(torch.randint(2**31, (), generator=generator)))
        with T.get_lock():
            T.value += len(games)
    return returns


def collector(
    rank: int,
    args: Args,
    folder: Path,
    teachers: list[DeepQNetwork],
    states: list[list[list]],
    rounds: int,
    wanted: Synchronized,
    T,
    log,
) -> None:
    """Plays a round whenever more are wanted, and puts (rank, states, returns) on log.

    states, those of its games by kind, let another process go on as this one would have.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is a matter for the main process
    main_process, K, steps = mp.parent_process(), args.envs_per_collector, lane_steps(args)
    lanes = slice(rank * K, (rank + 1) * K)
    memories = student_memories(args, folder, [teacher.q.out_features for teacher in teachers])
    kinds = [
        [Game(env_id, False, *state) for state in of_kind]
        for env_id, of_kind in zip(args.env_ids, states[rank], strict=True)
    ]
    while main_process.is_alive():
        if rounds == wanted.value:
            time.sleep(0.01)
            continue
        returns, times = [], range(rounds * steps, (rounds + 1) * steps)
        rounds += 1
        seeds = independent_seeds(len(kinds), args.seed, 1 + rank, rounds)
        for games, teacher, memory, seed in zip(kinds, teachers, memories, seeds, strict=True):
            generator, write = torch.Generator().manual_seed(seed), partial(memory.write, lanes)
            how = times, args.teacher_epsilon, generator, T
            returns.append(demonstrate(games, teacher, write, *how))
        log.put((rank, [[game.state for game in games] for games in kinds], returns))


def collect(
    collectors: mp.ProcessContext, args: Args, wanted: Synchronized, T, log
) -> tuple[list, dict[str, float]]:
    """One round of play by all collectors; the states of their games and what was watched."""
    first, start, reports = T.value, time.perf_counter(), {}
    total = lane_steps(args) * args.num_collectors * args.envs_per_collector * len(args.env_ids)
    wanted.value += 1
    with tqdm(total=total, unit="step", leave=False, disable=None) as bar:
        while len(reports) < args.num_collectors:
            collectors.join(timeout=0.05)  # raises what a collector has raised
            bar.update(T.value - first - bar.n)
            while not log.empty():
                rank, states, returns = log.get()
                reports[rank] = states, returns
    metrics = {"charts/SPS": total / (time.perf_counter() - start)}  # the teachers' steps
    for g, env_id in enumerate(args.env_ids):
        scores = [score for _, returns in reports.values() for score in returns[g]]
        if scores:
            metrics[named("charts/episodic_return", env_id, args)] = float(np.mean(scores))
    return [reports[rank][0] for rank in sorted(reports)], metrics


def learn_from_memories(
    net: StudentNetwork, optimizer, memories: list[ScreenMemory], args: Args, end: int
) -> dict[str, float]:
    """The updates of a round, each on a minibatch of one game; the means of what was watched."""
    watched, start = defaultdict(list), time.perf_counter()
    for _ in tqdm(range(args.round_updates), unit="update", leave=False, disable=None):
        g = int(torch.randint(len(memories), ()))
        lane, t = memories[g].sample(args.batch_size, end)
        S = q_values(net, g, memories[g].stacks(lane, t))
        q = memories[g].values_at(lane, t).to(S.device)
        loss = distillation_loss(S, q, args)
        refuse_infinity(loss.item(), f"after {end} steps in each of the games played")
        update(optimizer, loss)
        agreement = (S.argmax(-1) == q.argmax(-1)).float().mean()
        watched[named(f"losses/{args.loss}", args.env_ids[g], args)].append(loss.item())
        watched[named("charts/agreement", args.env_ids[g], args)].append(agreement.item())
    means = {tag: float(np.mean(values)) for tag, values in sorted(watched.items())}
    return means | {"charts/UPS": args.round_updates / (time.perf_counter() - start)}


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """target <- source, two networks of one shape."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        ours.copy_(theirs)


def report(writer, step: int, metrics: dict[str, float]) -> None:
    """The same numbers to the terminal, to tensorboard and to metrics.csv."""
    tqdm.write(f"{step:>8}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    with open(Path(writer.log_dir, "metrics.csv"), "a", newline="") as file:
        csv.writer(file).writerows([step, name, value] for name, value in metrics.items())


def save_checkpoint(path: Path, **state) -> None:
    """Write beside the old file, then rename: a crash leaves the old one or the new one, whole."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, args: Args, net: nn.Module, *shaping: str) -> dict:
    """What save_checkpoint wrote, its parameters put into net.

    The flags named in shaping must be those of the run that wrote it.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu")
        for name in shaping:
            theirs, ours = checkpoint["args"][name], getattr(args, name)
            if theirs != ours:
                raise SystemExit(f"{path} was made with {name}={theirs}, not with {name}={ours}.")
        net.load_state_dict(checkpoint["net"])
    except Exception as error:  # whatever bytes that are no checkpoint make torch.load raise
        kind = type(error).__name__
        raise SystemExit(
            f"{path} is missing, damaged or no checkpoint for this ({kind})."
        ) from None
    return checkpoint


def open_run_dir(args: Args, task: str, script: str) -> Path:
    """The folder of this run: that of the checkpoint it resumes, or a new one."""
    if args.resume:
        return Path(args.resume).parent
    name = f"{task}__{script}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.run_dir or f"runs/{name}")
    if (run_dir / "checkpoint.pt").exists():
        raise SystemExit(
            f"{run_dir} holds a run already: --resume {run_dir}/checkpoint.pt goes on with it, "
            "another --run-dir begins anew."
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{run_dir} cannot be made ({error}): choose another --run-dir.") from None
    return run_dir


class Diverged(SystemExit):
    """The loss is no longer a number."""


def refuse_infinity(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise Diverged(
            f"The loss is {loss} {where}: the run stops. The last checkpoint is the one before; "
            "a smaller --learning-rate may help."
        )


def stopped(run_dir: str | Path) -> SystemExit:
    """What Ctrl-C ends with."""
    path = Path(run_dir, "checkpoint.pt")
    if not path.exists():
        return SystemExit("Stopped before the first checkpoint.")
    return SystemExit(f"Stopped; go on with the same flags and --resume {path}")


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; leave the flag out.")
    return name


FRACTIONS = ("discount", "rmsprop_decay", "momentum_decay", "sgd_momentum", "eval_epsilon")


def check(args: Args) -> None:
    """Refuse numbers that no run can have and flags that exclude each other."""
    for field in fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        counts = isinstance(field.default, int) and field.default > 0 and field.name != "seed"
        lowest, highest = int(counts), 1 if field.name in FRACTIONS else 2**32 - 1
        signed = isinstance(field.default, float) and field.default < 0
        if type(value) in (int, float) and not signed and not lowest <= value <= highest:
            raise SystemExit(f"{flag} must lie between {lowest} and {highest}, not at {value}.")
    if args.resume and args.evaluate:
        raise SystemExit("--resume trains and --evaluate does not: pass one of them.")
    if args.resume and args.run_dir:
        raise SystemExit("--resume goes on in the folder of its checkpoint: leave --run-dir out.")


def load_teacher(path: str) -> tuple[str, DeepQNetwork]:
    """The game of a checkpoint and the network that has learned it, frozen."""
    try:
        checkpoint = torch.load(path, map_location="cpu")
        env_id, *_ = checkpoint["args"].get("env_ids") or [checkpoint["args"]["env_id"]]
        net = DeepQNetwork(len(checkpoint["net"]["q.bias"]))
        net.load_state_dict(checkpoint["net"])
    except Exception as error:  # whatever bytes that are no checkpoint make torch.load raise
        raise SystemExit(
            f"{path} is missing, damaged or no DQN of one game ({type(error).__name__}): a teacher "
            "comes from --stage teacher with one game or from gorila_dqn.py."
        ) from None
    theirs, ours = net.q.out_features, make_env(env_id).action_space.n
    if theirs != ours:
        raise SystemExit(f"{path} plays {env_id} with {theirs} actions; here the game has {ours}.")
    return env_id, net


def lane_steps(args: Args) -> int:
    """Steps of a round in each of the games that are played side by side."""
    return args.round_steps // (len(args.env_ids) * args.num_collectors * args.envs_per_collector)


def student_memories(args: Args, folder: Path, num_actions: list[int]) -> list[ScreenMemory]:
    """A replay for each game: what its teacher saw, and its Q-values.

    Nothing to spare: who plays a round again after a crash writes the same steps once more.
    """
    lanes = args.num_collectors * args.envs_per_collector
    sizes = lanes, args.memory_steps // lanes, 0
    return [ScreenMemory(folder / f"teacher_{g}", *sizes, A) for g, A in enumerate(num_actions)]


def dqn_memories(args: Args, folder: Path) -> list[ScreenMemory]:
    """A replay for each game: action, clipped reward, terminated, truncated.

    To spare: the steps up to the next checkpoint, to which the last one goes back after a crash.
    """
    spare = args.round_steps if args.online else args.report_every
    sizes = 1, args.dqn_memory_steps, spare, 4
    return [ScreenMemory(folder / f"dqn_{g}", *sizes) for g in range(len(args.env_ids))]


def check_memory(args: Args, num_actions: list[int]) -> None:
    """Tell how large the replays become; refuse what the machine does not have."""
    needed = 0
    if args.stage == "distill":
        needed += sum(args.memory_steps * (84 * 84 + 1 + 4 * A) for A in num_actions)
    if args.stage == "teacher" or args.online:
        needed += len(num_actions) * args.dqn_memory_steps * (84 * 84 + 1 + 4 * 4)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    folder = Path(args.resume or args.run_dir or "runs").absolute()
    folder = next(path for path in (folder, *folder.parents) if path.is_dir())
    disk = memory if args.resume else shutil.disk_usage(folder).free
    told = f"The replays take up to {needed / 1e9:.2f} GB"
    if needed > min(memory, disk):
        raise SystemExit(
            f"{told}, as files that should fit into memory; this machine has {memory / 1e9:.2f} GB "
            f"and {disk / 1e9:.2f} GB of disk for them: lower --memory-steps, --dqn-memory-steps."
        )
    tqdm.write(f"{told} of this machine's {memory / 1e9:.2f} GB.")


def check_stage(args: Args) -> None:
    """Combinations of flags that no run can have."""
    lanes = args.num_collectors * args.envs_per_collector
    if not args.env_ids:
        raise SystemExit("--env-ids needs at least one game.")
    if args.stage == "teacher" and (args.teachers or args.online):
        raise SystemExit("--teachers and --online belong to --stage distill.")
    if args.stage == "distill" and bool(args.teachers) == args.online:
        raise SystemExit(
            "A student needs --teachers a.pt b.pt, checkpoints of --stage teacher or of "
            "gorila_dqn.py, or a teacher that learns beside it: --online; one of the two."
        )
    if args.online and len(args.env_ids) > 1:
        raise SystemExit("--online distils a single game: pass one of --env-ids.")
    if len(set(args.env_ids)) < len(args.env_ids):
        raise SystemExit(f"Each game once, please, not {', '.join(args.env_ids)}.")
    if args.temperature == 0:
        raise SystemExit("--temperature must be above 0; its limit at 0 is --loss nll.")
    if args.teacher_epsilon > 1 or args.final_epsilon > 1:
        raise SystemExit("--teacher-epsilon and --final-epsilon must be at most 1.")
    if args.learning_rate == 0 or args.max_learning_rate == 0:
        raise SystemExit("--learning-rate and --max-learning-rate must be above 0.")
    if args.stage == "distill" and not 0 < lane_steps(args) <= args.memory_steps // lanes:
        raise SystemExit(
            f"--round-steps {args.round_steps} must give each of {lanes} games side by side a step "
            f"of each kind of game, and no more than fits into --memory-steps {args.memory_steps}."
        )


@torch.no_grad()
def watch_game(Q: Callable[[Tensor], Tensor], env_id: str, args: Args) -> list[np.ndarray]:
    """The pictures of a game, two minutes at most."""
    seed, game_seed = independent_seeds(2, args.seed)
    generator, game = torch.Generator().manual_seed(seed), Game(env_id, False, game_seed)
    pictures, info = [], {}
    while "episode" not in info and len(pictures) < 1800:
        pictures.append(game.env.render() if game.env.render_mode else game.s[..., -1])
        q = Q(torch.from_numpy(game.s)[None]).cpu()
        info = game.step(int(epsilon_greedy(q, args.eval_epsilon, generator)))[-1]
    return pictures


def film_games(net: nn.Module, teachers: list[DeepQNetwork], args: Args, run_dir: Path) -> None:
    """A GIF of each game: left the teacher's, right the student's, from the same start.

    The one that is over first shows its last picture.
    """
    for g, env_id in enumerate(args.env_ids):
        players = [partial(q_values, net, g)]
        if teachers:
            players.insert(0, partial(q_values, teachers[g], 0))
        games = [watch_game(Q, env_id, args) for Q in players]
        frames = []
        for i in range(max(len(pictures) for pictures in games)):
            shown = [pictures[min(i, len(pictures) - 1)] for pictures in games]
            frames.append(Image.fromarray(np.concatenate(shown, axis=1)))
        path = run_dir / f"{env_id.replace('/', '-').replace(':', '-')}.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=67, loop=0)


@torch.no_grad()
def draw_policies(
    net: StudentNetwork, memories: list[ScreenMemory], args: Args, end: int, path: Path
) -> None:
    """What teacher and student would do on some of the screens; a row for each game."""
    import matplotlib.pyplot as plt  # not above: collectors import this file, too

    tau = args.temperature
    figure, rows = plt.subplots(len(memories), 6, figsize=(15, 2.6 * len(memories)), squeeze=False)
    for g, (axes, memory, env_id) in enumerate(zip(rows, memories, args.env_ids, strict=True)):
        lane, t = memory.sample(3, end)
        s, q = memory.stacks(lane, t), memory.values_at(lane, t)
        S = q_values(net, g, s).cpu()
        p, pi = (q / tau).softmax(-1), (S / tau if args.loss == "mse" else S).softmax(-1)
        for i, (screen, bars) in enumerate(axes.reshape(3, 2)):
            screen.imshow(s[i, ..., -1].numpy(), cmap="gray")
            screen.set(xticks=[], yticks=[], title=env_id if i == 0 else "")
            for offset, height, label in ((-0.2, p[i], "teacher"), (0.2, pi[i], "student")):
                bars.bar(np.arange(len(height)) + offset, height.numpy(), 0.4, label=label)
            bars.set(ylim=(0, 1), xlabel="action", ylabel="probability", xticks=range(len(p[i])))
    rows[0, 1].legend(fontsize="small", framealpha=0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def make_net(args: Args, num_actions: list[int]) -> nn.Module:
    """What the stage trains: a DQN of one game, a Multi-DQN or a student."""
    if args.stage == "teacher" and len(num_actions) == 1:
        return DeepQNetwork(num_actions[0])
    auto = "net2" if len(num_actions) == 1 else "multi3"
    return StudentNetwork(STUDENTS[auto if args.student == "auto" else args.student], num_actions)


def train_teacher(
    net: nn.Module, args: Args, folder: Path, checkpoint: dict | None
) -> Iterator[tuple[int, dict[str, float], dict]]:
    """Stage teacher: DQN or Multi-DQN; a step, metrics and a state whenever a report is due."""
    learner = DeepQLearner(net, args, folder)
    if checkpoint:
        learner.load_state_dict(checkpoint)
        torch.set_rng_state(checkpoint["rng"])
    while learner.steps < args.total_timesteps:
        first, start = learner.steps, time.perf_counter()
        metrics = learner.learn(min(args.report_every, args.total_timesteps - first))
        metrics["charts/SPS"] = (learner.steps - first) / (time.perf_counter() - start)
        reports, last = learner.steps // args.report_every, learner.steps == args.total_timesteps
        if last or (args.eval_every and reports % args.eval_every == 0):
            metrics |= evaluate_games(net, args)
        yield learner.steps, metrics, learner.state_dict()


# Of the environment of the workers: glibc is to keep the memory they free, not to return it to the
# system, which would clear it for them many times a second (a fifth of their time).
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "32000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


def distill(
    net: StudentNetwork,
    teachers: list[DeepQNetwork],
    args: Args,
    folder: Path,
    checkpoint: dict | None,
) -> Iterator[tuple[int, dict[str, float], dict]]:
    """Stage distill; an update, metrics and a state after each half of a round.

    A round is play by the teachers (before it, play and learning of an online one), then updates of
    the student.
    """
    optimizer = choose_optimizer(net, args)
    memories = student_memories(args, folder, [teacher.q.out_features for teacher in teachers])
    learner = None
    if args.online:
        device = next(net.parameters()).device
        learner = DeepQLearner(copy.deepcopy(teachers[0]).to(device), args, folder)
    collected = learned = 0  # rounds
    K = args.envs_per_collector
    states = [
        [[(seed, []) for seed in independent_seeds(K, args.seed, 1 + rank)] for _ in teachers]
        for rank in range(args.num_collectors)
    ]
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        collected, learned, states = (checkpoint[i] for i in ("collected", "learned", "states"))
        if learner:
            learner.load_state_dict(checkpoint["learner"])
        torch.set_rng_state(checkpoint["rng"])
    returns = teacher_returns(teachers, args)
    size, whole = (sum(p.numel() for p in i.parameters()) for i in (net, teachers[0]))
    tqdm.write(f"The student has {size:,} parameters, {100 * size / whole:.1f} % of a teacher's.")

    def state() -> dict:
        return {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "teachers": [teacher.state_dict() for teacher in teachers],
            "learner": learner.state_dict() if learner else None,
            "states": states,
            "collected": collected,
            "learned": learned,
        }

    spawn = mp.get_context("spawn")
    wanted, T, log = spawn.Value("q", collected), spawn.Value("q", 0), spawn.Queue()
    arguments = args, folder, teachers, states, collected, wanted, T, log
    os.environ |= KEEP_MEMORY
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the collectors inherit that
    collectors = mp.spawn(collector, arguments, nprocs=args.num_collectors, join=False)
    signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        while learned < args.total_rounds:
            metrics = {}
            if collected == learned:
                if learner:
                    metrics |= learner.learn(args.round_steps)
                    (score,) = teacher_returns([learner.net], args)
                    metrics["eval/learner_return"] = score
                    if score > returns[0]:  # a new high score: the teacher from here on
                        copy_parameters(learner.net, teachers[0])
                        returns[0] = score
                states, watched = collect(collectors, args, wanted, T, log)
                metrics |= watched
                collected += 1
                yield learned * args.round_updates, {}, state()

            end = collected * lane_steps(args)
            metrics |= learn_from_memories(net, optimizer, memories, args, end)
            learned += 1
            last = learned == args.total_rounds
            if last or (args.eval_every and learned % args.eval_every == 0):
                metrics |= compare(evaluate_games(net, args), returns, args)
            yield learned * args.round_updates, metrics, state()
        draw_policies(net, memories, args, end, folder.with_name("policies.png"))
    finally:
        for process in collectors.processes:
            process.terminate()
            process.join()


def main(args: Args) -> dict[str, float]:
    check(args)
    torch.manual_seed(args.seed)
    teachers = []
    if args.teachers:
        env_ids, teachers = zip(*(load_teacher(path) for path in args.teachers))
        args = replace(args, env_ids=env_ids)
    check_stage(args)
    num_actions = [int(make_env(env_id).action_space.n) for env_id in args.env_ids]
    net = make_net(args, num_actions).to(choose_device(args.device))
    if args.online:
        teachers = [DeepQNetwork(num_actions[0])]

    checkpoint, seconds = None, 0.0
    if args.resume or args.evaluate:
        path, shaping = Path(args.resume or args.evaluate), ["stage", "env_ids", "student"]
        if args.resume:
            shaping += ["online", "optimizer", "num_collectors", "envs_per_collector"]
            shaping += ["memory_steps", "dqn_memory_steps", "round_steps", "report_every"]
            shaping += ["learning_rate", "max_learning_rate", "loss", "temperature"]
        checkpoint = load_checkpoint(path, args, net, *shaping)
        for teacher, theirs in zip(teachers, checkpoint.get("teachers", [])):
            teacher.load_state_dict(theirs)
    if args.evaluate:
        try:
            metrics = evaluate_games(net, args)
            if teachers:
                metrics = compare(metrics, teacher_returns(teachers, args), args)
            if args.capture_video:
                film_games(net, teachers, args, path.parent)
            return metrics
        except KeyboardInterrupt:
            raise SystemExit("Stopped.") from None
    if args.resume:
        seconds = checkpoint["seconds"]
        if checkpoint.get("steps", 0) >= args.total_timesteps:
            raise SystemExit(f"{path} is at step {args.total_timesteps}: raise --total-timesteps.")
        if checkpoint.get("learned", 0) >= args.total_rounds:
            raise SystemExit(f"{path} has had {args.total_rounds} rounds: raise --total-rounds.")
        if not (path.parent / "memory").exists():
            raise SystemExit(f"The replays beside {path} are missing: the run cannot go on.")

    from torch.utils.tensorboard import SummaryWriter  # not above: collectors import this, too

    check_memory(args, num_actions)
    games = args.env_ids[0] if len(args.env_ids) == 1 else f"{len(args.env_ids)}-games"
    run_dir = open_run_dir(args, f"{games}-{args.stage}", "policy_distillation")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    stage = train_teacher(net, args, run_dir / "memory", checkpoint)
    if args.stage == "distill":
        stage = distill(net, teachers, args, run_dir / "memory", checkpoint)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.perf_counter() - seconds
    try:
        with closing(stage):
            for step, metrics, state in stage:
                state |= {"args": asdict(args), "rng": torch.get_rng_state()}
                state["seconds"] = time.perf_counter() - start
                save_checkpoint(run_dir / "checkpoint.pt", **state)
                if metrics:
                    metrics["charts/minutes"] = state["seconds"] / 60
                    report(writer, step, metrics)
        if args.capture_video:
            film_games(net, teachers, args, run_dir)
    except KeyboardInterrupt:
        raise stopped(run_dir) from None
    finally:
        writer.close()
    return metrics


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
