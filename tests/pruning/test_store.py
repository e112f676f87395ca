"""Saving and loading of pruned models with all kinds of example inputs."""

from __future__ import annotations

import collections
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import CheckpointError, LoadError, ModelError, PlanError, UsageError
from kirsch.graph.plan import Plan
from trace_and_cut import with_noise

X, Y = torch.randn(2, 4), torch.randn(2, 4)


class Net(nn.Module):
    """Two layers on one tensor, which `read` computes from the inputs of the model."""

    read = staticmethod(lambda x: x)

    def __init__(self, width=16):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, *args, **options):
        return self.last(self.first(self.read(*args, **options)).relu())


def net(read):
    """Return a model class with this function to read the inputs."""
    return type("Net", (Net,), {"read": staticmethod(read)})


@dataclasses.dataclass
class Fields:
    x: torch.Tensor


torch.export.register_dataclass(Fields)
Pair = collections.namedtuple("Pair", ["x", "y"])  # noqa: PYI024 - libraries use this untyped form


def run(model, inputs):
    if hasattr(inputs, "keys"):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def pruned(build, inputs, **tracing):
    model = with_noise(build()).eval()
    return kirsch.prune(model, kirsch.plan(kirsch.trace(model, inputs, **tracing), kirsch.Goal(parameters=0.6)))


NESTED = {"pair": (X, {"y": Y, "none": None}), "settings": [1, "text", False, -0.5]}
STORED = {
    "a list": (lambda xs: xs[0] + xs[1], ([X, Y],)),
    "a dict": (lambda given: given["x"] + given["y"], ({"x": X, "y": Y},)),
    "a tuple": (lambda pair: pair[0] + pair[1], ((X, Y),)),
    "nested": (lambda given: given["pair"][0] + given["pair"][1]["y"] * given["settings"][3], (NESTED,)),
    "None between": (lambda x, mask, y: x + y if mask is None else x, (X, None, Y)),
    "a flag": (lambda x, flag=False: 2 * x if flag else x, {"x": X, "flag": True}),
    "numbers": (lambda x, scale, times: x * scale * times, (X, 0.5, 3)),
    "a text": (lambda x, mode: 2 * x if mode == "twice" else x, (X, "twice")),
    "empty": (lambda x, some, more: x, (X, [], {})),
    "an ordered dict": (lambda given: given["x"], (collections.OrderedDict(x=X),)),
    "names like fields": (
        lambda name, kind, items, value: name + items[0],
        {"name": X, "kind": "k", "items": [Y], "value": 1},
    ),
    "any keywords": (lambda **named: named["p"] + named["q"], {"p": X, "q": Y}),
    "a scalar": (lambda x, scale: x * scale, (X, torch.tensor(2.0))),
    "a mask": (lambda x, mask: x.masked_fill(mask, 0), (X, X > 0)),
    "negative": (lambda x: x.float(), torch.full((2, 4), -3, dtype=torch.int8)),
    "unsigned": (lambda x: x.float(), torch.ones(2, 4, dtype=torch.uint16)),
    "the largest integer": (lambda x: x.float(), torch.full((2, 4), 2**63 - 1)),
    "half": (lambda x: x.float(), X.half()),
    "double": (lambda x: x.float(), X.double()),
    "complex": (lambda x: x.real, torch.randn(2, 4, dtype=torch.complex64)),
    "an empty tensor": (lambda x, more: torch.cat([x, more]), (X, X[:0])),
}  # fmt: skip
OBJECTS = {
    "a dataclass": (lambda given: given.x, (Fields(X),)),
    "a named tuple": (lambda given: given.x + given.y, (Pair(X, Y),)),
    "keys that are not text": (lambda given: given[0], ({0: X},)),
    "infinity": (lambda x, most: x.clamp(max=most), (X, math.inf)),
}


@pytest.mark.parametrize("name", STORED)
def test_inputs_of_plain_data_are_stored_and_the_loaded_model_is_equal(name, tmp_path):
    read, inputs = STORED[name]
    small = pruned(net(read), inputs)
    kirsch.save(small, tmp_path / "small")
    text = (tmp_path / "small" / "plan.json").read_text()
    assert Plan.from_json(text).to_json() == text
    assert torch.equal(run(kirsch.load(tmp_path / "small", net(read)).eval(), inputs), run(small, inputs))


@pytest.mark.parametrize("name", OBJECTS)
def test_inputs_of_other_objects_must_be_given_to_load(name, tmp_path):
    read, inputs = OBJECTS[name]
    small = pruned(net(read), inputs)
    kirsch.save(small, tmp_path / "small")
    with pytest.raises(PlanError, match=r"does not store its example inputs\. .*example_inputs="):
        kirsch.load(tmp_path / "small", net(read))
    again = kirsch.load(tmp_path / "small", net(read), example_inputs=inputs)
    assert torch.equal(run(again.eval(), inputs), run(small, inputs))


