"""What share of other people's models is pruned right, as modules and without configuration; writes docs/coverage.md.

Each model runs in a process of its own: traced, pruned to half of its MACs by the plan that `kirsch.plan` makes,
verified, trained for a step, saved, loaded, exported. Then half of every kind of unit goes, as a harder plan. With
`--peer` Torch-Pruning (`pip install torch-pruning`) does the same with its own defaults.

    python benchmarks/coverage.py                 # all, two at a time; rows go to build/, the page to docs/coverage.md
    python benchmarks/coverage.py --only 'timm/*' # those that match
    python benchmarks/coverage.py --list others   # the models that nobody tuned for
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
"""Percent; a model of which this much must stay cannot be pruned."""
TOUCHED = 0.98
"""A peer that leaves more than this share has pruned nothing to speak of."""
ROOT = Path(__file__).parents[1]
LISTS = {"tuned": MODELS, "others": OTHERS}
LIMIT = 900
PEER_LIMIT = 120


def one(recipe: Recipe) -> dict[str, Any]:
    """The row of a model; whatever goes wrong is in it."""
    row: dict[str, Any] = {"library": recipe.library, "name": recipe.name, "stage": "build"}
    try:
        model, inputs = recipe.build()
        _judge(row, recipe, model, inputs)
        row["result"] = "right"
    except KirschError as error:
        row |= {"result": "refused", "why": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is belongs into the row
        row |= {"result": "wrong", "why": f"{type(error).__name__} at {row['stage']}: {str(error)[:400]}"}
    return row


def _judge(row: dict[str, Any], recipe: Recipe, model: nn.Module, inputs: Any) -> None:
    _shapes(model, *arguments(inputs))  # some fill their buffers in their first run, as whoever has one has seen
    row["stage"] = "trace"
    trainable = trained(model, inputs) is None
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
    own = part_of(model, recipe.module)
    given = inputs_of(model, recipe.module, inputs) if recipe.module else inputs
    _same("cost", (graph.cost.parameters, graph.cost.macs), count(own, given))
    row["full"] = full(own, graph, row)
    row["stage"] = "depth"
    row["blocks"], row["depth"] = len(graph.blocks), depth(model, graph, inputs)
    row["stage"] = "plan"
    plan = planned(graph, row)
    row["stage"] = "prune"
    start = time.perf_counter()
    found = kirsch.prune_with_verification(model, plan)
    row["prune"] = time.perf_counter() - start
    row["macs"], row["error"] = plan.after.macs / plan.before.macs, found.verification.error
    _same("cost", (plan.after.parameters, plan.after.macs), count(part_of(found.model, recipe.module), given))
    row["stage"] = "load"
    _saved_and_loaded(recipe, found.model, inputs)
    row["stage"] = "train"
    if trainable:
        why = trained(found.model, inputs)
        if why is not None:
            raise RuntimeError(why)
    row["stage"] = "export"
    row["export"] = _exported(model, found.model, inputs)
    row["stage"] = "done"


def _same(what: str, said: Any, found: Any) -> None:
    if tuple(said) != tuple(found):
        raise AssertionError(f"{what}: {tuple(said)} was said, {tuple(found)} is found")


def planned(graph: Graph, row: dict[str, Any]) -> kirsch.Plan:
    """The plan for half of the MACs; if that is out of reach, for what lies half way to the least that is reachable."""
    try:
        return kirsch.plan(graph, kirsch.Goal(macs=0.5))
    except GoalError as error:
        least = re.search(r"([\d.]+)% is the least", str(error))
        if least is None or float(least.group(1)) > REACHABLE:
            raise
        row["goal"] = str(error)
        return kirsch.plan(graph, kirsch.Goal(macs=(1 + float(least.group(1)) / 100) / 2))


def full(model: nn.Module, graph: Graph, row: dict[str, Any]) -> str:
    """What stands against half of every group of units; "right" if nothing does."""
    row["stage"] = "full plan"
    random = np.random.default_rng(0)
    removed: dict[str, tuple[int, ...]] = {}
    for group in graph.groups:
        units = random.choice(group.size, group.size // 2, replace=False).tolist()
        trial = {**removed, group.name: tuple(sorted(units))}
        if graph.emptied(graph.keep(trial)) is None:
            removed = trial
    keep = graph.keep(removed)
    row["full_kept"] = graph.prices.price(keep).parameters / graph.cost.parameters
    try:
        row["full_error"] = verify(cut(model, graph, keep), model, graph, keep).error
    except KirschError as error:
        return str(error)
    return "right"


def depth(model: nn.Module, graph: Graph, inputs: Any) -> str:
    """What stands against leaving half of the residual blocks out; "right" if nothing does, "" without any."""
    if not graph.blocks:
        return ""
    least = graph.prices.price(graph.keep({}), graph.blocks).macs / max(graph.cost.macs, 1)
    try:
        plan = kirsch.plan(graph, kirsch.Goal(macs=(1 + least) / 2), kinds="block", data=inputs, importance="random")
        found = kirsch.prune_with_verification(model, plan)
        own = part_of(found.model, graph.tracing.module)
        given = inputs_of(model, graph.tracing.module, inputs) if graph.tracing.module else inputs
        _same("cost without blocks", (plan.after.parameters, plan.after.macs), count(own, given))
    except KirschError as error:
        return str(error)
    return "right"


def trained(model: nn.Module, inputs: Any) -> str | None:
    """What stands against one step of training of a copy; None if nothing does."""
    twin, (args, options) = copy.deepcopy(model).train(), arguments(inputs)
    try:
        outputs = [t for t in tree_leaves(_plain(twin(*args, **options))) if isinstance(t, torch.Tensor)]
        sum(t.float().square().mean() for t in outputs if t.requires_grad).backward()  # type: ignore[union-attr]
    except Exception as error:  # noqa: BLE001 - detectors, for one, want targets
        return f"{type(error).__name__}: {error}"
    torch.optim.SGD(twin.parameters(), 1e-3).step()
    return None


def _plain(outputs: Any) -> Any:
    return outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs


def _saved_and_loaded(recipe: Recipe, pruned: nn.Module, inputs: Any) -> None:
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
        raise AssertionError("the loaded model puts out something else")


def _exported(model: nn.Module, pruned: nn.Module, inputs: Any) -> str:
    """Why the ONNX file is none, "right" if it is one; what ailed the original already is not held against the cut."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            kirsch.export(pruned, Path(folder) / "pruned.onnx", example_inputs=inputs)
        except KirschError as error:
            try:
                kirsch.export(model, Path(folder) / "whole.onnx", example_inputs=inputs)
            except KirschError:
                return f"neither the original: {error}"
            raise
    return "right"


