"""Training settings, hooks, loss protocol and results; each framework implements the training loop."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field

from kirsch import figures
from kirsch.annotations import AtLeastZero, Count, Fraction, Positive, Seed, value_phrase
from kirsch.arguments import checked
from kirsch.errors import DataError, UsageError
from kirsch.options import Options
from kirsch.progress import epoch_text
from kirsch.tables import Part, Piece, Printable
from kirsch.user_warnings import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.data.batches import Batch


class Training(Options):
    """Settings of one training run.

    Args:
        epochs: passes over the data, >= 1.
        learning_rate: peak learning rate, > 0.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw".
        weight_decay: >= 0; not applied to biases and normalization parameters.
        schedule: "cosine" to zero, "multistep" (times 0.1 at each milestone), or "constant".
        milestones: ascending fractions of the steps after the warm-up, used by the schedule "multistep".
        warmup_epochs: epochs of linear warm-up, 0 to `epochs`.
        max_grad_norm: largest gradient norm, > 0; None for no clipping.
        gradient_accumulation_steps: batches per optimizer step, >= 1; each sample has the same weight, also if the
            batch sizes differ.
        precision: "fp32"; or "bf16" or "fp16" for automatic mixed precision.
        ema_decay: decay of an exponential moving average of the weights, above 0 and below 1; the averaged weights are
            evaluated and returned. None for no average.
        seed: seed of all random numbers of the run, >= 0.

    Raises:
        UsageError: a setting is out of range; the message lists all of them.
    """

    made_by: ClassVar[str] = "kirsch.Training(epochs=10)"

    epochs: Count = Field(10, description="passes over the data")
    learning_rate: Positive = Field(0.05, description="peak learning rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd (momentum 0.9, Nesterov) or adamw")
    weight_decay: AtLeastZero = Field(5e-4, description="weight decay, not on biases and normalization")
    schedule: Literal["cosine", "multistep", "constant"] = Field("cosine", description="schedule of the learning rate")
    milestones: tuple[Fraction, ...] = Field(
        (0.5, 0.75),
        description=(
            "ascending fractions of the run after the warm-up, used by multistep; at each of them, the learning rate "
            "is divided by 10"
        ),
    )
    warmup_epochs: AtLeastZero = Field(0.0, description="epochs of linear warm-up")
    max_grad_norm: Positive | None = Field(None, description="largest gradient norm; null: no limit")
    gradient_accumulation_steps: Count = Field(1, description="batches per optimizer step")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="bf16 and fp16: mixed precision")
    ema_decay: Fraction | None = Field(None, description="decay of a moving average of the weights; null: none")
    seed: Seed = Field(0, description="seed of all random numbers")

    def check(self) -> None:
        """Check that the milestones ascend and have an effect, and that the warm-up is not longer than the run."""
        problems = []
        if list(self.milestones) != sorted(self.milestones):
            problems.append(f"milestones are {self.milestones}; expected ascending fractions")
        if self.warmup_epochs > self.epochs:
            problems.append(f"warmup_epochs is {self.warmup_epochs:g}; expected a number from 0 to {self.epochs}")
        if problems:
            raise UsageError(
                "The training settings are not valid: " + "; ".join(problems) + ".", fix="Give values in these ranges."
            )
        if self.schedule != "multistep" and self.milestones != type(self).model_fields["milestones"].default:
            raise UsageError(
                f"`milestones` has no effect with schedule={self.schedule!r}.",
                fix="Remove `milestones`, or use schedule='multistep'.",
            )


@dataclass
class LossOutput:
    """Loss of one batch.

    Args:
        total: sum of `terms` and `adapter_losses`, a scalar with gradient.
        terms: weighted terms by name, scalars with gradient for the model.
        adapter_losses: weighted losses by name that train an adapter only, and not the model.
    """

    total: Any
    terms: dict[str, Any]
    adapter_losses: dict[str, Any] = field(default_factory=dict)


class LossFunction(Protocol):
    """Loss that a training step minimizes."""

    def __call__(
        self,
        model: Any,
        batch: Batch,
        epoch: float,
        step_counts: Mapping[str, int] | None = None,
        *,
        batch_counts: Mapping[str, int] | None = None,
    ) -> LossOutput:
        """Return the loss of a batch.

        Args:
            model: model to train.
            batch: one batch.
            epoch: number of completed epochs, with the completed fraction of the current one.
            step_counts: counts of the whole optimizer step, see `counts`. To form means, sums are divided by these
                counts, so that the losses of all batches of the step, in all processes, add up to the loss of the step.
                None if the batch is the whole step.
            batch_counts: result of `counts` for this batch, computed before the batch was moved to the device. None
                computes it in this call.
        """

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return the denominators of the means by name, always with the same names; one of them is "labels".

        They count the samples or positions that contribute to the loss. A step raises an error if its count "labels"
        is 0.
        """

    def check(self, batch: Batch, *, on_any_device: bool = False) -> list[str]:
        """Check the targets of a batch of a loader, if they are on the CPU.

        Args:
            batch: a training batch.
            on_any_device: also check targets on an accelerator, which synchronizes with it.

        Returns:
            Warnings, one sentence each.

        Raises:
            DataError: the targets have the wrong type or are out of range, or they are missing and there is no other
                loss.
        """

    def balance(self, norms: dict[str, float]) -> dict[str, float]:
        """Update the weights of the terms from their gradient norms, at the first batch of each epoch.

        Returns:
            The gradient norms with the new weights.
        """

    def state(self) -> dict[str, Any]:
        """Return the state of the loss function, as JSON values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Load the result of `state`."""


