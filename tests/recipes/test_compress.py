"""`kirsch.compress` compresses a model in memory."""

from __future__ import annotations

import copy
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.data.sources import load_data
from kirsch.deploy import steps
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import DataError, GoalError, Interrupted, NumericError, UsageError
from kirsch.files import sha256
from kirsch.jobs.step import STEPS, Step
from kirsch.recipes.models import build
from kirsch.steps import Distill, Export, Measure, Prune, Recover
from tiny import same_weights, write_job

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
def trained(tmp_path_factory):
    """Trained model, untrained small model, and data."""
    base = tmp_path_factory.mktemp("trained")
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


def test_option_distill_without_student_is_refused(trained, tmp_path):
    with pytest.raises(
        UsageError, match=r"`distill` of kirsch\.compress needs a student\. Give student=\.\.\., or remove distill\."
    ):
        kirsch.compress(trained[0], trained[2], HALF, distill=TRAINING, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"name": ""}, r"`name` of kirsch\..*Recipe: String should have at least 1 character, found ''"),
        ({"max_drop": 1.0}, r"`max_drop` of kirsch\.compress is 1\.0; expected a number of at least 0 and below 1"),
        ({"task": "classify"}, r"no task 'classify'"),
        ({"min_keep": 2.0}, r"`min_keep` of .*Prune is 2\.0; expected a number above 0 and up to 1"),
        (
            {"excluded": ["head"]},
            r"compress has no argument 'excluded'\. Arguments: model, .*Options of the plan: .*Did you mean 'exclude'",
        ),
        ({"training": TRAINING}, r"no argument 'training'\..* Give recover=kirsch\.Training\(\.\.\.\)\."),
        ({"lr": 0.1}, r"no argument 'lr'\..* Give recover=kirsch\.Training\(learning_rate=\.\.\.\)\."),
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
                r"\d\d\.\d %, prune-2 \d\d\.\d %\. Lower the goal parameters of the step 'prune-2', or raise that of "
                r"the job to 0\."
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


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (
            [Export(), Prune(), Measure()],
            r"The step 'prune' changes the model after .*'export'.* Move 'export' after 'prune'",
        ),
        (
            [Prune(), Export(), Recover(epochs=1), Prune()],
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


def test_report_of_a_call_has_the_class_name_of_the_model(trained, tmp_path):
    found = kirsch.compress(trained[0], trained[2], HALF, steps=[Prune()], folder=tmp_path / "run")
    assert found.metrics["name"] == "Net"


def test_duration_at_the_end_is_that_of_the_metrics(compressed):
    found, events = compressed
    assert events[-1]["seconds"] == found.metrics["seconds"]


def of_loaders(data):
    """Return the data set with a loader for each part. Training samples are shuffled and scaled by random factors."""

    class RandomlyScaled(TensorDataset):
        def __getitem__(self, index):
            sample, label = super().__getitem__(index)
            return sample * (0.8 + 0.4 * torch.rand(())), label

    def loader(split, kind=TensorDataset, **options):
        return DataLoader(kind(torch.from_numpy(split.inputs), torch.from_numpy(split.labels)), 16, **options)

    train = loader(data.train, RandomlyScaled, shuffle=True)
    return kirsch.DataSet("loaded", train, loader(data.validation), loader(data.test))


def test_an_interrupted_run_on_loaders_equals_the_uninterrupted_run_bit_for_bit(trained, tmp_path):
    model, _, data = trained
    events, steps = [], [Prune(goal=HALF), Recover(epochs=2, learning_rate=0.02)]

    def call(folder, **options):
        return kirsch.compress(model, of_loaders(data), steps=steps, folder=tmp_path / folder, **options)

    def stop(event):
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise Interrupted("asked after the checkpoint of the first epoch")

    whole = call("whole", listen=events.append)
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [1, 2]
    assert whole.metrics["measured"]["data"]["name"] == "loaded"
    assert "48 training, 30 validation, 60 test samples" in whole.report.read_text()
    with pytest.raises(Interrupted):
        call("part", listen=stop)
    events.clear()
    assert same_weights(call("part", listen=events.append).model, whole.model)
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [2]


def test_loader_without_a_length_is_named_in_the_report(trained, tmp_path):
    model, _, data = trained
    batches = [(data.train.inputs[start : start + 16], data.train.labels[start : start + 16]) for start in (0, 16, 32)]
    listed = kirsch.DataSet("listed", batches, data.validation, data.test)
    found = kirsch.compress(model, listed, steps=[Prune(goal=HALF), Recover(epochs=1)], folder=tmp_path / "run")
    assert found.metrics["measured"]["data"]["train"] is None
    assert "listed: a loader for training, 30 validation" in found.report.read_text()


def test_batch_size_beside_a_loader_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match=r"`batch_size` .* has no effect: the training part of loaded is a loader\."):
        kirsch.compress(trained[0], of_loaders(trained[2]), HALF, batch_size=16, folder=tmp_path / "run")


def test_loader_that_returns_the_same_iterator_again_is_refused_before_any_work(trained, tmp_path):
    class Once:
        def __init__(self, batches):
            self.batches = iter(batches)

        def __iter__(self):
            return self.batches

    model, _, data = trained
    once = kirsch.DataSet("once", Once([(data.train.inputs, data.train.labels)]), data.validation, data.test)
    with pytest.raises(DataError, match=r"The data can be iterated only once\."):
        kirsch.compress(model, once, HALF, folder=tmp_path / "run")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_model_with_non_finite_logits_is_refused(trained, tmp_path, value):
    """Without the check, argmax would return class 0 for all samples."""
    model, _, data = trained
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head.bias[0] = value
    with pytest.raises(NumericError, match=r"returns NaN or infinity for 60 of 60 samples") as caught:
        kirsch.compress(broken, data, HALF, recover=None, folder=tmp_path / "run")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "run" / "report.html").exists()
