"""a3c_atari.py against the bugs that public ports of its paper have had.

Caught here: gradients that pile up in shared .grad fields (ensure_shared_grads); RMSProp's epsilon
outside the root; a mean where the paper sums; the same random numbers in every worker; an LSTM
state that the bootstrap advances or an episode inherits; a lost life that restarts the game;
clipped scores in the report; entropy over the wrong axis; a negative learning rate at the end;
an evaluation that never ends because nobody presses FIRE; a dead worker that hangs the run.
"""

import copy
import dataclasses
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import toy_games
from PIL import Image
from running import Locked, processes_of, start_run, wait_for, work_here
from torch.distributions import Categorical

import a3c_atari
from a3c_atari import ActorCritic, Args, Segment, SharedRMSProp

ROOT = Path(__file__).parent.parent
TOY = {"env_id": "toy_games:Side-v0", "num_workers": 2, "eval_episodes": 4}


def random_segment(N: int = 5, K: int = 3, num_actions: int = 4, seed: int = 0) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    return Segment(
        s_tm1=torch.randint(0, 256, (N, K, 84, 84, 4), generator=generator, dtype=torch.uint8),
        a_tm1=torch.randint(0, num_actions, (N, K), generator=generator),
        r_t=torch.randint(-1, 2, (N, K), generator=generator).float(),
        terminated=torch.rand(N, K, generator=generator) < 0.2,
        truncated=torch.rand(N, K, generator=generator) < 0.2,
        v_t=torch.randn(N, K, generator=generator),
        fresh=torch.zeros(N, K, dtype=torch.bool),
        lstm_state=ActorCritic.initial_lstm_state(K),
    )


def games(*names: str) -> list[gym.Env]:
    return [a3c_atari.make_env(f"toy_games:{name}") for name in names]


# ---- Equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 5])
def test_math_n_step_returns_are_those_of_a_double_loop(N):
    r, v, discount = torch.randn(N, 40).double(), torch.randn(N, 40).double(), 0.9
    terminated, truncated = torch.rand(2, N, 40) < 0.25
    returns = a3c_atari.n_step_returns(r, terminated, truncated, v, discount)
    for k in range(40):
        for i in range(N):
            expected, weight = 0.0, 1.0
            for j in range(i, N):
                expected += weight * r[j, k].item()
                weight *= discount
                if terminated[j, k]:
                    break
                if truncated[j, k] or j == N - 1:
                    expected += weight * v[j, k].item()
                    break
            assert returns[i, k].item() == pytest.approx(expected, abs=1e-12)


