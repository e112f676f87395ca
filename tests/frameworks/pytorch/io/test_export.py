"""Export of PyTorch models to ONNX files."""

from __future__ import annotations

import copy
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.io import export
from kirsch.frameworks.pytorch.io.export import TorchExportable
from trace_and_cut import with_noise


class Normalized(nn.Module):
    """A model whose output depends on its mode, through batch statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.layer(x)))


def export_onnx(model, inputs, path):
    return TorchExportable(model, inputs).write_onnx(path)


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))


def test_a_model_in_training_mode_is_exported_in_inference_mode_and_not_changed(tmp_path):
    torch.manual_seed(0)
    model = with_noise(Normalized()).train()
    model.layer.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    details = export_onnx(model, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), tmp_path / "m.onnx")
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    samples = torch.randn(5, 3)
    expected = model.eval()(samples).detach().numpy()
    assert run(tmp_path / "m.onnx", samples)[0] == pytest.approx(expected, abs=1e-6)  # float32
    written = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(written)
    assert details["inputs"] == [{"name": "x", "shape": ["batch", 3], "type": "float"}]
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == details["opset"]
    assert (written.ir_version, details["exporter"]) == (details["ir_version"], f"torch {torch.__version__}")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_the_error_for_a_model_in_bfloat16_proposes_float32(tmp_path):
    with pytest.raises(ModelError, match=r"A Linear in bfloat16 cannot be exported\..*Use model\.float\(\)"):
        export_onnx(nn.Linear(3, 4).bfloat16(), torch.randn(2, 3).bfloat16(), tmp_path / "m.onnx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_autocast_of_the_caller_is_not_exported(tmp_path, dtype):
    with torch.autocast("cpu", dtype=dtype):
        kirsch.export(nn.Linear(3, 4), tmp_path / "m.onnx", example_inputs=torch.randn(2, 3))
        assert torch.is_autocast_enabled("cpu")
    written = onnx.load(tmp_path / "m.onnx").graph
    assert {tensor.data_type for tensor in written.initializer} == {onnx.TensorProto.FLOAT}
    assert not [node for node in written.node if node.op_type == "Cast"]


def test_the_batch_axis_is_dynamic_for_an_example_of_one_sample(tmp_path):
    """By default, the exporter of PyTorch treats an axis of size 1 in a recurrent layer as a constant."""
    torch.manual_seed(0)
    model, samples = nn.GRU(3, 4, batch_first=True), torch.randn(5, 2, 3)
    details = export_onnx(model, samples[:1], tmp_path / "m.onnx")
    assert [value["shape"] for value in details["outputs"]] == [["batch", 2, 4], [1, "batch", 4]]
    for expected, found in zip(model(samples), run(tmp_path / "m.onnx", samples), strict=True):
        assert found == pytest.approx(expected.detach().numpy(), abs=1e-6)  # float32


def test_inputs_and_outputs_keep_their_order(tmp_path):
    class Two(nn.Module):
        def forward(self, tokens, x):
            return x - tokens, x.sum(1)

    pair = torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 2)
    details = export_onnx(Two(), pair, tmp_path / "m.onnx")
    assert [(v["name"], v["shape"], v["type"]) for v in details["inputs"]] == [
        ("tokens", ["batch", 2], "int64"),
        ("x", ["batch", 2], "float"),
    ]
    assert [value["shape"] for value in details["outputs"]] == [["batch", 2], ["batch"]]
    difference, total = run(tmp_path / "m.onnx", *(torch.cat([value, value, value]) for value in pair))
    assert np.array_equal(difference, np.tile((pair[1] - pair[0]).numpy(), (3, 1)))
    assert total == pytest.approx(np.tile(pair[1].sum(1).numpy(), 3))


def test_numbers_and_strings_among_the_inputs_become_constants(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x, kind, scale, power, *, shift=0):
            return getattr(torch, kind)(x) ** power * scale + shift

    inputs, samples = (torch.randn(2, 3), "tanh", 2.5, 3), torch.randn(5, 3)
    artifact = kirsch.export(Scaled(), tmp_path / "m.onnx", example_inputs=inputs)
    assert [value["name"] for value in artifact.details["inputs"]] == ["x"]
    assert run(tmp_path / "m.onnx", samples)[0] == pytest.approx((2.5 * samples.tanh() ** 3).numpy(), abs=1e-5)
    kirsch.export(Scaled(), tmp_path / "n.onnx", example_inputs={"x": samples, "kind": "sin", "scale": 2, "power": 1})
    assert run(tmp_path / "n.onnx", samples)[0] == pytest.approx((2 * samples.sin()).numpy(), abs=1e-5)


def test_weights_above_the_size_limit_go_to_a_second_file(tmp_path, monkeypatch):
    """Nine weights and three biases of four bytes each are 48 bytes, one above the limit."""
    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 47)
    model, samples = nn.Linear(3, 3), torch.randn(4, 3)
    export_onnx(model, torch.randn(2, 3), tmp_path / "m.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert run(tmp_path / "m.onnx", samples)[0] == pytest.approx(model(samples).detach().numpy(), abs=1e-6)


class Foreign(nn.Module):
    """A model with an operation that ONNX lacks."""

    def forward(self, x):
        return torch.special.i1e(x)


class Choosing(nn.Module):
    """A model that branches on the values of its input."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Foreign(), r"DispatchError: No ONNX function found for .*bessel_i1e.*"),
        (Choosing(), r"\w+: Could not guard on data-dependent expression .*"),
        (nn.Linear(4, 2), r"RuntimeError: mat1 and mat2 shapes cannot be multiplied \(2x3 and 4x2\)"),
    ],
    ids=["operation", "decision", "shape"],
)
def test_the_error_of_a_failed_export_has_one_line_and_nothing_is_printed(model, reason, tmp_path, capfd):
    """Neither the exporter's advice to its own developers nor its logs are shown."""
    level = logging.getLogger("torch").level
    what, fix = rf"^A {type(model).__name__} cannot be exported to ONNX\.", "Replace the operation"
    with pytest.raises(ModelError, match=rf"{what} {reason}\. {fix}") as caught:
        export_onnx(model, torch.randn(2, 3), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch").level == level
    assert list(tmp_path.iterdir()) == []


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 4, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


class Nested(nn.Module):
    def forward(self, x):
        return torch.nested.nested_tensor([x[0], x[1]]).to_padded_tensor(0.0)


@pytest.mark.parametrize(
    ("model", "inputs", "sentence"),
    [
        (Packed(), (torch.randn(2, 5, 3), torch.tensor([5, 4])), "It packs sequences .*passes the padded batch to"),
        (Nested(), torch.randn(2, 5, 3), "It computes with nested tensors.*a padded batch and a mask"),
    ],
    ids=["packed", "nested"],
)
def test_the_export_names_unsupported_operations_as_the_trace_does(model, inputs, sentence, tmp_path):
    with pytest.raises(ModelError, match=sentence):
        export_onnx(model, inputs, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=sentence):
        kirsch.trace(model, inputs)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"input": torch.tensor(2.0)}, r"input is a tensor without axes\. Give tensors whose first axis is the batch"),
        (
            (torch.zeros(2, 3), torch.tensor(1.0)),
            r"Input 1 is a tensor without axes\. Give tensors whose first",
        ),
        ((torch.zeros(2, 3), 1j), r"Input 1 is of type complex\."),
    ],
    ids=["keywords", "scalar", "number"],
)
def test_inputs_without_a_batch_axis_raise_an_error(inputs, sentence, tmp_path):
    with pytest.raises(ModelError, match=sentence):
        export_onnx(nn.ReLU(), inputs, tmp_path / "m.onnx")


