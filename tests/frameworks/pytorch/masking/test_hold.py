"""Masks that PyTorch models hold: in every layer, through training, copies, files and processes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import ModelError
from kirsch.frameworks.find import pytorch
from kirsch.frameworks.pytorch.io.weights import load_weights, save_weights
from sparse_networks import Layers, tokens

MASKING = pytorch().masking


def random_masks(model, share=0.5):
    random = np.random.default_rng(0)
    return {w.name: random.random(w.shape) > share for w in MASKING.weight_matrices(model) if not w.kept}


def held(model, masks):
    result = copy.deepcopy(model)
    MASKING.hold(result, masks)
    return result


def zeroed(model, masks):
    """Return a copy of the model without masks in which the masked weights are zero."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in result.named_parameters():
            if name in masks:
                value.mul_(torch.from_numpy(masks[name]))
    return result


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_with_masks_computes_what_the_model_with_zeros_computes_in_every_layer(training, gradients):
    """In inference without gradients, attention and recurrent layers read their weights in C++."""
    model = Layers().train(training)
    masks = random_masks(model)
    with torch.set_grad_enabled(gradients):
        outputs = [each(tokens()) for each in (held(model, masks), zeroed(model, masks))]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model(tokens()))


def test_gradients_of_masked_weights_are_zero_and_of_the_others_those_of_the_model_with_zeros():
    model = Layers()
    masks = random_masks(model)
    first, second = held(model, masks), zeroed(model, masks)
    for each in (first, second):
        each(tokens()).pow(2).sum().backward()
    expected = {name: value.grad for name, value in second.named_parameters()}
    for path, name in (("conv", "weight"), ("lstm", "weight_hh_l1_reverse"), ("attention", "in_proj_weight")):
        gradient = first.get_submodule(path).parametrizations[name].original.grad
        mask = torch.from_numpy(masks[f"{path}.{name}"])
        assert not gradient[~mask].any()
        assert torch.equal(gradient[mask], expected[f"{path}.{name}"][mask])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9),
    ],
    ids=["sgd", "adamw", "adam", "rmsprop"],
)
def test_masked_weights_stay_zero_with_any_optimizer_also_when_masks_grow_under_its_momentum(optimizer):
    model = Layers()
    few, many = (random_masks(model, share) for share in (0.2, 0.6))
    trained = held(model, few)
    before = MASKING.fold(trained)
    steps = optimizer(trained.parameters())
    for step in range(6):
        if step == 3:
            MASKING.hold(trained, many)
        steps.zero_grad()
        trained(tokens()).pow(2).sum().backward()
        steps.step()
    folded = dict(MASKING.fold(trained).named_parameters())
    for name, mask in many.items():
        assert not folded[name].detach().numpy()[~mask].any()
        assert (folded[name] != dict(before.named_parameters())[name]).any()


def test_a_folded_model_is_an_ordinary_model_with_the_classes_names_and_ties_of_the_original():
    model = Layers().eval()
    masks = random_masks(model)
    with_masks = held(model, masks)
    folded = MASKING.fold(with_masks)
    assert [type(module) for module in folded.modules()] == [type(module) for module in model.modules()]
    assert list(folded.state_dict()) == list(model.state_dict())
    assert [name for name, _ in folded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert folded.tied.weight is folded.head.weight
    assert torch.equal(folded(tokens()), with_masks(tokens()))
    assert MASKING.masks(with_masks).keys() == masks.keys()  # fold does not change the model that it copies
    assert torch.equal(Layers().eval()(tokens()).isfinite(), folded(tokens()).isfinite())
    plain = Layers()
    plain.load_state_dict(folded.state_dict())


def test_copies_are_independent_of_each_other():
    model = Layers().eval()
    first = held(model, random_masks(model))
    second = copy.deepcopy(first)
    expected = first(tokens())
    MASKING.hold(second, random_masks(model, 0.9))
    assert torch.equal(first(tokens()), expected)
    assert not torch.equal(second(tokens()), expected)


def test_masks_are_in_the_state_dict_and_in_files(tmp_path):
    model = Layers().eval()
    first = held(model, random_masks(model))
    second = held(Layers(), {name: np.ones_like(mask) for name, mask in random_masks(model).items()}).eval()
    third = copy.deepcopy(second)
    second.load_state_dict(first.state_dict())
    save_weights(first, tmp_path / "weights.safetensors")
    load_weights(third, tmp_path / "weights.safetensors")
    for each in (second, third):
        assert torch.equal(each(tokens()), first(tokens()))
        assert all(np.array_equal(MASKING.masks(each)[name], mask) for name, mask in MASKING.masks(first).items())


def test_masks_survive_moving_averages_and_changes_of_the_dtype():
    model = Layers()
    masks = random_masks(model)
    trained = held(model, masks)
    average = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    optimizer = torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained(tokens()).pow(2).sum().backward()
        optimizer.step()
        average.update_parameters(trained)
    for each in (MASKING.fold(average.module), MASKING.fold(copy.deepcopy(average.module).double())):
        weights = dict(each.named_parameters())
        assert all(not weights[name].detach().numpy()[~mask].any() for name, mask in masks.items())


def test_masks_survive_distributed_data_parallel(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LSTM(8, 8))
    masks = random_masks(model)
    trained = held(model, masks)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(trained)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(torch.randn(5, 4))[0].pow(2).sum().backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    weights = dict(MASKING.fold(wrapped.module).named_parameters())
    assert all(not weights[name].detach().numpy()[~mask].any() for name, mask in masks.items())
    assert any((weights[name].detach().numpy()[mask] != 0).any() for name, mask in masks.items())


def test_a_parametrization_of_the_user_is_kept_and_the_original_model_is_not_changed():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 2))
    bias = nn.Linear(8, 2)
    torch.nn.utils.parametrize.register_parametrization(bias, "bias", nn.Softplus())
    model[1] = bias
    expected = model(torch.ones(1, 4))
    masks = random_masks(model)
    assert masks.keys() == {"1.weight"}  # the weight of layer 0 is computed
    with_masks = held(model, masks)
    assert torch.equal(model(torch.ones(1, 4)), expected)
    folded = MASKING.fold(with_masks)
    assert torch.equal(folded(torch.ones(1, 4)), with_masks(torch.ones(1, 4)))
    assert torch.nn.utils.parametrize.is_parametrized(folded[1], "bias")
    assert not torch.nn.utils.parametrize.is_parametrized(folded[1], "weight")


def test_nan_in_a_masked_weight_does_not_reach_the_output():
    model = nn.Linear(2, 1)
    model.weight.data[0, 1] = torch.nan
    MASKING.hold(model, {"weight": np.array([[True, False]])})
    output = model(torch.ones(1, 2))
    output.sum().backward()
    assert output.isfinite().all()
    assert model.parametrizations.weight.original.grad.isfinite().all()


def test_a_layer_that_stores_its_weight_a_second_time_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].cache = [model[0].weight]
    with pytest.raises(ModelError, match="`0` stores it a second time, in its attribute `cache`"):
        kirsch.sparsify(model, sparsity=0.5)
    assert kirsch.sparsify(nn.Sequential(model[0], nn.Linear(4, 4)), sparsity=0.5, exclude="0").zeros == 8
