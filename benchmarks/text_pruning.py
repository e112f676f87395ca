"""Compare importances and rankings for the pruning of transformers models, and write the tables in docs/benchmarks.md.

A small Llama and a small BERT are trained, pruned once to some goals by each importance, and trained for a short time
by distillation from the dense model. All rows of a seed start from the same dense model and have the
same training data in the same order. Small dense models of the same cost show whether pruning is worth it: they get
either the recovery alone, or the training of the dense model and then the recovery, each from random weights. The test
samples are not used to choose anything.

    python benchmarks/text_pruning.py run decoder encoder --seeds 0 1 2
    python benchmarks/text_pruning.py table

Each finished row is appended to benchmarks/text_pruning.jsonl. Rows that the file already has are not run again. Needs
SST-2 and Multi30k in `$KIRSCH_DATA` (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import text_decoder
import text_encoder
import torch

import kirsch
from kirsch import figures
from kirsch.frameworks.find import framework_of
from kirsch.measurement.machine import cpu, version_of
from kirsch.pruning.importance import IMPORTANCES

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

ROOT = Path(__file__).parents[1]
ROWS, PAGE, MODELS = ROOT / "benchmarks/text_pruning.jsonl", ROOT / "docs/benchmarks.md", ROOT / "build/text_pruning"
START, END = "<!-- tables: written by benchmarks/text_pruning.py -->", "<!-- end of text_pruning tables -->"
TASKS: dict[str, ModuleType] = {"decoder": text_decoder, "encoder": text_encoder}
PRUNED, LOADABLE, SHORT, FULL, DENSE = "pruned", "loadable", "small, recovery only", "small, full training", "dense"
RANKING = "ranking "
"""Beginning of the methods that prune by the importance `RANKED` and the ranking that follows."""
RANKED = "taylor"
KEY = ("task", "seed", "method", "importance", "goal")


def known_rows() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the finished rows by task, seed, method, importance and goal."""
    lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
    return {tuple(row[name] for name in KEY): row for row in map(json.loads, lines)}


