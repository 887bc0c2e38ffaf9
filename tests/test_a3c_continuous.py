"""a3c_continuous.py against the bugs that public ports of its paper and continuous A3Cs have had.

Caught here: a density or an entropy off by the dimension, a variance used as a deviation; actions
clipped before their density is taken; one network whose gradient swamps the other's; a bootstrap
after an episode that ended, or in a whole episode; an LSTM state that an episode inherits or that
the bootstrap advances; clipped scores in the report; a variance that reaches zero.
"""

import dataclasses
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import ROOT, Locked, processes_of, start_run, wait_for, work_here
from torch.distributions import Independent, Normal

import a3c_continuous
from a3c_continuous import Args, GaussianActorCritic, Segment, SharedRMSProp

TOY = {"env_id": "test_a3c_continuous:Aim-v0", "num_workers": 1, "eval_episodes": 4}


class Aim(gym.Env):
    """The state names a point that the action is to hit; its reward is minus the squared miss."""

    observation_space = gym.spaces.Box(-1, 1, (2,))  # float32
    action_space = gym.spaces.Box(-1, 1, (2,))
    metadata: dict = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, truncates: bool = False):
        self.render_mode, self.truncates = render_mode, truncates

    def look(self) -> np.ndarray:
        self.point = self.np_random.uniform(-1, 1, 2)
        return self.point.astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.actions = 0, []
        return self.look(), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        reward = -float(np.square(action - self.point).sum())
        over = self.t == 6
        return self.look(), reward, over and not self.truncates, over and self.truncates, {}

    def render(self):
        picture = np.zeros((100, 120, 3), np.uint8)
        picture[:, : int(60 * (1 + self.point[0]))] = 255
        return picture


class MatrixAim(Aim):
    """Its states are no vector."""

    observation_space = gym.spaces.Box(-1, 1, (2, 2))

    def look(self) -> np.ndarray:
        return super().look() * np.ones((2, 2), np.float32)


class BlindAim(Aim):
    """It can be drawn, but nothing comes of it."""

    def render(self):
        return None


class DiscreteAim(Aim):
    """Its actions are a finite set."""

    action_space = gym.spaces.Discrete(2)


class EndlessRewardAim(Aim):
    """A reward that no number can hold."""

    def step(self, action):
        s_t, _, *rest = super().step(action)
        return s_t, math.inf, *rest


