"""Tests: a student whose first output in training mode is not its logits is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import Training

N, D, K = 40, 6, 3
ONE_EPOCH = Training(epochs=1, learning_rate=0.01)


class Branching(nn.Module):
    """Returns other outputs in training mode.

    Args:
        form: function (features, logits) → outputs in training mode.
        width: number of features.
    """

    def __init__(self, form, width=D):
        super().__init__()
        self.form = form
        self.body, self.fc = nn.Sequential(nn.Linear(D, width), nn.BatchNorm1d(width), nn.ReLU()), nn.Linear(width, K)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        features = self.body(x)
        logits = self.fc(self.dropout(features))
        return self.form(features, logits) if self.training else logits


class Wrapped(nn.Module):
    """A model whose submodule returns other outputs in training mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def features_first(features, logits):
    return features, logits


def loss_first(_features, logits):
    return logits.square().mean(), logits


def auxiliary_after_logits(features, logits):
    return logits, features[:, :K]


def as_a_dict(features, logits):
    return {"features": features, "logits": logits}


def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, D, generator=generator)
    return list(zip(inputs.split(10), inputs[:, :K].argmax(1).split(10), strict=True))


def teacher():
    torch.manual_seed(7)
    return nn.Linear(D, K)


CALLS = {
    "fit": lambda model: fit(model, batches(), training=ONE_EPOCH),
    "distill": lambda model: distill(model, teacher(), batches(), training=ONE_EPOCH, check_teacher=False),
    "mutual": lambda model: distill_mutually([model, teacher()], batches(), training=ONE_EPOCH),
    "distiller": lambda model: Distiller(model, teacher(), Objective.kd(), batches()[0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("form", "width"), [(features_first, 5), (features_first, K), (loss_first, D)], ids=["features", "K", "loss"]
)
def test_logits_that_are_not_the_first_output_in_training_mode_are_refused(call, form, width):
    model = Branching(form, width)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"first in training mode, and logits .* its output '1'") as error:
        CALLS[call](model)
    assert "Return the logits first" in error.value.fix
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_branch_in_a_submodule_is_found():
    with pytest.raises(UsageError, match="Wrapped returns an output of shape"):
        fit(Wrapped(Branching(features_first)), batches(), training=ONE_EPOCH)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", [auxiliary_after_logits, as_a_dict])
def test_further_outputs_after_the_logits_and_named_logits_are_accepted(call, form):
    CALLS[call](Branching(form))


def test_the_check_of_the_outputs_does_not_copy_the_parameters():
    """A copy of a large model may not fit into memory."""

    class Large(nn.Parameter):
        def __deepcopy__(self, memo):
            raise MemoryError

    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = Large(model[0].weight.detach())
    framework_of(model).inference.check_training_outputs(model, torch.zeros(2, 4))
