"""prong.py against closed forms, the canonical network, full Fisher matrices and its own runs.

Public mistakes that these tests would catch: algorithm 1 as printed (wrong signs, c instead of d),
a shift added to the bias of a normalised layer, whitening parameters with gradients, squared
eigenvalues, sqrt(n - 1) factors, a momentum left in the old basis, padding by -c.
"""

import dataclasses
import itertools
import pickle
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import ROOT
from torch import nn

import prong
from prong import Args, WhitenedLayer

SHORT = {"dataset": "digits", "report_every": 20, "total_iterations": 40}
TINY = SHORT | {"whitening_period": 20}


def small(method="prong", seed=0, widths=(6, 5, 4, 3)):
    torch.manual_seed(seed)
    return prong.dense_network(widths, nn.Tanh, method, rank=100).double()


def convolutions(method="prong"):
    torch.manual_seed(0)
    first, last = (3, 5, 3, method, 3), (5, 4, 3, method, 5)
    layers = WhitenedLayer(*first), nn.ReLU(), WhitenedLayer(*last, last=True)
    return nn.Sequential(*layers).double()


def correlated(N=200, n=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(N, n, generator=generator, dtype=torch.float64) @ mix + 3


def images(N=40, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, 3, 7, 6, generator=generator, dtype=torch.float64) + 0.5


def sgd(net, args):
    return prong.make_optimizer(net, args)


def train_a_little(net, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


# ---- Whitening ----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0])
def test_math_whitening_gives_the_covariance_of_the_paper(epsilon):
    h = correlated()
    white, lambda_ = prong.estimate_whitening(h, epsilon)
    z, U = white.times(h - white.c), white.times(torch.eye(6, dtype=torch.float64))
    sigma = torch.from_numpy(np.cov(h.numpy().T, bias=True))
    values, vectors = torch.linalg.eigh(sigma)
    torch.testing.assert_close(lambda_.flip(0), values)
    covariance = np.cov((z @ vectors).numpy().T, bias=True)  # in the directions of Sigma
    expected = torch.diag(values / (values + epsilon)).numpy()
    np.testing.assert_allclose(covariance, expected, atol=1e-8)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-8)
    torch.testing.assert_close(white.inverse_times(U), torch.eye(6, dtype=torch.float64))
    inverse = torch.linalg.inv(sigma + epsilon * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(U.T @ U, inverse)


def test_math_too_few_samples_and_constant_inputs_stay_finite():
    h = correlated(N=3)
    h[:, 2] = 0.25
    white, lambda_ = prong.estimate_whitening(h.float(), 1e-3)
    for part in (*white, lambda_):
        assert torch.isfinite(part).all() and part.dtype == torch.float64
    assert white.E.shape == (6, 3)  # three directions, and one gain for all others
    U = white.times(torch.eye(6, dtype=torch.float64))
    assert U.abs().max() <= 1e-3**-0.5 * 1.001
    torch.testing.assert_close(U, U.T)
    torch.testing.assert_close(white.inverse_times(U), torch.eye(6, dtype=torch.float64))
    sigma = torch.from_numpy(np.cov(h.float().numpy().T, bias=True))
    inverse = torch.linalg.inv(sigma + 1e-3 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(U @ U, inverse)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3, 3)])
def test_math_weights_times_U_and_back(shape):
    """Against the product written out, for matrices and kernels."""
    h, V = correlated(N=4), torch.randn(shape, dtype=torch.float64)
    white, _ = prong.estimate_whitening(h, 0.1)
    U = white.times(torch.eye(6, dtype=torch.float64))
    W, b = prong.to_canonical(V, torch.ones(4).double(), white)
    torch.testing.assert_close(W, torch.einsum("mi...,in->mn...", V, U))
    torch.testing.assert_close(b, 1 - torch.einsum("mi...,i->m", W, white.c))
    V_, d = prong.to_whitened(W, b, white)
    torch.testing.assert_close(V_, V)
    torch.testing.assert_close(d, torch.ones(4).double())


@pytest.mark.parametrize("momentum", ["reset", "carry"])
@pytest.mark.parametrize("method", ["prong", "prong+"])
@pytest.mark.parametrize("make, x", [(small, correlated()), (convolutions, images())])
def test_math_a_projection_does_not_change_the_function(make, x, method, momentum):
    """Also at the border of images, in the second projection and with batch normalisation."""
    args = Args(method=method, momentum=momentum, epsilon=1e-2, learning_rate=1e-3)
    net = make(method)
    optimizer = sgd(net, args)
    for i in range(3):
        before = net(x)
        running = net.eval()(x)
        prong.rewhiten(net.train(), x[i * 10 : i * 10 + 30], optimizer, args)
        torch.testing.assert_close(net.eval()(x), running, rtol=0, atol=1e-8)
        torch.testing.assert_close(net.train()(x), before, rtol=0, atol=1e-8)
        train_a_little(net, optimizer, x)
    first = net[0]
    assert first.gain.abs().min() > 0.1  # it is not the identity
    assert (first.c == 0).all() == (method == "prong+")  # a normalised layer needs no centre