class CrashingAim(Aim):
    """Like Aim until its third step, which divides by zero."""

    def step(self, action):
        return super().step(action + 1 // (2 - self.t))


for kind in (Aim, MatrixAim, BlindAim, DiscreteAim, EndlessRewardAim, CrashingAim):
    gym.register(f"{kind.__name__}-v0", f"test_a3c_continuous:{kind.__name__}")
gym.register("TruncatedAim-v0", "test_a3c_continuous:Aim", kwargs={"truncates": True})


def game(name: str = "Aim-v0", pixels: bool = False) -> gym.Env:
    return a3c_continuous.make_env(f"test_a3c_continuous:{name}", pixels)


def random_trajectory(N: int = 7, D: int = 3, A: int = 2) -> Segment:
    return Segment(
        s_tm1=torch.randn(N, 1, D),
        a_tm1=torch.randn(N, 1, A),
        r_t=torch.randn(N, 1),
        terminated=torch.zeros(N, 1, dtype=torch.bool),
        v_t=torch.zeros(N, 1).index_fill_(0, torch.tensor([N - 1]), 3.0),
        policy_state=(torch.randn(1, 1, 128), torch.randn(1, 1, 128)),
        value_state=(torch.randn(1, 1, 128), torch.randn(1, 1, 128)),
    )


# ---- Equations ----------------------------------------------------------------------------------


def test_math_density_and_entropy_are_those_of_torch_distributions():
    mu, a = torch.randn(2, 5, 1, 3, dtype=torch.float64) * 3
    sigma2 = torch.rand(5, 1, 1, dtype=torch.float64) + 0.1
    pi = Independent(Normal(mu, sigma2.sqrt().expand_as(mu)), 1)
    torch.testing.assert_close(a3c_continuous.log_density(mu, sigma2, a), pi.log_prob(a))
    entropy = a3c_continuous.differential_entropy(sigma2)
    torch.testing.assert_close(3 * entropy, pi.entropy().sum())  # the paper's: of one dimension
    advantage = torch.randn(5, 1, dtype=torch.float64)
    loss = a3c_continuous.gaussian_policy_loss(mu, sigma2, a, advantage)
    torch.testing.assert_close(loss, -(pi.log_prob(a) * advantage).sum())


def test_math_samples_have_their_mean_and_variance_and_follow_their_generator():
    mu = torch.tensor([1.0, -2.0, 0.0]).expand(40_000, 3)
    sigma2 = torch.full((40_000, 1), 4.0)
    a = a3c_continuous.sample_gaussian(mu, sigma2, torch.Generator().manual_seed(0))
    again = a3c_continuous.sample_gaussian(mu, sigma2, torch.Generator().manual_seed(0))
    assert torch.equal(a, again)
    torch.testing.assert_close(a.mean(0), mu[0], atol=0.04, rtol=0)  # 4 standard errors
    torch.testing.assert_close(a.T.cov(), 4 * torch.eye(3), atol=0.12, rtol=0)


def test_math_the_variance_is_softplus_and_never_zero():
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    sigma2 = a3c_continuous.spherical_variance(x)
    torch.testing.assert_close(sigma2, (1 + x.exp()).log() + 1e-5)
    x = torch.full((1, 1, 1), -200.0, requires_grad=True)
    density = a3c_continuous.log_density(
        torch.zeros(1, 1, 2), a3c_continuous.spherical_variance(x), torch.zeros(1, 1, 2)
    )
    assert torch.isfinite(density) and torch.isfinite(torch.autograd.grad(density, x)[0])


@pytest.mark.parametrize("terminated", [False, True])
def test_math_losses_are_the_sums_of_a_loop(terminated):
    """A segment bootstraps from V of the state that it reached, unless an episode ended there."""
    torch.manual_seed(0)
    net, trajectory = GaussianActorCritic((3,), 2), random_trajectory()
    trajectory.terminated[-1] = terminated
    args = Args(discount=0.8, entropy_cost=0.3, reward_scale=0.5)
    pi_loss, v_loss, watched = a3c_continuous.a3c_losses(net, trajectory, args)
    policy_state, value_state = trajectory.policy_state, trajectory.value_state
    policy, value, entropies = 0.0, 0.0, 0.0
    for i in range(7):
        s = trajectory.s_tm1[i : i + 1]
        mu, sigma2, policy_state = net.policy(s, policy_state)
        v, value_state = net.value(s, value_state)
        pi = Normal(mu[0, 0], sigma2[0, 0].sqrt())
        R = sum(0.8 ** (j - i) * 0.5 * trajectory.r_t[j, 0].item() for j in range(i, 7))
        R += 0 if terminated else 0.8 ** (7 - i) * 3.0
        advantage = R - v.item()
        policy -= pi.log_prob(trajectory.a_tm1[i, 0]).sum().item() * advantage
        entropies += pi.entropy()[0].item()
        value += advantage**2 / 2
    assert pi_loss.item() == pytest.approx(policy - 0.3 * entropies, rel=1e-4)
    assert v_loss.item() == pytest.approx(value, rel=1e-4)
    assert watched["losses/policy_loss"] * 7 == pytest.approx(policy, rel=1e-4)
    assert watched["losses/value_loss"] * 7 == pytest.approx(value, rel=1e-4)
    assert watched["losses/entropy"] * 7 == pytest.approx(entropies, rel=1e-4)


def test_math_the_networks_are_those_of_the_supplement():
    net = GaussianActorCritic((17,), 6)
    lstm = 4 * 128 * (200 + 128 + 2)
    assert sum(p.numel() for p in net.pi.parameters()) == 18 * 200 + lstm + 129 * 7
    assert sum(p.numel() for p in net.v.parameters()) == 18 * 200 + lstm + 129
    s = torch.randn(1, 1, 17)
    w = [p.detach() for p in net.pi.parameters()]
    x = (s[0] @ w[0].T + w[1]).relu()
    i, _, g, o = (x @ w[2].T + w[4] + w[5]).chunk(4, -1)
    h = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    outputs = (h @ w[6].T + w[7])[0]
    mu, sigma2, _ = net.policy(s, None)
    torch.testing.assert_close(mu[0, 0].detach(), outputs[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sigma2.item(), math.log1p(outputs[6].exp()) + 1e-5)


def test_math_acting_step_by_step_gives_what_learning_sees_in_a_whole_episode():
    net = GaussianActorCritic((4,), 2)
    s, state = torch.randn(9, 2, 4), None
    mu, sigma2, ends = net.policy(s, None)
    for t in range(9):
        mu_t, sigma2_t, state = net.policy(s[t : t + 1], state)
        torch.testing.assert_close(mu_t, mu[t : t + 1])
        torch.testing.assert_close(sigma2_t, sigma2[t : t + 1])
    torch.testing.assert_close(state, ends)


def test_math_the_convolutions_are_linear():
    net = GaussianActorCritic((84, 84, 3), 1)
    kinds = [type(layer) for layer in net.pi.trunk]
    assert kinds == [torch.nn.Conv2d, torch.nn.Conv2d, torch.nn.Flatten]
    s = torch.randint(0, 256, (2, 1, 84, 84, 3), dtype=torch.uint8)
    w = [p.detach() for p in net.pi.parameters()]
    x = F.conv2d(s[:, 0].permute(0, 3, 1, 2).float() / 255, w[0], w[1], stride=4)
    x = F.conv2d(x, w[2], w[3], stride=2).flatten(1)[:, None]
    expected = net.pi.outputs(net.pi.lstm(x)[0])
    torch.testing.assert_close(net.pi(s, None)[0], expected, rtol=1e-4, atol=1e-5)


def test_math_defaults_are_the_papers():
    args = Args()
    assert (args.t_max, args.discount, args.entropy_cost) == (0, 0.99, 1e-4)
    assert args.reward_scale == 0.01
    assert (args.rmsprop_decay, args.rmsprop_eps, args.max_gradient_norm) == (0.99, 1e-7, 40)


# ---- Gradients ----------------------------------------------------------------------------------


def test_gradient_each_loss_reaches_its_own_network():
    net = GaussianActorCritic((3,), 2)
    *losses, _ = a3c_continuous.a3c_losses(net, random_trajectory(), Args())
    for loss, own in zip(losses, (net.pi, net.v)):
        gradients = torch.autograd.grad(
            loss, list(net.parameters()), allow_unused=True, retain_graph=True
        )
        owned = {id(p) for p in own.parameters()}
        for p, gradient in zip(net.parameters(), gradients):
            assert (gradient is not None) == (id(p) in owned)


def test_gradient_the_entropy_widens_the_policy():
    x = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    entropy = a3c_continuous.differential_entropy(a3c_continuous.spherical_variance(x))
    (gradient,) = torch.autograd.grad(entropy, x)
    assert gradient.item() == pytest.approx(0.5 / (2 * (math.log(2) + 1e-5)))


def test_gradient_of_each_network_is_clipped_by_itself():
    torch.manual_seed(0)
    net, trajectory = GaussianActorCritic((3,), 2), random_trajectory()
    trajectory = trajectory._replace(r_t=1000 * trajectory.r_t)
    *losses, _ = a3c_continuous.a3c_losses(net, trajectory, Args())
    before = [[p.detach().clone() for p in n.parameters()] for n in (net.pi, net.v)]
    expected = [
        torch.autograd.grad(loss, list(network.parameters()))
        for loss, network in zip(losses, (net.pi, net.v))
    ]
    norms = [torch.cat([g.flatten() for g in part]).norm().item() for part in expected]
    optimizer = SharedRMSProp(list(net.parameters()), decay=1.0, eps=1.0)  # plain descent
    watched = a3c_continuous.update(net, optimizer, trajectory, 1.0, Args(max_gradient_norm=0.5))
    assert min(norms) > 0.5 and watched["charts/learning_rate"] == 1.0
    assert watched["losses/gradient_norm"] == pytest.approx(math.hypot(*norms), rel=1e-3)
    for network, was, gradients, norm in zip((net.pi, net.v), before, expected, norms):
        for p, b, gradient in zip(network.parameters(), was, gradients):
            torch.testing.assert_close(p.detach(), b - gradient * 0.5 / norm, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in net.parameters())


def test_gradient_that_is_not_finite_moves_nothing():
    net = GaussianActorCritic((3,), 2)
    before = [p.detach().clone() for p in net.parameters()]
    trajectory = random_trajectory()._replace(r_t=torch.full((7, 1), math.nan))
    optimizer = SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    watched = a3c_continuous.update(net, optimizer, trajectory, 0.01, Args())
    assert not math.isfinite(watched["losses/gradient_norm"])
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))
    assert all((g == 0).all() for g in optimizer.g)


