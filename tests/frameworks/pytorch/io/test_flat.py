"""Models of any signature are exported, with names for their inputs and outputs."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import ModelError, UsageError
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.io.flat import identifier, output_names
from kirsch.frameworks.pytorch.io.vision import import_beside

pytest.importorskip("transformers", exc_type=ImportError)
import_beside("torchvision")
import transformers  # noqa: E402 - after the operators of torchvision are declared
from transformers import BatchEncoding  # noqa: E402

ROW = torch.tensor([[1.0, 2.0, 3.0]])


@dataclasses.dataclass
class Answer:
    """A dataclass as output of a model."""

    logits: torch.Tensor
    parts: Any = None


class Pair(NamedTuple):
    """A named tuple as output of a model."""

    boxes: torch.Tensor
    scores: torch.Tensor


class Returning(nn.Module):
    """A layer, and a function of its output and the input."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 3), function
        self.register_buffer("anchors", torch.ones(2, 2))

    def forward(self, x):
        return self.function(self.linear(x), x)


RETURNED = {
    "a tensor": (lambda y, _: y, ["output"]),
    "a tuple": (lambda y, _: (y, (2 * y, -y)), ["output_0", "output_1_0", "output_1_1"]),
    "a dict": (
        lambda y, _: {"logits": y, "aux": {"a b/c": 2 * y, "é": [y + 1, None]}},
        ["logits", "aux_a_b_c", "aux___0"],
    ),
    "a dataclass": (lambda y, _: Answer(y, (2 * y,)), ["logits", "parts_0"]),
    "a named tuple": (lambda y, _: Pair(y, 2 * y), ["boxes", "scores"]),
    "one tensor twice": (lambda y, _: {"a": y, "b": y}, ["a", "b"]),
    "the input": (lambda y, x: {"y": y, "same": x, "x": x}, ["y", "same", "x_1"]),
    "names that are equal as identifiers": (
        lambda y, _: {"a.b": y, "a": {"b": 2 * y}, "a_b": 3 * y},
        ["a_b", "a_b_", "a_b_1"],
    ),
    "names that operations of the graph also have": (
        lambda y, _: {"linear": 2 * y, "mul": y + 1, "weight": y},
        ["linear", "mul", "weight"],
    ),
    "numbers beside tensors": (lambda y, _: (7, y, "text", None), ["output_1"]),
}


@pytest.mark.parametrize(("function", "names"), RETURNED.values(), ids=RETURNED)
def test_outputs_keep_their_names_and_their_order(function, names, tmp_path):
    model = Returning(function)
    artifact = kirsch.export(model, tmp_path / "m.onnx", example_inputs=ROW)
    assert [value["name"] for value in artifact.details["outputs"]] == names
    rows = torch.randn(4, 3)
    found = kirsch.deploy.onnxruntime.OnnxSession(artifact.path).run(rows.numpy())
    with torch.no_grad():
        expected = named(model.eval()(rows)).values()
    for tensor, value in zip(expected, found, strict=True):
        assert value == pytest.approx(tensor.numpy(), abs=1e-5)


def test_a_returned_buffer_is_an_output(tmp_path):
    model = Returning(lambda y, _: y)
    model.function = lambda y, _: (y, model.anchors)
    artifact = kirsch.export(model, tmp_path / "m.onnx", example_inputs=ROW)
    assert [value["shape"] for value in artifact.details["outputs"]] == [["batch", 3], [2, 2]]