def test_math_sample_follows_pi_and_its_generator():
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5]]).repeat(40_000, 1)
    a = a3c_atari.sample(logits, torch.Generator().manual_seed(0))
    assert torch.equal(a, a3c_atari.sample(logits, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(a.bincount() / 40_000, logits[0].softmax(-1), atol=0.01, rtol=0)


def test_math_policy_loss_and_entropy_are_those_of_categorical():
    logits = torch.randn(5, 3, 6, dtype=torch.float64) * 3
    a, advantage = torch.randint(0, 6, (5, 3)), torch.randn(5, 3, dtype=torch.float64)
    pi = Categorical(logits=logits)
    loss = a3c_atari.policy_loss(logits, a, advantage)
    assert loss.item() == pytest.approx(-(pi.log_prob(a) * advantage).sum().item())
    assert a3c_atari.policy_entropy(logits).item() == pytest.approx(pi.entropy().sum().item())


def test_math_entropy_of_a_certain_policy_is_zero_not_nan():
    logits = torch.tensor([[0.0, -1e4, -1e4]], requires_grad=True)
    entropy = a3c_atari.policy_entropy(logits)
    entropy.backward()
    assert entropy.item() == 0 and torch.isfinite(logits.grad).all()


def test_math_the_loss_sums_over_the_segment_with_the_papers_weights():
    torch.manual_seed(0)
    net, segment = ActorCritic(4, "small", lstm=False), random_segment()
    args = Args(entropy_cost=0.3, value_cost=0.7, discount=0.8)
    loss, watched = a3c_atari.a3c_loss(net, segment, args)
    expected = 0.0
    for k in range(3):
        for i in range(5):
            logits, v, _ = net(segment.s_tm1[i : i + 1, k : k + 1], segment.lstm_state, None)
            pi = Categorical(logits=logits[0, 0])
            R, weight = 0.0, 1.0
            for j in range(i, 5):
                R, weight = R + weight * segment.r_t[j, k].item(), weight * 0.8
                if segment.terminated[j, k] or segment.truncated[j, k] or j == 4:
                    R += 0 if segment.terminated[j, k] else weight * segment.v_t[j, k].item()
                    break
            advantage = R - v.item()
            expected -= pi.log_prob(segment.a_tm1[i, k]).item() * advantage
            expected += 0.7 * advantage**2 / 2 - 0.3 * pi.entropy().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    parts = watched["losses/policy_loss"] + 0.7 * watched["losses/value_loss"]
    parts -= 0.3 * watched["losses/entropy"]
    assert parts * 15 == pytest.approx(expected, rel=1e-4)


def test_math_shared_rmsprop_is_equation_1_with_epsilon_inside_the_root():
    rng = np.random.default_rng(0)
    theta, g = rng.normal(size=(3, 2)), np.zeros((3, 2))
    shared = torch.tensor(theta)
    optimizer = SharedRMSProp([shared], decay=0.9, eps=0.1)
    assert optimizer.g[0].is_shared()
    for learning_rate in (0.5, 0.25, 0.1):
        gradient = rng.normal(size=(3, 2))
        g = 0.9 * g + (1 - 0.9) * gradient**2
        theta = theta - learning_rate * gradient / np.sqrt(g + 0.1)
        optimizer.step([torch.tensor(gradient)], learning_rate)
    np.testing.assert_allclose(shared.numpy(), theta, rtol=1e-12)
    np.testing.assert_allclose(optimizer.g[0].numpy(), g, rtol=1e-12)


def test_math_clip_by_norm_scales_all_gradients_alike():
    gradients = [torch.full((2, 2), 3.0), torch.full((7,), -4.0)]
    norm = math.sqrt(4 * 9 + 7 * 16)
    assert a3c_atari.clip_by_norm(gradients, 2 * norm) == pytest.approx(norm)
    assert gradients[0][0, 0] == 3
    assert a3c_atari.clip_by_norm(gradients, norm / 2) == pytest.approx(norm)
    assert gradients[0][0, 0] == pytest.approx(1.5) and gradients[1][0] == pytest.approx(-2)


@pytest.mark.parametrize(
    ("network", "lstm", "num_actions", "count"),
    [
        ("small", False, 6, 676_144 + 257 * 7),
        ("small", True, 4, 676_144 + 4 * 256 * (256 + 256 + 2) + 257 * 5),
        ("large", False, 18, 1_684_128 + 513 * 19),
        ("large", True, 3, 1_684_128 + 4 * 256 * (512 + 256 + 2) + 257 * 4),
    ],
)
def test_math_parameter_counts(network, lstm, num_actions, count):
    net = ActorCritic(num_actions, network, lstm)
    assert sum(p.numel() for p in net.parameters()) == count


def test_math_torch7_initialisation():
    torch.manual_seed(0)
    net = ActorCritic(4, "small", lstm=False)
    for layer in (*net.trunk, net.value, net.policy):
        for p in layer.parameters():
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert p.abs().max() <= bound and (p.numel() < 200 or p.abs().max() > 0.98 * bound)


@pytest.mark.parametrize("network", ["small", "large"])
def test_math_the_networks_are_those_of_2013_and_2015(network):
    net, s = ActorCritic(4, network, lstm=False), random_segment().s_tm1
    w = [p.detach() for p in net.parameters()]
    x = F.conv2d(s.flatten(0, 1).permute(0, 3, 1, 2).float() / 255, w[0], w[1], stride=4).relu()
    x = F.conv2d(x, w[2], w[3], stride=2).relu()
    if network == "large":
        x = F.conv2d(x, w[4], w[5]).relu()
    W, b, W_pi, b_pi, W_v, b_v = w[-6:]
    x = (x.flatten(1) @ W.T + b).relu()
    fresh = torch.zeros(5, 3, dtype=torch.bool)
    logits, v, _ = net(s, net.initial_lstm_state(3), fresh)
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits.detach().flatten(0, 1), x @ W_pi.T + b_pi, **close)
    torch.testing.assert_close(v.detach().flatten(), (x @ W_v.T + b_v)[:, 0], **close)


def orthogonal(weight: torch.Tensor, gain: float) -> bool:
    """Rows at right angles, or columns where there are more rows, all of length gain."""
    W = weight.detach().flatten(1)
    W = W if len(W) <= W.shape[1] else W.T
    return torch.allclose(W @ W.T, gain**2 * torch.eye(len(W)), atol=1e-4)


@pytest.mark.parametrize("lstm", (False, True))
def test_math_orthogonal_init(lstm, tmp_path, monkeypatch):
    monkeypatch.setattr(a3c_atari, "supervise", lambda *arguments: arguments)
    args = Args(**TOY, lstm=lstm, orthogonal_init=True, run_dir=str(tmp_path))
    _, (_, _, net, *_), *_ = a3c_atari.main(args)
    assert isinstance(net, ActorCritic)
    layers = [layer for layer in net.trunk if hasattr(layer, "weight")]
    assert len(layers) == 3 and all(orthogonal(layer.weight, 2**0.5) for layer in layers)
    assert orthogonal(net.policy.weight, 0.01) and orthogonal(net.value.weight, 1)
    assert not any(p.any() for layer in (*layers, net.policy, net.value) for p in [layer.bias])


def test_math_screens_enter_as_numbers_from_0_to_1():
    net = ActorCritic(4, "small", lstm=False)
    seen = []
    net.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    s = torch.randint(0, 256, (2, 3, 84, 84, 4), dtype=torch.uint8)
    net(s, net.initial_lstm_state(3), torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(seen[0], s.flatten(0, 1).permute(0, 3, 1, 2).float() / 255)


# ---- Gradients ----------------------------------------------------------------------------------


def test_gradient_routes():
    """R - V trains the value through the value loss alone, and pi through the policy loss alone."""
    net, segment = ActorCritic(4, "small", lstm=False), random_segment()
    logits, v, _ = net(segment.s_tm1, segment.lstm_state, segment.fresh)
    heads = [net.policy.weight, net.value.weight]
    pi_loss = a3c_atari.policy_loss(logits, segment.a_tm1, segment.r_t - v)
    on_policy, on_value = torch.autograd.grad(pi_loss, heads, allow_unused=True, retain_graph=True)
    assert on_value is None and on_policy.abs().sum() > 0
    v_loss = a3c_atari.value_loss(segment.r_t - v)
    on_policy, on_value = torch.autograd.grad(v_loss, heads, allow_unused=True)
    assert on_policy is None and on_value.abs().sum() > 0


def test_gradient_of_the_value_is_v_minus_r():
    v, R = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    a3c_atari.value_loss(R - v).backward()
    torch.testing.assert_close(v.grad, v.detach() - R)


def test_gradient_of_one_segment_applied_twice_moves_twice_as_far():
    """Gradients that pile up between updates (the ensure_shared_grads bug) move it further."""
    torch.manual_seed(0)
    shared, net = ActorCritic(4, "small", lstm=False), ActorCritic(4, "small", lstm=False)
    a3c_atari.copy_parameters(shared, net)
    optimizer = SharedRMSProp(list(shared.parameters()), decay=1.0, eps=0.1)  # g stays 0
    moves = []
    for _ in range(2):
        before = shared.policy.weight.detach().clone()
        a3c_atari.update(net, optimizer, random_segment(), 0.01, Args())
        moves.append(shared.policy.weight.detach() - before)
    assert moves[0].abs().max() > 1e-4
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in net.parameters())


def test_gradient_that_is_not_finite_moves_nothing():
    net = ActorCritic(4, "small", lstm=False)
    before = [p.detach().clone() for p in net.parameters()]
    segment = random_segment()._replace(v_t=torch.full((5, 3), math.nan))
    optimizer = SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    watched = a3c_atari.update(net, optimizer, segment, 0.01, Args())
    assert not math.isfinite(watched["losses/gradient_norm"])
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


def test_gradient_of_an_update_is_clipped():
    net = ActorCritic(4, "small", lstm=False)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = SharedRMSProp(list(net.parameters()), decay=1.0, eps=1.0)  # plain descent
    a3c_atari.update(net, optimizer, random_segment(), 1.0, Args(max_gradient_norm=0.5))
    moves = [(p.detach() - b).flatten() for p, b in zip(net.parameters(), before)]
    assert torch.cat(moves).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_math_defaults_are_the_papers():
    args = Args()
    assert (args.t_max, args.discount, args.entropy_cost, args.value_cost) == (5, 0.99, 0.01, 0.5)
    assert (args.learning_rate, args.rmsprop_decay, args.rmsprop_eps) == (7e-4, 0.99, 0.1)
    assert (args.max_gradient_norm, a3c_atari.MAX_FRAMES) == (40, 108_000)
    assert a3c_atari.make_env("PongNoFrameskip-v4").action_space.n == 6


# ---- LSTM ---------------------------------------------------------------------------------------


def test_math_lstm_segment_equals_single_steps_and_forgets_between_episodes():
    torch.manual_seed(0)
    net, segment = ActorCritic(4, "small", lstm=True), random_segment()
    state = (torch.randn(3, 256), torch.randn(3, 256))
    fresh = segment.fresh.clone()
    fresh[2, 1] = True
    logits, v, end = net(segment.s_tm1, state, fresh)
    h, c = (x.clone() for x in state)
    for i in range(5):
        if i == 2:
            h[1], c[1] = 0, 0
        features = net.trunk(segment.s_tm1[i].permute(0, 3, 1, 2).float() / 255)
        h, c = net.lstm(features, (h.clone(), c.clone()))
        torch.testing.assert_close(logits[i], net.policy(h), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v[i], net.value(h)[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, (h, c), rtol=1e-4, atol=1e-5)


def test_math_lstm_state_is_carried_over_segments_detached_and_not_advanced_by_the_bootstrap():
    torch.manual_seed(0)
    net = ActorCritic(2, "small", lstm=True)
    segments = a3c_atari.play(games("TruncatedClock-v0", "Side-v0"), [1, 2], net, 4)
    state, truncations = net.initial_lstm_state(2), 0
    for _ in range(6):
        segment, _ = next(segments)
        torch.testing.assert_close(segment.lstm_state, state, rtol=1e-4, atol=1e-5)
        assert not any(x.requires_grad for x in segment.lstm_state)
        goes_on = torch.zeros(1, 2, dtype=torch.bool)
        for i in range(4):  # the bootstrap looks one screen further with the state from here
            with torch.no_grad():
                *_, state = net(segment.s_tm1[i : i + 1], state, segment.fresh[i : i + 1])
                if segment.truncated[i, 0]:
                    s_t = torch.tensor([4, 5, 6, 7], dtype=torch.uint8)
                    s_t = torch.stack([s_t.expand(84, 84, 4)] * 2)[None]
                    v = net(s_t, state, goes_on)[1][0, 0]
                    torch.testing.assert_close(segment.v_t[i, 0], v, rtol=1e-4, atol=1e-5)
                    truncations += 1
    assert truncations == 3
    assert segment.lstm_state[0].abs().sum() > 0


# ---- Play ---------------------------------------------------------------------------------------


def test_math_play_gives_the_paper_its_segments():
    """With one game a segment ends after t_max steps or with its episode."""
    net = ActorCritic(2, "small", lstm=False)
    segments = a3c_atari.play(games("Clock-v0"), [1], net, 5)
    for lengths in (5, 2), (5, 2):
        clock = 0
        for length in lengths:
            segment, games_over = next(segments)
            assert segment.r_t.shape == (length, 1)
            for i in range(length):
                stack = [max(0, clock - 3 + j) for j in range(4)]
                assert segment.s_tm1[i, 0, 0, 0].tolist() == stack
                assert segment.fresh[i, 0] == (clock == 0)
                clock += 1
            assert (segment.r_t == 1).all()  # 1 .. 7, clipped
            assert segment.terminated[:, 0].tolist() == [False] * (length - 1) + [clock == 7]
            assert (segment.v_t[:-1] == 0).all()
        assert [(game["r"], game["l"]) for game in games_over] == [(28, 7)]  # unclipped


def test_math_a_segment_ends_with_the_value_of_the_screens_it_reached():
    torch.manual_seed(0)
    net = ActorCritic(2, "small", lstm=False)
    segments = a3c_atari.play(games("Side-v0"), [1], net, 4)
    first, second = next(segments)[0], next(segments)[0]
    goes_on = torch.zeros(1, 1, dtype=torch.bool)
    with torch.no_grad():
        v = net(second.s_tm1[:1], net.initial_lstm_state(1), goes_on)[1].item()
    assert first.v_t[-1].item() == pytest.approx(v, abs=1e-5) and v != 0


def test_math_rewards_are_clipped_on_both_sides():
    net, (env,) = ActorCritic(2, "small", lstm=False), games("Clock-v0")
    step = env.step

    def halves(a):  # from -1.5 to 1.5
        s_t, r_t, *rest = step(a)
        return s_t, (r_t - 4) / 2, *rest

    env.step = halves
    segment, _ = next(a3c_atari.play([env], [1], net, 7))
    assert segment.r_t[:, 0].tolist() == [-1, -1, -0.5, 0, 0.5, 1, 1]


def test_math_play_tells_its_games_apart():
    net = ActorCritic(2, "small", lstm=False)
    _, over = next(a3c_atari.play(games("Clock-v0", "Side-v0"), [1, 2], net, 10))
    assert [game["l"] for game in over] == [7, 10] and over[0]["r"] == 28


def test_math_truncation_bootstraps_from_the_last_screen_of_its_own_episode():
    net = ActorCritic(2, "small", lstm=False)
    envs = games("TruncatedClock-v0", "Side-v0")
    segment = next(a3c_atari.play(envs, [1, 2], net, 9))[0]
    assert segment.truncated[:, 0].tolist() == [False] * 6 + [True] + [False] * 2
    last = torch.tensor([4, 5, 6, 7], dtype=torch.uint8).expand(1, 1, 84, 84, 4)
    with torch.no_grad():
        v = net(last, net.initial_lstm_state(1), torch.zeros(1, 1, dtype=torch.bool))[1].item()
    assert segment.v_t[6, 0].item() == pytest.approx(v, abs=1e-5)
    assert not segment.terminated[:, 0].any()
    assert segment.s_tm1[7, 0].unique().tolist() == [0]  # the next episode has begun


def test_math_life_loss_ends_the_episode_and_not_the_game():
    env = a3c_atari.make_env("BreakoutNoFrameskip-v4")
    env.reset(seed=0)
    rng, lives, rewards, info = np.random.default_rng(0), [5], [], {}
    while "episode" not in info and len(rewards) < 2000:
        _, r, terminated, truncated, info = env.step(int(rng.integers(4)))
        rewards.append(r)
        if terminated and "episode" not in info:
            env.reset()
            lives.append(env.unwrapped.ale.lives())
    assert lives == [5, 4, 3, 2, 1] and terminated and not truncated
    assert info["episode"]["r"] == sum(rewards) > 0
    assert 4 * len(rewards) - 20 <= info["episode"]["l"] <= 4 * len(rewards) + 30  # frames
    env.reset()
    assert env.unwrapped.ale.lives() == 5


class Lives(gym.Env):
    """Nothing but a count of lives, and an `ale` that tells it."""

    observation_space, action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(1)

    def __init__(self):
        self.ale, self.resets = self, 0
        self.lives = lambda: self.count

    def reset(self, *, seed=None, options=None):
        self.count, self.resets = 3, self.resets + 1
        return 0, {}

    def step(self, action):
        self.count += action
        return 0, 0.0, self.count == 0, False, {}


def test_math_lives_may_be_won_back():
    game = Lives()
    env = a3c_atari.EpisodicLife(game)
    env.reset()
    for change, terminated in ((1, False), (0, False), (-1, True), (-1, True), (-1, True)):
        assert env.step(change)[2] == terminated
        if terminated and game.count:
            env.reset()
    assert game.resets == 1 and env.step(-1)[2]
    env.reset()
    assert game.resets == 2
    env.reset(seed=1)
    assert game.resets == 3


def test_math_the_time_limit_truncates(monkeypatch):
    monkeypatch.setattr(a3c_atari, "MAX_FRAMES", 120)
    env = a3c_atari.make_env("BreakoutNoFrameskip-v4")
    env.reset(seed=0)
    ends = [env.step(0)[2:4]]
    while not any(ends[-1]):
        ends.append(env.step(0)[2:4])
    assert ends[0] == (False, False) and ends[-1] == (False, True) and len(ends) <= 30
    env.reset()
    assert env.unwrapped.ale.getEpisodeFrameNumber() <= 34  # a new game, after up to 30 no-ops


def test_math_evaluation_plays_on_through_lost_lives():
    env, terminated = a3c_atari.make_env("BreakoutNoFrameskip-v4", training=False), False
    env.reset(seed=0)
    while not terminated:
        *_, terminated, _, info = env.step(1)  # FIRE serves, the paddle stands still
    assert env.unwrapped.ale.lives() == 0 and "episode" in info


def test_math_atari_screens():
    env = a3c_atari.make_env("PongNoFrameskip-v4")
    s, _ = env.reset(seed=0)
    assert s.shape == (84, 84, 4) and s.dtype == np.uint8 and (s[..., 0] == s[..., 3]).all()
    frames = env.unwrapped.ale.getEpisodeFrameNumber()
    s_t, *_ = env.step(2)
    assert (s_t[..., :3] == s[..., 1:]).all()
    assert env.unwrapped.ale.getEpisodeFrameNumber() == frames + 4
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0
    sticky = a3c_atari.make_env("ALE/Pong-v5")
    assert sticky.unwrapped.ale.getFloat("repeat_action_probability") == 0.25
    sticky.reset(seed=0)
    frames = sticky.unwrapped.ale.getEpisodeFrameNumber()
    sticky.step(0)
    assert sticky.unwrapped.ale.getEpisodeFrameNumber() == frames + 4


def test_math_no_ops_are_1_to_30_and_differ():
    env, starts = a3c_atari.make_env("PongNoFrameskip-v4", training=False), []
    for seed in range(60):
        env.reset(seed=seed)
        starts.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert min(starts) >= 1 and max(starts) <= 30 and len(set(starts)) > 20


def test_math_every_worker_has_its_own_random_numbers():
    streams = [a3c_atari.independent_seeds(4, 1, rank, 0) for rank in range(16)]
    streams += [a3c_atari.independent_seeds(4, 1, rank, 50_000) for rank in range(16)]
    streams += [a3c_atari.independent_seeds(4, 2, rank, 0) for rank in range(16)]
    assert len({seed for stream in streams for seed in stream}) == 4 * 48
    assert streams[0] == a3c_atari.independent_seeds(4, 1, 0, 0)


def test_math_a_policy_that_never_fires_is_cut_off(monkeypatch, tmp_path):
    monkeypatch.setattr(a3c_atari, "MAX_FRAMES", 600)
    net = ActorCritic(4, "small", lstm=True)
    with torch.no_grad():
        net.policy.bias[:] = torch.tensor([1e4, 0, 0, 0])
    args = Args(eval_episodes=2)
    metrics = a3c_atari.evaluate(net, args, tmp_path / "game.gif")
    assert metrics["eval/episodic_return"] == 0 and 600 <= metrics["eval/episodic_length"] < 604
    with Image.open(tmp_path / "game.gif") as film:
        assert film.size == (160, 210) and film.n_frames >= 1
    assert metrics == a3c_atari.evaluate(net, args)


def test_math_evaluation_counts_whole_games_and_follows_its_seed():
    torch.manual_seed(0)
    net = ActorCritic(2, "small", lstm=False)
    args = Args(**TOY)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again = a3c_atari.evaluate(net, args), a3c_atari.evaluate(net, args)
    other = a3c_atari.evaluate(net, dataclasses.replace(args, seed=2, eval_episodes=20))
    assert first == again != other and torch.equal(before, torch.get_rng_state())
    assert first["eval/episodic_length"] == 10 and 0 <= first["eval/episodic_return"] <= 10
    assert other["eval/episodic_return_std"] > 0


def test_math_evaluation_samples_and_carries_the_lstm_state(monkeypatch):
    """The paper's protocol: no life-loss episodes, own seeds, actions drawn from pi."""
    net = ActorCritic(2, "small", lstm=True)
    with torch.no_grad():
        net.policy.weight.zero_()
        net.policy.bias[:] = torch.tensor([0.0, 1.0])
    made, actions, states, seeds = [], [], [], []
    make_env, forward, step = a3c_atari.make_env, net.forward, toy_games.Side.step

    def noting_make_env(env_id, training=True):
        made.append(training)
        env = make_env(env_id, training)
        reset = env.reset
        env.reset = lambda seed: (seeds.append(seed), reset(seed=seed))[1]
        return env

    def noting_forward(s, lstm_state, fresh):
        outputs = forward(s, lstm_state, fresh)
        states.append((lstm_state[0].clone(), outputs[2][0].clone(), fresh.any().item()))
        return outputs

    monkeypatch.setattr(a3c_atari, "make_env", noting_make_env)
    monkeypatch.setattr(net, "forward", noting_forward)
    monkeypatch.setattr(
        toy_games.Side, "step", lambda game, a: (actions.append(a), step(game, a))[1]
    )
    watched, scores, score = [], [], a3c_atari.RecordEpisodeStatistics.step

    def noting_score(env, a):
        *outcome, info = score(env, a)
        scores.extend([info["episode"]["r"]] if "episode" in info else [])
        return *outcome, info

    monkeypatch.setattr(a3c_atari.RecordEpisodeStatistics, "step", noting_score)
    filmed = []
    monkeypatch.setattr(a3c_atari, "write_gif", lambda pictures, *_: filmed.extend(pictures))
    args = Args(**TOY | {"eval_episodes": 50})
    metrics = a3c_atari.evaluate(net, args, Path("game.gif"), lambda: watched.append(1))
    assert len(filmed) == 10  # of the first game alone
    assert metrics["eval/episodic_return"] == pytest.approx(np.mean(scores)) and len(scores) == 50
    assert metrics["eval/episodic_return_std"] == pytest.approx(np.std(scores)) != np.var(scores)
    assert made == [False] * 50 and len(set(seeds)) == 50 and len(watched) == 10
    assert np.mean(actions) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.08)
    assert states[0][0].abs().sum() == 0 and not any(fresh for *_, fresh in states)
    for (_, after, _), (before, _, _) in pairwise(states):
        assert torch.equal(before, after) and after.abs().sum() > 0


def test_math_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    a3c_atari.save_checkpoint(path, net={}, T=1)

    def save_half(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        a3c_atari.save_checkpoint(path, net={}, T=2)
    assert torch.load(path) == {"net": {}, "T": 1}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_bad_input_a_network_of_no_numbers_does_not_replace_one_that_works(broken, tmp_path):
    net, path = ActorCritic(2, "small", lstm=False), tmp_path / "checkpoint.pt"
    a3c_atari.save_checkpoint(path, net=net.state_dict(), T=1)
    with torch.no_grad():
        net.value.bias.fill_(broken)
    with pytest.raises(SystemExit, match=r"^Parameters are no longer finite: the run stops"):
        a3c_atari.save_checkpoint(path, net=net.state_dict(), T=2)
    assert torch.load(path)["T"] == 1


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("enforce fail\nin C++")])
def test_bad_input_a_full_disk_leaves_the_old_checkpoint(error, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    a3c_atari.save_checkpoint(path, net={}, T=1)

    def save(state, part):
        part.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        SystemExit, match=r"checkpoint\.pt cannot be written .*disk full"
    ) as refusal:
        a3c_atari.save_checkpoint(path, net={}, T=2)
    assert "\n" not in str(refusal.value)
    assert torch.load(path) == {"net": {}, "T": 1} and list(tmp_path.iterdir()) == [path]


