"""Recipes are validated, changed by overrides, and read back from their written forms."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kirsch.errors import RecipeError
from kirsch.frameworks.training import Training
from kirsch.graph.plan import Goal
from kirsch.recipes.recipe import BUILTIN, commented, read_recipe, recipe_of
from kirsch.steps import Distill, Export, Measure, Prune, Recover, Train

ROOT = Path(__file__).parents[2]
MINIMAL = "teacher: {model: 'm:t'}\nsteps:\n"

VALID = f"""{MINIMAL}- prune:
    goal:
      macs: 0.5
    round_to: 4
- recover: {{epochs: 5}}
"""

NAMES = st.text(min_size=1, max_size=40) | st.sampled_from(["1e5", "0898", "no", "null", "a: b", "a\nb", "# a", "\x85"])
OPTIONS = st.dictionaries(
    NAMES,
    NAMES
    | st.integers()
    | st.booleans()
    | st.none()
    | st.lists(NAMES | st.floats(allow_nan=False, allow_infinity=False)),
)
FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
TRAINS = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(1, 10**6),
        "learning_rate": POSITIVE,
        "optimizer": st.sampled_from(["sgd", "adamw"]),
        "milestones": st.lists(FRACTIONS).map(sorted),
        "max_grad_norm": st.none() | POSITIVE,
        "gradient_accumulation_steps": st.integers(1, 64),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "ema_decay": st.none() | FRACTIONS,
    },
).map(lambda section: {**section, "schedule": "multistep"} if "milestones" in section else section)
OBJECTIVES = st.sampled_from(["dkd", "at"]) | st.fixed_dictionaries(
    {
        "terms": st.lists(
            st.fixed_dictionaries({}, optional={"weight": POSITIVE, "name": NAMES, "options": st.just({})})
        )
    },
    optional={"label_weight": POSITIVE, "label_smoothing": st.floats(0, 1, exclude_max=True)},
)
DISTILLATIONS = (
    st.tuples(TRAINS, st.fixed_dictionaries({}, optional={"temperature": POSITIVE, "weight": st.floats(0, 1)}))
    | st.tuples(TRAINS, st.fixed_dictionaries({"objective": OBJECTIVES}))
).map(lambda parts: {**parts[0], **parts[1]})
PRUNES = st.fixed_dictionaries(
    {"goal": st.fixed_dictionaries({"macs": FRACTIONS}, optional={"parameters": FRACTIONS})},
    optional={
        "round_to": st.integers(1, 64) | st.just("auto"),
        "uniform": st.booleans(),
        "loadable": st.none() | st.booleans(),
        "exclude": st.lists(NAMES),
    },
)
STEPS = st.tuples(
    st.lists(TRAINS.map(lambda value: {"train": value}), max_size=1),
    st.lists(DISTILLATIONS.map(lambda value: {"distill": value}), max_size=2),
    st.lists(
        PRUNES.map(lambda value: {"prune": value}) | DISTILLATIONS.map(lambda value: {"recover": value}),
        min_size=1,
        max_size=4,
    ),
    st.just([]) | st.just(["export"]) | st.just([{"export": {"format": "onnx"}}, {"measure": {"threads": 3}}]),
).map(lambda parts: [step for part in parts for step in part])
RECIPES = st.fixed_dictionaries(
    {
        "teacher": st.fixed_dictionaries({"model": NAMES}),
        "student": st.fixed_dictionaries({"model": NAMES}),
        "steps": STEPS,
    },
    optional={
        "name": NAMES,
        "seed": st.integers(0, 2**63 - 1),
        "data": st.fixed_dictionaries({"source": NAMES, "options": OPTIONS}),
        "goal": st.fixed_dictionaries({"max_drop": st.none() | st.floats(0, 1, exclude_max=True)}),
    },
).map(lambda data: recipe_of(data, "The test"))


SECTIONS = "Known: version, name, seed, task, data, teacher, student, steps, goal."
LIMITS = "Known: macs, parameters, size, memory, max_drop, speedup."


def assert_refused(text: str, *sentences: str, changes: tuple[str, ...] = (), environment: dict | None = None) -> None:
    """Check that the error lists exactly these problems, one per line."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, changes, environment)
    head, *found = caught.value.what.split("\n  ")
    assert found == list(sentences)
    assert head == f"The recipe has {'a problem' if len(found) == 1 else f'{len(found)} problems'}:"


