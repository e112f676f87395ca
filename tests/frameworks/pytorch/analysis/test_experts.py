"""With softmax="kept", experts are removed together with their rows of the router."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kirsch
from kirsch.errors import GoalError, PlanError
from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.graph.plan import Goal, Plan
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import with_noise

ROWS = torch.randn(7, 6)


class Mixture(nn.Module):
    """A mixture of experts; `run` applies the experts that the router selects for each row."""

    def __init__(self, run, experts=5, chosen=2):
        super().__init__()
        self.router, self.run = nn.Linear(6, experts, bias=False), run
        self.up, self.down = nn.Parameter(torch.randn(experts, 6, 8)), nn.Parameter(torch.randn(experts, 8, 6))
        self.bias, self.out = nn.Embedding(experts, 6), nn.Linear(6, 3)
        self.experts, self.chosen = experts, chosen

    def forward(self, x):
        return self.out(self.run(self, x, self.router(x)))


def apply_experts(self, x, ids):
    """Return the outputs of the selected experts; ids have the shape (rows, chosen)."""
    rows = x.repeat_interleave(ids.shape[1], 0).unsqueeze(1)
    inner = F.relu(torch.bmm(rows, self.up[ids.reshape(-1)]))
    return torch.bmm(inner, self.down[ids.reshape(-1)]).reshape(*ids.shape, -1)


def softmax_over_all(self, x, logits):
    """Compute the softmax over all experts."""
    weights, ids = logits.softmax(-1).topk(self.chosen, -1)
    return (apply_experts(self, x, ids) * (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)


def softmax_over_chosen(self, x, logits):
    """Compute the softmax over the selected experts."""
    values, ids = torch.topk(logits, self.chosen)
    return (apply_experts(self, x, ids) * values.softmax(-1).unsqueeze(-1)).sum(1)


def gathered(self, x, logits):
    """Select the experts by other values than those by which their outputs are weighted."""
    scores = logits.sigmoid()
    ids = scores.square().topk(k=self.chosen, dim=-1, sorted=False)[1]
    return (apply_experts(self, x, ids) * scores.gather(1, ids).unsqueeze(-1) + self.bias(ids)).sum(1)


def sorted_rows(self, x, logits):
    """Sort the rows by expert and use grouped matrix products, as on an accelerator."""
    values, ids = logits.topk(self.chosen)
    _, order = ids.reshape(-1).sort()
    counts = torch.histc(ids.reshape(-1)[order].float(), bins=self.experts, min=0, max=self.experts - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = x.repeat_interleave(self.chosen, 0)[order]
    inner = F.grouped_mm(F.relu(F.grouped_mm(rows, self.up, offs=ends)), self.down, offs=ends)
    return (inner[order.argsort()].reshape(*ids.shape, -1) * values.unsqueeze(-1)).sum(1)


RUNS = {"softmax before": softmax_over_all, "softmax after": softmax_over_chosen, "gathered": gathered}


@pytest.mark.parametrize("run", RUNS)
def test_experts_are_removed_with_their_rows_of_the_router(run):
    model = with_noise(Mixture(RUNS[run]))
    graph = kirsch.trace(model, ROWS, softmax="kept")
    experts = next(group for group in graph.groups if group.kind == "expert")
    assert experts.size == 5
    plan = kirsch.plan(graph, Goal(parameters=0.75), kinds=["expert"], round_to=1)
    result = prune_with_verification(model, plan)
    (removal,) = plan.groups
    kept = [unit for unit in range(5) if unit not in removal.removed]
    assert result.verification.power > 1e-3
    assert not any("Output widths" in note for note in plan.notes), "the number of experts is no width"
    assert torch.equal(result.model.router.weight, model.router.weight[kept])
    assert torch.equal(result.model.up, model.up[kept])
    assert count(result.model, ROWS) == (plan.after.parameters, plan.after.macs)


def test_experts_are_removed_if_tokens_are_sorted_by_expert():
    model = Mixture(sorted_rows, experts=4)
    for name, shape in {"up": (4, 8, 16), "down": (4, 16, 8)}.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    model.router, model.out = nn.Linear(8, 4, bias=False), nn.Linear(8, 3)
    model = with_noise(model.bfloat16())
    inputs = torch.randn(6, 8).bfloat16()
    graph = kirsch.trace(model, inputs, softmax="kept")
    assert sorted((group.kind, group.size) for group in graph.groups) == [
        ("expert", 4),
        ("ffn unit", 8),
        ("ffn unit", 16),
    ]
    plan = kirsch.plan(graph, Goal(parameters=0.8), kinds=["expert"], round_to=1)
    pruned = kirsch.prune(model, plan)
    assert pruned.experts == len(pruned.up) < 4
    assert count(pruned, inputs) == (plan.after.parameters, plan.after.macs)


@pytest.mark.parametrize("run", RUNS)
def test_experts_are_frozen_unless_the_option_softmax_is_kept(run):
    graph = kirsch.trace(with_noise(Mixture(RUNS[run])), ROWS)
    assert not [group for group in graph.groups if group.kind == "expert" or group.size == 5]
    assert {"the result depends on the order along the axis", "a softmax is computed over the axis"} & {
        blocker.reason for blocker in graph.blockers
    }


def test_at_least_as_many_experts_are_kept_as_are_selected():
    model = with_noise(Mixture(softmax_over_chosen, chosen=3))
    graph = kirsch.trace(model, ROWS, softmax="kept")
    plan = kirsch.plan(graph, Goal(parameters=0.75), kinds=["expert"], round_to=1, min_keep=0.01)
    assert len(plan.groups[0].removed) == 2
    with pytest.raises(GoalError, match=r"63\.6% is the least reachable"):
        kirsch.plan(graph, Goal(parameters=0.6), kinds=["expert"], round_to=1, min_keep=0.01)
    kept = min(set(range(5)) - set(plan.groups[0].removed))
    text = plan.to_json().replace('"removed": [', f'"removed": [{kept},')
    with pytest.raises(PlanError, match=r"would leave fewer than 3 units on axis 0 of .*, and an operation needs 3"):
        kirsch.prune(model, Plan.from_json(text))


COMPUTED = {
    "added to": lambda s, x, logits: apply_experts(s, x, (logits.topk(s.chosen)[1] + 1) % s.experts).sum(1),
    "compared": lambda s, x, logits: x * (logits.topk(s.chosen)[1] == 2).float().mean(-1, keepdim=True),
    "summed": lambda s, x, logits: x * logits.topk(s.chosen)[1].sum(-1, keepdim=True),
    "counted with a constant number of bins": lambda s, x, logits: (
        x * torch.histc(logits.topk(s.chosen)[1].float(), bins=5, min=0, max=4).mean()
    ),
    "counted in other bins": lambda s, x, logits: (
        x * torch.histc(logits.topk(s.chosen)[1].float(), bins=s.experts, min=0, max=9).mean()
    ),
    "index into another axis": lambda s, x, logits: x[logits.topk(s.chosen)[1][:, 0]],
}


@pytest.mark.parametrize("way", COMPUTED)
def test_experts_are_frozen_if_the_code_computes_with_their_indices(way):
    model = with_noise(Mixture(COMPUTED[way]))
    graph = kirsch.trace(model, ROWS, softmax="kept")
    assert not [group for group in graph.groups if ("router.weight", 0) in group.footprint]


def maximum(self, x, logits):
    """Select one expert for each row by the maximum."""
    values, ids = logits.max(-1)
    return apply_experts(self, x, ids.unsqueeze(1)).squeeze(1) * values.unsqueeze(-1)


def reordered(self, x, logits):
    """Reorder the selected indices. The result still contains indices of experts."""
    ids = logits.topk(self.chosen)[1].gather(1, torch.tensor([[1, 0]]).expand(len(x), 2))
    return apply_experts(self, x, ids).sum(1)


@pytest.mark.parametrize("run", [maximum, reordered])
@pytest.mark.parametrize("softmax", ["freeze", "kept"])
def test_experts_are_removed_only_if_the_option_softmax_is_kept(run, softmax):
    model = with_noise(Mixture(run))
    graph = kirsch.trace(model, ROWS, softmax=softmax)
    experts = [group for group in graph.groups if ("router.weight", 0) in group.footprint]
    assert len(experts) == (softmax == "kept")
    if experts:
        plan = kirsch.plan(graph, Goal(parameters=0.75), kinds=["expert"], round_to=1)
        assert prune_with_verification(model, plan).verification.power > 1e-3


class ReturnsIndices(Mixture):
    """Mixture that also returns the indices of the selected experts."""

    def forward(self, x):
        logits = self.router(x)
        return self.out(self.run(self, x, logits)), logits.topk(self.chosen)[1]


def test_experts_are_frozen_if_their_indices_are_an_output():
    graph = kirsch.trace(with_noise(ReturnsIndices(softmax_over_chosen)), ROWS, softmax="kept")
    assert not [group for group in graph.groups if ("router.weight", 0) in group.footprint]
    assert "indices into the axis are an output of the model" in graph.explain("router")