def test_a_plan_without_stored_inputs_is_loaded_with_example_inputs(tmp_path):
    read, inputs = STORED["a list"]
    small = pruned(net(read), inputs)
    small._kirsch_plans = [json.dumps(json.loads(text) | {"inputs": []}) for text in small._kirsch_plans]
    kirsch.save(small, tmp_path / "small")
    assert torch.equal(kirsch.load(tmp_path / "small", net(read), example_inputs=inputs)(*inputs), small(*inputs))


def test_a_mapping_that_is_not_a_dict_is_passed_as_keywords(tmp_path):
    """An example is the BatchEncoding of a tokenizer of transformers."""
    inputs = collections.UserDict(x=X, y=Y)
    small = pruned(net(lambda x, y: x + y), inputs)
    kirsch.save(small, tmp_path / "small")
    assert torch.equal(kirsch.load(tmp_path / "small", net(lambda x, y: x + y))(**inputs), small(**inputs))


def test_a_model_pruned_twice_with_different_inputs_is_loaded(tmp_path):
    build = net(lambda x, more=None: x if more is None else x + more["y"])
    once = pruned(build, (X, None))
    twice = kirsch.prune(once, kirsch.plan(kirsch.trace(once, (X, {"y": Y})), kirsch.Goal(parameters=0.6)))
    kirsch.save(twice, tmp_path / "small")
    assert torch.equal(kirsch.load(tmp_path / "small", build)(X, {"y": Y}), twice(X, {"y": Y}))


def test_a_model_with_a_pruned_part_that_takes_nested_inputs_is_loaded(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(lambda pair, *, flag, none: pair[0] + pair[1]["y"] if flag else pair[0])()

        def forward(self, x, y):
            return self.inner((x, {"y": y}), flag=True, none=None)

    small = pruned(Outer, (X, Y), module="inner")
    kirsch.save(small, tmp_path / "small")
    for more in (
        {},
        {"example_inputs": (X, Y)},
    ):  # the stored inputs are those of the part, the given inputs are those of the model
        assert torch.equal(kirsch.load(tmp_path / "small", Outer, **more)(X, Y), small(X, Y))


def test_a_branch_that_depends_on_values_is_followed_with_the_given_inputs(tmp_path):
    class Deciding(Net):
        def forward(self, x):
            return self.last(self.first(x).relu()) if x.sum() > 1e6 else self.last(self.first(x))[:, :1]

    inputs = torch.full((2, 4), 1e6)
    small = pruned(Deciding, inputs, decisions="example")
    kirsch.save(small, tmp_path / "small")
    again = kirsch.load(tmp_path / "small", Deciding, example_inputs=inputs)
    assert torch.equal(again(inputs), small(inputs))


def test_a_traced_program_is_loaded(tmp_path):
    build = net(lambda x, y: x + y)
    small = pruned(build, {"x": X, "y": Y}, as_graph=True)
    kirsch.save(small, tmp_path / "small")
    assert torch.equal(kirsch.load(tmp_path / "small", build)(x=X, y=Y), small(x=X, y=Y))


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, nn.Module.train])
def test_build_may_return_a_model_of_another_dtype_or_mode(convert, tmp_path):
    model = with_noise(convert(Net()))
    inputs = X.to(model.first.weight.dtype)
    kirsch.save(
        kirsch.prune(model, kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(parameters=0.6))), tmp_path / "small"
    )
    assert kirsch.load(tmp_path / "small", Net).first.out_features < 16


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")  # by `Module.to`
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_complex_buffers_that_became_real_are_loaded(dtype, tmp_path):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
            self.register_buffer("kept", torch.full((3,), 1 + 2j))
            self.register_buffer("beside", torch.full((3,), 3 + 4j), persistent=False)

        def forward(self, x):
            return self.last(torch.relu(self.first(x))) * self.kept.real * self.beside.real

    small = pruned(Turned, X)
    small.kept, small.beside = small.kept.to(dtype), small.beside.to(dtype)
    kirsch.save(small, tmp_path / "small")
    again = kirsch.load(tmp_path / "small", Turned)
    for name in ("kept", "beside"):
        assert getattr(again, name).dtype is dtype
        assert torch.equal(getattr(again, name), getattr(small, name))


