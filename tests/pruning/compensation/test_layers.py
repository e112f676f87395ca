"""Weights and biases that `kirsch.prune(..., compensate=...)` sets, compared with solutions computed in the test."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.pruning.compensation.least_squares import RIDGE, Products, least_squares, relative_error
from trace_and_cut import with_noise

BATCHES = [torch.randn(40, 6, dtype=torch.float64), torch.randn(25, 6, dtype=torch.float64)]
X = torch.cat(BATCHES)


def two_layers(*between, hidden=8, bias=True):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, hidden), *between, nn.Linear(hidden, 5, bias=bias)).double()


def ridge_solution(x, y, weight, *, intercept, ridge=RIDGE):
    """Return the ridge solution from the stacked equations W x = y and √λ W = √λ W0, and the intercept.

    x: (positions, inputs); y: (positions, outputs); weight: W0, (outputs, inputs).
    """
    mean_x, mean_y = (x.mean(0), y.mean(0)) if intercept else (0 * x[0], 0 * y[0])
    x, y = x - mean_x, y - mean_y
    damping = np.sqrt(ridge * (x**2).sum(0).mean())
    rows, values = np.vstack([x, damping * np.eye(x.shape[1])]), np.vstack([y, damping * weight.T])
    solution = np.linalg.lstsq(rows, values, rcond=None)[0].T
    return solution, mean_y - solution @ mean_x


def close(found, expected, tolerance=1e-9):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_redundant_units_of_a_linear_network_are_replaced_exactly(removing):
    """The six inputs span six of the eight hidden units, so that six units give the outputs of the original."""
    model = two_layers()
    plan = removing(model, X[:2], {"0": [1, 5]})
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=BATCHES)
    errors = found.compensation.output_errors
    assert errors["none"] > 0.1
    assert errors["least_squares"] < 10 * RIDGE * errors["none"]
    moments = [X.numpy() @ model[0].weight.detach().numpy().T + model[0].bias.detach().numpy()]
    kept = np.delete(moments[0], [1, 5], 1)
    y = moments[0] @ model[1].weight.detach().numpy().T
    mean, mean_y = kept.mean(0), y.mean(0)
    products = Products(
        len(kept), kept.sum(0)[None], y.sum(0)[None], (kept.T @ kept)[None], (y.T @ kept)[None], float((y**2).sum())
    )
    start = np.delete(model[1].weight.detach().numpy(), [1, 5], 1)[None]
    weight, shift = least_squares(products, start, intercept=True, ridge=0)
    expected = np.linalg.lstsq(kept - mean, y - mean_y, rcond=None)[0].T
    np.testing.assert_allclose(weight[0], expected, atol=1e-8)
    np.testing.assert_allclose(shift[0], mean_y - expected @ mean, atol=1e-8)
    assert relative_error(products, weight, shift) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_is_the_ridge_solution_on_the_kept_inputs(removing, bias):
    model = two_layers(nn.Tanh(), bias=bias)
    plan = removing(model, X[:2], {"0": [0, 3, 4]})
    small = kirsch.prune(model, plan, compensate="least_squares", data=BATCHES)
    hidden = model[1](model[0](X)).detach().numpy()
    kept, weight = np.delete(hidden, [0, 3, 4], 1), model[2].weight.detach().numpy()
    expected, shift = ridge_solution(kept, hidden @ weight.T, np.delete(weight, [0, 3, 4], 1), intercept=bias)
    close(small[2].weight, expected)
    if bias:
        close(small[2].bias, model[2].bias.detach().numpy() + shift)


def test_rounding_errors_of_redundant_inputs_increase_the_damping():
    """The products of two equal inputs, rounded so that the matrix has a negative eigenvalue."""
    xx = np.array([[[1.0, 1.0 + 1e-6, 0], [1.0 + 1e-6, 1.0, 0], [0, 0, 1e-4]]])
    products = Products(10, np.zeros((1, 3)), np.zeros((1, 1)), xx, np.array([[[2.0, 2.0, 0]]]), 4.0)
    weight, _ = least_squares(products, np.zeros((1, 1, 3)), intercept=False, ridge=1e-9)
    np.testing.assert_allclose(weight[0], [[1, 1, 0]], atol=1e-4)


def test_inputs_that_are_constant_on_the_data_keep_their_weights(removing):
    model = two_layers(nn.ReLU())
    with torch.no_grad():
        model[0].bias[2] = -100.0  # never active
    small = kirsch.prune(
        model, removing(model, X[:2], {"0": [0, 3]}), verify=False, compensate="least_squares", data=BATCHES
    )
    close(small[2].weight[:, 1], model[2].weight[:, 2].detach().numpy())


def test_bias_compensation_adds_the_mean_of_the_removed_inputs_times_their_weights(removing):
    """An et al. 2024, arXiv:2312.11983: the baseline bias of FLAP."""
    model = two_layers(nn.ReLU())
    small = kirsch.prune(model, removing(model, X[:2], {"0": [2, 7]}), compensate="bias", data=BATCHES)
    mean = model[1](model[0](X)).mean(0)
    close(small[2].bias, (model[2].bias + model[2].weight[:, [2, 7]] @ mean[[2, 7]]).detach().numpy())
    assert torch.equal(small[2].weight, model[2].weight[:, [0, 1, 3, 4, 5, 6]])


def test_bias_compensation_of_each_layer_uses_the_inputs_in_the_original(removing):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 1, groups=2))
    x = torch.randn(9, 3, 7, 7)
    (inner,) = (group.name for group in kirsch.trace(model, x[:1]).groups if ("4.weight", 1) in group.footprint)
    plan = removing(model, x[:1], {"0": [1, 2], inner: [3]})
    small = kirsch.prune(model, plan, compensate="bias", data=list(x.split(4)))
    first, second = model[:2](x), model[:4](x)
    shift = F.conv2d(first[:, [1, 2]], model[2].weight[:, [1, 2]]).mean((0, 2, 3))
    torch.testing.assert_close(small[2].bias, (model[2].bias + shift)[[0, 1, 2, 4, 5, 6]])
    means = second[:, [3, 7]].mean((0, 2, 3)).repeat_interleave(2)  # unit 3 is channel 3 of each of the two groups
    torch.testing.assert_close(small[4].bias, model[4].bias + model[4].weight[:, 3, 0, 0] * means)


def test_a_layer_is_fitted_on_the_inputs_from_earlier_layers_that_are_already_changed(removing):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    plan = removing(model, X[:2], {"0": [1, 2, 6], "2": [0, 5]})
    small = kirsch.prune(model, plan, compensate="least_squares", data=BATCHES)
    target = model[:4](X).detach().numpy() @ model[4].weight.detach().numpy().T
    inputs, start = small[:4](X).detach().numpy(), np.delete(model[4].weight.detach().numpy(), [0, 5], 1)
    expected, _ = ridge_solution(inputs, target, start, intercept=True)
    close(small[4].weight, expected)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"kernel_size": 1, "stride": 2}], ids=str
)
def test_a_convolution_is_fitted_on_the_patches_that_its_outputs_read(removing, options):
    options = {"kernel_size": 3} | options
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, **options)).double()
    x = torch.randn(12, 3, 9, 9, dtype=torch.float64)
    small = kirsch.prune(
        model, removing(model, x[:1], {"0": [1, 4]}), compensate="least_squares", data=list(x.split(5))
    )

    def patches(maps):
        return F.unfold(maps, **options).mT.flatten(0, 1).detach().numpy()

    maps, weight = model[:2](x), model[2].weight.detach()
    kept = [0, 2, 3, 5]
    y = patches(maps) @ weight.flatten(1).numpy().T
    expected, shift = ridge_solution(patches(maps[:, kept]), y, weight[:, kept].flatten(1).numpy(), intercept=True)
    close(small[2].weight.flatten(1), expected)
    close(small[2].bias, model[2].bias.detach().numpy() + shift)


@pytest.mark.parametrize("dim", [1, 3])
def test_convolutions_of_one_and_three_dimensions_are_fitted(removing, dim):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dim]
    model = nn.Sequential(conv(2, 6, 2), nn.ReLU(), conv(6, 4, 2, padding=1)).double()
    x = torch.randn(10, 2, *[5] * dim, dtype=torch.float64)
    found = kirsch.prune_with_verification(
        model, removing(model, x[:1], {"0": [0, 5]}), compensate="least_squares", data=[x]
    )
    (layer,) = found.compensation.layers
    maps, small = model[:2](x), found.model
    change = small(x) - model(x)
    raw = conv(6, 4, 2, padding=1, bias=False).double()
    raw.weight.data = model[2].weight.data
    assert layer.after == pytest.approx((change.norm() / raw(maps).norm()).item(), rel=1e-6)
    assert layer.after < layer.before


def test_the_groups_of_a_convolution_are_fitted_by_themselves(removing):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)).double()
    x = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    graph = kirsch.trace(model, x[:1])
    (group,) = (group for group in graph.groups if ("2.weight", 1) in group.footprint)
    small = kirsch.prune(model, removing(model, x[:1], {group.name: [1, 2]}), compensate="least_squares", data=[x])
    assert small[2].weight.shape == (6, 2, 3, 3)
    maps = model[:2](x)
    for number in range(2):
        inputs, rows = maps[:, 4 * number : 4 * number + 4], slice(3 * number, 3 * number + 3)
        weight = model[2].weight[rows].detach()
        full, kept = (F.unfold(m, 3).mT.flatten(0, 1).detach().numpy() for m in (inputs, inputs[:, [0, 3]]))
        start = weight[:, [0, 3]].flatten(1).numpy()
        expected, _ = ridge_solution(kept, full @ weight.flatten(1).numpy().T, start, intercept=True)
        close(small[2].weight[rows].flatten(1), expected)


def test_a_depthwise_convolution_loses_no_inputs_of_its_outputs(removing):
    model = with_noise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)))
    x = torch.randn(8, 3, 6, 6)
    plan = removing(model, x[:1], {"0": [1, 2]})
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=[x]).compensation
    assert [layer.weight for layer in found.layers] == ["2.weight"]
    assert not found.skipped


class Multiplied(nn.Module):
    """A product x @ W + b with a weight of shape (inputs, outputs), as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.up, self.weight, self.bias = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.addmm(self.bias, self.up(x).relu(), self.weight)