def test_flags_that_change_when_a_run_goes_on_are_told(monkeypatch):
    """Not where they are the same, and not those of its place."""
    told = []
    monkeypatch.setattr(a3c_atari.tqdm, "write", told.append)
    before = dataclasses.asdict(Args(discount=0.9, run_dir="elsewhere"))
    checkpoint = a3c_atari.Checkpoint(args=before)
    a3c_atari.tell_changes(checkpoint, Args(discount=0.9, resume="checkpoint.pt"))
    assert told == []
    a3c_atari.tell_changes(checkpoint, Args(t_max=20))
    assert told == ["Goes on with --t-max 20 (before: 5), --discount 0.99 (before: 0.9)."]
    a3c_atari.tell_changes(a3c_atari.Checkpoint(args={"t_max": 4}), Args())  # an older script's
    assert told[1:] == ["Goes on with --t-max 5 (before: 4)."]


# ---- Processes ----------------------------------------------------------------------------------


def test_math_worker_follows_algorithm_s2(monkeypatch):
    """Copy, play, count, update, again: until the workers together have made all steps."""
    args = Args(**TOY, envs_per_worker=3, t_max=4, total_timesteps=100, learning_rate=0.5)
    args = dataclasses.replace(args, network="large")
    shared = ActorCritic(2, "large", lstm=False)
    with torch.no_grad():
        shared.policy.weight.zero_()
    optimizer = SharedRMSProp(list(shared.parameters()), 0.99, 0.1)
    T = Locked(40)
    reports, rates, played, seeds = [], [], [], []
    log = SimpleNamespace(put=reports.append)

    def update(net, given_optimizer, segment, learning_rate, given_args):
        assert given_optimizer is optimizer and given_args is args and net is not shared
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), shared.parameters()))
        assert not played or (segment.a_tm1 == 1).all()  # played with what was copied
        assert torch.initial_seed() == independent_seeds(5, args.seed, 7, 40)[-1]
        played.append(segment)
        assert T.value == 40 + sum(s.r_t.numel() for s in played)
        rates.append(learning_rate)
        with torch.no_grad():
            shared.policy.bias[:] = torch.tensor([0.0, 1e4])
            net.policy.bias[:] = torch.tensor([1e4, 0.0])
        finite = math.nan if len(rates) == 2 else 1.0
        return {"losses/gradient_norm": finite, "charts/learning_rate": learning_rate}

    independent_seeds = a3c_atari.independent_seeds
    monkeypatch.setattr(
        a3c_atari,
        "independent_seeds",
        lambda count, *purpose: (
            seeds.append((count, *purpose)),
            independent_seeds(count, *purpose),
        )[1],
    )
    arguments = (args, 40, shared, optimizer, T, log)
    work_here(monkeypatch, a3c_atari, 6, arguments, update)
    assert seeds == [(2 + 3, args.seed, 7, 40)]
    assert T.value >= 100 and T.value - played[-1].r_t.numel() < 100
    assert [len(segment.r_t) for segment in played] == [4, 4, 2] * 2
    steps = np.cumsum([segment.r_t.numel() for segment in played]) + 40
    assert rates == pytest.approx([0.5 * max(0, 1 - step / 100) for step in steps])
    assert rates[-1] == 0 and len({segment.r_t.shape[1] for segment in played} - {3}) == 0
    told = [(tag, step) for tag, value, step in reports if isinstance(value, float)]
    assert ("losses/gradient_norm", steps[1]) in told  # not finite: reported at once
    scores = [value for tag, value, _ in reports if tag == "charts/episodic_return"]
    assert len(scores) == 3 * ((int(steps[-1]) - 40) // 30)
    assert sum(scores) == sum(segment.r_t.sum() for segment in played)
    first_screens = [segment.s_tm1[0] for segment in played[:1]]
    assert not torch.equal(first_screens[0][0], first_screens[0][1]) or not torch.equal(
        first_screens[0][1], first_screens[0][2]
    )


def test_math_supervise_evaluates_and_saves_when_it_should(monkeypatch, tmp_path):
    """Every join lasts 100 steps of a second each, and Ctrl-C comes after 1100 of them."""
    counter, evaluated, saved = SimpleNamespace(value=0), [], []

    def join(timeout):
        counter.value += 100
        if counter.value == 1100:
            raise KeyboardInterrupt

    workers = SimpleNamespace(processes=[], join=join)
    monkeypatch.setattr(a3c_atari.mp, "spawn", lambda *_, **__: workers)
    monkeypatch.setattr(a3c_atari.signal, "signal", lambda *_: None)
    monkeypatch.setattr(a3c_atari.time, "perf_counter", lambda: float(counter.value))
    T, log = SimpleNamespace(get_obj=lambda: counter), SimpleNamespace(empty=lambda: True)
    writer, args = Mock(log_dir=tmp_path), Args(report_every=200, eval_every=300)

    def evaluate_now(step, watch):
        evaluated.append(step)
        return {}

    def save(T, seconds):
        saved.append((T, seconds))

    with pytest.raises(SystemExit, match="Stopped; go on"):
        a3c_atari.supervise(None, (), args, T, log, writer, 5.0, save, evaluate_now)
    assert evaluated == [400, 800]
    assert saved == [(step, 5 + step) for step in (200, 400, 600, 800, 1000, 1100)]


def test_math_supervise_reports_the_last_step_once(monkeypatch, tmp_path):
    """Workers that have made all steps take a while to end."""
    counter, reported = SimpleNamespace(value=0), []

    def join(timeout):
        counter.value = min(1100, counter.value + 300)
        return len(joined) == 6 or joined.append(timeout)

    joined, workers = [], SimpleNamespace(processes=[], join=join)
    monkeypatch.setattr(a3c_atari.mp, "spawn", lambda *_, **__: workers)
    monkeypatch.setattr(a3c_atari.signal, "signal", lambda *_: None)
    monkeypatch.setattr(a3c_atari, "report", lambda *told: reported.append(told[1:]))
    T, log = SimpleNamespace(get_obj=lambda: counter), SimpleNamespace(empty=lambda: True)
    args = Args(report_every=500, total_timesteps=1000)
    told = a3c_atari.supervise(
        None, (), args, T, log, Mock(), 0.0, lambda **_: None, lambda *_: {"eval/a": 1.0}
    )
    assert [step for step, _ in reported] == [600, 1100, 1100]
    assert reported[2][1] == {"eval/a": 1.0} and told == reported[1][1] | reported[2][1]


def test_worker_whose_main_process_is_gone_ends_though_nobody_reads_its_log(monkeypatch):
    threads = torch.get_num_threads()
    for alive in (True, False):
        parent, log = SimpleNamespace(is_alive=lambda alive=alive: alive), Mock()
        monkeypatch.setattr(a3c_atari.mp, "parent_process", lambda parent=parent: parent)
        monkeypatch.setattr(a3c_atari.signal, "signal", lambda *_: None)
        args = Args(**TOY, total_timesteps=1)
        a3c_atari.worker(0, args, 0, ActorCritic(2, "small", False), None, Locked(alive), log)
        assert log.cancel_join_thread.called == (not alive)
    torch.set_num_threads(threads)  # as they were before the worker


def add_one(rank: int, optimizer: SharedRMSProp) -> None:
    optimizer.step([torch.full((3,), -1.0) if rank == 0 else torch.tensor([0.0, 0.0, -1.0])], 1.0)


def test_math_steps_of_two_processes_both_land():
    theta = torch.zeros(3).share_memory_()
    optimizer = SharedRMSProp([theta], decay=1.0, eps=1.0)
    mp.spawn(add_one, (optimizer,), nprocs=2)
    assert theta.tolist() == [1, 1, 2]


def keep_writing(rank: int, theta: torch.Tensor, written) -> None:
    while True:
        theta.mul_(2).mul_(0.5)
        written.set()


def test_checkpoint_of_parameters_that_are_being_written(tmp_path, monkeypatch):
    """isfinite reads a number twice, and takes one that changes in between for a NaN."""
    theta = torch.rand(10_000).share_memory_()
    written = mp.get_context("spawn").Event()
    workers = mp.spawn(keep_writing, (theta, written), nprocs=1, join=False, daemon=True)
    assert written.wait(60)
    save, saved = torch.save, []
    monkeypatch.setattr(torch, "save", lambda state, path: (saved.append(state), save(state, path)))
    for _ in range(100):
        a3c_atari.save_checkpoint(tmp_path / "checkpoint.pt", net={"theta": theta}, T=1)
    assert workers.processes[0].is_alive()
    workers.processes[0].kill()
    assert not saved[0]["net"]["theta"].is_shared() and saved[0]["T"] == 1  # what was checked


@pytest.mark.parametrize("lstm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_learns_the_toy_game(lstm, tmp_path, monkeypatch):
    """Ten points a game are the optimum, five are chance."""
    evaluate = a3c_atari.evaluate

    def evaluate_a_copy(net, *rest):
        assert not net.policy.weight.is_shared()  # the workers do not change it meanwhile
        return evaluate(net, *rest)

    monkeypatch.setattr(a3c_atari, "evaluate", evaluate_a_copy)
    start = time.perf_counter()
    args = Args(**TOY, lstm=lstm, t_max=5, total_timesteps=32_000, learning_rate=1e-3)
    args = dataclasses.replace(args, envs_per_worker=4, eval_every=8000, report_every=4000)
    args = dataclasses.replace(args, run_dir=str(tmp_path), capture_video=True, eval_episodes=20)
    metrics = a3c_atari.main(args)
    assert metrics["eval/episodic_return"] > 9.5
    assert time.perf_counter() - start < 60
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("game_*.gif"))) >= 2
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    rates = [float(value) for _, tag, value in rows if tag == "charts/learning_rate"]
    assert rates == sorted(rates, reverse=True)
    assert 0 <= rates[-1] < 0.4 * rates[0]  # a report averages its own interval
    monkeypatch.undo()

    checkpoint = str(tmp_path / "checkpoint.pt")
    evaluated = a3c_atari.main(dataclasses.replace(args, evaluate=checkpoint, run_dir=""))
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}
    assert (tmp_path / "game.gif").exists()


