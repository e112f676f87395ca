"""What a pruned model has kept is found at every place, and it learns to come near to the original there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.objective import Objective
from kirsch.errors import NumericError, PlanError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.data import ArrayData, Batch
from kirsch.frameworks.pytorch.analysis.regions import exits, regions
from kirsch.frameworks.pytorch.features import adapters
from kirsch.frameworks.pytorch.features.capture import dry_run
from kirsch.frameworks.pytorch.verification.masked import MaskedRun
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.graph.plan import Removal
from kirsch.pruning.kept import Kept, kept
from kirsch.recipes.recovery import recovery
from proving import shaken

K = 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width + 2, 3, padding=1, bias=False), nn.BatchNorm2d(width + 2)
        self.conv2, self.bn2 = nn.Conv2d(width + 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """Two stages of blocks; `relu` of a block runs twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.layer1 = nn.Sequential(Block(6))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), Block(8))
        self.head = nn.Linear(8, K)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x):
        given = self.norm1(x)
        parts = [
            part(given).unflatten(-1, (self.heads, -1)).swapaxes(1, 2) for part in (self.query, self.key, self.value)
        ]
        x = x + self.out(F.scaled_dot_product_attention(*parts).swapaxes(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layers = nn.ModuleList(Layer(8, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, K)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


NETS = {"residual": (Residual, (1, 8, 8)), "transformer": (Transformer, (6, 5))}
PLACES = {"residual": ("stem", "layer1", "layer2"), "transformer": ("embed", "layers.0", "layers.1")}
"""The first, which sees the inputs alone, and the stages."""


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shaken(build()).double()


def inputs_of(name, count=4, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, *NETS[name][1])))


@dataclass
class Case:
    """A model, what a random plan left of it, and what is known of that."""

    name: str
    model: nn.Module
    inputs: torch.Tensor
    graph: Any
    plan: Any
    small: nn.Module
    known: dict

    @property
    def places(self):
        return PLACES[self.name]


@pytest.fixture(scope="module", params=list(NETS))
def case(request):
    model, inputs = seeded(NETS[request.param][0]), inputs_of(request.param)
    graph = kirsch.trace(model, inputs)
    plan = kirsch.plan(graph, kirsch.Goal(params=0.6), "random", round_to=1)
    small = kirsch.prune(model, plan, verify=False)
    return Case(request.param, model, inputs, graph, plan, small, kept(small, model))


@pytest.fixture
def traced(case, monkeypatch):
    """The case, of which `recovery` knows already what it would find by another trace."""
    monkeypatch.setattr("kirsch.recipes.recovery.kept", lambda small, original, *, example_inputs: case.known)
    return case


class Recorded(MaskedRun):
    """The masked original, with what each of its operations gave."""

    def __init__(self, graph, keep, model):
        super().__init__(graph, keep, {**dict(model.named_parameters()), **dict(model.named_buffers())})
        self.seen = {}

    def run_node(self, n):
        self.seen[n] = super().run_node(n)
        return self.seen[n]


# ------------------------------------------------------------------------------------------------ what was kept


def test_what_is_kept_is_what_the_masked_original_and_the_pruned_model_agree_in(case):
    """Two ways, at every place: the traced program with zeros, read at the kept channels, and the pruned module."""
    masked = Recorded(case.graph, case.plan.keep(case.graph), case.model)
    masked.outputs([case.inputs])
    assert sum(place.axis is not None for place in case.known.values()) > 10
    for path, nodes in regions(case.graph.traced.states).items():
        if path not in case.known:
            continue
        (node,) = exits(nodes)
        place, wanted = case.known[path], masked.seen[node].detach()
        if place.axis is not None:
            wanted = wanted.index_select(place.axis, torch.tensor(place.indices))
        torch.testing.assert_close(dry_run(case.small, [path], case.inputs)[path], wanted, rtol=1e-9, atol=1e-10)


def test_the_places_are_those_that_a_user_would_name(case):
    names = {
        "residual": ["stem", "stem.0", "layer1", "layer1.0", "layer1.0.bn2", "layer2"],
        "transformer": ["embed", "layers.0", "layers.1", "layers.0.query", "layers.1.up", "norm"],
    }[case.name]
    assert [case.known[name].axis for name in names] == [1 if case.name == "residual" else 2] * len(names)
    assert case.known["head"] == Kept()
    assert "layer1.0.relu" not in case.known  # it runs twice


def Plain():  # noqa: N802 - built as a class
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, K)
    return nn.Sequential(*layers)


