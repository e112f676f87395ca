"""The five relations between the labels of an operation's inputs and outputs.

relate    labeled einsum: elementwise with broadcasting, permutation, contraction, reduction
reshape   merges and splits axes
concat    concatenates along an axis
gather    selects indices of an axis: slice, split, flip, repeat
freeze    everything else

The rules of operators describe an operation by these functions. Where none of them fits, a rule records facts itself;
see `kirsch.graph.facts`.
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
    """Return the result of a labeled einsum, in which axes with the same letter are the same axis.

    Args:
        facts: the object in which equalities are recorded.
        operands: tensors with one letter per axis.
        result: one letter per axis of the result. Letters left out are contracted or reduced; a new letter is an axis
            without labels.
        shape: shape of the result.
    """
    axes: dict[str, Axis] = {}
    for tensor, letters in operands:
        for letter, axis, size in zip(letters, tensor.axes, tensor.shape, strict=True):
            if size == 1:
                continue  # an axis of size 1 is broadcast and has no labels
            axes[letter] = facts.equate(axes[letter], axis) if letter in axes else axis
    for letter, axis in axes.items():
        if letter not in result:
            facts.reduce(axis)
    return Tensor.of(shape, [axes.get(letter) for letter in result])


def elementwise(facts: Facts, tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the result of an elementwise operation with numpy's broadcasting.

    Axes are aligned from the right; axes of size 1 are broadcast.
    """
    axes: list[Axis] = []
    for position in range(-len(shape), 0):
        aligned = [t.axes[position] for t in tensors if len(t.shape) >= -position and t.shape[position] != 1]
        axis = aligned[0] if aligned else None
        for other in aligned[1:]:
            axis = facts.equate(axis, other)
        axes.append(axis)
    return Tensor.of(shape, axes)


def permute(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Return the tensor with its axes in the given order."""
    return Tensor.of([tensor.shape[axis] for axis in order], [tensor.axes[axis] for axis in order])


def reshape(facts: Facts, tensor: Tensor, shape: Sequence[int], kind: str = "view") -> Tensor:
    """Return the tensor reshaped to `shape`.

    Both shapes are split into the shortest runs of axes with equal products of sizes. Each run is merged and split
    separately.
    """
    axes: list[Axis] = [None] * len(shape)
    for old, new in _matching_runs(tensor.shape, shape):
        if len(old) == len(new) == 1:
            axes[new[0]] = tensor.axes[old[0]]
            continue
        flat = facts.merge([tensor.axes[axis] for axis in old], [tensor.shape[axis] for axis in old], kind)
        if flat is None:
            continue
        for axis, labels in zip(new, facts.split(flat.reshape([shape[axis] for axis in new]), kind), strict=True):
            axes[axis] = labels
    return Tensor.of(shape, axes)


def _matching_runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of axes of two shapes with equal products of sizes, without axes of size 1."""
    olds = [axis for axis, size in enumerate(before) if size != 1]
    news = [axis for axis, size in enumerate(after) if size != 1]
    runs: list[tuple[list[int], list[int]]] = []
    while olds and news:
        old, new = [olds.pop(0)], [news.pop(0)]
        old_size, new_size = before[old[0]], after[new[0]]
        while old_size != new_size:
            if old_size < new_size:
                old.append(olds.pop(0))
                old_size *= before[old[-1]]
            else:
                new.append(news.pop(0))
                new_size *= after[new[-1]]
        runs.append((old, new))
    return runs


def concat(facts: Facts, tensors: Sequence[Tensor], dim: int, shape: Sequence[int]) -> Tensor:
    """Return the tensors concatenated along `dim`. Indices of a tensor without labels on `dim` cannot be removed."""
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
            axis = np.concatenate(
                [np.zeros(n, np.int64) if part is None else part for part, n in zip(parts, sizes, strict=True)]
            )
        axes.append(axis)
    return Tensor.of(shape, axes)


def gather(facts: Facts, tensor: Tensor, dim: int, index: NDArray[np.int64]) -> Tensor:
    """Return the tensor with the given indices of axis `dim`, in any order, with repeats or omissions.

    A single selected index is frozen, since an axis of size 1 has no labels.
    """
    axis = tensor.axes[dim]
    selected = None if axis is None else axis[index]
    if axis is not None and selected is not None:
        facts.reduce(axis)
        if len(index) == 1:
            facts.freeze(selected, "a single index of the axis is selected by number")
    shape = [len(index) if position == dim else size for position, size in enumerate(tensor.shape)]
    return Tensor.of(shape, [selected if position == dim else a for position, a in enumerate(tensor.axes)])


def drop(facts: Facts, tensor: Tensor, dims: Sequence[int], *, keepdim: bool) -> Tensor:
    """Return the tensor after a reduction over the axes `dims`."""
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
    """Freeze the axes `dims` of the tensors; all axes if `dims` is None."""
    for tensor in tensors:
        for dim in range(len(tensor.axes)) if dims is None else dims:
            facts.freeze(tensor.axes[dim], reason)
