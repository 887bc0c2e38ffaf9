"""Bayes by Backprop: a network whose every weight is a Gaussian, trained by gradient descent.

    Paper    Blundell et al., "Weight uncertainty in neural networks", ICML 2015
    Shows    weights with uncertainty regularise (table 1), say where they do not know (figure 5),
               and explore (figure 6)
    Run      python bayes_by_backprop.py
    Result   1.47 % test error (seeds 1 to 3: 1.36 to 1.53; dropout 1.41, a plain network 1.51) in
               15 to 19 min on one core of an AMD EPYC, beside other runs; paper: 1.36 after 600
               epochs (1.51, 1.83)
    Run      python bayes_by_backprop.py --task regression --prior gaussian --prior-sigma-1 1
               --kl-weighting uniform --rho-init -3 --samples 5 --learning-rate 5e-3 --epochs 1000
    Result   16 to 24 times wider quartiles beyond the data than inside (seeds 1 to 3; a plain
               network 1) in 38 to 50 s on one core of an AMD EPYC; paper: a drawing (figure 5)
    Run      python bayes_by_backprop.py --task bandit --prior gaussian --prior-sigma-1 0.368
               --kl-weighting uniform --rho-init -3
    Result   regret 6,575 after 50,000 mushrooms (seed 1), growing by 80 each 1,000 at the end, in
               54 min on one core of the same, beside another run; paper: 5,700

Departures: ours (the paper's)
    Adam, 1e-3, on mnist 4 % less after each of 100 epochs, batch 128, for all three methods (SGD
      1e-3 to 1e-5, searched for each; 600 epochs); seeds 1 to 3, the bandit's 1 (5 runs)
    mnist: rho starts at -4 (not told); prior pi 1/4, -log sigma_1 = 0, -log sigma_2 = 1 (searched,
      the choice not told, the second among 6, 7, 8); 400 units, also of the pruned network (1200)
    regression and bandit, by the flags of their Run lines: rho starts at -3, a single Gaussian as
      prior, KL / M in each of M minibatches; regression's rate is 5e-3, its cost the mean of five
      samples, with 1,000 epochs (not told). The constant of their likelihood is left out
    means begin within 1 / sqrt(n) of 0 for n inputs (not told); one sample a minibatch on mnist (1,
      2, 5 or 10, searched)
    the step descends the cost of a minibatch divided by --batch-size (mean or sum not told)
    dropout: half of the hidden units, a fifth of the pixels (after Hinton et al., not told)
    regression: 2 x 100 units, 1,000 points, noise 0.02 a deviation, x in [0, 0.5]; the likelihood's
      deviation is 0.1, as the curve's slope makes up to 0.13 of the noise (not told); quartiles
      include it, so a plain network's band is equally wide everywhere; beyond the data is from 0.75
      to 1.25
    bandit: the mean of a Gaussian of deviation 1 is learned by Adam, 1e-5; an unfilled buffer
      counts as a full one, its interactions repeated (not told)
    the network is chosen by the validation error of the mean weights (by which is not told)
    a prediction averages 10 networks drawn, in regression 200, in its drawing 500 (not told)

Symbols: w weights and biases as one vector, q(w) = N(mu, sigma^2) with sigma = log(1 + e^rho) their
posterior, P(w) their prior, eps unit noise, M minibatches of an epoch, pi_i share of the KL in the
i-th.
Shapes: W weights, B examples, S samples of w.
"""

import csv
import ctypes
import gzip
import hashlib
import math
import os
import signal
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial, reduce
from http.client import HTTPException
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # The method
    task: Literal["mnist", "regression", "bandit"] = "mnist"  # which of the paper's experiments
    method: Literal["bbb", "sgd", "dropout"] = "bbb"  # mnist: sgd is a plain network
    agent: Literal["bbb", "greedy", "greedy-1", "greedy-5"] = "bbb"  # bandit; 0, 1, 5 % at random
    hidden_units: int = 0  # of each of the two hidden layers; 0: 400 on mnist, else 100
    samples: int = 1  # of the weights in the cost of a minibatch
    prior: Literal["mixture", "gaussian"] = "mixture"  # scale mixture, or its first part alone
    prior_pi: float = 0.25  # weight of the first, wide part
    prior_sigma_1: float = 1.0  # its deviation
    prior_sigma_2: float = 0.368  # that of the narrow part (paper: e^-6, e^-7 or e^-8)
    rho_init: float = -4.0  # of every rho: deviations begin at log(1 + e^rho)
    kl_weighting: Literal["blundell", "uniform"] = "blundell"  # pi_i: 2^(M-i) / (2^M - 1) or 1/M
    noise_std: float = 0.0  # of the Gaussian likelihood; 0: 0.1 in regression, 1 in the bandit
    # Optimisation
    epochs: int = 100  # passes over the training set (paper: 600; regression: over 1,000 points)
    interactions: int = 50_000  # bandit: mushrooms met
    batch_size: int = 128  # examples of a minibatch (bandit: always 64)
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd: the paper's, with --sgd-momentum
    learning_rate: float = 0.0  # in the first epoch; 0: 1e-3, in the bandit 1e-5
    learning_rate_decay: float = 0.96  # mnist: factor on --learning-rate after each epoch
    sgd_momentum: float = 0.0  # of --optimizer sgd
    # The run
    dataset: Literal["mnist", "digits"] = "mnist"  # digits: scikit-learn's, needs no download
    bandit_data: Literal["mushroom", "breast-cancer"] = "mushroom"  # the second: in scikit-learn
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    eval_samples: int = 10  # networks drawn from the posterior, their probabilities averaged
    report_every: int = 1000  # bandit: mushrooms between two reports, each with a checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number
    run_dir: str = ""  # for logs, pictures, checkpoint.pt; default runs/TASK_METHOD__SCRIPT__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


