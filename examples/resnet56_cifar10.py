"""Prune a ResNet-56 with public weights to half of its MACs, and recover its accuracy by distillation.

Residual streams are pruned, too. The example needs CIFAR-10 and the public weights in `$KIRSCH_DATA` (default
../shared/data), and stops with a message if they are missing. It takes about 8 minutes on two cores. The accuracy
falls to chance after pruning; a few epochs on a fifth of the training images recover most of it. `--quick` takes less
than a minute and only shows the steps.

The same job as a recipe, with a report: kirsch compress examples/resnet56_cifar10.yaml
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from resnet56 import resnet56

import kirsch
from kirsch import figures
from kirsch.data.sources.cifar10 import cifar10
from kirsch.deploy.measure import compare_latencies
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import DataError
from kirsch.graph import coupling, group
from kirsch.tasks.classification import accuracy, compare_paired

if TYPE_CHECKING:
    from kirsch.measurement.statistics import Rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, one epoch")
    quick = parser.parse_args().quick
    try:
        teacher = resnet56()
        data = cifar10(seed=0, train=512 if quick else 10_000, validation=500, test=500 if quick else 10_000)
    except (DataError, FileNotFoundError) as error:
        print(f"skipped: {error}")
        return 0
    image = torch.zeros(1, 3, 32, 32)

    started = time.perf_counter()
    graph = kirsch.trace(teacher, image)
    traced = time.perf_counter()
    print(f"trace {traced - started:.1f} s, analysis of {len(graph.groups)} groups {_analysis(graph):.3f} s")
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5))
    removed = {removal.name: len(removal.removed) for removal in plan.groups}
    for found in graph.groups:
        if len(found.layers) > 3:
            print(f"  stream of {found.name}: {found.size} → {found.size - removed.get(found.name, 0)} channels")
    pruned = kirsch.prune_with_verification(teacher, plan)
    print(f"  {pruned.verification.text}")

    settings = kirsch.Training(epochs=1 if quick else 6, learning_rate=0.05, max_grad_norm=5.0)
    recovered = kirsch.distill(
        pruned.model,
        teacher,
        data.batches(128),
        objective=kirsch.Objective.kd(temperature=4.0, weight=0.9),
        training=settings,
        validation=(data.validation.inputs, data.validation.labels),
    ).model

    with tempfile.TemporaryDirectory() as folder:
        models = {"original": teacher, "pruned": pruned.model, "recovered": recovered}
        paths = {
            name: kirsch.export(model, Path(folder) / f"{name}.onnx", example_inputs=image).path
            for name, model in models.items()
        }
        times = compare_latencies(paths, image.numpy(), reference="original", rounds=10 if quick else 40)
        logits = {name: OnnxSession(path, threads=2).predict(data.test.inputs) for name, path in paths.items()}
        print(f"\n{'':<10} {'parameters':>10} {'MACs':>8} {'file':>9} {'accuracy':>15} {'latency':>9}  faster")
        for name in models:
            cost = plan.before if name == "original" else plan.after
            print(_row(name, cost, paths[name], accuracy(logits[name], data.test.labels), times))
    print(f"\n{compare_paired(logits['original'], logits['recovered'], data.test.labels).text}")
    print(f"{times.runtime}, 1 thread, batch of 1; the original against itself: {figures.ratio(**times.aa.to_dict())}")
    return 0


def _analysis(graph: kirsch.Graph) -> float:
    """Return the time to repeat the coupling analysis of a graph, in seconds."""
    started = time.perf_counter()
    group.find_groups(coupling.solve(graph.facts), graph.axes)
    return time.perf_counter() - started


def _row(name: str, cost: object, path: Path, quality: Rate, times: object) -> str:
    gain = times.speedups[name]
    return (
        f"{name:<10} {figures.count(cost.parameters):>10} {figures.count(cost.macs):>8} "
        f"{figures.bytes_(path.stat().st_size):>9} {figures.interval(quality.value, quality.low, quality.high):>15} "
        f"{figures.micros(times.latencies[name].median_us):>9}  {figures.ratio(gain.value, gain.low, gain.high)}"
    )


if __name__ == "__main__":
    sys.exit(main())
