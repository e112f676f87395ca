"""Inputs of samples: one array, or a tuple or dict of arrays, which may be nested; samples lie on the first axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.arrays import host, map_arrays
from kirsch.data.structure import summary
from kirsch.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


def named_arrays(inputs: Any) -> dict[str, Any]:
    """Return the arrays of inputs by name.

    The name is the key in a dict or the position in a tuple or list; names of nested arrays are joined by dots. The
    name of a single array is empty.
    """
    if isinstance(inputs, Mapping):
        parts = list(inputs.items())
    elif isinstance(inputs, (tuple, list)):
        parts = list(enumerate(inputs))
    else:
        return {"": inputs}
    return {
        f"{name}.{inner}" if inner else str(name): array
        for name, part in parts
        for inner, array in named_arrays(part).items()
    }


def without_container(inputs: Any) -> Any:
    """Return the array of a tuple or list whose only entry is an array; return other inputs unchanged.

    A dict is returned unchanged: its key may name any argument of the model.
    """
    single = isinstance(inputs, (tuple, list)) and len(inputs) == 1 and hasattr(inputs[0], "shape")
    return inputs[0] if single else inputs


def rows(inputs: Any, indices: Any) -> Any:
    """Return the inputs of some samples."""
    return map_arrays(lambda array: array[indices], inputs)


def capitalized(text: str) -> str:
    """Return a text with a capital first letter; the other letters are unchanged."""
    return f"{text[0].upper()}{text[1:]}"


def subject(name: str, owner: str) -> str:
    """Return "The inputs of ArrayData are", or "The input 'mask' of ArrayData is" for an input with a name."""
    return f"The input {name!r} of {owner} is" if name else f"The inputs of {owner} are"


def converted(convert: Callable[[str, Any], NDArray[Any]], inputs: Any, name: str = "") -> Any:
    """Return inputs with converted arrays.

    Args:
        convert: function (name, value) → array; see `named_arrays` for the names. A list or an empty container counts
            as one value.
        inputs: one value, or a tuple or dict of values, which may be nested.
        name: name of the inputs if they are nested in others.
    """
    prefix = f"{name}." if name else ""
    if isinstance(inputs, Mapping) and inputs:
        return {key: converted(convert, part, f"{prefix}{key}") for key, part in inputs.items()}
    if isinstance(inputs, tuple) and inputs:
        return tuple(converted(convert, part, f"{prefix}{number}") for number, part in enumerate(inputs))
    return convert(name, inputs)


def inputs_of_batch(inputs: Any, samples: int, batch: str) -> Any:
    """Return the inputs of a batch as numpy arrays with one row for each sample.

    Args:
        inputs: inputs of a `Batch`. A single array may be in a tuple.
        samples: number of samples of the batch.
        batch: name of the batch, for messages.

    Raises:
        DataError: an input is not an array, or has another number of rows.
    """
    inputs = without_container(inputs)
    for name, array in named_arrays(inputs).items():
        if not len(getattr(array, "shape", ())):
            raise DataError(
                f"{subject(name, batch)} {summary(array)}; expected an array with the samples on the first axis.",
                "The exported file takes arrays only.",
                "Leave it out of the batches, and set the value in the model.",
            )
        if len(array) != samples:
            raise DataError(
                f"{subject(name, batch)} {summary(array)}; expected {samples} samples on the first axis.",
                fix="Give each input, and the labels, one row for each sample.",
            )
    return map_arrays(host, inputs)


def require_same_inputs(inputs: Any, name: str, others: Any, other: str) -> None:
    """Check that inputs have the same names and numbers of axes as other inputs.

    Args:
        inputs, others: one array, or a tuple or dict of arrays.
        name, other: names of the inputs and of the others, for messages.

    Raises:
        DataError: the names or numbers of axes differ.
    """
    found, expected = named_arrays(inputs), named_arrays(others)
    if set(found) != set(expected):
        raise DataError(
            f"{capitalized(name)} has {_listed(found)}; {other} has {_listed(expected)}.",
            "All samples are inputs of the same model.",
            "Give the same inputs in all parts and batches, as a dict of the names that the model's forward takes, or "
            "as a tuple in the order of its arguments.",
        )
    for key, array in found.items():
        if len(array.shape) != len(expected[key].shape):
            raise DataError(
                f"{subject(key, name)} of shape {tuple(array.shape)}; in {other}, the shape is "
                f"{tuple(expected[key].shape)}.",
                fix="Give inputs with the same number of axes in all parts.",
            )


def _listed(arrays: dict[str, Any]) -> str:
    return "a single input array" if list(arrays) == [""] else f"the inputs {', '.join(arrays)}"


def joined(batches: Sequence[Any], name: str) -> Any:
    """Return the inputs of several batches as inputs of one batch.

    Args:
        batches: inputs of each batch, as `inputs_of_batch` returns them.
        name: name of the samples, for messages.

    Raises:
        DataError: the batches differ in their inputs, or samples differ in shape.
    """
    for number, inputs in enumerate(batches[1:], start=2):
        require_same_inputs(inputs, f"batch {number} of {name}", batches[0], "batch 1")
    arrays = [named_arrays(inputs) for inputs in batches]
    parts = iter([joined_arrays([each[key] for each in arrays], name, key) for key in arrays[0]])
    return map_arrays(lambda _: next(parts), batches[0])


def joined_arrays(arrays: Sequence[NDArray[Any]], name: str, key: str = "") -> NDArray[Any]:
    """Return the rows of several arrays as one array.

    Args:
        arrays: arrays of shape (N, ...).
        name: name of the samples, for messages.
        key: name of the arrays, for messages; empty for a single input.

    Raises:
        DataError: the rows differ in shape.
    """
    shapes = sorted({array.shape[1:] for array in arrays})
    if len(shapes) > 1:
        where = f"the shape of {key!r}" if key else "shape"
        raise DataError(
            f"The samples of {name} differ in {where}: {', '.join(map(str, shapes[:3]))}.",
            "They are read into one array, and an exported file takes samples of one shape.",
            "Pad or resize all samples to one shape in the dataset. For texts, set "
            'tokenizer(texts, padding="max_length", truncation=True, max_length=128).',
        )
    return np.concatenate(arrays)
