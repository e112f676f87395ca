"""Alternatives of the parts of a model. A part is a candidate (groups that lose as many units) or a residual block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.allocation import Allocation
from kirsch.pruning.by_hand import kept_units
from kirsch.pruning.output_change import Variant
from kirsch.pruning.selection import matches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.graph.plan import Goal
    from kirsch.pruning.allocation import Choice
    from kirsch.pruning.options import PlanOptions
    from kirsch.pruning.search import Candidate, Chooser

KEPT = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
"""Fractions of the units that the alternatives of a group keep, beside all units and the fewest allowed."""


class Alternatives:
    """Numbers of removed units that are tried for each candidate, and the residual blocks that may be removed.

    Args:
        graph: graph of the model.
        chooser: the search, whose candidates order the units by their importance.
        blocks: paths of the residual blocks that may be removed.
    """

    def __init__(self, graph: Graph, chooser: Chooser, blocks: Sequence[str]) -> None:
        self._graph, self._chooser, self.blocks = graph, chooser, tuple(blocks)
        # An axis may need more units than `min_keep` asks for. If no candidate loses more units than in the choice with
        # the least cost, each axis keeps enough of them.
        most = chooser.least()
        self.counts = [levels(candidate, limit) for candidate, limit in zip(chooser.candidates, most, strict=True)]

    def variants(self) -> list[Variant]:
        """Return the models in which one part is reduced, in the order of the parts and of their alternatives."""

        def reduced(part: int, count: int) -> NDArray[np.bool_]:
            return self._chooser.keep([count if index == part else 0 for index in range(len(self.counts))])

        def unchanged() -> NDArray[np.bool_]:
            return self._graph.keep({})

        groups = [candidate.groups[0].name for candidate in self._chooser.candidates]
        found = [
            Variant(name, partial(reduced, part, count))
            for part, (name, counts) in enumerate(zip(groups, self.counts, strict=True))
            for count in counts[1:]
        ]
        return [*found, *(Variant(path, unchanged, (path,)) for path in self.blocks)]

    def scores(self, changes: NDArray[np.float64], options: PlanOptions) -> list[NDArray[np.float64]]:
        """Return the scores of the alternatives of each part: the output changes, divided by the weights of the kinds.

        Args:
            changes: change of the outputs by each of the `variants`.
            options: options of the plan.
        """
        weights = [options.kind_weights[candidate.groups[0].kind] for candidate in self._chooser.candidates]
        weights += [options.block_weight] * len(self.blocks)
        sizes = [len(counts) - 1 for counts in self.counts] + [1] * len(self.blocks)
        parts = np.split(changes, np.cumsum(sizes)[:-1])
        return [np.array([0.0, *part]) / weight for part, weight in zip(parts, weights, strict=True)]

    def allocation(self, scores: Sequence[NDArray[np.float64]], goal: Goal) -> Allocation:
        """Return the problem of choosing an alternative of each part, so that the goal is met."""
        original = goal.of or self._graph.cost
        limits = goal.to_dict()
        # The memory is a maximum over the operations: each operation that needs too much of it has its own limit.
        most = limits["memory"] * original.memory if "memory" in limits else np.inf
        peaks = np.flatnonzero(self._graph.prices.memory_profile(self._graph.keep({})) > most)
        sums = [name for name in limits if name != "memory"]

        def costs(choice: Choice) -> NDArray[np.float64]:
            keep, without = self._chooser.keep(self.removed(choice)), self.removed_blocks(choice)
            cost = self._graph.prices.price(keep, without)
            found = [getattr(cost, name) / max(getattr(original, name), 1) for name in sums]
            memory = self._graph.prices.memory_profile(keep, without)[peaks] if len(peaks) else np.zeros(0)
            return np.array([*found, *(memory / max(original.memory, 1))])

        values = [limits[name] for name in sums] + [limits.get("memory", np.inf)] * len(peaks)
        return Allocation(scores, costs, np.array(values), self._conflicts())

    def _conflicts(self) -> list[tuple[int, int]]:
        """Return the pairs of parts of which one contains the other; both cannot be reduced at once."""
        first = len(self.counts)
        pairs = []
        for number, path in enumerate(self.blocks):
            inside = [
                index
                for index, candidate in enumerate(self._chooser.candidates)
                if candidate.kept is None and all(is_inside(group, (path,)) for group in candidate.groups)
            ]
            nested = [first + other for other, inner in enumerate(self.blocks) if inner.startswith(f"{path}.")]
            pairs += [(index, first + number) for index in (*inside, *nested)]
        return pairs

    def starts(self) -> list[Choice]:
        """Return the starting points of the search.

        These are choices that keep about the same fraction of all groups, and those of least cost with and without the
        blocks.
        """
        kept = [0] * len(self.blocks)
        sizes = [candidate.size for candidate in self._chooser.candidates]
        same = [
            (*(_nearest(counts, size * (1 - f)) for counts, size in zip(self.counts, sizes, strict=True)), *kept)
            for f in (1.0, *KEPT)
        ]
        smallest = [len(counts) - 1 for counts in self.counts]
        inside = {part for part, _ in self._conflicts()}
        without = [0 if part in inside else index for part, index in enumerate(smallest)]
        outer = [all(not path.startswith(f"{other}.") for other in self.blocks) for path in self.blocks]
        return list(dict.fromkeys([*same, (*smallest, *kept), (*without, *map(int, outer))]))

    def removed(self, choice: Choice) -> list[int]:
        """Return the number of removed units of each candidate in a choice."""
        return [counts[index] for counts, index in zip(self.counts, choice, strict=False)]

    def removed_blocks(self, choice: Choice) -> tuple[str, ...]:
        """Return the paths of the residual blocks that a choice removes."""
        return tuple(path for path, index in zip(self.blocks, choice[len(self.counts) :], strict=True) if index)

    def unit_scores(self, scores: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64] | None]:
        """Return the score of the first, second, ... removed unit of each candidate, between the alternatives linear.

        None for a candidate whose number of kept units is given.
        """
        found: list[NDArray[np.float64] | None] = []
        for candidate, counts, values in zip(self._chooser.candidates, self.counts, scores, strict=False):
            steps = np.diff(np.interp(np.arange(candidate.size + 1), counts, values))
            found.append(steps if candidate.kept is None else None)
        return found


def levels(candidate: Candidate, most: int) -> list[int]:
    """Return the numbers of removed units of the alternatives of a candidate, ascending, first 0.

    These are the allowed numbers that are closest to the fractions `KEPT`, and the largest allowed one. If the number
    of kept units is given, it is the only alternative.

    Args:
        candidate: the candidate.
        most: largest number of removed units.
    """
    if candidate.kept is not None:
        return list(candidate.steps)
    steps = np.array([count for count in candidate.steps if count <= most])
    wanted = (candidate.size * (1 - fraction) for fraction in KEPT)
    nearest = {int(steps[np.abs(steps - count).argmin()]) for count in wanted}
    return sorted({0, int(steps[-1])} | nearest)


def _nearest(counts: Sequence[int], wanted: float) -> int:
    return int(np.abs(np.array(counts) - wanted).argmin())


def removable_blocks(graph: Graph, options: PlanOptions) -> tuple[str, ...]:
    """Return the residual blocks that a plan of units may remove, too; none unless `kinds` names "block".

    Blocks that contain a layer of `exclude`, `keep_outputs` or `keep` are not removed.
    """
    if not options.block_weight:
        return ()
    by_hand = kept_units(graph, options)
    patterns = (*options.exclude, *options.keep_outputs)
    named = {pattern: {name for name in graph.tensors if matches(name, pattern)} for pattern in patterns}
    # A pattern may be the name of a group, such as "attention.query#2", which is not a path.
    groups = [group for group in graph.groups if group.name in patterns and not named[group.name]]
    kept = set().union(*named.values(), *({name for name, _ in group.footprint} for group in groups))
    return tuple(
        path
        for path in graph.blocks
        if not any(matches(path, pattern) for pattern in patterns)
        and not any(name.startswith(f"{path}.") for name in kept)
        and not any(is_inside(group, (path,)) for group in graph.groups if group.name in by_hand)
    )


def is_inside(group: Group, blocks: Sequence[str]) -> bool:
    """Return whether all parameters of a group are in one of some residual blocks."""
    names = [name for name, _ in group.footprint]
    return any(all(name.startswith(f"{path}.") for name in names) for path in blocks)
