"""Distill a ResNet-18-style teacher into a MobileNetV2-style student on CIFAR-10, compared with labels alone.

The example needs CIFAR-10 in `$KIRSCH_DATA` (default ../shared/data), and stops with a message if it is missing. It
takes about 25 minutes on two cores: 5,000 images, one teacher, and five seeds of the student with and without
distillation. With so few images and epochs, both networks stay below their best accuracy. `--quick` takes less than a
minute and only shows the steps.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from scipy import stats
from torch import nn

import kirsch
from kirsch import figures
from kirsch.data.sources.cifar10 import cifar10
from kirsch.distillation.distill import fit
from kirsch.errors import DataError
from kirsch.frameworks.find import framework_of


def unit(width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution and a batch normalization."""
    convolution = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width_out)]


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2015)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *unit(width_in, width_out, 3, stride), nn.ReLU(inplace=True), *unit(width_out, width_out, 3)
        )
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*unit(width_in, width_out, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, projection (Sandler et al. 2018)."""

    def __init__(self, width_in: int, width_out: int, stride: int, widen: int) -> None:
        super().__init__()
        inner = widen * width_in
        self.body = nn.Sequential(
            *unit(width_in, inner, 1),
            nn.ReLU6(inplace=True),
            *unit(inner, inner, 3, stride, groups=inner),
            nn.ReLU6(inplace=True),
            *unit(inner, width_out, 1),
        )
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def resnet(widths: tuple[int, ...] = (32, 64, 128, 256), repeats: int = 2) -> nn.Module:
    """Return a ResNet-18 of half the width for 32 x 32 pixels, with a 3 x 3 stem of stride 2 and no max pooling."""
    blocks: list[nn.Module] = []
    before = widths[0]
    for place, width in enumerate(widths):
        blocks.append(Residual(before, width, 2 if place else 1))
        blocks += [Residual(width, width, 1) for _ in range(repeats - 1)]
        before = width
    stem = [*unit(3, widths[0], 3, 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def mobilenet(scale: float = 1.0) -> nn.Module:
    """Return a small MobileNetV2 for 32 x 32 pixels: narrower, with fewer blocks, and with a total stride of 8.

    Args:
        scale: factor of all widths.
    """
    rows = [(1, 16, 1, 1), (4, 16, 2, 1), (4, 24, 2, 2), (4, 32, 2, 2), (4, 48, 1, 1)]
    stem_width, head_width = round(16 * scale), round(160 * scale)
    blocks: list[nn.Module] = []
    before = stem_width
    for widen, width, repeats, stride in rows:
        for place in range(repeats):
            blocks.append(Inverted(before, round(width * scale), 1 if place else stride, widen))
            before = round(width * scale)
    stem = [*unit(3, stem_width, 3, 2), nn.ReLU6(inplace=True)]
    head = [*unit(before, head_width, 1), nn.ReLU6(inplace=True)]
    head += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head_width, 10)]
    return nn.Sequential(*stem, *blocks, *head)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, one epoch, one seed")
    quick = parser.parse_args().quick
    images, seeds, epochs = (256, (0,), (1, 1)) if quick else (5_000, (0, 1, 2, 3, 4), (20, 20))
    try:
        data = cifar10(seed=0, train=images, validation=500, test=200 if quick else 5_000)
    except DataError as error:
        print(f"skipped: {error}")
        return 0
    batches, test = data.batches(64), data.test
    image = torch.zeros(1, 3, 32, 32)

    def judge(model: nn.Module) -> float:
        return float((framework_of(model).inference.predict(model, test.inputs).argmax(-1) == test.labels).mean())

    started = time.perf_counter()
    torch.manual_seed(0)
    teacher = fit(resnet(), batches, training=kirsch.Training(epochs=epochs[0], learning_rate=0.05)).model
    quality = judge(teacher)
    models = {"teacher": teacher, "student": mobilenet()}
    costs = {name: framework_of(model).analysis.count(model, image) for name, model in models.items()}
    print(f"teacher  {figures.percent(quality)}   {time.perf_counter() - started:.0f} s")
    results: dict[str, list[float]] = {"labels alone": [], "with the teacher": []}
    for seed in seeds:
        training = kirsch.Training(epochs=epochs[1], learning_rate=0.05, seed=seed)
        torch.manual_seed(seed)
        student = mobilenet()  # both runs of a seed have the same initial weights and batches
        objective = kirsch.Objective.kd(temperature=4.0, weight=0.9)
        alone = fit(student, batches, training=training).model
        taught = kirsch.distill(student, teacher, batches, objective=objective, training=training).model
        for name, model in (("labels alone", alone), ("with the teacher", taught)):
            results[name].append(judge(model))
        pair = [figures.percent(values[-1]) for values in results.values()]
        took = time.perf_counter() - started
        print(f"seed {seed}   labels alone {pair[0]}   with the teacher {pair[1]}   {took:.0f} s")
    print(table(quality, results, costs, len(test), len(seeds)))
    return 0


def table(
    quality: float, results: dict[str, list[float]], costs: dict[str, tuple[int, int]], samples: int, seeds: int
) -> str:
    """Return a table of sizes and accuracies, with the gain by distillation and its confidence interval."""
    lines = [f"\n{'':<31} {'parameters':>10} {'MACs':>8}   accuracy on {samples} images, seeds: {seeds}"]
    cost = [figures.count(value) for value in costs["teacher"]]
    lines.append(f"{'teacher, ResNet-18 style':<31} {cost[0]:>10} {cost[1]:>8}   {figures.percent(quality)}")
    cost = [figures.count(value) for value in costs["student"]]
    for name, values in results.items():
        spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        label = f"MobileNetV2 style, {name}" if name == "labels alone" else f"  {name}"
        lines.append(f"{label:<31} {cost[0]:>10} {cost[1]:>8}   {figures.percent(float(np.mean(values)))}{spread}")
    gains = 100 * (np.array(results["with the teacher"]) - np.array(results["labels alone"]))
    lines.append(f"gain by the teacher for each seed: {', '.join(f'{gain:+.1f}' for gain in gains)} points")
    if len(gains) > 1:
        # Student's t-distribution: two standard errors would be too narrow for so few seeds.
        reach = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
        verdict = "inside" if abs(gains.mean()) < reach else "outside"
        lines.append(f"mean {gains.mean():+.1f} ± {reach:.1f} (95 %, paired by seed): {verdict} the noise")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
