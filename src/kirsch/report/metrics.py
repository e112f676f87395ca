"""Schema and reader of metrics.json, the input of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch import strict_json
from kirsch.errors import LoadError
from kirsch.json_schema import Check, anything, array, flag, integer, mapping, nullable, number, one_of, record, text
from kirsch.pruning.sensitivity_table import SCHEMA as ANALYSIS

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1


def _fields(**required: Check) -> Check:
    """Return the schema of an object with these fields; others are allowed, since later versions may add fields."""
    return record(required, more=True)


SHARE, TIME, COUNT, FIGURE = number(0, most=1), number(above=0), integer(0), number()
RATIO = _fields(value=TIME, low=TIME, high=TIME)
LATENCY = _fields(
    median_us=TIME, p95_us=TIME, speedup=record({"value": TIME, "low": TIME, "high": TIME, "of": text()}, more=True)
)
MODEL = record(
    {
        "key": text(1),
        "name": text(1),
        "parameters": COUNT,
        "macs": COUNT,
        "bytes": integer(1),
        "accuracy": _fields(value=SHARE, low=SHARE, high=SHARE, n=COUNT),
        "latency": nullable(LATENCY),
        "chosen": flag,
    },
    {"size": COUNT, "memory": COUNT},
    more=True,
)
CURVE = _fields(
    step=text(),
    epochs=array(COUNT, least=1),
    loss=array(nullable(FIGURE)),
    terms=mapping(array(nullable(FIGURE))),
    accuracy=array(nullable(SHARE)),
    learning_rate=array(nullable(FIGURE)),
)
GROUP = _fields(
    name=text(1),
    kind=text(),
    size=integer(1),
    removed=array(COUNT),
    reason=text(),
    layers=array(text()),
    parameters=FIGURE,
    macs=FIGURE,
)
LAYER = _fields(
    name=text(), group=text(), before=integer(1), after=COUNT, parameters_before=COUNT, parameters_after=COUNT
)
BLOCKER = _fields(reason=text(), where=text(), source=text(), operation=text(), share=SHARE)
SIDE = record({"key": text()}, {"confusion": array(array(COUNT))}, more=True)
CALIBRATION = _fields(ece=SHARE, bins=array(_fields(confidence=SHARE, accuracy=SHARE, n=COUNT)))
QUALITY = record(
    {"before": SIDE, "after": SIDE},
    {
        "classes": array(text(), least=1),
        "lost": array(_fields(name=text(), before=SHARE, after=SHARE, n=COUNT)),
        "calibration": _fields(before=CALIBRATION, after=CALIBRATION),
        "paired": _fields(text=text()),
    },
    more=True,
)
SENSITIVITIES = array(_fields(step=text(), analysis=ANALYSIS))
SCHEMA = _fields(
    kirsch_metrics=one_of((VERSION,)),
    name=text(),
    run=text(),
    kirsch=text(),
    created=text(),
    seconds=number(0),
    goal=_fields(met=flag, text=text(), items=array(_fields(text=text(), met=flag, significance=text()))),
    models=array(MODEL, least=1),
    steps=array(_fields(number=COUNT, key=text(), did=text(), cells=array(text()), seconds=number(0))),
    curves=array(CURVE),
    warnings=array(_fields(step=text(), text=text())),
    removals=array(
        _fields(
            step=text(),
            groups=array(GROUP),
            layers=array(LAYER),
            blockers=array(BLOCKER),
            notes=array(text()),
            verification=nullable(_fields(text=text(), reason=text(), power=FIGURE)),
        )
    ),
    quality=nullable(QUALITY),
    export=nullable(
        record(
            {"file": text(1), "bytes": COUNT, "sha256": text(1), "format": text()},
            {"same_labels": COUNT, "n": COUNT, "max_error": FIGURE, "usage": text()},
            more=True,
        )
    ),
    measured=_fields(
        runtime=nullable(text()),
        threads=nullable(COUNT),
        batch=nullable(COUNT),
        rounds=nullable(COUNT),
        machine=text(),
        aa=nullable(RATIO),
        load_before=nullable(FIGURE),
        load_after=nullable(FIGURE),
        notes=array(text()),
        seed=COUNT,
        data=_fields(name=text(), sha256=text(), train=nullable(COUNT), validation=COUNT, test=COUNT),
    ),
    not_measured=array(text()),
    provenance=_fields(recipe=text(), plans=array(anything), environment=anything, fingerprint=text()),
)


def read_metrics(path: Path) -> dict[str, Any]:
    """Read metrics.json and check that it has every field that the report shows.

    Raises:
        OSError: the file cannot be read.
        LoadError: the file is not valid JSON, or a field is missing or wrong; the message names the field.
    """
    try:
        metrics: dict[str, Any] = SCHEMA(strict_json.read(path), "")
        if "sensitivities" in metrics:  # files of earlier versions have none
            metrics["sensitivities"] = SENSITIVITIES(metrics["sensitivities"], "sensitivities")
        _check_consistency(metrics)
    except ValueError as error:
        raise LoadError(f"{path} is damaged.", f"{error}.", f"Write it again: kirsch resume {path.parent}") from error
    return metrics


def _check_consistency(metrics: dict[str, Any]) -> None:
    """Check that fields do not contradict each other.

    Raises:
        ValueError: two fields contradict each other.
    """
    chosen = [model["key"] for model in metrics["models"] if model["chosen"]]
    if len(chosen) != 1:
        raise ValueError(f"models: {len(chosen)} models are chosen; exactly one must be")
    for index, curve in enumerate(metrics["curves"]):
        series = [curve["loss"], curve["accuracy"], curve["learning_rate"], *curve["terms"].values()]
        if any(len(values) != len(curve["epochs"]) for values in series):
            raise ValueError(f"curves[{index}]: each list must have {len(curve['epochs'])} values, one per epoch")
    for place, removed in enumerate(metrics["removals"]):
        names = {group["name"] for group in removed["groups"]}
        for index, layer in enumerate(removed["layers"]):
            if layer["group"] not in names:
                raise ValueError(f"removals[{place}].layers[{index}].group: there is no group {layer['group']!r}")
    quality, measured = metrics["quality"], metrics["measured"]
    if quality:
        _check_confusion(quality)
    missing = [name for name in ("threads", "batch", "rounds", "aa") if measured[name] is None]
    if measured["runtime"] is not None and missing:
        raise ValueError(f"measured.{missing[0]} is null although measured.runtime is not")


def _check_confusion(quality: dict[str, Any]) -> None:
    """Check that the confusion matrices, which only some tasks have, fit the names of the classes.

    Raises:
        ValueError: the names are missing, or a matrix has another size.
    """
    for side in ("before", "after"):
        matrix = quality[side].get("confusion")
        if matrix is not None and "classes" not in quality:
            raise ValueError("quality.classes is missing")
        if matrix is not None and {len(matrix), *map(len, matrix)} != {len(quality["classes"])}:
            raise ValueError(f"quality.{side}.confusion: one row and one column per class are expected")
