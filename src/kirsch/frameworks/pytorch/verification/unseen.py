"""What the example inputs do not show: modules that lose units on which no output depends for them.

Of one token, or of tokens that are all the same, attention puts out the same whatever its queries and keys are, so that
a wrong cut of them would pass. The gradient tells.
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
"""Rounding, as a part of the largest effect; noise in the verification keeps others within a thousandth or so."""

Reach = dict["ParameterAxis", "NDArray[np.float64]"]


def unseen(
    graph: Graph, keep: NDArray[np.bool_], tensors: Mapping[str, torch.Tensor], inputs: list[Any]
) -> tuple[str, ...]:
    """Paths of the modules none of whose places in some group that loses units moves an output.

    Args:
        graph, keep: what is cut.
        tensors: parameters and buffers of the original by path, in the type to compute in.
        inputs: the flat user inputs.

    Returns:
        In the order of the groups; empty also where an operator has no gradient, or no output is a measurement.
    """
    try:
        reach = _reach(graph, tensors, inputs)
    except RuntimeError:  # what PyTorch raises for an operator without a derivative
        return ()
    faint = FAINT * max((float(effects.max()) for effects in reach.values()), default=0.0)
    cut = [group for group in graph.groups if not keep[group.components].all()]
    return tuple(
        dict.fromkeys(path for group in cut for path in group.layers if _hidden(group, path, graph, reach, faint))
    )


def _hidden(group: Group, path: str, graph: Graph, reach: Reach, faint: float) -> bool:
    units = np.zeros(len(graph.coupling.frozen), bool)
    units[group.components] = True
    own = [layer for layer in group.footprint if layer in reach and layer[0].rpartition(".")[0] == path]
    effects = [reach[layer][units[graph.coupling.component[graph.axes[layer]]]] for layer in own]
    return bool(own) and all(bool((effect <= faint).all()) for effect in effects)


def _reach(graph: Graph, tensors: Mapping[str, torch.Tensor], inputs: list[Any]) -> Reach:
    """Axis of a tensor → for each place on it, how far it moves the outputs."""
    once: dict[int, torch.Tensor] = {}  # tied tensors are one
    leaves = {name: once.setdefault(id(graph.tensors[name]), value.detach()) for name, value in tensors.items()}
    layers: dict[str, list[int]] = {}
    for name, axis in graph.axes:
        if leaves[name].is_floating_point() and leaves[name].numel():
            layers.setdefault(name, []).append(axis)
    reach: Reach = {(name, axis): np.zeros(leaves[name].shape[axis]) for name, own in layers.items() for axis in own}

    def take(name: str, leaf: torch.Tensor) -> None:
        effect = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * leaf).detach()
        effect = effect.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()
        leaf.grad = None  # not all of them at once
        for axis in layers[name]:
            places = effect.movedim(axis, 0).reshape(effect.shape[axis], -1)
            reach[name, axis] = places.amax(1).cpu().double().numpy()

    for name in layers:
        leaf: Any = leaves[name].requires_grad_()  # PyTorch annotates no hooks
        leaf.register_post_accumulate_grad_hook(functools.partial(take, name))
    torch.manual_seed(0)
    outputs = MaskedRun(graph, graph.keep({}), leaves).outputs(inputs, gradients=True)
    moved = [out.abs() if out.is_complex() else out for out in outputs if out.requires_grad]
    if not moved:
        return {}
    whole = torch.stack([torch.where(out.isfinite(), out * torch.rand_like(out), 0).sum() for out in moved]).sum()
    whole.backward()  # type: ignore[no-untyped-call]  # PyTorch annotates it not
    return reach