# ------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "sede: 1",
            f"line 8: sede: unknown key. {SECTIONS} Did you mean 'seed'?",
        ),
        (
            "zzzzzz: 1",
            "line 8: zzzzzz: unknown key. Known: version, name, seed, task, data, teacher, student, steps, goal.",
        ),
        (
            "goal: {max_dorp: 0.1}",
            f"line 8: goal.max_dorp: unknown key. {LIMITS} Did you mean 'max_drop'?",
        ),
        ("seed: one", "line 8: seed: expected a whole number of at least 0, found 'one'."),
        ("seed: -1", "line 8: seed: expected a whole number of at least 0, found -1."),
        (f"seed: {2**63}", f"line 8: seed: expected a whole number between 0 and 9.22337e+18, found {2**63}."),
        ("seed: 1.0", "line 8: seed: expected a whole number of at least 0, found 1.0."),
        ("seed: '1'", "line 8: seed: expected a whole number of at least 0, found '1'."),
        (
            "- measure: {rounds: true}",
            "line 8: steps[2].measure.rounds: expected a whole number of at least 6, found True.",
        ),
        (
            "- measure: {rounds: 5}",
            "line 8: steps[2].measure.rounds: expected a whole number of at least 6, found 5.",
        ),
        (
            "- measure: {threads: 0}",
            "line 8: steps[2].measure.threads: expected a whole number of at least 1, found 0.",
        ),
        ("goal: {speedup: true}", "line 8: goal.speedup: expected a number above 0 or None, found True."),
        ("goal: {speedup: '2'}", "line 8: goal.speedup: expected a number above 0 or None, found '2'."),
        (
            "goal: {max_drop: 1}",
            (
                "line 8: goal.max_drop: expected a number of at least 0 and below 1, found 1. "
                "For a drop of at most one percentage point, write max_drop=0.01."
            ),
        ),
        ("name: 5", "line 8: name: expected text of 1 to 200 characters, found 5."),
        ("name: ''", "line 8: name: expected text of 1 to 200 characters, found ''."),
        ("version: 1", "line 8: version: expected 2, found 1."),
        (
            "- export: {format: onyx}",
            "line 8: steps[2].export.format: there is no exporter 'onyx'. Known: onnx. Did you mean 'onnx'?",
        ),
        ("student: {}", "line 8: student.model: this key is required"),
        ("goal:", "line 8: goal: expected a section with its keys, found None."),
        (
            "- prun: {}",
            (
                r"line 8: steps[2]: there is no step 'prun'. Known: distill, evaluate, export, measure, prune, "
                "recover, repeat, sensitivity, sparsify, train. Did you mean 'prune'?"
            ),
        ),
        (
            "- {prune: {}, recover: {}}",
            (
                "line 8: steps[2]: a step is {'prune': {}, 'recover': {}}; expected its name with "
                "its options. For example, write `- prune: {goal: {macs: 0.5}}`."
            ),
        ),
        (
            "- distill",
            (
                "line 8: steps[2]: the step 'distill' needs a student. Give a student, or use the step "
                "recover, which trains the model itself on the teacher."
            ),
        ),
        ("- measure", "line 8: steps[2]: the step 'measure' needs a step 'export' before it. Add this step."),
        (
            "- train",
            (
                "line 8: steps[2]: the step 'train' of the teacher comes after the step 'prune'. The models of the "
                "other steps start from the teacher, are trained on it, or are compared with it. Move 'train' "
                "to the beginning. To train the pruned model, use the step recover."
            ),
        ),
        (
            "- train: {model: student}",
            (
                "line 8: steps[2]: the step 'train' needs a student. Give a student, or "
                "use the step recover, which trains the model itself on the teacher."
            ),
        ),
        ("- export\n- export", "line 9: steps[3]: there are two steps 'export'. Remove one of them."),
        ("goal: {speedup: 2}", "line 8: goal: a speedup goal needs the steps export and measure."),
    ],
)
def test_invalid_key_or_value_is_named_with_its_line(line, sentence):
    assert_refused(f"{VALID}{line}\n", sentence)


