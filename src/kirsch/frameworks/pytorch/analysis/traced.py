"""The PyTorch side of a trace, which pruning and verification read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.attention import Fold
    from kirsch.frameworks.pytorch.analysis.blocks import Block


@dataclass
class Traced:
    """What PyTorch knows of a trace.

    Args:
        program: the exported operations.
        slots: graph input → path of the parameter or buffer that it takes.
        states: graph node → the labels of its result, or a list of them.
        args, options: the example inputs.
        outputs: place among the outputs of the program → name, of those that the model itself puts out.
        counted: those of them that count, and stay whole.
        folds: where the scale of an attention is kept.
        blocks: what may be left out as a whole.
        statistics: nodes whose result is a statistic over units.
        training: the same of a run in training mode, where only that reaches some parameters.
    """

    program: ExportedProgram
    slots: dict[str, str]
    states: dict[Node, Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    outputs: dict[int, str]
    counted: frozenset[int]
    folds: list[Fold]
    blocks: tuple[Block, ...]
    statistics: frozenset[str]
    training: Traced | None = None
