"""Outputs that are probabilities are refused or become logits, and outputs that are logits are left alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.distillation.chain import born_again, distill_chain, ensemble
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import to_logits
from kirsch.distillation.store import Dense, TopK, build, building
from kirsch.distillation.term import Term
from kirsch.errors import UsageError
from kirsch.frameworks.training import Training, TrainingHooks

N, D, K = 48, 6, 3
SHORT = Training(epochs=2, learning_rate=0.1)
QUIET = {"check_teacher": False, "training": SHORT}


def samples(seed=0):
    """Three classes around three corners."""
    random = np.random.default_rng(seed)
    targets = np.arange(N) % K
    return np.eye(D)[targets] * 2 + 0.3 * random.standard_normal((N, D)), targets


def whole(targets=None):
    inputs, classes = samples()
    return ArrayData(inputs, classes if targets is None else targets, batch_size=N)


def net(*behind, seed=0, classes=K):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, classes), *behind).double()


def same(one, other, tolerance=1e-12):
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


PLAIN = net(seed=1)
SOFT = net(nn.Softmax(-1), seed=1)

refuses_student = pytest.raises(
    UsageError, match=r"The student, a Sequential, puts out probabilities: they are at least"
)
refuses_teacher = pytest.raises(
    UsageError, match=r"The teacher, a Sequential, puts out probabilities.*teacher_outputs="
)


# ------------------------------------------------------------------------------------------------ refused


def test_a_model_that_ends_in_a_softmax_is_refused_wherever_it_learns():
    with refuses_student:
        distill(SOFT, net(), whole(), **QUIET)
    with refuses_student:
        distill(SOFT, net(nn.Softmax(-1)), whole(), objective=Objective(teacher_outputs="probabilities"), **QUIET)
    with refuses_student:
        fit(SOFT, whole(), training=SHORT)
    with refuses_student:
        Distiller(copy.deepcopy(SOFT), net(), Objective.kd(), samples())
    with refuses_student:
        distill_mutually([net(seed=5), SOFT], whole(), training=SHORT)
    with refuses_student:
        distill_chain([net(), SOFT], whole(), training=SHORT, check_teacher=False)
    with refuses_student:
        born_again(lambda: net(nn.Softmax(-1), seed=torch.seed() % 1000), whole(), generations=1, training=SHORT)


def test_a_teacher_that_ends_in_a_softmax_is_refused_wherever_it_teaches(tmp_path):
    with refuses_teacher:
        distill(PLAIN, net(nn.Softmax(-1)), whole(), **QUIET)
    with refuses_teacher:
        distill(PLAIN, [net(), net(nn.Softmax(-1))], whole(), **QUIET)
    with refuses_teacher:
        Distiller(copy.deepcopy(PLAIN), net(nn.Softmax(-1)), Objective.kd(), samples())
    for keep in (Dense(), TopK(2)):
        with pytest.raises(UsageError, match=r"The teacher, a Sequential, returns probabilities.* callable `outputs`"):
            build(tmp_path / "store", net(nn.Softmax(-1)), whole(), keep=keep)
    with pytest.raises(UsageError, match=r"The teacher, a Sequential, returns probabilities.* callable `outputs`"):
        build(tmp_path / "store", net(nn.Sigmoid()), whole(), keep=TopK(2))


class Named(nn.Module):
    """A model that calls its output as it is told."""

    def __init__(self, name, dim):
        super().__init__()
        self.name, self.dim, self.body = name, dim, nn.Conv2d(2, K, 1)

    def forward(self, x):
        return {self.name: self.body(x).softmax(self.dim)}


def test_probabilities_of_pixels_tokens_and_named_outputs_are_refused():
    images, masks = np.random.default_rng(0).standard_normal((8, 2, 4, 5)).astype(np.float32), np.zeros((8, 4, 5), int)
    for name in ("probs", "out", "logits"):
        with pytest.raises(UsageError, match="a Named, puts out probabilities"):
            fit(Named(name, 1), ArrayData(images, masks), training=SHORT)
    tokens = np.random.default_rng(0).integers(0, 7, (8, 4))
    language = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7), nn.Softmax(-1))
    with pytest.raises(UsageError, match="puts out probabilities"):
        fit(language, ArrayData(tokens, tokens), objective=Objective.preset("seqkd", causal=True), training=SHORT)


@pytest.mark.parametrize("factor", [100, 255, 0.5, 12.3])
def test_a_softmax_times_a_number_is_refused(factor):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(nn.Softmax(-1))

        def forward(self, x):
            return factor * self.body(x)

    scaled = "puts out scaled probabilities: they are at least 0 and have the same sum"
    with pytest.raises(UsageError, match=f"The student, a Scaled, {scaled}"):
        fit(Scaled(), whole(), training=SHORT)
    with pytest.raises(UsageError, match=f"The teacher, a Scaled, {scaled}"):
        distill(net(), Scaled(), whole(), **QUIET)
    assert fit(Scaled(), whole(), objective=Objective(student_outputs="logits"), training=SHORT).history


@pytest.mark.parametrize("behind", [nn.ReLU(), nn.Softplus()])
def test_logits_that_are_at_least_0_are_trained(behind):
    assert fit(net(behind), whole(), training=SHORT).history


YES = np.random.default_rng(3).random((N, K)) < 0.4
BINARY = Objective((Term("binary-kd", 0.5),), 0.5, label_loss="binary")


@pytest.mark.parametrize("behind", [nn.Sigmoid(), nn.Hardsigmoid()])
@pytest.mark.parametrize("classes", [1, K])
def test_a_sigmoid_is_refused_whatever_its_values(behind, classes):
    targets = YES[:, :classes].astype(np.float32)
    sentence = "The student, a Sequential, puts out probabilities: all are from 0 to 1, as a sigmoid makes them"
    with pytest.raises(UsageError, match=sentence):
        fit(net(behind, classes=classes), whole(targets), objective=Objective(label_loss="binary"), training=SHORT)
    with pytest.raises(UsageError, match="The teacher, a Sequential, puts out probabilities"):
        distill(net(classes=classes), net(behind, classes=classes), whole(targets), objective=BINARY, **QUIET)


def of_logits(function):
    """A layer that computes a function of the logits."""

    class After(nn.Module):
        def forward(self, z):
            return function(z)

    return After()


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
def test_what_is_computed_from_a_sigmoid_without_a_layer_between_is_refused(name):
    student = net(of_logits(SQUASHED[name]), seed=2)
    with pytest.raises(UsageError, match="The student, a Sequential, puts out probabilities"):
        distill(student, net(seed=3), whole(YES), objective=BINARY, **QUIET)


def test_a_map_that_is_enlarged_after_its_sigmoid_is_refused():
    student = nn.Sequential(nn.Conv2d(2, 1, 1), nn.Sigmoid(), nn.Upsample(scale_factor=2, mode="bilinear"))
    images = np.random.default_rng(0).standard_normal((8, 2, 4, 4)).astype(np.float32)
    masks = (np.random.default_rng(1).random((8, 1, 8, 8)) < 0.5).astype(np.float32)
    with pytest.raises(UsageError, match="puts out probabilities"):
        fit(student, ArrayData(images, masks), objective=Objective(label_loss="binary"), training=SHORT)


class Gated(nn.Module):
    """Attention and gates inside, and logits that lie from 0 to 1 for these inputs."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(D, D), nn.Linear(D, K)
        with torch.no_grad():
            self.head.weight.mul_(0.05)
            self.head.bias.fill_(0.5)

    def forward(self, x):
        attention = (x[:, :, None] * x[:, None]).softmax(-1)
        return self.head((attention @ x[:, :, None])[:, :, 0] * self.gate(x).sigmoid())


