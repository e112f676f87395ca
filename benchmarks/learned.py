"""Learned rankings against fixed ones and random search: the figures of docs/learned_pruning.md.

A network is trained and pruned with the importance "magnitude" to a fraction of its MACs, with each ranking. Widths are
multiples of 4, because the networks are narrow. The searches have the same number of evaluations and the same starts;
their quality is minus the cross-entropy on a validation part that the training does not see. "random transformations"
draws what LeGR draws before its first mutation. Each pruned model is evaluated on the test part at once, with
batch-norm statistics of the validation part, and after a short recovery with labels.

Networks: a ResNet-8 on 16×16 images of CIFAR-10 (from the folder KIRSCH_DATA), and a MobileNetV2-like network and a
transformer encoder on the digits of scikit-learn. Wall time is that of one thread.

    python benchmarks/learned.py resnet 0    # one network and seed; writes build/learned-resnet-0.json
    python benchmarks/learned.py table       # prints the table of all of these files
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.data.sources import load_data
from kirsch.frameworks.find import framework_of
from kirsch.measurement.machine import environment
from kirsch.pruning.learned import search
from kirsch.pruning.learned.legr import Individual, evolve, mutated

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.pruning.learned.allocations import Allocations

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "build"
GOALS = (0.5, 0.35)
EVALUATIONS = 60
CALIBRATION = 256
BATCH = 64
TRAINING = {"resnet": (10, 0.1, 2), "mobilenet": (25, 0.05, 5), "transformer": (30, 2e-3, 5)}
"""Epochs of training, learning rate, and epochs of recovery, which has a fifth of the rate."""


class Residual(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if i != o else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both branches after a ReLU."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + (x if self.short is None else self.short(x))).relu()


class Inverted(nn.Module):
    """Inverted residual of MobileNetV2 with stride 1."""

    def __init__(self, i: int, o: int, expansion: int) -> None:
        super().__init__()
        hidden = i * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(i, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, o, 1, bias=False),
            nn.BatchNorm2d(o),
        )
        self.residual = i == o

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output, with the input added if it has as many channels."""
        y = self.layers(x)
        return x + y if self.residual else y


class Encoder(nn.Module):
    """Transformer encoder over the rows of an image."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits for images (N, 1, 8, 8)."""
        x = self.embed(x.squeeze(1)) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def build(network: str) -> nn.Module:
    """Return a network with random weights."""
    if network == "transformer":
        return Encoder()
    if network == "resnet":
        blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
        stem, width = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 64
    else:
        blocks = [Inverted(16, 16, 4), Inverted(16, 16, 4), Inverted(16, 24, 4), nn.MaxPool2d(2)]
        blocks += [Inverted(24, 24, 4), Inverted(24, 24, 4), Inverted(24, 32, 4), Inverted(32, 32, 4)]
        stem, width = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()], 32
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


Part = tuple[torch.Tensor, torch.Tensor]


def parts(network: str, seed: int) -> dict[str, Part]:
    """Return the training, validation and test part of the data of a network; the test part is that of any seed."""
    if network == "resnet":
        sizes = {"train": 5000, "validation": CALIBRATION, "test": 2000, "augment": False}
        data = load_data("cifar10", sizes, seed=seed, base=ROOT)
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        return {
            name: (F.avg_pool2d(torch.from_numpy(split.inputs), 2), torch.from_numpy(split.labels))
            for name, split in splits.items()
        }
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    order[:1097] = np.random.default_rng(seed).permutation(order[:1097])
    images, labels = (
        torch.from_numpy(digits.images[order, None] / 8 - 1).float(),
        torch.from_numpy(digits.target[order]),
    )
    bounds = {"validation": slice(CALIBRATION), "train": slice(CALIBRATION, 1097), "test": slice(1097, None)}
    return {name: (images[rows], labels[rows]) for name, rows in bounds.items()}


def accuracy(model: nn.Module, part: Part) -> float:
    """Return the accuracy of a model in inference mode."""
    model.eval()
    with torch.no_grad():
        return float((model(part[0]).argmax(1) == part[1]).float().mean())


