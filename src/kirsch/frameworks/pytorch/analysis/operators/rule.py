"""The registry of operator rules.

A rule takes the `OperationContext` of an operation and returns the `Tensor`s of its results. It describes the
operation by the relations of `kirsch.graph.relations`. An operator without a rule freezes all axes of its arguments.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kirsch.graph.labels import Tensor
from kirsch.user_warnings import warn

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import OperationContext

_NONLINEAR = """
prelu glu softmax _softmax log_softmax _log_softmax max min amax amin aminmax norm linalg_norm linalg_vector_norm var
std var_mean std_mean prod any all logsumexp median nanmedian mode count_nonzero cumprod cummax cummin logcumsumexp
sort topk kthvalue max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d
"""
NONLINEAR = frozenset(_NONLINEAR.split())
"""Nonlinear operators whose outputs `apply` marks as "activated".

The rules of elementwise operators and of normalizations mark their outputs themselves.
"""

Rule = Callable[["OperationContext"], Tensor | list[Tensor]]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Return a decorator that registers a function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def apply(op: OperationContext) -> list[Tensor]:
    """Return the results of one operation.

    A rule that raises an exception, loses a label (see `Facts.lost`) or returns other shapes than the operator is a bug
    of Kirsch. The operation is then treated like an operation without a rule, and a warning asks the user to report the
    model.
    """
    known = RULES.get(op.name)
    if known is None:
        return op.freeze_all(f"there is no rule for {op.facts.operation.name}")
    terms = len(op.facts.terms)
    try:
        returned = known(op)
        results = returned if isinstance(returned, list) else [returned, *(Tensor.of(s) for s in op.shapes[1:])]
        results = _with_points(op, results)
        fault = _fault(op, results)
    except Exception as error:  # noqa: BLE001 - whatever a rule raises, see above
        fault = f"fails: {type(error).__name__}: {error}"
    if not fault:
        if op.name in NONLINEAR and not all(op.is_weight(tensor) for tensor in op.tensors()):
            for result in results:
                op.mark_activated(result)
        return results
    del op.facts.terms[terms:]  # `freeze_all` adds the costs again
    at = op.facts.operation
    warn(
        f"The rule of {op.name} {fault} (at {at.source or at.module or at.name}). "
        "All axes of the operation are frozen, so fewer units can be removed. Please report the model.",
        RuntimeWarning,
    )
    return op.freeze_all(f"the rule for {at.name} failed")


HANDLES_POINTS = frozenset(["index", "embedding", "gather", "histc"])
"""Operators whose rules handle tensors of indices into a labeled axis."""

_CARRIES = """
view _unsafe_view reshape flatten unsqueeze squeeze transpose permute t contiguous clone detach alias _to_copy to expand
slice select sort index embedding gather repeat_interleave
"""
CARRIES = frozenset(_CARRIES.split())
"""Operators whose first result holds values of their first operand unchanged."""


def _with_points(op: OperationContext, results: list[Tensor]) -> list[Tensor]:
    """Return the results, with `points` if they hold indices into a labeled axis.

    The axis is frozen if the operation computes with the indices. It is also frozen if the operation selects entries by
    the indices, unless `softmax="kept"` permits that the pruned model selects other entries.
    """
    pointing = [tensor for tensor in op.tensors() if tensor.points is not None]
    if not pointing:
        return results
    first = op.args[0] if op.args and isinstance(op.args[0], Tensor) else None
    carried = first if op.name in CARRIES else None
    follows = op.name in HANDLES_POINTS and op.softmax == "kept"
    for tensor in pointing:
        if tensor is not carried and not follows:
            op.facts.freeze(tensor.points, "the code computes with indices into the axis")
    if carried is not None and carried.points is not None:
        results = [replace(results[0], points=carried.points), *results[1:]]
    return results


def _fault(op: OperationContext, results: list[Tensor]) -> str:
    """Return a description of the fault in the results of a rule; "" if there is none."""
    lost = op.facts.lost(op.tensors(), results)
    if len(lost):
        return f"loses {len(lost)} labels"
    shapes = [tensor.shape for tensor in results]
    if shapes != op.shapes:
        return f"returns shapes {shapes} where the operator returns {op.shapes}"
    return ""


def letters(tensor: Tensor) -> str:
    """Return a different lower-case letter for each axis; capital letters are left for weights."""
    return string.ascii_lowercase[: len(tensor.shape)]
