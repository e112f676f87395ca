"""Channels that a pruned model has kept, for each module of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import UsageError
from kirsch.graph.plan import Plan
from kirsch.pruning.prune import PLANS, graph_of, prune_with_verification

if TYPE_CHECKING:
    from kirsch.graph.graph import Graph


@dataclass(frozen=True)
class Kept:
    """Kept channels of the output of one module.

    Args:
        axis: axis of the channels in the output, which includes the batch axis; None if no channel was removed.
        indices: kept channels of the original, in the order of the pruned model; empty if no channel was removed.
    """

    axis: int | None = None
    indices: tuple[int, ...] = ()


def kept_output_channels(small: Any, original: Any, *, example_inputs: Any = None) -> dict[str, Kept]:
    """Return the kept output channels of a pruned model, by module path.

    The plans that the pruned model stores are applied to traces of the original.

    Args:
        small: result of `kirsch.prune` or `kirsch.load`, pruned once or several times, trained further or not.
        original: the model before pruning.
        example_inputs: only needed if a plan does not store its example inputs.

    Returns:
        The modules in the order of the original's operations, except modules that run several times, that return
        several tensors, or whose output was pruned on several axes.

    Raises:
        UsageError: the small model was not pruned by Kirsch, lost residual blocks, or is a traced program.
        PlanError: the original is not the model that was pruned.
    """
    plans = [Plan.from_json(text) for text in getattr(small, PLANS, [])]
    if not plans:
        raise UsageError(
            f"This {type(small).__name__} was not pruned by Kirsch.",
            "It stores no plan with the kept channels.",
            "Give the model that kirsch.prune or kirsch.load returned first, and the original second.",
        )
    result: dict[str, Kept] | None = None
    for number, plan in enumerate(plans):
        if plan.blocks or plan.tracing.as_graph:
            why = "lost residual blocks" if plan.blocks else "is a traced program"
            raise UsageError(
                f"This {type(small).__name__} {why}, so that its layers have other names than in the original.",
                fix="Write terms that name the layers of both models, instead of kirsch.recovery.",
            )
        graph = graph_of(original, plan, None if plan.inputs else example_inputs)
        plan.check(graph)
        step = _kept_by_plan(graph, plan)
        result = step if result is None else _composed(result, step)
        if number + 1 < len(plans):
            original = prune_with_verification(original, plan, example_inputs=example_inputs, verify=False).model
    return result or {}


def _kept_by_plan(graph: Graph, plan: Plan) -> dict[str, Kept]:
    """Return the channels that one plan keeps."""
    keep, module = plan.keep(graph), graph.tracing.module
    result = {}
    single = {path: outputs[0] for path, outputs in graph.module_outputs().items() if len(outputs) == 1}
    for path, labeled in single.items():
        masks = {axis: graph.kept(labels, keep) for axis, labels in enumerate(labeled.axes)}
        pruned_axes = {axis: mask for axis, mask in masks.items() if mask is not None}
        full_path = f"{module}.{path}" if module else path
        if not pruned_axes:
            result[full_path] = Kept()
        elif len(pruned_axes) == 1:
            ((axis, mask),) = pruned_axes.items()
            result[full_path] = Kept(axis, tuple(np.flatnonzero(mask).tolist()))
    return result


def _composed(first: dict[str, Kept], second: dict[str, Kept]) -> dict[str, Kept]:
    """Return the channels kept by two steps of pruning, without modules that were pruned on two axes."""
    result = {}
    for path, before in first.items():
        after = second.get(path)
        if after is None:
            continue
        if before.axis is None or after.axis is None:
            result[path] = before if after.axis is None else after
        elif before.axis == after.axis:
            result[path] = Kept(before.axis, tuple(before.indices[index] for index in after.indices))
    return result
