"""Adapters: what they give, where gradients go, what they are made of, and that they learn."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.distillation.losses import LOSSES
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.features.adapters import ADAPTERS, Adapter, bank_bytes, build
from kirsch.frameworks.pytorch.features.adapters.memory import products
from kirsch.frameworks.pytorch.io.vision import import_beside

MAP, WIDE = (4, 6, 8, 8), (4, 10, 8, 8)

CASES = {
    "conv": (MAP, WIDE, {}),
    "conv pooled and normalized": (MAP, (4, 10, 4, 4), {"norm": True}),
    "conv interpolated": (MAP, (4, 10, 12, 10), {"spatial": "interpolate"}),
    "fitnet": (MAP, WIDE, {}),
    "fitnet halved": (MAP, (4, 10, 4, 4), {}),
    "residual": (MAP, WIDE, {"margins": [-0.5] * 10}),
    "mgd": (MAP, WIDE, {}),
    "vid": (MAP, WIDE, {"hidden": 7, "norm": True}),
    "factor": (MAP, WIDE, {}),
    "linear": ((4, 5, 6), (4, 5, 9), {}),
    "tokens-to-map": ((4, 65, 6), WIDE, {}),
    "map-to-tokens": (MAP, (4, 65, 9), {}),
    "embed": (MAP, (4, 5, 9), {"size": 12}),
    "ofa": ((4, 6, 28, 28), (4, 10), {}),
    "ofa of tokens": ((4, 17, 6), (4, 10), {}),
    "review": ([MAP, (4, 12, 4, 4)], [WIDE, (4, 20, 4, 4)], {}),
    "crd-bank": (MAP, WIDE, {"samples": 20, "negatives": 8}),
    "crd-bank of a queue": (MAP, WIDE, {"size": 6, "negatives": 8}),
    "kept": (MAP, (4, 10, 8, 8), {"indices": [0, 2, 3, 5, 8, 9]}),
}

PARAMETERS = {
    "conv": 6 * 10,
    "conv pooled and normalized": 6 * 10 + 2 * 10,
    "conv interpolated": 6 * 10,
    "fitnet": 6 * 10 + 10 + 2 * 10,
    "fitnet halved": 6 * 10 * 9 + 10 + 2 * 10,
    "residual": 6 * 10 + 2 * 10,
    "mgd": (6 * 10 + 10) + 2 * (10 * 10 * 9 + 10),
    "vid": 6 * 7 + 7 * 7 + 7 * 10 + 2 * 2 * 7 + 10,
    "factor": 2 * ((10 * 10 + 10 * 5 + 5 * 5) * 9) + (10 + 5 + 5) + (5 + 10 + 10)  # paraphraser, and back
    + (6 * 6 + 6 * 5 + 5 * 5) * 9 + 3 * (6 + 5 + 5),  # translator: offsets and batch normalization
    "linear": 6 * 9 + 9,
    "tokens-to-map": 6 * 10 + 10,
    "map-to-tokens": 6 * 9 + 9,
    "embed": (6 + 1) * 12 + (9 + 1) * 12,
    "ofa": 2 * 6 * 9 + 6 * 6 + 6 * 12 + 2 * 6 + 2 * 12 + (12 + 1) * 10  # 28 to 14 and
    + 2 * 12 * 9 + 12 * 12 + 12 * 24 + 2 * 12 + 2 * 24 + (24 - 12) * 10,  # to 7: the head has 24 inputs
    "ofa of tokens": 6 * 10 + 10,
    # 12 channels are handed on. Each stage: in, out, their normalization; the first has attention, too.
    "review": (6 * 12 + 12 * 10 * 9 + 2 * 12 + 2 * 10 + 24 * 2 + 2) + (12 * 12 + 12 * 20 * 9 + 2 * 12 + 2 * 20),
    "crd-bank": (6 + 1) * 128 + (10 + 1) * 128,
    "crd-bank of a queue": (6 + 1) * 128 + (10 + 1) * 128,
    "kept": 0,
}  # fmt: skip

TEACHER_SIDE = {"embed": "teacher.", "crd-bank": "teacher.", "factor": ("paraphraser.", "restore.")}
"""Parameters that no gradient reaches by way of the student's value."""

SEVERAL = pytest.mark.parametrize("case", CASES)
LEARNING = pytest.mark.parametrize("case", [case for case, count in PARAMETERS.items() if count])


def kind(case):
    return case.partition(" ")[0]


def made(case, **more):
    student, teacher, options = CASES[case]
    torch.manual_seed(0)
    return build(kind(case), student, teacher, options={**options, **more})


def drawn(shapes, **more):
    if isinstance(shapes, list):
        return [drawn(shape, **more) for shape in shapes]
    return torch.randn(shapes, **more)


def values(case, **more):
    torch.manual_seed(1)
    student, teacher, _ = CASES[case]
    return drawn(student, **more), drawn(teacher, **more)


IDS = torch.tensor([3, 0, 7, 5])


