"""Counted parameters and multiply-accumulates equal the closed form."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

import kirsch
from kirsch.frameworks.pytorch.analysis.count import count, macs_of


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


LAYERS = {
    "linear": (nn.Linear(6, 8), (4, 6), 6 * 8 + 8, 4 * 6 * 8),
    "convolution": (nn.Conv2d(3, 8, 3, bias=False), (2, 3, 6, 6), 8 * 3 * 9, 2 * 4 * 4 * 8 * 3 * 9),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), (1, 4, 5, 5), 8 * 2 * 9, 25 * 8 * 2 * 9),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, 2, bias=False), (1, 4, 5, 5), 4 * 6 * 4, 25 * 4 * 6 * 4),
    "recurrent": (nn.LSTM(6, 5, bias=False, batch_first=True), (2, 3, 6), 20 * 11, 2 * 3 * 20 * 11),
    "attention": (Attention(), (2, 7, 5), 0, 2 * 2 * 7 * 7 * 5),
    "no product": (nn.BatchNorm2d(3), (2, 3, 4, 4), 6, 0),
}


GROUPED = {
    "rows by group": ((8, 16), (2, 16, 24), [2, 8], 8 * 16 * 24),
    "columns by group": ((2, 8, 16), (16, 24), [8, 24], 8 * 16 * 24),
    "inner axis by group": ((8, 16), (16, 24), [8, 16], 8 * 16 * 24),
    "one of each": ((2, 8, 16), (2, 16, 24), None, 2 * 8 * 16 * 24),
}


@pytest.mark.parametrize("name", GROUPED)
def test_the_macs_of_a_grouped_matrix_product_equal_its_formula(name):
    rows, weight, ends, macs = GROUPED[name]
    ends = None if ends is None else torch.tensor(ends, dtype=torch.int32)

    class Grouped(nn.Module):
        def forward(self, x):
            return torch._grouped_mm(x, torch.ones(weight, dtype=torch.bfloat16), offs=ends)

    assert count(Grouped(), torch.ones(rows, dtype=torch.bfloat16)) == (0, macs)


@pytest.mark.parametrize("name", LAYERS)
def test_the_counts_of_a_layer_equal_its_formula(name):
    layer, shape, parameters, macs = LAYERS[name]
    assert count(layer, torch.randn(shape)) == (parameters, macs)


def test_a_parameter_can_be_the_input_of_a_module():
    class LearnedToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.inner = nn.Parameter(torch.ones(2, 6)), nn.Linear(6, 8)

        def forward(self, x):
            return self.inner(self.token) + x

    assert count(LearnedToken(), torch.randn(2, 8)) == (12 + 56, 2 * 6 * 8)


def test_a_tied_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert count(model, torch.randn(1, 4)) == (16, 32)


def test_counting_takes_keyword_inputs_and_keeps_modes_and_the_random_state():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model[0].eval()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert count(model, {"input": torch.ones(1, 4)}) == (20, 16)
    assert [m.training for m in model.modules()] == [True, False, True]
    assert torch.equal(torch.rand(2), expected)


def test_the_macs_of_a_traced_operation_follow_from_its_shapes():
    class Product(nn.Module):
        def forward(self, x, y):
            return (x @ y).relu()

    program = torch.export.export(Product(), (torch.ones(2, 3, 4), torch.ones(4, 5)), strict=False)
    costs = {n.target._schema.name: macs_of(n) for n in program.graph.nodes if n.op == "call_function"}
    assert costs == {"aten::matmul": 2 * 3 * 4 * 5, "aten::relu": 0}


@torch.library.custom_op("kirsch_tests::product", mutates_args=())
def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y


@product.register_fake
def _(x, y):
    return x.new_empty(x.shape[0], y.shape[1])


class Custom(nn.Module):
    """A linear layer, and a product of tensors by an operator that PyTorch does not know."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.second(self.first(product(x, self.weight)).relu())


class Conditional(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x.clone(), (x,))


@pytest.mark.parametrize(
    ("model", "operator"), [(Custom(), "kirsch_tests.product.default"), (Conditional(), "cond")], ids=["custom", "cond"]
)
def test_the_macs_of_operators_without_a_formula_are_unknown(model, operator):
    program = torch.export.export(model.eval(), (torch.ones(4, 4),), strict=False)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    (unknown,) = {str(node.target) for node in calls if macs_of(node) is None}
    assert unknown == operator


def test_a_formula_that_raises_an_error_leaves_the_macs_unknown():
    @torch.library.custom_op("kirsch_tests::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    scaled.register_fake(torch.empty_like)

    @register_flop_formula(torch.ops.kirsch_tests.scaled)
    def formula(*_, **__):
        raise TypeError("the formula lacks an argument")

    class Scaled(nn.Module):
        def forward(self, x):
            return scaled(x)

    program = torch.export.export(Scaled(), (torch.ones(4, 4),), strict=False)
    assert [macs_of(node) for node in program.graph.nodes if node.op == "call_function"] == [None]


def test_operators_without_products_have_no_macs_even_if_they_need_values():
    class Selection(nn.Module):
        def forward(self, x):
            return x[x > 0].sum() + torch.unique(x).sum()

    program = torch.export.export(Selection(), (torch.ones(4, 4),), strict=False)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and "assert" not in str(node.target)]
    assert {macs_of(node) for node in calls if "sym" not in str(node.target)} == {0}


def test_a_note_lists_the_operations_whose_macs_are_not_counted():
    graph = kirsch.trace(Custom().eval(), torch.randn(3, 4))
    (note,) = (note for note in kirsch.plan(graph, kirsch.Goal(macs=0.6)).notes if "counted" in note)
    assert re.match(r"The MACs of `kirsch_tests\.product` \(test_count\.py:\d+\) cannot be counted", note)
    assert not any("counted" in note for note in kirsch.plan(graph, kirsch.Goal(parameters=0.8)).notes)
