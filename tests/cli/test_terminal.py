"""What is written where, and that no text can steer the terminal."""

from __future__ import annotations

import errno
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.cli.terminal import ClosedError, Mode, Piece, Terminal, plain, verbatim
from kirsch.errors import OutputError

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


class Tty(io.StringIO):
    """A terminal that can be read."""

    def isatty(self) -> bool:
        return True


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
def test_what_prints_is_written_as_it_is_and_the_rest_by_its_escape(text, written):
    assert verbatim(text) == written


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_a_written_text_is_always_one_printable_line(text):
    assert verbatim(text).isprintable()
    assert verbatim(text) == text or not text.isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_on_a_terminal_shows_as_itself(text):
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece(text)])
    assert out.getvalue().rstrip() == verbatim(text).rstrip()


def test_a_tone_colors_its_piece_alone():
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece("goal met", "good"), Piece(" by 3")])
    assert out.getvalue() == "\x1b[32mgoal met\x1b[0m by 3\n"


def test_no_color_takes_the_colors_away_and_leaves_the_words(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece("goal met", "good"), Piece(" by 3", "bad")])
    assert out.getvalue() == "goal met by 3\n"


def test_a_pipe_gets_plain_words():
    screen, out, _ = terminal()
    screen.progress([Piece("goal met", "good"), Piece(" by 3   ")])
    assert out.getvalue() == "goal met by 3\n"
    assert not screen.lively


def test_a_terminal_that_can_only_write_gets_plain_words(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen, out, _ = terminal(tty=True)
    screen.progress([Piece("goal met", "good")])
    assert out.getvalue() == "goal met\n"
    assert not screen.lively


def test_progress_and_results_go_to_the_standard_output():
    screen, out, err = terminal()
    screen.progress([Piece("one")])
    screen.result([[Piece("two")]], {"two": 2})
    assert (out.getvalue(), err.getvalue()) == ("one\ntwo\n", "")


def test_with_json_the_standard_output_holds_one_object_and_progress_goes_aside():
    screen, out, err = terminal(json=True)
    screen.progress([Piece("one")])
    screen.result([[Piece("two")]], {"two": ["\u202e\x9b", 2]})
    assert json.loads(out.getvalue()) == {"two": ["\u202e\x9b", 2]}
    assert out.getvalue().isascii()
    assert out.getvalue().count("\n") == 1
    assert err.getvalue() == "one\n"


def test_quiet_leaves_results_alone():
    screen, out, err = terminal(quiet=True)
    screen.progress([Piece("one")])
    screen.result([[Piece("two")]], {})
    assert (out.getvalue(), err.getvalue()) == ("two\n", "")


def test_quiet_still_complains():
    screen, _, err = terminal(quiet=True)
    screen.complain([Piece("wrong", "bad")])
    assert err.getvalue() == "wrong\n"


def test_a_reader_that_has_gone_is_no_error_of_ours():
    screen = Terminal(Mode(), Broken(errno.EPIPE), io.StringIO())
    with pytest.raises(ClosedError):
        screen.progress([Piece("one")])


def test_a_full_disk_behind_the_standard_output_is_said():
    screen = Terminal(Mode(), Broken(errno.ENOSPC), io.StringIO())
    with pytest.raises(OutputError, match=r"The standard output cannot be written\. planted"):
        screen.progress([Piece("one")])


def test_the_living_line_is_shown_cut_to_the_width_and_taken_away(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen, out, _ = terminal(tty=True)
    screen.start(lambda: [Piece("[red] " + "x" * 40)], moves=False)
    shown = out.getvalue()
    screen.stop()
    assert "[red] xxxxxxxxxxxxx…" in shown
    assert "x" * 14 not in shown
    assert out.getvalue().endswith("\x1b[2K")  # the line is erased


def test_lines_written_while_one_lives_stand_above_it():
    screen, out, _ = terminal(tty=True)
    screen.start(lambda: [Piece("living")], moves=False)
    screen.progress([Piece("finished")])
    written = out.getvalue()
    screen.stop()
    assert written.index("finished") < written.rindex("living")


@pytest.mark.parametrize("mode", [{"quiet": True}, {}])
def test_no_line_lives_where_none_can_or_shall(mode):
    screen, out, _ = terminal(tty=bool(mode), **mode)
    screen.start(lambda: [Piece("living")])
    screen.stop()
    assert out.getvalue() == ""


def test_the_cursor_comes_back_when_the_process_ends_at_once():
    screen, out, _ = terminal(tty=True)
    screen.start(lambda: [Piece("living")], moves=False)
    before = out.getvalue()
    screen.restore()
    assert out.getvalue().removeprefix(before).startswith("\x1b[?25h")
    screen.stop()


def test_a_line_has_no_spaces_at_its_end():
    assert plain([Piece("a  ", "bad"), Piece("  ")]) == "a"