class Prior(NamedTuple):
    """P(w_j) = pi N(0, sigma_1^2) + (1 - pi) N(0, sigma_2^2) of every weight (eq. 7).

    With sigma_1 = sigma_2 it is a single Gaussian.
    """

    pi: float
    sigma_1: float
    sigma_2: float

    def log_odds(self, w: Tensor) -> Tensor:
        """log of the first part's density over the second's, each with its weight."""
        slope = (self.sigma_2**-2 - self.sigma_1**-2) / 2
        at_0 = math.log(self.pi / (1 - self.pi) * self.sigma_2 / self.sigma_1)
        return torch.addcmul(w.new_full((), at_0), w, w, value=slope)

    def log_density(self, w: Tensor) -> Tensor:
        """log P(w_j) of each weight: log(a + b) = log a + log(1 + b / a), never the log of 0."""
        log_a = math.log(self.pi / self.sigma_1) - math.log(2 * math.pi) / 2  # a at w = 0
        log_1_b_a = F.softplus(self.log_odds(w).neg_())
        return log_1_b_a.addcmul_(w, w, value=-0.5 / self.sigma_1**2).add_(log_a)

    def score(self, w: Tensor) -> Tensor:
        """d log P(w_j) / d w_j, the parts weighed by their responsibilities."""
        wide, narrow = self.sigma_1**-2, self.sigma_2**-2  # precisions
        first = self.log_odds(w).sigmoid_()  # responsibility of the wide part
        return first.mul_(narrow - wide).sub_(narrow).mul_(w)


def log_q(eps: Tensor, sigma: Tensor) -> Tensor:
    """log q(w_j) of w = mu + sigma eps."""
    return eps.square().mul_(-0.5).sub_(sigma.log()).sub_(math.log(2 * math.pi) / 2)


class SampledWeights(torch.autograd.Function):
    """w = mu + sigma eps and its log q(w) - log P(w), with the gradients of section 3.2 by hand.

    In the gradient of mu, log q adds -eps / sigma through w and +eps / sigma through its mean: they
    cancel. Of log q only -1 / sigma remains, in the gradient of rho. In place: W is in the
    millions, and fresh memory costs more than the arithmetic. The value of the second output costs
    a third of a step, and its gradient does not need it: without valued it is 0.
    """

    @staticmethod
    def forward(ctx, mu: Tensor, rho: Tensor, eps: Tensor, prior: Prior, valued: bool):
        sigma = F.softplus(rho)
        w = torch.addcmul(mu, sigma, eps)
        ctx.prior = prior
        ctx.save_for_backward(w, rho, sigma, eps)
        if not valued:
            return w, w.new_zeros(())
        return w, log_q(eps, sigma).sub_(prior.log_density(w)).sum()

    @staticmethod
    def backward(ctx, d_w: Tensor, d_kl: Tensor):
        w, rho, sigma, eps = ctx.saved_tensors
        score = ctx.prior.score(w)
        d_mu = torch.addcmul(d_w, score, d_kl, value=-1, out=score)
        d_rho = (d_mu * eps).addcdiv_(d_kl, sigma, value=-1).mul_(rho.sigmoid())
        return d_mu, d_rho, None, None, None


class WeightPosterior(nn.Module):
    """q(w), a Gaussian for each weight and bias of a network of the given layer sizes."""

    def __init__(self, sizes: Sequence[int], rho_init: float):
        super().__init__()
        self.mu = nn.Parameter(initial_weights(sizes))
        self.rho = nn.Parameter(torch.full_like(self.mu, rho_init))
        self.register_buffer("kept", torch.ones_like(self.mu, dtype=torch.bool))

    def sample(self, prior: Prior, valued: bool = True) -> tuple[Tensor, Tensor]:
        """w [W] and log q(w) - log P(w), for training; nothing is pruned yet."""
        return SampledWeights.apply(self.mu, self.rho, torch.randn_like(self.mu), prior, valued)

    @torch.no_grad()
    def draw(self) -> Tensor:
        """w [W] for prediction; a pruned weight is 0 and has no noise."""
        w = torch.addcmul(self.mu, F.softplus(self.rho), torch.randn_like(self.mu))
        return w * self.kept

    @torch.no_grad()
    def mean(self) -> Tensor:
        return self.mu * self.kept

    @torch.no_grad()
    def signal_to_noise(self) -> Tensor:
        """|mu| / sigma of each weight (section 5.1)."""
        return self.mu.abs() / F.softplus(self.rho)

    @torch.no_grad()
    def prune(self, fraction: float) -> None:
        """Remove the weights of lowest signal to noise."""
        order = self.signal_to_noise().argsort()
        self.kept.fill_(True)
        self.kept[order[: round(fraction * len(order))]] = False


