"""The coupling analysis of one model: groups, blockers, cost."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np

from kirsch.arguments import checked
from kirsch.graph import constants, coupling, group
from kirsch.graph.cost import Cost, CostModel
from kirsch.graph.explain import explain
from kirsch.graph.rigid import rigid

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from kirsch.graph.expression import Leaf
    from kirsch.graph.facts import Facts, Freeze
    from kirsch.graph.group import Group, ParameterAxis
    from kirsch.graph.labels import Axis, Labels, Tensor


@dataclass(frozen=True)
class Blocker:
    """What keeps parameters from going.

    Args:
        reason: in words.
        where: path of the module.
        source: line of the user's code, or "".
        operation: such as "aten.softmax".
        share: fraction of the model's parameters that it keeps.
        number: whether it is a number in the model's code; `as_graph=True` traces a program without them.
    """

    reason: str
    where: str
    source: str
    operation: str
    share: float
    number: bool = False


@dataclass(frozen=True)
class InputSpec:
    """An example input that is a tensor, without its values.

    Args:
        name: keyword, or key of the dict it is in; "" for a positional one, and in a list or tuple.
        shape: with the batch axis.
        dtype: "float32", "int64", ...
        high: largest value of an integer input, so that a stand-in stays in range.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    high: int = 0


@dataclass(frozen=True)
class InputValue:
    """An example input that is not a tensor: a flag, a number, a text, or None.

    Args:
        name: keyword, or key of the dict it is in; "" for a positional one, and in a list or tuple.
        value: as it was given.
    """

    name: str
    value: bool | int | float | str | None


@dataclass(frozen=True)
class NestedInput:
    """An example input that is a list, a tuple or a dict.

    Args:
        name: keyword, or key of the dict it is in; "" for a positional one, and in a list or tuple.
        kind: "list", "tuple" or "dict".
        items: what is in it, in its order.
    """

    name: str
    kind: str
    items: tuple[Input, ...]


Input: TypeAlias = InputSpec | InputValue | NestedInput
"""An example input as a plan stores it: without the values of tensors, with all other values."""

DECISIONS = ("refuse", "example")
SOFTMAX = ("freeze", "kept")


@dataclass(frozen=True)
class Tracing:
    """What a trace was asked for.

    Args:
        outputs: names of the outputs that count; empty for the default.
        decisions: what is made of decisions by the values of the inputs, one of `DECISIONS`.
        scope: path of the part that is analyzed; "" for all.
        softmax: what is made of a softmax over units, one of `SOFTMAX`.
        as_graph: whether the pruned model is the traced program itself.
    """

    outputs: tuple[str, ...] = ()
    decisions: str = "refuse"
    scope: str = ""
    softmax: str = "freeze"
    as_graph: bool = False


class Runner(Protocol):
    """Runs the model that was traced, as it is now, on inputs in the form of the example inputs."""

    def outputs(self, inputs: Any, without: Collection[str] = ()) -> list[NDArray[Any]]:
        """Its floating outputs, with some blocks putting out what they are given."""

    def passed(self, inputs: Any, see: Callable[[str, NDArray[Any], NDArray[Any]], None]) -> None:
        """Shows for each block what it is given and what it puts out, floats of shape (..., features)."""


