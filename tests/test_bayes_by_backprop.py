"""bayes_by_backprop.py against torch.distributions, hand-written gradients and its own runs.

Public mistakes that these tests would catch: a mixture of whole-layer likelihoods or of logarithms,
(2 sigma)^2 for 2 sigma^2, a mean over weights for a sum, 2^M - i or the batch size in the KL
weights, exp(rho) for softplus(rho) in one of two places, the log of a sum of densities, pruned
weights that keep their noise, log(0) far from a narrow prior, a KL of another scale than the
likelihood, averaged log-probabilities, a sigma computed once, eps in the gradient of log q.
"""

import dataclasses
import math
import signal
import subprocess
import sys
from itertools import starmap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import ROOT
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

import bayes_by_backprop as bbb
from bayes_by_backprop import Args, PointEstimate, Prior, WeightPosterior

MIXTURE = Prior(0.25, math.exp(-1), math.exp(-6))
TINY = {"dataset": "digits", "hidden_units": 32, "eval_samples": 3}
BENIGN = {"task": "bandit", "bandit_data": "breast-cancer", "dataset": "mnist"}


def mixture(prior):
    parts = Normal(torch.zeros(2).double(), torch.tensor([prior.sigma_1, prior.sigma_2]).double())
    return MixtureSameFamily(Categorical(torch.tensor([prior.pi, 1 - prior.pi]).double()), parts)


# ---- Prior and posterior ------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [MIXTURE, Prior(0.5, 1.0, 0.1), Prior(0.75, 0.3, 0.3)])
def test_math_prior_is_a_mixture_for_each_weight(prior):
    w = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([1e-3, -4e-3, 0.0])]).double()
    torch.testing.assert_close(prior.log_density(w), mixture(prior).log_prob(w))
    w.requires_grad_()
    (expected,) = torch.autograd.grad(mixture(prior).log_prob(w).sum(), w)
    torch.testing.assert_close(prior.score(w.detach()), expected)


def test_math_prior_is_finite_far_from_its_narrow_part():
    w = torch.tensor([0.5, 3.0, -20.0])
    assert torch.isfinite(MIXTURE.log_density(w)).all() and torch.isfinite(MIXTURE.score(w)).all()
    narrow = Prior(0.5, 1e-3, 1e-3)
    assert torch.isfinite(narrow.log_density(w)).all() and torch.isfinite(narrow.score(w)).all()


def test_math_log_q_is_the_density_of_the_sample():
    mu, rho, eps = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    sigma = torch.log(1 + torch.exp(rho))
    w, kl = bbb.SampledWeights.apply(mu, rho, eps, MIXTURE, True)
    torch.testing.assert_close(w, mu + sigma * eps)
    log_q = Normal(mu, sigma).log_prob(w)
    torch.testing.assert_close(bbb.log_q(eps, sigma), log_q)
    torch.testing.assert_close(kl, (log_q - mixture(MIXTURE).log_prob(w)).sum())


@pytest.mark.parametrize("valued", [True, False])
def test_gradient_of_the_cost_is_that_of_the_paper(valued):
    """d_mu = df/dw + df/dmu, d_rho = df/dw eps / (1 + exp(-rho)) + df/drho, f written out."""
    torch.manual_seed(0)
    mu, rho, eps = (torch.randn(9, dtype=torch.float64) for _ in range(3))
    prior, pi_i, target = Prior(0.25, 0.5, 0.05), 0.3, torch.randn(9, dtype=torch.float64)
    ours = [p.clone().requires_grad_() for p in (mu, rho)]
    w, kl = bbb.SampledWeights.apply(*ours, eps, prior, valued)
    (pi_i * kl + (w - target).pow(4).sum()).backward()
    assert (kl == 0) == (not valued)

    w, mu, rho = (p.clone().requires_grad_() for p in (w.detach(), mu, rho))
    f = pi_i * (Normal(mu, F.softplus(rho)).log_prob(w) - mixture(prior).log_prob(w)).sum()
    f_w, f_mu, f_rho = torch.autograd.grad(f + (w - target).pow(4).sum(), (w, mu, rho))
    torch.testing.assert_close(ours[0].grad, f_w + f_mu)
    torch.testing.assert_close(ours[1].grad, f_w * eps / (1 + (-rho).exp()) + f_rho)


def test_gradient_check():
    mu, rho = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    eps = torch.randn(6, dtype=torch.float64)
    prior = Prior(0.4, 0.9, 0.2)
    assert torch.autograd.gradcheck(
        lambda mu, rho: bbb.SampledWeights.apply(mu, rho, eps, prior, True), (mu, rho)
    )


def test_math_kl_against_its_closed_form_for_a_gaussian_prior():
    torch.manual_seed(0)
    weights, prior = WeightPosterior((5, 4, 3), -1.0), Prior(0.3, 0.7, 0.7)
    sampled = torch.stack([weights.sample(prior)[1].detach() for _ in range(4000)])
    q = Normal(weights.mu, F.softplus(weights.rho))
    exact = kl_divergence(q, Normal(torch.zeros(()), torch.tensor(0.7))).sum()
    error = sampled.std() / math.sqrt(len(sampled))
    assert abs(sampled.mean() - exact) < 4 * error < 0.05 * exact


def test_math_samples_follow_mu_and_rho_as_they_are():
    torch.manual_seed(0)
    weights = WeightPosterior((20, 20, 2), -3.0)
    for sample in (weights.draw, lambda: weights.sample(MIXTURE)[0].detach()):
        for rho in (-3.0, 0.5):
            with torch.no_grad():
                weights.rho.fill_(rho)
            w = torch.stack([sample() for _ in range(300)])
            sigma = math.log(1 + math.exp(rho))
            assert (w - weights.mu).std().item() == pytest.approx(sigma, rel=0.02)
            assert (w.mean(0) - weights.mu).abs().max().item() < 6 * sigma / math.sqrt(300)
    torch.testing.assert_close(weights.mean(), weights.mu.detach())


