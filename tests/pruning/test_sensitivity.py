"""Sensitivity of groups and residual blocks: compared with pruned models, and with networks of known quality."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import DataError, LoadError, UnknownNameError, UsageError
from kirsch.graph.plan import Plan, Skip
from kirsch.report import read_metrics
from kirsch.steps import MeasureSensitivity, Prune
from measured_networks import accuracy, one_hot, one_unit_per_class, set_weights, trained

INPUTS, LABELS = one_hot()


def traced(model, inputs=INPUTS):
    return kirsch.trace(model, torch.tensor(inputs[:1]))


def pruned_by(model, graph, groups=(), blocks=()):
    """Return the model without some units and blocks, by `kirsch.prune`."""
    cost = graph.cost
    plan = Plan(
        graph.fingerprint,
        graph.model_name,
        tuple(groups),
        cost,
        cost,
        blocks=tuple(blocks),
        inputs=graph.inputs,
        graph=graph,
    )
    return kirsch.prune(model, plan, verify=False)


def test_units_without_effect_cost_nothing_and_each_other_unit_its_class():
    """Four spare units are removed first, then those of the classes 3, 2 and 1 with 1, 2 and 3 of 10 samples."""
    found = kirsch.sensitivity(traced(one_unit_per_class()), (INPUTS, LABELS), fractions=[i / 8 for i in range(1, 8)])
    (row,) = found.rows
    assert [point.removed for point in row.points] == [1, 2, 3, 4, 5, 6, 7]
    assert [point.quality for point in row.points] == pytest.approx([1, 1, 1, 1, 0.9, 0.7, 0.4])
    assert (found.original, found.metric, found.samples, row.units, row.kind) == (1.0, "accuracy", 10, 8, "ffn unit")


def test_each_value_is_the_accuracy_of_the_pruned_model():
    model, x, y = trained()
    graph = traced(model, x)
    found = kirsch.sensitivity(graph, (x, y), fractions=(0.25, 0.5), samples=1000)
    assert [row.name for row in found.rows] == ["0", "2"]
    for row in found.rows:
        for point in row.points:
            plan = kirsch.plan(graph, keep={row.name: row.units - point.removed})
            (removal,) = plan.groups
            assert (removal.name, len(removal.removed)) == (row.name, point.removed)
            assert point.quality == accuracy(kirsch.prune(model, plan), x, y)
    assert found.original == accuracy(model, x, y)
    assert [row.macs for row in found.rows] == [2 * 12 + 12 * 10, 12 * 10 + 10 * 4]


def test_a_group_that_is_everything_loses_everything_and_another_one_nothing():
    """The outputs are those of the first branch; the second one is multiplied by zero."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = one_unit_per_class(spare=0), one_unit_per_class(spare=0)
            with torch.no_grad():
                self.unused[2].weight.zero_()

        def forward(self, x):
            return self.used(x) + self.unused(x)

    inputs, labels = one_hot((1, 3, 3, 3))
    found = kirsch.sensitivity(traced(Branches()), (inputs, labels), fractions=(0.5, 0.75))
    values = {row.name: [point.quality for point in row.points] for row in found.rows}
    assert values == {"used.0": pytest.approx([0.4, 0.1]), "unused.0": [1, 1]}
    assert found.keep(max_drop=0.05) == {"unused.0#1": 1}
    assert found.keep(max_drop=0.6) == {"used.0#1": 2, "unused.0#1": 1}


def test_units_of_attention_and_of_normalized_layers_are_evaluated_as_in_the_pruned_models():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 4
            self.embed, self.norm, self.output = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
            self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
            self.inner, self.outer = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            x = self.norm(self.embed(x))
            parts = (layer(x).view(*x.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value))
            attended = nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
            x = x + self.output(attended.transpose(1, 2).flatten(2))
            return self.outer(self.inner(x).relu())

    model, inputs = Encoder().eval(), torch.randn(6, 5, 16)
    graph = kirsch.trace(model, inputs)
    found = kirsch.sensitivity(graph, inputs, fractions=(0.5,), metric="output_r2")
    assert {"head", "head dim", "ffn unit", "embedding dim"} <= {row.kind for row in found.groups}
    with torch.no_grad():
        expected = model(inputs).reshape(-1, 16)
        for row, (name, width) in zip(found.groups, found.keep(max_drop=1e9).items(), strict=True):
            (point,) = row.points
            plan = kirsch.plan(graph, keep={name: width})
            assert width == row.units - point.removed
            out = kirsch.prune(model, plan)(inputs).reshape(-1, 16)
            spread = ((expected - expected.mean(0)) ** 2).sum()
            assert point.quality == pytest.approx(float(1 - ((out - expected) ** 2).sum() / spread), abs=1e-5)


