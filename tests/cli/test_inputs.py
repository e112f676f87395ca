"""Example inputs on the command line."""

from __future__ import annotations

import re

import pytest

from kirsch.cli.inputs import specifications
from kirsch.errors import MemoryShortageError, UsageError
from kirsch.graph.inputs import InputSpec

pytest.importorskip("torch")

TOKENS = '''
import torch
from torch import nn


class Tagger(nn.Module):
    """Embedding 50 × 16, then two linear layers, 16 → 32 → 3, at each position."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, ids, mask=None):
        if ids.is_floating_point():
            raise TypeError("ids must be integers")
        x = self.table(ids)
        return self.head(self.hidden(x if mask is None else x * mask[..., None]).relu())


class Dummies(Tagger):
    @property
    def dummy_inputs(self):
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0]])}

    def forward(self, input_ids):
        return super().forward(input_ids)


def with_dummy_inputs(inputs):
    net = Tagger()
    net.dummy_inputs = inputs
    return net


def inputs_by_name():
    return with_dummy_inputs({"ids": torch.tensor([[7, 6, 0], [1, 2, 3]]), "mask": torch.ones(2, 3)})


def one_tensor():
    return with_dummy_inputs(torch.tensor([[7, 6, 0], [1, 2, 3]]))


def two_tensors():
    return with_dummy_inputs((torch.tensor([[7, 6, 0], [1, 2, 3]]), torch.ones(2, 3)))


class Lookup(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(50, 16), nn.Linear(16, 3))


class Images(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, size):
        super().__init__()
        self.config = type("Config", (), {"image_size": size, "num_channels": 2})()
        self.first, self.second = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, pixel_values):
        return self.second(self.first(pixel_values))


def images():
    return Images([9, 8])


def sizeless():
    return Images(None)


def odd():
    net = Tagger()
    net.example_shape = (1, 0)
    return net
'''


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1,3,224,224", InputSpec("", (1, 3, 224, 224), "float32")),
        ("1x3x8", InputSpec("", (1, 3, 8), "float32")),
        (" 1, 24 ", InputSpec("", (1, 24), "float32")),
        ("1,24:int64", InputSpec("", (1, 24), "int64", 1)),
        ("input_ids=1,24:int64", InputSpec("input_ids", (1, 24), "int64", 1)),
        ("x1=4:bool", InputSpec("x1", (4,), "bool", 1)),
        ("x=1,2", InputSpec("x", (1, 2), "float32")),
    ],
)
def test_an_input_has_sizes_an_optional_name_and_an_optional_type(text, spec):
    assert specifications([text]) == [spec]


@pytest.mark.parametrize(
    "text", ["", "1,a", "1,0", "-1,3", "1,,3", "1,3,", "=1,3", "1x=1", "1,3:", "٣,1", "1.5", f"{2**63}"]
)
def test_an_invalid_shape_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=re.escape(f"--input {text!r} is not a shape.")) as caught:
        specifications([text])
    assert "--input 1,24:int64 for token ids" in caught.value.fix


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["1,3:int46"], "the type 'int46' is unknown.*Did you mean 'int64'"),
        (["a=1,3", "1,3"], "Some of the inputs have names.*Name each input: --input name="),
        (["a=1,3", "a=1,4"], "The input 'a' is given twice"),
    ],
)
def test_inconsistent_inputs_are_refused(texts, sentence):
    with pytest.raises(UsageError, match=sentence):
        specifications(texts)


def test_inputs_that_exceed_the_memory_are_refused_with_the_largest_axis():
    with pytest.raises(MemoryShortageError, match=r"They need 4,000 GB.*largest axis has the size 1000000000000\."):
        specifications(["1,1000000000000"])


@pytest.fixture
def tokens(folder):
    (folder / "tokens.py").write_text(TOKENS)


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        (["tokens.py:Tagger", "--input", "1,7:int64"], [[1, 7]]),
        (["tokens.py:Tagger", "--input", "1,7:int64", "--input", "1,7"], [[1, 7], [1, 7]]),
        (["tokens.py:Tagger", "--input", "mask=1,7:float32", "--input", "ids=1,7:int64"], [[1, 7], [1, 7]]),
        (["tokens.py:Dummies"], [[1, 5]]),
        (["tokens.py:inputs_by_name"], [[1, 3], [1, 3]]),
        (["tokens.py:one_tensor"], [[1, 3]]),
        (["tokens.py:two_tensors"], [[1, 3], [1, 3]]),
        (["tokens.py:images"], [[1, 2, 9, 8]]),
    ],
)
def test_a_model_gets_the_inputs_of_the_command_line_or_of_its_own_attributes(run_json, arguments, shapes):
    found = run_json("trace", *arguments)
    assert found["inputs"] == shapes
    assert found["groups"]


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("subcommand", ["plan", "prune", "export", "measure"])
def test_each_subcommand_takes_typed_inputs(run_json, folder, subcommand):
    more = {
        "plan": ["--macs", "0.7"],
        "prune": ["--macs", "0.7", "-o", "small"],
        "export": ["-o", "net.onnx"],
        "measure": ["--rounds", "6"],
    }[subcommand]
    found = run_json(subcommand, "tokens.py:Tagger", "--input", "1,7:int64", *more)
    assert found["weights"] == "the weights are those of the callable"
    if subcommand == "prune":  # the plan in the folder has the inputs
        assert run_json("trace", "tokens.py:Tagger", "--input", "1,7:int64")["inputs"] == [[1, 7]]
        assert run_json("measure", "tokens.py:Tagger", "--pruned", "small", "--rounds", "6")["input"] == [1, 7]


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(
    ("model", "code", "sentence"),
    [
        ("tokens.py:Tagger", 2, "The inputs of .* are unknown.*--input 1,24:int64"),
        ("tokens.py:sizeless", 2, "The inputs of .* are unknown"),
        ("tokens.py:odd", 4, r"The example_shape of tokens\.py:odd is \(1, 0\)\.*"),
    ],
)
def test_a_model_without_known_inputs_is_refused_with_an_example(kirsch, model, code, sentence):
    exit_code, _, err = kirsch("trace", model)
    assert exit_code == code
    assert re.search(sentence, " ".join(err.split()))


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("arguments", [["trace"], ["export", "-o", "net.onnx"], ["measure", "--rounds", "6"]])
@pytest.mark.parametrize(("given", "fixed"), [("1,7", "1,7:int64"), ("input=1,7", "input=1,7:int64")])
def test_floating_inputs_of_an_embedding_are_refused_with_the_correct_option(kirsch, arguments, given, fixed):
    subcommand, *more = arguments
    code, _, err = kirsch(subcommand, "tokens.py:Lookup", "--input", given, *more)
    assert code == 4
    assert f"must be int64: --input {fixed} on the command line." in " ".join(err.split())
    assert kirsch(subcommand, "tokens.py:Lookup", "--input", fixed, *more)[0] == 0


@pytest.mark.usefixtures("tokens")
def test_an_exported_file_has_the_input_names_of_the_forward_method(run_json):
    found = run_json("export", "tokens.py:two_tensors", "-o", "net.onnx")
    assert [value["name"] for value in found["inputs"]] == ["ids", "mask"]
