"""Numbers of metrics.json equal those computed from the files of the run."""

from __future__ import annotations

import hashlib
import json
from math import comb
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy

from kirsch import files
from kirsch.recipes import manifest
from kirsch.recipes.goals import goal_texts
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.runner import materials_of

DROP = "accuracy drop ≤ 50.0 points against the teacher"
MODELS = {"train": "teacher", "distill": "student", "prune": "pruned", "recover": "recovered", "export": "exported"}


@pytest.fixture(scope="module")
def run(finished):
    """Metrics of the run folder, logits of each step, and labels of the test part."""
    job, outcome = finished
    metrics = json.loads((job.folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == json.loads(json.dumps(outcome.metrics))
    logits = {key: np.load(job.folder / "checkpoints" / step / "done" / "logits.npy") for step, key in MODELS.items()}
    labels = materials_of(job.recipe(), job.base).data.test.labels
    return SimpleNamespace(job=job, metrics=metrics, logits=logits, labels=labels)


def correct(run, key):
    return run.logits[key].argmax(1) == run.labels


def cost(width):
    """Return parameters and MACs on 6 x 6 inputs: two convolutions without padding, batch norm, linear head."""
    parameters = 9 * width + 2 * width + 9 * width**2 + width + 3 * width + 3
    return parameters, 9 * width * 16 + 9 * width**2 * 4 + 3 * width


def test_accuracy_of_each_model_is_that_of_its_logits(run):
    found = {model["key"]: model["accuracy"] for model in run.metrics["models"]}
    assert list(found) == list(run.logits)
    for key, accuracy in found.items():
        assert accuracy["value"] == correct(run, key).mean()
        assert accuracy["n"] == 60
        # At an accuracy of 0 or 1, the bound may be off by rounding.
        assert accuracy["low"] - 1e-12 <= accuracy["value"] <= accuracy["high"] + 1e-12


def test_models_have_different_accuracies(run):
    values = [model["accuracy"]["value"] for model in run.metrics["models"]]
    assert len(set(values[:4])) >= 3
    assert run.logits["exported"] == pytest.approx(run.logits["recovered"], abs=1e-4)  # two runtimes, float32


def test_costs_equal_the_closed_form(run):
    found = {model["key"]: (model["parameters"], model["macs"]) for model in run.metrics["models"]}
    assert found["teacher"] == cost(12)
    assert found["student"] == cost(8)
    weights = safetensors.numpy.load_file(run.job.folder / "artifacts" / "model" / "model.safetensors")
    first, second = weights["first.weight"].shape[0], weights["second.weight"].shape[0]
    parameters = 9 * first + 2 * first + 9 * first * second + second + 3 * second + 3
    macs = 9 * first * 16 + 9 * first * second * 4 + 3 * second
    assert found["pruned"] == found["recovered"] == found["exported"] == (parameters, macs)
    assert macs <= 0.6 * cost(8)[1]


def test_goals_are_evaluated_with_costs_and_accuracies(run):
    macs, drop = run.metrics["goal"]["items"]
    costs = {model["key"]: model["macs"] for model in run.metrics["models"]}
    share = costs["pruned"] / costs["student"]
    lost = correct(run, "teacher").mean() - correct(run, "exported").mean()
    assert (macs["name"], macs["value"], macs["limit"], macs["met"]) == ("prune.macs", share, 0.6, True)
    assert macs["text"] == f"prune: MACs {100 * share:.1f} % of the student, goal ≤ 60 %"
    assert (drop["name"], drop["limit"], drop["met"]) == ("max_drop", 0.5, True)
    assert drop["value"] == pytest.approx(lost, abs=1e-12)
    assert drop["text"] == f"accuracy drop {100 * lost:.1f} points against the teacher, goal ≤ 50.0 points"
    assert run.metrics["goal"]["met"] is True
    assert run.metrics["goal"]["text"] == f"prune: MACs ≤ 60 % of the student · {DROP}"


def test_paired_test_counts_lost_and_gained_samples(run):
    first, last = correct(run, "teacher"), correct(run, "exported")
    lost, gained = int((first & ~last).sum()), int((~first & last).sum())
    n = lost + gained
    p = min(1.0, 2 * sum(comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n)
    found = run.metrics["quality"]["paired"]
    assert (found["lost"], found["gained"]) == (lost, gained)
    assert found["p"] == pytest.approx(p, rel=1e-9)  # sums in another order
    assert run.metrics["goal"]["items"][1]["significance"] == found["text"]


@pytest.mark.parametrize(("side", "key"), [("before", "teacher"), ("after", "exported")])
def test_confusion_matrix_counts_samples(run, side, key):
    expected = [[0] * 3 for _ in range(3)]
    for label, prediction in zip(run.labels, run.logits[key].argmax(1), strict=True):
        expected[label][prediction] += 1
    assert run.metrics["quality"][side] == {"key": key, "confusion": expected}
    named = {row["name"]: row for row in run.metrics["quality"]["lost"]}
    for number, name in enumerate(("dark", "gray", "light")):
        assert named[name][side] == expected[number][number] / 20
        assert named[name]["n"] == 20


def test_calibration_error_is_the_gap_between_confidence_and_accuracy(run):
    exponentials = np.exp(run.logits["teacher"].astype(float))
    confidence = (exponentials / exponentials.sum(1, keepdims=True)).max(1)
    bins = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs((confidence - correct(run, "teacher"))[bins == number].sum()) for number in range(10)]
    assert run.metrics["quality"]["calibration"]["before"]["ece"] == pytest.approx(sum(gaps) / 60, abs=1e-9)


def test_curves_have_one_point_per_epoch(run):
    curves = {curve["step"]: curve for curve in run.metrics["curves"]}
    assert {step: curve["epochs"] for step, curve in curves.items()} == {
        "train": [1, 2, 3, 4, 5, 6],
        "distill": [1, 2, 3, 4],
        "recover": [1, 2, 3],
    }
    events = [event for event in run.job.events if event["event"] == "epoch" and event["step"] == "distill"]
    for key in ("loss", "accuracy", "learning_rate", "seconds"):
        assert curves["distill"][key] == [event[key] for event in events]
    parts = curves["distill"]["terms"]
    assert parts["label"] + parts["kd"] == [event["terms"][name] for name in ("label", "kd") for event in events]
    assert curves["distill"]["loss"] == pytest.approx(
        [sum(pair) for pair in zip(*parts.values(), strict=True)], rel=1e-5
    )


def test_exported_file_is_the_one_that_was_evaluated(run):
    export = run.metrics["export"]
    path = run.job.folder / export["file"]
    assert export["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert export["bytes"] == path.stat().st_size
    assert run.metrics["models"][-1]["bytes"] == path.stat().st_size
    assert (export["same_labels"], export["n"]) == (60, 60)
    inputs = materials_of(run.job.recipe(), run.job.base).data.test.inputs
    session = onnxruntime.InferenceSession(path)
    logits = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    assert logits == pytest.approx(run.logits["exported"], abs=1e-5)  # rounding differs between batch sizes


def test_usage_example_runs(run, monkeypatch, capsys):
    monkeypatch.chdir(run.job.folder / "artifacts")
    exec(compile(run.metrics["export"]["usage"], "usage", "exec"), {})
    assert capsys.readouterr().out.strip() in ("[0]", "[1]", "[2]")


def test_latency_is_measured_for_teacher_student_and_exported_file(run):
    timed = {model["key"] for model in run.metrics["models"] if model["latency"] is not None}
    assert timed == {"teacher", "student", "exported"}
    teacher = run.metrics["models"][0]["latency"]
    assert teacher["speedup"]["of"] == "teacher"
    assert teacher["speedup"]["value"] == 1.0
    assert [model["chosen"] for model in run.metrics["models"]] == [False, False, False, False, True]


def test_provenance_contains_recipe_plan_and_environment(run):
    origin = run.metrics["provenance"]
    assert read_recipe(origin["recipe"]) == run.job.recipe()
    (plan,) = origin["plans"]
    assert plan == json.loads((run.job.folder / "plan.json").read_text())
    assert origin["fingerprint"] == plan["model"]["fingerprint"]
    assert origin["environment"] == json.loads((run.job.folder / "environment.json").read_text())
    data = materials_of(run.job.recipe(), run.job.base).data
    assert run.metrics["measured"]["data"] == {
        "name": "stripes",
        "sha256": data.sha256,
        "train": 48,
        "validation": 30,
        "test": 60,
    }
    assert run.metrics["seconds"] == pytest.approx(sum(step["seconds"] for step in run.metrics["steps"]))


# ------------------------------------------------------------------------------------------------ goals


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ([], ["prune: MACs ≤ 60 % of the student", DROP]),
        (["prune.goal=null", "goal={macs: 0.001}"], ["MACs ≤ 0.1 % of the student"]),
        (
            ["prune.goal={macs: 0.5, parameters: 0.25}", "goal={}"],
            ["prune: MACs ≤ 50 %, parameters ≤ 25 % of the student"],
        ),
        (
            ["prune.goal={macs: 0.5, parameters: 0.25}", "goal={macs: 0.5}"],
            ["prune: parameters ≤ 25 % of the student", "at the end: MACs ≤ 50 % of the student"],
        ),
        (
            ["prune=null", "measure.threads=2", "goal={max_drop: 0.01, speedup: 1.5}"],
            [
                "accuracy drop ≤ 1.0 point against the teacher",
                "speed ≥ 1.50× that of the teacher (onnxruntime, 2 threads)",
            ],
        ),
        (["prune=null", "goal={}"], []),
    ],
)
def test_goal_texts_name_the_step_and_the_reference_of_each_limit(job, changes, texts):
    recipe = job.recipe(*changes)
    assert goal_texts(SimpleNamespace(goal=recipe.goal, model_name="student"), recipe.all_steps) == texts


@pytest.mark.parametrize(
    ("goal", "code", "missed"),
    [
        ("{{max_drop: {drop}}}", 0, []),
        ("{{max_drop: {less}}}", 3, ["max_drop"]),
        ("{{speedup: 0.001}}", 0, []),
        ("{{speedup: 1000, max_drop: 0}}", 3, ["max_drop", "speedup"]),
    ],
)
def test_goal_is_met_by_a_value_equal_to_its_limit(done, finished, goal, code, missed):
    drop = finished[1].metrics["goal"]["items"][1]["value"]
    assert drop > 0
    limits = goal.format(drop=drop, less=drop - 1e-6)
    recipe = read_recipe(done.folder / "recipe.yaml", [f"goal={limits}"])
    (done.folder / "recipe.yaml").write_text(recipe.to_yaml())
    found = done.run_recipe(f"goal={limits}")
    assert done.steps("step_start") == []
    assert found.exit_code == code
    assert [item["name"] for item in found.metrics["goal"]["items"] if not item["met"]] == missed
    assert found.metrics["goal"]["met"] is (not missed)


def test_pruned_model_above_its_limit_misses_the_goal(done):
    """The MACs in the record of the pruning step are raised above the limit; the MACs in the plan still meet it."""
    folder = done.folder / "checkpoints" / "prune" / "done"
    record = json.loads((folder / "record.json").read_text())
    record["macs"] = round(0.61 * cost(8)[1])
    (folder / "record.json").write_text(json.dumps(record))
    files.write_manifest(folder)
    manifest.remove(done.folder)
    manifest.write(done.folder)
    found = done.run_recipe()
    assert found.exit_code == 3
    assert [(item["name"], item["met"]) for item in found.metrics["goal"]["items"]] == [
        ("prune.macs", False),
        ("max_drop", True),
    ]


def test_run_without_goals_pruning_and_measurement_lists_what_was_not_measured(job):
    removed = ("student", "distill", "prune", "recover", "export", "measure")
    found = job.run_recipe(*(f"{name}=null" for name in removed), "goal={}")
    assert found.exit_code == 0
    metrics = found.metrics
    assert (metrics["goal"]["text"], metrics["goal"]["items"]) == ("no goal was set", [])
    assert metrics["not_measured"][0] == "Latency: the job does not export and measure a file."
    assert (metrics["removals"], metrics["export"]) == ([], None)
    assert [(model["key"], model["chosen"]) for model in metrics["models"]] == [("teacher", True)]
    assert metrics["quality"]["paired"]["p"] == 1.0
    assert (job.folder / "report.html").is_file()


def test_the_list_of_what_was_not_measured_names_runtime_and_seed(run):
    assert run.metrics["not_measured"][:2] == [
        "Other runtimes and machines: the times hold only for the runtime and machine of this report.",
        "Other seeds: there is one training run, with seed 0; results differ between seeds.",
    ]


def test_accuracy_gain_is_reported_as_negative_drop(job):
    """The teacher is trained for one epoch, and then again on labels."""
    found = job.run_recipe(
        "student=null",
        "distill=null",
        "prune=null",
        "train={epochs: 1, learning_rate: 0.01, optimizer: adamw}",
        "recover={weight: 0.0, epochs: 6, learning_rate: 0.05}",
        "export=null",
        "measure=null",
        "goal={max_drop: 0.0}",
    )
    first, last = (model["accuracy"]["value"] for model in found.metrics["models"])
    assert last > first
    (item,) = found.metrics["goal"]["items"]
    assert item["text"] == f"accuracy drop −{100 * (last - first):.1f} points against the teacher, goal ≤ 0.0 points"
    assert item["met"] is True
