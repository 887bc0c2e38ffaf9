"""What does a natural gradient cost beside an ordinary one, and beside K-FAC?

    Measures   updates of prong.py on the autoencoder by method, a whitening, and SINGD's K-FAC
    Run        python results/speed/prong.py --output results/speed/prong.md
    Needs      an idle machine, pip install --no-deps -r results/speed/peers.txt (or no peer)
    Takes      2 minutes

Between two whitenings PRONG is SGD with one more matrix product for each layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise

import torch
import tyro
from contest import markdown, publish, race
from torch import nn

import prong


@dataclass
class Args:
    batch_size: int = 128  # images
    num_threads: int = 2  # of torch
    rounds: int = 5  # the table shows their median
    seconds: float = 3.0  # of each contender in each round
    output: str = ""  # a markdown file to write the table to


def make(args: Args, method: str) -> tuple[prong.Task, torch.optim.Optimizer, prong.Args]:
    """The autoencoder of a method on random images."""
    settings = prong.Args(method=method, batch_size=args.batch_size, learning_rate=1e-4)
    images, labels = torch.randint(256, (1000, 28, 28)), torch.randint(10, (1000,))
    task = prong.Task(
        net=prong.autoencoder(method, settings.whitening_samples),
        x=images.byte(),
        y=labels,
        prepare=lambda x, training: (x / 255).flatten(1),
        loss=prong.reconstruction_loss,
        held_out={},
    )
    return task, prong.make_optimizer(task.net, settings), settings


def update(args: Args, method: str) -> Callable[[], None]:
    task, optimizer, _ = make(args, method)
    return lambda: prong.update(task, optimizer, args.batch_size).item()


def whitening(args: Args) -> Callable[[], None]:
    task, optimizer, settings = make(args, "prong")
    return lambda: prong.rewhiten(
        task.net, prong.draw(task, settings.whitening_samples)[0], optimizer, settings
    )


def kfac(args: Args, period: int) -> Callable[[], None]:
    """SINGD with dense factors as K-FAC, its curvature renewed every `period` updates."""
    from singd.optim.optimizer import SINGD

    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.Sigmoid()]
    net = nn.Sequential(*layers[:-1])
    optimizer = SINGD(net, lr=1e-4, kfac_like=True, T=period)
    x = torch.rand(args.batch_size, 784)

    def step() -> None:
        loss = prong.reconstruction_loss(net(x), x, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    contenders = {method: update(args, method) for method in prong.Method.__args__}
    for method in prong.Method.__args__:
        contenders[f"{method}-256"] = update(replace(args, batch_size=256), method)
    contenders["one whitening"] = whitening(args)
    if find_spec("singd"):
        contenders["K-FAC (singd), curvature every update"] = kfac(args, 1)
        contenders["K-FAC (singd), every 10 updates"] = kfac(args, 10)
    took = race(contenders, args.rounds, args.seconds)
    whiten = took.pop("one whitening")
    rows = []
    for name, milliseconds in took.items():
        rows.append([name, f"{milliseconds:.1f}", f"{milliseconds / took['sgd']:.2f}"])
        for period in (10, 100, 1000) if name == "prong" else ():
            amortised = milliseconds + whiten / period
            what = f"prong with its whitening every {period:,} updates"
            rows.append([what, f"{amortised:.1f}", f"{amortised / took['sgd']:.2f}"])
    titles = [f"update of the autoencoder, batch {args.batch_size} (or 256)", "ms", "times SGD"]
    tables = [markdown(titles, rows), f"One whitening of all layers takes {whiten:.0f} ms."]
    publish("Natural neural networks", args.num_threads, tables, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
