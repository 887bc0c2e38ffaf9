"""Natural neural networks: projected natural gradient descent (PRONG) and its rivals.

    Paper    Desjardins et al., "Natural neural networks", NIPS 2015
    Shows    whitened layers need several times fewer updates than gradient descent (figure 3)
    Run      python prong.py --batch-size 256 --total-iterations 10000
    Result   12 times fewer updates to the loss that gradient descent has after 10,000, 9 times less
               time (means of seeds 1 to 3) in 7 min on 2 cores of an AMD EPYC; paper: up to 10
               times fewer
    Run      python prong.py --task cifar10 --batch-size 64 --total-iterations 40000
    Result   11.5 % validation error (seed 1; batch normalisation 9.0) in 7 min on one NVIDIA H200,
               three other runs beside it; paper: 7.32 % (8.22) of the test images
    Run      python prong.py --task fisher --learning-rate 1e-2 --total-iterations 5000
               --report-every 100
    Result   99.9993 % lower condition number at the end (mean of seeds 1 to 3; sgd 99.98, rmsprop
               99.997; by the first whitening alone 98.5) in 11 s on one core of an AMD EPYC;
               paper: more than 95 % lower

Departures: ours (the paper's, in its first version on arXiv)
    the autoencoder's Run line: minibatches of 256 (128 best for all but batch normalisation)
    algorithm 1 with the signs that eq. 6 demands (as printed it changes the function)
    whitened by the covariance (section 3 writes E[h h^T]); epsilon 0.01 (several, figure 3a)
    U symmetric, E diag(.) E^T (eq. 7: diag(.) E^T, which makes the same steps in W)
    at a whitening the velocity is set to 0 or, with --momentum carry, transformed (at first left
      as it was, which footnote 6 doubts)
    prong+: batch normalisation after each whitened layer but the last (one of two readings); it
      removes any constant, so c = 0 there. batchnorm spares the last layer, too
    convolutions see zeros outside the image, whitened like any other pixel (not told)
    cross-entropy of the autoencoder, summed over pixels, all layers sigmoid (not told); training
      errors are those of the first 10,000 images, cropped in the middle
    fisher: 100-20-20-10 units, overlapping means to 10x10, 2,000 images (not told)
    cifar10: T, N_s and epsilon as elsewhere, rate 1e-3, minibatches of 64, 40,000 updates, no decay
      of weights, centre crop in tests, (x - mean) / 64, the last 5,000 images for validation, which
      also lowers the rate; an error is better if 1 % below the last that was better (not told)
    minibatches and samples drawn with replacement; RMSprop is torch's, its momentum is of the
      scaled gradient (not told); weights and biases begin as torch's layers do, the former with
      variance 1 / (3 fan-in) (fan-in)
    --tune has neither RMSprop's own two settings nor epsilon in its grid (RMSprop's two); no
      ImageNet

Symbols: h input of a layer, z its output before the activation; c centres and U whitens h, V and d
are trained; W = V U and b = d - W c are the canonical parameters, those of the same layer without
whitening; lambda, E eigenvalues and eigenvectors of h's covariance; T updates between whitenings.
Shapes: N samples, B images of a minibatch, n inputs and m outputs of a layer (channels of a
convolution).
"""

import csv
import gzip
import hashlib
import io
import itertools
import math
import os
import pickle
import signal
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn import datasets
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Method = Literal["sgd", "rmsprop", "batchnorm", "prong", "prong+"]


@dataclass
class Args:
    # The method
    task: Literal["autoencoder", "fisher", "cifar10"] = "autoencoder"  # what is learned
    method: Method = "prong"  # how; sgd, rmsprop and batchnorm are the paper's baselines
    whitening_period: int = 1000  # T, updates between two whitenings; one comes before the first
    whitening_samples: int = 100  # N_s, fresh training images that a whitening looks at
    epsilon: float = 1e-2  # added to the eigenvalues: a direction gains at most 1 / epsilon
    momentum: Literal["reset", "carry"] = "reset"  # velocity at a whitening: forgotten, transformed
    # Optimisation
    total_iterations: int = 20_000  # updates
    batch_size: int = 128  # images of a minibatch
    learning_rate: float = 1e-3  # constant; on cifar10 divided by 10 when validation stalls
    momentum_decay: float = 0.9  # of the velocity; 0: none
    rmsprop_decay: float = 0.99  # of the running squared gradient
    rmsprop_eps: float = 0.1  # added to its root
    tune: bool = False  # 24 runs: learning rates x momentum_decay x batch_size of section 4.2
    # The run
    dataset: Literal["mnist", "digits"] = "mnist"  # digits: scikit-learn's, needs no download
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    report_every: int = 1000  # updates between two reports, each with a checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number
    run_dir: str = ""  # for logs, pictures, checkpoint.pt; default runs/TASK_METHOD__SCRIPT__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


