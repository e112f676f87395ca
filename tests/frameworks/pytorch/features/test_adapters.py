"""Adapters: outputs, gradients, parameters, state, and training."""

from __future__ import annotations

import copy
import inspect
import io
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F

from frameworks.pytorch.features.adapter_values import density, random_values
from kirsch.distillation.losses import LOSSES
from kirsch.errors import ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.adapters import ADAPTER_OPTIONS
from kirsch.frameworks.pytorch.features.adapters import ADAPTERS, Adapter, build

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
    "factor": 2 * ((10 * 10 + 10 * 5 + 5 * 5) * 9) + (10 + 5 + 5) + (5 + 10 + 10)  # paraphraser and decoder
    + (6 * 6 + 6 * 5 + 5 * 5) * 9 + 3 * (6 + 5 + 5),  # translator: biases and batch norm
    "linear": 6 * 9 + 9,
    "tokens-to-map": 6 * 10 + 10,
    "map-to-tokens": 6 * 9 + 9,
    "embed": (6 + 1) * 12 + (9 + 1) * 12,
    # From 28 × 28 to 14 × 14, then a head with 12 inputs; from 14 × 14 to 7 × 7, and 12 more inputs of the head.
    "ofa": (2 * 6 * 9 + 6 * 6 + 6 * 12 + 2 * 6 + 2 * 12 + (12 + 1) * 10)
    + (2 * 12 * 9 + 12 * 12 + 12 * 24 + 2 * 12 + 2 * 24 + (24 - 12) * 10),
    "ofa of tokens": 6 * 10 + 10,
    # Each stage passes maps with 12 channels, the width of the student's deepest stage, to the next shallower stage.
    # Each stage: input, output, their batch norms; the first has attention, too.
    "review": (6 * 12 + 12 * 10 * 9 + 2 * 12 + 2 * 10 + 24 * 2 + 2) + (12 * 12 + 12 * 20 * 9 + 2 * 12 + 2 * 20),
    "crd-bank": (6 + 1) * 128 + (10 + 1) * 128,
    "crd-bank of a queue": (6 + 1) * 128 + (10 + 1) * 128,
    "kept": 0,
}  # fmt: skip

TEACHER_SIDE = {"embed": "teacher.", "crd-bank": "teacher.", "factor": ("paraphraser.", "restore.")}
"""Adapter → prefixes of the parameters that get no gradient from the student's output."""

EVERY_CASE = pytest.mark.parametrize("case", CASES)
TRAINABLE = pytest.mark.parametrize("case", [case for case, count in PARAMETERS.items() if count])


def adapter_name(case):
    return case.partition(" ")[0]


def make_adapter(case, **more):
    student, teacher, options = CASES[case]
    torch.manual_seed(0)
    return build(adapter_name(case), student, teacher, options={**options, **more})


def make_values(case, **more):
    torch.manual_seed(1)
    student, teacher, _ = CASES[case]
    return random_values(student, **more), random_values(teacher, **more)


IDS = torch.tensor([3, 0, 7, 5])


def leaves(value):
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def total_loss(adapter, student, teacher):
    """Return a scalar loss of the outputs of an adapter, plus the extra loss of the adapter."""
    student_out, teacher_out = adapter(student, teacher, ids=IDS)
    if isinstance(student_out, dict):
        total = density(student_out, teacher_out)
    elif registered_name(adapter) == "crd-bank":
        total = LOSSES["crd"](student_out, teacher_out)
    else:
        if registered_name(adapter) == "factor":  # the loss "ft" normalizes factors
            student_out, teacher_out = (F.normalize(part.flatten(1)) for part in (student_out, teacher_out))
        total = sum(((a - b) ** 2).mean() for a, b in zip(leaves(student_out), leaves(teacher_out), strict=True))
    extra = adapter.extra_loss()
    return total if extra is None else total + extra


def registered_name(adapter):
    return next(name for name in ADAPTERS if isinstance(adapter, ADAPTERS[name]))


# ------------------------------------------------------------------------------------------------ all adapters


def test_every_adapter_has_a_case():
    assert {adapter_name(case) for case in CASES} == set(ADAPTERS)
    assert PARAMETERS.keys() == CASES.keys()


