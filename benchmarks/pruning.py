"""Accuracy after pruning by Kirsch and by Torch-Pruning 1.6.1, and the tables in docs/benchmarks.md.

A ResNet-56 with public weights, a small MobileNetV2 and a small vision transformer are pruned to fixed fractions of
their MACs, and trained for the same number of steps with the same data, augmentation, optimizer and schedule. Each
method is compared before and after this training.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/pruning.py run --networks resnet56 vit mobilenet --seeds 0 1 2
    python benchmarks/pruning.py latency --networks resnet56    # on an idle machine
    python benchmarks/pruning.py table

Each finished row is appended to benchmarks/pruning.jsonl; rows that the file already has are not run again. Needs
CIFAR-10 and the weights of the ResNet-56 in `$KIRSCH_DATA` (default ../shared/data). Without Torch-Pruning, only the
rows of Kirsch are run.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pruning_networks import BATCH, FEW, IMAGE, NETWORKS, Case, base, calibration, macs
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch import figures
from kirsch.deploy.measure import compare_latencies
from kirsch.measurement.machine import cpu, version_of

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "benchmarks" / "pruning.jsonl", ROOT / "docs" / "benchmarks.md"
START, END = "<!-- tables: written by benchmarks/pruning.py -->", "<!-- end of the tables of pruning -->"

if TYPE_CHECKING:
    from collections.abc import Callable

SPARSE_STRENGTH = 5e-4
"""Strength of the sparse training: that of the examples of Torch-Pruning."""


@dataclass(frozen=True)
class Method:
    """A way to a small network.

    Args:
        tool: the library.
        name: description of the method in the tables.
        prune: takes the case and the network, which may have been trained to be sparse; returns a small network.
        sparse: returns the options of `train` for the first half of the steps, before pruning; None: no such training.
        teacher: whether the training after pruning has the original as teacher.
    """

    tool: str
    name: str
    prune: Callable[[Case, nn.Module], nn.Module]
    sparse: Callable[[nn.Module], dict[str, Any]] | None = None
    teacher: bool = False


def by_kirsch(compensate: list[str] | None = None, **options: Any) -> Callable[[Case, nn.Module], nn.Module]:
    """Return the function that prunes by Kirsch with options of `kirsch.plan`."""

    def prune(case: Case, model: nn.Module) -> nn.Module:
        inputs, labels = calibration(case.seed)
        graph = kirsch.trace(model, IMAGE)
        without_data = ("magnitude", "bn_scale", "fpgm", "random")
        needs_data = options.get("importance", "magnitude") not in without_data or options.get("ranking") == "milp"
        data = [(inputs, labels)] if needs_data else None
        goal = kirsch.Goal(macs=case.fraction)
        plan = kirsch.plan(graph, goal, data=data, seed=case.seed, progress=False, **options)
        pruned: nn.Module = kirsch.prune(
            model, plan, compensate=compensate, data=None if compensate is None else [inputs]
        )
        return pruned

    return prune


def in_rounds(rounds: int, **options: Any) -> Callable[[Case, nn.Module], nn.Module]:
    """Return the function that prunes by Kirsch in several rounds without training, with new importances in each."""

    def prune(case: Case, model: nn.Module) -> nn.Module:
        data = [calibration(case.seed)]
        goal, original = kirsch.Goal(macs=case.fraction), kirsch.trace(model, IMAGE).cost
        for part in goal.rounds(rounds, of=original):
            graph = kirsch.trace(model, IMAGE)
            model = kirsch.prune(model, kirsch.plan(graph, part, data=data, progress=False, **options))
        return model

    return prune


def by_peer(importance: str, *, labels: bool = False, **options: Any) -> Callable[[Case, nn.Module], nn.Module]:
    """Return the function that prunes by Torch-Pruning, in up to 100 steps until the MACs are reached."""

    def prune(case: Case, model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        pruner = peer_pruner(model, importance, **options)
        inputs, targets = calibration(case.seed)
        target = case.fraction * macs(model)
        while macs(model) > target:
            if labels:
                model.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
            pruner.step()
        return model

    return prune


def peer_pruner(model: nn.Module, importance: str, pruner: str = "BasePruner", **options: Any) -> Any:
    """Return a pruner of Torch-Pruning for all layers but the classifier."""
    import torch_pruning  # noqa: PLC0415 - optional

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return getattr(torch_pruning.pruner, pruner)(
        model,
        IMAGE,
        importance=getattr(torch_pruning.importance, importance)(),
        pruning_ratio=1.0,
        iterative_steps=100,
        ignored_layers=[classifier],
        num_heads={module: module.num_heads for module in attention},
        **options,
    )


KIRSCH, TORCH_PRUNING, NONE = "Kirsch", "Torch-Pruning", "–"


def group_lasso(model: nn.Module) -> dict[str, Any]:
    """Return the penalty of Kirsch's group lasso."""
    return {"penalty": kirsch.GroupLasso(kirsch.trace(model, IMAGE), SPARSE_STRENGTH)}


