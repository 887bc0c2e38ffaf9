"""Asynchronous advantage actor-critic (A3C) in 3D mazes: apples and a portal, seen from inside.

    Paper    Mnih et al., "Asynchronous methods for deep reinforcement learning", ICML 2016
    Shows    A3C with an LSTM learns to explore mazes from RGB views (section 5.4, Labyrinth)
    Run      python a3c_maze.py --num-workers 2 --total-timesteps 8000000 --eval-episodes 100
    Result   177.6 points an episode (deviation of 100 episodes 71; seed 1; a random walk 6.1) in
               191 min, partly beside tests, on 2 cores of an AMD EPYC; resumed after 5 million
               steps, where the rate had reached 0 and rose again to 3/8 of its start; paper:
               about 50, in Labyrinth

Departures: ours (the paper's)
    MiniWorld's mazes of square rooms, 3 x 3 (Labyrinth's, whose size is not told and which were
      never published in that form): ours have 14 sets of walls, all of them seen in training; where
      apples, portal and agent are is new in every episode
    4 apples, small green boxes (not told); an episode of 900 steps is 60 s at 30 frames/s
    a step is 2 frames, 0.3 m or 30 degrees (4 frames on Atari; here not told); three actions
    the end of the time cuts a return off with V, as the end of a segment does (not told)
    segments of 20 steps (5 on Atari; here not told); the network of DQN 2013 on one RGB view, then
      256 LSTM cells (on Atari that of DQN 2015, on four screens; here not told)
    learning rate 2e-4 (searched), falling to 0; RMSProp's decay 0.99, discount 0.99 and entropy
      cost 0.01 as on Atari; its epsilon 1e-7, g at first 0, gradient norm 40, rewards as they are,
      8 million steps (not told)
    the LSTM's state goes on from segment to segment, its gradient does not (not told)
    gradient of V: (R - V) / 2 (2 (R - V)); evaluation samples from pi, as training does (not told)
    processes, as many as there are cores (16 threads); T grows by segments (by steps)
    --plain, the task that MiniWorld or VizDoom itself sets, is none of the paper's;
      VizdoomMyWayHome-v1 needs it and pip install vizdoom

Symbols: theta shared parameters; g running average of their squared gradients; T steps taken by
all workers; a_tm1 taken in s_tm1 gives r_t and s_t; R n-step return; V value; pi policy.
Shapes: K = 1 maze of a worker (two MiniWorlds in one process would both show the walls of the one
reset last), N <= t_max steps of a segment, A actions.
"""

