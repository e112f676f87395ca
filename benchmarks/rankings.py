"""Compare rankings and importances at half of the MACs, and write the tables in docs/allocation.md.

Four small networks are trained, pruned once by each combination to 50 % of their MACs, and evaluated on test samples
before and after a short training without teacher. All combinations of a seed start from the same trained network, and
have the same calibration data and the same training. The test samples are not used to choose anything.

    python benchmarks/rankings.py run resnet mobilenet vit decoder --seeds 0 1 2
    python benchmarks/rankings.py table

Each finished row is appended to benchmarks/rankings.jsonl; rows that the file already has are not run again. Needs
CIFAR-10 and Multi30k in `$KIRSCH_DATA` (default ../shared/data). A few minutes of one core for each network and seed.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import sys
import time
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch import figures
from kirsch.data.sources.cifar10 import cifar10, data_folder
from kirsch.frameworks.find import framework_of
from kirsch.measurement.machine import cpu, version_of
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.importance.calibration import batches_for, loss_of
from kirsch.pruning.importance.importance import as_importance
from kirsch.pruning.importance.statistics import Statistics

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "benchmarks" / "rankings.jsonl", ROOT / "docs" / "allocation.md"
SECTION = """## Rankings and importances compared

Small networks, pruned once to half of their MACs. The best value of each column is bold, without a test of
significance. `random` removes random units of each layer, and shows what the ranking alone is worth."""
"""Beginning of the section with the tables, which is added to the page if it is missing."""
START, END = "<!-- tables: written by benchmarks/rankings.py -->", "<!-- end of tables -->"
sys.path.append(str(ROOT / "examples"))

from resnet_to_mobilenet import mobilenet, resnet  # noqa: E402 - the example's own networks

GOAL = kirsch.Goal(macs=0.5)
IMAGES, TEST, CALIBRATION, BATCH, CONTEXT = 4_000, 1_000, 64, 32, 32
RANKINGS = ("global", "local", "isomorphic", "per_cost", "milp")


class ViT(nn.Module):
    """A vision transformer of four layers with a class token, on patches of 8 × 8 pixels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        layers = [
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in "1234"
        ]
        self.layers, self.norm, self.head = nn.ModuleList(layers), nn.LayerNorm(width), nn.Linear(width, 10)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (N, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in "qkvo")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs, shape (N, L, C)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A decoder layer with a gated feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.RMSNorm(width), nn.RMSNorm(width), Attention(width, 4)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in "gu")
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs, shape (N, L, C)."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A causal language model of characters."""

    def __init__(self, tokens: int, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(tokens, width), nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.layers = nn.ModuleList([Layer(width) for _ in range(4)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (N, L, tokens)."""
        x = self.embedding(input_ids) + self.positions[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@cache
def images() -> tuple[torch.Tensor, ...]:
    """Return inputs and labels of the training and of the test images."""
    data = cifar10(seed=0, train=IMAGES, validation=1, test=TEST, augment=False)
    parts = (data.train.inputs, data.train.labels, data.test.inputs, data.test.labels)
    return tuple(map(torch.as_tensor, parts))


@cache
def text() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return sequences of characters of English captions for training and for test, and the number of characters."""
    folder = data_folder() / "multi30k"
    files = [folder / f"{name}.en.gz" for name in ("train", "test_2016_flickr")]
    texts = [gzip.decompress(file.read_bytes()).decode() for file in files]
    characters = {character: index for index, character in enumerate(sorted(set("".join(texts))))}
    rows = [[characters[c] for c in each[: len(each) // CONTEXT * CONTEXT]] for each in texts]
    train, test = (torch.tensor(each).reshape(-1, CONTEXT) for each in rows)
    return train, test[:300], len(characters)


def image_loss(model: nn.Module, rows: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return the loss of a batch of images, which are mirrored at random."""
    x, y, *_ = images()
    flip = torch.rand(len(rows), generator=random) < 0.5  # noqa: PLR2004 - a probability
    return F.cross_entropy(model(torch.where(flip[:, None, None, None], x[rows].flip(3), x[rows])), y[rows])


def text_loss(model: nn.Module, rows: torch.Tensor, _random: torch.Generator) -> torch.Tensor:
    """Return the loss of a batch of sequences."""
    tokens = text()[0][rows]
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(model: nn.Module, task: dict[str, Any], steps: int, rate: float, seed: int) -> nn.Module:
    """Return the model after some steps of AdamW with a one-cycle schedule."""
    model, random = model.train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        rows = torch.randint(task["samples"](), (BATCH,), generator=random)
        optimizer.zero_grad()
        task["loss"](model, rows, random).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the accuracy on the test images, in percent."""
    _, _, x, y = images()
    return 100 * float((torch.cat([model(part) for part in x.split(500)]).argmax(1) == y).float().mean())


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    """Return the perplexity of the test characters."""
    tokens = text()[1]
    return math.exp(F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


IMAGE_TASK = {
    "samples": lambda: IMAGES,
    "loss": image_loss,
    "quality": accuracy,
    "data": lambda rows: (images()[0][rows], images()[1][rows]),
    "label_loss": "cross-entropy",
    "importances": ("magnitude", "taylor", "random"),
    "unit": "accuracy, %",
    "steps": 500,
    "short_steps": 30,
    "kinds": ("channel", "head", "head dim", "ffn unit"),
    "rate": 3e-3,
}
TASKS: dict[str, dict[str, Any]] = {
    "resnet": IMAGE_TASK | {"model": partial(resnet, (16, 32, 64, 128), repeats=1)},
    "mobilenet": IMAGE_TASK | {"model": mobilenet},
    "vit": IMAGE_TASK | {"model": ViT, "rate": 1e-3, "steps": 700},
    "decoder": IMAGE_TASK
    | {
        "model": lambda: Decoder(text()[2]),
        "samples": lambda: len(text()[0]),
        "loss": text_loss,
        "quality": perplexity,
        "data": lambda rows: ({"input_ids": text()[0][rows]}, text()[0][rows]),
        "label_loss": "next-token",
        "importances": ("magnitude", "taylor", "wanda", "random"),
        "kinds": ("head", "ffn unit", "embedding dim"),  # "wanda" has no scores for the channels of heads
        "unit": "perplexity",
        "steps": 600,
        "rate": 3e-3,
    },
}


def known_rows() -> list[dict[str, Any]]:
    """Return the finished rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


def write(row: dict[str, Any]) -> None:
    """Append a row."""
    versions = {name: version_of(name) for name in ("torch", "scipy", "numpy")}
    row |= {"machine": cpu()[0], "versions": versions, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def scores_of(graph: Any, name: str, data: Any, task: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Return the importance of all units, which is computed once for all rankings."""
    chosen = IMPORTANCES[name]
    loss = task["label_loss"]
    batches = None if chosen.needs == "weights" else batches_for(chosen, data, loss)
    statistics = None if batches is None else Statistics(graph, batches, loss_of(loss), seed)
    groups = [group for group in graph.groups if group.kind in task["kinds"]]
    return {group.name: chosen(graph, group, norm=2, seed=seed, statistics=statistics) for group in groups}


def original(name: str, seed: int) -> nn.Module:
    """Return the trained network of a seed, which is stored for later runs."""
    task, file = TASKS[name], ROOT / "build" / "rankings" / f"{name}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = task["model"]()
    framework = framework_of(model)
    if file.is_file():
        framework.inference.load_weights(model, file)
        return model.eval()
    model = trained(model, task, task["steps"], task["rate"], seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    framework.inference.save_weights(model, file)
    return model


def run(name: str, seed: int) -> None:
    """Train a network, and prune it by all combinations that have no row yet."""
    task, done = TASKS[name], {(row["network"], row["seed"], row["importance"], row["ranking"]) for row in known_rows()}
    combinations = [(i, r) for i in task["importances"] for r in RANKINGS if (name, seed, i, r) not in done]
    if not combinations:
        return
    model = original(name, seed)
    inputs, labels = task["data"](torch.arange(CALIBRATION))
    example = {key: value[:1] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    graph, before = kirsch.trace(model, example), task["quality"](model)
    scores: dict[str, Any] = {}
    for importance, ranking in combinations:
        row: dict[str, Any] = {"network": name, "seed": seed, "importance": importance, "ranking": ranking}
        if importance not in scores:
            scores[importance] = scores_of(graph, importance, [(inputs, labels)], task, seed)
        needs, known = IMPORTANCES[importance].needs, scores[importance]
        known = as_importance(lambda _, group, known=known: known[group.name], importance, needs)
        reads = ranking == "milp" or needs != "weights"
        options = {"data": [(inputs, labels)], "loss": task["label_loss"]} if reads else {}
        options["kinds"] = [kind for kind in task["kinds"] if kind in {group.kind for group in graph.groups}]
        begun = time.process_time()
        plan = kirsch.plan(graph, GOAL, importance=known, ranking=ranking, progress=False, **options)
        row["plan_seconds"] = round(time.process_time() - begun, 1)
        pruned = kirsch.prune(model, plan)
        row |= {"original": before, "one_shot": task["quality"](pruned)}
        row |= {
            "macs": plan.after.macs / plan.before.macs,
            "parameters": plan.after.parameters / plan.before.parameters,
        }
        short = trained(copy.deepcopy(pruned), task, task["short_steps"], task["rate"] / 3, seed + 100)
        row["recovered"] = task["quality"](short)
        write(row)


def table(name: str) -> list[str]:
    """Return the table of a network: mean and standard deviation over the seeds that all combinations have."""
    task, rows = TASKS[name], [row for row in known_rows() if row["network"] == name]
    combinations = [(i, r) for i in task["importances"] for r in RANKINGS]
    by_seed = {seed: {(r["importance"], r["ranking"]): r for r in rows if r["seed"] == seed} for seed in range(100)}
    seeds = [seed for seed, found in by_seed.items() if all(each in found for each in combinations)]
    if not seeds:
        return []
    model, inputs = task["model"](), task["data"](torch.arange(1))[0]
    parameters, macs = framework_of(model).analysis.count(model, inputs)

    def cell(combination: tuple[str, str], key: str) -> str:
        values = np.array([by_seed[seed][combination][key] for seed in seeds])
        return f"{values.mean():.1f} ± {values.std(ddof=1) if len(seeds) > 1 else 0:.1f}"

    lower = task["unit"] == "perplexity"
    means = {
        (key, each): (1 if lower else -1) * float(np.mean([by_seed[seed][each][key] for seed in seeds]))
        for key in ("one_shot", "recovered")
        for each in combinations
    }
    best = {key: min(combinations, key=lambda each: means[key, each]) for key in ("one_shot", "recovered")}
    cost = f"{figures.count(parameters)} parameters, {figures.count(macs)} MACs"
    quality = f"{task['unit']} {cell(combinations[0], 'original')} before pruning"
    lines = [
        f"{TITLES[name]}: {cost}, {quality} ({len(seeds)} seeds, ± standard deviation).",
        "",
        "| importance | ranking | one-shot | after training | parameters left | seconds of the plan |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for each in combinations:
        shown = [
            f"**{cell(each, key)}**" if best[key] == each else cell(each, key) for key in ("one_shot", "recovered")
        ]
        left = np.mean([by_seed[seed][each]["parameters"] for seed in seeds])
        seconds = np.mean([by_seed[seed][each]["plan_seconds"] for seed in seeds])
        lines.append(f"| {each[0]} | {each[1]} | {' | '.join(shown)} | {left:.0%} | {seconds:.1f} |")
    return lines


TITLES = {
    "resnet": "A small ResNet on CIFAR-10",
    "mobilenet": "A small MobileNetV2 on CIFAR-10",
    "vit": "A small vision transformer on CIFAR-10",
    "decoder": "A small causal language model of characters, on the English captions of Multi30k",
}


def page() -> str:
    """Return the text between the markers of the page."""
    dates = sorted({(row["machine"], row["date"]) for row in known_rows()})
    measured = ", ".join(f"{machine}, {date}" for machine, date in dates)
    head = f"`python benchmarks/rankings.py` writes these tables; measured on {measured}."
    parts = [lines for lines in map(table, TASKS) if lines]
    return "\n\n".join([START, head, *("\n".join(lines) for lines in parts), END])


def main() -> None:
    """Run the benchmark, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("networks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.command == "table":
        text = PAGE.read_text()
        before, rest = text.split(START) if START in text else (f"{text}\n{SECTION}\n\n", f"{END}\n")
        PAGE.write_text(before + page() + rest.split(END)[1])
        return
    for name in arguments.networks:
        for seed in arguments.seeds:
            run(name, seed)


if __name__ == "__main__":
    main()
