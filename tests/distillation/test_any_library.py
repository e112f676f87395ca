"""The losses run on arrays that have only operators, with channels last, and in `torch.compile`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bare_arrays
from bare_arrays import BareArray, values_of
from distillation.golden import det
from kirsch import ops
from kirsch.distillation.losses import LABEL_LOSSES, LOSSES
from kirsch.distillation.losses.loss import CHANNEL_KINDS, step_arguments
from kirsch.distillation.losses.top_k import stored_top_k
from kirsch.testing import losses as suite

NOT_COMPILED = {
    "detr": "the matching of queries is computed by scipy, on the host",
}
"""Loss → reason why `torch.compile` cannot trace it."""

LABELS = np.array([1, -100, 4, 0, 6])


@pytest.fixture
def bare(monkeypatch):
    """Return a function that converts numpy arrays to `BareArray`, whose operations are registered for the test."""
    monkeypatch.setattr(ops.IMPLEMENTATIONS, "_objects", dict(ops.IMPLEMENTATIONS._objects))
    ops.IMPLEMENTATIONS.register("bare_arrays")(bare_arrays.OPERATIONS)
    return lambda arrays: ops.map_arrays(BareArray, arrays)


def cases(name):
    """Return (student, teacher, options) of a loss: all options of its conformance suite, without and with a mask."""
    loss = LOSSES[name]
    found = [(*suite.example_values(loss), options) for options in suite.example_options(loss)]
    if "mask" in step_arguments(loss):
        found += [
            (student, teacher, {**options, "mask": suite.example_mask(loss)}) for student, teacher, options in found
        ]
    return found


def channels_last(arrays):
    return ops.map_arrays(lambda array: np.moveaxis(array, 1, -1) if array.ndim > 2 else array, arrays)


def options_as(convert, options):
    return {name: convert(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_runs_on_arrays_without_methods_and_with_channels_last(name, bare):
    loss = LOSSES[name]
    for student, teacher, options in cases(name):
        sides = [channels_last(side) if loss.takes in CHANNEL_KINDS else side for side in (student, teacher)]
        value = values_of(loss(*(bare(side) for side in sides), **options_as(bare, options)))
        assert value == pytest.approx(loss(student, teacher, **options), rel=1e-12)  # another order of summation


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].takes in CHANNEL_KINDS])
def test_losses_of_feature_maps_take_the_axis_of_the_channels_as_an_argument(name):
    for student, teacher, options in cases(name):
        value = LOSSES[name](channels_last(student), channels_last(teacher), axis=-1, **options)
        assert value == pytest.approx(LOSSES[name](student, teacher, **options), rel=1e-12)


LABEL_CASES = [
    ("cross-entropy", det((5, 7), 1.7, 0.3), LABELS),
    ("cross-entropy", det((2, 3, 4, 5), 1.7, 0.3), np.arange(40).reshape(2, 4, 5) % 3),
    ("binary", det((2, 3, 4, 5), 1.7, 0.3), (det((2, 3, 4, 5), 2.3, 1.1) > 0).astype(float)),
    ("binary", det((4,), 1.7, 0.3), np.array([1.0, 0.0, -100, 1.0])),
    ("squared-error", det((2, 3, 4, 5), 1.7, 0.3), det((2, 3, 4, 5), 2.3, 1.1)),
]


@pytest.mark.parametrize(("name", "student", "targets"), LABEL_CASES)
def test_every_loss_on_labels_runs_on_arrays_without_methods(name, student, targets, bare):
    expected = LABEL_LOSSES[name](student, targets)
    value = LABEL_LOSSES[name](bare(channels_last(student)), bare(moved_like(targets, student)))
    assert values_of(value) == pytest.approx(expected, rel=1e-12)
    value = LABEL_LOSSES[name](channels_last(student), moved_like(targets, student), axis=-1)
    assert value == pytest.approx(expected, rel=1e-12)


def moved_like(targets, student):
    """Return targets with channels last if they have a channel axis."""
    return channels_last(targets) if targets.ndim == student.ndim else targets


def test_the_cases_include_every_loss_on_labels():
    assert {name for name, *_ in LABEL_CASES} == set(LABEL_LOSSES)


def test_the_loss_from_stored_top_k_logits_runs_on_arrays_without_methods(bare):
    indices = np.array([[1, 4], [0, 2], [5, 6]], np.uint8)
    arguments = [det((3, 7), 1.7, 0.3), indices, np.log([[0.5, 0.3]] * 3), np.log([0.2] * 3)]
    options = {"temperature": 2.0, "mask": np.array([True, False, True])}
    value = stored_top_k(*(bare(array) for array in arguments), **options_as(bare, options))
    assert values_of(value) == pytest.approx(stored_top_k(*arguments, **options), rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda student, teacher: (student - teacher).sum(),
        lambda student, teacher: student if student[0, 0] > 0 else teacher,
        lambda student, teacher: float(student[0, 0]),
        lambda student, teacher: sum(student),
        lambda student, teacher: student[teacher > 0],
    ],
)
def test_arrays_without_methods_refuse_operations_that_losses_must_not_use(loss, bare):
    with pytest.raises((AttributeError, TypeError)):
        loss(bare(det((5, 7), 1.7, 0.3)), bare(det((5, 7), 2.3, 1.1)))


# ------------------------------------------------------------------------------------------------------- compilers


@pytest.fixture(autouse=True)
def _loaded():
    ops.load_implementation(torch.Tensor)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in NOT_COMPILED])
def test_every_loss_is_traced_as_one_graph_by_torch_compile(name):
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="eager")
    student, teacher, options = cases(name)[-1]  # with a mask, and a temperature
    sides = [ops.map_arrays(torch.from_numpy, side) for side in (student, teacher)]
    value = compiled(*sides, **options_as(torch.from_numpy, options))
    assert float(value) == pytest.approx(float(LOSSES[name](student, teacher, **options)), rel=1e-12)


def test_a_temperature_that_changes_with_the_epoch_is_traced():
    torch.compiler.reset()
    compiled = torch.compile(LOSSES["kd"], fullgraph=True, backend="eager")
    student, teacher, _ = cases("kd")[0]
    for temperature in (1.0, 2.5, 4.0):
        value = compiled(torch.from_numpy(student), torch.from_numpy(teacher), temperature=temperature)
        expected = LOSSES["kd"](student, teacher, temperature=temperature)
        assert float(value) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", list(NOT_COMPILED))
def test_the_losses_in_not_compiled_cannot_be_traced(name):
    torch.compiler.reset()
    student, teacher, options = cases(name)[0]
    sides = [ops.map_arrays(torch.from_numpy, side) for side in (student, teacher)]
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):  # if it is not raised, remove the entry
        torch.compile(LOSSES[name], fullgraph=True, backend="eager")(*sides, **options)


@pytest.mark.parametrize(("name", "student", "targets"), LABEL_CASES)
def test_every_loss_on_labels_is_traced_as_one_graph_by_torch_compile(name, student, targets):
    torch.compiler.reset()
    compiled = torch.compile(LABEL_LOSSES[name], fullgraph=True, backend="eager")
    value = compiled(torch.from_numpy(student), torch.from_numpy(targets))
    assert float(value) == pytest.approx(float(LABEL_LOSSES[name](student, targets)), rel=1e-12)
