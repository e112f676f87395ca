"""Result of a verification: verdict, text and JSON."""

from __future__ import annotations

import json
import math

import pytest

from kirsch.graph.verification import Verification


def verification(error, **changes):
    return Verification(**{"error": error, "tolerance": 1e-4, "reason": "float32", "power": 0.3} | changes)


@pytest.mark.parametrize(
    ("error", "passed"),
    [(0.0, True), (1e-4, True), (math.nextafter(1e-4, 1), False), (math.inf, False), (math.nan, False)],
)
def test_an_error_within_the_tolerance_passes_and_nan_does_not(error, passed):
    assert verification(error).passed is passed


def test_the_text_has_the_verdict_the_error_and_the_tolerance():
    assert verification(3e-7).text == "equal to the masked original: error 3e-07, allowed 1e-04"
    assert verification(0.25).text == "not equal to the masked original: error 2e-01, allowed 1e-04"
    assert verification(math.nan).text == "not equal to the masked original: error nan, allowed 1e-04"


def test_the_text_counts_the_operations_with_statistics_over_the_kept_units():
    assert verification(0.0, statistics=("mean", "layer_norm_1")).text == (
        "equal to the masked original: error 0e+00, allowed 1e-04; "
        "statistics of 2 operations computed over the kept units"
    )


def test_the_text_has_the_comparisons_that_were_left_out():
    left_out = "training mode: the original raises ValueError: needs targets."
    assert verification(0.0, not_compared=(left_out,)).text == (
        "equal to the masked original: error 0e+00, allowed 1e-04; "
        "not compared: training mode: the original raises ValueError: needs targets"
    )


def test_the_json_of_a_verification_has_all_fields():
    result = verification(3e-7, statistics=("mean",), not_compared=("training mode: the original raises ValueError.",))
    assert json.loads(json.dumps(result.to_dict())) == {
        "text": result.text,
        "passed": True,
        "error": 3e-7,
        "tolerance": 1e-4,
        "reason": "float32",
        "power": 0.3,
        "statistics": ["mean"],
        "unseen": [],
        "reweighted": {},
        "not_compared": ["training mode: the original raises ValueError."],
        "undetermined": "",
    }


def test_a_verification_prints_its_verdict():
    assert str(verification(0.0)) == f"verified     {verification(0.0).text}"
    assert str(verification(1.0)) == f"not verified {verification(1.0).text}"
    assert repr(verification(1.0)) == f"<kirsch.Verification: {verification(1.0).text}>"


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_null_in_json(error):
    content = verification(error).to_dict()
    assert (content["error"], content["passed"]) == (None, False)
    json.dumps(content, allow_nan=False)