def test_logits_that_are_only_kept_from_below_are_trained():
    model = nn.Sequential(Squeezed(K), of_logits(lambda z: z.clamp(min=0).relu()))
    assert fit(model, whole(YES), objective=Objective(label_loss="binary"), training=SHORT).history


def test_gates_and_attention_before_the_last_layer_are_no_reason_to_refuse():
    model = Gated().double()
    with torch.no_grad():
        found = model(torch.from_numpy(samples()[0]))
    assert 0 <= found.min() <= found.max() <= 1
    assert fit(model, whole(YES), objective=Objective(label_loss="binary"), training=SHORT).history


def test_a_sigmoid_before_the_cross_entropy_of_classes_is_refused():
    with pytest.raises(UsageError, match="all are from 0 to 1, as a sigmoid makes them"):
        fit(net(nn.Sigmoid()), whole(), training=SHORT)


class Squeezed(nn.Module):
    """Logits that lie from 0 to 1 by themselves, without an activation."""

    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(D, classes).double()
        nn.init.zeros_(self.linear.weight)
        self.linear.weight.data[:, 0] = 0.05
        nn.init.constant_(self.linear.bias, 0.4)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("classes", [1, K])
def test_logits_that_happen_to_lie_between_0_and_1_are_trained(classes):
    data = whole(YES[:, :classes].astype(np.float32))
    model = Squeezed(classes)
    with torch.no_grad():
        outputs = model(torch.from_numpy(data.inputs))
    assert 0 < outputs.min() < outputs.max() < 1
    found = fit(model, data, objective=Objective(label_loss="binary"), training=SHORT)
    assert len(found.history) == SHORT.epochs


