"""From the numbers of a run to one HTML file that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2

from kirsch.report import charts, figures

FOLDER = Path(__file__).parent

MOST_CLASSES = 40
"""Nobody reads a table of confusions with more classes; the most frequent mistakes are listed instead."""

HOME = re.compile(r"(?<![^\s'\"=])(/home|/Users|[A-Za-z]:[/\\]Users)[/\\][^/\\\s:'\"]+")
FOLDERS = re.compile(r"(?<![^\s'\"=])(/(?:[^/\s:'\"]+/)+|(?:~|[A-Za-z]:)[/\\](?:[^/\\\s:'\"]+[/\\])*)")
"""A person's folder, and the folders of an absolute path, where a word begins."""

SPACE = "\N{NO-BREAK SPACE}"


def render(metrics: dict[str, Any]) -> str:
    """The report of a run.

    Args:
        metrics: as in metrics.json; blocks that are None leave their section out.

    Returns:
        HTML with its style inside, no script, and no reference to anything outside. Every text from the run is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(figures=figures, charts=charts)
    environment.filters["without_folders"] = without_folders
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    template = environment.get_template("template.html.j2")
    quality = metrics["quality"]
    return template.render(
        **metrics,
        style=style,
        verdict=verdict(metrics),
        lost=[row for row in quality["lost"] if row["after"] < row["before"]] if quality else [],
        mistakes=mistakes(quality) if quality and len(quality["classes"]) > MOST_CLASSES else None,
        heat=heat,
    )


def without_folders(text: str) -> str:
    """Return a text with only the last part of each absolute path: the page is shown to others."""
    return FOLDERS.sub("", HOME.sub("~", text))


def verdict(metrics: dict[str, Any]) -> dict[str, Any]:
    """The three numbers that matter, before and after, as texts."""
    models = metrics["models"]
    first, last = models[0], next(model for model in models if model["chosen"])
    quality = last["accuracy"]
    out = {
        "before": first["name"],
        "after": last["name"],
        "size": f"{figures.bytes_(first['bytes'])} → {figures.bytes_(last['bytes'])}",
        "size_ratio": _smaller(first["bytes"], last["bytes"]),
        "quality": f"{figures.percent(first['accuracy']['value'])} → {figures.percent(quality['value'])}",
        "quality_doubt": f"95 % interval {figures.percent(quality['low'])} – {figures.percent(quality['high'])}, "
        f"n{SPACE}={SPACE}{quality['n']}",
    }
    if first["latency"] and last["latency"]:
        gain = last["latency"]["speedup"]
        out["latency"] = (
            f"{figures.micros(first['latency']['median_us'])} → {figures.micros(last['latency']['median_us'])}"
        )
        out["latency_ratio"] = f"{figures.ratio(gain['value'], gain['low'], gain['high'])} as fast"
    return out


def _smaller(before: int, after: int) -> str:
    if after > before:
        return f"{figures.digits(after / max(before, 1))}× larger"
    return f"{figures.digits(before / max(after, 1))}× smaller" if after < before else "same size"


def mistakes(quality: dict[str, Any], most: int = 20) -> list[dict[str, Any]]:
    """The most frequent confusions after the work, with how often each was there before."""
    names, before, after = quality["classes"], quality["before"]["confusion"], quality["after"]["confusion"]
    found = [
        {"actual": names[row], "said": names[column], "before": before[row][column], "after": n}
        for row, counts in enumerate(after)
        for column, n in enumerate(counts)
        if n and row != column
    ]
    return sorted(found, key=lambda mistake: -mistake["after"])[:most]


def heat(count: int, total: int) -> int:
    """The shade of a wrong cell of a confusion table, 0 to 4; small shares stay visible."""
    share = count / total if total else 0.0
    return 0 if not count else 1 + sum(share > step for step in (0.02, 0.1, 0.4))
