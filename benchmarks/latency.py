"""Latency of networks of usual size at half of their MACs on ONNX Runtime, and the table in docs/benchmarks.md.

The networks of timm have random weights, because weights do not change the latency. Kirsch and Torch-Pruning 1.6.1
prune each network by the importance "taylor" of random images, with different multiples of the widths. All files of a
network are timed in turn, on one thread and one image. Run it on an idle machine; it takes about 20 minutes.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/latency.py

Without Torch-Pruning, only the rows of Kirsch are measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch import figures
from kirsch.deploy.measure import compare_latencies
from kirsch.errors import GoalError
from kirsch.frameworks.pytorch.io.vision import import_beside
from kirsch.measurement.machine import cpu, version_of

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, END = "<!-- table: written by benchmarks/latency.py -->", "<!-- end of the table of latencies -->"
NETWORKS = {
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenetv2_100",
    "EfficientNet-B0": "efficientnet_b0",
    "ViT-S/16": "vit_small_patch16_224",
}
IMAGE, FRACTION, ROUNDS = torch.zeros(1, 3, 224, 224), 0.5, 30
ROUND_TO = ("auto", 16, 1)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and labels."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 224, 224, generator=random), torch.arange(8)


def by_kirsch(model: nn.Module, round_to: Any) -> nn.Module:
    """Return the network pruned by Kirsch with its default ranking."""
    graph = kirsch.trace(model, IMAGE)
    plan = kirsch.plan(graph, kirsch.Goal(macs=FRACTION), importance="taylor", data=[samples()], round_to=round_to)
    pruned: nn.Module = kirsch.prune(model, plan)
    return pruned


def by_peer(model: nn.Module, round_to: int | None) -> nn.Module:
    """Return the network pruned by Torch-Pruning, in steps of 2 % of the channels until the MACs are reached."""
    import torch_pruning  # noqa: PLC0415 - optional

    model = copy.deepcopy(model)
    inputs, labels = samples()
    attention = {module.qkv: module.num_heads for module in model.modules() if hasattr(module, "qkv")}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        IMAGE,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=50,
        ignored_layers=[model.get_classifier()],
        num_heads=attention,
        round_to=round_to,
    )
    macs = lambda: torch_pruning.utils.count_ops_and_params(model, IMAGE)[0]  # noqa: E731 - short
    target = FRACTION * macs()
    while macs() > target:
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        pruner.step()
        for module in model.modules():  # timm's attention states the number of its heads and their width
            if module.__class__.__name__ == "Attention":
                module.head_dim = module.qkv.out_features // 3 // module.num_heads
    return model


def methods() -> dict[tuple[str, str], Callable[[nn.Module], nn.Module]]:
    """Return the functions that prune a network, by tool and multiple of the widths."""
    found: dict[tuple[str, str], Callable[[nn.Module], nn.Module]] = {
        ("Kirsch", f"round_to={multiple}"): lambda model, multiple=multiple: by_kirsch(model, multiple)
        for multiple in ROUND_TO
    }
    if importlib.util.find_spec("torch_pruning"):
        for multiple in (None, 16):
            found["Torch-Pruning", f"round_to={multiple}"] = lambda model, multiple=multiple: by_peer(model, multiple)
    return found


def rows_of(title: str, name: str) -> list[str]:
    """Return the rows of one network."""
    torch.manual_seed(0)
    model = import_beside("timm").create_model(name).eval()
    original = kirsch.trace(model, IMAGE).cost.macs
    with tempfile.TemporaryDirectory() as folder:
        files, macs, failed = {"original": Path(folder) / "original.onnx"}, {}, {}
        kirsch.export(model, files["original"], example_inputs=IMAGE)
        for number, (method, prune) in enumerate(methods().items()):
            file = Path(folder) / f"{number}.onnx"
            try:
                small = prune(model).eval()
                macs[method] = kirsch.trace(small, IMAGE).cost.macs / original
                kirsch.export(small, file, example_inputs=IMAGE)
            except Exception as error:  # noqa: BLE001 - the row states that the tool failed
                failed[method] = "goal out of reach" if isinstance(error, GoalError) else type(error).__name__
                continue
            files[" ".join(method)] = file
        compared = compare_latencies(files, IMAGE.numpy(), reference="original", rounds=ROUNDS, threads=1)
    rows = []
    for tool, option in methods():
        if (tool, option) in failed:
            rows.append(f"| {title} | {tool} | `{option}` | {failed[tool, option]} | – | – |")
            continue
        speedup, fraction = compared.speedups[f"{tool} {option}"], macs[tool, option]
        times = figures.ratio(speedup.value, speedup.low, speedup.high)
        cells = f"{fraction:.1%} | {times} | {speedup.value * fraction:.2f}"
        rows.append(f"| {title} | {tool} | `{option}` | {cells} |")
    print("\n".join(rows), flush=True)
    return rows


def main() -> None:
    """Measure all networks, and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [row for title, name in NETWORKS.items() for row in rows_of(title, name)]
    machine = f"onnxruntime {version_of('onnxruntime')}, {cpu()[0]}, {datetime.now(UTC):%Y-%m-%d}"
    head = f"`python benchmarks/latency.py` writes this table; {machine}."
    table = ["| network | tool | widths | MACs | times faster | ÷ MACs ratio |", "|---|---|---|---:|---:|---:|", *lines]
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text("\n\n".join([before + START, head, "\n".join(table), END]) + rest.split(END)[1])


if __name__ == "__main__":
    main()
