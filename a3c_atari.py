"""Asynchronous advantage actor-critic (A3C): CPU processes learn to play Atari from the screen.

    Paper    Mnih et al., "Asynchronous methods for deep reinforcement learning", ICML 2016
    Shows    algorithm S2 with shared RMSProp: no replay memory, no GPU (figure 1)
    Run      python a3c_atari.py --env-id PongNoFrameskip-v4 --orthogonal-init --rmsprop-eps 1e-3
               --num-workers 2 --envs-per-worker 8 --total-timesteps 8000000 --eval-episodes 30
    Result   19.4 (deviation of 30 games 1.9, seed 1) in 66 min on 2 cores of an AMD EPYC;
               paper: 11.4 after 80 M steps of the larger network, human starts
    Run      python a3c_atari.py --num-workers 2 --envs-per-worker 8 --total-timesteps 20000000
               --eval-episodes 30
    Result   32.1 (deviation of 30 games 13.3, seed 1) in 258 min, mostly beside other work, on
               the same machine; paper: 551.6 after 80 M steps of the larger network, human starts

Departures: ours (the paper's)
    from the authors' later answers: learning rate 7e-4 (figure 1: 50 drawn from LogUniform(1e-4,
      1e-2), mean of the best 5 runs; tables: searched on six games), RMSProp's epsilon 0.1 (not
      told), gradient norm 40 (searched, value not told), one g and one norm for pi and V together
      (not told), gradient of V: (R - V) / 2 (2 (R - V)), rewards clipped to [-1, 1] (not told); a
      segment has the paper's 5 steps, not the 20 of those answers
    one run at one rate; the norm and g are those of K games' gradients together
    processes, as many as there are cores (16 threads); T grows by segments (by steps)
    the Run lines: 8 and 20 million steps (80 million by a later answer), over which the rate falls
      to 0; 8 games in each of 2 processes; Pong's: orthogonal weights and biases of 0 at first,
      those of pi a hundredth (authors: as torch draws them), epsilon 1e-3
    evaluation samples from pi, as training does (not told)
    g begins at 0 (not told)
    a lost life ends an episode of training, but not of evaluation; the LSTM is emptied and the four
      screens begin anew with it (not told)
    108,000 frames end a game (told for evaluation); in training its return then goes on as V of the
      last screens (not told)
    screens turn grey before the maximum of two is taken, as gymnasium does it (after)
    --lstm puts 256 cells on either network (on the larger)
    up to 30 no-ops before a game (tables: human starts); no GPU, that being the paper's point
    today's action sets: Pong 6 (3); sticky actions with *-v0 and ALE/*-v5 ids (none)
    K = envs_per_worker games in a process (1): a forward pass sees K screens, an update sums the
      gradients of K segments. A game whose episode ends begins the next within the segment, which
      is cut short only when all K end in the same step: with K = 1 at every end of an episode

Symbols: theta shared parameters; g running average of their squared gradients; T steps taken by
all workers; a_tm1 taken in s_tm1 gives r_t and s_t; R n-step return; V value; pi policy.
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
    env_id: str = "BreakoutNoFrameskip-v4"  # any *NoFrameskip-v4 or ALE/*-v5, or your module:Env-v0
    network: Literal["small", "large"] = "small"  # the network of DQN 2013 or of DQN 2015
    lstm: bool = False  # 256 LSTM cells after the last hidden layer
    orthogonal_init: bool = False  # first weights, but an LSTM's; without: torch's, as theirs
    num_workers: int = os.cpu_count() or 1  # processes that play and learn
    envs_per_worker: int = 1  # K, games that a worker plays side by side (paper: 1)
    t_max: int = 5  # steps of a segment, at most
    discount: float = 0.99  # gamma
    entropy_cost: float = 0.01  # beta
    value_cost: float = 0.5  # factor on (R - V)^2 / 2
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
    capture_video: bool = False  # write the first two minutes of a game as a GIF
    seed: int = 1  # of every random number; workers race, so runs still differ
    run_dir: str = ""  # for logs, films, checkpoint.pt; default runs/GAME__SCRIPT__SEED__TIME
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Up to t_max consecutive steps of K games under one copy of the parameters."""

    s_tm1: Tensor  # [N, K, 84, 84, 4] screens, bytes
    a_tm1: Tensor  # [N, K] actions
    r_t: Tensor  # [N, K] clipped rewards
    terminated: Tensor  # [N, K] the step ended the episode: nothing follows
    truncated: Tensor  # [N, K] the step ran into the time limit: more would have followed
    v_t: Tensor  # [N, K] V(s_t), known where the segment or a truncated episode ends
    fresh: Tensor  # [N, K] s_tm1 begins an episode
    lstm_state: tuple[Tensor, Tensor]  # 2 x [K, 256] before the first step


