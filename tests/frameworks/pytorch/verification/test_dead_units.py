"""Units that have no effect on the outputs, such as dead units behind a ReLU, are removed with verification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.verification.verify import verify


def negative_biases():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model[0].weight.data[8:] = 0
    model[0].bias.data[8:] = -2
    model[2].weight.data[:, 8:] *= 0.1
    return model


def negative_weights():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model[2].weight.data[8:] = -0.01
    model[2].bias.data[8:] = -2
    return model


def norm(layer):
    model = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 16, 1), layer, nn.ReLU(), nn.Conv2d(16, 3, 1))
    model[2].weight.data[8:] = 0
    model[2].bias.data[8:] = -2
    return model


def residual():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    block = Residual(nn.LayerNorm(6), nn.Linear(6, 16), nn.Hardswish(), nn.Linear(16, 6))
    block[1].weight.data[8:] = 0
    block[1].bias.data[8:] = -4
    return nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 3))


MODELS = {
    "negative biases": negative_biases,
    "negative weights on positive inputs": negative_weights,
    "batch norm": lambda: norm(nn.BatchNorm2d(16)),
    "group norm": lambda: norm(nn.GroupNorm(1, 16)),
    "residual branch": residual,
}


LAYER = dict.fromkeys(MODELS, "1") | {
    "negative biases": "0",
    "negative weights on positive inputs": "2",
    "residual branch": "1.1",
}
"""The layer whose units 8 to 15 are dead."""


def keep_without(graph, layer, units):
    group = next(group for group in graph.groups if group.size == 16 and group.layers[0] == layer)
    return graph.keep({group.name: units})


@pytest.mark.parametrize("samples", [1, 50])
@pytest.mark.parametrize("units", [[11], list(range(8, 16))], ids=["one unit", "all dead units"])
@pytest.mark.parametrize("name", MODELS)
def test_the_removal_of_dead_units_is_verified(name, units, samples):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    graph = trace(model, torch.randn(samples, 6))
    keep = keep_without(graph, LAYER[name], units)
    verification = verify(cut(model, graph, keep), model, graph, keep)
    assert verification.passed
    assert verification.power > 1e-3


def test_a_fault_in_dead_units_that_are_kept_is_detected():
    torch.manual_seed(0)
    model = negative_biases().eval()
    graph = trace(model, torch.randn(5, 6))
    keep = keep_without(graph, "0", [12, 13])
    pruned = cut(model, graph, keep)
    pruned[2].weight.data[:, 8:] = pruned[2].weight.data[:, 8:].flip(1)
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verify(pruned, model, graph, keep)


@pytest.mark.parametrize("message", ["negative variance", "DefaultCPUAllocator: can't allocate memory"])
def test_a_model_that_fails_with_larger_noise_is_not_verified(message):
    class Checked(nn.Linear):
        def forward(self, x):
            if not torch.compiler.is_exporting() and self.bias[8:].max() > -2:
                raise RuntimeError(message)
            return super().forward(x)

    torch.manual_seed(0)
    model = negative_biases().eval()
    model[0].__class__ = Checked
    graph = trace(model, torch.randn(5, 6))
    keep = keep_without(graph, "0", [12, 13])
    pruned = cut(model, graph, keep)
    if "memory" in message:
        with pytest.raises(RuntimeError, match="memory"):
            verify(pruned, model, graph, keep)
    else:
        assert verify(pruned, model, graph, keep).power == 0


def test_a_lack_of_memory_in_float64_is_not_followed_by_a_run_in_float32():
    class Full(nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().forward(x)

    model = negative_biases().eval()
    model[0].__class__ = Full
    graph = trace(model, torch.randn(5, 6))
    keep = keep_without(graph, "0", [1])
    with pytest.raises(torch.OutOfMemoryError):
        verify(cut(model, graph, keep), model, graph, keep)


def test_dead_units_are_pruned_by_the_public_functions():
    torch.manual_seed(0)
    model, inputs = negative_biases().eval(), torch.randn(50, 6)
    plan = kirsch.plan(kirsch.trace(model, inputs[:1]), kirsch.Goal(macs=0.51))
    assert torch.allclose(kirsch.prune(model, plan)(inputs), model(inputs), atol=1e-6)


def test_units_that_no_parameters_can_activate_are_not_removed_with_verification():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x) + 0 * self.second(self.first(x)).sum()

    model = Hidden().eval()
    plan = kirsch.plan(kirsch.trace(model, torch.randn(5, 6)), kirsch.Goal(macs=0.6))
    with pytest.raises(VerificationError, match="do not depend on the removed units"):
        kirsch.prune(model, plan)
