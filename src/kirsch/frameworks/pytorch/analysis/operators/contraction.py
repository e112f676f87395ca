"""Operators that multiply and add up: linear layers, convolutions, matrix products, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operation import unlabeled
from kirsch.frameworks.pytorch.analysis.operators.rule import letters, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.pytorch.analysis.operation import Step
    from kirsch.graph.labels import Axis

PRODUCTS = frozenset(["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"])
"""Operators that always take one multiply-accumulate for each choice of positions on all axes."""


def contract(step: Step, operands: Sequence[tuple[Tensor, str]], result: str, shape: Sequence[int]) -> Tensor:
    """`relations.relate` for a product of tensors, with its cost: each letter is one factor of it."""
    out = relations.relate(step.facts, operands, result, shape)
    if sum(not step.is_weight(tensor) for tensor, _ in operands) > 1:
        _mark(step, operands, result)
    sizes: dict[str, tuple[int, Axis]] = {}
    for tensor, own in operands:
        for letter, size, axis in zip(own, tensor.shape, tensor.axes, strict=True):
            if size > 1 and sizes.get(letter, (1, None))[1] is None:
                sizes[letter] = size, axis
    whole = float(np.prod([size for size, _ in sizes.values()], initial=1))
    if step.name not in PRODUCTS or min(len(tensor.shape) for tensor, _ in operands) < 2:  # noqa: PLR2004 - of a matrix
        whole = step.macs()  # PyTorch may add up before it multiplies, or not count what it does
    labeled = [axis for _, axis in sizes.values() if axis is not None]
    step.facts.cost("macs", whole / np.prod([len(axis) for axis in labeled], initial=1), labeled)
    return out


def _mark(step: Step, operands: Sequence[tuple[Tensor, str]], result: str) -> None:
    """Mark what a product of activations makes of their axes: heads are in both and in the result."""
    axes = [dict(zip(own, tensor.axes, strict=True)) for tensor, own in operands]
    common = {letter for letter in axes[0] if all(letter in own for own in axes[1:])}
    heads = [[own[letter] for own in axes] for letter in common & set(result) if axes[0][letter] is not None]
    for alike in heads:
        repeats = any(axis is not None and len(np.unique(axis)) < len(axis) for axis in alike)
        step.facts.mark(alike[0], "kv group" if repeats else "head")
    if heads:
        for own in axes:
            for letter, axis in own.items():
                if letter not in common or letter not in result:
                    step.facts.mark(axis, "head dim")


def _biased(step: Step, out: Tensor, bias: Tensor | None) -> Tensor:
    """With a bias on the last axis."""
    return out if bias is None else relations.elementwise(step.facts, [out, bias], out.shape)


def _mark_linear(step: Step, x: Tensor, into: Axis, out: Axis) -> None:
    """Mark what a linear layer reads and makes, and whether it does so once a sample or at many positions."""
    step.facts.mark(out, "out of linear")
    step.facts.mark(into, "into linear")
    positions = int(np.prod(x.shape[:-1], initial=1))
    step.facts.mark(out, "one position" if positions <= step.batch else "positions")


@rule("linear")
def _linear(step: Step) -> Tensor | list[Tensor]:
    x, weight, bias = step.args[0], step.args[1], step.arg(2, "bias")
    if len(weight.shape) == 1:
        return step.freeze_all("a linear layer whose weight is a vector is not analyzed")
    lead = letters(x)[:-1]
    out = contract(step, [(x, lead + "I"), (weight, "OI")], lead + "O", step.shape)
    _mark_linear(step, x, weight.axes[1], weight.axes[0])
    return _biased(step, out, bias)


@rule("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "vdot", "linalg_vecdot")
def _matmul(step: Step) -> Tensor:
    """Vectors lack the axis that they would be summed into; further axes in front broadcast."""
    added = step.args[0] if step.name.startswith(("add", "badd")) else None
    x, y = step.args[:2] if added is None else step.args[1:3]
    if step.name == "linalg_vecdot":
        lead = letters(x)[:-1]
        return contract(step, [(x, lead + "K"), (y, lead + "K")], lead, step.shape)
    lead = "abcdefghijkl"[: max(len(x.shape), len(y.shape), 2) - 2]
    first = lead[len(lead) - len(x.shape) + 2 :] + "XK" if len(x.shape) > 1 else "K"
    second = lead[len(lead) - len(y.shape) + 2 :] + "KY" if len(y.shape) > 1 else "K"
    result = lead + "X" * (len(x.shape) > 1) + "Y" * (len(y.shape) > 1)
    if step.is_weight(y) and len(y.shape) == 2 and not step.is_weight(x):  # noqa: PLR2004 - a matrix
        _mark_linear(step, x, *y.axes)
    out = contract(step, [(x, first), (y, second)], result, step.shape)
    return out if added is None else relations.elementwise(step.facts, [added, out], step.shape)


@rule("outer")
def _outer(step: Step) -> Tensor:
    return contract(step, [(step.args[0], "X"), (step.args[1], "Y")], "XY", step.shape)


@rule("einsum")
def _einsum(step: Step) -> Tensor:
    equation, tensors = step.args[0].replace(" ", ""), step.args[1]
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        plain = left.replace(",", "").replace(".", "")
        result = "..." * ("." in left) + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    ranks = [len(t.shape) - len(term.replace("...", "")) for term, t in zip(terms, tensors, strict=True)]
    dots = "0123456789"[: max(rank if "." in term else 0 for rank, term in zip(ranks, terms, strict=True))]
    terms = [term.replace("...", dots[len(dots) - rank :]) for term, rank in zip(terms, ranks, strict=True)]
    return contract(step, list(zip(tensors, terms, strict=True)), result.replace("...", dots), step.shape)


@rule("bilinear")
def _bilinear(step: Step) -> Tensor:
    x, y, weight, bias = *step.args[:3], step.arg(3, "bias")
    lead = letters(x)[:-1]
    out = contract(step, [(x, lead + "I"), (y, lead + "J"), (weight, "OIJ")], lead + "O", step.shape)
    return _biased(step, out, bias)


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def _grouped(step: Step) -> Tensor | list[Tensor]:
    """Rows of x, each times the matrix of its group: (S, I) and (G, I, O) → (S, O). Offsets say where groups begin."""
    x, weight, offsets = step.args[0], step.args[1], step.arg(2, "offs")
    if (len(x.shape), len(weight.shape)) != (2, 3) or step.arg(3, "bias") is not None:
        return step.freeze_all("a product of groups of matrices of other ranks is not analyzed")
    if step.is_weight(offsets):  # rows of a group that goes would fall to the next one
        relations.freeze(step.facts, [weight, offsets], "the number of rows of each group is stored", [0])
    groups = step.facts.equate(weight.axes[0], offsets.axes[0])
    step.facts.reduce(groups)
    step.facts.mark(groups, "expert")
    step.facts.mark(weight.axes[1], "into linear")
    step.facts.mark(weight.axes[2], "out of linear")
    out = relations.relate(step.facts, [(x, "SI"), (weight, "GIO")], "SO", step.shape)
    factors = [axis for axis in (x.axes[0], *weight.axes[1:]) if axis is not None]
    step.facts.cost("macs", step.macs() / np.prod([len(axis) for axis in factors], initial=1), factors)
    return out


@rule("scaled_dot_product_attention")
def _attention(step: Step) -> Tensor:
    """softmax(q kᵀ · scale + mask) v, with keys and values that serve several heads of queries each."""
    query, key, value = step.args[:3]
    mask, scale = step.arg(3, "attn_mask"), step.options.get("scale")
    lead = "abcdefghijkl"[: len(query.shape) - 2]
    if step.options.get("enable_gqa"):
        key, value = (_repeated(step, tensor, query) for tensor in (key, value))
    shape = [*step.shape[:-1], key.shape[-2]]
    scores = contract(step, [(query, lead + "XE"), (key, lead + "YE")], lead + "XY", shape)
    if mask is not None:
        scores = relations.elementwise(step.facts, [scores, mask], shape)
    relations.freeze(step.facts, [scores], "a softmax spans it", [-1])
    if scale is None and not step.keeps_scale(query.axes[-1]):
        relations.freeze(step.facts, [query, key], "the scale of attention is computed from its width", [-1])
    return contract(step, [(scores, lead + "XY"), (value, lead + "YF")], lead + "XF", step.shape)


def _repeated(step: Step, tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values with each head as often as there are heads of queries for it."""
    heads = len(tensor.shape) - 3
    times = query.shape[heads] // tensor.shape[heads]
    return relations.gather(step.facts, tensor, heads, np.repeat(np.arange(tensor.shape[heads]), times))


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _convolution(step: Step) -> Tensor:
    """`convolution` is what a decomposed program calls for all others."""
    x, weight, bias = step.args[0], step.args[1], step.arg(2, "bias")
    transposed = step.name.startswith("conv_transpose") or (step.name == "convolution" and step.args[6])
    rank = len(weight.shape) - 2
    at = len(x.shape) - rank - 1  # the channel axis: 1, or 0 without a batch axis
    spatial = range(at + 1, len(x.shape))
    relations.freeze(step.facts, [x], "a convolution slides along it", spatial)
    for dim in range(2, rank + 2):
        step.facts.freeze(weight.axes[dim], "it is a kernel axis", boundary=True)
    step.facts.mark(weight.axes[0] if transposed else weight.axes[1], "into convolution")
    channels = _channels(step, x.axes[at], x.shape[at], weight, transposed=transposed)
    if bias is not None:
        channels = step.facts.equate(channels, bias.axes[0])
    out = Tensor.of(step.shape, [*x.axes[:at], channels, *[None] * rank])
    positions = x if transposed else out
    _multiply_accumulates(step, positions, [*range(at), *range(at + 1, len(positions.shape))], weight)
    return out


