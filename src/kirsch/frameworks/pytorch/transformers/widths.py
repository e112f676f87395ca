"""Cuts of a model that its configuration can state.

Each number of the configuration is decreased, alone and together with others in the same proportion, and the model is
built on the meta device. If the removal of units from some groups gives exactly the sizes of the built model, these
numbers state the width of these groups. Each width is verified: the units of one step are removed, and a model built
from the changed configuration must return the same outputs. Names of numbers, layers and models are not used.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from typing import TYPE_CHECKING, cast

from kirsch.errors import KirschError
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.tuners import plain_names, without_tuners
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.surgery.dropping import drop
from kirsch.frameworks.pytorch.transformers.blueprint import Search, has_configuration, numbers, quiet, sizes
from kirsch.frameworks.pytorch.transformers.builds import Builds
from kirsch.frameworks.pytorch.transformers.configuration import difference_of
from kirsch.frameworks.pytorch.transformers.depths import configured_depths
from kirsch.frameworks.pytorch.transformers.footprints import Footprints
from kirsch.graph.configuration import Configurable, ConfiguredWidth

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from kirsch.frameworks.pytorch.analysis.traced import Traced
    from kirsch.frameworks.pytorch.transformers.blueprint import Numbers
    from kirsch.frameworks.pytorch.transformers.builds import Built
    from kirsch.graph.graph import Graph

MOST_NUMBERS = 4
"""Largest number of numbers that are changed together."""
MOST_BUILDS = 400
"""Number of builds after which no further sets of numbers are tried."""
MOST_STEPS = 8
"""Number of decreases that are tried for each set of numbers."""
FLOAT_STEPS = 32
"""Fraction of a number with a decimal point, such as a ratio of widths, by which it is decreased in one step."""


def configurable(graph: Graph) -> Configurable | None:
    """Return the cuts that the configuration of the traced model can state.

    The search runs when the cuts are first read, and once for each graph.

    Returns:
        None if the model has no configuration, only a part of it was traced, or the pruned model will be a traced
        program.
    """
    if graph.model is None or graph.tracing.module or graph.tracing.as_graph:
        return None
    model = without_tuners(graph.model)
    if not has_configuration(model):
        return None
    traced: Traced = graph.traced
    if traced.configurable is None:
        search = WidthSearch(model, graph)
        traced.configurable = Configurable(
            search.obstacle, search.widths, lambda: configured_depths(model, graph), search.fits, search.difference
        )
    return traced.configurable


class WidthSearch:
    """Search for the widths that the configuration of a traced model states.

    Args:
        model, graph: the model, without adapters, and its graph, which may have adapters.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._model, self._graph = model, graph

    @cached_property
    def obstacle(self) -> str:
        """Why no cut of the model can be stated, as a sentence; "" if a search is possible."""
        name = self._graph.model_name
        if any(parameter.is_meta for parameter in self._model.parameters()):
            return "the parameters are on the meta device, without values with which a cut could be verified."
        if self._builds.start is None or self._builds.start.sizes != sizes(self._model):
            return f"its configuration does not build this {name}, but one of other sizes or none."
        return ""

    @cached_property
    def _builds(self) -> Builds:
        return Builds(self._model)

    @cached_property
    def _start(self) -> Built:
        """The model built from the present configuration; read only if `obstacle` is empty."""
        return cast("Built", self._builds.start)

    @cached_property
    def _search(self) -> Search:
        return Search(self._model)

    @cached_property
    def _stored(self) -> list[tuple[str, int]]:
        return list(self._search.stored)

    @cached_property
    def _implied(self) -> Numbers:
        """Values of the numbers that the configuration does not state."""
        return self._search.implied(self._start.sizes, {})

    @cached_property
    def _footprints(self) -> Footprints:
        return Footprints(self._graph, self._stored, plain_names(self._graph.model))

    def widths(self) -> list[ConfiguredWidth]:
        """Return all widths that numbers state, each of as few numbers as possible."""
        found: list[ConfiguredWidth] = []
        relevant = self._relevant()
        for size in range(1, MOST_NUMBERS + 1):
            for chosen in itertools.combinations(relevant, size):
                within = [width for width in found if width.values.keys() <= set(chosen)]
                covered = {path for width in within if not width.refused for path in width.values}
                if covered == set(chosen) or not _connected([relevant[path][1] for path in chosen]):
                    continue
                if self._builds.count >= MOST_BUILDS:
                    return found
                width = self._width({path: relevant[path][0] for path in chosen}, within)
                if width is not None:
                    found.append(width)
        return found

    def _relevant(self) -> dict[str, tuple[float, set[str]]]:
        """Return the numbers on which widths may depend: path → value, and the modules that change with it.

        A number with which no other model could be built by itself may depend on others, and may change each module.
        """
        stated = {path: value for path, value in numbers(self._model.config).items() if value is not None}
        everywhere = {path for path, _ in self._model.named_modules()}
        relevant = {}
        for path, value in {**stated, **self._implied}.items():
            trials = (self._builds({**self._implied, path: trial}) for trial in (value * 2, type(value)(value / 2)))
            found = next(filter(None, trials), None)
            if found is None:
                relevant[path] = value, everywhere
                continue
            changed = {module for module in self._start.changed_modules(found) if self._footprints.within(module)}
            axes = self._decrease(found)
            if changed and (not axes or any(map(self._footprints.touches, axes))):
                relevant[path] = value, changed
        return relevant

    def _width(self, chosen: Numbers, within: Sequence[ConfiguredWidth]) -> ConfiguredWidth | None:
        """Return the width that these numbers state together, if there is one.

        Args:
            chosen: path of each number → its value.
            within: widths that were found for some of these numbers.
        """
        ratios = any(type(value) is float for value in chosen.values())
        divisor = FLOAT_STEPS if ratios else math.gcd(*(int(value) for value in chosen.values()))
        refused = None
        for base in [self._implied, {}] if self._implied else [{}]:
            for count in range(1, min(divisor, MOST_STEPS + 1)):
                steps = {path: type(value)(value * count / divisor) for path, value in chosen.items()}
                changes = {**base, **{path: chosen[path] - step for path, step in steps.items()}}
                found = self._builds(changes)
                runs = False
                for units in self._footprints.solutions(self._decrease(found)) if found is not None else ():
                    if any(_makes_useless(width, units) for width in within):
                        return refused
                    keep = self._graph.keep({name: tuple(range(number)) for name, number in units.items()})
                    difference = self.difference(changes, keep, ())
                    width = ConfiguredWidth(chosen, steps, units, self._needed(base, changes), difference)
                    if not difference:
                        return width
                    refused, runs = refused or width, runs or self._runs(keep)
                if runs:  # for sizes that an operation does not allow, a multiple of them may be allowed
                    break
        return refused

    def _runs(self, keep: NDArray[np.bool_]) -> bool:
        """Return whether the model runs after the removal of units."""
        traced: Traced = self._graph.traced
        with quiet():
            try:
                run(cut(self._graph.model, self._graph, keep).eval(), traced.args, traced.options)
            except Exception:  # noqa: BLE001 - the code of the model can raise any exception
                return False
        return True

    def _needed(self, stated: Numbers, changes: Numbers) -> Numbers:
        """Return the numbers of `stated` that are not changed, and without which another model would be built."""
        needed = {path: value for path, value in stated.items() if changes[path] == value}
        changed = {path: value for path, value in changes.items() if path not in needed}
        for path in list(needed):
            fewer = {other: value for other, value in needed.items() if other != path}
            if self._builds({**fewer, **changed}) == self._builds(changes):
                needed = fewer
        return needed

    def _decrease(self, found: Built) -> dict[tuple[str, int], int]:
        """Return the decrease of each axis of a stored tensor; negative for an increase."""
        differences = {axis: self._start.sizes[axis] - found.sizes[axis] for axis in self._stored}
        return {axis: difference for axis, difference in differences.items() if difference}

    def difference(self, changes: Numbers, keep: NDArray[np.bool_], without: Collection[str]) -> str:
        """Return how a model that is built with changed numbers differs from the pruned model; "" if it does not."""
        traced: Traced = self._graph.traced
        dropped = [block for block in traced.blocks if block.path in without]
        try:
            pruned = cut(self._graph.model, self._graph, keep)
            if dropped:
                drop(pruned, dropped, traced.args, traced.options)
        except KirschError as error:
            return str(error)
        return difference_of(without_tuners(pruned), changes, traced.args, traced.options)

    def fits(self, changes: Numbers, keep: NDArray[np.bool_]) -> bool:
        """Return whether a model that is built with changed numbers has the sizes of the pruned model."""
        found = self._builds(changes)
        return found is not None and self._footprints.removed(keep) == self._decrease(found)


def _makes_useless(width: ConfiguredWidth, units: dict[str, int]) -> bool:
    """Return whether a width that was found for fewer numbers makes a set useless that removes these units."""
    return width.units.keys() < units.keys() or (width.units.keys() == units.keys() and not width.refused)


def _connected(sets: Sequence[set[str]]) -> bool:
    """Return whether the sets are connected by common elements."""
    joined, rest = sets[0], list(sets[1:])
    while rest:
        near = next((other for other in rest if not joined.isdisjoint(other)), None)
        if near is None:
            return False
        rest.remove(near)
        joined = joined | near
    return True
