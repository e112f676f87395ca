"""Importances in `kirsch.plan`: calibration data, losses, and importances of the user."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.errors import DataError, UnknownNameError, UsageError
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.importance.calibration import batches_for, loss_of
from kirsch.pruning.importance.importance import importance_of

GOAL = kirsch.Goal(macs=0.7)
TOKENS = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graph(residual, graph_of):
    return graph_of(residual)


def plan(graph, **options):
    return kirsch.plan(graph, GOAL, round_to=1, **options)


def removed(chosen):
    return {removal.name: removal.removed for removal in chosen.groups}


def test_calibration_data_may_be_a_loader_array_data_a_list_or_one_batch(graph, residual, labels):
    samples = residual.inputs
    forms = [
        DataLoader(TensorDataset(samples, labels), batch_size=5),
        kirsch.ArrayData(samples, labels, batch_size=5),
        [(samples[:5], labels[:5]), (samples[5:], labels[5:])],
        (samples, labels),
        [samples, labels],
    ]
    plans = [removed(plan(graph, importance="taylor", data=data)) for data in forms]
    assert plans[0]
    assert all(other == plans[0] for other in plans)


def test_a_plan_removes_the_units_with_the_lowest_scores(graph, statistics_of, residual, labels):
    chosen = plan(graph, importance="fisher", data=[(residual.inputs, labels)])
    scores = {g.name: IMPORTANCES["fisher"](graph, g, statistics=statistics_of(graph)) for g in graph.groups}
    for removal in chosen.groups:
        lowest = np.argsort(scores[removal.name])[: len(removal.removed)]
        assert set(lowest) == set(removal.removed)
        assert removal.reason == "least fisher"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"importance": "taylor"}, r"`data` of kirsch\.plan is missing: the importance 'taylor' runs the model"),
        ({"importance": "wanda"}, r"Give calibration batches of inputs: a DataLoader"),
        ({"data": [np.ones((1, 3, 6, 6))]}, r"'magnitude' is computed from the weights alone"),
        ({"importance": "taylor", "data": iter([1])}, r"list_iterator"),
        (
            {"importance": "wanda", "data": [np.ones(1)], "loss": "binary"},
            r"`loss` has no effect with importance='wanda'",
        ),
        ({"importance": "lamp", "loss": "binary"}, r"`loss` has no effect with importance='lamp'"),
        ({"importance": "fpgm", "norm": 1}, r"`norm` has no effect with importance='fpgm'"),
    ],
)
def test_data_and_options_that_do_not_fit_the_importance_are_refused(graph, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        plan(graph, **options)


def test_missing_labels_name_the_batch(graph, residual, labels):
    with pytest.raises(DataError, match=r"Batch 2 of `data` has no labels.*'wanda'"):
        plan(graph, importance="taylor", data=[(residual.inputs, labels), residual.inputs])


def test_an_unknown_loss_lists_the_known_ones(graph, residual, labels):
    with pytest.raises(UnknownNameError, match=r"no loss 'nll'.*next-token"):
        plan(graph, importance="taylor", data=[(residual.inputs, labels)], loss="nll")


def test_a_function_is_accepted_as_loss(graph, residual, labels):
    data = [(residual.inputs, labels)]
    own = removed(plan(graph, importance="taylor", data=data, loss=lambda logits, y: F.cross_entropy(logits, y)))
    assert own == removed(plan(graph, importance="taylor", data=data))


def test_scores_of_the_user_choose_the_units(graph):
    function = plan(graph, importance=lambda _graph, group: np.arange(group.size))
    scores = plan(graph, importance={group.name: np.arange(group.size) for group in graph.groups})
    assert removed(function) == removed(scores)
    for removal in function.groups:
        assert removal.removed == tuple(range(len(removal.removed)))
    assert scores.method["importance"] == "given scores"
    assert kirsch.Plan.from_json(scores.to_json()) == scores


def test_missing_and_unusable_scores_of_the_user_are_named(graph):
    with pytest.raises(UsageError, match=r"`importance` has no scores for the group 'inner'.*exclude='inner'"):
        plan(graph, importance={"stem": np.ones(6)})
    with pytest.raises(
        UsageError, match=r"returns no usable scores for 'stem'\. Expected 6 finite numbers, found \S+ of shape \(2,\)"
    ):
        plan(graph, importance=lambda _graph, _group: np.ones(2))
    with pytest.raises(UsageError, match=r"has the argument 'batch'.*norm, seed, statistics"):
        plan(graph, importance=lambda _graph, group, batch: np.ones(group.size))


@pytest.mark.parametrize("given", [np.full(6, np.nan), np.ones(5), [None] * 6])
def test_unusable_scores_are_to_be_corrected_by_the_user_who_gave_them(graph, given):
    with pytest.raises(UsageError, match=r"'given scores' returns no usable scores.*Give one finite number for each"):
        plan(graph, importance={group.name: given for group in graph.groups})


def from_gates(_graph, group, *, statistics):
    return statistics.gates(group).mean_absolute


def test_a_function_of_the_user_gets_the_labels_that_the_loss_needs(graph, residual, labels):
    data = [(residual.inputs, labels)]
    assert removed(plan(graph, importance=from_gates, data=data)) == removed(
        plan(graph, importance="taylor", data=data)
    )
    with pytest.raises(DataError, match=r"Batch 1 of `data` has no labels\..*'given function from_gates' is computed"):
        plan(graph, importance=from_gates, data=[residual.inputs])


def test_a_function_of_the_user_gets_shifted_labels_for_next_tokens():
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7)).eval(), TOKENS
    graph = kirsch.trace(model, tokens[:1])
    options = {"loss": "next-token", "data": [(tokens, tokens)]}
    expected = removed(plan(graph, importance="taylor", **options))
    assert removed(plan(graph, importance=from_gates, **options)) == expected


@pytest.mark.parametrize("importance", ["taylor", "wanda"])
def test_a_shuffling_loader_does_not_change_the_random_state(graph, residual, labels, importance):
    loader = DataLoader(TensorDataset(residual.inputs, labels), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    plan(graph, importance=importance, data=loader)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("with_labels", [True, False])
def test_next_token_shifts_logits_and_labels_and_leaves_out_padding(with_labels):
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    batch = {"input_ids": tokens, "attention_mask": mask} | ({"labels": tokens} if with_labels else {})
    [found] = batches_for(importance_of("taylor"), nn.Identity(), [batch], "next-token")
    losses = [
        F.cross_entropy(logits[row, start:-1], tokens[row, start + 1 :], reduction="none")
        for row, start in enumerate((0, 2))
    ]
    loss = loss_of("next-token")(logits, torch.from_numpy(found.targets))
    torch.testing.assert_close(loss, torch.cat(losses).mean())


def test_tokens_as_labels_without_a_shift_are_refused():
    tokens = torch.randint(0, 7, (2, 5))
    batch = {"input_ids": tokens, "labels": tokens.where(torch.arange(5) > 1, -100)}
    taylor = importance_of("taylor")
    with pytest.raises(UsageError, match=r"The labels are the tokens of the inputs themselves.*loss=\"next-token\""):
        list(batches_for(taylor, nn.Identity(), [batch], "cross-entropy"))
    assert len(list(batches_for(taylor, nn.Identity(), [batch], "next-token"))) == 1


@pytest.mark.parametrize("importance", ["taylor", "wanda"])
def test_a_job_ranks_the_units_on_its_training_samples(tmp_path, residual, labels, importance):
    images, labels = residual.inputs.float().numpy(), labels.numpy()
    model, goal = residual.float(), kirsch.Goal(macs=0.7)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):  # a model that predicts one class is refused
        optimizer.zero_grad()
        F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
        optimizer.step()
    data = kirsch.DataSet("random", (images, labels), (images, labels), (images, labels), classes=("a", "b", "c"))
    options = {"importance": importance, "round_to": 1}
    kirsch.compress(model, data, goal, folder=tmp_path / "run", recover=None, progress=False, **options)
    graph = kirsch.trace(model, torch.from_numpy(images[:1]))
    expected = kirsch.plan(graph, goal, data=[(images, labels)], **options)
    stored = kirsch.Plan.read(tmp_path / "run" / "plan.json")
    assert removed(stored) == removed(expected)
    assert stored.method["importance"] == importance
