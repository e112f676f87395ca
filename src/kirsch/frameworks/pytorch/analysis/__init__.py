"""From a model to a graph: export, operators, provenance of integers, blocks."""
