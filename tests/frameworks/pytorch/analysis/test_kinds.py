"""Kinds of the groups of networks with and without LoRA, adapters, poolers, heads and gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kirsch
from kirsch.pruning.prune import prune_with_verification

WORDS = torch.randint(0, 30, (2, 5))


class LoRA(nn.Module):
    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer, self.drop = layer, nn.Dropout(0.1)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + 2.0 * self.b(self.a(self.drop(x)))


class Encoder(nn.Module):
    """A transformer block without attention, and a classifier."""

    def __init__(self, wrap=lambda layer: layer, *, gated=False, adapter="", act=F.gelu):
        super().__init__()
        self.words, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.up, self.down = wrap(nn.Linear(16, 48)), wrap(nn.Linear(48, 16))
        self.gate = wrap(nn.Linear(16, 48)) if gated else None
        self.scale = nn.Parameter(torch.ones(48)) if adapter == "IA3" else 1
        self.into, self.back = nn.Linear(16, 6), nn.Linear(6, 16)
        self.pooler, self.last = nn.Linear(16, 12), nn.Linear(12, 3)
        self.adapter, self.act = adapter, act

    def forward(self, ids):
        x = self.words(ids)
        h = self.norm(x)
        y = self.act(self.up(h)) if self.gate is None else self.up(h) * F.silu(self.gate(h))
        y = self.down(y * self.scale)
        if self.adapter == "serial":
            y = y + self.back(torch.relu(self.into(y)))
        elif self.adapter == "parallel":
            y = y + self.back(torch.relu(self.into(h)))
        return self.last(torch.tanh(self.pooler((x + y)[:, 0])))


def kinds(model, inputs=WORDS):
    return {group.name: group.kind for group in kirsch.trace(model, inputs).groups}


def new_gelu(x):
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    "options",
    [{}, {"gated": True}, {"adapter": "IA3"}, {"act": new_gelu}, {"adapter": "serial"}, {"adapter": "parallel"}],
)
@pytest.mark.parametrize("wrap", [None, LoRA])
def test_the_hidden_units_of_a_block_are_ffn_units_also_with_adapters(options, wrap):
    kind_of = kinds(Encoder(wrap, **options) if wrap else Encoder(**options))
    hidden = {kind for name, kind in kind_of.items() if name in ("up", "up.layer", "scale")}
    assert hidden == {"ffn unit"}
    assert kind_of["norm"] == "embedding dim"
    assert kind_of["pooler"] == "channel"
    assert {kind for name, kind in kind_of.items() if name.endswith(".a")} <= {"rank"}
    assert ("up.a" in kind_of) == (wrap is not None)
    assert kind_of.get("into", "ffn unit") == "ffn unit"


class DoRA(LoRA):
    """LoRA with a learned norm for each row of the merged weight."""

    def __init__(self, layer, rank=4):
        super().__init__(layer, rank)
        self.length = nn.Parameter(layer.weight.detach().norm(dim=1))

    def forward(self, x):
        merged = self.layer.weight + self.b(self.a(torch.eye(self.a.weight.shape[1]))).T
        scale = self.length / torch.linalg.norm(merged, dim=1)
        return scale * (self.layer(x) + self.b(self.a(self.drop(x))))


def test_hidden_units_with_dora_are_ffn_units():
    model = Encoder(DoRA)
    graph = kirsch.trace(model, WORDS)
    assert {group.name: group.kind for group in graph.groups if group.size == 48} == {"up": "ffn unit"}
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.8), kinds=["ffn unit"])
    result = prune_with_verification(model, plan)
    assert result.verification.power > 1e-3
    assert result.model.up.layer.out_features < 48


def test_pruning_ffn_units_keeps_ranks_and_poolers():
    model = Encoder(LoRA)
    plan = kirsch.plan(kirsch.trace(model, WORDS), kirsch.Goal(macs=0.8), kinds=["ffn unit"])
    assert [removal.name for removal in plan.groups] == ["up.layer"]


def test_the_hidden_units_of_a_decoder_with_one_token_are_ffn_units():
    class Decoder(Encoder):
        def forward(self, ids):
            return super().forward(ids[:, :1])

    assert kinds(Decoder())["up"] == "ffn unit"


class Gated(nn.Module):
    """Channels with squeeze and excitation, and a head with a hidden layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.hidden, self.last = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        x = x + self.second(x) * gate[:, :, None, None]
        return self.last(torch.relu(self.hidden(x.mean((2, 3)))))


def test_units_of_a_gate_and_of_a_head_on_pooled_features_are_channels():
    assert set(kinds(Gated(), torch.randn(2, 3, 6, 6)).values()) == {"channel"}


class Mixer(nn.Module):
    """One hidden layer over channels, and one over positions."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), nn.Linear(24, 8)
        self.over, self.back, self.last = nn.Linear(9, 20), nn.Linear(20, 9), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        tokens = x.flatten(2)
        tokens = tokens + self.back(F.gelu(self.over(tokens)))
        return self.last(tokens.mean(2))


def test_hidden_units_over_positions_and_over_channels_are_ffn_units():
    kind_of = kinds(Mixer(), torch.randn(2, 3, 6, 6))
    assert (kind_of["up"], kind_of["over"], kind_of["stem"]) == ("ffn unit", "ffn unit", "embedding dim")


class TransposedLinear(nn.Module):
    """The linear layer of GPT-2, whose weight is stored transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def test_hidden_units_of_addmm_layers_are_ffn_units():
    model = Encoder()
    model.up, model.down = TransposedLinear(16, 48), TransposedLinear(48, 16)
    assert kinds(model)["up"] == "ffn unit"


def test_hidden_units_of_a_sequential_are_ffn_units():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    assert kinds(model, torch.randn(4, 8)) == {"0": "ffn unit"}


class Two(nn.Module):
    """Two linear layers on the tokens of an embedding, with a function between them."""

    def __init__(self, function, width=8):
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(30, 6), nn.Linear(6, width), nn.Linear(8, 3)
        self.function = function

    def forward(self, ids):
        return self.second(self.function(self.first(self.words(ids))))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (nn.PReLU(), "ffn unit"),
        (lambda x: x.amax(1), "ffn unit"),
        (lambda x: x.max(1).values, "ffn unit"),
        (lambda x: torch.maximum(x[:, 0], x[:, 1]), "ffn unit"),
        (lambda x: torch.linalg.vector_norm(x, dim=1), "ffn unit"),
        (lambda x: x.var(1), "ffn unit"),
        (lambda x: F.max_pool1d(x.transpose(1, 2), 2).transpose(1, 2), "ffn unit"),
        (lambda x: x.mean(1), "rank"),
        (lambda x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2), "rank"),
        (nn.Identity(), "rank"),
    ],
)
def test_units_between_two_linear_layers_are_ranks_only_if_the_operations_between_are_linear(function, kind):
    assert kinds(Two(function).eval())["first"] == kind


def test_units_before_a_gated_linear_unit_are_ffn_units():
    assert kinds(Two(F.glu, width=16).eval())["first"] == "ffn unit"


def test_a_rank_whose_weight_is_normalized_stays_a_rank():
    class Normalized(LoRA):
        def forward(self, x):
            a = self.a.weight / torch.linalg.vector_norm(self.a.weight, dim=1, keepdim=True)
            return self.layer(x) + self.b(F.linear(x, a))

    kind_of = kinds(Encoder(Normalized))
    assert kind_of["up.a"] == "rank"
