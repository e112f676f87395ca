"""The example that the conformance checks of frameworks take, and training of its models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.batches import ArrayData
from kirsch.distillation.objective import Objective
from kirsch.distillation.step import DistillationStep
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.graph.graph import Tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kirsch.frameworks.protocols import Framework
    from kirsch.frameworks.training import Trained
    from kirsch.graph.graph import Graph

ROUNDING = 1e-5
"""Tolerance for sums in float32 in another order, relative to the largest value."""

BATCH = 8
"""Batch size of the trainings."""


@dataclass(frozen=True)
class FrameworkExample:
    """A framework and a small classifier to test it with.

    Args:
        framework: framework to test.
        build: function that returns a new model with random weights; it has at least one batch normalization.
        inputs: float32 samples on the first axis, at least 16; the model takes this one array.
        labels: class numbers of the samples, shape (N,).
        layer: path of a hidden layer with one output.
    """

    framework: Framework
    build: Callable[[], Any]
    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    layer: str

    def model(self, seed: int = 0) -> Any:
        """Return a new model in inference mode with the random weights of a seed."""
        return self.framework.inference.inference_mode(self.framework.training.seeded(self.build, seed))

    def graph(self, model: Any) -> Graph:
        """Return the graph of a model."""
        inputs = self.framework.inference.from_numpy(self.inputs[:1])
        return self.framework.analysis.trace(model, inputs, Tracing())

    def trained(self, model: Any, training: Training | None = None, hooks: TrainingHooks | None = None) -> Trained:
        """Return a model after training on the labels, by default for three epochs."""
        framework = self.framework
        shape = framework.inference.predict(model, self.inputs[:2]).shape[1:]
        step = DistillationStep(framework.features, Objective.labels(), logits_shape=tuple(shape))
        data = ArrayData(self.inputs, self.labels, batch_size=BATCH)
        student = framework.features.with_adapters(model, ("logits",), {}, {}, None)
        settings = training or Training(epochs=3, learning_rate=0.05, weight_decay=0.0)
        return framework.training.train(student, data, step, settings, hooks or QUIET)


QUIET = TrainingHooks(event=lambda _event: None)


def assert_close(found: Any, expected: NDArray[Any], what: str) -> None:
    """Assert that two arrays are equal up to rounding; `what` describes the first one."""
    error, scale = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    assert error <= ROUNDING * scale, f"{what}: the largest difference is {error:.3g}, the largest value {scale:.3g}"