def peer_sparsity(model: nn.Module) -> dict[str, Any]:
    """Return the regularization of Torch-Pruning's group norm, which changes the gradients."""
    pruner = peer_pruner(model, "GroupMagnitudeImportance", "GroupNormPruner", reg=SPARSE_STRENGTH, global_pruning=True)
    return {"change_gradients": pruner.regularize}


def narrower(case: Case, _model: nn.Module) -> nn.Module:
    """Return a narrower network with random weights."""
    torch.manual_seed(case.seed)
    return NETWORKS[case.network].narrower(case.fraction)


DEFAULTS = {"importance": "taylor", "ranking": "milp"}
"""What the recipes of Kirsch choose for these networks; the rows below change one of these options."""
DEFAULT = by_kirsch(**DEFAULTS)
BLOCKS = {"importance": "change", "kinds": "block"}
PER_COST = {"importance": "taylor", "ranking": "per_cost"}
BLOCKS_AND_UNITS = DEFAULTS | {"kinds": {"block": 1.0}}
PEER_TAYLOR = by_peer("GroupTaylorImportance", labels=True, global_pruning=True)
METHODS = (
    Method(KIRSCH, "defaults: taylor, milp, round_to auto, with teacher", DEFAULT, teacher=True),
    Method(TORCH_PRUNING, "magnitude, global", by_peer("GroupMagnitudeImportance", global_pruning=True)),
    Method(TORCH_PRUNING, "Taylor, global", PEER_TAYLOR),
    Method(TORCH_PRUNING, "Taylor, global, with Kirsch's teacher", PEER_TAYLOR, teacher=True),
    Method(
        TORCH_PRUNING,
        "sparse training, then group norm, global",
        by_peer("GroupMagnitudeImportance", pruner="GroupNormPruner", global_pruning=True),
        peer_sparsity,
    ),
    Method(KIRSCH, "ranking per_cost", by_kirsch(**PER_COST), teacher=True),
    Method(KIRSCH, "of whole blocks and units", by_kirsch(**BLOCKS_AND_UNITS), teacher=True),
    Method(KIRSCH, "ranking per_cost, in 8 rounds, round_to=1", in_rounds(8, **PER_COST, round_to=1), teacher=True),
    Method(KIRSCH, "ranking per_cost, round_to=1", by_kirsch(**PER_COST, round_to=1), teacher=True),
    Method(KIRSCH, "whole blocks, by the change of the outputs", by_kirsch(**BLOCKS), teacher=True),
    Method(KIRSCH, "ranking per_cost, round_to=16", by_kirsch(**PER_COST, round_to=16), teacher=True),
    Method(KIRSCH, "ranking per_cost, in 8 rounds", in_rounds(8, **PER_COST), teacher=True),
    Method(TORCH_PRUNING, "defaults: magnitude, local", by_peer("GroupMagnitudeImportance")),
    Method(KIRSCH, "without teacher", DEFAULT),
    Method(KIRSCH, "magnitude, ranking global", by_kirsch(ranking="global"), teacher=True),
    Method(NONE, "narrower network from random weights, with teacher", narrower, teacher=True),
    Method(KIRSCH, "random units of each layer", by_kirsch(importance="random", ranking="local")),
    Method(KIRSCH, "with least squares", by_kirsch(["least_squares"], **DEFAULTS), teacher=True),
    Method(KIRSCH, "after training with group lasso", DEFAULT, group_lasso, teacher=True),
    *(
        Method(KIRSCH, f"ranking {ranking}", by_kirsch(**DEFAULTS | {"ranking": ranking}), teacher=True)
        for ranking in ("global", "isomorphic", "local")
    ),
    *(
        Method(KIRSCH, name, by_kirsch(**DEFAULTS | {"importance": name}), teacher=True)
        for name in ("fisher", "bn_scale", "fpgm", "activation")
    ),
)
"""The methods, those first whose rows matter most."""


