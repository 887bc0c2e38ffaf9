"""async_nstep_q.py against the bugs that public ports of its paper have had.

Caught here: Sarsa's target uses an action that is never executed (another sample, or the greedy
one); a gradient that reaches the target network; a target network that every worker refreshes, or
each at its own step; one final exploration rate for all workers; a bootstrap after the episode's
end; a segment shorter than t_max that is scaled up; returns that cross into the next episode.
"""

import dataclasses
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import toy_games  # noqa: F401
from running import ROOT, Locked, work_here

import async_nstep_q
from async_nstep_q import Args, QNetwork, SharedRMSProp, Transitions

ALGORITHMS = ("nstep-q", "onestep-q", "onestep-sarsa")
TOY = {"env_id": "toy_games:Side-v0", "num_workers": 2, "eval_episodes": 4}

UNHEARD = SimpleNamespace(put=lambda told: None)  # a log that nobody reads

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def random_transitions(N: int = 5, K: int = 3, num_actions: int = 4, seed: int = 0) -> Transitions:
    generator = torch.Generator().manual_seed(seed)
    screens = torch.randint(0, 256, (2, N, K, 84, 84, 4), generator=generator, dtype=torch.uint8)
    actions = torch.randint(0, num_actions, (2, N, K), generator=generator)
    ends = torch.rand(2, N, K, generator=generator) < 0.25
    return Transitions(
        s_tm1=screens[0],
        a_tm1=actions[0],
        r_t=torch.randn(N, K, generator=generator),
        terminated=ends[0],
        truncated=ends[1],
        s_t=screens[1],
        a_t=actions[1],
    )


# ---- Equations ----------------------------------------------------------------------------------


@each_algorithm
@pytest.mark.parametrize("N", [1, 2, 5])
def test_math_targets_are_those_of_a_double_loop(algorithm, N):
    torch.manual_seed(0)
    target_net, segment = QNetwork(4, "small"), random_transitions(N, K=6)
    y = async_nstep_q.targets(target_net, segment, algorithm, discount=0.9)
    q_t = target_net(segment.s_t).detach()
    assert not y.requires_grad
    for k in range(6):
        for i in range(N):
            expected, weight = 0.0, 1.0
            for j in range(i, N):
                expected += weight * segment.r_t[j, k].item()
                weight *= 0.9
                if segment.terminated[j, k]:
                    break
                if algorithm == "onestep-sarsa":
                    expected += weight * q_t[j, k, segment.a_t[j, k]].item()
                    break
                if algorithm == "onestep-q" or segment.truncated[j, k] or j == N - 1:
                    expected += weight * q_t[j, k].max().item()
                    break
            assert y[i, k].item() == pytest.approx(expected, abs=1e-5)


