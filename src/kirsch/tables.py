"""Lines and tables of text, for the terminal, for `print`, and as HTML for notebooks.

A line consists of pieces, each a text with a tone. Control characters in a text, such as the name of a layer, are
escaped, so that no text can change colors or the cursor.
"""

from __future__ import annotations

import html as markup
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STYLES = {
    "": "",
    "good": "color: #1a7f37",
    "warning": "color: #9a6700",
    "bad": "color: #cf222e",
    "faint": "opacity: 0.6",
    "strong": "font-weight: bold",
}
"""Style in HTML for each tone of a piece. The text alone has the same information."""


class Piece(NamedTuple):
    """A part of a line.

    Args:
        text: the text; control characters are escaped when it is written.
        tone: a key of `STYLES`.
    """

    text: str
    tone: str = ""


Line = list[Piece]
Cell: TypeAlias = str | Piece | Line


@dataclass(frozen=True)
class Table:
    """Rows of cells. In text, the columns are aligned at the left; a number must be padded before it becomes a cell.

    Args:
        rows: the cells of each row; rows may have different lengths.
        gaps: spaces after the first, second, ... column; the last number holds for all further columns.
        first: least width of the first column.
    """

    rows: Sequence[Sequence[Cell]]
    gaps: tuple[int, ...] = (1, 2)
    first: int = 12

    def lines(self) -> list[Line]:
        """Return one line per row."""
        rows = [[_line(cell) for cell in row] for row in self.rows]
        widths = [self.first] * bool(rows)
        for row in rows:
            widths += [0] * (len(row) - len(widths))
            for column, cell in enumerate(row[:-1]):  # the last cell of a row needs no width
                widths[column] = max(widths[column], _width(cell))
        return [self._padded(row, widths) for row in rows]

    def _padded(self, row: Sequence[Line], widths: Sequence[int]) -> Line:
        line: Line = []
        for column, cell in enumerate(row):
            line += cell
            if column + 1 < len(row):
                gap = self.gaps[min(column, len(self.gaps) - 1)]
                line.append(Piece(" " * (widths[column] - _width(cell) + gap)))
        return line


Part: TypeAlias = Line | Table


class Printable:
    """Base class of objects that `print` and notebooks show as lines and tables."""

    def parts(self) -> list[Part]:
        """Return the lines and tables."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the lines and tables as text."""
        return "\n".join(map(plain, lines(self.parts()))).rstrip("\n")

    def _repr_html_(self) -> str:
        """Return the lines and tables as HTML, for notebooks."""
        return html(self.parts())


def notes(texts: Iterable[str]) -> Table:
    """Return a table with a row for each note."""
    return Table([[Piece("note", "warning"), text] for text in texts])


def lines(parts: Iterable[Part]) -> list[Line]:
    """Return the lines of all parts."""
    return [line for part in parts for line in (part.lines() if isinstance(part, Table) else [part])]


def html(parts: Iterable[Part]) -> str:
    """Return the parts as HTML. All texts are escaped, and the spaces that align numbers are kept."""
    content = (_html_table(part) if isinstance(part, Table) else f"<div>{_html(part)}</div>" for part in parts)
    return f'<div style="white-space: pre-wrap">{"".join(content)}</div>'


def verbatim(text: str) -> str:
    r"""Return the text with all characters that are not printable escaped, such as \n and \x1b."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def plain(line: Iterable[Piece]) -> str:
    """Return the text of a line without tones and trailing spaces."""
    return "".join(verbatim(text) for text, _ in line).rstrip()


def _line(cell: Cell) -> Line:
    if isinstance(cell, str):
        return [Piece(cell)]
    return [cell] if isinstance(cell, Piece) else cell


def _width(line: Line) -> int:
    return sum(len(verbatim(text)) for text, _ in line)


def _html_table(table: Table) -> str:
    rows = ("".join(f'<td style="text-align: left">{_html(_line(cell))}</td>' for cell in row) for row in table.rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _html(line: Line) -> str:
    texts = ((markup.escape(verbatim(text)), STYLES[tone]) for text, tone in line if text)
    return "".join(f'<span style="{style}">{text}</span>' if style else text for text, style in texts) or "&nbsp;"
