"""Positions of activations that are not padding, and the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kirsch.data.arrays import host
from kirsch.data.batches import Batch
from kirsch.errors import DataError, UsageError
from kirsch.tasks.padding import MASKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def samples_of(batch: Batch) -> Iterator[Batch]:
    """Yield each sample of a batch as a batch.

    Raises:
        DataError: an array cannot be divided by samples.
    """
    number = len(batch)
    for index in range(number):
        yield batch if number == 1 else Batch(*(_row(part, index, number) for part in (batch.inputs, batch.targets)))


def _row(part: Any, index: int, samples: int) -> Any:
    """Return one sample of nested arrays; arrays with one row for all samples are returned unchanged."""
    if isinstance(part, Mapping):
        return {name: _row(value, index, samples) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        return tuple(_row(value, index, samples) for value in part)
    shape = tuple(getattr(part, "shape", ()))
    if shape[:1] not in ((), (1,), (samples,)):
        raise DataError(
            f"An input has shape {shape}, and the batch has {samples} samples.",
            "The importance runs the model on each sample by itself.",
            "Give arrays with the samples on the first axis, or batches of one sample.",
        )
    return part[index : index + 1] if shape[:1] == (samples,) else part


class Padding:
    """Padding in the inputs of a batch, which an `attention_mask` or `decoder_attention_mask` marks with 0.

    Attributes:
        exists: whether the batch has padding.
        is_all: whether all tokens of the batch are padding.
    """

    def __init__(self, batch: Batch) -> None:
        inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {}
        masks = [host(inputs[name]) != 0 for name in MASKS if inputs.get(name) is not None]
        self._masks = [mask.ravel() for mask in masks if mask.ndim == len("NL")]
        self.exists = not all(mask.all() for mask in self._masks)
        self.is_all = bool(self._masks) and not any(mask.any() for mask in self._masks)
        shapes = [tuple(getattr(value, "shape", ())) for value in inputs.values()]
        self._lengths = {shape[1] for shape in shapes if len(shape) > 1}
        self._pooled: set[str] = set()  # weights that have read one position

    def left_out(self, name: str, x: Any, experts: Any) -> Any:
        """Return the positions of x, of one sample, that are not padding.

        Raises:
            UsageError: it is not known which positions are padding.
        """
        if not self.exists:
            return x
        masks = [mask for mask in self._masks if len(mask) == x.shape[0]]
        differ = any((mask != masks[0]).any() for mask in masks)
        again = x.shape[0] == 1 and name in self._pooled  # a recurrent layer reads one position after another
        if x.shape[0] == 1:
            self._pooled.add(name)
        if experts is not None or differ or again or not (masks or x.shape[0] == 1 or x.shape[0] in self._lengths):
            raise unknown_positions(name)
        return x[masks[0]] if masks else x


def unknown_positions(name: str) -> UsageError:
    """Return the error for a weight or a module that reads activations whose padding is not known."""
    return UsageError(
        f"Padding cannot be left out of the activations that {name!r} reads.",
        "It is not known which of the positions are padding.",
        "Give batches without padding, such as one sequence for each batch.",
    )


def without_padding(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Padding]]:
    """Yield the batches with their padding, and each sample of a batch with padding by itself.

    The positions of a single sample are in the order of its tokens, whichever axis of a layer holds the samples.
    Samples of padding alone are left out.

    Raises:
        DataError: all samples are padding alone.
    """
    read, counted = 0, 0
    for batch in batches:
        for part in samples_of(batch) if Padding(batch).exists else (batch,):
            padding = Padding(part)
            read += 1
            if not padding.is_all:
                counted += 1
                yield part, padding
    if read and not counted:
        raise only_padding()


def only_padding() -> DataError:
    """Return the error for calibration data without a position that counts."""
    return DataError(
        "`data` contains only padding: the attention masks of all samples are 0.",
        "Padding does not count.",
        "Give attention masks that are 1 for the tokens of the samples.",
    )


def refuse_padding(batch: Batch, other: str) -> None:
    """Raise a UsageError if statistics of batch normalization would be estimated from a batch with padding.

    Args:
        batch: the batch.
        other: what can be done instead of giving batches without padding, for the message.
    """
    if Padding(batch).exists:
        raise UsageError(
            "The statistics of batch normalization cannot be estimated from batches with padding.",
            "Padding would count as data.",
            f"Give batches without padding, or {other}.",
        )
