"""What is checked before a student is trained: the first batch of the data, and settings that do not go together."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from kirsch.distillation.arrays import map_arrays
from kirsch.distillation.attach import of_all
from kirsch.distillation.losses.loss import get_loss
from kirsch.distillation.schedule import Ramp, ends
from kirsch.errors import DataError
from kirsch.frameworks.data import ArrayData, Batch, SeededData, batches_of

if TYPE_CHECKING:
    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.port import Framework
    from kirsch.frameworks.training import Training

FEW = 8
"""Samples of the run that finds the shapes at all layers."""


def first_batch(framework: Framework, data: Any) -> Batch:
    """The first batch of the data, as it is without augmentation where the data lies in memory.

    Raises:
        DataError: there is none, the data can be gone through only once, gives single samples, or its batches are
            nothing that a model takes.
    """
    if isinstance(data, ArrayData):
        end = data.batch_size
        return Batch(data.rows(slice(end)), None if data.targets is None else data.targets[:end], data.sample_ids[:end])
    _refuse_dataset(data)

    def fetch() -> Any:
        batches = iter(data)
        keeps_workers = getattr(data, "persistent_workers", False)  # and gives the same iterator, begun anew
        if batches is data or (not keeps_workers and iter(data) is batches):
            raise DataError(
                "The data can be gone through only once.",
                "Each epoch goes through it anew.",
                "Give a list or a DataLoader.",
            )
        return list(itertools.islice(batches, 1))

    first = framework.seeded(fetch, 0)  # a loader that shuffles draws from the caller's random state
    if not first:
        raise DataError("The data is empty.", fix="Give at least one batch.")
    return Batch.of(*first)


DATASETS = ("torch.utils.data.dataset.Dataset", "datasets.arrow_dataset.Dataset")
STREAMS = "torch.utils.data.dataset.IterableDataset"


def _refuse_dataset(data: Any) -> None:
    """Refuse a dataset, which gives samples one by one; one that streams may give batches."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(data).__mro__}
    if kinds & set(DATASETS) and STREAMS not in kinds:
        raise DataError(
            f"The data is a {type(data).__name__}, which gives single samples, and batches are needed.",
            fix="Give torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True).",
        )


def missing_targets(framework: Framework, model: Any, batch: Batch, objective: Objective) -> list[str]:
    """A warning where batches without targets have entries that the model swallows without naming them.

    Args:
        framework: of the model.
        model: the student, which may take any keywords.
        batch: the first one.
        objective: which may have a weight for the labels.
    """
    if batch.targets is not None or not isinstance(batch.inputs, dict) or not any(ends(objective.label_weight)):
        return []
    unknown = framework.unknown_arguments(model, [str(name) for name in batch.inputs])
    text = (
        f"The batches have no targets, so that the labels (their weight is not 0) teach nothing, and "
        f"{type(model).__name__} has no argument {' or '.join(unknown)}. If that holds the targets, call it labels; "
        "else leave it out of the batches."
    )
    return [text] if unknown else []


def check_last_batch(framework: Framework, model: Any, data: Any, first: Batch) -> None:
    """Refuse a model that cannot be trained on one sample where a batch of the data will have one alone.

    Raises:
        DataError: it normalizes over the samples of a batch.
    """
    if isinstance(data, SeededData):  # joins such a sample to the batch before
        return
    size, samples = getattr(data, "batch_size", None), _length(getattr(data, "sampler", None))
    if isinstance(size, int) and samples is not None:
        alone = samples % size == 1 % size and not getattr(data, "drop_last", False)
    else:
        alone = isinstance(data, (list, tuple)) and 1 in [len(batch) for batch in batches_of(data)]
    if alone:
        framework.check_runs(model, few(first, 1).inputs, training=True)


def _length(given: Any) -> int | None:
    try:
        return len(given)
    except (TypeError, NotImplementedError):
        return None


def few(batch: Batch, count: int = FEW) -> Batch:
    """Some samples of a batch."""
    return dataclasses.replace(
        batch,
        inputs=map_arrays(lambda part: part[:count] if hasattr(part, "shape") else part, batch.inputs),  # else a switch
        targets=None if batch.targets is None else batch.targets[:count],
        ids=None if batch.ids is None else batch.ids[:count],
        seeds=None if batch.seeds is None else batch.seeds[:count],
    )


def split_relations(objective: Objective, training: Training) -> list[str]:
    """A doubt about each term that parts of a batch do not add up to, where a step has several batches."""
    return [
        f"The term {term.called!r} relates the samples of a batch to each other. Of the {training.accumulate} "
        "batches of a step it sees one at a time, so that it is not what one large batch would give."
        for term in objective.terms
        if training.accumulate > 1 and (get_loss(term.loss).relational or get_loss(term.loss).over == "contents")
    ]


def late_ramps(objective: Objective, training: Training) -> list[str]:
    """A doubt about each weight that has not come to its end when the run has."""
    weights = [("the labels", objective.label_weight)]
    weights += [(f"the term {term.called!r}", term.weight) for term in objective.terms]
    return [
        f"The weight of {name} comes to {weight.end:g} after {weight.after + weight.epochs:g} epochs, and the run ends "
        f"after {training.epochs}, with {weight.at(training.epochs):.3g}. Give a Ramp that is a like part of these."
        for name, weight in weights
        if isinstance(weight, Ramp) and weight.after + weight.epochs > training.epochs
    ]


def mixed_scores(objective: Objective, teachers: int) -> list[str]:
    """A doubt about probabilities of several teachers that are multiplied, and not mixed."""
    activations = {get_loss(term.loss).activation for term in objective.terms if of_all(term)}
    if objective.teachers != "logits" or teachers == 1 or not activations - {"identity"}:
        return []
    text = (
        f"The scores of the {teachers} teachers are averaged, which says the product of what they say, and no mixture: "
        'one that is sure outvotes the others. Combined as "probabilities" they are a mixture.'
    )
    return [text]
