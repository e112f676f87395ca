"""A whole job as data: what is refused, what changes it, and that it reads back to itself."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.errors import RecipeError
from kirsch.recipes.recipe import BUILTIN, Distill, Recipe, Train, commented, read_recipe

ROOT = Path(__file__).parents[2]
LEAST = "teacher: {model: 'm:t'}\n"

VALID = f"""{LEAST}prune:
  goal:
    macs: 0.5
  round_to: 4
recover:
  train: {{epochs: 5}}
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
        "clip_norm": st.none() | POSITIVE,
        "accumulate": st.integers(1, 64),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "ema": st.none() | FRACTIONS,
    },
)
OBJECTIVES = st.sampled_from(["dkd", "at"]) | st.fixed_dictionaries(
    {
        "terms": st.lists(
            st.fixed_dictionaries({}, optional={"weight": POSITIVE, "name": NAMES, "options": st.just({})})
        )
    },
    optional={"label_weight": POSITIVE, "label_smoothing": st.floats(0, 1, exclude_max=True)},
)
DISTILS = st.fixed_dictionaries(
    {}, optional={"temperature": POSITIVE, "weight": st.floats(0, 1), "train": TRAINS}
) | st.fixed_dictionaries({"objective": OBJECTIVES}, optional={"train": TRAINS})
RECIPES = st.fixed_dictionaries(
    {"teacher": st.fixed_dictionaries({"model": NAMES}, optional={"train": st.none() | TRAINS})},
    optional={
        "name": NAMES,
        "seed": st.integers(0, 2**63 - 1),
        "data": st.fixed_dictionaries({"source": NAMES, "options": OPTIONS}),
        "student": st.none() | st.fixed_dictionaries({"model": NAMES, "distill": DISTILS}),
        "prune": st.none()
        | st.fixed_dictionaries(
            {"goal": st.fixed_dictionaries({"macs": FRACTIONS, "params": st.none() | FRACTIONS})},
            optional={
                "round_to": st.integers(1, 64) | st.just("auto"),
                "uniform": st.booleans(),
                "exclude": st.lists(NAMES),
            },
        ),
        "recover": st.none() | DISTILS,
        "export": st.none() | st.just({"format": "onnx"}),
        "measure": st.none() | st.fixed_dictionaries({"threads": st.integers(1, 64)}),
        "goal": st.fixed_dictionaries({"max_drop": st.none() | st.floats(0, 1, exclude_max=True)}),
    },
).map(Recipe.model_validate)


