"""How a sample is augmented, as a function of one seed and nothing else, so that it can be done again in the same bits.

A sample's seed is mixed from the seed of the run, the view (which augmented look of the sample it is) and the sample's
id. Everything random about the sample follows from it, whatever batch the sample stands in. Transforms of this file
draw with `uniform`, from counters, for a whole batch at once; they use no function whose last bit differs between
machines (logarithm, cosine). A user's transform draws from a generator that is made for each sample.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from kirsch.annotations import Between, Count, Fix, Share
from kirsch.arguments import checked
from kirsch.errors import ShapeError, UsageError, error_text, name_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

HOW = "Write it as transform(batch, generator), or use those of kirsch.frameworks.augment."

Augment = Annotated[Callable[[Any, np.random.Generator], Any], Fix(HOW)]
"""(one sample as a batch of one, generator) → the same shape; all its randomness comes from the generator."""

MASK = 0xFFFFFFFFFFFFFFFF
STEP = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio, odd: the counter of splitmix64."""
SHIFTS = tuple(np.array([bits], np.uint64) for bits in (30, 27, 31))
FACTORS = tuple(np.array([factor], np.uint64) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Arrays wrap around without a warning, and are not converted anew in each operation, as numbers are."""

TRIED, ATTEMPTS = 4, 8
"""On how many samples a user's transform is tried, and with how many seeds each, twice: what is drawn elsewhere for one
sample of five shows in all but 1 of 1,000, 0.8 to the power of 32."""

PIXELS = 4
"""Axes of a batch of images: (N, C, H, W)."""


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words that spreads each bit over all: the output function of splitmix64.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators, figure 16 (variant 13 of Stafford).
    """
    words = words ^ (words >> SHIFTS[0])
    words *= FACTORS[0]
    words ^= words >> SHIFTS[1]
    words *= FACTORS[1]
    words ^= words >> SHIFTS[2]
    return words


def sample_seeds(seed: int, view: int, ids: NDArray[Any]) -> NDArray[np.uint64]:
    """One seed a sample: mix(mix(mix(seed) + view) + mix(id)), where each mix steps its counter first.

    This function never changes: stores of teacher outputs on disk are keyed by it. Different ids of one run and view
    have different seeds, since each mix is a bijection.

    Args:
        seed: of the run, >= 0.
        view: which look of the samples, >= 0.
        ids: whole numbers, shape (N,).

    Returns:
        Shape (N,).
    """
    key = _mixed_int(_mixed_int(seed + int(STEP)) + view + int(STEP))
    seeds = np.asarray(ids).astype(np.uint64)
    return mixed(mixed(seeds + STEP) + _word(key + int(STEP)))


def _mixed_int(word: int) -> int:
    """`mixed` for one number, modulo 2⁶⁴: arrays of one cost ten times as much."""
    word &= MASK
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def _word(number: int) -> NDArray[np.uint64]:
    """A whole number modulo 2⁶⁴, as an array: arrays wrap around where numpy's scalars warn."""
    return np.array([number & MASK], np.uint64)


def derived(seeds: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """Seeds for a part of the work, such as one stage of a chain, that share nothing with those of other parts."""
    return mixed(mixed(seeds + STEP) + _word(number) * STEP)


def uniform(seeds: NDArray[np.uint64], draw: int = 0) -> NDArray[np.float64]:
    """The draw of this number for each seed: shape (N,), 0 <= value < 1, of 53 bits."""
    return (mixed(seeds + _word(draw + 1) * STEP) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def whole(seeds: NDArray[np.uint64], draw: int, below: int) -> NDArray[np.int64]:
    """Whole numbers from 0 to `below` - 1, one a seed: shape (N,)."""
    return (uniform(seeds, draw) * below).astype(np.int64)


class Seeded(ABC):
    """A transform of a batch whose randomness comes from one seed a sample; a frozen dataclass of its numbers."""

    @abstractmethod
    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """The batch transformed, of the same shape and type; what is given is left as it is.

        Args:
            batch: shape (N, C, H, W), floating.
            seeds: shape (N,).
        """


@checked
@dataclass(frozen=True)
class Crop(Seeded):
    """Images moved by up to `padding` pixels each way over a border of zeros, evenly likely.

    Args:
        padding: pixels, >= 0.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2 (padding 4 for CIFAR).
    """

    padding: Annotated[int, Between(0, 2**31)] = 4

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """The images moved."""
        _check_images("Crop", batch)
        pad, (height, width) = self.padding, batch.shape[2:]
        padded = np.pad(batch, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        moved = np.empty_like(batch)
        down, right = (whole(seeds, draw, 2 * pad + 1).tolist() for draw in (0, 1))
        for number, (top, left) in enumerate(zip(down, right, strict=True)):  # slices copy faster than indices gather
            moved[number] = padded[number, :, top : top + height, left : left + width]
        return moved


@checked
@dataclass(frozen=True)
class Flip(Seeded):
    """Images mirrored left to right.

    Args:
        probability: 0 to 1.
    """

    probability: Share = 0.5

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """The images, some of them mirrored."""
        _check_images("Flip", batch)
        chosen, out = uniform(seeds) < self.probability, batch.copy()
        out[chosen] = batch[chosen][..., ::-1]
        return out


@checked
@dataclass(frozen=True)
class Erase(Seeded):
    """Images with a square of zeros, whose middle lies anywhere in the image: cutout.

    Args:
        size: pixels of a side, >= 1; what lies outside of the image is lost.
        probability: of an image to have one, 0 to 1.

    Source: DeVries, Taylor 2017, arXiv:1708.04552, section 3.2 (16 pixels for CIFAR-10, 8 for CIFAR-100).
    """

    size: Count = 8
    probability: Share = 1.0

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """The images with their squares."""
        _check_images("Erase", batch)
        inside = []
        for draw, length in enumerate(batch.shape[2:]):
            place = np.arange(length) - whole(seeds, draw, length)[:, None] + self.size // 2
            inside.append((place >= 0) & (place < self.size))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (N, 1, H, W)
        square &= (uniform(seeds, 2) < self.probability)[:, None, None, None]
        return np.where(square, np.zeros((), batch.dtype), batch)


@checked
@dataclass(frozen=True)
class Jitter(Seeded):
    """Images of another contrast and brightness: mean + c (image - mean) + b, the mean over all its numbers.

    Args:
        brightness: b lies within ± this, in units of the inputs; >= 0.
        contrast: c lies within 1 ± this; 0 to 1.
    """

    brightness: Annotated[float, Between(0)] = 0.2
    contrast: Share = 0.2

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """The images changed."""
        _check_images("Jitter", batch)
        # Added one after the other: numpy's own order of adding follows the layout and the size of the batch.
        rows = batch.reshape(len(batch), -1).astype(np.float64)
        means = np.cumsum(rows, axis=1)[:, -1].reshape(-1, 1, 1, 1) / rows.shape[1]
        bright, strong = (
            (width * (2 * uniform(seeds, draw) - 1))[:, None, None, None]
            for draw, width in enumerate((self.brightness, self.contrast))
        )
        changed: NDArray[Any] = means + (1 + strong) * (batch - means) + bright
        return changed.astype(batch.dtype)


@checked
@dataclass(frozen=True)
class Noise(Seeded):
    """Inputs of any shape plus noise of nearly normal distribution.

    Each number is the sum of twelve uniform ones of 16 bits: of mean 0 and deviation 1, never beyond ± 6.

    Args:
        scale: standard deviation, >= 0.
    """

    scale: Annotated[float, Between(0)] = 0.1

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """The inputs with noise."""
        places = np.arange(math.prod(batch.shape[1:]), dtype=np.uint64)
        total = np.zeros((len(batch), len(places)), np.int64)
        for word in range(3):
            bits = mixed(mixed(derived(seeds, word)[:, None] + places * STEP))
            for part in range(0, 64, 16):
                total += ((bits >> np.uint64(part)) & np.uint64(0xFFFF)).astype(np.int64)
        normal = (total - 6 * 65535) / 65536.0
        return (batch + self.scale * normal.reshape(batch.shape)).astype(batch.dtype)


@dataclass(frozen=True, init=False)
class Chain(Seeded):
    """Transforms one after the other, each with seeds of its own.

    Args:
        stages: of this file, or a user's.
    """

    stages: tuple[Seeded | Augment, ...]

    @checked
    def __init__(self, *stages: Seeded | Augment) -> None:
        object.__setattr__(self, "stages", stages)

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """What the last one gives."""
        for number, stage in enumerate(self.stages):
            batch = apply(stage, batch, derived(seeds, number))
        return batch


def apply(transform: Seeded | Augment | None, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
    """The batch transformed, each sample by its seed alone; what is given is left as it is.

    Args:
        transform: of this file, which takes the batch at once; a user's, which is called sample by sample; or None.
        batch: shape (N, ...).
        seeds: shape (N,).

    Raises:
        UsageError: a user's transform gives something other than an array of its sample's shape.
    """
    if transform is None or not len(batch):
        return batch
    if isinstance(transform, Seeded):
        return transform(batch, seeds)
    rows = zip(range(len(batch)), seeds.tolist(), strict=True)
    return np.concatenate([_alone(transform, batch[row : row + 1], seed) for row, seed in rows])


def _alone(transform: Augment, sample: NDArray[Any], seed: int) -> NDArray[Any]:
    try:
        found = transform(sample.copy(), np.random.Generator(np.random.Philox(key=seed)))
    except Exception as error:  # foreign code is run, which may raise anything
        raise UsageError(
            f"The transform {name_of(transform)} given as `augment` fails on a sample of shape {sample.shape}.",
            error_text(error),
            "It is called as transform(batch, generator) with one sample as a batch of one.",
        ) from error
    if not isinstance(found, np.ndarray) or found.shape != sample.shape:
        kind = f"an array of shape {found.shape}" if isinstance(found, np.ndarray) else f"a {type(found).__name__}"
        raise UsageError(
            f"The transform {name_of(transform)} gives {kind} for a sample of shape {sample.shape}.",
            "It is called with one sample, as a batch of one, and a numpy generator.",
            "It must give an array of the same shape.",
        )
    return found


def check(transform: Seeded | Augment | None, samples: NDArray[Any]) -> None:
    """Make sure, before any work, that a transform follows from its seed.

    Args:
        transform: a user's is tried with eight seeds a sample, and then again from the last to the first.
        samples: some that differ, shape (N, ...).

    Raises:
        UsageError: it takes no generator, gives something else than its sample's shape, or draws from elsewhere.
    """
    if isinstance(transform, Chain):
        for number, stage in enumerate(transform.stages):
            check(stage, samples)
            samples = apply(stage, samples, sample_seeds(0, number, np.arange(len(samples))))
    elif transform is not None and not isinstance(transform, Seeded):
        check_call(transform, f"The transform {name_of(transform)}", "a batch", HOW)
        tries = [(seed % len(samples), seed) for seed in range(len(samples) * ATTEMPTS)]  # no two draw alike
        first, again = (
            {(at, seed): _alone(transform, samples[at : at + 1], seed).tobytes() for at, seed in order}
            for order in (tries, tries[::-1])
        )
        if first != again:
            raise UsageError(
                f"The transform {name_of(transform)} does not follow from its generator.",
                "With the same seed it gives other numbers: it draws from elsewhere, or remembers.",
                "Let it draw from the generator that it is given, and from nothing else.",
            )


def check_call(function: Any, called: str, given: str, fix: str) -> None:
    """Refuse a callable that does not take a generator, before any work.

    Args:
        function: of two arguments, the second a generator.
        called: what the error calls it.
        given: its first argument, in words.
        fix: how it should be written.

    Raises:
        UsageError: it cannot be called so.
    """
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise UsageError(
            f"{called} cannot be called with {given} and a generator: {error}.",
            "What it draws from elsewhere could not be drawn again.",
            fix,
        ) from error
    except ValueError:
        return  # of some built-in functions Python does not know the signature; trying them shows


def _check_images(name: str, batch: NDArray[Any]) -> None:
    if batch.ndim != PIXELS:
        raise ShapeError(f"{name} takes images, (N, C, H, W); the batch has shape {batch.shape}.")