class Whitening(NamedTuple):
    """h -> U (h - c) with the symmetric U = scale (I + E diag(gain) E^T), kept in factors.

    N samples vary in only r <= min(N, n) directions; all others are multiplied by scale. A product
    costs 2 r n instead of n^2.
    """

    c: Tensor  # [n]
    E: Tensor  # [n, r], its columns are orthonormal
    gain: Tensor  # [r]
    scale: Tensor  # []

    def times(self, x: Tensor) -> Tensor:
        """x U for rows x [..., n]."""
        return self.scale * (x + (x @ self.E * self.gain) @ self.E.T)

    def inverse_times(self, x: Tensor) -> Tensor:
        """x U^-1 for rows x [..., n]."""
        return (x + (x @ self.E * (1 / (1 + self.gain) - 1)) @ self.E.T) / self.scale


def estimate_whitening(h: Tensor, epsilon: float) -> tuple[Whitening, Tensor]:
    """U = (Sigma + epsilon)^-1/2 and c from samples h [N, n] (eq. 7), as float64.

    Also the min(N, n) largest eigenvalues lambda of their covariance Sigma. After U the variance
    there is lambda / (lambda + epsilon): directions far below epsilon are scaled, not whitened.
    """
    h = h.double()
    c = h.mean(0)
    _, R = torch.linalg.qr((h - c) / math.sqrt(len(h)), mode="r")  # R^T R is Sigma
    _, deviation, E_T = torch.linalg.svd(R, full_matrices=False)
    lambda_ = deviation.square()
    gain = (epsilon / (lambda_ + epsilon)).sqrt() - 1
    return Whitening(c, E_T.T, gain, h.new_tensor(epsilon**-0.5)), lambda_


def seen_by(W: Tensor, c: Tensor) -> Tensor:
    """W c [m] for a constant input c [n]: a kernel [m, n, k, k] sees it at each of its pixels."""
    return W.reshape(*W.shape[:2], -1).sum(-1) @ c


def to_canonical(V: Tensor, d: Tensor, white: Whitening) -> tuple[Tensor, Tensor]:
    """W = V U, b = d - W c: the same layer without whitening (algorithm 1, line 7, mended)."""
    W = white.times(V.movedim(1, -1)).movedim(-1, 1)
    return W, d - seen_by(W, white.c)


def to_whitened(W: Tensor, b: Tensor, white: Whitening) -> tuple[Tensor, Tensor]:
    """V = W U^-1, d = b + W c: the same layer under another whitening (line 10, mended)."""
    V = white.inverse_times(W.movedim(1, -1)).movedim(-1, 1)
    return V, b + seen_by(W, white.c)


def change_basis(V: Tensor, d: Tensor | None, old: Whitening, new: Whitening) -> None:
    """V, d of the same layer under another whitening, in place. Linear: a velocity moves alike."""
    shift = V.new_zeros(len(V)) if d is None else d
    double = Whitening(*(part.double() for part in old))
    W, b = to_canonical(V.double(), shift.double(), double)
    for ours, moved in zip((V, shift), to_whitened(W, b, new)):
        ours.copy_(moved)


