"""How to train, as data: settings, hooks and what comes back. Each framework's `train.py` fulfils it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from kirsch.errors import DataError, ShapeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Augment = Callable[[Any, np.random.Generator], Any]
"""(batch of inputs, generator) → inputs of the same shape; all its randomness comes from the generator."""


@dataclass(frozen=True)
class Training:
    """Settings of one training run.

    Args:
        epochs: passes over the data, >= 1.
        learning_rate: peak learning rate, > 0.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw".
        weight_decay: >= 0; not applied to biases and normalisation parameters.
        schedule: "cosine" to zero, "multistep" (times 0.1 at each milestone), or "constant".
        milestones: fractions of what follows the warm-up, ascending, for "multistep".
        warmup_epochs: epochs of linear warm-up, >= 0.
        clip_norm: largest gradient norm, > 0; None leaves gradients as they are.
        seed: of everything random in the run, >= 0.
    """

    epochs: int = 10
    learning_rate: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:  # noqa: C901 - one sentence a setting
        problems = []
        if self.epochs < 1:
            problems.append(f"epochs is {self.epochs}; at least 1 is needed")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            problems.append(f"learning_rate is {self.learning_rate}; a number above 0 is needed")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            problems.append(f"weight_decay is {self.weight_decay}; a number of at least 0 is needed")
        if self.optimizer not in ("sgd", "adamw"):
            problems.append(f"optimizer is {self.optimizer!r}; known: sgd, adamw")
        if self.schedule not in ("cosine", "multistep", "constant"):
            problems.append(f"schedule is {self.schedule!r}; known: cosine, multistep, constant")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            problems.append(f"milestones are {self.milestones}; ascending fractions between 0 and 1 are needed")
        if not 0 <= self.warmup_epochs <= self.epochs:
            problems.append(f"warmup_epochs is {self.warmup_epochs}; 0 to {self.epochs} is possible")
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            problems.append(f"clip_norm is {self.clip_norm}; a number above 0, or None, is needed")
        if self.seed < 0:
            problems.append(f"seed is {self.seed}; a whole number of at least 0 is needed")
        if problems:
            raise UsageError("The training settings are wrong: " + "; ".join(problems) + ".")


class LossFunction(Protocol):
    """What a training step minimises."""

    def __call__(self, model: Any, inputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
        """The total (scalar with gradient), and its weighted parts by name (scalars with gradient)."""


@dataclass
class TrainingHooks:
    """What the caller of a training run wants to see and to decide; each may be left out.

    Args:
        validate: model → metrics by name, called after each epoch; "accuracy" is shown if there.
        event: called with one JSON-able dict per event: {"event": "first_batch" | "epoch", ...}.
        stop: returns an error (`Preempted`, `Interrupted`) when the run shall stop; asked after each batch.
        save: called with a `TrainingState` after each epoch, and before a stop is obeyed.
        resume: a state to go on from.
    """

    validate: Callable[[Any], dict[str, float]] | None = None
    event: Callable[[dict[str, Any]], None] | None = None
    stop: Callable[[], Exception | None] | None = None
    save: Callable[[TrainingState], None] | None = None
    resume: TrainingState | None = None


@dataclass
class TrainingState:
    """Everything that a run needs to go on in the same bits.

    Args:
        arrays: numpy arrays by name: parameters, buffers, optimizer state, states of a loader's own generators.
        values: JSON-able: epoch, batches done in it, sums over them, history, shares of the first batch.
    """

    arrays: dict[str, Any]
    values: dict[str, Any]


@dataclass
class Trained:
    """What a training run gives back.

    Args:
        model: the trained model, in inference mode.
        history: one dict per epoch: epoch, loss, parts, learning_rate, seconds, and the validation metrics.
        first_batch: what the first-batch check saw: shares of the loss and of the gradient by part.
    """

    model: Any
    history: list[dict[str, Any]] = field(default_factory=list)
    first_batch: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Labelled samples in memory, whose order and augmentation follow from a seed alone.

    The order of an epoch is drawn from (seed, epoch), the augmentation of a batch from (seed, epoch, batch), so that a
    run can go on in the middle of an epoch in the same bits.

    Args:
        inputs: shape (N, ...), floating.
        targets: class numbers, shape (N,), whole numbers >= 0.
        batch_size: >= 1; a last batch of one sample joins the one before, since normalisation needs two.
        augment: applied to each batch; None leaves samples as they are.

    Raises:
        DataError: there are no samples, or inputs are not finite.
        ShapeError: inputs and targets differ in number.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    batch_size: int = 64
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if not len(self.inputs):
            raise DataError("The data is empty.", mend="Give at least one sample.")
        if len(self.inputs) != len(self.targets):
            raise ShapeError(f"There are {len(self.inputs)} inputs and {len(self.targets)} targets.")
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; at least 1 is needed.")
        bad = ~np.isfinite(self.inputs.reshape(len(self.inputs), -1)).all(axis=1)
        if bad.any():
            raise DataError(f"Sample {int(bad.argmax())} holds NaN or infinity.", mend="Repair or leave it out.")

    def __len__(self) -> int:
        """Batches of one epoch."""
        full, rest = divmod(len(self.inputs), self.batch_size)
        return max(1, full + (rest > 1 or (rest == 1 and full == 0)))

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """The batches of an epoch, from batch `start` on."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.inputs))
        borders = [*range(0, len(self) * self.batch_size, self.batch_size), len(order)]
        for number in range(start, len(self)):
            chosen = order[borders[number] : borders[number + 1]]
            batch = self.inputs[chosen]
            if self.augment is not None:
                batch = self.augment(batch, np.random.default_rng([seed, epoch, number]))
            yield batch, self.targets[chosen]
