"""A traced PyTorch program and its labels, for pruning and verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.attention import QueryScaling
    from kirsch.frameworks.pytorch.analysis.blocks import ResidualBlock
    from kirsch.graph.configuration import Configurable


@dataclass
class Traced:
    """A traced PyTorch program and its labels.

    Args:
        program: the exported operations.
        slots: graph input → path of its parameter or buffer.
        states: graph node → labels of its result, or a list of labels for several results.
        args, options: the example inputs.
        outputs: index among the outputs of the program → name, for the outputs of the model.
        selected_outputs: indices of the outputs whose shapes must not change.
        query_scalings: rows that are multiplied to keep the scale of attention.
        blocks: residual blocks that can be removed.
        statistics: names of the nodes whose result is a statistic over units.
        training: the program traced in training mode; None if the program in inference mode uses all parameters, or the
            model cannot be traced in training mode.
        configurable: the cuts that the configuration of the model can state, after the first request.
    """

    program: ExportedProgram
    slots: dict[str, str]
    states: dict[Node, Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    outputs: dict[int, str]
    selected_outputs: frozenset[int]
    query_scalings: list[QueryScaling]
    blocks: tuple[ResidualBlock, ...]
    statistics: frozenset[str]
    training: Traced | None = None
    configurable: Configurable | None = None
