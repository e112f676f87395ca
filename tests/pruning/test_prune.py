"""Removal with proof, plans by hand, and pruned models on disk."""

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
from proving import shaken

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
    model = shaken(build())
    return model, kirsch.plan(kirsch.trace(model, IMAGE), kirsch.Goal(macs=0.5))


def equal(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def edited(plan, **changes):
    content = json.loads(plan.to_json())
    content["groups"][0] |= changes
    return kirsch.Plan.from_json(json.dumps(content))


def test_the_result_is_verified_and_says_what_an_optimizer_must_do(case):
    found = prune_with_verification(*case)
    assert found.verification.passed
    assert any("make a new one" in note for note in found.notes)


def test_what_the_example_does_not_show_is_said():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.values, self.hidden, self.score = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            weights = self.score(self.hidden(x).tanh()).softmax(1)
            return self.head((weights * self.values(x)).sum(1))

    for tokens, said in ((1, True), (5, False)):  # the weight of a single token is 1, whatever its score
        model = shaken(Pooled())
        found = prune_with_verification(
            model, kirsch.plan(kirsch.trace(model, torch.randn(2, tokens, 4)), kirsch.Goal(macs=0.6))
        )
        assert any("no output depends on `hidden`, `score`:" in note for note in found.notes) is said


def test_a_plan_survives_json_and_cuts_the_same(case):
    model, plan = case
    again = kirsch.Plan.from_json(plan.to_json())
    assert again == plan
    assert equal(kirsch.prune(model, plan), kirsch.prune(model, again))


def test_a_plan_edited_by_hand_is_obeyed(case):
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
def test_a_plan_edited_wrongly_is_refused(case, changes, sentence):
    model, plan = case
    with pytest.raises(PlanError, match=sentence):
        kirsch.prune(model, edited(plan, **changes))


def test_a_plan_for_another_model_is_refused_with_both_named(case):
    _, plan = case
    with pytest.raises(PlanError, match=r"for another model: Sequential with \d.*This model is Sequential with \d"):
        kirsch.prune(build(width=8), plan)


def test_nothing_is_returned_when_the_proof_fails(case, monkeypatch):
    model, plan = case
    before = copy.deepcopy(model)
    plain = surgery.cut

    def wrong(*args):
        pruned = plain(*args)
        pruned[0].bias.data = pruned[0].bias.data.roll(1)
        return pruned

    monkeypatch.setattr(surgery, "cut", wrong)
    with pytest.raises(VerificationError, match="no model was returned; the original is unchanged"):
        kirsch.prune(model, plan)
    assert equal(before, model)
    assert kirsch.prune(model, plan, verify=False) is not None


def several():
    """Five groups, each of the outputs of one layer."""
    return shaken(nn.Sequential(*(nn.Conv2d(3 if not place else 8, 8, 1) for place in range(6)))), IMAGE


def cut_wrongly(monkeypatch, wrong):
    """The kept rows of a weight are in another order wherever `wrong` says so of the model."""
    cut = surgery.cut

    def planted(model, graph, keep):
        pruned = cut(model, graph, keep)
        for layer in wrong(pruned):
            layer.weight.data = layer.weight.data.roll(1, 0)
        return pruned

    monkeypatch.setattr(surgery, "cut", planted)


def test_the_group_that_goes_wrong_is_named(monkeypatch):
    model, inputs = several()
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.4))
    assert len(plan.groups) > 3
    cut_wrongly(monkeypatch, lambda pruned: [pruned[3]] if pruned[3].out_channels < 8 else [])
    with pytest.raises(VerificationError, match=r"The cut of '3' by itself is wrong already\. Exclude '3', and report"):
        kirsch.prune(model, plan)


def test_groups_that_go_wrong_together_are_named(monkeypatch):
    model, inputs = several()
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.4))
    both = lambda pruned: [pruned[1]] if pruned[1].out_channels < 8 and pruned[4].out_channels < 8 else []  # noqa: E731
    cut_wrongly(monkeypatch, both)
    with pytest.raises(VerificationError, match=r"The cut of '1', '2', '3' and \d more by itself .* no half of it"):
        kirsch.prune(model, plan)


def test_where_no_cut_is_at_fault_none_is_named(monkeypatch):
    model, inputs = several()
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.4))
    cut_wrongly(monkeypatch, lambda pruned: [pruned[5]])
    with pytest.raises(VerificationError) as caught:
        kirsch.prune(model, plan)
    assert "by itself" not in str(caught.value)


