"""Derivatives of the loss for gates of units, which "taylor" and "fisher" use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.data.batches import Batch
from kirsch.frameworks.trace import trace
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.importance.statistics import Statistics

GATES = {
    "residual": {"stem": ("stem", 6), "inner": ("inner", 5)},
    "attention": {"query": ("query", 4), "value": ("value", 4), "gate": ("hidden", 5)},
}
"""Group name → gates of the network and their number."""


def derivatives(model, labels, gate, units):
    """Return the derivative of the loss of each sample for each gate, by automatic differentiation."""
    found = []
    for inputs, label in zip(model.inputs.split(1), labels.split(1), strict=True):
        gates = torch.ones(units, dtype=torch.float64, requires_grad=True)
        model.gates = {gate: gates}
        found.append(torch.autograd.grad(F.cross_entropy(model(inputs), label), gates)[0].numpy())
    model.gates = {}
    return np.array(found)


@pytest.mark.parametrize(
    ("network", "group", "gate"), [(n, g, gate) for n, groups in GATES.items() for g, gate in groups.items()]
)
def test_the_derivatives_equal_those_of_explicit_gates(request, graph_of, statistics_of, labels, network, group, gate):
    model = request.getfixturevalue(network)
    graph = graph_of(model)
    name, units = gate
    expected = derivatives(model, labels, name, units)
    found = next(found for found in graph.groups if found.name == group)
    gates = statistics_of(graph).gates(found)
    np.testing.assert_allclose(gates.mean_absolute, np.abs(expected).mean(0), rtol=1e-9)
    np.testing.assert_allclose(gates.mean_square, (expected**2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        IMPORTANCES["taylor"](graph, found, statistics=statistics_of(graph)), gates.mean_absolute
    )
    np.testing.assert_allclose(
        IMPORTANCES["fisher"](graph, found, statistics=statistics_of(graph)), gates.mean_square / 2
    )


def test_scores_do_not_depend_on_the_batches(residual, graph_of, statistics_of):
    graph = graph_of(residual)
    for name in ("taylor", "fisher", "taylor_weights", "snip", "grasp", "activation", "apoz", "wanda", "flap"):
        for group in graph.groups:
            whole, parts = (IMPORTANCES[name](graph, group, statistics=statistics_of(graph, n)) for n in (12, 5))
            np.testing.assert_allclose(whole, parts, rtol=1e-9, atol=1e-12, err_msg=name)


def test_frozen_parameters_have_the_same_scores_and_stay_frozen(residual, graph_of, statistics_of):
    graph = graph_of(residual)
    before = [IMPORTANCES["taylor"](graph, group, statistics=statistics_of(graph)) for group in graph.groups]
    residual.requires_grad_(requires_grad=False)
    after = [IMPORTANCES["taylor"](graph, group, statistics=statistics_of(graph)) for group in graph.groups]
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in residual.parameters())


class FusedAttention(nn.Module):
    """Two heads whose queries, keys and values are outputs of one layer; the gate multiplies queries and values."""

    inputs = torch.randn(12, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __init__(self, norm):
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, 3)
        self.query_norm, self.key_norm = norm(4), norm(4)
        for parameter in [*self.query_norm.parameters(), *self.key_norm.parameters()]:
            nn.init.uniform_(parameter, 0.5, 1.5)
        self.gates = {}

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        gate = self.gates.get("head dim", 1)
        heads = F.scaled_dot_product_attention(self.query_norm(q) * gate, self.key_norm(k), v * gate)
        return self.head((x + self.out(heads.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm, nn.RMSNorm])
def test_queries_keys_and_values_of_one_layer_have_the_derivatives_of_explicit_gates(statistics_of, labels, norm):
    torch.manual_seed(0)
    model = FusedAttention(norm).double().eval()
    graph = trace(model, model.inputs[:1])
    [group] = graph.groups
    expected = derivatives(model, labels, "head dim", 4)
    np.testing.assert_allclose(statistics_of(graph).gates(group).mean_absolute, np.abs(expected).mean(0), rtol=1e-9)


class GroupedHeads(nn.Module):
    """Attention with four query heads and two key and value heads; the gate multiplies the outputs of the heads."""

    inputs = torch.randn(12, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __init__(self):
        super().__init__()
        self.heads, self.shared, self.gates = 4, 2, {}
        self.query, self.key, self.value = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out, self.head = nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(-1, (self.shared, -1)).transpose(1, 2).repeat_interleave(self.heads // self.shared, 1)
            for layer in (self.key, self.value)
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        if self.gates:
            heads = heads * self.gates["kv group"].repeat_interleave(2)[:, None, None]
        return self.head((x + self.out(heads.transpose(1, 2).flatten(2))).mean(1))


def test_heads_that_share_keys_and_values_have_the_derivatives_of_explicit_gates(statistics_of, labels):
    torch.manual_seed(0)
    model = GroupedHeads().double().eval()
    graph = trace(model, model.inputs[:1])
    group = next(group for group in graph.groups if group.kind == "kv group")
    expected = np.abs(derivatives(model, labels, "kv group", 2)).mean(0)
    np.testing.assert_allclose(statistics_of(graph).gates(group).mean_absolute, expected, rtol=1e-9)


class TiedEmbeddings(nn.Module):
    """A language model whose embedding table is also its last layer; the gate multiplies what the layers read."""

    inputs = torch.randint(0, 9, (12, 4), generator=torch.Generator().manual_seed(0))

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.gates = {}

    def forward(self, tokens):
        gate = self.gates.get("stream", 1)
        x = self.embedding(tokens)
        x = x + self.down(F.gelu(self.up(x * gate)))
        return self.head(x * gate).mean(1)


def test_the_lookup_of_tied_embeddings_does_not_count_for_the_gates(statistics_of, labels):
    torch.manual_seed(0)
    model = TiedEmbeddings().double().eval()
    graph = trace(model, model.inputs[:1])
    group = next(found for found in graph.groups if found.kind == "embedding dim")
    expected = derivatives(model, labels, "stream", 6)
    np.testing.assert_allclose(statistics_of(graph).gates(group).mean_absolute, np.abs(expected).mean(0), rtol=1e-9)


class Recurrent(nn.Module):
    """An LSTM whose hidden state is gated where the linear layer reads it."""

    inputs = torch.randn(12, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_the_gate_of_a_recurrent_unit_multiplies_it_in_the_next_layer_and_in_the_recurrence(statistics_of, labels):
    torch.manual_seed(0)
    model = Recurrent().double().eval()
    graph = trace(model, model.inputs[:1])
    [group] = graph.groups
    expected = []
    for inputs, label in zip(model.inputs.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(model(inputs), label)
        read = [model.lstm.weight_hh_l0, model.head.weight]
        gradients = torch.autograd.grad(loss, read)
        expected.append(sum((w * g).sum(0).detach() for w, g in zip(read, gradients, strict=True)).numpy())
    gates = statistics_of(graph).gates(group)
    np.testing.assert_allclose(gates.mean_absolute, np.abs(expected).mean(0), rtol=1e-9)


def test_small_gradients_of_float16_models_do_not_round_to_zero(residual, labels):
    def loss(logits, targets):
        return F.cross_entropy(logits.float(), targets) * 1e-6

    def scores(model, dtype):
        graph = trace(model.to(dtype), model.inputs[:1].to(dtype))
        statistics = Statistics(graph, [Batch(model.inputs.to(dtype), labels)], loss)
        return np.concatenate([IMPORTANCES["taylor"](graph, group, statistics=statistics) for group in graph.groups])

    expected = scores(residual, torch.float32)
    np.testing.assert_allclose(scores(residual, torch.float16), expected, rtol=0.2, atol=0.02 * expected.max())
