"""What an operator does to labels, by its name.

A rule takes a `Step` and gives the `Tensor`s of its results, in terms of the relations of `kirsch.graph.relations`. An
operator without a rule freezes whatever it touches.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import Step

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
    """The results of one operation.

    A rule that fails, or loses a label, is an error of this library. The user's network is none the worse for it than
    for an operator without a rule: all that the operator touches is frozen, and a warning asks for a report.
    """
    known = RULES.get(step.name)
    if known is None:
        return step.freeze_all(f"there is no rule for {step.facts.operation.name}")
    terms = len(step.facts.terms)
    try:
        found = known(step)
        results = found if isinstance(found, list) else [found, *(Tensor.of(shape) for shape in step.shapes[1:])]
        results = _pointing(step, results)
        wrong = _wrong(step, results)
    except Exception as error:  # noqa: BLE001 - whatever a rule raises, see above
        wrong = f"fails: {type(error).__name__}: {error}"
    if not wrong:
        return results
    del step.facts.terms[terms:]  # `freeze_all` counts anew
    at = step.facts.operation
    warnings.warn(
        f"The rule of {step.name} {wrong} (at {at.source or at.module or at.name}). "
        "What the operation touches is frozen; please report the model.",
        RuntimeWarning,
        stacklevel=2,
    )
    return step.freeze_all(f"the rule for {at.name} does not fit here")


POINTS = frozenset(["index", "embedding", "gather", "histc"])
"""Operators whose rules know what to do with positions on an axis."""

_CARRIES = """
view _unsafe_view reshape flatten unsqueeze squeeze transpose permute t contiguous clone detach alias _to_copy to expand
slice select sort index embedding gather repeat_interleave
"""
CARRIES = frozenset(_CARRIES.split())
"""Operators whose first result holds numbers of their first operand as they are."""


def _pointing(step: Step, results: list[Tensor]) -> list[Tensor]:
    """The results with what they point to. Positions on an axis that are computed with otherwise keep it from going,
    and so do any that choose, unless the choice may fall on others.
    """
    pointing = [tensor for tensor in step.tensors() if tensor.points is not None]
    if not pointing:
        return results
    first = step.args[0] if step.args and isinstance(step.args[0], Tensor) else None
    carried = first if step.name in CARRIES else None
    follows = step.name in POINTS and step.softmax == "kept"
    for tensor in pointing:
        if tensor is not carried and not follows:
            step.facts.freeze(tensor.points, "positions on it are computed with")
    if carried is not None and carried.points is not None:
        results = [replace(results[0], points=carried.points), *results[1:]]
    return results


def _wrong(step: Step, results: list[Tensor]) -> str:
    """What is wrong with the results of a rule; "" if nothing is."""
    lost = step.facts.lost(step.tensors(), results)
    if len(lost):
        return f"loses {len(lost)} labels"
    shapes = [tensor.shape for tensor in results]
    if shapes != step.shapes:
        return f"gives shapes {shapes} where the operator gives {step.shapes}"
    return ""


def letters(tensor: Tensor) -> str:
    """A different lower-case letter for each axis; capitals are left for weights."""
    return string.ascii_lowercase[: len(tensor.shape)]
