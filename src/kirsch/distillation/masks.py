"""Labels, masks and counts of one batch: which samples and positions take part in a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kirsch import ops

if TYPE_CHECKING:
    from kirsch.data.batches import Batch
    from kirsch.distillation.bound_term import BoundTerm
    from kirsch.distillation.objective import Objective


class BatchMasks:
    """The labels of a batch as the losses take them, and the masks that follow from labels and padding.

    For causal language models, logits at position i belong to the label at position i + 1: both are shifted here.

    Args:
        batch: inputs and targets, on one device.
        objective: for `causal`, `ignore` and the label loss.
        positions_of: mask of the inputs, shape (N, T) → mask of the hidden states, shape (N, L).
    """

    def __init__(self, batch: Batch, objective: Objective, positions_of: Callable[[Any], Any]) -> None:
        self.batch = _with_int64_targets(batch)
        self._causal, self._ignore_index = objective.causal, objective.ignore_index
        self._label_loss, self._positions_of = objective.label_loss, positions_of

    # ------------------------------------------------------------------------------------------------ labels

    @cached_property
    def labels(self) -> Any:
        """The targets, shifted if the objective is causal; None without targets.

        The first token after padding on the left is not a label.
        """
        labels = self.batch.targets
        if not self._causal or labels is None:
            return labels
        real, labels = self.padding.get("attention_mask"), labels[:, 1:]
        return labels if real is None else ops.where(real[:, :-1] != 0, labels, self._ignore_index)

    def shifted(self, logits: Any) -> Any:
        """Return logits, or a dict of arrays of positions, without the last position if the objective is causal."""
        if not self._causal:
            return logits
        if isinstance(logits, Mapping):
            return {name: self.shifted(value) for name, value in logits.items()}
        return logits[:, :-1]

    @cached_property
    def label_mask(self) -> Any:
        """True where there is a label; None where all samples and positions have one."""
        if self.labels is None or self._are_numbers(self.labels):
            return None
        known = self.labels != self._ignore_index
        return None if bool(known.all()) else known

    def _are_numbers(self, labels: Any) -> bool:
        """Return whether labels are real numbers, of which none marks a missing label, and not class numbers."""
        return "float" in str(labels.dtype) or self._label_loss == "squared-error"

    # ------------------------------------------------------------------------------------------------ padding

    @cached_property
    def padding(self) -> Mapping[str, Any]:
        """The inputs of a model of sequences by name, with `attention_mask` as that of its positions."""
        inputs = self.batch.inputs if isinstance(self.batch.inputs, Mapping) else {}
        mask = inputs.get("attention_mask")
        return inputs if mask is None else {**inputs, "attention_mask": self._positions_of(mask)}

    def tokens(self, stack: str, *, across: bool = False) -> Any:
        """Return the mask of the positions that are not padding, shape (N, L); None if the batch has none.

        For the decoder of an encoder-decoder it is, unless the batch states it, the mask of the labels.

        Args:
            stack: "encoder" or "decoder" of such a model.
            across: pairs of a query in the decoder and a key in the encoder, shape (N, queries, keys), or
                (N, queries, 1) if no key is padding.
        """
        if not any(name.startswith("decoder_input") for name in self.padding) or stack == "encoder":
            return self.padding.get("attention_mask")
        found, labels = self.padding.get("decoder_attention_mask"), self.batch.targets
        if found is None and labels is not None and labels.ndim == len("NL") and not self._are_numbers(labels):
            found = labels != self._ignore_index
        if across and found is not None:
            keys = self.padding.get("attention_mask")
            return (found != 0)[:, :, None] if keys is None else (found != 0)[:, :, None] & (keys != 0)[:, None, :]
        return found

    @cached_property
    def unlabeled_positions(self) -> Any:
        """The mask of the positions of sequences without labels whose logits are compared."""
        mask = self.tokens("")
        return mask if mask is None or not self._causal else mask[:, 1:] * mask[:, :-1]

    # ------------------------------------------------------------------------------------------------ terms

    def of(self, term: BoundTerm, student: Any) -> Any:
        """Return the mask of a term; None where all samples and positions are compared.

        Logits of sequences and pixels are compared where there is a label. Logits of samples are compared with and
        without a label, unless the loss takes labels.

        Args:
            term: the term.
            student: its values on the side of the student, shifted.
        """
        if term.on_logits:
            if self.labels is None:
                return self.unlabeled_positions if student.ndim == len("NLK") else None
            return self.label_mask if self.labels.ndim > 1 or "labels" in term.step_keywords else None
        if not term.on_tokens:
            return None
        mask = self.tokens(term.stack, across=term.of_cross_attention)
        if mask is not None and mask.ndim == len("NQK"):
            mask = ops.broadcast_to(mask, (*mask.shape[:-1], student.shape[-1]))
        return mask

    def count(self, mean_over: str, example: BoundTerm | None, *, sequences: bool) -> int:
        """Return how many items of a batch the mean of a loss goes over.

        Args:
            mean_over: "samples", "labels", or that of the example.
            example: a term whose mean goes over positions or pairs.
            sequences: whether samples without labels are sequences, of which each position counts.
        """
        samples = len(self.batch)
        if mean_over == "labels":
            if self.labels is None:
                mask = self.unlabeled_positions if sequences else None
                return samples if mask is None else int((mask != 0).sum())
            if self.batch.targets.ndim == 1 or self._are_numbers(self.labels):
                return samples
            return int((self.labels != self._ignore_index).sum())
        mask = None if example is None else self.tokens(example.stack, across=example.of_cross_attention)
        if mask is None or example is None:
            return samples
        known = mask != 0
        if example.loss.over == "positions":
            return int((known if known.ndim == len("NL") else known.any(-1)).sum())
        return int(((known.sum(-1)) ** 2 if known.ndim == len("NL") else known).sum())


def _with_int64_targets(batch: Batch) -> Batch:
    """Return the batch with class numbers in 64 bits: in 8 bits -100 is class 156."""
    kind = str(getattr(batch.targets, "dtype", "")).removeprefix("torch.")
    if "int" not in kind or kind == "int64":
        return batch
    return dataclasses.replace(batch, targets=ops.cast(batch.targets, "int64"))
