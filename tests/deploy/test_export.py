"""Tests of exported files: each is compared with the model before it is written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.deploy.export import EXPORTERS, usage
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.deploy.trials import TOLERANCE
from kirsch.errors import ModelError, NumericError, OutputError, UnknownNameError, UsageError

PAIR = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


class Double(nn.Module):
    """Doubles its input."""

    def forward(self, x):
        return x + x


@pytest.fixture
def exporter(monkeypatch):
    """Return a function that registers an exporter "own"."""
    return lambda function: monkeypatch.setitem(EXPORTERS._objects, "own", function)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_file_returns_the_outputs_of_the_model_for_any_batch_size(exported, size):
    images = torch.randn(size, 2, 4, 4, generator=torch.Generator().manual_seed(size))
    expected = exported.model(images).detach().numpy()
    found = OnnxSession(exported.artifact.path).run(images.numpy())[0]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)  # float32, summed in another order


def test_example_inputs_may_require_gradients(tmp_path):
    inputs = PAIR.clone().requires_grad_()
    assert kirsch.export(Double(), tmp_path / "m.onnx", example_inputs=inputs).details["drift"] < TOLERANCE
    assert kirsch.measure(Double(), example_inputs=inputs, rounds=6).parameters == 0


def test_the_hash_and_size_of_an_artifact_are_those_of_its_file(exported):
    artifact, content = exported.artifact, exported.artifact.path.read_bytes()
    assert artifact.bytes == len(content)
    assert artifact.sha256 == hashlib.sha256(content).hexdigest()
    assert artifact.details["inputs"] == [{"name": "input", "shape": ["batch", 2, 4, 4], "type": "float"}]
    assert artifact.details["outputs"][0]["shape"] == ["batch", 3]
    assert 0 <= artifact.details["drift"] < TOLERANCE


def test_an_artifact_prints_its_file_inputs_verification_and_hash(exported):
    artifact = exported.artifact
    lines = str(artifact).splitlines()
    assert [line.split()[0] for line in lines] == ["file", "inputs", "verified", "sha256"]
    assert lines[0].startswith(f"file         {artifact.path}   ")
    assert lines[1] == "inputs       input ['batch', 2, 4, 4]"
    assert lines[3] == f"sha256       {artifact.sha256}"
    assert artifact.sha256 in artifact._repr_html_()
    assert repr(artifact).startswith(f"<kirsch.Artifact: {artifact.path}, onnx, ")
    assert "\n" not in repr(artifact)


def test_an_artifact_of_another_exporter_prints_without_details(tmp_path):
    artifact = kirsch.Artifact(tmp_path / "m.bin", "own", 1200, "ab" * 32, {"inputs": 3})
    assert str(artifact).splitlines() == [f"file         {tmp_path / 'm.bin'}   1.20 kB", f"sha256       {'ab' * 32}"]


def test_an_artifact_is_restored_from_its_dict(exported):
    artifact = exported.artifact
    assert kirsch.Artifact.of_dict(artifact.path, json.loads(json.dumps(artifact.to_dict()))) == artifact


def test_the_json_of_an_artifact_does_not_contain_the_folder(exported):
    found = json.loads(json.dumps(exported.artifact.to_dict()))
    assert found["file"] == "small.onnx"
    assert found["sha256"] == exported.artifact.sha256
    assert str(exported.artifact.path.parent) not in json.dumps(found)


def test_the_drift_is_the_largest_difference_divided_by_the_largest_output(planted, tmp_path):
    planted("f = Constant<value = float {2.00001}>() y = Mul(input, f)")
    found = kirsch.export(Double(), tmp_path / "m.onnx", example_inputs=PAIR)
    assert found.details["drift"] == pytest.approx(5e-6, rel=0.03)  # float32 rounds 2.00001 by up to 1e-7


FAULTS = {
    "other weights": "f = Constant<value = float {2.0005}>() y = Mul(input, f)",
    "exchanged columns": "i = Constant<value = int64[2] {1, 0}>() s = Gather<axis = 1>(input, i) y = Add(s, s)",
    "a mean over the batch": "m = ReduceMean<axes = [0]>(input) d = Add(input, input) y = Sub(d, m)",
    "clipped at 50, which only large inputs reach": """
        a = Constant<value = float {-50.0}>() b = Constant<value = float {50.0}>()
        d = Add(input, input) y = Clip(d, a, b)""",
    "NaN for zeros": "q = Div(input, input) d = Add(input, input) y = Mul(d, q)",
    "NaN for all inputs": "z = Sub(input, input) q = Div(z, z) y = Add(input, q)",
    "infinite": "z = Sub(input, input) e = Exp(z) q = Div(e, z) y = Add(input, q)",
    "each row twice": "d = Add(input, input) y = Concat<axis = 0>(d, d)",
    "a third column": """
        i = Constant<value = int64[1] {1}>() d = Add(input, input) s = ReduceSum<keepdims = 1>(d, i)
        y = Concat<axis = 1>(d, s)""",
}


@pytest.mark.parametrize("body", FAULTS.values(), ids=FAULTS)
def test_a_file_with_other_outputs_is_refused_and_not_written(planted, tmp_path, body):
    planted(body)
    sentence = (
        r"The outputs of the exported file are not those of the model\. "
        r"The output '0' (differs by .*; 1e-04 is allowed|has another shape)"
    )
    with pytest.raises(NumericError, match=sentence):
        kirsch.export(Double(), tmp_path / "m.onnx", example_inputs=PAIR)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_number_of_outputs_is_refused(planted, tmp_path):
    planted("y = Add(input, input) z = Add(y, y)", outputs="float[batch,2] y, float[batch,2] z")
    with pytest.raises(NumericError, match=r"The exported file has 2 outputs, the model has 1\."):
        kirsch.export(Double(), tmp_path / "m.onnx", example_inputs=PAIR)


def test_every_output_is_compared_with_the_model(planted, tmp_path):
    class Both(nn.Module):
        def forward(self, x):
            return x + x, -x

    planted("y = Add(input, input) z = Neg(input)", outputs="float[batch,2] y, float[batch,2] z")
    assert kirsch.export(Both(), tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] == 0
    planted("y = Add(input, input) z = Abs(input)", outputs="float[batch,2] y, float[batch,2] z")
    with pytest.raises(NumericError, match=r"differs by 2\.0e\+00"):
        kirsch.export(Both(), tmp_path / "m.onnx", example_inputs=PAIR)


def test_a_fixed_batch_size_is_verified_and_noted(planted, tmp_path):
    planted("y = Add(input, input)", inputs="float[2,2] input", outputs="float[2,2] y")
    sentence = (
        r"The batch size of m\.onnx is fixed at 2, as in the example inputs\. The exporter fixes the batch size\."
    )
    with pytest.warns(UserWarning, match=sentence) as caught:
        found = kirsch.export(Double(), tmp_path / "m.onnx", example_inputs=PAIR)
    assert caught[0].filename == __file__
    assert found.details["notes"] == [str(caught[0].message)]
    assert {trial["batch"] for trial in found.details["trials"]} == {2}


@pytest.mark.parametrize(("function", "body"), [(torch.exp, "y = Exp(input)"), (torch.log, "y = Log(input)")])
def test_equal_infinities_in_model_and_file_are_accepted(planted, tmp_path, function, body):
    """The exponential of large inputs is infinite, like the logarithm of 0; the logarithm of negative inputs is NaN."""

    class Function(nn.Module):
        def forward(self, x):
            return function(x)

    planted(body)
    assert kirsch.export(Function(), tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] < TOLERANCE


def test_boolean_outputs_are_compared(planted, tmp_path):
    class Positive(nn.Module):
        def forward(self, x):
            return x > 0

    zero = "z = Constant<value = float {0.0}>()"
    planted(f"{zero} y = Greater(input, z)", outputs="bool[batch,2] y")
    assert kirsch.export(Positive(), tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] == 0
    planted(f"{zero} y = Less(input, z)", outputs="bool[batch,2] y")
    with pytest.raises(NumericError, match=r"differs by 1\.0e\+00"):
        kirsch.export(Positive(), tmp_path / "m.onnx", example_inputs=PAIR)


def test_integer_inputs_are_not_randomized(planted, tmp_path):
    """Random integers could be invalid indices of an embedding."""
    batches = []

    class Recording(Double):
        def forward(self, x):
            batches.append(x.numpy().copy())
            return super().forward(x)

    planted("y = Add(input, input)", inputs="int64[batch,2] input", outputs="int64[batch,2] y")
    found = kirsch.export(Recording(), tmp_path / "m.onnx", example_inputs=torch.tensor([[1, 2], [3, 4]]))
    expected = {1: [[1, 2]], 2: [[1, 2], [3, 4]], 3: [[1, 2], [3, 4], [1, 2]]}
    assert all(batch.tolist() == expected[len(batch)] for batch in batches)
    assert [(trial["inputs"], trial["batch"]) for trial in found.details["trials"]] == [
        ("example", 2),
        ("example", 1),
        ("example", 3),
    ]


class FixedBatch(nn.Module):
    """Runs with one batch size only."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x.reshape(self.size, 2) * 2


