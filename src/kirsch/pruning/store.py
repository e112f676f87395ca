"""A pruned model on disk: its plans and its weights. No pickle."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

from kirsch import files
from kirsch.arguments import checked
from kirsch.errors import CheckpointError, KirschError, ModelError, PlanError, UsageError, error_text
from kirsch.frameworks.annotations import Build, Inputs, Model
from kirsch.frameworks.port import framework_of
from kirsch.graph.plan import Plan
from kirsch.pruning.prune import PLANS, SHAPES, rebuilt

WEIGHTS = "model.safetensors"
MOST_NAMED = 5


@checked
def save(model: Model, folder: str | Path) -> Path:
    """Write a model that `kirsch.prune` made: plan.json, model.safetensors, manifest.json.

    Args:
        model: pruned once or several times; further plans are plan.2.json, ...
        folder: appears whole or not at all; an older one is replaced.

    Returns:
        The folder.

    Raises:
        UsageError: the model was not made by `kirsch.prune`, or its layers were changed since, so that `load` could not
            make it again.
        OutputError: the folder cannot be written.
    """
    plans = getattr(model, PLANS, None)
    if not plans:
        raise UsageError(
            f"This {type(model).__name__} was not pruned by Kirsch.",
            "Without a plan its architecture cannot be made again.",
            "Save its state_dict with safetensors instead.",
        )
    _require_unchanged(model)
    target = Path(folder)
    with files.new_folder(target) as new:
        for number, plan in enumerate(plans, start=1):
            files.write_text(new / _plan_name(number), plan)
        framework_of(model).save_weights(model, new / WEIGHTS)
    return target


def _require_unchanged(model: Any) -> None:
    """Make sure that the parameters are those that pruning left, of which alone `load` can make the model again."""
    left: dict[str, tuple[int, ...]] = getattr(model, SHAPES, {})
    now = framework_of(model).parameter_shapes(model)
    other = next((name for name in {**left, **now} if left.get(name) != now.get(name)), None) if left else None
    if other is not None:
        shapes = [f"the shape {found[other]}" if other in found else "no such parameter" for found in (left, now)]
        raise UsageError(
            f"This {type(model).__name__} was changed after kirsch.prune: it had {shapes[0]} at {other!r}, and has "
            f"{shapes[1]}.",
            "kirsch.load builds the original and prunes it by the plan, which gives the model before that change.",
            "Undo it (unwrap the model, merge its adapters), make it before pruning, or save the state_dict itself.",
        )


@checked
def load(folder: str | Path, build: Build, *, example_inputs: Inputs | None = None) -> Any:
    """Return the model that was saved, bit for bit, in its types and in inference mode.

    The mode is not stored. A model in training mode would drop activations at random and update the statistics of its
    batch normalization at its first forward. `kirsch.distill` sets training mode itself; in a loop of your own call
    `model.train()` first.

    Args:
        folder: of `save`; it holds exactly the files that `save` wrote.
        build: makes the original architecture, before any pruning; its weights and floating types do not matter.
        example_inputs: only needed where the plan could not store those that it was made with (objects of a class of
            their own, or values that decide which way the forward takes); see `kirsch.trace`.

    Returns:
        The pruned model in inference mode, on the device of what `build` returns, whatever mode that has.

    Raises:
        CheckpointError: a file is missing, damaged or not one of `save`; names it.
        LoadError: the weights do not fit the model; names tensors, shapes and types.
        ModelError: `build` raises an error or does not return a model.
        PlanError: `build` makes another model than the one that was pruned, or `example_inputs` are needed.
    """
    source = Path(folder)
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is a file." if source.exists() else f"The folder {source} does not exist.",
            "A model is loaded from the folder that kirsch.save wrote.",
            f"Give its folder, {source.parent}." if source.exists() else "Check the path.",
        )
    if not (source / files.MANIFEST).exists() and not (source / _plan_name(1)).exists():
        raise CheckpointError(f"{source} holds no model of kirsch.save.", fix="Give a folder made by kirsch.save.")
    wrong = files.first_flaw(source)
    if wrong:
        raise CheckpointError(
            f"The saved model {source} is damaged.", f"{wrong}.", "Save it again; keep other files elsewhere."
        )
    names = files.entries(source).keys()
    plans = [_plan_name(number) for number in range(1, len(names))]  # beside them are the weights
    if names != {WEIGHTS, *plans} or not plans:
        raise CheckpointError(
            f"{source} holds no model of kirsch.save.",
            f"It has {', '.join(sorted(names)[:MOST_NAMED])}, where {WEIGHTS} and plan.json, plan.2.json, … belong.",
            "Give a folder made by kirsch.save.",
        )
    cuts = [Plan.read(source / name) for name in plans]
    model = _rebuilt(build, cuts, source / WEIGHTS, example_inputs)
    framework = framework_of(model)
    framework.take_types(model, source / WEIGHTS)
    framework.load_weights(model, source / WEIGHTS)
    return framework.inferring(model)


def _rebuilt(build: Build, plans: list[Plan], weights: Path, example_inputs: Any) -> Any:
    """The original architecture cut by its plans, one after the other."""

    def cut(model: Any, plan: Plan) -> Any:
        return _pruned(model, plan, example_inputs)

    try:
        return functools.reduce(cut, plans, _built(build))
    except KirschError:
        model = _built(build)  # it may have been pruned in other types, and run on inputs of those
        if not framework_of(model).take_types(model, weights):
            raise
    return functools.reduce(cut, plans, model)


def _built(build: Build) -> Any:
    """The original architecture."""
    fix = "Give a function without arguments that returns the model as it was before it was pruned."
    try:
        model = build()
    except KirschError:
        raise
    except Exception as error:
        raise ModelError("The function build of kirsch.load raised an error.", error_text(error), fix) from error
    try:
        framework_of(model)
    except ModelError as error:
        found = "None" if model is None else f"a {type(model).__name__}"
        raise ModelError(f"The function build of kirsch.load returned {found}.", error.why, fix) from error
    return model


def _pruned(model: Any, plan: Plan, example_inputs: Any) -> Any:
    """The model cut by a plan, without verification: its weights are still to come, and were verified back then."""

    def cut() -> Any:
        return rebuilt(model, plan, example_inputs)

    try:
        return cut()
    except (PlanError, ModelError):
        if plan.tracing.scope or (example_inputs is None and not plan.inputs):
            raise
    # Some fill their buffers in their first run, and the model that was pruned had run before.
    framework = framework_of(model)
    with contextlib.suppress(Exception):
        inputs = framework.inputs_like(plan.inputs, model) if example_inputs is None else example_inputs
        framework.count(model, inputs)
    try:
        return cut()
    except (PlanError, ModelError) as error:
        if example_inputs is not None or plan.tracing.decisions != "example":
            raise
        raise PlanError(
            error.what,
            f"{error.why} The plan follows the way that its example inputs took, and stores none of their values.",
            "Give these inputs: kirsch.load(folder, build, example_inputs=...).",
        ) from error


def _plan_name(number: int) -> str:
    return "plan.json" if number == 1 else f"plan.{number}.json"
