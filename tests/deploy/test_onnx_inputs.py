"""Tests of the inputs that are generated to time an ONNX file."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import kirsch
from kirsch.deploy.onnx_inputs import generated_inputs
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import LoadError, MemoryShortageError, UsageError
from kirsch.graph.inputs import InputSpec


@pytest.fixture
def session(tmp_path):
    """Return a function of (name, shape) pairs: it writes a file that adds these inputs, and opens a session on it."""

    def make(*inputs, kind=TensorProto.FLOAT):
        values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs]
        constant = helper.make_node("Constant", [], ["y"], value=helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0]))
        names = [name for name, _ in inputs]
        node = constant if not names else helper.make_node("Add" if len(names) > 1 else "Identity", names, ["y"])
        graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", kind, None)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / "net.onnx")
        return OnnxSession(tmp_path / "net.onnx")

    return make


def spec(*shape, name=""):
    return InputSpec(name, shape, "float32")


def test_generated_inputs_and_measure_refuse_a_file_without_inputs(session, tmp_path):
    with pytest.raises(LoadError, match=r"net\.onnx has no inputs\. Its output is constant"):
        generated_inputs(session())
    with pytest.raises(LoadError, match="has no inputs"):
        kirsch.measure(tmp_path / "net.onnx", example_inputs=np.ones((1, 2), np.float32))


@pytest.mark.parametrize(
    ("shape", "example"),
    [
        (None, "1,3,224,224"),
        ([], "1,3,224,224"),
        (["n", 3, None, "w"], "1,3,224,224"),
        (["n", "length"], "1,224"),
    ],
)
def test_the_error_for_an_unknown_shape_names_the_option_input(session, shape, example):
    file = session(("x", shape))
    with pytest.raises(UsageError, match=re.escape(f"Give the shape: --input x={example}.")):
        generated_inputs(file)
    if shape:
        assert generated_inputs(file, [spec(2, *[3] * (len(shape) - 1))])[0].shape == (2, *[3] * (len(shape) - 1))


def test_an_input_with_an_axis_of_size_0_is_refused(session):
    with pytest.raises(
        LoadError, match=r"'x' .* has an axis of size 0\. The shape in the file is 0 × 3\. Export the model again"
    ):
        generated_inputs(session(("x", [0, 3])))


def test_inputs_larger_than_the_memory_are_refused_before_their_generation(session):
    with pytest.raises(MemoryShortageError, match=r"They need 4,000 GB.*largest axis has the size 1000000\."):
        generated_inputs(session(("x", [10**6, 10**6])))
    assert generated_inputs(session(("x", [10**6, 10**6])), [spec(2, 2)])[0].shape == (2, 2)


def test_inputs_have_the_types_of_the_file_and_a_batch_of_one(session):
    arrays = generated_inputs(session(("ids", ["n", 4]), ("mask", ["n", 4]), kind=TensorProto.INT64))
    assert [(array.shape, array.dtype) for array in arrays] == [((1, 4), np.int64)] * 2
    assert arrays[1].min() == 1  # a mask of ones hides no position
    assert generated_inputs(session(("x", [2]), kind=TensorProto.FLOAT16))[0].dtype == np.float16


def test_the_error_for_an_unsupported_type_names_the_type(session):
    with pytest.raises(LoadError, match=r"'x' .* is of type string"):
        generated_inputs(session(("x", ["n"]), kind=TensorProto.STRING))


def test_shapes_are_matched_by_name_or_by_order(session):
    two = session(("a", ["n", "w"]), ("b", ["n", "w"]))
    assert [x.shape for x in generated_inputs(two, [spec(1, 2), spec(3, 4)])] == [(1, 2), (3, 4)]
    assert [x.shape for x in generated_inputs(two, [spec(1, 2, name="b"), spec(3, 4, name="a")])] == [(3, 4), (1, 2)]
    with pytest.raises(UsageError, match=r"has no input 'c'\. Known: a, b\."):
        generated_inputs(two, [spec(1, 2, name="a"), spec(1, 2, name="c")])
    with pytest.raises(UsageError, match="has 2 inputs; the number of given shapes is 1"):
        generated_inputs(two, [spec(1, 2)])
    with pytest.raises(UsageError, match="has 1 input; the number of given shapes is 2"):
        generated_inputs(session(("a", ["n", "w"])), [spec(1, 2), spec(3, 4)])
