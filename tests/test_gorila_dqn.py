"""gorila_dqn.py against the bugs that public ports of its paper have had.

Caught here: a version filter that also counts or applies what it drops; a target network copied
from a worker instead of the server; learners that outrun the actors, or begin with an empty memory;
stacks of screens that reach into another episode; a bootstrap after the end, or none after a time
limit; an outlier rule that locks itself out once the loss has grown for good; AdaGrad's root
around the wrong sum; gradients of one slice applied to another.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_games  # noqa: F401
from running import ROOT, wait_for

import gorila_dqn
from gorila_dqn import (
    STEP,
    Actor,
    Args,
    Bundle,
    DeepQNetwork,
    Learner,
    LossStatistics,
    Minibatch,
    ParameterServer,
    ParameterServerShard,
    ReplayMemory,
)

TOY = {"env_id": "toy_games:Side-v0", "num_actors": 2, "num_learners": 2, "eval_episodes": 4}
SMALL = {"num_actors": 1, "num_learners": 1, "learning_starts": 40, "replay_capacity": 500}


def start_server(theta: np.ndarray, args: Args, folder: Path) -> ParameterServer:
    """The shards of a vector, in this process."""
    slices, shards = np.array_split(theta, args.num_shards), []
    for k, part in enumerate(slices):
        state = {"theta": part, "G": np.full_like(part, 0.1), "version": 0, "stale": 0, "lost": 0}
        gorila_dqn.write_slice(folder / f"shard_{k}.npz", **state)
        shards.append(ParameterServerShard(folder / f"shard_{k}.npz", args))
    return ParameterServer(shards)


def random_minibatch(B: int = 6, num_actions: int = 4, seed: int = 0) -> Minibatch:
    generator = torch.Generator().manual_seed(seed)
    screens = torch.randint(0, 256, (2, B, 84, 84, 4), generator=generator, dtype=torch.uint8)
    return Minibatch(
        s_tm1=screens[0],
        a_tm1=torch.randint(0, num_actions, (B,), generator=generator),
        r_t=2 * torch.randn(B, generator=generator),
        terminated=torch.rand(B, generator=generator) < 0.5,
        s_t=screens[1],
    )


def random_steps(count: int, seed: int = 0, length: int = 10) -> np.ndarray:
    """Steps of episodes of one length, with random screens."""
    generator, steps = np.random.default_rng(seed), np.zeros(count, STEP)
    steps["screen"] = generator.integers(0, 256, (count, 84, 84))
    steps["age"] = np.arange(count) % length
    steps["a_tm1"] = generator.integers(0, 2, count)
    steps["r_t"] = generator.normal(size=count)
    steps["terminated"] = steps["age"] == length - 1
    return steps


# ---- Equations ----------------------------------------------------------------------------------


def test_math_targets_are_those_of_a_loop():
    torch.manual_seed(0)
    net, batch = DeepQNetwork(4), random_minibatch()
    q = net(batch.s_t)
    y = gorila_dqn.dqn_targets(batch.r_t, batch.terminated.float(), q, discount=0.9)
    q = q.tolist()
    assert 0 < batch.terminated.sum() < 6
    for b in range(6):
        expected = batch.r_t[b].item()
        if not batch.terminated[b]:
            expected += 0.9 * max(q[b])
        assert y[b].item() == pytest.approx(expected, abs=1e-5)


def test_math_the_loss_is_quadratic_within_1_and_linear_beyond():
    q = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    y, a = 2 * torch.randn(50, dtype=torch.float64), torch.randint(0, 3, (50,))
    loss = gorila_dqn.dqn_loss(q, a, y)
    loss.backward()
    expected, slopes = 0.0, torch.zeros(50, 3, dtype=torch.float64)
    for b in range(50):
        error = (q[b, a[b]] - y[b]).item()
        expected += error**2 / 2 if abs(error) < 1 else abs(error) - 0.5
        slopes[b, a[b]] = max(-1.0, min(1.0, error)) / 50
    assert loss.item() == pytest.approx(expected / 50, abs=1e-12)
    torch.testing.assert_close(q.grad, slopes)
    assert 0 < (slopes.abs() == 1 / 50).sum() < 50


def test_math_the_network_is_that_of_2015():
    net, s = DeepQNetwork(6), random_minibatch().s_t
    w = [p.detach() for p in net.parameters()]
    x = F.conv2d(s.permute(0, 3, 1, 2).float() / 255, w[0], w[1], stride=4).relu()
    x = F.conv2d(x, w[2], w[3], stride=2).relu()
    x = F.conv2d(x, w[4], w[5]).relu().flatten(1)
    x = (x @ w[6].T + w[7]).relu() @ w[8].T + w[9]
    torch.testing.assert_close(net(s).detach(), x, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in net.parameters()) == 1_684_128 + 513 * 6


def test_math_orthogonal_init(tmp_path, monkeypatch):
    monkeypatch.setattr(gorila_dqn, "connect", lambda args: None)
    monkeypatch.setattr(gorila_dqn, "train", lambda args, net, start, run_dir: net)
    net = gorila_dqn.main(Args(**TOY, orthogonal_init=True, run_dir=str(tmp_path)))
    layers = [layer for layer in net.trunk if hasattr(layer, "weight")]
    for layer, gain in [(layer, 2**0.5) for layer in layers] + [(net.q, 0.01)]:
        W = layer.weight.detach().flatten(1)
        torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), atol=1e-4, rtol=1e-4)
        assert not layer.bias.any()
    assert len(layers) == 4


def test_math_exploration_falls_linearly_with_the_updates():
    args = Args(epsilon_updates=1000, final_epsilon=0.1)
    expected = {0: 1, 250: 0.775, 500: 0.55, 1000: 0.1, 9999: 0.1}
    for updates, epsilon in expected.items():
        found = gorila_dqn.exploration_rate(updates, args.final_epsilon, args.epsilon_updates)
        assert found == pytest.approx(epsilon)


def test_math_adagrad_is_that_of_a_loop_and_of_torch():
    generator = np.random.default_rng(0)
    theta = generator.normal(size=7)
    G, parameter = np.full(7, 0.1), torch.nn.Parameter(torch.tensor(theta))
    optimizer = torch.optim.Adagrad([parameter], lr=0.3, initial_accumulator_value=0.1, eps=0)
    expected, sums = theta.tolist(), [0.1] * 7
    for _ in range(20):
        g = generator.normal(size=7)
        gorila_dqn.adagrad(theta, G, g, learning_rate=0.3)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        for i in range(7):
            sums[i] += g[i] ** 2
            expected[i] -= 0.3 * g[i] / math.sqrt(sums[i])
    assert theta.tolist() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(theta, parameter.detach().numpy(), rtol=1e-12)
    assert G.tolist() == pytest.approx(sums)


def test_math_parameters_survive_the_wire():
    nets = [DeepQNetwork(3), DeepQNetwork(3)]
    theta = gorila_dqn.flat(nets[0].parameters())
    assert theta.dtype == np.float32 and theta.flags.c_contiguous
    start = 0
    for p in nets[0].parameters():
        for index in ((0,) * p.dim(), tuple(n - 1 for n in p.shape)):
            place = start + np.ravel_multi_index(index, p.shape)
            assert theta[place] == p[index].item()
        start += p.numel()
    gorila_dqn.write_parameters(theta, nets[1])
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride()


def test_math_defaults_are_the_papers_or_dqns():
    args = Args()
    assert (args.batch_size, args.discount, args.final_epsilon) == (32, 0.99, 0.1)
    assert (args.optimizer, args.replay, args.eval_episodes) == ("adagrad", "local", 30)
    assert gorila_dqn.MAX_EVAL_FRAMES == 18_000


# ---- The server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
def test_math_sharded_equals_unsharded(optimizer, tmp_path):
    generator = np.random.default_rng(0)
    theta, results = generator.normal(size=1001).astype(np.float32), []
    for num_shards in (1, 3, 31):
        args = Args(num_shards=num_shards, optimizer=optimizer, learning_rate=0.1)
        server = start_server(theta, args, tmp_path)
        generator = np.random.default_rng(1)
        for n in range(5):
            pulled, versions = server.pull()
            assert versions == [n] * num_shards and pulled.shape == (1001,)
            server.push(generator.normal(size=1001).astype(np.float32), versions)
        results.append(server.pull()[0])
    assert not np.array_equal(results[0], theta)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_math_pulled_parameters_do_not_change_with_the_server(tmp_path):
    args = Args(optimizer="sgd", learning_rate=0.01)
    server = start_server(np.zeros(8, np.float32), args, tmp_path)
    pulled, versions = server.pull()
    server.push(np.ones(8, np.float32), versions)
    assert (pulled == 0).all() and (server.pull()[0] == -np.float32(0.01)).all()


def test_the_parameters_after_a_gradient_are_asked_for_with_it_and_waited_for_later():
    calls = []

    class Shard:
        def pull(self):
            calls.append("pull")
            return np.zeros(2), 0

        def push(self, gradient, version):
            calls.append(f"push {gradient.tolist()} {version}")

    server = ParameterServer([Shard(), Shard()], lambda answers: calls.append("wait") or answers)
    server.pull()
    server.push(np.array([1, 2, 3]), [4, 5])
    assert calls == ["pull", "pull", "wait", "push [1, 2] 4", "push [3] 5", "pull", "pull"]
    calls.clear()
    server.settle()
    assert server.pull()[1] == [0, 0] and calls == ["wait", "wait"]
    server.pull()  # it may come twice, as an actor's and a learner's: then it asks again
    assert calls == ["wait", "wait", "pull", "pull", "wait"]


@pytest.mark.parametrize("delay", [0, 1, 3, 4, 10])
def test_math_gradients_past_the_staleness_bound_are_rejected_and_counted(delay, tmp_path):
    """After each fresh gradient comes another that took `delay` versions to arrive."""
    args = Args(max_staleness=3, optimizer="sgd", learning_rate=1.0, num_shards=2)
    server, late = start_server(np.zeros(4, np.float32), args, tmp_path), 0
    for _ in range(30):
        server.push(np.full(4, 1, np.float32), server.pull()[1])
        theta, (version, _) = server.pull()
        if version >= delay:
            server.push(np.full(4, 100, np.float32), [version - delay] * 2)
            late += 1
            moved = server.pull()[0] - theta
            assert (moved == (-100 if delay <= 3 else 0)).all()
    rejected = late if delay > 3 else 0
    assert [shard.stale for shard in server.shards] == [rejected] * 2
    assert [shard.version for shard in server.shards] == [30 + late - rejected] * 2


def test_math_a_gradient_of_a_version_that_a_crash_undid_is_dropped(tmp_path):
    args = Args(optimizer="sgd", learning_rate=0.01, shard_save_every=10)
    server = start_server(np.zeros(4, np.float32), args, tmp_path)
    for n in range(17):
        server.push(np.ones(4, np.float32), [n])
    after_10 = -10 * np.float32(0.01)
    for _ in range(2):  # it dies twice, before and after the first has started
        successor = ParameterServerShard(tmp_path / "shard_0.npz", args)
        assert (successor.version, successor.lost) == (10, 7)
    assert successor.theta == pytest.approx(after_10, rel=1e-5)
    successor.push(np.ones(4, np.float32), 16)
    assert (successor.version, successor.stale) == (10, 1)
    assert successor.theta == pytest.approx(after_10, rel=1e-5)
    successor.push(np.ones(4, np.float32), 10)
    assert (successor.version, successor.stale, successor.lost) == (11, 1, 7)
    assert ParameterServerShard(tmp_path / "shard_0.npz", args).lost == 8


def test_math_a_shard_keeps_adagrads_sums_and_its_counters(tmp_path):
    args = Args(shard_save_every=4, max_staleness=1)
    shard = start_server(np.zeros(4, np.float32), args, tmp_path).shards[0]
    for version in (0, 1, 0, 2, 3):  # the third is too old
        shard.push(np.arange(4, dtype=np.float32), version)
    successor = ParameterServerShard(tmp_path / "shard_0.npz", args)
    kept, now = successor.state(), shard.state()
    assert (kept["version"], kept["stale"], kept["lost"]) == (4, 1, 0)
    for name in ("theta", "G"):
        assert np.array_equal(kept[name], now[name]) and kept[name].any()


def test_math_loss_statistics_are_weighted_sums():
    losses = np.random.default_rng(0).exponential(size=60).tolist()
    statistics = LossStatistics(deviations=5, warm_up=10, decay=0.9)
    weights = []
    for n, loss in enumerate(losses, start=1):
        statistics.is_outlier(loss)
        weight = max(1 / n, 0.1)
        weights = [w * (1 - weight) for w in weights] + [weight]
        mean = sum(w * x for w, x in zip(weights, losses))
        variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, losses))
        assert statistics.mean == pytest.approx(mean)
        assert statistics.variance == pytest.approx(variance)


def test_math_a_planted_outlier_is_rejected_exactly_once():
    generator = np.random.default_rng(0)
    statistics = LossStatistics(deviations=5, warm_up=100)
    losses = generator.uniform(0.9, 1.1, 400)
    losses[[50, 300]] = 30.0  # the first of them during the warm-up
    losses[200] = 0.0  # far below, which is no reason
    statistics_without = LossStatistics(deviations=5, warm_up=100)
    rejected = [n for n in range(400) if statistics_without.is_outlier(losses[n] if n != 50 else 1)]
    assert rejected == [300]
    for n in range(100):
        assert not statistics.is_outlier(losses[n])


def test_math_a_loss_is_judged_by_those_before_it():
    statistics = LossStatistics(deviations=5, warm_up=100)
    for loss in np.random.default_rng(0).uniform(0.9, 1.1, 400):
        statistics.is_outlier(loss)
    limit = statistics.mean + 5 * math.sqrt(statistics.variance)
    assert statistics.is_outlier(1.001 * limit)
    limit = statistics.mean + 5 * math.sqrt(statistics.variance)
    assert not statistics.is_outlier(0.999 * limit)


def test_math_a_loss_that_has_grown_for_good_is_accepted_after_a_while():
    statistics = LossStatistics(deviations=5, warm_up=100, decay=0.99)
    generator = np.random.default_rng(0)
    for _ in range(300):
        statistics.is_outlier(generator.uniform(0.9, 1.1))
    rejected = [statistics.is_outlier(generator.uniform(9, 11)) for _ in range(300)]
    assert rejected[0] and not any(rejected[5:])


# ---- The replay memory --------------------------------------------------------------------------


def replay_args(**changes) -> Args:
    return Args(**SMALL | {"learning_starts": 1, "steps_per_update": 1} | changes)


def true_transitions(steps: np.ndarray, first: int = 0) -> dict[bytes, tuple]:
    """What a memory may return of consecutive steps, put together one by one, by its screens."""
    found, episode = {}, []
    for n, step in enumerate(steps):
        episode = [*episode, step["screen"]] if step["age"] else [step["screen"]]
        stack = np.stack(([episode[0]] * 3 + episode)[-4:], axis=-1)
        ends, after = bool(step["terminated"]), None
        if not ends:
            if step["a_tm1"] < 0 or n + 1 == len(steps) or steps[n + 1]["age"] == 0:
                continue
            after = [*episode, steps[n + 1]["screen"]]
            after = np.stack(([episode[0]] * 3 + after)[-4:], axis=-1).tobytes()
        found[stack.tobytes()] = first + n, step["a_tm1"], step["r_t"], ends, after
    return found


def numbers_of(batch: Minibatch, transitions: dict[bytes, tuple]) -> list[int]:
    """Which steps the samples are; they must agree in all."""
    numbers = []
    for b in range(len(batch.a_tm1)):
        n, a, r, ends, after = transitions[batch.s_tm1[b].tobytes()]
        assert (batch.a_tm1[b], batch.r_t[b], batch.terminated[b]) == (a, r, ends)
        assert ends or after == batch.s_t[b].tobytes()
        numbers.append(n)
    return numbers


@pytest.mark.parametrize("chunk", [1, 7, 40])
@pytest.mark.parametrize("count", [30, 60, 153])
def test_math_memory_returns_what_happened_and_all_of_it(chunk, count):
    """Order, capacity, episode borders; the oldest record looks as if it followed the newest."""
    memory, steps = ReplayMemory(1, replay_args(replay_capacity=60)), random_steps(count)
    steps["terminated"][19] = False  # this episode was cut off without a last screen
    for start in range(0, count, chunk):
        memory.add(0, steps[start : start + chunk])
    memory.surplus = 10**6
    transitions, oldest = true_transitions(steps), max(0, count - 60)
    numbers = Counter(numbers_of(memory.sample(1000), transitions))
    expected = {  # those whose first screens are still there
        n for n, *_ in transitions.values() if n - min(3, steps["age"][n]) >= oldest
    }
    assert set(numbers) == expected
    mean = 1000 / len(expected)
    assert max(numbers.values()) < mean + 6 * math.sqrt(mean)


def test_math_memory_keeps_the_actors_apart():
    args = replay_args(num_actors=3, replay="global", replay_capacity=600)
    memory, played = ReplayMemory(3, args), [random_steps(50, seed=k) for k in range(2)]
    for start in range(0, 50, 5):
        for k in range(2):  # the third has not played yet
            memory.add(k, played[k][start : start + 5])
    both = true_transitions(played[0]) | true_transitions(played[1], first=100)
    memory.surplus = 10**6
    assert set(numbers_of(memory.sample(1000), both)) == {*range(50), *range(100, 150)}


def test_math_rings_that_are_full_at_different_places_return_all_they_hold():
    """Seventy and fifty steps in rings of forty: one begins at its tenth place, one at another."""
    args = replay_args(num_actors=3, replay="global", replay_capacity=120)
    memory, expected, both = ReplayMemory(3, args), set(), {}
    assert memory.capacity == 40
    for k, count in enumerate((70, 53)):
        played, first = random_steps(count, seed=k, length=9), 100 * k
        for start in range(0, count, 7):
            memory.add(k, played[start : start + 7])
        both |= true_transitions(played, first)
        oldest = count - 40
        expected |= {
            first + n
            for n, *_ in true_transitions(played).values()
            if n - min(3, played["age"][n]) >= oldest
        }
    memory.surplus = 10**6
    assert set(numbers_of(memory.sample(2000), both)) == expected


@pytest.mark.parametrize(("num_rings", "waits"), [(1, 100), (4, 400)])
def test_math_each_memory_waits_for_its_share_of_the_first_steps(num_rings, waits):
    args = Args(num_actors=4, learning_starts=400, replay_capacity=4000)
    assert ReplayMemory(num_rings, args).surplus == -waits


def test_math_memory_does_not_join_the_episodes_of_an_actor_that_died():
    memory, steps = ReplayMemory(1, replay_args()), random_steps(18, length=100)
    steps["age"][9:] -= 9  # its successor begins anew
    memory.add(0, steps)
    memory.surplus = 10**6
    numbers = numbers_of(memory.sample(300), true_transitions(steps))
    assert set(numbers) == set(range(17)) - {8}


def test_math_memory_needs_at_most_7100_bytes_for_a_step():
    memory = ReplayMemory(1, replay_args(replay_capacity=1000))
    bytes_kept = sum(x.nbytes for x in vars(memory).values() if isinstance(x, np.ndarray))
    assert bytes_kept / 1000 <= 7100


@pytest.mark.parametrize("steps_per_update", [1, 4])
def test_math_memory_keeps_the_ratio_of_steps_to_minibatches(steps_per_update):
    args = replay_args(learning_starts=50, steps_per_update=steps_per_update)
    memory, drawn = ReplayMemory(1, args), 0
    steps = random_steps(400)
    steps["a_tm1"][10:20] = -1  # which are no steps
    for n in range(400):
        surplus = memory.add(0, steps[n : n + 1])
        while memory.sample(4):
            drawn += 1
        made = n + 1 - min(10, max(0, n - 9))
        assert drawn == max(0, made - 50) // steps_per_update
        assert n == 0 or surplus <= steps_per_update


# ---- Actors and learners ------------------------------------------------------------------------


def test_math_one_actor_one_learner_one_shard_with_sgd_are_plain_dqn(tmp_path):
    """Bit for bit: a minibatch, its targets, the gradient step, the target network's period."""
    torch.manual_seed(0)
    args = Args(env_id="toy_games:Side-v0", **SMALL, optimizer="sgd", learning_rate=0.05)
    args = dataclasses.replace(args, target_period=3, outlier_warm_up=10**6)
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, tmp_path)
    memory, batches = ReplayMemory(1, args), []
    actor = Actor(0, 2, args, server, memory)
    learner = Learner(2, args, server, memory)
    sample = memory.sample
    memory.sample = lambda size: (batches.append(sample(size)), batches[-1])[1]

    net, target_net = DeepQNetwork(2), DeepQNetwork(2)
    gorila_dqn.write_parameters(server.pull()[0], net)
    actor.play(40)
    assert not learner.learn()
    for n in range(8):
        actor.play(4)
        assert learner.learn() and not learner.learn()
        batch = next(b for b in reversed(batches) if b is not None)
        if n % 3 == 0:
            target_net.load_state_dict(net.state_dict())
        with torch.no_grad():
            v_t = target_net(torch.tensor(batch.s_t)).max(dim=1).values
            ends = torch.tensor(batch.terminated)
            y = torch.tensor(batch.r_t).clamp(-1, 1) + 0.99 * v_t * (~ends)
        q = net(torch.tensor(batch.s_tm1))
        error = y - q[torch.arange(32), torch.tensor(batch.a_tm1)]
        loss = torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean()
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.05 * p.grad
        assert np.array_equal(server.pull()[0], gorila_dqn.flat(net.parameters()))
    assert server.pull()[1] == [8]


