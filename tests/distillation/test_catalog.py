"""What is listed is what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from kirsch.distillation.catalog import charged, losses, page, presets
from kirsch.distillation.losses import LOSSES
from kirsch.distillation.objective import Objective
from kirsch.distillation.presets import PRESETS
from kirsch.distillation.schedule import Ramp
from kirsch.distillation.term import Term

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == page(), "Write it anew: kirsch methods --markdown > docs/methods.md"


def test_all_are_listed():
    assert [one["name"] for one in presets()] == list(PRESETS)
    assert [one["name"] for one in losses()] == list(LOSSES)


@pytest.mark.parametrize("one", [*presets(), *losses()], ids=lambda one: one["name"])
def test_each_has_a_sentence_and_a_source(one):
    assert one["what"].endswith(".")
    assert one["source"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Objective.kd(), "0.9 kd (T 4) + 0.1 labels"),
        (Objective.labels(), "1 labels"),
        (Objective.preset("causal"), "0.5 kd (T 1) + 0.5 labels, of the next token"),
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
def test_what_is_charged_is_said_as_a_sum(objective, words):
    assert charged(objective) == words
