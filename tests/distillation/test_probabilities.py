"""Probabilities are refused, or converted to logits if the objective declares them; logits are used unchanged."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from distillation.examples import samples
from kirsch.data.batches import ArrayData
from kirsch.distillation.chain import born_again, distill_chain, ensemble
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import to_logits
from kirsch.distillation.store import Dense, TopK, build_store, building
from kirsch.distillation.term import Term
from kirsch.errors import UsageError
from kirsch.frameworks.training import Training, TrainingHooks

N, D, K = 48, 6, 3
SHORT = Training(epochs=2, learning_rate=0.1)
QUIET = {"check_teacher": False, "training": SHORT}


def dataset(targets=None):
    inputs, classes = samples(N)
    return ArrayData(inputs, classes if targets is None else targets, batch_size=N)


def net(*behind, seed=0, classes=K):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, classes), *behind).double()


def assert_close_weights(one, other, tolerance=1e-12):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


PLAIN = net(seed=1)
SOFT = net(nn.Softmax(-1), seed=1)

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


YES = np.random.default_rng(3).random((N, K)) < 0.4
BINARY = Objective((Term("binary-kd", 0.5),), label_weight=0.5, label_loss="binary")


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


# ------------------------------------------------------------------------------------------------ declared


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "wsld", "ofa"])
def test_declared_probabilities_are_distilled_like_the_logits(name):
    objective = Objective((Term(name, 0.7, temperature=2.0 if name != "ofa" else None),), label_weight=0.3)
    declared = Objective(
        objective.terms, label_weight=0.3, student_outputs="probabilities", teacher_outputs="probabilities"
    )
    expected = distill(PLAIN, net(), dataset(), objective=objective, **QUIET)
    found = distill(SOFT, net(nn.Softmax(-1)), dataset(), objective=declared, **QUIET)
    assert_close_weights(found.model, expected.model)
    assert found.history[-1]["loss"] == pytest.approx(expected.history[-1]["loss"], rel=1e-10)
    assert isinstance(found.model[-1], nn.Softmax)  # the returned model still ends in a softmax


def test_student_and_teacher_outputs_are_declared_separately():
    objective = Objective.kd(temperature=2.0)
    expected = distill(PLAIN, net(), dataset(), objective=objective, **QUIET).model
    one = Objective(objective.terms, label_weight=objective.label_weight, teacher_outputs="probabilities")
    assert_close_weights(distill(PLAIN, net(nn.Softmax(-1)), dataset(), objective=one, **QUIET).model, expected)
    other = Objective(objective.terms, label_weight=objective.label_weight, student_outputs="probabilities")
    assert_close_weights(distill(SOFT, net(), dataset(), objective=other, **QUIET).model, expected)


def test_the_outputs_of_several_teachers_are_declared_as_a_tuple():
    objective = Objective.kd(temperature=2.0)
    expected = distill(PLAIN, [net(), net(seed=4)], dataset(), objective=objective, **QUIET).model
    mixed = Objective(objective.terms, label_weight=objective.label_weight, teacher_outputs=("logits", "probabilities"))
    assert_close_weights(
        distill(PLAIN, [net(), net(nn.Softmax(-1), seed=4)], dataset(), objective=mixed, **QUIET).model, expected
    )
    assert Objective.from_dict(mixed.to_dict()) == mixed
    with pytest.raises(UsageError, match="`teacher_outputs` has length 2; the number of teachers is 1"):
        distill(PLAIN, net(), dataset(), objective=mixed, **QUIET)


def test_declared_outputs_of_a_sigmoid_are_distilled_like_the_logits():
    data = dataset(YES.astype(np.float64))
    declared = Objective(
        BINARY.terms,
        label_weight=0.5,
        label_loss="binary",
        student_outputs="probabilities",
        teacher_outputs="probabilities",
    )
    expected = distill(PLAIN, net(), data, objective=BINARY, **QUIET)
    found = distill(net(nn.Sigmoid(), seed=1), net(nn.Sigmoid()), data, objective=declared, **QUIET)
    assert_close_weights(found.model, expected.model, 1e-9)  # 1 - p loses some digits


def test_fit_and_mutual_learning_accept_declared_probabilities():
    objective = Objective(student_outputs="probabilities")
    assert_close_weights(
        fit(SOFT, dataset(), objective=objective, training=SHORT).model, fit(PLAIN, dataset(), training=SHORT).model
    )
    dml = Objective.preset("dml")
    declared = Objective.preset("dml", student_outputs="probabilities")
    expected = distill_mutually([PLAIN, net()], dataset(), objective=dml, training=SHORT)
    found = distill_mutually([SOFT, net(nn.Softmax(-1))], dataset(), objective=declared, training=SHORT)
    for one, other in zip(found, expected, strict=True):
        assert_close_weights(one.model, other.model)


def test_an_ensemble_of_models_with_probabilities_returns_the_logits_of_the_mean_probabilities():
    inputs = torch.from_numpy(samples(N)[0])
    soft = [net(nn.Softmax(-1), seed=seed).eval() for seed in (0, 1)]
    mean = (soft[0](inputs) + soft[1](inputs)) / 2
    found = ensemble(soft, outputs="probabilities")(inputs)
    torch.testing.assert_close(found.softmax(-1), mean)
    torch.testing.assert_close(ensemble([net(seed=0), net(seed=1)])(inputs).softmax(-1), mean)
    with pytest.raises(UsageError, match=r"Model 0 of the ensemble returns probabilities.* outputs=\"probabilities\""):
        ensemble(soft)(inputs)
    with pytest.raises(UsageError, match=r"`outputs` of kirsch\.ensemble is 'soft'\. Give 'logits', 'prob"):
        ensemble(soft, outputs="soft")


def test_mutual_learning_refuses_teacher_outputs():
    objective = Objective.preset("dml", teacher_outputs="probabilities")
    with pytest.raises(UsageError, match=r"mutual learning has no teacher\. Give student_outputs= instead"):
        distill_mutually([net(), net(seed=1)], dataset(), objective=objective, training=SHORT)


def test_logarithms_of_a_softmax_are_accepted_by_class_losses_and_refused_by_binary_ones():
    expected = distill(PLAIN, net(), dataset(), objective=Objective.kd(temperature=2.0), **QUIET).model
    logs = net(nn.LogSoftmax(-1), seed=1), net(nn.LogSoftmax(-1))
    assert_close_weights(distill(*logs, dataset(), objective=Objective.kd(temperature=2.0), **QUIET).model, expected)
    with pytest.raises(UsageError, match="returns logarithms of probabilities that sum to 1"):
        distill(*logs, dataset(YES.astype(np.float64)), objective=BINARY, **QUIET)


def test_to_logits_equals_its_closed_form():
    p = torch.tensor([[0.2, 0.8], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    found = to_logits(p, "softmax")
    torch.testing.assert_close(found[0], p[0].log())
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(p.grad).all()
    odds = to_logits(torch.tensor([0.2, 0.0, 1.0], dtype=torch.float64), "sigmoid")
    assert float(odds[0]) == pytest.approx(np.log(0.25))
    assert torch.isfinite(odds).all()
    assert to_logits(torch.tensor([0.25], dtype=torch.float16), "softmax").dtype == torch.float32


def test_outputs_that_are_not_as_declared_are_refused():
    with pytest.raises(UsageError, match=r"is declared to return probabilities, but does not.*values from -"):
        fit(PLAIN, dataset(), objective=Objective(student_outputs="probabilities"), training=SHORT)
    with pytest.raises(UsageError, match=r"The classes of `logits` have sums from .* instead of 1"):
        fit(net(nn.Sigmoid()), dataset(), objective=Objective(student_outputs="probabilities"), training=SHORT)
    with pytest.raises(UsageError, match=r"`student_outputs` .* is 'probs'; expected 'logits', 'prob"):
        Objective(student_outputs="probs")


def test_outputs_declared_as_logits_are_not_checked():
    objective = Objective(student_outputs="logits")
    assert len(fit(SOFT, dataset(), objective=objective, training=SHORT).history) == SHORT.epochs


def test_a_store_of_probabilities_is_refused_as_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_check_not_probabilities", lambda *_: None)  # like a store from an older version
    store = build_store(tmp_path / "store", net(nn.Softmax(-1)), dataset(), keep=Dense())
    with pytest.raises(UsageError, match=r"The teacher of the store returns probabilities.* Build the store from"):
        distill(PLAIN, store, dataset(), **QUIET)


def test_a_student_that_ends_in_a_softmax_learns_if_its_outputs_are_declared():
    hooks = TrainingHooks(event=lambda _event: None)
    training = Training(epochs=20, learning_rate=0.3)
    teacher = fit(net(), dataset(), training=training).model
    objective = Objective((Term("kd", 0.9, temperature=4.0),), label_weight=0.1, student_outputs="probabilities")
    found = kirsch.distill(
        SOFT, teacher, dataset(), objective=objective, training=training, validation=samples(N, 1), hooks=hooks
    )
    assert found.history[-1]["accuracy"] == 1.0


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
