"""policy_distillation.py against the bugs that public ports of its paper have had.

Caught here: 1e-5 added to probabilities, which floors a sharp target; log-probabilities as the
target of KLDivLoss and a mean over actions; the temperature on the student, too; minibatches from
the first 500 stored points alone; stacks that reach into another episode; a student of two
convolutions; one output block for all games.
"""

import ast
import copy
import csv
import dataclasses
import importlib.util
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_games
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from running import processes_of, wait_for
from torch.distributions import Categorical, kl_divergence

import policy_distillation
from policy_distillation import WIDTHS, Args, Game, GameNetwork, ScreenMemory

ROOT = Path(__file__).parent.parent
SIDE, THIRD = "toy_games:Side-v0", "test_policy_distillation:Third-v0"


class Third(toy_games.Side):
    """Like Side with three places and three actions."""

    action_space = gym.spaces.Discrete(3)

    def screen(self) -> np.ndarray:
        self.side = int(self.np_random.integers(3))
        screen = np.zeros((84, 84), np.uint8)
        screen[20:64, 28 * self.side : 28 * self.side + 28] = 255
        return screen


if "Third-v0" not in gym.registry:
    gym.register("Third-v0", "test_policy_distillation:Third")


def hand_made_teacher(num_actions: int) -> GameNetwork:
    """Q(s, a) is the brightness of the a-th vertical band of the newest screen."""
    net = GameNetwork(WIDTHS["same"], [num_actions])
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        conv1, conv2, conv3, hidden = (layer for layer in net.trunk if hasattr(layer, "weight"))
        conv1.weight[0, 3] = 1 / 64
        conv2.weight[0, 0, 1, 1] = conv3.weight[0, 0, 1, 1] = 1
        columns = hidden.weight.view(512, 64, 7, 7)  # centred at the pixels 16, 24, ..., 64
        for j in range(7):
            columns[(8 * j + 16) * num_actions // 84, 0, :, j] = 1 / 49
        net.outputs[0][0].weight[:, :num_actions] = torch.eye(num_actions)
    return net


def teacher_file(path: Path, env_id: str, num_actions: int) -> str:
    """A checkpoint as gorila_dqn.py writes it."""
    state = hand_made_teacher(num_actions).state_dict()
    net = {name.replace("outputs.0.0.", "q."): x for name, x in state.items()}
    policy_distillation.save_checkpoint(path, net=net, args={"env_id": env_id})
    return str(path)


def tiny(tmp_path: Path, **flags) -> Args:
    """Two collectors of two games, a few hundred steps."""
    args = Args(student="net3", optimizer="adam", learning_rate=1e-3, num_collectors=2)
    args = dataclasses.replace(args, envs_per_collector=2, memory_steps=480, round_steps=240)
    args = dataclasses.replace(args, round_updates=30, total_rounds=2, eval_episodes=4)
    args = dataclasses.replace(args, run_dir=str(tmp_path / "run"), device="cpu", batch_size=16)
    return dataclasses.replace(args, **flags)


def tiny_dqn(tmp_path: Path, **flags) -> Args:
    args = Args(stage="teacher", env_ids=(SIDE,), total_timesteps=200, report_every=100)
    args = dataclasses.replace(args, learning_starts=20, steps_per_update=5, dqn_memory_steps=60)
    args = dataclasses.replace(args, target_period=30, epsilon_timesteps=100, eval_episodes=2)
    args = dataclasses.replace(args, run_dir=str(tmp_path / "run"), device="cpu", batch_size=4)
    return dataclasses.replace(args, **flags)


def random_q(B: int = 7, A: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's outputs and teacher's Q-values, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, A, generator=generator, dtype=torch.float64).unbind()


def updates_of(net, optimizer, args):
    """A student's, as learn_from_memories wants them."""
    return partial(policy_distillation.student_update, net, optimizer, args)


def same(a, b) -> bool:
    """Equal in every bit, whatever the nesting."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def reported(run_dir: Path) -> dict[str, dict[int, float]]:
    """The numbers of metrics.csv, by tag and step."""
    numbers = {}
    with open(run_dir / "metrics.csv", newline="") as file:
        for step, tag, value in csv.reader(file):
            assert int(step) not in numbers.setdefault(tag, {}) or tag == "charts/minutes"
            numbers[tag][int(step)] = float(value)
    return numbers


# ---- Losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.01])
def test_math_kl_is_that_of_torch_distributions(tau):
    S, q = random_q()
    expected = kl_divergence(Categorical(logits=q / tau), Categorical(logits=S)).mean()
    assert policy_distillation.kl_loss(S, q, tau).item() == pytest.approx(expected.item())


def test_math_kl_at_temperature_0_is_nll_of_the_best_action():
    S, q = random_q()
    expected = -np.mean([Categorical(logits=s).log_prob(t.argmax()).item() for s, t in zip(S, q)])
    assert policy_distillation.kl_loss(S, q, 1e-6).item() == pytest.approx(expected)
    assert policy_distillation.nll_loss(S, q).item() == pytest.approx(expected)


def test_math_mse_sums_over_actions_and_averages_over_screens():
    S, q = random_q()
    expected = sum((q[i, a] - S[i, a]) ** 2 for i in range(7) for a in range(5)) / 7
    assert policy_distillation.mse_loss(S, q).item() == pytest.approx(expected.item())


def test_math_tiny_probabilities_are_not_floored():
    """exp(-50) and exp(-200) are told apart by a student that has learned them, in float32."""
    q = torch.tensor([[1.0, 0.5, -1.0]])
    S = (q / 0.01).requires_grad_()
    loss = policy_distillation.kl_loss(S, q, 0.01)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and S.grad.abs().max() < 1e-6
    far = policy_distillation.kl_loss(torch.tensor([[0.0, 80.0, 0.0]]), q, 0.01)
    assert far.item() == pytest.approx(80)  # -log p of the best action, no less
    assert policy_distillation.kl_loss(q, 1e4 * q, 0.01).isfinite()


def test_gradient_of_kl_is_the_difference_of_the_policies():
    S, q = random_q()
    S.requires_grad_()
    policy_distillation.kl_loss(S, q, 0.3).backward()
    torch.testing.assert_close(S.grad, (S.softmax(-1) - (q / 0.3).softmax(-1)).detach() / 7)


def test_math_each_flag_has_its_loss():
    S, q = random_q()
    for loss, expected in (
        ("kl", policy_distillation.kl_loss(S, q, 0.2)),
        ("nll", policy_distillation.nll_loss(S, q)),
        ("mse", policy_distillation.mse_loss(S, q)),
    ):
        args = Args(loss=loss, temperature=0.2)
        assert torch.equal(policy_distillation.distillation_loss(S, q, args), expected)


# ---- Networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "num_actions", "count"),
    [
        ("same", [18], 1_693_362),
        ("net1", [18], 427_874),
        ("net2", [18], 113_346),
        ("net3", [18], 61_954),
        ("multi3", [3, 3, 6], 1_882_668),  # Freeway, Pong, Q*bert
        ("multi10", [9, 4, 9, 3, 9, 3, 6, 18, 18, 6], 6_756_721),
    ],
)
def test_math_parameter_counts_are_the_papers(student, num_actions, count):
    net = GameNetwork(WIDTHS[student], num_actions)
    assert sum(p.numel() for p in net.parameters()) == count
    s = torch.zeros(2, 84, 84, 4, dtype=torch.uint8)
    assert [net(s, g).shape for g in range(len(num_actions))] == [(2, A) for A in num_actions]


def test_math_teacher_is_the_network_of_gorila_dqn(tmp_path):
    """Its class, as it stands there; its parameters, loaded here, give its Q-values."""
    source = (ROOT / "gorila_dqn.py").read_text()
    classes = [n for n in ast.parse(source).body if getattr(n, "name", "") == "DeepQNetwork"]
    there = {"torch": torch, "nn": torch.nn, "Tensor": torch.Tensor}
    exec(ast.get_source_segment(source, classes[0]), there)
    theirs, path = there["DeepQNetwork"](2), tmp_path / "gorila.pt"
    policy_distillation.save_checkpoint(path, net=theirs.state_dict(), args={"env_id": SIDE})
    env_id, ours = policy_distillation.load_teacher(str(path))
    s = torch.randint(0, 256, (3, 84, 84, 4), dtype=torch.uint8)
    assert env_id == SIDE and torch.equal(ours(s), theirs(s))
    x = s.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(theirs.q(ours.trunk(x)), ours(s))


def test_math_auto_is_net2_or_multi3_and_a_dqn_of_one_game_is_the_teachers_network():
    def layers(**flags) -> list[int]:
        net = policy_distillation.make_network(Args(**flags), [6] * len(flags["env_ids"]))
        return [net.trunk[0].out_channels, net.trunk[-2].out_features, len(net.outputs[0])]

    assert layers(env_ids=("a",)) == [16, 128, 1]
    assert layers(env_ids=("a", "b")) == [32, 512, 3]
    assert layers(env_ids=("a",), stage="teacher") == [32, 512, 1]
    assert layers(env_ids=("a", "b"), stage="teacher") == [32, 512, 3]
    assert layers(env_ids=("a", "b"), stage="teacher", student="multi10") == [64, 1500, 3]


@pytest.mark.parametrize("loss", ["kl", "nll", "mse"])
def test_gradient_of_each_loss_reaches_the_student_and_not_the_teacher(loss):
    """Though nothing keeps the teacher's own from being computed."""
    student, teacher = (GameNetwork(WIDTHS["net3"], [3]) for _ in range(2))
    s = torch.randint(256, (4, 84, 84, 4), dtype=torch.uint8)
    q = teacher(s)
    assert q.requires_grad
    policy_distillation.distillation_loss(student(s), q, Args(loss=loss)).backward()
    assert all(p.grad is not None and p.grad.any() for p in student.outputs.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_gradient_outputs_of_other_games_have_none_and_stay():
    torch.manual_seed(0)
    net, s = GameNetwork(WIDTHS["multi3"], [3, 6]), torch.zeros(2, 84, 84, 4).byte()
    optimizer = policy_distillation.make_optimizer(net, Args())
    for game, other in ((0, 1), (1, 0)):  # the second time the first game's averages are not 0
        before = [p.clone() for p in net.outputs[other].parameters()]
        q = torch.randn(2, [3, 6][game])
        loss = policy_distillation.kl_loss(net(s, game), q, 0.01)
        policy_distillation.update(optimizer, loss)
        assert all(p.grad is None for p in net.outputs[other].parameters())
        assert all(map(torch.equal, before, net.outputs[other].parameters()))
        assert net.outputs[game][0].weight.grad.abs().sum() > 0
        assert net.trunk[0].bias.grad.abs().sum() > 0


def test_math_rmsprop_is_dqns_and_no_weight_moves_faster_than_the_maximum():
    theta = torch.nn.Linear(1, 1, bias=False).double()
    args = Args(learning_rate=0.02, max_learning_rate=0.5)
    optimizer = policy_distillation.make_optimizer(theta, args)
    x, g, g2 = theta.weight.item(), 0.0, 0.0
    for d in (1e-9, 0.3, -2.0, 0.1):
        theta.weight.grad = torch.full((1, 1), d, dtype=torch.float64)
        optimizer.step()
        g, g2 = 0.95 * g + 0.05 * d, 0.95 * g2 + 0.05 * d * d
        step = 0.02 * d / (math.sqrt(g2 - g * g) + 0.02 / 0.5)
        x -= step
        assert theta.weight.item() == pytest.approx(x, rel=1e-12) and abs(step) <= 0.5 * abs(d)
    eps = Args().learning_rate / Args().max_learning_rate
    assert eps == pytest.approx(math.sqrt(0.01) / 32)  # DQN's 0.01 inside the root, for a sum of 32


def test_math_defaults_are_the_papers():
    args = Args()
    assert (args.loss, args.temperature, args.teacher_epsilon) == ("kl", 0.01, 0.05)
    assert args.memory_steps == 10 * args.round_steps == 540_000
    assert (args.round_updates, args.total_rounds, args.eval_epsilon) == (10_000, 500, 0.05)
    assert args.round_steps == 3600 * 15 and policy_distillation.MAX_FRAMES == 30 * 60 * 60


def test_math_defaults_of_the_teacher_are_those_of_dqn():
    args = Args()
    assert (args.discount, args.batch_size, args.steps_per_update) == (0.99, 32, 4)
    assert (args.dqn_memory_steps, args.learning_starts) == (1_000_000, 50_000)
    assert (args.final_epsilon, args.epsilon_timesteps) == (0.1, 1_000_000)
    assert (args.target_period, args.total_timesteps) == (10_000, 50_000_000)


@pytest.mark.parametrize("student", ["net2", "multi3"])
def test_math_the_network_of_each_game_is_that_of_a_loop(student):
    net = GameNetwork(WIDTHS[student], [4, 6])
    s = torch.randint(0, 256, (5, 84, 84, 4), dtype=torch.uint8)
    trunk = [p.detach() for p in net.trunk.parameters()]
    x = s.permute(0, 3, 1, 2).float() / 255
    for i, stride in enumerate((4, 2, 1)):
        x = F.conv2d(x, trunk[2 * i], trunk[2 * i + 1], stride=stride).relu()
    x = (x.flatten(1) @ trunk[6].T + trunk[7]).relu()
    for g, outputs in enumerate(net.outputs):
        *own, W, b = (p.detach() for p in outputs.parameters())
        y = (x @ own[0].T + own[1]).relu() if own else x
        torch.testing.assert_close(net(s, g).detach(), y @ W.T + b, atol=1e-5, rtol=1e-4)
    assert bool(own) == (student == "multi3")


def test_math_defaults_are_those_of_every_machine(monkeypatch):
    """The number of collectors decides who plays with which seed."""
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    spec = importlib.util.spec_from_file_location("again", ROOT / "policy_distillation.py")
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert dataclasses.asdict(again.Args()) == dataclasses.asdict(Args())


def test_math_each_of_the_games_side_by_side_explores_on_its_own():
    q, generator = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(4000, 1), torch.Generator()
    for epsilon in (0.0, 0.4, 1.0):
        a = policy_distillation.epsilon_greedy(q, epsilon, generator.manual_seed(0))
        assert (a != 1).float().mean().item() == pytest.approx(0.75 * epsilon, abs=0.03)


# ---- DQN ----------------------------------------------------------------------------------------


def test_math_dqn_targets_and_loss_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    q_t, q_tm1 = 3 * torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    r = torch.randn(50, generator=generator, dtype=torch.float64)
    terminated = (torch.rand(50, generator=generator) < 0.3).double()
    known = (torch.rand(50, generator=generator) < 0.8).double()
    a = torch.randint(4, (50,), generator=generator)
    y = policy_distillation.dqn_targets(r, terminated, q_t, 0.9)
    q_tm1.requires_grad_()
    policy_distillation.td_loss(q_tm1, a, y, known).backward()
    for i in range(50):
        expected = r[i].item() + (0 if terminated[i] else 0.9 * max(q_t[i].tolist()))
        assert y[i].item() == pytest.approx(expected)
        error = q_tm1[i, a[i]].item() - expected
        gradient = [0.0] * 4
        gradient[a[i]] = known[i].item() * max(-1, min(1, error)) / 50  # the clipped error
        assert q_tm1.grad[i].tolist() == pytest.approx(gradient)


def test_math_exploration_falls_linearly_and_stays():
    rates = [policy_distillation.exploration_rate(t, 0.1, 100) for t in (0, 50, 100, 1000)]
    assert rates == pytest.approx([1, 0.55, 0.1, 0.1])


def test_math_dqn_learner_stores_what_happened_and_learns_from_the_successor(tmp_path, monkeypatch):
    """Clock's screen t is all t, step t earns t (clipped to 1) and the seventh ends it."""
    args = tiny_dqn(tmp_path, env_ids=("toy_games:TruncatedClock-v0", "toy_games:Clock-v0"))
    net = policy_distillation.make_network(args, [2, 2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    metrics = learner.learn(20)  # ten steps of each game, none to learn from yet
    for g in (0, 1):
        assert metrics[f"charts/episodic_return/{args.env_ids[g]}"] == 28  # not clipped
        memory = learner.memories[g]
        screens = [memory.screens[0, t, 0, 0].item() for t in range(10)]
        assert screens == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
        a, r, terminated, truncated = memory.values[0, :10].unbind(-1)
        assert set(a.tolist()) <= {0, 1} and (r == 1).all()
        end = [0.0] * 6 + [1.0] + [0.0] * 3
        assert [terminated.tolist(), truncated.tolist()] == ([[0.0] * 10, end], [end, [0.0] * 10])[
            g
        ]
    seen = []

    def forward(net, s, g, bfloat16=False):
        seen.append((net, g, s[:, 0, 0, -1].tolist()))
        return torch.zeros(len(s), 2)

    monkeypatch.setattr(GameNetwork, "forward", forward)
    learner.loss(1, *learner.minibatch(1))
    (first, g, s_t), (second, h, s_tm1) = seen
    assert first is learner.target_net and second is learner.net and g == h == 1
    assert all(after == (before + 1) % 7 for before, after in zip(s_tm1, s_t))


def test_math_dqns_stacks_stay_within_an_episode_and_rewards_within_1(tmp_path, monkeypatch):
    """Clock's screen t is all t; here step t earns (t - 4) / 2."""
    step = toy_games.Clock.step
    monkeypatch.setattr(
        toy_games.Clock,
        "step",
        lambda game, a: (lambda s_t, r_t, *rest: (s_t, (r_t - 4) / 2, *rest))(*step(game, a)),
    )
    args = tiny_dqn(tmp_path, env_ids=("toy_games:Clock-v0",), learning_starts=1000)
    net = policy_distillation.make_network(args, [2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    learner.learn(20)
    (memory,), t = learner.memories, torch.arange(20)
    r_t = memory.values_at(torch.zeros(20).long(), t)[:, 1]
    assert r_t[:7].tolist() == [-1, -1, -0.5, 0, 0.5, 1, 1]
    stacks = memory.stacks(torch.zeros(20).long(), t)[:, 0, 0].tolist()
    assert stacks == [[max(0, n % 7 - back) for back in (3, 2, 1, 0)] for n in range(20)]


def test_math_each_of_dqns_games_begins_anew_and_is_none_of_the_evaluations(tmp_path, monkeypatch):
    begun, begin = [], Game.begin
    monkeypatch.setattr(Game, "begin", lambda game, seed: (begun.append(seed), begin(game, seed)))
    args = tiny_dqn(tmp_path, learning_starts=1000)
    net = policy_distillation.make_network(args, [2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    learner.learn(50)
    sides = learner.memories[0].screens[0, :50, 30, 0].view(5, 10)
    assert len({tuple(game) for game in sides.tolist()}) == 5
    policy_distillation.evaluate(net, SIDE, args)
    assert len(begun) == len(set(begun)) == 6 + args.eval_episodes


def test_gradient_dqn_reaches_its_network_and_not_the_target(tmp_path):
    args = tiny_dqn(tmp_path)
    net = policy_distillation.make_network(args, [2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    learner.learn(20)
    loss, _ = learner.loss(0, *learner.minibatch(0))
    loss.backward()
    assert learner.net.outputs[0][0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in learner.target_net.parameters())


def test_math_learning_in_16_bits_rounds_features_but_no_outputs(tmp_path, monkeypatch):
    """Those of the DQN and its target, then those of a student; acting rounds nothing."""
    args = tiny_dqn(tmp_path, bfloat16=True, round_updates=1)
    monkeypatch.setattr(policy_distillation, "distillation_loss", lambda S, q, _: S.square().sum())
    net = policy_distillation.make_network(args, [2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    seen = []
    for outputs in (learner.net.outputs[0], learner.target_net.outputs[0]):
        outputs.register_forward_hook(lambda _, x, y: seen.append((*x, y)))
    learner.learn(20)  # acts alone
    acted = len(seen)
    learner.loss(0, *learner.minibatch(0))
    optimizer = policy_distillation.make_optimizer(learner.net, args)
    policy_distillation.learn_from_memories(
        updates_of(learner.net, optimizer, args), learner.memories, args, 15
    )
    assert (acted, len(seen)) == (20, 23)
    for n, (x, outputs) in enumerate(seen):
        assert torch.equal(x, x.bfloat16().float()) == (n >= acted)
        assert outputs.dtype == torch.float32
        assert not torch.equal(outputs, outputs.bfloat16().float())


def test_math_dqn_updates_when_due_game_by_game_and_renews_its_target(tmp_path, monkeypatch):
    args = tiny_dqn(tmp_path, env_ids=(SIDE, THIRD), student="multi3", target_period=50)
    net = policy_distillation.make_network(args, [2, 3])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    updates, targets = [], []

    def loss(g, *minibatch):
        updates.append((learner.steps, g))
        targets.append(same(learner.target_net.state_dict(), net.state_dict()))
        q = net(torch.zeros(1, 84, 84, 4, dtype=torch.uint8), g)
        return q.sum(), q

    monkeypatch.setattr(learner, "loss", loss)
    metrics = learner.learn(100)
    steps = [step for step, _ in updates]
    assert steps == list(range(45, 101, 5))  # 20 steps of each game first, then every fifth
    assert [g for _, g in updates] == [step // 5 % 2 for step in steps]
    assert targets == [step in (45, 55) for step in steps]  # before the first, after the 50th step
    assert metrics[f"charts/episodic_length/{THIRD}"] == 10


def test_math_dqn_loss_is_that_of_a_loop_over_the_steps_it_stored(tmp_path, monkeypatch):
    """Clock's screen t is all t, every step earns 1 (clipped) and the seventh ends it."""
    games = "toy_games:TruncatedClock-v0", "toy_games:Clock-v0"
    args = tiny_dqn(tmp_path, env_ids=games, discount=0.7, batch_size=9)
    net = policy_distillation.make_network(args, [2, 2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    q = lambda net, t: np.array([t, -t]) / (10 if net is learner.net else 3)  # noqa: E731

    def forward(net, s, g, bfloat16=False):
        return torch.stack([torch.from_numpy(q(net, t)) for t in s[:, 0, 0, -1].tolist()])

    def sample(memory, size, end):
        return torch.zeros(size).long(), torch.arange(end - size, end)

    monkeypatch.setattr(GameNetwork, "forward", forward)
    monkeypatch.setattr(ScreenMemory, "sample", sample)
    learner.learn(20)  # ten steps of each game, nine with a successor
    for g, truncates in enumerate((True, False)):
        losses = []
        for step in range(9):
            t, over = step % 7, step == 6
            a = int(learner.memories[g].values[0, step, 0])
            y = 1 + (0 if over else 0.7 * q(learner.target_net, t + 1).max())
            error = abs(y - q(learner.net, t)[a])
            huber = error**2 / 2 if error < 1 else error - 1 / 2
            losses.append(0 if over and truncates else huber)
        loss, q_tm1 = learner.loss(g, *learner.minibatch(g))
        assert loss.item() == pytest.approx(np.mean(losses), rel=1e-6) and len(q_tm1) == 9


def test_math_dqn_explores_by_the_steps_of_all_games_and_acts_by_its_network(tmp_path, monkeypatch):
    flags = {"epsilon_timesteps": 40, "final_epsilon": 0.2, "learning_starts": 1000}
    args = tiny_dqn(tmp_path, env_ids=(SIDE, THIRD), **flags)
    net = policy_distillation.make_network(args, [2, 3])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    asked, rates = [], []

    def forward(net, s, game=0):
        asked.append((net, game))
        return torch.zeros(1, [2, 3][game])

    def epsilon_greedy(q, epsilon):
        rates.append(epsilon)
        return torch.zeros(1).long()

    monkeypatch.setattr(GameNetwork, "forward", forward)
    monkeypatch.setattr(policy_distillation, "epsilon_greedy", epsilon_greedy)
    reports = learner.learn(20), learner.learn(40)
    assert rates == pytest.approx([1 - 0.8 * min(1, T / 40) for T in range(60)])
    assert [report["charts/epsilon"] for report in reports] == pytest.approx([0.62, 0.2])
    assert asked == [(net, T % 2) for T in range(60)]


@pytest.mark.parametrize(
    ("eval_every", "evaluated"), [(0, [250]), (100, [100, 200, 250]), (150, [200, 250])]
)
def test_math_a_dqn_stops_at_its_last_step_and_is_evaluated_when_due(
    eval_every, evaluated, tmp_path, monkeypatch
):
    def learn(learner, steps):
        learner.steps += steps
        return {}

    clock = iter(range(0, 12, 2))
    perf_counter = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(policy_distillation, "time", perf_counter)
    monkeypatch.setattr(policy_distillation.DeepQLearner, "learn", learn)
    args = tiny_dqn(tmp_path, total_timesteps=250, report_every=100, eval_every=eval_every)
    net = policy_distillation.make_network(args, [2])
    reports = [*policy_distillation.train_teacher(net, args, tmp_path / "memory", {})]
    assert [(step, state["steps"]) for step, _, _, state in reports] == [
        (step, step) for step in (100, 200, 250)
    ]
    assert [step for step, due, *_ in reports if due] == evaluated
    assert [metrics["charts/SPS"] for *_, metrics, _ in reports] == [50, 50, 25]


def test_math_the_target_network_follows_between_updates_too(tmp_path):
    args = tiny_dqn(tmp_path, target_period=7, steps_per_update=5, learning_starts=1000)
    net = policy_distillation.make_network(args, [2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    torch.nn.init.constant_(net.outputs[0][0].bias, 9.0)
    for steps, follows in ((6, False), (1, True)):
        learner.learn(steps)
        assert same(dict(learner.target_net.state_dict()), dict(net.state_dict())) == follows


def test_math_multi_dqn_tells_each_games_scores_under_its_name(tmp_path):
    """A game of Clock is of 7 steps and earns 28, one of Side of 10 and earns 10 at most."""
    clock = "toy_games:Clock-v0"
    args = tiny_dqn(tmp_path, env_ids=(SIDE, clock), learning_starts=1000)
    net = policy_distillation.make_network(args, [2, 2])
    learner = policy_distillation.DeepQLearner(net, args, tmp_path / "memory")
    metrics = learner.learn(40)
    assert metrics[f"charts/episodic_return/{clock}"] == 28
    assert metrics[f"charts/episodic_return/{SIDE}"] <= 10
    lengths = [metrics[f"charts/episodic_length/{env_id}"] for env_id in args.env_ids]
    assert lengths == [10, 7]


def test_math_dqn_draws_no_step_whose_successor_is_still_to_come(tmp_path, monkeypatch):
    """After 21 steps the first of two games has had eleven, the second ten."""
    args, ends = tiny_dqn(tmp_path, env_ids=(SIDE, THIRD), learning_starts=1000), []
    learner = policy_distillation.DeepQLearner(
        policy_distillation.make_network(args, [2, 3]), args, tmp_path / "memory"
    )
    learner.learn(21)
    sample = ScreenMemory.sample

    def note(memory, size, end):
        ends.append(end)
        return sample(memory, size, end)

    monkeypatch.setattr(ScreenMemory, "sample", note)
    learner.loss(1, *learner.minibatch(1))
    assert ends == [9]


def test_a_gpu_repeats_what_it_recorded_for_a_game_with_new_tensors(monkeypatch):
    """Stand-ins: a device that is none of the names, a graph that computes again when replayed."""
    recording, calls, weight = [], [], torch.tensor([1.0])

    @contextmanager
    def graph(stand_in):
        recording.append(stand_in)
        yield
        recording.pop()

    def compute(g, x):
        calls.append(g)
        output = weight * x * (g + 1)
        for stand_in in recording:
            stand_in.replay = lambda: output.copy_(weight * x * (g + 1))
        return output

    monkeypatch.setattr(policy_distillation, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    repeat = policy_distillation.recorded(compute, Args())
    outputs = []
    for n in range(6):
        for g in range(2):
            weight.fill_(n)
            outputs.append((float(repeat(g, torch.tensor([10.0 + n]))), n * (10 + n) * (g + 1)))
    assert [found for found, _ in outputs] == [expected for _, expected in outputs]
    assert calls == [0, 1] * 4  # the fourth is the recorded one

    monkeypatch.undo()
    repeat = policy_distillation.recorded(compute, Args(device="cpu"))
    assert [float(repeat(1, torch.tensor([2.0]))) for _ in range(6)] == [20.0] * 6
    assert len(calls) == 14


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_gpu_learns_what_it_would_without_graphs(optimizer, bfloat16, monkeypatch):
    """Two games in turn, eight updates each."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = Args(optimizer=optimizer, bfloat16=bfloat16, env_ids=(SIDE, THIRD))
    nets = []
    torch.use_deterministic_algorithms(True)
    try:
        for repeated in (True, False):
            torch.manual_seed(0)
            net = policy_distillation.make_network(args, [2, 3]).to("cuda")
            learn = updates_of(net, policy_distillation.make_optimizer(net, args), args)
            learn = policy_distillation.recorded(learn, args) if repeated else learn
            for n in range(16):
                s = torch.randint(0, 256, (9, 4, 84, 84), dtype=torch.uint8).permute(0, 2, 3, 1)
                learn(n % 2, s, torch.randn(9, 2 + n % 2))
            nets.append({name: part.cpu() for name, part in net.state_dict().items()})
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*nets)


def test_math_centred_rmsprop_is_torchs_without_its_roots_of_negative_numbers():
    """Gradients that change, then one that stays, which rounding makes NaN in torch's."""
    torch.manual_seed(0)
    start, networks = torch.randn(5000), []
    gradients = [*torch.randn(20, 5000), *torch.randn(5000).expand(400, -1)]
    for make in (
        partial(policy_distillation.CentredRMSProp, lr=0.01, decay=0.95, eps=1e-3),
        partial(torch.optim.RMSprop, lr=0.01, alpha=0.95, eps=1e-3, centered=True),
    ):
        theta, unused = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2))
        optimizer = make([theta, unused])
        for gradient in gradients:
            theta.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(unused, torch.ones(2))
        networks.append(theta.detach())
    ours, torchs = networks
    assert ours.isfinite().all() and torchs.isnan().any()
    assert torch.equal(ours[torchs.isfinite()], torchs[torchs.isfinite()])


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_an_optimizers_state_may_come_from_another_device(optimizer):
    net = GameNetwork(WIDTHS["net3"], [2])
    ours = policy_distillation.make_optimizer(net, Args(optimizer=optimizer))
    policy_distillation.update(ours, net(torch.zeros(1, 84, 84, 4, dtype=torch.uint8)).sum())
    state = ours.state_dict()
    state["param_groups"][0] |= {"capturable": True} if optimizer == "adam" else {}  # as a GPU's is
    policy_distillation.restore(ours, state)
    assert not ours.param_groups[0].get("capturable")
    before = net.outputs[0][0].bias.clone()
    policy_distillation.update(ours, net(torch.zeros(1, 84, 84, 4, dtype=torch.uint8)).sum())
    assert not torch.equal(before, net.outputs[0][0].bias)


# ---- Games and replay ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "training", "steps"),
    [("BreakoutNoFrameskip-v4", True, 150), ("ALE/Breakout-v5", False, 60), (SIDE, False, 7)],
)
def test_math_a_game_comes_back_from_its_seed_and_actions(env_id, training, steps):
    game, rng = Game(env_id, training, seed=5), np.random.default_rng(0)
    actions = rng.integers(game.env.action_space.n, size=steps + 10).tolist()
    for a in actions[:steps]:
        game.step(a)
    again = Game(env_id, training, *game.state)
    for a in actions[steps : steps + 2]:
        assert (again.s == game.s).all() and again.age == game.age
        assert again.step(a)[:3] == game.step(a)[:3]
    assert again.state == game.state


def test_math_atari_is_played_in_steps_of_four_frames_and_told_in_frames(monkeypatch):
    game = Game("PongNoFrameskip-v4", False, 3)
    ale = game.env.unwrapped.ale
    frames = ale.getEpisodeFrameNumber()
    game.step(2)
    assert ale.getEpisodeFrameNumber() == frames + 4
    layers = [layer := game.env] + [layer := layer.env for _ in range(8) if hasattr(layer, "env")]
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds.index("AtariPreprocessing") < kinds.index("RecordEpisodeStatistics")
    monkeypatch.setattr(policy_distillation, "MAX_FRAMES", 400)
    game, info = Game("PongNoFrameskip-v4", False, 3), {}
    while "episode" not in info:
        _, terminated, truncated, info = game.step(0)
    assert truncated and not terminated and info["episode"]["l"] == 400


def test_math_a_lost_life_is_followed_by_an_episode_of_the_same_game():
    game, ends, info = Game("BreakoutNoFrameskip-v4", True, seed=0), [], {}
    while "episode" not in info:
        _, terminated, _, info = game.step(1)  # FIRE serves, the paddle stands still
        if terminated:
            ends.append(game.age)
    assert len(ends) == 5 and ends[:4] == [0] * 4 and ends[4] > 0
    assert len(game.state[1]) > 50
    game.begin(3)
    assert game.state == (3, []) and game.env.unwrapped.ale.lives() == 5


def test_math_teachers_start_after_1_to_30_no_ops():
    game, frames = Game("PongNoFrameskip-v4", False, 0), []
    for seed in range(15):
        game.begin(seed)
        frames.append(game.env.unwrapped.ale.getEpisodeFrameNumber())
    assert min(frames) >= 1 and max(frames) <= 30 and len(set(frames)) > 8


def test_math_memory_rebuilds_the_stacks_of_a_list_of_episodes(tmp_path):
    """Two lanes of episodes of random lengths, three times round the ring."""
    rng = np.random.default_rng(0)
    memory = ScreenMemory(tmp_path / "memory", lanes=3, capacity=20, spare=4, width=2)
    reader = ScreenMemory(tmp_path / "memory", lanes=3, capacity=20, spare=4, width=2)
    episodes = [[[]], [[]]]  # of each lane, each a list of screens
    lengths = [2, 5]
    history = [[], []]  # the true stack at every step
    for t in range(81):
        stacks, ages = [], []
        for lane in (0, 1):
            if len(episodes[lane][-1]) == lengths[lane]:
                episodes[lane].append([])
                lengths[lane] = int(rng.integers(1, 9))
            episode = episodes[lane][-1]
            ages.append(len(episode))
            episode.append(rng.integers(256, size=(84, 84), dtype=np.uint8))
            padded = [episode[0]] * 3 + episode
            stacks.append(np.stack(padded[-4:], axis=-1))
            history[lane].append(stacks[-1])
        values = torch.tensor([[t, 0.0], [t, 1.0]])
        memory.write(slice(1, 3), t, torch.from_numpy(np.stack(stacks)), ages, values)
        if t in (3, 25, 80):
            for lane in (0, 1):
                steps = torch.arange(max(0, t + 1 - 20), t + 1)
                lanes = torch.full_like(steps, lane + 1)
                rebuilt = reader.stacks(lanes, steps).numpy()
                for i, step in enumerate(steps.tolist()):
                    assert (rebuilt[i] == history[lane][step]).all()
                assert reader.values_at(lanes, steps)[:, 0].tolist() == steps.tolist()
                assert (reader.values_at(lanes, steps)[:, 1] == lane).all()
    assert memory.slots == 27 and (memory.screens[0] == 0).all()


def test_math_memory_samples_all_that_it_holds_and_nothing_else(tmp_path):
    memory = ScreenMemory(tmp_path / "memory", lanes=2, capacity=10, spare=0, width=1)
    lane, t = memory.sample(1000, end=4)
    assert set(lane.tolist()) == {0, 1} and set(t.tolist()) == {0, 1, 2, 3}
    _, t = memory.sample(1000, end=25)
    assert set(t.tolist()) == set(range(15, 25))
    assert abs(t.float().mean().item() - 19.5) < 0.5


def test_math_memory_per_step_is_one_screen_and_the_estimate_counts_it(tmp_path, capsys):
    memory = ScreenMemory(tmp_path / "memory", lanes=1, capacity=1000, spare=0, width=6)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size == 1003 * (84 * 84 + 1 + 4 * 6) and memory.screens.nbytes == 1003 * 84 * 84
    policy_distillation.check_memory(Args(), [6])  # 540,000 screens
    assert "take up to 3.82 GB" in capsys.readouterr().out
    policy_distillation.check_memory(Args(stage="teacher"), [6])  # and 25,000 from report to report
    assert "take up to 7.25 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "shapes"),  # lanes, capacity, spare, width of each
    [
        ({"stage": "teacher"}, [(1, 7000, 500, 4)] * 2),
        ({}, [(8, 4000, 0, 2), (8, 4000, 0, 3)]),
        ({"online": True, "env_ids": (SIDE,)}, [(1, 7000, 6000, 4), (8, 4000, 0, 2)]),
    ],
)
def test_math_replays_are_as_large_as_their_flags_and_the_estimate_counts_all(
    flags, shapes, tmp_path, monkeypatch, capsys
):
    """Beside its capacity a DQN's keeps the steps from one checkpoint to the next."""
    args = Args(env_ids=(SIDE, THIRD), dqn_memory_steps=7000, report_every=500, device="cpu")
    args = dataclasses.replace(args, memory_steps=32_000, round_steps=6000, num_collectors=2)
    args = dataclasses.replace(args, envs_per_collector=4, **flags)
    num_actions, made = [2, 3][: len(args.env_ids)], []
    monkeypatch.setattr(
        policy_distillation, "ScreenMemory", lambda path, *sizes: made.append(sizes)
    )
    if args.stage == "teacher" or args.online:
        net = policy_distillation.make_network(args, num_actions)
        policy_distillation.DeepQLearner(net, args, tmp_path)
    if args.stage == "distill":
        policy_distillation.student_memories(args, tmp_path, num_actions)
    assert made == shapes
    size = sum(
        lanes * (capacity + spare) * (84 * 84 + 1 + 4 * width)
        for lanes, capacity, spare, width in shapes
    )
    policy_distillation.check_memory(args, num_actions)
    assert f"take up to {size / 1e9:.2f} GB" in capsys.readouterr().out


def test_math_demonstrations_explore_with_epsilon_and_keep_the_teachers_q(tmp_path):
    teacher = hand_made_teacher(2)
    games = [Game(SIDE, False, seed) for seed in range(20)]
    wrong, kept = [], []
    args = Args(teacher_epsilon=0.05)

    def write(t, s, ages, q):
        kept.append(t)
        assert not q.requires_grad and torch.equal(q, teacher(s).detach())
        assert ages == [t % 10] * 20  # ten steps a game
        wrong.append(
            sum(a.side != b for a, b in zip((g.env.unwrapped for g in games), q.argmax(1)))
        )

    returns = policy_distillation.demonstrate(games, teacher, write, range(100), 0, args)
    assert kept == list(range(100)) and sum(wrong) == 0
    assert len(returns) == 200  # an exploring action is one of both: 2.5 % go wrong
    assert 10 - np.mean(returns) == pytest.approx(0.25, abs=0.1)
    assert len({game.state[0] for game in games}) == 20
    assert all(p.grad is None for p in teacher.parameters())
    args.teacher_epsilon, times = 0.0, range(100, 110)
    greedy = policy_distillation.demonstrate(games, teacher, write, times, 0, args)
    assert greedy == [10] * 20


def collect_here(
    monkeypatch, rank: int, given: tuple, states: list | None, rounds: int, wanted: int
) -> list:
    """What a collector puts on its log, run in this process from one round to another."""
    alive = iter([True] * (wanted - rounds) + [False])
    main_process, said = SimpleNamespace(is_alive=lambda: next(alive)), []
    monkeypatch.setattr(policy_distillation.mp, "parent_process", lambda: main_process)
    monkeypatch.setattr(policy_distillation.signal, "signal", lambda *_: None)
    shared = SimpleNamespace(value=wanted), SimpleNamespace(put=said.append)
    policy_distillation.collector(rank, *given, states, rounds, *shared)
    return said


def test_math_collectors_fill_their_lanes_round_after_round_with_play_of_their_own(
    tmp_path, monkeypatch
):
    """Two rounds of two collectors, two games of each kind; then a third process goes on."""
    args, calls = tiny(tmp_path, env_ids=(SIDE, THIRD)), []
    teachers = [SimpleNamespace(num_actions=[A]) for A in (2, 3)]
    given = args, tmp_path / "memory", teachers

    def demonstrate(games, teacher, write, times, seed, args):
        g = teachers.index(teacher)
        calls.append(([game.state for game in games], seed))
        for t in times:
            write(t, torch.zeros(2, 84, 84, 4), [0, 0], torch.full((2, g + 2), 1.0 * len(calls)))
        assert {game.env.action_space.n for game in games} == {g + 2}
        return [float(len(calls))]

    monkeypatch.setattr(policy_distillation, "demonstrate", demonstrate)
    said = [line for rank in (0, 1) for line in collect_here(monkeypatch, rank, given, None, 0, 2)]
    assert [(rank, returns) for rank, _, returns in said] == [
        (0, [[1], [2]]), (0, [[3], [4]]), (1, [[5], [6]]), (1, [[7], [8]])
    ]  # fmt: skip
    assert [states for _, states, _ in said[::2]] == [
        [calls[i][0], calls[i + 1][0]] for i in (0, 4)
    ]
    seeds = [seed for _, seed in calls]
    assert len(set(seeds)) == 8  # no exploration twice
    begun = [[seed for seed, _ in states] for states, _ in calls]
    assert len({*begun[0], *begun[4]}) == 4  # and no game
    for g in (0, 1):
        memory = policy_distillation.student_memories(args, tmp_path / "memory", [2, 3])[g]
        played = [[4 * rank + 2 * turn + g + 1 for turn in (0, 1)] for rank in (0, 0, 1, 1)]
        expected = torch.tensor(played).repeat_interleave(30, 1)  # 240 / 8 steps of a lane
        assert torch.equal(memory.values[:, :60, 0], expected.float())

    calls.clear()
    states = [[[(10 * rank + g, [0]), (10 * rank + g, [1, 0])] for g in (0, 1)] for rank in (0, 1)]
    collect_here(monkeypatch, 1, given, states, 1, 2)
    assert [states for states, _ in calls] == states[1] and [seed for _, seed in calls] == seeds[6:]


def test_math_a_round_of_play_is_that_of_all_collectors(monkeypatch):
    """Whoever is ready first, the states are in the order of the ranks."""
    args, clock = tiny(Path(), env_ids=("a", "b")), iter([10.0, 12.0])
    said = [(1, ["of 1"], [[4.0], []]), (0, ["of 0"], [[1.0, 2.0], [5.0]])]
    log = SimpleNamespace(empty=lambda: not said, get=lambda: said.pop(0))
    collectors, wanted = SimpleNamespace(join=lambda timeout: None), SimpleNamespace(value=3)
    perf_counter = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(policy_distillation, "time", perf_counter)
    states, metrics = policy_distillation.collect(collectors, args, wanted, log)
    assert wanted.value == 4 and states == [["of 0"], ["of 1"]]
    returns = {"charts/teacher_return/a": 7 / 3, "charts/teacher_return/b": 5}
    assert metrics == returns | {"charts/SPS": 240 / 2}


def test_math_a_dqn_trains_on_lives_and_all_others_play_whole_games(tmp_path, monkeypatch):
    """A lost life ends an episode in training alone: scores are those of whole games."""
    made, make_env = [], policy_distillation.make_env

    def note(env_id, training=True):
        made.append(training)
        return make_env(env_id, training)

    monkeypatch.setattr(policy_distillation, "make_env", note)
    args, teacher = tiny_dqn(tmp_path, env_ids=(SIDE,)), hand_made_teacher(2)
    learner = policy_distillation.DeepQLearner(teacher, args, tmp_path / "memory")
    learner.load_state_dict(learner.state_dict())
    assert made == [True, True]
    policy_distillation.evaluate(teacher, SIDE, args)
    given = tiny(tmp_path, env_ids=(SIDE,)), tmp_path / "memory", [teacher]
    collect_here(monkeypatch, 0, given, None, 0, 0)
    assert made[2:] == [False] * (args.eval_episodes + 2)


# ---- Evaluation ---------------------------------------------------------------------------------


def test_math_evaluation_is_the_same_for_all_and_leaves_the_random_numbers_alone(monkeypatch):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    args = Args(env_ids=(SIDE,), eval_episodes=30)
    begun = []
    begin = Game.begin
    monkeypatch.setattr(Game, "begin", lambda game, seed: (begun.append(seed), begin(game, seed)))
    teacher = hand_made_teacher(2)
    score = policy_distillation.evaluate(teacher, SIDE, args)["episodic_return"]
    net = lambda s, game: teacher(s) if game == 0 else None  # noqa: E731
    metrics = policy_distillation.evaluate_games(net, [], args, {})
    assert metrics["eval/episodic_return"] == score and metrics["eval/episodic_length"] == 10
    assert 9.5 < score < 10  # 5 % exploration
    assert begun[:30] == begun[30:] and len(set(begun)) == 30
    blind = dataclasses.replace(args, eval_epsilon=1.0)
    found = policy_distillation.evaluate(teacher, SIDE, blind)
    assert 4 < found["episodic_return"] < 6 and 1.1 < found["episodic_return_std"] < 2  # 1.58
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


def scored(student: dict[str, float], teachers: list[float]) -> dict[str, float]:
    """What evaluate_games tells of networks with these scores in the games a and b."""

    def evaluate(Q, env_id, given):
        assert given == args  # one protocol for all
        return {"episodic_return": Q if isinstance(Q, float) else student[env_id]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_distillation, "evaluate", evaluate)
        args = Args(env_ids=("a", "b"))
        return policy_distillation.evaluate_games(lambda s, game: None, teachers, args, {})


def test_math_ratios_and_their_geometric_mean(capsys):
    metrics = scored({"a": 6.0, "b": 30.0}, [4.0, 10.0])
    assert metrics["eval/episodic_return/a"] == 6 and metrics["eval/episodic_return/b"] == 30
    assert metrics["eval/percent_of_teacher/a"] == 150 and metrics["eval/teacher_return/b"] == 10
    assert metrics["eval/percent_of_teacher/b"] == 300
    assert metrics["eval/geometric_mean"] == pytest.approx(100 * math.sqrt(1.5 * 3))
    alone = scored({"a": 6.0, "b": -30.0}, [])
    assert alone == {"eval/episodic_return/a": 6, "eval/episodic_return/b": -30}
    assert capsys.readouterr().out == ""
    paper = [87.1, 105.6, 142.5, 103.5, 102.5, 100.6, 129.6, 109.3, 142.7, 78.6]  # table B1, net1
    assert policy_distillation.geometric_mean(paper) == pytest.approx(108.3, abs=0.05)


@pytest.mark.parametrize(
    ("student", "teacher", "percent"), [(-2.0, 4.0, -50.0), (0.0, 4.0, 0.0), (-9.0, -3.0, None)]
)
def test_math_no_geometric_mean_of_scores_that_are_not_above_0(student, teacher, percent, capsys):
    metrics = scored({"a": student, "b": 30.0}, [teacher, 10.0])
    assert "eval/geometric_mean" not in metrics
    assert metrics.get("eval/percent_of_teacher/a") == percent
    assert metrics["eval/percent_of_teacher/b"] == 300
    told = capsys.readouterr().out
    assert "No geometric mean" in told and f"a (student {student:.4g}, teacher" in told


def test_math_films_show_the_teacher_left_and_the_student_right(tmp_path, monkeypatch):
    """Of each game; the one that is over first shows its last picture."""
    teachers, args = [lambda s: 10, lambda s: 20], Args(env_ids=("a", "b:c"))

    def evaluate(Q, env_id, given, pictures):
        assert given == dataclasses.replace(args, eval_episodes=1)
        shade = Q(None)
        for i in range(3 if shade in (10, 140) else 2):
            pictures.append(np.full((84, 84), shade + i, np.uint8))

    monkeypatch.setattr(policy_distillation, "evaluate", evaluate)
    student = lambda s, game=0: 130 + 10 * game  # noqa: E731
    policy_distillation.film_games(student, teachers, args, tmp_path)
    for name, shown in (
        ("a", [(10, 130), (11, 131), (12, 131)]),
        ("b-c", [(20, 140), (21, 141), (21, 142)]),
    ):
        with Image.open(tmp_path / f"{name}.gif") as film:
            frames = [frame.convert("L") for frame in ImageSequence.Iterator(film)]
        assert frames[0].size == (168, 84)
        assert [(f.getpixel((83, 83)), f.getpixel((84, 0))) for f in frames] == shown


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_math_pictures_show_the_policies_of_teacher_and_student(loss, tmp_path, monkeypatch):
    """The temperature is the teacher's alone, unless the student tells Q-values, too."""
    args = Args(env_ids=("a", "b"), loss=loss, temperature=0.5)
    q = torch.tensor([0.3, 0.1]), torch.tensor([0.2, 0.4, 0.7])
    S = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.0, 2.0])
    memories = [ScreenMemory(tmp_path / f"{g}", 1, 5, 0, len(q[g])) for g in (0, 1)]
    for memory, values in zip(memories, q):
        memory.values[:, :4] = values
        memory.screens[:, :4] = torch.arange(4)[:, None, None]
    bars, bar, screens = [], Axes.bar, []

    def note(axes, x, heights, *size, label):
        bars.append((label, heights.tolist()))
        return bar(axes, x, heights, *size, label=label)

    def sample(memory, size, end):
        return torch.zeros(size).long(), torch.arange(end - size, end)

    monkeypatch.setattr(ScreenMemory, "sample", sample)
    monkeypatch.setattr(Axes, "bar", note)
    monkeypatch.setattr(Axes, "imshow", lambda axes, screen, cmap: screens.append(screen.mean()))
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    student = lambda s, game=0: S[game].expand(len(s), -1)  # noqa: E731
    policy_distillation.draw_policies(student, memories, args, 4, tmp_path / "policies.png")
    assert screens == [1, 2, 3] * 2
    scale = 2 if loss == "mse" else 1
    for g, shown in enumerate((bars[:6], bars[6:])):
        assert [who for who, _ in shown] == ["teacher", "student"] * 3
        for who, heights in shown:
            logits = 2 * q[g] if who == "teacher" else scale * S[g]
            assert heights == pytest.approx(Categorical(logits=logits).probs.tolist())


def test_math_evaluation_waits_for_every_game_that_it_began(monkeypatch):
    """The n-th game lasts n steps and scores n: long ones count as much as short ones."""
    begun = []

    class Lasting:
        s = np.zeros((84, 84, 4), np.uint8)

        def __init__(self, *_):
            begun.append(self)
            self.begin(0)
            self.n = len(begun)

        def begin(self, seed):
            self.t = 0

        def step(self, a):
            self.t += 1
            over = self.t == self.n
            return 0.0, over, False, {"episode": {"r": self.n, "l": 4 * self.n}} if over else {}

    monkeypatch.setattr(policy_distillation, "Game", Lasting)
    args, Q = Args(eval_episodes=4), lambda s: torch.zeros(len(s), 2)
    found = policy_distillation.evaluate(Q, "a", args)
    assert len(begun) == 4
    expected = {"episodic_return": 2.5, "episodic_return_std": math.sqrt(1.25)}
    assert found == pytest.approx(expected | {"episodic_length": 10})


def test_math_no_percent_of_a_teacher_that_scores_0():
    """As of Freeway, before the first crossing."""
    metrics = scored({"a": 3.0, "b": 30.0}, [0.0, 10.0])
    assert "eval/percent_of_teacher/a" not in metrics and "eval/geometric_mean" not in metrics
    assert metrics["eval/percent_of_teacher/b"] == 300


# ---- Runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "nll", "mse"])
def test_learns_each_loss_from_memory(loss, tmp_path):
    """Without processes: a memory of the hand-made teacher's, then updates."""
    torch.manual_seed(0)
    args = tiny(tmp_path, env_ids=(SIDE,), loss=loss, round_updates=60)
    memory = ScreenMemory(tmp_path / "memory", lanes=4, capacity=30, spare=0, width=2)
    games = [Game(SIDE, False, seed) for seed in range(4)]
    write = lambda *step: memory.write(slice(0, 4), *step)  # noqa: E731
    teacher = hand_made_teacher(2)
    policy_distillation.demonstrate(games, teacher, write, range(30), 0, args)
    net = GameNetwork(WIDTHS["net3"], [2])
    optimizer = policy_distillation.make_optimizer(net, args)
    policy_distillation.learn_from_memories(updates_of(net, optimizer, args), [memory], args, 30)
    metrics = policy_distillation.learn_from_memories(
        updates_of(net, optimizer, args), [memory], args, 30
    )
    assert metrics["charts/agreement"] > 0.97 and metrics[f"losses/{loss}"] < 0.1
    if loss == "mse":  # Q-values themselves
        lane, t = memory.sample(50, 30)
        S = net(memory.stacks(lane, t))
        torch.testing.assert_close(S, memory.values_at(lane, t), atol=0.25, rtol=0)


def test_math_a_rounds_updates_are_minibatches_of_games_drawn_at_random(tmp_path, monkeypatch):
    torch.manual_seed(0)
    args = tiny(tmp_path, env_ids=(SIDE, THIRD), batch_size=5, round_updates=400)
    memories = policy_distillation.student_memories(args, tmp_path / "memory", [2, 3])
    memories[1].values[..., 1] = 1  # the second teacher takes the second action, no student does
    drawn, asked, updates = [], [], []

    def sample(memory, size, end):
        drawn.append((memories.index(memory), size, end))
        return torch.zeros(size).long(), torch.zeros(size).long()

    def student(s, game=0, bfloat16=False):
        asked.append((game, len(s), 7))
        return torch.zeros(len(s), [2, 3][game])

    monkeypatch.setattr(ScreenMemory, "sample", sample)
    monkeypatch.setattr(policy_distillation, "update", lambda *step: updates.append(step))
    metrics = policy_distillation.learn_from_memories(
        updates_of(student, None, args), memories, args, 7
    )
    assert [metrics[f"charts/agreement/{env_id}"] for env_id in (SIDE, THIRD)] == [1, 0]
    games = [game for game, *_ in drawn]
    assert asked == drawn == [(game, 5, 7) for game in games] and len(updates) == 400
    assert np.mean(games) == pytest.approx(0.5, abs=0.1)
    again = np.equal(games[1:], games[:-1])  # not in turns
    assert np.mean(again) == pytest.approx(0.5, abs=0.1)


def test_math_reports_reach_tensorboard_and_metrics_csv(tmp_path, capsys):
    shown = []
    writer = SimpleNamespace(log_dir=str(tmp_path), add_scalar=lambda *point: shown.append(point))
    for step in (3, 5):
        policy_distillation.report(writer, step, {"losses/kl": 0.5 * step, "charts/UPS": 2.0})
    points = [(tag, x, n) for n in (3, 5) for tag, x in (("losses/kl", n / 2), ("charts/UPS", 2))]
    assert shown == points
    assert reported(tmp_path) == {"losses/kl": {3: 1.5, 5: 2.5}, "charts/UPS": {3: 2, 5: 2}}
    assert "losses/kl 2.5  charts/UPS 2" in capsys.readouterr().out


def command(folder: Path, *flags: str) -> subprocess.Popen:
    line = [sys.executable, str(ROOT / "policy_distillation.py"), "--num-collectors", "1", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=folder, env=environment, start_new_session=True, **pipes)


def test_command_line_a_student_matches_a_hand_made_teacher(tmp_path):
    """One game, from the shell; then --evaluate agrees, here and in protocol."""
    teacher = teacher_file(tmp_path / "side.pt", SIDE, 2)
    flags = "--student net3 --optimizer adam --learning-rate 1e-3 --envs-per-collector 4"
    flags += " --memory-steps 480 --round-steps 240 --round-updates 60 --total-rounds 2"
    run = command(tmp_path, "--teachers", teacher, *flags.split(), "--eval-episodes", "10")
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert "leaked" not in errors
    assert "The replays take up to 0.00 GB of" in out
    assert "The student has 60,914 parameters, 3.6 % of a teacher's." in out
    metrics = ast.literal_eval(out.splitlines()[-1])
    assert metrics["eval/percent_of_teacher"] > 97 and metrics["eval/geometric_mean"] > 97
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("toy_games-Side-v0_distill__policy_distillation__1__")
    files = {path.name for path in run_dir.iterdir()}
    assert {"checkpoint.pt", "metrics.csv", "policies.png", "memory"} <= files
    assert "eval/geometric_mean" in (run_dir / "metrics.csv").read_text()

    path = str(run_dir / "checkpoint.pt")
    args = tiny(tmp_path, teachers=(teacher,), evaluate=path, run_dir="", eval_episodes=10)
    evaluated = policy_distillation.main(args)
    assert evaluated == {tag: metrics[tag] for tag in evaluated}
    assert "eval/teacher_return" in evaluated


def test_learns_two_games_of_hand_made_teachers(tmp_path):
    """Two and three actions; two collectors."""
    games = (SIDE, 2), (THIRD, 3)
    files = [teacher_file(tmp_path / f"{A}.pt", env_id, A) for env_id, A in games]
    args = tiny(tmp_path, teachers=tuple(files), capture_video=True, round_updates=100)
    metrics = policy_distillation.main(args)
    assert metrics["eval/geometric_mean"] > 97
    assert multiprocessing.active_children() == []
    run_dir = tmp_path / "run"
    checkpoint, numbers = torch.load(run_dir / "checkpoint.pt"), reported(run_dir)
    for g, (env_id, A) in enumerate(games):
        assert metrics[f"eval/percent_of_teacher/{env_id}"] > 97
        played = numbers[f"charts/teacher_return/{env_id}"]  # the teacher's, while it collects
        assert played.keys() == {0, 100} and min(played.values()) > 9
        with Image.open(run_dir / f"{env_id.replace(':', '-')}.gif") as film:
            assert film.size == (168, 84) and film.n_frames > 1  # side by side
        for name, x in hand_made_teacher(A).state_dict().items():  # never trained
            assert torch.equal(x, checkpoint["teachers"][f"{g}.{name}"])
        memory = ScreenMemory(run_dir / "memory" / f"teacher_{g}", 4, 120, 0, A)
        lane, t = memory.sample(50, 2 * 240 // 8)
        assert set(lane.tolist()) == {0, 1, 2, 3}
        q = hand_made_teacher(A)(memory.stacks(lane, t)).detach()
        torch.testing.assert_close(q, memory.values_at(lane, t))


def note_checkpoints(monkeypatch, folder: Path) -> list[Path]:
    """Copies of all checkpoints that a run writes from here on."""
    save, copies = policy_distillation.save_checkpoint, []

    def save_and_copy(path, **state):
        save(path, **state)
        copies.append(folder / f"copy_{len(copies)}.pt")
        shutil.copy(path, copies[-1])

    monkeypatch.setattr(policy_distillation, "save_checkpoint", save_and_copy)
    return copies


def without_collectors(monkeypatch) -> None:
    """Rounds in which nobody plays for the student: the memories stay as they are."""

    @contextmanager
    def nobody(*_):
        yield

    monkeypatch.setattr(policy_distillation, "collectors_at_work", nobody)
    monkeypatch.setattr(policy_distillation, "collect", lambda *_: (None, {}))


def assert_same_state(path: Path, other: Path) -> None:
    """Two checkpoints that differ in the time and the flag --resume alone."""
    first, second = (torch.load(p) for p in (path, other))
    for state in (first, second):
        state.pop("seconds"), state.pop("args")
    assert same(first, second)


def test_learns_on_bit_for_bit_after_each_half_of_a_round(tmp_path, monkeypatch):
    """The ring wraps in the second round, which a run killed after any checkpoint repeats."""
    teacher = teacher_file(tmp_path / "a.pt", SIDE, 2)
    args = tiny(tmp_path, teachers=(teacher,), num_collectors=1, memory_steps=300, round_updates=4)
    args = dataclasses.replace(args, eval_episodes=1)
    args = dataclasses.replace(args, optimizer="rmsprop", learning_rate=2.5e-4)
    copies = note_checkpoints(monkeypatch, tmp_path)
    policy_distillation.main(args)
    states = [torch.load(path) for path in copies]
    assert [state["halves"] for state in states] == [1, 2, 3, 4]
    assert not same(states[0]["net"], states[1]["net"])
    assert same(states[1]["net"], states[2]["net"])
    path, numbers = tmp_path / "run" / "checkpoint.pt", reported(tmp_path / "run")
    assert numbers["charts/SPS"].keys() == {0, 4} and numbers["charts/UPS"].keys() == {4, 8}
    assert numbers["charts/learning_rate"] == dict.fromkeys((4, 8), args.learning_rate)
    for again in (2, 1):  # between collection and training, and before the collection
        shutil.copy(copies[again], path)
        policy_distillation.main(dataclasses.replace(args, run_dir="", resume=str(path)))
        assert_same_state(path, copies[3])
    with pytest.raises(SystemExit, match=r"has had 2 rounds: .*raise --total-rounds"):
        policy_distillation.main(dataclasses.replace(args, run_dir="", resume=str(path)))


def test_learns_on_bit_for_bit_with_dqn(tmp_path, monkeypatch):
    """Multi-DQN; the ring wraps, and what a killed run wrote after its checkpoint does no harm."""
    args = tiny_dqn(tmp_path, env_ids=(SIDE, THIRD), report_every=80, total_timesteps=240)
    copies = note_checkpoints(monkeypatch, tmp_path)
    policy_distillation.main(args)
    assert [torch.load(path)["steps"] for path in copies] == [80, 160, 240]
    path = tmp_path / "run" / "checkpoint.pt"
    for again in (0, 1):
        shutil.copy(copies[again], path)
        policy_distillation.main(dataclasses.replace(args, run_dir="", resume=str(path)))
        assert_same_state(path, copies[2])


def test_learns_on_bit_for_bit_with_an_online_dqn(tmp_path, monkeypatch):
    """Its games, its replay, its high score and the teacher that had it go on, too."""
    without_collectors(monkeypatch)
    monkeypatch.setattr(policy_distillation, "draw_policies", lambda *_: None)
    flags = {"round_steps": 50, "memory_steps": 100, "round_updates": 2, "eval_episodes": 2}
    flags |= {"learning_starts": 10, "dqn_memory_steps": 40, "steps_per_update": 10}
    args = tiny(tmp_path, env_ids=(SIDE,), online=True, target_period=30, batch_size=4, **flags)
    copies = note_checkpoints(monkeypatch, tmp_path)
    policy_distillation.main(args)
    path = tmp_path / "run" / "checkpoint.pt"
    for again in (2, 1):
        shutil.copy(copies[again], path)
        policy_distillation.main(dataclasses.replace(args, run_dir="", resume=str(path)))
        assert_same_state(path, copies[3])


def test_learns_from_all_rounds_so_far_and_is_evaluated_when_due(tmp_path, monkeypatch):
    """Every second round and the last; then --resume makes the run longer."""
    without_collectors(monkeypatch)
    ends, teacher = [], teacher_file(tmp_path / "a.pt", SIDE, 2)

    def learn(update, memories, args, end):
        ends.append(end)
        return {}

    def evaluate_games(*_):
        return {"eval/rounds": float(len(ends))}

    def draw_policies(net, memories, args, end, path):
        assert end == ends[-1] and path == tmp_path / "run" / "policies.png"

    for role in (learn, evaluate_games, draw_policies):
        name = "learn_from_memories" if role is learn else role.__name__
        monkeypatch.setattr(policy_distillation, name, role)
    args = tiny(tmp_path, teachers=(teacher,), eval_every=2, total_rounds=3)
    policy_distillation.main(args)
    assert ends == [60, 120, 180]  # of each lane; 30 updates
    assert reported(tmp_path / "run")["eval/rounds"] == {60: 2, 90: 3}
    path = str(tmp_path / "run" / "checkpoint.pt")
    policy_distillation.main(dataclasses.replace(args, run_dir="", resume=path, total_rounds=5))
    assert ends[3:] == [240, 300]
    assert reported(tmp_path / "run")["eval/rounds"] == {60: 2, 90: 3, 120: 4, 150: 5}


@pytest.mark.parametrize(("online", "times"), [(False, 1), (True, 3)])
def test_learns_with_a_teacher_evaluated_anew_only_if_it_changes(
    online, times, tmp_path, monkeypatch
):
    without_collectors(monkeypatch)
    of_student, evaluated = [], []

    def evaluate(Q, env_id, args, pictures=None):
        (of_student if isinstance(Q, partial) else evaluated).append(env_id)
        return {"episodic_return": 1.0}

    monkeypatch.setattr(policy_distillation, "evaluate", evaluate)
    for name in ("learn_from_memories", "draw_policies", "renew_teacher"):
        monkeypatch.setattr(policy_distillation, name, lambda *_: {})
    given = {"env_ids": (SIDE,), "online": True, "learning_starts": 20}
    if not online:
        given = {"teachers": (teacher_file(tmp_path / "a.pt", SIDE, 2),)}
    policy_distillation.main(tiny(tmp_path, **given, eval_every=1, total_rounds=3))
    assert len(of_student) == 3 and len(evaluated) == times
    assert reported(tmp_path / "run")["eval/percent_of_teacher"] == {30: 100, 60: 100, 90: 100}


def test_learns_on_with_the_minutes_it_had_after_sigterm(tmp_path, monkeypatch):
    def train_teacher(net, args, folder, checkpoint):
        steps = 100 + checkpoint.get("steps", 0)
        yield steps, False, {}, {"net": net.state_dict(), "steps": steps}
        if not checkpoint:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(policy_distillation, "train_teacher", train_teacher)
    args, path = tiny_dqn(tmp_path), tmp_path / "run" / "checkpoint.pt"
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not heeded"))
    try:
        with pytest.raises(SystemExit, match=r"^Stopped; go on with .* --resume .*checkpoint\.pt$"):
            policy_distillation.main(args)
        checkpoint = torch.load(path)
        assert checkpoint["steps"] == 100 and 0 < checkpoint["seconds"] < 60
        policy_distillation.save_checkpoint(path, **checkpoint | {"seconds": 6000.0})
        resumed = dataclasses.replace(args, run_dir="", resume=str(path))
        assert 100 < policy_distillation.main(resumed)["charts/minutes"] < 101
        assert 6000 < torch.load(path)["seconds"] < 6060
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("rounds", "way"),
    [(1, "evaluate with --evaluate"), (2, "go on with the same flags and --resume")],
)
def test_bad_input_ctrl_c_in_an_evaluation_tells_whether_training_is_over(
    rounds, way, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    without_collectors(monkeypatch)
    monkeypatch.setattr(policy_distillation, "learn_from_memories", lambda *_: {})
    monkeypatch.setattr(policy_distillation, "evaluate_games", interrupted)
    teacher = teacher_file(tmp_path / "a.pt", SIDE, 2)
    args = tiny(tmp_path, teachers=(teacher,), eval_every=1, total_rounds=rounds)
    with pytest.raises(SystemExit, match=rf"^Stopped; {way} .*checkpoint\.pt$"):
        policy_distillation.main(args)


def test_learns_from_the_networks_of_its_seed(tmp_path, monkeypatch):
    """A student, and the DQN beside which it learns."""
    begun = []

    def run_stage(net, teachers, args, checkpoint):
        begun.append((dict(net.state_dict()), dict(teachers.state_dict())))
        return {}

    monkeypatch.setattr(policy_distillation, "run_stage", run_stage)
    for seed in (1, 1, 2):
        flags = {"online": True, "learning_starts": 20, "seed": seed}
        policy_distillation.main(tiny(tmp_path, env_ids=(SIDE,), **flags))
    assert same(begun[0], begun[1])
    assert not any(same(one, other) for one, other in zip(begun[0], begun[2]))


def test_learns_nothing_with_evaluate_which_shows_what_the_checkpoint_holds(tmp_path, monkeypatch):
    """An online teacher stands nowhere else."""
    path, shown = tmp_path / "elsewhere" / "checkpoint.pt", []
    args = tiny(tmp_path, env_ids=(SIDE,), online=True, capture_video=True, run_dir="")
    net, teachers = GameNetwork(WIDTHS["net3"], [2]), torch.nn.ModuleList([hand_made_teacher(2)])
    given = {"args": dataclasses.asdict(args), "teachers": teachers.state_dict()}
    path.parent.mkdir()
    policy_distillation.save_checkpoint(path, net=net.state_dict(), **given)

    def note(net, teachers, args, other):
        shown.append((dict(net.state_dict()), dict(teachers.state_dict()), other))
        return {"eval/of": 1.0}

    for name in ("evaluate_games", "film_games"):
        monkeypatch.setattr(policy_distillation, name, note)
    metrics = policy_distillation.main(dataclasses.replace(args, evaluate=str(path)))
    assert metrics == {"eval/of": 1} and [other for *_, other in shown] == [path.parent, {}]
    for ours, theirs, _ in shown:
        assert same(ours, dict(net.state_dict())) and same(theirs, dict(teachers.state_dict()))
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def test_bad_input_a_student_is_not_compared_with_other_teachers(tmp_path):
    args = tiny(tmp_path, teachers=(teacher_file(tmp_path / "a.pt", SIDE, 2),), run_dir="")
    given = {"args": dataclasses.asdict(args) | {"env_ids": (SIDE,)}}
    other = torch.nn.ModuleList([GameNetwork(WIDTHS["same"], [2])])
    net, path = GameNetwork(WIDTHS["net3"], [2]).state_dict(), tmp_path / "student.pt"
    policy_distillation.save_checkpoint(path, net=net, teachers=other.state_dict(), **given)
    with pytest.raises(SystemExit, match=r"student.pt was made with other --teachers than .*a.pt"):
        policy_distillation.main(dataclasses.replace(args, evaluate=str(path)))


def test_learns_the_toy_game_as_a_teacher_and_serves_as_one(tmp_path):
    args = tiny_dqn(tmp_path, optimizer="adam", learning_rate=1e-3, total_timesteps=600)
    args = dataclasses.replace(args, dqn_memory_steps=600, batch_size=8, discount=0.0)
    args = dataclasses.replace(args, epsilon_timesteps=400, eval_episodes=10, capture_video=True)
    metrics = policy_distillation.main(args)
    assert metrics["eval/episodic_return"] > 9
    path = str(tmp_path / "run" / "checkpoint.pt")
    evaluated = policy_distillation.main(dataclasses.replace(args, evaluate=path, run_dir=""))
    assert evaluated == {tag: metrics[tag] for tag in evaluated}
    env_id, net = policy_distillation.load_teacher(path)
    assert env_id == SIDE and same(dict(net.state_dict()), dict(torch.load(path)["net"]))
    with pytest.raises(SystemExit, match=r"has had 600 timesteps: .*raise --total-timesteps"):
        policy_distillation.main(dataclasses.replace(args, resume=path, run_dir=""))
    with Image.open(tmp_path / "run" / "toy_games-Side-v0.gif") as film:
        assert film.size == (84, 84)


def test_learns_online_from_the_best_so_far(tmp_path, monkeypatch):
    """High scores 1, then not, then 2: the student's teacher changes in rounds 1 and 3 alone.

    Which is the best is found with other seeds than those that compare it with the student.
    """
    flags = {"round_updates": 5, "memory_steps": 300, "round_steps": 100, "num_collectors": 1}
    flags |= {"learning_starts": 20, "dqn_memory_steps": 200, "steps_per_update": 10}
    args = tiny(tmp_path, env_ids=(SIDE,), online=True, total_rounds=3, **flags)
    scores, asked, seeds = iter([1.0, 0.5, 2.0]), [], []

    def evaluate(Q, env_id, args):
        seeds.append(args.seed)
        if len(seeds) > 3:  # at the end: student, teacher
            return {"episodic_return": 3.0 if len(seeds) == 4 else 4.0}
        asked.append(copy.deepcopy(Q.state_dict()))
        return {"episodic_return": next(scores)}

    monkeypatch.setattr(policy_distillation, "evaluate", evaluate)
    copies = note_checkpoints(monkeypatch, tmp_path)
    metrics = policy_distillation.main(args)
    assert len(set(seeds[:3])) == 1 and seeds[3:] == [1, 1] and 1 not in seeds[:3]
    assert metrics["eval/teacher_return"] == 4 and metrics["eval/percent_of_teacher"] == 75
    assert [*reported(tmp_path / "run")["eval/learner_return"].values()] == [1, 0.5, 2]
    assert not any(same(dict(asked[i]), dict(asked[i + 1])) for i in (0, 1))
    played = [torch.load(path) for path in copies[::2]]
    for state, learner, teacher in zip(played, asked, (asked[0], asked[0], asked[2]), strict=True):
        assert same(dict(state["learner"]["net"]), dict(learner))
        theirs = {name.removeprefix("0."): x for name, x in state["teachers"].items()}
        assert same(theirs, dict(teacher))
    assert [state["learner"]["steps"] for state in played] == [100, 200, 300]
    memory = ScreenMemory(tmp_path / "run" / "memory" / "teacher_0", 2, 150, 0, 2)
    for t, teacher in ((range(100), asked[0]), (range(100, 150), asked[2])):  # who played when
        net, t = GameNetwork(WIDTHS["same"], [2]), torch.tensor(t)
        net.load_state_dict(teacher)
        q = net(memory.stacks(torch.zeros_like(t), t)).detach()
        torch.testing.assert_close(q, memory.values_at(torch.zeros_like(t), t))

    net = GameNetwork(WIDTHS["same"], [2])
    again = policy_distillation.DeepQLearner(net, args, tmp_path / "run" / "memory")
    again.load_state_dict(played[1]["learner"])
    assert again.high_score == 1


def test_math_an_equal_score_does_not_replace_an_online_teacher(monkeypatch):
    net, teacher = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    learner = SimpleNamespace(net=net, high_score=-math.inf, learn=lambda steps: {})
    scores = iter([-21.0, -21.0, -20.0, -20.0])
    evaluate = lambda *_: {"episodic_return": next(scores)}  # noqa: E731
    monkeypatch.setattr(policy_distillation, "evaluate", evaluate)
    for n, best in enumerate((0, 0, 2, 2)):
        torch.nn.init.constant_(net.weight, n)
        policy_distillation.renew_teacher(learner, teacher, Args())
        assert teacher.weight.item() == best


def test_learns_multi_dqn_beside_the_teachers_of_its_games(tmp_path):
    files = [teacher_file(tmp_path / f"{A}.pt", i, A) for i, A in ((SIDE, 2), (THIRD, 3))]
    args = tiny_dqn(tmp_path, env_ids=Args.env_ids, teachers=tuple(files), total_timesteps=100)
    metrics = policy_distillation.main(args)
    for env_id in (SIDE, THIRD):
        ours, theirs = (metrics[f"eval/{who}_return/{env_id}"] for who in ("episodic", "teacher"))
        assert metrics[f"eval/percent_of_teacher/{env_id}"] == pytest.approx(100 * ours / theirs)
        assert theirs > 9


def test_learns_from_teachers_in_shared_memory(tmp_path, monkeypatch):
    teacher, found = teacher_file(tmp_path / "a.pt", SIDE, 2), []

    def run_stage(net, teachers, args, checkpoint):
        found.extend(p.is_shared() for p in teachers.parameters())
        return {}

    monkeypatch.setattr(policy_distillation, "run_stage", run_stage)
    online = {"online": True, "env_ids": (SIDE,), "learning_starts": 20}
    for flags in ({"teachers": (teacher,)}, online):
        policy_distillation.main(tiny(tmp_path, **flags))
    assert found == [True] * 20


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_command_line_ctrl_c_ends_the_run_in_order(tmp_path):
    teacher = teacher_file(tmp_path / "a.pt", SIDE, 2)
    flags = ["--teachers", teacher, "--envs-per-collector", "2", "--eval-episodes", "2"]
    flags += ["--memory-steps", "100", "--round-steps", "20", "--round-updates", "2"]
    run = command(tmp_path, *flags, "--run-dir", "run")
    wait_for((tmp_path / "run" / "checkpoint.pt").exists, 200)
    children = processes_of(run)
    assert children
    os.killpg(run.pid, signal.SIGINT)  # to all, as a terminal does
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and "Traceback" not in errors
    assert "Stopped; go on with the same flags and --resume run/checkpoint.pt" in errors
    assert "The student has" in out
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)


@pytest.mark.slow
def test_bad_input_a_collector_that_dies_ends_the_run(tmp_path):
    teacher = teacher_file(tmp_path / "a.pt", "toy_games:Crashing-v0", 2)
    args = tiny(tmp_path, teachers=(teacher,), num_collectors=1, teacher_epsilon=0.0)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError"):
        policy_distillation.main(args)
    assert multiprocessing.active_children() == []


def test_bad_input_a_loss_that_explodes_stops_the_run(tmp_path):
    args = tiny_dqn(tmp_path, learning_rate=1e9, optimizer="adam", total_timesteps=2000)
    with pytest.raises(policy_distillation.Diverged, match=r"of the DQN at step .*--learning-rate"):
        policy_distillation.main(args)
    net, memory = GameNetwork(WIDTHS["net3"], [2]), ScreenMemory(tmp_path / "nan", 1, 4, 0, 2)
    memory.values.fill_(math.nan)
    args, optimizer = tiny(tmp_path), policy_distillation.make_optimizer(net, Args())
    with pytest.raises(policy_distillation.Diverged, match="after 4 steps in each of the games"):
        policy_distillation.learn_from_memories(updates_of(net, optimizer, args), [memory], args, 4)


@pytest.mark.parametrize(("halves", "collected"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_math_a_resumed_run_has_the_rounds_played_that_it_lacks(
    halves, collected, tmp_path, monkeypatch
):
    given = []

    @contextmanager
    def nobody(args, folder, teachers, games, rounds, wanted, log):
        given.append((games, rounds, wanted.value))
        yield

    monkeypatch.setattr(policy_distillation, "collectors_at_work", nobody)
    monkeypatch.setattr(policy_distillation, "collect", lambda *_: ("later", {}))
    for name in ("learn_from_memories", "draw_policies"):
        monkeypatch.setattr(policy_distillation, name, lambda *_: {})
    args, net = tiny(tmp_path, env_ids=(SIDE,)), GameNetwork(WIDTHS["net3"], [2])
    teachers = torch.nn.ModuleList([hand_made_teacher(2)])
    parts = {"net": net, "teachers": teachers}
    parts["optimizer"] = policy_distillation.make_optimizer(net, args)
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"halves": halves, "games": "as they stand"}
    reports = policy_distillation.distill(net, teachers, args, tmp_path / "memory", checkpoint)
    assert [state["halves"] for *_, state in reports] == [*range(halves + 1, 5)]
    assert given == [("as they stand", collected, collected)]


def test_math_another_seed_means_other_games_and_another_exploration(tmp_path, monkeypatch):
    """Of evaluation, collectors and DQN."""
    evaluated, collected, learned, explored = [], [], [], []
    init = Game.__init__

    def note(game, env_id, training, seed, actions=()):
        into.append(seed)
        init(game, env_id, training, seed, actions)

    def demonstrate(games, teacher, write, times, seed, args):
        explored.append(seed)
        return []

    monkeypatch.setattr(Game, "__init__", note)
    monkeypatch.setattr(policy_distillation, "demonstrate", demonstrate)
    for seed in (1, 2):
        args, into = tiny(tmp_path, env_ids=(SIDE,), seed=seed), evaluated
        policy_distillation.evaluate(lambda s: torch.zeros(len(s), 2), SIDE, args)
        into, given = collected, (args, tmp_path / "memory", [hand_made_teacher(2)])
        collect_here(monkeypatch, 0, given, None, 0, 2)
        into, args = learned, tiny_dqn(tmp_path, seed=seed)
        policy_distillation.DeepQLearner(GameNetwork(WIDTHS["net3"], [2]), args, tmp_path / "dqn")
    for seeds, count in ((evaluated, 8), (collected, 4), (explored, 4), (learned, 2)):
        assert len(set(seeds)) == count


def test_math_a_high_score_differs_from_an_evaluation_by_its_seed_alone(monkeypatch):
    args, asked = Args(eval_epsilon=0.2, eval_episodes=7, seed=5), []

    def evaluate(Q, env_id, given):
        asked.append((Q, env_id, given))
        return {"episodic_return": 1.0}

    monkeypatch.setattr(policy_distillation, "evaluate", evaluate)
    net, teacher = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    learner = SimpleNamespace(net=net, high_score=-math.inf, learn=lambda steps: {})
    policy_distillation.renew_teacher(learner, teacher, args)
    assert asked == [(net, args.env_ids[0], dataclasses.replace(args, seed=2**32 - 6))]


# ---- Bad input ----------------------------------------------------------------------------------

DISTILL = {"teachers": ("side.pt",)}
TEACHER = {"stage": "teacher", "env_ids": (SIDE,)}


def test_bad_input_replays_that_are_missing_or_short(tmp_path, monkeypatch):
    args, run_dir = tiny_dqn(tmp_path, eval_episodes=1), tmp_path / "run"
    policy_distillation.main(args)
    args = dataclasses.replace(args, total_timesteps=300, run_dir="")
    args = dataclasses.replace(args, resume=f"{run_dir}/checkpoint.pt")
    begun = []
    monkeypatch.setattr(policy_distillation, "run_stage", lambda *_: begun.append(1) or {})
    policy_distillation.main(args)
    assert begun  # with all files in their places
    file = run_dir / "memory" / "dqn_0.values"
    os.truncate(file, file.stat().st_size - 4)
    for mischief in (lambda: None, file.unlink, lambda: shutil.rmtree(run_dir / "memory")):
        mischief()
        with pytest.raises(SystemExit, match=r"replays in .*memory are missing or not as .* left"):
            policy_distillation.main(args)
    assert len(begun) == 1


@pytest.mark.parametrize(("memory", "disk"), [(1, 4), (4, 1)])
def test_bad_input_replays_that_fit_into_memory_or_disk_alone(memory, disk, monkeypatch):
    """They take 3.82 GB."""
    had = {"SC_PAGE_SIZE": 10**6, "SC_PHYS_PAGES": 1000 * memory}
    monkeypatch.setattr(os, "sysconf", had.get)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk * 10**9))
    with pytest.raises(SystemExit, match=rf" has {memory}\.00 GB and {disk}\.00 GB of disk"):
        policy_distillation.check_memory(Args(), [6])


def test_bad_input_a_folder_that_cannot_be_written_to(tmp_path):
    """On --resume; metrics.csv leads nowhere."""
    args, path = tiny_dqn(tmp_path), tmp_path / "run" / "checkpoint.pt"
    net, given = policy_distillation.make_network(args, [2]), dataclasses.asdict(args)
    path.parent.mkdir()
    policy_distillation.save_checkpoint(path, net=net.state_dict(), args=given, memory={})
    (path.parent / "metrics.csv").symlink_to("/dev/null/metrics.csv")
    with pytest.raises(SystemExit, match="run cannot be written to"):
        policy_distillation.main(dataclasses.replace(args, run_dir="", resume=str(path)))
    assert sorted(path.parent.iterdir()) == [path, path.parent / "metrics.csv"]


def test_bad_input_another_recipe_on_resume_and_what_may_change(tmp_path):
    args = tiny(tmp_path, teachers=(teacher_file(tmp_path / "a.pt", SIDE, 2),), run_dir="")
    given = dataclasses.asdict(dataclasses.replace(args, env_ids=(SIDE,)))
    net, path = GameNetwork(WIDTHS["net3"], [2]).state_dict(), tmp_path / "checkpoint.pt"
    policy_distillation.save_checkpoint(path, net=net, args=given, memory={"teacher_0.ages": 1})
    args = dataclasses.replace(args, resume=str(path))
    other = {"loss": "nll", "temperature": 0.1, "memory_steps": 960, "round_steps": 480}
    other |= {"round_updates": 3, "batch_size": 8, "learning_rate": 1e-4, "seed": 2}
    for name, value in (other | {"optimizer": "rmsprop", "envs_per_collector": 4}).items():
        flag = "--" + name.replace("_", "-")
        with pytest.raises(SystemExit, match=f"made with {flag} .*, not with {flag} {value}"):
            policy_distillation.main(dataclasses.replace(args, **{name: value}))
    may = {"total_rounds": 9, "eval_every": 1, "eval_episodes": 2, "eval_epsilon": 0.01}
    with pytest.raises(SystemExit, match=r"The replays in .* are missing or not"):
        policy_distillation.main(dataclasses.replace(args, **may, capture_video=True))


def test_bad_input_another_recipe_of_the_dqn_on_resume(tmp_path):
    args = tiny(tmp_path, env_ids=(SIDE,), online=True, optimizer="rmsprop", run_dir="")
    args = dataclasses.replace(args, learning_starts=20)
    net, path = GameNetwork(WIDTHS["net3"], [2]).state_dict(), tmp_path / "checkpoint.pt"
    given = {"args": dataclasses.asdict(args), "memory": {"teacher_0.ages": 1}}
    policy_distillation.save_checkpoint(path, net=net, **given)
    args = dataclasses.replace(args, resume=str(path))
    other = {"discount": 0.9, "dqn_memory_steps": 960, "learning_starts": 10, "target_period": 30}
    other |= {"steps_per_update": 5, "final_epsilon": 0.2, "epsilon_timesteps": 100}
    other |= {"eval_episodes": 5, "eval_epsilon": 0.1}  # of a high score
    for name, value in (other | {"max_learning_rate": 0.1, "bfloat16": True}).items():
        flag = "--" + name.replace("_", "-")
        with pytest.raises(SystemExit, match=f"made with {flag} .*, not with {flag} {value}"):
            policy_distillation.main(dataclasses.replace(args, **{name: value}))


@pytest.mark.parametrize("early", ["load_teacher", "make_network", "evaluate_games"])
def test_bad_input_ctrl_c_before_or_without_training_is_a_sentence(early, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    args = tiny(tmp_path, teachers=(teacher_file(tmp_path / "a.pt", SIDE, 2),))
    monkeypatch.setattr(policy_distillation, "load_checkpoint", lambda *_: {})
    monkeypatch.setattr(policy_distillation, early, interrupted)
    with pytest.raises(SystemExit, match=r"^Stopped\.$"):
        policy_distillation.main(dataclasses.replace(args, run_dir="", evaluate="x.pt"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "A student needs either --teachers"),
        (DISTILL | {"online": True}, "A student needs either --teachers.*or --online"),
        (TEACHER | {"online": True}, "--online has no effect with --stage teacher"),
        (TEACHER | {"round_steps": 9}, "--round-steps has no effect with --stage teacher"),
        (TEACHER | {"student": "net1"}, "--student has no effect on a DQN of one game"),
        (TEACHER | {"teachers": ("side.pt",)}, "--env-ids has no effect beside --teachers"),
        (DISTILL | {"report_every": 9}, "--report-every has no effect with --stage distill"),
        (DISTILL | {"discount": 0.5}, "--discount has no effect without --online"),
        (DISTILL | {"max_learning_rate": 1.0}, "--max-learning-rate has no effect with .*adam"),
        (TEACHER | {"env_ids": ("BrekoutNoFrameskip-v4",)}, "No game.*Breakout"),
        (TEACHER | {"env_ids": ("toy_games:Broken-v0",)}, "No game.*Broken-v0: no screen"),
        ({"online": True, "env_ids": (SIDE, THIRD)}, "--online distils a single game"),
        (
            TEACHER | {"env_ids": (SIDE, SIDE)},
            "--env-ids must name each game once, not toy_games:Side-v0, toy",
        ),
        (
            {"teachers": ("side.pt", "side.pt")},
            "--env-ids must name each game once, not toy_games:Side-v0, toy",
        ),
        ({"teachers": ("missing.pt",)}, "missing.pt is missing, damaged or no DQN of one game"),
        ({"teachers": ("damaged.pt",)}, "damaged.pt is missing, damaged or no DQN"),
        ({"teachers": ("student.pt",)}, "student.pt is missing, damaged or no DQN of one game"),
        ({"teachers": ("same.pt",)}, "same.pt is missing, damaged or no DQN of one game"),
        ({"teachers": ("three.pt",)}, "three.pt plays toy_games:Side-v0 with 3 actions.*has 2"),
        (DISTILL | {"temperature": 0.0}, "its limit at 0 is --loss nll"),
        (
            DISTILL | {"temperature": 0.1, "loss": "mse"},
            "--temperature has no effect with --loss mse",
        ),
        (
            DISTILL | {"teacher_epsilon": 1.5},
            "--teacher-epsilon must lie between 0 and 1, not at 1.5",
        ),
        (TEACHER | {"final_epsilon": 1.5}, "--final-epsilon must lie between 0 and 1, not at 1.5"),
        (
            DISTILL | {"optimizer": "rmsprop", "max_learning_rate": 0.0},
            "--max-learning-rate must lie above 1e-30",
        ),
        (DISTILL | {"temperature": 1e-40}, "--temperature must be at least 1e-30"),
        (TEACHER | {"learning_starts": 200}, "200 steps, .* beyond the --learning-starts 200"),
        ({"online": True, "env_ids": ()}, "--env-ids needs at least one game"),
        (DISTILL | {"round_steps": 3}, "--round-steps 3 must give each of 4 games side by side"),
        (DISTILL | {"memory_steps": 100}, "must fit into the --memory-steps 100"),
        (DISTILL | {"memory_steps": 4 * 10**9}, "take up to 28260.00 GB.*lower --memory-steps\\."),
        (TEACHER | {"dqn_memory_steps": 4 * 10**9}, "lower --dqn-memory-steps or --report-every"),
        (DISTILL | {"num_collectors": 0}, "--num-collectors must lie between 1"),
        (DISTILL | {"eval_epsilon": 1.1}, "--eval-epsilon must lie between 0 and 1"),
        (DISTILL | {"run_dir": "used"}, "holds a run already"),
        (DISTILL | {"run_dir": "side.pt/x"}, "cannot be written to.*choose another folder"),
        (DISTILL | {"resume": "student.pt"}, "leave --run-dir out"),
        (DISTILL | {"evaluate": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        (
            DISTILL | {"evaluate": "student.pt", "student": "net1"},
            "made with --student net3, not with --student net1",
        ),
        (
            DISTILL | {"resume": "student.pt", "run_dir": "", "num_collectors": 3},
            "made with --num-collectors 2, not with --num-collectors 3",
        ),
        (
            DISTILL | {"resume": "student.pt", "run_dir": "", "teacher_epsilon": 0.1},
            "made with --teacher-epsilon 0.05, not with --teacher-epsilon 0.1",
        ),
        (DISTILL | {"resume": "student.pt", "run_dir": ""}, "The replays in memory are missing"),
        (
            TEACHER | {"evaluate": "student.pt"},
            "made with --stage distill, not with --stage teacher",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_dqn if flags.get("stage") == "teacher" else tiny
    args = dataclasses.replace(tiny(tmp_path), run_dir="new")
    teacher_file(Path("side.pt"), SIDE, 2)
    teacher_file(Path("three.pt"), SIDE, 3)
    Path("damaged.pt").write_bytes(b"PK\x03\x04 half a file")
    given = dataclasses.asdict(dataclasses.replace(args, env_ids=(SIDE,)))
    for name, size in (("student", "net3"), ("same", "same")):
        net = GameNetwork(WIDTHS[size], [2]).state_dict()
        policy_distillation.save_checkpoint(Path(f"{name}.pt"), net=net, args=given, seconds=0)
    Path("used").mkdir()
    Path("used/checkpoint.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        where = "" if "evaluate" in flags else "new"
        policy_distillation.main(dataclasses.replace(base(tmp_path, run_dir=where), **flags))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_a_round_of_two_games_that_is_too_short_or_too_long(tmp_path):
    """Eight games side by side, four of each kind, whose replays a round may just fill."""
    given = {"env_ids": (SIDE, THIRD), "teachers": ("a.pt", "b.pt")}
    for steps, memory in ((8, 4), (15, 4), (240, 120)):
        fits = tiny(tmp_path, **given, round_steps=steps, memory_steps=memory)
        policy_distillation.check_flags(fits)
    with pytest.raises(SystemExit, match="--round-steps 7 must give each of 8 games side by side"):
        policy_distillation.check_flags(tiny(tmp_path, **given, round_steps=7))
    with pytest.raises(SystemExit, match="among 2 games, must fit into the --memory-steps 119 of"):
        policy_distillation.check_flags(tiny(tmp_path, **given, memory_steps=119))
