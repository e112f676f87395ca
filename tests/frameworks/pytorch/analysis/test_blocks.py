"""Residual blocks are found by what the forward computes, and leave a model that runs without them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kirsch
from kirsch.errors import ModelError, PlanError, VerificationError
from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.frameworks.pytorch.surgery import dropping
from kirsch.graph.plan import Goal, Plan, Skip
from kirsch.pruning.prune import prune_with_verification
from proving import shaken


class Conv(nn.Module):
    """An ordinary residual block; with another width, its shortcut is a layer of its own."""

    def __init__(self, width, out=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, out or width, 3, padding=1)
        self.short = nn.Conv2d(width, out, 1) if out else nn.Identity()

    def forward(self, x):
        return F.relu(self.short(x) + self.second(F.relu(self.norm(self.first(x)))))


class Tokens(nn.Module):
    """Two branches behind each other, the one by a module and the other written out; normalized before or after."""

    def __init__(self, number, *, post=False):
        super().__init__()
        self.number, self.post = number, post
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])

    def forward(self, x, mask=None, cache=None):
        if cache is not None:
            cache.append(self.number)
        first, second = self.norms
        if self.post:
            x = first(x + self.mix(x))
            return second(x + self.down(F.gelu(self.up(x)))), None
        mixed = self.mix(first(x))
        x = x + (mixed if mask is None else mixed * mask)
        return x + self.down(F.gelu(self.up(second(x)))), None


class Row(nn.Module):
    """Tokens in a row, held in a list."""

    def __init__(self, depth, *, post=False, last=False):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Tokens(number, post=post) for number in range(depth))
        self.last = last

    def forward(self, x):
        seen, x = [], self.into(x)
        mask = torch.ones(x.shape[1], 1)
        for number in range(len(self.layers)) if not self.last else (0, 1, 2, 3):
            x, _ = self.layers[number](x, mask=mask, cache=seen)
        self.seen = tuple(seen)
        return self.out(x)


def convolutional():
    return shaken(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), Conv(8), Conv(8, 12), Conv(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, 4),
        )
    )  # fmt: skip


IMAGES, WORDS = torch.randn(2, 3, 9, 9), torch.randn(2, 5, 4)


class Weights(nn.Module):
    """A block whose parameters are read elsewhere too."""

    def __init__(self):
        super().__init__()
        self.block, self.out = Tokens(0), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.block(x)[0]) + (x @ self.block.mix.weight)[..., :2]


class Twice(nn.Module):
    """One block, run twice."""

    def __init__(self):
        super().__init__()
        self.block, self.out = Tokens(0), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.block(self.block(x)[0])[0])


class Hidden(nn.Module):
    """What its block puts out is read, and a part of its inside as well."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)
        self.inner = Inner(self.first, self.second)

    def forward(self, x):
        y, inside = self.inner(x)
        return self.out(y) + inside.mean()


class Inner(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        inside = self.first(x)
        return x + self.second(inside), inside


class Branch(nn.Module):
    """The addition lies outside of the module, or the module only adds what was computed elsewhere."""

    def __init__(self):
        super().__init__()
        self.branch, self.other, self.add, self.out = nn.Linear(8, 8), nn.Linear(8, 8), Adds(), nn.Linear(8, 2)

    def forward(self, x):
        x = x + self.branch(x)
        return self.out(self.add(x, self.other(x)))


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, branch):
        return x + self.scale * branch


FOUND = {
    "convolutions, but not where the shortcut is a layer": (convolutional, IMAGES, ("2", "4")),
    "layers in a list, with both of their branches": (lambda: Row(3), WORDS, ("layers.0", "layers.1", "layers.2")),
    "layers that normalize after": (lambda: Row(2, post=True), WORDS, ("layers.0", "layers.1")),
    "none whose parameters are read elsewhere": (Weights, torch.randn(2, 8), ()),
    "none that runs twice": (Twice, torch.randn(2, 8), ()),
    "none whose inside is read": (Hidden, torch.randn(2, 8), ()),
    "none whose branch lies elsewhere": (Branch, torch.randn(2, 8), ()),
}


@pytest.mark.parametrize("case", FOUND)
def test_blocks_are_found(case):
    build, inputs, found = FOUND[case]
    assert kirsch.trace(build().eval(), inputs).blocks == found


def without(model, inputs, *names):
    graph = kirsch.trace(model, inputs)
    after = graph.prices.price(graph.keep({}), names)
    skips = tuple(Skip(name, "by hand") for name in names)
    return Plan(graph.fingerprint, graph.model_name, (), graph.cost, after, blocks=skips, inputs=graph.inputs)


def test_a_block_in_a_list_leaves_it_and_the_rest_is_numbered_anew():
    model = shaken(Row(4))
    plan = without(model, WORDS, "layers.1", "layers.2")
    found = prune_with_verification(model, plan)
    assert found.verification.power > 0.01
    assert count(found.model, WORDS) == (plan.after.parameters, plan.after.macs)
    assert [layer.number for layer in found.model.layers] == [0, 1]
    assert torch.equal(found.model.layers[1].mix.weight, model.layers[3].mix.weight)
    by_hand = model.into(WORDS)
    for number in (0, 3):
        by_hand = model.layers[number](by_hand)[0]
    torch.testing.assert_close(found.model(WORDS), model.out(by_hand))
    assert len(model.layers) == 4


def test_a_block_in_a_sequence_leaves_it():
    model = convolutional()
    found = prune_with_verification(model, without(model, IMAGES, "2"))
    assert found.verification.passed
    assert len(found.model) == len(model) - 1