def leaves(value):
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def charge(adapter, student, teacher):
    """A scalar of all that the adapter gives: distances of what is alike, sums of what is not."""
    own, its = adapter(student, teacher, ids=IDS)
    if isinstance(own, dict):
        total = density(own, its)
    elif kind_of(adapter) == "crd-bank":
        total = LOSSES["crd"](own, its)
    else:
        if kind_of(adapter) == "factor":  # factors of any length are alike, as the loss "ft" sees them
            own, its = (F.normalize(part.flatten(1)) for part in (own, its))
        total = sum(((a - b) ** 2).mean() for a, b in zip(leaves(own), leaves(its), strict=True))
    extra = adapter.extra_loss()
    return total if extra is None else total + extra


def kind_of(adapter):
    return next(name for name in ADAPTERS if isinstance(adapter, ADAPTERS[name]))


def density(own, its):
    variance = F.softplus(own["scale"]).reshape(1, -1, 1, 1) + 1e-5
    return 0.5 * ((own["mean"] - its) ** 2 / variance + variance.log()).mean()


# ------------------------------------------------------------------------------------------------ all of them


def test_every_adapter_is_tested_here():
    assert {kind(case) for case in CASES} == set(ADAPTERS)
    assert PARAMETERS.keys() == CASES.keys()


@SEVERAL
def test_parameters_are_as_many_as_the_layers_need(case):
    assert sum(parameter.numel() for parameter in made(case).parameters()) == PARAMETERS[case]


@SEVERAL
def test_gradients_reach_the_student_and_the_adapter_and_never_the_teacher(case):
    adapter, (student, teacher) = made(case), values(case)
    for leaf in leaves(student) + leaves(teacher):
        leaf.requires_grad_()
    own, its = adapter(student, teacher, ids=IDS)
    if kind(case) == "crd-bank":  # negatives of minus infinity have no sum
        own, its = (torch.sigmoid(part) for part in (own, its))
    sum(leaf.square().sum() for leaf in leaves(own)).backward(retain_graph=True)
    assert all(leaf.grad is not None for leaf in leaves(student))
    assert all(leaf.grad is None for leaf in leaves(teacher))
    unreached = {name for name, parameter in adapter.named_parameters() if parameter.grad is None}
    aside = TEACHER_SIDE.get(kind(case), ())
    assert unreached == {name for name, _ in adapter.named_parameters() if aside and name.startswith(aside)}
    extra = adapter.extra_loss()
    if extra is not None:
        extra.backward()
    for leaf in leaves(its):
        if leaf.grad_fn is not None and kind(case) in ("embed", "crd-bank"):
            leaf.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    if kind(case) in ("embed", "crd-bank", "factor"):  # the others hand the teacher's value on as it is
        assert all(leaf.grad is None for leaf in leaves(teacher))


@LEARNING
def test_it_learns(case):
    adapter, (student, teacher) = made(case), values(case)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.01)
    found = []
    for _ in range(40):
        torch.manual_seed(2)  # the same places, the same negatives
        loss = charge(adapter, student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert min(found[-5:]) < 0.97 * found[0]


@SEVERAL
def test_its_state_comes_back_in_the_same_bits(case):
    adapter, (student, teacher) = made(case), values(case)
    for _ in range(2):
        adapter(student, teacher, ids=IDS)  # batch normalization and banks have moved
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    file.seek(0)
    other = made(case)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert adapter.state_dict().keys() == other.state_dict().keys()
    for name, value in adapter.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for module in (adapter, other):
        module.eval()
    for first, second in zip(*(outputs(module, student, teacher) for module in (adapter, other)), strict=True):
        assert torch.equal(first, second)


def outputs(adapter, student, teacher):
    torch.manual_seed(3)
    return [leaf.detach() for side in adapter(student, teacher, ids=IDS) for leaf in leaves(side)]


@SEVERAL
def test_a_copy_is_apart_even_in_the_middle_of_a_step(case):
    adapter, (student, teacher) = made(case), values(case)
    adapter(student, teacher, ids=IDS)
    other = copy.deepcopy(adapter)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), other.parameters(), strict=True))
    assert not {p.data_ptr() for p in adapter.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert other.extra_loss() is None
    assert len(outputs(other, student, teacher)) == len(outputs(adapter, student, teacher))


@SEVERAL
def test_shapes_come_without_numbers(case):
    plain = [leaf.shape for leaf in outputs(made(case), *values(case))]
    with torch.device("meta"):
        adapter = made(case)
        assert {held.device.type for held in (*adapter.parameters(), *adapter.buffers())} == {"meta"}
        student, teacher = values(case)
        given = adapter(student, teacher, ids=IDS.to("meta"))
    assert [leaf.shape for side in given for leaf in leaves(side)] == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@LEARNING
def test_16_bits_are_taken_with_autocast_and_without(case, dtype):
    """Parameters stay float32, and what comes is near what comes of 32 bits."""
    student, teacher = values(case, dtype=dtype)
    for autocast in (True, False):
        adapter = made(case)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            given = outputs(adapter, student, teacher)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            own, _ = adapter(student, teacher, ids=IDS)
        sum(leaf.float().nan_to_num(0, 0, 0).square().mean() for leaf in leaves(own)).backward()
        assert all(p.dtype == torch.float32 for p in adapter.parameters())
        assert all(bool(torch.isfinite(p.grad).all()) for p in adapter.parameters() if p.grad is not None)
        exact = outputs(made(case), *(widened(side) for side in (student, teacher)))
        for found, wanted in zip(given, exact, strict=True):
            finite = torch.isfinite(wanted)
            # 8 bits of mantissa, through up to six layers and a temperature of 0.07
            assert float((found.float() - wanted)[finite].abs().max()) < 0.1 * float(wanted[finite].abs().max())


def widened(side):
    return [widened(part) for part in side] if isinstance(side, list) else side.float()


@LEARNING
def test_64_bits_stay_64_bits(case):
    adapter = made(case, dtype=torch.float64)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float64}
    own, _ = adapter(*values(case, dtype=torch.float64), ids=IDS)
    assert {leaf.dtype for leaf in leaves(own)} == {torch.float64}
    extra = adapter.extra_loss()
    assert extra is None or extra.dtype == torch.float64
    assert {p.dtype for p in made(case, dtype=torch.float16).parameters()} == {torch.float32}


