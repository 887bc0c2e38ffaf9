"""a3c_maze.py against the bugs that public ports of its paper have had, and those of its task.

Caught here: a portal that hands out its reward twice, or sets the agent down in another maze; an
apple that can be eaten twice or grows elsewhere; walls of another maze in the view; an LSTM state
that an episode inherits or that the bootstrap advances; clipped rewards; a segment that crosses
into the next episode; gradients that pile up; the same maze in every episode.
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
from PIL import Image
from running import ROOT, Locked, processes_of, start_run, wait_for, work_here
from torch.distributions import Categorical

import a3c_maze
from a3c_maze import Args, MazeActorCritic, Segment, SharedRMSProp

TOY = {"env_id": "test_a3c_maze:Doors-v0", "plain": True, "num_workers": 1, "eval_episodes": 4}


class Doors(gym.Env):
    """A green door left or right; the action that names its side earns 3; seven steps a game."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, truncates: bool = False):
        self.truncates = truncates

    def look(self) -> np.ndarray:
        self.side = int(self.np_random.integers(2))
        view = np.full((84, 84, 3), 30 * self.t, np.uint8)
        view[:, 42 * self.side : 42 * self.side + 42, 1] = 255
        return view

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action):
        r_t, self.t = 3.0 * (action == self.side), self.t + 1
        over = self.t == 7
        return self.look(), r_t, over and not self.truncates, over and self.truncates, {}


class GreyDoors(Doors):
    """Its views have a shape that the script does not take."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)


class CrashingDoors(Doors):
    """Like Doors until its third step, which divides by zero."""

    def step(self, action):
        return super().step(action + 1 // (2 - self.t))


class VizdoomDoors(Doors):
    """Shows what VizDoom shows: a screen of 320x240 in a dictionary."""

    screen = gym.spaces.Box(0, 255, (240, 320, 3), np.uint8)
    observation_space = gym.spaces.Dict({"screen": screen})

    def look(self) -> dict[str, np.ndarray]:
        return {"screen": super().look().repeat(4, 1)[:60, :320].repeat(4, 0)}


for kind in (Doors, GreyDoors, CrashingDoors, VizdoomDoors):
    gym.register(f"{kind.__name__}-v0", f"test_a3c_maze:{kind.__name__}")
gym.register("TruncatedDoors-v0", "test_a3c_maze:Doors", kwargs={"truncates": True})


def doors(name: str = "Doors-v0") -> gym.Env:
    return a3c_maze.make_env(Args(env_id=f"test_a3c_maze:{name}", plain=True))


@pytest.fixture(scope="module")
def maze():
    """One for all tests: two MiniWorlds in a process overwrite each other's walls."""
    try:
        return a3c_maze.make_env(Args(episode_steps=40))
    except SystemExit as error:
        pytest.skip(f"no OpenGL or no MiniWorld: {error}")


def random_walk(N: int = 6) -> Segment:
    return Segment(
        s_tm1=torch.randint(0, 256, (N, 1, 84, 84, 3), dtype=torch.uint8),
        a_tm1=torch.randint(0, 3, (N, 1)),
        r_t=5 * torch.randn(N, 1),
        terminated=torch.zeros(N, 1, dtype=torch.bool),
        v_t=torch.zeros(N, 1).index_fill_(0, torch.tensor([N - 1]), 3.0),
        lstm_state=(torch.randn(1, 1, 256), torch.randn(1, 1, 256)),
    )


# ---- Equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("terminated", [False, True])
def test_math_the_loss_is_the_sum_of_a_loop(terminated):
    """A segment bootstraps from V of the view that it reached, unless the episode ended there."""
    torch.manual_seed(0)
    net, walk = MazeActorCritic(3), random_walk()
    walk.terminated[-1] = terminated
    args = Args(discount=0.8, entropy_cost=0.3, value_cost=0.7)
    loss, watched = a3c_maze.a3c_loss(net, walk, args)
    expected, state = 0.0, walk.lstm_state
    for i in range(6):
        logits, v, state = net(walk.s_tm1[i : i + 1], state)
        pi = Categorical(logits=logits[0, 0])
        R = sum(0.8 ** (j - i) * walk.r_t[j, 0].item() for j in range(i, 6))
        R += 0 if terminated else 0.8 ** (6 - i) * 3.0
        advantage = R - v.item()
        expected -= pi.log_prob(walk.a_tm1[i, 0]).item() * advantage
        expected += 0.7 * advantage**2 / 2 - 0.3 * pi.entropy().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    parts = watched["losses/policy_loss"] + 0.7 * watched["losses/value_loss"]
    assert 6 * (parts - 0.3 * watched["losses/entropy"]) == pytest.approx(expected, rel=1e-4)