def test_learns_on_from_where_it_stopped(tmp_path):
    args = Args(**TOY, total_timesteps=3000, report_every=500, rmsprop_start=0.25)
    args = dataclasses.replace(args, run_dir=str(tmp_path))
    a3c_atari.main(args)
    before = torch.load(tmp_path / "checkpoint.pt")
    assert 3000 <= before["T"] < 3000 + 2 * 5
    assert min(g.min() for g in before["g"]) > 0.25 * 0.99**700  # of units without gradient
    assert max(g.max() for g in before["g"]) > 0.25 * 0.99**500  # of the others
    path = str(tmp_path / "checkpoint.pt")
    on = dataclasses.replace(args, run_dir="", resume=path, total_timesteps=6000, report_every=1)
    a3c_atari.main(on)
    after = torch.load(tmp_path / "checkpoint.pt")
    assert 6000 <= after["T"] < 6010 and after["seconds"] > before["seconds"]
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    steps = [int(step) for step, tag, _ in rows if tag == "charts/SPS"]
    assert steps == sorted(steps)
    rates = [(int(step), float(v)) for step, tag, v in rows if tag == "charts/learning_rate"]
    _, rate = next(r for r in rates if r[0] > before["T"])
    assert 0 < rate < 7e-4 * (1 - before["T"] / 6000)
    minutes = [(int(step), 60 * float(v)) for step, tag, v in rows if tag == "charts/minutes"]
    speeds = [float(v) for _, tag, v in rows if tag == "charts/SPS"]
    for ((s0, then), (s1, now)), speed in zip(pairwise(minutes), speeds[1:], strict=True):
        assert s1 - s0 == pytest.approx((now - then) * speed, rel=1e-3, abs=1e-3)
    rested = dataclasses.replace(on, total_timesteps=6100, learning_rate=0.0, rmsprop_decay=1.0)
    a3c_atari.main(rested)  # a run that moves nothing keeps all as it was loaded
    last = torch.load(tmp_path / "checkpoint.pt")
    assert 6100 <= last["T"] < 6110
    assert all(torch.equal(last["net"][name], after["net"][name]) for name in after["net"])
    assert all(torch.equal(a, b) for a, b in zip(last["g"], after["g"]))
    with pytest.raises(SystemExit, match=r"is at step 61\d\d: raise --total-timesteps"):
        a3c_atari.main(rested)


