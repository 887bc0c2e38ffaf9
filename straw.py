"""Strategic attentive writer (STRAW): plans many steps ahead, and commits itself to its plan.

    Paper    Vezhnevets et al., "Strategic attentive writer for learning macro-actions", NIPS 2016
    Shows    in a maze plans change more often at corners and junctions, by a little (figure 3a);
               that macro-actions of text are frequent n-grams (figure 3c) was not reached, that
               noise in the plan makes exploration last (STRAWe) is open
    Run      python straw.py --model straw --num-workers 1 --envs-per-worker 8
               --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95
               --commitment-cost 5e-4 --total-timesteps 10000000
    Result   -0.25 points an episode in mazes of 11x11 (seed 1; optimal -0.165), goals at the end of
               walks of 52 steps, in 72 min, beside another run, on one core of an AMD EPYC; 6.6
               steps (5.3 needed), at 64 % of which the plan changes; in ten other mazes with goals
               anywhere, first steps not counted, at 67 % in turns and 58 % in corridors; paper: a
               map of one maze
    Run      python straw.py --model straw --maze-size 15 --num-workers 1 --envs-per-worker 8
               --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95
               --commitment-cost 1e-4 --commitment-bias 3 --total-timesteps 10000000
    Result   -0.27 points an episode in mazes of 15x15 (seed 1; optimal -0.167, an LSTM -0.215),
               goals as above, in 104 min, beside other runs, on one core of the same; 7.3 steps,
               100 % of the goals found; the plan changes at 96 % of the steps; paper: a curve, no
               number
    Run      python straw.py --task text --model straw --dataset tinyshakespeare --optimizer adam
               --max-extent 3 --commitment-entry 1 --commitment-cost 0.02
               --total-timesteps 12000000
    Result   3.04 bits a character of the rest of the text (seed 1; the LSTM beneath it alone 2.35),
               43 % of the steps committed, in 37 min on one core of an AMD EPYC with AVX2 alone,
               another run beside it; of the 20 macro-actions of length 3 used most, two are
               frequent n-grams; paper: a drawing
    Run      python straw.py --task atari --env-id MsPacmanNoFrameskip-v4 --total-timesteps 3000000
    Result   not yet measured

Departures: ours (the paper's)
    lambda 1e-3, alpha 1e-5, entropy cost 1e-3, learning rate 5e-4 (drawn at random, 200 runs each);
      discount 0.99, RMSProp's decay 0.99 and epsilon 0.1, gradient norm 40, value cost 0.5 (not
      told)
    the Run lines of mazes: STRAW (STRAWe), learning rate 1e-3, RMSProp's epsilon 1e-4, discount
      0.95, lambda 5e-4, in 15x15 1e-4 and b 3, 8 games of one worker, 10 million steps (200
      million); goals move away every 200,000 steps, in mazes of 11x11, too (2 million; there
      goals anywhere). That of Atari: 3 million steps of one agent (500 million, the best five of
      many). That of text: lambda 0.02 (1e-6 to 1e-2), 12 million characters (not told)
    layers of the features begin orthogonal (not told); without, learning begins later
    tanh in the planner's perceptron (not told; with ReLU plans can grow exponentially), f_c linear
      (not told)
    at first A is 0 and c 1, the patch lies over the next K steps and a plan lasts 5 at most (not
      told); the middle of the grid stays on the plan, by a sigmoid times its length, for c from
      column 1 on (DRAW: linear); an outer filter that falls beside it gathers at its border; the
      stride is exp(psi) columns (DRAW: (T - 1) / (K - 1) exp(psi)), psi_c's is not used; stride and
      width stay between 1 / T and T columns, in the Run line of text 3 (not told), and have no
      gradient while they are held there
    STRAWe's noise begins with a sigma of about exp(-2) (not told)
    lambda is paid for c_0 after the shift: of a committed step the chance that it was drawn with,
      of one that replans an entry that no gate is drawn from; in the Run line of text for c_1, the
      chance of the next gate (the index in eq. 3 is hard to read)
    the last entry of a written commitment plan is 1, so that at the end of a plan there is another,
      whatever b (not told); b starts at 0 or at --commitment-bias (not told)
    z = mu + sigma eps (whether sigma is the deviation or its square is not told)
    the map of replans leaves out first steps, which always plan (not told); their rates, over ten
      mazes, are ours; dead ends count neither as turns nor as corridors
    gates, noise and actions are drawn in evaluation, too (not told); an advantage is clipped in the
      policy's gradient, not in the value's (not told)
    processes, as many as there are cores (32 threads), each with K games (1), an update sums the
      gradients of their rollouts. With K > 1 these run on past the ends of games (end there)
    the state that a rollout ends in is valued with a gate and noise drawn for that alone; the step
      from there, in the next rollout, draws its own (not told)
    mazes: 0.05 for r, perfect mazes with a tenth of the inner walls opened, 16 filters, 128 units;
      a walk that ends where it began goes on as long again (not told); after 100 steps an episode
      is cut off, its return goes on as V (not told)
    Atari: rewards clipped to [-1, 1], an episode ends with a life, a game after 108,000 frames,
      four screens, up to 30 no-ops (not told); today's action sets, sticky actions with *-v0 and
      ALE/*-v5 ids (none)
    text: by default Python's own help, in the Run line Shakespeare (Penn Treebank), there with Adam
      at 1e-3 (gradient descent); learning rate 1, falling, gradient norm 0.5, 32 places in pieces
      of 40 characters, 256 LSTM cells (not told); mean loss (sum); macro-actions of length 3 and 4
      (4), read off the likeliest characters; the 49 most frequent characters and one for all others
      (50 symbols), nine tenths to learn, the rest to test, read at 32 places, too (not told); noise
      and baselines are ours; no GPU

Symbols: A action plan, c commitment plan, column 0 of both is the present; g_t gate, 1: replan; psi
where attention lies in time, psi_c where a commitment does; mu and sigma their centres and widths,
of the noisy channel mean and deviation; eps its noise; beta what is read, xi the planner's hidden
layer; z_t what is planned from, zeta_t features; e and b of a commitment; a_tm1 taken in s_tm1
gives r_t and s_t; R n-step return; V value; pi policy. Algorithms S1 and S2, section 4 and
RMSProp's eq. 1 are those of A3C (Mnih et al. 2016), the others this paper's.
Shapes: N steps of B sequences side by side, M of which replan; R rows of a plan (RL: one an action
and one for V), T columns, K filters. In RL, N <= t_max steps of K games; a maze has S x S cells.
As in A3C, T is also the steps that all workers have taken, g RMSProp's average and R the return.
"""

import copy
import csv
import ctypes
import difflib
import hashlib
import math
import os
import signal
import sys
import time
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from http.client import HTTPException
from itertools import chain, count, islice
from pathlib import Path
from pydoc_data import topics
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

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


@dataclass
class Args:
    # The method
    task: Literal["maze", "atari", "text"] = "maze"  # a game to play or characters to predict
    model: Literal["straw", "strawe", "lstm", "ff"] = "strawe"  # lstm, ff: the baselines
    replan: Literal["learned", "always", "random"] = "learned"  # random: commits for 0 to 4 steps
    plan_length: int = 500  # T, steps
    plan_filters: int = 10  # K, width of the patch of the plan that is read and written
    max_extent: float = 0.0  # columns, at most, of attention's stride and width; 0: plan_length
    noise_size: int = 128  # dimensions of STRAWe's noisy channel
    noise_cost: float = 1e-5  # alpha, of the noisy channel's KL
    commitment_cost: float = 1e-3  # lambda; the larger, the longer the commitments
    commitment_entry: Literal[0, 1] = 0  # of c, that lambda is paid for; 1: the next gate's chance
    commitment_bias: float = 0.0  # b at the start; the larger, the more often plans change at first
    economic: bool = True  # while committed, the feature network is skipped (games)
    maze_size: int = 11  # cells along a side, outer walls included; odd
    maze_reward: float = 0.05  # r: -r a step, -2 r against a wall, r at the goal
    curriculum_period: int = 0  # steps until goals are one step farther, from 2; 0: goals anywhere
    env_id: str = "MsPacmanNoFrameskip-v4"  # any *NoFrameskip-v4 or ALE/*-v5, or your module:Env-v0
    num_workers: int = os.cpu_count() or 1  # processes that play and learn
    envs_per_worker: int = 1  # K, games that a worker plays side by side (paper: 1)
    t_max: int = 40  # steps of a rollout, at most, and of a piece of text
    discount: float = 0.99  # gamma
    entropy_cost: float = 1e-3  # beta of eq. 4
    value_cost: float = 0.5  # factor on (R - V)^2 / 2
    lstm_size: int = 256  # text: cells of the features' LSTM
    # Optimisation
    total_timesteps: int = 500_000_000  # of all workers together (text: characters)
    batch_size: int = 32  # text: places that are read side by side
    optimizer: Literal["sgd", "adam"] = "sgd"  # of text (paper: sgd)
    learning_rate: float = 0.0  # at the start; falls to 0; 0: 5e-4, of text 1, with adam 1e-3
    rmsprop_decay: float = 0.99  # of the running squared gradient
    rmsprop_eps: float = 0.1  # inside the root
    max_gradient_norm: float = 0.0  # a longer gradient is scaled down to this; 0: 40, on text 0.5
    # The run
    dataset: Literal["pydoc", "ptb", "tinyshakespeare"] = "pydoc"  # pydoc: Python's own help texts
    text_file: str = ""  # a file to learn instead of the dataset
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    report_every: int = 50_000  # steps, at least, between two reports, each with a checkpoint
    eval_every: int = 0  # steps, at least, between two evaluations; 0: only at the end
    eval_episodes: int = 100  # whole games of an evaluation
    seed: int = 1  # of every random number; workers race, so runs of games still differ
    run_dir: str = ""  # for logs, films, checkpoint.pt; default runs/TASK_MODEL__SCRIPT__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


