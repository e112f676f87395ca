"""Layers that compensation leaves out, padding, errors in the record, and wrong arguments."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import kirsch
from kirsch.errors import DataError, NumericError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.calibration import paired_inputs as module
from kirsch.frameworks.pytorch.calibration.paired_inputs import paired_inputs
from kirsch.frameworks.pytorch.surgery import interface
from kirsch.pruning.compensation.record import Compensation
from trace_and_cut import with_noise

X = torch.randn(64, 6)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))


@pytest.fixture
def case(removing):
    model = mlp()
    return model, removing(model, X[:2], {"0": [1, 2, 3, 8]})


def relative_error(model, small, *inputs):
    y, z = model(*inputs), small(*inputs)
    return ((y - z).norm() / y.norm()).item()


# ---------------------------------------------------------------------------------------------------- record


def test_the_record_has_the_error_of_the_outputs_without_and_with_each_method(case):
    model, plan = case
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=[X[:40], X[40:]])
    errors = found.compensation.output_errors
    assert list(errors) == ["none", "least_squares"]
    assert errors["none"] == pytest.approx(relative_error(model, kirsch.prune(model, plan), X), rel=1e-4)
    assert errors["least_squares"] == pytest.approx(relative_error(model, found.model, X), rel=1e-4)
    assert errors["least_squares"] < errors["none"]
    (layer,) = found.compensation.layers
    assert (layer.weight, layer.positions, layer.inputs, layer.with_bias) == ("2.weight", 64, 8, True)


def test_the_record_prints_the_errors_and_is_strict_json(case):
    found = kirsch.prune_with_verification(*case, compensate="bias", data=X)
    (line,) = (line for line in str(found).splitlines() if line.startswith("compensated"))
    assert "without compensation" in line
    assert "with bias" in line
    assert json.loads(json.dumps(found.compensation.to_dict(), allow_nan=False))["layers"][0]["weight"] == "2.weight"
    assert "\n" not in repr(found.compensation)


def test_the_cut_is_verified_before_compensation(case):
    plain, found = (
        kirsch.prune_with_verification(*case, **options) for options in ({}, {"compensate": "bias", "data": X})
    )
    assert found.verification == plain.verification
    assert plain.compensation is None


def test_the_record_shows_values_that_were_not_stored(case, monkeypatch):
    """Planted fault: the framework does not set the weights. The errors are computed from the stored weights."""
    monkeypatch.setattr(interface, "set_parameters", lambda *_: None)
    found = kirsch.prune_with_verification(*case, compensate="least_squares", data=X).compensation
    assert found.layers[0].after == found.layers[0].before
    assert found.output_errors["least_squares"] == found.output_errors["none"]


def test_an_increased_error_is_a_warning(case, monkeypatch):
    original = interface.set_parameters
    negated = lambda pruned, graph, values: original(pruned, graph, {name: -value for name, value in values.items()})  # noqa: E731
    monkeypatch.setattr(interface, "set_parameters", negated)
    with pytest.warns(UserWarning, match="'least_squares' has increased the error of the outputs"):
        kirsch.prune(*case, compensate="least_squares", data=X)


def test_each_method_that_increases_the_error_is_named():
    errors = {"none": 0.9, "least_squares": 0.26, "batch_norm": 0.43}
    (note,) = Compensation(errors).notes
    assert note.startswith(
        "'batch_norm' has increased the error of the outputs on the calibration data from 26.0 % to 43"
    )


def test_a_fit_with_fewer_positions_than_inputs_has_a_note(case):
    text = "1 layer has fewer calibration positions than inputs, such as `2.weight` with 3 positions and 8 inputs"
    for samples, expected in ((3, True), (64, False)):
        found = kirsch.prune_with_verification(*case, compensate="least_squares", data=X[:samples])
        assert any(text in note for note in found.notes) is expected


def test_labels_in_the_batches_are_ignored(case):
    model, plan = case
    labeled = kirsch.prune(model, plan, compensate="least_squares", data=[(X, torch.zeros(64, dtype=torch.long))])
    assert torch.equal(labeled[2].weight, kirsch.prune(model, plan, compensate="least_squares", data=X)[2].weight)


def test_a_compensated_model_is_saved_and_loaded_bit_for_bit(case, tmp_path):
    small = kirsch.prune(*case, compensate="least_squares", data=X)
    kirsch.save(small, tmp_path / "small")
    assert torch.equal(kirsch.load(tmp_path / "small", mlp)(X), small(X))


def test_a_plan_from_json_a_part_and_a_traced_program_are_compensated(removing):
    model = nn.Sequential(nn.Linear(6, 6), mlp())
    for options, name in (({}, "1.0"), ({"module": "1"}, "0"), ({"as_graph": True}, "1.0")):
        plan = kirsch.Plan.from_json(removing(model, X[:2], {name: [0, 1]}, **options).to_json())
        found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=X)
        errors = found.compensation.output_errors
        assert errors["least_squares"] < 0.9 * errors["none"]
        assert errors["least_squares"] == pytest.approx(relative_error(model, found.model, X), rel=1e-3)


def test_encoders_of_transformers_are_compensated_on_batches_of_a_tokenizer(transformers):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **settings)).eval()
    with torch.no_grad():  # the initial weights are so small that the outputs hardly depend on the inputs
        for parameter in model.parameters():
            parameter.mul_(3)
    ids, mask = torch.randint(1, 50, (32, 9)), torch.ones(32, 9, dtype=torch.long)
    plan = kirsch.plan(kirsch.trace(model, {"input_ids": ids[:2]}), kirsch.Goal(macs=0.6), round_to=1)
    data = [{"input_ids": ids, "attention_mask": mask}]
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=data).compensation
    assert not found.skipped
    assert found.output_errors["least_squares"] < 0.6 * found.output_errors["none"]


# ------------------------------------------------------------------------------------------------------- cost


class Counting(nn.Module):
    """Returns its input, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def test_a_run_ends_when_it_has_reached_the_layers():
    model = nn.Sequential(*mlp(), Counting()).train()
    pruned, seen = copy.deepcopy(model), []

    def see(name, groups, x, y):
        seen.append((name, groups, tuple(x.shape), tuple(y.shape)))

    graph = kirsch.trace(model, X[:2])
    calls = model[3].calls
    paired_inputs(graph, pruned, X, ["2.weight"], lambda _name, _outputs: None, see)
    assert seen == [("2.weight", (1, 1), (64, 12, 1), (64, 12, 1))]
    assert (model[3].calls, pruned[3].calls) == (calls, 0)
    assert model.training
    assert model[0].training


