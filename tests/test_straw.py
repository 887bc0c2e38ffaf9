"""straw.py against the bugs that public ports of its paper have had.

Caught here: a plan that is rolled the wrong way or around; mu = offset / stride; a grid centre that
is not on the plan; probabilities where logits belong; a bias of the commitment that is not learned;
h applied to each column of the patch; a plan read after the shift; no straight-through gradient;
a commitment branch that trains the planner; noise that costs on committed steps; an all-zero
commitment plan that can never be left.
"""

import csv
import dataclasses
import math
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import ROOT, Locked, processes_of, wait_for, work_here
from scipy.stats import spearmanr
from torch.distributions import Categorical, Normal, kl_divergence

import straw
from straw import Args, Maze, Plan, StrategicAttentiveWriter

SMALL = {"plan_length": 20, "plan_filters": 3, "noise_size": 5, "lstm_size": 16}
TOY = {"maze_size": 5, "num_workers": 1, "eval_episodes": 3, "learning_rate": 1e-3, **SMALL}
TEXT = {"task": "text", "model": "straw", "batch_size": 4, "t_max": 10, **SMALL}


def fitting(args: Args) -> Args:
    """Without those of the flags above that the task or the model does not have."""
    try:
        straw.check_flags(args)
    except SystemExit as refusal:
        if idle := re.match("--(.*) has no effect", str(refusal)):
            name = idle[1].replace("-", "_")
            return fitting(dataclasses.replace(args, **{name: getattr(Args, name)}))
    return args


def main(args: Args) -> dict[str, float]:
    return straw.main(fitting(args))


each_planner = pytest.mark.parametrize("model", ["straw", "strawe"])
each_model = pytest.mark.parametrize("model", ["straw", "strawe", "lstm", "ff"])


class Tint(gym.Env):
    """The screen is red or green; the action that names its colour earns 1; seven steps a game."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def screen(self) -> np.ndarray:
        self.colour = int(self.np_random.integers(2))
        screen = np.zeros((84, 84, 3), np.uint8)
        screen[..., self.colour] = 200 + self.t
        return screen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.screen(), {}

    def step(self, action):
        reward = float(action == self.colour)
        self.t += 1
        return self.screen(), reward, self.t == 7, False, {}


gym.register("Tint-v0", "test_straw:Tint")


class Counted(gym.Env):
    """The screen is the number of the step; a game ends after so many, by itself or cut."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, length: int, cut: bool):
        self.length, self.cut, self.walk, self.seeds = length, cut, 0, []

    def reset(self, *, seed=None, options=None):
        self.t, self.walk_at_reset = 0, self.walk
        self.seeds.append(seed)
        return np.array([0]), {}

    def step(self, action):
        self.t += 1
        over, info = self.t == self.length, {"optimal": 10.0 * self.length}
        if over:
            info["episode"] = {"r": -1.0 * self.length, "l": self.length, "t": 0.5}
        reward = 7.0 * (-1) ** self.t
        return np.array([self.t]), reward, over and not self.cut, over and self.cut, info


class Counting(torch.nn.Module):
    """Its state counts the steps of a game, its value tells all that it is given.

    It takes the actions 1, 2, 0, 1, ... and looks at first and from the fourth step on.
    """

    def initial_state(self, K):
        return (torch.zeros(K),)

    def draw(self, state, fresh, generator):
        return fresh | (state[0] >= 3), torch.zeros(len(fresh), 0)

    def forward(self, seen, state):
        (steps,) = torch.where(seen.fresh, 0, state[0]) + 1  # [K] of one step
        value = steps + 100 * seen.a_before[0] + 1000 * seen.s[0, :, 0]
        logits = 1e9 * F.one_hot(steps.long() % 3, 3)
        y = torch.cat([logits, value[:, None]], 1)[None]
        return straw.Output(y, (steps,), seen.g, 0, 0)


def told_at(t: int) -> int:
    """The value that Counting gives in step t of a game."""
    return t + 1 + 100 * (t % 3) * (t > 0) + 1000 * t


def cell(model: str = "straw") -> StrategicAttentiveWriter:
    """A STRAW all of whose weights are random, in float64."""
    torch.manual_seed(0)
    planner = StrategicAttentiveWriter(6, 4, Args(model=model, **SMALL)).double()
    with torch.no_grad():
        for parameter in planner.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return planner


def noise_of(channel: straw.NoisyChannel, zeta):
    """mu [..., d] and sigma [..., 1], the last output being its logarithm."""
    linear = channel.mu_and_log_sigma
    out = zeta @ linear.weight.T + linear.bias
    return out[..., :-1], out[..., -1:].exp()


def random_plan(B: int, R: int, T: int) -> Plan:
    return Plan(torch.randn(B, R, T).double(), torch.rand(B, T).double())


def one_step(planner, zeta, plan: Plan, g, eps=None) -> straw.Output:
    """zeta [B, D] and gates g [B] of one step in the middle of episodes."""
    g = torch.as_tensor(g)
    eps = torch.zeros(len(g), planner.noise_size).double() if eps is None else eps
    return planner(zeta[None], eps[None], torch.zeros_like(g)[None], plan, g[None])


def filters_of(psi, K: int, T: int):
    return straw.attention_filters(*straw.attention_grid(psi, K, T, T), torch.arange(T).double())


# ---- Equations ----------------------------------------------------------------------------------


def test_math_time_shift_forgets_now_and_appends_zero():
    plan = torch.randn(2, 3, 5)
    shifted = straw.time_shift(plan)
    for k in range(5):
        expected = plan[..., k + 1] if k < 4 else torch.zeros(2, 3)
        assert torch.equal(shifted[..., k], expected)


@pytest.mark.parametrize("K", [1, 4, 5])
def test_math_filters_are_normalised_gaussians_on_a_grid(K):
    torch.manual_seed(0)
    psi, T = torch.randn(3, 3, dtype=torch.float64) / 2, 30
    filters = filters_of(psi, K, T)
    torch.testing.assert_close(filters.sum(-1), torch.ones(3, K).double())
    for m in range(3):
        position = (T - 1) / (1 + math.exp(-psi[m, 0]))
        for k in range(K):
            mu = position + (k - (K - 1) / 2) * math.exp(psi[m, 1])
            density = torch.exp(
                -((torch.arange(T).double() - mu) ** 2) / (2 * psi[m, 2].exp() ** 2)
            )
            torch.testing.assert_close(filters[m, k], density / density.sum())


def test_math_filters_stay_on_the_plan_however_wild_psi_is():
    psi = torch.tensor([[-90.0, 3.0, -3.0], [90.0, 3.0, -3.0], [0.0, 5.0, -5.0]])
    filters = filters_of(psi, 10, 50)
    torch.testing.assert_close(filters.sum(-1), torch.ones(3, 10).double())
    where = filters_of(torch.tensor([[-90.0, 0, -2], [90.0, 0, -2]]), 1, 50)
    assert where.argmax(-1).flatten().tolist() == [0, 49]
    wild = torch.tensor([[-90.0], [0.0], [90.0]])
    assert straw.attended_column(wild, 1, 49).flatten().tolist() == [1, 25, 49]
    torch.testing.assert_close(straw.extent(wild, 50, 50), torch.tensor([[0.02], [1], [50]]))
    torch.testing.assert_close(straw.extent(wild, 50, 3), torch.tensor([[0.02], [1], [3]]))
    for psi in ([[0.0, 999.0, 999.0]], [[9.0, 999.0, -999.0]]):  # exp would overflow
        assert filters_of(torch.tensor(psi), 10, 50).isfinite().all()
        c = straw.commitment_plan(torch.tensor(psi), torch.tensor(0.0), torch.arange(50), 50)
        assert c.isfinite().all()


@pytest.mark.parametrize("planned", [0, 17])
@pytest.mark.parametrize("sigma", [0.01, 0.7, 1.9])
def test_math_beyond_the_reach_nothing_is_planned_or_seen(planned, sigma):
    psi = torch.tensor([[-3.0, 0.3, math.log(sigma)], [-4.0, 0.1, -1.0]])
    A, (mu, width) = torch.zeros(2, 4, 200), straw.attention_grid(psi, 3, 200, 200)
    A[1, 2, planned] = 1.0
    columns = straw.reach(A, mu, width)
    assert planned < columns < planned + mu.max() + 15 * sigma + 5
    whole = straw.attention_filters(mu, width, torch.arange(200))
    assert (whole[..., columns:] == 0).all()
    part = straw.attention_filters(mu, width, torch.arange(columns))
    torch.testing.assert_close(part, whole[..., :columns], rtol=1e-5, atol=0)
    assert straw.reach(A, mu, 99 * width + 9) == 200 and straw.reach(A, mu * math.nan, width) <= 200


def test_math_read_and_write_are_loops_and_adjoint():
    A, patch = torch.randn(2, 4, 20).double(), torch.randn(2, 4, 3).double()
    filters = torch.rand(2, 3, 20).double()
    beta, written = straw.read(A, filters), straw.write(patch, filters)
    for m in range(2):
        for r in range(4):
            for k in range(3):
                expected = sum(A[m, r, t] * filters[m, k, t] for t in range(20))
                assert beta[m, r, k].item() == pytest.approx(expected.item())
            for t in range(20):
                expected = sum(patch[m, r, k] * filters[m, k, t] for k in range(3))
                assert written[m, r, t].item() == pytest.approx(expected.item())
    assert (beta * patch).sum().item() == pytest.approx((A * written).sum().item())


def test_math_what_narrow_filters_write_they_read():
    psi = torch.tensor([[0.0, math.log(6), math.log(0.05)]], dtype=torch.float64)
    patch, filters = torch.randn(1, 4, 3).double(), filters_of(psi, 3, 41)
    torch.testing.assert_close(straw.read(straw.write(patch, filters), filters), patch)


def test_math_commitment_is_a_sigmoid_of_one_gaussian_of_intensity_40():
    torch.manual_seed(0)
    psi, b, T = torch.randn(3, 3).double() / 2, torch.tensor(-1.3).double(), 25
    c = straw.commitment_plan(psi, b, torch.arange(T), T)
    for m in range(3):
        mu = 1 + (T - 2) / (1 + math.exp(-psi[m, 0]))
        density = torch.exp(-((torch.arange(T).double() - mu) ** 2) / (2 * psi[m, 2].exp() ** 2))
        expected = torch.sigmoid(-1.3 + 40 * density / density.sum())
        torch.testing.assert_close(c[m, :-1], expected[:-1])
    assert (c[:, -1] == 1).all()


def test_math_never_replanning_is_impossible():
    """However low the bias and however wide the Gaussian: within T steps the gate opens."""
    for psi in ([0.0, 0.0, 9.0], [-99.0, 0.0, 0.0], [99.0, 0.0, 2.0]):
        c = straw.commitment_plan(torch.tensor([psi]), torch.tensor(-1e4), torch.arange(12), 12)
        chances = []
        for _ in range(11):  # until the entry written last is there
            chances.append(c[0, 1].item())
            c = straw.time_shift(c)
        assert max(chances) == 1
    planner = cell()
    assert planner.b.requires_grad and planner.b.numel() == 1


def test_math_kl_is_that_of_distributions_with_one_deviation_for_all():
    mu, sigma = torch.randn(4, 7).double(), torch.rand(4, 1).double() + 0.1
    expected = kl_divergence(Normal(mu, sigma.expand(4, 7)), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(straw.kl_to_prior(mu, sigma), expected)


def test_math_noisy_channel_samples_its_gaussian():
    torch.manual_seed(0)
    channel = straw.NoisyChannel(6, 5)
    zeta = torch.randn(1, 6).expand(100_000, -1)
    z, kl = channel(zeta, torch.randn(100_000, 5))
    mu, sigma = noise_of(channel, zeta[0])
    torch.testing.assert_close(z.mean(0), mu, atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), sigma.expand(5), atol=0.02, rtol=0)
    expected = kl_divergence(Normal(mu, sigma.expand(5)), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl[0], expected)
    sigma_of_nothing = noise_of(channel, torch.zeros(6))[1]
    assert sigma_of_nothing.item() == pytest.approx(math.exp(-2))


def test_gradient_passes_through_the_noise_to_mean_and_deviation():
    channel = straw.NoisyChannel(6, 5).double()
    zeta, eps, weights = torch.randn(3, 6).double(), torch.randn(3, 5).double(), torch.randn(3, 5)
    z, _ = channel(zeta, eps)
    found = torch.autograd.grad((weights * z).sum(), channel.mu_and_log_sigma.bias)[0]
    sigma = noise_of(channel, zeta)[1]
    torch.testing.assert_close(found[:5], weights.double().sum(0))
    torch.testing.assert_close(found[5], (weights * sigma * eps).sum())


