"""Pruning plan: the units to remove, as data that can be printed, saved as JSON, edited, checked and applied."""

from __future__ import annotations

import json
import math
import re
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kirsch import figures
from kirsch.arguments import checked
from kirsch.errors import GoalError, LoadError, PlanError, nearest
from kirsch.graph import inputs, layout, plan_file
from kirsch.graph.cost import WORDS, Cost
from kirsch.graph.graph import Tracing
from kirsch.tables import Line, Part, Piece, Printable, Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.graph.inputs import Input


LATENCY = re.compile(r"(?i)latency|speed|fps|milli|(?<![a-z])ms(?![a-z])")
"""Pattern of argument names that ask for a latency limit."""
NO_LATENCY = "latency goals do not exist yet."
WHY_NO_LATENCY = "A plan is made from counts of MACs and parameters; latency is known only after a measurement."
IN_PLACE_OF_LATENCY = (
    "Use macs, such as macs=0.5, measure the result with kirsch.measure, and lower macs if it is too slow. "
    "The key goal.speedup of a recipe checks the measured speedup."
)


@checked
@dataclass(frozen=True)
class Goal(Printable):
    """Largest cost of the pruned model, as a fraction of the original.

    MACs are counted for one forward pass on the example inputs of `kirsch.trace`, with all samples of the batch.

    Args:
        macs: largest number of multiply-accumulates of the pruned model, as a fraction of that of the original; above 0
            and below 1.
        parameters: largest number of parameters of the pruned model, as a fraction of that of the original; above 0 and
            below 1.
        size: largest number of bytes of the parameters and buffers, as in a file of the weights; above 0 and below 1.
        memory: largest peak memory of the activations for the example inputs; above 0 and below 1. See
            `kirsch.graph.cost.Cost`.

    Raises:
        GoalError: all limits are None, or a fraction is out of range.
    """

    made_by: ClassVar[str] = "kirsch.Goal(macs=0.5)"

    _: KW_ONLY
    macs: float | None = None
    parameters: float | None = None
    size: float | None = None
    memory: float | None = None

    @staticmethod
    def refuse_argument(name: str) -> GoalError | None:
        """Return the error for a latency limit; None for any other name. Called by `kirsch.arguments.checked`."""
        if not LATENCY.search(name):
            return None
        return GoalError(f"The goal {name}: {NO_LATENCY}", WHY_NO_LATENCY, IN_PLACE_OF_LATENCY)

    def __post_init__(self) -> None:
        limits = self.to_dict()
        if not limits:
            raise GoalError("A goal needs at least one limit.", fix="Pass macs=0.5 or parameters=0.5.")
        for name, value in limits.items():
            if not (math.isfinite(value) and 0 < value < 1):
                raise GoalError(
                    f"The goal {name}={value} is out of range.",
                    "A goal is a fraction of the original, between 0 and 1 (exclusive).",
                    f"For half the cost use {name}=0.5.",
                )

    def parts(self) -> list[Part]:
        """Return the limits in one line."""
        limits = ", ".join(f"{WORDS[name]} ≤ {100 * limit:g} %" for name, limit in self.to_dict().items())
        return [[Piece(f"{limits} of the original")]]

    def fractions(self, cost: Cost, original: Cost) -> dict[str, tuple[float, float]]:
        """Return for each limit (cost as a fraction of the original, largest fraction allowed), keyed by its name."""
        return {
            name: (getattr(cost, name) / max(getattr(original, name), 1), limit)
            for name, limit in self.to_dict().items()
        }

    def met_by(self, cost: Cost, original: Cost) -> bool:
        """Return whether a cost is within every limit."""
        return all(value <= limit for value, limit in self.fractions(cost, original).values())

    def shortfall(self, least: Cost, original: Cost) -> str:
        """Return a text that compares the limits with the least reachable cost, for the limits that are missed."""
        missed = [(name, *pair) for name, pair in self.fractions(least, original).items() if pair[0] > pair[1]]
        texts = [(name, *figures.distinct_percents(limit, value)) for name, value, limit in missed]
        return "; ".join(
            f"{name} {limit} is requested, {value} is the least reachable with these options"
            for name, limit, value in texts
        )

    def to_dict(self) -> dict[str, float]:
        """Return the limits as JSON."""
        limits = {name: getattr(self, name) for name in WORDS}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Removal:
    """The units to remove from one group.

    Args:
        name, kind, size: name, kind and number of units of the group.
        removed: indices of the units to remove, ascending.
        reason: why these units were chosen.
    """

    name: str
    kind: str
    size: int
    removed: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Skip:
    """A residual block to remove.

    Args:
        name: path of the module.
        reason: why this block was chosen.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Plan(Printable):
    """Units and blocks to remove from a model, with the cost before and after.

    Args:
        fingerprint: fingerprint of the graph that the plan was made for.
        model: class name of the model, for messages.
        groups: units to remove, for each group that loses units.
        before, after: cost of one forward pass on the example inputs.
        goal: the goal, as JSON.
        method: options by which the units were chosen, as JSON.
        inputs: the example inputs, tensors without their values; empty if they cannot be stored.
        tracing: options of the trace.
        blocks: residual blocks to remove.
        notes: reasons why the plan is not closer to its goal, widths that are slow on common hardware, and the cost of
            the units that `exclude` and `keep_outputs` keep.
        configuration: path of a number in the model's configuration → its new value; set when the plan is applied, if
            a configuration describes the pruned model.
        graph: the graph that the plan was made from; not stored.
        file: path of the file that the plan was read from, for messages; not stored.
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

    def __repr__(self) -> str:
        """Return one line: the model, the number of removed units and blocks, the cost."""
        units = sum(len(removal.removed) for removal in self.groups)
        blocks = f", {figures.counted(len(self.blocks), 'block')}" if self.blocks else ""
        macs = f"{self.before.macs:,} → {self.after.macs:,} MACs"
        parameters = f"{self.before.parameters:,} → {self.after.parameters:,} parameters"
        return f"<kirsch.Plan of {self.model}: removes {figures.counted(units, 'unit')}{blocks}, {macs}, {parameters}>"

    def parts(self) -> list[Part]:
        """Return a bar for each group, the removed blocks, the cost before and after, and the notes.

        A plan without its graph, such as a plan from JSON, shows only the groups that lose units.
        """
        removed = {removal.name: len(removal.removed) for removal in self.groups}
        groups = self.graph.groups if self.graph is not None else self.groups
        sizes = {group.name: (group.size, removed.get(group.name, 0)) for group in groups}
        method = layout.method_text(self.method, of_blocks=bool(self.blocks) and not self.groups)
        macs = f"MACs for {layout.inputs_text(shape for _, shape, _ in _shapes(self.inputs))}"
        title: Line = [Piece(self.model, "strong"), *(Piece(f"   {text}") for text in (method, macs) if text)]
        return layout.plan_parts(title, sizes, self.without, self.cost_table(), self.notes)

    def cost_table(self) -> Table:
        """Return the cost before and after, with the remaining share and the goal, as a table."""
        return layout.cost_table(self.before, self.after, self.goal)

    def to_json(self) -> str:
        """Return the plan as JSON of version 1, indented for editing by hand."""
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
                "inputs": [inputs.write(example) for example in self.inputs],
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
        """Return the plan of a JSON text, the inverse of `to_json`.

        Raises:
            PlanError: the text is not a plan of version 1, or a field is missing, unknown, repeated or has an invalid
                value. The message names the field.
        """
        return cls._of(plan_file.read(text, cls.title_of("")))

    @classmethod
    @checked
    def read(cls, path: str | Path) -> Plan:
        """Read a plan from a file. Errors about the plan name the file.

        Raises:
            LoadError: the file cannot be read.
            PlanError: see `from_json`.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise LoadError(
                f"The plan {path} cannot be read.", f"{error.strerror or error}.", "Make a plan with kirsch plan."
            ) from error
        return cls._of(plan_file.read(content, cls.title_of(str(path))), str(path))

    @classmethod
    def _of(cls, content: dict[str, Any], file: str = "") -> Plan:
        """Return the plan of the validated content of a plan file."""
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
        """Return the name of a plan in messages; `file` is "" for a plan without a file."""
        return f"The plan {file}" if file else "The plan"

    @property
    def title(self) -> str:
        """Name of the plan in messages."""
        return self.title_of(self.file)

    @property
    def without(self) -> tuple[str, ...]:
        """Paths of the blocks to remove."""
        return tuple(block.name for block in self.blocks)

    def keep(self, graph: Graph) -> NDArray[np.bool_]:
        """Return the mask of the components (sets of coupled labels) that stay, bool of shape (components,)."""
        return graph.keep({removal.name: removal.removed for removal in self.groups})

    def check(self, graph: Graph) -> None:
        """Check that the plan fits a graph and removes something.

        Raises:
            PlanError: the plan was made for another model or with other options of the trace, names a group, unit or
                block that does not exist or names one twice, states a wrong kind or size of a group, removes all units
                of a group, or removes nothing.
        """
        if self.fingerprint != graph.fingerprint:
            raise self._wrong_model_error(graph)
        if self.tracing != graph.tracing:
            raise PlanError(
                f"{self.title} was made with other options of kirsch.trace than the graph.",
                f"The plan has {self.tracing}, the graph has {graph.tracing}.",
                "Trace the model with the options of the plan, or make a new plan.",
            )
        groups = {group.name: group for group in graph.groups}
        for removal in self.groups:
            if removal.name not in groups:
                raise PlanError(
                    f"{self.title} names a group {removal.name!r}.",
                    "The model has no such group.",
                    nearest(removal.name, groups),
                )
            self._check_group(removal, groups[removal.name])
        for name in self.without:
            if name not in graph.blocks:
                raise PlanError(
                    f"{self.title} removes the block {name!r}.",
                    "The model has no such residual block.",
                    nearest(name, graph.blocks),
                )
        for part, names in (("group", [removal.name for removal in self.groups]), ("block", list(self.without))):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise PlanError(f"{self.title} names the {part} {repeated[0]!r} twice.", fix="Merge the two entries.")
        empty = not self.without and not any(removal.removed for removal in self.groups)
        if empty and not graph.tracing.as_graph:  # with as_graph, the traced program is itself a change
            raise PlanError(
                f"{self.title} removes nothing.",
                "The list `removed` of each group and the list `blocks` are empty.",
                "List units or blocks to remove, or keep using the model without pruning.",
            )

    def _wrong_model_error(self, graph: Graph) -> PlanError:
        similar = (self.model, self.before.parameters) == (graph.model_name, graph.cost.parameters)
        shapes = ", ".join("×".join(map(str, shape)) for _, shape, _ in _shapes(graph.inputs))
        traced = f" It was traced with inputs of shape {shapes}." if shapes else ""
        return PlanError(
            f"{self.title} is for another model: {self.model} with {self.before.parameters:,} parameters, "
            f"fingerprint {self.fingerprint[:12]}.",
            f"This model is {graph.model_name} with {graph.cost.parameters:,} parameters, "
            f"fingerprint {graph.fingerprint[:12]}"
            + (
                f": its layers differ, or the fields model, tracing or inputs of the plan were edited.{traced}"
                if similar
                else "."
            ),
            "Use the model that the plan was made for, correct these fields, or make a new plan."
            if similar
            else "Use the model that the plan was made for, or make a new plan.",
        )

    def _check_group(self, removal: Removal, group: Group) -> None:
        outside = [unit for unit in removal.removed if not 0 <= unit < group.size]
        if outside:
            raise PlanError(
                f"{self.title} removes unit {outside[0]} of {removal.name!r}.",
                f"The group has units 0 to {group.size - 1}.",
            )
        if len(set(removal.removed)) < len(removal.removed):
            repeated = next(unit for unit in removal.removed if removal.removed.count(unit) > 1)
            raise PlanError(
                f"{self.title} removes unit {repeated} of {removal.name!r} twice.", fix="List each unit once."
            )
        if len(removal.removed) == group.size:
            raise PlanError(
                f"{self.title} removes all {group.size} units of {removal.name!r}.", fix="Keep at least one of them."
            )
        if (removal.size, removal.kind) != (group.size, group.kind):
            raise PlanError(
                f"{self.title} states that {removal.name!r} has {removal.size} units of the kind {removal.kind!r}.",
                f"The group has {group.size} units of the kind {group.kind!r}.",
                "Correct size and kind, or make a new plan.",
            )

    def check_cost(self, graph: Graph) -> None:
        """Check that the plan states the cost of the original as counted on the graph.

        MACs and activations depend on the inputs and are compared only if the example inputs are the same.

        Raises:
            PlanError: the costs differ.
        """
        stated, actual = self.before.to_dict(), graph.cost.to_dict()
        same_inputs = _shapes(self.inputs) == _shapes(graph.inputs) != []
        for name in stated if same_inputs else ("parameters",):
            if stated[name] != actual[name]:
                raise PlanError(
                    f"{self.title} states a wrong cost of the original: cost.before.{name} is {stated[name]:,}.",
                    f"The {graph.model_name} has {actual[name]:,} {WORDS.get(name, name)}"
                    + (" on the inputs of the plan." if name != "parameters" else "."),
                    f"Restore cost.before.{name} and inputs, or make a new plan.",
                )

    def priced(self, graph: Graph) -> Plan:
        """Return the plan with its costs counted on a graph."""
        examples = self.inputs if _shapes(self.inputs) == _shapes(graph.inputs) else graph.inputs
        after = graph.prices.price(self.keep(graph), self.without)
        return replace(self, model=graph.model_name, before=graph.cost, after=after, inputs=examples)


def _shapes(examples: tuple[Input, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(spec.name, spec.shape, spec.dtype) for spec in inputs.tensors(examples)]
