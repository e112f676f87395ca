"""A generative model as a function that generates training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.data.annotations import Model
from kirsch.frameworks.find import framework_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


@checked
@dataclass(frozen=True, eq=False)
class ModelGenerator:
    """Function (count, generator) → outputs of a model for random noise, for `kirsch.GeneratedData`.

    Args:
        model: model such as the generator of a GAN; it runs in inference mode without gradients, and is not changed.
        noise: shape of the noise for one sample, without the batch axis. The noise is float32, is drawn from a standard
            normal distribution, and is the only input of the model.
    """

    model: Model
    noise: tuple[Count, ...]

    def __call__(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        """Return the outputs for `count` samples of noise, numpy, with the samples on the first axis."""
        noise = generator.standard_normal((count, *self.noise), dtype=np.float32)
        outputs: NDArray[Any] = framework_of(self.model).inference.predict(self.model, noise, batch_size=count)
        return outputs