def toy_learner(folder: Path, **changes) -> tuple[Learner, ReplayMemory, ParameterServer]:
    args = Args(**SMALL | {"batch_size": 4, "learning_starts": 1, **changes})
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, folder)
    memory = ReplayMemory(1, args)
    memory.add(0, random_steps(100))
    memory.surplus = 10**6
    return Learner(2, args, server, memory), memory, server


def test_math_target_network_is_the_servers_at_every_period(tmp_path):
    learner, _, server = toy_learner(tmp_path, target_period=5)
    shard = server.shards[0]
    refreshed, last = [], gorila_dqn.flat(learner.target_net.parameters())
    assert np.array_equal(last, shard.theta)
    for version in (0, 1, 4, 5, 6, 9, 12, 14, 16):  # others push meanwhile
        shard.version = version
        shard.theta += 0.001
        learner.pull()
        target = gorila_dqn.flat(learner.target_net.parameters())
        assert np.array_equal(gorila_dqn.flat(learner.net.parameters()), shard.theta)
        if not np.array_equal(target, last):
            assert np.array_equal(target, shard.theta)
            refreshed.append(version)
        last = target
    assert refreshed == [5, 12, 16]


def test_math_a_shard_that_fell_back_does_not_renew_the_target_network(tmp_path):
    learner, _, server = toy_learner(tmp_path, target_period=5, num_shards=2)
    renewed, last = [], gorila_dqn.flat(learner.target_net.parameters())
    for versions in ((4, 4), (6, 4), (6, 6), (3, 7), (5, 8), (9, 10), (10, 11)):  # it died at 6
        for shard, version in zip(server.shards, versions):
            shard.version = version
            shard.theta += 0.001
        learner.pull()
        target = gorila_dqn.flat(learner.target_net.parameters())
        if not np.array_equal(target, last):
            renewed.append(versions)
        last = target
    assert renewed == [(6, 6), (10, 11)]


