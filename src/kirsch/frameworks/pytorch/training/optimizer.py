"""The optimizer, its learning rate, the moving average of the weights, and who computes in how many bits."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from kirsch.errors import DataError, UsageError, error_text
from kirsch.frameworks.pytorch.modules.copying import copy_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.frameworks.training import Training


@contextlib.contextmanager
def own_precision() -> Iterator[None]:
    """A run within which Accelerate may have another precision than before; afterwards it has the former again.

    Accelerate keeps the precision once for the whole process, the caller's own `Accelerator`s included, and refuses a
    second one.
    """
    before = dict(AcceleratorState._shared_state)  # noqa: SLF001 - has no public name
    AcceleratorState._reset_state()  # noqa: SLF001 - as above
    try:
        yield
    finally:
        AcceleratorState._reset_state()  # noqa: SLF001 - as above
        AcceleratorState._shared_state.update(before)  # noqa: SLF001 - as above


def accelerator_for(training: Training) -> Accelerator:
    """Accelerate, for as many processes as there are; within `own_precision`.

    Raises:
        UsageError: this machine cannot compute in that precision, or other processes are not found.
    """
    # Of what torchrun starts; without an accelerator each process is alone unless it is told to take the CPU.
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    why = "fp16 is for GPUs."
    try:
        made = Accelerator(
            cpu=started > 1 and not torch.accelerator.is_available(),
            mixed_precision="no" if training.precision == "fp32" else training.precision,
            # A term that has no weight yet leaves its adapter without a gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        _require_processes(made, started)
        if made.native_amp or training.precision == "fp32":  # on a CPU Accelerate takes fp16 and computes in fp32
            return made
    except ValueError as error:
        why = error_text(error)
    raise UsageError(
        f"precision is {training.precision!r}, which this machine cannot train in.", why, 'Take "bf16" or "fp32".'
    )


def _require_processes(accelerator: Accelerator, started: int) -> None:
    if accelerator.num_processes != started and started > 1:
        raise UsageError(
            f"torchrun started {started} processes, and Accelerate knows of {accelerator.num_processes}.",
            "Each would train on everything by itself.",
            "Make no Accelerator before; where the machine's accelerator takes one process, set ACCELERATE_USE_CPU=1.",
        )


class Average:
    """An exponential moving average of the weights of a model; buffers, such as running statistics, are copied.

    Args:
        model: whose weights are followed.
        keep: share of the average that a step leaves, 0 < share < 1.

    Source: Polyak, Juditsky 1992; with a constant share as Tarvainen, Valpola 2017, arXiv:1703.01780.
    """

    def __init__(self, model: nn.Module, keep: float) -> None:
        self.keep = keep
        self.model = copy_of(model).eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Take in the weights that a step led to."""
        for mine, other in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(other, 1 - self.keep)
        for kept, now in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(now)


def check_schedule(training: Training, length: int | None) -> None:
    """Raise a DataError if the learning rate depends on how many batches there are, and the data cannot say."""
    if length is None and (training.schedule != "constant" or training.warmup_epochs):
        warmup = f" with {training.warmup_epochs:g} warmup_epochs" if training.warmup_epochs else ""
        raise DataError(
            "The data does not say how many batches an epoch has: it has no length.",
            f"The schedule {training.schedule!r}{warmup} follows the part of the run that is done.",
            'Give the data a __len__, or train with schedule="constant" and warmup_epochs=0.',
        )


def learning_rate(training: Training, epoch: float) -> float:
    """The learning rate at a point of the run, counted in epochs from 0."""
    peak = training.learning_rate
    if epoch < training.warmup_epochs:
        return peak * min((epoch + 1e-3) / training.warmup_epochs, 1.0)  # the first step must not be nothing
    if training.schedule == "constant":
        return peak
    done = (epoch - training.warmup_epochs) / max(training.epochs - training.warmup_epochs, 1e-9)
    if training.schedule == "multistep":
        return float(peak * 0.1 ** sum(done >= milestone for milestone in training.milestones))
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_of(model: nn.Module, training: Training, called: str) -> torch.optim.Optimizer:
    """Weight decay on weights of two or more axes only: on biases and scales it does harm."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError(
            f"Nothing of {called} can be trained.",
            "All its parameters have requires_grad=False.",
            "Set requires_grad on those that shall learn.",
        )
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate)
    return torch.optim.SGD(groups, lr=training.learning_rate, momentum=0.9, nesterov=True)
