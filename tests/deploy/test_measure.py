"""Tests of measurements of models and files; most replace the timing by fixed values."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.deploy import measure as measure_module
from kirsch.deploy.measure import compare_latencies
from kirsch.errors import DataError, LoadError, NumericError, ShapeError, UsageError
from kirsch.measurement.latency import Latency, Ratio, Timing
from kirsch.measurement.statistics import rate

TIMING = Timing(
    {"a": Latency(9, 8, 10, 11, 6, 100), "b": Latency(3, 2, 4, 5, 6, 300)},
    {"a": Ratio(1, 1, 1), "b": Ratio(3, 2.5, 3.5)},
    Ratio(1.01, 0.98, 1.03),
    "a",
)


DISTURBED = Timing(
    {"model": Latency(9, 8, 10, 11, 6, 100)}, {"model": Ratio(1, 1, 1)}, Ratio(1.05, 1.01, 1.09), "model"
)


@pytest.fixture
def fixed_timing(monkeypatch):
    """Call each function once and replace the timing by fixed times; return the options and outputs."""
    recorded = {}

    def interleaved(functions, **options):
        recorded.update(options, outputs={name: call() for name, call in functions.items()})
        name = options["reference"]
        return TIMING if name == "a" else Timing({name: TIMING.latencies["a"]}, {name: Ratio(1, 1, 1)}, TIMING.aa, name)

    monkeypatch.setattr(measure_module, "interleaved", interleaved)
    return recorded


def test_compare_latencies_uses_the_same_inputs_for_all_files(write, numbers, fixed_timing):
    files = {"a": write("y = Add(input, input)", "a.onnx"), "b": write("y = Neg(input)", "b.onnx")}
    found = compare_latencies(files, numbers, reference="a", rounds=8)
    assert (fixed_timing["reference"], fixed_timing["rounds"]) == ("a", 8)
    assert np.array_equal(fixed_timing["outputs"]["a"][0], 2 * numbers)
    assert np.array_equal(fixed_timing["outputs"]["b"][0], -numbers)
    assert (found.batch, found.threads, found.reference) == (5, 1, "a")
    assert (found.latencies, found.speedups, found.aa) == (TIMING.latencies, TIMING.speedups, TIMING.aa)


def test_the_result_of_compare_latencies_has_all_fields_in_json(doubling, numbers, fixed_timing, monkeypatch):
    loads = iter([0.5, 1.5])
    monkeypatch.setattr(measure_module, "load", lambda: next(loads))
    monkeypatch.setattr(measure_module, "cpu", lambda: ("Cherry 9000", []))
    content = json.loads(json.dumps(compare_latencies({"a": doubling}, numbers, reference="a").to_dict()))
    assert content.pop("runtime").startswith("onnxruntime 1.")
    assert content == {
        "latencies": {name: latency.to_dict() for name, latency in TIMING.latencies.items()},
        "speedups": {"a": {"value": 1, "low": 1, "high": 1}, "b": {"value": 3, "low": 2.5, "high": 3.5}},
        "aa": {"value": 1.01, "low": 0.98, "high": 1.03},
        "reference": "a",
        "threads": 1,
        "batch": 5,
        "machine": "Cherry 9000",
        "load_before": 0.5,
        "load_after": 1.5,
        "notes": [],
    }


def test_a_printed_measurement_notes_that_the_machine_was_disturbed(doubling, numbers, fixed_timing, monkeypatch):
    quiet = kirsch.measure(doubling, example_inputs=numbers)
    assert "note" not in str(quiet)
    monkeypatch.setattr(measure_module, "interleaved", lambda *_, **__: DISTURBED)
    found = kirsch.measure(doubling, example_inputs=numbers)
    (line,) = [line for line in str(found).splitlines() if line.startswith("note ")]
    assert line.split(None, 1)[1] == (
        "The machine was disturbed: A/A, the file against itself, is 1.05× [1.01 – 1.09], which excludes 1. "
        "Measure again on an idle machine."
    )


@pytest.mark.parametrize("threads", [0, -1, 4])
def test_a_number_of_threads_outside_1_to_the_number_of_cores_is_refused(doubling, numbers, threads, monkeypatch):
    monkeypatch.setattr(measure_module, "usable_cores", lambda: 3)
    with pytest.raises(UsageError, match=rf"`threads` is {threads}; expected 1 to 3, the cores of this machine\."):
        compare_latencies({"a": doubling}, numbers, reference="a", threads=threads)
    with pytest.raises(UsageError, match=rf"threads.* is {threads}; expected (1 to 3|a whole number)"):
        kirsch.measure(doubling, example_inputs=numbers, threads=threads)


def test_inputs_that_do_not_fit_are_refused_before_timing(doubling, fixed_timing):
    with pytest.raises(ShapeError, match=r"does not accept inputs \(1, 3\) float32\. It expects input \['batch', 2\]"):
        kirsch.measure(doubling, example_inputs=np.zeros((4, 3), np.float32))
    assert fixed_timing == {}


def test_parameters_macs_size_and_latency_are_measured_with_one_sample(fixed_timing, tmp_path):
    """3 · 4 weights and 4 biases, then 4 · 2 and 2; one multiply-accumulate per weight."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train(), torch.randn(6, 3)
    found = kirsch.measure(model, example_inputs=inputs, rounds=9)
    assert (found.parameters, found.macs) == (12 + 4 + 8 + 2, 12 + 8)
    assert found.bytes == kirsch.export(model, tmp_path / "model.onnx", example_inputs=inputs).bytes
    assert fixed_timing["rounds"] == 9
    assert fixed_timing["outputs"]["model"][0] == pytest.approx(model(inputs[:1]).detach().numpy(), abs=1e-6)
    assert (found.latency, found.aa, found.threads) == (TIMING.latencies["a"], TIMING.aa, 1)
    assert (found.accuracy, found.not_measured) == (None, ("Accuracy: no data was given.",))
    assert model.training