def test_math_learner_sends_versions_with_gradients_and_keeps_outliers_to_itself(tmp_path):
    learner, memory, server = toy_learner(tmp_path, num_shards=3)
    pushed, verdicts = [], iter([False, True, False])
    learner.server = SimpleNamespace(pull=server.pull, push=lambda *sent: pushed.append(sent))
    learner.statistics.is_outlier = lambda loss: next(verdicts)
    server.shards[1].version = 7
    for _ in range(3):
        assert learner.learn()
    assert [versions for _, versions in pushed] == [[0, 7, 0]] * 2
    assert all(g.shape == (1_684_128 + 513 * 2,) and g.dtype == np.float32 for g, _ in pushed)
    assert (learner.counts["minibatches"], learner.counts["outliers"]) == (3, 1)

    memory.steps["r_t"] = math.nan
    verdicts = iter([False])
    learner.statistics.is_outlier = lambda loss: False
    learner.learn()
    assert len(pushed) == 2  # what is not finite goes to the log alone, which stops the run
    assert any(math.isnan(value) for tag, value in learner.log if tag == "losses/td_loss")


def test_math_learner_clips_rewards_and_takes_targets_as_constants(tmp_path, monkeypatch):
    learner, memory, _ = toy_learner(tmp_path)
    memory.steps["r_t"] = np.where(np.arange(memory.capacity) % 2, 7, -7)
    told, dqn_targets = [], gorila_dqn.dqn_targets

    def targets(r_t, *given):
        told.append((set(r_t.tolist()), dqn_targets(r_t, *given)))
        return told[-1][1]

    monkeypatch.setattr(gorila_dqn, "dqn_targets", targets)
    assert learner.learn()
    ((rewards, y),) = told
    assert rewards == {-1, 1} and not y.requires_grad


