"""What the tests of several scripts need to run them and to watch their processes."""

import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def processes_of(run: subprocess.Popen) -> list[int]:
    """The living processes whose parent is run, read from /proc."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == run.pid:
            children.append(int(status.parent.name))
    return children


class Locked:
    """A counter like multiprocessing's Value that changes only under its lock."""

    def __init__(self, steps: int):
        self.steps, self.locked = steps, False

    @contextmanager
    def get_lock(self):
        self.locked = True
        yield
        self.locked = False

    @property
    def value(self) -> int:
        return self.steps

    @value.setter
    def value(self, steps: int) -> None:
        assert self.locked
        self.steps = steps


def work_here(monkeypatch, module, rank: int, arguments: tuple, after_update) -> None:
    """Run a script's worker in this process, with after_update in the place of its update."""
    monkeypatch.setattr(module, "update", after_update)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module.mp, "parent_process", multiprocessing.current_process)
    state = torch.get_rng_state(), torch.get_num_threads()
    try:
        module.worker(rank, *arguments)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_rng_state(state[0])
        torch.set_num_threads(state[1])


def start_run(script: str, run_dir: Path, *flags: str) -> subprocess.Popen:
    """The script on a toy game, as a user would start it, in a process group of its own."""
    command = [sys.executable, script, "--env-id", "toy_games:Side-v0", "--num-workers", "2"]
    command += ["--run-dir", str(run_dir), "--report-every", "200", *flags]
    environment = os.environ | {"PYTHONPATH": "tests"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
