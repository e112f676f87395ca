"""Fixtures with small recipes and one finished run."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch

import kirsch
from kirsch.data.sources import load_data
from kirsch.recipes.models import build
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.runner import run
from tiny import write_job

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.recipes.runner import Outcome


@dataclass
class JobFolder:
    """Folder with nets.py and recipe.yaml; its subfolder `run` is the run folder.

    Args:
        base: path of the folder.
        events: events of the last run of this object, in order.
    """

    base: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.base / "run"

    def recipe(self, *changes: str):
        return read_recipe(self.base / "recipe.yaml", changes)

    def run_recipe(self, *changes: str, **options: Any) -> Outcome:
        """Run the recipe with changed keys."""
        self.events.clear()
        folder = options.pop("folder", self.folder)
        return run(self.recipe(*changes), folder, base=self.base, listen=self.events.append, **options)

    def steps(self, name: str) -> list[str]:
        """Return the step key of each event with this name, in order."""
        return [event["key"] for event in self.events if event["event"] == name]

    def notes(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "note"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small networks are slower with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(tmp_path):
    """Recipe and models, not run yet."""
    write_job(tmp_path)
    return JobFolder(tmp_path)


@pytest.fixture(scope="session")
def new_job(tmp_path_factory):
    """Function that writes recipe and models to a new folder that is kept for the session."""

    def make():
        base = tmp_path_factory.mktemp("job")
        write_job(base)
        return JobFolder(base)

    return make


@pytest.fixture(scope="session")
def finished(new_job):
    """Finished run and its outcome, which tests must not change."""
    done = new_job()
    return done, done.run_recipe()


@pytest.fixture
def done(finished, tmp_path):
    """Copy of the finished run that a test may change."""
    shutil.copytree(finished[0].base, tmp_path, dirs_exist_ok=True)
    return JobFolder(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Trained model, untrained small model, and data, which tests must not change."""
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
