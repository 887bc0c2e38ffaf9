"""recurrent_visual_attention.py against the bugs that public ports of its paper have had.

Caught here: a location network without any gradient, or with that of the cross-entropy; a sample
that is not detached; log-probabilities of the clipped sample, or of the last, unused location;
log-probabilities averaged before the reward; a baseline that trains the core; patches of 16/32/64
or 12/24/36 pixels; borders replicated instead of zero; an exclusive upper bound of the digit's
place; a test set made anew at each evaluation; random numbers that evaluation takes from training.
"""

import dataclasses
import gzip
import hashlib
import http.server
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import ROOT
from torch.distributions import Independent, Normal

import recurrent_visual_attention as ram
from recurrent_visual_attention import Args, RecurrentAttentionModel, RetinaSensor

DIGITS = {"dataset": "digits", "device": "cpu"}


# ---- Equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("S", "patch_size", "num_scales"), [(28, 8, 1), (60, 12, 3), (24, 6, 3)])
def test_math_retina_is_that_of_slow_indexing(S, patch_size, num_scales):
    """In the centre, on the corners and beyond: means of blocks, zero outside the image."""
    x = torch.randint(0, 256, (7, S, S), dtype=torch.uint8)
    l = torch.tensor([[0, 0], [-1, -1], [1, 1], [-1, 1], [0.3, -0.7], [0.99, 0.01], [-0.5, 0.5]])
    seen = RetinaSensor(patch_size, num_scales)(ram.integral_image(x), l)
    assert seen.shape == (7, num_scales, patch_size, patch_size)
    for b in range(7):
        centre = [round((l[b, axis].item() + 1) / 2 * S) for axis in (0, 1)]
        for k in range(num_scales):
            block = 2**k
            for i in range(patch_size):
                for j in range(patch_size):
                    top = centre[1] - patch_size * block // 2 + i * block
                    left = centre[0] - patch_size * block // 2 + j * block
                    total = 0
                    for row in range(max(0, top), min(S, top + block)):
                        for column in range(max(0, left), min(S, left + block)):
                            total += x[b, row, column].item()
                    assert seen[b, k, i, j].item() == pytest.approx(
                        total / (255 * block**2), abs=1e-7
                    )


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ({"task": "mnist"}, 209_677),
        ({"task": "translated"}, 256_781),
        ({"task": "cluttered"}, 256_781),
        ({"task": "cluttered100"}, 275_213),
        ({"task": "catch"}, 608_262),
        ({"task": "mnist", "patch_size": 12, "num_scales": 3}, 256_781),
        ({"task": "cluttered", "model": "conv"}, 251_442),
        ({"task": "cluttered100", "model": "conv"}, 742_962),
        ({"task": "translated", "model": "fc", "fc_width": 64}, 235_274),
    ],
    ids=str,
)
def test_math_parameter_counts(flags, count):
    assert sum(p.numel() for p in ram.make_network(Args(**flags)).parameters()) == count


def test_math_tasks_are_those_of_the_paper():
    tasks = {"mnist": (28, 6, 0), "translated": (60, 8, 0), "cluttered": (60, 8, 4)}
    tasks |= {"cluttered100": (100, 8, 8), "catch": (24, 23, 0)}
    for task, expected in tasks.items():
        setting = ram.setting_of(Args(task=task))
        assert (setting.S, setting.num_glimpses, setting.num_clutter) == expected
        assert ram.setting_of(Args(task=task, num_glimpses=3)).num_glimpses == 3


def test_math_baselines_are_two_layers_and_rectified():
    x = torch.rand(5, 1, 60, 60)
    net = ram.ConvolutionalNetwork(60)
    w = [p.detach() for p in net.parameters()]
    h = F.conv2d(x, w[0], w[1], stride=5).relu().flatten(1)
    expected = (h @ w[2].T + w[3]).relu() @ w[4].T + w[5]
    torch.testing.assert_close(net(x).detach(), expected, atol=1e-5, rtol=1e-4)
    net = ram.FullyConnectedNetwork(60, 64)
    w = [p.detach() for p in net.parameters()]
    h = ((x.flatten(1) @ w[0].T + w[1]).relu() @ w[2].T + w[3]).relu()
    torch.testing.assert_close(net(x).detach(), h @ w[4].T + w[5], atol=1e-5, rtol=1e-4)


def test_math_location_log_prob_is_that_of_a_normal():
    sample, mu = torch.randn(4, 5, 2).double(), torch.randn(4, 5, 2).double()
    expected = Independent(Normal(mu, 0.3), 1).log_prob(sample)
    torch.testing.assert_close(ram.location_log_prob(sample, mu, 0.3), expected)


def test_math_glimpse_and_core_are_those_of_the_paper():
    net = RecurrentAttentionModel(12, 3, 10, lstm=False)
    rho, l, h = torch.rand(5, 3, 12, 12), torch.rand(5, 2), torch.rand(5, 256)
    g, core = net.glimpse, net.core
    h_g = (rho.flatten(1) @ g.what.weight.T + g.what.bias).relu()
    h_l = (l @ g.where.weight.T + g.where.bias).relu()
    expected = h_g @ g.from_what.weight.T + g.from_what.bias
    expected = (expected + h_l @ g.from_where.weight.T + g.from_where.bias).relu()
    torch.testing.assert_close(g(rho, l), expected)
    h_t = h @ core.from_h.weight.T + core.from_h.bias
    h_t = (h_t + expected @ core.from_g.weight.T + core.from_g.bias).relu()
    torch.testing.assert_close(core(expected, (h,))[0], h_t)


