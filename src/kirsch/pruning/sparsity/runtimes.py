"""Which runtimes compute faster with which pattern of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kirsch.pruning.sparsity.pattern import Pattern

DENSE = (
    "A dense runtime, such as ONNX Runtime or PyTorch with ordinary tensors, multiplies with the zeros: the model is "
    "not faster there, and its file is smaller only after compression."
)

UNSTRUCTURED = (
    "Zeros without a pattern speed up runtimes with sparse kernels only, such as XNNPACK for 1×1 convolutions "
    "(TensorFlow Lite), and OpenVINO with sparse weight decompression on 4th-generation Xeon CPUs for 8-bit weights."
)
TWO_OF_FOUR = (
    "2:4 is the pattern of the sparse tensor cores of NVIDIA GPUs of compute capability 8.0 and above, which TensorRT "
    "and, for linear layers, torch.sparse.to_sparse_semi_structured use."
)
RATIO = "Kirsch knows no runtime with kernels for {text}; NVIDIA GPUs have them for 2:4."
BLOCK = (
    "Blocks of zeros speed up kernels that are written for a block of the same size. TensorFlow Lite has them for "
    "fully connected layers, 1x4 in float32 and 1x16 in 8 bits. Check that your runtime has one for {text}."
)
"""Sources are in `docs/sparsity.md`."""


def runtime_notes(pattern: Pattern) -> tuple[str, str]:
    """Return the notes on the runtimes for which a pattern is faster."""
    if pattern.is_block:
        return BLOCK.format(text=pattern.text), DENSE
    if pattern.is_ratio:
        return (TWO_OF_FOUR if (pattern.nonzero, pattern.of) == (2, 4) else RATIO.format(text=pattern.text)), DENSE
    return UNSTRUCTURED, DENSE
