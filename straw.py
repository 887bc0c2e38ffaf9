"""Strategic attentive writer (STRAW): plans many steps ahead, and commits itself to its plan.

    Paper    Vezhnevets et al., "Strategic attentive writer for learning macro-actions", NIPS 2016
    Shows    in a maze it replans at corners and junctions (figure 3a); macro-actions of text are
             frequent n-grams (figure 3c); noise in the plan makes exploration last (STRAWe)
    Run      python straw.py --envs-per-worker 4 --learning-rate 1e-3 --rmsprop-eps 1e-3
               --discount 0.95 --total-timesteps 10000000
    Result   not yet measured
    Run      python straw.py --maze-size 15 --curriculum-period 250000 --envs-per-worker 4
               --learning-rate 1e-3 --rmsprop-eps 1e-3 --discount 0.95 --total-timesteps 10000000
    Result   not yet measured
    Run      python straw.py --task text --model straw --dataset tinyshakespeare
               --total-timesteps 30000000
    Result   not yet measured
    Run      python straw.py --task atari --env-id MsPacmanNoFrameskip-v4 --total-timesteps 3000000
    Result   not yet measured

Departures: ours (the paper's)
    lambda 1e-3, alpha 1e-5, entropy cost 1e-3, learning rate 5e-4 (drawn at random, 200 runs each)
    text: learning rate 1, falling, gradient norm 0.5, 32 places in pieces of 40 characters, mean
      loss (not told; eq. 3 sums); lengths 3 and 4 (4); noise and baselines there are ours (none)
    tanh in the planner's perceptron (not told; with ReLU plans can grow exponentially)
    at first the patch lies over the next K steps and a plan lasts 5 at most (not told); the grid's
      position is a sigmoid's part of the plan, so it cannot leave it (DRAW: linear)
    the last entry of a written commitment plan is 1, so that at the end of a plan there is another,
      whatever b (not told); b starts at 0 (not told); z = mu + sigma eps (sigma or its square)
    the gate is sampled in evaluation, too (not told); an advantage is clipped in the policy's
      gradient, not in the value's (not told); discount 0.99, RMSProp's constants, gradient norm 40
      and the value's cost 0.5 are those of a3c_atari.py (not told)
    mazes: 0.05 for r, perfect mazes with a tenth of the inner walls opened, 16 filters, 128 units
      (not told); the limit of 100 steps cuts the return and bootstraps (not told)
    Atari: rewards clipped to [-1, 1], an episode ends with a life, four screens (not told)
    text: 256 LSTM cells, 49 most frequent characters and one for all others (50 symbols of Penn
      Treebank), the first nine tenths to learn, the rest to test; macro-actions are read off the
      likeliest characters (not told)
    processes, as many as there are cores (32 threads), each with K games (1), an update sums the
      gradients of their trajectories; no GPU

Symbols: A action plan, c commitment plan, column 0 of both is the present; g_t gate, 1: replan; psi
where attention lies in time; beta what is read, xi the planner's hidden layer; z_t what is planned
from, zeta_t features; e and b of a commitment; s, a, r, V, R as in a3c_atari.py.
Shapes: B sequences side by side, M of them replan; R rows of a plan (RL: one an action and one for
V), T columns, K filters. In RL, N <= t_max steps of K games.
"""

import copy
import csv
import difflib
import hashlib
import math
import os
import signal
import time
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pydoc_data import topics
from typing import Literal, NamedTuple

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
    noise_size: int = 128  # dimensions of STRAWe's noisy channel
    noise_cost: float = 1e-5  # alpha, of the noisy channel's KL
    commitment_cost: float = 1e-3  # lambda, of c_0; the larger, the longer the commitments
    maze_size: int = 11  # cells along a side, outer walls included; odd
    maze_reward: float = 0.05  # r: -r a step, -2 r against a wall, r at the goal
    curriculum_period: int = 0  # steps until goals are one step farther, from 2; 0: goals anywhere
    env_id: str = "MsPacmanNoFrameskip-v4"  # any *NoFrameskip-v4 or ALE/*-v5, or your module:Env-v0
    num_workers: int = os.cpu_count() or 1  # processes that play and learn (paper: 16)
    envs_per_worker: int = 1  # K, games that a worker plays side by side (paper: 1)
    t_max: int = 40  # steps of a trajectory, at most, and of a piece of text
    discount: float = 0.99  # gamma
    entropy_cost: float = 1e-3  # beta
    value_cost: float = 0.5  # factor on (R - V)^2 / 2
    lstm_size: int = 256  # text: cells of the features' LSTM
    # Optimisation
    total_timesteps: int = 500_000_000  # of all workers together (text: characters)
    learning_rate: float = 0.0  # at the start; falls linearly to 0; 0: 5e-4, on text 1
    rmsprop_decay: float = 0.99  # of the running squared gradient g
    rmsprop_eps: float = 0.1  # inside the root
    max_gradient_norm: float = 0.0  # a longer gradient is scaled down to this; 0: 40, on text 0.5
    batch_size: int = 32  # text: places that are read side by side
    # The run
    dataset: Literal["pydoc", "ptb", "tinyshakespeare"] = "pydoc"  # pydoc: Python's own help texts
    text_file: str = ""  # a file to learn instead of the dataset
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    economic: bool = True  # while committed, the feature network is skipped (games)
    report_every: int = 50_000  # steps between two reports, each with a checkpoint
    eval_every: int = 0  # steps between two evaluations during training; 0: only at the end
    eval_episodes: int = 100  # whole games of an evaluation
    seed: int = 1  # of every random number; workers race, so runs of games still differ
    run_dir: str = ""  # for logs, films, checkpoint.pt; default runs/TASK_MODEL__SCRIPT__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


def time_shift(plan: Tensor) -> Tensor:
    """rho: a step has passed, column 0 is gone and a zero comes in at the far end, [..., T]."""
    return F.pad(plan[..., 1:], (0, 1))


def attention_filters(psi: Tensor, num_filters: int, T: int, first: int = 0) -> Tensor:
    """A grid of Gaussians over time [M, K, T] from psi [M, 3]: position, stride and width.

    The position lies between columns first and T - 1. Each row sums to 1: a softmax over t of the
    exponents is a normalised Gaussian that cannot divide by 0.
    """
    position = first + (T - 1 - first) * psi[:, :1].sigmoid()  # [M, 1]
    stride, sigma = psi[:, 1:].exp().split(1, 1)
    k = torch.arange(num_filters, device=psi.device) - (num_filters - 1) / 2
    mu = position + k * stride  # [M, K]
    t = torch.arange(T, device=psi.device)
    return (-((t - mu[..., None]) ** 2) / (2 * sigma[..., None] ** 2)).softmax(-1)


