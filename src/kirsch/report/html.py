"""Rendering of the metrics of a run as one self-contained HTML file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2

from kirsch import figures
from kirsch.report import charts

FOLDER = Path(__file__).parent

MOST_CLASSES = 40
"""Largest number of classes for which confusion matrices are shown; for more, the most frequent errors are listed."""

HOME = re.compile(r"(?<![^\s'\"=])(/home|/Users|[A-Za-z]:[/\\]Users)[/\\][^/\\\s:'\"]+")
FOLDERS = re.compile(r"(?<![^\s'\"=])(/(?:[^/\s:'\"]+/)+|(?:~|[A-Za-z]:)[/\\](?:[^/\\\s:'\"]+[/\\])*)")
"""A user's home folder, and the folders of an absolute path, at the beginning of a word."""

COSTS = {"size": "weights", "memory": "peak memory"}
"""Costs of a model that are counted only if a goal limits them, and their names in the table of models."""

SPACE = "\N{NO-BREAK SPACE}"


def render(metrics: dict[str, Any]) -> str:
    """Return the report of a run as HTML.

    Args:
        metrics: content of metrics.json. A section is left out if its part of the metrics is None or empty.

    Returns:
        HTML with an inline style sheet, without scripts and external references. All texts of the run are escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(figures=figures, charts=charts)
    environment.filters["without_folders"] = without_folders
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    template = environment.get_template("template.html.j2")
    quality = metrics["quality"] or {}
    has_confusion = "classes" in quality and all("confusion" in quality[side] for side in ("before", "after"))
    return template.render(
        **metrics,
        style=style,
        summary=summary(metrics),
        costs={cost: word for cost, word in COSTS.items() if any(cost in model for model in metrics["models"])},
        lost=[row for row in quality.get("lost", ()) if row["after"] < row["before"]],
        has_confusion=has_confusion,
        errors=frequent_errors(quality) if has_confusion and len(quality["classes"]) > MOST_CLASSES else None,
        shade=shade,
    )


def without_folders(text: str) -> str:
    """Return a text in which absolute paths are replaced by their last part, since reports are shared."""
    return FOLDERS.sub("", HOME.sub("~", text))


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return file size, accuracy and latency of the compared model (the teacher) and of the chosen one, as texts."""
    models, sides = metrics["models"], metrics["quality"]
    compared = sides["before"]["key"] if sides else models[0]["key"]
    first = next((model for model in models if model["key"] == compared), models[0])
    last = next(model for model in models if model["chosen"])
    quality = last["accuracy"]
    texts = {
        "before": first["name"],
        "after": last["name"],
        "size": f"{figures.bytes_(first['bytes'])} → {figures.bytes_(last['bytes'])}",
        "size_ratio": _size_ratio(first["bytes"], last["bytes"]),
        "accuracy": f"{figures.percent(first['accuracy']['value'])} → {figures.percent(quality['value'])}",
        "accuracy_interval": f"95 % interval {figures.percent(quality['low'])} – {figures.percent(quality['high'])}, "
        f"n{SPACE}={SPACE}{quality['n']}",
    }
    if first["latency"] and last["latency"]:
        speedup = last["latency"]["speedup"]
        texts["latency"] = (
            f"{figures.micros(first['latency']['median_us'])} → {figures.micros(last['latency']['median_us'])}"
        )
        texts["latency_ratio"] = f"{figures.ratio(speedup['value'], speedup['low'], speedup['high'])} as fast"
    return texts


def _size_ratio(before: int, after: int) -> str:
    if after > before:
        return f"{figures.digits(after / max(before, 1))}× larger"
    return f"{figures.digits(before / max(after, 1))}× smaller" if after < before else "same size"


def frequent_errors(quality: dict[str, Any], most: int = 20) -> list[dict[str, Any]]:
    """Return the most frequent errors of the final model, with their counts before and after.

    Args:
        quality: block "quality" of the metrics.
        most: largest number of errors.

    Returns:
        Dicts with the class names "true" and "predicted" and the counts "before" and "after".
    """
    names, before, after = quality["classes"], quality["before"]["confusion"], quality["after"]["confusion"]
    errors = [
        {"true": names[row], "predicted": names[column], "before": before[row][column], "after": n}
        for row, counts in enumerate(after)
        for column, n in enumerate(counts)
        if n and row != column
    ]
    return sorted(errors, key=lambda error: -error["after"])[:most]


def shade(count: int, total: int) -> int:
    """Return the shade of an off-diagonal cell of a confusion matrix, 0 to 4; 0 only for a count of 0."""
    fraction = count / total if total else 0.0
    return 0 if not count else 1 + sum(fraction > step for step in (0.02, 0.1, 0.4))
