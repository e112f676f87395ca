"""Fixtures of all tests. Weights and examples that a test draws are the same in every run."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)  # a busy machine misses any deadline
settings.load_profile("repeatable")


def pytest_collectstart(collector):
    """Set the seed before a test file is imported, because models at the top level of a file are built at import."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _import_beside_torchvision(name):
    """Import a package, also where the compiled operators of torchvision are missing. Skip the test without it."""
    from kirsch.frameworks.pytorch.io.vision import import_beside

    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        import_beside("torchvision")
    return import_beside(name)


@pytest.fixture(scope="session")
def transformers():
    return _import_beside_torchvision("transformers")


@pytest.fixture(scope="session")
def timm():
    return _import_beside_torchvision("timm")


def to_tensor(values):
    """Return numpy values as a tensor that shares their memory."""
    return torch.from_numpy(np.asarray(values))


@pytest.fixture(params=[np.asarray, to_tensor], ids=["numpy", "torch"])
def framework(request):
    """Return a function that converts numpy values to arrays of a framework. The test runs once for each framework."""
    return request.param