def test_invalid_list_item_is_named_with_its_own_line():
    text = f"{MINIMAL}- recover:\n    milestones:\n    - 0.5\n    - 1.5\n"
    assert_refused(text, "line 6: steps[0].recover.milestones.1: expected a number above 0 and below 1, found 1.5.")


def test_key_of_a_union_type_is_named_without_the_member_type():
    text = f"{MINIMAL}- prune:\n    goal: {{macs: 0.5}}\n    round_to: some\n"
    assert_refused(
        text,
        "line 5: steps[0].prune.round_to: expected a whole number of at least 1, 'auto' or a dict from text to whole "
        "numbers of at least 1, found 'some'.",
    )


def test_all_problems_are_listed_in_one_error():
    text = "name: 5\nteachr: {}\nteacher:\n  modl: 'm:t'\nseed: -1\nsteps:\n- train: {epochs: ten}\n"
    assert_refused(
        text,
        "line 1: name: expected text of 1 to 200 characters, found 5.",
        "line 5: seed: expected a whole number of at least 0, found -1.",
        "line 3: teacher.model: this key is required",
        "line 4: teacher.modl: unknown key. Known: model, outputs. Did you mean 'model'?",
        f"line 2: teachr: unknown key. {SECTIONS} Did you mean 'teacher'?",
        "line 7: steps[0].train.epochs: expected a whole number of at least 1, found 'ten'.",
    )


def test_empty_recipe_requires_a_teacher_and_steps():
    assert_refused("\n", "teacher: this key is required", "steps: this key is required")


def test_file_is_named_by_its_path(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    with pytest.raises(RecipeError, match=r"^/.*r\.yaml has 2 problems:\n  teacher: this key is required"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("step", ["train", "recover"])
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("{epochs: 2, warmup_epochs: 3}", "warmup_epochs is 3; expected a number from 0 to 2"),
        ("{milestones: [0.7, 0.2]}", "milestones are (0.7, 0.2); expected ascending fractions"),
    ],
)
def test_invalid_training_settings_are_refused_when_reading(step, values, sentence):
    expected = f"the training settings are not valid: {sentence}. Give values in these ranges."
    assert_refused(f"{MINIMAL}- {step}: {values}\n", f"line 3: steps[0].{step}: {expected}")


# ------------------------------------------------------------------------------------------------ overrides


def test_environment_overrides_the_file_and_the_command_line_overrides_both():
    environment = {
        "KIRSCH_RECIPE__SEED": "1",
        "KIRSCH_RECIPE__PRUNE__GOAL__MACS": "0.25",
        "KIRSCH_DATA": "elsewhere",
        "SEED": "9",
    }
    assert read_recipe(VALID).seed == 0
    assert read_recipe(VALID, (), environment).seed == 1
    assert read_recipe(VALID, (), environment).all_steps["prune"].goal.macs == 0.25
    assert read_recipe(VALID, ["seed=2", "seed=3"], environment).seed == 3


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("recover.learning_rate=1e-4", "recover.learning_rate", 1e-4),
        ("prune.exclude=[a.b, 'c*']", "prune.exclude", ("a.b", "c*")),
        ("prune.goal.macs=0.3", "prune.goal.macs", 0.3),
        ("name=no", "name", "no"),
        ("name=a=b", "name", "a=b"),
        ("data.options.deep.er={x: 1}", "data.options", {"deep": {"er": {"x": 1}}}),
        ("student.model=m:s", "student.model", "m:s"),
    ],
)
def test_any_key_can_be_set(change, key, value):
    recipe = read_recipe(VALID, [change])
    first, *names = key.split(".")
    found = recipe.all_steps[first] if first in recipe.all_steps else getattr(recipe, first)
    for name in names:
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("change", ["prune=null", "prune="])
def test_step_can_be_removed(change):
    assert [type(step) for step in read_recipe(VALID, [change]).steps] == [Recover]


