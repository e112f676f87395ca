"""Statistics of the inputs of layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.frameworks.find import pytorch
from kirsch.pruning.sparsity import inputs
from kirsch.pruning.sparsity.matrix import to_matrix

MASKING = pytorch().masking
LAYERS = {
    "linear": nn.Linear(6, 5, bias=False),
    "conv": nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
    "transposed 1d": nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
    "transposed 2d": nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 3), dilation=(2, 1), bias=False),
    "transposed groups": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=2, groups=2, bias=False),
    "transposed 3d": nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1, bias=False),
    "transposed kernel 1": nn.ConvTranspose2d(4, 6, 1, stride=2, bias=False),
}


def samples(layer):
    torch.manual_seed(0)
    axes = {nn.Linear: 0}.get(type(layer), len(getattr(layer, "kernel_size", ())))
    return torch.randn(3, getattr(layer, "in_channels", 6), *[4] * axes, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_products_of_the_inputs_give_the_energy_of_the_outputs(name):
    model = nn.Sequential(copy.deepcopy(LAYERS[name])).double().requires_grad_(False)
    x = samples(model[0])
    weight = next(w for w in MASKING.weight_matrices(model) if w.name == "0.weight")
    (gram,) = inputs.grams(model, [x[:2], x[2:]], [weight]).values()
    (squares,) = inputs.squares(model, x, [weight]).values()
    matrix = to_matrix(MASKING.values(model, "0.weight"), weight)
    rows = matrix.reshape(*matrix.shape[:2], -1)
    energy = np.einsum("gri,gij,grj->", rows, gram, rows)
    assert energy == pytest.approx(float((model(x) ** 2).sum()), rel=1e-9)
    np.testing.assert_allclose(np.einsum("gii->gi", gram), squares.reshape(gram.shape[:2]), rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("transposed")])
def test_sparsegpt_changes_the_outputs_of_a_transposed_convolution_less_than_random_zeros(name):
    model = nn.Sequential(copy.deepcopy(LAYERS[name])).float().requires_grad_(False)
    x = samples(model[0]).float()

    def error(importance, data):
        sparse = kirsch.sparsify(model, sparsity=0.5, importance=importance, data=data)
        assert sparse.sparsity == pytest.approx(0.5, abs=0.05)
        return float((kirsch.fold_masks(sparse.model)(x) - model(x)).norm())

    chance = error("random", None)
    assert error("wanda", x) < chance
    assert error("sparsegpt", x) < 0.9 * chance