def test_math_reinforce_is_unbiased():
    """Two steps of a policy over three choices: the mean estimate is the gradient of E[R]."""
    torch.manual_seed(0)
    theta = torch.tensor(
        [[0.2, -0.5, 0.1], [0.4, 0.0, -0.3]], dtype=torch.float64, requires_grad=True
    )
    rewards = torch.rand(3, 3, dtype=torch.float64)
    pi = theta.softmax(-1)
    expected = -torch.einsum("i,j,ij->", pi[0], pi[1], rewards)
    (exact,) = torch.autograd.grad(expected, theta)
    n = 200_000
    log_pi = theta.log_softmax(-1)
    a = log_pi.detach().exp().multinomial(n, replacement=True)  # [2, n]
    b = torch.tensor([[0.3], [0.7]], dtype=torch.float64, requires_grad=True)
    loss = ram.reinforce_loss(log_pi.gather(1, a), rewards[a[0], a[1]], b)
    estimate, to_baseline = torch.autograd.grad(loss, (theta, b), allow_unused=True)
    assert to_baseline is None
    torch.testing.assert_close(estimate, exact, atol=4e-3, rtol=0)


def test_math_baseline_fits_the_reward():
    R, b = torch.rand(6), torch.rand(4, 6, requires_grad=True)
    ram.baseline_loss(R, b).backward()
    torch.testing.assert_close(b.grad, 2 * (b.detach() - R) / 6)


# ---- Glimpses -----------------------------------------------------------------------------------


def glimpses(**kwargs):
    torch.manual_seed(0)
    net = RecurrentAttentionModel(8, 1, 10, lstm=False)
    torch.nn.init.constant_(net.location.bias, 0.9)  # some samples leave the image
    x = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8)
    return net, ram.look(net, ram.integral_image(x), 5, std=0.2, **kwargs), x


def test_math_look_samples_around_its_means_and_clips_where_it_looks():
    net = RecurrentAttentionModel(8, 1, 10, lstm=False)
    x = torch.randint(0, 256, (3000, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        net.location.bias[:] = torch.tensor([0.9, 0.0])
        seen = ram.look(net, ram.integral_image(x), 3, std=0.2)
    noise = seen.sample - seen.mu
    assert noise.std().item() == pytest.approx(0.2, abs=0.01) and abs(noise.mean()) < 0.01
    assert (seen.sample > 1).any() and seen.l.abs().max() <= 1
    torch.testing.assert_close(seen.l[1:], seen.sample.clamp(-1, 1))
    assert seen.l[0].std().item() == pytest.approx(1 / math.sqrt(3), abs=0.02)
    assert seen.l.shape == (3, 3000, 2) and seen.mu.shape == (2, 3000, 2)  # l_3 is used by nobody


def test_math_look_follows_the_recurrence():
    net, seen, x = glimpses()
    table, state = ram.integral_image(x), net.core.initial_state(6)
    for n in range(5):
        h, state = net(table, seen.l[n], state)
        if n < 4:
            torch.testing.assert_close(seen.h[n], h)
            torch.testing.assert_close(seen.mu[n], net.location(h))
    torch.testing.assert_close(seen.logits, net.action(h))


@pytest.mark.parametrize("policy", ["random", "centre"])
def test_math_other_policies_choose_nothing(policy):
    net, seen, _ = glimpses(policy=policy)
    assert seen.mu.numel() == 0 and seen.sample.numel() == 0
    assert (seen.l == 0).all() if policy == "centre" else seen.l.unique().numel() > 50
    loss, _ = ram.hybrid_loss(net, seen, torch.zeros(6, dtype=torch.long), Args())
    expected = F.cross_entropy(seen.logits, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("into_core", [False, True])
def test_gradient_routes(into_core):
    """Who is trained by what: the location network by REINFORCE alone, the baseline by itself."""
    net, seen, _ = glimpses(reinforce_into_core=into_core)
    y = seen.logits.argmax(-1).clone()
    y[:3] = (y[:3] + 1) % 10  # half of them wrong: rewards differ
    R = ram.reward_for(seen.logits, y, "correct")
    b = net.baseline(seen.h.detach()).squeeze(-1)
    log_pi = ram.location_log_prob(seen.sample, seen.mu, 0.2)
    parts = {
        "class": F.cross_entropy(seen.logits, y),
        "reinforce": ram.reinforce_loss(log_pi, R, b),
        "baseline": ram.baseline_loss(R, b),
    }
    reached = {}
    for name, loss in parts.items():
        parameters = dict(net.named_parameters())
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        reached[name] = {
            parameter.split(".")[0]
            for parameter, gradient in zip(parameters, gradients)
            if gradient is not None and gradient.abs().sum() > 0
        }
    assert reached["class"] == {"glimpse", "core", "action"}
    assert reached["reinforce"] == {"location"} | ({"glimpse", "core"} if into_core else set())
    assert reached["baseline"] == {"baseline"}
    assert (seen.sample != seen.l[1:]).any()
    args = Args(reward="correct", location_std=0.2, reinforce_weight=0.5)
    loss, told = ram.hybrid_loss(net, seen, y, args)
    assert told["charts/reward"] == R.mean()
    expected = parts["class"] + 0.5 * parts["reinforce"] + parts["baseline"]
    torch.testing.assert_close(loss, expected)
    weights = list(net.parameters())
    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, weights))


@pytest.mark.parametrize("kind", ["probability", "correct"])
def test_math_reward_is_that_of_a_class_drawn_or_of_the_likeliest(kind):
    logits, y = torch.randn(4, 10).double().requires_grad_(), torch.tensor([3, 0, 9, 3])
    R = ram.reward_for(logits, y, kind)
    drawn = logits.detach().softmax(-1).multinomial(100_000, replacement=True)
    said = logits.detach().topk(1).indices if kind == "correct" else drawn
    expected = (said == y[:, None]).double().mean(1)
    torch.testing.assert_close(R.double(), expected, atol=0.01, rtol=0)
    assert not R.requires_grad  # the class is learned from the cross-entropy alone


@pytest.mark.parametrize("kind", ["probability", "correct"])
def test_math_the_loss_rewards_what_its_flag_says(kind):
    torch.manual_seed(0)
    net, y = RecurrentAttentionModel(8, 1, 10, lstm=False), torch.arange(10)
    seen = ram.look(net, ram.integral_image(torch.randint(0, 256, (10, 28, 28))), 3, std=0.2)
    _, parts = ram.hybrid_loss(net, seen, y, Args(reward=kind))
    expected = seen.logits.softmax(1)[range(10), y] if kind == "probability" else None
    expected = (seen.logits.argmax(1) == y).float() if expected is None else expected
    torch.testing.assert_close(parts["charts/reward"], expected.mean())


def test_math_core_begins_by_remembering():
    """Le, Jaitly and Hinton's start for rectified units: h_t = h_(t-1) + what a glimpse adds."""
    core, h = ram.CoreNetwork(lstm=False), torch.rand(5, 256)
    silent = torch.zeros(5, 256)
    torch.testing.assert_close(core(silent, (h,))[0], (h + core.from_g.bias).relu())


def test_math_lstm_core_begins_with_open_forget_gates():
    core, (g, h) = ram.CoreNetwork(lstm=True), torch.zeros(2, 5, 256)
    _, c = core(g, (h, torch.ones(5, 256)))
    torch.testing.assert_close(c, torch.full((5, 256), 1 / (1 + math.exp(-1))))


def test_math_catch_counts_lit_pixels_in_wide_blocks():
    """On a dark screen a ball shows in each scale with 1, not with a sixteenth in the widest."""
    net, screen = RecurrentAttentionModel(6, 3, 3, lstm=True), torch.zeros(1, 24, 24).byte()
    screen[0, 12, 12] = 255
    rho = net.retina(ram.integral_image(screen), torch.zeros(1, 2))
    assert rho.sum((2, 3)).tolist() == [[1, 1, 1]] and rho.max() == 1
    for layer in net.glimpse.children():  # and none of the layers behind it makes it small
        inputs = layer.weight.shape[1]
        assert layer.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.15)
        assert not layer.bias.any()
    means = RecurrentAttentionModel(6, 3, 3, lstm=False).retina
    rho = means(ram.integral_image(screen), torch.zeros(1, 2))
    assert rho.sum((2, 3)).tolist() == [[1, 1 / 4, 1 / 16]]