# ---- Cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 10, 469, 2000])
@pytest.mark.parametrize("weighting", ["blundell", "uniform"])
def test_math_kl_weights_sum_to_one(M, weighting):
    weights = [bbb.kl_weight(i, M, weighting) for i in range(1, M + 1)]
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12) and min(weights) >= 0
    if weighting == "uniform":
        assert weights == [1 / M] * M
    elif M == 10:
        assert weights == pytest.approx([2 ** (M - i) / (2**M - 1) for i in range(1, M + 1)])


def test_math_costs_of_an_epoch_sum_to_the_free_energy():
    torch.manual_seed(0)
    weights, sizes = WeightPosterior((4, 5, 3), -3.0), (4, 5, 3)
    x, y = torch.randn(23, 4), torch.randint(3, (23,))
    fixed = weights.sample(MIXTURE)
    weights.sample = lambda prior, valued: fixed

    def error(examples):
        return lambda w: F.cross_entropy(
            bbb.network(x[examples], w, sizes), y[examples], reduction="sum"
        )

    batches = torch.arange(23).split(5)
    costs = [
        sum(bbb.minibatch_cost(weights, error(batch), bbb.kl_weight(i, 5, how), MIXTURE, 2))
        for how in ("blundell",)
        for i, batch in enumerate(batches, start=1)
    ]
    kl, errors = bbb.minibatch_cost(weights, error(torch.arange(23)), 1.0, MIXTURE, 1)
    torch.testing.assert_close(sum(costs), kl + errors)
    torch.testing.assert_close(kl, fixed[1])


def test_math_the_same_sample_stands_in_all_terms():
    weights = WeightPosterior((2, 2, 1), -1.0)
    seen = []
    sample = weights.sample

    def noting(prior, valued):
        seen.append(sample(prior, valued))
        return seen[-1]

    weights.sample = noting
    kl, error = bbb.minibatch_cost(weights, lambda w: w.square().sum(), 0.5, MIXTURE, 3)
    assert len(seen) == 3
    torch.testing.assert_close(kl, 0.5 * sum(k for _, k in seen) / 3)
    torch.testing.assert_close(error, sum(w.square().sum() for w, _ in seen) / 3)


def test_math_the_step_descends_the_cost_by_the_batch_size():
    weights = PointEstimate((2, 3, 1))
    before = weights.w.detach().clone()
    args = Args(optimizer="sgd", learning_rate=0.1)
    optimizer = bbb.make_optimizer(weights, args)
    error = bbb.update(weights, optimizer, lambda w: w.sum(), 1.0, 5, MIXTURE, 1)
    torch.testing.assert_close(weights.w.detach(), before - 0.1 / 5)
    assert weights.sample(MIXTURE)[1] == 0 and error == pytest.approx(before.sum().item(), rel=1e-4)
    assert not error.requires_grad


def test_gradient_of_a_step_has_both_terms_of_the_cost():
    weights, args = WeightPosterior((4, 3, 2), -1.0), Args(optimizer="sgd", learning_rate=0.1)
    before = [p.detach().clone() for p in (weights.mu, weights.rho)]
    optimizer, cost = bbb.make_optimizer(weights, args), (lambda w: w.square().sum(), 0.3)
    torch.manual_seed(0)
    kl, error = bbb.minibatch_cost(weights, *cost, MIXTURE, 2)
    d_mu, d_rho = torch.autograd.grad(kl + error, (weights.mu, weights.rho))
    torch.manual_seed(0)
    assert bbb.update(weights, optimizer, *cost, 5, MIXTURE, 2) == error
    torch.testing.assert_close(weights.mu.detach(), before[0] - 0.1 / 5 * d_mu)
    torch.testing.assert_close(weights.rho.detach(), before[1] - 0.1 / 5 * d_rho)


# ---- Network ------------------------------------------------------------------------------------


def test_math_without_noise_it_is_the_plain_network():
    sizes, x = (6, 5, 4, 3), torch.randn(7, 6)
    torch.manual_seed(3)
    weights = WeightPosterior(sizes, -200.0)
    torch.manual_seed(3)
    plain = PointEstimate(sizes)
    layers, start = [], 0
    for n, m in ((6, 5), (5, 4), (4, 3)):
        layer = torch.nn.Linear(n, m)
        with torch.no_grad():
            layer.weight[:] = plain.w[start : start + m * n].view(m, n)
            layer.bias[:] = plain.w[start + m * n : start + m * n + m]
        start += m * n + m
        layers += [layer, torch.nn.ReLU()]
    expected = torch.nn.Sequential(*layers[:-1])(x)
    assert start == len(plain.w)
    for w in (weights.draw(), weights.mean(), weights.sample(MIXTURE)[0], plain.draw()):
        torch.testing.assert_close(bbb.network(x, w, sizes), expected)


@pytest.mark.parametrize("width, count", [(400, 478_410), (800, 1_276_810), (1200, 2_395_210)])
def test_math_networks_have_the_papers_sizes(width, count):
    weights = WeightPosterior((784, width, width, 10), -5.0)
    assert len(weights.mu) == len(weights.rho) == count
    first = weights.mu[: 784 * width]
    assert first.abs().max().item() == pytest.approx(1 / 28, rel=1e-3) and abs(first.mean()) < 1e-3


