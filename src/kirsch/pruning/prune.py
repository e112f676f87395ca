"""From a plan to a new model, with proof."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kirsch.errors import KirschError, ModelError, PlanError, UsageError, VerificationError, said
from kirsch.frameworks.port import framework_of
from kirsch.graph.plan import Plan, Removal, Skip
from kirsch.pruning.notes import changes, renewed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.proof import Verification

PLANS = "_kirsch_plans"
"""Attribute of a pruned model: the JSON of each plan that made it, so that `kirsch.save` can store them."""

OPTIMIZER_NOTE = "An optimizer made for the original still holds the original's parameters: make a new one."


@dataclass(frozen=True)
class Pruned:
    """What a removal gives back.

    Args:
        model: the new model.
        verification: how it was held against the masked original; None without verification.
        plan: what was removed, with the cost before and after, and the numbers of the model's own configuration.
        notes: what the caller must know.
    """

    model: Any
    verification: Verification | None
    plan: Plan
    notes: tuple[str, ...]


def prune(model: Any, plan: Plan, *, example_inputs: Any = None, verify: bool = True) -> Any:
    """A new, ordinary model of the same class without what the plan removes; the given one is left as it is.

    Args:
        model: the model that the plan was made for, trained or not, in any mode and of any floating type.
        plan: of `kirsch.plan`, `Plan.read` or `Plan.from_json`. What it costs, and whether its goal is met, is computed
            anew from what it removes, so that a plan edited by hand may keep the figures it was made with.
        example_inputs: only needed when the plan comes from JSON and its inputs were nested.
        verify: hold the result against the masked original before it is returned.

    Returns:
        The pruned model. Mode, hooks, types, devices and requires_grad are those of the original. An optimizer made
        for the original still holds the original's parameters; make a new one.

    Raises:
        PlanError: the plan is for another model, names what is not there, removes nothing, or states a cost of the
            original that is not its cost.
        VerificationError: the pruned model is not equal to the masked original; names the groups that go wrong.
    """
    return prune_with_proof(model, plan, example_inputs=example_inputs, verify=verify).model


def prune_with_proof(model: Any, plan: Plan, *, example_inputs: Any = None, verify: bool = True) -> Pruned:
    """The same as `prune`, with the verification and the notes."""
    graph = graph_of(model, plan, example_inputs)
    plan.check(graph)
    plan.check_cost(graph)
    try:
        return _cut(model, plan, graph, verify=verify)
    except VerificationError:
        if graph is not plan.graph and example_inputs is None:
            _check_inputs(model, plan)
        raise


def _check_inputs(model: Any, plan: Plan) -> None:
    """Make sure that a model runs on inputs like those a plan states, such as integers that index into a table.

    Raises:
        ModelError: it does not.
    """
    if plan.tracing.scope:
        return
    framework = framework_of(model)
    try:
        framework.count(model, framework.inputs_like(plan.inputs))
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"{plan.title} cannot be applied: the {plan.model} does not run on the inputs that it states.",
            said(error),
            "Correct shape, dtype and high of its inputs, or give example_inputs.",
        ) from error


def rebuilt(model: Any, plan: Plan) -> Any:
    """A model cut by a plan that it was cut by before, without verification.

    The costs that the plan states may have been counted by another version of the framework, and are counted anew.
    """
    graph = graph_of(model, plan, None)
    plan.check(graph)
    return _cut(model, plan, graph, verify=False).model


def _cut(model: Any, stated: Plan, graph: Graph, *, verify: bool) -> Pruned:
    """The model without what a plan removes that fits the graph."""
    framework = framework_of(model)
    plan = renewed(stated, graph)
    keep = plan.keep(graph)
    empty = graph.emptied(keep)
    if empty is not None:
        raise PlanError(f"{plan.title} would leave too little of {empty[0]!r}.", mend="Leave more of its units.")
    try:
        pruned, verification = framework.prune(model, plan, graph, verify=verify)
    except VerificationError as error:
        raise _named(error, plan, lambda part: framework.prune(model, part, graph, verify=True)) from error
    configuration, told = framework.configure(pruned, plan, graph, verify=verify)
    plan = replace(plan, configuration=configuration)
    setattr(pruned, PLANS, [*getattr(model, PLANS, []), plan.to_json()])
    notes = [*changes(stated, plan), *plan.notes, *told, OPTIMIZER_NOTE]
    if verification is not None and verification.power == 0.0:
        notes.append("The masked and the dense original put out the same: the verification could not see a wrong cut.")
    elif verification is not None and verification.unseen:
        modules = ", ".join(f"`{path}`" for path in verification.unseen)
        notes.append(
            f"For the example inputs no output depends on {modules}: the verification could not see a wrong cut there. "
            "Give inputs that differ from sample to sample and from token to token, if it is not that training alone "
            "runs them."
        )
    return Pruned(pruned, verification, plan, tuple(notes))


def _named(error: VerificationError, plan: Plan, cut: Callable[[Plan], Any]) -> VerificationError:
    """The error with the smallest part of the plan that goes wrong by itself, found by halving."""

    def goes_wrong(part: Sequence[Removal | Skip]) -> bool:
        groups = tuple(item for item in part if isinstance(item, Removal))
        blocks = tuple(item for item in part if isinstance(item, Skip))
        try:
            cut(replace(plan, groups=groups, blocks=blocks))
        except KirschError:
            return True
        return False

    part: Sequence[Removal | Skip] = [*plan.groups, *plan.blocks]
    if goes_wrong([]):  # it is not a cut that is at fault
        return error
    while len(part) > 1:
        halves = part[: len(part) // 2], part[len(part) // 2 :]
        wrong = next((half for half in halves if goes_wrong(half)), None)
        if wrong is None:
            break
        part = wrong
    names = ", ".join(repr(item.name) for item in part[:3]) + (f" and {len(part) - 3} more" if len(part) > 3 else "")  # noqa: PLR2004 - three are named
    return VerificationError(
        error.what,
        f"{error.why} The cut of {names} by itself is wrong{' already' if len(part) == 1 else ', and no half of it'}.",
        f"Exclude {names}, and report the model.",
    )


def graph_of(model: Any, plan: Plan, example_inputs: Any) -> Graph:
    """The graph that a plan was made from if it still fits the model, else a new trace."""
    framework = framework_of(model)
    if plan.graph is not None and plan.graph.fits(model):
        return plan.graph
    if example_inputs is None and not plan.inputs:
        raise PlanError(
            f"{plan.title} does not store its example inputs.",
            "They were nested when it was made.",
            "Give example_inputs=...",
        )
    try:
        if example_inputs is not None:
            return framework.trace(model, example_inputs, plan.tracing)
        return framework.trace(model, framework.inputs_like(plan.inputs), plan.tracing, of_part=True)
    except UsageError as error:  # an output or a part that the plan names and the model does not have
        raise PlanError(
            f"{plan.title} cannot be applied: {error.what}",
            error.why,
            f"{error.mend} Check its tracing options.".strip(),
        ) from error
    except ModelError as error:
        if example_inputs is not None:
            raise
        raise ModelError(
            f"{plan.title} cannot be applied: {error.what}",
            error.why,
            f"{error.mend} Or correct the inputs that the plan states, or give example_inputs.".strip(),
        ) from error
