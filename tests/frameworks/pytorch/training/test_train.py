"""The training loop: data, validation, shares of the loss terms, precision."""

from __future__ import annotations

import contextlib

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kirsch.data.batches import ArrayData
from kirsch.errors import DataError, KirschError, NumericError, UsageError
from kirsch.frameworks.training import Training
from training_runs import (
    ShuffledBatches,
    Unsized,
    assert_same_bits,
    cross_entropy,
    network,
    pairs,
    samples,
    trained,
)


class UnsizedBatches:
    def __iter__(self):
        return iter(ShuffledBatches())


UNSIZED = pytest.mark.parametrize("data", [DataLoader(Unsized(), 4), UnsizedBatches()], ids=["loader", "iterable"])


@UNSIZED
@pytest.mark.parametrize("options", [{}, {"schedule": "multistep"}, {"schedule": "constant", "warmup_epochs": 1}])
def test_the_batches_of_data_without_a_length_are_counted_for_a_schedule_that_needs_their_number(data, options):
    class Sized:
        def __len__(self):
            return sum(1 for _ in data)

        def __iter__(self):
            return iter(data)

    training, rates = Training(epochs=2, **options), []

    def run(batches):
        lengths = []
        found = trained(batches, training=training, batch=lambda *step: lengths.append(step[-1]))
        rates.append([record["learning_rate"] for record in found.history])
        assert set(lengths) == {sum(1 for _ in data)}
        return found.model

    assert_same_bits(run(data), run(Sized()))
    assert rates[0] == rates[1]


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
def test_a_caller_may_have_disabled_gradients(disabled):
    expected = trained().model
    with disabled():
        found = trained().model
        assert not torch.is_grad_enabled()
    assert_same_bits(found, expected)
    assert not any(parameter.is_inference() for parameter in found.parameters())


@UNSIZED
def test_data_without_a_length_is_trained_on_at_a_constant_learning_rate(data):
    found = trained(data, training=Training(epochs=2, learning_rate=0.1, schedule="constant"))
    assert [record["learning_rate"] for record in found.history] == [0.1, 0.1]
    assert not torch.equal(found.model[0].weight, network()[0].weight)


def test_data_that_is_empty_in_the_second_epoch_raises_an_error():
    class Once:
        def __init__(self):
            self.rest = iter(pairs())

        def __len__(self):
            return 4

        def __iter__(self):
            return self.rest

    with pytest.raises(DataError, match=r"An epoch had no batches\. Give data that can be iterated over more"):
        trained(Once(), training=Training(epochs=2))


def test_array_data_adds_a_single_last_sample_to_the_previous_batch():
    """Batch normalization cannot train on one sample; 13 = 4 + 4 + 5."""
    inputs, targets = samples()
    found = trained(ArrayData(inputs[:13], targets[:13], batch_size=4), training=Training(epochs=1))
    assert int(found.model[1].num_batches_tracked) == 3


def test_loss_terms_may_be_named_loss_and_samples():
    def loss(model, inputs, targets):
        half = cross_entropy(model, inputs, targets)[0] / 2
        return half + half, {"loss": half, "samples": half}

    (record,) = trained(loss=loss, training=Training(epochs=1, learning_rate=0.1)).history
    assert record["terms"] == pytest.approx({"loss": record["loss"] / 2, "samples": record["loss"] / 2})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_close_hook_is_called_once_also_if_the_model_cannot_be_trained(device):
    closed = []
    with pytest.raises(KirschError) if device == "meta" else contextlib.nullcontext():
        trained(model=network().to(device), close=lambda: closed.append(True))
    assert closed == [True]


def test_a_validation_metric_with_the_name_of_a_record_entry_raises_an_error():
    with pytest.raises(UsageError, match=r"`validate` returns 'loss', a name that the record of an epoch already has"):
        trained(validate=lambda model: {"accuracy": 1.0, "loss": 0.0})


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        (1.0, "1.0"),
        (None, "None"),
        ({"f1": "high"}, "a dict whose entry 'f1' is 'high'"),
        ({"f1": torch.ones(1)}, "a dict whose entry 'f1' is a torch.Tensor of shape"),
    ],
)
def test_a_validation_that_returns_no_dict_of_numbers_is_refused(metrics, found):
    with pytest.raises(UsageError, match=f"The validation returned {found}.*; expected a dict of numbers by name"):
        trained(validate=lambda _model: metrics)


