"""Kept channels of a pruned model are found in every layer. The recovery objective compares them with the original."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.data.batches import ArrayData, Batch
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.objective import Objective
from kirsch.errors import NumericError, PlanError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.analysis.regions import exits, regions
from kirsch.frameworks.pytorch.features import adapters
from kirsch.frameworks.pytorch.features.capture import dry_run
from kirsch.frameworks.pytorch.verification.masked import MaskedRun
from kirsch.frameworks.pytorch.verification.noise import ConvertedTensors
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.graph.plan import Removal
from kirsch.pruning.kept import Kept, kept_output_channels
from kirsch.recipes.recovery import recovery
from trace_and_cut import with_noise

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
        normalized = self.norm1(x)
        parts = [
            part(normalized).unflatten(-1, (self.heads, -1)).swapaxes(1, 2)
            for part in (self.query, self.key, self.value)
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
LAYERS = {"residual": ("stem", "layer1", "layer2"), "transformer": ("embed", "layers.0", "layers.1")}
"""The first layer, which depends on the inputs alone, and the stages."""


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_noise(build()).double()


def inputs_of(name, count=4, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, *NETS[name][1])))


@dataclass
class Case:
    """A model, the model pruned by a random plan, and its kept channels."""

    name: str
    model: nn.Module
    inputs: torch.Tensor
    graph: Any
    plan: Any
    small: nn.Module
    known: dict

    @property
    def layers(self):
        return LAYERS[self.name]


@pytest.fixture(scope="module", params=list(NETS))
def case(request):
    model, inputs = seeded(NETS[request.param][0]), inputs_of(request.param)
    graph = kirsch.trace(model, inputs)
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.6), importance="random", round_to=1)
    small = kirsch.prune(model, plan, verify=False)
    return Case(request.param, model, inputs, graph, plan, small, kept_output_channels(small, model))


@pytest.fixture
def traced(case, monkeypatch):
    """The case, with kept channels that `recovery` does not have to find by another trace."""
    monkeypatch.setattr(
        "kirsch.recipes.recovery.kept_output_channels", lambda small, original, *, example_inputs: case.known
    )
    return case


class RecordingRun(MaskedRun):
    """The masked original, which records the output of each operation."""

    def __init__(self, graph, keep, model):
        super().__init__(graph, keep, ConvertedTensors(model, None, torch.float64))
        self.outputs_by_node = {}

    def run_node(self, n):
        self.outputs_by_node[n] = super().run_node(n)
        return self.outputs_by_node[n]


# ------------------------------------------------------------------------------------------------ kept channels


def test_kept_channels_equal_those_of_the_masked_original(case):
    """In every layer, the kept channels of the masked original equal the outputs of the pruned module."""
    masked = RecordingRun(case.graph, case.plan.keep(case.graph), case.model)
    masked.outputs([case.inputs])
    assert sum(channels.axis is not None for channels in case.known.values()) > 10
    for path, nodes in regions(case.graph.traced.states).items():
        if path not in case.known:
            continue
        (node,) = exits(nodes)
        channels, expected = case.known[path], masked.outputs_by_node[node].detach()
        if channels.axis is not None:
            expected = expected.index_select(channels.axis, torch.tensor(channels.indices))
        torch.testing.assert_close(dry_run(case.small, [path], case.inputs)[path], expected, rtol=1e-9, atol=1e-10)


def test_kept_channels_are_known_by_module_path(case):
    names = {
        "residual": ["stem", "stem.0", "layer1", "layer1.0", "layer1.0.bn2", "layer2"],
        "transformer": ["embed", "layers.0", "layers.1", "layers.0.query", "layers.1.up", "norm"],
    }[case.name]
    assert [case.known[name].axis for name in names] == [1 if case.name == "residual" else 2] * len(names)
    assert case.known["head"] == Kept()
    assert "layer1.0.relu" not in case.known  # called twice


def Plain():  # noqa: N802 - built as a class
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, K)
    return nn.Sequential(*layers)


def shorter(model, inputs):
    """Return the model without the first two units of each group."""
    graph = kirsch.trace(model, inputs)
    groups = tuple(Removal(group.name, group.kind, group.size, (0, 1), "by hand") for group in graph.groups)
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.9), round_to=1)
    return kirsch.prune(model, replace(plan, groups=groups), verify=False)


def test_model_pruned_twice_and_loaded_keeps_the_channels_of_both_plans(tmp_path):
    model, inputs = seeded(Plain), inputs_of("residual")
    once = shorter(model, inputs)
    twice = kirsch.load(kirsch.save(shorter(once, inputs), tmp_path / "small"), lambda: seeded(Plain, seed=3))
    first, both = kept_output_channels(once, model), kept_output_channels(twice, model)
    for path in ("0", "1", "2"):
        assert first[path] == Kept(1, (2, 3, 4, 5, 6, 7))
        assert both[path] == Kept(1, (4, 5, 6, 7))
    # The first layer depends on the inputs alone, so that its kept channels equal those of the original.
    small_features, original_features = (dry_run(net, ["0"], inputs)["0"] for net in (twice, model))
    torch.testing.assert_close(small_features, original_features[:, 4:], rtol=1e-12, atol=1e-14)
    with pytest.raises(PlanError, match="The plan is for another model"):
        kept_output_channels(once, nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)).double())


def test_channels_of_a_plan_that_stores_no_inputs_are_known_with_example_inputs():
    class Clamped(nn.Sequential):
        def forward(self, x, most):
            return super().forward(x.clamp(max=most))

    model, inputs = Clamped(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4), math.inf)
    small = shorter(model, inputs)
    with pytest.raises(PlanError, match="does not store its example inputs"):
        kept_output_channels(small, model)
    assert kept_output_channels(small, model, example_inputs=inputs)["0"] == Kept(1, (2, 3, 4, 5, 6, 7))


def test_kept_channels_of_a_pruned_submodule_have_the_module_paths_of_the_whole_model():
    model, inputs = nn.Sequential(seeded(Plain)), inputs_of("residual")
    graph = kirsch.trace(model, inputs, module="0")
    small = kirsch.prune(model, kirsch.plan(graph, kirsch.Goal(parameters=0.6), round_to=1), verify=False)
    assert kept_output_channels(small, model)["0.0"].axis == 1


def test_models_without_plan_or_without_blocks_are_refused():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 6, 3), Block(6), Block(6)))
    with pytest.raises(UsageError, match=r"This Sequential was not pruned by Kirsch\. It stores no plan"):
        kept_output_channels(model, model)
    inputs = inputs_of("residual")
    graph = kirsch.trace(model, inputs)
    shallow = kirsch.prune(
        model, kirsch.plan(graph, kirsch.Goal(macs=0.8), kinds="block", importance="random"), verify=False
    )
    with pytest.raises(UsageError, match="This Sequential lost residual blocks, so that its layers have other names"):
        kept_output_channels(shallow, model)


# ------------------------------------------------------------------------------------------------ the objective


def term_values(objective, case):
    """Return the value of each term before training, by name."""
    batch = Batch(case.inputs, torch.arange(len(case.inputs)) % K)
    with Distiller(case.small.eval(), case.model, objective, batch) as distiller:
        return {name: part.item() for name, part in distiller.eval()(batch).terms.items()}


def test_term_is_zero_at_a_layer_that_depends_on_no_pruned_layer(traced):
    first, _, last = traced.layers
    found = term_values(recovery(traced.small, traced.model, traced.inputs, at=[first, last]), traced)
    assert found[f"kept.{first}"] < 1e-28  # equal up to the order of summation
    assert found[f"kept.{last}"] > 1e-3


def test_term_is_the_relative_mean_squared_difference(traced):
    layer = traced.layers[1]
    objective = recovery(traced.small, traced.model, traced.inputs, at=layer, weight=3.0)
    small_features, target = (dry_run(net, [layer], traced.inputs)[layer] for net in (traced.small, traced.model))
    target = target.index_select(traced.known[layer].axis, torch.tensor(traced.known[layer].indices))
    expected = 3.0 * ((small_features - target) ** 2).mean() / (target**2).mean()
    assert term_values(objective, traced)[f"kept.{layer}"] == pytest.approx(expected.item(), rel=1e-5)


def test_default_layers_are_the_stages_and_the_objective_survives_json(traced):
    objective = recovery(traced.small, traced.model, traced.inputs, objective=Objective.preset("dkd"))
    assert [term.student_layer for term in objective.terms] == ["logits", *traced.layers[1:]]
    loss = {"residual": "fitnet", "transformer": "hidden-mse"}[traced.name]
    assert [term.loss for term in objective.terms] == ["dkd", loss, loss]
    assert Objective.from_dict(json.loads(json.dumps(objective.to_dict()))) == objective


def test_training_reduces_all_terms_without_new_parameters(case):
    many = inputs_of(case.name, 96, seed=2)
    objective = recovery(case.small, case.model, many[:32], objective=Objective((), label_weight=1.0))
    events = []
    training = Training(epochs=8, learning_rate=3e-3, optimizer="adamw")
    data, hooks = ArrayData(many.numpy(), None, batch_size=16), TrainingHooks(event=events.append)
    found = kirsch.distill(case.small, case.model, data, objective=objective, training=training, hooks=hooks)
    before, after = found.history[0]["terms"], found.history[-1]["terms"]
    assert set(before) == {f"kept.{layer}" for layer in case.layers[1:]}
    assert all(after[layer] < 0.8 * before[layer] for layer in before), (before, after)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (found.model, case.small)]
    assert shapes[0] == shapes[1]
    (event,) = (event for event in events if event["event"] == "attached")
    assert [(row["student"], row["teacher"]) for row in event["pairs"]] == [(layer, layer) for layer in case.layers[1:]]


def test_layer_with_all_channels_needs_no_adapter(case, monkeypatch):
    layer = case.layers[1]
    monkeypatch.setattr("kirsch.recipes.recovery.kept_output_channels", lambda *_args, **_options: {layer: Kept()})
    (_, term) = recovery(case.model, case.model, case.inputs, at=layer).terms
    assert (term.adapter, dict(term.adapter_options)) == ("none", {})


def test_layer_with_other_shape_is_refused(case, monkeypatch):
    layer = case.layers[1]
    monkeypatch.setattr("kirsch.recipes.recovery.kept_output_channels", lambda *_args, **_options: {layer: Kept()})
    with pytest.raises(UnknownNameError, match="with known kept channels"):
        recovery(case.small, case.model, case.inputs, at=layer)


def test_unknown_layer_is_refused_with_the_nearest(traced):
    known_layer = traced.layers[1]
    with pytest.raises(
        UnknownNameError, match=rf"no layer of \w+ with known kept channels.*Did you mean '{known_layer}"
    ):
        recovery(traced.small, traced.model, traced.inputs, at=known_layer + known_layer[-1])
    with pytest.raises(UsageError, match=r"`at` of kirsch\.recovery names no layers\. Give a layer"):
        recovery(traced.small, traced.model, traced.inputs, at=[])


def test_zero_weight_and_zero_features_are_refused(traced):
    with pytest.raises(UsageError, match=r"`weight` of kirsch\.recovery is 0; expected a number above 0"):
        recovery(traced.small, traced.model, traced.inputs, weight=0)
    first = {"residual": "stem.0", "transformer": "embed"}[traced.name]
    if traced.name == "residual":  # without bias, so zero inputs give zero features
        with pytest.raises(NumericError, match=r"The original's features at `stem\.0` have the mean square 0 on"):
            recovery(traced.small, traced.model, torch.zeros_like(traced.inputs), at=first)


# ------------------------------------------------------------------------------------------------ the adapter


@pytest.mark.parametrize(
    ("shapes", "options", "error", "sentence"),
    [
        (((4, 2, 8, 8), (4, 5, 8, 8)), {}, UsageError, "'kept' needs the option `indices`"),
        (
            ((4, 2, 8, 8), (4, 5, 8, 8)),
            {"indices": [0, 5]},
            UsageError,
            "contain channel 5; the teacher has channels 0 to 4",
        ),
        (((4, 2, 8, 8), (4, 5, 8, 8)), {"indices": [1, 1]}, UsageError, "contain a channel twice"),
        (((4, 3, 8, 8), (4, 5, 8, 8)), {"indices": [0, 1]}, ShapeError, "has 3 channels, and `indices` has 2"),
        (((4, 2, 8, 8), (4, 5, 4, 4)), {"indices": [0, 1]}, ShapeError, "shapes that differ only in axis 1"),
        (((4, 2, 8, 8), (4, 5, 8)), {"indices": [0, 1]}, ShapeError, "shapes that differ only in axis 1"),
        (((4, 6, 2), (4, 6, 5)), {"indices": [0, 1], "axis": 3}, ShapeError, "differ only in axis 3"),
    ],
)
def test_invalid_indices_are_refused(shapes, options, error, sentence):
    with pytest.raises(error, match=sentence):
        adapters.build("kept", *shapes, options=options)


def test_adapter_selects_the_channels_in_order_and_has_no_state():
    adapter = adapters.build("kept", (2, 4, 2), (2, 4, 5), options={"indices": [3, 1], "axis": 2})
    student, teacher = torch.randn(2, 4, 2), torch.randn(2, 4, 5)
    adapted_student, adapted_teacher = adapter(student, teacher)
    assert torch.equal(adapted_student, student)
    assert torch.equal(adapted_teacher, teacher[..., [3, 1]])
    assert adapter.state_dict() == {}
