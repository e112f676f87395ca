"""Running a teacher on samples, for a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.distillation.arrays import wide
from kirsch.distillation.store.description import described
from kirsch.distillation.store.record import LOGITS
from kirsch.distillation.store.specification import text_hash
from kirsch.errors import NumericError, UsageError
from kirsch.frameworks.port import framework_of, host

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.frameworks.data import ArrayData, Batch

Outputs = Callable[[Any], dict[str, Any]]
"""Inputs as a numpy array (N, ...) → arrays by name (N, ...): "logits" (N, ..., K), and features."""

LARGEST = float(np.finfo(np.float16).max)


class Runner:
    """A teacher, or a callable that runs one, for the looks of some samples.

    Args:
        teacher: run in inference mode; its weights are what is hashed.
        data: where the samples come from.
        outputs: what to run; the scores of the teacher if left out.
        batch_size: samples at a time.
    """

    def __init__(self, teacher: Any, data: ArrayData, outputs: Outputs | None, batch_size: int) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; at least 1 is needed.")
        self._teacher = teacher
        self._framework = framework_of(teacher)
        self._data = data
        self._outputs = outputs
        self.batch_size = batch_size

    def hashes(self) -> dict[str, str | None]:
        """Of the teacher's weights and of the callable, as a specification names them."""
        outputs = None if self._outputs is None else text_hash(json.dumps(described(self._outputs)))
        return {"teacher_sha256": self._framework.fingerprint(self._teacher), "outputs_sha256": outputs}

    @property
    def teacher_name(self) -> str:
        """The class of the teacher."""
        return type(self._teacher).__name__

    def squashed(self, inputs: Any) -> bool:
        """Whether the teacher's own outputs come out of a sigmoid or a softmax."""
        return self._outputs is None and self._framework.squashed(self._teacher, "logits", inputs)

    def __call__(self, places: NDArray[Any], seed: int, view: int) -> dict[str, NDArray[Any]]:
        """What the teacher puts out for samples as a view shows them.

        Args:
            places: indices of at most `batch_size` samples, shape (N,).
            seed, view: of the augmentation.

        Raises:
            NumericError: an output is not finite, or a feature is too large for 16 bits.
            UsageError: the callable gives something else than arrays of one row a sample.
        """
        batch = self._data.look(places, seed, view)
        if self._outputs is None:
            found = {LOGITS: self._framework.predict(self._teacher, batch.inputs, batch_size=self.batch_size)}
        else:
            found = self._by_callable(batch)
        for name, array in found.items():
            fine = np.isfinite(array) if name == LOGITS else np.abs(array) <= LARGEST
            if not fine.all():
                bad = batch.ids[~fine.reshape(len(fine), -1).all(axis=1)][0]
                wrong = "are not finite" if name == LOGITS else f"are not finite, or beyond ±{LARGEST:.0f}"
                raise NumericError(
                    f"The teacher's {name} {wrong} for sample {bad} in view {view}.",
                    "A store of 16 bits cannot hold them.",
                    "Check the teacher's weights and inputs; scale features in the callable.",
                )
        return found

    def _by_callable(self, batch: Batch) -> dict[str, NDArray[Any]]:
        given: Any = self._outputs(batch.inputs) if self._outputs is not None else None
        if not isinstance(given, dict) or not given:
            raise UsageError(f"The outputs are a {type(given).__name__}.", fix="Give a dict of arrays by name.")
        found = {str(name): host(wide(array)) for name, array in given.items()}
        for name, array in found.items():
            if array.ndim < 1 or len(array) != len(batch):
                raise UsageError(
                    f"The output {name!r} has shape {array.shape} for {len(batch)} samples.",
                    fix="Its first axis must be that of the samples.",
                )
        return found
