"""Tests of running ONNX files, including damaged and malicious files."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import DataError, LoadError, MissingExtraError, ShapeError


def test_a_session_has_the_names_shapes_and_types_of_its_inputs(write, numbers):
    session = OnnxSession(write("y = Add(input, input) z = Neg(input)", outputs="float[batch,2] y, float[batch,2] z"))
    twice, negative = session.run(numbers)
    assert np.array_equal(twice, 2 * numbers)
    assert np.array_equal(negative, -numbers)
    assert (session.inputs, session.shapes, session.types) == (["input"], [("batch", 2)], ["float"])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_predictions_do_not_depend_on_the_batch_size(doubling, numbers, batch_size, monkeypatch):
    session, sizes = OnnxSession(doubling), []
    plain = session.run
    monkeypatch.setattr(session, "run", lambda part: (sizes.append(len(part)), plain(part))[1])
    assert np.array_equal(session.predict(numbers, batch_size), 2 * numbers)
    assert max(sizes) <= batch_size
    assert sum(sizes) == 5


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_a_file_with_a_fixed_batch_predicts_any_number_of_samples(write, numbers, size):
    path = write("y = Add(input, input)", inputs=f"float[{size},2] input", outputs=f"float[{size},2] y")
    session = OnnxSession(path)
    assert session.batch == size
    assert np.array_equal(session.predict(numbers), 2 * numbers)


def test_predict_without_samples_is_refused(doubling):
    with pytest.raises(DataError, match=r"There are no inputs to predict\."):
        OnnxSession(doubling).predict(np.zeros((0, 2), np.float32))


def test_a_function_for_timing_runs_the_file_at_each_call(doubling, numbers):
    values = numbers.copy()
    call = OnnxSession(doubling).call(values)
    assert np.array_equal(call()[0], 2 * numbers)
    values[:] = 1
    assert np.array_equal(call()[0], np.full((5, 2), 2.0))


@pytest.mark.parametrize("verb", ["run", "call"])
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            [np.zeros((2, 3), np.float32)],
            r"accept inputs \(2, 3\) float32\. It expects input \['batch', 2\] tensor\(float\)",
        ),
        (
            [np.zeros((2, 2))],
            r"accept inputs \(2, 2\) float64\. .*Actual: \(tensor\(double\)\) , expected: \(",
        ),
        (
            [np.zeros((2, 2), np.float32)] * 2,
            r"\(2, 2\) float32, \(2, 2\) float32\. It expects input \['batch', 2\]",
        ),
        ([], r"It expects input \['batch', 2\] tensor\(float\)\. Give example inputs"),
    ],
)
def test_the_error_for_wrong_inputs_has_their_shapes_and_the_expected_shapes(doubling, verb, inputs, sentence):
    with pytest.raises(ShapeError, match=sentence):
        getattr(OnnxSession(doubling), verb)(*inputs)


def test_an_error_in_a_file_contains_the_message_of_the_runtime(write):
    body = "t = Constant<value = float[2] {5.0, 6.0}>() y = Gather(t, input)"
    session = OnnxSession(write(body, inputs="int64[batch,2] input"))
    assert session.run(np.array([[0, 1]]))[0].tolist() == [[5, 6]]
    with pytest.raises(ShapeError, match=r"idx=9 must be within the inclusive range \[-2,1\]"):
        session.run(np.array([[0, 9]]))


def test_the_session_uses_the_given_number_of_threads(doubling):
    session = OnnxSession(doubling, threads=2)
    assert session.threads == 2
    assert session._session.get_session_options().intra_op_num_threads == 2
    assert session._session.get_session_options().inter_op_num_threads == 1


def test_the_error_for_a_missing_file_has_its_name(tmp_path):
    with pytest.raises(LoadError, match=r"The file .*gone\.onnx does not exist\. Export the model first\."):
        OnnxSession(tmp_path / "gone.onnx")
    with pytest.raises(LoadError, match=r"is not an ONNX file: it is a folder.* Give a file written by kirsch\.export"):
        OnnxSession(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"is not an ONNX file: it is an empty file.*Write or download it again"),
        (b"hi", r"cannot be loaded by ONNX Runtime\. .*[^.]\. The file is damaged or is not an ONNX file"),
        (b"\x80\x04}q\x00.", r"is not an ONNX file: it is a pickle.* Give a file written by kirsch\.export"),
        (b"PK\x03\x04" + bytes(40), r"is not an ONNX file: it is a damaged zip archive"),
    ],
    ids=["empty", "text", "pickle", "archive"],
)
def test_a_file_in_another_format_is_refused_with_its_format(tmp_path, content, sentence):
    (tmp_path / "junk.onnx").write_bytes(content)
    with pytest.raises(LoadError, match=rf"junk\.onnx {sentence}") as caught:
        OnnxSession(tmp_path / "junk.onnx")
    assert "\n" not in str(caught.value)


def test_a_file_with_custom_operators_is_refused(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float[2] x) => (float[2] y) { y = own.Foo(x) }'
    (tmp_path / "own.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(LoadError, match=r"Foo.*Leave custom operators out"):
        OnnxSession(tmp_path / "own.onnx")


def with_external_weights(path, location):
    """Write a file that adds weights, which are stored in another file."""
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2])
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        weights.external_data.add(key=key, value=value)
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[batch,2] input) => (float[batch,2] y) { y = Add(input, w) }'
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(weights)
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_outside_the_folder_of_the_file_are_not_read(tmp_path, numbers):
    """An untrusted file must not be able to read other files of the user."""
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder in (tmp_path, inner):
        (folder / "weights.bin").write_bytes(np.array([1, 2], np.float32).tobytes())
    session = OnnxSession(with_external_weights(inner / "inside.onnx", "weights.bin"))
    assert session.run(numbers)[0] == pytest.approx(numbers + np.array([1, 2]))
    for location in ("../weights.bin", str(tmp_path / "weights.bin"), "../inner/../weights.bin"):
        with pytest.raises(LoadError, match=r"outside\.onnx cannot be loaded by ONNX Runtime"):
            OnnxSession(with_external_weights(inner / "outside.onnx", location))


def test_the_error_for_a_missing_onnxruntime_has_the_pip_command(doubling, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    sentence = (
        r"^The package 'onnxruntime' is not installed\. It is needed to run ONNX files\. "
        r'Run: pip install "kirsch\[torch\]"$'
    )
    with pytest.raises(MissingExtraError, match=sentence):
        OnnxSession(doubling)
