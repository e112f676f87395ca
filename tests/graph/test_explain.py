"""What goes with a layer, and by which operations, in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UnknownNameError


class Residual(nn.Module):
    """Two layers on one stream, and one that splits what it is given by an attribute."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.hidden = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.hidden(torch.relu(self.inner(self.norm(x))))
        return self.last(x.softmax(0))


@pytest.fixture
def graph():
    return kirsch.trace(Residual(), torch.randn(2, 6))


def test_each_axis_of_a_layer_is_told_with_the_operations_that_tie_it(graph):
    assert graph.explain("hidden").splitlines() == [
        "hidden.weight[i], hidden.bias[i]: the 8 units (embedding dim) of 'stem'.",
        "With each of them go:",
        "  stem: weight[i], bias[i]  by add (test_explain.py:23)",
        "  inner: weight[:, i]  by add (test_explain.py:23) → linear (inner)",
        "  last: weight[:, i]  by add (test_explain.py:23) → linear (last)",
        "  norm: weight[i], bias[i]  by add (test_explain.py:23) → layer_norm (norm)",
        "hidden.weight[:, i]: the 8 units (ffn unit) of 'inner'.",
        "With each of them go:",
        "  inner: weight[i], bias[i]  by linear (hidden)",
    ]


def test_what_stays_is_told_with_its_reason(graph):
    assert graph.explain("last").splitlines()[-2:] == [
        "last.weight[i] stays: it is an output of the model (output).",
        "last.bias[i] stays: it is an output of the model (output).",
    ]


def test_one_parameter_is_explained_alone(graph):
    assert graph.explain("stem.bias").splitlines()[0] == "stem.bias[i]: the 8 units (embedding dim) of 'stem'."


def test_an_unknown_layer_is_answered_with_the_nearest(graph):
    with pytest.raises(UnknownNameError, match=r"no layer with parameters named 'steam'.*Did you mean 'stem'"):
        graph.explain("steam")


def test_sizes_that_one_attribute_gives_are_told_as_such():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 3)
            self.width = 8

        def forward(self, x):
            return self.last(torch.cat([layer(x).view(2, self.width) for layer in (self.first, self.second)], 1))

    text = kirsch.trace(Twice(), torch.randn(2, 6)).explain("first")
    assert "  second: weight[i], bias[i]  as one number in the code gives both their sizes" in text.splitlines()
