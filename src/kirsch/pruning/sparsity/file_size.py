"""Size of the weights of a model before and after compression."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kirsch.frameworks.find import framework_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.masking import WeightMatrix

LEVEL = 6
"""Level of zlib, its default; a zip file and gzip compress with the same method."""

MOST_VALUES = 64 * 2**20
"""Largest number of parameters whose compressed size is computed; zlib compresses about 20 MB/s."""


@dataclass(frozen=True)
class FileSize:
    """Bytes of the parameters of a model as numbers of 4 bytes (8 for float64), and after compression with zlib."""

    bytes: int
    compressed_bytes: int


def file_size(model: Any, weights: Sequence[WeightMatrix]) -> FileSize:
    """Return the size of the parameters of a model, without buffers, such as running statistics, and file headers."""
    masking, compressor = framework_of(model).masking, zlib.compressobj(LEVEL)
    total = compressed = 0
    for weight in weights:
        content = masking.values(model, weight.name).tobytes()
        total += len(content)
        compressed += len(compressor.compress(content))
    return FileSize(total, compressed + len(compressor.flush()))
