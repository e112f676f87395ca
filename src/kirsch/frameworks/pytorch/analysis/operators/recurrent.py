"""Rules of recurrent layers and cells: LSTM, GRU and plain RNN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.pytorch.analysis.operation import OperationContext
    from kirsch.graph.labels import Axis

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*GATES)
def _recurrent(op: OperationContext) -> list[Tensor]:
    """Each gate has one row for each unit of the state, so a unit is removed from all gates together.

    All layers and directions share one `hidden_size`, so they lose the same units.
    """
    if isinstance(op.args[3], (list, tuple)):
        return op.freeze_all("a recurrent layer over packed sequences is not analyzed")
    x, start, weights, biased, layers = op.args[:5]
    directions = 2 if op.args[7] else 1
    each = len(weights) // (layers * directions)  # weights of one layer in one direction
    projected = each > 2 + 2 * biased
    facts = op.facts
    relations.freeze(facts, [x], "the axis is the time or batch axis of a recurrent layer", range(len(x.shape) - 1))
    below, hidden = x.axes[-1], weights[each - 1].axes[1] if projected else weights[1].axes[1]
    output = weights[1].axes[1]  # the state, or its projection
    for layer in range(layers):
        for direction in range(directions):
            first = (layer * directions + direction) * each
            own = weights[first : first + each]
            from_input, from_state = own[:2]
            facts.equate(below, from_input.axes[1])
            output = facts.equate(output, from_state.axes[1])
            hidden = _gated(op, hidden, own[: each - projected])
            if projected:
                output, hidden = facts.equate(output, own[-1].axes[0]), facts.equate(hidden, own[-1].axes[1])
            for weight in (from_input, from_state, *own[each - projected :]):
                facts.mark(weight.axes[1], "contracted")
                facts.cost("macs", np.prod(x.shape[:-1]), weight.axes)
        if not projected:
            output = hidden = facts.equate(output, hidden)
        facts.mark(hidden, "recurrent unit")
        below = None if output is None else np.tile(output, directions)
    states = list(start) if isinstance(start, (list, tuple)) else [start]
    labels = [output, hidden][: len(states)]
    for tensor, axis in zip(states, labels, strict=True):
        facts.equate(axis, tensor.axes[-1])
    ends = [Tensor.of(s, [*[None] * (len(s) - 1), axis]) for s, axis in zip(op.shapes[1:], labels, strict=True)]
    return [Tensor.of(op.shape, [*[None] * (len(x.shape) - 1), below]), *ends]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(op: OperationContext) -> list[Tensor]:
    """One time step on (batch, features); the state of an LSTM is a pair."""
    x, start = op.args[:2]
    weights = [weight for weight in op.args[2:] if weight is not None]
    op.facts.equate(x.axes[-1], weights[0].axes[1])
    hidden = _gated(op, weights[1].axes[1], weights)
    states = start if isinstance(start, (list, tuple)) else [start]
    relations.freeze(op.facts, [x, *states], "the axis is the batch axis of a recurrent layer", [0])
    for tensor in states:
        op.facts.equate(hidden, tensor.axes[-1])
    op.facts.mark(hidden, "recurrent unit")
    for weight in weights[:2]:
        op.facts.mark(weight.axes[1], "contracted")
        op.facts.cost("macs", x.shape[0], weight.axes)
    return [Tensor.of(shape, [None, hidden]) for shape in op.shapes]


def _gated(op: OperationContext, hidden: Axis, weights: Sequence[Tensor]) -> Axis:
    """Return the labels of the hidden units, tied to their row in each gate."""
    from_input, from_state, *biases = weights
    for stacked in (from_input.axes[0], from_state.axes[0], *(bias.axes[0] for bias in biases)):
        if stacked is None:
            continue
        for gate in np.split(stacked, GATES[op.name.removesuffix("_cell")]):
            hidden = op.facts.equate(hidden, None if len(gate) == 1 else gate)
    return hidden
