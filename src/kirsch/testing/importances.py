"""What any importance must pass. Each check takes the importance and asserts one statement.

```python
@pytest.mark.parametrize("check", IMPORTANCE_CHECKS, ids=lambda check: check.__name__)
def test_my_importance(check):
    check(my_importance)
```

`WEIGHT_IMPORTANCE_CHECKS` come on top for an importance that follows from the weights alone; one that draws random
numbers, such as "random", cannot pass them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.frameworks.port import pytorch, trace
from kirsch.graph.plan import Goal
from kirsch.pruning.choose import plan
from kirsch.pruning.importance import IMPORTANCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance import Importance


def check_scores_are_one_finite_number_a_unit(importance: Importance) -> None:
    """In a chain of layers, whose last reads each channel at several places, for both norms."""
    _assert_scored(importance, trace(_chain(), _image()), layers=2)


def check_scores_where_normalization_and_a_residual_couple_layers(importance: Importance) -> None:
    """Units that lie on a batch normalization and on several convolutions have one score each."""
    _assert_scored(importance, trace(_residual(), _image()), layers=5)


def check_scores_where_a_unit_is_many_channels(importance: Importance) -> None:
    """Units that are whole groups of channels, since a grouped convolution keeps them together, have one score each."""
    graph = trace(_grouped(), _image())
    assert any(len(group.components) > group.size for group in graph.groups)
    _assert_scored(importance, graph, layers=2)


def check_scores_of_zero_weights_are_finite(importance: Importance) -> None:
    """A layer of zeros, which training with a penalty makes, divides nothing by zero."""
    model = _chain()
    for parameter in model.parameters():
        parameter.data.zero_()
    _assert_scored(importance, trace(model, _image()), layers=2)


def check_scores_follow_from_the_seed(importance: Importance) -> None:
    """The same call gives the same numbers, and draws nothing from the random state of numpy or PyTorch."""
    graph = trace(_residual(), _image())
    state = _random_state()
    first = _scores(importance, graph)
    assert _random_state() == state, "the importance moves the random state of its caller; draw from `seed` alone"
    second = _scores(importance, graph)
    for name, scores in first.items():
        assert np.array_equal(scores, second[name]), f"the same call gives other scores for {name!r}"


def check_weights_are_left_as_they_are(importance: Importance) -> None:
    """No parameter and no buffer changes by a bit."""
    model = _residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _scores(importance, trace(model, _image()))
    for name, value in model.state_dict().items():
        assert _torch().equal(value, before[name]), f"{name} is changed"


def check_plan_removes_exactly_the_lowest_scores(importance: Importance) -> None:
    """`kirsch.plan` takes it, and what goes from a group scores no higher than what stays."""
    graph = trace(_residual(), _image())
    scores = _scores(importance, graph)
    with _registered(importance) as name:
        made = plan(graph, Goal(macs=0.5), name, round_to=1)
    assert made.groups, "the plan removes nothing"
    for removal in made.groups:
        gone = np.isin(np.arange(removal.size), removal.removed)
        highest, lowest = scores[removal.name][gone].max(), scores[removal.name][~gone].min()
        assert highest <= lowest, f"a unit of {removal.name!r} goes with {highest}, while one with {lowest} stays"


IMPORTANCE_CHECKS: tuple[Callable[[Importance], None], ...] = (
    check_scores_are_one_finite_number_a_unit,
    check_scores_where_normalization_and_a_residual_couple_layers,
    check_scores_where_a_unit_is_many_channels,
    check_scores_of_zero_weights_are_finite,
    check_scores_follow_from_the_seed,
    check_weights_are_left_as_they_are,
    check_plan_removes_exactly_the_lowest_scores,
)


def check_scores_move_along_with_the_units(importance: Importance) -> None:
    """Units in another order, which compute the same network, have the same scores in that order."""
    for build in (_chain, _residual, _grouped):
        graph, moved = trace(build(), _image()), build()
        orders = {}
        for place, group in enumerate(graph.groups):
            orders[group.name] = np.random.default_rng([4, place]).permutation(group.size)
            _reorder(moved, graph, group, orders[group.name])
        before, after = _scores(importance, graph), _scores(importance, trace(moved, _image()))
        for name, order in orders.items():
            # 1e-5: weights are float32, and sums run in another order
            assert np.allclose(after[name], before[name][order], rtol=1e-5, atol=1e-12), (
                f"the units of {name!r} score {before[name][order]}, and {after[name]} when their order is another"
            )


WEIGHT_IMPORTANCE_CHECKS: tuple[Callable[[Importance], None], ...] = (check_scores_move_along_with_the_units,)


# ------------------------------------------------------------------------------------------------ networks


def _torch() -> Any:
    import torch  # noqa: PLC0415 - to list the checks takes no framework

    return torch


def _image() -> Any:
    return pytorch().tensor(np.ones((1, 3, 6, 6), np.float32))


def _drawn(model: Any) -> Any:
    """The model with all parameters and statistics drawn anew, so that no scale is one and no bias zero."""
    random = np.random.default_rng(0)
    for name, value in model.state_dict().items():
        drawn = random.standard_normal(value.shape).astype(np.float32)
        if value.is_floating_point():
            value.copy_(pytorch().tensor(np.abs(drawn) if name.endswith("running_var") else drawn))
    return model.eval()


def _chain() -> Any:
    nn = _torch().nn
    return _drawn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4)))


def _grouped() -> Any:
    nn = _torch().nn
    return _drawn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)))


def _residual() -> Any:
    from torch import Tensor, nn  # noqa: PLC0415 - to list the checks takes no framework

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            x = x + self.second(self.first(x).relu())
            found: Tensor = self.head(x.mean((2, 3)))
            return found

    return _drawn(Residual())


# ------------------------------------------------------------------------------------------------ how to check


def _scores(importance: Importance, graph: Graph) -> dict[str, NDArray[np.float64]]:
    return {group.name: np.asarray(importance(graph, group, norm=2, seed=0)) for group in graph.groups}


def _assert_scored(importance: Importance, graph: Graph, *, layers: int) -> None:
    """One finite number a unit in every group, of which one lies on this many layers or more."""
    assert max(len(group.layers) for group in graph.groups) >= layers, "the network is not coupled as it should be"
    for group in graph.groups:
        for norm in (1, 2):
            found = np.asarray(importance(graph, group, norm=norm, seed=0))
            assert found.shape == (group.size,), (
                f"{group.name!r} has {group.size} units; the scores have shape {found.shape}"
            )
            assert np.isfinite(found).all(), f"the scores of {group.name!r} are {found}"


def _random_state() -> tuple[bytes, int, bytes]:
    """The random state of numpy and of PyTorch, to be compared."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the old global state is what must not move
    return state["state"]["key"].tobytes(), state["state"]["pos"], _torch().get_rng_state().numpy().tobytes()


@contextmanager
def _registered(importance: Importance) -> Iterator[str]:
    """A name under which the importance is known for a while; plans take names alone."""
    name = f"under test: {id(importance)}"
    IMPORTANCES.register(name)(importance)
    try:
        yield name
    finally:
        del IMPORTANCES._objects[name]  # noqa: SLF001 - a registry has no public removal


def _reorder(model: Any, graph: Graph, group: Group, order: NDArray[np.int64]) -> None:
    """Bring the units of a group into another order: unit u becomes the one that was `order[u]`."""
    unit = np.full(len(graph.coupling.frozen), -1)
    unit[group.components] = group.unit_of()
    tensors = model.state_dict()
    for name, axis in group.footprint:
        of_index = unit[graph.coupling.component[graph.axes[name, axis]]]
        source = np.arange(len(of_index))
        for new, old in enumerate(order):
            source[of_index == new] = np.flatnonzero(of_index == old)
        tensors[name].copy_(tensors[name].index_select(axis, pytorch().tensor(source)))