class PointEstimate(nn.Module):
    """The weights of an ordinary network, with the interface of a posterior."""

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        self.w = nn.Parameter(initial_weights(sizes))

    def sample(self, prior: Prior, valued: bool = True) -> tuple[Tensor, Tensor]:
        return self.w, torch.zeros((), device=self.w.device)

    def draw(self) -> Tensor:
        return self.w.detach()

    mean = draw


def initial_weights(sizes: Sequence[int]) -> Tensor:
    """Uniform in +-1 / sqrt(n) for a layer of n inputs, as torch does; layer by layer, W then b."""
    layers = [torch.empty(m * (n + 1)).uniform_(-1, 1) / math.sqrt(n) for n, m in pairwise(sizes)]
    return torch.cat(layers)


def network(
    x: Tensor, w: Tensor, sizes: Sequence[int], dropout: Sequence[float] = (0.0, 0.0)
) -> Tensor:
    """Outputs [B, m] of the rectifier network with weights w [W]; dropout of inputs, of units."""
    parts = w.split([size for n, m in pairwise(sizes) for size in (m * n, m)])
    x = F.dropout(x, dropout[0]) if dropout[0] else x
    for i, (n, m) in enumerate(pairwise(sizes)):
        x = F.linear(x, parts[2 * i].view(m, n), parts[2 * i + 1])
        if i < len(sizes) - 2:
            x = x.relu_()
            x = F.dropout(x, dropout[1]) if dropout[1] else x
    return x


def kl_weight(i: int, M: int, kl_weighting: str) -> float:
    """pi_i of minibatch i = 1 ... M; they sum to 1 (section 3.4).

    2^(M-i) / (2^M - 1) is 2^-i / (1 - 2^-M), which does not overflow.
    """
    return 1 / M if kl_weighting == "uniform" else 2.0**-i / (1 - 2.0**-M)


def minibatch_cost(
    weights: nn.Module,
    negative_log_likelihood: Callable[[Tensor], Tensor],
    pi_i: float | Tensor,
    prior: Prior,
    samples: int,
    valued: bool = True,
) -> tuple[Tensor, Tensor]:
    """pi_i KL - log P(D_i|w), the same w in all three terms, mean over samples (eq. 2 and 9).

    negative_log_likelihood(w) sums over the examples of the minibatch, so that the costs of an
    epoch sum to the free energy of the whole training set. Returns both terms; unless valued, the
    first has a gradient but no value.
    """
    drawn = [weights.sample(prior, valued) for _ in range(samples)]
    kl = reduce(add, [kl_of_w * (pi_i / samples) for _, kl_of_w in drawn])
    return kl, reduce(add, [negative_log_likelihood(w) / samples for w, _ in drawn])


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


MUSHROOM_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/mushroom/"
MUSHROOM_MD5 = "08abc775ae2a79b402cc75f3a29e4b7d"


def load_mushrooms(data_dir: str) -> tuple[Tensor, Tensor]:
    """Contexts [8124, 117], one-hot, and whether each mushroom is edible; downloaded if missing."""
    path = Path(data_dir, "mushroom", "agaricus-lepiota.data")
    if not os.path.exists(path):
        remedy = "Put it there, or use --bandit-data breast-cancer."
        content = download(MUSHROOM_URL + path.name, path, remedy)
        if hashlib.md5(content).hexdigest() != MUSHROOM_MD5:
            raise SystemExit(f"{MUSHROOM_URL} did not send the mushrooms: its checksum is wrong.")
        write_whole(path, content)
    try:
        rows = [line.split(",") for line in path.read_text(errors="replace").split()]
    except OSError as error:
        raise SystemExit(f"{path} cannot be read ({error}).") from None
    if {len(row) for row in rows} != {23}:
        raise SystemExit(f"{path} is damaged (not 23 columns); delete it to fetch it again.")
    columns = [np.array(column) for column in zip(*rows)]
    one_hot = [column == value for column in columns[1:] for value in sorted(set(column))]
    return torch.tensor(np.stack(one_hot, 1), dtype=torch.float32), torch.tensor(columns[0] == "e")


def load_breast_cancer() -> tuple[Tensor, Tensor]:
    """Standardised contexts [569, 30] and whether each is benign, to be eaten like a mushroom."""
    data = datasets.load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(data.target == 1)


def make_curve(N: int) -> tuple[Tensor, Tensor]:
    """x [N, 1] in [0, 0.5] and the noisy curve y [N, 1] over it (section 5.2)."""
    x, noise = torch.rand(N, 1) / 2, 0.02 * torch.randn(N, 1)
    waves = torch.sin(2 * math.pi * (x + noise)) + torch.sin(4 * math.pi * (x + noise))
    return x, x + 0.3 * waves + noise


# ---- Evaluation and training --------------------------------------------------------------------


@torch.no_grad()
def class_probabilities(
    weights: nn.Module, x: Tensor, sizes: Sequence[int], samples: int
) -> Tensor:
    """[B, 10]; arithmetic mean over networks drawn from the posterior; 0 samples: of its mean."""
    if samples == 0:
        return network(x, weights.mean(), sizes).softmax(1)
    return sum(network(x, weights.draw(), sizes).softmax(1) for _ in range(samples)) / samples