@pytest.mark.parametrize("name", list(ADAPTER_OPTIONS))
def test_every_adapter_takes_the_options_that_are_declared_for_all_frameworks(name):
    parameters = list(inspect.signature(ADAPTERS[name]).parameters.values())[2:]
    assert [parameter.name for parameter in parameters] == [field.name for field in fields(ADAPTER_OPTIONS[name])]
    assert {parameter.default for parameter in parameters} == {
        inspect.Parameter.empty
    }  # the defaults are only in ADAPTER_OPTIONS
    assert ADAPTER_OPTIONS[name].__doc__.splitlines()[0].endswith(".")


def test_every_registered_adapter_is_declared_for_all_frameworks():
    assert set(ADAPTERS) == set(ADAPTER_OPTIONS)


@EVERY_CASE
def test_the_number_of_parameters_of_an_adapter_equals_its_closed_form(case):
    assert sum(parameter.numel() for parameter in make_adapter(case).parameters()) == PARAMETERS[case]


@EVERY_CASE
def test_gradients_reach_student_and_adapter_but_not_the_teacher(case):
    adapter, (student, teacher) = make_adapter(case), make_values(case)
    for leaf in leaves(student) + leaves(teacher):
        leaf.requires_grad_()
    student_out, teacher_out = adapter(student, teacher, ids=IDS)
    # In a queue, logits of negatives can be minus infinity; the sigmoid makes the sum of squares finite.
    if adapter_name(case) == "crd-bank":
        student_out, teacher_out = (torch.sigmoid(part) for part in (student_out, teacher_out))
    sum(leaf.square().sum() for leaf in leaves(student_out)).backward(retain_graph=True)
    assert all(leaf.grad is not None for leaf in leaves(student))
    assert all(leaf.grad is None for leaf in leaves(teacher))
    unreached = {name for name, parameter in adapter.named_parameters() if parameter.grad is None}
    teacher_side = TEACHER_SIDE.get(adapter_name(case), ())
    assert unreached == {
        name for name, _ in adapter.named_parameters() if teacher_side and name.startswith(teacher_side)
    }
    extra = adapter.extra_loss()
    if extra is not None:
        extra.backward()
    for leaf in leaves(teacher_out):
        if leaf.grad_fn is not None and adapter_name(case) in ("embed", "crd-bank"):
            leaf.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    if adapter_name(case) in ("embed", "crd-bank", "factor"):  # the others have no parameters for the teacher
        assert all(leaf.grad is None for leaf in leaves(teacher))


@TRAINABLE
def test_training_reduces_the_loss(case):
    adapter, (student, teacher) = make_adapter(case), make_values(case)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.01)
    losses = []
    for _ in range(40):
        torch.manual_seed(2)  # the same masks and negatives
        loss = total_loss(adapter, student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.97 * losses[0]


@EVERY_CASE
def test_a_saved_and_loaded_adapter_gives_identical_outputs(case):
    adapter, (student, teacher) = make_adapter(case), make_values(case)
    for _ in range(2):
        adapter(student, teacher, ids=IDS)  # updates batch norms and banks
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    file.seek(0)
    other = make_adapter(case)
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


@EVERY_CASE
def test_a_deep_copy_after_a_forward_pass_shares_no_parameters(case):
    adapter, (student, teacher) = make_adapter(case), make_values(case)
    adapter(student, teacher, ids=IDS)
    other = copy.deepcopy(adapter)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), other.parameters(), strict=True))
    assert not {p.data_ptr() for p in adapter.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert other.extra_loss() is None
    assert len(outputs(other, student, teacher)) == len(outputs(adapter, student, teacher))


@EVERY_CASE
def test_adapters_run_on_the_meta_device(case):
    plain = [leaf.shape for leaf in outputs(make_adapter(case), *make_values(case))]
    with torch.device("meta"):
        adapter = make_adapter(case)
        assert {tensor.device.type for tensor in (*adapter.parameters(), *adapter.buffers())} == {"meta"}
        student, teacher = make_values(case)
        result = adapter(student, teacher, ids=IDS.to("meta"))
    assert [leaf.shape for side in result for leaf in leaves(side)] == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@TRAINABLE
def test_values_of_16_bits_work_with_and_without_autocast(case, dtype):
    """Parameters stay float32, and the outputs are close to those of float32 values."""
    student, teacher = make_values(case, dtype=dtype)
    for autocast in (True, False):
        adapter = make_adapter(case)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            result = outputs(adapter, student, teacher)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            student_out, _ = adapter(student, teacher, ids=IDS)
        sum(leaf.float().nan_to_num(0, 0, 0).square().mean() for leaf in leaves(student_out)).backward()
        assert all(p.dtype == torch.float32 for p in adapter.parameters())
        assert all(bool(torch.isfinite(p.grad).all()) for p in adapter.parameters() if p.grad is not None)
        exact = outputs(make_adapter(case), *(to_float32(side) for side in (student, teacher)))
        for value, expected in zip(result, exact, strict=True):
            finite = torch.isfinite(expected)
            # 8 bits of mantissa, through up to six layers and a temperature of 0.07
            assert float((value.float() - expected)[finite].abs().max()) < 0.1 * float(expected[finite].abs().max())


def to_float32(side):
    return [to_float32(part) for part in side] if isinstance(side, list) else side.float()


@TRAINABLE
def test_parameters_are_float64_for_values_of_64_bits(case):
    adapter = make_adapter(case, dtype=torch.float64)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float64}
    student_out, _ = adapter(*make_values(case, dtype=torch.float64), ids=IDS)
    assert {leaf.dtype for leaf in leaves(student_out)} == {torch.float64}
    extra = adapter.extra_loss()
    assert extra is None or extra.dtype == torch.float64
    assert {p.dtype for p in make_adapter(case, dtype=torch.float16).parameters()} == {torch.float32}


