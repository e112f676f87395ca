"""Models that return different outputs for the same inputs are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kirsch.errors import NumericError
from kirsch.frameworks.determinism import require_deterministic

BATCH = (np.ones((2, 4), np.float32),)


class Draws(nn.Linear):
    """Applies dropout in every mode."""

    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, training=True)


class Counts(nn.Linear):
    """Counts its calls."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x) + self.runs


class Indices(nn.Linear):
    """Returns random integers."""

    def forward(self, x):
        return torch.randint(0, 1000, (len(x), 50))


class NotFinite(nn.Linear):
    """Returns the same numbers in each run, some of them infinite."""

    def forward(self, x):
        return torch.cat([super().forward(x), x.log() * 0 - torch.inf], 1)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Draws, "draws random numbers in inference mode: test_determinism.py:"),
        (Indices, "draws random numbers in inference mode: test_determinism.py:"),
        (Counts, "Two runs with the same inputs give different outputs"),
    ],
)
def test_nondeterministic_model_is_refused_with_cause_and_fix(kind, cause):
    with pytest.raises(NumericError) as caught:
        require_deterministic(kind(4, 8), BATCH)
    assert (
        caught.value.what
        == f"The model {kind.__name__} returns different outputs for the same inputs in inference mode."
    )
    assert cause in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 8), NotFinite(4, 2), nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)).train()]
)
def test_deterministic_model_passes_and_is_not_changed(model):
    mode = model.training
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    require_deterministic(model, BATCH)
    assert torch.equal(torch.rand(1), expected)
    assert model.training is mode
