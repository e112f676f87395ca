"""Record of a model with masks: its layers, its size, and what was kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.frameworks.find import framework_of
from kirsch.pruning.sparsity.file_size import FileSize, file_size
from kirsch.tables import Line, Part, Piece, Printable, Table, notes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kirsch.pruning.sparsity.options import SparsityOptions

MOST_ROWS = 30
"""Number of layers that the table shows."""


@dataclass(frozen=True)
class SparseLayer:
    """A weight with a mask.

    Args:
        name: path of the weight.
        kind: class of its layer.
        shape: shape of the weight.
        zeros: number of masked weights.
        size: number of weights.
        pattern: pattern of the zeros.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    zeros: int
    size: int
    pattern: str

    @property
    def sparsity(self) -> float:
        """Fraction of masked weights."""
        return self.zeros / self.size


@dataclass(frozen=True)
class Sparsified(Printable):
    """A model with masks, and what was masked; returned by `kirsch.sparsify`.

    Args:
        model: the model with masks; train it like any other. `kirsch.fold_masks` returns the model without masks.
        layers: the weights with masks.
        kept: parameters that were not masked by this call, with the reason: they are dense, or keep an earlier mask.
        parameters: number of all parameters.
        options: the options of the call.
        notes: notes on runtimes and on the result.
        before: size of the parameters of the dense model; None for models above 64 M parameters.
    """

    model: Any
    layers: tuple[SparseLayer, ...]
    kept: Mapping[str, str]
    parameters: int
    options: SparsityOptions
    notes: tuple[str, ...]
    before: FileSize | None = None
    _raise: Callable[[Sparsified, float], Sparsified] | None = field(default=None, repr=False, compare=False)

    @property
    def zeros(self) -> int:
        """Number of masked weights."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weights with masks."""
        return self.zeros / max(sum(layer.size for layer in self.layers), 1)

    @property
    def total_sparsity(self) -> float:
        """Fraction of masked weights in all parameters of the model."""
        return self.zeros / max(self.parameters, 1)

    @cached_property
    def after(self) -> FileSize:
        """Size of the parameters of the model with zeros, as it is when first asked for."""
        return file_size(self.model, framework_of(self.model).masking.weight_matrices(self.model))

    def raise_to(self, sparsity: float) -> Sparsified:
        """Raise the sparsity of `model` in place, so that an optimizer keeps its parameters; return the new record.

        The other options are those of `kirsch.sparsify`; an importance from data runs the model as it is now.

        Args:
            sparsity: fraction of zeros, at least that of now.

        Raises:
            UsageError: the sparsity is lower than now, or the pattern states the sparsity.
        """
        return self if self._raise is None else self._raise(self, sparsity)

    def __repr__(self) -> str:
        """Return one line."""
        return (
            f"<kirsch.Sparsified: {type(self.model).__name__}, {figures.percent(self.sparsity)} zeros, "
            f"{self.options.pattern}>"
        )

    def parts(self) -> list[Part]:
        """Return the sparsity, the size, the layers, the parameters that are kept, and the notes."""
        title: Line = [
            Piece(type(self.model).__name__, "strong"),
            Piece(
                f"   {figures.percent(self.sparsity)} zeros in {figures.counted(len(self.layers), 'weight')} "
                f"({figures.percent(self.total_sparsity)} of all parameters), {self.options.pattern}, "
                f"{self.options.importance}"
            ),
        ]
        return [title, *self._size(), Table(self._rows()), notes([*self._kept_notes(), *self.notes])]

    def _size(self) -> list[Part]:
        if self.before is None:
            return []
        ratio = self.before.compressed_bytes / max(self.after.compressed_bytes, 1)
        text = (
            f"parameters compressed with zlib: {figures.bytes_(self.before.compressed_bytes)} → "
            f"{figures.bytes_(self.after.compressed_bytes)} ({figures.ratio(ratio)} smaller; "
            f"{figures.bytes_(self.after.bytes)} without compression)"
        )
        return [[Piece(text)]]

    def _rows(self) -> list[list[str]]:
        rows = [
            [layer.name, "×".join(map(str, layer.shape)), f"{100 * layer.sparsity:5.1f} %", layer.kind]
            for layer in self.layers[:MOST_ROWS]
        ]
        more = len(self.layers) - MOST_ROWS
        return [*rows, [f"and {more:,} more"]] if more > 0 else rows

    def _kept_notes(self) -> list[str]:
        reasons: dict[tuple[str, str], list[str]] = {}
        masked = {layer.name for layer in self.layers}
        for name, reason in self.kept.items():
            what = "Kept with the earlier mask" if name in masked else "Kept dense"
            reasons.setdefault((what, reason), []).append(f"`{name}`")
        return [f"{what}: {figures.listed(names)}: {reason}." for (what, reason), names in reasons.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "sparsity": self.sparsity,
            "total_sparsity": self.total_sparsity,
            "zeros": self.zeros,
            "options": self.options.model_dump(mode="json"),
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "zeros": layer.zeros,
                    "size": layer.size,
                    "pattern": layer.pattern,
                }
                for layer in self.layers
            ],
            "kept": dict(self.kept),
            "notes": list(self.notes),
        }
