"""The result of compensation: the error of each layer and of the outputs, before and after."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.tables import Part, Printable, Table

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class CompensatedLayer:
    """A layer whose weight or bias was changed.

    Args:
        weight: path of the weight.
        before, after: RMS of the difference between the outputs of the layer in the pruned model and in the original,
            relative to the RMS of the outputs in the original without bias, on the calibration data. With least
            squares, earlier layers are already compensated in both cases; with "bias", both are computed from the
            inputs of the layer in the original.
        positions: number of calibration positions, such as samples, tokens or pixels.
        inputs: number of kept inputs of each output, which is the number of unknowns in the fit.
        with_bias: whether the bias was changed.
    """

    weight: str
    before: float
    after: float
    positions: int
    inputs: int
    with_bias: bool


@dataclass(frozen=True)
class Compensation(Printable):
    """What compensation changed in a pruned model, and the error on the calibration data before and after.

    Args:
        output_errors: "none", and then each method → RMS of the difference between the outputs of the pruned model and
            of the original, relative to the RMS of the outputs of the original. The value of a method is the error
            after this method and those before it.
        layers: the changed layers, in the order of the forward pass.
        skipped: weight of a layer that has lost inputs and was not changed → the reason.
        batch_norms: paths of the batch normalizations whose statistics were estimated again.
    """

    output_errors: Mapping[str, float]
    layers: tuple[CompensatedLayer, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    batch_norms: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return one line."""
        return f"<kirsch.Compensation: {self.text}>"

    @property
    def text(self) -> str:
        """Return the errors of the outputs in one sentence."""
        first, *others = self.output_errors.items()
        steps = "".join(f", {_error(error)} with {name}" for name, error in others)
        return f"error of the outputs {_error(first[1])} without compensation{steps}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings: layers that were skipped, too few positions for a fit, and methods that increased the error."""
        found = []
        if self.skipped:
            shown = figures.listed([f"`{name}` ({reason})" for name, reason in self.skipped.items()], 3, "; ")
            found.append(f"Not compensated although inputs were removed: {shown}.")
        few = [layer for layer in self.layers if layer.positions < layer.inputs]
        if few and "least_squares" in self.output_errors:
            layer = max(few, key=lambda layer: layer.inputs / layer.positions)
            layers = f"{figures.counted(len(few), 'layer')} {'has' if len(few) == 1 else 'have'}"
            found.append(
                f"{layers} fewer calibration positions than inputs, such as "
                f"`{layer.weight}` with {layer.positions:,} positions and {layer.inputs:,} inputs. The least-squares "
                "fit may not generalize. Give more calibration data."
            )
        for (_, before), (name, after) in itertools.pairwise(self.output_errors.items()):
            if not after <= before:
                found.append(
                    f"{name!r} has increased the error of the outputs on the calibration data from {_error(before)} to "
                    f"{_error(after)}. Prune without it, or compare the accuracy of both models."
                )
        return tuple(found)

    def parts(self) -> list[Part]:
        """Return the errors of the outputs, and a summary of the errors of the layers."""
        rows: list[list[str]] = [["compensated", self.text]]
        if self.layers:
            before, after = (
                statistics.median(values)
                for values in zip(*((layer.before, layer.after) for layer in self.layers), strict=True)
            )
            number = figures.counted(len(self.layers), "layer")
            rows.append(["", f"{number}, median error of their outputs {_error(before)} before, {_error(after)} after"])
        if self.batch_norms:
            rows.append(["", f"statistics of {figures.counted(len(self.batch_norms), 'batch normalization')}"])
        return [Table(rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON; NaN and infinity become null."""
        return {
            "text": self.text,
            "output_errors": {name: _finite(error) for name, error in self.output_errors.items()},
            "layers": [
                vars(layer) | {"before": _finite(layer.before), "after": _finite(layer.after)} for layer in self.layers
            ],
            "skipped": dict(self.skipped),
            "batch_norms": list(self.batch_norms),
        }


def _error(value: float) -> str:
    return figures.percent(value, 2 if value < 0.01 else 1)  # noqa: PLR2004 - more decimals below 1 %


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
