"""Format of a record, which holds the teacher's outputs for one sample and view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.annotations import Count
from kirsch.arguments import checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

LOWEST = float(np.finfo(np.float16).min)
"""-65504, stored in place of log 0. Then p · log p is 0; with minus infinity, it would be NaN."""

LOGITS, SEED = "logits", "seed"
TOP_K, DENSE = ("indices", "log_p", "tail"), ("scores", "maximum")
RESERVED = (SEED, *TOP_K, *DENSE)
"""Names that a feature must not have."""


@checked
@dataclass(frozen=True)
class TopK:
    """Keep the k most probable classes, and the total probability of all others.

    Fields: `indices` (..., k), in the smallest type that holds the class numbers; `log_p` (..., k), float16,
    log-probabilities at the store's temperature, the largest first; `tail` (...), float16, the logarithm of the
    remaining probability, -65504 if there is none.

    Rounding log p by a relative 2⁻¹¹ changes p log p by less than 2⁻¹¹ for every p, since p |log p| < 1.

    Args:
        k: number of classes to keep, at least 1 and at most the number of classes.

    Source: treating the tail as one more class follows TRL's server distillation. The format of the record follows
        TinyViT (Wu et al. 2022, arXiv:2207.10666, section 3.1), which spreads the tail evenly over the other classes.
    """

    k: Count = 10


@dataclass(frozen=True)
class Dense:
    """Keep all logits.

    Fields: `scores` (..., K), float16, the logits minus their maximum, so that float16 is most precise for the probable
    classes (an error of at most 2⁻¹¹ of the distance to the maximum); `maximum` (...), float32. The logits are
    `scores` + `maximum`.
    """


Keep = TopK | Dense
Shape = tuple[int, ...]


def index_type(classes: int) -> str:
    """Return the smallest unsigned type that holds every class number, little-endian."""
    return next(f"<u{size}" for size in (1, 2, 4) if classes <= 1 << 8 * size)


def fields_of(
    keep: Keep | None, classes: int | None, positions: Shape, features: Mapping[str, Shape]
) -> list[tuple[str, str, Shape]]:
    """Return name, numpy type and shape of each field of a record.

    Args:
        keep: format of the logits; None if there are none.
        classes: number of classes K; None if there are no logits.
        positions: shape of the logits of one sample without the classes: () for (N, K), (L,) for (N, L, K).
        features: shape of each feature for one sample.
    """
    logits: list[tuple[str, str, Shape]] = []
    if isinstance(keep, TopK) and classes is not None:
        top_k = (*positions, keep.k)
        logits = [
            ("indices", index_type(classes), top_k),
            ("log_p", "<f2", top_k),
            ("tail", "<f2", positions),
        ]
    elif classes is not None:
        logits = [("scores", "<f2", (*positions, classes)), ("maximum", "<f4", positions)]
    return [(SEED, "<u4", ()), *logits, *((name, "<f2", shape) for name, shape in features.items())]


def record_values(
    keep: Keep | None, outputs: Mapping[str, NDArray[Any]], temperature: float, indices: NDArray[Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Return the values of all fields but the seed, by field, before they are rounded to the types of the fields.

    Args:
        keep: format of "logits"; None if the outputs have none.
        outputs: arrays by name, shape (N, ...).
        temperature: temperature of the log-probabilities.
        indices: classes to keep, shape (N, ..., k); by default the most probable ones.
    """
    features = {name: array.astype(np.float32) for name, array in outputs.items() if name != LOGITS}
    if keep is None:
        return features
    logits = outputs[LOGITS].astype(np.float32)
    if isinstance(keep, Dense):
        maximum = logits.max(axis=-1)
        return {"scores": np.maximum(logits - maximum[..., None], LOWEST), "maximum": maximum} | features
    if indices is None:
        indices = _top_k_indices(logits, keep.k)
    return _log_probabilities(logits, indices, np.float32(temperature)) | features


def _top_k_indices(logits: NDArray[Any], k: int) -> NDArray[Any]:
    """Return the indices of the k largest values, the largest first, and the lower index first among equals."""
    classes = logits.shape[-1]
    indices = np.sort(np.argpartition(logits, classes - k, axis=-1)[..., classes - k :], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, indices, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(indices, order, axis=-1)


def _log_probabilities(logits: NDArray[Any], indices: NDArray[Any], temperature: np.float32) -> dict[str, NDArray[Any]]:
    """Return the log-probabilities of the given classes and of all other classes together; `LOWEST` stands for log 0.

    The exponentials are computed in a single pass over the classes, because a vocabulary may have 100,000.
    """
    columns = indices.astype(np.int64)
    maximum = logits.max(axis=-1, keepdims=True)
    # In float64, because the log-probability of a nearly certain class is about -10⁻⁸.
    kept = (np.take_along_axis(logits, columns, axis=-1) - maximum).astype(np.float64) / temperature
    rest = logits.copy()
    np.put_along_axis(rest, columns, -np.inf, axis=-1)
    rest_maximum = np.maximum(rest.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
    rest -= rest_maximum  # so that a tail of 10⁻¹⁰⁰ does not underflow
    rest /= temperature
    with np.errstate(divide="ignore"):
        log_rest = np.log(np.exp(rest, out=rest).sum(axis=-1, dtype=np.float64))
    others = log_rest + ((rest_maximum - maximum) / temperature)[..., 0]
    total = np.logaddexp(others, np.log(np.exp(kept).sum(axis=-1)))
    return {
        "indices": indices,
        "log_p": np.maximum(kept - total[..., None], LOWEST),
        "tail": np.maximum(others - total, LOWEST),
    }


def pack_records(
    record_type: np.dtype[Any], values: Mapping[str, NDArray[Any]], seeds: NDArray[np.uint64]
) -> NDArray[Any]:
    """Return one record per sample, shape (N,).

    Args:
        record_type: numpy type of a record.
        values: arrays by field, as returned by `record_values`.
        seeds: augmentation seeds of the samples, of which the low 32 bits are stored.
    """
    records = np.empty(len(seeds), record_type)
    records[SEED] = seeds.astype(np.uint32)
    for name, array in values.items():
        records[name] = array
    return records
