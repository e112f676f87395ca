"""Methods are listed, shown in full, and written as a page."""

from __future__ import annotations

from kirsch.distillation.catalog import page


def test_all_methods_are_listed(kirsch):
    code, out, err = kirsch("methods")
    assert (code, err) == (0, "")
    head, _, rest = out.partition("\nlosses ")
    assert head.startswith("presets ")
    assert "  kd                  0.9 kd (T 4) + 0.1 labels\n" in head
    assert "  kd                  scores     KL divergence" in rest


def test_one_is_shown_in_full(kirsch):
    _, out, _ = kirsch("methods", "dkd")
    assert "preset dkd   0 → 1 over 20 epochs · dkd (T 4; alpha 1; beta 8) + 1 labels" in out
    assert "loss dkd   takes scores" in out
    assert "alpha, beta: >= 0, weights of the two terms." in out


def test_a_name_that_is_none_is_answered_with_the_nearest(kirsch):
    code, _, err = kirsch("methods", "dkdd")
    assert code == 2
    assert "There is no preset or loss 'dkdd'." in err
    assert "Did you mean 'dkd'?" in err


def test_they_come_as_json(answer):
    found = answer("methods")
    assert {one["name"] for one in found["presets"]} >= {"kd", "dkd", "minilm"}
    (kd,) = (one for one in found["presets"] if one["name"] == "kd")
    assert kd["objective"]["terms"][0]["temperature"] == 4.0
    assert [len(answer("methods", "dkd")[kind]) for kind in ("presets", "losses")] == [1, 1]


def test_the_page_is_written_as_it_is(kirsch):
    assert kirsch("methods", "--markdown")[1] == page()
