"""A pruned model on disk: its plans and its weights. No pickle."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import files
from kirsch.errors import CheckpointError, ModelError, PlanError, UsageError
from kirsch.frameworks.port import framework_of
from kirsch.graph.plan import Plan
from kirsch.pruning.prune import PLANS, rebuilt

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHTS = "model.safetensors"


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
    """The model that was saved, bit for bit.

    Args:
        folder: of `save`.
        build: makes the original architecture, before any pruning; its weights do not matter.

    Raises:
        CheckpointError: a file is missing or damaged; names it.
        PlanError: `build` makes another model than the one that was pruned.
    """
    source = Path(folder)
    wrong = files.damage(source)
    if wrong:
        raise CheckpointError(f"The saved model {source} is damaged.", f"{wrong}.", "Save it again.")
    model = build()
    number = 1
    while (source / _plan_name(number)).is_file():
        model = _pruned(model, Plan.read(source / _plan_name(number)))
        number += 1
    if number == 1:
        raise PlanError(f"{source} holds no plan.json.", mend="Give a folder made by kirsch.save.")
    framework_of(model).load_weights(model, source / WEIGHTS)
    return model


def _pruned(model: Any, plan: Plan) -> Any:
    """The model cut by a plan, without verification: its weights are still to come, and were verified back then."""
    try:
        return rebuilt(model, plan)
    except (PlanError, ModelError):
        if not plan.inputs or plan.tracing.scope:
            raise
        # Some fill their buffers in their first run, and the model that was pruned had run before.
        framework = framework_of(model)
        with contextlib.suppress(Exception):
            framework.count(model, framework.inputs_like(plan.inputs))
        return rebuilt(model, plan)


def _plan_name(number: int) -> str:
    return "plan.json" if number == 1 else f"plan.{number}.json"