def plan_by_hand(planner, zeta, eps, A, c, open_gate: float):
    """Algorithm 1 for one plan A [R, T], c [T], in its own words; open_gate may be any number."""
    z = zeta
    if planner.channel:
        mu, sigma = noise_of(planner.channel, zeta)
        z = mu + sigma * eps
    psi = planner.f_psi(z)
    t = torch.arange(planner.T)
    position = torch.sigmoid(psi[0]) * (planner.T - 1)
    rows = []
    for k in range(planner.K):
        mu = position + (k - (planner.K - 1) / 2) * psi[1].exp()
        rows.append(Normal(mu, psi[2].exp()).log_prob(t).softmax(0))  # densities, with sum 1
    filters = torch.stack(rows)
    beta = torch.einsum("rt,kt->rk", A, filters)
    xi = torch.cat([beta.flatten(), z])
    for layer in (0, 2):
        xi = torch.tanh(planner.h[layer].weight @ xi + planner.h[layer].bias)
    patch = (planner.f_A.weight @ xi + planner.f_A.bias).view(planner.R, planner.K)
    moved = torch.cat([A[:, 1:], torch.zeros(planner.R, 1)], 1)
    psi_c = planner.f_c(torch.cat([psi, xi]).detach())
    mu = 1 + torch.sigmoid(psi_c[0]) * (planner.T - 2)
    new_c = torch.sigmoid(planner.b + 40 * Normal(mu, psi_c[2].exp()).log_prob(t).softmax(0))
    return moved + open_gate * (patch @ filters), torch.cat([new_c[:-1], torch.ones(1)])


@each_planner
def test_math_a_step_is_algorithm_1_and_a_closed_gate_only_shifts(model):
    planner = cell(model)
    plan, g = random_plan(5, 4, 20), torch.tensor([True, False, True, True, False])
    zeta, eps = torch.randn(5, 6).double(), torch.randn(5, planner.noise_size).double()
    out = one_step(planner, zeta, plan, g, eps)
    after = out.state
    for b in (0, 2, 3):
        A, c = plan_by_hand(planner, zeta[b], eps[b], plan.A[b], plan.c[b], 1.0)
        torch.testing.assert_close(after.A[b], A)
        torch.testing.assert_close(after.c[b], c)
    for b in (1, 4):
        assert torch.equal(after.A[b], straw.time_shift(plan.A[b]))
        assert torch.equal(after.c[b], straw.time_shift(plan.c[b]))
    assert (out.kl > 0) == (model == "strawe")
    if model == "strawe":
        _, kl = planner.channel(zeta, eps)
        torch.testing.assert_close(out.kl, kl[g].sum())
    torch.testing.assert_close(out.y[0], after.A[..., 0])
    torch.testing.assert_close(out.paid, after.c[:, 0].sum())


def test_math_a_long_plan_in_use_only_at_its_beginning_is_the_same_plan():
    """Three steps from an empty plan with narrow filters: what is cut off takes no part."""
    torch.manual_seed(0)
    planner = StrategicAttentiveWriter(6, 4, Args(model="straw", plan_length=300)).double()
    zeta, nothing = torch.randn(3, 1, 6).double(), torch.zeros(3, 1, 0)
    never, always = torch.zeros(3, 1).bool(), torch.ones(3, 1).bool()
    out = planner(zeta, nothing, never, planner.initial_plan(1), always)
    A, c = torch.zeros(4, 300).double(), torch.ones(300).double()
    for zeta_t, y_t in zip(zeta, out.y):
        A, c = plan_by_hand(planner, zeta_t[0], None, A, c, 1.0)
        torch.testing.assert_close(y_t[0], A[:, 0])
    torch.testing.assert_close(out.state.A[0], A)
    torch.testing.assert_close(out.state.c[0], c)
    theta = [*planner.f_psi.parameters(), *planner.h.parameters(), *planner.f_A.parameters()]
    weights = torch.randn(4, 300).double()
    for ours, theirs in zip(
        torch.autograd.grad((out.state.A[0] * weights).sum(), theta),
        torch.autograd.grad((A * weights).sum(), theta),
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradient_with_closed_gates_there_is_none():
    planner = cell()
    out = one_step(planner, torch.zeros(2, 6).double(), random_plan(2, 4, 20), [False, False])
    loss = out.state.A.sum() + out.state.c.sum() + out.y.sum() + out.kl + out.paid
    theta = list(planner.parameters())
    gradients = torch.autograd.grad(loss, theta, allow_unused=True) if loss.requires_grad else ()
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients)


def test_gradient_reaches_the_commitment_as_that_of_the_gate():
    """Two steps: d loss / d c_1 at the second replanning is d loss / d g (straight-through)."""
    planner = cell()
    plan = random_plan(1, 4, 20)
    c = plan.c.clone().requires_grad_()
    zeta, weights = torch.randn(1, 6).double(), torch.randn(4, 20).double()
    loss = (one_step(planner, zeta, Plan(plan.A, c), [True]).state.A[0] * weights).sum()
    (by_c,) = torch.autograd.grad(loss, c)
    gate = torch.ones((), dtype=torch.float64, requires_grad=True)
    A, _ = plan_by_hand(planner, zeta[0], None, plan.A[0], plan.c[0], gate)
    (by_gate,) = torch.autograd.grad((A * weights).sum(), gate)
    assert by_c[0, 1].item() == pytest.approx(by_gate.item()) and by_gate.item() != 0
    assert (by_c[0, [0, *range(2, 20)]] == 0).all()


def test_gradient_of_the_commitment_does_not_reach_the_planner():
    planner = cell()
    zeta = torch.randn(2, 6).double()
    plan = one_step(planner, zeta, random_plan(2, 4, 20), [True, True]).state
    theta = dict(planner.named_parameters())
    gradients = torch.autograd.grad(plan.c[:, :3].sum(), theta.values(), allow_unused=True)
    reached = {name for name, gradient in zip(theta, gradients) if gradient is not None}
    assert reached == {"b", "f_c.weight", "f_c.bias"}


def test_gradient_of_later_edits_teaches_the_earlier_commitment():
    planner = cell()
    plan = random_plan(1, 4, 20)
    for _ in range(2):
        plan = one_step(planner, torch.randn(1, 6).double(), plan, [True]).state
    (gradient,) = torch.autograd.grad(plan.A[..., 0].square().sum(), planner.b)
    assert gradient != 0


@pytest.mark.parametrize("begins", [False, True])
def test_gradient_does_not_cross_the_beginning_of_an_episode(begins):
    planner, (A, c) = cell(), random_plan(1, 4, 20)
    A, c = A.requires_grad_(), c.requires_grad_()
    fresh, g = torch.tensor([[False], [begins]]), torch.ones(2, 1).bool()
    out = planner(torch.randn(2, 1, 6).double(), torch.zeros(2, 1, 0), fresh, Plan(A, c), g)
    before = torch.autograd.grad(out.y[1].square().sum(), (A, c, planner.b), allow_unused=True)
    reached = [gradient is not None and bool((gradient != 0).any()) for gradient in before]
    assert reached == [not begins] * 3


def test_math_gates_are_bernoulli_of_entry_1():
    c_1 = torch.tensor([0.0, 0.2, 0.9, 1.0]).repeat(20_000)
    g = straw.draw_gates(c_1, torch.Generator().manual_seed(0)).view(-1, 4).float().mean(0)
    torch.testing.assert_close(g, torch.tensor([0.0, 0.2, 0.9, 1.0]), atol=0.015, rtol=0)
    assert g[0] == 0 and g[3] == 1


@pytest.mark.parametrize(("replan", "lengths"), [("always", {1}), ("random", {1, 2, 3, 4, 5})])
def test_math_ablations_commit_as_long_as_they_say(replan, lengths):
    torch.manual_seed(0)
    planner = StrategicAttentiveWriter(6, 4, Args(model="straw", replan=replan, **SMALL))
    age, seen = torch.zeros(500).long(), Counter()
    nothing, never = torch.zeros(40, 500, 0), torch.zeros(40, 500).bool()
    out = planner(torch.zeros(40, 500, 6), nothing, never, planner.initial_plan(500))
    for g in out.g:  # drawn from the plans themselves
        seen.update(age[g].tolist())
        age = torch.where(g, 1, age + 1)
    del seen[0]
    assert seen.keys() == lengths
    for count in seen.values():  # 6,000 macro-actions, each length as likely
        assert count / seen.total() == pytest.approx(1 / len(lengths), abs=0.02)


@pytest.mark.parametrize("b, chance", [(0.0, 0.5), (3.0, 0.953)])
def test_math_at_first_the_patch_is_the_next_k_steps_and_a_plan_lasts_five_at_most(b, chance):
    planner = StrategicAttentiveWriter(6, 4, Args(model="straw", commitment_bias=b))
    psi = planner.f_psi(torch.randn(3, 6))
    assert filters_of(psi, 10, 500).argmax(-1).tolist() == [list(range(10))] * 3
    assert (straw.attention_grid(psi, 10, 500, 500)[1] == 1).all()
    c = planner.commit(psi, torch.randn(3, 64))
    torch.testing.assert_close(c[:, 0], torch.full((3,), chance), atol=1e-3, rtol=0)
    assert (c[:, 5] > 0.999).all() and planner.T == 500 and straw.E == 40


# ---- Policies -----------------------------------------------------------------------------------


def policy(model: str, **flags):
    torch.manual_seed(1)
    args = straw.with_defaults(dataclasses.replace(Args(model=model, **TOY), **flags))
    net = straw.make_policy(args)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net, args


def some_rollout(net, args) -> straw.Rollout:
    envs = [straw.make_env(args) for _ in range(3)]
    return next(straw.rollouts(envs, [0, 1, 2], net, args.t_max))[0]


@each_model
def test_math_learning_replays_what_was_played(model):
    """The pass over a whole rollout gives what the steps gave one by one, across episodes."""
    net, args = policy(model, t_max=30)
    envs = [straw.make_env(args) for _ in range(3)]
    for played, _ in straw.rollouts(envs, [0, 1, 2], net, 30):
        if played.seen.fresh[1:].any() and len(played.r_t) == 30:
            break
    assert not any(part.requires_grad for part in played.state)
    whole = net(played.seen, played.state)
    state, replans = played.state, 0
    for n in range(30):
        step = net(straw.Seen(*(part[n : n + 1] for part in played.seen)), state)
        torch.testing.assert_close(step.y[0], whole.y[n])
        state, replans = step.state, replans + step.g.sum()
    assert replans == played.seen.g.sum()
    for ours, theirs in zip(whole.state, state):
        torch.testing.assert_close(ours, theirs)
    if model in ("straw", "strawe"):
        assert 0 < played.seen.g.float().mean() < 1


@each_planner
def test_math_an_episode_begins_with_an_empty_plan_that_is_replaced(model):
    net, _ = policy(model)
    plan = Plan(torch.randn(2, 5, 20), torch.zeros(2, 20))
    g, eps = net.draw(plan, torch.tensor([True, False]), None)
    assert g.tolist() == [True, False] and eps.shape == (2, net.straw.noise_size)
    assert net.draw(net.initial_state(3), torch.zeros(3).bool(), None)[0].all()
    s = torch.randint(0, 255, (2, 5, 5, 3), dtype=torch.uint8)
    seen = straw.Seen(s, torch.zeros(2).long(), torch.tensor([True, False]), g, eps)
    out = net(straw.Seen(*(part[None] for part in seen)), plan)
    other = Plan(plan.A + 1, plan.c)
    again = net(straw.Seen(*(part[None] for part in seen)), other)
    assert torch.equal(out.y[0, 0], again.y[0, 0])  # nothing is left of the plan before
    torch.testing.assert_close(out.y[0, 1], plan.A[1, :, 1])  # committed: its next column


@pytest.mark.parametrize("task, shape", [("maze", (7, 7, 3)), ("atari", (84, 84, 12))])
def test_math_features_begin_orthogonal(task, shape):
    layers = [m for m in straw.ImageFeatures(task, shape) if hasattr(m, "weight")]
    assert len(layers) == 3 and not any(layer.bias.any() for layer in layers)
    for layer in layers:
        W = layer.weight.detach().flatten(1)
        W = W if len(W) <= W.shape[1] else W.T
        torch.testing.assert_close(W @ W.T, 2 * torch.eye(len(W)), atol=1e-4, rtol=0)


