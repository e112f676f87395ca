"""Models whose `forward` is a `torch.fx` graph lose units and residual blocks like models written in Python."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import kirsch
from kirsch.errors import ModelError, VerificationError
from kirsch.graph.plan import Goal
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import with_noise

IMAGE = torch.randn(2, 3, 8, 8)
TOKENS = torch.randn(2, 5, 16)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PyTorch warns about its own exported modules
]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 3), nn.Sequential(*(Residual() for _ in range(3))), None
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Heads(nn.Module):
    """Attention with its sizes as literals in the code."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.last = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (parts[number].view(2, 5, 4, 4).transpose(1, 2) for number in range(3))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16)
        return self.last(x + self.out(y))


class Within(nn.Module):
    """A graph module as a submodule of a model written in Python."""

    def __init__(self, part):
        super().__init__()
        self.part, self.last = part, nn.Linear(5, 4)

    def forward(self, x):
        return self.last(torch.relu(self.part(x)))


def exported(model, inputs):
    return torch.export.export(model, (inputs,)).module()


MAKERS = {
    "symbolic_trace": lambda model, _: fx.symbolic_trace(model),
    "export": exported,
    "unflatten": lambda model, inputs: torch.export.unflatten(torch.export.export(model, (inputs,))),
    # The plan removes nothing, so that `prune` returns the traced program with its original sizes.
    "as_graph": lambda model, inputs: kirsch.prune(
        model, dataclasses.replace(kirsch.plan(kirsch.trace(model, inputs, as_graph=True), Goal(macs=0.9)), groups=())
    ),
}


def groups(graph):
    return [(group.kind, group.size) for group in graph.groups]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_graph_module_has_groups_cost_and_blocks_of_its_original(maker):
    model = with_noise(Images())
    plain = kirsch.trace(model, IMAGE)
    graph = kirsch.trace(MAKERS[maker](model, IMAGE), IMAGE)
    assert groups(graph) == groups(plain)
    assert graph.cost.macs == plain.cost.macs
    assert graph.parameters == plain.parameters
    assert graph.blocks == plain.blocks == ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize("maker", MAKERS)
def test_a_pruned_graph_module_equals_the_pruned_original(maker):
    model = with_noise(Images())
    plain = kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.6)))
    module = MAKERS[maker](model, IMAGE)
    found = prune_with_verification(module, kirsch.plan(kirsch.trace(module, IMAGE), Goal(macs=0.6)))
    assert found.verification.power > 1e-3
    assert type(found.model).__mro__[1:] == type(module).__mro__[1:]
    torch.testing.assert_close(found.model(IMAGE), plain(IMAGE))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("importance", "share", "number"), [("influence", 0.8, 1), ("change", 0.8, 1), ("random", 0.5, 2)]
)
def test_dropped_blocks_are_removed_from_a_graph_module(maker, importance, share, number):
    model = with_noise(Images())
    goal, data = Goal(macs=share), None if importance == "random" else IMAGE
    plain = kirsch.plan(kirsch.trace(model, IMAGE), goal, kinds="block", data=data, importance=importance)
    module = MAKERS[maker](model, IMAGE)
    plan = kirsch.plan(kirsch.trace(module, IMAGE), goal, kinds="block", data=data, importance=importance)
    assert plan.without == plain.without
    assert len(plan.without) == number
    short = kirsch.prune(module, plan)
    torch.testing.assert_close(short(IMAGE), kirsch.prune(model, plain)(IMAGE))
    assert not any(name.startswith(plan.without[0]) for name, _ in short.named_parameters())


@pytest.mark.parametrize("maker", MAKERS)
def test_a_graph_module_within_a_model_loses_blocks_and_units(maker):
    model = Within(MAKERS[maker](with_noise(Images()), IMAGE))
    graph = kirsch.trace(model, IMAGE)
    assert graph.blocks == ("part.blocks.0", "part.blocks.1", "part.blocks.2")
    short = kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.8), kinds="block", data=IMAGE))
    assert prune_with_verification(short, kirsch.plan(kirsch.trace(short, IMAGE), Goal(macs=0.7))).verification.passed


@pytest.mark.parametrize("maker", ["symbolic_trace", "export", "unflatten"])
def test_literal_sizes_in_a_graph_are_updated_by_a_cut(maker):
    model = with_noise(Heads())
    assert not kirsch.trace(model, TOKENS).groups  # literals in Python code cannot be changed
    module = MAKERS[maker](model, TOKENS)
    graph = kirsch.trace(module, TOKENS)
    assert {kind for kind, _ in groups(graph)} == {"head", "head dim"}
    found = prune_with_verification(module, kirsch.plan(graph, Goal(macs=0.7), round_to=1))
    assert found.verification.power > 1e-3
    # The shapes of the trace are removed from the nodes, because they are wrong after the cut.
    assert "val" not in {key for node in getattr(found.model, "graph").nodes for key in node.meta}  # noqa: B009


def test_pruning_does_not_change_the_original_graph_module():
    module = fx.symbolic_trace(with_noise(Heads()))
    before, code = copy.deepcopy(module.state_dict()), module.code
    kirsch.prune(module, kirsch.plan(kirsch.trace(module, TOKENS), Goal(macs=0.7), round_to=1))
    assert module.code == code
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_planning_blocks_restores_the_forward_method_of_a_graph_module():
    module = fx.symbolic_trace(with_noise(Images()))
    kirsch.plan(kirsch.trace(module, IMAGE), Goal(macs=0.8), kinds="block", data=IMAGE, importance="change")
    assert "forward" not in vars(module)


