"""The ranking "legr": search for the widths of the model with the best quality."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.display import Display
from kirsch.errors import DataError, GoalError, NumericError, UsageError
from kirsch.tables import plain

FREE = {"round_to": 1, "min_keep": 0.01}
BATCH = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Sum of three branches; the output of the second one is multiplied by 0."""

    def __init__(self, widths=(12, 12, 12)):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(6, width) for width in widths)
        self.outer = nn.ModuleList(nn.Linear(width, 4) for width in widths)
        self.register_buffer("gates", torch.tensor([1.0, 0.0, 1.0][: len(widths)]))

    def forward(self, x):
        branches = (outer(inner(x).relu()) for inner, outer in zip(self.inner, self.outer, strict=True))
        return sum(gate * branch for gate, branch in zip(self.gates, branches, strict=True))


def network(**options):
    torch.manual_seed(0)
    return Branches(**options)


@pytest.fixture
def graph():
    return kirsch.trace(network(), BATCH)


def kept(plan):
    return [
        group.size - sum(len(r.removed) for r in plan.groups if r.name == group.name) for group in plan.graph.groups
    ]


def test_a_branch_without_effect_loses_all_units_that_may_be_removed(graph):
    """Without labels, the quality is minus the KL divergence, which is 0 as long as the other branches are kept."""
    goal = kirsch.Goal(parameters=0.71)
    plan = kirsch.plan(graph, goal, ranking="legr", data=BATCH, evaluations=80, **FREE)
    first, without_effect, last = kept(plan)
    assert without_effect <= 2
    assert first + last >= 23  # of 24; a plan of 25 units is close to the goal
    assert kept(kirsch.plan(graph, goal, **FREE))[1] > 6


def test_legr_corrects_importances_of_another_scale(graph):
    """The scores of an important branch are divided by 1000, so that a global ranking removes it."""
    scores = {group.name: np.linspace(1, 2, 12) for group in graph.groups}
    scores["inner.2"] /= 1000
    goal = kirsch.Goal(parameters=0.71)
    assert kept(kirsch.plan(graph, goal, importance=scores, **FREE)) == [12, 12, 1]
    plan = kirsch.plan(graph, goal, importance=scores, ranking="legr", data=BATCH, evaluations=80, **FREE)
    assert kept(plan) == [12, 1, 12]


@pytest.mark.parametrize("worth", [(1.0, 3.0, 2.0), (2.0, 0.5, 2.1), (1.0, 1.0, 1.0)])
def test_enough_evaluations_find_the_best_of_all_allocations(worth):
    """The quality is the sum of a concave function of each width."""
    graph = kirsch.trace(network(widths=(6, 5, 8)), BATCH)
    goal = kirsch.Goal(parameters=0.6)

    def value(widths):
        return sum(factor * math.sqrt(width) for factor, width in zip(worth, widths, strict=True))

    def quality(model):
        return value([layer.out_features for layer in model.inner])

    first = kirsch.plan(graph, goal, **FREE)
    distance = max(0.01, 0.6 - first.after.parameters / first.before.parameters)
    fractions = {
        widths: (4 + sum(width * 11 for width in widths) + 8) / graph.cost.parameters  # 3 biases of the outputs: 12
        for widths in itertools.product(range(1, 7), range(1, 6), range(1, 9))
    }
    admitted = [widths for widths, fraction in fractions.items() if 0.6 - distance - 1e-9 <= fraction <= 0.6]
    plan = kirsch.plan(graph, goal, ranking="legr", quality=quality, evaluations=80, **FREE)
    assert tuple(kept(plan)) in admitted
    assert value(kept(plan)) == pytest.approx(max(map(value, admitted)))


@pytest.mark.parametrize(
    "goal",
    [kirsch.Goal(macs=0.5), kirsch.Goal(parameters=0.4, macs=0.6), kirsch.Goal(size=0.5), kirsch.Goal(memory=0.6)],
)
def test_goals_are_met_within_one_percent(goal):
    layers = [nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 4)]
    graph = kirsch.trace(nn.Sequential(*layers), BATCH)
    plan = kirsch.plan(graph, goal, ranking="legr", data=BATCH, evaluations=25, **FREE)
    reached = goal.fractions(plan.after, plan.before)
    assert all(value <= limit for value, limit in reached.values())
    assert min(limit - value for value, limit in reached.values()) < 0.01


def test_units_are_removed_in_the_order_of_the_importance(graph):
    scores = {group.name: np.random.default_rng(0).permutation(12) - 6.0 for group in graph.groups}  # also negative
    goal = kirsch.Goal(parameters=0.6)
    plan = kirsch.plan(graph, goal, importance=scores, ranking="legr", data=BATCH, evaluations=20, **FREE)
    for removal in plan.groups:
        order = np.argsort(scores[removal.name])
        assert set(removal.removed) == set(order[: len(removal.removed)].tolist())