def normalized():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("mode", [True, False])
def test_a_loaded_model_is_in_inference_mode_for_any_mode_of_build(mode, tmp_path):
    small = pruned(normalized, X)
    kirsch.save(small.train(), tmp_path / "small")  # the mode is not stored
    again = kirsch.load(tmp_path / "small", lambda: normalized().train(mode))
    assert not any(module.training for module in again.modules())
    before = {name: value.clone() for name, value in again.state_dict().items()}
    assert torch.equal(again(X), small.eval()(X))
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_distill_trains_the_loaded_model_like_the_saved_model(tmp_path):
    small = pruned(normalized, X)
    again = kirsch.load(kirsch.save(small, tmp_path / "small"), normalized)
    teacher = with_noise(normalized())
    data = [(torch.randn(32, 4), torch.arange(32) % 3)]
    training = kirsch.Training(epochs=1, learning_rate=0.1)
    first, second = (
        kirsch.distill(model, teacher, data, training=training, check_teacher=False).model for model in (small, again)
    )
    assert not torch.equal(first[1].running_mean, small[1].running_mean)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: None, r"build of kirsch\.load returned None\. .*returns the model as it was before pruning"),
        (lambda: Net, r"build of kirsch\.load returned a type\."),
        (lambda: Net(wide=3), r"build of kirsch\.load raised an error\. TypeError: .*wide.*Give a function without"),
    ],
)
def test_a_build_that_does_not_return_a_model_is_refused(build, sentence, tmp_path):
    kirsch.save(pruned(Net, X), tmp_path / "small")
    with pytest.raises(ModelError, match=sentence):
        kirsch.load(tmp_path / "small", build)


def test_a_build_on_the_meta_device_is_refused(tmp_path):
    kirsch.save(pruned(Net, X), tmp_path / "small")
    with pytest.raises(LoadError, match="meta device, which stores no values"):
        kirsch.load(tmp_path / "small", lambda: Net().to("meta"))


def test_a_wrapped_model_is_saved_without_its_wrapper(tmp_path):
    small = pruned(Net, X)
    with pytest.raises(UsageError, match=r"DataParallel wraps the model .* kirsch\.save\(model\.module, folder\)"):
        kirsch.save(nn.DataParallel(small), tmp_path / "small")
    kirsch.save(nn.DataParallel(small).module, tmp_path / "small")


def test_saving_a_model_that_was_changed_after_pruning_is_refused(tmp_path):
    small = pruned(Net, X)
    width = small.first.out_features
    small.last = nn.Linear(width, 5)
    with pytest.raises(
        UsageError, match=rf"it had the shape \(3, {width}\) at 'last\.weight', and has the shape \(5, {width}\)"
    ):
        kirsch.save(small, tmp_path / "small")
    again = kirsch.prune(small, kirsch.plan(kirsch.trace(small, X), kirsch.Goal(parameters=0.7)))
    with pytest.raises(UsageError, match=r"changed after kirsch\.prune"):
        kirsch.save(again, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_extra_state_that_is_not_a_tensor_is_refused_and_the_older_folder_is_kept(tmp_path):
    class Counting(Net):
        def get_extra_state(self):
            return {"runs": 1}

        def set_extra_state(self, state):
            pass

    kirsch.save(pruned(Net, X), tmp_path / "small")
    before = (tmp_path / "small" / "plan.json").read_text()
    with pytest.raises(ModelError, match=r"_extra_state is a dict; .*make get_extra_state return a tensor"):
        kirsch.save(pruned(Counting, X), tmp_path / "small")
    assert (tmp_path / "small" / "plan.json").read_text() == before


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"name": "", "shape": [2, 4], "dtype": "float32"}, r"inputs\[0\]\.high is missing"),
        ({"name": "", "value": [1]}, r"'value' is \[1\], which is not"),
        ({"name": "", "value": math.nan}, "NaN is not a JSON number"),
        ({"name": "", "kind": "set", "items": []}, "kind: one of list, tuple, dict is expected"),
        ({"name": "", "kind": "list", "items": [1]}, r"inputs\[0\]\.items\[0\]: an object is expected, and 1"),
        ({"name": "", "kind": "dict", "items": [{"name": "a", "value": 1}] * 2}, "a dict with a repeated key: a, a"),
        ({"name": "", "shape": [2, -4], "dtype": "float32", "high": 0}, r"shape\[1\]: .* from 0 to .* -4"),
        ({"name": 1, "value": None}, r"inputs\[0\]\.name: a text is expected, and 1"),
    ],
)  # fmt: skip
def test_invalid_inputs_in_a_plan_are_named(entry, sentence):
    model = with_noise(Net())
    content = json.loads(kirsch.plan(kirsch.trace(model, X), kirsch.Goal(parameters=0.6)).to_json())
    with pytest.raises(PlanError, match=sentence):
        Plan.from_json(json.dumps(content | {"inputs": [entry]}))


def test_an_input_of_an_unknown_type_in_a_plan_is_named():
    model = with_noise(Net())
    content = json.loads(kirsch.plan(kirsch.trace(model, X), kirsch.Goal(parameters=0.6)).to_json())
    content["inputs"][0]["dtype"] = "float31"
    with pytest.raises(PlanError, match=r"inputs\[0\]\.dtype: one of .* and 'float31' was found"):
        kirsch.prune(model, Plan.from_json(json.dumps(content)))


def test_loading_from_a_path_without_a_saved_model_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, sentence in (
        (tmp_path / "nowhere", r"nowhere does not exist\..*Check the path"),
        (tmp_path / "file", r"file is a file\..*Give the folder of the file"),
        (tmp_path, r"does not contain a model of kirsch\.save\. Give a folder written by kirsch\.save"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            kirsch.load(path, lambda: None)
