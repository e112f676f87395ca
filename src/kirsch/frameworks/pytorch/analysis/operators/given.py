"""Sizes as the code of a model gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.frameworks.pytorch.analysis.integers import TracedInt
from kirsch.frameworks.pytorch.analysis.operation import FOLLOWS
from kirsch.frameworks.pytorch.analysis.provenance import LIKE_ANOTHER

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import Step

# Calls of user code whose sizes PyTorch computes from the tensor itself.
SELF_SIZED = frozenset(["flatten", "ravel", "normalize", "squeeze", "unsqueeze", "instance_norm"])

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


def sizes(step: Step) -> list[Any]:
    """For each axis of the result the size as the code gives it, `FOLLOWS`, or None where that is unknown."""
    rank = len(step.shape)
    name = step.call.name if step.call is not None else ""
    if name in SELF_SIZED or (name == "__getitem__" and step.name == "view") or name == "__setitem__":
        return [FOLLOWS] * rank
    if name == "unflatten":
        dim, new = step.given(1, "dim"), step.given(2, "sizes")
        if isinstance(dim, int) and isinstance(new, tuple):
            start = dim % (rank - len(new) + 1)
            return [FOLLOWS] * start + list(new) + [FOLLOWS] * (rank - start - len(new))
    if name in SIZED or name.startswith("new_"):
        # Creation calls have no tensor before their sizes; `_without_tensors` has put None in a tensor's place.
        rest = [argument for argument in step.call.arguments if argument is not None] if step.call else []
        rest += [step.call.options[key] for key in ("shape", "size") if step.call and key in step.call.options]
        as_one = bool(rest) and isinstance(rest[0], (tuple, list))
        stated = _flat(rest[0]) if as_one else [x for x in rest if type(x) is not float]
        if len(stated) == rank:
            return stated
    return [None] * rank


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, (tuple, list)) else [value]


def border(step: Step, start: int, end: int, at: int) -> Any:
    """The border `at` of a slice from `start` to `end` as the code gives it.

    That is the one integer of the call with this value, if it has a past; a call of `narrow` gives start and length.
    """
    if step.call is not None and step.call.name == "slice":  # the operation itself
        return step.given(2, "start") if at == start and at != end else step.given(3, "end")
    integers = step.call.integers() if step.call is not None else []
    if step.call is not None and step.call.name == "narrow":
        first, length = step.given(2, "start"), step.given(3, "length")
        if not isinstance(first, int) or not isinstance(length, int):
            return at
        step.settled.update((id(first), id(length)))
        integers = [first if at == start and at != end else first + length]
    matching = [x for x in integers if x == at]
    traced = [x for x in matching if isinstance(x, TracedInt)]
    return traced[0] if traced and len(traced) == len(matching) and len({x.leaves for x in traced}) == 1 else at
