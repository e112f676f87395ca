"""Running a teacher on samples for a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.distillation.store.record import LOGITS
from kirsch.errors import NumericError, UsageError
from kirsch.frameworks.find import framework_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.data.batches import ArrayData

Outputs = Callable[[Any], dict[str, Any]]
"""Callable that takes inputs as a numpy array (N, ...) and returns arrays by name (N, ...): "logits" (N, ..., K), and
features."""

LARGEST = float(np.finfo(np.float16).max)


class TeacherRunner:
    """Computes the outputs of a teacher, or of a callable that runs it, for augmented samples.

    Args:
        teacher: run in inference mode; its weights are hashed.
        data: source of the samples.
        outputs: callable to run; by default the logits of the teacher.
        batch_size: number of samples in a batch.
    """

    def __init__(self, teacher: Any, data: ArrayData, outputs: Outputs | None, batch_size: int) -> None:
        self.teacher = teacher
        self._framework = framework_of(teacher)
        self._data = data
        self.outputs = outputs
        self.batch_size = batch_size

    def returns_probabilities(self, inputs: Any) -> bool:
        """Return whether the teacher's outputs come from a sigmoid or a softmax; False with a callable."""
        return self.outputs is None and self._framework.features.is_squashed(self.teacher, "logits", inputs)

    def __call__(self, indices: NDArray[Any], seed: int, view: int) -> dict[str, NDArray[Any]]:
        """Return the teacher's outputs for some samples in one view.

        Args:
            indices: indices of at most `batch_size` samples, shape (N,).
            seed, view: seed of the augmentation, and number of the view.

        Raises:
            NumericError: an output is not finite, or a feature is too large for 16 bits.
            UsageError: the outputs are not arrays with one row per sample.
        """
        batch = self._data.batch(indices, seed, view)
        if self.outputs is None:
            outputs = {
                LOGITS: self._framework.inference.predict(self.teacher, batch.inputs, batch_size=self.batch_size)
            }
        else:
            outputs = _arrays(self.outputs(batch.inputs))
        for name, array in outputs.items():
            if array.ndim < 1 + (name == LOGITS) or len(array) != len(batch) or not array.size:
                raise UsageError(
                    f"The output {name!r} has shape {array.shape} for {len(batch)} samples.",
                    f"The first axis is that of the samples, and the last axis of {LOGITS!r} that of the classes.",
                )
            is_valid = np.isfinite(array) if name == LOGITS else np.abs(array) <= LARGEST
            if not is_valid.all():
                sample = batch.ids[~is_valid.reshape(len(is_valid), -1).all(axis=1)][0]
                problem = "are not finite" if name == LOGITS else f"are not finite, or beyond ±{LARGEST:.0f}"
                raise NumericError(
                    f"The teacher's {name} {problem} for sample {sample} in view {view}.",
                    "The store has 16 bits for each.",
                    "Check the teacher's weights and inputs; scale features in the callable.",
                )
        return outputs


def _arrays(returned: Any) -> dict[str, NDArray[Any]]:
    if not isinstance(returned, dict) or not returned:
        found = "an empty dict" if isinstance(returned, dict) else type(returned).__name__
        raise UsageError(f"The callable `outputs` returned {found}.", fix="Return a dict of arrays by name.")
    return {str(name): host(ops.upcast(array)) for name, array in returned.items()}
