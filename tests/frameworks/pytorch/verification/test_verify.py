"""The proof sees every fault that is planted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.analysis import operators
from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.frameworks.pytorch.framework import PyTorch
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.verification import masked
from kirsch.frameworks.pytorch.verification.verify import distance, verify
from kirsch.graph.labels import Tensor
from proving import half_of_everything, shaken


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.GroupNorm(3, 12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 4),
    )


@pytest.fixture
def case():
    model = shaken(network())
    graph = trace(model, torch.randn(2, 3, 9, 9))
    keep = graph.keep(half_of_everything(graph))
    return model, graph, keep, cut(model, graph, keep)


def swap(tensor, axis):
    index = list(range(tensor.shape[axis]))
    index[0], index[1] = index[1], index[0]
    return tensor.data.index_select(axis, torch.tensor(index))


FAULTS = {
    "two outputs of a layer swapped": lambda m: setattr(m[0].weight, "data", swap(m[0].weight, 0)),
    "two inputs of a layer swapped": lambda m: setattr(m[3].weight, "data", swap(m[3].weight, 1)),
    "a bias off by one": lambda m: setattr(m[0].bias, "data", m[0].bias.data.roll(1)),
    "a running mean off by one": lambda m: setattr(m[1], "running_mean", m[1].running_mean.roll(1)),
    "a running variance off by one": lambda m: setattr(m[1], "running_var", m[1].running_var.roll(1)),
    "a scale off by one": lambda m: setattr(m[1].weight, "data", m[1].weight.data.roll(1)),
    "groups of a norm in another order": lambda m: setattr(m[4].weight, "data", m[4].weight.data.flip(0)),
    "a wrong number of norm groups": lambda m: setattr(m[4], "num_groups", 1),
    "two inputs of the head swapped": lambda m: setattr(m[9].weight, "data", swap(m[9].weight, 1)),
    "a missing cut": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3))),
    "a layer norm of the old width": lambda m: setattr(m[8], "normalized_shape", (12,)),
}


def test_a_right_cut_passes(case):
    model, graph, keep, pruned = case
    proof = verify(pruned, model, graph, keep)
    assert proof.passed
    assert proof.error < 1e-12
    assert proof.power > 0.01
    assert len(proof.statistics) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_sees(fault, case):
    model, graph, keep, pruned = case
    FAULTS[fault](pruned)
    with pytest.raises(VerificationError):
        PyTorch()._prove(pruned, model, graph, keep)


def test_a_wrong_statistic_is_seen(case, monkeypatch):
    model, graph, keep, pruned = case
    plain = masked.STATISTICS["layer_norm"]
    monkeypatch.setitem(masked.STATISTICS, "layer_norm", lambda mask, *a: plain(torch.ones_like(mask), *a))
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verify(pruned, model, graph, keep)


def test_branches_that_start_at_zero_cannot_hide_a_fault():
    model = network().eval()
    nn.init.zeros_(model[1].weight)  # the branch puts out nothing
    nn.init.zeros_(model[4].weight)
    graph = trace(model, torch.randn(2, 3, 9, 9))
    keep = graph.keep(half_of_everything(graph))
    pruned = cut(model, graph, keep)
    pruned[3].weight.data = swap(pruned[3].weight, 1)
    with pytest.raises(VerificationError):
        verify(pruned, model, graph, keep)


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.between(self, torch.relu(self.first(x)))


def refuse(self, x):
    if x.dtype == torch.float64:
        raise TypeError("float64 is not for me")
    return self.second(x)


def half_and_back(self, x):
    return F.linear(x.half(), self.second.weight.half(), self.second.bias.half()).float()


def autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.second(x)


def constant(self, x):
    return torch.zeros(3, 6) + self.second(x @ torch.eye(8))


def verified(model, inputs, fault=lambda model: None):
    graph = trace(model, inputs)
    keep = graph.keep(half_of_everything(graph))
    pruned = cut(model, graph, keep)
    fault(pruned)
    return verify(pruned, model, graph, keep)


def test_a_model_that_refuses_float64_is_verified_in_float32():
    assert "float32" in verified(shaken(Between(refuse)), torch.randn(3, 4)).reason


@pytest.mark.parametrize("between", [half_and_back, autocast, constant])
def test_what_converts_its_numbers_is_verified_in_float64_all_the_same(between):
    proof = verified(shaken(Between(between)), torch.randn(3, 4))
    assert "float64" in proof.reason
    assert proof.error < 1e-12


OUTPUTS = {
    "classes": lambda s, x: s.second(x).argmax(-1),
    "a mask": lambda s, x: s.second(x) > 0,
    "complex numbers": lambda s, x: torch.fft.fft(s.second(x)),
    "infinities beside numbers": lambda s, x: s.second(x).unsqueeze(1) + torch.full((6, 6), -torch.inf).triu(1),
    "the least number of a type": lambda s, x: limited(s.second(x), torch.finfo(x.dtype).min),
    "a part of the least number": lambda s, x: limited(s.second(x), torch.finfo(type=x.dtype).min / 2),
    "the least number, read before": lambda s, x: limited(s.second(x), FINFO(x.dtype).min),
    "the largest number, added": lambda s, x: s.second(x) + (x[:, :1] > 0) * torch.finfo(x.dtype).max,
}
FINFO = torch.finfo


def limited(scores, number):
    return scores.masked_fill(torch.arange(6) < 2, number)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_faults_are_seen_in(kind):
    torch.manual_seed(0)  # of few samples and unlucky weights, every class could stay what it was
    model, inputs = shaken(Between(OUTPUTS[kind])), torch.randn(300, 4)
    assert verified(model, inputs).passed
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verified(model, inputs, lambda m: setattr(m.second.weight, "data", swap(m.second.weight, 1)))


def test_complex_weights_stay_complex():
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 3)
            self.gain = nn.Parameter(torch.randn(5, dtype=torch.complex64))

        def forward(self, x):
            x = torch.fft.irfft(torch.fft.rfft(torch.relu(self.first(x))) * self.gain)
            return self.second(x.unflatten(-1, (2, 4)))

    assert verified(shaken(Filter()), torch.randn(3, 4)).passed


def test_small_variances_and_logarithms_survive_the_noise():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
            self.rate = nn.Parameter(torch.full((8,), 1e-3))
            self.register_buffer("variance", torch.full((8,), 1e-4))

        def forward(self, x):
            return self.second(self.first(x) * self.rate.log() / self.variance.sqrt())

    proof = verified(Scaled(), torch.randn(3, 4))
    assert proof.passed
    assert proof.power > 0.01


def test_a_model_that_draws_random_numbers_is_refused_by_that_name():
    model, inputs = Between(lambda s, x: s.second(F.dropout(x, 0.5, training=True))), torch.randn(3, 4)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(VerificationError, match=r"cannot be verified\. It draws random numbers"):
        verified(model, inputs)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_draws_as_much_after_the_cut_is_held_against_the_same_draws():
    def shuffled(self, x):
        order = torch.rand(x.shape[0], x.shape[1]).argsort(1)
        return self.second(x.gather(1, order.unsqueeze(-1).expand_as(x)))

    assert verified(shaken(Between(shuffled)), torch.randn(3, 6, 4)).passed


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_an_example_of_one_number_everywhere_cannot_hide_a_fault(number):
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    inputs = torch.full((3, 4), number)
    assert verified(model, inputs).power > 1e-3
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verified(model, inputs, lambda m: setattr(m[2].weight, "data", swap(m[2].weight, 1)))


class Attention(nn.Module):
    """Two heads over tokens."""

    def __init__(self):
        super().__init__()
        self.heads, self.out = 2, nn.Linear(8, 3)
        self.q, self.k, self.v = (nn.Linear(4, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


TOKENS = {
    "one token": (torch.randn(2, 1, 4), ("q", "k")),
    "tokens that are all the same": (torch.randn(2, 1, 4).expand(2, 5, 4), ("q", "k")),
    "tokens": (torch.randn(2, 5, 4), ()),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_what_the_example_does_not_show_is_named(kind):
    inputs, unseen = TOKENS[kind]
    assert verified(shaken(Attention()), inputs).unseen == unseen


def test_an_output_of_classes_shows_no_slope_and_nothing_is_said():
    assert verified(shaken(Between(OUTPUTS["classes"])), torch.randn(3, 4)).unseen == ()


def test_an_output_of_zeros_in_single_precision_differs_from_none():
    zeros = [torch.zeros(3)]
    assert distance(zeros, zeros) == 0.0
    assert distance(zeros, [torch.ones(3)]) > 1e9


def test_a_model_that_puts_out_nan_is_refused_by_that_name():
    with pytest.raises(VerificationError, match="It puts out NaN"):
        verified(Between(lambda s, x: s.second(x).sub(100).log()), torch.randn(3, 4))


def test_a_model_that_puts_out_infinity_alone_is_refused():
    with pytest.raises(VerificationError, match="no finite number"):
        verified(Between(lambda s, x: s.second(x).abs() / 0), torch.randn(3, 4))


def test_infinities_beside_finite_numbers_are_equal_where_they_are_the_same():
    one, other = torch.tensor([1.0, -torch.inf]), torch.tensor([-torch.inf, 1.0])
    assert distance([one], [one]) == 0
    assert not distance([one], [other]) <= 1
    assert torch.tensor(distance([one * torch.inf], [one * torch.inf])).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("limit", ["eps", "tiny", "min"])
def test_limits_of_the_type_in_the_code_are_those_of_the_trace(limit, dtype):
    model = Between(lambda s, x: s.second(x) * getattr(torch.finfo(x.dtype), limit)).to(dtype)
    assert verified(model, torch.randn(3, 4, dtype=dtype)).passed
    assert torch.finfo is FINFO


def test_large_numbers_alone_are_compared():
    assert distance([torch.tensor([1e38, 2e38])], [torch.tensor([1e38, 1e38])]) > 0.1


def test_a_model_without_values_is_refused_by_that_name():
    model = Between(lambda s, x: s.second(x)).to("meta")
    with pytest.raises(VerificationError, match="lives on the meta device"):
        verified(model, torch.randn(3, 4, device="meta"))


def only_in_training(self, x):
    return self.second(x.view(-1, 8) if self.training else x)


def test_a_width_that_only_training_holds_on_to_is_seen():
    with pytest.raises(VerificationError, match=r"runs in inference mode only\. RuntimeError: shape '\[-1, 8\]'"):
        verified(Between(only_in_training), torch.randn(3, 4))


def test_a_model_that_cannot_train_as_it_is_may_be_cut():
    def either(self, x):
        if self.training:
            raise ValueError("needs targets")
        return self.second(x)

    assert verified(shaken(Between(either)), torch.randn(3, 4)).passed


def test_whatever_the_code_of_the_pruned_model_raises_is_told_in_one_sentence(case):
    class Checked(nn.Linear):
        def forward(self, x):
            {8: None}[x.shape[1]]
            return super().forward(x)

    model = shaken(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Checked(8, 2)))
    graph = trace(model, torch.randn(3, 4))
    keep = graph.keep(half_of_everything(graph))
    with pytest.raises(VerificationError, match=r"does not run\. KeyError: 4\. It is raised at test_verify\.py:\d+\."):
        PyTorch()._prove(cut(model, graph, keep), model, graph, keep)


def test_inputs_that_the_model_writes_into_are_left_as_they_were():
    inputs = torch.randn(3, 4, dtype=torch.float64)
    before = inputs.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    assert verified(shaken(model), inputs).passed
    assert torch.equal(inputs, before)


class Auxiliary(nn.Module):
    """A second head that only training runs, over the sum of two layers of its own."""

    def __init__(self, *, draws=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.left, self.right, self.head, self.drop = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3), nn.Dropout(0.5)
        self.norm, self.draws = nn.LayerNorm(6), draws

    def forward(self, x):
        x = self.drop(self.first(x).relu())
        if not self.training or (self.draws and torch.rand([]) < 0.5):
            return self.second(x)
        return self.second(x), self.head(self.norm(F.dropout(self.left(x) + self.right(x), 0.3, training=True)))


def test_what_only_training_runs_is_cut_and_held_against_the_masked_original():
    model = shaken(Auxiliary())
    graph = trace(model, torch.randn(5, 4))
    assert sorted(group.size for group in graph.groups) == [6, 8]
    assert verified(model, torch.randn(5, 4)).unseen == ()


@pytest.mark.parametrize("left_out", ["the tie of a sum", "the statistic of a normalization"])
def test_a_fault_in_what_only_training_runs_is_seen(monkeypatch, left_out):
    def untied(step):
        for tensor in step.tensors()[1:]:
            for axis in tensor.axes:
                step.facts.reduce(axis)
        return Tensor.of(step.shape, step.tensors()[0].axes)

    def plain(mask, *args):
        return masked_norm(torch.ones_like(mask), *args)

    masked_norm = masked.STATISTICS["layer_norm"]
    if left_out == "the tie of a sum":
        monkeypatch.setitem(operators.RULES, "add", untied)
    else:
        monkeypatch.setitem(masked.STATISTICS, "layer_norm", plain)
    with pytest.raises(VerificationError, match=r"in training mode is not equal to the masked original|does not run"):
        verified(shaken(Auxiliary()), torch.randn(5, 4))


def test_a_model_that_draws_what_it_runs_in_training_is_not_refused_for_that():
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        seen.add(verified(shaken(Auxiliary(draws=True)), torch.randn(5, 4)).unseen)
    assert ("left", "right", "head", "norm") in seen  # where it went another way, that is said