@checked
@dataclass
class TrainingHooks:
    """Callbacks of a training run, all optional.

    Args:
        validate: function model → metrics, a dict of numbers by name, called after each epoch; "accuracy" is displayed
            if present.
        event: called with a dict of JSON values for each event: {"event": "first_batch" | "warning" | "epoch", ...}.
            Without this callback a warning is a Python warning.
        stop: returns an error (`Preempted`, `Interrupted`) if the run is to stop; called after each optimizer step and
            after each epoch.
        save: called with a `TrainingState` after each epoch, and before the run stops.
        resume: state to resume from.
        batch: called after each optimizer step with the number of the epoch (from 1), the number of epochs, the number
            of completed batches of this epoch, and the number of batches of an epoch (None if it is not known).
        close: called when the training ends, also if it ends with an error.
        before_step: called before each optimizer step with the model. Its gradients are those of the step: the mean
            over all samples of the step, in all processes, after clipping.
    """

    made_by: ClassVar[str] = "kirsch.TrainingHooks(event=..., stop=..., save=...)"

    _: KW_ONLY
    validate: Callable[[Any], dict[str, float]] | None = None
    event: Callable[[dict[str, Any]], None] | None = None
    stop: Callable[[], Exception | None] | None = None
    save: Callable[[TrainingState], None] | None = None
    resume: TrainingState | None = None
    batch: Callable[[int, int, int, int | None], None] | None = None
    close: Callable[[], None] | None = None
    before_step: Callable[[Any], None] | None = None

    def warn(self, text: str, **more: Any) -> None:
        """Emit a warning: as an event if there is a callback, otherwise as a Python warning."""
        if self.event is None:
            warn(text)
        else:
            self.event({"event": "warning", **more, "text": text})

    def requested_stop(self) -> Exception | None:
        """Return the error with which the run is to stop; None to continue.

        Raises:
            UsageError: `stop` returns something else than an error or None.
        """
        error: Any = None if self.stop is None else self.stop()
        if error is None or isinstance(error, Exception):
            return error
        raise UsageError(
            f"`stop` of kirsch.TrainingHooks returned {value_phrase(error)}; expected an error or None.",
            fix='Return None to continue, or an error to stop, such as kirsch.errors.Stopped("enough").',
        )


@dataclass
class TrainingState:
    """State from which a run is resumed; on one CPU, the result is bit-identical to that of an uninterrupted run.

    Args:
        arrays: numpy arrays by name: parameters, buffers, optimizer state ("optimizer." ...), states of the loader's
            random generators.
        values: JSON values: number of the epoch, completed batches of this epoch and sums of their losses, history,
            shares of the terms on the first batch, settings.
    """

    arrays: dict[str, Any]
    values: dict[str, Any]

    def ended(self) -> TrainingState:
        """Return this state without the optimizer state, which a run that has ended does not need."""
        kept = {name: array for name, array in self.arrays.items() if not name.startswith("optimizer.")}
        return TrainingState(kept, self.values)


LEAST_SHARE, MOST_SHARE = 0.001, 0.999
"""Shares of the gradient below and above which a term gives a warning."""


