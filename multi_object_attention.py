"""Deep recurrent attention model (DRAM): reads several objects in an image, glimpse by glimpse.

    Paper    Ba et al., "Multiple object recognition with visual attention", ICLR 2015
    Shows    a coarse look at the whole image tells where to begin, two layers of LSTM keep where
               apart from what: it reads pairs of digits, adds two (tables 1, 2), reads numbers
    Run      python multi_object_attention.py --batch-size 256 --learning-rate 0.002
               --learning-rate-decay 0.984 --epochs 200 --no-hold-out --bfloat16
    Result   4.75 % of pairs wrong (seed 1; of one path alone 6.53) in 147 min on one core of an
               AMD EPYC, beside another run; paper: 5
    Run      python multi_object_attention.py --task addition --batch-size 256 --learning-rate 0.002
               --learning-rate-decay 0.984 --epochs 200 --no-hold-out --bfloat16
    Result   1.86 % of sums wrong (seed 1; of one path alone 2.43; a convolutional network 2.60) in
               145 min on one core of the same, beside another run; paper: 2.5
    Run      python multi_object_attention.py --task svhn --forward-backward
    Result   not yet measured

Departures: ours (the paper's)
    Adam, 1e-3 (SGD, Nesterov's momentum 0.9, 0.01), times 0.97 after each of 100 epochs of 50,000
      images (svhn: of 200,000); the Run lines of digits: 2e-3, times 0.984, 200 epochs, minibatches
      of 256 (128), in 16 bits, from all 60,000 digits
    locations deviate by 0.17 units, a variance of 0.03 (pairs, sums: a deviation of 0.03); lambda =
      0.1 (not told). With the paper's deviation and lambda = 1 the gradient of their means would be
      57 times as large on digits
    a label earns its probability, the mean of what a draw from the softmax would earn (1 if it is
      the likeliest class, else 0: --reward correct)
    locations are clipped to the image; a mean outside adds half its squared distance from the
      border to the loss, in the mean over all glimpses, also after a mistake (not told)
    the baseline's loss is half the mean of (R - b)^2 over all glimpses, 0 after a mistake (weight
      not told); b_n sees r2 as it is before glimpse n, so it does not depend on l_n (r2_n)
    M = 1 path per image in training, 10 in evaluation (not told)
    patches of 12 and 24 pixels, shrunk to 12x12, side by side as channels (two scales, sizes not
      told); they lie on whole pixels, what is outside the image is zero (not told)
    context: the image shrunk to 24x24, 32 filters of 5x5, 3x3, 3x3, the last two with stride 2;
      tanh of their 512 outputs is both hidden part and cell of LSTM 2's first state (not told)
    emission and classifier have one hidden layer; the baseline is linear and trains itself alone;
      each direction has its own classifier and baseline, their losses are summed (not told)
    He's initialisation, recurrent weights orthogonal; the biases of forget gates and of G_loc begin
      at 1, the baseline at 0 (not told)
    pairs: 8 pieces of 8x8 pixels of other digits as clutter ("distraction noise"); digits of pairs
      and sums do not overlap, 10,000 of the 60,000 are held out unless --no-hold-out (not told)
    ram: one LSTM, what + where, no context; it begins at a learned place (at random)
    conv on pairs and sums: 64-64-64-512 with 5x5 filters and pooling by 2 (layout not told)
    conv on svhn: 3x3 filters, pooling by 2 after 5 layers and to 10x10 after 8 (110: 20x20), which
      gives the table's 51 M weights and 2.1 G multiplications (layout not told)
    DRAM on svhn has 8.6 M weights, both directions 14.9 (14, 28)
    --focus reads again around the middle of all glimpses up to the end, each direction by itself
      (not told)
    svhn: 230,000 training images (200,000); the box around the digits is squeezed to a square, what
      it shows beyond the photo is black, longer numbers are left out (not told); the directions'
      log-probabilities are averaged (not told); no dropout in DRAM (0.1 %)

Symbols: x_n glimpse at location l_n, in units of so many pixels from the image's centre; g_n its
features; r1_n, r2_n states of the lower and upper LSTM; mu_n mean of l_n; b_n baseline; y_s label,
R_s reward.
Shapes: B images, S their width, L labels, N glimpses of each, T = N L glimpses, C classes, M paths
per image, k scales of g x g pixels.
"""

import csv
import ctypes
import gzip
import hashlib
import io
import math
import os
import signal
import sys
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
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

Reward = Literal["probability", "correct"]


