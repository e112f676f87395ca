"""The step `sparsify` in a recipe: zeros through repeated steps, resuming, export and the final model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kirsch
from kirsch.errors import Interrupted, UsageError
from kirsch.frameworks.find import pytorch
from tiny import NETS

RECIPE_STEPS = """
name: sparse
data: {source: "nets.py:stripes", batch_size: 16}
teacher: {model: "nets.py:teacher"}
steps:
- train: {epochs: 3, learning_rate: 0.02, optimizer: adamw}
- sparsify: {sparsity: 0.5}
- recover: {epochs: 1, learning_rate: 0.02}
- sparsify: {sparsity: 0.8, importance: wanda}
- recover: {epochs: 2, learning_rate: 0.02, weight_decay: 0.1}
- export
goal: {max_drop: 0.9}
"""


def run(folder, text=RECIPE_STEPS, **options):
    from kirsch.recipes.recipe import read_recipe
    from kirsch.recipes.runner import run as run_recipe

    (folder / "nets.py").write_text(NETS)
    (folder / "recipe.yaml").write_text(text)
    events = []
    outcome = run_recipe(
        read_recipe(folder / "recipe.yaml", ()), folder / "run", base=folder, listen=events.append, **options
    )
    return outcome, events


def zeros(model):
    return {name: (value == 0) for name, value in model.named_parameters() if value.dim() > 1}


def test_zeros_are_kept_by_later_steps_and_an_interrupted_run_ends_with_the_same_model(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, events = run(tmp_path / "whole")
    assert [event["key"] for event in events if event["event"] == "step_end"] == [
        "train",
        "sparsify",
        "recover",
        "sparsify-2",
        "recover-2",
        "export",
    ]
    assert pytorch().masking.masks(whole.model) == {}  # the final model is folded
    found = zeros(whole.model)
    share = sum(int(part.sum()) for part in found.values()) / sum(part.numel() for part in found.values())
    assert share == pytest.approx(0.8, abs=0.02)
    models = {model["key"]: model for model in whole.metrics["models"]}
    assert models["recovered-2"]["parameters"] == models["teacher"]["parameters"]
    assert abs(models["recovered-2"]["bytes"] - models["teacher"]["bytes"]) < 3000  # names of masks, not masks

    (tmp_path / "parts").mkdir()
    stopped = []

    def stop():
        in_second = [e for e in stopped if e["event"] == "epoch" and e["step"] == "recover-2"]
        return Interrupted("asked") if in_second else None

    from kirsch.recipes.recipe import read_recipe
    from kirsch.recipes.runner import resume
    from kirsch.recipes.runner import run as run_recipe

    base = tmp_path / "parts"
    (base / "nets.py").write_text(NETS)
    (base / "recipe.yaml").write_text(RECIPE_STEPS)
    with pytest.raises(Interrupted):
        run_recipe(read_recipe(base / "recipe.yaml", ()), base / "run", base=base, listen=stopped.append, stop=stop)
    resumed = resume(base / "run", listen=lambda _event: None)
    for (name, value), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_wrong_option_is_refused_before_any_training(tmp_path):
    model, data = kirsch_data()
    with pytest.raises(UsageError, match=r"`exclude` names the layer 'hed'|matches no layer"):
        kirsch.compress(
            model,
            data,
            steps=[kirsch.steps.Sparsify(sparsity=0.5, exclude="hed"), kirsch.steps.Recover(epochs=1)],
            folder=tmp_path / "run",
            progress=False,
        )
    with pytest.raises(UsageError, match="`sparsity` is missing"):
        kirsch.steps.Sparsify()


def kirsch_data():
    torch.manual_seed(0)
    inputs, labels = torch.randn(48, 5), torch.arange(48) % 3
    split = kirsch.Split((inputs + labels[:, None]).numpy(), labels.numpy())
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    return model, kirsch.DataSet("data", split, split, split, classes=("a", "b", "c"))


def test_masks_do_not_count_for_a_goal_on_the_size(tmp_path):
    steps = "- prune: {goal: {size: 0.6}, round_to: 1}\n- sparsify: {sparsity: 0.5}\ngoal: {size: 0.6}\n"
    outcome, _ = run(tmp_path, RECIPE_STEPS.partition("- sparsify")[0] + steps)
    sizes = {model["key"]: model["size"] for model in outcome.metrics["models"] if "size" in model}
    assert sizes["sparsified"] == sizes["pruned"]


def hidden_layers():
    """Return a trained network with two hidden layers, of which the second has some weights that are zero."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3)]
    model, split = torch.nn.Sequential(*layers), kirsch_data()[1].train
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(split.inputs)), torch.from_numpy(split.labels))
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight[:, :3] = 0
    return model


