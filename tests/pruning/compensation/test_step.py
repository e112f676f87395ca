"""The option `compensate` of the step `prune`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import KirschError
from kirsch.steps import Evaluate, Prune


def data():
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = (random.standard_normal((120, 6)) + labels[:, None]).astype(np.float32)
    part = kirsch.Split(images, labels)
    return kirsch.DataSet("points", part, part, part, classes=("a", "b", "c"))


def network():
    """Return a network that is better than chance: a run refuses others."""
    model, part = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)), data().train
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(part.inputs)), torch.from_numpy(part.labels))
        loss.backward()
        optimizer.step()
    return model


def test_the_step_compensates_from_training_samples_and_records_the_errors(tmp_path):
    model = network()
    step = Prune(goal=kirsch.Goal(macs=0.5), compensate="least_squares")
    events = []  # a listener gets the notes, which would otherwise be warnings
    steps = [Evaluate(), step]
    result = kirsch.compress(model, data(), steps=steps, folder=tmp_path / "run", listen=events.append)
    (removal,) = result.metrics["removals"]
    errors = removal["compensation"]["output_errors"]
    assert errors["least_squares"] < errors["none"]
    assert removal["notes"][-1] == f"Compensation: {removal['compensation']['text']}."
    assert "with least_squares" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    x = torch.from_numpy(data().train.inputs)
    change = (result.model(x) - model(x)).norm() / model(x).norm()
    assert change.item() == pytest.approx(errors["least_squares"], rel=1e-3)


@pytest.mark.parametrize(
    ("compensate", "sentence"),
    [("batch_norm", "has no batch normalization with running statistics"), ("none", "names the compensation 'none'")],
)
def test_a_method_that_cannot_be_applied_is_refused_before_the_run(tmp_path, compensate, sentence):
    with pytest.raises(KirschError, match=sentence):
        kirsch.compress(
            network(),
            data(),
            steps=[Evaluate(), Prune(goal=kirsch.Goal(macs=0.5), compensate=compensate)],
            folder=tmp_path / "run",
        )
    assert not (tmp_path / "run" / "plan.json").exists()
