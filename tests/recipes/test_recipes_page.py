"""The code on the page about recipes runs as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import fit
from kirsch.recipes.recipe import read_recipe
from kirsch.steps import STEPS

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_table_lists_the_steps():
    """All but `evaluate`, which is added by itself."""
    names = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted([*names, "evaluate"]) == sorted(STEPS)


def test_recipe_and_changes_are_valid():
    (text,), (command,) = blocks("yaml"), blocks("sh")
    steps = read_recipe(text, re.findall(r"--set (\S+)", command)).all_steps
    assert list(steps) == ["train", "prune", "recover", "prune-2", "recover-2", "export"]
    assert steps["recover-2"].epochs == 20
    assert shlex.split(command)[:2] == ["kirsch", "compress"]


@pytest.fixture
def data():
    labels = np.arange(24) % 2
    inputs = np.random.default_rng(0).normal(labels[:, None, None, None], 0.3, (24, 1, 4, 4)).astype(np.float32)
    part = kirsch.Split(inputs, labels)
    return kirsch.DataSet("brightness", part, part, part, ("dark", "bright"))


def test_steps_in_python_run(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 2),
    )
    train = ArrayData(data.train.inputs, data.train.labels)
    trained = fit(model, train, training=kirsch.Training(epochs=5)).model
    names = {"model": trained, "data": data}
    (code,) = blocks("python")
    exec(compile(code, "recipes.md", "exec"), names)
    keys = [step["key"] for step in names["result"].metrics["steps"]]
    assert keys == ["evaluate", "prune", "recover", "prune-2", "recover-2", "export"]
    assert names["result"].artifact.path.is_file()
