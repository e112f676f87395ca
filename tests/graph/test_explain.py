"""Explanation in words of the parameters that are pruned together with a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UnknownNameError


class Residual(nn.Module):
    """Layers on one residual stream. The input of the last layer is a softmax over the samples."""

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


def test_each_axis_of_a_layer_is_explained_with_the_operations_that_tie_it(graph):
    add = f"add (test_explain.py:{Residual.forward.__code__.co_firstlineno + 2})"
    assert graph.explain("hidden").splitlines() == [
        "hidden.weight[i], hidden.bias[i]: the 8 units (embedding dim) of 'stem'.",
        "Each unit is removed together with:",
        f"  stem: weight[i], bias[i]  by {add}",
        f"  inner: weight[:, i]  by {add} → linear (inner)",
        f"  last: weight[:, i]  by {add} → linear (last)",
        f"  norm: weight[i], bias[i]  by {add} → layer_norm (norm)",
        "hidden.weight[:, i]: the 8 units (ffn unit) of 'inner'.",
        "Each unit is removed together with:",
        "  inner: weight[i], bias[i]  by linear (hidden)",
    ]


def test_a_frozen_axis_is_explained_with_the_reason(graph):
    assert graph.explain("last").splitlines()[-2:] == [
        "last.weight[i] stays: the axis is part of an output of the model (output).",
        "last.bias[i] stays: the axis is part of an output of the model (output).",
    ]


def test_a_single_parameter_can_be_explained(graph):
    assert graph.explain("stem.bias").splitlines()[0] == "stem.bias[i]: the 8 units (embedding dim) of 'stem'."


def test_the_error_for_an_unknown_layer_suggests_the_nearest_name(graph):
    with pytest.raises(UnknownNameError, match=r"no layer with parameters named 'steam'.*Did you mean 'stem'"):
        graph.explain("steam")


def test_layers_tied_by_an_attribute_are_explained_by_a_number_in_the_code():
    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 3)
            self.width = 8

        def forward(self, x):
            return self.last(torch.cat([layer(x).view(2, self.width) for layer in (self.first, self.second)], 1))

    text = kirsch.trace(TwoLayers(), torch.randn(2, 6)).explain("first")
    assert "  second: weight[i], bias[i]  by a number in the code that sets both sizes" in text.splitlines()


def test_units_of_a_reshape_are_explained_by_the_view():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 2
            self.query, self.scale, self.out = nn.Linear(4, 6), nn.Parameter(torch.ones(3)), nn.Linear(6, 2)

        def forward(self, x):
            x = self.query(x).view(2, self.heads, -1)
            return self.out((x * self.scale).flatten(1))

    graph = kirsch.trace(Heads(), torch.randn(2, 4))
    by_view, by_mul = (f"test_explain.py:{Heads.forward.__code__.co_firstlineno + line}" for line in (1, 2))
    assert graph.explain("query").splitlines()[:4] == [
        "query.weight[i], query.bias[i]: the 3 units (position in chunk) of 'scale'.",
        "Each unit is removed together with:",
        f"  scale[i]  by view ({by_view}) → mul ({by_mul})",
        "  out: weight[:, i]  by linear (out)",
    ]
    assert f"  query: weight[i], bias[i]  by mul ({by_mul}) → view ({by_view})" in graph.explain("scale").splitlines()