def error_rate(p: Tensor, y: Tensor) -> float:
    """Percent."""
    return 100 * (p.argmax(1) != y).float().mean().item()


PRUNED = (0.0, 0.5, 0.75, 0.95, 0.98)  # table 2


@torch.no_grad()
def evaluate(
    weights: nn.Module, sizes: Sequence[int], test: tuple[Tensor, Tensor], args: Args
) -> dict[str, float]:
    """Test errors in percent: of networks drawn, their probabilities averaged, and of the mean."""
    x, y = test
    metrics = {}
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        for tag, samples in (("error", args.eval_samples), ("error_of_mean", 0)):
            p = class_probabilities(weights, x, sizes, samples)
            metrics[f"eval/{tag}"] = error_rate(p, y)
    return metrics


def evaluate_pruned(
    weights: WeightPosterior, sizes: Sequence[int], test: tuple[Tensor, Tensor], args: Args
) -> dict[str, float]:
    """The same errors with the given percentages of weights removed (table 2)."""
    metrics = {}
    for fraction in PRUNED:
        weights.prune(fraction)
        for tag, error in evaluate(weights, sizes, test, args).items():
            metrics[f"{tag}_pruned_{100 * fraction:g}"] = error
    weights.prune(0.0)
    return metrics


def make_prior(args: Args) -> Prior:
    """The mixture, or its first part alone."""
    sigma_2 = args.prior_sigma_2 if args.prior == "mixture" else args.prior_sigma_1
    return Prior(args.prior_pi, args.prior_sigma_1, sigma_2)


def learning_rate_at(epoch: int, args: Args) -> float:
    """Smaller after each epoch, counted from 1."""
    first = args.learning_rate or (1e-5 if args.task == "bandit" else 1e-3)
    return first * args.learning_rate_decay ** (epoch - 1)


def make_optimizer(weights: nn.Module, args: Args) -> torch.optim.Optimizer:
    """Adam, or gradient descent with momentum, at the rate of the first epoch."""
    theta, rate = weights.parameters(), learning_rate_at(1, args)
    if args.optimizer == "adam":
        return torch.optim.Adam(theta, rate, fused=True)
    return torch.optim.SGD(theta, rate, momentum=args.sgd_momentum, fused=True)


def update(
    weights: nn.Module,
    optimizer: torch.optim.Optimizer,
    negative_log_likelihood: Callable[[Tensor], Tensor],
    pi_i: float | Tensor,
    batch_size: int,
    prior: Prior,
    samples: int,
) -> Tensor:
    """One step on a minibatch's cost divided by batch_size; returns the cost's error term."""
    optimizer.zero_grad()
    kl, error = minibatch_cost(weights, negative_log_likelihood, pi_i, prior, samples, valued=False)
    ((kl + error) / batch_size).backward()
    optimizer.step()
    return error.detach()


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


def keep_memory() -> None:
    """Have glibc keep freed memory, which the system would otherwise clear anew in every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # other C libraries have none
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


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


OF_POSTERIORS = "samples", "prior", "prior_pi", "prior_sigma_1", "prior_sigma_2", "rho_init"
OF_POSTERIORS += ("kl_weighting",)
OF_BANDITS = "interactions", "report_every", "bandit_data"


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    wide, narrow = args.prior_sigma_1, args.prior_sigma_2
    if not 0 < args.prior_pi < 1:
        raise SystemExit(f"--prior-pi must lie between 0 and 1, not at {args.prior_pi}.")
    if wide <= 1e-9:
        raise SystemExit(f"--prior-sigma-1 must be above 1e-9, not {wide}.")
    if args.prior == "mixture" and not 1e-9 < narrow <= wide:
        raise SystemExit(
            f"--prior-sigma-2 must be above 1e-9 and at most --prior-sigma-1, {wide}, not {narrow}."
        )
    if args.task != "mnist" and args.method != "bbb":
        raise SystemExit("--method is for --task mnist: leave it out; the bandit has --agent.")
    if args.task != "bandit" and args.agent != "bbb":
        raise SystemExit("--agent is for --task bandit: leave it out.")
    if args.task != "mnist" and args.dataset != "mnist":
        raise SystemExit(
            "--dataset is for --task mnist: leave it out; the bandit has --bandit-data."
        )
    if args.optimizer == "adam" and args.sgd_momentum:
        raise SystemExit("--sgd-momentum is for --optimizer sgd: leave it out.")
    if args.task == "bandit" and args.device == "cuda":
        raise SystemExit("--task bandit runs on one core: leave --device out.")
    mnist, bandit = args.task == "mnist", args.task == "bandit"
    for holds, where, names in (  # if it holds, the flags of these names have no effect
        (args.method != "bbb", f"with --method {args.method}", OF_POSTERIORS),
        (args.agent != "bbb", f"with --agent {args.agent}", OF_POSTERIORS),
        (args.prior == "gaussian", "with --prior gaussian", ("prior_pi", "prior_sigma_2")),
        (mnist, "on mnist", ("noise_std",)),
        (not mnist, f"on --task {args.task}", ("learning_rate_decay",)),
        (args.task == "regression", "in regression", ("eval_samples",)),
        (bandit, "in the bandit", ("epochs", "batch_size")),
        (not bandit, "outside the bandit", OF_BANDITS),
    ):
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        if holds and given:
            raise SystemExit(f"--{given[0].replace('_', '-')} has no effect {where}: leave it out.")
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


KEPT = (  # flags that a resumed run has to share with its beginning
    *("seed", "batch_size", "optimizer", "learning_rate", "learning_rate_decay", "sgd_momentum"),
    *("samples", "prior", "prior_pi", "prior_sigma_1", "prior_sigma_2", "kl_weighting"),
    *("noise_std", "report_every"),
)


def draw_weights(weights: nn.Module, path: Path) -> None:
    """Densities of the weights and, where there is noise, of signal to noise (figures 3 and 4)."""
    bayesian = isinstance(weights, WeightPosterior)
    figure, axes = plt.subplots(1, 1 + bayesian, figsize=(5 + 5 * bayesian, 3.4), squeeze=False)
    axes[0, 0].hist(weights.draw().cpu().numpy(), bins=200, range=(-0.2, 0.2), density=True)
    axes[0, 0].set(xlabel="weight, one sample" if bayesian else "weight", ylabel="density")
    if bayesian:
        snr = weights.signal_to_noise().clamp(min=1e-6).log10().cpu().numpy()
        axes[0, 1].hist(snr, bins=200, range=(-4, 2), density=True)
        for height, fraction in zip((0.9, 0.8, 0.7), PRUNED[2:]):
            at = np.quantile(snr, fraction)
            axes[0, 1].axvline(at, color="black", lw=0.8)
            where = axes[0, 1].get_xaxis_transform()  # x in data, height in the panel's
            axes[0, 1].text(at, height, f" {100 * fraction:g} %", transform=where)
        axes[0, 1].set(xlabel="log10 |mu| / sigma", ylabel="density")
    save_figure(figure, path)


def draw_pruning(metrics: dict[str, float], path: Path) -> None:
    """Test error against the share of weights removed (table 2)."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    percent = [100 * fraction for fraction in PRUNED]
    for label, tag in (("networks drawn", "eval/error"), ("mean", "eval/error_of_mean")):
        errors = [metrics[f"{tag}_pruned_{removed:g}"] for removed in percent]
        axis.plot(percent, errors, "o-", label=label)
    axis.set(xlabel="weights removed, %", ylabel="test error, %", yscale="log", ylim=(1, 100))
    axis.set_yticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
    axis.legend()
    save_figure(figure, path)


