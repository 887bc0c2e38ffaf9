"""Recurrent attention model (RAM): reads an image through a few small glimpses it chooses itself.

    Paper    Mnih et al., "Recurrent models of visual attention", NIPS 2014
    Shows    a few glimpses read a digit anywhere and among clutter (tables 1, 2), and play a game
    Run      python recurrent_visual_attention.py
    Result   0.62 % of MNIST wrong by ten paths of six glimpses (seeds 1 to 3, 0.56 to 0.69; by one
               path alone 1.46) in 16 min on one core of an AMD EPYC, beside another run; paper:
               1.12 (NIPS)
    Run      python recurrent_visual_attention.py --task translated
    Result   0.92 % of moved digits wrong (seeds 1 to 3, 0.85 to 1.00; of one path alone 1.47) in
               24 min on one core, beside another run; paper: 1.20 (NIPS)
    Run      python recurrent_visual_attention.py --task cluttered --epochs 200
    Result   2.28 % of cluttered digits wrong (seed 1; of one path alone 3.86) in 122 min on a part
               of one core, beside other runs; paper: 4.04 (NIPS)
    Run      python recurrent_visual_attention.py --task cluttered100 --epochs 200
    Result   3.84 % of digits in 100x100 pixels of clutter wrong (seed 1; of one path alone 6.40) in
               58 min without pauses on one core, beside other runs; paper: 8.11 (NIPS)
    Run      python recurrent_visual_attention.py --task catch --epochs 300
    Result   96.2 % of balls caught (seeds 1 to 3: 97.0, 93.3, 98.3) after 14 million frames in
               21 min on one core, beside another run; paper: about 85 after 20 million

Departures: ours (the paper's). Numbers are compared with the NIPS version, not with arXiv's.
    Adam, 1e-3 falling to 0 by epochs, batch 64 (SGD, momentum 0.9, batch 20, rate searched)
    location deviation 0.15 of half the image's width (searched, not told), a tenth of the rate for
      the location network (the rate); samples are clipped to the image where they are looked at,
      their means are not bounded (not told)
    the reward is the probability of the right class, the mean reward of a class drawn from the
      softmax (0 or 1; whether for a drawn or the likeliest class is not told; --reward correct: the
      likeliest)
    the policy gradient, weighted 0.3, trains core and glimpse network, too (weight not told; can
      be read as training the location network alone: --reinforce-into-core False)
    the recurrent matrix of the images' core begins as the identity (not told)
    the baseline is linear in h_t and trains itself alone (may depend on h_t; whether it trains the
      core is not told)
    glimpses lie on whole pixels, coarse ones are means of blocks (not told); the convolutional
      baseline has 8 filters (arXiv's: 16)
    images: 100 or 200 epochs, M = 1 path an image (not told), the first glimpse anywhere (random)
    the reported error averages 10 paths; beside it stands that of one path along the means (not
      told)
    clutter is added to the digit and the sum clipped ("added"), for all sets from digits that are
      trained on; zeros outside the image (not told)
    catch: the locations' gradient does not enter the core (treated as that of the moves, through
      all of the network), so that Adam takes no notice of its weight of 0.3
    catch: the baseline's error, halved, trains the core, too (not told)
    catch: entropy of the move is rewarded with 0.002 (REINFORCE alone)
    catch: a block counts its lit pixels, the core begins with open forget gates, the glimpse
      network with He's weights; reported are the likeliest moves and mean locations, the mean of
      three seeds (not told; the best of a search)
    catch: the ball starts anywhere, drifting -1, 0 or 1 columns a frame, the paddle in the middle,
      the first glimpse anywhere (not told); 300 epochs are 14 million frames (20 million)

Symbols: x image, y label, l_t location (x, y) in [-1, 1]^2 with (-1, -1) the top left corner, mu_t
its mean, rho retina, g_t glimpse, h_t state of the core, b_t baseline, R reward, M paths per image.
Shapes: B images, S their width, N glimpses, k scales of g x g pixels.
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
from collections.abc import Iterator, Sequence
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

Task = Literal["mnist", "translated", "cluttered", "cluttered100", "catch"]
Reward = Literal["probability", "correct"]


@dataclass
class Args:
    # The method
    task: Task = "mnist"  # what is learned: digits as they are, moved, cluttered, or the game Catch
    model: Literal["ram", "conv", "fc"] = "ram"  # conv, fc: the paper's baselines, which see it all
    glimpse_policy: Literal["learned", "random", "centre"] = "learned"  # where the model looks
    patch_size: int = 0  # g, pixels; 0: the paper's for the task (8, 12 or 6)
    num_scales: int = 0  # k, patches of a glimpse; 0: the paper's for the task (1, 3 or 4)
    num_glimpses: int = 0  # N; 0: 6 on mnist, else 8 (catch: one per frame)
    reward: Reward = "probability"  # of the right class; correct: 1 if it is the likeliest
    location_std: float = 0.15  # deviation of a location around its mean, in half image widths
    reinforce_weight: float = 0.3  # of the location policy's gradient beside the others
    reinforce_into_core: bool | None = None  # location policy trains core, too; None: not on catch
    monte_carlo_samples: int = 0  # M, paths per image; 0: 1 in training, 10 averaged in evaluation
    entropy_cost: float = 0.002  # catch: reward for undecided moves
    fc_width: int = 256  # units of both hidden layers of fc (paper: 64 or 256)
    # Optimisation
    epochs: int = 100  # of 50,000 images (digits: 1,250; catch: 1,984 games, 46,000 frames)
    batch_size: int = 64  # images of a minibatch, or games
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd: momentum 0.9, the paper's, wants 0.01
    learning_rate: float = 1e-3  # at the start; falls linearly to 0
    location_rate: float = 0.1  # factor on --learning-rate for the location network (paper: 1)
    # The run
    dataset: Literal["mnist", "digits"] = "mnist"  # digits: scikit-learn's, needs no download
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    eval_every: int = 5  # epochs between two evaluations on validation images; at the end always
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number but those of the fixed sets
    run_dir: str = ""  # for logs, pictures, checkpoint.pt; default runs/TASK_MODEL__SCRIPT__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A task's images and how they are looked at."""

    S: int  # pixels, the width of an image
    patch_size: int  # g
    num_scales: int  # k
    num_glimpses: int  # N
    num_clutter: int  # pieces of other digits in an image


