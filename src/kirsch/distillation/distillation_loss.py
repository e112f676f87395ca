"""The distillation loss of one batch, as a function of what student and teachers return."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.distillation.losses.labels import LABEL_LOSSES
from kirsch.distillation.masks import BatchMasks
from kirsch.distillation.schedule import at
from kirsch.distillation.targets import check_labels
from kirsch.distillation.teachers import combined, holds_top_k, stored_scores
from kirsch.errors import UsageError
from kirsch.frameworks.layers import at_layers
from kirsch.frameworks.training import LossOutput, require_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.data.batches import Batch
    from kirsch.distillation.bound_term import BoundTerm
    from kirsch.distillation.objective import Objective

LABEL = "label"
"""Name of the loss on the labels in records."""

Features = Mapping[str, list[Any]]
"""By the adapter name of a term: the teacher's values, or those of each teacher if their losses are added up."""


class DistillationLoss:
    """label_weight · loss on labels + Σ weight · distillation loss, with the names and layers of the terms resolved.

    Args:
        objective: the weight and kind of the label loss, and how several teachers are combined.
        terms: bound to the layers of student and teachers.
        positions_of: mask of the inputs of a model of sequences → mask of its hidden states.
    """

    def __init__(
        self,
        objective: Objective,
        terms: Sequence[BoundTerm] = (),
        positions_of: Callable[[Any], Any] = lambda mask: mask,
    ) -> None:
        self.objective, self.terms = objective, tuple(terms)
        self._positions_of = positions_of
        self._examples = {term.mean_over: term for term in self.terms}
        self._sequences = any(term.loss.takes == "logits" and "×" in term.shapes[0] for term in self.terms)

    def active(self, epoch: float) -> list[BoundTerm]:
        """Return the terms whose weight is not 0 after so many epochs."""
        return [term for term in self.terms if at(term.weight, epoch)]

    def features(self, outputs: Sequence[Mapping[str, Any]], epoch: float) -> Features:
        """Return the teacher's values of each active term, those of several teachers combined.

        Args:
            outputs: of each teacher, its values by layer.
            epoch: how many are done.
        """
        return {term.adapter_name: self._features_of(term, outputs, epoch) for term in self.active(epoch)}

    def _features_of(self, term: BoundTerm, outputs: Sequence[Mapping[str, Any]], epoch: float) -> list[Any]:
        if term.teacher is not None or len(outputs) == 1:
            return [at_layers(outputs[term.teacher or 0], term.teacher_layer)]
        logits = [at_layers(values, term.teacher_layer) for values in outputs]
        if self.objective.teachers == "sum":
            return logits
        axis = 1 if term.loss.takes == "pixels" else -1
        temperature = term.keywords(epoch).get("temperature", 1.0)
        return [combined(logits, self.objective.teachers, temperature, term.loss.activation, axis)]

    def __call__(
        self,
        student: Any,
        features: Features,
        batch: Batch,
        epoch: float,
        step_counts: Mapping[str, int] | None = None,
        *,
        factors: Mapping[str, float] | None = None,
        regularization: Mapping[str, Any] | None = None,
    ) -> LossOutput:
        """Return the loss of one batch.

        Args:
            student: `features` by layer; `adapted`, the pair of features that an adapter returns, and `adapter_losses`,
                the loss of the adapter itself, both by adapter name.
            features: of the teachers, see `features`.
            batch: the batch that both have seen.
            epoch: how many are done.
            step_counts: counts of all batches of the step; None: the batch is the step.
            factors: by the name of a term, what its weight is multiplied by; 1 if left out.
            regularization: further terms of the student, by name.

        Raises:
            DataError: no label of the step counts.
            UsageError: a loss takes labels, and the batch has none.
        """
        masks = self.masks(batch)
        own = self._counts(masks)
        if step_counts is None:
            require_labels(own, "a batch")
        total = own if step_counts is None else step_counts
        shares = {name: count / total[name] if count else 0.0 for name, count in own.items()}
        terms: dict[str, Any] = {}
        adapter_losses: dict[str, Any] = {}
        if shares["labels"]:  # without a label there is no mean
            self._add_label_loss(terms, student.features.get("logits"), masks, epoch, shares["labels"])
        for term in self.active(epoch):
            if share := shares[term.mean_over]:
                weight = at(term.weight, epoch) * (factors or {}).get(term.name, 1.0) * share
                loss = self._loss_of(term, student, features[term.adapter_name], masks, epoch)
                terms[term.name] = terms.get(term.name, 0.0) + weight * loss
            if term.adapter_name in student.adapter_losses:
                add(
                    adapter_losses,
                    f"{term.name}.adapter",
                    shares["samples"] * student.adapter_losses[term.adapter_name],
                )
        for name, value in (regularization or {}).items():
            add(terms, name, shares["samples"] * value)
        if not terms:  # the other batches or processes of the step have all labels
            return LossOutput(0.0 * ops.first_array(student.features).sum(), terms)
        return LossOutput(sum(terms.values()) + sum(adapter_losses.values()), terms, adapter_losses)

    def weights(self, epoch: float, factors: Mapping[str, float]) -> dict[str, float]:
        """Return the weight of each term, by name, after so many epochs."""
        own = {term.name: at(term.weight, epoch) * factors.get(term.name, 1.0) for term in self.active(epoch)}
        return {LABEL: at(self.objective.label_weight, epoch), **own}

    def _add_label_loss(
        self, terms: dict[str, Any], logits: Any, masks: BatchMasks, epoch: float, share: float
    ) -> None:
        weight, labels, mask = at(self.objective.label_weight, epoch), masks.labels, masks.label_mask
        if not weight or labels is None or (mask is not None and not bool(mask.any())):
            return
        logits = masks.shifted(logits)
        try:
            loss = LABEL_LOSSES[self.objective.label_loss](
                logits, labels, mask=mask, label_smoothing=self.objective.label_smoothing
            )
        except (IndexError, RuntimeError):
            check_labels(labels, tuple(logits.shape[1:]), self.objective)  # only the first batch was checked
            raise
        terms[LABEL] = weight * share * _mean_over_samples(loss, labels, mask)

    def _loss_of(self, term: BoundTerm, student: Any, teachers: list[Any], masks: BatchMasks, epoch: float) -> Any:
        """Return the loss of a term, added up over the teachers that it is compared with."""
        if term.adapter is not None:
            sides = [student.adapted[term.adapter_name]]
        else:
            own = at_layers(student.features, term.student_layer)
            sides = [(own, teacher) for teacher in teachers]
        return sum(self._compare(term, own, teacher, masks, epoch) for own, teacher in sides)

    def _compare(self, term: BoundTerm, student: Any, teacher: Any, masks: BatchMasks, epoch: float) -> Any:
        if term.on_logits:
            student, teacher = masks.shifted(student), masks.shifted(teacher)
        mask, options = masks.of(term, student), term.keywords(epoch)
        if holds_top_k(teacher):
            return stored_scores(term, student, teacher, mask, options)
        step = term.step_keywords
        if "labels" in step:
            if masks.labels is None:
                raise UsageError(f"The term {term.name!r} needs labels, and a batch has none.")
            options["labels"] = ops.zero_masked(masks.labels, mask)
            if mask is not None and not bool(mask.any()):
                return 0.0 * ops.first_array(student).sum()
        if "mask" in step:
            options["mask"] = mask
        if "epoch" in step:
            options["epoch"] = epoch
        # Labels are checked in each step. No mask is empty, since its count is above 0: do not wait for the device.
        with nullcontext() if "labels" in step else ops.without_value_checks():
            loss = term.loss(student, teacher, **options)
        return _mean_over_samples(loss, masks.labels, mask) if "labels" in step else loss

    def masks(self, batch: Batch) -> BatchMasks:
        """Return the labels and masks of a batch."""
        return BatchMasks(batch, self.objective, self._positions_of)

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return how many samples, labels and positions the means of the terms go over in several batches."""
        found = dict.fromkeys(("samples", "labels", *self._examples), 0)
        for batch in batches:
            for name, count in self._counts(self.masks(batch)).items():
                found[name] += count
        return found

    def _counts(self, masks: BatchMasks) -> dict[str, int]:
        names = dict.fromkeys(("samples", "labels", *self._examples))
        return {name: masks.count(name, self._examples.get(name), sequences=self._sequences) for name in names}


def _mean_over_samples(loss: Any, labels: Any, mask: Any) -> Any:
    """Return a mean over the samples with a label as a mean over all samples, so that parts of a batch add up to it."""
    return loss if mask is None or labels.ndim > 1 else loss * (int(mask.sum()) / len(mask))


def add(terms: dict[str, Any], name: str, value: Any) -> None:
    """Add a value under its name, or "name#2" if that is taken."""
    number = 1 + sum(known.partition("#")[0] == name for known in terms)
    terms[name if number == 1 else f"{name}#{number}"] = value
