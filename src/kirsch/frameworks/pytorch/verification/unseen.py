"""Find cut modules in which the units of the cut group have no effect on any output for the example inputs.

The output of attention over one token, or over equal tokens, does not depend on queries and keys, so that a wrong cut
of queries and keys would pass the verification. The gradients of the outputs show such modules.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kirsch.frameworks.pytorch.verification.masked import MaskedRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group, ParameterAxis

FAINT = 1e-6
"""Effects below this fraction of the largest effect are rounding errors. `verify` adds noise to the parameters
before the call, so real effects are above 1e-3 of the largest effect."""

Effects = dict["ParameterAxis", "NDArray[np.float64]"]
"""Axis of a tensor → for each index on it, the effect on the outputs."""


def unseen(
    graph: Graph, keep: NDArray[np.bool_], tensors: Mapping[str, torch.Tensor], inputs: list[Any]
) -> tuple[str, ...]:
    """Return the paths of modules in which the units of a cut group have no effect on any output.

    Args:
        graph: graph of the original.
        keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
        tensors: parameters and buffers of the original by path, in the dtype to compute in.
        inputs: the flat user inputs.

    Returns:
        Paths in the order of the groups. The result is also empty if no output is differentiable.

    Raises:
        RuntimeError: an operator has no derivative, or the gradients do not fit into memory.
    """
    effects = _effects(graph, tensors, inputs)
    threshold = FAINT * max((float(effect.max()) for effect in effects.values()), default=0.0)
    cut = [group for group in graph.groups if not keep[group.components].all()]
    return tuple(
        dict.fromkeys(
            path for group in cut for path in group.layers if _without_effect(group, path, graph, effects, threshold)
        )
    )


def _without_effect(group: Group, path: str, graph: Graph, effects: Effects, threshold: float) -> bool:
    """Return whether no unit of a group affects an output through the tensors of the module at a path."""
    in_group = np.zeros(len(graph.coupling.frozen), bool)
    in_group[group.components] = True
    axes = [axis for axis in group.footprint if axis in effects and axis[0].rpartition(".")[0] == path]
    of_units = [effects[axis][in_group[graph.coupling.component[graph.axes[axis]]]] for axis in axes]
    return bool(axes) and all(bool((effect <= threshold).all()) for effect in of_units)


def _effects(graph: Graph, tensors: Mapping[str, torch.Tensor], inputs: list[Any]) -> Effects:
    """Return the largest |gradient x value| for each index of each axis, for a random weighting of the outputs.

    Only axes of parameters have an effect: batch normalization has no derivative with respect to its buffers.
    """
    tied: dict[int, torch.Tensor] = {}
    leaves = {name: tied.setdefault(id(graph.tensors[name]), value.detach()) for name, value in tensors.items()}
    axes: dict[str, list[int]] = {}
    parameters = set(graph.parameters)
    for name, axis in graph.axes:
        if name in parameters and leaves[name].is_floating_point() and leaves[name].numel():
            axes.setdefault(name, []).append(axis)
    effects: Effects = {(name, axis): np.zeros(leaves[name].shape[axis]) for name in axes for axis in axes[name]}

    def record(name: str, leaf: torch.Tensor) -> None:
        effect = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * leaf).detach()
        effect = effect.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()
        leaf.grad = None  # so that the gradients of all tensors are never in memory at once
        for axis in axes[name]:
            rows = effect.movedim(axis, 0).reshape(effect.shape[axis], -1)
            effects[name, axis] = rows.amax(1).cpu().double().numpy()

    for name in axes:
        leaf: Any = leaves[name].requires_grad_()  # PyTorch does not annotate hooks
        leaf.register_post_accumulate_grad_hook(functools.partial(record, name))
    torch.manual_seed(0)
    outputs = MaskedRun(graph, graph.keep({}), leaves).outputs(inputs, gradients=True)
    differentiable = [out.abs() if out.is_complex() else out for out in outputs if out.requires_grad]
    if not differentiable:
        return {}
    sums = [torch.where(out.isfinite(), out * torch.rand_like(out), 0).sum() for out in differentiable]
    torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
    return effects