class Residual(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        set_weights(self.inner, scale * np.roll(np.eye(4), 1, 0))

    def forward(self, x):
        return x + self.inner(x).relu()


def residual_network():
    model = nn.Sequential(Residual(0.0), Residual(5.0), nn.Linear(4, 4))
    set_weights(model[2], np.roll(np.eye(4), -1, 0))
    return model.eval()


def test_residual_blocks_have_a_row_each():
    model = residual_network()
    graph = traced(model)
    assert set(graph.blocks) == {"0", "1"}
    found = kirsch.sensitivity(graph, (INPUTS, LABELS), kinds="block")
    assert {row.name: row.points[0].quality for row in found.blocks} == {"0": 1.0, "1": 0.0}
    assert found.groups == ()
    for row in found.blocks:
        without = pruned_by(model, graph, blocks=[Skip(row.name, "")])
        assert row.points[0].quality == accuracy(without, INPUTS, LABELS)
        assert (row.macs, row.parameters) == (16, 20)
    everything = kirsch.sensitivity(graph, (INPUTS, LABELS), fractions=(0.5,))
    assert everything.blocks == found.blocks
    assert len(everything.groups) == len(graph.groups)
    assert kirsch.sensitivity(graph, (INPUTS, LABELS), kinds="block", exclude="1").blocks == found.blocks[:1]


def test_fractions_are_rounded_to_units_and_one_unit_is_removed_and_one_kept():
    found = kirsch.sensitivity(traced(one_unit_per_class()), (INPUTS, LABELS), fractions=(0.01, 0.02, 0.99))
    (row,) = found.rows
    assert [point.removed for point in row.points] == [1, 7]
    assert [row.at(fraction).removed for fraction in found.fractions] == [1, 1, 7]


def test_without_labels_outputs_are_compared_with_the_original():
    found = kirsch.sensitivity(traced(one_unit_per_class()), INPUTS, fractions=(0.5, 0.625))
    (row,) = found.rows
    assert (found.metric, found.original, row.points[0].quality) == ("kl", 0.0, 0.0)
    # Class 3 has the logits (0, 0, 0, 1) before, and equal logits after, the removal of its unit.
    p = np.exp([0, 0, 0, 1]) / np.exp([0, 0, 0, 1]).sum()
    assert row.points[1].quality == pytest.approx(-(p * np.log(4 * p)).sum() / 10)
    agreement = kirsch.sensitivity(traced(one_unit_per_class()), INPUTS, fractions=(0.625,), metric="agreement")
    assert agreement.rows[0].points[0].quality == pytest.approx(0.9)


def test_the_original_runs_again_if_its_outputs_are_too_large_to_be_kept(monkeypatch):
    graph = traced(one_unit_per_class())
    kept = kirsch.sensitivity(graph, INPUTS, fractions=(0.75,))
    monkeypatch.setattr("kirsch.pruning.quality.MOST_STORED", 0)
    assert kirsch.sensitivity(graph, INPUTS, fractions=(0.75,)) == kept
    assert kept.rows[0].points[0].quality < 0


def test_samples_in_memory_are_spread_over_data_that_is_sorted_by_class():
    inputs, labels = one_hot((100, 100, 100, 100))
    found = kirsch.sensitivity(traced(one_unit_per_class()), (inputs, labels), samples=40, fractions=(0.75,))
    assert found.samples == 40
    assert found.rows[0].points[0].quality == 0.5  # the units of two of four classes remain
    loader = [(inputs[start : start + 30], labels[start : start + 30]) for start in range(0, 400, 30)]
    assert kirsch.sensitivity(traced(one_unit_per_class()), loader, samples=40, fractions=(0.75,)).samples == 40


def test_an_importance_may_use_the_samples():
    """By the activation, the spare units and then those of the weakest classes are the least important."""
    graph = traced(one_unit_per_class())
    found = kirsch.sensitivity(graph, (INPUTS, LABELS), importance="wanda", fractions=(0.5,))
    assert (found.importance, found.rows[0].points[0].quality) == ("wanda", 1.0)

    def all_but_unit_1(_, group):
        return (np.arange(group.size) != 1).astype(float)

    given = kirsch.sensitivity(graph, (INPUTS, LABELS), importance=all_but_unit_1, fractions=(0.125,))
    assert given.rows[0].points[0].quality == pytest.approx(0.7)  # class 1 has 3 of 10 samples


def test_the_result_is_stored_as_json_and_printed():
    found = kirsch.sensitivity(traced(one_unit_per_class()), (INPUTS, LABELS))
    assert kirsch.Sensitivity.from_json(found.to_json()) == found
    assert json.loads(found.to_json()) == found.to_dict()
    lines = str(found).splitlines()
    assert lines[0].endswith("accuracy on 10 samples without training, original 100.0 %; least magnitude removed")
    assert lines[2].split() == ["group", "kind", "units", "MACs", "−10", "%", "−25", "%", "−50", "%", "−75", "%"]
    values = " ".join(lines[3].split())
    assert values == "0 ffn unit 8 100.0 % 100.0 % 100.0 % 100.0 % 70.0 %"
    assert repr(found) == "<kirsch.Sensitivity of Sequential: accuracy of 1 group>"
    content = {name: value for name, value in found.to_dict().items() if name != "rows"}
    with pytest.raises(LoadError, match="rows is missing"):
        kirsch.Sensitivity.from_json(json.dumps(content))


def test_a_pruned_model_that_returns_nan_has_no_value_and_a_reason():
    """Without its unit, the activations of a class sum to zero, by which they are divided."""

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = one_unit_per_class()

        def forward(self, x):
            hidden = self.net[1](self.net[0](x))
            return self.net[2](hidden / hidden.sum(1, keepdim=True))

    found = kirsch.sensitivity(traced(Normalized()), (INPUTS, LABELS), fractions=(0.5, 0.75))
    assert found.rows[0].points[0].quality == 1.0
    assert found.rows[0].points[1].quality is None
    assert found.notes == ["net.0 without 6 units: The pruned model returns NaN."]
    assert found.keep(max_drop=1.0) == {"net.0#1": 4}
    assert kirsch.Sensitivity.from_json(found.to_json()) == found
    assert "–" in str(found)


def test_the_model_and_the_random_state_do_not_change():
    model, x, y = trained()
    model.train()
    before, state = [value.clone() for value in model.state_dict().values()], torch.random.get_rng_state()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)), 50, shuffle=True
    )
    first, second = (kirsch.sensitivity(traced(model, x), data) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(old, new) for old, new in zip(before, model.state_dict().values(), strict=True))


