"""JSON of a plan: the schema, and checks that its fields are consistent."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from kirsch import strict_json
from kirsch.errors import PlanError
from kirsch.graph import inputs
from kirsch.graph.cost_names import WORDS
from kirsch.graph.graph import DECISIONS, SOFTMAX
from kirsch.graph.kinds import BLOCK, KINDS
from kirsch.json_schema import (
    anything,
    array,
    either,
    flag,
    integer,
    mapping,
    nullable,
    number,
    one_of,
    record,
    text,
    wrong,
)

VERSION = 1
CORRECT = "Correct the file, or make a new plan with kirsch.plan."
MOST_NUMBERS = 1 << 28
"""Largest number of elements in all example inputs, 1 GiB of float32: applying the plan creates inputs of this size."""

LARGEST = {
    "bool": 1,
    "uint8": 2**8 - 1,
    "int8": 2**7 - 1,
    "int16": 2**15 - 1,
    "uint16": 2**16 - 1,
    "int32": 2**31 - 1,
    "uint32": 2**32 - 1,
    "int64": 2**63 - 2,  # inputs are drawn below this value plus 1, which must fit into int64
    "uint64": 2**63 - 2,
}
FLOATING = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
"""Floating types of example inputs. `LARGEST` has the integer types with the largest value of each."""


def _fingerprint(value: Any, path: str) -> Any:
    if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
        raise wrong(path, "a sha256 of 64 hexadecimal digits", value)
    return value


TENSOR = record(
    {
        "name": text(),
        "shape": array(integer(0, MOST_NUMBERS), most=16),
        "dtype": one_of((*FLOATING, *LARGEST)),
        "high": integer(0),
    }
)
VALUE = record({"name": text(), "value": anything})


def _input(value: Any, path: str) -> Any:
    """Check an example input: a tensor, a plain value, or a container of these; see `kirsch.graph.inputs`."""
    fields = value.keys() if type(value) is dict else ()
    if "value" in fields:
        inputs.read(VALUE(value, path))
    elif "items" in fields:
        NESTED(value, path)
        inputs.read(value)
    else:
        TENSOR(value, path)
    return value


NESTED = record({"name": text(), "kind": one_of(inputs.CONTAINERS), "items": array(_input)})
_PLANNED = (*KINDS, BLOCK)
COST = record(dict.fromkeys(("parameters", "macs", "activations", "size", "memory"), integer(0)))
SEARCH = record(
    {
        "quality": text(1),
        "evaluated": integer(1),
        "starts": mapping(nullable(number())),
        "improvements": array(array(number(), least=2, most=2), least=1),
    }
)
PLAN = record(
    {
        "kirsch_plan": one_of((VERSION,)),
        "model": record({"class": text(1), "fingerprint": _fingerprint, "parameters": integer(0)}),
        "goal": record({}, dict.fromkeys(WORDS, number(above=0, below=1))),
        "method": record(
            {},
            {
                "importance": text(1),
                "loss": text(),
                "norm": one_of((1, 2)),
                "ranking": one_of(("auto", "global", "local", "isomorphic", "per_cost", "milp", "legr")),
                "round_to": either(one_of(("auto",)), mapping(integer(1), KINDS), integer(1)),
                "exclude": array(text(1)),
                "keep_outputs": array(text(1)),
                "kinds": nullable(either(mapping(number(least=0), _PLANNED), array(one_of(_PLANNED)))),
                "uniform": flag,
                "loadable": nullable(flag),
                "min_keep": number(above=0, most=1),
                "keep": nullable(mapping(either(integer(1), number(above=0, most=1)))),
                "max_drop": nullable(number(least=0, below=1)),
                "metric": nullable(text(1)),
                "class_weights": nullable(mapping(number(least=0))),
                "minimize": nullable(one_of(tuple(WORDS))),
                "measured": array(mapping(number(), (*WORDS, "quality", "drop"))),
                "seed": integer(0, 2**128),
                "weights": text(1),
                "evaluations": integer(1),
                "search": SEARCH,
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
                "module": text(),
                "softmax": one_of(SOFTMAX),
                "as_graph": flag,
            }
        ),
        "notes": array(text()),
        "configuration": mapping(number(above=0, most=1e12)),
    },
    {"goal_of": COST},
)


def read(content: str | bytes, title: str) -> dict[str, Any]:
    """Return the content of a plan file after validation.

    Args:
        content: content of the file.
        title: name of the plan in messages, such as "The plan small/plan.json".

    Raises:
        PlanError: the content is not a valid plan. The message names the field, the expected and the found value.
    """
    try:
        parsed = strict_json.parse(content)
    except ValueError as error:
        why = str(error)
        raise PlanError(f"{title} cannot be read as JSON.", f"{why[0].upper()}{why[1:]}.", CORRECT) from error
    if type(parsed) is not dict or "kirsch_plan" not in parsed:
        raise PlanError(
            f"{title} is not a plan.",
            f'The key "kirsch_plan": {VERSION} is missing.',
            "Use a file written by kirsch plan.",
        )
    try:
        plan: dict[str, Any] = PLAN(parsed, "")
        _check_consistency(plan)
    except ValueError as error:
        raise PlanError(f"{title} is not valid.", f"{error}.", CORRECT) from error
    for index, group in enumerate(plan["groups"]):
        _check_units(group, index, title)
    return plan


def _check_consistency(plan: dict[str, Any]) -> None:
    """Check that fields do not contradict each other.

    Raises:
        ValueError: two fields contradict each other.
    """
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
    if plan["tracing"]["as_graph"] and plan["tracing"]["module"]:
        raise ValueError("tracing.as_graph is true and tracing.module is not empty; they exclude each other")
    for part in ("groups", "blocks"):
        names = [entry["name"] for entry in plan[part]]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{part} has {repeated!r} twice; merge the two entries")
    _check_inputs(plan["inputs"])


def _check_inputs(entries: list[dict[str, Any]]) -> None:
    names = [entry["name"] for entry in entries if entry["name"]]
    if len(set(names)) < len(names):
        raise ValueError(f"inputs has two inputs of the same name, {max(names, key=names.count)!r}")
    tensors = list(inputs.tensors(map(inputs.read, entries)))
    # A size of 0 counts as 1: the strides of an empty array are products of its other sizes, which must not be huge.
    if sum(math.prod(size or 1 for size in tensor.shape) for tensor in tensors) > MOST_NUMBERS:
        shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors)
        raise ValueError(f"inputs of shape {shapes} have more than {MOST_NUMBERS:,} numbers; sizes of 0 count as 1")
    for index, tensor in enumerate(tensors):
        largest = LARGEST.get(tensor.dtype, 0)
        if tensor.high > largest:
            raise ValueError(f"inputs[{index}].high is {tensor.high}; {largest} is the largest for {tensor.dtype}")


def _check_units(group: dict[str, Any], index: int, title: str) -> None:
    """Check the list of removed units of a group.

    Raises:
        PlanError: a unit does not exist or is repeated, or all units are listed.
    """
    units, name, field = group["removed"], group["name"], f"groups[{index}].removed"
    if len(set(units)) < len(units):
        repeated = sorted(unit for unit, count in Counter(units).items() if count > 1)
        raise PlanError(
            f"{title} removes unit {repeated[0]} of {name!r} twice.",
            f"{field} lists {', '.join(map(str, repeated[:5]))}{', …' if len(repeated) > 5 else ''} more than once.",  # noqa: PLR2004 - five are shown
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
            f"All of them are in {field}.",
            "Keep at least one of them.",
        )
