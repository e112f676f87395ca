"""The tree of errors, its exit codes and messages."""

from __future__ import annotations

import inspect
import re

import pytest

from kirsch import errors

TREE = [thing for _, thing in inspect.getmembers(errors, inspect.isclass) if issubclass(thing, errors.KirschError)]
EXIT_CODES = {
    "KirschError": 1,
    "UsageError": 2,
    "GoalError": 2,
    "PlanError": 2,
    "RecipeError": 2,
    "ShapeError": 2,
    "UnknownNameError": 2,
    "LoadError": 4,
    "ModelError": 4,
    "DataError": 4,
    "CheckpointError": 4,
    "StoreError": 4,
    "RequirementError": 5,
    "MissingExtraError": 5,
    "MemoryShortageError": 5,
    "OutputError": 5,
    "NumericError": 6,
    "VerificationError": 6,
    "Stopped": 1,
    "Preempted": 75,
    "Interrupted": 130,
}


def test_every_error_has_its_documented_exit_code():
    assert {error.__name__: error.exit_code for error in TREE} == EXIT_CODES


def test_the_tree_in_the_docstring_is_the_class_hierarchy():
    drawn = re.findall(r"^([│├└─ ]*)(\w+)  ", errors.__doc__, re.MULTILINE)
    parents, path = {}, []
    for branch, name in drawn:
        depth = len(branch) // 4
        path[depth:] = [name]
        parents[name] = path[depth - 1] if depth else "Exception"
    assert parents == {error.__name__: error.__base__.__name__ for error in TREE}


def test_the_exit_codes_in_the_docstring_are_those_of_the_classes():
    drawn = {name: int(code) for name, code in re.findall(r"(\w+) +(\d+)(?: |$)", errors.__doc__, re.MULTILINE)}
    assert drawn == {name: EXIT_CODES[name] for name in drawn}
    assert set(drawn.values()) == {2, 4, 5, 6, 75, 130}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (("What.",), "What."),
        (("What.", "Why."), "What. Why."),
        (("What.", "", "Fix."), "What. Fix."),
        (("What.", "Why.", "Fix."), "What. Why. Fix."),
    ],
)
def test_the_message_joins_what_why_and_fix(parts, sentence):
    error = errors.KirschError(*parts)
    assert str(error) == sentence
    assert (error.what, error.why, error.fix) == (*parts, "", "")[:3]


def test_a_missing_extra_names_the_command_that_installs_it():
    error = errors.MissingExtraError("onnxruntime", "torch", "to run ONNX files")
    assert str(error) == (
        "The package 'onnxruntime' is not installed. It is needed to run ONNX files. Run: pip install \"kirsch[torch]\""
    )


def test_an_unknown_name_error_has_the_name():
    assert errors.UnknownNameError("loss", "kdd", ["kd"]).name == "kdd"


def test_a_name_is_suggested_only_if_it_is_close():
    known = ["evaluate", "teacher", "prune", "onnxruntime"]
    assert errors.nearest("PRUNE", known) == "Did you mean 'prune'?"
    assert errors.nearest("onnx", known) == "Did you mean 'onnxruntime'?"
    assert errors.nearest("quantize", known) == errors.nearest("recover", known) == ""


def test_a_long_list_of_names_is_shortened_and_counted():
    names = [f"n{number:02d}" for number in range(14)]
    assert errors.listing(names) == f"Known: {', '.join(names[:12])}, and 2 more."
    assert errors.listing(names[:12]) == f"Known: {', '.join(names[:12])}."


def test_stopped_is_not_a_subclass_of_the_errors_for_failures():
    """A handler of failures must not catch a request to stop."""
    failures = (errors.UsageError, errors.LoadError, errors.RequirementError, errors.NumericError)
    assert not issubclass(errors.Stopped, failures)


def test_an_error_without_a_message_is_described_by_its_type():
    assert errors.error_text(AssertionError()) == "AssertionError without a message."
    assert errors.error_text(ValueError("two\nlines")) == "ValueError: two."
