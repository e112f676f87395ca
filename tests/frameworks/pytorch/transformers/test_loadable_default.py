"""Plans of models with a configuration make only cuts that it states, unless this is impossible; a note says why."""

from __future__ import annotations

import re

import pytest
import torch

import kirsch
from configured_models import INPUT, Config, Small, Tied, assert_configuration_builds
from kirsch.errors import GoalError, UsageError
from kirsch.frameworks.pytorch.io.vision import import_beside
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import with_noise

HALF = kirsch.Goal(parameters=0.5)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return with_noise(Small(Config())).eval()


def reasons(plan):
    return [note for note in plan.notes if note.startswith("loadable=")]


def test_a_plan_is_loadable_by_default(small):
    graph = kirsch.trace(small, INPUT)
    plan = kirsch.plan(graph, HALF)
    assert plan == kirsch.plan(graph, HALF, loadable=True)
    assert plan.method["loadable"] is True
    assert not reasons(plan)
    assert_configuration_builds(kirsch.prune(small, plan))


def test_a_model_without_configuration_has_an_ordinary_plan_without_a_note():
    graph = kirsch.trace(torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)), INPUT)
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.7))
    assert plan.method["loadable"] is False
    assert not reasons(plan)


def test_a_goal_that_the_configuration_cannot_state_has_an_ordinary_plan_and_a_note_that_pruning_repeats(small):
    graph = kirsch.trace(small, INPUT)
    options = {"kinds": ["head dim"], "round_to": 1}
    goal = kirsch.Goal(parameters=0.9)
    plan = kirsch.plan(graph, goal, **options)
    assert plan.groups == kirsch.plan(graph, goal, loadable=False, **options).groups
    assert plan.method["loadable"] is False
    assert plan.configuration == {}
    (note,) = reasons(plan)
    assert "the configuration of Small can state no cut with these options" in note
    assert "only kirsch.load loads the pruned model" in note
    assert note in prune_with_verification(small, plan).notes
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.3), kinds=["ffn unit", "head dim"], round_to=1, min_keep=0.01)
    (note,) = reasons(plan)
    assert "The configuration of Small cannot state a plan for the goal: parameters 30% is requested" in note
    assert "It can state ffn (ffn unit)." in note


def test_a_goal_that_no_plan_reaches_raises_the_error_of_ordinary_plans(small):
    with pytest.raises(GoalError, match="No plan for Small reaches the goal"):
        kirsch.plan(kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.001))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ranking": "milp", "data": [INPUT]}, r'ranking="milp" chooses the width.*give ranking="global"'),
        ({"ranking": "legr", "data": [INPUT], "evaluations": 2}, r'ranking="legr" chooses the width'),
    ],
)
def test_an_option_that_sets_the_width_of_each_layer_has_an_ordinary_plan_and_a_note(small, options, reason):
    graph = kirsch.trace(small, INPUT)
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.8), **options)
    assert plan.groups
    assert plan.method["loadable"] is False
    (note,) = reasons(plan)
    assert re.search(reason, note)
    option = next(iter(options))
    with pytest.raises(UsageError, match=rf"`loadable=True` cannot be used with .*{option}"):
        kirsch.plan(graph, kirsch.Goal(parameters=0.8), loadable=True, **options)


def test_a_configuration_of_another_model_is_named(small):
    small.config.ffn = 40
    (note,) = reasons(kirsch.plan(kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.8)))
    assert "its configuration does not build this Small" in note
    with pytest.raises(UsageError, match="does not build this Small"):
        kirsch.plan(kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.8), loadable=True)


def test_a_configuration_that_states_no_cut_is_named():
    (note,) = reasons(kirsch.plan(kirsch.trace(Tied(Config()).eval(), INPUT), kirsch.Goal(parameters=0.7)))
    assert "can state no cut" in note


def test_the_smallest_model_inside_a_drop_is_searched_among_those_that_the_configuration_states(small):
    graph = kirsch.trace(small, INPUT)
    plan = kirsch.plan(graph, max_drop=0.9, validation=[INPUT], metric="output_r2", minimize="parameters")
    assert plan.method["loadable"] is True
    assert plan.configuration
    assert_configuration_builds(kirsch.prune(small, plan))


@pytest.mark.parametrize("ranking", ["local", "isomorphic"])
def test_rankings_by_fraction_remove_the_same_fraction_of_each_width(small, ranking):
    plan = kirsch.plan(kirsch.trace(small, INPUT), HALF, ranking=ranking, round_to=1)
    assert plan.method["loadable"] is True
    assert plan.without == ()
    fractions = [plan.configuration[name] / getattr(small.config, name) for name in ("width", "ffn")]
    assert abs(fractions[0] - fractions[1]) <= 0.26  # the width has four values


class Two(torch.nn.Module):
    """Two hidden layers of one size, each with a number of the configuration."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.a, self.b = torch.nn.Linear(5, config.first), torch.nn.Linear(config.first, 6)
        self.c, self.d = torch.nn.Linear(6, config.second), torch.nn.Linear(config.second, 3)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).relu())).relu())

    def save_pretrained(self, folder):
        raise NotImplementedError


class TwoConfig:
    def __init__(self, first=32, second=32, **_):
        self.first, self.second = first, second

    def to_dict(self):
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


def test_uniform_joins_the_numbers_of_groups_of_the_same_kind_and_size():
    torch.manual_seed(0)
    model = with_noise(Two(TwoConfig())).eval()
    with torch.no_grad():
        model.a.weight.mul_(0.1)  # without `uniform`, most units are removed here
    graph = kirsch.trace(model, INPUT)
    free, tied = (kirsch.plan(graph, HALF, uniform=uniform, round_to=1) for uniform in (False, True))
    assert free.configuration.get("first") != free.configuration.get("second")
    assert tied.method["loadable"] is True
    assert tied.configuration["first"] == tied.configuration["second"] < 32


def test_uniform_ties_numbers_that_keep_sets_apart():
    graph = kirsch.trace(Two(TwoConfig()).eval(), INPUT)
    assert kirsch.plan(graph, keep={"a": 8}).configuration == {"first": 8}
    for options in ({}, {"loadable": True}):
        words = "cannot state all widths in `keep` at once" if options else "`keep` does not set the same width"
        with pytest.raises(UsageError, match=words):
            kirsch.plan(graph, keep={"a": 8}, uniform=True, **options)


def test_with_data_the_cut_with_the_least_change_of_the_outputs_is_chosen():
    """The units of the feed-forward networks have the highest scores, but their outputs are not used."""
    import_beside("torchvision")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    numbers = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **numbers)
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    tokens = {"input_ids": torch.randint(16, (2, 6))}
    graph, goal = kirsch.trace(model, tokens), kirsch.Goal(parameters=0.7)

    def without_data(_, group):
        return torch.full((group.size,), 2.0 if group.kind == "ffn unit" else 1.0)

    def with_data(graph, group, *, statistics):
        return without_data(graph, group)

    assert "hidden_size" in kirsch.plan(graph, goal, importance=without_data).configuration
    plan = kirsch.plan(graph, goal, importance=with_data, data=[tokens])
    assert set(plan.configuration) == {"intermediate_size"}
