"""Iterative pruning: prune, recover, prune, recover in one recipe."""

from __future__ import annotations

import json
import shutil

import pytest

import kirsch
from kirsch.errors import Interrupted
from kirsch.frameworks.find import framework_of
from kirsch.recipes import integrity, manifest
from kirsch.recipes.forecast import forecast
from kirsch.recipes.models import build
from kirsch.recipes.runner import materials_of, resume
from tiny import flip_bit, same_weights

RECIPE = """
name: iterative
data: {source: "nets.py:stripes", batch_size: 16}
teacher: {model: "nets.py:teacher"}
steps:
- train: {epochs: 4, learning_rate: 0.02, optimizer: adamw}
- prune: {goal: {macs: 0.8}, round_to: 1}
- recover: {epochs: 1, learning_rate: 0.02}
- prune: {goal: {macs: 0.7}, round_to: 1}
- recover: {epochs: 2, learning_rate: 0.02}
- export
goal: {macs: 0.6, max_drop: 0.9}
"""

STEPS = ["train", "prune", "recover", "prune-2", "recover-2", "export"]
WEIGHTS = "artifacts/model/model.safetensors"


@pytest.fixture(scope="module")
def iterative(new_job):
    """Finished run, which tests must not change."""
    job = new_job()
    (job.base / "recipe.yaml").write_text(RECIPE)
    return job, job.run_recipe()


@pytest.fixture
def done(iterative, tmp_path):
    """Copy of the finished run that a test may change."""
    shutil.copytree(iterative[0].base, tmp_path, dirs_exist_ok=True)
    return type(iterative[0])(tmp_path)


@pytest.fixture
def fresh(done):
    """The recipe and its models, not run yet."""
    shutil.rmtree(done.folder)
    return done


def in_second_recovery(job, epochs=1):
    """Ask the run to stop after some epochs of the second step `recover`."""

    def stop():
        events = [event for event in job.events if event["event"] == "epoch" and event["step"] == "recover-2"]
        return Interrupted("asked") if len(events) >= epochs else None

    return stop


def test_each_prune_step_starts_from_the_model_of_the_step_before(iterative):
    job, outcome = iterative
    assert job.steps("step_end") == STEPS
    models = {model["key"]: model for model in outcome.metrics["models"]}
    assert list(models) == ["teacher", "pruned", "recovered", "pruned-2", "recovered-2", "exported"]
    plans = outcome.metrics["provenance"]["plans"]
    assert plans == [json.loads((job.folder / name).read_text()) for name in ("plan.json", "plan-2.json")]
    costs = [(plan["cost"]["before"]["macs"], plan["cost"]["after"]["macs"]) for plan in plans]
    assert costs == [
        (models["teacher"]["macs"], models["pruned"]["macs"]),
        (models["pruned"]["macs"], models["pruned-2"]["macs"]),
    ]
    assert costs[0][1] <= 0.8 * costs[0][0]
    assert costs[1][1] <= 0.7 * costs[1][0]
    assert [curve["step"] for curve in outcome.metrics["curves"]] == ["train", "recover", "recover-2"]


def test_goals_of_both_prune_steps_and_of_the_job_are_checked(iterative):
    _, outcome = iterative
    macs = {model["key"]: model["macs"] for model in outcome.metrics["models"]}
    items = {item["name"]: item for item in outcome.metrics["goal"]["items"]}
    found = [(item["name"], item["value"], item["limit"]) for item in outcome.metrics["goal"]["items"][:3]]
    assert found == [
        ("prune.macs", macs["pruned"] / macs["teacher"], 0.8),
        ("prune-2.macs", macs["pruned-2"] / macs["pruned"], 0.7),
        ("macs", macs["exported"] / macs["teacher"], 0.6),
    ]
    assert items["prune-2.macs"]["text"].startswith("prune-2: MACs ")
    assert outcome.exit_code == 0