def train(model: nn.Module, part: Part, network: str, *, recovery: bool, seed: int) -> nn.Module:
    """Train a model in place, and return it."""
    epochs, rate, short = TRAINING[network]
    epochs, rate = (short, rate / 5) if recovery else (epochs, rate)
    torch.manual_seed(seed)
    parameters = model.parameters()
    if network == "transformer":
        optimizer: Any = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(parameters, rate, 0.9, weight_decay=5e-4, nesterov=True)
    images, labels = part
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for start in range(0, len(labels) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            batch = images[rows]
            if network == "resnet" and torch.rand(()) < 0.5:  # noqa: PLR2004 - flip half of the batches
                batch = batch.flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def random_transformations(allocations: Allocations, random: np.random.Generator) -> None:
    """Evaluate global rankings of importances with random scales and shifts, as LeGR does at first."""
    groups = len(allocations.candidates)
    unchanged, changed = Individual(0.0, np.ones(groups), np.zeros(groups)), np.ones(groups, bool)
    while allocations.progress < 1:
        allocations.evaluate(allocations.of_scores(*mutated(unchanged, changed, allocations.candidates, 1.0, random)))


METHODS: dict[str, tuple[str, Callable[..., None] | None]] = {
    "global": ("global", None),
    "local": ("local", None),
    "isomorphic": ("isomorphic", None),
    "per_cost": ("per_cost", None),
    "milp": ("milp", None),
    "legr": ("legr", None),
    "random transformations": ("legr", random_transformations),
}
"""Ranking of each row, and the search that replaces the ranking's own."""


def measure(network: str, seed: int) -> list[dict[str, Any]]:
    """Return a row for each goal and method."""
    data = parts(network, seed)
    torch.manual_seed(seed)
    model = train(build(network), data["train"], network, recovery=False, seed=seed)
    dense = accuracy(model, data["test"])
    graph = kirsch.trace(model, data["test"][0][:1])
    rows = []
    for goal in GOALS:
        for name, (ranking, replacement) in METHODS.items():
            options: dict[str, Any] = {"data": [data["validation"]]} if ranking in ("legr", "milp") else {}
            options |= {"evaluations": EVALUATIONS} if ranking == "legr" else {}
            begun = time.perf_counter()
            with patch.object(search, "evolve", replacement or evolve):
                plan = kirsch.plan(graph, kirsch.Goal(macs=goal), ranking=ranking, round_to=4, seed=seed, **options)
            seconds = time.perf_counter() - begun
            pruned = kirsch.prune(model, plan, verify=False)
            images = data["validation"][0]
            framework_of(pruned).surgery.estimate_batch_norms(pruned, [(len(images), images)])
            validation, one_shot = (
                float(x) for x in (loss(pruned, data["validation"]), accuracy(pruned, data["test"]))
            )
            recovered = accuracy(train(pruned, data["train"], network, recovery=True, seed=seed), data["test"])
            row = {"network": network, "seed": seed, "macs": goal, "method": name, "seconds": seconds, "dense": dense}
            row |= {"one_shot": one_shot, "recovered": recovered, "validation_loss": validation}
            row |= {"reached_macs": plan.after.macs / plan.before.macs, "search": plan.method.get("search")}
            rows.append(row)
            print(
                network,
                seed,
                goal,
                name,
                f"{one_shot:.3f} {recovered:.3f} {validation:.3f} {seconds:.1f} s",
                flush=True,
            )
    return rows


def loss(model: nn.Module, part: Part) -> torch.Tensor:
    """Return the cross-entropy of a model in inference mode."""
    with torch.no_grad():
        return F.cross_entropy(model.eval()(part[0]), part[1])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over the seeds as a Markdown table."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["network"], row["macs"], row["method"]].append(row)
    lines = ["| network | MACs | ranking | loss on the calibration data | accuracy at once | recovered | seconds |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for network in TRAINING:
        for goal in GOALS:
            for method in METHODS:
                found = groups.get((network, goal, method), [])
                if found:
                    lines.append(line(network, goal, method, found))
    dense = {network: mean([row["dense"] for row in rows if row["network"] == network]) for network in TRAINING}
    unpruned = ", ".join(f"{network} {value:.1%}" for network, value in dense.items() if value == value)  # noqa: PLR0124
    seeds = len({row["seed"] for row in rows})
    machine = environment()
    head = (
        f"Means over {seeds} seeds, ± the standard error, "
        f"{EVALUATIONS} evaluations; {machine['cpu']}, one thread, shared machine, {datetime.now(UTC):%Y-%m-%d}. "
        f"Accuracy before pruning: {unpruned}."
    )
    return "\n".join([head, "", *lines])


def line(network: str, goal: float, method: str, found: list[dict[str, Any]]) -> str:
    """Return the table row of one network, goal and method."""
    cells = [f"{mean([row['validation_loss'] for row in found]):.3f}"]
    cells += [
        f"{mean(v):.1%} ± {100 * error(v):.1f}" for v in ([r[k] for r in found] for k in ("one_shot", "recovered"))
    ]
    return f"| {network} | {goal:.0%} | {method} | {' | '.join(cells)} | {mean([r['seconds'] for r in found]):.1f} |"


def mean(values: list[float]) -> float:
    """Return the mean; NaN of no values."""
    return statistics.fmean(values) if values else float("nan")


def error(values: list[float]) -> float:
    """Return the standard error of the mean; 0 for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    """Measure one network and seed, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[*TRAINING, "table"])
    parser.add_argument("seed", type=int, nargs="?", default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.network == "table":
        stored = [json.loads(path.read_text()) for path in sorted(ROWS.glob("learned-*.json"))]
        print(table([row for part in stored for row in part["rows"]]))
        return
    protocol = {"evaluations": EVALUATIONS, "calibration_samples": CALIBRATION, "batch": BATCH, "training": TRAINING}
    content = {"environment": environment(), "protocol": protocol, "rows": measure(given.network, given.seed)}
    ROWS.mkdir(exist_ok=True)
    (ROWS / f"learned-{given.network}-{given.seed}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
