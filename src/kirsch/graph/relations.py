"""The closed set of ways in which an operation relates the labels of its tensors.

relate    a labeled einsum: elementwise with broadcast, permutation, contraction, reduction
reshape   axes merged and split
concat    axes laid end to end
gather    indices of an axis taken: slice, split, flip, repeat
freeze    anything else
Every operator of a framework is described by these five; a rule never touches label arrays itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.graph.labels import Axis, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.facts import Facts


def relate(facts: Facts, operands: Sequence[tuple[Tensor, str]], result: str, shape: Sequence[int]) -> Tensor:
    """A labeled einsum: axes with the same letter are the same axis.

    Args:
        facts: gathers the equalities.
        operands: tensors with one letter per axis.
        result: one letter per axis of the result; letters left out are contracted or reduced, a new letter is an axis
            without labels.
        shape: of the result.
    """
    known: dict[str, Axis] = {}
    for tensor, letters in operands:
        for letter, axis, size in zip(letters, tensor.axes, tensor.shape, strict=True):
            if size == 1:
                continue  # broadcast: it says nothing
            known[letter] = facts.equate(known[letter], axis) if letter in known else axis
    for letter, axis in known.items():
        if letter not in result:
            facts.reduce(axis)
    return Tensor.of(shape, [known.get(letter) for letter in result])


def elementwise(facts: Facts, tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """`relate` with numpy's broadcasting: axes are aligned from the right, axes of size 1 say nothing."""
    axes: list[Axis] = []
    for position in range(-len(shape), 0):
        met = [t.axes[position] for t in tensors if len(t.shape) >= -position and t.shape[position] != 1]
        axis = met[0] if met else None
        for other in met[1:]:
            axis = facts.equate(axis, other)
        axes.append(axis)
    return Tensor.of(shape, axes)


def permute(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """`relate` with the axes in another order."""
    return Tensor.of([tensor.shape[axis] for axis in order], [tensor.axes[axis] for axis in order])


def reshape(facts: Facts, tensor: Tensor, shape: Sequence[int], kind: str = "view") -> Tensor:
    """The labels after a reshape: both shapes are cut into the shortest runs of axes with equal products."""
    axes: list[Axis] = [None] * len(shape)
    for old, new in _segments(tensor.shape, shape):
        if all(tensor.axes[axis] is None for axis in old):
            continue
        if len(old) == len(new) == 1:
            axes[new[0]] = tensor.axes[old[0]]
            continue
        flat = facts.merge([tensor.axes[axis] for axis in old], [tensor.shape[axis] for axis in old], kind)
        if flat is None or not new:
            continue
        for axis, labels in zip(new, facts.split(flat.reshape([shape[axis] for axis in new]), kind), strict=True):
            axes[axis] = labels
    return Tensor.of(shape, axes)


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    olds = [axis for axis, size in enumerate(before) if size != 1]
    news = [axis for axis, size in enumerate(after) if size != 1]
    segments: list[tuple[list[int], list[int]]] = []
    while olds and news:
        old, new = [olds.pop(0)], [news.pop(0)]
        have, want = before[old[0]], after[new[0]]
        while have != want:
            if have < want:
                old.append(olds.pop(0))
                have *= before[old[-1]]
            else:
                new.append(news.pop(0))
                want *= after[new[-1]]
        segments.append((old, new))
    return segments


def concat(facts: Facts, tensors: Sequence[Tensor], dim: int, shape: Sequence[int]) -> Tensor:
    """Tensors laid end to end along `dim`; the other axes are equal. A part without labels cannot go."""
    axes: list[Axis] = []
    for position in range(len(shape)):
        parts = [tensor.axes[position] for tensor in tensors]
        if position != dim:
            axis = parts[0]
            for other in parts[1:]:
                axis = facts.equate(axis, other)
        elif all(part is None for part in parts):
            axis = None
        else:
            sizes = [tensor.shape[position] for tensor in tensors]
            filled = [np.zeros(n, np.int64) if part is None else part for part, n in zip(parts, sizes, strict=True)]
            axis = np.concatenate(filled)
        axes.append(axis)
    return Tensor.of(shape, axes)


def gather(facts: Facts, tensor: Tensor, dim: int, index: NDArray[np.int64]) -> Tensor:
    """The tensor at these indices of one axis, which may repeat, leave out and reorder.

    An axis of length one carries no label, so a single index that is taken is frozen.
    """
    axis = tensor.axes[dim]
    taken = None if axis is None else axis[index]
    if axis is not None and taken is not None:
        facts.reduce(axis)
        if len(index) == 1:
            facts.freeze(taken, "a single index of the axis is taken by number")
    shape = [len(index) if position == dim else size for position, size in enumerate(tensor.shape)]
    return Tensor.of(shape, [taken if position == dim else a for position, a in enumerate(tensor.axes)])


def drop(facts: Facts, tensor: Tensor, dims: Sequence[int], *, keepdim: bool) -> Tensor:
    """The tensor after a reduction over some axes."""
    for dim in dims:
        facts.reduce(tensor.axes[dim])
    rest = [
        (n, a) for position, (n, a) in enumerate(zip(tensor.shape, tensor.axes, strict=True)) if position not in dims
    ]
    if not keepdim:
        return Tensor.of([n for n, _ in rest], [a for _, a in rest])
    sizes = [1 if position in dims else n for position, n in enumerate(tensor.shape)]
    return Tensor.of(sizes, [None if position in dims else a for position, a in enumerate(tensor.axes)])


def freeze(facts: Facts, tensors: Sequence[Tensor], reason: str, dims: Sequence[int] | None = None) -> None:
    """Nothing of these axes (of all, if `dims` is None) can go."""
    for tensor in tensors:
        for dim in range(len(tensor.axes)) if dims is None else dims:
            facts.freeze(tensor.axes[dim], reason)
