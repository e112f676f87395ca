"""Cost of a plan, counted without building the pruned model.

A cost is a sum of terms. Each term is a constant times the numbers of kept labels on its axes, such as the kept inputs
times the kept outputs of a linear layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.facts import CostTerm
    from kirsch.graph.group import Group
    from kirsch.graph.labels import Labels


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass on the example inputs.

    Args:
        parameters: number of parameters.
        macs: multiply-accumulates of convolutions, linear layers and matrix products.
        activations: number of elements of the outputs of all operations; of an operation with several outputs, only the
            first is counted.
        size: bytes of the parameters and buffers, as in a file of the weights.
        memory: peak memory of the activations: the largest number of bytes of inputs and results of operations that
            exist at the same time, if each is freed after the operation that reads it last, and none is overwritten.
    """

    parameters: int
    macs: int
    activations: int
    size: int = 0
    memory: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the cost as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class GroupCost:
    """Cost of all units of a group.

    Args:
        group: the group.
        parameters, macs: cost that the model would lose without the units of the group.
    """

    group: Group
    parameters: int
    macs: int

    @property
    def tied_layers(self) -> tuple[str, ...]:
        """Layers of the group, except the layer that gives the group its name.

        A parameter of the top-level module has no layer and is listed by its own name.
        """
        layers = dict.fromkeys(name.rpartition(".")[0] or name for name, _ in self.group.footprint)
        first = self.group.name.partition("#")[0]
        return tuple(layer for layer in layers if layer != first)

    def to_dict(self) -> dict[str, Any]:
        """Return the group and its cost as JSON values."""
        group = self.group
        return {
            "name": group.name,
            "kind": group.kind,
            "units": group.size,
            "parameters": self.parameters,
            "macs": self.macs,
            "layers": list(group.layers),
            "footprint": [[name, axis] for name, axis in group.footprint],
        }


@dataclass(frozen=True)
class CostPolynomial:
    """A cost as the sum of coefficients times products of numbers of kept components.

    Args:
        coefficient: coefficient of each term, shape (terms,).
        factor: factors of each term, shape (terms, most factors): 0 for the factor 1, and n for the number of kept
            components of array n - 1.
        components: the components of all arrays, one array after the other.
        array: index of the array to which each entry of `components` belongs.
    """

    coefficient: NDArray[np.float64]
    factor: NDArray[np.int64]
    components: NDArray[np.int64]
    array: NDArray[np.int64]


