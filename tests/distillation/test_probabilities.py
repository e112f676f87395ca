"""Models that return probabilities are refused; logits are accepted."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from distillation.examples import samples
from distillation.probabilities import (
    BINARY,
    PLAIN,
    QUIET,
    SHORT,
    SOFT,
    YES,
    D,
    K,
    N,
    dataset,
    net,
)
from kirsch.data.batches import ArrayData
from kirsch.distillation.chain import born_again, distill_chain
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, TopK, build_store
from kirsch.errors import UsageError

refuses_student = pytest.raises(
    UsageError, match=r"The student, a Sequential, returns probabilities: they are at least"
)
refuses_teacher = pytest.raises(UsageError, match=r"The teacher, a Sequential, returns probabilities.*teacher_outputs=")


# ------------------------------------------------------------------------------------------------ refused


def test_a_student_that_ends_in_a_softmax_is_refused_by_every_training_function():
    with refuses_student:
        distill(SOFT, net(), dataset(), **QUIET)
    with refuses_student:
        distill(SOFT, net(nn.Softmax(-1)), dataset(), objective=Objective(teacher_outputs="probabilities"), **QUIET)
    with refuses_student:
        fit(SOFT, dataset(), training=SHORT)
    with refuses_student:
        Distiller(copy.deepcopy(SOFT), net(), Objective.kd(), samples(N))
    with refuses_student:
        distill_mutually([net(seed=5), SOFT], dataset(), training=SHORT)
    with refuses_student:
        distill_chain([net(), SOFT], dataset(), training=SHORT, check_teacher=False)
    with refuses_student:
        born_again(lambda: net(nn.Softmax(-1), seed=torch.seed() % 1000), dataset(), generations=1, training=SHORT)


def test_a_teacher_that_ends_in_a_softmax_is_refused_by_every_function_with_a_teacher(tmp_path):
    with refuses_teacher:
        distill(PLAIN, net(nn.Softmax(-1)), dataset(), **QUIET)
    with refuses_teacher:
        distill(PLAIN, [net(), net(nn.Softmax(-1))], dataset(), **QUIET)
    with refuses_teacher:
        Distiller(copy.deepcopy(PLAIN), net(nn.Softmax(-1)), Objective.kd(), samples(N))
    for keep in (Dense(), TopK(2)):
        with pytest.raises(UsageError, match=r"The teacher, a Sequential, returns probabilities.* callable `outputs`"):
            build_store(tmp_path / "store", net(nn.Softmax(-1)), dataset(), keep=keep)
    with pytest.raises(UsageError, match=r"The teacher, a Sequential, returns probabilities.* callable `outputs`"):
        build_store(tmp_path / "store", net(nn.Sigmoid()), dataset(), keep=TopK(2))


class Named(nn.Module):
    """A model that returns a dict with one named output."""

    def __init__(self, name, dim):
        super().__init__()
        self.name, self.dim, self.body = name, dim, nn.Conv2d(2, K, 1)

    def forward(self, x):
        return {self.name: self.body(x).softmax(self.dim)}


def test_probabilities_of_pixels_tokens_and_named_outputs_are_refused():
    images, masks = np.random.default_rng(0).standard_normal((8, 2, 4, 5)).astype(np.float32), np.zeros((8, 4, 5), int)
    for name in ("probs", "out", "logits"):
        with pytest.raises(UsageError, match="a Named, returns probabilities"):
            fit(Named(name, 1), ArrayData(images, masks), training=SHORT)
    tokens = np.random.default_rng(0).integers(0, 7, (8, 4))
    language = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7), nn.Softmax(-1))
    with pytest.raises(UsageError, match="returns probabilities"):
        fit(language, ArrayData(tokens, tokens), objective=Objective.preset("seqkd", causal=True), training=SHORT)


@pytest.mark.parametrize("factor", [100, 255, 0.5, 12.3])
def test_a_softmax_times_a_number_is_refused(factor):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(nn.Softmax(-1))

        def forward(self, x):
            return factor * self.body(x)

    scaled = "returns scaled probabilities: they are at least 0 and have the same sum"
    with pytest.raises(UsageError, match=f"The student, a Scaled, {scaled}"):
        fit(Scaled(), dataset(), training=SHORT)
    with pytest.raises(UsageError, match=f"The teacher, a Scaled, {scaled}"):
        distill(net(), Scaled(), dataset(), **QUIET)
    assert fit(Scaled(), dataset(), objective=Objective(student_outputs="logits"), training=SHORT).history


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus()])
def test_logits_that_are_all_at_least_0_are_accepted(activation):
    assert fit(net(activation), dataset(), training=SHORT).history


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Hardsigmoid()])
@pytest.mark.parametrize("classes", [1, K])
def test_a_model_that_ends_in_a_sigmoid_is_refused(activation, classes):
    targets = YES[:, :classes].astype(np.float32)
    sentence = "The student, a Sequential, returns probabilities: all are from 0 to 1, like the outputs of a sigmoid"
    with pytest.raises(UsageError, match=sentence):
        fit(
            net(activation, classes=classes), dataset(targets), objective=Objective(label_loss="binary"), training=SHORT
        )
    with pytest.raises(UsageError, match="The teacher, a Sequential, returns probabilities"):
        distill(net(classes=classes), net(activation, classes=classes), dataset(targets), objective=BINARY, **QUIET)


def layer_of(function):
    """Return a layer that computes a function of the logits."""

    class Function(nn.Module):
        def forward(self, z):
            return function(z)

    return Function()


SQUASHED = {
    "scaled": lambda z: z.sigmoid() * 1.0,
    "shifted": lambda z: z.sigmoid() * 0.999 + 1e-7,
    "one minus": lambda z: 1 - (-z).sigmoid(),
    "by hand": lambda z: 1 / (1 + torch.exp(-z)),
    "tanh": lambda z: (z.tanh() + 1) / 2,
    "log-sigmoid": lambda z: nn.functional.logsigmoid(z).exp(),
    "softplus": lambda z: torch.exp(-nn.functional.softplus(-z)),
    "hardtanh": lambda z: nn.functional.hardtanh(z, 0.0, 1.0),
    "clamped": lambda z: z.clamp(0, 1),
    "cleaned": lambda z: z.sigmoid().nan_to_num(),
    "chosen": lambda z: torch.where(z > 0, z.sigmoid(), z.sigmoid()),
    "masked": lambda z: z.sigmoid().masked_fill(z > 9, 0.5),
    "flipped": lambda z: z.sigmoid().flip(-1).roll(1, -1),
    "a product": lambda z: z.sigmoid() * (2 * z).sigmoid(),
    "a mean": lambda z: (z.sigmoid() + (2 * z).sigmoid()) / 2,
    "a softmax without a class": lambda z: torch.cat([z, z[:, :1]], -1).softmax(-1)[:, :-1] * 1.0,
}


@pytest.mark.parametrize("name", SQUASHED)
def test_functions_of_a_sigmoid_are_refused(name):
    student = net(layer_of(SQUASHED[name]), seed=2)
    with pytest.raises(UsageError, match="The student, a Sequential, returns probabilities"):
        distill(student, net(seed=3), dataset(YES), objective=BINARY, **QUIET)


def test_a_map_that_is_upsampled_after_a_sigmoid_is_refused():
    student = nn.Sequential(nn.Conv2d(2, 1, 1), nn.Sigmoid(), nn.Upsample(scale_factor=2, mode="bilinear"))
    images = np.random.default_rng(0).standard_normal((8, 2, 4, 4)).astype(np.float32)
    masks = (np.random.default_rng(1).random((8, 1, 8, 8)) < 0.5).astype(np.float32)
    with pytest.raises(UsageError, match="returns probabilities"):
        fit(student, ArrayData(images, masks), objective=Objective(label_loss="binary"), training=SHORT)


class Gated(nn.Module):
    """Attention and a gate before the last layer, and logits from 0 to 1 for the inputs of the test."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(D, D), nn.Linear(D, K)
        with torch.no_grad():
            self.head.weight.mul_(0.05)
            self.head.bias.fill_(0.5)

    def forward(self, x):
        attention = (x[:, :, None] * x[:, None]).softmax(-1)
        return self.head((attention @ x[:, :, None])[:, :, 0] * self.gate(x).sigmoid())


