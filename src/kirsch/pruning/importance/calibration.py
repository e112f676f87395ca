"""Calibration batches, and the loss whose change importances estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.annotations import has_arrays
from kirsch.data.arrays import host
from kirsch.data.batches import Batch, SeededData, batches_of
from kirsch.errors import DataError, UnknownNameError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.tasks.label_losses import IGNORED, LABEL_LOSSES
from kirsch.tasks.next_token import next_labels, shift_logits, tokens_in
from kirsch.tasks.padding import MASK, token_mask

if TYPE_CHECKING:
    from kirsch.pruning.importance.importance import Importance, Needs

Loss = Callable[[Any, Any], Any]
"""Function of logits and targets that returns a scalar with gradient, the mean over the samples."""

NEXT_TOKEN = "next-token"  # noqa: S105 - not a password
"""The cross-entropy of a causal language model: the logits at position i belong to the label at position i + 1."""


@dataclass(frozen=True)
class CalibrationBatches:
    """Calibration data as batches that can be iterated over several times; see `read_batches`.

    Args:
        model: the model that runs on the batches.
        data: a loader, `ArrayData`, a list of batches, or one batch.
        needs: what the batches must have, inputs or labels.
        reader: what reads the batches, such as "The importance 'taylor'", for messages.
        loss: name of the loss, or a function. For "next-token", the tokens of a batch without labels are its labels.
            The labels are those that the positions predict, shape (N, L - 1), and padding has no label.
    """

    model: Any
    data: Any
    needs: Needs
    reader: str
    loss: Any

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        for number, batch in enumerate(read_batches(self.data, self.model), start=1):
            yield self._with_labels(batch, number) if self.needs == "labels" else batch
        if not number:
            raise DataError("`data` of kirsch.plan has no batches.", fix="Give at least one batch.")

    @property
    def labeled(self) -> CalibrationBatches:
        """The same batches, which must have labels, for statistics that use them."""
        return replace(self, needs="labels")

    def _with_labels(self, batch: Batch, number: int) -> Batch:
        """Return a batch with the labels that the loss compares with the outputs."""
        next_token = isinstance(self.loss, str) and self.loss == NEXT_TOKEN
        if next_token and batch.targets is None:
            batch = replace(batch, targets=tokens_in(batch.inputs))
        self._check_labels(batch, number)
        return _predicted(batch, number) if next_token else batch

    def _check_labels(self, batch: Batch, number: int) -> None:
        if batch.targets is None:
            raise DataError(
                f"Batch {number} of `data` has no labels.",
                f"{self.reader} is computed from the loss on labels.",
                "Give batches of (inputs, labels), loss='next-token' for a causal language model, or an importance of "
                "inputs alone, such as 'wanda'.",
            )
        tokens = tokens_in(batch.inputs)
        unshifted = isinstance(self.loss, str) and self.loss != NEXT_TOKEN
        if tokens is None or not unshifted or tuple(tokens.shape) != tuple(batch.targets.shape):
            return
        labels = host(batch.targets)
        if np.array_equal(labels, np.where(labels == IGNORED, labels, host(tokens))):
            raise UsageError(
                "The labels are the tokens of the inputs themselves.",
                "A causal language model predicts the next token, and the loss does not shift the labels.",
                f'Give loss="{NEXT_TOKEN}".',
            )


def read_batches(data: Any, model: Any, name: str = "`data`") -> Iterator[Batch]:
    """Yield the batches of calibration data: of a loader, `ArrayData` or a list, or the single batch.

    Inputs by position become a dict by the names of the arguments of `forward`, so that an attention mask is found. A
    loader that draws random numbers gives the same batches each time, and the caller's random state is not changed.

    Args:
        data: the data.
        model: the model that runs on the batches.
        name: name of the argument that holds the data, for messages.
    """
    if isinstance(data, SeededData):
        batches = data.epoch(0, 0)
    elif (isinstance(data, list) and not _is_pair(data)) or not has_arrays(data):
        batches = batches_of(data, name)
    else:
        batches = iter([Batch.of(data)])
    framework, number = framework_of(model), 0
    while (batch := framework.training.seeded(partial(next, batches, None), number)) is not None:
        number += 1
        named = framework.inference.named_arguments(model, batch.inputs)
        yield batch if named is batch.inputs else replace(batch, inputs=named)


def _is_pair(data: list[Any]) -> bool:
    """Return whether a list is one batch of inputs and labels, as loaders return it, not a list of batches of inputs.

    Labels have other axes than inputs; batches of inputs differ in their sizes only.
    """
    shapes = [tuple(getattr(value, "shape", ())) for value in data]
    return (
        len(data) == len(("inputs", "labels")) and len({len(s) for s in shapes}) > 1 and shapes[0][:1] == shapes[1][:1]
    )


def _predicted(batch: Batch, number: int) -> Batch:
    """Return a batch with the labels that the positions of a causal language model predict."""
    labels = host(batch.targets)
    if labels.ndim != len("NL"):
        raise DataError(
            f"The labels of batch {number} of `data` have shape {labels.shape}.",
            f'loss="{NEXT_TOKEN}" needs one label for each token, shape (samples, tokens).',
            "Give the tokens of the inputs as labels.",
        )
    mask = token_mask(batch.inputs, labels.shape)
    inputs = {} if mask is None else {MASK: host(mask)}
    return replace(batch, targets=next_labels(labels, inputs, IGNORED))


def batches_for(
    importance: Importance, model: Any, data: Any, loss: Any, *, for_ranking: bool = False
) -> CalibrationBatches | None:
    """Return the batches for an importance; None if it is computed from the weights alone.

    Args:
        importance: the importance.
        model: the model that runs on the batches.
        data: see `CalibrationBatches`.
        loss: see `CalibrationBatches`.
        for_ranking: whether the ranking of the layers runs the model, too.

    Raises:
        UsageError: data is missing, has no effect, or can be iterated over only once.
    """
    if importance.needs == "weights" and not for_ranking:
        if data is not None:
            raise UsageError(
                "`data` of kirsch.plan has no effect.",
                f"The importance {importance.name!r} is computed from the weights alone.",
                "Remove `data`, or give an importance that uses it, such as 'taylor' or 'wanda'.",
            )
        return None
    if data is None:
        wanted = "(inputs, labels)" if importance.needs == "labels" else "inputs"
        cause = 'ranking="milp"' if importance.needs == "weights" else f"the importance {importance.name!r}"
        raise UsageError(
            f"`data` of kirsch.plan is missing: {cause} runs the model.",
            fix=f"Give calibration batches of {wanted}: a DataLoader, kirsch.ArrayData or a list; 256 samples suffice. "
            "On the command line, give --data SOURCE.",
        )
    check_reusable(data)
    return CalibrationBatches(model, data, importance.needs, f"The importance {importance.name!r}", loss)


def no_labels() -> DataError:
    """Return the error for calibration data whose samples all lack a label."""
    return DataError("`data` of kirsch.plan has no samples with labels.", fix="Give at least one.")


def check_reusable(data: Any) -> None:
    """Raise a UsageError for data that can be iterated over only once."""
    if isinstance(data, Iterator):
        raise UsageError(
            f"`data` of kirsch.plan is a {type(data).__name__}, which can be iterated over only once.",
            fix="Give a DataLoader, or a list: list(data).",
        )


def loss_of(loss: Any) -> Loss:
    """Return the function of logits and labels for a name, or the function itself.

    For "next-token", the labels are those of `CalibrationBatches`.

    Raises:
        UnknownNameError: there is no loss of this name.
    """
    if callable(loss):
        given: Loss = loss
        return given
    if loss == NEXT_TOKEN:
        cross_entropy = LABEL_LOSSES["cross-entropy"]
        return lambda logits, labels: cross_entropy(shift_logits(logits), labels)
    if loss not in LABEL_LOSSES:
        raise UnknownNameError("loss", loss, [*LABEL_LOSSES, NEXT_TOKEN])
    found: Loss = LABEL_LOSSES[loss]
    return found
