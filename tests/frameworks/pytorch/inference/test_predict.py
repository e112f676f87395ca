"""Prediction in inference mode, for models in any mode."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.errors import DataError
from kirsch.frameworks.pytorch.inference.placement import from_numpy
from kirsch.frameworks.pytorch.inference.predict import infer, inference, logits_of, predict, tensors


@pytest.fixture
def model():
    """Return a model with batch normalization and dropout, in training mode except for one layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        model[1].running_mean.copy_(torch.randn(4))
    model[0].eval()
    return model


INPUTS = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)


def logits_in_numpy(model):
    """Return the logits with running statistics and without dropout, computed in numpy."""
    first, norm, _, last = model
    x = INPUTS @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    x = (x - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
    return x @ last.weight.detach().numpy().T + last.bias.detach().numpy()


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 256])
def test_logits_are_those_of_inference_mode_for_any_batch_size(model, batch_size):
    before, state = modes(model), {name: value.clone() for name, value in model.state_dict().items()}
    found = predict(model, INPUTS, batch_size=batch_size)
    np.testing.assert_allclose(found, logits_in_numpy(model), atol=1e-6)  # float32
    assert modes(model) == before == [True, False, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_arrays_tensors_and_views_give_the_same_logits(model):
    expected = predict(model, INPUTS)
    np.testing.assert_array_equal(predict(model, torch.from_numpy(INPUTS)), expected)
    np.testing.assert_allclose(predict(model, INPUTS[::-1]), expected[::-1], atol=1e-6)  # a view of negative stride


def test_logits_of_a_bfloat16_model_are_float32(model):
    found = predict(model.to(torch.bfloat16), torch.from_numpy(INPUTS).bfloat16())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, logits_in_numpy(model.float()), atol=0.05)  # bfloat16 has 8 bits


def test_modes_are_restored_after_an_error(model):
    before, inside = modes(model), []

    def fail():
        inside.extend(modes(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), inference(model):
        fail()
    assert not any(inside)
    assert modes(model) == before


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: (logits, None),
        lambda logits: [logits],
    ],
)
def test_logits_of_returns_the_logits_in_the_outputs(wrap):
    logits = torch.arange(3)
    assert logits_of(wrap(logits)) is logits


def test_infer_records_no_gradient(model):
    model.eval()
    assert not infer(model, torch.from_numpy(INPUTS)).requires_grad
    assert torch.is_grad_enabled()


def test_predict_without_samples_raises_an_error():
    with pytest.raises(DataError, match=r"^The inputs have no samples, so there is nothing to predict\.$"):
        predict(nn.Linear(3, 2), np.zeros((0, 3), np.float32))


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">f8", "<f4"])
@pytest.mark.parametrize("shape", [(3, 4), ()])
@pytest.mark.parametrize(
    "convert",
    [lambda array: tensors(array, nn.Linear(1, 1)), from_numpy, lambda array: from_numpy(array, like=torch.ones(1))],
    ids=["tensors", "from_numpy", "from_numpy with like"],
)
def test_arrays_of_any_byte_order_are_converted(dtype, shape, convert):
    array = np.arange(12).astype(dtype)[:: 1 if shape else 12].reshape(shape)
    found = convert(array)
    assert found.tolist() == array.tolist()
    assert found.numpy().dtype == array.dtype.newbyteorder("=")
