"""Plans with a largest measured drop: compared with an exhaustive search, and with networks of known quality."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.cli import main
from kirsch.errors import DataError, GoalError, UnknownNameError, UsageError
from kirsch.pruning.max_drop import RESOLUTION
from kirsch.steps import Prune
from measured_networks import accuracy, one_hot, one_unit_per_class, trained

INPUTS, LABELS = one_hot()


def traced(model, inputs=INPUTS):
    return kirsch.trace(model, torch.tensor(inputs[:1]))


def widths(plan):
    return {group.name: group.size - len(group.removed) for group in plan.groups}


def fraction(plan, cost="macs"):
    return getattr(plan.after, cost) / getattr(plan.before, cost)


@pytest.mark.parametrize(("max_drop", "kept"), [(0.0, 4), (0.1, 3), (0.29, 3), (0.3, 2), (0.6, 1)])
def test_the_smallest_width_inside_the_limit_is_found(max_drop, kept):
    """The classes have 4, 3, 2 and 1 of 10 samples, and the units of classes 3, 2 and 1 are removed in this order."""
    graph = traced(one_unit_per_class())
    plan = kirsch.plan(graph, max_drop=max_drop, data=(INPUTS, LABELS), round_to=1)
    assert widths(plan) == {"0": kept}
    assert plan.goal == {}


@pytest.mark.parametrize("minimize", ["macs", "parameters"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_plan_is_as_small_as_by_an_exhaustive_search_over_the_goal(seed, minimize):
    model, x, y = trained(seed)
    graph = traced(model, x)
    whole = accuracy(model, x, y)
    inside, outside = {}, {}  # goal → cost
    for goal in np.arange(0.1, 1, 0.005).tolist():
        plan = kirsch.plan(graph, kirsch.Goal(**{minimize: goal}), round_to=1)
        drop = whole - accuracy(kirsch.prune(model, plan, verify=False), x, y)
        (inside if drop <= 0.05 else outside)[goal] = fraction(plan, minimize)
    found = kirsch.plan(graph, max_drop=0.05, validation=(x, y), round_to=1, minimize=minimize)
    assert whole - accuracy(kirsch.prune(model, found), x, y) <= 0.05
    reached, step = fraction(found, minimize), 0.005 + 1e-9
    assert min(abs(reached - cost) for cost in inside.values()) < RESOLUTION
    # A goal just below the result is outside of the limit. It is the only such edge if the drop grows with the removal.
    assert any(reached - RESOLUTION - step <= goal <= reached for goal in outside)
    if max(outside.values()) < min(inside.values()):
        assert reached == pytest.approx(min(inside.values()), abs=RESOLUTION)


def test_the_measured_drops_are_those_of_the_pruned_models_and_are_in_the_plan():
    model, x, y = trained()
    graph = traced(model, x)
    plan = kirsch.plan(graph, max_drop=0.05, data=(x, y), round_to=1)
    measured = plan.method["measured"]
    assert [set(point) for point in measured] == [{"macs", "quality", "drop"}] * len(measured)
    own = next(point for point in measured if abs(point["macs"] - fraction(plan)) < 1e-5)
    assert own["quality"] == pytest.approx(accuracy(kirsch.prune(model, plan), x, y))
    assert own["drop"] == pytest.approx(accuracy(model, x, y) - own["quality"])
    assert all(point["drop"] > 0.05 for point in measured if point["macs"] < own["macs"] - 1e-5)
    (note,) = (text for text in plan.notes if text.startswith("max_drop="))
    assert "on 400 samples without training, a drop of" in note
    assert "95 % interval" in note
    assert f"{100 * measured[-1]['macs']:.1f} %: {100 * measured[-1]['drop']:.1f} points" in note
    assert len(measured) <= 1 + int(np.ceil(np.log2(1 / RESOLUTION)))


def test_the_plan_is_stored_with_its_measurements_and_they_survive_the_pruning():
    model = one_unit_per_class()
    plan = kirsch.plan(traced(model), max_drop=0.1, data=(INPUTS, LABELS), round_to=1)
    assert kirsch.Plan.from_json(plan.to_json()) == plan
    pruned = kirsch.prune_with_verification(model, kirsch.Plan.from_json(plan.to_json()))
    assert any(text.startswith("max_drop=0.1: accuracy 100.0 % → 90.0 %") for text in pruned.notes)


def test_with_a_goal_the_plan_is_that_of_the_goal_if_it_is_inside_the_limit():
    graph, goal = traced(one_unit_per_class()), kirsch.Goal(macs=0.4)
    plain = kirsch.plan(graph, goal, round_to=1)
    plan = kirsch.plan(graph, goal, round_to=1, max_drop=0.1, data=(INPUTS, LABELS))
    assert (plan.groups, plan.goal) == (plain.groups, {"macs": 0.4})
    assert len(plan.method["measured"]) == 1
    with pytest.raises(GoalError) as found:
        kirsch.plan(graph, goal, round_to=1, max_drop=0.05, data=(INPUTS, LABELS))
    assert "macs=0.4 and max_drop=0.05 cannot both be met: the plan for the goal has a drop of 10.0 points" in str(
        found.value
    )
    assert "The smallest model that was found inside the limit has 50.0 % of the MACs" in str(found.value)
    assert "Raise the goal to macs=0.5, or raise max_drop to 0.1" in str(found.value)


def test_no_plan_inside_the_limit_is_an_error_with_the_largest_measured_model():
    inputs, labels = one_hot((1, 1, 1, 1))
    graph = traced(one_unit_per_class(spare=0))
    with pytest.raises(GoalError, match=r"max_drop=0\.1\..*75\.0 % of the MACs, and has a drop of 25\.0 points"):
        kirsch.plan(graph, max_drop=0.1, data=(inputs, labels), round_to=1)


def test_class_weights_without_effect_are_refused():
    graph = traced(one_unit_per_class())
    with pytest.raises(UsageError, match=r"names the class 7\..*has the classes 0 to 3"):
        kirsch.plan(graph, max_drop=0.1, data=(INPUTS, LABELS), round_to=1, class_weights={7: 2.0})
    few = LABELS < 2
    with pytest.raises(UsageError, match=r"`class_weights` has no effect: no label of `data` .*The labels are 0, 1"):
        kirsch.plan(graph, max_drop=0.1, data=(INPUTS[few], LABELS[few]), round_to=1, class_weights={3: 2.0})


def test_the_error_for_missing_labels_names_the_batch_once():
    graph = traced(one_unit_per_class())
    with pytest.raises(DataError) as raised:
        kirsch.plan(graph, max_drop=0.1, validation=[INPUTS], metric="accuracy", data=None)
    assert raised.value.what == "Batch 1 of `validation` has no labels."


def test_class_weights_keep_the_unit_of_a_heavy_class():
    """Class 3 has one of ten samples. With weight 7 it is 7/10 of the weighted accuracy, whose other recalls are 1."""
    graph = traced(one_unit_per_class())
    options = {"data": (INPUTS, LABELS), "round_to": 1, "max_drop": 0.3}
    assert widths(kirsch.plan(graph, **options)) == {"0": 2}
    heavy = kirsch.plan(graph, **options, class_weights={3: 7.0})
    assert widths(heavy) == {"0": 4}
    assert heavy.method["metric"] == "weighted accuracy"
    options["max_drop"] = 0.05
    assert widths(kirsch.plan(graph, **options)) == {"0": 4}
    assert widths(kirsch.plan(graph, **options, class_weights={3: 0.0, 2: 0.0})) == {"0": 2}


def test_a_function_and_the_outputs_of_the_original_may_be_the_metric():
    model = one_unit_per_class()
    graph = traced(model)

    def recall_of_class_3(outputs, labels):
        return (outputs.argmax(1) == labels)[labels == 3].mean()

    plan = kirsch.plan(graph, max_drop=0.5, data=(INPUTS, LABELS), metric=recall_of_class_3, round_to=1)
    assert widths(plan) == {"0": 4}
    unlabeled = kirsch.plan(graph, max_drop=0.3, data=INPUTS, metric="agreement", round_to=1)
    assert widths(unlabeled) == {"0": 2}
    exact = kirsch.plan(graph, max_drop=0.0, data=INPUTS, round_to=1)
    assert (widths(exact), exact.method["metric"]) == ({"0": 4}, "kl")


def test_widths_by_hand_are_kept():
    model, x, y = trained()
    plan = kirsch.plan(traced(model, x), max_drop=0.2, data=(x, y), keep={"0": 12}, round_to=1)
    assert "0" not in widths(plan)
    assert widths(plan)["2"] < 10


def test_residual_blocks_are_removed_as_long_as_the_drop_is_inside():
    class Block(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            nn.init.zeros_(self.inner.bias)
            nn.init.constant_(self.inner.weight, 0.0)
            with torch.no_grad():
                self.inner.weight += scale * torch.roll(torch.eye(4), 1, 0)

        def forward(self, x):
            return x + self.inner(x).relu()

    model = nn.Sequential(Block(0.01), Block(0.02), Block(5.0), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[3].weight.copy_(torch.eye(4))
        model[3].bias.zero_()
    inputs = INPUTS
    plan = kirsch.plan(traced(model), max_drop=0.0, kinds="block", data=inputs, metric="agreement")
    assert set(plan.without) == {"0", "1"}  # without the block 2, the class of each sample changes


def test_the_random_state_and_the_model_do_not_change():
    model, x, y = trained()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)), 50, shuffle=True
    )
    before, state = [value.clone() for value in model.state_dict().values()], torch.random.get_rng_state()
    first, second = (kirsch.plan(traced(model, x), max_drop=0.05, validation=data, round_to=1) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(old, new) for old, new in zip(before, model.state_dict().values(), strict=True))


def test_data_that_differs_between_passes_is_refused():
    numbers = itertools.count()

    class Changing:
        def __iter__(self):
            yield INPUTS + 0.001 * next(numbers), LABELS

    with pytest.raises(DataError, match="`data` gives other samples each time"):
        kirsch.plan(traced(one_unit_per_class()), max_drop=0.1, data=Changing(), round_to=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_drop": 0.1}, UsageError, "`max_drop` needs samples on which the drop is measured. Give validation="),
        ({"max_drop": 1.0, "data": (INPUTS, LABELS)}, UsageError, "`max_drop`"),
        ({"max_drop": 0.1, "data": INPUTS, "metric": "accuracy"}, DataError, "has no labels. The metric 'accuracy'"),
        ({"max_drop": 0.1, "data": (INPUTS, LABELS), "metric": "accurac"}, UnknownNameError, "Did you mean 'accuracy'"),
        ({"max_drop": 0.1, "data": iter([(INPUTS, LABELS)])}, UsageError, "iterated over only once"),
        ({"max_drop": 0.1, "data": []}, DataError, "`data` has no batches"),
        ({"max_drop": 0.1, "validation": (INPUTS, LABELS + 1)}, DataError, "A label is 4"),
        ({"max_drop": 0.1, "data": (INPUTS, LABELS), "minimize": "macs", "goal": kirsch.Goal(macs=0.5)}, UsageError,
         "`minimize` has no effect with a goal"),
        ({"goal": kirsch.Goal(macs=0.5), "metric": "r2"}, UsageError, "`metric` has no effect without `max_drop`"),
        ({"goal": kirsch.Goal(macs=0.5), "validation": (INPUTS, LABELS)}, UsageError, "`validation` of kirsch.plan"),
        ({"max_drop": 0.1, "data": (INPUTS, LABELS), "importance": "fpgm", "validation": (INPUTS, LABELS)}, UsageError,
         "`data` of kirsch.plan has no effect"),
        ({}, UsageError, "The goal is missing"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kirsch.plan(traced(one_unit_per_class()), **options)


def labeled_part(repeats):
    inputs, labels = one_hot(tuple(repeats * count for count in (4, 3, 2, 1)))
    return inputs, labels


def test_a_step_of_a_job_measures_the_drop_on_the_validation_part(tmp_path):
    data = kirsch.DataSet(
        "classes", train=labeled_part(2), validation=labeled_part(1), test=labeled_part(3), classes=tuple("abcd")
    )
    run = kirsch.compress(
        one_unit_per_class(),
        data,
        steps=[
            Prune(max_drop=0.1, importance="magnitude", round_to=1),
            Prune(max_drop=0.3, importance="magnitude", class_weights={"c": 0.0}, round_to=1),
        ],
        folder=tmp_path / "run",
        listen=lambda _: None,
    )
    kept = [layer["after"] for removal in run.metrics["removals"] for layer in removal["layers"]]
    assert kept == [3, 2]
    first, second = (plan["method"] for plan in run.metrics["provenance"]["plans"])
    assert (first["metric"], second["metric"]) == ("accuracy", "weighted accuracy")
    notes = run.metrics["removals"][0]["notes"]
    assert any(note.startswith("max_drop=0.1: ") and "on 10 samples" in note for note in notes)


def test_the_preview_of_a_step_refuses_labels_that_do_not_fit(tmp_path):
    part = (INPUTS, LABELS)
    data = kirsch.DataSet("classes", train=part, validation=part, test=part)
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        kirsch.compress(
            one_unit_per_class(), data, steps=[Prune(max_drop=0.1, metric="accurac")], folder=tmp_path / "run"
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_command_line_measures_on_the_validation_part_of_the_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "nets.py").write_text(
        "import kirsch\n"
        "from measured_networks import one_hot, one_unit_per_class\n"
        "def model():\n    net = one_unit_per_class()\n    net.example_shape = (1, 4)\n    return net\n"
        "def data():\n    part = one_hot()\n"
        "    return kirsch.DataSet('classes', train=part, validation=part, test=part, classes=tuple('abcd'))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--max-drop", "0.3", "--round-to", "1", "--data", "nets.py:data", "--json"]
    assert main(["plan", "nets.py:model", *options]) == 0
    assert '"quality": 0.7' in capsys.readouterr().out
    assert main(["plan", "nets.py:model", *options, "--class-weights", "d=7"]) == 0
    assert '"metric": "weighted accuracy"' in capsys.readouterr().out
    assert main(["plan", "nets.py:model", "--max-drop", "0.3"]) == 2
    assert "--data SOURCE" in capsys.readouterr().err