@TRAINABLE
def test_initial_parameters_follow_from_the_seed(case):
    first, second = make_adapter(case), make_adapter(case)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    torch.manual_seed(9)
    student, teacher, options = CASES[case]
    third = build(adapter_name(case), student, teacher, options=options)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ choice by shape


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
    ((8, 5, 6), (4, 5, 6), "same", None),  # the batch size is ignored
]


@pytest.mark.parametrize(("student", "teacher", "widths", "expected"), AUTO)
def test_auto_chooses_an_adapter_by_the_shapes(student, teacher, widths, expected):
    adapter = build("auto", torch.Size(student), torch.Size(teacher), options={"widths": widths})
    assert (adapter if adapter is None else type(adapter).__name__) == expected


def test_auto_needs_no_adapter_for_losses_on_relations_between_samples():
    options = {"widths": "any", "takes": "features"}
    assert build("auto", (4, 197, 192), (4, 512, 7, 7), options=options) is None
    assert build("auto", (4, 192), (4, 512, 7, 7), options=options) is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            (4, 66, 6),
            WIDE,
            r"map of 8 × 8 has 64 positions, and there are 66 tokens, of which one may be",
        ),
        (MAP, (4, 63, 6), r"map of 8 × 8 has 64 positions, and there are 63 tokens"),
        ((4, 5, 6), (4, 6, 6), r"student has 5 tokens, the teacher 6"),
        ((4, 6), MAP, r"No adapter fits .* \(4, 6\) and .* \(4, 6, 8, 8\)\. The values are of different kinds"),
    ],
)
def test_auto_refuses_shapes_without_an_adapter(student, teacher, message):
    with pytest.raises(ShapeError, match=message):
        build("auto", student, teacher, options={"widths": "same"})


def test_auto_builds_adapters_only_for_stages_that_differ():
    student_out, teacher_out = [MAP, (4, 12, 4, 4), (4, 5, 6)], [WIDE, (4, 12, 4, 4), (4, 5, 9)]
    adapter = build("auto", student_out, teacher_out, options={"widths": "same"})
    assert isinstance(adapter, Adapter)
    student, teacher = random_values(student_out), random_values(teacher_out)
    converted, other = adapter(student, teacher)
    assert (
        [part.shape for part in converted]
        == [part.shape for part in other]
        == [torch.Size(shape) for shape in teacher_out]
    )
    assert converted[1] is student[1]
    assert all(a is b for a, b in zip(other, teacher, strict=True))
    assert adapter.extra_loss() is None
    assert len(list(adapter.parameters())) == 3
    assert build("auto", student_out, student_out, options={"widths": "same"}) is None


def test_the_extra_loss_of_an_adapter_is_the_sum_over_its_stages():
    adapter = build("factor", [MAP, MAP], [WIDE, MAP], options={})
    student, teacher = random_values([MAP, MAP]), random_values([WIDE, MAP])
    adapter(student, teacher)
    single = 0.0
    for part, student_out, teacher_out in zip(adapter.parts, student, teacher, strict=True):
        again = copy.deepcopy(part)
        again(student_out, teacher_out)
        single += float(again.extra_loss().detach())
    assert float(adapter.extra_loss().detach()) == pytest.approx(single, rel=1e-6)  # float32
    assert adapter.extra_loss() is None