@dataclass
class Args:
    # The method
    task: Literal["pairs", "addition", "svhn"] = "pairs"  # two digits, their sum, house numbers
    model: Literal["dram", "ram", "conv"] = "dram"  # ram: one LSTM, what + where; conv sees it all
    context: Literal["coarse", "none"] = "coarse"  # what dram knows before its first glimpse
    glimpse_policy: Literal["learned", "random"] = "learned"  # where the model looks
    forward_backward: bool = False  # svhn: a second model reads from right to left
    patch_size: int = 12  # g, pixels
    num_scales: int = 2  # k, patches of a glimpse, each twice as wide as the last
    num_glimpses: int = 0  # N per label; 0: the paper's for the task (4; svhn: 3)
    location_unit: float = 0.0  # pixels; 0: the paper's for the task (20; svhn: 12)
    reward: Reward = "probability"  # of the right class; correct: 1 if it is the likeliest (paper)
    location_std: float = 0.17  # deviation of a location, in units (paper: 0.03, on svhn 0.17)
    reinforce_weight: float = 0.1  # lambda, of the location policy's gradient beside the others
    reinforce_into_core: bool = True  # the policy gradient also trains LSTM 1 and glimpse network
    monte_carlo_samples: int = 0  # M, paths per image; 0: 1 in training, 10 averaged in evaluation
    average: Literal["log-probabilities", "probabilities"] = "log-probabilities"  # of M paths
    svhn_size: Literal[54, 110] = 54  # pixels; 110: less tightly cropped, digits as large
    focus: bool = False  # svhn at 110: evaluate on the 54 pixels around a first reading's glimpses
    # Optimisation
    epochs: int = 100  # of 50,000 images (digits: 1,250)
    batch_size: int = 128  # images of a minibatch
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd: Nesterov's momentum 0.9, as in the paper
    learning_rate: float = 1e-3  # in the first epoch (paper: 0.01, of sgd)
    location_rate: float = 1.0  # factor on --learning-rate for context, LSTM 2 and emission
    learning_rate_decay: float = 0.97  # factor on --learning-rate after each epoch
    bfloat16: bool = False  # the network computes in 16 bits: half the time
    # The run
    dataset: Literal["mnist", "digits"] = "mnist"  # digits: scikit-learn's, needs no download
    hold_out: bool = True  # some of the training images are for validation; or learn from all
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    eval_every: int = 5  # epochs between two evaluations on validation images; at the end always
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number but those of the fixed sets
    run_dir: str = ""  # for logs, pictures, checkpoint.pt; default runs/TASK_MODEL__SCRIPT__...
    pretrained: str = ""  # a checkpoint.pt to begin with, of another --svhn-size if need be
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """A task's images, labels and networks; unless told otherwise, those of pairs and sums."""

    S: int = 100  # pixels, the width of an image
    num_clutter: int = 0  # pieces of other digits in an image
    num_labels: int = 1  # L, of an image, at most
    num_classes: int = 19  # C
    num_glimpses: int = 4  # N
    location_unit: float = 20  # pixels
    width: int = 256  # units of every hidden layer
    convolutional: bool = False  # glimpses pass three convolutions
    lstm: int = 512  # units of an LSTM
    patch_size: int = 12  # g
    num_scales: int = 2  # k


SIZES = {  # appendix 8.2 and 8.3
    "pairs": {"num_clutter": 8, "num_classes": 55},
    "addition": {"num_classes": 19},
    "svhn": {
        "S": 54,
        "num_labels": 6,
        "num_classes": 11,
        "num_glimpses": 3,
        "location_unit": 12,
        "width": 1024,
        "convolutional": True,
    },
}
TERMINAL, NO_LABEL = 10, -1  # svhn: the class that ends a number; what fills the row behind it


def sizes_of(args: Args) -> Sizes:
    """The paper's, unless flags say otherwise."""
    paper = Sizes(**SIZES[args.task])
    return paper._replace(
        S=args.svhn_size if args.task == "svhn" else paper.S,
        num_glimpses=args.num_glimpses or paper.num_glimpses,
        location_unit=args.location_unit or paper.location_unit,
        patch_size=args.patch_size,
        num_scales=args.num_scales,
    )


def integral_image(x: Tensor) -> Tensor:
    """Sums [B, S+1, S+1] of all pixels above row i and left of column j, for bytes x [B, S, S]."""
    return F.pad(x.int(), (1, 0, 1, 0)).cumsum_(1).cumsum_(2)


