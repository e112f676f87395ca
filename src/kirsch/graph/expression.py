"""An integer in the model's code, as a function of module attributes and tensor sizes.

For `x.view(n, self.heads, -1)` in a model's forward, the value of `self.heads` is an `Expression` with the leaf
(module path, "heads").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kirsch.graph.labels import Labels


@dataclass(frozen=True)
class Leaf:
    """An integer attribute of a module, or one item of a tuple attribute.

    Args:
        module: path of the module.
        attribute: name of the attribute.
        index: index in the tuple or list, None for a plain integer.
    """

    module: str
    attribute: str
    index: int | None = None

    def __str__(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.attribute}{index}".lstrip(".")


@dataclass(frozen=True)
class Size:
    """The size of a tensor axis that the code reads at run time: it changes with the kept labels.

    Args:
        labels: bytes of the axis' label array, which are hashable.
    """

    labels: bytes


@dataclass(frozen=True)
class Expression:
    """An integer computed from leaves and sizes.

    Args:
        compute: takes the values of the leaves and sizes and returns the integer.
        leaves: the attributes that the integer depends on, with their present values.
        sizes: the axes whose sizes the integer depends on, as label arrays.
        plain: whether the integer is a single leaf or size without computation.
    """

    compute: Callable[[Mapping[object, int]], int]
    leaves: tuple[tuple[Leaf, int], ...]
    sizes: tuple[Labels, ...]
    plain: bool = False