class WhitenedLayer(nn.Module):
    """z = V U (h - c) + d (eq. 6), dense or, with a kernel, a convolution of the same size.

    A convolution is whitened across channels, pixel by pixel, as by a 1x1 convolution before it
    (section 4.3); both are one, with the kernel V U. Methods that do not whiten have no U;
    batchnorm and prong+ normalise z. rank is the number of directions that U can tell apart.
    """

    def __init__(
        self, n: int, m: int, kernel_size: int, method: Method, rank: int, last: bool = False
    ):
        super().__init__()
        normalised = method in ("batchnorm", "prong+") and not last
        layer = nn.Conv2d(n, m, kernel_size) if kernel_size else nn.Linear(n, m)
        norm = nn.BatchNorm2d if kernel_size else nn.BatchNorm1d
        self.normalise = norm(m) if normalised else nn.Identity()
        self.V, self.d = layer.weight, None if normalised else layer.bias  # norm has its own shift
        self.is_whitened = method.startswith("prong")
        if self.is_whitened:  # at first U = I
            r = min(n, rank)
            identity = Whitening(torch.zeros(n), torch.zeros(n, r), torch.zeros(r), torch.ones(()))
            for name, part in identity._asdict().items():
                self.register_buffer(name, part)

    @property
    def white(self) -> Whitening:
        return Whitening(self.c, self.E, self.gain, self.scale)

    def whiten(self, h: Tensor) -> Tensor:
        """U (h - c) of an input [N, n]."""
        return self.white.times(h - self.c) if self.is_whitened else h

    def forward(self, h: Tensor) -> Tensor:
        if self.V.dim() == 2:
            return self.normalise(F.linear(self.whiten(h), self.V, self.d))
        W, b = self.V, self.d
        if self.is_whitened:  # beyond the border h is 0, not c
            W, b = to_canonical(self.V, 0 if self.d is None else self.d, self.white)
        return self.normalise(F.conv2d(h, W, b, padding="same"))


@torch.no_grad()
def layer_inputs(net: nn.Module, x: Tensor) -> dict[WhitenedLayer, Tensor]:
    """Inputs [N, n] of all layers in one pass: whitening one changes no other layer's input."""
    inputs, layers = {}, [layer for layer in net.modules() if isinstance(layer, WhitenedLayer)]

    def keep(layer: WhitenedLayer, given: tuple[Tensor]) -> None:
        inputs[layer] = given[0].movedim(1, -1).flatten(0, -2)  # a pixel is a sample

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    functional_call(net, buffers, x)  # the averages of batch normalisation stay as they are
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def rewhiten(net: nn.Module, x: Tensor, optimizer: torch.optim.SGD, args: Args) -> list[Tensor]:
    """Algorithm 1's outer loop: U, c from samples x, V, d such that the network stays the same.

    Returns the eigenvalues of the covariance of each layer's input.
    """
    if args.momentum == "reset":
        optimizer.state.clear()
    spectra = []
    for layer, h in layer_inputs(net, x).items():
        white, lambda_ = estimate_whitening(h, args.epsilon)
        if layer.d is None:
            white = white._replace(c=torch.zeros_like(white.c))
        change_basis(layer.V, layer.d, layer.white, white)
        if layer.V in optimizer.state:  # its velocity
            of_d = None if layer.d is None else optimizer.state[layer.d]["momentum_buffer"]
            change_basis(optimizer.state[layer.V]["momentum_buffer"], of_d, layer.white, white)
        for old, new in zip(layer.white, white):
            old.zero_()[tuple(map(slice, new.shape))] = new  # fewer samples than rank leave zeros
        spectra.append(lambda_.cpu())
    return spectra


@torch.no_grad()
def input_condition(net: nn.Module, x: Tensor) -> float:
    """Largest eigenvalue over the mean one of U (h - c)'s covariance, in the worst layer.

    1 for a white input. Unlike the condition number it is finite where inputs are constant.
    """
    worst = 0.0
    for layer, h in layer_inputs(net, x).items():
        lambda_ = torch.linalg.eigvalsh(torch.cov(layer.whiten(h).double().T))
        worst = max(worst, (lambda_[-1] / lambda_.mean()).item())
    return worst


