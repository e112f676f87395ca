"""Masks in the training, export and storage of Kirsch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import kirsch
from kirsch.frameworks.find import pytorch
from sparse_networks import digits_like

MASKING = pytorch().masking


def assert_zeros(model, masks):
    folded = dict(kirsch.fold_masks(model).named_parameters())
    for name, mask in masks.items():
        values = folded[name].detach().numpy()
        assert not values[~mask].any()
        assert np.count_nonzero(values) > 0.9 * mask.sum()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_zeros_are_exactly_zero_after_training(optimizer, ema):
    model, images, labels = digits_like()
    sparse = kirsch.sparsify(model, sparsity=0.7)
    training = kirsch.Training(
        epochs=2, learning_rate=0.02, optimizer=optimizer, weight_decay=0.1, ema_decay=ema, max_grad_norm=1.0
    )
    data = kirsch.ArrayData(images.numpy(), labels.numpy(), batch_size=16)
    trained = kirsch.fit(sparse.model, data, training=training, progress=False).model
    taught = kirsch.distill(sparse.model, model, data, training=training, progress=False, check_teacher=False).model
    masks = MASKING.masks(sparse.model)
    for each in (trained, taught):
        assert_zeros(each, masks)
        assert not torch.equal(each[3].weight, sparse.model[3].weight)


def test_features_and_stages_are_those_of_the_model_without_masks():
    model, images, _ = digits_like()
    sparse = kirsch.sparsify(model, sparsity=0.7).model
    features = pytorch().features
    assert features.shapes(sparse, images) == features.shapes(model, images)
    for text in ("**", "*", "penultimate"):
        assert features.expand(sparse, text, images) == features.expand(model, text, images)


def test_a_gradual_schedule_in_a_loop_of_ones_own_ends_at_the_final_sparsity():
    model, images, labels = digits_like()
    schedule = kirsch.SparsitySchedule(0.8, steps=8, every=2)
    sparse = kirsch.sparsify(model, sparsity=schedule(0))
    optimizer = torch.optim.Adam(sparse.model.parameters(), 0.01)
    for step in range(8):
        if schedule.changes_at(step):
            sparse = sparse.raise_to(schedule(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse.model(images), labels).backward()
        optimizer.step()
    assert sparse.sparsity == pytest.approx(0.8, abs=1e-3)
    assert_zeros(sparse.model, MASKING.masks(sparse.model))


def test_an_exported_file_has_the_zeros_and_no_masks(tmp_path):
    model, images, _ = digits_like()
    sparse = kirsch.sparsify(model, sparsity=0.9)
    artifact = kirsch.export(sparse.model, tmp_path / "model.onnx", example_inputs=images)
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(artifact.path).graph.initializer]
    (last,) = (weight for weight in weights if weight.shape in ((3, 16), (16, 3)))
    folded = kirsch.fold_masks(sparse.model)[7].weight.detach().numpy()
    assert np.array_equal(last if last.shape == folded.shape else last.T, folded)
    assert not any(weight.dtype == bool for weight in weights)
    assert {node.op_type for node in onnx.load(artifact.path).graph.node} & {"Where", "Mul"} == set()
    measured = kirsch.measure(sparse.model, example_inputs=images, rounds=6)
    assert measured.parameters == sum(value.numel() for value in model.parameters())


def test_a_pruned_model_with_masks_is_saved_with_zeros_and_loaded_without_masks(tmp_path):
    model, images, _ = digits_like()
    plan = kirsch.plan(kirsch.trace(model, images[:2]), kirsch.Goal(macs=0.7), round_to=1)
    sparse = kirsch.sparsify(kirsch.prune(model, plan), sparsity=0.5)
    kirsch.save(sparse.model, tmp_path / "saved")
    loaded = kirsch.load(tmp_path / "saved", lambda: digits_like(seed=1)[0])
    assert MASKING.masks(loaded) == {}
    assert torch.equal(loaded(images), sparse.model(images))
    assert_zeros(loaded, MASKING.masks(sparse.model))


def test_a_sparse_model_that_was_not_pruned_is_saved_and_loaded_with_its_zeros(tmp_path):
    model, images, _ = digits_like()
    sparse = kirsch.sparsify(model, sparsity=0.8)
    kirsch.save(sparse.model, tmp_path / "saved")
    loaded = kirsch.load(tmp_path / "saved", lambda: digits_like(seed=1)[0])
    assert MASKING.masks(loaded) == {}
    assert torch.equal(loaded(images), sparse.model(images))
    assert_zeros(loaded, MASKING.masks(sparse.model))


def test_channels_of_a_sparse_model_can_be_pruned():
    model, images, _ = digits_like()
    sparse = kirsch.fold_masks(kirsch.sparsify(model, sparsity=0.5).model)
    plan = kirsch.plan(kirsch.trace(sparse, images[:2]), kirsch.Goal(macs=0.7), round_to=1)
    small = kirsch.prune(sparse, plan)
    assert (small[3].weight == 0).float().mean() > 0.2
