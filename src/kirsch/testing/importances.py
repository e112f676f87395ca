"""Conformance suite for importances. Each check takes an importance and asserts one property.

```python
@pytest.mark.parametrize("check", IMPORTANCE_CHECKS, ids=lambda check: check.__name__)
def test_my_importance(check):
    check(my_importance)
```

`PERMUTATION_CHECKS` are additional checks for importances that do not draw random numbers. Importances that need data
are run on random images, with the squared error as loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.batches import Batch
from kirsch.frameworks.find import framework_of, pytorch
from kirsch.frameworks.trace import trace
from kirsch.graph.plan import Goal
from kirsch.pruning.choose import plan
from kirsch.pruning.importance import importance_of
from kirsch.pruning.importance.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance import Importance


def check_each_unit_has_one_finite_score(importance: Importance) -> None:
    """Each unit has one finite score, in a chain of layers whose last layer has several inputs for each channel."""
    _assert_one_finite_score_per_unit(importance, trace(_chain(), _image()), layers=2)


def check_scores_where_normalization_and_a_residual_couple_layers(importance: Importance) -> None:
    """Each unit has one score if it comprises channels of several convolutions and a batch normalization."""
    _assert_one_finite_score_per_unit(importance, trace(_residual(), _image()), layers=5)


def check_scores_where_a_unit_is_many_channels(importance: Importance) -> None:
    """Each unit has one score if it comprises several channels, which a group normalization couples."""
    graph = trace(_grouped(), _image())
    assert any(len(group.components) > group.size for group in graph.groups)
    _assert_one_finite_score_per_unit(importance, graph, layers=2)


def check_scores_of_zero_weights_are_finite(importance: Importance) -> None:
    """Scores are finite for layers of zeros, which training with a sparsity penalty produces."""
    model = _chain()
    for parameter in model.parameters():
        parameter.data.zero_()
    _assert_one_finite_score_per_unit(importance, trace(model, _image()), layers=2)


def check_scores_depend_on_the_seed_alone(importance: Importance) -> None:
    """The same call returns the same scores, and does not use the random state of numpy or PyTorch."""
    graph = trace(_residual(), _image())
    state = _random_state()
    first = _scores(importance, graph)
    assert _random_state() == state, "the importance changes the global random state; draw from `seed` alone"
    second = _scores(importance, graph)
    for name, scores in first.items():
        assert np.array_equal(scores, second[name]), f"the same call returns different scores for {name!r}"


def check_weights_are_not_changed(importance: Importance) -> None:
    """The importance changes no parameter and no buffer."""
    model = _residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _scores(importance, trace(model, _image()))
    for name, value in model.state_dict().items():
        assert _torch().equal(value, before[name]), f"{name} is changed"


def check_plan_removes_exactly_the_lowest_scores(importance: Importance) -> None:
    """`kirsch.plan` removes the units with the lowest scores of each group."""
    graph = trace(_residual(), _image())
    scores = _scores(importance, graph)
    options: dict[str, Any] = {}
    if importance_of(importance).needs != "weights":
        options["data"], loss = _calibration(graph)
        options |= {"loss": loss} if importance_of(importance).needs == "labels" else {}
    found = plan(graph, Goal(macs=0.5), importance=importance, round_to=1, **options)
    assert found.groups, "the plan removes no units"
    for removal in found.groups:
        removed = np.isin(np.arange(removal.size), removal.removed)
        highest, lowest = scores[removal.name][removed].max(), scores[removal.name][~removed].min()
        assert highest <= lowest, (
            f"the plan removes a unit of {removal.name!r} with score {highest} and keeps one with score {lowest}"
        )


IMPORTANCE_CHECKS: tuple[Callable[[Importance], None], ...] = (
    check_each_unit_has_one_finite_score,
    check_scores_where_normalization_and_a_residual_couple_layers,
    check_scores_where_a_unit_is_many_channels,
    check_scores_of_zero_weights_are_finite,
    check_scores_depend_on_the_seed_alone,
    check_weights_are_not_changed,
    check_plan_removes_exactly_the_lowest_scores,
)


def check_scores_are_permuted_with_the_units(importance: Importance) -> None:
    """A permutation of the units, which leaves the function of the network unchanged, permutes the scores."""
    for build in (_chain, _residual, _grouped):
        graph, permuted = trace(build(), _image()), build()
        orders = {}
        for number, group in enumerate(graph.groups):
            orders[group.name] = np.random.default_rng([4, number]).permutation(group.size)
            _permute(permuted, graph, group, orders[group.name])
        before, after = _scores(importance, graph), _scores(importance, trace(permuted, _image()))
        for name, order in orders.items():
            # 1e-5: weights are float32, and the order of summation differs
            rounding = 1e-6 * np.abs(before[name]).max()
            assert np.allclose(after[name], before[name][order], rtol=1e-5, atol=rounding + 1e-12), (
                f"the permuted units of {name!r} have the scores {after[name]}; expected {before[name][order]}"
            )


PERMUTATION_CHECKS: tuple[Callable[[Importance], None], ...] = (check_scores_are_permuted_with_the_units,)


# ------------------------------------------------------------------------------------------------ networks


def _torch() -> Any:
    import torch  # noqa: PLC0415 - listing the checks imports no framework

    return torch


def _image() -> Any:
    return pytorch().inference.from_numpy(np.ones((1, 3, 6, 6), np.float32))


def _with_random_weights(model: Any) -> Any:
    """Set all parameters and statistics to random numbers, so that no scale is one and no bias zero."""
    random = np.random.default_rng(0)
    for name, value in model.state_dict().items():
        numbers = random.standard_normal(value.shape).astype(np.float32)
        if value.is_floating_point():
            value.copy_(pytorch().inference.from_numpy(np.abs(numbers) if name.endswith("running_var") else numbers))
    return model.eval()


def _chain() -> Any:
    nn = _torch().nn
    return _with_random_weights(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4))
    )


def _grouped() -> Any:
    nn = _torch().nn
    return _with_random_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)))


def _residual() -> Any:
    from torch import Tensor, nn  # noqa: PLC0415 - listing the checks imports no framework

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            x = x + self.second(self.first(x).relu())
            logits: Tensor = self.head(x.mean((2, 3)))
            return logits

    return _with_random_weights(Residual())


# ------------------------------------------------------------------------------------------------ assertions


def _calibration(graph: Graph) -> tuple[list[tuple[Any, Any]], Callable[[Any, Any], Any]]:
    """Return calibration batches with targets of the shape of the outputs, and their squared error."""
    random = np.random.default_rng(1)
    inference = pytorch().inference
    images = inference.from_numpy(random.standard_normal((6, *_image().shape[1:])).astype(np.float32))
    outputs = framework_of(graph.model).inference.infer(graph.model, images)
    targets = inference.from_numpy(random.standard_normal(tuple(outputs.shape)).astype(np.float32))
    return [(images, targets)], lambda student, target: ops.mean((student - target) ** 2)


def _scores(importance: Importance, graph: Graph, norm: int = 2) -> dict[str, NDArray[np.float64]]:
    """Return the scores of each group."""
    chosen, statistics = importance_of(importance), None
    if chosen.needs != "weights":
        batches, loss = _calibration(graph)
        statistics = Statistics(graph, [Batch(*pair) for pair in batches], loss)
    return {group.name: chosen(graph, group, norm=norm, seed=0, statistics=statistics) for group in graph.groups}


def _assert_one_finite_score_per_unit(importance: Importance, graph: Graph, *, layers: int) -> None:
    """Check the scores of all groups; one group must couple at least this number of layers."""
    assert max(len(group.layers) for group in graph.groups) >= layers, "the test network has fewer coupled layers"
    found = {norm: _scores(importance, graph, norm) for norm in (1, 2)}
    for group in graph.groups:
        for norm in (1, 2):
            scores = found[norm][group.name]
            assert scores.shape == (group.size,), (
                f"{group.name!r} has {group.size} units; the scores have shape {scores.shape}"
            )
            assert np.isfinite(scores).all(), f"the scores of {group.name!r} are {scores}"


def _random_state() -> tuple[bytes, int, bytes]:
    """Return the global random state of numpy and of PyTorch."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is checked
    return state["state"]["key"].tobytes(), state["state"]["pos"], _torch().get_rng_state().numpy().tobytes()


def _permute(model: Any, graph: Graph, group: Group, order: NDArray[np.int64]) -> None:
    """Permute the units of a group: the new unit u is the old unit `order[u]`."""
    unit = np.full(len(graph.coupling.frozen), -1)
    unit[group.components] = group.unit_of()
    tensors = model.state_dict()
    for name, axis in group.footprint:
        unit_of_index = unit[graph.coupling.component[graph.axes[name, axis]]]
        source = np.arange(len(unit_of_index))
        for new, old in enumerate(order):
            source[unit_of_index == new] = np.flatnonzero(unit_of_index == old)
        tensors[name].copy_(tensors[name].index_select(axis, pytorch().inference.from_numpy(source)))