def _channels(step: Step, given: Axis, size: int, weight: Tensor, *, transposed: bool) -> Axis:
    """The channels that a convolution puts out, for those that it is given.

    Of several groups each convolves its own part of the channels: the channels are a grid of group and position in it.
    """
    facts, place = step.facts, 8 if step.name == "convolution" else 6
    groups = step.arg(place, "groups", 1)
    own, other = (weight.axes[0], weight.axes[1]) if transposed else (weight.axes[1], weight.axes[0])
    if groups == 1 or size == 1:
        if size > 1:
            facts.equate(given, own)
        return other
    rows, columns = given, None
    if size > groups and given is not None:
        rows, columns = facts.split(given.reshape(groups, -1), "conv groups")
    step.follow(rows, step.given(place, "groups"))
    if transposed:  # the weight has all channels that come in, and those that one group puts out
        facts.equate(given, own)
        return facts.merge([rows, other], [groups, weight.shape[1]], "conv groups")
    if size > groups:
        facts.equate(columns, own)
    if other is None or len(other) == groups:
        facts.equate(rows, other)
    else:
        facts.equate(rows, facts.split(other.reshape(groups, -1), "conv groups")[0])
    return other


def _multiply_accumulates(step: Step, positions: Tensor, dims: Sequence[int], weight: Tensor) -> None:
    """Each kept number of the weight is used once at each kept position."""
    coefficient = unlabeled(positions, dims) * unlabeled(weight, range(len(weight.shape)))
    factors = [*(positions.axes[dim] for dim in dims), *weight.axes]
    step.facts.cost("macs", coefficient, factors)