def test_steps_without_options_and_repeated_steps_have_keys():
    recipe = read_recipe(
        f"{MINIMAL}- prune:\n- recover: {{}}\n- prune\n- recover\n- export:\n- measure\n",
        ["recover-2.epochs=3", "prune-2.goal.macs=0.7", "goal.macs=0.5"],
    )
    assert list(recipe.all_steps) == ["evaluate", "prune", "recover", "prune-2", "recover-2", "export", "measure"]
    second = Prune(goal=Goal(macs=0.7))
    assert recipe.steps == (Prune(), Recover(), second, Recover(epochs=3), Export(), Measure())


@pytest.mark.parametrize("first", ["prune", "prune: {goal: {macs: 0.7}}"])
def test_a_second_step_prune_needs_a_goal_of_its_own(first):
    why = (
        "The goal of the job limits the cost after all steps, as a fraction of the model before the first step "
        "'prune'. The limits of a step are fractions of the model before this step."
    )
    fix = "Give the step 'prune-2' a goal, such as macs=0.7, or goal_of: job to prune to the goal of the job."
    assert_refused(
        f"{MINIMAL}- {first}\n- recover\n- prune\n",
        f"line 5: steps[2]: the step 'prune-2' has no goal of its own. {why} {fix}",
        changes=("goal.macs=0.5",),
    )


def test_prune_without_goal_needs_a_goal_of_the_job():
    why = (
        "Neither the step nor the job limits a cost: macs, parameters, size, memory. Give the step or the job a goal, "
        "such as macs=0.5, or the step a largest drop, such as max_drop=0.02."
    )
    problem = f"the step 'prune' has no goal. {why}"
    assert_refused(VALID, f"line 3: steps[0]: {problem}", changes=("prune.goal=null",))
    assert_refused(
        f"{MINIMAL}- prune\n- measure\n",
        "line 4: steps[1]: the step 'measure' needs a step 'export' before it. Add this step.",
        f"line 3: steps[0]: {problem}",
    )
    assert read_recipe(VALID, ["prune.goal=null", "goal.parameters=0.5"]).all_steps["prune"].goal is None


def test_errors_number_the_steps_as_in_the_file_even_if_an_override_removes_one():
    assert_refused(
        VALID.replace("epochs: 5", "epochs: x"),
        "line 7: steps[1].recover.epochs: expected a whole number of at least 1, found 'x'.",
        changes=("prune=null",),
    )


