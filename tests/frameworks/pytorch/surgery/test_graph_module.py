"""`as_graph=True`: the pruned model is the traced program, with the sizes in its operations rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kirsch
from kirsch.errors import ModelError, UsageError
from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.frameworks.pytorch.surgery.graph_module import graph_module
from kirsch.frameworks.pytorch.verification.verify import verify
from kirsch.graph.plan import Goal, Plan
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import randomly_removed, with_noise


class Numbers(nn.Module):
    """Two linear layers with a function `run` between them, whose code contains widths as literals."""

    def __init__(self, run, width=8):
        super().__init__()
        self.before, self.after, self.run = nn.Linear(6, 12), nn.Linear(width, 3), run
        self.norm = nn.Parameter(torch.ones(12))

    def forward(self, x):
        return self.after(self.run(self, self.before(x)))


def heads(self, x):
    """Attention with three heads of width four."""
    q = x.view(2, 5, 3, 4).transpose(1, 2)
    q = (q @ q.transpose(-2, -1)).softmax(-1) @ q
    return q.transpose(1, 2).reshape(2, 5, 12)[..., :8]


RUNS = {
    "a slice": lambda s, x: x[..., 2:10],
    "a split": lambda s, x: x.split([8, 4], -1)[0],
    "a split in equal parts": lambda s, x: torch.cat(x.split(4, -1)[:2], -1),
    "a view and back": lambda s, x: x.view(2, 5, 4, 3).transpose(-2, -1).reshape(2, 5, 12)[..., :8],
    "heads": heads,
    "a normalization": lambda s, x: F.layer_norm(x, (12,), s.norm)[..., 4:],
    "an expanded tensor": lambda s, x: (x + torch.ones(2, 1, 1).expand(2, 5, 12))[..., :8],
    "a tensor of zeros": lambda s, x: (x + torch.zeros(2, 5, 12))[..., :8],
    "padding": lambda s, x: F.pad(x[..., :6], (1, 1)),
}
TOKENS = torch.randn(2, 5, 6)


SIZES = {
    "a slice": ([4, 8], [2]),
    "a split": ([4, 8], []),
    "a split in equal parts": ([4], []),
    "a view and back": ([4, 2], []),
    "heads": ([2, 4], []),
    "a normalization": ([4, 8], []),
    "an expanded tensor": ([4, 8], []),
    "a tensor of zeros": ([4, 8], []),
    "padding": ([6, 6, 2], [6]),
}
"""Sizes of the groups with `as_graph=True`, and of those without it, where literals in the code freeze axes."""


@pytest.mark.parametrize("run", RUNS)
def test_widths_that_the_code_writes_as_literals_are_pruned(run):
    model = with_noise(Numbers(RUNS[run]))
    graph = kirsch.trace(model, TOKENS, as_graph=True)
    own_code = kirsch.trace(model, TOKENS)
    assert ([group.size for group in graph.groups], [group.size for group in own_code.groups]) == SIZES[run]
    keep = graph.keep(randomly_removed(graph))
    verification = verify(graph_module(model, graph, keep), model, graph, keep)
    assert verification.passed
    assert verification.power > 1e-3
    assert not graph.kept(graph.axes["before.weight", 0], keep).all()


def convolutional():
    return with_noise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 12, 3, groups=4), nn.GroupNorm(3, 12),
            nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        )
    )  # fmt: skip


IMAGES = torch.randn(2, 3, 9, 9)


@pytest.fixture
def pruned():
    model = convolutional()
    plan = kirsch.plan(kirsch.trace(model, IMAGES, as_graph=True), Goal(parameters=0.8))
    return model, plan, prune_with_verification(model, plan).model


def test_the_counted_cost_is_the_planned_cost(pruned):
    _, plan, small = pruned
    assert isinstance(small, torch.fx.GraphModule)
    assert count(small, IMAGES) == (plan.after.parameters, plan.after.macs)


def test_the_graph_module_trains(pruned):
    _, _, small = pruned
    optimizer, losses = torch.optim.Adam(small.train().parameters(), 0.05), []
    for _ in range(20):
        losses.append(F.cross_entropy(small(IMAGES), torch.tensor([0, 3])))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_the_graph_module_takes_other_batch_sizes(pruned):
    _, _, small = pruned
    inputs = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(small(inputs)[3:], small(inputs[3:]))


def test_the_graph_module_can_be_exported(pruned, tmp_path):
    _, _, small = pruned
    assert kirsch.export(small, tmp_path / "small.onnx", example_inputs=IMAGES).path.exists()


def test_saving_and_loading_returns_the_same_bits(pruned, tmp_path):
    _, plan, small = pruned
    assert Plan.from_json(plan.to_json()).tracing.as_graph
    kirsch.save(small, tmp_path / "saved")
    assert torch.equal(kirsch.load(tmp_path / "saved", convolutional)(IMAGES), small(IMAGES))


def test_the_graph_module_can_be_pruned_again(pruned):
    _, _, small = pruned
    plan = kirsch.plan(kirsch.trace(small, IMAGES, as_graph=True), Goal(parameters=0.7))
    assert prune_with_verification(small, plan).verification.passed


class Several(nn.Module):
    """Model with keyword arguments. `arrange` decides whether it returns one tensor, a tuple or a dict."""

    def __init__(self, arrange):
        super().__init__()
        self.first, self.second, self.arrange = nn.Linear(4, 8), nn.Linear(8, 2), arrange

    def forward(self, x, *, scale):
        hidden = self.first(x) * scale + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])[0]
        return self.arrange(hidden, self.second(hidden))


ARRANGED = {
    "one": (lambda hidden, out: out, lambda out: out.shape == (3, 2)),
    "a tuple": (lambda hidden, out: (out, out + 1), lambda out: isinstance(out, tuple) and out[1].shape == (3, 2)),
    "names": (lambda hidden, out: {"logits": out, "twice": 2 * out}, lambda out: out["twice"].shape == (3, 2)),
}


@pytest.mark.parametrize("arranged", ARRANGED)
def test_inputs_and_outputs_have_the_form_of_the_original(arranged):
    arrange, has_form = ARRANGED[arranged]
    model, inputs = with_noise(Several(arrange)), {"x": torch.randn(3, 4), "scale": torch.rand(3, 1)}
    plan = kirsch.plan(kirsch.trace(model, inputs, as_graph=True), Goal(parameters=0.6))
    assert has_form(kirsch.prune(model, plan)(**inputs))


def test_nested_inputs_are_refused():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, pair):
            return self.second(self.first(pair[0] + pair[1]))

    model, inputs = with_noise(Nested()), ([torch.randn(3, 4), torch.randn(3, 4)],)
    plan = kirsch.plan(kirsch.trace(model, inputs, as_graph=True), Goal(parameters=0.6))
    with pytest.raises(ModelError, match=r"Nested cannot be returned as a graph.*Its inputs are nested"):
        kirsch.prune(model, plan)


def test_as_graph_with_a_module_raises_an_error():
    with pytest.raises(UsageError, match=r"`as_graph` of kirsch\.trace cannot be combined with `module`"):
        kirsch.trace(convolutional(), IMAGES, module="0", as_graph=True)
