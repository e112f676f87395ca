"""The distillation loss is a function of arrays, and needs neither a model nor a framework."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from kirsch.data.batches import Batch
from kirsch.distillation.distillation_loss import DistillationLoss
from kirsch.distillation.losses.loss import get_loss
from kirsch.distillation.objective import Objective
from kirsch.distillation.step import balancing_factors
from kirsch.distillation.term import BoundTerm, Term
from kirsch.errors import DataError

N, K = 6, 4
RANDOM = np.random.default_rng(0)
STUDENT, TEACHER, SECOND = (RANDOM.standard_normal((N, K)) for _ in range(3))
LABELS = np.array([0, 1, 2, 3, 0, -100])
INPUTS = np.zeros((N, 1))


def bound(term, *, teacher=None, name=None, adapter_name="adapter0"):
    options, temperature = term.resolved()
    layers = {"student_layer": "logits", "teacher_layer": "logits", "teacher": teacher}
    loss = get_loss(term.loss)
    return BoundTerm(
        name or term.loss,
        adapter_name,
        loss,
        term.weight,
        options,
        temperature,
        **layers,
        adapter=None,
        shapes=("", ""),
    )


def outputs(logits):
    return SimpleNamespace(features={"logits": logits}, adapted={}, adapter_losses={})


def loss_of_batch(objective, terms, teachers, rows=slice(None), counts=None, labels=LABELS):
    loss = DistillationLoss(objective, terms)
    features = loss.features([{"logits": teacher[rows]} for teacher in teachers], 0.0)
    return loss(outputs(STUDENT[rows]), features, Batch(INPUTS[rows], labels[rows]), 0.0, counts)


def kl(teacher, temperature):
    p = softmax(teacher / temperature, -1)
    terms = p * (log_softmax(teacher / temperature, -1) - log_softmax(STUDENT / temperature, -1))
    return temperature**2 * terms.sum(-1).mean()


def test_the_total_is_the_weighted_sum_of_the_label_loss_and_the_terms():
    objective = Objective((Term("kd", 0.9, temperature=4.0),), label_weight=0.1)
    found = loss_of_batch(objective, [bound(objective.terms[0])], [TEACHER])
    known = LABELS >= 0
    cross_entropy = -log_softmax(STUDENT, -1)[known, LABELS[known]].sum() / N  # a sample without a label adds nothing
    assert found.terms == pytest.approx({"label": 0.1 * cross_entropy, "kd": 0.9 * kl(TEACHER, 4.0)}, rel=1e-12)
    assert found.total == pytest.approx(sum(found.terms.values()), rel=1e-14)


def test_the_losses_of_the_batches_of_an_optimizer_step_add_up_to_the_loss_of_one_large_batch():
    objective = Objective((Term("kd", 0.5, temperature=2.0), Term("wsld", 1.0, temperature=2.0)), label_weight=0.5)
    terms = [bound(objective.terms[0]), bound(objective.terms[1], adapter_name="adapter1")]
    loss = DistillationLoss(objective, terms)
    counts = loss.counts([Batch(INPUTS[:2], LABELS[:2]), Batch(INPUTS[2:], LABELS[2:])])
    assert counts == loss.counts([Batch(INPUTS, LABELS)]) == {"samples": N, "labels": N, "labeled": N - 1}
    parts = [loss_of_batch(objective, terms, [TEACHER], rows, counts) for rows in (slice(0, 2), slice(2, N))]
    one_batch = loss_of_batch(objective, terms, [TEACHER])
    assert sum(part.total for part in parts) == pytest.approx(one_batch.total, rel=1e-12)


def test_a_term_uses_all_teachers_combined_or_the_teacher_given_by_its_option_teacher():
    objective = Objective((Term("kd", 1.0, temperature=2.0),), label_weight=0.0)
    mixture = 2.0 * np.log((softmax(TEACHER / 2, -1) + softmax(SECOND / 2, -1)) / 2)
    both = loss_of_batch(objective, [bound(objective.terms[0])], [TEACHER, SECOND])
    assert both.total == pytest.approx(kl(mixture, 2.0), rel=1e-12)
    one = loss_of_batch(objective, [bound(objective.terms[0], teacher=1)], [TEACHER, SECOND])
    assert one.total == pytest.approx(kl(SECOND, 2.0), rel=1e-12)


def test_an_optimizer_step_without_a_label_raises_an_error():
    objective = Objective((Term("kd", 1.0, temperature=2.0),), label_weight=1.0, causal=True)
    sequences = Batch(INPUTS, np.full((N, 3), -100))
    loss = DistillationLoss(objective, [bound(objective.terms[0])])
    logits = RANDOM.standard_normal((N, 3, K))
    with pytest.raises(DataError, match="All targets of a batch are masked"):
        loss(outputs(logits), loss.features([{"logits": logits}], 0.0), sequences, 0.0)


def test_balanced_factors_make_gradient_norms_proportional_to_the_weights():
    norms, weights = {"label": 2.0, "kd": 30.0, "at": 0.5}, {"label": 1.0, "kd": 3.0, "at": 10.0}
    factors = balancing_factors(norms, weights, ["kd", "at"])
    scaled = {name: norms[name] * factors.get(name, 1.0) / weights[name] for name in norms}
    assert scaled == pytest.approx(dict.fromkeys(norms, 2.0))
    assert balancing_factors({"kd": 3.0, "at": 0.0}, weights, ["kd", "at"]) == {}