def test_bad_input_a_game_that_crashes_ends_the_run(tmp_path):
    start = time.perf_counter()
    args = dataclasses.replace(Args(**TOY), env_id="toy_games:Crashing-v0", run_dir=str(tmp_path))
    with pytest.raises(mp.ProcessRaisedException, match="ZeroDivisionError"):
        a3c_atari.main(args)
    assert time.perf_counter() - start < 30
    assert multiprocessing.active_children() == []


def test_bad_input_a_checkpoint_of_another_games_actions(tmp_path):
    net, args = ActorCritic(3, "small", lstm=False), Args(**TOY)
    path = tmp_path / "checkpoint.pt"
    a3c_atari.save_checkpoint(path, net=net.state_dict(), args=dataclasses.asdict(args))
    with pytest.raises(SystemExit, match="no checkpoint of this script"):
        a3c_atari.main(dataclasses.replace(args, evaluate=str(path)))


def test_bad_input_a_loss_that_explodes_stops_the_run(tmp_path):
    args = dataclasses.replace(Args(**TOY), learning_rate=4e9, run_dir=str(tmp_path))
    with pytest.raises(SystemExit, match=r"is (nan|inf) at step \d+.*--learning-rate"):
        a3c_atari.main(args)
    assert multiprocessing.active_children() == []


