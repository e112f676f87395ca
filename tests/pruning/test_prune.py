"""`kirsch.prune` with verification, edited plans, saved models, and regularizers."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

import kirsch
from kirsch import files
from kirsch.errors import CheckpointError, LoadError, PlanError, UsageError, VerificationError
from kirsch.frameworks.pytorch.surgery import cut as surgery
from kirsch.pruning.prune import prune_with_verification
from kirsch.pruning.regularizers import L1, Slimming
from trace_and_cut import with_noise

IMAGE = torch.randn(2, 3, 8, 8)


def build(width=16):
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


@pytest.fixture
def case():
    model = with_noise(build())
    return model, kirsch.plan(kirsch.trace(model, IMAGE), kirsch.Goal(macs=0.5))


def equal(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def edited(plan, **changes):
    content = json.loads(plan.to_json())
    content["groups"][0] |= changes
    return kirsch.Plan.from_json(json.dumps(content))


def test_the_result_is_verified_and_has_a_note_on_optimizers(case):
    found = prune_with_verification(*case)
    assert found.verification.passed
    assert any("make a new optimizer" in note for note in found.notes)


def test_the_result_prints_cost_verification_and_notes(case):
    found = kirsch.prune_with_verification(*case)
    lines = str(found).splitlines()
    assert lines[0] == "Sequential   2 groups pruned"
    assert [line.split()[0] for line in lines[1:5]] == ["parameters", "MACs", "activations", "verified"]
    assert lines[5:] == [f"note         {note}" for note in found.notes]
    assert "\n" not in repr(found)
    assert "verified" in found._repr_html_()


def test_modules_without_effect_on_the_outputs_have_a_note():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.values, self.hidden, self.score = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            weights = self.score(self.hidden(x).tanh()).softmax(1)
            return self.head((weights * self.values(x)).sum(1))

    for tokens, expected in ((1, True), (5, False)):  # the softmax over a single token is always 1
        model = with_noise(Pooled())
        plan = kirsch.plan(kirsch.trace(model, torch.randn(2, tokens, 4)), kirsch.Goal(macs=0.6))
        found = prune_with_verification(model, plan)
        text = "`hidden`, `score` hardly affect the outputs:"
        assert any(text in note for note in found.notes) is expected


def test_a_note_states_why_modules_without_effect_could_not_be_determined(case, monkeypatch):
    def refuse(*_):
        raise RuntimeError("derivative for aten::nearest is not implemented")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    (note,) = (note for note in prune_with_verification(*case).notes if "could not be determined" in note)
    assert "determined: RuntimeError: derivative for aten::nearest is not implemented. The verification" in note


def test_a_plan_restored_from_json_has_the_same_result(case):
    model, plan = case
    again = kirsch.Plan.from_json(plan.to_json())
    assert again == plan
    assert equal(kirsch.prune(model, plan), kirsch.prune(model, again))


def test_an_edited_plan_is_applied(case):
    model, plan = case
    assert kirsch.prune(model, edited(plan, removed=[0, 5]))[0].out_channels == 14


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"removed": [16]}, "removes unit 16 of '0'.*units 0 to 15"),
        ({"removed": list(range(16))}, "removes all 16 units of '0'"),
        ({"name": "zero"}, "names a group 'zero'"),
        ({"removed": [1, 1]}, "removes unit 1 of '0' twice"),
        ({"removed": ["a"]}, "a whole number of at least 0 is expected"),
        ({"removed": None}, "a list is expected, and null was found"),
    ],
)
def test_an_invalid_edit_of_a_plan_is_refused(case, changes, sentence):
    model, plan = case
    with pytest.raises(PlanError, match=sentence):
        kirsch.prune(model, edited(plan, **changes))


def test_a_plan_for_another_model_is_refused_with_both_models(case):
    _, plan = case
    with pytest.raises(PlanError, match=r"for another model: Sequential with \d.*This model is Sequential with \d"):
        kirsch.prune(build(width=8), plan)


def test_no_model_is_returned_if_the_verification_fails(case, monkeypatch):
    model, plan = case
    before, right = copy.deepcopy(model), kirsch.prune(*case)
    original_cut = surgery.cut

    def wrong(*args):
        pruned = original_cut(*args)
        pruned[0].bias.data = pruned[0].bias.data.roll(1)
        return pruned

    monkeypatch.setattr(surgery, "cut", wrong)
    with pytest.raises(VerificationError, match="no model was returned; the original is unchanged"):
        kirsch.prune(model, plan)
    assert equal(before, model)
    unverified = kirsch.prune(model, plan, verify=False)
    assert torch.equal(unverified[0].bias, right[0].bias.roll(1))


def model_of_five_groups():
    """Return a chain of six convolutions with a group for each except the last, and its inputs."""
    return with_noise(nn.Sequential(*(nn.Conv2d(8 if index else 3, 8, 1) for index in range(6)))), IMAGE


def plant_wrong_cut(monkeypatch, wrong_layers):
    """Make `surgery.cut` wrong: it shifts the rows of the weights of the layers that `wrong_layers(pruned)` returns."""
    cut = surgery.cut

    def planted(model, graph, keep):
        pruned = cut(model, graph, keep)
        for layer in wrong_layers(pruned):
            layer.weight.data = layer.weight.data.roll(1, 0)
        return pruned

    monkeypatch.setattr(surgery, "cut", planted)


def test_the_failing_group_is_named(monkeypatch):
    model, inputs = model_of_five_groups()
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.4))
    assert len(plan.groups) > 3
    plant_wrong_cut(monkeypatch, lambda pruned: [pruned[3]] if pruned[3].out_channels < 8 else [])
    with pytest.raises(VerificationError, match=r"The removal of '3' by itself fails\. Exclude '3', and report"):
        kirsch.prune(model, plan)


def test_groups_that_fail_only_together_are_named(monkeypatch):
    model, inputs = model_of_five_groups()
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.4))
    both = lambda pruned: [pruned[1]] if pruned[1].out_channels < 8 and pruned[4].out_channels < 8 else []  # noqa: E731
    plant_wrong_cut(monkeypatch, both)
    with pytest.raises(
        VerificationError, match=r"The removal of '1', '2', '3' and \d more by itself fails, and no half of it does"
    ):
        kirsch.prune(model, plan)


def test_no_group_is_named_if_the_failure_does_not_depend_on_groups(monkeypatch):
    model, inputs = model_of_five_groups()
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.4))
    plant_wrong_cut(monkeypatch, lambda pruned: [pruned[5]])
    with pytest.raises(VerificationError) as caught:
        kirsch.prune(model, plan)
    assert "by itself" not in str(caught.value)


def test_a_loaded_model_equals_the_saved_model_bit_for_bit(case, tmp_path):
    model, plan = case
    small = kirsch.prune(model, plan)
    kirsch.save(small, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", build)
    assert equal(small, loaded)
    assert torch.equal(small(IMAGE), loaded.eval()(IMAGE))
    assert not list((tmp_path / "small").glob("*.pt*"))


def test_a_model_pruned_twice_is_saved_and_loaded(case, tmp_path):
    once = kirsch.prune(*case)
    twice = kirsch.prune(once, kirsch.plan(kirsch.trace(once, IMAGE), kirsch.Goal(macs=0.6)))
    kirsch.save(twice, tmp_path / "small")
    assert equal(twice, kirsch.load(tmp_path / "small", build))


class Filling(nn.Module):
    """Model whose first forward pass replaces a buffer by a buffer of another shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("positions", torch.zeros(1))

    def forward(self, x):
        if self.positions.shape != x.shape:
            self.positions = torch.arange(x.numel()).reshape(x.shape) / 100
        return self.second(self.first(x + self.positions).relu())


