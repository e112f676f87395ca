"""By default, a softmax over units freezes them. With softmax="kept", it is computed over the kept units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UsageError
from kirsch.graph.plan import Goal, Plan
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import with_noise


class Gate(nn.Module):
    """Channels weighted by a softmax over channels."""

    def __init__(self, gate):
        super().__init__()
        self.before, self.after, self.gate = nn.Linear(4, 8), nn.Linear(8, 3), gate

    def forward(self, x):
        x = self.before(x)
        return self.after(x * self.gate(x))


GATES = {
    "softmax": lambda x: x.softmax(-1),
    "logarithm of a softmax": lambda x: x.log_softmax(-1),
    "softmax in another type": lambda x: torch.softmax(x, -1, dtype=torch.float64).float(),
}


@pytest.mark.parametrize("gate", GATES)
def test_units_under_a_softmax_are_frozen_by_default(gate):
    graph = kirsch.trace(with_noise(Gate(GATES[gate])), torch.randn(5, 4))
    assert not graph.groups
    assert graph.blockers[0].reason == "a softmax is computed over the axis"


@pytest.mark.parametrize("gate", GATES)
def test_with_softmax_kept_units_are_removed_and_the_verification_reports_the_softmax(gate):
    model, inputs = with_noise(Gate(GATES[gate])), torch.randn(5, 4)
    plan = kirsch.plan(kirsch.trace(model, inputs, softmax="kept"), Goal(parameters=0.6))
    result = prune_with_verification(model, plan)
    assert result.verification.power > 1e-3
    assert "statistics of 1 operation computed over the kept units" in result.verification.text
    kept = torch.nn.functional.linear(inputs, result.model.before.weight, result.model.before.bias)
    torch.testing.assert_close(result.model(inputs), result.model.after(kept * GATES[gate](kept)))


def test_the_option_softmax_is_stored_in_the_plan():
    model, inputs = with_noise(Gate(GATES["softmax"])), torch.randn(5, 4)
    plan = Plan.from_json(kirsch.plan(kirsch.trace(model, inputs, softmax="kept"), Goal(parameters=0.6)).to_json())
    assert kirsch.prune(model, plan).before.out_features < 8


def test_an_unknown_value_of_softmax_is_refused():
    with pytest.raises(UsageError, match=r"`softmax` .* is 'keep'; .*Did you mean 'kept'"):
        kirsch.trace(Gate(GATES["softmax"]), torch.randn(5, 4), softmax="keep")
