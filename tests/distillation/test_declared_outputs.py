"""Probabilities are converted to logits if the objective declares them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from distillation.examples import samples
from distillation.probabilities import (
    BINARY,
    PLAIN,
    QUIET,
    SHORT,
    SOFT,
    YES,
    N,
    assert_close_weights,
    dataset,
    net,
)
from kirsch.distillation.chain import ensemble
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import to_logits
from kirsch.distillation.store import Dense, build_store, building
from kirsch.distillation.term import Term
from kirsch.errors import UsageError
from kirsch.frameworks.training import Training, TrainingHooks


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


def test_an_ensemble_refuses_outputs_of_a_sigmoid_that_are_not_declared():
    torch.manual_seed(0)
    inputs = 40 * torch.randn(64, 4)
    members = [nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).eval() for _ in range(2)]
    with pytest.raises(UsageError, match=r"Model 0 .* all are from 0 to 1, .* applies the sigmoid to them"):
        ensemble(members, activation="sigmoid")(inputs)
    mean = (members[0](inputs) + members[1](inputs)) / 2
    found = ensemble(members, activation="sigmoid", outputs="probabilities")(inputs)
    torch.testing.assert_close(found.sigmoid(), mean)


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
    with pytest.raises(UsageError, match=r"`student_outputs` .* is 'probs'\. Give 'logits', 'prob"):
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
