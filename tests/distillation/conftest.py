"""Fixtures of the distillation tests."""

from __future__ import annotations

import shutil

import pytest
import torch

from distillation.linear_models import D, K, linear
from distillation.stores import tiny_store


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory):
    """Folder of a finished store that no test changes."""
    folder = tmp_path_factory.mktemp("store") / "store"
    tiny_store(folder)
    return folder


@pytest.fixture
def store_copy(store_folder, tmp_path):
    """Folder of a copy of the finished store, for tests that change it."""
    shutil.copytree(store_folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def teacher():
    """Linear model that classifies the samples correctly."""
    model = linear()
    model[0].weight.data.copy_(2 * torch.eye(K, D))
    return model


@pytest.fixture
def student():
    """Linear model with random weights."""
    return linear(seed=1)