def convolutions():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, stride=2), nn.Flatten()
    )


def test_a_convolution_is_observed_at_256_positions_of_a_sample(removing):
    model, images = convolutions(), torch.randn(6, 3, 40, 40)
    plan = removing(model, images[:2], {"0": [1, 2]})
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=[images[:4], images[4:]])
    assert found.compensation.layers[0].positions == 6 * 256  # of 6 · 400
    few = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=[images[:, :, :20, :20]])
    assert few.compensation.layers[0].positions == 6 * 100


def test_the_fit_does_not_depend_on_how_many_positions_are_passed_at_once(removing, monkeypatch):
    model, images = convolutions(), torch.randn(8, 3, 12, 12)
    plan = removing(model, images[:2], {"0": [1, 2]})
    whole = kirsch.prune(model, plan, compensate="least_squares", data=[images])
    monkeypatch.setattr(module, "MOST_NUMBERS", 1000)
    torch.testing.assert_close(
        kirsch.prune(model, plan, compensate="least_squares", data=[images])[2].weight, whole[2].weight
    )


# ------------------------------------------------------------------------------------------- layers left out


class Tied(nn.Module):
    """A language model whose last layer has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.head(x + self.down(self.up(x).relu()))


IDS = torch.randint(0, 11, (24, 7))


def test_a_tied_weight_is_left_out_with_a_reason_and_stays_tied(removing):
    model = with_noise(Tied())
    plan = removing(model, {"input_ids": IDS[:2]}, {"down": [2, 3]})
    found = kirsch.prune_with_verification(model, plan, compensate="least_squares", data=[{"input_ids": IDS}])
    small = found.model
    assert list(found.compensation.skipped) == ["embed.weight"]
    assert any("Not compensated although inputs were removed: `embed.weight` (its" in text for text in found.warnings)
    assert small.head.weight is small.embed.weight
    assert torch.equal(small.head.weight, model.embed.weight[:, [0, 1, 4, 5, 6, 7]])
    assert not torch.equal(small.up.weight, model.up.weight[:, [0, 1, 4, 5, 6, 7]])


class Unusual(nn.Module):
    """Layers that read the same units and cannot be compensated, beside one that can."""

    def __init__(self):
        super().__init__()
        self.stem, self.plain = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1)
        self.transposed = nn.ConvTranspose1d(8, 4, 3, padding=1)
        self.normed = parametrizations.weight_norm(nn.Conv1d(8, 4, 1))
        self.twice = nn.Conv1d(8, 8, 1)
        self.recurrent = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        x = self.stem(x).tanh()
        recurrent = self.recurrent(x.mT)[0].mT
        again = self.plain(self.twice(self.twice(x).tanh()).tanh())
        return self.plain.bias[:, None] + self.transposed(x) + self.normed(x) + recurrent + again


def test_layers_that_cannot_be_fitted_exactly_are_left_out_with_a_reason(removing):
    model, x = with_noise(Unusual()), torch.randn(8, 3, 6)
    found = kirsch.prune_with_verification(
        model, removing(model, x[:2], {"stem": [1, 5]}), compensate="least_squares", data=[x]
    )
    skipped = found.compensation.skipped
    assert {"transposed.weight", "twice.weight", "recurrent.weight_ih_l0"} <= set(skipped)
    assert any(name.startswith("normed.parametrizations") for name in skipped)
    assert set(skipped.values()) == {"its weight is shared, computed, or not that of a linear layer or convolution"}
    # The bias of `plain` is read twice: only its weight is fitted.
    assert [(layer.weight, layer.with_bias) for layer in found.compensation.layers] == [("plain.weight", False)]
    assert torch.equal(found.model.plain.bias, model.plain.bias)


def test_bias_compensation_leaves_out_layers_without_bias_and_names_the_alternatives(removing):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    plan = removing(model, X[:2], {"0": [0, 1]})
    found = kirsch.prune_with_verification(model, plan, compensate="bias", data=X)
    assert found.compensation.skipped == {
        "2.weight": "it has no bias of its own; least_squares and batch_norm do not need one"
    }
    assert found.compensation.output_errors["bias"] == found.compensation.output_errors["none"]


def test_layers_with_too_many_inputs_are_left_out(case, monkeypatch):
    monkeypatch.setattr("kirsch.pruning.compensation.layers.MOST_COLUMNS", 7)
    found = kirsch.prune_with_verification(*case, compensate="least_squares", data=X).compensation
    assert found.skipped == {"2.weight": "it has 8 inputs, and at most 7 are supported"}


def test_a_branch_that_the_data_do_not_reach_is_left_out(removing):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.c(x) if len(x) < 3 else self.b(x)

    model = with_noise(Branch())
    found = kirsch.prune_with_verification(
        model, removing(model, X[:2], {"a": [0]}), compensate="least_squares", data=X
    ).compensation
    assert found.skipped == {"c.weight": "it does not read activations exactly once in a run of the model"}


# -------------------------------------------------------------------------------------------------- padding


def test_padding_does_not_count(removing):
    """A padded batch gives the weights and errors of the sequences without padding."""
    model = with_noise(Tied())
    plan = removing(model, {"input_ids": IDS[:2]}, {"up": [0, 4, 7]})
    lengths = [3 + index % 5 for index in range(24)]
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    padded = [{"input_ids": IDS * mask, "attention_mask": mask}]
    alone = [{"input_ids": ids[None, :length]} for ids, length in zip(IDS, lengths, strict=True)]
    first, second = (
        kirsch.prune_with_verification(model, plan, compensate="least_squares", data=data) for data in (padded, alone)
    )
    torch.testing.assert_close(first.model.down.weight, second.model.down.weight)
    assert first.compensation.layers[0].positions == sum(lengths)
    for name, error in first.compensation.output_errors.items():
        assert error == pytest.approx(second.compensation.output_errors[name], rel=1e-4)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"compensate": "bias"}, UsageError, "`data` of kirsch.prune is missing"),
        ({"data": X}, UsageError, "`data` of kirsch.prune has no effect"),
        ({"compensate": "biases", "data": X}, UnknownNameError, "names the compensation 'biases'.*'bias'"),
        ({"compensate": ["bias", "least_squares"], "data": X}, UsageError, "both 'bias' and 'least_squares'"),
        ({"compensate": "batch_norm", "data": X}, UsageError, "no batch normalization.*compensate='least_squares'"),
        ({"compensate": "bias", "data": iter([X])}, UsageError, "iterated over only once"),
        ({"compensate": "bias", "data": []}, DataError, "has no batches"),
        ({"compensate": 3, "data": X}, UsageError, "`compensate` of kirsch.prune is 3"),
        ({"compensate": "bias", "data": X * torch.nan}, NumericError, "contain NaN or infinity"),
    ],
)
def test_wrong_arguments_are_refused_with_a_fix(case, options, error, sentence):
    with pytest.raises(error, match=rf"(?s){sentence}"):
        kirsch.prune(*case, **options)


def test_a_plan_of_blocks_is_refused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return x + F.relu(self.layer(x))

    model = with_noise(Residual())
    plan = kirsch.plan(kirsch.trace(model, X[:2]), kirsch.Goal(macs=0.8), kinds="block", data=[X])
    with pytest.raises(UsageError, match=r"removes residual blocks.*Use compensate='batch_norm'"):
        kirsch.prune(model, plan, compensate="bias", data=X)
