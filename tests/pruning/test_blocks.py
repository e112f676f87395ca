"""Choice of the residual blocks to remove."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.data.batches import Batch
from kirsch.errors import DataError, GoalError, UnknownNameError, UsageError
from kirsch.graph.plan import Goal
from kirsch.pruning.blocks import BLOCK_IMPORTANCES


class Adding(nn.Module):
    """Residual block that returns x + weight x."""

    def __init__(self, weight):
        super().__init__()
        self.branch = nn.Linear(2, 2, bias=False)
        self.branch.weight.data = torch.tensor(weight)

    def forward(self, x):
        return x + self.branch(x)


ROTATION = [[0.0, -1.0], [1.0, 0.0]]
"""Rotation by 90 degrees. The angle between x and x + ROTATION x is 45 degrees."""


def chain(*weights):
    return nn.Sequential(*(Adding(weight) for weight in weights)).eval()


def plan_blocks(graph, goal, data, **options):
    return kirsch.plan(graph, goal, kinds="block", data=data, **options)


@pytest.fixture
def inputs():
    return torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])


def test_influence_is_one_minus_the_cosine_of_input_and_output(inputs):
    longer, none = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]
    graph = kirsch.trace(chain(ROTATION, longer, none), inputs)
    scores = BLOCK_IMPORTANCES["influence"](graph, [Batch(inputs), Batch(2 * inputs)], seed=0)
    assert scores == pytest.approx({"0": 1 - 0.5**0.5, "1": 0, "2": 0}, abs=1e-7)


def test_change_is_the_relative_change_of_the_outputs_without_the_block(inputs):
    half = [[0.5, 0.0], [0.0, 0.5]]
    graph = kirsch.trace(chain(half, half), inputs)
    scores = BLOCK_IMPORTANCES["change"](graph, [Batch(inputs)], seed=0)
    assert scores == pytest.approx({"0": 1 / 3, "1": 1 / 3}, rel=1e-6)


@pytest.mark.parametrize("importance", ["influence", "change"])
def test_the_least_important_blocks_are_removed(inputs, importance):
    small = [[0.0, -0.1], [0.1, 0.0]]
    graph = kirsch.trace(chain(ROTATION, small, ROTATION, small), inputs)
    plan = plan_blocks(graph, Goal(macs=0.5), inputs, importance=importance)
    assert plan.without == ("1", "3")
    assert plan.after.macs * 2 == plan.before.macs
    assert all(importance in block.reason for block in plan.blocks)


def test_a_removed_block_is_restored_if_the_goal_is_met_without_its_removal(inputs):
    class Wide(Adding):
        def __init__(self):
            super().__init__([[0.1, 0.2], [0.0, 0.1]])
            self.more = nn.Sequential(nn.Linear(2, 50), nn.Linear(50, 2))
            self.more[1].weight.data *= 20

        def forward(self, x):
            return x + self.branch(x) + self.more(x)

    torch.manual_seed(0)
    model = nn.Sequential(Adding([[0.0, 0.0], [0.0, 0.0]]), Wide(), Adding(ROTATION)).eval()
    plan = plan_blocks(kirsch.trace(model, inputs), Goal(parameters=0.5), inputs, importance="change")
    assert plan.without == ("1",)


def test_random_blocks_depend_only_on_the_seed(inputs):
    graph = kirsch.trace(chain(*[ROTATION] * 8), inputs)
    first, again = (
        [plan_blocks(graph, Goal(macs=0.5), None, importance="random", seed=seed).without for seed in range(4)]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1


def test_excluded_blocks_are_kept(inputs):
    graph = kirsch.trace(nn.Sequential(chain(ROTATION, ROTATION), chain(ROTATION, ROTATION)).eval(), inputs)
    assert plan_blocks(graph, Goal(macs=0.5), inputs, exclude=["1"]).without == ("0.0", "0.1")
    assert plan_blocks(graph, Goal(macs=0.5), inputs, exclude=["*.0"]).without == ("0.1", "1.1")
    with pytest.raises(UnknownNameError, match="`exclude` names the layer '7', which does not exist"):
        plan_blocks(graph, Goal(macs=0.5), inputs, exclude=["7"])
    with pytest.raises(UsageError, match=r"The pattern 'b\*' in `exclude` matches no layer"):
        plan_blocks(graph, Goal(macs=0.5), inputs, exclude=["b*"])


def test_a_block_with_an_excluded_layer_is_kept(inputs):
    graph = kirsch.trace(nn.Sequential(chain(ROTATION, ROTATION), nn.Linear(2, 2)).eval(), inputs)
    assert plan_blocks(graph, Goal(macs=0.7), inputs, exclude=["0.0.branch"]).without == ("0.1",)
    plan = plan_blocks(graph, Goal(macs=0.7), inputs, exclude=["1"])
    assert plan.notes[-1] == "exclude=['1'] has no effect: no residual block contains a layer of this name."


def test_a_note_states_the_cost_of_excluded_blocks(inputs):
    graph = kirsch.trace(chain(*[ROTATION] * 4), inputs)
    remain = "at least 25.0% of the MACs and 25.0% of the parameters remain, instead of 0.0% and 0.0%"
    plan = plan_blocks(graph, Goal(macs=0.5), inputs, exclude=["1"])
    assert plan.notes == (f"exclude=['1'] keeps the blocks `1`: {remain}.",)
    assert plan_blocks(graph, Goal(macs=0.5), inputs).notes == ()


def test_a_note_states_why_a_plan_of_blocks_is_far_below_the_goal(inputs):
    model = chain(*[ROTATION] * 4)
    plan = plan_blocks(kirsch.trace(model, inputs), Goal(macs=0.6), inputs)
    (note,) = plan.notes
    assert note == (
        "MACs are 50.0% of the original, 10.0 points below the goal of 60.0%. "
        "Only whole blocks are removed, and the goal would be missed if one of them were kept."
    )
    assert note in kirsch.prune_with_verification(model, plan).notes


def test_an_importance_for_the_other_kinds_is_refused_with_the_kinds_to_give(inputs):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=r"'magnitude' ranks units of layers, .* Known: change, influence, random"):
        plan_blocks(graph, Goal(macs=0.5), inputs, importance="magnitude")
    with pytest.raises(UsageError, match=r"'influence' ranks residual blocks, .* Give kinds='block', or"):
        kirsch.plan(graph, Goal(macs=0.5), importance="influence")


def test_an_unreachable_goal_names_the_least_reachable_cost(inputs):
    graph = kirsch.trace(nn.Sequential(chain(ROTATION), nn.Linear(2, 2)).eval(), inputs)
    least = r"macs 20% is requested, 50% is the least reachable with these options.*has 1 residual block\."
    with pytest.raises(GoalError, match=least):
        plan_blocks(graph, Goal(macs=0.2), inputs)


def test_an_importance_that_is_not_finite_is_refused(inputs):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=r"importance 'influence' of the block '0' is nan"):
        plan_blocks(graph, Goal(macs=0.5), inputs * float("nan"))


def test_an_unknown_importance_names_the_known_ones(inputs):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UnknownNameError, match="influence"):
        plan_blocks(graph, Goal(macs=0.5), inputs, importance="influense")


def test_influence_is_the_default_importance(inputs):
    graph = kirsch.trace(chain(ROTATION, [[0.0, 0.0], [0.0, 0.0]]), inputs)
    plan = plan_blocks(graph, Goal(macs=0.5), inputs)
    assert (plan.without, plan.method["importance"]) == (("1",), "influence")


@pytest.mark.parametrize("importance", ["influence", "change"])
def test_blocks_that_are_ranked_by_running_the_model_need_data(inputs, importance):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=rf"`data` of kirsch\.plan is missing: the importance '{importance}'"):
        kirsch.plan(graph, Goal(macs=0.5), kinds="block", importance=importance)
    assert kirsch.plan(graph, Goal(macs=0.5), kinds="block", importance="random").blocks


def test_data_that_an_importance_of_blocks_does_not_use_is_refused(inputs):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=r"`data` of kirsch\.plan has no effect\. The importance 'random' of blocks"):
        plan_blocks(graph, Goal(macs=0.5), inputs, importance="random")
    labels = torch.zeros(3, dtype=torch.long)
    options = {"max_drop": 0.99, "importance": "random"}
    assert plan_blocks(graph, None, (inputs, labels), **options).blocks  # the drop is measured on it


@pytest.mark.parametrize("importance", [lambda _, group: torch.ones(group.size), {"0": 1.0, "1": 2.0}])
def test_functions_and_scores_are_refused_for_blocks_with_the_names_to_give(inputs, importance):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=r"kinds='block' removes residual blocks\..*\(change, influence, random\)"):
        plan_blocks(graph, Goal(macs=0.5), inputs, importance=importance)


@pytest.mark.parametrize("importance", ["influence", "change"])
@pytest.mark.parametrize("form", ["list", "pair", "pairs", "loader", "array data", "numpy"])
def test_blocks_are_ranked_on_any_form_of_calibration_data(inputs, importance, form):
    labels = torch.tensor([0, 1, 0])
    data = {
        "list": [inputs],
        "pair": (inputs, labels),
        "pairs": [(inputs, labels)],
        "loader": DataLoader(TensorDataset(inputs, labels), batch_size=2),
        "array data": kirsch.ArrayData(inputs, labels),
        "numpy": inputs.numpy(),
    }[form]
    graph = kirsch.trace(chain(ROTATION, [[0.0, -0.1], [0.1, 0.0]]), inputs)
    plans = [plan_blocks(graph, Goal(macs=0.5), each, importance=importance) for each in (inputs, data)]
    assert plans[0].blocks[0].name == plans[1].blocks[0].name == "1"
    assert plans[0].blocks[0].reason == plans[1].blocks[0].reason
    if form in ("pair", "loader"):
        assert plan_blocks(graph, None, data, importance=importance, max_drop=0.99).blocks


def test_a_generator_of_batches_is_refused_for_blocks(inputs):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match="which can be iterated over only once"):
        plan_blocks(graph, Goal(macs=0.5), (part for part in [inputs]))


class Marked(nn.Module):
    """Residual blocks on tokens; the mask has no effect on the outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(2, 2), chain([[0.5, -1.0], [1.0, 0.3]], [[0.0, 0.4], [0.4, 0.0]])

    def forward(self, tokens, attention_mask):
        return self.blocks(self.first(tokens)) + 0 * attention_mask[..., None]


