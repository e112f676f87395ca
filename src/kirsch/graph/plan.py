"""What to remove, as data: made, printed, checked, saved as JSON, edited by hand, and only then applied."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from kirsch.arguments import checked
from kirsch.errors import GoalError, PlanError, nearest
from kirsch.graph import inputs
from kirsch.graph.cost import Cost
from kirsch.graph.graph import DECISIONS, SOFTMAX, Tracing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph, Input

T = TypeVar("T")

LATENCY = re.compile(r"(?i)latency|speed|fps|milli|(?<![a-z])ms(?![a-z])")
"""Names under which a time is asked for as a goal."""
NO_LATENCY = "latency goals do not exist yet."
WHY_NO_LATENCY = "A plan is made from counts of MACs and parameters; a time is known once the result has been measured."
IN_PLACE_OF_LATENCY = (
    "Use macs, say macs=0.5, measure the result with kirsch.measure, and lower macs where it is too slow; "
    "goal.speedup of a recipe judges the measured time."
)


@checked
@dataclass(frozen=True)
class Goal:
    """What the pruned model may cost, as a fraction of the original.

    Args:
        macs: multiply-accumulates, 0 < macs < 1.
        params: parameters, 0 < params < 1.

    Raises:
        GoalError: no goal is given, or a fraction is out of range.
    """

    made_by: ClassVar[str] = "kirsch.Goal(macs=0.5)"

    macs: float | None = None
    params: float | None = None

    def __new__(cls, *_limits: Any, **named: Any) -> Self:
        """A new goal; a limit of a name that there is not is refused in words, which `__init__` could not do."""
        known = [limit.name for limit in fields(cls)]
        for name in named:
            if LATENCY.search(name):
                raise GoalError(f"The goal {name}: {NO_LATENCY}", WHY_NO_LATENCY, IN_PLACE_OF_LATENCY)
            if name not in known:
                raise GoalError(f"There is no goal {name!r}.", f"Known: {', '.join(known)}.", nearest(name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None:
            raise GoalError("A goal needs at least one limit.", mend="Say macs=0.5 or params=0.5.")
        for name, value in (("macs", self.macs), ("params", self.params)):
            if value is not None and not (math.isfinite(value) and 0 < value < 1):
                raise GoalError(
                    f"The goal {name}={value} cannot be met.",
                    "A goal is a fraction of the original, between 0 and 1.",
                    "For half the cost say 0.5.",
                )

    def fractions(self, cost: Cost, original: Cost) -> dict[str, tuple[float, float]]:
        """Limit name → (fraction that a cost is of the original, fraction allowed)."""
        out = {}
        if self.macs is not None:
            out["macs"] = (cost.macs / max(original.macs, 1), self.macs)
        if self.params is not None:
            out["params"] = (cost.parameters / max(original.parameters, 1), self.params)
        return out

    def met_by(self, cost: Cost, original: Cost) -> bool:
        """Whether a cost is within every limit."""
        return all(value <= limit for value, limit in self.fractions(cost, original).values())

    def shortfall(self, least: Cost, original: Cost) -> str:
        """In words, by how much the least reachable cost misses the limits."""
        reached = self.fractions(least, original).items()
        return "; ".join(
            f"{name} {limit:.1%} is asked for, {value:.1%} is the least reachable"
            for name, (value, limit) in reached
            if value > limit
        )

    def to_dict(self) -> dict[str, float]:
        """As JSON."""
        return {name: value for name, value in (("macs", self.macs), ("params", self.params)) if value is not None}


@dataclass(frozen=True)
class Removal:
    """What goes from one group.

    Args:
        name, kind, size: of the group.
        removed: indices of the units that go, ascending.
        reason: why these.
    """

    name: str
    kind: str
    size: int
    removed: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Skip:
    """A residual block that goes as a whole.

    Args:
        name: path of the module.
        reason: why this one.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What to remove from a model, and what it costs before and after.

    Args:
        fingerprint: of the graph that the plan was made for.
        model: class name of that model, for messages.
        groups: what goes from each group that loses anything.
        before, after: cost of one run on the example inputs.
        goal: what was asked for, as JSON.
        method: how the units were chosen, as JSON.
        inputs: the example inputs, of tensors without their values; empty where they cannot be stored.
        tracing: what the trace was asked for.
        blocks: what goes as a whole.
        notes: what stopped the plan from landing nearer to its goal, and widths that will be slow.
        configuration: new numbers of the configuration that the model carries, by their paths, where one describes the
            result; known once the plan was applied.
        graph: the graph it was made from; not stored.
    """

    made_by: ClassVar[str] = "kirsch.plan(graph, kirsch.Goal(macs=0.5))"

    fingerprint: str
    model: str
    groups: tuple[Removal, ...]
    before: Cost
    after: Cost
    goal: dict[str, float] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    tracing: Tracing = field(default_factory=Tracing)
    blocks: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    configuration: dict[str, float] = field(default_factory=dict)
    graph: Graph | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> str:
        """The plan as JSON, version 1, for reading and editing by hand."""
        return json.dumps(
            {
                "kirsch_plan": 1,
                "model": {"class": self.model, "fingerprint": self.fingerprint, "parameters": self.before.parameters},
                "goal": self.goal,
                "method": self.method,
                "groups": [
                    {"name": g.name, "kind": g.kind, "size": g.size, "removed": list(g.removed), "reason": g.reason}
                    for g in self.groups
                ],
                "blocks": [{"name": block.name, "reason": block.reason} for block in self.blocks],
                "cost": {"before": self.before.to_dict(), "after": self.after.to_dict()},
                "inputs": [inputs.write(given) for given in self.inputs],
                "tracing": {**vars(self.tracing), "outputs": list(self.tracing.outputs)},
                "notes": list(self.notes),
                "configuration": self.configuration,
            },
            indent=1,
            ensure_ascii=False,
        )

    @classmethod
    @checked
    def from_json(cls, text: str) -> Plan:
        """The plan of `to_json`.

        Raises:
            PlanError: it is no plan of version 1, or a field is missing or of a wrong type; names the field.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise PlanError("The plan is no JSON.", f"{error}.") from error
        if not isinstance(content, dict) or content.get("kirsch_plan") != 1:
            raise PlanError("This is no plan of version 1.", 'It lacks "kirsch_plan": 1.')
        try:
            return cls._read(content)
        except ValueError as error:
            raise PlanError("The plan is damaged.", f"{error}.", "Make it anew.") from error

    @classmethod
    def _read(cls, content: dict[str, Any]) -> Plan:
        model, cost = _get(content, "model", dict), _get(content, "cost", dict)
        return cls(
            fingerprint=_get(model, "fingerprint", str),
            model=_get(model, "class", str),
            groups=tuple(_removal(entry) for entry in _get(content, "groups", list)),
            before=_cost(_get(cost, "before", dict)),
            after=_cost(_get(cost, "after", dict)),
            goal=_get(content, "goal", dict),
            method=_get(content, "method", dict),
            inputs=tuple(inputs.read(entry) for entry in _get(content, "inputs", list)),
            tracing=_tracing(_get(content, "tracing", dict)),
            blocks=tuple(
                Skip(_get(entry, "name", str), _get(entry, "reason", str)) for entry in _get(content, "blocks", list)
            ),
            notes=tuple(_all(_get(content, "notes", list), "notes", str)),
            configuration=_numbers(_get(content, "configuration", dict)),
        )

    @property
    def without(self) -> tuple[str, ...]:
        """Paths of the blocks that go."""
        return tuple(block.name for block in self.blocks)

    def keep(self, graph: Graph) -> NDArray[np.bool_]:
        """Component of the graph → whether it stays."""
        return graph.keep({removal.name: removal.removed for removal in self.groups})

    def check(self, graph: Graph) -> None:
        """Make sure that the plan fits a graph.

        Raises:
            PlanError: it was made for another model, or names a group or unit that is not there, or empties a group.
        """
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"This plan is for another model: {self.model} with {self.before.parameters:,} parameters, "
                f"fingerprint {self.fingerprint[:12]}.",
                f"The model given is {graph.model_name} with {graph.cost.parameters:,} parameters, "
                f"fingerprint {graph.fingerprint[:12]}.",
                "Give the model that the plan was made for, or make a new plan.",
            )
        groups = {group.name: group for group in graph.groups}
        for removal in self.groups:
            if removal.name not in groups:
                raise PlanError(
                    f"The plan names a group {removal.name!r}.",
                    "The model has none of that name.",
                    nearest(removal.name, groups),
                )
            size = groups[removal.name].size
            outside = [unit for unit in removal.removed if not 0 <= unit < size]
            if outside:
                raise PlanError(
                    f"The plan removes unit {outside[0]} of {removal.name!r}.",
                    f"The group has units 0 to {size - 1}.",
                )
            if len(removal.removed) >= size:
                raise PlanError(
                    f"The plan removes all {size} units of {removal.name!r}.", mend="Leave at least one of them."
                )
        for name in self.without:
            if name not in graph.blocks:
                raise PlanError(
                    f"The plan leaves out {name!r}.",
                    "The model has no residual block there.",
                    nearest(name, graph.blocks),
                )
        names = [removal.name for removal in self.groups]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PlanError(f"The plan names the group {twice[0]!r} twice.", mend="Join the two entries.")
        twice = sorted({name for name in self.without if self.without.count(name) > 1})
        if twice:
            raise PlanError(f"The plan names the block {twice[0]!r} twice.", mend="Take one of them out.")