def time_shift(plan: Tensor) -> Tensor:
    """rho: a step has passed, column 0 is gone and a zero comes in at the far end, [..., T]."""
    return F.pad(plan, (-1, 1))


def attended_column(psi: Tensor, first: int, last: int) -> Tensor:
    """Between the first column and the last, by a sigmoid: it cannot leave the plan."""
    return first + (last - first) * psi.sigmoid()


def extent(psi: Tensor, T: int, max_extent: float) -> Tensor:
    """A stride or a width: exp(psi) columns, 1 / T to max_extent, so that nothing overflows."""
    return psi.clamp(-math.log(T), math.log(max_extent)).exp()


def attention_grid(psi: Tensor, K: int, T: int, max_extent: float) -> tuple[Tensor, Tensor]:
    """Centres mu [..., K] and width sigma [..., 1] of K Gaussians, from psi [..., 3]."""
    stride, sigma = extent(psi[..., 1:], T, max_extent).split(1, -1)
    k = torch.arange(K) - (K - 1) / 2
    return attended_column(psi[..., :1], 0, T - 1) + k * stride, sigma


def attention_filters(mu: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """Gaussians [M, K, T] over the columns t [T], with sum 1: a softmax cannot divide by 0."""
    return (-0.5 * ((t - mu[..., None]) / sigma[..., None]) ** 2).softmax(-1)


def read(A: Tensor, filters: Tensor) -> Tensor:
    """beta [M, R, K], the patch of A [M, R, T] under the filters [M, K, T]."""
    return torch.bmm(A, filters.mT)


def write(patch: Tensor, filters: Tensor) -> Tensor:
    """The patch [M, R, K] spread over a plan's time, [M, R, T]; the transpose of read."""
    return torch.bmm(patch, filters)


E = 40.0  # e, what a commitment plan is written with


def commitment_plan(psi_c: Tensor, b: Tensor, t: Tensor, max_extent: float) -> Tensor:
    """c [M, T] = sigmoid(b + write(e, psi_c)), chances of replanning (algorithm 1).

    Replanning is almost certain where a narrow Gaussian lies, b is its logit elsewhere. At the last
    column it is certain, so that no plan is the last.
    """
    T = len(t)
    mu, sigma = attended_column(psi_c[:, :1], 1, T - 1), extent(psi_c[:, 2:], T, max_extent)
    c = (b + E * attention_filters(mu, sigma, t)[:, 0]).sigmoid()
    return torch.where(t < T - 1, c, 1.0)


FIXED_COMMITMENTS = {  # the ablations of figure 6 as commitment plans
    "always": (1.0, 1.0),
    "random": (1.0, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1.0),  # 0 to 4 steps, each as likely
}


def draw_gates(c_1: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """g_t ~ Bernoulli(c_1^(t-1)): which of B plans are changed now."""
    return torch.rand(len(c_1), generator=generator) < c_1


def straight_through(c_1: Tensor) -> Tensor:
    """The 1 of an open gate g_t; its gradient goes on to c_1^(t-1) as it is."""
    return 1 + (c_1 - c_1.detach())


def kl_to_prior(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2 I) || N(0, I)) in nats, [...] from mu [..., d] and sigma [..., 1]."""
    return (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum(-1) / 2


class NoisyChannel(nn.Module):
    """z = mu(zeta) + sigma(zeta) eps, what STRAWe plans from; sigma is one number."""

    def __init__(self, num_features: int, noise_size: int):
        super().__init__()
        self.mu_and_log_sigma = nn.Linear(num_features, noise_size + 1)
        nn.init.constant_(self.mu_and_log_sigma.bias[-1:], -2)  # at first mu is not lost in noise

    def forward(self, zeta: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., d] and the KL [...] that it costs."""
        mu, log_sigma = self.mu_and_log_sigma(zeta).split((eps.shape[-1], 1), -1)
        sigma = log_sigma.exp()
        return mu + sigma * eps, kl_to_prior(mu, sigma)


class Plan(NamedTuple):
    """What STRAW remembers from step to step."""

    A: Tensor  # [B, R, T] outputs: now in column 0, in k steps in column k
    c: Tensor  # [B, T] chances of replanning, too; the next step's gate is drawn from column 1


class Output(NamedTuple):
    """What a network makes of N steps of B sequences, and what STRAW pays for it."""

    y: Tensor  # [N, B, R] column 0 of A: logits, in RL with V as the last
    state: tuple[Tensor, ...]  # after the last step
    g: Tensor  # [N, B]
    kl: Tensor  # [] summed over replanning steps
    paid: Tensor  # [] entries of c that lambda is paid for, summed over all steps


def reach(A: Tensor, mu: Tensor, sigma: Tensor) -> int:
    """How many columns are needed: after them A is empty and filters underflow (15 sigma away)."""
    used = A.any(0).any(0).nonzero()
    farthest = max(used[-1].item() if len(used) else 0, (mu[..., -1:] + 15 * sigma).max().item())
    return int(min(A.shape[-1], farthest + 3))  # counts from 0, rounds up, peaks between columns


def aim(linear: nn.Linear, column: float, first: int, last: int) -> None:
    """At first psi lies at this column, with stride and width 1, whatever the input."""
    part = (column - first) / (last - first)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([math.log(part / (1 - part)), 0, 0]))


