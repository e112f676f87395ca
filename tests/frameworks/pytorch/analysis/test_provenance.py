"""Traced integers know the attributes (leaves) from which they were computed, and record where this origin is lost."""

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

from kirsch.frameworks.pytorch.analysis.integers import MAX_DEPTH, TracedInt
from kirsch.frameworks.pytorch.analysis.provenance import (
    CallRecorder,
    RecordedCalls,
    SizeOf,
    record_calls,
    set_integer,
    traceable_copy,
)
from kirsch.graph.expression import Leaf

A, B = Leaf("", "a"), Leaf("", "b")
OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]


def leaf(value, name=A):
    events = []
    return TracedInt.leaf(value, name, events), events


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


@settings(max_examples=200)
@given(expressions, st.integers(1, 30), st.integers(1, 30))
def test_an_expression_can_be_computed_with_other_values_of_its_leaves(tree, a, b):
    events = []
    try:
        traced = evaluated(tree, {A: TracedInt.leaf(12, A, events), B: TracedInt.leaf(5, B, events)})
        expected = evaluated(tree, {A: a, B: b})
    except ZeroDivisionError:
        return
    assert events == []
    assert traced == evaluated(tree, {A: 12, B: 5})
    if isinstance(traced, TracedInt):
        assert traced.compute({A: a, B: b}) == expected
        assert dict(traced.leaves).items() <= {A: 12, B: 5}.items()


LOSING = {
    "negative power": lambda n: n**-0.5,
    "dividend": lambda n: n / 3,
    "divisor": lambda n: 3 / n,
    "times a float": lambda n: n * 0.5,
    "square root": math.sqrt,
    "int": int,
    "float": float,
    "round": round,
    "negation": operator.neg,
    "divmod": lambda n: divmod(n, 3),
}


@pytest.mark.parametrize("name", LOSING)
def test_an_operation_that_loses_the_origin_is_recorded_with_its_line(name):
    number, events = leaf(12)
    assert LOSING[name](number) == LOSING[name](12)
    assert [event.number for event in events] == [number]
    assert events[0].source.startswith("test_provenance.py:")


def test_a_product_with_a_tensor_does_not_lose_the_origin():
    number, events = leaf(3)
    assert torch.equal(torch.ones(2) * number, torch.full((2,), 3.0))
    assert events == []


def test_a_sum_over_a_long_loop_becomes_a_plain_number():
    number, events = leaf(2)
    total = sum(number for _ in range(2 * MAX_DEPTH))
    assert total == 4 * MAX_DEPTH
    assert events
    traced = sum(number for _ in range(MAX_DEPTH))
    assert traced.compute({A: 3}) == 3 * MAX_DEPTH


def test_a_pickled_integer_is_plain_and_a_deep_copy_stays_traced():
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


def test_the_traceable_copy_has_traced_integers_and_shares_the_tensors():
    model = Layered().train()
    copied = traceable_copy(model, share_buffers=True, training=False)
    record_calls(copied, RecordedCalls())
    assert copied.conv.weight is model.conv.weight
    assert (copied.training, model.training) == (False, True)
    assert copied.width.leaves == ((Leaf("", "width"), 8),)
    assert copied.conv.out_channels.leaves == ((SizeOf(-1, None, 0, "conv.weight"), 8),)
    assert copied.norm.num_channels.leaves == ((Leaf("norm", "num_channels"), 8),)
    assert [type(n) for n in copied.shape] == [int, int, TracedInt]
    assert copied.shape[2].leaves == ((Leaf("", "shape", 2), 8),)
    assert {type(n) for n in (copied.flag, copied.one, model.width, *copied.conv.stride)} == {bool, int}
    assert "forward" not in vars(model)


def test_set_integer_sets_an_attribute_or_an_item_of_a_tuple():
    model = Layered()
    set_integer(model, Leaf("conv", "out_channels"), 5)
    set_integer(model, Leaf("", "shape", 2), 5)
    assert model.conv.out_channels == 5
    assert model.shape == (1, -1, 5)


def test_a_size_records_its_tensor_and_a_recorded_view_as_has_the_sizes_of_its_argument():
    recorded = RecordedCalls()
    weight, x = torch.ones(4, 6), torch.ones(2, 6)
    with CallRecorder(recorded, {id(weight): "layer.weight"}):
        y = x.relu()
        sizes = (weight.shape[0], y.size(-1), x.shape[0], y.numel())
        left, right = y.split(3, 1)
        part = right.shape[1]
        left.flatten().view_as(right)
    assert sizes[0].leaves == ((SizeOf(-1, None, 0, "layer.weight"), 4),)
    assert sizes[1].leaves == ((SizeOf(0, None, 1), 6),)
    assert type(sizes[2]) is int  # an input has no labels
    assert sizes[3].compute({SizeOf(0, None, 1): 5}) == 10
    assert part.leaves == ((SizeOf(1, 1, 1), 3),)
    assert [call.name for call in recorded.log] == ["relu", "split", "flatten", "view_as"]
    assert [n.leaves[0][0] for n in recorded.log[3].integers()] == [SizeOf(1, 1, 0), SizeOf(1, 1, 1)]


def test_tensors_that_are_never_read_are_recorded():
    with CallRecorder(RecordedCalls(), {}) as recorder:
        x = torch.ones(2, 3)
        read, unread = x.relu(), x.tanh()
        last = read.flatten().view_as(unread)
    assert {id(t) for t in recorder.unread.values()} >= {id(unread), id(last)}
    assert id(read) not in recorder.unread


def test_the_calls_within_multi_head_attention_are_recorded_and_pytorch_is_restored():
    recorded = RecordedCalls()
    model = traceable_copy(nn.MultiheadAttention(8, 2, batch_first=True), share_buffers=False, training=True)
    record_calls(model, recorded)
    x = torch.randn(1, 5, 8)
    model(x, x, x)
    views = [call for call in recorded.log if call.name == "view"]
    assert any(type(size) is TracedInt for call in views for size in call.integers())
    assert "multi_head_attention_forward" not in [call.name for call in recorded.log]
    assert nn.functional.has_torch_function is torch.overrides.has_torch_function
