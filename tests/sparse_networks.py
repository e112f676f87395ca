"""Networks for tests of sparsity."""

from __future__ import annotations

import torch
from torch import nn


class Layers(nn.Module):
    """One layer of each type whose weight can be masked, and parameters that are kept dense."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 16, 1, groups=2)
        self.lstm = nn.LSTM(16, 8, batch_first=True, bidirectional=True, num_layers=2)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, 16))
        self.norm = nn.LayerNorm(16)
        self.head, self.tied = nn.Linear(16, 12), nn.Linear(16, 12)
        self.tied.weight = self.head.weight

    def forward(self, x):
        h = self.up(self.conv(self.tokens(x).mT)).mT
        h = self.gru(self.lstm(h)[0])[0] + self.positions
        h = self.encoder(h + self.attention(h, h, h, need_weights=False)[0])
        return (self.head(self.norm(h)) + self.tied(h)).mean(1)


def tokens(samples=16):
    return torch.randint(0, 10, (samples, 5), generator=torch.Generator().manual_seed(0))


def digits_like(seed=0):
    """Return a small convolutional network, and images and labels of three classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    labels = torch.arange(48) % 3
    images = torch.randn(48, 1, 6, 6) + labels[:, None, None, None]
    return model.eval(), images, labels
