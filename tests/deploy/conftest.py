"""ONNX files written by hand, in the text form that the onnx package reads, and one that Kirsch exported."""

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
    """A classifier of three classes, for images of 2 × 4 × 4, as a model and as a file."""

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


def put(body, path, *, taken="float[batch,2] input", given="float[batch,2] y"):
    """Write an ONNX file whose graph has this body."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({taken}) => ({given}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def write(tmp_path):
    """Writes an ONNX file, by default one that takes (batch, 2) and gives (batch, 2); gives its path."""
    return lambda body, name="hand.onnx", **signature: put(body, tmp_path / name, **signature)


@pytest.fixture
def doubling(write):
    """A file that gives twice what it takes."""
    return write("y = Add(input, input)")


@pytest.fixture
def planted(monkeypatch):
    """Makes the exporter of PyTorch write a file with this body in the place of the model."""
    from kirsch.frameworks.pytorch.io.export import TorchExportable

    def plant(body, **signature):
        def write_onnx(_self, path, **_options):
            put(body, path, **signature)
            return {}

        monkeypatch.setattr(TorchExportable, "write_onnx", write_onnx)

    return plant


@pytest.fixture
def numbers():
    """Five samples of two features, float32."""
    return np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
