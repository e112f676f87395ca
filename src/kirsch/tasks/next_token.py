"""Logits, labels and masks of causal language models: position i predicts the token at position i + 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kirsch import ops
from kirsch.tasks.padding import DECODER, token_mask


def shift_logits(logits: Any) -> Any:
    """Return the values of all positions but the last, whose output predicts no token of the sequence."""
    return logits[:, :-1]


def shift_labels(labels: Any) -> Any:
    """Return the values of all positions but the first: in a causal model, position i predicts the token at i + 1."""
    return labels[:, 1:]


def predicted_tokens(mask: Any) -> Any:
    """Return the mask of the positions whose next token is predicted, shape (N, L - 1), from the mask of the tokens.

    Neither the position nor the next token may be padding.
    """
    return (shift_logits(mask) != 0) & (shift_labels(mask) != 0)


def tokens_in(inputs: Any) -> Any:
    """Return the tokens of a causal language model, which are its labels: the `input_ids` of a dict, shape (N, L).

    None for other inputs, also those with a decoder, whose outputs do not belong to the `input_ids`.
    """
    causal = isinstance(inputs, Mapping) and not any(name.startswith(DECODER) for name in inputs)
    return inputs.get("input_ids") if causal else None


def next_labels(labels: Any, inputs: Any, ignore_index: int) -> Any:
    """Return the label of each position of a causal model but the last; those from or at padding are ignored.

    Args:
        labels: one label for each token, shape (N, L), of the same library as the inputs.
        inputs: the inputs; a dict may have a mask of the labels, see `kirsch.tasks.padding.token_mask`.
        ignore_index: the label of ignored positions.
    """
    mask, labels = token_mask(inputs, tuple(labels.shape)), shift_labels(labels)
    if mask is None:
        return labels
    return ops.where(ops.expand_mask(predicted_tokens(mask), labels), labels, ignore_index)
