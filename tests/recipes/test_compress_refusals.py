"""`kirsch.compress` refuses invalid arguments, models, data and goals."""

from __future__ import annotations

import copy

import pytest
import torch

import kirsch
from kirsch.errors import DataError, GoalError, NumericError, UsageError
from kirsch.steps import Distill, Export, Measure, Prune, Recover

TRAINING = kirsch.Training(epochs=5, learning_rate=0.02)
HALF = kirsch.Goal(macs=0.5)


def test_option_distill_without_student_is_refused(trained, tmp_path):
    with pytest.raises(
        UsageError, match=r"`distill` of kirsch\.compress needs a student\. Give student=\.\.\., or remove distill\."
    ):
        kirsch.compress(trained[0], trained[2], HALF, distill=TRAINING, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"name": ""}, r"`name` of kirsch\.compress is ''\. Give text of 1 to 200 characters or None\."),
        ({"max_drop": 1.0}, r"`max_drop` of kirsch\.compress is 1\.0; expected a number of at least 0 and below 1"),
        ({"task": "classify"}, r"no task 'classify'"),
        ({"min_keep": 2.0}, r"`min_keep` of .*Prune is 2\.0; expected a number above 0 and up to 1"),
        (
            {"excluded": ["head"]},
            r"compress has no argument 'excluded'\. Arguments: model, .*Options of the plan: .*Did you mean 'exclude'",
        ),
        ({"training": TRAINING}, r"no argument 'training'\..* Give recover=kirsch\.Training\(\.\.\.\)\."),
        ({"lr": 0.1}, r"no argument 'lr'\..* Give recover=kirsch\.Training\(learning_rate=\.\.\.\)\."),
        ({"macs": 0.5}, r"no argument 'macs'\..* Write goal=kirsch\.Goal\(macs=0\.5\)\."),
        ({"params": 0.5}, r"no argument 'params'\..* Write goal=kirsch\.Goal\(parameters=0\.5\)\."),
        ({"latency_ms": 3}, r"The goal latency_ms: .*speedup"),
        ({"epochs": 3}, r"no argument 'epochs'\..* Give recover=kirsch\.Training\(epochs=\.\.\.\)\."),
        (
            {"excluded": ["head"], "steps": [Prune(goal=HALF)]},
            r"kirsch\.compress has no argument 'excluded'",
        ),
        ({"objective": "dkd", "recover": None}, r"`objective` of kirsch\.compress has no effect: without a student"),
        ({"goal": None}, r"`goal` of kirsch\.compress is missing\. Give kirsch\.Goal\(macs=0\.5\), or steps"),
        (
            {"steps": [Prune()], "exclude": ["head"]},
            r"`exclude` of kirsch\.compress has no effect together with `steps`",
        ),
        (
            {"steps": [Prune()], "recover": kirsch.Training()},
            r"`recover` of kirsch\.compress has no effect together with `steps`",
        ),
        ({"steps": [Prune()], "recover": None}, r"`recover` .* has no effect together with `steps`"),
        ({"steps": [Prune()], "norm": 2}, r"`norm` .* has no effect together with `steps`"),
        ({"steps": [Prune()], "goal": None}, r"The step 'prune' has no goal"),
    ],
)
def test_the_error_for_an_invalid_argument_names_the_argument(trained, tmp_path, argument, sentence):
    with pytest.raises(UsageError, match=sentence):
        kirsch.compress(
            **{"model": trained[0], "data": trained[2], "goal": HALF, "folder": tmp_path / "run"} | argument
        )


def test_call_that_fails_before_any_work_leaves_no_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GoalError, match="reaches the goal"):
        kirsch.compress(trained[0], trained[2], kirsch.Goal(macs=0.001))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(GoalError, match="reaches the goal"):
        kirsch.compress(trained[0], trained[2], kirsch.Goal(macs=0.001), folder=tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("goal", "steps", "sentence"),
    [
        (
            kirsch.Goal(macs=0.01),
            [Distill(epochs=1)],
            r"lead to MACs 100\.0 % of the student, .* ≤ 1 %\. No step removes units\. Add a step prune, or leave",
        ),
        (
            kirsch.Goal(parameters=0.4),
            [Prune(goal=kirsch.Goal(parameters=0.7), round_to=1), Prune(goal=kirsch.Goal(parameters=0.8), round_to=1)],
            (
                r"lead to parameters \d\d\.\d % .* ≤ 40 %\. Share of the parameters that each step leaves: prune "
                r"\d\d\.\d %, prune-2 \d\d\.\d %\. Lower `goal\.parameters` of the step 'prune-2', or "
                r"raise `goal\.parameters` of the job to 0\."
            ),
        ),
    ],
)
def test_goal_that_the_steps_cannot_reach_is_refused_before_the_first_step(trained, tmp_path, goal, steps, sentence):
    model, student, data = trained
    events = []
    with pytest.raises(GoalError, match=f"The steps cannot reach the goal: they {sentence}"):
        kirsch.compress(model, data, goal, student=student, steps=steps, folder=tmp_path / "run", listen=events.append)
    assert events == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (
            [Export(), Prune(), Measure()],
            r"The step 'prune' changes the model after .*'export'.* Move 'export' after 'prune'",
        ),
        (
            [Prune(), Export(), Recover(epochs=1), Prune(goal=HALF)],
            r"The steps 'recover', 'prune-2' change the model after .*'export'.* Move 'export' after 'prune-2'",
        ),
    ],
)
def test_step_that_changes_the_exported_model_is_refused(trained, tmp_path, steps, sentence):
    with pytest.raises(UsageError, match=sentence):
        kirsch.compress(trained[0], trained[2], HALF, steps=steps, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_data_without_labels_is_refused_before_the_first_step(trained, tmp_path):
    model, _, data = trained
    batches = [data.train.inputs[start : start + 16] for start in (0, 16, 32)]
    unlabeled = kirsch.DataSet("unlabeled", batches, data.validation, data.test)
    with pytest.raises(DataError, match=r"The first batch of the train part of unlabeled has no labels\..*'recover'"):
        kirsch.compress(model, unlabeled, HALF, folder=tmp_path / "run")
    without = kirsch.Objective(kirsch.Objective.kd().terms, label_weight=0)
    steps = [Prune(), Recover(epochs=1, objective=without)]
    assert kirsch.compress(model, unlabeled, HALF, steps=steps, folder=tmp_path / "run").met


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_model_with_non_finite_logits_is_refused(trained, tmp_path, value):
    """Without the check, argmax would return class 0 for all samples."""
    model, _, data = trained
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head.bias[0] = value
    options = {"recover": None, "folder": tmp_path / "run"}
    with pytest.raises(NumericError, match=r"The derivative of the loss for \S+ is NaN or infinite"):
        kirsch.compress(broken, data, HALF, **options)
    with pytest.raises(NumericError, match=r"returns NaN or infinity for 60 of 60 samples") as caught:
        kirsch.compress(broken, data, HALF, importance="magnitude", **options)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "run" / "report.html").exists()
