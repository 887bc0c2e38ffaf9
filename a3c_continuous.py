"""Asynchronous advantage actor-critic (A3C) with continuous actions: pendulums, arms, runners.

    Paper    Mnih et al., "Asynchronous methods for deep reinforcement learning", ICML 2016
    Shows    A3C learns motor control from the state (section 5.3, supplement 9); that --pixels
               learns it from a picture, too, is not measured
    Run      python a3c_continuous.py --num-workers 2 --total-timesteps 500000 --eval-episodes 30
    Result   977 (returns of 30 episodes; seeds 1, 2, 3: 1000, 947, 986) in 2 to 13 min, mostly
               beside other runs, on 2 cores of an AMD EPYC; 950 counts as solved (paper: curves
               of such tasks, no numbers)
    Run      python a3c_continuous.py --env-id Pendulum-v1 --t-max 20 --discount 0.95
               --num-workers 2 --total-timesteps 500000 --eval-episodes 30
    Result   -178 (returns of 30 episodes; seeds 1, 2, 3: -187, -166, -181) in 3 to 5 min, partly
               beside other runs, on the same machine
    Run      python a3c_continuous.py --env-id Reacher-v5 --t-max 5 --discount 0.9
               --reward-scale 0.1 --entropy-cost 1e-3 --num-workers 2 --total-timesteps 1000000
               --eval-episodes 30
    Result   -5.3 (returns of 30 episodes; seeds 1, 2, 3: -5.0, -6.0, -4.9) in 10 to 11 min on the
               same machine; an arm that stands still has about -11
    Run      python a3c_continuous.py --env-id HalfCheetah-v5 --t-max 20 --learning-rate 1e-4
               --entropy-cost 1e-3 --num-workers 2 --total-timesteps 10000000 --eval-episodes 30
    Result   3064 (returns of 30 episodes, deviation 159; seed 1) in 53 min on the same machine

Departures: ours (the paper's)
    by default whole episodes, as in the paper; the Run lines of Pendulum, Reacher and HalfCheetah
      learn in segments of 20, 5 and 20 steps that bootstrap, over which the LSTM's state goes on
      and its gradient does not (whole episodes without); entropy cost 1e-3 for Reacher and
      HalfCheetah (1e-4), the entropy that of one dimension, as it is written there
    learning rate 3e-4, HalfCheetah 1e-4, falling to 0 (the best of many from 1e-5 to 1e-1; its fall
      not told); RMSProp's decay 0.99 and epsilon 1e-7, g at first 0 (not told)
    discount 0.99, Pendulum 0.95, Reacher 0.9 (not told)
    a norm of 40 for each network's gradient by itself (not told)
    gradient of V: R - V (2 (R - V)); variance at least 1e-5 (no bound told)
    at a time limit: with whole episodes the return ends there, with segments it goes on as V(s_t)
      (not told)
    pixels: 84x84 RGB, 16 filters of 8x8 with stride 4, 32 of 4x4 with stride 2 (not told)
    gymnasium's environments (the authors' own MuJoCo models, which they did not publish)
    rewards times 0.01, Reacher's times 0.1; states as the environment gives them, one picture
      without a past (not told)
    actions are clipped to the box on their way into the environment, pi's density is not (not told)
    processes, as many as there are cores (16 threads); T grows by segments (by steps)
    evaluation samples from pi, as training does (not told)

Symbols: theta shared parameters; g running average of their squared gradients; T steps taken by
all workers; a_tm1 taken in s_tm1 gives r_t and s_t; R return; V value; pi policy with mean mu and
variance sigma^2.
Shapes: K = 1 environment of a worker, N steps of a segment, A dimensions of an action, D
numbers of a state.
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
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from gymnasium.wrappers import (
    AddRenderObservation,
    ClipAction,
    RecordEpisodeStatistics,
    ResizeObservation,
    TransformObservation,
)
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # The method
    env_id: str = "InvertedPendulum-v5"  # any task with a Box of actions and a vector of states
    pixels: bool = False  # an 84x84 RGB picture is seen in the place of the vector
    num_workers: int = os.cpu_count() or 1  # processes that play and learn
    t_max: int = 0  # 0: whole episodes (paper); else segments of so many steps, continued by V
    discount: float = 0.99  # gamma
    reward_scale: float = 0.01  # factor on the rewards that are learned from
    entropy_cost: float = 1e-4  # beta, of the differential entropy
    # Optimisation
    total_timesteps: int = 2_000_000  # of all workers together
    learning_rate: float = 3e-4  # at the start; falls linearly to 0
    rmsprop_decay: float = 0.99  # of the running squared gradient
    rmsprop_eps: float = 1e-7  # inside the root
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


LSTMState = tuple[Tensor, Tensor] | None  # 2 x [1, K, 128]; None: zeros, where an episode begins


class Segment(NamedTuple):
    """A whole episode, or up to t_max steps of it, under one copy of the parameters."""

    s_tm1: Tensor  # [N, K, D] states, or [N, K, 84, 84, 3] pictures in bytes
    a_tm1: Tensor  # [N, K, A] actions as drawn from pi, not as the box clips them
    r_t: Tensor  # [N, K] rewards
    terminated: Tensor  # [N, K] the return ends here (whole episodes: at a time limit, too)
    v_t: Tensor  # [N, K] V(s_t), known where a segment ends
    policy_state: LSTMState  # of the policy network before the first step
    value_state: LSTMState  # of the value network


def run_lstm(
    lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """lstm(x [N, K, :], state); a single step goes past oneDNN, which takes five times as long.

    state: 2 x [1, K, H]; None: zeros.
    """
    if len(x) > 1:
        return lstm(x, state)
    state = x.new_zeros(2, 1, x.shape[1], lstm.hidden_size) if state is None else state
    h, c = torch.lstm_cell(x[0], [part[0] for part in state], *lstm.all_weights[0])
    return h[None], (h[None], c[None])


class LSTMNetwork(nn.Module):
    """State -> 200 ReLUs -> LSTM 128 -> linear outputs (supplement 9).

    For pictures two convolutions without nonlinearity or pooling stand in the place of the ReLUs.
    """

    def __init__(self, shape: tuple[int, ...], num_outputs: int):
        super().__init__()
        if len(shape) == 1:
            layers, width = [nn.Linear(*shape, 200), nn.ReLU()], 200
        else:
            layers = [nn.Conv2d(3, 16, 8, 4), nn.Conv2d(16, 32, 4, 2), nn.Flatten()]
            width = 32 * 9 * 9
        self.trunk = nn.Sequential(*layers)
        self.lstm = nn.LSTM(width, 128)  # a whole episode in one call; cells take ten times as long
        self.outputs = nn.Linear(128, num_outputs)

    def forward(self, s: Tensor, lstm_state: LSTMState) -> tuple[Tensor, LSTMState]:
        """Outputs [N, K, :] for consecutive s [N, K, ...] of an episode; the next LSTM state."""
        x = s.flatten(0, 1)
        if s.dtype == torch.uint8:
            x = x.permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        x = self.trunk(x).unflatten(0, s.shape[:2])
        x, lstm_state = run_lstm(self.lstm, x, lstm_state)
        return self.outputs(x), lstm_state


class GaussianActorCritic(nn.Module):
    """Policy pi = N(mu, sigma^2 I) and value V, two networks that share nothing (supplement 9)."""

    def __init__(self, shape: tuple[int, ...], num_dimensions: int):
        super().__init__()
        self.pi = LSTMNetwork(shape, num_dimensions + 1)
        self.v = LSTMNetwork(shape, 1)

    def policy(self, s: Tensor, lstm_state: LSTMState) -> tuple[Tensor, Tensor, LSTMState]:
        """mu [N, K, A], sigma^2 [N, K, 1] and the next LSTM state."""
        x, lstm_state = self.pi(s, lstm_state)
        return x[..., :-1], spherical_variance(x[..., -1:]), lstm_state

    def value(self, s: Tensor, lstm_state: LSTMState) -> tuple[Tensor, LSTMState]:
        """V [N, K] and the next LSTM state."""
        v, lstm_state = self.v(s, lstm_state)
        return v.squeeze(-1), lstm_state


def spherical_variance(x: Tensor) -> Tensor:
    """sigma^2 = log(1 + exp(x)), held away from 0, where log pi has no bound."""
    return F.softplus(x) + 1e-5


def sample_gaussian(mu: Tensor, sigma2: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Actions [..., A] from N(mu, sigma^2 I)."""
    return mu + sigma2.sqrt() * torch.empty_like(mu).normal_(generator=generator)


