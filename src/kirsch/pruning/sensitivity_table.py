"""Result of a sensitivity analysis: quality against the number of removed units, for each group and residual block."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kirsch import figures, strict_json
from kirsch.annotations import AtLeastZero
from kirsch.arguments import checked
from kirsch.errors import LoadError
from kirsch.graph.kinds import BLOCK
from kirsch.json_schema import array, flag, integer, nullable, number, one_of, record, text
from kirsch.tables import Cell, Line, Part, Piece, Printable, Table, notes

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = 1


@dataclass(frozen=True)
class Point:
    """Quality of the model without some units of one group.

    Args:
        removed: number of removed units.
        quality: value of the metric; None if the model cannot be pruned so far.
        reason: why there is no quality; empty if there is one.
    """

    removed: int
    quality: float | None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """Sensitivity of one group or residual block.

    Args:
        name, kind: name and kind of the group; path of the block, and "block".
        units: number of units of the group; 1 for a block.
        parameters, macs: cost that the model would lose without all units of the group, or without the block.
        points: the measured points, by ascending number of removed units.
    """

    name: str
    kind: str
    units: int
    parameters: int
    macs: int
    points: tuple[Point, ...]

    def at(self, fraction: float) -> Point:
        """Return the point at which a fraction of the units is removed, rounded to whole units."""
        count = removed_count(self.units, fraction)
        return next(point for point in self.points if point.removed == count)


def removed_count(units: int, fraction: float) -> int:
    """Return the number of units that a fraction removes from a group: at least one is removed, and one is kept."""
    return min(max(1, round(fraction * units)), max(units - 1, 1))


@dataclass(frozen=True)
class Sensitivity(Printable):
    """Quality of a model when a part of one group is removed and everything else is kept, without training.

    Args:
        model: class name of the model.
        importance: importance by which the least important units of a group are removed.
        metric: name of the metric; larger values are better.
        percent: whether the metric is a fraction that is shown as percent.
        samples: number of samples on which the quality is measured.
        original: quality of the original.
        fractions: fractions of the units of each group that are removed, ascending.
        parameters, macs: cost of the original.
        rows: one entry for each group, and then for each residual block, in the order of the model.
    """

    made_by: ClassVar[str] = "kirsch.sensitivity(graph, data), or kirsch.Sensitivity.from_json(text) for a stored one"

    model: str
    importance: str
    metric: str
    percent: bool
    samples: int
    original: float
    fractions: tuple[float, ...]
    parameters: int
    macs: int
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        """Return one line."""
        groups, blocks = self.groups, self.blocks
        parts = [figures.counted(len(groups), "group")] * bool(groups)
        parts += [figures.counted(len(blocks), "residual block")] * bool(blocks)
        return f"<kirsch.Sensitivity of {self.model}: {self.metric} of {' and '.join(parts)}>"

    @property
    def groups(self) -> tuple[Row, ...]:
        """Return the rows of groups of units."""
        return tuple(row for row in self.rows if row.kind != BLOCK)

    @property
    def blocks(self) -> tuple[Row, ...]:
        """Return the rows of residual blocks."""
        return tuple(row for row in self.rows if row.kind == BLOCK)

    @checked
    def keep(self, max_drop: AtLeastZero) -> dict[str, int]:
        """Return a width for each group, for the option `keep` of `kirsch.plan`.

        The keys end with the number of the group, such as "query#1", since a layer may have several groups of units.
        The width of a group is the smallest one for which its own drop, and the drop of each larger measured width, is
        at most `max_drop`. Groups without such a width are left out. The drops of several groups add up, so the drop of
        a plan with all of these widths is larger; `max_drop` of `kirsch.plan` measures it.

        Args:
            max_drop: largest drop of the quality for one group alone, in units of the metric: 0.01 is one percentage
                point of accuracy.

        Source: widths from a sensitivity analysis of each layer: Li et al. 2017, arXiv:1608.08710, section 3.2.
        """
        widths = {}
        for row in self.groups:
            for point in row.points:
                if point.quality is None or self.original - point.quality > max_drop + 1e-9:
                    break
                widths[row.name if "#" in row.name else f"{row.name}#1"] = row.units - point.removed
        return widths

    def value_text(self, value: float | None) -> str:
        """Return a value of the metric as text; a dash if there is none."""
        if value is None:
            return "–"
        return figures.percent(value) if self.percent else figures.digits(value)

    def parts(self) -> list[Part]:
        """Return a table of the groups, a table of the residual blocks, and the reasons of missing values."""
        title: Line = [
            Piece(self.model, "strong"),
            Piece(
                f"   {self.metric} on {figures.counted(self.samples, 'sample')} without training, original "
                f"{self.value_text(self.original)}; least {self.importance} removed"
            ),
        ]
        parts: list[Part] = [title, []]
        if self.groups:
            head: list[Cell] = [Piece("group", "faint"), "kind", "units", self._cost_word]
            rows = [[*head, *(f"−{100 * fraction:g} %".rjust(7) for fraction in self.fractions)]]
            for row in self.groups:
                values = [self.value_text(row.at(fraction).quality).rjust(7) for fraction in self.fractions]
                rows.append([row.name, row.kind, f"{row.units:>5}", self._share(row).rjust(len(head[3])), *values])
            parts.append(Table(rows))
        if self.blocks:
            parts += [[]] if self.groups else []
            rows = [[Piece("block", "faint"), self._cost_word, "removed"]]
            for row in self.blocks:
                value = self.value_text(row.points[0].quality).rjust(7)
                rows.append([row.name, self._share(row).rjust(len(self._cost_word)), value])
            parts.append(Table(rows))
        return [*parts, notes(self.notes)]

    @property
    def notes(self) -> list[str]:
        """Return the reasons of missing values."""
        missing = [(row, point) for row in self.rows for point in row.points if point.reason]
        return [
            f"{row.name} without {figures.counted(point.removed, row.kind if row.kind == BLOCK else 'unit')}: "
            f"{point.reason}"
            for row, point in missing
        ]

    @property
    def _cost_word(self) -> str:
        return "MACs" if self.macs else "parameters"

    def _share(self, row: Row) -> str:
        saved, total = (row.macs, self.macs) if self.macs else (row.parameters, self.parameters)
        return figures.percent(saved / max(total, 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON values."""
        return {
            "kirsch_sensitivity": VERSION,
            **{name: value for name, value in asdict(self).items() if name != "rows"},
            "fractions": list(self.fractions),
            "rows": [asdict(row) | {"points": [asdict(point) for point in row.points]} for row in self.rows],
        }

    def to_json(self) -> str:
        """Return the content as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    @classmethod
    @checked
    def from_json(cls, content: str | bytes) -> Sensitivity:
        """Return the result of a JSON text, the inverse of `to_json`.

        Raises:
            LoadError: the text is not the JSON of a sensitivity analysis; the message names the field.
        """
        try:
            fields = SCHEMA(strict_json.parse(content), "")
        except ValueError as error:
            raise LoadError(
                "The JSON text is not a sensitivity analysis.", f"{error}.", "Write it with Sensitivity.to_json."
            ) from error
        rows = tuple(_row(row) for row in fields["rows"])
        values = {name: value for name, value in fields.items() if name != "kirsch_sensitivity"}
        return cls(**{**values, "fractions": tuple(fields["fractions"]), "rows": rows})


def _row(fields: dict[str, Any]) -> Row:
    points: Sequence[dict[str, Any]] = fields["points"]
    return Row(**{**fields, "points": tuple(Point(**point) for point in points)})


POINT = record({"removed": integer(1), "quality": nullable(number()), "reason": text()})
SCHEMA = record(
    {
        "kirsch_sensitivity": one_of((VERSION,)),
        "model": text(1),
        "importance": text(1),
        "metric": text(1),
        "percent": flag,
        "samples": integer(1),
        "original": number(),
        "fractions": array(number(above=0, below=1), least=1),
        "parameters": integer(0),
        "macs": integer(0),
        "rows": array(
            record(
                {
                    "name": text(),
                    "kind": text(1),
                    "units": integer(1),
                    "parameters": integer(0),
                    "macs": integer(0),
                    "points": array(POINT, least=1),
                }
            )
        ),
    }
)
