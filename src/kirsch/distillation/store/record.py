"""Records (the teacher's outputs for one sample and view): fields, values, and the run of the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.data.arrays import host
from kirsch.errors import NumericError, UsageError
from kirsch.frameworks.find import framework_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.data.batches import ArrayData

    Arrays = dict[str, NDArray[Any]]

LARGEST = float(np.finfo(np.float16).max)
LOWEST = -LARGEST
"""-65504, stored in place of log 0. Then p · log p is 0; with minus infinity, it would be NaN."""

LOGITS, SEED = "logits", "seed"
RESERVED = (SEED, "indices", "log_p", "tail", "scores", "maximum")
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
OutputFunction = Callable[[Any], dict[str, Any]]
"""Callable that takes inputs as a numpy array (N, ...) and returns arrays by name (N, ...): "logits" (N, ..., K), and
features."""


@dataclass(frozen=True)
class TeacherRunner:
    """Runs a teacher in inference mode, or the callable `outputs` in its place, on augmented samples of the data."""

    teacher: Any
    data: ArrayData
    outputs: OutputFunction | None
    batch_size: int

    def __call__(self, indices: NDArray[Any], seed: int, view: int) -> Arrays:
        """Return the outputs by name for at most `batch_size` samples, with the augmentation of a seed and view.

        Raises:
            NumericError: an output is not finite, or a feature is too large for 16 bits.
            UsageError: the outputs are not arrays with one row per sample.
        """
        batch = self.data.batch(indices, seed, view)
        if self.outputs is None:
            inference = framework_of(self.teacher).inference
            outputs = {LOGITS: inference.predict(self.teacher, batch.inputs, batch_size=self.batch_size)}
        else:
            returned = self.outputs(batch.inputs)
            if not isinstance(returned, dict) or not returned:
                found = "an empty dict" if isinstance(returned, dict) else type(returned).__name__
                raise UsageError(f"The callable `outputs` returned {found}.", fix="Return a dict of arrays by name.")
            outputs = {str(name): host(ops.upcast(array)) for name, array in returned.items()}
        for name, array in outputs.items():
            if array.ndim < 1 + (name == LOGITS) or len(array) != len(batch) or not array.size:
                raise UsageError(
                    f"The output {name!r} has shape {array.shape} for {len(batch)} samples.",
                    f"The first axis is that of the samples, and the last axis of {LOGITS!r} that of the classes.",
                )
            valid = np.isfinite(array) if name == LOGITS else np.abs(array) <= LARGEST
            if not valid.all():
                sample = batch.ids[~valid.reshape(len(valid), -1).all(axis=1)][0]
                where = f"for sample {sample} in view {view}"
                if np.isfinite(array).all():
                    raise NumericError(
                        f"The teacher's output {name!r} contains values beyond ±{LARGEST:.0f} {where}.",
                        "The store has 16 bits for each value of a feature.",
                        "Scale the feature in the callable `outputs`.",
                    )
                raise NumericError(
                    f"The teacher's output {name!r} contains NaN or infinity {where}.",
                    fix="Check the teacher's weights and inputs.",
                )
        return outputs


def shapes_of(outputs: Arrays) -> dict[str, Any]:
    """Return the number of classes, the positions and the shapes of the features, as fields of a `Specification`."""
    *positions, classes = outputs[LOGITS].shape[1:] if LOGITS in outputs else (None,)
    features = {name: array.shape[1:] for name, array in outputs.items() if name != LOGITS}
    return {"classes": classes, "positions": tuple(positions), "features": features}


def index_type(classes: int) -> str:
    """Return the smallest unsigned type that holds every class number, little-endian."""
    return np.min_scalar_type(classes - 1).newbyteorder("<").str


def fields_of(
    keep: Keep | None, classes: int | None, positions: tuple[int, ...], features: dict[str, tuple[int, ...]]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, numpy type and shape of each field of a record.

    The logits of a sample have the shape (*positions, classes). Without logits, `keep` and `classes` are None.
    """
    logits: list[tuple[str, str, tuple[int, ...]]] = []
    if isinstance(keep, TopK) and classes is not None:
        top_k = (*positions, keep.k)
        logits = [("indices", index_type(classes), top_k), ("log_p", "<f2", top_k), ("tail", "<f2", positions)]
    elif classes is not None:
        logits = [("scores", "<f2", (*positions, classes)), ("maximum", "<f4", positions)]
    return [(SEED, "<u4", ()), *logits, *((name, "<f2", shape) for name, shape in features.items())]


def values_of(keep: Keep | None, outputs: Arrays, temperature: float, indices: NDArray[Any] | None = None) -> Arrays:
    """Return the values of all fields but the seed, by field, before they are rounded to the types of the fields.

    Args:
        keep: format of the logits; None if the outputs have no "logits".
        outputs: arrays by name, shape (N, ...).
        temperature: temperature of the log-probabilities.
        indices: classes to keep, shape (N, ..., k); by default the most probable ones.
    """
    values = {name: array.astype(np.float32) for name, array in outputs.items()}
    if keep is None:
        return values
    logits = values.pop(LOGITS)
    if isinstance(keep, Dense):
        maximum = logits.max(axis=-1)
        return values | {"scores": np.maximum(logits - maximum[..., None], LOWEST), "maximum": maximum}
    indices = _top_k_indices(logits, keep.k) if indices is None else indices
    return values | _log_probabilities(logits, indices, np.float32(temperature))


def _top_k_indices(logits: NDArray[Any], k: int) -> NDArray[Any]:
    """Return the indices of the k largest values, the largest first, and the lower index first among equals."""
    classes = logits.shape[-1]
    indices = np.sort(np.argpartition(logits, classes - k, axis=-1)[..., classes - k :], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, indices, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(indices, order, axis=-1)


def _log_probabilities(logits: NDArray[Any], indices: NDArray[Any], temperature: np.float32) -> Arrays:
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


def pack_records(record_type: np.dtype[Any], values: Arrays, seeds: NDArray[np.uint64]) -> NDArray[Any]:
    """Return one record per sample, shape (N,), with the low 32 bits of the augmentation seeds."""
    records = np.empty(len(seeds), record_type)
    records[SEED] = seeds.astype(np.uint32)
    for name, array in values.items():
        records[name] = array
    return records