# ---- Play ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Aim-v0", "TruncatedAim-v0"])
def test_math_whole_episodes_do_not_bootstrap(name):
    net = GaussianActorCritic((2,), 2)
    env = game(name)
    trajectories = a3c_continuous.play(env, 1, net, 0)
    for _ in range(2):
        trajectory, over = next(trajectories)
        assert trajectory.r_t.shape == (6, 1) and trajectory.a_tm1.shape == (6, 1, 2)
        assert trajectory.terminated[:, 0].tolist() == [False] * 5 + [True]
        assert (trajectory.v_t == 0).all()
        assert trajectory.policy_state is None and trajectory.value_state is None
        assert over["l"] == 6 and over["r"] == pytest.approx(trajectory.r_t.sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["Aim-v0", "TruncatedAim-v0"])
def test_math_segments_bootstrap_and_hand_on_both_lstm_states(name):
    """Six steps in segments of 4: the LSTMs see each state once, whatever the bootstraps saw."""
    torch.manual_seed(0)
    net = GaussianActorCritic((2,), 2)
    trajectories = a3c_continuous.play(game(name), 1, net, 4)
    segments = [next(trajectories) for _ in range(6)]
    for (first, unfinished), (second, over) in zip(segments[::2], segments[1::2]):
        assert (len(first.r_t), len(second.r_t), unfinished) == (4, 2, None) and over["l"] == 6
        assert first.policy_state is None and first.value_state is None
        with torch.no_grad():
            *_, policy_state = net.policy(first.s_tm1, None)
            _, value_state = net.value(first.s_tm1, None)
            v = net.value(torch.cat([first.s_tm1, second.s_tm1]), None)[0][4]
        torch.testing.assert_close(second.policy_state, policy_state, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(second.value_state, value_state, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(first.v_t, torch.cat([torch.zeros(3, 1), v[None]]))
        assert not first.terminated.any() and not second.terminated[0]
        assert second.terminated[-1].item() == (name == "Aim-v0")
        assert second.v_t[0] == 0 != second.v_t[1]  # ignored where the episode terminated
    first_states = [first.s_tm1[0] for first, _ in segments[::2]]
    assert not any(torch.equal(a, b) for a, b in pairwise(first_states))


def test_math_truncation_bootstraps_from_the_last_state_of_its_own_episode(monkeypatch):
    seen = []
    look = Aim.look
    monkeypatch.setattr(Aim, "look", lambda env: (seen.append(look(env)), seen[-1])[1])
    net, env = GaussianActorCritic((2,), 2), game("TruncatedAim-v0")
    seen.clear()
    trajectory, _ = next(a3c_continuous.play(env, 1, net, 9))
    assert len(seen) == 8  # seven states of the episode, and the next one's first
    states = torch.from_numpy(np.stack(seen))[:, None]
    torch.testing.assert_close(trajectory.s_tm1, states[:6])
    with torch.no_grad():
        torch.testing.assert_close(trajectory.v_t[-1], net.value(states[:7], None)[0][-1])


def test_math_actions_are_clipped_only_on_their_way_into_the_environment():
    net = GaussianActorCritic((2,), 2)
    with torch.no_grad():
        net.pi.outputs.bias[:] = torch.tensor([5.0, -0.2, -9.0])
        net.pi.outputs.weight.zero_()
    env = game()
    trajectory, _ = next(a3c_continuous.play(env, 1, net, 5))
    taken, drawn = np.stack(env.unwrapped.actions), trajectory.a_tm1[:, 0].numpy()
    assert (drawn[:, 0] > 4).all() and (taken[:, 0] == 1).all()
    np.testing.assert_allclose(taken[:, 1], drawn[:, 1])
    assert env.unwrapped.action_space.contains(taken[0].astype(np.float32))


def test_math_pixels_are_what_the_environment_draws():
    env = game(pixels=True)
    s, _ = env.reset(seed=0)
    assert s.shape == (84, 84, 3) and s.dtype == np.uint8
    assert abs((s > 128).mean() - (1 + env.unwrapped.point[0]) / 2) < 0.02
    net = GaussianActorCritic((84, 84, 3), 2)
    trajectory, _ = next(a3c_continuous.play(env, 0, net, 0))
    assert trajectory.s_tm1.shape == (6, 1, 84, 84, 3) and trajectory.s_tm1.dtype == torch.uint8
    assert (trajectory.s_tm1[0, 0].numpy() == s).all()
    a3c_continuous.a3c_losses(net, trajectory, Args())


def test_math_an_environment_may_write_into_the_state_it_gave(monkeypatch):
    buffer, look = np.zeros(2, np.float32), Aim.look

    def look_into_buffer(self):
        buffer[:] = look(self)
        return buffer

    monkeypatch.setattr(Aim, "look", look_into_buffer)
    env = a3c_continuous.make_env(TOY["env_id"], pixels=False)
    trajectory, _ = next(a3c_continuous.play(env, 0, GaussianActorCritic((2,), 2), 0))
    assert len({tuple(s[0].tolist()) for s in trajectory.s_tm1}) == 6


def test_math_pendulum_shows_float32_and_ends_after_200_steps():
    env = a3c_continuous.make_env("Pendulum-v1", pixels=False)
    trajectory, over = next(a3c_continuous.play(env, 0, GaussianActorCritic((3,), 1), 0))
    assert len(trajectory.r_t) == over["l"] == 200 and over["r"] < -100  # not clipped
    assert trajectory.s_tm1.dtype == torch.float32


def test_math_pendulum_from_pixels():
    pytest.importorskip("pygame", reason="Pendulum draws with pygame")
    env = a3c_continuous.make_env("Pendulum-v1", pixels=True)
    s, _ = env.reset(seed=0)
    assert s.shape == (84, 84, 3) and s.min() < 100 and s.max() > 250
    s_t, *_ = env.step(np.array([2.0], np.float32))
    assert (s_t != s).any()


@pytest.mark.parametrize(
    ("env_id", "D", "A"),
    [("InvertedPendulum-v5", 4, 1), ("Reacher-v5", 10, 2), ("HalfCheetah-v5", 17, 6)],
)
def test_math_mujoco_tasks_fit(env_id, D, A, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves its warnings in the folder where it is started
    for module in ("mujoco", "imageio"):
        pytest.importorskip(module, reason=f"gymnasium's MuJoCo tasks need {module}")
    env = a3c_continuous.make_env(env_id, pixels=False)
    assert env.observation_space.shape == (D,) and env.action_space.shape == (A,)
    trajectory, _ = next(a3c_continuous.play(env, 0, GaussianActorCritic((D,), A), 3))
    assert trajectory.s_tm1.shape == (3, 1, D) and trajectory.s_tm1.dtype == torch.float32


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "InvertedPendulum-v5"])
def test_math_pictures_follow_a_runner(env_id, tmp_path, monkeypatch):
    """Thirty metres on, a runner is still in the picture; a task without one is drawn, too."""
    monkeypatch.chdir(tmp_path)
    try:
        env = a3c_continuous.make_env(env_id, pixels=False, film=True)
    except SystemExit as error:
        pytest.skip(f"no OpenGL or no MuJoCo: {error}")
    env.reset(seed=0)
    seen = []
    for metres in (0, 30):
        at = env.unwrapped.data.qpos.copy()
        at[0] = metres if env_id.startswith("HalfCheetah") else 0
        env.unwrapped.set_state(at, env.unwrapped.data.qvel)
        red, _, blue = env.render().astype(int).transpose(2, 0, 1)
        seen.append((red - blue > 60).sum())  # the runner and the rail are red, the floor is not
    env.close()
    assert min(seen) > 1000  # of 230,400 pixels


def test_math_evaluation_samples_whole_episodes_and_follows_its_seed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, args, states, watched = GaussianActorCritic((2,), 2), Args(**TOY), [], []
    with torch.no_grad():
        net.pi.outputs.weight.zero_()  # the same pi everywhere: what differs has been sampled
        net.pi.outputs.bias[:] = torch.tensor([0.5, 0.5, -5.0])
    actions, step = [], Aim.step
    monkeypatch.setattr(Aim, "step", lambda env, a: (actions.append(a), step(env, a))[1])
    policy = net.policy

    def noting_policy(s, lstm_state):
        outputs = policy(s, lstm_state)
        states.append((lstm_state, outputs[2]))
        return outputs

    monkeypatch.setattr(net, "policy", noting_policy)
    before = torch.get_rng_state()
    first = a3c_continuous.evaluate(net, args, tmp_path / "game.gif", lambda: watched.append(1))
    deviation = math.sqrt(math.log1p(math.exp(-5)))
    assert np.std(actions) == pytest.approx(deviation, rel=0.3)
    assert len(watched) == 4 * 6 and torch.equal(before, torch.get_rng_state())
    for (_, after), (given, _) in pairwise(states):
        assert given is None or given is after
    assert [given is None for given, _ in states] == ([True] + [False] * 5) * 4
    with Image.open(tmp_path / "game.gif") as film:
        assert film.n_frames == 6 and film.info["duration"] == 100
    assert first == a3c_continuous.evaluate(net, args)
    other = a3c_continuous.evaluate(net, dataclasses.replace(args, seed=2))
    assert first["eval/episodic_length"] == 6 and other != first
    assert first["eval/episodic_return_std"] > 0


def test_math_evaluation_means_episodes_with_seeds_of_their_own(monkeypatch):
    torch.manual_seed(0)
    net, args = GaussianActorCritic((2,), 2), Args(**TOY | {"eval_episodes": 10})
    seeds, returns, reset, step = [], [], Aim.reset, Aim.step

    def noting_reset(env, *, seed=None, options=None):
        seeds.append(seed)
        returns.append(0.0)
        return reset(env, seed=seed)

    def noting_step(env, a):
        s_t, r_t, *ends = step(env, a)
        returns[-1] += r_t
        return s_t, r_t, *ends

    monkeypatch.setattr(Aim, "reset", noting_reset)
    monkeypatch.setattr(Aim, "step", noting_step)
    metrics = a3c_continuous.evaluate(net, args)
    assert metrics["eval/episodic_return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics["eval/episodic_return_std"] == pytest.approx(np.std(returns), rel=1e-5)
    assert len(set(seeds)) == 10


# ---- Processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [False, True])
def test_math_worker_follows_algorithm_s2(pixels, monkeypatch):
    """Copy, play, count, update, again: until the workers together have made all steps."""
    args = Args(**TOY, pixels=pixels, t_max=4, total_timesteps=100, learning_rate=0.5)
    shared = GaussianActorCritic((84, 84, 3) if pixels else (2,), 2)
    optimizer = SharedRMSProp(list(shared.parameters()), 0.99, 0.1)
    T, reports, rates, rewards, steps = Locked(40), [], [], [], [40]
    seeds, play = [], a3c_continuous.play

    def noting_play(env, seed, *given):
        seeds.append(seed)
        return play(env, seed, *given)

    monkeypatch.setattr(a3c_continuous, "play", noting_play)

    def update(net, given_optimizer, trajectory, learning_rate, given_args):
        assert given_optimizer is optimizer and given_args is args and net is not shared
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), shared.parameters()))
        assert len(rates) == 0 or (trajectory.a_tm1 > 50).all()  # played with what was copied
        assert torch.initial_seed() == a3c_continuous.independent_seeds(3, args.seed, 7, 40)[0]
        rewards.extend(trajectory.r_t.flatten().tolist())
        steps.append(steps[-1] + len(trajectory.r_t))
        assert T.value == steps[-1]
        rates.append(learning_rate)
        with torch.no_grad():
            shared.pi.outputs.bias[:2] = 100
            net.pi.outputs.bias[:2] = -100
        return {"losses/gradient_norm": math.nan if len(rates) == 2 else 1.0}

    log = SimpleNamespace(put=reports.append)
    arguments = (args, 40, shared, optimizer, T, log)
    work_here(monkeypatch, a3c_continuous, 6, arguments, update)
    assert seeds == a3c_continuous.independent_seeds(3, args.seed, 7, 40)[2:]
    assert steps[-2] < 100 <= steps[-1] and np.diff(steps).tolist() == [4, 2] * 10
    assert rates == pytest.approx([0.5 * max(0, 1 - step / 100) for step in steps[1:]])
    told = [(tag, step) for tag, _, step in reports]
    assert told.count(("losses/gradient_norm", steps[2])) == 1  # not finite: reported at once
    lengths = [value for tag, value, _ in reports if tag == "charts/episodic_length"]
    assert lengths == [6] * ((steps[-1] - 40) // 6)
    returns = [value for tag, value, _ in reports if tag == "charts/episodic_return"]
    assert returns == pytest.approx(np.reshape(rewards, (10, 6)).sum(1), rel=1e-4)


def test_math_evaluations_during_training_play_with_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(a3c_continuous, "supervise", lambda *arguments: arguments[-1])
    evaluate_now = a3c_continuous.main(Args(**TOY, run_dir=str(tmp_path)))
    monkeypatch.setattr(a3c_continuous, "evaluate", lambda net, *_: net)
    assert not any(p.is_shared() for p in evaluate_now(0, None).parameters())


def test_learns_to_aim_and_goes_on(tmp_path):
    """Chance misses by 2/3 a dimension and more: -8 an episode and below."""
    args = Args(**TOY | {"eval_episodes": 20}, total_timesteps=3000, report_every=1500)
    args = dataclasses.replace(args, learning_rate=3e-3, reward_scale=1, discount=0)
    args = dataclasses.replace(args, run_dir=str(tmp_path))
    args = dataclasses.replace(args, capture_video=True)
    metrics = a3c_continuous.main(args)
    assert metrics["eval/episodic_return"] > -3
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("game_*.gif"))) == 1
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert {"charts/SPS", "losses/entropy", "eval/episodic_return"} <= {tag for _, tag, _ in rows}

    path = str(tmp_path / "checkpoint.pt")
    evaluated = a3c_continuous.main(dataclasses.replace(args, evaluate=path, run_dir=""))
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}
    before = torch.load(path)
    rested = dataclasses.replace(args, resume=path, run_dir="", learning_rate=0.0)
    rested = dataclasses.replace(rested, rmsprop_decay=1.0, capture_video=False)
    with pytest.raises(SystemExit, match=r"is at step 300\d: raise --total-timesteps"):
        a3c_continuous.main(rested)
    a3c_continuous.main(dataclasses.replace(rested, total_timesteps=3100, eval_episodes=1))
    after = torch.load(path)  # a run that moves nothing keeps all as it was loaded
    assert 3100 <= after["T"] < 3106 and after["seconds"] > before["seconds"]
    assert all(torch.equal(after["net"][name], before["net"][name]) for name in before["net"])
    assert all(torch.equal(a, b) for a, b in zip(after["g"], before["g"]))


