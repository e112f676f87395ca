"""Losses on hidden states and attention equal the results of TextBrewer in float64."""

from __future__ import annotations

import pytest

from distillation.golden import VALUES, As, At, hs, ht, mask
from kirsch.distillation.losses.tokens import (
    attention_ce,
    attention_mse,
    cls_pkd,
    hidden_cosine,
    hidden_mse,
    token_fsp,
    token_nst,
)

GOLDEN = {
    "BERT/hidden_mse mask": lambda array: hidden_mse(array(hs), array(ht), mask=array(mask)),
    "BERT/hidden_mse nomask": lambda array: hidden_mse(array(hs), array(ht)),
    "BERT/cos nomask": lambda array: hidden_cosine(array(hs), array(ht)),
    "BERT/pkd": lambda array: cls_pkd(array(hs), array(ht)),
    "BERT/fsp(gram) nomask": lambda array: token_fsp([array(hs), array(hs)], [array(ht), array(ht)]),
    "BERT/mmd(nst) nomask": lambda array: token_nst([array(hs), array(hs)], [array(ht), array(ht)]),
    "BERT/att_mse nomask (values<=-1e-3 zeroed)": lambda array: attention_mse(
        array(As), array(At), convention="textbrewer"
    ),
    "BERT/att_mse mask": lambda array: attention_mse(array(As), array(At), convention="textbrewer", mask=array(mask)),
    "BERT/att_ce mask": lambda array: attention_ce(array(As), array(At), convention="textbrewer", mask=array(mask)),
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_token_losses_equal_the_golden_values(name, framework):
    assert float(GOLDEN[name](framework)) == pytest.approx(VALUES[name], rel=1e-9)


def test_every_golden_value_of_textbrewer_is_tested():
    assert set(GOLDEN) == {name for name in VALUES if name.startswith("BERT/")}


def test_masked_attention_mse_without_a_convention_equals_the_golden_value():
    """No score is below -100, so the conventions agree if there is a mask."""
    value = attention_mse(As, At, mask=mask)
    assert value == pytest.approx(VALUES["BERT/att_mse mask"], rel=1e-9)


def test_the_convention_textbrewer_includes_masked_keys_in_the_softmax():
    """TextBrewer computes the softmax over all 6 keys but sums over the 4 unmasked ones, so its value is lower."""
    expected = attention_ce(As[:, :, :4, :4].copy(), At[:, :, :4, :4].copy())
    assert attention_ce(As, At, mask=mask) == pytest.approx(expected, rel=1e-12)
    assert VALUES["BERT/att_ce mask"] < expected - 0.1
