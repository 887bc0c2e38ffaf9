"""What does a spatial transformer add to a training step, and what do the distortions?

    Measures   training steps of spatial_transformer_mnist.py with and without transformers, the
               distortions alone, and the transformer's warps beside kornia's
    Run        python results/speed/stn.py --seconds 0.5 --output results/speed/stn.md
    Needs      an idle machine, pip install --no-deps -r results/speed/peers.txt (or no kornia)
    Takes      a minute

Images are random pixels, which cost what digits cost.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import tyro
from contest import markdown, publish, race
from torch import Tensor

import spatial_transformer_mnist as stn


@dataclass
class Args:
    batch_size: int = 256  # images
    num_threads: int = 2  # of torch
    rounds: int = 5  # the table shows their median
    seconds: float = 3.0  # of each contender in each round
    output: str = ""  # a markdown file to write the tables to


def examples(args: Args, settings: stn.Args) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Makes minibatches; of random pixels, which cost what digits cost."""
    digits, labels = torch.rand(1000, 28, 28), torch.randint(10, (1000,))
    generator = torch.Generator().manual_seed(1)

    def make() -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(len(digits), (args.batch_size,), generator=generator)
        return stn.make_examples(digits, labels, chosen, settings, generator)

    return make


def training_step(args: Args, model: str, transform: str) -> Callable[[], None]:
    """An update on R (28 x 28) without making its images."""
    settings = stn.Args(model=model, transform=transform, distortion="R")
    net = stn.make_transformer_network(settings)
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    x, y, _ = examples(args, settings)()
    return lambda: stn.update(net, optimizer, x, y).item()


def warp(args: Args, transform: str) -> Callable[[], None]:
    """Grid generator and sampler, forward and backward, on 28 x 28."""
    U = torch.rand(args.batch_size, 1, 28, 28, requires_grad=True)
    identity = stn.identity(transform)
    theta = (identity + 0.1 * torch.randn(args.batch_size, len(identity))).requires_grad_()
    B = stn.basis(transform, stn.target_grid(28, 28))

    def step() -> None:
        points = stn.sampling_points(transform, theta, B)
        torch.autograd.grad(stn.sampler(U, points, 28).sum(), [U, theta])

    return step


def kornia_warp(args: Args, transform: str) -> Callable[[], None]:
    """The same with kornia's layers."""
    from kornia.geometry import transform as kornia

    U = torch.rand(args.batch_size, 1, 28, 28, requires_grad=True)
    if transform == "affine":
        theta = torch.eye(2, 3) + 0.1 * torch.randn(args.batch_size, 2, 3)
        theta.requires_grad_()

        def V() -> Tensor:
            return kornia.warp_affine(U, theta, (28, 28), align_corners=True)
    else:
        points = stn.control_points().expand(args.batch_size, 16, 2)
        theta = (points + 0.1 * torch.randn_like(points)).requires_grad_()

        def V() -> Tensor:
            weights, affine = kornia.get_tps_transform(points, theta)
            return kornia.warp_image_tps(U, points, weights, affine, align_corners=True)

    return lambda: torch.autograd.grad(V().sum(), [U, theta])


def main(args: Args) -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the script does
    torch.set_num_threads(args.num_threads)
    steps, making, warps = {}, {}, {}
    for model in ("cnn", "fcn"):
        for transform in ("none", "affine", "projective", "tps"):
            steps[f"{model}, {transform}"] = training_step(args, model, transform)
    for distortion in stn.CANVAS:
        making[distortion] = examples(args, stn.Args(distortion=distortion))
    for transform in ("affine", "tps"):
        warps[f"{transform}, ours"] = warp(args, transform)
        if find_spec("kornia"):
            warps[f"{transform}, kornia"] = kornia_warp(args, transform)
    took = race(steps | making | warps, args.rounds, args.seconds)

    rows = []
    for name in steps:
        bare = took[name.split(",")[0] + ", none"]
        share = 100 * took["R"] / (took["R"] + took[name])
        rows.append(
            [
                name,
                f"{took[name]:.1f}",
                f"{took[name] / bare:.2f}",
                f"{took['R']:.1f}",
                f"{share:.0f}",
            ]
        )
    titles = [f"training step on R, batch {args.batch_size}", "ms", "times that without"]
    tables = [markdown([*titles, "images made in, ms", "% of all"], rows)]
    rows = [[name, f"{took[name]:.1f}"] for name in making]
    tables.append(markdown([f"{args.batch_size} images distorted by", "ms"], rows))
    rows = []
    for name in warps:
        ours = took[name.split(",")[0] + ", ours"]
        rows.append([name, f"{took[name]:.1f}", f"{took[name] / ours:.2f}"])
    tables.append(markdown(["warp, forward and backward", "ms", "times ours"], rows))
    publish("Spatial transformer networks", args.num_threads, tables, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