def peer(recipe: Recipe) -> str:
    """What Torch-Pruning makes of a model with its defaults: half of every group, the classifier left whole."""
    import torch_pruning  # noqa: PLC0415 - only where it is compared with

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
    except Exception as error:  # noqa: BLE001 - that is what is counted
        return f"crash: {type(error).__name__}"
    kept = sum(parameter.numel() for parameter in model.parameters()) / before
    if after != shapes:
        return "output of another shape"
    return f"runs, {kept:.0%} kept" if kept < TOUCHED else "nothing pruned"


def _shapes(model: nn.Module, args: Any, options: Any) -> list[Any]:
    with torch.no_grad():
        return [t.shape for t in tree_leaves(_plain(model(*args, **options))) if isinstance(t, torch.Tensor)]


def in_process(recipe: Recipe, which: str, verb: str, limit: float) -> dict[str, Any]:
    """`one` or `peer` in a process of its own, within a time limit."""
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
    """docs/coverage.md."""
    heads = {
        "tuned": "## The models that the rules were written with",
        "others": "## Models that the rules were not written with\n\nWhat their first run showed was fixed since: "
        "models that fill buffers in their first run are loaded; a maximum over units is that of what is kept.",
    }
    machine = f"{cpu()[0]}, one thread each, torch {torch.__version__}"
    parts = [HEAD.format(machine=machine, date=datetime.now(UTC).date())]
    for which, rows in lists.items():
        if rows:
            parts += [heads[which], summary(rows), reasons(rows), table(rows)]
    return "\n\n".join(parts) + "\n"


HEAD = """# Coverage

<!-- written by benchmarks/coverage.py; do not edit -->

Models of other people with random weights and small inputs, one process each: traced, cut to half of their MACs by the
plan that `kirsch.plan` makes by itself (or half way to the least that is reachable; see the column), verified as the
module that is returned, trained for a step, saved, loaded in a model built anew, exported to ONNX.

- **Right**: all of that. **Refused**: an error that names what stands in the way, before anything was returned.
  **Wrong**: anything else.
- *Half of all*: a harder plan, half of every group of units. *Prunable*: share of the parameters that is not frozen.
- *Blocks*: residual blocks that were found; half of them (by cost) were left out, at random, and that was verified.
- *Error*: largest difference from the masked original, relative to its largest output, in float64.
- Of detectors the backbone is cut in its place (`module="backbone"`): they select boxes by values.
- *Peer*, where there is such a column: Torch-Pruning with its defaults on the same model. That it runs and puts out the
  same shapes is all that is looked at, not whether it still computes the function of what it kept.

`python benchmarks/coverage.py` makes this page, with `--peer` that column too; here on {machine}, {date}."""