@pytest.mark.slow
def test_learns_to_balance(tmp_path, monkeypatch):
    """Ten steps are chance, a thousand the end of the task."""
    monkeypatch.chdir(tmp_path)
    for module in ("mujoco", "imageio"):
        pytest.importorskip(module, reason=f"gymnasium's MuJoCo tasks need {module}")
    metrics = a3c_continuous.main(
        Args(num_workers=2, total_timesteps=400_000, run_dir=str(tmp_path))
    )
    assert metrics["eval/episodic_return"] > 500


def test_bad_input_an_environment_that_crashes_ends_the_run(tmp_path):
    args = Args(**TOY | {"env_id": "test_a3c_continuous:CrashingAim-v0"}, run_dir=str(tmp_path))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError"):
        a3c_continuous.main(args)
    assert multiprocessing.active_children() == []


@pytest.mark.slow  # supervise, which this is about, has the text it has in a3c_atari.py
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_command_line_ctrl_c_ends_the_run_in_order(tmp_path):
    run = start_run("a3c_continuous.py", tmp_path, "--env-id", TOY["env_id"], "--num-workers", "1")
    wait_for((tmp_path / "checkpoint.pt").exists, 120)
    children = processes_of(run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and "Traceback" not in errors
    assert "Stopped; go on with the same flags and --resume" in errors
    assert torch.load(tmp_path / "checkpoint.pt")["T"] > 0
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "a3c_continuous.py"), "--env-id", "Pendulum-v1"]
    command += ["--total-timesteps", "400", "--num-workers", "1", "--eval-episodes", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "eval/episodic_return" in run.stdout and "charts/SPS" in run.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("Pendulum-v1__a3c_continuous__1__")
    assert torch.load(run_dir / "checkpoint.pt")["T"] >= 400


# ---- Bad input ----------------------------------------------------------------------------------


def test_bad_input_ctrl_c_before_training_is_a_sentence(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(a3c_continuous, "make_env", interrupted)
    with pytest.raises(SystemExit, match=r"^Stopped\.$"):
        a3c_continuous.main(Args(**TOY))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "Pendulm-v1"}, "Pendulm-v1 cannot be made.*Nearest names: Pendulum-v1"),
        ({"env_id": "no_such_module:Env-v0"}, "no_such_module:Env-v0 cannot be made"),
        ({"env_id": "a:b:c"}, "a:b:c cannot be made"),
        (
            {"env_id": "test_a3c_continuous:DiscreteAim-v0"},
            r"takes Discrete\(2\); this script needs",
        ),
        ({"env_id": "test_a3c_continuous:MatrixAim-v0"}, r"\(2, 2\).*this script needs"),
        ({"env_id": "toy_games:Side-v0", "pixels": True}, "Side-v0 cannot be drawn"),
        (
            {"env_id": "test_a3c_continuous:BlindAim-v0", "pixels": True},
            "BlindAim-v0 cannot be drawn.*it shows no picture",
        ),
        ({"env_id": "toy_games:Side-v0", "capture_video": True}, "Side-v0 cannot be drawn"),
        ({"num_workers": 0}, "--num-workers must lie between 1 and"),
        ({"t_max": -1}, "--t-max must lie between 0"),
        ({"discount": 1.01}, "--discount must lie between 0 and 1, not at 1.01"),
        ({"learning_rate": math.nan}, "--learning-rate must lie between 0"),
        ({"run_dir": "good.pt/x"}, "cannot be written to.*choose another folder"),
        ({"resume": "a.pt", "evaluate": "b.pt"}, "pass one of them"),
        ({"resume": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        ({"evaluate": "damaged.pt"}, "damaged.pt is missing, damaged or no checkpoint"),
        (
            {"evaluate": "good.pt", "pixels": True},
            "made with --pixels False, not with --pixels True",
        ),
        ({"resume": "good.pt", "env_id": "Pendulum-v1"}, "not with --env-id Pendulum-v1"),
        (
            {"evaluate": "good.pt", "env_id": "test_a3c_continuous:TruncatedAim-v0"},
            "not with --env-id test_a3c_continuous:TruncatedAim-v0",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, net = Args(**TOY), GaussianActorCritic((2,), 2)
    Path("damaged.pt").write_bytes(b"PK\x03\x04 half a file")
    state = {"net": net.state_dict(), "args": dataclasses.asdict(args)}
    a3c_continuous.save_checkpoint(Path("good.pt"), **state)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        a3c_continuous.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_a_loss_that_explodes_stops_the_run(tmp_path):
    args = Args(**TOY | {"env_id": "test_a3c_continuous:EndlessRewardAim-v0"}, discount=0.0)
    with pytest.raises(SystemExit, match=r"is (nan|inf|-inf) at step \d+.*--learning-rate"):
        a3c_continuous.main(dataclasses.replace(args, run_dir=str(tmp_path)))
    assert multiprocessing.active_children() == []
