"""Two processes end where one does that takes whole batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState

from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.optimizer import accelerator_for, own_precision
from kirsch.frameworks.training import Training

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os
import sys

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

import kirsch
from kirsch.distillation.objective import Term
from kirsch.frameworks.data import ArrayData


def net(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()


random = np.random.default_rng(0)
labels = np.arange(24) % 3
labels[::5] = -100  # so that the parts of a batch have other numbers of labels
data = ArrayData(random.standard_normal((24, 5)), labels, batch_size=8)
joined = Term("l2-normalized", 0.5, student="1", adapter="linear")
objective = kirsch.Objective((Term("kd", 0.5, 2.0), joined), label_weight=1.0)
balanced = kirsch.Objective((Term("kd", 0.5, 2.0), joined), label_weight=1.0, balance="gradient")
made = kirsch.GeneratedData(lambda count, generator: generator.standard_normal((count, 5)), 24, 8)
found = []
for accumulate in (1, 3):
    training = kirsch.Training(epochs=3, learning_rate=0.1, accumulate=accumulate)
    student, teacher = net(4, 1), net(6, 2)
    for each in (objective, balanced):
        found.append(kirsch.distill(student, teacher, data, objective=each, training=training, check_teacher=False))
    found += kirsch.distill_mutually([student, teacher, net(5, 3)], data, training=training)
    found.append(kirsch.distill(student, teacher, made, training=training))
assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))  # and not each for itself
if int(os.environ.get("RANK", "0")) == 0:
    np.savez(sys.argv[1], *[p.detach().numpy() for trained in found for p in trained.model.parameters()])
"""


def weights(folder, processes):
    program, out = folder / "job.py", folder / f"{processes}.npz"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(
        [*command, str(program), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as arrays:
        return [arrays[name] for name in arrays.files]


def test_two_processes_end_where_one_does(tmp_path):
    """With and without batches that share a step."""
    one, two = (weights(tmp_path, processes) for processes in (1, 2))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(second, first, rtol=1e-9, atol=1e-12)  # sums in another order, in float64


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    """Accelerate has been set up for this process alone, as by the caller before."""
    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    sentence = r"torchrun started 2 processes, and Accelerate knows of 1\. Each would train on everything by itself\."
    with own_precision(), pytest.raises(UsageError, match=sentence):
        accelerator_for(Training())
