"""Kinds of units, `round_to` by kind, and uniform plans."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kirsch
from kirsch.errors import UnknownNameError, UsageError
from kirsch.graph.kinds import BLOCK, KINDS

GLOSSARY = Path(__file__).parents[2] / "docs" / "glossary.md"
WORDS = torch.randint(0, 20, (2, 6))


class Block(nn.Module):
    """Grouped-query attention, and a gated feed-forward network."""

    def __init__(self, width=32, heads=8, shared=2, each=8, hidden=64):
        super().__init__()
        self.q, self.o = nn.Linear(width, heads * each), nn.Linear(heads * each, width)
        self.k, self.v = (nn.Linear(width, heads // shared * each) for _ in range(2))
        self.up, self.gate, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.each, self.shared, self.scale = each, shared, each**-0.5

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.each)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x) * torch.sigmoid(self.gate(x)))


class Model(nn.Module):
    """Embedding, two blocks, a recurrent layer, a grouped convolution with group normalization, logits."""

    def __init__(self):
        super().__init__()
        self.words, self.blocks = nn.Embedding(20, 32), nn.Sequential(Block(), Block())
        self.back = nn.GRU(32, 16, batch_first=True)
        self.mix, self.norm, self.out = nn.Conv1d(16, 24, 1), nn.GroupNorm(4, 24), nn.Conv1d(24, 24, 1, groups=4)
        self.last = nn.Conv1d(24, 5, 1)

    def forward(self, words):
        x = self.back(self.blocks(self.words(words)))[0].transpose(1, 2)
        return self.last(self.out(self.norm(self.mix(x)).relu())).mean(-1)


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return kirsch.trace(Model().eval(), WORDS)


def changed_kinds(plan):
    return Counter(removal.kind for removal in plan.groups)


def test_the_groups_have_their_kinds_and_sizes(graph):
    assert Counter((group.kind, group.size) for group in graph.groups) == {
        ("embedding dim", 32): 1,
        ("kv group", 4): 2,
        ("head dim", 8): 2,
        ("ffn unit", 64): 2,
        ("recurrent unit", 16): 1,
        ("norm group", 4): 1,
        ("position in norm group", 6): 1,
        ("position in conv group", 6): 1,
    }


def test_only_the_named_kinds_are_removed(graph):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.7), kinds=["kv group", "ffn unit"], round_to=1)
    assert set(changed_kinds(plan)) == {"kv group", "ffn unit"}


def test_a_kind_with_weight_zero_is_kept(graph):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5), kinds={"head dim": 0, "embedding dim": 0})
    assert {"head dim", "embedding dim"}.isdisjoint(changed_kinds(plan))
    assert changed_kinds(plan)["ffn unit"] == 2


def test_a_kind_with_a_larger_weight_loses_more_units(graph):
    def removed(weight):
        plan = kirsch.plan(graph, kirsch.Goal(macs=0.6), kinds={"ffn unit": weight}, round_to=1)
        return sum(len(removal.removed) for removal in plan.groups if removal.kind == "ffn unit")

    assert removed(0.1) < removed(1.0) < removed(10.0)


def test_round_to_can_be_set_by_kind(graph):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.4), round_to={"ffn unit": 10, "head dim": 2})
    left = {(removal.kind, removal.size - len(removal.removed)) for removal in plan.groups}
    assert any(kind == "ffn unit" for kind, _ in left)
    assert all(number % 10 == 0 for kind, number in left if kind == "ffn unit")
    assert all(number % 2 == 0 for kind, number in left if kind == "head dim")


def test_heads_are_not_rounded_by_default(graph):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.9), kinds=["kv group"])
    assert [len(removal.removed) for removal in plan.groups] == [1, 1]


def test_uniform_plans_keep_equal_widths_in_all_layers(graph):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.45), uniform=True, round_to=1)
    removed = {}
    for removal in plan.groups:
        removed.setdefault((removal.kind, removal.size), []).append(len(removal.removed))
    assert len(removed["ffn unit", 64]) == 2
    assert all(len(set(numbers)) == 1 for numbers in removed.values())
    model = kirsch.prune(model_of_graph(), plan)
    assert model.blocks[0].up.weight.shape == model.blocks[1].up.weight.shape


def model_of_graph():
    torch.manual_seed(0)
    return Model().eval()


def test_the_error_for_an_unknown_kind_names_the_nearest_kind(graph):
    with pytest.raises(
        UnknownNameError, match=r"`kinds` names the kind of unit 'heads', which does not exist.*Did you mean 'head'"
    ):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), kinds=["heads"])
    with pytest.raises(
        UnknownNameError,
        match=r"`round_to` names the kind of unit 'channels', which does not exist.*Did you mean 'channel'",
    ):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), round_to={"channels": 8})


@pytest.mark.parametrize("option", ["kinds", "round_to"])
def test_the_error_for_an_unknown_kind_lists_all_kinds(graph, option):
    options = {"kinds": ["wire"], "round_to": {"wire": 8}}
    with pytest.raises(UnknownNameError) as caught:
        kirsch.plan(graph, kirsch.Goal(macs=0.5), **{option: options[option]})
    expected = {*KINDS, BLOCK} if option == "kinds" else set(KINDS)
    assert set(caught.value.why.removeprefix("Known: ").removesuffix(".").split(", ")) == expected


@pytest.mark.parametrize(("words", "kind"), [("attention head", "head"), ("residual block", "block")])
def test_the_error_for_another_name_of_a_kind_suggests_the_kind(graph, words, kind):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{kind}'"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), kinds=words)


def test_the_glossary_lists_all_kinds_with_their_definitions():
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    found = dict(rows)
    assert "replaced by the identity" in found.pop(BLOCK)
    assert {kind: text[0].lower() + text[1:].rstrip(".") for kind, text in found.items()} == KINDS


@pytest.mark.parametrize("number", [-1, float("nan"), float("inf")])
def test_a_weight_of_a_kind_that_is_out_of_range_is_refused(graph, number):
    with pytest.raises(UsageError, match=r"kinds.*head'.*expected a (number of at least 0|finite number)"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), kinds={"head": number})
