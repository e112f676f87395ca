"""Reductions and further operators between two layers, and operators whose rule is missing or fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frameworks.pytorch.analysis.networks import IMAGE, Between, assert_cut_between_convolutions, conv
from kirsch.frameworks.pytorch.analysis import operators
from kirsch.graph.labels import Tensor
from trace_and_cut import assert_pruned_correctly

CASES = {
    "reduce mean": (lambda _, x: x.mean((2, 3)), nn.Linear(8, 3), {}, [8]),
    "reduce mean, negative axes": (lambda _, x: x.mean((-1, -2)), nn.Linear(8, 3), {}, [8]),
    "reduce mean, axes kept": (lambda _, x: x * x.mean((2, 3), keepdim=True), conv(8, 4), {}, [8]),
    "mean over channels": (lambda _, x: x * x.sigmoid().mean(1, keepdim=True), conv(8, 4), {}, [8]),
    "sum over channels": (lambda _, x: x * x.sigmoid().sum(1, keepdim=True), conv(8, 4), {}, [8]),
    "max over channels": (lambda _, x: x * x.max(1, keepdim=True)[0], conv(8, 4), {}, [8]),
    "min over channels, axis dropped": (lambda _, x: x * x.min(dim=1).values.unsqueeze(1), conv(8, 4), {}, [8]),
    "index of the largest channel freezes": (
        lambda _, x: x * x.max(1, keepdim=True)[1].to(x.dtype),
        conv(8, 4),
        {},
        [],
    ),
    "amax over channels": (lambda _, x: x * x.amax(1, keepdim=True), conv(8, 4), {}, [8]),
    "unit norm over channels": (lambda _, x: F.normalize(x, dim=1), conv(8, 4), {}, [8]),
    "scale by a parameter": (lambda s, x: x * s.gamma, conv(8, 4), {"gamma": nn.Parameter(torch.ones(8, 1, 1))}, [8]),
    "scale by a constant freezes": (lambda _, x: x * torch.arange(8.0).reshape(8, 1, 1), conv(8, 4), {}, []),
    "type_as another tensor": (lambda s, x: x.type_as(s.other.weight), conv(8, 4), {"other": nn.Linear(5, 7)}, [8]),
    "a weight that is a vector freezes": (
        lambda s, x: x + F.linear(x.permute(0, 2, 3, 1), s.vector).unsqueeze(1),
        conv(8, 4),
        {"vector": nn.Parameter(torch.randn(8))},
        [],
    ),
    "logarithm of a removed channel": (
        lambda _, x: (x.mean((2, 3), keepdim=True) + 1e-9).log() + x,
        conv(8, 4),
        {},
        [8],
    ),
    "unit sum over space": (lambda _, x: (x + 1) / (x + 1).sum((2, 3), keepdim=True), conv(8, 4), {}, [8]),
    "maximum of pairs of channels": (lambda _, x: x.view(2, x.shape[1] // 2, 2, 8, 8).amax(2), conv(4, 4), {}, [4]),
    "attention that returns its weights": (
        lambda s, x: (s.attend(*[x.flatten(2).transpose(1, 2)] * 3)[0]).transpose(1, 2).unflatten(2, (8, 8)),
        conv(8, 4),
        {"attend": nn.MultiheadAttention(8, 2, batch_first=True)},
        [2, 8],
    ),
    "variance over channels": (lambda _, x: x * x.var(1, keepdim=True), conv(8, 4), {}, [8]),
    "variance over channels, biased": (lambda _, x: x * x.var(1, False, keepdim=True), conv(8, 4), {}, [8]),
    "variance over space": (lambda _, x: x * x.var((2, 3), correction=0, keepdim=True), conv(8, 4), {}, [8]),
    "standard deviation over channels": (lambda _, x: x * x.std(dim=1, keepdim=True), conv(8, 4), {}, [8]),
    "norm over channels": (lambda _, x: x * x.norm(dim=1, keepdim=True), conv(8, 4), {}, [8]),
    "norm of order one": (lambda _, x: x * torch.linalg.vector_norm(x, 1, 1, True), conv(8, 4), {}, [8]),
    "norm over space": (lambda _, x: x * x.norm(2, (2, 3), True), conv(8, 4), {}, [8]),
    "nansum over channels": (lambda _, x: x * x.nansum(1, keepdim=True), conv(8, 4), {}, [8]),
    "amin over channels": (lambda _, x: x * x.amin(1, keepdim=True), conv(8, 4), {}, [8]),
    "rms norm by hand": (
        lambda s, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * s.gamma,
        conv(8, 4),
        {"gamma": nn.Parameter(torch.ones(8, 1, 1))},
        [8],
    ),
    "variance and mean": (lambda _, x: torch.var_mean(x, (2, 3), keepdim=True)[0] * x, conv(8, 4), {}, [8]),
    "variance and mean over channels": (
        lambda _, x: torch.var_mean(x, 1, keepdim=True)[1] * x,
        conv(8, 4),
        {},
        [],
    ),
    "product over space": (lambda _, x: x * x.flatten(2)[..., :2].prod(2)[..., None, None], conv(8, 4), {}, [8]),
    "median over space": (lambda _, x: x * x.flatten(2).median(2)[0][..., None, None], conv(8, 4), {}, [8]),
    "logsumexp over space": (lambda _, x: x * x.logsumexp((2, 3), keepdim=True), conv(8, 4), {}, [8]),
    "logsumexp over channels": (lambda _, x: x * x.logsumexp(1, keepdim=True), conv(8, 4), {}, []),
    "any over space": (lambda _, x: x * (x > 1).any(2, keepdim=True), conv(8, 4), {}, [8]),
    "any over channels": (lambda _, x: x * (x > 1).any(1, keepdim=True), conv(8, 4), {}, []),
    "maximum of two tensors": (lambda s, x: torch.max(x, s.other(x)), conv(8, 4), {"other": conv(8, 8)}, [8]),
    "maximum over space": (lambda _, x: x * x.flatten(2).max(2)[0][..., None, None], conv(8, 4), {}, [8]),
    "minimum of all elements freezes": (lambda _, x: x * x.min(), conv(8, 4), {}, []),
    "unfold of space": (lambda _, x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), conv(8, 4), {}, [8]),
    "unfold of channels freezes": (lambda _, x: x.unfold(1, 2, 2).mean(-1), conv(4, 4), {}, []),
    "antialiased resizing": (
        lambda _, x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
        conv(8, 4),
        {},
        [8],
    ),
    "grid sampling": (
        lambda _, x: F.grid_sample(x, torch.linspace(-1, 1, 64).view(2, 4, 4, 2), align_corners=False),
        conv(8, 4),
        {},
        [8],
    ),
    "fractional pooling": (
        lambda _, x: F.fractional_max_pool2d(x, 2, 3, _random_samples=torch.full((2, 8, 2), 0.3)),
        conv(8, 4),
        {},
        [],
    ),
    "real part of a Fourier transform freezes": (lambda _, x: torch.fft.fft2(x).real, conv(8, 4), {}, []),
    "complex numbers": (lambda _, x: torch.view_as_real(torch.complex(x, x.tanh())).sum(-1), conv(8, 4), {}, [8]),
    "complex numbers from pairs of channels": (
        lambda _, x: torch.view_as_complex(x.permute(0, 2, 3, 1).unflatten(-1, (-1, 2)).contiguous()).abs(),
        nn.Linear(4, 4),
        {},
        [4],
    ),
    "residual": (lambda s, x: x + s.inner(x).relu(), conv(8, 4), {"inner": conv(8, 8)}, [8]),
    "two branches": (
        lambda s, x: s.left(x).relu() + s.right(x),
        conv(6, 4),
        {"left": conv(8, 6), "right": conv(8, 6)},
        [8, 6],
    ),
    "a module used twice": (lambda s, x: s.inner(s.inner(x).relu()), conv(8, 4), {"inner": conv(8, 8)}, [8]),
    "a product of all pairs of channels freezes": (
        lambda _, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).unsqueeze(1),
        conv(1, 4),
        {},
        [],
    ),
}
"""Name → (function between two layers, called with the module and the output of the first layer; the second
layer; further attributes of the module; expected sizes of the groups)."""


@pytest.mark.parametrize("name", CASES)
def test_a_network_with_the_operator_is_pruned_correctly(name):
    assert_cut_between_convolutions(*CASES[name])


def test_an_operator_without_a_rule_is_reported():
    model = Between(conv(3, 8), lambda _, x: torch.fft.fft(x, dim=1).abs(), conv(8, 4))
    graph, _ = assert_pruned_correctly(model, IMAGE, sizes=[])
    assert "there is no rule for aten.fft_fft" in graph.blockers[0].reason
    assert graph.blockers[0].share == pytest.approx(1.0, abs=0.1)


def raising_rule(op):
    raise KeyError("x")


FAULTS = {
    "loses 8 labels": lambda op: Tensor.of(op.shape),
    r"returns shapes \[\(8,\)\] where the operator returns \[\(2, 8, 8, 8\)\]": lambda op: Tensor.of(
        [8], [op.args[0].axes[1]]
    ),
    "fails: KeyError: 'x'": raising_rule,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rule_that_fails_freezes_the_axes_of_its_operation_and_warns(fault, monkeypatch):
    monkeypatch.setitem(operators.RULES, "relu", FAULTS[fault])
    with pytest.warns(RuntimeWarning, match=f"The rule of relu {fault}.*Please report"):
        graph, _ = assert_pruned_correctly(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), IMAGE, sizes=[])
    assert "the rule for aten.relu failed" in {blocker.reason for blocker in graph.blockers}
