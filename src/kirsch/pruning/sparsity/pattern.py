"""Patterns of zeros in a weight matrix: any weights, N of M, or blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kirsch.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNSTRUCTURED = "unstructured"

FORMS = 'Give "unstructured", N:M such as "2:4", or a block of rows x columns such as "1x4" or "16x1".'


@dataclass(frozen=True)
class Pattern:
    """Positions of zeros that belong together in a matrix of shape (groups, rows, kernel, columns).

    Args:
        text: the pattern as the user gave it.
        nonzero, of: for a pattern N:M, at most `nonzero` of `of` consecutive columns are not zero; else 0.
        rows, columns: size of a block whose weights are zero together; 1 × 1 for single weights.
    """

    text: str
    nonzero: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def read(cls, text: str) -> Pattern:
        """Return the pattern of a text.

        Raises:
            UsageError: the text is not a pattern.
        """
        if text == UNSTRUCTURED:
            return cls(text)
        ratio, block = (re.fullmatch(form, text) for form in (r"(\d{1,4}):(\d{1,4})", r"(\d{1,4})[x×](\d{1,4})"))
        if ratio is not None:
            nonzero, of = map(int, ratio.groups())
            if 0 < nonzero < of:
                return cls(text, nonzero=nonzero, of=of)
            raise UsageError(
                f'`pattern` is "{text}", which keeps {nonzero} of {of} weights.',
                fix='Give N:M with N above 0 and below M, such as "2:4": at most 2 of 4 weights are not zero.',
            )
        if block is not None and "0" not in block.groups():
            rows, columns = map(int, block.groups())
            if rows * columns == 1:
                raise UsageError(f'`pattern` is "{text}", a block of one weight.', fix='Give "unstructured".')
            return cls(text, rows=rows, columns=columns)
        raise UsageError(f"`pattern` is {text!r}, which is not a pattern.", fix=FORMS)

    @property
    def is_ratio(self) -> bool:
        """Whether the pattern is N:M, so that it determines the sparsity."""
        return self.of > 0

    @property
    def is_block(self) -> bool:
        """Whether the pattern is a block of several weights."""
        return self.rows * self.columns > 1

    @property
    def sparsity(self) -> float:
        """Fraction of zeros of a pattern N:M."""
        return 1 - self.nonzero / self.of

    def too_large(self, shape: tuple[int, int, int, int]) -> str:
        """Return why a matrix is smaller than one unit of the pattern, as a clause; empty if it is not."""
        _, rows, _, columns = shape
        if columns < max(self.of, self.columns):
            return f"has {columns} inputs, fewer than the {max(self.of, self.columns)} of the pattern {self.text}"
        return f"has {rows} outputs, fewer than the {self.rows} of the pattern {self.text}" if rows < self.rows else ""

    def remainder(self, shape: tuple[int, int, int, int]) -> str:
        """Return which axis of a matrix the pattern does not divide, as a clause; empty if it divides both."""
        _, rows, _, columns = shape
        width = max(self.of, self.columns)
        if columns % width:
            return f"{columns} inputs, which {width} does not divide"
        return f"{rows} outputs, which {self.rows} does not divide" if rows % self.rows else ""

    def units(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the mean over each block, shape (groups, rows / block rows, kernel, columns / block columns)."""
        if not self.is_block:
            return values
        groups, rows, kernel, columns = values.shape
        blocks = values.reshape(groups, rows // self.rows, self.rows, kernel, columns // self.columns, self.columns)
        return np.asarray(blocks.mean((2, 5)))

    def spread(self, units: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return an array of the shape of the matrix from one value for each block."""
        return np.repeat(np.repeat(units, self.rows, axis=1), self.columns, axis=3) if self.is_block else units

    def ratio_mask(self, scores: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Return the mask of a pattern N:M: True for the N largest of M consecutive columns, the first of equals."""
        grouped = scores.reshape(*scores.shape[:-1], -1, self.of)
        order = np.argsort(-grouped, axis=-1, kind="stable")
        mask = np.zeros(grouped.shape, bool)
        np.put_along_axis(mask, order[..., : self.nonzero], values=True, axis=-1)
        return mask.reshape(scores.shape)