class StrategicAttentiveWriter(nn.Module):
    """STRAW, and STRAWe when it has a noisy channel (algorithm 1)."""

    def __init__(self, num_features: int, num_rows: int, args: Args):
        super().__init__()
        self.R, self.K, self.T = num_rows, args.plan_filters, args.plan_length
        self.max_extent = args.max_extent or args.plan_length
        self.entry = args.commitment_entry
        self.noise_size, width, self.channel = 0, num_features, None
        if args.model == "strawe":
            self.noise_size = width = args.noise_size
            self.channel = NoisyChannel(num_features, args.noise_size)
        self.f_psi = nn.Linear(width, 3)
        aim(self.f_psi, max(self.K - 1, 1) / 2, 0, self.T - 1)  # columns 0 to K - 1
        layers = nn.Linear(self.R * self.K + width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
        self.h = nn.Sequential(*layers)  # bounded: a plan that reads and edits itself could explode
        self.f_A = nn.Linear(64, self.R * self.K)
        self.f_c = nn.Linear(3 + 64, 3)
        aim(self.f_c, 5, 1, self.T - 1)
        self.b = nn.Parameter(torch.tensor(float(args.commitment_bias)))
        self.fixed_c = FIXED_COMMITMENTS.get(args.replan)
        self.register_buffer("t", torch.arange(self.T).float(), persistent=False)

    def initial_plan(self, B: int) -> Plan:
        """Empty, and certain to be replaced."""
        return Plan(self.b.new_zeros(B, self.R, self.T), self.b.new_ones(B, self.T))

    def commit(self, psi: Tensor, xi: Tensor) -> Tensor:
        """c [M, T]; its gradient stays in this branch, the planner is trained by what it plans."""
        if self.fixed_c:
            c = F.pad(self.b.new_tensor(self.fixed_c), (0, self.T - len(self.fixed_c)))
            return c.expand(len(psi), -1)
        psi_c = self.f_c(torch.cat([psi, xi], 1).detach())
        return commitment_plan(psi_c, self.b, self.t, self.max_extent)

    def forward(
        self, zeta: Tensor, eps: Tensor, fresh: Tensor, plan: Plan, g: Tensor | None = None
    ) -> Output:
        """N steps of B plans, given features zeta [N, B, D] and noise eps [N, B, d].

        Where fresh [N, B] an episode begins, with an empty plan. g [N, B] is drawn if left out.
        """
        N, B = fresh.shape
        z, kl = self.channel(zeta, eps) if self.channel else (zeta, zeta.new_zeros(N, B))
        psi = self.f_psi(z)
        mu, sigma = attention_grid(psi, self.K, self.T, self.max_extent)
        # side by side, so that one call picks those that replan
        looks, sizes = torch.cat([z, psi, mu, sigma], -1), (z.shape[-1], 3, self.K, 1)
        t = self.t[: reach(plan.A, mu, sigma)]
        A, c, steps = plan.A[..., : len(t)], plan.c, []
        for n, (look, begins) in enumerate(zip(looks, fresh.any(1).tolist(), strict=True)):
            if begins:
                A = A.masked_fill(fresh[n, :, None, None], 0)
                c = c.masked_fill(fresh[n, :, None], 1)
            g_t = draw_gates(c[:, 1]) if g is None else g[n]
            replan = g_t.nonzero().squeeze(1)  # [M] places among B
            A_before, c_1, A, c = A, c[:, 1], time_shift(A), time_shift(c)
            if len(replan):
                z_t, psi_t, *grid = look.index_select(0, replan).split(sizes, 1)
                filters = attention_filters(*grid, t)
                beta = read(A_before.index_select(0, replan), filters)
                xi = self.h(torch.cat([beta.flatten(1), z_t], 1))
                gate = straight_through(c_1.index_select(0, replan))[:, None]
                patch = (gate * self.f_A(xi)).unflatten(1, (self.R, self.K))
                A.index_add_(0, replan, write(patch, filters))
                c.index_copy_(0, replan, self.commit(psi_t, xi))
            steps.append((A[..., 0], g_t, c[:, self.entry]))
        y, g, paid = map(torch.stack, zip(*steps))
        return Output(y, Plan(F.pad(A, (0, self.T - len(t))), c), g, kl[g].sum(), paid.sum())


def make_orthogonal(module: nn.Module, gain: float) -> None:
    """A module's weights become orthogonal times gain, its biases 0 (Saxe et al. 2014)."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, gain)
        else:
            nn.init.zeros_(parameter)


class ImageFeatures(nn.Sequential):
    """zeta [M, 128] of images [M, H, W, C] in bytes."""

    def __init__(self, task: Literal["maze", "atari"], shape: tuple[int, int, int]):
        H, W, C = shape
        first, second, size = nn.Conv2d(C, 16, 8, 4), nn.Conv2d(16, 32, 4, 2), 32 * 9 * 9
        if task == "maze":
            first, second = nn.Conv2d(C, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            size = 16 * H * W
        layers = first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(size, 128), nn.ReLU()
        super().__init__(*layers)
        make_orthogonal(self, 2**0.5)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255))


class Seen(NamedTuple):
    """What a policy is given at N steps of K games."""

    s: Tensor  # [N, K, H, W, C] images, bytes
    a_before: Tensor  # [N, K] the action of the step before
    fresh: Tensor  # [N, K] an episode begins
    g: Tensor  # [N, K] gates that are open
    eps: Tensor  # [N, K, d] noise of STRAWe


class StrawPolicy(nn.Module):
    """Policy and value from the present column of a plan."""

    def __init__(self, num_actions: int, shape: tuple[int, int, int], args: Args):
        super().__init__()
        self.economic = args.economic
        self.features = ImageFeatures(args.task, shape)
        self.straw = StrategicAttentiveWriter(128, num_actions + 1, args)

    def initial_state(self, K: int) -> Plan:
        return self.straw.initial_plan(K)

    def draw(
        self, plan: Plan, fresh: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Open gates [K] and noise [K, d] of the next step; a new episode always replans."""
        noise = torch.randn(len(fresh), self.straw.noise_size, generator=generator)
        return fresh | draw_gates(plan.c[:, 1], generator), noise

    def forward(self, seen: Seen, plan: Plan) -> Output:
        look = seen.g if self.economic else torch.ones_like(seen.g)  # committed steps need none
        zeta = torch.zeros(*look.shape, 128)
        if look.any():
            zeta[look] = self.features(seen.s[look])
        return self.straw(zeta, seen.eps, seen.fresh, plan, seen.g)


class BaselinePolicy(nn.Module):
    """Policy and value from the same features, through an LSTM or straight."""

    def __init__(self, num_actions: int, shape: tuple[int, int, int], args: Args):
        super().__init__()
        self.num_actions = num_actions
        self.features = ImageFeatures(args.task, shape)
        self.lstm = nn.LSTMCell(128 + num_actions, 128) if args.model == "lstm" else None
        self.head = nn.Linear(128, num_actions + 1)

    def initial_state(self, K: int) -> tuple[Tensor, ...]:
        return (torch.zeros(K, 128), torch.zeros(K, 128)) if self.lstm else ()

    def draw(self, state: tuple, fresh: Tensor, generator) -> tuple[Tensor, Tensor]:
        return torch.ones_like(fresh), torch.zeros(len(fresh), 0)

    def forward(self, seen: Seen, state: tuple[Tensor, ...]) -> Output:
        x = self.features(seen.s.flatten(0, 1)).unflatten(0, seen.fresh.shape)  # [N, K, 128]
        if self.lstm:
            a_before = F.one_hot(seen.a_before, self.num_actions) * ~seen.fresh[..., None]
            outputs = []
            for x_t, fresh in zip(torch.cat([x, a_before], -1), seen.fresh, strict=True):
                state = self.lstm(x_t, tuple(cells * ~fresh[:, None] for cells in state))
                outputs.append(state[0])
            x = torch.stack(outputs)
        return Output(self.head(x), state, seen.g, *torch.zeros(2))


SYMBOLS = 50  # of the alphabet of text


class TextModel(nn.Module):
    """Predicts characters by a plan or a softmax layer over an LSTM, which reads every character.

    With model ff the layer is over the last character alone.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.size = SYMBOLS if args.model == "ff" else args.lstm_size
        self.lstm = nn.LSTM(SYMBOLS, self.size) if args.model != "ff" else None
        plans = args.model in ("straw", "strawe")
        self.straw = StrategicAttentiveWriter(self.size, SYMBOLS, args) if plans else None
        self.head = None if plans else nn.Linear(self.size, SYMBOLS)

    def initial_state(self, B: int) -> tuple[Tensor, ...]:
        """The LSTM's cells, if any, then the plans, if any."""
        cells = (torch.zeros(1, B, self.size),) * 2 if self.lstm else ()
        return cells + (tuple(self.straw.initial_plan(B)) if self.straw else ())

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> Output:
        """Logits [N, B, 50] of the symbols that follow those of x [N, B]."""
        zeta, cells, nowhere = F.one_hot(x, SYMBOLS).float(), (), torch.zeros_like(x).bool()
        if self.lstm:
            zeta, cells = self.lstm(zeta, state[:2])
        if not self.straw:
            return Output(self.head(zeta), cells, ~nowhere, *torch.zeros(2))
        eps = torch.randn(*x.shape, self.straw.noise_size)
        out = self.straw(zeta, eps, nowhere, Plan(*state[2:]))
        return out._replace(state=(*cells, *out.state))


class Rollout(NamedTuple):
    """Up to t_max consecutive steps of K games under one copy of the parameters."""

    seen: Seen  # its s is s_tm1
    a_tm1: Tensor  # [N, K] actions
    r_t: Tensor  # [N, K] clipped rewards
    terminated: Tensor  # [N, K] the step ended the episode: nothing follows
    truncated: Tensor  # [N, K] the step ran into the time limit: more would have followed
    v_t: Tensor  # [N, K] V(s_t), known where the rollout or a truncated episode ends
    state: tuple[Tensor, ...]  # of the network before the first step


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


def plan_costs(out: Output, args: Args) -> tuple[Tensor, dict[str, float]]:
    """alpha KL of the steps that replan and lambda c_0 (or c_1) of all (eq. 3); what is logged."""
    watched = {
        "losses/kl": out.kl.item() / out.g.sum().clamp(min=1).item(),  # of a replanning step
        "losses/commitment": out.paid.item() / out.g.numel(),
        "charts/committed": 100 * (1 - out.g.float().mean().item()),  # percent of the steps
    }
    return args.noise_cost * out.kl + args.commitment_cost * out.paid, watched


def straw_loss(net: nn.Module, rollout: Rollout, args: Args) -> tuple[Tensor, dict[str, float]]:
    """A3C's loss (eq. 4) and the costs of noise and replanning; its parts, a step's mean each.

    The plans, the LSTM's cells or nothing come from the rollout before: no gradient flows there.
    """
    out = net(rollout.seen, rollout.state)
    logits, v = out.y[..., :-1], out.y[..., -1]
    _, a_tm1, r_t, terminated, truncated, v_t, _ = rollout
    R = n_step_returns(r_t, terminated, truncated, v_t, args.discount)
    pi_loss = policy_loss(logits, a_tm1, (R - v).clamp(-1, 1))
    v_loss, entropy = value_loss(R - v), policy_entropy(logits)
    costs, watched = plan_costs(out, args)
    watched |= {
        "losses/policy_loss": pi_loss.item() / R.numel(),
        "losses/value_loss": v_loss.item() / R.numel(),
        "losses/entropy": entropy.item() / R.numel(),
    }
    return pi_loss + args.value_cost * v_loss - args.entropy_cost * entropy + costs, watched


def text_loss(out: Output, y: Tensor, args: Args) -> tuple[Tensor, dict[str, float]]:
    """Negative log likelihood of y [N, B] and the costs of noise and replanning, means."""
    nll = F.cross_entropy(out.y.flatten(0, 1), y.flatten())
    costs, watched = plan_costs(out, args)
    watched["losses/bits_per_character"] = nll.item() / math.log(2)
    return nll + costs / y.numel(), watched


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


def gradients_of(loss: Tensor, net: nn.Module, max_norm: float) -> tuple[Sequence[Tensor], float]:
    """Clipped, and their norm; 0 for parameters not in the loss, as a planner's while committed."""
    theta = list(net.parameters())
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in theta], 0.0
    gradients = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
    return gradients, clip_by_norm(gradients, max_norm)


