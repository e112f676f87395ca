"""`kirsch.compress` compresses a model in memory."""

from __future__ import annotations

import copy
import functools
import html
import json
import shutil

import numpy as np
import pytest
import torch

import kirsch
from kirsch.deploy import steps
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import Interrupted, UsageError
from kirsch.files import sha256
from kirsch.jobs.step import STEPS, Step
from kirsch.steps import Prune, Recover
from tiny import same_weights

TRAINING = kirsch.Training(epochs=5, learning_rate=0.02)
HALF = kirsch.Goal(macs=0.5)
HALF_AGAIN = kirsch.Goal(macs=0.66)  # after a step to 0.75, at most 0.75 · 0.66 < 0.5 of the MACs remain


@pytest.fixture(scope="module", autouse=True)
def _few_rounds():
    """Measure latency in six rounds in place of thirty, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        compare_latencies = steps.compare_latencies
        patch.setattr(
            steps,
            "compare_latencies",
            lambda *args, rounds, **options: compare_latencies(*args, rounds=6, **options),
        )
        yield


@pytest.fixture(scope="module")
def compressed(trained, tmp_path_factory):
    """Result of compressing the model, and all events."""
    before, _, data = trained
    events = []
    model = copy.deepcopy(before).train()
    folder = tmp_path_factory.mktemp("compressed") / "run"
    found = kirsch.compress(
        model,
        data,
        HALF,
        recover=TRAINING,
        max_drop=0.9,
        batch_size=16,
        folder=folder,
        name="my model",
        listen=events.append,
    )
    assert same_weights(before, model), "the argument must not change"
    assert model.training, "the mode of the argument must not change"
    return found, events


def test_model_with_softmax_is_refused_unless_the_objective_declares_probabilities(trained, tmp_path):
    before, _, data = trained
    model = torch.nn.Sequential(copy.deepcopy(before), torch.nn.Softmax(-1))
    training = kirsch.Training(epochs=1, learning_rate=0.01)
    with pytest.raises(UsageError, match=r"The teacher, a Sequential, returns probabilities.*teacher_outputs="):
        kirsch.compress(model, data, HALF, recover=training, folder=tmp_path / "run")
    objective = kirsch.Objective(
        kirsch.Objective.kd().terms, label_weight=0.1, student_outputs="probabilities", teacher_outputs="probabilities"
    )
    found = kirsch.compress(model, data, HALF, recover=training, objective=objective, folder=tmp_path / "stated")
    assert found.model is not None


def test_returned_model_equals_the_exported_file(trained, compressed):
    found, _ = compressed
    inputs = trained[2].test.inputs
    with torch.no_grad():
        logits = found.model(torch.from_numpy(inputs)).numpy()
    assert OnnxSession(found.artifact.path).predict(inputs) == pytest.approx(logits, abs=1e-4)  # two runtimes, float32
    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    assert found.metrics["models"][-1]["parameters"] == parameters < 1479


def test_the_goals_given_to_compress_are_evaluated(compressed):
    found, _ = compressed
    assert found.met is found.metrics["goal"]["met"] is True
    assert [(item["name"], item["limit"]) for item in found.metrics["goal"]["items"]] == [
        ("macs", 0.5),
        ("max_drop", 0.9),
    ]


def exported_again(found):
    return kirsch.export(found.model, found.folder.with_suffix(".onnx"), example_inputs=torch.zeros(1, 1, 8, 8))


def test_printed_result_has_the_same_steps_and_goals_as_the_output_of_the_command(compressed):
    found, _ = compressed
    lines = str(found).splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        [str(number), key] for number, key in enumerate(["evaluate", "prune", "recover", "export", "measure"], start=1)
    ]
    assert lines[6].startswith("goal met     MACs ")
    assert f"report       {found.report}" in lines
    assert repr(found) == f"<kirsch.Compressed: {type(found.model).__name__}, goals met, in {found.folder}>"


def test_result_contains_the_paths_of_the_files(compressed):
    found, events = compressed
    assert found.metrics == json.loads((found.folder / "metrics.json").read_text())
    assert "my model" in found.report.read_text()
    assert found.artifact.path == found.folder / "artifacts" / "model.onnx"
    assert found.artifact.sha256 == sha256(found.artifact.path)
    assert found.artifact.to_dict().keys() == exported_again(found).to_dict().keys()
    assert [event["key"] for event in events if event["event"] == "step_start"] == [
        "evaluate",
        "prune",
        "recover",
        "export",
        "measure",
    ]
    assert sum(event["event"] == "epoch" for event in events) == TRAINING.epochs


def test_notes_on_the_plan_are_in_the_metrics_and_the_report(trained, tmp_path):
    events, step = [], Prune(keep_outputs=["head"], round_to=1)
    found = kirsch.compress(
        trained[0], trained[2], HALF, steps=[step], folder=tmp_path / "run", batch_size=16, listen=events.append
    )
    (removed,) = found.metrics["removals"]
    assert any(note.startswith("keep_outputs=['head'] has no effect") for note in removed["notes"])
    assert not any("optimizer" in note for note in removed["notes"])
    assert [event["text"] for event in events if event["event"] == "note"] == removed["notes"]
    report = html.unescape(found.report.read_text())
    assert all(f"<li>{note}</li>" in report for note in removed["notes"])


def test_model_without_matching_configuration_refuses_save_pretrained(trained, tmp_path):
    class Saving(type(trained[0])):
        def save_pretrained(self, folder):
            raise NotImplementedError

    model, events = copy.deepcopy(trained[0]), []
    model.__class__ = Saving
    found = kirsch.compress(
        model, trained[2], HALF, recover=TRAINING, batch_size=16, folder=tmp_path / "run", listen=events.append
    )
    text = "No configuration describes the pruned Saving. from_pretrained would build the model in its original size."
    assert [event for event in events if event["event"] == "note" and event["text"].startswith(text)]
    with pytest.raises(UsageError, match=r"from_pretrained cannot load.*kirsch\.save"):
        found.model.save_pretrained(tmp_path)


def test_same_call_continues_the_run(trained, compressed, tmp_path):
    events = []
    folder = shutil.copytree(compressed[0].folder, tmp_path / "run")
    again = kirsch.compress(
        trained[0],
        trained[2],
        HALF,
        recover=TRAINING,
        max_drop=0.9,
        batch_size=16,
        folder=folder,
        name="my model",
        listen=events.append,
    )
    assert [event["event"] for event in events if "step" in event["event"]] == ["step_kept"] * 5
    assert same_weights(again.model, compressed[0].model)


@pytest.mark.parametrize("other", ["model", "student"])
def test_run_of_other_weights_is_not_continued(trained, tmp_path, other):
    """The models differ in their weights only."""
    model, student, data = trained

    def call(model, student, events):
        def stop(event):
            events.append(event)
            if event["event"] == "first_batch":
                raise Interrupted("asked")

        compress = functools.partial(kirsch.compress, recover=TRAINING, batch_size=16, folder=tmp_path / "run")
        with pytest.raises(Interrupted):
            compress(model, data, HALF, student=student, distill=TRAINING, listen=stop)

    first, second = [], []
    call(model, student, first)
    changed = copy.deepcopy(model if other == "model" else student)
    with torch.no_grad():
        changed.head.bias.add_(0.25)
    call(*((changed, student) if other == "model" else (model, changed)), second)
    assert [event["key"] for event in second if event["event"] == "step_kept"] == []
    assert "The step 'evaluate' is run again: its inputs have changed." in [event.get("text") for event in second]


def test_student_is_distilled_and_then_pruned(trained, tmp_path):
    model, student, data = trained
    before = copy.deepcopy(student)
    events = []

    def listen(event):
        events.append(event)
        if event.get("key") == "export":
            raise Interrupted("stop before the export")

    with pytest.raises(Interrupted):
        kirsch.compress(
            model,
            data,
            kirsch.Goal(parameters=0.6),
            student=student,
            distill=kirsch.Training(epochs=3, learning_rate=0.05),
            recover=kirsch.Training(epochs=1, learning_rate=0.01),
            objective=kirsch.Objective.kd(temperature=2.0),
            batch_size=16,
            folder=tmp_path / "run",
            listen=listen,
        )
    assert same_weights(before, student)
    ends = {event["key"]: event for event in events if event["event"] == "step_end"}
    assert list(ends) == ["evaluate", "distill", "prune", "recover"]
    assert [event["step"] for event in events if event["event"] == "epoch"] == ["distill"] * 3 + ["recover"]
    checkpoints = tmp_path / "run" / "checkpoints"
    records = {key: json.loads((checkpoints / key / "done" / "record.json").read_text()) for key in ends}
    assert records["distill"]["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert records["prune"]["parameters"] <= 0.6 * records["distill"]["parameters"]
    assert (tmp_path / "run" / "recipe.yaml").read_text().count("temperature: 2.0") == 2
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(data.test.inputs)).numpy()
    assert np.array_equal(np.load(checkpoints / "evaluate" / "done" / "logits.npy"), logits)


def test_without_recovery_nothing_is_trained_and_plan_options_reach_the_plan(trained, tmp_path):
    events = []
    found = kirsch.compress(
        trained[0],
        trained[2],
        kirsch.Goal(macs=0.8),
        recover=None,
        exclude=["first"],
        round_to=1,
        norm=1,
        folder=tmp_path / "run",
        batch_size=16,
        listen=events.append,
    )
    assert [event["key"] for event in events if event["event"] == "step_end"] == [
        "evaluate",
        "prune",
        "export",
        "measure",
    ]
    assert not [event for event in events if event["event"] == "epoch"]
    (plan,) = found.metrics["provenance"]["plans"]
    assert {name: plan["method"][name] for name in ("exclude", "round_to", "norm")} == {
        "exclude": ["first"],
        "round_to": 1,
        "norm": 1,
    }
    assert found.model.first.weight.shape == trained[0].first.weight.shape
    torch.testing.assert_close(found.model.first.weight, trained[0].first.weight)


def test_with_progress_true_compress_prints_the_lines_of_the_command(trained, tmp_path, capfd):
    events = []
    found = kirsch.compress(
        trained[0],
        trained[2],
        HALF,
        steps=[Prune(), Recover(epochs=2, learning_rate=0.01)],
        folder=tmp_path / "run",
        batch_size=16,
        listen=events.append,
        progress=True,
    )
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == f"kirsch {kirsch.__version__} · Net · run {tmp_path / 'run'}"
    steps = [line for line in lines if line[:2].strip().isdigit()]
    assert [line.split()[:2] for line in steps] == [["1", "evaluate"], ["2", "prune"], ["3", "recover"]]
    assert [line.split()[:3] for line in lines if "loss" in line] == [
        ["recover", "epoch", "1/2"],
        ["recover", "epoch", "2/2"],
    ]
    assert lines[-3].startswith("goal met     MACs ")
    assert f"report       {found.report}" in lines
    assert events[0]["event"] == "start"


def test_steps_given_as_an_argument_are_run_in_order(trained, tmp_path):
    events = []
    short = {"epochs": 1, "learning_rate": 0.01}
    found = kirsch.compress(
        trained[0],
        trained[2],
        kirsch.Goal(macs=0.5),
        steps=[Prune(goal=kirsch.Goal(macs=0.75), round_to=1), Recover(**short), Prune(round_to=1, goal=HALF_AGAIN)],
        folder=tmp_path / "run",
        batch_size=16,
        listen=events.append,
    )
    assert [event["key"] for event in events if event["event"] == "step_end"] == [
        "evaluate",
        "prune",
        "recover",
        "prune-2",
    ]
    assert found.artifact is None
    assert [item["name"] for item in found.metrics["goal"]["items"]] == ["prune.macs", "prune-2.macs", "macs"]
    assert found.metrics["goal"]["items"][-1]["value"] <= 0.5
    assert [model["name"] for model in found.metrics["models"]] == ["teacher", "pruned", "recovered", "pruned-2"]


def test_folder_of_a_run_with_other_steps_is_refused_with_the_call_that_continues_it(trained, compressed, tmp_path):
    folder = shutil.copytree(compressed[0].folder, tmp_path / "run")
    sentence = (
        r"The folder .*run holds a run with other steps or options\. In the run and now: export only in the run; .*"
        r"To continue the run: kirsch\.compress with the same arguments and folder='.*run'\.$"
    )
    with pytest.raises(UsageError, match=sentence) as caught:
        kirsch.compress(trained[0], trained[2], HALF, steps=[Prune()], folder=folder, name="my model", batch_size=16)
    assert len(str(caught.value)) < 600


def test_default_folder_is_a_new_folder_in_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = kirsch.compress(trained[0], trained[2], HALF, steps=[Prune()], name="a/b")
    (folder,) = (tmp_path / "runs").iterdir()
    assert "-a-b-" in folder.name
    assert found.folder.name == folder.name


def test_goal_of_a_job_without_pruning_is_checked_at_its_end(trained, tmp_path, monkeypatch):
    """A step of another package makes the model smaller, and the goal limits the final model."""
    model, student, data = trained

    class Halve(Step):
        def preview(self, job):
            job.model = copy.deepcopy(student)

        def run(self, job, folder):
            self.preview(job)
            record = {"model": "halved", "did": "halved", **job.save_and_evaluate(job.model, folder)}
            return record | {"cells": []}

    monkeypatch.setitem(STEPS._objects, "halve", Halve)
    goal = kirsch.Goal(macs=0.7)
    found = kirsch.compress(model, data, goal, steps=[Halve()], folder=tmp_path / "run", batch_size=16)
    (item,) = found.metrics["goal"]["items"]
    first, last = (entry["macs"] for entry in found.metrics["models"])
    assert item["value"] == last / first < 0.7
    assert item["text"] == f"MACs {100 * last / first:.1f} % of the teacher, goal ≤ 70 %"


def test_limit_that_the_first_step_and_the_job_share_is_listed_once(trained, tmp_path):
    found = kirsch.compress(trained[0], trained[2], HALF, steps=[Prune(goal=HALF)], folder=tmp_path / "run")
    assert [item["name"] for item in found.metrics["goal"]["items"]] == ["macs"]


def test_report_of_a_call_has_the_class_name_of_the_model(trained, tmp_path):
    found = kirsch.compress(trained[0], trained[2], HALF, steps=[Prune()], folder=tmp_path / "run")
    assert found.metrics["name"] == "Net"


def test_duration_at_the_end_is_that_of_the_metrics(compressed):
    found, events = compressed
    assert events[-1]["seconds"] == found.metrics["seconds"]
