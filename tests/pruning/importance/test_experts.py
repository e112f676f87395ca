"""Importances from activations, for mixtures of experts: against sums over the tokens that each expert processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.data.batches import Batch
from kirsch.errors import UsageError
from kirsch.frameworks.trace import trace
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.importance.statistics import Statistics

EXPERTS, CHOSEN, WIDTH, HIDDEN = 4, 2, 8, 16
TOKENS = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """A mixture of experts whose experts have one hidden layer."""

    def __init__(self, run):
        super().__init__()
        self.router, self.run, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), run, EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.out, self.gates = nn.Linear(WIDTH, 3), None

    def route(self, x):
        values, ids = self.router(x).topk(CHOSEN)
        return values.softmax(-1).unsqueeze(-1), ids

    def forward(self, x):
        weights, ids = self.route(x)
        outputs = self.run(self, x.repeat_interleave(CHOSEN, 0), ids.reshape(-1))
        if self.gates is not None:
            outputs = outputs * self.gates[ids.reshape(-1), None]
        return self.out((outputs.reshape(*ids.shape, -1) * weights).sum(1))


def gathered(model, rows, ids):
    """Multiply each row with a copy of the weights of its expert."""
    hidden = torch.bmm(rows.unsqueeze(1), model.up[ids]).relu()
    return torch.bmm(hidden, model.down[ids]).squeeze(1)


def gathered_transposed(model, rows, ids):
    """Multiply a transposed copy of the weights with each row."""
    hidden = torch.bmm(model.up[ids].mT, rows.unsqueeze(2)).relu()
    return torch.bmm(model.down[ids].mT, hidden).squeeze(2)


def sorted_by_expert(model, rows, ids):
    """Sort the rows by expert, and use grouped matrix products."""
    _, order = ids.sort()
    counts = torch.histc(ids[order].float(), bins=model.experts, min=0, max=model.experts - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    hidden = F.grouped_mm(rows[order], model.up, offs=ends).relu()
    return F.grouped_mm(hidden, model.down, offs=ends)[order.argsort()]


def one_after_another(model, rows, ids):
    """Run each expert by itself on its rows."""
    result = torch.zeros_like(rows)
    for expert in ids.unique().tolist():
        result[ids == expert] = (rows[ids == expert] @ model.up[expert]).relu() @ model.down[expert]
    return result


RUNS = [gathered, gathered_transposed, sorted_by_expert]


def prepared(run):
    """Return a model, its graph, and the statistics of two batches of tokens."""
    torch.manual_seed(0)
    model = Mixture(run).eval()
    tokens = TOKENS
    if run is sorted_by_expert:
        model, tokens = model.bfloat16(), tokens.bfloat16()
    graph = trace(model, tokens[:6], softmax="kept")
    return model, graph, Statistics(graph, [Batch(tokens[:12]), Batch(tokens[12:])])


def activations(model):
    """Return inputs and hidden activations, shape (experts, rows, ...); 0 where a row belongs to another expert."""
    model = model.float()
    _, ids = model.route(TOKENS.to(next(model.parameters()).dtype))
    rows = TOKENS.repeat_interleave(CHOSEN, 0)
    own = F.one_hot(ids.reshape(-1), EXPERTS).T.unsqueeze(-1)
    hidden = (rows @ model.up).relu()
    return (rows * own).detach().numpy(), (hidden * own).detach().numpy()


def group_of(graph, size):
    """Return the group of a number of units; the sizes of the network differ."""
    return next(group for group in graph.groups if group.size == size)


def scores(name, size, graph, statistics):
    return IMPORTANCES[name](graph, group_of(graph, size), statistics=statistics)


def relative(values):
    return values / values.mean()


@pytest.mark.parametrize("run", RUNS)
def test_experts_are_ranked_by_what_their_weights_read(run):
    model, graph, statistics = prepared(run)
    found = {name: scores(name, EXPERTS, graph, statistics) for name in ("wanda", "activation", "apoz")}
    read = list(zip(activations(model), (model.up, model.down), strict=True))
    norms = [(np.sqrt((x**2).mean(1)) * w.detach().abs().sum(2).numpy()).sum(1) for x, w in read]
    means = [np.abs(x).mean((1, 2)) for x, _ in read]
    rtol = 0.02 if run is sorted_by_expert else 1e-5  # bfloat16
    np.testing.assert_allclose(found["wanda"], np.mean([relative(norm) for norm in norms], 0), rtol=rtol)
    np.testing.assert_allclose(found["activation"], np.mean([relative(mean) for mean in means], 0), rtol=rtol)
    np.testing.assert_allclose(found["apoz"], np.mean([(x != 0).mean((1, 2)) for x, _ in read], 0), rtol=rtol)


@pytest.mark.parametrize("run", RUNS)
def test_hidden_units_of_experts_are_ranked_over_all_experts(run):
    model, graph, statistics = prepared(run)
    found = scores("wanda", HIDDEN, graph, statistics)
    _, hidden = activations(model)
    products = np.sqrt((hidden**2).mean(1)) * model.down.detach().abs().sum(2).numpy()
    rtol = 0.02 if run is sorted_by_expert else 1e-5
    np.testing.assert_allclose(found, relative(products.sum(0)), rtol=rtol)


@pytest.mark.parametrize("run", [gathered, gathered_transposed])
def test_selected_weights_of_experts_are_read_like_other_weights(run):
    model = nn.Sequential(nn.Linear(3, WIDTH), Mixture(run)).eval()
    graph = trace(model, TOKENS[:6, :3], softmax="kept")
    before = next(group for group in graph.groups if ("0.weight", 0) in group.footprint)
    assert set(graph.input_axes(before)) == {("1.router.weight", 1), ("1.up", 1)}
    assert graph.input_axes(group_of(graph, HIDDEN)) == [("1.down", 1)]


@pytest.mark.parametrize("run", [gathered, gathered_transposed])
def test_taylor_and_fisher_are_derivatives_for_a_gate_of_the_output_of_each_expert(run):
    model, graph, _ = prepared(run)
    labels = torch.arange(len(TOKENS)) % 3
    statistics = Statistics(graph, [Batch(TOKENS, labels)], F.cross_entropy)
    model.gates = torch.ones(EXPERTS, requires_grad=True)
    derivatives = [
        torch.autograd.grad(F.cross_entropy(model(token), label), model.gates)[0]
        for token, label in zip(TOKENS.split(1), labels.split(1), strict=True)
    ]
    model.gates = None
    derivatives = torch.stack(derivatives).numpy()
    np.testing.assert_allclose(scores("taylor", EXPERTS, graph, statistics), np.abs(derivatives).mean(0), rtol=1e-4)
    np.testing.assert_allclose(scores("fisher", EXPERTS, graph, statistics), (derivatives**2).mean(0) / 2, rtol=1e-4)


@pytest.mark.parametrize("run", [gathered, gathered_transposed])
def test_the_contributions_to_the_outputs_of_the_experts(run):
    model, graph, statistics = prepared(run)
    _, hidden = activations(model)
    down = model.down.detach().numpy()
    outputs = np.einsum("erh,eho->ero", hidden, down)
    total = (outputs**2).sum()
    _, products = statistics.contribution_products(group_of(graph, EXPERTS))
    np.testing.assert_allclose(products, np.diag((outputs**2).sum((1, 2))) / total, rtol=1e-5)
    (products,) = statistics.contribution_products(group_of(graph, HIDDEN))
    without = np.einsum("erh,eho->ero", hidden[:, :, :2], down[:, :2])
    np.testing.assert_allclose(products[:2, :2].sum(), (without**2).sum() / total, rtol=1e-4)


def test_experts_that_run_one_after_another_have_the_same_statistics():
    model, graph, statistics = prepared(gathered)
    expected = scores("wanda", EXPERTS, graph, statistics)
    model.run = one_after_another
    found = scores("wanda", EXPERTS, graph, Statistics(graph, [Batch(TOKENS)]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class Padded(nn.Module):
    """A mixture of experts for padded sequences."""

    def __init__(self):
        super().__init__()
        self.mixture = Mixture(gathered)

    def forward(self, hidden, attention_mask):
        return (self.mixture(hidden.flatten(0, 1)).reshape(*hidden.shape[:2], -1) * attention_mask[..., None]).sum(1)


def test_padding_before_experts_is_refused():
    torch.manual_seed(0)
    model, hidden, mask = Padded().eval(), TOKENS.reshape(2, 10, WIDTH), torch.ones(2, 10)
    graph = trace(model, {"hidden": hidden, "attention_mask": mask}, softmax="kept")
    scores("wanda", EXPERTS, graph, Statistics(graph, [Batch({"hidden": hidden, "attention_mask": mask})]))
    mask[0, 7:] = 0
    with pytest.raises(UsageError, match=r"Padding cannot be left out.*'mixture\.up' reads.*Give batches without"):
        scores("wanda", EXPERTS, graph, Statistics(graph, [Batch({"hidden": hidden, "attention_mask": mask})]))
