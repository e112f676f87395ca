"""Kinds of units: the role of the indices of an axis in the operations that use the axis."""

from __future__ import annotations

KINDS = {
    "expert": "one expert of a mixture of experts: its weights and its output of the router, which selects experts",
    "kv group": "the query heads that share one key and value head, together with this head",
    "head in kv group": "the query heads at one position of all kv groups",
    "head": "an index shared by two activations that are multiplied, such as queries and keys",
    "head dim": "one index inside all heads: summed over in queries × keys, or an entry of the value vectors",
    "recurrent unit": "a unit of the state of an LSTM, GRU or plain recurrent layer",
    "conv group": "one group of a grouped convolution, with all of its channels",
    "position in conv group": "the channels at one position of all groups of a grouped convolution",
    "norm group": "one group of a group normalization, with all of its channels",
    "position in norm group": "the channels at one position of all groups of a group normalization",
    "embedding dim": "a column of an embedding table, or a channel of a residual stream between linear layers",
    "rank": "an output of a linear layer that another linear layer reads without activation, such as the rank of LoRA",
    "ffn unit": "an output of a linear layer that another reads after an activation, except in a pooler or classifier",
    "chunk": "an index of the first of the axes into which any other reshape splits an axis",
    "position in chunk": "an index of another of the axes into which such a reshape splits an axis",
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
