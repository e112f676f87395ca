"""The coupling analysis of one model: groups, blockers, cost."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kirsch.arguments import checked
from kirsch.graph import constants, coupling, layout
from kirsch.graph.cost import Cost, CostModel, GroupCost
from kirsch.graph.explain import explain
from kirsch.graph.group import find_groups
from kirsch.graph.inputs import InputSpec, tensors
from kirsch.graph.rigid import code_constraints
from kirsch.tables import Printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.expression import Leaf
    from kirsch.graph.facts import Facts, Freeze
    from kirsch.graph.group import Group, ParameterAxis
    from kirsch.graph.inputs import Input
    from kirsch.graph.labels import Axis, Labels, Tensor
    from kirsch.tables import Part


@dataclass(frozen=True)
class Blocker:
    """A reason why parameters cannot be removed.

    Args:
        reason: the reason in words.
        where: path of the module that runs the operation.
        source: line of the user's code, such as "net.py:12", or "".
        operation: name of the operation, such as "aten.softmax".
        share: fraction of the model's parameters that cannot be removed for this reason.
        number: whether the reason is a number in the model's code. With `as_graph=True` the traced program has no such
            numbers.
    """

    reason: str
    where: str
    source: str
    operation: str
    share: float
    number: bool = False


DECISIONS = ("refuse", "example")
SOFTMAX = ("freeze", "kept")


@dataclass(frozen=True)
class Tracing:
    """Options of a trace.

    Args:
        outputs: names of the outputs to analyze; empty for the default.
        decisions: how control flow that depends on input values is treated, one of `DECISIONS`.
        module: path of the module that is analyzed; "" for the whole model.
        softmax: how a softmax over units is treated, one of `SOFTMAX`.
        as_graph: whether the pruned model is the traced program instead of the model's own code.
    """

    outputs: tuple[str, ...] = ()
    decisions: str = "refuse"
    module: str = ""
    softmax: str = "freeze"
    as_graph: bool = False


@dataclass(frozen=True, eq=False)
class Graph(Printable):
    """Dependency graph of a traced model: groups of units that can be removed, and the cost of each choice.

    Args:
        model_name: class name of the model.
        facts: facts about labels, recorded from the operations of the model; see `kirsch.graph.facts`.
        tensors: path of each parameter and buffer → its labels; tied tensors are the same object.
        parameters: names in `tensors` that are parameters; tied parameters are listed once.
        inputs: the example inputs as a plan stores them; empty if a plan cannot store them.
        values: function that takes the path of a parameter and returns its values as a float array; only called if an
            importance needs the values.
        fits: function that returns whether a model is the traced object, with the same parameters.
        blocks: paths of the residual blocks, i.e. modules that can be replaced by the identity.
        adapters: names in `tensors` that belong to adapters beside layers of the model, such as those of LoRA.
        module_outputs: function that returns, by module path, the tensors that each module returns, with labels.
        model: the traced model, for importances that run it; None for a graph built by hand.
        tracing: the options of the trace.
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
    adapters: frozenset[str] = frozenset()
    module_outputs: Callable[[], Mapping[str, Sequence[Tensor]]] = field(repr=False, default=dict)
    model: Any = field(repr=False, default=None)
    tracing: Tracing = field(default_factory=Tracing)
    traced: Any = field(repr=False, default=None)

    def __repr__(self) -> str:
        """Return one line: the model, its size, its units, its inputs."""
        units = sum(group.size for group in self.groups)
        shapes = ", ".join(f"{item.dtype} {item.shape}" for item in self.inputs if isinstance(item, InputSpec))
        return (
            f"<kirsch.Graph of {self.model_name}: {self.cost.parameters:,} parameters, {units:,} units in "
            f"{len(self.groups):,} group{'s' * (len(self.groups) != 1)}{', inputs ' * bool(shapes)}{shapes}>"
        )

    def parts(self) -> list[Part]:
        """Return the groups as a tree with their costs, the residual blocks and the blockers."""
        shapes = (spec.shape for spec in tensors(self.inputs))
        return layout.graph_parts(self.model_name, self.cost, shapes, self.group_costs(), self.blocks, self.blockers)

    def group_costs(self) -> list[GroupCost]:
        """Return the cost of each group.

        A weight belongs to the groups of both of its axes, so the sum can exceed the cost of the model.
        """
        total, costs = self.cost, []
        for group in self.groups:
            without = self.prices.price(self.keep({group.name: tuple(range(group.size))}))
            costs.append(GroupCost(group, total.parameters - without.parameters, total.macs - without.macs))
        return costs

    @cached_property
    def _solved(self) -> tuple[coupling.Coupling, tuple[Group, ...]]:
        """Find the components and the groups.

        Axes are tied or frozen until the integers in the model's code can be set for every choice of units.
        """
        equal = coupling.equalities(self.facts)
        ties: list[tuple[Labels, Labels]] = []
        freezes: list[Freeze] = []
        while True:
            solved = coupling.solve(self.facts, ties, freezes, equal)
            groups = find_groups(solved, self.axes)
            more_ties, more_freezes = code_constraints(self.facts.demands, self.facts.conditions, solved, groups)
            if not more_ties and not more_freezes:
                return solved, self._with_cost(solved, groups)
            ties += more_ties
            freezes += more_freezes

    def _with_cost(self, solved: coupling.Coupling, groups: Sequence[Group]) -> tuple[Group, ...]:
        """Return the groups on which the parameters or MACs depend.

        An example of a group without cost: a buffer of position indices is longer than the example inputs, and the
        group consists of its unused entries.
        """
        counted = np.zeros(len(solved.frozen), bool)
        for term in self.facts.terms:
            if term.quantity in ("parameters", "macs"):
                for labels in term.factors:
                    counted[solved.component[labels]] = True
        return tuple(group for group in groups if counted[group.components].any())

    @property
    def coupling(self) -> coupling.Coupling:
        """Components (sets of coupled labels), and which of them are frozen."""
        return self._solved[0]

    @cached_property
    def axes(self) -> dict[ParameterAxis, Labels]:
        """Labels of each axis of each parameter and buffer, keyed by (name, axis); tied tensors are listed once."""
        axes, seen = {}, set[int]()
        for name, tensor in self.tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                axes.update({(name, axis): labels for axis, labels in enumerate(tensor.axes) if labels is not None})
        return axes

    def axes_with(self, group: Group, mark: str) -> list[ParameterAxis]:
        """Return the parameter axes of a group that an operation uses in a role, a mark of `kirsch.graph.facts`."""
        return self.axes_among(group.footprint, mark)

    def axes_among(self, axes: Sequence[ParameterAxis], mark: str) -> list[ParameterAxis]:
        """Return those of some parameter axes that an operation uses in a role."""
        return [key for key in axes if self.has_mark(key, mark)]

    def has_mark(self, key: ParameterAxis, mark: str) -> bool:
        """Return whether an operation uses a parameter axis in a role, a mark of `kirsch.graph.facts`."""
        labels, marked = self.axes.get(key), self._marked.get(mark)
        return labels is not None and marked is not None and bool(marked[labels].any())

    @cached_property
    def _marked(self) -> dict[str, NDArray[np.bool_]]:
        """Which labels have each mark, bool of shape (labels,)."""
        found = {mark: np.zeros(self.facts.count, bool) for mark in self.facts.marks}
        for mark, marked in found.items():
            for labels in self.facts.marks[mark]:
                marked[labels] = True
            marked[0] = False  # the label 0 is frozen
        return found

    def input_axes(self, group: Group) -> list[ParameterAxis]:
        """Return the axes of weights over which a layer sums products of weights and units of a group."""
        return self.axes_with(group, "contracted")

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of units that can be removed, in the order of the model's layers."""
        return self._solved[1]

    @cached_property
    def prices(self) -> CostModel:
        """Cost model of the graph; it counts the cost of any choice of units."""
        return CostModel(self.facts.terms, self.coupling.component)

    @cached_property
    def cost(self) -> Cost:
        """Cost of the unpruned model."""
        return self.prices.price(self.keep({}))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the structure that a plan must fit, in hexadecimal.

        The hash covers the names and shapes of the tensors, the groups, the unit at each index of each axis, and the
        options of the trace if one of them differs from its default. It does not cover the values of the tensors.
        """
        digest = hashlib.sha256()
        if self.tracing != Tracing():
            digest.update(json.dumps(asdict(self.tracing)).encode())
        unit = np.full(len(self.coupling.frozen), -1, "<i8")  # little-endian on each machine
        first = 0
        for group in self.groups:
            digest.update(f"{group.name}{group.kind}{group.size}".encode())
            unit[group.components] = first + group.unit_of()
            first += group.size
        for name, tensor in self.tensors.items():
            digest.update(f"{name}{tensor.shape}".encode())
            for labels in tensor.axes:
                digest.update(b"" if labels is None else unit[self.coupling.component[labels]].tobytes())
        return digest.hexdigest()

    @checked
    def explain(self, layer: str) -> str:
        """Describe which parameters are pruned together with a layer, through which operations, and what stays.

        Args:
            layer: path of a module, such as "layer4.1.conv2", or of one parameter.

        Returns:
            Text of several lines.

        Raises:
            UnknownNameError: the model has no such module or parameter.
        """
        return explain(self, layer)

    def keep(self, removed: Mapping[str, tuple[int, ...]]) -> NDArray[np.bool_]:
        """Return the mask of the components (sets of coupled labels) that stay, bool of shape (components,).

        Args:
            removed: group name → indices of the units to remove.
        """
        keep = np.ones(len(self.coupling.frozen), bool)
        groups = {group.name: group for group in self.groups}
        for name, units in removed.items():
            keep[groups[name].components_of(units)] = False
        return keep

    def kept(self, labels: Axis, keep: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """Return the mask of indices of an axis that stay; None if the axis has no labels or loses no index."""
        if labels is None:
            return None
        mask: NDArray[np.bool_] = keep[self.coupling.component[labels]]
        return None if mask.all() else mask

    def constants(self, keep: NDArray[np.bool_]) -> dict[Leaf, int]:
        """Return the new values of the integers in the model's code; see `constants.solve`."""
        component = self.coupling.component

        def kept_count(labels: Labels) -> int:
            return int(keep[component[labels]].sum())

        return constants.solve(self.facts.demands, kept_count, self.facts.conditions)

    def turned(self, keep: NDArray[np.bool_]) -> list[str]:
        """Return the lines of code whose comparisons choose another branch if units are removed."""
        component = self.coupling.component
        kept = lambda labels: int(keep[component[labels]].sum())  # noqa: E731 - as above
        found = constants.broken(self.facts.demands, self.facts.choices, kept)
        return list(dict.fromkeys(choice.operation.source for choice in found))

    def too_small(self, keep: NDArray[np.bool_]) -> tuple[ParameterAxis, int] | None:
        """Return a parameter axis that would lose too many indices, and how many it needs; None if there is none.

        An axis needs one index, or more if an operation needs them, such as a selection of the k largest values.
        """
        component = self.coupling.component
        for floor_labels, least in self.facts.floors:
            components = component[floor_labels]
            if keep[components].sum() < least:
                removed = components[~keep[components]]
                axis = next(key for key, labels in self.axes.items() if np.isin(removed, component[labels]).any())
                return axis, least
        return next(((key, 1) for key, labels in self.axes.items() if not keep[component[labels]].any()), None)

    @cached_property
    def blockers(self) -> tuple[Blocker, ...]:
        """Reasons why parameters cannot be removed, the largest share first.

        Parameters that are frozen only at inputs or outputs of the model are not counted.
        """
        sizes: dict[tuple[str, str, str, str], float] = {}
        numbers = set[tuple[str, str, str, str]]()
        total = 0
        for name in self.parameters:
            size = int(np.prod(self.tensors[name].shape))
            total += size
            freeze = next(iter(self.frozen_by(name)), None)
            if freeze is not None and not freeze.boundary:
                operation = freeze.operation
                key = (freeze.reason, operation.module, operation.source, operation.name)
                sizes[key] = sizes.get(key, 0.0) + size
                if freeze.number and not self.tracing.as_graph:
                    numbers.add(key)
        blockers = [Blocker(*key, share=size / max(total, 1), number=key in numbers) for key, size in sizes.items()]
        return tuple(sorted(blockers, key=lambda blocker: -blocker.share))

    @property
    def without_numbers(self) -> str:
        """Hint for messages if numbers in the model's code keep parameters from being removed; "" otherwise."""
        if not any(blocker.number for blocker in self.blockers):
            return ""
        return f" Where the reason is a number in the code, {constants.AS_GRAPH}."

    @cached_property
    def _free(self) -> NDArray[np.bool_]:
        """Mask of components that belong to a group."""
        free = np.zeros(len(self.coupling.frozen), bool)
        for group in self.groups:
            free[group.components] = True
        return free

    def frozen_by(self, name: str) -> list[Freeze]:
        """Return the reasons why no part of a parameter can be removed; empty if a part can be removed.

        Reasons at the inputs and outputs of the model come last.
        """
        component, why = self.coupling.component, self.coupling.why
        axes = [component[labels] for labels in self.tensors[name].axes if labels is not None]
        if any(self._free[components].any() for components in axes):
            return []
        freezes = [why[c] for components in axes for c in np.unique(components).tolist() if c in why]
        return sorted({id(freeze): freeze for freeze in freezes}.values(), key=lambda freeze: freeze.boundary)