def test_math_dropout_of_inputs_and_hidden_units():
    torch.manual_seed(0)
    sizes = (1000, 1000, 1)
    w = torch.cat([torch.eye(1000).flatten(), torch.zeros(1000), torch.ones(1000), torch.zeros(1)])
    x = torch.ones(200, 1000)
    out = bbb.network(x, w, sizes, (0.2, 0.5))
    assert out.mean().item() == pytest.approx(1000, rel=0.01)  # scaled up by 1 / (1 - p)
    variance = 1000 * (1 / (0.8 * 0.5) - 1)
    assert out.var().item() == pytest.approx(variance, rel=0.3)
    assert (bbb.network(x, w, sizes) == 1000).all()


def test_math_probabilities_are_averaged_not_their_logarithms():
    torch.manual_seed(0)
    sizes = (4, 6, 3)
    weights, x = WeightPosterior(sizes, 1.0), torch.randn(5, 4)
    torch.manual_seed(7)
    expected = sum(bbb.network(x, weights.draw(), sizes).softmax(1) for _ in range(4)) / 4
    torch.manual_seed(7)
    torch.testing.assert_close(bbb.class_probabilities(weights, x, sizes, 4), expected)
    of_mean = bbb.network(x, weights.mean(), sizes).softmax(1)
    torch.testing.assert_close(bbb.class_probabilities(weights, x, sizes, 0), of_mean)


# ---- Pruning ------------------------------------------------------------------------------------


def test_math_pruned_weights_are_zero_without_noise():
    torch.manual_seed(0)
    weights = WeightPosterior((10, 10, 10), -1.0)
    with torch.no_grad():
        weights.rho.uniform_(-3, 0)
    snr = weights.mu.abs() / F.softplus(weights.rho)
    weights.prune(0.75)
    assert (~weights.kept).sum().item() == round(0.75 * 220)
    assert snr[~weights.kept].max() <= snr[weights.kept].min()
    torch.testing.assert_close(weights.signal_to_noise(), snr.detach())
    for w in (weights.draw(), weights.draw(), weights.mean()):
        assert (w[~weights.kept] == 0).all() and (w[weights.kept] != 0).all()
    weights.prune(0.0)
    assert weights.kept.all()


def test_gradient_of_training_is_not_changed_by_pruning():
    torch.manual_seed(0)
    weights = WeightPosterior((4, 3, 2), -1.0)
    gradients = []
    for fraction in (0.0, 0.9):
        weights.prune(fraction)
        torch.manual_seed(1)
        w, kl = weights.sample(MIXTURE)
        gradients.append(torch.autograd.grad(kl + w.square().sum(), [weights.mu, weights.rho]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ---- Regression and bandit ----------------------------------------------------------------------


def test_math_curve_is_the_papers():
    torch.manual_seed(0)
    x, y = bbb.make_curve(100_000)
    assert 0 <= x.min() < 0.01 and 0.49 < x.max() <= 0.5
    clean = x + 0.3 * torch.sin(2 * math.pi * x) + 0.3 * torch.sin(4 * math.pi * x)
    near_0 = x[:, 0] < 0.005  # there the slope is 1 + 0.3 * 6 pi: eps enters three times
    slope = 1 + 0.3 * 2 * math.pi + 0.3 * 4 * math.pi
    assert (y - clean)[near_0].std().item() == pytest.approx(0.02 * slope, rel=0.15)
    at_half = x[:, 0] > 0.495
    slope = 1 - 0.3 * 2 * math.pi + 0.3 * 4 * math.pi
    assert (y - clean)[at_half].std().item() == pytest.approx(0.02 * slope, rel=0.15)


def test_math_quartiles_of_a_known_predictive():
    torch.manual_seed(0)
    weights = PointEstimate((1, 3, 1))
    x = torch.zeros(2, 1)
    f = bbb.network(x, weights.draw(), (1, 3, 1))[0].item()
    low, median, high = bbb.predictive_quartiles(weights, x, (1, 3, 1), 2.0, 20_000)
    assert median[0].item() == pytest.approx(f, abs=0.06)
    assert (high - low)[0].item() == pytest.approx(2 * 0.6745 * 2, rel=0.05)


def test_math_rewards_and_regret():
    eat, leave = torch.tensor(1), torch.tensor(0)
    edible, poisonous = torch.tensor(True), torch.tensor(False)
    lucky, unlucky = torch.tensor(True), torch.tensor(False)
    for luck in (lucky, unlucky):
        assert bbb.reward(eat, edible, luck) == 5 and bbb.reward(leave, edible, luck) == 0
        assert bbb.reward(leave, poisonous, luck) == 0
    assert bbb.reward(eat, poisonous, lucky) == 5 and bbb.reward(eat, poisonous, unlucky) == -35
    torch.manual_seed(0)
    are_edible, luck = torch.rand(100_000) < 0.518, torch.rand(100_000) < 0.5
    oracle = bbb.oracle_reward(are_edible)
    assert (oracle - bbb.reward(are_edible.long(), are_edible, luck) == 0).all()
    at_random = bbb.reward(torch.randint(2, (100_000,)), are_edible, luck)
    expected = 0.5 * (0.518 * 5 + 0.482 * 15)
    assert (oracle - at_random).mean().item() == pytest.approx(expected, rel=0.03)


def test_math_agents_choose_the_action_of_higher_value(monkeypatch):
    """Thompson sampling adds up two draws; the percentage is of random actions."""
    sizes, context, drawn = (3, 1), torch.tensor([0.3]), []

    class Fixed:
        def draw(self):
            drawn.append(1)
            return torch.tensor([0.0, 1.0, 2.0, 0.0]) * (-1 if drawn == [1] and flip else 1)

    for agent, draws in (("bbb", 2), ("greedy", 1)):
        flip, drawn[:] = False, []
        assert bbb.choose(Fixed(), context, sizes, agent, 0) == 1 and len(drawn) == draws
    flip, drawn[:] = True, []
    assert bbb.choose(Fixed(), context, sizes, "greedy", 0) == 0
    torch.manual_seed(0)
    flip = False
    chosen = [bbb.choose(Fixed(), context, sizes, "greedy-5", 50) for _ in range(2000)]
    assert np.mean(chosen) == pytest.approx(0.75, abs=0.04)


def test_math_mistakes_are_counted_over_all_mushrooms():
    """An agent that eats all in one draw and nothing in the next; its own noise is left alone."""
    contexts, edible = torch.zeros(10, 1), torch.arange(10) < 3
    always, never = torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])

    class Alternating:
        def __init__(self, *draws):
            self.draws = list(draws)

        def draw(self):
            self.draws.append(self.draws.pop(0) + 0 * torch.randn(4))
            return self.draws[-1]

    def counted(agent, *draws):
        args = Args(task="bandit", agent=agent, eval_samples=4)
        return bbb.mistakes(Alternating(*draws), contexts, edible, (3, 1), args)

    before = torch.get_rng_state()
    half = {"eval/edible_left": 15.0, "eval/poisonous_eaten": 35.0}
    assert counted("greedy", always, never) == pytest.approx(half)
    everything = {"eval/edible_left": 0.0, "eval/poisonous_eaten": 70.0}
    assert counted("bbb", 2 * always, never) == pytest.approx(everything)
    assert (torch.get_rng_state() == before).all()