@pytest.mark.parametrize(
    ("name", "student", "teacher", "options", "error", "message"),
    [
        ("con", MAP, WIDE, {}, UnknownNameError, r"no adapter 'con'.*Did you mean 'conv'\?"),
        ("conv", MAP, WIDE, {"norms": True}, UsageError, r"'conv' has no option 'norms'.*norm, spatial.*mean 'norm'\?"),
        ("conv", MAP, WIDE, {"spatial": "crop"}, UsageError, r"'spatial' is 'crop'.*'pool' or 'interpolate'"),
        ("conv", (4, 5, 6), WIDE, {}, ShapeError, r"student's value has shape \(4, 5, 6\); \(N, C, H, W\) is needed"),
        ("conv", MAP, (4, 6), {}, ShapeError, r"teacher's value has shape \(4, 6\); \(N, C, H, W\) is needed"),
        ("conv", [MAP], [MAP, MAP], {}, ShapeError, r"student has 1 stage, the teacher has 2 stages"),
        ("conv", MAP, [MAP], {}, ShapeError, r"student has one value, the teacher has 1 stage"),
        ("review", MAP, WIDE, {}, ShapeError, r"'review' needs a list of stages; there is only one value"),
        ("fitnet", (4, 6, 3, 3), WIDE, {}, ShapeError, r"student's map is 3 × 3, the teacher's 8 × 8"),
        ("linear", (4, 5, 6), (4, 6, 6), {}, ShapeError, r"can only change the last axis"),
        ("tokens-to-map", (4, 66, 6), WIDE, {}, ShapeError, r"66 tokens, and a map of 8 × 8 has 64 positions"),
        ("map-to-tokens", MAP, (4, 65, 6), {"prefix": 2}, ShapeError, r"equal, except for a prefix of 2"),
        ("mgd", MAP, WIDE, {"masked_fraction": 1.0}, UsageError, r"`masked_fraction` is 1\.0; a number"),
        ("vid", MAP, WIDE, {"variance": 0.0}, UsageError, r"`variance` is 0\.0; a number above 1e-05"),
        ("factor", MAP, WIDE, {"rate": 0.01}, UsageError, r"`rate` is 0\.01, which leaves 0 of 10 channels"),
        ("embed", MAP, WIDE, {"size": 0}, UsageError, r"`size` of an embedding is 0"),
        ("embed", (4,), WIDE, {}, ShapeError, r"value has shape \(4,\); \(N, D\), \(N, L, D\) or"),
        ("ofa", MAP, (4, 10), {"classes": 11}, ShapeError, r"teacher's value has shape \(4, 10\); \(N, 11\) is needed"),
        ("ofa", (4, 6, 7, 7), (4, 10), {"width": 8}, UsageError, r"'width' has no effect"),
        ("residual", MAP, WIDE, {"margins": [-1.0]}, ShapeError, r"1 margins; the teacher's value has 10 channels"),
        ("residual", MAP, WIDE, {"margins": [0.5] * 10}, UsageError, r"margin is 0\.5; margins of at most 0"),
        ("crd-bank", MAP, WIDE, {}, UsageError, r"needs the number of samples"),
        ("crd-bank", MAP, WIDE, {"samples": 1}, UsageError, r"'samples' of 'crd-bank' is 1; at least 2"),
        ("crd-bank", MAP, WIDE, {"size": 0}, UsageError, r"'size' of 'crd-bank' is 0; at least 1"),
        ("crd-bank", MAP, WIDE, {"size": 9, "momentum": 0.5}, UsageError, r"no 'momentum' if 'size' is set"),
        ("crd-bank", MAP, WIDE, {"samples": 9, "momentum": 1.0}, UsageError, r"'momentum' of 'crd-bank' is 1\.0"),
        ("crd-bank", MAP, WIDE, {"samples": 9, "temperature": 0.0}, UsageError, r"'temperature' of 'crd-bank' is 0\.0"),
        ("crd-bank", MAP, WIDE, {"samples": 9, "negatives": 0}, UsageError, r"'negatives' of 'crd-bank' is 0"),
    ],
)
def test_invalid_names_options_and_shapes_are_refused(name, student, teacher, options, error, message):
    with pytest.raises(error, match=message):
        build(name, student, teacher, options=options)