def open_writer(args: Args, task: str) -> SummaryWriter:
    """What writes into the folder of this run, its flags first."""
    writer = SummaryWriter(open_run_dir(args, task, "bayes_by_backprop"))
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    return writer


def run_mnist(args: Args, device: str) -> dict[str, float]:
    """Section 5.1: the model of the lowest validation error is tested."""
    load = {"mnist": partial(load_mnist, args.data_dir), "digits": load_digits}[args.dataset]
    (x, y), (x_test, y_test) = ([part.to(device) for part in load(s)] for s in ("train", "t10k"))
    x, x_test = x.flatten(1) / 126, x_test.flatten(1) / 126
    held_out = len(x) // 6  # 10,000 of 60,000
    x_validation, y_validation = x[-held_out:], y[-held_out:]
    x, y = x[:-held_out], y[:-held_out]

    width = args.hidden_units or 400
    sizes = (784, width, width, 10)
    bayesian = args.method == "bbb"
    weights = WeightPosterior(sizes, args.rho_init) if bayesian else PointEstimate(sizes)
    weights.to(device)
    dropout = (0.2, 0.5) if args.method == "dropout" else (0.0, 0.0)
    optimizer, prior = make_optimizer(weights, args), make_prior(args)
    best = {"error": float("inf"), "epoch": 0, "net": weights.state_dict()}
    shaping = ("task", "method", "dataset", "hidden_units")
    first_epoch, seconds = 1, 0.0

    def conclude(folder: Path) -> dict[str, float]:
        """Prunes and draws the weights as they are at the end, then tests those chosen."""
        draw_weights(weights, folder / "weights.png")
        metrics = {}
        if bayesian:
            metrics = evaluate_pruned(weights, sizes, (x_test, y_test), args)
            draw_pruning(metrics, folder / "pruning.png")
        weights.load_state_dict(best["net"])
        metrics["charts/chosen_epoch"] = best["epoch"]
        return metrics | evaluate(weights, sizes, (x_test, y_test), args)

    if args.evaluate:
        best = load_checkpoint(Path(args.evaluate), args, weights, *shaping)["best"]
        return conclude(Path(args.evaluate).parent)
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, weights, *shaping, *KEPT)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.manual_seed(args.seed + checkpoint["epoch"])  # a GPU goes on with other draws
        best, seconds = checkpoint["best"], checkpoint["seconds"]
        first_epoch = checkpoint["epoch"] + 1
        if first_epoch > args.epochs:
            raise SystemExit(f"{args.resume} has had {first_epoch - 1} epochs: raise --epochs.")

    def learn(batch: Tensor, pi_i: Tensor) -> Tensor:
        """One update from the chosen images; the error term of its cost."""

        def negative_log_likelihood(w: Tensor) -> Tensor:
            logits = network(x[batch], w, sizes, dropout)
            return F.cross_entropy(logits, y[batch], reduction="sum")

        how = pi_i, args.batch_size, prior, args.samples
        return update(weights, optimizer, negative_log_likelihood, *how)

    writer, finished = open_writer(args, f"{args.task}_{args.method}"), False
    try:
        for epoch in tqdm(range(first_epoch, args.epochs + 1), unit="epoch", disable=None):
            start, errors = time.perf_counter(), []
            learning_rate = learning_rate_at(epoch, args)
            optimizer.param_groups[0] |= {"lr": learning_rate, "capturable": device == "cuda"}
            batches = torch.randperm(len(x)).to(device).split(args.batch_size)
            M = len(batches)
            pi = [kl_weight(i, M, args.kl_weighting) for i in range(1, M + 1)]
            shares = torch.tensor(pi, dtype=torch.float64, device=device)
            for error in learn_from(zip(batches, shares), learn):
                refuse_infinity(error.item(), f"in step {len(errors) + 1} of epoch {epoch}")
                errors.append(error)
            kl, error = weights.sample(prior)[1].item(), torch.stack(errors).sum().item()
            refuse_infinity(weights.mean().sum().item(), f"at the end of epoch {epoch}")
            took = time.perf_counter() - start
            seconds += took

            metrics = {"losses/free_energy": kl + error, "losses/kl": kl, "losses/error": error}
            metrics["charts/SPS"] = len(x) / took  # images per second
            metrics["charts/learning_rate"] = learning_rate
            metrics["charts/minutes"] = seconds / 60  # of training alone
            for tag, examples in (
                ("validation", (x_validation, y_validation)),
                ("test", (x_test, y_test)),
            ):
                p = class_probabilities(weights, examples[0], sizes, 0)
                metrics[f"{tag}/error_of_mean"] = error_rate(p, examples[1])
            if metrics["validation/error_of_mean"] < best["error"]:
                copied = {name: value.clone() for name, value in weights.state_dict().items()}
                best = {"error": metrics["validation/error_of_mean"], "epoch": epoch, "net": copied}
            state = {"net": weights.state_dict(), "optimizer": optimizer.state_dict(), "best": best}
            state |= {"rng": torch.get_rng_state(), "seconds": seconds, "args": asdict(args)}
            save_checkpoint(Path(writer.log_dir, "checkpoint.pt"), epoch=epoch, **state)
            finished = epoch == args.epochs
            if finished:
                metrics |= conclude(Path(writer.log_dir))
            report(writer, epoch, metrics)
    except KeyboardInterrupt:
        raise stopped(writer.log_dir, finished) from None
    finally:
        writer.close()
    return metrics


