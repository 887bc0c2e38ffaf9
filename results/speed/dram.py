"""How fast is DRAM? Images/s of a training step beside the convolutional networks of its paper.

    Measures   multi_object_attention.py --model dram and --model conv, their FLOPs and parameters
    Run        python results/speed/dram.py --output results/speed/dram.md
    Needs      an idle machine, mnist in --data-dir (or --dataset digits)
    Takes      about 10 minutes on 2 cores, svhn most of it

One run measures everything: the same images at the same batch size, and rounds in which the
contenders take turns, so that a slow minute of the machine can hit any of them. A step makes its
images, goes forward and backward, and updates. What making the images and cutting the glimpses take
of it is clocked inside the same steps. On svhn the images are noise: their content costs nothing.
"""

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import multi_object_attention as dram


@dataclass
class Args:
    tasks: tuple[str, ...] = ("pairs", "addition", "svhn")  # any of these three
    batch_size: int = 128  # images of a step, the paper's
    rounds: int = 3  # the table shows their median
    steps: int = 5  # measured of each contender in each round (svhn: 1), after one of warm-up
    dataset: str = "mnist"  # or digits, which needs no download
    data_dir: str = "data"  # holds mnist/
    device: str = "cpu"  # or cuda
    output: str = ""  # a markdown file to write the tables to


SPEED, TIMES = "images/s", "times conv"
MACS, MILLIONS, CUTTING = "G multiply-adds per image", "M parameters", "% images and glimpses"
COLUMNS = {SPEED: ",.0f", TIMES: ".2f", MACS: ".3f", MILLIONS: ".1f", CUTTING: ".1f"}
MOST_CUTTING = 35  # %, the goal


@dataclass
class Contender:
    """One model on one task, trained step by step."""

    task: str
    model: str
    nets: torch.nn.ModuleList
    steps: Iterator[None]
    clocks: dict[str, float]
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.task}, {self.model}"


# ---- The contenders -----------------------------------------------------------------------------


def noise(settings: dram.Args) -> dram.Data:
    """House numbers of five digits that show nothing."""
    width, n = round(settings.svhn_size * 64 / 54), 10 * settings.batch_size
    images = torch.randint(256, (n, width, width), dtype=torch.uint8, device=settings.device)
    labels = torch.randint(dram.TERMINAL, (n, 6), device=settings.device)
    labels[:, 5] = dram.TERMINAL
    return dram.Data(images, labels, (images, labels), (images, labels))


def clocked(function: Callable, clocks: dict[str, float], device: str) -> Callable:
    """The function, which adds its seconds to the clock of images and glimpses."""

    def timed(*arguments, **named):
        start = now(device)
        result = function(*arguments, **named)
        clocks["cutting"] += now(device) - start
        return result

    return timed


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training(settings: dram.Args, nets: torch.nn.ModuleList, clocks: dict) -> Iterator[None]:
    """Endless steps as main makes them."""
    on_noise = settings.task == "svhn"
    data = noise(settings) if on_noise else dram.load_data(settings, settings.device)
    optimizer = dram.make_optimizer(nets, settings)
    retina, table = dram.RetinaSensor.forward, dram.integral_image
    cut_glimpses = clocked(retina, clocks, settings.device)
    make_table = clocked(table, clocks, settings.device)
    while True:
        batches = iter(dram.minibatches(settings, data))
        draw = clocked(lambda batches=batches: next(batches, None), clocks, settings.device)
        while (batch := draw()) is not None:
            with (
                patch.object(dram.RetinaSensor, "forward", cut_glimpses),
                patch.object(dram, "integral_image", make_table),
            ):
                loss, _ = dram.minibatch_loss(nets, settings, *batch)
            dram.update(optimizer, loss)
            yield


def contender(task: str, model: str, args: Args) -> Contender:
    settings = dram.Args(task=task, model=model, dataset=args.dataset, data_dir=args.data_dir)
    settings.batch_size, settings.device = args.batch_size, args.device
    nets, clocks = dram.make_networks(settings).to(args.device), {"cutting": 0.0}
    return Contender(task, model, nets, training(settings, nets, clocks), clocks)


# ---- The measurement ----------------------------------------------------------------------------


