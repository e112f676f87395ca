"""Sizes of the results of operators, as the code of a model states them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.frameworks.pytorch.analysis.integers import TracedInt
from kirsch.frameworks.pytorch.analysis.operation import INFERRED
from kirsch.frameworks.pytorch.analysis.provenance import LIKE_ANOTHER

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import OperationContext

SELF_SIZED = frozenset(["flatten", "ravel", "normalize", "squeeze", "unsqueeze", "instance_norm"])
"""Calls whose result sizes PyTorch computes from the tensor."""

SIZED = LIKE_ANOTHER.union(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "repeat",
        "tile",
        "broadcast_to",
        "zeros",
        "ones",
        "empty",
        "full",
        "rand",
        "randn",
    ]
)


def stated_sizes(op: OperationContext) -> list[Any]:
    """Return the size of each axis of the result as the code states it, `INFERRED`, or None if it is unknown."""
    rank = len(op.shape)
    name = op.call.name if op.call is not None else ""
    if name in SELF_SIZED or (name == "__getitem__" and op.name == "view") or name == "__setitem__":
        return [INFERRED] * rank
    if name == "unflatten":
        dim, new = op.traced_arg(1, "dim"), op.traced_arg(2, "sizes")
        if isinstance(dim, int) and isinstance(new, tuple):
            start = dim % (rank - len(new) + 1)
            return [INFERRED] * start + list(new) + [INFERRED] * (rank - start - len(new))
    if name in SIZED or name.startswith("new_"):
        # The call has None in place of the tensor; creation calls have no tensor.
        rest = [argument for argument in op.call.arguments if argument is not None] if op.call else []
        rest += [op.call.options[key] for key in ("shape", "size") if op.call and key in op.call.options]
        as_one = bool(rest) and isinstance(rest[0], (tuple, list))
        stated = _flat(rest[0]) if as_one else [x for x in rest if type(x) is not float]
        if len(stated) == rank:
            return stated
    return [None] * rank


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, (tuple, list)) else [value]


def stated_bound(op: OperationContext, start: int, end: int, bound: int) -> Any:
    """Return a bound of a slice as the code states it.

    The result is an integer of the call that has this value, with its origin. If the origin is unknown or ambiguous,
    the result is `bound` itself. A call of `narrow` states start and length, so the end is their sum.

    Args:
        op: the slice.
        start, end: bounds of the slice.
        bound: the bound to return, `start` or `end`.
    """
    if op.call is not None and op.call.name == "slice":  # a node of a model that is cut as a graph
        return op.traced_arg(2, "start") if bound == start and bound != end else op.traced_arg(3, "end")
    integers = op.call.integers() if op.call is not None else []
    if op.call is not None and op.call.name == "narrow":
        first, length = op.traced_arg(2, "start"), op.traced_arg(3, "length")
        if not isinstance(first, int) or not isinstance(length, int):
            return bound
        op.tied.update((id(first), id(length)))
        integers = [first if bound == start and bound != end else first + length]
    matching = [x for x in integers if x == bound]
    traced = [x for x in matching if isinstance(x, TracedInt)]
    return traced[0] if traced and len(traced) == len(matching) and len({x.leaves for x in traced}) == 1 else bound
