"""Distilling in the `Trainer` of Lightning.

    trainer = lightning.Trainer(callbacks=[Distillation(teacher, kirsch.Objective.kd())])
    trainer.fit(module)

All losses, places and adapters of an objective work. Validation, and what is exported, know the student alone.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kirsch.distillation.checks import check_last_batch
from kirsch.distillation.distiller import Distiller
from kirsch.errors import CheckpointError, DataError, MissingExtraError, UnknownNameError, UsageError
from kirsch.frameworks.data import Batch
from kirsch.frameworks.port import framework_of
from kirsch.frameworks.training import require_labels

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities import CombinedLoader
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "lightning", "lightning", "to distill in the Trainer of Lightning") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.annotations import Regularizer

BESIDE = "distillation_adapter"
"""Name, with a number behind it, of each parameter of the adapters that the student holds while it is trained."""


class Distillation(Callback):  # type: ignore[misc]  # Lightning tells no types
    """Has `fit` minimize an objective in place of what `training_step` returns, which is not called.

    Adapters are among the `parameters()` of the student while it is trained, so that `configure_optimizers`, DDP and
    clipping take them in; they lie in checkpoints as the state of this callback, and in no `state_dict` of a model. The
    batches and processes of one step are weighed by how many samples or positions count in them. Each term's part of
    the loss and its share of the gradient are logged.

    Args:
        teacher: see `kirsch.Distiller`.
        objective: what is minimized.
        student: path of the part of the LightningModule that learns, such as "model", the root of layer names; the
            module itself if left out, by its `forward`. It must be there before `setup` and `configure_model`.
        batch_of: what a loader gives → (inputs, targets), or else that `kirsch.frameworks.data.Batch.of` takes; as it
            comes if left out.
        example_batch: as a loader gives it; the first of the training data if left out.
        seed: of what adapters begin with.
        regularizers: further terms of the student alone.

    Attributes:
        distiller: the `kirsch.Distiller`, from the first call of `fit` on.

    Raises:
        UsageError: the training is of a kind that distillation cannot follow, or the optimizer lacks the adapters.
        UnknownNameError: the module has no such part.
        CheckpointError: a checkpoint to go on from lacks the adapters.
        DataError: no target of a step counts.
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
        self._taught = (teacher, objective, seed, regularizers)
        self._path, self._batch_of, self._example = student, batch_of or Batch.of, example_batch
        self.distiller: Distiller | None = None
        self._undo: list[Callable[[], Any]] = []
        self._own = 0  # items of this process since the last step of the optimizer, where they are weighed
        self._unit = 0.0  # by which many of them their sum is kept small

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Bind the objective to the student, which holds the adapters until `teardown`."""
        if stage != "fit":
            return
        teacher, objective, seed, regularizers = self._taught
        _check(trainer, pl_module, objective)
        student = _part(pl_module, self._path)
        if self.distiller is None or self.distiller.student is not student:
            example = self._example
            if example is None:
                loader, example = _first(trainer, student)
                if trainer.world_size == 1:
                    check_last_batch(framework_of(student), student, loader, Batch.of(self._batch_of(example)))
            self.distiller = Distiller(
                student, teacher, objective, self._batch_of(example), seed=seed, regularizers=regularizers
            )
        self._own, self._unit = 0, 0.0
        self._hold(student, self.distiller.adapters)
        own = pl_module.training_step
        pl_module.training_step = lambda batch, *_: self._step(trainer, pl_module, batch)
        self._undo.append(lambda: _put_back(pl_module, own))

    def _hold(self, student: Any, adapters: Any) -> None:
        """Let the student hold the parameters of the adapters, and none of its states.

        Parameters and not modules, over which a `Sequential` would go in its forward.
        """
        held = {f"{BESIDE}{place}": parameter for place, parameter in enumerate(adapters.parameters())}
        for name, parameter in held.items():
            student.register_parameter(name, parameter)

        def leave_out(_module: Any, state: Any, prefix: str, _metadata: Any) -> None:
            for name in held:
                state.pop(prefix + name)

        def leave_as_they_are(_module: Any, state: Any, prefix: str, *_: Any) -> None:
            state.update({prefix + name: parameter for name, parameter in held.items()})

        self._undo += [
            student.register_state_dict_post_hook(leave_out).remove,
            student.register_load_state_dict_pre_hook(leave_as_they_are).remove,
            *(partial(delattr, student, name) for name in held),
        ]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse an optimizer that lacks the adapters."""
        self._bound().adapters.to(pl_module.device)  # their buffers; Lightning has seen to the parameters
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        if any(p.requires_grad and id(p) not in held for p in self._bound().adapters.parameters()):
            whose = f"self.{self._path}" if self._path else "self"
            raise UsageError(
                f"The optimizer of {type(pl_module).__name__} lacks the adapters of the objective.",
                f"While it is trained, {whose} has them among its parameters.",
                f"Give the optimizer {whose}.parameters(); where it is given those of a part, name it: student=...",
            )

    def _bound(self) -> Distiller:
        if self.distiller is None:
            raise UsageError(
                "Distillation is not set up.", fix="Give it to the Trainer: callbacks=[Distillation(...)]."
            )
        return self.distiller

    def _step(self, trainer: Any, pl_module: Any, given: Any) -> Any:
        """The loss of one batch, as Lightning divides it by the number of batches of a step."""
        found, batch = self._bound(), Batch.of(self._batch_of(given))
        begun = (
            trainer.fit_loop.epoch_loop.batch_idx // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches
        )
        done = begun / trainer.num_training_batches  # as the step begins; of a loader without length, 0
        alone = trainer.accumulate_grad_batches == 1 and trainer.world_size == 1
        counts = None if alone else found.counts([batch])
        charge = found(batch, trainer.current_epoch + done, of=counts)
        parts = {f"loss/{name}": part.detach() for name, part in {**charge.parts, **charge.aside}.items()}
        shares = {f"gradient_share/{name}": share for name, share in found.shares.items()}
        size = len(batch)
        pl_module.log("loss", charge.total.detach(), prog_bar=True, batch_size=size)
        pl_module.log_dict(parts | shares, batch_size=size)
        if counts is None:
            return charge.total
        items = counts["labels"]
        if not self._unit:
            # The same in all processes. A power of two, so that a run which goes on from elsewhere rounds alike.
            self._unit = 2.0 ** round(math.log2(max(1.0, float(_over_processes(trainer, items, "mean")))))
        self._own += items
        return charge.total * (items / self._unit * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002 - Lightning's
        """Divide the gradients by how many items the step has."""
        if not self._unit:
            return
        items = float(_over_processes(trainer, self._own, "sum"))
        self._own = 0
        require_labels({"labels": int(items)}, f"step {trainer.global_step + 1}")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # DDP has divided the sum of the processes' by their number
                    parameter.grad.mul_(self._unit * trainer.world_size / items)

    def state_dict(self) -> dict[str, Any]:
        """Adapters and balance, for checkpoints."""
        return {} if self.distiller is None else self.distiller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self.distiller is not None:
            self.distiller.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002 - Lightning's
        """Refuse a checkpoint without the adapters."""
        if self._undo and self.state_key not in checkpoint.get("callbacks", {}):
            raise CheckpointError(
                "The checkpoint holds no state of Distillation.",
                "It was saved by a Trainer without that callback.",
                "Load its weights into the module instead, and call fit without ckpt_path.",
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 - Lightning's
        """Take adapters and hooks from the student."""
        while self._undo:
            self._undo.pop()()
        if self.distiller is not None:
            self.distiller.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002 - Lightning's
        """The same, where `fit` ends otherwise."""
        self.teardown(trainer, pl_module, "fit")


def _check(trainer: Any, module: Any, objective: Objective) -> None:
    """Refuse what would be wrong without a word."""
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise UsageError(
            f"The Trainer would spread the student by {type(strategy).__name__}.",
            "What stands beside it cannot follow there.",
            'Take strategy="ddp", which has the whole student in each process.',
        )
    if not module.automatic_optimization:
        raise UsageError(
            f"The training_step of {type(module).__name__} steps its optimizer itself, and it would not be called.",
            fix="Call a kirsch.Distiller there, in place of the loss.",
        )
    if objective.balance == "gradient" and trainer.world_size > 1:
        raise UsageError(
            "Each process would balance the terms by the gradients of its own samples.",
            fix='Take balance="fixed", or one process.',
        )


def _part(module: Any, path: str) -> Any:
    """The student within a LightningModule."""
    parts = dict(module.named_modules())
    if path not in parts:
        raise UnknownNameError(f"part of {type(module).__name__}", path, [name for name in parts if name])
    if not any(True for _ in parts[path].parameters()):
        raise UsageError(
            f"{type(module).__name__} has no parameters yet, so there is no student.",
            "The objective is bound before setup and configure_model.",
            "Make the model in __init__.",
        )
    return parts[path]


def _first(trainer: Any, student: Any) -> tuple[Any, Any]:
    """The loader of the training, and the first batch that training would see."""
    source = trainer.fit_loop._data_source  # noqa: SLF001 - it has no public name before the loop begins
    loader = source.dataloader()
    if isinstance(loader, (dict, list, tuple, CombinedLoader)):
        raise UsageError(
            "There are several loaders, or batches without one.",
            fix="Give Distillation an example_batch, and batch_of= if it is not (inputs, targets).",
        )
    first = framework_of(student).seeded(lambda: next(iter(loader), None), 0)  # the order of the run is left as it is
    if first is None:
        raise DataError("The training data is empty.", fix="Give at least one batch.")
    return loader, first


def _put_back(module: Any, step: Any) -> None:
    """Give a module its own training step again."""
    del module.training_step
    if module.training_step != step:  # it was of the object, not of its class
        module.training_step = step


def _over_processes(trainer: Any, number: int, way: str) -> Any:
    if trainer.world_size == 1:
        return number
    return trainer.strategy.reduce(torch.tensor(float(number), device=trainer.strategy.root_device), reduce_op=way)
