"""Two processes of the Trainer end where one does that takes whole batches, adapters too."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import sys

import numpy as np
import torch

from kirsch.distillation.objective import Objective, Term
from kirsch.frameworks.pytorch.vision import import_beside

import_beside("torchvision")
transformers = import_beside("transformers")

from kirsch.integrations.huggingface import DistillationTrainer


def net(width, seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).double()


def rows(most):
    random = np.random.default_rng(0)
    for place in range(16):
        tokens = torch.as_tensor(random.integers(1, 32, 8))
        yield {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(8) > most + place % 6, -100)}


def job(folder, processes):
    found = []
    soft, joined = Term("kd", 0.5, 2.0), Term("hidden-mse", 0.5, student="hidden[-1]")
    for terms, most in (((soft,), 2), ((soft, joined), 8)):
        run = DistillationTrainer(
            net(8, 1),
            transformers.TrainingArguments(
                folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
                per_device_train_batch_size=8 // processes, num_train_epochs=2, optim="sgd", learning_rate=0.1,
                max_grad_norm=0.1, dataloader_pin_memory=False,
            ),
            teacher=net(16, 2),
            objective=Objective(terms, causal=True),
            train_dataset=list(rows(most)),
        )
        run.train()
        names = ("loss", "loss/kd", "loss/label", "grad_norm")
        found += [p.detach().numpy() for p in run.distiller.parameters()]
        found += [np.array([row[name] for row in run.state.log_history[:-1] for name in names])]
    return found


if __name__ == "__main__":
    found = job(sys.argv[1], 2)
    if os.environ["RANK"] == "0":
        np.savez(sys.argv[2], *found)
"""


def of_two(folder):
    program, out = folder / "job.py", folder / "found.npz"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder), str(out)],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in running:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said[-3000:]
    with np.load(out) as arrays:
        return [arrays[name] for name in arrays.files]


def test_two_processes_end_where_one_does(tmp_path):
    """Soft targets on sequences of 2 to 7 valid tokens, and adapters on whole ones; clipping takes both in."""
    here = {"__name__": "job"}
    exec(PROGRAM, here)
    for one, two in zip(here["job"](str(tmp_path), 1), of_two(tmp_path), strict=True):
        # Sums in another order, in float64; what is logged is in single precision.
        np.testing.assert_allclose(two, one, **{"rtol": 1e-8, "atol": 1e-11} if two.ndim > 1 else {"rtol": 1e-5})