def test_saved_and_loaded_is_bit_equal(case, tmp_path):
    model, plan = case
    small = kirsch.prune(model, plan)
    kirsch.save(small, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", build)
    assert equal(small, loaded)
    assert torch.equal(small(IMAGE), loaded.eval()(IMAGE))
    assert not list((tmp_path / "small").glob("*.pt*"))


def test_pruned_twice_is_saved_and_loaded_too(case, tmp_path):
    once = kirsch.prune(*case)
    twice = kirsch.prune(once, kirsch.plan(kirsch.trace(once, IMAGE), kirsch.Goal(macs=0.6)))
    kirsch.save(twice, tmp_path / "small")
    assert equal(twice, kirsch.load(tmp_path / "small", build))


class Filling(nn.Module):
    """Has a buffer that its first run replaces by one of another shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("positions", torch.zeros(1))

    def forward(self, x):
        if self.positions.shape != x.shape:
            self.positions = torch.arange(x.numel()).reshape(x.shape) / 100
        return self.second(self.first(x + self.positions).relu())


def test_a_model_that_fills_its_buffers_when_it_runs_is_loaded(tmp_path):
    model, inputs = shaken(Filling()), torch.randn(3, 4)
    model(inputs)
    pruned = kirsch.prune(model, kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(params=0.6)))
    kirsch.save(pruned, tmp_path / "small")
    assert torch.equal(kirsch.load(tmp_path / "small", Filling).eval()(inputs), pruned(inputs))


def test_a_model_that_was_not_pruned_is_not_saved(tmp_path):
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
    """Change the entries of a manifest by hand, so that it is still one."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content["files"])
    files.write_json(folder / "manifest.json", content)


@pytest.mark.parametrize(
    "change",
    [dict.clear, lambda entries: entries.pop("model.safetensors"), lambda entries: entries.pop("plan.json")],
)
def test_a_manifest_that_does_not_name_all_lets_no_altered_weights_pass(case, tmp_path, change):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    stored = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: value + 1 for name, value in stored.items()}, weights)
    rewrite_manifest(tmp_path / "small", change)
    with pytest.raises(CheckpointError, match=r"names no files|is not in its manifest|does not have the sha256"):
        kirsch.load(tmp_path / "small", build)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_saved_model_without_one_of_its_files_is_none_whatever_its_manifest(case, tmp_path, name):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    (tmp_path / "small" / name).unlink()
    files.write_manifest(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"holds no model of kirsch\.save\."):
        kirsch.load(tmp_path / "small", build)


def test_a_saved_model_with_a_file_more_is_refused_by_its_name(case, tmp_path):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    (tmp_path / "small" / "plan.2.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"plan\.2\.json is not in its manifest\..*keep other files elsewhere"):
        kirsch.load(tmp_path / "small", build)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m[1].half() and m])
def test_a_model_comes_back_in_its_types(case, tmp_path, change):
    """`build` makes single precision, as most code does."""
    small = change(kirsch.prune(*case))
    kirsch.save(small, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", build)
    for name, value in small.state_dict().items():
        assert (loaded.state_dict()[name].dtype, name) == (value.dtype, name)
    assert equal(small, loaded)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_model_that_was_pruned_in_other_types_than_it_is_built_in_comes_back(tmp_path, kind):
    model, inputs = shaken(build()).to(kind), IMAGE.to(kind)
    small = kirsch.prune(model, kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.5)))
    kirsch.save(small, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", build)
    assert equal(small, loaded)
    assert torch.equal(small(inputs), loaded.eval()(inputs))


def test_another_architecture_is_refused_at_loading(case, tmp_path):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    with pytest.raises((PlanError, LoadError), match="another model"):
        kirsch.load(tmp_path / "small", lambda: build(width=8))


def test_another_class_on_which_the_inputs_fail_is_named_first(case, tmp_path):
    kirsch.save(kirsch.prune(*case), tmp_path / "small")
    sentence = r"is for Sequential, and the model given is Linear\. It cannot be applied: .* Give the Sequential"
    with pytest.raises(PlanError, match=sentence):
        kirsch.load(tmp_path / "small", lambda: nn.Linear(3, 3))
    with pytest.raises(PlanError, match=sentence):
        kirsch.prune(nn.Linear(3, 3), kirsch.Plan.read(tmp_path / "small" / "plan.json"), example_inputs=IMAGE)


def test_the_regularizers_in_closed_form():
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
def test_a_wrong_strength_is_refused(strength):
    with pytest.raises(UsageError, match="strength"):
        L1(strength)