def cost_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return parameters and MACs of a model."""
    return dict(zip(("parameters", "macs"), framework_of(model).analysis.count(model, inputs), strict=True))


def small(task: ModuleType, goal: float) -> tuple[int, int]:
    """Return hidden size and FFN width of a small model, with a cost of at most the goal and close to it.

    For each hidden size, the largest FFN width inside the goal follows from two costs, because the cost is linear in
    the FFN width. Of these models, the one is chosen whose ratio of the widths is closest to that of the dense model.
    """

    def cost(width: int, hidden: int) -> int:
        return cost_of(task.network(width, hidden), task.example())[task.COST]

    limit, ratio, found = goal * cost(task.WIDTH, task.HIDDEN), task.HIDDEN / task.WIDTH, []
    for width in range(task.MULTIPLE, task.WIDTH + 1, task.MULTIPLE):
        least = cost(width, 1)
        hidden = 1 + int((limit - least) // (cost(width, 2) - least))
        if hidden > 0:
            found.append((abs(math.log(hidden / width / ratio)), width, hidden))
    return min(found)[1:]


def dense_model(name: str, seed: int) -> nn.Module:
    """Return the dense model of a seed, which is stored for later runs."""
    task, file = TASKS[name], MODELS / f"{name}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = task.network()
    framework = framework_of(model)
    if file.is_file():
        framework.inference.load_weights(model, file)
        return model.eval()
    model = task.train(model, seed, scores_file=MODELS / f"{name}-{seed}.npz")
    MODELS.mkdir(parents=True, exist_ok=True)
    framework.inference.save_weights(model, file)
    return model


def importance_options(name: str, seed: int, importance: str) -> dict[str, Any]:
    """Return the arguments of `kirsch.plan` for an importance. Scores of the training are read from their file."""
    if importance not in IMPORTANCES:
        with np.load(MODELS / f"{name}-{seed}.npz") as scores:
            return {"importance": dict(scores)}
    needs, options = IMPORTANCES[importance].needs, TASKS[name].calibration(seed)
    used = {"weights": (), "inputs": ("data",)}.get(needs, ("data", "loss"))
    return {"importance": importance, "seed": seed} | {key: options[key] for key in used}


def measure(name: str, model: nn.Module, graph: kirsch.Graph, row: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a row: qualities before and after recovery, cost of the model, seconds of the plan."""
    task, seed = TASKS[name], row["seed"]
    if row["method"] == DENSE:
        return {"quality": task.quality(model), "bag_of_words": getattr(task, "bag_of_words", lambda: None)()}
    ranking = row["method"].removeprefix(RANKING) if row["method"].startswith(RANKING) else "auto"
    if row["method"] in (PRUNED, LOADABLE) or ranking != "auto":
        begun = time.process_time()
        options = importance_options(name, seed, row["importance"]) | {"ranking": ranking}
        goal = kirsch.Goal(**{task.COST: row["goal"]})
        plan = kirsch.plan(graph, goal, loadable=row["method"] == LOADABLE, progress=False, **options)
        found: dict[str, Any] = {"plan_seconds": round(time.process_time() - begun, 1)}
        student = kirsch.prune(model, plan)
        found |= {"one_shot": task.quality(student), "configuration": dict(plan.configuration)}
        recovered = task.recover(student, model, seed)
    else:
        torch.manual_seed(seed)
        found = {"widths": small(task, row["goal"])}
        student = task.network(*found["widths"])
        if row["method"] == FULL:
            student = task.train(student, seed)
            found["one_shot"] = task.quality(student)
            recovered = task.recover(student, model, seed)
        else:
            recovered = task.recover(student, model, seed, rate=task.TRAINING.learning_rate)
    return found | {"recovered": task.quality(recovered)} | cost_of(recovered, task.example())


def rows_of(name: str, seed: int) -> list[dict[str, Any]]:
    """Return the rows of a task and seed, without results."""
    task = TASKS[name]
    methods = [(DENSE, None, 1.0)]
    methods += [(PRUNED, importance, goal) for importance in task.IMPORTANCES for goal in task.GOALS]
    methods += [(LOADABLE, importance, goal) for importance in task.LOADABLE for goal in task.GOALS]
    methods += [(f"{RANKING}{ranking}", RANKED, goal) for ranking in task.RANKINGS for goal in task.GOALS]
    methods += [(method, None, goal) for method in (SHORT, FULL) for goal in task.GOALS]
    return [dict(zip(KEY, (name, seed, *each), strict=True)) for each in methods]


