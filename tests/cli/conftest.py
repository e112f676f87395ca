"""Fixtures: files with models, data and a recipe, and functions that run the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kirsch.cli import main


@pytest.fixture(autouse=True)
def _default_signal_handlers():
    """Install the default handlers.

    The parent process may ignore SIGHUP, as nohup does, or SIGINT, as a shell does for background jobs.
    """
    defaults = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SOURCE = Path(__file__).parents[2] / "src"

NETS = '''
import numpy as np
import torch
from torch import nn

from kirsch.data.dataset import DataSet, Split


def chain():
    """Convolutions 1 → 8 → 4, a softmax that freezes the four output channels, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.Softmax(1), nn.Flatten(),
        nn.Linear(16, 3),
    )


chain.example_shape = (1, 1, 6, 6)


def shapeless():
    return chain()


def fails():
    raise ValueError("no such thing")


class Net(nn.Module):
    example_shape = (1, 1, 6, 6)

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def teacher():
    return Net(16)


def student():
    return Net(12)


def hostile():
    """Module names that contain markup of terminals and HTML."""
    net = nn.Sequential()
    for name, layer in (("[red]", nn.Conv2d(1, 8, 3)), ("<script>", nn.Conv2d(8, 8, 3)), ("[/0]", nn.Conv2d(8, 2, 1))):
        net.add_module(name, layer)
    return net


hostile.example_shape = (1, 1, 6, 6)


def stripes(*, seed):
    """Three classes that differ in their brightness."""
    random = np.random.default_rng(seed)

    def part(n):
        labels = np.arange(n) % 3
        noise = random.standard_normal((n, 1, 6, 6))
        return Split((labels[:, None, None, None] - 1 + 0.1 * noise).astype(np.float32), labels)

    return DataSet("stripes", part(96), part(30), part(30), classes=("dark", "gray", "light"))
'''

RECIPE = """
name: stripes
data: {source: "nets.py:stripes", batch_size: 16}
teacher: {model: "nets.py:teacher"}
student: {model: "nets.py:student"}
steps:
- train: {epochs: 6, learning_rate: 0.02}
- distill: {epochs: 6, learning_rate: 0.02}
- prune: {goal: {macs: 0.6}}
- recover: {epochs: 2, learning_rate: 0.01}
- export
- measure: {rounds: 10}
"""


@pytest.fixture(autouse=True)
def _default_terminal(monkeypatch):
    """Make the output independent of the terminal in which the tests run."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="session")
def write_job():
    """Return a function that writes nets.py and recipe.yaml to a folder."""

    def write(folder: Path) -> None:
        (folder / "nets.py").write_text(NETS)
        (folder / "recipe.yaml").write_text(RECIPE)

    return write


@pytest.fixture
def folder(tmp_path, monkeypatch, write_job):
    """Return a working folder with nets.py and recipe.yaml."""
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def kirsch(capsys):
    """Return a function that runs the command in this process and returns (exit code, output, error output)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run_json(kirsch):
    """Return a function that runs a subcommand with --json, checks the exit code, and returns the content."""

    def run(*arguments: str, code: int = 0) -> dict:
        exit_code, out, err = kirsch(*arguments, "--json")
        assert exit_code == code, out + err
        return json.loads(out)

    return run


@pytest.fixture
def process(tmp_path):
    """Return a function that starts `python` with arguments in a new process that can import this source."""

    def start(*arguments: str, **options) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            env=environment,
            cwd=options.pop("cwd", tmp_path),
            text=True,
            **options,
        )

    return start
