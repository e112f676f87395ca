"""Augmentation that depends on one seed per sample, so that it can be reproduced bit for bit.

The seed of a sample is a hash of the seed of the run, the view (the number of the augmentation) and the sample's id. It
does not depend on the batch. The transforms of this file draw random numbers for a whole batch at once with `uniform`,
and use no function whose last bit differs between machines (logarithm, cosine). Functions of the user are called for
each sample with a generator that is made from the sample's seed.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from kirsch.annotations import Between, Count, Fix, Share
from kirsch.arguments import checked
from kirsch.errors import ShapeError, UsageError, error_text, name_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

HOW = "Write it as transform(batch, generator), or use a transform of kirsch.data.augment."

Augment = Annotated[Callable[[Any, np.random.Generator], Any], Fix(HOW)]
"""Function (batch of one sample, generator) → batch of the same shape; all randomness comes from the generator."""

MASK = 0xFFFFFFFFFFFFFFFF
STEP = np.uint64(0x9E3779B97F4A7C15)
"""Increment of the counter of splitmix64: 2⁶⁴ divided by the golden ratio, rounded to an odd number."""
SHIFTS = tuple(np.array([bits], np.uint64) for bits in (30, 27, 31))
FACTORS = tuple(np.array([factor], np.uint64) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Constants of `mix`, as arrays: overflow of an array gives no warning, and Python numbers would have to be converted
in each operation."""

TRIED, ATTEMPTS = 4, 8
"""Number of samples, and number of seeds per sample, with which a function of the user is checked. If the function uses
another source of random numbers for one sample in five, it passes the check with probability 0.8³² < 0.001."""

IMAGE_AXES = 4
"""Number of axes of a batch of images, (N, C, H, W)."""


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hash of 64-bit words by the output function of splitmix64, a bijection.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators, figure 16 (variant 13 of Stafford).
    """
    words = words ^ (words >> SHIFTS[0])
    words *= FACTORS[0]
    words ^= words >> SHIFTS[1]
    words *= FACTORS[1]
    words ^= words >> SHIFTS[2]
    return words


def sample_seeds(seed: int, view: int, ids: NDArray[Any]) -> NDArray[np.uint64]:
    """Return one seed per sample: m(m(m(seed) + view) + m(id)), where m(x) = mix(x + STEP).

    This function must not change, because stored teacher outputs belong to samples that were augmented with these
    seeds. Different ids of one run and view have different seeds, since `mix` is a bijection.

    Args:
        seed: seed of the run, >= 0.
        view: number of the augmentation, >= 0.
        ids: ids of the samples, integers of shape (N,).

    Returns:
        Seeds, shape (N,).
    """
    key = _mix_int(_mix_int(seed + int(STEP)) + view + int(STEP))
    words = np.asarray(ids).astype(np.uint64)
    return mix(mix(words + STEP) + _word(key + int(STEP)))


def _mix_int(word: int) -> int:
    """Return `mix` of one integer modulo 2⁶⁴; ten times as fast as with an array of one element."""
    word &= MASK
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def _word(number: int) -> NDArray[np.uint64]:
    """Return an integer modulo 2⁶⁴ as an array, since overflow of numpy scalars emits a warning."""
    return np.array([number & MASK], np.uint64)


def derive_seeds(seeds: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """Return the seeds of the stage with this number, which are independent of the seeds of other stages."""
    return mix(mix(seeds + STEP) + _word(number) * STEP)


def uniform(seeds: NDArray[np.uint64], draw: int = 0) -> NDArray[np.float64]:
    """Return random numbers in [0, 1), one per seed, shape (N,), with 53 bits; another `draw` gives other numbers."""
    return (mix(seeds + _word(draw + 1) * STEP) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(seeds: NDArray[np.uint64], draw: int, below: int) -> NDArray[np.int64]:
    """Return random integers from 0 to `below` - 1, one per seed, shape (N,)."""
    return (uniform(seeds, draw) * below).astype(np.int64)


class Seeded(ABC):
    """Transform of a batch whose randomness depends on one seed per sample. Subclasses are frozen dataclasses."""

    moves_pixels: ClassVar[bool] = False
    """Whether pixels change their position, so that masks no longer belong to the images."""

    @abstractmethod
    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the transformed batch, of the same shape and type; the argument is not changed.

        Args:
            batch: images, shape (N, C, H, W), floating.
            seeds: seeds of the samples, shape (N,).
        """


