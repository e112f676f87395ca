"""Goals of a job and of its steps on the bytes of the weights and the peak memory of the activations."""

from __future__ import annotations

import json

import pytest
import torch

import kirsch
from kirsch.cli.jobs import forecast_lines
from kirsch.errors import GoalError, UsageError
from kirsch.graph.cost_names import WORDS
from kirsch.jobs.goal import JobGoal
from kirsch.recipes.forecast import forecast
from kirsch.recipes.runner import materials_of
from kirsch.steps import Prune
from kirsch.tables import plain

ONLY_PRUNED = ("student=null", "distill=null", "recover=null", "measure=null", "prune.round_to=1")


def traced(model, data):
    return kirsch.trace(model, torch.as_tensor(data.test.inputs[:1])).cost


def test_a_job_can_limit_each_cost_of_a_plan():
    for name in WORDS:
        assert JobGoal(**{name: 0.5}).cost == kirsch.Goal(**{name: 0.5})
    assert JobGoal(max_drop=0.1).cost is None


@pytest.fixture(scope="module")
def limited(new_job):
    """Finished run with limits of size and memory, which tests must not change."""
    job = new_job()
    goal = "goal={size: 0.6, memory: 0.7, max_drop: 0.9}"
    return job, job.run_recipe(*ONLY_PRUNED, "prune.goal=null", goal)


def test_the_final_model_of_a_job_is_compared_with_its_first_model(limited):
    job, outcome = limited
    materials = materials_of(job.recipe(), job.base)
    first, final = (traced(model, materials.data) for model in (materials.make_teacher(), outcome.model))
    items = {item["name"]: item for item in outcome.metrics["goal"]["items"]}
    assert items["size"]["value"] == final.size / first.size <= 0.6
    assert items["memory"]["value"] == final.memory / first.memory <= 0.7
    assert items["size"]["text"].startswith("bytes of the weights ")
    assert items["memory"]["text"].startswith("bytes of the activations ")
    assert outcome.exit_code == 0


def test_metrics_and_report_show_the_limited_costs_of_each_model(limited):
    job, outcome = limited
    models = {model["key"]: model for model in outcome.metrics["models"]}
    assert models["pruned"]["size"] == models["exported"]["size"] < models["teacher"]["size"]
    assert models["pruned"]["memory"] == models["exported"]["memory"] < models["teacher"]["memory"]
    assert models["exported"]["bytes"] > models["exported"]["size"]  # the file has the computation, too
    page = (job.folder / "report.html").read_text(encoding="utf-8")
    assert '<th class="n">weights</th><th class="n">peak memory</th>' in page


def test_costs_without_a_limit_are_neither_counted_nor_shown(finished):
    job, outcome = finished
    assert all("memory" not in model and "size" not in model for model in outcome.metrics["models"])
    assert '<th class="n">peak memory</th>' not in (job.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["size", "memory"])
def test_a_step_can_limit_the_cost_of_its_result(job, name):
    outcome = job.run_recipe(*ONLY_PRUNED, f"prune.goal={{{name}: 0.6}}", "goal={}", "export=null")
    (item,) = outcome.metrics["goal"]["items"]
    cost = json.loads((job.folder / "plan.json").read_text())["cost"]
    assert (item["name"], item["value"]) == (f"prune.{name}", cost["after"][name] / cost["before"][name])
    assert item["met"]
    assert "%" in outcome.metrics["steps"][1]["did"]


@pytest.mark.parametrize("name", ["size", "memory"])
def test_a_forecast_shows_the_limited_costs(job, name):
    found = forecast(job.recipe(*ONLY_PRUNED, f"prune.goal={{{name}: 0.8}}", f"goal={{{name}: 0.9}}"), base=job.base)
    assert found["expected"][1].startswith(f"at the end: {WORDS[name]} ")
    (line,) = [plain(line) for line in forecast_lines(found) if plain(line).startswith("plan ")]
    assert f", {WORDS[name]} " in line


@pytest.mark.parametrize("name", ["size", "memory"])
def test_a_limit_that_the_steps_do_not_reach_is_refused_before_the_first_step(job, name):
    changes = (*ONLY_PRUNED, "prune.goal.macs=0.9", f"goal={{{name}: 0.2}}")
    with pytest.raises(GoalError, match=rf"they lead to {WORDS[name]} .*Lower `goal.{name}` of the step 'prune'"):
        job.run_recipe(*changes)


def test_a_goal_with_a_reference_of_its_own_is_refused_in_a_job(trained, tmp_path):
    model, _, data = trained
    goal = kirsch.Goal(macs=0.5, of=traced(model, data))
    with pytest.raises(UsageError, match=r"The goal has a cost of the original, `of`\. .* Leave out `of`\."):
        kirsch.compress(model, data, goal, folder=tmp_path / "run")
    with pytest.raises(UsageError, match=r"The goal has a cost of the original, `of`\."):
        Prune(goal=goal)


def test_compress_checks_several_limits_at_once(trained, tmp_path):
    model, _, data = trained
    goal = kirsch.Goal(macs=0.7, parameters=0.8, size=0.8, memory=0.9)
    result = kirsch.compress(model, data, goal, steps=[Prune(round_to=1)], folder=tmp_path / "run", batch_size=16)
    first, final = (traced(net, data).to_dict() for net in (model, result.model))
    assert {item["name"]: item["value"] for item in result.metrics["goal"]["items"]} == {
        name: pytest.approx(final[name] / first[name]) for name in WORDS
    }
    assert result.met