def test_logits_that_are_clamped_from_below_only_are_accepted():
    model = nn.Sequential(Squeezed(K), layer_of(lambda z: z.clamp(min=0).relu()))
    assert fit(model, dataset(YES), objective=Objective(label_loss="binary"), training=SHORT).history


def test_a_sigmoid_or_softmax_before_the_last_layer_is_accepted():
    model = Gated().double()
    with torch.no_grad():
        found = model(torch.from_numpy(samples(N)[0]))
    assert 0 <= found.min() <= found.max() <= 1
    assert fit(model, dataset(YES), objective=Objective(label_loss="binary"), training=SHORT).history


def test_a_sigmoid_before_the_cross_entropy_is_refused():
    with pytest.raises(UsageError, match="all are from 0 to 1, like the outputs of a sigmoid"):
        fit(net(nn.Sigmoid()), dataset(), training=SHORT)


class Squeezed(nn.Module):
    """Logits from 0 to 1 without an activation."""

    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(D, classes).double()
        nn.init.zeros_(self.linear.weight)
        self.linear.weight.data[:, 0] = 0.05
        nn.init.constant_(self.linear.bias, 0.4)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("classes", [1, K])
def test_logits_that_happen_to_lie_between_0_and_1_are_accepted(classes):
    data = dataset(YES[:, :classes].astype(np.float32))
    model = Squeezed(classes)
    with torch.no_grad():
        outputs = model(torch.from_numpy(data.inputs))
    assert 0 < outputs.min() < outputs.max() < 1
    found = fit(model, data, objective=Objective(label_loss="binary"), training=SHORT)
    assert len(found.history) == SHORT.epochs