def test_a_sum_of_two_branches_without_an_identity_is_not_a_block():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.last(torch.relu(self.a(x)) + self.b(x))

    assert kirsch.trace(fx.symbolic_trace(with_noise(Two())), TOKENS).blocks == ()


class Dual(fx.GraphModule):
    """One graph for each mode, as in torchvision's feature extractors. Copies start in training mode."""

    def __init__(self, root, train_graph, eval_graph):
        super().__init__(root, train_graph)
        self.train_graph, self.eval_graph = train_graph, eval_graph
        self.train()
        self.graph = train_graph

    def train(self, mode=True):
        if mode and not self.training:
            self.graph = self.train_graph
        elif not mode and self.training:
            self.graph = self.eval_graph
        return super().train(mode)

    def _deepcopy_init(self):
        def init(copied, root, _):
            graphs = [copy.deepcopy(root.__dict__[name]) for name in ("train_graph", "eval_graph")]
            Dual.__init__(copied, root, *graphs)

        return init


def dual(model):
    return Dual(model, *(fx.Tracer().trace(model) for _ in range(2)))


def test_the_graphs_for_inference_and_for_training_are_both_cut():
    model = dual(with_noise(Heads())).eval()
    pruned = kirsch.prune(model, kirsch.plan(kirsch.trace(model, TOKENS), Goal(macs=0.7), round_to=1))
    torch.testing.assert_close(pruned.train()(TOKENS), pruned.eval()(TOKENS))


def modes(model):
    return {path: module.training for path, module in model.named_modules()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("maker", ["dual", "within", "symbolic"])
def test_modes_and_the_graph_of_each_mode_equal_those_of_the_original(maker, training):
    plain = with_noise(Images())
    made = fx.symbolic_trace(plain) if maker == "symbolic" else dual(plain)
    model = (nn.Sequential(made) if maker == "within" else made).train(training)
    graph = kirsch.trace(model, IMAGE)
    pruned = kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.7), round_to=1))
    short = kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.8), kinds="block", data=IMAGE))
    for found in (pruned, short, model):
        assert set(modes(found).values()) == {training}
        for module in found.modules():
            if isinstance(module, Dual):
                assert module.graph is (module.train_graph if training else module.eval_graph)


def test_each_module_of_a_model_pruned_as_graph_has_its_original_mode():
    model = with_noise(Images()).eval()
    next(model.children()).train()
    graph = kirsch.trace(model, IMAGE, as_graph=True)
    pruned = kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.7), round_to=1))
    assert modes(pruned).items() <= modes(model).items()
    assert set(modes(pruned).values()) == {False, True}


class Silent(nn.Linear):
    def forward(self, x):
        self.kept = super().forward(x)


def test_a_model_that_returns_no_tensors_raises_an_error():
    model = nn.Sequential(nn.Linear(16, 8), Silent(8, 4))
    with pytest.raises(ModelError, match=r"The model Sequential returns no tensors\. .* could not be verified\."):
        kirsch.trace(model, TOKENS)


class Constant(nn.Module):
    """A model whose output does not depend on its hidden units."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(16, 3)

    def forward(self, x):
        return self.other(x) + torch.relu(self.second(torch.relu(self.first(x))) - 1e6)


def test_a_cut_without_effect_on_the_outputs_raises_an_error_unless_verify_is_false():
    model = with_noise(Constant())
    plan = kirsch.plan(kirsch.trace(model, TOKENS), Goal(macs=0.9))
    with pytest.raises(VerificationError, match=r"Its outputs do not depend on the removed units.* verify=False"):
        kirsch.prune(model, plan)
    assert kirsch.prune(model, plan, verify=False).first.out_features < 8


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.batch = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.grouped, self.group = nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(4, 8)
        self.up, self.hidden, self.layer = nn.ConvTranspose2d(8, 8, 2), nn.Linear(8, 16), nn.LayerNorm(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.group(self.grouped(F.relu(self.batch(self.first(x)))))
        return self.last(self.layer(F.gelu(self.hidden(self.up(x).mean((2, 3))))))


DECOMPOSED = {
    "run_decompositions": lambda model: torch.export.export(model, (IMAGE,)).run_decompositions().module(),
    "make_fx": lambda model: make_fx(model)(IMAGE),
}


@pytest.mark.parametrize("kind", DECOMPOSED)
def test_a_decomposed_program_is_pruned_like_its_original(kind):
    model = with_noise(Norms().eval())
    decomposed = DECOMPOSED[kind](model)
    original, other = (
        prune_with_verification(each, kirsch.plan(kirsch.trace(each, IMAGE), Goal(macs=0.4)))
        for each in (model, decomposed)
    )
    shapes = [[value.shape for value in each.model.parameters()] for each in (original, other)]
    assert shapes[0] == shapes[1] != [value.shape for value in model.parameters()]
    assert other.verification.power > 1e-3
    assert torch.allclose(original.model(IMAGE), other.model(IMAGE), atol=1e-5)