@torch.no_grad()
def predictive_quartiles(
    weights: nn.Module, x: Tensor, sizes: Sequence[int], noise_std: float, samples: int
) -> Tensor:
    """[3, N] quartiles of y at x [N, 1], of networks drawn and of the noise."""
    means = torch.stack([network(x, weights.draw(), sizes)[:, 0] for _ in range(samples)])
    y = means + noise_std * torch.randn_like(means)
    return y.quantile(torch.tensor([0.25, 0.5, 0.75], device=x.device), dim=0)


def draw_regression(
    both: dict[str, nn.Module],
    data: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    std: float,
    path: Path,
) -> None:
    """Median and quartiles inside and outside the data (figure 5)."""
    x = torch.linspace(-0.25, 1.25, 300)[:, None]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, (title, weights) in zip(axes, both.items()):
        low, median, high = predictive_quartiles(weights.cpu(), x, sizes, std, 500).numpy()
        axis.plot(*(part[:200].cpu().numpy() for part in data), "x", ms=3, color="gray")
        axis.fill_between(x[:, 0].numpy(), low, high, alpha=0.3)
        axis.plot(x[:, 0].numpy(), median, color="tab:red")
        axis.set(title=title, xlabel="x", ylim=(-0.5, 1.3))
    axes[0].set(ylabel="y: median and quartiles")
    save_figure(figure, path)