def test_math_algorithms_differ():
    target_net, segment = QNetwork(4, "small"), random_transitions()
    y = [async_nstep_q.targets(target_net, segment, name, discount=0.9) for name in ALGORITHMS]
    assert not any(torch.allclose(y[i], y[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_gradient_of_the_loss_is_2_q_minus_y_on_the_taken_action():
    q, y = torch.randn(5, 3, 4, requires_grad=True), torch.randn(5, 3)
    a = torch.randint(0, 4, (5, 3))
    async_nstep_q.q_loss(q, a, y).backward()
    for n in range(5):
        for k in range(3):
            for action in range(4):
                taken = action == a[n, k]
                expected = 2 * (q[n, k, action] - y[n, k]).item() if taken else 0.0
                assert q.grad[n, k, action].item() == pytest.approx(expected, abs=1e-6)


@each_algorithm
def test_gradient_moves_only_the_shared_network(algorithm):
    torch.manual_seed(0)
    shared, target_net = QNetwork(4, "small"), QNetwork(4, "small")
    net = QNetwork(4, "small") if algorithm == "nstep-q" else shared
    async_nstep_q.copy_parameters(shared, net)
    before = [p.clone() for p in (*shared.parameters(), *target_net.parameters())]
    optimizer = SharedRMSProp(list(shared.parameters()), decay=1.0, eps=0.1)
    args = Args(algorithm=algorithm)
    async_nstep_q.update(net, target_net, optimizer, random_transitions(), 0.01, args)
    after = [*shared.parameters(), *target_net.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(after, before)]
    assert moved == [True] * 8 + [False] * 8
    assert all(p.grad is None for p in (*net.parameters(), *target_net.parameters()))


@each_algorithm
def test_math_update_follows_the_gradient_of_the_summed_loss(algorithm):
    torch.manual_seed(0)
    net, target_net, segment = QNetwork(4, "small"), QNetwork(4, "small"), random_transitions()
    y = async_nstep_q.targets(target_net, segment, algorithm, 0.9)
    q = net(segment.s_tm1)
    loss = sum((y[n, k] - q[n, k, segment.a_tm1[n, k]]) ** 2 for n in range(5) for k in range(3))
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = SharedRMSProp(list(net.parameters()), decay=1.0, eps=0.25)  # divides by 1/2
    args = Args(algorithm=algorithm, discount=0.9, max_gradient_norm=norm / 4)
    watched = async_nstep_q.update(net, target_net, optimizer, segment, 0.1, args)
    assert watched["losses/gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert watched["losses/td_loss"] == pytest.approx(loss.item() / 15, rel=1e-4)
    assert watched["charts/learning_rate"] == 0.1 != args.learning_rate
    for p, b, g in zip(net.parameters(), before, gradients):
        torch.testing.assert_close(p.detach(), b - 0.1 * 2 * g / 4, rtol=1e-3, atol=1e-5)


def test_math_an_update_of_two_steps_is_not_scaled_to_five():
    torch.manual_seed(0)
    nets = [QNetwork(4, "small") for _ in range(2)]
    async_nstep_q.copy_parameters(*nets)
    whole = random_transitions()
    short = whole._replace(**{name: x[-2:] for name, x in whole._asdict().items()})
    y = async_nstep_q.targets(nets[1], short, "nstep-q", 0.99)
    loss = async_nstep_q.q_loss(nets[1](short.s_tm1), short.a_tm1, y)
    gradients = torch.autograd.grad(loss, list(nets[1].parameters()))
    optimizer = SharedRMSProp(list(nets[0].parameters()), decay=1.0, eps=1.0)  # plain descent
    args = Args(max_gradient_norm=1e9)
    async_nstep_q.update(nets[0], nets[1], optimizer, short, 1e-3, args)
    for p, b, g in zip(nets[0].parameters(), nets[1].parameters(), gradients):
        torch.testing.assert_close(p.detach(), b.detach() - 1e-3 * g, rtol=1e-3, atol=1e-6)


def test_gradient_that_is_not_finite_moves_nothing():
    net, target_net = QNetwork(4, "small"), QNetwork(4, "small")
    before = [p.detach().clone() for p in net.parameters()]
    segment = random_transitions()._replace(r_t=torch.full((5, 3), math.inf))
    optimizer = SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    watched = async_nstep_q.update(net, target_net, optimizer, segment, 0.01, Args())
    assert not math.isfinite(watched["losses/gradient_norm"])
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))
    assert all((g == 0).all() for g in optimizer.g)


def test_math_the_network_is_that_of_2013():
    net, s = QNetwork(4, "small"), random_transitions().s_t
    w = [p.detach() for p in net.parameters()]
    x = F.conv2d(s.flatten(0, 1).permute(0, 3, 1, 2).float() / 255, w[0], w[1], stride=4).relu()
    x = F.conv2d(x, w[2], w[3], stride=2).relu().flatten(1)
    x = (x @ w[4].T + w[5]).relu() @ w[6].T + w[7]
    torch.testing.assert_close(net(s).detach(), x.view(5, 3, 4), atol=1e-5, rtol=1e-4)


def test_math_the_larger_network_is_that_of_2015():
    net, s = QNetwork(4, "large"), random_transitions().s_t
    w = [p.detach() for p in net.parameters()]
    x = F.conv2d(s.flatten(0, 1).permute(0, 3, 1, 2).float() / 255, w[0], w[1], stride=4).relu()
    x = F.conv2d(x, w[2], w[3], stride=2).relu()
    x = F.conv2d(x, w[4], w[5]).relu().flatten(1)
    x = (x @ w[6].T + w[7]).relu() @ w[8].T + w[9]
    torch.testing.assert_close(net(s).detach(), x.view(5, 3, 4), atol=1e-5, rtol=1e-4)


def test_math_defaults_are_the_papers():
    args = Args()
    assert (args.t_max, args.discount, args.target_period) == (5, 0.99, 10_000)
    assert (args.epsilon_timesteps, args.rmsprop_decay, args.eval_epsilon) == (
        1_000_000,
        0.99,
        0.05,
    )
    assert (args.network, args.envs_per_worker) == ("small", 1)
    assert (args.learning_rate, args.rmsprop_eps, args.max_gradient_norm) == (7e-4, 0.1, 40)


def test_math_exploration_falls_linearly_from_1():
    final = torch.tensor([0.1, 0.01, 0.5])
    expected = {0: [1, 1, 1], 500: [0.55, 0.505, 0.75], 1000: final, 9999: final}
    for T, epsilon in expected.items():
        epsilon = torch.as_tensor(epsilon, dtype=torch.float32)
        torch.testing.assert_close(async_nstep_q.exploration_rate(T, final, 1000), epsilon)


def test_math_final_epsilons_have_the_papers_frequencies():
    torch.manual_seed(0)
    drawn = async_nstep_q.draw_final_epsilons(30_000)
    for epsilon, probability in ((0.1, 0.4), (0.01, 0.3), (0.5, 0.3)):
        frequency = (drawn == epsilon).float().mean().item()
        assert frequency == pytest.approx(probability, abs=0.012)  # 4 standard errors


def test_math_epsilon_greedy_explores_each_game_at_its_own_rate():
    q = torch.tensor([0.0, 3.0, 1.0, 2.0]).repeat(40_000, 1)
    epsilon = torch.tensor([0.0, 0.4, 1.0, 0.08]).repeat(10_000)
    a = async_nstep_q.epsilon_greedy(q, epsilon, torch.Generator().manual_seed(0)).view(-1, 4)
    for k, rate in enumerate((0.0, 0.4, 1.0, 0.08)):
        frequencies = a[:, k].bincount(minlength=4) / 10_000
        expected = torch.full((4,), rate / 4)
        expected[1] += 1 - rate
        torch.testing.assert_close(frequencies, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("network", "num_actions", "count"),
    [("small", 6, 676_144 + 257 * 6), ("large", 18, 1_684_128 + 513 * 18)],
)
def test_math_parameter_counts(network, num_actions, count):
    assert sum(p.numel() for p in QNetwork(num_actions, network).parameters()) == count


# ---- Play ---------------------------------------------------------------------------------------


def games(*names: str) -> list:
    return [async_nstep_q.make_env(f"toy_games:{name}") for name in names]


@pytest.mark.parametrize("sarsa", [False, True])
def test_math_segments_of_one_game_are_the_papers(sarsa):
    segments = async_nstep_q.explore(
        games("Clock-v0"), [1], lambda s: torch.zeros(1, dtype=torch.long), 5, sarsa
    )
    for _ in range(2):
        clock = 0
        for length in (5, 2):
            segment, finished = next(segments)
            assert segment.r_t.shape == (length, 1) and (segment.r_t == 1).all()  # clipped
            for i in range(length):
                stack = [[max(0, clock - 3 + j) for j in range(4)] for clock in (clock, clock + 1)]
                assert segment.s_tm1[i, 0, 0, 0].tolist() == stack[0]
                assert segment.s_t[i, 0, 0, 0].tolist() == stack[1]
                clock += 1
            assert segment.terminated[:, 0].tolist() == [False] * (length - 1) + [clock == 7]
        assert [(game["k"], game["r"], game["l"]) for game in finished] == [(0, 28, 7)]


def test_math_successors_of_an_ended_episode_are_its_own_last_screens():
    envs = games("TruncatedClock-v0", "Side-v0")
    segment, _ = next(
        async_nstep_q.explore(envs, [1, 2], lambda s: torch.zeros(2, dtype=torch.long), 9, False)
    )
    assert segment.truncated[:, 0].tolist() == [False] * 6 + [True] + [False] * 2
    assert segment.s_t[6, 0, 0, 0].tolist() == [4, 5, 6, 7]
    assert segment.s_tm1[7, 0].unique().tolist() == [0]


@pytest.mark.parametrize("K", [1, 3])
@each_algorithm
def test_math_forward_passes_of_a_segment(algorithm, K, monkeypatch):
    """One for each action, one to learn, one of the target network; Sarsa's first one on top."""
    args = Args(algorithm=algorithm, env_id="toy_games:Side-v0")
    net, target_net = QNetwork(2, "small"), QNetwork(2, "small")
    optimizer = SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    passes = []
    for name, network in (("Q", net), ("target", target_net)):
        network.register_forward_pre_hook(lambda _, given, n=name: passes.append((n, *given)))
    choose = torch.no_grad()(lambda s: net(s).argmax(-1))
    envs, sarsa = [async_nstep_q.make_env(args.env_id) for _ in range(K)], "sarsa" in algorithm
    segment, _ = next(async_nstep_q.explore(envs, list(range(K)), choose, args.t_max, sarsa))
    acting = [name for name, s in passes if s.shape[:-3] == (K,)]
    assert len(passes) == len(acting) == args.t_max + sarsa
    async_nstep_q.update(net, target_net, optimizer, segment, 0.1, args)
    shapes = [(name, s.shape[:-3].numel()) for name, s in passes[len(acting) :]]
    successors = K if algorithm == "nstep-q" else args.t_max * K
    assert sorted(shapes) == [("Q", args.t_max * K), ("target", successors)]


def test_math_sarsas_next_action_is_the_one_it_executes():
    """Every choice is another number: what a_t says must be what the next step does."""
    choices = iter(range(10**6))
    executed = [[], []]

    def choose(s):
        return torch.tensor([next(choices), next(choices)])

    envs = games("Clock-v0", "Side-v0")
    for env, actions in zip(envs, executed):
        step = env.step
        env.step = lambda a, step=step, actions=actions: (actions.append(a), step(a % 2))[1]
    segments = async_nstep_q.explore(envs, [1, 2], choose, 4, True)
    played = [next(segments)[0] for _ in range(6)]
    a_tm1, a_t, terminated = (
        torch.cat([getattr(segment, name) for segment in played])
        for name in ("a_tm1", "a_t", "terminated")
    )
    assert a_tm1.T.tolist() == executed
    for n in range(23):
        for k in range(2):
            assert terminated[n, k] or a_t[n, k] == a_tm1[n + 1, k]
    assert terminated.sum() == 3 + 2


@pytest.mark.parametrize("sarsa", [False, True])
def test_math_q_learning_chooses_after_the_update_and_sarsa_before(sarsa):
    now = [0]
    segments = async_nstep_q.explore(
        games("Clock-v0"), [1], lambda s: torch.tensor([now[0]]), 3, sarsa
    )
    next(segments)
    now[0] = 1
    assert next(segments)[0].a_tm1[:, 0].tolist() == ([0, 1, 1] if sarsa else [1, 1, 1])


def test_math_sarsa_chooses_on_the_screens_it_acts_in():
    def parity(s):  # of the newest screen's number
        return (s[..., -1, 0, 0] % 2).long()

    envs = games("Clock-v0", "Side-v0")
    segment, finished = next(async_nstep_q.explore(envs, [1, 2], parity, 10, True))
    assert torch.equal(segment.a_tm1, parity(segment.s_tm1))
    assert torch.equal(segment.a_t, parity(segment.s_t))
    assert [(game["k"], game["l"]) for game in finished] == [(0, 7), (1, 10)]


def test_math_rewards_are_clipped_on_both_sides():
    (env,) = games("Clock-v0")
    step = env.step

    def halves(a):  # from -1.5 to 1.5
        s_t, r_t, *rest = step(a)
        return s_t, (r_t - 4) / 2, *rest

    env.step = halves
    stay = torch.zeros(1, dtype=torch.long)
    segment, _ = next(async_nstep_q.explore([env], [1], lambda s: stay, 7, False))
    assert segment.r_t[:, 0].tolist() == [-1, -1, -0.5, 0, 0.5, 1, 1]


def test_math_games_differ_from_each_other_and_from_one_episode_to_the_next():
    envs = games("Side-v0", "Side-v0")
    segments = async_nstep_q.explore(
        envs, [1, 2], lambda s: torch.zeros(2, dtype=torch.long), 10, False
    )
    played = [
        segment.s_t[:, k, 30, 0, -1].tolist()
        for segment, _ in (next(segments) for _ in range(3))
        for k in range(2)
    ]
    assert len(set(map(tuple, played))) == 6


def test_math_evaluation_plays_whole_games_that_differ(monkeypatch):
    made, seeds, rates, scores, screens, film = [], [], [], [], [], []
    make_env, epsilon_greedy = async_nstep_q.make_env, async_nstep_q.epsilon_greedy

    def noting_make_env(env_id, training=True):
        made.append(training)
        env, shown = make_env(env_id, training), []
        reset, step = env.reset, env.step

        def noting_step(a):
            s_t, *outcome, info = step(a)
            shown.append(s_t[..., -1])
            scores.extend([info["episode"]["r"]] if "episode" in info else [])
            return s_t, *outcome, info

        env.reset = lambda seed: (seeds.append(seed), reset(seed=seed))[1]
        env.step = noting_step
        screens.append(shown)
        return env

    def noting_epsilon(q, epsilon, generator):
        rates.append(epsilon)
        return epsilon_greedy(q, epsilon, generator)

    monkeypatch.setattr(async_nstep_q, "make_env", noting_make_env)
    monkeypatch.setattr(async_nstep_q, "epsilon_greedy", noting_epsilon)
    monkeypatch.setattr(async_nstep_q, "write_gif", lambda pictures, *_: film.extend(pictures))
    args = dataclasses.replace(Args(**TOY), eval_episodes=20)
    torch.manual_seed(0)
    metrics = async_nstep_q.evaluate(QNetwork(2, "small"), args, Path("game.gif"))
    assert made == [False] * 20 and len(set(seeds)) == 20 and rates == [0.05] * 10
    assert metrics["eval/episodic_return"] == pytest.approx(np.mean(scores)) and len(scores) == 20
    assert metrics["eval/episodic_return_std"] == pytest.approx(np.std(scores)) != np.var(scores)
    assert np.array_equal(np.stack(film), screens[0])  # of the first game alone


# ---- Processes ----------------------------------------------------------------------------------


def toy_worker(rank: int, roles: tuple) -> None:
    """A worker that notes at which steps the target network changes."""
    *arguments, changes = roles
    target_net, T = arguments[3], arguments[6]
    copy_parameters = async_nstep_q.copy_parameters

    def noting(source, target):
        copy_parameters(source, target)
        if target is target_net:
            changes.put((T.value, rank))

    async_nstep_q.copy_parameters = noting
    async_nstep_q.worker(rank, *arguments)


@pytest.mark.parametrize("first", [0, 730])
def test_math_target_network_is_refreshed_once_per_period_by_one_of_the_workers(first):
    args = Args(**TOY, target_period=200, total_timesteps=2000, algorithm="nstep-q")
    net, target_net = QNetwork(2, "small").share_memory(), QNetwork(2, "small").share_memory()
    optimizer = SharedRMSProp(list(net.parameters()), 0.99, 0.1)
    spawn = mp.get_context("spawn")
    T, log, changes = spawn.Value("q", first), spawn.Queue(), spawn.SimpleQueue()
    final_epsilons = torch.full((2, 1), 0.1).share_memory_()
    roles = (args, first, net, target_net, optimizer, final_epsilons, T, log, changes)
    workers = mp.spawn(toy_worker, (roles,), nprocs=2, join=False)
    steps = []
    while not workers.join(timeout=0.1):
        while not log.empty():
            log.get()
        while not changes.empty():
            steps.append(changes.get()[0])
    while not changes.empty():
        steps.append(changes.get()[0])
    due = [step for step in range(200, 2001, 200) if step > first]
    assert len(steps) == len(due)
    for step, period in zip(sorted(steps), due):
        assert period <= step < period + 200  # read a moment after the refresh


@each_algorithm
def test_math_worker_follows_algorithms_1_and_s1(algorithm, monkeypatch):
    """n-step Q plays and learns with a copy of the shared network, the others with itself."""
    args = Args(**TOY, algorithm=algorithm, envs_per_worker=3, t_max=4, total_timesteps=400)
    args = dataclasses.replace(args, learning_rate=0.5, target_period=50, epsilon_timesteps=200)
    shared, target_net = QNetwork(2, "small"), QNetwork(2, "small")
    optimizer = SharedRMSProp(list(shared.parameters()), 0.99, 0.1)
    T = Locked(40)
    final_epsilons = torch.full((8, 3), 0.7)
    reports, steps, rates, seeds, epsilons, refreshed, played = [], [40], [], [], [], [], []
    log = SimpleNamespace(put=reports.append)

    def update(net, given_target, given_optimizer, segment, learning_rate, given_args):
        assert (net is shared) == (algorithm != "nstep-q") and given_target is target_net
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), shared.parameters()))
        steps.append(steps[-1] + segment.r_t.numel())
        assert T.value == steps[-1]
        rates.append(learning_rate)
        due = steps[-2] // 50 > steps[-3] // 50 if len(steps) > 2 else False
        assert torch.equal(target_net.value.bias, shared.value.bias) == due  # by the last call
        assert (
            played == []
            or algorithm != "onestep-sarsa"
            or played[-1].terminated[-1].any()
            or (torch.equal(played[-1].a_t[-1], segment.a_tm1[0]))
        )
        played.append(segment)
        with torch.no_grad():
            shared.value.bias += 1
        refreshed.append(due)
        return {"losses/gradient_norm": math.nan if len(rates) == 2 else 1.0}

    independent_seeds, epsilon_greedy = (
        async_nstep_q.independent_seeds,
        async_nstep_q.epsilon_greedy,
    )

    def noting_seeds(count, *purpose):
        seeds.append((count, *purpose))
        return independent_seeds(count, *purpose)

    def noting_epsilons(q, epsilon):
        epsilons.append((T.value, epsilon.clone()))
        assert abs(q.mean().item() - len(rates)) < 0.5  # of the parameters after the last update
        return epsilon_greedy(q, epsilon)

    monkeypatch.setattr(async_nstep_q, "independent_seeds", noting_seeds)
    monkeypatch.setattr(async_nstep_q, "epsilon_greedy", noting_epsilons)
    arguments = (args, 40, shared, target_net, optimizer, final_epsilons, T, log)
    work_here(monkeypatch, async_nstep_q, 6, arguments, update)
    assert seeds == [(2 + 3, args.seed, 7, 40)]
    assert steps[-2] < 400 <= steps[-1] and any(refreshed) and not all(refreshed)
    assert played[0].r_t.shape == (4, 3)  # t_max steps of each game
    assert rates == pytest.approx([0.5 * max(0, 1 - step / 400) for step in steps[1:]])
    for step, epsilon in epsilons[:9]:  # until the first games end
        assert epsilon.tolist() == pytest.approx([1 - 0.3 * step / 200] * 3)
    assert epsilons[8][0] > epsilons[0][0] == 40
    last = epsilons[-1][1].tolist()
    assert all(min(abs(e - f) for f in (0.1, 0.01, 0.5)) < 1e-5 for e in last)
    told = {tag for tag, _, step in reports if step == steps[2]}
    assert "losses/gradient_norm" in told  # not finite: reported at once
    first, *ends = [step for tag, _, step in reports if tag == "charts/final_epsilon_6"]
    assert first == 40 and reports[0][:2] == ("charts/final_epsilon_6", pytest.approx(0.7))
    returns = [value for tag, value, _ in reports if tag == "charts/episodic_return"]
    rewards = torch.cat([segment.r_t for segment in played]).unflatten(0, (-1, 10))
    assert returns == rewards.sum(1).flatten().tolist() and len(ends) == len(returns)
    assert len(ends) == 3 * ((steps[-1] - 40) // 30)
    assert (final_epsilons[:6] == 0.7).all() and (final_epsilons[7] == 0.7).all()
    assert set(final_epsilons[6].tolist()) <= set(torch.tensor([0.1, 0.01, 0.5]).tolist())


def test_math_orthogonal_init(tmp_path, monkeypatch):
    monkeypatch.setattr(async_nstep_q, "supervise", lambda *arguments: arguments)
    args = Args(**TOY, orthogonal_init=True, run_dir=str(tmp_path))
    _, (_, _, net, target_net, *_), *_ = async_nstep_q.main(args)
    assert all(map(torch.equal, net.parameters(), target_net.parameters()))
    layers = [layer for layer in net.trunk if hasattr(layer, "weight")]
    for layer, gain in [(layer, 2**0.5) for layer in layers] + [(net.value, 0.01)]:
        W = layer.weight.detach().flatten(1)
        torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), atol=1e-4, rtol=1e-4)
        assert not layer.bias.any()
    assert len(layers) == 3


