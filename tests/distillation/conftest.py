"""Fixtures of the distillation tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def to_tensor(values):
    """Return numpy values as a tensor that shares their memory."""
    return torch.from_numpy(np.asarray(values))


@pytest.fixture(params=[np.asarray, to_tensor], ids=["numpy", "torch"])
def framework(request):
    """Function that converts numpy values to arrays of each framework in turn."""
    return request.param
