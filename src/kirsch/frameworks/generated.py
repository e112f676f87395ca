"""Samples that are made while a student learns from them, for whoever has a teacher and no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from kirsch.annotations import Count, Fix, Seed
from kirsch.arguments import checked
from kirsch.errors import DataError, KirschError, UsageError, error_text, name_of
from kirsch.frameworks.annotations import Model, is_model
from kirsch.frameworks.augment import check_call
from kirsch.frameworks.data import Batch, SeededData, borders_of, count_of
from kirsch.frameworks.port import framework_of, host

if TYPE_CHECKING:
    from collections.abc import Iterator

HOW = "Write it as generate(count, generator), and draw from the numpy.random.Generator alone."

Generate = Annotated[Callable[[int, np.random.Generator], Any], Fix(HOW)]
"""(how many samples, generator) → inputs of a model; all randomness comes from the generator."""

TRIED = 2
"""Samples that are made to look at a callable before any work."""


@checked
@dataclass(frozen=True, eq=False)
class GeneratedData(SeededData):
    """Inputs without labels from a callable or a model; each batch follows from (seed, epoch, number of the batch).

    Args:
        generate: (count, generator) → inputs of so many samples: an array, or a dict or tuple of arrays with the
            samples on the first axis. All that it draws must come from the `numpy.random.Generator`. Or a model, such
            as the generator of a GAN, which is given `noise` and run in inference mode, without gradient.
        samples: of one epoch, >= 1.
        batch_size: >= 1; a last batch of one sample joins the one before.
        noise: shape of what the model takes for one sample; drawn from a standard normal distribution as float32.
        views: how many different epochs there are: epoch e is epoch e modulo this; None makes each one anew.
        seed: of what is drawn, >= 0; None takes that of the run.

    Raises:
        UsageError: the callable takes no generator or does not follow from it, a model comes without the shape of its
            noise, or a setting is out of range.
        DataError: it gives another number of samples than it is asked for.

    Source: Micaelli, Storkey 2019, arXiv:1905.09768, and Fang et al. 2019, arXiv:1912.11006, who train the generator
        along; here it is given, and stays as it is.
    """

    generate: Generate | Model
    samples: Count
    batch_size: Count = 64
    noise: tuple[Count, ...] | None = None
    views: Count | None = None
    seed: Seed | None = None

    def __post_init__(self) -> None:
        called = name_of(self.generate)
        if self._is_model and self.noise is None:
            raise UsageError(
                f"The model {called} is given without the shape of its noise.",
                fix="Say noise=(64,) for 64 numbers a sample, or give a function (count, generator) → inputs.",
            )
        if not self._is_model:
            self._check_callable(called)
        self._check_repeats(called)

    @property
    def _is_model(self) -> bool:
        return is_model(self.generate)

    def _check_callable(self, called: str) -> None:
        if self.noise is not None:
            raise UsageError(
                f"{called} is no model, and is given noise={self.noise}.",
                fix="Leave it out: a function draws from the generator itself.",
            )
        check_call(self.generate, called, "a count", HOW)

    def _check_repeats(self, called: str) -> None:
        try:
            first, again = (_arrays(self._made(TRIED, np.random.default_rng(0))) for _ in range(2))
        except KirschError:
            raise
        except Exception as error:  # foreign code is run, which may raise anything
            raise UsageError(
                f"{called}, given as `generate`, fails for {TRIED} samples.", error_text(error), HOW
            ) from error
        if [host(part).tobytes() for part in first] != [host(part).tobytes() for part in again]:
            raise UsageError(
                f"{called} does not follow from its generator.",
                "With the same seed it gives other numbers: it draws from elsewhere, or remembers.",
                "Let it draw from the generator that it is given, and from nothing else.",
            )

    def __len__(self) -> int:
        """Batches of one epoch."""
        return count_of(self.samples, self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The first epoch of a run with seed 0, to be looked at."""
        return self.epoch(0, 0)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `SeededData`."""
        borders = borders_of(self.samples, self.batch_size)
        own = seed if self.seed is None else self.seed
        view = epoch if self.views is None else epoch % self.views
        for number in range(start, len(self)):
            generator = np.random.default_rng([own, view, number])
            yield Batch(self._made(borders[number + 1] - borders[number], generator), view=view)

    def _made(self, count: int, generator: np.random.Generator) -> Any:
        if self._is_model:
            noise = generator.standard_normal((count, *(self.noise or ())), dtype=np.float32)
            made: Any = framework_of(self.generate).predict(self.generate, noise, batch_size=count)
        else:
            made = _constant(self.generate(count, generator))
        sizes = {len(part) for part in _arrays(made)}
        if sizes != {count}:
            raise DataError(
                f"{name_of(self.generate)} gives {', '.join(map(str, sorted(sizes))) or 'no'} samples; "
                f"{count} were asked for.",
                fix="Give as many as `count` says, on the first axis.",
            )
        return made


def _arrays(value: Any) -> list[Any]:
    """The arrays of inputs."""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, (tuple, list)):
        return [array for part in parts for array in _arrays(part)]
    return [value]


def _constant(value: Any) -> Any:
    """Inputs that no gradient goes through, so that no step reaches into what made them."""
    if isinstance(value, Mapping):
        return {name: _constant(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_constant(part) for part in value)
    return value.detach() if hasattr(value, "detach") else value
