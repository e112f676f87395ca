"""What an operator does to labels, by its name.

A rule takes a `Step` and gives the `Tensor`s of its results, in terms of the relations of `kirsch.graph.relations`. An
operator without a rule freezes whatever it touches.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TYPE_CHECKING

from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.step import Step

Rule = Callable[["Step"], Tensor | list[Tensor]]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: this function is the rule of these operators."""

    def put(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return put


def apply(step: Step) -> list[Tensor]:
    """The results of one operation; whatever it loses without a word is an error of its rule.

    Raises:
        RuntimeError: a label entered the operation and is not accounted for.
    """
    known = RULES.get(step.name)
    if known is None:
        relations.freeze(step.facts, step.tensors(), f"there is no rule for {step.facts.operation.name}")
        return [Tensor.of(shape) for shape in step.shapes]
    found = known(step)
    results = found if isinstance(found, list) else [found, *(Tensor.of(shape) for shape in step.shapes[1:])]
    lost = step.facts.lost(step.tensors(), results)
    if len(lost):
        raise RuntimeError(f"the rule of {step.name} loses {len(lost)} labels at {step.facts.operation}")
    for tensor, shape in zip(results, step.shapes, strict=True):
        if tensor.shape != tuple(shape):
            raise RuntimeError(f"the rule of {step.name} gives {tensor.shape}, the operator {tuple(shape)}")
    return results


def letters(tensor: Tensor) -> str:
    """A different lower-case letter for each axis; capitals are left for weights."""
    return string.ascii_lowercase[: len(tensor.shape)]