def test_the_progress_counts_the_models(monkeypatch):
    lines = []

    class Screen:
        def start_status(self, draw, *, refresh=True):
            self.draw = draw

        def refresh_status(self):
            lines.append("".join(piece.text for piece in self.draw()))

        def stop_status(self):
            lines.append("stopped")

    monkeypatch.setattr("kirsch.pruning.sensitivity.shown_on", lambda _: Screen())
    kirsch.sensitivity(traced(one_unit_per_class()), (INPUTS, LABELS), progress=True)
    assert [line.split("━")[-1].split()[0] for line in lines[:-1]] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert lines[-1] == "stopped"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractions": (0.5, 1.0)}, UsageError, "`fractions"),
        ({"fractions": ()}, UsageError, "`fractions` is empty"),
        ({"metric": "accurac"}, UnknownNameError, "Did you mean 'accuracy'"),
        ({"data": INPUTS, "metric": "accuracy"}, DataError, "Batch 1 of `data` has no labels"),
        ({"importance": "magnitud"}, UnknownNameError, "Did you mean 'magnitude'"),
        ({"kinds": "heads"}, UnknownNameError, "heads"),
        ({"kinds": "head"}, UsageError, "has no units or residual blocks to measure"),
        ({"exclude": "layer9"}, UnknownNameError, "layer9"),
        ({"data": iter([(INPUTS, LABELS)])}, UsageError, "iterated over only once"),
        ({"samples": 0}, UsageError, "`samples"),
        ({"class_weights": {0: 2.0}, "metric": "kl"}, UsageError, "`class_weights` has no effect"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    values = {"data": (INPUTS, LABELS), **options}
    with pytest.raises(error, match=message):
        kirsch.sensitivity(traced(one_unit_per_class()), **values)


def test_a_step_records_the_sensitivity_and_the_report_shows_it(tmp_path):
    part = (INPUTS, LABELS)
    data = kirsch.DataSet("classes", train=part, validation=part, test=part, classes=tuple("abcd"))
    steps = [MeasureSensitivity(fractions=(0.5, 0.75)), Prune(max_drop=0.1, round_to=1)]
    run = kirsch.compress(one_unit_per_class(), data, steps=steps, folder=tmp_path / "run", listen=lambda _: None)
    expected = kirsch.sensitivity(traced(one_unit_per_class()), part, fractions=(0.5, 0.75))
    (item,) = run.metrics["sensitivities"]
    assert item == {"step": "sensitivity", "analysis": expected.to_dict()}
    stored = tmp_path / "run" / "checkpoints" / "sensitivity" / "done" / "sensitivity.json"
    assert kirsch.Sensitivity.from_json(stored.read_text()) == expected
    assert read_metrics(run.folder / "metrics.json") == run.metrics
    report = run.report.read_text()
    assert "accuracy over the fraction of removed units" in report
    assert '<td>0</td><td>ffn unit</td><td class="n">8</td><td class="n">6</td><td class="n">70.0 %</td>' in report