def test_math_the_network():
    net, s = MazeActorCritic(3), random_walk(2).s_tm1
    count = (8 * 8 * 3 + 1) * 16 + (4 * 4 * 16 + 1) * 32 + (2592 + 1) * 256
    count += 4 * 256 * (256 + 256 + 2) + 257 * 3 + 257
    assert sum(p.numel() for p in net.parameters()) == count
    x = net.trunk(s[:, 0].permute(0, 3, 1, 2).float() / 255)
    h = c = torch.zeros(1, 256)
    w_x, w_h, b_x, b_h = net.lstm.parameters()
    logits, v, (h_end, c_end) = net(s, None)
    for t in range(2):
        i, f, g, o = (x[t : t + 1] @ w_x.T + h @ w_h.T + b_x + b_h).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        torch.testing.assert_close(logits[t], net.policy(h), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(v[t], net.value(h)[:, 0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((h_end[0], c_end[0]), (h, c), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("K", [1, 3])
def test_math_single_steps_of_the_lstm_are_those_of_its_sequences(K):
    torch.manual_seed(1)
    lstm, x = torch.nn.LSTM(7, 5), torch.randn(6, K, 7)
    (y, ends), state = lstm(x, None), None
    for t in range(6):
        y_t, state = a3c_maze.run_lstm(lstm, x[t : t + 1], state)
        torch.testing.assert_close(y_t, y[t : t + 1])
    torch.testing.assert_close(state, ends)
    middle = a3c_maze.run_lstm(lstm, x[:4], None)[1]
    torch.testing.assert_close(a3c_maze.run_lstm(lstm, x[4:], middle), (y[4:], ends))


def test_math_a_screen_in_a_dictionary_is_shrunk():
    env = doors("VizdoomDoors-v0")
    s = env.reset(seed=1)[0]
    assert s.shape == (84, 84, 3) and s.dtype == np.uint8
    left, right = s[:, :40, 1].mean(), s[:, 44:, 1].mean()
    assert abs(right - left) > 250 and (right > left) == env.unwrapped.side
    assert (env.step(env.unwrapped.side)[0][..., 0] == 30).all()


def test_math_vizdoom(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="pip install vizdoom")
    monkeypatch.chdir(tmp_path)  # it leaves its settings there
    env = a3c_maze.make_env(Args(env_id="VizdoomMyWayHome-v1", plain=True))
    views = [env.reset(seed=1)[0], env.step(1)[0]]
    assert all(s.shape == (84, 84, 3) and s.std() > 10 for s in views)
    info = {}
    while "episode" not in info:
        info = env.step(0)[4]
    assert info["episode"]["l"] == 525  # 60 s at 35 frames/s, in steps of four
    assert info["episode"]["r"] == pytest.approx(-0.21, abs=1e-3)


def test_math_visits_are_averaged_over_ways_to_the_portal():
    games = [{"apples": 2, "portals": [50, 10, 30]}, {"apples": 1, "portals": []}]
    games += [{"apples": 0, "portals": [70]}, {"apples": 5, "portals": [20, 60]}]
    metrics = a3c_maze.visits(games)
    assert metrics == {
        "eval/apples": 2.0,
        "eval/portals": 1.5,
        "eval/episodes_with_ways": 2,
        "eval/steps_to_first_portal": 35.0,
        "eval/steps_to_later_portals": 40.0,
    }
    assert a3c_maze.visits(games[1:2]) == {"eval/apples": 1.0, "eval/portals": 0.0}


def test_math_later_ways_are_as_long_as_first_ones_without_memory():
    """Mazes differ, and the time cuts long ways off; neither may look like memory."""
    rng, games = np.random.default_rng(0), []
    for _ in range(4000):
        difficulty, left, ways = rng.uniform(50, 600), 900.0, []
        while (steps := rng.exponential(difficulty)) < left:
            ways.append(steps)
            left -= steps
        games.append({"apples": 0, "portals": ways})
    metrics = a3c_maze.visits(games)
    first, later = metrics["eval/steps_to_first_portal"], metrics["eval/steps_to_later_portals"]
    assert first == pytest.approx(later, rel=0.06)


def test_gradient_longer_than_its_bound_is_scaled_down():
    torch.manual_seed(0)
    net, walk = MazeActorCritic(3), random_walk()
    walk = walk._replace(r_t=1000 * walk.r_t)
    loss, _ = a3c_maze.a3c_loss(net, walk, Args())
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = SharedRMSProp(list(net.parameters()), decay=1.0, eps=1.0)  # plain descent
    watched = a3c_maze.update(net, optimizer, walk, 1.0, Args(max_gradient_norm=0.5))
    assert norm > 5 and watched["losses/gradient_norm"] == pytest.approx(norm, rel=1e-3)
    for p, b, gradient in zip(net.parameters(), before, gradients):
        torch.testing.assert_close(p.detach(), b - gradient * 0.5 / norm, rtol=1e-3, atol=1e-5)


def test_gradient_of_one_segment_applied_twice_moves_twice_as_far():
    torch.manual_seed(0)
    shared, net, walk = MazeActorCritic(3), MazeActorCritic(3), random_walk()
    a3c_maze.copy_parameters(shared, net)
    optimizer = SharedRMSProp(list(shared.parameters()), decay=1.0, eps=0.1)  # g stays 0
    moves = []
    for _ in range(2):
        before = shared.policy.weight.detach().clone()
        a3c_maze.update(net, optimizer, walk, 0.01, Args(max_gradient_norm=2.0))
        moves.append(shared.policy.weight.detach() - before)
    assert moves[0].abs().max() > 1e-4
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in net.parameters())
    before = [p.detach().clone() for p in shared.parameters()]
    broken = walk._replace(r_t=torch.full((6, 1), math.nan))
    watched = a3c_maze.update(net, optimizer, broken, 0.01, Args())
    assert not math.isfinite(watched["losses/gradient_norm"])
    assert all(torch.equal(p, b) for p, b in zip(shared.parameters(), before))


# ---- Play ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Doors-v0", "TruncatedDoors-v0"])
def test_math_segments_end_with_their_episode_and_hand_on_the_lstm_state(name):
    """Seven steps in segments of 5 and 2: the LSTM sees each view once, whatever V looked at."""
    torch.manual_seed(0)
    net = MazeActorCritic(2)
    segments = a3c_maze.play(doors(name), 1, net, 5)
    walks = [next(segments) for _ in range(4)]
    for (first, unfinished), (second, over) in zip(walks[::2], walks[1::2]):
        assert (len(first.r_t), len(second.r_t), unfinished) == (5, 2, None)
        assert first.s_tm1[:, 0, 0, 0, 0].tolist() == [0, 30, 60, 90, 120]
        assert second.s_tm1[:, 0, 0, 0, 0].tolist() == [150, 180]
        assert over["l"] == 7 and over["r"] == first.r_t.sum() + second.r_t.sum()
        assert set(first.r_t.flatten().tolist()) <= {0.0, 3.0}  # not clipped
        assert first.lstm_state is None and not any(x.requires_grad for x in second.lstm_state)
        with torch.no_grad():
            *_, state = net(first.s_tm1, None)
            v = net(torch.cat([first.s_tm1, second.s_tm1]), None)[1][5]
        torch.testing.assert_close(second.lstm_state, state, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(first.v_t[-1], v, rtol=1e-3, atol=1e-5)
        assert not first.terminated.any() and not second.terminated[0]
        assert second.terminated[-1].item() == (name == "Doors-v0")
        last = second.s_tm1[-1:].clone()
    shown = torch.from_numpy(doors(name).reset(seed=1)[0])
    assert torch.equal(walks[0][0].s_tm1[0, 0], shown) and last.shape == (1, 1, 84, 84, 3)


def test_math_rewards_are_those_of_the_actions():
    net = MazeActorCritic(2)
    walk, _ = next(a3c_maze.play(doors(), 3, net, 7))
    side = (walk.s_tm1[:, 0, 0, 60, 1] == 255).long()  # the door is on the right
    assert torch.equal(walk.r_t[:, 0], 3.0 * (walk.a_tm1[:, 0] == side))


def test_math_evaluation_samples_whole_episodes_and_follows_its_seed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, args, states, watched = MazeActorCritic(2), Args(**TOY), [], []
    with torch.no_grad():
        net.policy.bias[:] = torch.tensor([0.0, 1e4])  # always to the right
    forward = net.forward

    def noting_forward(s, lstm_state):
        outputs = forward(s, lstm_state)
        states.append((lstm_state, outputs[2]))
        return outputs

    monkeypatch.setattr(net, "forward", noting_forward)
    before = torch.get_rng_state()
    first = a3c_maze.evaluate(net, args, tmp_path / "game.gif", lambda: watched.append(1))
    assert len(watched) == 4 * 7 and torch.equal(before, torch.get_rng_state())
    for (_, after), (given, _) in pairwise(states):
        assert given is None or given is after
    assert [given is None for given, _ in states] == ([True] + [False] * 6) * 4
    with Image.open(tmp_path / "game.gif") as film:
        assert film.n_frames == 7 and film.size == (252, 252)
    assert first == a3c_maze.evaluate(net, args) and first["eval/episodic_length"] == 7
    at_random = a3c_maze.evaluate(net, dataclasses.replace(args, random_walk=True))
    assert at_random == a3c_maze.evaluate(
        MazeActorCritic(2), dataclasses.replace(args, random_walk=True)
    )
    assert at_random != first


def test_math_evaluation_means_episodes_with_seeds_of_their_own_and_samples(monkeypatch):
    net, args = MazeActorCritic(2), Args(**TOY | {"eval_episodes": 30})
    with torch.no_grad():
        net.policy.weight.zero_()
        net.policy.bias[:] = torch.tensor([0.0, 1.0])  # the right has 0.731
    seeds, actions, returns, reset, step = [], [], [], Doors.reset, Doors.step

    def noting_reset(game, *, seed=None, options=None):
        seeds.append(seed)
        returns.append(0.0)
        return reset(game, seed=seed)

    def noting_step(game, a):
        s_t, r_t, *ends, info = step(game, a)
        actions.append(a)
        returns[-1] += r_t
        info |= {"labyrinth": {"apples": returns[-1], "portals": []}} if any(ends) else {}
        return s_t, r_t, *ends, info

    monkeypatch.setattr(Doors, "reset", noting_reset)
    monkeypatch.setattr(Doors, "step", noting_step)
    metrics = a3c_maze.evaluate(net, args)
    assert len(actions) == 30 * 7 and np.mean(actions) == pytest.approx(0.731, abs=0.1)
    assert metrics["eval/episodic_return"] == pytest.approx(np.mean(returns))
    assert metrics["eval/episodic_return_std"] == pytest.approx(np.std(returns)) != 0
    assert metrics["eval/apples"] == pytest.approx(np.mean(returns)) != returns[-1]
    first = set(seeds)
    assert len(first) == 30
    a3c_maze.evaluate(net, dataclasses.replace(args, seed=2))
    assert first.isdisjoint(seeds[30:])


# ---- The maze (needs OpenGL) --------------------------------------------------------------------


def beside(world, entity) -> np.ndarray:
    """Where the agent touches an entity without standing in it."""
    return entity.pos + np.array([entity.radius + world.agent.radius + 0.05, 0, 0])


def test_math_apples_earn_1_once(maze):
    maze.reset(seed=3)
    labyrinth, world = maze.env, maze.unwrapped
    for eaten, apple in enumerate(labyrinth.apples, 1):
        world.agent.pos = beside(world, apple)
        touched = [a for a in labyrinth.apples if a in world.entities and world.near(a)]
        assert touched == [apple]  # or this seed is no good
        s_t, r_t, terminated, truncated, _ = maze.step(0)
        assert (r_t, terminated, truncated) == (1.0, False, False)
        assert apple not in world.entities and labyrinth.found["apples"] == eaten
        assert (s_t == world.render_obs()).all()
        assert maze.step(1)[1] == 0
    assert eaten == 4


def test_math_the_portal_earns_10_sets_the_agent_down_and_brings_back_the_apples(maze):
    maze.reset(seed=0)
    labyrinth, world = maze.env, maze.unwrapped
    places = [apple.pos.copy() for apple in labyrinth.apples]
    walls, box = world.wall_segs.copy(), world.box.pos.copy()
    taken_from = []
    for visit in range(3):
        world.entities.remove(labyrinth.apples[visit])  # as if eaten
        world.agent.pos = beside(world, world.box)
        for _ in range(visit):
            labyrinth.steps += 1  # steps on the way
        _, r_t, terminated, truncated, _ = maze.step(0)
        assert (r_t, terminated, truncated) == (10.0, False, False)
        taken_from.append(world.agent.pos.copy())
        assert not any(world.near(entity) for entity in (world.box, *labyrinth.apples))
        assert world.entities.count(world.agent) == 1 and len(world.entities) == 6
        assert all((a.pos == place).all() for a, place in zip(labyrinth.apples, places))
        assert (world.wall_segs == walls).all() and (world.box.pos == box).all()
        assert not world.intersect(world.agent, world.agent.pos, world.agent.radius)
    assert labyrinth.found == {"apples": 0, "portals": [1, 2, 3]}
    assert len({tuple(place) for place in taken_from}) == 3


def test_math_an_apple_in_the_portal_counts(maze):
    maze.reset(seed=0)
    world, apple = maze.unwrapped, maze.env.apples[0]
    apple.pos = world.box.pos.copy()
    world.agent.pos = world.box.pos + np.array([0.7, 0, 0])
    assert maze.step(0)[1] == 11
    assert maze.env.found == {"apples": 1, "portals": [1]} and apple in world.entities


def test_math_an_episode_begins_where_nothing_is_touched(maze):
    for seed in range(60):
        maze.reset(seed=seed)
        world, apples = maze.unwrapped, maze.env.apples
        assert not any(world.near(entity) for entity in (world.box, *apples))


def test_math_a_step_ends_in_the_portal(maze, monkeypatch):
    """No frame of a way is walked before the way begins."""
    maze.reset(seed=0)
    world, moves = maze.unwrapped, []
    monkeypatch.setattr(maze.env, "move", moves.append)
    maze.step(2)
    assert moves == [2, 2]
    world.agent.pos = beside(world, world.box)
    assert maze.step(2)[1] == 10 and moves == [2, 2, 2]


def test_math_a_portal_never_sets_the_agent_down_at_itself(maze, monkeypatch):
    maze.reset(seed=0)
    world, placed = maze.unwrapped, []
    place_agent = world.place_agent

    def place_badly_once():
        place_agent()
        placed.append(world.agent.pos)
        if len(placed) == 1:
            world.agent.pos = beside(world, world.box)

    monkeypatch.setattr(world, "place_agent", place_badly_once)
    world.agent.pos = beside(world, world.box)
    assert maze.step(0)[1] == 10 and len(placed) >= 2 and not world.near(world.box)
    assert world.entities.count(world.agent) == 1


def test_math_two_frames_are_two_steps_of_miniworld(maze):
    maze.reset(seed=3)
    world, rng, moved = maze.unwrapped, np.random.default_rng(0), 0
    labyrinth = maze.env
    for _ in range(30):
        action = int(rng.integers(3))
        pos, angle = world.agent.pos.copy(), world.agent.dir
        gym.Wrapper.step(labyrinth, action)
        gym.Wrapper.step(labyrinth, action)
        expected = world.agent.pos.copy(), world.agent.dir
        world.agent.pos, world.agent.dir = pos, angle
        labyrinth.steps, visits = 0, len(labyrinth.found["portals"])
        maze.step(action)
        if len(labyrinth.found["portals"]) == visits and labyrinth.found["apples"] == 0:
            np.testing.assert_allclose(world.agent.pos, expected[0])
            assert world.agent.dir == pytest.approx(expected[1])
            moved += bool((world.agent.pos != pos).any())
    assert moved > 2


def test_math_only_the_time_ends_an_episode_and_every_episode_is_another_maze(maze):
    walls = []
    for episode in range(4):
        s, _ = maze.reset(seed=7 if episode == 0 else None)
        assert s.shape == (84, 84, 3) and s.dtype == np.uint8
        walls.append(maze.unwrapped.wall_segs.copy())
        ends = [maze.step(0)[2:] for _ in range(40)]
        assert not any(terminated for terminated, *_ in ends)
        assert [truncated for _, truncated, _ in ends] == [False] * 39 + [True]
        info = ends[-1][2]
        assert info["episode"]["l"] == 40 and info["episode"]["r"] == info["labyrinth"]["apples"]
    assert any(a.shape != b.shape or (a != b).any() for a, b in pairwise(walls))
    maze.reset(seed=7)
    assert (maze.unwrapped.wall_segs == walls[0]).all()


def test_math_the_view_is_that_of_its_own_maze(maze):
    """The first view after a reset shows the new maze, with its apples and its portal."""
    first, _ = maze.reset(seed=1)
    again, _ = maze.reset(seed=2)
    assert (first != again).any() and (maze.reset(seed=1)[0] == first).all()
    world, apple = maze.unwrapped, maze.env.apples[0]
    changed = np.zeros((84, 84), bool)
    for angle in np.arange(8) * math.pi / 4:  # from some sides there are walls before it
        world.agent.pos = apple.pos - 2 * np.array([math.cos(angle), 0, -math.sin(angle)])
        world.agent.dir = angle
        with_apple = world.render_obs().astype(int)
        world.entities.remove(apple)
        differs = (world.render_obs() != with_apple).any(-1)
        world.entities.append(apple)
        if differs.sum() > changed.sum():
            changed, (red, green, blue) = differs, with_apple[differs].mean(0)
    assert changed.sum() > 50 and green > 2 * max(red, blue)


def test_math_the_film_shows_the_walk_on_the_map(maze):
    s, _ = maze.reset(seed=1)
    world, path = maze.unwrapped, []
    a3c_maze.draw_walk(maze, s, path)
    for _ in range(5):
        world.agent.pos = world.agent.pos + np.array([0.2, 0, 0.1])
        picture = np.array(a3c_maze.draw_walk(maze, s, path))
    assert picture.shape == (252, 504, 3) and len(path) == 6
    assert (picture[:, 252:] == s.repeat(3, 0).repeat(3, 1)).all()
    rows, columns = np.nonzero((picture[:, :252] == (255, 0, 255)).all(-1))
    width = world.max_x - world.min_x + 2  # metres of the map, one beyond each outer wall
    x = world.min_x - 1 + columns * width / 252
    z = world.min_z - 1 + rows * width / 252
    assert abs(x.min() - path[0][0]) < 0.2 and abs(z.min() - path[0][2]) < 0.2
    world.agent.pos = world.agent.pos + np.array([2.0, 0, 0])  # set down elsewhere
    a3c_maze.draw_walk(maze, s, path)
    assert len(path) == 1


def test_math_plain_keeps_miniworlds_own_task(maze):
    env = a3c_maze.make_env(Args(env_id="MiniWorld-MazeS2-v0", plain=True))
    env.reset(seed=0)
    world = env.unwrapped
    world.agent.pos = beside(world, world.box)
    _, r_t, terminated, _, info = env.step(0)
    assert terminated and 0.9 < r_t <= 1 and "labyrinth" not in info
    maze.reset()  # its walls again


def test_bad_input_a_maze_has_to_have_room_for_the_apples(maze):
    with pytest.raises(SystemExit, match="has 9 rooms of a maze: no place for 10 apples"):
        a3c_maze.make_env(Args(num_apples=10))
    with pytest.raises(SystemExit, match=r"has 0 rooms of a maze.*--plain"):
        a3c_maze.make_env(Args(env_id="MiniWorld-Hallway-v0"))
    assert a3c_maze.make_env(Args(num_apples=9)).env.num_apples == 9
    maze.reset()


# ---- Processes ----------------------------------------------------------------------------------


def test_math_worker_follows_algorithm_s2(monkeypatch):
    """Copy, play, count, update, again: until the workers together have made all steps."""
    args = Args(**TOY, t_max=4, total_timesteps=100, learning_rate=0.5)
    shared = MazeActorCritic(2)
    optimizer = SharedRMSProp(list(shared.parameters()), 0.99, 0.1)
    T, reports, rates, steps = Locked(40), [], [], [40]
    seeds, play = [], a3c_maze.play

    def noting_play(env, seed, *given):
        seeds.append(seed)
        return play(env, seed, *given)

    monkeypatch.setattr(a3c_maze, "play", noting_play)

    def update(net, given_optimizer, walk, learning_rate, given_args):
        assert given_optimizer is optimizer and given_args is args and net is not shared
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), shared.parameters()))
        assert len(rates) == 0 or (walk.a_tm1 == 1).all()  # played with what was copied
        assert torch.initial_seed() == a3c_maze.independent_seeds(3, args.seed, 7, 40)[0]
        steps.append(steps[-1] + len(walk.r_t))
        assert T.value == steps[-1]
        rates.append(learning_rate)
        with torch.no_grad():
            shared.policy.bias[:] = torch.tensor([0.0, 1e4])
            net.policy.bias[:] = torch.tensor([1e4, 0.0])
        return {"losses/gradient_norm": math.nan if len(rates) == 2 else 1.0}

    log = SimpleNamespace(put=reports.append)
    arguments = (args, 40, shared, optimizer, T, log)
    work_here(monkeypatch, a3c_maze, 6, arguments, update)
    assert seeds == a3c_maze.independent_seeds(3, args.seed, 7, 40)[2:]
    assert steps[-2] < 100 <= steps[-1] and np.diff(steps).tolist() == [4, 3] * 8 + [4]
    assert rates == pytest.approx([0.5 * max(0, 1 - step / 100) for step in steps[1:]])
    told = [(tag, step) for tag, _, step in reports]
    assert told.count(("losses/gradient_norm", steps[2])) == 1  # not finite: reported at once
    lengths = [value for tag, value, _ in reports if tag == "charts/episodic_length"]
    assert lengths == [7] * ((steps[-1] - 40) // 7)


def test_math_evaluations_during_training_play_with_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(a3c_maze, "supervise", lambda *arguments: arguments[-1])
    evaluate_now = a3c_maze.main(Args(**TOY, run_dir=str(tmp_path)))
    monkeypatch.setattr(a3c_maze, "evaluate", lambda net, *_: net)
    assert not any(p.is_shared() for p in evaluate_now(0, None).parameters())


def test_math_a_checkpoint_may_be_evaluated_in_another_maze(tmp_path):
    net, args, path = MazeActorCritic(2), Args(**TOY), tmp_path / "checkpoint.pt"
    a3c_maze.save_checkpoint(path, net=net.state_dict(), args=dataclasses.asdict(args))
    elsewhere = dataclasses.replace(args, env_id="test_a3c_maze:TruncatedDoors-v0")
    metrics = a3c_maze.main(dataclasses.replace(elsewhere, evaluate=str(path)))
    assert metrics == a3c_maze.evaluate(net, elsewhere)


def test_learns_which_door_and_goes_on(tmp_path):
    """21 points a game are the optimum, 10.5 are chance."""
    args = Args(**TOY | {"eval_episodes": 20}, t_max=7, total_timesteps=1400, discount=0.0)
    args = dataclasses.replace(args, learning_rate=2e-3, run_dir=str(tmp_path))
    args = dataclasses.replace(args, report_every=600, capture_video=True)
    metrics = a3c_maze.main(args)
    assert metrics["eval/episodic_return"] > 17
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("game_*.gif"))) == 1
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert {"charts/SPS", "losses/entropy", "eval/episodic_return"} <= {tag for _, tag, _ in rows}

    path = str(tmp_path / "checkpoint.pt")
    evaluated = a3c_maze.main(dataclasses.replace(args, evaluate=path, run_dir=""))
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}
    before = torch.load(path)
    rested = dataclasses.replace(args, resume=path, run_dir="", learning_rate=0.0)
    rested = dataclasses.replace(rested, rmsprop_decay=1.0, capture_video=False)
    with pytest.raises(SystemExit, match=r"is at step 140\d: raise --total-timesteps"):
        a3c_maze.main(rested)
    a3c_maze.main(dataclasses.replace(rested, total_timesteps=1450, eval_episodes=1))
    after = torch.load(path)  # a run that moves nothing keeps all as it was loaded
    assert 1450 <= after["T"] < 1457 and after["seconds"] > before["seconds"]
    assert all(torch.equal(after["net"][name], before["net"][name]) for name in before["net"])
    assert all(torch.equal(a, b) for a, b in zip(after["g"], before["g"]))


