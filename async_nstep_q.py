"""Asynchronous one-step Q-learning, one-step Sarsa and n-step Q-learning on Atari.

    Paper    Mnih et al., "Asynchronous methods for deep reinforcement learning", ICML 2016
    Shows    algorithms 1 and S1: parallel players do without a replay memory (figure 1)
    Run      python async_nstep_q.py --env-id PongNoFrameskip-v4 --orthogonal-init
               --rmsprop-eps 1e-3 --num-workers 2 --envs-per-worker 8 --total-timesteps 10000000
               --eval-episodes 30
    Result   16.8 on Pong (deviation of 30 games 1.8, seed 1; a random player has -20.4) in 91 min,
               partly beside other work, on 2 cores of an AMD EPYC; no number in the paper
    Run      python async_nstep_q.py --algorithm onestep-q --env-id PongNoFrameskip-v4
               --orthogonal-init --rmsprop-eps 1e-3 --num-workers 2 --envs-per-worker 8
               --total-timesteps 4000000 --eval-episodes 30
    Result   -11.2 on Pong (deviation of 30 games 5.9, seed 1) in 43 min, partly beside other work,
               on the same machine; no number in the paper
    Run      python async_nstep_q.py --algorithm onestep-sarsa --env-id PongNoFrameskip-v4
               --orthogonal-init --rmsprop-eps 1e-3 --num-workers 2 --envs-per-worker 8
               --total-timesteps 4000000 --eval-episodes 30
    Result   -19.2 on Pong (deviation of 30 games 1.8, seed 1) in 49 min, partly beside other work,
               on the same machine; no number in the paper

Departures: ours (the paper's)
    learning rate 7e-4 (50 drawn from LogUniform(1e-4, 1e-2), mean of the best 5 runs), RMSProp's
      epsilon 0.1 and gradient norm 40 (not told: what the authors later gave for A3C); the norm is
      that of K games' gradients together
    the Run lines: 10 and 4 million steps (80 million by a later answer), over which the rate falls
      to 0; orthogonal weights and biases of 0 at first, those of Q a hundredth (authors: as torch
      draws them), RMSProp's epsilon 1e-3, 8 games in each of 2 processes; one run at one rate
    each game (thread) draws its final exploration rate anew when a whole game is over
      ("periodically"), so that 0.4, 0.3 and 0.3 are shares of games, not of steps; returns in
      training are means over all rates, far below those of evaluation
    exploration falls with T (T or a thread's t: not told); it is 0.05 in evaluation (not told)
    with one game a process segments begin anew with an episode in the one-step methods, too
      (updates at every fifth step of a thread and at ends)
    one-step methods: all gradients are taken at the end of a segment (each at its own step)
    theta^- is copied after the update of the segment in which T passes a multiple of I_target (at
      that step)
    Sarsa chooses the first action of an episode before the update at the end of the last one
      (after it)
    a game's new exploration rate counts from the next segment, in Sarsa from the action after that
      segment's first (at once)
    processes, as many as there are cores (16 threads); T grows by segments (by steps)
    g begins at 0 (not told: --rmsprop-start)
    rewards are clipped to [-1, 1]; a lost life ends an episode of training, but not of evaluation,
      and the four screens begin anew with it; 108,000 frames end a game, whose target then goes on
      with Q of the last screens (all not told)
    screens turn grey before the maximum of two is taken, as gymnasium does it (after)
    up to 30 no-ops before a game (not told)
    today's action sets: Pong 6 (3); sticky actions with *-v0 and ALE/*-v5 ids (none)
    K = envs_per_worker games in a process (1): a forward pass sees K screens, an update sums the
      gradients of K segments. A game whose episode ends begins the next within the segment, which
      is cut short only when all K end in the same step: with K = 1 at every end of an episode

Symbols: theta shared parameters; theta' a worker's copy; theta^- those of the target network; g
running average of squared gradients; T steps taken by all workers; a_tm1 taken in s_tm1 gives r_t
and s_t; y target of Q.
Shapes: K games of a worker, N <= t_max steps of a segment, A actions. A step is one decision of
the agent, 4 frames of the emulator.
"""

import copy
import csv
import ctypes
import difflib
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
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


