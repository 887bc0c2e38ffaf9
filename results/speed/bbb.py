"""What does a Bayesian network cost beside an ordinary one, and beside two libraries?

    Measures   training steps of 2 x 1200 units; a bandit's interaction; memory of a training step
    Run        python results/speed/bbb.py --output results/speed/bbb.md
    Needs      Linux, idle; pip install --no-deps -r results/speed/peers.txt (or no peers)
    Takes      2 minutes

The libraries do less: blitz draws one sample of the weights as we do and has a mixture prior;
bayesian-torch has a Gaussian prior, whose KL it knows in closed form.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from contest import markdown, publish, race
from torch import nn

import bayes_by_backprop as bbb


@dataclass
class Args:
    hidden_units: int = 1200  # of both layers
    batch_size: int = 128  # images
    num_threads: int = 2  # of torch, but 1 for the bandit
    rounds: int = 5  # the table shows their median
    seconds: float = 3.0  # of each contender in each round
    output: str = ""  # a markdown file to write the table to


def minibatch(args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(args.batch_size, 784), torch.randint(10, (args.batch_size,))


def ours(args: Args, method: str, prior: str = "mixture") -> Callable[[], None]:
    """A step of bayes_by_backprop.py, with what it does beside the update."""
    settings = bbb.Args(method=method, prior=prior, hidden_units=args.hidden_units)
    sizes = (784, args.hidden_units, args.hidden_units, 10)
    weights = bbb.PointEstimate(sizes)
    if method == "bbb":
        weights = bbb.WeightPosterior(sizes, settings.rho_init)
    optimizer, prior_of_w = bbb.make_optimizer(weights, settings), bbb.make_prior(settings)
    x, y = minibatch(args)

    def negative_log_likelihood(w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(bbb.network(x, w, sizes), y, reduction="sum")

    def step() -> None:
        how = 1 / 390, args.batch_size, prior_of_w, 1
        bbb.update(weights, optimizer, negative_log_likelihood, *how).item()

    return step


def of_a_module(args: Args, net: nn.Module, kl_of: Callable) -> Callable[[], None]:
    """A step of an ordinary training loop; kl_of(net, x) gives logits and KL."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    x, y = minibatch(args)

    def step() -> None:
        logits, kl = kl_of(net, x)
        loss = F.cross_entropy(logits, y) + kl / 390 / args.batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def layers(args: Args, linear: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    H = args.hidden_units
    return nn.ModuleList([linear(784, H), linear(H, H), linear(H, 10)])


def plain(args: Args) -> Callable[[], None]:
    first, second, third = layers(args, nn.Linear)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    return of_a_module(args, net, lambda net, x: (net(x), 0.0))


def blitz(args: Args) -> Callable[[], None]:
    from blitz.modules import BayesianLinear

    prior = dict(prior_sigma_1=0.37, prior_sigma_2=0.0025, prior_pi=0.25, posterior_rho_init=-5)
    net = layers(args, lambda n, m: BayesianLinear(n, m, **prior))

    def forward(net: nn.ModuleList, x: torch.Tensor):
        logits = net[2](net[1](net[0](x).relu()).relu())
        return logits, sum(layer.log_variational_posterior - layer.log_prior for layer in net)

    return of_a_module(args, net, forward)


def bayesian_torch(args: Args) -> Callable[[], None]:
    from bayesian_torch.layers import LinearReparameterization

    net = layers(args, lambda n, m: LinearReparameterization(n, m, posterior_rho_init=-5.0))

    def forward(net: nn.ModuleList, x: torch.Tensor):
        kl = 0.0
        for i, layer in enumerate(net):
            x, kl_of_layer = layer(x)
            x, kl = x.relu() if i < 2 else x, kl + kl_of_layer
        return x, kl

    return of_a_module(args, net, forward)


def interaction() -> Callable[[], None]:
    """64 small steps, as after each mushroom."""
    settings = bbb.Args(task="bandit")
    sizes = (119, 100, 100, 1)
    weights = bbb.WeightPosterior(sizes, settings.rho_init)
    optimizer, prior = bbb.make_optimizer(weights, settings), bbb.make_prior(settings)
    x, r = torch.rand(bbb.BUFFER, 119), torch.rand(bbb.BUFFER, 1)

    def step() -> None:
        torch.set_num_threads(1)
        bbb.choose(weights, x[0, :117], sizes, "bbb", 0)
        drawn = torch.randint(bbb.BUFFER, (bbb.STEPS, bbb.BATCH))
        for x_i, r_i in zip(x[drawn], r[drawn]):

            def negative_log_likelihood(w: torch.Tensor, x_i=x_i, r_i=r_i) -> torch.Tensor:
                return F.mse_loss(bbb.network(x_i, w, sizes), r_i, reduction="sum") / 2

            bbb.update(weights, optimizer, negative_log_likelihood, 1 / 64, 64, prior, 1)

    return step


def high_water() -> int:
    """Bytes of memory that this process has had at most. Not getrusage: it counts the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def peak_memory(args: Args, answer) -> None:
    """Bytes of memory that the network, its optimizer and ten steps add at most to a process."""
    torch.set_num_threads(args.num_threads)
    bbb.keep_memory()
    small = Args(hidden_units=8, num_threads=args.num_threads)
    for step in (ours(small, "bbb"), plain(small)):
        step()  # what torch itself loads at the first step
    before = high_water()
    step = ours(args, "bbb")
    for _ in range(10):
        step()
    answer.put(high_water() - before)


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    bbb.keep_memory()  # a gain for all contenders
    contenders = {
        "plain MLP, nn.Sequential": plain(args),
        "plain MLP, ours (`--method sgd`)": ours(args, "sgd"),
        "Bayes by Backprop, ours, mixture": ours(args, "bbb"),
        "Bayes by Backprop, ours, Gaussian": ours(args, "bbb", "gaussian"),
    }
    for name, package, make in (
        ("bayesian-torch, Gaussian prior", "bayesian_torch", bayesian_torch),
        ("blitz-bayesian-pytorch, mixture", "blitz", blitz),
    ):
        if find_spec(package):
            contenders[name] = make(args)
    took = race(contenders, args.rounds, args.seconds)
    bare = took["plain MLP, nn.Sequential"]
    rows = [[name, f"{ms:.1f}", f"{ms / bare:.2f}"] for name, ms in took.items()]
    titles = [f"training step, 2 x {args.hidden_units}, batch {args.batch_size}", "ms", "ratio"]
    tables = [markdown(titles, rows)]

    H = args.hidden_units
    parameters = 2 * (785 * H + (H + 1) * H + (H + 1) * 10)  # mu and rho
    spawn = mp.get_context("spawn")
    answer = spawn.Queue()
    process = spawn.Process(target=peak_memory, args=(args, answer))
    process.start()
    memory = answer.get()
    process.join()
    bandit = race({"bandit": interaction()}, args.rounds, args.seconds)["bandit"]
    tables.append(
        markdown(
            ["also", "here"],
            [
                ["peak memory of training, copies of mu and rho", f"{memory / 4 / parameters:.1f}"],
                ["one mushroom, ms on one core", f"{bandit:.1f}"],
                ["50,000 mushrooms, minutes", f"{bandit * 50 / 60:.0f}"],
            ],
        )
    )
    publish("Bayes by Backprop", args.num_threads, tables, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
