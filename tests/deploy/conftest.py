"""ONNX files for tests: some are written as text that the onnx package parses, and one is exported by Kirsch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import nn

import kirsch


class Exported(NamedTuple):
    """A classifier with three classes for images of shape (2, 4, 4), as a model and as a file."""

    model: nn.Module
    artifact: kirsch.Artifact
    images: torch.Tensor


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    images = torch.randn(5, 2, 4, 4)
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    return Exported(model, kirsch.export(model, path, example_inputs=images), images)


def write_text(body, path, *, inputs="float[batch,2] input", outputs="float[batch,2] y"):
    """Write an ONNX file whose graph has this body; return its path."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an ONNX file; by default, its input and output have shape (batch, 2)."""
    return lambda body, name="hand.onnx", **signature: write_text(body, tmp_path / name, **signature)


@pytest.fixture
def doubling(write):
    """Return the path of a file that doubles its input."""
    return write("y = Add(input, input)")


@pytest.fixture
def planted(monkeypatch):
    """Return a function that makes the PyTorch exporter write a file with a given body instead of the model."""
    from kirsch.frameworks.pytorch.io.export import TorchExportable

    def plant(body, **signature):
        def write_onnx(_self, path, **_options):
            write_text(body, path, **signature)
            return {}

        monkeypatch.setattr(TorchExportable, "write_onnx", write_onnx)

    return plant


@pytest.fixture
def numbers():
    """Return five samples with two features, float32."""
    return np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
