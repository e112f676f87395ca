"""Residual blocks are found in the computation of `forward`, and can be removed from the model."""

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
from trace_and_cut import with_noise


class ConvBlock(nn.Module):
    """A residual block; with another output width, its shortcut is a convolution."""

    def __init__(self, width, out=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, out or width, 3, padding=1)
        self.short = nn.Conv2d(width, out, 1) if out else nn.Identity()

    def forward(self, x):
        return F.relu(self.short(x) + self.second(F.relu(self.norm(self.first(x)))))


class TokenBlock(nn.Module):
    """Two residual branches in sequence, with normalization before or after each branch."""

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


class TokenNet(nn.Module):
    """Token blocks in a list. With `fixed`, `forward` calls four blocks by number."""

    def __init__(self, depth, *, post=False, fixed=False):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(TokenBlock(number, post=post) for number in range(depth))
        self.fixed = fixed

    def forward(self, x):
        numbers, x = [], self.into(x)
        mask = torch.ones(x.shape[1], 1)
        for number in range(len(self.layers)) if not self.fixed else (0, 1, 2, 3):
            x, _ = self.layers[number](x, mask=mask, cache=numbers)
        self.numbers = tuple(numbers)
        return self.out(x)


def convolutional():
    return with_noise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            ConvBlock(8),
            ConvBlock(8, 12),
            ConvBlock(12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 4),
        )
    )


IMAGES, WORDS = torch.randn(2, 3, 9, 9), torch.randn(2, 5, 4)


class SharedWeight(nn.Module):
    """A block whose weight is also used outside the block."""

    def __init__(self):
        super().__init__()
        self.block, self.out = TokenBlock(0), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.block(x)[0]) + (x @ self.block.mix.weight)[..., :2]


class CalledTwice(nn.Module):
    """One block that is called twice."""

    def __init__(self):
        super().__init__()
        self.block, self.out = TokenBlock(0), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.block(self.block(x)[0])[0])


class InnerFeatureUsed(nn.Module):
    """A block with an inner feature that is used outside the block."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)
        self.inner = TwoOutputs(self.first, self.second)

    def forward(self, x):
        y, inside = self.inner(x)
        return self.out(y) + inside.mean()


class TwoOutputs(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        inside = self.first(x)
        return x + self.second(inside), inside


class BranchOutside(nn.Module):
    """`branch` does not contain its addition, and `add` does not contain its branch: neither is a residual block."""

    def __init__(self):
        super().__init__()
        self.branch, self.other, self.add, self.out = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            ScaledAddition(),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        x = x + self.branch(x)
        return self.out(self.add(x, self.other(x)))


class ScaledAddition(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, branch):
        return x + self.scale * branch


FOUND = {
    "convolutions without a layer in the shortcut": (convolutional, IMAGES, ("2", "4")),
    "layers in a list, with two branches each": (lambda: TokenNet(3), WORDS, ("layers.0", "layers.1", "layers.2")),
    "layers that normalize after each branch": (lambda: TokenNet(2, post=True), WORDS, ("layers.0", "layers.1")),
    "no block whose weight is used outside": (SharedWeight, torch.randn(2, 8), ()),
    "no block that is called twice": (CalledTwice, torch.randn(2, 8), ()),
    "no block whose inner feature is used outside": (InnerFeatureUsed, torch.randn(2, 8), ()),
    "no block whose branch is outside": (BranchOutside, torch.randn(2, 8), ()),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_residual_blocks_are_found(case):
    build, inputs, blocks = FOUND[case]
    assert kirsch.trace(build().eval(), inputs).blocks == blocks


def plan_without(model, inputs, *names):
    """Return a plan that removes these blocks."""
    graph = kirsch.trace(model, inputs)
    after = graph.prices.price(graph.keep({}), names)
    skips = tuple(Skip(name, "by hand") for name in names)
    return Plan(graph.fingerprint, graph.model_name, (), graph.cost, after, blocks=skips, inputs=graph.inputs)


def test_a_block_in_a_list_is_deleted_and_the_remaining_blocks_are_renumbered():
    model = with_noise(TokenNet(4))
    plan = plan_without(model, WORDS, "layers.1", "layers.2")
    result = prune_with_verification(model, plan)
    assert result.verification.power > 0.01
    assert count(result.model, WORDS) == (plan.after.parameters, plan.after.macs)
    assert [layer.number for layer in result.model.layers] == [0, 1]
    assert torch.equal(result.model.layers[1].mix.weight, model.layers[3].mix.weight)
    by_hand = model.into(WORDS)
    for number in (0, 3):
        by_hand = model.layers[number](by_hand)[0]
    torch.testing.assert_close(result.model(WORDS), model.out(by_hand))
    assert len(model.layers) == 4


def test_a_block_in_a_sequential_is_deleted():
    model = convolutional()
    result = prune_with_verification(model, plan_without(model, IMAGES, "2"))
    assert result.verification.passed
    assert len(result.model) == len(model) - 1


class NamedBlocks(nn.Module):
    """Two blocks that `forward` calls by name."""

    def __init__(self):
        super().__init__()
        self.into, self.one, self.two, self.out = nn.Conv2d(3, 8, 3), ConvBlock(8), ConvBlock(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(self.two(self.one(F.relu(self.into(x)))))


def test_the_names_in_a_sequential_are_kept():
    names = ["into", "one", "two", "out"]
    model = with_noise(nn.Sequential(OrderedDict(zip(names, NamedBlocks().children(), strict=True))))
    result = prune_with_verification(model, plan_without(model, IMAGES, "one"))
    assert [name for name, _ in result.model.named_children()] == ["into", "two", "out"]
    assert result.verification.passed


def test_a_block_called_by_name_becomes_an_identity():
    model = with_noise(NamedBlocks())
    result = prune_with_verification(model, plan_without(model, IMAGES, "one"))
    assert type(result.model.one) is nn.Identity
    assert result.verification.passed


class ManyBlocks(nn.Module):
    """Twelve blocks that `forward` calls by name."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        for number in range(12):
            self.add_module(f"block{number}", ConvBlock(8))

    def forward(self, x):
        x = F.relu(self.into(x))
        for number in range(12):
            x = getattr(self, f"block{number}")(x)
        return self.out(x)


