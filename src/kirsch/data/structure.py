"""Batches of loaders: their inputs, targets and ids, and descriptions of values for error messages."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from kirsch.errors import DataError

TARGETS = ("labels", "label", "label_ids", "targets", "target", "y")
"""Names of the targets in the batches of loaders; the first name has precedence."""

IDS = "ids"
FORMS = "(inputs, targets), (inputs, targets, ids), or a dict with one of the keys " + ", ".join(TARGETS)
SWITCHES = (bool, int, float, str, type(None))
"""Types of model arguments that contain no samples, such as a flag that selects a branch of the model."""

MOST_SHOWN = 6


def split_batch(batch: Any) -> tuple[Any, Any, Any]:
    """Return inputs, targets and ids of a batch of a loader; None for parts that it does not have.

    Raises:
        DataError: the parts are ambiguous, or the samples are not collated.
    """
    if batch is None:
        raise DataError(
            "A batch is None.",
            "The loader, or its collate_fn, returned None.",
            f"Leave the batch out, or give {FORMS}.",
        )
    entries = _entries(batch)
    if entries is not None:
        inputs, targets, ids = _split_by_name(entries, batch)
    elif isinstance(batch, (tuple, list)):
        inputs, targets, ids = _split_by_position(batch)
    else:
        inputs, targets, ids = batch, None, None
    return inputs, _targets(targets, batch), _ids(ids, batch)


def _entries(value: Any) -> dict[str, Any] | None:
    """Return the entries of a mapping, a dataclass, or a named tuple with a target name; None for other values."""
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        return {name: value[name] for name in value.keys()}  # noqa: SIM118 - a BatchEncoding is not a Mapping
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields") and any(name in TARGETS for name in value._fields):
        return dict(zip(value._fields, value, strict=True))
    return None


def _split_by_name(entries: dict[str, Any], batch: Any) -> tuple[Any, Any, Any]:
    ids = entries.pop(IDS, None)
    name = _target_name(entries, batch)
    targets = None if name is None else entries.pop(name)
    if not entries:
        raise DataError(f"A batch has no inputs: it is {summary(batch)}.", fix=f"Give {FORMS}, together with inputs.")
    # A field of a named tuple need not be named after an argument of the model: a single input is passed by position.
    single = len(entries) == 1 and isinstance(batch, tuple)
    return (next(iter(entries.values())) if single else entries), targets, ids


def _target_name(entries: Mapping[str, Any], batch: Any) -> str | None:
    """Return the name of the targets; "labels" if several names are possible."""
    names = [name for name in TARGETS if name in entries]
    if len(names) > 1 and names[0] != TARGETS[0]:
        raise DataError(
            f"A batch has {' and '.join(map(repr, names))}: it is {summary(batch)}.",
            "Each of them could be the targets.",
            'Name the targets "labels".',
        )
    return names[0] if names else None


def _split_by_position(batch: Any) -> tuple[Any, Any, Any]:
    parts = list(batch)
    samples = isinstance(batch, list) and len(parts) > 1 and all(_is_sample(part) for part in parts)
    if samples or (isinstance(batch, list) and len(parts) == 1 and _entries(parts[0]) is not None):
        raise DataError(
            f"A batch is a list of samples that are not collated: {summary(batch)}.",
            "Each array of a batch must contain all samples, on the first axis.",
            "Use the default collate_fn of torch.utils.data.DataLoader, or a collate_fn that stacks the samples.",
        )
    if not 1 <= len(parts) <= len(("inputs", "targets", "ids")):
        raise DataError(f"A batch has {len(parts)} parts: it is {summary(batch)}.", fix=f"Give {FORMS}.")
    inputs, targets, ids = [*parts, None, None][:3]
    _refuse_repeated(_ids(ids, batch), batch)
    entries = _entries(targets)
    if entries is not None:
        ids = entries.pop(IDS, ids)
        name = _target_name(entries, batch)
        if name is None or len(entries) > 1:
            raise DataError(
                f"The second part of a batch is {summary(targets)}.",
                "The targets of a batch must be one array; it is unclear which entry is meant.",
                f"Give (inputs, batch[1][{name or next(iter(entries), 'labels')!r}]), or only the inputs if no label "
                "is used.",
            )
        targets = entries[name]
    return dict(inputs) if isinstance(inputs, Mapping) else inputs, targets, ids


def _is_sample(part: Any) -> bool:
    return _entries(part) is not None or isinstance(part, (tuple, list))


def _targets(targets: Any, batch: Any) -> Any:
    """Return targets as an array, or None."""
    if targets is None or (hasattr(targets, "shape") and len(targets.shape)):
        return targets
    if isinstance(targets, (list, tuple)):
        try:
            array = np.asarray(targets)
        except (ValueError, TypeError, RuntimeError):  # ragged, or tensors of several numbers or on another device
            array = np.empty(0, object)
        if array.dtype.kind in "biuf":
            return array
        raise DataError(
            f"The targets of a batch are {summary(targets)}.",
            "Expected one array of numbers with the samples on the first axis.",
            "Convert class names to class numbers."
            if array.dtype.kind in "US"
            else "Stack or pad them in the collate_fn.",
        )
    what = "a number" if _is_scalar(targets) else summary(targets)
    raise DataError(
        f"The target of a batch is {what}: the batch is {summary(batch)}.",
        "This looks like a single sample; in a batch, samples lie on the first axis of each array.",
        "Give torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True), not the dataset itself.",
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.generic)) or getattr(value, "shape", None) == ()


def _refuse_repeated(ids: Any, batch: Any) -> None:
    """Refuse a third part with repeated integers: in a batch (first input, second input, labels) it is the labels.

    Ids that are given by name may repeat, since a sampler can draw a sample twice.
    """
    ordered = [] if ids is None else sorted(ids.tolist())
    repeated = [first for first, second in itertools.pairwise(ordered) if first == second]
    if repeated:
        raise DataError(
            f"The third part of a batch contains {repeated[0]} more than once: the batch is {summary(batch)}.",
            "A batch of three parts is read as (inputs, targets, ids), and the id of a sample is unique.",
            "For two inputs and labels, give ((first, second), labels). For samples that are drawn more than once, "
            f'name the ids, and the argument of the model: {{"x": inputs, "labels": targets, "{IDS}": ids}}.',
        )


def _ids(ids: Any, batch: Any) -> Any:
    """Return ids as an array of integers, or None. Strings, such as paths of files, are ignored."""
    if isinstance(ids, (list, tuple)):
        if all(isinstance(part, str) for part in ids):
            return None
        ids = np.asarray(ids)
    if ids is None or (len(getattr(ids, "shape", ())) == 1 and "int" in str(ids.dtype)):
        return ids
    raise DataError(
        f"The third part of a batch is {summary(ids)}: the batch is {summary(batch)}.",
        "Expected the ids of the samples: integers of shape (N,), by which stores and adapters find samples.",
        "Leave it out, or give several inputs as a tuple or a dict: ((first, second), targets), "
        f'or {{"input_ids": first, "attention_mask": second, "labels": targets}}. Accepted batches: {FORMS}.',
    )


# ------------------------------------------------------------------------------------------------ checks, descriptions


def check_inputs(inputs: Any, targets: Any) -> None:
    """Refuse inputs that a model cannot take: strings, images that are not arrays, samples that are not stacked.

    Raises:
        DataError: there are such inputs, or parts differ in their number of samples.
    """
    parts = list(inputs.values()) if isinstance(inputs, dict) else inputs
    single = not isinstance(parts, (tuple, list)) or (bool(parts) and all(isinstance(part, str) for part in parts))
    for part in [parts] if single else parts:
        _check_part(part, inputs)
    arrays = [part for part in _leaves(inputs) if len(getattr(part, "shape", ()))]
    if not arrays:
        raise DataError(
            f"The inputs of a batch contain no array with samples: they are {summary(inputs)}.",
            "Samples lie on the first axis of each array.",
            "Give torch.utils.data.DataLoader(dataset, batch_size=64), not the dataset or single samples.",
        )
    counts = {len(array) for array in arrays}
    if isinstance(inputs, (tuple, list)) and len(counts) > 1:
        raise DataError(
            f"The inputs of a batch differ in their number of samples: they are {summary(inputs)}.",
            "Each input of a model must have all samples on its first axis.",
            "Stack or pad the samples in the collate_fn of the loader.",
        )
    if targets is not None and len(targets) != len(arrays[0]):
        raise DataError(
            f"A batch has inputs {summary(inputs)} and targets {summary(targets)}.",
            f"These are {len(arrays[0])} samples and {len(targets)} targets.",
            "Give one target for each sample, and stack the samples in the collate_fn.",
        )


def _check_part(part: Any, inputs: Any) -> None:
    """Refuse a model argument unless it is an array, a value of a type in `SWITCHES`, or a container of such values."""
    if isinstance(part, dict):
        for inner in part.values():
            _check_part(inner, inputs)
        return
    if isinstance(part, (tuple, list)):
        strings = bool(part) and all(isinstance(item, str) for item in part)
        other = [
            item for item in part if not hasattr(item, "shape") and not isinstance(item, (*SWITCHES, dict, tuple, list))
        ]
        if not strings and not other:
            for inner in part:
                _check_part(inner, inputs)
            return
    elif (isinstance(part, SWITCHES) and not isinstance(inputs, str)) or (
        hasattr(part, "shape") and getattr(getattr(part, "dtype", None), "kind", "f") not in "OUS"
    ):
        return
    kind = type(next(iter(part), part) if isinstance(part, (tuple, list)) else part).__name__
    is_text = kind in ("str", "str_") or getattr(getattr(part, "dtype", None), "kind", "") == "U"
    raise DataError(
        f"The inputs of a batch are {summary(inputs)}.",
        f"A model takes arrays, not {'strings' if is_text else f'a {kind}'}.",
        "Tokenize strings in the dataset or collate_fn, and leave them out of the batch."
        if is_text
        else "Convert each sample to an array or tensor of numbers of one shape in the dataset or collate_fn.",
    )


def _leaves(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else None
    return [value] if parts is None else [leaf for part in parts for leaf in _leaves(part)]


def summary(value: Any) -> str:
    """Return a short description of a value: type and shape of an array, the parts of a container."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    entries = _entries(value)
    if entries is not None:
        shown = [f"{name}: {_short(part)}" for name, part in list(entries.items())[:MOST_SHOWN]]
        shown += ["..."] * (len(entries) > MOST_SHOWN)
        return f"a {type(value).__name__} with {', '.join(shown) or 'no entries'}"
    if isinstance(value, (tuple, list)):
        kinds = {type(part).__name__ for part in value}
        if len(value) > MOST_SHOWN or (kinds and not any(hasattr(part, "shape") for part in value)):
            first = f", the first {_short(value[0])}" if value else ""
            return f"a {type(value).__name__} of {len(value)} {'/'.join(sorted(kinds))}{first}"
        return f"a {type(value).__name__} of ({', '.join(map(_short, value))})"
    return f"a {type(value).__name__}"


def _short(value: Any) -> str:
    return repr(value)[:30] if isinstance(value, SWITCHES) else summary(value)


DATASETS = ("torch.utils.data.dataset.Dataset", "datasets.arrow_dataset.Dataset")
STREAMS = "torch.utils.data.dataset.IterableDataset"


def refuse_dataset(data: Any, name: str = "The data") -> None:
    """Refuse a dataset, which yields single samples; an iterable dataset may yield batches."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(data).__mro__}
    if kinds & set(DATASETS) and STREAMS not in kinds:
        raise DataError(
            f"{name} is a {type(data).__name__}, which yields single samples in place of batches.",
            fix="Give torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True).",
        )
