"""What to remove, as data: made, printed, checked, saved as JSON, edited by hand, and only then applied."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kirsch.arguments import checked
from kirsch.errors import GoalError, LoadError, PlanError, nearest
from kirsch.graph import inputs, plan_file
from kirsch.graph.cost import Cost
from kirsch.graph.graph import Tracing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph, Input
    from kirsch.graph.group import Group


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

    @staticmethod
    def refuse_argument(name: str) -> GoalError | None:
        """Return the error for a limit on a time; None for any other name. `kirsch.arguments.checked` asks for it."""
        if not LATENCY.search(name):
            return None
        return GoalError(f"The goal {name}: {NO_LATENCY}", WHY_NO_LATENCY, IN_PLACE_OF_LATENCY)

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None:
            raise GoalError("A goal needs at least one limit.", fix="Say macs=0.5 or params=0.5.")
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
        file: that it was read from, for messages; not stored.
    """

    made_by: ClassVar[str] = "kirsch.plan(graph, kirsch.Goal(macs=0.5)), or kirsch.Plan.read(path) for a stored one"

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
    file: str = field(default="", compare=False)

    def to_json(self) -> str:
        """The plan as JSON, version 1, for reading and editing by hand."""
        return json.dumps(
            {
                "kirsch_plan": plan_file.VERSION,
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
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan of `to_json`.

        Raises:
            PlanError: it is not a plan of version 1, or a field is missing, unknown, given twice, or has a value that
                no plan has; names the field.
        """
        return cls._of(plan_file.read(text, cls.title_of("")))

    @classmethod
    @checked
    def read(cls, path: str | Path) -> Plan:
        """The plan in a file; every error about it names the file.

        Raises:
            LoadError: the file cannot be read.
            PlanError: see `from_json`.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise LoadError(
                f"The plan {path} cannot be read.", f"{error.strerror or error}.", "Make one: kirsch plan."
            ) from error
        return cls._of(plan_file.read(content, cls.title_of(str(path))), str(path))

    @classmethod
    def _of(cls, content: dict[str, Any], file: str = "") -> Plan:
        """The plan of a content that was checked."""
        model, cost, tracing = content["model"], content["cost"], content["tracing"]
        return cls(
            fingerprint=model["fingerprint"],
            model=model["class"],
            groups=tuple(
                Removal(g["name"], g["kind"], g["size"], tuple(sorted(g["removed"])), g.get("reason", ""))
                for g in content["groups"]
            ),
            before=Cost(**cost["before"]),
            after=Cost(**cost["after"]),
            goal=content["goal"],
            method=content["method"],
            inputs=tuple(map(inputs.read, content["inputs"])),
            tracing=Tracing(**{**tracing, "outputs": tuple(tracing["outputs"])}),
            blocks=tuple(Skip(block["name"], block.get("reason", "")) for block in content["blocks"]),
            notes=tuple(content["notes"]),
            configuration=content["configuration"],
            file=file,
        )

    @staticmethod
    def title_of(file: str) -> str:
        """How messages call the plan of a file, "" for none."""
        return f"The plan {file}" if file else "The plan"

    @property
    def title(self) -> str:
        """How messages call this plan."""
        return self.title_of(self.file)

    @property
    def without(self) -> tuple[str, ...]:
        """Paths of the blocks that go."""
        return tuple(block.name for block in self.blocks)

    def keep(self, graph: Graph) -> NDArray[np.bool_]:
        """Component of the graph → whether it stays."""
        return graph.keep({removal.name: removal.removed for removal in self.groups})

    def check(self, graph: Graph) -> None:
        """Make sure that the plan fits a graph and removes something.

        Raises:
            PlanError: it was made for another model or traced with other options, names a group or unit that does not
                exist, states another kind or size of a group, empties a group, or removes nothing.
        """
        if self.fingerprint != graph.fingerprint:
            raise self._for_another(graph)
        if self.tracing != graph.tracing:
            raise PlanError(
                f"{self.title} was made with other options of kirsch.trace than the graph given.",
                f"The plan has {self.tracing}, the graph {graph.tracing}.",
                "Trace the model with the options of the plan, or make a new plan.",
            )
        groups = {group.name: group for group in graph.groups}
        for removal in self.groups:
            if removal.name not in groups:
                raise PlanError(
                    f"{self.title} names a group {removal.name!r}.",
                    "The model has none of that name.",
                    nearest(removal.name, groups),
                )
            self._check_group(removal, groups[removal.name])
        for name in self.without:
            if name not in graph.blocks:
                raise PlanError(
                    f"{self.title} leaves out {name!r}.",
                    "The model has no residual block there.",
                    nearest(name, graph.blocks),
                )
        for part, named in (("group", [removal.name for removal in self.groups]), ("block", list(self.without))):
            twice = sorted({name for name in named if named.count(name) > 1})
            if twice:
                raise PlanError(f"{self.title} names the {part} {twice[0]!r} twice.", fix="Join the two entries.")
        nothing = not self.without and not any(removal.removed for removal in self.groups)
        if nothing and not graph.tracing.as_graph:  # which gives the program of the model, a change by itself
            raise PlanError(
                f"{self.title} removes nothing.",
                "No group lists a unit in removed, and no block is left out.",
                "List what shall go, or keep using the model as it is.",
            )

    def _for_another(self, graph: Graph) -> PlanError:
        same = (self.model, self.before.parameters) == (graph.model_name, graph.cost.parameters)
        shapes = ", ".join("×".join(map(str, shape)) for _, shape, _ in _shapes(graph.inputs))
        traced = f" It was traced with inputs of shape {shapes}." if shapes else ""
        return PlanError(
            f"{self.title} is for another model: {self.model} with {self.before.parameters:,} parameters, "
            f"fingerprint {self.fingerprint[:12]}.",
            f"The model given is {graph.model_name} with {graph.cost.parameters:,} parameters, "
            f"fingerprint {graph.fingerprint[:12]}"
            + (
                f": its layers differ, or the fields model, tracing or inputs of the plan were changed.{traced}"
                if same
                else "."
            ),
            "Give the model that the plan was made for, correct these fields, or make a new plan."
            if same
            else "Give the model that the plan was made for, or make a new plan.",
        )

    def _check_group(self, removal: Removal, group: Group) -> None:
        outside = [unit for unit in removal.removed if not 0 <= unit < group.size]
        if outside:
            raise PlanError(
                f"{self.title} removes unit {outside[0]} of {removal.name!r}.",
                f"The group has units 0 to {group.size - 1}.",
            )
        if len(set(removal.removed)) < len(removal.removed):
            twice = next(unit for unit in removal.removed if removal.removed.count(unit) > 1)
            raise PlanError(f"{self.title} removes unit {twice} of {removal.name!r} twice.", fix="List it once.")
        if len(removal.removed) == group.size:
            raise PlanError(
                f"{self.title} removes all {group.size} units of {removal.name!r}.", fix="Leave at least one of them."
            )
        if (removal.size, removal.kind) != (group.size, group.kind):
            raise PlanError(
                f"{self.title} says that {removal.name!r} has {removal.size} units of the kind {removal.kind!r}.",
                f"The model has {group.size} of the kind {group.kind!r} there.",
                "Correct size and kind, or make a new plan.",
            )

    def check_cost(self, graph: Graph) -> None:
        """Make sure that the stated cost of the original is that of the graph, which no edit of a plan changes.

        MACs and activations depend on the inputs and are compared only where these are the same.

        Raises:
            PlanError: it is another one.
        """
        stated, found = self.before.to_dict(), graph.cost.to_dict()
        same = _shapes(self.inputs) == _shapes(graph.inputs) != []
        for name in stated if same else ("parameters",):
            if stated[name] != found[name]:
                raise PlanError(
                    f"{self.title} states a wrong cost of the original: cost.before.{name} is {stated[name]:,}.",
                    f"The {graph.model_name} has {found[name]:,}"
                    + (" on the inputs of the plan." if name != "parameters" else "."),
                    f"Restore cost.before.{name} and inputs, or make a new plan.",
                )

    def priced(self, graph: Graph) -> Plan:
        """The plan with its costs counted on the graph that it is applied to, whatever it stated."""
        given = self.inputs if _shapes(self.inputs) == _shapes(graph.inputs) else graph.inputs
        after = graph.prices.price(self.keep(graph), self.without)
        return replace(self, model=graph.model_name, before=graph.cost, after=after, inputs=given)


def _shapes(given: tuple[Input, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(spec.name, spec.shape, spec.dtype) for spec in inputs.tensors(given)]
