"""Removal of the units of a plan from a model, with verification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.arguments import checked
from kirsch.data.annotations import Calibration, Inputs, Model
from kirsch.errors import KirschError, ModelError, PlanError, UsageError, VerificationError, error_text, nearest
from kirsch.frameworks.find import framework_of
from kirsch.graph.plan import Plan, Removal, Skip
from kirsch.graph.verification import UNUSUAL_LAYERS
from kirsch.pruning.blocks import BLOCK_IMPORTANCES
from kirsch.pruning.compensation import Compensate, Compensation, check_data, check_model, methods_of
from kirsch.pruning.compensation import compensate as compensate_pruned
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.notes import change_notes, too_few_units, with_recomputed_costs
from kirsch.tables import Line, Part, Piece, Printable, notes
from kirsch.user_warnings import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.verification import Verification

PLANS = "_kirsch_plans"
"""Attribute of a pruned model: the JSON of each plan by which it was pruned. `kirsch.save` stores these plans."""

SHAPES = "_kirsch_shapes"
"""Attribute of a pruned model: the shape of each parameter after pruning by these plans."""

OPTIMIZER_NOTE = "An optimizer of the original still has the parameters of the original: make a new optimizer."


@dataclass(frozen=True)
class Pruned(Printable):
    """A pruned model with its verification, plan and notes; returned by `prune_with_verification`.

    Args:
        model: the pruned model.
        verification: comparison with the masked original; None without verification.
        plan: the removed units, with the cost before and after, and the numbers of the model's configuration.
        notes: notes on the plan and the result.
        warnings: the notes on possible later problems with the model; `prune` issues each as a `UserWarning`.
        compensation: what `compensate` changed, and the errors before and after; None without it. The verification is
            that of the model before compensation.
    """

    model: Any
    verification: Verification | None
    plan: Plan
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    compensation: Compensation | None = None

    def __repr__(self) -> str:
        """Return one line."""
        verified = self.verification.text if self.verification is not None else "not verified"
        return f"<kirsch.Pruned: {type(self.model).__name__}, {verified}>"

    def parts(self) -> list[Part]:
        """Return what was removed, the cost before and after, the verification and the notes."""
        count = sum(bool(removal.removed) for removal in self.plan.groups)
        blocks = f", {figures.counted(len(self.plan.blocks), 'block')} removed" if self.plan.blocks else ""
        title: Line = [
            Piece(self.plan.model, "strong"),
            Piece(f"   {figures.counted(count, 'group')} pruned{blocks}"),
        ]
        verification = self.verification.parts() if self.verification is not None else []
        compensation = self.compensation.parts() if self.compensation is not None else []
        return [title, self.plan.cost_table(), *verification, *compensation, notes(self.notes)]


@checked
def prune(
    model: Model,
    plan: Plan,
    *,
    example_inputs: Inputs | None = None,
    verify: bool = True,
    compensate: Compensate = None,
    data: Calibration | None = None,
) -> Any:
    """Return a new model of the same class without the units of the plan; the original is not changed.

    Args:
        model: the model of the plan, trained or not, in any mode and of any floating type.
        plan: result of `kirsch.plan`, `Plan.read` or `Plan.from_json`. Its costs are recomputed from the removed units
            and compared with its goal again, so they need not be corrected in a plan that is edited by hand.
        example_inputs: only needed if the plan comes from JSON and could not store its inputs.
        verify: whether to compare the outputs of the pruned model with those of the masked original.
        compensate: how the kept weights are changed after the verification, without training, so that the outputs are
            closer to those of the original: "least_squares" fits the weights and biases of the layers that have lost
            inputs; "bias" changes only their biases; "batch_norm" estimates the statistics of batch normalization
            again. A list combines methods, such as ["least_squares", "batch_norm"]; None: no change. See
            docs/compensation.md.
        data: calibration data for `compensate`: batches of inputs, with or without labels; 256 samples suffice.

    Returns:
        The pruned model. Mode, hooks, types, devices and requires_grad are those of the original. An optimizer of the
        original still has the parameters of the original; make a new optimizer.

    Warns:
        UserWarning: the model has `save_pretrained`, and no configuration describes the result, so that
            `save_pretrained` raises an error. Or the weights of kept units changed, because they are computed from all
            units, as in spectral normalization. Or compensation has left out layers, or has increased the error.

    Raises:
        UsageError: `compensate` or `data` are wrong, or do not fit the model.
        PlanError: the plan is for another model, names unknown groups or units, removes nothing, or states a wrong
            cost of the original.
        VerificationError: the outputs of the pruned model and the masked original differ; the message names the groups.
    """
    result = prune_with_verification(
        model, plan, example_inputs=example_inputs, verify=verify, compensate=compensate, data=data
    )
    for text in result.warnings:
        warn(text)
    return result.model


@checked
def prune_with_verification(
    model: Model,
    plan: Plan,
    *,
    example_inputs: Inputs | None = None,
    verify: bool = True,
    compensate: Compensate = None,
    data: Calibration | None = None,
) -> Pruned:
    """Prune as `prune` does, and return verification and notes with the model instead of issuing warnings."""
    methods = methods_of(compensate)
    check_data(methods, data)
    check_model(methods, model, plan)
    graph = graph_of(model, plan, example_inputs)
    plan.check(graph)
    plan.check_cost(graph)
    try:
        result = _cut(model, plan, graph, verify=verify)
    except (VerificationError, UsageError, ModelError):
        if graph is not plan.graph and example_inputs is None:
            _check_inputs(model, plan)
        raise
    sizes = {} if verify else framework_of(model).surgery.changed_computed_weights(model, result.plan, graph)
    if sizes:
        result = _with_warnings(result, [_reweighted_note(sizes)])
    if not methods:
        return result
    compensation = compensate_pruned(result.model, result.plan, graph, methods, data)
    return replace(_with_warnings(result, compensation.notes), compensation=compensation)


def _with_warnings(result: Pruned, texts: Sequence[str]) -> Pruned:
    return replace(result, notes=(*result.notes, *texts), warnings=(*result.warnings, *texts))


def _check_inputs(model: Any, plan: Plan) -> None:
    """Check that the model runs on inputs with the stated shapes, types and integer ranges of the plan.

    Raises:
        ModelError: the model raises an error.
    """
    if plan.tracing.module:
        return
    framework = framework_of(model)
    try:
        framework.analysis.count(model, framework.analysis.inputs_like(plan.inputs, model))
    except Exception as error:  # the code of the model may raise anything
        raise ModelError(
            f"{plan.title} cannot be applied: the {plan.model} does not run on the inputs of the plan.",
            error_text(error),
            "Correct shape, dtype and high of the inputs in the plan, or give example_inputs.",
        ) from error


def rebuilt(model: Any, plan: Plan, example_inputs: Any = None) -> Any:
    """Return a model pruned again by a plan of an earlier pruning, without verification.

    The costs of the plan are recomputed, since they may have been counted by another version of the framework.
    """
    graph = graph_of(model, plan, example_inputs)
    plan.check(graph)
    return _cut(model, plan, graph, verify=False).model


def _cut(model: Any, stated: Plan, graph: Graph, *, verify: bool) -> Pruned:
    """Return the model without the units of a plan that fits the graph."""
    framework = framework_of(model)
    plan = with_recomputed_costs(stated, graph)
    keep = plan.keep(graph)
    found = graph.too_small(keep)
    if found is not None:
        raise PlanError(too_few_units(plan.title, *found), fix="Keep more of its units.")
    try:
        pruned, verification = framework.surgery.prune(model, plan, graph, verify=verify)
    except VerificationError as error:
        raise _error_with_groups(
            error, plan, lambda part: framework.surgery.prune(model, part, graph, verify=True)
        ) from error
    if verification is not None and not verification.power and (plan.groups or plan.blocks):
        raise VerificationError(
            f"The pruned {graph.model_name} cannot be verified with these example inputs.",
            "Its outputs do not depend on the removed units, so that a wrong removal would not be detected.",
            "Give example inputs for which the outputs depend on the removed units, or skip the verification with "
            "kirsch.prune(..., verify=False).",
        )
    configuration, configuration_notes, unsavable = framework.surgery.configure(
        pruned, model, plan, graph, verify=verify
    )
    plan = replace(plan, configuration=configuration)
    setattr(pruned, PLANS, [*getattr(model, PLANS, []), plan.to_json()])
    shapes = getattr(model, SHAPES, None)
    # If the model was changed after an earlier pruning, no plan restores it. The earlier shapes make `save` refuse it.
    changed = shapes is not None and shapes != framework.inference.parameter_shapes(model)
    setattr(pruned, SHAPES, shapes if changed else framework.inference.parameter_shapes(pruned))
    consequence = "Until a configuration fits, save_pretrained and push_to_hub raise an error."
    warning_notes = [f"{unsavable} {consequence}"] if unsavable else []
    texts = [*change_notes(stated, plan), *_unknown_importance(plan), *plan.notes, *configuration_notes]
    if verification is not None:
        warning_notes += [_reweighted_note(verification.reweighted)] if verification.reweighted else []
        texts += [*_unseen_note(verification), *_undetermined_note(verification)]
    return Pruned(pruned, verification, plan, (*texts, *warning_notes, OPTIMIZER_NOTE), tuple(warning_notes))


def _unseen_note(verification: Verification) -> list[str]:
    """Return a note on the modules in which the verification does not detect a wrong removal."""
    if not verification.unseen:
        return []
    modules = ", ".join(f"`{path or 'the model itself'}`" for path in verification.unseen)
    note = (
        f"For the example inputs {modules} hardly affect the outputs: the verification may not detect a wrong removal "
        "in these modules. If they are used in inference, give inputs that differ between samples and between tokens."
    )
    return [note]


def _undetermined_note(verification: Verification) -> list[str]:
    """Return a note if the modules in which a wrong removal is not detected could not be determined."""
    if not verification.undetermined:
        return []
    note = (
        f"Modules without effect on the outputs could not be determined: {verification.undetermined} The verification "
        "does not detect a wrong removal in such modules. If the memory is not sufficient, give fewer or smaller "
        "example inputs."
    )
    return [note]


def _unknown_importance(plan: Plan) -> list[str]:
    """Return a note if the importance of a plan is not registered; the user may have registered it elsewhere."""
    name, known = plan.method.get("importance"), [*IMPORTANCES, *BLOCK_IMPORTANCES]
    if name is None or name in known:
        return []
    unknown = f"{plan.title} names the importance {name!r}, which is not registered."
    return [" ".join(filter(None, [unknown, nearest(name, known), "The listed units are removed anyway."]))]


def _reweighted_note(sizes: Mapping[str, float], most: int = 3) -> str:
    """Return a note on computed weights that change for the kept units."""
    ordered = sorted(sizes, key=lambda path: -abs(sizes[path] - 1))
    shown = ", ".join(
        f"`{path or 'the model itself'}` ({sizes[path]:.2f} times the original)" for path in ordered[:most]
    )
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (
        f"The weights of {shown}{more} are computed from all units of a parameter (spectral or weight normalization, "
        "standardization and the like), so that removing units changes the weights of the kept units. Train the pruned "
        "model, or fold the computation into the weight before pruning: "
        "torch.nn.utils.parametrize.remove_parametrizations, or remove_spectral_norm and remove_weight_norm."
    )


def _error_with_groups(error: VerificationError, plan: Plan, cut: Callable[[Plan], Any]) -> VerificationError:
    """Return the error with the smallest part of the plan that fails by itself, found by repeated halving."""

    def fails(part: Sequence[Removal | Skip]) -> bool:
        groups = tuple(item for item in part if isinstance(item, Removal))
        blocks = tuple(item for item in part if isinstance(item, Skip))
        try:
            cut(replace(plan, groups=groups, blocks=blocks))
        except KirschError:
            return True
        return False

    part: Sequence[Removal | Skip] = [*plan.groups, *plan.blocks]
    if fails([]):  # the removal of units is not the cause
        return error
    while len(part) > 1:
        halves = part[: len(part) // 2], part[len(part) // 2 :]
        failing = next((half for half in halves if fails(half)), None)
        if failing is None:
            break
        part = failing
    names = ", ".join(repr(item.name) for item in part[:3]) + (f" and {len(part) - 3} more" if len(part) > 3 else "")  # noqa: PLR2004 - three are named
    return VerificationError(
        error.what,
        f"{error.why} The removal of {names} by itself fails{'' if len(part) == 1 else ', and no half of it does'}.",
        error.fix.replace(UNUSUAL_LAYERS, names),
    )


def graph_of(model: Any, plan: Plan, example_inputs: Any) -> Graph:
    """Return the graph of the plan if it fits the model, else a new trace."""
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
            return framework.analysis.trace(model, example_inputs, plan.tracing)
        return framework.analysis.trace(
            model, framework.analysis.inputs_like(plan.inputs, model), plan.tracing, of_part=True
        )
    except (UsageError, ModelError) as error:
        if plan.model != type(model).__name__ and not plan.tracing.module:
            raise PlanError(
                f"{plan.title} is for {plan.model}, and the model given is {type(model).__name__}.",
                f"It cannot be applied: {error.what} {error.why}".strip(),
                f"Give the {plan.model} that the plan was made for.",
            ) from error
        if isinstance(error, UsageError):  # the model lacks an output or a part that the plan names
            raise PlanError(
                f"{plan.title} cannot be applied: {error.what}",
                error.why,
                f"{error.fix} Check the tracing options of the plan.".strip(),
            ) from error
        if example_inputs is not None:
            raise
        raise ModelError(
            f"{plan.title} cannot be applied: {error.what}",
            error.why,
            f"{error.fix} Or correct the inputs of the plan, or give example_inputs.".strip(),
        ) from error
