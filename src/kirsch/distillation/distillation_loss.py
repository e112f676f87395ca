"""The distillation loss of one batch, as a function of the outputs of student and teachers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.distillation.losses.top_k import stored_top_k
from kirsch.distillation.masks import BatchMasks
from kirsch.distillation.targets import check_labels
from kirsch.distillation.teachers import TOP_K, combined_logits, holds_top_k
from kirsch.distillation.term import value_at
from kirsch.errors import UsageError
from kirsch.frameworks.layers import at_layers
from kirsch.frameworks.training import LossOutput, require_labels
from kirsch.tasks.label_losses import LABEL_LOSSES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from kirsch.data.batches import Batch
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.term import BoundTerm


LABEL = "label"
"""Name of the label loss among the terms of a `LossOutput`, in events and in histories."""

TeacherFeatures = Mapping[str, list[Any]]
"""The teachers' features of each term, by adapter name.

The list has one feature, or one for each teacher if the losses of several teachers are summed.
"""


class DistillationLoss:
    """The sum label_weight · label loss + Σ weight · distillation loss, with terms that are bound to layers.

    Args:
        objective: supplies the weight and kind of the label loss, and the rule that combines several teachers.
        terms: terms of the objective, bound to the layers of student and teachers.
        positions_of: function that converts the mask of a sequence model's inputs to the mask of its hidden states.
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
        """Return the terms whose weight is not 0 after `epoch` epochs."""
        return [term for term in self.terms if value_at(term.weight, epoch)]

    def features(self, outputs: Sequence[Mapping[str, Any]], epoch: float) -> TeacherFeatures:
        """Return the teachers' features of each active term; the logits of several teachers are combined.

        Args:
            outputs: the features of each teacher, by layer name.
            epoch: number of epochs done.
        """
        return {term.adapter_name: self._features_of(term, outputs, epoch) for term in self.active(epoch)}

    def _features_of(self, term: BoundTerm, outputs: Sequence[Mapping[str, Any]], epoch: float) -> list[Any]:
        if term.teacher is not None or len(outputs) == 1:
            return [at_layers(outputs[term.teacher or 0], term.teacher_layer)]
        logits = [at_layers(values, term.teacher_layer) for values in outputs]
        if self.objective.combine_teachers == "sum":
            return logits
        axis = ops.channel_axis(logits[0]) if term.loss.takes == "pixels" else -1
        temperature = term.keywords(epoch).get("temperature", 1.0)
        return [combined_logits(logits, self.objective.combine_teachers, temperature, term.loss.activation, axis)]

    def __call__(
        self,
        student: Any,
        features: TeacherFeatures,
        batch: Batch,
        epoch: float,
        step_counts: Mapping[str, int] | None = None,
        *,
        batch_counts: Mapping[str, int] | None = None,
        factors: Mapping[str, float] | None = None,
        regularization: Mapping[str, Any] | None = None,
        targets_checked: bool = False,
    ) -> LossOutput:
        """Return the loss of one batch.

        Args:
            student: outputs of the student with adapters: `features` by layer; `adapted`, the pair of features that an
                adapter returns, by adapter name; `adapter_losses`, the loss that trains only an adapter, by adapter
                name.
            features: features of the teachers, as the method `features` returns them.
            batch: the batch on which student and teachers have run.
            epoch: number of epochs done.
            step_counts: counts of all batches of the optimizer step. None: the step has only this batch.
            batch_counts: counts of the batch; None: they are counted here, which synchronizes with the device
                of the batch.
            factors: factors of the weights, by name of the term; 1 for a term that is left out.
            regularization: values of the regularizers, by name.
            targets_checked: the targets of the batch are known to be valid. Otherwise the losses on labels check them,
                which synchronizes with the device of the batch.

        Raises:
            DataError: all labels of the step are masked.
            UsageError: a loss takes labels, and the batch has none.
        """
        counts = self.counts([batch]) if batch_counts is None else batch_counts
        masks = BatchMasks(batch, self.objective, self._positions_of, counts["labeled"])
        if step_counts is None:
            require_labels(counts, "a batch")
        total = counts if step_counts is None else step_counts
        fractions = {name: count / total[name] if count else 0.0 for name, count in counts.items()}
        terms: dict[str, Any] = {}
        adapter_losses: dict[str, Any] = {}

        def value_checks(*, of_labels: bool) -> AbstractContextManager[None]:
            """Return a context that turns off the checks of values, unless the loss takes labels that were not checked.

            The other checks are not needed here. Masks are not empty, because each count is above 0. Options and the
            class numbers of a store were checked on a few samples before training.
            """
            return nullcontext() if of_labels and not targets_checked else ops.without_value_checks()

        if fractions["labels"]:  # the mean over no labels is not defined
            with value_checks(of_labels=True):
                self._add_label_loss(terms, student.features.get("logits"), masks, epoch, fractions["labels"])
        for term in self.active(epoch):
            if fraction := fractions[term.mean_over]:
                weight = value_at(term.weight, epoch) * (factors or {}).get(term.name, 1.0) * fraction
                with value_checks(of_labels="labels" in term.step_keywords):
                    loss = self._loss_of(term, student, features[term.adapter_name], masks, epoch)
                terms[term.name] = terms.get(term.name, 0.0) + weight * loss
            if term.adapter_name in student.adapter_losses:
                add(
                    adapter_losses,
                    f"{term.name}.adapter",
                    fractions["samples"] * student.adapter_losses[term.adapter_name],
                )
        for name, value in (regularization or {}).items():
            add(terms, name, fractions["samples"] * value)
        if not terms:  # all labels are in other batches or processes of the step
            return LossOutput(0.0 * ops.sum(ops.first_array(student.features)), terms)
        return LossOutput(sum(terms.values()) + sum(adapter_losses.values()), terms, adapter_losses)

    def weights(self, epoch: float, factors: Mapping[str, float]) -> dict[str, float]:
        """Return the weight of each term, by name, after `epoch` epochs."""
        weights = {term.name: value_at(term.weight, epoch) * factors.get(term.name, 1.0) for term in self.active(epoch)}
        return {LABEL: value_at(self.objective.label_weight, epoch), **weights}

    def _add_label_loss(
        self, terms: dict[str, Any], logits: Any, masks: BatchMasks, epoch: float, fraction: float
    ) -> None:
        weight, labels = value_at(self.objective.label_weight, epoch), masks.labels
        if not weight or not masks.has_labels:
            return
        logits = masks.shifted(logits)
        try:
            loss = LABEL_LOSSES[self.objective.label_loss](
                logits, labels, mask=masks.label_mask, label_smoothing=self.objective.label_smoothing
            )
        except (IndexError, RuntimeError):
            # Not every batch was checked before the loss. If its labels are invalid, this check names the problem.
            check_labels(labels, tuple(logits.shape[1:]), self.objective)
            raise
        terms[LABEL] = weight * fraction * masks.mean_over_samples(loss)

    def _loss_of(self, term: BoundTerm, student: Any, teachers: list[Any], masks: BatchMasks, epoch: float) -> Any:
        """Return the loss of a term, summed over its teachers."""
        if term.adapter is not None:
            pairs = [student.adapted[term.adapter_name]]
        else:
            feature = at_layers(student.features, term.student_layer)
            pairs = [(feature, teacher) for teacher in teachers]
        return sum(self._compare(term, feature, teacher, masks, epoch) for feature, teacher in pairs)

    def _compare(self, term: BoundTerm, student: Any, teacher: Any, masks: BatchMasks, epoch: float) -> Any:
        if term.on_logits:
            student, teacher = masks.shifted(student), masks.shifted(teacher)
        mask, options = masks.mask_of(term, student), term.keywords(epoch)
        if holds_top_k(teacher):
            return top_k_record_loss(term, student, teacher, mask, options)
        names = term.step_keywords
        if "labels" in names:
            if masks.labels is None:
                raise UsageError(f"The term {term.name!r} needs labels, and a batch has none.")
            if not masks.has_labels:
                return 0.0 * ops.sum(ops.first_array(student))
            options["labels"] = ops.zero_masked(masks.labels, mask)
        if "mask" in names:
            options["mask"] = mask
        if "epoch" in names:
            options["epoch"] = epoch
        loss = term.loss(student, teacher, **options)
        return masks.mean_over_samples(loss) if "labels" in names else loss

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return the numbers of samples, labels and positions in batches, by which sums of losses are divided.

        Counting batches on the host before they are moved to an accelerator avoids synchronizing with it.
        """
        counts = dict.fromkeys(("samples", "labels", "labeled", *self._examples), 0)
        for batch in batches:
            masks = BatchMasks(batch, self.objective, self._positions_of)
            for name in counts:
                counts[name] += masks.count(name, self._examples.get(name), sequences=self._sequences)
        return counts


def add(terms: dict[str, Any], name: str, value: Any) -> None:
    """Add a value under its name; if the name is taken, under "name#2", "name#3", ..."""
    number = 1 + sum(known.partition("#")[0] == name for known in terms)
    terms[name if number == 1 else f"{name}#{number}"] = value


def top_k_record_loss(
    term: BoundTerm, student: Any, record: Mapping[str, Any], mask: Any, options: Mapping[str, Any]
) -> Any:
    """Return the soft-target loss for stored teacher outputs that hold only the k largest logits.

    Raises:
        UsageError: the term needs all logits, or it has an option that needs them.
    """
    if term.loss.name not in ("kd", "top-k"):
        raise UsageError(
            f"The term {term.name!r} needs all logits of the teacher, and the store holds only the k largest.",
            fix="Build the store with Dense(), or use the terms 'kd' or 'top-k'.",
        )
    unsupported = set(options) - {"temperature", "tail", "k"}
    if unsupported:
        raise UsageError(
            f"The term {term.name!r} has the options {', '.join(sorted(unsupported))}.",
            "A store that holds only the k largest logits does not support these options.",
            "Build the store with Dense(), or leave the options out.",
        )
    stored = record["indices"].shape[-1]
    if options.get("k", stored) != stored:
        raise UsageError(
            f"The term {term.name!r} takes the {options['k']} largest logits; the store holds {stored}.",
            fix=f"Give k={stored}.",
        )
    temperature, tail = options.get("temperature", 1.0), options.get("tail", "bucket")
    arrays = [record[name] for name in TOP_K]
    return stored_top_k(student, *arrays, tail=tail, temperature=temperature, stored_temperature=temperature, mask=mask)
