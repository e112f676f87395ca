"""State that the steps of a job share: models, data, folder, events, records."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.inputs import rows
from kirsch.errors import NumericError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.trace import trace
from kirsch.frameworks.training import TrainingHooks, TrainingState
from kirsch.jobs import checkpoints
from kirsch.tasks.task import check_quality

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.data.dataset import DataSet
    from kirsch.graph.plan import Goal, Plan
    from kirsch.jobs.goal import JobGoal
    from kirsch.tasks.task import Task

Record = dict[str, Any]
"""Result of a step as JSON. "did": what the step did, in a few words. "cells": texts for the table of steps. A step
that makes a model adds "model", a name such as "pruned", and the keys of `Job.save_and_evaluate`."""

CHECKPOINTS, ARTIFACTS, EVENTS = "checkpoints", "artifacts", "events.jsonl"
RECORD, LOGITS, WEIGHTS = "record.json", "logits.npy", "weights.safetensors"

TRACED = ("size", "memory")
"""Costs that are counted by a trace, in the order of `WORDS`."""

TRAIN_BETTER = "Lower the learning rate, or train longer."
REMOVE_LESS = "Lower the learning rate, train longer, or remove less."

Listen = Callable[[dict[str, Any]], None]
Stop = Callable[[], Exception | None]


def ignore(event: dict[str, Any]) -> None:
    """Drop an event."""


def never() -> None:
    """Return None: a job with this function is never asked to stop."""


def without_masks(model: Any) -> Any:
    """Return a copy of a model without its masks, with zeros in its weights; a model without masks itself."""
    masking = framework_of(model).masking
    return masking.fold(model) if masking.masks(model) else model


@dataclass
class Job:
    """State that the steps of a job share.

    Args:
        data: data set.
        task: task that checks the data and measures the quality of the models.
        folder: run folder.
        make_teacher, make_student: functions that return the models before training; `make_student` is None if the
            teacher itself is compressed.
        goal: goals of the job.
        seed: seed of the steps that have no seed of their own.
        batch_size: samples per training step.
        outputs: "teacher" and "student" → what the model returns, "logits" or "probabilities"; None for logits.
        listen: function that is called with each event.
        stop: function that returns the error to raise if the job should stop, otherwise None.

    Attributes:
        teacher: model from which the other models learn, and with which they are compared.
        model: model that the steps compress: the student, or the teacher itself.
        start_cost: cost of `model` before any step; see `cost`.
        trained: "teacher" and "student" → key of the step that made the model before pruning, and the model; `Measure`
            compares its latency with that of the exported file.
        key: key of the current step.
        inputs: hash over everything that determines the result of the current step.
        records: key of a step → record of its results.
        plans: key of each step `Prune` → the plan that its `preview` made.
        planning_seconds: key of each step `Prune` → the time for its plan that its `preview` estimated.
    """

    data: DataSet
    task: Task
    folder: Path
    make_teacher: Callable[[], Any]
    make_student: Callable[[], Any] | None
    goal: JobGoal
    seed: int = 0
    batch_size: int = 64
    outputs: Mapping[str, Any] = field(default_factory=dict)
    listen: Listen = ignore
    stop: Stop = never
    teacher: Any = None
    model: Any = None
    start_cost: dict[str, int] = field(default_factory=dict)
    trained: dict[str, tuple[str, Any]] = field(default_factory=dict)
    key: str = ""
    inputs: str = ""
    records: dict[str, Record] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    planning_seconds: dict[str, float] = field(default_factory=dict)

    def build(self) -> None:
        """Build the models before training."""
        self.teacher = self.model = self.make_teacher()
        if self.make_student is not None:
            self.model = self.make_student()

    @property
    def make_model(self) -> Callable[[], Any]:
        """Function that returns the model to compress, before training."""
        return self.make_student or self.make_teacher

    @property
    def model_name(self) -> str:
        """Name of the model to compress before any step: "student", or "teacher" if there is none."""
        return "teacher" if self.make_student is None else "student"

    @property
    def is_pruned(self) -> bool:
        """Whether an earlier step has removed units, or set weights to zero."""
        return any("removed" in record or "sparsity" in record for record in self.records.values())

    def set_trained(self, name: str, model: Any) -> None:
        """Set the teacher or student before pruning, as the result of the current step; ignored after pruning."""
        if not self.is_pruned:
            self.trained[name] = self.key, model

    @property
    def example(self) -> Any:
        """Return the inputs of one sample, as a batch of one."""
        return rows(self.data.test.inputs, slice(1))

    @property
    def evaluation_batch_size(self) -> int:
        """Return the batch size of evaluations; a smaller batch size in the recipe lowers their memory use, too."""
        return min(256, self.batch_size)

    def emit(self, event: dict[str, Any]) -> None:
        """Append an event to events.jsonl, and pass it to the listener."""
        with (self.folder / EVENTS).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False, default=float) + "\n")
        self.listen(event)

    def note(self, text: str) -> None:
        """Emit a note event."""
        self.emit({"event": "note", "text": text})

    def step_folder(self, key: str) -> Path:
        """Return the folder of a step, which is created if needed."""
        path = self.folder / CHECKPOINTS / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def is_done(self) -> bool:
        """Return whether the current step was finished by an earlier process."""
        return (self.folder / CHECKPOINTS / self.key / "done").is_dir()

    def hooks(self) -> TrainingHooks:
        """Return the hooks of training in the current step, with its newest checkpoint as the state to resume from."""
        key, folder = self.key, self.step_folder(self.key)

        def emit(event: dict[str, Any]) -> None:
            self.emit({"step": key, **event})

        def save(state: TrainingState) -> None:
            checkpoints.save(folder, state, self.inputs)

        resume = checkpoints.newest(folder, self.inputs, self.note)
        return TrainingHooks(event=emit, stop=self.stop, save=save, resume=resume)

    def validation(self) -> tuple[Any, NDArray[np.int64]]:
        """Return inputs and labels of the validation part."""
        return self.data.validation.inputs, self.data.validation.labels

    def evaluate(self, model: Any, folder: Path, *limits: Goal | None) -> Record:
        """Return size, cost and test quality of a model, and write its logits to the folder.

        The key "roles" lists the roles of the model in the job: "teacher", "model", both or neither. Goals and report
        use the last record of each role.

        Args:
            model: the model.
            folder: folder of the step.
            limits: goals of the step, in addition to that of the job; see `cost`.
        """
        inference = framework_of(model).inference
        logits = inference.predict(model, self.data.test.inputs, batch_size=self.evaluation_batch_size)
        np.save(folder / LOGITS, logits, allow_pickle=False)
        roles = [name for name, known in (("teacher", self.teacher), ("model", self.model)) if model is known]
        limits = (self.goal.cost, *limits) if "model" in roles else ()
        return {"roles": roles, **self.cost(model, *limits), **self.quality(logits)}

    def save_and_evaluate(self, model: Any, folder: Path) -> Record:
        """Write the weights of a model to the folder of its step, and return its size, cost and test quality.

        The file has the masks of the model, too, which do not count for its size.
        """
        framework = framework_of(model)
        framework.inference.save_weights(model, folder / WEIGHTS)
        size = (folder / WEIGHTS).stat().st_size - framework.masking.mask_bytes(model)
        return {"bytes": size, **self.evaluate(model, folder)}

    def quality(self, logits: NDArray[Any]) -> Record:
        """Return the quality of outputs on the test part, as the task measures it.

        Raises:
            UsageError: the result of the task has no accuracy.
        """
        quality = self.task.evaluate(logits, self.data)
        check_quality(self.task, quality)
        return quality

    def count(self, model: Any) -> tuple[int, int]:
        """Return the parameters and MACs of a model for one sample.

        Raises:
            UsageError: the model does not run on the data.
            ShapeError: the model does not return one logit for each class of the data.
        """
        framework = framework_of(model)
        framework.inference.check_runs(model, self.example)
        logits = framework.inference.predict(model, self.example)
        self.task.check_outputs(logits, self.data)
        return framework.analysis.count(model, framework.inference.from_numpy(self.example))

    def cost(self, model: Any, *limits: Goal | None) -> dict[str, int]:
        """Return the cost of a model for one sample, by the names of `kirsch.graph.cost_names.WORDS`.

        Parameters and MACs are always counted. The size of the weights and the memory of the activations are counted by
        a trace, and only if one of the goals limits them.

        Args:
            model: the model.
            limits: goals of the job or of its steps.

        Raises:
            UsageError, ShapeError: see `count`.
            ModelError: size or memory is limited, and the model cannot be traced.
        """
        parameters, macs = self.count(model)
        names = [name for goal in limits if goal is not None for name in goal.to_dict() if name in TRACED]
        cost = {"parameters": parameters, "macs": macs}
        if names:
            traced = trace(without_masks(model), framework_of(model).inference.from_numpy(self.example)).cost.to_dict()
            cost |= {name: traced[name] for name in TRACED if name in names}
        return cost

    def check_usable(self, record: Record, fix: str = "") -> None:
        """Refuse a trained model that the task calls unusable.

        Args:
            record: record of the current step, with the quality on the test part.
            fix: fix of the error; by default, advice on the training.

        Raises:
            NumericError: the model is unusable.
        """
        numbers, reason = self.task.weakness(record)
        if reason:
            fix = fix or (REMOVE_LESS if self.is_pruned else TRAIN_BETTER)
            raise NumericError(f"The model is unusable after the step {self.key!r}: {numbers}.", reason, fix)

    def logits(self, key: str) -> NDArray[Any]:
        """Return the logits on the test part that a finished step has stored."""
        logits: NDArray[Any] = np.load(self.folder / CHECKPOINTS / key / "done" / LOGITS, allow_pickle=False)
        return logits