def test_math_a_projection_from_fewer_samples_than_the_last_does_not_change_the_function():
    net, x = small(), correlated()
    args, before = Args(epsilon=1e-2), net(x)
    for N in (50, 3, 4):
        prong.rewhiten(net, x[:N], sgd(net, args), args)
        torch.testing.assert_close(net(x), before, rtol=0, atol=1e-8)


def test_math_whitened_layers_see_zeros_outside_the_image():
    net, x = convolutions()[0], images()
    W, b = net.V.detach().clone(), net.d.detach().clone()
    expected = F.conv2d(x, W, b, padding=1)
    args = Args(epsilon=1e-2)
    prong.rewhiten(net, x, sgd(net, args), args)
    torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=0)
    W_, b_ = prong.to_canonical(net.V, net.d, net.white)
    torch.testing.assert_close(W_, W)
    torch.testing.assert_close(b_, b)
    pixels = net.whiten(x.movedim(1, -1).flatten(0, -2))
    covariance = pixels.T @ pixels / len(pixels)
    assert (covariance - torch.eye(3)).abs().max() < 0.2  # lambda / (lambda + 0.01)


def test_math_statistics_are_those_of_each_layers_input():
    net, x = small(), correlated()
    inputs = prong.layer_inputs(net, x)
    assert list(inputs) == [net[0], net[2], net[4]]
    torch.testing.assert_close(inputs[net[0]], x)
    torch.testing.assert_close(inputs[net[2]], net[0](x).tanh().detach())
    net, x = convolutions(), images()
    pixels = prong.layer_inputs(net, x)[net[0]]
    assert pixels.shape == (40 * 7 * 6, 3)
    torch.testing.assert_close(pixels[7], x[0, :, 1, 1])
    assert not net[0]._forward_pre_hooks


@pytest.mark.parametrize("momentum", ["reset", "carry"])
def test_math_momentum_at_a_whitening(momentum):
    """Carried, the canonical velocity stays; reset, it is gone."""
    args = Args(momentum=momentum, learning_rate=1e-3, momentum_decay=0.9)
    net, x = small(), correlated()
    optimizer = sgd(net, args)
    prong.rewhiten(net, x[:50], optimizer, args)
    train_a_little(net, optimizer, x)
    layer = net[2]

    def velocity():
        V, d = (optimizer.state[p].get("momentum_buffer") for p in (layer.V, layer.d))
        return None if V is None else prong.to_canonical(V, d, layer.white)

    before = velocity()
    assert before[0].abs().max() > 0
    prong.rewhiten(net, x[50:], optimizer, args)
    after = velocity()
    if momentum == "reset":
        assert after is None
    else:
        torch.testing.assert_close(after, before)
    train_a_little(net, optimizer, x)


def test_math_momentum_carried_where_none_is_kept():
    args = Args(momentum="carry", learning_rate=1e-3, momentum_decay=0.0)
    net, x = small(), correlated()
    optimizer = sgd(net, args)
    train_a_little(net, optimizer, x)
    prong.rewhiten(net, x, optimizer, args)
    train_a_little(net, optimizer, x)


def test_gradient_one_step_is_the_preconditioned_canonical_one():
    """W <- W - a G (Sigma + epsilon)^-1 with G = E[delta (h - c)^T], b accordingly."""
    args = Args(epsilon=0.05, learning_rate=0.1, momentum_decay=0.0)
    layer, h = small(widths=(6, 4))[0], correlated()
    W, b = layer.V.detach().clone(), layer.d.detach().clone()
    y = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))
    optimizer = sgd(layer, args)
    prong.rewhiten(layer, h, optimizer, args)
    F.cross_entropy(layer(h), y).backward()
    optimizer.step()
    delta = ((h @ W.T + b).softmax(1) - F.one_hot(y, 4)) / 200
    c = h.mean(0)
    sigma = (h - c).T @ (h - c) / 200
    step = -0.1 * delta.T @ (h - c) @ torch.linalg.inv(sigma + 0.05 * torch.eye(6))
    W_, b_ = prong.to_canonical(layer.V, layer.d, layer.white)
    torch.testing.assert_close(W_, W + step)
    torch.testing.assert_close(b_, b - 0.1 * delta.sum(0) - step @ c)


def test_gradient_for_small_epsilon_it_is_the_natural_gradient_with_white_derivatives():
    """Kronecker factors E[(h,1) (h,1)^T] and I, of the layer with its bias."""
    args = Args(epsilon=1e-12, learning_rate=1.0, momentum_decay=0.0)
    layer, h = small(widths=(6, 4))[0], correlated()
    target = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    W, b = layer.V.detach().clone(), layer.d.detach().clone()
    optimizer = sgd(layer, args)
    prong.rewhiten(layer, h, optimizer, args)
    ((layer(h) - target).square().sum() / 2 / 200).backward()
    optimizer.step()
    ones = torch.ones(200, 1)
    h1, theta = torch.cat([h, ones], 1), torch.cat([W, b[:, None]], 1)
    gradient = (h1 @ theta.T - target).T @ h1 / 200
    expected = theta - gradient @ torch.linalg.inv(h1.T @ h1 / 200)
    W_, b_ = prong.to_canonical(layer.V, layer.d, layer.white)
    torch.testing.assert_close(torch.cat([W_, b_[:, None]], 1), expected, atol=1e-6, rtol=1e-6)


