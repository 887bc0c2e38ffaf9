"""multi_object_attention.py against the bugs that public ports of its paper have had.

Caught here: a context that reaches the classifier; an upper LSTM that feeds the lower one; a sum
in the place of what times where, and a G_loc that is dead from the start; labels after a mistake
that still train; a reward that forgets the labels before; a baseline that trains the rest; samples
that are not detached; ordered pairs; overlapping digits; ten read as a digit of its own; a box
enlarged from its corner; probabilities averaged where the paper averages their logarithms.
"""

import csv
import dataclasses
import io
import math
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice, pairwise, product, starmap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import ROOT
from torch.distributions import Independent, Normal

import multi_object_attention as dram
from multi_object_attention import NO_LABEL, TERMINAL, Args, DeepRecurrentAttentionModel, Sizes

h5py = pytest.importorskip("h5py")
DIGITS = {"dataset": "digits", "device": "cpu"}
HOUSES = {"task": "svhn", "dataset": "mnist"}
SMALL = Sizes(
    S=40, num_labels=3, num_classes=11, num_glimpses=2, location_unit=6, width=16, lstm=32
)
FOCUS = HOUSES | {"svhn_size": 110, "focus": True, "evaluate": "good.pt"}


def images(B, S=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, S, S), dtype=torch.uint8, generator=generator)


def made(deep=True, context=True, sizes=SMALL):
    torch.manual_seed(0)
    return DeepRecurrentAttentionModel(sizes, deep, context)


# ---- The networks -------------------------------------------------------------------------------


def test_math_glimpses_are_those_of_slow_indexing():
    """What the glimpse network gets: pixels around l, which counts units from the centre."""
    net, x, got = made(), images(5), []
    net.glimpse.register_forward_pre_hook(lambda _, inputs: got.append(inputs))
    seen = net(x, 6, "random")
    for n, (patches, l) in enumerate(got):
        assert torch.equal(l, seen.l[:, n])
        for b in range(5):
            column, row = ((6 * l[b]).double() + 20).round().long().tolist()
            for k, i, j in product(range(2), range(0, 12, 5), range(0, 12, 5)):
                block = 2**k
                top, left = row + (i - 6) * block, column + (j - 6) * block
                total = sum(
                    x[b, r, c].item()
                    for r, c in product(range(top, top + block), range(left, left + block))
                    if 0 <= r < 40 and 0 <= c < 40
                )
                assert patches[b, k, i, j].item() == pytest.approx(total / (255 * 4**k), abs=1e-6)
    assert seen.l.abs().max() <= 40 / 2 / 6 and seen.l.abs().max() > 3  # the whole image


def test_math_glimpse_network_multiplies_and_ram_adds():
    x, l = torch.rand(5, 2, 12, 12), torch.randn(5, 2)
    for deep in (True, False):
        glimpse = made(deep).glimpse
        a, b = glimpse.what[1], glimpse.where[0]
        what = (x.flatten(1) @ a.weight.T + a.bias).relu()
        where = (l @ b.weight.T + b.bias).relu()
        torch.testing.assert_close(glimpse(x, l), what * where if deep else what + where)
    torch.manual_seed(0)
    alive = made(sizes=SMALL._replace(width=2000)).glimpse.where(torch.randn(500, 2)) > 0
    assert alive.float().mean() == pytest.approx(1 - 1 / (2 * math.e), abs=0.03)  # else half


def convolved(x: torch.Tensor, layers: list, *strides: int) -> torch.Tensor:
    """Convolutions, each followed by a ReLU."""
    for layer, stride in zip(layers, strides, strict=True):
        x = F.conv2d(x, layer.weight, layer.bias, stride).relu()
    return x


def of_kind(module: torch.nn.Module, kind: type) -> list:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def test_math_the_networks_beside_the_lstms_are_those_of_a_loop():
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d, torch.nn.Linear
    x = torch.rand(3, 1, 48, 48)
    context = dram.ContextNetwork(64).apply(dram.initialise)
    layers = of_kind(context, conv)
    shrunk = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))  # to 24x24
    expected = convolved(shrunk, layers[:2], 1, 2)
    expected = F.conv2d(expected, layers[2].weight, layers[2].bias, 2).tanh().flatten(1)
    torch.testing.assert_close(context(x), expected)
    assert [layer.weight.shape[0] for layer in layers] == [32, 32, 4] and expected.shape == (3, 64)

    r = torch.randn(3, 32)
    for network in (dram.EmissionNetwork(SMALL), dram.Classifier(SMALL)):
        hidden, top = of_kind(network, linear)
        expected = (r @ hidden.weight.T + hidden.bias).relu() @ top.weight.T + top.bias
        torch.testing.assert_close(network(r), expected)

    what = dram.GlimpseNetwork(SMALL._replace(convolutional=True), product=True).what
    patches = torch.rand(3, 2, 12, 12)
    (top,) = of_kind(what, linear)
    features = convolved(patches, of_kind(what, conv), 1, 1, 1).flatten(1)
    torch.testing.assert_close(what(patches), (features @ top.weight.T + top.bias).relu())


def test_math_the_first_weights_are_hes_and_the_first_biases_say_keep():
    torch.manual_seed(0)
    net, H = DeepRecurrentAttentionModel(Sizes(num_classes=55)), 512
    for cell in (net.lstm1, net.lstm2):
        assert (cell.bias_hh[H : 2 * H] == 1).all() and cell.bias_hh.sum() == H
        assert (cell.bias_ih == 0).all()
    assert not net.baseline.weight.any() and (net.glimpse.where[0].bias == 1).all()
    weight = net.classifier[0].weight
    assert weight.std().item() == pytest.approx((2 / H) ** 0.5, rel=0.02)
    assert not net.classifier[0].bias.any()


@pytest.mark.parametrize("task", ["addition", "svhn"])
def test_math_the_convolutional_network_is_that_of_a_loop(task):
    torch.manual_seed(0)
    sizes = Sizes(**dram.SIZES[task])._replace(S=54 if task == "svhn" else 100)
    net, x = dram.ConvolutionalBaseline(sizes).eval(), images(2, sizes.S)
    convolutions, linears = of_kind(net, torch.nn.Conv2d), of_kind(net, torch.nn.Linear)
    y = x[:, None].float() / 255
    for n, layer in enumerate(convolutions):
        y = F.conv2d(y, layer.weight, layer.bias, padding=1 if task == "svhn" else 0).relu()
        y = F.max_pool2d(y, 2) if task != "svhn" or n == 4 else y
    y = F.adaptive_max_pool2d(y, 10) if task == "svhn" else y
    y = y.flatten(1)
    for layer in linears[:-1]:
        y = (y @ layer.weight.T + layer.bias).relu()
    y = y @ linears[-1].weight.T + linears[-1].bias
    with torch.no_grad():
        torch.testing.assert_close(net(x).flatten(1), y, rtol=1e-3, atol=1e-4)
    dropouts = of_kind(net, torch.nn.Dropout)
    assert [layer.p for layer in dropouts] == [0.5] * (10 if task == "svhn" else 0)
    assert [layer.out_features for layer in linears[:-1]] == ([3096] * 2 if dropouts else [512])


def test_math_sizes_of_each_task_are_the_papers():
    pairs, addition, svhn = (dram.sizes_of(Args(task=task)) for task in dram.SIZES)
    assert (pairs.width, pairs.num_clutter, pairs.num_classes) == (256, 8, 55)
    assert pairs.num_glimpses == addition.num_glimpses == 4
    assert (addition.width, addition.num_clutter, addition.num_classes) == (256, 0, 19)
    assert (svhn.width, svhn.num_labels, svhn.num_classes, svhn.num_glimpses) == (1024, 6, 11, 3)
    assert {sizes.lstm for sizes in (pairs, addition, svhn)} == {512}
    assert (pairs.location_unit, addition.location_unit, svhn.location_unit) == (20, 20, 12)


def test_math_sizes_are_the_papers():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    for task in ("pairs", "svhn"):
        sizes = Sizes(**dram.SIZES[task])
        with torch.device("meta"):
            net = DeepRecurrentAttentionModel(sizes)
        w = sizes.width
        what = 2 * 144 * w + w
        if task == "svhn":
            what = (2 * 25 + 1) * 64 + (64 * 9 + 1) * 64 + (64 * 9 + 1) * 128
            what += (128 * 4 * 4 + 1) * w  # 12 - 4 - 2 - 2 = 4
        assert count(net.glimpse) == what + 3 * w
        assert count(net.lstm1) == 4 * 512 * (w + 512 + 2)
        assert count(net.lstm2) == 4 * 512 * (512 + 512 + 2)
        assert count(net.emission) == 513 * w + (w + 1) * 2
        assert count(net.classifier) == 513 * w + (w + 1) * sizes.num_classes
        assert net.context is not None and made(context=False).context is None
    for size, millions in ((54, 51), (110, 169)):  # the paper's table of costs
        with torch.device("meta"):
            net = dram.ConvolutionalBaseline(Sizes(**dram.SIZES["svhn"])._replace(S=size))
            assert net.layers(torch.zeros(2, 1, size, size)).shape == (2, 6, 11)
        assert round(count(net) / 1e6) == pytest.approx(millions, abs=1)
    addition = dram.ConvolutionalBaseline(Sizes(**dram.SIZES["addition"]))
    convolutions = [m for m in addition.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 64]
    assert addition(images(2, 100)).shape == (2, 1, 19)


def lstm(cell, x, state):
    """torch's cell, written out."""
    gates = x @ cell.weight_ih.T + cell.bias_ih + state[0] @ cell.weight_hh.T + cell.bias_hh
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("deep", [True, False])
def test_math_reading_follows_the_recurrence(deep):
    net, x = made(deep), images(4)
    with torch.no_grad():
        net.emission[2].bias[:] = torch.tensor([3.3, 0.0])  # about the border
    seen = net(x, 5, std=0.3)
    table, zeros = dram.integral_image(x), torch.zeros(4, 32)
    r1, r2 = (zeros, zeros), (zeros, zeros)
    if deep:
        r2 = (net.context(x[:, None] / 255),) * 2
    for n in range(5):
        torch.testing.assert_close(seen.r2[:, n], r2[0])
        torch.testing.assert_close(seen.mu[:, n], net.emission(r2[0]))
        l = seen.sample[:, n].clamp(-20 / 6, 20 / 6)
        assert torch.equal(seen.l[:, n], l)
        r1 = lstm(net.lstm1, net.glimpse(net.retina(table, l * 6 / 20), l), r1)
        torch.testing.assert_close(seen.r1[:, n], r1[0])
        r2 = lstm(net.lstm2, r1[0], r2) if deep else r1
    torch.testing.assert_close(net.logits(seen)[:, 1], net.classifier(seen.r1[:, 3]))


