"""A plan has a note on layers that the traced forward pass does not use, because code that uses them can fail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.pruning.prune import prune_with_verification

INPUTS = torch.ones(2, 8)


class Heads(nn.Module):
    """Two heads, of which an input uses one."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.randn(1, 16))

    def forward(self, x):
        return self.head(self.body(x).relu()) if x.shape[0] < 10 else self.embed(x)

    def embed(self, x):
        return self.other(self.body(x).relu() * self.scale)


class TrainingHead(Heads):
    def forward(self, x):
        hidden = self.body(x).relu()
        return (self.head(hidden), self.other(hidden * self.scale)) if self.training else self.head(hidden)


def planned(model, **options):
    return kirsch.plan(kirsch.trace(model.eval(), INPUTS, **options), kirsch.Goal(macs=0.6))


def unused_notes(notes):
    return [note for note in notes if "does not use" in note]


def test_layers_that_the_trace_does_not_use_have_a_note_in_the_plan_and_in_the_result():
    model = Heads()
    plan = planned(model)
    (note,) = unused_notes(plan.notes)
    assert "`other`" in note
    assert "`scale`" in note
    assert "head`" not in note
    assert note in str(plan)
    assert unused_notes(kirsch.Plan.from_json(plan.to_json()).notes) == [note]
    assert unused_notes(prune_with_verification(model, plan).notes) == [note]


def test_at_most_three_unused_layers_are_named():
    model = Heads()
    model.more = nn.ModuleList(nn.Linear(16, 2) for _ in range(4))
    (note,) = unused_notes(planned(model).notes)
    assert " and 3 more" in note


@pytest.mark.parametrize(
    ("model", "options"), [(TrainingHead(), {}), (Heads(), {"as_graph": True})], ids=["training", "graph"]
)
def test_layers_that_the_training_trace_uses_or_that_the_result_lacks_have_no_note(model, options):
    assert unused_notes(planned(model, **options).notes) == []