def test_validation_runs_in_inference_mode_after_each_epoch_and_does_not_change_the_training():
    modes, training_modes = [], []

    def validate(model):
        modes.append([module.training for module in model.modules()])
        torch.manual_seed(0)  # a validation may draw random numbers
        return {"accuracy": len(modes) / 10}

    def recording(model, inputs, targets):
        training_modes.append(all(module.training for module in model.modules()))
        return cross_entropy(model, inputs, targets)

    found = trained(loss=recording, validate=validate, model=network().eval())
    assert [any(each) for each in modes] == [False] * 3
    assert all(training_modes)
    assert [record["accuracy"] for record in found.history] == [0.1, 0.2, 0.3]
    assert_same_bits(found.model, trained().model)


def test_the_shares_of_the_terms_in_the_first_batch_equal_their_closed_form():
    """Gradients of norm 3 and 4 have shares 3/7 and 4/7; values of 3·2 and 4·1 have shares 0.6 and 0.4."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[2.0, 1.0]]))

    def loss(model, inputs, targets):
        parts = {"first": 3 * model.weight[0, 0], "second": 4 * model.weight[0, 1]}
        return parts["first"] + parts["second"], parts

    found = trained(model=model, loss=loss, training=Training(epochs=1)).first_batch
    assert found["loss_shares"] == pytest.approx({"first": 0.6, "second": 0.4})
    assert found["gradient_shares"] == pytest.approx({"first": 3 / 7, "second": 4 / 7})


def test_a_term_without_gradient_gives_a_warning_if_its_value_is_zero_and_else_raises_an_error():
    def loss(value):
        def with_flat_term(model, inputs, targets):
            label, flat = F.cross_entropy(model(inputs), targets), (model[0].weight * 0).sum() + value
            return label + flat, {"label": label, "flat": flat}

        return with_flat_term

    with pytest.warns(UserWarning, match="The term 'flat' is 0 on the first batch, and has no gradient") as warnings:
        assert trained(loss=loss(0.0)).first_batch["gradient_shares"]["flat"] == 0
    assert len(warnings) == 1  # and not one for each epoch
    sentence = r"No gradient of the loss term 'flat' reaches the model\. Its value .* is 0\.5"
    with pytest.raises(NumericError, match=sentence):
        trained(loss=loss(0.5))


def test_a_term_of_value_zero_that_does_not_depend_on_the_model_raises_an_error():
    def loss(model, inputs, targets):
        label, other = F.cross_entropy(model(inputs), targets), torch.zeros((), requires_grad=True)
        return label + other, {"label": label, "other": other}

    with pytest.raises(NumericError, match="No gradient of the loss term 'other' reaches the model"):
        trained(loss=loss)


def test_runs_in_one_process_may_have_different_precisions():
    """Accelerate has one precision for the process; the caller's precision is restored after a run."""
    AcceleratorState._reset_state()  # an earlier test may have set a precision
    accelerator = Accelerator(mixed_precision="bf16")
    models = [trained(training=Training(epochs=1, precision=precision)).model for precision in ("fp32", "bf16", "fp32")]
    assert accelerator.mixed_precision == "bf16"
    AcceleratorState._reset_state()
    full, half, again = ([p.detach() for p in model.parameters()] for model in models)
    assert all(map(torch.equal, full, again))
    assert not all(map(torch.equal, full, half))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_without_a_gpu_raises_an_error():
    sentence = r"precision is 'fp16', which this machine cannot train in\. .*fp16.* Use \"bf16\" or \"fp32\""
    with pytest.raises(UsageError, match=sentence):
        trained(training=Training(epochs=1, precision="fp16"))