def test_math_learners_in_16_bits_round_features_but_not_q(tmp_path):
    """A minibatch of the same steps for the same network, with and without."""
    gradients, features = [], []
    for bits in (False, True):
        torch.manual_seed(0)
        learner, _, server = toy_learner(tmp_path, bfloat16=bits, batch_size=32)
        for net in (learner.net, learner.target_net):
            net.q.register_forward_hook(lambda q, x, y: features.append((*x, y)))
        learner.server = SimpleNamespace(pull=server.pull, push=lambda g, _: gradients.append(g))
        assert learner.learn()
    exact, rounded = gradients
    assert 1e-4 < 1 - exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded) < 1e-2
    for n, (x, q) in enumerate(features):  # two networks exactly, then both rounded
        assert torch.equal(x, x.bfloat16().float()) == (n > 1)
        assert q.dtype == torch.float32 and not torch.equal(q, q.bfloat16().float())


def test_math_learners_take_the_outlier_rule_from_their_flags(tmp_path):
    learner, *_ = toy_learner(tmp_path, outlier_deviations=3.0, outlier_warm_up=70)
    assert (learner.statistics.deviations, learner.statistics.warm_up) == (3.0, 70)


class Screens(ReplayMemory):
    """A memory that notes what it is given."""

    def __init__(self):
        self.given, self.surplus = [], 0

    def add(self, ring, steps):
        self.given.append((ring, steps))
        return self.surplus


@pytest.mark.parametrize("truncates", [False, True])
def test_math_actor_remembers_its_steps_and_pulls_when_an_episode_begins(truncates, tmp_path):
    env_id = f"toy_games:{'Truncated' if truncates else ''}Clock-v0"
    args = Args(env_id=env_id, num_actors=4, replay="global", pull_every=5, epsilon_updates=100)
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, tmp_path)
    pulls, epsilons, replay, counted = [], [], Screens(), server.pull
    actor = Actor(3, 2, args, server, replay)

    def pull():
        server.shards[0].version += 10
        pulls.append(actor.age)
        return counted()

    server.pull = pull
    for _ in range(4):
        actor.play(4)
        epsilons.append(actor.epsilon)
    assert pulls == [0, 5, 0, 5, 0]  # of three games, seven steps each
    assert epsilons == pytest.approx([1 - 0.9 * p / 10 for p in (1, 3, 3, 5)])
    assert {ring for ring, _ in replay.given} == {3}
    steps = np.concatenate([steps for _, steps in replay.given])
    expected = [(t, t, t + 1.0, t == 6 and not truncates, True) for t in range(7)]
    expected += [(7, 7, 0.0, False, False)] * truncates
    expected = (expected * 3)[: len(steps)]
    for step, (screen, age, r, ends, acts) in zip(steps, expected, strict=True):
        assert (step["screen"] == screen).all() and step["age"] == age
        assert (step["r_t"], step["terminated"], step["a_tm1"] >= 0) == (r, ends, acts)
    assert actor.counts["steps"] == 16
    assert actor.log == [("charts/episodic_return", 28.0), ("charts/episodic_length", 7.0)] * 2


