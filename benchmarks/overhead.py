"""Time a training step with a teacher, with a store and in a hand-written loop; write a table in docs/benchmarks.md.

The three pairs are ResNets for CIFAR (He et al. 2015; names of the wide networks as in Tian et al. 2020,
arXiv:1910.10699). The time is the processor time between the ends of two steps, on one thread. All variants are
measured in turn in one process. Each ratio is the median over the rounds.

    python benchmarks/overhead.py    # about ten minutes; also writes the rows to build/overhead.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.data.augment import Chain, Crop, Flip
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import fit
from kirsch.distillation.store import TopK, build_store
from kirsch.frameworks.training import TrainingHooks
from kirsch.measurement.machine import cpu, load

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
START, END = "<!-- table: written by benchmarks/overhead.py -->", "<!-- end of table -->"
BATCH, STEPS, ROUNDS = 64, 8, 5
PAIRS = {
    "ResNet-56 → ResNet-20": ((56, (16, 16, 32, 64)), (20, (16, 16, 32, 64))),
    "ResNet-110 → ResNet-20": ((110, (16, 16, 32, 64)), (20, (16, 16, 32, 64))),
    "ResNet-32×4 → ResNet-8×4": ((32, (32, 64, 128, 256)), (8, (32, 64, 128, 256))),
}
"""Pair → (depth, widths of stem and stages) of the teacher, and the same of the student."""


class Block(nn.Module):
    """Residual block of two convolutions, with a projection if the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        project = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if before == after and stride == 1 else project

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (N, C', H', W') for a map (N, C, H, W)."""
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet(depth: int, widths: tuple[int, ...]) -> nn.Module:
    """Return a ResNet with three stages of (depth - 2) / 6 blocks."""
    before = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(3, before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU(inplace=True)]
    for stage, width in enumerate(widths[1:]):
        for block in range((depth - 2) // 6):
            layers.append(Block(before, width, 2 if stage and not block else 1))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 100))


class Clock:
    """Processor time between the ends of steps, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self) -> None:
        """Record the end of a step."""
        self.ends.append(time.process_time())

    def step(self) -> float:
        """Return the median time of a step. The first two steps are slower, and are left out."""
        return float(np.median(np.diff(self.ends)[1:]))


def by_hand(student: nn.Module, teacher: nn.Module, data: ArrayData, clock: Clock) -> None:
    """Train one epoch on soft targets and labels with as few operations as possible."""
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for batch in data.epoch(0, 0):
        inputs, labels = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        with torch.no_grad():
            soft = teacher(inputs).div(4).log_softmax(-1)
        logits = student(inputs)
        kl = F.kl_div(logits.div(4).log_softmax(-1), soft, log_target=True, reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * 16 * kl
        if not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock()


def measure(pair: str) -> dict[str, float]:
    """Return the time of a plain step and the ratios of one pair."""
    torch.manual_seed(0)
    teacher, student = (resnet(*shape) for shape in PAIRS[pair])
    teacher.eval()
    random = np.random.default_rng(0)
    inputs = random.standard_normal((BATCH * STEPS, 3, 32, 32)).astype(np.float32)
    data = ArrayData(
        inputs, random.integers(0, 100, len(inputs)), batch_size=BATCH, augment=Chain(Crop(4), Flip()), views=1, seed=0
    )
    training = kirsch.Training(epochs=1, learning_rate=0.01, schedule="constant")
    objective = kirsch.Objective.kd(temperature=4.0, weight=0.9)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(folder, teacher, data, keep=TopK(10), temperature=4.0)

        def distill(source: Any, clock: Clock) -> None:
            hooks = TrainingHooks(stop=clock, event=lambda _event: None)
            kirsch.distill(
                student, source, data, objective=objective, training=training, hooks=hooks, check_teacher=False
            )

        variants: dict[str, Callable[[Clock], Any]] = {
            "plain": lambda clock: fit(student, data, training=training, hooks=TrainingHooks(stop=clock)),
            "store": lambda clock: distill(store, clock),
            "teacher": lambda clock: distill(teacher, clock),
            "hand": lambda clock: by_hand(copy.deepcopy(student), teacher, data, clock),
        }
        for _ in range(ROUNDS):
            for name, variant in variants.items():
                clock = Clock()
                variant(clock)
                times.setdefault(name, []).append(clock.step())
    baselines = {"store": "plain", "teacher": "plain", "hand": "teacher"}
    ratios = {name: [a / b for a, b in zip(times[name], times[base], strict=True)] for name, base in baselines.items()}
    return {
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "store": statistics.median(ratios["store"]),
        "teacher": statistics.median(ratios["teacher"]),
        "over_hand": statistics.median(1 / ratio for ratio in ratios["hand"]),
    }


def table(rows: dict[str, dict[str, float]], date: str) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        START,
        f"`python benchmarks/overhead.py` writes this table; measured on {cpu()[0]}, one thread, {date}.",
        "",
        "| teacher → student | labels only | with a store | with the teacher | `kirsch.distill` ÷ hand-written loop |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        ratios = f"{row['store']:.2f}× | {row['teacher']:.2f}× | {row['over_hand']:.2f}"
        lines.append(f"| {name} | {row['plain_ms']:.0f} ms per step | {ratios} |")
    return "\n".join([*lines, END])


def main() -> None:
    """Measure, and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    date, before = datetime.now(UTC).date().isoformat(), load()
    rows = {}
    for name in PAIRS:
        rows[name] = measure(name)
        print(name, rows[name], flush=True)
    out = ROOT / "build" / "overhead.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"date": date, "cpu": cpu()[0], "load_before": before, "rows": rows}, indent=1))
    text = PAGE.read_text()
    PAGE.write_text(
        text[: text.index(START)] + table(rows, date) + text[text.index(END, text.index(START)) + len(END) :]
    )
    print(table(rows, date))


if __name__ == "__main__":
    main()