def test_learns_to_its_end_then_ctrl_c_names_what_is_left_to_do(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(a3c_atari, "evaluate", interrupted)
    args = dataclasses.replace(Args(**TOY), total_timesteps=100, run_dir=str(tmp_path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit, match="Stopped; evaluate with --evaluate"):
            a3c_atari.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert torch.load(tmp_path / "checkpoint.pt")["T"] >= 100


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "name",
    [
        "SIGTERM",
        "SIGINT to all",
        "SIGKILL a worker",
        pytest.param("SIGINT", marks=pytest.mark.slow),
    ],
)
def test_command_line_signals_end_the_run_in_order(name, tmp_path):
    run = start_run("a3c_atari.py", tmp_path)
    wait_for((tmp_path / "checkpoint.pt").exists)
    children = processes_of(run)
    assert len(children) >= 2
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    if name == "SIGINT to all":  # as a terminal's Ctrl-C does
        os.killpg(run.pid, signal.SIGINT)
    elif name == "SIGKILL a worker":
        os.kill(children[-1], signal.SIGKILL)
    else:
        run.send_signal(getattr(signal, name))
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    if name == "SIGKILL a worker":
        assert "ProcessExitedException" in errors and "SIGKILL" in errors
    else:
        assert (
            "Stopped; go on with the same flags and --resume" in errors
            and "Traceback" not in errors
        )
        assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns > written
        assert torch.load(tmp_path / "checkpoint.pt")["T"] > 0
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_command_line_workers_do_not_outlive_their_parent(tmp_path):
    run = start_run("a3c_atari.py", tmp_path)
    wait_for(lambda: len(processes_of(run)) >= 3)  # workers and the tracker of shared memory
    children = processes_of(run)
    run.kill()
    run.communicate(timeout=120)
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)


