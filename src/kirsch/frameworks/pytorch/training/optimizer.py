"""Optimizer, learning rate schedule, moving average of the weights, and Accelerate with its precision."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import math
import os
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from kirsch.errors import UsageError, error_text
from kirsch.frameworks.pytorch.modules.copying import copy_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.frameworks.training import Training


@contextlib.contextmanager
def separate_precision() -> Iterator[None]:
    """Reset the precision of Accelerate within the block, and restore it afterwards.

    Accelerate has one precision for all `Accelerator`s of a process, including those of the caller, and raises an error
    for a second precision.
    """
    before = dict(AcceleratorState._shared_state)  # noqa: SLF001 - has no public name
    AcceleratorState._reset_state()  # noqa: SLF001 - as above
    try:
        yield
    finally:
        AcceleratorState._reset_state()  # noqa: SLF001 - as above
        AcceleratorState._shared_state.update(before)  # noqa: SLF001 - as above


def accelerator_for(training: Training) -> Accelerator:
    """Return the `Accelerator` of this process. Call it within `separate_precision`.

    Raises:
        UsageError: this machine does not support the precision, or Accelerate does not see the processes of torchrun.
    """
    # torchrun sets both variables. Without an accelerator device, Accelerate ignores other processes unless cpu=True.
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    creates_group = started > 1 and not torch.distributed.is_initialized()
    if creates_group:
        # Functions of torch.distributed.nn have the process group as a default argument, which keeps the group alive.
        # Importing the module before the group is created avoids this.
        importlib.import_module("torch.distributed.nn")
    why = "fp16 needs a GPU."
    try:
        accelerator = Accelerator(
            cpu=started > 1 and not torch.accelerator.is_available(),
            mixed_precision="no" if training.precision == "fp32" else training.precision,
            # An adapter has no gradient while the weight of its loss term is 0.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if creates_group:
            atexit.register(_destroy_process_group)
        _require_processes(accelerator, started)
        if accelerator.native_amp or training.precision == "fp32":  # with fp16 on a CPU, Accelerate computes in fp32
            return accelerator
    except ValueError as error:
        why = error_text(error)
    raise UsageError(
        f"precision is {training.precision!r}, which this machine cannot train in.", why, 'Use "bf16" or "fp32".'
    )


def _destroy_process_group() -> None:
    """Destroy the process group that Accelerate created for a training run of Kirsch, before the interpreter exits.

    Otherwise a thread of the group may need the interpreter after the exit, which aborts the process. The threads run
    until no reference to the group is left, and wrapped models that await garbage collection hold references.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()


def _require_processes(accelerator: Accelerator, started: int) -> None:
    if accelerator.num_processes != started and started > 1:
        raise UsageError(
            f"torchrun started {started} processes, and Accelerate sees {accelerator.num_processes}.",
            "Each process would train a separate model on all data.",
            "Do not create an Accelerator or PartialState before the training. If the accelerator of the machine "
            "allows only one process, set ACCELERATE_USE_CPU=1.",
        )


class Average:
    """Exponential moving average of the parameters of a model. Buffers, such as running statistics, are copied.

    Args:
        model: model with the initial weights.
        decay: weight of the previous average in each step, 0 < decay < 1.

    Source: Polyak, Juditsky 1992; with constant decay: Tarvainen, Valpola 2017, arXiv:1703.01780.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy_of(model).eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the weights after a step."""
        for average, value in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(value, 1 - self.decay)
        for buffer, new in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(new)


def needs_length(training: Training) -> bool:
    """Return whether the learning rate depends on the number of batches of an epoch."""
    return training.schedule != "constant" or training.warmup_epochs > 0


def learning_rate(training: Training, epoch: float) -> float:
    """Return the learning rate at a time of the run.

    `epoch`: number of completed epochs, with the completed fraction of the current one.
    """
    peak = training.learning_rate
    if epoch < training.warmup_epochs:
        return peak * min((epoch + 1e-3) / training.warmup_epochs, 1.0)  # + 1e-3 so that the first rate is not 0
    if training.schedule == "constant":
        return peak
    done = (epoch - training.warmup_epochs) / max(training.epochs - training.warmup_epochs, 1e-9)
    if training.schedule == "multistep":
        return float(peak * 0.1 ** sum(done >= milestone for milestone in training.milestones))
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_of(model: nn.Module, training: Training, name: str) -> torch.optim.Optimizer:
    """Return the optimizer. Weight decay applies to weights of two or more axes only, not to biases and scales.

    Args:
        model: the module to train.
        training: settings.
        name: name of the model, for the error.

    Raises:
        UsageError: no parameter requires a gradient.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UsageError(
            f"{name} has no trainable parameters.",
            "All its parameters have requires_grad=False.",
            "Set requires_grad=True for the parameters to train.",
        )
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate)
    return torch.optim.SGD(groups, lr=training.learning_rate, momentum=0.9, nesterov=True)
