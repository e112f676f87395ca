"""The result of a resumed run is bit-identical to that of an uninterrupted run."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from kirsch.data.batches import ArrayData
from kirsch.errors import CheckpointError, Interrupted, UsageError
from kirsch.frameworks.pytorch.training.train import train
from kirsch.frameworks.training import Training, TrainingHooks, TrainingState
from training_runs import (
    D,
    K,
    Loss,
    ShuffledBatches,
    Unsized,
    assert_same_bits,
    batches,
    cross_entropy,
    network,
    pairs,
    samples,
    trained,
)


class Noisy(TensorDataset):
    """A dataset with augmentation from PyTorch's global generator, as in torchvision."""

    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(inputs.shape), targets


def noisy(batch, random):
    return batch + 0.1 * random.standard_normal(batch.shape).astype(np.float32)


def loader(kind):
    """Return new data of the given kind, as in a new process."""
    dataset = TensorDataset(*map(torch.from_numpy, samples()))
    augmented = Noisy(*map(torch.from_numpy, samples()))
    generator = torch.Generator().manual_seed(5)
    return {
        "arrays": lambda: ArrayData(*samples(), batch_size=4, augment=noisy),
        "list": lambda: pairs(),
        "iterable": ShuffledBatches,
        "in order": lambda: DataLoader(dataset, 4),
        "shuffled": lambda: DataLoader(dataset, 4, shuffle=True),
        "shuffled, augmented": lambda: DataLoader(augmented, 4, shuffle=True, drop_last=True),
        "own generator": lambda: DataLoader(dataset, 4, shuffle=True, generator=generator),
        "generator of the sampler": lambda: DataLoader(dataset, 4, sampler=RandomSampler(dataset, generator=generator)),
        "batch sampler": lambda: DataLoader(
            dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=generator), 4, drop_last=False)
        ),
        "no length": lambda: DataLoader(Unsized(), 4),
    }[kind]()


def interrupted_after_each_batch(data, training):
    """Stop and resume a run after each batch and epoch, as in new processes. Return the result and the states."""
    states = []
    while not states or states[-1].values["epoch"] < training.epochs:
        assert len(states) < 12, "the run makes no progress"
        model, resume = network(), states[-1] if states else None
        if resume:
            model[0].weight.data.zero_()  # must be overwritten with the weights of the state

        def save(state):
            states.append(TrainingState(state.arrays, json.loads(json.dumps(state.values))))

        hooks = TrainingHooks(stop=lambda: Interrupted("enough"), save=save, resume=resume)
        with torch.random.fork_rng():
            torch.manual_seed(len(states))  # another random state in each process
            with pytest.raises(Interrupted):
                train(model, loader(data), Loss(cross_entropy), training, hooks)
    return train(network(), loader(data), Loss(cross_entropy), training, TrainingHooks(resume=states[-1])), states


LOADERS = ["in order", "shuffled", "own generator", "generator of the sampler", "batch sampler"]


@pytest.mark.parametrize(
    ("data", "optimizer"),
    [
        *itertools.product(["arrays", "shuffled, augmented"], ["sgd", "adamw"]),
        *itertools.product(["list", "iterable", *LOADERS], ["sgd"]),
        ("no length", "adamw"),
    ],
)
def test_a_run_that_is_resumed_after_each_batch_is_bit_identical_to_an_uninterrupted_run(data, optimizer):
    schedule = "constant" if data == "no length" else "cosine"
    training = Training(epochs=2, learning_rate=0.02, optimizer=optimizer, schedule=schedule)
    uninterrupted = train(network(), loader(data), Loss(cross_entropy), training, TrainingHooks())
    resumed, states = interrupted_after_each_batch(data, training)
    steps = 3 if data == "shuffled, augmented" else 4
    times = [(state.values["epoch"], state.values["batch"]) for state in states]
    assert times == [(e, b) for e in range(2) for b in range(steps + 1) if e or b] + [(2, 0)]
    assert_same_bits(uninterrupted.model, resumed.model)
    assert without_seconds(resumed.history) == without_seconds(uninterrupted.history)
    assert resumed.first_batch == uninterrupted.first_batch


