"""spatial_transformer_mnist.py against the paper's sums in numpy, torch's own grids and its runs.

Public mistakes that these tests would catch: padding that is not the background, a second bias of 1
in the identity, log(0) in the spline, wrong values at the border, two pixel conventions, a
classifier that is given the unwarped input, a localisation network that starts without gradient.
"""

import dataclasses
import itertools
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import ROOT
from torch import nn

import spatial_transformer_mnist as stn
from spatial_transformer_mnist import Args, SpatialTransformer

TRANSFORMS = ("attention", "affine", "projective", "tps")
TINY = {"dataset": "digits", "report_every": 10, "total_iterations": 20, "batch_size": 32}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)


def some_theta(transform, B=3, seed=0):
    identity, generator = stn.identity(transform), torch.Generator().manual_seed(seed)
    return (identity + 0.1 * torch.randn(B, len(identity), generator=generator)).double()


def points_of(transform, theta, size):
    basis = stn.basis(transform, stn.target_grid(size, size).double())
    return stn.sampling_points(transform, theta, basis)


# ---- Grids and transformations ------------------------------------------------------------------


@each_transform
@pytest.mark.parametrize("size", [7, 8])
def test_math_identity_returns_the_image(transform, size):
    U = torch.rand(2, 3, size, size, dtype=torch.float64)
    theta = stn.identity(transform).double().expand(2, -1)
    V = stn.sampler(U, points_of(transform, theta, size), size)
    torch.testing.assert_close(V, U, atol=1e-6, rtol=1e-6)


def test_math_target_grid_reaches_from_corner_to_corner_row_by_row():
    G = stn.target_grid(2, 3)
    assert G.tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]


def test_math_affine_grid_is_torchs():
    theta = some_theta("affine")
    ours = points_of("affine", theta, 6)
    theirs = F.affine_grid(theta.view(3, 2, 3), [3, 1, 6, 6], align_corners=True)
    torch.testing.assert_close(ours, theirs.view(3, 36, 2))


def test_math_special_cases_agree():
    """Attention is an affine transformation; so is a projective one without perspective."""
    s, x, y = 0.7, 0.2, -0.1
    affine = points_of("affine", torch.tensor([[s, 0, x, 0, s, y]]).double(), 5)
    attention = points_of("attention", torch.tensor([[s, x, y]]).double(), 5)
    torch.testing.assert_close(attention, affine)
    general = some_theta("affine")
    projective = F.pad(general, (0, 2))
    torch.testing.assert_close(
        points_of("projective", projective, 5), points_of("affine", general, 5)
    )
    control = points_of("affine", general, 4)  # a spline bent by an affine map is that map
    P = F.pad(stn.control_points().double(), (0, 1), value=1.0)
    moved = P @ stn.matrix("affine", general)
    torch.testing.assert_close(points_of("tps", moved.flatten(1), 4), control, atol=1e-6, rtol=1e-6)


def test_math_projective_is_a_homography_and_never_infinite():
    theta = some_theta("projective")
    H = F.pad(theta, (0, 1), value=1.0).view(3, 3, 3)
    G = F.pad(stn.target_grid(4, 4).double(), (0, 1), value=1.0)
    expected = torch.einsum("bij,nj->bni", H, G)
    expected = expected[..., :2] / expected[..., 2:]
    torch.testing.assert_close(points_of("projective", theta, 4), expected)
    horizon = torch.tensor([[1.0, 0, 0, 0, 1, 0, -1, 0]], dtype=torch.float64, requires_grad=True)
    points = points_of("projective", horizon, 3)  # the right edge lies at infinity
    points.sum().backward()
    assert torch.isfinite(points).all() and torch.isfinite(horizon.grad).all()


def test_math_spline_passes_through_its_control_points():
    theta = some_theta("tps", B=2)
    at_control = stn.sampling_points("tps", theta, stn.basis("tps", stn.control_points().double()))
    torch.testing.assert_close(at_control.flatten(1), theta, atol=1e-6, rtol=1e-6)
    assert stn.radial(torch.zeros(2)).tolist() == [0, 0]
    r = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(stn.radial(r**2), r**2 * r.log())


def test_math_spline_is_the_thin_plates_between_its_control_points():
    """Weights of r^2 log r, orthogonal to planes, solved for in numpy."""
    theta, P = some_theta("tps", B=1), stn.control_points().double().numpy()

    def features(at):
        r = np.linalg.norm(at[:, None] - P, axis=-1)
        return np.hstack([r**2 * np.log(np.maximum(r, 1e-300)), np.ones((len(at), 1)), at])

    planes = np.hstack([np.ones((16, 1)), P])
    system = np.vstack([features(P), np.hstack([planes.T, np.zeros((3, 3))])])
    weights = np.linalg.solve(system, np.vstack([theta.view(16, 2), np.zeros((3, 2))]))
    expected = torch.from_numpy(features(stn.target_grid(7, 7).double().numpy()) @ weights)
    torch.testing.assert_close(points_of("tps", theta, 7)[0], expected, atol=1e-6, rtol=1e-6)


