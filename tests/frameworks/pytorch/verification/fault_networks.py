"""Small networks, each of which shows one or more of the planted faults."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

IMAGE, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 3)


class Net(nn.Module):
    """A module with the given parts, whose `forward` is a function of the module and its input."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def image(width, between, head, **parts):
    """Return two convolutions with a function between them, and an image."""
    first = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, width, 3, padding=1))
    last = nn.Conv2d(head, 4, 3, padding=1)
    return Net(lambda s, x: s.last(between(s, s.first(x))), first=first, last=last, **parts), IMAGE


def tokens(width, between, head, inputs=TOKENS, **parts):
    """Return two linear layers with a function between them, and tokens."""
    first, last = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, width)), nn.Linear(head, 4)
    return Net(lambda s, x: s.last(between(s, s.first(x))), first=first, last=last, **parts), inputs


def attention(s, x, queries=lambda q: q):
    q, k, v = (layer(x).unflatten(-1, (s.heads, -1)).transpose(1, 2) for layer in (s.q, s.k, s.v))
    return F.scaled_dot_product_attention(queries(q), k, v).transpose(1, 2).flatten(2)


def normalized_queries(s, x):
    return attention(s, x, lambda q: F.normalize(q, dim=-1))  # not linear: no factor on weights keeps the scale


def fused_attention(s, x):
    q, k, v = s.qkv(x).view(2, 5, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grouped_query_attention(s, x):
    q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (s.q, s.k, s.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def constant_number_of_heads(_, x):
    x = x.view(2, 5, 4, -1)
    return (x / x.norm(dim=-1, keepdim=True)).flatten(2)


def every_statistic(_, x):
    far = 2 + x.abs()  # a masked channel is 2 everywhere, which would be the minimum, and its negative the maximum
    statistics = [x.sigmoid().mean(1), x.sigmoid().sum(1), far.neg().amax(1), far.amin(1), x.var(1), x.std(1)]
    return x * torch.stack([*statistics, torch.linalg.vector_norm(far, dim=1)]).sum(0).unsqueeze(1)


def tied_weights():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[4].weight = model[2].weight
    return model, TOKENS


NETS = {
    "linear": (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), TOKENS),
    "batch norm": image(8, lambda s, x: s.norm(x).relu(), 8, norm=nn.BatchNorm2d(8)),
    "residual": image(8, lambda s, x: x + s.inner(x.relu()), 8, inner=nn.Conv2d(8, 8, 3, padding=1)),
    "tied weights": tied_weights(),
    "repeat": image(8, lambda _, x: x.repeat(1, 2, 1, 1), 16),
    "repeat_interleave": image(8, lambda _, x: x.repeat_interleave(2, 1), 16),
    "flip": image(8, lambda _, x: x.flip(1), 8),
    "cat": image(8, lambda s, x: torch.cat([x, s.other(x.relu())], 1), 16, other=nn.Conv2d(8, 8, 1)),
    "split": image(12, lambda s, x: torch.cat(x.split([s.one, s.two], 1)[::-1], 1), 12, one=6, two=6),
    "slice": image(12, lambda s, x: torch.cat([x[:, s.at :], x[:, : s.at]], 1), 12, at=6),
    "glu": image(12, lambda _, x: F.glu(x, 1), 6),
    "pad": image(8, lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 3)), 12),
    "sum of a grid": tokens(16, lambda s, x: x.unflatten(-1, (s.rows, -1)).tanh().sum(-2), 4, rows=4),
    "transposed grid": tokens(16, lambda s, x: x.unflatten(-1, (s.rows, -1)).transpose(-2, -1).flatten(2), 16, rows=4),
    "scaled grid": tokens(
        16,
        lambda s, x: (x.unflatten(-1, (s.rows, -1)) * s.gain).flatten(-2),
        16,
        TOKENS[0, 0],
        rows=4,
        gain=nn.Parameter(torch.randn(4)),
    ),
    "attention": tokens(12, attention, 16, heads=4, q=nn.Linear(12, 16), k=nn.Linear(12, 16), v=nn.Linear(12, 16)),
    "fused attention": tokens(12, fused_attention, 16, heads=4, qkv=nn.Linear(12, 48)),
    "attention with normalized queries": tokens(
        12, normalized_queries, 16, heads=4, q=nn.Linear(12, 16), k=nn.Linear(12, 16), v=nn.Linear(12, 16)
    ),
    "grouped-query attention": tokens(
        12, grouped_query_attention, 12, q=nn.Linear(12, 12), k=nn.Linear(12, 6), v=nn.Linear(12, 6)
    ),
    "constant number of heads": tokens(32, constant_number_of_heads, 32),
    "LSTM": tokens(6, lambda s, x: s.cell(x)[0], 8, cell=nn.LSTM(6, 8, batch_first=True)),
    "bidirectional GRU": tokens(
        6, lambda s, x: s.cell(x)[0], 16, cell=nn.GRU(6, 8, batch_first=True, bidirectional=True)
    ),
    "grouped convolution": image(8, lambda s, x: s.grouped(x), 8, grouped=nn.Conv2d(8, 8, 1, groups=2)),
    "depthwise convolution": image(4, lambda s, x: s.each(x), 16, each=nn.Conv2d(4, 16, 1, groups=4)),
    "transposed convolution": image(8, lambda s, x: s.up(x), 8, up=nn.ConvTranspose2d(8, 8, 2)),
    "group norm": image(24, lambda s, x: s.norm(x), 24, norm=nn.GroupNorm(6, 24)),
    "layer norm and RMS norm": tokens(
        8, lambda s, x: s.rms(s.norm(x).tanh()), 8, norm=nn.LayerNorm(8), rms=nn.RMSNorm(8)
    ),
    "reductions": image(8, every_statistic, 8),
    "softmax": image(8, lambda _, x: x.softmax(1), 8),
    "roll": image(8, lambda _, x: x.roll(1, 1), 8),
    "strided slice": image(8, lambda _, x: x * x[:, ::2].mean(1, keepdim=True), 8),
    "selected channel": image(8, lambda _, x: x * x[:, 2].unsqueeze(1), 8),
    "indexed channels": image(8, lambda _, x: x * x[:, [3, 0, 2, 1]].mean(1, keepdim=True), 8),
    "channel shuffle": image(12, lambda s, x: F.channel_shuffle(x, s.groups), 12, groups=4),
    "pixel shuffle": image(16, lambda _, x: F.pixel_shuffle(x, 2), 4),
    "pixel unshuffle": image(4, lambda _, x: F.pixel_unshuffle(x, 2), 16),
    "unfold": image(4, lambda _, x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 16),
    "embedding": (
        nn.Sequential(nn.Embedding(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)),
        torch.arange(4).view(2, 2),
    ),
    "width as a divisor": tokens(8, lambda s, x: x.view(2, 5, s.channels) / s.channels, 8, channels=8),
}
