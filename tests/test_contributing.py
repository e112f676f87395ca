"""The code in CONTRIBUTING.md does what the page says."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

import kirsch
from kirsch.deploy.export import EXPORTERS
from kirsch.distillation.losses import LOSSES
from kirsch.errors import ShapeError, UsageError
from kirsch.pruning.importance import IMPORTANCES
from kirsch.report import read_metrics
from kirsch.steps import Export, Measure, Train
from kirsch.tasks import TASKS

torch = pytest.importorskip("torch")

from kirsch.frameworks.pytorch.features.adapters import ADAPTERS, build  # noqa: E402 - imports torch
from pages import run_page  # noqa: E402 - imports torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def defined(monkeypatch):
    return run_page("CONTRIBUTING.md", monkeypatch)


def test_the_importance_equals_the_largest_weight(defined):
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, -4.0], [0.5, 0.25], [2.0, 0.0]]))
        first.bias.copy_(torch.tensor([0.0, -3.0, 1.0]))
        second.weight.copy_(torch.tensor([[1.0, 2.0, -5.0]]))
    graph = kirsch.trace(model, torch.zeros(1, 2))
    np.testing.assert_array_equal(IMPORTANCES["largest-weight"](graph, graph.groups[0], norm=2, seed=0), [4, 3, 5])
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.7), importance="largest-weight")
    assert plan.groups[0].removed == (1,)


def test_the_loss_is_half_the_squared_distance_in_numpy_and_torch(defined):
    student, teacher = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [3.0, 4.0]])
    assert LOSSES["squared-difference"](student, teacher) == (2 + 12.5) / 2
    student_tensor = torch.tensor(student, requires_grad=True)
    LOSSES["squared-difference"](student_tensor, torch.tensor(teacher)).backward()
    np.testing.assert_array_equal(student_tensor.grad, (student - teacher) / 2)
    with pytest.raises(ShapeError):
        LOSSES["squared-difference"](student, teacher[:1])


def test_the_importance_and_the_loss_pass_the_conformance_checks(defined):
    for name in ("test_largest_weight_conforms", "test_squared_difference_conforms"):
        (mark,) = defined[name].pytestmark
        assert mark.args[1]
        for check in mark.args[1]:
            defined[name](check)


def test_the_objective_uses_the_loss(defined):
    assert [term.loss for term in defined["objective"].terms] == ["squared-difference"]


def test_the_adapter_normalizes_the_student_and_leaves_the_teacher_unchanged(defined):
    student, teacher = torch.randn(8, 4, 5, 5) * 3 + 1, torch.randn(8, 4, 5, 5)
    adapter = build("per-channel", student.shape, teacher.shape, options={})
    adapted, unchanged = adapter(student, teacher)
    torch.testing.assert_close(adapted.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert unchanged is teacher
    assert defined["feature"].adapter == "per-channel"


def test_the_exporter_writes_the_weights_of_the_model(defined, tmp_path):
    model = torch.nn.Linear(2, 3)
    inputs = torch.zeros(1, 2)
    path = tmp_path / "model.safetensors"
    artifact = kirsch.export(model, path, example_inputs=inputs, format="safetensors")
    assert artifact.details == {"tensors": 2}
    torch.testing.assert_close(defined["load_file"](path)["weight"], model.weight.detach())


def test_the_task_counts_samples_whose_labels_are_all_right(defined):
    task, labels = TASKS["multi-label"](), np.array([[1, 0], [1, 1], [0, 0]])
    part = kirsch.Split(np.zeros((3, 2), np.float32), labels)
    data = kirsch.DataSet("d", part, part, part, classes=("a", "b"))
    task.check_data(data)
    right, wrong = np.where(labels, 1.0, -1.0), np.array([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    task.check_outputs(wrong, data)
    assert task.evaluate(wrong, data)["accuracy"]["value"] == pytest.approx(2 / 3)
    assert task.weakness(task.evaluate(-right, data)) == (
        "0.0% of the samples are exactly right",
        "No sample is right.",
    )
    assert task.compare(right, wrong, data)["paired"]["lost"] == 1
    with pytest.raises(ShapeError):
        task.check_outputs(wrong[:, :1], data)


SIGNS = np.random.default_rng(0).normal(size=(48, 2)).astype(np.float32)


def signs():
    """Data for the task of the page: each of the two labels is the sign of an input."""
    part = kirsch.Split(SIGNS, (SIGNS > 0).astype(np.int64))
    return kirsch.DataSet("signs", part, part, part, classes=("first", "second"))


def test_the_task_of_the_page_runs_in_a_job(defined, tmp_path):
    torch.manual_seed(0)
    found = kirsch.compress(
        torch.nn.Linear(2, 2),
        signs(),
        steps=[Train(epochs=20, learning_rate=0.5), Export()],
        task="multi-label",
        max_drop=0.01,
        folder=tmp_path / "run",
        listen=lambda _: None,
    )
    assert found.met
    assert found.metrics["export"]["same_labels"] == 48
    quality = found.metrics["models"][-1]["accuracy"]
    assert (quality["value"] > 0.9, quality["n"]) == (True, 48)
    assert found.metrics["quality"]["paired"]["lost"] == 0
    report = found.report.read_text()
    assert "significant" in report
    assert "Confusion matrices" not in report
    assert read_metrics(found.folder / "metrics.json") == found.metrics


@pytest.mark.parametrize(
    ("quality", "sentence"),
    [
        ({"exact_match": 1.0}, "accuracy is missing"),
        ({"accuracy": 0.5}, "accuracy: .*object"),
        ({"accuracy": {"value": 1.5, "low": 0.0, "high": 1.0, "n": 3}}, r"accuracy\.value: .*"),
    ],
)
def test_a_task_without_an_accuracy_is_refused_at_its_first_evaluation(
    defined, tmp_path, monkeypatch, quality, sentence
):
    monkeypatch.setattr(defined["MultiLabel"], "evaluate", lambda *_: quality)
    with pytest.raises(UsageError, match=f"`evaluate` of the task MultiLabel cannot be used in a job: {sentence}"):
        kirsch.compress(
            torch.nn.Linear(2, 2),
            signs(),
            steps=[Train(epochs=1)],
            task="multi-label",
            folder=tmp_path / "run",
            listen=lambda _: None,
        )


def test_the_exporter_of_the_page_is_a_format_of_the_step_export(defined, tmp_path):
    torch.manual_seed(0)
    events = []
    for expected in ("step_end", "step_kept"):
        found = kirsch.compress(
            torch.nn.Linear(2, 2),
            signs(),
            steps=[Train(epochs=20, learning_rate=0.5), Export(format="safetensors")],
            task="multi-label",
            folder=tmp_path / "run",
            listen=events.append,
        )
        assert [event["event"] for event in events if event.get("key") == "export"][-1] == expected
        torch.manual_seed(0)
    assert found.artifact.path == tmp_path / "run" / "artifacts" / "model.safetensors"
    assert (found.artifact.format, found.artifact.details) == ("safetensors", {"tensors": 2})
    assert "How to run the model" not in found.report.read_text()
    assert read_metrics(found.folder / "metrics.json")["export"].keys() == {"file", "bytes", "sha256", "format"}
    with pytest.raises(UsageError, match=r"'measure' cannot run a file of the format 'safetensors'\. Export with"):
        kirsch.compress(
            torch.nn.Linear(2, 2), signs(), steps=[Train(), Export(format="safetensors"), Measure()], folder=tmp_path
        )


def test_the_registered_names_are_removed_after_each_test():
    registered = (
        ("largest-weight", IMPORTANCES),
        ("squared-difference", LOSSES),
        ("per-channel", ADAPTERS),
        ("safetensors", EXPORTERS),
        ("multi-label", TASKS),
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_page("CONTRIBUTING.md", monkeypatch)
        assert all(name in registry for name, registry in registered)
    assert not any(name in registry for name, registry in registered)


def test_the_entry_point_groups_are_those_of_the_registries():
    assert f"kirsch.{IMPORTANCES.kind}" in TEXT
    assert f"kirsch.{LOSSES.kind}" in TEXT
    assert f"kirsch.{ADAPTERS.kind}" in TEXT
    assert f"kirsch.{EXPORTERS.kind}" in TEXT
    assert f"kirsch.{TASKS.kind}" in TEXT


def test_the_layers_of_the_architecture_are_those_on_the_design_page():
    def layers(text: str) -> list[str]:
        rows = re.findall(r"^\| (\d) \| (.*?) \|", text, re.MULTILINE)
        return [f"{layer}: {sorted(re.findall(r'`([^`]+)`', packages))}" for layer, packages in rows]

    assert layers(TEXT) == layers((ROOT / "docs" / "design.md").read_text())


def test_the_paths_and_make_targets_on_the_page_exist():
    targets = re.findall(r"^make (\w+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["test", "demo", "unit"]
    assert all(re.search(rf"^{target}\b.*:", makefile, re.MULTILINE) for target in targets)
    paths = re.findall(r"`((?:src|docs)/[\w/.]+\.\w+)`", TEXT)
    assert paths
    assert all((ROOT / path).is_file() for path in paths)


@pytest.fixture
def axes():
    """A model and data: the class of a sample is the axis on which it lies."""
    model = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    labels = np.arange(12) % 2
    part = kirsch.Split(np.eye(2, dtype=np.float32)[labels], labels)
    return model, kirsch.DataSet("axes", train=part, validation=part, test=part, classes=("first", "second"))


def test_a_step_is_run_again_if_its_file_outside_its_folder_was_changed(defined, axes, tmp_path, monkeypatch):
    kind, file, events = defined["Shrink"], tmp_path / "run" / "factor.txt", []
    run = kind.run

    def run_and_write(self, job, folder):
        (job.folder / "factor.txt").write_text("0.5")
        return run(self, job, folder)

    monkeypatch.setattr(kind, "run", run_and_write)
    monkeypatch.setattr(kind, "outside_files", lambda *_: {"factor.txt": hashlib.sha256(b"0.5").hexdigest()})
    for expected, content in (("step_end", "0.5"), ("step_kept", "0.7"), ("step_end", "0.5")):
        kirsch.compress(*axes, steps=[kind(factor=0.5)], folder=tmp_path / "run", listen=events.append)
        assert [event["event"] for event in events if event.get("key") == "shrink"][-1] == expected
        assert file.read_text() == "0.5"
        file.write_text(content)
    assert f"The step 'shrink' is run again: {file} is missing or damaged." in [event.get("text") for event in events]


def test_the_step_of_the_page_runs_in_a_job_and_is_not_repeated_on_resume(defined, axes, tmp_path):
    model, data = axes
    events = []
    for _ in range(2):
        found = kirsch.compress(
            model, data, steps=[defined["Shrink"](factor=0.5)], folder=tmp_path / "run", listen=events.append
        )
        torch.testing.assert_close(found.model.weight.detach(), torch.eye(2) / 2)
    assert [(event["event"], event["key"]) for event in events if event["event"] in ("step_end", "step_kept")] == [
        ("step_end", "evaluate"),
        ("step_end", "shrink"),
        ("step_kept", "evaluate"),
        ("step_kept", "shrink"),
    ]
    assert [model["name"] for model in found.metrics["models"]] == ["teacher", "shrunk"]
