"""Goals, comparison and report show the numbers of the final model, whatever the steps of other packages record."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UsageError
from kirsch.jobs.step import STEPS, Step, model_cells
from kirsch.recipes.recipe import read_recipe
from kirsch.steps import Distill, Evaluate, Export, Measure, Prune, Recover, Train

MODELS = "teacher: {model: 'm:t'}\n"
STUDENT = "student: {model: 'm:s'}\n"


class Look(Step):
    """Evaluate the teacher once more."""

    def run(self, job, folder):
        record = {"model": "teacher", "did": "looked", **job.save_and_evaluate(job.teacher, folder)}
        return record | {"cells": model_cells(record)}

    def load(self, job, folder, record):
        pass


class Count(Step):
    """Record the cost of the teacher under the names of the cost of a model, and evaluate nothing."""

    def run(self, job, folder):
        parameters, macs = job.count(job.teacher)
        return {"did": "counted", "accuracy": {"value": 1.0}, "parameters": parameters, "macs": macs, "cells": []}


class Ruin(Step):
    """Change the weights of the model, and record the teacher."""

    def run(self, job, folder):
        job.model = copy.deepcopy(job.model)
        with torch.no_grad():
            job.model[0].weight.zero_()
        return Look().run(job, folder)


class RuinInPlace(Ruin):
    """Change the weights of the model itself, and record nothing."""

    def run(self, job, folder):
        with torch.no_grad():
            job.model[0].weight.zero_()
        return {"did": "changed", "cells": []}


@pytest.fixture(autouse=True)
def _steps(monkeypatch):
    for kind in (Look, Count, Ruin, RuinInPlace):
        monkeypatch.setitem(STEPS._objects, kind.__name__.lower(), kind)


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((320, 8)).astype(np.float32)
    labels = (inputs @ random.standard_normal((8, 3))).argmax(1)

    def part(start, end):
        return kirsch.Split(inputs[start:end], labels[start:end])

    return kirsch.DataSet("planes", train=part(0, 200), validation=part(200, 260), test=part(260, 320))


@pytest.fixture(scope="module")
def teacher(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    return kirsch.fit(model, data.batches(32), training=kirsch.Training(epochs=15), progress=False).model


@pytest.fixture
def compress(teacher, data, tmp_path):
    def call(*steps, folder="run", **options):
        return kirsch.compress(teacher, data, steps=steps, folder=tmp_path / folder, **options)

    return call


CUT = Prune(goal=kirsch.Goal(macs=0.08), importance="random", round_to=1, min_keep=0.01)
"""Removes so many units that the accuracy drops."""


def final(result):
    """Return name and MACs of the final model, and the values of the goals."""
    (model,) = (model for model in result.metrics["models"] if model["chosen"])
    return model["name"], model["macs"], {item["name"]: item["value"] for item in result.metrics["goal"]["items"]}


@pytest.mark.parametrize("other", [Look(), Count()])
def test_a_step_that_records_the_teacher_does_not_change_the_verdict(compress, other):
    expected = compress(CUT, max_drop=0.01)
    assert not expected.met
    for _ in range(2):  # the second call loads all steps
        found = compress(CUT, other, max_drop=0.01, folder="with the other step")
        assert not found.met
        assert final(found) == final(expected)
        assert found.metrics["quality"]["after"] == expected.metrics["quality"]["after"]
        before, after = found.metrics["quality"]["before"], found.metrics["quality"]["after"]
        assert before["confusion"] != after["confusion"]


@pytest.mark.parametrize("other", [Look(), Count()])
def test_the_exported_model_has_the_cost_of_the_pruned_model(compress, other):
    found = compress(Prune(goal=kirsch.Goal(macs=0.5)), other, Export(), Measure(rounds=6), goal=kirsch.Goal(macs=0.6))
    macs = {model["name"]: model["macs"] for model in found.metrics["models"]}
    assert final(found)[:2] == ("exported", macs["pruned"])
    assert final(found)[2]["macs"] == macs["pruned"] / macs["teacher"] <= 0.5
    assert found.met


def test_measured_models_are_those_before_pruning_and_have_the_name_of_their_step(compress):
    student = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3))
    train, distill = Train(model="student", epochs=6, learning_rate=0.01), Distill(epochs=2, learning_rate=0.01)
    prune = Prune(goal=kirsch.Goal(macs=0.4))
    found = compress(train, distill, prune, train, Export(), Measure(rounds=6), student=student)
    models = {model["name"]: model for model in found.metrics["models"]}
    assert list(models) == ["teacher", "student", "student-2", "pruned", "student-3", "exported"]
    assert [name for name, model in models.items() if model["latency"]] == ["teacher", "student-2", "exported"]
    for name in ("teacher", "student-2", "exported"):  # the sizes of float32 weights and of the graph
        assert models[name]["bytes"] == pytest.approx(4 * models[name]["parameters"], rel=0.25)


@pytest.mark.parametrize("other", [Ruin(), RuinInPlace()])
def test_a_step_that_changes_the_model_must_evaluate_it(compress, other):
    key = type(other).__name__.lower()
    with pytest.raises(
        UsageError, match=rf"step '{key}' changed the model of the job without evaluating it\..*job\.sa"
    ):
        compress(CUT, other)


def test_a_job_whose_student_is_never_evaluated_is_refused(compress, teacher):
    with pytest.raises(UsageError, match=r"No step has evaluated the final model of the job\..*leave out the student"):
        compress(Look(), student=copy.deepcopy(teacher))


# ------------------------------------------------------------------------------------------------ steps of the teacher


@pytest.mark.parametrize(
    ("steps", "keys"),
    [
        ("[evaluate, prune]", ["evaluate", "prune"]),
        ("[prune]", ["evaluate", "prune"]),
        ("[evaluate]", ["evaluate"]),
        ("[train, evaluate, prune]", ["train", "evaluate", "prune"]),
        ("[train, train]", ["train", "train-2"]),
    ],
)
def test_the_teacher_is_evaluated_once(steps, keys):
    assert list(read_recipe(f"{MODELS}goal: {{macs: 0.5}}\nsteps: {steps}\n").all_steps) == keys


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "steps: [prune, evaluate]",
            r"step 'evaluate' of the teacher comes after the step 'prune'.* Move 'evaluate' to",
        ),
        ("steps: [prune, train]", r"the step 'train' of the teacher comes after the step 'prune'\. "),
        (
            "steps: [export, train, {prune: {goal: {macs: 0.5}}}]",
            r"comes after the step 'export'\. .* use the step recover",
        ),
        (f"{STUDENT}steps: [train: {{model: student}}, train]", r"comes after the step 'train'\. "),
        ("steps: [evaluate, evaluate]", r"there are two steps 'evaluate'\. Remove one of them"),
        ("steps: []", r"there are no steps\. Add at least one, such as prune"),
        (
            f"{STUDENT}steps: [train]",
            r"no step uses the student\. Add a step such as distill, or leave out the student",
        ),
        (
            "student: {model: 'digits:student'}\nsteps: [train, export]",
            r"student: no step trains the student\. Its weights are random\. Add a step distill, or train with",
        ),
        ("student: {model: 'timm:resnet18'}\nsteps: [prune]", r"no step trains the student\. Its weights are random"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        read_recipe(f"{MODELS}goal: {{macs: 0.5}}\n{text}\n")


def test_compress_refuses_an_evaluation_of_the_teacher_after_pruning_and_a_job_without_steps(compress):
    with pytest.raises(UsageError, match="The step 'evaluate' of the teacher comes after the step 'prune'"):
        compress(CUT, Evaluate())
    with pytest.raises(UsageError, match="There are no steps"):
        compress()


def test_a_student_that_no_step_trains_is_noted(compress, teacher):
    """It may be trained: only the user of `kirsch.compress` knows."""
    notes = []

    def listen(event):
        notes.extend([event["text"]] if event["event"] == "note" else [])

    compress(CUT, Export(), student=copy.deepcopy(teacher), listen=listen)
    assert any(note.startswith("No step trains the student. Add a step distill, or train with") for note in notes)


def test_test_samples_in_the_training_part_are_noted(trained, tmp_path):
    teacher, _, data = trained
    notes = []

    def listen(event):
        notes.extend([event["text"]] if event["event"] == "note" else [])

    for name, test in (("separate", data.test), ("mixed", data.train)):
        parts = kirsch.DataSet(name, train=data.train, validation=data.validation, test=test, classes=data.classes)
        kirsch.compress(teacher, parts, steps=[CUT], folder=tmp_path / name, listen=listen)
    (note,) = (note for note in notes if "test samples" in note)
    n = len(data.train)
    assert note.startswith(f"{n} of the {n} test samples of mixed are also in its train part, so the results")


@pytest.mark.parametrize("step", [Train(model="student", epochs=1), Distill(epochs=1), Recover(epochs=1), Ruin()])
def test_a_step_that_may_train_the_student_suffices(step):
    names = {kind: name for name, kind in STEPS._objects.items()}
    text = f"teacher: {{model: 'm:t'}}\nstudent: {{model: 'timm:resnet18'}}\nsteps: [{names[type(step)]}: {{}}]\n"
    text = text.replace("train: {}", "train: {model: student}")
    assert not read_recipe(text).student_is_not_trained


def test_training_the_student_uses_the_student():
    recipe = read_recipe(f"{MODELS}{STUDENT}steps: [train: {{model: student}}]\n")
    assert recipe.all_steps == {"evaluate": Evaluate(), "train": Train(model="student")}
