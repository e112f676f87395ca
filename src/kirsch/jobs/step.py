"""Interface of a step of a job, and the registry of steps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from kirsch import figures
from kirsch.options import Options
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kirsch.jobs.job import Job, Record


class Step(Options):
    """One step of a job, such as pruning. The fields are its options, in Python, recipes and `--set`.

    A package registers a step by its name: `@STEPS.register("prune")`. A job calls `preview` of all steps in order
    before any long work, and then, for each step, `run`, or `load` if the step is already done.

    Attributes:
        needs: name of a step that must come before; empty if there is no such condition.
        needs_student: whether the job must have a student.
        repeatable: whether a job may have several of these steps.
        changes_model: whether the step may change the model that is exported; such a step cannot follow `export`.
    """

    needs: ClassVar[str] = ""
    needs_student: ClassVar[bool] = False
    repeatable: ClassVar[bool] = True
    changes_model: ClassVar[bool] = True

    @property
    def packages(self) -> tuple[str, ...]:
        """Optional packages that the step imports. A forecast names those that are not installed."""
        return ()

    def identity(self, job: Job) -> str:
        """Return a text that changes with each part of the recipe on which the result of this step depends."""
        del job
        return self.model_dump_json()

    def preview(self, job: Job) -> None:
        """Check before any long work that the step can run.

        Set `job.model` to a model of the shapes that the step will produce.

        Raises:
            KirschError: the step would fail.
        """

    def seconds(self, job: Job) -> float | None:
        """Return the estimated time on `job.model`, from a few timed training steps; called after `preview`.

        None: the time cannot be estimated.
        """
        del job
        return 1.0

    def run(self, job: Job, folder: Path) -> Record:
        """Run the step on the models of the job, write its files to a folder, and return its record.

        A step that changes the model sets `job.model` first, and then adds `job.save_and_evaluate(job.model, folder)`
        to its record.
        """
        raise NotImplementedError

    def load(self, job: Job, folder: Path, record: Record) -> None:
        """Load the results of the finished step from its folder into the job."""

    def outside_files(self, record: Record) -> dict[str, str]:
        """Return the path in the run folder and the sha256 of each result that lies outside the folder of the step.

        If such a file is missing or has another sha256, the step is run again when the run is continued.
        """
        del record
        return {}


STEPS: Registry[type[Step]] = Registry("step")


def model_cells(record: Record) -> list[str]:
    """Return quality and cost of the model of a step as texts for the table of steps."""
    quality = record["accuracy"]
    return [
        figures.interval(quality["value"], quality["low"], quality["high"]),
        f"{figures.count(record['macs'])} MACs",
        f"{figures.count(record['parameters'])} params",
        *([f"balanced {figures.percent(record['balanced_accuracy'])}"] if "balanced_accuracy" in record else []),
    ]


def keys_of(names: Sequence[str]) -> list[str]:
    """Return a key for each step of a job: its name; "prune-2" for the second step named "prune"."""
    counts: Counter[str] = Counter()
    keys = []
    for name in names:
        counts[name] += 1
        keys.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return keys