def test_an_exporter_that_returns_none_raises_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"A ReLU cannot be exported to ONNX\. The exporter returned None\."):
        export_onnx(nn.ReLU(), torch.zeros(2, 3), tmp_path / "m.onnx")


def test_an_exception_without_a_message_is_reported_by_its_type(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("see the next page") from NotImplementedError()

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ModelError, match=r"to ONNX\. NotImplementedError without a message\. Replace the operation"):
        export_onnx(nn.ReLU(), torch.zeros(2, 3), tmp_path / "m.onnx")


def test_an_export_does_not_change_the_random_state_of_the_caller(tmp_path, monkeypatch):
    def draws(*_, **__):
        torch.rand(3)

    monkeypatch.setattr(torch.onnx, "export", draws)
    state = torch.random.get_rng_state()
    with pytest.raises(ModelError, match="returned None"):
        export_onnx(nn.ReLU(), torch.zeros(2, 3), tmp_path / "m.onnx")
    assert torch.equal(state, torch.random.get_rng_state())


def test_keyword_inputs_keep_their_names(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, words, *, mask):
            return {"logits": self.last((self.table(words) * mask[..., None]).sum(1))}

    inputs = {"words": torch.randint(0, 7, (2, 5)), "mask": torch.ones(2, 5)}
    artifact = kirsch.export(Two(), tmp_path / "m.onnx", example_inputs=inputs)
    assert [value["name"] for value in artifact.details["inputs"]] == ["words", "mask"]
    assert [value["shape"] for value in artifact.details["inputs"]] == [["batch", 5], ["batch", 5]]
