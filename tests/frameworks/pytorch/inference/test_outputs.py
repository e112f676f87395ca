"""Names of output tensors, and the choice of outputs that must keep their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UnknownNameError
from kirsch.frameworks.pytorch.inference.outputs import named, selected_outputs

ONE, TWO = torch.zeros(1), torch.ones(2)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Record:
    logits: torch.Tensor
    hidden_states: tuple


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (ONE, ["0"]),
        ((ONE, [TWO, None]), ["0", "1.0"]),
        ({"a": ONE, "b": {"c": TWO}}, ["a", "b.c"]),
        (Pair(ONE, TWO), ["first", "second"]),
        (Record(ONE, (TWO, ONE)), ["logits", "hidden_states.0", "hidden_states.1"]),
        ({"a.b": ONE, "a": {"b": TWO}}, ["a.b", "a.b'"]),
        (None, []),
    ],
)
def test_every_tensor_has_a_unique_name(outputs, names):
    assert list(named(outputs)) == names


def test_hidden_states_may_lose_units_only_if_the_outputs_include_logits():
    assert selected_outputs(["last_hidden_state", "pooled"], ()) == {"last_hidden_state", "pooled"}
    assert selected_outputs(["logits", "encoder_last_hidden_state", "past_key_values.0"], ()) == {"logits"}
    assert selected_outputs(["logits", "aux.0", "aux.1"], ["aux"]) == {"aux.0", "aux.1"}


class Both(nn.Module):
    """Model that returns logits and the features before the last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        features = torch.relu(self.first(x))
        return {"logits": self.last(features), "features": features}


def test_outputs_that_are_not_selected_may_lose_units_and_are_verified():
    model, inputs = Both(), torch.randn(2, 6)
    assert kirsch.trace(model, inputs).groups == ()
    graph = kirsch.trace(model, inputs, outputs="logits")
    assert [group.size for group in graph.groups] == [8]
    pruned = kirsch.prune(model, kirsch.plan(graph, kirsch.Goal(macs=0.5)))
    assert pruned(inputs)["features"].shape == (2, 4)


def test_the_error_for_an_unknown_output_proposes_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"no output 'logit'\. Known: features, logits\. Did you mean 'logits'"):
        kirsch.trace(Both(), torch.randn(2, 6), outputs=["logit"])