@torch.enable_grad()
def fisher_matrix(net: nn.Sequential, layer: WhitenedLayer, x: Tensor) -> Tensor:
    """F = E_x E_(y ~ p(y|x)) [g g^T], g = d log p(y|x) / d(V, d) of one dense layer (eq. 2).

    All classes are weighed with their probability. [m (n+1), m (n+1)], float64.
    """
    kept = {}
    hook = layer.register_forward_hook(lambda _, given, z: kept.update(h=given[0], z=z))
    log_p = net(x).log_softmax(-1)  # [N, classes]
    hook.remove()
    h = layer.whiten(kept["h"]).detach().double()
    h = torch.cat([h, torch.ones_like(h[:, :1])], 1)  # the last belongs to d
    F_ = 0
    for y in range(log_p.shape[1]):
        (delta,) = torch.autograd.grad(log_p[:, y].sum(), kept["z"], retain_graph=True)  # [N, m]
        g = (delta.double()[:, :, None] * h[:, None, :]).flatten(1)
        g = g * (log_p[:, y : y + 1].detach().double() / 2).exp()
        F_ = F_ + g.T @ g / len(x)
    return F_


def condition_number(F_: Tensor) -> float:
    """Largest by smallest eigenvalue of a symmetric matrix; rounding bounds it by about 1e13."""
    lambda_ = torch.linalg.eigvalsh(F_)
    smallest = lambda_[-1] * len(F_) * torch.finfo(F_.dtype).eps
    return (lambda_[-1] / lambda_[0].clamp(min=smallest)).item()


def dense_network(
    widths: Sequence[int], activation: Callable, method: Method, rank: int
) -> nn.Sequential:
    """Whitened layers with the activation between them."""
    layers = []
    for i, (n, m) in enumerate(itertools.pairwise(widths), start=1):
        last = i == len(widths) - 1
        layers += [WhitenedLayer(n, m, 0, method, rank, last)] + [activation()] * (not last)
    return nn.Sequential(*layers)


def autoencoder(method: Method, rank: int) -> nn.Sequential:
    """784-1000-500-250-30 and back, logits of the pixels (section 4.2)."""
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    return dense_network(widths, nn.Sigmoid, method, rank)


def convolutional_network(method: Method) -> nn.Sequential:
    """Eight 3x3 convolutions, pooled after every second; the last scores (section 4.3)."""
    widths, layers = [3, 64, 64, 128, 128, 256, 256, 512, 10], []
    for i, (n, m) in enumerate(itertools.pairwise(widths), start=1):
        layers += [WhitenedLayer(n, m, 3, method, rank=n, last=i == 8)] + [nn.ReLU()] * (i < 8)
        layers += [nn.MaxPool2d(2)] * (i in (2, 4, 6))
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())


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


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR_FOLDER = "cifar-10-batches-py"


def download_cifar10(data_dir: str) -> None:
    """Fetch the archive, check it and unpack its folder."""
    remedy = "Unpack that archive there, or point --data-dir at a folder that has it."
    content = download(CIFAR_URL, Path(data_dir, CIFAR_FOLDER), remedy)
    if hashlib.md5(content).hexdigest() != CIFAR_MD5:
        raise SystemExit(f"{CIFAR_URL} did not send CIFAR-10: its checksum is wrong.")
    unpacked = Path(data_dir, "cifar-10.part")
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(unpacked, filter="data")
        (unpacked / CIFAR_FOLDER).replace(Path(data_dir, CIFAR_FOLDER))
        unpacked.rmdir()
    except OSError as error:
        raise SystemExit(f"{unpacked} cannot be written ({error}): change --data-dir.") from None


def load_cifar10(data_dir: str, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] as bytes and labels [N]; a missing folder is downloaded."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    if not Path(data_dir, CIFAR_FOLDER).exists():
        download_cifar10(data_dir)
    images, labels = [], []
    for name in names:
        path = Path(data_dir, CIFAR_FOLDER, name)
        try:
            batch = pickle.loads(path.read_bytes(), encoding="bytes")
            images.append(batch[b"data"].reshape(-1, 3, 32, 32))
            labels += batch[b"labels"]
        except Exception as error:  # whatever bytes that are no batch make pickle raise
            raise SystemExit(
                f"{path} is missing or damaged ({error!r}); delete its folder to fetch it again."
            ) from None
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels)


