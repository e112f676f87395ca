"""State of a run: events, checkpoints, counts, and the check of trained models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.dataset import DataSet, Split
from kirsch.errors import CheckpointError, NumericError, ShapeError
from kirsch.frameworks.training import TrainingState
from kirsch.jobs.goal import JobGoal
from kirsch.jobs.job import Job
from kirsch.tasks import TASKS


def part(n=9):
    return Split(np.arange(2 * n, dtype=np.float32).reshape(n, 2), np.arange(n) % 3)


@pytest.fixture
def events():
    return []


@pytest.fixture
def job(tmp_path, events):
    data = DataSet("small", part(), part(3), part(12), classes=("a", "b", "c"))
    task = TASKS["classification"]()
    return Job(data, task, tmp_path, None, None, JobGoal(), listen=events.append, key="distill", inputs="these")


def test_event_is_written_with_its_time_before_the_listener_is_called(job, events):
    seen = []
    job.listen = lambda event: seen.append((event, len((job.folder / "events.jsonl").read_text().splitlines())))
    job.emit({"event": "epoch", "loss": np.float32(0.5), "step": "Kürbis\n\x1b"})
    job.note("two\nlines")
    lines = [json.loads(line) for line in (job.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [number for _, number in seen] == [1, 2]
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        {"event": "epoch", "loss": 0.5, "step": "Kürbis\n\x1b"},
        {"event": "note", "text": "two\nlines"},
    ]


def test_training_events_have_the_key_of_their_step(job, events):
    job.hooks().event({"event": "epoch", "epoch": 1})
    assert events == [{"step": "distill", "event": "epoch", "epoch": 1}]


def test_training_resumes_only_from_checkpoints_of_the_same_inputs(job, events):
    job.hooks().save(TrainingState({"x": np.ones(2)}, {"epoch": 3, "batch": 1}))
    assert job.hooks().resume.values == {"epoch": 3, "batch": 1}
    job.key = "train"
    assert job.hooks().resume is None
    job.key, job.inputs = "distill", "others"
    assert job.hooks().resume is None
    assert [event["event"] for event in events] == ["note"]


def test_damaged_checkpoints_raise_an_error(job):
    job.hooks().save(TrainingState({"x": np.ones(2)}, {"epoch": 3, "batch": 1}))
    (job.folder / "checkpoints" / "distill" / "step-00003-000001" / "values.json").unlink()
    with pytest.raises(CheckpointError, match=r"All checkpoints in .*distill are damaged"):
        job.hooks()


def test_parameters_and_macs_are_counted_on_one_sample(job):
    assert job.example.tolist() == [[0.0, 1.0]]
    assert job.count(nn.Linear(2, 3)) == (9, 6)


@pytest.mark.parametrize(("model", "shape"), [(nn.Linear(2, 4), r"\(4,\)"), (nn.Unflatten(1, (1, 2)), r"\(1, 2\)")])
def test_model_with_another_number_of_classes_is_refused(job, model, shape):
    sentence = rf"The model returns logits of shape {shape}; the data small has 3 classes\. Give the model one out"
    with pytest.raises(ShapeError, match=sentence):
        job.count(nn.Sequential(model, nn.Identity()))


def test_model_is_evaluated_on_the_test_part_and_its_logits_are_stored(job):
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # always predicts b, which is correct for 4 of 12 samples
    done = job.step_folder("train") / "done"
    done.mkdir()
    found = job.evaluate(model, done)
    assert found["accuracy"]["value"] == 4 / 12
    assert found["one_class"] is True
    assert (found["parameters"], found["macs"]) == (9, 6)
    assert np.array_equal(job.logits("train"), np.tile(np.float32([0, 1, 0]), (12, 1)))


@pytest.mark.parametrize(
    ("right", "one_class", "why"),
    [
        (
            6,
            True,
            r"after the step 'recover': 50\.0% of 12 correct, chance is 33\.3%\. It predicts one class for every",
        ),
        (
            4,
            False,
            r"unusable after the step 'recover': 33\.3% of 12 correct, chance is 33\.3%\. It is not",
        ),
        (0, False, r"It is not better than chance\. Lower the learning rate, or train longer\.$"),
        (5, False, None),
    ],
)
def test_model_that_is_not_better_than_chance_is_refused(job, right, one_class, why):
    job.key = "recover"
    record = {"one_class": one_class, "chance": 1 / 3, "accuracy": {"value": right / 12, "n": 12}}
    if why is None:
        job.check_usable(record)
    else:
        with pytest.raises(NumericError, match=why):
            job.check_usable(record)


def test_error_of_an_unusable_pruned_model_suggests_to_remove_less(job):
    job.records["prune"] = {"removed": {}}
    with pytest.raises(NumericError, match=r"train longer, or remove less\.$"):
        job.check_usable({"one_class": False, "chance": 1 / 3, "accuracy": {"value": 0.0, "n": 12}})
