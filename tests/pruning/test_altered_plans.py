"""An altered plan is applied with recomputed costs, or raises an error that names the file and the field."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import kirsch
from kirsch import files
from kirsch.errors import KirschError, PlanError
from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.graph.plan import Plan
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import with_noise

MODEL = with_noise(
    nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
)
IMAGE = torch.randn(2, 3, 6, 6)
PLAN = kirsch.plan(kirsch.trace(MODEL, IMAGE), kirsch.Goal(macs=0.75), round_to=1)
TEXT = PLAN.to_json()
GROUP = PLAN.groups[0].name
ENTRY = {"name": "", "shape": [2, 3, 6, 6], "dtype": "float32", "high": 0}
MISSING = type("Missing", (), {"__repr__": lambda _: "missing"})()


def altered(path, value):
    """Return the text of the plan with one field replaced, added or removed."""
    content = json.loads(TEXT)
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
    node = content
    for part in parents:
        node = node[part]
    if value is MISSING:
        del node[last]
    else:
        node[last] = copy.deepcopy(value)
    return json.dumps(content)


def fields(content, path=""):
    """Yield the path of every field of a plan."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield f"{path}/{key}".lstrip("/")
        yield from fields(value, f"{path}/{key}")


OPTIONAL = (
    r"groups/\d+/reason|groups/\d+/removed/\d+|method/.*|goal/macs|inputs/0|groups/\d+|inputs/0/shape/0|notes/\d+"
)
ALL_FIELDS = [path for path in fields(json.loads(TEXT)) if not path.startswith("groups/1/")]
REQUIRED = [path for path in ALL_FIELDS if not re.fullmatch(OPTIONAL, path)]

