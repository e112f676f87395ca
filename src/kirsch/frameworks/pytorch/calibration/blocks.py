"""Runs of a model with and without its residual blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.frameworks.pytorch.analysis.blocks import ResidualBlock, repeatable_outputs, skipping, tapped_blocks
from kirsch.frameworks.pytorch.inference.predict import arguments_of
from kirsch.frameworks.pytorch.modules.submodule import part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph


def outputs(graph: Graph, inputs: Any, without: Collection[str] = ()) -> list[NDArray[Any]]:
    """Return the floating outputs of the traced model; the blocks named in `without` return their inputs."""
    skipped = [block for block in graph.traced.blocks if block.path in without]
    with skipping(part_of(graph.model, graph.tracing.module), skipped):
        values = repeatable_outputs(graph.model, *arguments_of(graph.model, inputs))
    return [value.double().cpu().numpy() for value in values if value.is_floating_point()]


def block_features(graph: Graph, inputs: Any, see: Callable[[str, NDArray[Any], NDArray[Any], bool], None]) -> None:
    """Call `see(path, input, output, joined)` for each block; see `kirsch.frameworks.protocols.Calibration`."""

    def features_last(value: torch.Tensor, axis: int | None) -> NDArray[Any]:
        value = value.flatten(1) if axis is None else value.movedim(axis, -1)
        return value.detach().double().cpu().numpy()

    def tap(block: ResidualBlock, entry: torch.Tensor, out: torch.Tensor) -> None:
        joined = block.features is None and entry.dim() > len(("samples", "features"))
        see(block.path, features_last(entry, block.features), features_last(out, block.features), joined)

    with tapped_blocks(part_of(graph.model, graph.tracing.module), graph.traced.blocks, tap):
        repeatable_outputs(graph.model, *arguments_of(graph.model, inputs))