def test_math_the_workers_start_with_one_network_and_many_exploration_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(async_nstep_q, "supervise", lambda *arguments: arguments)
    args = dataclasses.replace(Args(**TOY), envs_per_worker=30, run_dir=str(tmp_path))
    args = dataclasses.replace(args, rmsprop_eps=0.3, rmsprop_decay=0.7, rmsprop_start=0.25)
    _, arguments, *_, save, _ = async_nstep_q.main(args)
    _, first_step, net, target_net, optimizer, final_epsilons, *_ = arguments
    assert first_step == 0 and (optimizer.eps, optimizer.decay) == (0.3, 0.7)
    assert all((g == 0.25).all() for g in optimizer.g)
    assert all(map(torch.equal, net.parameters(), target_net.parameters()))
    assert all(len(rates.unique()) == 3 for rates in final_epsilons)

    with torch.no_grad():  # a checkpoint holds what the workers have made of them
        for t in (net.value.bias, target_net.value.weight, optimizer.g[2], final_epsilons):
            t.fill_(7)
    save(T=5, seconds=1.0)
    saved = torch.load(tmp_path / "checkpoint.pt")
    for t in (saved["net"]["value.bias"], saved["target_net"]["value.weight"], saved["g"][2]):
        assert (t == 7).all()
    assert (saved["final_epsilons"] == 7).all()
    on = dataclasses.replace(args, run_dir="", resume=str(tmp_path / "checkpoint.pt"))
    _, (_, first_step, *_), *_, seconds, _, _ = async_nstep_q.main(on)
    assert first_step == 5  # so that the workers draw other numbers than before
    assert seconds == 1


