"""What each published objective gives a student, on images and on sentences; writes docs/benchmarks.md.

All students of a task have the same budget, optimizer, batches and first weights of a seed. The last epoch is judged,
and nothing is chosen by the test set. Differences are paired by seed, with the interval of Student's t.

    python benchmarks/distillation.py run resnet mobilenet sst2 --seeds 0 1 2
    python benchmarks/distillation.py table

Processes may share the work, each with seeds or tasks of its own. Rows go to benchmarks/distillation.jsonl as they
come; what stands there of the same teacher is not run again.

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
    """Of a task's teacher."""
    teacher = module.teacher()
    return framework_of(teacher).inference.fingerprint(teacher)[:12]


def rows(task: str) -> list[dict[str, Any]]:
    """What is known of a task with its teacher."""
    lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
    found = [json.loads(line) for line in lines]
    return [row for row in found if (row["task"], row["teacher"]) == (task, fingerprint(TASKS[task]))]


def run(task: str, seeds: list[int]) -> None:
    """All students of a task that are not there yet, seed by seed."""
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
            except NumericError as error:  # of a loss that loses its gradient on the way
                row |= {"accuracy": None, "error": str(error)}
            row["seconds"] = round(time.process_time() - begun)
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def table(task: str) -> list[str]:
    """One task's table: each objective beside labels only, over the seeds that all objectives have."""
    found = {(row["objective"], row["seed"]): row["accuracy"] for row in rows(task)}
    names = [name for name in TASKS[task].objectives(task) if any(key[0] == name for key in found)]
    seeds = [seed for seed in sorted({seed for _, seed in found}) if all((name, seed) in found for name in names)]
    heads = [
        "objective",
        f"accuracy, {len(seeds)} seeds, ± deviation",
        "difference from labels only, points, ± 95 %",
        "",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---|"]
    for name in names:
        if not all(found[name, seed] for seed in seeds):
            lines.append(f"| {name} | – | – | stopped: the term has no gradient |")
            continue
        accuracies = 100 * np.array([found[name, seed] for seed in seeds])
        cells = [name, f"{accuracies.mean():.1f} % ± {accuracies.std(ddof=1):.1f}", "–", ""]
        if name != LABELS:
            gains = accuracies - 100 * np.array([found[LABELS, seed] for seed in seeds])
            reach = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
            cells[2] = f"{gains.mean():+.1f} ± {reach:.1f}"
            cells[3] = "not significant" if abs(gains.mean()) < reach else "better" if gains.mean() > 0 else "worse"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page() -> str:
    """All tables with what they were measured on."""
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
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("tasks", nargs="+", choices=TASKS)
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "run":
        for task in given.tasks:
            run(task, given.seeds)
        return
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + page() + rest.partition(END)[2])


if __name__ == "__main__":
    main()
