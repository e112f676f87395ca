"""The group lasso over coupled units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from coupled_networks import NETWORKS, all_slices, build
from kirsch.errors import UnknownNameError, UsageError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def value_and_gradients(term, model):
    model.zero_grad()
    value = term(model)
    value.backward()
    return float(value.detach()), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def traced(model):
    return kirsch.trace(model, torch.randn(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 4.0, 1.5])
def test_value_and_gradient_of_two_layers_equal_the_closed_form(alpha):
    model = mlp()
    first, second = model[0], model[2]
    parts = [torch.cat([first.weight[k], first.bias[k : k + 1], second.weight[:, k]]).detach() for k in range(4)]
    norms = torch.stack([part.norm() for part in parts])
    gamma = 2 ** (alpha * (norms.max() - norms) / (norms.max() - norms.min()))
    value, gradients = value_and_gradients(kirsch.GroupLasso(traced(model), 0.3, alpha=alpha), model)
    assert value == pytest.approx(
        0.3 * math.sqrt(6) * float((gamma * norms).sum()), rel=1e-6
    )  # √6 is stored as float32
    for k in range(4):
        factor = 0.3 * math.sqrt(6) * gamma[k] / norms[k]
        torch.testing.assert_close(gradients["0.weight"][k], factor * first.weight[k].detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients["0.bias"][k], factor * first.bias[k].detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            gradients["2.weight"][:, k], factor * second.weight[:, k].detach(), rtol=1e-6, atol=0
        )
    assert gradients["2.bias"] is None  # the outputs are not removable units


@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_gradient_equal_a_sum_over_the_removed_slices_of_each_unit(name):
    """The slices are those that `graph.keep` removes: of layers that produce or read a unit, and of heads and grids."""
    model = build(name)
    graph = kirsch.trace(model, model.inputs[:2])
    found, gradients = value_and_gradients(kirsch.GroupLasso(graph, 0.2), model)
    parameters = dict(model.named_parameters())
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for units in all_slices(graph):
        chosen = [[parameters[n].index_select(axis, torch.tensor(i)) for n, axis, i in unit] for unit in units]
        norms = torch.stack([sum((part**2).sum() for part in unit) for unit in chosen]).sqrt()
        sizes = torch.tensor([math.sqrt(sum(part.numel() for part in unit)) for unit in chosen])
        fixed = norms.detach()
        gamma = 2 ** (4 * (fixed.max() - fixed) / (fixed.max() - fixed.min()))
        total = total + 0.2 * (sizes * gamma * norms).sum()
    total.backward()
    assert len(graph.groups) > 1
    assert found == pytest.approx(float(total.detach()), rel=1e-6)
    for path, parameter in parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = torch.zeros_like(parameter) if gradients[path] is None else gradients[path]
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12, msg=path)


def test_equal_norms_have_the_factor_one_and_finite_gradients():
    """Torch-Pruning 1.6.1 divides 0 by 0 here, for example for new batch normalizations."""
    model = mlp()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    value, gradients = value_and_gradients(kirsch.GroupLasso(traced(model), 1.0), model)
    assert value == pytest.approx(4 * math.sqrt(6) * math.sqrt(6 * 0.25), rel=1e-6)
    torch.testing.assert_close(gradients["0.bias"], torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_unit_of_zeros_has_the_gradient_zero():
    model = mlp()
    model[0].weight.data[1], model[0].bias.data[1], model[2].weight.data[:, 1] = 0, 0, 0
    _, gradients = value_and_gradients(kirsch.GroupLasso(traced(model), 1.0), model)
    assert gradients["0.weight"][1].tolist() == [0, 0, 0]
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)


def test_all_zero_parameters_have_a_finite_term():
    model = mlp()
    for parameter in model.parameters():
        parameter.data.zero_()
    value, gradients = value_and_gradients(kirsch.GroupLasso(traced(model), 1.0), model)
    assert value == 0
    assert not gradients["0.weight"].any()


def test_running_statistics_do_not_count():
    model = build("residual")
    term = kirsch.GroupLasso(kirsch.trace(model, model.inputs[:2]), 1.0)
    before = float(term(model).detach())
    model.norm.running_mean += 10
    assert float(term(model).detach()) == before


def test_excluded_layers_have_no_gradient():
    model = build("residual")
    graph = kirsch.trace(model, model.inputs[:2])
    _, gradients = value_and_gradients(kirsch.GroupLasso(graph, 1.0, exclude="stem"), model)
    assert gradients["stem.weight"] is None
    assert gradients["inner.bias"].all()
    with pytest.raises(UnknownNameError, match="stemm"):
        kirsch.GroupLasso(graph, 1.0, exclude="stemm")


def test_a_model_without_removable_units_is_refused():
    model = build("residual")
    graph = kirsch.trace(model, model.inputs[:2])
    with pytest.raises(UsageError, match=r"No unit of Residual can be removed .* exclude fewer layers"):
        kirsch.GroupLasso(graph, 1.0, exclude="*")


def test_the_term_of_a_part_finds_the_part_in_the_whole_model():
    model = build("residual")
    whole = nn.Sequential(model)
    part = kirsch.trace(whole, model.inputs[:2], module="0")
    expected = kirsch.GroupLasso(kirsch.trace(model, model.inputs[:2]), 1.0)(model)
    assert float(kirsch.GroupLasso(part, 1.0)(whole).detach()) == float(expected.detach())


@pytest.mark.filterwarnings("ignore:.*barrier")
def test_wrapped_models_have_the_same_term():
    model = build("residual").train()
    term = kirsch.GroupLasso(kirsch.trace(model, model.inputs[:2]), 1.0)
    expected = float(term(model).detach())
    inner = build("residual")
    inner.inner = torch.compile(inner.inner, backend="eager")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
        assert float(term(wrapped).detach()) == expected
    finally:
        torch.distributed.destroy_process_group()
    assert float(term(inner).detach()) == expected


def test_pruned_and_other_models_are_refused():
    model = build("residual")
    graph = kirsch.trace(model, model.inputs[:2])
    term = kirsch.GroupLasso(graph, 1.0)
    small = kirsch.prune(model, kirsch.plan(graph, kirsch.Goal(macs=0.6), round_to=1))
    with pytest.raises(UsageError, match=r"GroupLasso was made for Residual, whose parameter '.*' has shape .* shape"):
        term(small)
    with pytest.raises(UsageError, match=r"this Linear has no such parameter"):
        term(nn.Linear(3, 3))


def test_the_gradients_of_16_bit_weights_are_finite_and_close_to_those_of_32_bits():
    model = build("residual").float()
    term = kirsch.GroupLasso(kirsch.trace(model, model.inputs[:2].float()), 1e-3)
    value, gradients = value_and_gradients(term, model)
    rounded, of_16_bits = value_and_gradients(term, model.bfloat16())
    assert rounded == pytest.approx(value, rel=0.01)
    for name in ("stem.weight", "outer.weight", "norm.bias"):
        torch.testing.assert_close(of_16_bits[name].float(), gradients[name], rtol=0.05, atol=1e-3)


def digits_network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module")
def blobs():
    """Images of four classes: a bright square in one of the four corners, with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(128) % 4
    images = random.normal(0, 1.0, (128, 1, 8, 8)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 4 * (label // 2) :][:4, 4 * (label % 2) :][:, :4] += 1.2 * np.eye(4) * (1 + label)
    return images, labels


def test_after_training_with_the_term_pruning_loses_less(blobs):
    """One-shot pruning to a third of the MACs, without recovery, from two trainings of one seed."""
    model = digits_network()
    images, labels = torch.tensor(blobs[0]), torch.tensor(blobs[1])
    graph = kirsch.trace(model, images[:1])
    lost = {}
    for name, terms in (("without", ()), ("with", [kirsch.GroupLasso(graph, 3e-3)])):
        training = kirsch.Training(epochs=12, learning_rate=0.02)
        data = kirsch.ArrayData(*blobs, batch_size=16)
        trained = kirsch.fit(model, data, training=training, regularizers=terms, progress=False)
        assert ("GroupLasso" in trained.history[-1]["terms"]) == (name == "with")
        plan = kirsch.plan(kirsch.trace(trained.model, images[:1]), kirsch.Goal(macs=0.35), round_to=1)
        small = kirsch.prune(trained.model, plan, verify=False)
        with torch.no_grad():
            losses = [float(nn.functional.cross_entropy(net(images), labels)) for net in (trained.model, small)]
        lost[name] = losses[1] - losses[0]
    assert lost["with"] < 0.5 * lost["without"]