@LEARNING
def test_parameters_are_drawn_from_the_callers_seed(case):
    first, second = made(case), made(case)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    torch.manual_seed(9)
    student, teacher, options = CASES[case]
    third = build(kind(case), student, teacher, options=options)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ by shape


AUTO = [
    (MAP, MAP, "same", None),
    (MAP, WIDE, "same", "Convolution"),
    (MAP, (4, 6, 4, 4), "same", "Convolution"),
    (MAP, WIDE, "any", None),
    ((4, 5, 6), (4, 5, 9), "same", "Linear"),
    ((4, 5, 6), (4, 7, 9), "any", None),
    ((4, 6), (4, 9), "same", "Linear"),
    ((4, 64, 6), WIDE, "same", "TokensToMap"),
    ((4, 65, 6), WIDE, "any", "TokensToMap"),
    (MAP, (4, 64, 9), "same", "MapToTokens"),
    (MAP, (4, 65, 9), "same", "MapToTokens"),
    ((8, 5, 6), (4, 5, 6), "same", None),  # the batch is not looked at
]


@pytest.mark.parametrize(("student", "teacher", "widths", "wanted"), AUTO)
def test_what_joins_two_shapes_is_found(student, teacher, widths, wanted):
    found = build("auto", torch.Size(student), torch.Size(teacher), options={"widths": widths})
    assert (found if found is None else type(found).__name__) == wanted


def test_relations_of_samples_need_no_join_of_any_shapes():
    options = {"widths": "any", "takes": "features"}
    assert build("auto", (4, 197, 192), (4, 512, 7, 7), options=options) is None
    assert build("auto", (4, 192), (4, 512, 7, 7), options=options) is None


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        ((4, 66, 6), WIDE, r"map of 8 × 8 has 64 places, and there are 66 tokens, of which one may be a class token"),
        (MAP, (4, 63, 6), r"map of 8 × 8 has 64 places, and there are 63 tokens"),
        ((4, 5, 6), (4, 6, 6), r"student has 5 tokens, the teacher 6"),
        ((4, 6), MAP, r"No adapter joins .* \(4, 6\) and .* \(4, 6, 8, 8\)\. They are of different kinds"),
    ],
)
def test_shapes_that_nothing_joins_are_told(student, teacher, sentence):
    with pytest.raises(ShapeError, match=sentence):
        build("auto", student, teacher, options={"widths": "same"})


def test_stages_are_joined_one_by_one_and_left_alone_where_they_agree():
    own, its = [MAP, (4, 12, 4, 4), (4, 5, 6)], [WIDE, (4, 12, 4, 4), (4, 5, 9)]
    adapter = build("auto", own, its, options={"widths": "same"})
    assert isinstance(adapter, Adapter)
    student, teacher = drawn(own), drawn(its)
    found, other = adapter(student, teacher)
    assert [part.shape for part in found] == [part.shape for part in other] == [torch.Size(shape) for shape in its]
    assert found[1] is student[1]
    assert all(a is b for a, b in zip(other, teacher, strict=True))
    assert adapter.extra_loss() is None
    assert len(list(adapter.parameters())) == 3
    assert build("auto", own, own, options={"widths": "same"}) is None


def test_what_stages_are_charged_for_is_summed():
    adapter = build("factor", [MAP, MAP], [WIDE, MAP], options={})
    student, teacher = drawn([MAP, MAP]), drawn([WIDE, MAP])
    adapter(student, teacher)
    single = 0.0
    for part, own, its in zip(adapter.parts, student, teacher, strict=True):
        again = copy.deepcopy(part)
        again(own, its)
        single += float(again.extra_loss().detach())
    assert float(adapter.extra_loss().detach()) == pytest.approx(single, rel=1e-6)  # float32
    assert adapter.extra_loss() is None


