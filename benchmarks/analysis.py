"""Measure time and memory of the analysis, of plans and of cuts, and write docs/scale.md.

The models of the first two tables are on the meta device: they have shapes without values. Models that are cut have
values. Each row runs in a separate process, so that its peak memory is measured separately. Times are processor times.

    python benchmarks/analysis.py                # all; also writes the rows to build/analysis.json
    python benchmarks/analysis.py --only depth   # a language model with 1, 2, 4 ... 80 layers
    python benchmarks/analysis.py --only surgery # cut half of every group, compared with a copy of the kept weights
    python benchmarks/analysis.py --only stages  # trace, plan, prune and verify a model
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kirsch
from kirsch.frameworks.pytorch.io.vision import import_beside
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.graph.plan import Plan, Removal
from kirsch.measurement.machine import cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

ROOT = Path(__file__).parents[1]
SHAPE_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SHAPE_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 80)
LARGEST_PLANNED = 100_000_000
"""Number of parameters up to which plans are timed."""
GOALS = (0.8, 0.6, 0.5, 0.4)


def _language(layers: int, shape: dict[str, int]) -> tuple[nn.Module, Any]:
    import_beside("torchvision")
    library = import_beside("transformers")
    config = library.LlamaConfig(vocab_size=32000, num_hidden_layers=layers, use_cache=False, **shape)
    return library.LlamaForCausalLM(config), {"input_ids": torch.arange(8).unsqueeze(0)}


def _vision(name: str, library: str = "torchvision.models") -> tuple[nn.Module, Any]:
    module = import_beside(library)
    model = module.create_model(name) if library == "timm" else getattr(module, name)()
    return model, torch.zeros(1, 3, 224, 224)


ROWS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": partial(_vision, "resnet50"),
    "resnet152": partial(_vision, "resnet152"),
    "shufflenet_v2_x1_0": partial(_vision, "shufflenet_v2_x1_0"),
    "convnext_xlarge": partial(_vision, "convnext_xlarge", "timm"),
    "vit_h_14": partial(_vision, "vit_h_14"),
    "language, 7 B": partial(_language, 32, SHAPE_7B),
    "language, 70 B": partial(_language, 80, SHAPE_70B),
}
BY_DEPTH: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    f"{layers} layer{'s' * (layers > 1)}": partial(_language, layers, SHAPE_7B) for layers in DEPTHS
}
CUTS = {f"{name} cut": (name, False) for name in ("resnet50", "resnet152", "vit_h_14")}
CUTS |= {f"{name} cut and verified": (name, True) for name in ("resnet50", "resnet152", "vit_l_16")}

STAGES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], dict[str, Any]]] = {
    "resnet50 in stages": (partial(_vision, "resnet50"), {}),
    "vit_b_16 in stages": (partial(_vision, "vit_b_16"), {}),
    "language, 1 B in stages": (partial(_language, 16, SHAPE_1B), {}),
    "language, 1 B, loadable=False in stages": (partial(_language, 16, SHAPE_1B), {"loadable": False}),
}
"""Name of each row → function that builds the model, and options of the plan."""

SETS = {"sizes": ROWS, "depth": BY_DEPTH, "surgery": CUTS, "stages": STAGES}


def measure(build: Callable[[], tuple[nn.Module, Any]]) -> dict[str, Any]:
    """Return the row of one model: times, sizes and peak memory of trace, analysis and plans."""
    with torch.device("meta"):
        model, inputs = build()
    inputs = {k: v.to("meta") for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to("meta")
    before = _peak_memory()
    start = time.process_time()
    graph = kirsch.trace(model.eval(), inputs)
    traced = time.process_time()
    groups = graph.groups
    solved = time.process_time()
    plans = []
    for goal in GOALS if graph.cost.parameters < LARGEST_PLANNED else ():
        began = time.process_time()
        kirsch.plan(graph, kirsch.Goal(macs=goal), importance="random")
        plans.append(time.process_time() - began)
    return {
        "parameters": graph.cost.parameters,
        "trace_s": traced - start,
        "analysis_s": solved - traced,
        "ratio": (solved - traced) / (traced - start),
        "groups": len(groups),
        "units": sum(group.size for group in groups),
        "labels": graph.facts.count,
        "memory_mib": _peak_memory(),
        "memory_before_mib": before,
        "plans_s": plans,
    }


def measure_cut(build: Callable[[], tuple[nn.Module, Any]], *, verify: bool) -> dict[str, Any]:
    """Return the row of one cut, which removes every second unit of each group of a model with values."""
    with torch.device("meta"):
        model, _ = build()
    model.to_empty(device="cpu").eval()
    for value in _tensors(model):
        value.detach().fill_(0.01)
    graph = kirsch.trace(model, torch.full((1, 3, 224, 224), 0.5))
    odd = {group.name: tuple(range(1, group.size, 2)) for group in graph.groups}
    removals = tuple(Removal(g.name, g.kind, g.size, odd[g.name], "every other") for g in graph.groups)
    keep = graph.keep(odd)
    plan = Plan(graph.fingerprint, graph.model_name, removals, graph.cost, graph.prices.price(keep), graph=graph)
    before = _resident()
    start = time.process_time()
    pruned = kirsch.prune(model, plan, verify=verify)
    done = time.process_time()
    peak, both_models = _peak_memory(), _mib(model) + _mib(pruned)
    del pruned
    began = time.process_time()
    part = cut(model, graph, keep)
    ended = time.process_time()
    copies = [value.detach().clone() for value in _tensors(part)]
    copied = time.process_time()
    copies = [_select(old.detach(), new.shape) for old, new in zip(_tensors(model), _tensors(part), strict=True)]
    return {
        "model_mib": _mib(model),
        "pruned_mib": _mib(part),
        "prune_s": done - start,
        "cut_s": ended - began,
        "copy_of_kept_s": copied - ended,
        "selects_s": time.process_time() - copied,
        "tensors": len(copies),
        "before_mib": before,
        "peak_mib": peak,
        "additional_memory": (peak - before + _mib(model)) / both_models - 1,
    }


def measure_stages(build: Callable[[], tuple[nn.Module, Any]], options: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a model with random weights that is pruned to half of its MACs: times and peak memory."""
    model, inputs = build()
    inputs = inputs if isinstance(inputs, dict) else torch.randn(inputs.shape)
    times = [time.process_time()]
    graph = kirsch.trace(model.eval(), inputs)
    times.append(time.process_time())
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5), **options)
    times.append(time.process_time())
    before = _resident()
    pruned = kirsch.prune(model, plan)
    times.append(time.process_time())
    peak, sizes = _peak_memory(), (_mib(model), _mib(pruned))
    del pruned
    began = time.process_time()
    kirsch.prune(model, plan, verify=False)
    alone = time.process_time() - began
    traced, planned, verified = (after - start for start, after in itertools.pairwise(times))
    return {
        "model_mib": sizes[0],
        "pruned_mib": sizes[1],
        "trace_s": traced,
        "plan_s": planned,
        "prune_s": alone,
        "verification_s": verified - alone,
        "additional_memory": (peak - before + sizes[0]) / sum(sizes) - 1,
    }


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _select(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a tensor of the given shape that has the entries of `value` at evenly spaced indices of each axis."""
    for axis, size in enumerate(shape):
        if size < value.shape[axis]:
            value = value.index_select(axis, torch.arange(size) * (value.shape[axis] // size))
    return value


def _mib(model: nn.Module) -> int:
    """Return the size of the parameters and buffers, in MiB."""
    return sum(value.nbytes for value in _tensors(model)) >> 20


def _resident() -> int:
    """Return the resident memory of the process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def _peak_memory() -> int:
    """Return the peak memory of the process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the text of docs/scale.md."""
    parts = [HEAD.format(machine=f"{cpu()[0]}, one thread, torch {torch.__version__}", date=datetime.now(UTC).date())]
    heads = {"sizes": "## By size", "depth": DEPTH_HEAD}
    for key, head in heads.items():
        lines = ["| | parameters | trace | analysis | analysis ÷ trace | groups | units | peak memory | plans |"]
        lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
        for name in SETS[key]:
            if name in found:
                row = found[name]
                plans = ", ".join(f"{1e3 * seconds:.0f}" for seconds in row["plans_s"])
                lines.append(
                    f"| {name} | {row['parameters'] / 1e6:,.0f} M | {row['trace_s']:.2f} s | {row['analysis_s']:.3f} s "
                    f"| {row['ratio']:.1%} | {row['groups']} | {row['units']:,} | {row['memory_mib']} MiB "
                    f"| {plans + ' ms' if plans else '–'} |"
                )
        parts += [head, "\n".join(lines)]
    lines = [
        "| | model → pruned | cut | copy of kept weights | selection of kept weights | prune | additional memory |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name in (name for name in CUTS if name in found):
        row = found[name]
        times = " | ".join(f"{row[key]:.3f} s" for key in ("cut_s", "copy_of_kept_s", "selects_s", "prune_s"))
        size = f"{row['model_mib']} → {row['pruned_mib']} MiB"
        lines.append(f"| {name} | {size} | {times} | {row['additional_memory']:+.0%} |")
    return "\n\n".join([*parts, "## Cuts", "\n".join(lines), STAGES_HEAD, _stages(found)]) + "\n"


def _stages(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of trace, plan, prune and verification."""
    lines = ["| | model → pruned | trace | plan | prune | verification | additional memory |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name in (name for name in STAGES if name in found):
        row = found[name]
        times = " | ".join(f"{row[key]:.1f} s" for key in ("trace_s", "plan_s", "prune_s", "verification_s"))
        size = f"{row['model_mib']} → {row['pruned_mib']} MiB"
        lines.append(f"| {name.removesuffix(' in stages')} | {size} | {times} | {row['additional_memory']:+.0%} |")
    return "\n".join(lines)


HEAD = """# Scale

<!-- written by benchmarks/analysis.py; do not edit -->

This page shows how time and memory grow with the size of a model. All times are processor times. Rows that repeat a
model are separate runs: their times differ by up to 15 %, and those below 0.1 s by more.

The first two tables are about the analysis. The models are on the meta device: they have shapes without values.
"Language" models are Llama models.

- *Trace*: time of `kirsch.trace`, which exports the model. It does not include the coupling analysis.
- *Analysis*: time of the coupling analysis, which finds the groups when `graph.groups` is first read.
- *Plans*: times of four calls of `kirsch.plan` with different goals, which use the same analysis. They were not
  measured for models with more than 100 million parameters.

In the last table, half of the units of each group (every second one) are removed from a float32 model.

- *Cut*: time to copy the model with only the kept units.
- *Copy of kept weights*: time to copy the tensors of the pruned model.
- *Selection of kept weights*, for comparison with the cut: time to select evenly spaced entries from each original
  tensor, as many as the plan keeps.
- *Prune*: time of `kirsch.prune`. The rows "cut" run it without the verification, the rows "cut and verified" with it.
  A verification computes in float64; a weight is converted while an operation reads it.
- *Additional memory*: (peak memory - memory before `kirsch.prune` - size of the pruned model) / (size of the original
  + size of the pruned model). 0 % means that the process grew by the pruned model only; values near 0 are within the
  measurement error.

`python benchmarks/analysis.py` writes this page; measured on {machine}, {date}."""


STAGES_HEAD = """## Stages

Models with random weights are traced, planned with the goal of half of their MACs, pruned and verified, with one
example input. The additional memory is that of `kirsch.prune` with the verification. A part of it is memory that the
allocator of glibc keeps: with `MALLOC_MMAP_THRESHOLD_=4000000` in the environment, that of vit_b_16 is 50 %."""


DEPTH_HEAD = """## By depth

Llama models with the layer sizes of the 7 B model and 1 to 80 layers:

![time by layers](pictures/depth.svg)"""


def growth(rows: dict[int, dict[str, Any]]) -> str:
    """Return an SVG of the times of trace and analysis by number of layers, each with its own scale.

    Args:
        rows: number of layers → row.
    """
    width, height, left, bottom = 560, 220, 40, 190
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-size="12" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" fill="#868e96">'
    )
    parts = [
        head,
        "<title>time by layers</title>",
        f'<path d="M{left} 10V{bottom}H{width - 10}" fill="none" stroke="#868e96"/>',
        f'<text x="{width - 10}" y="{height - 6}" text-anchor="end">layers, 1 to {max(DEPTHS)}</text>',
    ]
    for key, name, color, y in (("trace_s", "trace", "#868e96", 24), ("analysis_s", "analysis", "#d6336c", 40)):
        most = max((row[key] for row in rows.values()), default=1.0)
        points = [
            (left + (width - left - 20) * depth / max(DEPTHS), bottom - (bottom - 20) * row[key] / most)
            for depth, row in rows.items()
        ]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
        parts.append(f'<text x="{left + 10}" y="{y}" fill="{color}">{name}, up to {most:.1f} s</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SETS)
    parser.add_argument("--row")
    options = parser.parse_args()
    if options.row:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        name, verify = CUTS.get(options.row, (options.row, False))
        build = {**ROWS, **BY_DEPTH}.get(name, partial(_vision, name))
        if options.row in STAGES:
            print(json.dumps(measure_stages(*STAGES[options.row])))
        else:
            print(json.dumps(measure_cut(build, verify=verify) if options.row in CUTS else measure(build)))
        return
    out = ROOT / "build/analysis.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    for name in [name for key, names in SETS.items() if options.only in (None, key) for name in names]:
        command = [sys.executable, "-W", "ignore", __file__, "--row", name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - this file
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, found[name])
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(found, indent=1))
    (ROOT / "docs/scale.md").write_text(page(found))
    by_depth = {depth: found[name] for depth, name in zip(DEPTHS, BY_DEPTH, strict=True) if name in found}
    (ROOT / "docs/pictures/depth.svg").write_text(growth(by_depth))


if __name__ == "__main__":
    main()