def shorter(model, inputs):
    """Pruned of the first two units of each group."""
    graph = kirsch.trace(model, inputs)
    groups = tuple(Removal(group.name, group.kind, group.size, (0, 1), "by hand") for group in graph.groups)
    plan = kirsch.plan(graph, kirsch.Goal(params=0.9), round_to=1)
    return kirsch.prune(model, replace(plan, groups=groups), verify=False)


def test_a_model_that_is_pruned_twice_and_loaded_keeps_what_both_plans_leave(tmp_path):
    model, inputs = seeded(Plain), inputs_of("residual")
    once = shorter(model, inputs)
    twice = kirsch.load(kirsch.save(shorter(once, inputs), tmp_path / "small"), lambda: seeded(Plain, seed=3))
    first, both = kept(once, model), kept(twice, model)
    for path in ("0", "1", "2"):
        assert first[path] == Kept(1, (2, 3, 4, 5, 6, 7))
        assert both[path] == Kept(1, (4, 5, 6, 7))
    # The first layer sees the inputs alone, so that its kept channels are the original's own.
    own, its = (dry_run(net, ["0"], inputs)["0"] for net in (twice, model))
    torch.testing.assert_close(own, its[:, 4:], rtol=1e-12, atol=1e-14)
    with pytest.raises(PlanError, match="The plan is for another model"):
        kept(once, nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)).double())


def test_a_part_that_was_pruned_is_known_by_its_path_in_the_whole():
    model, inputs = nn.Sequential(seeded(Plain)), inputs_of("residual")
    graph = kirsch.trace(model, inputs, scope="0")
    small = kirsch.prune(model, kirsch.plan(graph, kirsch.Goal(params=0.6), round_to=1), verify=False)
    assert kept(small, model)["0.0"].axis == 1


def test_what_was_not_pruned_or_lost_whole_blocks_is_refused():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 6, 3), Block(6), Block(6)))
    with pytest.raises(UsageError, match=r"This Sequential was not pruned by Kirsch\. It stores no plan"):
        kept(model, model)
    inputs = inputs_of("residual")
    graph = kirsch.trace(model, inputs)
    shallow = kirsch.prune(model, kirsch.plan_depth(graph, kirsch.Goal(macs=0.8), inputs, "random"), verify=False)
    with pytest.raises(UsageError, match="This Sequential lost residual blocks, so that its layers have other names"):
        kept(shallow, model)


# ------------------------------------------------------------------------------------------------ the objective


def charges(objective, case):
    """What each term charges before any training, by its name."""
    batch = Batch(case.inputs, torch.arange(len(case.inputs)) % K)
    with Distiller(case.small.eval(), case.model, objective, batch) as distiller:
        return {name: part.item() for name, part in distiller.eval()(batch).parts.items()}


def test_where_nothing_upstream_has_gone_nothing_is_charged_and_elsewhere_something(traced):
    first, _, last = traced.places
    found = charges(recovery(traced.small, traced.model, traced.inputs, at=[first, last]), traced)
    assert found[f"kept.{first}"] < 1e-28  # the same numbers, added up in another order at most
    assert found[f"kept.{last}"] > 1e-3


def test_a_term_is_the_mean_squared_difference_as_a_share_of_the_mean_square(traced):
    place = traced.places[1]
    objective = recovery(traced.small, traced.model, traced.inputs, at=place, weight=3.0)
    own, its = (dry_run(net, [place], traced.inputs)[place] for net in (traced.small, traced.model))
    its = its.index_select(traced.known[place].axis, torch.tensor(traced.known[place].indices))
    wanted = 3.0 * ((own - its) ** 2).mean() / (its**2).mean()
    assert charges(objective, traced)[f"kept.{place}"] == pytest.approx(wanted.item(), rel=1e-5)


def test_the_places_are_the_stages_by_default_and_the_objective_is_told_in_json(traced):
    objective = recovery(traced.small, traced.model, traced.inputs, objective=Objective.preset("dkd"))
    assert [term.student for term in objective.terms] == ["logits", *traced.places[1:]]
    loss = {"residual": "fitnet", "transformer": "hidden-mse"}[traced.name]
    assert [term.loss for term in objective.terms] == ["dkd", loss, loss]
    assert Objective.from_dict(json.loads(json.dumps(objective.to_dict()))) == objective