def run_regression(args: Args, device: str) -> dict[str, float]:
    """Section 5.2: Bayes by Backprop and a plain network on the same minibatches."""
    x, y = (part.to(device) for part in make_curve(1000))
    width, std = args.hidden_units or 100, args.noise_std or 0.1
    sizes = (1, width, width, 1)
    both = nn.ModuleDict(
        {"Bayes by Backprop": WeightPosterior(sizes, args.rho_init), "plain": PointEstimate(sizes)}
    ).to(device)
    optimizers, prior = [make_optimizer(net, args) for net in both.values()], make_prior(args)
    shaping, first_epoch, seconds, finished = ("task", "hidden_units"), 1, 0.0, False

    def measure() -> dict[str, float]:
        """Width of the band inside and outside of the data, error of the median inside."""
        metrics = {}
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            for name, weights in (("bbb", both["Bayes by Backprop"]), ("plain", both["plain"])):
                for where, low in (("inside", 0.0), ("outside", 0.75)):
                    at = torch.linspace(low, low + 0.5, 100, device=device)[:, None]
                    quartiles = predictive_quartiles(weights, at, sizes, std, 200)
                    metrics[f"eval/{name}_band_{where}"] = (
                        (quartiles[2] - quartiles[0]).mean().item()
                    )
                    if where == "inside":
                        waves = (2 * math.pi * at).sin() + (4 * math.pi * at).sin()
                        off = (quartiles[1] - (at + 0.3 * waves)[:, 0]).square().mean().sqrt()
                        metrics[f"eval/{name}_error_inside"] = off.item()
        return metrics

    draw = partial(draw_regression, dict(both), (x, y), sizes, std)
    if args.evaluate:
        load_checkpoint(Path(args.evaluate), args, both, *shaping, "noise_std")
        metrics = measure()
        draw(Path(args.evaluate).with_name("regression.png"))
        return metrics
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, both, *shaping, *KEPT)
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.manual_seed(args.seed + checkpoint["epoch"])  # a GPU goes on with other draws
        first_epoch, seconds = checkpoint["epoch"] + 1, checkpoint["seconds"]
        if first_epoch > args.epochs:
            raise SystemExit(f"{args.resume} has had {first_epoch - 1} epochs: raise --epochs.")

    writer = open_writer(args, args.task)
    try:
        for epoch in tqdm(range(first_epoch, args.epochs + 1), unit="epoch", disable=None):
            start, errors = time.perf_counter(), []
            batches = torch.randperm(len(x)).to(device).split(args.batch_size)
            for i, batch in enumerate(batches, start=1):

                def negative_log_likelihood(w: Tensor, batch: Tensor = batch) -> Tensor:
                    off = network(x[batch], w, sizes) - y[batch]
                    return (off / std).square().sum() / 2

                pi_i = kl_weight(i, len(batches), args.kl_weighting)
                how = negative_log_likelihood, pi_i, args.batch_size, prior, args.samples
                pair = [update(net, opt, *how) for net, opt in zip(both.values(), optimizers)]
                errors.append(pair[0])
                refuse_infinity(sum(pair).item(), f"in step {i} of epoch {epoch}")
            took = time.perf_counter() - start
            seconds += took
            if epoch % 100 and epoch < args.epochs:
                continue
            with torch.random.fork_rng():  # a report draws nothing that training would
                kl = both["Bayes by Backprop"].sample(prior)[1]
            state = {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            state |= {"rng": torch.get_rng_state(), "seconds": seconds, "args": asdict(args)}
            path = Path(writer.log_dir, "checkpoint.pt")
            save_checkpoint(path, epoch=epoch, net=both.state_dict(), **state)
            finished = epoch == args.epochs
            error = sum(errors)
            metrics = {"losses/free_energy": (kl + error).item(), "losses/kl": kl.item()}
            metrics["losses/error"] = error.item()
            metrics["charts/SPS"] = len(x) / took  # points per second, seen by both networks
            metrics["charts/learning_rate"] = optimizers[0].param_groups[0]["lr"]
            metrics["charts/minutes"] = seconds / 60  # of training alone
            metrics |= measure()
            report(writer, epoch, metrics)
    except KeyboardInterrupt:
        raise stopped(writer.log_dir, finished) from None
    finally:
        writer.close()
    draw(Path(writer.log_dir, "regression.png"))
    return metrics


BUFFER, STEPS, BATCH = 4096, 64, 64  # interactions kept, minibatches after each one, their size


def reward(eat: Tensor, edible: Tensor, lucky: Tensor) -> Tensor:
    """+5 for an edible mushroom, -35 or, half of the time, +5 for a poisonous one; 0 if left."""
    return torch.where(eat.bool(), torch.where(edible | lucky, 5.0, -35.0), 0.0)


def oracle_reward(edible: Tensor) -> Tensor:
    """+5 for an edible mushroom; a poisonous one is left."""
    return 5.0 * edible


def action_values(weights: nn.Module, contexts: Tensor, sizes: Sequence[int], agent: str) -> Tensor:
    """[N, 2] rewards expected of leaving and of eating each context [N, 117], up to a factor.

    Thompson sampling with two networks drawn for bbb; the one network of the others.
    """
    actions = torch.eye(2).repeat(len(contexts), 1)  # leave, eat, leave, eat, ...
    both = torch.cat([contexts.repeat_interleave(2, 0), actions], 1)  # [2 N, 119]
    draws = 2 if agent == "bbb" else 1
    return sum(network(both, weights.draw(), sizes) for _ in range(draws)).view(-1, 2)


@torch.no_grad()
def choose(
    weights: nn.Module, context: Tensor, sizes: Sequence[int], agent: str, percent: int
) -> int:
    """1 to eat, 0 to leave: the better one, at random in so many percent of the cases."""
    if torch.rand(()) < percent / 100:
        return int(torch.randint(2, ()))
    return int(action_values(weights, context[None], sizes, agent).argmax())


@torch.no_grad()
def mistakes(
    weights: nn.Module, contexts: Tensor, edible: Tensor, sizes: Sequence[int], args: Args
) -> dict[str, float]:
    """Percent of all mushrooms that are edible but left, poisonous but eaten, if none is random."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        values = [
            action_values(weights, contexts, sizes, args.agent) for _ in range(args.eval_samples)
        ]
    eaten = torch.stack(values).argmax(2).bool()  # [S, N]
    wrong = {"edible_left": edible & ~eaten, "poisonous_eaten": eaten & ~edible}
    return {f"eval/{kind}": 100 * w.float().mean().item() for kind, w in wrong.items()}


def draw_regret(path: Path) -> None:
    """Cumulative regret of this run against interactions, from its metrics.csv (figure 6)."""
    table = path.with_name("metrics.csv")
    if not table.exists():  # a checkpoint without its run
        return
    rows = [line.split(",") for line in table.read_text().splitlines()]
    rows = [row for row in rows if len(row) == 3]  # the last one may be half written
    points = [(int(t), float(value)) for t, tag, value in rows if tag == "charts/regret"]
    figure, axis = plt.subplots(figsize=(5, 3.4))
    axis.plot(*zip(*points))
    axis.set(xlabel="mushrooms met", ylabel="cumulative regret")
    save_figure(figure, path)


def run_bandit(args: Args) -> dict[str, float]:
    """Section 5.3, on one core: the network is small and its steps are many."""
    torch.set_num_threads(1)
    load = {"mushroom": partial(load_mushrooms, args.data_dir), "breast-cancer": load_breast_cancer}
    contexts, edible = load[args.bandit_data]()
    width, std = args.hidden_units or 100, args.noise_std or 1.0
    sizes = (contexts.shape[1] + 2, width, width, 1)
    bayesian = args.agent == "bbb"
    weights = WeightPosterior(sizes, args.rho_init) if bayesian else PointEstimate(sizes)
    percent = {"bbb": 0, "greedy": 0, "greedy-1": 1, "greedy-5": 5}[args.agent]
    optimizer, prior = make_optimizer(weights, args), make_prior(args)
    x, r = torch.zeros(BUFFER, sizes[0]), torch.zeros(BUFFER, 1)  # context with action, reward
    shaping = ("task", "agent", "bandit_data", "hidden_units")
    first, regret, seconds, finished, metrics = 0, 0.0, 0.0, False, {}
    if args.evaluate:
        load_checkpoint(Path(args.evaluate), args, weights, *shaping)
        draw_regret(Path(args.evaluate).with_name("regret.png"))
        return mistakes(weights, contexts, edible, sizes, args)
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, weights, *shaping, *KEPT)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        x, r, regret = checkpoint["x"], checkpoint["r"], checkpoint["regret"]
        first, seconds = checkpoint["t"], checkpoint["seconds"]
        if first >= args.interactions:
            raise SystemExit(f"{args.resume} has met {first} mushrooms: raise --interactions.")

    writer = open_writer(args, f"{args.task}_{args.agent}")
    start, reported = time.perf_counter(), first
    try:
        for t in tqdm(range(first, args.interactions), unit="mushroom", disable=None):
            met = torch.randint(len(contexts), ())
            a = choose(weights, contexts[met], sizes, args.agent, percent)
            r_t = reward(torch.tensor(a), edible[met], torch.rand(()) < 0.5)
            regret += (oracle_reward(edible[met]) - r_t).item()
            slot = t % BUFFER
            x[slot] = torch.cat([contexts[met], torch.eye(2)[a]])
            r[slot] = r_t

            drawn = torch.randint(min(t + 1, BUFFER), (STEPS, BATCH))
            for i, (x_i, r_i) in enumerate(zip(x[drawn], r[drawn]), start=1):

                def negative_log_likelihood(w: Tensor, x_i=x_i, r_i=r_i) -> Tensor:
                    error = F.mse_loss(network(x_i, w, sizes), r_i, reduction="sum")
                    return error / (2 * std**2)

                pi_i = kl_weight(i, STEPS, args.kl_weighting)
                how = pi_i, BATCH, prior, args.samples
                error = update(weights, optimizer, negative_log_likelihood, *how)
            if (t + 1) % args.report_every and t + 1 < args.interactions:
                continue
            refuse_infinity(error.item(), f"after mushroom {t + 1}")
            took = time.perf_counter() - start
            seconds += took
            kl = weights.sample(prior)[1].item()
            state = {
                "net": weights.state_dict(),
                "optimizer": optimizer.state_dict(),
                "x": x,
                "r": r,
            }
            state |= {"rng": torch.get_rng_state(), "seconds": seconds, "args": asdict(args)}
            path = Path(writer.log_dir, "checkpoint.pt")
            save_checkpoint(path, t=t + 1, regret=regret, **state)
            finished = t + 1 == args.interactions
            metrics = {"charts/regret": regret, "losses/kl": kl}
            metrics["losses/error"] = error.item()  # of the last minibatch
            metrics["charts/SPS"] = (t + 1 - reported) / took  # mushrooms per second
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/minutes"] = seconds / 60  # of training alone
            metrics |= mistakes(weights, contexts, edible, sizes, args)
            report(writer, t + 1, metrics)
            start, reported = time.perf_counter(), t + 1
    except KeyboardInterrupt:
        raise stopped(writer.log_dir, finished) from None
    finally:
        writer.close()
    draw_regret(Path(writer.log_dir, "regret.png"))
    return metrics


def run(args: Args, device: str) -> dict[str, float]:
    """The experiment of --task."""
    torch.manual_seed(args.seed)
    if args.task == "bandit":
        return run_bandit(args)
    return (run_mnist if args.task == "mnist" else run_regression)(args, device)


def main(args: Args) -> dict[str, float]:
    check(args)
    check_flags(args)
    keep_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        return run(args, choose_device(args.device))
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