def test_constant_outputs_with_sum_1_are_refused_only_if_the_model_ends_in_a_softmax():
    head = nn.Linear(D, K).double()
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 1 / K)
    assert len(fit(nn.Sequential(head), dataset(), training=SHORT).history) == SHORT.epochs
    with pytest.raises(UsageError, match="returns probabilities"):
        fit(nn.Sequential(head, nn.Softmax(-1)), dataset(), training=SHORT)


def test_a_sigmoid_is_accepted_for_regression():
    data = dataset(np.random.default_rng(0).random((N, 1)).astype(np.float64))
    found = fit(net(nn.Sigmoid(), classes=1), data, objective=Objective(label_loss="squared-error"), training=SHORT)
    assert len(found.history) == SHORT.epochs


# ------------------------------------------------------------------------------------------------ training mode


class InOneMode(nn.Module):
    """Applies an activation in one mode only."""

    def __init__(self, activation, *, training, seed=1):
        super().__init__()
        self.body, self.activation, self.mode = net(seed=seed), activation, training

    def forward(self, x):
        out = self.body(x)
        return self.activation(out) if self.training == self.mode else out


def test_a_softmax_in_training_mode_only_is_refused():
    refuses = pytest.raises(
        UsageError, match=r"The student, in training mode, returns probabilities.* return logits in"
    )
    student = InOneMode(nn.Softmax(-1), training=True)
    with refuses:
        fit(student, dataset(), training=SHORT)
    with refuses:
        distill(student, net(), dataset(), **QUIET)
    with refuses:
        distill_mutually([student, net()], dataset(), training=SHORT)
    distiller = Distiller(student, net(), Objective.kd(), samples(N))
    distiller.eval()(samples(N))
    with refuses:
        distiller.train()(samples(N))


def test_outputs_in_training_mode_are_accepted_if_declared_as_logits():
    objective = Objective(student_outputs="logits")
    assert fit(InOneMode(nn.Softmax(-1), training=True), dataset(), objective=objective, training=SHORT).history


def test_logits_that_differ_in_training_mode_are_accepted():
    dropped = nn.Sequential(net(), nn.Dropout(0.9))
    assert fit(dropped, dataset(), training=SHORT).history


# ------------------------------------------------------------------------------------------------ logarithms


@pytest.mark.parametrize("classes", [1, K])
def test_logarithms_of_a_sigmoid_are_refused_by_the_binary_loss(classes):
    data = dataset(YES[:, :classes].astype(np.float64))
    for model in (
        net(nn.LogSigmoid(), classes=classes),
        net(nn.LogSigmoid(), nn.Unflatten(1, (classes, 1)), nn.Flatten(), classes=classes),
    ):
        with pytest.raises(UsageError, match=r"The student, a Sequential, returns logarithms of a sigmoid, at most 0"):
            fit(model, data, objective=Objective(label_loss="binary"), training=SHORT)
    with pytest.raises(UsageError, match="The teacher, a Sequential, returns logarithms of a sigmoid"):
        distill(net(classes=classes), net(nn.LogSigmoid(), classes=classes), data, objective=BINARY, **QUIET)


LOGITS = {
    "a difference, which is a logit": lambda z: nn.functional.logsigmoid(z - 9) - nn.functional.logsigmoid(9 - z),
    "negative": lambda z: z - 50,
    "capped": lambda z: 30 * ((z - 50) / 30).tanh(),
    "distances": lambda z: -(z**2),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_that_are_all_negative_are_accepted(name):
    model = net(layer_of(LOGITS[name]))
    assert fit(model, dataset(YES.astype(np.float64)), objective=Objective(label_loss="binary"), training=SHORT).history


def test_logarithms_of_a_sigmoid_are_accepted_by_the_cross_entropy():
    assert fit(net(nn.LogSigmoid()), dataset(), training=SHORT).history
