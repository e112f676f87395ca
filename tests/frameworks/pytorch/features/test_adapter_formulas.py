"""Outputs of adapters in closed form, and adapters between real networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from frameworks.pytorch.features.adapter_values import density, random_values
from kirsch.frameworks.pytorch.features.adapters import build
from kirsch.frameworks.pytorch.io.vision import import_beside

MAP, WIDE = (4, 6, 8, 8), (4, 10, 8, 8)


# ------------------------------------------------------------------------------------------------ closed forms


def test_an_identity_convolution_gives_the_plain_squared_difference():
    adapter = build("conv", MAP, MAP, options={})
    nn.init.dirac_(adapter.conv.weight)
    student, teacher = random_values(MAP), random_values(MAP)
    student_out, teacher_out = adapter(student, teacher)
    assert float(((student_out - teacher_out) ** 2).mean().detach()) == pytest.approx(
        float(((student - teacher) ** 2).mean()), rel=1e-6
    )


def test_an_identity_linear_layer_returns_the_tokens():
    adapter = build("linear", (2, 3, 4), (2, 3, 4), options={"bias": False})
    nn.init.eye_(adapter.linear.weight)
    student = random_values((2, 3, 4))
    assert torch.equal(adapter(student, student)[0], student)


def test_the_larger_map_is_pooled_separately_for_height_and_width():
    adapter = build("conv", (1, 1, 4, 2), (1, 1, 2, 4), options={})
    nn.init.ones_(adapter.conv.weight)
    student, teacher = torch.arange(8.0).reshape(1, 1, 4, 2), torch.arange(8.0).reshape(1, 1, 2, 4)
    student_out, teacher_out = adapter(student, teacher)
    assert student_out.tolist() == [[[[1.0, 2.0], [5.0, 6.0]]]]  # rows 0 1 / 2 3 averaged, then 4 5 / 6 7
    assert teacher_out.tolist() == [[[[0.5, 2.5], [4.5, 6.5]]]]


def test_interpolation_resizes_the_student_to_the_teacher():
    adapter = build("conv", (1, 1, 1, 2), (1, 1, 1, 4), options={"spatial": "interpolate"})
    nn.init.ones_(adapter.conv.weight)
    teacher = torch.zeros(1, 1, 1, 4)
    student_out, teacher_out = adapter(torch.tensor([[[[0.0, 1.0]]]]), teacher)
    assert student_out.tolist() == [[[[0.0, 0.25, 0.75, 1.0]]]]
    assert teacher_out is teacher


@pytest.mark.parametrize(
    ("size_s", "size_t", "kernel", "stride"),
    [((8, 6), (4, 3), (3, 3), (2, 2)), ((4, 3), (8, 6), (4, 4), (2, 2)), ((8, 6), (7, 2), (2, 5), (1, 1))],
)
def test_fitnet_chooses_the_convolution_by_the_ratio_of_sizes(size_s, size_t, kernel, stride):
    adapter = build("fitnet", (2, 3, *size_s), (2, 5, *size_t), options={})
    assert (adapter.conv.kernel_size, adapter.conv.stride) == (kernel, stride)
    converted, _ = adapter(random_values((2, 3, *size_s)), random_values((2, 5, *size_t)))
    assert converted.shape == (2, 5, *size_t)
    assert float(converted.detach().min()) == 0.0
    signed, _ = build("fitnet", (2, 3, *size_s), (2, 5, *size_t), options={"relu": False})(
        random_values((2, 3, *size_s)), None
    )
    assert float(signed.detach().min()) < 0.0


def test_tokens_become_a_map_row_by_row_without_the_class_token():
    adapter = build("tokens-to-map", (1, 7, 1), (1, 1, 2, 3), options={})
    nn.init.ones_(adapter.linear.weight)
    nn.init.zeros_(adapter.linear.bias)
    teacher = random_values((1, 1, 2, 3))
    student_out, teacher_out = adapter(torch.tensor([99.0, 0, 1, 2, 3, 4, 5]).reshape(1, 7, 1), teacher)
    assert student_out.tolist() == [[[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]]
    assert teacher_out is teacher


def test_a_map_becomes_tokens_row_by_row_without_the_teachers_prefix():
    adapter = build("map-to-tokens", (1, 1, 2, 3), (1, 11, 1), options={"prefix": 5})
    nn.init.ones_(adapter.linear.weight)
    nn.init.zeros_(adapter.linear.bias)
    teacher = torch.arange(11.0).reshape(1, 11, 1)
    student_out, teacher_out = adapter(torch.arange(6.0).reshape(1, 1, 2, 3), teacher)
    assert student_out.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert teacher_out.flatten().tolist() == [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]


def test_the_initial_variance_of_vid_is_the_option_variance():
    scale = build("vid", MAP, WIDE, options={"variance": 3.0}).scale
    assert torch.allclose(F.softplus(scale) + 1e-5, torch.tensor(3.0), rtol=1e-6)
    assert torch.allclose(F.softplus(build("vid", MAP, WIDE, options={}).scale), torch.tensor(5.0), rtol=1e-5)


def test_vid_with_the_teacher_as_mean_is_half_the_log_variance():
    adapter = build("vid", MAP, MAP, options={"variance": 5.0, "dtype": torch.float64})
    for layer in adapter.mean:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
    teacher = random_values(MAP, dtype=torch.float64).abs()  # so that the ReLUs do not change it
    student_out, teacher_out = adapter(teacher, teacher)
    assert float(density(student_out, teacher_out).detach()) == pytest.approx(
        math.log(5) / 2, rel=1e-6
    )  # the scale is initialized in float32


def test_margins_clip_the_teacher_by_channel():
    adapter = build("residual", (1, 1, 1, 2), (1, 2, 1, 2), options={"margins": [-1.0, -0.25]})
    teacher = torch.tensor([[[[-2.0, 3.0]], [[-0.5, -0.125]]]])
    _, teacher_out = adapter(torch.ones(1, 1, 1, 2), teacher)
    assert teacher_out.tolist() == [[[[-1.0, 3.0]], [[-0.25, -0.125]]]]
    assert build("residual", MAP, WIDE, options={}).margins is None


def test_positions_are_masked_in_all_channels_and_only_in_training():
    adapter = build("mgd", (64, 3, 8, 8), (64, 3, 8, 8), options={"masked_fraction": 0.65})
    for layer in (adapter.generate[0], adapter.generate[2]):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    adapter.requires_grad_(requires_grad=False)
    student = torch.ones(64, 3, 8, 8)
    torch.manual_seed(0)
    visible, _ = adapter(student, student)
    assert set(visible.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(visible[:, 0], visible[:, 1])
    # 4096 positions: a standard deviation of 0.0075
    assert float(visible.mean()) == pytest.approx(0.35, abs=0.03)
    assert not torch.equal(visible[0], visible[1])
    other, _ = adapter(student, student)
    assert not torch.equal(visible, other)
    torch.manual_seed(0)
    assert torch.equal(adapter(student, student)[0], visible)
    assert torch.equal(adapter.eval()(student, student)[0], student)


def test_the_teachers_factor_has_no_gradient_and_extra_loss_is_its_reconstruction_error():
    adapter = build("factor", MAP, WIDE, options={})
    student, teacher = random_values(MAP), random_values(WIDE).requires_grad_()
    student_out, teacher_out = adapter(student, teacher)
    assert student_out.shape == teacher_out.shape == (4, 5, 8, 8)
    assert not teacher_out.requires_grad
    assert torch.equal(teacher_out, adapter.paraphraser(teacher))
    error = F.mse_loss(adapter.restore(adapter.paraphraser(teacher)), teacher)
    assert float(adapter.extra_loss().detach()) == pytest.approx(float(error.detach()), rel=1e-6)
    assert adapter.extra_loss() is None


@pytest.mark.parametrize("pool", [True, False])
def test_embeddings_are_linear_in_the_average_or_the_flattened_values(pool):
    adapter = build("embed", MAP, (4, 5, 9), options={"size": 3, "pool": pool})
    student, teacher = random_values(MAP), random_values((4, 5, 9))
    student_out, teacher_out = adapter(student, teacher)
    first = student.mean((2, 3)) if pool else student.reshape(4, -1)
    second = teacher.mean(1) if pool else teacher.reshape(4, -1)
    assert torch.allclose(student_out, first @ adapter.student.linear.weight.T + adapter.student.linear.bias, atol=1e-6)
    assert torch.allclose(
        teacher_out, second @ adapter.teacher.linear.weight.T + adapter.teacher.linear.bias, atol=1e-6
    )
    unit, _ = build("embed", MAP, (4, 5, 9), options={"normalize": True})(student, teacher)
    assert torch.allclose(unit.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(("size", "halvings"), [(56, 3), (28, 2), (14, 1), (7, 0), (3, 0), (16, 2)])
def test_a_stage_is_halved_until_height_and_width_are_at_most_seven(size, halvings):
    adapter = build("ofa", (2, 4, size, size), (2, 10), options={"width": 5} if halvings else {})
    assert len(adapter.halve) == halvings
    assert adapter.head.in_features == (5 if halvings else 4)
    student = random_values((2, 4, size, size))
    assert adapter.halve(student).shape[2:] == (math.ceil(size / 2**halvings),) * 2
    scores, teacher_out = adapter(student, teacher := random_values((2, 10)))
    assert scores.shape == (2, 10)
    assert teacher_out is teacher


def test_review_equals_a_fusion_computed_layer_by_layer():
    student_out, teacher_out = [(2, 3, 6, 4), (2, 5, 3, 2)], [(2, 7, 6, 4), (2, 9, 6, 4)]
    adapter = build("review", student_out, teacher_out, options={})
    student, teacher = random_values(student_out), random_values(teacher_out)
    fused, given = adapter(student, teacher)
    assert all(a is b for a, b in zip(given, teacher, strict=True))
    first, last = adapter.fusions
    assert last.attend is None
    assert first.enter[0].out_channels == 5  # as many as the last stage has
    deep = F.interpolate(last.enter(student[1]), (6, 4), mode="nearest")
    assert torch.allclose(fused[1], last.leave(deep), atol=1e-5)
    mixed = first.enter(student[0])
    shares = torch.sigmoid(first.attend(torch.cat([mixed, deep], 1)))
    assert torch.allclose(fused[0], first.leave(mixed * shares[:, 0:1] + deep * shares[:, 1:2]), atol=1e-5)


def test_review_has_at_most_512_hidden_channels():
    adapter = build("review", [(2, 8, 2, 2), (2, 600, 1, 1)], [(2, 8, 2, 2), (2, 9, 1, 1)], options={})
    assert adapter.fusions[0].enter[0].out_channels == 512
    small = build("review", [(2, 8, 2, 2), (2, 600, 1, 1)], [(2, 8, 2, 2), (2, 9, 1, 1)], options={"hidden": 16})
    assert small.fusions[1].enter[0].out_channels == 16


# ------------------------------------------------------------------------------------------------ real networks


@pytest.fixture(scope="module")
def networks():
    timm = import_beside("timm")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    models = {
        name: timm.create_model(name, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4))
        for name in ("mobilenetv2_050", "resnet18")
    }
    with torch.no_grad():
        teacher = models["resnet18"].eval()(images)
    return models["mobilenetv2_050"], images, teacher


@pytest.mark.parametrize("name", ["review", "conv", "auto"])
def test_stages_of_a_mobilenet_are_converted_to_those_of_a_resnet(networks, name):
    student, images, teacher = networks
    student_out = student(images)
    shapes = [[value.shape for value in side] for side in (student_out, teacher)]
    assert [shape[1] for shape in shapes[0]] != [shape[1] for shape in shapes[1]]
    adapter = build(name, *shapes, options={"widths": "same"})
    converted, teacher_out = adapter(student_out, teacher)
    assert [value.shape for value in converted] == [value.shape for value in teacher_out] == shapes[1]
    student.zero_grad()
    sum(((a - b) ** 2).mean() for a, b in zip(converted, teacher_out, strict=True)).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