@dataclass
class Args:
    # The method
    algorithm: Literal["nstep-q", "onestep-q", "onestep-sarsa"] = "nstep-q"  # S1; 1; 1 for Sarsa
    env_id: str = "BreakoutNoFrameskip-v4"  # any *NoFrameskip-v4 or ALE/*-v5, or your module:Env-v0
    network: Literal["small", "large"] = "small"  # the network of DQN 2013 or of DQN 2015
    orthogonal_init: bool = False  # layers begin orthogonal (authors: as torch's)
    num_workers: int = os.cpu_count() or 1  # processes that play and learn
    envs_per_worker: int = 1  # K, games that a worker plays side by side (paper: 1)
    t_max: int = 5  # steps of a segment, at most; I_AsyncUpdate of the one-step methods
    discount: float = 0.99  # gamma
    target_period: int = 10_000  # I_target, steps between two target networks; 40,000 frames
    epsilon_timesteps: int = 1_000_000  # until exploration has fallen from 1; 4 M frames
    # Optimisation
    total_timesteps: int = 80_000_000  # of all workers together; 320 M frames, the authors' day
    learning_rate: float = 7e-4  # at the start; falls linearly to 0
    rmsprop_decay: float = 0.99  # of the running squared gradient
    rmsprop_eps: float = 0.1  # inside the root
    rmsprop_start: float = 0.0  # first value of g (TensorFlow's RMSProp: 1)
    max_gradient_norm: float = 40.0  # a longer gradient is scaled down to this
    # The run
    report_every: int = 50_000  # steps, at least, between two reports, each with a checkpoint
    eval_every: int = 0  # steps, at least, between two evaluations; 0: only at the end
    eval_episodes: int = 10  # whole games of an evaluation
    eval_epsilon: float = 0.05  # exploration in evaluation
    capture_video: bool = False  # write the first two minutes of a game as a GIF
    seed: int = 1  # of every random number; workers race, so runs still differ
    run_dir: str = ""  # for logs, films, checkpoint.pt; default runs/GAME_ALGORITHM__SCRIPT__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """Up to t_max consecutive steps of K games."""

    s_tm1: Tensor  # [N, K, 84, 84, 4] screens, bytes
    a_tm1: Tensor  # [N, K] actions
    r_t: Tensor  # [N, K] clipped rewards
    terminated: Tensor  # [N, K] the step ended the episode: nothing follows
    truncated: Tensor  # [N, K] the step ran into the time limit: more would have followed
    s_t: Tensor  # [N, K, 84, 84, 4] the screens that the step led to
    a_t: Tensor  # [N, K] Sarsa only: chosen in s_t, executed next unless the episode ended


def make_orthogonal(module: nn.Module, gain: float) -> None:
    """A module's weights become orthogonal times gain, its biases 0 (Saxe et al. 2014)."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, gain)
        else:
            nn.init.zeros_(parameter)


class QNetwork(nn.Module):
    """The action values Q(s, .) [..., A] of screens s [..., 84, 84, 4] in bytes."""

    def __init__(
        self, num_actions: int, network: Literal["small", "large"], orthogonal_init: bool = False
    ):
        super().__init__()
        if network == "small":  # Mnih et al. 2013
            layers = [nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU()]
            layers += [nn.Flatten(), nn.Linear(32 * 9 * 9, 256), nn.ReLU()]
        else:  # Mnih et al. 2015
            layers = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 3, 1), nn.ReLU()]
            layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.value = nn.Linear(layers[-2].out_features, num_actions)
        if orthogonal_init:
            make_orthogonal(self.trunk, 2**0.5)
            make_orthogonal(self.value, 0.01)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def forward(self, s: Tensor) -> Tensor:
        """Q [..., A] of screens s [..., 84, 84, 4], bytes."""
        x = s.flatten(0, -4).permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        return self.value(self.trunk(x)).unflatten(0, s.shape[:-3])


def n_step_returns(
    r_t: Tensor, terminated: Tensor, cut: Tensor, v_t: Tensor, discount: float
) -> Tensor:
    """R_i = r_i + discount R_(i+1) (algorithms S1 and S2). All are [N, K].

    R is 0 after a terminated step; it is v_t, the value of the state reached, after one that is
    cut and after the last.
    """
    returns = torch.empty_like(r_t)
    R = v_t[-1]
    for i in reversed(range(len(r_t))):
        R = torch.where(cut[i], v_t[i], R)
        R = r_t[i] + discount * torch.where(terminated[i], 0, R)
        returns[i] = R
    return returns


@torch.no_grad()
def targets(target_net: QNetwork, segment: Transitions, algorithm: str, discount: float) -> Tensor:
    """y [N, K], what Q(s_tm1, a_tm1) is to become under theta^- (algorithms 1 and S1)."""
    if algorithm == "nstep-q":
        cut = segment.truncated.clone()
        cut[-1] = True
    else:  # every step is cut off: its return is r + discount v
        cut = torch.ones_like(segment.truncated)
    q_t = target_net(segment.s_t[cut])  # [M, A] under theta^-, M steps are cut off
    if algorithm == "onestep-sarsa":
        v_t = q_t.gather(-1, segment.a_t[cut][:, None]).squeeze(-1)
    else:
        v_t = q_t.amax(-1)
    v_t = torch.zeros_like(segment.r_t).masked_scatter_(cut, v_t)
    return n_step_returns(segment.r_t, segment.terminated, cut, v_t, discount)


def q_loss(q: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """(y - Q(s, a))^2, summed over the segment; q [N, K, A]. Its gradient is 2 (Q - y)."""
    return (y - q.gather(-1, a[..., None]).squeeze(-1)).square().sum()


FINAL_EPSILONS, FINAL_EPSILON_PROBABILITIES = (0.1, 0.01, 0.5), (0.4, 0.3, 0.3)


def draw_final_epsilons(count: int) -> Tensor:
    """Final exploration rates [count] (experimental setup)."""
    drawn = torch.multinomial(torch.tensor(FINAL_EPSILON_PROBABILITIES), count, True)
    return torch.tensor(FINAL_EPSILONS)[drawn]


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


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """target <- source, two networks of one shape."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        ours.copy_(theirs)