class Stages(nn.Module):
    """Blocks that are called by their names, one after the other."""

    def __init__(self):
        super().__init__()
        self.into, self.one, self.two, self.out = nn.Conv2d(3, 8, 3), Conv(8), Conv(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(self.two(self.one(F.relu(self.into(x)))))


def test_the_names_of_a_sequence_stay():
    names = ["into", "one", "two", "out"]
    model = shaken(nn.Sequential(OrderedDict(zip(names, Stages().children(), strict=True))))
    found = prune_with_verification(model, without(model, IMAGES, "one"))
    assert [name for name, _ in found.model.named_children()] == ["into", "two", "out"]
    assert found.verification.passed


def test_a_block_with_a_name_becomes_an_identity():
    model = shaken(Stages())
    found = prune_with_verification(model, without(model, IMAGES, "one"))
    assert type(found.model.one) is nn.Identity
    assert found.verification.passed


class Named(nn.Module):
    """Many blocks that are called by their names."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        for number in range(12):
            self.add_module(f"block{number}", Conv(8))

    def forward(self, x):
        x = F.relu(self.into(x))
        for number in range(12):
            x = getattr(self, f"block{number}")(x)
        return self.out(x)


def test_many_blocks_become_identities():
    model = shaken(Named())
    plan = without(model, IMAGES, *(f"block{number}" for number in range(0, 12, 2)))
    found = prune_with_verification(model, plan)
    assert found.verification.passed
    assert count(found.model, IMAGES) == (plan.after.parameters, plan.after.macs)


class Numbered(Stages):
    """Blocks that are called by their numbers in a list."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.one, self.two])
        del self.one, self.two

    def forward(self, x):
        return self.out(self.blocks[1](self.blocks[0](F.relu(self.into(x)))))


def test_a_block_that_is_called_by_its_number_becomes_an_identity():
    model = shaken(Numbered())
    found = prune_with_verification(model, without(model, IMAGES, "blocks.0"))
    assert type(found.model.blocks[0]) is nn.Identity
    assert found.verification.passed


def test_a_block_that_can_be_neither_is_refused_by_name():
    model = shaken(Row(4, last=True))
    with pytest.raises(ModelError, match=r"block 'layers\.1' of Row cannot be dropped"):
        kirsch.prune(model, without(model, WORDS, "layers.1"))


def test_widths_and_blocks_go_together():
    model = shaken(Row(3))
    graph = kirsch.trace(model, WORDS)
    widths = kirsch.plan(graph, Goal(params=0.6))
    both = Plan(
        graph.fingerprint, "Row", widths.groups, graph.cost,
        graph.prices.price(widths.keep(graph), ["layers.1"]),
        blocks=(Skip("layers.1", "by hand"),), inputs=graph.inputs,
    )  # fmt: skip
    found = prune_with_verification(model, both)
    assert found.verification.passed
    assert count(found.model, WORDS) == (both.after.parameters, both.after.macs)


def test_a_model_without_blocks_is_saved_and_loaded_bit_for_bit(tmp_path):
    model = shaken(Row(3))
    plan = without(model, WORDS, "layers.1")
    assert Plan.from_json(plan.to_json()) == plan
    pruned = kirsch.prune(model, plan)
    kirsch.save(pruned, tmp_path / "saved")
    assert torch.equal(kirsch.load(tmp_path / "saved", lambda: Row(3)).eval()(WORDS), pruned(WORDS))


def test_a_block_of_a_part_is_left_out_in_its_place():
    model = shaken(nn.Sequential(convolutional(), nn.Linear(4, 2)))
    graph = kirsch.trace(model, IMAGES, scope="0")
    plan = kirsch.plan_depth(graph, Goal(params=0.95), IMAGES)
    assert plan.blocks
    assert len(kirsch.prune(model, plan)[0]) == len(model[0]) - len(plan.blocks)


@pytest.mark.parametrize("other", ["layers.0", "layers.2"])
def test_another_block_than_the_one_of_the_plan_is_seen_by_the_proof(monkeypatch, other):
    model, drop = shaken(Row(3)), dropping.drop

    def wrong(pruned, gone, args, options):
        moved = drop(pruned, [dataclasses.replace(gone[0], path=other)], args, options)
        return {path.replace("layers.1", other): to for path, to in moved.items()}

    monkeypatch.setattr(dropping, "drop", wrong)
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        kirsch.prune(model, without(model, WORDS, "layers.1"))


def test_a_block_that_is_still_there_is_seen_by_the_proof(monkeypatch):
    model = shaken(Row(3))
    monkeypatch.setattr(dropping, "drop", lambda pruned, *_: {path: path for path, _ in pruned.named_modules()})
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        kirsch.prune(model, without(model, WORDS, "layers.1"))


def test_a_plan_that_names_no_block_is_refused():
    model = shaken(Row(2))
    plan = without(model, WORDS, "layers.1")
    text = plan.to_json().replace("layers.1", "layers.7")
    with pytest.raises(PlanError, match=r"leaves out 'layers\.7'.*no residual block there.*layers\.1"):
        kirsch.prune(model, Plan.from_json(text))
    twice = plan.to_json().replace('"blocks": [', '"blocks": [{"name": "layers.1", "reason": ""},')
    with pytest.raises(PlanError, match=r"blocks has 'layers\.1' twice"):
        kirsch.prune(model, Plan.from_json(twice))