@checked
@dataclass(frozen=True)
class Crop(Seeded):
    """Random crop of images with zero padding: a shift by up to `padding` pixels, uniformly distributed.

    Args:
        padding: largest shift in pixels, >= 0.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2 (padding 4 for CIFAR).
    """

    moves_pixels = True

    padding: Annotated[int, Between(0, 2**31)] = 4

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the shifted images."""
        _check_images("Crop", batch)
        pad, (height, width) = self.padding, batch.shape[2:]
        padded = np.pad(batch, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        moved = np.empty_like(batch)
        down, right = (integers(seeds, draw, 2 * pad + 1).tolist() for draw in (0, 1))
        for number, (top, left) in enumerate(zip(down, right, strict=True)):  # slices are faster than fancy indexing
            moved[number] = padded[number, :, top : top + height, left : left + width]
        return moved


@checked
@dataclass(frozen=True)
class Flip(Seeded):
    """Random horizontal flip of images.

    Args:
        probability: probability of a flip, 0 to 1.
    """

    moves_pixels = True

    probability: Share = 0.5

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the images, some of them flipped."""
        _check_images("Flip", batch)
        chosen, out = uniform(seeds) < self.probability, batch.copy()
        out[chosen] = batch[chosen][..., ::-1]
        return out


@checked
@dataclass(frozen=True)
class Erase(Seeded):
    """Cutout: a square of zeros whose center lies anywhere in the image.

    Args:
        size: side of the square in pixels, >= 1; the square may extend beyond the image.
        probability: probability of a square, 0 to 1.

    Source: DeVries, Taylor 2017, arXiv:1708.04552, section 3.2 (16 pixels for CIFAR-10, 8 for CIFAR-100).
    """

    size: Count = 8
    probability: Share = 1.0

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the images, some of them with a square of zeros."""
        _check_images("Erase", batch)
        inside = []
        for draw, length in enumerate(batch.shape[2:]):
            offset = np.arange(length) - integers(seeds, draw, length)[:, None] + self.size // 2
            inside.append((offset >= 0) & (offset < self.size))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (N, 1, H, W)
        square &= (uniform(seeds, 2) < self.probability)[:, None, None, None]
        return np.where(square, np.zeros((), batch.dtype), batch)


@checked
@dataclass(frozen=True)
class Jitter(Seeded):
    """Random contrast c and brightness b: mean + c (image - mean) + b, with the mean over all values of the image.

    Args:
        brightness: b is uniform within ± `brightness`, in units of the inputs; >= 0.
        contrast: c is uniform within 1 ± `contrast`; 0 to 1.
    """

    brightness: Annotated[float, Between(0)] = 0.2
    contrast: Share = 0.2

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the images with changed contrast and brightness."""
        _check_images("Jitter", batch)
        # A cumulative sum, since the order of summation of `mean` depends on layout and size of the batch.
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
    """Additive noise with an approximately normal distribution, for inputs of any shape.

    Each number is the sum of twelve uniform numbers of 16 bits, with mean 0, standard deviation 1 and range ± 6.

    Args:
        scale: standard deviation of the noise, >= 0.
    """

    scale: Annotated[float, Between(0)] = 0.1

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the inputs with noise."""
        indices = np.arange(math.prod(batch.shape[1:]), dtype=np.uint64)
        total = np.zeros((len(batch), len(indices)), np.int64)
        for word in range(3):
            bits = mix(mix(derive_seeds(seeds, word)[:, None] + indices * STEP))
            for part in range(0, 64, 16):
                total += ((bits >> np.uint64(part)) & np.uint64(0xFFFF)).astype(np.int64)
        normal = (total - 6 * 65535) / 65536.0
        return (batch + self.scale * normal.reshape(batch.shape)).astype(batch.dtype)


@dataclass(frozen=True, init=False)
class Chain(Seeded):
    """Sequence of transforms with independent seeds.

    Args:
        stages: transforms of this file, or functions of the user.
    """

    stages: tuple[Seeded | Augment, ...]

    @checked
    def __init__(self, *stages: Seeded | Augment) -> None:
        object.__setattr__(self, "stages", stages)

    def __call__(self, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the output of the last transform."""
        for number, stage in enumerate(self.stages):
            batch = apply(stage, batch, derive_seeds(seeds, number))
        return batch


