"""Annotations for arguments that are models, inputs or training data of a framework."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any

import numpy as np

from kirsch.annotations import Kind

FRAMEWORKS = (
    "torch.nn.modules.module.Module",
    "keras.src.models.model.Model",
    "tensorflow.python.module.module.Module",
)
"""Base classes of models. `kirsch.frameworks.find.framework_of` raises an error for those that are not supported."""


ONLY_NUMBERS = "Give numbers, such as inputs.astype(numpy.float32); tokenize texts first."


def is_model(value: Any) -> bool:
    """Return whether a value is a model of some framework."""
    return not inspect.isclass(value) and any(
        f"{base.__module__}.{base.__qualname__}" in FRAMEWORKS for base in type(value).__mro__
    )


def _give_model(value: Any) -> str:
    if inspect.isclass(value):
        return f"Make an instance: {value.__name__}(...)."
    if inspect.isroutine(value):
        return "Call the function, and give the model that it returns."
    if isinstance(value, (str, os.PathLike)):
        return "Build the model in Python first; kirsch.load(folder, build) reads a pruned model."
    return "Give a torch.nn.Module."


def is_array(value: Any) -> bool:
    """Return whether a value is an array or tensor of numbers or truth values."""
    has_type = hasattr(value, "shape") and hasattr(value, "dtype") and not inspect.isclass(value)
    return has_type and not isinstance(value, np.generic) and getattr(value.dtype, "kind", "f") in "biufcV"


def has_arrays(value: Any) -> bool:
    """Return whether a value is an array with an axis for the samples, or a container of at least one such array.

    A container is a mapping, a tuple or a list, which may be nested, or an object that has arrays as attributes.
    """
    if is_array(value):
        return len(value.shape) > 0
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
        return any(has_arrays(value[name]) for name in value.keys())  # noqa: SIM118 - a BatchEncoding is not a Mapping
    if isinstance(value, (tuple, list)):
        return any(map(has_arrays, value))
    attributes = {} if inspect.isclass(value) else getattr(value, "__dict__", {})
    return any(is_array(part) and len(part.shape) > 0 for part in attributes.values())


def _give_inputs(value: Any) -> str:
    if hasattr(value, "dataset") or inspect.isgenerator(value):
        return "Give the inputs of one batch, such as next(iter(loader))[0]."
    if hasattr(value, "dtype") and not is_array(value):
        return ONLY_NUMBERS
    return "Give the model's arguments, such as torch.randn(1, 3, 224, 224), or a dict of keyword arguments."


def is_batch(value: Any) -> bool:
    """Return whether a value can be one batch: arrays, or an object whose `inputs` are arrays."""
    return has_arrays(getattr(value, "inputs", value))


def _give_batch(value: Any) -> str:
    if hasattr(value, "dataset") or hasattr(value, "epoch"):
        return "Give one batch of it, such as next(iter(loader))."
    return "Give (inputs, targets), inputs alone, or a dict of arrays."


def _is_data(value: Any) -> bool:
    if hasattr(value, "epoch"):
        return True
    if isinstance(value, (list, tuple)):
        return not value or (is_batch(value[0]) and not _is_one_batch(value))  # an empty list is empty data
    excluded = isinstance(value, (str, bytes, Mapping, AbstractSet, os.PathLike)) or inspect.isclass(value)
    if excluded or is_model(value) or hasattr(value, "dtype"):
        return False
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def _is_one_batch(value: Any) -> bool:
    """Return whether two arrays are inputs and targets of the same samples, and not two batches of inputs."""
    if len(value) != len(("inputs", "targets")) or not all(map(is_array, value)):
        return False
    inputs, targets = value
    kinds = {str(part.dtype).removeprefix("torch.").rstrip("0123456789") for part in value}
    alike = inputs.shape[1:] == targets.shape[1:] and len(kinds) == 1
    return len(inputs) == len(targets) and (isinstance(value, tuple) or not alike)


def _give_data(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "Give inputs and targets as kirsch.ArrayData(inputs, targets), or [(inputs, targets)]."
    if is_array(value):
        return "Give inputs and targets together: kirsch.ArrayData(inputs, targets, batch_size=64)."
    if isinstance(value, Mapping):
        return "A dict is one batch: give a DataLoader or a list of such dicts."
    return "Give kirsch.ArrayData(inputs, targets), a DataLoader, or a list of (inputs, targets)."


def _give_labeled(value: Any) -> str:
    if hasattr(value, "test"):
        return "Give one part of it, such as data.test."
    if is_array(value) or has_arrays(value):
        return "Give inputs and labels together: data=(inputs, labels)."
    return "Give (inputs, labels) as arrays, a DataLoader, or a list of (inputs, labels)."


def _is_labeled(value: Any) -> bool:
    if hasattr(value, "inputs") and hasattr(value, "labels"):  # a Split
        return True
    pair = isinstance(value, tuple)
    return len(value) == len(("inputs", "labels")) and has_arrays(value[0]) if pair else _is_data(value)


Model = Annotated[Any, Kind("a model", is_model, _give_model)]
"""A model of any framework."""

Inputs = Annotated[Any, Kind("an array, or a tuple or dict of arrays", has_arrays, _give_inputs)]
"""Arguments of a model: an array, a tuple of positional arguments, or a dict of keyword arguments."""

BatchLike = Annotated[Any, Kind("a batch", is_batch, _give_batch)]
"""One batch as a loader returns it."""

Labeled = Annotated[Any, Kind("inputs with labels", _is_labeled, _give_labeled)]
"""Inputs and labels: a pair (inputs, labels), an object with the attributes `inputs` and `labels`, or an iterable of
batches (inputs, labels)."""

Data = Annotated[Any, Kind("training data", _is_data, _give_data)]
"""Batches that can be iterated over in each epoch."""

Calibration = Annotated[Any, Kind("calibration data", lambda value: has_arrays(value) or _is_data(value), _give_data)]
"""Batches of inputs, or of inputs and labels, or one such batch."""

Build = Annotated[
    Callable[[], Any],
    Kind("a function that builds the model", lambda value: not is_model(value), lambda _: "Give lambda: MyModel(...)."),
]
"""A function without arguments that returns a new model."""

Regularizer = Annotated[
    Callable[..., Any],
    Kind(
        "a function of the student",
        lambda value: not is_model(value),
        lambda _: "Give kirsch.L1(1e-4).",
    ),
]
"""Function student → scalar with gradient, which is added to the loss.

A function with the keyword `epoch` also gets the number of completed epochs, with the fraction of the current one.
"""