def make_orthogonal(module: nn.Module, gain: float) -> None:
    """A module's weights become orthogonal times gain, its biases 0 (Saxe et al. 2014)."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, gain)
        else:
            nn.init.zeros_(parameter)


class ActorCritic(nn.Module):
    """Policy pi and value V on one shared trunk (section 4)."""

    def __init__(
        self,
        num_actions: int,
        network: Literal["small", "large"],
        lstm: bool,
        orthogonal_init: bool = False,
    ):
        super().__init__()
        if network == "small":  # Mnih et al. 2013
            layers = [nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU()]
            layers += [nn.Flatten(), nn.Linear(32 * 9 * 9, 256), nn.ReLU()]
        else:  # Mnih et al. 2015
            layers = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 3, 1), nn.ReLU()]
            layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU()]
        width = layers[-2].out_features
        self.trunk = nn.Sequential(*layers)
        self.lstm = nn.LSTMCell(width, 256) if lstm else None
        self.policy = nn.Linear(256 if lstm else width, num_actions)
        self.value = nn.Linear(256 if lstm else width, 1)
        if orthogonal_init:
            make_orthogonal(self.trunk, 2**0.5)
            make_orthogonal(self.policy, 0.01)
            make_orthogonal(self.value, 1)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    @staticmethod
    def initial_lstm_state(K: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(K, 256), torch.zeros(K, 256)

    def forward(self, s: Tensor, lstm_state: tuple[Tensor, Tensor], fresh: Tensor):
        """Logits [N, K, A], V [N, K] and the next LSTM state for screens s [N, K, 84, 84, 4].

        lstm_state (2 x [K, 256]) is emptied where fresh [N, K] says that an episode begins.
        """
        x = s.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        x = self.trunk(x)  # [N * K, width]
        if self.lstm is not None:
            outputs = []
            for x_t, fresh_t in zip(x.split(s.shape[1]), fresh, strict=True):
                h, c = (state * ~fresh_t[:, None] for state in lstm_state)
                lstm_state = self.lstm(x_t, (h, c))
                outputs.append(lstm_state[0])
            x = torch.cat(outputs)
        return self.policy(x).unflatten(0, s.shape[:2]), self.value(x).view(s.shape[:2]), lstm_state


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Actions [K] from pi = softmax(logits [K, A]): the argmax of pi / Exponential(1) is a draw."""
    pi = logits.softmax(-1)
    return (pi / torch.empty_like(pi).exponential_(generator=generator)).argmax(-1)


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


def policy_loss(logits: Tensor, a: Tensor, advantage: Tensor) -> Tensor:
    """-log pi(a|s) (R - V), summed over the segment; the advantage counts as a constant."""
    log_pi_a = logits.log_softmax(-1).gather(-1, a[..., None]).squeeze(-1)  # [N, K]
    return -(log_pi_a * advantage.detach()).sum()


def value_loss(advantage: Tensor) -> Tensor:
    """(R - V)^2 / 2, summed over the segment."""
    return advantage.square().sum() / 2


