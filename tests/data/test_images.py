"""Images whose type or order of axes does not suit the model are refused. The error names the conversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.errors import ModelError, ShapeError, UsageError

LABELS = np.arange(16) % 2
FIRST = np.random.default_rng(0).random((16, 3, 8, 8), np.float32)
LAST = np.ascontiguousarray(FIRST.transpose(0, 2, 3, 1))
ORDER = r"inputs\.transpose\(0, 3, 1, 2\)"
CASES = {
    "channels last": (LAST, r"takes images with channels first, \(N, C, H, W\); its inputs are float32 of .*" + ORDER),
    "bytes": ((FIRST * 255).astype(np.uint8), r"its inputs are uint8 .*inputs\.astype\(numpy\.float32\) / 255 for arr"),
    "bytes, channels last": (
        (LAST * 255).astype(np.uint8),
        r"takes images with channels first.* uint8 .*" + ORDER + r"\.astype\(numpy\.float32\) / 255 for arrays, inputs"
        r"\.permute\(0, 3, 1, 2\)\.float\(\) / 255 for tensors",
    ),
}


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def in_memory(images):
    return ArrayData(images, LABELS, batch_size=8)


def loader(images):
    return DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(LABELS)), 8)


@pytest.mark.parametrize("data", [in_memory, loader])
@pytest.mark.parametrize("case", CASES)
def test_distillation_refuses_images_that_the_model_does_not_take(case, data):
    images, sentence = CASES[case]
    with pytest.raises((UsageError, ModelError), match=sentence):
        kirsch.distill(net(), net(), data(images), check_teacher=False)


@pytest.mark.parametrize("part", ["all", "test"])
@pytest.mark.parametrize("case", CASES)
def test_compress_refuses_images_that_the_model_does_not_take(case, part, tmp_path):
    images, sentence = CASES[case]
    split, right = kirsch.Split(images, LABELS), kirsch.Split(FIRST, LABELS)
    train = split if part == "all" else right
    with pytest.raises((UsageError, ModelError), match=sentence):
        kirsch.compress(net(), kirsch.DataSet("images", train, train, split), kirsch.Goal(macs=0.5), folder=tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_measurement_refuses_images_that_the_file_does_not_take(case, tmp_path):
    images, sentence = CASES[case]
    artifact = kirsch.export(net(), tmp_path / "model.onnx", example_inputs=torch.from_numpy(FIRST[:2]))
    fix = sentence.rpartition(".*")[2]
    with pytest.raises(ShapeError, match=fix):
        kirsch.measure(artifact, example_inputs=torch.from_numpy(FIRST[:2]), data=(images, LABELS))


def test_images_whose_channels_are_wrong_in_either_order_are_not_called_channels_last():
    gray = np.zeros((16, 8, 8, 1), np.float32)
    with pytest.raises(ModelError, match=r"Sequential does not run on a batch whose inputs are float32") as caught:
        kirsch.distill(net(), net(), in_memory(gray), check_teacher=False)
    assert "channels first, (N, C, H, W)" not in str(caught.value)


def test_models_that_take_bytes_with_channels_last_are_trained():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x.permute(0, 3, 1, 2).float() / 255)

    data, training = in_memory((LAST * 255).astype(np.uint8)), kirsch.Training(epochs=1)
    assert kirsch.distill(Own(), Own(), data, training=training, check_teacher=False).history