def test_math_mushrooms_are_read_as_published(tmp_path):
    (tmp_path / "mushroom").mkdir()
    rows = ["e," + ",".join("ab" * 11), "p," + ",".join("ba" * 11), "e," + ",".join("aa" * 11)]
    path = tmp_path / "mushroom" / "agaricus-lepiota.data"
    path.write_text("\n".join(rows) + "\n")
    x, edible = bbb.load_mushrooms(str(tmp_path))
    assert x.shape == (3, 44) and edible.tolist() == [True, False, True]
    assert (x.sum(1) == 22).all() and x[0, :4].tolist() == [1, 0, 0, 1]
    path.write_text("e,x\n")
    with pytest.raises(SystemExit, match="damaged"):
        bbb.load_mushrooms(str(tmp_path))
    x, benign = bbb.load_breast_cancer()
    assert x.shape == (569, 30) and 350 < benign.sum() < 360
    assert x.mean().abs() < 1e-5 and x.std(0).mean().item() == pytest.approx(1, abs=0.01)


# ---- Runs ---------------------------------------------------------------------------------------


def without_times(metrics):
    return {k: v for k, v in metrics.items() if k not in ("charts/SPS", "charts/minutes")}


def test_learns_at_the_tasks_own_rate_unless_one_is_given():
    assert bbb.learning_rate_at(1, Args()) == 1e-3
    assert bbb.learning_rate_at(3, Args()) == pytest.approx(1e-3 * 0.96**2)
    assert bbb.learning_rate_at(1, Args(task="bandit")) == 1e-5
    given = Args(task="bandit", learning_rate=0.1)
    assert bbb.make_optimizer(WeightPosterior((4, 2), -1.0), given).param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("method", ["bbb", "sgd", "dropout"])
