"""Find the output that holds the logits, by the names of a model's outputs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNNAMED = re.compile(r"(output_)?\d+([._]\d+)*|output")
"""Names that state only the position of an output, in the tuple that a model returns or in an ONNX file."""

NOT_PREDICTIONS = ("hidden_state", "attention", "past_key_values", "cache", "router_logits")
"""Words in the names of outputs that are not predictions."""

MAIN = "out"
"""The main output of the segmentation models of torchvision, which return "aux" as well."""


def is_prediction(name: str) -> bool:
    """Return whether an output is a prediction by its name: not a hidden state, attention weight, cache or loss."""
    return name != "loss" and not any(word in name for word in NOT_PREDICTIONS)


def logits_output(names: Sequence[str]) -> str:
    """Return the name of the output that holds the logits.

    This is the output named "logits", or the only output whose name contains "logits". Without such a name, it is the
    first output of a tuple, the output "out" of a dict, or the only output of a dict that is not a hidden state, an
    attention weight, a cache or a loss.

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
            fix=f'Compare each of these outputs by its name, such as "output.{named[0]}", with label_weight=0.',
        )
    if UNNAMED.fullmatch(names[0]):
        return names[0]
    if "hidden_state" in names[0]:
        raise UsageError(
            f"The model returns {names[0]} and no logits: it has no head.",
            fix=f'Give a model with a head, or compare only "output.{names[0]}", with label_weight=0.',
        )
    main = [name for name in names if is_prediction(name)] or list(names)
    if len(main) > 1 and MAIN not in main:
        raise UsageError(
            f"The model returns {', '.join(main)}, and none of them is named logits.",
            "The labels and the teacher are compared with one output.",
            'Name the output with the predictions "logits" in the code of the model. Or compare outputs by name, '
            f'such as "output.{main[0]}", with label_weight=0.',
        )
    return MAIN if MAIN in main else main[0]