@each_planner
def test_math_committed_steps_do_not_look(model):
    net, args = policy(model)
    played = some_rollout(net, args)
    looked_at = []
    net.features.register_forward_pre_hook(lambda _, x: looked_at.append(len(x[0])))
    economic = net(played.seen, played.state).y
    net.economic = False
    wasteful = net(played.seen, played.state).y
    torch.testing.assert_close(economic, wasteful)
    assert looked_at == [played.seen.g.sum(), played.seen.g.numel()]


def test_math_who_is_not_economic_looks_at_every_step():
    net, args = policy("straw", economic=False)
    looked_at = []
    net.features.register_forward_pre_hook(lambda _, x: looked_at.append(len(x[0])))
    played = some_rollout(net, args)
    assert set(looked_at) == {3} and not played.seen.g.all()
    looked_at.clear()
    net(played.seen, played.state)
    assert looked_at == [played.seen.g.numel()]


@pytest.mark.parametrize("task", ["maze", "atari"])
def test_math_features_are_two_convolutions_and_a_layer(task):
    shape = (7, 7, 3) if task == "maze" else (84, 84, 12)
    features = straw.ImageFeatures(task, shape)
    s = torch.randint(0, 256, (5, *shape), dtype=torch.uint8)
    w = [p.detach() for p in features.parameters()]
    strides = ({"padding": 1},) * 2 if task == "maze" else ({"stride": 4}, {"stride": 2})
    x = F.conv2d(s.permute(0, 3, 1, 2).float() / 255, w[0], w[1], **strides[0]).relu()
    x = F.conv2d(x, w[2], w[3], **strides[1]).relu().flatten(1)
    expected = (x @ w[4].T + w[5]).relu()
    torch.testing.assert_close(features(s).detach(), expected, atol=1e-5, rtol=1e-4)
    assert w[0].shape[-1] == (3 if task == "maze" else 8)


@each_model
def test_gradient_reaches_the_features_and_the_noise_that_is_paid_for(model):
    net, args = policy(model, replan="always" if model.startswith("straw") else "learned")
    rollout = some_rollout(net, args)
    parts = [net.features[0].weight]
    if model == "strawe":
        parts.append(net.straw.channel.mu_and_log_sigma.bias)
    gradients = []
    for noise_cost in (0.0, 10.0):
        loss, _ = straw.straw_loss(net, rollout, dataclasses.replace(args, noise_cost=noise_cost))
        gradients.append(torch.autograd.grad(loss, parts))
    assert all(g.abs().max() > 1e-6 for g in gradients[0])
    if model == "strawe":
        mu, sigma = noise_of(net.straw.channel, net.features(rollout.seen.s.flatten(0, 1)))
        expected = torch.cat([mu.sum(0), (5 * sigma**2 - 5).sum(0)])  # of the KL, 5 dimensions
        paid = (gradients[1][1] - gradients[0][1]) / 10
        torch.testing.assert_close(paid, expected.detach(), rtol=1e-2, atol=1e-2)


def test_math_who_always_replans_is_never_committed():
    net, args = policy("straw", replan="always", maze_size=7)
    assert straw.evaluate(net, args, 0)["eval/committed"] == 0
    _, visits, replans = straw.count_replans(net, args, 1)
    assert np.array_equal(visits, replans) and visits.sum() > 20


@pytest.mark.parametrize(("replan", "lengths"), [("always", {1}), ("random", {1, 2, 3, 4, 5})])
def test_math_ablations_hold_in_training_and_in_evaluation(replan, lengths):
    net, args = policy("strawe", replan=replan, maze_size=11)
    envs = [straw.make_env(args) for _ in range(2)]
    played = islice(straw.rollouts(envs, [0, 1], net, 40), 5)
    trained = torch.cat([rollout.seen.g for rollout, _ in played]).T.tolist()
    tested = [[] for _ in range(3)]
    for playing, seen, *_ in straw.whole_games(net, [Maze(11, 0.05) for _ in tested], 5):
        for k, g_t in zip(playing, seen.g.tolist(), strict=True):
            tested[k].append(g_t)
    for gates in (trained, tested):
        opened = [[t for t, g_t in enumerate(g) if g_t] for g in gates]
        assert {j - i for places in opened for i, j in pairwise(places)} == lengths


def test_math_the_lstm_sees_the_action_before_and_forgets_between_episodes():
    net, _ = policy("lstm")
    N = 4
    s = torch.randint(0, 255, (N, 1, 5, 5, 3), dtype=torch.uint8)
    a = torch.tensor([[2], [1], [3], [0]])
    fresh = torch.tensor([[False], [False], [True], [False]])
    seen = straw.Seen(s, a, fresh, torch.ones(N, 1).bool(), torch.zeros(N, 1, 0))
    h = c = torch.randn(1, 128)
    y = net(seen, (h, c)).y
    for n in range(N):
        keep = 0.0 if fresh[n, 0] else 1.0
        x = torch.cat([net.features(s[n]), keep * F.one_hot(a[n], 4)], 1)
        h, c = net.lstm(x, (keep * h, keep * c))
        torch.testing.assert_close(y[n], h @ net.head.weight.T + net.head.bias)


@pytest.mark.parametrize("entry", [0, 1])
@each_model
def test_math_the_loss_is_a3cs_with_a_clipped_advantage_and_the_costs(model, entry):
    net, args = policy(model, t_max=25, entropy_cost=0.3, value_cost=0.7, commitment_entry=entry)
    args = dataclasses.replace(args, noise_cost=0.2, commitment_cost=0.4, discount=0.8)
    played = some_rollout(net, args)
    played = played._replace(r_t=3 * torch.randn(played.r_t.shape))
    loss, watched = straw.straw_loss(net, played, args)
    out, expected, N = net(played.seen, played.state), 0.0, len(played.r_t)
    for k in range(3):
        for i in range(N):
            R, weight = 0.0, 1.0
            for j in range(i, N):
                R, weight = R + weight * played.r_t[j, k].item(), weight * 0.8
                if played.terminated[j, k] or played.truncated[j, k] or j == N - 1:
                    R += 0 if played.terminated[j, k] else weight * played.v_t[j, k].item()
                    break
            pi, advantage = Categorical(logits=out.y[i, k, :-1]), R - out.y[i, k, -1].item()
            expected -= pi.log_prob(played.a_tm1[i, k]).item() * max(-1, min(1, advantage))
            expected += 0.7 * advantage**2 / 2 - 0.3 * pi.entropy().item()
    state, kl, paid = played.state, 0.0, 0.0
    for n in range(N if model in ("straw", "strawe") else 0):
        step = net(straw.Seen(*(part[n : n + 1] for part in played.seen)), state)
        state = step.state
        paid += state[1][:, entry].sum().item()
        if model == "strawe":
            for k in played.seen.g[n].nonzero().flatten():
                zeta = net.features(played.seen.s[n, k][None])
                mu, sigma = noise_of(net.straw.channel, zeta)
                kl += kl_divergence(Normal(mu, sigma.expand_as(mu)), Normal(0.0, 1.0)).sum().item()
    assert loss.item() == pytest.approx(expected + 0.2 * kl + 0.4 * paid, rel=1e-3)
    assert watched["losses/commitment"] == pytest.approx(paid / (3 * N), rel=1e-4)
    committed = 100 * (1 - played.seen.g.float().mean().item())
    assert watched["charts/committed"] == pytest.approx(committed)
    replans = played.seen.g.sum().item()
    assert watched["losses/kl"] == pytest.approx(kl / replans, rel=1e-3)
    entropy = Categorical(logits=out.y[..., :-1]).entropy().mean().item()
    assert watched["losses/entropy"] == pytest.approx(entropy, rel=1e-4)


def test_math_the_value_row_bootstraps_but_not_past_the_goal():
    net, args = policy("straw", t_max=9)
    envs = [straw.make_env(args)]
    played = straw.rollouts(envs, [5], net, 9)
    for _ in range(12):
        state = torch.get_rng_state()
        rollout, _ = next(played)
        last = rollout.r_t[-1:]
        R = straw.n_step_returns(
            rollout.r_t, rollout.terminated, rollout.truncated, rollout.v_t, 0.5
        )
        if rollout.terminated[-1]:
            assert len(rollout.r_t) <= 9 and R[-1] == last
        else:
            torch.testing.assert_close(R[-1:], last + 0.5 * rollout.v_t[-1:])
            assert rollout.v_t[-1] != 0
        assert not torch.equal(state, torch.get_rng_state())


def test_math_a_rollout_that_is_cut_is_valued_at_the_state_reached():
    """A network whose value is the number of the agent's cell and whose gate is always open."""

    class Cells(torch.nn.Module):
        def initial_state(self, K):
            return ()

        def draw(self, state, fresh, generator):
            return torch.ones_like(fresh), torch.zeros(len(fresh), 0)

        def forward(self, seen, state):
            value = seen.s[..., 0].flatten(2).argmax(-1)[..., None].float()
            logits = torch.zeros(*value.shape[:2], 4)
            return straw.Output(torch.cat([logits, value], -1), (), seen.g, 0, 0)

    args = Args(**TOY)
    torch.manual_seed(0)
    played = straw.rollouts([straw.make_env(args)], [3], Cells(), 4)
    (before, _), moved = next(played), 0
    for _ in range(12):
        rollout, _ = next(played)
        if not before.terminated.any():
            here, there = (
                s[0, ..., 0].flatten().argmax() for s in (before.seen.s[-1], rollout.seen.s[0])
            )
            assert before.v_t[-1, 0] == there and (before.v_t[:-1] == 0).all()
            assert torch.equal(rollout.seen.a_before[0], before.a_tm1[-1])
            moved += bool(here != there)
        assert torch.equal(rollout.seen.a_before[1:], rollout.a_tm1[:-1])
        before = rollout
    assert moved


def test_math_rollouts_carry_states_actions_and_beginnings_across_their_ends():
    """A game of 3 steps that ends and one of 5 that is cut, in pieces of 4 or up to both ends."""
    lengths, cuts = (3, 5), (False, True)
    envs = [Counted(length, cut) for length, cut in zip(lengths, cuts)]
    t, a_before, finished = [0, 0], [0, 0], 0
    for played, games in islice(straw.rollouts(envs, [11, 22], Counting(), 4), 12):
        before, steps, over = finished, len(played.r_t), [False, False]
        for k in range(2):
            assert t[k] == 0 or played.state[0][k] == t[k]
        for n in range(steps):
            assert n == 0 or over != [True, True]
            for k, cut in enumerate(cuts):
                i = t[k]
                assert played.seen.s[n, k].item() == i and played.seen.fresh[n, k] == (i == 0)
                assert played.seen.g[n, k] == (i == 0 or i >= 3)
                assert played.seen.a_before[n, k] == a_before[k]
                assert played.a_tm1[n, k] == (i + 1) % 3 and played.r_t[n, k] == (-1) ** (i + 1)
                over[k] = i + 1 == lengths[k]
                assert played.terminated[n, k] == (over[k] and not cut)
                assert played.truncated[n, k] == (over[k] and cut)
                if (over[k] and cut) or (n == steps - 1 and not over[k]):
                    assert played.v_t[n, k] == told_at(i + 1)
                t[k], a_before[k] = (0 if over[k] else i + 1), (i + 1) % 3
                finished += over[k]
        assert steps == 4 or over == [True, True]
        assert len(games) == finished - before
    assert finished > 10 and sum(len(env.seeds) for env in envs) == 2 + finished
    assert envs[0].seeds[:2] == [11, None] and set(envs[1].seeds[1:]) == {None}


def test_math_whole_games_end_one_by_one_and_go_on_from_step_to_step():
    watched = []
    envs = [Counted(5, True), Counted(3, False)]
    steps = list(straw.whole_games(Counting(), envs, 1, lambda: watched.append(1)))
    assert [env.seeds for env in envs] == [[i] for i in straw.independent_seeds(2, 1)]
    assert [playing for playing, *_ in steps] == [[0, 1]] * 3 + [[0]] * 2 and len(watched) == 5
    for i, (playing, seen, out, ended) in enumerate(steps):
        assert (seen.fresh == (i == 0)).all()
        assert len(seen.s) == len(seen.g) == out.y.shape[1] == len(playing)
        for row in range(len(playing)):
            assert seen.s[row].item() == i and out.y[0, row, -1] == told_at(i)
            assert seen.g[row] == (i == 0 or i >= 3)
        over = {2: [(3, True)], 4: [(5, False)]}.get(i, [])
        assert [(info["episode"]["l"], info["solved"]) for info in ended] == over