def test_a_bias_that_sums_to_1_is_no_softmax_and_a_softmax_that_answers_alike_is():
    head = nn.Linear(D, K).double()
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 1 / K)
    assert len(fit(nn.Sequential(head), whole(), training=SHORT).history) == SHORT.epochs
    with pytest.raises(UsageError, match="puts out probabilities"):
        fit(nn.Sequential(head, nn.Softmax(-1)), whole(), training=SHORT)


def test_a_fraction_that_a_sigmoid_predicts_is_a_number_like_any_other():
    data = whole(np.random.default_rng(0).random((N, 1)).astype(np.float64))
    found = fit(net(nn.Sigmoid(), classes=1), data, objective=Objective(label_loss="squared-error"), training=SHORT)
    assert len(found.history) == SHORT.epochs


# ------------------------------------------------------------------------------------------------ taken


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "wsld", "ofa"])
def test_distilling_probabilities_is_distilling_the_logits_that_they_are_made_of(name):
    objective = Objective((Term(name, 0.7, temperature=2.0 if name != "ofa" else None),), 0.3)
    stated = Objective(objective.terms, 0.3, student_outputs="probabilities", teacher_outputs="probabilities")
    wanted = distill(PLAIN, net(), whole(), objective=objective, **QUIET)
    found = distill(SOFT, net(nn.Softmax(-1)), whole(), objective=stated, **QUIET)
    same(found.model, wanted.model)
    assert found.history[-1]["loss"] == pytest.approx(wanted.history[-1]["loss"], rel=1e-10)
    assert isinstance(found.model[-1], nn.Softmax)  # the model that is given back is the model that was given


def test_each_side_may_put_out_what_it_does():
    objective = Objective.kd(2.0)
    wanted = distill(PLAIN, net(), whole(), objective=objective, **QUIET).model
    one = Objective(objective.terms, objective.label_weight, teacher_outputs="probabilities")
    same(distill(PLAIN, net(nn.Softmax(-1)), whole(), objective=one, **QUIET).model, wanted)
    other = Objective(objective.terms, objective.label_weight, student_outputs="probabilities")
    same(distill(SOFT, net(), whole(), objective=other, **QUIET).model, wanted)


def test_several_teachers_are_stated_one_by_one():
    objective = Objective.kd(2.0)
    wanted = distill(PLAIN, [net(), net(seed=4)], whole(), objective=objective, **QUIET).model
    mixed = Objective(objective.terms, objective.label_weight, teacher_outputs=("logits", "probabilities"))
    same(distill(PLAIN, [net(), net(nn.Softmax(-1), seed=4)], whole(), objective=mixed, **QUIET).model, wanted)
    assert Objective.from_dict(mixed.to_dict()) == mixed
    with pytest.raises(UsageError, match="teacher_outputs says what 2 teachers put out, and there are 1"):
        distill(PLAIN, net(), whole(), objective=mixed, **QUIET)


