"""From a plan to a new model, with verification."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kirsch.arguments import checked
from kirsch.errors import KirschError, ModelError, PlanError, UsageError, VerificationError, error_text, nearest
from kirsch.frameworks.annotations import Inputs, Model
from kirsch.frameworks.port import framework_of
from kirsch.graph.plan import Plan, Removal, Skip
from kirsch.pruning.depth import BLOCK_IMPORTANCES
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.notes import changes, renewed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.verification import Verification

PLANS = "_kirsch_plans"
"""Attribute of a pruned model: the JSON of each plan that made it, so that `kirsch.save` can store them."""

SHAPES = "_kirsch_shapes"
"""Attribute of a pruned model: the shape of each parameter that the plans leave."""

OPTIMIZER_NOTE = "An optimizer made for the original still holds the original's parameters: make a new one."


@dataclass(frozen=True)
class Pruned:
    """What a removal gives back.

    Args:
        model: the new model.
        verification: how it was held against the masked original; None without verification.
        plan: what was removed, with the cost before and after, and the numbers of the model's own configuration.
        notes: what the caller must know.
        warnings: those of the notes that say what may go wrong later; `prune` raises each as a `UserWarning`.
    """

    model: Any
    verification: Verification | None
    plan: Plan
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@checked
def prune(model: Model, plan: Plan, *, example_inputs: Inputs | None = None, verify: bool = True) -> Any:
    """A new, ordinary model of the same class without what the plan removes; the given one is left as it is.

    Args:
        model: the model that the plan was made for, trained or not, in any mode and of any floating type.
        plan: of `kirsch.plan`, `Plan.read` or `Plan.from_json`. What it costs, and whether its goal is met, is computed
            anew from what it removes, so that a plan edited by hand may keep the figures it was made with.
        example_inputs: only needed when the plan comes from JSON and could not store its inputs.
        verify: hold the result against the masked original before it is returned.

    Returns:
        The pruned model. Mode, hooks, types, devices and requires_grad are those of the original. An optimizer made
        for the original still holds the original's parameters; make a new one.

    Warns:
        UserWarning: the model has `save_pretrained`, and no configuration describes the result, so that it raises an
            error from now on; or weights that are computed from others changed for the units that stay.

    Raises:
        PlanError: the plan is for another model, names what is not there, removes nothing, or states a cost of the
            original that is not its cost.
        VerificationError: the pruned model is not equal to the masked original; names the groups that go wrong.
    """
    found = prune_with_verification(model, plan, example_inputs=example_inputs, verify=verify)
    for text in found.warnings:
        warnings.warn(text, stacklevel=3)  # past the check of the arguments
    return found.model


@checked
def prune_with_verification(
    model: Model, plan: Plan, *, example_inputs: Inputs | None = None, verify: bool = True
) -> Pruned:
    """The same as `prune`, with the verification and the notes, in place of warnings."""
    graph = graph_of(model, plan, example_inputs)
    plan.check(graph)
    plan.check_cost(graph)
    try:
        found = _cut(model, plan, graph, verify=verify)
    except (VerificationError, UsageError, ModelError):
        if graph is not plan.graph and example_inputs is None:
            _check_inputs(model, plan)
        raise
    sizes = {} if verify else framework_of(model).reweighted(model, found.plan, graph)
    if not sizes:
        return found
    text = _reweighted(sizes)
    return replace(found, notes=(*found.notes, text), warnings=(*found.warnings, text))


def _check_inputs(model: Any, plan: Plan) -> None:
    """Make sure that a model runs on inputs like those a plan states, such as integers that index into a table.

    Raises:
        ModelError: it does not.
    """
    if plan.tracing.scope:
        return
    framework = framework_of(model)
    try:
        framework.count(model, framework.inputs_like(plan.inputs, model))
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"{plan.title} cannot be applied: the {plan.model} does not run on the inputs that it states.",
            error_text(error),
            "Correct shape, dtype and high of its inputs, or give example_inputs.",
        ) from error


def rebuilt(model: Any, plan: Plan, example_inputs: Any = None) -> Any:
    """A model cut by a plan that it was cut by before, without verification.

    The costs that the plan states may have been counted by another version of the framework, and are counted anew.
    """
    graph = graph_of(model, plan, example_inputs)
    plan.check(graph)
    return _cut(model, plan, graph, verify=False).model


def _cut(model: Any, stated: Plan, graph: Graph, *, verify: bool) -> Pruned:
    """The model without what a plan removes that fits the graph."""
    framework = framework_of(model)
    plan = renewed(stated, graph)
    keep = plan.keep(graph)
    empty = graph.emptied(keep)
    if empty is not None:
        raise PlanError(f"{plan.title} would leave too little of {empty[0]!r}.", fix="Leave more of its units.")
    try:
        pruned, verification = framework.prune(model, plan, graph, verify=verify)
    except VerificationError as error:
        raise _named(error, plan, lambda part: framework.prune(model, part, graph, verify=True)) from error
    if verification is not None and not verification.power and (plan.groups or plan.blocks):
        raise VerificationError(
            f"The pruned {graph.model_name} cannot be verified with these example inputs.",
            "Its outputs are the same whether the removed units are there or not, so that a wrong cut would pass.",
            "Give example inputs that the removed units matter for, or accept the cut unseen with "
            "kirsch.prune(..., verify=False).",
        )
    configuration, told, unsavable = framework.configure(pruned, model, plan, graph, verify=verify)
    plan = replace(plan, configuration=configuration)
    setattr(pruned, PLANS, [*getattr(model, PLANS, []), plan.to_json()])
    left = getattr(model, SHAPES, None)
    changed = left is not None and left != framework.parameter_shapes(model)  # then no plan makes this model
    setattr(pruned, SHAPES, left if changed else framework.parameter_shapes(pruned))
    until = "Until a configuration fits, save_pretrained and push_to_hub raise an error."
    warned = [f"{unsavable} {until}"] if unsavable else []
    if verification is not None and verification.reweighted:
        warned.append(_reweighted(verification.reweighted))
    notes = [*changes(stated, plan), *_unknown_importance(plan), *plan.notes, *told, *warned, OPTIMIZER_NOTE]
    if verification is not None and verification.unseen:
        modules = ", ".join(f"`{path}`" for path in verification.unseen)
        notes.append(
            f"For the example inputs no output depends on {modules}: the verification could not see a wrong cut there. "
            "Give inputs that differ from sample to sample and from token to token, if it is not that training alone "
            "runs them."
        )
    return Pruned(pruned, verification, plan, tuple(notes), tuple(warned))


def _unknown_importance(plan: Plan) -> list[str]:
    """Return a note if the importance that a plan names is not registered, as one of the user's own may not be here."""
    name, known = plan.method.get("importance"), [*IMPORTANCES, *BLOCK_IMPORTANCES]
    if name is None or name in known:
        return []
    unknown = f"{plan.title} names the importance {name!r}, which is not registered."
    return [" ".join(filter(None, [unknown, nearest(name, known), "What it lists is removed all the same."]))]


