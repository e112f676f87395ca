"""Values of the parameters of a pruned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kirsch.frameworks.pytorch.modules.submodule import part_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import nn

    from kirsch.graph.graph import Graph


def parameter_values(pruned: nn.Module, graph: Graph, name: str) -> NDArray[Any]:
    """Return a copy of a parameter as a float array; `name` is its path in the traced part of the pruned model."""
    value = part_of(pruned, graph.tracing.module).get_parameter(name)
    return value.detach().double().cpu().numpy().copy()  # `numpy` shares the memory of a float64 parameter


def set_parameters(pruned: nn.Module, graph: Graph, values: Mapping[str, NDArray[Any]]) -> None:
    """Set parameters of a pruned model in place; names are paths in the traced part of the model."""
    part = part_of(pruned, graph.tracing.module)
    with torch.no_grad():
        for name, value in values.items():
            part.get_parameter(name).copy_(torch.from_numpy(value))
