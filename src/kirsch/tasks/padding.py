"""Tokens of a batch that are padding, and those that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kirsch.data.arrays import host

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MASK, DECODER_MASK = MASKS = ("attention_mask", "decoder_attention_mask")
"""Names of the inputs that are 0 where a token is padding: of the encoder or the only sequence, and of a decoder."""

DECODER = "decoder_"
"""Beginning of the names of the inputs of a decoder."""


def token_mask(inputs: Any, tokens: tuple[int, ...]) -> Any:
    """Return the mask of the tokens to which labels or outputs belong, shape (N, L); None if there is none.

    Labels and outputs of the shape of a decoder's inputs belong to the decoder, others to the encoder.

    Args:
        inputs: inputs of the batch; only a dict can have masks.
        tokens: first two sizes of the labels or outputs, (N, L).
    """
    if not isinstance(inputs, Mapping):
        return None
    sizes = [tuple(getattr(part, "shape", ()))[:2] for name, part in inputs.items() if name.startswith(DECODER)]
    mask = inputs.get(DECODER_MASK if tuple(tokens) in sizes else MASK)
    return mask if mask is not None and tuple(mask.shape) == tuple(tokens) else None


def counted_tokens(inputs: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Return whether each token of the outputs counts, shape (N, L); None if all positions count.

    Args:
        inputs: inputs of the batch.
        shape: shape of the outputs; those of tokens are (N, L, K).
    """
    mask = token_mask(inputs, shape[:2]) if len(shape) == len("NLK") else None
    counted: NDArray[np.bool_] | None = None if mask is None else host(mask) != 0
    return None if counted is None or counted.all() else counted