def test_math_lstm_core_keeps_both_halves_of_its_state():
    core = RecurrentAttentionModel(6, 3, 3, lstm=True).core
    g, h, c = torch.rand(3, 5, 256)
    torch.testing.assert_close(core(g, (h, c)), core.lstm(g, (h, c)))


@pytest.mark.parametrize("into_core", [False, True])
def test_gradient_of_catch_is_that_of_its_replay(into_core, monkeypatch):
    """Every term belongs to the move and the location that followed; none flows through them."""
    torch.manual_seed(0)
    moves, step = [], ram.Catch.step
    monkeypatch.setattr(ram.Catch, "step", lambda game, a: moves.append(a) or step(game, a))
    net = RecurrentAttentionModel(6, 3, 3, lstm=True)
    play = ram.play_catch(net, 64, 24, 0.2, greedy=False, reinforce_into_core=into_core)
    state = net.core.initial_state(64)
    R, l, expected = play.R, play.l.detach(), 0
    assert len(moves) == 23 and 0 < R.mean() < 1
    for t in range(23):
        h, state = net(ram.integral_image(play.screens[t]), l[t], state)
        log_pi, b = net.action(h).log_softmax(-1), net.baseline(h)[:, 0]
        score = log_pi[range(64), moves[t]]
        if t < 22:  # the last location is used by nobody
            mu = net.location(h if into_core else h.detach())
            score = score + 0.5 * ram.location_log_prob(l[t + 1], mu, 0.2)
        expected += (R - b).square() / 2 - score * (R - b).detach()
        expected += 0.03 * (log_pi.exp() * log_pi).sum(-1)
    args = Args(task="catch", reinforce_weight=0.5, entropy_cost=0.03)
    loss, told = ram.catch_loss(play, args)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(told["losses/entropy"], play.entropy.mean())  # of a move
    weights = list(net.parameters())
    gradients = torch.autograd.grad(loss, weights), torch.autograd.grad(expected.mean(), weights)
    torch.testing.assert_close(*gradients)


def test_math_catch_is_played_from_pi_or_by_the_likeliest_and_the_means():
    torch.manual_seed(0)
    net = RecurrentAttentionModel(6, 3, 3, lstm=True)
    for head in (net.action, net.location):
        torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        net.action.bias[:] = torch.tensor([0.0, 1.0, 2.0])  # pi of a move to the right is 0.665
        net.location.bias[:] = torch.tensor([0.3, -0.2])
    greedy, sampled = (ram.play_catch(net, 300, 24, 0.1, greedy=greedy) for greedy in (True, False))
    paddles = greedy.screens[:, :, -1].int().argmax(2)  # [T+1, B], but for a ball in the last row
    assert (paddles[0] == 11).all() and (paddles[5] == 16).all() and (paddles[15] == 22).all()
    looked = torch.tensor([0.3, -0.2]).expand(23, 300, 2)
    torch.testing.assert_close(greedy.l[1:], looked)
    assert greedy.l[0].std() == pytest.approx(3**-0.5, abs=0.05)  # anywhere
    assert sampled.l[1:].std() > 0.1
    pi = net.action.bias.softmax(0)
    assert sampled.log_pi_a.mean().item() == pytest.approx((pi * pi.log()).sum().item(), abs=0.03)
    state = net.core.initial_state(7)
    assert len(state) == 2 and not any(part.any() for part in state)


def test_math_catch_clips_where_it_looks_but_not_the_sample():
    torch.manual_seed(0)
    net = RecurrentAttentionModel(6, 3, 3, lstm=True)
    torch.nn.init.constant_(net.location.bias, 0.9)
    play = ram.play_catch(net, 200, 24, 0.2, greedy=False)
    assert play.l.abs().max() == 1
    expected = -1 - math.log(2 * math.pi * 0.2**2)  # minus the entropy of a Gaussian
    assert play.log_pi_l.mean().item() == pytest.approx(expected, abs=0.1)


