"""Array operations give the same result for every library."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kirsch import ops
from kirsch.distillation.losses.loss import check_same_shape
from kirsch.errors import DataError, ShapeError, UsageError


def test_log_softmax_equals_its_closed_form(framework):
    logits = framework([[0.0, math.log(3.0)], [5.0, 5.0]])
    np.testing.assert_allclose(ops.log_softmax(logits), np.log([[0.25, 0.75], [0.5, 0.5]]), rtol=1e-15)


def test_log_softmax_of_huge_logits_is_their_difference(framework):
    np.testing.assert_array_equal(ops.log_softmax(framework([[1e4, -1e4], [-1e4, -1e4 - 700]])), [[0, -2e4], [0, -700]])


def test_the_gradient_of_log_softmax_includes_the_normalization():
    """The largest logit is subtracted without gradient, which must not change the gradient of the result."""
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    ops.log_softmax(logits)[0, 0].backward()
    softmax = np.exp(logits.detach().numpy()) / np.exp(logits.detach().numpy()).sum()
    np.testing.assert_allclose(logits.grad, np.array([[1.0, 0, 0]]) - softmax, atol=1e-15)


def test_take_column_returns_one_column_of_each_row(framework):
    rows = framework([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    np.testing.assert_array_equal(ops.take_column(rows, framework([2, 0])), [3, 4])


def test_take_column_accepts_integers_of_any_width():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert ops.take_column(rows, torch.tensor([1, 0], dtype=dtype)).tolist() == [2, 3]


def test_detach_stops_gradients_and_returns_numpy_arrays_unchanged():
    logits = torch.ones(2, requires_grad=True)
    (ops.detach(logits) * logits).sum().backward()
    assert logits.grad.tolist() == [1, 1]  # would be 2 · logits if the gradient reached the detached factor
    plain = np.ones(2)
    assert ops.detach(plain) is plain


def test_a_list_is_refused_as_an_array():
    with pytest.raises(UsageError, match=r"A loss got an object of type list\. Pass numpy arrays or PyTorch tensors\."):
        ops.exp([1.0])


def test_the_message_about_unequal_shapes_contains_both_shapes():
    message = r"student's logits have shape \(2, 3\), the teacher's \(2, 4\)\. They must be logits of the same samples"
    with pytest.raises(ShapeError, match=message):
        check_same_shape(np.zeros((2, 3)), torch.zeros(2, 4))


def test_log_sigmoid_equals_its_closed_form(framework):
    values = ops.log_sigmoid(framework([0.0, math.log(3), 1e4, -1e4]))
    np.testing.assert_allclose(values, [-math.log(2), math.log(0.75), 0, -1e4], rtol=1e-15)


def test_the_slope_of_log_sigmoid_is_one_half_at_zero():
    """A head initialized to zero returns 0, where a formula with |x| would have the slope 1."""
    logits = torch.tensor([0.0, math.log(3), -1e4], dtype=torch.float64, requires_grad=True)
    ops.log_sigmoid(logits).sum().backward()
    np.testing.assert_allclose(logits.grad, [0.5, 0.25, 1], rtol=1e-15)


def test_a_weighted_mean_equals_its_closed_form(framework):
    values, weights = framework([[1.0, 5.0, 100.0]]), framework([[1.0, 3.0, 2.0]])
    assert float(ops.weighted_mean(values, weights)) == pytest.approx((1 + 15 + 200) / 6, rel=1e-15)
    mask = framework([[True, True, False]])
    assert float(ops.weighted_mean(values, weights, mask)) == pytest.approx(4, rel=1e-15)
    assert float(ops.weighted_mean(values, 0.0 * weights)) == 0
    with pytest.raises(DataError, match="All targets are masked"):
        ops.weighted_mean(values, weights, framework([[False, False, False]]))


def test_a_mask_of_another_shape_is_refused(framework):
    with pytest.raises(ShapeError, match=r"The mask has shape \(3,\); \(2,\) is needed"):
        ops.zero_masked(framework(np.ones((2, 3))), framework([True, True, False]))


def test_convert_to_numpy_detaches_tensors_and_returns_numpy_arrays_unchanged():
    assert ops.convert_to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    plain = np.ones(2)
    assert ops.convert_to_numpy(plain) is plain


def test_the_implementations_have_the_same_functions_with_the_same_arguments():
    from kirsch.frameworks.pytorch import ops as of_torch
    from kirsch.ops import numpy_arrays, operations

    names = [name for name, value in vars(operations).items() if inspect.isfunction(value)]
    names = [name for name in names if getattr(operations, name).__module__ == operations.__name__]
    for name in set(names) - {"channel_axis"}:
        assert callable(getattr(numpy_arrays, name))
        assert callable(getattr(of_torch, name))
    assert numpy_arrays.CHANNEL_AXIS == of_torch.CHANNEL_AXIS == 1
    assert set(names) <= set(ops.__all__)
    assert set(names) == CALLS.keys() | OF_TYPES


OF_TYPES = {
    "cast",
    "channel_axis",
    "convert_to_numpy",
    "convert_to_tensor",
    "dtype",
    "is_traced",
    "multi_hot",
    "one_hot",
    "widest_float",
    "without_autocast",
}
"""Operations that create arrays or depend on their type. They have their own tests, or are tested by every loss."""


def test_importing_the_operations_imports_no_framework():
    code = "import sys, numpy; from kirsch import ops; ops.exp(numpy.ones(2)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_implementation_is_found_by_the_package_of_the_array_type(monkeypatch):
    monkeypatch.setattr(ops.IMPLEMENTATIONS, "_objects", {})
    array_type = type("Array", (), {"__module__": "my_library.arrays"})
    with pytest.raises(UsageError, match="an object of type Array"):
        ops.exp(array_type())
    ops.IMPLEMENTATIONS.register("my_library")(SimpleNamespace(exp=lambda x: "the exponential"))
    assert ops.exp(array_type()) == "the exponential"


def test_an_error_is_raised_if_a_condition_is_true_for_an_element(framework):
    ops.raise_if(framework([False, False]), lambda: DataError("A value is wrong."))
    with pytest.raises(DataError, match="A value is wrong"):
        ops.raise_if(framework([False, True]), lambda: DataError("A value is wrong."))
    with ops.without_value_checks():
        ops.raise_if(framework([True]), lambda: DataError("A value is wrong."))
    with pytest.raises(DataError):
        ops.raise_if(framework([True]), lambda: DataError("A value is wrong."))


def test_arrays_on_the_meta_device_are_not_checked():
    ops.raise_if(torch.ones(2, dtype=torch.bool, device="meta"), lambda: DataError("A value is wrong."))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "uint8", "bool"])
def test_types_have_the_same_names_in_every_library(dtype, framework):
    converted = ops.cast(framework([0.0, 1.0]), dtype)
    assert ops.dtype(converted) == dtype
    assert ops.dtype(ops.upcast(converted)) == ("float32" if dtype == "float16" else dtype)


def test_indices_become_one_hot_and_multi_hot_rows(framework):
    rows = ops.one_hot(framework([2, 0]), 3, "float64")
    np.testing.assert_array_equal(rows, [[0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(ops.multi_hot(framework([[2, 0]]), 4, "bool"), [[True, False, True, False]])


def test_classes_last_moves_the_axis_of_classes(framework):
    pixels = framework(np.zeros((2, 3, 4, 5)))
    assert tuple(ops.classes_last(pixels).shape) == (2, 4, 5, 3)
    assert tuple(ops.classes_last(pixels, axis=-1).shape) == (2, 3, 4, 5)
    assert tuple(ops.classes_last(framework(np.zeros((2, 3, 4)))).shape) == (2, 3, 4)


MATRIX = np.array([[0.5, -2.0, 3.0], [1.5, 0.25, -1.0]])
OTHER = np.array([[1.0, -2.5, 0.0], [-1.5, 4.0, 2.0]])
CALLS = {
    "abs": (MATRIX,),
    "all": (MATRIX > -3, 1),
    "amax": (MATRIX, (0, 1)),
    "amin": (MATRIX, 1),
    "any": (MATRIX > 2, 0),
    "argmax": (MATRIX, 0),
    "argsort": (MATRIX, 1),
    "broadcast_to": (MATRIX, (4, 2, 3)),
    "clip": (MATRIX, -1.0, 2.0),
    "concatenate": ([MATRIX, OTHER], 1),
    "count_nonzero": (OTHER, 0),
    "diagonal": (MATRIX @ OTHER.T,),
    "einsum": ("ij,kj->ik", MATRIX, OTHER),
    "exp": (MATRIX,),
    "isfinite": (np.array([0.0, np.inf, np.nan]),),
    "log": (np.abs(MATRIX),),
    "logaddexp": (MATRIX, OTHER),
    "matmul": (MATRIX, OTHER.T.copy()),
    "maximum": (MATRIX, OTHER),
    "mean": (MATRIX, (0, 1)),
    "minimum": (MATRIX, OTHER),
    "moveaxis": (MATRIX[None], 0, -1),
    "ones_like": (MATRIX,),
    "reshape": (MATRIX, (3, -1)),
    "segment_max": (OTHER[0], np.array([2, 0, 2]), 3),
    "segment_sum": (OTHER[0], np.array([2, 0, 2]), 4),
    "sign": (OTHER,),
    "sort": (MATRIX, 0),
    "sqrt": (np.abs(MATRIX),),
    "stack": ([MATRIX, OTHER], -1),
    "stop_gradient": (MATRIX,),
    "sum": (MATRIX, 0),
    "svd": (np.diag([3.0, 2.0, 1.0]),),
    "swapaxes": (MATRIX, 0, 1),
    "take_along_axis": (MATRIX, np.array([[2], [0]]), 1),
    "top_k": (MATRIX, 2),
    "where": (MATRIX > 0, MATRIX, -1.0),
    "zeros_like": (MATRIX,),
}
"""Operation → arguments. The type of the first array selects the library."""


@pytest.mark.parametrize("name", list(CALLS))
def test_an_operation_returns_the_same_in_every_library(name):
    def as_tensors(argument):
        if isinstance(argument, list):
            return [as_tensors(part) for part in argument]
        return torch.from_numpy(argument) if isinstance(argument, np.ndarray) else argument

    results = []
    for arguments in (CALLS[name], map(as_tensors, CALLS[name])):
        result = getattr(ops, name)(*arguments)
        results.append([np.asarray(part) for part in (result if isinstance(result, tuple) else [result])])
    for first, second in zip(*results, strict=True):
        assert first.shape == second.shape
        np.testing.assert_allclose(second, first, rtol=1e-15)
