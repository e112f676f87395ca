"""Example inputs from the command line: --input 1,3,224,224, 1,24:int64, name=1,24:int64."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import UsageError, nearest
from kirsch.frameworks.find import framework_of
from kirsch.graph.inputs import InputSpec
from kirsch.measurement.machine import BYTES, require_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

FORM = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<sizes>[0-9]+(?:[,x][0-9]+)*)(?::(?P<dtype>\w+))?", re.ASCII)
EXAMPLE = "Write --input 1,3,224,224; --input 1,24:int64 for token ids; or, by name, --input attention_mask=1,24:int64."


def specifications(texts: Sequence[str]) -> list[InputSpec]:
    """Return the inputs of texts such as "1,3,224,224", "1,24:int64" and "input_ids=1,24:int64".

    Raises:
        UsageError: a text has another form, a type is unknown, a name is repeated, or only some inputs have names.
        MemoryShortageError: the inputs do not fit into the memory of the machine.
    """
    specs = [_specification(text) for text in texts]
    names = [spec.name for spec in specs if spec.name]
    if names and len(names) < len(specs):
        raise UsageError(
            "Some of the inputs have names, and some have none.",
            "The inputs are passed to `forward` either all by position or all by name.",
            f"Name each input: --input name={','.join(map(str, specs[0].shape))}.",
        )
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"The input {repeated!r} is given twice.", fix="Give each input once.")
    require_memory(specs)
    return specs


def example_inputs(model: Any, specs: Sequence[InputSpec]) -> Any:
    """Return example inputs of the model: normal random floats, random integers 0 and 1, and ones for masks."""
    framework = framework_of(model)
    values = framework.analysis.inputs_like(specs, model)
    if isinstance(values, dict):
        for spec in specs:
            if spec.high and "mask" in spec.name:
                values[spec.name] = framework.inference.from_numpy(np.ones(spec.shape, spec.dtype))
    return values


def _specification(text: str) -> InputSpec:
    form = FORM.fullmatch(text.replace(" ", ""))
    sizes = tuple(int(size) for size in re.split("[,x]", form["sizes"])) if form else ()
    if form is None or not all(0 < size < 2**63 for size in sizes):
        raise UsageError(
            f"--input {text!r} is not a shape.",
            "A shape consists of whole numbers above 0, separated by commas.",
            EXAMPLE,
        )
    dtype = form["dtype"] or "float32"
    if dtype not in BYTES:
        raise UsageError(
            f"--input {text!r}: the type {dtype!r} is unknown.", f"Known: {', '.join(BYTES)}.", nearest(dtype, BYTES)
        )
    return InputSpec(form["name"] or "", sizes, dtype, high=0 if "float" in dtype else 1)