def summary(rows: list[dict[str, Any]]) -> str:
    """How many are right, by library."""
    compared = any("peer" in row for row in rows)
    lines = [
        "| | models | right | refused | wrong | half of all right | prunable, mean |" + " peer runs |" * compared,
        "|---|---|---|---|---|---|---|" + "---|" * compared,
    ]
    libraries = dict.fromkeys(row["library"] for row in rows)
    for library in [*libraries, "all"]:
        own = [row for row in rows if library in (row["library"], "all")]
        count_of = [sum(row["result"] == result for row in own) for result in ("right", "refused", "wrong")]
        full = sum(row.get("full") == "right" for row in own)
        shares = [row["prunable"] for row in own if "prunable" in row]
        mean = f"{np.mean(shares):.1%}" if shares else "–"
        peers = f" {sum(row.get('peer', '').startswith('runs') for row in own)} |" if compared else ""
        lines.append(f"| {library} | {len(own)} | {' | '.join(map(str, count_of))} | {full} | {mean} |{peers}")
    return "\n".join(lines)


def reasons(rows: list[dict[str, Any]]) -> str:
    """What was refused and why, and what blocks most."""
    lines = [f"- {row['library']} {row['name']}, {row['result']}: {row['why']}" for row in rows if "why" in row]
    lines = ["Not right:", "", *(lines or ["- none"]), "", "What keeps parameters from going, over all models:", ""]
    shares: dict[str, list[float]] = {}
    for row in rows:
        for reason, *_, share in row.get("blockers", ()):
            general = re.sub(r"[`'\"][^`'\"]*[`'\"]|\d+", "…", reason)
            shares.setdefault(general, []).append(share)
    most = sorted(shares.items(), key=lambda item: -sum(item[1]))[:12]
    lines += [f"- {reason}: in {len(found)} models, {np.mean(found):.1%} of their parameters" for reason, found in most]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each model."""
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
            "–" if "full" not in row else "right" if row["full"] == "right" else "refused",
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
    return f"{row['blocks']}, {'right' if row['depth'] == 'right' else 'refused'}"


def stored(which: str) -> dict[str, dict[str, Any]]:
    """The rows that were measured before, by name."""
    out = ROOT / f"build/coverage-{which}.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {f"{row['library']}/{row['name']}": row for row in rows}


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", choices=LISTS, default="tuned", dest="which")
    parser.add_argument("--only", default="*")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("verb", nargs="?", choices=["one", "peer"])
    parser.add_argument("model", nargs="?")
    given = parser.parse_args()
    models = {f"{recipe.library}/{recipe.name}": recipe for recipe in LISTS[given.which]}
    if given.verb is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        recipe = models[given.model]
        print(json.dumps(one(recipe) if given.verb == "one" else {"peer": peer(recipe)}))
        return
    out = ROOT / f"build/coverage-{given.which}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = stored(given.which)
    wanted = [name for name in models if fnmatch.fnmatch(name, given.only) and name not in rows]

    def run(name: str) -> dict[str, Any]:
        row = in_process(models[name], given.which, "one", LIMIT)
        if given.peer:
            row["peer"] = in_process(models[name], given.which, "peer", PEER_LIMIT).get("peer", "timeout")
        return row

    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool, out.open("a") as file:
        for row in pool.map(run, wanted):
            rows[f"{row['library']}/{row['name']}"] = row
            print(json.dumps(row), file=file, flush=True)
            print(f"{row['library']}/{row['name']}: {row['result']}, all: {row.get('full')}, {row.get('why', '')}")
    found = {which: stored(which) for which in LISTS}
    order = {which: [f"{recipe.library}/{recipe.name}" for recipe in recipes] for which, recipes in LISTS.items()}
    text = page({which: [rows[name] for name in order[which] if name in rows] for which, rows in found.items()})
    (ROOT / "docs/coverage.md").write_text(text)


if __name__ == "__main__":
    main()