def test_gradient_reaches_V_and_d_alone():
    net, x = small(), correlated()
    prong.rewhiten(net, x, sgd(net, Args()), Args())
    names = {name for name, _ in net.named_parameters()}
    assert names == {f"{i}.{p}" for i in (0, 2, 4) for p in "Vd"}
    net(x).sum().backward()
    assert all(not buffer.requires_grad for buffer in net.buffers())


@pytest.mark.parametrize("task", ["fisher", pytest.param("autoencoder", marks=pytest.mark.slow)])
def test_math_without_whitening_it_is_gradient_descent_bit_for_bit(task, tmp_path, monkeypatch):
    """U stays I and takes part in every product; both see the same minibatches."""
    monkeypatch.setattr(prong, "rewhiten", lambda *_: [])
    monkeypatch.setattr(prong, "draw_spectra", lambda *_: None)
    results = []
    for method, flags in (("sgd", SHORT), ("prong", TINY)):
        args = Args(task=task, method=method, **flags)
        metrics = prong.main(dataclasses.replace(args, run_dir=str(tmp_path / method)))
        net = torch.load(tmp_path / method / "checkpoint.pt")["net"]
        results.append((metrics, {k: v for k, v in net.items() if k.split(".")[1] in "Vd"}))
    (first, theta), (second, theta_) = results
    assert theta.keys() == theta_.keys()
    assert all(torch.equal(theta[name], theta_[name]) for name in theta)
    assert first["eval/test_loss"] == second["eval/test_loss"]


def test_math_batch_normalisation_is_that_of_torch():
    torch.manual_seed(0)
    layer, x = WhitenedLayer(6, 4, 0, "prong+", 6).double(), correlated()
    W = layer.V.detach().clone()
    prong.rewhiten(layer, x, sgd(layer, Args()), Args())
    expected = F.batch_norm(x @ W.T, None, None, training=True)
    torch.testing.assert_close(layer(x), expected)
    assert layer.d is None


# ---- The Fisher matrix --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sgd", "prong"])
def test_math_fisher_matrix_against_a_loop(method):
    net, x = small(method), correlated(N=7)
    if method == "prong":
        prong.rewhiten(net, correlated(), sgd(net, Args()), Args())
    expected = 0
    for i, y in itertools.product(range(7), range(3)):
        log_p = net(x[i : i + 1]).log_softmax(1)[0, y]
        g_V, g_d = torch.autograd.grad(log_p, (net[2].V, net[2].d))
        g = torch.cat([g_V, g_d[:, None]], 1).flatten()
        expected = expected + log_p.exp().item() * torch.outer(g, g) / 7
    torch.testing.assert_close(prong.fisher_matrix(net, net[2], x), expected)


def test_math_whitening_improves_the_condition_of_fisher_matrix_and_inputs():
    net, x = small(widths=(6, 5, 5, 4)), correlated(N=500)
    x = x / x.std()
    fisher, inputs = prong.fisher_matrix(net, net[2], x), prong.input_condition(net, x)
    args = Args(epsilon=1e-6)
    prong.rewhiten(net, x, sgd(net, args), args)
    after = prong.fisher_matrix(net, net[2], x)
    assert prong.condition_number(after) < 0.1 * prong.condition_number(fisher)
    assert prong.input_condition(net, x) < 1.01 < 3 < inputs


def test_math_condition_number():
    matrix = torch.diag(torch.tensor([2.0, 0.5, 8.0], dtype=torch.float64))
    assert prong.condition_number(matrix) == pytest.approx(16)
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert 1e12 < prong.condition_number(singular) < 1e17


# ---- Networks and data --------------------------------------------------------------------------


def test_math_networks_have_the_papers_sizes():
    net = prong.autoencoder("prong", 100)
    layers = [layer for layer in net if isinstance(layer, WhitenedLayer)]
    assert [len(layer.V) for layer in layers] == [1000, 500, 250, 30, 250, 500, 1000, 784]
    assert [len(layer.c) for layer in layers] == [784, 1000, 500, 250, 30, 250, 500, 1000]
    assert [len(layer.gain) for layer in layers] == [100, 100, 100, 100, 30, 100, 100, 100]
    assert sum(isinstance(layer, nn.Sigmoid) for layer in net) == 7
    net = prong.convolutional_network("batchnorm")
    sizes = [tuple(layer.V.shape) for layer in net if isinstance(layer, WhitenedLayer)]
    assert [size[0] for size in sizes] == [64, 64, 128, 128, 256, 256, 512, 10]
    assert all(size[2:] == (3, 3) for size in sizes)
    seen = []
    net[-2].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    assert net(torch.rand(2, 3, 24, 24)).shape == (2, 10)
    assert seen == [(2, 10, 3, 3)]
    net[-2].register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    net(torch.rand(2, 3, 24, 24))
    assert torch.equal(seen[-1][1][:, :, 0, 0], seen[-1][0].amax((2, 3)))


