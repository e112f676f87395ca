"""Labels, masks and counts of one batch: which samples and positions take part in a loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.tasks.next_token import next_labels, predicted_tokens, shift_logits

if TYPE_CHECKING:
    from kirsch.data.batches import Batch
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.term import BoundTerm


class BatchMasks:
    """Labels of a batch as the losses take them, and the masks that follow from labels and padding.

    For causal language models, logits at position i belong to the label at position i + 1: both are shifted here.
    Only `count` reads values of arrays, so that a training step does not wait for its device.

    Args:
        batch: inputs and targets, on one device.
        objective: supplies `causal`, `ignore_index` and the label loss.
        positions_of: function that converts the mask of the inputs, shape (N, T), to the mask of the hidden states,
            shape (N, L).
        labeled: the number of samples or positions with a label, as `count("labeled", ...)` returns it; None if no
            method other than `count` is called.
    """

    def __init__(
        self, batch: Batch, objective: Objective, positions_of: Callable[[Any], Any], labeled: int | None = None
    ) -> None:
        self.batch, self._labeled = _with_int64_targets(batch), labeled
        self._causal, self._ignore_index = objective.causal, objective.ignore_index
        self._label_loss, self._positions_of = objective.label_loss, positions_of

    # ------------------------------------------------------------------------------------------------ labels

    @cached_property
    def labels(self) -> Any:
        """The targets, shifted if the objective is causal; None without targets.

        Padding is not a label, and neither is the first token after padding on the left, because no token predicts it.
        """
        labels = self.batch.targets
        if not self._causal or labels is None:
            return labels
        return next_labels(labels, self.padding, self._ignore_index)

    def shifted(self, logits: Any) -> Any:
        """Return logits, or each array of a dict, without the last position if the objective is causal."""
        if not self._causal:
            return logits
        if isinstance(logits, Mapping):
            return {name: self.shifted(value) for name, value in logits.items()}
        return shift_logits(logits)

    @cached_property
    def label_mask(self) -> Any:
        """True where there is a label; None if all samples and positions have one."""
        if self.labels is None or self._are_real(self.labels) or self._labeled == math.prod(self.labels.shape):
            return None
        return self.labels != self._ignore_index

    @property
    def has_labels(self) -> bool:
        """Whether any sample or position has a label."""
        return self.labels is not None and self._labeled != 0

    def mean_over_samples(self, loss: Any) -> Any:
        """Convert a mean over the labeled samples to a mean over all samples; losses of parts of a batch then add up.

        Means over the labeled positions of sequences and images are returned unchanged.
        """
        if self.label_mask is None or len(self.labels.shape) > 1 or self._labeled is None:
            return loss
        return loss * (self._labeled / self.labels.shape[0])

    def _are_real(self, labels: Any) -> bool:
        """Return whether labels are real numbers, for which `ignore_index` has no meaning, instead of class numbers."""
        return "float" in ops.dtype(labels) or self._label_loss == "squared-error"

    # ------------------------------------------------------------------------------------------------ padding

    @cached_property
    def padding(self) -> Mapping[str, Any]:
        """The inputs of a sequence model by name, with the mask of the hidden states as `attention_mask`."""
        inputs = self.batch.inputs if isinstance(self.batch.inputs, Mapping) else {}
        mask = inputs.get("attention_mask")
        return inputs if mask is None else {**inputs, "attention_mask": self._positions_of(mask)}

    def tokens(self, stack: str, *, across: bool = False) -> Any:
        """Return the mask of the positions that are not padding, shape (N, L); None if the batch has no such mask.

        For the decoder of an encoder-decoder without `decoder_attention_mask`, this is the mask of the labels.

        Args:
            stack: "encoder" or "decoder" for a layer of an encoder-decoder, else empty.
            across: return the mask of the pairs of a query in the decoder and a key in the encoder, shape
                (N, queries, keys), or (N, queries, 1) if no key is padding.
        """
        if not any(name.startswith("decoder_input") for name in self.padding) or stack == "encoder":
            return self.padding.get("attention_mask")
        queries, labels = self.padding.get("decoder_attention_mask"), self.batch.targets
        if queries is None and labels is not None and len(labels.shape) == len("NL") and not self._are_real(labels):
            queries = labels != self._ignore_index
        if across and queries is not None:
            keys = self.padding.get("attention_mask")
            return (queries != 0)[:, :, None] if keys is None else (queries != 0)[:, :, None] & (keys != 0)[:, None, :]
        return queries

    @cached_property
    def unlabeled_positions(self) -> Any:
        """Mask of the positions whose logits are compared, for sequences without labels."""
        mask = self.tokens("")
        return mask if mask is None or not self._causal else predicted_tokens(mask)

    # ------------------------------------------------------------------------------------------------ terms

    def mask_of(self, term: BoundTerm, student: Any) -> Any:
        """Return the mask of a term; None if all samples and positions are compared.

        With one label per position (sequences, pixels), only logits with a label are compared. With one label per
        sample, all logits are compared, unless the loss takes labels: then only those with a label.

        Args:
            term: the term.
            student: the student's logits or feature, shifted if the objective is causal.
        """
        if term.on_logits:
            if self.labels is None:
                return self.unlabeled_positions if len(student.shape) == len("NLK") else None
            return self.label_mask if len(self.labels.shape) > 1 or "labels" in term.step_keywords else None
        if not term.on_tokens:
            return None
        mask = self.tokens(term.stack, across=term.of_cross_attention)
        if mask is not None and len(mask.shape) == len("NQK"):
            mask = ops.broadcast_to(mask, (*mask.shape[:-1], student.shape[-1]))
        return mask

    def count(self, mean_over: str, example: BoundTerm | None, *, sequences: bool) -> int:
        """Return the number of items of the batch over which a loss is averaged.

        Reads values of arrays, which synchronizes with their device.

        Args:
            mean_over: "samples": all samples. "labeled": samples or positions with a label. "labels": all samples if
                each has one label, else the positions with a label. Any other text: `BoundTerm.mean_over` of the
                example.
            example: a term with this `mean_over`, which is averaged over positions or pairs of positions.
            sequences: whether the samples are sequences, so that without labels each position counts.
        """
        samples = len(self.batch)
        if mean_over == "labeled":
            return self._count_labeled()
        if mean_over == "labels":
            if self.labels is None:
                mask = self.unlabeled_positions if sequences else None
                return samples if mask is None else int(ops.count_nonzero(mask))
            one_each = len(self.batch.targets.shape) == 1 or self._are_real(self.labels)
            return samples if one_each else self._count_labeled()
        mask = None if example is None else self.tokens(example.stack, across=example.of_cross_attention)
        if mask is None or example is None:
            return samples
        valid = mask != 0
        if example.loss.over == "positions":
            return int(ops.sum(valid if len(valid.shape) == len("NL") else ops.any(valid, -1)))
        return int(ops.sum(ops.sum(valid, -1) ** 2 if len(valid.shape) == len("NL") else valid))

    def _count_labeled(self) -> int:
        if self.labels is None:
            return 0
        if self._are_real(self.labels):
            return math.prod(self.labels.shape)
        return int(ops.count_nonzero(self.labels != self._ignore_index))


def _with_int64_targets(batch: Batch) -> Batch:
    """Return the batch with class numbers as int64: as uint8, the ignored label -100 would be class 156."""
    kind = str(getattr(batch.targets, "dtype", "")).removeprefix("torch.")
    if "int" not in kind or kind == "int64":
        return batch
    return dataclasses.replace(batch, targets=ops.cast(batch.targets, "int64"))
