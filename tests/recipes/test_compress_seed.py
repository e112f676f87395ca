"""The seed of `kirsch.compress` is the seed of each training that has no seed of its own."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import kirsch


class RecipeFoundError(Exception):
    """Contains the recipe that `kirsch.compress` would run."""


@pytest.mark.parametrize(("training", "seed"), [({}, None), ({"seed": 0}, 0), ({"seed": 7}, 7)])
def test_a_seed_given_to_a_training_is_kept_also_if_it_is_0(monkeypatch, tmp_path, training, seed):
    def run(recipe, *_args, **_options):
        raise RecipeFoundError(recipe)

    monkeypatch.setattr("kirsch.recipes.compress.run", run)
    split = kirsch.Split(np.zeros((2, 3), np.float32), np.arange(2))
    data = kirsch.DataSet("toy", split, split, split, classes=("a", "b"))
    with pytest.raises(RecipeFoundError) as caught:
        kirsch.compress(
            nn.Linear(3, 2), data, kirsch.Goal(macs=0.5), seed=5, recover=kirsch.Training(**training), folder=tmp_path
        )
    (recipe,) = caught.value.args
    assert recipe.all_steps["recover"].seed == seed
