"""The JSON of a plan: its schema, and what its parts must have in common."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from kirsch import strict_json
from kirsch.errors import PlanError
from kirsch.graph import inputs
from kirsch.graph.graph import DECISIONS, SOFTMAX
from kirsch.graph.group import KINDS
from kirsch.json_schema import anything, array, either, flag, integer, mapping, number, one_of, record, text, wrong

VERSION = 1
CORRECT = "Correct the file, or make a new plan with kirsch.plan."
MOST_NUMBERS = 1 << 28
"""Numbers that all example inputs of a plan have together, which are drawn when it is applied: 1 GiB of float32."""

LARGEST = {
    "bool": 1,
    "uint8": 2**8 - 1,
    "int8": 2**7 - 1,
    "int16": 2**15 - 1,
    "uint16": 2**16 - 1,
    "int32": 2**31 - 1,
    "uint32": 2**32 - 1,
    "int64": 2**63 - 2,  # one more must fit as well
    "uint64": 2**63 - 2,
}
FLOATING = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
"""Element types of example inputs; `LARGEST` has the integers, with the largest value of each."""


def _fingerprint(value: Any, path: str) -> Any:
    if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
        raise wrong(path, "a sha256 of 64 hexadecimal digits", value)
    return value


TENSOR = record(
    {"name": text(), "shape": array(integer(0), most=16), "dtype": one_of((*FLOATING, *LARGEST)), "high": integer(0)}
)
VALUE = record({"name": text(), "value": anything})


def _input(value: Any, path: str) -> Any:
    """An example input: a tensor, a plain value, or a container of these; see `kirsch.graph.inputs`."""
    fields = value.keys() if type(value) is dict else ()
    if "value" in fields:
        inputs.read(VALUE(value, path))
    elif "items" in fields:
        NESTED(value, path)
        inputs.read(value)
    else:
        TENSOR(value, path)
    return value


NESTED = record({"name": text(), "kind": one_of(inputs.KINDS), "items": array(_input)})
COST = record(dict.fromkeys(("parameters", "macs", "activations"), integer(0)))
PLAN = record(
    {
        "kirsch_plan": one_of((VERSION,)),
        "model": record({"class": text(1), "fingerprint": _fingerprint, "parameters": integer(0)}),
        "goal": record({}, dict.fromkeys(("macs", "params"), number(above=0, below=1))),
        "method": record(
            {},
            {
                "importance": text(1),
                "norm": one_of((1, 2)),
                "scope": one_of(("global", "local")),
                "round_to": either(one_of(("auto",)), mapping(integer(1), KINDS), integer(1)),
                "exclude": array(text(1)),
                "granularity": mapping(number(least=0), KINDS),
                "uniform": flag,
                "min_keep": number(above=0, most=1),
                "seed": integer(0, 2**128),
                "weights": text(1),
            },
        ),
        "groups": array(
            record(
                {"name": text(1), "kind": one_of(tuple(KINDS)), "size": integer(2), "removed": array(integer(0))},
                {"reason": text()},
            )
        ),
        "blocks": array(record({"name": text(1)}, {"reason": text()})),
        "cost": record({"before": COST, "after": COST}),
        "inputs": array(_input),
        "tracing": record(
            {
                "outputs": array(text(1)),
                "decisions": one_of(DECISIONS),
                "scope": text(),
                "softmax": one_of(SOFTMAX),
                "as_graph": flag,
            }
        ),
        "notes": array(text()),
        "configuration": mapping(number(above=0, most=1e12)),
    }
)


def read(content: str | bytes, title: str) -> dict[str, Any]:
    """The content of a plan file that fits the schema and itself.

    Args:
        content: of the file.
        title: how messages call the plan, "The plan small/plan.json".

    Raises:
        PlanError: it does not; names the field, what is expected there and what was found.
    """
    try:
        found = strict_json.parse(content)
    except ValueError as error:
        why = str(error)
        raise PlanError(f"{title} cannot be read as JSON.", f"{why[0].upper()}{why[1:]}.", CORRECT) from error
    if type(found) is not dict or "kirsch_plan" not in found:
        raise PlanError(
            f"{title} is not a plan.", f'The key "kirsch_plan": {VERSION} is missing.', "Give a file of kirsch plan."
        )
    try:
        plan: dict[str, Any] = PLAN(found, "")
        _check_whole(plan)
    except ValueError as error:
        raise PlanError(f"{title} is not valid.", f"{error}.", CORRECT) from error
    for place, group in enumerate(plan["groups"]):
        _check_units(group, place, title)
    return plan


def _check_whole(plan: dict[str, Any]) -> None:
    """Raise a ValueError where two fields contradict each other."""
    before, after = plan["cost"]["before"], plan["cost"]["after"]
    if plan["model"]["parameters"] != before["parameters"]:
        raise ValueError(
            f"model.parameters is {plan['model']['parameters']:,} and cost.before.parameters is "
            f"{before['parameters']:,}; they must be equal"
        )
    for name, value in after.items():
        if value > before[name]:
            raise ValueError(f"cost.after.{name} is {value:,}, more than cost.before.{name}, {before[name]:,}")
    if plan["method"] and "importance" not in plan["method"]:
        raise ValueError("method.importance is missing")
    if plan["tracing"]["as_graph"] and plan["tracing"]["scope"]:
        raise ValueError("tracing.as_graph is true and tracing.scope is not empty; only one of them is possible")
    for part in ("groups", "blocks"):
        names = [entry["name"] for entry in plan[part]]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{part} has {twice!r} twice; join the two entries")
    _check_inputs(plan["inputs"])


def _check_inputs(entries: list[dict[str, Any]]) -> None:
    names = [entry["name"] for entry in entries if entry["name"]]
    if len(set(names)) < len(names):
        raise ValueError(f"inputs has two inputs of the same name, {max(names, key=names.count)!r}")
    tensors = list(inputs.tensors(map(inputs.read, entries)))
    if sum(math.prod(tensor.shape) for tensor in tensors) > MOST_NUMBERS:
        shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors)
        raise ValueError(f"inputs of shape {shapes} have more than {MOST_NUMBERS:,} numbers")
    for place, tensor in enumerate(tensors):
        most = LARGEST.get(tensor.dtype, 0)
        if tensor.high > most:
            raise ValueError(f"inputs[{place}].high is {tensor.high}; {most} is the most for {tensor.dtype}")


def _check_units(group: dict[str, Any], place: int, title: str) -> None:
    """Raise a PlanError where a group lists a unit that it does not have, or twice, or lists all of them."""
    units, name, field = group["removed"], group["name"], f"groups[{place}].removed"
    if len(set(units)) < len(units):
        twice = sorted(unit for unit, number in Counter(units).items() if number > 1)
        raise PlanError(
            f"{title} removes unit {twice[0]} of {name!r} twice.",
            f"{field} lists {', '.join(map(str, twice[:5]))}{', …' if len(twice) > 5 else ''} more than once.",  # noqa: PLR2004 - five are shown
            "List each unit once.",
        )
    outside = [unit for unit in units if unit >= group["size"]]
    if outside:
        raise PlanError(
            f"{title} removes unit {outside[0]} of {name!r}.",
            f"The group has units 0 to {group['size'] - 1}.",
            f"Correct {field}.",
        )
    if len(units) == group["size"]:
        raise PlanError(
            f"{title} removes all {len(units)} units of {name!r}.",
            f"They are in {field}.",
            "Keep at least one of them.",
        )