@pytest.mark.parametrize("model", ["strawe", "lstm"])
def test_math_evaluation_repeats_itself_and_leaves_random_numbers_alone(model):
    net, args = policy(model)
    before = torch.get_rng_state()
    metrics = straw.evaluate(net, args, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert straw.evaluate(net, args, 0) == metrics


def test_math_the_noise_of_games_and_text_is_standard_normal():
    net, _ = policy("strawe")
    fresh, plan = torch.zeros(20_000).bool(), net.initial_state(20_000)
    told = [net.draw(plan, fresh, generator)[1] for generator in (None, torch.Generator())]
    reader = straw.TextModel(Args(**TEXT | {"model": "strawe"}))
    reader.straw.register_forward_pre_hook(lambda _, given: told.append(given[1]))
    x = torch.zeros(20, 1000).long()
    reader(x, reader.initial_state(1000))
    assert [tuple(eps.shape) for eps in told] == [(20_000, 5)] * 2 + [(20, 1000, 5)]
    for eps in told:
        eps = eps.flatten(0, -2)  # [20,000, d]
        torch.testing.assert_close(eps.mean(0), torch.zeros(5), atol=0.04, rtol=0)
        torch.testing.assert_close(eps.T.cov(), torch.eye(5), atol=0.06, rtol=0)


def test_math_flags_shape_mazes_and_readers():
    env = straw.make_env(Args(maze_size=7, maze_reward=0.2)).unwrapped
    assert (env.S, env.r) == (7, 0.2)
    for model, size in (("straw", 16), ("strawe", 16), ("lstm", 16), ("ff", 50)):
        net = straw.TextModel(Args(**TEXT | {"model": model}))
        assert net.size == size and (net.lstm is None or net.lstm.hidden_size == 16)


def test_math_rate_and_norm_are_those_of_the_task_unless_given():
    for task, expected in (("maze", (5e-4, 40)), ("atari", (5e-4, 40)), ("text", (1, 0.5))):
        args = straw.with_defaults(Args(task=task))
        assert (args.learning_rate, args.max_gradient_norm) == expected
        args = straw.with_defaults(Args(task=task, learning_rate=0.3, max_gradient_norm=7))
        assert (args.learning_rate, args.max_gradient_norm) == (0.3, 7)


@pytest.mark.parametrize("task", ["maze", "text"])
def test_gradient_is_scaled_down_to_the_norm_of_the_flag(task):
    net, args = policy("strawe", max_gradient_norm=1e-3)
    if task == "text":
        args = dataclasses.replace(args, **TEXT | {"model": "strawe", "noise_cost": 0.1})
        net, (x, y) = straw.TextModel(args), torch.randint(0, 50, (2, 10, 4))
        optimizer = straw.make_optimizer(net, args)
    theta, before = list(net.parameters()), [p.detach().clone() for p in net.parameters()]
    if task == "text":
        state = net.initial_state(4)
        torch.manual_seed(1)
        loss, _ = straw.text_loss(net(x, state), y, args)
    else:
        played, optimizer = some_rollout(net, args), straw.SharedRMSProp(theta, 1.0, 1.0)
        loss, _ = straw.straw_loss(net, played, args)
    gradients = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
    torch.manual_seed(1)  # the same gates and noise
    if task == "text":
        _, watched = straw.update_text(net, optimizer, x, y, state, 5.0, args)
    else:
        watched = straw.update(net, optimizer, played, 5.0, args)  # a step as that of SGD
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert norm > 1e-3 and watched["losses/gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert watched["charts/learning_rate"] == 5.0
    for p, b, g in zip(theta, before, gradients):
        torch.testing.assert_close(p.detach(), b - 5e-3 * g / norm, atol=1e-6, rtol=0)


def test_gradient_steps_of_text_are_adams_when_asked_for():
    """The first two moments begin at 0 and are corrected for it (Kingma and Ba, algorithm 1)."""
    args = straw.with_defaults(Args(**TEXT, optimizer="adam", max_gradient_norm=1e9))
    assert args.learning_rate == 1e-3 and straw.with_defaults(Args(**TEXT)).learning_rate == 1.0
    net, (x, y) = straw.TextModel(args), torch.randint(0, 50, (2, 10, 4))
    optimizer, theta = straw.make_optimizer(net, args), list(net.parameters())
    m, v = [0.0] * len(theta), [0.0] * len(theta)
    for t in (1, 2):
        before = [p.detach().clone() for p in theta]
        torch.manual_seed(t)
        loss, _ = straw.text_loss(net(x, net.initial_state(4)), y, args)
        gradients = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
        torch.manual_seed(t)  # the same gates
        straw.update_text(net, optimizer, x, y, net.initial_state(4), 0.02 / t, args)
        for i, (p, b, g) in enumerate(zip(theta, before, gradients)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            step = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            torch.testing.assert_close(p.detach(), b - 0.02 / t * step, atol=1e-5, rtol=1e-3)


def test_math_the_longest_extent_bounds_what_is_read_written_and_committed():
    net, args = policy("straw", max_extent=2.0)
    planner = net.straw
    with torch.no_grad():
        for layer in (planner.f_psi, planner.f_c):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([0.0, 9.0, 9.0]))
    psi = planner.f_psi(torch.zeros(1, planner.f_psi.in_features))
    mu, sigma = straw.attention_grid(psi, 4, planner.T, planner.max_extent)
    assert sigma.item() == pytest.approx(2)
    assert mu.diff().flatten().tolist() == pytest.approx([2, 2, 2])
    c = planner.commit(psi, torch.zeros(1, 64))[0, :-1]  # 7.9: 40 times the height of a Gaussian
    assert c.max().item() == pytest.approx(torch.sigmoid(planner.b + 7.98).item(), abs=1e-4)
    assert StrategicAttentiveWriter(6, 4, dataclasses.replace(args, max_extent=0)).max_extent == 20


@each_model
def test_gradient_moves_only_the_shared_network(model):
    net, args = policy(model)
    shared = straw.make_policy(args)
    before = [p.detach().clone() for p in net.parameters()]
    theta = [p.detach().clone() for p in shared.parameters()]
    optimizer = straw.SharedRMSProp(list(shared.parameters()), 1.0, 0.25)
    played = some_rollout(net, args)
    watched = straw.update(net, optimizer, played, 0.1, args)
    loss, _ = straw.straw_loss(net, played, args)
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    scale = min(1, 40 / watched["losses/gradient_norm"])
    for p, b, s, t, g in zip(net.parameters(), before, shared.parameters(), theta, gradients):
        assert torch.equal(p, b) and p.grad is None
        moved = t if g is None else t - 0.1 * scale * g / 0.5
        torch.testing.assert_close(s.detach(), moved, atol=1e-5, rtol=1e-3)


def test_gradient_that_does_not_exist_or_is_not_finite_moves_nothing():
    net, args = policy("straw", t_max=5)
    theta = [p.detach().clone() for p in net.parameters()]
    optimizer = straw.SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    played = some_rollout(net, args)
    closed = played.seen._replace(
        g=played.seen.g & False, eps=played.seen.eps, fresh=played.seen.fresh & False
    )
    straw.update(net, optimizer, played._replace(seen=closed), 0.1, args)
    infinite = played._replace(r_t=torch.full_like(played.r_t, math.inf))
    watched = straw.update(net, optimizer, infinite, 0.1, args)
    assert not math.isfinite(watched["losses/gradient_norm"])
    assert all(torch.equal(p, t) for p, t in zip(net.parameters(), theta))


def test_math_defaults_are_the_papers():
    args = Args()
    assert (args.plan_length, args.plan_filters, args.noise_size, args.t_max) == (500, 10, 128, 40)
    assert 1e-7 <= args.noise_cost <= 1e-4 and 1e-6 <= args.commitment_cost <= 1e-2
    assert 1e-4 <= args.entropy_cost <= 1e-3 and args.total_timesteps == 500_000_000
    assert (args.commitment_cost, args.noise_cost, args.entropy_cost) == (1e-3, 1e-5, 1e-3)
    assert (args.discount, args.value_cost) == (0.99, 0.5)
    assert (args.rmsprop_decay, args.rmsprop_eps) == (0.99, 0.1) and straw.OPENED == 0.1
    net = straw.StrawPolicy(9, (84, 84, 12), Args(task="atari"))
    sizes = [tuple(layer.weight.shape) for layer in net.features if hasattr(layer, "weight")]
    assert sizes == [(16, 12, 8, 8), (32, 16, 4, 4), (128, 2592)]
    assert [layer.out_features for layer in net.straw.h if hasattr(layer, "weight")] == [64, 64]


# ---- The games ----------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [5, 11, 15])
def test_math_mazes_are_closed_and_connected_and_measured_like_by_brute_force(S):
    random = np.random.default_rng(S)
    walls = straw.carve(S, random)
    assert walls[[0, -1]].all() and walls[:, [0, -1]].all() and not walls[1::2, 1::2].any()
    cells = [tuple(c) for c in np.argwhere(~walls).tolist()]
    steps = np.full((len(cells), len(cells)), np.inf)
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            if abs(a[0] - b[0]) + abs(a[1] - b[1]) <= 1:
                steps[i, j] = float(i != j)
    for k in range(len(cells)):  # Floyd and Warshall
        steps = np.minimum(steps, steps[:, k : k + 1] + steps[k])
    goal = int(random.integers(len(cells)))
    found = straw.distances(walls, cells[goal])
    assert [found[c] for c in cells] == steps[goal].tolist()
    assert (found[walls] == -1).all()


def test_math_doors_open_in_both_directions(monkeypatch):
    monkeypatch.setattr(straw, "OPENED", 1.0)
    walls = straw.carve(9, np.random.default_rng(0))
    assert not walls[1:-1:2, 1:-1].any() and not walls[1:-1, 1:-1:2].any()
    assert walls[2:-2:2, 2:-2:2].all() and walls[[0, -1]].all() and walls[:, [0, -1]].all()


def test_math_mazes_differ_and_some_have_two_ways():
    random = np.random.default_rng(0)
    mazes = [straw.carve(11, random) for _ in range(20)]
    assert len({maze.tobytes() for maze in mazes}) == 20
    edges = [sum(len(straw.neighbours(m, tuple(c))) for c in np.argwhere(~m)) / 2 for m in mazes]
    loops = [e - (~m).sum() + 1 for e, m in zip(edges, mazes)]  # of a tree there are none
    assert min(loops) >= 0 and max(loops) > 0


@pytest.mark.parametrize("walk", [1, 2, 5, 8])
def test_math_curriculum_goals_are_ends_of_walks(walk):
    env = Maze(11, 0.1)
    env.walk, found = walk, set()
    for seed in range(150):
        env.reset(seed=seed)
        found.add(int(straw.distances(env.walls, env.goal)[env.agent]))
    assert 0 not in found and max(found) <= walk and all(d % 2 == walk % 2 for d in found)
    assert walk in found
    walks, args = [], Args(curriculum_period=100)
    for step in (0, 99, 100, 250):
        straw.set_curriculum([env], args, step)
        walks.append(env.walk)
    assert walks == [2, 2, 3, 4]
    never = Maze(11, 0.1)
    straw.set_curriculum([never], Args(), 10**9)
    assert never.walk == 0


def test_math_without_curriculum_goals_are_anywhere():
    env, pairs = Maze(5, 0.1), Counter()
    walls = straw.carve(5, np.random.default_rng(0))
    env.given_walls = walls
    for seed in range(600):
        env.reset(seed=seed)
        assert np.array_equal(env.walls, walls)
        pairs[env.agent, env.goal] += 1
    n = int((~walls).sum())
    assert len(pairs) == n * (n - 1)


def test_math_maze_rewards_and_ends():
    walls = np.ones((5, 5), bool)
    walls[1, 1:4] = walls[2, 3] = walls[3, 3] = False
    env = Maze(5, 0.25, walls)
    env.reset(seed=0)
    env.agent, env.goal = (1, 1), (3, 3)
    up, right, down, left = range(4)
    rewards, cells = [], []
    for a in (up, right, down, right, down, left, down):
        image, r, terminated, truncated, _ = env.step(a)
        rewards.append(r)
        cells.append(tuple(np.argwhere(image[..., 0])[0].tolist()))
        assert not truncated
    assert rewards == [-0.5, -0.25, -0.5, -0.25, -0.25, -0.5, 0.25] and terminated
    assert cells == [(1, 1), (1, 2), (1, 2), (1, 3), (2, 3), (2, 3), (3, 3)]
    env.reset(seed=1)
    env.goal = (0, 0)  # a wall
    ends = [env.step(up)[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


def test_math_the_optimal_return_is_that_of_walking_downhill():
    env = Maze(11, 0.1)
    for seed in range(30):
        env.reset(seed=seed)
        steps, total, terminated = straw.distances(env.walls, env.goal), 0.0, False
        while not terminated:
            here = env.agent
            around = [(here[0] + i, here[1] + j) for i, j in straw.MOVES.values()]
            best = min(range(4), key=lambda a: (steps[around[a]] < 0, steps[around[a]]))
            _, r, terminated, *_, info = env.step(best)
            total += r
        assert terminated and total == pytest.approx(info["optimal"])


def test_math_maze_image():
    env = Maze(7, 0.1)
    image, _ = env.reset(seed=0)
    assert image.shape == (7, 7, 3) and (image[..., 2] == 255 * env.walls).all()
    assert np.argwhere(image[..., 0]).tolist() == [list(env.agent)]
    assert np.argwhere(image[..., 1]).tolist() == [list(env.goal)]


def test_math_atari_screens_are_colour_and_stacked():
    env = straw.make_env(Args(task="atari", env_id="BreakoutNoFrameskip-v4"))
    s, _ = env.reset(seed=0)
    assert s.shape == (84, 84, 12) and s.dtype == np.uint8
    assert (s[..., 9] != s[..., 10]).any()  # not grey
    following = env.step(1)[0]
    assert np.array_equal(following[..., :9], s[..., 3:])


def test_math_atari_is_played_as_by_dqn():
    args = Args(task="atari", env_id="BreakoutNoFrameskip-v4")
    for training in (True, False):
        env, starts = straw.make_env(args, training), []
        layers = [layer := env] + [layer := layer.env for _ in range(4)]
        assert any(isinstance(x, straw.EpisodicLife) for x in layers) == training
        assert env.unwrapped.spec.kwargs["max_num_frames_per_episode"] == 108_000
        for seed in range(20):
            env.reset(seed=seed)
            starts.append(env.unwrapped.ale.getEpisodeFrameNumber())
        assert min(starts) >= 1 and max(starts) <= 30 and len(set(starts)) > 8
        env.step(1)
        assert env.unwrapped.ale.getEpisodeFrameNumber() == starts[-1] + 4


def test_math_commitments_are_counted_as_in_a_loop():
    torch.manual_seed(0)
    fresh = torch.rand(300, 3) < 0.02  # episodes begin with a plan
    fresh[0] = True
    g = (torch.rand(300, 3) < 0.1) | fresh
    histogram, age = torch.zeros(straw.PERIODS, straw.LONGEST + 1).long(), torch.zeros(3).long()
    for i, (steps, begins) in enumerate(zip(g.split(40), fresh.split(40))):
        age = straw.count_commitments(histogram, i / 7, steps, begins, age)
    expected = Counter()
    for b in range(3):
        opened = g[:, b].nonzero().flatten().tolist()
        ended = [(i, j) for i, j in pairwise(opened) if not fresh[j, b]]
        assert 0 < len(ended) < len(opened) - 1
        expected.update(min(straw.LONGEST, j - i) for i, j in ended)
    assert {i: n for i, n in enumerate(histogram.sum(0).tolist()) if i and n} == expected
    periods = histogram.sum(1).nonzero().flatten().tolist()
    assert periods == [min(49, int(50 * i / 7)) for i in range(8)]


@pytest.mark.parametrize("junction", [False, True])
def test_math_replan_rates_of_a_hand_made_maze(junction):
    walls = np.ones((5, 5), bool)
    walls[1, 1:4] = walls[2, 3] = walls[3, 3] = False  # an L: dead end, straight, corner, straight
    walls[0, 2] = not junction
    visits, replans = np.zeros((5, 5)), np.zeros((5, 5))
    for c, of, n in ([(1, 1), 9, 9], [(1, 2), 10, 1], [(1, 3), 4, 3], [(2, 3), 10, 2]):
        visits[c], replans[c] = of, n
    maze = np.stack([walls, visits, replans])
    still = np.stack([walls, visits, 0 * replans])
    turns, corridors = (400 / 14, 20.0) if junction else (75.0, 15.0)
    for mazes, n in (([maze], 1), ([maze, still], 2)):
        rates = straw.replan_rates(mazes)
        assert rates["eval/replans_at_turns"] == pytest.approx(turns / n)
        assert rates["eval/replans_in_corridors"] == pytest.approx(corridors / n)
        assert rates["eval/replans_at_turns_std"] == pytest.approx(turns / 2 * (n - 1))
        assert rates["eval/replans_in_corridors_std"] == pytest.approx(corridors / 2 * (n - 1))
        assert len(rates) == 4


def pictures(monkeypatch) -> list[tuple]:
    """What is given to imshow from now on, with its keywords."""
    shown, imshow = [], matplotlib.axes.Axes.imshow

    def showing(axes, image, **how):
        shown.append((np.array(image), how))
        return imshow(axes, image, **how)

    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", showing)
    return shown


def test_math_the_map_of_replans_has_rows_downwards(tmp_path, monkeypatch):
    shown, random = pictures(monkeypatch), np.random.default_rng(0)
    walls, visits = straw.carve(7, random).astype(int), random.integers(1, 9, (7, 7))
    visits[3, 1], replans = 0, random.integers(0, 3, (7, 7))
    straw.draw_replans(np.stack([walls, visits, replans]), tmp_path / "replans.png")
    (below, _), (share, how) = shown
    assert np.array_equal(np.isnan(below), walls == 0) and "origin" not in how
    assert np.isnan(share[3, 1]) and np.isnan(share).sum() == 1
    for i, j in np.argwhere(visits > 0):
        assert share[i, j] == pytest.approx(replans[i, j] / visits[i, j])


def test_math_the_picture_of_commitments_is_in_percent_of_each_period(tmp_path, monkeypatch):
    shown, histogram = pictures(monkeypatch), torch.zeros(straw.PERIODS, straw.LONGEST + 1).long()
    histogram[3, :4] = torch.tensor([9, 1, 0, 3])  # age 0: there was no macro-action
    histogram[49, 40] = 5
    limits, set_limits = [], matplotlib.axes.Axes.set_ylim
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_ylim", lambda *a, **b: (limits.append(a), set_limits(*a, **b))[1]
    )
    straw.draw_commitments(histogram, tmp_path / "commitments.png")
    assert limits[-1][1:] == ((0.5, 40.5),)
    ((percent, how),) = shown
    assert percent.shape == (40, 50) and how["origin"] == "lower"  # length 1 lies lowest
    assert how["extent"] == (0, 100, 0.5, 40.5)
    found = {(i + 1, j): percent[i, j] for i, j in np.argwhere(percent)}
    assert found == {(1, 3): 25, (3, 3): 75, (40, 49): 100}


@pytest.mark.parametrize("task", ["maze", "atari"])
def test_math_the_film_shows_one_game_after_another_as_in_evaluation(task, tmp_path, monkeypatch):
    """The newest screen, the policy that is planned without V, and c; a second game from step 3."""
    flags = {"task": task, "env_id": "test_straw:Tint-v0", "curriculum_period": 10}
    net, args = policy("straw", **flags)
    make_env, whole_games, games, kept, shown = straw.make_env, straw.whole_games, [], [], []
    titles = []

    def make_one(*arguments, **how):
        games.append(how)
        return make_env(*arguments, **how)

    def short_games(net, envs, seed):
        games.append((seed, getattr(envs[0].unwrapped, "walk", None)))
        for playing, seen, out, ended in islice(whole_games(net, envs, seed), 3):
            kept.append((seen, out))
            yield playing, seen, out, ended

    set_data = matplotlib.image.AxesImage.set_data

    def show(axes, image):
        shown.append(np.array(image))
        set_data(axes, image)

    monkeypatch.setattr(matplotlib.image.AxesImage, "set_data", show)
    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", lambda _, title: titles.append(title))
    monkeypatch.setattr(straw, "make_env", make_one)
    monkeypatch.setattr(straw, "whole_games", short_games)
    monkeypatch.setattr(straw, "FILMED_STEPS", 4)
    straw.film_plan(net, args, 25, tmp_path / "plan.gif")
    walk = 4 if task == "maze" else None
    assert games == [{"training": False}, (args.seed, walk), (args.seed + 1, walk)]
    assert len(kept) == 4 and len(shown) == 3 + 3 * 4  # three when the axes are made
    replanned = [bool(seen.g[0]) for seen, _ in kept]
    assert ["replans" in title for title in titles] == replanned
    assert ["is committed" in title for title in titles] == [not g for g in replanned]
    for (seen, out), screen, planned, c in zip(kept, shown[3::3], shown[4::3], shown[5::3]):
        assert np.array_equal(screen, seen.s[0, ..., -3:])
        logits = out.state.A[0, :-1, :20].double()
        np.testing.assert_allclose(planned, Categorical(logits=logits.T).probs.T, atol=1e-6)
        np.testing.assert_array_equal(c, out.state.c)


def test_math_replans_are_counted_where_the_agent_stands():
    net, args = policy("straw", maze_size=7)
    counted = straw.count_replans(net, args, 3)
    walls, visits, replans = counted
    assert np.array_equal(walls, straw.carve(7, np.random.default_rng(3)))
    assert (visits[walls > 0] == 0).all()
    envs, steps = [Maze(7, args.maze_reward, walls > 0) for _ in range(args.eval_episodes)], []
    for _, seen, *_ in straw.whole_games(net, envs, 3):
        steps += seen.g.tolist()
    first = args.eval_episodes  # steps, which always plan
    assert visits.sum() == len(steps) - first > 20 and all(steps[:first])
    assert (replans <= visits).all() and replans.sum() == sum(steps) - first < visits.sum()
    assert np.array_equal(counted, straw.count_replans(net, args, 3))


# ---- Text ---------------------------------------------------------------------------------------


def test_math_alphabet_holds_the_49_most_frequent_characters():
    letters = [chr(0x4E00 + i) for i in range(60)]
    text = "".join(letter * (100 - i) for i, letter in enumerate(letters)) * 3
    alphabet, train, test = straw.encode(text)
    assert alphabet[:49] == "".join(letters[:49]) and len(alphabet) == 50
    whole = torch.cat([train, test]).tolist()
    expected = "".join(c if c in letters[:49] else straw.OTHER for c in text)
    assert "".join(alphabet[i] for i in whole) == expected
    assert len(train) == len(text) * 9 // 10
    late = straw.encode("ab" * 450 + "c" * 100)[0]
    assert late.startswith("ab") and "c" not in late  # the rest is not looked at


def test_math_text_is_read_side_by_side():
    columns = straw.side_by_side(torch.arange(23), 4)
    assert columns.T.tolist() == [list(range(5 * b, 5 * b + 5)) for b in range(4)]


def test_math_macro_actions_are_those_of_a_loop():
    torch.manual_seed(0)
    written, g = torch.randint(0, 3, (200, 2)), torch.rand(200, 2) < 0.3
    for length in (1, 3, 4):
        expected = Counter()
        for b in range(2):
            for i, j in pairwise(g[:, b].nonzero().flatten().tolist()):
                if j - i == length:
                    expected[tuple(written[i:j, b].tolist())] += 1
        assert straw.macro_actions(written, g, length) == expected and expected


def test_math_ranks_of_macro_actions():
    codes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3])
    occurring = straw.ngrams(codes, 2)
    assert occurring == {(0, 1): 3, (1, 2): 2, (2, 0): 2, (1, 3): 1}
    used = Counter({(1, 2): 9, (0, 1): 5, (3, 3): 4})
    rows = straw.rank_macro_actions(used, occurring, "abcd")
    assert rows == [(1, "bc", 9, 2, 2), (2, "ab", 5, 1, 3), (3, "dd", 4, 5, 0)]
    metrics = straw.macro_action_metrics(rows, 2)
    expected = spearmanr([-9, -5, -4], [2, 1, 5]).statistic
    assert metrics["eval/macro_2_rank_correlation"] == pytest.approx(expected)
    assert metrics["eval/macro_2_frequent"] == 100
    assert straw.macro_action_metrics([], 3) == {}
    rows = [(1, "abc", 9, 100, 7), (2, "abd", 5, 101, 6)]
    assert straw.macro_action_metrics(rows, 3)["eval/macro_3_frequent"] == 50
    assert straw.macro_action_metrics(rows, 3)["eval/macro_3_strings"] == 2
    used = Counter({(i,): 99 - i for i in range(30)})
    rows = straw.rank_macro_actions(used, Counter(), "x" * 30)
    assert [row[0] for row in rows] == list(range(1, 21))


def test_math_rank_correlation_is_spearmans():
    x, y = np.random.default_rng(0).integers(0, 8, (2, 20))
    assert straw.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)