def shares_of(norms: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each gradient norm in their sum; all 0 if the sum is 0."""
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


def share_warnings(shares: Mapping[str, float], began: Mapping[str, float]) -> dict[str, str]:
    """Return a warning for each term whose share of the gradient suggests a wrong weight or a wrong comparison.

    A term whose share was normal on the first batch and is small now has been learned, and gives no warning.

    Args:
        shares: share of each term in the gradient, by name; the shares add up to 1, or are all 0.
        began: the shares on the first batch of the run.
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
                f"The term {name!r} is {share:.2g} of the gradient, so it has almost no effect. Its weight may belong "
                "to another convention of the loss: a loss that is averaged over classes, or that lacks the factor T², "
                "needs a larger weight."
            )
        elif share > MOST_SHARE and len(present) > 1 and not learned:
            found[name] = (
                f"The term {name!r} is {share:.4%} of the gradient, so that the other terms have almost no effect. Its "
                "weight may belong to another convention of the loss: a loss that is summed over samples or elements "
                "needs a smaller weight."
            )
    return found


class GradientShares:
    """Shares of the terms in the gradient, measured on the first batch of each epoch.

    Attributes:
        latest: the most recent shares, by term.
        first: the shares of the first batch of the run.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self._warned: set[str] = set()

    def update(self, norms: Mapping[str, float]) -> list[str]:
        """Record the share of each term, from the gradient norms by term. Return new warnings, one per term and run."""
        self.latest = shares_of(norms)
        self.first = self.first or self.latest
        found = share_warnings(self.latest, self.first)
        new = [sentence for name, sentence in found.items() if name not in self._warned]
        self._warned |= found.keys()
        return new

    def restore(self, latest: Mapping[str, float], first: Mapping[str, float]) -> None:
        """Load the shares of a run that is resumed."""
        self.latest, self.first = dict(latest), dict(first)


def require_labels(counts: Mapping[str, int], step: str) -> None:
    """Raise an error for a step without targets.

    Raises:
        DataError: all targets of the step are masked.
    """
    if not counts["labels"]:
        raise DataError(f"All targets of {step} are masked.", fix="Check the mask and the labels of the data.")


def metrics_of(validate: Callable[[Any], Any], model: Any) -> dict[str, float]:
    """Return the metrics of a model.

    Raises:
        UsageError: `validate` returns something else than a dict of numbers.
    """
    metrics = validate(model)
    if not isinstance(metrics, Mapping):
        wrong = value_phrase(metrics)
    elif not all(isinstance(value, numbers.Real) for value in metrics.values()):
        name, value = next((n, v) for n, v in metrics.items() if not isinstance(v, numbers.Real))
        wrong = f"a dict whose entry {name!r} is {value_phrase(value)}"
    else:
        return dict(metrics)
    raise UsageError(
        f"The validation returned {wrong}; expected a dict of numbers by name.",
        "The metrics of each epoch are stored in the history.",
        'Return, for example, {"f1": float(f1)}.',
    )


MOST_EPOCHS = 10
"""Number of epochs that the printed result of a training run shows."""


@dataclass(repr=False)
class Trained(Printable):
    """Result of a training run.

    Args:
        model: trained model, in inference mode, with the weights after the last epoch.
        history: one dict per epoch: epoch, loss, terms (the weighted loss of each term; they add up to the loss),
            gradient_shares, learning_rate, seconds, and the validation metrics.
        first_batch: shares of the terms in the loss and in the gradient of the first batch.
    """

    model: Any
    history: list[dict[str, Any]] = field(default_factory=list)
    first_batch: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the name of the model and the number of epochs in one line."""
        return f"<kirsch.Trained: {type(self.model).__name__}, {self._epochs}>"

    @property
    def _epochs(self) -> str:
        return figures.counted(len(self.history), "epoch")

    def parts(self) -> list[Part]:
        """Return the name of the model, a line for each of the last epochs, and the shares of the gradient."""
        lines: list[Part] = [[Piece(type(self.model).__name__, "strong"), Piece(f"   {self._epochs}")]]
        shown = self.history[-MOST_EPOCHS:]
        if len(shown) < len(self.history):
            lines.append([Piece(f"the first {len(self.history) - len(shown)} epochs are in `history`", "faint")])
        lines += [[Piece(epoch_text({**record, "epochs": len(self.history)}))] for record in shown]
        shares = self.first_batch.get("gradient_shares", {})
        if len(shares) > 1:
            text = ", ".join(f"{name} {figures.percent(share, 0)}" for name, share in shares.items())
            lines.append([Piece(f"gradient on the first batch: {text}")])
        return lines