class SharedRMSProp:
    """RMSProp whose running average g lives, like theta, in memory all workers share (eq. 1)."""

    def __init__(self, theta: Sequence[Tensor], decay: float, eps: float, start: float = 0.0):
        self.theta, self.decay, self.eps = theta, decay, eps
        self.g = [torch.full_like(t, start).share_memory_() for t in theta]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Without a lock, as in the paper: now and then one worker undoes what another wrote."""
        for theta, g, d_theta in zip(self.theta, self.g, gradients, strict=True):
            g.mul_(self.decay).addcmul_(d_theta, d_theta, value=1 - self.decay)
            theta.addcmul_(d_theta, (g + self.eps).rsqrt_(), value=-learning_rate)  # eps inside


def clip_by_norm(gradients: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradients in place to a joint norm of at most max_norm; returns what it was."""
    norm = nn.utils.get_total_norm(gradients).item()
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


# ---- The game -----------------------------------------------------------------------------------


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


def reset_games(envs: Sequence[gym.Env], seeds: Sequence[int]) -> Tensor:
    """The first screens [K, 84, 84, 4] of K games."""
    return torch.from_numpy(np.stack([env.reset(seed=i)[0] for env, i in zip(envs, seeds)]))


def step_games(
    envs: Sequence[gym.Env], a_tm1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[dict, ...]]:
    """s_t [K, 84, 84, 4], r_t, terminated, truncated [K] and the infos of K games."""
    outcomes = [env.step(a) for env, a in zip(envs, a_tm1.tolist(), strict=True)]
    s_t, r_t, terminated, truncated, infos = zip(*outcomes)
    ends = torch.tensor(terminated), torch.tensor(truncated)
    return torch.from_numpy(np.stack(s_t)), torch.tensor(r_t, dtype=torch.float32), *ends, infos


def explore(
    envs: Sequence[gym.Env], seeds: list[int], choose: Callable, t_max: int, sarsa: bool
) -> Iterator[tuple[Transitions, list[dict]]]:
    """Endless segments of K games side by side; choose(s) gives the actions [K].

    Each comes with the whole games that ended in it: which one "k", its score "r", its frames "l".
    """
    s_tm1 = reset_games(envs, seeds)
    a_t = choose(s_tm1) if sarsa else torch.zeros(len(envs), dtype=torch.long)
    while True:
        steps, games, last = [], [], False
        while not last:
            a_tm1 = a_t if sarsa else choose(s_tm1)
            s_t, r_t, terminated, truncated, infos = step_games(envs, a_tm1)
            if sarsa:
                a_t = choose(s_t)  # and will be executed, whatever the next update does
            steps.append((s_tm1, a_tm1, r_t.clamp(-1, 1), terminated, truncated, s_t, a_t))

            ended = terminated | truncated
            last = len(steps) == t_max or bool(ended.all())
            s_tm1 = s_t.clone() if ended.any() else s_t
            for k in ended.nonzero().flatten().tolist():
                s_tm1[k] = torch.from_numpy(envs[k].reset()[0])
                if "episode" in infos[k]:
                    games.append({"k": k} | infos[k]["episode"])
            if sarsa and ended.any():
                a_t = torch.where(ended, choose(s_tm1), a_t)
        yield Transitions(*map(torch.stack, zip(*steps))), games


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


