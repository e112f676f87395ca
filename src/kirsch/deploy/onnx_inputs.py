"""Inputs to time an ONNX file with, from what the file states of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import LoadError, UsageError, listing
from kirsch.graph.inputs import InputSpec
from kirsch.measurement.machine import require_room

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.deploy.onnxruntime import OnnxSession

NUMPY = {"float": "float32", "double": "float64"}
"""Types of numbers that ONNX Runtime and numpy call differently."""

KNOWN = (
    *("float32", "float64", "float16", "int64", "int32", "int16", "int8"),
    *("uint8", "uint16", "uint32", "uint64", "bool"),
)
"""Types that numpy can fill."""


def require_inputs(session: OnnxSession) -> None:
    """Make sure that a file takes inputs.

    Raises:
        LoadError: it takes none, so that it computes the same numbers at each run.
    """
    if not session.inputs:
        raise LoadError(
            f"{session.path} has no inputs.",
            "It gives the same numbers at each run, so that there is nothing to time.",
            "Export the model with its inputs as arguments of its forward, not as constants.",
        )


def stand_ins(session: OnnxSession, stated: Sequence[InputSpec] = ()) -> tuple[NDArray[Any], ...]:
    """One array for each input of a file: normal numbers, integers of 0 and 1.

    Args:
        session: the file; its batch axis is taken as 1 where it is free.
        stated: shapes that replace those of the file, by name or in its order.

    Raises:
        LoadError: the file has no inputs, or one without numbers or of a type that numbers cannot fill.
        UsageError: a shape is neither stated nor in the file, or the names or the number of those stated do not fit.
        MemoryShortageError: the machine could not hold the inputs.
    """
    require_inputs(session)
    shapes = _matched(session, stated)
    specs = []
    for name, own, kind in zip(session.inputs, session.shapes, session.types, strict=True):
        dtype = NUMPY.get(kind, kind)
        if dtype not in KNOWN:
            raise LoadError(
                f"The input {name!r} of {session.path} is of type {kind}.",
                "Only tensors of numbers can be made up for a measurement.",
                "Call kirsch.measure in Python with example_inputs of your own.",
            )
        specs.append(InputSpec(name, shapes.get(name) or _own_shape(session, name, own), dtype))
    require_room(specs)
    random = np.random.default_rng(0)
    return tuple(_filled(random, spec) for spec in specs)


def _matched(session: OnnxSession, stated: Sequence[InputSpec]) -> dict[str, tuple[int, ...]]:
    """Name of an input → the shape that is stated for it."""
    if any(spec.name for spec in stated):
        unknown = next((spec.name for spec in stated if spec.name not in session.inputs), None)
        if unknown is not None:
            raise UsageError(f"{session.path} has no input {unknown!r}.", listing(session.inputs))
        return {spec.name: spec.shape for spec in stated}
    if stated and len(stated) != len(session.inputs):
        raise UsageError(
            f"{session.path} has {len(session.inputs)} inputs, and {len(stated)} shapes are given.",
            listing(session.inputs),
            f"Give --input once for each, in this order or by name: --input {session.inputs[0]}=1,3,224,224.",
        )
    return {name: spec.shape for name, spec in zip(session.inputs, stated, strict=False)}


def _own_shape(session: OnnxSession, name: str, own: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape that a file states for an input, with 1 for a free batch."""
    sizes = tuple(1 if place == 0 and not isinstance(size, int) else size for place, size in enumerate(own))
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        found = " × ".join(str(size) if size is not None else "?" for size in own)
        why = f"It is stated as {found}." if own else "Its number of axes is unknown, or it is a single number."
        if 0 in own:
            raise LoadError(
                f"The input {name!r} of {session.path} holds no numbers.",
                why,
                "Export the model again, with example inputs that hold samples.",
            )
        known = [str(size) if isinstance(size, int) and size > 0 else "224" for size in sizes]
        example = ",".join(known) or "1,3,224,224"
        raise UsageError(
            f"The shape of the input {name!r} of {session.path} is not known.",
            why,
            f"Give it: --input {name}={example}.",
        )
    return sizes


def _filled(random: np.random.Generator, spec: InputSpec) -> NDArray[Any]:
    if spec.dtype.startswith("float"):
        return random.standard_normal(spec.shape).astype(spec.dtype)
    if "mask" in spec.name:
        return np.ones(spec.shape, spec.dtype)
    return random.integers(0, 2, spec.shape).astype(spec.dtype)