def assert_refused(text: str, *sentences: str, changes: tuple[str, ...] = (), environment: dict | None = None) -> None:
    """Every problem is named, one a line, and no other."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, changes, environment)
    head, *found = caught.value.what.split("\n  ")
    assert found == list(sentences)
    assert head == f"The recipe has {'a problem' if len(found) == 1 else f'{len(found)} problems'}:"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sede: 1", "line 8: sede: unknown key. Did you mean 'seed'?"),
        ("zzzzzz: 1", "line 8: zzzzzz: unknown key."),
        ("goal: {max_dorp: 0.1}", "line 8: goal.max_dorp: unknown key. Did you mean 'max_drop'?"),
        ("seed: one", "line 8: seed: input should be a valid integer, found 'one'"),
        ("seed: -1", "line 8: seed: input should be greater than or equal to 0, found -1"),
        (f"seed: {2**63}", f"line 8: seed: input should be less than {2**63}, found {2**63}"),
        ("seed: 1.0", "line 8: seed: input should be a valid integer, found 1.0"),
        ("seed: '1'", "line 8: seed: input should be a valid integer, found '1'"),
        ("measure: {rounds: true}", "line 8: measure.rounds: input should be a valid integer, found True"),
        ("measure: {rounds: 9}", "line 8: measure.rounds: input should be greater than or equal to 10, found 9"),
        ("measure: {threads: 0}", "line 8: measure.threads: input should be greater than or equal to 1, found 0"),
        ("goal: {speedup: true}", "line 8: goal.speedup: input should be a valid number, found True"),
        ("goal: {speedup: '2'}", "line 8: goal.speedup: input should be a valid number, found '2'"),
        ("goal: {max_drop: 1}", "line 8: goal.max_drop: input should be less than 1, found 1"),
        ("name: 5", "line 8: name: input should be a valid string, found 5"),
        ("name: ''", "line 8: name: string should have at least 1 character, found ''"),
        ("version: 2", "line 8: version: input should be 1, found 2"),
        ("export: {format: onyx}", "line 8: export.format: input should be 'onnx', found 'onyx'"),
        ("student: {distill: {}}", "line 8: student.model: this key is needed"),
        ("goal:", "line 8: goal: input should be a valid dictionary or instance of Wanted, found None"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_line(line, sentence):
    assert_refused(f"{VALID}{line}\n", sentence)


def test_a_wrong_item_of_a_list_has_its_own_line():
    text = f"{LEAST}recover:\n  train:\n    milestones:\n    - 0.5\n    - 1.5\n"
    assert_refused(text, "line 6: recover.train.milestones.1: input should be less than 1, found 1.5")


def test_a_key_that_may_be_of_two_kinds_keeps_its_own_name():
    text = f"{LEAST}prune:\n  goal: {{macs: 0.5}}\n  round_to: some\n"
    assert_refused(
        text,
        "line 4: prune.round_to: input should be a valid integer, found 'some'",
        "line 4: prune.round_to: input should be 'auto', found 'some'",
        "line 4: prune.round_to: input should be a valid dictionary, found 'some'",
    )


def test_all_problems_are_said_at_once():
    text = "name: 5\nteachr: {}\nteacher:\n  modl: 'm:t'\n  train: {epochs: ten}\nseed: -1\n"
    assert_refused(
        text,
        "line 1: name: input should be a valid string, found 5",
        "line 6: seed: input should be greater than or equal to 0, found -1",
        "line 3: teacher.model: this key is needed",
        "line 5: teacher.train.epochs: input should be a valid integer, found 'ten'",
        "line 4: teacher.modl: unknown key. Did you mean 'model'?",
        "line 2: teachr: unknown key. Did you mean 'teacher'?",
    )


def test_an_empty_recipe_wants_a_teacher():
    assert_refused("\n", "teacher: this key is needed")


def test_a_file_is_named_by_its_path(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    with pytest.raises(RecipeError, match=r"^The .*r\.yaml has a problem:\n  teacher: this key is needed"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("section", ["teacher:\n  model: m:t\n  train:", "teacher: {model: m:t}\nrecover:\n  train:"])
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("{epochs: 2, warmup_epochs: 3}", "warmup_epochs is 3.0; a number from 0 to 2 is needed"),
        ("{milestones: [0.7, 0.2]}", "milestones are (0.7, 0.2); ascending fractions between 0 and 1 are needed"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_any_other_has_run(section, values, sentence):
    line, key = (3, "teacher.train") if section.startswith("teacher:\n") else (3, "recover.train")
    assert_refused(f"{section} {values}\n", f"line {line}: {key}: the training settings are wrong: {sentence}")


@pytest.mark.parametrize("missing", ["export", "measure"])
def test_a_speedup_that_nothing_is_timed_for_is_refused(missing):
    """It would count as met."""
    assert_refused(
        f"{LEAST}{missing}: null\ngoal: {{speedup: 2}}\n",
        "line 3: goal: a speedup is wanted, and without the sections export and measure nothing is timed",
    )


# ------------------------------------------------------------------------------------------------ what changes it


def test_the_environment_changes_the_file_and_the_command_line_both():
    environment = {
        "KIRSCH_RECIPE__SEED": "1",
        "KIRSCH_RECIPE__PRUNE__GOAL__MACS": "0.25",
        "KIRSCH_DATA": "elsewhere",
        "SEED": "9",
    }
    assert read_recipe(VALID).seed == 0
    assert read_recipe(VALID, (), environment).seed == 1
    assert read_recipe(VALID, (), environment).prune.goal.macs == 0.25
    assert read_recipe(VALID, ["seed=2", "seed=3"], environment).seed == 3


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("prune=null", "prune", None),
        ("prune=", "prune", None),
        ("teacher.train=null", "teacher.train", None),
        ("recover.train.learning_rate=1e-4", "recover.train.learning_rate", 1e-4),
        ("prune.exclude=[a.b, 'c*']", "prune.exclude", ("a.b", "c*")),
        ("name=no", "name", "no"),
        ("name=a=b", "name", "a=b"),
        ("data.options.deep.er={x: 1}", "data.options", {"deep": {"er": {"x": 1}}}),
        ("student.model=m:s", "student.model", "m:s"),
    ],
)
def test_any_key_can_be_set(change, key, value):
    found = read_recipe(VALID, [change])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_a_section_that_is_null_can_be_filled():
    text = f"{LEAST}recover: null\nprune:\n"
    recipe = read_recipe(text, ["recover.weight=0.5", "prune.goal.params=0.5"])
    assert recipe.recover == Distill(weight=0.5)
    assert recipe.prune.goal.params == 0.5
    assert read_recipe(text).recover is None


@pytest.mark.parametrize("change", ["prune", "=1", "a b=1", "a..b=1", ".a=1", "a-b=1"])
def test_what_is_no_change_is_said_with_the_form(change):
    sentence = (
        rf"--set '{re.escape(change)}' is no change\. Its form is a\.b=value\. Write --set prune\.goal\.macs=0\.4\."
    )
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(VALID, [change])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed=x", "--set seed=x: seed: input should be a valid integer, found 'x'"),
        (
            "prune.min_keep=2",
            "--set prune.min_keep=2: prune.min_keep: input should be less than or equal to 1, found 2",
        ),
        (
            "prune={goal: {macs: 2}}",
            "--set prune={goal: {macs: 2}}: prune.goal.macs: input should be less than 1, found 2",
        ),
        ("prune.gaol.macs=1", "--set prune.gaol.macs=1: prune.gaol: unknown key. Did you mean 'goal'?"),
        ("student={}", "--set student={}: student.model: this key is needed"),
        ("student.distill.weight=1", "--set student.distill.weight=1: student.model: this key is needed"),
    ],
)
def test_a_wrong_change_is_named_and_no_line_of_the_file(change, sentence):
    assert_refused(VALID, sentence, changes=(change,))


def test_a_wrong_variable_is_named():
    assert_refused(
        VALID,
        "KIRSCH_RECIPE__SEED: seed: input should be a valid integer, found 'x'",
        environment={"KIRSCH_RECIPE__SEED": "x"},
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed=[", r"^--set seed=\[ is no YAML\. Line 1: "),
        ("seed=.nan", r"^--set seed=\.nan: '\.nan' cannot be used\."),
        ("name=!!python/name:os.system", r"^--set name=!!python/name:os\.system uses the tag"),
        ("seed.x=1", r"^--set seed\.x=1: 'seed' holds a value, not a section\."),
    ],
)
def test_a_change_that_cannot_be_read_is_named(change, sentence):
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(f"seed: 1\n{VALID}", [change])


# ------------------------------------------------------------------------------------------------ reading back


@given(RECIPES)
def test_a_recipe_reads_back_from_its_yaml(recipe):
    assert read_recipe(recipe.to_yaml()) == recipe


@given(RECIPES)
def test_a_recipe_reads_back_from_its_commented_form(recipe):
    assert read_recipe(commented(recipe)) == recipe


def test_each_key_of_the_commented_form_has_its_comment():
    lines = [line for line in commented(read_recipe(BUILTIN / "digits.yaml")).splitlines() if line.strip()]
    assert lines[0].startswith("# A recipe for `kirsch compress`.")
    bare = [line for line in lines if not line.startswith("#") and not re.search(r"\S  # \S", line)]
    assert bare == []
    assert "    macs: 0.5  # multiply-accumulates" in lines


@pytest.mark.parametrize(
    "path", [*sorted(BUILTIN.glob("*.yaml")), *sorted((ROOT / "examples").glob("*.yaml"))], ids=lambda path: path.name
)
def test_what_is_shipped_is_valid(path):
    recipe = read_recipe(path)
    assert recipe.prune.goal.macs == 0.5
    assert read_recipe(commented(recipe)) == recipe


def test_the_settings_of_a_training_are_those_of_its_section():
    section = Train(epochs=7, learning_rate=0.3, optimizer="adamw", schedule="multistep", warmup_epochs=2, clip_norm=1)
    found = dataclasses.asdict(section.settings(seed=11))
    assert found == {**section.model_dump(), "seed": 11}