class Asserting(nn.Module):
    """Asserts its batch size without a message."""

    def forward(self, x):
        assert len(x) == 2
        return x * 2


ASSERTED = Asserting.forward.__code__.co_firstlineno + 1


class Choosing(nn.Module):
    """Runs with any batch size, but computes a different function for one sample."""

    def forward(self, x):
        return x + x if len(x) == 1 else x - 1


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        (FixedBatch(2), 2, r"The model does not run with a batch of 1: RuntimeError: shape '\[2, 2\]' is invalid"),
        (FixedBatch(1), 1, r"The model does not run with a batch of 3: RuntimeError: shape '\[1, 2\]' is invalid"),
        (Asserting(), 2, rf"with a batch of 1: AssertionError\b.* \(test_export\.py:{ASSERTED}, in forward\)\."),
        (Choosing(), 1, r"(The exporter fixes the batch size|are not those of the model\. .* batch of 1.*)\."),
    ],
    ids=["two", "one", "assert", "choosing"],
)
def test_a_model_with_one_valid_batch_size_is_exported_with_this_size_and_a_note(model, size, reason, tmp_path):
    inputs = PAIR[:size]
    with pytest.warns(UserWarning, match=rf"m\.onnx is fixed at {size}, as in the example inputs\. .*{reason}"):
        artifact = kirsch.export(model, tmp_path / "m.onnx", example_inputs=inputs)
    assert artifact.details["inputs"][0]["shape"] == [size, 2]
    assert OnnxSession(artifact.path).run(inputs.numpy())[0] == pytest.approx(2 * inputs.numpy())


