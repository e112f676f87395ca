"""A recipe gives an objective by temperature and weight, by the name of a preset, or by terms; errors name the line."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import textwrap
from types import SimpleNamespace

import pytest

import kirsch
from kirsch.data.sources import load_data
from kirsch.distillation.objective import Objective
from kirsch.distillation.presets import PRESETS
from kirsch.distillation.steps import _gradient_share
from kirsch.distillation.term import Ramp, Term
from kirsch.errors import RecipeError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.training import Trained
from kirsch.recipes.forecast import forecast
from kirsch.recipes.models import build
from kirsch.recipes.recipe import commented, read_recipe
from kirsch.steps import Distill, Prune, Recover

MINIMAL = "teacher: {model: 'm:t'}\nsteps:\n- recover:\n"
JOB = SimpleNamespace(outputs={}, model_name="student")


def recover_recipe(text: str, *changes: str):
    """Return a recipe with this recover section, after checking that it reads back from both written forms."""
    found = read_recipe(f"{MINIMAL}{textwrap.indent(text, '  ')}\n", changes)
    assert read_recipe(found.to_yaml()) == found
    assert read_recipe(commented(found)) == found
    return found


def objective_of(text: str, *changes: str) -> Objective:
    return recover_recipe(text, *changes).all_steps["recover"].objective_for(JOB)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  {}", Objective.kd()),
        ("  {temperature: 2, weight: 0.5}", Objective.kd(temperature=2.0, weight=0.5)),
        ("  {temperature: 2}", Objective.kd(temperature=2.0, weight=0.9)),
        ("  {weight: 1}", Objective.kd(temperature=4.0, weight=1.0)),
        ("  {objective: kd, weight: 0.5}", Objective.kd(temperature=4.0, weight=0.5)),
        ("  {objective: dkd}", Objective.preset("dkd")),
        ("  {objective: {preset: at, label_weight: 0.5}}", Objective.preset("at", label_weight=0.5)),
        (
            "  objective: {preset: at, label_weight: {start: 0, end: 1, epochs: 3}, balance: gradient}",
            Objective.preset("at", label_weight=Ramp(0.0, 1.0, 3.0), balance="gradient"),
        ),
        (
            (
                "  objective:\n    label_weight: 0.1\n    label_smoothing: 0.2\n    terms:\n"
                "    - {weight: 0.9, temperature: {start: 4, end: 1, epochs: 10, after: 2}}\n"
                "    - {loss: at, weight: 1000, student_layer: auto, options: {power: 3}, name: maps}\n"
                "    - {loss: fitnet, student_layer: down, teacher_layer: deep, "
                "adapter: conv, adapter_options: {spatial: pool}}"
            ),
            Objective(
                (
                    Term("kd", 0.9, temperature=Ramp(4.0, 1.0, 10.0, after=2.0)),
                    Term("at", 1000.0, student_layer="auto", options={"power": 3}, name="maps"),
                    Term(
                        "fitnet",
                        0.9,
                        temperature=None,
                        student_layer="down",
                        teacher_layer="deep",
                        adapter="conv",
                        options={},
                        adapter_options={"spatial": "pool"},
                    ),
                ),
                label_weight=0.1,
                label_smoothing=0.2,
            ),
        ),
        (
            (
                "  objective:\n    label_weight: 0\n    terms: [{loss: minilm, student_layer: [a.query, a.key]}, "
                "{loss: detr, student_layer: {logits: logits, boxes: output.boxes}}]"
            ),
            Objective(
                (
                    Term("minilm", student_layer=["a.query", "a.key"]),
                    Term("detr", student_layer={"logits": "logits", "boxes": "output.boxes"}),
                ),
                label_weight=0.0,
            ),
        ),
        ("  objective: {terms: []}", Objective.labels()),
    ],
)
def test_section_is_read_as_the_expected_objective(text, expected):
    assert objective_of(text) == expected


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_is_read_from_its_name_and_from_its_full_form(name):
    # "kd" takes the temperature and weight of the step, whose defaults are those of `Objective.kd`.
    named = Objective.kd() if name == "kd" else Objective.preset(name)
    assert objective_of(f"  objective: {name}") == named
    full = json.dumps(Objective.preset(name).to_dict())
    assert objective_of(f"  objective: {full}") == Objective.preset(name)


def test_overrides_change_the_objective():
    assert objective_of("  epochs: 3", "recover.objective=dkd") == Objective.preset("dkd")
    assert objective_of("  objective: dkd", "recover.objective=kd", "recover.weight=0.5") == Objective.kd(
        temperature=4.0, weight=0.5
    )
    found = objective_of("  objective: {preset: at}", "recover.objective.label_weight=2")
    assert found == Objective.preset("at", label_weight=2.0)


def test_commented_recipe_explains_the_objective_key():
    for text, shown in (("  {}", "kd"), ("  objective: dkd", "dkd"), ("  objective: {preset: dkd}", "{terms: [")):
        (line,) = (x for x in commented(recover_recipe(text)).splitlines() if x.startswith("    objective:"))
        assert line.startswith(f"    objective: {shown}")
        assert line.endswith("see `kirsch methods`")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("  objective: dkdd", [r"line 4: steps\[0\].recover.objective: there is no preset 'dkdd'. .* mean 'dkd'\?"]),
        ("  objective: 5", [r"line 4: steps\[0\].recover.objective: the objective is 5. Give the name of a preset"]),
        ("  objective: {}", [r"line 4: .*the objective has neither a preset nor terms. Give the name of a preset"]),
        ("  objective: {preset: at, terms: []}", [r"line 4: .*the objective has both a preset and terms"]),
        ("  objective: {terms: 5}", [r"line 4: .*the terms of the objective are 5; expected a list"]),
        (
            "  objective:\n    preset: at\n    label_wieght: 1",
            [r"line 6: .*label_wieght: there is no field .* 'label_wieght'.* Did you mean 'label_weight'"],
        ),
        (
            "  objective: {preset: at, label_weight: -1}",
            [r"line 4: .*label_weight is -1; a number of at least 0 is needed"],
        ),
        (
            "  objective: {terms: [], label_weight: 0}",
            [r"line 4: .*the objective is invalid: all weights are 0, so there is nothing to learn"],
        ),
        (
            (
                "  objective:\n    terms:\n    - loss: kdd\n    - {loss: kd, temperatuur: 1}\n"
                "    - {loss: dkd, options: {betta: 1}}\n    - {student_layer: 'layer['}\n"
                "    - {weight: {start: 1, endd: 2}}\n"
                "    - {loss: dist, options: {temperature: 2}}\n    - 5"
            ),
            [
                r"line 6: steps\[0\].recover.objective.terms.0.loss: there is no loss 'kdd'\. .* Did you mean 'kd'\?",
                r"line 7: .*terms.1.temperatuur: .*no field .* 'temperatuur'.* Did you mean 'temperature'\?",
                r"line 8: .*terms.2.options: there is no option of the loss 'dkd' named 'betta'. .* mean 'beta'\?",
                r"line 9: .*objective.terms.3.student_layer: 'layer\[' is not a layer name",
                r"line 10: .*objective.terms.4.weight: kirsch.Ramp has no argument 'endd'.* Did you mean 'end'\?",
                r"line 11: .*objective.terms.5.options: .*`options` of 'dist' contain the temperature",
                r"line 12: .*objective.terms.6: the term is 5",
            ],
        ),
        (
            "  objective: {terms: [{}], combine_teachers: some}",
            [r"line 4: .*`combine_teachers` .* is 'some'; expected 'probabilities', .*'sum'"],
        ),
        (
            "  objective: dkd\n  temperature: 2\n  weight: 0.5",
            [r"line 3: steps\[0\].recover: temperature and weight .* \[{loss: dkd, temperature: 2, weight: 0.5}\]"],
        ),
    ],
)
def test_invalid_objective_is_named_with_line_and_nearest_name(text, sentences):
    with pytest.raises(RecipeError) as caught:
        recover_recipe(text)
    _, *found = caught.value.what.split("\n  ")
    assert len(found) == len(sentences)
    for line, sentence in zip(found, sentences, strict=True):
        assert re.match(sentence, line), line


def test_preset_without_the_label_loss_is_valid():
    changed = objective_of("  objective: {preset: dkd, label_weight: 0}")
    assert (
        changed
        == Objective.preset("dkd", label_weight=0.0)
        == Recover(objective={"preset": "dkd", "label_weight": 0}).objective
    )
    ramp = objective_of("  objective: {preset: dkd, label_weight: {start: 0, end: 1, epochs: 5}}").label_weight
    assert ramp == Ramp(0, 1, 5)


@pytest.mark.parametrize("options", [{"temperature": 3.0}, {"weight": 0.5}, {"temperature": 3.0, "weight": 0.5}])
@pytest.mark.parametrize("objective", [*sorted(set(PRESETS) - {"kd"}), Objective.kd(), Objective.labels()])
def test_the_fix_for_temperature_and_weight_beside_another_objective_is_valid(objective, options):
    with pytest.raises(UsageError, match=r"can only be combined with the name 'kd' as objective") as caught:
        Recover(objective=objective, **options)
    found = repr(objective) if isinstance(objective, str) else "an objective with its own terms"
    assert caught.value.what.endswith(f"; found {found}.")
    assert caught.value.fix.startswith(f"Leave out {' and '.join(options)}")
    fix = re.search(r"such as (objective: .*)\.$", caught.value.fix)
    if fix is None:
        return
    (term,) = objective_of(f"  {fix[1]}").terms
    assert {name: getattr(term, name) for name in options} == options


# ------------------------------------------------------------------------------------------------ runs


MAPS = "{terms: [{weight: 0.5, temperature: 4}, {loss: fitnet, weight: 0.1, student_layer: second}], label_weight: 0.5}"


def test_run_trains_on_the_objectives_of_its_recipe(job):
    """The student learns from logits and feature maps, the pruned model from correlations of logits."""
    changes = (f"distill.objective={MAPS}", "recover.objective=dist", "export=null", "measure=null")
    outcome = job.run_recipe(*changes)
    records = {
        key: json.loads((job.folder / "checkpoints" / key / "done" / "record.json").read_text())
        for key in ("distill", "recover")
    }
    assert set(records["distill"]["first_batch"]["gradient_shares"]) == {"label", "kd", "fitnet"}
    assert set(records["recover"]["first_batch"]["gradient_shares"]) == {"label", "dist"}
    assert records["distill"]["cells"][-1].endswith("% of gradient")
    assert any(event["event"] == "attached" and event["step"] == "distill" for event in job.events)
    assert outcome.exit_code == 0


def test_gradient_share_is_that_of_the_last_epoch_after_a_warm_up():
    trained = Trained(None, [{"gradient_shares": {"label": 0.4, "dkd": 0.6}}], {"gradient_shares": {"label": 1.0}})
    assert _gradient_share(trained) == "dkd 60 % of gradient"
    assert (
        _gradient_share(dataclasses.replace(trained, first_batch={"gradient_shares": {"kd": 0.96}}))
        == "KD 96 % of gradient"
    )


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            "recover.objective={terms: [{loss: fitnet, student_layer: secondd}]}",
            UnknownNameError,
            r"'secondd'.* mean 'second'",
        ),
        (
            "distill.objective={terms: [{loss: fitnet, teacher_layer: head, student_layer: first}]}",
            ShapeError,
            "No adapter",
        ),
        ("distill.objective=causal", UsageError, "The objective is causal, and the student returns logits"),
    ],
)
def test_invalid_objective_is_refused_before_training(job, change, error, sentence):
    for act in (lambda: job.run_recipe(change), lambda: forecast(job.recipe(change), base=job.base)):
        with pytest.raises(error, match=sentence):
            act()
    assert not (job.folder / "checkpoints" / "train" / "done").exists()


def test_steps_take_an_objective_by_name_or_object(job):
    objective = Objective((Term("hcl", 1.0, student_layer="second", options={"sizes": (2, 1)}),))
    step = Distill(objective=objective)
    assert step.objective_for(SimpleNamespace(outputs={}, model_name="student")) == objective
    read = Distill.model_validate(step.model_dump(mode="json"))
    assert read.objective == Objective((Term("hcl", 1.0, student_layer="second", options={"sizes": [2, 1]}),))
    data = load_data("nets.py:stripes", {}, seed=0, base=job.base)
    teacher = build("nets.py:teacher", base=job.base)
    with pytest.raises(UsageError, match=r"no preset 'dkdd'\. .* Did you mean 'dkd'"):
        kirsch.compress(copy.deepcopy(teacher), data, kirsch.Goal(macs=0.5), objective="dkdd")
    with pytest.raises(UsageError, match=r"`objective` of kirsch\.compress has no effect together with `steps`"):
        kirsch.compress(teacher, data, kirsch.Goal(macs=0.5), objective="dkd", steps=[Prune()])


SOFT = """


