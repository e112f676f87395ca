"""Progress of training runs that are called from Python: one line per epoch, and a bar on a terminal or notebook."""

from __future__ import annotations

import io
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.errors import NumericError
from kirsch.frameworks.training import TrainingHooks
from terminals import Tty
from training_networks import tanh_network

EPOCHS = 2


def samples():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((24, 5)).astype(np.float32)
    return inputs, inputs[:, :3].argmax(1)


def distilled(**options):
    data = ArrayData(*samples(), batch_size=8)
    arguments = {"training": kirsch.Training(epochs=EPOCHS, learning_rate=0.1), "check_teacher": False} | options
    return kirsch.distill(tanh_network(4, 1), tanh_network(6, 2), data, **arguments)


def steps_without_escapes(text):
    """Return what a terminal shows, one entry for each update of a line."""
    return [part.strip() for part in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if part.strip()]


@pytest.fixture
def open_terminal(monkeypatch):
    """Return a function that replaces the output streams with a terminal, and returns the terminal.

    The test calls the function, because pytest replaces the streams again between the fixtures and the test.
    """

    def open_():
        stream = Tty()
        for name, value in {"stderr": stream, "stdout": stream}.items():
            monkeypatch.setattr(sys, name, value)
        for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("TERM", "xterm")
        return stream

    return open_


def test_a_call_whose_output_is_not_a_terminal_prints_nothing(capfd):
    distilled()
    assert capfd.readouterr() == ("", "")


def test_progress_can_be_switched_off_on_a_terminal(open_terminal):
    terminal = open_terminal()
    distilled(progress=False)
    assert terminal.getvalue() == ""
    distilled()
    assert terminal.getvalue()


def test_progress_true_prints_one_plain_line_per_epoch_without_a_terminal(capfd):
    trained = distilled(progress=True, validation=samples())
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == EPOCHS
    for number, (line, record) in enumerate(zip(lines, trained.history, strict=True), start=1):
        accuracy = f"{100 * record['accuracy']:.1f} %"
        assert re.fullmatch(rf"epoch {number}/2   loss \d+\.\d+ *   {re.escape(accuracy)}   \d+\.\d s", line)


def test_an_epoch_without_validation_has_no_accuracy(capfd):
    distilled(progress=True)
    assert "%" not in capfd.readouterr().err


def test_metrics_of_a_validation_function_are_shown_by_name(capfd):
    distilled(progress=True, validation=lambda _: {"f1": 0.25})
    assert "   f1 0.250   " in capfd.readouterr().err


def test_a_terminal_shows_a_bar_while_an_epoch_runs_and_then_its_line(open_terminal):
    terminal = open_terminal()
    distilled()
    shown = steps_without_escapes(terminal.getvalue())
    assert re.match(r"epoch 1/2 ━+ 1/3", shown[0])
    lines = [number for number, text in enumerate(shown) if "loss" in text]
    assert [shown[number][:9] for number in lines] == ["epoch 1/2", "epoch 2/2"]
    assert any(text.startswith("epoch 2/2 ━") for text in shown[lines[0] : lines[1]])
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l"), "the cursor is shown"


def test_the_bar_is_removed_when_training_fails(open_terminal):
    terminal = open_terminal()

    class Broken(nn.Linear):
        calls = 0

        def forward(self, x):
            type(self).calls += self.training
            return super().forward(x) * (torch.nan if self.calls > 3 else 1)

    data = ArrayData(*samples(), batch_size=4)
    with pytest.raises(NumericError):
        kirsch.distill(Broken(5, 3), tanh_network(6, 2), data, check_teacher=False)
    written = terminal.getvalue()
    assert "━" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown"
    assert written.endswith("\x1b[2K"), "the line of the bar is erased"


def test_data_without_a_length_shows_the_number_of_the_batch(open_terminal):
    terminal = open_terminal()

    class Stream:
        def __iter__(self):
            inputs, labels = samples()
            return iter([(inputs, labels)] * 3)

    training = kirsch.Training(epochs=1, schedule="constant")
    kirsch.distill(tanh_network(4, 1), tanh_network(6, 2), Stream(), training=training, check_teacher=False)
    assert "epoch 1/1   batch 1" in steps_without_escapes(terminal.getvalue())


def test_a_notebook_updates_the_line_in_its_cell(monkeypatch):
    cell = io.StringIO()
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stdout", cell)
    distilled()
    written = cell.getvalue()
    assert "\x1b" not in written
    assert re.match(r"\repoch 1/2 ━+ 1/3", written)
    finished = [line.rsplit("\r", 1)[-1] for line in written.splitlines(keepends=True) if line.endswith("\n")]
    assert [line[:17] for line in finished] == ["epoch 1/2   loss ", "epoch 2/2   loss "]


def test_a_shell_in_a_terminal_is_not_a_notebook(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=object))
    distilled()
    assert capsys.readouterr() == ("", "")


def test_callbacks_of_the_user_are_called_beside_the_progress(capfd):
    events, batches, closed = [], [], []
    hooks = TrainingHooks(
        event=events.append, batch=lambda *position: batches.append(position), close=lambda: closed.append(1)
    )
    distilled(progress=True, hooks=hooks)
    assert [event["event"] for event in events] == ["first_batch", "epoch", "epoch"]
    assert batches == [(epoch, 2, batch, 3) for epoch in (1, 2) for batch in (1, 2, 3)]
    assert closed == [1]
    assert capfd.readouterr().err.count("loss") == EPOCHS


def test_a_warning_is_one_line_and_not_a_python_warning(capfd):
    """A Python warning would fail the test. The warning is that the run ends before the ramp of the weight."""
    late = kirsch.Objective(kirsch.Objective.kd().terms, label_weight=kirsch.Ramp(0.1, 1.0, epochs=9))
    distilled(progress=True, objective=late)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["warning", "epoch 1/2", "epoch 2/2"]
    assert lines[0].startswith("warning  The weight of the labels reaches 1 after 9 epochs")


def test_a_warning_that_all_models_of_a_chain_give_is_shown_once_and_epochs_name_their_model(capfd):
    late = kirsch.Objective(kirsch.Objective.kd().terms, label_weight=kirsch.Ramp(0.1, 1.0, epochs=9))
    models = [tanh_network(8, 1), tanh_network(6, 2), tanh_network(4, 3)]
    data, training = ArrayData(*samples(), batch_size=8), kirsch.Training(epochs=1, learning_rate=0.1)
    kirsch.distill_chain(models, data, objective=late, training=training, check_teacher=False, progress=True)
    starts = [line.split("  ")[0] for line in capfd.readouterr().err.splitlines()]
    assert starts == ["warning", "model 1", "model 2"]


def test_mutual_learning_shows_the_accuracy_of_each_student(capfd):
    data, training = ArrayData(*samples(), batch_size=8), kirsch.Training(epochs=1, learning_rate=0.1)
    found = kirsch.distill_mutually(
        [tanh_network(4, 1), tanh_network(5, 2)], data, training=training, validation=samples(), progress=True
    )
    line = capfd.readouterr().err
    for number, trained in enumerate(found):
        assert f"{number}.accuracy {100 * trained.history[0]['accuracy']:.1f} %" in line
