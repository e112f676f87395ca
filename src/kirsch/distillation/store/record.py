"""What is kept of a teacher's output for one sample and view, and with which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

LOWEST = float(np.finfo(np.float16).min)
"""-65504 stands for the logarithm of nothing: exp of it is 0, and 0 times it is 0, which is not so of infinity."""

LOGITS, SEED = "logits", "seed"
TOP_K, DENSE = ("indices", "log_p", "tail"), ("scores", "maximum")
RESERVED = (SEED, *TOP_K, *DENSE)
"""Names of fields that no feature may take."""


@checked
@dataclass(frozen=True)
class TopK:
    """The k most likely classes, and what is left for all others together.

    Fields: `indices` (..., k) in as few bytes as the classes need; `log_p` (..., k), float16, logarithms of the
    probabilities at the store's temperature, the largest first; `tail` (...), float16, the logarithm of what remains,
    -65504 where nothing does.

    A rounding of 2⁻¹¹ of log p moves p log p by less than 2⁻¹¹, for every p, since p |log p| < 1.

    Args:
        k: >= 1, at most as many as there are classes.

    Source: the tail as one more class after TRL's server distillation; the record after TinyViT (Wu et al. 2022,
        arXiv:2207.10666, section 3.1), which spreads the rest evenly instead.
    """

    k: Count = 10


@dataclass(frozen=True)
class Dense:
    """All scores.

    Fields: `scores` (..., K), float16, less their maximum, so that the likely classes lie where float16 is fine (an
    error of at most 2⁻¹¹ of the distance to the maximum); `maximum` (...), float32. Their sum gives the scores.
    """


Keep = TopK | Dense


@dataclass(frozen=True)
class Field:
    """One array of a record.

    Args:
        name: of the array.
        type: of numpy, little-endian: "u1", "u2", "u4", "f2" or "f4".
        shape: for one sample.
    """

    name: str
    type: str
    shape: tuple[int, ...]


def index_type(classes: int) -> str:
    """The smallest unsigned type that holds every class number."""
    return next(f"u{size}" for size in (1, 2, 4) if classes <= 1 << 8 * size)


def fields_of(keep: Keep | None, outputs: Mapping[str, NDArray[Any]]) -> tuple[Field, ...]:
    """The fields of a record, for what a teacher puts out for some samples.

    Args:
        keep: of "logits"; None where the outputs have none.
        outputs: arrays by name, shape (N, ...).

    Raises:
        UsageError: there are no logits to keep or no order to keep them, k is too large, or a feature's name is taken.
    """
    if (keep is None) != (LOGITS not in outputs):
        raise UsageError(
            f"The outputs {'have no' if keep is not None else 'have'} {LOGITS!r}, and keep is {keep!r}.",
            "Logits are kept as TopK(k) or Dense().",
            "Give keep=None exactly where the outputs have no logits.",
        )
    for name, array in outputs.items():
        if 0 in array.shape or (name == LOGITS and array.ndim == 1):
            raise UsageError(f"The output {name!r} has shape {array.shape}; there is nothing to keep.")
    found = [Field(SEED, "u4", ())]
    if keep is not None:
        *positions, classes = outputs[LOGITS].shape[1:]
        places = tuple(positions)
        if isinstance(keep, TopK):
            if keep.k > classes:
                raise UsageError(f"TopK({keep.k}) is asked of {classes} classes.", fix="Choose fewer, or Dense().")
            rows = (*places, keep.k)
            found += [Field("indices", index_type(classes), rows), Field("log_p", "f2", rows)]
            found += [Field("tail", "f2", places)]
        else:
            found += [Field("scores", "f2", (*places, classes)), Field("maximum", "f4", places)]
    for name, array in outputs.items():
        if name != LOGITS:
            if name in RESERVED:
                raise UsageError(f"A feature is named {name!r}.", f"Taken: {', '.join(RESERVED)}.", "Rename it.")
            found.append(Field(name, "f2", tuple(array.shape[1:])))
    return tuple(found)


def record_type(fields: tuple[Field, ...]) -> np.dtype[Any]:
    """The packed numpy type of one record."""
    return np.dtype([(field.name, f"<{field.type}", field.shape) for field in fields])


def values(
    keep: Keep | None, outputs: Mapping[str, NDArray[Any]], temperature: float, indices: NDArray[Any] | None = None
) -> dict[str, NDArray[Any]]:
    """What a record holds, before it is rounded to the types of the fields: arrays by field, but for the seed.

    Args:
        keep: see `fields_of`.
        outputs: arrays by name, shape (N, ...).
        temperature: of log-probabilities.
        indices: classes to look at, shape (N, ..., k); the most likely if left out.
    """
    found = {name: array.astype(np.float32) for name, array in outputs.items() if name != LOGITS}
    if keep is None:
        return found
    scores = outputs[LOGITS].astype(np.float32)
    if isinstance(keep, Dense):
        most = scores.max(axis=-1)
        return {"scores": np.maximum(scores - most[..., None], LOWEST), "maximum": most} | found
    if indices is None:
        indices = _largest(scores, keep.k)
    return _buckets(scores, indices, np.float32(temperature)) | found


def _largest(scores: NDArray[Any], k: int) -> NDArray[Any]:
    """Indices of the k largest along the last axis, the largest first, the lower index first among equals."""
    classes = scores.shape[-1]
    found = np.sort(np.argpartition(scores, classes - k, axis=-1)[..., classes - k :], axis=-1)
    order = np.argsort(-np.take_along_axis(scores, found, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(found, order, axis=-1)


def _buckets(scores: NDArray[Any], indices: NDArray[Any], temperature: np.float32) -> dict[str, NDArray[Any]]:
    """Log-probabilities of some classes, and of all others together, which is `LOWEST` where it is nothing.

    One pass of exponentials over the classes: a vocabulary has a hundred thousand.
    """
    wide = indices.astype(np.int64)
    most = scores.max(axis=-1, keepdims=True)
    # In double precision: the logarithm of a probability near 1 is that of 1 + 10⁻⁸.
    kept = (np.take_along_axis(scores, wide, axis=-1) - most).astype(np.float64) / temperature
    rest = scores.copy()
    np.put_along_axis(rest, wide, -np.inf, axis=-1)
    most_of_rest = np.maximum(rest.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
    rest -= most_of_rest  # by their own maximum, so that a tail of 10⁻¹⁰⁰ has a logarithm too
    rest /= temperature
    with np.errstate(divide="ignore"):
        others = (
            np.log(np.exp(rest, out=rest).sum(axis=-1, dtype=np.float64))
            + ((most_of_rest - most) / temperature)[..., 0]
        )
    total = np.logaddexp(others, np.log(np.exp(kept).sum(axis=-1)))
    return {
        "indices": indices,
        "log_p": np.maximum(kept - total[..., None], LOWEST),
        "tail": np.maximum(others - total, LOWEST),
    }


def packed(fields: tuple[Field, ...], found: Mapping[str, NDArray[Any]], seeds: NDArray[np.uint64]) -> NDArray[Any]:
    """Records, one a sample: shape (N,), of the type of the fields.

    Args:
        fields: of the store.
        found: arrays by name, as `values` gives them.
        seeds: of the samples' augmentation; their low 32 bits are kept.
    """
    records = np.zeros(len(seeds), record_type(fields))
    for field in fields:
        array = seeds.astype(np.uint32) if field.name == SEED else found[field.name]
        records[field.name] = array.astype(f"<{field.type}")
    return records
