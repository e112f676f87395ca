"""`cut` returns a model with the class, flags and values of the original, and does not change the original."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis.input_specifications import inputs_like
from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.frameworks.pytorch.surgery.cut import cut
from trace_and_cut import assert_pruned_correctly, randomly_removed, with_noise

IMAGE = torch.randn(2, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + torch.relu(self.inner(x))).mean((2, 3)))


def halved(model, inputs=IMAGE):
    graph = trace(model, inputs)
    return cut(model, graph, graph.keep(randomly_removed(graph)))


def test_the_original_is_not_changed():
    model = with_noise(Residual()).train()
    before = copy.deepcopy(model.state_dict())
    identities = [id(p) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    halved(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert identities == [id(p) for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert model.stem.out_channels == 8
    assert type(model.stem.out_channels) is int
    assert "forward" not in vars(model)


def test_the_random_state_of_the_caller_is_not_changed():
    model = Residual()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert_pruned_correctly(model, IMAGE)
    assert torch.equal(torch.rand(3), expected)


def test_the_pruned_model_has_the_class_of_the_original_and_updated_width_attributes():
    model = Residual()
    pruned = halved(model)
    assert type(pruned) is Residual
    assert (
        pruned.stem.out_channels == pruned.norm.num_features == pruned.inner.in_channels == pruned.head.in_features == 4
    )
    assert all(type(n) is int for n in (pruned.stem.out_channels, pruned.norm.num_features, pruned.head.in_features))


def test_kept_weights_equal_those_of_the_original():
    model = with_noise(Residual())
    graph = trace(model, IMAGE)
    removed = randomly_removed(graph)
    pruned = cut(model, graph, graph.keep(removed))
    stem = next(group for group in graph.groups if group.name == "stem")
    kept = [unit for unit in range(8) if unit not in removed[stem.name]]
    assert torch.equal(pruned.stem.weight, model.stem.weight[kept])
    assert torch.equal(pruned.norm.running_var, model.norm.running_var[kept])
    assert torch.equal(pruned.head.weight, model.head.weight[:, kept])
    assert torch.equal(pruned.head.bias, model.head.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype):
    model = Residual().to(dtype)
    assert {p.dtype for p in halved(model, IMAGE.to(dtype)).parameters()} == {dtype}


def test_flags_modes_and_hooks_are_kept():
    model = Residual().train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.stem.weight.remark = "a note of the user"
    seen = []
    model.inner.register_forward_hook(lambda *_: seen.append("called"))
    pruned = halved(model)
    seen.clear()  # tracing runs hooks, too, because they may change outputs
    assert pruned.training
    assert not pruned.norm.training
    assert [p.requires_grad for p in pruned.parameters()] == [p.requires_grad for p in model.parameters()]
    assert pruned.stem.weight.remark == "a note of the user"
    pruned(IMAGE)
    assert seen == ["called"]


def test_channels_last_weights_keep_their_memory_format():
    model = Residual().to(memory_format=torch.channels_last)
    pruned = halved(model)
    assert pruned.inner.weight.is_contiguous(memory_format=torch.channels_last)


def test_no_memory_is_shared_with_the_original():
    model = Residual()
    addresses = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in halved(model).state_dict().values())


def test_tied_weights_stay_tied():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    model[4].weight = model[2].weight
    graph, pruned = assert_pruned_correctly(model, torch.randn(3, 6), sizes=[8])
    assert pruned[4].weight is pruned[2].weight
    assert graph.cost.parameters == sum(p.numel() for p in model.parameters())


def test_the_pruned_model_can_be_copied_and_trained():
    pruned = halved(Residual()).train()
    clone = copy.deepcopy(pruned)
    optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
    clone(IMAGE).sum().backward()
    assert all(p.grad is not None for p in clone.parameters())
    optimizer.step()
    assert not torch.equal(clone.stem.weight, pruned.stem.weight)


def test_parameters_without_gradient_are_cut():
    model = Residual()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert_pruned_correctly(model, IMAGE, sizes=[8])


def test_removing_nothing_changes_nothing():
    model = with_noise(Residual())
    graph = trace(model, IMAGE)
    same = cut(model, graph, graph.keep({}))
    assert torch.equal(same(IMAGE), model(IMAGE))
    assert all(a is not b for a, b in zip(same.parameters(), model.parameters(), strict=True))


def test_a_model_on_the_meta_device_is_traced_and_cut():
    with torch.device("meta"):
        model = Residual()
    graph = trace(model, torch.randn(2, 3, 8, 8, device="meta"))
    pruned = cut(model, graph, graph.keep(randomly_removed(graph)))
    assert pruned.stem.weight.shape == (4, 3, 3, 3)
    assert pruned.stem.weight.is_meta


class Auxiliary(nn.Module):
    """A classifier with an auxiliary head that only runs in training mode."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_a_head_that_only_runs_in_training_mode_is_cut():
    _, pruned = assert_pruned_correctly(Auxiliary(), torch.randn(2, 6), sizes=[8])
    main, aux = pruned.train()(torch.randn(2, 6))
    assert main.shape == (2, 3)
    assert aux.shape == (2, 5)


def test_unused_parameters_are_kept_and_reported_as_a_blocker():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.register_parameter("spare", nn.Parameter(torch.ones(40)))
    graph, pruned = assert_pruned_correctly(model, torch.randn(2, 6), sizes=[8])
    assert pruned.spare.shape == (40,)
    assert "the traced forward pass does not use the parameter" in graph.blockers[0].reason


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, a, b=None):
        x = torch.relu(self.left(a))
        x = x if b is None else x + torch.relu(self.right(b))
        return {"logits": self.head(x), "extra": (x.mean(),)}


@pytest.mark.parametrize(
    "inputs",
    [(torch.randn(2, 4), torch.randn(2, 5)), {"a": torch.randn(2, 4), "b": torch.randn(2, 5)}],
    ids=["positional", "keywords"],
)
def test_a_model_with_several_inputs_and_outputs_is_cut(inputs):
    assert_pruned_correctly(Several(), inputs, sizes=[8])


def test_an_attribute_with_two_uses_that_no_value_fits_freezes_its_units():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.width = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), 8

        def forward(self, x):
            x = self.first(x).view(-1, self.width, 8, 8)
            return self.second(x).view(-1, self.width, 64).mean(-1)

    # The second view fixes `width` to the output size, and the first view uses the same attribute.
    graph, _ = assert_pruned_correctly(Twice(), IMAGE, sizes=[])
    assert graph.blockers[0].reason == "`width` cannot be updated when the axis is pruned"
    assert graph.blockers[0].source.startswith("test_cut.py:")


def test_the_error_for_a_forward_method_that_branches_on_values_names_its_line():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match=r"Deciding cannot be traced.*test_cut\.py:\d+.*depend on the values"):
        trace(Deciding(), torch.randn(2, 4))


def test_the_error_for_a_wrong_input_shape_names_shape_and_layer():
    with pytest.raises(ModelError, match=r"shape \(2, 5\).*in `0`: .*\[2, 5\] X \[4, 4\]"):
        trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5))


def test_the_error_for_a_model_that_cannot_be_copied_names_the_reason():
    class Locked(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle lock")

    with pytest.raises(ModelError, match=r"cannot be copied.*cannot pickle lock"):
        trace(nn.Sequential(Locked(4, 4)), torch.randn(2, 4))


def test_inputs_like_a_specification_have_its_names_and_shapes():
    graph = trace(Several(), {"a": torch.randn(2, 4), "b": torch.randn(2, 5)})
    inputs = inputs_like(graph.inputs, Several())
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {"a": (2, 4), "b": (2, 5)}
