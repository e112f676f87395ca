"""`kirsch.compress` with data loaders: interrupted runs, the report, and errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.errors import DataError, Interrupted, UsageError
from kirsch.steps import Prune, Recover
from tiny import same_weights

HALF = kirsch.Goal(macs=0.5)


def of_loaders(data):
    """Return the data set with a loader for each part. Training samples are shuffled and scaled by random factors."""

    class RandomlyScaled(TensorDataset):
        def __getitem__(self, index):
            sample, label = super().__getitem__(index)
            return sample * (0.8 + 0.4 * torch.rand(())), label

    def loader(split, kind=TensorDataset, **options):
        return DataLoader(kind(torch.from_numpy(split.inputs), torch.from_numpy(split.labels)), 16, **options)

    train = loader(data.train, RandomlyScaled, shuffle=True)
    return kirsch.DataSet("loaded", train, loader(data.validation), loader(data.test))


def test_an_interrupted_run_on_loaders_equals_the_uninterrupted_run_bit_for_bit(trained, tmp_path):
    model, _, data = trained
    events, steps = [], [Prune(goal=HALF), Recover(epochs=2, learning_rate=0.02)]

    def call(folder, **options):
        return kirsch.compress(model, of_loaders(data), steps=steps, folder=tmp_path / folder, **options)

    def stop(event):
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise Interrupted("asked after the checkpoint of the first epoch")

    uninterrupted = call("uninterrupted", listen=events.append)
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [1, 2]
    assert uninterrupted.metrics["measured"]["data"]["name"] == "loaded"
    assert "48 training, 30 validation, 60 test samples" in uninterrupted.report.read_text()
    with pytest.raises(Interrupted):
        call("interrupted", listen=stop)
    events.clear()
    assert same_weights(call("interrupted", listen=events.append).model, uninterrupted.model)
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [2]


def test_loader_without_a_length_is_named_in_the_report(trained, tmp_path):
    model, _, data = trained
    batches = [(data.train.inputs[start : start + 16], data.train.labels[start : start + 16]) for start in (0, 16, 32)]
    listed = kirsch.DataSet("listed", batches, data.validation, data.test)
    found = kirsch.compress(model, listed, steps=[Prune(goal=HALF), Recover(epochs=1)], folder=tmp_path / "run")
    assert found.metrics["measured"]["data"]["train"] is None
    assert "listed: a loader for training, 30 validation" in found.report.read_text()


def test_batch_size_beside_a_loader_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match=r"`batch_size` .* has no effect: the training part of loaded is a loader\."):
        kirsch.compress(trained[0], of_loaders(trained[2]), HALF, batch_size=16, folder=tmp_path / "run")


def test_loader_that_returns_the_same_iterator_again_is_refused_before_any_work(trained, tmp_path):
    class Once:
        def __init__(self, batches):
            self.batches = iter(batches)

        def __iter__(self):
            return self.batches

    model, _, data = trained
    once = kirsch.DataSet("once", Once([(data.train.inputs, data.train.labels)]), data.validation, data.test)
    with pytest.raises(DataError, match=r"The data can be iterated only once\."):
        kirsch.compress(model, once, HALF, folder=tmp_path / "run")