def test_math_after_a_time_limit_the_value_goes_on(tmp_path):
    """The last screen of a truncated game is remembered, and is no step itself."""
    args = Args(env_id="toy_games:TruncatedClock-v0", **SMALL)
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, tmp_path)
    memory = ReplayMemory(1, args)
    Actor(0, 2, args, server, memory).play(21)
    memory.surplus = 10**6
    batch = memory.sample(300)
    ends = batch.s_tm1[:, 0, 0].tolist().count([3, 4, 5, 6])
    assert ends > 0 and not batch.terminated.any()
    for s_tm1, s_t in zip(batch.s_tm1[:, 0, 0].tolist(), batch.s_t[:, 0, 0].tolist()):
        assert s_t == [max(0, s_tm1[3] + 1 - j) for j in (3, 2, 1, 0)]


def test_math_actor_acts_on_the_screens_it_sees(tmp_path, monkeypatch):
    args = Args(env_id="toy_games:Clock-v0", **SMALL)
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, tmp_path)
    actor, seen = Actor(0, 2, args, server, Screens()), []
    forward = actor.net.forward
    monkeypatch.setattr(actor.net, "forward", lambda s: (seen.append(s[0, 0, 0]), forward(s))[1])
    actor.play(9)
    stacks = [[max(0, t - j) for j in (3, 2, 1, 0)] for t in (*range(7), 0, 1)]
    assert [s.tolist() for s in seen] == stacks


def test_math_actors_explore_by_the_oldest_slice_each_with_numbers_of_its_own(tmp_path):
    args = Args(env_id="toy_games:Side-v0", num_actors=4, replay="global", num_shards=2)
    args = dataclasses.replace(args, epsilon_updates=100, final_epsilon=0.0)
    theta = gorila_dqn.flat(DeepQNetwork(2).parameters())
    theta[-2:] = 1e4, -1e4  # the biases of Q: the first action is the best
    server, seeds, explored = start_server(theta, args, tmp_path), [], []
    for versions in ((0, 90), (110, 300)):
        for shard, version in zip(server.shards, versions):
            shard.version = version
        for rank in range(3):
            replay = Screens()
            actor = Actor(rank, 2, args, server, replay)
            actor.play(200)
            seeds.append(actor.generator.initial_seed())
            explored.append(replay.given[0][1]["a_tm1"].mean())
    assert len(set(seeds)) == 6
    assert explored[:3] == pytest.approx([0.5] * 3, abs=0.15) and explored[3:] == [0, 0, 0]


def test_math_actors_and_learners_wait_for_each_other(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(gorila_dqn.time, "sleep", pauses.append)
    args = Args(env_id="toy_games:Clock-v0", **SMALL | {"learning_starts": 10**4})
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, tmp_path)
    replay = Screens()
    actor = Actor(0, 2, args, server, replay)
    for surplus, steps in ((0, 100), (1001, 100), (1001, 0), (1000, 0), (0, 100)):
        replay.surplus = surplus
        assert actor.work().counts["steps"] == steps
    assert len(pauses) == 2
    memory = ReplayMemory(1, dataclasses.replace(args, replay_capacity=10**5))
    learner = Learner(2, args, server, memory)
    assert learner.work().counts == Counter() and len(pauses) == 3


def test_bad_input_a_game_that_only_the_main_process_has_is_an_error_of_the_actor(tmp_path):
    """An exit would end its process, which Ray would then start again and again."""
    args = Args(env_id="no_such_module:Env-v0", **SMALL)
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, tmp_path)
    with pytest.raises(RuntimeError, match="No game no_such_module:Env-v0"):
        Actor(0, 2, args, server, Screens())


def test_math_bundle_shares_one_network_and_keeps_the_ratio(tmp_path):
    args = Args(env_id="toy_games:Side-v0", **SMALL | {"batch_size": 2, "steps_per_update": 20})
    server = start_server(gorila_dqn.flat(DeepQNetwork(2).parameters()), args, tmp_path)
    bundle, other = (Bundle(rank, 2, args, server) for rank in range(2))
    drawn, drawn_by_other = (b.actor.replay.generator.random() for b in (bundle, other))
    assert drawn != drawn_by_other
    assert bundle.actor.net is bundle.learner.net is not bundle.learner.target_net
    assert bundle.actor.replay is bundle.learner.replay
    rounds = [bundle.work() for _ in range(2)]
    assert [r.counts["steps"] for r in rounds] == [100, 100]
    assert [r.counts["minibatches"] for r in rounds] == [3, 5]  # of 40 steps at first none
    assert rounds[-1].pid == os.getpid() and server.pull()[1] == [8]
    tags = {tag for tag, _ in rounds[1].log}
    assert {"losses/td_loss", "charts/server_ms", "charts/episodic_return"} <= tags
    assert bundle.actor.log == bundle.learner.log == []


# ---- Evaluation ---------------------------------------------------------------------------------


def test_math_evaluation_means_whole_games_that_differ(monkeypatch):
    made, seeds, rates, scores, films = [], [], [], [], []
    make_env, epsilon_greedy = gorila_dqn.make_env, gorila_dqn.epsilon_greedy

    def noting_make_env(env_id, training=True):
        made.append(training)
        env = make_env(env_id, training)
        reset, step = env.reset, env.step

        def noting_step(a):
            *outcome, info = step(a)
            scores.extend([info["episode"]["r"]] if "episode" in info else [])
            return *outcome, info

        def noting_reset(seed):
            seeds.append(seed)
            outcome = reset(seed=seed)
            env.unwrapped.t = len(seeds)  # nine steps are left of the first game, four of the last
            return outcome

        env.reset, env.step = noting_reset, noting_step
        return env

    def noting_epsilon(q, epsilon, generator):
        rates.append(epsilon)
        return epsilon_greedy(q, epsilon, generator)

    monkeypatch.setattr(gorila_dqn, "make_env", noting_make_env)
    monkeypatch.setattr(gorila_dqn, "epsilon_greedy", noting_epsilon)
    monkeypatch.setattr(gorila_dqn, "write_gif", lambda pictures, *_: films.append(len(pictures)))
    args = Args(**TOY | {"eval_episodes": 6}, eval_epsilon=0.25)
    metrics = gorila_dqn.evaluate(DeepQNetwork(2), args, Path("game.gif"))
    assert made == [False] * 6 and len(set(seeds)) == 6 and set(rates) == {0.25}
    assert metrics["eval/episodic_return"] == pytest.approx(np.mean(scores))
    assert metrics["eval/episodic_return_std"] == pytest.approx(np.std(scores)) != 0
    assert metrics["eval/episodic_length"] == 6.5 and films == [9]


