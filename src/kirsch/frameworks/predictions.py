"""Find the output with the logits by the names of the outputs of a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNNAMED = re.compile(r"(output_)?\d+([._]\d+)*|output")
"""Names of the outputs of a tuple, by their position, in a model and in an ONNX file."""

ASIDE = ("hidden_state", "attention", "past_key_values", "router_logits")
"""Words in the names of outputs that a model returns beside its predictions."""

MAIN = "out"
"""The main output of the segmentation models of torchvision, which return "aux" as well."""


def logits_output(names: Sequence[str]) -> str:
    """Return the name of the output that holds the logits.

    It is the output named "logits", or the only one whose name contains that word; otherwise the first of a tuple, or
    the only output of a dict that is not a hidden state, an attention, a cache or a loss.

    Args:
        names: names of all outputs, in their order; at least one.

    Raises:
        UsageError: the output with the logits cannot be identified by name.
    """
    named = ["logits"] if "logits" in names else [name for name in names if "logits" in name]
    if len(named) == 1:
        return named[0]
    if len(named) > 1:
        raise UsageError(
            f"The model returns {', '.join(named)}, and none of them is named logits.",
            fix=f'Name each by itself, as "output.{named[0]}", and leave the labels out: label_weight=0.',
        )
    if UNNAMED.fullmatch(names[0]):
        return names[0]
    if "hidden_state" in names[0]:
        raise UsageError(
            f"The model returns {names[0]} and no logits: it has no head.",
            fix=f'Give a model with one, or compare "output.{names[0]}" alone, with label_weight=0.',
        )
    main = [name for name in names if name != "loss" and not any(word in name for word in ASIDE)] or list(names)
    if len(main) > 1 and MAIN not in main:
        raise UsageError(
            f"The model returns {', '.join(main)}, and none of them is named logits.",
            "The labels and the teacher are compared with one output.",
            f'Rename that output to "logits" in the forward, or compare "output.{main[0]}" and the like alone, with '
            "label_weight=0.",
        )
    return MAIN if MAIN in main else main[0]