def test_math_locations_are_samples_around_their_means():
    net = made()
    seen = net(images(1000), 4, std=0.3)
    noise = (seen.sample - seen.mu).detach()
    assert noise.std().item() == pytest.approx(0.3, abs=0.01) and noise.mean().abs() < 0.01
    assert not seen.sample.requires_grad and torch.equal(net(images(3), 4).l, net(images(3), 4).l)


@pytest.mark.parametrize("svhn", [False, True])
def test_math_context_reaches_the_classifier_only_through_where_it_looks(svhn):
    """At fixed places, what lies elsewhere in the image changes no logit; the start differs."""
    sizes = SMALL._replace(convolutional=svhn)
    net, x = made(sizes=sizes), images(3)
    elsewhere = x.clone()
    l = torch.zeros(3, 6, 2)
    elsewhere[:, :8] = 255 - elsewhere[:, :8]  # glimpses at the centre cover rows 8 to 31
    read = []
    for picture in (x, elsewhere):
        state = torch.zeros(3, 32), torch.zeros(3, 32)
        for n in range(6):
            g = net.glimpse(net.retina(dram.integral_image(picture), l[:, n]), l[:, n])
            state = net.lstm1(g, state)
        seen = net(picture, 6)
        read.append((net.classifier(state[0]), seen.l[:, 0]))
    assert torch.equal(read[0][0], read[1][0]) and not torch.equal(read[0][1], read[1][1])
    blank = net(torch.zeros(3, 40, 40, dtype=torch.uint8), 6).l[:, 0]
    assert torch.equal(blank, blank[:1].expand_as(blank))
    first = made(context=False)(x, 6).l[:, 0]
    assert torch.equal(first, first[:1].expand_as(first))


@pytest.mark.parametrize("deep", [True, False])
def test_math_bfloat16_rounds_what_is_read_and_nothing_else(deep):
    """Means, locations and states are float32 numbers near those that full precision makes."""
    torch.manual_seed(0)
    half = DeepRecurrentAttentionModel(SMALL, deep, bfloat16=True)
    seen, expected = half(images(5), 6), made(deep)(images(5), 6)
    for got, exact in zip(seen, expected, strict=True):
        assert got.dtype == torch.float32 and not torch.equal(got, exact)
        assert (got - exact).abs().mean() < 0.05 * exact.abs().mean()
    half.logits(seen).square().mean().backward()
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert half.glimpse.where[0].weight.grad.dtype == torch.float32

    args = Args(task="pairs", model="conv")
    with torch.random.fork_rng():
        exact = dram.make_networks(args)[0]
    half = dram.make_networks(dataclasses.replace(args, bfloat16=True))[0]
    half.load_state_dict(exact.state_dict())
    got, expected = half(images(2, 100)), exact(images(2, 100))
    assert got.dtype == torch.float32 and not torch.equal(got, expected)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_math_flags_shape_the_networks(monkeypatch):
    """Unless told otherwise, the paper's sizes, two LSTMs, a context and 32 bits."""
    flags = {"patch_size": 10, "num_scales": 3, "num_glimpses": 5, "location_unit": 7.0}
    for task, paper in (("pairs", (12, 2, 4, 20)), ("addition", (12, 2, 4, 20))):
        sizes = dram.sizes_of(Args(task=task))
        assert tuple(getattr(sizes, flag) for flag in flags) == paper and sizes.S == 100
    for size in (54, 110):
        sizes = dram.sizes_of(Args(task="svhn", svhn_size=size))
        assert tuple(getattr(sizes, flag) for flag in flags) == (12, 2, 3, 12)
        assert size == sizes.S

    for task in ("pairs", "svhn"):
        monkeypatch.setitem(dram.SIZES, task, dram.SIZES[task] | {"width": 16, "lstm": 32})
    (net,) = dram.make_networks(Args(**flags))
    assert (net.N, net.unit, net.retina.edges.shape) == (5, 7.0, (3, 11))
    assert net.glimpse.what[1].in_features == 3 * 10 * 10 and not net.bfloat16
    for model, context in (("dram", "coarse"), ("dram", "none"), ("ram", "coarse")):
        (net,) = dram.make_networks(Args(model=model, context=context, bfloat16=True))
        assert net.glimpse.product == (net.lstm2 is not None) == (model == "dram")
        assert (net.context is not None) == (model == "dram" and context == "coarse")
        assert net.bfloat16
    nets = dram.make_networks(Args(task="svhn", forward_backward=True))
    own = {name.split(".")[1] for name, _ in nets.named_parameters() if name.startswith("1.")}
    assert own == {"context", "lstm1", "lstm2", "emission", "classifier", "baseline"}


# ---- The bound ----------------------------------------------------------------------------------


def test_math_location_log_prob_is_that_of_a_normal():
    sample, mu = torch.randn(4, 5, 2).double(), torch.randn(4, 5, 2).double()
    expected = Independent(Normal(mu, 0.3), 1).log_prob(sample)
    torch.testing.assert_close(dram.location_log_prob(sample, mu, 0.3), expected)


def test_math_bound_has_the_gradient_that_enumeration_finds():
    """Two glimpses, three places each, the second chosen knowing the first; all nine paths."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3,), (3, 3), (9, 4)
    first, second, scores = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    )
    paths = torch.tensor(list(product(range(3), range(3))))  # [9, 2]
    log_pi = torch.stack(
        [first.log_softmax(0)[paths[:, 0]], second.log_softmax(1)[paths[:, 0], paths[:, 1]]], 1
    )
    log_p = scores.log_softmax(1)[:, [2]]  # [9, 1], of the label
    p_path = log_pi.sum(1).exp()
    bound = (p_path * log_p[:, 0]).sum()
    assert bound <= (p_path * log_p[:, 0].exp()).sum().log()  # it is one
    expected = torch.autograd.grad(-bound, (first, second, scores), retain_graph=True)
    b = torch.stack([torch.full((9,), 0.7), paths[:, 0] - 1.0], 1).double()  # of what came before
    losses = dram.bound_loss(log_p, log_pi, log_p.detach(), b, 1.0)
    found = torch.autograd.grad((p_path.detach() * losses).sum(), (first, second, scores))
    torch.testing.assert_close(found, expected)


def test_math_bound_weighs_the_policy_and_leaves_reward_and_baseline_alone():
    log_p, log_pi, R, b = (torch.randn(5, n, requires_grad=True) for n in (1, 4, 4, 4))
    dram.bound_loss(log_p, log_pi, R, b, 0.25).sum().backward()
    assert torch.equal(log_p.grad, -torch.ones(5, 1)) and R.grad is None and b.grad is None
    torch.testing.assert_close(log_pi.grad, -0.25 * (R - b).detach())


def test_math_rewards_are_cumulative_and_stop_after_the_first_mistake():
    y = torch.tensor([[1, 2, 3, TERMINAL], [1, TERMINAL, NO_LABEL, NO_LABEL], [1, 2, 3, TERMINAL]])
    right = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    R, counts = dram.cumulative_rewards(right, right, y)
    assert counts.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert R.tolist() == [[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 3, 4]]
    R, counts = dram.cumulative_rewards(~right, ~right, y)
    assert counts.tolist() == [[1, 0, 0, 0]] * 3 and R.tolist()[2] == [0, 0, 0, 0]
    r = torch.tensor([0.5, 0.25, 1.0, 0.125]).expand(3, 4)
    R, counts = dram.cumulative_rewards(r, right, y)  # what a mistake earned is earned
    assert counts.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert R.tolist() == [[0.5, 0.75, 0.75, 0.75]] * 2 + [[0.5, 0.75, 1.75, 1.875]]


def test_math_label_log_probs():
    logits, y = torch.randn(2, 3, 11), torch.tensor([[4, TERMINAL, NO_LABEL], [1, 2, TERMINAL]])
    log_p = dram.label_log_probs(logits, y)
    for b, s in product(range(2), range(3)):
        expected = 0.0 if y[b, s] < 0 else -F.cross_entropy(logits[b, s], y[b, s])
        torch.testing.assert_close(log_p[b, s], torch.as_tensor(expected))


class Recorded:
    """In the place of a network: a reading whose every part is a leaf."""

    N = 2

    def __init__(self, B, L, border=9.0):
        torch.manual_seed(0)
        self.border = border  # of the image, in units
        self.scores = torch.randn(B, L, 11, requires_grad=True)
        self.mu = torch.randn(B, 2 * L, 2, requires_grad=True)
        self.r2 = torch.randn(B, 2 * L, 32, requires_grad=True)
        self.sample = self.mu.detach() + 0.3 * torch.randn(B, 2 * L, 2)
        self.baseline = torch.nn.Linear(32, 1)

    def __call__(self, x, T, policy, std, into_core):
        half = self.half(x)
        return dram.Reading(None, self.r2, self.mu, self.sample, self.sample.clamp(-half, half))

    def half(self, x):
        return self.border

    def logits(self, reading):
        return self.scores


@pytest.mark.parametrize("policy", ["learned", "random"])
def test_gradient_of_a_reading_is_made_as_the_flags_say(policy):
    """N glimpses for each label, around the means by the deviation; at random, labels alone."""
    asked = []

    class Asked(Recorded):
        def __call__(self, *arguments):
            asked.append(arguments)
            return super().__call__(*arguments)

    net, y = Asked(4, 3, border=0.1), torch.randint(0, 10, (4, 3))
    for std, into_core in ((0.4, True), (0.2, False)):
        flags = {"location_std": std, "reinforce_into_core": into_core}
        loss, shown = dram.reading_loss(net, None, y, Args(glimpse_policy=policy, **flags))
        assert asked.pop() == (None, 2 * 3, policy, std, into_core) and not asked
        assert torch.equal(loss, shown["losses/cross_entropy"]) == (policy == "random")
        means = torch.autograd.grad(loss, net.mu, allow_unused=True)[0]
        assert (means is None) == (policy == "random")


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_gradient_of_labels_after_a_mistake_is_zero(wrong):
    """Nothing after label s is trained when s is wrong; s itself and its glimpses are."""
    net = Recorded(1, 4)
    y = net.scores.argmax(2).clone()
    y[0, wrong] = (y[0, wrong] + 1) % 11
    loss, parts = dram.reading_loss(net, None, y, Args(location_std=0.3))
    loss.backward()
    assert parts["charts/right"] == wrong
    trained = net.scores.grad[0].abs().sum(1) > 0
    assert trained.tolist() == [s <= wrong for s in range(4)]
    moved = net.mu.grad[0].abs().sum(1) > 0
    assert moved.tolist() == [n // 2 <= wrong for n in range(8)]


@pytest.mark.parametrize("reward", ["probability", "correct"])
def test_gradient_of_a_reading_is_that_of_its_equations(reward):
    """Cross-entropy, lambda (R_s - b_n) d log pi, and the baseline's regression, by a loop."""
    net = Recorded(6, 3)
    y = torch.randint(0, 10, (6, 3))
    y[:4, 0] = net.scores[:4, 0].argmax(1)
    y[:2, 1] = net.scores[:2, 1].argmax(1)
    y[5, 1:] = torch.tensor([TERMINAL, NO_LABEL])
    args = Args(reward=reward, reinforce_weight=0.5, location_std=0.3)
    loss, shown = dram.reading_loss(net, None, y, args)
    got = torch.autograd.grad(loss, (net.scores, net.mu, net.baseline.weight))
    b = net.baseline(net.r2.detach())[..., 0]
    expected, cross_entropy, surprises, num_right = 0.0, 0.0, [], 0
    for i in range(6):
        R = 0
        for s in range(3):
            if y[i, s] == NO_LABEL:
                break
            right = net.scores[i, s].argmax() == y[i, s]
            p = net.scores[i, s].softmax(0)[y[i, s]].item()
            num_right += right.item()
            R += int(right) if reward == "correct" else p
            expected = expected + F.cross_entropy(net.scores[i, s], y[i, s])
            cross_entropy -= math.log(p)
            for n in (2 * s, 2 * s + 1):
                log_pi = Independent(Normal(net.mu[i, n], 0.3), 1).log_prob(net.sample[i, n])
                surprises.append(R - b[i, n].item())
                expected = expected - 0.5 * (R - b[i, n].detach()) * log_pi
                expected = expected + (R - b[i, n]) ** 2 / 2 / 6  # the mean over 6 glimpses
            if not right:
                break
    wanted = torch.autograd.grad(expected / 6, (net.scores, net.mu, net.baseline.weight))
    torch.testing.assert_close(got, wanted)
    dram.reading_loss(net, None, y, args)[0].backward()
    assert net.r2.grad is None  # the baseline trains nothing below it
    assert shown["charts/surprise"].item() == pytest.approx(np.square(surprises).mean() ** 0.5)
    assert shown["losses/baseline"].item() == pytest.approx(np.square(surprises).sum() / 6 / 6 / 2)
    assert shown["charts/right"].item() == pytest.approx(num_right / 6)
    assert shown["losses/cross_entropy"].item() == pytest.approx(cross_entropy / 6, rel=1e-5)