def measure(row: Contender, args: Args) -> dict[str, float]:
    next(row.steps)
    steps = 1 if row.task == "svhn" else args.steps
    row.clocks["cutting"], start = 0.0, now(args.device)
    for _ in range(steps):
        next(row.steps)
    seconds = now(args.device) - start
    cutting = 100 * row.clocks["cutting"] / seconds
    return {SPEED: steps * args.batch_size / seconds, CUTTING: cutting}


def count(row: Contender) -> dict[str, float]:
    """What reading one image costs, and the parameters; two operations are one multiply-add."""
    sizes = dram.Sizes(**dram.SIZES[row.task])
    device = next(row.nets.parameters()).device
    x = torch.zeros(1, sizes.S, sizes.S, dtype=torch.uint8, device=device)
    net, T = row.nets[0], sizes.num_labels * sizes.num_glimpses
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if row.model == "conv":
            net(x)
        else:
            net.logits(net(x, T))
    parameters = sum(p.numel() for p in row.nets.parameters())
    return {MACS: counter.get_total_flops() / 2e9, MILLIONS: parameters / 1e6}


# ---- The report ---------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores, versions, and how busy it is."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return (
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {version('torch')}; "
        f"load average before the start {os.getloadavg()[0]:.2f}"
    )


def summarise(rows: list[Contender]) -> dict[str, dict[str, float]]:
    """Columns by row: medians and their ratios."""
    speed = {row.name: median(m[SPEED] for m in row.rounds) for row in rows}
    table = {}
    for row in rows:
        columns = {SPEED: speed[row.name], TIMES: speed[row.name] / speed[f"{row.task}, conv"]}
        columns |= count(row) | {CUTTING: median(m[CUTTING] for m in row.rounds)}
        table[row.name] = columns
    return table


def judge(name: str, columns: dict[str, float]) -> str:
    verdict = "reached" if columns[CUTTING] <= MOST_CUTTING else "**not reached**"
    return (
        f"- {name}: {columns[CUTTING]:.1f} % of a step makes images and cuts glimpses, goal at "
        f"most {MOST_CUTTING}: {verdict}"
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns after the first are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compose(rows: list[Contender], args: Args, where: str) -> str:
    """The whole report: the table, what became of the goal, each round's numbers."""
    table = summarise(rows)
    cells = [
        [name, *(f"{columns[c]:{form}}" for c, form in COLUMNS.items())]
        for name, columns in table.items()
    ]
    raw = [[row.name, *(f"{m[SPEED]:,.1f}" for m in row.rounds)] for row in rows]
    goals = "\n".join(judge(name, columns) for name, columns in table.items() if "dram" in name)
    given = {key: value for key, value in asdict(args).items() if value != ""}
    given["tasks"] = " ".join(args.tasks)
    flags = [f"--{key.replace('_', '-')} {value}" for key, value in given.items()]
    return f"""# Speed of multi_object_attention.py

    python results/speed/dram.py {" ".join(flags)}

On {where}.
Medians of {args.rounds} rounds; a step has {args.batch_size} images. Multiply-adds are those of
reading one image, forward, all glimpses.

{markdown(["task, model", *COLUMNS], cells)}

{goals}

Images per second in each round:

{markdown(["task, model", *(f"round {i + 1}" for i in range(args.rounds))], raw)}
"""


def main(args: Args) -> str:
    if not args.tasks or not set(args.tasks) <= set(dram.SIZES):
        raise SystemExit(f"--tasks are some of {', '.join(dram.SIZES)}.")
    if min(args.batch_size, args.rounds, args.steps) < 1:
        raise SystemExit("--batch-size, --rounds and --steps must be at least 1.")
    if not Path(args.output).parent.is_dir():
        raise SystemExit(f"There is no folder for --output {args.output}.")
    torch.manual_seed(1)
    dram.keep_memory()  # for both networks, as in a run
    where = machine()
    rows = [contender(task, model, args) for task in args.tasks for model in ("dram", "conv")]
    try:
        for row in tqdm(rows * args.rounds, unit="contender", disable=None):
            row.rounds.append(measure(row, args))
            tqdm.write(f"{row.rounds[-1][SPEED]:>10,.1f} images/s  {row.name}")
    except KeyboardInterrupt:
        raise SystemExit("Stopped; nothing was written.") from None
    text = compose(rows, args, where)
    if args.output:
        Path(args.output).write_text(text)
    return text


if __name__ == "__main__":
    print(main(tyro.cli(Args, description=__doc__)))
