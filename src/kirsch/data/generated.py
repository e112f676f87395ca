"""Generated training data, for distillation without a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from kirsch.annotations import Count, Fix, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import is_model
from kirsch.data.arrays import host, without_gradient
from kirsch.data.augment import check_call
from kirsch.data.batches import Batch, SeededData, borders_of, count_of
from kirsch.errors import DataError, KirschError, UsageError, error_text, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

HOW = "Write it as generate(count, generator), and draw from the numpy.random.Generator alone."

Generate = Annotated[Callable[[int, np.random.Generator], Any], Fix(HOW)]
"""Function (number of samples, generator) → inputs of a model; all randomness comes from the generator."""

TRIED = 2
"""Number of samples that are generated to check a function."""


@checked
@dataclass(frozen=True, eq=False)
class GeneratedData(SeededData):
    """Generated inputs without labels. A batch depends on (seed, epoch, number of the batch) alone.

    Args:
        generate: function (count, generator) → inputs of `count` samples: an array, or a dict or tuple of arrays with
            the samples on the first axis. It must draw all random numbers from the `numpy.random.Generator`. For a
            model, such as the generator of a GAN, give `kirsch.ModelGenerator(model, noise=(64,))`.
        samples: samples per epoch, >= 1.
        batch_size: samples per batch, >= 1. A last batch of one sample is merged with the batch before.
        views: number of different epochs: epoch e has the samples of epoch e modulo `views`. None: each epoch has new
            samples.
        seed: seed of the random numbers, >= 0; None for the seed of the run.

    Raises:
        UsageError: the function takes no generator or draws random numbers from another source, or a setting is out of
            range.
        DataError: the function returns another number of samples.

    Source: Micaelli, Storkey 2019, arXiv:1905.09768, and Fang et al. 2019, arXiv:1912.11006, who train the generator
        together with the student; here the generator is not trained.
    """

    generate: Generate
    samples: Count
    _: KW_ONLY
    batch_size: Count = 64
    views: Count | None = None
    seed: Seed | None = None

    def __post_init__(self) -> None:
        name = name_of(self.generate)
        if is_model(self.generate):
            raise UsageError(
                f"`generate` is the model {name}; expected a function (count, generator) → inputs.",
                fix="Give kirsch.ModelGenerator(model, noise=(64,)) for a model that takes 64 numbers per sample.",
            )
        check_call(self.generate, name, "a count", HOW)
        self._check_repeats(name)

    def _check_repeats(self, name: str) -> None:
        try:
            first, second = (_arrays(self._inputs(TRIED, np.random.default_rng(0))) for _ in range(2))
        except KirschError:
            raise
        except Exception as error:  # code of the user may raise any exception
            raise UsageError(f"`generate`, {name}, fails for {TRIED} samples.", error_text(error), HOW) from error
        if [host(part).tobytes() for part in first] != [host(part).tobytes() for part in second]:
            raise UsageError(
                f"`generate`, {name}, returns different inputs for the same seed.",
                "It draws random numbers from another source, or keeps a state.",
                "Draw all random numbers from the generator that it takes.",
            )

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return count_of(self.samples, self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the first epoch of a run with seed 0, for inspection."""
        return self.epoch(0, 0)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `SeededData.epoch`."""
        borders = borders_of(self.samples, self.batch_size)
        data_seed = seed if self.seed is None else self.seed
        view = epoch if self.views is None else epoch % self.views
        for number in range(start, len(self)):
            generator = np.random.default_rng([data_seed, view, number])
            yield Batch(self._inputs(borders[number + 1] - borders[number], generator), view=view)

    def _inputs(self, count: int, generator: np.random.Generator) -> Any:
        inputs = without_gradient(self.generate(count, generator))  # the generator is not trained
        sizes = {len(part) for part in _arrays(inputs)}
        if sizes != {count}:
            raise DataError(
                f"`generate`, {name_of(self.generate)}, returns {', '.join(map(str, sorted(sizes))) or 'no'} samples; "
                f"expected {count}.",
                fix="Return `count` samples, on the first axis of each array.",
            )
        return inputs


def _arrays(value: Any) -> list[Any]:
    """Return all arrays of inputs."""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, (tuple, list)):
        return [array for part in parts for array in _arrays(part)]
    return [value]