def test_learns_digits_and_goes_on_bit_for_bit(method, tmp_path):
    rates = dict(learning_rate=6e-3, learning_rate_decay=0.9)
    args = Args(method=method, **TINY, **rates, epochs=6, batch_size=32)
    metrics = bbb.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    optimizer = torch.load(tmp_path / "whole/checkpoint.pt")["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(6e-3 * 0.9**5)
    assert metrics["charts/learning_rate"] == pytest.approx(6e-3 * 0.9**5)
    assert metrics["eval/error"] < 45  # 90 is chance
    rows = [r.split(",") for r in (tmp_path / "whole/metrics.csv").read_text().splitlines()]
    errors = [float(v) for _, tag, v in rows if tag == "validation/error_of_mean"]
    tested = [float(v) for _, tag, v in rows if tag == "test/error_of_mean"]
    chosen = errors.index(min(errors))
    assert metrics["charts/chosen_epoch"] == chosen + 1
    assert metrics["eval/error_of_mean"] == tested[chosen]

    half = dataclasses.replace(args, epochs=3, run_dir=str(tmp_path / "half"))
    bbb.main(half)
    path = str(tmp_path / "half" / "checkpoint.pt")
    torch.save(torch.load(path) | {"seconds": 6000.0}, path)
    resumed = bbb.main(dataclasses.replace(args, resume=path))
    assert without_times(resumed) == without_times(metrics)
    assert 100 < resumed["charts/minutes"] < 101
    evaluated = bbb.main(dataclasses.replace(args, evaluate=path))
    assert evaluated == {tag: metrics[tag] for tag in evaluated}
    assert (tmp_path / "half/weights.png").stat().st_size > 0
    if method == "bbb":  # pruned are the weights of the end, not those chosen
        assert evaluated["eval/error_of_mean_pruned_0"] == tested[-1]
        assert len([tag for tag in evaluated if "pruned" in tag]) == 10
        assert (tmp_path / "half/pruning.png").stat().st_size > 0


def test_learns_the_curve_and_is_less_sure_outside_it(tmp_path):
    args = Args(task="regression", epochs=300, hidden_units=50, learning_rate=5e-3, rho_init=-3.0)
    args = dataclasses.replace(args, prior="gaussian", prior_sigma_1=1.0)
    metrics = bbb.main(dataclasses.replace(args, run_dir=str(tmp_path)))
    assert metrics["eval/plain_error_inside"] < 0.1 and metrics["eval/bbb_error_inside"] < 0.15
    growth = metrics["eval/bbb_band_outside"] / metrics["eval/bbb_band_inside"]
    assert (
        growth > 1.5 > 1.1 > metrics["eval/plain_band_outside"] / metrics["eval/plain_band_inside"]
    )
    assert (tmp_path / "regression.png").stat().st_size > 0
    (tmp_path / "regression.png").unlink()
    checkpoint = str(tmp_path / "checkpoint.pt")
    evaluated = bbb.main(dataclasses.replace(args, evaluate=checkpoint))
    assert evaluated == {tag: metrics[tag] for tag in evaluated} and len(evaluated) == 6
    assert (tmp_path / "regression.png").stat().st_size > 0


@pytest.mark.parametrize("agent", ["bbb", "greedy-5"])
def test_learns_what_to_eat_and_goes_on_bit_for_bit(agent, tmp_path):
    args = Args(task="bandit", bandit_data="breast-cancer", agent=agent, interactions=70)
    args = dataclasses.replace(args, report_every=35, hidden_units=16, learning_rate=3e-3)
    metrics = bbb.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    half = dataclasses.replace(args, interactions=35, run_dir=str(tmp_path / "half"))
    bbb.main(half)
    path = str(tmp_path / "half" / "checkpoint.pt")
    assert without_times(bbb.main(dataclasses.replace(args, resume=path))) == without_times(metrics)
    assert metrics["charts/SPS"] > 0 and metrics["charts/learning_rate"] == 3e-3
    assert metrics["charts/regret"] < 200  # expected of leaving all: 220, of a random agent: 306
    assert metrics["eval/edible_left"] + metrics["eval/poisonous_eaten"] < 30  # eating all: 37
    for moved in (False, True):  # a checkpoint without its run has no curve
        (tmp_path / "half" / "regret.png").unlink()
        if moved:
            (tmp_path / "half" / "metrics.csv").unlink()
        evaluated = bbb.main(dataclasses.replace(args, evaluate=path))
        assert len(evaluated) == 2 and evaluated == {tag: metrics[tag] for tag in evaluated}
        assert (tmp_path / "half" / "regret.png").exists() != moved
    assert (tmp_path / "whole" / "regret.png").stat().st_size > 0


# ---- What a run does with the method ------------------------------------------------------------


def test_math_the_wide_part_comes_first():
    assert bbb.make_prior(Args()) == Prior(0.25, 1.0, 0.368)
    assert bbb.make_prior(Args(prior="gaussian", prior_sigma_1=0.5)) == Prior(0.25, 0.5, 0.5)


@pytest.mark.parametrize("task", ["mnist", "regression", "bandit"])
@pytest.mark.parametrize("weighting", ["blundell", "uniform"])
def test_math_shares_of_a_run_sum_to_one_in_an_epoch(task, weighting, tmp_path, monkeypatch):
    shares, update = [], bbb.update

    def noting(weights, optimizer, error, pi_i, *rest):
        shares.extend([pi_i] * isinstance(weights, WeightPosterior))
        return update(weights, optimizer, error, pi_i, *rest)

    monkeypatch.setattr(bbb, "update", noting)
    args = Args(task=task, kl_weighting=weighting, run_dir=str(tmp_path), hidden_units=32)
    short = {"mnist": {"dataset": "digits", "epochs": 1}, "regression": {"epochs": 1}}
    short["bandit"] = {"bandit_data": "breast-cancer", "interactions": 1}
    bbb.main(dataclasses.replace(args, **short[task]))
    assert math.fsum(shares) == pytest.approx(1, abs=1e-9) and len(shares) in (8, 10, 64)
    assert (shares[0] >= 0.5) == (weighting == "blundell")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["bbb", "dropout", "sgd"])
def test_math_recorded_steps_train_as_those_made_one_by_one(method, monkeypatch, tmp_path):
    errors = []
    for learn_from in (bbb.learn_from, lambda minibatches, learn: starmap(learn, minibatches)):
        monkeypatch.setattr(bbb, "learn_from", learn_from)
        flags = {"method": method, "epochs": 2, "batch_size": 32, "device": "cuda"}
        run_dir = str(tmp_path / str(len(errors)))
        errors.append(bbb.main(Args(**TINY, **flags, run_dir=run_dir))["losses/error"])
    assert errors[0] == pytest.approx(errors[1], rel=0.2 if method == "dropout" else 0.05)


def test_learns_on_with_an_optimizer_fit_for_its_own_device(tmp_path):
    """Only a GPU's steps are recorded, for which Adam must be capturable, wherever it began."""
    args = Args(**TINY, epochs=1, device="cpu", run_dir=str(tmp_path))
    bbb.main(args)
    path = tmp_path / "checkpoint.pt"
    checkpoint = torch.load(path)
    for group in checkpoint["optimizer"]["param_groups"]:
        assert not group["capturable"]
        group["capturable"] = True  # as after a run on a GPU
    torch.save(checkpoint, path)
    bbb.main(dataclasses.replace(args, epochs=2, run_dir="", resume=str(path)))
    resumed = torch.load(path)
    assert resumed["epoch"] == 2
    assert not any(group["capturable"] for group in resumed["optimizer"]["param_groups"])