def policy_entropy(logits: Tensor) -> Tensor:
    """H(pi) in nats, summed over the segment (section 4)."""
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi).sum()


def a3c_loss(net: ActorCritic, segment: Segment, args: Args) -> tuple[Tensor, dict[str, float]]:
    """Algorithm S2's sum over a segment with section 4's entropy; its parts, a step's mean each."""
    logits, v, _ = net(segment.s_tm1, segment.lstm_state, segment.fresh)
    R = n_step_returns(
        segment.r_t, segment.terminated, segment.truncated, segment.v_t, args.discount
    )
    pi_loss = policy_loss(logits, segment.a_tm1, R - v)
    v_loss = value_loss(R - v)
    entropy = policy_entropy(logits)
    watched = {
        "losses/policy_loss": pi_loss.item() / R.numel(),
        "losses/value_loss": v_loss.item() / R.numel(),
        "losses/entropy": entropy.item() / R.numel(),
    }
    return pi_loss + args.value_cost * v_loss - args.entropy_cost * entropy, watched


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


def play(
    envs: Sequence[gym.Env], seeds: list[int], net: ActorCritic, t_max: int
) -> Iterator[tuple[Segment, list[dict]]]:
    """Endless segments of K games side by side, each played with the parameters net has by then.

    Each comes with the scores "r" and frames "l" of the whole games that ended in it.
    """
    s_tm1 = reset_games(envs, seeds)
    fresh, lstm_state = torch.ones(len(envs), dtype=torch.bool), net.initial_lstm_state(len(envs))
    while True:
        steps, games, first_lstm_state, last = [], [], lstm_state, False
        while not last:
            with torch.no_grad():
                logits, _, lstm_state = net(s_tm1[None], lstm_state, fresh[None])
                a_tm1 = sample(logits[0])  # [K]
            s_t, r_t, terminated, truncated, infos = step_games(envs, a_tm1)

            ended = terminated | truncated
            last = len(steps) == t_max - 1 or bool(ended.all())
            v_t = torch.zeros_like(r_t)
            if last or truncated.any():
                with torch.no_grad():  # the LSTM's new state is dropped: it has yet to see s_t
                    v_t = net(s_t[None], lstm_state, torch.zeros_like(ended)[None])[1][0]
            steps.append((s_tm1, a_tm1, r_t.clamp(-1, 1), terminated, truncated, v_t, fresh))

            s_tm1, fresh = s_t, ended  # s_t has had its value: new episodes may overwrite it
            for k in ended.nonzero().flatten().tolist():
                s_tm1[k] = torch.from_numpy(envs[k].reset()[0])
                if "episode" in infos[k]:
                    games.append(infos[k]["episode"])
        yield Segment(*map(torch.stack, zip(*steps)), first_lstm_state), games


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


@torch.no_grad()
def evaluate(
    net: ActorCritic, args: Args, film: Path | None = None, watch: Callable = lambda: None
) -> dict[str, float]:
    """True scores of whole games, begun with up to 30 no-ops and played by sampling from pi.

    film: where to write the first game as a GIF. watch() is called at every step.
    """
    seeds = independent_seeds(args.eval_episodes + 1, args.seed)
    generator = torch.Generator().manual_seed(seeds.pop())
    envs = [make_env(args.env_id, training=False) for _ in seeds]
    s = reset_games(envs, seeds)
    fresh = torch.zeros(1, len(envs), dtype=torch.bool)  # no game begins again
    lstm_state = net.initial_lstm_state(len(envs))
    playing, games, pictures = list(range(len(envs))), [], []
    with tqdm(total=len(envs), unit="game", leave=False, disable=None) as bar:
        while playing:
            watch()
            logits, _, lstm_state = net(s[None], lstm_state, fresh)
            a = sample(logits[0], generator).tolist()
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
    net: ActorCritic, optimizer: SharedRMSProp, segment: Segment, learning_rate: float, args: Args
) -> dict[str, float]:
    """Move the shared parameters by the gradient that net, a copy of them, has on a segment.

    A gradient that is not finite moves nothing; the norm returned is not finite then.
    """
    loss, watched = a3c_loss(net, segment, args)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    norm = clip_by_norm(gradients, args.max_gradient_norm)
    if math.isfinite(norm):
        optimizer.step(gradients, learning_rate)
    return watched | {"losses/gradient_norm": norm, "charts/learning_rate": learning_rate}


