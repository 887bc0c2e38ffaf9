"""What the speed scripts of single processes share: contenders take turns, their medians count."""

import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts


def race(
    contenders: dict[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, float]:
    """Milliseconds a call of each contender takes, the median over rounds of so many seconds.

    Each round calls all of them in an order of its own; calls before the first are not counted.
    """
    for call in contenders.values():
        call(), call()
    times = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), unit="round", disable=None):
        for name in random.sample(list(contenders), len(contenders)):
            calls, start, took = 0, time.perf_counter(), 0.0
            while took < seconds:
                contenders[name]()
                calls, took = calls + 1, time.perf_counter() - start
            times[name].append(1000 * took / calls)
    return {name: median(values) for name, values in times.items()}


def machine(threads: int) -> str:
    """One line on what this was measured with."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).split(": ")[1]
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return (
        f"{model}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def markdown(titles: list[str], rows: list[list[object]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [titles, ["---"] + ["--:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def publish(title: str, threads: int, tables: list[str], output: str) -> None:
    """To the terminal and, where output names a file, into it."""
    text = "\n\n".join([f"# {title}", machine(threads) + ".", *tables]) + "\n"
    print(text)
    if output:
        Path(output).write_text(text)
