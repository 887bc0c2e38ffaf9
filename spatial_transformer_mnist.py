"""Spatial transformer networks: a layer that learns where to look, how large and how turned.

    Paper    Jaderberg et al., "Spatial transformer networks", NIPS 2015
    Shows    a transformer in front of a network undoes distortions of digits (table 1)
    Run      python spatial_transformer_mnist.py --learning-rate 0.03 --sgd-momentum 0.9
               --localisation-learning-rate 0.03 --total-iterations 150000 --report-every 5000
    Result   1.13 % of turned digits wrong (seed 1; without a transformer 1.87) in 6 min on an
               NVIDIA H100, beside other programs; paper: 1.2 (2.1)
    Run      python spatial_transformer_mnist.py --learning-rate 0.03 --sgd-momentum 0.9
               --localisation-learning-rate 0.03 --total-iterations 10000 --report-every 500
    Result   2.00 % of turned digits wrong (seeds 1 to 3; without a transformer 3.61, with a spline
               1.83) in 71 s on 2 cores of an AMD EPYC; paper: 1.2 (2.1, 1.1)
    Run      python spatial_transformer_mnist.py --distortion RTS --learning-rate 0.03
               --sgd-momentum 0.9 --localisation-learning-rate 0.01 --total-iterations 150000
               --report-every 5000
    Result   1.23 % of digits wrong that are turned, scaled and moved (seed 1) in 5 min on an
               NVIDIA H200, beside other programs; paper: 0.8
    Run      python spatial_transformer_mnist.py --model cnn --bfloat16 --learning-rate 0.03
               --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 150000
               --report-every 5000
    Result   0.75 % of turned digits wrong with a convolutional network (seed 1; without a
               transformer 1.18) in 6 min on an NVIDIA H200; paper: 0.7 (1.2)
    Run      python spatial_transformer_mnist.py --task addition --num-transformers 2
               --optimizer adam --learning-rate 0.001 --localisation-learning-rate 0.001
               --total-iterations 150000 --report-every 5000
    Result   5.92 % of sums of two digits wrong (seed 1) after 120,000 updates, all that the NVIDIA
               H200 was at hand for, 6 min beside other programs; after 20,000 (a rate that falls by
               then) 12.59, with one transformer 29.60, without 58.89; paper: 9.0 (22.6, 47.7)

Departures: ours (the paper's)
    the Run lines: momentum 0.9 (not told), rates 0.03 (0.01), also of the localisation network, on
      RTS 0.01; the second one after 10,000, sums after 120,000 updates (150,000), these with Adam
      and rates of 0.001; the CNN in 16 bits; one run but where seeds are told (the mean of three)
    canvas 28x28 for R, which cuts the corners of a few digits, 42x42 for RTS, P and E, 60x60 for
      TC (told for RTS and TC alone)
    on RTS, TC and addition the transformer samples 56x56, halved to 28x28 by the mean (sizes not
      told); networks without a transformer see the canvas as it is
    equal parameters: as many as a CNN of 64 filters has on the canvas, on addition 650,000 (numbers
      not told, by copies about 400,000); so FCNs have 73 to 285 hidden units (in copies 128 to
      256), CNNs 61 to 111 filters (32 to 64)
    distortions drawn anew for every minibatch, of images drawn independently (not told;
      --fixed-distortions: one frozen copy)
    P moves the corners of the canvas, draws up to three times again what would tear it; E moves the
      points that are read, not those that are written; the control points of E and of thin plate
      splines, whose positions are theta, reach from -0.9 to 0.9; clutter is added and clipped (not
      told); scales of P and E, P's 5 pixels, E's 16 points, the clutter's 6x6 and the
      localisation network's widths are those of public copies (not seen in the paper's words)
    by default the localisation network's rate is 0.001, a tenth of the classifier's (told for SVHN
      alone); in a CNN it sees means of 2x2 pixels (halved, how not told) and has a pool between its
      convolutions (not told); two transformers start a quarter of
      the width apart (apart, how far not told); the other weights begin as torch's do (not told)
    -1 and 1 are the centres of the outermost pixels (not told)
    not here: SVHN, birds, co-localisation, transformers in depth. Off by default: --transform
      attention, scale and place (the paper's for co-localisation); ours alone: --optimizer adam,
      --bfloat16

Distortions: R turned by up to 90 degrees; RTS turned by up to 45, scaled, moved; P seen in
perspective; E bent; TC moved among clutter.
Symbols: U input, V output, theta parameters of the transformation T_theta, G target grid of points
(x, y) in [-1, 1]^2, B its basis (in shapes a batch). T_theta(G) says where to READ in U: a
contraction zooms in.
Shapes: B images of C channels, S their width, K basis functions of a transformation.
"""

import csv
import gzip
import hashlib
import math
import os
import signal
import time
import urllib.request
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Transform = Literal["attention", "affine", "projective", "tps"]


