"""From the numbers of a run to one HTML file that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from kirsch.report import charts, figures

FOLDER = Path(__file__).parent


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
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    template = environment.get_template("template.html.j2")
    return template.render(**metrics, style=style, verdict=verdict(metrics), heat=heat)


def verdict(metrics: dict[str, Any]) -> dict[str, Any]:
    """The three numbers that matter, before and after, as texts."""
    models = metrics["models"]
    first, last = models[0], next(model for model in reversed(models) if model["chosen"])
    quality = last["accuracy"]
    out = {
        "before": first["name"],
        "after": last["name"],
        "size": f"{figures.bytes_(first['bytes'])} → {figures.bytes_(last['bytes'])}",
        "size_ratio": f"{figures.digits(first['bytes'] / max(last['bytes'], 1))}× smaller",
        "quality": f"{figures.percent(first['accuracy']['value'])} → {figures.percent(quality['value'])}",
        "quality_doubt": f"95 % interval {figures.percent(quality['low'])} – {figures.percent(quality['high'])}, "
        f"n = {quality['n']}",
    }
    if first["latency"] and last["latency"]:
        gain = last["latency"]["speedup"]
        out["latency"] = (
            f"{figures.micros(first['latency']['median_us'])} → {figures.micros(last['latency']['median_us'])}"
        )
        out["latency_ratio"] = f"{figures.ratio(gain['value'], gain['low'], gain['high'])} as fast"
    return out


def heat(count: int, total: int) -> int:
    """The shade of a cell of a confusion table, 0 to 5; small shares of errors stay visible."""
    share = count / total if total else 0.0
    return 0 if not count else 1 + sum(share > step for step in (0.02, 0.1, 0.4, 0.8))
