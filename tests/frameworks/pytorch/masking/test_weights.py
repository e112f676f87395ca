"""Weights that may be masked, and parameters that are kept dense with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kirsch.errors import ModelError
from kirsch.frameworks.find import pytorch
from sparse_networks import Layers

MASKING = pytorch().masking


def test_the_weights_of_layers_are_listed_with_the_axis_of_their_inputs():
    weights = {w.name: w for w in MASKING.weight_matrices(Layers()) if not w.kept}
    assert weights.keys() >= {
        "conv.weight",
        "up.weight",
        "lstm.weight_hh_l1_reverse",
        "gru.weight_ih_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "encoder.linear2.weight",
        "head.weight",
    }
    assert (weights["conv.weight"].input_axis, weights["conv.weight"].groups) == (1, 2)
    assert (weights["up.weight"].input_axis, weights["up.weight"].groups) == (0, 2)
    assert weights["head.weight"].tied == ("tied.weight",)
    assert weights["lstm.weight_ih_l0"].kind == "LSTM"


def test_the_parameters_that_are_kept_have_a_reason():
    kept = {w.name: w.kept for w in MASKING.weight_matrices(Layers()) if w.kept}
    assert "embedding" in kept["tokens.weight"]
    assert "bias or a scale" in kept["norm.weight"]
    assert "no known type" in kept["positions"]


def test_a_parameter_from_which_a_weight_is_computed_is_kept():
    layers = (
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        torch.nn.utils.prune.identity(nn.Linear(4, 4), "weight"),
    )
    for layer in layers:
        reasons = {w.kept for w in MASKING.weight_matrices(layer) if len(w.shape) > 1}
        assert reasons == {"its layer computes the weight from it (weight normalization and the like)"}


def test_every_parameter_is_listed_once():
    names = [w.name for w in MASKING.weight_matrices(Layers())]
    assert sorted(names) == sorted(name for name, _ in Layers().named_parameters())


def test_a_weight_that_is_tied_to_an_embedding_is_kept():
    model = nn.Sequential(nn.Linear(4, 10, bias=False), nn.Embedding(10, 4))
    model[1].weight = model[0].weight
    (weight,) = MASKING.weight_matrices(model)
    assert weight.kept == "tied to `1.weight`, an embedding, of which a sample reads a few rows"


def test_the_names_of_a_model_with_masks_are_those_of_the_model():
    model = Layers()
    before = MASKING.weight_matrices(model)
    masks = {w.name: torch.ones(w.shape, dtype=torch.bool).numpy() for w in before if not w.kept}
    MASKING.hold(model, masks)
    after = {w.name: w for w in MASKING.weight_matrices(model)}
    assert after == {w.name: w for w in before}


def test_values_are_those_of_the_parameter_and_no_view_of_it():
    model = nn.Linear(3, 2)
    values = MASKING.values(model, "weight")
    values[:] = 7
    assert not (model.weight == 7).any()


def test_the_linear_layer_of_transformers_that_reads_rows_has_its_inputs_first(transformers):
    layer = transformers.pytorch_utils.Conv1D(nf=6, nx=4)  # shape (4, 6)
    (weight,) = (w for w in MASKING.weight_matrices(layer) if not w.kept)
    assert (weight.shape, weight.input_axis) == ((4, 6), 0)


def test_a_model_whose_weights_cannot_be_replaced_is_refused():
    with pytest.raises(ModelError, match="The weights of a RecursiveScriptModule cannot be masked"):
        MASKING.weight_matrices(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match="meta device"):
        MASKING.weight_matrices(nn.Linear(2, 2, device="meta"))