def test_inputs_with_different_first_axes_give_a_fixed_batch_size(tmp_path):
    class Anchored(nn.Module):
        def forward(self, x, anchors):
            return x[:, None] - anchors

    with pytest.warns(UserWarning, match=r"fixed at 2, 3, .*The first axes of its inputs differ: 2, 3\."):
        artifact = kirsch.export(Anchored(), tmp_path / "m.onnx", example_inputs=(PAIR, torch.zeros(3, 2)))
    assert [value["shape"] for value in artifact.details["inputs"]] == [[2, 2], [3, 2]]


def test_the_error_for_example_inputs_that_the_model_rejects_has_their_shapes(tmp_path):
    sentence = (
        r"A Linear does not run with inputs of shape \(2, 2\)\. RuntimeError: mat1 and mat2 .* Give example inputs"
    )
    with pytest.raises(ModelError, match=sentence):
        kirsch.export(nn.Linear(3, 2), tmp_path / "m.onnx", example_inputs=PAIR)


def test_a_failed_export_keeps_the_older_file_and_leaves_no_temporary_file(exporter, tmp_path):
    def write_half(_model, _inputs, path):
        path.write_bytes(b"half of a fi")
        raise NumericError("Planted error.")

    exporter(write_half)
    (tmp_path / "m.onnx").write_bytes(b"older")
    for target in (tmp_path / "m.onnx", tmp_path / "new" / "m.onnx"):
        with pytest.raises(NumericError, match="Planted error"):
            kirsch.export(Double(), target, example_inputs=PAIR, format="own")
    assert (tmp_path / "m.onnx").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m.onnx", "new"]