import copy
import csv
import ctypes
import difflib
import math
import operator
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import tyro
from gymnasium.wrappers import (
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
    env_id: str = "MiniWorld-MazeS3-v0"  # 3 x 3 rooms; MiniWorld-Maze-v0: 8 x 8; or with --plain
    plain: bool = False  # the environment's own task (a box to find), without the next three flags
    num_apples: int = 4  # at random places of a maze, each worth 1
    episode_steps: int = 900  # of an episode with apples
    action_repeat: int = 2  # frames of the world in a step, with apples
    num_workers: int = os.cpu_count() or 1  # processes that play and learn
    t_max: int = 20  # steps of a segment, at most
    discount: float = 0.99  # gamma
    entropy_cost: float = 0.01  # beta
    value_cost: float = 0.5  # factor on (R - V)^2 / 2
    # Optimisation
    total_timesteps: int = 5_000_000  # of all workers together
    learning_rate: float = 2e-4  # at the start; falls linearly to 0
    rmsprop_decay: float = 0.99  # of the running squared gradient
    rmsprop_eps: float = 1e-7  # inside the root
    max_gradient_norm: float = 40.0  # a longer gradient is scaled down to this
    # The run
    report_every: int = 50_000  # steps, at least, between two reports, each with a checkpoint
    eval_every: int = 0  # steps, at least, between two evaluations; 0: only at the end
    eval_episodes: int = 10  # whole games of an evaluation
    random_walk: bool = False  # evaluations ignore the policy and walk at random, for comparison
    capture_video: bool = False  # write the first two minutes of a game as a GIF
    seed: int = 1  # of every random number; workers race, so runs still differ
    run_dir: str = ""  # for logs, films, checkpoint.pt; default runs/GAME__SCRIPT__SEED__TIME
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Up to t_max consecutive steps of one episode under one copy of the parameters."""

    s_tm1: Tensor  # [N, K, 84, 84, 3] views, bytes
    a_tm1: Tensor  # [N, K] actions
    r_t: Tensor  # [N, K] rewards
    terminated: Tensor  # [N, K] the step ended the episode: nothing follows
    v_t: Tensor  # [N, K] V(s_t), known where the segment ends
    lstm_state: tuple[Tensor, Tensor] | None  # 2 x [1, K, 256] before the first step; None: zeros


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


class MazeActorCritic(nn.Module):
    """Policy pi and value V on one trunk that ends in 256 LSTM cells."""

    def __init__(self, num_actions: int):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(32 * 9 * 9, 256), nn.ReLU()]  # Mnih et al. 2013
        self.trunk = nn.Sequential(*layers)
        self.lstm = nn.LSTM(256, 256)
        self.policy = nn.Linear(256, num_actions)
        self.value = nn.Linear(256, 1)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def forward(self, s: Tensor, lstm_state: tuple[Tensor, Tensor] | None):
        """Logits [N, K, A], V [N, K] for consecutive s [N, K, 84, 84, 3]; the next LSTM state."""
        x = s.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        x = self.trunk(x).unflatten(0, s.shape[:2])
        x, lstm_state = run_lstm(self.lstm, x, lstm_state)
        return self.policy(x), self.value(x).squeeze(-1), lstm_state


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


def a3c_loss(net: MazeActorCritic, segment: Segment, args: Args) -> tuple[Tensor, dict[str, float]]:
    """Algorithm S2's sum over a segment with section 4's entropy; its parts, a step's mean each."""
    logits, v, _ = net(segment.s_tm1, segment.lstm_state)
    cut = torch.zeros_like(segment.terminated)  # only behind the last step
    R = n_step_returns(segment.r_t, segment.terminated, cut, segment.v_t, args.discount)
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


APPLES = "num_apples", "episode_steps", "action_repeat"  # flags of the task with apples
TASK = "env_id", "plain", *APPLES  # flags that set it


class Labyrinth(gym.Wrapper):
    """The paper's task in a maze of MiniWorld: green apples earn 1, the red box is a portal, 10.

    The portal sets the agent down anywhere in the same maze and brings back the apples, where they
    were. Only the time ends an episode. Its info["labyrinth"] then holds the number of "apples"
    and, in "portals", the steps that each way to the portal took.
    """

    def __init__(self, env: gym.Env, num_apples: int, episode_steps: int, action_repeat: int):
        super().__init__(env)
        self.world, self.num_apples = env.unwrapped, num_apples
        self.episode_steps, self.action_repeat = episode_steps, action_repeat

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        from miniworld.entity import Box

        self.env.reset(seed=seed, options=options)  # a new maze
        apples = (Box("green", size=0.5) for _ in range(self.num_apples))  # Ball: 0.7 ms a view
        self.apples = [self.world.place_entity(apple) for apple in apples]
        for apple in self.apples:
            apple.randomize(self.world.params, None)  # gives it its colour
        self.steps, self.set_down_at, self.found = 0, 0, {"apples": 0, "portals": []}
        self.set_agent_down()
        return self.world.render_obs(), {}

    def set_agent_down(self) -> None:
        """At a random place where it touches nothing."""
        entities, touches = self.world.entities, True
        while touches:
            entities.remove(self.world.agent)  # place_agent appends it again
            self.world.place_agent()
            touches = any(self.world.near(x) for x in (self.world.box, *self.apples))

    def move(self, action: int) -> None:
        """One frame of movement; MiniWorld's own step also draws, which takes most of its time."""
        turn, stride = (self.world.params.sample(None, f"{x}_step") for x in ("turn", "forward"))
        if action == self.world.actions.move_forward:
            self.world.move_agent(stride, 0)
        else:
            self.world.turn_agent(turn if action == self.world.actions.turn_left else -turn)

    def collect(self) -> float:
        """What the agent touches earns its reward and takes its effect."""
        touched = [apple for apple in self.apples if self.world.near(apple)]
        touched = [apple for apple in touched if apple in self.world.entities]
        for apple in touched:
            self.world.entities.remove(apple)
        self.found["apples"] += len(touched)
        if not self.world.near(self.world.box):
            return float(len(touched))

        self.found["portals"].append(self.steps - self.set_down_at)
        self.set_down_at = self.steps
        self.world.entities += [a for a in self.apples if a not in self.world.entities]
        self.set_agent_down()
        return len(touched) + 10.0

    def step(self, action):
        r_t, self.steps = 0.0, self.steps + 1
        for _ in range(self.action_repeat):
            self.move(action)
            r_t += self.collect()
            if self.set_down_at == self.steps:
                break  # the step ends in the portal
        truncated = self.steps == self.episode_steps
        info = {"labyrinth": self.found} if truncated else {}
        return self.world.render_obs(), r_t, False, truncated, info


def make_env(args: Args) -> gym.Env:
    """A maze seen in 84x84 RGB bytes. info["episode"] holds the score "r" of one that ended."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("PYGLET_HEADLESS", "true")  # draws without a screen
    os.environ.setdefault("PYGLET_DEBUG_GL", "false")  # no look for errors after every call
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa without threads: workers fill the cores
    settings = {}
    try:
        if args.env_id.startswith("Vizdoom"):
            import vizdoom.gymnasium_wrapper  # noqa: F401  it registers its scenarios

            settings = {"frame_skip": 4}
        elif ":" not in args.env_id:  # which would import the module before it
            import miniworld  # noqa: F401  it registers its mazes and looks for OpenGL

            sizes = {"obs_width": 84, "obs_height": 84, "window_width": 252, "window_height": 252}
            settings = sizes if args.env_id.startswith("MiniWorld-") else {}
        with redirect_stdout(None):  # no remarks on how smooth edges are drawn
            env = gym.make(args.env_id, **settings)
    except Exception as error:  # OpenGL's parts have many ways of being missing
        nearest = ", ".join(difflib.get_close_matches(args.env_id, gym.registry, cutoff=0.4))
        raise SystemExit(
            f"{args.env_id} cannot be made ({error}). Nearest names: {nearest or 'none'}. "
            "MiniWorld needs pip install miniworld and, to draw, EGL and Mesa (Debian: apt-get "
            "install libegl1 libgl1 libglu1-mesa libgl1-mesa-dri); VizDoom pip install vizdoom."
        ) from None

    if "screen" in getattr(env.observation_space, "spaces", ()):
        screen = env.observation_space["screen"]  # VizDoom's, 320x240
        env = TransformObservation(env, operator.itemgetter("screen"), screen)
        env = ResizeObservation(env, (84, 84))
    views, actions = env.observation_space, env.action_space
    fits = views.shape == (84, 84, 3) and views.dtype == np.uint8
    if not fits or not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        raise SystemExit(
            f"{args.env_id} shows {views} and takes {actions}; this script needs "
            "uint8 views of shape (84, 84, 3) and Discrete actions from 0."
        )
    if not args.plain:
        rooms = getattr(env.unwrapped, "num_rows", 0) * getattr(env.unwrapped, "num_cols", 0)
        if rooms == 0 or args.num_apples > rooms:
            raise SystemExit(
                f"{args.env_id} has {rooms} rooms of a maze: no place for {args.num_apples} apples "
                "and a portal. Without them: --plain."
            )
        env = Labyrinth(env, args.num_apples, args.episode_steps, args.action_repeat)
    return RecordEpisodeStatistics(env)


def as_input(s: np.ndarray) -> Tensor:
    """What an environment shows, as [N = 1, K = 1, ...]."""
    return torch.from_numpy(s)[None, None]


def play(
    env: gym.Env, seed: int, net: MazeActorCritic, t_max: int
) -> Iterator[tuple[Segment, dict | None]]:
    """Endless segments, each played with the parameters net has by then.

    Each comes with the score "r" and the steps "l" of the episode that ended with it, if one did.
    """
    s_t, lstm_state = as_input(env.reset(seed=seed)[0]), None
    while True:
        steps, first_lstm_state, last = [], lstm_state, False
        while not last:
            s_tm1 = s_t
            with torch.no_grad():
                logits, _, lstm_state = net(s_tm1, lstm_state)
                a_tm1 = sample(logits[0])  # [K]
            s_t, r_t, terminated, truncated, info = env.step(a_tm1.item())
            s_t = as_input(s_t)
            ends = torch.tensor([r_t], dtype=torch.float32), torch.tensor([terminated])
            steps.append((s_tm1[0], a_tm1, *ends))
            last = terminated or truncated or len(steps) == t_max

        s_tm1, a_tm1, r_t, terminated_t = map(torch.stack, zip(*steps))
        v_t = torch.zeros_like(r_t)
        with torch.no_grad():  # the LSTM's new state is dropped: it has yet to see s_t
            v_t[-1] = net(s_t, lstm_state)[1]
        if terminated or truncated:
            s_t, lstm_state = as_input(env.reset()[0]), None
        yield Segment(s_tm1, a_tm1, r_t, terminated_t, v_t, first_lstm_state), info.get("episode")


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


def draw_walk(env: gym.Env, s: np.ndarray, path: list[np.ndarray]) -> Image.Image:
    """The map of a maze with the path [x, y, z] walked since the agent was set down, and its view.

    An environment that has no map shows its view alone.
    """
    world = env.unwrapped
    view = cv2.resize(s, (252, 252), interpolation=cv2.INTER_NEAREST)
    if not hasattr(world, "render_top_view"):
        return Image.fromarray(view)
    if path and np.linalg.norm(world.agent.pos - path[-1]) > 1:  # it was set down elsewhere
        path.clear()
    path.append(world.agent.pos)
    walk_map, scale = world.render_top_view(world.vis_fb, return_scale=True)
    x, _, z = np.transpose(path)
    x, z = x * scale["x_scale"] + scale["x_offset"], z * scale["z_scale"] + scale["z_offset"]
    points = np.stack([x, z], 1).round().astype(np.int32)  # [steps, 2] pixels
    cv2.polylines(walk_map, [points], isClosed=False, color=(255, 0, 255), thickness=2)
    return Image.fromarray(np.hstack([walk_map, view]))


def visits(games: Sequence[dict]) -> dict[str, float]:
    """Means over episodes: apples, portals, the steps of the first and of the later ways to one.

    Ways count in episodes with two or more, each episode with the same weight. Without memory the
    first way takes as long as the later ones; who remembers the portal has short later ones.
    """
    metrics = {
        "eval/apples": float(np.mean([game["apples"] for game in games])),
        "eval/portals": float(np.mean([len(game["portals"]) for game in games])),
    }
    ways = [game["portals"] for game in games if len(game["portals"]) > 1]
    if ways:
        metrics["eval/episodes_with_ways"] = len(ways)
        metrics["eval/steps_to_first_portal"] = float(np.mean([first for first, *_ in ways]))
        metrics["eval/steps_to_later_portals"] = float(np.mean([np.mean(w[1:]) for w in ways]))
    return metrics


@torch.no_grad()
def evaluate(
    net: MazeActorCritic, args: Args, film: Path | None = None, watch: Callable = lambda: None
) -> dict[str, float]:
    """Scores of whole episodes with seeds of their own, played by sampling from pi.

    film: where to write the first episode as a GIF, the map beside the view. watch() is called at
    every step.
    """
    seeds = independent_seeds(args.eval_episodes + 1, args.seed)
    generator = torch.Generator().manual_seed(seeds.pop())
    env = make_env(args)
    games, labyrinths, path, pictures = [], [], [], []
    for seed in tqdm(seeds, unit="game", leave=False, disable=None):
        s, lstm_state, info = env.reset(seed=seed)[0], None, {}
        while "episode" not in info:
            watch()
            if film and not games and len(pictures) < 900:
                pictures.append(draw_walk(env, s, path))
            logits, _, lstm_state = net(as_input(s), lstm_state)
            logits = torch.zeros_like(logits) if args.random_walk else logits
            s, _, _, _, info = env.step(sample(logits[0], generator).item())
        games.append(info["episode"])
        labyrinths += [info["labyrinth"]] if "labyrinth" in info else []
    if film:
        write_gif(pictures, film, 67)
    env.close()
    return {
        "eval/episodic_return": float(np.mean([game["r"] for game in games])),
        "eval/episodic_return_std": float(np.std([game["r"] for game in games])),
        "eval/episodic_length": float(np.mean([game["l"] for game in games])),  # steps
        **(visits(labyrinths) if labyrinths else {}),
    }


def update(
    net: MazeActorCritic,
    optimizer: SharedRMSProp,
    segment: Segment,
    learning_rate: float,
    args: Args,
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
    shared: MazeActorCritic,
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

    env, net = make_env(args), copy.deepcopy(shared)  # theta'
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


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    if args.random_walk and not args.evaluate:
        raise SystemExit("--random-walk is for evaluations: pass --evaluate, too.")
    given = [name for name in APPLES if getattr(args, name) != getattr(Args, name)]
    if args.plain and given:
        raise SystemExit(
            "--num-apples, --episode-steps and --action-repeat are for the task with apples: "
            "leave --plain out."
        )


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
    net = MazeActorCritic(make_env(args).action_space.n).share_memory()
    optimizer = SharedRMSProp(list(net.parameters()), args.rmsprop_decay, args.rmsprop_eps)
    shared = {"net": net.state_dict(), "g": optimizer.g}  # views of what the workers change

    def evaluate_now(step: int, watch: Callable) -> dict[str, float]:
        film = run_dir / f"game_{step}.gif" if args.capture_video else None
        return evaluate(copy.deepcopy(net), args, film, watch)

    first_step, seconds = 0, 0.0
    if args.evaluate:
        path = Path(args.evaluate)
        load_checkpoint(path, args, net, "plain")  # the maze may be another
        film = path.with_name("game.gif") if args.capture_video else None
        return evaluate(net, args, film)
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, net, *TASK)
        tell_changes(checkpoint, args)
        for g, saved_g in zip(optimizer.g, checkpoint["g"], strict=True):
            g.copy_(saved_g)
        first_step, seconds = checkpoint["T"], checkpoint["seconds"]
        if first_step >= args.total_timesteps:
            raise SystemExit(f"{args.resume} is at step {first_step}: raise --total-timesteps.")

    from torch.utils.tensorboard import SummaryWriter  # not above: workers import this file, too

    run_dir = open_run_dir(args, args.env_id, "a3c_maze")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    save = partial(save_checkpoint, run_dir / "checkpoint.pt", args=asdict(args), **shared)
    spawn = mp.get_context("spawn")
    T, log = spawn.Value("q", first_step), spawn.Queue()
    arguments = args, first_step, net, optimizer, T, log
    return supervise(worker, arguments, args, T, log, writer, seconds, save, evaluate_now)


def main(args: Args) -> dict[str, float]:
    check(args)
    check_flags(args)
    try:
        return run(args)
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
