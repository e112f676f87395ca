"""Tests of computed weights that change when units are removed, and of the power of a verification."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import kirsch
from kirsch.frameworks.pytorch.verification.distance import power
from kirsch.graph.plan import Goal
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import with_noise

X = torch.randn(5, 8)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Layers(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.b, self.c = wrap(nn.Linear(8, 16)), wrap(nn.Linear(16, 16)), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Standardized(nn.Linear):
    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight / (weight.var(1, keepdim=True) + 1e-5).sqrt(), self.bias)


class StandardizedTensor(nn.Module):
    """Standardize a weight by the mean and standard deviation of all its entries.

    If the rows and columns of removed units are set to 0 before that, they are not 0 after it.
    """

    def forward(self, weight):
        return (weight - weight.mean()) / weight.std()


class StandardizedOverAllAxes(nn.Linear):
    def forward(self, x):
        return F.linear(x, StandardizedTensor()(self.weight), self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1))


class Divided(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) / self.weight.norm(dim=1)


class Scaled(nn.Module):
    def forward(self, weight):
        return weight / weight.abs().mean()


class Factored(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.randn(size)) for size in ((layer.out_features, 6), (6, layer.in_features)))

    def forward(self, x):
        return F.linear(x, self.u @ self.v)


def parametrized(layer, by=Scaled):
    return parametrize.register_parametrization(layer, "weight", by())


def same_size(layer_class):
    return lambda layer: layer_class(layer.in_features, layer.out_features)


WEIGHTS_THAT_CHANGE = {
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "weight norm over all axes": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm by a hook": nn.utils.weight_norm,
    "standardized": same_size(Standardized),
    "cosine": same_size(Cosine),
    "divided later": same_size(Divided),
    "parametrized": parametrized,
    "standardized over all axes": same_size(StandardizedOverAllAxes),
    "standardized over all axes, parametrized": lambda layer: parametrized(layer, StandardizedTensor),
}


def pruned(wrap):
    torch.manual_seed(0)
    model = Layers(wrap)
    return model, prune_with_verification(model, kirsch.plan(kirsch.trace(model, X), Goal(macs=0.5)))


@pytest.mark.parametrize("kind", WEIGHTS_THAT_CHANGE)
def test_modules_whose_computed_weight_changes_for_kept_units_are_listed(kind):
    _, result = pruned(WEIGHTS_THAT_CHANGE[kind])
    assert "b" in result.verification.reweighted
    assert any("`b` (" in note and "times the original" in note for note in result.notes)
    assert "the computed weights of" in result.verification.text
    assert result.verification.to_dict()["reweighted"] == dict(result.verification.reweighted)


def test_the_reported_ratio_is_the_rms_of_the_kept_entries_relative_to_the_original():
    model, result = pruned(parametrizations.weight_norm)
    model.eval(), result.model.eval()
    removal = next(removal for removal in result.plan.groups if removal.name == "b")
    rows = [row for row in range(16) if row not in removal.removed]
    first = next(removal for removal in result.plan.groups if removal.name == "a")
    columns = [column for column in range(16) if column not in first.removed]
    before = model.b.weight[rows][:, columns]
    size = (result.model.b.weight.square().mean() / before.square().mean()).sqrt().item()
    assert result.verification.reweighted["b"] == pytest.approx(size, rel=1e-4)


WEIGHTS_THAT_DO_NOT_CHANGE = {
    "plain": lambda layer: layer,
    "orthogonal": parametrizations.orthogonal,
    "factored": Factored,
}


@pytest.mark.parametrize("kind", WEIGHTS_THAT_DO_NOT_CHANGE)
def test_modules_whose_computed_weight_is_unchanged_are_not_listed(kind):
    _, result = pruned(WEIGHTS_THAT_DO_NOT_CHANGE[kind])
    assert not result.verification.reweighted
    assert result.verification.power > 1e-3


def test_a_model_with_spectral_norm_is_pruned_in_training_mode():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)).train()
    result = prune_with_verification(model, kirsch.plan(kirsch.trace(model, X), Goal(macs=0.5)))
    assert result.verification.passed
    assert all(module.training for module in result.model.modules())


def test_power_compares_only_kept_units_of_an_output_that_loses_units():
    class Both(nn.Module):
        """Returns logits and hidden states; the hidden states lose units."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            hidden = torch.relu(self.a(x))
            return {"logits": self.b(hidden), "hidden_states": hidden}

    model = with_noise(Both())
    result = prune_with_verification(model, kirsch.plan(kirsch.trace(model, X), Goal(macs=0.5)))
    assert 1e-3 < result.verification.power <= 2


@pytest.mark.parametrize(
    ("masked", "original", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, 0.0], [1.0, 4.0], 1.0),
        ([-math.inf, 2.0], [-math.inf, 2.0], 0.0),
        ([-math.inf, 2.0], [1.0, 2.0], 1.0),
        ([math.nan, 2.0], [1.0, 2.0], 1.0),
        ([3.0, 0.0], [-3.0, 0.0], 2.0),
    ],
)
def test_power_is_the_largest_relative_difference(masked, original, expected):
    assert power([torch.tensor(masked)], [torch.tensor(original)]) == pytest.approx(expected)


def test_the_note_names_a_parameter_of_the_model_itself():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Linear(6, 16), nn.Parameter(torch.randn(3, 16))

        def forward(self, x):
            return nn.functional.linear(self.body(x).relu(), nn.functional.normalize(self.weight))

    model = with_noise(Cosine())
    result = prune_with_verification(model, kirsch.plan(kirsch.trace(model, torch.randn(4, 6)), Goal(macs=0.6)))
    assert any("The weights of `the model itself` (" in note for note in result.notes)


def test_prune_without_verification_warns_of_changed_computed_weights():
    model = with_noise(nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3)))
    plan = kirsch.plan(kirsch.trace(model, torch.randn(2, 6)), Goal(parameters=0.6))
    with pytest.warns(UserWarning, match=r"The weights of `0` \(.* times the original\) are computed from all units"):
        kirsch.prune(model, plan, verify=False)
