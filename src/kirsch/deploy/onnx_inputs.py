"""Generate inputs for timing an ONNX file from the shapes and types in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures
from kirsch.errors import LoadError, UsageError, listing
from kirsch.graph.inputs import InputSpec
from kirsch.measurement.machine import require_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.deploy.onnxruntime import OnnxSession

NUMPY_TYPES = {"float": "float32", "double": "float64"}
"""Type name of ONNX Runtime → name in numpy, where the two names differ."""

SUPPORTED_TYPES = (
    *("float32", "float64", "float16", "int64", "int32", "int16", "int8"),
    *("uint8", "uint16", "uint32", "uint64", "bool"),
)
"""Types for which inputs can be generated."""


def require_inputs(session: OnnxSession) -> None:
    """Check that a file has inputs.

    Raises:
        LoadError: the file has no inputs, so its output is constant.
    """
    if not session.inputs:
        raise LoadError(
            f"{session.path} has no inputs.",
            "Its output is constant, so its latency is meaningless.",
            "Export the model with its inputs as arguments of its forward, not as constants.",
        )


def generated_inputs(session: OnnxSession, specs: Sequence[InputSpec] = ()) -> tuple[NDArray[Any], ...]:
    """Return one array per input: normally distributed floats, integers drawn from {0, 1}, and masks of ones.

    Args:
        session: the file; a free batch axis gets size 1.
        specs: shapes to use instead of those in the file, by input name or in the order of the file's inputs.

    Raises:
        LoadError: the file has no inputs, an input has an axis of size 0, or the type of an input is not supported.
        UsageError: an axis other than the batch is free and has no given size, an input name is unknown, or the number
            of shapes is wrong.
        MemoryShortageError: the inputs do not fit into the memory of the machine.
    """
    require_inputs(session)
    given_shapes = _shapes_by_name(session, specs)
    completed = []
    for name, file_shape, onnx_type in zip(session.inputs, session.shapes, session.types, strict=True):
        dtype = NUMPY_TYPES.get(onnx_type, onnx_type)
        if dtype not in SUPPORTED_TYPES:
            raise LoadError(
                f"The input {name!r} of {session.path} is of type {onnx_type}.",
                "Inputs can only be generated for tensors of numbers.",
                "Call kirsch.measure in Python and pass example_inputs.",
            )
        shape = given_shapes.get(name) or _shape_in_file(session, name, file_shape)
        completed.append(InputSpec(name, shape, dtype))
    require_memory(completed)
    random = np.random.default_rng(0)
    return tuple(_random_array(random, spec) for spec in completed)


def _shapes_by_name(session: OnnxSession, specs: Sequence[InputSpec]) -> dict[str, tuple[int, ...]]:
    """Return the given shapes by input name."""
    if any(spec.name for spec in specs):
        unknown = next((spec.name for spec in specs if spec.name not in session.inputs), None)
        if unknown is not None:
            raise UsageError(f"{session.path} has no input {unknown!r}.", listing(session.inputs))
        return {spec.name: spec.shape for spec in specs}
    if specs and len(specs) != len(session.inputs):
        raise UsageError(
            f"{session.path} has {figures.counted(len(session.inputs), 'input')}; "
            f"the number of given shapes is {len(specs)}.",
            listing(session.inputs),
            f"Give --input for each input, in this order or by name: --input {session.inputs[0]}=1,3,224,224.",
        )
    return {name: spec.shape for name, spec in zip(session.inputs, specs, strict=False)}


def _shape_in_file(session: OnnxSession, name: str, file_shape: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the shape of an input in the file, with size 1 for a free batch."""
    sizes = tuple(1 if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(file_shape))
    if sizes and all(isinstance(size, int) and size > 0 for size in sizes):
        return sizes
    text = " × ".join(str(size) if size is not None else "?" for size in file_shape)
    why = f"The shape in the file is {text}." if file_shape else "The number of axes is unknown or 0."
    if 0 in file_shape:
        raise LoadError(
            f"The input {name!r} of {session.path} has an axis of size 0.",
            why,
            "Export the model again, with example inputs that contain samples.",
        )
    known = [str(size) if isinstance(size, int) and size > 0 else "224" for size in sizes]
    example = ",".join(known) or "1,3,224,224"
    raise UsageError(
        f"The shape of the input {name!r} of {session.path} is not known.",
        why,
        f"Give the shape: --input {name}={example}.",
    )


def _random_array(random: np.random.Generator, spec: InputSpec) -> NDArray[Any]:
    if spec.dtype.startswith("float"):
        return random.standard_normal(spec.shape).astype(spec.dtype)
    if "mask" in spec.name:
        return np.ones(spec.shape, spec.dtype)
    return random.integers(0, 2, spec.shape).astype(spec.dtype)
