"""How to train, as data: settings, hooks and what comes back. Each framework's `train.py` fulfills it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from kirsch.annotations import Count, Seed
from kirsch.arguments import checked
from kirsch.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.frameworks.data import Batch


@checked
@dataclass(frozen=True)
class Training:
    """Settings of one training run.

    Args:
        epochs: passes over the data, >= 1.
        learning_rate: peak learning rate, > 0.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw".
        weight_decay: >= 0; not applied to biases and normalization parameters.
        schedule: "cosine" to zero, "multistep" (times 0.1 at each milestone), or "constant".
        milestones: fractions of what follows the warm-up, ascending, for "multistep".
        warmup_epochs: epochs of linear warm-up, >= 0.
        clip_norm: largest gradient norm, > 0; None leaves gradients as they are.
        accumulate: batches whose gradients make one step, >= 1; items count alike in whichever batch they are.
        precision: "fp32", or "bf16" or "fp16" for what automatic casting computes in 16 bits.
        ema: share that a moving average of the weights keeps at each step, 0 < share < 1; that average is then judged
            and given back. None takes the weights themselves.
        seed: of everything random in the run, >= 0.
    """

    made_by: ClassVar[str] = "kirsch.Training(epochs=10)"

    epochs: Count = 10
    learning_rate: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    seed: Seed = 0
    accumulate: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None

    def __post_init__(self) -> None:  # noqa: C901, PLR0912 - one sentence a setting
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
            problems.append(f"warmup_epochs is {self.warmup_epochs}; a number from 0 to {self.epochs} is needed")
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            problems.append(f"clip_norm is {self.clip_norm}; a number above 0, or None, is needed")
        if self.accumulate < 1:
            problems.append(f"accumulate is {self.accumulate}; at least 1 is needed")
        if self.precision not in ("fp32", "bf16", "fp16"):
            problems.append(f"precision is {self.precision!r}; known: fp32, bf16, fp16")
        if self.ema is not None and not 0 < self.ema < 1:
            problems.append(f"ema is {self.ema}; a share above 0 and below 1, or None, is needed")
        if self.seed < 0:
            problems.append(f"seed is {self.seed}; a whole number of at least 0 is needed")
        if problems:
            raise UsageError("The training settings are wrong: " + "; ".join(problems) + ".")


@dataclass
class LossOutput:
    """What a batch is charged.

    Args:
        total: scalar with gradient: all parts together, and what is aside.
        parts: its weighted parts by name, each with gradient for the model.
        aside: parts of the total that train an adapter and not the model.
    """

    total: Any
    parts: dict[str, Any]
    aside: dict[str, Any] = field(default_factory=dict)


class LossFunction(Protocol):
    """What a training step minimizes."""

    def __call__(self, model: Any, batch: Batch, epoch: float, of: Mapping[str, int] | None = None) -> LossOutput:
        """What the batch is charged.

        Args:
            model: the module.
            batch: one.
            epoch: how many are done.
            of: counts of the step that the batch is a part of. Each mean is then the batch's share of that over the
                step, so that the charges of all its batches, in all processes, add up. None: the batch is the step.
        """

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """How many there are of what the means go over, by name; always the same names, and among them "labels".

        These are the samples or positions that are charged. Where there is none in a whole step, there is nothing to
        learn from.
        """

    def check(self, batch: Batch) -> list[str]:
        """Refuse a batch of a loader whose targets are not what the loss takes; those of another device are skipped.

        Returns:
            Warnings, a sentence each.

        Raises:
            DataError: its targets are of another kind or out of range, or it has none and there is nothing else to
                learn from.
        """

    def balance(self, norms: dict[str, float]) -> None:
        """Told the gradient norms of the parts, at the first batch of each epoch."""

    def state(self) -> dict[str, Any]:
        """What the loss has learned itself, JSON-able."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


