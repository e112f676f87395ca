"""The step `sparsify` in a recipe: zeros through repeated steps, resuming, export and the final model."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("options", ["round_to: 1", "round_to: 1, compensate: bias"])
def test_a_later_prune_step_keeps_the_zeros_and_does_not_count_the_masks(tmp_path, options):
    """The plan is that of the model without masks, and an interrupted run ends with the same model."""
    from kirsch.recipes.recipe import read_recipe
    from kirsch.recipes.runner import resume
    from kirsch.recipes.runner import run as run_recipe

    head = RECIPE_STEPS.partition("- recover")[0]
    prune = f"- prune: {{goal: {{macs: 0.6}}, {options}}}\n"
    text = f"{head}{prune}- recover: {{epochs: 1, learning_rate: 0.02}}\ngoal: {{max_drop: 0.9}}\n"
    (tmp_path / "whole").mkdir()
    whole, _ = run(tmp_path / "whole", text)
    plan = kirsch.Plan.read(tmp_path / "whole" / "run" / "plan.json")
    models = {model["key"]: model for model in whole.metrics["models"]}
    assert plan.before.parameters == models["teacher"]["parameters"]
    assert plan.after.parameters == models["pruned"]["parameters"] < plan.before.parameters
    found = zeros(whole.model)
    assert sum(int(part.sum()) for part in found.values()) > 0.3 * sum(part.numel() for part in found.values())

    base, events = tmp_path / "parts", []
    base.mkdir()
    (base / "nets.py").write_text(NETS)
    (base / "recipe.yaml").write_text(text)

    def stop():
        last = [event for event in events if event["event"] == "epoch" and event["step"] == "recover"]
        return Interrupted("asked") if last else None

    with pytest.raises(Interrupted):
        run_recipe(read_recipe(base / "recipe.yaml", ()), base / "run", base=base, listen=events.append, stop=stop)
    resumed = resume(base / "run", listen=lambda _event: None)
    for (name, value), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(value, other), name