def _reweighted(sizes: Mapping[str, float], most: int = 3) -> str:
    """A note on computed weights that change for the units that stay."""
    ordered = sorted(sizes, key=lambda path: -abs(sizes[path] - 1))
    shown = ", ".join(f"`{path}` (to {sizes[path]:.2f} times its size)" for path in ordered[:most])
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (
        f"The weights of {shown}{more} are computed from whole parameters (spectral or weight normalization, "
        "standardization and the like), so that those of the kept units change when others go. Train the pruned model, "
        "or fold the computation into the weight before pruning: "
        "torch.nn.utils.parametrize.remove_parametrizations, or remove_spectral_norm and remove_weight_norm."
    )


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
        error.fix.replace("the layers that are unusual", names),
    )


def graph_of(model: Any, plan: Plan, example_inputs: Any) -> Graph:
    """The graph that a plan was made from if it still fits the model, else a new trace."""
    framework = framework_of(model)
    if plan.graph is not None and plan.graph.fits(model):
        return plan.graph
    if example_inputs is None and not plan.inputs:
        raise PlanError(
            f"{plan.title} does not store its example inputs.",
            "Only tensors, numbers, texts, None, and lists, tuples and dicts of them can be stored.",
            "Give the inputs that the plan was made with: example_inputs=...",
        )
    try:
        if example_inputs is not None:
            return framework.trace(model, example_inputs, plan.tracing)
        return framework.trace(model, framework.inputs_like(plan.inputs, model), plan.tracing, of_part=True)
    except UsageError as error:  # an output or a part that the plan names and the model does not have
        raise PlanError(
            f"{plan.title} cannot be applied: {error.what}",
            error.why,
            f"{error.fix} Check its tracing options.".strip(),
        ) from error
    except ModelError as error:
        if example_inputs is not None:
            raise
        raise ModelError(
            f"{plan.title} cannot be applied: {error.what}",
            error.why,
            f"{error.fix} Or correct the inputs that the plan states, or give example_inputs.".strip(),
        ) from error