def test_math_training_validation_and_test_images_are_apart(tmp_path, monkeypatch):
    def load(split):  # every pixel of an image is its number
        n = torch.arange(240) if split == "train" else torch.arange(240, 256)
        return n.byte()[:, None, None].repeat(1, 28, 28), n % 10

    seen, network = {True: [], False: []}, bbb.network

    def noting(x, *rest):
        seen[torch.is_grad_enabled()].append((x[:, 0] * 126).round().long().tolist())
        return network(x, *rest)

    monkeypatch.setattr(bbb, "load_digits", load)
    monkeypatch.setattr(bbb, "network", noting)
    bbb.main(Args(**TINY, method="sgd", epochs=1, run_dir=str(tmp_path)))
    assert sorted(n for part in seen[True] for n in part) == list(range(200))
    assert seen[False][0] == list(range(200, 240))
    assert seen[False][1:] == [list(range(240, 256))] * (1 + TINY["eval_samples"] + 1)


def test_math_the_chosen_net_is_tested_and_the_last_pruned(tmp_path, monkeypatch):
    monkeypatch.setattr(bbb, "learning_rate_at", lambda epoch, _: 6e-3 * 6 ** (epoch - 1))  # spoils
    args = Args(**TINY, epochs=3, batch_size=32)
    first = dataclasses.replace(args, run_dir=str(tmp_path))
    resumed = dataclasses.replace(args, epochs=4, resume=str(tmp_path / "checkpoint.pt"))
    for again in (first, resumed):
        metrics = bbb.main(again)
        rows = [r.split(",") for r in (tmp_path / "metrics.csv").read_text().splitlines()]
        tested = [float(v) for _, tag, v in rows if tag == "test/error_of_mean"]
        chosen = int(metrics["charts/chosen_epoch"])
        assert chosen < 3 and tested[chosen - 1] != tested[-1]
        assert metrics["eval/error_of_mean"] == tested[chosen - 1]
        assert metrics["eval/error_of_mean_pruned_0"] == tested[-1]


def bandit(tmp_path, monkeypatch, edible, **flags):
    contexts = torch.arange(1.0, 1 + len(edible))[:, None]
    monkeypatch.setattr(bbb, "load_breast_cancer", lambda: (contexts, edible))
    flags = {"bandit_data": "breast-cancer", "hidden_units": 4, "report_every": 1, **flags}
    return bbb.main(Args(task="bandit", run_dir=str(tmp_path), **flags))


def test_math_bandits_likelihood_sums_over_interactions_met(tmp_path, monkeypatch):
    errors = []

    def noting(weights, optimizer, error, *_):
        errors.append(error(torch.zeros_like(weights.mu)).detach())  # every output is 0
        return errors[-1]

    monkeypatch.setattr(bbb, "update", noting)
    monkeypatch.setattr(bbb, "choose", lambda *_: 1)
    bandit(tmp_path, monkeypatch, torch.ones(9).bool(), interactions=2, noise_std=2.0)
    assert errors == [64 * 5**2 / (2 * 2.0**2)] * 2 * 64


@pytest.mark.parametrize("method", ["bbb", "sgd", "dropout"])
def test_math_flags_reach_the_steps_and_dropout_is_for_dropout(method, tmp_path, monkeypatch):
    dropped, told, network = set(), [], bbb.network

    def noting_network(x, w, sizes, dropout=(0.0, 0.0)):
        dropped.add(dropout)
        return network(x, w, sizes, dropout)

    def update(weights, optimizer, error, pi_i, batch_size, prior, samples):
        told.append((batch_size, samples))
        error(weights.mean())
        return torch.tensor(float(len(told)))

    monkeypatch.setattr(bbb, "network", noting_network)
    monkeypatch.setattr(bbb, "update", update)
    samples = {"samples": 3} if method == "bbb" else {}
    args = Args(**TINY, method=method, epochs=1, batch_size=250, run_dir=str(tmp_path), **samples)
    metrics = bbb.main(args)
    assert told == [(250, samples.get("samples", 1))] * 5
    assert dropped == {(0.0, 0.0)} | ({(0.2, 0.5)} if method == "dropout" else set())
    assert metrics["losses/error"] == 1 + 2 + 3 + 4 + 5
    assert metrics["losses/free_energy"] == pytest.approx(metrics["losses/kl"] + 15)
    assert (metrics["losses/kl"] > 100) == (method == "bbb")


def test_math_regression_has_as_many_samples_as_told(tmp_path, monkeypatch):
    told = []

    def update(weights, optimizer, error, pi_i, batch_size, prior, samples):
        told.append((batch_size, samples))
        return torch.tensor(1.0)

    monkeypatch.setattr(bbb, "update", update)
    where = {"hidden_units": 8, "run_dir": str(tmp_path)}
    metrics = bbb.main(Args(task="regression", epochs=1, batch_size=250, samples=3, **where))
    assert told == [(250, 3)] * 2 * 4
    assert metrics["losses/error"] == 4 and metrics["losses/kl"] > 100
    assert metrics["losses/free_energy"] == pytest.approx(metrics["losses/kl"] + 4)


def test_math_momentum_is_that_of_the_flag():
    args = Args(optimizer="sgd", sgd_momentum=0.7)
    (group,) = bbb.make_optimizer(torch.nn.Linear(1, 1), args).param_groups
    assert group["momentum"] == 0.7 and group["lr"] == 1e-3


def test_math_runs_differ_by_their_seeds(tmp_path):
    found = []
    for n, seed in enumerate((1, 2, 1)):
        args = Args(task="regression", hidden_units=8, epochs=1, seed=seed)
        metrics = bbb.main(dataclasses.replace(args, run_dir=str(tmp_path / str(n))))
        found.append(metrics["losses/free_energy"])
    assert found[0] == found[2] != found[1]


