"""What the analysis costs beside the trace, by size and by depth, and what a second plan costs; prints JSON.

Models of billions of parameters live on the meta device: shapes without values. Each row runs in a process of its own,
so that its memory is its own; times are those of the processor.

    python benchmarks/analysis.py                # the sizes
    python benchmarks/analysis.py --depth        # one shape of a language model at 1, 2, 4 ... 80 layers
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

import kirsch
from kirsch.frameworks.pytorch.vision import import_beside

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 80)
SMALL = 100_000_000
"""Parameters; of larger models no plans are timed."""
GOALS = (0.8, 0.6, 0.5, 0.4)


def _language(layers: int, shape: dict[str, int]) -> tuple[nn.Module, Any]:
    import_beside("torchvision")
    library = import_beside("transformers")
    config = library.LlamaConfig(vocab_size=32000, num_hidden_layers=layers, use_cache=False, **shape)
    return library.LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}


def _vision(name: str, library: str = "torchvision.models") -> tuple[nn.Module, Any]:
    module = import_beside(library)
    model = module.create_model(name) if library == "timm" else getattr(module, name)()
    return model, torch.zeros(1, 3, 224, 224)


ROWS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": lambda: _vision("resnet50"),
    "resnet152": lambda: _vision("resnet152"),
    "shufflenet_v2_x1_0": lambda: _vision("shufflenet_v2_x1_0"),
    "convnext_xlarge": lambda: _vision("convnext_xlarge", "timm"),
    "vit_h_14": lambda: _vision("vit_h_14"),
    "language, 7 B": lambda: _language(32, SEVEN),
    "language, 70 B": lambda: _language(80, SEVENTY),
}
BY_DEPTH: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    f"{layers} layers": lambda layers=layers: _language(layers, SEVEN) for layers in DEPTHS
}


def measure(build: Callable[[], tuple[nn.Module, Any]]) -> dict[str, Any]:
    """One row."""
    with torch.device("meta"):
        model, inputs = build()
    inputs = {k: v.to("meta") for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to("meta")
    before = _memory()
    start = time.process_time()
    graph = kirsch.trace(model.eval(), inputs)
    traced = time.process_time()
    groups = graph.groups
    solved = time.process_time()
    plans = []
    for goal in GOALS if graph.cost.parameters < SMALL else ():
        began = time.process_time()
        kirsch.plan(graph, kirsch.Goal(macs=goal), "random")
        plans.append(time.process_time() - began)
    return {
        "parameters": graph.cost.parameters,
        "trace_s": traced - start,
        "analysis_s": solved - traced,
        "ratio": (solved - traced) / (traced - start),
        "groups": len(groups),
        "units": sum(group.size for group in groups),
        "labels": graph.facts.count,
        "memory_mib": _memory(),
        "of_that_before": before,
        "plans_s": plans,
    }


def _memory() -> int:
    """Peak of the process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", action="store_true")
    parser.add_argument("--row")
    given = parser.parse_args()
    rows = {**ROWS, **BY_DEPTH}
    if given.row:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps(measure(rows[given.row])))
        return
    found = {}
    for name in BY_DEPTH if given.depth else ROWS:
        command = [sys.executable, "-W", "ignore", __file__, "--row", name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - this file
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, found[name], file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