SETTINGS = {  # section 4
    "mnist": (28, 8, 1, 6, 0),
    "translated": (60, 12, 3, 8, 0),
    "cluttered": (60, 12, 3, 8, 4),
    "cluttered100": (100, 12, 4, 8, 8),
    "catch": (24, 6, 3, 23, 0),
}


def setting_of(args: Args) -> Setting:
    """The paper's, unless flags say otherwise."""
    paper = Setting(*SETTINGS[args.task])
    return paper._replace(
        patch_size=args.patch_size or paper.patch_size,
        num_scales=args.num_scales or paper.num_scales,
        num_glimpses=args.num_glimpses or paper.num_glimpses,
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
    """g_t from what the retina sees and where it looks (section 3.1, figure 1B)."""

    def __init__(self, retina_size: int):
        super().__init__()
        self.what, self.where = nn.Linear(retina_size, 128), nn.Linear(2, 128)
        self.from_what, self.from_where = nn.Linear(128, 256), nn.Linear(128, 256)

    def forward(self, rho: Tensor, l: Tensor) -> Tensor:
        h_g, h_l = F.relu(self.what(rho.flatten(1))), F.relu(self.where(l))
        return F.relu(self.from_what(h_g) + self.from_where(h_l))  # [B, 256]


class CoreNetwork(nn.Module):
    """h_t from h_(t-1) and g_t; with lstm the state is a pair (section 3.1).

    At first it keeps its state: the recurrent matrix is an identity, forget gates are open.
    """

    def __init__(self, lstm: bool):
        super().__init__()
        self.lstm = nn.LSTMCell(256, 256) if lstm else None
        if self.lstm is not None:
            nn.init.zeros_(self.lstm.bias_ih)
            nn.init.zeros_(self.lstm.bias_hh)
            nn.init.ones_(self.lstm.bias_hh.detach()[256:512])  # the second of four gates
        else:
            self.from_h, self.from_g = nn.Linear(256, 256), nn.Linear(256, 256)
            nn.init.eye_(self.from_h.weight)
            nn.init.zeros_(self.from_h.bias)

    def forward(self, g: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.lstm is not None:
            return self.lstm(g, state)
        return (F.relu(self.from_h(state[0]) + self.from_g(g)),)

    def initial_state(self, B: int) -> tuple[Tensor, ...]:
        zeros = next(self.parameters()).new_zeros(B, 256)
        return (zeros,) if self.lstm is None else (zeros, zeros)


class ActionNetwork(nn.Linear):
    """Logits of the action [B, A] from h_t: the class of an image, or a move of the paddle."""


class LocationNetwork(nn.Linear):
    """mu_t [B, 2], the mean of the next location, from h_t."""


class RecurrentAttentionModel(nn.Module):
    """Retina, glimpse network, core, and on top of it action, location and baseline (figure 1C)."""

    def __init__(self, patch_size: int, num_scales: int, num_actions: int, lstm: bool):
        super().__init__()
        self.retina = RetinaSensor(patch_size, num_scales)
        self.glimpse = GlimpseNetwork(num_scales * patch_size**2)
        self.core = CoreNetwork(lstm)
        self.action = ActionNetwork(256, num_actions)
        self.location = LocationNetwork(256, 2)
        self.baseline = nn.Linear(256, 1)
        if lstm:  # Catch: blocks add up lit pixels, so that a ball of one counts in all of them
            self.retina.areas.fill_(255)
            for layer in self.glimpse.children():
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(
        self, table: Tensor, l: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One glimpse at l; returns h_t [B, 256] and the core's state."""
        state = self.core(self.glimpse(self.retina(table, l), l), state)
        return state[0], state


class Glimpses(NamedTuple):
    """The glimpses of a minibatch; sample, mu and h are empty unless the model chose."""

    logits: Tensor  # [B, 10] after the last glimpse
    l: Tensor  # [N, B, 2] where it looked, within the image
    sample: Tensor  # [N-1, B, 2] the samples of the policy that l_1 .. l_(N-1) are clipped from
    mu: Tensor  # [N-1, B, 2] their means
    h: Tensor  # [N-1, B, 256] the states that chose them


def look(
    net: RecurrentAttentionModel,
    table: Tensor,
    num_glimpses: int,
    policy: str = "learned",
    std: float = 0.0,
    reinforce_into_core: bool = True,
) -> Glimpses:
    """A path of N glimpses over images, given as integral images [B, S+1, S+1].

    learned: the first location is anywhere, the next ones are drawn around the network's means, or
    with std 0 are the means; random: all are anywhere; centre: all in the middle. No location is
    chosen after the last glimpse.
    """
    B, state = len(table), net.core.initial_state(len(table))
    centre = torch.zeros(num_glimpses, B, 2, device=table.device)
    anywhere = torch.empty_like(centre).uniform_(-1, 1)
    l = list(centre if policy == "centre" else anywhere)  # they stay, unless the policy is learned
    samples, states = [], []
    for n in range(num_glimpses):
        h, state = net(table, l[n], state)
        if policy == "learned" and n < num_glimpses - 1:
            with torch.no_grad():
                samples.append(net.location(h) + std * torch.randn_like(l[n]))
            l[n + 1] = samples[-1].clamp(-1, 1)
            states.append(h)
    looked = net.action(h), torch.stack(l)
    if not samples:
        return Glimpses(*looked, *(torch.zeros(0) for _ in range(3)))
    h_t = torch.stack(states)
    mu = net.location(h_t if reinforce_into_core else h_t.detach())
    return Glimpses(*looked, torch.stack(samples), mu, h_t)


def location_log_prob(sample: Tensor, mu: Tensor, std: float) -> Tensor:
    """log pi(sample) of a Gaussian with one deviation for x and y, [..., 2] to [...]."""
    return -(sample - mu).square().sum(-1) / (2 * std**2) - math.log(2 * math.pi * std**2)


def reinforce_loss(log_pi: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """Its gradient estimates that of -E[R] (eq. 2), a sum over time, a mean over paths.

    log_pi and b are [T, B], R [B] comes at the end.
    """
    return -(log_pi * (R - b).detach()).sum(0).mean()


def baseline_loss(R: Tensor, b: Tensor) -> Tensor:
    """(R - b_t)^2 fits b_t to the reward that follows (section 3.2)."""
    return (R - b).square().sum(0).mean()


def reward_for(logits: Tensor, y: Tensor, kind: str) -> Tensor:
    """R [B], at the last step alone.

    probability: what a class drawn from the softmax earns on average, 1 for the right one. As an
    expectation it has less variance than a draw, and rewards being sure. correct: 1
    where the likeliest class is right.
    """
    if kind == "correct":
        return (logits.argmax(-1) == y).float()
    return logits.detach().softmax(-1).gather(1, y[:, None]).squeeze(1)


def hybrid_loss(
    net: RecurrentAttentionModel, seen: Glimpses, y: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy for the class, REINFORCE for the locations (section 3.2, hybrid supervised)."""
    R = reward_for(seen.logits, y, args.reward)
    classification = F.cross_entropy(seen.logits, y)
    losses = {"losses/cross_entropy": classification, "charts/reward": R.mean()}
    if not len(seen.mu):
        return classification, losses
    b = net.baseline(seen.h.detach()).squeeze(-1)  # [N-1, B]
    log_pi = location_log_prob(seen.sample, seen.mu, args.location_std)
    locating, fitting = reinforce_loss(log_pi, R, b), baseline_loss(R, b)
    losses |= {"losses/reinforce": locating, "losses/baseline": fitting}
    return classification + args.reinforce_weight * locating + fitting, losses


class ConvolutionalNetwork(nn.Sequential):
    """The paper's baseline: 8 filters of 10x10, stride 5, then 256 units; sees all of x."""

    def __init__(self, S: int):
        size = 8 * ((S - 10) // 5 + 1) ** 2
        layers = [nn.Conv2d(1, 8, 10, 5), nn.ReLU(), nn.Flatten(), nn.Linear(size, 256), nn.ReLU()]
        super().__init__(*layers, nn.Linear(256, 10))


class FullyConnectedNetwork(nn.Sequential):
    """The paper's other baseline: two hidden layers; sees all of x."""

    def __init__(self, S: int, width: int):
        layers = [nn.Flatten(), nn.Linear(S * S, width), nn.ReLU(), nn.Linear(width, width)]
        super().__init__(*layers, nn.ReLU(), nn.Linear(width, 10))


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


def make_images(
    digits: Tensor, S: int, num_clutter: int, pool: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Images [B, S, S] of translated and cluttered digits [B, 28, 28], and where the digits are.

    To each come num_clutter 8x8 pieces of other digits, drawn from pool (section 4.1). Bytes.
    """
    B, device = len(digits), digits.device
    if digits.shape[-1] == S and not num_clutter:
        return digits, torch.zeros(B, 2, device=device)
    canvas = torch.zeros(B, S, S, dtype=torch.int16, device=device)
    centres = place(canvas, digits, generator)
    for _ in range(num_clutter):
        other = torch.randint(len(pool), (B, 1, 1), generator=generator, device=device)
        corner = torch.randint(28 - 8 + 1, (B, 2), generator=generator, device=device)
        rows, columns = (corner[:, :, None] + torch.arange(8, device=device)).unbind(1)
        place(canvas, pool[other, rows[:, :, None], columns[:, None, :]], generator)
    return canvas.clamp_(max=255).byte(), centres


class Images(NamedTuple):
    """A data set that stays as it is, for validation or test."""

    x: Tensor  # [N, S, S] bytes
    y: Tensor  # [N] labels
    centres: Tensor  # [N, 2] where the digits are, as locations


def load_images(args: Args, device: str) -> tuple[Tensor, Tensor, Images, Images]:
    """Digits and labels for training; the frozen sets for validation and test."""
    load = {"mnist": partial(load_mnist, args.data_dir), "digits": load_digits}[args.dataset]
    (digits, labels), (test_digits, test_labels) = load("train"), load("t10k")
    held_out = len(digits) // 6  # 10,000 of 60,000
    pool, setting = digits[:-held_out], setting_of(args)
    generator = torch.Generator().manual_seed(2014)  # the same sets for every run and device

    def freeze(digits: Tensor, labels: Tensor) -> Images:
        x, centres = make_images(digits, setting.S, setting.num_clutter, pool, generator)
        return Images(x.to(device), labels.to(device), centres.to(device))

    validation = freeze(digits[-held_out:], labels[-held_out:])
    test = freeze(test_digits, test_labels)
    return pool.to(device), labels[:-held_out].to(device), validation, test


# ---- The game -----------------------------------------------------------------------------------


GAMES_PER_EPOCH, GAMES_IN_EVALUATION = 2_000, 5_000


class Catch:
    """B games side by side of a ball that falls and a paddle that is to be there (section 4.2).

    The ball starts anywhere in the top row and moves -1, 0 or 1 columns per frame, off the walls.
    The paddle of two pixels starts in the middle. A game ends when the ball is in the bottom row.
    """

    def __init__(self, B: int, S: int, device: torch.device | str):
        self.S, self.row = S, 0
        self.column = torch.randint(S, (B,), device=device)
        self.drift = torch.randint(-1, 2, (B,), device=device)
        self.paddle = torch.full_like(self.column, S // 2 - 1)  # its left pixel

    def screen(self) -> Tensor:
        """[B, S, S], bytes of 0 and 255."""
        games = torch.arange(len(self.column), device=self.column.device)
        screen = torch.zeros(
            len(games), self.S, self.S, dtype=torch.uint8, device=self.column.device
        )
        screen[games, self.row, self.column] = 255
        screen[games, -1, self.paddle] = screen[games, -1, self.paddle + 1] = 255
        return screen

    def step(self, a: Tensor) -> Tensor:
        """Move the paddles by a - 1 (left, stay, right), then the balls; 1 where one is caught."""
        self.paddle = (self.paddle + a - 1).clamp(0, self.S - 2)
        self.row += 1
        column = self.column + self.drift
        self.drift = torch.where((column < 0) | (column >= self.S), -self.drift, self.drift)
        self.column = self.column + self.drift
        caught = (self.column == self.paddle) | (self.column == self.paddle + 1)
        return (caught & (self.row == self.S - 1)).float()


class Play(NamedTuple):
    """B games of Catch and the policy's part in them."""

    log_pi_a: Tensor  # [T, B] of the moves
    log_pi_l: Tensor  # [T-1, B] of the locations that were looked at
    entropy: Tensor  # [T, B] of the moves
    b: Tensor  # [T, B]
    R: Tensor  # [B] 1 for a caught ball
    screens: Tensor  # [T+1, B, S, S], the last one after the last move
    l: Tensor  # [T+1, B, 2] where it looked; the last one, after the last move, is not looked at


def play_catch(
    net: RecurrentAttentionModel,
    B: int,
    S: int,
    std: float,
    greedy: bool,
    reinforce_into_core: bool = False,
) -> Play:
    """Whole games. greedy: the likeliest move and the mean location instead of samples."""
    device = net.baseline.weight.device
    game, state = Catch(B, S, device), net.core.initial_state(B)
    l = torch.rand(B, 2, device=device) * 2 - 1
    frames = []
    for _ in range(S - 1):
        screen = game.screen()
        h, state = net(integral_image(screen), l, state)
        log_pi = net.action(h).log_softmax(-1)  # [B, 3]
        pi = log_pi.exp().nan_to_num(1)  # of no numbers any: the loss will tell
        a = log_pi.argmax(-1) if greedy else pi.multinomial(1).squeeze(1)
        mu = net.location(h if reinforce_into_core else h.detach())
        sample = mu.detach() if greedy else (mu + std * torch.randn_like(mu)).detach()
        log_pi_a = log_pi.gather(1, a[:, None]).squeeze(1)
        log_pi_l = location_log_prob(sample, mu, std)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        frames.append((log_pi_a, log_pi_l, entropy, net.baseline(h)[:, 0], screen, l))
        l, R = sample.clamp(-1, 1), game.step(a)
    log_pi_a, log_pi_l, entropy, b, screens, looked = map(torch.stack, zip(*frames))
    screens, looked = torch.cat([screens, game.screen()[None]]), torch.cat([looked, l[None]])
    return Play(log_pi_a, log_pi_l[:-1], entropy, b, R, screens, looked)


def catch_loss(play: Play, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE for moves and locations, no labels: the reward comes after the last frame.

    Here the baseline's error trains the core, too: what foretells the end also tells the best move.
    """
    acting = reinforce_loss(play.log_pi_a, play.R, play.b)
    locating = reinforce_loss(play.log_pi_l, play.R, play.b[:-1])
    fitting, entropy = baseline_loss(play.R, play.b), play.entropy.sum(0).mean()
    losses = {"losses/reinforce": acting + locating, "losses/baseline": fitting}
    losses |= {"losses/entropy": entropy / len(play.b), "charts/reward": play.R.mean()}
    loss = acting + args.reinforce_weight * locating + fitting / 2 - args.entropy_cost * entropy
    return loss, losses


# ---- Evaluation and training --------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    net: nn.Module, args: Args, images: Images | None, prefix: str = "eval"
) -> dict[str, float]:
    """Errors and catches in percent: of one path along the means, of sampled paths averaged.

    Without images: of games of Catch. The global random state is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        if images is None:
            scores = evaluate_catch(net, args)
        elif args.model == "ram":
            scores = evaluate_glimpses(net, args, images)
        else:
            said = torch.cat([net(x[:, None] / 255).argmax(1) for x in images.x.split(1000)])
            scores = {"error": 100 * (said != images.y).float().mean().item()}
    return {f"{prefix}/{name}": value for name, value in scores.items()}


def evaluate_catch(net: nn.Module, args: Args) -> dict[str, float]:
    """Balls caught, in percent: by the likeliest moves and mean locations, and by samples."""
    S, B = setting_of(args).S, GAMES_IN_EVALUATION
    greedy = play_catch(net, B, S, args.location_std, greedy=True)
    sampled = play_catch(net, B, S, args.location_std, greedy=False)
    caught = {"caught": greedy.R, "caught_sampled": sampled.R}
    return {name: 100 * R.mean().item() for name, R in caught.items()}


def evaluate_glimpses(net: nn.Module, args: Args, images: Images) -> dict[str, float]:
    """Errors in percent, and how far from the digit the last glimpse lies."""
    setting, M = setting_of(args), args.monte_carlo_samples or 10
    wrong, wrong_along_means, distance = 0, 0, 0.0
    parts = list(zip(*(part.split(1000) for part in images)))
    for x, y, centres in tqdm(parts, unit="batch", leave=False, disable=None):
        see = partial(look, net, integral_image(x), setting.num_glimpses, args.glimpse_policy)
        p = sum(see(std=args.location_std).logits.softmax(1) for _ in range(M))
        wrong += (p.argmax(1) != y).sum().item()
        seen = see(std=0.0)
        wrong_along_means += (seen.logits.argmax(1) != y).sum().item()
        distance += (seen.l[-1] - centres).norm(dim=1).sum().item()
    total = len(images.y)
    return {
        "error": 100 * wrong / total,
        "error_single_path": 100 * wrong_along_means / total,
        # pixels from the last glimpse to the digit's centre
        "distance": distance / total * setting.S / 2,
    }


def make_network(args: Args) -> nn.Module:
    """The network of --model, for the images or the game of --task."""
    S, patch_size, num_scales, *_ = setting_of(args)
    if args.model == "conv":
        return ConvolutionalNetwork(S)
    if args.model == "fc":
        return FullyConnectedNetwork(S, args.fc_width)
    catch = args.task == "catch"
    num_actions = 3 if catch else 10
    return RecurrentAttentionModel(patch_size, num_scales, num_actions, lstm=catch)


def image_losses(
    net: nn.Module, args: Args, digits: Tensor, labels: Tensor
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The losses of an epoch's minibatches, each made and looked at after the last one's step."""
    setting = setting_of(args)
    for batch in torch.randperm(len(digits)).to(digits.device).split(args.batch_size):
        x, _ = make_images(digits[batch], setting.S, setting.num_clutter, pool=digits)
        y = labels[batch]
        if args.model != "ram":
            loss = F.cross_entropy(net(x[:, None] / 255), y)
            yield loss, {"losses/cross_entropy": loss}
            continue
        table, M = integral_image(x), args.monte_carlo_samples or 1
        if M > 1:
            table, y = table.repeat_interleave(M, 0), y.repeat_interleave(M, 0)
        how = args.glimpse_policy, args.location_std, args.reinforce_into_core is not False
        seen = look(net, table, setting.num_glimpses, *how)
        yield hybrid_loss(net, seen, y, args)


def game_losses(net: nn.Module, args: Args) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The losses of an epoch's minibatches of games, each played after the last one's step."""
    B, S, into_core = args.batch_size, setting_of(args).S, args.reinforce_into_core is True
    play = partial(play_catch, net, B, S, args.location_std, reinforce_into_core=into_core)
    for _ in range(GAMES_PER_EPOCH // B):
        yield catch_loss(play(greedy=False), args)


def make_optimizer(net: nn.Module, args: Args) -> torch.optim.Optimizer:
    """Two groups of parameters: all others, then the location network's."""
    location, others = [], []
    for name, parameter in net.named_parameters():
        (location if name.startswith("location.") else others).append(parameter)
    groups = [{"params": others}, {"params": location}]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, args.learning_rate, fused=True)
    return torch.optim.SGD(groups, args.learning_rate, momentum=0.9)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of a minibatch."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


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


OF_GLIMPSES = "patch_size", "num_scales", "num_glimpses"
OF_LOCATIONS = "location_std", "reward", "reinforce_weight", "reinforce_into_core", "location_rate"


def check_flags(args: Args) -> None:
    """Refuse combinations of flags that no run can have."""
    setting, catch, ram = setting_of(args), args.task == "catch", args.model == "ram"
    too_many, twice = catch and args.batch_size > GAMES_PER_EPOCH, 2 * setting.S
    too_wide = ram and setting.num_scales - 1 > math.log2(twice / setting.patch_size)
    looks, unlearned = ram and not catch, args.glimpse_policy != "learned"
    paths = args.monte_carlo_samples
    for refused, sentence in (
        (catch and not ram, "--task catch is played by --model ram alone: leave --model out."),
        (catch and args.dataset != "mnist", "--dataset is for images: leave it out."),
        (catch and args.num_glimpses, "--num-glimpses is for images: leave it out."),
        (too_many, f"--batch-size must be at most {GAMES_PER_EPOCH}, the games of an epoch."),
        (unlearned and not looks, "--glimpse-policy is for ram on images: leave it out."),
        (paths and not looks, "--monte-carlo-samples is for ram on images: leave it out."),
        (too_wide, f"--patch-size, doubled for each scale after one, passes {twice}, two images."),
    ):
        if refused:
            raise SystemExit(sentence)
    for holds, where, names in (  # if it holds, the flags of these names have no effect
        (not ram, f"with --model {args.model}", OF_GLIMPSES + OF_LOCATIONS),
        (args.model != "fc", f"with --model {args.model}", ("fc_width",)),
        (unlearned, "without locations to learn", OF_LOCATIONS),
        (not catch, "on images", ("entropy_cost",)),
        (catch, "on catch", ("reward",)),
    ):
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        if holds and given:
            raise SystemExit(f"--{given[0].replace('_', '-')} has no effect {where}: leave it out.")
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


KEPT = (  # flags that a resumed run has to share with its beginning
    *("seed", "batch_size", "optimizer", "learning_rate", "location_rate"),
    *("reward", "reinforce_weight", "reinforce_into_core", "monte_carlo_samples", "entropy_cost"),
)


def draw_glimpses(net: nn.Module, args: Args, images: Images, path: Path) -> None:
    """The model's path over test images, with the patches of its first and last glimpse."""
    S, patch_size, num_scales, num_glimpses, _ = setting_of(args)
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.4))
    with torch.no_grad():
        table = integral_image(images.x[:12])
        seen = look(net, table, num_glimpses, args.glimpse_policy, std=0.0)
    for i, axis in enumerate(axes.flat):
        axis.imshow(images.x[i].cpu().numpy(), cmap="gray_r")
        x, y = (((seen.l[:, i].cpu().numpy() + 1) / 2 * S).round() - 0.5).T  # as the retina rounds
        axis.plot(x, y, "-", color="tab:blue", lw=1)
        axis.scatter(x, y, c=range(num_glimpses), cmap="viridis", s=14, zorder=3)
        for n, colour in ((0, "tab:gray"), (-1, "tab:red")):  # the first and the last glimpse
            for width in (patch_size * 2**scale for scale in range(num_scales)):
                corner = x[n] - width / 2, y[n] - width / 2
                axis.add_patch(plt.Rectangle(corner, width, width, fill=False, ec=colour, lw=0.8))
        axis.set(title=f"{images.y[i]} read as {seen.logits[i].argmax()}", xticks=[], yticks=[])
        axis.set(xlim=(-0.5, S - 0.5), ylim=(S - 0.5, -0.5))
    save_figure(figure, path)


@torch.no_grad()
def film_catch(net: nn.Module, args: Args, path: Path) -> None:
    """Eight games as a GIF; a red square shows where the finest patch of the retina lies."""
    S, patch_size, *_ = setting_of(args)
    play, frames = play_catch(net, 8, S, args.location_std, greedy=True), []
    corners = ((play.l + 1) / 2 * S).round().long() - patch_size // 2  # [T+1, B, 2]
    for i in range(8):
        for screen, corner in zip(play.screens[:, i].cpu(), corners[:, i].cpu()):
            picture = screen.numpy().repeat(8, 0).repeat(8, 1)[..., None].repeat(3, 2)
            x0, y0 = (8 * corner).clamp(0, 8 * S - 1).tolist()
            x1, y1 = (8 * (corner + patch_size) - 1).clamp(0, 8 * S - 1).tolist()
            picture[[y0, y1], x0 : x1 + 1] = picture[y0 : y1 + 1, [x0, x1]] = (255, 60, 60)
            frames.append(Image.fromarray(picture))
    write_gif(frames, path, 60)


def run(args: Args, device: str) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    torch.manual_seed(args.seed)
    net = make_network(args).to(device)
    optimizer = make_optimizer(net, args)
    shaping = ("task", "model", "dataset", "patch_size", "num_scales", "num_glimpses", "fc_width")
    shaping += ("glimpse_policy", "location_std")
    kept = KEPT if args.resume else ()
    first_epoch, seconds, finished = 1, 0.0, False
    if path := args.resume or args.evaluate:
        checkpoint = load_checkpoint(Path(path), args, net, *shaping, *kept)
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.manual_seed(args.seed + checkpoint["epoch"])  # a GPU goes on with other draws
        first_epoch, seconds = checkpoint["epoch"] + 1, checkpoint["seconds"]
        if first_epoch > args.epochs:
            raise SystemExit(f"{args.resume} has had {first_epoch - 1} epochs: raise --epochs.")
    validation = test = None
    minibatch_losses = partial(game_losses, net, args)
    if args.task != "catch":
        digits, labels, validation, test = load_images(args, device)
        minibatch_losses = partial(image_losses, net, args, digits, labels)

    def evaluate_now(last: bool) -> dict[str, float]:
        """On validation images, for those who choose between runs; at last on the test set."""
        if args.task == "catch":
            return evaluate(net, args, None)
        metrics = evaluate(net, args, validation, "validation")
        return metrics | (evaluate(net, args, test) if last else {})

    def draw_pictures(folder: Path) -> None:
        if args.task == "catch":
            film_catch(net, args, folder / "games.gif")
        elif args.model == "ram":
            draw_glimpses(net, args, test, folder / "glimpses.png")

    if args.evaluate:
        draw_pictures(Path(args.evaluate).parent)
        return evaluate_now(last=True)
    run_dir = open_run_dir(args, f"{args.task}_{args.model}", "recurrent_visual_attention")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    try:
        for epoch in tqdm(range(first_epoch, args.epochs + 1), unit="epoch", disable=None):
            start, watched = time.perf_counter(), []
            for group, factor in zip(optimizer.param_groups, (1, args.location_rate)):
                group["lr"] = factor * args.learning_rate * (1 - (epoch - 1) / args.epochs)
            for loss, parts in minibatch_losses():
                refuse_infinity(loss.item(), f"in step {len(watched) + 1} of epoch {epoch}")
                update(optimizer, loss)
                watched.append(torch.stack([loss, *parts.values()]).detach())
            took = time.perf_counter() - start
            seconds += took

            metrics = dict(zip(["losses/loss", *parts], torch.stack(watched).mean(0).tolist()))
            examples = len(watched) * args.batch_size if test is None else len(digits)
            metrics["charts/SPS"] = examples / took  # images or games per second
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/minutes"] = seconds / 60  # of training alone
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        return run(args, choose_device(args.device))
    except KeyboardInterrupt:  # before or after training
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
