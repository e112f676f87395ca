"""Example inputs as the command line states them: --input 1,3,224,224, 1,24:int64, name=1,24:int64."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import UsageError, nearest
from kirsch.frameworks.port import framework_of
from kirsch.graph.graph import InputSpec
from kirsch.measurement.machine import BYTES, require_room

if TYPE_CHECKING:
    from collections.abc import Sequence

FORM = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<sizes>[0-9]+(?:[,x][0-9]+)*)(?::(?P<dtype>\w+))?", re.ASCII)
EXAMPLE = "Write --input 1,3,224,224, --input 1,24:int64 for token ids, or --input attention_mask=1,24:int64."


def specifications(texts: Sequence[str]) -> list[InputSpec]:
    """Inputs from texts such as "1,3,224,224", "1,24:int64" and "input_ids=1,24:int64"; empty from none.

    Raises:
        UsageError: a text has another form, a type is unknown, a name comes twice, or only some inputs have names.
        MemoryShortageError: the inputs do not fit into the memory of the machine.
    """
    found = [_specification(text) for text in texts]
    names = [spec.name for spec in found if spec.name]
    if names and len(names) < len(found):
        raise UsageError(
            "Some of the inputs have names, and some have none.",
            "They go to the forward either all by place or all by name.",
            f"Name each: --input name={','.join(map(str, found[0].shape))}.",
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"The input {twice!r} is given twice.", fix="Give each input once.")
    require_room(found)
    return found


def example_inputs(model: Any, specs: Sequence[InputSpec]) -> Any:
    """Arrays of the framework: normal numbers, integers of 0 and 1, and ones for a mask, which hides nothing then."""
    framework = framework_of(model)
    values = framework.inputs_like(specs, model)
    if isinstance(values, dict):
        for spec in specs:
            if spec.high and "mask" in spec.name:
                values[spec.name] = framework.tensor(np.ones(spec.shape, spec.dtype))
    return values


def _specification(text: str) -> InputSpec:
    form = FORM.fullmatch(text.replace(" ", ""))
    sizes = tuple(int(size) for size in re.split("[,x]", form["sizes"])) if form else ()
    if form is None or not all(0 < size < 2**63 for size in sizes):
        raise UsageError(
            f"--input {text!r} is not a shape.", "Whole numbers above 0 are needed, with commas between.", EXAMPLE
        )
    dtype = form["dtype"] or "float32"
    if dtype not in BYTES:
        raise UsageError(
            f"--input {text!r}: there is no type {dtype!r}.", f"Known: {', '.join(BYTES)}.", nearest(dtype, BYTES)
        )
    return InputSpec(form["name"] or "", sizes, dtype, high=0 if "float" in dtype else 1)
