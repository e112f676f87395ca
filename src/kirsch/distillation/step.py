"""One training step of distillation: run the teachers and the student with adapters, and compute the loss."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from kirsch.distillation.distillation_loss import LABEL, DistillationLoss, add
from kirsch.distillation.probabilities import check_training, logit_layers
from kirsch.distillation.targets import check_batch, uses_labels
from kirsch.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kirsch.data.annotations import Regularizer
    from kirsch.data.batches import Batch
    from kirsch.distillation.distillation_loss import TeacherFeatures
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.teachers import TeacherSource
    from kirsch.distillation.term import BoundTerm
    from kirsch.frameworks.protocols import Features
    from kirsch.frameworks.training import LossOutput

WITHOUT_TARGETS = (
    "A batch has no targets, unlike earlier batches. On this batch, the student learns from the teacher only. If that "
    "is not intended, give (inputs, targets) in each batch."
)


class TargetCheck:
    """Checks the targets of each batch of a loader.

    Args:
        objective: supplies the label loss and the terms.
        logits_shape: shape of the logits of one sample; None leaves the targets unchecked.

    Attributes:
        all_checked: whether the targets of every batch so far were checked; None before the first batch.
    """

    def __init__(self, objective: Objective, logits_shape: tuple[int, ...] | None) -> None:
        self._objective, self._logits_shape = objective, logits_shape
        self._had_targets, self._warned = False, False
        self.all_checked: bool | None = None

    def __call__(self, batch: Batch, *, on_any_device: bool = False) -> list[str]:
        """Return a warning if batches without targets follow batches with targets, once per run.

        Args:
            batch: a training batch.
            on_any_device: also check targets on an accelerator, which synchronizes with it.

        Raises:
            DataError: the label loss does not take the targets, or the batch has no targets and the objective no terms.
        """
        if batch.targets is not None:
            self._had_targets = uses_labels(self._objective)
            checked = self._logits_shape is not None and check_batch(
                batch.targets, self._logits_shape, self._objective, on_any_device=on_any_device
            )
            self.all_checked = checked and self.all_checked is not False
            return []
        if not self._objective.terms:
            raise DataError(
                "A batch has no targets, and there is no teacher.",
                "There is nothing to learn from it.",
                "Give (inputs, targets) in each batch.",
            )
        if not self._had_targets or self._warned:
            return []
        self._warned = True
        return [WITHOUT_TARGETS]


class DistillationStep:
    """Runs teachers and student on a batch and returns the loss; a `kirsch.frameworks.training.LossFunction`.

    Args:
        features: the `Features` object of the framework of student and teachers.
        objective: supplies the label loss and the weights of the terms.
        terms: terms of the objective, bound to the layers of the models.
        teacher_source: function that returns the outputs of the teachers for a batch; None without terms.
        regularizers: further loss terms that depend on the student only; they may take the time as keyword `epoch`.
        positions_of: function that converts the mask of a sequence model's inputs to the mask of its hidden states.
        logits_shape: see `TargetCheck`.
    """

    def __init__(
        self,
        features: Features,
        objective: Objective,
        terms: Sequence[BoundTerm] = (),
        teacher_source: TeacherSource | None = None,
        regularizers: Sequence[Regularizer] = (),
        positions_of: Callable[[Any], Any] = lambda mask: mask,
        logits_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.loss = DistillationLoss(objective, terms, positions_of)
        self.factors: dict[str, float] = {}
        self._features, self._objective, self._teacher_source = features, objective, teacher_source
        self._regularizers = [(regularizer, _takes_epoch(regularizer)) for regularizer in regularizers]
        self._targets = TargetCheck(objective, logits_shape)
        self._weights: dict[str, float] = {}
        self._unchecked = logit_layers(objective, terms, None)  # checked in the first step in training mode

    def __call__(
        self,
        module: Any,
        batch: Batch,
        epoch: float,
        step_counts: Mapping[str, int] | None = None,
        *,
        batch_counts: Mapping[str, int] | None = None,
    ) -> LossOutput:
        """Return the loss of one batch; see `LossFunction`."""
        active = self.loss.active(epoch)
        outputs = self._teacher_source(batch) if active and self._teacher_source is not None else []
        features = self.loss.features(outputs, epoch)
        adapted = {term.adapter_name: features[term.adapter_name][0] for term in active if term.adapter is not None}
        student = module(batch.inputs, adapted, batch.ids)
        model, training = self._features.student_of(module), getattr(module, "training", True)
        return self.loss_of(student, features, model, batch, epoch, step_counts, batch_counts, training=training)

    def loss_of(
        self,
        student: Any,
        features: TeacherFeatures,
        model: Any,
        batch: Batch,
        epoch: float,
        step_counts: Mapping[str, int] | None,
        batch_counts: Mapping[str, int] | None,
        *,
        training: bool,
    ) -> LossOutput:
        """Return the loss of a batch on which student and teachers have run.

        Args:
            student, features: outputs of the student and features of the teachers, see `DistillationLoss`.
            model: the student, to which the regularizers are applied.
            batch, epoch, step_counts, batch_counts: see `LossFunction`.
            training: whether the student is in training mode.
        """
        if self._unchecked and training:
            check_training(student.features, self._unchecked, self._objective)
            self._unchecked = []
        self._weights = self.loss.weights(epoch, self.factors)
        return self.loss(
            student,
            features,
            batch,
            epoch,
            step_counts,
            batch_counts=batch_counts,
            factors=self.factors,
            targets_checked=self._targets.all_checked is True,
            regularization=regularization(self._regularizers, model, epoch),
        )

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return the numbers of samples, labels and positions in batches, by which sums of losses are divided."""
        return self.loss.counts(batches)

    def check(self, batch: Batch, *, on_any_device: bool = False) -> list[str]:
        """Refuse targets that the label loss does not take; see `TargetCheck`."""
        return self._targets(batch, on_any_device=on_any_device)

    def balance(self, norms: dict[str, float]) -> dict[str, float]:
        """Scale the terms so that the norms of their gradients are in proportion to their weights.

        The reference is the gradient of the label loss, or of the first term if there is no label loss.

        Returns:
            The norms of the gradients of the scaled terms.
        """
        if self._objective.balance != "gradient":
            return norms
        before = dict(self.factors)
        self.factors |= balancing_factors(norms, self._weights, [term.name for term in self.loss.terms])
        return {name: norm * self.factors.get(name, 1) / before.get(name, 1) for name, norm in norms.items()}

    def state(self) -> dict[str, Any]:
        """Return the factors of the terms."""
        return {"factors": dict(self.factors)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the factors from a state that `state` returned."""
        self.factors = dict(state.get("factors", {}))


def balancing_factors(
    norms: Mapping[str, float], weights: Mapping[str, float], names: Sequence[str]
) -> dict[str, float]:
    """Return the factors of the terms that make the norms of their gradients proportional to their weights.

    Args:
        norms: norms of the gradients of the weighted terms, by name.
        weights: weights with which the norms were computed, by name of the term.
        names: names of the terms, in order.
    """
    present = [name for name in dict.fromkeys((LABEL, *names)) if norms.get(name) and weights.get(name)]
    unweighted = {name: norms[name] / weights[name] for name in present}
    return {name: unweighted[present[0]] / unweighted[name] for name in present[1:]}


def regularization(regularizers: Sequence[tuple[Regularizer, bool]], student: Any, epoch: float) -> dict[str, Any]:
    """Return the values of regularizers for a student after `epoch` epochs, by class name.

    `regularizers`: the regularizers, and whether each takes the keyword `epoch`.
    """
    values: dict[str, Any] = {}
    for regularizer, takes_epoch in regularizers:
        options = {"epoch": epoch} if takes_epoch else {}
        add(values, type(regularizer).__name__, regularizer(student, **options))
    return values


def _takes_epoch(regularizer: Regularizer) -> bool:
    try:
        return "epoch" in inspect.signature(regularizer).parameters
    except ValueError:  # a callable of a compiled module has no signature
        return False
