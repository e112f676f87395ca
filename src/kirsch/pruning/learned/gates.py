"""Gates on the units of a model, whose expected cost meets a goal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures, ops
from kirsch.annotations import Count, Names, Positive
from kirsch.arguments import checked
from kirsch.data.annotations import Model
from kirsch.errors import GoalError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.graph.cost_names import WORDS
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Goal, Plan
from kirsch.pruning.choose import plan
from kirsch.pruning.importance.gates import gating_entries
from kirsch.pruning.learned import hard_concrete
from kirsch.pruning.learned.expected_cost import ExpectedCost
from kirsch.pruning.learned.unit_slots import products, unit_slots
from kirsch.pruning.options import Kinds, MinKeep, PlanOptions, RoundTo
from kirsch.pruning.selection import removable_groups
from kirsch.pruning.traced_parameters import PlacedArrays
from kirsch.tables import Part, Piece, Printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.frameworks.training import Trained
    from kirsch.graph.group import Group

RAMP = 0.6
"""Fraction of the steps in which the budget is lowered from the original cost to the goal."""

START = 0.05
"""Fraction of the way to the goal at the first step. If all gates were open, none would have a gradient."""

UNDECIDED = (0.1, 0.9)
"""Probabilities of an open gate between which a unit counts as undecided."""

MANY = 0.1
"""Fraction of undecided units above which the plan has a note."""


class UnitGates:
    """Hard-concrete gates of the units of some groups; a `kirsch.frameworks.gates.Gating`.

    Args:
        graph: graph of the model.
        goal: goal for the expected cost.
        groups: groups whose units have gates.
        steps: number of forward passes in training mode of the whole training.
        train_weights: whether the weights are trained together with the gates.
        speed: see `with_gates`.
    """

    def __init__(
        self,
        graph: Graph,
        goal: Goal,
        groups: Sequence[Group],
        *,
        steps: int = 1,
        train_weights: bool = False,
        speed: float = 1.0,
    ) -> None:
        self.steps, self.train_weights, self.speed = steps, train_weights, speed
        self.size = sum(group.size for group in groups)
        self._limits = goal.to_dict()
        self._costs = {quantity: ExpectedCost(graph, groups, quantity) for quantity in self._limits}
        self._axes: dict[str, tuple[str, int, int]] = {}
        self._placed = PlacedArrays(
            **{f"{quantity} {name}": a for quantity, cost in self._costs.items() for name, a in cost.arrays.items()},
            **self._slots_by_axis(graph, groups),
        )

    def _slots_by_axis(self, graph: Graph, groups: Sequence[Group]) -> dict[str, NDArray[np.int64]]:
        """Return the gates of the indices of each parameter axis that is multiplied by gates."""
        first = np.cumsum([0, *(group.size for group in groups[:-1])]).tolist()
        gating: dict[tuple[str, int], list[tuple[Group, int]]] = {}
        for group, start in zip(groups, first, strict=True):
            for entry in gating_entries(graph, group):
                gating.setdefault((entry.name, entry.axis), []).append((group, start))
        prefix = f"{graph.tracing.module}." if graph.tracing.module else ""
        slots = {}
        for (name, axis), found in gating.items():
            label = f"gate {prefix}{name} {axis}"
            self._axes[label] = f"{prefix}{name}", axis, len(graph.tensors[name].shape)
            slots[label] = unit_slots(graph, found, self.size)[:, graph.coupling.component[graph.axes[name, axis]]]
        return slots

    def _arrays(self, beside: Any, model: Any) -> Mapping[str, Any]:
        return self._placed.arrays if isinstance(beside, np.ndarray) else self._placed.beside(beside, model)

    def location(self, values: Any, model: Any, step: Any = None) -> Any:
        """Return log α of the gates, shifted so that the expected cost equals the budget of the step.

        With several limits, the shift is the smallest, so that each limit is met. The gradient of a value is that of
        its log α, without the factor `speed`: AdamW ignores the scale, and gradients are clipped together with those of
        the weights.
        """
        fixed = ops.stop_gradient(values)
        location, arrays = self.speed * fixed + (values - fixed), self._arrays(values, model)
        halvings = {"halvings": 60} if ops.dtype(values) == "float64" else {}
        shifts = []
        for quantity, limit in self._limits.items():
            own = {name: arrays[f"{quantity} {name}"] for name in self._costs[quantity].arrays}
            target = 1 - (1 - limit) * self._progress(step)
            shifts.append(self._costs[quantity].shift(location, target, own, **halvings))
        shift = shifts[0]
        for other in shifts[1:]:
            shift = ops.minimum(shift, other)
        return location + shift

    def _progress(self, step: Any) -> Any:
        """Return how far the budget is lowered at a step, 0 to 1; None: after the last step.

        Source of the cubic schedule: Zhu, Gupta 2017, arXiv:1710.01878, equation 1.
        """
        if step is None:
            return 1.0
        remaining = (1 - ops.clip(step / (RAMP * self.steps), 0.0, 1.0)) ** 3
        return 1 - (1 - START) * remaining

    def gates(self, values: Any, model: Any, uniform: Any = None, step: Any = None) -> Any:
        """Return the gates, shape (units,); see `Gating`."""
        location = self.location(values, model, step)
        return hard_concrete.fixed(location) if uniform is None else hard_concrete.sampled(location, uniform)

    def factors(self, gates: Any, model: Any) -> dict[str, Any]:
        """Return the factor of each weight that reads gated units, by path, in shapes that broadcast."""
        arrays, found = self._arrays(gates, model), dict[str, Any]()
        for label, (name, axis, dimensions) in self._axes.items():
            factor = products(gates, arrays[label])
            factor = ops.reshape(factor, tuple(-1 if other == axis else 1 for other in range(dimensions)))
            found[name] = found[name] * factor if name in found else factor
        return found

    def expected_cost(self, probability: NDArray[np.float64]) -> dict[str, float]:
        """Return each cost that the goal limits, as a fraction of the original, for the probabilities of open gates."""
        arrays = self._placed.arrays
        return {
            quantity: float(cost(probability, {name: arrays[f"{quantity} {name}"] for name in cost.arrays}))
            for quantity, cost in self._costs.items()
        }


@dataclass(frozen=True, repr=False)
class LearnedGates(Printable):
    """Gates after training; returned by `kirsch.learn_gates` and `kirsch.read_gates`.

    Args:
        model: the model without gates, not pruned; its weights include the gates that are used after training.
        plan: the units to remove: kirsch.prune(result.model, result.plan).
        scores: probability that the gate of each unit is open, by group; usable as `importance` of `kirsch.plan`.
        expected: expected cost with these probabilities, as a fraction of the original, by name of the goal.
        undecided: fraction of the units whose probability is between 0.1 and 0.9. If it is large, the training was too
            short: the costs of the gates and the plan agree, but the plan removes units that were often open.
        trained: the history of the training; None from `kirsch.read_gates`.
    """

    model: Any
    plan: Plan
    scores: dict[str, NDArray[np.float64]]
    expected: dict[str, float]
    undecided: float
    trained: Trained | None = field(default=None)

    def __repr__(self) -> str:
        """Return one line: model, expected cost, undecided units."""
        return f"<kirsch.LearnedGates of {type(self.model).__name__}: {self._text}>"

    @property
    def _text(self) -> str:
        costs = ", ".join(f"{figures.percent(value, 1)} of the {WORDS[name]}" for name, value in self.expected.items())
        return f"expected {costs}; {figures.percent(self.undecided, 0)} of the units undecided"

    def parts(self) -> list[Part]:
        """Return the expected cost, and the plan."""
        return [[Piece(type(self.model).__name__, "strong"), Piece(f"   {self._text}")], *self.plan.parts()]


@checked
def with_gates(
    graph: Graph,
    goal: Goal,
    *,
    steps: Count,
    train_weights: bool = True,
    gate_speed: Positive = 50.0,
    kinds: Kinds = None,
    exclude: Names = (),
    keep_outputs: Names = (),
) -> Any:
    """Return a copy of the traced model with a random gate for each unit, for training in any loop.

    In training mode, each forward pass multiplies the weights that read a unit by a hard-concrete gate: a random number
    that is exactly 0 or 1 with some probability. The locations of these numbers are trained by the gradient of the
    loss. In each pass they are shifted by one number for all gates, so that the expected cost of the model equals the
    budget, which is lowered from the original cost to the goal in the first 60 % of the steps. In inference mode, the
    gates are fixed numbers.

    Train the result, and pass it to `kirsch.read_gates`. `kirsch.learn_gates` does both.

    A gate of 0 has the effect of removing the unit where the unit is read by weights. Normalizations over the channels,
    such as layer normalization, still include the unit.

    Args:
        graph: result of `kirsch.trace`.
        goal: fractions of the original cost, of MACs, parameters or size.
        steps: number of forward passes in training mode of the whole training: epochs · batches.
        train_weights: whether the weights are trained together with the gates.
        gate_speed: with AdamW, the parameter log α of a gate changes by about gate_speed times the learning rate in a
            step, 0.1 for a learning rate of 2e-3. Choose it so that log α can change by about 10 in the training.
        kinds, exclude, keep_outputs: units without a gate, as in `kirsch.plan`.

    Raises:
        GoalError: no plan reaches the goal, or the goal is on the memory of the activations.
        UsageError: the graph has no model.

    Source: Louizos, Welling, Kingma 2018, arXiv:1712.01312, for the gates. There, the expected number of open gates is
        added to the loss with a weight; here, the expected cost is a constraint.
    """
    if graph.model is None:
        raise UsageError("This graph has no model to train.", "The graph was not created by kirsch.trace.")
    if goal.memory is not None:
        raise GoalError(
            "The goal memory cannot be used with gates.",
            "The expected cost is computed for MACs, parameters and size.",
            "Give a goal such as macs=0.5, and check the memory of the plan, or plan with other importances.",
        )
    groups = removable_groups(graph, PlanOptions(kinds=kinds, exclude=exclude, keep_outputs=keep_outputs))
    equal = {group.name: np.zeros(group.size) for group in graph.groups}
    options: dict[str, Any] = {"kinds": kinds, "exclude": exclude, "keep_outputs": keep_outputs}
    plan(graph, goal, importance=equal, loadable=False, **options)  # checks the goal
    gating = UnitGates(graph, goal, groups, steps=steps, train_weights=train_weights, speed=gate_speed)
    return framework_of(graph.model).training.gated(graph.model, gating)


@checked
def read_gates(
    model: Model,
    graph: Graph,
    goal: Goal,
    *,
    kinds: Kinds = None,
    exclude: Names = (),
    keep_outputs: Names = (),
    round_to: RoundTo = "auto",
    min_keep: MinKeep = 0.1,
) -> LearnedGates:
    """Return the scores, the plan and the model of trained gates.

    Args:
        model: a trained result of `kirsch.with_gates`.
        graph, goal, kinds, exclude, keep_outputs: the arguments of `kirsch.with_gates`.
        round_to, min_keep: as in `kirsch.plan`.

    Raises:
        UsageError: the model has no gates, or other gates than those of these arguments.
    """
    framework = framework_of(model)
    options: dict[str, Any] = {"kinds": kinds, "exclude": exclude, "keep_outputs": keep_outputs}
    values = framework.training.gate_values(model)
    groups = removable_groups(graph, PlanOptions(**options))
    size = sum(group.size for group in groups)
    if len(values) != size:
        raise UsageError(
            f"The model has {len(values)} gates, and {size} units can be removed with these `kinds`, `exclude` and "
            "`keep_outputs`.",
            fix="Give the graph, the goal and the options that were given to kirsch.with_gates.",
        )
    gating = UnitGates(graph, goal, groups)
    probability = hard_concrete.open_probability(gating.location(values, model))
    ends = np.cumsum([group.size for group in groups])[:-1]
    scores = {group.name: part for group, part in zip(groups, np.split(probability, ends), strict=True)}
    chosen = plan(graph, goal, importance=scores, round_to=round_to, min_keep=min_keep, loadable=False, **options)
    low, high = UNDECIDED
    undecided = float(((probability > low) & (probability < high)).mean())
    if undecided > MANY:
        note = (
            f"{figures.percent(undecided, 0)} of the gates are between {low} and {high}: the plan removes units that "
            "were often open in the training. Train for more steps, or raise gate_speed."
        )
        chosen = replace(chosen, notes=(*chosen.notes, note))
    return LearnedGates(
        framework.training.without_gates(model), chosen, scores, gating.expected_cost(probability), undecided
    )