def test_math_atari_is_played_as_by_dqn():
    for training in (True, False):
        env = gorila_dqn.make_env("BreakoutNoFrameskip-v4", training)
        layers = [layer := env] + [layer := layer.env for _ in range(4)]
        assert any(isinstance(x, gorila_dqn.EpisodicLife) for x in layers) == training
        starts = []
        for seed in range(20):
            env.reset(seed=seed)
            starts.append(env.unwrapped.ale.getEpisodeFrameNumber())
        assert min(starts) >= 1 and max(starts) <= 30 and len(set(starts)) > 8
        env.step(1)
        assert env.unwrapped.ale.getEpisodeFrameNumber() == starts[-1] + 4
        frames = gorila_dqn.MAX_FRAMES if training else gorila_dqn.MAX_EVAL_FRAMES
        assert env.unwrapped.spec.kwargs["max_num_frames_per_episode"] == frames


# ---- A run, its components in this process ------------------------------------------------------


class Answer:
    def __init__(self, value):
        self.value = value


class Local:
    """Stands for gorila_dqn.Remote: what would go to another process is computed at once."""

    def __init__(self, component, *arguments):
        self.component = component(*arguments)

    def __getattr__(self, method):
        return lambda *arguments: Answer(getattr(self.component, method)(*arguments))


def look(answers):
    return [a.value for a in answers] if isinstance(answers, list) else answers.value


@pytest.fixture
def no_ray(monkeypatch):
    stand_in = SimpleNamespace(
        wait=lambda answers, timeout, num_returns=1: (answers[:num_returns], []),
        get=lambda answers, timeout: look(answers),
        shutdown=lambda: None,
    )
    monkeypatch.setattr(gorila_dqn, "ray", stand_in)
    monkeypatch.setattr(gorila_dqn, "Remote", Local)
    monkeypatch.setattr(gorila_dqn, "connect", lambda args: None)
    monkeypatch.setattr(gorila_dqn, "ROUND", 40)
    return stand_in


def toy_run(folder: Path, **changes) -> Args:
    settings = TOY | {"learning_starts": 40, "replay_capacity": 2000, "batch_size": 4}
    settings |= {"total_timesteps": 320, "report_every": 100, "run_dir": str(folder)}
    return Args(**settings | changes)


@pytest.mark.parametrize("replay", ["local", "global"])
def test_learns_on_from_where_it_stopped(replay, no_ray, tmp_path):
    args = toy_run(tmp_path, replay=replay, num_shards=3, steps_per_update=8, capture_video=True)
    args = dataclasses.replace(args, shard_save_every=1)
    metrics = gorila_dqn.main(args)
    before = torch.load(tmp_path / "checkpoint.pt")
    steps, updates = before["counts"]["steps"], before["counts"]["minibatches"]
    assert 320 <= steps <= 400 and 0 <= (steps - 40) / 8 - updates <= 10  # two rounds of learning
    assert before["versions"] == [updates] * 3 and metrics["charts/updates"] == updates
    assert metrics["charts/version_skew"] == 0 and (tmp_path / f"game_{steps}.gif").exists()
    assert 0 < metrics["charts/learning_rate"] < 2e-3 / math.sqrt(1e-6)
    net = DeepQNetwork(2)
    net.load_state_dict(before["net"])
    slices = [np.load(path) for path in sorted((tmp_path / "shards").glob("*.npz"))]
    for name, whole in (("theta", gorila_dqn.flat(net.parameters())), ("G", before["G"].numpy())):
        assert np.array_equal(np.concatenate([part[name] for part in slices]), whole)

    evaluating = dataclasses.replace(args, run_dir="", evaluate=str(tmp_path / "checkpoint.pt"))
    evaluated = gorila_dqn.main(evaluating)
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}

    on = dataclasses.replace(args, run_dir="", resume=str(tmp_path / "checkpoint.pt"))
    on = dataclasses.replace(on, learning_rate=0.0, num_shards=2)
    with pytest.raises(SystemExit, match=rf"is at step {steps}: raise --total-timesteps"):
        gorila_dqn.main(on)
    gorila_dqn.main(dataclasses.replace(on, total_timesteps=steps + 240))
    after = torch.load(tmp_path / "checkpoint.pt")
    assert all(torch.equal(after["net"][name], before["net"][name]) for name in before["net"])
    assert after["counts"]["steps"] >= steps + 240 and after["seconds"] > before["seconds"]
    assert len(after["versions"]) == 2 and min(after["versions"]) > updates
    assert (after["G"] >= before["G"]).all() and (after["G"] > before["G"]).any()
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    steps = [int(step) for step, tag, _ in rows if tag == "charts/SPS"]
    assert steps == sorted(steps) and len(steps) >= 4


def test_learns_and_reports_what_its_flags_say(no_ray, tmp_path, monkeypatch):
    learn = torch.enable_grad()(Learner.learn)  # here it is called within evaluations

    def noting_learn(learner):
        learned = learn(learner)
        learner.log.append(("version", learner.versions[0]))
        return learned

    monkeypatch.setattr(Learner, "learn", noting_learn)
    args = toy_run(tmp_path, adagrad_start=0.5, eval_every=100, epsilon_updates=1000)
    metrics = gorila_dqn.main(args)
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["G"].min() >= 0.5
    rate = args.learning_rate / math.sqrt(saved["G"].mean())
    assert metrics["charts/learning_rate"] == pytest.approx(rate, rel=1e-5)
    epsilon = 1 - 0.9 * metrics["charts/updates"] / 1000
    assert metrics["charts/epsilon"] == pytest.approx(epsilon) and epsilon < 0.99
    rows = (tmp_path / "metrics.csv").read_text()
    assert rows.count("eval/episodic_return,") == 2  # at the first report and at the end
    assert metrics["version"] > metrics["charts/updates"] / 2  # a mean since the first report
    rows = [line.split(",") for line in rows.splitlines()]
    rates, minutes = (
        [float(value) for _, tag, value in rows if tag == f"charts/{name}"]
        for name in ("UPS", "minutes")
    )
    updates = 60 * np.dot(rates, np.diff(minutes, prepend=0))
    assert updates == pytest.approx(metrics["charts/updates"])


def test_learns_from_all_rounds_that_are_ready(no_ray, tmp_path, monkeypatch):
    silent = SimpleNamespace(heed=lambda: None)
    monkeypatch.setattr(gorila_dqn, "Interrupt", lambda: silent)
    net = DeepQNetwork(2)
    counts = {"steps": 0, "stale": 3, "lost_updates": 2}
    start = {"counts": counts, "versions": [7, 5], "seconds": 0.0}
    start["G"] = torch.ones(sum(p.numel() for p in net.parameters()))
    gorila = gorila_dqn.Gorila(net, start, toy_run(tmp_path, num_shards=2), tmp_path)
    learned = (2 * 40 - 40) // 4  # in the first rounds of both, made at once
    assert [shard.component.version for shard in gorila.shards] == [5 + learned] * 2
    gorila.attend(0)
    assert gorila.counts["steps"] == 2 * 40 and len(gorila.rounds) == 2
    gorila.shards[1].component.lost = 4
    gorila.inspect()
    assert (gorila.counts["stale"], gorila.counts["lost_updates"]) == (3, 2 + 4)


