"""Names of the costs that a goal can limit. They are here, and not in `cost.py`, so that the command loads no numpy."""

WORDS = {
    "macs": "MACs",
    "parameters": "parameters",
    "size": "bytes of the weights",
    "memory": "bytes of the activations",
}
"""Costs that a goal can limit, and their names in texts."""