def test_gradient_brings_means_back_that_have_left_the_image():
    """Where every sample is clipped to one place no reward tells the way; inside all is as was."""
    net, y = Recorded(2, 3, border=2.5), torch.randint(0, 10, (2, 3))
    with torch.no_grad():
        net.mu[:] = torch.tensor([1.0, -2.4])
        net.mu[0, 0], net.mu[1, 5] = torch.tensor([7.0, 0.0]), torch.tensor([0.0, -3.5])
        net.sample[:] = net.mu + 0.01
    args = Args(reinforce_weight=0.0)
    loss, shown = dram.reading_loss(net, None, y, args)
    loss.backward()
    expected = torch.zeros(2, 6, 2)
    expected[0, 0, 0], expected[1, 5, 1] = 4.5 / 6 / 2, -1.0 / 6 / 2  # of 6 glimpses at 2 images
    torch.testing.assert_close(net.mu.grad, expected)
    assert shown["losses/straying"].item() == pytest.approx((4.5**2 + 1) / 2 / 6 / 2)
    assert shown["charts/outside"].item() == pytest.approx(2 / 12)
    assert shown["charts/mu"].item() == pytest.approx((10 * 3.4 + 7 + 3.5) / 24)


@pytest.mark.parametrize(
    ("flags", "most"), [({}, 0.05), ({"optimizer": "sgd", "learning_rate": 0.01}, 0.005)], ids=str
)
def test_math_one_update_moves_locations_by_a_few_percent_at_most(flags, most, monkeypatch):
    """Of the image, at rewards that could not be less certain: heads or tails."""

    def heads_or_tails(r, right, y):
        return torch.randint(2, y.shape), torch.ones_like(y)

    monkeypatch.setattr(dram, "cumulative_rewards", heads_or_tails)
    torch.manual_seed(0)
    args = Args(**DIGITS, **flags)
    nets, data = dram.make_networks(args), dram.load_data(args, "cpu")
    optimizer, means = dram.make_optimizer(nets, args), []
    optimizer.param_groups[1]["lr"] *= args.location_rate
    for (x, y), _ in zip(dram.minibatches(args, data), range(7)):
        with torch.no_grad():
            means.append(nets[0](data.test[0][:20], 4).mu)
        dram.update(optimizer, dram.minibatch_loss(nets, args, x, y)[0])
    moves = [(new - old).norm(dim=2).mean().item() / 5 for old, new in pairwise(means)]
    assert 0 < np.mean(moves) < most  # of 5 units