def test_math_every_worker_draws_its_own_random_numbers(monkeypatch):
    args = Args(**TOY, total_timesteps=10, envs_per_worker=2)
    seeds, reset_games = [], async_nstep_q.reset_games

    def noting_seeds(envs, given):
        seeds.extend((torch.initial_seed(), int(np.random.get_state()[1][0]), *given))
        return reset_games(envs, given)

    monkeypatch.setattr(async_nstep_q, "reset_games", noting_seeds)
    for rank in range(3):
        net = QNetwork(2, "small")
        arguments = (args, 0, net, net, None, torch.zeros(3, 2), Locked(0), UNHEARD)
        work_here(
            monkeypatch, async_nstep_q, rank, arguments, lambda *_: {"losses/gradient_norm": 1.0}
        )
    assert len(set(seeds)) == 3 * 4


def test_math_each_game_redraws_its_own_final_rate(monkeypatch):
    """Every draw is another number: three games that end make three draws, one each."""
    args = Args(**TOY, envs_per_worker=3, total_timesteps=30)
    draws = iter(range(1, 1000))
    net, final_epsilons, optimizer = QNetwork(2, "small"), torch.zeros(2, 3), object()
    arguments = (args, 0, net, net, optimizer, final_epsilons, Locked(0), UNHEARD)

    def update(net, target_net, given_optimizer, *_):
        assert given_optimizer is optimizer
        return {"losses/gradient_norm": 1.0}

    def draw(count):
        return torch.tensor([float(next(draws)) for _ in range(count)])

    monkeypatch.setattr(async_nstep_q, "draw_final_epsilons", draw)
    work_here(monkeypatch, async_nstep_q, 1, arguments, update)
    assert final_epsilons.tolist() == [[0, 0, 0], [1, 2, 3]]


