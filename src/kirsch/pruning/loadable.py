"""Choice of cuts that the configuration of a model can state, jointly over its widths and numbers of layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import TYPE_CHECKING

import numpy as np

from kirsch import figures
from kirsch.errors import GoalError
from kirsch.frameworks.find import framework_of
from kirsch.graph.configuration import ConfiguredWidth
from kirsch.pruning.alternatives import is_inside
from kirsch.pruning.blocks import mean_influence
from kirsch.pruning.by_hand import kept_units
from kirsch.pruning.loadable_keep import kept_portions, usable_sets, usable_widths
from kirsch.pruning.notes import CLOSE, absent_kind_notes
from kirsch.pruning.obstacles import Least, reachable
from kirsch.pruning.output_change import Variant, mean_output_changes
from kirsch.pruning.search import Candidate, Chooser
from kirsch.pruning.selection import excludes_block, max_halvings, ranked_together, removable_groups, width_multiple
from kirsch.pruning.units import unit_cost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kirsch.graph.configuration import Configurable
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal
    from kirsch.pruning.importance.calibration import CalibrationBatches
    from kirsch.pruning.options import PlanOptions
    from kirsch.pruning.scores import Scores

FEW_STEPS = 12
"""A width with at most so many allowed values is tried with each of them; others are ranked by importance."""
MOST_COMBINATIONS = 64
"""Largest number of combinations of such values that are tried."""
MOST_MEASURED, SLACK = 16, 4.0
"""Largest number of choices whose change of the outputs is measured, if there are calibration data; and the largest sum
of their importances, relative to the least one."""
MOST_CHECKED = 8
"""Largest number of choices whose configuration is verified before the search gives up."""


@dataclass(frozen=True)
class LoadableChoice:
    """Cuts that numbers of a configuration state.

    Args:
        chooser, counts: the widths, and the number of removed portions of each.
        without: removed blocks.
        numbers: the changed numbers of the configuration.
        distance: distance to the goal, as a fraction of the original cost.
        importance: sum of the importances of everything that is removed.
    """

    chooser: Chooser
    counts: list[int]
    without: tuple[str, ...]
    numbers: dict[str, float]
    distance: float
    importance: float


def configurable_of(graph: Graph) -> Configurable | None:
    """Return the cuts that the configuration of the traced model can state; None if there is no such configuration."""
    return None if graph.model is None else framework_of(graph.model).surgery.configurable(graph)


class LoadableSearch:
    """Search for the cuts of least importance that meet a goal and that a configuration states.

    The search is exhaustive over the numbers of layers and the widths with few values, such as heads. For each
    combination, the other widths are chosen by the ranking of their units.

    Args:
        graph: graph of the model.
        goal: the goal; None: the widths are those that `keep` states.
        options: options of the plan.
        configurable: the cuts that the configuration can state.
        scores: function that returns the importance of each unit of a group.
        batches: calibration batches, if the importance uses them.
    """

    def __init__(
        self,
        graph: Graph,
        goal: Goal | None,
        options: PlanOptions,
        configurable: Configurable,
        scores: Scores,
        batches: CalibrationBatches | None = None,
    ) -> None:
        self._batches = batches
        self._graph, self._goal, self._options, self._scores = graph, goal, options, scores
        self._configurable = configurable
        self._block_importances: dict[str, float] = {}
        names = {group.name: group for group in removable_groups(graph, options)}
        self._groups = names
        self._by_hand = kept_units(graph, options)
        self.widths = usable_widths(configurable, names, self._by_hand)
        self._same_fraction = options.ranking in ("local", "isomorphic")
        allowed = options.kinds is None and not self._same_fraction
        self._depths = [
            (depth, [block for block in depth.blocks if not self._is_kept(block)])
            for depth in (configurable.depths if allowed else ())
        ]

    def _is_kept(self, block: str) -> bool:
        """Return whether `exclude`, `keep_outputs` or `keep` names a layer of a block."""
        by_hand = (group for name, group in self._groups.items() if name in self._by_hand)
        return excludes_block(self._graph, self._options, block) or any(is_inside(group, [block]) for group in by_hand)

    @property
    def has_cuts(self) -> bool:
        """Whether a width or a number of layers can be changed with these options."""
        return any(self._sets) or any(blocks for _, blocks in self._depths)

    def least(self) -> Least:
        """Return the least cost that the cuts reach, and the components that they keep."""
        deepest = [path for blocks in self._removals(zero=True) for path in blocks[-1]]
        found = []
        for widths in self._sets:
            chooser = self._chooser(widths, max_halvings(self._options), deepest, zero=True)
            counts = chooser.least()
            found.append(Least(chooser.price(counts), chooser.keep(counts)))

        def excess(least: Least) -> float:
            if self._goal is None:
                return least.cost.parameters
            return max(value - limit for value, limit in self._goal.fractions(least.cost, self._graph.cost).values())

        return min(found, key=excess)

    def best(self) -> LoadableChoice:
        """Return the best choice that meets the goal closely, and whose configuration is verified.

        Without calibration data, this is the choice of least importance. Multiples of widths are halved as long as it
        is farther from the goal: rounding alone should not decide between unimportant and important units or layers.

        With calibration data, it is the choice of low importance that changes the outputs least, for any of the
        multiples: importances compare units of one kind well, but not a hidden size with a layer.

        Raises:
            GoalError: no such choice meets the goal.
        """
        found = self._given() if self._goal is None else []
        for fineness in range(max_halvings(self._options) + 1) if self._goal is not None else ():
            found += self._choices(fineness)
            if self._batches is None and found and min(found, key=lambda choice: choice.importance).distance <= CLOSE:
                break
        close = [choice for choice in found if choice.distance <= CLOSE]
        others = [choice for choice in found if choice.distance > CLOSE]
        close.sort(key=lambda choice: choice.importance)
        close = self._by_output_change(close)
        others.sort(key=lambda choice: choice.distance)
        differences = []
        for choice in (*close, *others)[:MOST_CHECKED]:
            keep = choice.chooser.keep(choice.counts)
            difference = self._configurable.difference(choice.numbers, keep, choice.without)
            if not difference:
                return choice
            differences.append(difference)
        raise self.error(differences)

    def _by_output_change(self, choices: list[LoadableChoice]) -> list[LoadableChoice]:
        """Return choices of low importance, those first that change the outputs least on the calibration data.

        Of the choices that change the same numbers of a configuration, the least important one is measured.

        Args:
            choices: the choices, the least important first.
        """
        first: dict[frozenset[str], LoadableChoice] = {}
        for choice in choices:
            first.setdefault(frozenset(choice.numbers), choice)
        measured = list(first.values())[:MOST_MEASURED]
        if self._batches is None or len(measured) <= 1:
            return choices
        variants = [
            Variant(", ".join(sorted(choice.numbers)), partial(choice.chooser.keep, choice.counts), choice.without)
            for choice in measured
        ]
        loss = self._batches.loss if isinstance(self._batches.loss, str) else "squared-error"
        changes = mean_output_changes(self._graph, variants, self._batches, loss, progress=False)
        taken = {id(choice) for choice in measured}
        rest = [choice for choice in choices if id(choice) not in taken]  # if the others fail the verification
        return [*(measured[index] for index in np.argsort(changes, kind="stable")), *rest]

    def error(self, differences: Sequence[str] = ()) -> GoalError:
        """Return the error for a goal that the configuration cannot state."""
        least = self.least().cost
        widths = [f"{_names(width)} ({', '.join(self._kinds(width))})" for width in self.widths]
        depths = [depth.path for depth, blocks in self._depths if blocks]
        refused = [
            f"{_names(width)}: {width.refused.rstrip('.')}" for width in self._configurable.widths if width.refused
        ]
        held = f"It can state {figures.listed([*widths, *depths], 8)}." if widths or depths else "It can state no cut."
        held = " ".join([held, *absent_kind_notes(self._graph, self._options)])
        reason = f" It cannot state {'; '.join(refused[:3])}." if refused else ""
        fix = "Remove `loadable`, and save the pruned model with kirsch.save."
        if self._goal is None or self._goal.met_by(least, self._graph.cost):
            what = f"No plan for {self._graph.model_name} that its configuration can state was found."
            reason = (
                f" The best choices differ from the model that the configuration builds: {differences[0]}."
                if differences
                else " The numbers do not fit each other in any choice that reaches the goal."
            )
        else:
            shortfall = self._goal.shortfall(least, self._graph.cost)
            what = f"The configuration of {self._graph.model_name} cannot state a plan for the goal: {shortfall}."
            fix = f"{fix} {reachable(self._goal, least, self._graph.cost)}".strip()
        return GoalError(what, f"{held}{reason}", fix)

    def _kinds(self, width: ConfiguredWidth) -> list[str]:
        return list(dict.fromkeys(self._groups[name].kind for name in width.units))

    @cached_property
    def _sets(self) -> list[list[ConfiguredWidth]]:
        """The largest sets of widths of which no two have a number or a group in common."""
        names = [{*width.units, *width.values} for width in self.widths]

        def extended(chosen: list[int], open_: list[int], closed: list[int]) -> Iterator[list[int]]:
            # Bron and Kerbosch 1973: `closed` holds the widths with which `chosen` was extended before.
            if not open_ and not closed:
                yield chosen
            while open_:
                index, *open_ = open_
                apart = [[other for other in part if names[index].isdisjoint(names[other])] for part in (open_, closed)]
                yield from extended([*chosen, index], *apart)
                closed = [*closed, index]

        sets = [[self.widths[i] for i in indices] for indices in extended([], list(range(len(names))), [])]
        sets = [self._uniform(widths) for widths in sets] if self._options.uniform else sets
        return usable_sets(sets, self._groups, self._by_hand)

    def _uniform(self, widths: Sequence[ConfiguredWidth]) -> list[ConfiguredWidth]:
        """Return the widths, joined so that groups of the same kind and size lose the same number of units.

        A width is left out if other groups of the same kind and size would keep their units.
        """
        classes: dict[tuple[str, int], set[str]] = {}
        for group in self._groups.values():
            classes.setdefault((group.kind, group.size), set()).add(group.name)
        joined = list(widths)
        for names in classes.values():
            inside = [width for width in joined if not names.isdisjoint(width.units)]
            joined = [width for width in joined if names.isdisjoint(width.units)]
            units = {name: number for width in inside for name, number in width.units.items()}
            if names <= units.keys() and len({units[name] for name in names}) == 1:
                joined.append(reduce(ConfiguredWidth.joined, inside))
        return joined

    def _chooser(
        self, widths: Sequence[ConfiguredWidth], fineness: int, without: Sequence[str], *, zero: bool = False
    ) -> Chooser:
        candidates = []
        for width in widths:
            groups = [self._groups[name] for name in width.units]
            portions = list(width.units.values())
            multiple = width_multiple(groups[0], self._options, fineness)
            scores = [
                np.zeros(group.size) if zero or is_inside(group, without) else self._scores(group, self._options)
                for group in groups
            ]
            candidates.append(
                Candidate(
                    groups,
                    scores,
                    max(1, multiple // portions[0]),
                    self._options.min_keep,
                    unit_cost(self._graph, self._goal, groups)
                    if self._goal is not None and self._options.ranking == "per_cost"
                    else 1.0,
                    kept_portions(width, self._groups, self._by_hand),
                    portions,
                )
            )
        return Chooser(self._graph, self._goal, candidates, without)

    def _removals(self, *, zero: bool = False) -> list[list[tuple[str, ...]]]:
        """Return for each number of layers the sets of blocks that may be removed, the smallest first."""
        importance = (lambda _: 0.0) if zero else self.block_importance
        removals = []
        for depth, blocks in self._depths:
            fewest = max(1, int(np.ceil(self._options.min_keep * depth.value)))
            sets = depth.removals(importance, blocks)
            removals.append([paths for paths in sets if len(paths) <= depth.value - fewest])
        return removals

    def block_importance(self, path: str) -> float:
        """Return the sum of the importances of the units inside a block, times two factors.

        The first is the number of parameters of the block divided by that of the units, since some parameters may
        belong to no group. A block without units is the last to be removed. The second is the influence of the block,
        relative to the mean of all blocks: the importances of many units are relative to others of their layer, and do
        not compare layers.
        """
        if path not in self._block_importances:
            inside = [group for group in self._groups.values() if is_inside(group, [path])]
            prices, all_kept = self._graph.prices, self._graph.keep({})
            without_units = prices.price(self._graph.keep({g.name: tuple(range(g.size)) for g in inside}))
            of_units = self._graph.cost.parameters - without_units.parameters
            of_block = self._graph.cost.parameters - prices.price(all_kept, [path]).parameters
            scores = sum(float(self._scores(group, self._options).sum()) for group in inside)
            scale = self._influences.get(path, 1.0) * of_block / of_units if of_units else np.inf
            self._block_importances[path] = max(scores, np.finfo(float).tiny) * scale
        return self._block_importances[path]

    @cached_property
    def _influences(self) -> dict[str, float]:
        """Influence of each block on random inputs like the example inputs, relative to the mean of all blocks."""
        graph = self._graph
        if not graph.inputs:
            return {}
        inputs = framework_of(graph.model).analysis.inputs_like(graph.inputs, graph.model)
        found = mean_influence(graph, [(inputs, None)])
        mean = float(np.mean(list(found.values())))
        return {path: value / mean for path, value in found.items()} if np.isfinite(mean) and mean > 0 else {}

    def _given(self) -> list[LoadableChoice]:
        """Return the choices that remove the units which `keep` removes, and no others."""
        choices = []
        for widths in self._sets:
            chooser = self._chooser(widths, 0, ())
            counts = chooser.given()
            if self._valid(chooser, widths, counts):
                numbers = self._numbers(widths, counts)
                choices.append(LoadableChoice(chooser, counts, (), numbers, 0.0, chooser.removed_importance(counts)))
        return choices

    def _choices(self, fineness: int) -> Iterator[LoadableChoice]:
        """Yield choices that meet the goal, for combinations of numbers of layers and of widths with few values.

        A combination is left out if its importance alone exceeds that of a choice that is close to the goal.
        """
        bound, slack = np.inf, 1.0 if self._batches is None else SLACK
        for without, depths in self._layer_choices():
            lost = sum(map(self.block_importance, without))
            for widths in self._sets:
                for chooser in self._combinations(self._chooser(widths, fineness, without)):
                    given = chooser.given()
                    if bound < np.inf and (
                        lost + chooser.removed_importance(given) > slack * bound or chooser.distance(given) > CLOSE
                    ):
                        continue
                    counts = self._search(chooser, widths)
                    if counts is None:
                        continue
                    importance, distance = lost + chooser.removed_importance(counts), chooser.distance(counts)
                    numbers = self._numbers(widths, counts) | depths
                    bound = min(bound, importance if distance <= CLOSE else np.inf)
                    yield LoadableChoice(chooser, counts, without, numbers, distance, importance)

    def _layer_choices(self) -> list[tuple[tuple[str, ...], dict[str, float]]]:
        """Return combinations of removed blocks with the numbers of layers, the least important blocks first.

        If there are too many, those are left out that remove the most different fractions of several lists.
        """

        def spread(chosen: Sequence[Sequence[str]]) -> float:
            fractions = [len(blocks) / depth.value for (depth, _), blocks in zip(self._depths, chosen, strict=True)]
            return max(fractions, default=0) - min(fractions, default=0)

        combinations = sorted(itertools.product(*self._removals()), key=spread)[:MOST_COMBINATIONS]
        choices = []
        for chosen in combinations:
            numbers: dict[str, float] = {
                depth.path: depth.value - len(blocks)
                for (depth, _), blocks in zip(self._depths, chosen, strict=True)
                if blocks
            }
            choices.append((tuple(path for blocks in chosen for path in blocks), numbers))
        return sorted(choices, key=lambda choice: sum(map(self.block_importance, choice[0])))

    def _combinations(self, chooser: Chooser) -> Iterator[Chooser]:
        """Yield a search for each combination of the values of widths with few values, and with and without others.

        Rankings that remove the same fraction of each group, or class of groups, determine these values, too.
        """
        if self._same_fraction:
            yield chooser
            return
        values: list[Sequence[int | None]] = [
            c.steps if len(c.steps) <= FEW_STEPS else [None, 0] for c in chooser.candidates
        ]
        fixed, total = list[int](), 1
        for index in sorted(range(len(values)), key=lambda index: len(values[index])):
            total *= len(values[index])
            if total <= MOST_COMBINATIONS:
                fixed.append(index)
        for counts in itertools.product(*(values[index] for index in fixed)):
            yield chooser.fixed({i: count for i, count in zip(fixed, counts, strict=True) if count is not None})

    def _search(self, chooser: Chooser, widths: Sequence[ConfiguredWidth]) -> list[int] | None:
        """Return the numbers of removed portions; None if no valid choice meets the goal."""
        if not chooser.fits(chooser.least()):
            return None
        free = {i: candidate.groups for i, candidate in enumerate(chooser.candidates) if candidate.kept is None}
        counts = chooser.given()
        if not chooser.fits(counts):
            counts = chooser.search(ranked_together(self._graph, free, self._options), CLOSE) if free else counts
        if not chooser.fits(counts):
            return None
        if self._valid(chooser, widths, counts):
            return counts
        # A constraint between numbers, such as a width that is a multiple of the heads: the nearest values that fit.
        for index in free:
            steps = sorted(chooser.candidates[index].steps, key=lambda step: abs(step - counts[index]))
            for step in steps:
                inner = chooser.fixed({index: step})
                if not inner.fits(inner.least()):
                    continue
                rest = {i: groups for i, groups in free.items() if i != index}
                trial = inner.given()
                if not inner.fits(trial):
                    trial = inner.search(ranked_together(self._graph, rest, self._options), CLOSE)
                if inner.fits(trial) and self._valid(inner, widths, trial):
                    return trial
        return None

    def _valid(self, chooser: Chooser, widths: Sequence[ConfiguredWidth], counts: Sequence[int]) -> bool:
        return self._configurable.fits(self._numbers(widths, counts), chooser.keep(counts))

    def _numbers(self, widths: Sequence[ConfiguredWidth], counts: Sequence[int]) -> dict[str, float]:
        changed = [(width, count) for width, count in zip(widths, counts, strict=True) if count]
        numbers: dict[str, float] = {}
        for width, _ in changed:
            numbers |= width.stated
        for width, count in changed:
            numbers |= width.numbers(count)
        return numbers


def _names(width: ConfiguredWidth) -> str:
    return " with ".join(width.values)