class Soft(Net):
    def forward(self, x):
        return super().forward(x).softmax(-1)


def soft_teacher():
    return Soft(12)


def soft_student():
    return Soft(8)


def uneven(*, noise=0.4):
    random = np.random.default_rng(0)

    def part(n):
        labels = (np.arange(n) % 10 == 9).astype(int)
        wave = np.cos(np.arange(6) * (2 * labels[:, None] + 0.5))[:, None, :, None]
        return Split((wave + noise * random.standard_normal((n, 1, 6, 6))).astype(np.float32), labels)

    return DataSet("uneven", part(80), part(40), part(60), classes=("often", "rarely"))
"""
SHORT = ("export=null", "measure=null", "prune=null", "recover=null", "goal={}", "train.epochs=2")


def test_models_with_softmax_are_refused_unless_their_outputs_are_declared(job):
    (job.base / "nets.py").write_text((job.base / "nets.py").read_text() + SOFT)
    models = ("teacher.model=nets.py:soft_teacher", "student.model=nets.py:soft_student")
    for change, whose in (models[0], "teacher"), (models[1], "student"):
        with pytest.raises(UsageError, match=f"The {whose}, a Soft, returns probabilities"):
            job.run_recipe(*SHORT, change, folder=job.base / whose)
        with pytest.raises(UsageError, match=f"The {whose}, a Soft, returns probabilities"):
            forecast(job.recipe(*SHORT, change), base=job.base)
    assert not (job.folder / "checkpoints" / "train" / "done").exists()
    plain = job.run_recipe(*SHORT, "train.weight_decay=0")
    stated = ("teacher.outputs=probabilities", "student.outputs=probabilities")
    found = job.run_recipe(*SHORT, *models, *stated, "train.weight_decay=0", folder=job.base / "soft")
    for key in ("teacher", "student"):  # rounding differs, since logits are logarithms of probabilities
        expected, actual = (
            next(model for model in outcome.metrics["models"] if model["key"] == key) for outcome in (plain, found)
        )
        assert actual["accuracy"]["value"] == pytest.approx(expected["accuracy"]["value"], abs=0.1)
    before, after = (outcome.metrics["quality"]["calibration"]["after"]["ece"] for outcome in (plain, found))
    assert after == pytest.approx(before, abs=0.05)  # would differ if probabilities were used as logits


def test_metrics_of_imbalanced_classes_contain_the_balanced_accuracy(job):
    (job.base / "nets.py").write_text(
        (job.base / "nets.py").read_text() + SOFT + "\n\ndef two():\n    return Net(8, classes=2)\n"
    )
    changes = ("data.source=nets.py:uneven", "teacher.model=nets.py:two", "student=null", "distill=null", "prune=null")
    found = job.run_recipe(*changes, "recover=null", "train.epochs=8", "measure=null")
    for model in found.metrics["models"]:
        assert 0.5 < model["balanced_accuracy"] <= 1
    assert "balanced" in (job.folder / "report.html").read_text()
    assert "(balanced accuracy " in found.metrics["goal"]["items"][0]["text"]