def test_math_the_learning_rate_ends_at_0_and_never_below(monkeypatch):
    args = Args(**TOY, envs_per_worker=3, total_timesteps=20, learning_rate=0.5)
    net, rates = QNetwork(2, "small"), []
    arguments = (args, 0, net, net, None, torch.zeros(1, 3), Locked(0), UNHEARD)

    def update(net, target_net, optimizer, segment, learning_rate, args):
        rates.append(learning_rate)
        return {"losses/gradient_norm": 1.0}

    work_here(monkeypatch, async_nstep_q, 0, arguments, update)
    assert rates == [0.125, 0]  # 15 steps a segment


def test_math_every_hundredth_update_is_reported(monkeypatch):
    args = Args(**TOY, t_max=1, total_timesteps=250)
    net, told = QNetwork(2, "small"), []
    log = SimpleNamespace(put=told.append)
    arguments = (args, 0, net, net, None, torch.zeros(1, 1), Locked(0), log)
    watched = {"losses/gradient_norm": 1.0, "losses/td_loss": 2.0}
    work_here(monkeypatch, async_nstep_q, 0, arguments, lambda *_: watched)
    reported = [(tag, value, step) for tag, value, step in told if tag in watched]
    assert reported == [(tag, value, step) for step in (100, 200) for tag, value in watched.items()]