PERIODS, LONGEST = 50, 40  # of training; longer macro-actions count with those of 40 steps


def count_commitments(
    histogram: Tensor, part: float, g: Tensor, fresh: Tensor, age: Tensor
) -> Tensor:
    """Add to histogram [PERIODS, LONGEST + 1] the macro-actions that end in gates g [N, B].

    Those that an episode's end has cut, before fresh [N, B], do not count. Returns age [B], steps
    since replanning, as it is afterwards; before the first plan it is 0. Workers add without a
    lock: now and then a count is lost.
    """
    row = histogram[min(PERIODS - 1, int(PERIODS * part))]
    for g_t, begins in zip(g, fresh, strict=True):
        row += age[g_t & ~begins].clamp(max=LONGEST).bincount(minlength=LONGEST + 1)
        age = torch.where(g_t, 1, age + 1)
    return age


# ---- The data -----------------------------------------------------------------------------------


def download(url: str, path: Path, remedy: str) -> bytes:
    """What url holds; otherwise a sentence that says what is missing and what to do."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (OSError, HTTPException) as error:
        raise SystemExit(
            f"{path} is missing and {url} cannot be reached ({error}).\n{remedy}"
        ) from None


def write_whole(path: Path, content: bytes) -> None:
    """The file with all of its content, or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(content)
        path.with_suffix(".part").replace(path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error}): change --data-dir.") from None


SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_MD5 = "6fb458f1232090904fb40fe944165e91"


def read_text(args: Args) -> str:
    """The whole text; tinyshakespeare is downloaded if missing."""
    if args.dataset == "pydoc" and not args.text_file:
        return "\n".join(topics.topics[name] for name in sorted(topics.topics))
    names = {"ptb": "ptb/ptb.train.txt", "tinyshakespeare": "tinyshakespeare/input.txt"}
    path = Path(args.text_file or Path(args.data_dir, names[args.dataset]))
    if args.dataset == "tinyshakespeare" and not args.text_file and not os.path.exists(path):
        remedy = "Put it there, or use --dataset pydoc, which needs no file."
        content = download(SHAKESPEARE_URL, path, remedy)
        if hashlib.md5(content).hexdigest() != SHAKESPEARE_MD5:
            raise SystemExit(f"{SHAKESPEARE_URL} did not send the text: its checksum is wrong.")
        write_whole(path, content)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(
            f"{path} is missing or no UTF-8 text ({error}).\nA text of yours or the Penn Treebank "
            "has to be put there by hand; --dataset pydoc needs no file."
        ) from None


OTHER = "\N{REPLACEMENT CHARACTER}"  # stands for the characters that are too rare for the alphabet


def encode(text: str) -> tuple[str, Tensor, Tensor]:
    """An alphabet of 50 symbols, and in it nine tenths of the text to learn, [L], and the rest.

    It holds the most frequent characters of what is to be learned; the last stands for all others.
    """
    cut = len(text) * 9 // 10
    frequent = [character for character, _ in Counter(text[:cut]).most_common(SYMBOLS - 1)]
    numbers = {character: i for i, character in enumerate(frequent)}
    codes = torch.tensor([numbers.get(character, SYMBOLS - 1) for character in text])
    return "".join(frequent).ljust(SYMBOLS, OTHER), codes[:cut], codes[cut:]