def test_math_sampler_against_the_papers_double_sum():
    """Equation 5, points outside included: there the sum has no terms."""
    torch.manual_seed(0)
    U = torch.rand(1, 2, 5, 4, dtype=torch.float64)
    points = torch.rand(1, 9, 2, dtype=torch.float64) * 3 - 1.5
    V = F.grid_sample(  # not square: the script's function with its own shape
        U, points.view(1, 3, 3, 2), padding_mode="zeros", align_corners=True
    )
    torch.testing.assert_close(stn.sampler(U, points, 3), V)
    for i, c in itertools.product(range(9), range(2)):
        x, y = (points[0, i, 0] + 1) / 2 * 3, (points[0, i, 1] + 1) / 2 * 4
        total = sum(
            U[0, c, n, m] * max(0, 1 - abs(x - m)) * max(0, 1 - abs(y - n))
            for n, m in itertools.product(range(5), range(4))
        )
        torch.testing.assert_close(V[0, c].flatten()[i], torch.as_tensor(total).double())


def test_gradient_of_the_sampler_is_the_papers():
    """Equations 6 and 7 at points between the pixels."""
    torch.manual_seed(0)
    U = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(1, 4, 2, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    V = stn.sampler(U, points, 2)
    for i in range(4):
        d_U, d_points = torch.autograd.grad(V.flatten()[i], (U, points), retain_graph=True)
        x, y = ((points[0, i] + 1) / 2 * 3).tolist()
        d_x = 0.0
        for n, m in itertools.product(range(4), range(4)):
            weight = max(0, 1 - abs(x - m)) * max(0, 1 - abs(y - n))
            assert d_U[0, 0, n, m].item() == pytest.approx(weight, abs=1e-9)
            sign = 0 if abs(m - x) >= 1 else (1 if m >= x else -1)
            d_x += U[0, 0, n, m].item() * max(0, 1 - abs(y - n)) * sign
        assert d_points[0, i, 0].item() == pytest.approx(d_x * 1.5, abs=1e-9)


@each_transform
def test_gradient_check_from_theta_to_output(transform):
    U = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    theta = (some_theta(transform, B=1) * 0.83).requires_grad_()
    basis = stn.basis(transform, stn.target_grid(3, 3).double())

    def read(theta, U):
        return stn.sampler(U, stn.sampling_points(transform, theta, basis), 3)

    assert torch.autograd.gradcheck(read, (theta, U.requires_grad_()), eps=1e-7, atol=1e-4)


# ---- The network --------------------------------------------------------------------------------


@each_transform
@pytest.mark.parametrize("model", ["fcn", "cnn"])
def test_math_a_new_transformer_changes_nothing(transform, model):
    net = stn.make_transformer_network(Args(model=model, transform=transform))
    x = torch.rand(4, 1, 28, 28)
    _, V, points = net(x)
    torch.testing.assert_close(V, x, atol=1e-5, rtol=1e-5)
    assert points.shape == (4, 1, 784, 2)


@each_transform
@pytest.mark.parametrize("model", ["fcn", "cnn"])
def test_gradient_reaches_the_localisation_network_from_the_start(transform, model):
    torch.manual_seed(0)
    net = stn.make_transformer_network(Args(model=model, transform=transform, distortion="RTS"))
    x, y = torch.rand(8, 1, 42, 42), torch.randint(10, (8,))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    gradient = torch.autograd.grad(
        F.cross_entropy(net(x)[0], y), net.transformers[0].localisation[-1].weight
    )[0]
    assert gradient.abs().sum() > 0
    stn.update(net, optimizer, x, y)
    stn.update(net, optimizer, x, y)
    assert all(p.grad.abs().sum() > 0 for p in net.transformers.parameters())


@pytest.mark.parametrize("distortion", ["R", "RTS", "P", "E", "TC"])
def test_math_networks_of_an_experiment_have_equal_sizes(distortion):
    counts = {
        (model, transform): stn.count_parameters(
            stn.make_transformer_network(
                Args(model=model, transform=transform, distortion=distortion)
            )
        )
        for model in ("fcn", "cnn")
        for transform in ("none", *TRANSFORMS)
    }
    S = stn.CANVAS[distortion]
    assert counts["cnn", "none"] == {28: 208_586, 42: 222_026, 60: 270_026}[S]
    for count in counts.values():
        assert abs(count / counts["cnn", "none"] - 1) < 0.05, counts


@pytest.mark.parametrize("channels", [1, 2])
def test_math_first_convolution_is_torchs_with_its_gradients(channels):
    layer = stn.FirstConv2d(channels, 4, 9).double()
    x = torch.rand(3, channels, 15, 17, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, theirs)
    slope, wanted = torch.randn_like(ours), [x, layer.weight, layer.bias]
    for a, b in zip(
        torch.autograd.grad(ours, wanted, slope), torch.autograd.grad(theirs, wanted, slope)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("model", ["fcn", "cnn"])
def test_math_addition_stacks_two_transformers(model):
    none, one, two = (
        stn.make_transformer_network(
            Args(task="addition", model=model, transform=how, num_transformers=n)
        )
        for how, n in (("none", 1), ("affine", 1), ("affine", 2))
    )
    logits, V, points = two(torch.rand(3, 2, 42, 42))
    assert logits.shape == (3, 19) and V.shape == (3, 4, 28, 28)
    assert points.shape == (3, 2, 56 * 56, 2)
    assert points[0, 0, :, 0].mean() < -0.2 and points[0, 1, :, 0].mean() > 0.2  # apart
    sizes = [stn.count_parameters(net) for net in (none, one, two)]
    assert sizes == pytest.approx([650_000] * 3, rel=0.03)


def test_math_the_transformers_output_is_halved_on_RTS_and_TC_alone():
    for distortion in ("R", "RTS", "P", "E", "TC"):
        net = stn.make_transformer_network(Args(distortion=distortion))
        halved = isinstance(net.halve, torch.nn.AvgPool2d)
        assert halved == (distortion in ("RTS", "TC"))
        S = stn.CANVAS[distortion]
        _, V, points = net(torch.rand(2, 1, S, S))
        assert (
            V.shape[-1] == (28 if halved else S) and points.shape[2] == (56 if halved else S) ** 2
        )


def test_math_the_classifier_sees_the_transformed_image_halved_by_the_mean():
    net = stn.make_transformer_network(Args(distortion="RTS", transform="affine"))
    x = torch.rand(2, 1, 42, 42)
    seen = []
    net.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    _, V, points = net(x)
    full = stn.sampler(x, points[:, 0], 56)
    torch.testing.assert_close(V, F.avg_pool2d(full, 2))
    assert torch.equal(seen[0], V) and V.shape == (2, 1, 28, 28)


def test_math_background_and_padding_are_both_black():
    far = torch.full((1, 4, 2), 5.0)
    assert (stn.sampler(torch.rand(1, 1, 6, 6), far, 2) == 0).all()
    digits = torch.zeros(4, 28, 28)
    for distortion in ("R", "RTS", "P", "E", "TC"):
        x, _ = stn.distort(digits, distortion, digits, torch.Generator())
        assert (x == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_math_two_transformers_start_a_quarter_of_the_width_apart(transform):
    net = stn.make_transformer_network(
        Args(task="addition", transform=transform, num_transformers=2)
    )
    points = net(torch.rand(1, 2, 42, 42))[2][0]
    for t, shift in ((0, -0.25), (1, 0.25)):
        expected = stn.target_grid(56, 56) + torch.tensor([shift, 0.0])
        torch.testing.assert_close(points[t], expected, atol=1e-5, rtol=0)


def test_math_networks_have_the_papers_layers():
    def layers(net):
        return [
            (type(m).__name__, *getattr(m, "weight", torch.empty(0)).shape)
            for m in net
            if not isinstance(m, nn.Flatten)
        ]

    relu, pool, mean = ("ReLU", 0), ("MaxPool2d", 0), ("AvgPool2d", 0)
    fc = [("Linear", 32, 784), relu, ("Linear", 32, 32), relu, ("Linear", 32, 32), relu]
    assert layers(stn.fcn_localisation(1, 28, 6)) == [*fc, ("Linear", 6, 32)]
    conv = [mean, ("Conv2d", 20, 1, 5, 5), pool, relu, ("Conv2d", 20, 20, 5, 5), relu]
    dense = [("Linear", 20, 20), relu, ("Linear", 8, 20)]
    assert layers(stn.cnn_localisation(1, 28, 8)) == [*conv, *dense]
    fc = [("Linear", 8, 784), relu, ("Linear", 8, 8), relu, ("Linear", 10, 8)]
    assert layers(stn.fcn_classifier(1, 28, 8, 10)) == fc
    conv = [("FirstConv2d", 8, 1, 9, 9), pool, relu, ("Conv2d", 8, 8, 7, 7), pool, relu]
    assert layers(stn.cnn_classifier(1, 28, 8, 10)) == [*conv, ("Linear", 10, 32)]


# ---- The distortions ----------------------------------------------------------------------------


def disc(B, radius=4.0, at=(0.0, 0.0)):
    """Soft discs, pixels from the centre."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    one = (radius + 0.5 - ((x - at[0]) ** 2 + (y - at[1]) ** 2).sqrt()).clamp(0, 1)
    return one.expand(B, -1, -1)


def centres_of(x):
    """Centre of mass [B, 2] in pixels from the middle of the canvas."""
    S = x.shape[-1]
    p = torch.arange(S) - (S - 1) / 2
    mass = x.sum((1, 2, 3))
    return (
        torch.stack([(x[:, 0].sum(1) * p).sum(1), (x[:, 0].sum(2) * p).sum(1)], 1) / mass[:, None]
    )


def test_math_R_turns_by_the_angle_it_tells():
    generator = torch.Generator().manual_seed(0)
    x, angle = stn.distort(disc(3000, 2.0, at=(8.0, 0.0)), "R", None, generator)
    assert x.shape == (3000, 1, 28, 28)
    assert angle.min() > -math.pi / 2 and angle.max() < math.pi / 2
    assert angle.std().item() == pytest.approx(math.pi / math.sqrt(12), rel=0.05)
    found = torch.atan2(*centres_of(x).flip(1).unbind(1))
    error = torch.minimum((found - angle).abs().max(), (found + angle).abs().max())
    assert error < 0.05
    assert (centres_of(x).norm(dim=1) - 8).abs().max() < 0.2


def test_math_RTS_scales_and_moves_over_the_whole_canvas():
    generator = torch.Generator().manual_seed(0)
    x, angle = stn.distort(disc(3000, 5.0), "RTS", None, generator)
    assert x.shape == (3000, 1, 42, 42) and angle.abs().max() < math.pi / 4
    assert angle.mean().abs() < 0.05
    assert angle.std().item() == pytest.approx(math.pi / 2 / 12**0.5, rel=0.03)  # uniform
    scale = (x.sum((1, 2, 3)) / (math.pi * 5**2)).sqrt()
    assert scale.min().item() == pytest.approx(0.7, abs=0.05)
    assert scale.max().item() == pytest.approx(1.2, abs=0.05)
    centres = centres_of(x)
    assert (centres.abs() <= ((41 - 27 * scale) / 2 + 0.6)[:, None]).all()
    for low_or_high in (centres.amin(0), -centres.amax(0)):
        assert (low_or_high < -10).all() and (low_or_high > -11.5).all()


def test_math_P_moves_the_corners_by_five_pixels():
    """Homographies found from corners agree with the points they are told to read."""
    torch.manual_seed(0)
    at, read = torch.randn(2, 5, 4, 2, dtype=torch.float64)
    theta = stn.homography(at, read)
    for b in range(5):
        found = stn.sampling_points("projective", theta[b : b + 1], stn.basis("projective", at[b]))
        torch.testing.assert_close(found[0], read[b], atol=1e-6, rtol=1e-6)
    x, _ = stn.distort(disc(3000, 2.0), "P", None, torch.Generator().manual_seed(0))
    assert x.shape == (3000, 1, 42, 42)
    centres = centres_of(x)
    assert not centres.isnan().any()  # no corner folds over
    assert centres.std(0).mean().item() == pytest.approx(3.57, rel=0.06)  # 4 pixels: 2.8


def test_math_E_bends_by_a_pixel_and_a_half():
    x, _ = stn.distort(disc(3000, 2.0), "E", None, torch.Generator().manual_seed(0))
    assert x.shape == (3000, 1, 42, 42)
    shift = centres_of(x)
    assert shift.mean().abs() < 0.1 and shift.std().item() == pytest.approx(1.01, rel=0.06)
    area = (x.sum((1, 2, 3)) / (math.pi * 2.0**2)).sqrt()
    assert 0.7 < area.mean().item() < 1.0


def test_math_TC_adds_six_pieces_and_clips():
    digits = torch.full((2000, 28, 28), 0.5)
    pool = torch.full((3, 28, 28), 0.7)
    generator = torch.Generator().manual_seed(0)
    x, _ = stn.distort(digits, "TC", pool, generator)
    assert x.shape == (2000, 1, 60, 60) and x.max() == 1
    clutter = (x == 0.7).sum((1, 2, 3)) + (x == 1).sum((1, 2, 3))
    assert clutter.max() <= 6 * 36 and 150 < clutter.float().mean() < 6 * 36
    assert {0.0, 0.5, 1.0} <= {round(value, 4) for value in x.unique().tolist()}


def test_math_addition_distorts_two_digits_each_by_itself():
    digits, labels = disc(50).contiguous(), torch.arange(50) % 10
    args, generator = Args(task="addition"), torch.Generator().manual_seed(0)
    chosen = torch.randint(50, (400,), generator=generator)
    x, y, _ = stn.make_examples(digits, labels, chosen, args, generator)
    assert x.shape == (400, 2, 42, 42)
    rest = y - labels[chosen]
    assert rest.min() == 0 and rest.max() == 9 and y.max() > 15
    first, second = centres_of(x[:, :1]), centres_of(x[:, 1:])
    assert np.corrcoef(first[:, 0], second[:, 0])[0, 1] < 0.2


def test_math_angle_is_read_from_the_points():
    angle = torch.tensor([0.3, -0.7, 0.0])
    one = torch.ones(3)
    for scale in (one, 0.6 * one):
        M = stn.similarity(angle, scale, torch.tensor([[0.1, 0.2]]).expand(3, -1))
        points = stn.basis("affine", stn.target_grid(9, 9)) @ M
        torch.testing.assert_close(stn.angle_of(points).abs(), angle.abs(), atol=1e-5, rtol=0)
    undone = points_of("affine", stn.identity("affine").double()[None], 5)
    assert stn.angle_of(undone).abs().item() < 1e-6


@pytest.mark.parametrize("distortion", ["P", "E"])
def test_math_P_and_E_shrink(distortion, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(shape))
    x, _ = stn.distort(disc(2000, 6.0), distortion, None, torch.Generator().manual_seed(0))
    scale = (x.sum((1, 2, 3)) / disc(1, 6.0).sum()).sqrt()
    assert scale.min().item() == pytest.approx(0.75, abs=0.02)
    assert scale.max().item() == pytest.approx(1.0, abs=0.02)


def test_math_P_tears_no_digit(monkeypatch):
    read, divisors = stn.sampling_points, []

    def spy(transform, theta, B):
        divisors.append((B @ stn.matrix(transform, theta))[..., 2])
        return read(transform, theta, B)

    monkeypatch.setattr(stn, "sampling_points", spy)
    shown = []
    sampler = stn.sampler
    monkeypatch.setattr(stn, "sampler", lambda U, p, S: shown.append(p) or sampler(U, p, S))
    stn.distort(disc(2000), "P", None, torch.Generator().manual_seed(0))
    inside = (shown[0].abs() <= 1).all(-1)
    assert (divisors[0][inside] > 0).all()  # the horizon does not cross the digit


def test_math_RTS_moves_along_x_and_y_by_themselves():
    x, _ = stn.distort(disc(2000, 5.0), "RTS", None, torch.Generator().manual_seed(0))
    assert abs(np.corrcoef(centres_of(x).T)[0, 1]) < 0.1


def test_math_TC_takes_six_pieces_of_any_digit_from_anywhere():
    generator = torch.Generator().manual_seed(0)
    pool = torch.stack([torch.full((28, 28), 0.01), torch.full((28, 28), 0.02)])
    x, _ = stn.distort(torch.zeros(1000, 28, 28), "TC", pool, generator)
    pieces = (x.sum((1, 2, 3)) / 0.36).round().long()  # each counts 1 or 2
    assert pieces.unique().tolist() == list(range(6, 13))
    corner = torch.zeros(1, 28, 28)
    corner[:, :6, 22:] = 0.1  # seen only where rows and columns are drawn each by itself
    x, _ = stn.distort(torch.zeros(1000, 28, 28), "TC", corner, generator)
    assert x.sum() > 0


def test_math_place_reaches_both_borders_and_tells_the_centre():
    canvas = torch.zeros(500, 5, 5)
    centres = stn.place(canvas, torch.ones(500, 3, 3), torch.Generator().manual_seed(0))
    assert (canvas.sum((1, 2)) == 9).all()
    assert len({tuple(c) for c in centres.tolist()}) == 9  # 3 x 3 places
    pixels = (centres + 1) / 2 * 5 - 0.5 - 2  # from the middle
    torch.testing.assert_close(centres_of(canvas[:, None]), pixels)


def turning_back(angle, x):
    """A network that reads x as turned back by angle."""
    M = stn.similarity(-angle, torch.ones(len(x)), torch.zeros(len(x), 2))
    points = stn.basis("affine", stn.target_grid(28, 28)) @ M
    return stn.sampler(x, points, 28), points


def test_math_a_digit_that_is_turned_back_has_correlation_and_slope_one():
    digits = disc(500, 2.0, at=(8.0, 0.0))
    x, angle = stn.distort(digits, "R", None, torch.Generator().manual_seed(0))
    for share in (1.0, 0.5):
        V, points = turning_back(share * angle, x)
        seen = (torch.zeros(500, 10), V, points[:, None])
        metrics = stn.evaluate(
            lambda _, seen=seen: seen,
            Args(distortion="R"),
            stn.Examples(x, torch.zeros(500), angle),
        )
        assert metrics["eval/angle_correlation"] == pytest.approx(1, abs=0.01)
        assert metrics["eval/angle_slope"] == pytest.approx(share, abs=0.01)
        if share == 1:
            assert (centres_of(V) - centres_of(digits[:, None])).abs().max() < 0.2


def test_math_inside_is_the_share_of_the_worst_transformer():
    G = stn.target_grid(4, 4)
    points = torch.stack([G, G + torch.tensor([0.5, 0.0])]).expand(7, -1, -1, -1)  # one column out
    examples = stn.Examples(torch.zeros(7, 2, 4, 4), torch.tensor([0, 0, 0, 0, 0, 1, 1]), None)
    metrics = stn.evaluate(
        lambda x: (torch.eye(19)[torch.zeros(len(x)).long()], x, points),
        Args(task="addition", num_transformers=2),
        examples,
    )
    assert metrics == pytest.approx({"eval/error": 200 / 7, "eval/inside": 0.75})


# ---- Runs ---------------------------------------------------------------------------------------


def without_times(metrics):
    return {k: v for k, v in metrics.items() if k not in ("charts/SPS", "charts/minutes")}


@pytest.mark.parametrize(
    "flags, learns",
    [
        ({"model": "cnn", "transform": "affine"}, True),
        ({"transform": "tps", "distortion": "E", "fixed_distortions": True}, False),
        ({"task": "addition", "num_transformers": 2, "transform": "attention"}, True),
        ({"transform": "none", "distortion": "TC"}, False),
        ({"optimizer": "adam", "learning_rate": 0.01, "sgd_momentum": 0.0}, True),
    ],
)
def test_learns_and_goes_on_bit_for_bit(flags, learns, tmp_path):
    """20 updates show in the loss of the easier tasks alone."""
    args = Args(**TINY, **{"learning_rate": 0.1, "sgd_momentum": 0.9} | flags)
    metrics = stn.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    rows = [r.split(",") for r in (tmp_path / "whole/metrics.csv").read_text().splitlines()]
    losses = [float(value) for _, tag, value in rows if tag == "losses/loss"]
    assert losses[-1] < losses[0] or not learns
    for picture in ("transformations.png", "training.gif"):
        assert (tmp_path / "whole" / picture).stat().st_size > 0

    save, saved = stn.save_checkpoint, []

    def save_half(path, **state):
        save(path, **state)
        if not saved:
            saved.append(path.read_bytes())

    half = tmp_path / "half"
    half.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stn, "save_checkpoint", save_half)
        stn.main(dataclasses.replace(args, run_dir=str(tmp_path / "again")))
    (half / "checkpoint.pt").write_bytes(saved[0])
    on = stn.main(dataclasses.replace(args, resume=str(half / "checkpoint.pt")))
    assert without_times(on) == without_times(metrics)
    evaluated = stn.main(dataclasses.replace(args, evaluate=str(half / "checkpoint.pt")))
    assert evaluated == {tag: metrics[tag] for tag in evaluated} and "eval/error" in evaluated


def test_learns_to_find_a_shifted_digit():
    """Half of 28x28 pixels hold a 3 or a 1, left or right; a transformer moves there."""
    torch.manual_seed(0)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    x, y = stn.load_digits("train")
    x, y = x[(y == 1) | (y == 3)] / 255, (y[(y == 1) | (y == 3)] == 3).long()
    small = F.interpolate(x[:, None], size=14, mode="area")
    transformer = SpatialTransformer(stn.fcn_localisation(1, 28, 3), "attention", 14)
    with torch.no_grad():
        transformer.localisation[-1].bias[0] = 0.5
    net = stn.TransformerNetwork([transformer], False, stn.fcn_classifier(1, 14, 16, 2))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    side = None
    for _ in range(600):
        chosen = torch.randint(len(x), (64,), generator=generator)
        side = torch.randint(2, (64,), generator=generator)
        canvas = torch.zeros(64, 1, 28, 28)
        for k in (0, 1):
            canvas[side == k, :, 7:21, 14 * k : 14 * k + 14] = small[chosen][side == k]
        loss = stn.update(net, optimizer, canvas, y[chosen])
    points = net(canvas)[2][:, 0, :, 0].mean(1).detach()
    assert loss < 0.3
    assert points[side == 1].mean() - points[side == 0].mean() > 0.3
    assert time.perf_counter() - start < 60


def spy_on_updates(monkeypatch):
    seen, update = [], stn.update

    def spy(net, optimizer, x, y):
        seen.append((net, [dict(group) for group in optimizer.param_groups], x, y))
        return update(net, optimizer, x, y)

    monkeypatch.setattr(stn, "update", spy)
    return seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_math_recorded_updates_train_as_those_made_one_by_one(optimizer, monkeypatch, tmp_path):
    losses = []
    for learn_from in (
        stn.learn_from,
        lambda minibatches, learn: itertools.starmap(learn, minibatches),
    ):
        monkeypatch.setattr(stn, "learn_from", learn_from)
        args = Args(
            **TINY, optimizer=optimizer, device="cuda", run_dir=str(tmp_path / str(len(losses)))
        )
        losses.append(stn.main(args)["losses/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_learns_on_with_an_optimizer_fit_for_its_own_device(tmp_path):
    """Only a GPU's updates are recorded, for which Adam must be capturable."""
    args = Args(**TINY, optimizer="adam", device="cpu", run_dir=str(tmp_path))
    stn.main(args)
    for group in torch.load(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]:
        assert not group["capturable"]


@pytest.mark.parametrize("total, every, reports", [(6, 10, [6]), (7, 3, [3, 6, 7])])
def test_math_two_learning_rates_fall_after_each_third(
    total, every, reports, monkeypatch, tmp_path
):
    seen = spy_on_updates(monkeypatch)
    length = {"total_iterations": total, "report_every": every}
    args = Args(**TINY | length, run_dir=str(tmp_path))
    rates = {"learning_rate": 0.1, "localisation_learning_rate": 0.02}
    metrics = stn.main(dataclasses.replace(args, **rates))
    assert metrics["charts/learning_rate"] == pytest.approx(0.1 / 10**2)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert sorted({int(row.split(",")[0]) for row in rows}) == reports
    assert len(seen) == total
    for t, (net, groups, _, _) in enumerate(seen):
        expected = [0.1 / 10 ** (3 * t // total), 0.02 / 10 ** (3 * t // total)]
        assert [group["lr"] for group in groups] == pytest.approx(expected)
        for group, part in zip(groups, (net.classifier, net.transformers), strict=True):
            assert {id(p) for p in group["params"]} == {id(p) for p in part.parameters()}


def test_math_the_optimizer_is_that_of_the_flags(monkeypatch, tmp_path):
    seen = spy_on_updates(monkeypatch)
    args = Args(**{**TINY, "total_iterations": 1}, distortion="none")
    stn.main(dataclasses.replace(args, sgd_momentum=0.7, run_dir=str(tmp_path / "sgd")))
    stn.main(dataclasses.replace(args, optimizer="adam", run_dir=str(tmp_path / "adam")))
    (_, sgd, _, _), (_, adam, _, _) = seen
    assert [group["momentum"] for group in sgd] == [0.7] * 2 and "betas" in adam[0]


def test_math_the_error_counts_all_batches_of_a_set():
    torch.manual_seed(0)
    net = stn.make_transformer_network(Args(transform="none"))
    x, y = torch.rand(2300, 1, 28, 28), torch.randint(0, 10, (2300,))
    examples = stn.Examples(x, y, torch.zeros(2300))
    with torch.no_grad():
        wrong = (net(x)[0].argmax(1) != y).double().mean().item()
    metrics = stn.evaluate(net, Args(transform="none"), examples)
    assert metrics["eval/error"] == pytest.approx(100 * wrong)


def test_math_test_sets_are_of_test_digits_and_equal_for_all_seeds_unlike_weights(
    monkeypatch, tmp_path
):
    nets, seen, evaluate = [], [], stn.evaluate
    monkeypatch.setattr(stn, "update", lambda net, *_: nets.append(net) or torch.zeros(()))
    monkeypatch.setattr(
        stn, "evaluate", lambda net, args, test: seen.append(test) or evaluate(net, args, test)
    )
    args = Args(**{**TINY, "total_iterations": 1}, transform="none")
    stn.main(dataclasses.replace(args, distortion="none", run_dir=str(tmp_path / "none")))
    images, labels = stn.load_digits("t10k")
    assert torch.equal(seen[0].x[:, 0], images / 255) and torch.equal(seen[0].y, labels)
    for seed in (1, 2):
        where = str(tmp_path / str(seed))
        stn.main(dataclasses.replace(args, distortion="R", seed=seed, run_dir=where))
    assert torch.equal(seen[1].x, seen[2].x) and not torch.equal(seen[1].x, seen[0].x)
    assert not torch.equal(nets[1].classifier[-1].weight, nets[2].classifier[-1].weight)


@pytest.mark.parametrize("fixed", [False, True])
def test_math_addition_tells_the_sum_of_the_digits_that_are_seen(fixed, monkeypatch, tmp_path):

    shades = torch.tensor([20, 60, 120], dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)
    monkeypatch.setattr(stn, "load_digits", lambda _: (shades, torch.tensor([1, 3, 6])))
    seen = spy_on_updates(monkeypatch)
    flags = {"task": "addition", "fixed_distortions": fixed, "run_dir": str(tmp_path)}
    stn.main(Args(**TINY, **flags))
    x, y = torch.cat([x for *_, x, _ in seen]), torch.cat([y for *_, y in seen])
    assert torch.equal((x.amax((2, 3)).sum(1) * 255 / 20).round().long(), y)
    assert (len(x.unique(dim=0)) <= 3) == fixed  # one frozen copy of each


@pytest.mark.parametrize("bfloat16", [False, True])
def test_math_bfloat16_is_for_the_classifier_alone(bfloat16, monkeypatch, tmp_path):
    seen = spy_on_updates(monkeypatch)
    stn.main(Args(**TINY, model="cnn", bfloat16=bfloat16, run_dir=str(tmp_path)))
    net, _, x, _ = seen[-1]
    kinds = {}
    for name in ("classifier.0", "transformers.0.localisation.1", "transformers.0.localisation.9"):
        note = lambda _, __, out, name=name: kinds.update({name: out.dtype})  # noqa: E731
        net.get_submodule(name).register_forward_hook(note)
    logits, V, points = net(x)
    assert kinds.pop("classifier.0") == (torch.bfloat16 if bfloat16 else torch.float32)
    assert set(kinds.values()) == {logits.dtype, V.dtype, points.dtype} == {torch.float32}
    net.bfloat16 = False
    torch.testing.assert_close(logits, net(x)[0], atol=0.05, rtol=0.05)


def test_math_film_has_a_hundred_frames_evenly_through_training(monkeypatch, tmp_path):
    shown, reports = [], []
    monkeypatch.setattr(stn, "film_frame", lambda *_: len(reports))
    monkeypatch.setattr(stn, "evaluate", lambda *_: reports.append(0) or {})
    monkeypatch.setattr(stn, "report", lambda *_: None)
    monkeypatch.setattr(stn, "save_film", lambda frames, _: shown.extend(frames))
    args = Args(dataset="digits", total_iterations=250, report_every=1, batch_size=1)
    stn.main(dataclasses.replace(args, run_dir=str(tmp_path)))
    assert shown == [int(2.5 * k) + 1 for k in range(100)]


def test_math_channels_are_inked_in_black_or_blue_and_orange():
    one, two = torch.zeros(1, 1, 4), torch.zeros(2, 1, 4)
    one[0, 0, 1] = two[0, 0, 1] = two[1, 0, 2] = 1.0
    two[:, 0, 3] = 1.0
    white, blue, orange, black = [255] * 3, [0, 102, 255], [255, 128, 0], [0] * 3
    for picture, colours in (
        (one, [white, black, white, white]),
        (two, [white, blue, orange, black]),
    ):
        assert np.abs(stn.inked(picture) - np.array([colours])).max() <= 1


def test_math_film_has_a_row_for_each_transformer():
    x = torch.rand(8, 2, 42, 42)
    args = Args(task="addition", num_transformers=2)
    for T, net in ((1, Args(task="addition", transform="none")), (2, args)):
        frame = stn.film_frame(
            stn.make_transformer_network(net), stn.Examples(x, torch.zeros(8), torch.zeros(8))
        )
        assert frame.shape == ((1 + T) * 42, 8 * 42, 3) and frame.dtype == torch.uint8
        first = np.concatenate([stn.inked(picture) for picture in x], 1)
        assert np.array_equal(frame[:42].numpy(), first)


def test_math_grids_of_both_transformers_are_drawn_over_the_input(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(stn.plt, "close", kept.append)
    net = stn.make_transformer_network(Args(task="addition", num_transformers=2))
    examples = stn.Examples(torch.rand(2, 2, 42, 42), None, None)
    stn.draw_transformations(net, examples, tmp_path / "transformations.png")
    for axis in kept[0].axes[:2]:
        first, second = (axis.lines[i].get_xydata()[[0, -1]] for i in (0, 10))  # uppermost rows
        np.testing.assert_allclose(first, [[-5.125, 0], [35.875, 0]], atol=1e-3)
        np.testing.assert_allclose(second, [[5.125, 0], [46.125, 0]], atol=1e-3)
    assert [len(axis.lines) for axis in kept[0].axes] == [20, 20, 0, 0, 0, 0]
    monkeypatch.undo()
    stn.plt.close(kept[0])


def test_learns_on_with_the_film_and_the_flags_of_its_beginning(monkeypatch, tmp_path):
    save, saved = stn.save_checkpoint, []

    def keep_first(path, **state):
        save(path, **state)
        saved.append(path.read_bytes())

    monkeypatch.setattr(stn, "save_checkpoint", keep_first)
    stn.main(Args(**TINY, run_dir=str(tmp_path / "whole")))
    (tmp_path / "half").mkdir()
    path = tmp_path / "half/checkpoint.pt"
    path.write_bytes(saved[0])
    torch.save(torch.load(path) | {"seconds": 6000.0}, path)
    args = Args(**TINY, resume=str(path))
    assert 100 < stn.main(args)["charts/minutes"] < 110
    films = [(tmp_path / run / "training.gif").read_bytes() for run in ("whole", "half")]
    assert films[0] == films[1]
    monkeypatch.setattr(stn, "load_mnist", lambda _, part: stn.load_digits(part))
    for name, other in {
        "task": "addition", "distortion": "P", "model": "cnn", "transform": "tps",
        "learning_rate": 0.5, "localisation_learning_rate": 0.5, "sgd_momentum": 0.5,
        "optimizer": "adam", "batch_size": 7, "fixed_distortions": True,
        "seed": 2, "bfloat16": True, "dataset": "mnist",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match=f"was made with --{name.replace('_', '-')} "):
            stn.main(dataclasses.replace(args, **{name: other}))
    longer = stn.main(dataclasses.replace(args, total_iterations=40))
    assert longer["charts/learning_rate"] == pytest.approx(Args.learning_rate / 10**2)
    assert len(torch.load(path)["frames"]) == 3  # after updates 10, 30 and 40


# ---- Mistakes of users --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"data_dir": "nowhere", "dataset": "mnist"}, "--dataset digits"),
        ({"batch_size": 0}, "--batch-size must lie"),
        ({"num_transformers": 2}, "is for --task addition"),
        ({"task": "addition", "num_transformers": 3}, "must be 1 or 2, not 3"),
        ({"task": "addition", "distortion": "E"}, "leave --distortion out"),
        ({"optimizer": "adam", "sgd_momentum": 0.9}, "is for --optimizer sgd"),
        (
            {"transform": "none", "localisation_learning_rate": 0.5},
            "--localisation-learning-rate has no effect with --transform none: leave it out",
        ),
        ({"evaluate": "nothing.pt"}, "nothing.pt is missing"),
        (
            {"run_dir": "used", "data_dir": "nowhere", "dataset": "mnist"},
            "used holds a run already",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(stn.urllib.request, "urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    Path("used").mkdir()
    Path("used/checkpoint.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        stn.main(Args(**{**TINY, **flags}))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(stn, "update", lambda *_: torch.tensor(math.nan))
    with pytest.raises(stn.Diverged, match="loss is nan at update 1: the run stops"):
        stn.main(Args(**TINY, run_dir=str(tmp_path)))


def test_bad_input_a_transformer_that_left_the_image(tmp_path, monkeypatch):
    make_transformer_network = stn.make_transformer_network

    def lost(args):
        net = make_transformer_network(args)
        with torch.no_grad():
            net.transformers[0].localisation[-1].bias[2] = 9.0
        return net

    monkeypatch.setattr(stn, "make_transformer_network", lost)
    with pytest.raises(SystemExit, match="has left the image before update 10"):
        stn.main(Args(**TINY, run_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("at", "every", "sentence"),
    [
        ("make_examples", 10, r"^Stopped\.$"),
        ("update", 10, r"^Stopped before the first checkpoint\.$"),
        ("report", 10, r"^Stopped; go on with the same flags and --resume .*checkpoint\.pt$"),
        ("report", 20, r"^Stopped; evaluate with --evaluate .*checkpoint\.pt$"),
    ],
)
def test_bad_input_a_signal_ends_a_run_in_one_sentence(at, every, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(stn, at, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match=sentence):
        stn.main(Args(**TINY | {"report_every": every}, run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run").exists() == (at != "make_examples")


def test_bad_input_other_transform(tmp_path):
    args = Args(**TINY, run_dir=str(tmp_path))
    stn.main(args)
    checkpoint = str(tmp_path / "checkpoint.pt")
    with pytest.raises(
        SystemExit, match="was made with --transform affine, not with --transform tps"
    ):
        stn.main(dataclasses.replace(args, transform="tps", evaluate=checkpoint))
    assert "eval/error" in stn.main(dataclasses.replace(args, bfloat16=True, evaluate=checkpoint))
    with pytest.raises(SystemExit, match="is at update 20: raise --total-iterations"):
        stn.main(dataclasses.replace(args, resume=checkpoint, run_dir=""))


def test_command_line(tmp_path):
    flags = f"--dataset digits --total-iterations 5 --batch-size 8 --run-dir {tmp_path}"
    command = [sys.executable, str(ROOT / "spatial_transformer_mnist.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "eval/error" in done.stdout and (tmp_path / "checkpoint.pt").exists()
    assert "parameters" in done.stdout
