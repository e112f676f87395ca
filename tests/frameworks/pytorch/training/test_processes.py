"""Training with two processes gives the result of a single process."""

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
from kirsch.frameworks.pytorch.training.optimizer import accelerator_for, separate_precision
from kirsch.frameworks.training import Training

ROOT = Path(__file__).parents[4]
PROGRAM = """
import os
import sys

import numpy as np
from accelerate import PartialState

import kirsch
from kirsch.distillation.term import Term
from kirsch.data.batches import ArrayData
from training_networks import tanh_network

random = np.random.default_rng(0)
labels = np.arange(24) % 3
labels[::5] = -100  # so that the shards of a batch have different numbers of labels
data = ArrayData(random.standard_normal((24, 5)), labels, batch_size=8)
joined = Term("l2-normalized", 0.5, student_layer="1", adapter="linear")
objective = kirsch.Objective((Term("kd", 0.5, temperature=2.0), joined), label_weight=1.0)
balanced = kirsch.Objective((Term("kd", 0.5, temperature=2.0), joined), label_weight=1.0, balance="gradient")
generated = kirsch.GeneratedData(lambda count, generator: generator.standard_normal((count, 5)), 24, batch_size=8)
found = []
for accumulate in (1, 3):
    training = kirsch.Training(epochs=3, learning_rate=0.1, gradient_accumulation_steps=accumulate)
    student, teacher = tanh_network(4, 1).double(), tanh_network(6, 2).double()
    for each in (objective, balanced):
        found.append(kirsch.distill(student, teacher, data, objective=each, training=training, check_teacher=False))
    found += kirsch.distill_mutually([student, teacher, tanh_network(5, 3).double()], data, training=training)
    found.append(kirsch.distill(student, teacher, generated, training=training))
assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
if int(os.environ.get("RANK", "0")) == 0:
    np.savez(sys.argv[1], *[p.detach().numpy() for trained in found for p in trained.model.parameters()])
"""


LOADERS = """
import os
import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import kirsch
from kirsch.errors import Interrupted
from kirsch.frameworks.training import TrainingHooks

torch.manual_seed(0)
random = np.random.default_rng(0)
teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
student = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
samples = TensorDataset(torch.from_numpy(random.standard_normal((53, 6))), torch.from_numpy(random.integers(0, 4, 53)))


def own():
    generator = torch.Generator()
    generator.manual_seed(int(os.environ.get("RANK", "0")))  # another order in each process, without synchronization
    return DataLoader(samples, sampler=RandomSampler(samples, generator=generator), batch_size=8)


makers = {
    "in order": lambda: DataLoader(samples, 8),
    "shuffled": lambda: DataLoader(samples, 8, shuffle=True),
    "own generator": own,
    "list": lambda: [samples[start : start + 8] for start in range(0, 53, 8)],
}
found = {}


def distilled(data, seed, steps=1, student=student, **hooks):
    options = dict(learning_rate=0.1, max_grad_norm=1.0, ema_decay=0.9, gradient_accumulation_steps=steps, seed=seed)
    training = kirsch.Training(epochs=2, **options)
    hooks = TrainingHooks(**hooks)
    trained = kirsch.distill(student, teacher, data, training=training, hooks=hooks, check_teacher=False)
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()]).numpy()


for name, make in makers.items():
    for seed in (0, 1):
        found[f"{name} {seed}"] = distilled(make(), seed)

few = TensorDataset(*samples[:49])  # the last batch of one sample is too small for two processes
for accumulate in (1, 7):
    found[f"{accumulate} too few"] = distilled(DataLoader(few, 8), 0, steps=accumulate)

for name in ("shuffled", "own generator"):
    states = []
    stops = iter([None, None, Interrupted("enough")])
    try:
        distilled(makers[name](), 1, save=states.append, stop=lambda: next(stops))
    except Interrupted:
        assert states[0].values["batch"] == 3
    found[f"{name} resumed"] = distilled(makers[name](), 1, resume=states[0])
normal = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
distilled(DataLoader(TensorDataset(*samples[:51]), 8), 0, student=normal)  # a last batch of 3, too few for two shards
if int(os.environ.get("RANK", "0")) == 0:
    np.savez(sys.argv[1], **found)
"""