@torch.no_grad()
def evaluate(
    net: QNetwork, args: Args, film: Path | None = None, watch: Callable = lambda: None
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


def update(
    net: QNetwork,
    target_net: QNetwork,
    optimizer: SharedRMSProp,
    segment: Transitions,
    learning_rate: float,
    args: Args,
) -> dict[str, float]:
    """Move the shared parameters by the gradient that net has on a segment.

    A gradient that is not finite moves nothing; the norm returned is not finite then.
    """
    q = net(segment.s_tm1)
    loss = q_loss(q, segment.a_tm1, targets(target_net, segment, args.algorithm, args.discount))
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    norm = clip_by_norm(gradients, args.max_gradient_norm)
    if math.isfinite(norm):
        optimizer.step(gradients, learning_rate)
    return {
        "losses/td_loss": loss.item() / segment.r_t.numel(),  # (y - Q)^2
        "losses/q_values": q.mean().item(),
        "losses/gradient_norm": norm,
        "charts/learning_rate": learning_rate,
    }


def worker(
    rank: int,
    args: Args,
    first_step: int,
    shared: QNetwork,
    target_net: QNetwork,
    optimizer: SharedRMSProp,
    final_epsilons: Tensor,
    T,
    log,
) -> None:
    """One actor-learner (algorithms 1 and S1); it reports by putting (tag, value, step) on log."""
    torch.set_num_threads(1)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is a matter for the main process
    main_process, updates = mp.parent_process(), 0
    seeds = independent_seeds(2 + args.envs_per_worker, args.seed, rank + 1, first_step)
    torch.manual_seed(seeds.pop())
    np.random.seed(seeds.pop())  # for games that use it

    envs = [make_env(args.env_id) for _ in seeds]
    net = shared  # algorithm 1 plays and learns with theta itself, which others move meanwhile
    if args.algorithm == "nstep-q":
        net = QNetwork(envs[0].action_space.n, args.network)  # theta'

    def choose(s: Tensor) -> Tensor:
        epsilon = exploration_rate(T.value, final_epsilons[rank], args.epsilon_timesteps)
        with torch.no_grad():
            return epsilon_greedy(net(s), epsilon)

    log.put((f"charts/final_epsilon_{rank}", final_epsilons[rank].mean().item(), first_step))
    segments = explore(envs, seeds, choose, args.t_max, args.algorithm == "onestep-sarsa")
    while T.value < args.total_timesteps and main_process.is_alive():
        if net is not shared:
            copy_parameters(shared, net)
        segment, games = next(segments)
        with T.get_lock():
            step = T.value = T.value + segment.r_t.numel()
        before = step - segment.r_t.numel()
        learning_rate = args.learning_rate * max(0.0, 1 - step / args.total_timesteps)
        watched = update(net, target_net, optimizer, segment, learning_rate, args)
        if before // args.target_period < step // args.target_period:  # true for one worker
            copy_parameters(shared, target_net)

        for game in games:
            log.put(("charts/episodic_return", float(game["r"]), step))
            log.put(("charts/episodic_length", float(game["l"]), step))  # frames
            final_epsilons[rank, game["k"]] = draw_final_epsilons(1)[0]
            log.put((f"charts/final_epsilon_{rank}", final_epsilons[rank].mean().item(), step))
        updates += 1
        if updates % 100 == 0 or not math.isfinite(watched["losses/gradient_norm"]):
            for tag, value in watched.items():
                log.put((tag, value, step))
    if not main_process.is_alive():
        log.cancel_join_thread()  # nobody will read the rest


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


def supervise(
    role: Callable, arguments: tuple, args: Args, T, log, writer, seconds: float, save, evaluate_now
) -> dict[str, float]:
    """Spawn role(rank, *arguments) --num-workers times and report until they are done.

    save(T=..., seconds=...) writes a checkpoint; seconds is the time spent before. evaluate_now(
    step, watch) returns metrics and calls watch at every step. Returns the last report. A worker
    that dies ends the run with its traceback, Ctrl-C and SIGTERM end it with a checkpoint.
    """
    counter = T.get_obj()  # read without the lock, which a worker may hold when it is killed
    bar = tqdm(total=args.total_timesteps, initial=counter.value, unit="step", disable=None)
    last_step, last_time, last_evaluation = counter.value, time.perf_counter(), counter.value
    recent, finished = defaultdict(list), False
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit that
    workers = mp.spawn(role, arguments, nprocs=args.num_workers, join=False, daemon=True)
    try:
        signal.signal(signal.SIGINT, on_ctrl_c)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        while not finished:
            finished = workers.join(timeout=1)
            drain(log, recent)
            step, now = counter.value, time.perf_counter()
            bar.update(step - bar.n)
            due = last_step + args.report_every <= step < args.total_timesteps
            if not finished and not due:
                continue

            seconds += now - last_time
            metrics = {tag: float(np.mean(values)) for tag, values in sorted(recent.items())}
            metrics["charts/SPS"] = (step - last_step) / (now - last_time)
            metrics["charts/minutes"] = seconds / 60  # with the evaluations before this report
            recent, last_step, last_time = defaultdict(list), step, now
            save(T=step, seconds=seconds)
            report(writer, step, metrics)
            if finished or (args.eval_every and step >= last_evaluation + args.eval_every):
                evaluated = evaluate_now(step, partial(workers.join, 0))
                report(writer, step, evaluated)
                metrics, last_evaluation = metrics | evaluated, step
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # once is enough
        save(T=counter.value, seconds=seconds + time.perf_counter() - last_time)
        path = Path(writer.log_dir, "checkpoint.pt")
        ended = counter.value >= args.total_timesteps
        way = "evaluate with --evaluate" if ended else "go on with the same flags and --resume"
        raise SystemExit(f"Stopped; {way} {path}") from None
    finally:
        for process in workers.processes:
            process.terminate()
            process.join()
        bar.close()
        writer.close()
    return metrics


def run(args: Args) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.set_num_threads(1)  # the cores are the workers'
    torch.manual_seed(args.seed)
    num_actions = make_env(args.env_id).action_space.n
    net = QNetwork(num_actions, args.network, args.orthogonal_init).share_memory()
    target_net = QNetwork(num_actions, args.network).share_memory()
    copy_parameters(net, target_net)
    rmsprop = args.rmsprop_decay, args.rmsprop_eps, args.rmsprop_start
    optimizer = SharedRMSProp(list(net.parameters()), *rmsprop)
    final_epsilons = draw_final_epsilons(args.num_workers * args.envs_per_worker)
    final_epsilons = final_epsilons.view(args.num_workers, -1).share_memory_()
    shared = {  # views of what the workers change
        "net": net.state_dict(),
        "target_net": target_net.state_dict(),
        "g": optimizer.g,
        "final_epsilons": final_epsilons,
    }

    def evaluate_now(step: int, watch: Callable) -> dict[str, float]:
        film = run_dir / f"game_{step}.gif" if args.capture_video else None
        return evaluate(copy.deepcopy(net), args, film, watch)

    first_step, seconds = 0, 0.0
    if args.evaluate:
        path = Path(args.evaluate)
        load_checkpoint(path, args, net, "env_id", "network")
        film = path.with_name("game.gif") if args.capture_video else None
        return evaluate(net, args, film)
    if args.resume:
        shaping = ("env_id", "network", "algorithm", "orthogonal_init", "rmsprop_start")
        checkpoint = load_checkpoint(Path(args.resume), args, net, *shaping)
        tell_changes(checkpoint, args)
        target_net.load_state_dict(checkpoint["target_net"])
        for g, saved_g in zip(optimizer.g, checkpoint["g"], strict=True):
            g.copy_(saved_g)
        if final_epsilons.shape == checkpoint["final_epsilons"].shape:  # else drawn anew
            final_epsilons.copy_(checkpoint["final_epsilons"])
        first_step, seconds = checkpoint["T"], checkpoint["seconds"]
        if first_step >= args.total_timesteps:
            raise SystemExit(f"{args.resume} is at step {first_step}: raise --total-timesteps.")

    from torch.utils.tensorboard import SummaryWriter  # not above: workers import this file, too

    run_dir = open_run_dir(args, f"{args.env_id}_{args.algorithm}", "async_nstep_q")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    save = partial(save_checkpoint, run_dir / "checkpoint.pt", args=asdict(args), **shared)
    spawn = mp.get_context("spawn")
    T, log = spawn.Value("q", first_step), spawn.Queue()
    arguments = args, first_step, net, target_net, optimizer, final_epsilons, T, log
    return supervise(worker, arguments, args, T, log, writer, seconds, save, evaluate_now)


def main(args: Args) -> dict[str, float]:
    check(args)
    try:
        return run(args)
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