@pytest.mark.parametrize(
    ("name", "student", "teacher", "options", "error", "sentence"),
    [
        ("con", MAP, WIDE, {}, UnknownNameError, r"no adapter 'con'.*Did you mean 'conv'\?"),
        ("conv", MAP, WIDE, {"norms": True}, UsageError, r"'conv' has no option 'norms'.*norm, spatial.*mean 'norm'\?"),
        ("conv", MAP, WIDE, {"spatial": "crop"}, UsageError, r"'spatial' is 'crop'.*'pool' or 'interpolate'"),
        ("conv", (4, 5, 6), WIDE, {}, ShapeError, r"student's value has shape \(4, 5, 6\); \(N, C, H, W\) is needed"),
        ("conv", MAP, (4, 6), {}, ShapeError, r"teacher's value has shape \(4, 6\); \(N, C, H, W\) is needed"),
        ("conv", [MAP], [MAP, MAP], {}, ShapeError, r"student gives 1 stages, the teacher 2 stages"),
        ("conv", MAP, [MAP], {}, ShapeError, r"student gives one value, the teacher 1 stages"),
        ("review", MAP, WIDE, {}, ShapeError, r"'review' joins a list of stages, and was given one value"),
        ("fitnet", (4, 6, 3, 3), WIDE, {}, ShapeError, r"student's map is 3 × 3, the teacher's 8 × 8"),
        ("linear", (4, 5, 6), (4, 6, 6), {}, ShapeError, r"joins the last axis alone"),
        ("tokens-to-map", (4, 66, 6), WIDE, {}, ShapeError, r"66 tokens, and 64 places of a map of 8 × 8"),
        ("map-to-tokens", MAP, (4, 65, 6), {"prefix": 2}, ShapeError, r"as many, besides a prefix of 2"),
        ("mgd", MAP, WIDE, {"masked_fraction": 1.0}, UsageError, r"masked fraction is 1\.0; a share"),
        ("vid", MAP, WIDE, {"variance": 0.0}, UsageError, r"variance is 0\.0; a number above 1e-05"),
        ("factor", MAP, WIDE, {"rate": 0.01}, UsageError, r"rate of 0\.01 leaves no factor of 10 channels"),
        ("embed", MAP, WIDE, {"size": 0}, UsageError, r"size of an embedding is 0"),
        ("embed", (4,), WIDE, {}, ShapeError, r"value has shape \(4,\); \(N, D\), \(N, L, D\) or"),
        ("ofa", MAP, (4, 10), {"classes": 11}, ShapeError, r"teacher's value has shape \(4, 10\); \(N, 11\) is needed"),
        ("ofa", (4, 6, 7, 7), (4, 10), {"width": 8}, UsageError, r"not halved, so there is no 'width'"),
        ("residual", MAP, WIDE, {"margins": [-1.0]}, ShapeError, r"1 margins; the teacher's value has 10 channels"),
        ("residual", MAP, WIDE, {"margins": [0.5] * 10}, UsageError, r"margin is 0\.5; margins are 0 or less"),
        ("crd-bank", MAP, WIDE, {}, UsageError, r"does not know how many samples there are"),
        ("crd-bank", MAP, WIDE, {"samples": 1}, UsageError, r"'samples' of 'crd-bank' is 1; at least 2"),
        ("crd-bank", MAP, WIDE, {"size": 0}, UsageError, r"'size' of 'crd-bank' is 0; at least 1"),
        ("crd-bank", MAP, WIDE, {"size": 9, "momentum": 0.5}, UsageError, r"no 'momentum' with a 'size'"),
        ("crd-bank", MAP, WIDE, {"samples": 9, "momentum": 1.0}, UsageError, r"'momentum' of 'crd-bank' is 1\.0"),
        ("crd-bank", MAP, WIDE, {"samples": 9, "temperature": 0.0}, UsageError, r"'temperature' of 'crd-bank' is 0\.0"),
        ("crd-bank", MAP, WIDE, {"samples": 9, "negatives": 0}, UsageError, r"'negatives' of 'crd-bank' is 0"),
    ],
)
def test_what_cannot_be_built_is_told(name, student, teacher, options, error, sentence):
    with pytest.raises(error, match=sentence):
        build(name, student, teacher, options=options)


# ------------------------------------------------------------------------------------------------ closed forms


def test_a_convolution_that_changes_nothing_leaves_plain_squared_differences():
    adapter = build("conv", MAP, MAP, options={})
    nn.init.dirac_(adapter.conv.weight)
    student, teacher = drawn(MAP), drawn(MAP)
    own, its = adapter(student, teacher)
    assert float(((own - its) ** 2).mean().detach()) == pytest.approx(
        float(((student - teacher) ** 2).mean()), rel=1e-6
    )


def test_a_linear_layer_that_changes_nothing_leaves_tokens_as_they_are():
    adapter = build("linear", (2, 3, 4), (2, 3, 4), options={"bias": False})
    nn.init.eye_(adapter.linear.weight)
    student = drawn((2, 3, 4))
    assert torch.equal(adapter(student, student)[0], student)


def test_the_larger_map_is_pooled_for_height_and_width_apart():
    adapter = build("conv", (1, 1, 4, 2), (1, 1, 2, 4), options={})
    nn.init.ones_(adapter.conv.weight)
    student, teacher = torch.arange(8.0).reshape(1, 1, 4, 2), torch.arange(8.0).reshape(1, 1, 2, 4)
    own, its = adapter(student, teacher)
    assert own.tolist() == [[[[1.0, 2.0], [5.0, 6.0]]]]  # rows 0 1 / 2 3 averaged, then 4 5 / 6 7
    assert its.tolist() == [[[[0.5, 2.5], [4.5, 6.5]]]]


