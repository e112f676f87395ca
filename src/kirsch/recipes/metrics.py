"""metrics.json: all numbers of a run, for the report and for other programs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kirsch.recipes.job import Job

MODELS = {"teacher": "teacher", "distill": "student", "prune": "pruned", "recover": "recovered", "export": "exported"}
"""Stage → name of the model that it produces."""


def metrics_of(job: Job, environment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return all numbers of a finished run."""
    records = job.records
    pruned, quality = records.get("prune"), _quality(job)
    return {
        "kirsch_metrics": 1,
        "name": job.recipe.name,
        "run": job.folder.name,
        "kirsch": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "seconds": seconds,
        "goal": _goal(job, quality["paired"]["text"]),
        **metrics_of_records(records),
        "quality": quality,
        "measured": _measured(job, environment),
        "not_measured": _not_measured(job),
        "provenance": {
            "recipe": job.recipe.to_yaml(),
            "plan": pruned["plan"] if pruned else None,
            "environment": environment,
            "fingerprint": pruned["plan"]["model"]["fingerprint"] if pruned else "",
        },
    }


def metrics_of_records(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the part of the metrics that depends only on the records of the stages."""
    pruned = records.get("prune")
    return {
        "models": _models(records),
        "stages": [
            {
                "number": number,
                "key": key,
                "did": record["did"],
                "cells": record["cells"],
                "seconds": record["seconds"],
            }
            for number, (key, record) in enumerate(records.items(), start=1)
        ],
        "curves": [_curve(key, record["history"]) for key, record in records.items() if record.get("history")],
        "removed": pruned["removed"] if pruned else None,
        "verification": pruned["verification"] if pruned else None,
        "export": _export(records.get("export")),
    }


def _final(records: Mapping[str, dict[str, Any]]) -> str:
    """Return the last stage whose model was evaluated."""
    return [key for key, record in records.items() if "accuracy" in record][-1]


def _goal(job: Job, significance: str) -> dict[str, Any]:
    recipe, records = job.recipe, job.records
    items = []
    if recipe.prune is not None and "prune" in records:
        start = records["distill" if "distill" in records else "teacher"]
        reference = "student" if "distill" in records else "teacher"
        for limit, field, word in (
            (recipe.prune.goal.macs, "macs", "MACs"),
            (recipe.prune.goal.parameters, "parameters", "parameters"),
        ):
            if limit is not None:
                value = records["prune"][field] / max(start[field], 1)
                text = f"{word} {figures.percent(value)} of the {reference}, goal ≤ {figures.percent(limit, 0)}"
                items.append(_item(field, text, limit, value, met=value <= limit))
    final = _final(records)
    if recipe.goal.max_drop is not None:
        drop = records["teacher"]["accuracy"]["value"] - records[final]["accuracy"]["value"]
        change = f"accuracy drop {figures.points(drop)}" if drop >= 0 else f"accuracy gain {figures.points(-drop)}"
        text = f"{change} against the teacher, goal ≤ {figures.points(recipe.goal.max_drop)}"
        before, after = (records[key].get("balanced_accuracy") for key in ("teacher", final))
        if before is not None and after is not None:  # accuracy may hide the loss of a rare class
            text += f" (balanced accuracy {figures.percent(before)} → {figures.percent(after)})"
        met = drop <= recipe.goal.max_drop + 1e-12
        items.append(_item("max_drop", text, recipe.goal.max_drop, drop, met=met, significance=significance))
    if recipe.goal.speedup is not None and "measure" in records:
        speedup = records["measure"]["race"]["speedups"]["exported"]
        text = f"{figures.ratio(**speedup)} the speed of the teacher, goal ≥ {figures.digits(recipe.goal.speedup)}×"
        met = speedup["value"] >= recipe.goal.speedup
        items.append(_item("speedup", text, recipe.goal.speedup, speedup["value"], met=met))
    return {
        "met": all(item["met"] for item in items),
        "text": goal_text(job) or "no goal was set",
        "items": items,
    }


def _item(name: str, text: str, limit: float, value: float, *, met: bool, significance: str = "") -> dict[str, Any]:
    return {"name": name, "text": text, "limit": limit, "value": value, "met": met, "significance": significance}


def goal_text(job: Job) -> str:
    """Return all goals of a recipe in one line."""
    recipe = job.recipe
    parts = []
    if recipe.prune is not None:
        limits = (("MACs", recipe.prune.goal.macs), ("parameters", recipe.prune.goal.parameters))
        parts += [f"{word} ≤ {figures.percent(limit, 0)}" for word, limit in limits if limit is not None]
    if recipe.goal.max_drop is not None:
        parts.append(f"accuracy drop ≤ {figures.points(recipe.goal.max_drop)}")
    if recipe.goal.speedup is not None:
        parts.append(f"speed ≥ {figures.digits(recipe.goal.speedup)}×")
    if recipe.measure is not None and recipe.export is not None:
        plural = "s" if recipe.measure.threads > 1 else ""
        parts.append(f"runtime {recipe.measure.runtime} ({recipe.measure.threads} thread{plural})")
    return ", ".join(parts)


def _models(records: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    race = records.get("measure", {}).get("race")
    sizes = records.get("measure", {}).get("onnx_bytes", {})
    final = _final(records)
    out = []
    for stage, key in MODELS.items():
        record = records.get(stage)
        if record is None:
            continue
        latency = None
        if race is not None and key in race["latencies"]:
            latency = race["latencies"][key] | {"speedup": race["speedups"][key] | {"of": race["reference"]}}
        out.append(
            {
                "key": key,
                "name": key,
                "parameters": record["parameters"],
                "macs": record["macs"],
                "bytes": sizes.get(key, record["bytes"]),
                "accuracy": {name: record["accuracy"][name] for name in ("value", "low", "high", "n")},
                "balanced_accuracy": record.get("balanced_accuracy"),
                "latency": latency,
                "chosen": stage == final,
            }
        )
    return out


def _curve(stage: str, history: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "stage": stage,
        "epochs": [record["epoch"] for record in history],
        "loss": [record["loss"] for record in history],
        "terms": {name: [record["terms"].get(name) for record in history] for name in history[0]["terms"]},
        "accuracy": [record.get("accuracy") for record in history],
        "learning_rate": [record["learning_rate"] for record in history],
        "seconds": [record["seconds"] for record in history],
    }


def _quality(job: Job) -> dict[str, Any]:
    first, final = "teacher", _final(job.records)
    compared = job.task.compare(job.logits(first), job.logits(final), job.data)
    return compared | {
        side: {"key": MODELS[key], **compared[side]} for side, key in (("before", first), ("after", final))
    }


def _export(record: dict[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    artifact, agreed = record["artifact"], record["agreement"]
    return {
        "file": f"artifacts/{artifact['file']}",
        "bytes": artifact["bytes"],
        "sha256": artifact["sha256"],
        "format": f"ONNX opset {artifact['opset']}",
        "same_labels": agreed["same_labels"],
        "n": agreed["n"],
        "max_error": agreed["max_error"],
        "usage": artifact["usage"],
    }


def _measured(job: Job, environment: dict[str, Any]) -> dict[str, Any]:
    race = job.records.get("measure", {}).get("race") or {}
    timing = race.get("latencies", {}).get("exported", {})
    data = job.data
    return {
        "runtime": race.get("runtime"),
        "threads": race.get("threads"),
        "batch": race.get("batch"),
        "rounds": timing.get("rounds"),
        "machine": race.get("machine", environment["cpu"]),
        "aa": race.get("aa"),
        "load_before": race.get("load_before"),
        "load_after": race.get("load_after"),
        "seed": job.recipe.seed,
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
    }


def _not_measured(job: Job) -> list[str]:
    out = []
    if "measure" not in job.records:
        out.append("Latency: the recipe does not export and measure a file.")
    else:
        out.append("Other runtimes and machines: the times hold only for the runtime and machine of this report.")
    out.append(f"Other seeds: there is one training run, with seed {job.recipe.seed}; results differ between seeds.")
    out.append("Energy, and peak memory on the device.")
    out.append("Data that differs from the test part: other sources, noise, drift.")
    return out
