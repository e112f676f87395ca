"""A training step reads no values of tensors, because each read waits for the accelerator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import Batch
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.objective import Objective
from kirsch.distillation.step import TargetCheck
from kirsch.distillation.term import Term
from kirsch.errors import DataError
from reads import RecordReads

N, L, D, K = 6, 5, 4, 3


def classifier(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, K))


def tagger(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(9, D), nn.Linear(D, K))


RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.standard_normal((N, D)).astype(np.float32)
LABELS = np.where(np.arange(N) % 2, np.arange(N) % K, -100)
TOKENS = RANDOM.integers(0, 9, (N, L))
TAGS = np.where(RANDOM.random((N, L)) < 0.5, -100, TOKENS % K)
CASES = {
    "classes": (classifier, INPUTS, LABELS, {}),
    "all labeled": (classifier, INPUTS, np.arange(N) % K, {}),
    "no label": (classifier, INPUTS, np.full(N, -100), {}),
    "tokens": (tagger, TOKENS, TAGS, {}),
    "next tokens": (tagger, TOKENS, TAGS, {"causal": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_given_counts_reads_no_values(case):
    build, inputs, targets, options = CASES[case]
    terms = Term("kd", 0.5, temperature=2.0), Term("dist", 0.5, temperature=2.0)
    objective = Objective(terms, label_weight=0.5, **options)
    output, lines = second_step(build, objective, inputs, targets)
    assert lines == []
    assert output.terms.keys() == {"kd", "dist"} | ({"label"} if (targets >= 0).any() else set())


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_a_term_that_needs_labels_reads_no_values(case):
    build, inputs, targets, options = CASES[case]
    objective = Objective((Term("dkd", 0.5),), label_weight=0.5, **options)
    _, lines = second_step(build, objective, inputs, targets)
    assert lines == []


def second_step(build, objective, inputs, targets):
    """Return the output of a step and the lines that read values. The first step checks that the outputs are logits."""
    with Distiller(build(0), build(1), objective, (inputs, np.maximum(targets, 0))) as distiller:
        counts = distiller.counts([(inputs, targets)])
        batch = Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
        distiller.step(distiller.module, batch, 0.0)
        distiller.step.check(Batch(inputs, targets))
        with RecordReads() as reads:
            output = distiller.step(distiller.module, batch, 0.0, batch_counts=counts)
    return output, reads.lines


@pytest.mark.parametrize("case", CASES)
def test_a_distiller_with_given_counts_reads_no_values(case):
    build, inputs, targets, options = CASES[case]
    objective = Objective((Term("dkd", 0.5),), label_weight=0.5, **options)
    labeled, batch = np.maximum(targets, 0), Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
    with Distiller(build(0), build(1), objective, (inputs, labeled)) as distiller:
        distiller((inputs, labeled))  # checks gradients and outputs
        counts = distiller.counts([(inputs, targets)])
        steps = {"labels": N, **{name: N * L for name in counts if name != "labels"}}
        with RecordReads() as reads:
            found = distiller(batch, step_counts=steps, batch_counts=counts)
        expected = distiller((inputs, targets), step_counts=steps)
    assert reads.lines == []
    assert found.total.item() == expected.total.item()


def test_the_counts_of_a_distiller_check_the_targets():
    distiller = Distiller(classifier(0), classifier(1), Objective.kd(), (INPUTS, LABELS))
    with distiller, pytest.raises(DataError, match=f"Sample 0 has the label {K}"):
        distiller.counts([(INPUTS, np.full(N, K))])


def test_counting_in_the_step_reads_values():
    """`RecordReads` detects the read, so the tests above can fail."""
    with Distiller(classifier(0), classifier(1), Objective.kd(), (INPUTS, LABELS)) as distiller:
        batch = Batch(torch.from_numpy(INPUTS), torch.from_numpy(LABELS))
        with RecordReads() as reads:
            distiller.step(distiller.module, batch, 0.0)
    assert any(line.startswith("distillation/masks.py") for line in reads.lines)


def test_a_step_checks_labels_that_were_not_checked_before():
    with Distiller(classifier(0), classifier(1), Objective.kd(), (INPUTS, LABELS)) as distiller:
        batch = Batch(torch.from_numpy(INPUTS), torch.full((N,), K))
        with pytest.raises(DataError, match=f"Sample 0 has the label {K}"):
            distiller.step(distiller.module, batch, 0.0)


def test_after_a_batch_with_targets_on_an_accelerator_not_all_targets_count_as_checked():
    targets = TargetCheck(Objective.kd(), (K,))
    assert not targets.all_checked
    targets(Batch(INPUTS, LABELS))
    assert targets.all_checked
    targets(Batch(INPUTS, SimpleNamespace(device=SimpleNamespace(type="cuda"))))
    targets(Batch(INPUTS, LABELS))
    assert not targets.all_checked
