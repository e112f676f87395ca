"""How to train, as data: settings, hooks and what comes back. Each framework's `train.py` fulfils it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.frameworks.augment import apply, check, sample_seeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from kirsch.frameworks.augment import Augment, Seeded


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
class Batch:
    """What a training step is given of `ArrayData`.

    Args:
        inputs: shape (N, ...), augmented.
        targets: class numbers, shape (N,); None of data without labels.
        ids: of the samples, shape (N,).
        view: which augmented look of the samples it is, >= 0.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any] | None
    ids: NDArray[Any]
    view: int


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Samples in memory, whose order and augmentation follow from a seed alone.

    The order of an epoch is drawn from (seed, epoch), the augmentation of a sample from (seed, view, id), so that a run
    can go on in the middle of an epoch in the same bits, and a teacher's output for that very look of the sample can be
    looked up.

    Args:
        inputs: shape (N, ...), finite.
        targets: class numbers, shape (N,), whole numbers >= 0; None where there are none.
        batch_size: >= 1; a last batch of one sample joins the one before, since normalisation needs two.
        augment: a transform of `kirsch.frameworks.augment`, or a user's (batch, generator) → batch, which is called
            with one sample at a time; None leaves samples as they are.
        ids: unique whole numbers, shape (N,); 0 to N - 1 if left out.
        views: how many looks of a sample there are: epoch e shows look e modulo this; None gives each epoch its own.

    Raises:
        DataError: there are no samples, inputs are not finite, or ids are not unique.
        ShapeError: inputs and targets or ids differ in number.
        UsageError: the transform takes no generator or does not follow from it, or a setting is out of range.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any] | None
    batch_size: int = 64
    augment: Seeded | Augment | None = None
    ids: NDArray[Any] | None = None
    views: int | None = None

    def __post_init__(self) -> None:
        if not len(self.inputs):
            raise DataError("The data is empty.", mend="Give at least one sample.")
        if self.targets is not None and len(self.inputs) != len(self.targets):
            raise ShapeError(f"There are {len(self.inputs)} inputs and {len(self.targets)} targets.")
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; at least 1 is needed.")
        if self.views is not None and self.views < 1:
            raise UsageError(f"views is {self.views}; at least 1, or None, is needed.")
        bad = ~np.isfinite(self.inputs.reshape(len(self.inputs), -1)).all(axis=1)
        if bad.any():
            raise DataError(f"Sample {int(bad.argmax())} holds NaN or infinity.", mend="Repair or leave it out.")
        if self.ids is not None:
            _check_ids(self.ids, len(self.inputs))
        check(self.augment, self.inputs[:1])

    def __len__(self) -> int:
        """Batches of one epoch."""
        full, rest = divmod(len(self.inputs), self.batch_size)
        return max(1, full + (rest > 1 or (rest == 1 and full == 0)))

    @cached_property
    def sample_ids(self) -> NDArray[Any]:
        """The id of each sample: those given, or 0 to N - 1."""
        return np.arange(len(self.inputs)) if self.ids is None else self.ids

    def look(self, places: NDArray[Any], seed: int, view: int) -> Batch:
        """Some samples as one view of a run shows them.

        Args:
            places: indices of samples, shape (N,).
            seed: of the run.
            view: see `Batch`.
        """
        ids = self.sample_ids[places]
        inputs = apply(self.augment, self.inputs[places], sample_seeds(seed, view, ids))
        return Batch(inputs, None if self.targets is None else self.targets[places], ids, view)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.inputs))
        borders = [*range(0, len(self) * self.batch_size, self.batch_size), len(order)]
        view = epoch if self.views is None else epoch % self.views
        for number in range(start, len(self)):
            yield self.look(order[borders[number] : borders[number + 1]], seed, view)


def _check_ids(ids: NDArray[Any], count: int) -> None:
    if len(ids) != count:
        raise ShapeError(f"There are {count} inputs and {len(ids)} ids.")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"The ids have shape {ids.shape} and type {ids.dtype}.", "One whole number a sample is needed.")
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DataError(
            "The sample ids are not unique.",
            f"{int(twice[0])} stands for more than one sample.",
            "Give each sample a number of its own.",
        )
