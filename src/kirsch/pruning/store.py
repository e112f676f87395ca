"""A pruned model on disk: its plans and its weights. No pickle."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import files
from kirsch.errors import CheckpointError, KirschError, ModelError, PlanError, UsageError
from kirsch.frameworks.port import framework_of
from kirsch.graph.plan import Plan
from kirsch.pruning.prune import PLANS, prune

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHTS = "model.safetensors"
MOST_NAMED = 5


def save(model: Any, folder: str | Path) -> Path:
    """Write a model that `kirsch.prune` made: plan.json, model.safetensors, manifest.json.

    Args:
        model: pruned once or several times; further plans are plan.2.json, ...
        folder: appears whole or not at all; an older one is replaced.

    Returns:
        The folder.

    Raises:
        UsageError: the model was not made by `kirsch.prune`.
        OutputError: the folder cannot be written.
    """
    plans = getattr(model, PLANS, None)
    if not plans:
        raise UsageError(
            f"This {type(model).__name__} was not pruned by Kirsch.",
            "Without a plan its architecture cannot be made again.",
            "Save its state_dict with safetensors instead.",
        )
    target = Path(folder)
    with files.new_folder(target) as new:
        for number, plan in enumerate(plans, start=1):
            files.write_text(new / _plan_name(number), plan)
        framework_of(model).save_weights(model, new / WEIGHTS)
    return target


def load(folder: str | Path, build: Callable[[], Any]) -> Any:
    """The model that was saved, bit for bit and in its types.

    Args:
        folder: of `save`; it holds exactly the files that `save` wrote.
        build: makes the original architecture, before any pruning; its weights and floating types do not matter.

    Raises:
        CheckpointError: a file is missing, damaged or not one of `save`; names it.
        LoadError: the weights do not fit the model; names tensors, shapes and types.
        PlanError: `build` makes another model than the one that was pruned.
    """
    source = Path(folder)
    wrong = files.damage(source)
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
    cuts = [Plan.from_json((source / name).read_text(encoding="utf-8")) for name in plans]
    model = _rebuilt(build, cuts, source / WEIGHTS)
    framework = framework_of(model)
    framework.take_types(model, source / WEIGHTS)
    framework.load_weights(model, source / WEIGHTS)
    return model


def _rebuilt(build: Callable[[], Any], plans: list[Plan], weights: Path) -> Any:
    """The original architecture cut by its plans, one after the other."""
    try:
        return functools.reduce(_pruned, plans, build())
    except KirschError:
        model = build()  # it may have been pruned in other types, and run on inputs of those
        if not framework_of(model).take_types(model, weights):
            raise
    return functools.reduce(_pruned, plans, model)


def _pruned(model: Any, plan: Plan) -> Any:
    """The model cut by a plan, without verification: its weights are still to come, and were verified back then."""
    try:
        return prune(model, plan, verify=False)
    except (PlanError, ModelError):
        if not plan.inputs or plan.tracing.scope:
            raise
        # Some fill their buffers in their first run, and the model that was pruned had run before.
        framework = framework_of(model)
        with contextlib.suppress(Exception):
            framework.count(model, framework.inputs_like(plan.inputs))
        return prune(model, plan, verify=False)


def _plan_name(number: int) -> str:
    return "plan.json" if number == 1 else f"plan.{number}.json"
