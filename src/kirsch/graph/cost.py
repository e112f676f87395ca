"""What a plan costs, without building the model: sums of products of kept counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.facts import Term
    from kirsch.graph.labels import Labels


@dataclass(frozen=True)
class Cost:
    """The cost of one forward run on the example inputs.

    Args:
        parameters: numbers that are trained.
        macs: multiply-accumulates of convolutions, linear layers and matrix products.
        activations: numbers that all operations together put out.
    """

    parameters: int
    macs: int
    activations: int

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)


class CostModel:
    """All terms of a network, ready to be priced under any choice of components.

    Args:
        terms: the recorded costs.
        component: label → component.
    """

    def __init__(self, terms: Sequence[Term], component: NDArray[np.int64]) -> None:
        index: dict[bytes, int] = {}
        arrays: list[NDArray[np.int64]] = []
        width = max((len(term.factors) for term in terms), default=0) + 1
        self._factor = np.zeros((len(terms), width), np.int64)
        for row, term in enumerate(terms):
            for column, labels in enumerate(term.factors, start=1):
                self._factor[row, column] = 1 + _position(labels, index, arrays, component)
        self._coefficient = np.array([term.coefficient for term in terms], float)
        self._of = np.array([term.of for term in terms])
        self._owner = [term.owner for term in terms]
        self._flat = np.concatenate([*arrays, np.zeros(0, np.int64)])
        self._start = np.cumsum([0, *(len(array) for array in arrays[:-1])]) if arrays else np.zeros(0, np.int64)

    def price(self, keep: NDArray[np.bool_], without: Collection[str] = ()) -> Cost:
        """The cost when only the components marked in `keep` (bool, shape (components,)) stay.

        `without`: paths of modules that are left out as a whole.
        """
        each = self._each(keep)
        if without:
            inside = tuple(f"{path}." for path in without)
            each[[f"{owner}.".startswith(inside) for owner in self._owner]] = 0
        return Cost(*(round(float(each[self._of == of].sum())) for of in ("parameters", "macs", "activations")))

    def by_owner(self, keep: NDArray[np.bool_]) -> dict[str, tuple[int, int]]:
        """Module path → (parameters, MACs) that stay."""
        out: dict[str, tuple[int, int]] = {}
        for owner, of, value in zip(self._owner, self._of, self._each(keep).tolist(), strict=True):
            parameters, macs = out.get(owner, (0, 0))
            out[owner] = (
                parameters + (round(value) if of == "parameters" else 0),
                macs + (round(value) if of == "macs" else 0),
            )
        return out

    def _each(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        kept = np.ones(1 + len(self._start))
        if len(self._start):
            kept[1:] = np.add.reduceat(keep[self._flat].astype(float), self._start)
        product: NDArray[np.float64] = self._coefficient * kept[self._factor].prod(axis=1)
        return product


def _position(
    labels: Labels, index: dict[bytes, int], arrays: list[NDArray[np.int64]], component: NDArray[np.int64]
) -> int:
    found = component[labels]
    key = found.tobytes()
    if key not in index:
        index[key] = len(arrays)
        arrays.append(found)
    return index[key]