def test_math_reconstruction_loss_sums_over_pixels():
    logits, x = torch.randn(5, 784), torch.rand(5, 784)
    p = logits.sigmoid()
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 5
    torch.testing.assert_close(prong.reconstruction_loss(logits, x, None), expected)


def test_math_crops_are_pieces_of_the_image_half_of_them_mirrored():
    torch.manual_seed(0)
    x = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).expand(2000, -1, -1, -1)
    crops = prong.crop(x)
    assert crops.shape == (2000, 3, 24, 24)
    mirrored = crops[:, 0, 0, 0] > crops[:, 0, 0, 1]
    assert 900 < mirrored.sum() < 1100
    straight = torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
    corners = straight[:, 0, 0, 0]
    rows, columns = corners // 32, corners % 32
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9))
    for i in range(20):
        expected = x[i, :, rows[i] : rows[i] + 24, columns[i] : columns[i] + 24]
        assert torch.equal(straight[i], expected)
    assert torch.equal(prong.crop(x, random=False)[0], x[0, :, 4:28, 4:28])


def make_cifar(folder, n=60):
    generator = np.random.default_rng(0)
    (folder / "cifar-10-batches-py").mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (n if name == "test_batch" else 1010, 3072))
        batch = {b"data": data.astype(np.uint8), b"labels": generator.integers(0, 10, len(data))}
        batch[b"labels"] = batch[b"labels"].tolist()
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    return folder


def test_math_cifar_is_read_as_published(tmp_path):
    folder = make_cifar(tmp_path)
    x, y = prong.load_cifar10(str(folder), "train")
    assert x.shape == (5050, 3, 32, 32) and x.dtype == torch.uint8 and y.shape == (5050,)
    raw = pickle.loads((folder / "cifar-10-batches-py/data_batch_2").read_bytes())
    assert x[1010, 1, 0, 3] == raw[b"data"][0, 1024 + 3] and y[1010] == raw[b"labels"][0]
    assert len(prong.load_cifar10(str(folder), "test")[0]) == 60


def test_math_cifar_is_centred_scaled_and_split(tmp_path):
    task = prong.make_task(Args(task="cifar10", data_dir=str(make_cifar(tmp_path))), "cpu")
    x, y = prong.load_cifar10(str(tmp_path), "train")
    assert torch.equal(task.x, x[:50]) and torch.equal(task.y, y[:50])
    assert torch.equal(task.held_out["validation"][0], x[50:])
    given, mean = x[:7].float(), x[:50].float().mean((0, 2, 3))
    expected = (given[:, :, 4:28, 4:28] - mean[:, None, None]) / 64
    torch.testing.assert_close(task.prepare(x[:7], False), expected)
    assert not torch.equal(task.prepare(x[:7], True), expected)  # cropped anywhere


def test_math_the_fisher_task_looks_at_the_middle_of_three_layers():
    task = prong.make_task(Args(task="fisher", dataset="digits"), "cpu")
    layers = [layer for layer in task.net if isinstance(layer, WhitenedLayer)]
    assert [tuple(layer.V.shape) for layer in layers] == [(20, 100), (20, 20), (10, 20)]
    matrix = prong.fisher_matrix(task.net, layers[1], task.prepare(task.x[:2000], False))
    torch.testing.assert_close(prong.probe_fisher(task), matrix)
    assert task.prepare(torch.full((1, 28, 28), 255, dtype=torch.uint8), False).max() == 1


