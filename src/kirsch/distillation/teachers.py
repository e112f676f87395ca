"""Sources of teacher outputs: models that run on each batch, or a store."""

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
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.term import Ramp
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from kirsch.data.batches import Batch
    from kirsch.distillation.losses.loss import Activation
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.probabilities import LogitsConverter
    from kirsch.frameworks.protocols import Framework, Inference

TOP_K = ("indices", "log_p", "tail")
"""Fields of stored outputs that hold only the k largest logits."""


Teacher = Model | TeacherStore | Sequence[Model]
"""A teacher model, several teacher models, or the stored outputs of a teacher."""


class TeacherSource(Protocol):
    """Returns the outputs of the teachers for a batch."""

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the features of each teacher by layer name, without gradient, on the device of the batch."""

    def close(self) -> None:
        """Remove the hooks; the next call adds them again."""


class LiveTeachers:
    """Teachers that are run on every batch, in inference mode and without gradient.

    Args:
        framework: the framework of the teachers.
        models: the teachers, frozen and in inference mode.
        layers: the layers of each teacher whose features are needed.
        logits: the function that converts the probabilities of each teacher to logits; None if they are logits.
    """

    def __init__(
        self,
        framework: Framework,
        models: Sequence[Any],
        layers: Sequence[Sequence[str]],
        logits: Sequence[LogitsConverter | None],
    ) -> None:
        self._framework, self._logits = framework, logits
        self._models = list(zip(models, layers, strict=True))
        self._captures: list[Any] = []

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """See `TeacherSource`."""
        if not self._captures:
            self._captures = [self._framework.features.capture(model, layers) for model, layers in self._models]
        outputs = [self._framework.inference.infer(capture, batch.inputs) for capture in self._captures]
        return [
            values if convert is None else convert(values)
            for convert, values in zip(self._logits, outputs, strict=True)
        ]

    def close(self) -> None:
        """See `TeacherSource`."""
        for capture in self._captures:
            capture.close()
        self._captures.clear()


class StoredTeacher:
    """The outputs of a teacher, read from a store.

    Args:
        inference: the `Inference` object of the student's framework.
        store: a `TeacherStore`.
    """

    def __init__(self, inference: Inference, store: TeacherStore) -> None:
        self._inference, self._store = inference, store

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """See `TeacherSource`."""
        if batch.ids is None:
            raise UsageError(
                "A store is read by sample ids, and the batches have none.",
                fix="Give ArrayData, or batches of (inputs, targets, ids).",
            )
        self._check_views(batch)
        self._store.verify_once(batch.view)
        like = ops.first_array(batch.inputs)
        record = self._store.read(host(batch.ids), batch.view, batch.seeds)
        if "indices" in record:  # PyTorch supports few operations on unsigned integers of 16 and 32 bits
            record["indices"] = record["indices"].astype(np.int64)
        values = {name: self._inference.from_numpy(array, like=like) for name, array in record.items()}
        if "maximum" in values:  # logits are stored relative to their maximum, which needs more than 16 bits
            values["logits"] = values.pop("scores") + values.pop("maximum")[..., None]
        if "log_p" in values:
            values["logits"] = {name: values.pop(name) for name in TOP_K}
        return [values]

    def _check_views(self, batch: Batch) -> None:
        """Refuse batches whose augmentation may differ from that of the stored samples."""
        if self._store.specification.augmented and batch.seeds is None:
            raise UsageError(
                "The store holds augmented samples, and the batches have no augmentation seeds.",
                "The views in the batches may differ from the views that the teacher received.",
                "Use kirsch.distill, or the batches of ArrayData.epoch; from a loader of your own, give "
                "Batch(inputs, targets, ids, view, seeds).",
            )
        if not self._store.specification.augmented and batch.seeds is not None:
            raise UsageError(
                "The store holds samples without augmentation, and the batches are augmented.",
                "The teacher did not receive these views.",
                "Build a store from the data with its transform, or train without one.",
            )

    def close(self) -> None:
        """See `TeacherSource`."""


def holds_top_k(values: Any) -> bool:
    """Return whether stored outputs hold only the k largest logits."""
    return isinstance(values, Mapping) and set(TOP_K) <= set(values)


def with_store_views(store: TeacherStore, data: Any) -> ArrayData:
    """Return the data with the views and the augmentation seed of a store.

    Raises:
        UsageError: the data is not in memory, so that its augmentation cannot be repeated.
        StoreError: the store was built from other data, another transform, or other views.
    """
    if not isinstance(data, ArrayData):
        raise UsageError(
            "A store needs the augmentation of each sample to be repeated, which is not possible with a loader.",
            fix="Give ArrayData.",
        )
    store.require(data=data)
    return dataclasses.replace(data, views=store.specification.views, seed=store.specification.seed)


def require_temperature(store: TeacherStore, objective: Objective) -> None:
    """Refuse a store whose probabilities have a temperature other than that of the terms.

    Raises:
        UsageError: the temperature of a term changes during training.
        StoreError: the temperature of a term is not that of the store.
    """
    stored = store.specification
    for term in objective.terms:
        if term.layers[1] == "logits" and stored.k:
            if isinstance(term.temperature, Ramp):
                raise UsageError(
                    f"The temperature of {term.record_name!r} changes during training; the store holds probabilities "
                    f"for the temperature {stored.temperature:g} only.",
                    fix="Build the store with Dense(), or give a constant temperature.",
                )
            store.require(temperature=1.0 if term.temperature is None else term.temperature)


def combined_logits(
    logits: Sequence[Any],
    combine: str,
    temperature: float = 1.0,
    activation: Activation = "softmax",
    axis: int = -1,
) -> Any:
    """Combine the logits of several teachers.

    Args:
        logits: logits of each teacher, shape (N, K), (N, L, K) or (N, K, H, W).
        combine: "probabilities": the mean of the softened probabilities. "logits": the mean of the logits, which for
            classes is the normalized geometric mean of the probabilities and not a mixture. "confidence": a weighted
            mean of the probabilities. The weights of the teachers, for each sample or binary label, are the softmax of
            their negative entropies.
        temperature: temperature of the softened probabilities.
        activation: the activation that the loss applies: "softmax", "sigmoid", or "identity" for real-valued outputs,
            which are averaged.
        axis: the axis of the classes.

    Source: the mean of the probabilities p_i minimizes Σ KL(p_i ‖ q) over q. Confidence by entropy: Kwon et
        al. 2020, Adaptive knowledge distillation based on entropy, ICASSP.
    """
    if len(logits) == 1:
        return logits[0]
    if combine == "logits" or activation == "identity":
        return sum(logits) / len(logits)
    if activation == "sigmoid":  # log p and log (1 - p) on a new axis 0
        signs = [ops.stack([x, -x]) for x in logits]
        softened, plain = ([ops.log_sigmoid(sign / divisor) for sign in signs] for divisor in (temperature, 1.0))
        axis = 0
    else:
        softened, plain = ([ops.log_softmax(x / divisor, axis) for x in logits] for divisor in (temperature, 1.0))
    log_p = ops.stack(softened)  # (teachers, N, K), or (teachers, 2, N, K) for binary labels
    if combine == "confidence":
        unsoftened = ops.stack(plain)
        entropy = -ops.sum(ops.exp(unsoftened) * unsoftened, axis=axis if axis < 0 else axis + 1, keepdims=True)
        log_p = log_p + ops.log_softmax(-entropy, axis=0)
    else:
        log_p = log_p - math.log(len(logits))
    mixture = ops.logsumexp(log_p, axis=0)[0]
    return temperature * (mixture[0] - mixture[1] if activation == "sigmoid" else mixture)


def one_or_more(teacher: Any) -> list[Any]:
    """Return one teacher, or a list or tuple of teachers, as a list."""
    return list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
