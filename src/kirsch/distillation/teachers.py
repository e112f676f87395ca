"""Where the outputs of the teachers come from: models that run, or a store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kirsch import ops
from kirsch.data.annotations import Model
from kirsch.data.arrays import host
from kirsch.data.batches import ArrayData
from kirsch.distillation.losses.top_k import stored_top_k
from kirsch.distillation.schedule import Ramp
from kirsch.distillation.store import TeacherStore
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from kirsch.data.batches import Batch
    from kirsch.distillation.bound_term import BoundTerm
    from kirsch.distillation.losses.loss import Activation
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.probabilities import Logits
    from kirsch.frameworks.protocols import Framework, Inference

TOP_K = ("indices", "log_p", "tail")
"""Fields of a record that holds the largest logits only."""


Teacher = Model | TeacherStore | Sequence[Model]
"""A teacher that runs, several of them, or the stored outputs of one."""


class TeacherSource(Protocol):
    """Returns the outputs of the teachers for a batch."""

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each teacher its values by layer, without gradient, on the device of the batch."""

    def close(self) -> None:
        """Remove hooks, until the next call."""


class LiveTeachers:
    """Teachers that are run on every batch, in inference mode and without gradient.

    Args:
        framework: of the teachers.
        models: frozen, in inference mode.
        layers: for each teacher, the layers whose values are needed.
        logits: for each teacher, a function that converts probabilities among its values to logits, or None.
    """

    def __init__(
        self,
        framework: Framework,
        models: Sequence[Any],
        layers: Sequence[Sequence[str]],
        logits: Sequence[Logits | None],
    ) -> None:
        self._framework, self._logits = framework, logits
        self._places = list(zip(models, layers, strict=True))
        self._watches: list[Any] = []

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """See `TeacherSource`."""
        if not self._watches:
            self._watches = [self._framework.features.capture(model, layers) for model, layers in self._places]
        found = [self._framework.inference.infer(watch, batch.inputs) for watch in self._watches]
        return [values if own is None else own(values) for own, values in zip(self._logits, found, strict=True)]

    def close(self) -> None:
        """See `TeacherSource`."""
        for watch in self._watches:
            watch.close()
        self._watches.clear()


class StoredTeacher:
    """The outputs of a teacher that a store holds.

    Args:
        inference: of the framework of the student.
        store: a `TeacherStore`.
    """

    def __init__(self, inference: Inference, store: TeacherStore) -> None:
        self._inference, self._store = inference, store

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """See `TeacherSource`."""
        if batch.ids is None:
            raise UsageError(
                "A store is read by sample numbers, and the batches have none.",
                fix="Give ArrayData, or batches of (inputs, targets, ids).",
            )
        self._check_views(batch)
        self._store.verify_once(batch.view)
        like = ops.first_array(batch.inputs)
        found = self._store.read(host(batch.ids), batch.view, batch.seeds)
        if "indices" in found:  # PyTorch knows next to nothing of unsigned numbers of 16 and 32 bits
            found["indices"] = found["indices"].astype(np.int64)
        values = {name: self._inference.from_numpy(array, like=like) for name, array in found.items()}
        if "maximum" in values:  # scores are kept below their largest, for which 16 bits are too few
            values["logits"] = values.pop("scores") + values.pop("maximum")[..., None]
        if "log_p" in values:
            values["logits"] = {name: values.pop(name) for name in TOP_K}
        return [values]

    def _check_views(self, batch: Batch) -> None:
        """Refuse batches whose augmentation is not, or may not be, that of the stored samples."""
        if self._store.specification.augmented and batch.seeds is None:
            raise UsageError(
                "The store holds augmented samples, and the batches have no seeds of an augmentation.",
                "They may not be the views that the teacher saw.",
                "Take kirsch.distill, or the batches of ArrayData.epoch; of a loader of your own give "
                "Batch(inputs, targets, ids, view, seeds).",
            )
        if not self._store.specification.augmented and batch.seeds is not None:
            raise UsageError(
                "The store holds samples without augmentation, and the batches are augmented.",
                "The teacher did not see these views.",
                "Build a store from the data with its transform, or train without one.",
            )

    def close(self) -> None:
        """See `TeacherSource`."""


def holds_top_k(values: Any) -> bool:
    """Return whether a record holds the largest logits only."""
    return isinstance(values, Mapping) and set(TOP_K) <= set(values)