def test_answers_of_a_sigmoid_are_those_of_its_logits():
    data = whole(YES.astype(np.float64))
    stated = Objective(
        BINARY.terms, 0.5, label_loss="binary", student_outputs="probabilities", teacher_outputs="probabilities"
    )
    wanted = distill(PLAIN, net(), data, objective=BINARY, **QUIET)
    found = distill(net(nn.Sigmoid(), seed=1), net(nn.Sigmoid()), data, objective=stated, **QUIET)
    same(found.model, wanted.model, 1e-9)  # 1 - p loses some digits


def test_training_alone_and_students_among_themselves_take_probabilities():
    objective = Objective(student_outputs="probabilities")
    same(fit(SOFT, whole(), objective=objective, training=SHORT).model, fit(PLAIN, whole(), training=SHORT).model)
    dml = Objective.preset("dml")
    stated = Objective.preset("dml", student_outputs="probabilities")
    wanted = distill_mutually([PLAIN, net()], whole(), objective=dml, training=SHORT)
    found = distill_mutually([SOFT, net(nn.Softmax(-1))], whole(), objective=stated, training=SHORT)
    for one, other in zip(found, wanted, strict=True):
        same(one.model, other.model)


def test_an_ensemble_of_probabilities_has_the_logits_of_their_mean():
    inputs = torch.from_numpy(samples()[0])
    soft = [net(nn.Softmax(-1), seed=seed).eval() for seed in (0, 1)]
    mean = (soft[0](inputs) + soft[1](inputs)) / 2
    found = ensemble(soft, outputs="probabilities")(inputs)
    torch.testing.assert_close(found.softmax(-1), mean)
    torch.testing.assert_close(ensemble([net(seed=0), net(seed=1)])(inputs).softmax(-1), mean)
    with pytest.raises(UsageError, match=r"Model 0 of the ensemble puts out probabilities.* outputs=\"probabilities\""):
        ensemble(soft)(inputs)
    with pytest.raises(UsageError, match=r"`outputs` of kirsch\.ensemble is 'soft'\. Give 'logits', 'prob"):
        ensemble(soft, outputs="soft")


def test_peers_are_students_and_no_teachers():
    objective = Objective.preset("dml", teacher_outputs="probabilities")
    with pytest.raises(UsageError, match=r"students that learn from each other have none\. Say it of the students"):
        distill_mutually([net(), net(seed=1)], whole(), objective=objective, training=SHORT)


def test_logarithms_of_probabilities_are_logits_of_classes_and_not_of_yes_or_no():
    wanted = distill(PLAIN, net(), whole(), objective=Objective.kd(2.0), **QUIET).model
    logs = net(nn.LogSoftmax(-1), seed=1), net(nn.LogSoftmax(-1))
    same(distill(*logs, whole(), objective=Objective.kd(2.0), **QUIET).model, wanted)
    with pytest.raises(UsageError, match="puts out logarithms of probabilities that sum to 1"):
        distill(*logs, whole(YES.astype(np.float64)), objective=BINARY, **QUIET)


def test_the_logits_of_probabilities_in_closed_form():
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


def test_outputs_that_are_not_what_is_stated_are_refused():
    with pytest.raises(UsageError, match=r"is said to put out probabilities, and does not.*values from -"):
        fit(PLAIN, whole(), objective=Objective(student_outputs="probabilities"), training=SHORT)
    with pytest.raises(UsageError, match=r"the classes of a sample sum to .* and not to 1"):
        fit(net(nn.Sigmoid()), whole(), objective=Objective(student_outputs="probabilities"), training=SHORT)
    with pytest.raises(UsageError, match=r"`student_outputs` .* is 'probs'; expected 'logits', 'prob"):
        Objective(student_outputs="probs")


def test_outputs_that_are_said_to_be_logits_are_trusted():
    objective = Objective(student_outputs="logits")
    assert len(fit(SOFT, whole(), objective=objective, training=SHORT).history) == SHORT.epochs


