"""Measure which public models are pruned correctly, and write docs/coverage.md.

Each model runs in its own process. It is traced, pruned to half of its MACs, verified, trained for one step, saved,
loaded and exported. A second, harder plan that removes half of the units of every group is only verified. With
`--peer`, Torch-Pruning (`pip install torch-pruning`) prunes the same model with its defaults.

    python benchmarks/coverage.py                 # all models, two at a time; also writes the rows to build/
    python benchmarks/coverage.py --only 'timm/*' # the models whose name matches
    python benchmarks/coverage.py --list others   # the models that were not used during development
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from zoo import MODELS, OTHERS, Recipe

import kirsch
from kirsch.errors import GoalError, KirschError
from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.frameworks.pytorch.inference.predict import arguments
from kirsch.frameworks.pytorch.modules.submodule import inputs_of, part_of
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.verification.verify import verify
from kirsch.measurement.machine import cpu

if TYPE_CHECKING:
    from torch import nn

    from kirsch.graph.graph import Graph

REACHABLE = 99
"""Percent of the MACs. A model cannot be pruned if more than this percentage of its MACs must remain."""
PRUNED_BELOW = 0.98
"""If the peer keeps at least this fraction of the parameters, its result is "nothing pruned"."""
ROOT = Path(__file__).parents[1]
LISTS = {"tuned": MODELS, "others": OTHERS}
LIMIT = 1800
PEER_LIMIT = 120
"""Time limits of the process of a model, with Kirsch and with the peer, in seconds.

