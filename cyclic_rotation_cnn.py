"""Cyclic symmetry: four layers that make a convolutional network equivariant to quarter turns.

    Paper    Dieleman et al., "Exploiting cyclic symmetry in convolutional neural networks", ICML
               2016
    Shows    networks that turn their feature maps need fewer filters and err less (table 2)
    Run      python cyclic_rotation_cnn.py --bfloat16 --epochs 20
    Result   1.72 % of turned digits wrong (seeds 1 to 3; without cyclic layers 4.26) in 12 min on
               one core of an AMD EPYC, beside other runs; the paper has no digits
    Run      python cyclic_rotation_cnn.py --variant roll-all --bfloat16 --epochs 20
    Result   1.78 % of them with a third of the parameters (seeds 1 to 3; a network as small
               without cyclic layers 6.28) in 6 min on one core of the same, beside other runs
    Run      python cyclic_rotation_cnn.py --dataset plankton --bfloat16 --epochs 36
    Result   0.859 of cross-entropy on a hold-out of plankton (seed 1; without cyclic layers 0.963)
               in 6 min on an NVIDIA H100, beside other programs; paper, length not told: 0.678
               (0.704)
    Run      python cyclic_rotation_cnn.py --dataset plankton --image-size 47 --bfloat16 --epochs 10
    Result   1.183 of the same on smaller pictures (seed 1; without 1.551) in 101 min on one core,
               beside other runs

Departures: ours (the paper's)
    rotated-mnist and digits with a network of our own (plankton, galaxies, buildings), made here:
      in training new angles in every epoch, so not the published set of that name
    paths are pooled before the ReLU, none follows (before or after, the mean before was best;
      whether one follows is not told)
    equal epochs: a sliced network makes four times the steps, each on a quarter of the pictures,
      which it sees in four directions (the same batches, steps not told)
    Adam 1e-3, divided by 10 after 85 and 95 % of 60 epochs, batch 128, decay 1e-4 (values not
      told); whole epochs count: ten, as in the last Run line, have one drop, before the last
    plankton: ink is 1, background 0; galaxies and buildings lie between -1 and 1 (not told)
    augmentation: any rotation; plankton also shift 4 %, each side by up to 1.3, shear 15 degrees,
      flips, galaxies flips (only rotation told); buildings: tiles on a grid, quarter turns, which
      sliced networks do not feel, and flips, one a minibatch (tiles anywhere, any rotation)
    scores of a hold-out of 10 %, on plankton of every class (of Kaggle's servers); buildings: of
      the labelled middles of whole tiles (border not told)
    galaxies: squared error of sigmoids; buildings: cross-entropy of a pixel (losses not told)
    rolls between convolutions turn the filters, which is the same function, more than twice as fast
      (maps; --turned maps does it)
    weights begin as He et al. advise for rectifiers (not told)
    --bfloat16, 16 bits, is ours, off by default, and in the Run lines
    the group is C4 alone: D4, with reflections, doubles the copies and brought the authors little

Symbols: r turns a picture clockwise by a quarter; four paths x_0 ... x_3 lie along the batch axis,
all of x_0 first; s shifts the paths backward, s[x_0, x_1, x_2, x_3] = [x_1, x_2, x_3, x_0].
Shapes: B pictures of C channels, S their width in pixels.
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
from collections.abc import Callable
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
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Dataset = Literal["rotated-mnist", "plankton", "galaxies", "buildings", "digits"]
Variant = Literal["baseline", "half", "pool", "roll-all", "roll-dense", "roll-half"]
How = Literal["mean", "max", "rms"]


@dataclass
class Args:
    # The method
    variant: Variant = "pool"  # of the network; baseline and half have no cyclic layers
    pool: How = "mean"  # how the four paths become one, before the output layer
    turned: Literal["filters", "maps"] = "filters"  # in rolls between convolutions (paper: maps)
    image_size: int = 0  # pixels of a side; 0: the paper's (buildings: small ones overlap more)
    # Optimisation
    epochs: int = 60  # passes over the training set
    batch_size: int = 128  # images of a step; sliced networks: a quarter as many, in four turns
    learning_rate: float = 1e-3  # of Adam; divided by 10 after 85 and 95 % of the epochs
    weight_decay: float = 1e-4  # on plankton alone
    bfloat16: bool = False  # the network computes in 16 bits: half the time
    # The run
    dataset: Dataset = "rotated-mnist"  # digits: scikit-learn's, turned, need no download
    data_dir: str = "data"  # holds data sets in their publishers' folders; missing ones are fetched
    eval_every: int = 5  # epochs between two evaluations; at the end always
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    seed: int = 1  # of every random number but those of the fixed sets
    run_dir: str = ""  # for logs, pictures, checkpoint.pt; default runs/DATASET_VARIANT__...
    resume: str = ""  # a checkpoint.pt to continue from, in its own folder
    evaluate: str = ""  # a checkpoint.pt to evaluate instead of training


# ---- The method ---------------------------------------------------------------------------------


def turn(x: Tensor, k: int) -> Tensor:
    """r^k x: k quarter turns clockwise. Features of dense layers have no space to turn in."""
    return torch.rot90(x, -k, (-2, -1)) if x.dim() == 4 and k else x


def turned_back(x: Tensor) -> list[Tensor]:
    """x_0, r^-1 x_1, r^-2 x_2, r^-3 x_3: the paths aligned."""
    return [turn(x_k, -k) for k, x_k in enumerate(x.chunk(4))]


class CyclicSlice(nn.Module):
    """S(x) = [x, r x, r^2 x, r^3 x] along the batch (section 3.1). S(r x) = s S(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([turn(x, k) for k in range(4)])  # [4 B, ...]


class CyclicPool(nn.Module):
    """P(x) = p(x_0, r^-1 x_1, r^-2 x_2, r^-3 x_3) (section 3.1).

    P(s x) = P(x) for dense features, P(s x) = r P(x) for maps.
    """

    def __init__(self, how: How = "mean"):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack(turned_back(x))  # [4, B, ...]
        if self.how == "mean":
            return paths.mean(0)
        return paths.amax(0) if self.how == "max" else (paths.square().mean(0) + 1e-12).sqrt()


class CyclicStack(nn.Module):
    """T(x) = [x_0, r^-1 x_1, r^-2 x_2, r^-3 x_3] along the channels (section 3.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(turned_back(x), 1)  # [B, 4 C, ...]


class CyclicRoll(nn.Module):
    """R(x) = [T(x), T(s x), T(s^2 x), T(s^3 x)] along the batch (section 3.3). R(s x) = s R(x).

    All four at once: channels r^-j s^j x for j = 0 ... 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        paths = x.chunk(4)
        blocks = [turn(torch.cat([*paths[j:], *paths[:j]]), -j) for j in range(4)]
        return torch.cat(blocks, 1)  # [4 B, 4 C, ...]


class CyclicUnstack(nn.Module):
    """The inverse of T: paths x_0 ... x_3 along the batch from T(x) [B, 4 C, S, S]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([turn(x_k, k) for k, x_k in enumerate(x.chunk(4, 1))])  # [4 B, C, S, S]


class TurnedConv2d(nn.Conv2d):
    """T(w * R(x)) for T(x) [B, 4 C, S, S]: what turns is the filters w, not the maps.

    One product without copies: path k, turned back, is r^-k(w * r^k x) = (r^-k w) * x. It has a
    bias; stride, dilation and groups are 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.chunk(4, 1)  # path k applies them to x_k, x_k+1, x_k+2, x_k+3
        filters = torch.cat([turn(torch.cat([*w[-k:], *w[:-k]], 1), -k) for k in range(4)])
        return F.conv2d(x, filters, self.bias.repeat(4), padding=self.padding)


class Layout(NamedTuple):
    """A network of figure 6."""

    size: int  # S of its pictures
    channels: int  # of its pictures
    stages: tuple[tuple[int, ...], ...]  # filters of each convolution; stages end with max-pooling
    kernel: int  # width of a filter
    padded: bool  # convolutions keep the size
    pooling: tuple[int, int]  # width and stride; (1, 1): none
    dense: tuple[int, int]  # units of the two hidden dense layers; 0: none, then 1x1 convolutions
    outputs: int


def layout_of(dataset: Dataset) -> Layout:
    """The networks of figure 6, and one of ours for digits."""
    layouts = {
        "rotated-mnist": Layout(
            size=28,
            channels=1,
            stages=((32, 32), (64, 64)),
            kernel=3,
            padded=True,
            pooling=(2, 2),
            dense=(256, 256),
            outputs=10,
        ),
        "plankton": Layout(
            size=95,
            channels=1,
            stages=((32, 32), (64, 64), (128, 128, 128), (128, 128, 128)),
            kernel=3,
            padded=True,
            pooling=(3, 2),
            dense=(512, 512),
            outputs=121,
        ),
        "galaxies": Layout(
            size=64,
            channels=3,
            stages=((32, 32), (64, 64), (128, 128, 128), (256, 256, 256)),
            kernel=3,
            padded=True,
            pooling=(2, 2),
            dense=(2048, 2048),
            outputs=37,
        ),
        "buildings": Layout(
            size=80,
            channels=3,
            stages=((32,) * 5 + (64,) * 5,),
            kernel=5,
            padded=False,
            pooling=(1, 1),
            dense=(0, 256),
            outputs=1,
        ),
    }
    return layouts["rotated-mnist" if dataset == "digits" else dataset]


FEWER = {"half": 2, "roll-all": 4, "roll-half": 2}  # filters divided by


def sliced(variant: Variant) -> bool:
    """Whether the network has cyclic layers."""
    return variant not in ("baseline", "half")


class CyclicNetwork(nn.Sequential):
    """A network of figure 6 in one of its variants: slice first, pool before the output layer.

    roll-all, roll-half roll after every convolution and the first dense layer, roll-dense after the
    latter alone. A roll makes 4 C channels of C, so the layers before it have a quarter or half of
    the filters (FEWER). turned says what turns in the rolls between convolutions: the maps, or the
    filters of the next one.
    """

    def __init__(
        self,
        layout: Layout,
        variant: Variant,
        outputs: int,
        how: How = "mean",
        turned: Literal["maps", "filters"] = "filters",
        bfloat16: bool = False,
    ):
        fewer, rolls = FEWER.get(variant, 1), variant in ("roll-all", "roll-half")
        size, n = layout.size, layout.channels
        layers = [CyclicSlice()] if sliced(variant) else []
        turns_filters = rolls and turned == "filters"
        convolution, roll = nn.Conv2d, [CyclicStack() if turns_filters else CyclicRoll()] * rolls
        for stage in layout.stages:
            for i, filters in enumerate(stage, start=1):
                padding = "same" if layout.padded else "valid"
                layers.append(convolution(n, filters // fewer, layout.kernel, padding=padding))
                if not layout.padded:
                    size -= layout.kernel - 1
                if i == len(stage) and layout.pooling != (1, 1):
                    width, stride = layout.pooling
                    if size < width or (size - width) % stride:
                        raise SystemExit(
                            f"--image-size {layout.size} makes maps of {size} pixels, which no "
                            "pooling treats alike on all sides: take 0 or, for plankton, 47; for "
                            "galaxies 32."
                        )
                    layers.append(nn.MaxPool2d(width, stride))  # first: fewer to cut and to copy
                    size = (size - width) // stride + 1
                layers += [nn.ReLU(), *roll]
                n = filters // fewer * (4 if rolls else 1)
                if turns_filters:
                    convolution, roll = TurnedConv2d, []
        layers += [CyclicUnstack(), CyclicRoll()] * turns_filters
        first, second = layout.dense
        if first:
            rolls = rolls or variant == "roll-dense"
            first //= 2 if variant == "roll-dense" else fewer
            layers += [nn.Flatten(), nn.Dropout(), nn.Linear(n * size**2, first), nn.ReLU()]
            layers += [CyclicRoll()] * rolls
            hidden = [nn.Dropout(), nn.Linear(first * (4 if rolls else 1), second)]
            last = [nn.Dropout(), nn.Linear(second, outputs)]
        else:
            hidden, last = [nn.Conv2d(n, second, 1)], [nn.Conv2d(second, outputs, 1)]
        super().__init__(*layers, *hidden, CyclicPool(how) if sliced(variant) else nn.ReLU(), *last)
        for layer in self:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # faster
        self.in_16_bits = bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, outputs], buildings [B, 1, S - 40, S - 40], of pictures x [B, C, S, S]."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_16_bits):
            return super().forward(x).to(x.dtype)


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


class Pictures(NamedTuple):
    """Pictures [N, C, S, S] (galaxies: 1.5 S wide) as bytes and what is to be said of them."""

    x: Tensor
    y: Tensor  # labels [N]; galaxies: answers [N, 37]; buildings: maps [N, S, S] as bytes


def warp(
    x: Tensor,
    generator: torch.Generator | None = None,
    shift: float = 0.0,
    stretch: float = 1.0,
    shear: float = 0.0,
    flips: bool = False,
) -> Tensor:
    """Pictures x [B, C, S, S] turned by any angle and, each at random, moved by up to shift (share
    of the width), zoomed and stretched by up to a factor, sheared by up to shear degrees, flipped.
    """
    B, device = len(x), x.device

    def draw(bound: float) -> Tensor:
        return bound * (2 * torch.rand(B, generator=generator, device=device) - 1)

    angle, slant = draw(math.pi), draw(shear).deg2rad()
    wide, high = draw(math.log(stretch)).exp(), draw(math.log(stretch)).exp()
    if flips:
        wide = wide * torch.where(draw(1.0) < 0, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * wide, -(angle + slant).sin() * high, draw(2 * shift)]
    rows += [sin * wide, (angle + slant).cos() * high, draw(2 * shift)]
    grid = F.affine_grid(torch.stack(rows, 1).view(B, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def load_rotated(args: Args) -> tuple[Pictures, Pictures]:
    """12,000 digits for training, upright: every minibatch turns them; 50,000 turned for tests."""
    load = load_digits if args.dataset == "digits" else partial(load_mnist, args.data_dir)
    parts = [load(split) for split in ("train", "t10k")]
    x, y = (torch.cat(part) for part in zip(*parts))
    generator = torch.Generator().manual_seed(2016)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order][:, None], y[order]
    N = 12_000 if args.dataset == "rotated-mnist" else 1300
    turned = [warp(part.float(), generator) for part in x[N : N + 50_000].split(1000)]
    return Pictures(x[:N], y[:N]), Pictures(torch.cat(turned).round().byte(), y[N : N + 50_000])


def read_picture(path: Path, mode: Literal["L", "RGB"]) -> Image.Image:
    """A picture, grey or in colour."""
    try:
        with Image.open(path) as picture:
            return picture.convert(mode)
    except OSError as error:  # also what is no picture
        raise SystemExit(f"{path} is damaged ({error}); unpack it again.") from None


def cached(path: Path, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Pictures and answers from a cache file, which make() fills the first time."""
    if not path.exists():
        x, y = make()
        try:
            with open(path.with_suffix(".part"), "wb") as file:
                np.savez(file, x=x, y=y)
            path.with_suffix(".part").replace(path)
        except OSError as error:
            raise SystemExit(f"{path} cannot be written ({error}): change --data-dir.") from None
    try:
        with np.load(path) as arrays:
            return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    except Exception as error:  # whatever a damaged archive makes numpy raise
        raise SystemExit(f"{path} is damaged ({error!r}); delete it to make it again.") from None


def missing(folder: Path, what: str) -> SystemExit:
    """What ends a run on data that have to be fetched by hand."""
    return SystemExit(f"{folder} is missing. {what} Or use --dataset rotated-mnist or digits.")


def load_plankton(args: Args, S: int) -> tuple[Pictures, Pictures]:
    """Pictures, white on black, longest side S pixels; a tenth of each class is for tests."""
    folder = Path(args.data_dir, "plankton", "train")
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    if not classes:
        raise missing(
            folder,
            "Download train.zip from kaggle.com/c/datasciencebowl (with an account) and unpack it, "
            "pictures in train/CLASS/*.jpg.",
        )

    def make() -> tuple[np.ndarray, np.ndarray]:
        files = [sorted(path.glob("*.jpg")) for path in classes]
        for path, found in zip(classes, files):
            if len(found) < 2:
                raise SystemExit(
                    f"{path} holds {len(found)} pictures, 2 are needed: unpack it again."
                )
        y = np.repeat(np.arange(len(classes)), [len(found) for found in files])
        x = np.zeros((len(y), 1, S, S), np.uint8)
        for i, path in enumerate(
            tqdm([path for found in files for path in found], unit="picture", disable=None)
        ):
            picture = read_picture(path, "L")
            scale = S / max(picture.size)
            size = [max(1, round(scale * side)) for side in picture.size]
            ink = 255 - np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
            top, left = (S - ink.shape[0]) // 2, (S - ink.shape[1]) // 2
            x[i, 0, top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        return x, y

    x, y = cached(folder.parent / f"train_{S}.npz", make)
    return split(x, y, stratify=y)


def load_galaxies(args: Args, S: int) -> tuple[Pictures, Pictures]:
    """Galaxies at a quarter of their size, room to turn the middle SxS pixels, 37 answers each."""
    folder = Path(args.data_dir, "galaxies")
    pictures, table = folder / "images_training_rev1", folder / "training_solutions_rev1.csv"
    if not pictures.is_dir() or not table.exists():
        raise missing(
            folder,
            "Download images_training_rev1.zip and training_solutions_rev1.zip from "
            "kaggle.com/c/galaxy-zoo-the-galaxy-challenge and unpack both there.",
        )

    def make() -> tuple[np.ndarray, np.ndarray]:
        try:
            answers = np.loadtxt(table, delimiter=",", skiprows=1, ndmin=2)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{table} is damaged ({error}); unpack it again.") from None
        if answers.shape[1] != 38:
            raise SystemExit(f"{table} has {answers.shape[1]} columns, not 38: unpack it again.")
        x = np.zeros((len(answers), 3, 106, 106), np.uint8)
        for i, number in enumerate(tqdm(answers[:, 0], unit="picture", disable=None)):
            picture = read_picture(pictures / f"{number:.0f}.jpg", "RGB").resize((106, 106))
            x[i] = np.asarray(picture).transpose(2, 0, 1)
        corner = (106 - S - S // 2) // 2
        x = x[:, :, corner : 106 - corner, corner : 106 - corner]
        return x, answers[:, 1:].astype(np.float32)

    return split(*cached(folder / f"training_{S}.npz", make))


def load_buildings(args: Args, S: int) -> tuple[Pictures, Pictures]:
    """Tiles of SxS pixels of aerial pictures and of maps of their buildings."""
    folder, parts = Path(args.data_dir, "buildings"), []
    for part in ("train", "test"):
        satellite, maps = folder / part / "sat", folder / part / "map"
        files = sorted(
            path for path in satellite.glob("*") if path.suffix in (".tiff", ".tif", ".png")
        )
        if not files:
            raise missing(
                satellite,
                "Download the Massachusetts buildings (cs.toronto.edu/~vmnih/data), pictures into "
                "train/sat, train/map, test/sat and test/map.",
            )

        def make(files: list[Path] = files, maps: Path = maps) -> tuple[np.ndarray, np.ndarray]:
            x, y = [], []
            for path in tqdm(files, unit="picture", disable=None):
                label = next(maps.glob(f"{path.stem}.*"), None)
                if label is None:
                    raise SystemExit(f"{maps} has no map for {path.name}: unpack it again.")
                picture = np.asarray(read_picture(path, "RGB")).transpose(2, 0, 1)
                houses = 255 * (np.asarray(read_picture(label, "L")) > 0).astype(np.uint8)
                if houses.shape != picture.shape[1:] or min(houses.shape) < S:
                    raise SystemExit(
                        f"{path} and {label} must be of one size and at least {S} pixels wide: "
                        "unpack them again, or lower --image-size."
                    )
                step = S - 40  # the labelled middles of the tiles lie side by side
                for top in range(0, picture.shape[1] - S + 1, step):
                    for left in range(0, picture.shape[2] - S + 1, step):
                        x.append(picture[:, top : top + S, left : left + S])
                        y.append(houses[top : top + S, left : left + S])
            return np.stack(x), np.stack(y)

        parts.append(Pictures(*cached(folder / f"{part}_{S}.npz", make)))
    return parts[0], parts[1]


def split(x: Tensor, y: Tensor, stratify: Tensor | None = None) -> tuple[Pictures, Pictures]:
    """Nine tenths for training and one for tests, the same in every run."""
    try:
        train, test = train_test_split(
            np.arange(len(y)), test_size=0.1, random_state=2016, stratify=stratify
        )
    except ValueError as error:
        raise SystemExit(f"There are too few pictures to hold some out ({error}).") from None
    return Pictures(x[train], y[train]), Pictures(x[test], y[test])


# ---- Evaluation and training --------------------------------------------------------------------


def prepare(x: Tensor, args: Args, training: bool) -> Tensor:
    """The network's input in [0, 1] or [-1, 1]; in training turned and otherwise varied."""
    x = x.float() / 255
    if training and args.dataset == "plankton":
        x = warp(x, shift=0.04, stretch=1.3, shear=15.0, flips=True)
    elif training and args.dataset != "buildings":
        x = warp(x, flips=args.dataset == "galaxies")
    if args.dataset == "galaxies":  # turned with what surrounds them, then cut
        edge = (x.shape[-1] - (args.image_size or 64)) // 2
        x = x[:, :, edge : x.shape[-1] - edge, edge : x.shape[-1] - edge]
    return 2 * x - 1 if args.dataset in ("galaxies", "buildings") else x


def quarter_turns(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures and maps of a minibatch, all turned and flipped alike."""
    k, flip = torch.randint(4, ()).item(), torch.rand(()).item() < 0.5
    x, y = torch.rot90(x, k, (-2, -1)), torch.rot90(y, k, (-2, -1))
    return (x.flip(-1), y.flip(-1)) if flip else (x, y)


def centre(y: Tensor, size: int) -> Tensor:
    """The middle [B, size, size] of maps as 0 and 1."""
    edge = (y.shape[-1] - size) // 2
    return (y[:, edge : edge + size, edge : edge + size] > 127).float()


def objective(output: Tensor, y: Tensor, dataset: str) -> Tensor:
    """Cross-entropy of classes or pixels; squared error of the galaxies' answers."""
    if dataset == "galaxies":
        return (output.sigmoid() - y).square().mean()
    if dataset == "buildings":
        output = output[:, 0]
        return F.binary_cross_entropy_with_logits(output, centre(y, output.shape[-1]))
    return F.cross_entropy(output, y)


@torch.no_grad()
def predict(net: nn.Module, x: Tensor, args: Args) -> Tensor:
    """The network's outputs for all pictures x, without dropout."""
    net.eval()
    parts = x.split(args.batch_size * (1 if sliced(args.variant) else 4))
    parts = tqdm(parts, unit="batch", leave=False, disable=None)
    outputs = torch.cat([net(prepare(part, args, training=False)) for part in parts])
    net.train()
    return outputs


def evaluate(net: nn.Module, args: Args, examples: Pictures) -> dict[str, float]:
    """Loss and the data set's own score: percent of errors, RMSE, or area under the ROC curve."""
    output, y = predict(net, examples.x, args), examples.y
    metrics = {"eval/loss": objective(output, y, args.dataset).item()}
    if args.dataset == "galaxies":
        return metrics | {"eval/rmse": metrics["eval/loss"] ** 0.5}
    if args.dataset == "buildings":
        houses = centre(y, output.shape[-1]).flatten().cpu().numpy()
        return metrics | {"eval/auc": float(roc_auc_score(houses, output.flatten().cpu().numpy()))}
    return metrics | {"eval/error": 100 * (output.argmax(1) != y).float().mean().item()}


def update(
    net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, dataset: str
) -> Tensor:
    """One step on a minibatch; returns its loss."""
    loss = objective(net(x), y, dataset)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def learning_rate_at(epoch: int, args: Args) -> float:
    """Two tenfold drops near the end; the first epoch is 1."""
    passed = (epoch - 1) / args.epochs
    return args.learning_rate / 10 ** ((passed >= 0.85) + (passed >= 0.95))


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
    if args.variant == "roll-half" and args.dataset != "buildings":
        raise SystemExit("--variant roll-half is a network of --dataset buildings alone.")
    if args.variant == "roll-dense" and args.dataset == "buildings":
        raise SystemExit("--dataset buildings has no dense layer for --variant roll-dense.")
    if (args.dataset == "galaxies" and args.image_size > 64) or (
        args.dataset == "buildings" and (0 < args.image_size <= 40 or args.image_size % 2)
    ):
        raise SystemExit(
            "--image-size must be at most 64 for galaxies, even and above 40 for buildings, "
            f"not {args.image_size}."
        )
    if args.image_size and args.dataset in ("rotated-mnist", "digits"):
        raise SystemExit("--image-size is for plankton, galaxies and buildings: leave it out.")
    if args.batch_size % 4:
        raise SystemExit(
            f"--batch-size must be a multiple of 4, for the four paths, not {args.batch_size}."
        )
    variant, rolls = f"with --variant {args.variant}", args.variant in ("roll-all", "roll-half")
    for holds, where, names in (  # if it holds, the flags of these names have no effect
        (not sliced(args.variant), variant, ("pool",)),
        (not rolls, variant, ("turned",)),
        (args.dataset != "plankton", f"on {args.dataset}", ("weight_decay",)),
    ):
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        if holds and given:
            raise SystemExit(f"--{given[0].replace('_', '-')} has no effect {where}: leave it out.")
    if args.run_dir and not args.evaluate and os.path.exists(Path(args.run_dir, "checkpoint.pt")):
        open_run_dir(args, "", "")  # refuses it before anything is loaded


KEPT = (  # flags that a resumed run has to share with its beginning
    *("seed", "batch_size", "learning_rate", "weight_decay", "bfloat16"),
)


@torch.no_grad()
def draw_paths(net: nn.Module, args: Args, examples: Pictures, path: Path) -> None:
    """The strongest map of the first convolution, path by path, of a picture and its turns."""
    x = prepare(examples.x[:1], args, training=False)
    last = next(i for i, layer in enumerate(net) if isinstance(layer, nn.ReLU))
    maps_of = nn.Sequential(*list(net)[: last + 1])
    strongest = maps_of(x).sum((0, 2, 3)).argmax()
    figure, axes = plt.subplots(4, 5, figsize=(7, 5.8))
    for k in range(4):
        turned = turn(x, k)
        maps = maps_of(turned)  # [4 or 1, C, S, S]
        axes[k, 0].imshow(turned[0].mean(0).cpu().numpy(), cmap="gray_r")
        axes[k, 0].set(ylabel=f"{90 * k} degrees")
        for i in range(4):
            if i < len(maps):
                axes[k, i + 1].imshow(maps[i, strongest].cpu().numpy(), cmap="viridis")
            axes[0, i + 1].set(title=f"path {i}")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set(title="picture")
    save_figure(figure, path)


def draw_answers(net: nn.Module, args: Args, examples: Pictures, path: Path) -> None:
    """Confusion matrix; buildings: a predicted map beside its label; galaxies: a scatter plot."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    count = 1 if args.dataset == "buildings" else 5000
    output = predict(net, examples.x[:count], args).cpu()
    y = examples.y[:count].cpu()
    if args.dataset == "buildings":
        edge = (y.shape[-1] - output.shape[-1]) // 2  # of the picture, which nothing is said of
        middle = slice(edge, y.shape[-1] - edge)
        pictures = [examples.x[0, :, middle, middle].cpu().permute(1, 2, 0)]
        pictures.append(output[0, 0].sigmoid())
        pictures.append(centre(y[:1], output.shape[-1])[0])
        for axis, picture, title in zip(axes, pictures, ("aerial picture", "predicted", "label")):
            axis.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(title=title, xticks=[], yticks=[])
    elif args.dataset == "galaxies":
        for i, axis in enumerate(axes):
            axis.plot(y[:, i], output[:, i].sigmoid(), ".", ms=1)
            axis.set(xlabel=f"answer {i + 1}", ylabel="predicted")
    else:
        n = output.shape[1]
        counts = torch.bincount(y * n + output.argmax(1), minlength=n * n).view(n, n).float()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        axes[0].imshow(shares.numpy(), cmap="magma_r", vmin=0, vmax=1)
        axes[0].set(xlabel="said", ylabel="true", title="share of a class")
        wrong = (output.argmax(1) != y).nonzero()[:2, 0].tolist()
        for axis, i in zip(axes[1:], wrong):
            axis.imshow(examples.x[i, 0].cpu().numpy(), cmap="gray_r")
            axis.set(title=f"{y[i]} taken for {output[i].argmax()}", xticks=[], yticks=[])
    save_figure(figure, path)


def run(args: Args, device: str) -> dict[str, float]:
    """Train, or evaluate a checkpoint."""
    layout = layout_of(args.dataset)
    layout = layout._replace(size=args.image_size or layout.size)
    with torch.device("meta"):
        CyclicNetwork(layout, args.variant, layout.outputs)  # refuses sizes before data are read
    readers = {"plankton": load_plankton, "galaxies": load_galaxies, "buildings": load_buildings}
    if args.dataset in readers:
        train, test = readers[args.dataset](args, layout.size)
    else:
        train, test = load_rotated(args)
    train, test = (Pictures(*(part.to(device) for part in examples)) for examples in (train, test))
    outputs = layout.outputs
    if args.dataset == "plankton":
        outputs = int(max(train.y.max(), test.y.max())) + 1
    torch.manual_seed(args.seed)
    net = CyclicNetwork(layout, args.variant, outputs, args.pool, args.turned, args.bfloat16)
    net = net.to(device)
    parameters = sum(p.numel() for p in net.parameters())
    tqdm.write(f"{parameters:,} parameters")
    decay = args.weight_decay if args.dataset == "plankton" else 0.0
    fused = partial(torch.optim.Adam, fused=True)
    optimizer = fused(net.parameters(), args.learning_rate, weight_decay=decay)
    shaping = ("dataset", "variant", "image_size", "pool", "turned")
    first_epoch, seconds, finished = 1, 0.0, False

    def draw_pictures(folder: Path) -> None:
        draw_paths(net, args, test, folder / "paths.png")
        draw_answers(net, args, test, folder / "answers.png")

    if args.evaluate:
        load_checkpoint(Path(args.evaluate), args, net, *shaping)
        draw_pictures(Path(args.evaluate).parent)
        return evaluate(net, args, test)
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume), args, net, *shaping, *KEPT)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.manual_seed(args.seed + checkpoint["epoch"])  # a GPU goes on with other draws
        first_epoch, seconds = checkpoint["epoch"] + 1, checkpoint["seconds"]
        if first_epoch > args.epochs:
            raise SystemExit(f"{args.resume} has had {first_epoch - 1} epochs: raise --epochs.")

    run_dir = open_run_dir(args, f"{args.dataset}_{args.variant}", "cyclic_rotation_cnn")
    writer = SummaryWriter(run_dir)
    writer.add_text("args", "\n".join(f"    {key}={value}" for key, value in asdict(args).items()))
    new_pictures = args.batch_size // (4 if sliced(args.variant) else 1)  # the slice makes the rest
    try:
        for epoch in tqdm(range(first_epoch, args.epochs + 1), unit="epoch", disable=None):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(epoch, args)
            start, losses = time.perf_counter(), []
            for batch in torch.randperm(len(train.y)).to(device).split(new_pictures):
                x, y = prepare(train.x[batch], args, training=True), train.y[batch]
                if args.dataset == "buildings":
                    x, y = quarter_turns(x, y)
                losses.append(update(net, optimizer, x, y, args.dataset))
                refuse_infinity(losses[-1].item(), f"in step {len(losses)} of epoch {epoch}")
            took = time.perf_counter() - start
            seconds += took

            metrics = {"losses/loss": torch.stack(losses).mean().item()}
            metrics["charts/SPS"] = len(train.y) / took  # images per second
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/minutes"] = seconds / 60  # of training alone
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"rng": torch.get_rng_state(), "seconds": seconds, "args": asdict(args)}
            save_checkpoint(run_dir / "checkpoint.pt", epoch=epoch, **state)
            finished = epoch == args.epochs
            if finished or epoch % args.eval_every == 0:
                metrics |= evaluate(net, args, test)
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
