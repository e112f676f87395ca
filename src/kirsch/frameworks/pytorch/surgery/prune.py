"""Prune a model by a plan: cut or rewrite it, verify it against the masked original, and update its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import KirschError, VerificationError, error_text
from kirsch.frameworks.pytorch.analysis.program import user_line
from kirsch.frameworks.pytorch.inference.check import check_runs
from kirsch.frameworks.pytorch.inference.predict import Call
from kirsch.frameworks.pytorch.modules import submodule
from kirsch.frameworks.pytorch.surgery import cut as surgery
from kirsch.frameworks.pytorch.surgery import dropping, graph_module
from kirsch.frameworks.pytorch.transformers import configuration
from kirsch.frameworks.pytorch.verification import verify as verification
from kirsch.graph.constants import AS_GRAPH
from kirsch.graph.verification import UNUSUAL_LAYERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Plan
    from kirsch.graph.verification import Verification


def prune(model: nn.Module, plan: Plan, graph: Graph, *, verify: bool) -> tuple[nn.Module, Verification | None]:
    """Return a copy of the model without the units that the plan removes, and its verification.

    Args:
        model: model that was traced; it is not changed.
        plan, graph: plan to apply, and the graph of the model.
        verify: whether to compare the pruned model with the masked original.

    Raises:
        PlanError: the configuration in the plan cannot be a configuration of the model.
        VerificationError: the pruned model differs from the masked original, or does not run.
    """
    configuration.check(model, plan)
    keep, path = plan.keep(graph), graph.tracing.module
    part = submodule.part_of(model, path)
    pruned = (graph_module.graph_module if graph.tracing.as_graph else surgery.cut)(part, graph, keep)
    dropped = [block for block in graph.traced.blocks if block.path in plan.without]
    moved = dropping.drop(pruned, dropped, graph.traced.args, graph.traced.options) if dropped else None
    verified = verify_cut(pruned, part, graph, keep, plan.without, moved) if verify else None
    return submodule.with_part(model, path, pruned) if path else pruned, verified


def verify_cut(
    pruned: nn.Module, model: nn.Module, graph: Graph, keep: Any, without: Sequence[str] = (), moved: Any = None
) -> Verification:
    """Compare a pruned module with the masked original; see `verification.verify`.

    Raises:
        VerificationError: the modules differ, or the pruned one does not run; the message names comparisons in the
            model's code that may take another branch after the cut.
    """
    try:
        return verification.verify(pruned, model, graph, keep, without, moved)
    except VerificationError as error:
        turned = _changed_comparisons(graph, keep)
        if not turned:
            raise
        fix = f"Exclude {UNUSUAL_LAYERS}, or {AS_GRAPH}."
        raise VerificationError(error.what, f"{error.why}{turned}", fix) from error
    except KirschError:
        raise
    except Exception as error:  # the code of the model can raise any exception
        traced = graph.traced
        both = Call(traced.args, traced.options) if traced.args and traced.options else None
        check_runs(model, both or traced.options or traced.args)  # raises an error if the inputs are the cause
        line = user_line(error)
        at = f" The exception is raised at {line}." if line else ""
        raise VerificationError(
            f"The pruned {graph.model_name} does not run.",
            f"{error_text(error)}{at}{_changed_comparisons(graph, keep)}",
            f"Exclude {UNUSUAL_LAYERS}, and report the model. The original is unchanged."
            if graph.tracing.as_graph
            else f"Exclude {UNUSUAL_LAYERS}, or {AS_GRAPH}. The original is unchanged.",
        ) from error


def _changed_comparisons(graph: Graph, keep: Any) -> str:
    """Return a sentence on the comparisons in the model's code whose result changes with a cut; "" if none does."""
    lines = graph.turned(keep)
    if not lines:
        return ""
    several = len(lines) > 1
    return (
        f" The result{'s' * several} of the comparison{'s' * several} at {', '.join(lines[:3])} "
        f"change{'s' * (not several)} with the cut, so the forward may take another branch."
    )


def changed_computed_weights(model: nn.Module, plan: Plan, graph: Graph) -> dict[str, float]:
    """Return the modules whose computed weights change for the kept units; see `changed_weight_ratios`."""
    part = submodule.part_of(model, graph.tracing.module)
    return verification.computed_weight_ratios(part, graph, plan.keep(graph), torch.float64)


def configure(
    pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph, *, verify: bool
) -> tuple[dict[str, float], tuple[str, ...], str]:
    """Update the configuration of a pruned transformers model; see `configuration.configure`.

    Returns:
        New values of the configuration; notes; and the reason with a fix if no checkpoint can be saved, else "".
    """
    configured = configuration.configure(pruned, model, plan, graph, verify=verify)
    return configured.numbers, configured.notes, f"{configured.why} {configured.fix}".strip()