def test_the_result_follows_from_the_seed(graph):
    def plan(seed):
        options = {"ranking": "legr", "data": BATCH, "evaluations": 25, "seed": seed}
        return kirsch.plan(graph, kirsch.Goal(parameters=0.5), **options, **FREE)

    assert plan(1).to_json() == plan(1).to_json()
    assert plan(1).method["search"] != plan(2).method["search"]


def test_the_model_and_the_random_state_are_not_changed():
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    model.train()
    graph = kirsch.trace(model, BATCH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def quality(pruned):
        """Train in place."""
        pruned.train()
        pruned(torch.randn(8, 6)).square().sum().backward()
        with torch.no_grad():
            for parameter in pruned.parameters():
                parameter.sub_(0.1 * parameter.grad)
            return -float(pruned(BATCH).square().mean())

    for options in ({"data": BATCH}, {"quality": quality}):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking="legr", evaluations=10, **options, **FREE)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_quality_is_that_of_the_pruned_model(graph):
    """The best quality of the record is minus the loss of the model that `kirsch.prune` returns."""
    labels = torch.arange(64) % 4
    data = [(BATCH[:48], labels[:48]), (BATCH[48:], labels[48:])]
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.5), ranking="legr", data=data, evaluations=15, **FREE)
    pruned = kirsch.prune(graph.model, plan)
    loss = nn.functional.cross_entropy(pruned(BATCH), labels).item()
    search = plan.method["search"]
    assert search["improvements"][-1][1] == pytest.approx(-loss, rel=1e-5)
    assert search["quality"] == "minus the cross-entropy on 64 samples"
    assert 4 < search["evaluated"] <= 15
    assert any(f"is {-loss:.3g}" in note or f"is {-loss:.2f}" in note for note in plan.notes)


def test_the_search_is_at_least_as_good_as_each_fixed_ranking(graph):
    labels = torch.arange(64) % 4
    search = kirsch.plan(
        graph, kirsch.Goal(macs=0.5), ranking="legr", data=(BATCH, labels), evaluations=8, **FREE
    ).method["search"]
    for fixed in ("global", "local", "isomorphic", "per_cost"):
        plan = kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking=fixed, **FREE)
        loss = nn.functional.cross_entropy(kirsch.prune(graph.model, plan)(BATCH), labels).item()
        assert search["starts"][fixed] == pytest.approx(-loss, rel=1e-5)
    assert search["improvements"][-1][1] >= max(search["starts"].values())


