"""An integer in the code of a model, over the attributes and sizes that it comes from.

A user's forward says `x.view(n, self.heads, -1)`. The 8 of `self.heads` reaches the analysis as an `Expression` over
the *leaf* (module path, "heads").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kirsch.graph.labels import Labels


@dataclass(frozen=True)
class Leaf:
    """An integer attribute of a module, or one place of a tuple attribute.

    Args:
        module: path of the module.
        attribute: name of the attribute.
        index: place in the tuple or list, None for a plain integer.
    """

    module: str
    attribute: str
    index: int | None = None

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.attribute}{place}".lstrip(".")


@dataclass(frozen=True)
class Size:
    """The size of an axis of a tensor that the code reads at run time: it follows by itself."""

    labels: bytes  # the label array's bytes: hashable, and the same for the same labels


@dataclass(frozen=True)
class Expression:
    """An integer computed from leaves and sizes.

    Args:
        compute: values of the leaves and sizes → the integer.
        leaves: the attributes it depends on, with today's values.
        sizes: the axis sizes it depends on, as label arrays.
        plain: whether it is one leaf or size itself, without computation.
    """

    compute: Callable[[Mapping[object, int]], int]
    leaves: tuple[tuple[Leaf, int], ...]
    sizes: tuple[Labels, ...]
    plain: bool = False