def test_a_model_of_two_inputs_is_measured_with_the_first_sample_of_each(fixed_timing):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, a, b):
            return self.layer(a) + b

    torch.manual_seed(0)
    model, inputs = Two(), (torch.randn(4, 3), torch.randn(4, 2))
    found = kirsch.measure(model, example_inputs=inputs)
    assert (found.parameters, found.macs) == (6, 6)
    expected = model(inputs[0][:1], inputs[1][:1]).detach().numpy()
    assert fixed_timing["outputs"]["model"][0] == pytest.approx(expected, abs=1e-6)


def test_the_accuracy_of_a_file_is_measured_and_its_parameters_are_not(doubling, numbers, fixed_timing):
    labels = numbers.argmax(-1)
    labels[0] = 1 - labels[0]
    found = kirsch.measure(str(doubling), example_inputs=numbers, data=(numbers, labels))
    assert found.accuracy == rate(4, 5)
    assert (found.parameters, found.macs) == (None, None)
    assert found.not_measured == ("Parameters and MACs: they are counted on a model, not on a file.",)
    assert found.bytes == doubling.stat().st_size


def test_a_measurement_prints_a_table(doubling, numbers, fixed_timing):
    found = kirsch.measure(doubling, example_inputs=numbers, data=(numbers, numbers.argmax(-1)))
    lines = str(found).splitlines()
    assert [line[:13].strip() for line in lines] == ["size", "latency", "accuracy", "runtime", "noise", "not measured"]
    assert lines[1].startswith("latency      9.00 µs [p10 ")
    assert lines[2] == "accuracy     100.0 % ± 21.7"  # 5 of 5 are correct; ± is half the width of the interval
    assert "\n" not in repr(found)
    assert "<td" in found._repr_html_()


def test_measure_accepts_a_split_as_data(doubling, numbers, fixed_timing):
    split = kirsch.Split(numbers, numbers.argmax(-1))
    assert kirsch.measure(doubling, example_inputs=numbers, data=split).accuracy == rate(5, 5)


def test_the_error_for_a_data_set_names_its_test_part(doubling, numbers):
    split = kirsch.Split(numbers, numbers.argmax(-1))
    data = kirsch.DataSet("numbers", train=split, validation=split, test=split, classes=("a", "b"))
    with pytest.raises(UsageError, match=r"a .*DataSet; .* Give one part of it, such as data\.test\."):
        kirsch.measure(doubling, example_inputs=numbers, data=data)