def masks_without_removed_units(run):
    """Return the masks of the step sparsify of a run, cut by its plan in closed form."""
    stored = load_file(run / "checkpoints" / "sparsify" / "done" / "weights.safetensors")
    masks = {layer: stored[f"{layer}.parametrizations.weight.0.zeros"] == 0 for layer in "024"}
    removed = {group.name: group.removed for group in kirsch.Plan.read(run / "plan.json").groups}
    assert removed.keys() == {"0", "2"}  # the names of the groups of the model without masks
    first, second = (np.delete(np.arange(12), removed[layer]) for layer in "02")
    return {"0": masks["0"][first], "2": masks["2"][second][:, first], "4": masks["4"][:, second]}


@pytest.mark.parametrize("compensate", [None, "bias"])
def test_a_later_prune_step_cuts_the_masks_with_the_weights_and_holds_them(tmp_path, compensate):
    """An interrupted run ends with the same model."""
    _, data = kirsch_data()
    goal = kirsch.Goal(macs=0.6)
    steps = [
        kirsch.steps.Sparsify(sparsity=0.4, importance="random"),
        kirsch.steps.Prune(goal=goal, importance="magnitude", ranking="local", round_to=1, compensate=compensate),
        kirsch.steps.Recover(epochs=20, learning_rate=0.02),
    ]
    folder = tmp_path / "run"
    found = kirsch.compress(hidden_layers(), data, steps=steps, folder=folder, progress=False)
    masks = masks_without_removed_units(folder)
    pruned = load_file(folder / "checkpoints" / "prune" / "done" / "model" / "model.safetensors")
    for layer, mask in masks.items():
        assert not pruned[f"{layer}.weight"][~mask].any()
        assert torch.equal(found.model[int(layer)].weight != 0, mask)  # a kept weight that was zero is trained
    shutil.rmtree(folder / "checkpoints" / "recover")
    again = kirsch.compress(hidden_layers(), data, steps=steps, folder=folder, progress=False)
    for (name, value), (_, other) in zip(found.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_the_plan_of_a_later_prune_step_is_that_of_the_model_without_masks(tmp_path, importance):
    _, data = kirsch_data()
    goal = kirsch.Goal(macs=0.6)
    steps = [
        kirsch.steps.Sparsify(sparsity=0.4),
        kirsch.steps.MeasureSensitivity(fractions=[0.5], importance=importance),
        kirsch.steps.Prune(goal=goal, importance=importance, round_to=1),
    ]
    folder = tmp_path / "run"
    kirsch.compress(hidden_layers(), data, steps=steps, folder=folder, progress=False)
    plain = kirsch.fold_masks(kirsch.sparsify(hidden_layers(), sparsity=0.4).model)
    samples = (data.train.inputs, data.train.labels)
    graph = kirsch.trace(plain, torch.from_numpy(data.train.inputs[:1]))
    options = {"data": samples} if importance == "taylor" else {}
    expected = kirsch.plan(graph, goal, importance=importance, round_to=1, **options)
    found = kirsch.Plan.read(folder / "plan.json")
    assert found.groups == expected.groups
    assert (found.before, found.after) == (expected.before, expected.after)
    stored = kirsch.Sensitivity.from_json((folder / "checkpoints/sensitivity/done/sensitivity.json").read_text())
    assert {row.name for row in stored.rows} == {"0", "2"}


def test_a_later_prune_step_says_that_a_pattern_is_lost(tmp_path):
    _, data = kirsch_data()
    prune = kirsch.steps.Prune(goal=kirsch.Goal(macs=0.6), round_to=1)
    steps = [kirsch.steps.Sparsify(pattern="2:4", exclude="0"), prune]
    kirsch.compress(hidden_layers(), data, steps=steps, folder=tmp_path / "run", progress=False)
    record = json.loads((tmp_path / "run" / "checkpoints" / "prune" / "done" / "record.json").read_text())
    assert any("no longer have the pattern 2:4" in note for note in record["notes"])


def test_least_squares_after_a_step_sparsify_is_refused_before_any_work(tmp_path):
    _, data = kirsch_data()
    prune = kirsch.steps.Prune(goal=kirsch.Goal(macs=0.6), compensate="least_squares")
    steps = [kirsch.steps.Sparsify(sparsity=0.4), prune]
    with pytest.raises(UsageError, match=r"The step 'prune' cannot compensate with 'least_squares'\..*'batch_norm'"):
        kirsch.compress(hidden_layers(), data, steps=steps, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
