"""Tests of the comparison of a file with its model: rounding errors, random numbers, state, and NaN."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import kirsch
from kirsch.deploy.trials import TOLERANCE, Trial, compare, distance
from kirsch.errors import ModelError, NumericError

PAIR = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


class Net(nn.Module):
    """Applies a linear layer, then a function of the model and the output of the layer."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(2, 4), function
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        return self.function(self, self.layer(x))


def scaled(model, x):
    model.runs += 1
    return x * model.runs


def masked(_model, x):
    return x.masked_fill(torch.tensor([False, False, True, False]), -torch.inf)


def test_an_output_with_infinite_numbers_is_exported_with_a_note(tmp_path):
    found = kirsch.export(Net(masked), tmp_path / "m.onnx", example_inputs=PAIR).details
    (note,) = found["notes"]
    assert note.startswith("2 of the 8 values of the output '0' are infinite for the example inputs in a batch of 2. ")


def test_an_output_of_finite_numbers_is_exported_without_a_note(tmp_path):
    found = kirsch.export(Net(lambda _, x: x), tmp_path / "m.onnx", example_inputs=PAIR).details
    assert found["notes"] == []


# ------------------------------------------------------------------------------------------- rounding


def test_a_model_that_normalizes_constant_maps_is_exported(tmp_path):
    """For zeros, two instance normalizations amplify rounding errors to the size of the outputs."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4))
    found = kirsch.export(net, tmp_path / "m.onnx", example_inputs=torch.randn(2, 1, 8, 8)).details
    zero = next(trial for trial in found["trials"] if trial["inputs"] == "zero")
    assert zero["unstable"] == ["0"]
    assert zero["drift"] is None
    assert found["drift"] < TOLERANCE


@pytest.mark.parametrize("part", [nn.GroupNorm(1, 4), nn.LayerNorm(4), nn.Softmax(-1)], ids=lambda part: str(part)[:9])
def test_other_normalizations_are_exported(part, tmp_path):
    net = nn.Sequential(nn.Linear(2, 4, bias=False), part, nn.Linear(4, 4, bias=False), part)
    assert kirsch.export(net, tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] < TOLERANCE


def test_the_tolerance_for_half_precision_follows_from_its_rounding(tmp_path):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).half()
    found = kirsch.export(net, tmp_path / "m.onnx", example_inputs=PAIR.half()).details
    assert found["inputs"][0]["type"] == "float16"
    assert all(trial["drift"] <= trial["allowed"] < 0.1 for trial in found["trials"])


def test_the_tolerance_for_autocast_follows_from_its_rounding(tmp_path):
    def inside(model, x):
        with torch.autocast("cpu", torch.float16):
            return model.second(x).float()

    model = Net(inside)
    model.second = nn.Linear(4, 3)
    assert kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] < 0.01


def test_a_wrong_file_of_half_precision_is_refused(planted, tmp_path):
    """The precision of float16 is about 1e-3; the error of this file is 5e-2."""

    class Double(nn.Module):
        def forward(self, x):
            return x + x

    planted(
        "f = Constant<value_float = 2.1>() g = CastLike(f, input) y = Mul(input, g)",
        inputs="float16[batch,2] input",
        outputs="float16[batch,2] y",
    )
    with pytest.raises(
        NumericError, match=r"The output '0' differs by 5\.0e-02 of its largest value .*; \de-03 is allowed"
    ):
        kirsch.export(Double(), tmp_path / "m.onnx", example_inputs=PAIR.half())


def test_an_output_that_consists_of_rounding_errors_is_refused(tmp_path):
    """Sums of a thousand products differ between two runtimes, and the sine of a large number amplifies this."""
    chaos = Net(lambda model, x: torch.sin(1e9 * model.second(x.repeat(1, 256))))
    chaos.second = nn.Linear(1024, 64)
    with pytest.raises(NumericError, match=r"The output '0' of a Net cannot be compared .*\. Rounding errors"):
        kirsch.export(chaos, tmp_path / "m.onnx", example_inputs=PAIR)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([1.0, -np.inf], [1.5, -np.inf], 0.5),
        ([1.0, -np.inf], [1.0, np.inf], np.inf),
        ([1.0, np.nan], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [1.0, np.nan], np.inf),
        ([3, 4, 5, 6], [3, 4, 5, 7], 0.25),
        ([True, False], [True, True], 0.5),
        ([[1.0]], [1.0], np.inf),
        ([], [], 0.0),
        ([1j, 2.0], [1j, 1.0], 0.5),
    ],
)
def test_the_distance_equals_its_closed_form(expected, actual, difference):
    assert distance(np.array(expected), np.array(actual)) == difference


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: (nn.Conv2d(1, 2, 3).double(), torch.zeros(1, 1, 4, 4).double()),
            r"Give model\.float\(\) and inputs in",
        ),
        (
            lambda: (Net(lambda _, x: (x.bfloat16() * 2).float()), PAIR),
            r"in bfloat16 .*: test_trials\.py:\d+, `.*bfloat16",
        ),
    ],
    ids=["float64", "bfloat16"],
)
def test_a_type_that_the_runtime_lacks_is_refused_with_the_fix(make, sentence, tmp_path):
    model, inputs = make()
    with pytest.raises(ModelError, match=sentence) as caught:
        kirsch.export(model, tmp_path / "m.onnx", example_inputs=inputs)
    assert "kirsch.export wrote" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("returned", [lambda y: y, lambda y: y.float(), lambda y: (y.float(), y)])
def test_autocast_to_bfloat16_is_refused_with_a_fix_that_works(returned, tmp_path):
    def narrow(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=not fixed or model.training):
            return returned(model.second(x))

    model, fixed = Net(narrow), False
    model.second = nn.Linear(4, 3)
    with pytest.raises(ModelError, match=r"computes in bfloat16 cannot be exported.*enabled=self\.training"):
        kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR)
    fixed = True
    assert kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] < TOLERANCE


# ------------------------------------------------------------------------------------------- random numbers and state


DRAWING = {
    "dropout": lambda _, x: functional.dropout(x, 0.5),
    "noise": lambda _, x: x + torch.randn_like(x),
    "uniform": lambda _, x: x + torch.rand(len(x), 1),
    "gumbel": lambda _, x: functional.gumbel_softmax(x),
    "a choice of two": lambda _, x: torch.multinomial(x[:, :2].softmax(-1), 1),
    "masks": lambda _, x: x.masked_fill(torch.rand(4) < 0.5, -torch.inf).cumsum(0) + torch.tensor([0.0, 1.0, 2.0, 3.0]),
    "attention": lambda _, x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "distribution": lambda _, x: torch.distributions.Normal(x, 1.0).rsample(),
}


@pytest.mark.parametrize("function", DRAWING.values(), ids=DRAWING)
def test_a_model_that_draws_random_numbers_is_refused_with_the_line(function, tmp_path):
    model, state = Net(function), torch.random.get_rng_state()
    sentence = r"cannot compute the same outputs.*draws random numbers in inference mode: test_trials\.py:\d+, `"
    with pytest.raises(NumericError, match=sentence):
        kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR)
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_numbers_without_an_effect_are_allowed(tmp_path):
    def unused(_model, x):
        torch.rand(1)
        return functional.dropout(x, 0.0)

    model = Net(unused)
    assert kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] < TOLERANCE


def test_random_numbers_that_rarely_change_the_outputs_are_detected(tmp_path):
    """Values are dropped with a probability of 1e-6, so two runs agree; the random operation is still refused."""
    rare = Net(lambda _, x: x * torch.bernoulli(torch.full((len(x), 1), 1 - 1e-6)))
    with pytest.raises(
        NumericError,
        match=r"An ONNX file cannot compute the same outputs as a Net\. It draws random .*: test_trials\.py:\d+, `",
    ):
        kirsch.export(rare, tmp_path / "m.onnx", example_inputs=PAIR)


def test_a_forward_with_branches_in_the_graph_is_exported(tmp_path):
    branching = Net(lambda _, x: torch.cond(x.sum() > 0, lambda v: 2 * v, lambda v: v - 1, (x,)))
    assert kirsch.export(branching, tmp_path / "m.onnx", example_inputs=PAIR).details["drift"] < TOLERANCE


def test_a_model_without_outputs_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"A Net returns no tensor\."):
        kirsch.export(Net(lambda _, x: {"text": "nothing"}), tmp_path / "m.onnx", example_inputs=PAIR)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda _, x: x * random.random(), r"Two runs with the same inputs give different outputs\. Look for random"),
        (
            scaled,
            r"It changes its buffer `runs` in inference mode, so that each run starts from another state\.",
        ),
    ],
    ids=["random module", "state"],
)
def test_the_cause_of_nondeterministic_outputs_is_named(function, sentence, tmp_path):
    model = Net(function)
    with pytest.raises(NumericError, match=sentence):
        kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR)
    assert model.runs == 0


# ------------------------------------------------------------------------------------------- not finite


NOT_FINITE = {
    "NaN": (lambda _, x: x * torch.nan, "returns NaN"),
    "NaN in a column": (
        lambda _, x: x.masked_fill(torch.arange(4) == 0, torch.nan),
        "returns NaN",
    ),
    "infinity": (lambda _, x: x.abs() / 0, "returns no finite number"),
    "NaN in one of two": (
        lambda _, x: (x, {"aux": x / 0 * 0}),
        r"returns NaN for the example inputs, in its output '1\.aux'",
    ),
}


@pytest.mark.parametrize(("function", "sentence"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_model_that_returns_nan_or_no_finite_number_is_refused(function, sentence, tmp_path):
    with pytest.raises(NumericError, match=sentence) as caught:
        kirsch.export(Net(function), tmp_path / "m.onnx", example_inputs=PAIR)
    assert caught.value.exit_code == 6
    with pytest.raises(NumericError, match=sentence):
        kirsch.measure(Net(function), example_inputs=PAIR)


class DividedByItself(nn.Module):
    """Returns NaN for zeros."""

    def forward(self, x):
        return x / x.abs()


def test_inputs_for_which_the_model_returns_nan_are_not_compared(planted, tmp_path):
    """The file may return 0 for 0 / 0; on typical inputs, model and file are still compared."""
    zero = "n = Abs(input) tiny = Constant<value_float = 1e-30>() d = Add(n, tiny) "
    planted(zero + "y = Div(input, d)")
    found = kirsch.export(DividedByItself(), tmp_path / "m.onnx", example_inputs=PAIR).details["trials"]
    assert [trial["unstable"] for trial in found if trial["inputs"] == "zero"] == [["0"]]
    assert all(trial["drift"] < TOLERANCE for trial in found if trial["inputs"] != "zero")
    planted(zero + "q = Div(input, d) y = Add(q, q)")
    with pytest.raises(NumericError, match="The outputs of the exported file are not those of the model"):
        kirsch.export(DividedByItself(), tmp_path / "m.onnx", example_inputs=PAIR)


def test_a_file_that_returns_nan_is_refused(planted, tmp_path):
    class Guarded(nn.Module):
        def forward(self, x):
            return x / (x.abs() + 1e-30)

    planted("n = Abs(input) y = Div(input, n)")
    sentence = "The output '0' has another shape, or NaN or infinity in other places, for zero values in a batch of"
    with pytest.raises(NumericError, match=sentence):
        kirsch.export(Guarded(), tmp_path / "m.onnx", example_inputs=PAIR)


def test_a_comparison_of_constant_maps_is_recorded_as_unstable():
    """The model divides a map by its standard deviation, which is 0 or a rounding error for a constant map.

    It depends on the runtime which of the two it is: 0 gives NaN, a rounding error gives a finite number.
    """

    class Model:
        name = "Norm"

        def rounded(self, _inputs, _seed):
            return {"0": np.array([np.nan, 1.0])}

        def nondeterminism(self, _inputs):
            return "", ""

    class File:
        def run(self, *inputs):
            return [np.array([np.nan, 1.0]) if inputs[0][0] == 0 else inputs[0]]

    one, zeros = np.ones(2), np.zeros(2)
    compared = [Trial("example", (one,), {"0": one}), Trial("zero", (zeros,), {"0": one})]
    assert compare(Model(), File(), compared)[1]["unstable"] == ["0"]


def test_the_cause_of_nan_is_named(tmp_path):
    model = Net(lambda _, x: x)
    with pytest.raises(NumericError, match=r"The input 'x' is not finite\."):
        kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR * torch.nan)
    with torch.no_grad():
        model.layer.weight[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"Its parameter `layer\.weight` is not finite\."):
        kirsch.export(model, tmp_path / "m.onnx", example_inputs=PAIR)


def test_logits_of_minus_infinity_are_exported(tmp_path):
    artifact = kirsch.export(Net(masked), tmp_path / "m.onnx", example_inputs=PAIR)
    assert artifact.details["drift"] < TOLERANCE


def test_random_inputs_that_the_model_rejects_are_left_out(tmp_path):
    """Floating inputs are converted to indices of an embedding, so large values are invalid."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, x):
            return self.table(x.long())

    found = kirsch.export(Table(), tmp_path / "m.onnx", example_inputs=PAIR).details
    assert "large" not in {trial["inputs"] for trial in found["trials"]}
    assert found["drift"] == 0
