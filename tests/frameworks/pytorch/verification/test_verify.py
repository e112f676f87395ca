"""The verification detects faults that are planted in a pruned model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.surgery.prune import verify_cut
from kirsch.frameworks.pytorch.verification import masked, unseen
from kirsch.frameworks.pytorch.verification import verify as verification
from kirsch.frameworks.pytorch.verification.distance import distance
from kirsch.frameworks.pytorch.verification.verify import verify
from trace_and_cut import randomly_removed, verified, with_noise


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
    model = with_noise(network())
    graph = trace(model, torch.randn(2, 3, 9, 9))
    keep = graph.keep(randomly_removed(graph))
    return model, graph, keep, cut(model, graph, keep)


def swap(tensor, axis):
    index = list(range(tensor.shape[axis]))
    index[0], index[1] = index[1], index[0]
    return tensor.data.index_select(axis, torch.tensor(index))


FAULTS = {
    "two outputs of a layer swapped": lambda m: setattr(m[0].weight, "data", swap(m[0].weight, 0)),
    "two inputs of a layer swapped": lambda m: setattr(m[3].weight, "data", swap(m[3].weight, 1)),
    "a bias shifted by one channel": lambda m: setattr(m[0].bias, "data", m[0].bias.data.roll(1)),
    "a running mean shifted by one channel": lambda m: setattr(m[1], "running_mean", m[1].running_mean.roll(1)),
    "a running variance shifted by one channel": lambda m: setattr(m[1], "running_var", m[1].running_var.roll(1)),
    "a scale shifted by one channel": lambda m: setattr(m[1].weight, "data", m[1].weight.data.roll(1)),
    "groups of a norm in another order": lambda m: setattr(m[4].weight, "data", m[4].weight.data.flip(0)),
    "a wrong number of norm groups": lambda m: setattr(m[4], "num_groups", 1),
    "two inputs of the head swapped": lambda m: setattr(m[9].weight, "data", swap(m[9].weight, 1)),
    "a missing cut": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3))),
    "a layer norm of the old width": lambda m: setattr(m[8], "normalized_shape", (12,)),
}


def test_a_correct_cut_passes(case):
    model, graph, keep, pruned = case
    verification = verify(pruned, model, graph, keep)
    assert verification.passed
    assert verification.error < 1e-12
    assert verification.power > 0.01
    assert len(verification.statistics) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_tensor_or_attribute_is_detected(fault, case):
    model, graph, keep, pruned = case
    FAULTS[fault](pruned)
    with pytest.raises(VerificationError):
        verify_cut(pruned, model, graph, keep)


def test_a_statistic_over_removed_entries_is_detected(case, monkeypatch):
    model, graph, keep, pruned = case
    plain = masked.STATISTICS["layer_norm"]
    monkeypatch.setitem(masked.STATISTICS, "layer_norm", lambda mask, *a: plain(torch.ones_like(mask), *a))
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verify(pruned, model, graph, keep)


def test_a_fault_in_a_branch_that_is_scaled_by_zero_is_detected():
    model = network().eval()
    nn.init.zeros_(model[1].weight)  # the output of the branch is zero
    nn.init.zeros_(model[4].weight)
    graph = trace(model, torch.randn(2, 3, 9, 9))
    keep = graph.keep(randomly_removed(graph))
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
        raise TypeError("float64 is not supported")
    return self.second(x)


def half_and_back(self, x):
    return F.linear(x.half(), self.second.weight.half(), self.second.bias.half()).float()


def autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.second(x)


def constant(self, x):
    return torch.zeros(3, 6) + self.second(x @ torch.eye(8))


def test_a_model_that_refuses_float64_is_verified_in_float32():
    assert "float32" in verified(with_noise(Between(refuse)), torch.randn(3, 4)).reason


@pytest.mark.parametrize("between", [half_and_back, autocast, constant])
def test_a_model_that_converts_dtypes_is_verified_in_float64(between):
    verification = verified(with_noise(Between(between)), torch.randn(3, 4))
    assert "float64" in verification.reason
    assert verification.error < 1e-12


CONSTANTS = {
    "torch.tensor": lambda x: torch.tensor([0.485, 0.456, 0.406, 0.1], dtype=x.dtype),
    "new_tensor": lambda x: x.new_tensor([0.485, 0.456, 0.406, 0.1]),
    "torch.as_tensor": lambda x: torch.as_tensor((0.485, 0.456, 0.406, 0.1), dtype=x.dtype).view(1, 4).sqrt(),
    "a list of numbers": lambda x: torch.tensor([0.485, 0.456, 0.406, 0.1]).to(x),
    "a number": lambda x: torch.tensor(0.485, dtype=x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_in_the_dtype_of_the_input_are_rounded_as_in_the_trace(kind, dtype):
    model = with_noise(nn.Sequential(nn.Linear(4, 4), Between(lambda s, x: s.second(x)))).to(dtype)
    model[0].register_forward_pre_hook(lambda _, args: args[0] - CONSTANTS[kind](args[0]))
    inputs = torch.randn(3, 4, dtype=dtype)
    verification = verified(model, inputs)
    assert "float64" in verification.reason
    assert verification.error < 1e-12
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verified(model, inputs, lambda m: setattr(m[1].second.weight, "data", swap(m[1].second.weight, 1)))


OUTPUTS = {
    "classes": lambda s, x: s.second(x).argmax(-1),
    "a mask": lambda s, x: s.second(x) > 0,
    "complex numbers": lambda s, x: torch.fft.fft(s.second(x)),
    "infinities beside numbers": lambda s, x: s.second(x).unsqueeze(1) + torch.full((6, 6), -torch.inf).triu(1),
    "the smallest number of a dtype": lambda s, x: limited(s.second(x), torch.finfo(x.dtype).min),
    "half of the smallest number of a dtype": lambda s, x: limited(s.second(x), torch.finfo(type=x.dtype).min / 2),
    "the smallest number, by a reference to `finfo` from before the verification": lambda s, x: limited(
        s.second(x), FINFO(x.dtype).min
    ),
    "the largest number of a dtype, added": lambda s, x: s.second(x) + (x[:, :1] > 0) * torch.finfo(x.dtype).max,
}
FINFO = torch.finfo


def limited(scores, number):
    return scores.masked_fill(torch.arange(6) < 2, number)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_faults_are_detected_in_outputs_of_each_kind(kind):
    torch.manual_seed(0)  # with few samples and unlucky weights, no predicted class might change
    model, inputs = with_noise(Between(OUTPUTS[kind])), torch.randn(300, 4)
    assert verified(model, inputs).passed
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verified(model, inputs, lambda m: setattr(m.second.weight, "data", swap(m.second.weight, 1)))


def test_a_model_with_complex_weights_is_verified():
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 3)
            self.gain = nn.Parameter(torch.randn(5, dtype=torch.complex64))

        def forward(self, x):
            x = torch.fft.irfft(torch.fft.rfft(torch.relu(self.first(x))) * self.gain)
            return self.second(x.unflatten(-1, (2, 4)))

    assert verified(with_noise(Filter()), torch.randn(3, 4)).passed


def test_the_noise_keeps_small_variances_and_arguments_of_logarithms_positive():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
            self.rate = nn.Parameter(torch.full((8,), 1e-3))
            self.register_buffer("variance", torch.full((8,), 1e-4))

        def forward(self, x):
            return self.second(self.first(x) * self.rate.log() / self.variance.sqrt())

    verification = verified(Scaled(), torch.randn(3, 4))
    assert verification.passed
    assert verification.power > 0.01


def test_a_model_that_draws_random_numbers_in_inference_raises_an_error():
    model, inputs = Between(lambda s, x: s.second(F.dropout(x, 0.5, training=True))), torch.randn(3, 4)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(VerificationError, match=r"cannot be verified\. It draws random numbers"):
        verified(model, inputs)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_draws_as_many_random_numbers_after_the_cut_as_before_is_compared_with_the_same_seed():
    def shuffled(self, x):
        order = torch.rand(x.shape[0], x.shape[1]).argsort(1)
        return self.second(x.gather(1, order.unsqueeze(-1).expand_as(x)))

    assert verified(with_noise(Between(shuffled)), torch.randn(3, 6, 4)).passed


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_a_constant_example_input_cannot_hide_a_fault(number):
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    inputs = torch.full((3, 4), number)
    assert verified(model, inputs).power > 1e-3
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verified(model, inputs, lambda m: setattr(m[2].weight, "data", swap(m[2].weight, 1)))


class Attention(nn.Module):
    """Attention with two heads."""

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
def test_modules_without_effect_on_the_outputs_are_listed_as_unseen(kind):
    inputs, unseen = TOKENS[kind]
    assert verified(with_noise(Attention()), inputs).unseen == unseen


@pytest.fixture
def runs(monkeypatch):
    """The modules without effect in each run of the original, where the effects of two rows of a weight are sampled."""
    found, run_original = [], unseen.run_original

    def run(*args, **options):
        found.append(run_original(*args, **options))
        return found[-1]

    monkeypatch.setattr(unseen, "ROWS", 2)
    monkeypatch.setattr(verification, "run_original", run)
    return found


def test_the_effects_of_some_rows_are_sufficient_if_each_module_has_an_effect(runs):
    assert verified(with_noise(Attention()), torch.randn(2, 5, 4)).unseen == ()
    assert len(runs) == 1


def test_all_rows_decide_if_the_units_of_some_rows_have_no_effect(runs):
    class OneActive(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)
            self.shift = nn.Parameter(torch.where(torch.arange(8) == 3, 0.0, -1e3))  # not a row of the sample

        def forward(self, x):
            return self.second((self.first(x) + self.shift).relu())

    model, inputs = OneActive(), torch.randn(5, 4)
    graph = trace(model, inputs)
    keep = graph.keep({graph.groups[0].name: (3,)})
    assert verify(cut(model, graph, keep), model, graph, keep).unseen == ()
    assert [run.unseen for run in runs] == [("first",), ()]


def test_modules_without_effect_are_found_in_a_model_with_batch_normalization():
    class Scaled(Attention):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.norm(super().forward(x).flatten(0, 1)))

    found = verified(with_noise(Scaled()), torch.randn(4, 1, 4))
    assert (found.unseen, found.undetermined) == (("q", "k"), "")


def test_no_module_is_listed_as_unseen_if_no_output_is_differentiable():
    assert verified(with_noise(Between(OUTPUTS["classes"])), torch.randn(3, 4)).unseen == ()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
            "OutOfMemoryError: CUDA out of memory",
        ),
        (NotImplementedError("derivative for aten::nearest"), "NotImplementedError: derivative for aten::nearest."),
    ],
)
def test_the_result_states_why_modules_without_effect_could_not_be_determined(monkeypatch, error, reason):
    outputs = masked.MaskedRun.outputs

    def outputs_without_gradients(run, inputs, *, gradients=False, **options):
        if gradients:
            raise error
        return outputs(run, inputs, **options)

    monkeypatch.setattr(masked.MaskedRun, "outputs", outputs_without_gradients)
    inputs, _ = TOKENS["one token"]
    found = verified(with_noise(Attention()), inputs)
    assert (found.passed, found.unseen) == (True, ())
    assert found.undetermined.startswith(reason)


def test_the_distance_from_a_reference_of_zeros_is_zero_only_for_zeros():
    zeros = [torch.zeros(3)]
    assert distance(zeros, zeros) == 0.0
    assert distance(zeros, [torch.ones(3)]) > 1e9


def test_a_model_that_returns_nan_raises_an_error():
    with pytest.raises(VerificationError, match="It returns NaN"):
        verified(Between(lambda s, x: s.second(x).sub(100).log()), torch.randn(3, 4))


def test_a_model_that_returns_only_infinity_raises_an_error():
    with pytest.raises(VerificationError, match="no finite number"):
        verified(Between(lambda s, x: s.second(x).abs() / 0), torch.randn(3, 4))


def test_equal_infinities_beside_finite_numbers_have_distance_zero():
    one, other = torch.tensor([1.0, -torch.inf]), torch.tensor([-torch.inf, 1.0])
    assert distance([one], [one]) == 0
    assert not distance([one], [other]) <= 1
    assert torch.tensor(distance([one * torch.inf], [one * torch.inf])).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("limit", ["eps", "tiny", "min"])
def test_limits_of_a_dtype_in_the_code_do_not_change_in_the_verification(limit, dtype):
    model = Between(lambda s, x: s.second(x) * getattr(torch.finfo(x.dtype), limit)).to(dtype)
    assert verified(model, torch.randn(3, 4, dtype=dtype)).passed
    assert torch.finfo is FINFO


def test_outputs_with_large_values_only_are_compared():
    assert distance([torch.tensor([1e38, 2e38])], [torch.tensor([1e38, 1e38])]) > 0.1


def test_a_model_on_the_meta_device_raises_an_error():
    model = Between(lambda s, x: s.second(x)).to("meta")
    with pytest.raises(VerificationError, match="is on the meta device"):
        verified(model, torch.randn(3, 4, device="meta"))


def only_in_training(self, x):
    return self.second(x.view(-1, 8) if self.training else x)


def test_a_fixed_width_in_the_training_branch_of_the_forward_method_is_detected():
    with pytest.raises(VerificationError, match=r"runs in inference mode only\. RuntimeError: shape '\[-1, 8\]'"):
        verified(Between(only_in_training), torch.randn(3, 4))


def test_a_model_that_fails_in_training_mode_before_the_cut_is_verified_in_inference_mode():
    def either(self, x):
        if self.training:
            raise ValueError("needs targets")
        return self.second(x)

    found = verified(with_noise(Between(either)), torch.randn(3, 4))
    assert found.passed
    assert found.not_compared == ("training mode: the original raises ValueError: needs targets.",)


def test_the_error_for_a_pruned_model_that_fails_names_exception_and_line():
    class Checked(nn.Linear):
        def forward(self, x):
            {8: None}[x.shape[1]]
            return super().forward(x)

    model = with_noise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Checked(8, 2)))
    graph = trace(model, torch.randn(3, 4))
    keep = graph.keep(randomly_removed(graph))
    with pytest.raises(
        VerificationError, match=r"does not run\. KeyError: 4\. The exception is raised at test_verify\.py:\d+\."
    ):
        verify_cut(cut(model, graph, keep), model, graph, keep)


def test_inputs_that_the_model_changes_in_place_are_not_changed():
    inputs = torch.randn(3, 4, dtype=torch.float64)
    before = inputs.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    assert verified(with_noise(model), inputs).passed
    assert torch.equal(inputs, before)