@checked
@dataclass
class TrainingHooks:
    """What the caller of a training run wants to see and to decide; each may be left out.

    Args:
        validate: model → metrics by name, called after each epoch; "accuracy" is shown if there.
        event: called with one JSON-able dict per event: {"event": "first_batch" | "doubt" | "epoch", ...}. Without it,
            a doubt is a Python warning.
        stop: returns an error (`Preempted`, `Interrupted`) when the run shall stop; asked after each batch.
        save: called with a `TrainingState` after each epoch, and before a stop is obeyed.
        resume: a state to go on from.
    """

    made_by: ClassVar[str] = "kirsch.frameworks.training.TrainingHooks(event=..., stop=..., save=...)"

    validate: Callable[[Any], dict[str, float]] | None = None
    event: Callable[[dict[str, Any]], None] | None = None
    stop: Callable[[], Exception | None] | None = None
    save: Callable[[TrainingState], None] | None = None
    resume: TrainingState | None = None

    def doubt(self, text: str, **more: Any) -> None:
        """Say what seems wrong where somebody hears it."""
        if self.event is None:
            warnings.warn(text, stacklevel=3)
        else:
            self.event({"event": "doubt", **more, "text": text})


@dataclass
class TrainingState:
    """Everything that a run needs to go on in the same bits.

    Args:
        arrays: numpy arrays by name: parameters, buffers, optimizer state ("optimizer." ...), states of a loader's own
            generators.
        values: JSON-able: epoch, batches done in it, sums over them, history, shares of the first batch, settings.
    """

    arrays: dict[str, Any]
    values: dict[str, Any]

    def ended(self) -> TrainingState:
        """The state after the last epoch, from which the result can be had, without what only more steps would need."""
        kept = {name: array for name, array in self.arrays.items() if not name.startswith("optimizer.")}
        return TrainingState(kept, self.values)


LEAST_SHARE, MOST_SHARE = 0.001, 0.999
"""Shares of the gradient below and above which a term is doubted."""


def shares_of(norms: Mapping[str, float]) -> dict[str, float]:
    """What part each of some lengths has of their sum; all 0 where that is 0."""
    whole = sum(norms.values())
    return {name: norm / whole if whole else 0.0 for name, norm in norms.items()}


def doubts(shares: Mapping[str, float], began: Mapping[str, float]) -> dict[str, str]:
    """Return a warning for each term whose share of the gradient suggests a wrong weight or a wrong comparison.

    A term whose share was normal on the first batch and has become small since is learned, which is not warned of.

    Args:
        shares: by term; they add up to 1, or are all 0.
        began: shares of the first batch of the run.
    """
    found = {
        name: f"The term {name!r} is 0 on the first batch, and has no gradient. This is expected if student and "
        "teacher agree already, as copies do. Otherwise the term compares outputs that cannot differ, such as the "
        "softmax over one class."
        for name, share in shares.items()
        if share == began.get(name) == 0 and all(map(math.isfinite, shares.values()))
    }
    present = {name: share for name, share in shares.items() if share > 0}
    learned = {name for name, share in present.items() if share < LEAST_SHARE <= began.get(name, 0.0)}
    for name, share in present.items():
        if share < LEAST_SHARE and name not in learned:
            found[name] = (
                f"The term {name!r} is {share:.2g} of the gradient, so it has almost no effect. Its weight may be "
                "that of another convention: a loss that is averaged over classes, or lacks the factor T², is that "
                "much smaller."
            )
        elif share > MOST_SHARE and len(present) > 1 and not learned:
            found[name] = (
                f"The term {name!r} is {share:.4%} of the gradient, so that the other terms have almost no effect. Its "
                "weight may be that of another convention: a loss that is summed over samples or elements is that much "
                "larger."
            )
    return found


def require_labels(counts: Mapping[str, int], step: str) -> None:
    """Refuse a step of which nothing counts.

    Raises:
        DataError: all of its targets are masked.
    """
    if not counts["labels"]:
        raise DataError(f"All targets of {step} are masked.", fix="Look at the mask and the labels of the data.")


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
