"""The graph of a model: blockers with their lines, costs, stored inputs, and errors of models that cannot be traced."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kirsch
from kirsch.errors import GoalError, ModelError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.frameworks.pytorch.analysis.program import is_user_code
from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.graph.inputs import InputSpec, InputValue, NestedInput
from kirsch.graph.plan import Goal
from kirsch.pruning.choose import plan
from trace_and_cut import assert_pruned_correctly

TOKENS = torch.randn(2, 5, 6)


class Net(nn.Module):
    """Two linear layers with a function between them.

    A blocker contains a line of `forward`, so this class must be in this file.
    """

    def __init__(self, between, width=8, **attributes):
        super().__init__()
        self.before, self.after, self.between = nn.Linear(6, 8), nn.Linear(width, 3), between
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.after(self.between(self, self.before(x)))


FROZEN = {
    "topk": ("the result depends on the order along the axis", lambda _, x: x.topk(4)[0], 4),
    "sort": ("the result depends on the order along the axis", lambda _, x: x.sort(-1)[0], 8),
    "cumsum": ("the result depends on the order along the axis", lambda _, x: x.cumsum(-1), 8),
    "argmax": ("the result depends on the order along the axis", lambda _, x: x * x.argmax(-1, keepdim=True), 8),
    "median": ("median is computed over the axis", lambda _, x: x * x.median(-1, keepdim=True)[0], 8),
    "prod": ("prod is computed over the axis", lambda _, x: x * x.prod(-1, keepdim=True), 8),
    "index": ("the axis is indexed by a tensor", lambda _, x: x[..., [3, 1, 0]], 3),
    "gather": (
        "the axis is indexed by a tensor",
        lambda _, x: x.gather(-1, torch.zeros(2, 5, 8, dtype=torch.int64)),
        8,
    ),
    "roll": ("the axis is rolled by a fixed offset", lambda _, x: x.roll(1, -1), 8),
    "unbind": ("unbind splits the axis", lambda _, x: torch.stack(x.unbind(-1), -1), 8),
    "fft": ("there is no rule for aten.fft_rfft", lambda _, x: torch.fft.rfft(x).abs(), 5),
}


@pytest.mark.parametrize("name", FROZEN)
def test_an_operation_that_cannot_be_cut_is_a_blocker_with_its_line(name):
    reason, between, width = FROZEN[name]
    graph, _ = assert_pruned_correctly(Net(between, width), TOKENS, sizes=[])
    assert (reason, "test_trace.py") in {(b.reason, b.source.partition(":")[0]) for b in graph.blockers}
    assert sum(b.share for b in graph.blockers) > 0.5


def test_inputs_and_outputs_are_not_blockers_and_the_plan_error_names_them():
    model = nn.Linear(6, 3)
    graph = trace(model, TOKENS)
    assert graph.blockers == ()
    with pytest.raises(GoalError, match=r"100% is the least reachable.*whose units are inputs or outputs"):
        plan(graph, Goal(macs=0.5))


def test_the_values_of_an_unknown_parameter_are_refused():
    graph = trace(nn.Linear(6, 3), TOKENS)
    assert graph.values("weight").shape == (3, 6)
    with pytest.raises(UnknownNameError, match=r"There is no parameter 'weights'\. .* Did you mean 'weight'\?"):
        graph.values("weights")


def test_blockers_are_sorted_by_their_share_of_the_parameters():
    class TwoBranches(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large, self.last = nn.Linear(6, 2), nn.Linear(6, 30), nn.Linear(32, 3)

        def forward(self, x):
            return self.last(torch.cat([self.small(x).cumsum(-1), self.large(x).softmax(-1)], -1))

    graph = trace(TwoBranches(), TOKENS)
    counts = [(b.reason, round(b.share * graph.cost.parameters)) for b in graph.blockers]
    # The softmax also freezes the inputs of `last`, so all parameters of `last` except the bias are frozen.
    weights = {
        "a softmax is computed over the axis": 6 * 30 + 30 + 32 * 3,
        "the result depends on the order along the axis": 6 * 2 + 2,
    }
    assert {reason: n for reason, n in counts if reason in weights} == weights
    assert [share for _, share in counts] == sorted((share for _, share in counts), reverse=True)


def test_a_constant_tensor_is_a_blocker_with_the_line_that_uses_it():
    graph = trace(Net(lambda _, x: x * torch.arange(8.0)), TOKENS)
    assert graph.blockers[0].reason == "the axis is combined with a constant tensor"
    assert graph.blockers[0].source.startswith("test_trace.py:")
    assert graph.blockers[0].operation == "aten.mul"


@pytest.mark.parametrize(
    "function", [lambda _, x: x * torch.rand(8), lambda _, x: x + (torch.rand(8) * 2)], ids=["rand", "scaled"]
)
def test_a_tensor_of_random_numbers_is_a_blocker_that_names_random_numbers(function):
    graph = trace(Net(function), TOKENS)
    assert graph.blockers[0].reason == "the axis is combined with a tensor of random numbers"


def test_units_added_to_an_input_are_not_blockers():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

        def forward(self, x):
            return x + self.inner(x)

    graph, _ = assert_pruned_correctly(Residual(), TOKENS, sizes=[8])
    assert graph.blockers == ()


def test_attributes_that_cannot_be_updated_are_named_in_the_blocker():
    between = lambda s, x: x.view(2, 5, s.heads, s.each).flatten(2)  # noqa: E731 - the traced function
    graph = trace(Net(between, heads=2, each=4, fixed=nn.Parameter(torch.ones(2, 1))), TOKENS)
    assert sorted(group.size for group in graph.groups) == [2, 4]
    product = trace(Net(lambda s, x: x.view(10, s.heads * s.each).view(2, 5, -1), heads=2, each=4), TOKENS)
    assert product.groups == ()
    assert product.blockers[0].reason == "`heads`, `each` cannot be updated when the axis is pruned"


def test_a_width_used_as_a_number_is_a_blocker_with_the_line_of_the_arithmetic():
    graph = trace(Net(lambda _, x: x * x.shape[-1] ** -0.5), TOKENS)
    assert graph.blockers[0].reason == "the code uses the size of the axis as a number"
    assert graph.blockers[0].source.startswith("test_trace.py:")


COUNTED = {
    "matmul": lambda s, x: x @ x.transpose(1, 2) @ x,
    "einsum": lambda s, x: torch.einsum("ntc,nsc->nts", x, x) @ x,
    "scaled dot product": lambda s, x: F.scaled_dot_product_attention(x, x, x),
    "attention": lambda s, x: s.attend(x, x, x)[0],
    "recurrence": lambda s, x: s.recur(x)[0],
    "computed but only read for its shape": lambda s, x: x.flatten(1).view_as(s.unread(x)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_cost_of_frozen_operations_equals_the_operations_counted_in_a_run(name):
    parts = {
        "attention": {"attend": nn.MultiheadAttention(8, 2, batch_first=True)},
        "recurrence": {"recur": nn.LSTM(8, 8, batch_first=True)},
        "computed but only read for its shape": {"unread": nn.Linear(8, 8)},
    }
    model = Net(COUNTED[name], **parts.get(name, {}))
    graph, pruned = assert_pruned_correctly(model, TOKENS, power=-1.0)
    assert (graph.cost.parameters, graph.cost.macs) == count(model, TOKENS)
    assert graph.cost.macs > 2 * 5 * (6 * 8 + 8 * 3)
    if not graph.groups:
        assert count(pruned, TOKENS) == count(model, TOKENS)


class Point(NamedTuple):
    left: Any
    right: Any


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: {"logits": y, "none": None, "number": 3},
        lambda y: Point(y, (y * 2, None)),
        lambda y: [y, [y.argmax(-1)]],
    ],
)
def test_outputs_of_any_structure_are_traced(pack):
    class Packed(Net):
        def forward(self, x):
            return pack(super().forward(x))

    assert_pruned_correctly(Packed(lambda _, x: torch.relu(x)), TOKENS, sizes=[8])


@pytest.mark.parametrize(
    ("value", "dtype", "high"),
    [
        (torch.randn(2, 3), "float32", 0),
        (torch.tensor([[4, 9], [1, 0]]), "int64", 9),
        (torch.tensor([True, False]), "bool", 1),
        (torch.randn(2, dtype=torch.complex64), "complex64", 0),
        (torch.zeros(2, 0, dtype=torch.int32), "int32", 0),
    ],
)
def test_inputs_are_stored_by_shape_type_and_range(value, dtype, high):
    class Doubled(nn.Module):
        def forward(self, x):
            return x.to(torch.complex64) * 2

    (stored,) = trace(Doubled(), value).inputs
    assert (stored.name, stored.shape, stored.dtype, stored.high) == ("", tuple(value.shape), dtype, high)


def test_nested_inputs_are_traced_and_stored_without_the_values_of_tensors():
    class Nested(Net):
        def forward(self, pair, scale):
            return super().forward(pair[0] + pair[1]["x"]) * scale

    graph, _ = assert_pruned_correctly(Nested(lambda _, x: torch.relu(x)), ((TOKENS, {"x": TOKENS}), 2.0), sizes=[8])
    shape = InputSpec("", tuple(TOKENS.shape), "float32")
    inner = NestedInput("", "dict", (replace(shape, name="x"),))
    assert graph.inputs == (NestedInput("", "tuple", (shape, inner)), InputValue("", 2.0))


def test_a_lazy_layer_without_a_shape_is_refused():
    with pytest.raises(ModelError, match=r"'0\.weight' is lazy and has no shape yet\. Run the model once"):
        trace(nn.Sequential(nn.LazyLinear(8), nn.ReLU()), TOKENS)


def test_the_error_for_missing_inputs_names_no_line_of_the_standard_library():
    with pytest.raises(ModelError, match=r"inputs of shape none\. TypeError: missing a required argument"):
        trace(nn.Linear(6, 3), ())


def test_the_fingerprint_depends_on_the_architecture_only():
    def fingerprint(width):
        return trace(nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)), TOKENS).fingerprint

    assert fingerprint(8) == fingerprint(8)
    assert fingerprint(8) != fingerprint(9)


def test_the_graph_fits_only_the_model_with_the_traced_parameters():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = trace(model, TOKENS)
    assert graph.fits(model)
    model[0].weight = nn.Parameter(torch.zeros(8, 6))
    assert not graph.fits(model)


PIXELS = torch.rand(2, 3, 8, 8)
UNFIT = {
    "bytes": ((PIXELS * 255).to(torch.uint8), r"unsigned char.*inputs\.astype\(numpy\.float32\) / 255"),
    "double": (
        PIXELS.double(),
        r"double.*Give inputs in float32: inputs\.astype\(numpy\.float32\) .* inputs\.float\(\)",
    ),
    "double array": (PIXELS.double().numpy(), r"double.*Give inputs in float32"),
    "half": (PIXELS.half(), "Half.*Give inputs in float32"),
    "channels last": (PIXELS.permute(0, 2, 3, 1), r"channels last.*inputs\.permute\(0, 3, 1, 2\)"),
    "other channels": (torch.rand(2, 5, 8, 8), r"Check that model\(\*example_inputs\) runs"),
    "meta": (PIXELS.to("meta"), "The example inputs are on the meta device and have no values"),
    "no samples": (PIXELS[:0], r"no samples: their shapes are \(0, 3, 8, 8\).*at least one sample"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_the_error_for_inputs_of_a_wrong_type_or_layout_names_the_conversion(kind):
    inputs, sentence = UNFIT[kind]
    with pytest.raises(ModelError, match=sentence):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), inputs)


def test_a_model_on_the_meta_device_needs_inputs_on_the_meta_device():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to("meta")
    with pytest.raises(ModelError, match=r"Its parameter `0\.weight` is on the meta device.*Load its weights"):
        trace(model, PIXELS)
    assert [group.size for group in trace(model, PIXELS.to("meta")).groups] == [8]


def test_the_error_for_a_model_in_half_precision_also_suggests_to_convert_the_model():
    with pytest.raises(ModelError, match=r"inputs\.bfloat16\(\) for tensors; or convert the model"):
        trace(nn.Conv2d(3, 4, 3).bfloat16(), PIXELS)


@pytest.mark.parametrize(("array", "dtype"), [(np.array(["a"]), "<U1"), (np.array([None, 1]), "object")])
def test_arrays_that_hold_no_numbers_are_named_by_their_type(array, dtype):
    with pytest.raises(UsageError, match=rf"of dtype {dtype} and shape .*Give numbers"):
        kirsch.trace(nn.Linear(6, 8), array)
    with pytest.raises(UsageError, match=rf"of dtype {dtype} and shape .*Give numbers"):
        kirsch.trace(nn.Linear(6, 8), (torch.randn(2, 6), array))


def test_an_empty_input_is_accepted_if_another_input_has_samples():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x, earlier):
            return self.second(torch.cat([earlier, self.first(x)]))

    graph = trace(Attending(), (torch.randn(2, 6), torch.zeros(0, 8)))
    assert graph.cost.parameters == (6 + 1) * 8 + (8 + 1) * 3


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (__file__, True),
        (str(Path(sysconfig.get_path("stdlib")) / "site-packages" / "models" / "net.py"), True),
        (str(Path(sysconfig.get_path("stdlib")) / "functools.py"), False),
        (torch.__file__, False),
        ("<string>", False),
    ],
)
def test_installed_models_are_user_code_and_the_standard_library_is_not(path, expected):
    assert is_user_code(path) == expected