The slowest model takes 9 minutes on an idle machine.
"""


def coverage_row(recipe: Recipe) -> dict[str, Any]:
    """Return the row of a model: measurements, result, and the error if there was one."""
    row: dict[str, Any] = {"library": recipe.library, "name": recipe.name, "stage": "build"}
    try:
        model, inputs = recipe.build()
        _check(row, recipe, model, inputs)
        row["result"] = "correct"
    except KirschError as error:
        row |= {"result": "refused", "why": str(error)}
    except Exception as error:  # noqa: BLE001 - every error is a result
        row |= {"result": "wrong", "why": f"{type(error).__name__} at {row['stage']}: {str(error)[:400]}"}
    return row


def _check(row: dict[str, Any], recipe: Recipe, model: nn.Module, inputs: Any) -> None:
    """Trace, prune, load, train and export a model, and write the measurements to its row."""
    _shapes(model, *arguments(inputs))  # some models fill their buffers in the first forward pass
    row["stage"] = "trace"
    trainable = training_error(model, inputs) is None
    start = time.perf_counter()
    graph = kirsch.trace(model, inputs, module=recipe.module)
    row["trace"] = time.perf_counter() - start
    row["stage"] = "analysis"
    start = time.perf_counter()
    row["groups"] = len(graph.groups)
    row["analysis"] = time.perf_counter() - start
    row["parameters"] = graph.cost.parameters
    row["prunable"] = 1 - sum(blocker.share for blocker in graph.blockers)
    row["blockers"] = [(b.reason, b.where, b.source, b.operation, b.share) for b in graph.blockers[:6]]
    part = part_of(model, recipe.module)
    part_inputs = inputs_of(model, recipe.module, inputs) if recipe.module else inputs
    _require_equal("cost", (graph.cost.parameters, graph.cost.macs), count(part, part_inputs))
    row["full"] = prune_half_of_every_group(part, graph, row)
    row["stage"] = "depth"
    row["blocks"], row["depth"] = len(graph.blocks), remove_half_of_the_blocks(model, graph, inputs)
    row["stage"] = "plan"
    plan = half_macs_plan(graph, row)
    row["stage"] = "prune"
    start = time.perf_counter()
    result = kirsch.prune_with_verification(model, plan)
    row["prune"] = time.perf_counter() - start
    row["macs"], row["error"] = plan.after.macs / plan.before.macs, result.verification.error
    pruned_part = part_of(result.model, recipe.module)
    _require_equal("cost", (plan.after.parameters, plan.after.macs), count(pruned_part, part_inputs))
    row["stage"] = "load"
    _save_and_load(recipe, result.model, inputs)
    row["stage"] = "train"
    if trainable:
        why = training_error(result.model, inputs)
        if why is not None:
            raise RuntimeError(why)
    row["stage"] = "export"
    row["export"] = _export(model, result.model, inputs)
    row["stage"] = "done"


def _require_equal(name: str, predicted: Any, counted: Any) -> None:
    if tuple(predicted) != tuple(counted):
        raise AssertionError(f"{name}: predicted {tuple(predicted)}, counted {tuple(counted)}")


def half_macs_plan(graph: Graph, row: dict[str, Any]) -> kirsch.Plan:
    """Return a plan that removes half of the MACs, or, if this is impossible, half of the MACs that can be removed."""
    try:
        return kirsch.plan(graph, kirsch.Goal(macs=0.5))
    except GoalError as error:
        least = re.search(r"([\d.]+)% is the least", str(error))
        if least is None or float(least.group(1)) > REACHABLE:
            raise
        row["goal"] = str(error)
        return kirsch.plan(graph, kirsch.Goal(macs=(1 + float(least.group(1)) / 100) / 2))


def prune_half_of_every_group(model: nn.Module, graph: Graph, row: dict[str, Any]) -> str:
    """Remove half of the units of every group, and return "correct" or the text of the error."""
    row["stage"] = "full plan"
    random = np.random.default_rng(0)
    removed: dict[str, tuple[int, ...]] = {}
    for group in graph.groups:
        units = random.choice(group.size, group.size // 2, replace=False).tolist()
        trial = {**removed, group.name: tuple(sorted(units))}
        if graph.too_small(graph.keep(trial)) is None:
            removed = trial
    keep = graph.keep(removed)
    row["full_kept"] = graph.prices.price(keep).parameters / graph.cost.parameters
    try:
        row["full_error"] = verify(cut(model, graph, keep), model, graph, keep).error
    except KirschError as error:
        return str(error)
    return "correct"


def remove_half_of_the_blocks(model: nn.Module, graph: Graph, inputs: Any) -> str:
    """Remove random residual blocks with half of the blocks' MACs.

    Returns:
        "correct", the text of the error, or "" for a model without blocks.
    """
    if not graph.blocks:
        return ""
    least = graph.prices.price(graph.keep({}), graph.blocks).macs / max(graph.cost.macs, 1)
    try:
        plan = kirsch.plan(graph, kirsch.Goal(macs=(1 + least) / 2), kinds="block", importance="random")
        result = kirsch.prune_with_verification(model, plan)
        part = part_of(result.model, graph.tracing.module)
        part_inputs = inputs_of(model, graph.tracing.module, inputs) if graph.tracing.module else inputs
        _require_equal("cost without blocks", (plan.after.parameters, plan.after.macs), count(part, part_inputs))
    except KirschError as error:
        return str(error)
    return "correct"


def training_error(model: nn.Module, inputs: Any) -> str | None:
    """Train a copy for one step; return the text of the error, or None."""
    twin, (args, options) = copy.deepcopy(model).train(), arguments(inputs)
    try:
        outputs = [t for t in tree_leaves(_plain(twin(*args, **options))) if isinstance(t, torch.Tensor)]
        sum(t.float().square().mean() for t in outputs if t.requires_grad).backward()  # type: ignore[union-attr]
    except Exception as error:  # noqa: BLE001 - detectors, for example, need targets
        return f"{type(error).__name__}: {error}"
    torch.optim.SGD(twin.parameters(), 1e-3).step()
    return None


def _plain(outputs: Any) -> Any:
    return outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs


def _save_and_load(recipe: Recipe, pruned: nn.Module, inputs: Any) -> None:
    args, options = arguments(inputs)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        kirsch.save(pruned, Path(folder) / "model")
        again = kirsch.load(Path(folder) / "model", lambda: recipe.build()[0]).eval()
        both = []
        for model in (pruned.eval(), again):
            torch.manual_seed(0)
            out = tree_leaves(_plain(model(*args, **options)))
            both.append([t for t in out if isinstance(t, torch.Tensor)])
    if len(both[0]) != len(both[1]) or not all(torch.equal(a, b) for a, b in zip(*both, strict=True)):
        raise AssertionError("the loaded model returns other outputs")


def _export(model: nn.Module, pruned: nn.Module, inputs: Any) -> str:
    """Export the pruned model.

    Returns:
        "correct", or the text of the error if the original cannot be exported either.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            kirsch.export(pruned, Path(folder) / "pruned.onnx", example_inputs=inputs)
        except KirschError as error:
            try:
                kirsch.export(model, Path(folder) / "original.onnx", example_inputs=inputs)
            except KirschError:
                return f"the original cannot be exported either: {error}"
            raise
    return "correct"


