"""metrics.json: all numbers of a run, for the report and for other programs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kirsch.errors import UsageError
from kirsch.jobs.job import TRACED
from kirsch.jobs.step import keys_of
from kirsch.recipes.goals import goal_items, goal_texts
from kirsch.recipes.run_folder import events_of
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kirsch.jobs.job import Job, Record
    from kirsch.jobs.step import Step
    from kirsch.recipes.recipe import Recipe


def metrics_of(job: Job, recipe: Recipe, environment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return all numbers of a finished run."""
    quality = _quality(job)
    plans = [record["plan"] for record in job.records.values() if "plan" in record]
    return {
        "kirsch_metrics": 1,
        "name": recipe.name,
        "run": job.folder.name,
        "kirsch": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "seconds": seconds,
        "goal": _goal(job, recipe.all_steps, quality.get("paired", {}).get("text", "")),
        **metrics_of_records(job.records),
        "quality": quality,
        "warnings": _warnings(events_of(job.folder)[0], job.records),
        "measured": _measured(job, environment),
        "not_measured": _not_measured(job),
        "provenance": {
            "recipe": recipe.to_yaml(),
            "plans": plans,
            "environment": environment,
            "fingerprint": plans[0]["model"]["fingerprint"] if plans else "",
        },
    }


def _warnings(events: list[dict[str, Any]], records: Mapping[str, Record]) -> list[dict[str, str]]:
    """Return the warnings of the steps of a run, each one once, also if a resumed step repeats it."""
    found = [
        (event["step"], event["text"])
        for event in events
        if event.get("event") == "warning" and event.get("step") in records
    ]
    return [{"step": step, "text": text} for step, text in dict.fromkeys(found)]


REMOVAL = ("verification", "compensation", "notes")
"""Keys of the record of a step that the entry of the removal in the metrics repeats."""


def metrics_of_records(records: Mapping[str, Record]) -> dict[str, Any]:
    """Return the part of the metrics that depends only on the records of the steps."""
    return {
        "models": _models(records),
        "steps": [
            {"number": number, "key": key, **{name: record[name] for name in ("did", "cells", "seconds")}}
            for number, (key, record) in enumerate(records.items(), start=1)
        ],
        "curves": [_curve(key, record["history"]) for key, record in records.items() if record.get("history")],
        "removals": [
            {"step": key, **{name: record[name] for name in REMOVAL if name in record}, **record["removed"]}
            for key, record in records.items()
            if "removed" in record
        ],
        "sensitivities": [
            {"step": key, "analysis": record["sensitivity"]}
            for key, record in records.items()
            if "sensitivity" in record
        ],
        "export": next((record["export"] for record in records.values() if "export" in record), None),
    }


def names_of_models(records: Mapping[str, Record]) -> dict[str, str]:
    """Return the name of the model that each step made, by key of the step; a second "pruned" is "pruned-2"."""
    keys = [key for key, record in records.items() if "model" in record]
    return dict(zip(keys, keys_of([records[key]["model"] for key in keys]), strict=True))


def _teacher_and_final(records: Mapping[str, Record]) -> tuple[str, str]:
    """Return the keys of the steps whose records describe the teacher and the final model.

    Records of other models are left out.

    Raises:
        UsageError: no record describes the final model.
    """
    teachers, models = (
        [key for key, record in records.items() if role in record.get("roles", ())] for role in ("teacher", "model")
    )
    exported = [key for key, record in records.items() if "export" in record]
    if exported:
        return teachers[-1], exported[-1]
    if not models:
        raise UsageError(
            "No step has evaluated the final model of the job.",
            "Goals and report need its numbers.",
            "Add a step that trains, prunes or exports the student, or leave out the student.",
        )
    return teachers[-1], models[-1]


def _goal(job: Job, steps: Mapping[str, Step], significance: str) -> dict[str, Any]:
    items = goal_items(job, steps, *_teacher_and_final(job.records), significance)
    return {
        "met": all(item["met"] for item in items),
        "text": " · ".join(goal_texts(job, steps)) or "no goal was set",
        "items": items,
    }


def _models(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    measure = _measurement(records) or {"names": {}}  # its names are those of the measured models
    _, final = _teacher_and_final(records)
    out = []
    for key, name in names_of_models(records).items():
        record, latency = records[key], None
        size, measured = record["bytes"], measure["names"].get(key)
        if measured is not None:
            race, size = measure["race"], measure["onnx_bytes"][measured]
            latency = race["latencies"][measured] | {"speedup": race["speedups"][measured] | {"of": race["reference"]}}
        out.append(
            {
                "key": name,
                "name": name,
                "parameters": record["parameters"],
                "macs": record["macs"],
                **{cost: record[cost] for cost in TRACED if cost in record},
                "bytes": size,
                "accuracy": {figure: record["accuracy"][figure] for figure in ("value", "low", "high", "n")},
                "balanced_accuracy": record.get("balanced_accuracy"),
                "latency": latency,
                "chosen": key == final,
            }
        )
    return out


def _curve(step: str, history: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "step": step,
        "epochs": [record["epoch"] for record in history],
        "loss": [record["loss"] for record in history],
        "terms": {name: [record["terms"].get(name) for record in history] for name in history[0]["terms"]},
        "accuracy": [record.get("accuracy") for record in history],
        "learning_rate": [record["learning_rate"] for record in history],
        "seconds": [record["seconds"] for record in history],
    }


def _quality(job: Job) -> dict[str, Any]:
    first, final = _teacher_and_final(job.records)
    compared = job.task.compare(job.logits(first), job.logits(final), job.data)
    names = names_of_models(job.records)
    return compared | {
        side: {"key": names[key], **compared.get(side, {})} for side, key in (("before", first), ("after", final))
    }


def _measurement(records: Mapping[str, Record]) -> Record | None:
    """Return the record of the step that measured latencies; None if there is none."""
    return next((record for record in records.values() if "race" in record), None)


def _measured(job: Job, environment: dict[str, Any]) -> dict[str, Any]:
    race = (_measurement(job.records) or {}).get("race", {})
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
        "notes": race.get("notes", []),
        "seed": job.seed,
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            **data.sizes,
        },
    }


def _not_measured(job: Job) -> list[str]:
    out = []
    if _measurement(job.records) is None:
        out.append("Latency: the job does not export and measure a file.")
    else:
        out.append("Other runtimes and machines: the times hold only for the runtime and machine of this report.")
    out.append(f"Other seeds: there is one training run, with seed {job.seed}; results differ between seeds.")
    out.append("Energy, and peak memory on the device.")
    out.append("Data that differs from the test part: other sources, noise, drift.")
    return out
