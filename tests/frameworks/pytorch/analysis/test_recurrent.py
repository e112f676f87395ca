"""Recurrent layers: a unit of the state is removed from all gates, layers and directions together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trace_and_cut import assert_pruned_correctly

TOKENS = torch.randn(2, 5, 6)


class Recurrent(nn.Module):
    """A linear layer, a recurrent layer, and a linear layer. `read` selects the input of the last layer."""

    def __init__(self, layer, read, width):
        super().__init__()
        self.first, self.layer, self.last, self.read = nn.Linear(6, 7), layer, nn.Linear(width, 4), read

    def forward(self, x):
        return self.last(self.read(*self.layer(torch.tanh(self.first(x)))))


def sequence(out, state):
    return out


LAYERS = {
    "lstm": (nn.LSTM(7, 8, batch_first=True), sequence, 8, [7, 8]),
    "lstm, last state": (nn.LSTM(7, 8, batch_first=True), lambda out, state: state[0][-1], 8, [7, 8]),
    "lstm, memory": (nn.LSTM(7, 8, batch_first=True), lambda out, state: state[1][-1], 8, [7, 8]),
    "lstm without bias": (nn.LSTM(7, 8, batch_first=True, bias=False), sequence, 8, [7, 8]),
    "lstm, time first": (nn.LSTM(7, 8), sequence, 8, [7, 8]),
    "lstm of two layers": (nn.LSTM(7, 8, 2, batch_first=True), sequence, 8, [7, 8]),
    "lstm in both directions": (nn.LSTM(7, 8, batch_first=True, bidirectional=True), sequence, 16, [7, 8]),
    "lstm of two layers in both directions": (
        nn.LSTM(7, 8, 2, batch_first=True, bidirectional=True, dropout=0.1),
        sequence,
        16,
        [7, 8],
    ),
    "lstm, both last states side by side": (
        nn.LSTM(7, 8, batch_first=True, bidirectional=True),
        lambda out, state: torch.cat([state[0][0], state[0][1]], -1),
        16,
        [7, 8],
    ),
    "lstm with a projection": (nn.LSTM(7, 8, batch_first=True, proj_size=6), sequence, 6, [6, 7, 8]),
    "lstm with a projection in both directions": (
        nn.LSTM(7, 8, 2, batch_first=True, proj_size=6, bidirectional=True, bias=False),
        sequence,
        12,
        [6, 7, 8],
    ),
    "gru": (nn.GRU(7, 8, batch_first=True), sequence, 8, [7, 8]),
    "gru in both directions": (nn.GRU(7, 8, 2, batch_first=True, bidirectional=True), sequence, 16, [7, 8]),
    "gru, last state": (nn.GRU(7, 8, batch_first=True), lambda out, state: state[-1], 8, [7, 8]),
    "plain": (nn.RNN(7, 8, batch_first=True), sequence, 8, [7, 8]),
    "plain, with relu, without bias": (
        nn.RNN(7, 8, batch_first=True, nonlinearity="relu", bias=False),
        sequence,
        8,
        [7, 8],
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_recurrent_layer_is_pruned_correctly(name, seed):
    layer, read, width, sizes = LAYERS[name]
    _, pruned = assert_pruned_correctly(Recurrent(layer, read, width), TOKENS, sizes=sizes, seed=seed)
    assert (pruned.layer.input_size, pruned.layer.hidden_size) == (4, 4)


def test_an_initial_state_loses_the_same_units():
    class InitialState(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.layer, self.last = nn.Linear(6, 8), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.layer(x, torch.tanh(self.start(x[:, 0]))[None])[0])

    _, pruned = assert_pruned_correctly(InitialState(), TOKENS, sizes=[8])
    assert pruned.start.out_features == 4


class Loop(nn.Module):
    """A cell that a loop applies to the tokens."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.last = cell, nn.Linear(8, 4)

    def forward(self, x):
        state = None
        for token in x.unbind(1):
            state = self.cell(token, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "cell",
    [
        nn.LSTMCell(6, 8),
        nn.LSTMCell(6, 8, bias=False),
        nn.GRUCell(6, 8),
        nn.RNNCell(6, 8),
        nn.RNNCell(6, 8, nonlinearity="relu"),
    ],
)
def test_a_recurrent_cell_is_pruned_correctly(cell):
    _, pruned = assert_pruned_correctly(Loop(cell), TOKENS, sizes=[8])
    assert (pruned.cell.input_size, pruned.cell.hidden_size) == (6, 4)
