"""The error for a wrong argument names the found value, the expected type, or the fix."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.arguments import checked
from kirsch.errors import UsageError

X = np.zeros((4, 2), np.float32)


@checked
def sizes_of(sizes: dict[str, int], others: list[dict[str, int]], names: tuple[str, ...] = ()) -> Any:
    return sizes, others, names


def test_a_wrong_key_of_a_dict_is_named_with_the_argument():
    with pytest.raises(
        UsageError, match=r"^A key of `sizes` of \S*sizes_of is 3; expected text\. Give a dict from text"
    ):
        sizes_of({3: 4}, [])
    with pytest.raises(UsageError, match=r"^A key of `others\[1\]` of \S*sizes_of is 3; expected text\."):
        sizes_of({}, [{"a": 1}, {3: 4}])


@pytest.mark.parametrize("view", [dict.keys, dict.values])
def test_views_of_a_dict_are_accepted_for_a_sequence(view):
    assert sizes_of({}, [], view({"a": "a"})) == ({}, [], ("a",))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kirsch.Objective.kd(label_loss="binary"),
            (
                r"^kirsch\.Objective\.kd has no argument 'label_loss'\. Known: temperature, weight\. "
                r"Write kirsch\.Objective\(\.\.\., label_loss='binary'\)\.$"
            ),
        ),
        (lambda: kirsch.Objective.kd(4.0), r"Its arguments are temperature, weight; pass them by name\.$"),
        (lambda: kirsch.Goal(0.5), r"Its arguments are macs, parameters, size, memory, of; pass them by name\.$"),
        (lambda: kirsch.Ramp(0.0, 1.0, 5.0, 2.0), r"are start, end, epochs, after; pass after by name\.$"),
        (lambda: kirsch.ensemble([], "logits"), r"; pass combine, activation, outputs by name\.$"),
        (lambda: kirsch.ArrayData(X, X, 8), r"; pass batch_size, augment, ids, views, seed by name\.$"),
        (lambda: kirsch.GeneratedData(print, 8, 4), r"; pass batch_size, views, seed by name\.$"),
        (lambda: kirsch.DataSet("d", X, X, X, ("a", "b")), r"; pass classes, augment by name\.$"),
        (lambda: kirsch.plan(), r"^kirsch\.plan was called with the wrong arguments: missing a required argument"),
        (lambda: kirsch.TeacherStore("store"), r"'specification'\. Write kirsch\.TeacherStore\.open\(folder\)"),
        (lambda: kirsch.steps.Prune(norm="1"), r"Prune is '1'; expected 1 or 2\. The default is norm=2\."),
        (lambda: kirsch.distill_chain(3, []), r"Give a list of models or kirsch\.TeacherStore objects\.$"),
        (lambda: kirsch.Term("kd", options=[]), r"expected a dict from text to any object|Give a dict from text to"),
        (lambda: kirsch.Goal(macs=np.ones(3)), r"is an ndarray of shape \(3,\); expected a number or None\."),
        (lambda: kirsch.Objective(combine_teachers="x"), r"expected 'probabilities', 'logits', 'confidence' or 'sum'"),
        (
            lambda: kirsch.Objective(teacher_outputs=3),
            r"Give 'logits', 'probabilities', a list of 'logits', 'probabilities' or None, or None\.$",
        ),
        (
            lambda: kirsch.plan(None, keep={"a": 0}),
            r"at least 1 or a number above 0 and up to 1\. .*Give a number of units",
        ),
        (lambda: kirsch.Plan.from_json(3), r"is 3\. Give text or bytes\.$"),
    ],
)
def test_an_error_names_the_found_value_the_expected_type_or_the_fix(call, message):
    with pytest.raises(kirsch.KirschError, match=message):
        call()


def test_a_class_in_place_of_an_instance_is_refused_with_the_fix():
    with pytest.raises(kirsch.KirschError, match=r"is the class Linear; .* Make an instance: Linear\(\.\.\.\)"):
        kirsch.measure(nn.Linear, example_inputs=torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tinybert", 'kirsch.Objective.preset("tinybert")'),
        ("tinybrt", 'kirsch.Objective.preset("tinybert")'),
        ("pixel-kd", 'kirsch.Objective((kirsch.Term("pixel-kd"),))'),
        ("unknown", "kirsch.Objective.kd()"),
    ],
)
def test_a_string_in_place_of_an_objective_is_refused_with_the_fix(name, call):
    model, x = nn.Linear(3, 2), torch.zeros(2, 3)
    with pytest.raises(kirsch.KirschError, match=re.escape(f"Give {call}.")):
        kirsch.distill(model, model, [(x, torch.zeros(2).long())], objective=name)


MODEL = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: kirsch.Training(lr=0.1), "Did you mean 'learning_rate'?"),
        (lambda: kirsch.steps.Recover(lr=0.1), "Did you mean 'learning_rate'?"),
        (lambda: kirsch.Term("kd", T=4.0), "Did you mean 'temperature'?"),
        (lambda: kirsch.ArrayData(np.zeros((2, 2)), None, bs=4), "Did you mean 'batch_size'?"),
        (lambda: kirsch.distill(MODEL, MODEL, [], epochs=3), "Write training=kirsch.Training(epochs=3)."),
        (lambda: kirsch.fit(MODEL, [], lr=0.1), "Write training=kirsch.Training(learning_rate=0.1)."),
        (lambda: kirsch.fit(MODEL, [], milestones=(0.5,)), "Write training=kirsch.Training(milestones=...)."),
        (lambda: kirsch.plan(None, macs=0.5), "Write goal=kirsch.Goal(macs=0.5)."),
        (lambda: kirsch.plan(None, params=0.5), "Write goal=kirsch.Goal(parameters=0.5)."),
        (lambda: kirsch.plan(None, color=1), "Leave it out."),
    ],
)
def test_an_unknown_argument_names_the_argument_that_was_meant(call, fix):
    with pytest.raises(kirsch.errors.UsageError, match=r"has no argument '\w+'\. Known: ") as caught:
        call()
    assert caught.value.fix == fix