class Taking(nn.Module):
    """A `forward` method with all kinds of parameters: positional, keyword-only and `**more`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, first, parts=(), mask=None, *, twice=False, mode="sum", **more):
        out = self.linear(first)
        for part in (*(parts.values() if isinstance(parts, dict) else parts), *more.values()):
            out = out + part
        out = out if mask is None else out * mask
        return {"logits": 2 * out if twice else out, "mode": mode}


TAKEN = {
    "positional": ((ROW, [ROW, -ROW]), ["first", "parts_0", "parts_1"]),
    "a positional dict": ((ROW, {"left": ROW, "right": -ROW}), ["first", "parts_left", "parts_right"]),
    "keywords": ({"mask": ROW, "first": ROW, "weight": ROW}, ["mask", "first", "weight"]),
    "None": ({"first": ROW, "mask": None}, ["first"]),
    "a switch": ({"first": ROW, "twice": True, "mode": "mean"}, ["first"]),
    "the result of a tokenizer": (BatchEncoding({"first": ROW, "mask": ROW}), ["first", "mask"]),
    "names that operations of the graph also have": (
        {"first": ROW, "linear": ROW, "mul": ROW, "logits": ROW},
        ["first", "linear", "mul", "logits"],
    ),
}


@pytest.mark.parametrize(("inputs", "names"), TAKEN.values(), ids=TAKEN)
def test_inputs_keep_their_names_and_their_order(inputs, names, tmp_path):
    artifact = kirsch.export(Taking(), tmp_path / "m.onnx", example_inputs=inputs)
    assert [value["name"] for value in artifact.details["inputs"]] == names
    assert artifact.details["outputs"][0]["name"] == ("logits_1" if "logits" in names else "logits")
    assert artifact.details["drift"] < 1e-5
    assert kirsch.measure(artifact, example_inputs=inputs, rounds=6).bytes == artifact.bytes


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"first": ROW, "parts": [ROW, object()]}, r"parts\.1 is of type object\. Give tensors"),
        ({"first": ROW, "parts": {"a": torch.tensor(1.0)}}, r"parts\.a is a tensor without axes\."),
        (torch.zeros(0, 3), r"Input 0 has shape \(0, 3\) and is empty\."),
        ({"first": None}, "`example_inputs` .* is a dict with 1 element; expected an array"),
        ((), "`example_inputs` .* is a tuple without elements; expected an array"),
    ],
)
def test_the_error_for_an_unsupported_input_names_the_input(inputs, sentence, tmp_path):
    with pytest.raises((ModelError, UsageError), match=sentence):
        kirsch.export(Taking(), tmp_path / "m.onnx", example_inputs=inputs)


def test_names_of_outputs_are_c_identifiers():
    assert [identifier(path, "output") for path in ("a.b", "0.c", "ж", "", "x:0")] == [
        "a_b",
        "output_0_c",
        "_",
        "output_",
        "x_0",
    ]
    assert output_names(["0", "1"], ["output_1"]) == ["output_0", "output_1_1"]


# ------------------------------------------------------------------------------------------- language models


def ids(*shape):
    return torch.randint(3, 40, shape)


SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, **SMALL)
LLAMA = transformers.LlamaConfig(
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=8, intermediate_size=8, **SMALL
)
T5 = transformers.T5Config(num_layers=1, num_heads=2, d_model=8, d_kv=4, d_ff=8, decoder_start_token_id=0, **SMALL)

LANGUAGE = {
    "gpt2 with a positional input": (transformers.GPT2LMHeadModel, GPT, ids(1, 5), ["input_ids"], ["logits"]),
    "llama with a mask": (
        transformers.LlamaForCausalLM,
        LLAMA,
        {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)},
        ["input_ids", "attention_mask"],
        ["logits"],
    ),
    "gpt2 with hidden states": (
        transformers.GPT2LMHeadModel,
        GPT,
        {"input_ids": ids(1, 5), "output_hidden_states": True},
        ["input_ids"],
        ["logits", "hidden_states_0", "hidden_states_1"],
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        T5,
        {"input_ids": ids(1, 5), "decoder_input_ids": ids(1, 3)},
        ["input_ids", "decoder_input_ids"],
        ["logits", "encoder_last_hidden_state"],
    ),
}


@pytest.mark.parametrize(("kind", "config", "inputs", "input_names", "outputs"), LANGUAGE.values(), ids=LANGUAGE)
def test_a_language_model_of_transformers_is_exported_without_kv_cache(
    kind, config, inputs, input_names, outputs, tmp_path
):
    model = kind(config)
    artifact = kirsch.export(model, tmp_path / "m.onnx", example_inputs=inputs)
    assert [value["name"] for value in artifact.details["inputs"]] == input_names
    assert [value["name"] for value in artifact.details["outputs"]] == outputs
    assert model.config.use_cache is True  # the original is not changed
    sample = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    arrays = [np.concatenate([v.numpy()] * 3) for v in sample.values() if isinstance(v, torch.Tensor)]
    expected = model.eval()(**sample).logits.detach().numpy()
    found = kirsch.deploy.onnxruntime.OnnxSession(artifact.path).run(*arrays)[0]
    assert found == pytest.approx(np.concatenate([expected] * 3), abs=1e-5)


def test_the_kv_cache_is_exported_with_use_cache_in_the_inputs(tmp_path):
    model = transformers.GPT2LMHeadModel(GPT)
    inputs = {"input_ids": ids(1, 5), "use_cache": True}
    names = [v["name"] for v in kirsch.export(model, tmp_path / "m.onnx", example_inputs=inputs).details["outputs"]]
    assert [name.rpartition("_")[-1] for name in names] == ["logits", "keys", "values"]
