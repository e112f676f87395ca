"""Operators that multiply and add up: linear layers and convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.operators.rule import letters, rule
from kirsch.frameworks.pytorch.step import unlabelled
from kirsch.graph import relations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.pytorch.step import Step
    from kirsch.graph.labels import Tensor


@rule("linear")
def _linear(step: Step) -> Tensor | list[Tensor]:
    x, weight, bias = step.args[0], step.args[1], step.arg(2, "bias")
    if len(weight.shape) == 1:
        return step.freeze_all("a linear layer whose weight is a vector is not analysed")
    lead = letters(x)[:-1]
    operands = [(x, lead + "I"), (weight, "OI")] + ([(bias, "O")] if bias is not None else [])
    out = relations.relate(step.facts, operands, lead + "O", step.shape)
    _multiply_accumulates(step, x, range(len(x.shape) - 1), weight)
    return out


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(step: Step) -> Tensor:
    x, weight, bias = step.args[0], step.args[1], step.arg(2, "bias")
    transposed = step.name.startswith("conv_transpose")
    rank = len(weight.shape) - 2
    at = len(x.shape) - rank - 1  # the channel axis: 1, or 0 without a batch axis
    groups = step.arg(6, "groups", 1)
    spatial = range(at + 1, len(x.shape))
    relations.freeze(step.facts, [x], "a convolution slides along it", spatial)
    for dim in range(2, rank + 2):
        step.facts.freeze(weight.axes[dim], "it is a kernel axis", boundary=True)
    lead, space, kernel = "N"[:at], "xyz"[:rank], "uvw"[:rank]
    one = 1 if x.shape[at] == 1 else groups  # one input channel in one group is a plain convolution
    if one == 1:
        shape = "IO" if transposed else "OI"
        operands = [(x, lead + "I" + space), (weight, shape + kernel)]
    elif groups == x.shape[at] == weight.shape[0] and weight.shape[1] == 1:
        step.follow(x.axes[at], step.given(6, "groups"))
        operands = [(x, lead + "O" + space), (weight, "O1" + kernel)]
    else:
        relations.freeze(step.facts, step.tensors(), f"{groups} groups of channels are not analysed yet")
        operands = []
    if bias is not None and operands:
        operands.append((bias, "O"))
    out = relations.relate(step.facts, operands, lead + "O" + "abc"[:rank], step.shape)
    positions = x if transposed else out
    _multiply_accumulates(step, positions, [*range(at), *range(at + 1, len(positions.shape))], weight)
    return out


def _multiply_accumulates(step: Step, positions: Tensor, dims: Sequence[int], weight: Tensor) -> None:
    """Each kept number of the weight is used once at each kept position."""
    coefficient = unlabelled(positions, dims) * unlabelled(weight, range(len(weight.shape)))
    factors = [*(positions.axes[dim] for dim in dims), *weight.axes]
    step.facts.cost("macs", coefficient, factors)