SHOWN = """
import sys

import numpy as np
from torch import nn

import kirsch
from kirsch.data.batches import ArrayData

sys.stderr = open(sys.argv[1] + f".{__import__('os').environ['RANK']}.txt", "w")
data = ArrayData(np.random.default_rng(0).standard_normal((24, 6)).astype(np.float32), np.arange(24) % 4, batch_size=8)
training = kirsch.Training(epochs=2)
kirsch.distill(nn.Linear(6, 4), nn.Linear(6, 4), data, training=training, check_teacher=False, progress=True)
if sys.stderr.name.endswith(".0.txt"):
    np.savez(sys.argv[1])
"""

AT_EXIT = """
import atexit
import sys
from pathlib import Path

import numpy as np
from torch import nn

import kirsch
from kirsch.data.batches import ArrayData


def threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


# Python calls this function after those that were registered later.
atexit.register(lambda: np.savez(sys.argv[1], during=during, after=threads()))
data = ArrayData(np.random.default_rng(0).standard_normal((24, 6)).astype(np.float32), np.arange(24) % 4, batch_size=8)
training = kirsch.Training(epochs=1)
kirsch.distill(nn.Linear(6, 4), nn.Linear(6, 4), data, training=training, check_teacher=False)
during = threads()
"""

SHARDED = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import kirsch

samples = TensorDataset(torch.randn(32, 6), torch.arange(32) % 4)
torch.distributed.init_process_group("gloo")
loader = DataLoader(samples, 8, sampler=DistributedSampler(samples))
kirsch.distill(nn.Linear(6, 4), nn.Linear(6, 4), loader, training=kirsch.Training(epochs=1), check_teacher=False)
"""


def run(program, folder, processes):
    """Return the arrays that a program saved, or its error output if it failed."""
    path, out = folder / "job.py", folder / f"{processes}.npz"
    path.write_text(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run([*command, str(path), str(out)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr
    with np.load(out) as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_equal_results(one, two):
    assert isinstance(one, dict), one[-2000:]
    assert isinstance(two, dict), two[-2000:]
    for name, expected in one.items():  # float64 sums in another order
        np.testing.assert_allclose(two[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_two_processes_train_the_same_model_as_one_process(tmp_path):
    """With and without gradient accumulation."""
    assert_equal_results(*(run(PROGRAM, tmp_path, processes) for processes in (1, 2)))


def test_two_processes_with_a_data_loader_train_the_same_model_as_one_process(tmp_path):
    """53 samples in batches of 8 leave a last batch of 5. The order depends on the seed only, also in a resumed run."""
    one, two = (run(LOADERS, tmp_path, processes) for processes in (1, 2))
    assert_equal_results(one, two)
    assert not np.array_equal(two["shuffled 0"], two["shuffled 1"])
    for name in ("shuffled", "own generator"):
        np.testing.assert_array_equal(two[f"{name} resumed"], two[f"{name} 1"])


def test_only_the_first_process_shows_progress(tmp_path):
    assert run(SHOWN, tmp_path, 2) == {}
    first, second = ((tmp_path / f"2.npz.{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert [line.split("   ")[0] for line in first] == ["epoch 1/2", "epoch 2/2"]
    assert second == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads of a process from /proc")
def test_the_threads_of_the_process_group_end_before_the_interpreter(tmp_path):
    """Otherwise a process sometimes aborts at its exit, and torchrun reports a failed job."""
    threads = run(AT_EXIT, tmp_path, 2)
    assert isinstance(threads, dict), threads[-2000:]
    assert [name for name in threads["during"] if "gloo" in name]
    assert not [name for name in threads["after"] if "gloo" in name]


def test_different_batches_in_each_process_raise_an_error(tmp_path):
    output = run(SHARDED, tmp_path, 2)
    assert "The processes have different first batches in epoch 1." in output
    assert "Remove DistributedSampler" in output


def test_processes_that_accelerate_does_not_see_raise_an_error(monkeypatch):
    """The caller has set up Accelerate for this process alone."""
    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    sentence = r"torchrun started 2 processes, and Accelerate sees 1\. Each process would train a separate model"
    with separate_precision(), pytest.raises(UsageError, match=sentence):
        accelerator_for(Training())
