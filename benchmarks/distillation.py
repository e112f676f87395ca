"""What each published objective gives a student, on images and on sentences; writes docs/benchmarks.md.

All students of a task have the same budget, optimizer, batches and first weights of a seed. The last epoch is judged,
and nothing is chosen by the test set. Differences are paired by seed, with the interval of Student's t.

    python benchmarks/distillation.py run resnet mobilenet sst2    # in any number of processes; what is done is kept
    python benchmarks/distillation.py table

Needs CIFAR-10 and SST-2 in `$KIRSCH_DATA` (default ../shared/data). About two hours of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import distil_images
import distil_text
import numpy as np
import torch
from scipy import stats

from kirsch.measurement.machine import cpu

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "build" / "distillation" / "rows"
PAGE = ROOT / "docs" / "benchmarks.md"
TASKS: dict[str, Any] = {
    "resnet": distil_images,
    "mobilenet": distil_images,
    "sst2": distil_text,
}
LABELS = "labels alone"
START, END = "<!-- tables: written by benchmarks/distillation.py -->", "<!-- end of tables -->"


def run(task: str, seeds: range) -> None:
    """All students of a task, seed by seed; those that are done, or that another process has begun, are passed over."""
    ROWS.mkdir(parents=True, exist_ok=True)
    module = TASKS[task]
    module.prepare()
    for seed in seeds:
        for name in module.objectives(task):
            file = ROWS / f"{task}-{seed}-{''.join(c if c.isalnum() else '_' for c in name)}.json"
            try:
                taken = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                continue
            try:
                begun = time.perf_counter()
                row = {"task": task, "objective": name, "seed": seed, **module.run(task, name, seed)}
            except BaseException:
                os.close(taken)
                file.unlink()
                raise
            row["seconds"] = round(time.perf_counter() - begun)
            os.write(taken, json.dumps(row).encode())
            os.close(taken)
            print(f"{task} {name} {seed}: {row['accuracy']:.4f} in {row['seconds']} s {row['doubts']}", flush=True)


def table(task: str, rows: list[dict[str, Any]]) -> list[str]:
    """One task's table: each objective beside labels alone, over the seeds that all objectives have."""
    found = {(row["objective"], row["seed"]): row["accuracy"] for row in rows if row["task"] == task}
    names = [name for name in TASKS[task].objectives(task) if any(key[0] == name for key in found)]
    seeds = [seed for seed in sorted({seed for _, seed in found}) if all((name, seed) in found for name in names)]
    lines = [f"| objective | accuracy, {len(seeds)} seeds | against labels alone, points | |", "|---|---:|---:|---|"]
    for name in names:
        accuracies = 100 * np.array([found[name, seed] for seed in seeds])
        cells = [name, f"{accuracies.mean():.1f} % ± {accuracies.std(ddof=1):.1f}", "–", ""]
        if name != LABELS:
            gains = accuracies - 100 * np.array([found[LABELS, seed] for seed in seeds])
            reach = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
            cells[2] = f"{gains.mean():+.1f} ± {reach:.1f}"
            cells[3] = "inside the noise" if abs(gains.mean()) < reach else "better" if gains.mean() > 0 else "worse"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page() -> str:
    """All tables with what they were measured on."""
    rows = [json.loads(text) for file in sorted(ROWS.glob("*.json")) if (text := file.read_text())]
    lines = [
        START,
        f"`python benchmarks/distillation.py` writes these tables; here on {cpu()[0]}, {datetime.now(UTC):%Y-%m-%d}.",
    ]
    for task, module in TASKS.items():
        if any(row["task"] == task for row in rows):
            lines += [
                "",
                f"### {module.TITLES[task]}",
                "",
                *textwrap.wrap(module.about(task), 120),
                "",
                *table(task, rows),
            ]
    return "\n".join([*lines, END])


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("tasks", nargs="+", choices=TASKS)
    running.add_argument("--seeds", type=int, default=3)
    commands.add_parser("table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "run":
        for task in given.tasks:
            run(task, range(given.seeds))
        return
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + page() + rest.partition(END)[2])


if __name__ == "__main__":
    main()