def test_command_line_ctrl_c_while_workers_start(tmp_path):
    run = start_run("a3c_atari.py", tmp_path)
    wait_for(lambda: list(tmp_path.glob("events*")))
    time.sleep(0.5)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and "Traceback" not in errors


def faults(measured) -> None:
    """Pages that the system clears while ten times 8 MB are used and freed, ten times."""
    import resource

    a3c_atari.keep_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [np.ones(1_000_000) for _ in range(10)]
    measured.put(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_command_line_freed_memory_is_kept():
    """8 MB are 2,000 pages of 4 kB."""
    spawn = multiprocessing.get_context("spawn")
    measured = spawn.Queue()
    process = spawn.Process(target=faults, args=(measured,))
    process.start()
    assert measured.get(timeout=60) < 50_000  # once all of them
    process.join()


def test_command_line_breakout(tmp_path):
    """Two thousand steps of the README's command, end to end, in a folder of its own."""
    command = [sys.executable, str(ROOT / "a3c_atari.py"), "--env-id", "BreakoutNoFrameskip-v4"]
    command += ["--total-timesteps", "2000", "--num-workers", "2", "--eval-episodes", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "eval/episodic_return" in done.stdout and "charts/SPS" in done.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("BreakoutNoFrameskip-v4__a3c_atari__1__")
    assert torch.load(run_dir / "checkpoint.pt")["T"] >= 2000
    assert {"checkpoint.pt", "metrics.csv"} <= {path.name for path in run_dir.iterdir()}


# ---- Bad input ----------------------------------------------------------------------------------


def test_bad_input_ctrl_c_before_training_is_a_sentence(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(a3c_atari, "make_env", interrupted)
    with pytest.raises(SystemExit, match=r"^Stopped\.$"):
        a3c_atari.main(Args(**TOY))


def test_command_line_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times = iter((1000.25, 1000.75))
    monkeypatch.setattr(a3c_atari.time, "time", lambda: next(times))
    args = Args(**TOY | {"run_dir": ""})
    first, second = (a3c_atari.open_run_dir(args, "toy", "a3c") for _ in range(2))
    assert first != second and first.is_dir() and second.is_dir()
    assert first.name.startswith("toy__a3c__1__1000.")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "BrekoutNoFrameskip-v4"}, "No game.*BreakoutNoFrameskip-v4"),
        ({"env_id": "BreakoutNoFrameskip-v9"}, "No game.*BreakoutNoFrameskip-v4"),
        ({"env_id": "no_such_module:Env-v0"}, "No game no_such_module:Env-v0"),
        ({"env_id": "toy_games:Colour-v0"}, r"\(84, 84, 3\).*needs uint8 screens"),
        ({"env_id": "toy_games:Analogue-v0"}, "Discrete actions"),
        ({"env_id": "CartPole-v1"}, "needs uint8 screens"),
        ({"num_workers": 0}, "--num-workers must lie between 1 and 4294967295, not at 0"),
        ({"envs_per_worker": -1}, "--envs-per-worker must lie between"),
        ({"t_max": 0}, "--t-max must lie between 1"),
        ({"eval_episodes": 0}, "--eval-episodes must lie between 1"),
        ({"discount": 1.01}, "--discount must lie between 0 and 1, not at 1.01"),
        ({"learning_rate": math.nan}, "--learning-rate must lie between 0"),
        ({"seed": 10**30}, "--seed must lie between 0"),
        ({"env_id": "a:b:c"}, "No game a:b:c"),
        ({"env_id": "toy_games:Broken-v0"}, "No game toy_games:Broken-v0: no screen"),
        ({"run_dir": "good.pt/x"}, "cannot be written to.*choose another folder"),
        ({"run_dir": "used"}, "holds a run already"),
        ({"resume": "a.pt", "evaluate": "b.pt"}, "pass one of them"),
        ({"resume": "a.pt", "run_dir": "b"}, "leave --run-dir out"),
        ({"resume": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        ({"evaluate": "damaged.pt"}, "damaged.pt is missing, damaged or no checkpoint"),
        ({"evaluate": "foreign.pt"}, "foreign.pt is missing, damaged or no checkpoint"),
        (
            {"evaluate": "good.pt", "network": "large"},
            "made with --network small, not with --network large",
        ),
        ({"resume": "good.pt", "lstm": True}, "made with --lstm False, not with --lstm True"),
        (
            {"resume": "good.pt", "env_id": "PongNoFrameskip-v4"},
            "made with --env-id toy_games:Side-v0, not with --env-id PongNoFrameskip-v4",
        ),
        ({"evaluate": "good.pt", "env_id": "toy_games:Clock-v0"}, "not with --env-id toy_games:C"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(**TOY)
    Path("damaged.pt").write_bytes(b"PK\x03\x04 half a file")
    torch.save([1, 2, 3], "foreign.pt")
    net = ActorCritic(2, "small", lstm=False)
    state = {"net": net.state_dict(), "args": dataclasses.asdict(args)}
    a3c_atari.save_checkpoint(Path("good.pt"), **state)
    Path("used").mkdir()
    a3c_atari.save_checkpoint(Path("used/checkpoint.pt"), **state)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        a3c_atari.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


def test_command_line_toy_games_are_ones_of_gymnasium():
    for name in ("Side", "Clock", "TruncatedClock"):
        gym.make(f"toy_games:{name}-v0")


def test_command_line_catch_can_always_be_won():
    """A player that knows where the ball will land gets there from everywhere."""
    env = gym.make("toy_games:Catch-v0")
    for seed in range(40):
        env.reset(seed=seed)
        game, total, over = env.unwrapped, 0.0, False
        ahead = copy.deepcopy(game)
        while ahead.row < 11:
            ahead.step(1)
        while not over:
            _, r, over, *_ = env.step(1 + int(np.sign(ahead.column - game.paddle)))
            total += r
        assert total == 1
