"""How a verb ends when it fails."""

from __future__ import annotations

import io
import json
import warnings
from typing import TYPE_CHECKING

import pytest

import kirsch
from kirsch.cli import app, failure
from kirsch.cli.terminal import Mode, Terminal
from kirsch.errors import CheckpointError, Interrupted, OutputError, Preempted, UnknownNameError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Tells an error and gives (exit code, standard output, standard error)."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def tell(error, folder=None, **mode):
        out, err = io.StringIO(), io.StringIO()
        return failure.tell(error, Terminal(Mode(**mode), out, err), folder), out.getvalue(), err.getvalue()

    return tell


def fail(error: BaseException) -> None:
    """Raise an error in a line that Python takes for one of the package."""
    exec(compile("raise error", kirsch.__file__, "exec"), {"error": error})


def raised(error: BaseException) -> BaseException:
    """The error with a traceback that ends in the package."""
    try:
        fail(error)
    except BaseException as caught:  # noqa: BLE001 - that is the point
        return caught


def run_folder(path: Path) -> Path:
    path.mkdir()
    (path / failure.RUN).write_text("{}")
    return path


def test_an_error_is_three_lines_what_why_and_what_to_do(told):
    code, out, err = told(UnknownNameError("importance", "magnitud", ["magnitude", "random"]))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error   There is no importance 'magnitud'.",
        "why     Known: magnitude, random.",
        "do      Did you mean 'magnitude'?",
    ]


def test_a_line_that_has_nothing_to_say_is_left_out(told):
    assert told(UsageError("Wrong."))[2] == "error   Wrong.\n"


def test_the_problems_of_a_recipe_stand_below_each_other(told):
    assert told(UsageError("Two problems:\nfirst\nsecond"))[2].splitlines()[1:] == ["        first", "        second"]


def test_a_name_in_an_error_cannot_steer_the_terminal(told):
    assert told(UsageError("The layer \x1b[31m[red] is wrong."))[2] == "error   The layer \\x1b[31m[red] is wrong.\n"


@pytest.mark.parametrize(("error", "code"), [(Preempted("Stopped."), 75), (Interrupted("Stopped."), 130)])
def test_being_stopped_is_no_error(told, error, code):
    found, _, err = told(error)
    assert (found, err) == (code, "stopped Stopped.\n")


def test_with_json_an_error_is_an_object(told):
    code, out, err = told(CheckpointError("What.", "Why.", "Mend."), json=True)
    assert (code, err) == (4, "")
    assert json.loads(out) == {
        "error": {
            "type": "CheckpointError",
            "what": "What.",
            "why": "Why.",
            "fix": "Mend.",
            "exit_code": 4,
            "traceback": None,
        }
    }


def test_what_nobody_foresaw_is_a_bug_of_ours_and_its_traceback_is_kept(told, tmp_path):
    code, _, err = told(raised(ZeroDivisionError("division by zero\nand more")))
    kept = next(tmp_path.glob("kirsch-*.txt"))
    assert code == 1
    assert err.splitlines() == [
        "error   A bug of ours: ZeroDivisionError: division by zero.",
        f"why     The traceback is in {kept}.",
        "do      Report it with the traceback; --debug shows it here.",
    ]
    assert "in raised" in kept.read_text()


def test_the_traceback_of_a_run_lies_in_its_folder(told, tmp_path):
    folder = run_folder(tmp_path / "run")
    _, out, _ = told(raised(RuntimeError("boom")), folder, json=True)
    assert "RuntimeError: boom" in (folder / "error.txt").read_text()
    assert json.loads(out)["error"]["traceback"] == str(folder / "error.txt")


def test_a_folder_that_was_refused_is_not_written_to(told, tmp_path):
    told(raised(RuntimeError("boom")), tmp_path)
    told(raised(CheckpointError("boom")), tmp_path)
    assert not (tmp_path / "error.txt").exists()


def test_a_wrong_call_leaves_no_traceback_in_the_run(told, tmp_path):
    folder = run_folder(tmp_path / "run")
    for error in (UsageError("a"), OutputError("b"), Preempted("c")):
        told(error, folder)
    assert not (folder / "error.txt").exists()
    told(CheckpointError("d"), folder)
    assert (folder / "error.txt").exists()


def test_debug_shows_the_traceback(told):
    assert "in raised" in told(raised(UsageError("Wrong.")), debug=True)[2]
    assert told(raised(UsageError("Wrong.")))[2] == "error   Wrong.\n"


def test_an_error_with_bytes_that_are_no_text_can_be_kept(told, tmp_path):
    code, _, err = told(raised(RuntimeError("name\udce9")))
    assert code == 1
    assert "name\\udce9" in err
    assert "name\\udce9" in next(tmp_path.glob("kirsch-*.txt")).read_text()


def test_a_verb_that_fails_in_an_unforeseen_way_exits_with_one(kirsch, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("kirsch.cli.doctor.doctor", lambda _terminal: fail(ZeroDivisionError("division by zero")))
    code, _, err = kirsch("doctor")
    assert code == 1
    assert err.startswith("error   A bug of ours: ZeroDivisionError: division by zero.\n")


def test_control_c_ends_a_verb_with_130(kirsch, monkeypatch):
    def interrupted(_terminal):
        raise KeyboardInterrupt

    monkeypatch.setattr("kirsch.cli.doctor.doctor", interrupted)
    assert kirsch("doctor") == (130, "", "stopped The command was stopped by SIGINT.\n")


def test_warnings_of_libraries_are_silent_unless_asked_for():
    with pytest.warns(UserWarning, match="planted"), app._calm(Mode(debug=True)):
        warnings.warn("planted", stacklevel=1)
    with warnings.catch_warnings(record=True) as seen, app._calm(Mode()):
        warnings.warn("planted", stacklevel=1)
    assert seen == []