@pytest.mark.parametrize(
    "algorithm", ["nstep-q", "onestep-sarsa", pytest.param("onestep-q", marks=pytest.mark.slow)]
)
def test_learns_the_toy_game(algorithm, tmp_path):
    """With 5 % of random actions the optimum is 9.75 of ten points, five are chance."""
    args = Args(**TOY, algorithm=algorithm, total_timesteps=10_000, learning_rate=2e-3)
    args = dataclasses.replace(args, epsilon_timesteps=5000, target_period=500, discount=0.9)
    args = dataclasses.replace(args, envs_per_worker=4, report_every=4000, run_dir=str(tmp_path))
    metrics = async_nstep_q.main(dataclasses.replace(args, eval_episodes=20, capture_video=True))
    assert metrics["eval/episodic_return"] > 9
    assert multiprocessing.active_children() == []
    (film,) = tmp_path.glob("game_*.gif")
    assert film.stat().st_size > 0
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert {"charts/final_epsilon_0", "charts/final_epsilon_1"} <= {tag for _, tag, _ in rows}

    checkpoint = str(tmp_path / "checkpoint.pt")
    evaluating = dataclasses.replace(args, evaluate=checkpoint, run_dir="", eval_episodes=20)
    evaluated = async_nstep_q.main(evaluating)
    at_random = async_nstep_q.main(dataclasses.replace(evaluating, eval_epsilon=1.0))
    assert 3.5 < at_random["eval/episodic_return"] < 6.5
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}