class CostModel:
    """The cost terms of a model, from which the cost of the model is counted for any set of kept components.

    A component is a set of coupled labels; see `kirsch.graph.coupling`.

    Args:
        terms: the recorded costs.
        component: component of each label, int64 of shape (labels,).
    """

    def __init__(self, terms: Sequence[CostTerm], component: NDArray[np.int64]) -> None:
        index: dict[bytes, int] = {}
        arrays: list[NDArray[np.int64]] = []
        width = max((len(term.factors) for term in terms), default=0) + 1
        self._factor = np.zeros((len(terms), width), np.int64)
        for row, term in enumerate(terms):
            for column, labels in enumerate(term.factors, start=1):
                self._factor[row, column] = 1 + _array_index(labels, index, arrays, component)
        self._coefficient = np.array([term.coefficient for term in terms], float)
        self._quantity = np.array([term.quantity for term in terms])
        self._owner = [term.owner for term in terms]
        self._stored = self._quantity == "memory"
        lives = np.array([term.life for term in terms], np.int64).reshape(-1, 2)[self._stored]
        self._first, self._after_last = lives[:, 0], lives[:, 1] + 1
        self._flat = np.concatenate([*arrays, np.zeros(0, np.int64)])
        self._start = np.cumsum([0, *(len(array) for array in arrays[:-1])]) if arrays else np.zeros(0, np.int64)

    def price(self, keep: NDArray[np.bool_], without: Collection[str] = ()) -> Cost:
        """Return the cost of the pruned model.

        Args:
            keep: mask of the components that stay, bool of shape (components,).
            without: paths of the modules that are removed, and that return their inputs.
        """
        costs, memory = self._costs_and_memory(keep, without)
        parameters, macs, activations, size = (
            round(float(costs[self._quantity == quantity].sum()))
            for quantity in ("parameters", "macs", "activations", "size")
        )
        return Cost(parameters, macs, activations, size, round(float(memory.max(initial=0))))

    def memory_profile(self, keep: NDArray[np.bool_], without: Collection[str] = ()) -> NDArray[np.float64]:
        """Return the bytes of the activations that exist during each operation of the pruned model; see `price`.

        The number of operations is that of the original, and the largest value is the peak memory.
        """
        return self._costs_and_memory(keep, without)[1]

    def _costs_and_memory(
        self, keep: NDArray[np.bool_], without: Collection[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the costs of all terms, and the bytes during each operation; see `price`."""
        costs, first = self._term_costs(keep), self._first
        if without:
            removed = np.array([f"{owner}.".startswith(tuple(f"{path}." for path in without)) for owner in self._owner])
            passed = [self._output_of(path) for path in without]
            first = first.copy()
            for index in (index for index in passed if index is not None):
                removed[np.flatnonzero(self._stored)[index]] = False
                first[index] += 1  # until then, the input of the module is counted by itself
            costs[removed] = 0
        return costs, self._memory(costs, first)

    def polynomial(self, quantity: str) -> CostPolynomial:
        """Return a cost as a polynomial in the numbers of kept components; terms with the same factors are added.

        Args:
            quantity: "parameters", "macs", "activations" or "size". The peak memory is not a polynomial.
        """
        counted = self._quantity == quantity
        factor, term = np.unique(self._factor[counted], axis=0, return_inverse=True)
        ends = np.append(self._start[1:], len(self._flat)) if len(self._start) else self._start
        return CostPolynomial(
            np.asarray(np.bincount(term.reshape(-1), self._coefficient[counted], len(factor)), np.float64),
            factor,
            self._flat,
            np.repeat(np.arange(len(self._start)), ends - self._start),
        )

    def _output_of(self, path: str) -> int | None:
        """Return the index among the tensors in memory of the output of a module: the one that is read last."""
        owners = np.array(self._owner)[self._stored]
        inside = [index for index, owner in enumerate(owners) if f"{owner}.".startswith(f"{path}.")]
        return max(inside, key=lambda index: int(self._after_last[index]), default=None)

    def _memory(self, costs: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the bytes of the tensors that exist during each operation.

        Args:
            costs: costs of all terms.
            first: position of the operation that writes each tensor.
        """
        change = np.zeros(self._after_last.max(initial=0) + 1)
        np.add.at(change, first, costs[self._stored])
        np.add.at(change, self._after_last, -costs[self._stored])
        return np.cumsum(change)

    def shares(self, keep: NDArray[np.bool_], quantity: str) -> dict[str, int]:
        """Return a cost of each module in the pruned model; of "memory" the bytes at the operation that needs most.

        Args:
            keep: mask of the components that stay, bool of shape (components,).
            quantity: name of a cost in `WORDS`.
        """
        costs = self._term_costs(keep)
        counted = self._quantity == quantity
        if quantity == "memory" and counted.any():
            peak = int(self._memory(costs, self._first).argmax())
            counted[np.flatnonzero(counted)] = (self._first <= peak) & (peak < self._after_last)
        shares: dict[str, int] = {}
        for index in np.flatnonzero(counted).tolist():
            shares[self._owner[index]] = shares.get(self._owner[index], 0) + round(float(costs[index]))
        return shares

    def by_owner(self, keep: NDArray[np.bool_]) -> dict[str, tuple[int, int]]:
        """Return the parameters and MACs of each module in the pruned model.

        Args:
            keep: mask of the components that stay, bool of shape (components,).

        Returns:
            Module path → (parameters, MACs).
        """
        owners: dict[str, tuple[int, int]] = {}
        for owner, quantity, value in zip(self._owner, self._quantity, self._term_costs(keep).tolist(), strict=True):
            if quantity not in ("parameters", "macs", "activations"):
                continue
            parameters, macs = owners.get(owner, (0, 0))
            owners[owner] = (
                parameters + (round(value) if quantity == "parameters" else 0),
                macs + (round(value) if quantity == "macs" else 0),
            )
        return owners

    def _term_costs(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        kept = np.ones(1 + len(self._start))
        if len(self._start):
            kept[1:] = np.add.reduceat(keep[self._flat].astype(float), self._start)
        product: NDArray[np.float64] = self._coefficient * kept[self._factor].prod(axis=1)
        return product


def _array_index(
    labels: Labels, index: dict[bytes, int], arrays: list[NDArray[np.int64]], component: NDArray[np.int64]
) -> int:
    """Return the index in `arrays` of the components of some labels. New components are appended to `arrays`."""
    components = component[labels]
    key = components.tobytes()
    if key not in index:
        index[key] = len(arrays)
        arrays.append(components)
    return index[key]
