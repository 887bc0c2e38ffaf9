"""How fast does the recurrent attention model train, and what do retina and data cost?

    Measures   training steps of recurrent_visual_attention.py: whole, and on patches cut beforehand
    Run        python results/speed/ram.py --data-dir data --output results/speed/ram.md
    Needs      an idle machine, MNIST (--dataset digits: none)
    Takes      2 minutes

The same network on patches that were cut beforehand says what retina and on-the-fly images cost.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
import tyro
from contest import markdown, publish, race
from torch import Tensor, nn

import recurrent_visual_attention as ram


@dataclass
class Args:
    dataset: str = "mnist"  # digits needs no download
    data_dir: str = "data"  # where mnist/ lies
    batch_size: int = 128  # images
    num_threads: int = 2  # of torch
    rounds: int = 5  # the table shows their median
    seconds: float = 3.0  # of each contender in each round
    output: str = ""  # a markdown file to write the table to


class Tray(nn.Module):
    """A retina that hands out what was cut beforehand, whatever it is asked."""

    def __init__(self, patches: Tensor):
        super().__init__()
        self.register_buffer("patches", patches)

    def forward(self, table: Tensor, l: Tensor) -> Tensor:
        return self.patches


def endless(make: Callable[[], Iterator]) -> Iterator:
    for _ in repeat(None):
        yield from make()


def training_step(args: Args, task: str) -> Callable[[], None]:
    """A step as the script makes it: images made, looked at, one update."""
    settings = ram.Args(
        task=task, dataset=args.dataset, data_dir=args.data_dir, batch_size=args.batch_size
    )
    net = ram.make_network(settings)
    digits, labels, *_ = ram.load_images(settings, "cpu")
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate, fused=True)
    losses = endless(lambda: ram.image_losses(net, settings, digits, labels))

    def step() -> None:
        loss, _ = next(losses)
        loss.item()  # the script looks whether it is finite
        ram.update(optimizer, loss)

    return step


def step_without_images(args: Args, task: str) -> Callable[[], None]:
    """The same network's step on patches that are there already."""
    settings = ram.Args(task=task, batch_size=args.batch_size)
    setting = ram.setting_of(settings)
    net = ram.make_network(settings)
    image = torch.randint(256, (args.batch_size, setting.S, setting.S), dtype=torch.uint8)
    table = ram.integral_image(image)
    net.retina = Tray(net.retina(table, torch.zeros(args.batch_size, 2)))
    labels = torch.randint(10, (args.batch_size,))
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate, fused=True)

    def step() -> None:
        seen = ram.look(net, table, setting.num_glimpses, std=settings.location_std)
        loss, _ = ram.hybrid_loss(net, seen, labels, settings)
        loss.item()
        ram.update(optimizer, loss)

    return step


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    contenders = {}
    for task in ("mnist", "translated", "cluttered", "cluttered100"):
        contenders[f"{task}, whole step"] = training_step(args, task)
        contenders[f"{task}, patches cut beforehand"] = step_without_images(args, task)
    took = race(contenders, args.rounds, args.seconds)
    rows = []
    for name, milliseconds in took.items():
        bare = took[name.split(",")[0] + ", patches cut beforehand"]
        extra = f"{100 * (milliseconds / bare - 1):.0f}" if "whole" in name else ""
        speed = f"{1000 * args.batch_size / milliseconds:,.0f}"
        rows.append([name, f"{milliseconds:.1f}", speed, extra])
    titles = ["training step", "ms", "images/s", "% for retina and data"]
    publish("Recurrent attention model", args.num_threads, [markdown(titles, rows)], args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
