"""Options of sparsity: the one definition that `kirsch.sparsify` and recipes share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from kirsch.annotations import Between, Fix, Names, Seed
from kirsch.errors import UsageError
from kirsch.options import Options

if TYPE_CHECKING:
    from kirsch.pruning.sparsity.pattern import Pattern

Sparsity: TypeAlias = Annotated[
    float, Between(0, 1, exclusive="most"), Fix("Give the fraction of zeros, such as 0.9 for 90 %.")
]
ZeroImportance: TypeAlias = Literal["magnitude", "wanda", "sparsegpt", "random"]
ZeroRanking: TypeAlias = Literal["global", "local"]

RUNS_MODEL = ("wanda", "sparsegpt")
"""Importances that are computed from the inputs of the layers."""

SAME = 1e-9
"""Difference below which two fractions count as equal."""


class SparsityOptions(Options):
    """Options of sparsity: the keyword arguments of `kirsch.sparsify`, where each is described in full."""

    sparsity: Sparsity | None = Field(
        None, description="fraction of zeros in the weights that may be zero; for a pattern N:M, the pattern states it"
    )
    pattern: str = Field(
        "unstructured",
        description=(
            'positions of the zeros: "unstructured"; N:M such as "2:4", at most N of M consecutive inputs are not '
            'zero; a block of outputs x inputs such as "1x4" or "16x1"'
        ),
    )
    importance: ZeroImportance = Field(
        "magnitude",
        description=(
            'score that chooses the zeros: "magnitude" of the weights, "random", or from inputs "wanda" or '
            '"sparsegpt", which also updates the other weights'
        ),
    )
    ranking: ZeroRanking | None = Field(
        None,
        description=(
            'compare the weights of all layers ("global"), or give each layer the same sparsity ("local"); null: '
            "global for magnitude and random, else local"
        ),
    )
    seed: Seed = Field(0, description='seed of the importance "random"')
    exclude: Names = Field((), description="layers whose weights are kept; paths or glob patterns")

    def check(self) -> None:
        """Check the pattern, and that the options do not contradict each other.

        Raises:
            UsageError: they do.
        """
        form = self.form
        if form.is_ratio:
            if self.sparsity is not None and abs(self.sparsity - form.sparsity) > SAME:
                raise UsageError(
                    f'`sparsity` is {self.sparsity:g}, and `pattern` "{self.pattern}" has {form.sparsity:g}.',
                    fix="Leave out `sparsity`, or give another pattern.",
                )
            if self.ranking == "global":
                raise UsageError(
                    f'`ranking` is "global", and `pattern` is "{self.pattern}".',
                    "A pattern N:M has the same number of zeros everywhere.",
                    "Leave out `ranking`.",
                )
        elif self.sparsity is None:
            raise UsageError(
                f'`sparsity` is missing for `pattern` "{self.pattern}".',
                fix='Give the fraction of zeros, such as sparsity=0.9, or a pattern that states it, such as "2:4".',
            )
        if self.importance == "sparsegpt" and self.ranking == "global":
            raise UsageError(
                '`ranking` is "global", and `importance` is "sparsegpt".',
                "Its scores are errors of the output of one layer, and cannot be compared between layers.",
                'Leave out `ranking`, or use importance="magnitude".',
            )

    @property
    def form(self) -> Pattern:
        """The pattern."""
        from kirsch.pruning.sparsity.pattern import Pattern  # noqa: PLC0415 - `kirsch --help` loads no numpy

        return Pattern.read(self.pattern)

    @property
    def fraction(self) -> float:
        """The fraction of zeros."""
        form = self.form
        return form.sparsity if form.is_ratio else float(self.sparsity or 0)

    @property
    def is_global(self) -> bool:
        """Whether weights of different layers are compared."""
        default = "local" if self.form.is_ratio or self.importance in RUNS_MODEL else "global"
        return (self.ranking or default) == "global"

    @property
    def needs_inputs(self) -> bool:
        """Whether the importance runs the model."""
        return self.importance in RUNS_MODEL