def test_an_artifact_is_measured_as_its_file(exported, fixed_timing):
    found = kirsch.measure(exported.artifact, example_inputs=exported.images)
    assert found.bytes == exported.artifact.bytes
    assert fixed_timing["outputs"]["model"][0].shape == (1, 3)


def test_a_measurement_has_all_fields_in_json(doubling, numbers, fixed_timing):
    found = kirsch.measure(doubling, example_inputs=numbers, data=(numbers, numbers.argmax(-1)))
    content = json.loads(json.dumps(found.to_dict()))
    assert content["accuracy"] == rate(5, 5).to_dict()
    assert content["latency"]["median_us"] == 9
    assert content["not_measured"] == list(found.not_measured)
    assert content.keys() == found.__dict__.keys()
    assert kirsch.measure(doubling, example_inputs=numbers).to_dict()["accuracy"] is None


def test_a_real_measurement_has_positive_times_in_order(doubling, numbers):
    found = kirsch.measure(doubling, example_inputs=numbers, rounds=6)
    assert 0 < found.latency.p10_us <= found.latency.median_us <= found.latency.p90_us <= found.latency.p95_us
    assert found.aa.low <= found.aa.value <= found.aa.high
    assert (found.latency.rounds, found.latency.calls > 0) == (6, True)


def test_keyword_inputs_are_measured(doubling, numbers):
    found = kirsch.measure(doubling, example_inputs={"input": numbers}, rounds=6)
    assert found.latency.rounds == 6


def test_the_error_for_a_missing_file_has_its_name(tmp_path, numbers):
    with pytest.raises(LoadError, match=r"gone\.onnx does not exist"):
        kirsch.measure(tmp_path / "gone.onnx", example_inputs=numbers)


class Two(nn.Module):
    """Returns an embedding and logits of two inputs, whose order matters."""

    def __init__(self, name="logits"):
        super().__init__()
        self.name, self.body = name, nn.Linear(4, 8)

    def forward(self, first, second):
        embedding = torch.relu(self.body(first))
        return {"embedding": embedding, self.name: first - 3 * second}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    torch.manual_seed(0)
    pair = {"first": torch.randn(20, 4), "second": torch.randn(20, 4)}
    path = tmp_path_factory.mktemp("two") / "two.onnx"
    with torch.no_grad():
        labels = Two().eval()(**pair)["logits"].argmax(-1)
    return kirsch.export(Two().eval(), path, example_inputs=pair), pair, labels


FORMS = {
    "a dict": lambda pair, labels: (pair, labels),
    "a dict in another order": lambda pair, labels: (dict(reversed(pair.items())), labels),
    "a tuple": lambda pair, labels: ((pair["first"], pair["second"]), labels),
    "batches of a dict with labels": lambda pair, labels: [{**pair, "labels": labels}] * 2,
    "a list of pairs": lambda pair, labels: [(pair, labels)],
}


@pytest.mark.parametrize("form", FORMS)
def test_several_inputs_are_fed_by_name_and_the_logits_are_measured(two, fixed_timing, form):
    artifact, pair, labels = two
    first = {name: value[:4] for name, value in reversed(pair.items())}
    found = kirsch.measure(artifact, example_inputs=first, data=FORMS[form](pair, labels))
    assert found.accuracy.value == 1
    np.testing.assert_allclose(
        fixed_timing["outputs"]["model"][1], pair["first"][:1] - 3 * pair["second"][:1], atol=1e-6
    )


def test_the_error_for_unknown_input_names_has_the_names_of_the_file(two):
    artifact, pair, labels = two
    renamed = {"a": pair["first"], "b": pair["second"]}
    fix = r"Give a dict with one array for each of first, second\."
    sentence = rf"The file has the inputs first, second; the given names are a, b\. {fix}"
    with pytest.raises(UsageError, match=sentence):
        kirsch.measure(artifact, example_inputs=renamed)
    with pytest.raises(UsageError, match=sentence):
        kirsch.measure(artifact, example_inputs=pair, data=(renamed, labels), rounds=6)