@each_model
def test_math_text_goes_on_from_piece_to_piece(model):
    """With gates that are not random, two halves give what the whole gives."""
    torch.manual_seed(0)
    replan = "always" if model in ("straw", "strawe") else "learned"
    net = straw.TextModel(Args(**(TEXT | {"model": model, "replan": replan, "noise_size": 0})))
    x = torch.randint(0, 50, (12, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if model == "strawe":
        torch.nn.init.constant_(net.straw.channel.mu_and_log_sigma.bias, -30)  # noise_size is 0
    whole = net(x, net.initial_state(4))
    first = net(x[:5], net.initial_state(4))
    second = net(x[5:], first.state)
    torch.testing.assert_close(torch.cat([first.y, second.y]), whole.y)
    assert whole.g.all()
    if model == "ff":
        torch.testing.assert_close(net(x[5:6], ()).y, whole.y[5:6])
    else:
        assert not torch.allclose(net(x[5:], net.initial_state(4)).y, whole.y[5:])


def test_math_the_loss_of_text_is_a_mean_with_the_costs():
    torch.manual_seed(0)
    out = straw.Output(
        torch.randn(3, 2, 50), (), torch.ones(3, 2).bool(), torch.tensor(7.0), torch.tensor(4.0)
    )
    y = torch.randint(0, 50, (3, 2))
    loss, watched = straw.text_loss(out, y, Args(noise_cost=0.1, commitment_cost=0.2))
    nll = -Categorical(logits=out.y).log_prob(y).mean().item()
    assert loss.item() == pytest.approx(nll + (0.1 * 7 + 0.2 * 4) / 6, rel=1e-5)
    assert watched["losses/bits_per_character"] == pytest.approx(nll / math.log(2), rel=1e-5)


def random_text(length: int) -> str:
    """Its last tenth has other n-grams than what is before it."""
    random, cut = np.random.default_rng(0), length * 9 // 10
    parts = random.integers(0, 9, cut), random.choice(9, length - cut, p=np.arange(9) / 36)
    return "".join("abcdefghi"[i] for part in parts for i in part)


@pytest.mark.parametrize("model", ["straw", "lstm"])
def test_math_text_is_tested_on_its_rest_as_one_long_piece(model, tmp_path):
    args, text = Args(**TEXT | {"model": model}, seed=3), straw.encode(random_text(4000))
    torch.manual_seed(0)
    net, (alphabet, train, test) = straw.TextModel(args), text
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    before = torch.get_rng_state()
    histogram = torch.zeros(straw.PERIODS, straw.LONGEST + 1).long()
    metrics = straw.evaluate_text(net, args, text, histogram, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)

    columns = test[:400].view(4, 100).T
    torch.manual_seed(3)
    with torch.no_grad():
        out = net(columns[:-1], net.initial_state(4))
    nll = -Categorical(logits=out.y).log_prob(columns[1:]).mean().item()
    assert metrics["eval/bits_per_character"] == pytest.approx(nll / math.log(2), rel=1e-5)
    committed = 100 * (1 - out.g.float().mean().item())
    assert metrics["eval/committed"] == pytest.approx(committed)
    assert (committed == 0) == (model == "lstm")
    if model == "straw":
        written = out.y.argmax(-1)
        expected = [["length", "rank", "string", "uses", "true_rank", "occurrences"]]
        for length in (3, 4):
            used, of = straw.macro_actions(written, out.g, length), straw.ngrams(train, length)
            rows = straw.rank_macro_actions(used, of, alphabet)
            assert (
                len(rows) > 1
                and metrics.items() >= straw.macro_action_metrics(rows, length).items()
            )
            expected += [[str(entry) for entry in (length, *row)] for row in rows]
        with open(tmp_path / "macro_actions.csv", encoding="utf-8") as file:
            assert list(csv.reader(file)) == expected


def test_math_the_picture_of_macro_actions_has_ranks_by_use_along_x(tmp_path, monkeypatch):
    points, labels = [], []
    axes, plot = matplotlib.axes.Axes, matplotlib.axes.Axes.plot
    monkeypatch.setattr(axes, "plot", lambda *a, **b: (points.append(a[1:3]), plot(*a, **b))[1])
    monkeypatch.setattr(axes, "text", lambda _, *a, **how: labels.append(a))
    tables = {3: [(1, "a c", 9, 70, 3)], 4: [(1, "abcd", 8, 5, 40), (2, "bc\nd", 7, 6, 39)]}
    straw.draw_macro_actions(tables, tmp_path / "macro_actions.png")
    assert points == [(1, 70), (1, 5), (2, 6)]
    assert labels == [(1, 70, " a_c"), (1, 5, " abcd"), (2, 6, r" bc\nd")]


def test_math_text_is_learned_in_order_again_and_again_at_a_falling_rate(tmp_path, monkeypatch):
    """7 pieces, and again: 16 in all, a second each. Reported are means since the report before."""
    (tmp_path / "text.txt").write_text(random_text(330))
    args = Args(**TEXT, text_file=str(tmp_path / "text.txt"), run_dir=str(tmp_path / "run"))
    args = dataclasses.replace(args, learning_rate=2.0, total_timesteps=16 * 40)
    pieces, tested = [], []

    def update_text(net, optimizer, x, y, state, learning_rate, _):
        out = net(x, state)
        pieces.append((x, y, state, learning_rate, out))
        return out, {"losses/piece": float(len(pieces))}

    def evaluate_text(net, given, text, *_):
        tested.append(text)
        return {"eval/pieces": len(pieces)}

    monkeypatch.setattr(straw, "update_text", update_text)
    monkeypatch.setattr(straw, "evaluate_text", evaluate_text)
    clock = SimpleNamespace(time=time.time, perf_counter=lambda: len(pieces))
    monkeypatch.setattr(straw, "time", clock)
    main(dataclasses.replace(args, report_every=160, eval_every=240))
    text = straw.encode(random_text(330))
    columns, start = straw.side_by_side(text[1], 4), straw.TextModel(args).initial_state(4)
    expected, opened, now = Counter(), {}, 0
    for i, (x, y, state, learning_rate, out) in enumerate(pieces):
        place = i % 7 * 10
        assert torch.equal(x, columns[place : place + 10])
        assert torch.equal(y, columns[place + 1 : place + 11])
        assert learning_rate == pytest.approx(2 * (1 - i / 16))
        before = pieces[i - 1][-1].state if place else start
        if not place:  # what the text's end cuts off does not count
            opened.clear()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(state, before, strict=True))
        assert not any(part.requires_grad for part in state)
        for g_t in out.g:
            for b in g_t.nonzero().flatten().tolist():
                length = min(40, now - opened.get(b, now))
                expected[min(49, 50 * (i + 1) // 16), length] += 1
                opened[b] = now
            now += 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt")
    found = {
        (i, n): of[n].item() for i, of in enumerate(checkpoint["histogram"]) for n in range(1, 41)
    }
    assert {place: n for place, n in found.items() if n} == {
        p: n for p, n in expected.items() if p[1]
    }
    assert len(pieces) == 16 and checkpoint["T"] == 640
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = [(int(step), tag, float(value)) for step, tag, value in csv.reader(file)]
    tags = ("losses/piece", "eval/pieces", "charts/SPS")
    told = {tag: [row[::2] for row in rows if row[1] == tag] for tag in tags}
    assert told["losses/piece"] == [(160, 2.5), (320, 6.5), (480, 10.5), (640, 14.5)]
    assert told["eval/pieces"] == [(320, 8), (480, 12), (640, 16)]
    assert told["charts/SPS"] == [(160, 40), (320, 40), (480, 40), (640, 40)]
    for theirs in tested:
        assert all(torch.equal(a, b) for a, b in zip(theirs[1:], text[1:]))


def test_math_time_spent_before_counts_when_text_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(straw, "evaluate_text", lambda *_: {})
    args = Args(**TEXT, text_file=periodic_text(tmp_path), total_timesteps=40)
    main(dataclasses.replace(args, run_dir=str(tmp_path)))
    path = tmp_path / "checkpoint.pt"
    straw.save_checkpoint(path, **torch.load(path) | {"seconds": 6000.0})
    on = main(dataclasses.replace(args, resume=str(path), total_timesteps=80))
    assert 100 < on["charts/minutes"] < 101


def periodic_text(folder: Path) -> str:
    path = folder / "text.txt"
    path.write_text("abac" * 400, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("model", "learning_rate"), [("straw", 1.0), ("lstm", 2.0)])
def test_learns_a_periodic_text(model, learning_rate, tmp_path):
    """Without memory of the last two characters it has half a bit: after a comes b or c."""
    args = Args(**TEXT | {"model": model}, text_file=periodic_text(tmp_path))
    args = dataclasses.replace(args, total_timesteps=7000, learning_rate=learning_rate)
    args = dataclasses.replace(args, run_dir=str(tmp_path / "run"))
    metrics = main(args)
    assert metrics["eval/bits_per_character"] < 0.35
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    pictures = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.png")}
    again = dataclasses.replace(args, evaluate=checkpoint, run_dir="", total_timesteps=10**6)
    evaluated = main(again)
    assert evaluated == {tag: metrics[tag] for tag in evaluated}
    if model == "straw":
        assert {path.name for path in pictures} == {"commitments.png", "macro_actions.png"}
        for path, before in pictures.items():
            assert path.read_bytes() == before and Image.open(path).size[0] > 100
        with open(tmp_path / "run" / "macro_actions.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert all(len(row["string"]) == int(row["length"]) for row in rows)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_learns_on_as_if_it_had_not_been_interrupted(optimizer, tmp_path, monkeypatch):
    args = Args(**TEXT, text_file=periodic_text(tmp_path), total_timesteps=1200, report_every=400)
    args = dataclasses.replace(args, optimizer=optimizer, max_extent=2.0)
    main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    report = straw.report

    def stopping(*arguments):
        report(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="Stopped; go on with"):
        patch.setattr(straw, "report", stopping)
        main(dataclasses.replace(args, run_dir=str(tmp_path / "halves")))
    halves = str(tmp_path / "halves" / "checkpoint.pt")
    assert torch.load(halves)["T"] == 400
    main(dataclasses.replace(args, resume=halves))
    whole, halves = torch.load(tmp_path / "whole" / "checkpoint.pt"), torch.load(halves)
    assert whole["T"] == halves["T"] == 1200 and whole["net"].keys() == halves["net"].keys()
    for name in whole["net"]:
        assert torch.equal(whole["net"][name], halves["net"][name])
    for part in ("rng", "histogram", "age"):
        assert torch.equal(whole[part], halves[part])
    moments = whole["optimizer"]["state"]
    assert len(moments) == (len(whole["net"]) if optimizer == "adam" else 0)
    other = {"optimizer": {"sgd": "adam", "adam": "sgd"}[optimizer], "total_timesteps": 1600}
    with pytest.raises(SystemExit, match=f"with --optimizer {optimizer}, not with"):
        main(dataclasses.replace(args, resume=str(tmp_path / "halves" / "checkpoint.pt"), **other))
    assert all(torch.equal(a, b) for a, b in zip(whole["state"], halves["state"], strict=True))
    told = []
    for folder in ("whole", "halves"):
        rows = (tmp_path / folder / "metrics.csv").read_text().splitlines()
        told.append([row for row in rows if "charts/SPS" not in row and "minutes" not in row])
    assert told[0] == told[1]


def test_learns_text_to_its_end_then_ctrl_c_advises_to_evaluate(tmp_path, monkeypatch):
    monkeypatch.setattr(straw, "evaluate_text", Mock(side_effect=KeyboardInterrupt))
    args = Args(**TEXT, text_file=periodic_text(tmp_path), total_timesteps=40)
    with pytest.raises(SystemExit, match=r"Stopped; evaluate with --evaluate .*checkpoint.pt"):
        main(dataclasses.replace(args, run_dir=str(tmp_path)))


def test_learns_to_commit_when_replanning_costs_and_to_replan_when_it_is_free(tmp_path):
    """On text in which every character matters: lambda 0 shortens and 3 lengthens commitments."""
    committed = {}
    for cost in (0.0, 3.0):
        args = Args(**TEXT, text_file=periodic_text(tmp_path), commitment_cost=cost)
        args = dataclasses.replace(args, total_timesteps=2000, report_every=400)
        main(dataclasses.replace(args, run_dir=str(tmp_path / str(cost))))
        with open(tmp_path / str(cost) / "metrics.csv") as file:
            rows = list(csv.reader(file))
        told = [float(value) for _, tag, value in rows if tag == "charts/committed"]
        committed[cost] = told[0], told[-1]
    assert committed[0.0][1] < committed[0.0][0] - 5 and committed[0.0][1] < 10
    assert committed[3.0][1] > committed[3.0][0] + 5 and committed[3.0][1] > 80


# ---- Runs ---------------------------------------------------------------------------------------


def test_learns_something_in_processes_then_evaluates_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(straw, "FILMED_STEPS", 8)
    args = Args(**TOY, envs_per_worker=2, t_max=3, total_timesteps=800, report_every=300)
    args = dataclasses.replace(args, run_dir=str(tmp_path), curriculum_period=500)
    metrics = main(args)
    assert multiprocessing.active_children() == []
    assert -10 < metrics["eval/episodic_return"] <= metrics["eval/optimal_return"] < 0.1
    assert {"eval/replans_at_turns", "eval/replans_in_corridors", "eval/committed"} <= set(metrics)
    for name in ("replans.png", "commitments.png", "plan.gif"):
        assert Image.open(tmp_path / name).size[0] > 100
    assert Image.open(tmp_path / "plan.gif").n_frames == 8
    with open(tmp_path / "metrics.csv") as file:  # of the hundredth update
        assert {"losses/policy_loss", "losses/commitment"} <= {
            tag for _, tag, _ in csv.reader(file)
        }
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert checkpoint["histogram"][:, 1:].sum() > 100 and any(
        (g > 0).any() for g in checkpoint["g"]
    )

    path = str(tmp_path / "checkpoint.pt")
    evaluated = main(dataclasses.replace(args, evaluate=path, run_dir=""))
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}
    on = dataclasses.replace(args, run_dir="", resume=path, learning_rate=1e-12)
    main(dataclasses.replace(on, total_timesteps=checkpoint["T"] + 1))
    after = torch.load(path)
    assert after["T"] > checkpoint["T"] and after["histogram"].sum() > checkpoint["histogram"].sum()
    for name, value in checkpoint["net"].items():
        torch.testing.assert_close(after["net"][name], value, atol=1e-6, rtol=0)
    with pytest.raises(SystemExit, match=r"is at step \d+: raise --total-timesteps"):
        main(on)


def test_math_worker_follows_algorithm_s2(monkeypatch):
    """Copy, play, count, update, again; goals move away with the steps of all workers."""
    args = Args(**TOY | {"learning_rate": 0.5}, model="straw", envs_per_worker=3, t_max=4)
    args = dataclasses.replace(args, total_timesteps=1600, curriculum_period=50)
    shared = straw.make_policy(args)
    optimizer = straw.SharedRMSProp(list(shared.parameters()), 0.99, 0.1)
    histogram = torch.zeros(straw.PERIODS, straw.LONGEST + 1).long()
    T, told, rates, gates, begun, walks = Locked(40), [], [], [], [], []
    rollouts, seeds = straw.rollouts, straw.independent_seeds(5, args.seed, 7, 40)
    game = {"episode": {"r": 3.5, "l": 12}, "optimal": 0.25}

    def played(envs, given_seeds, net, t_max):
        assert given_seeds == seeds[:3] and len(envs) == 3 and t_max == 4
        assert torch.initial_seed() == seeds[4]
        for rollout, _ in rollouts(envs, given_seeds, net, t_max):
            walks.append([env.unwrapped.walk for env in envs])
            played.net = net
            yield rollout, [game]

    def update(net, given_optimizer, rollout, learning_rate, given_args):
        assert given_optimizer is optimizer and given_args is args
        assert net is played.net and net is not shared
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), shared.parameters()))
        gates.append(rollout.seen.g)
        begun.append(rollout.seen.fresh)
        rates.append(learning_rate)
        assert T.value == 40 + sum(g.numel() for g in gates)
        with torch.no_grad():
            for parameter in shared.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        norm = math.nan if len(rates) == 3 else 2.0
        return {"losses/gradient_norm": norm, "charts/committed": float(len(rates))}

    monkeypatch.setattr(straw, "rollouts", played)
    arguments = (args, 40, shared, optimizer, histogram, T, SimpleNamespace(put=told.append))
    work_here(monkeypatch, straw, 6, arguments, update)
    steps = [40, *(40 + np.cumsum([g.numel() for g in gates])).tolist()]
    assert steps[-2] < 1600 <= steps[-1] and 100 < len(gates) < 200
    assert rates == pytest.approx([0.5 * max(0, 1 - step / 1600) for step in steps[1:]])
    assert walks == [[2 + step // 50] * 3 for step in steps[:-1]]
    expected, opened, now = Counter(), {}, 0
    for step, g, fresh in zip(steps[1:], gates, begun):
        for g_t, begins in zip(g, fresh):
            for k in g_t.nonzero().flatten().tolist():
                if not begins[k]:  # else the end of an episode has cut it
                    length = min(40, now - opened[k])
                    expected[min(49, int(50 * (step / 1600))), length] += 1
                opened[k] = now
            now += 1
    found = {(i, n): histogram[i, n].item() for i, n in np.argwhere(histogram.numpy()).tolist()}
    assert found == expected
    for tag, value in (("episodic_return", 3.5), ("episodic_length", 12), ("optimal_return", 0.25)):
        assert [row[1:] for row in told if row[0] == f"charts/{tag}"] == [
            (value, step) for step in steps[1:]
        ]
    norms = [(value, step) for tag, value, step in told if tag == "losses/gradient_norm"]
    assert math.isnan(norms[0][0]) and norms[0][1] == steps[3]
    assert norms[1:] == [(2.0, steps[100])]
    committed = [row[1:] for row in told if row[0] == "charts/committed"]
    assert committed == [(i, step) for i, step in enumerate(steps[1:], 1)]  # every update, once


def test_math_evaluation_counts_only_games_that_are_not_over(monkeypatch):
    """Games of 3 steps that end at the goal and of 5 that are cut, in mazes of their time."""
    made, watched, net = [], [], Counting()

    def make_env(args, training=True):
        assert not training
        made.append(Counted(*((3, False), (5, True))[len(made) % 2]))
        return made[-1]

    monkeypatch.setattr(straw, "make_env", make_env)
    args = Args(**TOY | {"eval_episodes": 4}, curriculum_period=100)
    metrics = straw.evaluate(net, args, 350, lambda: watched.append(1))
    assert [env.walk_at_reset for env in made] == [5] * 4 and len(watched) == 5
    assert metrics == {
        "eval/episodic_return": -4,
        "eval/episodic_return_std": 1,
        "eval/episodic_length": 4,
        "eval/committed": 50,  # of 3 steps 1 and of 5 steps 3 replan
        "eval/optimal_return": 40,
        "eval/solved": 50,
    }


@pytest.mark.parametrize("resumed", [False, True])
def test_math_a_run_of_games_begins_with_its_seed_or_goes_on(resumed, tmp_path, monkeypatch):
    """What the workers share, what is saved of it, and what a report evaluates and draws."""
    args = Args(**TOY, model="straw", rmsprop_decay=0.7, rmsprop_eps=0.3, total_timesteps=999)
    args, path, calls = fitting(args), tmp_path / "checkpoint.pt", []
    torch.manual_seed(args.seed)
    net = straw.make_policy(args)
    saved = {"T": 0, "seconds": 0.0, "g": [torch.zeros_like(p) for p in net.parameters()]}
    saved["histogram"] = torch.zeros(straw.PERIODS, straw.LONGEST + 1).long()
    if resumed:
        net, _ = policy("straw", seed=9)
        saved = {"T": 321, "seconds": 60.0, "g": [torch.rand_like(p) for p in net.parameters()]}
        saved["histogram"] = torch.randint(0, 9, (straw.PERIODS, straw.LONGEST + 1))
        state = {"net": net.state_dict(), "args": dataclasses.asdict(args)}
        straw.save_checkpoint(path, **saved, **state)

    def watch():
        pass

    def note(name, result=None):
        def noted(*arguments):
            calls.append((name, *arguments))
            return result

        monkeypatch.setattr(straw, name, noted)

    def supervise(role, arguments, given, T, log, writer, seconds, save, evaluate_now):
        given_args, first_step, shared, optimizer, histogram, *rest = arguments
        assert role is straw.worker and given is given_args and rest == [T, log]
        assert T.value == first_step == saved["T"] and seconds == saved["seconds"]
        assert given.learning_rate == 1e-3 and given.max_gradient_norm == 40
        assert (optimizer.decay, optimizer.eps) == (0.7, 0.3)
        assert all(a is b for a, b in zip(optimizer.theta, shared.parameters(), strict=True))
        for a, b in zip(shared.parameters(), net.parameters(), strict=True):
            assert torch.equal(a, b) and a.is_shared()
        for a, b in zip(optimizer.g, saved["g"], strict=True):
            assert torch.equal(a, b) and a.is_shared()
        assert torch.equal(histogram, saved["histogram"]) and histogram.is_shared()

        metrics = evaluate_now(500, watch)
        agent = calls[0][1]
        assert agent is not shared and agent.straw.b is not shared.straw.b
        assert calls == [
            ("evaluate", agent, given, 500, watch),
            ("draw_commitments", histogram, tmp_path / "commitments.png"),
            ("film_plan", agent, given, 500, tmp_path / "plan.gif"),
            *(("count_replans", agent, given, given.seed + i, watch) for i in range(10)),
            ("draw_replans", "counted", tmp_path / "replans.png"),
            ("replan_rates", ["counted"] * 10),
        ]
        with torch.no_grad():
            shared.straw.b += 5
        optimizer.g[0].fill_(6)
        histogram.fill_(7)
        save(T=777, seconds=99.0)
        return metrics

    note("evaluate", {"eval/episodic_return": 1.0})
    note("count_replans", "counted")
    note("replan_rates", {"eval/replans_at_turns": 2.0})
    for name in ("draw_commitments", "film_plan", "draw_replans"):
        note(name)
    monkeypatch.setattr(straw, "supervise", supervise)
    torch.manual_seed(5)  # main has a seed of its own
    metrics = main(
        dataclasses.replace(
            args, **{"resume": str(path)} if resumed else {"run_dir": str(tmp_path)}
        )
    )
    assert metrics == {"eval/episodic_return": 1.0, "eval/replans_at_turns": 2.0}
    after = torch.load(path)
    assert after["T"] == 777 and after["seconds"] == 99 and (after["histogram"] == 7).all()
    assert (after["g"][0] == 6).all() and after["net"]["straw.b"] == net.straw.b.detach() + 5
    assert all(torch.equal(a, b) for a, b in zip(after["g"][1:], saved["g"][1:], strict=True))


@pytest.mark.parametrize("model", ["strawe", "lstm"])
def test_math_games_of_others_are_played_in_colour(model):
    """One worker's part of a run on screens, without the processes."""
    args = Args(task="atari", env_id="test_straw:Tint-v0", model=model, eval_episodes=3, **SMALL)
    net = straw.make_policy(straw.with_defaults(args))
    optimizer = straw.SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    played = straw.rollouts([straw.make_env(args) for _ in range(2)], [1, 2], net, 7)
    rollout, games = next(played)
    assert rollout.seen.s.shape == (7, 2, 84, 84, 12)
    assert [game["episode"]["l"] for game in games] == [7, 7]
    straw.update(net, optimizer, rollout, 1e-3, args)
    metrics = straw.evaluate(net, args, 0)
    assert 0 <= metrics["eval/episodic_return"] <= 7 and "eval/solved" not in metrics


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lstm", "straw"])
def test_learns_a_5x5_maze(model, tmp_path):
    args = Args(model=model, maze_size=5, envs_per_worker=4, num_workers=2, t_max=10)
    args = dataclasses.replace(args, total_timesteps=100_000, run_dir=str(tmp_path))
    args = dataclasses.replace(args, learning_rate=2e-3, rmsprop_eps=1e-3, entropy_cost=0.01)
    start = time.monotonic()
    metrics = main(dataclasses.replace(args, discount=0.9, maze_reward=0.1))
    assert time.monotonic() - start < 120
    assert metrics["eval/solved"] > 95
    assert metrics["eval/episodic_return"] > metrics["eval/optimal_return"] - 0.2  # two steps


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"maze_size": 8}, "--maze-size must be odd"),
        ({"max_extent": 0.5}, "--max-extent must be 0 or at least 1, not 0.5"),
        ({"plan_length": 5}, "--plan-length must be at least 8"),
        ({"t_max": 0}, "--t-max must lie between 1"),
        ({"commitment_bias": math.nan}, "--commitment-bias must lie between -4294967295 and "),
        ({"task": "atari", "env_id": "BrekoutNoFrameskip-v4"}, "No game.*BreakoutNoFrameskip-v4"),
        ({"task": "atari", "env_id": "toy_games:Side-v0"}, r"\(84, 84, 3\)"),
        ({"task": "atari", "env_id": "toy_games:Broken-v0"}, "No game.*Broken-v0: no screen"),
        ({"maze_reward": 0.6}, "--maze-reward must be at most 0.5, .*not 0.6"),
        ({"resume": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        ({"resume": "good.pt", "model": "straw"}, "--model strawe, not with --model straw"),
        ({"resume": "good.pt", "maze_size": 7}, "--maze-size 5, not with --maze-size 7"),
        ({"evaluate": "good.pt", "plan_filters": 4}, "--plan-filters 3, not with --plan-filters 4"),
        ({"task": "text", "text_file": "none.txt"}, "none.txt is missing or no UTF-8 text"),
        ({"task": "text", "dataset": "ptb"}, "ptb.train.txt is missing"),
        (
            {"task": "text", "text_file": "short.txt", "batch_size": 32},
            "too few for --batch-size 32",
        ),
        ({"task": "text", "text_file": "good.pt"}, "no UTF-8 text"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("abc")
    args = Args(**TOY)
    net = straw.make_policy(args)
    state = {"net": net.state_dict(), "args": dataclasses.asdict(args)}
    straw.save_checkpoint(Path("good.pt"), **state)
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.pt", "short.txt"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"model": "lstm", "replan": "always"}, "--replan has no effect with --model lstm"),
        ({"model": "ff", "plan_length": 20}, "--plan-length has no effect with --model ff"),
        ({"model": "lstm", "economic": False}, "--economic has no effect with --model lstm"),
        ({"model": "ff", "commitment_bias": 1.0}, "--commitment-bias has no effect with --model"),
        ({"replan": "random", "commitment_cost": 0.1}, "--commitment-cost .* with --replan random"),
        ({"model": "straw", "noise_cost": 0.1}, "--noise-cost has no effect with --model straw"),
        ({"task": "atari", "maze_size": 5}, "--maze-size has no effect with --task atari"),
        ({"task": "text", "maze_reward": 0.1}, "--maze-reward has no effect with --task text"),
        ({"env_id": "Tint-v0"}, "--env-id has no effect with --task maze"),
        ({"task": "text", "discount": 0.9}, "--discount has no effect with --task text"),
        ({"optimizer": "adam"}, "--optimizer has no effect with --task maze"),
        ({"model": "lstm", "max_extent": 3.0}, "--max-extent has no effect with --model lstm"),
        ({"task": "atari", "lstm_size": 16}, "--lstm-size has no effect with --task atari"),
        ({"task": "text", "model": "ff", "lstm_size": 16}, "--lstm-size .* with --model ff"),
        ({"task": "text", "text_file": "a", "dataset": "ptb"}, "--dataset .* beside --text-file"),
    ],
)
def test_bad_input_flags_without_effect_are_refused(flags, sentence):
    with pytest.raises(SystemExit, match=f"^{sentence}.*: leave it out.$"):
        straw.main(Args(**flags))


def test_math_text_comes_from_the_file_or_the_folder_of_data(tmp_path, monkeypatch):
    """A set that lies there is not fetched again, one that is fetched lies there afterwards."""
    monkeypatch.setattr(straw, "SHAKESPEARE_MD5", straw.hashlib.md5(b"to be").hexdigest())
    fetched, args = [], Args(task="text", data_dir=str(tmp_path / "sets"))
    monkeypatch.setattr(straw, "download", lambda *told: (fetched.append(told), b"to be")[1])
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "sets" / "ptb").mkdir(parents=True)
    (tmp_path / "sets" / "ptb" / "ptb.train.txt").write_text("<unk>")
    for dataset in ("pydoc", "ptb", "tinyshakespeare"):
        mine = dataclasses.replace(args, dataset=dataset, text_file=str(tmp_path / "mine.txt"))
        assert straw.read_text(mine) == "mine"
        with pytest.raises(SystemExit, match=r"none.txt is missing"):
            straw.read_text(dataclasses.replace(mine, text_file=str(tmp_path / "none.txt")))
    assert straw.read_text(dataclasses.replace(args, dataset="ptb")) == "<unk>" and not fetched
    for _ in range(2):
        assert straw.read_text(dataclasses.replace(args, dataset="tinyshakespeare")) == "to be"
    path = tmp_path / "sets" / "tinyshakespeare" / "input.txt"
    assert path.read_text() == "to be" and [told[:2] for told in fetched] == [
        (straw.SHAKESPEARE_URL, path)
    ]