def test_external_weights_are_moved_before_the_model_file_that_refers_to_these_weights(exporter, tmp_path, monkeypatch):
    """Otherwise a program could read the new model with old weights."""
    from kirsch import files

    def write_two_files(_model, _inputs, path):
        path.write_bytes(b"model")
        path.with_name(f"{path.name}.data").write_bytes(b"weights")
        return {"inputs": []}

    order, write_bytes = [], files.write_bytes
    monkeypatch.setattr(
        files, "write_bytes", lambda path, content: (order.append(path.name), write_bytes(path, content))
    )
    exporter(write_two_files)
    found = kirsch.export(Double(), str(tmp_path / "deep" / "m.own"), example_inputs=PAIR, format="own")
    assert order == ["m.own.data", "m.own"]
    assert (tmp_path / "deep" / "m.own.data").read_bytes() == b"weights"
    assert (found.format, found.bytes, found.path) == ("own", 5, tmp_path / "deep" / "m.own")


def test_the_error_for_an_unknown_format_lists_the_known_formats(tmp_path):
    with pytest.raises(UnknownNameError, match=r"There is no exporter 'onxx'\. Known: onnx\. Did you mean 'onnx'\?"):
        kirsch.export(Double(), tmp_path / "m.onnx", example_inputs=PAIR, format="onxx")


def test_a_folder_that_cannot_be_written_is_named_before_any_work(exporter, tmp_path):
    exporter(lambda *_: pytest.fail("the model was exported"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file is a file\. A folder is needed"):
        kirsch.export(Double(), tmp_path / "file" / "m.onnx", example_inputs=PAIR, format="own")
    with pytest.raises(OutputError, match=r"file/deeper cannot be written\. Not a directory\."):
        kirsch.export(Double(), tmp_path / "file" / "deeper" / "m.onnx", example_inputs=PAIR, format="own")


def test_a_folder_as_path_is_refused_before_the_export(exporter, tmp_path, monkeypatch):
    exporter(lambda *_: pytest.fail("the model was exported"))
    monkeypatch.chdir(tmp_path)
    for target, name in ((tmp_path, tmp_path.name), ("", r"\."), ("..", r"\.\.")):
        with pytest.raises(OutputError, match=rf"{name} is a folder\. Give the path of a file in this folder\."):
            kirsch.export(Double(), target, example_inputs=PAIR, format="own")


def run(program, folder):
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_usage_example_of_an_artifact_runs(exported):
    expected = exported.model(torch.zeros(1, 2, 4, 4)).argmax(-1)
    program = usage(exported.artifact)
    assert len(program.splitlines()) <= 10
    assert run(program, exported.artifact.path.parent) == f"{expected.numpy()}\n"


def test_the_usage_example_has_every_input_with_its_type(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, tokens, shift):
            return self.table(tokens).mean(1) + shift

    torch.manual_seed(0)
    model, name = Two().double(), "\"quoted' \\n {7*7} ü.onnx"
    inputs = torch.tensor([[1, 2], [0, 3]]), torch.zeros(2, 3, dtype=torch.float64)
    artifact = kirsch.export(model, tmp_path / name, example_inputs=inputs)
    expected = model(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3)).argmax(-1)
    assert run(usage(artifact), tmp_path) == f"{expected.numpy()}\n"


def test_the_inputs_of_a_comparison_are_deterministic_and_include_zeros_and_large_values(planted, tmp_path):
    runs = []

    class Recording(Double):
        def forward(self, x):
            runs[-1].append(x.numpy().copy())
            return super().forward(x)

    planted("y = Add(input, input)")
    for _ in range(2):
        runs.append([])
        found = kirsch.export(Recording(), tmp_path / "m.onnx", example_inputs=PAIR)
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))
    assert [(trial["inputs"], trial["batch"]) for trial in found.details["trials"]] == [
        ("example", 2),
        ("example", 1),
        ("example", 3),
        ("normal", 3),
        ("zero", 3),
        ("large", 3),
    ]
    normal, zero, large = runs[0][-3:]
    assert not zero.any()
    assert np.abs(normal).max() < 10
    assert np.abs(large).max() > 50


@pytest.mark.parametrize("name", ["model", "model.pt"])
def test_an_unsupported_file_extension_is_refused_before_the_export(tmp_path, name):
    with pytest.raises(UsageError, match=rf"`path` of kirsch\.export .* does not end in \.onnx.*{name}\.onnx"):
        kirsch.export(nn.Linear(2, 1), tmp_path / name, example_inputs=torch.ones(1, 2))
