"""Errors for code in `forward` that cannot be traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis.trace import trace


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, between):
        super().__init__()
        self.between, self.first, self.second = between, nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [lambda x: x - torch.from_numpy(np.ones(8, np.float32)), lambda x: x * float(torch.ones(3).numpy().sum())],
    ids=["from_numpy", "numpy"],
)
def test_the_error_for_a_constant_from_numpy_suggests_a_buffer(between):
    with pytest.raises(ModelError, match="register_buffer") as caught:
        trace(Between(between), torch.ones(2, 3))
    assert "github" not in str(caught.value)
    assert "runs" not in str(caught.value)


def test_the_exporter_prints_nothing_for_a_branch_on_values(capfd):
    with pytest.raises(ModelError, match="in Python only"):
        trace(Between(lambda x: x if x.sum() > 0 else -x), torch.ones(2, 3))
    assert capfd.readouterr().err == ""
