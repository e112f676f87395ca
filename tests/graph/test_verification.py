"""What a verification says."""

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


def test_the_sentence_says_what_was_found_and_allowed():
    assert verification(3e-7).text == "equal to the masked original: error 3e-07, allowed 1e-04"
    assert verification(0.25).text == "not equal to the masked original: error 2e-01, allowed 1e-04"
    assert verification(math.nan).text == "not equal to the masked original: error nan, allowed 1e-04"


def test_the_sentence_counts_statistics_that_follow_the_kept_width():
    assert verification(0.0, statistics=("mean", "layer_norm_1")).text == (
        "equal to the masked original: error 0e+00, allowed 1e-04; statistics of 2 operations follow the kept width"
    )


def test_a_verification_as_json_holds_all_it_knows():
    proof = verification(3e-7, statistics=("mean",))
    assert json.loads(json.dumps(proof.to_dict())) == {
        "text": proof.text,
        "passed": True,
        "error": 3e-7,
        "tolerance": 1e-4,
        "reason": "float32",
        "power": 0.3,
        "statistics": ["mean"],
        "unseen": [],
        "reweighted": {},
    }


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_json_has_null_where_it_knows_no_number(error):
    found = verification(error).to_dict()
    assert (found["error"], found["passed"]) == (None, False)
    json.dumps(found, allow_nan=False)
