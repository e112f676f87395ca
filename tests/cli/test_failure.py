"""Error output and exit codes of the command."""

from __future__ import annotations

import io
import json
import warnings
from typing import TYPE_CHECKING

import pytest

import kirsch
from kirsch.cli import command, failure
from kirsch.cli.terminal import Mode, Terminal
from kirsch.errors import CheckpointError, Interrupted, OutputError, Preempted, UnknownNameError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Return a function that reports an error and returns (exit code, standard output, standard error)."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(error, folder=None, **mode):
        out, err = io.StringIO(), io.StringIO()
        return failure.report_error(error, Terminal(Mode(**mode), out, err), folder), out.getvalue(), err.getvalue()

    return run


def fail(error: BaseException) -> None:
    """Raise an error in a line that seems to belong to the package."""
    exec(compile("raise error", kirsch.__file__, "exec"), {"error": error})


def raised(error: BaseException) -> BaseException:
    """Return the error with a traceback that ends in the package."""
    try:
        fail(error)
    except BaseException as caught:  # noqa: BLE001 - the exception is the result
        return caught


def run_folder(path: Path) -> Path:
    path.mkdir()
    (path / failure.RUN).write_text("{}")
    return path


def test_an_error_has_three_lines_what_why_and_fix(report):
    code, out, err = report(UnknownNameError("importance", "magnitud", ["magnitude", "random"]))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error   There is no importance 'magnitud'.",
        "why     Known: magnitude, random.",
        "fix     Did you mean 'magnitude'?",
    ]


def test_an_empty_part_of_an_error_is_omitted(report):
    assert report(UsageError("Wrong."))[2] == "error   Wrong.\n"


def test_further_lines_of_a_message_are_indented(report):
    assert report(UsageError("Two problems:\nfirst\nsecond"))[2].splitlines()[1:] == ["        first", "        second"]


def test_control_characters_in_an_error_are_escaped(report):
    assert report(UsageError("The layer \x1b[31m[red] is wrong."))[2] == "error   The layer \\x1b[31m[red] is wrong.\n"


@pytest.mark.parametrize(("error", "code"), [(Preempted("Stopped."), 75), (Interrupted("Stopped."), 130)])
def test_a_stop_is_not_shown_as_an_error(report, error, code):
    exit_code, _, err = report(error)
    assert (exit_code, err) == (code, "stopped Stopped.\n")


def test_an_error_with_json_is_an_object(report):
    code, out, err = report(CheckpointError("What.", "Why.", "Fix."), json=True)
    assert (code, err) == (4, "")
    assert json.loads(out) == {
        "error": {
            "type": "CheckpointError",
            "what": "What.",
            "why": "Why.",
            "fix": "Fix.",
            "exit_code": 4,
            "traceback": None,
        }
    }


def test_an_unexpected_exception_is_a_bug_and_the_traceback_is_stored(report, tmp_path):
    code, _, err = report(raised(ZeroDivisionError("division by zero\nand more")))
    stored = next(tmp_path.glob("kirsch-*.txt"))
    assert code == 1
    assert err.splitlines() == [
        "error   A bug of Kirsch: ZeroDivisionError: division by zero.",
        f"why     The traceback is in {stored}.",
        "fix     Report the bug with its traceback; --debug shows the traceback here.",
    ]
    assert "in raised" in stored.read_text()


def test_the_traceback_of_a_run_is_stored_in_its_folder(report, tmp_path):
    folder = run_folder(tmp_path / "run")
    _, out, _ = report(raised(RuntimeError("boom")), folder, json=True)
    assert "RuntimeError: boom" in (folder / "error.txt").read_text()
    assert json.loads(out)["error"]["traceback"] == str(folder / "error.txt")


def test_no_traceback_is_written_to_a_folder_that_is_not_a_run(report, tmp_path):
    report(raised(RuntimeError("boom")), tmp_path)
    report(raised(CheckpointError("boom")), tmp_path)
    assert not (tmp_path / "error.txt").exists()


def test_usage_errors_and_stops_store_no_traceback(report, tmp_path):
    folder = run_folder(tmp_path / "run")
    for error in (UsageError("a"), OutputError("b"), Preempted("c")):
        report(error, folder)
    assert not (folder / "error.txt").exists()
    report(CheckpointError("d"), folder)
    assert (folder / "error.txt").exists()


def test_debug_shows_the_traceback(report):
    assert "in raised" in report(raised(UsageError("Wrong.")), debug=True)[2]
    assert report(raised(UsageError("Wrong.")))[2] == "error   Wrong.\n"


def test_the_traceback_of_an_error_with_undecodable_bytes_is_stored(report, tmp_path):
    code, _, err = report(raised(RuntimeError("name\udce9")))
    assert code == 1
    assert "name\\udce9" in err
    assert "name\\udce9" in next(tmp_path.glob("kirsch-*.txt")).read_text()


def test_an_unexpected_exception_in_a_subcommand_has_exit_code_1(kirsch, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("kirsch.cli.doctor.doctor", lambda _terminal: fail(ZeroDivisionError("division by zero")))
    code, _, err = kirsch("doctor")
    assert code == 1
    assert err.startswith("error   A bug of Kirsch: ZeroDivisionError: division by zero.\n")


def test_control_c_in_a_subcommand_has_exit_code_130(kirsch, monkeypatch):
    def interrupted(_terminal):
        raise KeyboardInterrupt

    monkeypatch.setattr("kirsch.cli.doctor.doctor", interrupted)
    assert kirsch("doctor") == (130, "", "stopped The command was stopped by SIGINT.\n")


def test_warnings_of_libraries_are_hidden_without_debug():
    with pytest.warns(UserWarning, match="planted"), command._quiet_warnings(Mode(debug=True)):
        warnings.warn("planted", stacklevel=1)
    with warnings.catch_warnings(record=True) as seen, command._quiet_warnings(Mode()):
        warnings.warn("planted", stacklevel=1)
    assert seen == []