def test_learns_until_ctrl_c_and_keeps_the_time_it_took(no_ray, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gorila_dqn.Gorila, "attend", interrupted)
    with pytest.raises(SystemExit, match=r"^Stopped; go on with the same flags and --resume"):
        gorila_dqn.main(toy_run(tmp_path))
    assert torch.load(tmp_path / "checkpoint.pt")["seconds"] > 0


def test_math_our_own_ray_gets_the_memory_of_its_flag(monkeypatch):
    settings = {}
    monkeypatch.setattr(gorila_dqn.ray, "init", lambda **given: settings.update(given))
    gorila_dqn.connect(Args(object_store_mb=75))
    assert settings["object_store_memory"] == 75 * 2**20


def test_learns_nothing_more_once_parameters_are_infinite(no_ray, tmp_path, monkeypatch):
    args = toy_run(tmp_path, total_timesteps=80)
    gorila_dqn.main(args)
    checkpoint, state = tmp_path / "checkpoint.pt", ParameterServerShard.state
    before, on = checkpoint.read_bytes(), {"run_dir": "", "resume": str(checkpoint)}
    monkeypatch.setattr(
        ParameterServerShard, "state", lambda shard: state(shard) | {"theta": shard.theta * np.inf}
    )
    with pytest.raises(SystemExit, match=r"Parameters are infinite at step \d+.*--learning-rate"):
        gorila_dqn.main(dataclasses.replace(args, **on, total_timesteps=400))
    assert checkpoint.read_bytes() == before


def test_learns_nothing_from_silence_and_says_so(no_ray, tmp_path):
    timeouts = set()
    no_ray.get = lambda answers, timeout: (timeouts.add(timeout), look(answers))[1]
    no_ray.wait = lambda answers, timeout, num_returns=1: (time.sleep(0.01), ([], answers))[1]
    with pytest.raises(SystemExit, match=r"not answered .*bundle 0 in 0.1 sec.*now 0.05 sec"):
        gorila_dqn.main(toy_run(tmp_path, patience=0.05))
    assert timeouts == {0.05}


@pytest.mark.filterwarnings("ignore:overflow")
def test_learns_nothing_more_once_the_loss_explodes(no_ray, tmp_path):
    args = toy_run(tmp_path, optimizer="sgd", total_timesteps=80)
    gorila_dqn.main(args)
    checkpoint = tmp_path / "checkpoint.pt"
    before, resume = checkpoint.read_bytes(), {"run_dir": "", "resume": str(checkpoint)}
    explosive = dataclasses.replace(args, **resume, learning_rate=4e9, total_timesteps=10**4)
    with pytest.raises(SystemExit, match=r"is (nan|inf) at step \d+.*--learning-rate"):
        gorila_dqn.main(dataclasses.replace(explosive, report_every=10**4))
    assert checkpoint.read_bytes() == before


def test_learns_on_when_a_shard_dies_and_tells_what_was_lost(no_ray, tmp_path, monkeypatch, capsys):
    inspect, deaths = gorila_dqn.Gorila.inspect, []

    def kill_and_inspect(gorila):
        if "shard 1" in gorila.pids and not deaths:  # it was seen alive
            shard = gorila.shards[1]
            before = shard.component.version
            shard.component = ParameterServerShard(shard.component.path, gorila.args)
            state = shard.component.state
            shard.component.state = lambda: state() | {"pid": -1}
            deaths.append((before, shard.component.version))
        return inspect(gorila)

    monkeypatch.setattr(gorila_dqn.Gorila, "inspect", kill_and_inspect)
    args = toy_run(tmp_path, num_shards=2, shard_save_every=32, total_timesteps=240)
    metrics = gorila_dqn.main(args)
    ((before, after),) = deaths
    lost = metrics["charts/lost_updates"]
    assert 0 < lost == before - after < 32
    told = capsys.readouterr().out
    assert "shard 1 has died and was started anew" in told
    assert f"shard 1 has lost {lost} updates by now" in told
    assert metrics["charts/restarts"] == 1
    assert metrics["charts/version_skew"] == before - after


# ---- Bad input ----------------------------------------------------------------------------------


