"""Which channels of each place in a model its pruned version has kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import UsageError
from kirsch.frameworks.port import framework_of
from kirsch.graph.plan import Plan
from kirsch.pruning.prune import PLANS, graph_of, prune_with_verification

if TYPE_CHECKING:
    from kirsch.frameworks.port import Framework
    from kirsch.graph.graph import Graph


@dataclass(frozen=True)
class Kept:
    """The channels of one place that are left.

    Args:
        axis: of the channels, with the batch first; None where none has gone.
        indices: of the original's channels, in the order in which the pruned model has them; empty where none has gone.
    """

    axis: int | None = None
    indices: tuple[int, ...] = ()


def kept(small: Any, original: Any, *, example_inputs: Any = None) -> dict[str, Kept]:
    """Path of a module → the channels of what it puts out that a pruned model has kept.

    The plans that the pruned model carries are followed through the traces of the original: channels have their labels
    at every operation, and what a module puts out has those of its last one.

    Args:
        small: of `kirsch.prune`, trained further or not, or of `kirsch.load`; pruned once or several times.
        original: the model that it was made of.
        example_inputs: only needed where a plan could not store its own.

    Returns:
        The places in the order of the original's operations. Left out are modules that run several times, that put out
        several tensors, or of which several axes have lost something.

    Raises:
        UsageError: the small model was not pruned by Kirsch, lost whole blocks, or is a traced program.
        PlanError: the original is another model than the one that was pruned.
    """
    plans = [Plan.from_json(text) for text in getattr(small, PLANS, [])]
    if not plans:
        raise UsageError(
            f"This {type(small).__name__} was not pruned by Kirsch.",
            "It carries no plan that says which channels it has kept.",
            "Give what kirsch.prune or kirsch.load gave, and the original second.",
        )
    found: dict[str, Kept] | None = None
    for number, plan in enumerate(plans):
        if plan.blocks or plan.tracing.as_graph:
            why = "lost whole blocks" if plan.blocks else "is a traced program"
            raise UsageError(
                f"This {type(small).__name__} {why}, so that its places have other names than in the original.",
                fix="Name the places of both in terms of your own.",
            )
        graph = graph_of(original, plan, None if plan.inputs else example_inputs)
        plan.check(graph)
        step = _kept_by(framework_of(original), graph, plan)
        found = step if found is None else _after(found, step)
        if number + 1 < len(plans):
            original = prune_with_verification(original, plan, example_inputs=example_inputs, verify=False).model
    return found or {}


def _kept_by(framework: Framework, graph: Graph, plan: Plan) -> dict[str, Kept]:
    """What one plan keeps."""
    left, scope = plan.keep(graph), graph.tracing.scope
    found = {}
    for path, labeled in framework.put_out(graph).items():
        masks = {axis: graph.kept(labels, left) for axis, labels in enumerate(labeled.axes)}
        going = {axis: mask for axis, mask in masks.items() if mask is not None}
        whole = f"{scope}.{path}" if scope else path
        if not going:
            found[whole] = Kept()
        elif len(going) == 1:
            ((axis, mask),) = going.items()
            found[whole] = Kept(axis, tuple(np.flatnonzero(mask).tolist()))
    return found


def _after(first: dict[str, Kept], then: dict[str, Kept]) -> dict[str, Kept]:
    """What is left when one has followed the other; places of which two axes have lost something are left out."""
    found = {}
    for path, one in first.items():
        other = then.get(path)
        if other is None:
            continue
        if one.axis is None or other.axis is None:
            found[path] = one if other.axis is None else other
        elif one.axis == other.axis:
            found[path] = Kept(one.axis, tuple(one.indices[place] for place in other.indices))
    return found
