"""Products of tensors: grouped convolutions, matrix products, and attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frameworks.pytorch.analysis.networks import IMAGE, Between, conv
from kirsch.frameworks.pytorch.analysis.count import count
from trace_and_cut import assert_pruned_correctly, randomly_removed

TOKENS = torch.randn(2, 5, 12)


CONVOLUTIONS = {
    "groups": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 5)), IMAGE, [2, 3, 4]),
    "groups before groups": (
        nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 8, groups=4), nn.ReLU(), conv(8, 8, groups=4), nn.ReLU(), conv(8, 5)
        ),
        IMAGE,
        [2, 2, 2, 4],
    ),
    "groups over the channels of the image, whose number is frozen": (
        nn.Sequential(nn.Conv2d(3, 9, 1, groups=3), nn.ReLU(), conv(9, 5)),
        IMAGE,
        [3],
    ),
    "depthwise with a multiplier": (
        nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 12, groups=4), nn.ReLU(), conv(12, 5)),
        IMAGE,
        [3, 4],
    ),
    "groups in one dimension": (
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv1d(8, 5, 1)),
        torch.randn(2, 3, 9),
        [2, 4, 4],
    ),
    "groups in three dimensions": (
        nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv3d(8, 5, 1)),
        torch.randn(2, 3, 3, 3, 3),
        [2, 4, 4],
    ),
    "transposed groups": (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=4), nn.ReLU(), conv(12, 5)),
        IMAGE,
        [2, 3, 4],
    ),
    "transposed groups, other arguments not at their defaults": (
        nn.Sequential(
            conv(3, 8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 3, stride=3, padding=2, output_padding=1, groups=2, dilation=4, bias=False),
            nn.ReLU(),
            conv(4, 5),
        ),
        IMAGE,
        [2, 2, 4],
    ),
    "transposed depthwise": (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, groups=8), nn.ReLU(), conv(8, 5)),
        IMAGE,
        [8],
    ),
    "transposed depthwise with a multiplier": (
        nn.Sequential(conv(3, 4), nn.ReLU(), nn.ConvTranspose2d(4, 12, 2, groups=4), nn.ReLU(), conv(12, 5)),
        IMAGE,
        [3, 4],
    ),
    "groups without batch axis": (
        nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 5)),
        IMAGE[0],
        [2, 3, 4],
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_grouped_convolution_is_pruned_correctly(name, seed):
    model, inputs, sizes = CONVOLUTIONS[name]
    graph, _ = assert_pruned_correctly(model, inputs, sizes=sizes, seed=seed)
    assert graph.blockers == ()


def test_groups_of_a_convolution_and_positions_in_the_groups_have_different_kinds():
    graph, _ = assert_pruned_correctly(*CONVOLUTIONS["groups"][:2])
    assert sorted((group.kind, group.size) for group in graph.groups) == [
        ("conv group", 4),
        ("position in conv group", 2),
        ("position in conv group", 3),
    ]


def weight(*shape):
    return nn.Parameter(torch.randn(shape))


PRODUCTS = {
    "matmul": (lambda s, x: x @ s.w, {"w": weight(8, 6)}, [6, 8]),
    "matmul with the weight first": (
        lambda s, x: (s.w @ x.transpose(1, 2)).transpose(1, 2),
        {"w": weight(6, 8)},
        [6, 8],
    ),
    "matmul with a batch of weights": (lambda s, x: x @ s.w, {"w": weight(2, 8, 6)}, [6, 8]),
    "mm": (lambda s, x: torch.mm(x.flatten(0, 1), s.w), {"w": weight(8, 6)}, [6, 8]),
    "bmm": (lambda s, x: torch.bmm(x, s.w), {"w": weight(2, 8, 6)}, [6, 8]),
    "addmm": (lambda s, x: torch.addmm(s.b, x[0], s.w), {"b": weight(6), "w": weight(8, 6)}, [6, 8]),
    "baddbmm": (lambda s, x: torch.baddbmm(s.b, x, s.w), {"b": weight(6), "w": weight(2, 8, 6)}, [6, 8]),
    "mv and outer": (lambda s, x: torch.outer(x[0] @ s.v, s.w), {"v": weight(8), "w": weight(6)}, [6, 8]),
    "vector on the left": (lambda s, x: (s.v @ s.w)[None] + x[..., :1], {"v": weight(8), "w": weight(8, 6)}, [6, 7, 8]),
    "dot": (lambda s, x: torch.dot(x[0, 0], s.v) * s.w, {"v": weight(8), "w": weight(6)}, [6, 8]),
    "einsum": (lambda s, x: torch.einsum("bti,io->bto", x, s.w), {"w": weight(8, 6)}, [6, 8]),
    "einsum with an ellipsis": (lambda s, x: torch.einsum("...i,oi->...o", x, s.w), {"w": weight(6, 8)}, [6, 8]),
    "einsum without an arrow": (
        lambda s, x: torch.einsum("ati,io", x, s.w).transpose(1, 2),
        {"w": weight(8, 6)},
        [6, 8],
    ),
    "einsum of three": (
        lambda s, x: torch.einsum("bti,ij,jo->bto", x, s.w, s.v),
        {"w": weight(8, 7), "v": weight(7, 6)},
        [6, 7, 8],
    ),
    "einsum that also sums an axis of the weight": (
        lambda s, x: torch.einsum("bti,jo->to", x, s.w),
        {"w": weight(8, 6)},
        [6, 8, 8],
    ),
    "bilinear": (lambda s, x: s.both(x, x), {"both": nn.Bilinear(8, 8, 6)}, [6, 8]),
    "bilinear without bias": (lambda s, x: s.both(x, x * 2), {"both": nn.Bilinear(8, 8, 6, bias=False)}, [6, 8]),
    "Gram matrix": (lambda s, x: torch.einsum("bti,btj->bij", x, x) @ s.w, {"w": weight(8, 6)}, [6]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_pruned_correctly(name):
    between, attributes, sizes = PRODUCTS[name]
    model = Between(nn.Sequential(nn.Linear(12, 8), nn.ReLU()), between, nn.Linear(6, 4), **attributes)
    graph, _ = assert_pruned_correctly(model, TOKENS, sizes=sizes)
    assert graph.blockers == ()


class Attention(nn.Module):
    """Attention that reshapes by the width of a head, so that the number of heads can change."""

    def __init__(self, attend, *, heads=4, width=6, shared=1, **numbers):
        super().__init__()
        self.q = nn.Linear(12, heads * width)
        self.k, self.v = (nn.Linear(12, heads // shared * width) for _ in range(2))
        self.o = nn.Linear(heads * width, 4)
        self.width, self.shared, self.attend, self.scale = width, shared, attend, width**-0.5
        for name, number in numbers.items():
            setattr(self, name, number)

    def split(self, x):
        return x.view(*x.shape[:2], -1, self.width).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.o(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


def manual_attention(s, q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * s.scale, -1) @ v


def rotated(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def rotary(s, q, k, v, attend=None):
    angle = torch.outer(torch.arange(5.0), s.frequency)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    q, k = (x * cos + rotated(x) * sin for x in (q, k))
    return manual_attention(s, q, k, v) if attend is None else attend(q, k, v)


def grouped_query_attention(s, q, k, v):
    b, h, t, d = k.shape
    k, v = (x[:, :, None].expand(b, h, s.shared, t, d).reshape(b, h * s.shared, t, d) for x in (k, v))
    return manual_attention(s, q, k, v)


ATTENTIONS = {
    "by matrix products": (Attention(manual_attention), [4, 6]),
    "einsum": (
        Attention(
            lambda s, q, k, v: torch.einsum(
                "bhts,bhsd->bhtd", torch.softmax(torch.einsum("bhtd,bhsd->bhts", q, k) * s.scale, -1), v
            )
        ),
        [4, 6],
    ),
    "baddbmm": (
        Attention(
            lambda s, q, k, v: (
                torch.softmax(
                    torch.baddbmm(torch.zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=s.scale), -1
                )
                @ v.flatten(0, 1)
            ).view(v.shape)
        ),
        [4, 6],
    ),
    "sdpa": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=s.scale)),
        [4, 6],
    ),
    "sdpa, with a bias for each head": (
        Attention(
            lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.bias, scale=s.scale), bias=weight(4, 5, 5)
        ),
        [4, 6],
    ),
    "sdpa, causal": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s.scale)),
        [4, 6],
    ),
    # Without `scale`, sdpa divides by the square root of the width of a head, which pruning changes. The rows that
    # compute the queries are rescaled to correct this. Where this is not possible, only the 4 heads can be pruned.
    "sdpa without a scale": (Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v)), [4, 6]),
    "sdpa without a scale, rotary": (
        Attention(lambda s, q, k, v: rotary(s, q, k, v, F.scaled_dot_product_attention), frequency=weight(3)),
        [3, 4],
    ),
    "sdpa without a scale, queries normalized": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(s.norm(q), k, v), norm=nn.LayerNorm(6)),
        [4, 6],
    ),
    "sdpa without a scale, a bias on the queries": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q + s.bias, k, v), bias=weight(6)),
        [4],
    ),
    "sdpa without a scale, a number added to the queries": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q + 1, k, v)),
        [4],
    ),
    "sdpa without a scale, queries squared": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q * q, k, v)),
        [4],
    ),
    "sdpa without a scale, queries divided": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q / 3, k, v)),
        [4, 6],
    ),
    "sdpa without a scale, something divided by the queries": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(s.bias / (q.abs() + 1), k, v), bias=weight(6)),
        [4],
    ),
    "sdpa without a scale, queries used twice": (
        Attention(lambda s, q, k, v: q + F.scaled_dot_product_attention(q, k, v)),
        [4],
    ),
    "shared keys, repeated": (Attention(grouped_query_attention, shared=2), [2, 2, 6]),
    "shared keys, interleaved": (
        Attention(
            lambda s, q, k, v: manual_attention(
                s, q, k.repeat_interleave(s.shared, 1), v.repeat_interleave(s.shared, dim=1)
            ),
            shared=2,
        ),
        [2, 6],
    ),
    "shared keys in sdpa": (
        Attention(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=s.scale, enable_gqa=True), shared=2),
        [2, 6],
    ),
    "rotary": (Attention(rotary, frequency=weight(3)), [3, 4]),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_attention_is_pruned_correctly(name, seed):
    model, sizes = ATTENTIONS[name]
    assert_pruned_correctly(model, TOKENS, sizes=sizes, seed=seed)


class FusedAttention(nn.Module):
    """Attention with one layer for queries, keys and values, as in vision transformers."""

    def __init__(self, heads=4, width=6):
        super().__init__()
        self.qkv, self.o = nn.Linear(12, 3 * heads * width), nn.Linear(heads * width, 4)
        self.heads, self.width, self.scale = heads, width, width**-0.5

    def forward(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        return self.o(
            manual_attention(self, *qkv.unbind(0)).transpose(1, 2).reshape(*x.shape[:2], self.heads * self.width)
        )


def test_pruning_fused_attention_updates_the_attributes_for_heads_and_width():
    _, pruned = assert_pruned_correctly(FusedAttention(), TOKENS, sizes=[4, 6])
    assert (pruned.heads, pruned.width, tuple(pruned.qkv.weight.shape)) == (2, 3, (18, 12))


def test_the_scale_of_attention_is_kept_in_torch_inference_mode():
    with torch.inference_mode():
        assert_pruned_correctly(ATTENTIONS["sdpa without a scale"][0], TOKENS.clone(), sizes=[4, 6])


class Experts(nn.Module):
    """Experts as two grouped matrix products on rows that are sorted by expert."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 16), nn.Linear(16, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 32)), nn.Parameter(torch.randn(3, 32, 16))
        self.register_buffer("ends", torch.tensor([2, 3, 6], dtype=torch.int32))

    def forward(self, x):
        x = F.relu(F.grouped_mm(self.into(x), self.up, offs=self.ends))
        return self.out(F.grouped_mm(x, self.down, offs=self.ends))


def test_experts_lose_the_same_hidden_units_and_no_expert_is_removed():
    model = Experts().bfloat16()
    graph, pruned = assert_pruned_correctly(model, torch.randn(6, 4).bfloat16(), sizes=[16, 16, 32])
    assert pruned.up.shape == (3, 8, 16)
    keep = graph.keep(randomly_removed(graph))
    assert graph.prices.price(keep).macs == 6 * (4 * 8 + 8 * 16 + 16 * 8 + 8 * 2)
    assert count(pruned, torch.randn(6, 4).bfloat16())[1] == graph.prices.price(keep).macs
