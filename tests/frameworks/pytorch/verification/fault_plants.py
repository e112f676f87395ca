"""Functions that plant faults in the library. Most keep the shapes valid, so that only the outputs are wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import nn

from kirsch.frameworks.pytorch.analysis import trace as tracing
from kirsch.frameworks.pytorch.analysis.attention import QueryScaling
from kirsch.frameworks.pytorch.analysis.operators import RULES, recurrent
from kirsch.frameworks.pytorch.surgery import cut as surgery
from kirsch.frameworks.pytorch.verification import candidate
from kirsch.graph import relations
from kirsch.graph.facts import Facts
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

UNEQUAL, FAILING = "is not equal to the masked original", "does not run"


class Fault(NamedTuple):
    """A fault, the network that shows it, and the expected error."""

    network: str
    plant: Callable[[pytest.MonkeyPatch], None]
    error: str = UNEQUAL


def replaced(owner, name, make):
    """Return a function that plants a fault: it replaces a function of the library by `make(function)`."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def replaced_rule(name, make):
    """Return a function that plants a fault: it replaces the rule of an operator by `make(rule)`."""
    return lambda patch: patch.setitem(RULES, name, make(RULES[name]))


def doing_nothing(plain):
    return lambda *_, **__: None


def reordered(axis, order):
    """Reorder the labels of one axis of the first result of a rule."""

    def make(plain):
        def rule(op):
            results = plain(op)
            first, *others = results if isinstance(results, list) else [results]
            axes = list(first.axes)
            axes[axis] = axes[axis][order]
            return [Tensor.of(first.shape, axes), *others]

        return rule

    return make


def columns(*shape):
    """Return the indices of a grid of this shape in column-major order."""
    return np.arange(np.prod(shape)).reshape(shape).ravel(order="F")


def unfrozen(reason):
    """Do not freeze an axis if the reason contains this text."""

    def make(plain):
        def freeze(self, axis, stated, **options):
            return self.reduce(axis) if reason in stated else plain(self, axis, stated, **options)

        return freeze

    return replaced(Facts, "freeze", make)


def forgotten_statistic(operator):
    """Do not record that an operator computes a statistic over channels."""

    def make(plain):
        return lambda self, axes: plain(self, [] if self.operation.name == operator else axes)

    return replaced(Facts, "statistic", make)


def with_square_weights_transposed(plain):
    def relate(facts, operands, result, shape):
        square = [letters == "OI" and x.shape[0] == x.shape[1] for x, letters in operands]
        transposed = [
            (x, letters[::-1] if swap else letters) for (x, letters), swap in zip(operands, square, strict=True)
        ]
        return plain(facts, transposed, result, shape)

    return relate


def aligned_left(plain):
    def elementwise(facts, tensors, shape):
        missing = [len(shape) - len(x.shape) for x in tensors]
        filled = [
            Tensor.of([*x.shape, *[1] * n], [*x.axes, *[None] * n]) for x, n in zip(tensors, missing, strict=True)
        ]
        return plain(facts, filled, shape)

    return elementwise


def without_ties(plain):
    """Allow the operands of a sum to lose different units."""

    def rule(op):
        first, second = op.tensors()
        for axis in second.axes:
            op.facts.reduce(axis)
        return first

    return rule


def interleaved_gates(plain):
    def gated(op, hidden, weights):
        gates = recurrent.GATES[op.name]
        order = columns(weights[0].shape[0] // gates, gates)
        return plain(op, hidden, [Tensor.of(w.shape, [w.axes[0][order], *w.axes[1:]]) for w in weights])

    return gated


def labels_for_each_name(plain):
    """Give tied parameters different labels."""

    def labeled(model, facts):
        tensors = plain(model, facts)
        return {
            name: Tensor.of(x.shape, [None if axis is None else facts.fresh(len(axis)) for axis in x.axes])
            for name, x in tensors.items()
        }

    return labeled


def split_by_columns(kind):
    """Split an axis of size A * B in column-major order."""

    def make(plain):
        def split(self, cells, split_kind):
            reordered_cells = cells.ravel()[columns(*cells.shape)].reshape(cells.shape)
            return plain(self, reordered_cells if split_kind == kind else cells, split_kind)

        return split

    return replaced(Facts, "split", make)


def interleaved_outputs(plain):
    def channels(op, inputs, size, weight, *, transposed):
        groups = op.arg(6, "groups", 1)
        outputs = weight.axes[0]
        interleaved = Tensor.of(weight.shape, [outputs[columns(len(outputs) // groups, groups)], *weight.axes[1:]])
        result = plain(op, inputs, size, weight if groups == 1 else interleaved, transposed=transposed)
        return result if groups == 1 else outputs

    return channels


def interleaved_halves(plain):
    def glu(op):
        x, count = op.args[0], op.args[0].shape[1]
        halves = [relations.gather(op.facts, x, 1, np.arange(first, count, 2)) for first in (0, 1)]
        return relations.elementwise(op.facts, halves, op.shape)

    return glu


def rows_for_columns(plain):
    """Use the labels of the rows of an embedding table as those of its columns."""

    def embedding(op):
        table, indices = op.args
        relations.freeze(op.facts, [table], "the axis is indexed by a tensor", [1])
        return Tensor.of(op.shape, [*indices.axes, table.axes[0]])

    return embedding


def without_cells(plain):
    """Do not tie the cells of a grid along a frozen axis."""

    def collapse(*arguments):
        kept, ties, fixed = plain(*arguments)
        return kept, [(one[:0], two[:0]) for one, two in ties], fixed

    return collapse


def scaled_rows(change):
    """Multiply other rows than those of the queries to keep the scale of attention."""

    def make(plain):
        def scaling(*args):
            original = plain(*args)
            return QueryScaling(original.width, change(original.rows))

        return scaling

    return replaced(tracing, "query_scaling", make)


def cutting_first_axis_only(plain):
    def sliced(value, labeled, *more):
        return plain(value, Tensor(labeled.shape, (*labeled.axes[:1], *[None] * (value.dim() - 1))), *more)

    return sliced


def cutting_the_other_axis(plain):
    def sliced(value, labeled, *more):
        square = value.dim() == 2 and value.shape[0] == value.shape[1]
        return plain(value, Tensor(labeled.shape, labeled.axes[::-1]) if square else labeled, *more)

    return sliced


def buffers(change):
    """Change how the surgery cuts buffers."""

    def make(plain):
        def sliced(value, *more):
            kept = plain(value, *more)
            return change(value, kept) if value.dim() and not isinstance(value, nn.Parameter) else kept

        return sliced

    return replaced(surgery, "sliced", make)


def in_both(make):
    """Return a function that replaces `sliced` in the surgery, and in the verification, where it cuts the noise."""

    def plant(patch):
        for module in (surgery, candidate):
            replaced(module, "sliced", make)(patch)

    return plant


def sliced_by(change):
    """Cut each axis by a changed mask."""

    def make(plain):
        def sliced(value, labeled, graph, keep):
            def kept(labels, keep):
                mask = graph.kept(labels, keep)
                return None if mask is None else change(mask)

            return plain(value, labeled, SimpleNamespace(traced=graph.traced, tensors=graph.tensors, kept=kept), keep)

        return sliced

    return in_both(make)


def untied(plain):
    """Copy each parameter, so that tied parameters are no longer shared."""

    def cut(*args):
        pruned = plain(*args)
        for module in pruned.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(value.detach().clone()))
        return pruned

    return cut
