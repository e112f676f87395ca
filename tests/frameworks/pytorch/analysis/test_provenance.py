"""Integers remember where they come from, and say so when that ends."""

from __future__ import annotations

import copy
import math
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kirsch.frameworks.pytorch.analysis.integers import DEEPEST, TracedInt
from kirsch.frameworks.pytorch.analysis.provenance import Calls, SizeOf, Watch, put, twin_of, watched
from kirsch.graph.expression import Leaf

A, B = Leaf("", "a"), Leaf("", "b")
OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]


def leaf(value, name=A):
    lost = []
    return TracedInt.leaf(value, name, lost), lost


expressions = st.recursive(
    st.sampled_from([A, B]) | st.integers(1, 5),
    lambda inner: st.tuples(st.sampled_from(OPERATORS), inner, inner),
    max_leaves=8,
)


def evaluated(tree, values):
    if isinstance(tree, tuple):
        function, left, right = tree
        return function(evaluated(left, values), evaluated(right, values))
    return values[tree] if isinstance(tree, Leaf) else tree


@settings(deadline=None, derandomize=True, max_examples=200)
@given(expressions, st.integers(1, 30), st.integers(1, 30))
def test_an_expression_is_computed_again_with_other_values(tree, a, b):
    lost = []
    try:
        today = evaluated(tree, {A: TracedInt.leaf(12, A, lost), B: TracedInt.leaf(5, B, lost)})
        expected = evaluated(tree, {A: a, B: b})
    except ZeroDivisionError:
        return
    assert lost == []
    assert today == evaluated(tree, {A: 12, B: 5})
    if isinstance(today, TracedInt):
        assert today.compute({A: a, B: b}) == expected
        assert dict(today.leaves).items() <= {A: 12, B: 5}.items()


LOSSES = {
    "root": lambda n: n**-0.5,
    "division": lambda n: n / 3,
    "division of": lambda n: 3 / n,
    "times a float": lambda n: n * 0.5,
    "square root": math.sqrt,
    "to a plain number": int,
    "to a float": float,
    "rounded": round,
    "negative": operator.neg,
    "both parts": lambda n: divmod(n, 3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_where_the_past_ends_is_noted_with_its_line(name):
    number, lost = leaf(12)
    assert LOSSES[name](number) == LOSSES[name](12)
    assert [entry.number for entry in lost] == [number]
    assert lost[0].source.startswith("test_provenance.py:")


def test_a_tensor_takes_the_number_as_a_call_and_nothing_is_lost():
    number, lost = leaf(3)
    assert torch.equal(torch.ones(2) * number, torch.full((2,), 3.0))
    assert lost == []


def test_a_sum_over_a_long_loop_ends_as_a_plain_number():
    number, lost = leaf(2)
    total = sum(number for _ in range(2 * DEEPEST))
    assert total == 4 * DEEPEST
    assert lost
    known = sum(number for _ in range(DEEPEST))
    assert known.compute({A: 3}) == 3 * DEEPEST


def test_copies_on_disk_are_plain_numbers():
    number, _ = leaf(12)
    assert type(pickle.loads(pickle.dumps(number))) is int
    assert copy.deepcopy([number])[0] is number


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
        self.width, self.flag, self.one, self.shape, self.names = 8, True, 1, (1, -1, 8), ["a"]

    def forward(self, x):
        return self.conv(x)


def test_a_twin_carries_integers_with_a_past_and_shares_the_tensors():
    model = Layered().train()
    twin = twin_of(model, shared=True, training=False)
    watched(twin, Calls())
    assert twin.conv.weight is model.conv.weight
    assert (twin.training, model.training) == (False, True)
    assert twin.width.leaves == ((Leaf("", "width"), 8),)
    assert twin.conv.out_channels.leaves == ((SizeOf(-1, None, 0, "conv.weight"), 8),)
    assert twin.norm.num_channels.leaves == ((Leaf("norm", "num_channels"), 8),)
    assert [type(n) for n in twin.shape] == [int, int, TracedInt]
    assert twin.shape[2].leaves == ((Leaf("", "shape", 2), 8),)
    assert {type(n) for n in (twin.flag, twin.one, model.width, *twin.conv.stride)} == {bool, int}
    assert "forward" not in vars(model)


def test_an_attribute_or_a_place_of_one_is_put():
    model = Layered()
    put(model, Leaf("conv", "out_channels"), 5)
    put(model, Leaf("", "shape", 2), 5)
    assert model.conv.out_channels == 5
    assert model.shape == (1, -1, 5)


def test_sizes_remember_their_tensor_and_shapes_of_another_are_given_as_sizes():
    calls = Calls()
    weight, x = torch.ones(4, 6), torch.ones(2, 6)
    with Watch(calls, {id(weight): "layer.weight"}):
        y = x.relu()
        sizes = (weight.shape[0], y.size(-1), x.shape[0], y.numel())
        left, right = y.split(3, 1)
        part = right.shape[1]
        left.flatten().view_as(right)
    assert sizes[0].leaves == ((SizeOf(-1, None, 0, "layer.weight"), 4),)
    assert sizes[1].leaves == ((SizeOf(0, None, 1), 6),)
    assert type(sizes[2]) is int  # an input: no parameter index sits on it
    assert sizes[3].compute({SizeOf(0, None, 1): 5}) == 10
    assert part.leaves == ((SizeOf(1, 1, 1), 3),)
    assert [call.name for call in calls.log] == ["relu", "split", "flatten", "view_as"]
    assert [n.leaves[0][0] for n in calls.log[3].integers()] == [SizeOf(1, 1, 0), SizeOf(1, 1, 1)]


def test_what_is_computed_and_never_read_is_kept_in_sight():
    with Watch(Calls(), {}) as watch:
        x = torch.ones(2, 3)
        read, unread = x.relu(), x.tanh()
        last = read.flatten().view_as(unread)
    assert {id(t) for t in watch.unread.values()} >= {id(unread), id(last)}
    assert id(read) not in watch.unread