def crop(x: Tensor, size: int = 24, random: bool = True) -> Tensor:
    """Crops [B, 3, size, size] of images x, each at a random place and half of them mirrored; or
    from the middle, as they are.
    """
    B, S = len(x), x.shape[-1]
    if not random:
        corner = (S - size) // 2
        return x[:, :, corner : corner + size, corner : corner + size]
    corner = torch.randint(S - size + 1, (2, B, 1)).to(x.device)
    rows, columns = corner + torch.arange(size, device=x.device)  # [B, size] each
    mirrored = (torch.rand(B, 1) < 0.5).to(x.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(B, device=x.device)[:, None, None]
    return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# ---- Evaluation and training --------------------------------------------------------------------


class Task(NamedTuple):
    """What is learned from which images."""

    net: nn.Module
    x: Tensor  # training images
    y: Tensor  # their labels
    prepare: Callable  # (bytes, training) -> the network's input
    loss: Callable  # (output, input, y) -> the mean over a minibatch
    held_out: dict[str, tuple[Tensor, Tensor]]  # images and labels by tag: test, validation


def reconstruction_loss(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the pixels, summed over an image, mean over images."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def classification_loss(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the class, mean over images."""
    return F.cross_entropy(logits, y)


def make_task(args: Args, device: str) -> Task:
    """The network, images and loss of --task."""
    if args.task == "cifar10":
        (x, y), test = load_cifar10(args.data_dir, "train"), load_cifar10(args.data_dir, "test")
        held_out = {"validation": (x[-5000:], y[-5000:]), "test": test}
        x, y = x[:-5000], y[:-5000]
        mean = x.float().mean((0, 2, 3)).to(device)[:, None, None]

        def prepare(x: Tensor, training: bool) -> Tensor:
            return (crop(x, random=training) - mean) / 64  # 64: about the pixels' deviation

        net, loss = convolutional_network(args.method), classification_loss
    else:
        load = {"mnist": partial(load_mnist, args.data_dir), "digits": load_digits}[args.dataset]
        (x, y), test = load("train"), load("t10k")
        held_out, rank = {"test": test}, args.whitening_samples
        if args.task == "autoencoder":
            net, loss, size = autoencoder(args.method, rank), reconstruction_loss, 28
        else:
            net = dense_network([100, 20, 20, 10], nn.Tanh, args.method, rank)
            loss, size = classification_loss, 10

        def prepare(x: Tensor, training: bool) -> Tensor:
            return F.adaptive_avg_pool2d(x / 255, size).flatten(1)

    held_out = {tag: (a.to(device), b.to(device)) for tag, (a, b) in held_out.items()}
    return Task(net.to(device), x.to(device), y.to(device), prepare, loss, held_out)


def probe_fisher(task: Task) -> Tensor:
    """The Fisher matrix of the middle layer on 2,000 training images."""
    return fisher_matrix(task.net, task.net[2], task.prepare(task.x[:2000], False))


@torch.no_grad()
def evaluate(task: Task, args: Args) -> dict[str, float]:
    """Loss and error on the first 10,000 training images and on those held out.

    The error is the squared one, summed over an image's pixels, or the percentage misclassified.
    """
    task.net.eval()
    metrics = {}
    for tag, (x, y) in {"train": (task.x[:10_000], task.y[:10_000]), **task.held_out}.items():
        loss, error = 0.0, 0.0
        parts = list(zip(x.split(1000), y.split(1000)))
        for x_, y_ in tqdm(parts, unit="batch", leave=False, disable=None):
            given = task.prepare(x_, False)
            output = task.net(given)
            loss += task.loss(output, given, y_).item() * len(x_)
            if args.task == "autoencoder":
                error += (output.sigmoid() - given).square().sum().item()
            else:
                error += 100 * (output.argmax(1) != y_).sum().item()
        metrics |= {f"eval/{tag}_loss": loss / len(x), f"eval/{tag}_error": error / len(x)}
    metrics["eval/input_condition"] = input_condition(task.net, task.prepare(task.x[:1000], False))
    if args.task == "fisher":
        metrics["eval/condition"] = condition_number(probe_fisher(task))
    task.net.train()
    return metrics


def make_optimizer(net: nn.Module, args: Args) -> torch.optim.Optimizer:
    """RMSprop, or gradient descent with momentum for all other methods."""
    if args.method == "rmsprop":
        how = dict(alpha=args.rmsprop_decay, eps=args.rmsprop_eps, momentum=args.momentum_decay)
        return torch.optim.RMSprop(net.parameters(), args.learning_rate, **how)
    return torch.optim.SGD(net.parameters(), args.learning_rate, momentum=args.momentum_decay)


def draw(task: Task, count: int) -> tuple[Tensor, Tensor]:
    """Random training images as the network wants them, and their labels."""
    chosen = torch.randint(len(task.x), (count,)).to(task.x.device)
    return task.prepare(task.x[chosen], True), task.y[chosen]


def update(task: Task, optimizer: torch.optim.Optimizer, batch_size: int) -> Tensor:
    """One step on a fresh minibatch; returns its loss."""
    x, y = draw(task, batch_size)
    loss = task.loss(task.net(x), x, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


class Waterfall:
    """Divides the rate by 10 after four errors in a row that are not 1 % better (footnote 4)."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.best, self.waited = optimizer, float("inf"), 0

    def step(self, error: float) -> None:
        if error < 0.99 * self.best:
            self.best, self.waited = error, 0
            return
        self.waited += 1
        if self.waited == 4:
            self.waited = 0
            for group in self.optimizer.param_groups:
                group["lr"] /= 10


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


OF_WHITENING = "whitening_period", "whitening_samples", "epsilon", "momentum"
GRID = {  # section 4.2
    "learning_rate": (0.1, 0.01, 0.001),
    "momentum_decay": (0.0, 0.9),
    "batch_size": (32, 64, 128, 256),
}


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    whitens, normalises = args.method.startswith("prong"), args.method in ("batchnorm", "prong+")
    if args.tune and (args.resume or args.evaluate):
        raise SystemExit(
            "--tune begins 24 runs, or goes on with those in --run-dir: leave --resume and "
            "--evaluate out."
        )
    set_by_grid = [name for name in GRID if getattr(args, name) != getattr(Args, name)]
    if args.tune and set_by_grid:
        flag = set_by_grid[0].replace("_", "-")
        raise SystemExit(f"--tune tries its own values of --{flag}: leave it out.")
    if args.task == "fisher" and normalises:
        raise SystemExit("--task fisher compares sgd, rmsprop and prong, as the paper does.")
    if args.task == "cifar10" and args.dataset != "mnist":
        raise SystemExit("--dataset is for autoencoder and fisher: leave it out.")
    if whitens and np.float32(args.epsilon) == 0:
        raise SystemExit(f"--epsilon must be above 0, not {args.epsilon} (in 32 bits).")
    if whitens and args.whitening_samples < 2:
        raise SystemExit(f"--whitening-samples must be at least 2, not {args.whitening_samples}.")
    if normalises and args.batch_size < 2:
        raise SystemExit(f"--batch-size must be at least 2 to normalise, not {args.batch_size}.")
    how = f"with --method {args.method}"
    for holds, where, names in (  # if it holds, the flags of these names have no effect
        (not whitens, how, OF_WHITENING),
        (args.method != "rmsprop", how, ("rmsprop_decay", "rmsprop_eps")),
    ):
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        if holds and given:
            raise SystemExit(f"--{given[0].replace('_', '-')} has no effect {where}: leave it out.")
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


KEPT = (  # flags that a resumed run has to share with its beginning
    *("seed", "batch_size", "learning_rate", "momentum_decay", "rmsprop_decay", "rmsprop_eps"),
    *("whitening_period", "epsilon", "momentum"),
)


def draw_spectra(spectra: list[Tensor], epsilon: float, path: Path) -> None:
    """Eigenvalues of each layer's input: as they are, and as the whitening leaves them."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True)
    for i, lambda_ in enumerate(spectra, start=1):
        lambda_ = lambda_.numpy()
        axes[0].semilogy(np.maximum(lambda_, 1e-12), label=f"layer {i}")
        axes[1].plot(lambda_ / (lambda_ + epsilon))
    axes[0].set(xlabel="direction", ylabel="variance before", title="input at the first whitening")
    axes[1].set(xlabel="direction", ylabel="variance after", title="whitened")
    axes[0].legend(fontsize=7)
    save_figure(figure, path)


def draw_fisher(matrices: dict[str, Tensor], path: Path) -> None:
    """Absolute entries of Fisher matrices (figure 2); brightest from a fifth of the largest."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(5 * len(matrices), 4.4), squeeze=False)
    for axis, (title, F_) in zip(axes.flat, matrices.items()):
        picture = axis.imshow((F_.abs() / F_.abs().max()).cpu().numpy(), cmap="magma", vmax=0.2)
        axis.set(title=f"{title}, condition {condition_number(F_):.2g}")
        axis.set(xlabel="weight of the middle layer")
    figure.colorbar(picture, ax=axes, label="|entry| / largest")
    save_figure(figure, path)


def draw_curves(run_dir: Path) -> None:
    """The run's losses, errors and condition numbers against updates, from its metrics.csv."""
    path = run_dir / "metrics.csv"
    rows = [row.split(",") for row in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if len(row) == 3]  # the last one may be half written
    tags = ["losses/loss", "eval/test_error", "eval/condition", "eval/input_condition"]
    tags = [tag for tag in tags if any(row[1] == tag for row in rows)]
    if not tags:  # a checkpoint without its run
        return
    figure, axes = plt.subplots(1, len(tags), figsize=(4.2 * len(tags), 3.2), squeeze=False)
    for axis, tag in zip(axes.flat, tags):
        points = [(int(t), float(value)) for t, name, value in rows if name == tag]
        axis.semilogy(*zip(*points), ".-")
        axis.set(xlabel="updates", title=tag)
    save_figure(figure, run_dir / "curves.png")


def draw_reconstructions(task: Task, path: Path) -> None:
    """Test images above what the autoencoder makes of them."""
    x = task.prepare(task.held_out["test"][0][:12], False)  # [n, 784]
    task.net.eval()
    with torch.no_grad():
        rows = torch.stack([x, task.net(x).sigmoid()]).view(2, len(x), 28, 28)
    task.net.train()
    picture = rows.permute(0, 2, 1, 3).reshape(56, len(x) * 28)
    figure, axis = plt.subplots(figsize=(10, 2))
    axis.imshow(picture.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=(14, 42), yticklabels=("test image", "made of it"))
    save_figure(figure, path)


def tune(args: Args) -> dict[str, float]:
    """Train every setting of GRID; tune.csv lists their training losses, the lowest first.

    A folder that holds a part of this grid, with the same flags, is completed.
    """
    run_dir = open_run_dir(args, f"{args.task}_{args.method}_tune", "prong")
    table, losses = run_dir / "tune.pt", {}
    if table.exists():
        same = sorted(vars(args).keys() - {"run_dir", "data_dir", "device"})
        losses = load_checkpoint(table, args, nn.Module(), *same)["losses"]
    for rate, decay, batch_size in tqdm(
        list(itertools.product(*GRID.values())), unit="setting", disable=None
    ):
        name = f"rate_{rate}_momentum_{decay}_batch_{batch_size}"
        if name in losses:
            continue
        setting = dict(learning_rate=rate, momentum_decay=decay, batch_size=batch_size)
        checkpoint, where = run_dir / name / "checkpoint.pt", {"run_dir": str(run_dir / name)}
        if checkpoint.exists():
            try:
                ended = torch.load(checkpoint, map_location="cpu")["t"] == args.total_iterations
            except Exception as error:  # whatever a damaged file makes torch.load raise
                kind = type(error).__name__
                raise SystemExit(f"{checkpoint} is damaged ({kind}): delete its folder.") from None
            where = {"run_dir": "", "evaluate" if ended else "resume": str(checkpoint)}
        try:
            losses[name] = main(replace(args, tune=False, **where, **setting))["eval/train_loss"]
        except Diverged:
            losses[name] = math.inf
        except SystemExit as stop:
            if not str(stop).startswith("Stopped"):
                raise
            raise SystemExit(
                f"Stopped; go on with the same flags and --run-dir {run_dir}"
            ) from None
        save_checkpoint(table, net={}, losses=losses, args=asdict(args))
        with open(run_dir / "tune.csv", "w", newline="") as file:
            csv.writer(file).writerows(sorted(losses.items(), key=lambda item: item[1]))
    best = min(losses, key=losses.get)
    tqdm.write(f"The best of {len(losses)}: {best}")
    return {"eval/train_loss": losses[best]}


def run(args: Args, device: str) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.backends.cudnn.allow_tf32 = False  # whitening wants all 24 bits
    torch.manual_seed(args.seed)
    task = make_task(args, device)
    torch.manual_seed(args.seed)  # so all methods get the same minibatches
    net, optimizer = task.net, make_optimizer(task.net, args)
    waterfall = Waterfall(optimizer)
    whitens = args.method.startswith("prong")
    shaping = ["task", "method"] + ["dataset"] * (args.task != "cifar10")
    shaping += ["whitening_samples"] * whitens
    t, seconds, whitening_seconds, finished = 0, 0.0, 0.0, False

    def draw_pictures(folder: Path) -> None:
        draw_curves(folder)
        if args.task == "autoencoder":
            draw_reconstructions(task, folder / "reconstructions.png")

    if args.evaluate:
        load_checkpoint(Path(args.evaluate), args, net, *shaping)
        draw_pictures(Path(args.evaluate).parent)
        return evaluate(task, args)
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, net, *shaping, *KEPT)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        waterfall.best, waterfall.waited = checkpoint["waterfall"]
        seconds, whitening_seconds = checkpoint["seconds"], checkpoint["whitening_seconds"]
        t = checkpoint["t"]
        if t >= args.total_iterations:
            raise SystemExit(f"{args.resume} is at update {t}: raise --total-iterations.")

    run_dir = open_run_dir(args, f"{args.task}_{args.method}", "prong")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    matrices, spectra, losses = {}, [], []
    bar = tqdm(total=args.total_iterations, initial=t, unit="update", disable=None)
    try:
        if args.task == "fisher" and t == 0:
            matrices["at the start"] = probe_fisher(task)
            report(writer, 0, {"eval/condition": condition_number(matrices["at the start"])})
        start = time.perf_counter()
        while t < args.total_iterations:
            if whitens and t % args.whitening_period == 0:
                began = time.perf_counter()
                with torch.random.fork_rng(devices=[]):  # the minibatches stay what they were
                    torch.manual_seed(1_000_003 * args.seed + t)  # other samples every time
                    x, _ = draw(task, args.whitening_samples)
                found = rewhiten(net, x, optimizer, args)
                whitening_seconds += time.perf_counter() - began
                spectra = found if t == 0 else spectra  # those of the first whitening
                if matrices and "whitened" not in matrices:
                    began = time.perf_counter()
                    matrices["whitened"] = probe_fisher(task)
                    start += time.perf_counter() - began  # measuring is not training
            losses.append(update(task, optimizer, args.batch_size))
            t += 1
            refuse_infinity(losses[-1].item(), f"at update {t}")
            bar.update()
            validates = args.task == "cifar10" and t % 1000 == 0
            if not (t % args.report_every == 0 or t == args.total_iterations or validates):
                continue

            took = time.perf_counter() - start
            seconds += took
            metrics = {"losses/loss": torch.stack(losses).mean().item()}
            metrics["charts/SPS"] = len(losses) * args.batch_size / took  # images per second
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/minutes"] = seconds / 60  # of training alone
            if whitens:
                metrics["charts/whitening_share"] = 100 * whitening_seconds / seconds  # percent
            metrics |= evaluate(task, args)
            refuse_infinity(metrics["eval/train_loss"], f"after update {t}")
            if validates:
                waterfall.step(metrics["eval/validation_error"])
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "t": t}
            state |= {"rng": torch.get_rng_state(), "waterfall": (waterfall.best, waterfall.waited)}
            state |= {"seconds": seconds, "whitening_seconds": whitening_seconds}
            save_checkpoint(run_dir / "checkpoint.pt", args=asdict(args), **state)
            finished = t == args.total_iterations
            report(writer, t, metrics)
            losses, start = [], time.perf_counter()
    except KeyboardInterrupt:
        raise stopped(run_dir, finished) from None
    except torch.linalg.LinAlgError:  # of a matrix that holds infinities
        refuse_infinity(math.nan, f"after update {t}")
    finally:
        writer.close()
        bar.close()
    draw_pictures(run_dir)
    if spectra:
        draw_spectra(spectra, args.epsilon, run_dir / "spectra.png")
    if matrices:
        draw_fisher(matrices | {"at the end": probe_fisher(task)}, run_dir / "fisher.png")
    return metrics


def main(args: Args) -> dict[str, float]:
    check(args)
    check_flags(args)
    device = choose_device(args.device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        return tune(args) if args.tune else run(args, device)
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