def without_seconds(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_in_bfloat16_is_bit_identical_to_an_uninterrupted_run(optimizer):
    """numpy has no bfloat16, so weights and moments are stored as int16."""
    inputs, targets = (torch.from_numpy(part) for part in samples())
    data = [(inputs[part].bfloat16(), targets[part]) for part in (slice(0, 7), slice(7, 14))]
    training = Training(epochs=2, learning_rate=0.02, optimizer=optimizer)
    states = []
    uninterrupted = trained(data, model=network(torch.bfloat16), training=training, save=states.append)
    resumed = trained(data, model=network(torch.bfloat16), training=training, resume=states[0])
    assert_same_bits(uninterrupted.model, resumed.model)


def test_the_order_of_samples_differs_between_epochs_and_seeds():
    seen = []

    def recording(model, inputs, targets):
        seen.append(tuple(targets.tolist()))
        return cross_entropy(model, inputs, targets)

    for seed in (0, 1):
        trained(loader("shuffled"), training=Training(epochs=2, seed=seed), loss=recording)
    epochs = [tuple(seen[start : start + 4]) for start in range(0, 16, 4)]
    assert len(set(epochs)) == 4
    assert all(sorted(sum(epoch, ())) == sorted(samples()[1].tolist()) for epoch in epochs)


def test_a_run_depends_on_its_seed_and_not_on_the_random_state_of_the_process():
    def run(seed, state):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            return trained(training=Training(epochs=1, learning_rate=0.1, seed=seed)).model

    assert_same_bits(run(3, 0), run(3, 1))
    assert not torch.equal(run(3, 0)[0].weight, run(4, 0)[0].weight)


def test_dropout_masks_differ_between_batches():
    masks = []

    def recording(model, inputs, targets):
        masks.append(tuple((model[3](torch.ones(64)) == 0).tolist()))
        return cross_entropy(model, inputs, targets)

    trained(loss=recording, training=Training(epochs=2))
    assert len(set(masks)) == len(masks) == 8


def test_a_saved_state_is_not_changed_by_further_training():
    states, copies = [], []

    def save(state):
        states.append(state)
        copies.append(copy.deepcopy(state))

    trained(save=save)
    for state, expected in zip(states, copies, strict=True):
        assert state.values == expected.values
        assert all(np.array_equal(state.arrays[name], array) for name, array in expected.arrays.items())
    assert [len(state.values["history"]) for state in states] == [1, 2, 3]


def test_resuming_with_another_model_raises_an_error():
    states = []
    trained(save=states.append)
    other = nn.Sequential(nn.Linear(D, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, K))
    for model in (other, nn.Linear(D, K)):
        with pytest.raises(CheckpointError, match=r"The checkpoint is of another model\. Start the run again"):
            trained(model=model, resume=states[0])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"optimizer": "adamw"}, "optimizer is 'adamw', and was 'sgd'"),
        ({"ema_decay": 0.9}, "ema_decay is 0.9, and was None"),
        ({"seed": 4, "learning_rate": 0.5}, "learning_rate is 0.5, and was 0.1; seed is 4, and was 0"),
        (
            {"schedule": "multistep", "milestones": (0.2,)},
            r"schedule is 'multistep', and was 'cosine'; milestones is \[0\.2\], and was \[0\.5, 0\.75\]",
        ),
        ({"epochs": 5}, "epochs is 5, and was 3"),
    ],
)
def test_resuming_with_other_settings_raises_an_error(changed, sentence):
    states, settings = [], {"epochs": 3, "learning_rate": 0.1}
    trained(training=Training(**settings), save=states.append)
    state = TrainingState(states[0].arrays, json.loads(json.dumps(states[0].values)))
    sentence = rf"The run was started with other settings: {sentence}\. .* the learning rate depend"
    with pytest.raises(CheckpointError, match=sentence):
        trained(training=Training(**settings | changed), resume=state)


def test_resuming_with_another_number_of_batches_raises_an_error():
    states = []
    trained(save=states.append)
    with pytest.raises(CheckpointError, match=r"other settings: batches of an epoch is 2, and was 4\."):
        trained(batches(7), resume=states[0])


def test_a_stop_saves_one_state_and_raises_the_error_of_the_hook():
    states, error = [], Interrupted("enough")
    with pytest.raises(Interrupted, match="enough") as caught:
        trained(stop=lambda: error, save=states.append)
    assert caught.value is error
    assert [(state.values["epoch"], state.values["batch"]) for state in states] == [(0, 1)]


@pytest.mark.parametrize("value", [True, False, "enough"])
def test_a_stop_that_returns_no_error_is_refused(value):
    with pytest.raises(UsageError, match=r"`stop` of kirsch\.TrainingHooks returned .*; expected an error or None"):
        trained(stop=lambda: value)


def test_a_stop_after_an_epoch_does_not_save_its_state_again():
    states, hooks = [], {}
    hooks["stop"] = lambda: Interrupted("enough") if states else None
    with pytest.raises(Interrupted):
        trained(save=states.append, **hooks)
    assert [(state.values["epoch"], state.values["batch"]) for state in states] == [(1, 0)]
