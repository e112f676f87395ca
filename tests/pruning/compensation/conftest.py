"""Plans that remove given units."""

from __future__ import annotations

import numpy as np
import pytest

import kirsch


@pytest.fixture
def removing():
    """Return a function that makes the plan that removes these units: group name → indices."""

    def make(model, inputs, units, **options):
        graph = kirsch.trace(model, inputs, **options)
        sizes = {group.name: group.size for group in graph.groups}
        scores = {name: 1.0 - np.isin(np.arange(size), units.get(name, ())) for name, size in sizes.items()}
        keep = {name: sizes[name] - len(removed) for name, removed in units.items()}
        plan = kirsch.plan(graph, keep=keep, importance=scores)
        assert {removal.name: list(removal.removed) for removal in plan.groups} == units
        return plan

    return make
