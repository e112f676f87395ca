"""Small networks from papers, written in the style of research code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class UNet(nn.Module):
    """Ronneberger et al. 2015: contracting and expanding path with skip connections, here for 2 classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def double(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
                nn.Conv2d(o, o, 3, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
            )

        self.down1, self.down2, self.bottom = double(3, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.lift2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up2 = double(4 * width, 2 * width)
        self.lift1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up1, self.out = double(2 * width, width), nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of each pixel, shape (N, 2, H, W)."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.lift2(self.bottom(F.max_pool2d(two, 2)))
        x = self.lift1(self.up2(torch.cat([two, x], dim=1)))
        return self.out(self.up1(torch.cat([one, x], dim=1)))


class Espcn(nn.Module):
    """Shi et al. 2016: super-resolution with a sub-pixel convolution."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 12, 3, padding=1)
        self.conv3, self.shuffle = nn.Conv2d(12, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the image in `scale` times the resolution."""
        return torch.sigmoid(self.shuffle(self.conv3(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))))))


class TextCnn(nn.Module):
    """Kim 2014: convolutions of several widths over words, each followed by the maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 24)
        self.convs = nn.ModuleList([nn.Conv2d(1, 10, (k, 24)) for k in (3, 4, 5)])
        self.fc = nn.Linear(30, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return logits of each text, shape (N, 4)."""
        x = self.embedding(words).unsqueeze(1)
        parts = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        return self.fc(torch.cat([F.max_pool1d(part, part.size(2)).squeeze(2) for part in parts], 1))


class Crnn(nn.Module):
    """Shi et al. 2015: convolutions, then a bidirectional LSTM along the width, for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, 1, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
        )
        self.rnn, self.out = nn.LSTM(32 * 8, 24, 2, bidirectional=True), nn.Linear(48, 11)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities, shape (T, N, K)."""
        x = self.cnn(image)
        b, c, h, w = x.size()
        x = x.view(b, c * h, w).permute(2, 0, 1)
        return F.log_softmax(self.out(self.rnn(x)[0]), dim=2)


class Tcn(nn.Module):
    """Bai et al. 2018: dilated causal convolutions with weight normalization and residual connections."""

    class Block(nn.Module):
        """Two causal convolutions with a shortcut."""

        def __init__(self, i: int, o: int, dilation: int) -> None:
            super().__init__()
            self.pad = 2 * dilation
            norm = nn.utils.parametrizations.weight_norm
            self.conv1 = norm(nn.Conv1d(i, o, 3, padding=self.pad, dilation=dilation))
            self.conv2 = norm(nn.Conv1d(o, o, 3, padding=self.pad, dilation=dilation))
            self.short = nn.Conv1d(i, o, 1) if i != o else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return the output (N, C', T) for a series (N, C, T)."""
            y = F.relu(self.conv1(x)[:, :, : -self.pad])
            y = F.relu(self.conv2(y)[:, :, : -self.pad])
            return F.relu(y + (x if self.short is None else self.short(x)))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.Block(3, 12, 1), self.Block(12, 12, 2), self.Block(12, 16, 4))
        self.out = nn.Linear(16, 5)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Return logits of the last step, shape (N, 5)."""
        return self.out(self.net(series)[:, :, -1])


class PointNet(nn.Module):
    """Qi et al. 2017, with the small network that computes a transformation of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(
            nn.Conv1d(3, 16, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 9)
        )
        self.local = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv1d(16, 48, 1), nn.BatchNorm1d(48), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 6))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Return logits (N, P, 6) of each of the points (N, 3, P), from local and global features."""
        rotation = self.align(points).view(-1, 3, 3) + torch.eye(3)
        local = self.local(torch.bmm(rotation, points))
        pooled = self.deep(local).max(dim=2, keepdim=True)[0].expand(-1, -1, points.size(2))
        return self.head(torch.cat([local, pooled], 1).transpose(1, 2))


class WaveGate(nn.Module):
    """WaveNet (van den Oord et al. 2016), small: gated dilated convolutions with residual and skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList([nn.Conv1d(16, 32, 2, dilation=2**n) for n in range(4)])
        self.back = nn.ModuleList([nn.Conv1d(16, 16, 1) for _ in range(4)])
        self.skips = nn.ModuleList([nn.Conv1d(16, 20, 1) for _ in range(4)])
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(20, 20, 1), nn.ReLU(), nn.Conv1d(20, 8, 1))

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return logits of the steps that are in the receptive field of all layers, shape (N, 8, T')."""
        x, total = self.first(wave), 0
        for gate, back, skip in zip(self.gates, self.back, self.skips, strict=True):
            filtered, gating = gate(x).chunk(2, dim=1)
            y = torch.tanh(filtered) * torch.sigmoid(gating)
            x = x[:, :, -y.shape[2] :] + back(y)
            total = skip(y) + (total[:, :, -y.shape[2] :] if torch.is_tensor(total) else 0)
        return self.last(total)


class Seq2Seq(nn.Module):
    """Bahdanau et al. 2015: a recurrent encoder, and a decoder that attends to its outputs at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(200, 16), nn.Embedding(200, 16)
        self.encoder, self.bridge = nn.GRU(16, 20, batch_first=True, bidirectional=True), nn.Linear(40, 24)
        self.cell, self.out = nn.GRUCell(16 + 40, 24), nn.Linear(24, 200)
        self.query, self.key, self.score = nn.Linear(24, 18), nn.Linear(40, 18), nn.Linear(18, 1, bias=False)

    def forward(self, words: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return logits of the next word at each position, shape (N, T, 200)."""
        memory, _ = self.encoder(self.source(words))
        state, keys, out = torch.tanh(self.bridge(memory[:, 0])), self.key(memory), []
        for step in range(targets.size(1)):
            weights = torch.softmax(self.score(torch.tanh(self.query(state).unsqueeze(1) + keys)), dim=1)
            context = (weights * memory).sum(1)
            state = self.cell(torch.cat([self.target(targets[:, step]), context], -1), state)
            out.append(self.out(state))
        return torch.stack(out, 1)


class Cbam(nn.Module):
    """Woo et al. 2018: attention over channels, then over positions, in a residual block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.shared = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width))
        self.position, self.head = nn.Conv2d(2, 1, 7, padding=3), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of each image, shape (N, 10)."""
        x = F.relu(self.stem(x))
        y = self.conv(x)
        gate = self.shared(y.mean((2, 3))) + self.shared(y.amax((2, 3)))
        y = y * torch.sigmoid(gate)[:, :, None, None]
        statistics = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
        return self.head(F.relu(x + y * torch.sigmoid(self.position(statistics))).mean((2, 3)))


class Vae(nn.Module):
    """Kingma & Welling 2014 with convolutions; in inference mode the mean is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, 12, 4, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 4, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.mean, self.spread = nn.Linear(16 * 64, 10), nn.Linear(16 * 64, 10)
        self.widen = nn.Linear(10, 16 * 64)
        self.decode = nn.Sequential(
            nn.Unflatten(1, (16, 8, 8)),
            nn.ConvTranspose2d(16, 12, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 3, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the reconstructed image, and mean and log-variance of its code."""
        code = self.encode(x)
        mean, spread = self.mean(code), self.spread(code)
        sample = mean + torch.randn_like(mean) * torch.exp(spread / 2) if self.training else mean
        return {"image": self.decode(F.relu(self.widen(sample))), "mean": mean, "spread": spread}
