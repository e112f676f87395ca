"""Training settings are checked, and terms without effect give a warning."""

from __future__ import annotations

import math

import pytest

from kirsch.errors import UsageError
from kirsch.frameworks.training import Trained, Training, share_warnings


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "`epochs` .* is 0; expected a whole number of at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` .* is 0.0; expected a number above 0"),
        ({"learning_rate": math.inf}, "`learning_rate` .* is inf; expected a finite number"),
        ({"weight_decay": -1e-4}, "`weight_decay` .* is -0.0001; expected a number of at least 0"),
        ({"weight_decay": math.nan}, "`weight_decay` .* is nan; expected a finite number"),
        ({"optimizer": "adam"}, "`optimizer` .* is 'adam'; expected 'sgd' or 'adamw'"),
        ({"schedule": "cosin"}, "`schedule` .* is 'cosin'; .*Did you mean 'cosine'"),
        ({"milestones": (0.75, 0.5)}, r"milestones are \(0.75, 0.5\); expected ascending fractions"),
        ({"milestones": (0.5, 1.0)}, r"`milestones\[1\]` .* is 1.0; expected a number above 0 and below 1"),
        ({"milestones": (30, 60)}, r"`milestones\[0\]` .* is 30; expected a number above 0 and below 1"),
        ({"milestones": (0.3,)}, "`milestones` has no effect with schedule='cosine'"),
        ({"epochs": 3, "warmup_epochs": 4}, "warmup_epochs is 4; expected a number from 0 to 3"),
        ({"warmup_epochs": -1}, "`warmup_epochs` .* is -1; expected a number of at least 0"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` .* is 0.0; expected a number above 0"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` .* is -1.0"),
        ({"seed": -1}, "`seed` .* is -1; expected a whole number"),
    ],
)
def test_invalid_setting_is_named(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        Training(**options)


def test_all_invalid_settings_are_named_in_one_error():
    with pytest.raises(UsageError, match=r"`learning_rate` .* is -1; .*`weight_decay` .* is -2"):
        Training(learning_rate=-1, weight_decay=-2)
    with pytest.raises(UsageError, match=r"`epochs` .* is 0; .* `optimizer` .* is 'x'; .*\. The default is epochs=10"):
        Training(epochs=0, optimizer="x")


def test_a_term_that_has_become_small_during_training_gives_no_warning():
    assert share_warnings({"label": 0.0007, "kd": 0.9993}, {"label": 0.05, "kd": 0.95}) == {}


def test_a_term_with_a_tiny_share_from_the_start_gives_a_warning_about_its_weight():
    shares = {"label": 0.0007, "kd": 0.9993}
    for began in (shares, {"label": 0.0, "kd": 1.0}):
        found = share_warnings(shares, began)
        assert "another convention of the loss: a loss that is averaged" in found["label"]
        assert "another convention of the loss: a loss that is summed" in found["kd"]
    assert share_warnings({"label": 0.0, "kd": 1.0}, {"label": 0.5, "kd": 0.5}) == {}


def test_a_term_without_a_gradient_at_the_start_gives_a_warning():
    shares = {"label": 1.0, "kd": 0.0}
    assert list(share_warnings(shares, shares)) == ["kd"]
    assert share_warnings(shares, shares)["kd"] == (
        "The term 'kd' is 0 on the first batch, and has no gradient. This is expected if student and teacher agree "
        "already, as copies do. Otherwise the term compares outputs that cannot differ, such as the softmax over one "
        "class."
    )
    # NaN gives no warning here, because the training run raises an error for it.
    assert share_warnings({"label": 0.0, "kd": math.nan}, {"label": 0.0, "kd": math.nan}) == {}


def test_a_training_result_prints_a_line_for_each_of_the_last_epochs():
    record = {"loss": 0.5, "terms": {"kd": 0.4, "label": 0.1}, "gradient_shares": {}, "learning_rate": 0.1}
    history = [record | {"epoch": number, "seconds": 1.0, "accuracy": 0.25} for number in range(1, 13)]
    trained = Trained({}, history, {"gradient_shares": {"kd": 0.9, "label": 0.1}})
    lines = str(trained).splitlines()
    assert lines[:2] == ["dict   12 epochs", "the first 2 epochs are in `history`"]
    assert [line.split("   ")[0] for line in lines[2:-1]] == [f"epoch {number:>2}/12" for number in range(3, 13)]
    assert "25.0 %" in lines[2]
    assert lines[-1] == "gradient on the first batch: kd 90 %, label 10 %"
    assert repr(trained) == "<kirsch.Trained: dict, 12 epochs>"
    assert "epoch 12/12" in trained._repr_html_()


def test_settings_without_names_are_refused_with_an_example():
    sentence = r"kirsch\.Training takes its options by keyword; found 3 without one\. Write kirsch\.Training\(epochs="
    with pytest.raises(UsageError, match=sentence):
        Training(3)