def test_math_images_train_the_core_by_rewards_unless_told_otherwise(monkeypatch):
    told, digits = [], torch.zeros(4, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(ram, "look", lambda *how: told.append(how[-1]))
    monkeypatch.setattr(ram, "hybrid_loss", lambda *_: None)
    for into_core in (None, True, False):
        args = Args(**DIGITS, reinforce_into_core=into_core)
        list(ram.image_losses(None, args, digits, torch.zeros(4).long()))
    assert told == [True, True, False]


def test_math_cluttered_images_are_learned_and_tested_as_large_and_cluttered(monkeypatch):
    args, tables = Args(**DIGITS, task="cluttered"), []
    digits, labels, *sets = ram.load_images(args, "cpu")
    monkeypatch.setattr(ram, "look", lambda net, table, *_: tables.append(table))
    monkeypatch.setattr(ram, "hybrid_loss", lambda *_: None)
    list(ram.image_losses(None, args, digits, labels))
    ink = digits.flatten(1).sum(1).float().mean()  # of a digit without clutter
    for x in (torch.cat(tables)[:, -1, -1], *(part.x.flatten(1).sum(1) for part in sets)):
        assert x.float().mean() > 1.3 * ink
    assert tables[0].shape[1:] == (61, 61) and sets[1].x.shape[1:] == (60, 60)


@pytest.mark.parametrize(("M", "paths"), [(0, 1), (3, 3)])
def test_math_paths_keep_the_label_of_their_image(M, paths, monkeypatch):
    monkeypatch.setattr(ram, "look", lambda net, table, *_: table[:, -1, -1] / 28**2)
    monkeypatch.setattr(ram, "hybrid_loss", lambda net, seen, y, *_: (seen, y))
    labels = torch.arange(10).repeat(3)
    digits = labels[:, None, None].expand(30, 28, 28).byte()
    for seen, y in ram.image_losses(
        None, Args(**DIGITS, batch_size=10, monte_carlo_samples=M), digits, labels
    ):
        assert len(y) == 10 * paths and torch.equal(seen, y.float())


# ---- Data ---------------------------------------------------------------------------------------


def test_math_digits_reach_every_place_borders_included():
    digits = torch.full((20_000, 28, 28), 7, dtype=torch.uint8)
    x, centres = ram.make_images(digits, 32, 0, digits)
    assert x.shape == (20_000, 32, 32) and (x.flatten(1).sum(1) == 7 * 28 * 28).all()
    corners = ((centres + 1) / 2 * 32 - 14).round().long()
    assert corners.min() == 0 and corners.max() == 4
    counts = torch.bincount(corners[:, 0] * 5 + corners[:, 1], minlength=25)
    assert (counts - 800).abs().max() < 4 * math.sqrt(800)
    for i in range(10):
        assert (x[i, corners[i, 1] :, corners[i, 0] :][:28, :28] == 7).all()


def test_math_clutter_is_added_and_clipped():
    """Four 8x8 pieces: added to a digit of 200, clipped at 255, cut from the pool."""
    digits = torch.full((500, 28, 28), 200, dtype=torch.uint8)
    pool = torch.full((3, 28, 28), 100, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    x, _ = ram.make_images(digits, 60, 4, pool, generator)
    values = set(x.unique().tolist())
    assert values <= {0, 100, 200, 255, 300 - 45} and {100, 200, 255} <= values
    cluttered = (x == 100).flatten(1).sum(1) + (x == 255).flatten(1).sum(1)
    assert cluttered.max() <= 4 * 64 and cluttered.float().mean() > 200
    again, _ = ram.make_images(digits, 60, 4, pool, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    pool = torch.arange(1, 29)[:, None] + 30 * torch.arange(3)[:, None, None]  # tells digit and row
    x, _ = ram.make_images(
        torch.zeros_like(digits), 60, 1, pool.expand(3, 28, 28).byte(), generator
    )
    tops = {int(image[image > 0].min()) for image in x}
    assert tops == {row + 30 * digit for digit in range(3) for row in range(1, 22)}


def test_math_catch_physics():
    torch.manual_seed(0)
    game = ram.Catch(500, 24, "cpu")
    assert set(game.drift.tolist()) == {-1, 0, 1} and len(set(game.column.tolist())) == 24
    rewards = []
    for row in range(23):
        screen = game.screen()
        assert (screen[:, row] == 255).sum() == 500 and (screen[:, 23] == 255).sum() == 1000
        assert screen.flatten(1).sum(1).eq(3 * 255).all()
        column, drift = game.column.clone(), game.drift.clone()
        paddle = game.paddle.clone()
        a = torch.randint(3, (500,))
        rewards.append(game.step(a))
        assert torch.equal(game.paddle, (paddle + a - 1).clamp(0, 22))
        bounced = (column + drift < 0) | (column + drift > 23)
        assert torch.equal(game.column, torch.where(bounced, column - drift, column + drift))
        assert game.column.min() >= 0 and game.column.max() <= 23
    assert all((r == 0).all() for r in rewards[:-1])
    caught = (game.column == game.paddle) | (game.column == game.paddle + 1)
    assert torch.equal(rewards[-1], caught.float()) and 0 < caught.float().mean() < 0.3


def test_math_a_perfect_player_catches_every_ball():
    torch.manual_seed(0)
    game, ahead = ram.Catch(1000, 24, "cpu"), ram.Catch(1000, 24, "cpu")
    ahead.column, ahead.drift = game.column.clone(), game.drift.clone()
    for _ in range(23):
        ahead.step(torch.ones(1000, dtype=torch.long))
    for _ in range(23):
        R = game.step(1 + (ahead.column.clamp(max=22) - game.paddle).sign())
    assert R.mean() == 1


def test_math_frozen_sets_are_those_of_every_seed():
    sets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        sets.append(ram.load_images(Args(**DIGITS, task="cluttered", seed=seed), "cpu"))
    for one, other in zip(sets[0][2:], sets[1][2:]):
        assert all(map(torch.equal, one, other))
    digits, labels, validation, test = sets[0]
    assert [len(digits), len(labels), len(validation.y), len(test.y)] == [1250, 1250, 250, 297]


def test_math_catch_is_scored_greedily_and_sampled(monkeypatch):
    class Fake:
        def __init__(self, *_, greedy):
            self.R = torch.tensor([float(greedy)])

    monkeypatch.setattr(ram, "play_catch", Fake)
    scores = ram.evaluate(None, Args(task="catch"), None)
    assert scores == {"eval/caught": 100, "eval/caught_sampled": 0}


def test_math_evaluation_averages_sampled_paths_and_follows_the_means_once(monkeypatch):
    """Probabilities are averaged, not logits, votes or one path; random numbers stay in place."""
    paths, drawn = [1e-9, 0.9, 0.9, 0.9], []

    def look(*_, std):
        p = paths[len(drawn) % 4] if std else 1e-9
        drawn.append(std)
        l = torch.tensor([[[1.0, 1.0]], [[0.3, -0.4]]])
        return ram.Glimpses(torch.tensor([[1 - p, p]]).log(), l, *[None] * 3)

    monkeypatch.setattr(ram, "look", look)
    digit = torch.tensor([[-0.3, 0.4]])  # a half image's width from the last glimpse, 14 pixels
    images = ram.Images(torch.zeros(1, 28, 28).byte(), torch.tensor([1]), digit)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    scores = ram.evaluate(None, Args(monte_carlo_samples=3), images)
    assert scores == {"eval/error": 0, "eval/error_single_path": 100, "eval/distance": 14}
    assert torch.equal(torch.get_rng_state(), state) and drawn == [0.15] * 3 + [0]
    ram.evaluate(None, Args(), images)
    assert drawn[4:] == [0.15] * 10 + [0]


# ---- What a run does with the method ------------------------------------------------------------


@pytest.fixture
def numbered(monkeypatch):
    """240 images to learn from and 16 to test with: every pixel of image n is n, its class n % 10.

    As they are: nothing is moved and no clutter added.
    """

    def load(split):
        n = torch.arange(240) if split == "train" else torch.arange(240, 256)
        return n.byte()[:, None, None].repeat(1, 28, 28), n % 10

    pools = []

    def make_images(digits, S, num_clutter, pool, generator=None):
        pools.append(pool[:, 0, 0].tolist())
        return digits, torch.zeros(len(digits), 2)

    monkeypatch.setattr(ram, "load_digits", load)
    monkeypatch.setattr(ram, "make_images", make_images)
    return pools


def test_math_training_validation_and_test_images_are_apart(numbered, tmp_path, monkeypatch):
    seen = {True: [], False: []}

    class RightInTheTest(torch.nn.Linear):
        def forward(self, x):
            n = (x[:, 0, 0, 0] * 255).round().long()
            seen[torch.is_grad_enabled()].append(n.tolist())
            return F.one_hot((n + (n < 240)) % 10, 10) + 0.0 * self.weight.sum()

    monkeypatch.setattr(ram, "make_network", lambda _: RightInTheTest(1, 1))
    args = Args(**DIGITS, task="cluttered", model="fc", epochs=3, eval_every=2, batch_size=64)
    metrics = ram.main(dataclasses.replace(args, run_dir=str(tmp_path)))
    order = [n for part in seen[True] for n in part]
    epochs = order[:200], order[200:400], order[400:]
    training, validation, test = (list(range(*ends)) for ends in ((200,), (200, 240), (240, 256)))
    assert all(sorted(epoch) == training for epoch in epochs) and epochs[0] != epochs[1]
    assert sum(a < b for a, b in zip(epochs[0], epochs[0][1:])) < 150  # shuffled
    assert seen[False] == [validation, validation, test]  # after epoch 2, at the end
    assert all(pool == training for pool in numbered)  # clutter, too, comes from these alone
    assert metrics["losses/cross_entropy"] == pytest.approx(math.log(math.e + 9))  # wrong each time
    assert metrics["validation/error"] == 100 and metrics["eval/error"] == 0
    rows = (tmp_path / "metrics.csv").read_text().split()
    assert [row for row in rows if "/error" in row] == [
        "2,validation/error,100.0",
        "3,validation/error,100.0",
        "3,eval/error,0.0",
    ]


def test_math_flags_reach_training_evaluation_and_drawing(numbered, tmp_path, monkeypatch):
    looked, weights, look, hybrid_loss = [], [], ram.look, ram.hybrid_loss

    def noting(net, table, num_glimpses, policy="learned", std=0.0, reinforce_into_core=True):
        numbers = (table[:, 1, 1]).long().tolist()
        looked.append((numbers, num_glimpses, policy, std, reinforce_into_core))
        return look(net, table, num_glimpses, policy, std, reinforce_into_core)

    def noting_weights(net, seen, y, *rest):
        weights.append(rest)
        return hybrid_loss(net, seen, y, *rest)

    monkeypatch.setattr(ram, "look", noting)
    monkeypatch.setattr(ram, "hybrid_loss", noting_weights)
    monkeypatch.setattr(ram, "check_flags", lambda _: None)  # some flags have no effect on others
    args = Args(**DIGITS, num_glimpses=2, location_std=0.35, reinforce_weight=0.5, batch_size=100)
    args = dataclasses.replace(args, glimpse_policy="random", reinforce_into_core=False, epochs=1)
    args = dataclasses.replace(args, monte_carlo_samples=3, seed=5, run_dir=str(tmp_path))
    ram.main(args)
    torch.manual_seed(5)
    untrained = ram.make_network(args).location.weight  # as random glimpses leave it
    assert torch.equal(torch.load(tmp_path / "checkpoint.pt")["net"]["location.weight"], untrained)
    assert [(len(numbers), *rest) for numbers, *rest in looked[:2]] == [
        (300, 2, "random", 0.35, False)
    ] * 2
    assert weights == [(args,)] * 2
    validation, test = list(range(200, 240)), list(range(240, 256))
    expected = [(validation, 0.35)] * 3 + [(validation, 0.0)] + [(test, 0.35)] * 3
    expected += [(test, 0.0), (test[:12], 0.0)]  # the last ones are drawn
    assert looked[2:] == [(numbers, 2, "random", std, True) for numbers, std in expected]


def test_math_drawn_are_the_path_its_patches_and_the_class(tmp_path, monkeypatch):
    l, logits = torch.rand(8, 12, 2) * 2 - 1, torch.randn(12, 10)
    monkeypatch.setattr(ram, "look", lambda *_, **__: ram.Glimpses(logits, l, *[None] * 3))
    x = torch.randint(256, (12, 60, 60), dtype=torch.uint8)
    images = ram.Images(x, torch.arange(12) % 10, torch.zeros(12, 2))
    with monkeypatch.context() as patch:
        patch.setattr(ram.plt, "close", lambda _: None)
        ram.draw_glimpses(None, Args(task="cluttered"), images, tmp_path / "glimpses.png")
    axes = plt.gcf().axes
    plt.close("all")
    assert len(axes) == 12
    for i, axis in enumerate(axes):
        path = (((l[:, i] + 1) * 30).round() - 0.5).numpy()  # pixel 0 is drawn from -0.5 to 0.5
        np.testing.assert_array_equal(axis.images[0].get_array(), x[i].numpy())
        np.testing.assert_allclose(axis.lines[0].get_xydata(), path, atol=1e-4)
        np.testing.assert_allclose(axis.collections[0].get_offsets(), path, atol=1e-4)
        assert axis.get_title() == f"{i % 10} read as {logits[i].argmax()}"
        assert [patch.get_width() for patch in axis.patches] == [12, 24, 48] * 2
        centres = [patch.get_center() for patch in axis.patches]
        np.testing.assert_allclose(centres, path[[0, 0, 0, -1, -1, -1]], atol=1e-4)


def test_math_catch_is_played_with_its_deviation_and_filmed_where_it_looks(tmp_path, monkeypatch):
    played, plays, play_catch = [], [], ram.play_catch

    def noting(net, *how, greedy, reinforce_into_core=None):
        played.append((*how, greedy, reinforce_into_core))
        plays.append(play_catch(net, *how, greedy, reinforce_into_core or False))
        return plays[-1]

    pictures, fromarray = [], Image.fromarray
    monkeypatch.setattr(ram, "play_catch", noting)
    monkeypatch.setattr(ram, "GAMES_PER_EPOCH", 100)
    monkeypatch.setattr(ram, "GAMES_IN_EVALUATION", 20)
    monkeypatch.setattr(Image, "fromarray", lambda a: pictures.append(a.copy()) or fromarray(a))
    args = Args(task="catch", epochs=1, batch_size=40, location_std=0.3, device="cpu")
    metrics = ram.main(dataclasses.replace(args, run_dir=str(tmp_path)))
    assert metrics["charts/SPS"] * 60 * metrics["charts/minutes"] == pytest.approx(80)  # games
    evaluated, filmed = [(20, 24, 0.3, True), (20, 24, 0.3, False)], [(8, 24, 0.3, True)]
    untrained = [(*how, None) for how in evaluated + filmed]
    assert played == [(40, 24, 0.3, False, False)] * 2 + untrained
    for into_core in (False, True, None):
        flags = dataclasses.replace(args, reinforce_into_core=into_core)
        next(ram.game_losses(ram.make_network(flags), flags))
        assert played.pop() == (40, 24, 0.3, False, into_core is True)
        plays.pop()
    centres, whole = ((plays[-1].l + 1) * 12).round().long().transpose(0, 1).flatten(0, 1), 0
    assert len(pictures) == len(centres) == 8 * 24
    for picture, (x, y) in zip(pictures, centres.tolist()):
        rows, columns = (picture == (255, 60, 60)).all(2).nonzero()
        if min(x, y) >= 3 and max(x, y) <= 21:
            ends = columns.min(), columns.max(), rows.min(), rows.max()
            assert ends == (8 * x - 24, 8 * x + 23, 8 * y - 24, 8 * y + 23)
            whole += 1
    assert whole > 50


def test_math_the_location_network_alone_has_a_rate_of_its_own(numbered, tmp_path):
    args = Args(**DIGITS, num_glimpses=2, location_rate=0.3, epochs=2, run_dir=str(tmp_path))
    net = ram.make_network(args)
    sees, chooses = (set(group["params"]) for group in ram.make_optimizer(net, args).param_groups)
    assert chooses == set(net.location.parameters())
    assert sees == set(net.parameters()) - chooses
    metrics = ram.main(args)
    sees, chooses = torch.load(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]
    assert sees["lr"] == metrics["charts/learning_rate"] == pytest.approx(1e-3 / 2)
    assert chooses["lr"] == pytest.approx(0.3e-3 / 2)


def test_learns_on_with_what_the_checkpoint_holds(numbered, tmp_path, monkeypatch):
    """The time spent, sgd's momentum, the fall of the rate, and other draws on a GPU."""
    args = Args(**DIGITS, model="fc", optimizer="sgd", epochs=1)
    ram.main(dataclasses.replace(args, run_dir=str(tmp_path)))
    path, seeds = tmp_path / "checkpoint.pt", []
    checkpoint = torch.load(path)
    assert checkpoint["optimizer"]["param_groups"][0]["momentum"] == 0.9
    ram.save_checkpoint(path, **checkpoint | {"seconds": 6000.0})
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    metrics = ram.main(dataclasses.replace(args, epochs=4, resume=str(path)))
    assert 100 < metrics["charts/minutes"] < 101 and metrics["charts/SPS"] > 200 / 6000
    assert metrics["charts/learning_rate"] == pytest.approx(1e-3 / 4) and seeds == [2]
    for at, epochs in (("report", 5), ("evaluate", 6)):  # nothing is left but the last evaluation
        monkeypatch.setattr(ram, at, lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit, match="Stopped; evaluate with --evaluate"):
            ram.main(dataclasses.replace(args, epochs=epochs, resume=str(path)))


def test_math_reported_is_the_mean_of_an_epoch_and_a_loss_that_is_no_number_ends_it(
    numbered, tmp_path, monkeypatch
):
    values = iter([1.0, 2.0, 6.0, 1.0, math.nan, 1.0])

    def losses(net, *_):
        for _, value in zip(range(3), values):
            yield (
                next(net.parameters()).sum() * value,
                {"losses/cross_entropy": torch.tensor(value)},
            )

    monkeypatch.setattr(ram, "image_losses", losses)
    args = Args(**DIGITS, model="fc", epochs=3, run_dir=str(tmp_path))
    with pytest.raises(ram.Diverged, match="loss is nan in step 2 of epoch 2: the run stops"):
        ram.main(args)
    assert "1,losses/cross_entropy,3.0" in (tmp_path / "metrics.csv").read_text()
    assert "1,losses/loss," in (tmp_path / "metrics.csv").read_text()
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 1


# ---- Runs ---------------------------------------------------------------------------------------


def test_learns_digits_and_goes_on_bit_for_bit(tmp_path):
    args = Args(**DIGITS, epochs=8, batch_size=32, learning_rate=4e-3, eval_every=4)
    args = dataclasses.replace(args, run_dir=str(tmp_path / "whole"))
    metrics = ram.main(args)
    assert metrics["eval/error"] < 70  # chance: 90
    assert (tmp_path / "whole" / "glimpses.png").stat().st_size > 5000
    (tmp_path / "whole" / "glimpses.png").unlink()
    checkpoint = str(tmp_path / "whole" / "checkpoint.pt")
    evaluated = ram.main(dataclasses.replace(args, run_dir="", evaluate=checkpoint))
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}
    assert (tmp_path / "whole" / "glimpses.png").stat().st_size > 5000

    first = dataclasses.replace(args, run_dir=str(tmp_path / "parts"))
    losses, epochs = ram.image_losses, []

    def interrupted(*arguments):
        epochs.append(1)
        if len(epochs) == 6:
            raise KeyboardInterrupt
        return losses(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="Stopped; go on"):
        patch.setattr(ram, "image_losses", interrupted)
        ram.main(first)
    parts = str(tmp_path / "parts" / "checkpoint.pt")
    assert torch.load(parts)["epoch"] == 5
    resumed = ram.main(dataclasses.replace(args, run_dir="", resume=parts))
    clocks = ("charts/SPS", "charts/minutes")
    assert {k: v for k, v in resumed.items() if k not in clocks} == {
        k: v for k, v in metrics.items() if k not in clocks
    }


@pytest.mark.parametrize("flags", [{"model": "conv"}, {"model": "fc"}, {"monte_carlo_samples": 3}])
def test_learns_with_other_models(flags, tmp_path):
    args = Args(**DIGITS, epochs=6, batch_size=32, learning_rate=2e-3, run_dir=str(tmp_path))
    metrics = ram.main(dataclasses.replace(args, **flags))
    assert metrics["eval/error"] < 85


def test_command_line_catch_is_played_and_filmed(tmp_path, monkeypatch):
    monkeypatch.setattr(ram, "GAMES_PER_EPOCH", 1024)
    monkeypatch.setattr(ram, "GAMES_IN_EVALUATION", 200)
    args = Args(task="catch", epochs=2, batch_size=256, run_dir=str(tmp_path), device="cpu")
    metrics = ram.main(args)
    assert 0 <= metrics["eval/caught"] <= 100
    for again in (False, True):
        with Image.open(tmp_path / "games.gif") as film:
            assert film.n_frames == 8 * 24
        if not again:
            (tmp_path / "games.gif").unlink()
            evaluated = dataclasses.replace(args, evaluate=str(tmp_path / "checkpoint.pt"))
            assert ram.main(evaluated)["eval/caught"] == metrics["eval/caught"]


class Mnist(http.server.BaseHTTPRequestHandler):
    files = None

    def do_GET(self):
        content = self.files.get(self.path.removeprefix("/"))
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


def test_learns_at_a_rate_that_falls_to_one_step_above_zero(tmp_path):
    args = Args(**DIGITS, model="fc", epochs=4, batch_size=500, run_dir=str(tmp_path))
    ram.main(args)
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    rates = [float(value) for _, tag, value in rows if tag == "charts/learning_rate"]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_learns_to_look_better_than_at_random():
    """Stripes somewhere among faint clutter: coarse patches show where, the finest which way."""
    stripes = torch.zeros(2, 6, 6, dtype=torch.uint8)
    stripes[0, ::2], stripes[1, :, ::2] = 255, 255
    faint = torch.full((1, 28, 28), 40, dtype=torch.uint8)
    args = Args()

    def error_of(policy: str) -> float:
        torch.manual_seed(1)
        net = RecurrentAttentionModel(6, 3, 2, lstm=False)
        optimizer = ram.make_optimizer(net, args)
        optimizer.param_groups[1]["lr"] *= args.location_rate
        for step in range(501):
            y = torch.randint(2, (96 if step < 500 else 4000,))
            x, _ = ram.make_images(stripes[y], 24, 1, faint)
            seen = ram.look(net, ram.integral_image(x), 3, policy, args.location_std)
            loss, _ = ram.hybrid_loss(net, seen, y, args)
            ram.update(optimizer, loss)
        return (seen.logits.argmax(-1) != y).float().mean().item()

    learned, random = error_of("learned"), error_of("random")
    assert learned < 0.85 * random and random > 0.2


def test_learns_from_a_download(tmp_path, monkeypatch):
    """From a server on this machine: four files, checked, written whole, not fetched twice."""
    contents = {}
    for split, n in (("train", 60), ("t10k", 12)):
        images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), np.uint8).tobytes()
        contents[f"{split}-images-idx3-ubyte.gz"] = b"\0" * 16 + images
        contents[f"{split}-labels-idx1-ubyte.gz"] = b"\0" * 8 + bytes(i % 10 for i in range(n))
    Mnist.files = {name: gzip.compress(content) for name, content in contents.items()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mnist)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(ram, "MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(ram, "MNIST_MD5", sums | {"t10k-labels-idx1-ubyte.gz": "wrong"})
        ram.load_mnist(str(tmp_path), "train")
        with pytest.raises(SystemExit, match="its checksum is wrong"):
            ram.load_mnist(str(tmp_path), "t10k")
        assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(
            name for name in contents if name != "t10k-labels-idx1-ubyte.gz"
        )
    finally:
        server.shutdown()
        server.server_close()
    x, y = ram.load_mnist(str(tmp_path), "train")
    assert x.shape == (60, 28, 28) and y[:12].tolist() == [*range(10), 0, 1]
    with pytest.raises(SystemExit, match=r"(?s)cannot be reached.*--dataset digits"):
        ram.load_mnist(str(tmp_path), "t10k")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"task": "catch", "model": "conv"}, "--task catch is played by --model ram alone"),
        ({"task": "catch"}, "--dataset is for images"),
        ({"task": "catch", "dataset": "mnist", "num_glimpses": 3}, "--num-glimpses is for images"),
        ({"task": "catch", "dataset": "mnist", "batch_size": 4096}, "at most 2000, the games of"),
        (
            {"task": "catch", "dataset": "mnist", "glimpse_policy": "random"},
            "--glimpse-policy is for ram on images",
        ),
        ({"model": "fc", "monte_carlo_samples": 2}, "--monte-carlo-samples is for ram on images"),
        ({"model": "conv", "num_glimpses": 3}, "--num-glimpses has no effect with --model conv"),
        ({"fc_width": 64}, "--fc-width has no effect with --model ram"),
        ({"entropy_cost": 0.1}, "--entropy-cost has no effect on images"),
        (
            {"task": "catch", "dataset": "mnist", "reward": "correct"},
            "--reward has no effect on catch",
        ),
        (
            {"glimpse_policy": "centre", "reinforce_weight": 1.0},
            "--reinforce-weight has no effect without locations to learn",
        ),
        (
            {"glimpse_policy": "random", "location_std": 0.3},
            "--location-std has no effect without locations to learn: leave it out",
        ),
        ({"evaluate": "good.pt", "location_std": 0.3}, "with --location-std 0.15, not with"),
        ({"num_scales": 40}, "passes 56, two images"),
        ({"patch_size": 57}, "passes 56, two images"),
        ({"location_std": 0.0}, "--location-std must be above 0"),
        ({"batch_size": 0}, "--batch-size must lie between 1"),
        ({"num_glimpses": -1}, "--num-glimpses must lie between 0"),
        ({"evaluate": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        (
            {"resume": "good.pt", "num_glimpses": 3},
            "made with --num-glimpses 0, not with --num-glimpses 3",
        ),
        ({"evaluate": "good.pt", "glimpse_policy": "random"}, "not with --glimpse-policy random"),
        ({"evaluate": "good.pt", "dataset": "mnist"}, "made with --dataset digits, not with"),
        ({"resume": "good.pt", "optimizer": "sgd"}, "made with --optimizer adam, not with"),
        ({"resume": "good.pt", "learning_rate": 0.5}, "made with --learning-rate 0.001, not with"),
        ({"dataset": "mnist"}, "is damaged.*delete it"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(**DIGITS)
    state = {"net": ram.make_network(args).state_dict(), "args": dataclasses.asdict(args)}
    ram.save_checkpoint(Path("good.pt"), **state)
    Path("data/mnist").mkdir(parents=True)
    Path("data/mnist/train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        ram.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str) and sorted(tmp_path.rglob("*")) == before


def test_bad_input_flags_of_training_stay_as_they_were(tmp_path):
    args = Args(**DIGITS, resume=str(tmp_path / "checkpoint.pt"))
    state = {"net": ram.make_network(args).state_dict(), "args": dataclasses.asdict(args)}
    ram.save_checkpoint(tmp_path / "checkpoint.pt", **state)
    changes = {"seed": 2, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.5}
    changes |= {"location_rate": 1.0, "reward": "correct"}
    changes |= {"reinforce_weight": 1.0, "reinforce_into_core": False, "monte_carlo_samples": 2}
    assert changes.keys() == set(ram.KEPT) - {"entropy_cost"}  # which images do not have
    for name, value in changes.items():
        with pytest.raises(SystemExit, match=f"made with --{name.replace('_', '-')} .*, not with"):
            ram.main(dataclasses.replace(args, **{name: value}))
    args = Args(task="catch", device="cpu", resume=args.resume)
    state = {"net": ram.make_network(args).state_dict(), "args": dataclasses.asdict(args)}
    ram.save_checkpoint(tmp_path / "checkpoint.pt", **state)
    with pytest.raises(SystemExit, match=r"made with --entropy-cost .*, not with .* 0\.5"):
        ram.main(dataclasses.replace(args, entropy_cost=0.5))


def test_bad_input_is_refused_before_data_is_loaded(tmp_path, monkeypatch):
    """And a signal while it is loaded ends in a sentence."""
    args = Args(task="catch", epochs=1, eval_every=1, run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(ram, "GAMES_PER_EPOCH", 128)
    assert "eval/caught" in ram.main(dataclasses.replace(args, epochs=2))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row[:13] for row in rows if "caught," in row] == ["1,eval/caught", "2,eval/caught"]
    monkeypatch.setattr(ram, "load_images", lambda *_: signal.raise_signal(signal.SIGTERM))
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    for flags, sentence in (
        ({}, "holds a run already"),
        ({"run_dir": "", "resume": checkpoint}, "has had 2 epochs"),
        ({"task": "mnist", "run_dir": "", "evaluate": checkpoint}, "made with --task catch"),
        ({"task": "mnist", "run_dir": ""}, "Stopped"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            ram.main(dataclasses.replace(args, **flags))


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "recurrent_visual_attention.py"), "--task", "cluttered"]
    command += ["--dataset", "digits", "--epochs", "1", "--eval-every", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "eval/error_single_path" in done.stdout and "eval/distance" in done.stdout
    (run_dir,) = tmp_path.glob("runs/cluttered_ram__recurrent_visual_attention__1__*")
    names = {path.name for path in run_dir.iterdir()}
    assert {"checkpoint.pt", "metrics.csv", "glimpses.png"} <= names
