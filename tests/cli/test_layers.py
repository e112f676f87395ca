"""The subcommands that look at or change single layers: sparsify and sensitivity."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import safetensors.numpy
from typer.main import get_command

import kirsch as package
from kirsch.cli.app import app
from kirsch.pruning.sensitivity_options import SensitivityOptions
from kirsch.pruning.sparsity.options import SparsityOptions

pytest.importorskip("torch")

TEACHER, DATA = "nets.py:teacher", ("--data", "nets.py:stripes")


@pytest.fixture(autouse=True)
def _in_folder(folder):
    return folder


@pytest.mark.parametrize(
    ("command", "function", "options"),
    [("sparsify", package.sparsify, SparsityOptions), ("sensitivity", package.sensitivity, SensitivityOptions)],
)
def test_each_option_of_the_function_has_a_flag(command, function, options):
    flags = {parameter.name: parameter.opts[0] for parameter in get_command(app).commands[command].params}
    expected = {name: f"--{name.replace('_', '-')}" for name in options.model_fields}
    assert flags.items() >= expected.items()
    assert expected.keys() <= inspect.signature(function).parameters.keys()


def test_sparsify_writes_weights_with_zeros_that_the_other_subcommands_read(kirsch, run_json):
    found = run_json("sparsify", TEACHER, "--sparsity", "0.5", "--exclude", "head", "-o", "zeros.safetensors")
    weights = safetensors.numpy.load_file("zeros.safetensors")
    masked = [weights[name] for name in ("first.weight", "second.weight")]
    assert sum(int((each == 0).sum()) for each in masked) == found["zeros"] == sum(each.size for each in masked) // 2
    assert np.all(weights["head.weight"] != 0)
    assert found["kept"]["head.weight"] == "excluded by `exclude`"
    assert found["file"] == "zeros.safetensors"
    run_json("trace", TEACHER, "--weights", "zeros.safetensors")
    code, out, _ = kirsch("sparsify", TEACHER, "--pattern", "2:4", "-o", "zeros.safetensors")
    assert code == 0
    assert "50.0 % zeros" in out
    assert "zeros.safetensors" in out
    assert "second.weight" in out


@pytest.mark.parametrize("importance", ["wanda", "sparsegpt"])
def test_sparsify_reads_calibration_samples_of_a_data_source(kirsch, run_json, importance):
    arguments = ("sparsify", TEACHER, "--sparsity", "0.5", "--importance", importance, "-o", "zeros.safetensors")
    found = run_json(*arguments, *DATA)
    assert found["options"]["importance"] == importance
    assert found["sparsity"] == pytest.approx(0.5, abs=0.01)
    code, _, err = kirsch(*arguments)
    assert code == 2
    assert "`data` of kirsch.sparsify is missing" in err


def test_sparsify_does_not_replace_another_file(kirsch, folder):
    (folder / "notes.txt").write_text("my notes")
    code, _, err = kirsch("sparsify", TEACHER, "--sparsity", "0.5", "-o", "notes.txt")
    assert code == 5
    assert "not a safetensors file" in err
    assert (folder / "notes.txt").read_text() == "my notes"


def test_sensitivity_shows_and_stores_the_quality_without_a_part_of_each_group(kirsch, run_json, folder):
    options = ("--fractions", "0.25", "--fractions", "0.5", "--metric", "balanced_accuracy")
    found = run_json("sensitivity", TEACHER, *DATA, *options, "-o", "result.json")
    assert found["fractions"] == [0.25, 0.5]
    assert found["metric"] == "balanced_accuracy"
    assert found["samples"] == 30  # the validation part
    assert [(row["name"], [point["removed"] for point in row["points"]]) for row in found["rows"]] == [
        ("first", [4, 8]),
        ("second", [4, 8]),
    ]
    stored = package.Sensitivity.from_json((folder / "result.json").read_bytes())
    assert stored.to_dict().items() <= found.items()
    code, out, _ = kirsch("sensitivity", TEACHER, *DATA, "--fractions", "0.5")
    assert code == 0
    assert "−50 %" in out


def test_classes_of_sensitivity_may_be_named(run_json, kirsch):
    found = run_json("sensitivity", TEACHER, *DATA, "--fractions", "0.5", "--class-weights", "dark=5")
    assert found["metric"] == "weighted accuracy"
    code, _, err = kirsch("sensitivity", TEACHER, *DATA, "--class-weights", "drak=5")
    assert code == 2
    assert "'dark'" in err


def test_sensitivity_needs_data(kirsch):
    code, _, err = kirsch("sensitivity", TEACHER)
    assert code == 2
    assert "--data" in err


def test_a_result_is_not_written_over_another_file(kirsch, folder):
    (folder / "plan.json").write_text(json.dumps({"kirsch_plan": 1}))
    code, _, err = kirsch("sensitivity", TEACHER, *DATA, "-o", "plan.json")
    assert code == 5
    assert "not a result of kirsch sensitivity" in err