@pytest.mark.parametrize("importance", ["influence", "change"])
def test_padding_does_not_count_for_blocks(importance):
    torch.manual_seed(0)
    tokens, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    graph = kirsch.trace(Marked().eval(), (tokens, mask))
    other = torch.where(mask[..., None] == 1, tokens, torch.randn(3, 4, 2))
    alone = [(tokens[i : i + 1, : i + 2], mask[i : i + 1, : i + 2]) for i in range(3)]
    forms = ([(tokens, mask)], [(other, mask)], alone)
    wanted, *found = (
        {block.name: block.reason for block in _all_blocks(graph, importance, [(each, None) for each in form])}
        for form in forms
    )
    named = [{"tokens": other, "attention_mask": mask}]
    found.append({block.name: block.reason for block in _all_blocks(graph, importance, named)})
    assert all(each == wanted for each in found)
    model = Marked().eval()
    model.first = nn.Identity()
    direct = kirsch.trace(model, (tokens, mask))  # it is not known which axis of the inputs holds the features
    if importance == "influence":
        with pytest.raises(UsageError, match=r"Padding cannot be left out of the activations that 'blocks\.0' reads"):
            _all_blocks(direct, importance, named)
    with pytest.raises(DataError, match="contains only padding"):
        _all_blocks(graph, importance, [((tokens, 0 * mask), None)])