def test_the_error_for_outputs_without_logits_lists_their_names(two, tmp_path):
    _, pair, labels = two
    artifact = kirsch.export(Two("scores").eval(), tmp_path / "m.onnx", example_inputs=pair)
    with pytest.raises(UsageError, match="returns embedding, scores, and none of them is named logits"):
        kirsch.measure(artifact, example_inputs=pair, data=(pair, labels), rounds=6)


WRONG_LABELS = {
    "a column": lambda labels: labels[:, None],
    "one-hot rows": lambda labels: np.eye(2, dtype=int)[labels],
    "pixels": lambda labels: np.stack([labels] * 3, 1),
    "halves": lambda labels: labels + 0.5,
    "floats": lambda labels: labels.astype(np.float32),
}


FIXES = {
    "a column": r"Remove the axis of length 1: give labels\[:, 0\]",
    "one-hot rows": r"They are one-hot: give labels\.argmax\(-1\)",
    "pixels": "The accuracy is that of one class per sample",
    "halves": r"Give integers: labels\.astype\(int\)",
    "floats": r"Give integers: labels\.astype\(int\)",
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_labels_that_are_not_class_numbers_are_refused(doubling, numbers, fixed_timing, kind):
    with pytest.raises(DataError, match=rf"labels have shape .* expected class numbers, shape \(N,\)\. {FIXES[kind]}"):
        kirsch.measure(doubling, example_inputs=numbers, data=(numbers, WRONG_LABELS[kind](numbers.argmax(-1))))


def test_inputs_of_different_lengths_are_refused(two):
    artifact, pair, labels = two
    uneven = {"first": pair["first"], "second": pair["second"][:5]}
    with pytest.raises(DataError, match=r"The inputs have 20, 5 samples\. Give the same number"):
        kirsch.measure(artifact, example_inputs=pair, data=(uneven, labels), rounds=6)


def test_too_few_rounds_are_refused_before_the_export(numbers):
    with pytest.raises(UsageError, match=r"`rounds` of kirsch\.measure is 5; expected a whole number of at least 6"):
        kirsch.measure(nn.Linear(2, 2), example_inputs=numbers, rounds=5)


def test_data_without_samples_is_refused(doubling, numbers, fixed_timing):
    with pytest.raises(DataError, match="There are no inputs to predict"):
        kirsch.measure(doubling, example_inputs=numbers, data=(numbers[:0], np.zeros(0, int)))


def test_a_model_with_a_fixed_batch_size_is_measured_with_this_size_and_a_note(fixed_timing):
    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x.reshape(4, 3))

    with pytest.warns(UserWarning, match="fixed at 4"):
        found = kirsch.measure(Four(), example_inputs=torch.randn(4, 3))
    assert fixed_timing["outputs"]["model"][0].shape == (4, 2)
    assert found.macs == 4 * 6
    assert any(text.startswith("One sample: the batch size of the file is fixed") for text in found.not_measured)
    assert found.batch == 4
    assert "batch 4" in str(found)


@pytest.mark.parametrize(
    "body", ["z = Sub(input, input) y = Div(z, z)", "z = Sub(input, input) e = Exp(z) y = Div(e, z)"]
)
def test_a_file_whose_output_has_no_finite_number_is_not_timed(write, numbers, fixed_timing, body):
    with pytest.raises(
        NumericError, match=r"The output 'y' of hand\.onnx contains no finite number for the example inputs"
    ):
        kirsch.measure(write(body), example_inputs=numbers)
    assert fixed_timing == {}


def test_nested_and_boolean_inputs_are_measured(fixed_timing):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, parts, *, mask=None, twice=False):
            out = self.layer(parts["a"] - parts["b"])
            return 2 * out if twice else out

    parts = {"a": torch.randn(4, 3), "b": torch.randn(4, 3)}
    model = Nested()
    found = kirsch.measure(model, example_inputs={"parts": parts, "mask": None, "twice": True})
    expected = 2 * model.layer(parts["a"][:1] - parts["b"][:1]).detach().numpy()
    assert fixed_timing["outputs"]["model"][0] == pytest.approx(expected, abs=1e-6)
    assert found.macs == 6
