"""Rules of sums of products: linear layers, convolutions, matrix products, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operation import unlabeled_size
from kirsch.frameworks.pytorch.analysis.operators.rule import letters, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.pytorch.analysis.operation import OperationContext
    from kirsch.graph.labels import Axis

FULL_PRODUCTS = frozenset(["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"])
"""Operators that need one multiply-accumulate for each combination of indices on all axes, except for vectors."""


def contract(op: OperationContext, operands: Sequence[tuple[Tensor, str]], result: str, shape: Sequence[int]) -> Tensor:
    """Return the result of `relations.relate` for a product of tensors, and record the multiply-accumulates.

    Each letter stands for an axis. For the operators in `FULL_PRODUCTS`, the number of multiply-accumulates is the
    product of the sizes of these axes. For other operators and for vectors, it is PyTorch's count.
    """
    out = relations.relate(op.facts, operands, result, shape)
    if sum(not op.is_weight(tensor) for tensor, _ in operands) > 1:
        _mark(op, operands, result)
    weights = [pair for pair in operands if op.is_weight(pair[0]) or op.is_selection(pair[0])]
    if len(weights) == 1 < len(operands):
        [(weight, weight_letters)] = weights
        for letter, axis in zip(weight_letters, weight.axes, strict=True):
            if letter not in result:
                op.facts.mark(axis, "contracted")
    sizes: dict[str, tuple[int, Axis]] = {}
    for tensor, tensor_letters in operands:
        for letter, size, axis in zip(tensor_letters, tensor.shape, tensor.axes, strict=True):
            if size > 1 and sizes.get(letter, (1, None))[1] is None:
                sizes[letter] = size, axis
    macs = float(np.prod([size for size, _ in sizes.values()], initial=1))
    if op.name not in FULL_PRODUCTS or min(len(tensor.shape) for tensor, _ in operands) < 2:  # noqa: PLR2004 - a vector
        macs = op.macs()  # less than the product if PyTorch sums over an axis before it multiplies; 0 if it counts none
    labeled = [axis for _, axis in sizes.values() if axis is not None]
    op.facts.cost("macs", macs / np.prod([len(axis) for axis in labeled], initial=1), labeled)
    return out


def _mark(op: OperationContext, operands: Sequence[tuple[Tensor, str]], result: str) -> None:
    """Mark the axes of a product of activations. Axes that all operands and the result have are heads."""
    axes = [dict(zip(tensor_letters, tensor.axes, strict=True)) for tensor, tensor_letters in operands]
    for by_letter in axes:
        for letter, axis in by_letter.items():
            if letter not in result:
                op.facts.mark(axis, "contracted with activations")
    common = {letter for letter in axes[0] if all(letter in others for others in axes[1:])}
    heads = [
        [by_letter[letter] for by_letter in axes] for letter in common & set(result) if axes[0][letter] is not None
    ]
    for head in heads:
        repeats = any(axis is not None and len(np.unique(axis)) < len(axis) for axis in head)
        op.facts.mark(head[0], "kv group" if repeats else "head")
    if heads:
        for by_letter in axes:
            for letter, axis in by_letter.items():
                if letter not in common or letter not in result:
                    op.facts.mark(axis, "head dim")


def _biased(op: OperationContext, out: Tensor, bias: Tensor | None) -> Tensor:
    """Return the result with a bias on the last axis."""
    return out if bias is None else relations.elementwise(op.facts, [out, bias], out.shape)


def _mark_linear(op: OperationContext, x: Tensor, into: Axis, out: Axis) -> None:
    """Mark the axes of a linear layer, and whether the layer is applied once for each sample or at many positions."""
    op.facts.mark(out, "out of linear")
    op.facts.mark(into, "into linear")
    positions = int(np.prod(x.shape[:-1], initial=1))
    op.facts.mark(out, "one position" if positions <= op.batch else "positions")


@rule("linear")
def _linear(op: OperationContext) -> Tensor | list[Tensor]:
    x, weight, bias = op.args[0], op.args[1], op.arg(2, "bias")
    if len(weight.shape) == 1:
        return op.freeze_all("a linear layer whose weight is a vector is not analyzed")
    lead = letters(x)[:-1]
    out = contract(op, [(x, lead + "I"), (weight, "OI")], lead + "O", op.shape)
    _mark_linear(op, x, weight.axes[1], weight.axes[0])
    return _biased(op, out, bias)


@rule("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "vdot", "linalg_vecdot")
def _matmul(op: OperationContext) -> Tensor:
    """Multiply matrices: the first operand has the axes X and K, the second one K and Y.

    A vector has only the axis K, so the result lacks X or Y. Leading axes broadcast.
    """
    added = op.args[0] if op.name.startswith(("add", "badd")) else None
    x, y = op.args[:2] if added is None else op.args[1:3]
    if op.name == "linalg_vecdot":
        lead = letters(x)[:-1]
        return contract(op, [(x, lead + "K"), (y, lead + "K")], lead, op.shape)
    lead = "abcdefghijkl"[: max(len(x.shape), len(y.shape), 2) - 2]
    first = lead[len(lead) - len(x.shape) + 2 :] + "XK" if len(x.shape) > 1 else "K"
    second = lead[len(lead) - len(y.shape) + 2 :] + "KY" if len(y.shape) > 1 else "K"
    result = lead + "X" * (len(x.shape) > 1) + "Y" * (len(y.shape) > 1)
    if op.is_weight(y) and len(y.shape) == 2 and not op.is_weight(x):  # noqa: PLR2004 - a matrix
        _mark_linear(op, x, *y.axes)
    out = contract(op, [(x, first), (y, second)], result, op.shape)
    return out if added is None else relations.elementwise(op.facts, [added, out], op.shape)


@rule("outer")
def _outer(op: OperationContext) -> Tensor:
    return contract(op, [(op.args[0], "X"), (op.args[1], "Y")], "XY", op.shape)


@rule("einsum")
def _einsum(op: OperationContext) -> Tensor:
    equation, tensors = op.args[0].replace(" ", ""), op.args[1]
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        plain = left.replace(",", "").replace(".", "")
        result = "..." * ("." in left) + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    ranks = [len(t.shape) - len(term.replace("...", "")) for term, t in zip(terms, tensors, strict=True)]
    dots = "0123456789"[: max(rank if "." in term else 0 for rank, term in zip(ranks, terms, strict=True))]
    terms = [term.replace("...", dots[len(dots) - rank :]) for term, rank in zip(terms, ranks, strict=True)]
    return contract(op, list(zip(tensors, terms, strict=True)), result.replace("...", dots), op.shape)


@rule("bilinear")
def _bilinear(op: OperationContext) -> Tensor:
    x, y, weight, bias = *op.args[:3], op.arg(3, "bias")
    lead = letters(x)[:-1]
    out = contract(op, [(x, lead + "I"), (y, lead + "J"), (weight, "OIJ")], lead + "O", op.shape)
    return _biased(op, out, bias)


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def _grouped(op: OperationContext) -> Tensor | list[Tensor]:
    """Multiply each row of x by the matrix of its group: (S, I) and (G, I, O) → (S, O).

    The offsets are the ends of the groups.
    """
    x, weight, offsets = op.args[0], op.args[1], op.arg(2, "offs")
    if (len(x.shape), len(weight.shape)) != (2, 3) or op.arg(3, "bias") is not None:
        return op.freeze_all(
            "a grouped matrix product is analyzed only without a bias, for 2 axes of the input and 3 of the weight"
        )
    if op.is_weight(offsets):  # without this, the rows of a removed group would be assigned to the next group
        relations.freeze(op.facts, [weight, offsets], "the number of rows of each group is a constant", [0])
    groups = op.facts.equate(weight.axes[0], offsets.axes[0])
    op.facts.reduce(groups)
    op.facts.mark(groups, "expert")
    op.facts.mark(weight.axes[1], "into linear")
    op.facts.mark(weight.axes[1], "contracted")
    op.facts.mark(weight.axes[2], "out of linear")
    out = relations.relate(op.facts, [(x, "SI"), (weight, "GIO")], "SO", op.shape)
    factors = [axis for axis in (x.axes[0], *weight.axes[1:]) if axis is not None]
    op.facts.cost("macs", op.macs() / np.prod([len(axis) for axis in factors], initial=1), factors)
    return out


@rule("scaled_dot_product_attention")
def _attention(op: OperationContext) -> Tensor:
    """softmax(q kᵀ · scale + mask) v; with `enable_gqa`, several query heads share keys and values."""
    query, key, value = op.args[:3]
    mask, scale = op.arg(3, "attn_mask"), op.options.get("scale")
    lead = "abcdefghijkl"[: len(query.shape) - 2]
    if op.options.get("enable_gqa"):
        key, value = (_repeat_heads(op, tensor, query) for tensor in (key, value))
    shape = [*op.shape[:-1], key.shape[-2]]
    scores = contract(op, [(query, lead + "XE"), (key, lead + "YE")], lead + "XY", shape)
    if mask is not None:
        scores = relations.elementwise(op.facts, [scores, mask], shape)
    relations.freeze(op.facts, [scores], "a softmax is computed over the axis", [-1])
    if scale is None and not op.keeps_scale(query.axes[-1]):
        relations.freeze(op.facts, [query, key], "the scale of attention is computed from the size of the axis", [-1])
    return contract(op, [(scores, lead + "XY"), (value, lead + "YF")], lead + "XF", op.shape)


def _repeat_heads(op: OperationContext, tensor: Tensor, query: Tensor) -> Tensor:
    """Return keys or values with each head repeated for all query heads that share it."""
    heads = len(tensor.shape) - 3
    times = query.shape[heads] // tensor.shape[heads]
    return relations.gather(op.facts, tensor, heads, np.repeat(np.arange(tensor.shape[heads]), times))


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _convolution(op: OperationContext) -> Tensor:
    """`convolution` replaces the other convolution operators in a decomposed program."""
    x, weight, bias = op.args[0], op.args[1], op.arg(2, "bias")
    transposed = op.name.startswith("conv_transpose") or (op.name == "convolution" and op.args[6])
    rank = len(weight.shape) - 2
    at = len(x.shape) - rank - 1  # the channel axis: 1, or 0 without a batch axis
    spatial = range(at + 1, len(x.shape))
    relations.freeze(op.facts, [x], "a convolution slides along the axis", spatial)
    for dim in range(2, rank + 2):
        op.facts.freeze(weight.axes[dim], "the axis is a kernel axis", boundary=True)
    for use in ("into convolution", "contracted"):
        op.facts.mark(weight.axes[0] if transposed else weight.axes[1], use)
    channels = _channels(op, x.axes[at], x.shape[at], weight, transposed=transposed)
    if bias is not None:
        channels = op.facts.equate(channels, bias.axes[0])
    out = Tensor.of(op.shape, [*x.axes[:at], channels, *[None] * rank])
    positions = x if transposed else out
    _multiply_accumulates(op, positions, [*range(at), *range(at + 1, len(positions.shape))], weight)
    return out


def _channels(op: OperationContext, channels: Axis, size: int, weight: Tensor, *, transposed: bool) -> Axis:
    """Return the labels of the output channels of a convolution, and relate them to those of its input channels.

    With several groups, the channels are a grid: (groups, channels of one group).
    """
    facts, position = op.facts, 8 if op.name == "convolution" else 6
    groups = op.arg(position, "groups", 1)
    inputs, outputs = (weight.axes[0], weight.axes[1]) if transposed else (weight.axes[1], weight.axes[0])
    if groups == 1 or size == 1:
        if size > 1:
            facts.equate(channels, inputs)
        return outputs
    rows, columns = channels, None
    if size > groups and channels is not None:
        rows, columns = facts.split(channels.reshape(groups, -1), "conv groups")
    op.tie_size(rows, op.traced_arg(position, "groups"))
    if transposed:  # the weight is (input channels, output channels of one group, ...)
        facts.equate(channels, inputs)
        return facts.merge([rows, outputs], [groups, weight.shape[1]], "conv groups")
    if size > groups:
        facts.equate(columns, inputs)
    if outputs is None or len(outputs) == groups:
        facts.equate(rows, outputs)
    else:
        facts.equate(rows, facts.split(outputs.reshape(groups, -1), "conv groups")[0])
    return outputs


def _multiply_accumulates(op: OperationContext, positions: Tensor, dims: Sequence[int], weight: Tensor) -> None:
    """Record one multiply-accumulate for each value of the weight at each position."""
    coefficient = unlabeled_size(positions, dims) * unlabeled_size(weight, range(len(weight.shape)))
    factors = [*(positions.axes[dim] for dim in dims), *weight.axes]
    op.facts.cost("macs", coefficient, factors)