def _all_blocks(graph, importance, data):
    return plan_blocks(graph, Goal(macs=0.34), data, importance=importance).blocks


def test_a_batch_that_may_be_two_inputs_is_refused():
    tokens, mask = torch.randn(3, 4, 2), torch.ones(3, 4)
    graph = kirsch.trace(Marked().eval(), (tokens, mask))
    with pytest.raises(UsageError, match=r"may be inputs and labels, or two inputs.*Give a dict of the inputs by name"):
        plan_blocks(graph, Goal(macs=0.5), (tokens, mask))


def test_the_option_data_is_refused_unless_kinds_is_block(inputs):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(
        UsageError,
        match=r"`data` of kirsch\.plan has no effect\. The importance 'magnitude' is computed from the weights alone",
    ):
        kirsch.plan(graph, Goal(macs=0.5), data=inputs)


@pytest.mark.parametrize("kinds", [["block", "channel"], {"block": 1.0}, {"block": 0.5, "channel": 0}])
def test_blocks_and_other_kinds_need_two_plans(inputs, kinds):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=r"'block' together with other kinds.*Make two plans, one after the other"):
        kirsch.plan(graph, Goal(macs=0.5), kinds=kinds, data=inputs)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("norm", 1),
        ("ranking", "local"),
        ("round_to", 8),
        ("uniform", True),
        ("loadable", True),
        ("min_keep", 0.5),
        ("keep_outputs", ["0"]),
    ],
)
def test_an_option_without_effect_on_blocks_is_refused(inputs, option, value):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=f"`{option}` has no effect on a plan with kinds='block'"):
        plan_blocks(graph, Goal(macs=0.5), inputs, **{option: value})


def test_a_plan_of_blocks_is_restored_from_json(inputs):
    plan = plan_blocks(kirsch.trace(chain(ROTATION, ROTATION), inputs), Goal(macs=0.5), inputs)
    assert kirsch.Plan.from_json(plan.to_json()) == plan


def test_channels_can_be_pruned_after_blocks_are_removed():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(2, 16), nn.Linear(16, 2)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    model, inputs = nn.Sequential(Wide(), Wide(), Wide()).eval(), torch.randn(4, 2)
    short = kirsch.prune(model, plan_blocks(kirsch.trace(model, inputs), Goal(macs=0.7), inputs))
    small = kirsch.prune(short, kirsch.plan(kirsch.trace(short, inputs), Goal(macs=0.5)))
    assert len(list(small.modules())) < len(list(model.modules()))
    assert {layer.up.out_features for layer in small if isinstance(layer, Wide)} == {8}
