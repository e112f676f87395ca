"""The lists of presets and losses are complete, and docs/methods.md is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from kirsch.distillation.catalog import formula, losses, page, presets
from kirsch.distillation.losses import LOSSES
from kirsch.distillation.objective import Objective
from kirsch.distillation.presets import PRESETS
from kirsch.distillation.term import Ramp, Term

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_docs_methods_md_is_up_to_date():
    assert PAGE.read_text() == page(), "Regenerate it: kirsch methods --markdown > docs/methods.md"


def test_all_presets_and_losses_are_listed():
    assert [entry["name"] for entry in presets()] == list(PRESETS)
    assert [entry["name"] for entry in losses()] == list(LOSSES)


@pytest.mark.parametrize("entry", [*presets(), *losses()], ids=lambda entry: entry["name"])
def test_each_preset_and_loss_has_a_description_and_a_source(entry):
    assert entry["what"].endswith(".")
    assert entry["source"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Objective.kd(), "0.9 kd (T 4) + 0.1 labels"),
        (Objective.labels(), "1 labels"),
        (Objective.preset("causal"), "0.5 kd (T 1) + 0.5 labels, for the next token"),
        (
            Objective(
                (
                    Term("dkd", Ramp(0.0, 2.0, 10.0), temperature=Ramp(4.0, 1.0, 5.0)),
                    Term("fitnet", 3.0, student_layer="layer2", teacher_layer="layer3", adapter="fitnet"),
                    Term("hcl", 1.0, student_layer="auto", options={"sizes": (2, 1)}),
                ),
                label_weight=0.0,
            ),
            (
                "0 → 2 over 10 epochs · dkd (T 4 → 1 over 5 epochs) + 3 fitnet (layer2 ↔ layer3; adapter fitnet) "
                "+ 1 hcl (auto; sizes (2, 1))"
            ),
        ),
    ],
)
def test_the_formula_of_an_objective_is_a_sum(objective, words):
    assert formula(objective) == words
