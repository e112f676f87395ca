"""Which part of what a loader gives is the inputs, the targets and the ids; and in words what a batch looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kirsch.errors import DataError

TARGETS = ("labels", "label", "label_ids", "targets", "target", "y")
"""Names under which loaders give the targets."""

IDS = "ids"
FORMS = "(inputs, targets), (inputs, targets, ids), or a dict with one of the keys " + ", ".join(TARGETS)
SWITCHES = (bool, int, float, str, type(None))
"""Arguments of a model that do not hold samples."""

MOST_SHOWN = 6


def taken_apart(given: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and ids of a batch as a loader gives it; None for what it does not hold.

    Raises:
        DataError: the parts cannot be told from each other, or are not collated.
    """
    if given is None:
        raise DataError(
            "A batch is None.", "The loader, or its collate_fn, gave nothing.", f"Leave it out, or give {FORMS}."
        )
    names = _names(given)
    if names is not None:
        inputs, targets, ids = _by_name(names, given)
    elif isinstance(given, (tuple, list)):
        inputs, targets, ids = _by_place(given)
    else:
        inputs, targets, ids = given, None, None
    return inputs, _targets(targets, given), _ids(ids, given)


def _names(given: Any) -> dict[str, Any] | None:
    """The entries of a mapping, a dataclass, or a named tuple that names its targets; None for anything else."""
    if isinstance(given, Mapping) or hasattr(given, "keys"):
        return {name: given[name] for name in given.keys()}  # noqa: SIM118 - a BatchEncoding is not a Mapping
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    if isinstance(given, tuple) and hasattr(given, "_fields") and any(name in TARGETS for name in given._fields):
        return dict(zip(given._fields, given, strict=True))
    return None


def _by_name(values: dict[str, Any], given: Any) -> tuple[Any, Any, Any]:
    ids = values.pop(IDS, None)
    name = _target_name(values, given)
    targets = None if name is None else values.pop(name)
    if not values:
        raise DataError(f"A batch has no inputs: it is {look(given)}.", fix=f"Give {FORMS}, with the inputs beside it.")
    alone = len(values) == 1 and isinstance(
        given, tuple
    )  # of a named tuple the names are the loader's, not the model's
    return (next(iter(values.values())) if alone else values), targets, ids


def _target_name(values: Mapping[str, Any], given: Any) -> str | None:
    """The name of the targets; "labels" where it is among several."""
    found = [name for name in TARGETS if name in values]
    if len(found) > 1 and found[0] != TARGETS[0]:
        raise DataError(
            f"A batch has {' and '.join(map(repr, found))}: it is {look(given)}.",
            "Either could be the targets.",
            'Call the targets "labels".',
        )
    return found[0] if found else None


def _by_place(given: Any) -> tuple[Any, Any, Any]:
    parts = list(given)
    samples = isinstance(given, list) and len(parts) > 1 and all(_is_sample(part) for part in parts)
    if samples or (isinstance(given, list) and len(parts) == 1 and _names(parts[0]) is not None):
        raise DataError(
            f"A batch is a list of samples that are not collated: {look(given)}.",
            "Each array of a batch must hold all of its samples, on the first axis.",
            "Give torch.utils.data.DataLoader(...) its default collate_fn, or one that stacks the samples.",
        )
    if not 1 <= len(parts) <= len(("inputs", "targets", "ids")):
        raise DataError(f"A batch has {len(parts)} parts: it is {look(given)}.", fix=f"Give {FORMS}.")
    inputs, targets, ids = [*parts, None, None][:3]
    held = _names(targets)
    if held is not None:
        ids = held.pop(IDS, ids)
        name = _target_name(held, given)
        if name is None or len(held) > 1:
            raise DataError(
                f"The second part of a batch is {look(targets)}.",
                "The targets of a batch are one array; which entry that is cannot be told.",
                f"Give (inputs, batch[1][{name or next(iter(held), 'labels')!r}]), or the inputs alone where no label "
                "is used.",
            )
        targets = held[name]
    return inputs, targets, ids


def _is_sample(part: Any) -> bool:
    return _names(part) is not None or isinstance(part, (tuple, list))


def _targets(targets: Any, given: Any) -> Any:
    """Targets as an array, or None."""
    if targets is None or (hasattr(targets, "shape") and len(targets.shape)):
        return targets
    if isinstance(targets, (list, tuple)):
        try:
            found = np.asarray(targets)
        except (ValueError, TypeError, RuntimeError):  # ragged, or tensors of several numbers or of another device
            found = np.empty(0, object)
        if found.dtype.kind in "biuf":
            return found
        raise DataError(
            f"The targets of a batch are {look(targets)}.",
            "They must be one array of numbers with the samples on the first axis.",
            "Turn class names into class numbers."
            if found.dtype.kind in "US"
            else "Stack or pad them in the collate_fn.",
        )
    what = "a number" if _scalar(targets) else look(targets)
    raise DataError(
        f"The target of a batch is {what}: it is {look(given)}.",
        "This looks like one sample, and a batch is needed: samples lie on the first axis of each array.",
        "Give torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True), not the dataset itself.",
    )