def test_metrics_and_report_show_both_prune_steps(iterative):
    job, outcome = iterative
    removals = outcome.metrics["removals"]
    assert [removal["step"] for removal in removals] == ["prune", "prune-2"]
    assert all(removal["verification"]["passed"] for removal in removals)
    for first, second in zip(removals[0]["layers"], removals[1]["layers"], strict=True):
        assert first["name"] == second["name"]
        assert first["after"] == second["before"]
    counts = [sum(len(group["removed"]) for group in removal["groups"]) for removal in removals]
    assert min(counts) > 0
    page = (job.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<h2>Removed units: prune</h2>") == page.count("<h2>Removed units: prune-2</h2>") == 1
    assert page.count("<summary>Plan 2</summary>") == 1


def test_final_model_is_loaded_from_the_artifacts(iterative):
    job, outcome = iterative
    loaded = kirsch.load(job.folder / "artifacts" / "model", lambda: build("nets.py:teacher", base=job.base))
    assert same_weights(loaded, outcome.model)
    analysis, inference = framework_of(loaded).analysis, framework_of(loaded).inference
    example = materials_of(job.recipe(), job.base).data.test.inputs[:1]
    parameters, macs = analysis.count(loaded, inference.from_numpy(example))
    final = outcome.metrics["models"][-1]
    assert (parameters, macs) == (final["parameters"], final["macs"])


def test_forecast_makes_a_plan_for_both_prune_steps(iterative, fresh):
    found = forecast(fresh.recipe("train=null"), base=fresh.base, folder=fresh.folder)
    assert list(found["plans"]) == ["prune", "prune-2"]
    before, after = found["plans"]["prune"]["cost"], found["plans"]["prune-2"]["cost"]
    assert before["after"] == after["before"]
    assert sorted(path.name for path in fresh.folder.iterdir()) == ["plan-2.json", "plan.json", "recipe.yaml"]


def test_run_may_use_the_folder_of_its_dry_run(fresh):
    forecast(fresh.recipe(), base=fresh.base, folder=fresh.folder)
    with pytest.raises(Interrupted):
        fresh.run_recipe(stop=lambda: Interrupted("asked"))
    assert (fresh.folder / "run.json").is_file()


def test_run_interrupted_in_the_second_recovery_equals_the_uninterrupted_run_bit_for_bit(iterative, fresh):
    with pytest.raises(Interrupted):
        fresh.run_recipe(stop=in_second_recovery(fresh))
    assert fresh.steps("step_end") == STEPS[:4]
    found = integrity.check(fresh.folder)
    assert (found.problems, found.done) == ([], STEPS[:4])
    assert "plan-2.json" in found.uncovered
    fresh.events.clear()
    outcome = resume(fresh.folder, listen=fresh.events.append)
    assert fresh.steps("step_kept") == STEPS[:4]
    assert fresh.steps("step_end") == STEPS[4:]
    assert [event["epoch"] for event in fresh.events if event["event"] == "epoch"] == [2]
    job, uninterrupted = iterative
    assert same_weights(outcome.model, uninterrupted.model)
    for name in (WEIGHTS, "artifacts/model/plan.2.json", "plan.json", "plan-2.json"):
        assert (fresh.folder / name).read_bytes() == (job.folder / name).read_bytes()
    assert integrity.check(fresh.folder).problems == []


def test_finished_steps_are_kept(done, iterative):
    outcome = done.run_recipe()
    assert done.steps("step_kept") == STEPS
    assert same_weights(outcome.model, iterative[1].model)


def test_changed_step_is_run_again_with_the_steps_after_it(done):
    recipe = done.recipe("recover-2.epochs=1")
    (done.folder / "recipe.yaml").write_text(recipe.to_yaml())
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_kept") == STEPS[:4]
    assert done.steps("step_end") == STEPS[4:]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", [flip_bit, lambda path: path.write_text("{}"), lambda path: path.unlink()])
def test_changed_second_plan_is_found_and_restored(done, damage, finished):
    if not finished:
        manifest.remove(done.folder)
    path = done.folder / "plan-2.json"
    before = path.read_bytes()
    damage(path)
    (problem,) = integrity.check(done.folder).problems
    assert str(path) in problem
    resume(done.folder, listen=done.events.append)
    assert path.read_bytes() == before
    assert integrity.check(done.folder).problems == []


def test_second_prune_step_is_run_again_if_its_model_is_damaged(done):
    flip_bit(done.folder / "checkpoints" / "prune-2" / "done" / "model" / "model.safetensors")
    before = (done.folder / WEIGHTS).read_bytes()
    resume(done.folder, listen=done.events.append)
    assert done.steps("step_start") == ["prune-2"]
    assert (done.folder / WEIGHTS).read_bytes() == before