def test_learns_on_from_where_it_stopped(tmp_path):
    args = Args(**TOY, total_timesteps=1000, target_period=400, run_dir=str(tmp_path))
    args = dataclasses.replace(args, envs_per_worker=8)
    async_nstep_q.main(args)
    before = torch.load(tmp_path / "checkpoint.pt")
    assert 1000 <= before["T"] < 1080
    different = [not torch.equal(before["net"][n], before["target_net"][n]) for n in before["net"]]
    assert all(different)  # the target network is that of step 800
    on = dataclasses.replace(args, run_dir="", resume=str(tmp_path / "checkpoint.pt"))
    on = dataclasses.replace(on, learning_rate=0.0, rmsprop_decay=1.0, t_max=3)
    # a segment of each worker, in which neither a game ends nor a period: all stays as it was
    async_nstep_q.main(dataclasses.replace(on, total_timesteps=before["T"] + 1))
    after = torch.load(tmp_path / "checkpoint.pt")
    assert before["T"] < after["T"] < before["T"] + 49
    assert torch.equal(after["final_epsilons"], before["final_epsilons"])
    for part in ("net", "target_net"):
        assert all(torch.equal(after[part][name], before[part][name]) for name in before[part])
    assert all(torch.equal(a, b) for a, b in zip(after["g"], before["g"]))
    async_nstep_q.main(dataclasses.replace(on, total_timesteps=after["T"] + 1, envs_per_worker=3))
    assert torch.load(tmp_path / "checkpoint.pt")["final_epsilons"].shape == (2, 3)
    with pytest.raises(SystemExit, match=r"is at step \d+: raise --total-timesteps"):
        async_nstep_q.main(on)