def test_interpolation_brings_the_student_to_the_teacher():
    adapter = build("conv", (1, 1, 1, 2), (1, 1, 1, 4), options={"spatial": "interpolate"})
    nn.init.ones_(adapter.conv.weight)
    teacher = torch.zeros(1, 1, 1, 4)
    own, its = adapter(torch.tensor([[[[0.0, 1.0]]]]), teacher)
    assert own.tolist() == [[[[0.0, 0.25, 0.75, 1.0]]]]
    assert its is teacher


@pytest.mark.parametrize(
    ("own", "its", "kernel", "stride"),
    [((8, 6), (4, 3), (3, 3), (2, 2)), ((4, 3), (8, 6), (4, 4), (2, 2)), ((8, 6), (7, 2), (2, 5), (1, 1))],
)
def test_a_hint_is_regressed_by_the_ratio_of_sizes(own, its, kernel, stride):
    adapter = build("fitnet", (2, 3, *own), (2, 5, *its), options={})
    assert (adapter.conv.kernel_size, adapter.conv.stride) == (kernel, stride)
    found, _ = adapter(drawn((2, 3, *own)), drawn((2, 5, *its)))
    assert found.shape == (2, 5, *its)
    assert float(found.detach().min()) == 0.0
    signed, _ = build("fitnet", (2, 3, *own), (2, 5, *its), options={"relu": False})(drawn((2, 3, *own)), None)
    assert float(signed.detach().min()) < 0.0