def test_bad_input_an_environment_that_crashes_ends_the_run(tmp_path):
    args = Args(**TOY | {"env_id": "test_a3c_maze:CrashingDoors-v0"}, run_dir=str(tmp_path))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError"):
        a3c_maze.main(args)
    assert multiprocessing.active_children() == []


@pytest.mark.slow  # supervise, which this is about, has the text it has in a3c_atari.py
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_command_line_ctrl_c_ends_the_run_in_order(tmp_path):
    flags = "--env-id", TOY["env_id"], "--plain", "--num-workers", "1"
    run = start_run("a3c_maze.py", tmp_path, *flags)
    wait_for((tmp_path / "checkpoint.pt").exists, 120)
    children = processes_of(run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and "Traceback" not in errors
    assert "Stopped; go on with the same flags and --resume" in errors
    assert torch.load(tmp_path / "checkpoint.pt")["T"] > 0
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)


def test_command_line(tmp_path, maze):
    command = [sys.executable, str(ROOT / "a3c_maze.py"), "--episode-steps", "50"]
    command += ["--total-timesteps", "100", "--num-workers", "1", "--eval-episodes", "1"]
    command += ["--capture-video"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "eval/episodic_return" in run.stdout and "eval/portals" in run.stdout
    assert "Falling back" not in run.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("MiniWorld-MazeS3-v0__a3c_maze__1__")
    assert torch.load(run_dir / "checkpoint.pt")["T"] >= 100
    with Image.open(next(run_dir.glob("game_*.gif"))) as film:
        assert film.size == (504, 252) and film.n_frames > 30


# ---- Bad input ----------------------------------------------------------------------------------


def test_bad_input_ctrl_c_before_training_is_a_sentence(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(a3c_maze, "make_env", interrupted)
    with pytest.raises(SystemExit, match=r"^Stopped\.$"):
        a3c_maze.main(Args(**TOY))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "no_such_module:Env-v0"}, "no_such_module:Env-v0 cannot be made.*EGL and Mesa"),
        ({"env_id": "a:b:c"}, "a:b:c cannot be made"),
        ({"env_id": "test_a3c_maze:GreyDoors-v0"}, r"this script needs uint8 views of shape"),
        ({"env_id": "CartPole-v1"}, "needs uint8 views"),
        ({"plain": False}, "Doors-v0 has 0 rooms of a maze.*--plain"),
        ({"num_workers": 0}, "--num-workers must lie between 1 and"),
        ({"t_max": 0}, "--t-max must lie between 1"),
        ({"num_apples": 0}, "--num-apples must lie between 1"),
        ({"episode_steps": -3}, "--episode-steps must lie between 1"),
        ({"discount": 1.01}, "--discount must lie between 0 and 1, not at 1.01"),
        ({"run_dir": "good.pt/x"}, "cannot be written to.*choose another folder"),
        ({"resume": "a.pt", "evaluate": "b.pt"}, "pass one of them"),
        ({"resume": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        ({"evaluate": "damaged.pt"}, "damaged.pt is missing, damaged or no checkpoint"),
        ({"resume": "good.pt"}, "made with --plain False, not with --plain True"),
        ({"evaluate": "good.pt"}, "made with --plain False, not with --plain True"),
        ({"resume": "apple.pt"}, "made with --num-apples 1, not with --num-apples 4"),
        ({"resume": "apple.pt", "env_id": "test_a3c_maze:TruncatedDoors-v0"}, "with --env-id test"),
        ({"random_walk": True}, "--random-walk is for evaluations: pass --evaluate, too"),
        ({"num_apples": 3}, "are for the task with apples: leave --plain out"),
        ({"episode_steps": 3}, "are for the task with apples: leave --plain out"),
        ({"action_repeat": 3}, "are for the task with apples: leave --plain out"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, net = Args(**TOY), MazeActorCritic(2)
    Path("damaged.pt").write_bytes(b"PK\x03\x04 half a file")
    made_with = dataclasses.asdict(dataclasses.replace(args, plain=False))
    a3c_maze.save_checkpoint(Path("good.pt"), net=net.state_dict(), args=made_with)
    made_with |= {"plain": True, "num_apples": 1}
    a3c_maze.save_checkpoint(Path("apple.pt"), net=net.state_dict(), args=made_with)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        a3c_maze.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_without_opengl_one_sentence_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "miniworld", None)  # as where an import of it fails
    with pytest.raises(SystemExit, match=r"cannot be made.*pip install miniworld.*EGL"):
        a3c_maze.make_env(Args())
