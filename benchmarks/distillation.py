"""Compare published distillation objectives on images and sentences, and write the tables in docs/benchmarks.md.

All students of a task have the same number of epochs and the same optimizer; with the same seed, they have the same
batches and initial weights. The student of the last epoch is evaluated, and the test set is not used to choose
anything. Differences are paired by seed, with confidence intervals from Student's t-distribution.

    python benchmarks/distillation.py run resnet mobilenet sst2 --seeds 0 1 2
    python benchmarks/distillation.py table

Several processes can run different seeds or tasks. Each finished row is appended to benchmarks/distillation.jsonl. Rows
that the file already has for the same teacher are not run again.

Needs CIFAR-10 and SST-2 in `$KIRSCH_DATA` (default ../shared/data). About two hours of one core.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import distill_images
import distill_text
import numpy as np
import torch
from scipy import stats

from kirsch.errors import NumericError
from kirsch.frameworks.find import framework_of
from kirsch.measurement.machine import cpu

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "distillation.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"
TASKS: dict[str, Any] = {
    "resnet": distill_images,
    "mobilenet": distill_images,
    "sst2": distill_text,
}
LABELS = "labels only"
START, END = "<!-- tables: written by benchmarks/distillation.py -->", "<!-- end of tables -->"


def fingerprint(module: Any) -> str:
    """Return the fingerprint of the teacher of a task."""
    teacher = module.teacher()
    return framework_of(teacher).inference.fingerprint(teacher)[:12]


def rows(task: str) -> list[dict[str, Any]]:
    """Return the finished rows of a task with its current teacher."""
    lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
    parsed = [json.loads(line) for line in lines]
    return [row for row in parsed if (row["task"], row["teacher"]) == (task, fingerprint(TASKS[task]))]


def run(task: str, seeds: list[int]) -> None:
    """Train all students of a task that have no row yet, seed by seed."""
    module = TASKS[task]
    module.prepare()
    for seed in seeds:
        for name in module.objectives(task):
            if (name, seed) in {(row["objective"], row["seed"]) for row in rows(task)}:
                continue
            begun = time.process_time()
            row = {"task": task, "objective": name, "seed": seed, "teacher": fingerprint(module)}
            try:
                row |= module.run(task, name, seed)
            except NumericError as error:  # a loss without gradient
                row |= {"accuracy": None, "error": str(error)}
            row["seconds"] = round(time.process_time() - begun)
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def table(task: str) -> list[str]:
    """Return the table of a task: each objective compared with labels only, over seeds that all objectives have."""
    accuracy_of = {(row["objective"], row["seed"]): row["accuracy"] for row in rows(task)}
    names = [name for name in TASKS[task].objectives(task) if any(key[0] == name for key in accuracy_of)]
    seeds = [
        seed for seed in sorted({seed for _, seed in accuracy_of}) if all((name, seed) in accuracy_of for name in names)
    ]
    heads = [
        "objective",
        f"accuracy, {len(seeds)} seeds, ± deviation",
        "difference from labels only, points, ± 95 %",
        "",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---|"]
    for name in names:
        if not all(accuracy_of[name, seed] for seed in seeds):
            lines.append(f"| {name} | – | – | stopped: the term has no gradient |")
            continue
        accuracies = 100 * np.array([accuracy_of[name, seed] for seed in seeds])
        cells = [name, f"{accuracies.mean():.1f} % ± {accuracies.std(ddof=1):.1f}", "–", ""]
        if name != LABELS:
            gains = accuracies - 100 * np.array([accuracy_of[LABELS, seed] for seed in seeds])
            margin = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
            cells[2] = f"{gains.mean():+.1f} ± {margin:.1f}"
            cells[3] = "not significant" if abs(gains.mean()) < margin else "better" if gains.mean() > 0 else "worse"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page() -> str:
    """Return all tables with descriptions of the tasks and the machine."""
    lines = [
        START,
        (
            f"`python benchmarks/distillation.py` writes these tables; measured on {cpu()[0]}, "
            f"{datetime.now(UTC):%Y-%m-%d}."
        ),
    ]
    for task, module in TASKS.items():
        if rows(task):
            lines += [
                "",
                f"### {module.TITLES[task]}",
                "",
                *textwrap.wrap(module.about(task), 120),
                "",
                *table(task),
            ]
    return "\n".join([*lines, END])


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("tasks", nargs="+", choices=TASKS)
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "run":
        for task in options.tasks:
            run(task, options.seeds)
        return
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + page() + rest.partition(END)[2])


if __name__ == "__main__":
    main()