def test_a_pruned_model_recovers(case):
    """It comes nearer to its original at every place, and no parameter is added."""
    many = inputs_of(case.name, 96, seed=2)
    objective = recovery(case.small, case.model, many[:32], objective=Objective((), label_weight=1.0))
    told = []
    training = Training(epochs=8, learning_rate=3e-3, optimizer="adamw")
    data, hooks = ArrayData(many.numpy(), None, batch_size=16), TrainingHooks(event=told.append)
    found = kirsch.distill(case.small, case.model, data, objective=objective, training=training, hooks=hooks)
    before, after = found.history[0]["parts"], found.history[-1]["parts"]
    assert set(before) == {f"kept.{place}" for place in case.places[1:]}
    assert all(after[place] < 0.8 * before[place] for place in before), (before, after)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (found.model, case.small)]
    assert shapes[0] == shapes[1]
    (event,) = (event for event in told if event["event"] == "attached")
    assert [(row["student"], row["teacher"]) for row in event["pairs"]] == [(place, place) for place in case.places[1:]]


def test_a_place_that_has_lost_nothing_is_compared_as_it_is(case, monkeypatch):
    place = case.places[1]
    monkeypatch.setattr("kirsch.recipes.recovery.kept", lambda *_args, **_options: {place: Kept()})
    (_, term) = recovery(case.model, case.model, case.inputs, at=place).terms
    assert (term.adapter, dict(term.adapter_options)) == ("none", {})


def test_a_place_whose_shapes_do_not_agree_with_what_was_kept_is_not_known(case, monkeypatch):
    place = case.places[1]
    monkeypatch.setattr("kirsch.recipes.recovery.kept", lambda *_args, **_options: {place: Kept()})
    with pytest.raises(UnknownNameError, match="whose kept channels are known"):
        recovery(case.small, case.model, case.inputs, at=place)


def test_a_place_that_is_not_known_is_answered_with_the_nearest(traced):
    right = traced.places[1]
    with pytest.raises(
        UnknownNameError, match=rf"no place in \w+ whose kept channels are known.*Did you mean '{right}"
    ):
        recovery(traced.small, traced.model, traced.inputs, at=right + right[-1])
    with pytest.raises(UsageError, match=r"There are no places to compare\. Name some"):
        recovery(traced.small, traced.model, traced.inputs, at=[])


def test_a_weight_of_nothing_and_a_place_of_zeros_are_refused(traced):
    with pytest.raises(UsageError, match="The weight of the places is 0; a number above 0 is needed"):
        recovery(traced.small, traced.model, traced.inputs, weight=0)
    first = {"residual": "stem.0", "transformer": "embed"}[traced.name]
    if traced.name == "residual":  # it has no bias
        with pytest.raises(NumericError, match=r"What the original puts out at `stem\.0` has the mean square 0 on"):
            recovery(traced.small, traced.model, torch.zeros_like(traced.inputs), at=first)


# ------------------------------------------------------------------------------------------------ the adapter


@pytest.mark.parametrize(
    ("shapes", "options", "error", "sentence"),
    [
        (((4, 2, 8, 8), (4, 5, 8, 8)), {}, UsageError, "'kept' is not told which channels are kept"),
        (
            ((4, 2, 8, 8), (4, 5, 8, 8)),
            {"indices": [0, 5]},
            UsageError,
            "told channel 5; the teacher has channels 0 to 4",
        ),
        (((4, 2, 8, 8), (4, 5, 8, 8)), {"indices": [1, 1]}, UsageError, "told a channel twice"),
        (((4, 3, 8, 8), (4, 5, 8, 8)), {"indices": [0, 1]}, ShapeError, "has 3 channels, and 2 are named as kept"),
        (((4, 2, 8, 8), (4, 5, 4, 4)), {"indices": [0, 1]}, ShapeError, "shapes that differ in axis 1 alone"),
        (((4, 2, 8, 8), (4, 5, 8)), {"indices": [0, 1]}, ShapeError, "shapes that differ in axis 1 alone"),
        (((4, 6, 2), (4, 6, 5)), {"indices": [0, 1], "axis": 3}, ShapeError, "differ in axis 3 alone"),
    ],
)
def test_indices_that_do_not_fit_are_refused(shapes, options, error, sentence):
    with pytest.raises(error, match=sentence):
        adapters.build("kept", *shapes, options=options)


def test_the_adapter_takes_the_channels_in_the_order_named_and_keeps_no_state():
    adapter = adapters.build("kept", (2, 4, 2), (2, 4, 5), options={"indices": [3, 1], "axis": 2})
    student, teacher = torch.randn(2, 4, 2), torch.randn(2, 4, 5)
    mine, theirs = adapter(student, teacher)
    assert torch.equal(mine, student)
    assert torch.equal(theirs, teacher[..., [3, 1]])
    assert adapter.state_dict() == {}
