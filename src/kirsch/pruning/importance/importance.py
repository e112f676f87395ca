"""The interface of an importance, and the decorator that registers one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from kirsch.data.arrays import host
from kirsch.errors import UsageError
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group, ParameterAxis
    from kirsch.graph.labels import Labels

Needs = Literal["weights", "inputs", "labels"]
"""What an importance is computed from: the weights alone, calibration inputs, or calibration inputs with labels."""

OPTIONS = ("norm", "seed", "statistics")
"""Keywords that a formula may have; it receives those that it names."""


GIVEN = "given "
"""Beginning of the name of an importance that is a function or a dict of the user."""


class Importance(Protocol):
    """A registered importance: a function of a graph and a group.

    Attributes:
        name: name of the importance.
        needs: what it is computed from.
        options: the keywords that it uses.
        signed: whether scores are negative for some units of most models.
        of_loss: whether scores are changes of the loss, so that those of all layers can be added.
    """

    name: str
    needs: Needs
    options: tuple[str, ...]
    signed: bool
    of_loss: bool
    __doc__: str | None

    def __call__(
        self, graph: Graph, group: Group, *, norm: int = 2, seed: int = 0, statistics: Any = None
    ) -> NDArray[np.float64]:
        """Return finite scores of the units of a group, shape (units,), larger for units that should be kept.

        Args:
            graph: `graph.values(name)` returns the weights.
            group: the units.
            norm: 1 or 2, for importances that use a norm.
            seed: seed of importances that draw random numbers.
            statistics: a `kirsch.pruning.importance.statistics.Statistics`, for importances that need data.
        """


IMPORTANCES: Registry[Importance] = Registry("importance")


def importance(
    name: str, *, needs: Needs = "weights", signed: bool = False, of_loss: bool = False
) -> Callable[[Callable[..., Any]], Importance]:
    """Decorate a function to register it as an importance.

    The function takes a graph, a group, and those of the keywords `OPTIONS` that it names.

    Args:
        name: name of the importance in `kirsch.plan`.
        needs: what the importance is computed from; functions that name `statistics` need inputs or labels.
        signed: whether scores are negative for some units of most models.
        of_loss: whether scores are changes of the loss, so that those of all layers can be added.

    Raises:
        UsageError: the name is taken, the function has other keywords, or it names `statistics` and needs only weights.
    """

    def register(formula: Callable[..., Any]) -> Importance:
        return IMPORTANCES.register(name)(as_importance(formula, name, needs, signed=signed, of_loss=of_loss))

    return register


def as_importance(
    formula: Callable[..., Any], name: str, needs: Needs = "weights", *, signed: bool = False, of_loss: bool = False
) -> Importance:
    """Return a function of a graph and a group, such as one of the user, as an importance; see `importance`.

    Raises:
        UsageError: the function has keywords that are not in `OPTIONS`.
    """
    signature = inspect.signature(formula)
    first = list(signature.parameters.values())[:2]
    if len(first) < len(("graph", "group")) or any(p.kind > p.POSITIONAL_OR_KEYWORD for p in first):
        raise UsageError(
            f"The importance {name!r} cannot be called with a graph and a group.",
            f"Its signature is {signature}.",
            "Give a function (graph, group) → scores.",
        )
    options = tuple(signature.parameters)[2:]
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        raise UsageError(
            f"The importance {name!r} has the argument {unknown[0]!r}.",
            f"An importance takes a graph and a group, and may take the keywords {', '.join(OPTIONS)}.",
            "Rename the argument, or bind it with functools.partial.",
        )
    if "statistics" in options and needs == "weights":
        raise UsageError(
            f"The importance {name!r} uses statistics of calibration data, and is registered for weights alone.",
            fix='Give needs="inputs" or needs="labels".',
        )

    @functools.wraps(formula)
    def compute(graph: Graph, group: Group, **values: Any) -> NDArray[np.float64]:
        return host(formula(graph, group, **{name: values[name] for name in options if name in values}))

    found = cast("Importance", compute)
    found.name, found.needs, found.options = name, needs, options
    found.signed, found.of_loss = signed, of_loss
    return found


def importance_of(choice: Any) -> Importance:
    """Return the importance of a name, a function (graph, group) → scores, or a dict of scores by group name.

    Raises:
        UnknownNameError: there is no importance of this name.
        UsageError: the function has unknown arguments.
    """
    if isinstance(choice, str):
        found = IMPORTANCES[choice]
        return found if hasattr(found, "needs") else as_importance(found, choice)
    if isinstance(choice, Mapping):
        return as_importance(lambda _graph, group: _given(choice, group), f"{GIVEN}scores")
    if hasattr(choice, "needs"):
        return cast("Importance", choice)
    uses_data = "statistics" in inspect.signature(choice).parameters
    name = f"{GIVEN}function {getattr(choice, '__name__', '')}".strip()
    return as_importance(choice, name, "inputs" if uses_data else "weights")


def _given(scores: Mapping[str, Any], group: Group) -> Any:
    if group.name not in scores:
        raise UsageError(
            f"`importance` has no scores for the group {group.name!r}.",
            "Every group whose units may be removed needs one score for each unit.",
            f"Add {group.name!r}, or exclude the layer, exclude={group.name!r}.",
        )
    return scores[group.name]


# ------------------------------------------------------------------------------------------------ axes and units


def weight_axes(graph: Graph, group: Group) -> list[ParameterAxis]:
    """Return the axes of weights (parameters with two or more axes) on which the units of a group occur.

    If there are none, the axes of the other parameters are returned. Buffers and empty parameters are left out.
    """
    not_empty = {name for name in graph.parameters if 0 not in graph.tensors[name].shape}
    parameters = [(name, axis) for name, axis in group.footprint if name in not_empty]
    return [(name, axis) for name, axis in parameters if len(graph.tensors[name].shape) > 1] or parameters


def unit_of_index(graph: Graph, group: Group, labels: Labels) -> NDArray[np.int64]:
    """Return the unit to which each index of a labeled axis belongs, -1 for indices of other groups."""
    unit = np.full(len(graph.coupling.frozen), -1)
    unit[group.components] = group.unit_of()
    of_index: NDArray[np.int64] = unit[graph.coupling.component[labels]]
    return of_index


def sum_per_unit(graph: Graph, group: Group, labels: Labels, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of the values of each unit, over the indices of a labeled axis that belong to the unit."""
    of_index = unit_of_index(graph, group, labels)
    member = of_index >= 0
    return np.asarray(np.bincount(of_index[member], values[member], group.size), np.float64)


def mean_per_unit(graph: Graph, group: Group, labels: Labels, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the values of each unit, over the indices of a labeled axis that belong to the unit."""
    sums = sum_per_unit(graph, group, labels, values)
    counts = sum_per_unit(graph, group, labels, np.ones(len(values)))
    return np.asarray(sums / np.maximum(counts, 1))


def relative_to_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values divided by their mean, so that an average unit has 1 in any layer; ones if all values are 0."""
    mean = values.mean()
    return values / mean if mean != 0 else np.ones_like(values)  # the caller refuses NaN and infinity
