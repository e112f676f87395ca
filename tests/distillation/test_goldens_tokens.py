"""Losses on hidden states and attention against what TextBrewer gives for the same inputs in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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

CLAIMED = {
    "BERT/hidden_mse mask": lambda make: hidden_mse(make(hs), make(ht), mask=make(mask)),
    "BERT/hidden_mse nomask": lambda make: hidden_mse(make(hs), make(ht)),
    "BERT/cos nomask": lambda make: hidden_cosine(make(hs), make(ht)),
    "BERT/pkd": lambda make: cls_pkd(make(hs), make(ht)),
    "BERT/fsp(gram) nomask": lambda make: token_fsp([make(hs), make(hs)], [make(ht), make(ht)]),
    "BERT/mmd(nst) nomask": lambda make: token_nst([make(hs), make(hs)], [make(ht), make(ht)]),
    "BERT/att_mse nomask (values<=-1e-3 zeroed)": lambda make: attention_mse(
        make(As), make(At), convention="textbrewer"
    ),
    "BERT/att_mse mask": lambda make: attention_mse(make(As), make(At), convention="textbrewer", mask=make(mask)),
    "BERT/att_ce mask": lambda make: attention_ce(make(As), make(At), convention="textbrewer", mask=make(mask)),
}


@pytest.mark.parametrize("make", [np.array, lambda array: torch.tensor(array)], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", list(CLAIMED))
def test_tokens_are_charged_the_golden_value(name, make):
    assert float(CLAIMED[name](make)) == pytest.approx(VALUES[name], rel=1e-9)


def test_every_golden_value_of_this_kind_is_claimed():
    assert set(CLAIMED) == {name for name in VALUES if name.startswith("BERT/")}


def test_masked_attention_of_the_golden_inputs_is_charged_the_same_without_a_convention():
    """No score of theirs is as low as -100, so that the mask alone decides."""
    found = attention_mse(As, At, mask=mask)
    assert found == pytest.approx(VALUES["BERT/att_mse mask"], rel=1e-9)


def test_the_golden_cross_entropy_leaves_out_what_attention_spends_on_padding():
    """TextBrewer's softmax runs over all 6 keys and its sum over 4, so that it charges less than a softmax over 4."""
    whole = attention_ce(As[:, :, :4, :4].copy(), At[:, :, :4, :4].copy())
    assert attention_ce(As, At, mask=mask) == pytest.approx(whole, rel=1e-12)
    assert VALUES["BERT/att_ce mask"] < whole - 0.1
