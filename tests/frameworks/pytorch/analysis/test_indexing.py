"""Operators that read or write elements at given indices, and scans and sorts along an axis.

The axis of the indices, of the scan or of the sort is frozen; the other axes can be pruned.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frameworks.pytorch.analysis.networks import Between
from trace_and_cut import assert_pruned_correctly

TOKENS = torch.randn(2, 5, 6)
ROWS = torch.tensor([3, 0, 2])
MASK = torch.tensor([True, False, True, True, False])


def written(x, *at, value):
    """Return a copy of x with a value written at an index."""
    x = x.clone()
    x[at] = value
    return x


def indices(*shape, below):
    return torch.arange(math.prod(shape)).reshape(shape) % below


CASES = {
    "index on one axis": (lambda _, x: x[:, ROWS], {}, [8]),
    "index on the first axis": (lambda _, x: x[torch.tensor([1, 0, 1])], {}, [8]),
    "index on two axes": (lambda _, x: x[torch.tensor([0, 1, 1]), ROWS], {}, [8]),
    "index on two axes that are not adjacent": (
        lambda s, x: x.unflatten(1, (5, 1)).expand(2, 5, 3, x.shape[-1])[torch.tensor([0, 1, 1]), :, ROWS % 3],
        {},
        [8],
    ),
    "matrix of indices on one axis": (lambda _, x: x[:, indices(2, 3, below=5)], {}, [8]),
    "index by a mask": (lambda _, x: x[:, MASK], {}, [8]),
    "index on the last axis": (lambda _, x: x[..., torch.arange(8)], {}, []),
    "index_select": (lambda _, x: x.index_select(1, ROWS), {}, [8]),
    "index_select, negative axis": (lambda _, x: x.index_select(-2, ROWS), {}, [8]),
    "index_select of channels": (lambda _, x: x.index_select(-1, torch.arange(8)), {}, []),
    "gather": (lambda _, x: x.gather(1, indices(2, 3, 1, below=5).expand(2, 3, x.shape[-1])), {}, [8]),
    "gather by an index of constant width": (lambda _, x: x.gather(1, indices(2, 3, 8, below=5)), {}, []),
    "gather, indices from the data": (lambda _, x: x.gather(1, x.argsort(1)), {}, [8]),
    "gather of part of an axis": (lambda _, x: F.pad(x.gather(1, x.argsort(1)[..., :5]), (0, 3)), {}, []),
    "gather of channels": (lambda _, x: x.gather(-1, indices(2, 5, 8, below=8)), {}, []),
    "take_along_dim": (lambda _, x: x.take_along_dim(x.argsort(1), 1), {}, [8]),
    "take_along_dim of all": (lambda _, x: x.take_along_dim(indices(80, below=7)).view(2, 5, 8), {}, []),
    "index_put of rows": (lambda _, x: written(x, torch.tensor([1]), value=0.5), {}, [8]),
    "index_put of rows with values": (lambda s, x: written(x, torch.tensor([1]), value=s.row), {"row": 8}, [8]),
    "index_put of single tokens": (
        lambda s, x: written(x, torch.tensor([0, 1]), ROWS[:2], value=s.row),
        {"row": 8},
        [8],
    ),
    "index_put by a mask": (lambda _, x: written(x, x > 0, value=1.0), {}, []),
    "slice written": (lambda s, x: written(x, slice(None), slice(1, 3), value=s.row), {"row": 8}, [8]),
    "slice of channels written": (lambda s, x: written(x, ..., slice(1, 3), value=2.0), {}, []),
    "one token written": (lambda s, x: written(x, slice(None), 2, value=s.row), {"row": 8}, [8]),
    "one channel written": (lambda s, x: written(x, ..., 2, value=0.5), {}, []),
    "scatter": (lambda _, x: x.scatter(1, x.argsort(1), x * 2), {}, [8]),
    "scatter of a number": (lambda _, x: x.scatter(1, x.argsort(1)[:, :2], 0.5), {}, [8]),
    "scatter of part of an axis": (lambda _, x: x.scatter(1, x.argsort(1)[..., :5], 0.5), {}, []),
    "scatter of channels": (lambda _, x: x.scatter(2, indices(2, 5, 8, below=8), x * 2), {}, []),
    "scatter_add": (lambda _, x: x.scatter_add(1, x.argsort(1), x * 2), {}, [8]),
    "scatter_reduce": (lambda _, x: x.scatter_reduce(1, x.argsort(1), x * 2, "amax"), {}, [8]),
    "index_add": (lambda s, x: x.index_add(1, ROWS, x[:, :3] * 2), {}, [8]),
    "index_copy": (lambda s, x: x.index_copy(1, ROWS, x[:, :3] * 2), {}, [8]),
    "index_fill": (lambda s, x: x.index_fill(1, ROWS, 0.5), {}, [8]),
    "index_add of channels": (lambda s, x: x.index_add(2, ROWS, x[..., :3] * 2), {}, []),
    "cumsum over tokens": (lambda _, x: x.cumsum(1), {}, [8]),
    "cumprod over tokens": (lambda _, x: x.cumprod(-2), {}, [8]),
    "cummax over tokens": (lambda _, x: x.cummax(1)[0], {}, [8]),
    "sort over tokens": (lambda _, x: x.sort(1)[0], {}, [8]),
    "sort over tokens, descending": (lambda _, x: x.sort(dim=1, descending=True)[0], {}, [8]),
    "topk of tokens": (lambda _, x: x.topk(3, 1)[0], {}, [8]),
    "kthvalue of tokens": (lambda _, x: x * x.kthvalue(2, 1, keepdim=True)[0], {}, [8]),
    "argmax over tokens": (lambda _, x: x * x.argmax(1, keepdim=True), {}, [8]),
    "argmax over tokens without keepdim": (lambda _, x: x * x.argmax(1)[:, None], {}, [8]),
    "argmax over all": (lambda _, x: x * x.argmax(), {}, []),
    "triangle of tokens": (lambda _, x: x.transpose(1, 2).unflatten(2, (5, 1)).tril().squeeze(-1).mT, {}, [8]),
    "triangle of two axes after the channels": (
        lambda _, x: x[..., None].expand(2, 5, x.shape[-1], 5).transpose(1, 2).triu(1).sum(-1).transpose(1, 2),
        {},
        [8],
    ),
}
"""Name → (function between two linear layers, called with the module and the output of the first layer; name and size
of each further parameter of the module; expected sizes of the groups)."""


@pytest.mark.parametrize("name", CASES)
def test_an_indexed_axis_is_frozen_and_the_others_are_pruned_correctly(name):
    between, widths, sizes = CASES[name]
    parameters = {key: nn.Parameter(torch.randn(width)) for key, width in widths.items()}
    model = Between(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), between, nn.Linear(8, 4), **parameters)
    assert_pruned_correctly(model, TOKENS, sizes=sizes)


class Words(nn.Module):
    """A table of token embeddings, read by the function `read`."""

    def __init__(self, table, read, *, width=8, tie=False):
        super().__init__()
        self.table, self.read, self.inner = table, read, nn.Linear(width, width)
        self.last = nn.Linear(width, 11, bias=False)
        if tie:
            self.last.weight = table.weight

    def forward(self, words):
        return self.last(torch.tanh(self.inner(self.read(self.table, words))))


WORDS = torch.randint(0, 11, (3, 5))
TABLES = {
    "embedding": (Words(nn.Embedding(11, 8), lambda table, words: table(words)), [8, 8]),
    "embedding with padding": (Words(nn.Embedding(11, 8, padding_idx=0), lambda table, words: table(words)), [8, 8]),
    "tied embedding": (Words(nn.Embedding(11, 8), lambda table, words: table(words), tie=True), [8]),
    "bag": (Words(nn.EmbeddingBag(11, 8), lambda table, words: table(words)), [8, 8]),
    "bag, sum, with offsets": (
        Words(nn.EmbeddingBag(11, 8, mode="sum"), lambda table, words: table(words.flatten(), torch.tensor([0, 4, 9]))),
        [8, 8],
    ),
    "bag with weights": (
        Words(
            nn.EmbeddingBag(11, 8, mode="sum"),
            lambda table, words: table(words, per_sample_weights=torch.arange(15.0).view(3, 5)),
        ),
        [8, 8],
    ),
    "table read by index": (Words(nn.Embedding(11, 8), lambda table, words: table.weight[words]), [8, 8]),
    "one-hot words": (
        Words(nn.Embedding(11, 8), lambda table, words: F.one_hot(words, 11).float() @ table.weight),
        [8, 8],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_an_embedding_keeps_its_tokens_and_loses_channels(name):
    model, sizes = TABLES[name]
    _, pruned = assert_pruned_correctly(model, WORDS, sizes=sizes)
    assert pruned.table.weight.shape == (11, 4)
    assert pruned.table.embedding_dim == 4