def peer(recipe: Recipe) -> str:
    """Return the result of Torch-Pruning with its defaults, which removes half of each group except the classifier."""
    import torch_pruning  # noqa: PLC0415 - only needed for --peer

    model, inputs = recipe.build()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    args, options = arguments(inputs)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    names = ("fc", "head", "classifier", "lm_head", "score")
    heads = [m for n, m in model.named_modules() if n.split(".")[-1] in names and isinstance(m, torch.nn.Linear)]
    before = sum(parameter.numel() for parameter in model.parameters())
    shapes = _shapes(model, args, options)
    try:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.BasePruner(
            model,
            options or (args[0] if len(args) == 1 else args),
            importance=importance,
            pruning_ratio=0.5,
            ignored_layers=heads or layers[-1:],
        ).step()
        after = _shapes(model, args, options)
    except Exception as error:  # noqa: BLE001 - a crash is a result
        return f"crash: {type(error).__name__}"
    kept = sum(parameter.numel() for parameter in model.parameters()) / before
    if after != shapes:
        return "output of another shape"
    return f"runs, {kept:.0%} kept" if kept < PRUNED_BELOW else "nothing pruned"


def _shapes(model: nn.Module, args: Any, options: Any) -> list[Any]:
    with torch.no_grad():
        return [t.shape for t in tree_leaves(_plain(model(*args, **options))) if isinstance(t, torch.Tensor)]