@pytest.mark.parametrize("into_core", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_gradient_routes(deep, into_core):
    """Classification trains what sees, the policy gradient what chooses, the baseline itself."""
    net, x = made(deep), images(6)
    seen = net(x, 6, std=0.3, reinforce_into_core=into_core)
    y = net.logits(seen).argmax(2)
    R, b = torch.rand(6, 6), net.baseline(seen.r2.detach()).squeeze(2)
    log_pi = dram.location_log_prob(seen.sample, seen.mu, 0.3)
    nothing = torch.zeros(6, 1)
    parts = {
        "class": -dram.label_log_probs(net.logits(seen), y).sum(),
        "policy": dram.bound_loss(nothing, log_pi, R, b, 1.0).sum(),
        "baseline": dram.regression_loss(R, b).sum(),
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
    assert reached["class"] == {"glimpse", "lstm1", "classifier"}
    chooses = {"emission"} | ({"lstm2", "context"} if deep else set())
    assert reached["policy"] == chooses | ({"glimpse", "lstm1"} if into_core else set())
    assert reached["baseline"] == {"baseline"}


def test_math_minibatch_repeats_images_for_each_path_and_sums_directions(monkeypatch):
    args = Args(task="svhn", forward_backward=True, monte_carlo_samples=3)
    calls = []

    def record(net, x, y, args):
        calls.append((net, x, y))
        return torch.tensor(2.0), {}

    monkeypatch.setattr(dram, "reading_loss", record)
    x, y = images(2), torch.tensor([[1, 2, 3, TERMINAL], [7, 8, TERMINAL, NO_LABEL]])
    loss, _ = dram.minibatch_loss(["forward", "backward"], args, x, y)
    assert loss == 4 and [net for net, *_ in calls] == ["forward", "backward"]
    assert torch.equal(calls[0][1], x[[0, 0, 0, 1, 1, 1]])
    dram.minibatch_loss(["forward"], Args(task="svhn"), x, y)  # one path each, by default
    assert torch.equal(calls[-1][1], x) and torch.equal(calls[-1][2], y)
    assert torch.equal(calls[0][2], y[[0, 0, 0, 1, 1, 1]])
    assert calls[1][2][::3].tolist() == [[3, 2, 1, TERMINAL], [8, 7, TERMINAL, NO_LABEL]]
    assert round(Args().location_std ** 2, 2) == 0.03  # the paper's variance on svhn


def test_math_minibatch_of_the_convolutional_network_sums_labels():
    scores = torch.randn(2, 4, 11)
    y = torch.tensor([[1, 2, 3, TERMINAL], [7, TERMINAL, NO_LABEL, NO_LABEL]])
    loss, shown = dram.minibatch_loss([lambda x: scores], Args(task="svhn", model="conv"), None, y)
    of_labels = F.cross_entropy(scores.flatten(0, 1), y.flatten(), ignore_index=NO_LABEL)
    torch.testing.assert_close(loss, of_labels * 6 / 2)  # 6 labels of 2 images
    assert shown == {"losses/cross_entropy": loss}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_math_optimizer_has_all_parameters_in_two_groups(optimizer, monkeypatch):
    """What chooses locations is in the second one, in both directions."""
    monkeypatch.setitem(dram.SIZES, "svhn", {**SMALL._asdict(), "convolutional": True})
    args = Args(task="svhn", forward_backward=True, optimizer=optimizer, learning_rate=0.5)
    nets = dram.make_networks(args)
    found = dram.make_optimizer(nets, args)
    kind, settings = {
        "adam": (torch.optim.Adam, {"betas": (0.9, 0.999)}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    }[optimizer]
    settings |= {"lr": 0.5, "weight_decay": 0}
    assert type(found) is kind and settings.items() <= found.defaults.items()
    names = {parameter: name for name, parameter in nets.named_parameters()}
    groups = [[names.pop(p) for p in group["params"]] for group in found.param_groups]
    assert not names
    sees, chooses = ({name.rsplit(".", name.count(".") - 1)[0] for name in g} for g in groups)
    assert chooses == {f"{i}.{part}" for i in (0, 1) for part in ("context", "lstm2", "emission")}
    own = {f"{i}.{part}" for i in (0, 1) for part in ("lstm1", "classifier", "baseline")}
    assert sees == own | {"0.glimpse"}


# ---- Two directions, several paths --------------------------------------------------------------


def saying(*digits, L=6):
    """log p [1, L, 11] that is sure of these digits and then of the end."""
    scores = torch.full((1, L, 11), -5.0)
    for s, digit in enumerate((list(digits) + [TERMINAL] * L)[:L]):
        scores[0, s, digit] = 5.0
    return scores.log_softmax(2)


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ((1, 2, 3), (3, 2, 1), [1, 2, 3]),
        ((1, 2, 3, 9), (3, 2, 1), [1, 2, 3]),  # forward read a digit too many, at its end
        ((1, 2, 3), (3, 2, 1, 9), [1, 2, 3]),  # backward did, at the number's begin
        ((), (3, 2), []),
        ((1, 2, 3, 4, 5), (5, 4, 3, 2, 1), [1, 2, 3, 4, 5]),
    ],
)
def test_math_directions_are_combined_on_the_shorter_length(forward, backward, expected):
    answer = dram.combine(saying(*forward), saying(*backward))[0].tolist()
    assert answer == expected + [TERMINAL] * (6 - len(expected))


def test_math_no_number_has_an_end_in_its_middle():
    """Each direction would rather read a digit, their sum would rather end."""
    forward, backward = saying(1, 2, 3), saying(3, 2, 1)
    for log_p, digit in ((forward, 2), (backward, 7)):
        log_p[0, 1] = -9.0
        log_p[0, 1, [digit, TERMINAL]] = torch.tensor([-1.0, -1.1])
    first, middle, last, *ends = dram.combine(forward, backward)[0].tolist()
    assert (first, last, ends) == (1, 3, [TERMINAL] * 3) and middle in (2, 7)


def test_math_directions_add_their_log_probabilities():
    forward, backward = saying(1, 2), saying(2, 1)
    forward[0, 0, 4] = forward[0, 0, 1] + 0.3  # a slight error at the first digit,
    assert dram.combine(forward, backward)[0, 0] == 1  # which the other direction corrects,
    backward[0, 1] = forward[0, 0]  # unless it makes the same one
    assert dram.combine(forward, backward)[0, :3].tolist() == [4, 2, TERMINAL]


def test_math_numbers_without_an_end_have_the_longest_length():
    assert dram.number_length(saying(1, 2, 3, 4, 5, 6)).tolist() == [5]
    assert dram.number_length(saying(1, 2)).tolist() == [2]


def test_math_averages_of_log_probabilities_and_of_probabilities():
    p = torch.tensor([[0.9, 0.1], [0.02, 0.98], [0.6, 0.4]]).double()
    logs, probabilities = (
        dram.averaged(p.log(), average) for average in ("log-probabilities", "probabilities")
    )
    torch.testing.assert_close(logs.exp(), p.prod(0) ** (1 / 3))
    torch.testing.assert_close(probabilities.exp(), p.mean(0))
    assert logs.argmax() == 1 and probabilities.argmax() == 0


def test_math_answer_averages_sampled_paths(monkeypatch):
    """Three sampled paths, or one along the means; of two directions, both."""
    args = Args(task="svhn", device="cpu", location_std=0.3)
    monkeypatch.setitem(dram.SIZES, "svhn", {**SMALL._asdict(), "convolutional": True})
    torch.manual_seed(0)
    nets = dram.make_networks(dataclasses.replace(args, forward_backward=True))
    assert nets[0].glimpse is nets[1].glimpse and nets[0].lstm1 is not nets[1].lstm1
    x, log_p = images(5, 54), []
    with torch.no_grad():
        torch.manual_seed(3)
        for net in nets:
            paths = [net.logits(net(x, 6, std=0.3)).log_softmax(2) for _ in range(3)]
            log_p.append(sum(paths) / 3)
        torch.manual_seed(3)
        found = dram.answer(nets[:1], args, x, 3)
        assert torch.equal(found, log_p[0].argmax(2))
        torch.manual_seed(3)
        both = dram.answer(nets, dataclasses.replace(args, forward_backward=True), x, 3)
        assert torch.equal(both, dram.combine(*log_p))
        along_means = net.logits(nets[0](x, 6))
        assert torch.equal(
            dram.answer(nets[:1], args, x, 0), nets[0].logits(nets[0](x, 6)).argmax(2)
        )
        assert along_means.shape == (5, 3, 11)


class Scripted:
    """In the place of a network: logits of its next path, whatever it is shown."""

    N = 2

    def __init__(self, *paths):
        self.paths, self.asked = list(paths), []

    def __call__(self, *arguments):
        self.asked.append(arguments)
        return self.paths.pop(0)

    def logits(self, reading):
        return reading


@pytest.mark.parametrize(
    ("average", "label"), [("log-probabilities", 1), ("probabilities", 0)], ids=str
)
@pytest.mark.parametrize("policy", ["learned", "random"])
def test_math_answer_follows_its_flags(policy, average, label):
    args = Args(task="svhn", average=average, glimpse_policy=policy, location_std=0.4)
    p = torch.tensor([[0.9, 0.1], [0.02, 0.98], [0.6, 0.4]]).log()  # two classes, three paths
    paths = [F.pad(path, (0, 9), value=-20.0).expand(4, 6, 11) for path in p]
    net, x = Scripted(*paths), images(4, 54)
    assert (dram.answer([net], args, x, 3) == label).all()
    assert net.asked == [(x, 6 * 2, policy, 0.4)] * 3
    net = Scripted(paths[1])
    assert (dram.answer([net], args, x, 0) == 1).all()
    assert net.asked == [(x, 6 * 2, policy, 0.0)]


def test_math_answer_reads_where_each_direction_focuses(monkeypatch):
    asked = []

    def part_of(net, x, T):
        asked.append((net, x, T))
        return net

    monkeypatch.setattr(dram, "focused", part_of)
    flags = {"task": "svhn", "svhn_size": 110, "forward_backward": True}
    for focus in (True, False):
        nets, x = [Scripted(saying(1, 2)), Scripted(saying(2, 1))], images(1, 110)
        found = dram.answer(nets, Args(focus=focus, **flags), x, 0)
        assert found[0, :3].tolist() == [1, 2, TERMINAL]
        assert [net.asked[0][0] for net in nets] == (nets if focus else [x, x])
        assert asked == ([(net, x, 6 * 2) for net in nets] if focus else [])
        asked.clear()


@pytest.mark.parametrize("model, M", [("dram", 0), ("dram", 7), ("conv", 7)])
def test_math_evaluation_counts_all_images_and_draws_by_itself(model, M, monkeypatch):
    """The same paths each time, without dropout; training goes on as if nothing had been."""
    args, nets = Args(model=model, monte_carlo_samples=M), torch.nn.ModuleList([torch.nn.Dropout()])
    y, draws = torch.arange(1203)[:, None], []

    def answer(given, args, x, paths):
        assert given is nets and not nets[0].training and not torch.is_grad_enabled()
        draws.append(torch.rand(1).item())
        return torch.where(x < (300 if paths == (M or 10) else 600 + paths), -5, x)

    monkeypatch.setattr(dram, "answer", answer)
    state, found = torch.get_rng_state(), dram.evaluate(nets, args, y, y, "some")
    assert torch.equal(state, torch.get_rng_state()) and nets[0].training
    averaged, single = 100 * 300 / 1203, 100 * 600 / 1203
    expected = {"some/error": averaged, "some/error_single_path": single}
    assert found == ({"some/error": single} if model == "conv" else expected)
    first, draws = draws, []
    torch.rand(1)
    assert dram.evaluate(nets, args, y, y, "some") == found and draws == first
    assert len(set(draws)) == len(draws) == (3 if model == "conv" else 6)


def test_math_a_number_is_wrong_if_any_digit_is():
    y = torch.tensor([[1, 2, TERMINAL], [1, TERMINAL, NO_LABEL], [1, TERMINAL, NO_LABEL]])
    answers = torch.tensor([[1, 2, 3], [1, TERMINAL, 7], [2, TERMINAL, 7]])
    assert dram.num_wrong(answers, y) == 2


def test_math_focus_cuts_around_the_glimpses():
    """As many as it reads labels, the terminal class among them; the others look anywhere."""
    net, x = made(), images(5, 110)
    l = torch.tensor([[0.0, 0.0], [2.0, -1.0], [-9.0, -9.0], [9.0, 0.0]])
    paths = [[0, 1, 1, 0, 2, 3], [2, 2, 3, 3, 3, 3], [3] * 6, [0] * 6, [0, 1, 0, 1, 0, 3]]
    paths = l[torch.tensor(paths)]
    net.forward = lambda x, T: dram.Reading(None, None, None, None, paths)
    read = [saying(*digits, L=3) for digits in ((4,), (), (1, 2, 3), (), (7, 7))]
    net.logits = lambda reading: torch.cat(read)
    corners = ((34, 25), (0, 0), (56, 28), (28, 28), (55, 25))
    for part, image, (column, row) in zip(dram.focused(net, x, 6), x, corners):
        assert torch.equal(part, image[row : row + 54, column : column + 54])


# ---- Scenes -------------------------------------------------------------------------------------


def test_math_pairs_are_unordered_and_there_are_55():
    a, b = (t.flatten() for t in torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij"))
    classes = dram.pair_class(a, b)
    assert torch.equal(classes, dram.pair_class(b, a))
    assert sorted(set(classes.tolist())) == list(range(55))
    names = dram.class_names("pairs")
    assert [names[c] for c in classes] == [f"{min(i, j)}{max(i, j)}" for i, j in zip(a, b)]


def test_math_sums_are_distributed_as_computed():
    digits, labels = torch.zeros(10, 28, 28, dtype=torch.uint8), torch.arange(10)
    torch.manual_seed(0)
    chosen = torch.randint(10, (3000, 2))
    _, y = dram.make_scenes("addition", digits, labels, chosen, digits)
    assert torch.equal(y[:, 0], chosen.sum(1))
    expected = 3000 * (10 - (torch.arange(19) - 9).abs()) / 100
    counts = torch.bincount(y[:, 0], minlength=19)
    assert ((counts - expected).square() / expected).sum() < 42.3  # chi-square, 18 degrees: 0.1 %


def test_math_digits_lie_apart_and_every_such_place_is_as_likely():
    corners = dram.places_apart(30_000, 5, 2, "cpu", torch.Generator().manual_seed(0))
    possible = [
        (a, b, c, d)
        for a, b, c, d in product(range(4), repeat=4)
        if not (abs(a - c) < 2 and abs(b - d) < 2)
    ]
    found = [tuple(row) for row in corners.flatten(1).tolist()]
    assert set(found) == set(possible)
    counts = torch.tensor([found.count(place) for place in possible[::5]])
    mean = 30_000 / len(possible)
    assert (counts - mean).abs().max() < 4.5 * math.sqrt(mean)


def test_math_scenes_hold_both_digits_and_pairs_have_clutter():
    digits = torch.full((4, 28, 28), 200, dtype=torch.uint8) + torch.arange(4).byte()[:, None, None]
    pool = torch.full((3, 28, 28), 100, dtype=torch.uint8)
    chosen, labels = torch.tensor([[0, 1], [2, 3]] * 50), torch.tensor([5, 3, 9, 0])
    generator = torch.Generator().manual_seed(0)
    x, y = dram.make_scenes("addition", digits, labels, chosen, pool, generator)
    assert x.shape == (100, 100, 100) and x.dtype == torch.uint8
    for i in range(100):
        for which in chosen[i]:
            rows, columns = (x[i] == 200 + which).nonzero().unbind(1)
            assert len(rows) == 28 * 28
            assert rows.max() - rows.min() == columns.max() - columns.min() == 27
    x, y = dram.make_scenes("pairs", digits, labels, chosen, pool, generator)
    assert y[0] == dram.pair_class(torch.tensor(3), torch.tensor(5)) and y.shape == (100, 1)
    cluttered = (x == 100).flatten(1).sum(1)
    assert (x == 255).any() and (x == 200).any() and 8 * 64 >= cluttered.max() > 300
    again = dram.make_scenes(
        "pairs", digits, labels, chosen, pool, torch.Generator().manual_seed(1)
    )
    assert torch.equal(
        again[0],
        dram.make_scenes("pairs", digits, labels, chosen, pool, torch.Generator().manual_seed(1))[
            0
        ],
    )


def test_math_test_sets_are_frozen_and_epochs_are_not():
    data = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data.append(dram.load_data(Args(**DIGITS), "cpu"))
    for part in ("validation", "test"):
        for ours, theirs in zip(getattr(data[0], part), getattr(data[1], part)):
            assert torch.equal(ours, theirs)
    assert len(data[0].images) == 1250 and len(data[0].validation[0]) == 250
    assert len(data[0].test[0]) == 297
    first, second = (next(dram.minibatches(Args(**DIGITS), data[0])) for _ in range(2))
    assert first[0].shape == (128, 100, 100) and not torch.equal(first[0], second[0])


def test_math_without_holding_out_all_is_learned_in_epochs_as_long(monkeypatch):
    assert dram.IMAGES_PER_EPOCH == 50_000  # MNIST's 60,000 but the 10,000 held out
    monkeypatch.setattr(dram, "IMAGES_PER_EPOCH", 1400)
    parts, whole = (dram.load_data(Args(**DIGITS, hold_out=out), "cpu") for out in (True, False))
    assert (len(parts.images), len(whole.images)) == (1250, 1500)
    assert torch.equal(whole.images[:1250], parts.images) and len(whole.labels) == 1500
    for name in ("validation", "test"):  # the same scenes
        assert all(map(torch.equal, getattr(parts, name), getattr(whole, name)))
    for data, count in ((parts, 1250), (whole, 1400)):
        assert sum(len(x) for x, _ in dram.minibatches(Args(**DIGITS), data)) == count


@pytest.mark.parametrize("task", ["pairs", "addition"])
def test_math_digits_are_of_their_sets(task, monkeypatch):
    """The last sixth of the training digits is for validation; clutter is of what is trained on."""
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return torch.tensor(len(calls) - 1), torch.tensor(len(calls) - 1)

    def scenes(task, digits, labels, chosen, pool, generator=None):
        return record(task, digits, labels, pool, chosen)

    monkeypatch.setattr(dram, "make_scenes", scenes)
    args = Args(**DIGITS, task=task, batch_size=500)
    data = dram.load_data(args, "cpu")
    (x, y), (x_test, y_test) = dram.load_digits("train"), dram.load_digits("t10k")
    trained = x[:1250], y[:1250]
    assert all(map(torch.equal, data[:2], trained)) and len(x) == 1500
    of_sets = ((data.validation, (x[1250:], y[1250:])), (data.test, (x_test, y_test)))
    for (index, _), digits in of_sets:
        told, *given, chosen = calls[index]
        assert told == task and all(map(torch.equal, given, (*digits, trained[0])))
        assert all(sorted(column.tolist()) == [*range(len(digits[0]))] for column in chosen.T)
        assert (chosen[:, 0] == chosen[:, 1]).float().mean() < 0.1
    del calls[:]
    batches = [calls[index] for index, _ in dram.minibatches(args, data)]
    assert [len(chosen) for *_, chosen in batches] == [500, 500, 250]
    for told, *given, _ in batches:
        assert told == task and all(map(torch.equal, given, (*trained, trained[0])))
    chosen = torch.cat([chosen for *_, chosen in batches])
    assert all(sorted(column.tolist()) == [*range(1250)] for column in chosen.T)
    assert (chosen[:, 0] == chosen[:, 1]).float().mean() < 0.1


# ---- House numbers ------------------------------------------------------------------------------


def digit_struct(numbers) -> bytes:
    """digitStruct.mat as its publishers write it: references to everything, 10 for 0."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        kept = file.create_group("#refs#")

        def keep(value):
            return kept.create_dataset(str(len(kept)), data=value).ref

        names, boxes = [], []
        for name, digits, rows in numbers:
            names.append(keep(np.array([[ord(letter)] for letter in name], np.uint16)))
            box = kept.create_group(f"box{len(boxes)}")
            for key, values in zip(("left", "top", "width", "height"), zip(*rows)):
                store(box, key, values, keep)
            store(box, "label", [digit or 10 for digit in digits], keep)
            boxes.append(box.ref)
        for key, references in (("name", names), ("bbox", boxes)):
            data = np.array(references, object)[:, None]
            file.create_dataset(f"digitStruct/{key}", data=data, dtype=h5py.ref_dtype)
    return content.getvalue()


def store(box, key, values, keep):
    if len(values) == 1:
        box.create_dataset(key, data=np.array([[float(values[0])]]))
    else:
        references = np.array([keep(np.array([[float(v)]])) for v in values], object)[:, None]
        box.create_dataset(key, data=references, dtype=h5py.ref_dtype)


def archive(path: Path, numbers, photos) -> None:
    """A tar file in the official layout."""
    split = path.name.removesuffix(".tar.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:

        def add(name, content):
            info = tarfile.TarInfo(f"{split}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for (name, *_), photo in zip(numbers, photos):
            png = io.BytesIO()
            Image.fromarray(photo).save(png, "PNG")
            add(name, png.getvalue())
        add("digitStruct.mat", digit_struct(numbers))
        add("see_bboxes.m", b"% matlab")


def house_numbers(n, seed):
    """Grey levels say which digit: n made photos of 1 to 3 digits, side by side."""
    rng = np.random.default_rng(seed)
    numbers, photos = [], []
    for i in range(n):
        digits = rng.integers(0, 10, rng.integers(1, 4)).tolist()
        photo = np.full((60, 120, 3), 128, np.uint8)
        rows = []
        for place, digit in enumerate(digits):
            left = 20 + 20 * place
            photo[15:45, left : left + 20] = 25 * digit
            rows.append((left, 15, 20, 30))
        numbers.append((f"{i + 1}.png", digits, rows))
        photos.append(photo)
    return numbers, photos


@pytest.fixture
def svhn(tmp_path):
    for seed, (split, n) in enumerate((("train", 40), ("extra", 32), ("test", 12))):
        archive(tmp_path / "svhn" / f"{split}.tar.gz", *house_numbers(n, seed))
    return tmp_path


def test_math_digit_struct_is_parsed():
    rows = [(10.0, 5.0, 4.0, 9.0), (15.0, 3.0, 6.0, 9.0)]
    numbers = [("1.png", [7], rows[:1]), ("22.png", [1, 0], rows)]
    single, double = dram.read_digit_struct(digit_struct(numbers))
    assert single == ("1.png", [7], (10, 5, 14, 14))
    assert double == ("22.png", [1, 0], (10, 3, 21, 14))


def test_math_boxes_grow_about_their_middle():
    assert dram.enlarged((10, 20, 30, 60), 1.5) == (5, 10, 35, 70)
    left, top, right, bottom = dram.enlarged((100, 100, 200, 150), 1.3)
    assert (left, top, right, bottom) == (85, 92, 215, 158)


def test_math_archives_become_crops_and_labels(svhn):
    numbers, photos = house_numbers(12, 2)
    path = svhn / "svhn" / "test.tar.gz"
    x, y = dram.decode_archive(path, 64)
    assert x.shape == (12, 64, 64) and x.dtype == torch.uint8 and y.shape == (12, 6)
    for crop, labels, (_, digits, _), photo in zip(x, y, numbers, photos):
        assert labels.tolist() == (digits + [TERMINAL] + [NO_LABEL] * 6)[:6]
        width = 20 * len(digits)
        left, right = 20 - round(0.15 * width), 20 + width + round(0.15 * width)
        top, bottom = round(15 - 4.5), round(45 + 4.5)
        grey = Image.fromarray(photo[..., 0]).crop((left, top, right, bottom)).resize((64, 64), 2)
        assert np.abs(crop.numpy().astype(int) - np.array(grey).astype(int)).max() <= 1
    wide, _ = dram.decode_archive(path, 130)  # digits keep their size, more is seen around them
    assert (wide[0, 33:97, 33:97].float() - x[0].float()).abs().mean() < 12
    assert (wide[:, 0] == 0).all()  # beyond the photo


def test_math_longer_numbers_are_left_out(tmp_path):
    numbers, photos = house_numbers(3, 0)
    six = [(10 * i, 5, 10, 20) for i in range(6)]
    numbers[1] = (numbers[1][0], [1, 2, 3, 4, 5, 6], six)
    archive(tmp_path / "extra.tar.gz", numbers, photos)
    x, y = dram.decode_archive(tmp_path / "extra.tar.gz", 64)
    assert len(x) == 2 and y[:, 0].tolist() == [numbers[0][1][0], numbers[2][1][0]]


def test_math_house_numbers_are_cached_split_and_jittered(svhn, monkeypatch):
    args = Args(task="svhn", data_dir=str(svhn), batch_size=20)
    data = dram.load_data(args, "cpu")
    assert data.images.shape == (60, 64, 64) and len(data.validation[0]) == 12
    assert data.test[0].shape == (12, 54, 54)
    whole = dram.load_svhn(str(svhn), 64)
    everything = torch.cat([whole["train"][0], whole["extra"][0]])
    assert torch.equal(data.test[0], whole["test"][0][:, 5:59, 5:59])
    monkeypatch.setattr(dram, "decode_archive", None)  # the cache is all that is read
    again = dram.load_data(args, "cpu")
    assert torch.equal(data.images, again.images)
    kept = torch.cat([data.images[:, 5:59, 5:59], data.validation[0]]).flatten(1)
    both = [t.sort(0).values for t in (kept.sum(1), everything[:, 5:59, 5:59].flatten(1).sum(1))]
    assert torch.equal(*both)
    edges = torch.arange(64, dtype=torch.uint8).expand(60, 64, 64)  # a pixel tells its column
    for ruler in (edges, edges.transpose(1, 2)):
        ruled = data._replace(images=ruler)
        crops = torch.cat([x for _ in range(8) for x, _ in dram.minibatches(args, ruled)]).long()
        assert len(crops) == 8 * 60
        assert set(crops[:, 0, 0].tolist()) == set(range(11))  # 54 of 64 pixels, borders included
        assert torch.equal(crops.amax((1, 2)), crops[:, 0, 0] + 53)
    monkeypatch.setattr(dram, "IMAGES_PER_EPOCH", 45)  # of 60, others each time
    numbered = data._replace(labels=torch.arange(60))
    epochs = [torch.cat([y for _, y in dram.minibatches(args, numbered)]) for _ in range(9)]
    assert {len(set(y.tolist())) for y in epochs} == {45} and len(
        set(torch.cat(epochs).tolist())
    ) == 60


@pytest.mark.parametrize(("size", "width"), [(54, 64), (110, 130)])
def test_math_house_numbers_keep_their_labels_and_their_set(size, width, monkeypatch):
    """A photo's grey is its label; then a pixel's grey is its column, which tells the crop."""
    labels = dict(zip(("train", "extra", "test"), torch.arange(84).split([40, 32, 12])))

    def numbered(data_dir, w):
        assert (data_dir, w) == ("photos", width)
        grey = {name: y.byte()[:, None, None].expand(-1, w, w) for name, y in labels.items()}
        return {name: (grey[name], y[:, None].expand(-1, 6)) for name, y in labels.items()}

    monkeypatch.setattr(dram, "load_svhn", numbered)
    args = Args(task="svhn", svhn_size=size, data_dir="photos", batch_size=25)
    data = dram.load_data(args, "cpu")
    batches = list(dram.minibatches(args, data))
    assert [len(y) for _, y in batches] == [25, 25, 10]
    for x, y in (*batches, data.validation, data.test):
        assert x.shape == (len(y), size, size) and torch.equal(x[:, 0, 0].long(), y[:, 0])
    trained, held_out = torch.cat([y for _, y in batches])[:, 0], data.validation[1][:, 0]
    assert sorted([*trained.tolist(), *held_out.tolist()]) == [*range(72)]
    assert held_out.min() < 40 <= held_out.max()  # drawn from both archives
    assert data.test[1][:, 0].tolist() == [*range(72, 84)]
    whole = dram.load_data(dataclasses.replace(args, hold_out=False), "cpu")
    assert sorted(whole.labels[:, 0].tolist()) == [*range(72)]
    assert torch.equal(whole.validation[1], data.validation[1])  # the same set
    many = dict.fromkeys(labels, (torch.zeros(20_000, 1, 1).byte(), torch.zeros(20_000, 6)))
    monkeypatch.setattr(dram, "load_svhn", lambda *_: many)
    assert len(dram.load_data(args, "cpu").validation[1]) == 5000

    ruler = torch.arange(width, dtype=torch.uint8).expand(72, width, width)
    ruled = {name: (ruler[: len(y)], y[:, None].expand(-1, 6)) for name, y in labels.items()}
    monkeypatch.setattr(dram, "load_svhn", lambda *_: ruled)
    data = dram.load_data(args, "cpu")
    for x, _ in (data.validation, data.test):
        assert (x[:, 0, 0] == (width - size) // 2).all()
    offsets = torch.cat([x[:, 0, 0] for _ in range(9) for x, _ in dram.minibatches(args, data)])
    assert set(offsets.tolist()) == set(range(width - size + 1))


def test_learns_house_numbers_and_reads_them_from_both_sides(svhn, monkeypatch):
    """Small archives in the official format: the loader, the loss, the evaluation."""
    sizes = {"num_glimpses": 1, "width": 32, "lstm": 32}
    monkeypatch.setitem(dram.SIZES, "svhn", dram.SIZES["svhn"] | sizes)
    args = Args(task="svhn", data_dir=str(svhn), run_dir=str(svhn / "run"), device="cpu")
    args.monte_carlo_samples = 2
    args = dataclasses.replace(
        args, forward_backward=True, epochs=2, batch_size=30, optimizer="adam", learning_rate=3e-3
    )
    metrics = dram.main(args)
    assert 0 <= metrics["eval/error"] <= 100 and (svhn / "run" / "reading.png").exists()
    checkpoint = str(svhn / "run" / "checkpoint.pt")
    wide = dataclasses.replace(args, run_dir="", evaluate=checkpoint, svhn_size=110)
    assert dram.main(wide).keys() == dram.main(dataclasses.replace(wide, focus=True)).keys()
    before = (svhn / "run" / "checkpoint.pt").read_bytes()
    tuned = {"run_dir": str(svhn / "wide"), "svhn_size": 110, "epochs": 1, "learning_rate": 0.0}
    args = dataclasses.replace(args, pretrained=checkpoint, **tuned)
    assert dram.main(args)["charts/learning_rate"] == 0
    assert (svhn / "run" / "checkpoint.pt").read_bytes() == before
    kept, tuned = (torch.load(svhn / name / "checkpoint.pt")["net"] for name in ("run", "wide"))
    assert all(torch.equal(kept[name], tuned[name]) for name in kept)
    args = dataclasses.replace(args, pretrained="", run_dir="", resume=checkpoint, epochs=3)
    with pytest.raises(SystemExit, match="made with --svhn-size 54, not with --svhn-size 110"):
        dram.main(args)


# ---- Runs ---------------------------------------------------------------------------------------


TINY = Args(
    **DIGITS,
    patch_size=14,
    num_scales=3,
    learning_rate=3e-3,
    location_rate=1.0,
    batch_size=16,
    reinforce_into_core=False,
    location_std=0.3,
)


@pytest.fixture
def tiny(monkeypatch):
    """Pairs of zeros and ones, side by side on 56x56 pixels without clutter: three classes."""
    load = dram.load_digits

    def few(split):
        images, labels = load(split)
        return images[labels < 2], labels[labels < 2]

    def side_by_side(B, *_):
        return torch.tensor([[0, 14], [28, 14]]).repeat(B, 1, 1)

    monkeypatch.setattr(dram, "load_digits", few)
    monkeypatch.setattr(dram, "places_apart", side_by_side)
    sizes = {"S": 56, "num_classes": 3, "location_unit": 14, "width": 64, "lstm": 64}
    monkeypatch.setitem(dram.SIZES, "pairs", sizes)


def test_learns_where_to_look_from_rewards_alone():
    """A bright square anywhere, a reward for looking at it: context and emission find it."""
    torch.manual_seed(0)
    sizes = Sizes(S=48, num_classes=3, num_glimpses=1, location_unit=12, width=64, lstm=64)
    net = DeepRecurrentAttentionModel(sizes)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, nesterov=True)
    distances = []
    for _ in range(100):
        corner = torch.randint(48 - 12 + 1, (64, 2))
        x = torch.zeros(64, 48, 48, dtype=torch.uint8)
        x[dram.square(corner, 12)] = 255
        centre = (corner + 6 - 24) / 12
        seen = net(x, 1, std=0.4)
        R = ((seen.l[:, 0] - centre).norm(dim=1, keepdim=True) < 0.8).float()
        b = net.baseline(seen.r2.detach()).squeeze(2)
        log_pi = dram.location_log_prob(seen.sample, seen.mu, 0.4)
        loss = dram.bound_loss(torch.zeros(64, 1), log_pi, R, b, 1.0) + dram.regression_loss(R, b)
        dram.update(optimizer, loss.mean())
        distances.append(12 * (seen.mu[:, 0] - centre).norm(dim=1).mean().item())
    assert np.mean(distances[:5]) > 12 and np.mean(distances[-10:]) < 7  # pixels


def test_learns_tiny_pairs(tiny, tmp_path):
    start = time.perf_counter()
    args = dataclasses.replace(TINY, epochs=14, run_dir=str(tmp_path / "run"))
    metrics = dram.main(args)
    assert metrics["losses/cross_entropy"] < 0.5  # 1.04 without looking
    assert metrics["eval/error"] < 25  # chance: 50
    assert (tmp_path / "run" / "reading.png").stat().st_size > 5000
    (tmp_path / "run" / "reading.png").unlink()
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    evaluated = dram.main(dataclasses.replace(args, run_dir="", evaluate=checkpoint))
    assert evaluated == {tag: value for tag, value in metrics.items() if tag in evaluated}
    assert (tmp_path / "run" / "reading.png").stat().st_size > 5000
    assert time.perf_counter() - start < 120


def test_learns_on_bit_for_bit_after_it_was_stopped(tiny, tmp_path):
    args = dataclasses.replace(TINY, epochs=3, eval_every=1)
    whole = dram.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    epochs, batches = [], dram.minibatches

    def interrupted(*arguments):
        epochs.append(1)
        if len(epochs) == 3:
            signal.raise_signal(signal.SIGTERM)
        return batches(*arguments)

    first = dataclasses.replace(args, run_dir=str(tmp_path / "parts"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="Stopped; go on"):
        patch.setattr(dram, "minibatches", interrupted)
        dram.main(first)
    parts = str(tmp_path / "parts" / "checkpoint.pt")
    assert torch.load(parts)["epoch"] == 2
    resumed = dram.main(dataclasses.replace(args, resume=parts))
    clocks = ("charts/SPS", "charts/minutes")
    assert {k: v for k, v in resumed.items() if k not in clocks} == {
        k: v for k, v in whole.items() if k not in clocks
    }


def test_learns_on_with_an_optimizer_fit_for_its_own_device(tiny, tmp_path):
    """Only a GPU's steps are recorded, for which Adam must be capturable, wherever it began."""
    args = dataclasses.replace(TINY, epochs=1, run_dir=str(tmp_path))
    dram.main(args)
    path = tmp_path / "checkpoint.pt"
    checkpoint = torch.load(path)
    for group in checkpoint["optimizer"]["param_groups"]:
        assert not group["capturable"]
        group["capturable"] = True  # as after a run on a GPU
    torch.save(checkpoint, path)
    dram.main(dataclasses.replace(args, epochs=2, run_dir="", resume=str(path)))
    resumed = torch.load(path)
    assert resumed["epoch"] == 2
    assert not any(group["capturable"] for group in resumed["optimizer"]["param_groups"])


def test_gradient_location_rate_is_that_of_what_rewards_alone_train(tiny, tmp_path):
    args = dataclasses.replace(TINY, epochs=1, location_rate=0.0, seed=2, run_dir=str(tmp_path))
    dram.main(args)
    trained = torch.load(tmp_path / "checkpoint.pt")["net"]
    torch.manual_seed(args.seed)
    begun = dram.make_networks(args).state_dict()
    kept = {name.split(".")[1] for name in begun if torch.equal(begun[name], trained[name])}
    assert kept == {"context", "lstm2", "emission"}
    whole = [name for name in begun if name.split(".")[1] in kept]
    assert all(torch.equal(begun[name], trained[name]) for name in whole)


class OnGPU(torch.Tensor):
    """A tensor that says it is on one."""

    is_cuda = True


@pytest.fixture
def recordings(monkeypatch):
    """CUDA graphs of a function that returns what it computes: one computes anew in place."""

    class Graph:
        recorded, replays = [], 0

        def replay(self):
            x, said = self.recorded[-1]
            said.copy_(2 * x.sum())
            Graph.replays += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    return Graph


def test_math_steps_are_recorded_and_repeated_on_a_gpu(recordings):
    """From the fourth on, each with its own minibatch; the last one, smaller, is made as usual."""
    minibatches = [torch.full((size,), float(n)) for n, size in enumerate((4, 4, 4, 4, 4, 4, 3))]
    wanted, learned = [2 * x.sum().item() for x in minibatches], []

    def learn(x, y):
        said = 2 * x.sum()
        learned.append(x.clone())
        recordings.recorded.append((x, said))
        return said

    on_cpu = [x.item() for x in dram.learn_from(((x, None) for x in minibatches), learn)]
    assert on_cpu == wanted and len(learned) == 7 and recordings.replays == 0
    del learned[:], recordings.recorded[:]
    pairs = [(x.as_subclass(OnGPU), torch.zeros(len(x))) for x in minibatches]
    on_gpu = list(dram.learn_from(iter(pairs), learn))
    assert [x.item() for x in on_gpu] == wanted and recordings.replays == 3
    assert [x[0].item() for x in learned] == [0, 1, 2, 3, 6]  # 3: recorded, which computes nothing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_math_recorded_steps_train_as_those_made_one_by_one(tmp_path):
    args = Args(**DIGITS | {"device": "cuda"}, location_std=1e-6, learning_rate=1e-4)
    data, trained = dram.load_data(args, "cuda"), []
    batches = list(islice(dram.minibatches(args, data), 8))
    for recorded in (True, False):
        torch.manual_seed(0)
        nets = dram.make_networks(args).to("cuda")
        optimizer = dram.make_optimizer(nets, args)
        for group in optimizer.param_groups:
            group["capturable"] = True

        def learn(nets, optimizer, x, y):
            loss, _ = dram.minibatch_loss(nets, args, x, y)
            dram.update(optimizer, loss)
            return loss.detach()

        step = partial(learn, nets, optimizer)
        steps = dram.learn_from(iter(batches), step) if recorded else starmap(step, batches)
        trained.append(torch.stack(list(steps)))
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-3)


class Watched:
    """What a run without networks does: three minibatches an epoch, of 3, 3 and 1 images."""

    def __init__(self, monkeypatch):
        self.steps = []  # of each: the groups' rates, whether the optimizer begins, a draw
        self.evaluations = []  # of each: the steps before it, its prefix, the set
        self.drawings, self.losses, self.clock = [], [], 0.0
        self.data = dram.Data(range(7), None, *(tuple(torch.rand(2, 1)) for _ in "vt"))
        self.draw, step = None, dram.update

        def make_networks(args):
            names = ("glimpse", "emission")
            parts = ({name: torch.nn.Linear(1, 1) for name in names} for _ in "fb")
            return torch.nn.ModuleList(map(torch.nn.ModuleDict, parts))

        def minibatches(args, data):
            assert data is self.data
            for size in (3, 3, 1):
                self.clock += 2.0
                self.draw = torch.rand(1).item()
                yield torch.zeros(size), None

        def minibatch_loss(nets, args, x, y):
            told = self.losses.pop(0) if self.losses else float(len(self.steps))
            loss = sum(p.square().sum() for p in nets.parameters()) * told
            return loss, {"losses/cross_entropy": torch.tensor(told)}

        def update(optimizer, loss):
            rates = [group["lr"] for group in optimizer.param_groups]
            self.steps.append((rates, not optimizer.state, self.draw))
            step(optimizer, loss)

        def evaluate(nets, args, x, y, prefix):
            self.clock += 100.0
            (of,) = (name for name in ("validation", "test") if (x, y) == getattr(self.data, name))
            self.evaluations.append((len(self.steps), prefix, of))
            return {f"{prefix}/error": len(self.steps) + (of == "test") / 2}

        def draw_reading(net, args, x, y, path):
            self.drawings.append((net, x, y, path))

        def load_data(args, device):
            return self.data

        for part in (make_networks, minibatches, minibatch_loss, update, evaluate):
            monkeypatch.setattr(dram, part.__name__, part)
        for part in (load_data, draw_reading):
            monkeypatch.setattr(dram, part.__name__, part)
        watch = SimpleNamespace(perf_counter=lambda: self.clock, time=time.time)
        monkeypatch.setattr(dram, "time", watch)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def test_math_rates_decay_with_epochs_and_go_on_after_a_resume(watched, tmp_path, monkeypatch):
    """As do the clock and Adam's moments; a run from --pretrained has the weights and no more."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    flags = {"learning_rate": 0.8, "location_rate": 0.25, "learning_rate_decay": 0.5}
    args = Args(**DIGITS, **flags, epochs=3, seed=7, run_dir=str(tmp_path / "begun"))
    metrics = dram.main(args)
    begun, rates = watched.steps[:], [[0.8, 0.2], [0.4, 0.1], [0.2, 0.05], [0.1, 0.025]]
    assert [step[0] for step in begun] == [rates[e] for e in range(3) for _ in range(3)]
    assert [step[1] for step in begun] == [True] + [False] * 8
    assert metrics["charts/learning_rate"] == 0.2 and metrics["charts/minutes"] == 18 / 60
    del watched.steps[:]
    checkpoint = str(tmp_path / "begun" / "checkpoint.pt")
    resumed = dram.main(dataclasses.replace(args, resume=checkpoint, epochs=4, run_dir=""))
    assert [step[:2] for step in watched.steps] == [(rates[3], False)] * 3
    assert resumed["charts/learning_rate"] == 0.1 and resumed["charts/minutes"] == 24 / 60
    assert seeds == [7 + 3]  # a GPU's state is not kept: other draws than at the begin
    del watched.steps[:]
    tuned = {"pretrained": checkpoint, "run_dir": str(tmp_path / "tuned"), "epochs": 1}
    metrics = dram.main(dataclasses.replace(args, **tuned))
    assert watched.steps == begun[:3] and metrics["charts/minutes"] == 6 / 60


def test_math_report_has_means_over_an_epoch_and_its_speed(watched, tmp_path):
    args = Args(**DIGITS, epochs=2, monte_carlo_samples=4, run_dir=str(tmp_path))
    metrics = dram.main(args)
    assert metrics["losses/cross_entropy"] == (3 + 4 + 5) / 3
    assert metrics["charts/SPS"] == pytest.approx((3 + 3 + 1) / 6)  # images, whatever their paths


def test_math_evaluations_are_of_their_sets_and_at_their_epochs(watched, tmp_path):
    """In between on validation images alone, at the end and with --evaluate on test images, too."""
    args = Args(**DIGITS, epochs=5, eval_every=2, run_dir=str(tmp_path))
    metrics = dram.main(args)
    of_test = (15, "eval", "test")
    between = [(steps, "validation", "validation") for steps in (6, 12, 15)]
    assert watched.evaluations == [*between, of_test]
    last = {"validation/error": 15, "eval/error": 15.5}
    assert last.items() <= metrics.items()
    with open(tmp_path / "metrics.csv") as file:
        rows = [(step, tag, float(n)) for step, tag, n in csv.reader(file) if "error" in tag]
    before = [("2", "validation/error", 6.0), ("4", "validation/error", 12.0)]
    assert rows == before + [("5", tag, n) for tag, n in last.items()]
    ((net, x, y, path),) = watched.drawings
    assert (x, y) == watched.data.test and path == tmp_path / "reading.png"
    written = torch.load(tmp_path / "checkpoint.pt")["net"]
    assert torch.equal(net["emission"].weight, written["0.emission.weight"])  # left to right
    del watched.evaluations[:]
    evaluate = dataclasses.replace(args, run_dir="", evaluate=str(tmp_path / "checkpoint.pt"))
    assert dram.main(evaluate) == last and len(watched.steps) == 15
    assert watched.evaluations == [between[-1], of_test] and len(watched.drawings) == 2
    assert watched.drawings[1][1:] == watched.drawings[0][1:]


def test_math_who_holds_nothing_out_validates_on_nothing(watched, tmp_path):
    args = Args(**DIGITS, epochs=5, eval_every=2, hold_out=False, run_dir=str(tmp_path))
    metrics = dram.main(args)
    assert watched.evaluations == [(15, "eval", "test")] and metrics["eval/error"] == 15.5
    assert "validation" not in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize("at", ["evaluate", "report"])
def test_math_a_run_stopped_at_its_end_is_left_to_evaluate(at, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(dram, at, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="Stopped; evaluate with --evaluate"):
        dram.main(Args(**DIGITS, epochs=1, run_dir=str(tmp_path)))


def test_bad_input_a_loss_that_is_no_number_stops_the_run(watched, tmp_path):
    watched.losses[:] = [1.0] * 4 + [math.nan] * 9
    with pytest.raises(dram.Diverged, match="The loss is nan in step 2 of epoch 2"):
        dram.main(Args(**DIGITS, epochs=3, run_dir=str(tmp_path)))
    assert len(watched.steps) == 5  # the last one is not kept:
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_bad_input_flags_that_shape_a_network_stay_as_they_were(watched, tmp_path):
    flags = {"task": "addition", "model": "ram", "dataset": "mnist", "context": "none"}
    flags |= {"glimpse_policy": "random", "patch_size": 10, "num_scales": 3}
    flags |= {"num_glimpses": 5, "location_unit": 7.0}
    changes = [(Args(**DIGITS), *change) for change in flags.items()]
    changes += [(Args(**HOUSES, device="cpu"), "forward_backward", True)]
    kept = {"seed": 2, "batch_size": 64, "optimizer": "sgd", "learning_rate": 0.5}
    kept |= {"bfloat16": True, "location_rate": 0.5, "reward": "correct"}
    kept |= {"learning_rate_decay": 0.5}
    kept |= {"reinforce_weight": 1.0, "reinforce_into_core": False, "monte_carlo_samples": 2}
    assert kept.keys() == set(dram.KEPT)
    going_on = [(Args(**DIGITS), *change) for change in kept.items()]
    going_on += [(Args(**HOUSES, device="cpu"), "svhn_size", 110)]
    paths = {task: str(tmp_path / task / "checkpoint.pt") for task in ("pairs", "svhn")}
    for args, _, _ in (changes[0], changes[-1]):
        dram.main(dataclasses.replace(args, epochs=1, run_dir=str(tmp_path / args.task)))
    for args, name, value in changes + going_on:
        changed, path = dataclasses.replace(args, **{name: value}), paths[args.task]
        flag = "--" + name.replace("_", "-")
        sentence = f"made with {flag} {getattr(args, name)}, not with {flag} {value}"
        for flag in ("resume", "evaluate", "pretrained"):
            if flag != "resume" and (args, name, value) in going_on:
                continue
            with pytest.raises(SystemExit, match=sentence):
                dram.main(dataclasses.replace(changed, **{flag: path}))
        if (args, name, value) in going_on:
            found = dram.main(dataclasses.replace(changed, evaluate=path))
            assert found.keys() == {"validation/error", "eval/error"}
    for flag in ("resume", "evaluate"):  # but another run may begin with these weights
        changed = Args(**DIGITS, location_std=0.3, **{flag: paths["pairs"]})
        with pytest.raises(SystemExit, match=r"made with --location-std 0.17, not with .* 0.3"):
            dram.main(changed)
        changed = Args(**DIGITS, hold_out=False, **{flag: paths["pairs"]})
        with pytest.raises(SystemExit, match=r"made with --hold-out True, not with .* False"):
            dram.main(changed)  # else it would validate on images that it has learned
    more = {"pretrained": paths["pairs"], "run_dir": str(tmp_path / "more"), "epochs": 1}
    dram.main(Args(**DIGITS, location_std=0.3, **more))


def test_math_pictures_show_the_path_and_what_is_read_after_each_glimpse(monkeypatch, tmp_path):
    monkeypatch.setitem(dram.SIZES, "svhn", SMALL._asdict())
    figures, asked = [], []
    monkeypatch.setattr(dram.plt, "close", figures.append)
    monkeypatch.setattr(dram.plt.Figure, "savefig", lambda *_, **__: None)
    l = torch.linspace(-2.9, 2.9, 24).view(2, 6, 2)
    digits = torch.tensor([[1, 1, 2, 3, TERMINAL, TERMINAL], [7, 5, TERMINAL, 9, 9, 9]])

    class Drawn(Scripted):
        unit, classifier = 6, torch.nn.Identity()

        def __call__(self, *arguments):
            asked.append(arguments)
            return dram.Reading(F.one_hot(digits, 11), None, None, None, l)

    x, y = images(2, 54), torch.tensor([[1, 2, TERMINAL], [7, TERMINAL, NO_LABEL]])
    args = Args(task="svhn", glimpse_policy="random", patch_size=10)
    dram.draw_reading(Drawn(), args, x, y, tmp_path / "reading.png")
    monkeypatch.undo()
    dram.plt.close(figures[0])
    assert len(asked) == 1 and torch.equal(asked[0][0], x) and asked[0][1:] == (6, "random")
    titles = ("1 2 end", "read: 1 1, 2 3, end end"), ("7 end", "read: 7 5, end 9")
    for i, (axis, T) in enumerate(zip(figures[0].axes, (6, 4))):
        assert (axis.get_title(), axis.get_xlabel()) == titles[i]
        assert np.array_equal(axis.images[0].get_array(), x[i])
        places = 6 * l[i, :T].numpy() + 54 / 2  # pixels
        np.testing.assert_allclose(axis.lines[0].get_xydata(), places, rtol=1e-5)
        np.testing.assert_allclose(axis.collections[0].get_offsets(), places, rtol=1e-5)
        corners = [patch.get_xy() for patch in axis.patches]
        assert np.array_equal(corners, places.round() - 5)
        assert {(patch.get_width(), patch.get_height()) for patch in axis.patches} == {(10, 10)}


@pytest.mark.parametrize(
    "flags",
    [
        {"model": "ram"},
        {"model": "conv"},
        {"context": "none", "reinforce_into_core": True},
        {"glimpse_policy": "random"},
        {"monte_carlo_samples": 2, "average": "probabilities", "optimizer": "sgd"},
    ],
    ids=str,
)
def test_learns_with_other_models(tiny, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(dram, "check_flags", lambda _: None)  # some of TINY's have no effect here
    metrics = dram.main(dataclasses.replace(TINY, epochs=2, run_dir=str(tmp_path), **flags))
    assert metrics["losses/cross_entropy"] < 1.3 and 0 <= metrics["eval/error"] < 80
    assert ("eval/error_single_path" in metrics) == ("conv" not in flags.values())
    assert (tmp_path / "reading.png").exists() == ("conv" not in flags.values())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"forward_backward": True}, "--forward-backward is for --task svhn"),
        (HOUSES | {"focus": True}, "--focus is for --evaluate"),
        (FOCUS | {"glimpse_policy": "random"}, "--focus .* learned glimpses"),
        (HOUSES | {"patch_size": 8}, "--patch-size must be at least 9"),
        ({"task": "svhn"}, "--dataset is for pairs and addition"),
        ({"svhn_size": 110}, "--svhn-size is for --task svhn"),
        ({"model": "ram", "context": "none"}, "--context is for --model dram"),
        ({"model": "conv", "glimpse_policy": "random"}, "--glimpse-policy is for dram and ram"),
        (
            {"model": "conv", "average": "probabilities"},
            "--average has no effect with --model conv",
        ),
        (
            {"glimpse_policy": "random", "location_std": 0.3},
            "--location-std has no effect without locations to learn: leave it out",
        ),
        ({"pretrained": "good.pt", "resume": "good.pt"}, "--pretrained begins a run"),
        ({"num_scales": 6}, "passes 200, two images"),
        ({"num_scales": 2**32 - 1}, "passes 200, two images"),
        ({"patch_size": 201, "num_scales": 1}, "passes 200, two images"),
        ({"batch_size": 0}, "--batch-size must lie between 1"),
        ({"location_std": -1.0}, "--location-std must lie between 0"),
        ({"location_std": 0.0}, "--location-std must be above 0"),
        ({"evaluate": "missing.pt"}, "missing.pt is missing, damaged or no checkpoint"),
        ({"resume": "good.pt", "context": "none"}, "made with --context coarse, not with"),
        ({"pretrained": "good.pt", "task": "addition"}, "made with --task pairs, not with"),
        ({"run_dir": ".", "dataset": "mnist"}, "holds a run already"),
        ({"resume": "good.pt"}, "has had 2 epochs: raise --epochs"),
        ({"dataset": "mnist"}, "is damaged.*delete it"),
        (HOUSES, r"train.tar.gz is missing or damaged.*housenumbers.*into data/svhn/"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(**DIGITS, epochs=1)
    nets = dram.make_networks(args)
    optimizer = dram.make_optimizer(nets, args)
    state = {"net": nets.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    state |= {"args": dataclasses.asdict(args), "rng": torch.get_rng_state(), "seconds": 0.0}
    for path in ("good.pt", "checkpoint.pt"):
        dram.save_checkpoint(Path(path), **state)
    Path("data/mnist").mkdir(parents=True)
    Path("data/mnist/train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        dram.main(dataclasses.replace(args, **flags))
    assert isinstance(stop.value.code, str) and sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_refused_before_data_is_loaded(tiny, tmp_path, monkeypatch):
    args = dataclasses.replace(TINY, epochs=1, run_dir=str(tmp_path / "run"))
    dram.main(args)
    monkeypatch.setattr(dram, "load_data", None)
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    for flags in (
        {},
        {"run_dir": "", "resume": checkpoint},
        {"evaluate": checkpoint, "model": "ram"},
    ):
        with pytest.raises(
            SystemExit, match=r"holds a run already|has had 1 epochs|made with --model"
        ):
            dram.main(dataclasses.replace(args, **flags))


def test_bad_input_conv_of_another_size(svhn, monkeypatch):
    """Its layers have other shapes: that is said, not that the file is damaged."""
    monkeypatch.setattr(
        dram, "ConvolutionalBaseline", lambda sizes, *_: torch.nn.Linear(sizes.S, 1)
    )
    args = Args(task="svhn", model="conv", data_dir=str(svhn), device="cpu")
    state = {"net": dram.make_networks(args).state_dict(), "args": dataclasses.asdict(args)}
    dram.save_checkpoint(svhn / "conv.pt", **state)
    for flag in ("evaluate", "pretrained", "resume"):
        with pytest.raises(SystemExit, match="made with --svhn-size 54, not with --svhn-size 110"):
            dram.main(dataclasses.replace(args, svhn_size=110, **{flag: str(svhn / "conv.pt")}))


def test_bad_input_folders_that_cannot_be_written(svhn, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(dram, "download_mnist", lambda path: dram.write_whole(path, b""))
    with pytest.raises(SystemExit, match=r"cannot be written .*: change --data-dir"):
        dram.load_data(Args(data_dir=str(tmp_path / "file")), "cpu")
    monkeypatch.setattr(dram, "decode_archive", None)  # it is seen before the long work
    monkeypatch.setattr(dram.os, "access", lambda path, mode: mode != dram.os.W_OK)
    with pytest.raises(SystemExit, match=r"svhn cannot be written.*--data-dir"):
        dram.load_svhn(str(svhn), 64)


def test_bad_input_archives(svhn, monkeypatch):
    """Not whole, not HDF5, no h5py, a damaged cache."""
    folder = svhn / "svhn"
    whole = (folder / "extra.tar.gz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no tar", b""):
        (folder / "extra.tar.gz").write_bytes(damaged)
        with pytest.raises(SystemExit, match=r"extra.tar.gz is missing or damaged"):
            dram.load_svhn(str(svhn), 64)
    numbers, photos = house_numbers(3, 0)
    archive(folder / "extra.tar.gz", [*numbers, ("9.png", [1], [(0, 0, 5, 5)])], photos)
    with pytest.raises(SystemExit, match="1 images are missing"):
        dram.load_svhn(str(svhn), 64)
    assert not list(folder.glob("decoded*"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="pip install h5py"):
        patch.setitem(sys.modules, "h5py", None)
        dram.load_svhn(str(svhn), 64)
    torch.save({"train": 1}, folder / "decoded_64.pt")
    with pytest.raises(SystemExit, match=r"decoded_64.pt is damaged"):
        dram.load_svhn(str(svhn), 64)
    (folder / "decoded_64.pt").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"decoded_64.pt is damaged"):
        dram.load_svhn(str(svhn), 64)


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "multi_object_attention.py"), "--task", "addition"]
    command += ["--dataset", "digits", "--epochs", "1", "--monte-carlo-samples", "1"]
    command += ["--num-glimpses", "1", "--device", "cpu"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "eval/error_single_path" in ended.stdout
    (run_dir,) = tmp_path.glob("runs/addition_dram__multi_object_attention__1__*")
    names = {path.name for path in run_dir.iterdir()}
    assert {"checkpoint.pt", "metrics.csv", "reading.png"} <= names