def known_rows() -> list[dict[str, Any]]:
    """Return the finished rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


def write(row: dict[str, Any]) -> None:
    """Append a row."""
    row |= {"machine": cpu()[0], "torch": version_of("torch"), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def run(network: str, fraction: float, seed: int, count: int) -> None:
    """Prune and train a network by the first methods, unless they have a row."""
    keys = ("network", "fraction", "seed", "tool", "method")
    done = {tuple(row.get(key) for key in keys) for row in known_rows()}
    short = round(fraction, 3)
    methods = [method for method in METHODS[:count] if (network, short, seed, method.tool, method.name) not in done]
    if importlib.util.find_spec("torch_pruning") is None:
        methods = [method for method in methods if method.tool != TORCH_PRUNING]
    if not methods:
        return
    case = Case(network, fraction, seed, base(network, seed))
    before = {"macs": macs(case.original), "accuracy": case.accuracy(case.original)}
    shared: dict[Any, nn.Module] = {}
    for method in methods:
        row: dict[str, Any] = dict(zip(keys, (network, short, seed, method.tool, method.name), strict=True))
        begun = time.process_time()
        try:
            small, steps = pruned(case, method, shared)
        except Exception as error:  # noqa: BLE001 - a tool that fails on the network is a result
            write(row | {"error": f"{type(error).__name__}: {error}"[:200]})
            continue
        row["original"] = before["accuracy"]
        row |= {"macs": macs(small) / before["macs"], "parameters": sum(p.numel() for p in small.parameters())}
        row["one_shot"] = case.accuracy(small, FEW)
        if seed == 0:
            kirsch.export(small, onnx_file(network, fraction, method), example_inputs=IMAGE)
        case.train(small, steps, teacher=case.original if method.teacher else None)
        write(row | {"trained": case.accuracy(small), "cpu": round(time.process_time() - begun)})


def pruned(case: Case, method: Method, shared: dict[Any, nn.Module]) -> tuple[nn.Module, int]:
    """Return the small network of a method, and the number of steps that are left for the training after pruning.

    `shared` has the pruned networks by function that prunes, so that methods that differ in the training alone prune
    once.
    """
    steps = NETWORKS[case.network].steps
    if method.sparse is None:
        if method.prune not in shared:
            shared[method.prune] = method.prune(case, case.original)
        return copy.deepcopy(shared[method.prune]), steps
    model = copy.deepcopy(case.original)
    case.train(model, steps // 2, **method.sparse(model))
    return method.prune(case, model), steps - steps // 2


def onnx_file(network: str, fraction: float, method: Method) -> Path:
    """Return the path of the exported small network, whose latency is measured by the command `latency`."""
    name = re.sub(r"\W+", "-", f"{network} {fraction:.3f} {method.tool} {method.name}").strip("-").lower()
    return ROOT / "build" / "pruning" / f"{name}.onnx"


def latency(network: str, fraction: float) -> None:
    """Measure the small networks of seed 0 on ONNX Runtime, in turn with the original, and write a row for each."""
    original = ROOT / "build" / "pruning" / f"{network}.onnx"
    kirsch.export(base(network, 0), original, example_inputs=IMAGE)
    rows = {(row["network"], row["fraction"], row["tool"], row["method"]): row for row in known_rows()}
    files = {"original": original}
    for method in METHODS:
        file = onnx_file(network, fraction, method)
        if file.is_file() and (network, round(fraction, 3), method.tool, method.name) in rows:
            files[f"{method.tool}: {method.name}"] = file
    compared = compare_latencies(files, IMAGE.numpy(), reference="original", rounds=100, threads=1)
    for method in METHODS:
        if (found := compared.speedups.get(f"{method.tool}: {method.name}")) is not None:
            row = {"network": network, "fraction": round(fraction, 3), "tool": method.tool, "method": method.name}
            write(row | {"speedup": found.value, "low": found.low, "high": found.high, "runtime": compared.runtime})


HEAD = """\
{original:.1f} % before pruning. {steps} steps of {batch} images after it; with sparse training, half of these steps
come before it. Mean of {seeds} seeds ± standard deviation; numbers without ± are of one seed."""


def table(network: str, fraction: float) -> list[str]:
    """Return the table of a network and a goal."""
    short, settings = round(fraction, 3), NETWORKS[network]
    rows = [row for row in known_rows() if (row["network"], row["fraction"]) == (network, short)]
    trained = [row for row in rows if "trained" in row]
    if not trained:
        return []
    seeds = sorted({row["seed"] for row in trained})
    original = np.mean([row["original"] for row in trained])
    lines = [
        f"### {settings.title}, 1/{1 / fraction:.3g} of the MACs",
        "",
        HEAD.format(original=original, steps=settings.steps, batch=BATCH, seeds=len(seeds)),
        "",
        "| tool | method | one-shot, % | trained, % | parameters | MACs | times faster | ÷ MACs ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    complete = {method: [row for row in trained if is_by(row, method)] for method in METHODS}
    means = {method: np.mean([row["trained"] for row in found]) for method, found in complete.items() if found}
    for method in METHODS:
        if not (found := complete[method]):
            failed = next((row["error"] for row in rows if "error" in row and is_by(row, method)), None)
            if failed is not None:
                reason = "goal out of reach" if failed.startswith("GoalError") else failed.replace("|", "/")
                lines.append(f"| {method.tool} | {method.name} | {reason} | – | – | – | – | – |")
            continue
        speed = next((row for row in reversed(rows) if "speedup" in row and is_by(row, method)), None)
        ratio = float(np.mean([row["macs"] for row in found]))
        cells = [spread([row[key] for row in found]) for key in ("one_shot", "trained")]
        if means[method] == max(means.values()):
            cells[1] = f"**{cells[1]}**"
        cells += [figures.count(round(np.mean([row["parameters"] for row in found]))), f"{ratio:.1%}"]
        cells += ["–", "–"] if speed is None else [f"{speed['speedup']:.2f}", f"{speed['speedup'] * ratio:.2f}"]
        lines.append(f"| {method.tool} | {method.name} | {' | '.join(cells)} |")
    return lines


def is_by(row: dict[str, Any], method: Method) -> bool:
    """Return whether a row belongs to a method."""
    return (row["tool"], row["method"]) == (method.tool, method.name)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation, or one value."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def page() -> str:
    """Return the text between the markers of the page."""
    rows = known_rows()
    machines, dates = (", ".join(sorted({row[key] for row in rows})) for key in ("machine", "date"))
    hours = sum(row.get("cpu", 0) for row in rows) / 3600
    head = f"`python benchmarks/pruning.py` writes these tables; {hours:.1f} hours of one core of {machines}, {dates}."
    tables = [table(name, fraction) for name, network in NETWORKS.items() for fraction in network.fractions]
    return "\n\n".join([START, head, *("\n".join(lines) for lines in tables if lines), END])


def main() -> None:
    """Run the benchmark, measure latencies, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "latency", "table"))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--first", type=int, default=len(METHODS), help="run only the first methods")
    arguments = parser.parse_args()
    if arguments.command == "table":
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(before + page() + rest.split(END)[1])
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in arguments.seeds if arguments.command == "run" else [0]:
        for name in arguments.networks:
            for fraction in NETWORKS[name].fractions:
                run(name, fraction, seed, arguments.first) if arguments.command == "run" else latency(name, fraction)


if __name__ == "__main__":
    main()