def test_a_model_that_fills_its_buffers_in_its_first_run_is_loaded(tmp_path):
    model, inputs = with_noise(Filling()), torch.randn(3, 4)
    model(inputs)
    pruned = kirsch.prune(model, kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(parameters=0.6)))
    kirsch.save(pruned, tmp_path / "small")
    assert torch.equal(kirsch.load(tmp_path / "small", Filling).eval()(inputs), pruned(inputs))


def test_saving_a_model_that_was_not_pruned_is_refused(tmp_path):
    with pytest.raises(UsageError, match="was not pruned by Kirsch"):
        kirsch.save(build(), tmp_path / "small")


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_damaged_file_is_named(case, tmp_path, name):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    path = tmp_path / "small" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=name):
        kirsch.load(tmp_path / "small", build)


def rewrite_manifest(folder, change):
    """Change the entries of a manifest. It remains valid JSON with the expected keys."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content["files"])
    files.write_json(folder / "manifest.json", content)


@pytest.mark.parametrize(
    "change",
    [dict.clear, lambda entries: entries.pop("model.safetensors"), lambda entries: entries.pop("plan.json")],
)
def test_altered_weights_are_refused_with_an_incomplete_manifest(case, tmp_path, change):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    stored = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: value + 1 for name, value in stored.items()}, weights)
    rewrite_manifest(tmp_path / "small", change)
    with pytest.raises(CheckpointError, match=r"names no files|is not in its manifest|does not have the sha256"):
        kirsch.load(tmp_path / "small", build)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("model.safetensors", CheckpointError, r"does not contain a model of kirsch\.save\."),
        ("plan.json", LoadError, "do not fit a Sequential"),  # as of a sparse model that was not pruned
    ],
)
def test_a_folder_without_plan_or_weights_is_refused(case, tmp_path, name, error, message):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    (tmp_path / "small" / name).unlink()
    files.write_manifest(tmp_path / "small")
    with pytest.raises(error, match=message):
        kirsch.load(tmp_path / "small", build)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "plan.json").rename(folder / "plan.2.json"),
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
        lambda folder: (folder / "notes.txt").write_text("pruned"),
    ],
)
def test_a_folder_with_files_that_save_did_not_write_is_refused_although_its_manifest_lists_them(
    case, tmp_path, change
):
    folder = kirsch.save(kirsch.prune(*case), tmp_path / "small")
    change(folder)
    files.write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors and plan\.json, plan\.2\.json, …"):
        kirsch.load(folder, build)


def test_an_additional_file_in_the_folder_is_refused(case, tmp_path):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    (tmp_path / "small" / "plan.2.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"plan\.2\.json is not in its manifest\..*keep other files elsewhere"):
        kirsch.load(tmp_path / "small", build)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m[1].half() and m])
def test_a_loaded_model_has_the_types_of_the_saved_model(case, tmp_path, change):
    """`build` returns a model in single precision, as most code does."""
    small = change(kirsch.prune(*case))
    kirsch.save(small, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", build)
    for name, value in small.state_dict().items():
        assert (loaded.state_dict()[name].dtype, name) == (value.dtype, name)
    assert equal(small, loaded)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_model_pruned_in_other_types_than_build_returns_is_loaded(tmp_path, kind):
    model, inputs = with_noise(build()).to(kind), IMAGE.to(kind)
    small = kirsch.prune(model, kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.5)))
    kirsch.save(small, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", build)
    assert equal(small, loaded)
    assert torch.equal(small(inputs), loaded.eval()(inputs))


def test_loading_another_architecture_is_refused(case, tmp_path):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    with pytest.raises((PlanError, LoadError), match="another model"):
        kirsch.load(tmp_path / "small", lambda: build(width=8))


def test_the_error_for_a_build_of_another_class_names_the_class_and_not_the_inputs(case, tmp_path):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    sentence = r"is for Sequential, and the model given is Linear\. It cannot be applied: .* Give the Sequential"
    with pytest.raises(PlanError, match=sentence):
        kirsch.load(tmp_path / "small", lambda: nn.Linear(3, 3))
    with pytest.raises(PlanError, match=sentence):
        kirsch.prune(nn.Linear(3, 3), kirsch.Plan.read(tmp_path / "small" / "plan.json"), example_inputs=IMAGE)


def test_the_regularizers_equal_their_closed_form():
    model = build()
    weights = sum(float(p.detach().abs().sum()) for p in model.parameters() if p.dim() > 1)
    assert float(L1(0.5)(model).detach()) == pytest.approx(0.5 * weights, rel=1e-6)
    model[1].weight.data = torch.linspace(-1, 1, 16)
    found = Slimming(0.25)(model)
    assert float(found.detach()) == pytest.approx(0.25 * float(torch.linspace(-1, 1, 16).abs().sum()), rel=1e-6)
    found.backward()
    assert torch.equal(model[1].weight.grad, 0.25 * torch.linspace(-1, 1, 16).sign())


def test_slimming_without_batch_norm_is_refused():
    with pytest.raises(UsageError, match="no batch normalization with a scale"):
        Slimming(1e-4)(nn.Linear(3, 3))


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_an_invalid_strength_is_refused(strength):
    with pytest.raises(UsageError, match="strength"):
        L1(strength)