def _scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.generic)) or getattr(value, "shape", None) == ()


def _ids(ids: Any, given: Any) -> Any:
    """Ids as an array of whole numbers, or None; texts, such as the paths of files, cannot be ids and are left out."""
    if isinstance(ids, (list, tuple)):
        if all(isinstance(part, str) for part in ids):
            return None
        ids = np.asarray(ids)
    if ids is None or (len(getattr(ids, "shape", ())) == 1 and "int" in str(ids.dtype)):
        return ids
    raise DataError(
        f"The third part of a batch is {look(ids)}: the batch is {look(given)}.",
        "It would be the numbers of the samples, shape (N,), by which a store and adapters with a memory find them.",
        "Leave it out, or give several inputs as a tuple or a dict beside the targets: ((first, second), targets), "
        f'or {{"input_ids": first, "attention_mask": second, "labels": targets}}. Known: {FORMS}.',
    )


# ------------------------------------------------------------------------------------------------ what it looks like


def check_inputs(inputs: Any, targets: Any) -> None:
    """Refuse inputs that no model takes: texts, images that are not arrays, samples that are not stacked.

    Raises:
        DataError: there are such, or parts differ in their number of samples.
    """
    parts = list(inputs.values()) if isinstance(inputs, dict) else inputs
    alone = not isinstance(parts, (tuple, list)) or (bool(parts) and all(isinstance(part, str) for part in parts))
    for part in [parts] if alone else parts:
        _check_part(part, inputs)
    arrays = [part for part in _leaves(inputs) if len(getattr(part, "shape", ()))]
    if not arrays:
        raise DataError(
            f"The inputs of a batch hold no array with samples: they are {look(inputs)}.",
            "Samples lie on the first axis of each array.",
            "Give torch.utils.data.DataLoader(dataset, batch_size=64), not the dataset or single samples.",
        )
    counts = {len(array) for array in arrays}
    if isinstance(inputs, (tuple, list)) and len(counts) > 1:
        raise DataError(
            f"The inputs of a batch differ in their number of samples: they are {look(inputs)}.",
            "Several inputs are given to the model side by side, and each must hold all samples on its first axis.",
            "Stack or pad the samples in the collate_fn of the loader.",
        )
    if targets is not None and len(targets) != len(arrays[0]):
        raise DataError(
            f"A batch has inputs {look(inputs)} and targets {look(targets)}.",
            f"That is {len(arrays[0])} samples and {len(targets)} targets.",
            "Give one target for each sample; samples that are not collated must be stacked in the collate_fn.",
        )


def _check_part(part: Any, inputs: Any) -> None:
    """Refuse one argument of a model that is not an array, a container of arrays or a switch."""
    if isinstance(part, dict):
        for inner in part.values():
            _check_part(inner, inputs)
        return
    if isinstance(part, (tuple, list)):
        texts = bool(part) and all(isinstance(one, str) for one in part)
        bare = [
            one for one in part if not hasattr(one, "shape") and not isinstance(one, (*SWITCHES, dict, tuple, list))
        ]
        if not texts and not bare:
            for inner in part:
                _check_part(inner, inputs)
            return
    elif (isinstance(part, SWITCHES) and not isinstance(inputs, str)) or (
        hasattr(part, "shape") and getattr(getattr(part, "dtype", None), "kind", "f") not in "OUS"
    ):
        return
    kind = type(next(iter(part), part) if isinstance(part, (tuple, list)) else part).__name__
    text = kind in ("str", "str_") or getattr(getattr(part, "dtype", None), "kind", "") == "U"
    raise DataError(
        f"The inputs of a batch are {look(inputs)}.",
        f"A model takes arrays, and {'texts' if text else f'a {kind}'} cannot be given to it.",
        "Give the loader the numbers of a tokenizer, and leave texts out of the batch."
        if text
        else "Turn each sample into an array or tensor of numbers of one shape in the dataset or collate_fn.",
    )


def _leaves(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else None
    return [value] if parts is None else [leaf for part in parts for leaf in _leaves(part)]


def look(value: Any) -> str:
    """A value in words: type and shape of an array, the parts of a container."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    names = _names(value)
    if names is not None:
        shown = [f"{name}: {_short(part)}" for name, part in list(names.items())[:MOST_SHOWN]]
        return f"a {type(value).__name__} with {', '.join(shown + ['...'] * (len(names) > MOST_SHOWN)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        kinds = {type(part).__name__ for part in value}
        if len(value) > MOST_SHOWN or (kinds and not any(hasattr(part, "shape") for part in value)):
            first = f", the first {_short(value[0])}" if value else ""
            return f"a {type(value).__name__} of {len(value)} {'/'.join(sorted(kinds))}{first}"
        return f"a {type(value).__name__} of ({', '.join(map(_short, value))})"
    return f"a {type(value).__name__}"


def _short(value: Any) -> str:
    return repr(value)[:30] if isinstance(value, SWITCHES) else look(value)