def test_many_blocks_called_by_name_become_identities():
    model = with_noise(ManyBlocks())
    plan = plan_without(model, IMAGES, *(f"block{number}" for number in range(0, 12, 2)))
    result = prune_with_verification(model, plan)
    assert result.verification.passed
    assert count(result.model, IMAGES) == (plan.after.parameters, plan.after.macs)


class NumberedBlocks(NamedBlocks):
    """Two blocks in a list that `forward` calls by number."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.one, self.two])
        del self.one, self.two

    def forward(self, x):
        return self.out(self.blocks[1](self.blocks[0](F.relu(self.into(x)))))


def test_a_block_called_by_number_becomes_an_identity():
    model = with_noise(NumberedBlocks())
    result = prune_with_verification(model, plan_without(model, IMAGES, "blocks.0"))
    assert type(result.model.blocks[0]) is nn.Identity
    assert result.verification.passed


def test_a_block_that_can_be_neither_deleted_nor_replaced_is_refused():
    model = with_noise(TokenNet(4, fixed=True))
    with pytest.raises(ModelError, match=r"block 'layers\.1' of TokenNet cannot be dropped"):
        kirsch.prune(model, plan_without(model, WORDS, "layers.1"))


def test_a_plan_can_remove_units_and_blocks():
    model = with_noise(TokenNet(3))
    graph = kirsch.trace(model, WORDS)
    widths = kirsch.plan(graph, Goal(parameters=0.6))
    both = Plan(
        graph.fingerprint, "TokenNet", widths.groups, graph.cost,
        graph.prices.price(widths.keep(graph), ["layers.1"]),
        blocks=(Skip("layers.1", "by hand"),), inputs=graph.inputs,
    )  # fmt: skip
    result = prune_with_verification(model, both)
    assert result.verification.passed
    assert count(result.model, WORDS) == (both.after.parameters, both.after.macs)


def test_a_model_with_removed_blocks_is_saved_and_loaded_exactly(tmp_path):
    model = with_noise(TokenNet(3))
    plan = plan_without(model, WORDS, "layers.1")
    assert Plan.from_json(plan.to_json()) == plan
    pruned = kirsch.prune(model, plan)
    kirsch.save(pruned, tmp_path / "saved")
    assert torch.equal(kirsch.load(tmp_path / "saved", lambda: TokenNet(3)).eval()(WORDS), pruned(WORDS))


def test_a_block_of_a_traced_submodule_is_removed_from_the_model():
    model = with_noise(nn.Sequential(convolutional(), nn.Linear(4, 2)))
    graph = kirsch.trace(model, IMAGES, module="0")
    plan = kirsch.plan(graph, Goal(parameters=0.95), kinds="block", data=IMAGES)
    assert plan.blocks
    assert len(kirsch.prune(model, plan)[0]) == len(model[0]) - len(plan.blocks)


@pytest.mark.parametrize("other", ["layers.0", "layers.2"])
def test_the_verification_rejects_the_removal_of_a_block_that_is_not_in_the_plan(monkeypatch, other):
    model, drop = with_noise(TokenNet(3)), dropping.drop

    def wrong(pruned, gone, args, options):
        moved = drop(pruned, [dataclasses.replace(gone[0], path=other)], args, options)
        return {path.replace("layers.1", other): to for path, to in moved.items()}

    monkeypatch.setattr(dropping, "drop", wrong)
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        kirsch.prune(model, plan_without(model, WORDS, "layers.1"))


def test_the_verification_rejects_a_block_of_the_plan_that_was_not_removed(monkeypatch):
    model = with_noise(TokenNet(3))
    monkeypatch.setattr(dropping, "drop", lambda pruned, *_: {path: path for path, _ in pruned.named_modules()})
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        kirsch.prune(model, plan_without(model, WORDS, "layers.1"))


def test_a_plan_with_an_unknown_or_repeated_block_is_refused():
    model = with_noise(TokenNet(2))
    plan = plan_without(model, WORDS, "layers.1")
    text = plan.to_json().replace("layers.1", "layers.7")
    with pytest.raises(PlanError, match=r"removes the block 'layers\.7'.*no such residual block.*layers\.1"):
        kirsch.prune(model, Plan.from_json(text))
    twice = plan.to_json().replace('"blocks": [', '"blocks": [{"name": "layers.1", "reason": ""},')
    with pytest.raises(PlanError, match=r"blocks has 'layers\.1' twice"):
        kirsch.prune(model, Plan.from_json(twice))