KINDS = {bool: "true or false", str: "text", int: "a whole number", list: "a list", dict: "an object"}


def _get(content: Any, name: str, kind: type[T]) -> T:
    """A field of an object, which must be there and of a kind."""
    if not isinstance(content, dict):
        raise ValueError(f"{content!r} stands where an object with {name!r} should")  # noqa: TRY004 - of the file, not of the code
    if name not in content:
        raise ValueError(f"{name!r} is missing")
    return _all([content[name]], name, kind)[0]


def _all(values: list[Any], name: str, kind: type[T]) -> list[T]:
    """Values, each of which must be of a kind; truth values are no numbers."""
    for value in values:
        if type(value) is not kind:
            raise ValueError(f"{name!r} has {value!r}, which is not {KINDS[kind]}")
    return values


def _removal(entry: Any) -> Removal:
    name = _get(entry, "name", str)
    removed = _all(_get(entry, "removed", list), f"removed of {name}", int)
    if len(set(removed)) != len(removed):
        raise ValueError(f"a unit of {name!r} is named twice")
    size, kind, reason = _get(entry, "size", int), _get(entry, "kind", str), _get(entry, "reason", str)
    return Removal(name, kind, size, tuple(sorted(removed)), reason)


def _tracing(entry: dict[str, Any]) -> Tracing:
    outputs = tuple(_all(_get(entry, "outputs", list), "outputs", str))
    decisions, softmax = _one_of(entry, "decisions", DECISIONS), _one_of(entry, "softmax", SOFTMAX)
    return Tracing(outputs, decisions, _get(entry, "scope", str), softmax, _get(entry, "as_graph", bool))


def _one_of(entry: dict[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = _get(entry, name, str)
    if value not in known:
        raise ValueError(f"{name!r} has {value!r}, which is not one of {', '.join(known)}")
    return value


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    for name, value in entry.items():
        if type(value) not in (int, float):
            raise ValueError(f"'configuration' has {value!r} for {name!r}, which is not a number")
    return entry


def _cost(entry: dict[str, Any]) -> Cost:
    return Cost(**{found.name: _get(entry, found.name, int) for found in fields(Cost)})
