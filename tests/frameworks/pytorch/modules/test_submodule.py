"""The option `module` prunes one submodule. Its inputs, its outputs and the rest of the model keep their sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import ModelError, UnknownNameError, UsageError, VerificationError
from kirsch.graph.plan import Plan

IMAGE = torch.randn(2, 3, 8, 8)


class Detector(nn.Module):
    """A backbone with two heads. `forward` chooses the head by the values of the features."""

    def __init__(self, bound=0.0):
        super().__init__()
        self.bound = bound
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1)
        )
        self.head, self.other = nn.Linear(6, 4), nn.Linear(6, 4)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        features = self.backbone(x).mean((2, 3))
        if features.sum() > self.bound:
            return self.head(features)
        return self.other(features)


@pytest.fixture
def detector():
    return Detector().eval()


def test_a_model_that_branches_on_values_raises_an_error_and_its_backbone_can_be_pruned(detector):
    branch = Detector.forward.__code__.co_firstlineno + 2
    with pytest.raises(ModelError, match=rf'test_submodule\.py:{branch}.*module="backbone"'):
        kirsch.trace(detector, IMAGE)
    graph = kirsch.trace(detector, IMAGE, module="backbone")
    assert [(group.name, group.size) for group in graph.groups] == [("0", 8), ("2", 8)]
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5), round_to=1)
    pruned = kirsch.prune(detector, plan)
    assert type(pruned) is Detector
    assert pruned.backbone[0].out_channels < 8
    assert pruned.backbone[4].out_channels == 6
    assert pruned(IMAGE).shape == (2, 4)
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())
    torch.testing.assert_close(pruned.head.weight, detector.head.weight)


def test_a_model_pruned_with_the_option_module_is_saved_and_loaded(detector, tmp_path):
    plan = kirsch.plan(kirsch.trace(detector, IMAGE, module="backbone"), kirsch.Goal(macs=0.5), round_to=1)
    pruned = kirsch.prune(detector, Plan.from_json(plan.to_json()))
    kirsch.save(pruned, tmp_path / "model")
    again = kirsch.load(tmp_path / "model", lambda: Detector().eval())
    assert torch.equal(again(IMAGE), pruned(IMAGE))


def test_parameters_shared_with_the_rest_of_the_model_are_not_cut():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(
                nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
            )
            self.last = nn.Linear(8, 8, bias=False)
            self.last.weight = self.part[0].weight

        def forward(self, x):
            return self.last(self.part(x))

    graph = kirsch.trace(Shared(), torch.randn(2, 8), module="part")
    assert [(group.name, group.size) for group in graph.groups] == [("2", 8)]
    assert "the rest of the model also uses the parameter" in {blocker.reason for blocker in graph.blockers}


def test_a_submodule_with_keyword_only_inputs_is_pruned():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x, *, gain):
            return self.last(torch.relu(self.first(x)) * gain)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x, gain=x.mean(-1, keepdim=True)) + 1

    model = Outer()
    graph = kirsch.trace(model, torch.randn(2, 6), module="inner")
    assert [spec.name for spec in graph.inputs] == ["x", "gain"]
    plan = Plan.from_json(kirsch.plan(graph, kirsch.Goal(macs=0.5)).to_json())
    assert kirsch.prune(model, plan).inner.first.out_features == 4


def test_the_error_for_an_unknown_module_proposes_the_nearest_name(detector):
    with pytest.raises(UnknownNameError, match=r"no module 'backbon'.*Did you mean 'backbone'"):
        kirsch.trace(detector, IMAGE, module="backbon")


def test_a_module_that_the_model_does_not_call_raises_an_error(detector):
    with pytest.raises(ModelError, match=r"The part 'spare' of Detector is not run\..*Trace the part by itself"):
        kirsch.trace(detector, IMAGE, module="spare")


def test_tracing_a_submodule_of_a_model_that_does_not_run_raises_an_error(detector):
    with pytest.raises(ModelError, match=r"The model Detector does not run\. RuntimeError: .*Check the example inputs"):
        kirsch.trace(detector, IMAGE[:, :2], module="backbone")
    assert not detector.backbone._forward_pre_hooks


def test_the_error_for_an_unknown_value_of_decisions_lists_the_known(detector):
    with pytest.raises(UsageError, match=r"`decisions` .* is 'guess'; expected 'refuse' or 'example'"):
        kirsch.trace(detector, IMAGE, decisions="guess")


def test_the_branch_that_the_example_inputs_take_is_traced_if_decisions_is_example():
    detector = Detector(bound=-1e9).eval()
    graph = kirsch.trace(detector, IMAGE, decisions="example")
    pruned = kirsch.prune(detector, kirsch.plan(graph, kirsch.Goal(macs=0.5), round_to=1))
    assert pruned.backbone[0].out_channels < 8
    assert (pruned.backbone[4].out_channels, pruned.other.in_features) == (6, 6)  # the other branch needs 6 features


def test_a_pruned_model_that_takes_another_branch_than_the_trace_raises_an_error(detector):
    detector.bound = -1e9  # the trace takes the branch of `head`
    graph = kirsch.trace(detector, IMAGE, decisions="example")
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5), exclude=["head", "other"])  # both branches keep their width
    detector.bound = 1e9
    with pytest.raises(VerificationError, match="a branch that depends on values, and may have taken another branch"):
        kirsch.prune(detector, plan)