@dataclass
class Args:
    # The method
    task: Literal["classification", "addition"] = "classification"  # a digit, or the sum of two
    distortion: Literal["R", "RTS", "P", "E", "TC", "none"] = "R"  # see above, Distortions
    model: Literal["fcn", "cnn"] = "fcn"  # the classifier: fully connected or convolutional
    transform: Literal["none", Transform] = "affine"  # in front of the classifier; tps: a spline
    num_transformers: int = 1  # side by side, each on all channels (addition: 1 or 2)
    fixed_distortions: bool = False  # train on one frozen copy of distorted digits
    # Optimisation
    total_iterations: int = 150_000  # updates
    batch_size: int = 256  # images of a minibatch
    optimizer: Literal["sgd", "adam"] = "sgd"  # of the classifier and the localisation network
    learning_rate: float = 0.01  # divided by 10 after each third of the run
    localisation_learning_rate: float = 1e-3  # of the localisation network, divided at each third
    sgd_momentum: float = 0.0  # of sgd, for both
    bfloat16: bool = False  # the classifier computes in 16 bits: half the time with a cnn
    # The run
    dataset: Literal["mnist", "digits"] = "mnist"  # digits: scikit-learn's, needs no download
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    report_every: int = 1000  # updates between two reports, each with a checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number but those of the fixed sets
    run_dir: str = ""  # for logs, pictures, checkpoint.pt; default runs/DISTORTION_MODEL_...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


def target_grid(height: int, width: int) -> Tensor:
    """G [H W, 2], the points (x, y) of the output's pixels, row by row (section 3.2)."""
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def homogeneous(points: Tensor) -> Tensor:
    """(x, y, 1) [..., 3] of points [..., 2]."""
    return F.pad(points, (0, 1), value=1.0)


def control_points() -> Tensor:
    """[16, 2], the regular 4x4 grid of a thin plate spline."""
    return 0.9 * target_grid(4, 4)


def identity(transform: Transform) -> Tensor:
    """The theta that changes nothing."""
    if transform == "tps":
        return control_points().flatten()
    return torch.tensor(
        {
            "attention": [1.0, 0, 0],  # s, t_x, t_y
            "affine": [1.0, 0, 0, 0, 1, 0],  # A, row by row
            "projective": [1.0, 0, 0, 0, 1, 0, 0, 0],  # a 3x3 matrix without its last 1
        }[transform]
    )


def radial(squared_distance: Tensor) -> Tensor:
    """r^2 log r of a thin plate, 0 at r = 0."""
    return 0.5 * torch.xlogy(squared_distance, squared_distance)


def basis(transform: Transform, G: Tensor) -> Tensor:
    """B [H W, K] of G; every transformation here is T_theta(G) = B M_theta (section 3.2, end)."""
    if transform != "tps":
        return homogeneous(G)
    P, points = control_points().double(), G.double()
    N = len(P)
    system = torch.zeros(N + 3, N + 3, dtype=torch.float64)  # interpolates, bends least
    system[:N, :N] = radial(torch.cdist(P, P) ** 2)
    system[:N, N:] = homogeneous(P)
    system[N:, :N] = homogeneous(P).T
    features = torch.cat([radial(torch.cdist(points, P) ** 2), homogeneous(points)], 1)
    return torch.linalg.solve(system, features.T)[:N].T.to(G)  # system is symmetric


def matrix(transform: Transform, theta: Tensor) -> Tensor:
    """M_theta [B, K, 2]; projective: [B, 3, 3], whose third column is to divide by."""
    if transform == "attention":
        s, t_x, t_y = theta.unbind(1)
        zero = torch.zeros_like(s)
        return torch.stack([s, zero, zero, s, t_x, t_y], 1).view(-1, 3, 2)
    if transform == "affine":
        return theta.view(-1, 2, 3).mT
    if transform == "projective":
        return F.pad(theta, (0, 1), value=1.0).view(-1, 3, 3).mT
    return theta.view(-1, 16, 2)


def points_from(B: Tensor, M: Tensor) -> Tensor:
    """B M [B, H W, D] of M [B, K, D], as one product of matrices: a batch of small ones is slow."""
    return (M.mT @ B.T).mT


def sampling_points(transform: Transform, theta: Tensor, B: Tensor) -> Tensor:
    """T_theta(G) = B M_theta, [B, H W, 2], for the basis B [H W, K]."""
    points = points_from(B, matrix(transform, theta))
    if points.shape[-1] == 2:
        return points
    w = points[..., 2:]
    far = torch.where(w < 0, -1e-3, 1e-3)  # at the horizon: far outside, not infinite
    return points[..., :2] / torch.where(w.abs() < 1e-3, far, w)


