"""A small store, its data and its teacher, for the tests of stores."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from kirsch.data.augment import Chain, Crop, Flip, Noise, apply, sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import TopK, build_store

N, K = 21, 12
AUGMENT = Chain(Crop(1), Flip(), Noise(0.3))
IDS = np.random.default_rng(1).permutation(1000)[:N] - 200


def images(count=N):
    return np.random.default_rng(0).standard_normal((count, 2, 4, 4)).astype(np.float32)


def data(transform=AUGMENT, ids=IDS, **options):
    return ArrayData(images(), None, batch_size=4, augment=transform, ids=ids, **options)


def network(classes=K, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, classes))


def logits_of_view(model, seed, view):
    """Return the logits of the model for one view (augmented version) of all samples, computed without a store."""
    inputs = apply(AUGMENT, images(), sample_seeds(seed, view, IDS))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(inputs)).numpy()


def tiny_store(folder, model=None, inputs=None, **options):
    options = {"keep": TopK(4), "views": 2, "seed": 5, "range_size": 8, "batch_size": 3} | options
    return build_store(folder, network() if model is None else model, data() if inputs is None else inputs, **options)


def versioned(function, version="1"):
    """Return a function with a declared version, as a store requires."""
    function.version = version
    return function