def test_math_half_of_the_poisonous_ones_do_no_harm_and_all_met_are_learned_from(
    tmp_path, monkeypatch
):
    lucky, reward, drawn, randint = [], bbb.reward, [], torch.randint

    def noting(eat, edible, luck):
        lucky.append(luck.item())
        return reward(eat, edible, luck)

    def noting_randint(high, size):
        if size == (1, 64):
            drawn.append(high)
        return randint(high, size)

    monkeypatch.setattr(bbb, "STEPS", 1)
    monkeypatch.setattr(bbb, "BUFFER", 300)
    monkeypatch.setattr(bbb, "reward", noting)
    monkeypatch.setattr(bbb.torch, "randint", noting_randint)
    monkeypatch.setattr(bbb, "update", lambda *_: torch.zeros(()))
    bandit(tmp_path, monkeypatch, torch.ones(9).bool(), interactions=400)
    assert np.mean(lucky) == pytest.approx(0.5, abs=0.08)
    assert drawn == [min(n, 300) for n in range(1, 401)]


PERCENT = {"bbb": 0, "greedy": 0, "greedy-1": 1, "greedy-5": 5}


@pytest.mark.parametrize("agent", PERCENT)
def test_math_bandit_counts_and_keeps_what_it_met(agent, tmp_path, monkeypatch):
    met, reward = [], bbb.reward

    def choose(weights, context, sizes, agent, random):
        assert random == PERCENT[agent]
        met.append([context.item(), len(met) % 3 > 0])
        return int(met[-1][1])

    def noting(eat, edible, lucky):
        r = reward(eat, edible, lucky)
        met[-1] += [edible.item(), r.item()]
        return r

    monkeypatch.setattr(bbb, "BUFFER", 16)
    monkeypatch.setattr(bbb, "STEPS", 1)
    monkeypatch.setattr(bbb, "choose", choose)
    monkeypatch.setattr(bbb, "reward", noting)
    metrics = bandit(tmp_path, monkeypatch, torch.arange(9) < 4, agent=agent, interactions=40)
    assert {r for *_, r in met} == {0, 5, -35}
    assert metrics["charts/regret"] == sum(5 * edible - r for _, _, edible, r in met)
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert all((context <= 4) == edible for context, _, edible, _ in met)
    kept = [[context, not eat, eat, r] for context, eat, _, r in met[-16:]]
    kept = torch.tensor(kept).roll(40 % 16, 0)  # a ring: the 40th took the place of the 24th
    assert torch.equal(torch.cat([checkpoint["x"], checkpoint["r"]], 1), kept)


def test_math_regressions_likelihood_has_the_noise_as_a_deviation(tmp_path, monkeypatch):
    errors = []

    def noting(weights, optimizer, error, *_):
        errors.append(error(torch.zeros_like(bbb.initial_weights((1, 4, 4, 1)))))
        return errors[-1]

    monkeypatch.setattr(bbb, "update", noting)
    monkeypatch.setattr(bbb, "make_curve", lambda N: (torch.rand(N, 1), torch.ones(N, 1)))
    args = Args(task="regression", hidden_units=4, epochs=1, batch_size=500, noise_std=0.2)
    bbb.main(dataclasses.replace(args, run_dir=str(tmp_path)))
    torch.testing.assert_close(torch.stack(errors), torch.full((4,), 500 / (2 * 0.2**2)))


def test_learns_regression_and_goes_on_bit_for_bit(tmp_path):
    args = Args(task="regression", hidden_units=8, epochs=4)
    whole = bbb.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    bbb.main(dataclasses.replace(args, epochs=2, run_dir=str(tmp_path / "half")))
    path = str(tmp_path / "half" / "checkpoint.pt")
    torch.save(torch.load(path) | {"seconds": 6000.0}, path)
    resumed = bbb.main(dataclasses.replace(args, resume=path))
    assert without_times(resumed) == without_times(whole)
    assert 100 < resumed["charts/minutes"] < 101 and resumed["charts/SPS"] > 0
    longer = dataclasses.replace(args, epochs=102)  # with a report after 100 of them
    whole = bbb.main(dataclasses.replace(longer, run_dir=str(tmp_path / "longer")))
    bbb.main(dataclasses.replace(args, epochs=100, run_dir=str(tmp_path / "begun")))
    path = str(tmp_path / "begun" / "checkpoint.pt")
    resumed = bbb.main(dataclasses.replace(longer, resume=path))
    assert without_times(resumed) == without_times(whole)
    assert resumed["charts/learning_rate"] == 1e-3