def test_bad_input_ctrl_c_before_training_is_a_sentence(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gorila_dqn, "make_env", interrupted)
    with pytest.raises(SystemExit, match=r"^Stopped\.$"):
        gorila_dqn.main(Args(**TOY))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "BrekoutNoFrameskip-v4"}, "No game.*BreakoutNoFrameskip-v4"),
        ({"env_id": "toy_games:Analogue-v0"}, "Discrete actions"),
        ({"env_id": "toy_games:Broken-v0"}, "No game toy_games:Broken-v0: no screen"),
        ({"num_actors": 0}, "--num-actors must lie between 1"),
        ({"num_shards": 0}, "--num-shards must lie between 1"),
        ({"steps_per_update": 0}, "--steps-per-update must lie between 1"),
        ({"adagrad_start": 0.0}, "--adagrad-start must be above 0"),
        ({"optimizer": "sgd", "adagrad_start": 1.0}, "--adagrad-start is for --optimizer adagrad"),
        ({"adagrad_start": 1e-50}, "--adagrad-start must be above 0 in 32 bits"),
        ({"object_store_mb": 1}, "--object-store-mb must be at least 75, not 1"),
        ({"total_timesteps": 50_000}, "ends a run before it learns: --learning-starts is 50000"),
        ({"final_epsilon": 1.5}, "--final-epsilon must lie between 0 and 1"),
        ({"num_actors": 3}, "must be equal, not 3 and 2"),
        ({"replay_capacity": 1000}, "--replay-capacity must be at least 50,000"),
        ({"replay_capacity": 99, "learning_starts": 100}, "--replay-capacity must be at least 400"),
        ({"replay_capacity": 10**9}, r"up to 7067.00 GB; this machine has .* GB: lower --replay"),
        ({"ray_address": "127.0.0.1:9"}, "Ray cannot be used at 127.0.0.1:9.*ray start --head"),
        ({"ray_address": "127.0.0.1:x"}, "Ray cannot be used at 127.0.0.1:x"),
        ({"resume": "a.pt", "evaluate": "b.pt"}, "pass one of them"),
        ({"resume": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        ({"evaluate": "damaged.pt"}, "damaged.pt is missing, damaged or no checkpoint"),
        (
            {"resume": "good.pt", "env_id": "PongNoFrameskip-v4"},
            "made with --env-id toy_games:Side-v0, not with --env-id PongNoFrameskip-v4",
        ),
        ({"resume": "good.pt", "orthogonal_init": True}, "made with --orthogonal-init False, not"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(**TOY)
    Path("damaged.pt").write_bytes(b"PK\x03\x04 half a file")
    state = {"net": DeepQNetwork(2).state_dict(), "args": dataclasses.asdict(args)}
    gorila_dqn.save_checkpoint(Path("good.pt"), **state)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        gorila_dqn.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str)
    assert sorted(tmp_path.rglob("*")) == before


# ---- Processes ----------------------------------------------------------------------------------


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    return found


def descendants(pid: int) -> dict[int, str]:
    """What runs below a process, by its title; Ray calls its own by the component."""
    found, above = {}, parents()
    for child in above:
        line, ancestor = [], child
        while ancestor in above and ancestor != pid:
            line.append(ancestor)
            ancestor = above[ancestor]
        if line and ancestor == pid:
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{child}/cmdline").read_text()
                found[child] = title.replace("\0", " ").strip()
    return found


def rays() -> list[int]:
    """Processes of Ray that this one has started."""
    return [pid for pid, title in descendants(os.getpid()).items() if "ray" in title]


def alive(pids) -> list[int]:
    """Which of these processes are there and no zombies."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def start(run_dir: Path, *flags: str) -> subprocess.Popen:
    """The script on a toy game, as a user would start it, in a process group of its own."""
    command = [sys.executable, "gorila_dqn.py", "--env-id", "toy_games:Side-v0"]
    command += ["--run-dir", str(run_dir), "--num-actors", "2", "--num-learners", "2"]
    command += ["--learning-starts", "200", "--replay-capacity", "4000", "--report-every", "200"]
    environment = os.environ | {"PYTHONPATH": "tests"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, start_new_session=True, **pipes
    )


def last(run_dir: Path, tag: str) -> float:
    """What a run has reported last under a tag; -1 if nothing."""
    path = run_dir / "metrics.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
    return next((float(row[2] or 0) for row in rows[::-1] if row[1:2] == [tag] and row[2:]), -1)


def wait_until(run_dir: Path, tag: str, reaches: float) -> None:
    wait_for(lambda: last(run_dir, tag) >= reaches, 300)


@pytest.mark.slow
def test_learns_the_toy_game_through_ray(tmp_path, monkeypatch):
    """With 5 % of random actions the optimum is 9.75 of ten points, five are chance."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    settings = TOY | {"learning_starts": 200, "replay_capacity": 4000, "num_shards": 2}
    settings |= {"epsilon_updates": 100, "target_period": 50, "discount": 0.9}
    args = Args(**settings, total_timesteps=1600, report_every=500, run_dir=str(tmp_path))
    metrics = gorila_dqn.main(dataclasses.replace(args, eval_episodes=20))
    assert metrics["eval/episodic_return"] > 9
    assert metrics["charts/restarts"] == metrics["charts/version_skew"] == 0
    steps = torch.load(tmp_path / "checkpoint.pt")["counts"]["steps"]
    updates = metrics["charts/updates"] + metrics["charts/outliers"] + metrics["charts/stale"]
    assert updates == pytest.approx((steps - 200) / 4, abs=2)
    assert not gorila_dqn.ray.is_initialized()
    if Path("/proc/self/stat").exists():
        wait_for(lambda: not alive(rays()), 60)


@pytest.mark.slow
def test_command_line(tmp_path):
    run = start(tmp_path, "--total-timesteps", "300", "--eval-episodes", "1", "--optimizer", "sgd")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "Replay takes up to 0.03 GB, 2 actors together." in said, said
    assert "eval/episodic_return" in said and "charts/UPS" in said
    assert last(tmp_path, "charts/learning_rate") == 2e-3


@linux
def test_command_line_ctrl_c_ends_all_processes(tmp_path):
    run = start(tmp_path, "--steps-per-update", "100")
    wait_for((tmp_path / "checkpoint.pt").exists, 200)
    processes = descendants(run.pid)
    assert {"ray::Bundle", "ray::ParameterServerShard"} <= {
        t.split(".")[0] for t in processes.values()
    }
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 1 and "Traceback" not in said
    assert "Stopped; go on with the same flags and --resume" in said
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns > written
    assert torch.load(tmp_path / "checkpoint.pt")["counts"]["steps"] > 0
    wait_for(lambda: not alive(processes), 60)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "a crash"])
def test_command_line_other_ends_leave_no_process_either(name, tmp_path):
    crash = name == "a crash"
    flags = ["--env-id", f"toy_games:{'Crashing' if crash else 'Side'}-v0"]
    run, processes = start(tmp_path, *flags), {}
    wait_for(lambda: any("raylet" in t for t in descendants(run.pid).values()), 200)
    while run.poll() is None:
        processes |= descendants(run.pid)
        if not crash and (tmp_path / "checkpoint.pt").exists():
            run.send_signal(getattr(signal, name))
            break
        time.sleep(0.2)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == (-signal.SIGKILL if name == "SIGKILL" else 1)
    assert not crash or "ZeroDivisionError" in said
    wait_for(lambda: not alive(processes), 120)  # Ray's agents take a minute to miss a killed run


COMPONENTS = {  # of each kind of replay: titles of their processes, and what the script calls them
    "local": {"Bundle": "bundle", "ParameterServerShard": "shard"},
    "global": {
        "Actor": "actor",
        "Learner": "learner",
        "ReplayMemory": "replay memory",
        "ParameterServerShard": "shard",
    },
}


@linux
@pytest.mark.slow
@pytest.mark.parametrize("replay", COMPONENTS)
def test_learns_to_the_end_when_any_component_is_killed(replay, tmp_path):
    """Each kind of process, one after the other, with SIGKILL."""
    flags = ["--replay", replay, "--num-shards", "2", "--shard-save-every", "20"]
    run = start(tmp_path, *flags, "--total-timesteps", "12000", "--eval-episodes", "1")
    for restarts, component in enumerate(COMPONENTS[replay], start=1):
        wait_until(tmp_path, "charts/updates", last(tmp_path, "charts/updates") + 40)
        updates, titles = last(tmp_path, "charts/updates"), descendants(run.pid).items()
        os.kill(min(p for p, t in titles if t.startswith(f"ray::{component}")), signal.SIGKILL)
        wait_until(tmp_path, "charts/restarts", restarts)
        wait_until(tmp_path, "charts/updates", updates + 20)
        assert run.poll() is None
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0 and "eval/episodic_return" in said, said
    counted = torch.load(tmp_path / "checkpoint.pt")["counts"]
    assert counted["restarts"] == restarts and 0 <= counted["lost_updates"] < 20
    assert 12_000 <= counted["steps"] <= 12_400  # rounds that were under way
    for name in COMPONENTS[replay].values():
        assert re.search(rf"{name}( \d)? has died and was started anew", said), name


@linux
@pytest.mark.slow
def test_learns_on_when_a_machine_leaves(tmp_path, monkeypatch):
    """Two nodes of Ray on this machine, one of which is removed with whatever runs on it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1} | memory)
    run = None
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=memory["object_store_memory"])
        flags = ["--ray-address", cluster.address, "--shard-save-every", "20"]
        flags += ["--num-shards", "2", "--replay", "global"]
        run = start(tmp_path, *flags)
        wait_until(tmp_path, "charts/updates", 60)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(tmp_path, "charts/restarts", 1)
        wait_until(tmp_path, "charts/updates", last(tmp_path, "charts/updates") + 40)
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=200)
        assert run.returncode == 1 and "Traceback" not in said, said
        assert last(tmp_path, "charts/lost_updates") < 2 * 20
    finally:
        if run and run.poll() is None:
            run.kill()
            run.communicate()
        cluster.shutdown()
