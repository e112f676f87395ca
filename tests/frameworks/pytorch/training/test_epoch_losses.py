"""The sums of the losses of an epoch do not depend on how often the losses are read from the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import fit
from kirsch.errors import NumericError
from kirsch.frameworks.pytorch.training import epoch_losses
from kirsch.frameworks.pytorch.training.epoch_losses import TOTAL, EpochLosses, NotFiniteLosses

CPU = torch.device("cpu")
SETTINGS = kirsch.Training(epochs=2, learning_rate=0.1)


def losses(*totals: float) -> EpochLosses:
    """Return the losses of batches with these totals. The term kd is half of the total.

    The weight of a batch is its number, from 1.
    """
    found = EpochLosses(CPU, {})
    for number, total in enumerate(totals, start=1):
        found.add(number, number, {TOTAL: torch.tensor(total), "part.kd": torch.tensor(total / 2)})
    return found


def data(*, bad: int | None = None) -> ArrayData:
    """Return six batches of four samples. The inputs of batch `bad` contain NaN."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((24, 3)).astype(np.float32)
    return _WithBadBatch(inputs, (inputs.sum(1) > 0).astype(np.int64), batch_size=4, bad=bad)


class _WithBadBatch(ArrayData):
    def __init__(self, *args, bad, **options):
        super().__init__(*args, **options)
        object.__setattr__(self, "bad", bad)

    def epoch(self, seed, epoch, start=0):
        for number, batch in enumerate(super().epoch(seed, epoch, start), start + 1):
            if number == self.bad:
                batch.inputs[0, 0] = np.nan
            yield batch


@pytest.mark.parametrize("every", [1, 2, 3, 10])
def test_sums_do_not_depend_on_the_number_of_batches_between_two_reads(monkeypatch, every):
    monkeypatch.setitem(epoch_losses.READ_EVERY, "cpu", every)
    assert losses(0.1, 0.2, 0.4).sums() == pytest.approx({TOTAL: 0.1 + 0.4 + 1.2, "part.kd": 0.85}, rel=1e-7)
    assert EpochLosses(CPU, {TOTAL: 3.0}).sums() == {TOTAL: 3.0}


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_total_that_is_not_finite_is_named(monkeypatch, every, value):
    monkeypatch.setitem(epoch_losses.READ_EVERY, "cpu", every)
    with pytest.raises(NotFiniteLosses) as caught:
        losses(0.1, value, math.nan).sums()
    assert caught.value.batch == 2
    assert not math.isfinite(caught.value.terms["part.kd"])


def test_losses_on_an_accelerator_are_not_read_in_every_step():
    """Reading a value of a meta tensor raises an error."""
    found = EpochLosses(torch.device("meta"), {})
    for number in range(1, epoch_losses.READ_EVERY_ON_ACCELERATORS):
        found.add(number, 1, {TOTAL: torch.empty((), device="meta")})
    with pytest.raises(NotImplementedError, match="meta"):
        found.add(epoch_losses.READ_EVERY_ON_ACCELERATORS, 1, {TOTAL: torch.empty((), device="meta")})


def test_training_has_the_same_history_and_identical_weights_with_fewer_reads(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    often = fit(model, data(), training=SETTINGS)
    monkeypatch.setitem(epoch_losses.READ_EVERY, "cpu", 4)
    rarely = fit(model, data(), training=SETTINGS)
    assert [record["loss"] for record in rarely.history] == [record["loss"] for record in often.history]
    assert torch.equal(rarely.model.weight, often.model.weight)


@pytest.mark.parametrize("every", [1, 4, 50])
def test_a_batch_with_nan_is_named_by_its_number(monkeypatch, every):
    monkeypatch.setitem(epoch_losses.READ_EVERY, "cpu", every)
    with pytest.raises(NumericError, match=r"at epoch 1, batch 3"):
        fit(torch.nn.Linear(3, 2), data(bad=3), training=SETTINGS)
