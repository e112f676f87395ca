"""Whether a model gives the same outputs for the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kirsch.errors import NumericError
from kirsch.frameworks.steadiness import require_steady

BATCH = (np.ones((2, 4), np.float32),)


class Draws(nn.Linear):
    """Drops units whatever the mode."""

    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, training=True)


class Counts(nn.Linear):
    """Remembers how often it has run."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x) + self.runs


class Indices(nn.Linear):
    """Gives whole numbers, drawn anew."""

    def forward(self, x):
        return torch.randint(0, 1000, (len(x), 50))


class NotFinite(nn.Linear):
    """Gives the same numbers, some of which are not finite."""

    def forward(self, x):
        return torch.cat([super().forward(x), x.log() * 0 - torch.inf], 1)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Draws, "draws random numbers in inference mode: test_steadiness.py:"),
        (Indices, "draws random numbers in inference mode: test_steadiness.py:"),
        (Counts, "Two runs with the same inputs give different outputs"),
    ],
)
def test_a_model_that_gives_other_outputs_at_each_run_is_named_with_what_to_do(kind, cause):
    with pytest.raises(NumericError) as caught:
        require_steady(kind(4, 8), BATCH)
    assert (
        caught.value.what
        == f"The model {kind.__name__} gives other outputs at each run on the same inputs, in eval mode."
    )
    assert cause in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 8), NotFinite(4, 2), nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)).train()]
)
def test_a_model_that_draws_in_training_alone_is_steady_and_left_as_it_is(model):
    mode = model.training
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    require_steady(model, BATCH)
    assert torch.equal(torch.rand(1), expected)
    assert model.training is mode
