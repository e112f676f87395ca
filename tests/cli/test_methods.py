"""The subcommand methods lists presets and losses."""

from __future__ import annotations

from kirsch.distillation.catalog import page


def test_all_methods_are_listed(kirsch):
    code, out, err = kirsch("methods")
    assert (code, err) == (0, "")
    head, _, rest = out.partition("\nlosses ")
    assert head.startswith("presets ")
    assert "  kd                  0.9 kd (T 4) + 0.1 labels\n" in head
    assert "  kd                  logits     KL divergence" in rest


def test_methods_with_a_name_shows_its_preset_and_loss(kirsch):
    _, out, _ = kirsch("methods", "dkd")
    assert "preset dkd   0 → 1 over 20 epochs · dkd (T 4; alpha 1; beta 8) + 1 labels" in out
    assert "loss dkd   takes logits" in out
    assert "alpha, beta: >= 0, weights of the two terms." in out


def test_an_unknown_name_is_refused_with_the_nearest(kirsch):
    code, _, err = kirsch("methods", "dkdd")
    assert code == 2
    assert "There is no preset or loss 'dkdd'." in err
    assert "Did you mean 'dkd'?" in err


def test_methods_are_written_as_json(run_json):
    found = run_json("methods")
    assert {one["name"] for one in found["presets"]} >= {"kd", "dkd", "minilm"}
    (kd,) = (one for one in found["presets"] if one["name"] == "kd")
    assert kd["objective"]["terms"][0]["temperature"] == 4.0
    assert [len(run_json("methods", "dkd")[kind]) for kind in ("presets", "losses")] == [1, 1]


def test_the_markdown_page_is_printed_unchanged(kirsch):
    assert kirsch("methods", "--markdown")[1] == page()