def run(name: str, seed: int, goal: float) -> None:
    """Measure the rows of a task, seed and goal that the file does not have."""
    rows = [row for row in rows_of(name, seed) if row["goal"] in (1.0, goal)]
    missing = [row for row in rows if tuple(row[key] for key in KEY) not in known_rows()]
    if not missing:
        return
    begun = time.process_time()
    model = dense_model(name, seed)
    graph = kirsch.trace(model, TASKS[name].example())
    for row in missing:
        found = row | measure(name, model, graph, row)
        found |= {"seconds": round(time.process_time() - begun, 1), "machine": cpu()[0]}
        found |= {"torch": version_of("torch"), "transformers": version_of("transformers")}
        found["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
        with ROWS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(found, flush=True)
        begun = time.process_time()


def interval(values: list[float], digits: int | None = None) -> str:
    """Return mean ± standard deviation over seeds, by default with three digits of the mean."""
    if digits is None:
        digits = min(2, max(0, 2 - math.floor(math.log10(abs(statistics.fmean(values))))))
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(name: str) -> list[str]:
    """Return the table of a task, of the finished rows: the goals that most importances have reached.

    A cell with fewer seeds than the others says so.
    """
    task, known = TASKS[name], [row for row in known_rows().values() if row["task"] == name]
    seeds, dense = len({row["seed"] for row in known}), cost_of(task.network(), task.example())[task.COST]

    done = {(row["goal"], row["importance"]) for row in known if row["method"] == PRUNED}
    goals = [goal for goal in task.GOALS if 2 * sum(each[0] == goal for each in done) > len(task.IMPORTANCES)]

    def cells(method: str, importance: str | None, key: str) -> list[str]:
        texts = []
        for goal in goals:
            rows = [
                row for row in known if (row["method"], row["importance"], row["goal"]) == (method, importance, goal)
            ]
            values = [row[key] for row in rows if key in row]
            few = "" if len(values) in (0, seeds) else f" (seeds: {len(values)})"
            texts.append(interval(values) + few if values else "–")
        return texts

    def left(method: str, importance: str | None) -> str:
        rows = [row for row in known if (row["method"], row["importance"]) == (method, importance)]
        costs = [[row[task.COST] / dense for row in rows if row["goal"] == goal] for goal in goals]
        return " / ".join(f"{100 * statistics.fmean(each):.0f} %" if each else "–" for each in costs)

    heads = [f"{when}, {100 * goal:.0f} %" for when in ("one-shot", "recovered") for goal in goals]
    lines = [
        f"| importance or model | {' | '.join(heads)} | {task.COST.replace('macs', 'MACs')} left |",
        "|---|" + len(heads) * "---:|" + "---|",
    ]
    unpruned = [row for row in known if row["method"] == DENSE]
    lines.append(
        f"| dense, not pruned | {interval([row['quality'] for row in unpruned])} |"
        + (len(heads) - 1) * " – |"
        + " 100 % |"
    )
    if words := unpruned[0]["bag_of_words"]:
        lines.append(f"| logistic regression on words | {100 * words:.1f} |" + len(heads) * " – |")
    titles = [(PRUNED, i, f"`{i}`") for i in task.IMPORTANCES]
    titles += [(LOADABLE, i, f"`{i}`, `loadable=True`") for i in task.LOADABLE]
    titles += [(f"{RANKING}{r}", RANKED, f'`{RANKED}`, `ranking="{r}"`') for r in task.RANKINGS]
    titles += [(method, None, method) for method in (SHORT, FULL)]
    for method, importance, title in titles:
        values = [*cells(method, importance, "one_shot"), *cells(method, importance, "recovered")]
        lines.append(f"| {title} | {' | '.join(values)} | {left(method, importance)} |")
    return lines


def about(name: str) -> str:
    """Return a description of the dense model, its training and the recovery."""
    task, rows = TASKS[name], [row for row in known_rows().values() if row["task"] == name]
    dense = [row for row in rows if row["method"] == DENSE]
    costs = {key: figures.count(value) for key, value in cost_of(task.network(), task.example()).items()}
    return task.ABOUT.format(
        **costs,
        quality=interval([row["quality"] for row in dense]),
        seeds=len(dense),
        minutes=sum(row["seconds"] for row in rows) / 60,
    )


def page() -> str:
    """Return the text between the markers of the page."""
    machines = sorted({f"{row['machine']}, {row['date']}" for row in known_rows().values()})
    lines = [START, f"`python benchmarks/text_pruning.py` writes these tables; measured on {'; '.join(machines)}."]
    for name, task in TASKS.items():
        if any(row["task"] == name for row in known_rows().values()):
            lines += ["", f"### {task.TITLE}", "", *textwrap.wrap(about(name), 120), "", *table(name)]
    return "\n".join([*lines, END])


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "run":
        # The strongest pruning first: it tells most about the importances.
        for goal in sorted({goal for name in options.tasks for goal in TASKS[name].GOALS}):
            for seed in options.seeds:
                for name in options.tasks:
                    run(name, seed, goal)
        return
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + page() + rest.partition(END)[2])


if __name__ == "__main__":
    main()
