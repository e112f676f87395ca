"""An exported ONNX file contains what a runtime reads, and no text from the source code or about the author."""

from __future__ import annotations

import getpass
import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import nn

import kirsch
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.frameworks.pytorch.io import export, onnx_file

SOURCE = '''
import torch
from torch import nn

class VerySecretNetwork(nn.Module):
    """A docstring that must not be in the file."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.loop = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        peculiar_name_of_a_variable = self.norm(self.stem(x)).relu()  # a comment beside it
        tokens = peculiar_name_of_a_variable.flatten(2).transpose(1, 2)
        attended = tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)
        return {"logits": self.head(self.loop(attended)[0].mean(1))}
'''


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """Return the folder of a model's source file, and the path of the exported file."""
    folder = tmp_path_factory.mktemp("home_of_someone")
    path = folder / "confidential.py"
    path.write_text(SOURCE)
    names = {"__name__": "confidential_module"}
    exec(compile(SOURCE, str(path), "exec"), names)  # stack traces then contain this path
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SINGLE_FILE_BYTES", 10**9)
        artifact = kirsch.export(
            names["VerySecretNetwork"](), folder / "out" / "m.onnx", example_inputs=torch.randn(2, 1, 6, 6)
        )
    return folder, artifact.path


def test_a_file_contains_no_source_code_paths_or_user_names(secret):
    folder, path = secret
    content = path.read_bytes()
    words = ["Secret", "confidential", "docstring", "peculiar", "comment", "home_of_someone", "attended", "in forward"]
    words += [
        str(folder),
        str(Path(torch.__file__).parent),
        "site-packages",
        ".py",
        "stack_trace",
        "__main__",
        "kirsch",
    ]
    words += [getpass.getuser() + "/", str(Path.home()) + "/"]
    assert [word for word in words if word.encode() in content] == []


def test_producer_opset_weight_names_and_shapes_are_kept(secret):
    model = onnx.load(secret[1])
    onnx.checker.check_model(model, full_check=True)
    assert (model.producer_name, model.producer_version) == ("pytorch", str(torch.__version__))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    weights = {tensor.name for tensor in model.graph.initializer}
    assert {"stem.weight", "stem.bias", "head.weight", "head.bias"} <= weights
    assert all(node.name for node in model.graph.node)
    known = {value.name for value in model.graph.value_info} | {value.name for value in model.graph.output}
    assert {name for node in model.graph.node for name in node.output if name} <= known
    assert not weights & known


def test_no_message_in_a_file_has_a_doc_string_or_metadata(secret):
    """The text form shows every field that is set."""
    text = str(onnx.load(secret[1]))
    assert not re.findall(r"^ *(doc_string|metadata_props)", text, re.MULTILINE)


def test_external_weights_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 10)
    model, rows = nn.Linear(30, 30), torch.randn(4, 30)
    artifact = kirsch.export(model, tmp_path / "m.onnx", example_inputs=rows)
    assert b"stack_trace" not in artifact.path.read_bytes()
    written = onnx.load(artifact.path, load_external_data=False)
    assert {entry.value for tensor in written.graph.initializer for entry in tensor.external_data} >= {"m.onnx.data"}
    assert {"weight", "bias"} <= {tensor.name for tensor in written.graph.initializer}
    assert OnnxSession(artifact.path).run(rows.numpy())[0] == pytest.approx(model(rows).detach().numpy(), abs=1e-6)


def finished(text, path, **options):
    onnx.save(onnx.parser.parse_model(text), path)
    onnx_file.finish(path, **{"inputs": ["x"], "outputs": ["y"], "prefix": "model.", "model": "Net"} | options)
    return onnx.load(path)


HEAD = '<ir_version: 8, opset_import: ["" : 17, "local" : 1, "unused" : 3]>'


def test_values_in_branches_are_renamed_and_unused_domains_removed(tmp_path):
    found = finished(
        f"""{HEAD} g (float[n] given, bool[1] c) => (float[n] out)
        <float[1] "model.w" = {{2}}> {{
            y = Mul(given, model.w)
            out = If (c) <
                then_branch = a () => (float[n] t) {{ t = Add(y, given) }},
                else_branch = b () => (float[n] e) {{ e = local.twice(y) }}
            >
        }}
        <domain: "local", opset_import: ["" : 17]> twice (v) => (r) {{ r = Add(v, v) }}""".replace(
            "model.w", "model_w"
        ),
        tmp_path / "m.onnx",
        inputs=["x", "choose"],
        prefix="model_",
    )
    assert [entry.domain for entry in found.opset_import] == ["", "local"]
    onnx.checker.check_model(found)
    session = OnnxSession(tmp_path / "m.onnx")
    three = np.array([3], np.float32)
    assert session.inputs == ["x", "choose"]
    assert [session.run(three, np.array([choice]))[0].tolist() for choice in (True, False)] == [[9], [12]]


def test_an_input_that_is_two_outputs_gets_two_identity_nodes(tmp_path):
    found = finished(
        f"{HEAD} g (float[n] given) => (float[n] given, float[n] given) {{ }}", tmp_path / "m.onnx", outputs=["y", "z"]
    )
    assert [value.name for value in found.graph.output] == ["y", "z"]
    assert [(node.op_type, node.input[0], node.output[0]) for node in found.graph.node] == [
        ("Identity", "x", "y"),
        ("Identity", "x", "z"),
    ]
