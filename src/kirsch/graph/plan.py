"""Pruning plan: the units to remove, as data that can be printed, saved as JSON, edited, checked and applied."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kirsch import figures
from kirsch.arguments import checked
from kirsch.errors import LoadError, PlanError, nearest
from kirsch.graph import inputs, layout, plan_file
from kirsch.graph.cost import Cost
from kirsch.graph.cost_names import WORDS
from kirsch.graph.goal import Goal as Goal  # noqa: PLC0414 - other modules may import it from here
from kirsch.graph.graph import Tracing
from kirsch.tables import Line, Part, Piece, Printable, Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.graph.inputs import Input


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
        goal: limits of the goal, as JSON.
        method: options by which the units were chosen, as JSON.
        inputs: the example inputs, tensors without their values; empty if they cannot be stored.
        tracing: options of the trace.
        blocks: residual blocks to remove.
        notes: reasons why the plan is not closer to its goal, widths that are slow on common hardware, and the cost of
            the units that `exclude` and `keep_outputs` keep.
        configuration: path of a number in the model's configuration → its new value; set when the plan is applied, if
            a configuration describes the pruned model.
        goal_of: cost of the model that the limits of the goal are fractions of; None: the cost before this plan.
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
    goal_of: Cost | None = None
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
        return layout.cost_table(self.before, self.after, self.goal, self.goal_of)

    @property
    def limits(self) -> Goal | None:
        """Goal of the plan; None if there is none."""
        return Goal(**self.goal, of=self.goal_of) if self.goal else None

    @property
    def needs_nothing(self) -> bool:
        """Whether the model before the plan has already met a goal that is a fraction of an earlier model's cost."""
        return self.goal_of is not None and self.limits is not None and self.limits.met_by(self.before, self.before)

    def to_json(self) -> str:
        """Return the plan as JSON of version 1, indented for editing by hand."""
        return json.dumps(
            {
                "kirsch_plan": plan_file.VERSION,
                "model": {"class": self.model, "fingerprint": self.fingerprint, "parameters": self.before.parameters},
                "goal": self.goal,
                **({} if self.goal_of is None else {"goal_of": self.goal_of.to_dict()}),
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
            goal_of=Cost(**content["goal_of"]) if "goal_of" in content else None,
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
        # With as_graph, the traced program is itself a change. A round of pruning may meet the goal of the next one.
        if empty and not graph.tracing.as_graph and not self.needs_nothing:
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