def log_density(mu: Tensor, sigma2: Tensor, a: Tensor) -> Tensor:
    """log pi(a|s) [...] for a, mu [..., A] and sigma2 [..., 1]."""
    return -((a - mu).square() / sigma2 + (2 * math.pi * sigma2).log()).sum(-1) / 2


def differential_entropy(sigma2: Tensor) -> Tensor:
    """(log(2 pi sigma^2) + 1) / 2 in nats, of one dimension of an action, summed over the steps."""
    return ((2 * math.pi * sigma2).log() + 1).sum() / 2


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


def gaussian_policy_loss(mu: Tensor, sigma2: Tensor, a: Tensor, advantage: Tensor) -> Tensor:
    """-log pi(a|s) (R - V), summed over the segment; the advantage counts as a constant."""
    return -(log_density(mu, sigma2, a) * advantage.detach()).sum()


def value_loss(advantage: Tensor) -> Tensor:
    """(R - V)^2 / 2, summed over the segment."""
    return advantage.square().sum() / 2


def a3c_losses(
    net: GaussianActorCritic, segment: Segment, args: Args
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Algorithm S2's sums for the policy network, with the entropy, and for the value network.

    With them come their parts, a step's mean each.
    """
    s_tm1, a_tm1, r_t, terminated, v_t, policy_state, value_state = segment
    mu, sigma2, _ = net.policy(s_tm1, policy_state)
    v, _ = net.value(s_tm1, value_state)
    r_t, cut = args.reward_scale * r_t, torch.zeros_like(terminated)  # only behind the last step
    R = n_step_returns(r_t, terminated, cut, v_t, args.discount)
    pi_loss = gaussian_policy_loss(mu, sigma2, a_tm1, R - v)
    v_loss = value_loss(R - v)
    entropy = differential_entropy(sigma2)
    watched = {
        "losses/policy_loss": pi_loss.item() / R.numel(),
        "losses/value_loss": v_loss.item() / R.numel(),
        "losses/entropy": entropy.item() / R.numel(),
    }
    return pi_loss - args.entropy_cost * entropy, v_loss, watched


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


def follow_runner(env: gym.Env) -> None:
    """Pictures by the camera that MuJoCo's runners take along; gymnasium's own stays behind."""
    if hasattr(env, "mujoco_renderer"):
        import mujoco

        camera = mujoco.mjtObj.mjOBJ_CAMERA
        env.mujoco_renderer.camera_id = mujoco.mj_name2id(env.model, camera, "track")  # or -1


def make_env(env_id: str, pixels: bool, film: bool = False) -> gym.Env:
    """An environment that shows a vector of float32 or, with pixels, bytes [84, 84, 3].

    Actions are clipped to its box on their way in. Where an episode ends, info["episode"] holds
    its return "r" and its steps "l". film: render() gives pictures.
    """
    draws = pixels or film
    if draws and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    try:
        env = gym.make(env_id, render_mode="rgb_array") if draws else gym.make(env_id)
        if draws:
            import cv2  # noqa: F401  ResizeObservation needs it

            follow_runner(env.unwrapped)
            env.reset()
            if env.render() is None:  # what it needs to draw is missed here, not in a worker
                raise ValueError("it shows no picture")
    except Exception as error:  # every library has its own way of missing another
        nearest = ", ".join(difflib.get_close_matches(env_id, gym.registry, cutoff=0.4)) or "none"
        raise SystemExit(
            f"{env_id} cannot be {'drawn' if draws else 'made'} ({error}). Nearest names: "
            f"{nearest}. MuJoCo's tasks need pip install mujoco imageio and, to draw, EGL (Debian: "
            "apt-get install libegl1); Pendulum needs, to draw, pip install pygame."
        ) from None

    seen, actions = env.observation_space, env.action_space
    boxes = isinstance(seen, gym.spaces.Box) and isinstance(actions, gym.spaces.Box)
    if not boxes or len(actions.shape) != 1 or not (pixels or len(seen.shape) == 1):
        raise SystemExit(
            f"{env_id} shows {seen} and takes {actions}; this script needs Boxes, both vectors "
            "(with --pixels the states may have any shape)."
        )
    env = ClipAction(RecordEpisodeStatistics(env))
    if pixels:
        return ResizeObservation(AddRenderObservation(env), (84, 84))
    vector = gym.spaces.Box(-np.inf, np.inf, seen.shape, np.float32)
    return TransformObservation(env, partial(np.array, dtype=np.float32), vector)  # a copy


def as_input(s: np.ndarray) -> Tensor:
    """What an environment shows, as [N = 1, K = 1, ...]."""
    return torch.from_numpy(s)[None, None]


def play(
    env: gym.Env, seed: int, net: GaussianActorCritic, t_max: int
) -> Iterator[tuple[Segment, dict | None]]:
    """Endless segments of one environment, each played with the parameters net has by then.

    Each comes with the return "r" and the steps "l" of the episode that ended with it, if one did.
    """
    s_t, policy_state, value_state = as_input(env.reset(seed=seed)[0]), None, None
    while True:
        steps, first_states, last = [], (policy_state, value_state), False
        while not last:
            s_tm1 = s_t
            with torch.no_grad():
                mu, sigma2, policy_state = net.policy(s_tm1, policy_state)
                a_tm1 = sample_gaussian(mu, sigma2)
            s_t, r_t, terminated, truncated, info = env.step(a_tm1[0, 0].numpy())
            s_t = as_input(s_t)
            steps.append((s_tm1[0], a_tm1[0], torch.tensor([r_t], dtype=torch.float32)))
            last = terminated or truncated or len(steps) == t_max

        s_tm1, a_tm1, r_t = map(torch.stack, zip(*steps))
        ends, v_t = torch.zeros_like(r_t, dtype=torch.bool), torch.zeros_like(r_t)
        ends[-1] = terminated or t_max == 0  # a whole episode's return ends at a time limit, too
        if t_max:
            with torch.no_grad():
                _, value_state = net.value(s_tm1, value_state)
                v_t[-1:], _ = net.value(s_t, value_state)  # the state has yet to see s_t
        if terminated or truncated:
            s_t, policy_state, value_state = as_input(env.reset()[0]), None, None
        yield Segment(s_tm1, a_tm1, r_t, ends, v_t, *first_states), info.get("episode")


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


@torch.no_grad()
def evaluate(
    net: GaussianActorCritic, args: Args, film: Path | None = None, watch: Callable = lambda: None
) -> dict[str, float]:
    """Returns of whole episodes, played by sampling from pi.

    film: where to write the first episode as a GIF. watch() is called at every step.
    """
    seeds = independent_seeds(args.eval_episodes + 1, args.seed)
    generator = torch.Generator().manual_seed(seeds.pop())
    env = make_env(args.env_id, args.pixels, film is not None)
    games, pictures = [], []
    for seed in tqdm(seeds, unit="game", leave=False, disable=None):
        s, lstm_state, info = env.reset(seed=seed)[0], None, {}
        while "episode" not in info:
            watch()
            mu, sigma2, lstm_state = net.policy(as_input(s), lstm_state)
            a = sample_gaussian(mu, sigma2, generator)
            s, _, _, _, info = env.step(a[0, 0].numpy())
            if film and not games and len(pictures) < 500:
                pictures.append(Image.fromarray(env.render()).resize((240, 240)))
        games.append(info["episode"])
    if film:
        duration = max(20, 1000 / env.metadata.get("render_fps", 30))  # milliseconds a picture
        write_gif(pictures, film, duration)
    env.close()
    return {
        "eval/episodic_return": float(np.mean([game["r"] for game in games])),
        "eval/episodic_return_std": float(np.std([game["r"] for game in games])),
        "eval/episodic_length": float(np.mean([game["l"] for game in games])),  # steps
    }


def update(
    net: GaussianActorCritic,
    optimizer: SharedRMSProp,
    segment: Segment,
    learning_rate: float,
    args: Args,
) -> dict[str, float]:
    """Move the shared parameters by the gradient that net, a copy of them, has on a segment.

    A gradient that is not finite moves nothing; the norm returned is not finite then.
    """
    *losses, watched = a3c_losses(net, segment, args)
    gradients, norms = [], []
    for network, loss in zip((net.pi, net.v), losses, strict=True):
        d_theta = torch.autograd.grad(loss, list(network.parameters()))
        norms.append(clip_by_norm(d_theta, args.max_gradient_norm))
        gradients += d_theta
    norm = math.hypot(*norms)
    if math.isfinite(norm):
        optimizer.step(gradients, learning_rate)
    return watched | {"losses/gradient_norm": norm, "charts/learning_rate": learning_rate}


def worker(
    rank: int,
    args: Args,
    first_step: int,
    shared: GaussianActorCritic,
    optimizer: SharedRMSProp,
    T,
    log,
) -> None:
    """One actor-learner (algorithm S2); it reports by putting (tag, value, step) on log."""
    torch.set_num_threads(1)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is a matter for the main process
    main_process, updates = mp.parent_process(), 0
    torch_seed, numpy_seed, env_seed = independent_seeds(3, args.seed, rank + 1, first_step)
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)  # for environments that use it

    env, net = make_env(args.env_id, args.pixels), copy.deepcopy(shared)  # theta'
    segments = play(env, env_seed, net, args.t_max)
    while T.value < args.total_timesteps and main_process.is_alive():
        copy_parameters(shared, net)
        segment, game = next(segments)
        with T.get_lock():
            step = T.value = T.value + segment.r_t.numel()
        learning_rate = args.learning_rate * max(0.0, 1 - step / args.total_timesteps)
        watched = update(net, optimizer, segment, learning_rate, args)

        if game:
            log.put(("charts/episodic_return", float(game["r"]), step))
            log.put(("charts/episodic_length", float(game["l"]), step))  # steps
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
    env = make_env(args.env_id, args.pixels, args.capture_video)
    net = GaussianActorCritic(env.observation_space.shape, *env.action_space.shape).share_memory()
    optimizer = SharedRMSProp(list(net.parameters()), args.rmsprop_decay, args.rmsprop_eps)
    shared = {"net": net.state_dict(), "g": optimizer.g}  # views of what the workers change

    def evaluate_now(step: int, watch: Callable) -> dict[str, float]:
        film = run_dir / f"game_{step}.gif" if args.capture_video else None
        return evaluate(copy.deepcopy(net), args, film, watch)

    first_step, seconds = 0, 0.0
    if args.evaluate:
        path = Path(args.evaluate)
        load_checkpoint(path, args, net, "env_id", "pixels")
        film = path.with_name("game.gif") if args.capture_video else None
        return evaluate(net, args, film)
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, net, "env_id", "pixels")
        tell_changes(checkpoint, args)
        for g, saved_g in zip(optimizer.g, checkpoint["g"], strict=True):
            g.copy_(saved_g)
        first_step, seconds = checkpoint["T"], checkpoint["seconds"]
        if first_step >= args.total_timesteps:
            raise SystemExit(f"{args.resume} is at step {first_step}: raise --total-timesteps.")

    from torch.utils.tensorboard import SummaryWriter  # not above: workers import this file, too

    run_dir = open_run_dir(args, args.env_id, "a3c_continuous")
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