def side_by_side(codes: Tensor, B: int) -> Tensor:
    """B equal parts of a text as columns [L // B, B]."""
    return codes[: len(codes) // B * B].view(B, -1).T


def macro_actions(written: Tensor, g: Tensor, length: int) -> Counter:
    """How often each n-gram of outputs [N, B] was all that was written between two gates g."""
    starts = g[:-length] & g[length:]  # replans here and again after length steps
    starts &= ~g.unfold(0, length, 1)[:-1, :, 1:].any(-1)  # and not in between
    ngrams = written.unfold(0, length, 1)[:-1][starts]  # [n, length]
    return Counter(map(tuple, ngrams.tolist()))


def ngrams(codes: Tensor, length: int) -> Counter:
    """How often each n-gram occurs in a text [L]."""
    return Counter(zip(*(codes[i:].tolist() for i in range(length))))


def rank_macro_actions(used: Counter, occurring: Counter, alphabet: str) -> list[tuple]:
    """The 20 most used macro-actions and how frequent they are in a text as n-grams (figure 3c).

    Rows of rank by use, string, uses, rank in the text (behind the last if none) and occurrences.
    """
    ranks = {ngram: i for i, (ngram, _) in enumerate(occurring.most_common(), 1)}
    rows = []
    for i, (ngram, uses) in enumerate(used.most_common(20), 1):
        string = "".join(alphabet[symbol] for symbol in ngram)
        rows.append((i, string, uses, ranks.get(ngram, len(ranks) + 1), occurring[ngram]))
    return rows


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's. A rank is how many values lie below less how many above; equal ones share it."""
    ranks = [np.sign(np.subtract.outer(values, values)).sum(1) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


FREQUENT = 100  # n-grams up to this rank count as frequent


def macro_action_metrics(rows: list[tuple], length: int) -> dict[str, float]:
    """How far the ranks agree, and the percentage of macro-actions that are frequent n-grams.

    Of how many different ones, too: a network that has learned nothing may write blanks alone.
    """
    if not rows:
        return {}
    _, _, uses, true_ranks, _ = zip(*rows)
    frequent = sum(rank <= FREQUENT for rank in true_ranks) / len(rows)
    metrics = {f"eval/macro_{length}_strings": float(len(rows))}
    metrics[f"eval/macro_{length}_frequent"] = 100 * frequent  # percent of these
    if len(set(uses)) > 1 and len(set(true_ranks)) > 1:
        agreement = rank_correlation(np.negative(uses), true_ranks)
        metrics[f"eval/macro_{length}_rank_correlation"] = agreement
    return metrics


# ---- The games ----------------------------------------------------------------------------------


MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # rows, columns
OPENED = 0.1  # part of the inner walls that are opened again: a maze with more than one way
MAZE_STEPS = 100  # of an episode, at most
MAZES = 10  # in which replans are counted; the first is drawn


def neighbours(walls: np.ndarray, cell: tuple[int, int]) -> list[tuple[int, int]]:
    """The cells one step away; walls [S, S] are closed all around."""
    around = [(cell[0] + down, cell[1] + right) for down, right in MOVES.values()]
    return [there for there in around if not walls[there]]


def carve(S: int, random: np.random.Generator) -> np.ndarray:
    """Walls [S, S] of a maze: a depth-first search from room to room, then some more doors."""
    walls = np.ones((S, S), bool)
    walls[1, 1], path = False, [(1, 1)]  # rooms lie at odd coordinates
    while path:
        i, j = path[-1]
        rooms = [(i + 2 * down, j + 2 * right) for down, right in MOVES.values()]
        rooms = [(k, l) for k, l in rooms if 0 < k < S and 0 < l < S and walls[k, l]]
        if not rooms:
            path.pop()
            continue
        k, l = rooms[random.integers(len(rooms))]
        walls[k, l] = walls[(i + k) // 2, (j + l) // 2] = False
        path.append((k, l))
    doors = np.zeros((S, S), bool)
    doors[1:-1:2, 2:-2:2] = doors[2:-2:2, 1:-1:2] = True
    walls[doors & (random.random((S, S)) < OPENED)] = False
    return walls


def distances(walls: np.ndarray, goal: tuple[int, int]) -> np.ndarray:
    """Steps [S, S] to the goal by breadth-first search; -1 where there is no way."""
    steps, queue = np.full(walls.shape, -1), deque([goal])
    steps[goal] = 0
    while queue:
        cell = queue.popleft()
        for there in neighbours(walls, cell):
            if steps[there] < 0:
                steps[there] = steps[cell] + 1
                queue.append(there)
    return steps


class Maze(gym.Env):
    """A maze seen from above: -r a step, -2 r against a wall, r at the goal, which ends it.

    The walls are new in each episode unless they are given; the goal is anywhere or, if walk is not
    0, the end of a random walk of that many steps. info["optimal"] is the best return possible.
    """

    action_space = gym.spaces.Discrete(len(MOVES))

    def __init__(self, S: int, r: float, walls: np.ndarray | None = None):
        self.S, self.r, self.given_walls, self.walk = S, r, walls, 0
        self.observation_space = gym.spaces.Box(0, 255, (S, S, 3), np.uint8)

    def get_action_meanings(self) -> list[str]:
        return list(MOVES)

    def image(self) -> np.ndarray:
        """[S, S, 3]: corridors are black, walls blue, the agent red, the goal green."""
        image = np.zeros((self.S, self.S, 3), np.uint8)
        image[..., 2] = 255 * self.walls
        image[self.goal][1] = image[self.agent][0] = 255
        return image

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.walls, self.t = self.given_walls, 0
        if self.walls is None:
            self.walls = carve(self.S, self.np_random)
        cells = [tuple(cell) for cell in np.argwhere(~self.walls).tolist()]
        self.agent = self.goal = cells[self.np_random.integers(len(cells))]
        while self.goal == self.agent:
            if not self.walk:
                self.goal = cells[self.np_random.integers(len(cells))]
            for _ in range(self.walk):
                around = neighbours(self.walls, self.goal)
                self.goal = around[self.np_random.integers(len(around))]
        self.optimal = self.r * (2 - int(distances(self.walls, self.goal)[self.agent]))
        return self.image(), {}

    def step(self, action: int):
        down, right = list(MOVES.values())[action]
        there, r_t = (self.agent[0] + down, self.agent[1] + right), -2 * self.r
        if not self.walls[there]:
            self.agent, r_t = there, self.r if there == self.goal else -self.r
        self.t += 1
        terminated = self.agent == self.goal
        truncated = not terminated and self.t == MAZE_STEPS
        return self.image(), r_t, terminated, truncated, {"optimal": self.optimal}


def set_curriculum(envs: Sequence[gym.Env], args: Args, step: int) -> None:
    """Goals of mazes, from now on: ends of walks of 2 steps and, each period, one more."""
    if args.task == "maze" and args.curriculum_period:
        for env in envs:
            env.unwrapped.walk = 2 + step // args.curriculum_period


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


def make_env(args: Args, training: bool = True) -> gym.Env:
    """A maze, or a game that shows its last four screens in colour, as bytes [84, 84, 12].

    Atari games get the preprocessing of DQN 2015; the screens of any other are only stacked.
    When a whole game is over, info["episode"] holds its true score "r" and its frames, of a maze
    its steps, "l".
    """
    if args.task == "maze":
        return RecordEpisodeStatistics(Maze(args.maze_size, args.maze_reward))
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    atari = {"obs_type": "ram", "frameskip": 1, "max_num_frames_per_episode": MAX_FRAMES}
    env_id = args.env_id
    try:
        is_atari = ":" not in env_id and "ale_py" in str(gym.spec(env_id).entry_point)
        env = gym.make(env_id, **atari) if is_atari else gym.make(env_id)
    except Exception as error:  # an environment may raise anything
        nearest = ", ".join(difflib.get_close_matches(env_id, gym.registry, cutoff=0.4)) or "none"
        raise SystemExit(f"No game {env_id}: {error} Nearest names: {nearest}.") from None

    env = RecordEpisodeStatistics(env)
    if is_atari:  # AtariPreprocessing fetches its screens itself: "ram" saves drawing the rest
        screen = gym.spaces.Box(0, 255, (*env.unwrapped.ale.getScreenDims(), 3), np.uint8)
        env = TransformObservation(env, lambda ram: ram, screen)
        env = AtariPreprocessing(env, noop_max=30, frame_skip=4, grayscale_obs=False)
        env = EpisodicLife(env) if training else env
    screen, actions = env.observation_space, env.action_space
    fits = screen.shape == (84, 84, 3) and screen.dtype == np.uint8
    if not fits or not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        raise SystemExit(
            f"{env_id} shows {screen} and takes {actions}; this script needs "
            "uint8 screens of shape (84, 84, 3) and Discrete actions from 0."
        )
    stack = gym.spaces.Box(0, 255, (84, 84, 12), np.uint8)
    return TransformObservation(FrameStackObservation(env, 4), cv2.merge, stack)


def decide(
    net: nn.Module, now: tuple[Tensor, ...], state: tuple, generator: torch.Generator | None = None
) -> tuple[Seen, Output]:
    """One step of K games, now s, a_before and fresh: draw the gates, look where they are open.

    Seen is of that step alone, without N; Output has N = 1.
    """
    *_, fresh = now
    seen = Seen(*now, *net.draw(state, fresh, generator))
    return seen, net(Seen(*(part[None] for part in seen)), state)


def rollouts(
    envs: Sequence[gym.Env], seeds: list[int], net: nn.Module, t_max: int
) -> Iterator[tuple[Rollout, list[dict]]]:
    """Endless rollouts of K games side by side, each with the parameters that net has by then.

    With it come the last infos of the whole games that ended in it.
    """
    K = len(envs)
    s_tm1 = torch.from_numpy(np.stack([env.reset(seed=i)[0] for env, i in zip(envs, seeds)]))
    a_tm2, fresh = torch.zeros(K).long(), torch.ones(K).bool()
    state = net.initial_state(K)
    while True:
        steps, games, first_state, last = [], [], state, False
        while not last:
            with torch.no_grad():
                seen, out = decide(net, (s_tm1, a_tm2, fresh), state)
                a_tm1, state = sample(out.y[0, :, :-1]), out.state  # [K]
            outcomes = [env.step(a) for env, a in zip(envs, a_tm1.tolist(), strict=True)]
            images, *outcomes, infos = zip(*outcomes)
            s_t = torch.from_numpy(np.stack(images))
            r_t, terminated, truncated = map(torch.tensor, outcomes)
            r_t = r_t.to(torch.float32).clamp(-1, 1)

            ended = terminated | truncated
            last = len(steps) == t_max - 1 or bool(ended.all())
            v_t = torch.zeros(K)
            if last or truncated.any():
                with torch.no_grad():  # the new state is dropped: it has yet to see s_t
                    v_t = decide(net, (s_t, a_tm1, torch.zeros_like(ended)), state)[1].y[0, :, -1]
            steps.append((*seen, a_tm1, r_t, terminated, truncated, v_t))

            s_tm1, a_tm2, fresh = s_t, a_tm1, ended  # s_t has had its value: it may be overwritten
            for k in ended.nonzero().flatten().tolist():
                s_tm1[k] = torch.from_numpy(envs[k].reset()[0])
                if "episode" in infos[k]:
                    games.append(infos[k])
        columns = [torch.stack(column) for column in zip(*steps)]
        yield Rollout(Seen(*columns[:5]), *columns[5:], first_state), games


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


@torch.no_grad()
def whole_games(
    net: nn.Module, envs: Sequence[gym.Env], seed: int, watch: Callable = lambda: None
) -> Iterator[tuple[list[int], Seen, Output, list[dict]]]:
    """One game of each of K envs to its end, gates and actions sampled.

    Yields of every step the games that are not over, what is seen and put out in these, a row each,
    and the last infos of those that it ends. watch() is called every step.
    """
    K = len(envs)
    seeds = independent_seeds(K + 1, seed)
    generator = torch.Generator().manual_seed(seeds.pop())
    s = torch.from_numpy(np.stack([env.reset(seed=i)[0] for env, i in zip(envs, seeds)]))
    a, fresh, state = torch.zeros(K).long(), torch.ones(K).bool(), net.initial_state(K)
    playing = list(range(K))
    while playing:
        watch()
        seen, out = decide(net, (s, a, fresh), state, generator)
        a = sample(out.y[0, :, :-1], generator)
        images, on, ended = [], [], []  # rows that go on
        for row, k in enumerate(playing):
            image, _, terminated, truncated, info = envs[k].step(a[row].item())
            if terminated or truncated:
                ended.append(info | {"solved": terminated})
            else:
                images.append(image)
                on.append(row)
        yield playing, seen, out, ended
        playing = [playing[row] for row in on]
        s, a, fresh = torch.from_numpy(np.array(images)), a[on], torch.zeros(len(on)).bool()
        parts = [part[on] for part in out.state]
        state = Plan(*parts) if isinstance(out.state, Plan) else tuple(parts)


def evaluate(
    net: nn.Module, args: Args, step: int, watch: Callable = lambda: None
) -> dict[str, float]:
    """True scores of whole games, in mazes as the curriculum has them at that step."""
    envs = [make_env(args, training=False) for _ in range(args.eval_episodes)]
    set_curriculum(envs, args, step)
    games, steps, replans = [], 0, 0
    with tqdm(total=len(envs), unit="game", leave=False, disable=None) as bar:
        for playing, seen, _, ended in whole_games(net, envs, args.seed, watch):
            games += ended
            bar.update(len(ended))
            steps += len(playing)
            replans += seen.g.sum().item()
    scores = [game["episode"]["r"] for game in games]
    lengths = [game["episode"]["l"] for game in games]  # frames, in mazes steps
    metrics = {
        "eval/episodic_return": float(np.mean(scores)),
        "eval/episodic_return_std": float(np.std(scores)),
        "eval/episodic_length": float(np.mean(lengths)),
        "eval/committed": 100 * (1 - replans / steps),  # percent of the steps
    }
    if args.task == "maze":
        metrics["eval/optimal_return"] = float(np.mean([game["optimal"] for game in games]))
        metrics["eval/solved"] = 100 * float(np.mean([game["solved"] for game in games]))  # percent
    return metrics


def count_replans(
    net: nn.Module, args: Args, seed: int, watch: Callable = lambda: None
) -> np.ndarray:
    """Games in one maze, which is new to the agent, from anywhere to anywhere.

    Of each cell [S, S]: is it a wall, how many steps began there, how many of them replanned? First
    steps, which always do, are left out.
    """
    walls = carve(args.maze_size, np.random.default_rng(seed))
    visits, replans = np.zeros_like(walls, int), np.zeros_like(walls, int)
    envs = [Maze(args.maze_size, args.maze_reward, walls) for _ in range(args.eval_episodes)]
    for _, seen, *_ in whole_games(net, envs, seed, watch):
        for s, g, fresh in zip(seen.s, seen.g.tolist(), seen.fresh.tolist(), strict=True):
            cell = divmod(int(s[..., 0].argmax()), args.maze_size)  # the red one
            visits[cell] += not fresh
            replans[cell] += g and not fresh
    return np.stack([walls, visits, replans])


def replan_rates(mazes: Sequence[np.ndarray]) -> dict[str, float]:
    """Percent of the steps that replan, at corners and junctions and in straight corridors.

    Mean and deviation over the mazes in which such places were visited. Dead ends, which have one
    way out, belong to neither.
    """
    rates = defaultdict(list)
    for walls, visits, replans in mazes:
        totals = {"at_turns": np.zeros(2), "in_corridors": np.zeros(2)}
        for cell in map(tuple, np.argwhere(walls == 0).tolist()):
            around = neighbours(walls, cell)
            rows, columns = ({there[axis] for there in around} for axis in (0, 1))
            if len(around) > 1:
                place = "at_turns" if len(rows) > 1 and len(columns) > 1 else "in_corridors"
                totals[place] += replans[cell], visits[cell]
        for place, (n, of) in totals.items():
            if of:
                rates[f"eval/replans_{place}"].append(100 * n / of)
    means = {tag: float(np.mean(values)) for tag, values in rates.items()}
    return means | {f"{tag}_std": float(np.std(values)) for tag, values in rates.items()}


def draw_replans(counted: np.ndarray, path: Path) -> None:
    """Figure 3a: the share of visits to a cell at which the plan was changed."""
    from matplotlib.figure import Figure  # here: workers import this file, too

    walls, visits, replans = counted
    axis = Figure(layout="constrained").subplots()
    axis.imshow(np.where(walls, 0.0, np.nan), cmap="Blues_r", vmin=0, vmax=1.5)
    share = np.where(visits, replans / np.maximum(visits, 1), np.nan)
    axis.figure.colorbar(axis.imshow(share, cmap="hot", vmin=0), label="replans per visit")
    axis.set(xlabel="column (cells)", ylabel="row (cells)", title="where the plan is changed")
    write_figure(axis.figure, path)


FILMED_STEPS, FILMED_COLUMNS = 150, 30  # of a film and of the plans in it


def film_plan(net: nn.Module, args: Args, step: int, path: Path) -> None:
    """Games as a GIF: the screen, beside it the policy that A plans for the next steps, and c."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    env, frames = make_env(args, training=False), []
    set_curriculum([env], args, step)
    names = range(env.action_space.n)
    if hasattr(env.unwrapped, "get_action_meanings"):
        names = env.unwrapped.get_action_meanings()
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["screen", "A"], ["screen", "c"]], height_ratios=(5, 1))
    axes["screen"].set(xticks=[], yticks=[])
    axes["A"].set(yticks=range(len(names)), yticklabels=names, ylabel="chance of the action, by A")
    axes["c"].set(yticks=[], ylabel="c", xlabel="steps from now")
    scale = {"vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    columns = min(FILMED_COLUMNS, args.plan_length)
    screen = axes["screen"].imshow(np.zeros(env.observation_space.shape, np.uint8)[..., -3:])
    planned = axes["A"].imshow(np.zeros((len(names), columns)), cmap="viridis", **scale)
    chances = axes["c"].imshow(np.zeros((1, columns)), cmap="hot", **scale)
    games = chain.from_iterable(whole_games(net, [env], args.seed + i) for i in count())
    for i, (_, seen, out, _) in enumerate(islice(games, FILMED_STEPS)):
        A, c = out.state
        screen.set_data(seen.s[0, ..., -3:].numpy())
        planned.set_data(A[0, :-1, :columns].softmax(0).numpy())
        chances.set_data(c[:, :columns].numpy())
        does = "replans" if seen.g[0] else "is committed"
        axes["screen"].set_title(f"step {i}: {does}, V = {out.y[0, 0, -1]:.2f}")
        canvas.draw()
        frames.append(Image.fromarray(np.array(canvas.buffer_rgba())[..., :3]))
    write_gif(frames, path, 250)


def draw_commitments(histogram: Tensor, path: Path) -> None:
    """How long macro-actions were over training, from histogram [PERIODS, LONGEST + 1].

    Up to the longest that is a percent of any period's.
    """
    from matplotlib.figure import Figure

    lengths = histogram[:, 1:].double()
    percent = 100 * lengths / lengths.sum(1, keepdim=True).clamp(min=1)  # of each period
    axis = Figure(layout="constrained").subplots()
    scale = {"origin": "lower", "aspect": "auto", "extent": (0, 100, 0.5, LONGEST + 0.5)}
    axis.figure.colorbar(axis.imshow(percent.T.numpy(), **scale), label="macro-actions (%)")
    axis.set(xlabel="training (% of --total-timesteps)", title="commitments that a new plan ended")
    longest = max((percent >= 1).any(0).nonzero().flatten().tolist(), default=0) + 1
    axis.set(ylabel=f"length (steps; {LONGEST}: or more)", ylim=(0.5, longest + 0.5))
    write_figure(axis.figure, path)


def draw_macro_actions(tables: dict[int, list[tuple]], path: Path) -> None:
    """Figure 3c: rank by use against the rank of the same n-gram in the text, by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(tables), 4.2), layout="constrained")
    for axis, (length, rows) in zip(figure.subplots(1, len(tables)), tables.items(), strict=True):
        for rank, string, _, true_rank, _ in rows:
            axis.plot(rank, true_rank, "o", color="tab:blue")
            label = string.replace(" ", "_").encode("unicode_escape").decode()
            axis.text(rank, true_rank, f" {label}", family="monospace", parse_math=False)
        axis.set(xlabel="rank by use", ylabel="rank in the text", yscale="log")
        axis.set(title=f"macro-actions of length {length} (_ is a space)")
    write_figure(figure, path)


def write_macro_actions(tables: dict[int, list[tuple]], path: Path) -> None:
    """The tables as a file; where it cannot be written, a line says so and the run goes on."""
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("length", "rank", "string", "uses", "true_rank", "occurrences"))
            writer.writerows((length, *row) for length, rows in tables.items() for row in rows)
    except OSError as error:
        tqdm.write(f"{path} cannot be written ({error}).")