def test_math_cuts_in_the_drawing_are_those_of_pruning(tmp_path, monkeypatch):
    weights = WeightPosterior((10, 10, 10), -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(bbb.plt, "close", lambda _: None)
        bbb.draw_weights(weights, tmp_path / "weights.png")
    axis, snr = plt.gcf().axes[1], weights.signal_to_noise().log10()
    plt.close("all")
    assert len(axis.lines) == len(axis.texts) == 3
    for line, text in zip(axis.lines, axis.texts):
        removed = 100 * (snr < line.get_xdata()[0]).float().mean().item()
        assert removed == pytest.approx(float(text.get_text().strip(" %")), abs=1)


def test_math_curves_of_pruning_bear_their_names(tmp_path, monkeypatch):
    percent = [0.0, 50.0, 75.0, 95.0, 98.0]
    metrics = {f"eval/error_pruned_{x:g}": 2 + x / 2 for x in percent}
    metrics |= {f"eval/error_of_mean_pruned_{x:g}": 1 + x / 4 for x in percent}
    with monkeypatch.context() as patch:
        patch.setattr(bbb.plt, "close", lambda _: None)
        bbb.draw_pruning(metrics, tmp_path / "pruning.png")
    shown = {line.get_label(): line.get_xydata().tolist() for line in plt.gca().lines}
    plt.close("all")
    assert shown["networks drawn"] == [[x, 2 + x / 2] for x in percent]
    assert shown["mean"] == [[x, 1 + x / 4] for x in percent]


# ---- Mistakes of users --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"data_dir": "nowhere", "dataset": "mnist"}, "--dataset digits"),
        (
            {"data_dir": "nowhere", "task": "bandit", "dataset": "mnist", "epochs": 100},
            "use --bandit-data breast-cancer",
        ),
        (
            {"run_dir": "used", "data_dir": "nowhere", "dataset": "mnist"},
            "used holds a run already",
        ),
        ({"batch_size": 0}, "--batch-size must lie"),
        ({"prior_pi": 1.0}, "--prior-pi must lie between 0 and 1, not at 1.0"),
        ({"learning_rate_decay": 9.6}, "--learning-rate-decay must lie between 0 and 1, not at"),
        (
            {"prior_sigma_2": 1.1},
            "--prior-sigma-2 must be .* at most --prior-sigma-1, 1.0, not 1.1",
        ),
        ({"prior": "gaussian", "prior_sigma_1": 0.0}, "--prior-sigma-1 must be above .* not 0.0"),
        ({"task": "regression"}, "--dataset is for --task mnist: leave it out"),
        ({"sgd_momentum": 0.9}, "--sgd-momentum is for --optimizer sgd"),
        ({"evaluate": "nothing.pt"}, "nothing.pt is missing"),
        ({"task": "bandit", "method": "sgd"}, "--method is for --task mnist"),
        ({"agent": "greedy"}, "--agent is for --task bandit"),
        ({"task": "bandit", "device": "cuda", "dataset": "mnist"}, "runs on one core"),
        ({"evaluate": "x.pt", **BENIGN, "epochs": 100}, "x.pt is missing"),
        ({"method": "sgd", "samples": 2}, "--samples has no effect with --method sgd"),
        (
            {**BENIGN, "epochs": 100, "agent": "greedy", "rho_init": -3.0},
            "--rho-init has no effect with --agent greedy",
        ),
        ({"prior": "gaussian", "prior_pi": 0.5}, "--prior-pi has no effect with --prior gaussian"),
        ({"noise_std": 1.0}, "--noise-std has no effect on mnist"),
        ({"interactions": 5}, "--interactions has no effect outside the bandit"),
        (BENIGN, "--epochs has no effect in the bandit"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(bbb.urllib.request, "urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    Path("used").mkdir()
    Path("used/checkpoint.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        bbb.main(Args(**{**TINY, "epochs": 1, **flags}))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"epochs": 1}, "in step 2 of epoch 1"),
        ({**BENIGN, "report_every": 1}, "after mushroom 1"),
    ],
)
def test_bad_input_a_loss_that_is_no_number_stops_the_run(flags, where, tmp_path):
    args = Args(**{**TINY, **flags}, rho_init=-1e9, run_dir=str(tmp_path))
    with pytest.raises(bbb.Diverged, match=rf"loss is (nan|inf) {where}: the run stops"):
        bbb.main(args)


@pytest.mark.parametrize(
    ("at", "sentence"),
    [
        ("load_digits", r"^Stopped\.$"),
        ("update", r"^Stopped before the first checkpoint\.$"),
        ("report", r"^Stopped; go on with the same flags and --resume .*checkpoint\.pt$"),
        ("draw_weights", r"^Stopped; evaluate with --evaluate .*checkpoint\.pt$"),
    ],
)
def test_bad_input_a_signal_ends_a_run_in_one_sentence(at, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(bbb, at, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match=sentence):
        bbb.main(Args(**TINY, epochs=2, run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run").exists() == (at != "load_digits")


def test_bad_input_other_method(tmp_path, monkeypatch):
    args = Args(**TINY, epochs=1, run_dir=str(tmp_path))
    bbb.main(args)
    checkpoint = str(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="was made with --method bbb, not with --method sgd"):
        bbb.main(dataclasses.replace(args, method="sgd", evaluate=checkpoint))
    monkeypatch.setattr(bbb, "load_mnist", lambda _, split: bbb.load_digits(split))
    for way in ("resume", "evaluate"):
        with pytest.raises(SystemExit, match="--dataset digits, not with --dataset mnist"):
            bbb.main(dataclasses.replace(args, dataset="mnist", **{way: checkpoint}))
    changes = {"seed": 2, "batch_size": 64, "optimizer": "sgd", "learning_rate": 0.5}
    changes |= {"learning_rate_decay": 0.5, "samples": 2, "prior": "gaussian", "prior_pi": 0.5}
    changes |= {"prior_sigma_1": 2.0, "prior_sigma_2": 0.1, "kl_weighting": "uniform"}
    assert set(bbb.KEPT) - changes.keys() == {"sgd_momentum", "noise_std", "report_every"}
    for name, value in changes.items():
        with pytest.raises(SystemExit, match=f"was made with --{name.replace('_', '-')} "):
            bbb.main(dataclasses.replace(args, **{name: value}, resume=checkpoint))
    with pytest.raises(SystemExit, match=r"--learning-rate 0\.0, not with --learning-rate 0\.01"):
        bbb.main(dataclasses.replace(args, learning_rate=0.01, resume=checkpoint, run_dir=""))
    with pytest.raises(SystemExit, match="raise --epochs"):
        bbb.main(dataclasses.replace(args, resume=checkpoint, run_dir=""))


def test_command_line(tmp_path):
    flags = f"--dataset digits --hidden-units 16 --epochs 1 --run-dir {tmp_path}"
    command = [sys.executable, str(ROOT / "bayes_by_backprop.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "eval/error" in done.stdout and (tmp_path / "checkpoint.pt").exists()