def test_math_a_maze_without_visits_to_a_kind_of_place_does_not_count_there():
    """One corridor with a corner: the second maze was left before anybody turned."""
    walls = np.ones((5, 5), int)
    walls[1, 1:4] = walls[1:4, 3] = 0  # turns at (1, 3), corridors at (1, 2) and (2, 3)
    visits, replans = np.zeros((2, 5, 5), int)
    visits[1, 2] = visits[1, 3] = 4
    replans[1, 2], replans[1, 3] = 1, 3
    elsewhere, none = visits.copy(), np.zeros_like(replans)
    elsewhere[1, 3] = 0
    found = straw.replan_rates([(walls, visits, replans), (walls, elsewhere, none)])
    assert found["eval/replans_at_turns"] == 75 and found["eval/replans_at_turns_std"] == 0
    assert found["eval/replans_in_corridors"] == 12.5


def test_commitments_may_begin_long():
    """A negative bias is no bad input: plans change less often at first."""
    args = Args(model="straw", commitment_bias=-3.0)
    straw.check(args)
    straw.check_flags(args)
    first = {
        b: StrategicAttentiveWriter(4, 3, dataclasses.replace(args, commitment_bias=b)).commit(
            torch.zeros(1, 3), torch.zeros(1, 64)
        )
        for b in (-3.0, 0.0)
    }
    assert (first[-3.0] <= first[0.0]).all() and first[-3.0][0, 1] < 0.1


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("maze", {"model": "strawe", "replan": "always", "plan_length": 21, "plan_filters": 4}),
        ("maze", {"noise_size": 6, "maze_size": 7, "maze_reward": 0.1, "curriculum_period": 9}),
        ("atari", {"env_id": "test_straw:Hue-v0", "replan": "random", "task": "maze"}),
        ("text", {"lstm_size": 17, "replan": "always"}),
        ("text", {"batch_size": 5, "t_max": 11, "plan_length": 21}),
    ],
)
def test_bad_input_a_run_goes_on_with_the_flags_that_shape_it(task, flags, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    others = {"task": task, "model": "straw", "env_id": "test_straw:Tint-v0"}
    args = Args(**TOY | others, t_max=10, batch_size=4, text_file=periodic_text(tmp_path))
    args = fitting(dataclasses.replace(args, total_timesteps=40))
    monkeypatch.setattr(straw, "supervise", lambda *_: {})  # should it not be refused
    net = straw.TextModel(args) if task == "text" else straw.make_policy(args)
    histogram = torch.zeros(straw.PERIODS, straw.LONGEST + 1).long()
    state = {"net": net.state_dict(), "histogram": histogram, "T": 0, "seconds": 0.0}
    for name, value in flags.items():
        made_with = dataclasses.asdict(args) | {name: value}
        straw.save_checkpoint(path, **state, args=made_with)
        flag = "--" + name.replace("_", "-")
        with pytest.raises(SystemExit, match=f"made with {flag} {value}, not with {flag} "):
            main(dataclasses.replace(args, resume=str(path)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "text.txt"]


def test_bad_input_a_run_goes_on_with_its_text_wherever_that_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = periodic_text(tmp_path)
    args = Args(**TEXT, text_file=path, total_timesteps=80, run_dir="run")
    main(args)
    args = dataclasses.replace(args, run_dir="", evaluate="run/checkpoint.pt")
    main(dataclasses.replace(args, text_file=Path(path).name))
    with open(path, "a") as file:
        file.write(".")
    files = sorted(Path("run").iterdir())
    resumed = dataclasses.replace(args, evaluate="", resume="run/checkpoint.pt")
    with pytest.raises(SystemExit, match=r"run/checkpoint.pt was made with another text"):
        main(resumed)
    assert sorted(Path("run").iterdir()) == files
    with pytest.raises(SystemExit, match=r"run/checkpoint.pt was made with another text"):
        main(args)


def test_math_commitments_move_to_earlier_periods_when_a_run_is_made_longer(tmp_path, monkeypatch):
    """And to later ones when it is made shorter: those beyond its end count with the last."""
    monkeypatch.setattr(straw, "evaluate_text", lambda *_: {})
    args = Args(**TEXT, text_file=periodic_text(tmp_path), total_timesteps=2000)
    main(dataclasses.replace(args, run_dir=str(tmp_path)))
    path = tmp_path / "checkpoint.pt"
    before = torch.load(path)["histogram"]
    longer = dataclasses.replace(args, resume=str(path), total_timesteps=4000)
    main(longer)
    after = torch.load(path)["histogram"]
    assert torch.equal(after[:25], before[0::2] + before[1::2])
    assert before[25:].any() and after[25:].any()
    straw.save_checkpoint(path, **torch.load(path) | {"T": 1960})
    main(dataclasses.replace(longer, total_timesteps=2000))
    shorter = torch.load(path)["histogram"]
    assert torch.equal(shorter[0:49:2], after[:25]) and not shorter[1:49:2].any()
    assert (shorter[49] >= after[25:].sum(0)).all()


def test_bad_input_what_an_evaluation_cannot_write(tmp_path, monkeypatch, capsys):
    """A folder has its name: that is told, and the evaluation goes on. Other errors stay."""
    args = Args(**TEXT, text_file=periodic_text(tmp_path), total_timesteps=80)
    main(dataclasses.replace(args, run_dir=str(tmp_path)))
    args = dataclasses.replace(args, evaluate=str(tmp_path / "checkpoint.pt"))
    for name in ("commitments.png", "macro_actions.csv"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    capsys.readouterr()
    assert "eval/bits_per_character" in main(args)
    told = capsys.readouterr().out
    for name in ("commitments.png", "macro_actions.csv"):
        assert re.search(rf"{name} cannot be written \(.*\)\.", told)
    for error in (OSError("no memory"), FileNotFoundError(2, "no such file", "/lib/game.bin")):
        monkeypatch.setattr(straw, "evaluate_text", Mock(side_effect=error))
        with pytest.raises(OSError, match=r"no memory|no such file"):
            main(args)


def test_bad_input_a_download_that_is_not_the_text(tmp_path, monkeypatch):
    args = Args(task="text", dataset="tinyshakespeare", data_dir=str(tmp_path))
    monkeypatch.setattr(straw, "download", lambda *_: b"404")
    with pytest.raises(SystemExit, match="checksum is wrong"):
        straw.read_text(args)
    assert list(tmp_path.iterdir()) == []


def test_math_text_defaults_to_pythons_help():
    text = straw.read_text(Args(task="text"))
    assert len(text) > 300_000 and "The following identifiers" in text


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "straw.py"), "--task", "text", "--model", "ff"]
    command += ["--total-timesteps", "2000"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "eval/bits_per_character" in run.stdout
    (run_dir,) = (tmp_path / "runs").glob("text_ff__straw__1__*")
    assert torch.load(run_dir / "checkpoint.pt")["T"] >= 2000


@pytest.mark.slow  # supervise, which this is about, has the text it has in a3c_atari.py
def test_command_line_ends_in_order_on_ctrl_c(tmp_path):
    command = [sys.executable, "straw.py", "--maze-size", "5", "--num-workers", "1"]
    command += ["--report-every", "200", "--run-dir", str(tmp_path), "--plan-length", "20"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    wait_for((tmp_path / "checkpoint.pt").exists, 120)
    children = processes_of(run)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1 and "Stopped; go on with the same flags" in err
    assert "Traceback" not in err and "charts/SPS" in out
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
