"""Change of a model's outputs: the KL divergence of class probabilities, or the relative squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kirsch import ops
from kirsch.errors import DataError, NumericError, UsageError
from kirsch.frameworks.progress import shown_on
from kirsch.measurement.outputs import are_probabilities
from kirsch.pruning.importance.padding import only_padding
from kirsch.pruning.importance.statistics import calibration_of
from kirsch.tables import Piece
from kirsch.tasks.padding import counted_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.graph.graph import Graph
    from kirsch.tables import Line

SOFTMAX, SIGMOID = ("cross-entropy", "next-token"), ("binary",)
"""Losses whose logits become probabilities by a softmax, or by a sigmoid. Other outputs are compared as numbers."""
STORED_BYTES = 2**26
"""Outputs of the original that are stored while the variants run."""


class Variant(NamedTuple):
    """A model without some of its units or residual blocks.

    Args:
        name: the group or block that is reduced, for messages.
        keep: function that returns the mask of the components that stay; a mask takes as many bytes as the model has
            channels, so that the masks of all variants are not stored.
        without: paths of the removed residual blocks.
    """

    name: str
    keep: Callable[[], NDArray[np.bool_]]
    without: tuple[str, ...] = ()


class _Original(NamedTuple):
    """Outputs of the original for a batch.

    Args:
        number: number of the batch, from 1.
        inputs: inputs of the batch.
        outputs: outputs of the original.
        counted: whether each token counts; None counts all.
        weight: weight of the batch in the mean over all batches.
    """

    number: int
    inputs: Any
    outputs: NDArray[Any]
    counted: NDArray[np.bool_] | None
    weight: float


def mean_output_changes(
    graph: Graph, variants: Sequence[Variant], batches: Iterable[Batch], loss: str, *, progress: bool | None = None
) -> NDArray[np.float64]:
    """Return the mean change of the outputs of each variant of a model, over all positions that are not padding.

    The original and each variant run once for each batch. A variant is cut from the model once for all batches whose
    original outputs together take at most `STORED_BYTES`.

    Args:
        graph: graph of the model.
        variants: the variants.
        batches: calibration batches, which are read once.
        loss: see `output_change`.
        progress: whether to show the progress; see `kirsch.frameworks.progress.shown_on`.

    Raises:
        DataError: all positions are padding, or all outputs are 0.
        NumericError: the outputs of the original or of a variant are not finite.
        UsageError: the outputs have one class; see `output_change`.
    """
    run, display = calibration_of(graph).outputs_without, shown_on(progress)
    totals, weights, any_counted, state = np.zeros(len(variants)), 0.0, False, [0, 0]

    def line() -> Line:
        return [Piece(f"   measuring batch {state[0]}, alternative {state[1]} of {len(variants)}")]

    if display is not None:
        display.start_status(line)
    try:
        for originals in _stored(_originals(graph, batches, loss)):
            weights += sum(each.weight for each in originals)
            any_counted |= any(each.counted is None or each.counted.any() for each in originals)
            for index, variant in enumerate(variants):
                every = run(graph, [each.inputs for each in originals], variant.keep(), variant.without)
                for each, changed in zip(originals, every, strict=True):
                    state[:] = each.number, index + 1
                    if display is not None:
                        display.refresh_status()
                    change, _ = output_change(each.outputs, changed[0], loss, each.counted)
                    _check_finite(change, f"The outputs of {graph.model_name} without units of {variant.name!r}")
                    totals[index] += change
    finally:
        if display is not None:
            display.stop_status()
    if not any_counted:
        raise only_padding()
    if not weights:
        raise DataError(
            f"All outputs of {graph.model_name} for `data` are 0.",
            "Changes are measured relative to the outputs.",
            "Check the weights of the model and the calibration data.",
        )
    found: NDArray[np.float64] = totals / weights
    return found


def _originals(graph: Graph, batches: Iterable[Batch], loss: str) -> Iterator[_Original]:
    """Yield the outputs of the original for each batch."""
    run, everything = calibration_of(graph).outputs_without, graph.keep({})
    for number, batch in enumerate(batches, 1):
        outputs = next(run(graph, [batch.inputs], everything))[0]
        counted = counted_tokens(batch.inputs, outputs.shape)
        change, weight = output_change(outputs, outputs, loss, counted)
        _check_finite(change, f"The outputs of {graph.model_name} for batch {number} of `data`")
        yield _Original(number, batch.inputs, outputs, counted, weight)


def _stored(originals: Iterable[_Original]) -> Iterator[list[_Original]]:
    """Yield lists of the outputs of successive batches that take at most `STORED_BYTES`, or are of one batch."""
    stored: list[_Original] = []
    for each in originals:
        if stored and sum(other.outputs.nbytes for other in (*stored, each)) > STORED_BYTES:
            yield stored
            stored = []
        stored.append(each)
    if stored:
        yield stored


def _check_finite(change: float, outputs: str) -> None:
    if not np.isfinite(change):
        raise NumericError(
            f"{outputs} contain NaN or infinity.", fix="Check the weights of the model and the calibration data."
        )


def output_change(
    original: NDArray[Any], changed: NDArray[Any], loss: str, counted: NDArray[np.bool_] | None = None
) -> tuple[float, float]:
    """Return the change of a model's outputs on one batch, and the weight of the batch in the mean over all batches.

    The change is NaN if the outputs are not finite. With a loss on classes, it is the sum over the positions of
    KL(original ‖ changed), in nats, and the weight is the number of positions. A position is a sample, token or pixel.
    Outputs that are probabilities, not logits, are recognized by their values. With the loss "binary", the divergences
    of all classes are added. With any other loss, the change is the sum of the squared differences, and the weight is
    the sum of the squares of the original outputs.

    Args:
        original, changed: outputs of the model: (N, K), (N, L, K), or (N, K, H, W) with a loss on classes; any shape
            with other losses.
        loss: name of the loss; see `SOFTMAX` and `SIGMOID`.
        counted: whether each token counts, shape (N, L), for outputs (N, L, K); None counts all.

    Raises:
        UsageError: a softmax over one class is 1 for any logit.
    """
    before, after = (np.asarray(ops.classes_last(values), np.float64) for values in (original, changed))
    if counted is not None:
        before, after = before[counted], after[counted]
    if loss in SOFTMAX:
        if before.shape[-1] == 1 or before.ndim == 1:
            raise UsageError(
                f"The outputs have one class, and loss={loss!r} compares class probabilities.",
                f"Found outputs of shape {original.shape}; the softmax of one class is 1 for any logit.",
                "Give loss='binary' for a binary classifier, or loss='squared-error' for a regression.",
            )
        terms, weight = _divergence(*_log_probabilities(before, after)), before.size / before.shape[-1]
    elif loss in SIGMOID:
        rows = before.size / (before.shape[-1] if before.ndim > 1 else 1)
        positive, negative = ((ops.log_sigmoid(s * before), ops.log_sigmoid(s * after)) for s in (1, -1))
        terms, weight = _divergence(*positive) + _divergence(*negative), rows
    else:
        terms, weight = float(((before - after) ** 2).sum()), float((before**2).sum())
    return (max(terms, 0.0) if np.isfinite(terms) else float("nan")), weight


def _log_probabilities(
    before: NDArray[np.float64], after: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the logarithms of the class probabilities of two outputs, which are logits or probabilities."""
    if are_probabilities(before):
        tiny = np.finfo(np.float32).tiny
        return np.log(np.maximum(before, tiny)), np.log(np.maximum(after, tiny))
    return ops.log_softmax(before), ops.log_softmax(after)


def _divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore"):  # NaN raises an error in `mean_output_changes`
        return float(ops.kl_terms(log_p, log_q).sum())