# ---- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["autoencoder", "fisher"])
def test_math_evaluation_is_that_of_all_images_at_once(name):
    torch.manual_seed(0)
    args = Args(task=name, dataset="digits", method="prong+" if name == "autoencoder" else "sgd")
    task = prong.make_task(args, "cpu")
    before = {key: value.clone() for key, value in task.net.state_dict().items()}
    metrics = prong.evaluate(task, args)
    assert all(torch.equal(value, before[key]) for key, value in task.net.state_dict().items())
    task.net.eval()
    for tag, (x, y) in {"train": (task.x, task.y), **task.held_out}.items():
        given = task.prepare(x, False)
        with torch.no_grad():
            output = task.net(given)
        if name == "autoencoder":
            loss = F.binary_cross_entropy_with_logits(output, given, reduction="none").sum(1).mean()
            error = (output.sigmoid() - given).square().sum(1).mean().item()
        else:
            loss = F.cross_entropy(output, y)
            error = 100 * (output.argmax(1) != y).double().mean().item()
        assert metrics[f"eval/{tag}_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics[f"eval/{tag}_error"] == pytest.approx(error, rel=1e-5)


def test_math_training_errors_are_those_of_the_first_10_000_images():
    x = torch.arange(12_000.0)[:, None]
    task = prong.Task(nn.Identity(), x, x[:, 0], lambda x, _: x, lambda z, *_: z.mean(), {})
    metrics = prong.evaluate(task, Args(task="cifar10"))
    assert metrics["eval/train_loss"] == pytest.approx(np.arange(10_000).mean())
    assert metrics["eval/train_error"] == pytest.approx(99.99)  # class 0 is right in the first


def test_math_reports_and_curves_tell_the_mean_loss_since_the_last(tmp_path, monkeypatch):
    losses = iter(torch.arange(4.0))
    monkeypatch.setattr(prong, "update", lambda *_: next(losses))
    monkeypatch.setattr(prong, "probe_fisher", lambda _: torch.eye(2))
    monkeypatch.setattr(prong, "draw_fisher", lambda *_: None)
    flags = SHORT | {"total_iterations": 4, "report_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(prong.plt, "close", lambda _: None)
        prong.main(Args(task="fisher", method="sgd", **flags, run_dir=str(tmp_path)))
    shown = {axis.get_title(): list(axis.lines[0].get_ydata()) for axis in prong.plt.gcf().axes}
    prong.plt.close("all")
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert shown["losses/loss"] == [0.5, 2.5] and len(shown) == 4
    for tag, values in shown.items():
        assert values == [float(value) for _, name, value in rows if name == tag]


def test_math_whitening_comes_first_and_from_other_images_each_time(tmp_path, monkeypatch):
    seen, order, drawn, update = [], [], [], prong.update
    monkeypatch.setattr(
        prong, "rewhiten", lambda net, x, *_: seen.append(x) or order.append("U") or [x]
    )
    monkeypatch.setattr(prong, "draw_spectra", lambda spectra, *_: drawn.extend(spectra))
    monkeypatch.setattr(prong, "update", lambda *how: order.append("step") or update(*how))
    args = Args(**TINY | {"total_iterations": 4, "whitening_period": 2}, run_dir=str(tmp_path))
    prong.main(args)
    assert order == ["U", "step", "step"] * 2
    first = prong.make_task(args, "cpu")
    first = first.prepare(first.x[: len(seen[0])], False)
    assert len(seen[0]) == args.whitening_samples
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], first)
    assert len(drawn) == 1 and drawn[0] is seen[0]


def test_math_rmsprop_follows_its_flags():
    args = Args(method="rmsprop", rmsprop_decay=0.7, rmsprop_eps=0.3, momentum_decay=0.6)
    (group,) = prong.make_optimizer(torch.nn.Linear(1, 1), args).param_groups
    assert (group["alpha"], group["eps"], group["momentum"]) == (0.7, 0.3, 0.6)


def test_learns_on_with_the_errors_it_waited_for_and_the_time_it_took(tmp_path, monkeypatch):
    made, begin = [], prong.Waterfall.__init__
    monkeypatch.setattr(
        prong.Waterfall, "__init__", lambda self, opt: made.append(self) or begin(self, opt)
    )
    args = Args(task="fisher", **TINY | {"total_iterations": 1}, run_dir=str(tmp_path))
    prong.main(args)
    path = tmp_path / "checkpoint.pt"
    told = {"waterfall": (0.5, 3), "seconds": 6000.0, "whitening_seconds": 600.0}
    prong.save_checkpoint(path, **torch.load(path) | told)
    on = prong.main(dataclasses.replace(args, total_iterations=2, run_dir="", resume=str(path)))
    assert 100 < on["charts/minutes"] < 101
    assert on["charts/whitening_share"] == pytest.approx(10, rel=0.01)
    assert (made[-1].best, made[-1].waited) == (0.5, 3)
    assert torch.load(path)["waterfall"] == (0.5, 3)