def test_tokens_are_laid_out_row_by_row_without_the_class_token():
    adapter = build("tokens-to-map", (1, 7, 1), (1, 1, 2, 3), options={})
    nn.init.ones_(adapter.linear.weight)
    nn.init.zeros_(adapter.linear.bias)
    teacher = drawn((1, 1, 2, 3))
    own, its = adapter(torch.tensor([99.0, 0, 1, 2, 3, 4, 5]).reshape(1, 7, 1), teacher)
    assert own.tolist() == [[[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]]
    assert its is teacher


def test_a_map_is_read_out_row_by_row_and_the_teachers_prefix_is_dropped():
    adapter = build("map-to-tokens", (1, 1, 2, 3), (1, 11, 1), options={"prefix": 5})
    nn.init.ones_(adapter.linear.weight)
    nn.init.zeros_(adapter.linear.bias)
    teacher = torch.arange(11.0).reshape(1, 11, 1)
    own, its = adapter(torch.arange(6.0).reshape(1, 1, 2, 3), teacher)
    assert own.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert its.flatten().tolist() == [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]


def test_a_density_begins_with_its_variance_in_every_channel():
    scale = build("vid", MAP, WIDE, options={"variance": 3.0}).scale
    assert torch.allclose(F.softplus(scale) + 1e-5, torch.tensor(3.0), rtol=1e-6)
    assert torch.allclose(F.softplus(build("vid", MAP, WIDE, options={}).scale), torch.tensor(5.0), rtol=1e-5)


def test_a_density_whose_mean_is_the_teacher_costs_half_the_logarithm_of_its_variance():
    adapter = build("vid", MAP, MAP, options={"variance": 5.0, "dtype": torch.float64})
    for layer in adapter.mean:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
    teacher = drawn(MAP, dtype=torch.float64).abs()  # the rectifiers between leave it as it is
    own, its = adapter(teacher, teacher)
    assert float(density(own, its).detach()) == pytest.approx(
        math.log(5) / 2, rel=1e-6
    )  # the scale is float32 at first


def test_margins_cut_the_teacher_off_by_channel():
    adapter = build("residual", (1, 1, 1, 2), (1, 2, 1, 2), options={"margins": [-1.0, -0.25]})
    teacher = torch.tensor([[[[-2.0, 3.0]], [[-0.5, -0.125]]]])
    _, its = adapter(torch.ones(1, 1, 1, 2), teacher)
    assert its.tolist() == [[[[-1.0, 3.0]], [[-0.25, -0.125]]]]
    assert build("residual", MAP, WIDE, options={}).margins is None


def test_masked_places_are_hidden_in_all_channels_and_in_training_alone():
    adapter = build("mgd", (64, 3, 8, 8), (64, 3, 8, 8), options={"masked_fraction": 0.65})
    for layer in (adapter.generate[0], adapter.generate[2]):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    adapter.requires_grad_(requires_grad=False)
    student = torch.ones(64, 3, 8, 8)
    torch.manual_seed(0)
    shown, _ = adapter(student, student)
    assert set(shown.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(shown[:, 0], shown[:, 1])
    # 4096 places: a standard deviation of 0.0075
    assert float(shown.mean()) == pytest.approx(0.35, abs=0.03)
    assert not torch.equal(shown[0], shown[1])
    other, _ = adapter(student, student)
    assert not torch.equal(shown, other)
    torch.manual_seed(0)
    assert torch.equal(adapter(student, student)[0], shown)
    assert torch.equal(adapter.eval()(student, student)[0], student)


def test_a_factor_is_constant_and_its_error_is_that_of_what_is_given_back():
    adapter = build("factor", MAP, WIDE, options={})
    student, teacher = drawn(MAP), drawn(WIDE).requires_grad_()
    own, its = adapter(student, teacher)
    assert own.shape == its.shape == (4, 5, 8, 8)
    assert not its.requires_grad
    assert torch.equal(its, adapter.paraphraser(teacher))
    error = F.mse_loss(adapter.restore(adapter.paraphraser(teacher)), teacher)
    assert float(adapter.extra_loss().detach()) == pytest.approx(float(error.detach()), rel=1e-6)
    assert adapter.extra_loss() is None


@pytest.mark.parametrize("pool", [True, False])
def test_embeddings_are_linear_in_the_average_or_in_all_values(pool):
    adapter = build("embed", MAP, (4, 5, 9), options={"size": 3, "pool": pool})
    student, teacher = drawn(MAP), drawn((4, 5, 9))
    own, its = adapter(student, teacher)
    first = student.mean((2, 3)) if pool else student.reshape(4, -1)
    second = teacher.mean(1) if pool else teacher.reshape(4, -1)
    assert torch.allclose(own, first @ adapter.student.linear.weight.T + adapter.student.linear.bias, atol=1e-6)
    assert torch.allclose(its, second @ adapter.teacher.linear.weight.T + adapter.teacher.linear.bias, atol=1e-6)
    unit, _ = build("embed", MAP, (4, 5, 9), options={"normalize": True})(student, teacher)
    assert torch.allclose(unit.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(("size", "halvings"), [(56, 3), (28, 2), (14, 1), (7, 0), (3, 0), (16, 2)])
def test_a_stage_is_halved_until_no_side_is_above_seven(size, halvings):
    adapter = build("ofa", (2, 4, size, size), (2, 10), options={"width": 5} if halvings else {})
    assert len(adapter.halve) == halvings
    assert adapter.head.in_features == (5 if halvings else 4)
    student = drawn((2, 4, size, size))
    assert adapter.halve(student).shape[2:] == (math.ceil(size / 2**halvings),) * 2
    scores, its = adapter(student, teacher := drawn((2, 10)))
    assert scores.shape == (2, 10)
    assert its is teacher


def test_a_review_is_the_fusion_by_hand():
    """Two stages, worked out with the layers of the adapter one at a time."""
    own, its = [(2, 3, 6, 4), (2, 5, 3, 2)], [(2, 7, 6, 4), (2, 9, 6, 4)]
    adapter = build("review", own, its, options={})
    student, teacher = drawn(own), drawn(its)
    fused, given = adapter(student, teacher)
    assert all(a is b for a, b in zip(given, teacher, strict=True))
    first, last = adapter.fusions
    assert last.attend is None
    assert first.enter[0].out_channels == 5  # as many as the last stage has
    deep = F.interpolate(last.enter(student[1]), (6, 4), mode="nearest")
    assert torch.allclose(fused[1], last.leave(deep), atol=1e-5)
    here = first.enter(student[0])
    shares = torch.sigmoid(first.attend(torch.cat([here, deep], 1)))
    assert torch.allclose(fused[0], first.leave(here * shares[:, 0:1] + deep * shares[:, 1:2]), atol=1e-5)


def test_no_more_than_512_channels_are_handed_on():
    adapter = build("review", [(2, 8, 2, 2), (2, 600, 1, 1)], [(2, 8, 2, 2), (2, 9, 1, 1)], options={})
    assert adapter.fusions[0].enter[0].out_channels == 512
    small = build("review", [(2, 8, 2, 2), (2, 600, 1, 1)], [(2, 8, 2, 2), (2, 9, 1, 1)], options={"hidden": 16})
    assert small.fusions[1].enter[0].out_channels == 16


# ------------------------------------------------------------------------------------------------ the bank


def a_bank(**options):
    """Two-dimensional embeddings that are the values themselves, in float64."""
    given = {"samples": 5, "negatives": 3, "width": 2, "temperature": 0.5, "dtype": torch.float64, **options}
    adapter = build("crd-bank", (2, 2), (2, 2), options=given)
    for side in (adapter.student, adapter.teacher):
        nn.init.eye_(side.linear.weight)
        nn.init.zeros_(side.linear.bias)
    return adapter


OWN = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
ITS = torch.tensor([[0.0, 1.0], [0.8, -0.6]], dtype=torch.float64)


def test_a_bank_begins_with_rows_of_length_one():
    bank = a_bank()
    for rows in (bank.bank_student, bank.bank_teacher):
        assert torch.allclose(rows.norm(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-6)  # drawn as float32
    assert not torch.equal(bank.bank_student, bank.bank_teacher)


def test_two_samples_move_their_rows_halfway_and_no_others():
    bank = a_bank()
    before = bank.bank_student.clone(), bank.bank_teacher.clone()
    bank(OWN, ITS, ids=torch.tensor([3, 1]))
    for rows, old, new in zip((bank.bank_student, bank.bank_teacher), before, (OWN, ITS), strict=True):
        for place, value in ((3, new[0]), (1, new[1])):
            moved = 0.5 * old[place] + 0.5 * value
            assert torch.allclose(rows[place], moved / moved.norm(), atol=1e-15)
        assert torch.equal(rows[[0, 2, 4]], old[[0, 2, 4]])


def test_momentum_is_the_share_that_stays():
    bank = a_bank(momentum=0.0)
    bank(OWN, ITS, ids=torch.tensor([3, 1]))
    assert torch.allclose(bank.bank_student[[3, 1]], OWN, atol=1e-15)
    assert torch.allclose(bank.bank_teacher[[3, 1]], ITS, atol=1e-15)


def test_scores_are_those_of_the_authors_code():
    """exp(v w / T) / Z against the other network's rows as they were before, with Z the mean times rows."""
    bank = a_bank()
    before = {"student": bank.bank_student.clone(), "teacher": bank.bank_teacher.clone()}
    ids = torch.tensor([3, 1])
    torch.manual_seed(4)
    rows = torch.cat([ids[:, None], bank._drawn(ids)], 1)
    torch.manual_seed(4)
    own, its = bank(OWN, ITS, ids=ids)
    total = 0.0
    for found, values_of, kept in ((own, OWN, before["teacher"]), (its, ITS, before["student"])):
        scores = torch.exp(torch.einsum("nd,nkd->nk", values_of, kept[rows]) / 0.5)
        scores = scores / (scores.mean() * 5)
        assert torch.allclose(found, torch.log(scores / (3 / 5)), atol=1e-12)
        noise = 3 / 5
        told = torch.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7)).sum()
        total -= (told + torch.log(noise / (scores[:, 1:] + noise + 1e-7)).sum()) / 2
    # The authors add 1e-7 below fractions of size 1, eight times.
    assert float(LOSSES["crd"](own, its).detach()) == pytest.approx(float(total), abs=1e-5)
    assert float(bank.z_student) > 0


def test_the_normalization_is_that_of_the_first_batch_of_training():
    bank = a_bank()
    bank.eval()
    bank(OWN, ITS, ids=torch.tensor([3, 1]))
    assert float(bank.z_student) == float(bank.z_teacher) == 0.0
    bank.train()
    bank(OWN, ITS, ids=torch.tensor([3, 1]))
    first = bank.z_student.clone(), bank.z_teacher.clone()
    assert min(map(float, first)) > 0
    for _ in range(3):
        bank(ITS, OWN, ids=torch.tensor([0, 2]))
    assert torch.equal(bank.z_student, first[0])
    assert torch.equal(bank.z_teacher, first[1])


def test_inference_writes_nothing():
    bank = a_bank().eval()
    before = copy.deepcopy(bank.state_dict())
    bank(OWN, ITS, ids=torch.tensor([3, 1]))
    assert all(torch.equal(before[name], value) for name, value in bank.state_dict().items())


def test_a_sample_is_never_its_own_negative_and_every_other_is_drawn_alike():
    bank = a_bank(samples=4, negatives=30000)
    ids = torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    rows = bank._drawn(ids)
    assert not bool((rows == ids[:, None]).any())
    for row, own in zip(rows, ids.tolist(), strict=True):
        counts = torch.bincount(row, minlength=4).tolist()
        assert counts.pop(own) == 0
        assert all(abs(count - 10000) < 500 for count in counts)  # a standard deviation of 82


def test_negatives_follow_from_pytorchs_seed():
    bank = a_bank(samples=1000, negatives=50)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(bank._drawn(torch.tensor([3, 1])))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_products_are_the_same_two_ways():
    """Of few drawn rows of a large bank, and of many of a small one; and so are their gradients."""
    torch.manual_seed(0)
    for rows, drawn_rows in ((1000, 2), (5, 40)):
        bank, places = torch.randn(rows, 3, dtype=torch.float64), torch.randint(rows, (4, drawn_rows))
        vectors = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        found = products(vectors, bank, places)
        wanted = (vectors[:, None] * bank[places]).sum(-1)
        assert torch.allclose(found, wanted, atol=1e-13)
        weights = torch.randn_like(found)
        slopes = [torch.autograd.grad((part * weights).sum(), vectors)[0] for part in (found, wanted)]
        assert torch.allclose(*slopes, atol=1e-13)


@pytest.mark.parametrize("negatives", [1, 400])
def test_a_step_may_follow_after_the_bank_is_written_to(negatives):
    bank = a_bank(samples=300, negatives=negatives)
    own, its = bank(OWN, ITS, ids=torch.tensor([3, 1]))
    LOSSES["crd"](own, its).backward()
    assert float(bank.student.linear.weight.grad.abs().sum()) > 0
    assert float(bank.teacher.linear.weight.grad.abs().sum()) > 0


def test_a_queue_keeps_the_last_and_forgets_the_first():
    bank = a_bank(samples=None, size=3)
    bank(OWN, ITS, ids=torch.tensor([70, 71]))
    assert bank.owners.tolist() == [70, 71, -1]
    assert torch.allclose(bank.bank_student[:2], OWN, atol=1e-15)
    bank(ITS, OWN, ids=torch.tensor([72, 73]))
    assert bank.owners.tolist() == [73, 71, 72]
    assert torch.allclose(bank.bank_student[[2, 0]], ITS, atol=1e-15)
    assert torch.allclose(bank.bank_teacher[[2, 0]], OWN, atol=1e-15)


def test_a_queue_smaller_than_a_batch_keeps_its_end():
    bank = a_bank(samples=None, size=1)
    bank(OWN, ITS, ids=torch.tensor([70, 71]))
    assert bank.owners.tolist() == [71]
    assert torch.allclose(bank.bank_student, OWN[1:], atol=1e-15)


def test_a_queue_finds_the_batch_itself_and_charges_nothing_for_rows_of_the_same_sample():
    bank = a_bank(samples=None, size=2, negatives=40)
    bank(OWN, ITS, ids=torch.tensor([7, 8]))
    own, its = bank(OWN, ITS, ids=torch.tensor([7, 9]))
    hidden = torch.isinf(own)
    assert 0 < int(hidden[0].sum()) < 40  # one row of two is its own
    assert not bool(hidden[1].any())
    assert torch.equal(hidden, torch.isinf(its))
    positive = (OWN * ITS).sum(-1) / 0.5 - torch.log(bank.z_student * 40 / 2)
    assert torch.allclose(own[:, 0], positive, atol=1e-12)
    shown = own.detach().clone()
    shown[hidden] = -1e4
    loss = LOSSES["crd"](own, its)
    assert float(loss.detach()) == pytest.approx(float(LOSSES["crd"](shown, its.detach())), rel=1e-12)
    loss.backward()
    assert bool(torch.isfinite(bank.student.linear.weight.grad).all())


def test_samples_must_be_numbered():
    with pytest.raises(UsageError, match=r"not told which samples a batch is of.*finds them by `ids`"):
        a_bank()(OWN, ITS)
    with pytest.raises(ShapeError, match=r"ids of shape \(3,\) for 2 samples"):
        a_bank()(OWN, ITS, ids=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("wrong", [5, -1])
def test_a_sample_outside_the_bank_is_told(wrong):
    bank = a_bank()
    before = bank.bank_student.clone()
    with pytest.raises(DataError, match=rf"has the sample {wrong}\. The bank is of 5 samples, which go from 0 to 4"):
        bank(OWN, ITS, ids=torch.tensor([1, wrong]))
    assert torch.equal(bank.bank_student, before)


def test_ids_may_be_numpys_or_of_32_bits():
    for ids in (torch.tensor([3, 1], dtype=torch.int32), torch.tensor([3, 1]).numpy()):
        assert a_bank()(OWN, ITS, ids=ids)[0].shape == (2, 4)


def test_what_a_bank_takes_is_known_before():
    bank = build("crd-bank", (2, 3), (2, 4), options={"samples": 70, "width": 16})
    assert bank_bytes(70, 16) == sum(rows.nbytes for rows in (bank.bank_student, bank.bank_teacher))
    assert bank_bytes(1_281_167) / 2**30 == pytest.approx(1.22, abs=0.01)  # of ImageNet
    assert bank_bytes(70, dtype=torch.float64) == 2 * bank_bytes(70)


def test_all_that_a_bank_knows_is_in_its_state():
    """A run that is cut goes on in the same bits."""
    bank = a_bank()
    bank(OWN, ITS, ids=torch.tensor([3, 1]))
    other = a_bank()
    other.load_state_dict(copy.deepcopy(bank.state_dict()))
    found = []
    for one in (bank, other):
        torch.manual_seed(6)
        found.append([part.detach() for _ in range(3) for part in one(ITS, OWN, ids=torch.tensor([0, 3]))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------ the loss of CRD


def test_crd_in_closed_form():
    """Logits of 0 are told at one half each: (1 + K) log 2 a direction."""
    assert float(LOSSES["crd"](torch.zeros(2, 4), torch.zeros(2, 4))) == pytest.approx(8 * math.log(2), rel=1e-6)
    student = torch.tensor([[math.log(3), -math.log(3)]], dtype=torch.float64)  # 3/4 for both
    teacher = torch.tensor([[-math.log(3), math.log(3)]], dtype=torch.float64)  # 1/4 for both
    assert float(LOSSES["crd"](student, teacher)) == pytest.approx(
        -2 * math.log(3 / 4) - 2 * math.log(1 / 4), rel=1e-14
    )


# ------------------------------------------------------------------------------------------------ real networks


@pytest.fixture(scope="module")
def networks():
    timm = import_beside("timm")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    made_of = {
        name: timm.create_model(name, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4))
        for name in ("mobilenetv2_050", "resnet18")
    }
    with torch.no_grad():
        teacher = made_of["resnet18"].eval()(images)
    return made_of["mobilenetv2_050"], images, teacher


@pytest.mark.parametrize("name", ["review", "conv", "auto"])
def test_four_stages_of_a_mobilenet_are_joined_to_those_of_a_resnet(networks, name):
    student, images, teacher = networks
    own = student(images)
    shapes = [[value.shape for value in side] for side in (own, teacher)]
    assert [shape[1] for shape in shapes[0]] != [shape[1] for shape in shapes[1]]
    adapter = build(name, *shapes, options={"widths": "same"})
    found, its = adapter(own, teacher)
    assert [value.shape for value in found] == [value.shape for value in its] == shapes[1]
    student.zero_grad()
    sum(((a - b) ** 2).mean() for a, b in zip(found, its, strict=True)).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
