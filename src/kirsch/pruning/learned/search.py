"""Search for the allocation of a learned ranking, with its progress."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures
from kirsch.frameworks.progress import shown_on
from kirsch.progress import bar, time_left
from kirsch.pruning.learned.legr import evolve
from kirsch.tables import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kirsch.pruning.learned.allocations import Allocations
    from kirsch.pruning.options import PlanOptions
    from kirsch.tables import Line


def search(allocations: Allocations, options: PlanOptions, progress: bool | None) -> Allocations:
    """Evaluate allocations by the ranking of the options, and return them.

    Args:
        allocations: the search, of which nothing is evaluated yet.
        options: ranking and seed.
        progress: see `kirsch.frameworks.progress.shown_on`.
    """
    with _shown(options.ranking, options.evaluations, progress) as report:
        allocations.begin(report)
        if any(candidate.kept is None for candidate in allocations.candidates):
            evolve(allocations, np.random.default_rng(options.seed))
    return allocations


def search_note(ranking: str, record: Mapping[str, Any]) -> str:
    """Return a note on the result of a search, from its record (`Allocations.record`)."""
    first, (_, best) = record["starts"]["global"], record["improvements"][-1]
    before = "NaN" if first is None else figures.digits(first)
    plans = figures.counted(record["evaluated"], "plan")
    return (
        f'ranking="{ranking}" evaluated {plans}. Before any training, the quality ({record["quality"]}) is '
        f'{figures.digits(best)}, and {before} with ranking="global".'
    )


@contextlib.contextmanager
def _shown(ranking: str, evaluations: int, progress: bool | None) -> Iterator[Callable[[int, float], None]]:
    """Show a bar within the block; yield the function that updates it."""
    display, since = shown_on(progress), time.monotonic()
    if display is None:
        yield lambda _number, _best: None
        return
    state: list[tuple[int, float]] = [(0, float("nan"))]

    def draw() -> Line:
        number, best = state[-1]
        line = [Piece(f"{ranking} "), *bar(number / evaluations), Piece(f" {number}/{evaluations} plans")]
        if not number:
            return line
        left = (evaluations - number) * (time.monotonic() - since) / number
        return [*line, Piece(f"   best {figures.digits(best)}"), time_left(left)]

    def report(number: int, best: float) -> None:
        state[-1] = (number, best)
        display.refresh_status()

    display.start_status(draw)
    try:
        yield report
    finally:
        display.stop_status()