def test_a_store_of_probabilities_is_refused_when_it_teaches(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_check_not_probabilities", lambda *_: None)  # as one that was built elsewhere
    store = build(tmp_path / "store", net(nn.Softmax(-1)), whole(), keep=Dense())
    with pytest.raises(UsageError, match=r"The teacher of the store puts out probabilities.* Build the store from"):
        distill(PLAIN, store, whole(), **QUIET)


def test_a_softmax_student_learns_as_much_as_one_without_when_it_is_stated():
    told = []
    hooks = TrainingHooks(event=told.append)
    training = Training(epochs=20, learning_rate=0.3)
    teacher = fit(net(), whole(), training=training).model
    objective = Objective((Term("kd", 0.9, temperature=4.0),), 0.1, student_outputs="probabilities")
    found = kirsch.distill(
        SOFT, teacher, whole(), objective=objective, training=training, validation=samples(1), hooks=hooks
    )
    assert found.history[-1]["accuracy"] == 1.0


# ------------------------------------------------------------------------------------------------ training mode


class Only(nn.Module):
    """Applies an activation in one mode alone."""

    def __init__(self, behind, *, training, seed=1):
        super().__init__()
        self.body, self.behind, self.when = net(seed=seed), behind, training

    def forward(self, x):
        out = self.body(x)
        return self.behind(out) if self.training == self.when else out


def test_a_softmax_in_training_mode_alone_is_refused():
    refuses = pytest.raises(
        UsageError, match=r"The student, in training mode, puts out probabilities.* return logits in"
    )
    student = Only(nn.Softmax(-1), training=True)
    with refuses:
        fit(student, whole(), training=SHORT)
    with refuses:
        distill(student, net(), whole(), **QUIET)
    with refuses:
        distill_mutually([student, net()], whole(), training=SHORT)
    distiller = Distiller(student, net(), Objective.kd(), samples())
    distiller.eval()(samples())
    with refuses:
        distiller.train()(samples())


def test_what_a_student_puts_out_in_training_mode_is_trusted_where_it_is_said_to_be_logits():
    objective = Objective(student_outputs="logits")
    assert fit(Only(nn.Softmax(-1), training=True), whole(), objective=objective, training=SHORT).history
    dropped = nn.Sequential(net(), nn.Dropout(0.9))
    assert fit(dropped, whole(), training=SHORT).history


# ------------------------------------------------------------------------------------------------ logarithms


@pytest.mark.parametrize("classes", [1, K])
def test_logarithms_of_a_sigmoid_are_no_logits_of_yes_or_no(classes):
    data = whole(YES[:, :classes].astype(np.float64))
    for model in (
        net(nn.LogSigmoid(), classes=classes),
        net(nn.LogSigmoid(), nn.Unflatten(1, (classes, 1)), nn.Flatten(), classes=classes),
    ):
        with pytest.raises(UsageError, match=r"The student, a Sequential, puts out logarithms of a sigmoid, at most 0"):
            fit(model, data, objective=Objective(label_loss="binary"), training=SHORT)
    with pytest.raises(UsageError, match="The teacher, a Sequential, puts out logarithms of a sigmoid"):
        distill(net(classes=classes), net(nn.LogSigmoid(), classes=classes), data, objective=BINARY, **QUIET)


LOGITS = {
    "a difference, which is a logit": lambda z: nn.functional.logsigmoid(z - 9) - nn.functional.logsigmoid(9 - z),
    "negative by themselves": lambda z: z - 50,
    "capped": lambda z: 30 * ((z - 50) / 30).tanh(),
    "distances": lambda z: -(z**2),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_that_are_all_negative_are_trained(name):
    model = net(of_logits(LOGITS[name]))
    assert fit(model, whole(YES.astype(np.float64)), objective=Objective(label_loss="binary"), training=SHORT).history


def test_logarithms_of_a_sigmoid_are_logits_of_classes():
    assert fit(net(nn.LogSigmoid()), whole(), training=SHORT).history