def test_math_waterfall():
    """A tenth after four evaluations in a row that are not 1 % better than the best."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    waterfall, rates = prong.Waterfall(optimizer), []
    for error in (50, 40, 39.9, 39.8, 39.7, 39.65, 39.0, 38.9, 38.9, 38.9, 38.9):
        waterfall.step(error)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1] * 5 + [0.1] * 5 + [0.01])


def test_learns_an_ill_conditioned_toy_in_fewer_updates_than_gradient_descent():
    torch.manual_seed(0)
    x = correlated(N=1000) * torch.tensor([10, 3, 1, 0.3, 0.1, 0.03]).double()
    y = (x @ torch.tensor([0.01, -0.1, 0.3, 3, -10, 30]).double() > 0).long()

    def updates(method, rate):
        args = Args(method=method, learning_rate=rate, momentum_decay=0.0, epsilon=1e-4)
        net = small(method, widths=(6, 8, 2))
        optimizer = sgd(net, args)
        for t in range(2000):
            if method == "prong" and t % 100 == 0:
                prong.rewhiten(net, x, optimizer, args)
            loss = F.cross_entropy(net(x), y)
            if loss < 0.2:
                return t
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return 2000

    rates = (0.01, 0.1, 1.0)
    best = {m: min(updates(m, rate) for rate in rates) for m in ("sgd", "prong")}
    assert best["prong"] < best["sgd"] / 3


@pytest.mark.parametrize("method", ["prong", pytest.param("rmsprop", marks=pytest.mark.slow)])
def test_learns_digits_and_goes_on_bit_for_bit(method, tmp_path):
    args = Args(task="fisher", method=method, **TINY | {"total_iterations": 300})
    args = dataclasses.replace(args, report_every=150, whitening_period=70, learning_rate=0.05)
    if method == "rmsprop":
        args = dataclasses.replace(args, learning_rate=0.005, whitening_period=1000)
    metrics = prong.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    assert metrics["eval/test_error"] < 30  # 90 is chance
    pictures = ["fisher.png", "curves.png"] + ["spectra.png"] * (method == "prong")
    assert all((tmp_path / "whole" / picture).stat().st_size > 0 for picture in pictures)

    half = dataclasses.replace(args, total_iterations=150, run_dir=str(tmp_path / "half"))
    prong.main(half)
    path = str(tmp_path / "half" / "checkpoint.pt")
    on = prong.main(dataclasses.replace(args, resume=path))
    timing = {"charts/SPS", "charts/minutes", "charts/whitening_share"}
    assert timing <= metrics.keys() | {"charts/whitening_share"}
    assert {k: v for k, v in on.items() if k not in timing} == {
        k: v for k, v in metrics.items() if k not in timing
    }
    whole, resumed = (torch.load(tmp_path / r / "checkpoint.pt")["net"] for r in ("whole", "half"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    for moved in (False, True):  # a checkpoint without its run has no curves
        (tmp_path / "half" / "curves.png").unlink()
        if moved:
            (tmp_path / "half" / "metrics.csv").unlink()
        evaluated = prong.main(dataclasses.replace(args, evaluate=path))
        assert evaluated == {tag: metrics[tag] for tag in evaluated} and len(evaluated) == 6
        assert (tmp_path / "half" / "curves.png").exists() != moved


def test_learns_to_reconstruct(tmp_path):
    args = Args(**TINY, learning_rate=1e-3, run_dir=str(tmp_path))
    metrics = prong.main(args)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    errors = [float(value) for _, tag, value in rows if tag == "eval/test_error"]
    assert errors[-1] < errors[0] and metrics["charts/whitening_share"] > 0
    (tmp_path / "reconstructions.png").unlink()
    checkpoint = str(tmp_path / "checkpoint.pt")
    prong.main(dataclasses.replace(args, run_dir="", evaluate=checkpoint))
    assert (tmp_path / "reconstructions.png").stat().st_size > 0


@pytest.mark.parametrize("method", ["prong+", pytest.param("batchnorm", marks=pytest.mark.slow)])
def test_learns_from_cifar_and_anneals_and_goes_on_bit_for_bit(method, tmp_path, monkeypatch):
    folder = make_cifar(tmp_path)
    monkeypatch.setattr(prong.Waterfall, "step", lambda self, error: seen.append(error))
    seen = []

    def small_net(method):
        layers = [WhitenedLayer(3, 4, 3, method, 3), nn.ReLU(), nn.MaxPool2d(8)]
        layers += [WhitenedLayer(4, 10, 3, method, 4, last=True), nn.AdaptiveMaxPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten())

    monkeypatch.setattr(prong, "convolutional_network", small_net)
    args = Args(task="cifar10", method=method, data_dir=str(folder), batch_size=2, report_every=600)
    period = 300 if method == "prong+" else 1000
    args = dataclasses.replace(args, whitening_period=period, total_iterations=1200)
    metrics = prong.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    rows = [row.split(",") for row in (tmp_path / "whole/metrics.csv").read_text().splitlines()]
    errors = {int(t): float(value) for t, tag, value in rows if tag == "eval/validation_error"}
    assert list(errors) == [600, 1000, 1200] and seen == [errors[1000]]
    assert {"eval/test_error", "eval/train_error"} <= metrics.keys()
    half = dataclasses.replace(args, total_iterations=600, run_dir=str(tmp_path / "half"))
    prong.main(half)
    prong.main(dataclasses.replace(args, resume=str(tmp_path / "half" / "checkpoint.pt")))
    whole, resumed = (torch.load(tmp_path / r / "checkpoint.pt")["net"] for r in ("whole", "half"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_math_methods_begin_alike_and_see_the_same_minibatches(tmp_path, monkeypatch):
    seen = defaultdict(list)
    update = prong.update

    def noting(task, optimizer, batch_size):
        draw = prong.draw
        with monkeypatch.context() as patch:
            patch.setattr(
                prong, "draw", lambda *a: seen[method].append(draw(*a)) or seen[method][-1]
            )
            return update(task, optimizer, batch_size)

    monkeypatch.setattr(prong, "update", noting)
    monkeypatch.setattr(prong, "evaluate", lambda *_: {"eval/train_loss": 0.0})
    first = {}
    for method in ("sgd", "batchnorm", "prong", "prong+"):
        torch.manual_seed(0)
        first[method] = prong.dense_network([6, 5, 4], nn.Tanh, method, 6)[0].V
        args = Args(task="autoencoder", method=method, **SHORT | {"total_iterations": 2})
        prong.main(dataclasses.replace(args, batch_size=4, run_dir=str(tmp_path / method)))
    for method in first:
        assert torch.equal(first[method], first["sgd"])
        for ours, theirs in zip(seen[method], seen["sgd"], strict=True):
            assert torch.equal(ours[0], theirs[0])


def test_learns_with_the_whole_grid_and_names_the_best(tmp_path, monkeypatch):
    args = Args(task="fisher", tune=True, **TINY | {"total_iterations": 2}, run_dir=str(tmp_path))
    tried = []

    def noting(run):
        tried.append((run.learning_rate, run.momentum_decay, run.batch_size))
        if run.learning_rate == 0.1:
            raise prong.Diverged
        return {"eval/train_loss": run.batch_size - run.momentum_decay + run.learning_rate}

    monkeypatch.setattr(prong, "main", noting)
    result = prong.tune(args)
    assert len(set(tried)) == 24
    assert result == {"eval/train_loss": pytest.approx(32 - 0.9 + 0.001)}
    first = (tmp_path / "tune.csv").read_text().splitlines()[0]
    assert first.startswith("rate_0.001_momentum_0.9_batch_32,")
    tried.clear()
    saved = torch.load(tmp_path / "tune.pt")
    del saved["losses"]["rate_0.001_momentum_0.9_batch_32"]
    prong.save_checkpoint(tmp_path / "tune.pt", **saved)
    assert prong.tune(args) == result and len(tried) == 1, "the rest is not made again"
    for name, value in {"method": "sgd", "total_iterations": 3, "epsilon": 0.5}.items():
        flag = "--" + name.replace("_", "-")
        with pytest.raises(SystemExit, match=f"tune.pt was made with {flag} .*, not with {flag}"):
            prong.tune(dataclasses.replace(args, **{name: value}))


def test_learns_on_with_a_setting_that_ended_before_its_row(tmp_path):
    """It is evaluated; one that was cut short is resumed."""
    args = Args(task="fisher", method="sgd", dataset="digits", run_dir=str(tmp_path))
    args = dataclasses.replace(args, total_iterations=2, report_every=1)
    first = dataclasses.replace(args, learning_rate=0.1, momentum_decay=0.0, batch_size=32)
    folder = str(tmp_path / "rate_0.1_momentum_0.0_batch_32")
    ended = prong.main(dataclasses.replace(first, run_dir=folder))
    folder = str(tmp_path / "rate_0.1_momentum_0.0_batch_64")
    half = dataclasses.replace(first, batch_size=64, total_iterations=1, run_dir=folder)
    prong.main(half)
    prong.main(dataclasses.replace(args, tune=True))
    losses = torch.load(tmp_path / "tune.pt")["losses"]
    assert losses["rate_0.1_momentum_0.0_batch_32"] == ended["eval/train_loss"]
    assert len(losses) == 24
    assert torch.load(Path(folder, "checkpoint.pt"))["t"] == 2


# ---- Mistakes of users --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"data_dir": "nowhere", "dataset": "mnist"}, "--dataset digits"),
        (
            {"data_dir": "nowhere", "task": "cifar10", "dataset": "mnist"},
            "cifar-10-batches-py is missing",
        ),
        ({"task": "cifar10"}, "--dataset is for autoencoder and fisher"),
        (
            {"run_dir": "used", "data_dir": "nowhere", "dataset": "mnist"},
            "used holds a run already",
        ),
        ({"batch_size": 0}, "--batch-size must lie"),
        ({"momentum_decay": 1.5}, "--momentum-decay must lie between 0 and 1"),
        ({"evaluate": "nothing.pt"}, "nothing.pt is missing"),
        ({"evaluate": "x.pt", "tune": True}, "leave --resume and --ev"),
        ({"method": "prong+"}, "--task fisher compares"),
        ({"tune": True, "batch_size": 7}, "--tune tries its own values of --batch-size"),
        ({"epsilon": 0.0}, "--epsilon must be above 0, not 0.0"),
        ({"whitening_samples": 1}, "--whitening-samples must be at least 2, not 1"),
        (
            {"method": "batchnorm", "task": "autoencoder", "batch_size": 1},
            "at least 2 to normalise",
        ),
        ({"method": "sgd"}, "--whitening-period has no effect with --method sgd: leave it out"),
        ({"rmsprop_eps": 0.5}, "--rmsprop-eps has no effect with --method prong: leave it out"),
        ({"device": "cuda"}, "torch finds no GPU here"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(prong.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(prong.torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("used").mkdir()
    Path("used/checkpoint.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        prong.main(Args(**{**TINY, "task": "fisher", **flags}))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("at", "sentence"),
    [
        ("load_digits", r"^Stopped\.$"),
        ("update", r"^Stopped before the first checkpoint\.$"),
        ("report", r"^Stopped; evaluate with --evaluate .*checkpoint\.pt$"),
    ],
)
def test_bad_input_a_signal_ends_a_run_in_one_sentence(at, sentence, tmp_path, monkeypatch):
    args = Args(method="sgd", dataset="digits", total_iterations=1, run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(prong, at, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match=sentence):
        prong.main(args)
    assert (tmp_path / "run").exists() == (at != "load_digits")


def test_bad_input_ctrl_c_ends_the_whole_grid(tmp_path, monkeypatch):
    tried = []

    def run(args, device):
        tried.append(args)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return {"eval/train_loss": 1.0}

    monkeypatch.setattr(prong, "run", run)
    with pytest.raises(SystemExit, match=r"^Stopped; go on with the same flags and --run-dir /"):
        prong.main(Args(task="fisher", tune=True, **TINY, run_dir=str(tmp_path)))
    assert len(tried) == 3 and len((tmp_path / "tune.csv").read_text().splitlines()) == 2


def test_bad_input_rate_too_high(tmp_path, monkeypatch):
    monkeypatch.setattr(prong, "update", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(SystemExit, match="loss is nan at update 1: the run stops"):
        prong.main(Args(task="fisher", **TINY, run_dir=str(tmp_path)))
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("report_every", [1, 1000])
def test_bad_input_rate_at_which_weights_overflow(report_every, tmp_path, monkeypatch):
    """Found by what looks at the weights first, be it the evaluation or the next whitening."""

    def overflow(task, *_):
        torch.nn.init.constant_(task.net[0].V, float("nan"))
        return torch.tensor(1.0)

    monkeypatch.setattr(prong, "update", overflow)
    flags = TINY | {"whitening_period": 1, "report_every": report_every}
    with pytest.raises(SystemExit, match="The loss is nan after update 1"):
        prong.main(Args(task="fisher", **flags, run_dir=str(tmp_path)))


def test_bad_input_a_folder_without_a_batch(tmp_path):
    folder = make_cifar(tmp_path)
    (folder / "cifar-10-batches-py/test_batch").unlink()
    with pytest.raises(SystemExit, match=r"test_batch is missing or damaged.*delete its folder"):
        prong.load_cifar10(str(folder), "test")


def test_bad_input_damaged_batch(tmp_path):
    folder = make_cifar(tmp_path)
    (folder / "cifar-10-batches-py/data_batch_3").write_bytes(b"\x80\x04broken")
    with pytest.raises(SystemExit, match="data_batch_3 is missing or damaged"):
        prong.load_cifar10(str(folder), "train")


def test_bad_input_other_method(tmp_path, monkeypatch):
    monkeypatch.setattr(prong, "check_flags", lambda _: None)  # some have no effect with others
    args = Args(task="fisher", **TINY, run_dir=str(tmp_path))
    prong.main(args)
    checkpoint = str(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="was made with --method prong, not with --method sgd"):
        prong.main(dataclasses.replace(args, method="sgd", evaluate=checkpoint))
    monkeypatch.setattr(prong, "load_mnist", lambda _, split: prong.load_digits(split))
    for way in ("resume", "evaluate"):
        with pytest.raises(SystemExit, match="--dataset digits, not with --dataset mnist"):
            prong.main(dataclasses.replace(args, dataset="mnist", **{way: checkpoint}))
    with pytest.raises(
        SystemExit, match="--whitening-samples 100, not with --whitening-samples 50"
    ):
        prong.main(dataclasses.replace(args, whitening_samples=50, evaluate=checkpoint))
    changes = {"seed": 2, "batch_size": 64, "learning_rate": 0.5, "momentum_decay": 0.5}
    changes |= {"rmsprop_decay": 0.5, "rmsprop_eps": 0.5, "whitening_period": 7, "epsilon": 0.5}
    changes |= {"momentum": "carry"}
    assert changes.keys() == set(prong.KEPT)
    for name, value in changes.items():
        with pytest.raises(SystemExit, match=f"was made with --{name.replace('_', '-')} "):
            prong.main(dataclasses.replace(args, **{name: value}, resume=checkpoint))
    with pytest.raises(SystemExit, match="raise --total-iterations"):
        prong.main(dataclasses.replace(args, resume=checkpoint, run_dir=""))


def test_command_line(tmp_path):
    flags = f"--task fisher --dataset digits --total-iterations 20 --run-dir {tmp_path}"
    command = [sys.executable, str(ROOT / "prong.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "eval/condition" in done.stdout and (tmp_path / "checkpoint.pt").exists()