@dataclass(frozen=True, eq=False)
class Graph:
    """What must stay together in a model, what is free to go, and what each choice costs.

    Args:
        model_name: class of the model.
        facts: all facts gathered from its operations.
        tensors: each parameter and buffer by its path, with labels; tied ones share theirs.
        parameters: which of `tensors` are parameters, each tied one once.
        inputs: the example inputs as a plan stores them; empty where it cannot.
        values: path → the parameter's values as a float array; only called when an importance needs them.
        fits: whether a model is the very one that was traced, with the same parameters.
        blocks: paths of the residual blocks: modules whose output can be replaced by what they are given.
        runner: runs the model with and without its blocks; None for a graph that was built by hand.
        tracing: what the trace was asked for.
        traced: the framework's own record of the trace.
    """

    made_by: ClassVar[str] = "kirsch.trace(model, example_inputs)"

    model_name: str
    facts: Facts
    tensors: Mapping[str, Tensor]
    parameters: tuple[str, ...]
    inputs: tuple[Input, ...]
    values: Callable[[str], NDArray[Any]]
    fits: Callable[[Any], bool]
    blocks: tuple[str, ...] = ()
    runner: Runner | None = field(repr=False, default=None)
    tracing: Tracing = field(default_factory=Tracing)
    traced: Any = field(repr=False, default=None)

    def __repr__(self) -> str:
        """Return one line: the model, its size, its units, its inputs."""
        units = sum(found.size for found in self.groups)
        shapes = ", ".join(f"{each.dtype} {each.shape}" for each in self.inputs if isinstance(each, InputSpec))
        return (
            f"<kirsch.Graph of {self.model_name}: {self.cost.parameters:,} parameters, {units:,} units in "
            f"{len(self.groups):,} group{'s' * (len(self.groups) != 1)}{', inputs ' * bool(shapes)}{shapes}>"
        )

    @cached_property
    def _solved(self) -> tuple[coupling.Coupling, tuple[Group, ...]]:
        """The solved facts and their groups, with all tied or frozen that the integers of the code cannot follow."""
        equal = coupling.equalities(self.facts)
        ties: list[tuple[Labels, Labels]] = []
        freezes: list[Freeze] = []
        while True:
            solved = coupling.solve(self.facts, ties, freezes, equal)
            groups = group.find_groups(solved, self.axes)
            more_ties, more_freezes = rigid(self.facts.demands, self.facts.conditions, solved, groups)
            if not more_ties and not more_freezes:
                return solved, groups
            ties += more_ties
            freezes += more_freezes

    @property
    def coupling(self) -> coupling.Coupling:
        """The solved facts."""
        return self._solved[0]

    @cached_property
    def axes(self) -> dict[ParameterAxis, Labels]:
        """(parameter or buffer, axis) → labels; tied tensors once."""
        out, seen = {}, set[int]()
        for name, tensor in self.tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                out.update({(name, axis): labels for axis, labels in enumerate(tensor.axes) if labels is not None})
        return out

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of units that may go, in the order in which the model owns their layers."""
        return self._solved[1]

    @cached_property
    def prices(self) -> CostModel:
        """The price of any choice."""
        return CostModel(self.facts.terms, self.coupling.component)

    @cached_property
    def cost(self) -> Cost:
        """The cost of the whole model."""
        return self.prices.price(self.keep({}))

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over what a plan relies on: names and shapes of the tensors, groups, the unit at each place, and what
        the trace was asked for, where that is not the default.
        """
        digest = hashlib.sha256()
        if self.tracing != Tracing():
            digest.update(json.dumps(asdict(self.tracing)).encode())
        unit = np.full(len(self.coupling.frozen), -1, "<i8")  # the byte order of every machine
        first = 0
        for found in self.groups:
            digest.update(f"{found.name}{found.kind}{found.size}".encode())
            unit[found.components] = first + found.unit_of()
            first += found.size
        for name, tensor in self.tensors.items():
            digest.update(f"{name}{tensor.shape}".encode())
            for labels in tensor.axes:
                digest.update(b"" if labels is None else unit[self.coupling.component[labels]].tobytes())
        return digest.hexdigest()

    @checked
    def explain(self, layer: str) -> str:
        """In words: what goes together with the outputs and inputs of a layer, by which operations, and what stays.

        Args:
            layer: path of a module, "layer4.1.conv2", or of one parameter.

        Raises:
            UnknownNameError: the model has no parameters there.
        """
        return explain(self, layer)

    def keep(self, removed: Mapping[str, tuple[int, ...]]) -> NDArray[np.bool_]:
        """Component → whether it stays when these units (group name → indices) go."""
        keep = np.ones(len(self.coupling.frozen), bool)
        groups = {found.name: found for found in self.groups}
        for name, units in removed.items():
            keep[groups[name].of(units)] = False
        return keep

    def kept(self, labels: Axis, keep: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """Positions of an axis that stay, bool; None where the axis has no labels or nothing goes."""
        if labels is None:
            return None
        mask: NDArray[np.bool_] = keep[self.coupling.component[labels]]
        return None if mask.all() else mask

    def constants(self, keep: NDArray[np.bool_]) -> dict[Leaf, int]:
        """New values of the integers in the model's own code; see `constants.solve`."""
        component = self.coupling.component
        kept = lambda labels: int(keep[component[labels]].sum())  # noqa: E731 - read in one place
        return constants.solve(self.facts.demands, kept, self.facts.conditions)

    def turned(self, keep: NDArray[np.bool_]) -> list[str]:
        """Lines of the comparisons that choose another way in the model's code when units go."""
        component = self.coupling.component
        kept = lambda labels: int(keep[component[labels]].sum())  # noqa: E731 - as above
        found = constants.broken(self.facts.demands, self.facts.choices, kept)
        return list(dict.fromkeys(choice.operation.source for choice in found))

    def emptied(self, keep: NDArray[np.bool_]) -> ParameterAxis | None:
        """A parameter axis of which nothing, or less than an operation needs, would be left; None if all is well."""
        component = self.coupling.component
        for labels, least in self.facts.floors:
            if keep[component[labels]].sum() < least:
                gone = component[labels][~keep[component[labels]]]
                return next(site for site, own in self.axes.items() if np.isin(gone, component[own]).any())
        return next((site for site, labels in self.axes.items() if not keep[component[labels]].any()), None)

    @cached_property
    def blockers(self) -> tuple[Blocker, ...]:
        """What keeps parameters from going, the costliest first. Inputs and outputs are no blockers."""
        cost: dict[tuple[str, str, str, str], float] = {}
        numbers = set[tuple[str, str, str, str]]()
        total = 0
        for name in self.parameters:
            size = int(np.prod(self.tensors[name].shape))
            total += size
            freeze = next(iter(self.frozen_by(name)), None)
            if freeze is not None and not freeze.boundary:
                at = freeze.operation
                key = (freeze.reason, at.module, at.source, at.name)
                cost[key] = cost.get(key, 0.0) + size
                if freeze.number and not self.tracing.as_graph:
                    numbers.add(key)
        blockers = [Blocker(*key, share=size / max(total, 1), number=key in numbers) for key, size in cost.items()]
        return tuple(sorted(blockers, key=lambda blocker: -blocker.share))

    @property
    def without_numbers(self) -> str:
        """A sentence on the numbers in the model's code that keep parameters from going; "" if there are none."""
        if not any(blocker.number for blocker in self.blockers):
            return ""
        return f" Where a number in the code is what holds, {constants.AS_GRAPH}."

    @cached_property
    def _free(self) -> NDArray[np.bool_]:
        """Component → whether it is in a group."""
        free = np.zeros(len(self.coupling.frozen), bool)
        for found in self.groups:
            free[found.components] = True
        return free

    def frozen_by(self, name: str) -> list[Freeze]:
        """The facts that keep a parameter whole, each once, inputs and outputs last; empty if some of it may go."""
        component, why = self.coupling.component, self.coupling.why
        labeled = [component[labels] for labels in self.tensors[name].axes if labels is not None]
        if any(self._free[found].any() for found in labeled):
            return []
        freezes = [why[c] for found in labeled for c in np.unique(found).tolist() if c in why]
        return sorted({id(freeze): freeze for freeze in freezes}.values(), key=lambda freeze: freeze.boundary)
