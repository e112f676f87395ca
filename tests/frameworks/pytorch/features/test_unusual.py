"""Models that PyTorch itself refuses with a sentence that names neither the model nor the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kirsch
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


def distilled(student, teacher, objective=None):
    training = kirsch.Training(epochs=1)
    return kirsch.distill(student, teacher, [batch()], objective=objective, training=training, check_teacher=False)


def at(site):
    return Objective((Term("rkd", student=site, teacher="0"),))


def test_a_teacher_of_another_type_than_its_inputs_is_named_with_both():
    sentence = r"Sequential computes in bfloat16, and its inputs are float32\. .*Sequential\.float\(\)"
    for objective in (None, at("0"), Objective.preset("rkd")):
        with pytest.raises(UsageError, match=sentence):
            distilled(net(), net().bfloat16(), objective)


def scripted():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.script(net())


def traced():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.trace(net(), batch()[0])


@pytest.mark.parametrize("make", [scripted, traced])
def test_a_teacher_in_torchscript_teaches_by_its_scores(make):
    assert len(distilled(net(), make()).history) == 1
    teacher = nn.Sequential(nn.Linear(D, D), make())
    with pytest.raises(UsageError, match=r"`1\.0` is TorchScript, which lets nobody look inside\. Take losses"):
        distilled(net(), teacher, Objective((Term("rkd", student="0", teacher="1.0"),)))
    with pytest.raises(UsageError, match="The scores of Sequential are made by no layer of its own"):
        expand(teacher, "penultimate", batch()[0])
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_models_that_keep_results_of_a_forward_may_teach_and_learn():
    def kept():
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(D, K)))
        model(batch()[0])
        return model

    distilled(net(), kept())
    distilled(kept(), net())


def test_a_teacher_that_keeps_what_cannot_be_copied_is_named_with_the_attribute():
    teacher = nn.Sequential(nn.Linear(D, K))
    teacher.stream = (number for number in range(3))
    with pytest.raises(ModelError, match=r"A Sequential cannot be copied\. Its attribute `stream`, a generator"):
        distilled(net(), teacher)


class Checkpointed(nn.Module):
    def __init__(self, *, before):
        super().__init__()
        self.before, self.layers = nn.Linear(D, D) if before else nn.Identity(), net()

    def forward(self, inputs):
        return checkpoint(self.layers, self.before(inputs), use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("before", "error"), [(False, NumericError), (True, UsageError)])
def test_layers_that_are_checkpointed_the_old_way_are_told_the_new_one(before, error):
    with pytest.raises(error, match="use_reentrant=False"):
        distilled(Checkpointed(before=before), net())


def test_places_within_a_compiled_model_that_has_run_are_told_the_way_out():
    student = torch.compile(net(), backend="eager")
    student(batch()[0])
    sentence = r"runs in no forward of OptimizedModule.* A compiled forward that has run .* compile distiller\.module"
    with pytest.raises(UsageError, match=sentence):
        distilled(student, net(), at("_orig_mod.0"))


def test_a_teacher_that_puts_out_nan_is_not_taken_for_a_learning_rate():
    teacher = net()
    teacher[0].weight.data.fill_(float("nan"))
    sentence = r"The loss term kd is not finite at epoch 1, batch 1, and the outputs of the model are\. .* teacher"
    with pytest.raises(NumericError, match=sentence):
        distilled(net(), teacher)