def stored_scores(
    term: BoundTerm, student: Any, record: Mapping[str, Any], mask: Any, options: Mapping[str, Any]
) -> Any:
    """Return the soft-target loss for a record that holds the teacher's largest logits.

    Raises:
        UsageError: the term needs all logits, or states what the record cannot serve.
    """
    if term.loss.name not in ("kd", "top-k"):
        raise UsageError(
            f"The term {term.name!r} needs all logits of the teacher, and the store holds the largest only.",
            fix="Build the store with Dense(), or take the terms 'kd' or 'top-k'.",
        )
    lost = set(options) - {"temperature", "tail", "k"}
    if lost:
        raise UsageError(
            f"The term {term.name!r} states {', '.join(sorted(lost))}.",
            "A record of the largest logits cannot serve that.",
            "Build the store with Dense(), or leave it out.",
        )
    stored = record["indices"].shape[-1]
    if options.get("k", stored) != stored:
        raise UsageError(f"The term {term.name!r} takes the {options['k']} largest logits; the store holds {stored}.")
    temperature, tail = options.get("temperature", 1.0), options.get("tail", "bucket")
    fields = [record[name] for name in TOP_K]
    return stored_top_k(student, *fields, tail=tail, temperature=temperature, stored_temperature=temperature, mask=mask)


def replayed(store: TeacherStore, data: Any) -> ArrayData:
    """Return the data with the views and the augmentation seed of a store.

    Raises:
        UsageError: the data is not in memory, so that its augmentation cannot be repeated.
        StoreError: the store is of other data, another transform, or other views.
    """
    if not isinstance(data, ArrayData):
        raise UsageError(
            "A store repeats the augmentation of each sample, which is not possible with a loader.",
            fix="Give ArrayData.",
        )
    store.require(data=data)
    return dataclasses.replace(data, views=store.specification.views, seed=store.specification.seed)


def require_temperature(store: TeacherStore, objective: Objective) -> None:
    """Refuse a store that holds probabilities of another temperature.

    Raises:
        UsageError: the temperature of a term changes over time.
        StoreError: the temperature of a term is not that of the store.
    """
    stored = store.specification
    for term in objective.terms:
        if term.layers[1] == "logits" and stored.k:
            if isinstance(term.temperature, Ramp):
                raise UsageError(
                    f"The temperature of {term.record_name!r} changes; the store holds {stored.temperature:g} only.",
                    fix="Build the store with Dense(), or state one temperature.",
                )
            store.require(temperature=1.0 if term.temperature is None else term.temperature)


def combined(
    scores: Sequence[Any],
    way: str,
    temperature: float = 1.0,
    activation: Activation = "softmax",
    axis: int = -1,
) -> Any:
    """Return the logits of several teachers combined.

    Args:
        scores: logits of each teacher, shape (N, K), (N, L, K) or (N, K, H, W).
        way: "probabilities": the mean of the softened probabilities. "logits": the mean of the logits, which for
            classes is a product of the probabilities and not a mixture. "confidence": the mean of the probabilities,
            weighted for each sample, or label, by the negative entropy of each teacher.
        temperature: that softens the probabilities.
        activation: of the loss: "softmax", "sigmoid", or "identity" for numbers, which only have a mean.
        axis: of the classes.

    Source: why probabilities: what minimizes Σ KL(p_i ‖ q) over q is the mean of p_i. Confidence by entropy: Kwon et
        al. 2020, Adaptive knowledge distillation based on entropy, ICASSP.
    """
    if len(scores) == 1:
        return scores[0]
    if way == "logits" or activation == "identity":
        return sum(scores) / len(scores)
    if activation == "sigmoid":  # yes, and no, on an axis of their own
        signs = [ops.stack([each, -each]) for each in scores]
        softened, plain = ([ops.log_sigmoid(sign / by) for sign in signs] for by in (temperature, 1.0))
        axis = 0
    else:
        softened, plain = ([ops.log_softmax(each / by, axis) for each in scores] for by in (temperature, 1.0))
    log_p = ops.stack(softened)  # (teachers, N, K), or (teachers, 2, N, K) of labels
    if way == "confidence":
        own = ops.stack(plain)
        entropy = -ops.sum(ops.exp(own) * own, axis=axis if axis < 0 else axis + 1, keepdims=True)
        log_p = log_p + ops.log_softmax(-entropy, axis=0)
    else:
        log_p = log_p - math.log(len(scores))
    together = ops.logsumexp(log_p, axis=0)[0]
    return temperature * (together[0] - together[1] if activation == "sigmoid" else together)


def one_or_more(teacher: Any) -> list[Any]:
    """Return one teacher, or a list or tuple of teachers, as a list."""
    return list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