def sampler(U: Tensor, points: Tensor, size: int) -> Tensor:
    """V [B, C, size, size], U read at the points bilinearly, zero outside (eq. 5)."""
    grid = points.view(-1, size, size, 2)
    return F.grid_sample(U, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class SpatialTransformer(nn.Module):
    """V = U read at T_theta(G), theta = localisation(U) (figure 2).

    localisation maps [B, C, S, S] to theta [B, n]; its last layer, a linear one, begins with zero
    weights and the identity as its bias. Several side by side start a little apart.
    """

    def __init__(
        self,
        localisation: nn.Sequential,
        transform: Transform,
        output_size: int,
        shift: float = 0.0,
    ):
        super().__init__()
        self.localisation, self.transform, self.output_size = localisation, transform, output_size
        nn.init.zeros_(localisation[-1].weight)
        with torch.no_grad():
            localisation[-1].bias.copy_(identity(transform))
            if shift:
                where = {"attention": [1], "affine": [2], "projective": [2], "tps": range(0, 32, 2)}
                localisation[-1].bias[list(where[transform])] += shift
        G = target_grid(output_size, output_size)
        self.register_buffer("B", basis(transform, G), persistent=False)

    def forward(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """V [B, C, H, H] with H the output size, and the points [B, H^2, 2] it was read at."""
        theta = self.localisation(U)
        points = sampling_points(self.transform, theta, self.B)  # the grid generator
        return sampler(U, points, self.output_size), points


def fcn_localisation(C: int, S: int, n: int) -> nn.Sequential:
    """theta [B, n] from three fully connected layers of 32 units (A.4)."""
    layers = [nn.Flatten()]
    for inputs in (C * S * S, 32, 32):
        layers += [nn.Linear(inputs, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, n))


def cnn_localisation(C: int, S: int, n: int) -> nn.Sequential:
    """theta [B, n] from two 5x5 convolutions of 20 filters on the halved image, 20 units (A.4)."""
    size = ((S // 2 - 4) // 2) - 4
    layers = [nn.AvgPool2d(2), nn.Conv2d(C, 20, 5), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(20, 20, 5), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(20 * size**2, 20), nn.ReLU(), nn.Linear(20, n))


def fcn_classifier(C: int, S: int, width: int, classes: int) -> nn.Module:
    """Two hidden layers (A.4)."""
    layers = [nn.Flatten(), nn.Linear(C * S * S, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


class FirstConv2d(nn.Conv2d):
    """nn.Conv2d(C, m, k) [B, C, S, S] -> [B, m, S', S'], faster than its parent for small C.

    The k columns under a k x k filter become channels of a k x 1 filter: the same sum, but on a CPU
    the gradient of x takes a fraction of the time with k C channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        m, C, k, _ = self.weight.shape
        columns = x.unfold(3, k, 1).permute(0, 2, 3, 1, 4).flatten(3)  # [B, S, S', C k]
        filters = self.weight.mT.reshape(m, C * k, k, 1)
        return F.conv2d(columns.permute(0, 3, 1, 2), filters, self.bias)


def cnn_classifier(C: int, S: int, width: int, classes: int) -> nn.Module:
    """9x9 and 7x7 convolutions, each with 2x2 max-pooling (A.4).

    The maximum comes before the ReLU: the same numbers, and a quarter of the ReLU's work.
    """
    size = ((S - 8) // 2 - 6) // 2
    layers = [FirstConv2d(C, width, 9), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 7), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width * size**2, classes))


class TransformerNetwork(nn.Module):
    """Spatial transformers side by side, their outputs stacked as channels, and a classifier."""

    def __init__(
        self,
        transformers: list[SpatialTransformer],
        halve: bool,
        classifier: nn.Module,
        bfloat16: bool = False,
    ):
        super().__init__()
        self.transformers = nn.ModuleList(transformers)
        self.halve = nn.AvgPool2d(2) if halve else nn.Identity()  # against aliasing
        self.classifier = classifier.to(memory_format=torch.channels_last)  # faster
        self.bfloat16 = bfloat16

    def forward(self, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, classes], what the classifier saw, points [B, T, H W, 2] of T transformers.

        Without a transformer it saw U, and there are no points.
        """
        V, points = U, U.new_zeros(len(U), 0, 0, 2)
        if len(self.transformers):
            outputs, read_at = zip(*(transformer(U) for transformer in self.transformers))
            V, points = self.halve(torch.cat(outputs, 1)), torch.stack(read_at, 1)
        with torch.autocast(U.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.classifier(V).to(V.dtype), V, points


CANVAS = {"none": 28, "R": 28, "RTS": 42, "P": 42, "E": 42, "TC": 60}


def count_parameters(net: nn.Module) -> int:
    """Of all its layers."""
    return sum(p.numel() for p in net.parameters())


def width_for(budget: int, build: Callable[[int], nn.Module]) -> int:
    """The width for which build(width) has a number of parameters nearest to the budget."""
    with torch.device("meta"):  # counts without making them
        above = bisect_left(range(1000), budget, lo=2, key=lambda w: count_parameters(build(w)))
        return min(above - 1, above, key=lambda w: abs(count_parameters(build(w)) - budget))


def make_transformer_network(args: Args) -> TransformerNetwork:
    """The network of an experiment; all of one experiment have about as many parameters."""
    addition = args.task == "addition"
    S, C, classes = (42, 2, 19) if addition else (CANVAS[args.distortion], 1, 10)
    localise = fcn_localisation if args.model == "fcn" else cnn_localisation
    classify = fcn_classifier if args.model == "fcn" else cnn_classifier
    budget = 650_000 if addition else count_parameters(cnn_classifier(C, S, 64, classes))
    halve = args.transform != "none" and (addition or args.distortion in ("RTS", "TC"))
    sampled, seen = (56, 28) if halve else (S, S)
    transformers = []
    if args.transform != "none":
        for shift in (0.0,) if args.num_transformers == 1 else (-0.25, 0.25):  # in half widths
            localisation = localise(C, S, len(identity(args.transform)))
            transformers.append(SpatialTransformer(localisation, args.transform, sampled, shift))
        C *= len(transformers)
    rest = budget - sum(map(count_parameters, transformers))
    width = width_for(rest, lambda width: classify(C, seen, width, classes))
    classifier = classify(C, seen, width, classes)
    return TransformerNetwork(transformers, halve, classifier, args.bfloat16)


# ---- The data -----------------------------------------------------------------------------------


def download(url: str, path: Path, remedy: str) -> bytes:
    """What url holds; otherwise a sentence that says what is missing and what to do."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (OSError, HTTPException) as error:
        raise SystemExit(
            f"{path} is missing and {url} cannot be reached ({error}).\n{remedy}"
        ) from None


def write_whole(path: Path, content: bytes) -> None:
    """The file with all of its content, or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(content)
        path.with_suffix(".part").replace(path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error}): change --data-dir.") from None


MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {  # of the unpacked files
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}


def download_mnist(path: Path) -> None:
    """Fetch one of the four files whole, or leave nothing behind."""
    remedy = "Put it there, point --data-dir at a folder that has mnist/, or use --dataset digits."
    content = download(MNIST_URL + path.name, path, remedy)
    try:
        checksum = hashlib.md5(gzip.decompress(content)).hexdigest()
    except (OSError, EOFError, zlib.error):
        checksum = "none"
    if checksum != MNIST_MD5[path.name]:
        raise SystemExit(f"{MNIST_URL}{path.name} did not send MNIST: its checksum is wrong.")
    write_whole(path, content)


def load_mnist(data_dir: str, split: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """Images [N, 28, 28] as bytes and labels [N]; a missing file is downloaded."""
    arrays = []
    for kind, header, shape in (("images-idx3", 16, (-1, 28, 28)), ("labels-idx1", 8, (-1,))):
        path = Path(data_dir, "mnist", f"{split}-{kind}-ubyte.gz")
        if not os.path.exists(path):
            download_mnist(path)
        try:
            content = gzip.decompress(path.read_bytes())
            arrays.append(np.frombuffer(content, np.uint8, offset=header).reshape(shape))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise SystemExit(f"{path} is damaged ({error}); delete it to fetch it again.") from None
    images, labels = arrays
    if len(images) != len(labels) or len(labels) == 0 or labels.max() > 9:
        raise SystemExit(f"{path} and its images do not belong together; delete both.")
    return torch.tensor(images), torch.tensor(labels, dtype=torch.long)


def load_digits(split: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 8x8 digits in MNIST's format: 20x20 inside 28x28, bytes."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.pad(F.interpolate(images, size=20, mode="bilinear"), (4, 4, 4, 4))
    images = images[:, 0].round().byte()
    labels = torch.tensor(digits.target, dtype=torch.long)
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    return images[part], labels[part]


def place(canvas: Tensor, patches: Tensor, generator: torch.Generator | None) -> Tensor:
    """Add patches [B, w, w] to canvas [B, S, S], each at a random place, borders included.

    Returns their centres [B, 2] as locations (x, y).
    """
    B, S, w = len(canvas), canvas.shape[-1], patches.shape[-1]
    corner = torch.randint(S - w + 1, (B, 2), generator=generator, device=canvas.device)
    columns, rows = (corner[:, :, None] + torch.arange(w, device=canvas.device)).unbind(1)
    pixels = (rows[:, :, None] * S + columns[:, None, :]).flatten(1)
    canvas.view(B, S * S).scatter_add_(1, pixels, patches.flatten(1).to(canvas.dtype))
    return (corner + w / 2) / S * 2 - 1


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """[count], drawn on the generator's device."""
    device = generator.device
    return low + (high - low) * torch.rand(count, generator=generator, device=device)


def similarity(angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """M [B, 3, 2] that reads a picture as turned by angle, enlarged by scale, moved by shift."""
    cos, sin = angle.cos() / scale, angle.sin() / scale
    linear = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    return torch.cat([linear, -shift[:, None] @ linear], 1)


def homography(at: Tensor, read: Tensor) -> Tensor:
    """theta [B, 8] of the projective transformation that reads points [B, 4, 2] at others."""
    here = homogeneous(at)  # [B, 4, 3]
    zeros = torch.zeros_like(here)
    x_rows = torch.cat([here, zeros, -read[..., :1] * at], -1)
    y_rows = torch.cat([zeros, here, -read[..., 1:] * at], -1)
    system = torch.cat([x_rows, y_rows], 1)  # [B, 8, 8]
    return torch.linalg.solve(system, torch.cat([read[..., 0], read[..., 1]], 1))


@cache
def elastic_basis(S: int) -> Tensor:
    """The spline's basis at the pixels of a canvas, in the digit's coordinates."""
    return basis("tps", target_grid(S, S) * (S - 1) / 27)


def distort(
    digits: Tensor, distortion: str, pool: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Pictures [B, 1, S, S] of digits [B, 28, 28], both in [0, 1], and their angles [B] (A.4).

    Clutter is cut from pool.
    """
    B, S, device = len(digits), CANVAS[distortion], digits.device
    angle = torch.zeros(B, device=device)
    if distortion == "none":
        return digits[:, None], angle
    if distortion == "TC":
        canvas = torch.zeros(B, S, S, device=device)
        place(canvas, digits, generator)
        for _ in range(6):
            other = torch.randint(len(pool), (B, 1, 1), generator=generator, device=device)
            corner = torch.randint(28 - 6 + 1, (B, 2), generator=generator, device=device)
            rows, columns = (corner[:, :, None] + torch.arange(6, device=device)).unbind(1)
            place(canvas, pool[other, rows[:, :, None], columns[:, None, :]], generator)
        return canvas.clamp_(max=1)[:, None], angle

    # the canvas's pixels, in units in which the digit not yet distorted reaches from -1 to 1
    G = target_grid(S, S).to(device) * (S - 1) / 27
    if distortion == "R":
        angle = uniform(B, -math.pi / 2, math.pi / 2, generator)
        scale, shift = torch.ones(B, device=device), torch.zeros(B, 2, device=device)
    elif distortion == "RTS":
        angle = uniform(B, -math.pi / 4, math.pi / 4, generator)
        scale = uniform(B, 0.7, 1.2, generator)
        room = ((S - 1) - 27 * scale) / 27  # half the canvas less half the digit
        shift = uniform(2 * B, -1, 1, generator).view(B, 2) * room[:, None]
    else:
        scale, shift = uniform(B, 0.75, 1.0, generator), torch.zeros(B, 2, device=device)
    noise = partial(torch.randn, generator=generator, device=device)
    if distortion == "P":
        corners = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]], device=device)
        corners *= (S - 1) / 27  # of the canvas
        square = corners * scale[:, None, None]
        moved = square + noise(B, 4, 2) * 5 / 13.5
        for _ in range(4):  # up to three times again where the horizon tears a digit, or nearly
            theta = homography(moved, corners.expand(B, -1, -1))
            w = (moved * theta[:, None, 6:]).sum(-1) + 1  # [B, 4] the divisors at the moved corners
            torn = w.amin(1) < 0.1 * w.amax(1)
            moved = torch.where(torn[:, None, None], square + noise(B, 4, 2) * 5 / 13.5, moved)
        points = sampling_points("projective", theta, basis("projective", G))
    elif distortion == "E":
        moved = control_points().to(device) + noise(B, 16, 2) * 1.5 / 13.5
        points = points_from(elastic_basis(S).to(device), moved) / scale[:, None, None]
    else:
        points = points_from(basis("affine", G), similarity(angle, scale, shift))
    return sampler(digits[:, None], points, S), angle


def make_examples(
    digits: Tensor, labels: Tensor, chosen: Tensor, args: Args, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [B, C, S, S], targets [B] and angles [B] of the chosen digits [B].

    addition: two channels, each a digit distorted by itself, and their sum.
    """
    if args.task == "classification":
        x, angle = distort(digits[chosen], args.distortion, digits, generator)
        return x, labels[chosen], angle
    others = torch.randint(len(digits), chosen.shape, generator=generator, device=digits.device)
    pictures = [distort(digits[i], "RTS", digits, generator) for i in (chosen, others)]
    x = torch.cat([picture for picture, _ in pictures], 1)
    return x, labels[chosen] + labels[others], pictures[0][1]


# ---- Evaluation and training --------------------------------------------------------------------


class Examples(NamedTuple):
    """A data set that stays as it is."""

    x: Tensor  # [N, C, S, S]
    y: Tensor  # [N]
    angle: Tensor  # [N] radians, by which the digit was turned


def angle_of(points: Tensor) -> Tensor:
    """The rotation [B] in sampling points [B, H W, 2], by the nearest affine transformation."""
    size = math.isqrt(points.shape[1])
    G = target_grid(size, size).to(points)
    A = G.T @ (points - points.mean(1, keepdim=True)) / G.square().sum(0)[:, None]  # [B, 2, 2]
    return torch.atan2(A[:, 0, 1] - A[:, 1, 0], A[:, 0, 0] + A[:, 1, 1])


@torch.no_grad()
def evaluate(net: TransformerNetwork, args: Args, examples: Examples) -> dict[str, float]:
    """Error in percent, share of points inside the image, on R how well digits are turned.

    The share is that of the worst transformer. On R, correlation and slope of the transformer's
    angle against the digit's: both 1 if every digit is turned upright.
    """
    turns = args.task == "classification" and args.distortion == "R" and args.transform != "none"
    wrong, inside, turned = 0, [], []
    parts = list(zip(examples.x.split(1000), examples.y.split(1000)))
    for x, y in tqdm(parts, unit="batch", leave=False, disable=None):
        logits, _, points = net(x)
        wrong += (logits.argmax(1) != y).sum().item()
        if points.numel():
            inside.append((points.abs() < 1 + 1e-4).all(-1).float().mean((0, 2)))  # [T]
        if turns:
            turned.append(angle_of(points[:, 0]))
    metrics = {"eval/error": 100 * wrong / len(examples.y)}
    if inside:
        metrics["eval/inside"] = torch.stack(inside).mean(0).min().item()  # share
    if turns:
        both = torch.stack([torch.cat(turned), examples.angle])
        (read, shared), (_, true) = torch.cov(both).tolist()
        spread = math.sqrt(read * true)
        metrics["eval/angle_correlation"] = shared / spread if read > 1e-8 else 0.0  # constant
        metrics["eval/angle_slope"] = shared / true
    return metrics


def update(
    net: TransformerNetwork, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Tensor:
    """One step on a minibatch; returns its loss."""
    loss = F.cross_entropy(net(x)[0], y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def learn_from(
    minibatches: Iterator[tuple[Tensor, ...]], learn: Callable[..., Tensor]
) -> Iterator[Tensor]:
    """What learn says of each minibatch.

    A GPU is done with a small network's step before Python has launched the next. So there the
    fourth step is recorded as a CUDA graph, learning rates included, and repeated with the
    minibatches that follow. Whatever has another size, like the last one, is learned step by step.
    """
    graph, recorded = None, ()
    for n, minibatch in enumerate(minibatches):
        if minibatch[0].is_cuda and n == 3:
            recorded, graph = [part.clone() for part in minibatch], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                said = learn(*recorded)
        if graph is not None and len(minibatch[0]) == len(recorded[0]):
            for there, here in zip(recorded, minibatch):
                there.copy_(here)
            graph.replay()
            yield said.clone()
        else:
            yield learn(*minibatch)


def write_gif(pictures: Sequence[Image.Image], path: Path, milliseconds: float) -> None:
    """An endless film; where it cannot be written, a line says so and the run goes on."""
    first, *others = pictures
    try:
        first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    except OSError as error:
        tqdm.write(f"{path} cannot be written ({error}).")


def save_figure(figure: plt.Figure, path: Path) -> None:
    """A picture; where it cannot be written, a line says so and the run goes on."""
    try:
        figure.savefig(path, dpi=90, bbox_inches="tight")
    except OSError as error:
        tqdm.write(f"{path} cannot be written ({error}).")
    plt.close(figure)


def report(writer, step: int, metrics: dict[str, float]) -> None:
    """The same numbers to the terminal, to tensorboard and to metrics.csv."""
    tqdm.write(f"{step:>8}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    with open(Path(writer.log_dir, "metrics.csv"), "a", newline="") as file:
        csv.writer(file).writerows([step, name, value] for name, value in metrics.items())


def save_checkpoint(path: Path, net: dict[str, Tensor], **state) -> None:
    """Write beside the old file, then rename: a crash leaves the old one or the new one, whole.

    A network whose parameters are not finite does not replace one that works.
    """
    net = {name: part.clone() for name, part in net.items()}  # workers may go on writing to it
    if not all(part.isfinite().all() for part in net.values()):
        raise SystemExit(
            "Parameters are no longer finite: the run stops. A checkpoint written before is kept; "
            "to begin anew with a smaller --learning-rate often helps."
        )
    part = path.with_suffix(".part")
    try:
        torch.save({"net": net, **state}, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # of torch's writer, where a disk is full
        part.unlink(missing_ok=True)
        raise SystemExit(
            f"{path} cannot be written ({type(error).__name__}; is the disk full?): the run stops. "
            "A checkpoint written before is kept."
        ) from None


class Checkpoint(dict):
    """What save_checkpoint wrote; a part that it lacks is told in a sentence."""

    def __missing__(self, part: str) -> None:
        raise SystemExit(f"The checkpoint has no {part}: another version of this script wrote it.")


def load_checkpoint(path: Path, args: Args, net: nn.Module, *shaping: str) -> Checkpoint:
    """What save_checkpoint wrote, its parameters put into net.

    The flags named in shaping must be those of the run that wrote it.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu")
        for name in shaping:
            theirs, ours = checkpoint["args"][name], getattr(args, name)
            if theirs != ours:
                flag = "--" + name.replace("_", "-")
                raise SystemExit(f"{path} was made with {flag} {theirs}, not with {flag} {ours}.")
        net.load_state_dict(checkpoint["net"])
    except Exception as error:  # whatever bytes that are no checkpoint make torch.load raise
        kind = type(error).__name__
        raise SystemExit(
            f"{path} is missing, damaged or no checkpoint of this script with these flags ({kind})."
        ) from None
    return Checkpoint(checkpoint)


def open_run_dir(args: Args, task: str, script: str) -> Path:
    """The folder of this run: that of the checkpoint it resumes, or a new one."""
    name = f"{task}__{script}__{args.seed}__{time.time():.6f}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume).parent if args.resume else Path(args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / "checkpoint.pt").exists() and Path(args.resume).name != "checkpoint.pt":
            raise SystemExit(
                f"{run_dir} holds a run already: --resume {run_dir}/checkpoint.pt goes on with it, "
                "another --run-dir begins anew."
            )
        (run_dir / "metrics.csv").touch()
    except OSError as error:
        raise SystemExit(
            f"{run_dir} cannot be written to ({error}): choose another folder."
        ) from None
    return run_dir


class Diverged(SystemExit):
    """The loss is no longer a number."""


def refuse_infinity(loss: float, where: str) -> None:
    """End the run with a sentence where its loss is no number."""
    if not math.isfinite(loss):
        raise Diverged(
            f"The loss is {loss} {where}: the run stops. A checkpoint written before is kept; "
            "to begin anew with a smaller --learning-rate often helps."
        )


def stopped(run_dir: str | Path, finished: bool = False) -> SystemExit:
    """What Ctrl-C ends with, finished: when nothing is left but the last evaluation."""
    path = Path(run_dir, "checkpoint.pt")
    if not path.exists():
        return SystemExit("Stopped before the first checkpoint.")
    way = "evaluate with --evaluate" if finished else "go on with the same flags and --resume"
    return SystemExit(f"Stopped; {way} {path}")


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; leave the flag out.")
    return name


# Flags of all scripts whose bounds are others than 0 (of a count: 1) and 2^32 - 1
FRACTIONS = ("discount", "rmsprop_decay", "momentum_decay", "sgd_momentum")  # at most 1
FRACTIONS += ("eval_epsilon", "final_epsilon", "teacher_epsilon", "learning_rate_decay")
POSITIVE = ("rmsprop_eps", "max_gradient_norm", "adagrad_start", "location_std")  # or off: 0
SIGNED = ("rho_init", "commitment_bias")  # below 0, too


def check(args: Args) -> None:
    """Refuse numbers that no run can have and flags that exclude each other."""
    for field in fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        is_count = isinstance(field.default, int) and field.default > 0 and field.name != "seed"
        lowest = 1 if is_count else -(2**32 - 1) if field.name in SIGNED else 0
        highest = 1 if field.name in FRACTIONS else 2**32 - 1
        if type(value) in (int, float) and not lowest <= value <= highest:
            raise SystemExit(f"{flag} must lie between {lowest} and {highest}, not at {value}.")
        if field.name in POSITIVE and field.default and np.float32(value) == 0:
            raise SystemExit(f"{flag} must be above 0 in 32 bits, not at {value}.")
    if args.resume and args.evaluate:
        raise SystemExit("--resume trains and --evaluate does not: pass one of them.")
    checkpoint = args.resume or args.evaluate
    elsewhere = Path(args.run_dir).resolve() != Path(checkpoint).parent.resolve()
    if checkpoint and args.run_dir and elsewhere:
        raise SystemExit("--resume and --evaluate stay in their folder: leave --run-dir out.")


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    if args.num_transformers > 1 and (args.task != "addition" or args.transform == "none"):
        raise SystemExit("--num-transformers above 1 is for --task addition with a --transform.")
    if args.num_transformers > 2:
        raise SystemExit(f"--num-transformers must be 1 or 2, not {args.num_transformers}.")
    if args.task == "addition" and args.distortion != "R":
        raise SystemExit("--task addition distorts its digits by RTS: leave --distortion out.")
    rate = "localisation_learning_rate"
    if args.transform == "none" and getattr(args, rate) != getattr(Args, rate):
        raise SystemExit(
            "--localisation-learning-rate has no effect with --transform none: leave it out."
        )
    if args.optimizer == "adam" and args.sgd_momentum:
        raise SystemExit("--sgd-momentum is for --optimizer sgd: leave it out.")
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


KEPT = (  # flags that a resumed run has to share with its beginning
    *("seed", "batch_size", "optimizer", "learning_rate", "localisation_learning_rate"),
    *("sgd_momentum", "bfloat16", "fixed_distortions"),
)


def inked(picture: Tensor) -> np.ndarray:
    """RGB bytes [S, S, 3] of channels [1 or 2, S, S]: black on white, or blue and orange."""
    taken = [[1.0, 1.0, 1.0]] if len(picture) == 1 else [[1.0, 0.6, 0.0], [0.0, 0.5, 1.0]]
    left = 1 - torch.einsum("chw,ck->hwk", picture.cpu(), torch.tensor(taken))
    return (255 * left.clamp(0, 1)).byte().numpy()


@torch.no_grad()
def draw_transformations(net: TransformerNetwork, examples: Examples, path: Path) -> None:
    """Inputs, where each transformer reads them, and what the classifier gets from it."""
    x = examples.x[:10]
    _, V, points = net(x)
    T, S, colours = points.shape[1], x.shape[-1], ("tab:red", "tab:green")
    rows = [x, *V.chunk(max(T, 1), 1)]
    figure, axes = plt.subplots(len(rows), len(x), figsize=(1.3 * len(x), 1.45 * len(rows)))
    for i in range(len(x)):
        for axis, pictures in zip(axes[:, i], rows):
            axis.imshow(inked(pictures[i]))
            axis.set(xticks=[], yticks=[])
            axis.autoscale(False)  # the grid may reach beyond
        for t in range(T):
            grid = points[i, t].view(*[math.isqrt(points.shape[2])] * 2, 2)
            grid = ((grid + 1) / 2 * (S - 1)).cpu().numpy()
            shown = np.linspace(0, len(grid) - 1, 5).round().astype(int)  # of its rows and columns
            for line in (*grid[shown], *grid[:, shown].swapaxes(0, 1)):
                axes[0, i].plot(*line.T, color=colours[t], lw=0.7)
            axes[1 + t, i].spines[:].set_color(colours[t])
    axes[0, 0].set(ylabel="input")
    axes[1, 0].set(ylabel="transformed")
    save_figure(figure, path)


@torch.no_grad()
def film_frame(net: TransformerNetwork, examples: Examples) -> Tensor:
    """Eight fixed inputs above what the classifier gets, a row a transformer; bytes [H, 8 S, 3]."""
    x = examples.x[:8]
    _, V, points = net(x)
    V = F.interpolate(V, size=x.shape[-2:])
    rows = [x, *V.chunk(max(points.shape[1], 1), 1)]
    frame = [np.concatenate([inked(picture) for picture in row], 1) for row in rows]
    return torch.from_numpy(np.concatenate(frame))


def save_film(frames: list[Tensor], path: Path) -> None:
    """A GIF of frames [H, W, 3], each twice as large."""
    pictures = [Image.fromarray(frame.numpy().repeat(2, 0).repeat(2, 1)) for frame in frames]
    write_gif(pictures, path, 120)


def run(args: Args, device: str) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.manual_seed(args.seed)
    load = {"mnist": partial(load_mnist, args.data_dir), "digits": load_digits}[args.dataset]
    (digits, labels), (test_digits, test_labels) = load("train"), load("t10k")
    digits, test_digits = digits / 255, test_digits / 255
    frozen = torch.Generator().manual_seed(2015)  # the same sets on every device
    everyone = torch.arange(len(test_digits))
    test = Examples(*make_examples(test_digits, test_labels, everyone, args, frozen))
    test = Examples(*(part.to(device) for part in test))
    if args.fixed_distortions and not args.evaluate:
        parts = [
            make_examples(digits, labels, chosen, args, frozen)
            for chosen in torch.arange(len(digits)).split(10_000)
        ]
        fixed = Examples(*(torch.cat(part).to(device) for part in zip(*parts)))
    digits, labels = digits.to(device), labels.to(device)

    net = make_transformer_network(args).to(device)
    tqdm.write(f"{count_parameters(net):,} parameters")
    localising = list(net.transformers.parameters())
    groups = [{"params": net.classifier.parameters(), "lr": args.learning_rate}]
    if localising:
        groups.append({"params": localising, "lr": args.localisation_learning_rate})
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups)
    else:
        optimizer = torch.optim.SGD(groups, momentum=args.sgd_momentum)
    generator = torch.Generator(device).manual_seed(args.seed)
    shaping = ("task", "distortion", "model", "transform", "num_transformers", "dataset")
    t, seconds, frames, finished = 0, 0.0, [], False
    if args.evaluate:
        load_checkpoint(Path(args.evaluate), args, net, *shaping)
        draw_transformations(net, test, Path(args.evaluate).with_name("transformations.png"))
        return evaluate(net, args, test)
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, net, *shaping, *KEPT)
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["device"] != device:
            raise SystemExit(f"{args.resume} was made on {checkpoint['device']}, not on {device}.")
        generator.set_state(checkpoint["rng"])
        t, seconds = checkpoint["t"], checkpoint["seconds"]
        if t >= args.total_iterations:
            raise SystemExit(f"{args.resume} is at update {t}: raise --total-iterations.")
        longer = math.ceil(args.total_iterations / checkpoint["args"]["total_iterations"])
        frames = checkpoint["frames"][::longer]  # a longer film has as many, evenly

    kind = args.task if args.task == "addition" else args.distortion
    run_dir = open_run_dir(
        args, f"{kind}_{args.model}_{args.transform}", "spatial_transformer_mnist"
    )
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    bar = tqdm(total=args.total_iterations, initial=t, unit="update", disable=None)
    losses, start = [], time.perf_counter()
    base = (args.learning_rate, args.localisation_learning_rate)

    def minibatches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and their classes, each made after the last one's step."""
        for _ in range(count):
            size = (args.batch_size,)
            chosen = torch.randint(len(digits), size, generator=generator, device=device)
            if args.fixed_distortions:
                yield fixed.x[chosen], fixed.y[chosen]
            else:
                yield make_examples(digits, labels, chosen, args, generator)[:2]

    try:
        while t < args.total_iterations:
            third = 3 * t // args.total_iterations
            for group, rate in zip(optimizer.param_groups, base):
                group |= {"lr": rate / 10**third, "capturable": device == "cuda"}
            drop = math.ceil((third + 1) * args.total_iterations / 3)
            until = min(t + args.report_every - t % args.report_every, drop)
            for loss in learn_from(minibatches(until - t), partial(update, net, optimizer)):
                losses.append(loss)
                t += 1
                refuse_infinity(loss.item(), f"at update {t}")
                bar.update()
            if t % args.report_every and t < args.total_iterations:
                continue

            took = time.perf_counter() - start
            seconds += took
            metrics = {"losses/loss": torch.stack(losses).mean().item()}
            metrics["charts/SPS"] = len(losses) * args.batch_size / took  # images per second
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/minutes"] = seconds / 60  # of training alone
            metrics |= evaluate(net, args, test)
            if metrics.get("eval/inside", 1.0) < 0.05:
                raise SystemExit(
                    f"A transformer has left the image before update {t} (eval/inside "
                    f"{metrics['eval/inside']:.2f}) and learns no more: the run stops. A smaller "
                    "--localisation-learning-rate helps."
                )
            if len(frames) < 100 * t / args.total_iterations:  # a hundred, evenly
                frames.append(film_frame(net, test))
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "t": t}
            state |= {"rng": generator.get_state(), "seconds": seconds, "frames": frames}
            state["device"] = device
            save_checkpoint(run_dir / "checkpoint.pt", args=asdict(args), **state)
            finished = t == args.total_iterations
            report(writer, t, metrics)
            losses, start = [], time.perf_counter()
    except KeyboardInterrupt:
        raise stopped(run_dir, finished) from None
    finally:
        writer.close()
        bar.close()
    draw_transformations(net, test, run_dir / "transformations.png")
    save_film(frames, run_dir / "training.gif")
    return metrics


def main(args: Args) -> dict[str, float]:
    check(args)
    check_flags(args)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages, a sixth faster
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        return run(args, choose_device(args.device))
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
