"""Augmentation depends on one seed per sample, and not on the batch."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.data import augment
from kirsch.data.augment import Chain, Crop, Erase, Flip, Jitter, Noise, derive_seeds, sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.errors import ShapeError, UsageError

IMAGES = np.random.default_rng(0).standard_normal((12, 3, 7, 6)).astype(np.float32)


def louder(batch, random):
    return batch * random.uniform(0.5, 2, (len(batch), 1, 1, 1)).astype(batch.dtype)


TRANSFORMS = [
    Crop(2),
    Flip(),
    Erase(3, 0.7),
    Jitter(0.3, 0.4),
    Noise(0.5),
    Chain(Crop(1), Flip(), Erase(2), Jitter(), Noise()),
    Chain(louder, Flip()),
    louder,
]
names = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: getattr(t, "__name__", type(t).__name__))


def seeds(count=12, seed=0, view=0):
    return sample_seeds(seed, view, np.arange(count))


@pytest.fixture
def set_draws(monkeypatch):
    """Return a function that replaces the random numbers of `uniform` or `integers`: one given list for each draw."""

    def replace(**draws):
        for name, rows in draws.items():
            monkeypatch.setattr(augment, name, lambda _seeds, draw=0, *_below, rows=rows: np.array(rows[draw]))

    return replace


# ------------------------------------------------------------------------------------------------ seeds


def test_golden_mix_is_splitmix64():
    """The first three outputs from state 0, as published with the reference code of Vigna."""
    states = augment.STEP * np.arange(1, 4, dtype=np.uint64)
    assert [hex(word) for word in augment.mix(states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_golden_sample_seeds_do_not_change():
    """Stores on disk use these seeds as keys, so a change of the seeds would invalidate existing stores."""
    assert [hex(seed) for seed in sample_seeds(0, 0, np.arange(3))] == [
        "0x9ababb68568302b9",
        "0x82a669cabc948e24",
        "0xac4f6bfabd81a050",
    ]
    assert [hex(seed) for seed in sample_seeds(7, 2, np.array([0, 1, 2**40, -1]))] == [
        "0x5ef9170a809bc7cc",
        "0xaedbce945cea7373",
        "0x45d5700b5d537aa9",
        "0x6e76785f5282c675",
    ]


def test_sample_seeds_equal_the_documented_formula():
    def mix(word):
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    step = 0x9E3779B97F4A7C15
    seed, view, number = 11, 5, 123_456
    key = mix((mix((seed + step) % 2**64) + view + step) % 2**64)
    expected = mix((key + mix((number + step) % 2**64) + step) % 2**64)
    assert int(sample_seeds(seed, view, np.array([number]))[0]) == expected


def test_samples_views_and_runs_have_different_seeds():
    found = np.concatenate([sample_seeds(s, v, np.arange(2000)) for s in range(4) for v in range(4)])
    assert len(np.unique(found)) == 32_000


@given(st.integers(0, 2**70), st.integers(0, 2**33), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_sample_seed_does_not_depend_on_the_other_ids(seed, view, ids):
    together = sample_seeds(seed, view, np.array(ids))
    assert together.tolist() == [sample_seeds(seed, view, np.array([sample]))[0] for sample in ids]


def test_draws_are_uniform_and_uncorrelated():
    """Each tenth of the range has 10 % of 100,000 draws, within 5 deviations of sqrt(0.1 x 0.9 / 100,000) = 0.00095."""
    for draw in range(3):
        values = augment.uniform(seeds(100_000), draw)
        assert (values >= 0).all()
        assert (values < 1).all()
        assert np.abs(np.histogram(values, 10, (0, 1))[0] / 100_000 - 0.1).max() < 0.0048
    first, second = augment.uniform(seeds(100_000), 0), augment.uniform(seeds(100_000), 1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.016  # five times 1 / sqrt(100,000)
    assert np.unique(augment.integers(seeds(1000), 0, 9)).tolist() == list(range(9))


# ------------------------------------------------------------------------------------------------ transforms


def test_crop_shifts_with_zero_padding(set_draws):
    image = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
    set_draws(integers=[[4, 5, 3, 8], [4, 4, 6, 4]])
    found = Crop(4)(np.repeat(image, 4, axis=0), seeds(4))
    assert found[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]  # offset equal to the padding: no shift
    assert found[1, 0].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]  # one up
    assert found[2, 0].tolist() == [[0, 0, 0], [3, 0, 0], [6, 0, 0]]  # one down, two to the left
    assert found[3, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0]]  # four down: outside of the image


def test_flip_mirrors_where_the_draw_is_below_the_probability(set_draws):
    set_draws(uniform=[[0.29, 0.3, 0.9]])
    found = Flip(0.3)(IMAGES[:3], seeds(3))
    np.testing.assert_array_equal(found[0], IMAGES[0, :, :, ::-1])
    np.testing.assert_array_equal(found[1:], IMAGES[1:3])


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (1, ["11111", "11111", "11011", "11111"]),
        (2, ["11111", "10011", "10011", "11111"]),
        (3, ["11111", "10001", "10001", "10001"]),
    ],
)
def test_erase_zeros_a_square_around_the_drawn_center(set_draws, size, rows):
    set_draws(integers=[[2], [2]], uniform=[None, None, [0.5]])
    found = Erase(size)(np.ones((1, 2, 4, 5), np.float32), seeds(1))
    for color in found[0]:
        assert ["".join(str(int(v)) for v in row) for row in color] == rows


def test_erase_clips_the_square_at_the_border_and_respects_its_probability(set_draws):
    set_draws(integers=[[0, 0], [5, 5]], uniform=[None, None, [0.4, 0.6]])
    found = Erase(3, probability=0.5)(IMAGES[:2] + 10, seeds(2))
    assert (found[0] == 0).sum() == 3 * 2 * 2
    assert (found[0, :, :2, 4:] == 0).all()
    np.testing.assert_array_equal(found[1], IMAGES[1] + 10)


def test_jitter_scales_around_the_mean_and_adds_brightness(set_draws):
    set_draws(uniform=[[1.0], [0.0]])  # brightness + 0.5, contrast 1 - 0.25
    image = np.array([1.0, 2.0, 3.0, 6.0]).reshape(1, 1, 2, 2)  # the mean is 3
    found = Jitter(0.5, 0.25)(image, seeds(1))
    assert found.ravel().tolist() == [3 - 1.5 + 0.5, 3 - 0.75 + 0.5, 3.5, 3 + 2.25 + 0.5]


def test_noise_has_its_standard_deviation_and_is_uncorrelated_between_samples():
    found = Noise(0.5)(np.zeros((200, 3, 8, 8)), seeds(200))
    assert abs(found.mean()) < 5 * 0.5 / np.sqrt(found.size)
    assert found.std() == pytest.approx(0.5, rel=5 / np.sqrt(2 * found.size))
    assert abs(np.corrcoef(found.reshape(200, -1))[np.triu_indices(200, 1)]).max() < 6 / np.sqrt(192)
    # The noise is a sum of 12 uniform numbers, with the excess kurtosis -1.2 / 12.
    assert (found**4).mean() / 0.5**4 == pytest.approx(3 - 0.1, abs=0.1)


def test_stages_of_a_chain_draw_independently():
    once = Chain(Flip())(IMAGES, seeds())
    np.testing.assert_array_equal(once, Flip()(IMAGES, derive_seeds(seeds(), 0)))
    np.testing.assert_array_equal(Chain(Flip(), Flip())(IMAGES, seeds()), Flip()(once, derive_seeds(seeds(), 1)))
    twice = Chain(Flip(), Flip())(np.repeat(IMAGES[:1], 400, 0), seeds(400))
    same = (twice == IMAGES[0]).all((1, 2, 3)).mean()
    assert 0.375 < same < 0.625  # 0.5 within five standard deviations; equal draws would give 1


# ------------------------------------------------------------------------------------------------ properties


@names
@given(picked=st.lists(st.integers(0, 11), min_size=1, max_size=12), view=st.integers(0, 3))
def test_augmentation_of_a_sample_does_not_depend_on_the_batch(transform, picked, view):
    expected = augment.apply(transform, IMAGES, seeds(view=view))[picked]
    np.testing.assert_array_equal(augment.apply(transform, IMAGES[picked], seeds(view=view)[picked]), expected)


@pytest.mark.parametrize("size", [1, 2, 5, 64, 700])
def test_jitter_mean_does_not_depend_on_batch_size_or_layout(size):
    images = np.random.default_rng(1).standard_normal((size, 3, 33, 31)).astype(np.float32)
    images[-1] = np.random.default_rng(2).standard_normal((3, 33, 31))
    alone = Jitter()(images[-1:], seeds(size)[-1:])
    np.testing.assert_array_equal(Jitter()(images, seeds(size))[-1:], alone)
    across = np.asfortranarray(images)
    np.testing.assert_array_equal(Jitter()(across, seeds(size))[-1:], alone)


@names
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_shape_and_dtype_are_kept_and_the_input_is_not_changed(transform, dtype):
    images = IMAGES.astype(dtype)
    kept = images.copy()
    found = augment.apply(transform, images, seeds())
    assert (found.shape, found.dtype) == (images.shape, dtype)
    np.testing.assert_array_equal(images, kept)
    assert (found != images).any()


@names
def test_views_and_runs_have_different_augmentations(transform):
    found = [augment.apply(transform, IMAGES, seeds(seed=s, view=v)) for s in range(2) for v in range(2)]
    assert len({images.tobytes() for images in found}) == 4


@names
def test_augmentation_is_bitwise_equal_in_another_process(transform):
    if transform is louder or louder in getattr(transform, "stages", ()):
        pytest.skip("a function of this file cannot be imported in the other process")
    program = (
        "import numpy as np, hashlib; from kirsch.data.augment import *; "
        "images = np.random.default_rng(0).standard_normal((12, 3, 7, 6)).astype(np.float32); "
        f"print(hashlib.sha256({transform!r}(images, sample_seeds(0, 0, np.arange(12)))).hexdigest())"
    ).replace("stages=(", "*(")
    environment = {**os.environ, "PYTHONPATH": str(Path(augment.__file__).parents[2])}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(transform(IMAGES, seeds())).hexdigest()


def test_none_returns_the_batch_itself():
    assert augment.apply(None, IMAGES, seeds()) is IMAGES
    assert augment.apply(louder, IMAGES[:0], seeds(0)).shape == (0, 3, 7, 6)


# ------------------------------------------------------------------------------------------------ functions of the user


def test_user_function_takes_a_generator_made_from_the_sample_seed():
    found = augment.apply(louder, IMAGES, seeds())
    for image, after, seed in zip(IMAGES, found, seeds().tolist(), strict=True):
        factor = np.random.Generator(np.random.Philox(key=seed)).uniform(0.5, 2)
        np.testing.assert_array_equal(after, image * np.float32(factor))


def test_user_function_may_write_to_its_argument():
    kept = IMAGES.copy()
    assert not augment.apply(lambda batch, _: np.multiply(batch, 0, out=batch), IMAGES, seeds()).any()
    np.testing.assert_array_equal(IMAGES, kept)


class AddNoise:
    """Augmentation as a callable object."""

    def __init__(self, width):
        self.width = width

    def __call__(self, batch, random):
        return batch + self.width * random.standard_normal(batch.shape).astype(batch.dtype)


@names
def test_deterministic_transform_passes_the_check(transform):
    augment.check(transform, IMAGES[:1])


@pytest.mark.parametrize("transform", [AddNoise(2), functools.partial(louder), AddNoise(1).__call__, None])
def test_objects_partials_methods_and_none_pass_the_check(transform):
    augment.check(transform, IMAGES[:1])


@pytest.mark.parametrize("transform", [lambda batch: batch, lambda batch, random, *, strength: batch, lambda: None])
def test_transform_without_generator_argument_is_refused(transform):
    with pytest.raises(UsageError, match=r"cannot be called with a batch and a generator.*transform\(batch, generator"):
        augment.check(transform, IMAGES[:1])
    with pytest.raises(UsageError, match=r"`stages\[1\]` .* is the function fliplr; .*transform\(batch, generator"):
        Chain(Flip(), np.fliplr)


def test_transform_with_another_random_source_is_refused():
    elsewhere = np.random.default_rng(3)

    def flipped(batch, random):
        return batch[..., ::-1] if elsewhere.random() < 0.5 else batch

    for transform in (flipped, Chain(Crop(1), flipped)):
        with pytest.raises(UsageError, match=r"flipped returns different samples for the same seed.*another source"):
            augment.check(transform, IMAGES[:1])


def rarely_random(draw, share):
    def changed(batch, random):
        return batch + draw() if random.random() < share else batch

    return changed


@pytest.mark.parametrize("draw", [np.random.normal, random.random])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_transform_that_rarely_uses_another_random_source_is_refused(draw, share):
    """The seed decides whether the other source is used. The check must therefore try several seeds."""
    with pytest.raises(UsageError, match="draws random numbers from another source"):
        ArrayData(IMAGES, None, augment=rarely_random(draw, share))


def test_transform_with_another_random_source_for_some_samples_is_refused():
    def dark(batch, _random):
        return batch + random.gauss() if batch.mean() < 0 else batch

    below, above = (np.full((1, 3, 4, 4), value, np.float32) for value in (-1, 1))
    with pytest.raises(UsageError, match="draws random numbers from another source"):
        ArrayData(np.concatenate([above, above, below]), None, augment=dark)


def test_transform_that_remembers_the_previous_sample_is_refused():
    before = [np.zeros_like(IMAGES[:1])]

    def mixed(batch, _random):
        found = batch + before[0]
        before[0] = batch
        return found

    with pytest.raises(UsageError, match="or keeps a state"):
        ArrayData(IMAGES, None, augment=mixed)


@pytest.mark.parametrize(
    ("transform", "kind"),
    [
        (lambda batch, random: batch[..., 1:], r"an array of shape \(1, 3, 7, 5\)"),
        (lambda *arguments: arguments, "a tuple"),  # torchvision transforms pass arguments of other types through
        (lambda batch, random: None, "a NoneType"),
    ],
)
def test_transform_that_does_not_return_a_sample_is_refused(transform, kind):
    with pytest.raises(UsageError, match=rf"returns {kind} for a sample of shape \(1, 3, 7, 6\)"):
        augment.check(transform, IMAGES[:1])


@pytest.mark.parametrize("transform", [Crop(), Flip(), Erase(), Jitter()])
def test_image_transforms_refuse_other_shapes(transform):
    with pytest.raises(ShapeError, match=r"takes images, \(N, C, H, W\); the batch has shape \(4, 9\)"):
        transform(np.zeros((4, 9)), seeds(4))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Crop(-1), r"`padding` of .*Crop is -1; expected a"),
        (lambda: Crop(1.5), r"`padding` of .*Crop is 1.5; expected a"),
        (lambda: Flip(1.1), r"`probability` of .*Flip is 1.1; expected a"),
        (lambda: Flip(float("nan")), r"`probability` of .*Flip is nan; expected a"),
        (lambda: Erase(0), r"`size` of .*Erase is 0; expected a"),
        (lambda: Erase(2, -0.1), r"`probability` of .*Erase is -0.1; expected a"),
        (lambda: Jitter(-1), r"`brightness` of .*Jitter is -1; expected a"),
        (lambda: Jitter(0, 2), r"`contrast` of .*Jitter is 2; expected a"),
        (lambda: Noise(float("inf")), r"`scale` of .*Noise is inf; expected a"),
    ],
)
def test_setting_out_of_range_is_named(make, sentence):
    with pytest.raises(UsageError, match=sentence):
        make()


MASKS = [np.zeros((4, 7, 6), np.int64), np.zeros((4, 2, 7, 6), np.float32), np.zeros((4, 7, 6, 2), np.float32)]


@pytest.mark.parametrize("targets", MASKS, ids=["class numbers", "channels first", "channels last"])
@pytest.mark.parametrize("transform", [Flip(), Crop(2), Chain(Noise(), Chain(Jitter(), Flip()))])
def test_moved_pixels_are_refused_for_masks(transform, targets):
    with pytest.raises(UsageError, match=r"(Flip|Crop) moves the pixels .*\(4, 3, 7, 6\).* DataLoader"):
        ArrayData(IMAGES[:4], targets, augment=transform)


@pytest.mark.parametrize(
    ("transform", "targets"),
    [
        *((transform, MASKS[0]) for transform in (Erase(2), Chain(Jitter(), Noise()), lambda batch, random: batch)),
        *((Flip(), targets) for targets in (None, np.zeros(4, np.int64), np.zeros((4, 7)), np.zeros((4, 6, 7)))),
    ],
)
def test_masks_or_transforms_that_do_not_move_are_accepted(transform, targets):
    assert len(ArrayData(IMAGES[:4], targets, augment=transform)) == 1
