"""Kinds of units: the role of the indices of an axis in the operations that use the axis."""

from __future__ import annotations

KINDS = {
    "expert": "one expert of a mixture of experts: its weights, and the output of the router that selects it",
    "kv group": "the query heads that share one key and value head, together with this head",
    "head in kv group": "the query heads with the same position in each kv group",
    "head": (
        "an index of an axis that two activations share and that their product does not sum over, such as the heads of "
        "queries and keys"
    ),
    "head dim": (
        "the same index inside every head: the product of queries and keys sums over it, or it is an index of the "
        "value vectors"
    ),
    "recurrent unit": "a unit of the state of an LSTM, GRU or plain recurrent layer",
    "conv group": "one group of a grouped convolution, with all of its channels",
    "position in conv group": "the channels with the same position in each group of a grouped convolution",
    "norm group": "one group of a group normalization, with all of its channels",
    "position in norm group": "the channels with the same position in each group of a group normalization",
    "embedding dim": "a column of an embedding table, or a channel of a residual stream of linear layers",
    "rank": "an output of a linear layer that another linear layer reads without activation, such as the rank of LoRA",
    "ffn unit": "an output of a linear layer that another reads after an activation, except in a pooler or classifier",
    "chunk": "an index of A if a reshape splits an axis (C) into (A, B, ...), and no kind above applies",
    "position in chunk": "an index of B, or of a later axis of such a split",
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

EXPERT = "expert"
"""Kind of the experts of a mixture; see `KINDS`."""

RESIDUAL_STREAM = "embedding dim"
"""Kind of the channels of a residual stream of linear layers, as in transformers; see `KINDS`."""

BLOCK = "block"
"""Kind of a residual block, a module that can be replaced by the identity. A block is not a unit of a group."""
