"""Distillation with the `Trainer` of Lightning.

    trainer = lightning.Trainer(callbacks=[Distillation(teacher, kirsch.Objective.kd())])
    trainer.fit(module)

All losses, layers and adapters of an objective are supported. Validation and export use the student alone.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kirsch.data.batches import Batch
from kirsch.distillation.checks import check_single_samples
from kirsch.distillation.distiller import Distiller
from kirsch.errors import CheckpointError, DataError, MissingExtraError, UnknownNameError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import require_labels

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "lightning", "lightning", "to distill in the Trainer of Lightning") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.data.annotations import Regularizer
    from kirsch.distillation.objective import Objective

ADAPTER_PREFIX = "distillation_adapter"
"""Prefix, followed by a number, of the names of adapter parameters in the student during training."""


class Distillation(Callback):  # type: ignore[misc]  # Lightning is not typed
    """Callback that makes `fit` minimize an objective; `training_step` of the module is not called.

    During training, adapters are among the `parameters()` of the student, so that `configure_optimizers`, DDP and
    gradient clipping include them. Checkpoints contain them as the state of this callback, and no `state_dict` of a
    model contains them. Each term of the loss and its share of the gradient are logged.

    An optimizer step weights the loss of each of its batches, in all processes, by the number of labels in the batch:
    labeled samples, or labeled positions of sequences. For a term that is averaged over other items, such as tokens,
    this is exact only if the fraction of labeled items is the same in all batches.

    Args:
        teacher: see `kirsch.Distiller`.
        objective: objective to minimize.
        student: path of the student in the LightningModule, such as "model"; layer names are relative to it. By default
            the module itself, called by its `forward`. The student must exist before `setup` and `configure_model`.
        batch_of: function that converts a batch of the loader to (inputs, targets), or to another form that
            `kirsch.Batch.of` accepts; by default the batch is used unchanged. With this function, or with hooks that
            may change the labels on the accelerator (`transfer_batch_to_device`, `on_after_batch_transfer` and
            `on_train_batch_start`), the labels are counted there, and each step waits for the accelerator.
        example_batch: batch of the loader, for the dry run that finds shapes; by default the first training batch.
        seed: seed of the initial weights of adapters.
        regularizers: additional loss terms that depend on the student only.

    Attributes:
        distiller: the `kirsch.Distiller`; None before the first call of `fit`.

    Raises:
        UsageError: the kind of training is not supported, or the optimizer lacks the adapters.
        UnknownNameError: the LightningModule has no submodule with the path `student`.
        CheckpointError: a checkpoint to resume from has no adapters.
        DataError: all targets of a step are masked.
    """

    def __init__(
        self,
        teacher: Any,
        objective: Objective,
        *,
        student: str = "",
        batch_of: Callable[[Any], Any] | None = None,
        example_batch: Any = None,
        seed: int = 0,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        self._distillation = (teacher, objective, seed, regularizers)
        self._path, self._batch_of, self._example = student, batch_of or Batch.of, example_batch
        self._converts = batch_of is not None
        self.distiller: Distiller | None = None
        self._undo: list[Callable[[], Any]] = []
        self._step_items = 0  # items of this process since the last optimizer step, if batches are weighted
        self._host_counts: dict[str, int] | None = None  # counts of the current batch, before it is on the device
        self._item_unit = 0.0  # losses are divided by this number of items, which keeps gradients small

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Create the distiller; the student has the parameters of the adapters until `teardown`."""
        if stage != "fit":
            return
        teacher, objective, seed, regularizers = self._distillation
        _check(trainer, pl_module, objective)
        student = _part(pl_module, self._path)
        if self.distiller is None or self.distiller.student is not student:
            example = self._example
            if example is None:
                loader, example = _first_batch(trainer, student)
                if trainer.world_size == 1:
                    check_single_samples(
                        framework_of(student).inference, student, loader, Batch.of(self._batch_of(example))
                    )
            self.distiller = Distiller(
                student, teacher, objective, self._batch_of(example), seed=seed, regularizers=regularizers
            )
        self._step_items, self._item_unit = 0, 0.0
        self._register_adapters(student, self.distiller.adapters)
        self._count_before_transfer(trainer, pl_module)
        original_step = pl_module.training_step
        pl_module.training_step = lambda batch, *_: self._step(trainer, pl_module, batch)
        self._undo.append(lambda: _restore_training_step(pl_module, original_step))

    def _count_before_transfer(self, trainer: Any, pl_module: Any) -> None:
        """Count and check the labels of each training batch before Lightning moves it to the device."""
        self._host_counts = None
        owners = [owner for owner in (pl_module, trainer.datamodule) if owner is not None]
        own = [callback for callback in trainer.callbacks if not type(callback).__module__.startswith("lightning.")]
        hooks = [(hook, owner) for hook in ("transfer_batch_to_device", "on_after_batch_transfer") for owner in owners]
        hooks += [("on_train_batch_start", owner) for owner in (pl_module, *own)]
        if self._converts or any(is_overridden(*each) for each in hooks):  # they may change the labels
            return
        original = pl_module._on_before_batch_transfer  # noqa: SLF001 - the public hook may be that of the data module

        def count(*args: Any, **kwargs: Any) -> Any:
            batch = original(*args, **kwargs)
            training = trainer.training and (len(args) > 1 or "dataloader_idx" in kwargs)  # not the model summary
            self._host_counts = self._current_distiller().counts([batch]) if training else None
            return batch

        pl_module._on_before_batch_transfer = count  # noqa: SLF001 - see above
        self._undo.append(lambda: delattr(pl_module, "_on_before_batch_transfer"))

    def _register_adapters(self, student: Any, adapters: Any) -> None:
        """Register the adapters' parameters in the student, without adding them to its `state_dict`.

        They are registered as parameters, since a `Sequential` would call registered modules in its forward.
        """
        parameters = {f"{ADAPTER_PREFIX}{number}": p for number, p in enumerate(adapters.parameters())}
        for name, parameter in parameters.items():
            student.register_parameter(name, parameter)

        def remove_from_state(_module: Any, state: Any, prefix: str, _metadata: Any) -> None:
            for name in parameters:
                state.pop(prefix + name)

        def add_current_values(_module: Any, state: Any, prefix: str, *_: Any) -> None:
            state.update({prefix + name: parameter for name, parameter in parameters.items()})

        self._undo += [
            student.register_state_dict_post_hook(remove_from_state).remove,
            student.register_load_state_dict_pre_hook(add_current_values).remove,
            *(partial(delattr, student, name) for name in parameters),
        ]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse an optimizer that lacks the adapters."""
        self._current_distiller().adapters.to(pl_module.device)  # moves buffers; Lightning has moved the parameters
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        optimized = {id(p) for group in groups for p in group["params"]}
        if any(p.requires_grad and id(p) not in optimized for p in self._current_distiller().adapters.parameters()):
            student = f"self.{self._path}" if self._path else "self"
            raise UsageError(
                f"The optimizer of {type(pl_module).__name__} lacks the adapters of the objective.",
                f"During training they are parameters of {student}.",
                f"Give the optimizer {student}.parameters(), or name the part that it trains: student=...",
            )

    def _current_distiller(self) -> Distiller:
        if self.distiller is None:
            raise UsageError(
                "Distillation is not set up.", fix="Pass it to the Trainer: callbacks=[Distillation(...)]."
            )
        return self.distiller

    def _step(self, trainer: Any, pl_module: Any, loader_batch: Any) -> Any:
        """Return the loss of one batch, scaled so that the gradients of a step can be averaged over items.

        If a step has several batches or processes, the loss is multiplied by the number of items in the batch, and by
        the number of batches per step, because Lightning divides by the latter. `on_before_optimizer_step` divides the
        gradients by the number of items in the step.
        """
        distiller, batch = self._current_distiller(), Batch.of(self._batch_of(loader_batch))
        accumulate = trainer.accumulate_grad_batches
        first_batch = trainer.fit_loop.epoch_loop.batch_idx // accumulate * accumulate
        done = first_batch / trainer.num_training_batches  # at the start of the step; 0 for a loader without length
        single = accumulate == 1 and trainer.world_size == 1
        counts = None if single else self._host_counts or distiller.counts([batch])
        loss = distiller(batch, trainer.current_epoch + done, step_counts=counts, batch_counts=self._host_counts)
        parts = {f"loss/{name}": part.detach() for name, part in {**loss.terms, **loss.adapter_losses}.items()}
        shares = {f"gradient_share/{name}": share for name, share in distiller.shares.items()}
        size = len(batch)
        pl_module.log("loss", loss.total.detach(), prog_bar=True, batch_size=size)
        pl_module.log_dict(parts | shares, batch_size=size)
        if counts is None:
            return loss.total
        items = counts["labels"]
        if not self._item_unit:
            # The unit is the same in all processes. It is a power of two, by which division is exact, so that a
            # resumed run, which may have another unit, computes the same gradients.
            self._item_unit = 2.0 ** round(math.log2(max(1.0, float(_over_processes(trainer, items, "mean")))))
        self._step_items += items
        return loss.total * (items / self._item_unit * accumulate)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002 - Lightning's
        """Divide the gradients by the number of items of the step."""
        if not self._item_unit:
            return
        items = float(_over_processes(trainer, self._step_items, "sum"))
        self._step_items = 0
        require_labels({"labels": int(items)}, f"step {trainer.global_step + 1}")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # DDP has averaged gradients over processes
                    parameter.grad.mul_(self._item_unit * trainer.world_size / items)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the distiller, for checkpoints."""
        return {} if self.distiller is None else self.distiller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        if self.distiller is not None:
            self.distiller.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002 - Lightning's
        """Refuse a checkpoint without the adapters."""
        if self._undo and self.state_key not in checkpoint.get("callbacks", {}):
            raise CheckpointError(
                "The checkpoint has no state of Distillation.",
                "It was saved by a Trainer without this callback.",
                "Load its weights into the module, and call fit without ckpt_path.",
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 - Lightning's
        """Remove adapters and hooks from the student."""
        while self._undo:
            self._undo.pop()()
        if self.distiller is not None:
            self.distiller.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002 - Lightning's
        """Remove adapters and hooks from the student after an error."""
        self.teardown(trainer, pl_module, "fit")


def _check(trainer: Any, module: Any, objective: Objective) -> None:
    """Refuse settings with which training would run, but not minimize the objective."""
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise UsageError(
            f"The Trainer would distribute the student with {type(strategy).__name__}.",
            "Distillation needs the whole student in each process.",
            'Use strategy="ddp".',
        )
    if not module.automatic_optimization:
        raise UsageError(
            f"{type(module).__name__} has manual optimization, and its training_step would not be called.",
            fix="Use automatic optimization, or call a kirsch.Distiller in training_step, without this callback.",
        )
    if objective.balance == "gradient" and trainer.world_size > 1:
        raise UsageError(
            'The objective has balance="gradient", and there are several processes.',
            "Each process would weight the terms by the gradients of its own samples.",
            'Use balance="fixed", or one process.',
        )


def _part(module: Any, path: str) -> Any:
    """Return the student within a LightningModule."""
    parts = dict(module.named_modules())
    if path not in parts:
        raise UnknownNameError(f"part of {type(module).__name__} named", path, [name for name in parts if name])
    if not any(True for _ in parts[path].parameters()):
        raise UsageError(
            f"{type(module).__name__} has no parameters yet.",
            "The student must exist before setup and configure_model.",
            "Create the model in __init__.",
        )
    return parts[path]


def _first_batch(trainer: Any, student: Any) -> tuple[Any, Any]:
    """Return the training loader and its first batch."""
    source = trainer.fit_loop._data_source  # noqa: SLF001 - not public before the loop starts
    loader = source.dataloader()
    if isinstance(loader, (dict, list, tuple, CombinedLoader)):
        raise UsageError(
            "The training data is not a single loader.",
            fix="Give Distillation an example_batch, and batch_of= if a batch is not (inputs, targets).",
        )
    # `seeded` restores the random state of the run afterwards.
    first = framework_of(student).training.seeded(lambda: next(iter(loader), None), 0)
    if first is None:
        raise DataError("The training data is empty.", fix="Give at least one batch.")
    return loader, first


def _restore_training_step(module: Any, step: Any) -> None:
    del module.training_step
    if module.training_step != step:  # an attribute of the object, not of its class
        module.training_step = step


def _over_processes(trainer: Any, number: int, reduction: str) -> Any:
    if trainer.world_size == 1:
        return number
    return trainer.strategy.reduce(
        torch.tensor(float(number), device=trainer.strategy.root_device), reduce_op=reduction
    )