def apply(transform: Seeded | Augment | None, batch: NDArray[Any], seeds: NDArray[np.uint64]) -> NDArray[Any]:
    """Return the transformed batch; the argument is not changed.

    Args:
        transform: transform of this file, which takes the whole batch; function of the user, which is called with one
            sample at a time; or None.
        batch: inputs, shape (N, ...).
        seeds: seeds of the samples, shape (N,).

    Raises:
        UsageError: a function of the user fails, or does not return an array of the sample's shape.
    """
    if transform is None or not len(batch):
        return batch
    if isinstance(transform, Seeded):
        return transform(batch, seeds)
    rows = zip(range(len(batch)), seeds.tolist(), strict=True)
    return np.concatenate([_apply_to_sample(transform, batch[row : row + 1], seed) for row, seed in rows])


def _apply_to_sample(transform: Augment, sample: NDArray[Any], seed: int) -> NDArray[Any]:
    try:
        output = transform(sample.copy(), np.random.Generator(np.random.Philox(key=seed)))
    except Exception as error:  # code of the user may raise any exception
        raise UsageError(
            f"The transform {name_of(transform)} given as `augment` fails on a sample of shape {sample.shape}.",
            error_text(error),
            "It is called as transform(batch, generator) with a batch of one sample.",
        ) from error
    if not isinstance(output, np.ndarray) or output.shape != sample.shape:
        kind = f"an array of shape {output.shape}" if isinstance(output, np.ndarray) else f"a {type(output).__name__}"
        raise UsageError(
            f"The transform {name_of(transform)} returns {kind} for a sample of shape {sample.shape}.",
            "It is called as transform(batch, generator) with a batch of one sample.",
            "Return an array of the same shape.",
        )
    return output


def check(transform: Seeded | Augment | None, samples: NDArray[Any]) -> None:
    """Check that the output of a transform depends on its seed alone.

    Args:
        transform: transform; a function of the user is called with eight seeds per sample, twice, in opposite orders.
        samples: samples that differ, shape (N, ...).

    Raises:
        UsageError: the transform takes no generator, returns another shape, or has another source of random numbers.
    """
    if isinstance(transform, Chain):
        for number, stage in enumerate(transform.stages):
            check(stage, samples)
            samples = apply(stage, samples, sample_seeds(0, number, np.arange(len(samples))))
    elif transform is not None and not isinstance(transform, Seeded):
        check_call(transform, f"The transform {name_of(transform)}", "a batch", HOW)
        tries = [(seed % len(samples), seed) for seed in range(len(samples) * ATTEMPTS)]  # each seed once
        first, second = (
            {(at, seed): _apply_to_sample(transform, samples[at : at + 1], seed).tobytes() for at, seed in order}
            for order in (tries, tries[::-1])
        )
        if first != second:
            raise UsageError(
                f"The transform {name_of(transform)} returns different samples for the same seed.",
                "It draws random numbers from another source, or keeps a state.",
                "Draw all random numbers from the generator that it takes.",
            )


def refuse_moved(transform: Seeded | Augment, images: NDArray[Any], targets: NDArray[Any] | None) -> None:
    """Refuse a transform of this file that moves the pixels of images whose targets are masks, such as (N, H, W).

    Functions of the user cannot be judged.

    Raises:
        UsageError: the transform contains `Flip` or `Crop`, and the targets have the height and width of the images.
    """
    if isinstance(transform, Chain):
        for stage in transform.stages:
            refuse_moved(stage, images, targets)
    elif targets is None or images.ndim != IMAGE_AXES or not getattr(transform, "moves_pixels", False):
        return
    elif images.shape[2:] in (targets.shape[1:3], targets.shape[-2:]):
        raise UsageError(
            f"The transform {name_of(type(transform))} moves the pixels of the images {images.shape}, but not those of "
            f"the targets {targets.shape}.",
            "Masks must move with their images, and `augment` changes only the inputs.",
            "Augment images and masks together in the dataset of a DataLoader, or use Erase, Jitter or Noise.",
        )


def check_call(function: Any, name: str, argument: str, fix: str) -> None:
    """Refuse a function that cannot be called with an argument and a generator.

    Args:
        function: function of two arguments, the second a generator.
        name: name of the function in the error.
        argument: description of the first argument.
        fix: how the function should be written.

    Raises:
        UsageError: the function cannot be called with two arguments.
    """
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise UsageError(
            f"{name} cannot be called with {argument} and a generator: {error}.",
            "Only random numbers of the generator can be reproduced.",
            fix,
        ) from error
    except ValueError:
        return  # built-in functions without a signature are checked when they are called


def _check_images(name: str, batch: NDArray[Any]) -> None:
    if batch.ndim != IMAGE_AXES:
        raise ShapeError(
            f"{name} takes images, (N, C, H, W); the batch has shape {batch.shape}.",
            fix="Give images, or use another transform.",
        )