def update(
    net: nn.Module, optimizer: SharedRMSProp, rollout: Rollout, learning_rate: float, args: Args
) -> dict[str, float]:
    """Move the shared parameters by the gradient that net, a copy of them, has on a rollout.

    A gradient that is not finite moves nothing; the norm returned is not finite then.
    """
    loss, watched = straw_loss(net, rollout, args)
    gradients, norm = gradients_of(loss, net, args.max_gradient_norm)
    if math.isfinite(norm):
        optimizer.step(gradients, learning_rate)
    return watched | {"losses/gradient_norm": norm, "charts/learning_rate": learning_rate}


def make_policy(args: Args) -> nn.Module:
    """The network of --model for the task's images and actions."""
    env = make_env(args)
    kind = StrawPolicy if args.model in ("straw", "strawe") else BaselinePolicy
    return kind(env.action_space.n, env.observation_space.shape, args)


def worker(
    rank: int,
    args: Args,
    first_step: int,
    shared: nn.Module,
    optimizer: SharedRMSProp,
    histogram: Tensor,
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

    envs, net = [make_env(args) for _ in seeds], make_policy(args)  # theta'
    age = torch.zeros(len(envs), dtype=torch.long)
    played = rollouts(envs, seeds, net, args.t_max)
    while T.value < args.total_timesteps and main_process.is_alive():
        set_curriculum(envs, args, T.value)
        copy_parameters(shared, net)
        rollout, games = next(played)
        with T.get_lock():
            step = T.value = T.value + rollout.r_t.numel()
        learning_rate = args.learning_rate * max(0.0, 1 - step / args.total_timesteps)
        watched = update(net, optimizer, rollout, learning_rate, args)
        g, fresh = rollout.seen.g, rollout.seen.fresh
        age = count_commitments(histogram, step / args.total_timesteps, g, fresh, age)

        for info in games:  # "l" in frames, in mazes steps
            log.put(("charts/episodic_return", float(info["episode"]["r"]), step))
            log.put(("charts/episodic_length", float(info["episode"]["l"]), step))
            if "optimal" in info:
                log.put(("charts/optimal_return", float(info["optimal"]), step))
        log.put(("charts/committed", watched.pop("charts/committed"), step))
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


OF_PLANS = "replan", "plan_length", "plan_filters", "max_extent", "economic"
OF_COMMITMENTS = "commitment_cost", "commitment_entry", "commitment_bias"
OF_GAMES = "num_workers", "envs_per_worker", "discount", "entropy_cost", "value_cost"
OF_GAMES += "rmsprop_decay", "rmsprop_eps", "economic", "eval_episodes"
OF_TEXT = "dataset", "text_file", "data_dir", "lstm_size", "batch_size", "optimizer"


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    if args.maze_size % 2 == 0 or args.maze_size < 5:
        raise SystemExit(f"--maze-size must be odd and at least 5, not {args.maze_size}.")
    if args.plan_length < max(8, args.plan_filters):
        raise SystemExit(
            f"--plan-length must be at least 8 and at least --plan-filters, not {args.plan_length}."
        )
    if 0 < args.max_extent < 1:
        raise SystemExit(f"--max-extent must be 0 or at least 1, not {args.max_extent}.")
    if args.maze_reward > 0.5:
        raise SystemExit(
            f"--maze-reward must be at most 0.5, where clipping begins, not {args.maze_reward}."
        )
    if args.curriculum_period and args.total_timesteps > 10_000 * args.curriculum_period:
        raise SystemExit("--curriculum-period is too short: walks would be 10,000 steps and more.")
    plans, text = args.model in ("straw", "strawe"), args.task == "text"
    model, task = f"with --model {args.model}", f"with --task {args.task}"
    for holds, where, names in (  # if it holds, the flags of these names have no effect
        (not plans, model, OF_PLANS + OF_COMMITMENTS),
        (args.replan != "learned", f"with --replan {args.replan}", OF_COMMITMENTS),
        (args.model != "strawe", model, ("noise_size", "noise_cost")),
        (args.task != "maze", task, ("maze_size", "maze_reward", "curriculum_period")),
        (args.task != "atari", task, ("env_id",)),
        (text, task, OF_GAMES),
        (not text, task, OF_TEXT),
        (args.model == "ff", model, ("lstm_size",)),
        (args.text_file, "beside --text-file", ("dataset", "data_dir")),
    ):
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        if holds and given:
            raise SystemExit(f"--{given[0].replace('_', '-')} has no effect {where}: leave it out.")
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


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


SHAPING = ("task", "model", "replan", "plan_length", "plan_filters", "max_extent", "noise_size")


def begin(
    args: Args, net: nn.Module, histogram: Tensor, shaping: Sequence[str], text: str = ""
) -> tuple:
    """What a run goes on from: its checkpoint, put into net and histogram, its folder and log.

    It must have had the flags named in shaping and the text with this fingerprint.
    """
    from torch.utils.tensorboard import SummaryWriter  # not above: workers import this file, too

    start, path = {"T": 0, "seconds": 0.0}, Path(args.resume or args.evaluate)
    if args.resume or args.evaluate:
        start = load_checkpoint(path, args, net, *SHAPING, *shaping)
        if text and start["text"] != text:
            raise SystemExit(f"{path} was made with another text.")
        total = start["args"]["total_timesteps"]
        part = total / args.total_timesteps if args.resume else 1  # of this run, a whole one then
        periods = (part * torch.arange(PERIODS)).long().clamp(max=PERIODS - 1)  # where theirs lie
        histogram.zero_().index_add_(0, periods, start["histogram"])
    if args.evaluate:
        return start, path.parent, None
    if args.resume:
        tell_changes(start, args)
    if start["T"] >= args.total_timesteps:
        raise SystemExit(f"{path} is at step {start['T']}: raise --total-timesteps.")
    what = args.env_id if args.task == "atari" else args.task
    run_dir = open_run_dir(args, f"{what}_{args.model}", "straw")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    return start, run_dir, writer


def run_games(args: Args) -> dict[str, float]:
    """A3C on mazes or Atari."""
    net = make_policy(args).share_memory()
    optimizer = SharedRMSProp(list(net.parameters()), args.rmsprop_decay, args.rmsprop_eps)
    histogram = torch.zeros(PERIODS, LONGEST + 1, dtype=torch.long).share_memory_()
    maze = ("maze_size", "maze_reward", "curriculum_period")
    shaping = ("env_id",) if args.task == "atari" else maze
    start, run_dir, writer = begin(args, net, histogram, shaping)

    def evaluate_now(step: int, watch: Callable = lambda: None) -> dict[str, float]:
        agent = copy.deepcopy(net)  # the workers go on
        metrics = evaluate(agent, args, step, watch)
        if isinstance(agent, StrawPolicy):
            draw_commitments(histogram, run_dir / "commitments.png")
            film_plan(agent, args, step, run_dir / "plan.gif")
            if args.task == "maze":
                seeds = range(args.seed, args.seed + MAZES)
                mazes = [count_replans(agent, args, seed, watch) for seed in seeds]
                draw_replans(mazes[0], run_dir / "replans.png")
                metrics |= replan_rates(mazes)
        return metrics

    if args.evaluate:
        return evaluate_now(start["T"])
    for g, saved_g in zip(optimizer.g, start.get("g", optimizer.g), strict=True):
        g.copy_(saved_g)
    shared = {"net": net.state_dict(), "g": optimizer.g, "histogram": histogram}  # views
    save = partial(save_checkpoint, run_dir / "checkpoint.pt", args=asdict(args), **shared)
    spawn = mp.get_context("spawn")
    T, log = spawn.Value("q", start["T"]), spawn.Queue()
    arguments = args, start["T"], net, optimizer, histogram, T, log
    return supervise(worker, arguments, args, T, log, writer, start["seconds"], save, evaluate_now)


def stopped(run_dir: str | Path, finished: bool = False) -> SystemExit:
    """What Ctrl-C ends with, finished: when nothing is left but the last evaluation."""
    path = Path(run_dir, "checkpoint.pt")
    if not path.exists():
        return SystemExit("Stopped before the first checkpoint.")
    way = "evaluate with --evaluate" if finished else "go on with the same flags and --resume"
    return SystemExit(f"Stopped; {way} {path}")


@torch.no_grad()
def evaluate_text(
    net: TextModel, args: Args, text: tuple[str, Tensor, Tensor], histogram: Tensor, folder: Path
) -> dict[str, float]:
    """Bits per character of the test text, and the macro-actions with which it was written.

    The global random state is left as it was.
    """
    alphabet, train, test = text
    columns, state = side_by_side(test, args.batch_size), net.initial_state(args.batch_size)
    pieces = list(zip(columns[:-1].split(args.t_max), columns[1:].split(args.t_max), strict=True))
    nll, written, gates = 0.0, [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        for x, y in tqdm(pieces, unit="piece", leave=False, disable=None):
            out = net(x, state)
            state = out.state
            nll += F.cross_entropy(out.y.flatten(0, 1), y.flatten(), reduction="sum").item()
            written.append(out.y.argmax(-1))
            gates.append(out.g)
    g, written = torch.cat(gates), torch.cat(written)
    metrics = {
        "eval/bits_per_character": nll / math.log(2) / g.numel(),
        "eval/committed": 100 * (1 - g.float().mean().item()),  # percent of the steps
    }
    if not net.straw:
        return metrics
    draw_commitments(histogram, folder / "commitments.png")
    tables = {}
    for length in (3, 4):
        used = macro_actions(written, g, length)
        tables[length] = rank_macro_actions(used, ngrams(train, length), alphabet)
        metrics |= macro_action_metrics(tables[length], length)
    draw_macro_actions(tables, folder / "macro_actions.png")
    write_macro_actions(tables, folder / "macro_actions.csv")
    return metrics


def make_optimizer(net: TextModel, args: Args) -> torch.optim.Optimizer:
    """That of text."""
    if args.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), args.learning_rate, fused=True)
    return torch.optim.SGD(net.parameters(), args.learning_rate)


