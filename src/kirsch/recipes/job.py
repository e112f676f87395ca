"""State that the stages of a run share: models, data, folder, events, records."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import NumericError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import TrainingHooks, TrainingState
from kirsch.recipes import checkpoints
from kirsch.recipes.manifest import EVENTS
from kirsch.tasks import TASKS, Task

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.data.dataset import DataSet
    from kirsch.frameworks.protocols import Framework
    from kirsch.recipes.recipe import Recipe

RECORD, LOGITS = "record.json", "logits.npy"
Listen = Callable[[dict[str, Any]], None]
Stop = Callable[[], Exception | None]


TRAIN_BETTER = "Lower the learning rate, train longer, or remove less."


@dataclass
class Job:
    """State that the stages of a run share.

    Args:
        recipe: recipe of the run.
        folder: run folder.
        data: data set.
        make_teacher, make_student: functions that return the models before training; the second is None if the teacher
            itself is pruned.
        listen: called with each event.
        stop: returns an error if the run is to stop, otherwise None.
        inputs: hash over everything that determines the result of the current stage.
        models: "teacher", "student", "pruned", "result", as far as they exist.
        records: stage → record of its results.
        altered: files that differ from the manifest of the run: name → description of the difference.
    """

    recipe: Recipe
    folder: Path
    data: DataSet
    make_teacher: Callable[[], Any]
    make_student: Callable[[], Any] | None
    listen: Listen
    stop: Stop
    inputs: str = ""
    models: dict[str, Any] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    altered: dict[str, str] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """Return what the models are for."""
        return TASKS["classification"]()

    @property
    def example(self) -> NDArray[np.float32]:
        """Return one sample, as a batch of one."""
        sample: NDArray[np.float32] = self.data.test.inputs[:1]
        return sample

    @property
    def evaluation_batch_size(self) -> int:
        """Return the batch size of evaluations; a smaller batch size in the recipe lowers their memory use, too."""
        return min(256, self.recipe.data.batch_size)

    def framework(self, model: Any) -> Framework:
        """Return the framework of a model."""
        return framework_of(model)

    def in_inference_mode(self, model: Any) -> Any:
        """Set a model to inference mode, and return it."""
        return framework_of(model).inference.inference_mode(model)

    def emit(self, event: dict[str, Any]) -> None:
        """Append an event to events.jsonl, and pass it to the listener."""
        with (self.folder / EVENTS).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False, default=float) + "\n")
        self.listen(event)

    def note(self, text: str) -> None:
        """Emit a note event."""
        self.emit({"event": "note", "text": text})

    def stage_folder(self, key: str) -> Path:
        """Return the folder of a stage, which is created if needed."""
        path = self.folder / "checkpoints" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def hooks(self, key: str) -> TrainingHooks:
        """Return the hooks of a training stage, with its newest checkpoint as the state to resume from."""
        folder = self.stage_folder(key)

        def emit(event: dict[str, Any]) -> None:
            self.emit({"stage": key, **event})

        def save(state: TrainingState) -> None:
            checkpoints.save(folder, state, self.inputs)

        resume = checkpoints.newest(folder, self.inputs, self.note)
        return TrainingHooks(event=emit, stop=self.stop, save=save, resume=resume)

    def validation(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return inputs and labels of the validation part."""
        return self.data.validation.inputs, self.data.validation.labels

    def evaluate(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return size, cost and test quality of a model, and write its logits to the folder."""
        framework = self.framework(model)
        logits = framework.inference.predict(model, self.data.test.inputs, batch_size=self.evaluation_batch_size)
        np.save(folder / LOGITS, logits, allow_pickle=False)
        parameters, macs = self.count(model)
        return {"parameters": parameters, "macs": macs, **self.quality(logits)}

    def quality(self, logits: NDArray[Any]) -> dict[str, Any]:
        """Return the quality of outputs on the test part, as the task measures it."""
        return self.task.evaluate(logits, self.data)

    def count(self, model: Any) -> tuple[int, int]:
        """Return the parameters and MACs of a model for one sample.

        Raises:
            UsageError: the model does not run on the data.
            ShapeError: the model does not return one logit for each class of the data.
        """
        framework = self.framework(model)
        framework.inference.check_runs(model, self.example)
        logits = framework.inference.predict(model, self.example)
        self.task.check_outputs(logits, self.data)
        return framework.analysis.count(model, framework.inference.from_numpy(self.example))

    def check_alive(self, key: str, record: dict[str, Any], fix: str = TRAIN_BETTER) -> None:
        """Refuse a trained model that the task calls unusable.

        Args:
            key: stage.
            record: record of the stage, with the quality on the test part.
            fix: fix of the error.

        Raises:
            NumericError: the model is such a model.
        """
        numbers, reason = self.task.weakness(record)
        if reason:
            raise NumericError(f"The model is unusable after the stage {key!r}: {numbers}.", reason, fix)

    def logits(self, key: str) -> NDArray[Any]:
        """Return the logits on the test part that a finished stage has stored."""
        logits: NDArray[Any] = np.load(self.folder / "checkpoints" / key / "done" / LOGITS, allow_pickle=False)
        return logits
