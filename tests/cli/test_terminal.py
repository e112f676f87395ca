"""Streams of results, progress and errors, and escaping of control characters."""

from __future__ import annotations

import errno
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.cli.terminal import ClosedError, Mode, Terminal
from kirsch.errors import OutputError
from kirsch.tables import Piece, plain, verbatim
from terminals import Tty

HOSTILE = [
    "[red]",
    "[/0]",
    "<script>alert(1)</script>",
    "a\nb",
    "\x1b[31mred",
    "\x9b31m",
    "\u202egnp",
    "\udc80",
    "\t\0\r",
]


class Broken(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, "planted")


def terminal(*, tty: bool = False, **mode: bool) -> tuple[Terminal, io.StringIO, io.StringIO]:
    out, err = (Tty(), Tty()) if tty else (io.StringIO(), io.StringIO())
    return Terminal(Mode(**mode), out, err), out, err


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("[red]", "[red]"),
        ("[/0]", "[/0]"),
        ("<script>", "<script>"),
        ("layer.3 → ≤ 50 % µs", "layer.3 → ≤ 50 % µs"),
        ("a\nb", "a\\nb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202e", "\\u202e"),
        ("\udc80", "\\udc80"),
    ],
)
def test_printable_characters_are_unchanged_and_other_characters_are_escaped(text, written):
    assert verbatim(text) == written


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_becomes_one_printable_line(text):
    assert verbatim(text).isprintable()
    assert verbatim(text) == text or not text.isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_a_name_is_not_interpreted(text):
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece(text)])
    assert out.getvalue().rstrip() == verbatim(text).rstrip()


def test_a_color_applies_to_its_part_of_the_line_only():
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece("goal met", "good"), Piece(" by 3")])
    assert out.getvalue() == "\x1b[32mgoal met\x1b[0m by 3\n"


def test_no_color_removes_the_colors(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece("goal met", "good"), Piece(" by 3", "bad")])
    assert out.getvalue() == "goal met by 3\n"


def test_a_pipe_gets_plain_text():
    screen, out, _ = terminal()
    screen.progress([Piece("goal met", "good"), Piece(" by 3   ")])
    assert out.getvalue() == "goal met by 3\n"
    assert not screen.is_interactive


def test_a_dumb_terminal_gets_plain_text(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece("goal met", "good")])
    assert out.getvalue() == "goal met\n"
    assert not screen.is_interactive


def test_progress_and_results_go_to_the_standard_output():
    screen, out, err = terminal()
    screen.progress([Piece("one")])
    screen.result([[Piece("two")]], {"two": 2})
    assert (out.getvalue(), err.getvalue()) == ("one\ntwo\n", "")


def test_with_json_the_standard_output_has_one_object_and_progress_goes_to_the_standard_error():
    screen, out, err = terminal(json=True)
    screen.progress([Piece("one")])
    screen.result([[Piece("two")]], {"two": ["\u202e\x9b", 2]})
    assert json.loads(out.getvalue()) == {"two": ["\u202e\x9b", 2]}
    assert out.getvalue().isascii()
    assert out.getvalue().count("\n") == 1
    assert err.getvalue() == "one\n"


def test_quiet_writes_only_results():
    screen, out, err = terminal(quiet=True)
    screen.progress([Piece("one")])
    screen.result([[Piece("two")]], {})
    assert (out.getvalue(), err.getvalue()) == ("two\n", "")


def test_quiet_writes_errors():
    screen, _, err = terminal(quiet=True)
    screen.write_error([Piece("wrong", "bad")])
    assert err.getvalue() == "wrong\n"


def test_a_closed_pipe_raises_closed_error():
    screen = Terminal(Mode(), Broken(errno.EPIPE), io.StringIO())
    with pytest.raises(ClosedError):
        screen.progress([Piece("one")])


def test_a_full_disk_raises_an_output_error():
    screen = Terminal(Mode(), Broken(errno.ENOSPC), io.StringIO())
    with pytest.raises(OutputError, match=r"The standard output cannot be written\. planted"):
        screen.progress([Piece("one")])
    screen = Terminal(Mode(json=True), io.StringIO(), Broken(errno.ENOSPC))
    for write in (screen.progress, screen.write_error):
        with pytest.raises(OutputError, match=r"The standard error cannot be written\. planted"):
            write([Piece("one")])


def test_the_status_line_is_cut_to_the_width_and_removed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen, out, _ = terminal(tty=True)
    screen.start_status(lambda: [Piece("[red] " + "x" * 40)], refresh=False)
    shown = out.getvalue()
    screen.stop_status()
    assert "[red] xxxxxxxxxxxxx…" in shown
    assert "x" * 14 not in shown
    assert out.getvalue().endswith("\x1b[2K")  # the line is erased


def test_lines_are_written_above_the_status_line():
    screen, out, _ = terminal(tty=True)
    screen.start_status(lambda: [Piece("status")], refresh=False)
    screen.progress([Piece("finished")])
    written = out.getvalue()
    screen.stop_status()
    assert written.index("finished") < written.rindex("status")


@pytest.mark.parametrize("mode", [{"quiet": True}, {}])
def test_there_is_no_status_line_in_quiet_mode_or_without_a_terminal(mode):
    screen, out, _ = terminal(tty=bool(mode), **mode)
    screen.start_status(lambda: [Piece("status")])
    screen.stop_status()
    assert out.getvalue() == ""


def test_restore_cursor_shows_the_cursor():
    screen, out, _ = terminal(tty=True)
    screen.start_status(lambda: [Piece("status")], refresh=False)
    before = out.getvalue()
    screen.restore_cursor()
    assert out.getvalue().removeprefix(before).startswith("\x1b[?25h")
    screen.stop_status()


def test_a_line_has_no_trailing_spaces():
    assert plain([Piece("a  ", "bad"), Piece("  ")]) == "a"