REFUSED = [
    ("kirsch_plan", True, "kirsch_plan: 1 is expected, and true"),
    ("kirsch_plan", 1.0, "kirsch_plan: 1 is expected, and 1.0"),
    ("kirsch_plan", 2, "kirsch_plan: 1 is expected, and 2"),
    ("extra", 1, "extra is not a known key"),
    ("model/extra", 1, "model.extra is not a known key"),
    ("goal/mac", 0.5, "goal.mac is not a known key (did you mean 'macs'?)"),
    ("groups/0/extra", 1, "groups[0].extra is not a known key"),
    ("method/importances", "x", "method.importances is not a known key (did you mean 'importance'?)"),
    ("tracing/as_graph", True, "fingerprint"),
    ("tracing/softmax", "kept", "fingerprint"),
    ("tracing/decisions", "example", "fingerprint"),
    ("tracing/outputs", ["0"], "fingerprint"),
    ("tracing/outputs", ["no"], "no"),
    ("tracing/module", "2", "cannot be applied"),
    ("tracing/module", "nowhere", "nowhere"),
    ("tracing/as_graph", 1, "tracing.as_graph: true or false is expected, and 1"),
    ("model/fingerprint", "0" * 64, "is for another model"),
    ("model/fingerprint", "../../x", "model.fingerprint: a sha256"),
    ("model/fingerprint", json.loads(TEXT)["model"]["fingerprint"].upper(), "model.fingerprint: a sha256"),
    ("model/parameters", 7, "model.parameters is 7 and cost.before.parameters is"),
    ("model/class", "", "model.class: a text that is not empty"),
    ("goal", "macs 0.5", "goal: an object is expected, and 'macs 0.5'"),
    ("goal/macs", "half", "goal.macs: a finite number above 0 and below 1 is expected, and 'half'"),
    ("goal/macs", True, "goal.macs"),
    ("goal/macs", 0, "goal.macs"),
    ("goal/macs", 1.5, "goal.macs"),
    ("goal/macs", float("nan"), "NaN is not a JSON number"),
    ("goal/macs", float("inf"), "Infinity is not a JSON number"),
    ("goal/macs", None, "goal.macs: a finite number above 0 and below 1 is expected, and null"),
    ("method", {"norm": 2}, "method.importance is missing"),
    ("method/norm", True, "method.norm"),
    ("method/round_to", 0, "method.round_to"),
    ("method/round_to", {"hed": 2}, "method.round_to"),
    ("method/min_keep", -1, "method.min_keep"),
    ("method/exclude", "head", "method.exclude: a list is expected"),
    ("groups", {}, "groups: a list is expected, and an object"),
    ("groups", [], "removes nothing"),
    ("groups/0", "first", "groups[0]: an object is expected, and 'first'"),
    ("groups/0/name", "nope", "names a group 'nope'"),
    ("groups/0/name", 3, "groups[0].name"),
    ("groups/0/name", PLAN.groups[1].name, "twice"),
    ("groups/0/kind", "head", "of the kind 'head'"),
    ("groups/0/kind", "chanel", "groups[0].kind: one of"),
    ("groups/0/size", 9, "has 9 units"),
    ("groups/0/size", 0, "groups[0].size"),
    ("groups/0/size", 2**70, "groups[0].size"),
    ("groups/0/removed", [1, 1], f"removes unit 1 of '{GROUP}' twice"),
    ("groups/0/removed", [8], f"removes unit 8 of '{GROUP}'. The group has units 0 to 7"),
    ("groups/0/removed", [-1], "groups[0].removed[0]"),
    ("groups/0/removed", list(range(8)), f"removes all 8 units of '{GROUP}'"),
    ("groups/0/removed", [0.0], "groups[0].removed[0]: a whole number"),
    ("groups/0/removed", ["0"], "groups[0].removed[0]"),
    ("groups/0/removed", [True], "groups[0].removed[0]"),
    ("groups/0/removed", 0, "groups[0].removed: a list"),
    ("groups/0/reason", 7, "groups[0].reason: a text"),
    ("blocks", [{"name": "2"}], "removes the block '2'"),
    ("blocks", [{"name": "2"}, {"name": "2"}], "blocks has '2' twice"),
    ("cost/after/macs", -5, "cost.after.macs: a whole number of at least 0 is expected, and -5"),
    ("cost/after/macs", 10**12, "cost.after.macs is 1,000,000,000,000, more than cost.before.macs"),
    ("cost/before/macs", 10**12, "cost.before.macs is 1,000,000,000,000"),
    ("cost/before/activations", 10**12, "cost.before.activations is 1,000,000,000,000"),
    ("cost/before/parameters", 10**12, "cost.before.parameters is 1,000,000,000,000"),
    ("cost/before/macs", 2.5, "cost.before.macs: a whole number"),
    ("inputs/0/shape", [-1], "inputs[0].shape[0]: a whole number from 0 to 268,435,456 is expected, and -1"),
    ("inputs/0/shape", [10**12], "inputs[0].shape[0]: a whole number from 0 to 268,435,456 is expected"),
    ("inputs/0/shape", [2**40, 2**40, 0], "inputs[0].shape[0]: a whole number from 0 to 268,435,456 is expected"),
    ("inputs/0/shape", [2**28, 2], "inputs of shape 268435456×2 have more than"),
    ("inputs/0/shape", [2**28, 2**28, 2**28, 0], "have more than 268,435,456 numbers; sizes of 0 count as 1"),
    ("inputs/0/shape", [2**70], "inputs[0].shape[0]"),
    ("inputs/0/shape", [1] * 99, "inputs[0].shape: at most 16 items"),
    ("inputs/0/shape", [2, 3, 7, 7], "cannot be applied"),
    ("inputs/0/shape", [3, 3, 6, 6], "cost.before.macs is"),
    ("inputs/0/shape", [4], "cannot be applied"),
    ("inputs/0/dtype", "__class__", "inputs[0].dtype: one of"),
    ("inputs/0/high", 2**70, "inputs[0].high: a whole number from 0 to 9,223,372,036,854,775,807 is expected"),
    ("inputs/0/high", 3, "inputs[0].high is 3; 0 is the largest for float32"),
    ("inputs", [ENTRY, ENTRY], "cannot be applied"),
    ("inputs", [ENTRY | {"name": "x"}] * 2, "two inputs of the same name, 'x'"),
    ("inputs", [], "does not store its example inputs"),
    ("notes", ["fine", 7], "notes[1]: a text"),
    ("configuration", {"hidden_size": 4}, "states a configuration: hidden_size"),
    ("configuration", {"hidden_size": float("nan")}, "NaN is not a JSON number"),
    ("configuration", {"hidden_size": "4"}, "configuration.hidden_size: a finite number"),
    ("configuration", {"hidden_size": -4}, "configuration.hidden_size"),
]
APPLIED = [
    ("inputs/0/dtype", "float64"),
    ("groups/0/reason", MISSING),
    ("groups/0/reason", "edited by hand"),
    ("groups/0/removed", [0]),
    ("groups/0/removed", []),
    ("groups/0/removed", [7, 0, 3]),
    ("groups/0/removed", [0, 1, 2, 3, 4, 5, 6]),
    ("groups/0", MISSING),
    ("method", {}),
    ("goal", {}),
    ("goal/macs", 0.01),
    ("goal/parameters", 0.02),
    ("cost/after/macs", 5),
    ("cost/after/parameters", 0),
    ("notes", ["macs land at 1.0%, as wanted"]),
    ("model/class", "Other"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_an_invalid_plan_is_refused_with_file_and_field(tmp_path, path, value, sentence):
    file = tmp_path / "edited.json"
    file.write_text(altered(path, value))
    with pytest.raises(KirschError, match=re.escape(sentence)) as caught:
        kirsch.prune(MODEL, Plan.read(file))
    assert str(file) in caught.value.what


class LayerForLargeBatches(nn.Module):
    """A network in which a third linear layer reads the hidden units if the batch has more than two samples."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.side = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden) + (self.side(hidden) if len(x) > 2 else 0)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (3, r"tracing or inputs of the plan were edited\. It was traced with inputs of shape 3×4\."),
        (0, r"The example inputs have no samples: their shapes are \(0, 4\)\..* Or correct the inputs of the plan"),
    ],
)
def test_inputs_that_change_the_coupled_units_are_named(batch, sentence):
    model = LayerForLargeBatches().eval()
    content = json.loads(kirsch.plan(kirsch.trace(model, torch.randn(2, 4)), kirsch.Goal(parameters=0.75)).to_json())
    content["inputs"][0]["shape"][0] = batch
    with pytest.raises(KirschError, match=sentence):
        kirsch.prune(model, Plan.from_json(json.dumps(content)))


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_field_is_named(tmp_path, path):
    file = tmp_path / "edited.json"
    file.write_text(altered(path, MISSING))
    with pytest.raises(KirschError) as caught:
        kirsch.prune(MODEL, Plan.read(file))
    assert str(file) in caught.value.what
    assert path.rpartition("/")[2] in str(caught.value) or path.rpartition("/")[2].isdecimal()


NULLABLE = {
    f"method/{name}" for name in ("kinds", "keep", "loadable", "max_drop", "metric", "class_weights", "minimize")
}


@pytest.mark.parametrize("path", ALL_FIELDS)
def test_a_field_of_the_wrong_type_is_refused(tmp_path, path):
    file = tmp_path / "edited.json"
    number = 0.5 if path.endswith(("uniform", "loadable", "as_graph")) else False
    for value in ({"deep": []}, [[]], number, *([] if path in NULLABLE else [None])):
        file.write_text(altered(path, value))
        with pytest.raises(KirschError) as caught:
            kirsch.prune(MODEL, Plan.read(file))
        assert str(file) in caught.value.what


@pytest.mark.parametrize("key", ["goal", "class", "macs", "removed", "shape", "module"])
def test_a_repeated_key_is_refused(key):
    twice = re.sub(rf'"{key}":', f'"{key}": 0, "{key}":', TEXT, count=1)
    with pytest.raises(PlanError, match=rf"[Tt]he key '{key}' is given twice"):
        Plan.from_json(twice)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not JSON: Expecting property name"),
        ("", "not JSON"),
        ("[1]", 'The key "kirsch_plan": 1 is missing'),
        ("{}", 'The key "kirsch_plan": 1 is missing'),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 levels deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 100 levels deep"),
        (TEXT.replace('"notes": [', '"notes": ["\\ud800", '), "half of a surrogate pair"),
        (TEXT.encode("utf-16"), "not UTF-8"),
        (TEXT.replace("0.75", "1e999"), "1e999 is too large"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_text_that_is_not_a_plan_is_refused(tmp_path, text, sentence):
    file = tmp_path / "edited.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=re.escape(sentence)) as caught:
        Plan.read(file)
    assert str(file) in caught.value.what


@pytest.mark.parametrize(("path", "value"), APPLIED, ids=lambda value: str(value)[:40])
def test_an_edited_plan_is_applied_and_its_costs_are_the_costs_of_the_pruned_model(path, value):
    found = prune_with_verification(MODEL, Plan.from_json(altered(path, value)))
    assert (found.plan.after.parameters, found.plan.after.macs) == count(found.model, IMAGE)
    assert found.plan.before == PLAN.before
    assert found.plan.model == "Sequential"
    assert not any("as wanted" in note for note in found.notes)


def test_an_edit_that_changes_the_cost_has_a_note_and_the_goal_is_checked_again(tmp_path):
    plan = Plan.from_json(altered("groups/0/removed", []))
    plan = Plan.from_json(plan.to_json().replace('"macs": 0.75', '"macs": 0.2'))
    found = prune_with_verification(MODEL, plan)
    assert any("was edited after it was made: it states" in note for note in found.notes)
    assert any("The goal is missed: MACs are" in note for note in found.notes)
    kirsch.save(found.model, tmp_path / "small")
    stored = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert stored["cost"]["after"] == found.plan.after.to_dict()
    assert stored["notes"] == list(found.plan.notes)
    assert not any("points below the goal" in note for note in stored["notes"])


def test_an_unregistered_importance_has_a_note_and_the_plan_is_applied(tmp_path):
    """The program that made the plan may have registered an importance that this program has not registered."""
    found = prune_with_verification(MODEL, Plan.from_json(altered("method/importance", "magnitud")))
    (note,) = [note for note in found.notes if "importance" in note]
    assert note.startswith(
        "The plan names the importance 'magnitud', which is not registered. Did you mean 'magnitude'?"
    )
    assert found.plan.groups == PLAN.groups
    kirsch.save(found.model, tmp_path / "small")
    assert kirsch.load(tmp_path / "small", lambda: copy.deepcopy(MODEL))


@pytest.mark.parametrize("name", ["magnitude", "random", "influence", "change"])
def test_a_registered_importance_has_no_note(name):
    found = prune_with_verification(MODEL, Plan.from_json(altered("method/importance", name)), verify=False)
    assert not any("importance" in note for note in found.notes)


def test_a_different_class_name_has_a_note():
    found = prune_with_verification(MODEL, Plan.from_json(altered("model/class", "Other")))
    assert "The plan names the class Other; the model given is a Sequential." in found.notes


def test_an_unedited_plan_is_applied_without_a_note_on_its_costs():
    found = prune_with_verification(MODEL, Plan.from_json(TEXT))
    assert found.plan == PLAN
    assert not any(note.startswith("The plan ") for note in found.notes)


def test_costs_are_recomputed_on_the_given_example_inputs():
    found = prune_with_verification(MODEL, Plan.from_json(TEXT), example_inputs=IMAGE[:1])
    assert any(
        "was made for other inputs; its costs are recomputed on inputs of shape 1×3×6×6" in n for n in found.notes
    )
    assert (found.plan.after.parameters, found.plan.after.macs) == count(found.model, IMAGE[:1])
    assert found.plan.inputs[0].shape == (1, 3, 6, 6)


def test_an_invalid_second_plan_of_a_saved_model_is_named(tmp_path):
    once = kirsch.prune(MODEL, PLAN)
    twice = kirsch.prune(once, kirsch.plan(kirsch.trace(once, IMAGE), kirsch.Goal(macs=0.8), round_to=1))
    kirsch.save(twice, tmp_path / "small")
    file = tmp_path / "small" / "plan.2.json"
    file.write_text(file.read_text().replace('"goal"', '"gaol"'))
    files.write_manifest(tmp_path / "small")
    with pytest.raises(PlanError, match=r"plan\.2\.json is not valid\. gaol is not a known key"):
        kirsch.load(tmp_path / "small", lambda: copy.deepcopy(MODEL))


def test_integers_outside_an_embedding_table_raise_an_error_about_the_inputs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = kirsch.plan(kirsch.trace(model, torch.randint(0, 9, (1, 4))), kirsch.Goal(macs=0.7), round_to=1)
    file = tmp_path / "edited.json"
    file.write_text(re.sub(r'"high": \d+', '"high": 900', plan.to_json()))
    with pytest.raises(KirschError, match=r"does not run on the inputs of the plan\. IndexError") as caught:
        kirsch.prune(model, Plan.read(file))
    assert str(file) in caught.value.what


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(ALL_FIELDS), JSON)
def test_any_value_of_a_field_raises_only_kirsch_errors(path, value):
    try:
        plan = Plan.from_json(altered(path, value))
    except PlanError:
        return
    again = Plan.from_json(plan.to_json())
    assert again == plan
    try:
        found = prune_with_verification(MODEL, plan, verify=False)
    except KirschError:
        return
    assert (found.plan.after.parameters, found.plan.after.macs) == count(found.model, IMAGE)


@settings(max_examples=300)
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 9), st.text(max_size=4))
def test_any_edit_of_the_text_is_a_plan_error_or_yields_a_plan_that_can_be_saved(place, length, typed):
    text = TEXT[:place] + typed + TEXT[place + length :]
    try:
        plan = Plan.from_json(text)
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
