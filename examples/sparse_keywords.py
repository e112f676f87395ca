"""Keyword spotting with 90 % of the weights zero: one-shot, retrained with a teacher, and with a growing sparsity.

Spoken digits of a speaker whom the network has never heard: it is trained on the other speakers of the Free Spoken
Digit Dataset (`$KIRSCH_DATA/fsdd/recordings`, default ../shared/data). Without the data set, the example uses generated
tones and says so. `--quick` takes less than a minute and only shows the steps. The full run takes about 2 minutes a
speaker on one core.

Expected: without retraining, the methods that use inputs keep far more accuracy than magnitude; after retraining, most
of the difference is gone.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import kirsch
from kirsch import figures
from kirsch.frameworks.find import framework_of

RATE, FRAME, HOP, BANDS, FRAMES = 8_000, 256, 128, 32, 48
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


@dataclass(frozen=True)
class Clips:
    """Spectrograms (N, bands, frames) with digits and speakers."""

    inputs: np.ndarray
    digits: np.ndarray
    speakers: np.ndarray


def bands() -> np.ndarray:
    """Return triangular filters that are evenly spaced on the mel scale, shape (BANDS, FRAME // 2 + 1)."""
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequencies = np.linspace(0, RATE / 2, FRAME // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """Return the standardized logarithm of the energies in mel bands, shape (BANDS, FRAMES); short clips are padded."""
    sound = np.pad(sound, (0, max(0, FRAME + HOP * (FRAMES - 1) - len(sound))))
    starts = HOP * np.arange(FRAMES)[:, None]
    windows = sound[starts + np.arange(FRAME)] * np.hanning(FRAME)
    energies = np.abs(np.fft.rfft(windows)) ** 2 @ bands().T  # (FRAMES, BANDS)
    values = np.log(energies + 1e-3).T
    return ((values - values.mean()) / (values.std() + 1e-6)).astype(np.float32)


def recorded(folder: Path, every: int) -> Clips:
    """Return every n-th recording."""
    found = []
    for path in sorted(folder.glob("*.wav"))[::every]:
        digit, speaker, _ = path.stem.split("_")
        with wave.open(str(path)) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        found.append((spectrogram(sound.astype(np.float64)), int(digit), SPEAKERS.index(speaker)))
    inputs, digits, speakers = zip(*found, strict=True)
    return Clips(np.stack(inputs), np.array(digits), np.array(speakers))


def generated(samples: int) -> Clips:
    """Return tones whose course over time depends on the class and whose pitch depends on the speaker."""
    random = np.random.default_rng(0)
    digits, speakers = np.arange(samples) % 10, np.arange(samples) // 10 % len(SPEAKERS)
    times = np.arange(RATE // 2) / RATE
    sounds = []
    for digit, speaker in zip(digits, speakers, strict=True):
        pitch = 300 * (1 + 0.08 * speaker) * (1 + digit % 5) + 1500 * (digit // 5) * times
        sounds.append(3000 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 2000 * random.standard_normal(len(times)))
    return Clips(np.stack([spectrogram(sound) for sound in sounds]), digits, speakers)


def network(width: int = 64) -> nn.Module:
    """Return a network of four convolutions over time."""
    layers: list[nn.Module] = []
    before = BANDS
    for stride in (1, 2, 2, 2):
        layers += [nn.Conv1d(before, width, 5, stride, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10))


def accuracy(model: nn.Module, clips: Clips, chosen: np.ndarray) -> float:
    predicted = framework_of(model).inference.predict(model, clips.inputs[chosen]).argmax(-1)
    return float((predicted == clips.digits[chosen]).mean())


def compared(clips: Clips, speaker: int, sparsity: float, epochs: int, seed: int) -> dict[str, tuple[float, int]]:
    """Return accuracy on a speaker and compressed size of each network; the other speakers are the training data."""
    train, test = np.flatnonzero(clips.speakers != speaker), np.flatnonzero(clips.speakers == speaker)
    data = kirsch.ArrayData(clips.inputs[train], clips.digits[train], batch_size=64)
    some = clips.inputs[train][:: max(1, len(train) // 256)]
    first = kirsch.Training(epochs=2 * epochs, learning_rate=3e-3, optimizer="adamw", seed=seed)
    retraining = first.changed(epochs=epochs, learning_rate=2e-3)
    torch.manual_seed(seed)
    dense = kirsch.fit(network(), data, training=first, progress=False).model
    torch.manual_seed(seed)
    small = kirsch.fit(network(17), data, training=first, progress=False).model  # a tenth of the weights
    found: dict[str, tuple[float, int]] = {}

    def retrained(model: nn.Module, number: int = epochs) -> nn.Module:
        settings = retraining.changed(epochs=number)
        return kirsch.distill(model, dense, data, training=settings, progress=False, check_teacher=False).model

    def add(name: str, model: nn.Module) -> None:
        size = kirsch.sparsify(kirsch.fold_masks(model), sparsity=0.0).after.compressed_bytes
        found[name] = accuracy(model, clips, test), size

    add("dense", dense)
    add("dense, retrained with KD", retrained(copy.deepcopy(dense)))
    add("dense with a tenth of the weights, with KD", retrained(small))
    for importance in ("random", "magnitude", "wanda", "sparsegpt"):
        inputs = some if importance in ("wanda", "sparsegpt") else None
        sparse = kirsch.sparsify(dense, sparsity=sparsity, importance=importance, data=inputs).model
        add(importance, sparse)
        add(f"{importance}, retrained with KD", retrained(sparse))
    sparse = dense
    rounds = kirsch.SparsitySchedule(sparsity, steps=min(5, epochs)).rounds
    for target in rounds:  # as many epochs as the others, in rounds with a growing sparsity
        sparse = retrained(kirsch.sparsify(sparse, sparsity=target).model, epochs // len(rounds))
    add("magnitude, cubic schedule with KD", sparse)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few clips, few epochs, one speaker")
    parser.add_argument("--speakers", type=int, default=len(SPEAKERS), help="number of speakers to leave out in turn")
    parser.add_argument("--sparsity", type=float, default=0.9)
    given = parser.parse_args()
    folder = Path(os.environ.get("KIRSCH_DATA", "../shared/data")) / "fsdd" / "recordings"
    if folder.is_dir():
        clips = recorded(folder, every=6 if given.quick else 1)
    else:
        print(f"no recordings in {folder}: generated tones are used instead")
        clips = generated(600)
    speakers, epochs = (1, 2) if given.quick else (given.speakers, 15)
    started, results = time.perf_counter(), []
    for speaker in range(speakers):
        results.append(compared(clips, speaker, given.sparsity, epochs, seed=speaker))
        print(f"{SPEAKERS[speaker]} left out   {time.perf_counter() - started:.0f} s")
    print(f"\n{'':<44} accuracy   parameters, compressed")
    for name in results[0]:
        values, sizes = zip(*(result[name] for result in results), strict=True)
        spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        size = figures.bytes_(float(np.mean(sizes)))
        print(f"{name:<44} {figures.percent(float(np.mean(values)))}{spread:<8} {size}")
    number = figures.counted(len(results), "left-out speaker")
    print(f"mean and standard deviation over {number}; sparsity {given.sparsity:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
