"""Errors that name the model and the fix in cases in which the errors of PyTorch do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kirsch
from hooks import assert_no_hooks
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import ModelError, NumericError, UsageError
from kirsch.frameworks.pytorch.features.layers import expand

D, K = 6, 3


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, D, generator=generator), torch.arange(8) % K


def net():
    return nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, K))


def run_distill(student, teacher, objective=None):
    training = kirsch.Training(epochs=1)
    return kirsch.distill(student, teacher, [batch()], objective=objective, training=training, check_teacher=False)


def relational_objective(layer):
    return Objective((Term("rkd", student_layer=layer, teacher_layer="0"),))


def test_the_error_names_the_types_of_the_teacher_and_its_inputs():
    message = r"Sequential computes in bfloat16, and its inputs are float32\. .*model\.float\(\)"
    for objective in (None, relational_objective("0"), Objective.preset("rkd")):
        with pytest.raises(UsageError, match=message):
            run_distill(net(), net().bfloat16(), objective)


def scripted():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.script(net())


def traced():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.trace(net(), batch()[0])


@pytest.mark.parametrize("make", [scripted, traced])
def test_a_torchscript_teacher_supports_losses_on_logits_only(make):
    assert len(run_distill(net(), make()).history) == 1
    teacher = nn.Sequential(nn.Linear(D, D), make())
    with pytest.raises(UsageError, match=r"`1\.0` is TorchScript, which does not support hooks\. Use losses"):
        run_distill(net(), teacher, Objective((Term("rkd", student_layer="0", teacher_layer="1.0"),)))
    with pytest.raises(UsageError, match="The logits of Sequential are not the output of a module"):
        expand(teacher, "penultimate", batch()[0])
    assert_no_hooks(teacher)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_models_that_store_tensors_of_an_earlier_autograd_graph_can_be_distilled():
    def with_weight_norm():
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(D, K)))
        model(batch()[0])
        return model

    run_distill(net(), with_weight_norm())
    run_distill(with_weight_norm(), net())


def test_the_error_names_an_attribute_that_cannot_be_copied():
    teacher = nn.Sequential(nn.Linear(D, K))
    teacher.stream = (number for number in range(3))
    with pytest.raises(ModelError, match=r"A Sequential cannot be copied\. Its attribute `stream`, a generator"):
        run_distill(net(), teacher)


class Checkpointed(nn.Module):
    def __init__(self, *, before):
        super().__init__()
        self.before, self.layers = nn.Linear(D, D) if before else nn.Identity(), net()

    def forward(self, inputs):
        return checkpoint(self.layers, self.before(inputs), use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("before", "error"), [(False, NumericError), (True, UsageError)])
def test_the_error_for_reentrant_checkpoints_names_the_fix(before, error):
    with pytest.raises(error, match="use_reentrant=False"):
        run_distill(Checkpointed(before=before), net())


def test_the_error_for_layers_of_a_compiled_model_names_the_fix():
    student = torch.compile(net(), backend="eager")
    student(batch()[0])
    message = r"runs in no forward pass of OptimizedModule.* A compiled model that has run .* compile distiller\.module"
    with pytest.raises(UsageError, match=message):
        run_distill(student, net(), relational_objective("_orig_mod.0"))


def test_the_error_for_a_teacher_that_returns_nan_names_the_teacher():
    teacher = net()
    teacher[0].weight.data.fill_(float("nan"))
    message = (
        r"The loss term kd is not finite at epoch 1, batch 1, although the outputs of the model are finite\. .* teacher"
    )
    with pytest.raises(NumericError, match=message):
        run_distill(net(), teacher)
