"""Checks before training: the first batch of the data, and combinations of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.data.batches import ArrayData, Batch, SeededData, batches_of, naming
from kirsch.data.structure import refuse_dataset
from kirsch.distillation.binding import combines_teachers
from kirsch.distillation.losses.loss import get_loss
from kirsch.distillation.term import Ramp, end_values
from kirsch.errors import DataError
from kirsch.frameworks.layers import texts

if TYPE_CHECKING:
    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.protocols import Inference, TrainingLoop
    from kirsch.frameworks.training import Training

FEW = 8
"""Number of samples in the dry run that finds shapes."""


def first_batch(training: TrainingLoop, data: Any) -> Batch:
    """Return the first batch of the data; for data in memory, without augmentation.

    Raises:
        DataError: there is no batch, the data can be iterated only once, or it yields single samples or ambiguous
            batches.
    """
    if isinstance(data, ArrayData):
        end = data.batch_size
        return Batch(data.rows(slice(end)), None if data.targets is None else data.targets[:end], data.sample_ids[:end])
    refuse_dataset(data)

    def fetch() -> Any:
        batches = iter(data)
        keeps_workers = getattr(data, "persistent_workers", False)  # then iter() restarts and returns one iterator
        if batches is data or (not keeps_workers and iter(data) is batches):
            raise DataError(
                "The data can be iterated only once.",
                "Each epoch iterates over it again.",
                "Give a list or a DataLoader.",
            )
        return list(itertools.islice(batches, 1))

    first = training.seeded(fetch, 0)  # iterating a shuffling loader would advance the caller's random state
    if not first:
        raise DataError("The data is empty.", fix="Give at least one batch.")
    return Batch.of(*first)


def warning_of_unknown_entries(inference: Inference, model: Any, batch: Batch, objective: Objective) -> list[str]:
    """Return a warning if batches without targets have entries that are not arguments of the model.

    Args:
        inference: the `Inference` object of the model's framework.
        model: the student.
        batch: the first batch.
        objective: only its `label_weight` is used.
    """
    if batch.targets is not None or not isinstance(batch.inputs, dict) or not any(end_values(objective.label_weight)):
        return []
    unknown = inference.unknown_arguments(model, [str(name) for name in batch.inputs])
    text = (
        f"The batches have no targets, so the label loss is left out. They contain {' and '.join(unknown)}, which "
        f'{type(model).__name__} does not take. If one of these entries holds the targets, rename it to "labels". '
        "Remove the other entries."
    )
    return [text] if unknown else []


def warning_of_missing_targets(batch: Batch, objective: Objective) -> list[str]:
    """Return a warning if the batches have no targets, and the objective has a label loss."""
    weight = max(end_values(objective.label_weight))
    if batch.targets is not None or not weight:
        return []
    text = f"The batches have no targets, so the label loss, weight {weight:g}, is left out."
    return [f"{text} Give (inputs, targets) in each batch, or an objective with label_weight=0."]


def check_single_samples(inference: Inference, model: Any, data: Any, first: Batch) -> None:
    """Refuse a model that cannot be trained on one sample, if a batch of the data has a single sample.

    Raises:
        DataError: a batch has a single sample, and the model normalizes over the samples of a batch.
    """
    if len(first) == 1 or _has_single_last_sample(data):
        inference.check_runs(model, first_samples(first, 1).inputs, training=True)


def _has_single_last_sample(data: Any) -> bool:
    """Return whether a batch after the first one has a single sample; False if this is unknown before training."""
    if isinstance(data, SeededData):  # a single last sample is added to the batch before it
        return False
    size, samples = getattr(data, "batch_size", None), _length(getattr(data, "sampler", None))
    if isinstance(size, int) and samples is not None:
        return samples % size == 1 and not getattr(data, "drop_last", False)
    return isinstance(data, (list, tuple)) and 1 in [len(batch) for batch in batches_of(data)]


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def first_samples(batch: Batch, count: int = FEW) -> Batch:
    """Return the first samples of a batch."""
    return dataclasses.replace(
        batch,
        inputs=ops.map_arrays(lambda part: part[:count] if hasattr(part, "shape") else part, batch.inputs),
        targets=None if batch.targets is None else batch.targets[:count],
        ids=None if batch.ids is None else batch.ids[:count],
        seeds=None if batch.seeds is None else batch.seeds[:count],
    )


def check_runs_on_few(inference: Inference, model: Any, batch: Batch) -> None:
    """Check that a model runs on the first samples of a batch; errors name these samples, whose number they state.

    Raises:
        KirschError: the model does not run.
    """
    samples = first_samples(batch)
    with naming(f"First {FEW} samples of a batch") if len(samples) < len(batch) else contextlib.nullcontext():
        inference.check_runs(model, samples.inputs)


def check_student(inference: Inference, student: Any, first: Batch, objective: Objective) -> tuple[int, ...] | None:
    """Check that a student runs on the first batch, in inference mode and in training mode.

    Returns:
        The shape of the logits of one sample; None if the objective does not use logits.

    Raises:
        KirschError: the student does not run, or its logits in training mode are another output.
    """
    check_runs_on_few(inference, student, first)
    if not objective.needs_logits:
        return None
    inputs = first_samples(first).inputs
    inference.check_training_outputs(student, inputs)
    return tuple(inference.predict(student, inputs).shape[1:])


def warnings_of_divided_batches(objective: Objective, training: Training) -> list[str]:
    """Return a warning for each term whose losses on parts of a batch do not add up, if a step has several batches."""
    return [
        f"The value of the term {term.record_name!r} depends on all samples of a batch together. Each of the "
        f"{training.gradient_accumulation_steps} batches of a step is evaluated separately, so the value of the term "
        "differs from that of one large batch."
        for term in objective.terms
        if training.gradient_accumulation_steps > 1
        and (get_loss(term.loss).relational or get_loss(term.loss).over == "contents")
    ]


def warnings_of_unfinished_ramps(objective: Objective, training: Training) -> list[str]:
    """Return a warning for each weight that has not reached its end value when the run ends."""
    weights = [("the labels", objective.label_weight, "the objective: label_weight")]
    weights += [(f"the term {term.record_name!r}", term.weight, "the term: weight") for term in objective.terms]
    return [
        f"The weight of {name} reaches {weight.end:g} after {weight.after + weight.epochs:g} epochs, but the run ends "
        f"after {training.epochs} epochs, at the weight {weight.at(training.epochs):.3g}. Train for longer, or set "
        f"in {option}=kirsch.Ramp({weight.start:g}, {weight.end:g}, epochs={max(training.epochs // 2, 1)})."
        for name, weight, option in weights
        if isinstance(weight, Ramp) and weight.after + weight.epochs > training.epochs
    ]


def warnings_of_softmax_terms(objective: Objective) -> list[str]:
    """Return a warning for each term that applies a softmax to the logits of binary labels.

    A softmax ignores a constant that is added to all logits of a sample, and with it how many labels are present.
    """
    if objective.label_loss != "binary":
        return []
    by_kind = {"logits": '"binary-kd"', "pixels": 'Term("fitnet", student_layer="logits")'}
    return [
        f"The term {term.record_name!r} applies a softmax to the logits, as if the classes excluded each other, and "
        'the objective has label_loss="binary". The student then does not learn from the teacher which labels of a '
        f"sample are present. Use {by_kind[get_loss(term.loss).takes]} instead of {term.loss!r}; if the classes "
        'exclude each other, use label_loss="cross-entropy".'
        for term in objective.terms
        if any(end_values(term.weight)) and "logits" in texts([*term.layers])
        if get_loss(term.loss).takes in by_kind and get_loss(term.loss).activation == "softmax"
    ]


def warning_of_averaged_logits(objective: Objective, teachers: int) -> list[str]:
    """Return a warning if the logits of several teachers are averaged.

    The softmax of averaged logits is the normalized geometric mean of the teachers' probabilities.
    """
    activations = {get_loss(term.loss).activation for term in objective.terms if combines_teachers(term)}
    if objective.combine_teachers != "logits" or teachers == 1 or not activations - {"identity"}:
        return []
    text = (
        f"The logits of the {teachers} teachers are averaged. This is the geometric mean of their probabilities, in "
        'which a confident teacher outweighs the others. Set combine_teachers="probabilities" to average the '
        "probabilities."
    )
    return [text]