def read(A: Tensor, filters: Tensor) -> Tensor:
    """beta [M, R, K], the patch of A [M, R, T] under the filters [M, K, T]."""
    return A @ filters.mT


def write(patch: Tensor, filters: Tensor) -> Tensor:
    """The patch [M, R, K] spread over a plan's time, [M, R, T]; the transpose of read."""
    return patch @ filters


E = 40.0  # e, what a commitment plan is written with


def commitment_plan(psi_c: Tensor, b: Tensor, T: int) -> Tensor:
    """c [M, T] = sigmoid(b + write(e, psi_c)), chances of replanning (algorithm 1).

    One Gaussian makes it almost certain where it lies, b is the chance before that. At the last
    column it is certain, so that no plan is the last.
    """
    attended = write(psi_c.new_full((len(psi_c), 1, 1), E), attention_filters(psi_c, 1, T, first=1))
    c = (b + attended[:, 0]).sigmoid()
    return F.pad(c[:, :-1], (0, 1), value=1.0)


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
    """KL(N(mu, sigma^2 I) || N(0, I)) in nats, [M] from mu [M, d] and sigma [M, 1]."""
    return (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum(1) / 2


class NoisyChannel(nn.Module):
    """z = mu(zeta) + sigma(zeta) eps, what STRAWe plans from; sigma is one number."""

    def __init__(self, num_features: int, noise_size: int):
        super().__init__()
        self.mu, self.log_sigma = nn.Linear(num_features, noise_size), nn.Linear(num_features, 1)

    def forward(self, zeta: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z [M, d] and the KL [M] that it costs."""
        mu, sigma = self.mu(zeta), self.log_sigma(zeta).exp()
        return mu + sigma * eps, kl_to_prior(mu, sigma)


class Plan(NamedTuple):
    """What STRAW remembers from step to step."""

    A: Tensor  # [B, R, T] outputs: now in column 0, in k steps in column k
    c: Tensor  # [B, T] chances of replanning, one step late: entry 1 of the last step is for now


def new_plans(plan: Plan, fresh: Tensor) -> Plan:
    """Where fresh [B], an empty plan that is certain to be replaced."""
    if not fresh.any():
        return plan
    return Plan(plan.A.masked_fill(fresh[:, None, None], 0), plan.c.masked_fill(fresh[:, None], 1))


class Attention(NamedTuple):
    """What M replanning steps look at their plans with."""

    z: Tensor  # [M, D]
    psi: Tensor  # [M, 3]
    filters: Tensor  # [M, K, T]


def aim(linear: nn.Linear, column: float, T: int, first: int = 0) -> None:
    """psi lies at this column, with stride and width 1, whatever the input: where it starts."""
    nn.init.zeros_(linear.weight)
    part = (column - first) / (T - 1 - first)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([math.log(part / (1 - part)), 0, 0]))


class StrategicAttentiveWriter(nn.Module):
    """STRAW, and STRAWe when it has a noisy channel: one step of B plans (algorithm 1)."""

    def __init__(self, num_features: int, num_rows: int, args: Args):
        super().__init__()
        self.R, self.K, self.T = num_rows, args.plan_filters, args.plan_length
        self.noise_size, width, self.channel = 0, num_features, None
        if args.model == "strawe":
            self.noise_size = width = args.noise_size
            self.channel = NoisyChannel(num_features, args.noise_size)
        self.f_psi = nn.Linear(width, 3)
        self.h = nn.Sequential(  # bounded: a plan that reads and edits itself could explode
            *(nn.Linear(self.R * self.K + width, 64), nn.Tanh()),
            *(nn.Linear(64, 64), nn.Tanh()),
        )
        self.f_A = nn.Linear(64, self.R * self.K)
        self.f_c = nn.Linear(3 + 64, 3)
        self.b = nn.Parameter(torch.zeros(()))
        aim(self.f_psi, max(self.K - 1, 1) / 2, self.T)  # the patch: columns 0 to K - 1
        aim(self.f_c, 5, self.T, first=1)
        fixed = torch.tensor(FIXED_COMMITMENTS.get(args.replan, ()))
        self.register_buffer("fixed_c", fixed, persistent=False)

    def initial_plan(self, B: int) -> Plan:
        A = self.b.new_zeros(B, self.R, self.T)
        return new_plans(Plan(A, A[:, 0]), torch.ones(B, dtype=torch.bool))

    def attend(self, zeta: Tensor, eps: Tensor) -> tuple[Attention, Tensor]:
        """Where plans are read and written, given features zeta [M, D] and noise eps [M, d].

        Nothing of this depends on the plans: it may be asked for many steps at once. Also the KL of
        the noise, a sum.
        """
        z, kl = self.channel(zeta, eps) if self.channel else (zeta, zeta.new_zeros(0))
        psi = self.f_psi(z)
        return Attention(z, psi, attention_filters(psi, self.K, self.T)), kl.sum()

    def commit(self, psi: Tensor, xi: Tensor) -> Tensor:
        """c [M, T]; its gradient stays in this branch, the planner is trained by what it plans."""
        if len(self.fixed_c):
            return F.pad(self.fixed_c, (0, self.T - len(self.fixed_c))).expand(len(psi), -1)
        psi_c = self.f_c(torch.cat([psi, xi], 1).detach())
        return commitment_plan(psi_c, self.b, self.T)

    def forward(self, attention: Attention, plan: Plan, g: Tensor) -> Plan:
        """The plans a step later; attention is that of the M plans whose gate g [B] is open."""
        A, c = time_shift(plan.A), time_shift(plan.c)
        z, psi, filters = attention
        if len(z):
            replanning = g.nonzero().squeeze(1)
            beta = read(plan.A[replanning], filters)  # before the shift
            xi = self.h(torch.cat([beta.flatten(1), z], 1))
            patch = self.f_A(xi).unflatten(1, (self.R, self.K))
            gate = straight_through(plan.c[replanning, 1])
            A.index_add_(0, replanning, gate[:, None, None] * write(patch, filters))
            c.index_copy_(0, replanning, self.commit(psi, xi))
        return Plan(A, c)


class ImageFeatures(nn.Sequential):
    """zeta [M, 128] of images [M, H, W, C] in bytes."""

    def __init__(self, task: Literal["maze", "atari"], shape: tuple[int, int, int]):
        H, W, C = shape
        if task == "maze":
            layers = [nn.Conv2d(C, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
            size = 16 * H * W
        else:  # Mnih et al. 2013, in colour
            layers = [nn.Conv2d(C, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2)]
            size = 32 * 9 * 9
        super().__init__(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(size, 128), nn.ReLU())
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


class Output(NamedTuple):
    """What a policy makes of N steps of B sequences, and what STRAW pays for it."""

    y: Tensor  # [N, B, R] column 0 of A: logits, in RL with V as the last
    state: tuple[Tensor, ...]  # after the last step
    g: Tensor  # [N, B]
    kl: Tensor  # [] summed over replanning steps
    c_0: Tensor  # [] summed over all steps


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
        """Open gates [K] and noise [K, d] of the next step; an episode begins with a plan."""
        noise = torch.randn(len(fresh), self.straw.noise_size, generator=generator)
        return fresh | draw_gates(plan.c[:, 1], generator), noise

    def forward(self, seen: Seen, plan: Plan) -> Output:
        if self.economic:  # what is committed does not look
            zeta = self.features(seen.s[seen.g])  # [M, 128], M replanning steps of all N
        else:
            zeta = self.features(seen.s.flatten(0, 1))[seen.g.flatten()]
        attention, kl = self.straw.attend(zeta, seen.eps[seen.g])
        split = partial(torch.split, split_size_or_sections=seen.g.sum(1).tolist())
        plans = []
        for g, fresh, *attention_t in zip(seen.g, seen.fresh, *map(split, attention), strict=True):
            plan = self.straw(Attention(*attention_t), new_plans(plan, fresh), g)
            plans.append((plan.A[..., 0], plan.c[:, 0]))
        y, c_0 = map(torch.stack, zip(*plans))
        return Output(y, plan, seen.g, kl, c_0.sum())


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
        return Output(self.head(x), state, seen.g, torch.zeros(()), torch.zeros(()))


class Rollout(NamedTuple):
    """Up to t_max consecutive steps of K games under one copy of the parameters."""

    seen: Seen  # its s is s_tm1
    a_tm1: Tensor  # [N, K] actions
    r_t: Tensor  # [N, K] clipped rewards
    terminated: Tensor  # [N, K] the step ended the episode: nothing follows
    truncated: Tensor  # [N, K] the step ran into the time limit: more would have followed
    v_t: Tensor  # [N, K] V(s_t), known where the trajectory or a truncated episode ends
    state: tuple[Tensor, ...]  # of the network before the first step


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Actions [K] from pi = softmax(logits [K, A]), drawn as torch.multinomial does, but faster."""
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


def straw_loss(net: nn.Module, trajectory: Rollout, args: Args) -> tuple[Tensor, dict[str, float]]:
    """A3C's loss and the costs of noise and replanning (eq. 3, 4); its parts, a step's mean each.

    The plans, the LSTM's cells or nothing come from the trajectory before: no gradient flows there.
    """
    out = net(trajectory.seen, trajectory.state)
    logits, v = out.y[..., :-1], out.y[..., -1]
    R = n_step_returns(
        trajectory.r_t,
        trajectory.terminated,
        trajectory.truncated,
        trajectory.v_t,
        args.discount,
    )
    pi_loss = policy_loss(logits, trajectory.a_tm1, (R - v).clamp(-1, 1))
    v_loss = value_loss(R - v)
    entropy = policy_entropy(logits)
    loss = pi_loss + args.value_cost * v_loss - args.entropy_cost * entropy
    loss = loss + args.noise_cost * out.kl + args.commitment_cost * out.c_0
    watched = {
        "losses/policy_loss": pi_loss.item() / R.numel(),
        "losses/value_loss": v_loss.item() / R.numel(),
        "losses/entropy": entropy.item() / R.numel(),
        "losses/kl": out.kl.item() / out.g.sum().clamp(min=1).item(),  # of a replanning step
        "losses/c_0": out.c_0.item() / R.numel(),
        "charts/committed": 100 * (1 - out.g.float().mean().item()),  # percent of the steps
    }
    return loss, watched


SYMBOLS = 50  # of the alphabet of text


class TextModel(nn.Module):
    """Predicts characters: features over one-hot symbols, and on top a plan or a softmax layer.

    Features are an LSTM's, which reads every character; with model ff they know only the last one.
    """

    def __init__(self, args: Args):
        super().__init__()
        size = args.lstm_size
        self.lstm = nn.LSTM(SYMBOLS, size) if args.model != "ff" else None
        self.last = nn.Sequential(nn.Linear(SYMBOLS, size), nn.ReLU()) if not self.lstm else None
        plans = args.model in ("straw", "strawe")
        self.straw = StrategicAttentiveWriter(size, SYMBOLS, args) if plans else None
        self.head = None if plans else nn.Linear(size, SYMBOLS)
        self.size = size

    def initial_state(self, B: int) -> tuple[Tensor, ...]:
        """The LSTM's cells, if any, then the plans, if any."""
        cells = (torch.zeros(1, B, self.size),) * 2 if self.lstm else ()
        return cells + (tuple(self.straw.initial_plan(B)) if self.straw else ())

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> Output:
        """Logits [N, B, 50] of the symbols that follow those of x [N, B]."""
        one_hot = F.one_hot(x, SYMBOLS).float()
        if self.lstm:
            zeta, cells = self.lstm(one_hot, state[:2])
        else:
            zeta, cells = self.last(one_hot), ()
        if not self.straw:
            zero = torch.zeros(())
            return Output(self.head(zeta), cells, torch.ones_like(x).bool(), zero, zero)
        plan, steps = Plan(*state[2:]), []
        for zeta_t in zeta:
            g = draw_gates(plan.c[:, 1])
            zeta_t = zeta_t[g]
            eps = torch.randn(len(zeta_t), self.straw.noise_size)
            attention, kl = self.straw.attend(zeta_t, eps)
            plan = self.straw(attention, plan, g)
            steps.append((plan.A[..., 0], g, kl, plan.c[:, 0]))
        y, g, kl, c_0 = map(torch.stack, zip(*steps))
        return Output(y, (*cells, *plan), g, kl.sum(), c_0.sum())


def text_loss(out: Output, y: Tensor, args: Args) -> tuple[Tensor, dict[str, float]]:
    """Negative log likelihood of y [N, B] with the costs of eq. 3, all a symbol's mean."""
    nll = F.cross_entropy(out.y.flatten(0, 1), y.flatten())
    costs = args.noise_cost * out.kl + args.commitment_cost * out.c_0
    watched = {
        "losses/bits_per_character": nll.item() / math.log(2),
        "losses/kl": out.kl.item() / out.g.sum().clamp(min=1).item(),
        "losses/c_0": out.c_0.item() / y.numel(),
        "charts/committed": 100 * (1 - out.g.float().mean().item()),
    }
    return nll + costs / y.numel(), watched


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """target <- source, two networks of one shape."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        ours.copy_(theirs)


class SharedRMSProp:
    """RMSProp whose running average g lives, like theta, in memory all workers share (eq. 1)."""

    def __init__(self, theta: Sequence[Tensor], decay: float, eps: float):
        self.theta, self.decay, self.eps = theta, decay, eps
        self.g = [torch.zeros_like(t).share_memory_() for t in theta]

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


def gradients_of(loss: Tensor, net: nn.Module) -> Sequence[Tensor]:
    """Of all parameters: 0 for one that took no part, as planners do not in a long commitment."""
    theta = list(net.parameters())
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in theta]
    return torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)


LONGEST = 40  # macro-actions of this length and longer count together
PERIODS = 50  # of training, each with its own histogram of lengths


def count_commitments(histogram: Tensor, part: float, g: Tensor, age: Tensor) -> Tensor:
    """Add to histogram [PERIODS, LONGEST + 1] the macro-actions that end in gates g [N, B].

    part of the training is over. age [B]: steps since the last replanning; returns it as it is
    after the last step. Before the first plan it is 0; column 0 of the histogram means nothing.
    """
    row = histogram[min(PERIODS - 1, int(PERIODS * part))]
    for g_t in g:
        row += age[g_t].clamp(max=LONGEST).bincount(minlength=LONGEST + 1)
        age = torch.where(g_t, 1, age + 1)
    return age


# ---- The games ----------------------------------------------------------------------------------

MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # rows, columns
OPENED = 0.1  # part of the inner walls that are opened again: a maze with more than one way
MAZE_STEPS = 100  # of an episode, at most


def neighbours(walls: np.ndarray, cell: tuple[int, int]) -> list[tuple[int, int]]:
    """The cells one step away; walls [S, S] are closed all around."""
    around = [(cell[0] + down, cell[1] + right) for down, right in MOVES.values()]
    return [there for there in around if not walls[there]]


def carve(S: int, random: np.random.Generator) -> np.ndarray:
    """Walls [S, S] of a maze: a depth-first search from room to room, then some doors more."""
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


def end_of_walk(
    walls: np.ndarray, start: tuple[int, int], length: int, random: np.random.Generator
) -> tuple[int, int]:
    """Where a random walk of so many steps ends."""
    cell = start
    for _ in range(length):
        around = neighbours(walls, cell)
        cell = around[random.integers(len(around))]
    return cell


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
            if self.walk:
                self.goal = end_of_walk(self.walls, self.agent, self.walk, self.np_random)
            else:
                self.goal = cells[self.np_random.integers(len(cells))]
        self.optimal = self.r * (2 - int(distances(self.walls, self.goal)[self.agent]))
        return self.image(), {}

    def step(self, action: int):
        down, right = list(MOVES.values())[action]
        there = self.agent[0] + down, self.agent[1] + right
        self.t += 1
        r_t = -2 * self.r if self.walls[there] else -self.r
        if not self.walls[there]:
            self.agent = there
        terminated = self.agent == self.goal
        truncated = not terminated and self.t == MAZE_STEPS
        info = {"optimal": self.optimal}
        return self.image(), self.r if terminated else r_t, terminated, truncated, info


def walk_length(step: int, curriculum_period: int) -> int:
    """Of the random walk from start to goal: 2 at first, one more in each period; 0: anywhere."""
    return 2 + step // curriculum_period if curriculum_period else 0


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
    When a whole game is over, info["episode"] holds its true score "r" and its frames "l".
    """
    if args.task == "maze":
        return RecordEpisodeStatistics(Maze(args.maze_size, args.maze_reward))
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    atari = {"obs_type": "ram", "frameskip": 1, "max_num_frames_per_episode": MAX_FRAMES}
    env_id = args.env_id
    try:
        is_atari = ":" not in env_id and "ale_py" in str(gym.spec(env_id).entry_point)
        env = gym.make(env_id, **atari) if is_atari else gym.make(env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        nearest = ", ".join(difflib.get_close_matches(env_id, gym.registry, cutoff=0.4)) or "none"
        raise SystemExit(f"There is no game {env_id}: {error} Nearest names: {nearest}.") from None

    env = RecordEpisodeStatistics(env)
    if is_atari:  # it fetches the screens that it needs: "ram" saves rendering the others
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


def first_images(envs: Sequence[gym.Env], seeds: Sequence[int]) -> Tensor:
    """[K, H, W, C] of K games."""
    return torch.from_numpy(np.stack([env.reset(seed=i)[0] for env, i in zip(envs, seeds)]))


def decide(
    net: nn.Module,
    s: Tensor,
    a_before: Tensor,
    fresh: Tensor,
    state: tuple[Tensor, ...],
    generator: torch.Generator | None = None,
) -> tuple[Seen, Output]:
    """One step of K games: draw the gates, let the network look where they are open."""
    seen = Seen(s, a_before, fresh, *net.draw(state, fresh, generator))
    return seen, net(Seen(*(part[None] for part in seen)), state)


def rollouts(
    envs: Sequence[gym.Env], seeds: list[int], net: nn.Module, t_max: int
) -> Iterator[tuple[Rollout, list[dict]]]:
    """Endless rollouts of K games side by side, each with the parameters net has by then.

    Each comes with the last infos of the whole games that ended in it.
    """
    K = len(envs)
    s_tm1, a_tm2, fresh = first_images(envs, seeds), torch.zeros(K).long(), torch.ones(K).bool()
    state = net.initial_state(K)
    while True:
        steps, games, first_state, last = [], [], state, False
        while not last:
            with torch.no_grad():
                seen, out = decide(net, s_tm1, a_tm2, fresh, state)
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
                    v_t = decide(net, s_t, a_tm1, ended & False, state)[1].y[0, :, -1]
            steps.append((*seen, a_tm1, r_t, terminated, truncated, v_t))

            s_tm1, a_tm2, fresh = s_t, a_tm1, ended  # s_t has had its value: it may be overwritten
            for k in ended.nonzero().flatten().tolist():
                s_tm1[k] = torch.from_numpy(envs[k].reset()[0])
                if "episode" in infos[k]:
                    games.append(infos[k])
        columns = [torch.stack(column) for column in zip(*steps)]
        yield Rollout(Seen(*columns[:5]), *columns[5:], first_state), games


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_bytes(content)
    path.with_suffix(".part").replace(path)


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
    if args.dataset == "tinyshakespeare" and not args.text_file and not path.exists():
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


class Text(NamedTuple):
    """A text in an alphabet of 50 symbols, the last of which stands for all rare characters."""

    alphabet: str
    train: Tensor  # [L] numbers of symbols
    test: Tensor  # [L / 9]


def encode(text: str) -> Text:
    """The alphabet is made of the most frequent characters of the part to be learned."""
    cut = len(text) * 9 // 10
    frequent = [character for character, _ in Counter(text[:cut]).most_common(SYMBOLS - 1)]
    alphabet = "".join(frequent).ljust(SYMBOLS, OTHER)
    numbers = {character: i for i, character in enumerate(frequent)}
    codes = torch.tensor([numbers.get(character, SYMBOLS - 1) for character in text])
    return Text(alphabet, codes[:cut], codes[cut:])


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


class MacroAction(NamedTuple):
    """A row of figure 3c's table."""

    rank: int  # by use, from 1
    string: str
    uses: int
    true_rank: int  # among the n-grams of the text; one more than there are if it is none
    occurrences: int  # in the text


def rank_macro_actions(
    used: Counter, occurring: Counter, alphabet: str, most: int = 20
) -> list[MacroAction]:
    """The most used macro-actions and how frequent they are in the text as n-grams."""
    ranks = {ngram: i + 1 for i, (ngram, _) in enumerate(occurring.most_common())}
    rows = []
    for i, (ngram, uses) in enumerate(used.most_common(most)):
        string = "".join(alphabet[symbol] for symbol in ngram)
        true_rank = ranks.get(ngram, len(ranks) + 1)
        rows.append(MacroAction(i + 1, string, uses, true_rank, occurring[ngram]))
    return rows


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: of the ranks of x and y, equal values sharing their mean rank."""
    ranks = []
    for values in (np.asarray(x), np.asarray(y)):
        below, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
        ranks.append(below + (equal - 1) / 2)
    return float(np.corrcoef(*ranks)[0, 1])


FREQUENT = 100  # n-grams up to this rank count as frequent


def macro_action_metrics(rows: list[MacroAction], length: int) -> dict[str, float]:
    """How far the ranks agree, and the percentage of macro-actions that are frequent n-grams."""
    metrics = {}
    if rows:
        frequent = sum(row.true_rank <= FREQUENT for row in rows) / len(rows)
        metrics[f"eval/macro_{length}_frequent"] = 100 * frequent
    if len({row.true_rank for row in rows}) > 1 and len({row.uses for row in rows}) > 1:
        agreement = rank_correlation([-row.uses for row in rows], [row.true_rank for row in rows])
        metrics[f"eval/macro_{length}_rank_correlation"] = agreement
    return metrics


# ---- Evaluation and training --------------------------------------------------------------------


def independent_seeds(count: int, *purpose: int) -> list[int]:
    """Seeds that have nothing to do with each other or with those of another purpose."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


class Moment(NamedTuple):
    """A step of K games, for those who watch."""

    playing: list[int]  # the games that are not over yet
    s: Tensor  # [K, H, W, C]
    g: Tensor  # [K]
    out: Output  # of this one step
    ended: list[dict]  # last infos of the games that it ended


@torch.no_grad()
def whole_games(
    net: nn.Module, envs: Sequence[gym.Env], seed: int, watch: Callable = lambda: None
) -> Iterator[Moment]:
    """One game of each env to its end, gates and actions sampled. watch() is called every step."""
    K = len(envs)
    generator = torch.Generator().manual_seed(seed)
    s, a, fresh = first_images(envs, independent_seeds(K, seed)), torch.zeros(K).long(), True
    state, playing = net.initial_state(K), list(range(K))
    while playing:
        watch()
        seen, out = decide(net, s, a, torch.full((K,), fresh), state, generator)
        a, state, fresh = sample(out.y[0, :, :-1], generator), out.state, False
        moment, s = Moment(playing.copy(), s, seen.g, out, []), s.clone()
        for k in moment.playing:
            image, _, terminated, truncated, info = envs[k].step(a[k].item())
            s[k] = torch.from_numpy(image)
            if terminated or truncated:
                moment.ended.append(info | {"solved": terminated})
                playing.remove(k)
        yield moment


def evaluate(
    net: nn.Module, args: Args, step: int, watch: Callable = lambda: None
) -> dict[str, float]:
    """True scores of whole games, in mazes as the curriculum has them at that step."""
    envs = [make_env(args, training=False) for _ in range(args.eval_episodes)]
    for env in envs:
        if args.task == "maze":
            env.unwrapped.walk = walk_length(step, args.curriculum_period)
    games, steps, replans = [], 0, 0
    with tqdm(total=len(envs), unit="game", leave=False, disable=None) as bar:
        for moment in whole_games(net, envs, args.seed, watch):
            games += moment.ended
            bar.update(len(moment.ended))
            steps += len(moment.playing)
            replans += moment.g[moment.playing].sum().item()
    metrics = {
        "eval/episodic_return": float(np.mean([game["episode"]["r"] for game in games])),
        "eval/episodic_return_std": float(np.std([game["episode"]["r"] for game in games])),
        "eval/episodic_length": float(np.mean([game["episode"]["l"] for game in games])),
        "eval/committed": 100 * (1 - replans / steps),  # percent of the steps
    }
    if args.task == "maze":
        metrics["eval/optimal_return"] = float(np.mean([game["optimal"] for game in games]))
        metrics["eval/solved"] = 100 * float(np.mean([game["solved"] for game in games]))
    return metrics


class ReplanMap(NamedTuple):
    """Where in one maze an agent replans."""

    walls: np.ndarray  # [S, S]
    visits: np.ndarray  # [S, S] steps
    replans: np.ndarray  # [S, S] those of them with an open gate


def count_replans(net: nn.Module, args: Args, watch: Callable = lambda: None) -> ReplanMap:
    """Games in one maze, which is new to the agent, from anywhere to anywhere."""
    walls = carve(args.maze_size, np.random.default_rng(args.seed))
    visits, replans = np.zeros(walls.shape), np.zeros(walls.shape)
    env = partial(Maze, args.maze_size, args.maze_reward, walls)
    for moment in whole_games(net, [env() for _ in range(args.eval_episodes)], args.seed, watch):
        for k in moment.playing:
            cell = divmod(int(moment.s[k, ..., 0].argmax()), args.maze_size)  # the red one
            visits[cell] += 1
            replans[cell] += moment.g[k].item()
    return ReplanMap(walls, visits, replans)


def is_turn(walls: np.ndarray, cell: tuple[int, int]) -> bool:
    """A corner or a junction: there are ways from here that do not lie on one line."""
    around = neighbours(walls, cell)
    return len({i for i, _ in around}) > 1 and len({j for _, j in around}) > 1


def replan_rates(counted: ReplanMap) -> dict[str, float]:
    """Percent of the steps with an open gate, at corners and junctions and in straight corridors.

    Dead ends, which have one way out, belong to neither.
    """
    totals = {True: np.zeros(2), False: np.zeros(2)}
    for cell in map(tuple, np.argwhere(~counted.walls).tolist()):
        if len(neighbours(counted.walls, cell)) > 1:
            totals[is_turn(counted.walls, cell)] += counted.replans[cell], counted.visits[cell]
    names = {True: "eval/replans_at_turns", False: "eval/replans_in_corridors"}
    return {names[turn]: float(100 * n / max(of, 1)) for turn, (n, of) in totals.items()}


def draw_replans(counted: ReplanMap, path: Path) -> None:
    """Figure 3a: the share of visits to a cell at which the plan was changed."""
    from matplotlib import pyplot as plt  # here: workers import this file, too

    share = np.where(counted.visits > 0, counted.replans / np.maximum(counted.visits, 1), np.nan)
    figure, axis = plt.subplots(figsize=(5, 4.2))
    axis.imshow(np.where(counted.walls, 0.0, np.nan), cmap="Blues_r", vmin=0, vmax=1.5)
    shown = axis.imshow(share, cmap="hot", vmin=0)
    figure.colorbar(shown, label="replans per visit")
    axis.set(xlabel="column (cells)", ylabel="row (cells)", title="where the plan is changed")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


FILMED_STEPS, FILMED_COLUMNS = 150, 30  # of a film and of the plans in it


def film_plan(net: nn.Module, args: Args, step: int, path: Path) -> None:
    """Games as a GIF: the screen, beside it the policy that A plans for the next steps, and c."""
    from matplotlib import pyplot as plt

    env = make_env(args, training=False)
    names = range(env.action_space.n)
    if hasattr(env.unwrapped, "get_action_meanings"):
        names = env.unwrapped.get_action_meanings()
    if args.task == "maze":
        env.unwrapped.walk = walk_length(step, args.curriculum_period)
    layout = {"figsize": (8, 3.6), "height_ratios": (5, 1), "layout": "constrained"}
    figure, axes = plt.subplot_mosaic([["screen", "A"], ["screen", "c"]], **layout)
    columns, frames, seed = min(FILMED_COLUMNS, args.plan_length), [], args.seed
    axes["screen"].set(xticks=[], yticks=[])
    axes["A"].set(yticks=range(len(names)), yticklabels=names, ylabel="chance of the action, by A")
    axes["c"].set(yticks=[], ylabel="c", xlabel="steps from now")
    scale = {"vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    screen = axes["screen"].imshow(np.zeros(env.observation_space.shape, np.uint8)[..., -3:])
    planned = axes["A"].imshow(np.zeros((len(names), columns)), cmap="viridis", **scale)
    chances = axes["c"].imshow(np.zeros((1, columns)), cmap="hot", **scale)
    while len(frames) < FILMED_STEPS:
        for moment in whole_games(net, [env], seed):
            plan = Plan(*moment.out.state)
            screen.set_data(moment.s[0, ..., -3:].numpy())
            planned.set_data(plan.A[0, :-1, :columns].softmax(0).numpy())
            chances.set_data(plan.c[:, :columns].numpy())
            replans = "replans" if moment.g[0] else "is committed"
            title = f"step {len(frames)}: {replans}, V = {moment.out.y[0, 0, -1]:.2f}"
            axes["screen"].set_title(title)
            figure.canvas.draw()
            picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]
            frames.append(Image.fromarray(picture.copy()))
            if len(frames) == FILMED_STEPS:
                break
        seed += 1
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, loop=0)
    plt.close(figure)


def draw_commitments(histogram: Tensor, total_timesteps: int, path: Path) -> None:
    """How long macro-actions were over training, from histogram [PERIODS, LONGEST + 1]."""
    from matplotlib import pyplot as plt

    lengths = histogram[:, 1:].double()
    share = 100 * lengths / lengths.sum(1, keepdim=True).clamp(min=1)  # percent in each period
    figure, axis = plt.subplots(figsize=(6, 3.6))
    extent = (0, total_timesteps / 1e6, 0.5, LONGEST + 0.5)
    shown = axis.imshow(share.T.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma")
    figure.colorbar(shown, label="macro-actions (%)")
    longest = f"length (steps; {LONGEST}: or more)"
    axis.set(xlabel="steps of training (millions)", ylabel=longest, title="commitments")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def draw_macro_actions(tables: dict[int, list[MacroAction]], path: Path) -> None:
    """Figure 3c: rank by use against the rank of the same n-gram in the text, by length."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(6 * len(tables), 4.2))
    for axis, (length, rows) in zip(axes, tables.items(), strict=True):
        for row in rows:
            axis.plot(row.rank, row.true_rank, "o", color="tab:blue")
            label = row.string.replace(" ", "_").encode("unicode_escape").decode()
            offset = {"textcoords": "offset points", "xytext": (3, 4), "family": "monospace"}
            at = (row.rank, row.true_rank)
            axis.annotate(label, at, fontsize=8, parse_math=False, **offset)
        axis.set(xlabel="rank by use", ylabel="rank in the text", yscale="log")
        axis.set(title=f"macro-actions of length {length} (_ is a space)")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def evaluate_and_draw(
    net: nn.Module,
    args: Args,
    step: int,
    histogram: Tensor,
    folder: Path,
    watch: Callable = lambda: None,
) -> dict[str, float]:
    """Scores, and of an agent that plans the pictures of its plans."""
    metrics = evaluate(net, args, step, watch)
    if isinstance(net, StrawPolicy):
        draw_commitments(histogram, args.total_timesteps, folder / "commitments.png")
        film_plan(net, args, step, folder / "plan.gif")
        if args.task == "maze":
            counted = count_replans(net, args, watch)
            metrics |= replan_rates(counted)
            draw_replans(counted, folder / "replans.png")
    return metrics


def update(
    net: nn.Module,
    optimizer: SharedRMSProp,
    trajectory: Rollout,
    learning_rate: float,
    args: Args,
) -> dict[str, float]:
    """Move the shared parameters by the gradient that net, a copy of them, has on a trajectory.

    A gradient that is not finite moves nothing; the norm returned tells.
    """
    loss, watched = straw_loss(net, trajectory, args)
    gradients = gradients_of(loss, net)
    norm = clip_by_norm(gradients, args.max_gradient_norm)
    if math.isfinite(norm):
        optimizer.step(gradients, learning_rate)
    return watched | {"losses/gradient_norm": norm, "charts/learning_rate": learning_rate}


def make_policy(args: Args) -> nn.Module:
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
    """One actor-learner; it reports by putting (tag, value, step) on log."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is a matter for the main process
    main_process, updates = mp.parent_process(), 0
    seeds = independent_seeds(2 + args.envs_per_worker, args.seed, rank + 1, first_step)
    torch.manual_seed(seeds.pop())
    np.random.seed(seeds.pop())  # for games that use it

    envs, net = [make_env(args) for _ in seeds], make_policy(args)  # theta'
    age = torch.zeros(len(envs), dtype=torch.long)
    played = rollouts(envs, seeds, net, args.t_max)
    while T.value < args.total_timesteps and main_process.is_alive():
        if args.task == "maze":
            for env in envs:
                env.unwrapped.walk = walk_length(T.value, args.curriculum_period)
        copy_parameters(shared, net)
        trajectory, games = next(played)
        with T.get_lock():
            step = T.value = T.value + trajectory.r_t.numel()
        learning_rate = args.learning_rate * max(0.0, 1 - step / args.total_timesteps)
        watched = update(net, optimizer, trajectory, learning_rate, args)
        age = count_commitments(histogram, step / args.total_timesteps, trajectory.seen.g, age)

        for info in games:
            log.put(("charts/episodic_return", float(info["episode"]["r"]), step))
            log.put(("charts/episodic_length", float(info["episode"]["l"]), step))
            if "optimal" in info:
                log.put(("charts/optimal_return", float(info["optimal"]), step))
        updates += 1
        if updates % 100 == 0 or not math.isfinite(watched["losses/gradient_norm"]):
            for tag, value in watched.items():
                log.put((tag, value, step))


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


def drain(log, recent: dict[str, list[float]]) -> None:
    """Sort by tag what the workers have put on log since the last time."""
    while not log.empty():
        tag, value, step = log.get()
        if not math.isfinite(value):
            raise SystemExit(
                f"{tag} is {value} at step {step}: the run stops. The checkpoint in its folder is "
                "from before; a smaller --learning-rate often helps."
            )
        recent[tag].append(value)


# Of the environment of the workers: glibc is to keep the memory they free, not to return it to the
# system, which would clear it for them many times a second (a fifth of their time).
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "32000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


def supervise(
    role: Callable, arguments: tuple, args: Args, T, log, writer, seconds: float, save, evaluate_now
) -> dict[str, float]:
    """Spawn role(rank, *arguments) --num-workers times and report until they are done.

    save(T=..., seconds=...) writes a checkpoint; seconds is the time spent before. evaluate_now(
    step, watch) returns metrics and calls watch now and then. Returns the last report. A worker
    that dies ends the run with its traceback, Ctrl-C and SIGTERM end it with a checkpoint.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ |= KEEP_MEMORY
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit that
    workers = mp.spawn(role, arguments, nprocs=args.num_workers, join=False)
    signal.signal(signal.SIGINT, on_ctrl_c)
    counter = T.get_obj()  # read without the lock, which a worker may hold when it is killed
    bar = tqdm(total=args.total_timesteps, initial=counter.value, unit="step", disable=None)
    last_step, last_time, last_evaluation = counter.value, time.perf_counter(), counter.value
    recent, finished = defaultdict(list), False
    try:
        while not finished:
            finished = workers.join(timeout=1)
            drain(log, recent)
            step, now = counter.value, time.perf_counter()
            bar.update(step - bar.n)
            if not finished and step < last_step + args.report_every:
                continue

            seconds += now - last_time
            metrics = {tag: float(np.mean(values)) for tag, values in sorted(recent.items())}
            metrics["charts/SPS"] = (step - last_step) / (now - last_time)
            metrics["charts/minutes"] = seconds / 60
            recent, last_step, last_time = defaultdict(list), step, now
            save(T=step, seconds=seconds)
            if finished or (args.eval_every and step >= last_evaluation + args.eval_every):
                metrics |= evaluate_now(step, partial(workers.join, 0))
                last_evaluation = step
            report(writer, step, metrics)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        save(T=counter.value, seconds=seconds + time.perf_counter() - last_time)
        path = Path(writer.log_dir, "checkpoint.pt")
        raise SystemExit(f"Stopped; go on with the same flags and --resume {path}") from None
    finally:
        for process in workers.processes:
            process.terminate()
            process.join()
        bar.close()
        writer.close()
    return metrics


SHAPING = ("task", "model", "replan", "plan_length", "plan_filters", "noise_size")


def run_games(args: Args) -> dict[str, float]:
    """A3C on mazes or Atari."""
    net = make_policy(args).share_memory()
    optimizer = SharedRMSProp(list(net.parameters()), args.rmsprop_decay, args.rmsprop_eps)
    histogram = torch.zeros(PERIODS, LONGEST + 1, dtype=torch.long).share_memory_()
    shared = {"net": net.state_dict(), "g": optimizer.g, "histogram": histogram}  # views

    def evaluate_now(step: int, watch: Callable) -> dict[str, float]:
        return evaluate_and_draw(copy.deepcopy(net), args, step, histogram, run_dir, watch)

    first_step, seconds = 0, 0.0
    maze = ("maze_size", "maze_reward", "curriculum_period")
    shaping = (*SHAPING, *(("env_id",) if args.task == "atari" else maze))
    if args.evaluate or args.resume:
        path = Path(args.evaluate or args.resume)
        checkpoint = load_checkpoint(path, args, net, *shaping)
        histogram.copy_(checkpoint["histogram"])
        first_step, seconds = checkpoint["T"], checkpoint["seconds"]
    if args.evaluate:
        return evaluate_and_draw(net, args, first_step, histogram, path.parent)
    if args.resume:
        for g, saved_g in zip(optimizer.g, checkpoint["g"], strict=True):
            g.copy_(saved_g)
        if first_step >= args.total_timesteps:
            raise SystemExit(f"{args.resume} is at step {first_step}: raise --total-timesteps.")

    run_dir, writer = open_log(args)
    save = partial(save_checkpoint, run_dir / "checkpoint.pt", args=asdict(args), **shared)
    spawn = mp.get_context("spawn")
    T, log = spawn.Value("q", first_step), spawn.Queue()
    arguments = args, first_step, net, optimizer, histogram, T, log
    return supervise(worker, arguments, args, T, log, writer, seconds, save, evaluate_now)


def open_log(args: Args) -> tuple[Path, object]:
    """The folder of the run and tensorboard's writer in it."""
    from torch.utils.tensorboard import SummaryWriter  # not above: workers import this file, too

    what = args.env_id if args.task == "atari" else args.task
    run_dir = open_run_dir(args, f"{what}_{args.model}", "straw")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    return run_dir, writer


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


@torch.no_grad()
def evaluate_text(
    net: TextModel, args: Args, text: Text
) -> tuple[dict[str, float], dict[int, list[MacroAction]]]:
    """Bits per character of the test text, and the macro-actions with which it was written.

    The global random state is left as it was.
    """
    columns = side_by_side(text.test, args.batch_size)
    state, bits, written, gates = net.initial_state(args.batch_size), 0.0, [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        pieces = zip(columns[:-1].split(args.t_max), columns[1:].split(args.t_max), strict=True)
        total = math.ceil((len(columns) - 1) / args.t_max)
        for x, y in tqdm(pieces, total=total, unit="piece", leave=False, disable=None):
            out = net(x, state)
            state = out.state
            nll = F.cross_entropy(out.y.flatten(0, 1), y.flatten(), reduction="sum")
            bits += nll.item() / math.log(2)
            written.append(out.y.argmax(-1))
            gates.append(out.g)
    g, written = torch.cat(gates), torch.cat(written)
    metrics = {
        "eval/bits_per_character": bits / g.numel(),
        "eval/committed": 100 * (1 - g.float().mean().item()),
    }
    tables = {}
    for length in (3, 4) if net.straw else ():
        used = macro_actions(written, g, length)
        tables[length] = rank_macro_actions(used, ngrams(text.train, length), text.alphabet)
        metrics |= macro_action_metrics(tables[length], length)
    return metrics, tables


def write_macro_actions(tables: dict[int, list[MacroAction]], path: Path) -> None:
    """The tables of figure 3c as a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("length", *MacroAction._fields))
        writer.writerows((length, *row) for length, rows in tables.items() for row in rows)


def evaluate_and_draw_text(
    net: TextModel, args: Args, text: Text, histogram: Tensor, folder: Path
) -> dict[str, float]:
    metrics, tables = evaluate_text(net, args, text)
    if tables:
        draw_commitments(histogram, args.total_timesteps, folder / "commitments.png")
        write_macro_actions(tables, folder / "macro_actions.csv")
        draw_macro_actions(tables, folder / "macro_actions.png")
    return metrics


def update_text(
    net: TextModel, x: Tensor, y: Tensor, state: tuple, learning_rate: float, args: Args
) -> tuple[Output, dict[str, float]]:
    """A step of plain gradient descent on a piece of text x [N, B], followed by y."""
    out = net(x, state)
    loss, watched = text_loss(out, y, args)
    gradients = gradients_of(loss, net)
    norm = clip_by_norm(gradients, args.max_gradient_norm)
    with torch.no_grad():
        for theta, gradient in zip(net.parameters(), gradients, strict=True):
            theta.sub_(learning_rate * gradient)
    return out, watched | {"losses/gradient_norm": norm, "charts/learning_rate": learning_rate}


def run_text(args: Args) -> dict[str, float]:
    """Prediction of the next character, which is a step; states go on from piece to piece.

    B places of the text are read side by side, each up to where the next began, then again.
    """
    text, B, N = encode(read_text(args)), args.batch_size, args.t_max
    columns = side_by_side(text.train, B)
    if len(columns) <= N or len(text.test) < 5 * B:
        length = len(text.train) + len(text.test)
        raise SystemExit(f"{length} characters are too few for --batch-size {B} and --t-max {N}.")
    net, histogram = TextModel(args), torch.zeros(PERIODS, LONGEST + 1, dtype=torch.long)
    state, age, step, seconds = net.initial_state(B), torch.zeros(B, dtype=torch.long), 0, 0.0
    shaping = (*SHAPING, "lstm_size", "dataset", "text_file", "batch_size", "t_max")
    if args.evaluate or args.resume:
        path = Path(args.evaluate or args.resume)
        checkpoint = load_checkpoint(path, args, net, *shaping)
        histogram, step, seconds = (checkpoint[name] for name in ("histogram", "T", "seconds"))
    if args.evaluate:
        return evaluate_and_draw_text(net, args, text, histogram, path.parent)
    if args.resume:
        state, age = checkpoint["state"], checkpoint["age"]
        torch.set_rng_state(checkpoint["rng"])
        if step >= args.total_timesteps:
            raise SystemExit(f"{args.resume} is at step {step}: raise --total-timesteps.")

    run_dir, writer = open_log(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    last_step, last_time, recent = step, time.perf_counter(), defaultdict(list)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="character", disable=None)
    try:
        while step < args.total_timesteps:
            place = step // B % ((len(columns) - 1) // N * N)
            if place == 0:
                state = net.initial_state(B)
            x, y = columns[place : place + N], columns[place + 1 : place + 1 + N]
            learning_rate = args.learning_rate * (1 - step / args.total_timesteps)
            out, watched = update_text(net, x, y, state, learning_rate, args)
            step += N * B
            refuse_infinity(watched["losses/gradient_norm"], f"at step {step}")
            state = tuple(part.detach() for part in out.state)
            age = count_commitments(histogram, step / args.total_timesteps, out.g, age)
            for tag, value in watched.items():
                recent[tag].append(value)
            bar.update(N * B)
            finished = step >= args.total_timesteps
            if not finished and step < last_step + args.report_every:
                continue

            now = time.perf_counter()
            seconds += now - last_time
            metrics = {tag: float(np.mean(values)) for tag, values in recent.items()}
            metrics["charts/SPS"] = (step - last_step) / (now - last_time)
            metrics["charts/minutes"] = seconds / 60
            progress = {"T": step, "seconds": seconds, "state": state, "age": age}
            progress |= {"rng": torch.get_rng_state(), "histogram": histogram, "args": asdict(args)}
            save_checkpoint(run_dir / "checkpoint.pt", net=net.state_dict(), **progress)
            due = args.eval_every and step // args.eval_every > last_step // args.eval_every
            if finished or due:
                metrics |= evaluate_and_draw_text(net, args, text, histogram, run_dir)
            report(writer, step, metrics)
            recent, last_step, last_time = defaultdict(list), step, time.perf_counter()
    except KeyboardInterrupt:
        raise stopped(run_dir) from None
    finally:
        bar.close()
        writer.close()
    return metrics


def check_flags(args: Args) -> None:
    """Combinations of flags that no run can have."""
    if args.maze_size % 2 == 0 or args.maze_size < 5:
        raise SystemExit(f"--maze-size must be odd and at least 5, not {args.maze_size}.")
    if args.plan_length < max(8, args.plan_filters):
        raise SystemExit(
            f"--plan-length must be at least 8 and at least --plan-filters, not {args.plan_length}."
        )
    if args.maze_reward > 0.5:
        raise SystemExit("--maze-reward must be at most 0.5: rewards are clipped to [-1, 1].")
    if args.rmsprop_eps == 0:
        raise SystemExit("--rmsprop-eps must be above 0: some gradients are always 0.")
    if args.curriculum_period and args.total_timesteps > 10_000 * args.curriculum_period:
        raise SystemExit("--curriculum-period is too short: walks would be 10,000 steps and more.")
    if args.replan != "learned" and args.model in ("lstm", "ff"):
        raise SystemExit(f"--model {args.model} has no plan: leave --replan out.")


def with_defaults(args: Args) -> Args:
    """The task's own rate and norm, where flags do not give them."""
    learning_rate, max_norm = (1.0, 0.5) if args.task == "text" else (5e-4, 40.0)
    return replace(
        args,
        learning_rate=args.learning_rate or learning_rate,
        max_gradient_norm=args.max_gradient_norm or max_norm,
    )


def main(args: Args) -> dict[str, float]:
    check(args)
    check_flags(args)
    torch.set_num_threads(1)  # the cores are the workers'
    torch.manual_seed(args.seed)
    args = with_defaults(args)
    try:
        return run_text(args) if args.task == "text" else run_games(args)
    except KeyboardInterrupt:  # in an evaluation
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