def update_text(
    net: TextModel, optimizer, x: Tensor, y: Tensor, state: tuple, learning_rate: float, args: Args
) -> tuple[Output, dict[str, float]]:
    """A step of the optimizer on a piece of text x [N, B], followed by y."""
    out = net(x, state)
    loss, watched = text_loss(out, y, args)
    gradients, norm = gradients_of(loss, net, args.max_gradient_norm)
    for theta, gradient in zip(net.parameters(), gradients, strict=True):
        theta.grad = gradient
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    return out, watched | {"losses/gradient_norm": norm, "charts/learning_rate": learning_rate}


def run_text(args: Args) -> dict[str, float]:
    """Prediction of the next character, which is a step; states go on from piece to piece.

    B places of the text are read side by side, each up to where the next began, then again.
    """
    text, B, N = read_text(args), args.batch_size, args.t_max
    if len(text) < max(50 * B, 2 * N * B):
        raise SystemExit(f"{len(text)} characters are too few for --batch-size {B}, --t-max {N}.")
    fingerprint, text = hashlib.md5(text.encode()).hexdigest(), encode(text)
    columns = side_by_side(text[1], B)
    net, histogram = TextModel(args), torch.zeros(PERIODS, LONGEST + 1, dtype=torch.long)
    shaping = ["lstm_size", "batch_size", "t_max"] + ["optimizer"] * bool(args.resume)
    start, run_dir, writer = begin(args, net, histogram, shaping, fingerprint)
    if args.evaluate:
        return evaluate_text(net, args, text, histogram, run_dir)
    optimizer = make_optimizer(net, args)
    state, age = net.initial_state(B), torch.zeros(B, dtype=torch.long)
    if args.resume:
        optimizer.load_state_dict(start["optimizer"])
        torch.set_rng_state(start["rng"])
        state, age = start["state"], start["age"]
    step, seconds = start["T"], start["seconds"]

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    last_step, last_time, log, recent = step, time.perf_counter(), SimpleQueue(), defaultdict(list)
    finished = False
    bar = tqdm(total=args.total_timesteps, initial=step, unit="character", disable=None)
    try:
        while step < args.total_timesteps:
            place = step // B % ((len(columns) - 1) // N * N)
            if not place:  # the text begins again
                state = net.initial_state(B)
            x, y = columns[place : place + N], columns[place + 1 : place + 1 + N]
            learning_rate = args.learning_rate * (1 - step / args.total_timesteps)
            out, watched = update_text(net, optimizer, x, y, state, learning_rate, args)
            step += N * B
            for tag, value in watched.items():
                log.put((tag, value, step))
            drain(log, recent)
            state = tuple(part.detach() for part in out.state)
            fresh = torch.zeros_like(out.g)
            fresh[0] = not place
            age = count_commitments(histogram, step / args.total_timesteps, out.g, fresh, age)
            bar.update(N * B)
            finished = step >= args.total_timesteps
            if not finished and step < last_step + args.report_every:
                continue

            now = time.perf_counter()
            seconds += now - last_time
            metrics = {tag: float(np.mean(values)) for tag, values in recent.items()}
            metrics["charts/SPS"] = (step - last_step) / (now - last_time)
            metrics["charts/minutes"] = seconds / 60  # of training alone
            progress = {"T": step, "seconds": seconds, "state": state, "age": age}
            progress |= {"text": fingerprint, "optimizer": optimizer.state_dict()}
            progress |= {"rng": torch.get_rng_state(), "histogram": histogram, "args": asdict(args)}
            save_checkpoint(run_dir / "checkpoint.pt", net=net.state_dict(), **progress)
            report(writer, step, metrics)
            every = args.eval_every or math.inf
            if finished or step // every > last_step // every:
                evaluated = evaluate_text(net, args, text, histogram, run_dir)
                report(writer, step, evaluated)
                metrics |= evaluated
            recent, last_step, last_time = defaultdict(list), step, time.perf_counter()
    except KeyboardInterrupt:  # perhaps amid an update: the last checkpoint has to do
        raise stopped(run_dir, finished) from None
    finally:
        bar.close()
        writer.close()
    return metrics


def with_defaults(args: Args) -> Args:
    """The task's own rate and norm, where flags do not give them."""
    rate, norm = 5e-4, 40.0
    if args.task == "text":
        rate, norm = 1e-3 if args.optimizer == "adam" else 1.0, 0.5
    rate, norm = args.learning_rate or rate, args.max_gradient_norm or norm
    return replace(args, learning_rate=rate, max_gradient_norm=norm)


def run(args: Args) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.set_num_threads(1)  # the cores are the workers'; text, too, is learned with one thread
    keep_memory()
    torch.manual_seed(args.seed)
    args = with_defaults(args)
    return run_text(args) if args.task == "text" else run_games(args)


def main(args: Args) -> dict[str, float]:
    check(args)
    check_flags(args)
    try:
        return run(args)
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