def test_batch_norms_use_the_statistics_of_the_calibration_data():
    """Without training, those of the original do not fit the activations of a pruned model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)
    )
    labels = torch.arange(64) % 4
    graph = kirsch.trace(model.eval(), BATCH)
    options = {"ranking": "legr", "data": (BATCH, labels), "evaluations": 6}
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5), **options, **FREE)
    pruned = kirsch.prune(model, plan)
    hidden = pruned[2](pruned[0](BATCH).relu())
    normalized = (hidden - hidden.mean(0)) / (hidden.var(0) + pruned[3].eps).sqrt()  # running variances are unbiased
    loss = nn.functional.cross_entropy(pruned[5](normalized.relu()), labels).item()
    search = plan.method["search"]
    assert search["improvements"][-1][1] == pytest.approx(-loss, rel=1e-5)
    assert search["quality"].endswith("64 samples, with batch-norm statistics of these samples")
    assert model[3].running_mean.eq(0).all()


def test_an_allocation_is_evaluated_once(graph):
    seen = []

    def quality(model):
        seen.append(tuple(layer.out_features for layer in model.inner))
        return 0.0

    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.5), ranking="legr", quality=quality, evaluations=40, **FREE)
    assert len(seen) == len(set(seen)) == plan.method["search"]["evaluated"] <= 40
    assert tuple(kept(plan)) == seen[0]  # of equal qualities, that of the ranking "global"


def test_a_plan_with_its_search_survives_json(graph):
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking="legr", data=BATCH, evaluations=6, **FREE)
    read = kirsch.Plan.from_json(plan.to_json())
    assert read.method == plan.method
    notes = kirsch.prune_with_verification(graph.model, read).plan.notes
    assert any(note.startswith('ranking="legr" evaluated 6 plans.') for note in notes)


def test_plans_whose_quality_is_not_finite_are_rejected(graph):
    def quality(model):
        width = model.inner[0].out_features
        return float("nan") if width > 6 else width

    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.5), ranking="legr", quality=quality, evaluations=60, **FREE)
    assert kept(plan)[0] == 6
    with pytest.raises(NumericError, match=r"The quality of all \d+ evaluated plans is NaN or infinite"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking="legr", quality=lambda _: math.nan, evaluations=5, **FREE)


def test_widths_by_hand_are_kept(graph):
    options = {"ranking": "legr", "data": BATCH, "evaluations": 10}
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.7), keep={"inner.1": 9}, **options, **FREE)
    assert kept(plan)[1] == 9


def test_equal_layers_stay_equal_with_uniform(graph):
    plan = kirsch.plan(
        graph, kirsch.Goal(parameters=0.5), ranking="legr", data=BATCH, evaluations=5, uniform=True, **FREE
    )
    assert len(set(kept(plan))) == 1


def test_importances_from_data_and_rankings_from_data_are_combined(graph):
    data = (BATCH, torch.arange(64) % 4)
    plan = kirsch.plan(
        graph, kirsch.Goal(macs=0.5), importance="taylor", ranking="legr", data=data, evaluations=6, **FREE
    )
    order = kirsch.plan(graph, kirsch.Goal(macs=0.2), importance="taylor", data=data, **FREE)
    for removal in plan.groups:
        more = next(other for other in order.groups if other.name == removal.name)
        assert len(removal.removed) > len(more.removed) or set(removal.removed) <= set(more.removed)


def test_padding_and_single_outputs_without_labels():
    """The divergence is the mean over the positions that are not padding."""

    class Tagger(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, classes)

        def forward(self, input_ids, attention_mask):
            return self.head(self.inner(self.embed(input_ids)).relu())

    torch.manual_seed(0)
    model, tokens = Tagger(5), torch.randint(0, 9, (4, 7))
    mask = torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    inputs = {"input_ids": tokens, "attention_mask": mask.long()}
    graph = kirsch.trace(model, inputs)
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.6), ranking="legr", data=[inputs], evaluations=4, **FREE)
    pruned = kirsch.prune(model, plan)
    logs = [torch.log_softmax(net(**inputs), -1) for net in (model, pruned)]
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)[mask].mean().item()
    assert plan.method["search"]["improvements"][-1][1] == pytest.approx(-divergence, rel=1e-4)  # float32
    with pytest.raises(UsageError, match=r"`data` of kirsch.plan has no labels, and the model returns one number"):
        kirsch.plan(
            kirsch.trace(Tagger(1), inputs), kirsch.Goal(macs=0.6), ranking="legr", data=[inputs], evaluations=4, **FREE
        )


# ------------------------------------------------------------------------------------------------ bad input


def test_missing_data_is_named_before_any_work(graph):
    with pytest.raises(UsageError, match=r'`data` of kirsch.plan is missing: ranking="legr" runs pruned models'):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking="legr")
    with pytest.raises(UsageError, match=r"can be iterated over only once"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking="legr", data=iter([BATCH]))
    with pytest.raises(DataError, match=r"has no batches"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking="legr", data=[])


def test_options_without_effect_are_refused(graph):
    goal = kirsch.Goal(macs=0.5)
    with pytest.raises(UsageError, match=r'`evaluations` has no effect with ranking="auto"'):
        kirsch.plan(graph, goal, evaluations=10)
    with pytest.raises(UsageError, match=r'`quality` has no effect with ranking="local"'):
        kirsch.plan(graph, goal, ranking="local", quality=lambda _model: 0.0)
    with pytest.raises(UsageError, match=r"`data` of kirsch.plan has no effect"):
        kirsch.plan(graph, goal, ranking="legr", data=BATCH, quality=lambda _model: 0.0)
    with pytest.raises(UsageError, match=r'ranking="legr" has no effect without a goal'):
        kirsch.plan(graph, keep={"inner.0": 6}, ranking="legr", data=BATCH)
    with pytest.raises(UsageError, match=r"`loss` has no effect"):
        kirsch.plan(graph, goal, loss="binary")
    kirsch.plan(graph, goal, ranking="legr", loss="squared-error", data=(BATCH, torch.randn(64, 4)), evaluations=2)


def test_a_quality_that_is_not_a_number_is_refused(graph):
    with pytest.raises(UsageError, match=r"`quality` of kirsch.plan returns None"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), ranking="legr", quality=lambda _model: None)


def test_a_goal_out_of_reach_is_refused_before_the_search(graph):
    def quality(_model):
        raise AssertionError("a plan was evaluated")

    with pytest.raises(GoalError, match=r"least reachable"):
        kirsch.plan(graph, kirsch.Goal(macs=0.01), ranking="legr", quality=quality)


def test_a_bar_shows_the_number_of_plans_and_the_best_quality(graph, monkeypatch):
    lines = []

    class Notebook(Display):
        def refresh_status(self):
            lines.append(plain(self._draw()))

    monkeypatch.setattr("kirsch.frameworks.progress.own_display", lambda: Notebook(io.StringIO(), notebook=True))
    options = {"ranking": "legr", "evaluations": 5, "quality": lambda model: model.inner[0].out_features}
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.5), **options, **FREE)
    assert "legr" in lines[0]
    assert "0/5 plans" in lines[0]
    assert "5/5 plans" in lines[-1]
    assert f"best {kept(plan)[0]}" in lines[-1]
    lines.clear()
    kirsch.plan(graph, kirsch.Goal(parameters=0.5), progress=False, **options, **FREE)
    assert not lines