def test_bad_input_a_game_that_crashes_ends_the_run(tmp_path):
    args = dataclasses.replace(Args(**TOY), env_id="toy_games:Crashing-v0", run_dir=str(tmp_path))
    with pytest.raises(mp.ProcessRaisedException, match="ZeroDivisionError"):
        async_nstep_q.main(args)
    assert multiprocessing.active_children() == []


# ---- Bad input ----------------------------------------------------------------------------------


def test_bad_input_ctrl_c_before_training_is_a_sentence(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(async_nstep_q, "make_env", interrupted)
    with pytest.raises(SystemExit, match=r"^Stopped\.$"):
        async_nstep_q.main(Args(**TOY))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "BrekoutNoFrameskip-v4"}, "No game.*BreakoutNoFrameskip-v4"),
        ({"env_id": "toy_games:Analogue-v0"}, "Discrete actions"),
        ({"env_id": "toy_games:Broken-v0"}, "No game toy_games:Broken-v0: no screen"),
        ({"t_max": 0}, "--t-max must lie between 1"),
        ({"target_period": 0}, "--target-period must lie between 1"),
        ({"epsilon_timesteps": 0}, "--epsilon-timesteps must lie between 1"),
        ({"resume": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        (
            {"resume": "good.pt", "network": "large"},
            "made with --network small, not with --network large",
        ),
        (
            {"resume": "good.pt", "algorithm": "onestep-q"},
            "made with --algorithm nstep-q, not with --algorithm onestep-q",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(**TOY)
    state = {"net": QNetwork(2, "small").state_dict(), "args": dataclasses.asdict(args)}
    async_nstep_q.save_checkpoint(Path("good.pt"), **state)
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        async_nstep_q.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str)
    assert [path.name for path in tmp_path.iterdir()] == ["good.pt"]


@pytest.mark.parametrize(
    "algorithm",
    ["nstep-q", *(pytest.param(a, marks=pytest.mark.slow) for a in ("onestep-q", "onestep-sarsa"))],
)
def test_command_line(algorithm, tmp_path):
    command = [sys.executable, str(ROOT / "async_nstep_q.py"), "--algorithm", algorithm]
    command += ["--total-timesteps", "300", "--num-workers", "2", "--eval-episodes", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "eval/episodic_return" in done.stdout
    (checkpoint,) = tmp_path.glob(f"runs/Breakout*_{algorithm}__async_nstep_q__1__*/checkpoint.pt")
    assert torch.load(checkpoint)["T"] >= 300