def test_a_weight_that_is_multiplied_from_the_right_is_fitted(removing):
    model = Multiplied().double()
    small = kirsch.prune(model, removing(model, X[:2], {"weight": [0, 6]}), compensate="least_squares", data=BATCHES)
    hidden, weight = model.up(X).relu().detach().numpy(), model.weight.detach().numpy()
    kept = [1, 2, 3, 4, 5, 7]
    expected, shift = ridge_solution(hidden[:, kept], hidden @ weight, weight[kept].T, intercept=True)
    close(small.weight, expected.T)
    close(small.bias, model.bias.detach().numpy() + shift)


class Attention(nn.Module):
    """Queries, keys and values that read one normalized stream, with a residual sum."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(x))))


def test_all_layers_that_read_a_residual_stream_heads_or_hidden_units_are_compensated():
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(64, 5, 6, dtype=torch.float64)
    plan = kirsch.plan(kirsch.trace(model, x[:2]), kirsch.Goal(macs=0.5), round_to=1)
    assert {removal.kind for removal in plan.groups} >= {"embedding dim", "ffn unit", "head dim"}
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=list(x.split(16)))
    names = ["query", "key", "value", "out", "up", "down", "head"]
    assert [layer.weight for layer in found.compensation.layers] == [f"{name}.weight" for name in names]
    assert all(layer.after < layer.before for layer in found.compensation.layers)
    errors = found.compensation.output_errors
    assert errors["least_squares"] < 0.7 * errors["none"]


def test_the_target_of_queries_has_the_factor_by_which_pruning_scales_them(removing):
    """Without one of four channels of a head, the rows of queries are multiplied by √(3 / 4)."""
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(32, 5, 6, dtype=torch.float64)
    graph = kirsch.trace(model, x[:2])
    dims = next(group for group in graph.groups if group.kind == "head dim" and ("query.weight", 0) in group.footprint)
    plan = removing(model, x[:2], {"embed": [3], dims.name: [1]})
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=[x])
    query = next(layer for layer in found.compensation.layers if layer.weight == "query.weight")
    small, kept = kirsch.prune(model, plan), [index for index in range(16) if index % 4 != 1]
    target = 0.75**0.5 * model.norm(model.embed(x)) @ model.query.weight[kept].T
    output = small.norm(small.embed(x)) @ small.query.weight.T
    assert query.before == pytest.approx(((output - target).norm() / target.norm()).item())


def test_the_original_is_not_changed_and_the_result_has_its_modes_and_types(removing):
    model = with_noise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))).train()
    model[1].eval()
    model[3].weight.requires_grad = False
    x, before, state = torch.randn(16, 3, 8, 8), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan = removing(model, x[:2], {"0": [1, 2]})
    small = kirsch.prune_with_verification(model, plan, compensate=["least_squares", "batch_norm"], data=[x]).model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in small] == [module.training for module in model] == [True, False, True, True]
    assert not small[3].weight.requires_grad
    assert small[3].weight.grad is None


def test_a_model_in_bfloat16_is_compensated_in_higher_precision(removing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5)).bfloat16()
    x = torch.randn(200, 6, dtype=torch.bfloat16)
    plan = removing(model, x[:2], {"0": list(range(10))})
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=[x])
    assert found.model[2].weight.dtype == torch.bfloat16
    (layer,) = found.compensation.layers
    change = found.model(x).double() - model(x).double()
    error = change.norm() / (model[:2](x).double() @ model[2].weight.double().T).norm()
    assert layer.after < 0.5 * layer.before
    assert layer.after == pytest.approx(error.item(), rel=0.1)  # the forward pass rounds to 8 bits
