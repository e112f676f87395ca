"""Kinds of units: the role of the indices of an axis in the operations that use the axis."""

from __future__ import annotations

KINDS = {
    "expert": "one of several parallel weights with its router score; the k weights with the largest scores are used",
    "kv group": "query heads that share keys and values: repeated heads, or the first axis of a grid of heads",
    "head in kv group": "the second axis of a grid of heads",
    "head": "an index shared by two activations that are multiplied, such as queries and keys",
    "head dim": "an index inside each head, the same in all heads: contracted between activations, or in the values",
    "recurrent unit": "a unit of the state of an LSTM, GRU or plain recurrent layer",
    "conv group": "the first axis of the grid (groups, channels per group) of a grouped convolution",
    "position in conv group": "the second axis of the grid of a conv group",
    "norm group": "the first axis of the grid (groups, channels per group) of a group normalization",
    "position in norm group": "the second axis of the grid of a norm group",
    "embedding dim": "a column of an embedding table, or a feature of a residual stream between linear layers",
    "rank": "an output of a linear layer that another linear layer reads without activation, such as the rank of LoRA",
    "ffn unit": "an output of a linear layer that another reads after an activation, except in a pooler or classifier",
    "chunk": "the first axis of the grid of any other reshape",
    "position in chunk": "another axis of the grid of a chunk",
    "channel": "any other unit",
}
"""Kinds of units with their definitions. The first definition that fits a unit applies.

Most kinds follow from the marks that operations set; see `kirsch.graph.facts`.
"""

GRID_UNIT_KINDS = {
    "norm groups": ("norm group", "position in norm group"),
    "conv groups": ("conv group", "position in conv group"),
}
"""Kind of a grid → kinds of the units on its first axis and on all other axes."""

UNROUNDED_KINDS = frozenset(["expert", "kv group", "head", "head in kv group", "conv group", "norm group", "chunk"])
"""Kinds of units that contain several channels each, such as heads.

Runtimes are fast for any number of these units; only the number of channels should be a multiple of 8 or 16.
"""

BLOCK = "block"
"""Kind of a residual block, a module that can be replaced by the identity. A block is not a unit of a group."""
