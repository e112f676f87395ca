"""Recurrent layers: LSTM, GRU and plain ones, of several layers and in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.pytorch.analysis.operation import Step
    from kirsch.graph.labels import Axis

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*GATES)
def _recurrent(step: Step) -> list[Tensor]:
    """Each gate has a row for each unit of the state, so that a unit goes from all gates at once.

    A module keeps one `hidden_size` for all its layers and directions, which therefore go together.
    """
    if isinstance(step.args[3], (list, tuple)):
        return step.freeze_all("a recurrent layer over packed sequences is not analyzed")
    x, start, weights, biased, layers = step.args[:5]
    directions = 2 if step.args[7] else 1
    each = len(weights) // (layers * directions)
    projected = each > 2 + 2 * biased
    facts = step.facts
    relations.freeze(facts, [x], "it is the time or the batch of a recurrent layer", range(len(x.shape) - 1))
    below, hidden = x.axes[-1], weights[each - 1].axes[1] if projected else weights[1].axes[1]
    shown = weights[1].axes[1]  # what a layer puts out: its state, or the projection of it
    for layer in range(layers):
        for direction in range(directions):
            place = (layer * directions + direction) * each
            own = weights[place : place + each]
            into, within = own[:2]
            facts.equate(below, into.axes[1])
            shown = facts.equate(shown, within.axes[1])
            hidden = _gated(step, hidden, own[: each - projected])
            if projected:
                shown, hidden = facts.equate(shown, own[-1].axes[0]), facts.equate(hidden, own[-1].axes[1])
            for weight in (into, within, *own[each - projected :]):
                facts.cost("macs", np.prod(x.shape[:-1]), weight.axes)
        if not projected:
            shown = hidden = facts.equate(shown, hidden)
        facts.mark(hidden, "recurrent unit")
        below = None if shown is None else np.tile(shown, directions)
    states = list(start) if isinstance(start, (list, tuple)) else [start]
    kept = [shown, hidden][: len(states)]
    for tensor, axis in zip(states, kept, strict=True):
        facts.equate(axis, tensor.axes[-1])
    ends = [Tensor.of(s, [*[None] * (len(s) - 1), axis]) for s, axis in zip(step.shapes[1:], kept, strict=True)]
    return [Tensor.of(step.shape, [*[None] * (len(x.shape) - 1), below]), *ends]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(step: Step) -> list[Tensor]:
    """One step in time, (batch, features); the state is a pair where a memory goes along."""
    x, start = step.args[:2]
    weights = [weight for weight in step.args[2:] if weight is not None]
    step.facts.equate(x.axes[-1], weights[0].axes[1])
    hidden = _gated(step, weights[1].axes[1], weights)
    states = start if isinstance(start, (list, tuple)) else [start]
    relations.freeze(step.facts, [x, *states], "it is the batch of a recurrent layer", [0])
    for tensor in states:
        step.facts.equate(hidden, tensor.axes[-1])
    step.facts.mark(hidden, "recurrent unit")
    for weight in weights[:2]:
        step.facts.cost("macs", x.shape[0], weight.axes)
    return [Tensor.of(shape, [None, hidden]) for shape in step.shapes]


def _gated(step: Step, hidden: Axis, weights: Sequence[Tensor]) -> Axis:
    """The units of the state, with a row of each gate tied to each."""
    into, within, *biases = weights
    for stacked in (into.axes[0], within.axes[0], *(bias.axes[0] for bias in biases)):
        if stacked is None:
            continue
        for gate in np.split(stacked, GATES[step.name.removesuffix("_cell")]):
            hidden = step.facts.equate(hidden, None if len(gate) == 1 else gate)
    return hidden
