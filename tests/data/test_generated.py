"""Generated inputs depend on seed, epoch and batch alone; functions that are not reproducible are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from data_sets import normal
from kirsch.data.generated import GeneratedData
from kirsch.errors import DataError, UsageError

D = 6


def bits(batches):
    return [np.asarray(batch.inputs).tobytes() for batch in batches]


def test_a_batch_follows_from_seed_epoch_and_its_number():
    data = GeneratedData(normal, samples=9, batch_size=4)
    found = list(data.epoch(3, 1))
    assert [len(batch) for batch in found] == [4, 5]  # batch normalization needs two samples
    assert len(data) == 2
    wanted = np.random.default_rng([3, 1, 1]).standard_normal((5, D))
    np.testing.assert_array_equal(found[1].inputs, wanted)
    assert found[1].targets is None
    assert bits(data.epoch(3, 1, 1)) == bits(found[1:])
    assert len({*bits(data.epoch(3, 0)), *bits(data.epoch(3, 1)), *bits(data.epoch(4, 1))}) == 6


def test_epochs_repeat_after_the_number_of_views_and_the_seed_of_the_data_takes_precedence():
    data = GeneratedData(normal, 8, batch_size=4, views=2, seed=5)
    assert bits(data.epoch(0, 0)) == bits(data.epoch(1, 2)) == bits(GeneratedData(normal, 8, batch_size=4).epoch(5, 0))
    assert bits(data.epoch(0, 1)) != bits(data.epoch(0, 0))


@pytest.mark.parametrize(
    ("generate", "options", "sentence"),
    [
        (lambda count: np.ones((count, D)), {}, r"a callable that takes 2 arguments.*generate\(count"),
        (lambda count, _generator: torch.randn(count, D), {}, "returns different inputs for the same seed"),
        (
            nn.Linear(2, D),
            {},
            r"is the model \S+Linear; expected a function .* Give kirsch\.ModelGenerator\(model, noise",
        ),
        (normal, {"samples": 0}, "`samples` .* is 0. Give a whole number of at least 1"),
        (normal, {"batch_size": 0}, "`batch_size` .* is 0; expected a whole number of at least 1"),
        (normal, {"views": 0}, "`views` .* is 0; expected a whole number of at least 1"),
        (normal, {"seed": -1}, "`seed` .* is -1; expected a whole number"),
    ],
)
def test_an_invalid_function_or_option_is_refused(generate, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        GeneratedData(generate, **{"samples": 8, **options})


def test_a_generator_that_returns_a_wrong_number_of_samples_is_refused():
    with pytest.raises(DataError, match="returns 3 samples; expected 2"):
        GeneratedData(lambda count, generator: generator.standard_normal((count + 1, D)), 8)


def test_generated_data_is_a_public_name():
    assert kirsch.GeneratedData is GeneratedData
