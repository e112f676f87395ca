"""Storage of pruned models: plans as JSON and weights as safetensors, without pickle."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

from kirsch import files
from kirsch.arguments import checked
from kirsch.data.annotations import Build, Inputs, Model
from kirsch.errors import CheckpointError, KirschError, ModelError, PlanError, UsageError, error_text
from kirsch.frameworks.find import framework_of
from kirsch.graph.plan import Plan
from kirsch.pruning.prune import PLANS, SHAPES, rebuilt

WEIGHTS = "model.safetensors"
MAX_NAMED = 5


@checked
def save(model: Model, folder: str | Path) -> Path:
    """Save a pruned or sparse model to a folder: plan.json, model.safetensors, manifest.json.

    Args:
        model: result of `kirsch.prune`, pruned once or several times; further plans are plan.2.json, ... Or a model
            with masks of `kirsch.sparsify`, pruned or not; the masks are folded into the stored weights. The
            folder of a model that was not pruned has no plan.json.
        folder: written atomically; an older folder is replaced.

    Returns:
        The folder.

    Raises:
        UsageError: the model was neither pruned by `kirsch.prune` nor has it masks; or its layers were changed after
            pruning, so that `load` could not restore it.
        OutputError: the folder cannot be written.
    """
    masking = framework_of(model).masking
    has_masks = bool(masking.masks(model))
    model = masking.fold(model) if has_masks else model
    plans = getattr(model, PLANS, [])
    if not plans and getattr(getattr(model, "module", None), PLANS, None):
        raise UsageError(
            f"This {type(model).__name__} wraps the model that Kirsch pruned.",
            fix="Save the model inside: kirsch.save(model.module, folder).",
        )
    if not plans and not has_masks:
        raise UsageError(
            f"This {type(model).__name__} was not pruned by Kirsch, and has no masks.",
            "Its architecture cannot be restored without a plan.",
            "Save its state_dict with safetensors instead.",
        )
    _require_unchanged(model)
    target = Path(folder)
    with files.new_folder(target) as new:
        for number, plan in enumerate(plans, start=1):
            files.write_text(new / _plan_name(number), plan)
        framework_of(model).inference.save_weights(model, new / WEIGHTS)
    return target


def _require_unchanged(model: Any) -> None:
    """Check that the parameters have the shapes that they had after pruning; `load` cannot restore later changes."""
    expected: dict[str, tuple[int, ...]] = getattr(model, SHAPES, {})
    current = framework_of(model).inference.parameter_shapes(model)
    names = {**expected, **current} if expected else {}
    changed = next((name for name in names if expected.get(name) != current.get(name)), None)
    if changed is not None:
        shapes = [
            f"the shape {known[changed]}" if changed in known else "no such parameter" for known in (expected, current)
        ]
        raise UsageError(
            f"This {type(model).__name__} was changed after kirsch.prune: it had {shapes[0]} at {changed!r}, and has "
            f"{shapes[1]}.",
            "kirsch.load builds the original and prunes it by the plan, which restores the model before the change.",
            "Undo the change (unwrap the model, merge its adapters), make it before pruning, or save the state_dict.",
        )


@checked
def load(folder: str | Path, build: Build, *, example_inputs: Inputs | None = None) -> Any:
    """Return a saved model in inference mode, with exactly the saved weights and types.

    The mode is not stored. A model in training mode would apply dropout and update the statistics of its batch
    normalization in its first forward. `kirsch.distill` sets training mode itself; in your own training loop, call
    `model.train()` first.

    Args:
        folder: written by `save`; contains exactly the files that `save` wrote.
        build: returns the original architecture, before pruning and without masks, with any weights and floating types.
        example_inputs: only needed if the plan could not store its example inputs (objects of other classes, or values
            that decide which branch the forward takes); see `kirsch.trace`.

    Returns:
        The pruned or sparse model in inference mode, without masks, on the device of the model that `build` returns.

    Raises:
        CheckpointError: a file is missing, damaged or not written by `save`; the message names it.
        LoadError: the weights do not fit the model; the message has tensors, shapes and types.
        ModelError: `build` raises an error or does not return a model.
        PlanError: `build` returns another model than the one that was pruned, or `example_inputs` are needed.
    """
    source = Path(folder)
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is a file." if source.exists() else f"The folder {source} does not exist.",
            "A model is loaded from a folder that kirsch.save wrote.",
            f"Give the folder of the file, {source.parent}." if source.exists() else "Check the path.",
        )
    if not (source / files.MANIFEST).exists() and not (source / _plan_name(1)).exists():
        raise CheckpointError(
            f"{source} does not contain a model of kirsch.save.", fix="Give a folder written by kirsch.save."
        )
    flaw = files.first_flaw(source)
    if flaw:
        raise CheckpointError(
            f"The saved model {source} is damaged.", f"{flaw}.", "Save it again; keep other files elsewhere."
        )
    names = files.entries(source).keys()
    plans = [_plan_name(number) for number in range(1, len(names))]  # one of the files has the weights
    if names != {WEIGHTS, *plans}:
        raise CheckpointError(
            f"{source} does not contain a model of kirsch.save.",
            f"It has {', '.join(sorted(names)[:MAX_NAMED])}; expected {WEIGHTS} and plan.json, plan.2.json, …",
            "Give a folder written by kirsch.save.",
        )
    model = _restored(build, [Plan.read(source / name) for name in plans], source / WEIGHTS, example_inputs)
    framework = framework_of(model)
    framework.inference.match_dtypes(model, source / WEIGHTS)
    framework.inference.load_weights(model, source / WEIGHTS)
    return framework.inference.inference_mode(model)


def _restored(build: Build, plans: list[Plan], weights: Path, example_inputs: Any) -> Any:
    """Return the original architecture, pruned by the plans one after the other."""

    def cut(model: Any, plan: Plan) -> Any:
        return _pruned(model, plan, example_inputs)

    try:
        return functools.reduce(cut, plans, _build_model(build))
    except KirschError:
        model = _build_model(build)  # the pruned model, and the inputs of its plan, may have other dtypes
        if not framework_of(model).inference.match_dtypes(model, weights):
            raise
    return functools.reduce(cut, plans, model)


def _build_model(build: Build) -> Any:
    """Return the original architecture."""
    fix = "Give a function without arguments that returns the model as it was before pruning."
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
    """Return the model pruned by a plan, without verification, since the weights are loaded later."""

    def cut() -> Any:
        return rebuilt(model, plan, example_inputs)

    try:
        return cut()
    except (PlanError, ModelError):
        if plan.tracing.module or (example_inputs is None and not plan.inputs):
            raise
    # Some models fill their buffers in their first run. The original had run before it was pruned, and only a model
    # with filled buffers fits the plan, so the new model is run, too.
    framework = framework_of(model)
    with contextlib.suppress(Exception):
        inputs = framework.analysis.inputs_like(plan.inputs, model) if example_inputs is None else example_inputs
        framework.analysis.count(model, inputs)
    try:
        return cut()
    except (PlanError, ModelError) as error:
        if example_inputs is not None or plan.tracing.decisions != "example":
            raise
        raise PlanError(
            error.what,
            f"{error.why} The values of the example inputs selected the branches of the plan, and are not stored.",
            "Give these inputs: kirsch.load(folder, build, example_inputs=...).",
        ) from error


def is_saved(folder: Path) -> bool:
    """Return whether a folder holds a saved model: its plan, its weights and its manifest."""
    return all((folder / name).is_file() for name in (_plan_name(1), "model.safetensors", files.MANIFEST))


def last_plan(folder: Path) -> Path:
    """Return the path of the plan of the last pruning in the folder of a saved model."""
    number = 1
    while (folder / _plan_name(number + 1)).exists():
        number += 1
    return folder / _plan_name(number)


def _plan_name(number: int) -> str:
    return "plan.json" if number == 1 else f"plan.{number}.json"
