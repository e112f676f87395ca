"""Objectives: defaults of the papers, JSON, and invalid values."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import UnknownNameError, UsageError


def test_the_weights_of_kd_sum_to_1():
    found = Objective.kd()
    assert found.terms == (Term("kd", 0.9, temperature=4.0),)
    assert found.label_weight == pytest.approx(0.1)
    assert Objective.preset("kd") == found
    assert Objective.kd(temperature=2.0, weight=1.0) == Objective((Term("kd", 1.0, temperature=2.0),), label_weight=0.0)


def test_an_objective_of_labels_has_no_terms():
    assert Objective.labels(label_smoothing=0.1) == Objective(terms=(), label_weight=1.0, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("layers", "named"),
    [(("attention[0]", "bert.scores"), "attention[0]"), (("bert.scores", "attention[1]"), "attention[1]")],
    ids=["student", "teacher"],
)
def test_the_error_on_attention_scores_names_the_layer_that_returns_weights(layers, named):
    student, teacher = layers
    term = Term("attention-kl", student_layer=student, teacher_layer=teacher, options={"attention": "scores"})
    with pytest.raises(
        UsageError, match=rf"takes attention scores, but {re.escape(repr(named))} returns attention weights"
    ):
        Objective((term,))


def test_an_objective_can_be_stored_as_json():
    objective = Objective(
        (Term("kd", 0.3, temperature=2.0), Term("kd", 0.5, temperature=1.0)), label_weight=0.2, label_smoothing=0.05
    )
    content = json.loads(json.dumps(objective.to_dict()))
    terms = tuple(Term(**term) for term in content.pop("terms"))
    assert Objective(terms, **content) == objective


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_weight": -1.0}, "label_weight is -1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected at least 0 and below 1"),
        (
            {"terms": (Term("kd"),), "label_weight": 0.0, "label_smoothing": 0.1},
            "`label_smoothing` is 0.1 and has no effect with label_weight=0",
        ),
        ({"label_weight": 0.0}, "all weights are 0, so there is nothing to learn"),
        ({"terms": (Term("kd", 0.0),), "label_weight": 0.0}, "all weights are 0"),
    ],
)
def test_an_invalid_value_raises_an_error_that_names_the_value(options, sentence):
    with pytest.raises(UsageError, match=f"The objective is invalid: {sentence}"):
        Objective(**options)


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        ({"options": {"standardize": "no"}}, "`standardize` of the loss 'kd' is 'no'; expected True or False"),
        ({"options": {"standardize": 1}}, "`standardize` of the loss 'kd' is 1; expected True or False"),
        ({"loss": "dkd", "options": {"beta": "x"}}, "`beta` of the loss 'dkd' is 'x'; expected a number"),
        ({"loss": "hcl", "options": {"sizes": [4, "a"]}}, r"`sizes\[1\]` .* is 'a'; expected a whole number"),
        ({"loss": "mlkd", "options": {"temperatures": 2}}, "`temperatures` .* is 2; expected a list of numbers"),
        ({"adapter_options": {"norm": True}}, "`adapter_options` of 'kd' has no effect: with adapter='auto'"),
        (
            {"loss": "at", "adapter": "none", "adapter_options": {"norm": True}},
            "`adapter_options` of 'at' has no effect",
        ),
    ],
)
def test_an_option_of_the_wrong_type_or_without_effect_is_refused(term, sentence):
    with pytest.raises(UsageError, match=f"The objective is invalid: {sentence}"):
        Objective((Term(**term),))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"norm": "no"}, "`norm` of the adapter 'conv' is 'no'; expected True or False"),
        ({"nrom": True}, "The adapter 'conv' has no option 'nrom'"),
        ({"spatial": "crop"}, "The option 'spatial' is 'crop'"),
    ],
)
def test_options_of_a_named_adapter_are_checked_with_the_objective(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        Objective((Term("fitnet", student_layer="layer1", adapter="conv", adapter_options=options),))


def test_options_of_equivalent_types_are_accepted():
    terms = Term("dkd", options={"beta": np.float32(2)}), Term("hcl", student_layer="a", options={"sizes": [4, 2]})
    assert Objective(terms).terms == terms


@pytest.mark.parametrize("options", [{"temperature": math.nan}, {"weight": math.inf}, {"weight": math.nan}])
def test_numbers_of_a_term_must_be_finite(options):
    with pytest.raises(UsageError, match=f"`{next(iter(options))}` .*; expected a finite number"):
        Term("kd", **options)


def test_a_printed_objective_is_the_sum_that_the_command_methods_shows():
    assert str(Objective.preset("at")) == "0.9 kd (T 4) + 1000 at (auto) + 0.1 labels"
    assert repr(Objective.labels()).startswith("Objective(terms=(), label_weight=1.0")


@pytest.mark.parametrize("function", [Objective.kd, Objective.labels])
def test_numbers_of_an_objective_are_passed_by_name(function):
    with pytest.raises(UsageError):
        function(0.1)


def test_all_invalid_values_are_in_one_error():
    with pytest.raises(UsageError, match=r"label_weight is -3; .*; label_smoothing is 2"):
        Objective(label_weight=-3, label_smoothing=2)
    sentence = r"The term is invalid: the weight of 'kd' is -2; .*; the temperature of 'kd' is -1; a number above 0"
    with pytest.raises(UsageError, match=sentence):
        Term("kd", -2, temperature=-1)


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_a_weight_of_kd_that_is_not_from_0_to_1_is_refused(weight):
    with pytest.raises(UsageError, match=f"The weight of the soft targets is {weight}; expected 0 to 1"):
        Objective.kd(weight=weight)


def test_an_unknown_loss_is_refused_at_construction():
    with pytest.raises(UnknownNameError, match=r"There is no loss 'kdd'\. Known: .*kd.* Did you mean 'kd'\?"):
        Objective((Term("kdd"),))
