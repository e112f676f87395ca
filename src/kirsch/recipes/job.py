"""One job at work: its materials, its folder, and what it tells on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import NumericError, ShapeError
from kirsch.frameworks.port import Framework, framework_of
from kirsch.frameworks.training import TrainingHooks, TrainingState
from kirsch.measurement.quality import Answers, accuracy
from kirsch.recipes import checkpoints
from kirsch.recipes.seal import EVENTS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.recipes.recipe import Recipe
    from kirsch.recipes.tasks.data import DataSet

RECORD, LOGITS = "record.json", "logits.npy"
FEW_OTHERS = 3
"""Samples beside the most frequent class from which on a model is compared with answers that ignore their inputs."""

Listen = Callable[[dict[str, Any]], None]
Stop = Callable[[], Exception | None]


TRAIN_BETTER = "Lower the learning rate, train longer, or remove less."


@dataclass
class Job:
    """Everything that the stages of a run share.

    Args:
        recipe: what to do.
        folder: the run folder.
        data: what the models serve.
        make_teacher, make_student: give the models before any training; the second is None where the teacher itself is
            made smaller.
        listen: is given each event.
        stop: gives an error when the run shall stop.
        inputs: a hash over everything that the present stage follows from.
        models: "teacher", "student", "pruned", "result" as far as they are made.
        records: stage → what it found.
        altered: files of the folder that differ from the manifest of the run, by name, with a sentence each.
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
    def example(self) -> NDArray[np.float32]:
        """One sample, as a batch of one."""
        sample: NDArray[np.float32] = self.data.test.inputs[:1]
        return sample

    @property
    def most(self) -> int:
        """Samples that are judged at a time; a smaller batch size of the recipe lowers what this takes, too."""
        return min(256, self.recipe.data.batch_size)

    def framework(self, model: Any) -> Framework:
        """The framework of a model."""
        return framework_of(model)

    def tell(self, event: dict[str, Any]) -> None:
        """Give an event to the listener and to events.jsonl."""
        with (self.folder / EVENTS).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False, default=float) + "\n")
        self.listen(event)

    def note(self, text: str) -> None:
        """Tell a sentence."""
        self.tell({"event": "note", "text": text})

    def place(self, key: str) -> Path:
        """The folder of a stage's checkpoints."""
        path = self.folder / "checkpoints" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def hooks(self, key: str) -> TrainingHooks:
        """What a training stage reports to: events, checkpoints, stop."""
        place = self.place(key)

        def event(happening: dict[str, Any]) -> None:
            self.tell({"stage": key, **happening})

        def save(state: TrainingState) -> None:
            checkpoints.save(place, state, self.inputs)

        found = checkpoints.newest(place, self.inputs, self.note)
        return TrainingHooks(event=event, stop=self.stop, save=save, resume=found)

    def validation(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What training is watched by."""
        return self.data.validation.inputs, self.data.validation.labels

    def judge(self, model: Any, folder: Path) -> dict[str, Any]:
        """What a model is and how good it is on the test part; its scores go to the folder."""
        framework = self.framework(model)
        logits = framework.predict(model, self.data.test.inputs, batch_size=self.most)
        np.save(folder / LOGITS, logits, allow_pickle=False)
        parameters, macs = self.count(model)
        return {"parameters": parameters, "macs": macs, **self.quality(logits)}

    def quality(self, logits: NDArray[Any]) -> dict[str, Any]:
        """How good scores on the test part are: accuracy with its interval, and what answers without knowledge have.

        Beside them the balanced accuracy where the classes are uneven.
        """
        labels = self.data.test.labels
        answers = Answers.of(logits.argmax(-1), labels)
        others = answers.n - answers.most_frequent
        found = {
            "accuracy": accuracy(logits, labels).to_dict(),
            "chance": max(1 / len(self.data.classes), answers.chance if others >= FEW_OTHERS else 0.0),
            "one_class": answers.constant and others > 0,
        }
        return found | ({"balanced_accuracy": answers.balanced} if answers.uneven else {})

    def count(self, model: Any) -> tuple[int, int]:
        """Parameters and MACs of a model for one sample.

        Raises:
            UsageError: it does not run on the data.
            ShapeError: it puts out another number of classes than the data has.
        """
        framework = self.framework(model)
        framework.check_runs(model, self.example)
        logits = framework.predict(model, self.example)
        if logits.ndim != 2 or logits.shape[1] != len(self.data.classes):  # noqa: PLR2004 - (N, K)
            raise ShapeError(
                f"The model puts out scores of shape {logits.shape[1:]}.",
                f"The data {self.data.name} has {len(self.data.classes)} classes.",
                "Give the model a head for these classes.",
            )
        return framework.count(model, framework.tensor(self.example))

    def check_alive(self, key: str, record: dict[str, Any], fix: str = TRAIN_BETTER) -> None:
        """Refuse a model that answers one class for everything, or no better than chance.

        Args:
            key: of the stage.
            record: of the stage, with its accuracy on the test part.
            fix: the advice of the error.

        Raises:
            NumericError: it does.
        """
        chance = record["chance"]
        value, n = record["accuracy"]["value"], record["accuracy"]["n"]
        if record["one_class"] or value <= chance:
            balanced = record.get("balanced_accuracy")
            more = "" if balanced is None else f", balanced accuracy {balanced:.1%}"
            raise NumericError(
                f"The model is dead after the stage {key!r}: {value:.1%} of {n} right, chance is {chance:.1%}{more}.",
                "It says one class for every sample." if record["one_class"] else "It guesses.",
                fix,
            )

    def logits(self, key: str) -> NDArray[Any]:
        """The scores on the test part that a finished stage has stored."""
        found: NDArray[Any] = np.load(self.folder / "checkpoints" / key / "done" / LOGITS, allow_pickle=False)
        return found
