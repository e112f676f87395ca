"""Dependency analysis of a model: labels, relations, coupling, groups, cost and plan. Needs numpy only."""