@pytest.mark.parametrize("change", ["prune", "=1", "a b=1", "a..b=1", ".a=1"])
def test_invalid_override_is_refused_with_the_form(change):
    sentence = rf"--set '{re.escape(change)}' is not a change of a key\. Expected the form a\.b=value\. For example"
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(VALID, [change])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed=x", "--set seed=x: seed: expected a whole number of at least 0, found 'x'."),
        (
            "prune.min_keep=2",
            "--set prune.min_keep=2: steps[0].prune.min_keep: expected a number above 0 and up to 1, found 2.",
        ),
        (
            "prune={goal: {macs: 2}}",
            (
                "--set prune={goal: {macs: 2}}: steps[0].prune.goal.macs: the goal macs=2 is out of range. A goal is a "
                "fraction of the original, between 0 and 1 (exclusive). For half the cost use macs=0.5."
            ),
        ),
        (
            "prune.gaol.macs=1",
            (
                "--set prune.gaol.macs=1: steps[0].prune.gaol: unknown key. "
                "Known: importance, loss, norm, ranking, round_to, kinds, uniform, loadable, min_keep, keep, max_drop, "
                "metric, class_weights, minimize, exclude, keep_outputs, seed, evaluations, goal, goal_of, compensate. "
                "Did you mean 'goal'?"
            ),
        ),
        (
            "prune.goal.mac=0.5",
            (
                "--set prune.goal.mac=0.5: steps[0].prune.goal.mac: unknown key. Known: macs, parameters, size, "
                "memory. Did you mean 'macs'?"
            ),
        ),
        ("student={}", "--set student={}: student.model: this key is required"),
    ],
)
def test_invalid_override_is_named_in_place_of_a_line(change, sentence):
    assert_refused(VALID, sentence, changes=(change,))


def test_invalid_environment_variable_is_named():
    assert_refused(
        VALID,
        "KIRSCH_RECIPE__SEED: seed: expected a whole number of at least 0, found 'x'.",
        environment={"KIRSCH_RECIPE__SEED": "x"},
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed=[", r"^--set seed=\[ is not valid YAML\. Line 1: "),
        ("seed=.nan", r"^--set seed=\.nan: '\.nan' cannot be used\."),
        ("name=!!python/name:os.system", r"^--set name=!!python/name:os\.system uses the tag"),
    ],
)
def test_unreadable_override_is_named(change, sentence):
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(f"seed: 1\n{VALID}", [change])


# ------------------------------------------------------------------------------------------------ written forms


@settings(deadline=None)  # a recipe takes milliseconds, and more on a busy machine
@given(RECIPES)
def test_recipe_reads_back_from_its_yaml(recipe):
    assert read_recipe(recipe.to_yaml()) == recipe


@settings(deadline=None)  # a recipe takes milliseconds, and more on a busy machine
@given(RECIPES)
def test_recipe_reads_back_from_its_commented_form(recipe):
    assert read_recipe(commented(recipe)) == recipe


def test_each_key_of_the_commented_form_has_a_comment():
    lines = [line for line in commented(read_recipe(BUILTIN / "digits.yaml")).splitlines() if line.strip()]
    assert lines[0].startswith("# A recipe for `kirsch compress`.")
    bare = [line for line in lines if not line.startswith("#") and not re.search(r"\S  # \S", line)]
    assert bare == []
    assert any(line.startswith("    goal: {macs: 0.5}  # limits, as fractions") for line in lines)


@pytest.mark.parametrize(
    "path", [*sorted(BUILTIN.glob("*.yaml")), *sorted((ROOT / "examples").glob("*.yaml"))], ids=lambda path: path.name
)
def test_shipped_recipes_are_valid(path):
    recipe = read_recipe(path)
    assert recipe.all_steps["prune"].goal.macs == 0.5
    assert read_recipe(commented(recipe)) == recipe


def test_training_step_has_the_settings_of_training_and_the_seed_of_the_job():
    values = {"epochs": 7, "learning_rate": 0.3, "optimizer": "adamw", "warmup_epochs": 2.0, "max_grad_norm": 1.0}
    for step in (Train(**values), Distill(**values), Recover(objective="dkd", **values)):
        assert step.training(SimpleNamespace(seed=11)) == Training(**values, seed=11)
    assert Train(**values, seed=3).training(SimpleNamespace(seed=11)) == Training(**values, seed=3)


def test_steps_in_a_mapping_are_refused_with_the_form_of_a_list():
    assert_refused(
        "teacher: {model: 'm:t'}\nsteps:\n  train: {epochs: 3}\n  export: {}\n",
        "line 2: steps: expected a list of steps, found a mapping. Write each step as an item of a list, with a "
        "hyphen: `- train: {...}`.",
    )
