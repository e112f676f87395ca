"""The whole job for models and data given as objects."""

from __future__ import annotations

import copy
import functools
import json
import shutil

import numpy as np
import pytest
import torch

import kirsch
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import GoalError, Interrupted, NumericError, RecipeError, UsageError
from kirsch.recipes import stages
from kirsch.recipes.models import build
from kirsch.recipes.tasks.data import load_data
from tiny import write_job

SOME = kirsch.Training(epochs=5, learning_rate=0.02)
HALF = kirsch.Goal(macs=0.5)


def equal(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module", autouse=True)
def _few_rounds():
    """Thirty rounds of timing take ten seconds and change nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        race = stages.race
        patch.setattr(stages, "race", lambda *given, rounds, **options: race(*given, rounds=6, **options))
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A trained model, an untrained small one, and data."""
    base = tmp_path_factory.mktemp("given")
    write_job(base)
    data = load_data("nets.py:stripes", {}, seed=0, base=base)
    teacher = build("nets.py:teacher", base=base)
    return (
        kirsch.distill(
            teacher,
            copy.deepcopy(teacher),
            data.batches(16),
            objective=kirsch.Objective.labels(),
            training=kirsch.Training(epochs=6, learning_rate=0.02, optimizer="adamw"),
            check_teacher=False,
        ).model,
        build("nets.py:student", base=base),
        data,
    )


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    """The model made small, with all that was told."""
    before, _, data = given
    heard = []
    model = copy.deepcopy(before).train()
    folder = tmp_path_factory.mktemp("made") / "run"
    found = kirsch.compress(
        model, data, HALF, recover=SOME, max_drop=0.9, batch_size=16, folder=folder, name="mine", listen=heard.append
    )
    assert equal(before, model), "the model that was given is left as it is"
    assert model.training, "and in its mode"
    return found, heard


def test_a_model_that_ends_in_a_softmax_is_refused_until_it_is_said(given, tmp_path):
    before, _, data = given
    model = torch.nn.Sequential(copy.deepcopy(before), torch.nn.Softmax(-1))
    training = kirsch.Training(epochs=1, learning_rate=0.01)
    with pytest.raises(UsageError, match=r"The teacher, a Sequential, puts out probabilities.*teacher_outputs="):
        kirsch.compress(model, data, HALF, recover=training, folder=tmp_path / "run")
    objective = kirsch.Objective(
        kirsch.Objective.kd().terms, 0.1, student_outputs="probabilities", teacher_outputs="probabilities"
    )
    found = kirsch.compress(model, data, HALF, recover=training, objective=objective, folder=tmp_path / "said")
    assert found.model is not None


def test_the_small_model_is_the_one_in_the_file(given, made):
    found, _ = made
    inputs = given[2].test.inputs
    with torch.no_grad():
        scores = found.model(torch.from_numpy(inputs)).numpy()
    assert OnnxSession(found.artifact).predict(inputs) == pytest.approx(scores, abs=1e-4)  # two runtimes, float32
    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    assert found.metrics["models"][-1]["parameters"] == parameters < 1479


def test_goals_are_those_of_the_call(made):
    found, _ = made
    assert found.met is found.metrics["goal"]["met"] is True
    assert [(item["name"], item["limit"]) for item in found.metrics["goal"]["items"]] == [
        ("macs", 0.5),
        ("max_drop", 0.9),
    ]


def test_files_lie_where_it_says(made):
    found, heard = made
    assert found.metrics == json.loads((found.folder / "metrics.json").read_text())
    assert "mine" in found.report.read_text()
    assert found.artifact == found.folder / "artifacts" / "model.onnx"
    assert [event["key"] for event in heard if event["event"] == "stage_start"] == [
        "teacher",
        "prune",
        "recover",
        "export",
        "measure",
    ]
    assert sum(event["event"] == "epoch" for event in heard) == SOME.epochs


def test_a_model_whose_checkpoints_could_not_be_loaded_is_told_of_and_refuses_to_write_them(given, tmp_path):
    class Saving(type(given[0])):
        def save_pretrained(self, folder):
            raise NotImplementedError

    model, heard = copy.deepcopy(given[0]), []
    model.__class__ = Saving
    found = kirsch.compress(
        model, given[2], HALF, recover=SOME, batch_size=16, folder=tmp_path / "run", listen=heard.append
    )
    text = "No configuration describes the pruned Saving. from_pretrained would build it in its original size."
    assert [event for event in heard if event["event"] == "note" and event["text"].startswith(text)]
    with pytest.raises(UsageError, match=r"from_pretrained cannot load.*kirsch\.save"):
        found.model.save_pretrained(tmp_path)


def test_the_same_call_goes_on_where_it_was(given, made, tmp_path):
    heard = []
    folder = shutil.copytree(made[0].folder, tmp_path / "run")
    again = kirsch.compress(
        given[0],
        given[2],
        HALF,
        recover=SOME,
        max_drop=0.9,
        batch_size=16,
        folder=folder,
        name="mine",
        listen=heard.append,
    )
    assert [event["event"] for event in heard if "stage" in event["event"]] == ["stage_kept"] * 5
    assert equal(again.model, made[0].model)


@pytest.mark.parametrize("other", ["model", "student"])
def test_another_model_in_the_same_folder_does_not_pass_for_the_first(given, tmp_path, other):
    """Its weights are all that tells it apart."""
    model, student, data = given

    def call(model, student, heard):
        def stop(event):
            heard.append(event)
            if event["event"] == "first_batch":
                raise Interrupted("asked")

        compress = functools.partial(kirsch.compress, recover=SOME, batch_size=16, folder=tmp_path / "run")
        with pytest.raises(Interrupted):
            compress(model, data, HALF, student=student, distill=SOME, listen=stop)

    first, second = [], []
    call(model, student, first)
    changed = copy.deepcopy(model if other == "model" else student)
    with torch.no_grad():
        changed.head.bias.add_(0.25)
    call(*((changed, student) if other == "model" else (model, changed)), second)
    assert [event["key"] for event in second if event["event"] == "stage_kept"] == []
    assert "The stage 'teacher' is done again: its inputs have changed." in [event.get("text") for event in second]


def test_a_student_learns_first_and_is_the_one_that_is_pruned(given, tmp_path):
    model, student, data = given
    before = copy.deepcopy(student)
    heard = []

    def listen(event):
        heard.append(event)
        if event.get("key") == "export":
            raise Interrupted("enough seen")

    with pytest.raises(Interrupted):
        kirsch.compress(
            model,
            data,
            kirsch.Goal(params=0.6),
            student=student,
            distill=kirsch.Training(epochs=3, learning_rate=0.05),
            recover=kirsch.Training(epochs=1, learning_rate=0.01),
            temperature=2.0,
            batch_size=16,
            folder=tmp_path / "run",
            listen=listen,
        )
    assert equal(before, student)
    ends = {event["key"]: event for event in heard if event["event"] == "stage_end"}
    assert list(ends) == ["teacher", "distill", "prune", "recover"]
    assert [event["stage"] for event in heard if event["event"] == "epoch"] == ["distill"] * 3 + ["recover"]
    places = tmp_path / "run" / "checkpoints"
    records = {key: json.loads((places / key / "done" / "record.json").read_text()) for key in ends}
    assert records["distill"]["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert records["prune"]["parameters"] <= 0.6 * records["distill"]["parameters"]
    assert (tmp_path / "run" / "recipe.yaml").read_text().count("temperature: 2.0") == 2
    with torch.no_grad():
        scores = model.eval()(torch.from_numpy(data.test.inputs)).numpy()
    assert np.array_equal(np.load(places / "teacher" / "done" / "logits.npy"), scores)


def test_training_of_a_student_that_is_not_there_is_refused(given, tmp_path):
    with pytest.raises(
        UsageError, match=r"distill is given without a student\. Give student=\.\.\., or leave distill out\."
    ):
        kirsch.compress(given[0], given[2], HALF, distill=SOME, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": ""}, r"name: string should have at least 1 character, found ''"),
        ({"temperature": 0.0}, r"recover\.temperature: input should be greater than 0, found 0\.0"),
    ],
)
def test_a_wrong_argument_is_refused_in_our_words(given, tmp_path, wrong, sentence):
    with pytest.raises(RecipeError, match=rf"^The call of kirsch\.compress has a problem:\n  {sentence}"):
        kirsch.compress(given[0], given[2], HALF, folder=tmp_path / "run", **wrong)


def test_without_a_folder_a_new_one_is_made_under_runs(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GoalError, match="reaches the goal"):
        kirsch.compress(given[0], given[2], kirsch.Goal(macs=0.001), name="a/b")
    (made,) = (tmp_path / "runs").iterdir()
    assert "-a-b-" in made.name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_without_finite_scores_is_not_judged(given, tmp_path, value):
    """Its accuracy would be that of its first class."""
    model, _, data = given
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head.bias[0] = value
    with pytest.raises(NumericError, match=r"returns NaN or infinity for 60 of 60 samples") as caught:
        kirsch.compress(broken, data, HALF, recover=None, folder=tmp_path / "run")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "run" / "report.html").exists()
