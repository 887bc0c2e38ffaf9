"""What do the cyclic layers cost, and how fast is a steerable network of the same symmetry?

    Measures   training steps of cyclic_rotation_cnn.py's variants (28 x 28), beside escnn's C4
    Run        python results/speed/cyclic.py --output results/speed/cyclic.md
    Needs      an idle machine, pip install --no-deps -r results/speed/peers.txt (or no escnn)
    Takes      3 minutes

At equal effective batch: a sliced network gets a quarter of the pictures and sees each four times.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from unittest.mock import MagicMock

import torch
import tyro
from contest import markdown, publish, race
from torch import nn

import cyclic_rotation_cnn as cyclic


@dataclass
class Args:
    batch_size: int = 128  # pictures that the network sees at once
    num_threads: int = 2  # of torch
    rounds: int = 5  # the table shows their median
    seconds: float = 3.0  # of each contender in each round
    output: str = ""  # a markdown file to write the table to


def training_step(net: nn.Module, pictures: int) -> Callable[[], None]:
    """One update on random pictures, without making them."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-6, fused=True)
    x, y = torch.rand(pictures, 1, 28, 28), torch.randint(10, (pictures,))
    return lambda: cyclic.update(net, optimizer, x, y, "rotated-mnist").item()


def steerable_network(fields: tuple[int, ...], hidden: int) -> nn.Module:
    """escnn's C4 network of regular fields in the places of our convolutions, then dense layers."""
    for name in ("", ".representations", ".representations.SO3", ".representations.SO3.wigner_d"):
        sys.modules["lie_learn" + name] = MagicMock()  # built for NumPy 1; C4 needs nothing of it
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.rot2dOnR2(N=4)
    kind = enn.FieldType(space, [space.trivial_repr])
    layers, given = [], kind
    for i, n in enumerate(fields):
        made = enn.FieldType(space, n * [space.regular_repr])
        layers += [enn.R2Conv(given, made, kernel_size=3, padding=1), enn.ReLU(made)]
        if i % 2:
            layers.append(enn.PointwiseMaxPool(made, 2))
        given = made
    layers.append(enn.GroupPooling(given))

    class Steerable(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = enn.SequentialModule(*layers)
            dense = [nn.Linear(fields[-1] * 49, hidden), nn.ReLU(), nn.Dropout()]
            dense += [nn.Linear(hidden, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10)]
            self.dense = nn.Sequential(nn.Flatten(), nn.Dropout(), *dense)

        def forward(self, x):
            return self.dense(self.maps(enn.GeometricTensor(x, kind)).tensor)

    return Steerable()


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    layout, quarter = cyclic.layout_of("rotated-mnist"), args.batch_size // 4
    nets, pictures = {}, {}
    for variant in ("baseline", "half", "pool", "roll-all", "roll-dense"):
        nets[variant] = cyclic.CyclicNetwork(layout, variant, 10)
        sliced = variant not in ("baseline", "half")
        pictures[variant] = quarter if sliced else args.batch_size
    nets["roll-all, maps turned"] = cyclic.CyclicNetwork(layout, "roll-all", 10, turned="maps")
    pictures["roll-all, maps turned"] = quarter
    if find_spec("escnn"):
        # as many fields as roll-all has filters, the first dense layer made to fit its parameters
        name = "escnn, C4 regular fields"
        nets[name] = steerable_network((8, 8, 16, 16), 261)
        pictures[name] = quarter
    steps = {name: training_step(net, pictures[name]) for name, net in nets.items()}
    took = race(steps, args.rounds, args.seconds)
    rows = []
    for name, milliseconds in took.items():
        parameters = sum(p.numel() for p in nets[name].parameters())
        per_second = f"{1000 * pictures[name] / milliseconds:,.0f}"
        ratio = f"{milliseconds / took['baseline']:.2f}"
        rows.append([name, f"{parameters:,}", f"{milliseconds:.1f}", ratio, per_second])
    titles = ["network", "parameters", f"ms for {args.batch_size} views", "times the baseline"]
    tables = [markdown([*titles, "pictures/s"], rows)]
    publish("Cyclic symmetry", args.num_threads, tables, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
