"""straw.py against the public bugs of its paper's sheet.

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
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import ROOT, processes_of, wait_for
from scipy.stats import spearmanr
from torch.distributions import Categorical, Normal, kl_divergence

import straw
from straw import Args, Maze, Plan, StrategicAttentiveWriter

SMALL = {"plan_length": 20, "plan_filters": 3, "noise_size": 5, "lstm_size": 16}
TOY = {"maze_size": 5, "num_workers": 1, "eval_episodes": 3, "learning_rate": 1e-3, **SMALL}
TEXT = {"task": "text", "model": "straw", "batch_size": 4, "t_max": 10, **SMALL}

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
    return straw.attention_filters(*straw.attention_grid(psi, K, T), torch.arange(T).double())


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


@pytest.mark.parametrize("planned", [0, 17])
@pytest.mark.parametrize("sigma", [0.01, 0.7, 1.9])
def test_math_beyond_the_reach_nothing_is_planned_or_seen(planned, sigma):
    psi = torch.tensor([[-3.0, 0.3, math.log(sigma)], [-4.0, 0.1, -1.0]])
    A, (mu, width) = torch.zeros(2, 4, 200), straw.attention_grid(psi, 3, 200)
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
    c = straw.commitment_plan(psi, b, torch.arange(T))
    for m in range(3):
        mu = 1 + (T - 2) / (1 + math.exp(-psi[m, 0]))
        density = torch.exp(-((torch.arange(T).double() - mu) ** 2) / (2 * psi[m, 2].exp() ** 2))
        expected = torch.sigmoid(-1.3 + 40 * density / density.sum())
        torch.testing.assert_close(c[m, :-1], expected[:-1])
    assert (c[:, -1] == 1).all()


def test_math_never_replanning_is_impossible():
    """However low the bias and however wide the Gaussian: within T steps the gate opens."""
    for psi in ([0.0, 0.0, 9.0], [-99.0, 0.0, 0.0], [99.0, 0.0, 2.0]):
        c = straw.commitment_plan(torch.tensor([psi]), torch.tensor(-1e4), torch.arange(12))
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
    torch.testing.assert_close(out.c_0, after.c[:, 0].sum())


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
    loss = out.state.A.sum() + out.state.c.sum() + out.y.sum() + out.kl + out.c_0
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


def test_math_at_first_the_patch_is_the_next_k_steps_and_a_plan_lasts_five_at_most():
    planner = StrategicAttentiveWriter(6, 4, Args(model="straw"))
    psi = planner.f_psi(torch.randn(3, 6))
    assert filters_of(psi, 10, 500).argmax(-1).tolist() == [list(range(10))] * 3
    c = planner.commit(psi, torch.randn(3, 64))
    torch.testing.assert_close(c[:, 0], torch.full((3,), 0.5), atol=1e-3, rtol=0)
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


def some_trajectory(net, args) -> straw.Rollout:
    envs = [straw.make_env(args) for _ in range(3)]
    return next(straw.rollouts(envs, [0, 1, 2], net, args.t_max))[0]


@each_model
def test_math_learning_replays_what_was_played(model):
    """The pass over a whole trajectory gives what the steps gave one by one, across episodes."""
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


@each_planner
def test_math_committed_steps_do_not_look(model):
    net, args = policy(model)
    played = some_trajectory(net, args)
    looked_at = []
    net.features.register_forward_pre_hook(lambda _, x: looked_at.append(len(x[0])))
    economic = net(played.seen, played.state).y
    net.economic = False
    wasteful = net(played.seen, played.state).y
    torch.testing.assert_close(economic, wasteful)
    assert looked_at == [played.seen.g.sum(), played.seen.g.numel()]


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


@each_model
def test_math_the_loss_is_a3cs_with_a_clipped_advantage_and_the_costs(model):
    net, args = policy(model, t_max=25, entropy_cost=0.3, value_cost=0.7, discount=0.8)
    args = dataclasses.replace(args, noise_cost=0.2, commitment_cost=0.4)
    played = some_trajectory(net, args)
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
    state, kl, c_0 = played.state, 0.0, 0.0
    for n in range(N if model in ("straw", "strawe") else 0):
        step = net(straw.Seen(*(part[n : n + 1] for part in played.seen)), state)
        state = step.state
        c_0 += state[1][:, 0].sum().item()
        if model == "strawe":
            for k in played.seen.g[n].nonzero().flatten():
                zeta = net.features(played.seen.s[n, k][None])
                mu, sigma = noise_of(net.straw.channel, zeta)
                kl += kl_divergence(Normal(mu, sigma.expand_as(mu)), Normal(0.0, 1.0)).sum().item()
    assert loss.item() == pytest.approx(expected + 0.2 * kl + 0.4 * c_0, rel=1e-3)
    assert watched["losses/c_0"] == pytest.approx(c_0 / (3 * N), rel=1e-4)
    committed = 100 * (1 - played.seen.g.float().mean().item())
    assert watched["charts/committed"] == pytest.approx(committed)


def test_math_the_value_row_bootstraps_but_not_past_the_goal():
    net, args = policy("straw", t_max=9)
    envs = [straw.make_env(args)]
    played = straw.rollouts(envs, [5], net, 9)
    for _ in range(12):
        state = torch.get_rng_state()
        trajectory, _ = next(played)
        last = trajectory.r_t[-1:]
        R = straw.n_step_returns(
            trajectory.r_t, trajectory.terminated, trajectory.truncated, trajectory.v_t, 0.5
        )
        if trajectory.terminated[-1]:
            assert len(trajectory.r_t) <= 9 and R[-1] == last
        else:
            torch.testing.assert_close(R[-1:], last + 0.5 * trajectory.v_t[-1:])
            assert trajectory.v_t[-1] != 0
        assert not torch.equal(state, torch.get_rng_state())


def test_math_a_trajectory_that_is_cut_is_valued_at_the_state_reached():
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


@each_model
def test_gradient_moves_only_the_shared_network(model):
    net, args = policy(model)
    shared = straw.make_policy(args)
    before = [p.detach().clone() for p in net.parameters()]
    theta = [p.detach().clone() for p in shared.parameters()]
    optimizer = straw.SharedRMSProp(list(shared.parameters()), 1.0, 0.25)
    played = some_trajectory(net, args)
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
    played = some_trajectory(net, args)
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


def test_math_commitments_are_counted_as_in_a_loop():
    torch.manual_seed(0)
    g = torch.rand(300, 3) < 0.1
    g[0] = True
    histogram, age = torch.zeros(straw.PERIODS, straw.LONGEST + 1).long(), torch.zeros(3).long()
    for i, steps in enumerate(g.split(40)):
        age = straw.count_commitments(histogram, i / 7, steps, age)
    expected = Counter()
    for b in range(3):
        opened = g[:, b].nonzero().flatten().tolist()
        expected.update(min(straw.LONGEST, j - i) for i, j in pairwise(opened))
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
    rates = straw.replan_rates(np.stack([walls, visits, replans]))
    turns, corridors = (400 / 14, 20.0) if junction else (75.0, 15.0)
    assert rates["eval/replans_at_turns"] == pytest.approx(turns)
    assert rates["eval/replans_in_corridors"] == pytest.approx(corridors)
    assert len(rates) == 2


def test_math_replans_are_counted_where_the_agent_stands():
    net, args = policy("straw", maze_size=7)
    counted = straw.count_replans(net, args)
    walls, visits, replans = counted
    assert np.array_equal(walls, straw.carve(7, np.random.default_rng(args.seed)))
    assert (visits[walls > 0] == 0).all() and visits.sum() > 20
    assert (replans <= visits).all() and replans.sum() < visits.sum()
    assert np.array_equal(counted, straw.count_replans(net, args))


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
    metrics = straw.main(args)
    assert metrics["eval/bits_per_character"] < 0.35
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    pictures = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.png")}
    again = dataclasses.replace(args, evaluate=checkpoint, run_dir="", total_timesteps=10**6)
    evaluated = straw.main(again)
    assert evaluated == {tag: metrics[tag] for tag in evaluated}
    if model == "straw":
        assert {path.name for path in pictures} == {"commitments.png", "macro_actions.png"}
        for path, before in pictures.items():
            assert path.read_bytes() == before and Image.open(path).size[0] > 100
        with open(tmp_path / "run" / "macro_actions.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert all(len(row["string"]) == int(row["length"]) for row in rows)


def test_learns_on_as_if_it_had_not_been_interrupted(tmp_path, monkeypatch):
    args = Args(**TEXT, text_file=periodic_text(tmp_path), total_timesteps=1200, report_every=400)
    straw.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    report = straw.report

    def stopping(*arguments):
        report(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="Stopped; go on with"):
        patch.setattr(straw, "report", stopping)
        straw.main(dataclasses.replace(args, run_dir=str(tmp_path / "halves")))
    halves = str(tmp_path / "halves" / "checkpoint.pt")
    assert torch.load(halves)["T"] == 400
    straw.main(dataclasses.replace(args, resume=halves))
    whole, halves = torch.load(tmp_path / "whole" / "checkpoint.pt"), torch.load(halves)
    assert whole["T"] == halves["T"] == 1200 and whole["net"].keys() == halves["net"].keys()
    for name in whole["net"]:
        assert torch.equal(whole["net"][name], halves["net"][name])
    for part in ("rng", "histogram", "age"):
        assert torch.equal(whole[part], halves[part])
    assert all(torch.equal(a, b) for a, b in zip(whole["state"], halves["state"], strict=True))


def test_learns_to_commit_when_replanning_costs_and_to_replan_when_it_is_free(tmp_path):
    """On text in which every character matters: lambda 0 shortens and 3 lengthens commitments."""
    committed = {}
    for cost in (0.0, 3.0):
        args = Args(**TEXT, text_file=periodic_text(tmp_path), commitment_cost=cost)
        args = dataclasses.replace(args, total_timesteps=2000, report_every=400)
        straw.main(dataclasses.replace(args, run_dir=str(tmp_path / str(cost))))
        with open(tmp_path / str(cost) / "metrics.csv") as file:
            rows = list(csv.reader(file))
        told = [float(value) for _, tag, value in rows if tag == "charts/committed"]
        committed[cost] = told[0], told[-1]
    assert committed[0.0][1] < committed[0.0][0] - 5 and committed[0.0][1] < 10
    assert committed[3.0][1] > committed[3.0][0] + 5 and committed[3.0][1] > 80


# ---- Runs ---------------------------------------------------------------------------------------


def test_learns_something_in_processes_then_evaluates_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(straw, "FILMED_STEPS", 8)
    args = Args(**TOY, envs_per_worker=2, total_timesteps=800, report_every=300)
    args = dataclasses.replace(args, run_dir=str(tmp_path), curriculum_period=500)
    metrics = straw.main(args)
    assert multiprocessing.active_children() == []
    assert -10 < metrics["eval/episodic_return"] <= metrics["eval/optimal_return"] < 0.1
    assert {"eval/replans_at_turns", "eval/replans_in_corridors", "eval/committed"} <= set(metrics)
    for name in ("replans.png", "commitments.png", "plan.gif"):
        assert Image.open(tmp_path / name).size[0] > 100
    assert Image.open(tmp_path / "plan.gif").n_frames == 8
    with open(tmp_path / "metrics.csv") as file:  # of the first update on, though there are few
        assert {"losses/policy_loss", "losses/c_0"} <= {tag for _, tag, _ in csv.reader(file)}
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert checkpoint["histogram"][:, 1:].sum() > 100 and any(
        (g > 0).any() for g in checkpoint["g"]
    )

    path = str(tmp_path / "checkpoint.pt")
    evaluated = straw.main(dataclasses.replace(args, evaluate=path, run_dir=""))
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}
    on = dataclasses.replace(args, run_dir="", resume=path, learning_rate=1e-12)
    straw.main(dataclasses.replace(on, total_timesteps=checkpoint["T"] + 1))
    after = torch.load(path)
    assert after["T"] > checkpoint["T"] and after["histogram"].sum() > checkpoint["histogram"].sum()
    for name, value in checkpoint["net"].items():
        torch.testing.assert_close(after["net"][name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", ["strawe", "lstm"])
def test_math_games_of_others_are_played_in_colour(model):
    """One worker's part of a run on screens, without the processes."""
    args = Args(task="atari", env_id="test_straw:Tint-v0", model=model, eval_episodes=3, **SMALL)
    net = straw.make_policy(straw.with_defaults(args))
    optimizer = straw.SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    played = straw.rollouts([straw.make_env(args) for _ in range(2)], [1, 2], net, 7)
    trajectory, games = next(played)
    assert trajectory.seen.s.shape == (7, 2, 84, 84, 12)
    assert [game["episode"]["l"] for game in games] == [7, 7]
    straw.update(net, optimizer, trajectory, 1e-3, args)
    metrics = straw.evaluate(net, args, 0)
    assert 0 <= metrics["eval/episodic_return"] <= 7 and "eval/solved" not in metrics


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lstm", "straw"])
def test_learns_a_5x5_maze(model, tmp_path):
    args = Args(model=model, maze_size=5, envs_per_worker=4, num_workers=2, t_max=10)
    args = dataclasses.replace(args, total_timesteps=100_000, run_dir=str(tmp_path))
    args = dataclasses.replace(args, learning_rate=2e-3, rmsprop_eps=1e-3, entropy_cost=0.01)
    start = time.monotonic()
    metrics = straw.main(dataclasses.replace(args, discount=0.9, maze_reward=0.1))
    assert time.monotonic() - start < 120
    assert metrics["eval/solved"] > 95
    assert metrics["eval/episodic_return"] > metrics["eval/optimal_return"] - 0.2  # two steps


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"maze_size": 8}, "--maze-size must be odd"),
        ({"plan_length": 5}, "--plan-length must be at least 8"),
        ({"model": "lstm", "replan": "always"}, "has no plan"),
        ({"t_max": 0}, "--t-max must lie between 1"),
        ({"task": "atari", "env_id": "BrekoutNoFrameskip-v4"}, "no game.*BreakoutNoFrameskip-v4"),
        ({"task": "atari", "env_id": "toy_games:Side-v0"}, r"\(84, 84, 3\)"),
        ({"resume": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        ({"resume": "good.pt", "model": "straw"}, "model=strawe, not with model=straw"),
        ({"resume": "good.pt", "maze_size": 7}, "maze_size=5, not with maze_size=7"),
        ({"evaluate": "good.pt", "plan_filters": 4}, "plan_filters=3, not with plan_filters=4"),
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
        straw.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.pt", "short.txt"]


@pytest.mark.parametrize("occupied", ["metrics.csv", "commitments.png"])
def test_bad_input_a_folder_that_cannot_be_written_to(occupied, tmp_path):
    """In training and in an evaluation: a folder has the name of a file to be written."""
    args = Args(**TEXT, text_file=periodic_text(tmp_path), total_timesteps=80)
    if occupied == "commitments.png":
        straw.main(dataclasses.replace(args, run_dir=str(tmp_path)))
        args = dataclasses.replace(args, evaluate=str(tmp_path / "checkpoint.pt"))
        (tmp_path / occupied).unlink()
    else:
        args = dataclasses.replace(args, run_dir=str(tmp_path))
    (tmp_path / occupied).mkdir()
    with pytest.raises(SystemExit, match=f"{occupied}.*use another folder"):
        straw.main(args)


def test_bad_input_a_download_that_is_not_the_text(tmp_path, monkeypatch):
    args = Args(task="text", dataset="tinyshakespeare", data_dir=str(tmp_path))
    monkeypatch.setattr(straw, "download", lambda *_: b"404")
    with pytest.raises(SystemExit, match="checksum is wrong"):
        straw.read_text(args)
    assert list(tmp_path.iterdir()) == []


def test_math_text_defaults_to_pythons_help():
    text = straw.read_text(Args(task="text"))
    assert len(text) > 300_000 and "The following identifiers" in text


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
