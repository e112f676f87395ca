"""Tables align their columns in text, and have cells in HTML."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.tables import Piece, Printable, Table, html, lines, notes, plain


def text(*parts):
    return [plain(line) for line in lines(parts)]


def test_columns_are_aligned():
    table = Table([["a", "long cell", "x"], ["longer", "b", "y"]], gaps=(1, 3), first=0)
    assert text(table) == ["a      long cell   x", "longer b           y"]


def test_the_first_column_has_a_minimum_width():
    assert text(Table([["a", "b"]], first=4)) == ["a    b"]


def test_the_last_cell_of_a_row_does_not_widen_its_column():
    assert text(Table([["note", "a very long text"], ["name", "b", "c"]], gaps=(1, 1), first=0)) == [
        "note a very long text",
        "name b c",
    ]


@given(st.lists(st.lists(st.text("abc", max_size=5), max_size=4), max_size=4))
def test_a_table_has_one_line_per_row_with_all_its_texts(rows):
    found = text(Table(rows))
    assert len(found) == len(rows)
    assert all(line.split() == " ".join(row).split() for line, row in zip(found, rows, strict=True))


def test_each_note_is_one_row():
    assert text(notes(["one", "two"]), []) == ["note         one", "note         two", ""]


def test_html_has_one_tr_per_row_and_one_td_per_cell():
    found = html([Table([["a", "b"], ["c"]]), [Piece("line")]])
    assert (found.count("<tr>"), found.count("<td"), found.count("<table>")) == (2, 3, 1)
    assert "<div>line</div>" in found


@pytest.mark.parametrize("attack", ["<script>alert(1)</script>", '"><img src=x>', "a & b"])
def test_html_contains_no_text_unescaped(attack):
    found = html([[Piece(attack, "bad")], Table([[attack, Piece(attack, "good")]])])
    assert attack not in found
    assert found.count("&lt;" if "<" in attack else "&amp;") >= 3


def test_control_characters_are_escaped():
    assert text([Piece("\x1b[31m")], Table([["a\nb", "c"]], first=0)) == ["\\x1b[31m", "a\\nb c"]


def test_a_printable_object_prints_its_lines_and_tables():
    class Shown(Printable):
        def parts(self):
            return [[Piece("title", "strong")], Table([["a", "b"]]), []]

    assert str(Shown()) == "title\na            b"
    assert "<table>" in Shown()._repr_html_()