class RetinaSensor(nn.Module):
    """rho(x, l): k patches around l, each twice as wide as the last, all shrunk to g x g means.

    Exact and without a loop: a mean over a block is four corners of the integral image. Corners
    outside the image are moved onto its border, so that what lies there counts as zero.
    """

    def __init__(self, patch_size: int, num_scales: int):
        super().__init__()
        widths = 2 ** torch.arange(num_scales)[:, None]  # [k, 1] of the block behind one number
        edges = widths * (torch.arange(patch_size + 1) - patch_size // 2)
        self.register_buffer("edges", edges, persistent=False)  # [k, g+1] pixels from the centre
        self.register_buffer("areas", widths[:, :, None].square() * 255.0, persistent=False)

    def forward(self, table: Tensor, l: Tensor) -> Tensor:
        """[B, k, g, g] in [0, 1] from integral images [B, S+1, S+1] and locations [B, 2]."""
        S = table.shape[-1] - 1
        centre = ((l + 1) / 2 * S).round().long()[:, :, None, None]
        columns, rows = (centre + self.edges).clamp_(0, S).unbind(1)  # [B, k, g+1]
        corners = rows[..., :, None] * (S + 1) + columns[..., None, :]  # [B, k, g+1, g+1]
        sums = table.flatten(1).gather(1, corners.flatten(1)).view(corners.shape)
        return sums.diff(dim=-1).diff(dim=-2) / self.areas


class GlimpseNetwork(nn.Module):
    """g_n = G_image(x_n) * G_loc(l_n), what is there times where it is (section 3)."""

    def __init__(self, sizes: Sizes, product: bool):
        super().__init__()
        k, g = sizes.num_scales, sizes.patch_size
        if sizes.convolutional:
            layers = [nn.Conv2d(k, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()]
            layers += [nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten()]
            layers += [nn.Linear(128 * (g - 8) ** 2, sizes.width), nn.ReLU()]
        else:
            layers = [nn.Flatten(), nn.Linear(k * g**2, sizes.width), nn.ReLU()]
        self.what = nn.Sequential(*layers)
        self.where = nn.Sequential(nn.Linear(2, sizes.width), nn.ReLU())
        self.product = product

    def forward(self, x: Tensor, l: Tensor) -> Tensor:
        """[B, width] from glimpses [B, k, g, g] and their locations [B, 2]."""
        what, where = self.what(x), self.where(l)
        return what * where if self.product else what + where


class ContextNetwork(nn.Sequential):
    """c_I [B, lstm] from the whole image [B, 1, S, S], shrunk to 24x24: where to begin."""

    def __init__(self, lstm: int):
        layers = [nn.AdaptiveAvgPool2d(24), nn.Conv2d(1, 32, 5), nn.ReLU()]  # 20x20
        layers += [nn.Conv2d(32, 32, 3, 2), nn.ReLU()]  # 9x9
        layers += [nn.Conv2d(32, lstm // 16, 3, 2), nn.Tanh()]  # 4x4, within a state's bounds
        super().__init__(*layers, nn.Flatten())


class EmissionNetwork(nn.Sequential):
    """mu_n [B, 2], the mean of the next location, from r2."""

    def __init__(self, sizes: Sizes):
        super().__init__(nn.Linear(sizes.lstm, sizes.width), nn.ReLU(), nn.Linear(sizes.width, 2))


class Classifier(nn.Sequential):
    """Logits of the classes from r1."""

    def __init__(self, sizes: Sizes):
        top = nn.Linear(sizes.width, sizes.num_classes)
        super().__init__(nn.Linear(sizes.lstm, sizes.width), nn.ReLU(), top)


def initialise(module: nn.Module) -> None:
    """He's weights, orthogonal recurrent ones: with torch's own all images look nearly alike."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LSTMCell):
        nn.init.kaiming_normal_(module.weight_ih, nonlinearity="linear")
        for gate in module.weight_hh.detach().chunk(4):
            nn.init.orthogonal_(gate)
        nn.init.zeros_(module.bias_ih)
        nn.init.zeros_(module.bias_hh)
        nn.init.ones_(module.bias_hh.detach()[module.hidden_size : 2 * module.hidden_size])  # keep


class Reading(NamedTuple):
    """T glimpses at each of B images."""

    r1: Tensor  # [B, T, lstm] after each glimpse
    r2: Tensor  # [B, T, lstm] before it: the states that choose where it goes
    mu: Tensor  # [B, T, 2] the means they emit, in units
    sample: Tensor  # [B, T, 2] drawn around them
    l: Tensor  # [B, T, 2] where it looks: the samples, clipped to the image


class DeepRecurrentAttentionModel(nn.Module):
    """Two LSTMs, one on the other: the lower one is asked what it saw, the upper one where to look.

    The context enters the upper LSTM alone, and nothing flows down: what the classifier knows of
    an image it knows from glimpses (section 3). With deep=False it is RAM: one LSTM does both.
    """

    def __init__(
        self, sizes: Sizes, deep: bool = True, context: bool = True, bfloat16: bool = False
    ):
        super().__init__()
        self.N, self.unit, self.bfloat16 = sizes.num_glimpses, sizes.location_unit, bfloat16
        self.retina = RetinaSensor(sizes.patch_size, sizes.num_scales)
        self.glimpse = GlimpseNetwork(sizes, product=deep)
        self.lstm1 = nn.LSTMCell(sizes.width, sizes.lstm)
        self.lstm2 = nn.LSTMCell(sizes.lstm, sizes.lstm) if deep else None
        self.context = ContextNetwork(sizes.lstm) if deep and context else None
        self.emission, self.classifier = EmissionNetwork(sizes), Classifier(sizes)
        self.baseline = nn.Linear(sizes.lstm, 1)
        self.apply(initialise)
        nn.init.ones_(self.glimpse.where[0].bias)  # where G_loc is 0, the product is for good
        nn.init.zeros_(self.baseline.weight)

    def forward(
        self,
        x: Tensor,
        T: int,
        policy: str = "learned",
        std: float = 0.0,
        reinforce_into_core: bool = True,
    ) -> Reading:
        """T glimpses at images [B, S, S], bytes; with std 0 they lie on the means."""
        table, half = integral_image(x), self.half(x)
        zeros = self.baseline.weight.new_zeros(len(x), self.lstm1.hidden_size)
        r1 = r2 = zeros, zeros  # hidden part and cell
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            if self.context is not None:
                c_I = self.context(x[:, None] / 255)
                r2 = c_I, c_I
            glimpses = []
            for n in range(T):
                if policy == "random":
                    mu = sample = torch.empty(len(x), 2, device=x.device).uniform_(-half, half)
                else:
                    if n > 0:
                        below = r1 if reinforce_into_core else tuple(state.detach() for state in r1)
                        r2 = below if self.lstm2 is None else self.lstm2(below[0], r2)
                    mu = self.emission(r2[0]).float()
                    sample = (mu + std * torch.randn_like(mu)).detach()
                l = sample.clamp(-half, half)
                r1 = self.lstm1(self.glimpse(self.retina(table, l / half), l), r1)
                glimpses.append((r1[0], r2[0], mu, sample, l))
        return Reading(*(torch.stack(part, 1).float() for part in zip(*glimpses)))

    def half(self, x: Tensor) -> float:
        """Units from the centre of images [B, S, S] to their borders."""
        return x.shape[-1] / 2 / self.unit

    def logits(self, reading: Reading) -> Tensor:
        """[B, L, C], of each label after its N glimpses."""
        return self.classifier(reading.r1[:, self.N - 1 :: self.N])


def location_log_prob(sample: Tensor, mu: Tensor, std: float) -> Tensor:
    """log pi(sample) of a Gaussian with one deviation for x and y, [..., 2] to [...]."""
    return -(sample - mu).square().sum(-1) / (2 * std**2) - math.log(2 * math.pi * std**2)


def label_log_probs(logits: Tensor, y: Tensor) -> Tensor:
    """log p(y_s) [B, L] from logits [B, L, C]; 0 where there is no label."""
    log_p = logits.log_softmax(2).gather(2, y.clamp(min=0)[..., None]).squeeze(2)
    return log_p * (y != NO_LABEL)


def cumulative_rewards(r: Tensor, right: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """R_s, what labels up to s earned, r each, and whether s counts, [B, L] (eq. 15 and 16).

    It counts while all labels before it are right: a path is trained up to its first mistake.
    """
    before = torch.ones_like(y)
    before[:, 1:] = right[:, :-1].long().cumprod(1)
    counts = before * (y != NO_LABEL)
    return (counts * r).cumsum(1), counts


def bound_loss(log_p: Tensor, log_pi: Tensor, R: Tensor, b: Tensor, weight: float) -> Tensor:
    """Loss [B] whose gradient is that of -F, estimated from sampled paths.

    F is a lower bound on log p(y|I), dF = E[d log p(y|l) + log p(y|l) d log p(l)] (eq. 10); R - b
    takes the place of the second log p(y|l), and the term a weight lambda (eq. 13). log_p is
    [B, L], the others [B, T].
    """
    return -log_p.sum(1) - weight * ((R - b).detach() * log_pi).sum(1)


def regression_loss(R: Tensor, b: Tensor) -> Tensor:
    """(R_s - b_n)^2 / 2, the mean over glimpses [B]: b_n learns what its label will have earned.

    Nesterov's steps of 0.01 converge while rms(r2) < 0.5; on a sum over 4 glimpses, only < 0.25.
    """
    return (R - b).square().mean(1) / 2


def straying_loss(mu: Tensor, half: float) -> Tensor:
    """Half the squared way from means [B, T, 2] outside the image to its border, their mean [B].

    Out there samples are all clipped to one place and earn the same: rewards show no way back.
    """
    return (mu - mu.clamp(-half, half)).square().sum(2).mean(1) / 2


def reading_loss(
    net: DeepRecurrentAttentionModel, x: Tensor, y: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The bound for labels y [B, L] of images x, with M = 1 path each; what the report shows."""
    std = args.location_std
    reading = net(x, net.N * y.shape[1], args.glimpse_policy, std, args.reinforce_into_core)
    logits = net.logits(reading)
    log_p, right = label_log_probs(logits, y), logits.argmax(2) == y
    r = log_p.detach().exp() if args.reward == "probability" else right
    R, counts = cumulative_rewards(r, right, y)
    log_p = counts * log_p
    shown = {
        "losses/cross_entropy": -log_p.sum(1).mean(),
        "charts/right": (counts * right).sum(1).float().mean(),  # labels before the first mistake
    }
    if args.glimpse_policy == "random":
        return shown["losses/cross_entropy"], shown
    R, counts = (part.repeat_interleave(net.N, 1) for part in (counts * R, counts))  # [B, T]
    b = counts * net.baseline(reading.r2.detach()).squeeze(2)
    log_pi = counts * location_log_prob(reading.sample, reading.mu, std)
    bound = bound_loss(log_p, log_pi, R, b, args.reinforce_weight)
    fitting, straying = regression_loss(R, b), straying_loss(reading.mu, net.half(x))
    shown |= {
        "losses/baseline": fitting.mean(),
        "losses/straying": straying.mean(),
        "charts/surprise": ((R - b).square().sum() / counts.sum()).sqrt(),  # deviation of R from b
        "charts/outside": (reading.sample != reading.l).any(2).float().mean(),  # share of samples
        "charts/mu": reading.mu.abs().mean(),  # units from the centre, in x and in y
    }
    return (bound + fitting + straying).mean(), shown


def mirror(length: Tensor, L: int) -> Tensor:
    """Index [B, L] that turns the first length [B] of L places around."""
    place = torch.arange(L, device=length.device).expand(len(length), L)
    return torch.where(place < length[:, None], length[:, None] - 1 - place, place)


def right_to_left(y: Tensor) -> Tensor:
    """Labels [B, L] in the backward model's order, the terminal class still at the end."""
    return y.gather(1, mirror((y == TERMINAL).int().argmax(1), y.shape[1]))


def number_length(log_p: Tensor) -> Tensor:
    """How many digits [B] come before the terminal class in predictions [B, L, C]."""
    ends = log_p.argmax(2) == TERMINAL
    ends[:, -1] = True
    return ends.int().argmax(1)


def combine(forward: Tensor, backward: Tensor) -> Tensor:
    """Labels [B, L] from log p [B, L, C] of both directions (section 4.1).

    Models tend to read too many digits: of k, the shorter length, the backward model's first k
    digits are turned around and laid on the forward model's, where the log p are added.
    """
    L = forward.shape[1]
    k = torch.minimum(number_length(forward), number_length(backward))
    turned = backward.gather(1, mirror(k, L)[..., None].expand_as(backward))
    digits = (forward + turned)[..., :TERMINAL].argmax(2)
    return digits.masked_fill(torch.arange(L, device=k.device) >= k[:, None], TERMINAL)


def averaged(log_p: Tensor, average: Literal["log-probabilities", "probabilities"]) -> Tensor:
    """What M paths [M, ...] say together (eq. 14, or the mean of log p that the paper prefers)."""
    if average == "log-probabilities":
        return log_p.mean(0)
    return log_p.logsumexp(0) - math.log(len(log_p))


def focused(net: DeepRecurrentAttentionModel, x: Tensor, T: int, width: int = 54) -> Tensor:
    """The part [B, width, width] of each image in the middle of which a first reading looks.

    Glimpses after the terminal class, which no label trains, do not count.
    """
    reading = net(x, T)
    read = net.N * (number_length(net.logits(reading)) + 1)  # [B] glimpses
    behind = torch.arange(T, device=x.device) >= read[:, None]
    l = net.unit * torch.where(behind[..., None], reading.l[:, :1], reading.l)  # [B, T, 2]
    centre = (l.amin(1) + l.amax(1)) / 2 + x.shape[1] / 2  # of the path, in pixels
    corner = (centre - width / 2).round().long().clamp(0, x.shape[1] - width)
    return x[square(corner, width)]


class ConvolutionalBaseline(nn.Module):
    """The paper's baselines, which see all of x [B, S, S]; logits [B, L, C]."""

    def __init__(self, sizes: Sizes, bfloat16: bool = False):
        super().__init__()
        self.bfloat16 = bfloat16
        S, L, C = sizes.S, sizes.num_labels, sizes.num_classes
        if sizes.convolutional:  # 10 layers, dropout in all of them
            layers, maps = [], round(S * 10 / 54)
            for n in range(8):
                layers += [nn.Conv2d(128 if n else 1, 128, 3, padding=1), nn.ReLU(), nn.Dropout()]
                layers += [nn.MaxPool2d(2)] if n == 4 else []
            layers += [nn.AdaptiveMaxPool2d(maps), nn.Flatten()]
            for width in (128 * maps**2, 3096):
                layers += [nn.Linear(width, 3096), nn.ReLU(), nn.Dropout()]
        else:
            layers = []
            for n in range(3):
                layers += [nn.Conv2d(64 if n else 1, 64, 5), nn.MaxPool2d(2), nn.ReLU()]
                S = (S - 4) // 2
            layers += [nn.Flatten(), nn.Linear(64 * S**2, 512), nn.ReLU()]
        top = nn.Linear(3096 if sizes.convolutional else 512, L * C)
        self.layers = nn.Sequential(*layers, top, nn.Unflatten(1, (L, C))).apply(initialise)
        self.to(memory_format=torch.channels_last)  # faster

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.layers(x[:, None] / 255).float()


def make_networks(args: Args) -> nn.ModuleList:
    """One network; with --forward-backward two, which share their glimpse network."""
    sizes = sizes_of(args)
    if args.model == "conv":
        return nn.ModuleList([ConvolutionalBaseline(sizes, args.bfloat16)])
    deep, context = args.model == "dram", args.context == "coarse"
    make = partial(DeepRecurrentAttentionModel, sizes, deep, context, args.bfloat16)
    nets = [make()]
    if args.forward_backward:
        nets.append(make())
        nets[1].glimpse = nets[0].glimpse
    return nn.ModuleList(nets)


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


def square(corner: Tensor, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of w x w pixels in each of B images, whose top left one is corner [B, 2] = (x, y)."""
    columns, rows = (corner[:, :, None] + torch.arange(w, device=corner.device)).unbind(1)
    image = torch.arange(len(corner), device=corner.device)
    return image[:, None, None], rows[:, :, None], columns[:, None, :]


def places_apart(
    B: int, S: int, w: int, device: torch.device | str, generator: torch.Generator | None
) -> Tensor:
    """Corners [B, 2, 2] of two w x w squares in each image; each non-overlapping pair as likely.

    Of 40 pairs the first that does not overlap: with 28 of 100 pixels, 0.37^40 of images have none.
    """
    corners = torch.randint(S - w + 1, (B, 40, 2, 2), generator=generator, device=device)
    apart = ((corners[:, :, 0] - corners[:, :, 1]).abs() >= w).any(2)
    return corners[torch.arange(B, device=device), apart.int().argmax(1)]


def add_patches(canvas: Tensor, patches: Tensor, corners: Tensor) -> None:
    """Add n patches [B, n, w, w] to each canvas [B, S, S], top left pixels at corners [B, n, 2]."""
    S, w = canvas.shape[-1], patches.shape[-1]
    columns, rows = (corners[..., None] + torch.arange(w, device=canvas.device)).unbind(2)
    pixels = rows[..., :, None] * S + columns[..., None, :]
    canvas.flatten(1).scatter_add_(1, pixels.flatten(1), patches.flatten(1).to(canvas.dtype))


def pair_class(a: Tensor, b: Tensor) -> Tensor:
    """Of the 55 unordered pairs of digits: 00, 01, 11, 02, 12, 22, ..."""
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    return high * (high + 1) // 2 + low


def make_scenes(
    task: Literal["pairs", "addition"],
    digits: Tensor,
    labels: Tensor,
    chosen: Tensor,
    pool: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Images [B, 100, 100] of two of the digits each, chosen [B, 2], and labels [B, 1]. Bytes.

    Pairs lie among 8x8 pieces of digits from pool, added to what is there and clipped.
    """
    B, device, (S, num_clutter, *_) = len(chosen), digits.device, Sizes(**SIZES[task])
    draw = partial(torch.randint, generator=generator, device=device)
    canvas = torch.zeros(B, S, S, dtype=torch.int16, device=device)
    add_patches(canvas, digits[chosen], places_apart(B, S, 28, device, generator))
    if K := num_clutter:
        others, corners = draw(len(pool), (B * K,)), draw(28 - 8 + 1, (B * K, 2))
        pieces = pool[others][square(corners, 8)].view(B, K, 8, 8)
        add_patches(canvas, pieces, draw(S - 8 + 1, (B, K, 2)))
    a, b = labels[chosen].unbind(1)
    y = pair_class(a, b) if task == "pairs" else a + b
    return canvas.clamp_(max=255).byte(), y[:, None]


SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"


class HouseNumber(NamedTuple):
    """What digitStruct.mat tells of an image."""

    name: str  # of the image's file
    digits: list[int]  # from left to right
    box: tuple[float, float, float, float]  # left, top, right, bottom of all digits together


def read_digit_struct(content: bytes) -> list[HouseNumber]:
    """The images of an archive, from its digitStruct.mat, which is an HDF5 file."""
    try:
        import h5py
    except ImportError:
        raise SystemExit(
            "--task svhn needs h5py to read digitStruct.mat: pip install h5py"
        ) from None
    numbers = []
    with h5py.File(io.BytesIO(content)) as file:

        def values(box: h5py.Group, key: str) -> np.ndarray:
            """One for each digit; where there are several digits, they stand elsewhere."""
            column = box[key][:, 0]
            return np.array([file[v][0, 0] for v in column] if len(column) > 1 else column, float)

        references = zip(file["digitStruct/name"][:, 0], file["digitStruct/bbox"][:, 0])
        total = len(file["digitStruct/name"])
        for name, box in tqdm(references, "digitStruct.mat", total, unit="image", disable=None):
            keys = ("left", "top", "width", "height", "label")
            left, top, width, height, label = (values(file[box], key) for key in keys)
            around = left.min(), top.min(), (left + width).max(), (top + height).max()
            digits = [int(digit) % 10 for digit in label]  # 10 stands for 0
            numbers.append(HouseNumber("".join(map(chr, file[name][:, 0])), digits, around))
    return numbers


def enlarged(box: tuple[float, float, float, float], factor: float) -> tuple[int, int, int, int]:
    """The box, factor times as wide and as high about its middle, in whole pixels."""
    left, top, right, bottom = box
    dx, dy = (factor - 1) / 2 * (right - left), (factor - 1) / 2 * (bottom - top)
    return round(left - dx), round(top - dy), round(right + dx), round(bottom + dy)


def decode_archive(path: Path, width: int) -> tuple[Tensor, Tensor]:
    """Grey images [n, width, width] of the numbers of up to 5 digits, and their labels [n, 6].

    The box around the digits, enlarged by 30 %, fills 64 pixels; a larger width shows more.
    """
    split, L = path.name.removesuffix(".tar.gz"), SIZES["svhn"]["num_labels"]
    x, y = [], []
    with tarfile.open(path) as archive:
        content = archive.extractfile(f"{split}/digitStruct.mat").read()
        numbers = {f"{split}/{n.name}": n for n in read_digit_struct(content) if len(n.digits) < L}
        with tqdm(total=len(numbers), desc=path.name, unit="image", disable=None) as bar:
            for member in archive:
                if member.name in numbers:
                    number = numbers.pop(member.name)
                    photo = Image.open(archive.extractfile(member)).convert("L")
                    photo = photo.crop(enlarged(number.box, 1.3 * width / 64))  # black beyond
                    photo = photo.resize((width, width), Image.Resampling.BILINEAR)
                    x.append(torch.from_numpy(np.array(photo)))
                    y.append((number.digits + [TERMINAL] + [NO_LABEL] * L)[:L])
                    bar.update()
    if numbers:
        raise EOFError(f"{len(numbers)} images are missing")
    return torch.stack(x), torch.tensor(y)


def load_svhn(data_dir: str, width: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of the three archives, decoded once into a file beside them."""
    folder = Path(data_dir, "svhn")
    cache = folder / f"decoded_{width}.pt"
    if not cache.exists():
        archives = {name: folder / f"{name}.tar.gz" for name in ("train", "extra", "test")}
        decoded = {}
        try:
            for path in archives.values():
                path.stat()  # before the others take their minutes
            if not os.access(folder, os.W_OK):
                raise SystemExit(
                    f"{folder} cannot be written, and the decoded images go there: point "
                    "--data-dir at a folder of your own with links to the archives in svhn/."
                )
            for name, path in archives.items():
                decoded[name] = decode_archive(path, width)
        except Exception as error:  # whatever bytes that are no archive make h5py or Pillow raise
            raise SystemExit(
                f"{path} is missing or damaged ({error}): fetch train.tar.gz, extra.tar.gz and "
                f"test.tar.gz (2.7 GB) from {SVHN_URL} into {folder}/ and leave them packed."
            ) from None
        save_checkpoint(cache, net={}, **decoded)
    try:
        decoded = torch.load(cache)
        return {name: decoded[name] for name in ("train", "extra", "test")}
    except Exception as error:  # whatever bytes that are no cache make torch.load raise
        raise SystemExit(f"{cache} is damaged ({error!r}); delete it to make it again.") from None


IMAGES_PER_EPOCH = 50_000


class Data(NamedTuple):
    """What a run learns from and is measured on."""

    images: Tensor  # [n, 28, 28] digits to make images of, or house numbers to crop, bytes
    labels: Tensor
    validation: tuple[Tensor, Tensor]  # x [n, S, S] and y [n, L], which stay as they are
    test: tuple[Tensor, Tensor]


def load_data(args: Args, device: str) -> Data:
    """10,000 of MNIST's training digits, 5,000 of the house numbers are for validation.

    The sets are the same whether these are held out or not.
    """
    if args.task == "svhn":
        return load_house_numbers(args, device)
    generator = torch.Generator().manual_seed(2014)  # the same sets for every run and device
    load = {"mnist": partial(load_mnist, args.data_dir), "digits": load_digits}[args.dataset]
    (digits, labels), test = load("train"), load("t10k")
    held_out = len(digits) // 6  # 10,000 of 60,000
    pool = digits[:-held_out]

    def freeze(digits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.stack([torch.randperm(len(digits), generator=generator) for _ in "ab"], 1)
        x, y = make_scenes(args.task, digits, labels, chosen, pool, generator)
        return x.to(device), y.to(device)

    validation = freeze(digits[-held_out:], labels[-held_out:])
    learned = slice(-held_out if args.hold_out else None)
    return Data(digits[learned].to(device), labels[learned].to(device), validation, freeze(*test))


def load_house_numbers(args: Args, device: str) -> Data:
    """Those of train and extra, to be cropped anywhere; what is held out, in the middle."""
    S, width = args.svhn_size, round(args.svhn_size * 64 / 54)
    decoded = load_svhn(args.data_dir, width)
    images, labels = map(torch.cat, zip(decoded["train"], decoded["extra"]))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2014))
    held_out, middle = min(5000, len(images) // 6), slice((width - S) // 2, (width + S) // 2)

    def centre_crop(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, middle, middle].to(device), y.to(device)

    validation = centre_crop(images[order[:held_out]], labels[order[:held_out]])
    learned = order[held_out if args.hold_out else 0 :]
    images, labels = images[learned].to(device), labels[learned].to(device)
    return Data(images, labels, validation, centre_crop(*decoded["test"]))


def minibatches(args: Args, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's x [B, S, S] and y [B, L]: scenes of two digits, or jittered house numbers."""
    n, device = len(data.images), data.images.device
    if args.task == "svhn":
        for batch in torch.randperm(n)[:IMAGES_PER_EPOCH].to(device).split(args.batch_size):
            corner = torch.randint(data.images.shape[1] - args.svhn_size + 1, (len(batch), 2))
            index = square(corner.to(device), args.svhn_size)
            yield data.images[batch][index], data.labels[batch]
        return
    chosen = torch.stack([torch.randperm(n), torch.randperm(n)], 1).to(device)
    for batch in chosen[:IMAGES_PER_EPOCH].split(args.batch_size):
        yield make_scenes(args.task, data.images, data.labels, batch, pool=data.images)


# ---- Evaluation and training --------------------------------------------------------------------


def answer(nets: nn.ModuleList, args: Args, x: Tensor, paths: int) -> Tensor:
    """Labels [B, L]: so many sampled paths averaged, or, with 0, one path along the means."""
    if args.model == "conv":
        return nets[0](x).argmax(2)
    log_p, T = [], sizes_of(args).num_labels * nets[0].N
    for net in nets:
        part = focused(net, x, T) if args.focus else x
        std = args.location_std if paths else 0.0
        logits = [net.logits(net(part, T, args.glimpse_policy, std)) for _ in range(paths or 1)]
        log_p.append(averaged(torch.stack(logits).log_softmax(3), args.average))
    return combine(*log_p) if args.forward_backward else log_p[0].argmax(2)


def num_wrong(answers: Tensor, y: Tensor) -> int:
    """How many rows of answers [B, L] differ from y, its terminal class included."""
    return ((answers != y) & (y != NO_LABEL)).any(1).sum().item()


@torch.no_grad()
def evaluate(
    nets: nn.ModuleList, args: Args, x: Tensor, y: Tensor, prefix: str
) -> dict[str, float]:
    """Errors in percent, of whole numbers on svhn: of sampled paths averaged, of the mean path.

    The global random state is left as it was.
    """
    paths = {f"{prefix}/error": args.monte_carlo_samples or 10, f"{prefix}/error_single_path": 0}
    if args.model == "conv":
        paths = {f"{prefix}/error": 0}
    wrong = dict.fromkeys(paths, 0)
    nets.eval()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        parts = list(zip(x.split(500), y.split(500)))
        for x_part, y_part in tqdm(parts, unit="batch", leave=False, disable=None):
            for tag, M in paths.items():
                wrong[tag] += num_wrong(answer(nets, args, x_part, M), y_part)
    nets.train()
    return {tag: 100 * count / len(y) for tag, count in wrong.items()}


def minibatch_loss(
    nets: nn.ModuleList, args: Args, x: Tensor, y: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of a minibatch, summed over the directions; what the report shows of one."""
    if args.model == "conv":
        loss = -label_log_probs(nets[0](x), y).sum(1).mean()
        return loss, {"losses/cross_entropy": loss}
    if args.monte_carlo_samples > 1:
        x, y = (part.repeat_interleave(args.monte_carlo_samples, 0) for part in (x, y))
    targets = [y, right_to_left(y)] if args.forward_backward else [y]
    losses, shown = zip(*(reading_loss(net, x, y_s, args) for net, y_s in zip(nets, targets)))
    return sum(losses), shown[0]


def make_optimizer(nets: nn.ModuleList, args: Args) -> torch.optim.Optimizer:
    """Two groups of parameters: what sees and tells, then what chooses locations."""
    tell, choose = [], []
    for name, parameter in nets.named_parameters():
        part = name.split(".")[1]  # of a network
        (choose if part in ("context", "lstm2", "emission") else tell).append(parameter)
    groups = [{"params": tell}, {"params": choose}]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, args.learning_rate, fused=True)
    return torch.optim.SGD(groups, args.learning_rate, momentum=0.9, nesterov=True)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of a minibatch."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


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


OF_LOCATIONS = "location_std", "reward", "reinforce_weight", "reinforce_into_core", "location_rate"
OF_READING = "patch_size", "num_scales", "num_glimpses", "location_unit", "monte_carlo_samples"
OF_READING += ("average", *OF_LOCATIONS)


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    svhn, reads, twice = args.task == "svhn", args.model != "conv", 2 * sizes_of(args).S
    backward = args.forward_backward and not (svhn and reads)
    unlearned, blind = args.glimpse_policy != "learned", args.context != "coarse"
    looks = reads and not unlearned
    unfocused = args.focus and not (args.evaluate and svhn and args.svhn_size == 110 and looks)
    begun = args.pretrained and (args.resume or args.evaluate)
    too_wide = args.num_scales - 1 > math.log2(twice / args.patch_size)
    for refused, sentence in (
        (svhn and args.dataset != "mnist", "--dataset is for pairs and addition: leave it out."),
        (args.svhn_size != 54 and not svhn, "--svhn-size is for --task svhn: leave it out."),
        (blind and args.model != "dram", "--context is for --model dram: leave it out."),
        (unlearned and not reads, "--glimpse-policy is for dram and ram: leave it out."),
        (backward, "--forward-backward is for --task svhn and models that read: leave it out."),
        (unfocused, "--focus is for --evaluate, svhn at 110, learned glimpses: leave it out."),
        (begun, "--pretrained begins a run: leave it out with --resume and --evaluate."),
        (svhn and args.patch_size < 9, "--patch-size must be at least 9 on svhn."),
        (too_wide, f"--patch-size, doubled for each scale after one, passes {twice}, two images."),
    ):
        if refused:
            raise SystemExit(sentence)
    for holds, where, names in (  # if it holds, the flags of these names have no effect
        (not reads, f"with --model {args.model}", OF_READING),
        (unlearned, "without locations to learn", OF_LOCATIONS),
    ):
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        if holds and given:
            raise SystemExit(f"--{given[0].replace('_', '-')} has no effect {where}: leave it out.")
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


KEPT = (  # flags that a resumed run has to share with its beginning
    *("seed", "batch_size", "optimizer", "learning_rate", "learning_rate_decay", "bfloat16"),
    *("location_rate", "reward", "reinforce_weight", "reinforce_into_core"),
    "monte_carlo_samples",
)


def class_names(task: Literal["pairs", "addition", "svhn"]) -> list[str]:
    """What the drawing calls the classes."""
    if task == "pairs":
        return [f"{low}{high}" for high in range(10) for low in range(high + 1)]
    return [str(n) for n in range(19)] if task == "addition" else [*map(str, range(10)), "end"]


def draw_reading(
    net: DeepRecurrentAttentionModel, args: Args, x: Tensor, y: Tensor, path: Path
) -> None:
    """The path over 12 test images, each glimpse's finer patch, and the label read after it."""
    sizes, names = sizes_of(args), class_names(args.task)
    S, L, N, g = sizes.S, sizes.num_labels, net.N, sizes.patch_size
    figure, axes = plt.subplots(2, 6, figsize=(15, 6.2))
    with torch.no_grad():
        reading = net(x[:12], L * N, args.glimpse_policy)
        read = net.classifier(reading.r1).argmax(2).cpu()  # [12, T]
    for i, axis in enumerate(axes.flat[: len(x)]):
        labels = y[i][y[i] != NO_LABEL].tolist()
        T = N * len(labels)
        axis.imshow(x[i].cpu().numpy(), cmap="gray_r", extent=(0, S, S, 0))
        columns, rows = (reading.l[i, :T].cpu().numpy() * net.unit + S / 2).T
        axis.plot(columns, rows, "-", color="tab:blue", lw=1)
        axis.scatter(columns, rows, c=range(T), cmap="viridis", s=14, zorder=3)
        for column, row in zip(columns.round() - g // 2, rows.round() - g // 2):
            axis.add_patch(plt.Rectangle((column, row), g, g, fill=False, ec="tab:red", lw=0.8))
        steps = [" ".join(names[c] for c in part) for part in read[i, :T].split(N)]
        axis.set(title=" ".join(names[c] for c in labels), xlabel="read: " + ", ".join(steps))
        axis.set(xlim=(0, S), ylim=(S, 0), xticks=(0, S), yticks=(0, S))
    axes[0, 0].set_ylabel("pixels")
    save_figure(figure, path)


def run(args: Args, device: str) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.manual_seed(args.seed)
    nets = make_networks(args).to(device)
    optimizer = make_optimizer(nets, args)
    shaping = ("task", "model", "dataset", "context", "glimpse_policy", "forward_backward")
    shaping += ("patch_size", "num_scales", "num_glimpses", "location_unit")
    shaping += ("location_std", "hold_out") if args.resume or args.evaluate else ()
    shaping += ("svhn_size",) if args.resume or args.model == "conv" else ()
    kept = KEPT if args.resume else ()
    first_epoch, seconds, finished = 1, 0.0, False
    if path := args.resume or args.evaluate or args.pretrained:
        checkpoint = load_checkpoint(Path(path), args, nets, *shaping, *kept)
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.manual_seed(args.seed + checkpoint["epoch"])  # a GPU goes on with other draws
        first_epoch, seconds = checkpoint["epoch"] + 1, checkpoint["seconds"]
        if first_epoch > args.epochs:
            raise SystemExit(f"{args.resume} has had {first_epoch - 1} epochs: raise --epochs.")
    data = load_data(args, device)

    def evaluate_now(last: bool) -> dict[str, float]:
        """On images held out, for those who choose between runs; at last on the test set."""
        metrics = evaluate(nets, args, *data.validation, "validation") if args.hold_out else {}
        return metrics | (evaluate(nets, args, *data.test, "eval") if last else {})

    def draw_pictures(folder: Path) -> None:
        if args.model != "conv":
            draw_reading(nets[0], args, *data.test, folder / "reading.png")

    if args.evaluate:
        draw_pictures(Path(args.evaluate).parent)
        return evaluate_now(last=True)
    run_dir = open_run_dir(args, f"{args.task}_{args.model}", "multi_object_attention")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    names = []  # of what the report shows

    def learn(x: Tensor, y: Tensor) -> Tensor:
        """One update; the loss and what the report shows beside it."""
        loss, shown = minibatch_loss(nets, args, x, y)
        update(optimizer, loss)
        names[:] = "losses/loss", *shown
        return torch.stack([loss, *shown.values()]).detach()

    try:
        for epoch in tqdm(range(first_epoch, args.epochs + 1), unit="epoch", disable=None):
            start, watched = time.perf_counter(), []
            learning_rate = args.learning_rate * args.learning_rate_decay ** (epoch - 1)
            for group, factor in zip(optimizer.param_groups, (1, args.location_rate)):
                group |= {"lr": learning_rate * factor, "capturable": device == "cuda"}
            for shown in learn_from(minibatches(args, data), learn):
                refuse_infinity(shown[0].item(), f"in step {len(watched) + 1} of epoch {epoch}")
                watched.append(shown)
            took = time.perf_counter() - start
            seconds += took

            metrics = dict(zip(names, torch.stack(watched).mean(0).tolist()))
            images = min(len(data.images), IMAGES_PER_EPOCH)
            metrics["charts/SPS"] = images / took  # images per second
            metrics["charts/learning_rate"] = learning_rate
            metrics["charts/minutes"] = seconds / 60  # of training alone
            state = {"net": nets.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"rng": torch.get_rng_state(), "seconds": seconds, "args": asdict(args)}
            save_checkpoint(run_dir / "checkpoint.pt", epoch=epoch, **state)
            finished = epoch == args.epochs
            if finished or epoch % args.eval_every == 0:
                metrics |= evaluate_now(last=finished)
            report(writer, epoch, metrics)
    except KeyboardInterrupt:
        raise stopped(run_dir, finished) from None
    finally:
        writer.close()
    draw_pictures(run_dir)
    return metrics


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
