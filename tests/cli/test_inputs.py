"""Example inputs on the command line."""

from __future__ import annotations

import re

import pytest

from kirsch.cli.inputs import specifications
from kirsch.errors import MemoryShortageError, UsageError
from kirsch.graph.graph import InputSpec

pytest.importorskip("torch")

TOKENS = '''
import torch
from torch import nn


class Tagger(nn.Module):
    """Embedding 50 × 16, then 16 → 32 → 3 by position."""

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


def told(inputs):
    net = Tagger()
    net.dummy_inputs = inputs
    return net


def told_by_name():
    return told({"ids": torch.tensor([[7, 6, 0], [1, 2, 3]]), "mask": torch.ones(2, 3)})


def told_a_tensor():
    return told(torch.tensor([[7, 6, 0], [1, 2, 3]]))


def told_a_tuple():
    return told((torch.tensor([[7, 6, 0], [1, 2, 3]]), torch.ones(2, 3)))


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
def test_an_input_has_sizes_and_may_have_a_name_and_a_type(text, spec):
    assert specifications([text]) == [spec]


@pytest.mark.parametrize(
    "text", ["", "1,a", "1,0", "-1,3", "1,,3", "1,3,", "=1,3", "1x=1", "1,3:", "٣,1", "1.5", f"{2**63}"]
)
def test_another_form_is_refused_with_examples(text):
    with pytest.raises(UsageError, match=re.escape(f"--input {text!r} is not a shape.")) as caught:
        specifications([text])
    assert "--input 1,24:int64 for token ids" in caught.value.fix


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["1,3:int46"], "there is no type 'int46'.*Did you mean 'int64'"),
        (["a=1,3", "1,3"], "Some of the inputs have names.*Name each: --input name="),
        (["a=1,3", "a=1,4"], "The input 'a' is given twice"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(texts, sentence):
    with pytest.raises(UsageError, match=sentence):
        specifications(texts)


def test_inputs_that_no_memory_could_hold_are_refused_with_the_number_to_lower():
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
        (["tokens.py:told_by_name"], [[1, 3], [1, 3]]),
        (["tokens.py:told_a_tensor"], [[1, 3]]),
        (["tokens.py:told_a_tuple"], [[1, 3], [1, 3]]),
        (["tokens.py:images"], [[1, 2, 9, 8]]),
    ],
)
def test_a_model_gets_the_inputs_that_are_given_or_that_it_states(answer, arguments, shapes):
    found = answer("trace", *arguments)
    assert found["inputs"] == shapes
    assert found["groups"]


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("verb", ["plan", "prune", "export", "measure"])
def test_every_verb_on_a_model_takes_typed_inputs(answer, folder, verb):
    more = {
        "plan": ["--macs", "0.7"],
        "prune": ["--macs", "0.7", "-o", "small"],
        "export": ["-o", "net.onnx"],
        "measure": ["--rounds", "6"],
    }[verb]
    found = answer(verb, "tokens.py:Tagger", "--input", "1,7:int64", *more)
    assert found["weights"] == "the weights are those that the callable gives"
    if verb == "prune":  # the plan in the folder knows the inputs
        assert answer("trace", "tokens.py:Tagger", "--input", "1,7:int64")["inputs"] == [[1, 7]]
        assert answer("measure", "tokens.py:Tagger", "--pruned", "small", "--rounds", "6")["input"] == [1, 7]


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(
    ("model", "code", "sentence"),
    [
        ("tokens.py:Tagger", 2, "does not say what its inputs look like.*--input 1,24:int64"),
        ("tokens.py:sizeless", 2, "does not say what its inputs look like"),
        ("tokens.py:odd", 4, r"The example_shape of tokens\.py:odd is \(1, 0\)\.*"),
    ],
)
def test_a_model_that_does_not_state_its_inputs_is_told_how_to_give_them(kirsch, model, code, sentence):
    found, _, err = kirsch("trace", model)
    assert found == code
    assert re.search(sentence, " ".join(err.split()))


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("verb", [["trace"], ["export", "-o", "net.onnx"], ["measure", "--rounds", "6"]])
@pytest.mark.parametrize(("given", "fixed"), [("1,7", "1,7:int64"), ("input=1,7", "input=1,7:int64")])
def test_an_embedding_that_is_given_floating_numbers_names_the_type_on_the_command_line(kirsch, verb, given, fixed):
    verb, *more = verb
    code, _, err = kirsch(verb, "tokens.py:Lookup", "--input", given, *more)
    assert code == 4
    assert f"must be int64: --input {fixed} on the command line." in " ".join(err.split())
    assert kirsch(verb, "tokens.py:Lookup", "--input", fixed, *more)[0] == 0


@pytest.mark.usefixtures("tokens")
def test_a_file_has_the_names_that_the_forward_has(answer):
    found = answer("export", "tokens.py:told_a_tuple", "-o", "net.onnx")
    assert [value["name"] for value in found["inputs"]] == ["ids", "mask"]