def in_process(recipe: Recipe, which: str, verb: str, limit: float) -> dict[str, Any]:
    """Run `coverage_row` or `peer` in a separate process with a time limit in seconds, and return the row."""
    command = [sys.executable, "-W", "ignore", __file__, "--list", which, verb, f"{recipe.library}/{recipe.name}"]
    failed = {"library": recipe.library, "name": recipe.name, "result": "wrong"}
    try:
        run = subprocess.run(  # noqa: S603 - this file
            command, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return failed | {"why": f"more than {limit} s", "peer": "timeout"}
    last = run.stdout.splitlines()[-1:] or [""]
    if not last[0].startswith("{"):
        return failed | {"why": (run.stderr.strip().splitlines() or ["died"])[-1][:300], "peer": "crash: died"}
    found: dict[str, Any] = json.loads(last[0])
    return found


def page(lists: dict[str, list[dict[str, Any]]]) -> str:
    """Return the text of docs/coverage.md."""
    heads = {
        "tuned": "## Models that were used during development",
        "others": OTHERS_HEAD,
    }
    machine = f"{cpu()[0]}, one thread each, torch {torch.__version__}"
    parts = [HEAD.format(machine=machine, date=datetime.now(UTC).date())]
    for which, rows in lists.items():
        if rows:
            parts += [heads[which], summary(rows), reasons(rows), table(rows)]
    return "\n\n".join(parts) + "\n"


HEAD = """# Coverage

<!-- written by benchmarks/coverage.py; do not edit -->

This page shows which public models Kirsch prunes correctly. The models have random weights and small inputs. Each model
runs in its own process: Kirsch traces it, prunes it to half of its MACs with a plan of `kirsch.plan`, and verifies the
returned module. The pruned model is then trained for one step, saved, loaded into a newly built model, and exported to
ONNX. If half of the MACs cannot be removed, the plan removes half of the MACs that can be removed.

- *Result*: **correct** if all of these steps succeed; **refused** if Kirsch raises an error that names the cause;
  **wrong** in all other cases.
- *Groups*: number of groups of units that can be removed.
- *Prunable*: share of the parameters that are not frozen.
- *MACs*: MACs of the pruned model, as a fraction of the original.
- *Error*: largest difference between the outputs of the pruned model and of the [masked original](glossary.md),
  relative to the largest output, computed in float64.
- *Half of all*: result of a harder plan, which removes half of the units of every group.
- *Blocks*: number of residual blocks, and the result of removing randomly chosen blocks that together have half of the
  MACs of all blocks.
- *Trace* and *analysis*: time of `kirsch.trace`, and of the coupling analysis, which then finds the groups.
- *Peer*, if present: Torch-Pruning with its defaults on the same model. This column only says whether the pruned model
  runs and has the same output shapes, not whether its outputs are correct. "kept" is the fraction of the parameters
  that remain.

For detectors, only the backbone is pruned (`module="backbone"`). The other parts choose boxes depending on the values
of the scores, which cannot be traced.

`python benchmarks/coverage.py` writes this page; `--peer` adds the last column. Measured on {machine}, {date}."""


OTHERS_HEAD = """## Models that were not used during development

The first run on these models found two errors, which are fixed. `kirsch.load` failed for models that fill buffers in
their first forward pass. In the masked original, a maximum over units included the removed units. The models "by
hand" were written for this page."""

REASONS = """\
The reasons that freeze the most parameters, in total over all models, follow. The sign "…" stands for
a name or a number in the code of the model."""


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a table of the numbers of results by library."""
    compared = any("peer" in row for row in rows)
    lines = [
        "| | models | correct | refused | wrong | half of all correct | prunable, mean |" + " peer runs |" * compared,
        "|---|---|---|---|---|---|---|" + "---|" * compared,
    ]
    libraries = dict.fromkeys(row["library"] for row in rows)
    for library in [*libraries, "all"]:
        selected = [row for row in rows if library in (row["library"], "all")]
        count_of = [sum(row["result"] == result for row in selected) for result in ("correct", "refused", "wrong")]
        full = sum(row.get("full") == "correct" for row in selected)
        shares = [row["prunable"] for row in selected if "prunable" in row]
        mean = f"{np.mean(shares):.1%}" if shares else "–"
        peers = f" {sum(row.get('peer', '').startswith('runs') for row in selected)} |" if compared else ""
        lines.append(f"| {library} | {len(selected)} | {' | '.join(map(str, count_of))} | {full} | {mean} |{peers}")
    return "\n".join(lines)


def reasons(rows: list[dict[str, Any]]) -> str:
    """Return the models that are not correct, and the reasons that freeze most parameters, as lists."""
    lines = [f"- {row['library']} {row['name']}, {row['result']}: {row['why']}" for row in rows if "why" in row]
    lines = ["Not correct:", "", *(lines or ["- none"]), "", REASONS, ""]
    shares: dict[str, list[float]] = {}
    for row in rows:
        for reason, *_, share in row.get("blockers", ()):
            general = re.sub(r"[`'\"][^`'\"]*[`'\"]|\d+", "…", reason)
            general = re.sub(", …(?= cannot be updated)", " and …", general)
            shares.setdefault(general, []).append(share)
    most = sorted(shares.items(), key=lambda item: -sum(item[1]))[:12]
    for reason, found in most:
        models, owner = ("1 model", "its") if len(found) == 1 else (f"{len(found)} models", "their")
        lines.append(f"- {reason}: {models}, {np.mean(found):.1%} of {owner} parameters")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one row per model."""
    compared = any("peer" in row for row in rows)
    lines = [
        "| model | result | groups | prunable | MACs | error | half of all | blocks | trace | analysis |"
        + " peer |" * compared,
        "|---|---|---|---|---|---|---|---|---|---|" + "---|" * compared,
    ]
    for row in rows:
        cells = [
            f"{row['library']} {row['name']}",
            row["result"],
            str(row.get("groups", "–")),
            f"{row['prunable']:.1%}" if "prunable" in row else "–",
            f"{row['macs']:.1%}" if "macs" in row else "–",
            f"{row['error']:.0e}" if "error" in row else "–",
            "–" if "full" not in row else "correct" if row["full"] == "correct" else "refused",
            _blocks(row),
            f"{row['trace']:.1f} s" if "trace" in row else "–",
            f"{row['analysis'] * 1e3:.0f} ms" if "analysis" in row else "–",
            *([row.get("peer", "–")] if compared else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _blocks(row: dict[str, Any]) -> str:
    if not row.get("blocks"):
        return "–"
    return f"{row['blocks']}, {'correct' if row['depth'] == 'correct' else 'refused'}"


def stored(which: str) -> dict[str, dict[str, Any]]:
    """Return the rows of earlier runs by name of the model."""
    out = ROOT / f"build/coverage-{which}.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {f"{row['library']}/{row['name']}": row for row in rows}


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", choices=LISTS, default="tuned", dest="which")
    parser.add_argument("--only", default="*")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("verb", nargs="?", choices=["row", "peer"])
    parser.add_argument("model", nargs="?")
    options = parser.parse_args()
    models = {f"{recipe.library}/{recipe.name}": recipe for recipe in LISTS[options.which]}
    if options.verb is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        recipe = models[options.model]
        print(json.dumps(coverage_row(recipe) if options.verb == "row" else {"peer": peer(recipe)}))
        return
    out = ROOT / f"build/coverage-{options.which}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = stored(options.which)
    missing = [name for name in models if fnmatch.fnmatch(name, options.only) and name not in rows]

    def run(name: str) -> dict[str, Any]:
        row = in_process(models[name], options.which, "row", LIMIT)
        if options.peer:
            row["peer"] = in_process(models[name], options.which, "peer", PEER_LIMIT).get("peer", "timeout")
        return row

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool, out.open("a") as file:
        for row in pool.map(run, missing):
            rows[f"{row['library']}/{row['name']}"] = row
            print(json.dumps(row), file=file, flush=True)
            print(f"{row['library']}/{row['name']}: {row['result']}, all: {row.get('full')}, {row.get('why', '')}")
    found = {which: stored(which) for which in LISTS}
    order = {which: [f"{recipe.library}/{recipe.name}" for recipe in recipes] for which, recipes in LISTS.items()}
    text = page({which: [rows[name] for name in order[which] if name in rows] for which, rows in found.items()})
    (ROOT / "docs/coverage.md").write_text(text)


if __name__ == "__main__":
    main()