def worker(
    rank: int,
    args: Args,
    first_step: int,
    shared: ActorCritic,
    optimizer: SharedRMSProp,
    T,
    log,
) -> None:
    """One actor-learner (algorithm S2); it reports by putting (tag, value, step) on log."""
    torch.set_num_threads(1)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is a matter for the main process
    main_process, updates = mp.parent_process(), 0
    seeds = independent_seeds(2 + args.envs_per_worker, args.seed, rank + 1, first_step)
    torch.manual_seed(seeds.pop())
    np.random.seed(seeds.pop())  # for games that use it

    envs = [make_env(args.env_id) for _ in seeds]
    net = ActorCritic(envs[0].action_space.n, args.network, args.lstm)  # theta'
    segments = play(envs, seeds, net, args.t_max)
    while T.value < args.total_timesteps and main_process.is_alive():
        copy_parameters(shared, net)
        segment, games = next(segments)
        with T.get_lock():
            step = T.value = T.value + segment.r_t.numel()
        learning_rate = args.learning_rate * max(0.0, 1 - step / args.total_timesteps)
        watched = update(net, optimizer, segment, learning_rate, args)

        for game in games:
            log.put(("charts/episodic_return", float(game["r"]), step))
            log.put(("charts/episodic_length", float(game["l"]), step))  # frames
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
    net = ActorCritic(num_actions, args.network, args.lstm, args.orthogonal_init).share_memory()
    rmsprop = args.rmsprop_decay, args.rmsprop_eps, args.rmsprop_start
    optimizer = SharedRMSProp(list(net.parameters()), *rmsprop)
    shared = {"net": net.state_dict(), "g": optimizer.g}  # views of what the workers change

    def evaluate_now(step: int, watch: Callable) -> dict[str, float]:
        film = run_dir / f"game_{step}.gif" if args.capture_video else None
        return evaluate(copy.deepcopy(net), args, film, watch)

    first_step, seconds = 0, 0.0
    if args.evaluate:
        path = Path(args.evaluate)
        load_checkpoint(path, args, net, "env_id", "network", "lstm")
        film = path.with_name("game.gif") if args.capture_video else None
        return evaluate(net, args, film)
    if args.resume:
        shaping = ("env_id", "network", "lstm", "orthogonal_init", "rmsprop_start")
        checkpoint = load_checkpoint(Path(args.resume), args, net, *shaping)
        tell_changes(checkpoint, args)
        for g, saved_g in zip(optimizer.g, checkpoint["g"], strict=True):
            g.copy_(saved_g)
        first_step, seconds = checkpoint["T"], checkpoint["seconds"]
        if first_step >= args.total_timesteps:
            raise SystemExit(f"{args.resume} is at step {first_step}: raise --total-timesteps.")

    from torch.utils.tensorboard import SummaryWriter  # not above: workers import this file, too

    run_dir = open_run_dir(args, args.env_id, "a3c_atari")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    save = partial(save_checkpoint, run_dir / "checkpoint.pt", args=asdict(args), **shared)
    spawn = mp.get_context("spawn")
    T, log = spawn.Value("q", first_step), spawn.Queue()
    arguments = args, first_step, net, optimizer, T, log
    return supervise(worker, arguments, args, T, log, writer, seconds, save, evaluate_now)


def main(args: Args) -> dict[str, float]:
    check(args)
    try:
        return run(args)
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
