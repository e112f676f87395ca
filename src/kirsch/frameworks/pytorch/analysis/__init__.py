"""Analysis of a model: export, rules of operators, origin of integers, residual blocks."""
